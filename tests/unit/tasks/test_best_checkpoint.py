"""The checkpoint with the lowest validation loss is the one that is exported and tested, in a real run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import DictConfig

from fsvfm import runner
from fsvfm.checkpoint import load_checkpoint
from fsvfm.data.datasets import LabelledFaces
from fsvfm.data.manifest import Manifest
from fsvfm.data.transforms import test_transform as plain_transform
from fsvfm.tasks.forgery import ForgeryTask


@pytest.fixture
def contradictory(prepared_dir: Path, tmp_path: Path) -> Path:
    """Faces whose validation labels are the opposite of what training teaches: every epoch makes the loss larger."""
    folder = tmp_path / "data" / "demo"
    shutil.copytree(prepared_dir, folder)
    manifest = Manifest.read(folder)
    table = manifest.table.copy()
    held_out = table["split"] == "val"
    table.loc[held_out, "label"] = 1 - table.loc[held_out, "label"]
    table.loc[held_out, "method"] = np.where(table.loc[held_out, "label"] == 1, "self_blend", "real")
    Manifest(table, folder).write()
    return folder


def scores(task: ForgeryTask, faces: Manifest) -> np.ndarray:
    """P(fake) by the task as it was trained: low-rank updates, where there are any, are still apart."""
    rows = LabelledFaces(faces, plain_transform(32))
    images = torch.stack([torch.as_tensor(rows[i]["image"]) for i in range(len(rows))])
    with torch.no_grad():
        return task.eval().detector.scores(task.normalise(images)).numpy()


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_lowest_validation_loss_is_exported_and_tested(
    compose_config: Callable[..., DictConfig], contradictory: Path, tmp_path: Path, tune: str
) -> None:
    cfg = compose_config(
        "train", "experiment=demo_dfd", "run=[fit, test]", f"paths.data={contradictory.parent}", "model.init=null",
        "model.image_size=32", f"tune={tune}", "tune.drop_path=0", "trainer.max_epochs=3", "data.batch_size=8",
        "optim.base_lr=0.04", "optim.warmup_epochs=1", "trainer.precision=32-true", "evaluate.replicates=10",
    )  # fmt: skip
    runner.train(cfg)
    run = tmp_path / "run"
    losses = pd.read_csv(run / "metrics.csv")["val/loss"].dropna().tolist()
    assert len(losses) == 3
    best = int(np.argmin(losses))
    assert best < 2 and losses[2] > losses[best] + 0.05, losses  # noqa: PT018  (or the run shows nothing)

    saved = {name: torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True) for name in ("best", "last")}
    assert (saved["best"]["epoch"], saved["last"]["epoch"]) == (best, 2)
    exported = load_checkpoint(run / "export")
    assert exported.meta["provenance"]["epoch"] == best
    assert exported.meta["tune"]["name"] == tune
    assert not any(".lora_" in key or "base_layer" in key for key in exported.state)
    if tune == "full":
        for key, tensor in exported.state.items():
            assert torch.equal(tensor, saved["best"]["state_dict"][f"detector.{key}"]), key

    # The scores of the test are those of the best checkpoint, and not of the last.
    table = pd.read_parquet(run / "test" / "predictions.parquet")
    tested = table[table["testset"] == "demo_seen"]
    faces = Manifest.read(contradictory)
    chosen = faces.select(split="test", methods=["real", "self_blend"])
    tasks = {n: ForgeryTask.load_from_checkpoint(run / "checkpoints" / f"{n}.ckpt", weights_only=True) for n in saved}
    expected = {name: scores(task, chosen) for name, task in tasks.items()}
    assert len(tested) == len(chosen.table)
    np.testing.assert_allclose(tested["score"], expected["best"], rtol=0, atol=1e-5)
    assert np.abs(tested["score"].to_numpy() - expected["last"]).max() > 0.05
