"""Images per second, over all processes, measured between logging intervals."""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl


class Throughput(pl.Callback):
    """Logs ``train/images_per_s``: wall-clock, loading and logging included."""

    def __init__(self) -> None:
        self._since: tuple[float, int] | None = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start a new measurement; validation between epochs does not count."""
        self._since = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log at the trainer's logging interval."""
        if self._since is None:
            self._since = (time.monotonic(), batch_idx)
            return
        started, first = self._since
        interval = int(trainer.log_every_n_steps)  # type: ignore[attr-defined]
        if (batch_idx + 1) % interval and batch_idx - first < interval:
            return
        elapsed = time.monotonic() - started
        images = (batch_idx - first) * len(batch["index"]) * trainer.world_size
        pl_module.log("train/images_per_s", images / elapsed, batch_size=1)
        self._since = (time.monotonic(), batch_idx)
