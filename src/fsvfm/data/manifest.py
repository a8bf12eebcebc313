"""The one row schema of every data set: what `prepare` writes and everything downstream reads.

A manifest is a table with one row per image, kept as Parquet beside the images (CSV is accepted too). Nothing
downstream knows the raw layout of a data set, only these columns.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fsvfm.data.storage import fetch, is_remote
from fsvfm.errors import ConfigError, DataError

#: File name of the manifest inside a prepared folder.
MANIFEST_NAME = "manifest.parquet"

#: Columns that every manifest has, in this order, with what each holds.
COLUMNS: Mapping[str, str] = {
    "path": "image file, absolute or relative to the manifest's folder",
    "label": "0 real, 1 fake or attack",
    "split": "train, val or test",
    "dataset": "name of the data set",
    "method": "how the image was forged; 'real' for label 0",
    "video": "id of the video (or photo) the image is from, unique in the data set",
    "subject": "person id; several, joined by '+', where a forgery is made of several people; empty if unknown",
    "frame": "frame index in the video; 0 for photos",
}

#: Columns that may be there: `parse` (file of the parsing labels), `mask` (file of a forgery's mask), `origin` (raw
#: file), and lists per image.
GRID_PREFIX = "grid_p"
SPLITS = ("train", "val", "test")
_TEXT = ("path", "split", "dataset", "method", "video", "subject")
_SHOWN = 5
_ROWS_AT_ONCE = 32768


def class_of_folder(name: str, classes: Mapping[str, int] | None = None) -> int | None:
    """Label of a class folder: by the explicit mapping, else 0 for names like `real*` and 1 for `fake*`, else None."""
    if classes and name in classes:
        return int(classes[name])
    lower = name.lower()
    if lower.startswith("real"):
        return 0
    if lower.startswith("fake"):
        return 1
    return None


class Manifest:
    """Rows of a data set together with the folder their relative paths start from.

    Args:
        rows: table with the columns of :data:`COLUMNS`; more columns are kept. `grid_p16`, `grid_p14` hold L
            region bit-masks as uint8 lists (missing for images without a parse); they are kept as bytes.
        root: folder of the manifest.
        source: how error messages call it; by default the folder.
        check: False takes typed rows as they are, with their faults; only for looking at them (:func:`problems`).

    Attributes:
        table: the rows as a DataFrame: text columns, `label` int8, `frame` int32, lists as Arrow columns.

    Raises:
        DataError: a missing column, a label other than 0 or 1, an unknown split, `method` contradicting `label`,
            a path twice, or a video or subject in two splits (03-datasets, sec. 7). All problems are told together.
    """

    def __init__(self, rows: pd.DataFrame, root: str | Path, source: str | None = None, *, check: bool = True) -> None:
        self.root = root if is_remote(root) else Path(root)
        self.source = source or str(self.root)
        self.table = _typed(rows, self.source)
        found = problems(self.table) if check else []
        if found:
            raise DataError(f"manifest {self.source}:\n  - " + "\n  - ".join(found))

    @classmethod
    def read(
        cls, path: str | Path, *, extra: Sequence[str] | None = None, root: str | Path | None = None, check: bool = True
    ) -> Manifest:
        """Read a Parquet or CSV manifest, the one inside a prepared folder, or a folder in a published layout.

        Args:
            path: the file or folder; also a URL (``s3://…``) of a packed one, whose manifest is fetched.
            extra: columns to read beside those of :data:`COLUMNS`, as far as they are there; None reads all. Grids and
                landmarks are most of a manifest: with millions of rows, read what is needed.
            root: folder that relative image paths start from; None is the file's own.
            check: False reads a faulty Parquet or CSV manifest as it is, for looking at it.

        Raises:
            DataError: no such file, not a readable table, or rows that break the schema.
        """
        if is_remote(path):
            url = str(path).rstrip("/")
            url = url if url.endswith((".parquet", ".csv")) else f"{url}/{MANIFEST_NAME}"
            found = cls.read(fetch(url, again=True), extra=extra, root=root or url.rsplit("/", 1)[0], check=check)
            found.source = url
            return found
        path = Path(path).expanduser()
        file = path
        if path.is_dir():
            file = path / MANIFEST_NAME
            if not file.is_file() and file.with_suffix(".csv").is_file():
                file = file.with_suffix(".csv")
            if not file.is_file():
                from fsvfm.data import layouts  # it builds manifests itself

                return layouts.read(path)
        if not file.is_file():
            raise DataError(
                f"no manifest at {file}; expected a prepared folder with {MANIFEST_NAME}, or a .parquet or .csv file. "
                "Prepare one with `python -m fsvfm.prepare recipe=...`"
            )
        try:
            if file.suffix == ".csv":
                rows = pd.read_csv(file, dtype=dict.fromkeys(_TEXT, str), keep_default_na=False)
            else:
                rows = _to_pandas(_read_parquet(file, extra))
        except (ValueError, OSError, pa.ArrowException) as error:
            raise DataError(f"{file} is not a readable Parquet or CSV table: {error}") from error
        return cls(rows, root or file.parent, str(file), check=check)

    @classmethod
    def concat(cls, manifests: Sequence[Manifest]) -> Manifest:
        """One manifest of several, in order. Paths become absolute unless all lie in one folder.

        Raises:
            DataError: none given, or together they break the schema (a path twice, a person in two splits).
        """
        if not manifests:
            raise DataError("no manifest to concatenate; name at least one prepared folder")
        if len(manifests) == 1:
            return manifests[0]
        root = manifests[0].root
        parts = []
        for manifest in manifests:
            table = manifest.table
            if manifest.root != root:
                files = {name: manifest.paths(name) for name in ("path", "parse", "mask") if name in table}
                table = table.assign(**files)
            parts.append(pa.Table.from_pandas(table, preserve_index=False).replace_schema_metadata())
        for name in {name for part in parts for name in part.column_names if name.startswith(GRID_PREFIX)}:
            kinds = {part.schema.field(name).type for part in parts if name in part.column_names} - {pa.null()}
            if len(kinds) > 1:  # of images of several sizes: they are computed from the parsing maps then
                parts = [part.drop_columns([name]) if name in part.column_names else part for part in parts]
        rows = _to_pandas(pa.concat_tables(parts, promote_options="permissive"))
        return cls(rows, root, " + ".join(manifest.source for manifest in manifests))

    def write(self, path: str | Path | None = None) -> Path:
        """Write the manifest as Parquet (atomically) and return its path.

        Args:
            path: a `.parquet` file or a folder; by default `manifest.parquet` in the manifest's own folder. Relative
                image paths keep their meaning only if the file stays in :attr:`root`.

        Raises:
            DataError: another suffix, or a folder where relative paths would point elsewhere.
        """
        if path is None and isinstance(self.root, str):
            raise DataError(f"{self.root} is remote; say where to write the manifest")
        file = Path(path) if path is not None else Path(self.root) / MANIFEST_NAME
        if file.suffix == "":
            file = file / MANIFEST_NAME
        if file.suffix != ".parquet":
            raise DataError(f"a manifest is written as .parquet, not {file.name}")
        if file.parent.resolve() != Path(self.root).resolve() and not self.table["path"].str.startswith("/").all():
            raise DataError(
                f"{file} would lie outside {self.root}, but its image paths are relative to {self.root}; "
                "write it there, or make the paths absolute"
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        # Without what pandas would note about its types: anybody's reader understands the plain ones.
        table = pa.Table.from_pandas(self.table, preserve_index=False).replace_schema_metadata()
        pq.write_table(table, temporary, compression="zstd")
        temporary.replace(file)
        return file

    def select(
        self,
        *,
        split: str | Iterable[str] | None = None,
        methods: str | Iterable[str] | None = None,
        label: int | Iterable[int] | None = None,
        datasets: str | Iterable[str] | None = None,
    ) -> Manifest:
        """Rows that meet every given condition, in order, as a new manifest. None means no condition.

        Real images carry the method `real`: ask for `methods=["real", "face_swap"]` to have both classes.

        Raises:
            DataError: nothing is left; the message lists what there is.
        """
        wanted = {"split": split, "method": methods, "label": label, "dataset": datasets}
        keep = np.ones(len(self.table), dtype=bool)
        for column, values in wanted.items():
            if values is not None:
                listed = [values] if isinstance(values, str | int) else list(values)
                keep &= self.table[column].isin(listed).to_numpy()
        if not keep.any():
            asked = ", ".join(f"{key}={value!r}" for key, value in wanted.items() if value is not None)
            there = self.counts().to_string(index=False)
            raise DataError(f"no image in {self.source} has {asked or 'any row'}. There are:\n{there}")
        return self._subset(keep)

    def sample(self, limit: int, seed: int) -> Manifest:
        """At most `limit` rows, drawn without replacement by `seed`, in the order they have here.

        Raises:
            DataError: a limit below 1.
        """
        if limit < 1:
            raise DataError(f"a sample of {limit} rows was asked of {self.source}; expected 1 or more")
        if limit >= len(self):
            return self
        return self._subset(np.sort(np.random.default_rng(seed).permutation(len(self))[:limit]))

    def _subset(self, which: np.ndarray) -> Manifest:
        if which.dtype == bool and which.all():
            return self
        chosen = Manifest.__new__(Manifest)  # a subset of valid rows is valid: do not check millions of rows again
        chosen.root, chosen.source = self.root, self.source
        chosen.table = self.table.iloc[np.flatnonzero(which) if which.dtype == bool else which].reset_index(drop=True)
        return chosen

    def require_both_classes(self, purpose: str) -> None:
        """Raise DataError unless there are real and fake rows; `purpose` says what they are for."""
        there = set(self.table["label"].unique().tolist())
        if there != {0, 1}:
            what = {0: "real", 1: "fake"}[next(iter(there))]
            raise DataError(
                f"the rows of {self.source} chosen for {purpose} are all {what}; both classes are needed. "
                f"Chosen were:\n{self.counts().to_string(index=False)}"
            )

    def paths(self, column: str = "path") -> list[str]:
        """Absolute file of every row; `column` may also be `parse` or another column of files (empty stays empty)."""
        if column not in self.table:
            raise DataError(f"the manifest {self.source} has no column {column!r}; it has {list(self.table.columns)}")
        prefix = _prefix(self.root)
        return [_absolute(value, prefix) for value in self.table[column].fillna("").tolist()]

    def files(self, column: str = "path") -> Files:
        """Like :meth:`paths`, for millions of rows: a sequence that makes each path when it is asked for."""
        if column not in self.table:
            raise DataError(f"the manifest {self.source} has no column {column!r}; it has {list(self.table.columns)}")
        return Files(pa.chunked_array(pa.array(self.table[column])).combine_chunks(), self.root)

    def parse_paths(self) -> list[str | None] | None:
        """Absolute file of every row's parsing map (None where there is none), or None if no row has one."""
        if "parse" not in self.table:
            return None
        files = [file or None for file in self.paths("parse")]
        return files if any(files) else None

    def grids(self, patch_size: int) -> np.ndarray | None:
        """Region grids of all rows: (N, L) uint8, bit r set where a patch belongs to region r.

        None unless every row has a grid for this patch size (forged images, for example, have none).
        """
        column = f"{GRID_PREFIX}{patch_size}"
        if column not in self.table or self.table[column].isna().any():
            return None
        values = pa.chunked_array(pa.array(self.table[column]))
        width = values.type.byte_width
        parts = [
            np.frombuffer(chunk.buffers()[1], np.uint8)[chunk.offset * width :][: len(chunk) * width]
            for chunk in values.chunks
        ]
        flat = parts[0] if len(parts) == 1 else np.concatenate(parts)  # a view where possible
        return flat.reshape(len(self.table), width)

    def counts(self) -> pd.DataFrame:
        """Images, videos and subjects per data set, split, label and method: one row each, ordered train, val, test."""
        keys = ["dataset", "split", "label", "method"]
        groups = self.table.groupby(keys, sort=True)
        table = groups.agg(images=("path", "size"), videos=("video", "nunique")).reset_index()
        people = _people(self.table[[*keys, "subject"]]).drop_duplicates().groupby(keys).size()
        table["subjects"] = people.reindex(pd.MultiIndex.from_frame(table[keys]), fill_value=0).to_numpy()
        order = table["split"].map({name: place for place, name in enumerate(SPLITS)})
        return (
            table.assign(order=order)
            .sort_values(["dataset", "order", "label", "method"], kind="stable")
            .drop(columns="order")
            .reset_index(drop=True)
        )

    def sampling_weights(
        self, *, balance: str | None = None, datasets: Mapping[str, float] | None = None
    ) -> np.ndarray:
        """Probability of each row to be drawn.

        Args:
            balance: `class` draws as many reals as fakes; `method` moreover draws the fakes' methods equally often.
                None draws all rows alike.
            datasets: share of every data set in the draws, relative to the others, whatever its size; None leaves the
                data sets as they are, and balances their rows together.

        Returns:
            (N,) float64, summing to 1.

        Raises:
            ConfigError: an unknown balance, or shares that are not positive or not of exactly these data sets.
        """
        if balance not in (None, "class", "method"):
            raise ConfigError(f"balance={balance!r} is unknown; expected class, method or null")
        there = sorted(self.table["dataset"].unique())
        weight = np.ones(len(self.table))
        group = np.zeros(len(self.table), dtype=np.int64)
        levels: list[tuple[str, Mapping[str, float] | None]] = [("label", None), ("method", None)]
        levels = levels[: {None: 0, "class": 1, "method": 2}[balance]]
        if datasets is not None:
            if set(datasets) != set(there) or min(datasets.values()) <= 0:
                raise ConfigError(
                    f"weights {dict(datasets)}: expected one positive number for each data set {', '.join(there)}"
                )
            levels = [("dataset", datasets), *levels]
        for column, shares in levels:
            # Each group of the level above is divided among its values of this column.
            codes, values = pd.factorize(self.table[column])
            pairs, inner = np.unique(group * len(values) + codes, return_inverse=True)
            parts = np.array([1.0 if shares is None else shares[values[pair % len(values)]] for pair in pairs])
            total = np.bincount(pairs // len(values), parts)[pairs // len(values)]
            weight *= (parts / total)[inner]
            group = inner
        weight /= np.bincount(group)[group]
        return weight

    def digest(self) -> str:
        """SHA-256 (hexadecimal) of the rows: of the columns that every manifest has, not of pictures and lists.

        It does not depend on where the folder lies, as long as its paths are relative.
        """
        total = hashlib.sha256()
        for name in COLUMNS:
            values = pa.chunked_array(pa.array(self.table[name]))
            if name in _TEXT:
                text = values.cast(pa.large_string())
                # Lengths tell the values apart: "ab", "c" is not "a", "bc".
                lengths = np.concatenate([pc.binary_length(part).to_numpy() for part in text.chunks])
                total.update(lengths.astype("<i8").tobytes())
                for part in text.chunks:
                    total.update(_joined(part))
            else:
                total.update(values.to_numpy().astype("<i8").tobytes())
        return total.hexdigest()

    def __len__(self) -> int:
        return len(self.table)

    def __repr__(self) -> str:
        return f"Manifest({len(self.table)} images, root={str(self.root)!r})"


def _prefix(root: Path | str) -> str:
    """What stands before a path relative to ``root``, a folder or a URL."""
    return f"{root}/" if isinstance(root, str) else f"{root.absolute()}/"


def _absolute(value: str, prefix: str) -> str:
    return value if value == "" or value[0] == "/" or is_remote(value) else prefix + value


class Files(Sequence[str]):
    """Absolute paths, made one at a time; millions of strings would cost memory in every loader process."""

    def __init__(self, values: pa.Array, root: Path | str) -> None:
        self._values, self._prefix = values, _prefix(root)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        return _absolute(self._values[int(index)].as_py() or "", self._prefix)

    def __len__(self) -> int:
        return len(self._values)


def leaks(train: Manifest, test: Manifest) -> pd.DataFrame:
    """What two manifests share: one row per offender, with the columns `kind`, `dataset` and `name`.

    Kinds: `video` and `subject` (ids mean something within one data set only), `image` (the same file) and `origin`
    (the same raw file, where both know it).
    """
    found = []
    for kind in ("video", "subject"):
        here, there = (
            _people(part.table[["dataset", kind]], kind).drop_duplicates().reset_index(drop=True)
            for part in (train, test)
        )
        found.append(here.merge(there).rename(columns={kind: "name"}).assign(kind=kind))
    for kind in ("path", "origin"):
        if kind in train.table and kind in test.table:
            here, there = (
                pd.DataFrame(
                    {"dataset": part.table["dataset"], "name": part.paths() if kind == "path" else part.table[kind]}
                )
                for part in (train, test)
            )
            shared = here[here["name"].isin(there["name"]) & here["name"].notna() & (here["name"] != "")]
            found.append(shared.drop_duplicates().assign(kind="image" if kind == "path" else kind))
    return pd.concat(found, ignore_index=True)[["kind", "dataset", "name"]]


def check_leaks(train: Manifest, test: Manifest, *, allow: bool = False) -> list[str]:
    """Compare what was trained and validated on with a test set (03-datasets, sec. 7).

    Args:
        train: rows of training and validation; those of its test split are not looked at.
        test: the rows to be tested on, whatever their split.
        allow: turn the error into warnings, for those who know why.

    Returns:
        warnings, such as a video that was validated on: some public bundles use the test set for it.

    Raises:
        DataError: a video, person, image or raw file of training is in the test set; the message lists offenders.
    """
    warnings: list[str] = []
    for split in ("val", "train"):
        if not (train.table["split"] == split).any():
            continue
        shared = leaks(train.select(split=split), test)
        if shared.empty:
            continue
        told = []
        for kind, names in shared.groupby("kind", sort=False)["name"]:
            listed = ", ".join(names.head(_SHOWN)) + (", …" if len(names) > _SHOWN else "")
            told.append(f"{len(names)} {kind}(s) ({listed})")
        what = {"train": "trained on", "val": "validated on: the checkpoint was chosen with them"}[split]
        text = f"{' and '.join(told)} of {test.source} are also {what}"
        if split == "train" and not allow:
            raise DataError(f"{text}. Test on others, or leave them out of {train.source}")
        warnings.append(text)
    return warnings


def write_rows(rows: Iterable[Mapping[str, Any]], file: Path) -> int:
    """Write rows as a Parquet manifest, without ever holding all of them, and return their number.

    They are not checked against each other; :meth:`Manifest.read` does that. Same rows give the same bytes.

    Args:
        rows: with the columns of :data:`COLUMNS` and others; a column may be missing from some rows.
        file: to write, atomically; nothing is written if there are no rows.

    Raises:
        DataError: a required column is missing, or a value is of the wrong kind.
    """
    rows = iter(rows)
    schemas: list[pa.Schema] = []
    count = 0
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".rows-") as folder:
        # Which columns there are, and of what type, is known at the end only; so parts first, then one file of them.
        while chunk := list(islice(rows, _ROWS_AT_ONCE)):
            table = pa.Table.from_pandas(_typed(pd.DataFrame(chunk), str(file)), preserve_index=False)
            pq.write_table(table.replace_schema_metadata(), f"{folder}/{len(schemas)}.parquet", compression="lz4")
            schemas.append(pq.read_schema(f"{folder}/{len(schemas)}.parquet"))
            count += len(chunk)
        if count == 0:
            return 0
        schema = pa.unify_schemas(schemas, promote_options="permissive")
        joined = f"{folder}/joined"
        with pq.ParquetWriter(joined, schema, compression="zstd") as writer:
            for part in range(len(schemas)):
                table = pq.read_table(f"{folder}/{part}.parquet")
                missing = [field for field in schema if field.name not in table.column_names]
                for field in missing:
                    table = table.append_column(field, pa.nulls(len(table), field.type))
                writer.write_table(table.select(schema.names).cast(schema))
        Path(joined).replace(file)
    pa.default_memory_pool().release_unused()
    return count


def _read_parquet(file: Path, extra: Sequence[str] | None) -> pa.Table:
    wanted = None if extra is None else [name for name in pq.read_schema(file).names if name in (*COLUMNS, *extra)]
    table = pq.read_table(file, columns=wanted)
    for place, field in enumerate(table.schema):
        if pa.types.is_fixed_size_binary(field.type):  # in one piece, so that grids() is a view of it
            table = table.set_column(place, field, table[field.name].combine_chunks())
    return table


def _to_pandas(table: pa.Table) -> pd.DataFrame:
    # Arrow for lists: millions of small NumPy arrays in an object column would cost more than the grids themselves.
    return table.to_pandas(
        types_mapper=lambda kind: pd.ArrowDtype(kind) if _is_wide(kind) else None,
        ignore_metadata=True,
        split_blocks=True,
        self_destruct=True,
    )


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind)


