"""A look at a prepared folder: counts, sizes, missing files, broken rules, and a picture of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fsvfm.data.manifest import Manifest
from fsvfm.errors import DataError
from fsvfm.faces.images import load_image, save_png
from fsvfm.recipes import inspect as module
from fsvfm.recipes.inspect import inspect


@pytest.fixture
def folder(prepared_dir: Path, tmp_path: Path) -> Path:
    """24 people, each real and with two forgeries; 16 in train, 4 in val, 4 in test."""
    return shutil.copytree(prepared_dir, tmp_path / "set")


def test_what_is_in_a_folder(folder: Path) -> None:
    found = inspect(folder)
    assert (found.looked_for, list(found.missing), list(found.problems)) == (72 + 24, [], [])
    assert found.sizes.shape == (72, 2)
    assert (found.sizes == 64).all()
    text = found.text()
    assert "72 images, 72 videos, 24 subjects" in text
    assert "64 to 64 px, median 64" in text
    lines = [line.split() for line in text.splitlines()]
    assert ["generated", "test", "fake", "self_blend", "4", "4", "4"] in lines
    assert found.sheet == folder / "contact_sheet.png"
    picture = load_image(found.sheet)
    assert picture.shape[0] == 4 * 130  # real, parsing, two forgeries
    assert picture[0:128, 132:260].std() > 5  # a face, not an empty cell


def test_missing_files_and_sizes(folder: Path, tmp_path: Path) -> None:
    (folder / "images" / "p003_real.png").unlink()
    (folder / "parsing_maps" / "p004_real.png").unlink()
    (folder / "images" / "p005_real.png").write_bytes(b"torn")
    for name, size in (("p006_real", (20, 100)), ("p007_real", (300, 90))):
        save_png(folder / "images" / f"{name}.png", np.zeros((*size, 3), np.uint8))
    found = inspect(folder, tmp_path / "pictures" / "look.png")
    assert sorted(Path(file).name for file in found.missing) == ["p003_real.png", "p004_real.png"]
    assert len(found.sizes) == 70
    assert "2 of 96 looked for are missing" in found.text()
    assert "width   64 to 100 px, median 64 (70 looked at)" in found.text()
    assert "height  20 to 300 px, median 64" in found.text()
    assert found.sheet == tmp_path / "pictures" / "look.png"
    assert found.sheet.is_file()
    assert not (folder / "contact_sheet.png").exists()


def test_a_leak_is_told_where_reading_would_refuse(folder: Path) -> None:
    table = pd.read_parquet(folder / "manifest.parquet")
    table.loc[table["subject"] == "p000", "split"] = ["train", "test", "val"]
    table.to_parquet(folder / "manifest.parquet")
    with pytest.raises(DataError, match="leak"):
        Manifest.read(folder)
    found = inspect(folder)
    assert len(found.problems) == 1
    assert "1 subject(s) in more than one split, a leak: p000 (train, val, test)" in found.text()


def test_of_many_only_some_are_looked_at(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SIZES_OF", 10)
    monkeypatch.setattr(module, "FILES_OF", 20)
    found = inspect(folder)
    assert len(found.sizes) == 10
    assert 20 < found.looked_for <= 40
    assert "(10 looked at)" in found.text()


def test_a_folder_without_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no manifest"):
        inspect(tmp_path)
