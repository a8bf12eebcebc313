"""Every benchmark runs in its dry mode and writes what the documentation's tables are made of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
# One process for all: what they import takes longer than what they do.
RUN = """
import runpy, sys
folder, *words = sys.argv.pop(1).split("|")
for name in sys.argv[1:]:
    sys.argv = [name, "--dry", "--output", f"{folder}/{name}.json", *words]
    runpy.run_path(f"{name}.py", run_name="__main__")
"""


def dry_runs(folder: Path, *names: str, words: tuple[str, ...] = ()) -> dict[str, Any]:
    subprocess.run(
        [sys.executable, "-c", RUN, "|".join((str(folder), *words)), *names],
        cwd=BENCHMARKS,
        env={**os.environ, "PYTHONPATH": str(BENCHMARKS), "OMP_NUM_THREADS": "1"},
        check=True,
    )
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in names}


def test_training_benchmarks_run_dry(tmp_path: Path) -> None:
    found = dry_runs(tmp_path, "masking", "pretraining", "finetuning", "startup", "preparation")
    for name, report in found.items():
        assert {"settings", "machine", "rows"} <= report.keys(), name
        assert {"date", "cpu", "cores", "threads", "torch"} <= report["machine"].keys()
        assert any("baseline" in row or "loop" in row or name == "startup" for row in report["rows"])
    step = found["pretraining"]
    assert set(step["shares"]) == {"clip, AdamW, EMA", "masks"}
    assert set(step["matrix_tflops"]) == {"32", "bf16"}
    assert step["gflop_per_image"] == pytest.approx(2.8, abs=0.3)  # ViT-Tiny, by hand
    kinds = [f"{kind}, {precision}" for precision in ("float32", "bf16") for kind in ("ours", "baseline")]
    assert {*kinds, "ours, float32, checkpointing", "ours, bf16, checkpointing"} == set(step["rows"])
    for row in step["rows"].values():
        assert {"images/s", "TFLOP/s", "of rate", "ratio", "to float32", "peak GB"} == row.keys()
        assert all(value > 0 for value in row.values())
    assert set(found["finetuning"]["rows"]) == {
        f"{kind}, {tune}" for kind in ("ours", "baseline") for tune in ("full", "adapter")
    }


@pytest.mark.slow
def test_the_other_benchmarks_run_dry(tmp_path: Path) -> None:
    found = dry_runs(tmp_path, "loading", "evaluation", "scale")
    assert all({"settings", "machine", "rows"} <= report.keys() for report in found.values())
    assert set(found["scale"]["rows"]) == {"prepare", "epoch", "inspect"}
    assert found["evaluation"]["ratios"]["evaluation"] > 0


@pytest.mark.slow
def test_benchmarks_of_prediction_run_dry(tmp_path: Path, media_dir: Path) -> None:
    found = dry_runs(tmp_path, "video", "prediction", words=("--photo", str(media_dir / "photos" / "000.jpg")))
    assert found["video"]["rows"]
    report = found["prediction"]
    assert {"photograph, the command", "video, 32 frames, loaded"} < set(report["seconds"])
    assert all(value > 0 for value in report["seconds"].values())
    for peaks in report["memory_mb"].values():
        assert set(peaks) == {"1", "2"}
        assert peaks["2"] < 1.1 * peaks["1"]
