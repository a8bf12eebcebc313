"""Anti-spoofing through the real command line, on a few generated videos."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

TINY = (
    "model=vit_tiny", "model.image_size=32", "model.depth=2", "model.init=null", "data.workers=0", "data.batch_size=2",
    "data.evaluate_every=4", "data.val_share=0.3", "trainer.max_steps=6", "trainer.accelerator=cpu",
    "trainer.precision=32-true", "trainer.log_every_n_steps=1", "evaluate.replicates=20",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(antispoof_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory that sees the generated data sets as ``data``."""
    work = tmp_path_factory.mktemp("antispoof_cli")
    (work / "data").symlink_to(antispoof_dir)
    return work


def run(folder: Path, *words: str, ok: bool = True) -> str:
    env = {**os.environ, "FSVFM_DATA": "data", "FSVFM_RUNS": "runs", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "fsvfm.train", *words], cwd=folder, env=env, capture_output=True, text=True
    )
    output = done.stdout + done.stderr
    assert (done.returncode == 0) == ok, output
    assert "Traceback" not in output, output
    return output


def test_a_sweep_over_targets_trains_exports_and_tests(folder: Path) -> None:
    told = run(folder, "-m", "experiment=fas_vitb", "target=M,O", *TINY, "hydra.sweep.subdir=${data.target}")
    assert "learning rate 2.5e-05, whatever the batch size" in told
    for name in ("msu", "oulu"):
        out = folder / "runs" / name
        meta = json.loads((out / "export" / "model.json").read_text())
        assert (meta["kind"], meta["task"], meta["class_order"]) == ("detector", "antispoof", ["real", "fake"])
        assert meta["provenance"]["hyper_parameters"]["selection"] == "source_best"
        assert meta["provenance"]["global_step"] == 4  # the only validated iteration; the run went on to the sixth
        results = json.loads((out / "test" / "results.json").read_text())
        (sets,) = results["runs"].values()
        assert list(sets) == [f"fas_{name}"]
        metrics = sets[f"fas_{name}"]["video"]["metrics"]
        assert 0 <= metrics["hter"]["value"] <= 1
        predictions = pd.read_parquet(out / "test" / "predictions.parquet")
        assert set(predictions["dataset"]) == {name}
        assert not any("target_best" in note for note in results["made"]["notes"])


def test_adapter_chosen_on_the_target_says_so(folder: Path) -> None:
    words = ("experiment=fas_vitb_adapter", "target=C", "task.selection=target_best", "data.val_share=0", "name=peft")
    run(folder, *TINY, *words)
    results = json.loads((folder / "runs" / "peft" / "test" / "results.json").read_text())
    assert any("target_best" in note for note in results["made"]["notes"])
    meta = json.loads((folder / "runs" / "peft" / "export" / "model.json").read_text())
    assert meta["provenance"]["hyper_parameters"]["selection"] == "target_best"
    again = run(folder, *TINY, *words)
    assert again.count("finished already") == 2


def test_a_missing_target_is_asked_for(folder: Path) -> None:
    told = run(folder, "experiment=fas_vitb", *TINY, ok=False)
    assert "which data set is left out? choose target=M, C, I or O" in told
