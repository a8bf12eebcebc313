"""Guards: stop a run that can no longer be good, after saving its last good state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from fsvfm.errors import DataError, TrainingStopped
from fsvfm.tasks.base import BaseTask


class NonFiniteGuard(pl.Callback):
    """Counts optimisation steps that were skipped for a non-finite loss or gradient, and stops after too many in a row.

    The task skips such a step on the device (neither weights, optimiser state nor EMA target change), so the state at
    the time of stopping *is* the last good state. The counts are read on the host only every ``log_every_n_steps``;
    on CPU at every step.

    Args:
        max_in_a_row: stop after this many consecutive skipped steps.
        folder: where ``last_good.ckpt`` is written on stopping.
    """

    def __init__(self, max_in_a_row: int, folder: str) -> None:
        self.max_in_a_row, self.folder = max_in_a_row, Path(folder)
        self.total: Tensor | int = 0
        self.streak: Tensor | int = 0
        self._seen_step = -1

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the counts after an optimisation step."""
        if trainer.global_step == self._seen_step or not isinstance(pl_module, BaseTask):
            return
        self._seen_step = trainer.global_step
        skipped = 1.0 - pl_module.step_taken
        self.total = self.total + skipped
        self.streak = (self.streak + skipped) * skipped
        pl_module.log("train/nonfinite_steps", self.total)
        interval = int(trainer.log_every_n_steps)  # type: ignore[attr-defined]
        if pl_module.device.type != "cpu" and trainer.global_step % interval:
            return
        if int(self.streak) >= self.max_in_a_row:
            path = self.folder / "last_good.ckpt"
            trainer.save_checkpoint(path)
            raise TrainingStopped(
                f"the loss or its gradient was not finite in {int(self.streak)} steps in a row (step "
                f"{trainer.global_step}); nothing was updated in them. The last good state is {path}. "
                "Lower optim.base_lr, use trainer.precision=32-true, or look for broken images, then resume from it "
                f"with resume={path}"
            )

    def state_dict(self) -> dict[str, Any]:
        """Counts as numbers."""
        return {"total": int(self.total), "streak": int(self.streak)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the counts."""
        self.total, self.streak = state_dict["total"], state_dict["streak"]


class UnreadableFiles(pl.Callback):
    """Lists training files that could not be read (a neighbour replaces them) and stops above a share of the set.

    Args:
        max_share: largest tolerated share of unreadable files, of all files of the training set.
        folder: where ``unreadable.txt`` (path, tab, reason) is kept.
    """

    def __init__(self, max_share: float, folder: str) -> None:
        self.max_share, self.file = max_share, Path(folder) / "unreadable.txt"
        self.seen: set[str] = set()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collect what the data set reported."""
        new = set(batch["unreadable"]) - self.seen
        if not new:
            return
        self.seen |= new
        if trainer.is_global_zero:
            with self.file.open("a") as out:
                out.writelines(f"{line}\n" for line in sorted(new))
        pl_module.log("train/unreadable_files", torch.tensor(float(len(self.seen))), batch_size=1)
        total = len(trainer.datamodule.training_rows())  # type: ignore[attr-defined]
        if len(self.seen) > self.max_share * total:
            raise DataError(
                f"{len(self.seen)} of {total} training files could not be read, more than the tolerated share "
                f"{self.max_share:.1%} (callbacks.unreadable.max_share); they are listed in {self.file}"
            )
