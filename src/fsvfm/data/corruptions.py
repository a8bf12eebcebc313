"""Corruptions that a face meets on its way to a detector, in five severities each: robustness as a protocol.

They apply to the face crop as it was prepared, before the test transform resizes it. Blur and resizing are measured at
the size at which a network sees the face (224 pixels), so that a severity means the same for large and small crops;
coding, noise and colour act on the crop's own pixels. The kinds are those of DeeperForensics-1.0 (colour saturation and
contrast, blocks, noise, blur, JPEG, video coding) with resizing and brightness added; the values are this project's.
"""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

import av
import cv2
import numpy as np

from fsvfm.errors import ConfigError, DataError

SEVERITIES = (1, 2, 3, 4, 5)

#: Side in pixels at which blur and resizing are measured.
_SEEN = 224
#: Blocks along the shorter side: 8 pixels at 224.
_BLOCKS = 28
#: A real clip shows a face in predicted pictures more often than in a key frame; the third of five is one.
_CLIP, _TAKEN = 5, 2


class Corruption(NamedTuple):
    """One kind of damage: what the numbers are, one per severity, and the function that takes one of them."""

    about: str
    unit: str
    values: tuple[float, float, float, float, float]
    apply: Callable[[np.ndarray, float, int], np.ndarray]


