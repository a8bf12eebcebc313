"""Square face crops, exactly as in the papers' preparation scripts."""

from __future__ import annotations

import numpy as np

from fsvfm.errors import DataError
from fsvfm.faces.detect import Box


def square_crop(
    box: Box | tuple[int, int, int, int], width: int, height: int, scale: float = 1.3
) -> tuple[int, int, int]:
    """Enlarge a face box to a square that lies inside the picture.

    The side is ``int(scale · max(box width, box height))`` around the box centre, with integer halves. The corner is
    shifted to be ≥ 0, then the side is cut to what fits right and below; so near an edge the face is off-centre and
    the square smaller.

    Args:
        box: left, top, right, bottom in pixels; it may reach beyond the picture.
        width: of the picture, in pixels.
        height: of the picture, in pixels.
        scale: side relative to the longer side of the box.

    Returns:
        (x, y, side): upper left corner and side of the crop, in pixels; ``side`` ≥ 1.

    Raises:
        DataError: an empty box, or one that leaves no pixel inside the picture.
    """
    left, top, right, bottom = box
    side = int(max(right - left, bottom - top) * scale)
    x = max((left + right) // 2 - side // 2, 0)
    y = max((top + bottom) // 2 - side // 2, 0)
    side = min(side, width - x, height - y)
    if side < 1:
        raise DataError(f"the face box {tuple(box)} leaves no crop inside a picture of {width}×{height}")
    return x, y, side


def crop(image: np.ndarray, x: int, y: int, side: int) -> np.ndarray:
    """Cut a square out of a picture.

    Args:
        image: (H, W, ...) array.
        x: left edge in pixels.
        y: upper edge in pixels.
        side: of the square, in pixels.

    Returns:
        (side, side, ...) view of ``image``.

    Raises:
        DataError: the square does not lie inside the picture.
    """
    height, width = image.shape[:2]
    if side < 1 or x < 0 or y < 0 or x + side > width or y + side > height:
        raise DataError(f"a crop of {side}×{side} at ({x}, {y}) does not lie inside a picture of {width}×{height}")
    return image[y : y + side, x : x + side]
