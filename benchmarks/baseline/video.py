"""The plain way to some frames of a video: seek to each of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np


def seek_frames(path: Path, indices: Sequence[int]) -> list[np.ndarray]:
    """(H, W, 3) uint8 RGB frames, on one thread like ours."""
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    frames = []
    for index in indices:
        capture.set(cv2.CAP_PROP_POS_FRAMES, index)
        frames.append(cv2.cvtColor(capture.read()[1], cv2.COLOR_BGR2RGB))
    return frames
