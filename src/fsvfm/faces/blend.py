"""Forgeries made from real faces alone: self-blends of any strength and landmark-based face swaps.

They are the forged class of the demo, made strong. As a training augmentation that shows blending traces instead of
one generator's fingerprint, self-blended images are in :mod:`fsvfm.faces.self_blending`, as published.

How far a forgery goes is a :class:`Strength`, everything random comes from one `numpy.random.Generator`, and lengths
are fractions of the picture's shorter side, so that a crop of any size is treated alike.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import cv2
import numpy as np
from scipy.spatial import Delaunay, QhullError

from fsvfm.errors import ConfigError, DataError
from fsvfm.faces.align import similarity

Range = tuple[float, float]

#: Parts of the face that a mask may cover; see :func:`face_mask`.
MASKS = ("hull", "forehead", "inner", "lower")

_INNER = np.r_[17:68]
_LOWER = np.r_[2:15, 29:36, 48:68]
_EYES = np.r_[36:48]
_BROWS = np.r_[17:27]


class Forgery(NamedTuple):
    """A forged picture and how much of each pixel is not the original.

    `image`: (H, W, 3) uint8 RGB. `mask`: (H, W) float32 in 0–1; where it is 0 the original is untouched, bit by bit.
    """

    image: np.ndarray
    mask: np.ndarray


@dataclass(frozen=True)
class Strength:
    """Ranges (low, high) from which one forgery's values are drawn, uniformly; signs are drawn besides.

    Attributes:
        colour_chance: probability of each of the three colour changes (RGB, HSV, brightness with contrast).
        frequency_chance: probability that sharpness is changed.
        rgb: shift of each channel, in 8-bit levels.
        hue: shift of the hue, in degrees.
        saturation: shift of the saturation and of the value, in 8-bit levels.
        brightness: shift, relative to 255.
        contrast: relative change of the spread around the mean.
        blur: standard deviation of a Gaussian blur, relative to the shorter side.
        resample: factor by which the face is shrunk and enlarged again.
        sharpen: weight of an unsharp mask.
        move: length of the shift of the pasted face, relative to the shorter side.
        scale: relative change of its size.
        deform: typical displacement of the mask's outline, relative to the shorter side.
        feather: standard deviation of the blur of the mask, relative to the shorter side.
        ratio: opacity of the pasted face.
        recolour: how far a swapped face takes the colours of the face that it replaces (1: its mean and spread).
        sharpness: which of `blur`, `resample`, `sharpen` may be drawn, with equal chances.
        parts: which of :data:`MASKS` may be drawn for a self-blend, with equal chances.
    """

    colour_chance: float
    frequency_chance: float
    rgb: Range
    hue: Range
    saturation: Range
    brightness: Range
    contrast: Range
    blur: Range
    resample: Range
    sharpen: Range
    move: Range
    scale: Range
    deform: Range
    feather: Range
    ratio: Range
    recolour: Range
    sharpness: tuple[str, ...]
    parts: tuple[str, ...]


#: Hardly visible: of the size that the self-blended-images paper has (the paper's own way: `faces.self_blending`).
SUBTLE = Strength(
    colour_chance=0.3,
    frequency_chance=1.0,
    rgb=(0, 20),
    hue=(0, 0.6),
    saturation=(0, 0.3),
    brightness=(0, 0.1),
    contrast=(0, 0.1),
    blur=(0, 0.004),
    resample=(2, 4),
    sharpen=(0.2, 0.5),
    move=(0, 0.03),
    scale=(0, 0.05),
    deform=(0, 0.02),
    feather=(0.01, 0.04),
    ratio=(0.25, 1),
    recolour=(1, 1),
    sharpness=("resample", "sharpen"),
    parts=MASKS,
)

#: So visible that a network of a million weights learns it within minutes from a few hundred faces.
STRONG = Strength(
    colour_chance=1.0,
    frequency_chance=1.0,
    rgb=(14, 30),
    hue=(0, 2),
    saturation=(0, 6),
    brightness=(0, 0.03),
    contrast=(0, 0.1),
    blur=(0.011, 0.022),
    resample=(4, 7),
    sharpen=(0.5, 1.0),
    move=(0.03, 0.045),
    scale=(0, 0.05),
    deform=(0, 0.015),
    feather=(0.005, 0.012),
    ratio=(0.95, 1),
    recolour=(0.6, 1),
    sharpness=("blur", "resample"),
    parts=("hull", "forehead", "inner"),
)


def as_strength(value: float | str | Strength) -> Strength:
    """A strength by name (`subtle`, `strong`), or between the two by a number from 0 (subtle) to 1 (strong).

    Raises:
        ConfigError: another name, or a number outside 0–1.
    """
    if isinstance(value, Strength):
        return value
    named = {"subtle": SUBTLE, "strong": STRONG}
    if isinstance(value, str):
        if value not in named:
            raise ConfigError(f"unknown strength {value!r}; expected subtle, strong or a number from 0 to 1")
        return named[value]
    if not 0 <= value <= 1:
        raise ConfigError(f"strength {value} is outside 0 (subtle) to 1 (strong)")
    between: dict[str, Any] = {}
    for field in fields(Strength):
        low, high = getattr(SUBTLE, field.name), getattr(STRONG, field.name)
        if isinstance(low, tuple) and isinstance(low[0], str):
            between[field.name] = low if value < 0.5 else high
        else:
            mixed = np.asarray(low) * (1 - value) + np.asarray(high) * value
            between[field.name] = float(mixed) if mixed.ndim == 0 else tuple(mixed.tolist())
    return Strength(**between)


def self_blend(
    image: np.ndarray,
    landmarks: np.ndarray,
    rng: np.random.Generator,
    strength: float | str | Strength = "subtle",
) -> Forgery:
    """Blend a face with a changed version of itself, in the manner of self-blended images (CVPR 2022, sec. 3.2).

    The copy gets other colours and another sharpness, is moved and scaled a little, and is pasted back through a mask
    over a random part of the face, whose outline is deformed and softened. The paper changes the copy or the picture
    around it; here it is always the copy, so that what lies outside the mask stays the photograph.

    Args:
        image: (H, W, 3) uint8 RGB.
        landmarks: (68, 2) dlib landmarks, x and y in pixels of `image`.
        rng: source of everything random; the same state gives the same forgery.
        strength: `subtle`, `strong`, 0–1 between them, or own ranges.

    Raises:
        ConfigError: an unknown strength.
        DataError: not such an image or landmarks, or a face outside the picture.
    """
    strength = as_strength(strength)
    check_face(image, landmarks, "image")
    height, width = image.shape[:2]
    mask = _soften(face_mask(landmarks, height, width, str(rng.choice(strength.parts))), rng, strength)
    copy = _change_frequency(_change_colour(image, rng, strength), rng, strength)
    copy = _move(copy, landmarks, rng, strength)
    return _paste(image, copy, mask * np.float32(rng.uniform(*strength.ratio)))


def face_swap(
    target: np.ndarray,
    target_landmarks: np.ndarray,
    source: np.ndarray,
    source_landmarks: np.ndarray,
    rng: np.random.Generator,
    strength: float | str | Strength = "subtle",
) -> Forgery:
    """Put the face of `source` over the face of `target`.

    The source face is warped onto the target's landmarks (triangle by triangle over all landmarks, or, with equal
    chance, by one similarity transform over the inner face), takes over the target's colour statistics (Lab), changes
    its sharpness as `strength` says and is blended by Poisson editing, or by its softened mask alone where that fails.

    Args:
        target: (H, W, 3) uint8 RGB.
        target_landmarks: (68, 2) dlib landmarks in pixels of `target`.
        source: (H', W', 3) uint8 RGB.
        source_landmarks: (68, 2) dlib landmarks in pixels of `source`.
        rng: source of everything random.
        strength: as for :func:`self_blend`.

    Raises:
        ConfigError: an unknown strength.
        DataError: not such images or landmarks, or a face outside its picture.
    """
    strength = as_strength(strength)
    check_face(target, target_landmarks, "target")
    check_face(source, source_landmarks, "source")
    height, width = target.shape[:2]
    if rng.random() < 0.5:
        face = _warp_piecewise(source, source_landmarks, target_landmarks, height, width)
        region = face_mask(target_landmarks, height, width, "hull")
    else:
        matrix = similarity(source_landmarks[_INNER], target_landmarks[_INNER])
        face = cv2.warpAffine(source, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
        region = face_mask(target_landmarks, height, width, "inner")
    face = take_colours(face, target, region > 0, float(rng.uniform(*strength.recolour)))
    face = _change_frequency(face, rng, strength)
    cloned = poisson(face, target, region)
    return _paste(target, face if cloned is None else cloned, _soften(region, rng, strength))


def face_mask(landmarks: np.ndarray, height: int, width: int, part: str = "hull") -> np.ndarray:
    """Convex mask over a part of the face.

    Args:
        landmarks: (68, 2) dlib landmarks in pixels.
        height: of the picture.
        width: of the picture.
        part: `hull` (all landmarks), `forehead` (hull extended above the eyebrows), `inner` (eyebrows to mouth),
            `lower` (nose, mouth and jaw).

    Returns:
        (height, width) float32, 0 or 1.

    Raises:
        ConfigError: an unknown part.
        DataError: no pixel of that part lies inside the picture.
    """
    if part == "hull":
        points = landmarks
    elif part == "forehead":
        # The landmarks end at the eyebrows; a forehead rises about twice as far above them as they are above the eyes.
        up = landmarks[_BROWS].mean(axis=0) - landmarks[_EYES].mean(axis=0)
        points = np.concatenate([landmarks, landmarks[_BROWS] + 1.2 * up])
    elif part == "inner":
        points = landmarks[_INNER]
    elif part == "lower":
        points = landmarks[_LOWER]
    else:
        raise ConfigError(f"unknown part of the face {part!r}; expected one of {', '.join(MASKS)}")
    mask = np.zeros((height, width), np.float32)
    cv2.fillConvexPoly(mask, cv2.convexHull(np.rint(points).astype(np.int32)), 1.0)
    if not mask.any():
        raise DataError(f"the face ({part}) lies outside the {height}×{width} picture; are these its landmarks?")
    return mask


def check_face(image: np.ndarray, landmarks: np.ndarray, name: str) -> None:
    """Raise DataError unless these are a picture (H, W, 3) uint8 and its 68 landmarks (68, 2)."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise DataError(f"{name} must be (H, W, 3) uint8 RGB, got {image.dtype} {image.shape}")
    if np.shape(landmarks) != (68, 2) or not np.isfinite(landmarks).all():
        raise DataError(f"the landmarks of {name} must be 68 finite points (68, 2), got shape {np.shape(landmarks)}")
    if np.ptp(landmarks, axis=0).max() < 1:
        raise DataError(f"the landmarks of {name} all coincide; they are not those of a face")


