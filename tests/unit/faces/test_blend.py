"""Forgeries: untouched where the mask is 0, the same for the same generator, as strong as asked for."""

from __future__ import annotations

from dataclasses import fields, replace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import ConvexHull, Delaunay

from drawn_faces import face_points, picture
from fsvfm.errors import ConfigError, DataError
from fsvfm.faces.blend import MASKS, STRONG, SUBTLE, Forgery, Strength, as_strength, face_mask, face_swap, self_blend
from fsvfm.faces.self_blending import KINDS, RATIOS, disturb, mask_of, self_blended_pair, soften, transform

SIZE = 96
#: No change of any kind: what is pasted is the picture itself.
NOTHING = Strength(
    **{
        field.name: (0.0, 0.0)
        for field in fields(Strength)
        if field.name not in ("sharpness", "parts", "ratio", "resample")
    },  # type: ignore[arg-type]
    ratio=(1.0, 1.0),
    resample=(1.0, 1.0),
    sharpness=("blur",),
    parts=MASKS,
)
NOTHING = replace(NOTHING, colour_chance=0.0, frequency_chance=0.0)


def check(forged: Forgery, original: np.ndarray) -> None:
    assert forged.image.dtype == np.uint8
    assert forged.image.shape == original.shape
    assert forged.mask.dtype == np.float32
    assert forged.mask.shape == original.shape[:2]
    assert forged.mask.min() >= 0
    assert forged.mask.max() <= 1
    np.testing.assert_array_equal(forged.image[forged.mask == 0], original[forged.mask == 0])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), strength=st.one_of(st.floats(0, 1), st.sampled_from(["subtle", "strong"])))
def test_outside_the_mask_the_photograph_is_untouched(seed: int, strength: float | str) -> None:
    target, source = picture(1), picture(2)
    before = target.copy(), source.copy()
    points = face_points()
    check(self_blend(target, points, np.random.default_rng(seed), strength), target)
    other = face_points(centre=(0.45, 0.55))
    check(face_swap(target, points, source, other, np.random.default_rng(seed), strength), target)
    np.testing.assert_array_equal((target, source), before)  # the inputs stay as they are


def test_the_same_generator_gives_the_same_forgery() -> None:
    target, source, points = picture(1), picture(2), face_points()

    def both(seed: int) -> list[np.ndarray]:
        rng = np.random.default_rng(seed)
        return [self_blend(target, points, rng, "strong").image, face_swap(target, points, source, points, rng).image]

    np.testing.assert_array_equal(both(5), both(5))
    assert not np.array_equal(both(5)[0], both(6)[0])


def test_strong_changes_more_than_subtle() -> None:
    target, points = picture(1), face_points()

    def change(strength: float) -> float:
        forgeries = [self_blend(target, points, np.random.default_rng(seed), strength) for seed in range(30)]
        return float(np.mean([np.abs(f.image.astype(float) - target)[f.mask > 0.2].mean() for f in forgeries]))

    assert change(0.0) < change(0.5) < change(1.0)
    assert change(1.0) > 8  # 8-bit levels


def test_nothing_changed_means_nothing_to_see() -> None:
    target, points = picture(3), face_points()
    for seed in range(8):
        forged = self_blend(target, points, np.random.default_rng(seed), NOTHING)
        assert np.abs(forged.image.astype(int) - target).max() <= 1
        # Swapping a face with itself exercises warp, colours and Poisson cloning; each is the identity here.
        swapped = face_swap(target, points, target, points, np.random.default_rng(seed), NOTHING)
        assert np.abs(swapped.image.astype(int) - target).mean() < 1.5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rgb", 25), ("hue", 90), ("saturation", 60), ("brightness", 0.2), ("contrast", 0.5),
        ("blur", 0.05), ("resample", 6), ("sharpen", 1.0), ("move", 0.08), ("scale", 0.2),
    ],
)  # fmt: skip
def test_each_change_shows_by_itself(name: str, value: float) -> None:
    target, points = picture(3), face_points()
    only = replace(NOTHING, **{name: (value, value)})
    if name in ("blur", "resample", "sharpen"):
        only = replace(only, frequency_chance=1.0, sharpness=(name,))
    elif name not in ("move", "scale"):
        only = replace(only, colour_chance=1.0)
    forged = self_blend(target, points, np.random.default_rng(0), only)
    assert np.abs(forged.image.astype(int) - target)[forged.mask > 0].mean() > 2


