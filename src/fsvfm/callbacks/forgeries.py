"""Pictures of what SLADD's policy makes of real faces in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image, ImageDraw

from fsvfm.callbacks.panels import show, side_by_side
from fsvfm.data.datasets import collate
from fsvfm.faces.synthesis import REGIONS
from fsvfm.models.sladd import KINDS
from fsvfm.tasks.sladd import SladdTask

_CAPTIONS = ("face", "reference", "forged", "where")


def forgery_panel(task: SladdTask, batch: dict[str, Any], seed: int = 0) -> Image.Image:
    """One row per face: the face, its reference, what the policy made of them; where and how it did.

    Args:
        task: the task with its policy.
        batch: pairs whose faces are real, on the task's device.
        seed: of the policy's choice and the forgery.
    """
    actions = task.choose(batch, torch.Generator(task.device).manual_seed(seed))
    made = task.forge(batch, actions, seed)
    region = made.map[:, None].expand(-1, 3, -1, -1)
    pictures = [images.float() / 255 for images in (batch["image"], batch["reference"], made.image)]
    panel = side_by_side([*pictures, region], _CAPTIONS)
    draw, side = ImageDraw.Draw(panel), region.shape[-1]
    for row, (kind, chosen) in enumerate(zip(made.kind.tolist(), actions.region.tolist(), strict=True)):
        text = KINDS[kind] if KINDS[kind] == "real" else f"{KINDS[kind]}: {', '.join(REGIONS[chosen])}"
        draw.text((3 * side + 4, panel.height - (len(region) - row) * side + 3), text, fill=(255, 255, 255))
    return panel


class ForgeryPanels(pl.Callback):
    """After every epoch, the same real faces with the same references, as the policy forges them now.

    Args:
        every_n_epochs: interval; the last epoch is drawn too.
        faces: how many, spread evenly over the training set.
        folder: where ``epoch_<n>.png`` goes.
    """

    def __init__(self, every_n_epochs: int, faces: int, folder: str) -> None:
        self.every_n_epochs, self.faces, self.folder = every_n_epochs, faces, Path(folder)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw when it is time."""
        epoch = trainer.current_epoch + 1
        if not trainer.is_global_zero or (epoch % self.every_n_epochs and epoch != trainer.max_epochs):
            return
        task = cast(SladdTask, pl_module)
        rows: Any = trainer.datamodule.training_rows()  # type: ignore[attr-defined]
        real = np.flatnonzero(rows.labels == 0)
        picks = real[np.linspace(0, len(real) - 1, min(self.faces, len(real))).astype(int)]
        batch = collate([rows[int(i)] for i in picks])
        batch = {name: v.to(task.device) if isinstance(v, torch.Tensor) else v for name, v in batch.items()}
        task.eval()  # no dropout, and nothing for the running means of batch normalisation
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            picture = forgery_panel(task, batch)
        task.train()
        show(picture, self.folder / f"epoch_{epoch:04d}.png", trainer)