def _is_wide(kind: pa.DataType) -> bool:
    return _is_list(kind) or pa.types.is_fixed_size_binary(kind)


def _is_grid(values: pd.Series) -> bool:
    return isinstance(values.dtype, pd.ArrowDtype) and pa.types.is_fixed_size_binary(values.dtype.pyarrow_dtype)


def _joined(text: pa.Array) -> memoryview:
    """The characters of a large_string array, without gaps."""
    ends = np.frombuffer(text.buffers()[1], np.int64)[text.offset : text.offset + len(text) + 1]
    return memoryview(text.buffers()[2] or b"")[ends[0] : ends[-1]]


def _people(rows: pd.DataFrame, column: str = "subject") -> pd.DataFrame:
    """Rows with a known value of the column, one for each person where it names several."""
    rows = rows[rows[column] != ""]
    several = rows[column].str.contains("+", regex=False) if column == "subject" else pd.Series(False, rows.index)
    if not several.any():
        return rows
    return rows.assign(**{column: rows[column].str.split("+")}).explode(column).astype({column: "str"})


def _typed(rows: pd.DataFrame, source: str) -> pd.DataFrame:
    missing = [name for name in COLUMNS if name not in rows]
    if missing:
        wanted = "\n  ".join(f"{name}: {COLUMNS[name]}" for name in missing)
        raise DataError(f"the manifest {source} lacks the column(s)\n  {wanted}\nIt has: {', '.join(rows.columns)}")
    rows = rows.reset_index(drop=True)
    for name in _TEXT:
        if rows[name].dtype != "str" or rows[name].hasnans:
            rows[name] = rows[name].astype("str").where(rows[name].notna(), "")
    for name, kind, limit in (("label", np.int8, 127), ("frame", np.int32, 2**31 - 1)):
        if rows[name].dtype == kind:
            continue
        numbers = pd.to_numeric(rows[name], errors="coerce")
        bad = numbers.isna() | (numbers % 1 != 0) | (numbers.abs() > limit)
        if bad.any():
            examples = rows.loc[bad, [name, "path"]].head(_SHOWN)
            listed = "; ".join(f"{value!r} for {path}" for value, path in examples.itertuples(index=False))
            raise DataError(f"manifest {source}: {int(bad.sum())} value(s) of {name!r} are no whole number: {listed}")
        rows[name] = numbers.astype(kind)
    for name in rows.columns:
        if name.startswith(GRID_PREFIX) and not _is_grid(rows[name]) and rows[name].notna().any():
            rows[name] = _grid_column(rows[name], source)
    others = [name for name in rows.columns if name not in COLUMNS]
    return rows[[*COLUMNS, *others]]


