"""Landmarks laid out like a face, and pictures that are not of one: for tests of what works on landmarks."""

from __future__ import annotations

import cv2
import numpy as np


def face_points(size: int = 96, centre: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
    """Sixty-eight points laid out like a face: jaw, eyebrows, nose, eyes, lips."""

    def arc(count: int, x: float, y: float, rx: float, ry: float, start: float, stop: float) -> np.ndarray:
        angle = np.linspace(start, stop, count)
        return np.column_stack([x + rx * np.cos(angle), y + ry * np.sin(angle)])

    pi = np.pi
    parts = [
        arc(17, 0, -0.05, 0.3, 0.38, pi, 0),
        arc(5, -0.13, -0.13, 0.08, 0.04, pi, 2 * pi),
        arc(5, 0.13, -0.13, 0.08, 0.04, pi, 2 * pi),
        np.column_stack([np.zeros(4), np.linspace(-0.08, 0.05, 4)]),
        arc(5, 0, 0.07, 0.06, 0.02, pi, 0),
        arc(6, -0.13, -0.06, 0.06, 0.025, pi, 2.7 * pi),
        arc(6, 0.13, -0.06, 0.06, 0.025, pi, 2.7 * pi),
        arc(12, 0, 0.18, 0.1, 0.05, pi, 2.8 * pi),
        arc(8, 0, 0.18, 0.07, 0.02, pi, 2.7 * pi),
    ]
    return ((np.concatenate(parts) + np.array(centre)) * size).astype(np.float32)


def picture(seed: int, size: int = 96) -> np.ndarray:
    """Smooth colours with some grain."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(40, 215, (6, 6, 3)).astype(np.float32)
    smooth = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)
    return np.clip(smooth + rng.normal(0, 6, (size, size, 3)), 0, 255).astype(np.uint8)
