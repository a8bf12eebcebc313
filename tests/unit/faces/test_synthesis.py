"""Forging by configuration: ten regions that hold their landmarks, deformation, blending inside the region only."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drawn_faces import face_points, picture
from fsvfm.errors import ConfigError, DataError
from fsvfm.faces.synthesis import BLENDINGS, DEFORM, REGIONS, deform, landmarks_of, region_mask, synthesise

SIZE = 128
POINTS, OTHER = face_points(SIZE), face_points(SIZE, (0.46, 0.53))


def forge(region: int, blending: str, seed: int = 0, **options: float):
    return synthesise(
        picture(1, SIZE), POINTS, picture(2, SIZE), OTHER, np.random.default_rng(seed),
        region=region, blending=blending, **options,
    )  # fmt: skip


def test_ten_regions_differ_and_hold_their_landmarks() -> None:
    masks = [region_mask(POINTS, SIZE, SIZE, region) for region in range(10)]
    assert len(REGIONS) == 10
    assert len({mask.tobytes() for mask in masks}) == 10
    parts = {"left_eye": range(36, 42), "right_eye": range(42, 48), "nose": range(27, 36), "mouth": range(48, 68)}
    parts["eyes"] = range(36, 48)
    for region, mask in enumerate(masks):
        assert set(np.unique(mask)) == {0, 1}
        held = {point for part in REGIONS[region] for point in parts[part]}
        assert landmarks_of(region) == sorted(held)
        for x, y in np.rint(POINTS[sorted(held)]).astype(int):
            assert mask[y, x] == 1
    for together, alone in ((5, (0, 3)), (6, (1, 3)), (7, (2, 3)), (8, (3, 4)), (9, (2, 3, 4))):
        assert np.array_equal(masks[together], np.maximum.reduce([masks[part] for part in alone]))
    left, right = (np.argwhere(masks[region])[:, 1].mean() for region in (0, 1))
    assert left < POINTS[27, 0] - 10 < POINTS[27, 0] + 10 < right  # left is left in the picture
    with pytest.raises(ConfigError, match="region 10"):
        region_mask(POINTS, SIZE, SIZE, 10)


def test_no_deformation_at_sigma_zero_and_a_larger_one_above() -> None:
    mask = region_mask(POINTS, SIZE, SIZE, 9)
    rng = np.random.default_rng(0)
    assert np.array_equal(deform(mask, rng, 0.0), mask)
    changed = [
        np.mean([np.abs(deform(mask, rng, sigma) - mask).mean() for _ in range(20)]) for sigma in (1.0, 3.0, 9.0)
    ]
    assert 0 < changed[0] < changed[1] < changed[2]


def test_deformation_is_affine_within_each_triangle_of_the_grid() -> None:
    """A ramp stays a ramp there: its second differences are zero but at the edges of the 32 triangles."""
    side = 4 * 16 + 1  # grid points lie on pixels
    ramp = np.tile(np.linspace(0.4, 0.6, side, dtype=np.float32), (side, 1))
    bent = deform(ramp, np.random.default_rng(1), 2.0)
    assert not np.allclose(bent, ramp, atol=1e-3)
    inner = bent[18:23, 18:23]  # inside the upper triangle of one cell, and away from the border
    assert np.abs(np.diff(inner, 2, axis=0)).max() < 2e-4
    assert np.abs(np.diff(inner, 2, axis=1)).max() < 2e-4
    assert np.abs(np.diff(bent[8:-8, 8:-8], axis=1)).max() < 0.02  # no tears between the triangles


@given(region=st.integers(0, 9), blending=st.sampled_from(BLENDINGS), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_what_lies_outside_the_region_is_untouched(region: int, blending: str, seed: int) -> None:
    made = forge(region, blending, seed, ratio=0.7)
    assert made.image.dtype == np.uint8
    assert made.mask.dtype == np.float32
    assert made.mask.min() >= 0
    assert made.mask.max() <= 1
    assert np.array_equal(made.image[made.mask == 0], picture(1, SIZE)[made.mask == 0])
    again = forge(region, blending, seed, ratio=0.7)
    assert np.array_equal(again.image, made.image)
    # Never beyond the part of the face, but for the softening of its edge.
    carried = cv2.dilate(region_mask(POINTS, SIZE, SIZE, region), np.ones((13, 13), np.uint8))
    assert not made.mask[carried == 0].any()
    assert made.mask.any() == (blending != "none")


def test_none_returns_the_picture_and_ratio_decides_how_much_is_mixed() -> None:
    original = picture(1, SIZE).astype(float)
    assert np.array_equal(forge(9, "none").image, original)
    assert not forge(9, "none").mask.any()
    assert np.array_equal(forge(9, "mixup", ratio=0.0).image, original)
    half, whole = (forge(9, "mixup", ratio=ratio).image - original for ratio in (0.5, 1.0))
    assert np.abs(whole).max() > 20
    assert np.abs(half - whole / 2).max() <= 1
    assert np.array_equal(forge(9, "alpha", ratio=0.1).image, forge(9, "alpha", ratio=0.9).image)


def test_the_reference_comes_aligned() -> None:
    """A mark on the reference's nose appears on the picture's nose, though the faces have other places and sizes."""
    small = (face_points(SIZE) - SIZE / 2) * 0.8 + SIZE / 2 + np.array([9, -6])
    reference = np.full((SIZE, SIZE, 3), 120, np.uint8)
    x, y = np.rint(small[30]).astype(int)
    cv2.circle(reference, (int(x), int(y)), 2, (250, 250, 250), -1)
    plain = np.full((SIZE, SIZE, 3), 120, np.uint8)
    made = synthesise(
        plain, POINTS, reference, small, np.random.default_rng(0), region=3, blending="mixup", ratio=1.0, sigma=0.0
    )
    brightest = np.argwhere(made.image[..., 0] >= made.image[..., 0].max() - 5).mean(axis=0)[::-1]
    assert np.abs(brightest - POINTS[30]).max() < 1.5


def test_impossible_requests_are_refused_and_faces_outside_left_alone() -> None:
    with pytest.raises(ConfigError, match="blending='glue'"):
        forge(0, "glue")
    with pytest.raises(DataError, match="different sizes"):
        synthesise(
            picture(1, SIZE), POINTS, picture(2, 64), OTHER, np.random.default_rng(0), region=0, blending="alpha"
        )
    away = synthesise(
        picture(1, SIZE), POINTS + 1000, picture(2, SIZE), OTHER, np.random.default_rng(0), region=9, blending="mixup"
    )
    assert np.array_equal(away.image, picture(1, SIZE))
    assert not away.mask.any()
    assert DEFORM == 10  # pixels at 256 (SLADD)
