"""The demo's commands through the real command line, on a handful of real photographs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SMALL = ("data.batch_size=4", "trainer.max_epochs=2", "evaluate.replicates=50", "trainer.log_every_n_steps=1")


class Folder:
    """A working directory with its own data, runs and cache."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.env = {**os.environ, "FSVFM_DATA": "data", "FSVFM_RUNS": "runs", "OMP_NUM_THREADS": "2"}

    def run(self, command: str, *words: str, ok: bool = True) -> str:
        done = subprocess.run(
            [sys.executable, "-m", f"fsvfm.{command}", *words],
            cwd=self.path,
            env=self.env,
            capture_output=True,
            text=True,
        )
        output = done.stdout + done.stderr
        assert (done.returncode == 0) == ok, output
        assert "Traceback" not in output, output
        return output


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, media_dir: Path) -> Folder:
    """Twenty photographs prepared by the demo's recipe, then pre-training: what the later commands need."""
    folder = Folder(tmp_path_factory.mktemp("demo"))
    (folder.path / "photos").mkdir()
    for photo in sorted((media_dir / "photos").glob("*.jpg"))[:20]:
        shutil.copy(photo, folder.path / "photos")
    splits = "recipe.splits={train: 0.5, val: 0.25, test: 0.25}"
    folder.run("prepare", "recipe=demo", "recipe.images=photos", splits)
    folder.run("train", "experiment=demo_pretrain", *SMALL, "name=demo_pretrain")
    return folder


def test_pretraining_leaves_a_complete_run(demo: Folder) -> None:
    run = demo.path / "runs" / "demo_pretrain"
    for name in ("config.yaml", "environment.json", "metrics.csv", "fit.done.json", "checkpoints/last.ckpt"):
        assert (run / name).is_file(), name
    assert list((run / "panels").glob("epoch_*.png"))
    meta = json.loads((run / "export" / "model.json").read_text())
    assert (meta["kind"], meta["model"]["name"]) == ("pretrain", "vit_tiny")
    assert all(0 < value < 1 for value in meta["mean"] + meta["std"])
    assert meta["provenance"]["faces"] == {"detector": "dlib_hog", "scale": 1.3, "align": False}
    columns = set(pd.read_csv(run / "metrics.csv").columns)
    wanted = {
        "train/loss_step", "train/loss_reconstruction", "train/loss_region", "train/loss_similarity", "train/grad_norm",
        "train/target_cosine", "train/feature_std", "train/ema_momentum", "train/nonfinite_steps",
    }  # fmt: skip
    assert wanted <= columns
    assert any(name.startswith("lr-") for name in columns)
    again = demo.run("train", "experiment=demo_pretrain", *SMALL, "name=demo_pretrain")
    assert "finished already" in again


