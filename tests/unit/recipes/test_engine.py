"""The engine of all recipes: every input counted, nothing done twice, nothing half-written, settings not mixed."""

from __future__ import annotations

import csv
import json
import os
import pickle
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
from fsvfm.errors import ConfigError, DataError, FaceModelError
from fsvfm.faces.images import load_image, save_png
from fsvfm.recipes.engine import (
    Catalogue,
    Entry,
    Item,
    Preparation,
    Prepared,
    Product,
    Skip,
    find_files,
    find_folder,
    spread,
)


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
    assert lines[1] == {
        "stage": "pictures",
        "input": "7",
        "piece": "",
        "reason": "unreadable",
        "detail": "7.jpg is truncated",
    }
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["account"] == {"pictures": {"inputs": 20, "written": 14, "skipped": 6, "images": 14, "missed": 0}}
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


# --- Shards ----------------------------------------------------------------------------------------------------------

SHARDS = ("1/3", "2/3", "3/3")


def test_shards_together_give_what_one_run_gives(tmp_path: Path) -> None:
    paint(tmp_path / "whole", workers=1)
    out = tmp_path / "out"
    first, second, third = (paint(out, workers=1, shard=shard) for shard in SHARDS)
    for part in (first, second):
        assert "left to other shards" in part.unfinished
        with pytest.raises(DataError, match="left to other shards"):
            _ = part.manifest
    assert third.unfinished == ""
    assert 0 < first.tallies[0].inputs < 20
    assert third.tallies[0].line() == "pictures: 20 inputs = 14 written + 6 skipped (4 no face found, 2 unreadable)"
    assert contents(out) == contents(tmp_path / "whole")
    assert {file.name for file in (out / ".prepare").glob("journal*")} == {f"journal-{i}-of-3.jsonl" for i in (1, 2, 3)}


def test_a_share_depends_on_the_keys_alone(tmp_path: Path) -> None:
    def done_by(out: Path, count: int) -> set[str]:
        paint(out, count, workers=1, shard="2/3")
        lines = (out / ".prepare" / "journal-2-of-3.jsonl").read_text().splitlines()
        return {json.loads(line)["key"] for line in lines}

    few, many = done_by(tmp_path / "few", 10), done_by(tmp_path / "many", 20)
    assert few == {key for key in many if int(key) <= 10}


def test_shards_of_another_number_and_runs_without_go_on_with_what_is_there(tmp_path: Path) -> None:
    paint(tmp_path / "whole", workers=1)
    for name, rest in (("halves", ("1/2", "2/2")), ("alone", (None,))):
        out = tmp_path / name
        paint(out, workers=1, shard="1/3")
        done = len((out / ".prepare" / "journal-1-of-3.jsonl").read_text().splitlines())
        runs = [paint(out, workers=1, shard=shard) for shard in rest]
        assert sum(run.tallies[0].reused for run in runs) in (done, 20)  # the last of the halves accounts for all
        assert runs[-1].unfinished == ""
        assert contents(out) == contents(tmp_path / "whole")
        journals = [line for file in (out / ".prepare").glob("journal*") for line in file.read_text().splitlines()]
        assert len(journals) == 20  # nothing was done twice


