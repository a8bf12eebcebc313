"""Pictures of what RFFR's classifier sees: faces, their reconstruction from real faces' statistics, the residual."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor

from fsvfm.callbacks.panels import show, side_by_side
from fsvfm.data.datasets import collate
from fsvfm.models.rffr import RFFR, residual
from fsvfm.tasks.forgery import ForgeryTask

_CAPTIONS = ("input", "every block reconstructed", "residual (grey: 0)")


def residual_panel(network: RFFR, images: Tensor) -> Image.Image:
    """One row per face: input, the image with all its blocks reconstructed, the residual as (1 + r) / 2.

    Args:
        network: with a trained generator.
        images: (B, 3, S, S) float32, pixels in [0, 1].
    """
    everything = torch.arange(len(network.generator.blocks), device=images.device)
    found = network.generator(images, everything)
    return side_by_side([images, found, (1 + residual(found, images)) / 2], _CAPTIONS)


class ResidualPanels(pl.Callback):
    """Draws validation faces, real and fake ones in turn, before training; the generator does not change after.

    Args:
        faces: how many faces.
        folder: where ``residuals.png`` goes.
    """

    def __init__(self, faces: int, folder: str) -> None:
        self.faces, self.folder = faces, Path(folder)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw."""
        if not trainer.is_global_zero:
            return
        task = cast(ForgeryTask, pl_module)
        rows: Any = trainer.datamodule.val_rows  # type: ignore[attr-defined]
        classes = [np.flatnonzero(rows.labels == label) for label in (0, 1)]
        picks = [numbers[i * len(numbers) // self.faces] for i in range(self.faces // 2) for numbers in classes]
        images = task.normalise(collate([rows[int(i)] for i in picks])["image"].to(task.device))
        with trainer.precision_plugin.forward_context():
            picture = residual_panel(cast(RFFR, task.detector.backbone), images)
        show(picture, self.folder / "residuals.png", trainer)