def test_detectors_evaluation_and_report(demo: Folder) -> None:
    demo.run("train", "experiment=demo_dfd", *SMALL, "name=demo_dfd")
    demo.run("train", "experiment=demo_dfd_adapter", *SMALL, "name=demo_dfd_adapter")
    told = demo.run("evaluate", "experiment=demo_dfd", *SMALL)
    assert "demo_unseen" in told
    evaluation = next(demo.path.glob("runs/demo_dfd*/evaluation"))
    results = json.loads((evaluation / "results.json").read_text())["runs"]
    assert set(results) == {"full", "adapter"}
    assert set(results["full"]) == {"demo_seen", "demo_unseen"}
    cell = results["full"]["demo_seen"]["frame"]["metrics"]["auc"]
    assert 0 <= cell["low"] <= cell["value"] <= cell["high"] <= 1
    predictions = pd.read_parquet(evaluation / "predictions.parquet")
    assert predictions["score"].between(0, 1).all()
    # The unseen forgery was kept out of training and of the seen set.
    unseen = predictions[(predictions["testset"] == "demo_unseen") & (predictions["label"] == 1)]
    assert set(unseen["method"]) == {"face_swap"}
    for name in ("results.csv", "results.md", "results.tex"):
        assert (evaluation / name).stat().st_size
    demo.run("report", f"evaluation={evaluation}")
    page = (demo.path / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "This is not a usable detector" in page
    assert page.count("data:image") > 4


def test_interrupted_training_continues(demo: Folder) -> None:
    words = [sys.executable, "-m", "fsvfm.train", "experiment=demo_pretrain", "name=killed", "data.batch_size=4"]
    words += ["trainer.max_epochs=12", "callbacks.panels=null"]
    process = subprocess.Popen(words, cwd=demo.path, env=demo.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    last = demo.path / "runs" / "killed" / "checkpoints" / "last.ckpt"
    try:
        for _ in range(1200):
            if last.is_file() or process.poll() is not None:
                break
            time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert last.is_file()
    told = demo.run(*words[2].split(".")[1:], *words[3:])
    assert "continuing" in told
    table = pd.read_csv(demo.path / "runs" / "killed" / "metrics.csv")
    assert (demo.path / "runs" / "killed" / "export" / "model.safetensors").is_file()
    steps = table.dropna(subset=["train/loss_step"])["step"]
    assert steps.is_monotonic_increasing
    assert steps.is_unique


@pytest.mark.slow
def test_two_processes_keep_the_effective_batch_rule(demo: Folder) -> None:
    words = ("trainer.devices=2", "trainer.strategy=ddp", "data.batch_size=2", "callbacks.panels=null")
    told = demo.run("train", "experiment=demo_pretrain", *SMALL, *words, "name=ddp")
    assert "effective batch 4, peak learning rate 6.25e-05" in told
    table = pd.read_csv(demo.path / "runs" / "ddp" / "metrics.csv")
    rates = table.filter(like="lr-").to_numpy().ravel()
    assert 0 < np.nanmax(rates) <= 4e-3 * 4 / 256 + 1e-12
    assert (demo.path / "runs" / "ddp" / "export" / "model.json").is_file()


def test_errors_are_one_message(demo: Folder) -> None:
    told = demo.run("train", "experiment=dfd_vitb", ok=False)
    for part in ("ffpp_c23", "celebdf_v2", "python -m fsvfm.prepare recipe=ffpp", "CUDA"):
        assert part in told, part
    told = demo.run("evaluate", "ckpt=runs/demo_pretrain/export", "protocol=demo", ok=False)
    assert "not a detector" in told
    told = demo.run("train", "experiment=demo_pretrain", *SMALL, "name=demo_pretrain", "masking.ratio=0.5", ok=False)
    assert "masking.ratio" in told
    resume = "resume=runs/demo_pretrain/checkpoints/last.ckpt"
    told = demo.run("train", "experiment=demo_pretrain", *SMALL, "name=other", "model.depth=2", resume, ok=False)
    assert "model.depth: 4 → 2" in told


def test_panels_are_shown_by_loggers(demo: Folder) -> None:
    demo.env["WANDB_MODE"] = "offline"
    demo.run("train", "experiment=demo_pretrain", *SMALL, "name=logged", "logger=[tensorboard,wandb]")
    events = EventAccumulator(str(demo.path / "runs" / "logged" / "tensorboard"), size_guidance={"images": 0})
    assert events.Reload().Tags()["images"] == ["panel"]
    shown = list(demo.path.glob("runs/logged/wandb/offline-run-*/files/media/images/panel_*.png"))
    drawn = list(demo.path.glob("runs/logged/panels/epoch_*.png"))
    assert len(shown) == len(drawn) == len(events.Images("panel")) == 1
    assert np.array_equal(*(np.asarray(Image.open(file).convert("RGB")) for file in (*shown, *drawn)))


@pytest.mark.slow
def test_rffr_trains_evaluates_and_predicts(demo: Folder, media_dir: Path) -> None:
    demo.run("train", "experiment=demo_rffr_pretrain", *SMALL, "name=demo_rffr_pretrain")
    told = demo.run("train", "experiment=demo_rffr", *SMALL, "name=demo_rffr")
    assert "generator: used" in told
    assert "demo_unseen" in told
    assert (demo.path / "runs" / "demo_rffr" / "panels" / "residuals.png").is_file()
    told = demo.run("evaluate", "experiment=demo_rffr", *SMALL, "ckpt=runs/demo_rffr/export", "evaluate.out=scores")
    table = pd.read_parquet(demo.path / "scores" / "predictions.parquet")
    assert table["score"].between(0, 1).all()
    photo = sorted((media_dir / "photos").glob("*.jpg"))[0]
    words = [sys.executable, "-m", "fsvfm.predict", "ckpt=runs/demo_rffr/export", f"input={photo}", "out=predicted"]
    done = subprocess.run(words, cwd=demo.path, env=demo.env, capture_output=True, text=True)
    assert done.returncode in (0, 10, 11), done.stdout + done.stderr
    records = list((demo.path / "predicted").rglob("*.json*"))
    assert records