def _signed(rng: np.random.Generator, bounds: Range, size: int | None = None) -> Any:
    return rng.uniform(*bounds, size) * rng.choice([-1.0, 1.0], size)


def to_bytes(values: np.ndarray) -> np.ndarray:
    """Rounded and clipped to 0–255, as uint8."""
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _paste(target: np.ndarray, face: np.ndarray, mask: np.ndarray) -> Forgery:
    background = target.astype(np.float32)
    mixed = background + mask[..., None] * (face.astype(np.float32) - background)
    return Forgery(to_bytes(mixed), mask)


def _change_colour(image: np.ndarray, rng: np.random.Generator, strength: Strength) -> np.ndarray:
    values = image.astype(np.float32)
    if rng.random() < strength.colour_chance:
        values += _signed(rng, strength.rgb, 3)
    if rng.random() < strength.colour_chance:
        hsv = cv2.cvtColor(to_bytes(values), cv2.COLOR_RGB2HSV).astype(np.float32)
        hsv[..., 0] = (hsv[..., 0] + _signed(rng, strength.hue) / 2) % 180  # OpenCV counts hue in steps of 2°
        hsv[..., 1:] = np.clip(hsv[..., 1:] + _signed(rng, strength.saturation, 2), 0, 255)
        values = cv2.cvtColor(hsv.astype(np.uint8), cv2.COLOR_HSV2RGB).astype(np.float32)
    if rng.random() < strength.colour_chance:
        mean = values.mean()
        values = (values - mean) * (1 + _signed(rng, strength.contrast)) + mean
        values += 255 * _signed(rng, strength.brightness)
    return to_bytes(values)