def corrupt(image: np.ndarray, name: str, severity: int, seed: int) -> np.ndarray:
    """Damage a face.

    The result follows from the arguments alone. For one seed, severities share their randomness: the same noise grows
    stronger, the same blocks are joined by others.

    Args:
        image: (H, W, 3) uint8 RGB, of any size.
        name: one of :data:`CORRUPTIONS`.
        severity: 1 (mild) to 5.
        seed: give every image its own, or all of them get the same noise.

    Returns:
        A new (H, W, 3) uint8 image.

    Raises:
        ConfigError: an unknown name or severity.
        DataError: not an (H, W, 3) uint8 image.
    """
    if name not in CORRUPTIONS:
        raise ConfigError(f"there is no corruption {name!r}; there are {', '.join(CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise ConfigError(f"corruption {name}: there is no severity {severity!r}; there are 1 (mild) to 5")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise DataError(f"a corruption takes an (H, W, 3) uint8 RGB image, got {image.dtype} of shape {image.shape}")
    corruption = CORRUPTIONS[name]
    own = int(np.random.SeedSequence([abs(seed), seed < 0, zlib.crc32(name.encode())]).generate_state(1)[0])
    return corruption.apply(np.ascontiguousarray(image), corruption.values[severity - 1], own)


# ---------------------------------------------------------------- operations: image, value, seed → image


@cache
def _albumentations() -> Any:
    # Imported on first use (it takes seconds), and told not to ask the network for a newer version of itself.
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    import albumentations

    return albumentations


def _apply(image: np.ndarray, seed: int, kind: str, **settings: Any) -> np.ndarray:
    """One albumentations transform, made anew so that nothing is left from an earlier call."""
    transform = getattr(_albumentations(), kind)(p=1.0, **settings)
    transform.set_random_seed(seed)
    return transform(image=image)["image"]


def _jpeg(image: np.ndarray, quality: float, seed: int) -> np.ndarray:
    # albumentations hands the array to OpenCV as it is, which takes it for BGR and would code red as blue.
    quality = int(quality)
    coded = _apply(image[..., ::-1].copy(), seed, "ImageCompression", quality_range=(quality, quality))
    return np.ascontiguousarray(coded[..., ::-1])


def _gaussian_blur(image: np.ndarray, sigma: float, seed: int) -> np.ndarray:
    sigma *= min(image.shape[:2]) / _SEEN
    return _apply(image, seed, "GaussianBlur", sigma_limit=(sigma, sigma), blur_limit=0)


def _gaussian_noise(image: np.ndarray, std: float, seed: int) -> np.ndarray:
    # By hand: albumentations reseeds OpenCV's global generator and cuts noise off to whole grey levels (σ 4.6 for 5).
    noise = np.random.default_rng(seed).normal(0, std, image.shape)
    return np.clip(np.rint(image + noise), 0, 255).astype(np.uint8)


def _resize(image: np.ndarray, side: float, seed: int) -> np.ndarray:
    scale = side / min(image.shape[:2])
    if scale >= 1:
        return image.copy()  # the face is as small as that already
    ways = {"downscale": cv2.INTER_AREA, "upscale": cv2.INTER_CUBIC}
    return _apply(image, seed, "Downscale", scale_range=(scale, scale), interpolation_pair=ways)


def _colour(image: np.ndarray, seed: int, **factor: float) -> np.ndarray:
    plain = dict.fromkeys(("brightness", "contrast", "saturation"), 1.0) | factor
    return _apply(image, seed, "ColorJitter", hue=(0, 0), **{name: (value, value) for name, value in plain.items()})


def _brightness(image: np.ndarray, change: float, seed: int) -> np.ndarray:
    sign = 1 if np.random.default_rng(seed).random() < 0.5 else -1
    return _colour(image, seed, brightness=1 + sign * change / 100)


def _contrast(image: np.ndarray, percent: float, seed: int) -> np.ndarray:
    return _colour(image, seed, contrast=percent / 100)


def _saturation(image: np.ndarray, percent: float, seed: int) -> np.ndarray:
    return _colour(image, seed, saturation=percent / 100)


def _blockwise(image: np.ndarray, percent: float, seed: int) -> np.ndarray:
    # By hand: albumentations' dropout lets holes overlap and draws others for every number of them.
    height, width = image.shape[:2]
    side = max(1, round(min(height, width) / _BLOCKS))
    columns = -(-width // side)
    count = -(-height // side) * columns
    out = image.copy()
    for block in np.random.default_rng(seed).permutation(count)[: round(count * percent / 100)]:
        top, left = side * (block // columns), side * (block % columns)
        out[top : top + side, left : left + side] = 128
    return out


def _video(image: np.ndarray, crf: float, seed: int) -> np.ndarray:
    height, width = image.shape[:2]
    # 4:2:0 needs even sides.
    even = np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as clip:
        # One thread: the coder's decisions must not depend on how many cores a machine has.
        stream = clip.add_stream("libx264", rate=25, options={"crf": f"{crf:g}", "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = *even.shape[:2], "yuv420p"
        for _ in range(_CLIP):
            clip.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
        clip.mux(stream.encode())
    buffer.seek(0)
    with av.open(buffer, "r") as written:
        frames = [frame.to_ndarray(format="rgb24") for frame in written.decode(video=0)]
    return np.ascontiguousarray(frames[_TAKEN][:height, :width])


#: All corruptions by name. Their names and values are what published numbers refer to: changing one makes another test.
CORRUPTIONS: Mapping[str, Corruption] = MappingProxyType(
    {
        "jpeg": Corruption("JPEG coding", "quality", (90, 75, 60, 45, 30), _jpeg),
        "video": Corruption("H.264 coding of a still clip", "CRF", (23, 28, 32, 36, 40), _video),
        "resize": Corruption(
            "made smaller, then enlarged again", "shorter side in pixels", (160, 112, 80, 56, 40), _resize
        ),
        "gaussian_blur": Corruption("Gaussian blur", "σ in pixels at 224", (1, 1.5, 2, 3, 4), _gaussian_blur),
        "gaussian_noise": Corruption(
            "independent Gaussian noise", "σ in grey levels of 255", (5, 10, 20, 30, 45), _gaussian_noise
        ),
        "blockwise": Corruption(
            "blocks of 1/28 of the shorter side turned grey", "% of the blocks", (2.5, 5, 10, 15, 20), _blockwise
        ),
        "brightness": Corruption("made lighter or darker, by the seed", "± %", (10, 20, 30, 40, 50), _brightness),
        "contrast": Corruption("less contrast, around the mean grey", "% left", (85, 70, 55, 40, 25), _contrast),
        "saturation": Corruption("paler, down to grey", "% left", (80, 60, 40, 20, 0), _saturation),
    }
)
