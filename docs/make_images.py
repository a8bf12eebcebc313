"""Draws the pictures of the documentation: `python docs/make_images.py` after `make demo`.

The face in them is the mean of all portraits of the demo, so that no person's photograph is in the repository.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch
from torch import Tensor

from fsvfm.callbacks.panels import reconstruction
from fsvfm.checkpoint import load_checkpoint
from fsvfm.data.datasets import read_image
from fsvfm.data.manifest import Manifest
from fsvfm.explain import explain
from fsvfm.faces.images import LABEL_COLOURS
from fsvfm.faces.parse import make_parser
from fsvfm.loaded_detector import load_detector_network
from fsvfm.loading import load_into
from fsvfm.masking import STRATEGIES, Masker, Masks, crfr_p
from fsvfm.regions import COVERABLE, REGION_BIT, region_grid
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


def mean_face() -> tuple[np.ndarray, np.ndarray]:
    """The mean portrait (224, 224, 3) uint8 and its parsing labels (224, 224) uint8."""
    faces = Manifest.read(HERE.parent / "data" / "demo").select(label=0)
    mean = np.mean([read_image(path).astype(np.float64) for path in faces.paths()], axis=0)
    face = np.clip((mean - mean.mean()) * 1.3 + mean.mean(), 0, 255).astype(np.uint8)
    landmarks = np.mean([np.asarray(points).reshape(68, 2) for points in faces.table["landmarks"]], axis=0)
    labels = make_parser("landmarks")(face, landmarks.astype(np.float32))
    if labels is None:
        raise SystemExit("the mean face could not be parsed; is data/demo complete?")
    return face, labels


def painted(face: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """A face with its regions in colour."""
    return (0.45 * face + 0.55 * np.asarray(LABEL_COLOURS)[labels]).astype(np.uint8)


def pixels(mask: Tensor) -> np.ndarray:
    """(1, 196) bool patches to (224, 224) bool pixels."""
    return mask.view(14, 14).numpy().repeat(16, 0).repeat(16, 1)


def hidden(face: np.ndarray, masks: Masks) -> np.ndarray:
    """A face with its masked patches in grey and its covered region in red."""
    picture = np.where(pixels(masks.masked)[..., None], 128, face)
    picture[pixels(masks.region)] = (200, 60, 60)
    return picture


def draw_masking(face: np.ndarray, labels: np.ndarray) -> None:
    """masking.png: regions, a reconstruction, and the five strategies."""
    grid = torch.from_numpy(region_grid(labels, 16))[None]
    figure, axes = plt.subplots(2, 5, figsize=(10, 4.4))
    show(axes[0, 0], face, "mean of 400 faces")
    show(axes[0, 1], painted(face, labels), "facial regions")
    task = load_task()
    image = torch.from_numpy(face.transpose(2, 0, 1).copy())[None]
    with torch.no_grad():
        result = task.compute(image, grid, generator=torch.Generator().manual_seed(4))
        predicted = reconstruction(task, task.normalise(image), result)[0].permute(1, 2, 0).numpy()
    for column, name in enumerate(STRATEGIES):
        show(axes[1, column], hidden(face, Masker(strategy=name)(grid, generator=seeded(4))), name)
    seen = pixels(result.masks.masked)[..., None]
    show(axes[0, 2], np.where(seen, 128, face), "visible to the encoder")
    show(axes[0, 3], predicted, "prediction (ViT-Tiny)")
    show(axes[0, 4], np.where(seen, (255 * predicted).astype(np.uint8), face), "prediction + visible")
    save(figure, "masking")


def draw_crfr_p(face: np.ndarray, labels: np.ndarray) -> None:
    """crfr_p.png: the steps of CRFR-P, with the nose covered."""
    grid = torch.from_numpy(region_grid(labels, 16))[None]
    masks = crfr_p(grid, 147, covered=torch.tensor([COVERABLE.index("nose")]), generator=seeded(1))
    figure, axes = plt.subplots(1, 4, figsize=(12, 2.9), width_ratios=[1, 1, 0.9, 1])
    show(axes[0], painted(face, labels), "1  regions of the face")
    covered = face.copy()
    covered[pixels(masks.region)] = (200, 60, 60)
    show(axes[1], covered, "2  cover one of them whole")
    draws = [
        crfr_p(grid, 147, covered=torch.tensor([COVERABLE.index("nose")]), generator=seeded(i)) for i in range(500)
    ]
    rate = torch.stack([draw.masked for draw in draws]).float().mean(0)[0]
    first = {}
    for name, bit in REGION_BIT.items():
        earlier = (1 << bit) - 1
        first[name] = ((grid[0] >> bit) & 1).bool() & ((grid[0] & earlier) == 0) & ~masks.region[0]
    shares = {name: float(rate[patches].mean()) for name, patches in first.items() if patches.any()}
    axes[2].barh(
        ["nose (covered)", *list(shares)][::-1],
        [1.0, *shares.values()][::-1],
        color=["#557"] * len(shares) + ["#c83c3c"],
    )
    axes[2].set_xlim(0, 1.05)
    axes[2].tick_params(labelsize=7)
    axes[2].set_title("3  mask the rest in proportion", fontsize=9)
    show(axes[3], hidden(face, masks), "4  147 of 196 patches in all")
    save(figure, "crfr_p")


def box(axis: Axes, x: float, y: float, width: float, text: str, colour: str) -> None:
    """A labelled box, (x, y) its left middle."""
    axis.add_patch(FancyBboxPatch((x, y - 0.35), width, 0.7, boxstyle="round,pad=0.04", fc=colour, ec="#333", lw=0.8))
    axis.text(x + width / 2, y, text, ha="center", va="center", fontsize=8)


def arrow(
    axis: Axes, start: tuple[float, float], end: tuple[float, float], text: str = "", dashed: bool = False
) -> None:
    """An arrow with a word beside it."""
    style = {"arrowstyle": "-|>", "color": "#333", "lw": 0.9, "ls": "--" if dashed else "-"}
    axis.annotate("", end, start, arrowprops=style)
    if text:
        axis.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.12, text, ha="center", fontsize=7, color="#333")


def plan(width: float, height: float) -> tuple[Any, Axes]:
    """A figure to draw boxes on, a unit an inch and a bit."""
    figure, axis = plt.subplots(figsize=(0.9 * width, 0.8 * height))
    axis.set_xlim(0, width)
    axis.set_ylim(0, height)
    axis.set_axis_off()
    return figure, axis


def draw_networks() -> None:
    """networks.png: what pre-training computes (FS-VFM: online and target network, three losses)."""
    figure, axis = plan(12, 4.6)
    online, target, loss = "#dbe7fb", "#e8e8e8", "#fbe3d6"
    box(axis, 0.1, 3.9, 1.5, "visible quarter\nof the patches", "white")
    box(axis, 0.1, 0.6, 1.5, "whole face", "white")
    box(axis, 2.2, 3.0, 1.4, "encoder", online)
    box(axis, 4.2, 3.9, 1.7, "pixel decoder", online)
    box(axis, 4.2, 2.3, 1.7, "representation\ndecoder", online)
    box(axis, 6.5, 2.3, 1.3, "projector", online)
    box(axis, 8.3, 2.3, 1.3, "predictor", online)
    box(axis, 2.2, 0.6, 1.4, "encoder", target)
    box(axis, 4.2, 0.6, 1.7, "representation\ndecoder", target)
    box(axis, 6.5, 0.6, 1.3, "projector", target)
    box(axis, 6.5, 3.9, 3.1, "L_rec: masked patches\nL_region: the covered region", loss)
    box(axis, 10.2, 1.45, 1.6, "L_sim\nsame face", loss)
    for start, end in [
        ((1.64, 3.8), (2.16, 3.1)), ((3.64, 3.1), (4.16, 3.8)), ((3.64, 2.9), (4.16, 2.4)), ((5.94, 3.9), (6.46, 3.9)),
        ((5.94, 2.3), (6.46, 2.3)), ((7.84, 2.3), (8.26, 2.3)), ((9.64, 2.2), (10.16, 1.6)), ((1.64, 0.6), (2.16, 0.6)),
        ((3.64, 0.6), (4.16, 0.6)), ((5.94, 0.6), (6.46, 0.6)), ((7.84, 0.6), (10.16, 1.3)),
    ]:  # fmt: skip
        arrow(axis, start, end)
    for x in (2.9, 5.05, 7.15):
        arrow(axis, (x, 1.88 if x > 3 else 2.6), (x, 1.0), dashed=True)
    axis.text(3.05, 1.6, "EMA", fontsize=8)
    axis.text(8.3, 0.55, "no gradient", fontsize=7, color="#555")
    save(figure, "networks")


def draw_adapter() -> None:
    """fs_adapter.png: the adapter on the pooled feature of a frozen backbone."""
    figure, axis = plan(12, 2.9)
    frozen, trained = "#e8e8e8", "#dbe7fb"
    box(axis, 0.1, 1.3, 1.0, "face", "white")
    box(axis, 1.6, 1.3, 1.9, "ViT, frozen\nmean of patches", frozen)
    box(axis, 4.3, 0.6, 1.3, "down\nd → d/4", trained)
    box(axis, 6.3, 0.6, 1.3, "up\nd/4 → d", trained)
    box(axis, 8.4, 1.3, 1.2, "[ f ; a ]", "white")
    box(axis, 10.2, 1.3, 1.6, "linear → real, fake", trained)
    box(axis, 5.0, 2.35, 3.3, "projection z: real faces attract", "#fbe3d6")
    for start, end, text in [
        ((1.14, 1.3), (1.56, 1.3), ""), ((3.54, 1.2), (4.26, 0.7), "f"), ((5.64, 0.6), (6.26, 0.6), "h"),
        ((7.64, 0.6), (8.36, 1.2), "a"), ((9.64, 1.3), (10.16, 1.3), ""), ((4.95, 0.98), (5.6, 1.97), "h"),
    ]:  # fmt: skip
        arrow(axis, start, end, text)
    axis.annotate("", (8.36, 1.35), (3.54, 1.35), arrowprops={"arrowstyle": "-|>", "color": "#333", "lw": 0.9})
    save(figure, "fs_adapter")


def draw_explanation(face: np.ndarray) -> None:
    """Where the demo detector's score of a face comes from."""
    detector = load_detector_network(str(RUN.parents[1] / "demo_dfd" / "export"))
    explain(detector, face, encoder=RUN).figure(HERE / "images" / "explanation.png")


def seeded(seed: int) -> torch.Generator:
    """A generator for one draw."""
    return torch.Generator().manual_seed(seed)


def save(figure: Any, name: str) -> None:
    """Write docs/images/<name>.png."""
    figure.tight_layout()
    figure.savefig(HERE / "images" / f"{name}.png", dpi=110)
    plt.close(figure)


def main() -> None:
    """Draw all of them."""
    face, labels = mean_face()
    draw_masking(face, labels)
    draw_crfr_p(face, labels)
    draw_networks()
    draw_adapter()
    draw_explanation(face)


if __name__ == "__main__":
    main()