def _grid_column(values: pd.Series, source: str) -> pd.Series:
    """Grids as bytes of one length: Parquet reads a million of them at once, and as views instead of copies."""
    if isinstance(values.dtype, pd.ArrowDtype) and _is_list(values.dtype.pyarrow_dtype):  # of older manifests
        values = values.astype(object)

    def packed(value: Any) -> bytes | None:
        if isinstance(value, bytes):
            return value
        return None if value is None or value is pd.NA or np.isscalar(value) else np.asarray(value, np.uint8).tobytes()

    lists = [packed(value) for value in values]
    lengths = {len(value) for value in lists if value is not None}
    if len(lengths) != 1:
        raise DataError(f"manifest {source}: {values.name} must hold lists of one length, found {sorted(lengths)}")
    column = pd.arrays.ArrowExtensionArray(pa.array(lists, type=pa.binary(lengths.pop())))
    return pd.Series(column, index=values.index, name=values.name)


def problems(rows: pd.DataFrame) -> list[str]:
    """Everything that is wrong with typed rows, in words; vectorised, since manifests have millions of rows."""
    found: list[str] = []
    if len(rows) == 0:
        return ["it has no rows"]

    def tell(bad: pd.Series, what: str, column: str) -> None:
        if bad.any():
            values = rows.loc[bad, column].drop_duplicates().head(_SHOWN).tolist()
            found.append(f"{int(bad.sum())} row(s) {what}: {', '.join(map(repr, values))}")

    tell(~rows["label"].isin([0, 1]), "with a label other than 0 (real) and 1 (fake or attack)", "label")
    tell(~rows["split"].isin(SPLITS), f"with a split other than {', '.join(SPLITS)}", "split")
    tell(rows["path"] == "", "without a path", "video")
    if pc.count_distinct(pa.array(rows["path"])).as_py() < len(rows):
        twice = rows["path"].duplicated(keep=False) & (rows["path"] != "")
        tell(twice, "with a path that occurs more than once", "path")
    tell((rows["label"] == 0) & (rows["method"] != "real"), "have label 0 but a method other than 'real'", "method")
    tell((rows["label"] == 1) & (rows["method"] == "real"), "have label 1 but the method 'real'", "path")
    if rows["split"].nunique() > 1:
        for column in ("video", "subject"):
            offenders = _in_several_splits(rows, column)
            if offenders:
                listed = "; ".join(f"{name} ({', '.join(splits)})" for name, splits in offenders[:_SHOWN])
                more = f"; and {len(offenders) - _SHOWN} more" if len(offenders) > _SHOWN else ""
                found.append(f"{len(offenders)} {column}(s) in more than one split, a leak: {listed}{more}")
    return found


def _in_several_splits(rows: pd.DataFrame, column: str) -> list[tuple[str, list[str]]]:
    known = _people(rows[["dataset", column, "split"]].drop_duplicates(), column).drop_duplicates()
    leaking = known[known.duplicated(["dataset", column], keep=False)]
    return [
        (str(name), [split for split in SPLITS if split in set(group)])
        for (_, name), group in leaking.groupby(["dataset", column])["split"]
    ]
