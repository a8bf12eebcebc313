"""Self-blended images as published (Shiohara and Yamasaki, CVPR 2022): forged training pictures of real faces alone.

A face is blended with a slightly changed version of itself, so that a detector has nothing to learn but the traces of
blending. The values are those of the paper and of its code; what they mean in pixels is taken at the size of the crop,
as there. Two things differ: the published code draws the forehead's outline from 81 landmarks, here it is extended from
the eyebrows of 68, and colours are rounded where an 8-bit image library cuts off.

:func:`fsvfm.faces.blend.self_blend` makes forgeries of any strength in a like manner, for the demo.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

from fsvfm.errors import ConfigError
from fsvfm.faces.blend import check_face, face_mask, to_bytes

#: Hull, and how often it includes the forehead; see :func:`mask_of`.
KINDS = ("features", "extended", "components", "hull")
FOREHEAD = 0.75

RATIOS = (0.25, 0.5, 0.75, 1.0, 1.0, 1.0)  # opacity of the blend, one of them
RGB, RGB_CHANCE = 20.0, 0.3  # shift of each channel, in 8-bit levels
HUE, SATURATION = 0.3, 0.3  # shifts in steps of 2 degrees, and (of the value too) in 8-bit levels
LIGHT = 0.1  # relative change of contrast, and shift of brightness in shares of 255
SHRINK = (2, 4)  # one of them: shrunk by so much, and enlarged again …
SHARPEN, LIGHTNESS = (0.2, 0.5), (0.5, 1.0)  # … or, with equal chances, sharpened
SHIFT_X, SHIFT_Y, SCALE = 0.03, 0.015, 0.95  # of the pasted face: shares of width and height; scale to 1 / SCALE
ELASTIC, SMOOTH = 50.0, 7.0  # deformation of the mask: amplitude and standard deviation, in pixels
#: The mask is blurred at a random size of so many pixels on a side, with odd kernels between these sides, the second
#: time with a standard deviation between these.
MASK_SIDE, KERNEL, SIGMA = (192, 256), (5, 25), (5, 45)

#: Of :func:`disturb`: chance and size of each change of both pictures of a pair.
BOTH_CHANCE, BOTH_LIGHT, JPEG_CHANCE, JPEG_QUALITY = 0.3, 0.3, 0.5, (40, 100)

#: Convex hulls of landmarks that a mask is the union of. Its parts meet at the chin (8).
_PARTS = {
    "features": (
        (*range(17), *range(48, 68)),
        (*range(27, 31), 33),
        (*range(17, 27), 0, 27, 16, 33),
    ),
    "components": (
        (*range(9), 17),
        (*range(8, 17), 26),
        (*range(17, 20), 8),
        (*range(24, 27), 8),
        (*range(19, 25), 8),
        (*range(17, 22), 27, *range(31, 36), 8),
        (*range(22, 27), 27, *range(31, 36), 8),
        (*range(27, 36),),
    ),
}


class Pair(NamedTuple):
    """A real face and its self-blend, (H, W, 3) uint8 RGB, and the blend's opacity (H, W) float32 in [0, 1].

    The real one is the photograph, or a version of it with other colours and sharpness. Where the mask is 0 the two
    are the same.
    """

    real: np.ndarray
    fake: np.ndarray
    mask: np.ndarray


def self_blended_pair(image: np.ndarray, landmarks: np.ndarray, rng: np.random.Generator) -> Pair:
    """Blend a face with itself (SBI, sec. 3.2 and algorithm 1).

    Args:
        image: (H, W, 3) uint8 RGB.
        landmarks: (68, 2) dlib landmarks, x and y in pixels of the image.
        rng: source of everything random.

    Raises:
        DataError: not such an image or landmarks, or a face outside the picture.
    """
    check_face(image, landmarks, "image")
    height, width = image.shape[:2]
    mask = mask_of(landmarks, height, width, str(rng.choice(KINDS)), forehead=rng.random() < FOREHEAD)
    # Which of the two is changed must not say which is forged.
    changed = transform(image, rng)
    real, source = (image, changed) if rng.random() < 0.5 else (changed, image)
    moved, mask = _move(source, mask, rng)
    mask = soften(_deform(mask, rng), rng) * np.float32(rng.choice(RATIOS))
    background = real.astype(np.float32)
    fake = background + mask[..., None] * (moved.astype(np.float32) - background)
    return Pair(real, to_bytes(fake), mask)


def mask_of(landmarks: np.ndarray, height: int, width: int, kind: str, *, forehead: bool = False) -> np.ndarray:
    """One of the four masks.

    Args:
        landmarks: (68, 2) in pixels.
        height: of the picture.
        width: of the picture.
        kind: `features` (jaw with mouth, eyes with eyebrows, nose), `components` (cheeks, nose, eyes with eyebrows),
            `extended` (the same, the eyebrows raised by half their distance to the eyes), `hull` (all landmarks).
        forehead: `hull` reaches over the forehead.

    Returns:
        (height, width) float32, 0 or 1.

    Raises:
        ConfigError: an unknown kind.
        DataError: no pixel of it lies inside the picture.
    """
    if kind == "hull":
        return face_mask(landmarks, height, width, "forehead" if forehead else "hull")
    if kind not in KINDS:
        raise ConfigError(f"unknown mask {kind!r}; expected one of {', '.join(KINDS)}")
    points = _raised(landmarks) if kind == "extended" else landmarks
    mask = face_mask(landmarks, height, width)  # tells faces outside the picture
    mask[:] = 0
    for part in _PARTS["components" if kind == "extended" else kind]:
        cv2.fillConvexPoly(mask, cv2.convexHull(np.rint(points[list(part)]).astype(np.int32)), 1.0)
    return mask


def _raised(landmarks: np.ndarray) -> np.ndarray:
    """Landmarks with the eyebrows raised by half their distance to the upper lids."""
    points = np.array(landmarks, np.float64)
    corners = []
    for side, corner in ((0, 36), (16, 45)):  # a quarter of the way from the eye's outer corner to the jaw
        corners.append(points[corner] + (points[side] - points[corner]) / 4)
    lids = np.stack([corners[0], *points[36:40]]), np.stack([*points[42:46], corners[1]])
    for brows, lid in ((slice(17, 22), lids[0]), (slice(22, 27), lids[1])):
        points[brows] += (points[brows] - lid) / 2
    return points


def transform(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Other colours, and another sharpness: shrunk and enlarged, or sharpened; (H, W, 3) uint8."""
    image = _colours(image, rng, rgb=RGB_CHANCE, hsv=1.0, light=1.0, amount=LIGHT)
    if rng.random() < 0.5:
        height, width = image.shape[:2]
        factor = int(rng.choice(SHRINK))
        small = cv2.resize(image, (max(1, width // factor), max(1, height // factor)), interpolation=cv2.INTER_NEAREST)
        return cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)
    alpha, lightness = rng.uniform(*SHARPEN), rng.uniform(*LIGHTNESS)
    kernel = np.full((3, 3), -alpha, np.float32)
    kernel[1, 1] = 1 - alpha + alpha * (8 + lightness)
    return to_bytes(cv2.filter2D(image.astype(np.float32), -1, kernel, borderType=cv2.BORDER_REFLECT_101))


def disturb(pictures: tuple[np.ndarray, ...], rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """The same change of colours, and JPEG compression, of both pictures of a pair: no clue to which is forged."""
    seed = int(rng.integers(2**32))
    quality = int(rng.integers(JPEG_QUALITY[0], JPEG_QUALITY[1] + 1)) if rng.random() < JPEG_CHANCE else None
    changed = []
    for picture in pictures:
        again = np.random.default_rng(seed)
        chances = {"rgb": BOTH_CHANCE, "hsv": BOTH_CHANCE, "light": BOTH_CHANCE}
        picture = _colours(picture, again, **chances, amount=BOTH_LIGHT)
        if quality is not None:
            coded = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
            picture = np.asarray(cv2.imdecode(coded, cv2.IMREAD_COLOR))[..., ::-1]
        changed.append(np.ascontiguousarray(picture))
    return tuple(changed)


def _colours(
    image: np.ndarray, rng: np.random.Generator, *, rgb: float, hsv: float, light: float, amount: float
) -> np.ndarray:
    """Shift channels, hue with saturation and value, contrast with brightness; each with its chance."""
    if rng.random() < rgb:
        image = to_bytes(image.astype(np.float32) + rng.uniform(-RGB, RGB, 3))
    if rng.random() < hsv:
        values = cv2.cvtColor(image, cv2.COLOR_RGB2HSV).astype(np.float32)
        values[..., 0] = (values[..., 0] + rng.uniform(-HUE, HUE)) % 180
        values[..., 1:] += rng.uniform(-SATURATION, SATURATION, 2)
        values[..., 0] = np.rint(values[..., 0]) % 180  # rounding up to 180 is red again
        image = cv2.cvtColor(to_bytes(values), cv2.COLOR_HSV2RGB)
    if rng.random() < light:
        contrast, brightness = rng.uniform(-amount, amount, 2)
        image = to_bytes(image.astype(np.float32) * (1 + contrast) + 255 * brightness)
    return image


def _move(image: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Shift and scale a face with its mask, around the middle of the picture."""
    height, width = mask.shape
    scale = rng.uniform(SCALE, 1 / SCALE)
    x, y = rng.uniform(-SHIFT_X, SHIFT_X) * width, rng.uniform(-SHIFT_Y, SHIFT_Y) * height
    centre = np.array([width - 1, height - 1]) / 2
    matrix = np.column_stack([scale * np.eye(2), (1 - scale) * centre + (x, y)])
    return (
        cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT),
        cv2.warpAffine(mask, matrix, (width, height), flags=cv2.INTER_NEAREST),
    )


def _deform(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Bend the outline by smoothed noise (elastic deformation)."""
    height, width = mask.shape
    noise = rng.uniform(-1, 1, (2, height, width)).astype(np.float32)
    dx, dy = (ELASTIC * cv2.GaussianBlur(part, (0, 0), SMOOTH, borderType=cv2.BORDER_REFLECT) for part in noise)
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    return cv2.remap(mask, x + dx, y + dy, cv2.INTER_NEAREST)


def soften(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shrink a mask a little and blur it (SBI, mask generation): (H, W) float32 from 0 to 1.

    After a first blur only what is whole stays, which takes off a random rim; a second blur makes the soft edge.
    """
    height, width = mask.shape
    size = (int(rng.integers(MASK_SIDE[0], MASK_SIDE[1] + 1)), int(rng.integers(MASK_SIDE[0], MASK_SIDE[1] + 1)))
    first, second = (2 * int(rng.integers(KERNEL[0] // 2, KERNEL[1] // 2 + 1)) + 1 for _ in range(2))
    sigma = float(rng.integers(SIGMA[0], SIGMA[1] + 1))
    small = cv2.resize(mask, size)
    eroded = cv2.GaussianBlur(small, (first, first), 0)
    eroded = (eroded >= eroded.max() * (1 - 1e-6)).astype(np.float32) if eroded.any() else eroded
    soft = cv2.GaussianBlur(eroded, (second, second), sigma)
    soft = soft / soft.max() if soft.any() else soft
    found: np.ndarray = np.clip(cv2.resize(soft, (width, height)), 0, 1)
    return found