def test_a_swap_undoes_rotation_scale_and_shift() -> None:
    target, points = picture(1), face_points()
    matrix = cv2.getRotationMatrix2D((SIZE / 2, SIZE / 2), 25, 0.8) + np.array([[0, 0, 4.0], [0, 0, -3.0]])
    source = cv2.warpAffine(target, matrix, (SIZE, SIZE), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    source_points = (points @ matrix[:, :2].T + matrix[:, 2]).astype(np.float32)
    soft = replace(NOTHING, feather=(0.05, 0.05))
    for seed in range(6):
        forged = face_swap(target, points, source, source_points, np.random.default_rng(seed), soft)
        smooth = (cv2.GaussianBlur(picture, (0, 0), 2).astype(int) for picture in (forged.image, target))
        assert np.abs(np.subtract(*smooth))[forged.mask > 0].mean() < 3


def test_a_swap_shows_the_source_face_where_the_target_face_was() -> None:
    size = 128
    plain = np.full((size, size, 3), 128, np.uint8)
    source = plain.copy()
    source_points, target_points = face_points(size, (0.4, 0.45)), face_points(size, (0.58, 0.55))
    nose = source_points[33].astype(int)
    cv2.circle(source, tuple(int(v) for v in nose), 5, (250, 250, 250), -1)  # a mark on the nose
    for seed in range(6):
        forged = face_swap(plain, target_points, source, source_points, np.random.default_rng(seed), NOTHING)
        brightest = np.unravel_index(forged.image.sum(axis=2).argmax(), (size, size))
        assert np.hypot(*(np.array(brightest)[::-1] - target_points[33])) < 6


def test_the_source_may_have_another_size() -> None:
    target, source = picture(1), picture(2, size=150)
    check(face_swap(target, face_points(), source, face_points(150), np.random.default_rng(0), "strong"), target)


def test_a_face_at_the_border_is_blended_too() -> None:
    target, points = picture(1), face_points(centre=(0.1, 0.95))
    for seed in range(6):
        check(self_blend(target, points, np.random.default_rng(seed), "strong"), target)
        check(face_swap(target, points, picture(2), face_points(), np.random.default_rng(seed)), target)


def test_masks_cover_what_their_names_say() -> None:
    points = face_points()
    masks = {part: face_mask(points, SIZE, SIZE, part) for part in MASKS}
    centre = points[30].astype(int)
    for mask in masks.values():
        assert set(np.unique(mask)) == {0.0, 1.0}
        assert mask[centre[1], centre[0]] == 1
    assert (masks["hull"] >= masks["inner"]).all()
    assert (masks["hull"] >= masks["lower"]).all()
    assert masks["forehead"].sum() > masks["hull"].sum()
    assert masks["lower"][: int(points[36:48, 1].min())].sum() == 0  # nothing above the eyes
    chin = points[8].astype(int)
    assert masks["inner"][chin[1] - 2, chin[0]] == 0


def test_strengths() -> None:
    assert as_strength("subtle") is SUBTLE
    assert as_strength(0) == SUBTLE
    assert as_strength(1.0) == STRONG
    assert as_strength(0.25).move == pytest.approx(tuple(0.75 * np.array(SUBTLE.move) + 0.25 * np.array(STRONG.move)))
    assert as_strength(NOTHING) is NOTHING
    for strength in (SUBTLE, STRONG):
        for field in fields(Strength):
            value = getattr(strength, field.name)
            if isinstance(value, tuple) and not isinstance(value[0], str):
                assert value[0] <= value[1], field.name
    for wrong in ("huge", 1.5, -0.1, float("nan")):
        with pytest.raises(ConfigError, match="subtle"):
            as_strength(wrong)


def test_wrong_inputs_are_told() -> None:
    rng, target, points = np.random.default_rng(0), picture(1), face_points()
    with pytest.raises(DataError, match="68 finite points"):
        self_blend(target, points[:5], rng)
    with pytest.raises(DataError, match="68 finite points"):
        self_blend(target, np.full((68, 2), np.nan), rng)
    with pytest.raises(DataError, match="uint8 RGB"):
        self_blend(target.astype(np.float32), points, rng)
    with pytest.raises(DataError, match="source must be"):
        face_swap(target, points, target[..., 0], points, rng)
    with pytest.raises(DataError, match="outside"):
        self_blend(target, points + 1000, rng)
    with pytest.raises(DataError, match="landmarks of source all coincide"):
        face_swap(target, points, target, np.full((68, 2), 9.0), rng)
    with pytest.raises(ConfigError, match="part of the face"):
        face_mask(points, SIZE, SIZE, "ear")


# ------------------------------------------------------------------ self-blended pairs: training pictures as published


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_pair_differs_inside_the_mask_alone(seed: int) -> None:
    image, points = picture(1), face_points()
    before = image.copy()
    real, fake, mask = self_blended_pair(image, points, np.random.default_rng(seed))
    assert (real.dtype, fake.dtype, mask.dtype) == (np.uint8, np.uint8, np.float32)
    assert real.shape == fake.shape == image.shape
    assert mask.min() >= 0
    assert any(mask.max() == pytest.approx(ratio, abs=1e-5) for ratio in RATIOS)
    np.testing.assert_array_equal(real[mask == 0], fake[mask == 0])
    np.testing.assert_array_equal(image, before)
    again = self_blended_pair(image, points, np.random.default_rng(seed))
    np.testing.assert_array_equal(fake, again.fake)


def test_the_photograph_itself_is_real_in_half_of_the_pairs() -> None:
    """The changed version is the background as often as the face: change alone is no clue."""
    image, points = picture(1), face_points()
    pairs = [self_blended_pair(image, points, np.random.default_rng(seed)) for seed in range(200)]
    untouched = sum(np.array_equal(pair.real, image) for pair in pairs)
    assert 75 <= untouched <= 125  # 100 ± 3.5 standard deviations
    assert all((pair.fake != pair.real).any() for pair in pairs)
    ratios = np.round([pair.mask.max() for pair in pairs], 3)
    assert 75 <= (ratios == 1).sum() <= 125  # three of the six
    assert {*ratios} == {0.25, 0.5, 0.75, 1.0}


def inside(points: np.ndarray) -> np.ndarray:
    """Independent of OpenCV: pixels in the convex hull of points."""
    hull = Delaunay(points[ConvexHull(points).vertices])
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    return hull.find_simplex(np.column_stack([x.ravel(), y.ravel()])).reshape(SIZE, SIZE) >= 0


def test_masks_are_unions_of_hulls() -> None:
    points = face_points().astype(np.float64)
    left = np.concatenate([points[17:22], points[27:28], points[31:36], points[8:9]])
    jaw = np.concatenate([points[0:17], points[48:68]])
    components, features = (mask_of(points, SIZE, SIZE, kind) for kind in ("components", "features"))
    inner = cv2.erode(inside(left).astype(np.uint8), np.ones((3, 3))) > 0
    assert components[inner].all()
    assert features[cv2.erode(inside(jaw).astype(np.uint8), np.ones((3, 3))) > 0].all()
    outside = cv2.dilate(inside(points).astype(np.uint8), np.ones((5, 5))) == 0
    for kind in ("components", "features", "hull"):
        assert not mask_of(points, SIZE, SIZE, kind)[outside].any(), kind
    raised = mask_of(points, SIZE, SIZE, "extended")
    assert (raised >= components).all()
    # Half the distance from eyebrow to lid: by hand from three landmarks of the left eye's middle.
    top = points[19, 1] + (points[19, 1] - points[37, 1]) / 2
    rows = np.flatnonzero(raised[:, int(points[19, 0])])
    assert rows[0] == pytest.approx(top, abs=2)
    assert rows[0] < np.flatnonzero(components[:, int(points[19, 0])])[0] - 1


def test_the_hull_may_reach_over_the_forehead() -> None:
    points = face_points()
    np.testing.assert_array_equal(mask_of(points, SIZE, SIZE, "hull"), face_mask(points, SIZE, SIZE))
    assert mask_of(points, SIZE, SIZE, "hull", forehead=True).sum() > face_mask(points, SIZE, SIZE).sum()


def test_masks_are_mirrored_with_the_face() -> None:
    """Left and right are treated alike, so that pictures may be flipped after blending."""
    order = [
        *range(16, -1, -1), *range(26, 16, -1), *range(27, 31), *range(35, 30, -1),
        *range(45, 41, -1), 47, 46, *range(39, 35, -1), 41, 40,
        *range(54, 47, -1), *range(59, 54, -1), *range(64, 59, -1), *range(67, 64, -1),
    ]  # fmt: skip
    points = np.rint(face_points())
    mirrored = points[order] * [-1, 1] + [SIZE - 1, 0]
    for kind in KINDS:
        here, there = mask_of(points, SIZE, SIZE, kind), mask_of(mirrored, SIZE, SIZE, kind)[:, ::-1]
        assert (here != there).mean() < 0.01, kind


def test_a_softened_mask_shrinks_and_stays_within_the_first() -> None:
    mask = np.zeros((224, 224), np.float32)
    cv2.circle(mask, (112, 112), 70, 1.0, -1)
    whole = []
    for seed in range(20):
        soft = soften(mask, np.random.default_rng(seed))
        assert soft.min() >= 0
        assert soft.max() == pytest.approx(1, abs=1e-5)
        assert soft[112, 112] == pytest.approx(1, abs=1e-3)
        whole.append(float((soft > 0.5).sum() / mask.sum()))
        assert not soft[:20].any()
        assert ((soft > 0.02) & (soft < 0.98)).any()
    assert all(0.5 < share < 1 for share in whole)


def test_transforms_stay_in_their_ranges() -> None:
    """Of a uniform grey face sharpness cannot change, and colours only so far: 20 levels, then 10 % and 25.5 levels."""
    grey = np.full((32, 32, 3), 100, np.uint8)
    values = np.array([transform(grey, np.random.default_rng(seed))[8, 8].astype(float) for seed in range(300)])
    assert (np.ptp([transform(grey, np.random.default_rng(s)) for s in range(20)], axis=(1, 2)) == 0).all()
    assert values.min() >= (100 - 20 - 1) * 0.9 - 25.5 - 1
    assert values.max() <= (100 + 20 + 1) * 1.1 + 25.5 + 1
    coloured = np.ptp(values, axis=1) > 3
    assert 0.2 < coloured.mean() < 0.4  # channels are shifted apart in 30 %
    assert values[coloured].std() > values[~coloured].std() / 2


def test_both_of_a_pair_are_disturbed_alike() -> None:
    image = picture(2)
    changed = 0
    for seed in range(12):
        one, other = disturb((image, image.copy()), np.random.default_rng(seed))
        np.testing.assert_array_equal(one, other)
        changed += not np.array_equal(one, image)
    assert 6 <= changed < 12


def test_wrong_inputs_of_a_pair_are_told() -> None:
    rng, image, points = np.random.default_rng(0), picture(1), face_points()
    with pytest.raises(DataError, match="68 finite points"):
        self_blended_pair(image, points[:67], rng)
    with pytest.raises(DataError, match="outside"):
        mask_of(points + 1000, SIZE, SIZE, "components")
    with pytest.raises(ConfigError, match="features, extended, components, hull"):
        mask_of(points, SIZE, SIZE, "ear")
