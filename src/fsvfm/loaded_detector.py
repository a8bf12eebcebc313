"""A detector that is ready to score: its network in evaluation mode, with its normalisation, on a device.

Nothing of Lightning is imported here, so that a program that only scores does not wait for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from fsvfm.checkpoint import Checkpoint, load_checkpoint, normalisation
from fsvfm.data.transforms import normalise
from fsvfm.errors import CheckpointError, ConfigError
from fsvfm.loading import load_into
from fsvfm.models.detector import Detector, build_detector

#: Arithmetic of the network, by Lightning's names: float32, or bfloat16 where autocast takes it.
PRECISIONS = ("32-true", "bf16-mixed")

#: Most images per forward pass that ``auto`` tries on a GPU, which larger ones do not make faster.
LARGEST = 512

#: What ``auto`` is on a processor: larger batches leave its caches, and a video's network could start later only.
ON_CPU = 8


@dataclass(eq=False)
class LoadedDetector:
    """A detector in evaluation mode with its normalisation; ``score`` takes uint8 images.

    Attributes:
        network: on its device.
        mean: (1, 3, 1, 1) of pixels in 0–255, on the same device.
        std: likewise.
        checkpoint: where it is from.
        precision: one of :data:`PRECISIONS`.
        most: images that fit into the device's memory at once, learnt where it ran out; None if it never did.
    """

    network: Detector
    mean: torch.Tensor
    std: torch.Tensor
    checkpoint: Checkpoint
    precision: str = "32-true"
    most: int | None = None

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision={self.precision}: expected {' or '.join(PRECISIONS)}")

    @property
    def image_size(self) -> int:
        """Side of the input in pixels."""
        return int(self.checkpoint.meta["model"]["image_size"])

    @property
    def calibration(self) -> dict[str, Any] | None:
        """Temperature and thresholds fitted on validation data, where the checkpoint has them."""
        return self.checkpoint.meta.get("calibration")

    def score(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) uint8 images to P(fake), (B,) float64: the logistic function of the difference of the logits.

        Double precision keeps very sure scores apart, which float32 would round to 1. A batch for which the GPU's
        memory does not suffice is halved until it does, and so are those that follow.

        Raises:
            torch.cuda.OutOfMemoryError: not even one image fits.
        """
        scores: list[torch.Tensor] = []
        while images.shape[0] or not scores:
            try:
                scores.append(self._score(images[: self.most]))
                images = images[scores[-1].shape[0] :]
                continue
            except torch.cuda.OutOfMemoryError:
                tried = images[: self.most].shape[0]
                if tried <= 1:
                    raise
                self.most = tried // 2
            torch.cuda.empty_cache()  # here, where the error no longer holds what the forward pass had made
        return torch.cat(scores)

    def _score(self, images: torch.Tensor) -> torch.Tensor:
        device = self.mean.device
        half = torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16-mixed")
        with torch.inference_mode():
            images = normalise(images.to(device, non_blocking=True), self.mean, self.std)
            with half:
                logits = self.network(images).logits.double()
            fake = self.network.class_order.index("fake")
            return torch.sigmoid(logits[:, fake] - logits[:, 1 - fake])

    def batch_size(self, asked: int | str) -> int:
        """Images per forward pass: as asked, or for ``auto`` what suits the device.

        Raises:
            ConfigError: neither ``auto`` nor 1 or more.
        """
        if asked == "auto":
            return self._fitting if self.mean.device.type == "cuda" else ON_CPU
        if not isinstance(asked, int) or asked < 1:
            raise ConfigError(f"batch_size must be auto, or 1 or more, got {asked}")
        return asked

    @cached_property
    def _fitting(self) -> int:
        return self.largest_batch(LARGEST)

    def largest_batch(self, limit: int) -> int:
        """The largest power of two, `limit` at most, that fits into the device's memory, found by trying.

        Where the memory ran out, half of what just fitted: other batches wait there too, and other programs.
        """
        self.score(torch.zeros((limit, 3, self.image_size, self.image_size), dtype=torch.uint8))
        return limit if self.most is None else max(1, min(limit, self.most // 2))


def load_detector_network(
    source: str, *, device: str | torch.device = "cpu", precision: str = "32-true"
) -> LoadedDetector:
    """Load a detector from anything that holds one: an export, a run folder, a released or Lightning checkpoint.

    Raises:
        CheckpointError: the source holds no detector, or lacks its normalisation.
        ConfigError: no such precision.
    """
    checkpoint = load_checkpoint(source)
    if checkpoint.kind != "detector":
        raise CheckpointError(
            f"{source} is not a detector (its kind: {checkpoint.kind}); fine-tune it first, for example "
            f"`python -m fsvfm.train experiment=demo_dfd model.init={source}`"
        )
    meta = checkpoint.meta
    quirk = bool(meta["tune"].get("quirk", False))
    network = build_detector(meta["model"], meta["tune"], meta["class_order"], task=meta["task"], quirk=quirk)
    load_into(network, checkpoint.state)
    mean, std = (255 * torch.tensor(values, device=device).view(1, 3, 1, 1) for values in normalisation(checkpoint))
    return LoadedDetector(network.to(device).eval(), mean, std, checkpoint, precision)
