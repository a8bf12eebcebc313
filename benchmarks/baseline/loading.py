"""Loading a pre-training batch the plain way: PIL, one ``.npy`` map per image, masks in a Python loop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from baseline.masking import crfr_p_loop
from PIL import Image


def load_batch(
    images: list[Path], maps: list[Path], mean: np.ndarray, std: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Normalised images (B, 3, H, W) float32, masked and region (B, L) bool."""
    pixels, masked, region = [], [], []
    for image, labels in zip(images, maps, strict=True):
        array = np.asarray(Image.open(image).convert("RGB"), dtype=np.float32) / 255
        pixels.append(((array - mean) / std).transpose(2, 0, 1))
        one, covered = crfr_p_loop(np.load(labels), 0.75, 16, rng)
        masked.append(one[0])
        region.append(covered[0])
    return np.stack(pixels), np.stack(masked), np.stack(region)
