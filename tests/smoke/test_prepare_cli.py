"""`python -m fsvfm.prepare` as a user calls it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fsvfm.data.manifest import Manifest


def prepare(folder: Path, *overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    env.pop("HYDRA_FULL_ERROR", None)
    command = [sys.executable, "-m", "fsvfm.prepare", *overrides]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=600)


@pytest.fixture
def photos(media_dir: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in ("001", "002", "003", "005", "006"):
        shutil.copy(media_dir / "photos" / f"{number}.jpg", folder)
    (folder / "torn.jpg").write_bytes(b"torn")
    return folder


def test_demo_on_own_photographs_then_again_then_with_other_settings(photos: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    command = ("recipe=demo", f"recipe.images={photos}", "recipe.limit=5", "workers=2")
    first = prepare(work, *command, FSVFM_DATA=str(tmp_path / "data"))
    assert first.returncode == 0, first.stderr
    assert "photographs: " in first.stdout
    assert "Next:     python -m fsvfm.train experiment=demo_pretrain" in first.stdout
    assert list(work.iterdir()) == []  # nothing litters the current folder
    out = tmp_path / "data" / "demo"
    names = {path.name for path in out.iterdir()}
    assert {"images", "parsing_maps", "manifest.parquet", "skipped.csv", "card.json", "contact_sheet.png"} <= names
    manifest = Manifest.read(out)
    assert all(Path(path).is_file() for path in manifest.paths())
    assert manifest.select(split="train", label=0).grids(16) is not None

    again = prepare(work, *command, f"out={out}")
    assert again.returncode == 0, again.stderr
    assert "6 of them by an earlier run" in again.stdout

    changed = prepare(work, *command, "recipe.seed=1", f"out={out}")
    assert changed.returncode == 1
    assert "seed: 0 → 1" in changed.stderr
    assert "Traceback" not in changed.stderr


def test_missing_values_and_folders_are_told_without_a_traceback(tmp_path: Path) -> None:
    for overrides, message in (
        (("recipe=folder",), "recipe.images must be given"),
        (("recipe=demo", "recipe.images=nowhere"), "no folder"),
    ):
        done = prepare(tmp_path, *overrides)
        assert done.returncode == 1
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_question_is_answered_without_a_traceback(tmp_path: Path) -> None:
    for overrides, message in (
        ((), "exactly one of recipe=..., inspect="),
        (("recipe=demo", "inspect=data/demo"), "not recipe and inspect"),
        (("recipe=demoo",), "did you mean demo"),
        (("-m", "recipe=folder,xyzzy"), "no recipe 'xyzzy'"),
        (("recipe=ffpp",), "root must be given"),
        (("recipe=folder", "recipe.images=."), "no photograph below"),
        (("inspect=nowhere",), "no manifest at nowhere"),
    ):
        done = prepare(tmp_path, *overrides)
        assert done.returncode == 1, overrides
        assert message in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_planned_then_made_in_shards_by_one_command_then_inspected(photos: Path, tmp_path: Path) -> None:
    raw, work = tmp_path / "raw", tmp_path / "work"
    for name, numbers in (("real", ("001", "002", "003")), ("fake_x", ("005", "006"))):
        (raw / name).mkdir(parents=True)
        for number in numbers:
            shutil.copy(photos / f"{number}.jpg", raw / name)
    work.mkdir()
    places = {"FSVFM_DATA": str(tmp_path / "data"), "FSVFM_CACHE": str(tmp_path / "cache")}
    command = ("recipe=folder", f"recipe.images={raw}", "workers=1")

    plan = prepare(work, *command, "dry_run=true", **places)
    assert plan.returncode == 0, plan.stderr
    assert ["(later)", "fake", "fake_x", "2", "2", "2", "2"] in [line.split() for line in plan.stdout.splitlines()]
    assert "5 inputs, 0 of them done" in plan.stdout
    assert not (tmp_path / "data").exists()

    shards = prepare(work, "-m", *command, "shard=1/2,2/2", **places)
    assert shards.returncode == 0, shards.stderr
    assert "photographs: 5 inputs = 5 written + 0 skipped" in shards.stdout  # told by the last one
    journals = [*(tmp_path / "data" / "folder" / ".prepare").glob("journal-*.jsonl")]
    assert {file.name for file in journals} == {"journal-1-of-2.jsonl", "journal-2-of-2.jsonl"}
    assert sum(len(file.read_text().splitlines()) for file in journals) == 5

    whole = prepare(work, *command, f"out={tmp_path / 'whole'}", **places)
    assert whole.returncode == 0, whole.stderr
    made, alone = tmp_path / "data" / "folder", tmp_path / "whole"
    for file in (
        path.relative_to(alone) for path in alone.rglob("*") if path.is_file() and ".prepare" not in str(path)
    ):
        assert (made / file).read_bytes() == (alone / file).read_bytes(), file

    look = prepare(work, f"inspect={made}", f"out={tmp_path / 'look.png'}", **places)
    assert look.returncode == 0, look.stderr
    assert "5 images, 5 videos, 5 subjects" in look.stdout
    assert (tmp_path / "look.png").is_file()
    assert list(work.iterdir()) == []


@pytest.mark.slow
def test_the_benchmark_of_scale_runs_small(tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "scale.py"
    command = [sys.executable, str(script), "--images", "700", "--files", "--output", str(tmp_path / "scale.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "700 inputs, 700 of them done by an earlier run" in done.stderr
    assert "0 of 1,400 looked for are missing" in done.stderr
    numbers = json.loads((tmp_path / "scale.json").read_text())
    assert set(numbers) == {"images", "prepare", "resume", "epoch", "inspect"}