def _change_frequency(image: np.ndarray, rng: np.random.Generator, strength: Strength) -> np.ndarray:
    if rng.random() >= strength.frequency_chance:
        return image
    height, width = image.shape[:2]
    kind = rng.choice(strength.sharpness)
    if kind == "resample":
        factor = rng.uniform(*strength.resample)
        small = (max(1, round(width / factor)), max(1, round(height / factor)))
        down = cv2.resize(image, small, interpolation=int(rng.choice([cv2.INTER_AREA, cv2.INTER_LINEAR])))
        return cv2.resize(down, (width, height), interpolation=int(rng.choice([cv2.INTER_LINEAR, cv2.INTER_CUBIC])))
    if kind == "blur":
        return _blur(image, rng.uniform(*strength.blur) * min(height, width))
    detail = image.astype(np.float32) - _blur(image, 1.0)
    return to_bytes(image + 4 * rng.uniform(*strength.sharpen) * detail)


def _blur(image: np.ndarray, sigma: float) -> np.ndarray:
    return cv2.GaussianBlur(image, (0, 0), sigma, borderType=cv2.BORDER_REFLECT) if sigma > 0.1 else image


def _move(image: np.ndarray, landmarks: np.ndarray, rng: np.random.Generator, strength: Strength) -> np.ndarray:
    height, width = image.shape[:2]
    length, angle = rng.uniform(*strength.move) * min(height, width), rng.uniform(0, 2 * np.pi)
    scale = 1 + _signed(rng, strength.scale)
    centre = landmarks.mean(axis=0)
    shift = np.array([np.cos(angle), np.sin(angle)]) * length + (1 - scale) * centre
    matrix = np.array([[scale, 0, shift[0]], [0, scale, shift[1]]])
    return cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)


