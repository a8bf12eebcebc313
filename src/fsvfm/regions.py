"""Facial regions on the patch grid: from a parsing map to one bit-mask per patch.

Masking (FSFM, sec. 3.2) never needs the 224×224 parsing map itself, only which regions touch which patch. That is
eight bits per patch, computed once when a data set is prepared.
"""

from __future__ import annotations

import numpy as np

from fsvfm.errors import DataError

#: Parsing labels in the order of LaPa (and of FACER's ``farl/lapa/448``).
LABELS = (
    "background",
    "skin",
    "left_eyebrow",
    "right_eyebrow",
    "left_eye",
    "right_eye",
    "nose",
    "upper_lip",
    "inner_mouth",
    "lower_lip",
    "hair",
)

#: Regions in the order in which CRFR-P walks them; the position is the bit in a region grid.
REGIONS = ("eyebrows", "eyes", "nose", "mouth", "boundary", "hair", "skin", "background")

#: Regions that CRFR-P and CRFR-R may cover.
COVERABLE = REGIONS[:6]

REGION_BIT = {name: index for index, name in enumerate(REGIONS)}

_LABEL_BITS = np.zeros(len(LABELS), dtype=np.uint8)
for _region, _labels in {
    "eyebrows": (2, 3),
    "eyes": (4, 5),
    "nose": (6,),
    "mouth": (7, 8, 9),
    "hair": (10,),
    "skin": (1,),
    "background": (0,),
}.items():
    _LABEL_BITS[list(_labels)] = 1 << REGION_BIT[_region]


def region_grid(labels: np.ndarray, patch_size: int) -> np.ndarray:
    """Reduce parsing maps to region bit-masks per patch.

    A patch belongs to a region if any of its pixels carries one of the region's labels; it is *boundary* if it holds a
    skin pixel and also a hair or background pixel.

    Args:
        labels: (H, W) or (B, H, W) integer parsing labels, 0–10 in the order of :data:`LABELS`.
        patch_size: side of a square patch in pixels; must divide H and W.

    Returns:
        (L,) or (B, L) uint8, L = (H / patch_size) · (W / patch_size), row-major; bit ``REGION_BIT[r]`` is set where
        the patch belongs to region ``r``.

    Raises:
        DataError: a label outside 0–10, or a size that the patch does not divide.
    """
    if labels.ndim not in (2, 3):
        raise DataError(f"a parsing map must be (H, W) or (B, H, W), got shape {labels.shape}")
    height, width = labels.shape[-2:]
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise DataError(
            f"a parsing map of {height}×{width} cannot be cut into {patch_size}×{patch_size} patches; "
            f"resize it to a multiple of {patch_size}"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= len(LABELS):
        raise DataError(
            f"parsing labels range from {low} to {high}; expected 0–{len(LABELS) - 1} in LaPa order "
            f"({', '.join(LABELS)}). Was the map produced with another label set?"
        )
    bits = _LABEL_BITS[labels].reshape(-1, height // patch_size, patch_size, width // patch_size, patch_size)
    grid = np.bitwise_or.reduce(np.bitwise_or.reduce(bits, axis=4), axis=2)
    outside = (1 << REGION_BIT["hair"]) | (1 << REGION_BIT["background"])
    boundary = (grid >> REGION_BIT["skin"] & 1).astype(bool) & (grid & outside).astype(bool)
    grid |= boundary.astype(np.uint8) << REGION_BIT["boundary"]
    return grid.reshape(*labels.shape[:-2], -1)
