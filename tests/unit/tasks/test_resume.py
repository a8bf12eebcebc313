"""An interrupted and resumed run gives the same losses and weights as an uninterrupted one, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig

from fsvfm import build

COMMON = (
    "model.image_size=64",
    "data.batch_size=3",
    "trainer.max_epochs=3",
    "trainer.log_every_n_steps=1",
    "trainer.accelerator=cpu",
    "callbacks.last.every_n_epochs=null",
    "+callbacks.last.every_n_train_steps=1",
)
PRETRAIN = ("experiment=demo_pretrain", "callbacks.panels=null", "callbacks.periodic=null", *COMMON)
FORGERY = ("experiment=demo_dfd", "run=[fit]", "model.init=null", "augment=papers", "tune.drop_path=0.2", *COMMON)
FORGERY = (*FORGERY, "data.batch_size=4", "trainer.limit_train_batches=5")
RFFR = ("experiment=demo_rffr", "run=[fit]", "model.init=null", "model.branch_init=null", *COMMON, "data.batch_size=4")
RFFR = (*RFFR, "model.image_size=128", "callbacks.panels=null", "trainer.limit_train_batches=5")


class Interrupt(pl.Callback):
    """Stop the process's work after a number of micro-batches, as a crash would."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.after -= 1
        if self.after == 0:
            raise RuntimeError("interrupted")


def run(cfg: DictConfig, *, resume: Path | None = None, interrupt: int = 0) -> tuple[pd.DataFrame, dict[str, Any]]:
    data = build.build_data(cfg)
    task = build.build_task(cfg, data)
    trainer = build.build_trainer(cfg)
    if interrupt:
        trainer.callbacks.insert(0, Interrupt(interrupt))  # type: ignore[attr-defined]
    trainer.loggers[0].continue_at(torch.load(resume, weights_only=True)["global_step"] if resume else 0)  # type: ignore[attr-defined]
    if interrupt:
        with pytest.raises(RuntimeError, match="interrupted"):
            trainer.fit(task, datamodule=data)
    else:
        trainer.fit(task, datamodule=data, ckpt_path=resume, weights_only=True)
    trainer.loggers[0].save()  # type: ignore[attr-defined]
    table = pd.read_csv(Path(cfg.paths.run) / "metrics.csv")
    losses = table[["step", "train/loss_step"]].dropna()
    return losses, {key: value.clone() for key, value in task.state_dict().items()}


@pytest.mark.parametrize(
    ("overrides", "accumulate", "workers", "interrupt"),
    [
        (PRETRAIN, 1, 0, 7),  # in the middle of the second epoch
        (PRETRAIN, 2, 2, 9),  # with workers and accumulation: after an odd number of micro-batches
        (PRETRAIN, 1, 0, 6),  # while the first batch after an epoch is under way
        (FORGERY, 1, 0, 7),  # with dropped paths, mixup, random crops, and validation between epochs
        (FORGERY, 1, 2, 6),
        (RFFR, 1, 0, 7),  # with halved batches and drawn blocks
    ],
)
def test_resumed_equals_uninterrupted(
    compose_config: Callable[..., DictConfig],
    prepared_dir: Path,
    tmp_path: Path,
    overrides: tuple[str, ...],
    accumulate: int,
    workers: int,
    interrupt: int,
) -> None:
    def config(name: str) -> DictConfig:
        folder = tmp_path / name
        folder.mkdir()
        cfg = compose_config(
            "train",
            *overrides,
            f"paths.data={prepared_dir.parent}",
            f"trainer.accumulate_grad_batches={accumulate}",
            f"data.workers={workers}",
        )
        cfg.paths.run = str(folder)
        return cfg

    whole, expected = run(config("whole"))
    cfg = config("parts")
    run(cfg, interrupt=interrupt)
    last = Path(cfg.paths.run) / "checkpoints" / "last.ckpt"
    resumed, state = run(cfg, resume=last)
    pd.testing.assert_frame_equal(resumed.reset_index(drop=True), whole.reset_index(drop=True), check_exact=True)
    assert state.keys() == expected.keys()
    different = [key for key in state if not torch.equal(state[key], expected[key])]
    assert not different