def _soften(mask: np.ndarray, rng: np.random.Generator, strength: Strength) -> np.ndarray:
    """Bend the outline smoothly, then blur it; values below one 8-bit level become 0, so that the support is finite."""
    height, width = mask.shape
    side = min(height, width)
    coarse = rng.standard_normal((7, 7, 2)).astype(np.float32) * np.float32(rng.uniform(*strength.deform) * side)
    bend = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    bent = cv2.remap(mask, x + bend[..., 0], y + bend[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
    soft = np.clip(_blur(bent, rng.uniform(*strength.feather) * side), 0, 1)
    soft[soft < 1 / 255] = 0
    return soft


def _warp_piecewise(
    source: np.ndarray, source_landmarks: np.ndarray, target_landmarks: np.ndarray, height: int, width: int
) -> np.ndarray:
    """Map every triangle between target landmarks to the same triangle of the source; outside, continue smoothly."""
    # Four far corners, carried along by the similarity of the faces, make the map defined on the whole picture.
    back = similarity(target_landmarks, source_landmarks)
    corners = np.array([[-width, -height], [2 * width, -height], [-width, 2 * height], [2 * width, 2 * height]], float)
    # The inner lips are left out: from a closed mouth into an open one they would tear.
    here = np.concatenate([target_landmarks[:60].astype(np.float64), corners])
    there = np.concatenate([source_landmarks[:60].astype(np.float64), corners @ back[:, :2].T + back[:, 2]])
    try:
        mesh = Delaunay(here)
    except QhullError as error:
        raise DataError("the target's landmarks lie on one line; they are not those of a face") from error
    x, y = np.meshgrid(np.arange(width, dtype=np.float64), np.arange(height, dtype=np.float64))
    pixels = np.column_stack([x.ravel(), y.ravel()])
    triangle = mesh.find_simplex(pixels)
    to_weights = mesh.transform[triangle]
    first_two = np.einsum("nij,nj->ni", to_weights[:, :2], pixels - to_weights[:, 2])
    weights = np.column_stack([first_two, 1 - first_two.sum(axis=1)])
    places = np.einsum("nk,nkd->nd", weights, there[mesh.simplices[triangle]]).astype(np.float32)
    places = places.reshape(height, width, 2)
    return cv2.remap(source, places[..., 0], places[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)


def take_colours(face: np.ndarray, target: np.ndarray, where: np.ndarray, amount: float) -> np.ndarray:
    """Give `face` the Lab mean and spread of `target` inside `where` (Reinhard et al. 2001), to the degree `amount`."""
    lab = cv2.cvtColor(face.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    wanted = cv2.cvtColor(target.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)[where]
    have = lab[where]
    # A nearly uniform face must not have its noise blown up.
    gain = np.clip(wanted.std(axis=0) / np.maximum(have.std(axis=0), 1e-3), 0.5, 2.0)
    moved = (lab - have.mean(axis=0)) * gain + wanted.mean(axis=0)
    mixed = (lab + amount * (moved - lab)).astype(np.float32)
    return to_bytes(255 * cv2.cvtColor(mixed, cv2.COLOR_LAB2RGB))


def poisson(face: np.ndarray, target: np.ndarray, region: np.ndarray) -> np.ndarray | None:
    """Gradient-domain cloning (Pérez et al. 2003) of `face` into `target`; None where OpenCV cannot do it."""
    pad = 8  # seamlessClone needs a rim of known pixels around the region
    wide_face, wide_target = (
        cv2.copyMakeBorder(picture, pad, pad, pad, pad, cv2.BORDER_REFLECT) for picture in (face, target)
    )
    mask = cv2.copyMakeBorder((region > 0).astype(np.uint8) * 255, pad, pad, pad, pad, cv2.BORDER_CONSTANT, value=0)
    left, top, width, height = cv2.boundingRect(mask)
    centre = (left + width // 2, top + height // 2)
    try:
        cloned = cv2.seamlessClone(wide_face, wide_target, mask, centre, cv2.NORMAL_CLONE)
    except cv2.error:
        return None
    return cloned[pad:-pad, pad:-pad]
