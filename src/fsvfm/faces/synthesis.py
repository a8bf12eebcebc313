"""Forgeries by a chosen configuration: which part of the face, blended how, how opaque (SLADD, CVPR 2022, sec. 3.2).

A part of a reference face is cut out by its landmarks, the cut is deformed and softened, the reference is turned,
scaled and shifted onto the picture's face and takes over its colours, and the part is blended in. Region, blending and
ratio are the caller's choice (a policy's, in SLADD); everything else is drawn from one `numpy.random.Generator`.
Lengths are in pixels of a picture of side 256 and scale with it.
"""

from __future__ import annotations

import cv2
import numpy as np

from fsvfm.errors import ConfigError, DataError
from fsvfm.faces.align import similarity
from fsvfm.faces.blend import Forgery, poisson, take_colours

#: Parts of the face: landmarks that a part holds, and the two points (means of landmarks) between which it extends.
_PARTS: dict[str, tuple[list[int], list[int], list[int]]] = {
    "left_eye": ([*range(36, 42)], [36], [39]),
    "right_eye": ([*range(42, 48)], [42], [45]),
    "eyes": ([*range(36, 48)], [36, 39], [42, 45]),
    "nose": ([*range(27, 36)], [33], [36, 39, 42, 45]),
    "mouth": ([*range(48, 68)], [48], [54]),
}

#: How far a part reaches around the line between its points: a share of that line's length, or, for the nose, of the
#: distance between the eyes.
_REACH = {"left_eye": 1.0, "right_eye": 1.0, "eyes": 0.25, "nose": 0.25, "mouth": 1 / 3}

#: The regions that can be forged, in the order of the policy's output. Left and right are those of the picture.
REGIONS: tuple[tuple[str, ...], ...] = (
    ("left_eye",),
    ("right_eye",),
    ("eyes",),
    ("nose",),
    ("mouth",),
    ("nose", "left_eye"),
    ("nose", "right_eye"),
    ("nose", "eyes"),
    ("nose", "mouth"),
    ("eyes", "nose", "mouth"),
)

#: Ways of blending, in the order of the policy's output; `none` leaves the picture as it is.
BLENDINGS = ("alpha", "poisson", "mixup", "none")

#: Ways in which the reference takes over the picture's colours, drawn with equal chances.
COLOURS = ("region", "picture", "mean", "local")

#: Standard deviation of the grid points' displacement and of the mask's blur, in pixels at side 256.
DEFORM, BLUR = 10.0, 3.0

_GRID = 5
_SMALLEST = 0.005  # share of the picture below which nothing is pasted
_STABLE = np.r_[17:68]  # all but the jaw, which says more about the outline than about the place of the parts


def landmarks_of(region: int) -> list[int]:
    """Numbers of the landmarks that a region of :data:`REGIONS` holds."""
    return sorted({point for part in REGIONS[region] for point in _PARTS[part][0]})


def region_mask(landmarks: np.ndarray, height: int, width: int, region: int) -> np.ndarray:
    """Mask of a region of the face: thick lines along its parts, which hold all of their landmarks.

    Args:
        landmarks: (68, 2) dlib landmarks, x and y in pixels.
        height: of the picture.
        width: of the picture.
        region: place in :data:`REGIONS`.

    Returns:
        (height, width) float32, 0 or 1.

    Raises:
        ConfigError: no such region.
    """
    if not 0 <= region < len(REGIONS):
        raise ConfigError(f"forgery region {region} does not exist; expected 0 to {len(REGIONS) - 1}")
    points = np.asarray(landmarks, np.float64)
    eyes = np.linalg.norm(points[[36, 39]].mean(axis=0) - points[[42, 45]].mean(axis=0))
    mask = np.zeros((height, width), np.uint8)
    for part in REGIONS[region]:
        held, start, end = _PARTS[part]
        ends = points[start].mean(axis=0), points[end].mean(axis=0)
        length = eyes if part == "nose" else np.linalg.norm(ends[1] - ends[0])
        thickness = max(1, round(2 * _REACH[part] * float(length)))
        first, last = (np.rint(end).astype(int).tolist() for end in ends)
        cv2.line(mask, first, last, 1, thickness)
        cv2.fillConvexPoly(mask, cv2.convexHull(np.rint(points[held]).astype(np.int32)), 1)
    return mask.astype(np.float32)