def test_a_finished_folder_stays_as_it_is(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for shard in SHARDS:
        paint(out, workers=1, shard=shard)
    written = (out / "manifest.parquet").stat().st_mtime_ns
    again = paint(out, workers=1, shard="1/3")
    assert (again.unfinished, len(again.manifest)) == ("", 14)
    assert (out / "manifest.parquet").stat().st_mtime_ns == written
    (out / "images" / "1.png").unlink()
    for shard in SHARDS:
        paint(out, workers=1, shard=shard)
    paint(tmp_path / "whole", workers=1)
    assert contents(out) == contents(tmp_path / "whole")


def test_shards_work_beside_each_other_but_not_beside_a_whole_run(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    out = tmp_path / "out"
    with Preparation(out, {"version": 1}, shard="1/2"):
        with Preparation(out, {"version": 1}, shard="2/2"):
            pass
        for shard in ("1/2", None):
            with pytest.raises(DataError, match="another run"), Preparation(out, {"version": 1}, shard=shard):
                pass
    with Preparation(out, {"version": 1}), pytest.raises(DataError, match="another run"):
        Preparation(out, {"version": 1}, shard="1/2").__enter__()


@pytest.mark.parametrize("shard", ["0/3", "4/3", "3", "1/", "a/b", "-1/3", ""])
def test_a_shard_that_is_none(shard: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="shard="):
        Preparation(tmp_path, {}, shard=shard)


def test_no_shard_removes_what_another_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="overwrite"):
        Preparation(tmp_path, {}, shard="1/3", overwrite=True)
    paint(tmp_path / "out", workers=1, shard="1/3")
    with pytest.raises(DataError, match="other settings"):
        paint(tmp_path / "out", settings={"version": 2}, workers=1, shard="2/3")
    paint(tmp_path / "out", settings={"version": 2}, workers=1, overwrite=True)
    paint(tmp_path / "new", settings={"version": 2}, workers=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "new")


def two_stages(out: Path, **options: Any) -> Prepared:
    """Pictures, then a second stage that needs all of them."""
    with Preparation(out, {"version": 1}, workers=1, **options) as preparation:
        items = [Item(str(i), {"number": i}) for i in range(1, 20)]
        values = preparation.run("pictures", items, Painter(preparation.out))
        seconds = [Item(f"after {key}", {"number": 100 + int(key)}) for key in values if int(key) > 10]
        preparation.run("copies", [item for item in seconds if item.data["number"] % 5], Painter(preparation.out))
        return preparation.finish([row(key, value["image"]) for key, value in values.items()], {"name": "paint"})


def row(key: str, image: str) -> dict[str, Any]:
    return {
        "path": image,
        "label": 0,
        "split": "train",
        "dataset": "paint",
        "method": "real",
        "video": key,
        "subject": "",
        "frame": 0,
    }


def test_a_stage_that_needs_another_waits_for_all_shards(tmp_path: Path) -> None:
    two_stages(tmp_path / "whole")
    out = tmp_path / "out"
    states = [two_stages(out, shard=shard).unfinished for shard in ("1/2", "2/2", "1/2", "2/2")]
    assert ["pictures" in state or ("copies" in state and 2) for state in states] == [True, 2, False, False]
    assert contents(out) == contents(tmp_path / "whole")


# --- Plans, accounts, and what recipes use ---------------------------------------------------------------------------


def entries() -> list[Entry]:
    return [
        Entry("/raw/1.mp4", "one", 0, "train", "real", "1", "1", frames=8),
        Entry("/raw/2.mp4", "two", 0, "test", "real", "2", "2", frames=8),
        Entry("/raw/1_2.mp4", "one_two", 1, "train", "swap", "1_2", "1+2", frames=4),
        Entry("/raw/1_3.mp4", "one_three", 1, "train", "swap", "1_3", "1+3", frames=4),
        Entry("/raw/4.mp4", "four", 1, "train", "blend", "4", frames=0, more={"shot": 1}),
    ]


def test_a_dry_run_tells_and_writes_nothing(tmp_path: Path) -> None:
    catalogue = Catalogue("set", entries(), {}, [("/raw/x.mp4", "not listed")], ["4 videos instead of 1000"])
    out = tmp_path / "out"
    for there in (False, True):
        with Preparation(out, {"version": 1}, workers=1, dry_run=True) as preparation:
            preparation.plan(catalogue)
            items = [Item(str(i), {"number": i}) for i in range(1, 20)]
            assert len(preparation.run("pictures", items, Painter(out))) == 0
            told = preparation.finish([], {})
        assert out.exists() is there
        assert "dry run" in told.unfinished
        counts = told.plan.counts.set_index(["split", "class", "method"])
        assert list(counts.index) == [
            ("train", "real", "real"), ("train", "fake", "blend"), ("train", "fake", "swap"), ("test", "real", "real"),
        ]  # fmt: skip
        assert list(counts["files"]) == [1, 1, 2, 1]
        assert list(counts["subjects"]) == [1, 0, 3, 1]
        assert list(counts["images"]) == [8, -1, 8, 8]
        for part in ("5 files", "1 not listed", "warning: 4 videos instead", "all"):
            assert part in told.plan.text()
        assert told.tallies[-1].line() == f"pictures: 19 inputs, {5 if there else 0} of them done by an earlier run"
        before = contents(tmp_path)
        if not there:
            paint(out, 5, workers=1)
        else:
            with pytest.raises(DataError, match="other settings"), Preparation(out, {"version": 2}, dry_run=True):
                pass
            assert contents(tmp_path) == before


def test_names_that_would_replace_each_other_are_refused(tmp_path: Path) -> None:
    twice = [*entries(), entries()[0]._replace(file="/raw/other/1.mp4")]
    with Preparation(tmp_path / "out", {}) as preparation, pytest.raises(DataError, match="under the name one"):
        preparation.plan(Catalogue("set", twice, {}))


@dataclass
class Camera:
    """Worker: `wanted` frames of an entry, of which every third has no face."""

    out: Path

    def __call__(self, entry: Entry) -> Product:
        files, missed = [], []
        for frame in range(entry.frames):
            if frame % 3 == 2 or entry.name == "two":
                missed.append((f"frame {frame}", "no face found"))
            else:
                files.append(f"images/{spread(entry.name)}_frame_{frame}.png")
                save_png(self.out / files[-1], np.zeros((8, 8, 3), np.uint8))
        return Product(files, {"images": files}, missed)


def film(out: Path, **options: Any) -> Prepared:
    catalogue = Catalogue("set", entries()[:4], {"name": "set"}, [("/raw/x.mp4", "not listed")], ["too few"])
    with Preparation(out, {"version": 1}, **options) as preparation:
        preparation.plan(catalogue)
        found = preparation.run("videos", [Item(e.file, e) for e in catalogue.entries], Camera(preparation.out))
        rows = (
            {**row(entry.video, image), "label": entry.label, "method": entry.method}
            for entry in catalogue.entries
            if entry.file in found
            for image in found[entry.file]["images"]
        )
        return preparation.finish(rows, catalogue.card)


@pytest.mark.parametrize("options", [{"workers": 1}, {"workers": 2}])
def test_every_frame_is_written_or_missed_with_its_reason(options: dict[str, Any], tmp_path: Path) -> None:
    prepared = film(tmp_path / "out", **options)
    discovery, videos = prepared.tallies
    assert discovery.line() == "discovery: 5 inputs = 4 written + 1 skipped (1 not listed)"
    assert videos.line() == (
        "videos: 4 inputs = 3 written + 1 skipped (1 no face found); "
        "24 images = 12 written + 12 missed (12 no face found)"
    )
    assert videos.images == len(prepared.manifest) == 12
    with (tmp_path / "out" / "skipped.csv").open() as file:
        lines = [tuple(line.values()) for line in csv.DictReader(file)]
    assert lines[:3] == [
        ("discovery", "/raw/x.mp4", "", "not listed", ""),
        ("videos", "/raw/2.mp4", "", "no face found", "in none of 8 pieces"),
        ("videos", "/raw/1.mp4", "frame 2", "no face found", ""),
    ]
    assert len(lines) == 2 + 12
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["account"]["videos"] == {"inputs": 4, "written": 3, "skipped": 1, "images": 12, "missed": 12}
    assert card["warnings"] == ["too few"]
    assert (card["rows"], card["rows_sha256"]) == (12, prepared.manifest.digest())
    first = contents(tmp_path / "out")
    again = film(tmp_path / "out", **options)
    assert again.tallies[1].reused == 4
    assert contents(tmp_path / "out") == first


def test_frames_of_one_video_lie_together_in_one_of_256_folders() -> None:
    folders = {spread(f"video {i}").partition("/")[0] for i in range(3000)}
    assert len(folders) == 256
    assert {len(name) for name in folders} == {2}
    assert spread("000_003") == spread("000_003")
    assert spread("000_003").endswith("/000_003")


def test_an_entry_can_be_sent_to_a_process() -> None:
    for entry in entries():
        assert pickle.loads(pickle.dumps(entry)) == entry


def test_settings_must_be_told_in_json(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="JSON"):
        Preparation(tmp_path, {"out": tmp_path})


def test_folders_are_found_whatever_their_case(tmp_path: Path) -> None:
    (tmp_path / "Manipulated_Sequences" / "DeepFakes" / "c23").mkdir(parents=True)
    (tmp_path / "Manipulated_Sequences" / "face2face").mkdir()
    (tmp_path / "notes.txt").write_text("")
    found = find_folder(tmp_path, "manipulated_sequences", "Deepfakes", "C23")
    assert found == tmp_path / "Manipulated_Sequences" / "DeepFakes" / "c23"
    assert find_folder(tmp_path, "manipulated_sequences", "F2F|Face2Face").name == "face2face"
    assert find_folder(tmp_path) == tmp_path
    with pytest.raises(DataError) as caught:
        find_folder(tmp_path, "manipulated_sequences", "FaceSwap")
    for part in ("FaceSwap", "DeepFakes", "face2face", str(tmp_path)):
        assert part in str(caught.value)
    with pytest.raises(DataError, match="no sub-folder"):
        find_folder(tmp_path, "manipulated_sequences", "face2face", "raw")
    with pytest.raises(DataError, match="no folder"):
        find_folder(tmp_path / "nowhere", "x")


def test_of_two_folders_that_differ_in_case_the_exact_one_is_taken(tmp_path: Path) -> None:
    (tmp_path / "VIDEOS").mkdir()
    try:
        (tmp_path / "videos").mkdir()
    except FileExistsError:
        pytest.skip("this file system does not tell upper from lower case")
    assert find_folder(tmp_path, "videos").name == "videos"
    assert find_folder(tmp_path, "VIDEOS").name == "VIDEOS"


def test_files_are_found_by_suffix_in_order(tmp_path: Path) -> None:
    for name in ("b/2.MP4", "b/10.mp4", "a.avi", "c.txt", ".hidden.mp4", ".cache/x.mp4", "b/deep/er/1.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    names = [file.relative_to(tmp_path).as_posix() for file in find_files(tmp_path, [".mp4", ".AVI"])]
    assert names == ["a.avi", "b/10.mp4", "b/2.MP4", "b/deep/er/1.mp4"]
    assert [file.name for file in find_files(tmp_path, [".mp4", ".avi"], recursive=False)] == ["a.avi"]
    assert find_files(tmp_path, [".mkv"]) == []
    with pytest.raises(DataError, match="no folder"):
        find_files(tmp_path / "nowhere", [".mp4"])
