"""One progress bar for a whole fit, with speed and time left; plain lines where there is no terminal."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor


def duration(seconds: float) -> str:
    """Seconds as ``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class RunProgress(ProgressBar):
    """Steps done of all steps of the run, images per second, time left, and the latest loss.

    Args:
        every_seconds: how often to print a line when the output is not a terminal.
    """

    def __init__(self, every_seconds: float = 10.0) -> None:
        super().__init__()
        self.every_seconds = every_seconds
        self._bar: Progress | None = None
        self._enabled = True

    def disable(self) -> None:
        """Stay silent (Lightning calls this on all processes but the first)."""
        self._enabled = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bar at the step the run resumes from."""
        per_epoch = int(trainer.num_training_batches)
        limits = [per_epoch * (trainer.max_epochs or 1), (trainer.max_steps or -1) * trainer.accumulate_grad_batches]
        self.total = min(limit for limit in limits if limit > 0)  # Lightning refuses a run without any limit
        self.epochs = math.ceil(self.total / per_epoch)
        self.first = trainer.current_epoch * int(trainer.num_training_batches)
        self.started = self.printed = time.monotonic()
        if self._enabled and sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._task = self._bar.add_task("training", total=self.total, completed=self.first, note="")
            self._bar.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance; read the loss from the device only when something is shown."""
        now = time.monotonic()
        interval = 0.5 if self._bar else self.every_seconds
        done = trainer.current_epoch * int(trainer.num_training_batches) + batch_idx + 1
        if not self._enabled or (now - self.printed < interval and done < self.total):
            return
        self.printed = now
        metrics = trainer.callback_metrics
        loss = metrics.get("train/loss_step", metrics.get("train/loss"))
        note = f"epoch {trainer.current_epoch + 1}/{self.epochs}"
        note += f"  loss {float(loss):.4f}" if isinstance(loss, Tensor) else ""
        if self._bar:
            self._bar.update(self._task, completed=done, note=note)
            return
        speed = (done - self.first) / max(now - self.started, 1e-9)
        left = duration((self.total - done) / max(speed, 1e-9))
        print(f"training {done}/{self.total} steps  {note}  {speed:.2f} steps/s  left {left}", flush=True)

    def _close(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Close the bar, so that the error message is readable."""
        self._close()
