"""Aligned face chips, as face anti-spoofing uses them: rotated upright, eyes and mouth at fixed places.

Five points of the face are brought as close as possible to five reference points by one rotation, scale and shift.
The reference is that of the MTCNN alignment in common use: in a square of side 1, left eye (0.224152, 0.2119465), right
eye (0.75610125, 0.2119465), nose (0.490127, 0.628106), left and right corner of the mouth (0.254149, 0.780233) and
(0.726104, 0.780233); left and right are those of the picture. With padding p a reference point r lies in a chip of
side s at

    s · (r + p) / (1 + 2 p)

so that a strip of p times the reference square stays visible on every side. The anti-spoofing protocols take s = 224
and p = 0.37 (03-datasets, sec. 5).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import cv2
import numpy as np

from fsvfm.errors import ConfigError, DataError
from fsvfm.faces.detect import check_rgb

#: Left eye, right eye, nose, left and right corner of the mouth in a square of side 1.
REFERENCE = np.array(
    [[0.224152, 0.2119465], [0.75610125, 0.2119465], [0.490127, 0.628106], [0.254149, 0.780233], [0.726104, 0.780233]]
)
SIZE, PADDING = 224, 0.37


class Chip(NamedTuple):
    """An aligned face.

    Attributes:
        image: (size, size, 3) uint8 RGB; black where it reaches beyond the picture.
        matrix: (2, 3) float64, from pixels of the picture to pixels of the chip; see :func:`transform`.
    """

    image: np.ndarray
    matrix: np.ndarray


def reference_points(size: int = SIZE, padding: float = PADDING) -> np.ndarray:
    """(5, 2) float64: where the five points belong in a chip, in pixels.

    Raises:
        ConfigError: a size below 1, or negative padding.
    """
    if size < 1 or padding < 0:
        raise ConfigError(f"an aligned chip needs size ≥ 1 and padding ≥ 0, got {size} and {padding}")
    return size * (REFERENCE + padding) / (1 + 2 * padding)


def five_points(landmarks: np.ndarray) -> np.ndarray:
    """The five points that MTCNN finds, from dlib's 68: centres of the eyes, tip of the nose, corners of the mouth.

    Args:
        landmarks: (68, 2), x and y.

    Returns:
        (5, 2) float64 in the order of :data:`REFERENCE`.

    Raises:
        DataError: not 68 finite points.
    """
    if np.shape(landmarks) != (68, 2) or not np.isfinite(landmarks).all():
        raise DataError(f"expected 68 finite landmarks (68, 2), got shape {np.shape(landmarks)}")
    points = np.asarray(landmarks, np.float64)
    return np.stack([points[36:42].mean(axis=0), points[42:48].mean(axis=0), points[30], points[48], points[54]])


def similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """(2, 3) matrix of the rotation, scale and shift that bring `source` points closest to `target` (Umeyama 1991).

    Args:
        source: (N, 2) points.
        target: (N, 2) points, in the same order.
    """
    source, target = source.astype(np.float64), target.astype(np.float64)
    source_mean, target_mean = source.mean(axis=0), target.mean(axis=0)
    # In the plane the least-squares solution is one complex factor.
    a = (source - source_mean) @ np.array([1, 1j])
    b = (target - target_mean) @ np.array([1, 1j])
    factor = np.vdot(a, b) / max(float(np.vdot(a, a).real), 1e-6)
    linear = np.array([[factor.real, -factor.imag], [factor.imag, factor.real]])
    return np.column_stack([linear, target_mean - linear @ source_mean])


def transform(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Apply a (2, 3) matrix to (N, 2) points."""
    return points @ matrix[:, :2].T + matrix[:, 2]


def align(image: np.ndarray, points: np.ndarray, size: int = SIZE, padding: float = PADDING) -> Chip:
    """Cut out a face, upright and with its parts at their reference places.

    Args:
        image: (H, W, 3) uint8 RGB.
        points: (5, 2), x and y in pixels of `image`, in the order of :data:`REFERENCE`; see :func:`five_points`.
        size: side of the chip in pixels.
        padding: strip around the reference square, relative to its side.

    Raises:
        DataError: not such an image or points, or points that all coincide.
        ConfigError: as :func:`reference_points`.
    """
    check_rgb(image)
    if np.shape(points) != (5, 2) or not np.isfinite(points).all() or np.ptp(points, axis=0).max() < 1:
        raise DataError(f"expected five points (5, 2) of a face, in pixels, got {np.asarray(points).tolist()}")
    matrix = similarity(points, reference_points(size, padding))
    # warpAffine reads single pixels, so a large face would alias: it is warped at about its own size, then averaged.
    scale = math.sqrt(abs(np.linalg.det(matrix[:, :2])))
    times = min(8, max(1, round(1 / scale)))
    larger = matrix * times
    larger[:, 2] += (times - 1) / 2  # pixel centres lie at integers
    warped = cv2.warpAffine(image, larger, (size * times, size * times), flags=cv2.INTER_LINEAR)
    return Chip(cv2.resize(warped, (size, size), interpolation=cv2.INTER_AREA), matrix)
