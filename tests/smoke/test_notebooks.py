"""The notebooks' code runs from top to bottom, and their outputs are not kept in the repository."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from tiny_detector import write_detector

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))


def class_folders(folder: Path, photos: list[Path]) -> Path:
    """Real photographs and tinted copies of them, a sub-folder per person."""
    for number, photo in enumerate(photos):
        real, fake = (folder / name / f"person{number}" for name in ("real", "fake_tint"))
        real.mkdir(parents=True)
        fake.mkdir(parents=True)
        shutil.copy(photo, real)
        pixels = np.asarray(Image.open(photo).convert("RGB"))
        Image.fromarray(255 - (255 - pixels) // 2).save(fake / photo.name)
    return folder


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(
    path: Path, prepared_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    mpl.use("Agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FSVFM_DATA", str(prepared_dir.parent))
    monkeypatch.setenv("FSVFM_CKPT", str(write_detector(tmp_path / "detector")))
    monkeypatch.setenv("FSVFM_TESTSETS", json.dumps({"one": str(prepared_dir), "another": str(prepared_dir)}))
    if path.stem.startswith("02"):
        monkeypatch.delenv("FSVFM_DATA")
        photos = sorted((request.getfixturevalue("media_dir") / "photos").glob("*.jpg"))[:8]
        monkeypatch.setenv("FSVFM_PHOTOS", str(class_folders(tmp_path / "photos", photos)))
        monkeypatch.setenv("FSVFM_EPOCHS", "1")
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells), "clear the outputs before committing"
    exec(compile("\n".join("".join(cell["source"]) for cell in cells), str(path), "exec"), {"__name__": "__main__"})
    plt.close("all")
