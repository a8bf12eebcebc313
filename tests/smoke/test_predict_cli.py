"""Prediction through the real command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

import miniatures
from fsvfm.predict import quoted
from json_schema import violations
from tiny_detector import write_detector


def run(folder: Path, *words: str) -> tuple[int, str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fsvfm.predict", *words]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    output = done.stdout + done.stderr
    assert "Traceback" not in output, output
    return done.returncode, output


@pytest.fixture
def folder(tmp_path: Path, media_dir: Path) -> Path:
    """A working directory with a demo detector and a folder of a photograph, a video and a page."""
    write_detector(tmp_path / "det" / "export", provenance={"dataset": "demo_forgeries"})
    inputs = tmp_path / "my, files (1)"
    inputs.mkdir()
    Image.fromarray(miniatures.faces(media_dir)[0]).save(inputs / "it's me = ü.jpg", quality=95)
    miniatures.write_clip(inputs / "clip.mp4", miniatures.faces(media_dir)[1])
    (inputs / "page.jpg").write_text("<html></html>")
    return tmp_path


def test_a_folder_is_scored(folder: Path) -> None:
    words = ("ckpt=det/export", "input=my, files (1)", "out=res", "annotate=true", "timeline=true", "threshold=0.0")
    status, told = run(folder, *words)
    assert status == 30, told  # fakes, since everything reaches a threshold of 0, and a page that is no picture
    assert "3 inputs = 2 scored (0 real, 2 fake, 0 uncertain) + 0 without a face + 1 failed" in told
    assert "warning: det is a demo detector" in told
    schema = json.loads((resources.files("fsvfm") / "prediction.schema.json").read_text())
    records = [json.loads(line) for line in (folder / "res" / "predictions.jsonl").read_text().splitlines()]
    assert all(violations(record, schema) == [] for record in records)
    assert [Path(record["source"]).name for record in records] == ["clip.mp4", "it's me = ü.jpg", "page.jpg"]
    assert (folder / "res" / records[0]["annotated"]).stat().st_size > 0
    assert (folder / "res" / records[0]["timeline"]).stat().st_size > 0
    assert len(pd.read_parquet(folder / "res" / "predictions.parquet")) == 3
    assert {path.name for path in folder.iterdir()} == {"det", "my, files (1)", "res"}  # nothing else is left


@pytest.mark.slow
def test_the_commands_words(folder: Path) -> None:
    status, told = run(folder)
    assert status == 1
    assert "ckpt=… and input=… must be given" in told
    status, told = run(folder, "ckpt=det", "input=nobody.jpg")
    assert status == 1
    assert "error: nobody.jpg does not exist" in told
    name = "my, files (1)/it's me = ü.jpg"
    status, told = run(folder, "ckpt=[det,det]", f"input={name}", "threshold=1")
    assert status == 0, told
    assert name in told
    shutil.copytree(folder / "det", folder / "other")
    status, told = run(folder, "ckpt={a: det, b: other}", "input=[my*/*.mp4]", "threshold=0")
    assert status == 10, told


def test_file_names_need_no_quotes_within_quotes() -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    for name in ("a b.jpg", "it's (1), x=2.jpg", "C:\\photos\\", "~/ü%.jpg", "'x.jpg", "a\\'b", "[1].jpg", "webcam:0"):
        (word,) = quoted([f"input={name}"])
        if name[0] in "['":
            assert word == f"input={name}"  # Hydra's own syntax
        else:
            assert OverridesParser.create().parse_override(word).value() == name
    same = ["ckpt=[a,b]", "input=[a,b]", "ckpt=hf://o/r/f.pth", "out=null", "frames=3", "-m"]
    assert quoted(same) == same
    assert quoted(["ckpt=runs/x/export"]) == ["ckpt=runs/x/export"]
