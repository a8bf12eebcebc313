"""Pictures of what pre-training does: input, mask, covered region, reconstruction."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from fsvfm.data.datasets import collate
from fsvfm.loggers import Shows
from fsvfm.models.vit import patchify, unpatchify
from fsvfm.tasks.pretrain import PretrainResult, PretrainTask

_CAPTIONS = ("input", "visible to the encoder", "covered region", "prediction", "prediction + visible")
_GREY = 0.5


def _spread(patches: Tensor, channels: int) -> Tensor:
    """(B, L) flags to (B, L, channels) for masking patch pixels."""
    return patches.unsqueeze(-1).expand(-1, -1, channels).float()


def reconstruction(task: PretrainTask, images: Tensor, result: PretrainResult) -> Tensor:
    """Predicted pixels in [0, 1], (B, 3, S, S).

    With ``norm_pix`` the network predicts every patch up to its mean and contrast; both are then taken from the input,
    which is the usual way to show such models and flatters flat patches.
    """
    patch = task.online.encoder.config.patch_size
    predicted = cast(Tensor, result.output.prediction).float()
    if task.loss_options["norm_pix"]:
        raw = patchify(images, patch)
        mean, variance = raw.mean(-1, keepdim=True), raw.var(-1, keepdim=True)
        predicted = predicted * (variance + 1e-6).sqrt() + mean
    pixels = unpatchify(predicted, patch) * task.std + task.mean
    return (pixels / 255).clamp(0, 1)


def panel(task: PretrainTask, pixels: Tensor, result: PretrainResult) -> Image.Image:
    """One row per face: input, visible patches, covered region, prediction, prediction with visible patches pasted in.

    Args:
        task: the pre-training task.
        pixels: (B, 3, S, S) uint8 faces.
        result: of :meth:`PretrainTask.compute` on the same faces, with ``whole``.
    """
    patch = task.online.encoder.config.patch_size
    image = pixels.float() / 255
    patches = patchify(image, patch)
    masked, region = (_spread(m, patches.shape[-1]) for m in (result.masks.masked, result.masks.region))
    predicted = patchify(reconstruction(task, task.normalise(pixels), result), patch)
    columns = [
        patches,
        patches * (1 - masked) + _GREY * masked,
        patches * region + (0.25 * patches + 0.75 * _GREY) * (1 - region),
        predicted,
        patches * (1 - masked) + predicted * masked,
    ]
    return side_by_side([unpatchify(column, patch) for column in columns], _CAPTIONS)


def side_by_side(columns: Sequence[Tensor], captions: Sequence[str]) -> Image.Image:
    """One row per face, one column with a caption per tensor (B, 3, S, S), values in [0, 1]."""
    rows = torch.cat(list(columns), dim=3)
    picture = (rows.clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).reshape(-1, rows.shape[-1], 3).cpu().numpy()
    caption = 18
    canvas = Image.fromarray(np.pad(picture, ((caption, 0), (0, 0), (0, 0)), constant_values=255))
    draw = ImageDraw.Draw(canvas)
    for column, text in enumerate(captions):
        draw.text((column * rows.shape[2] + 4, 3), text, fill=(0, 0, 0))
    return canvas


def show(picture: Image.Image, path: Path, trainer: pl.Trainer) -> None:
    """On the first process: write a PNG, complete or not at all, and give it to the loggers that show pictures."""
    if not trainer.is_global_zero:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    picture.save(temporary, format="PNG")
    temporary.replace(path)
    for logger in trainer.loggers:
        if isinstance(logger, Shows):
            logger.show_picture("panel", picture, trainer.global_step)


class ReconstructionPanels(pl.Callback):
    """Every k epochs and at the end, the same faces with the same masks as a PNG; loggers show it too.

    Args:
        every_n_epochs: interval; 0 draws only at the end.
        faces: how many faces, spread evenly over the training set.
        folder: where ``epoch_<n>.png`` goes.
    """

    def __init__(self, every_n_epochs: int, faces: int, folder: str) -> None:
        self.every_n_epochs, self.faces, self.folder = every_n_epochs, faces, Path(folder)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw when it is time."""
        epoch = trainer.current_epoch + 1
        last = epoch == trainer.max_epochs or trainer.global_step == trainer.max_steps
        due = self.every_n_epochs and epoch % self.every_n_epochs == 0
        task = cast(PretrainTask, pl_module)
        if not task.reconstructs or not (due or last):
            return
        # Every process computes: networks may be shared out among them (FSDP), or losses gather features (infonce).
        rows: Any = trainer.datamodule.training_rows()  # type: ignore[attr-defined]
        picks = np.linspace(0, len(rows) - 1, min(self.faces, len(rows))).astype(int)
        batch = collate([rows[int(i)] for i in picks])
        pixels, grid = batch["image"].to(task.device), batch["grid"].to(task.device)
        generator = torch.Generator(task.device).manual_seed(0)
        # Compiled networks (speed.compile) would be compiled again for these few faces.
        eager = torch.compiler.set_stance("force_eager")
        with torch.no_grad(), eager, trainer.precision_plugin.forward_context():
            picture = panel(task, pixels, task.compute(pixels, grid, generator=generator, whole=True))
        show(picture, self.folder / f"epoch_{epoch:04d}.png", trainer)
