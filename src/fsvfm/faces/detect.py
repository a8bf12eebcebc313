"""Finding faces in a photograph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import dlib
import numpy as np

from fsvfm.errors import ConfigError, DataError


class Box(NamedTuple):
    """A face rectangle in pixels, as the detector gives it; it may reach beyond the picture."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        """``right − left``, the width from which the square crop is computed."""
        return self.right - self.left

    @property
    def height(self) -> int:
        """``bottom − top``."""
        return self.bottom - self.top


class Detection(NamedTuple):
    """A found face. ``score`` is the detector's own confidence; only its order has a meaning across pictures."""

    box: Box
    score: float


class FaceDetector(Protocol):
    """Anything that finds faces."""

    def __call__(self, image: np.ndarray) -> list[Detection]:
        """Find the faces in ``image`` ((H, W, 3) uint8 RGB), best first; an empty list if there is none."""
        ...


class DlibHOG:
    """dlib's frontal HOG detector, as the papers use it for every data set.

    The object is cheap to copy to worker processes: dlib's part is made at the first call and is not pickled.

    Args:
        upsample: how often the picture is doubled before the search; 1 finds faces from about 40 pixels.
        threshold: added to dlib's own decision threshold; negative values find more faces, and more false ones.
    """

    def __init__(self, upsample: int = 1, threshold: float = 0.0) -> None:
        if upsample < 0:
            raise ConfigError(f"upsample must be 0 or more, got {upsample}")
        self.upsample = upsample
        self.threshold = threshold
        self._detector: Any = None

    def __call__(self, image: np.ndarray) -> list[Detection]:
        """Find frontal faces.

        Args:
            image: (H, W, 3) uint8 RGB.

        Returns:
            Detections, highest score first; empty if no face was found.

        Raises:
            DataError: not such an image.
        """
        check_rgb(image)
        if self._detector is None:
            self._detector = dlib.get_frontal_face_detector()
        rectangles, scores, _ = self._detector.run(np.ascontiguousarray(image), self.upsample, self.threshold)
        found = [
            Detection(Box(r.left(), r.top(), r.right(), r.bottom()), float(score))
            for r, score in zip(rectangles, scores, strict=True)
        ]
        return sorted(found, key=lambda detection: -detection.score)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_detector": None}


def check_rgb(image: np.ndarray) -> None:
    """Raise DataError unless ``image`` is a non-empty (H, W, 3) uint8 array."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        what = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise DataError(f"expected an RGB picture of shape (H, W, 3) and type uint8, got {what}")
    if image.size == 0:
        raise DataError(f"the picture is empty: shape {image.shape}")


#: Detectors by name, for configurations.
DETECTORS: dict[str, Callable[..., FaceDetector]] = {"dlib_hog": DlibHOG}


def make_detector(name: str, **options: Any) -> FaceDetector:
    """Build a detector from its name in a configuration.

    Raises:
        ConfigError: an unknown name or option.
    """
    if name not in DETECTORS:
        raise ConfigError(f"unknown face detector {name!r}; known: {', '.join(sorted(DETECTORS))}")
    try:
        return DETECTORS[name](**options)
    except TypeError as error:
        raise ConfigError(f"face detector {name!r}: {error}") from error
