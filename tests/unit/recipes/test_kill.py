"""`python -m fsvfm.prepare` killed at random moments, then run again: the result is that of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

#: Photographs in which dlib finds a face, and two in which it finds none.
REALS, FAKES = ("001", "002", "003", "010"), ("005", "006", "007", "013")


@pytest.fixture(scope="module")
def photos(media_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for name, numbers in (("real", REALS), ("fake_painted", FAKES)):
        (folder / name).mkdir()
        for number in numbers:
            shutil.copy(media_dir / "photos" / f"{number}.jpg", folder / name)
    (folder / "real" / "torn.jpg").write_bytes(b"torn")
    return folder


def command(photos: Path, out: Path, *more: str) -> list[str]:
    options = ("recipe.size=96", "recipe.max_side=480", *more)
    return [sys.executable, "-m", "fsvfm.prepare", "recipe=folder", f"recipe.images={photos}", f"out={out}", *options]


def start(words: Sequence[str]) -> subprocess.Popen[bytes]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    quiet = subprocess.DEVNULL
    return subprocess.Popen(words, env=env, stdout=quiet, stderr=quiet, start_new_session=True)


def run(words: Sequence[str]) -> float:
    begin = time.monotonic()
    assert start(words).wait(600) == 0
    return time.monotonic() - begin


def kill(process: subprocess.Popen[bytes], workers_too: bool) -> None:
    """As a scheduler does (the whole group), or as the memory runs out (one process, whose workers then end)."""
    if workers_too:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()
    end = time.monotonic() + 60
    while _group_lives(process.pid) and time.monotonic() < end:
        time.sleep(0.01)


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that people see. The journal is not among them: its order is that in which workers happened to end."""
    files = (path for path in folder.rglob("*") if path.is_file() and ".prepare" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def account(out: Path) -> list[str]:
    """What the journals say, without the order and the times."""
    lines = [json.loads(line) for file in (out / ".prepare").glob("journal*") for line in file.read_text().splitlines()]
    return sorted(json.dumps({**line, "time": 0}, sort_keys=True) for line in lines)


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The folder of an undisturbed run, and how long it took."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, run(command(photos, out, "workers=1"))


def test_a_killed_command_continues_to_the_same_bytes(photos: Path, whole: tuple[Path, float], tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(command(photos, out, "workers=2"))
    end = time.monotonic() + 120
    while time.monotonic() < end and len([*out.glob("images/*.png")]) < 2:
        time.sleep(0.01)
    kill(process, workers_too=True)
    assert 2 <= len([*out.glob("images/*.png")]) <= 6
    assert not (out / "manifest.parquet").exists()
    run(command(photos, out, "workers=1"))
    assert contents(out) == contents(whole[0])
    assert account(out) == account(whole[0])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_killed_again_and_again(photos: Path, whole: tuple[Path, float], seed: int, tmp_path: Path) -> None:
    out, chance = tmp_path / "out", random.Random(seed)
    for _ in range(4):
        process = start(command(photos, out, f"workers={chance.choice((1, 2, 3))}"))
        time.sleep(chance.uniform(0.3, 1.1) * whole[1])
        kill(process, workers_too=chance.random() < 0.5)
    run(command(photos, out, "workers=2"))
    assert contents(out) == contents(whole[0])
    assert account(out) == account(whole[0])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_shards_killed_side_by_side(photos: Path, whole: tuple[Path, float], seed: int, tmp_path: Path) -> None:
    out, chance = tmp_path / "out", random.Random(100 + seed)
    for _ in range(2):
        processes = [start(command(photos, out, "workers=1", f"shard={i}/3")) for i in (1, 2, 3)]
        for process in chance.sample(processes, 3):
            time.sleep(chance.uniform(0, 0.6) * whole[1])
            kill(process, workers_too=True)
    processes = [start(command(photos, out, "workers=1", f"shard={i}/3")) for i in (3, 1, 2)]
    assert [process.wait(600) for process in processes] == [0, 0, 0]
    assert contents(out) == contents(whole[0])
    assert account(out) == account(whole[0])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_while_the_folder_is_finished(
    photos: Path, whole: tuple[Path, float], seed: int, tmp_path: Path
) -> None:
    """Everything is done but the manifest: the kill falls among the last writes."""
    out, chance = tmp_path / "out", random.Random(200 + seed)
    shutil.copytree(whole[0], out)
    for name in ("manifest.parquet", "card.json", "contact_sheet.png", "skipped.csv"):
        (out / name).unlink()
    process = start(command(photos, out, "workers=1"))
    end = time.monotonic() + 120
    while time.monotonic() < end and not (out / "skipped.csv").exists():
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.2))
    kill(process, workers_too=True)
    seen = contents(out)
    assert all(contents(whole[0])[name] == data for name, data in seen.items() if name.rpartition("/")[2][0] != ".")
    run(command(photos, out, "workers=1"))
    assert contents(out) == contents(whole[0])
