"""Draws the README's picture from the demo's data: `python docs/make_images.py` after `make demo`.

The face is the mean of all portraits of the demo, so that no person's photograph is in the repository.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes

from fsvfm.callbacks.panels import reconstruction
from fsvfm.checkpoint import load_checkpoint
from fsvfm.data.datasets import read_image
from fsvfm.data.manifest import Manifest
from fsvfm.faces.images import LABEL_COLOURS
from fsvfm.faces.parse import make_parser
from fsvfm.loading import load_into
from fsvfm.masking import STRATEGIES, Masker
from fsvfm.regions import region_grid
from fsvfm.tasks.pretrain import PretrainTask

HERE = Path(__file__).parent
RUN = HERE.parent / "runs" / "demo_pretrain" / "export"


def load_task() -> PretrainTask:
    """The demo's pre-trained networks as a task."""
    checkpoint = load_checkpoint(RUN)
    values = checkpoint.meta["provenance"]["hyper_parameters"]
    task = PretrainTask(**values)
    for name in ("online", "target"):
        state = {k.removeprefix(f"{name}."): v for k, v in checkpoint.only(name).state.items()}
        load_into(getattr(task, name), state)
    return task.eval()


def show(axis: Axes, picture: np.ndarray, title: str) -> None:
    """One picture without ticks."""
    axis.imshow(picture)
    axis.set_title(title, fontsize=9)
    axis.set_axis_off()


def main() -> None:
    """Draw docs/images/masking.png."""
    faces = Manifest.read(HERE.parent / "data" / "demo").select(label=0)
    mean = np.mean([read_image(path).astype(np.float64) for path in faces.paths()], axis=0)
    face = np.clip((mean - mean.mean()) * 1.3 + mean.mean(), 0, 255).astype(np.uint8)
    landmarks = np.mean([np.asarray(points).reshape(68, 2) for points in faces.table["landmarks"]], axis=0)
    labels = make_parser("landmarks")(face, landmarks.astype(np.float32))
    if labels is None:
        raise SystemExit("the mean face could not be parsed; is data/demo complete?")
    grid = torch.from_numpy(region_grid(labels, 16))[None]
    figure, axes = plt.subplots(2, 5, figsize=(10, 4.4))
    show(axes[0, 0], face, "mean of 400 faces")
    show(axes[0, 1], (0.45 * face + 0.55 * np.asarray(LABEL_COLOURS)[labels]).astype(np.uint8), "facial regions")
    task = load_task()
    pixels = torch.from_numpy(face.transpose(2, 0, 1).copy())[None]
    with torch.no_grad():
        result = task.compute(pixels, grid, generator=torch.Generator().manual_seed(4))
        predicted = reconstruction(task, task.normalise(pixels), result)[0].permute(1, 2, 0).numpy()
    for column, name in enumerate(STRATEGIES):
        masks = Masker(strategy=name)(grid, generator=torch.Generator().manual_seed(4))
        hidden = masks.masked.view(14, 14).numpy().repeat(16, 0).repeat(16, 1)
        covered = masks.region.view(14, 14).numpy().repeat(16, 0).repeat(16, 1)
        picture = np.where(hidden[..., None], 128, face)
        picture[covered] = (200, 60, 60)
        show(axes[1, column], picture, name)
    hidden = result.masks.masked.view(14, 14).numpy().repeat(16, 0).repeat(16, 1)
    show(axes[0, 2], np.where(hidden[..., None], 128, face), "visible to the encoder")
    show(axes[0, 3], predicted, "prediction (ViT-Tiny)")
    show(axes[0, 4], np.where(hidden[..., None], (255 * predicted).astype(np.uint8), face), "prediction + visible")
    figure.tight_layout()
    figure.savefig(HERE / "images" / "masking.png", dpi=110)


if __name__ == "__main__":
    main()
