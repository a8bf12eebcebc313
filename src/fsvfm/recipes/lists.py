"""What users bring as a file: a text list, a JSON list or a table that names pictures and their labels.

Paths are relative to `prefix`, or to the file's own folder where there is none; absolute ones stay. Files that do not
exist are counted and listed, and the others are used. A label is 0 (real) or 1 (fake) and nothing else.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from fsvfm.data.manifest import SPLITS
from fsvfm.errors import ConfigError, DataError
from fsvfm.recipes.engine import Catalogue, Entry, Prepared
from fsvfm.recipes.photos import file_names
from fsvfm.recipes.stills import prepare_stills

#: `path label`, `path,label` or `path, label`: the label is what stands after the last separator.
_LINE = re.compile(r"(?P<path>.*[^\s,])(?:\s*,\s*|\s+)(?P<label>[^\s,]+)")


def list_catalogue(
    root: str | Path, *, name: str, split: str = "test", prefix: str | None = None, fake_label: int = 1
) -> Catalogue:
    """A text file with a line `path label` per picture; the two are separated by spaces, a comma, or both.

    A path may hold spaces and commas: the label is what stands after the last of them. Empty lines do not count.

    Args:
        root: the file.
        name: of the data set.
        split: of all rows.
        prefix: folder that relative paths start from; None takes the file's.
        fake_label: the label that means fake in this file, 0 or 1.

    Raises:
        DataError: no such file, a line without a label, another label than 0 and 1, or none of the pictures exists.
    """
    file = _file(root, "a text list with a line `path label` per picture")
    rows = []
    for number, line in enumerate(_text(file).split("\n"), 1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise DataError(f"{file}, line {number}: {line.strip()!r} has no label; expected `path label`")
        rows.append((f"line {number}", match.groupdict()))
    return _catalogue(file, rows, name=name, split=split, prefix=prefix, fake_label=fake_label)


def json_catalogue(
    root: str | Path, *, name: str, split: str = "test", prefix: str | None = None, fake_label: int = 1
) -> Catalogue:
    """A JSON file with a list of `{"path": …, "label": 0 or 1}`.

    The objects may also have `split`, `method`, `video`, `subject` and `frame`.

    Args:
        root: the file.
        name: of the data set.
        split: of the rows that do not say it.
        prefix: folder that relative paths start from; None takes the file's.
        fake_label: the label that means fake in this file, 0 or 1.

    Raises:
        DataError: no such file, no such list, another label than 0 and 1, or none of the pictures exists.
    """
    file = _file(root, 'a JSON list of {"path": …, "label": 0 or 1}')
    try:
        objects = json.loads(_text(file))
    except ValueError as error:
        raise DataError(f"{file} is not JSON: {error}") from error
    if not isinstance(objects, list) or not all(isinstance(each, dict) for each in objects):
        raise DataError(f'{file} holds {type(objects).__name__}; expected a list of {{"path": …, "label": 0 or 1}}')
    rows = [(f"entry {number}", each) for number, each in enumerate(objects, 1)]
    return _catalogue(file, rows, name=name, split=split, prefix=prefix, fake_label=fake_label)


def table_catalogue(
    root: str | Path, *, name: str, split: str = "test", prefix: str | None = None, fake_label: int = 1
) -> Catalogue:
    """A CSV or Parquet table with the columns `path` and `label`.

    It may also have `split`, `method`, `video`, `subject` and `frame`; other columns do not count.

    Args:
        root: the file.
        name: of the data set.
        split: of the rows that do not say it.
        prefix: folder that relative paths start from; None takes the file's.
        fake_label: the label that means fake in this file, 0 or 1.

    Raises:
        DataError: no such file, no table, a missing column, another label than 0 and 1, or none of the pictures exists.
    """
    file = _file(root, "a CSV or Parquet table with the columns path and label")
    try:
        if file.suffix.lower() == ".parquet":
            table = pd.read_parquet(file).astype(object)
        else:
            table = pd.read_csv(file, dtype=str, keep_default_na=False, encoding="utf-8-sig", skipinitialspace=True)
    except (ValueError, OSError, ImportError) as error:
        raise DataError(f"{file} is not a readable CSV or Parquet table: {error}") from error
    first = 1 if file.suffix.lower() == ".parquet" else 2  # a CSV file's first line is the header
    rows = [(f"row {number}", each) for number, each in enumerate(_records(table), first)]
    missing = [column for column in ("path", "label") if column not in table]
    if missing:
        raise DataError(f"{file} lacks the column(s) {', '.join(missing)}; it has {', '.join(map(str, table.columns))}")
    return _catalogue(file, rows, name=name, split=split, prefix=prefix, fake_label=fake_label)


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(column): value for column, value in row.items()} for row in table.to_dict("records")]


def _file(root: str | Path, what: str) -> Path:
    file = Path(root).expanduser().absolute()
    if not file.is_file():
        raise DataError(f"{file} is not a file; expected {what}")
    return file


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text ({error}); convert it") from error


def _catalogue(
    file: Path,
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    *,
    name: str,
    split: str,
    prefix: str | None,
    fake_label: int,
) -> Catalogue:
    """The catalogue of (place in the file, row)."""
    if fake_label not in (0, 1):
        raise ConfigError(f"recipe.fake_label={fake_label!r}: expected the label that means fake, 0 or 1")
    if split not in SPLITS:
        raise ConfigError(f"recipe.split={split!r}: expected one of {', '.join(SPLITS)}")
    folder = Path(prefix).expanduser().absolute() if prefix else file.parent
    found: dict[str, Entry] = {}
    skipped: list[tuple[str, str]] = []
    for place, row in rows:
        where = f"{file}, {place}"
        listed = _value(row, "path").replace("\\", "/")
        if not listed:
            raise DataError(f"{where}: no path")
        label = _label(_value(row, "label"), where)
        path = os.path.normpath(folder / listed)
        entry = _entry(path, listed, int(label == fake_label), row, split, where)
        if path in found:
            if found[path].label != entry.label:
                raise DataError(f"{where}: {listed} is listed both as real and as fake")
            skipped.append((path, "listed twice"))
        elif not Path(path).is_file():
            skipped.append((path, "no such file"))
        else:
            found[path] = entry
    if not found:
        absent = [path for path, reason in skipped if reason == "no such file"]
        what = f"none of the {len(absent)} listed pictures exists, the first: {absent[0]}" if absent else "it is empty"
        raise DataError(
            f"{file}: {what}. Relative paths start from {folder}; choose another with recipe.prefix=<folder>"
        )
    names = file_names([entry.name for entry in found.values()])
    entries = [entry._replace(name=plain) for entry, plain in zip(found.values(), names, strict=True)]
    card = {"about": f"pictures listed in {file.name}", "source": {"file": str(file)}}
    return Catalogue(name, entries, card, skipped)


def _value(row: Mapping[str, Any], column: str) -> str:
    """A column's value as text; empty where it is absent or missing."""
    value = row.get(column)
    return "" if value is None or value != value else str(value).strip()


