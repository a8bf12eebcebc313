"""The one row schema of every data set: what `prepare` writes and everything downstream reads.

A manifest is a table with one row per image, kept as Parquet beside the images (CSV is accepted too). Nothing
downstream knows the raw layout of a data set, only these columns.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fsvfm.errors import DataError

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
    "subject": "person id; empty if unknown",
    "frame": "frame index in the video; 0 for photos",
}

#: Columns that may be there: `parse` (file of the parsing labels), `origin` (raw file), and lists per image.
GRID_PREFIX = "grid_p"
SPLITS = ("train", "val", "test")
_TEXT = ("path", "split", "dataset", "method", "video", "subject")
_SHOWN = 5


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
        rows: table with the columns of :data:`COLUMNS`; more columns are kept. `grid_p16`, `grid_p14` hold uint8 lists
            of L region bit-masks (missing for images without a parse).
        root: folder of the manifest.
        source: how error messages call it; by default the folder.

    Attributes:
        table: the rows as a DataFrame: text columns, `label` int8, `frame` int32, lists as Arrow columns.

    Raises:
        DataError: a missing column, a label other than 0 or 1, an unknown split, `method` contradicting `label`,
            a path twice, or a video or subject in two splits (03-datasets, sec. 7). All problems are told together.
    """

    def __init__(self, rows: pd.DataFrame, root: str | Path, source: str | None = None) -> None:
        self.root = Path(root)
        self.source = source or str(self.root)
        self.table = _typed(rows, self.source)
        problems = _problems(self.table)
        if problems:
            raise DataError(f"manifest {self.source}:\n  - " + "\n  - ".join(problems))

    @classmethod
    def read(cls, path: str | Path) -> Manifest:
        """Read a Parquet or CSV manifest, or the one inside a prepared folder.

        Raises:
            DataError: no such file, not a readable table, or rows that break the schema.
        """
        path = Path(path).expanduser()
        file = path
        if path.is_dir():
            file = path / MANIFEST_NAME
            if not file.is_file() and file.with_suffix(".csv").is_file():
                file = file.with_suffix(".csv")
        if not file.is_file():
            raise DataError(
                f"no manifest at {file}; expected a prepared folder with {MANIFEST_NAME}, or a .parquet or .csv file. "
                "Prepare one with `python -m fsvfm.prepare recipe=...`"
            )
        try:
            if file.suffix == ".csv":
                rows = pd.read_csv(file, dtype=dict.fromkeys(_TEXT, str), keep_default_na=False)
            else:
                rows = pq.read_table(file).to_pandas(types_mapper=_lists_stay_in_arrow, ignore_metadata=True)
        except (ValueError, OSError, pa.ArrowException) as error:
            raise DataError(f"{file} is not a readable Parquet or CSV table: {error}") from error
        return cls(rows, file.parent, str(file))

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
                files = {name: manifest.paths(name) for name in ("path", "parse") if name in table}
                table = table.assign(**files)
            parts.append(pa.Table.from_pandas(table, preserve_index=False).replace_schema_metadata())
        joined = pa.concat_tables(parts, promote_options="permissive")
        rows = joined.to_pandas(types_mapper=_lists_stay_in_arrow, ignore_metadata=True)
        return cls(rows, root, " + ".join(manifest.source for manifest in manifests))

    def write(self, path: str | Path | None = None) -> Path:
        """Write the manifest as Parquet (atomically) and return its path.

        Args:
            path: a `.parquet` file or a folder; by default `manifest.parquet` in the manifest's own folder. Relative
                image paths keep their meaning only if the file stays in :attr:`root`.

        Raises:
            DataError: another suffix, or a folder where relative paths would point elsewhere.
        """
        file = Path(path) if path is not None else self.root / MANIFEST_NAME
        if file.suffix == "":
            file = file / MANIFEST_NAME
        if file.suffix != ".parquet":
            raise DataError(f"a manifest is written as .parquet, not {file.name}")
        if file.parent.resolve() != self.root.resolve() and not self.table["path"].str.startswith("/").all():
            raise DataError(
                f"{file} would lie outside {self.root}, but its image paths are relative to {self.root}; "
                "write it there, or make the paths absolute"
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        pq.write_table(pa.Table.from_pandas(self.table, preserve_index=False), temporary, compression="zstd")
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
        prefix = f"{self.root.absolute()}/"
        values = self.table[column].fillna("").tolist()
        return [value if value == "" or value[0] == "/" else prefix + value for value in values]

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
        flat = pc.list_flatten(pa.array(self.table[column]))
        return np.asarray(flat).astype(np.uint8, copy=False).reshape(len(self.table), -1)

    def counts(self) -> pd.DataFrame:
        """Images, videos and subjects per data set, split, label and method: one row each, ordered train, val, test."""
        keys = ["dataset", "split", "label", "method"]
        table = self.table.groupby(keys, sort=True).agg(
            images=("path", "size"), videos=("video", "nunique"), subjects=("subject", "nunique")
        )
        table = table.reset_index()
        order = table["split"].map({name: place for place, name in enumerate(SPLITS)})
        return (
            table.assign(order=order)
            .sort_values(["dataset", "order", "label", "method"], kind="stable")
            .drop(columns="order")
            .reset_index(drop=True)
        )

    def __len__(self) -> int:
        return len(self.table)

    def __repr__(self) -> str:
        return f"Manifest({len(self.table)} images, root={str(self.root)!r})"


def from_folder(
    root: str | Path,
    *,
    split: str = "test",
    dataset: str | None = None,
    classes: Mapping[str, int] | None = None,
    suffixes: Iterable[str] = (".png", ".jpg", ".jpeg", ".webp", ".bmp"),
) -> Manifest:
    """Manifest of ready face images in one sub-folder per class, taken as they are (03-datasets, sec. 6).

    `real*` and `fake*` folders are recognised, others need `classes={"folder": 0 or 1}`. The method of a fake is its
    folder's name; `video` and `subject` are the sub-folder below the class, or the file's stem.

    Raises:
        DataError: no such folder, a class folder without a known label, or no image.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise DataError(f"no folder {root}; expected one sub-folder per class, such as {root}/real and {root}/fake")
    allowed = {suffix.lower() for suffix in suffixes}
    rows: list[dict[str, Any]] = []
    for folder in sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")):
        label = class_of_folder(folder.name, classes)
        if label is None:
            raise DataError(
                f"is the folder {folder} real or fake? Only names that start with 'real' or 'fake' are recognised; "
                f"say so with classes={{{folder.name}: 0}} (real) or 1 (fake)"
            )
        for file in sorted(entry for entry in folder.rglob("*") if entry.suffix.lower() in allowed):
            inner = file.relative_to(folder)
            group = inner.parent.as_posix() if len(inner.parts) > 1 else inner.stem
            rows.append(
                {
                    "path": file.relative_to(root).as_posix(),
                    "label": label,
                    "split": split,
                    "dataset": dataset or root.name,
                    "method": "real" if label == 0 else folder.name,
                    "video": f"{folder.name}/{group}",
                    "subject": group,
                    "frame": 0,
                }
            )
    if not rows:
        raise DataError(f"no image below {root}; looked for {', '.join(sorted(allowed))} in one sub-folder per class")
    return Manifest(pd.DataFrame(rows), root)


def _lists_stay_in_arrow(kind: pa.DataType) -> pd.ArrowDtype | None:
    # Millions of small NumPy arrays in an object column would cost more than the grids themselves.
    return pd.ArrowDtype(kind) if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind) else None


def _typed(rows: pd.DataFrame, source: str) -> pd.DataFrame:
    missing = [name for name in COLUMNS if name not in rows]
    if missing:
        wanted = "\n  ".join(f"{name}: {COLUMNS[name]}" for name in missing)
        raise DataError(f"the manifest {source} lacks the column(s)\n  {wanted}\nIt has: {', '.join(rows.columns)}")
    rows = rows.reset_index(drop=True)
    for name in _TEXT:
        rows[name] = rows[name].astype("str").where(rows[name].notna(), "")
    for name, kind, limit in (("label", np.int8, 127), ("frame", np.int32, 2**31 - 1)):
        numbers = pd.to_numeric(rows[name], errors="coerce")
        bad = numbers.isna() | (numbers % 1 != 0) | (numbers.abs() > limit)
        if bad.any():
            examples = rows.loc[bad, [name, "path"]].head(_SHOWN)
            listed = "; ".join(f"{value!r} for {path}" for value, path in examples.itertuples(index=False))
            raise DataError(f"manifest {source}: {int(bad.sum())} value(s) of {name!r} are no whole number: {listed}")
        rows[name] = numbers.astype(kind)
    for name in rows.columns:
        if name.startswith(GRID_PREFIX) and not isinstance(rows[name].dtype, pd.ArrowDtype):
            rows[name] = _grid_column(rows[name], source)
    others = [name for name in rows.columns if name not in COLUMNS]
    return rows[[*COLUMNS, *others]]


def _grid_column(values: pd.Series, source: str) -> pd.Series:
    lengths = {len(value) for value in values if value is not None and not np.isscalar(value)}
    if len(lengths) != 1:
        raise DataError(f"manifest {source}: {values.name} must hold lists of one length, found {sorted(lengths)}")
    lists = [None if value is None or np.isscalar(value) else np.asarray(value, np.uint8) for value in values]
    kind = pa.list_(pa.uint8(), lengths.pop())
    return pd.Series(pd.arrays.ArrowExtensionArray(pa.array(lists, type=kind)), index=values.index, name=values.name)


def _problems(rows: pd.DataFrame) -> list[str]:
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
    tell(rows["path"].duplicated(keep=False) & (rows["path"] != ""), "with a path that occurs more than once", "path")
    tell((rows["label"] == 0) & (rows["method"] != "real"), "have label 0 but a method other than 'real'", "method")
    tell((rows["label"] == 1) & (rows["method"] == "real"), "have label 1 but the method 'real'", "path")
    for column in ("video", "subject"):
        offenders = _in_several_splits(rows, column)
        if offenders:
            listed = "; ".join(f"{name} ({', '.join(splits)})" for name, splits in offenders[:_SHOWN])
            more = f"; and {len(offenders) - _SHOWN} more" if len(offenders) > _SHOWN else ""
            found.append(f"{len(offenders)} {column}(s) in more than one split, a leak: {listed}{more}")
    return found


def _in_several_splits(rows: pd.DataFrame, column: str) -> list[tuple[str, list[str]]]:
    known = rows.loc[rows[column] != "", ["dataset", column, "split"]].drop_duplicates()
    leaking = known[known.duplicated(["dataset", column], keep=False)]
    return [
        (str(name), [split for split in SPLITS if split in set(group)])
        for (_, name), group in leaking.groupby(["dataset", column])["split"]
    ]
