"""Sweeps through the real command line, on generated faces and the smallest of networks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest

from fsvfm.sweeps import collect, write_sweep

TINY = (
    "+scale=demo", "model.image_size=32", "model.depth=1", "trainer.max_epochs=1", "data.batch_size=8",
    "evaluate.replicates=20",
)  # fmt: skip
DETECTOR = "finetune.overrides=['trainer.max_epochs=1','data.batch_size=8']"


@pytest.fixture
def folder(prepared_dir: Path, tmp_path: Path) -> Path:
    """A working directory that sees the generated faces as ``data``."""
    (tmp_path / "data").symlink_to(prepared_dir.parent)
    return tmp_path


@contextmanager
def train(folder: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    env = {**os.environ, "FSVFM_DATA": "data", "FSVFM_RUNS": "runs", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fsvfm.train", *words]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=folder, env=env, **options) as process:
        yield process


def run(folder: Path, *words: str, ok: bool = True) -> str:
    with train(folder, *words) as process:
        output, _ = process.communicate()
    assert (process.returncode == 0) == ok, output
    return output


def test_points_are_trained_fine_tuned_and_tested_and_a_failing_one_is_a_gap(folder: Path) -> None:
    # The first of the points cannot even start; the others are not lost, the command fails all the same.
    told = run(folder, "-m", "sweep=mask_ratio", *TINY, DETECTOR, "masking.ratio=1.5,0.5,0.75", ok=False)
    assert "masking.ratio=1.5: expected a share between 0 and 1" in told
    assert "Traceback" not in told
    runs = {
        float(path.name.split("ratio-")[1].split("__")[0]): path for path in folder.glob("runs/mask_ratio__demo/*/")
    }
    assert set(runs) == {1.5, 0.5, 0.75}
    for ratio in (0.5, 0.75):
        point = runs[ratio]
        assert {path.name.split(".")[0] for path in point.glob("*.done.json")} == {"fit", "finetune", "evaluate"}
        meta = json.loads((point / "finetune/export/model.json").read_text())
        assert (meta["kind"], meta["model"]["image_size"], meta["model"]["depth"]) == ("detector", 32, 1)
        # The detector starts from this point's encoder: with its weights and normalisation.
        pretrained = json.loads((point / "export/model.json").read_text())
        assert meta["mean"] == pretrained["mean"]
        assert f"initialised from {point}/export" in told
        (results,) = json.loads((point / "evaluation/results.json").read_text())["runs"].values()
        assert set(results) == {"demo_seen", "demo_unseen"}
        assert not (point / "failed.json").exists()
    (table,) = collect(folder / "runs/mask_ratio__demo", replicates=50).tables
    assert [row.key for row in table.rows] == [{"masking.ratio": ratio} for ratio in (0.5, 0.75, 1.5)]
    assert table.title == "Mask ratio, protocol demo"
    assert table.rows[table.reference or 0].key == {"masking.ratio": 0.75}
    assert [bool(table.missing(row)) for row in table.rows] == [False, False, True]
    assert "failed in start: ConfigError" in table.missing(table.rows[2])[0]["why"]
    first, second, none = table.compared["frame", "auc", "mean"]
    assert (none, second.difference) == (None, None)
    expected = [run.summaries for row in table.rows[:2] for run in row.runs]
    means = [sum(s[name]["frame"]["metrics"]["auc"]["value"] for name in s) / 2 for s in expected]
    assert first.difference == pytest.approx(means[0] - means[1])
    assert "1.5" in next(f for f in write_sweep(folder, collect(folder / "runs")) if f.suffix == ".html").read_text()


@pytest.mark.slow
def test_a_killed_sweep_continues_and_gives_the_same_table(folder: Path) -> None:
    words = ("sweep=masking", *TINY, DETECTOR, "trainer.max_epochs=3", "masking=random,crfr_p", "seed=0,1")
    words = tuple(word for word in words if word != "trainer.max_epochs=1")
    run(folder, *words, "paths.runs=whole")
    points = folder / "runs/masking__demo"
    with train(folder, *words) as process:
        for _ in range(1800):  # until the third point is being fine-tuned
            if len(list(points.glob("*/evaluate.done.json"))) == 2 and len(list(points.glob("*/fit.done.json"))) == 3:
                break
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
    done = {path: path.stat().st_mtime_ns for path in points.glob("*/evaluate.done.json")}
    told = run(folder, *words)
    assert told.count("evaluate: finished already") == 2
    assert told.count("fit: finished already") >= 3
    assert all(path.stat().st_mtime_ns == time for path, time in done.items()), "finished points are left alone"
    found, whole = (collect(place) for place in (points, folder / "whole"))
    values = [
        {
            (json.dumps(row.key), *cell[:3]): cell[3]
            for row in sweep.tables[0].rows
            for cell in sweep.tables[0].statistics(row)
        }
        for sweep in (found, whole)
    ]
    assert values[0] == values[1], "interrupted = uninterrupted"
    assert found.tables[0].compared == whole.tables[0].compared
    assert run(folder, *words).count("evaluate: finished already") == 4


@pytest.mark.slow
def test_points_side_by_side_and_a_point_with_two_processes(folder: Path) -> None:
    run(
        folder,
        "sweep=masking",
        *TINY,
        DETECTOR,
        "masking=random,frp",
        "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=2",
    )
    assert len(list(folder.glob("runs/masking__demo/*/evaluation/results.json"))) == 2
    two = ("trainer.devices=2", "data.batch_size=4")
    words = ("sweep=masking", *TINY[:-2], *two, "evaluate.replicates=20", "masking=random,frp", "paths.runs=two")
    detector = "finetune.overrides=['trainer.max_epochs=1','data.batch_size=4']"
    told = run(folder, *words, detector)
    assert told.count("effective batch 8,") == 4, "both trainings of both points use both processes"
    assert len(list(folder.glob("two/masking__demo/*/evaluation/results.json"))) == 2


@pytest.mark.slow
def test_a_search_looks_at_the_validation_and_continues(folder: Path) -> None:
    words = ("sweep=search_lr", *TINY, "model.init=null", "hydra.sweeper.n_trials=4")
    run(folder, *words)
    best = (folder / "runs/search_lr__demo/optimization_results.yaml").read_text()
    points = list(folder.glob("runs/search_lr__demo/*/metrics.csv"))
    assert len(points) == 4
    lowest = min(pd.read_csv(path)["val/loss"].min() for path in points)
    assert f"best_value: {lowest}" in best
    told = run(folder, *words)
    assert told.count("fit: finished already") == 4, "the sampler's seed asks the same again"
