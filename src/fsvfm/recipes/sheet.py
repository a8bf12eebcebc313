"""A picture of a prepared data set, for people to look at."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from fsvfm.data.manifest import Manifest
from fsvfm.data.storage import read_image
from fsvfm.errors import DataError
from fsvfm.faces.images import LABEL_COLOURS, load_labels, save_png

_CELL, _LABEL_WIDTH, _GAP = 128, 132, 2


def contact_sheet(manifest: Manifest, path: str | Path, columns: int = 10) -> Path:
    """Write a PNG with a row per method (and the parsing maps of the real faces) and a column per person.

    People with most methods come first, so that a forgery stands under the face it was made from.

    Args:
        manifest: rows; a file that cannot be read leaves its cell empty.
        path: the PNG to write.
        columns: people to show.
    """
    table = manifest.table[["method"]].assign(row=range(len(manifest)))
    table["person"] = manifest.table["subject"].where(manifest.table["subject"] != "", manifest.table["video"])
    files = manifest.files()
    parses = manifest.files("parse") if "parse" in manifest.table else None
    methods = sorted(table["method"].unique(), key=lambda name: (name != "real", name))
    first = table.drop_duplicates(["person", "method"])
    people = first["person"].value_counts(sort=False).sort_values(ascending=False, kind="stable").index[:columns]
    shown = first[first["person"].isin(people)].set_index(["method", "person"])
    lines: list[np.ndarray] = []
    for method in methods:
        rows = [shown["row"].get((method, person)) for person in people]
        if all(row is None for row in rows):  # nobody shown has it: show others
            rows = [*table.loc[table["method"] == method, "row"].head(columns)]
        pictures = [None if row is None else _picture(files[int(row)]) for row in rows]
        lines.append(_row(method, pictures, columns))
        if method == "real" and parses is not None:
            overlaid = [
                None if picture is None or row is None else _overlay(picture, parses[int(row)])
                for row, picture in zip(rows, pictures, strict=True)
            ]
            if any(picture is not None for picture in overlaid):
                lines.append(_row("parsing", overlaid, columns))
    save_png(path, np.concatenate(lines))
    return Path(path)


def _picture(file: str) -> np.ndarray | None:
    try:
        return cv2.resize(np.ascontiguousarray(read_image(file)), (_CELL, _CELL), interpolation=cv2.INTER_AREA)
    except DataError:  # a missing cell shows itself; the account is told elsewhere
        return None


def _overlay(picture: np.ndarray, parse: str) -> np.ndarray | None:
    if not parse:
        return None
    try:
        labels = cv2.resize(load_labels(parse), (_CELL, _CELL), interpolation=cv2.INTER_NEAREST)
    except DataError:
        return None
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
