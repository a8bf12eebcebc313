"""A look at a prepared data set: what is in it, what is missing, what leaks."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from PIL import Image

from fsvfm.data import storage
from fsvfm.data.manifest import Manifest, problems
from fsvfm.errors import DataError
from fsvfm.recipes.sheet import contact_sheet

#: Pictures whose size is looked at, drawn by chance from more.
SIZES_OF = 2000

#: Files that are looked for, drawn by chance from more.
FILES_OF = 200_000

_SHOWN = 5


class Inspection(NamedTuple):
    """What was found.

    Attributes:
        manifest: that was looked at.
        sizes: (N, 2) widths and heights of the pictures looked at.
        looked_for: number of files that were looked for, pictures and parsing maps.
        missing: those that are not there.
        problems: what breaks the rules of a manifest, leaks among them.
        sheet: the contact sheet.
    """

    manifest: Manifest
    sizes: np.ndarray
    looked_for: int
    missing: Sequence[str]
    problems: Sequence[str]
    sheet: Path

    def text(self) -> str:
        """The findings for people."""
        table = self.manifest.table
        counts = self.manifest.counts()
        counts["label"] = counts["label"].map({0: "real", 1: "fake"}).fillna("?")
        people = pd.Series("+".join(table["subject"].drop_duplicates()).split("+"))
        lines = [
            f"{self.manifest.source}: {len(table):,} images, {table.groupby('dataset')['video'].nunique().sum():,} "
            f"videos, {people[people != ''].nunique():,} subjects",
            counts.rename(columns={"label": "class"}).to_string(index=False),
            "",
        ]
        if len(self.sizes):
            seen = f" ({len(self.sizes):,} looked at)" if len(self.sizes) < len(table) else ""
            for name, values in zip(("width", "height"), self.sizes.T, strict=True):
                low, middle, high = np.percentile(values, (0, 50, 100)).astype(int)
                lines.append(f"{name:<8}{low} to {high} px, median {middle}{seen}")
        lines.append(
            f"{'files':<8}{len(self.missing):,} of {self.looked_for:,} looked for are missing"
            + (f": {_some(self.missing)}" if self.missing else "")
        )
        lines.append(f"{'rules':<8}{'kept: no leak, nothing twice' if not self.problems else 'broken:'}")
        lines += [f"  - {text}" for text in self.problems]
        lines.append(f"{'sheet':<8}{self.sheet}")
        return "\n".join(lines)


def inspect(path: str | Path, out: str | Path | None = None) -> Inspection:
    """Look at a prepared folder or manifest and write its contact sheet.

    Args:
        path: of the folder or manifest.
        out: the PNG to write, or a folder for it; None is beside the manifest.

    Raises:
        DataError: no manifest, or one whose rows cannot be understood.
    """
    manifest = Manifest.read(path, extra=["parse"], check=False)
    if len(manifest) == 0:
        raise DataError(f"the manifest {manifest.source} has no rows")
    if out is None and storage.is_remote(manifest.root):
        raise DataError(f"{manifest.root} is remote; say where to write the contact sheet, out=<file or folder>")
    files = manifest.files()
    wanted = [files[row] for row in _draw(len(files), FILES_OF)]
    if "parse" in manifest.table:
        parses = manifest.files("parse")
        wanted += [file for file in (parses[row] for row in _draw(len(parses), FILES_OF)) if file]
    with ThreadPoolExecutor(16) as pool:  # waiting for a network file system, mostly
        missing = [file for file, there in zip(wanted, pool.map(_is_there, wanted), strict=True) if not there]
        sizes = [size for size in pool.map(_size, [files[row] for row in _draw(len(files), SIZES_OF)]) if size]
    sheet = Path(out if out is not None else manifest.root).expanduser()
    if sheet.suffix.lower() != ".png":
        sheet = sheet / "contact_sheet.png"
    sheet.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(manifest, sheet)
    return Inspection(
        manifest, np.array(sizes).reshape(-1, 2), len(wanted), missing, problems(manifest.table), sheet.absolute()
    )


def _draw(length: int, limit: int) -> Sequence[int]:
    if length <= limit:
        return range(length)
    return np.sort(np.random.default_rng(0).choice(length, limit, replace=False)).tolist()


def _is_there(file: str) -> bool:
    if storage.is_packed(file):
        return bool(_read(file))
    return Path(file).is_file()


def _size(file: str) -> tuple[int, int] | None:
    """Width and height, from the header alone where it is a file of its own; None if it is not readable."""
    try:
        if storage.is_packed(file):
            height, width = storage.read_image(file).shape[:2]
            return width, height
        with Image.open(file) as image:
            return image.size
    except (DataError, OSError, ValueError, Image.DecompressionBombError):
        return None


def _read(file: str) -> bytes:
    try:
        return storage.read_bytes(file)
    except DataError:
        return b""


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
