"""The engine of all recipes: every input counted, nothing done twice, nothing half-written, settings not mixed."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fsvfm.data.manifest import Manifest
from fsvfm.errors import DataError, FaceModelError
from fsvfm.faces.images import load_image, save_png
from fsvfm.recipes.engine import Item, Preparation, Prepared, Product, Skip


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker processes import this module by the name that pytest gave it."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3]))


@dataclass
class Painter:
    """Worker: a picture whose colour is the item's number; multiples of 5 have no face, of 7 are unreadable."""

    out: Path
    seconds: float = 0.0

    def __call__(self, data: dict[str, Any]) -> Product:
        number = data["number"]
        time.sleep(self.seconds)
        if number % 5 == 0:
            raise Skip("no face found")
        if number % 7 == 0:
            raise DataError(f"{number}.jpg is truncated")
        if number == 101:
            raise FaceModelError("the model file is missing")
        if number == 102:
            os._exit(9)
        file = f"images/{number}.png"
        save_png(self.out / file, np.full((8, 8, 3), number, np.uint8))
        return Product([file], {"image": file, "process": os.getpid()})


def paint(
    out: Path, count: int = 20, settings: dict[str, Any] | None = None, seconds: float = 0.0, **options: Any
) -> Prepared:
    with Preparation(out, settings or {"version": 1}, **options) as preparation:
        items = [Item(str(i), {"number": i}) for i in range(1, count + 1)]
        values = preparation.run("pictures", items, Painter(preparation.out, seconds))
        rows = [
            {
                "path": value["image"],
                "label": 0,
                "split": "train",
                "dataset": "paint",
                "method": "real",
                "video": key,
                "subject": "",
                "frame": 0,
            }
            for key, value in values.items()
        ]
        return preparation.finish(rows, {"name": "paint"})


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that people see, by name."""
    files = (path for path in folder.rglob("*") if path.is_file() and ".prepare" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_every_input_is_written_or_skipped_with_its_reason(tmp_path: Path) -> None:
    prepared = paint(tmp_path / "out", workers=1)
    (tally,) = prepared.tallies
    assert (tally.inputs, tally.written, len(tally.skipped), tally.reused) == (20, 14, 6, 0)
    assert tally.line() == "pictures: 20 inputs = 14 written + 6 skipped (4 no face found, 2 unreadable)"
    with (tmp_path / "out" / "skipped.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["input"] for line in lines] == ["5", "7", "10", "14", "15", "20"]
    assert lines[1] == {"stage": "pictures", "input": "7", "reason": "unreadable", "detail": "7.jpg is truncated"}
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["account"] == {"pictures": {"inputs": 20, "written": 14, "skipped": 6}}
    manifest = Manifest.read(tmp_path / "out")
    assert [int(load_image(path)[0, 0, 0]) for path in manifest.paths()] == [n for n in range(1, 21) if n % 5 and n % 7]
    assert (tmp_path / "out" / "contact_sheet.png").is_file()


def test_processes_give_the_same_as_one(tmp_path: Path) -> None:
    paint(tmp_path / "one", workers=1)
    prepared = paint(tmp_path / "many", workers=2, seconds=0.01)
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    journal = (tmp_path / "many" / ".prepare" / "journal.jsonl").read_text().splitlines()
    processes = {json.loads(line)["values"]["process"] for line in journal if "values" in json.loads(line)}
    assert os.getpid() not in processes
    assert prepared.tallies[0].written == 14


def test_a_second_run_does_only_what_is_missing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    paint(out, workers=1)
    first = contents(out)
    kept = (out / "images" / "1.png").stat().st_mtime_ns
    for name in ("images/2.png", "images/9.png", "manifest.parquet"):
        (out / name).unlink()
    (out / "images" / ".3.png.abc.tmp").write_bytes(b"half")
    prepared = paint(out, workers=1)
    assert prepared.tallies[0].reused == 18
    assert contents(out) == first
    assert (out / "images" / "1.png").stat().st_mtime_ns == kept


def test_more_inputs_are_added(tmp_path: Path) -> None:
    paint(tmp_path / "out", 8, workers=1)
    assert paint(tmp_path / "out", 20, workers=1).tallies[0].reused == 8
    paint(tmp_path / "new", 20, workers=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "new")


def test_damaged_images_are_made_again_when_asked(tmp_path: Path) -> None:
    out = tmp_path / "out"
    paint(out, workers=1)
    first = contents(out)
    (out / "images" / "2.png").write_bytes(first["images/2.png"][:40])
    assert paint(out, workers=1).tallies[0].reused == 20
    assert paint(out, workers=1, verify=True).tallies[0].reused == 19
    assert contents(out) == first


def test_skipped_inputs_are_tried_again_when_asked(tmp_path: Path) -> None:
    paint(tmp_path / "out", workers=1)
    assert paint(tmp_path / "out", workers=1, retry_skipped=True).tallies[0].reused == 14


def test_a_cut_journal_line_is_forgotten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    paint(out, workers=1)
    first = contents(out)
    journal = out / ".prepare" / "journal.jsonl"
    text = journal.read_bytes()
    journal.write_bytes(text[:-10])
    assert paint(out, workers=1).tallies[0].reused == 19
    assert contents(out) == first
    assert all(json.loads(line) for line in journal.read_text().splitlines())


def test_changed_settings_are_noticed_and_may_replace(tmp_path: Path) -> None:
    out = tmp_path / "out"
    paint(out, settings={"version": 1, "size": 8}, workers=1)
    (out / "own.txt").write_text("a user's note")
    before = contents(out)
    with pytest.raises(DataError) as caught:
        paint(out, 3, settings={"version": 1, "size": 16}, workers=1)
    assert "size: 8 → 16" in str(caught.value)
    assert "version" not in str(caught.value)
    assert "overwrite=true" in str(caught.value)
    assert contents(out) == before
    paint(out, 3, settings={"version": 1, "size": 16}, workers=1, overwrite=True)
    assert sorted(name for name in contents(out) if name.startswith("images/")) == [
        f"images/{i}.png" for i in (1, 2, 3)
    ]
    assert (out / "own.txt").is_file()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("chapter 1")
    for overwrite in (False, True):
        with pytest.raises(DataError, match="not made by this command"):
            paint(tmp_path, workers=1, overwrite=overwrite)
    assert contents(tmp_path) == {"thesis.txt": b"chapter 1"}


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with (
        Preparation(tmp_path / "out", {"version": 1}),
        pytest.raises(DataError, match="another run"),
        Preparation(tmp_path / "out", {"version": 1}),
    ):
        pass


def test_nothing_written_is_an_error_that_points_to_the_reasons(tmp_path: Path) -> None:
    with Preparation(tmp_path / "out", {}, workers=1) as preparation:
        preparation.run("pictures", [Item("5", {"number": 5})], Painter(preparation.out))
        with pytest.raises(DataError, match=r"no face was written .*1 inputs = 0 written"):
            preparation.finish([], {})
    assert "no face found" in (tmp_path / "out" / "skipped.csv").read_text()
    assert not (tmp_path / "out" / "manifest.parquet").exists()


def test_the_same_input_twice_is_refused(tmp_path: Path) -> None:
    with Preparation(tmp_path / "out", {}, workers=1) as preparation, pytest.raises(DataError, match="more than once"):
        preparation.run("pictures", [Item("1", {"number": 1})] * 2, Painter(preparation.out))


@pytest.mark.parametrize(
    ("number", "error", "message"), [(101, FaceModelError, "missing"), (102, DataError, "continues")]
)
def test_a_run_stops_where_going_on_makes_no_sense(
    number: int, error: type[Exception], message: str, tmp_path: Path
) -> None:
    with Preparation(tmp_path / "out", {"version": 1}, workers=2) as preparation:
        items = [Item(str(i), {"number": i}) for i in (1, 2, 3, number)]
        with pytest.raises(error, match=message):
            preparation.run("pictures", items, Painter(preparation.out))


def test_a_killed_run_continues_to_the_same_bytes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = tmp_path / "slow.py"
    script.write_text(
        "import pathlib, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"import {Path(__file__).stem} as painting\n"
        "if __name__ == '__main__':\n"
        f"    painting.paint(pathlib.Path({str(out)!r}), 24, seconds=0.1, workers=2)\n"
    )
    images = out / "images"
    for wanted in (3, 9):  # killed twice, at different places
        run = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            end = time.monotonic() + 120
            while time.monotonic() < end and (not images.is_dir() or len(list(images.glob("*.png"))) < wanted):
                time.sleep(0.02)
        finally:
            run.send_signal(signal.SIGKILL)
            run.wait()
        assert not (out / "manifest.parquet").exists()
    prepared = paint(out, 24, workers=1)
    assert 0 < prepared.tallies[0].reused < 24
    paint(tmp_path / "whole", 24, workers=1)
    assert contents(out) == contents(tmp_path / "whole")