def _label(text: str, where: str) -> int:
    if text not in ("0", "1", "0.0", "1.0"):
        raise DataError(
            f"{where}: the label is {text!r}; expected 0 (real) or 1 (fake), or the other way round with "
            "recipe.fake_label=0"
        )
    return int(float(text))


def _entry(path: str, listed: str, label: int, row: Mapping[str, Any], split: str, where: str) -> Entry:
    own_split = _value(row, "split") or split
    if own_split not in SPLITS:
        raise DataError(f"{where}: the split is {own_split!r}; expected one of {', '.join(SPLITS)}")
    method = _value(row, "method") or "fake"
    if label and method == "real":
        raise DataError(f"{where}: a fake with the method 'real'; expected how it was made, or no method")
    frame = _value(row, "frame")
    if frame and not re.fullmatch(r"\d{1,9}(\.0)?", frame):
        raise DataError(f"{where}: the frame is {frame!r}; expected a number")
    return Entry(
        path,
        listed,
        label,
        own_split,
        method if label else "real",
        _value(row, "video") or listed,
        _value(row, "subject"),
        more={"frame": int(float(frame))} if frame else {},
    )


def text_list(*, name: str, root: str, split: str, prefix: str | None, fake_label: int, **driver: Any) -> Prepared:
    """Prepare a text list: :func:`list_catalogue`, then :func:`fsvfm.recipes.stills.prepare_stills` with the rest."""
    catalogue = list_catalogue(root, name=name, split=split, prefix=prefix, fake_label=fake_label)
    return prepare_stills(catalogue, **driver)


def json_list(*, name: str, root: str, split: str, prefix: str | None, fake_label: int, **driver: Any) -> Prepared:
    """Prepare a JSON list: :func:`json_catalogue`, then :func:`fsvfm.recipes.stills.prepare_stills` with the rest."""
    catalogue = json_catalogue(root, name=name, split=split, prefix=prefix, fake_label=fake_label)
    return prepare_stills(catalogue, **driver)


def table(*, name: str, root: str, split: str, prefix: str | None, fake_label: int, **driver: Any) -> Prepared:
    """Prepare a table: :func:`table_catalogue`, then :func:`fsvfm.recipes.stills.prepare_stills` with the rest."""
    catalogue = table_catalogue(root, name=name, split=split, prefix=prefix, fake_label=fake_label)
    return prepare_stills(catalogue, **driver)
