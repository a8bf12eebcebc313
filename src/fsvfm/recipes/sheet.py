"""A picture of a prepared data set, for people to look at."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from fsvfm.data.manifest import Manifest
from fsvfm.errors import DataError
from fsvfm.faces.images import LABEL_COLOURS, load_image, load_labels, save_png

_CELL, _LABEL_WIDTH, _GAP = 128, 132, 2


def contact_sheet(manifest: Manifest, path: str | Path, columns: int = 10) -> Path:
    """Write a PNG with a row per method (and the parsing maps of the real faces) and a column per person.

    People with most methods come first, so that a forgery stands under the face it was made from.

    Args:
        manifest: rows whose files exist.
        path: the PNG to write.
        columns: people to show.
    """
    has_parses = manifest.parse_paths() is not None
    table = manifest.table.assign(file=manifest.paths(), parse_file=manifest.paths("parse") if has_parses else "")
    table["person"] = table["subject"].where(table["subject"] != "", table["video"])
    methods = sorted(table["method"].unique(), key=lambda name: (name != "real", name))
    first = table.drop_duplicates(["person", "method"])
    people = first["person"].value_counts(sort=False).sort_values(ascending=False, kind="stable").index[:columns]
    shown = first[first["person"].isin(people)].set_index(["method", "person"])
    rows: list[np.ndarray] = []
    for method in methods:
        files = [_value(shown, method, person, "file") for person in people]
        if not any(files):  # nobody shown has it: show others
            files = [*table.loc[table["method"] == method, "file"].head(columns)]
        pictures = [_picture(file) for file in files]
        rows.append(_row(method, pictures, columns))
        if method == "real" and has_parses:
            parses = [_value(shown, method, person, "parse_file") for person in people]
            overlaid = [_overlay(picture, parse) for picture, parse in zip(pictures, parses, strict=True)]
            rows.append(_row("parsing", overlaid, columns))
    save_png(path, np.concatenate(rows))
    return Path(path)


def _value(shown: pd.DataFrame, method: str, person: str, column: str) -> str | None:
    value = shown[column].get((method, person))
    return str(value) if value else None


def _picture(file: str | None) -> np.ndarray | None:
    if not file:
        return None
    try:
        return cv2.resize(load_image(file), (_CELL, _CELL), interpolation=cv2.INTER_AREA)
    except DataError:  # a missing cell shows itself; the account is told elsewhere
        return None


def _overlay(picture: np.ndarray | None, parse: str | None) -> np.ndarray | None:
    if picture is None or not parse:
        return None
    labels = cv2.resize(load_labels(parse), (_CELL, _CELL), interpolation=cv2.INTER_NEAREST)
    colours = np.array(LABEL_COLOURS, np.float32)[labels]
    return np.rint(0.45 * picture + 0.55 * colours).astype(np.uint8)


def _row(name: str, pictures: list[np.ndarray | None], columns: int) -> np.ndarray:
    row = np.full((_CELL + _GAP, _LABEL_WIDTH + columns * (_CELL + _GAP), 3), 255, np.uint8)
    cv2.putText(row, name[:20], (4, _CELL // 2), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (0, 0, 0), 1, cv2.LINE_AA)
    for place, picture in enumerate(pictures):
        if picture is not None:
            left = _LABEL_WIDTH + place * (_CELL + _GAP)
            row[:_CELL, left : left + _CELL] = picture
    return row