def deform(mask: np.ndarray, rng: np.random.Generator, sigma: float) -> np.ndarray:
    """Bend a mask: the points of a 5×5 grid shift at random, what lies between them follows, piecewise affine.

    Args:
        mask: (H, W) float32.
        rng: source of the shifts.
        sigma: their standard deviation in pixels, in x and in y.

    Returns:
        (H, W) float32; with `sigma` 0 the mask itself.
    """
    height, width = mask.shape
    shifts = (sigma * rng.standard_normal((_GRID, _GRID, 2))).astype(np.float32)
    if not shifts.any():
        return mask.copy()
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    column, row = x * ((_GRID - 1) / (width - 1)), y * ((_GRID - 1) / (height - 1))
    left, top = np.minimum(column.astype(int), _GRID - 2), np.minimum(row.astype(int), _GRID - 2)
    u, v = ((part - part0).astype(np.float32)[..., None] for part, part0 in ((column, left), (row, top)))
    # Every cell of the grid is two triangles; within each, the shift is the affine function of its three corners.
    near, far = shifts[top, left], shifts[top + 1, left + 1]
    right, below = shifts[top, left + 1], shifts[top + 1, left]
    upper = near + u * (right - near) + v * (below - near)
    lower = far + (1 - u) * (below - far) + (1 - v) * (right - far)
    shift = np.where(u + v < 1, upper, lower)
    return cv2.remap(mask, x + shift[..., 0], y + shift[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)


def synthesise(
    image: np.ndarray,
    landmarks: np.ndarray,
    reference: np.ndarray,
    reference_landmarks: np.ndarray,
    rng: np.random.Generator,
    *,
    region: int,
    blending: str,
    ratio: float = 1.0,
    sigma: float = DEFORM,
) -> Forgery:
    """Blend a region of a reference face into a picture.

    Args:
        image: (S, S, 3) uint8 RGB.
        landmarks: (68, 2) of it, in pixels.
        reference: (S, S, 3) uint8 RGB.
        reference_landmarks: (68, 2) of it, in pixels.
        rng: source of deformation, colour transfer and feathering.
        region: place in :data:`REGIONS`.
        blending: one of :data:`BLENDINGS`. `alpha` fades in from the region's edge, over up to a fifth of its longer
            side; `poisson` clones gradients; `mixup` mixes by `ratio`; `none` returns the picture as it is.
        ratio: opacity of the reference under `mixup`, 0–1; not used otherwise.
        sigma: see :func:`deform`, in pixels at side 256.

    Returns:
        The forgery, and the region as it was pasted (whatever its opacity). Where the region lies outside the picture,
        or is nearly nothing, the picture itself with an empty mask.

    Raises:
        ConfigError: no such region or blending.
        DataError: pictures of different sizes.
    """
    if blending not in BLENDINGS:
        raise ConfigError(f"blending={blending!r} does not exist; choose one of {', '.join(BLENDINGS)}")
    if image.shape != reference.shape:
        raise DataError(f"picture and reference have different sizes, {image.shape} and {reference.shape}")
    height, width = image.shape[:2]
    untouched = Forgery(image, np.zeros((height, width), np.float32))
    if blending == "none":
        return untouched
    unit = min(height, width) / 256
    cut = region_mask(reference_landmarks, height, width, region)
    # Deformed inwards only: the region never reaches beyond its part of the face.
    cut = np.minimum(deform(cut, rng, sigma * unit), cut)
    cut = cv2.GaussianBlur(cut, (0, 0), BLUR * unit)
    matrix = similarity(np.asarray(reference_landmarks)[_STABLE], np.asarray(landmarks)[_STABLE])
    size = (width, height)
    mask = np.clip(cv2.warpAffine(cut, matrix, size, flags=cv2.INTER_LINEAR), 0, 1)
    face = cv2.warpAffine(reference, matrix, size, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
    mask[mask < 1 / 255] = 0
    where = mask > 0.5
    if where.mean() < _SMALLEST:
        return untouched
    face = _take_colours(face, image, where, np.asarray(landmarks), str(rng.choice(COLOURS)))
    opacity = mask
    if blending == "alpha":
        opacity = mask * _feathered(where, rng.uniform(0, 0.2))
    elif blending == "mixup":
        opacity = mask * np.float32(np.clip(ratio, 0, 1))
    elif (cloned := poisson(face, image, where)) is not None:
        face, opacity = cloned, where.astype(np.float32)  # OpenCV changes a few pixels beyond the region too
    background = image.astype(np.float32)
    mixed = background + opacity[..., None] * (face.astype(np.float32) - background)
    return Forgery(np.clip(np.rint(mixed), 0, 255).astype(np.uint8), mask)


def _feathered(where: np.ndarray, feather: float) -> np.ndarray:
    """1 inside a region, falling to 0 at its edge; over `feather` times the longer side of its bounding box."""
    inside = where.astype(np.uint8)
    *_, width, height = cv2.boundingRect(inside)
    depth = cv2.distanceTransform(inside, cv2.DIST_L2, 5)
    return np.clip(depth / max(feather * max(width, height), 1.0), 0, 1)


def _take_colours(
    face: np.ndarray, target: np.ndarray, where: np.ndarray, landmarks: np.ndarray, kind: str
) -> np.ndarray:
    """Give a face the colours of the picture, in one of the ways of :data:`COLOURS`."""
    if kind == "region":  # Lab mean and spread inside the region
        return take_colours(face, target, where, 1.0)
    if kind == "picture":  # … of the whole picture
        return take_colours(face, target, np.ones_like(where), 1.0)
    pixels = face.astype(np.float32)
    if kind == "mean":  # RGB mean inside the region
        pixels += target[where].mean(axis=0) - pixels[where].mean(axis=0)
    else:  # local: the ratio of the two pictures after a blur over most of the distance between the eyes
        blur = 0.6 * float(np.linalg.norm(landmarks[36:42].mean(axis=0) - landmarks[42:48].mean(axis=0)))
        wanted, have = (
            cv2.GaussianBlur(picture.astype(np.float32), (0, 0), max(blur, 1.0)) for picture in (target, face)
        )
        pixels *= wanted / np.maximum(have, 16)  # in darkness a ratio would blow up the noise
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
