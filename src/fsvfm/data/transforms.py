"""Image transforms on uint8 arrays in loader workers; normalisation happens on the device, in the task."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN
from timm.data.auto_augment import rand_augment_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision import transforms as tv

#: (H, W, 3) uint8 in, (size, size, 3) uint8 out.
ImageTransform = Callable[[np.ndarray], np.ndarray]


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """Plain bicubic resize to ``size`` × ``size``: the papers' test transform (02 §4)."""
    if image.shape[:2] == (size, size):
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Zero mean and unit variance over the pre-training set.

    Args:
        images: (B, 3, H, W) pixels from 0 to 255, any dtype; not changed.
        mean: (1, 3, 1, 1) float32, of the pixels from 0 to 255, on the images' device.
        std: likewise.

    Returns:
        (B, 3, H, W) float32.
    """
    # One float copy, then in place: a third of the time of three copies on a CPU.
    return images.to(torch.float32, copy=True).sub_(mean).div_(std)


def test_transform(size: int) -> ImageTransform:
    """The papers' test transform as a callable."""

    def apply(image: np.ndarray) -> np.ndarray:
        return resize(image, size)

    return apply


test_transform.__test__ = False  # type: ignore[attr-defined]  # not a pytest test


def scale_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Multiply the saturation (HSV) of an (H, W, 3) uint8 image by ``factor``, at most to 1; hue and value stay."""
    hsv = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2HSV)
    hsv[..., 1] = np.minimum(hsv[..., 1] * factor, 1)
    return np.rint(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB) * 255).astype(np.uint8)


def train_transform(
    size: int,
    *,
    crop_scale: tuple[float, float] | None,
    flip: float,
    rand_augment: str | None,
    saturation: tuple[float, float] | None = None,
) -> ImageTransform:
    """Training augmentation of the detectors: saturation, random resized crop, flip, RandAugment (02 §4).

    Draws from Python's, NumPy's and torch's global generators; the data set seeds them per sample.

    Args:
        size: output side in pixels.
        crop_scale: area of the random crop as a share of the image, (low, high]; None resizes the whole image.
        flip: probability of a horizontal flip.
        rand_augment: timm's RandAugment string, for example ``rand-m9-mstd0.5-inc1``; None leaves it out. Uncovered
            corners are filled with ImageNet's mean colour, as in the published recipes.
        saturation: for every second image, multiply the saturation by a factor drawn from [low, high]; None never does.
    """
    steps: list[Any] = [
        RandomResizedCropAndInterpolation(size, scale=tuple(crop_scale), interpolation="bicubic")
        if crop_scale
        else tv.Resize((size, size), tv.InterpolationMode.BICUBIC),
        tv.RandomHorizontalFlip(flip),
    ]
    if rand_augment:
        fill = tuple(min(255, round(255 * value)) for value in IMAGENET_DEFAULT_MEAN)
        steps.append(rand_augment_transform(rand_augment, {"translate_const": int(size * 0.45), "img_mean": fill}))
    compose = tv.Compose(steps)

    def apply(image: np.ndarray) -> np.ndarray:
        if saturation and random.random() < 0.5:
            image = scale_saturation(image, random.uniform(*saturation))
        return np.asarray(compose(Image.fromarray(image)))

    return apply


def crop_and_flip(
    image: np.ndarray, labels: np.ndarray, size: int, *, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Random resized crop and flip, applied alike to an image and its parsing map (01 §1, optional augmentation).

    Args:
        image: (H, W, 3) uint8.
        labels: (H, W) uint8 parsing labels of the same size.
        size: output side in pixels.
        scale: area of the crop as a share of the image, (low, high].
        rng: source of randomness.

    Returns:
        (size, size, 3) uint8 resized bicubic, and (size, size) uint8 resized by nearest neighbour.
    """
    height, width = labels.shape
    side = float(np.sqrt(rng.uniform(*scale)))
    aspect = float(np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)) / 2))
    crop_w = max(1, min(width, round(width * side * aspect)))
    crop_h = max(1, min(height, round(height * side / aspect)))
    left, top = int(rng.integers(0, width - crop_w + 1)), int(rng.integers(0, height - crop_h + 1))
    box = (left, top, left + crop_w, top + crop_h)
    picture = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC, box=box)
    regions = Image.fromarray(labels).resize((size, size), Image.Resampling.NEAREST, box=box)
    out, out_labels = np.asarray(picture), np.asarray(regions)
    if rng.random() < 0.5:
        # Left and right parts share a region, so mirroring needs no relabelling.
        out, out_labels = out[:, ::-1], out_labels[:, ::-1]
    return np.ascontiguousarray(out), np.ascontiguousarray(out_labels)
