"""Aligned chips: the five points come to their places, whatever the size and the tilt of the face in the picture."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fsvfm.errors import ConfigError, DataError
from fsvfm.faces.align import align, five_points, reference_points, similarity, transform
from fsvfm.faces.detect import DlibHOG
from fsvfm.faces.images import load_image
from fsvfm.faces.landmarks import Landmarks68

moves = st.tuples(st.floats(-3.1, 3.1), st.floats(0.3, 4), st.floats(-200, 200), st.floats(-200, 200))


def moved(points: np.ndarray, move: tuple[float, float, float, float]) -> np.ndarray:
    angle, scale, x, y = move
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return points @ turn.T + [x, y]


@pytest.fixture(scope="module")
def photo(media_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """A real face and its 68 landmarks."""
    image = load_image(media_dir / "photos" / "001.jpg")[::2, ::2].copy()
    return image, Landmarks68()(image, DlibHOG()(image)[0].box)


def test_the_published_places() -> None:
    """With padding 0.37 the reference square fills 1/1.74 of the chip."""
    points = reference_points(224, 0.37)
    np.testing.assert_allclose(points[0], [224 * 0.594152 / 1.74, 224 * 0.5819465 / 1.74])
    assert points.min() > 0.37 / 1.74 * 224
    np.testing.assert_allclose(reference_points(100, 0)[4], [72.6104, 78.0233])
    np.testing.assert_allclose(reference_points(448, 0.37), 2 * points)


@settings(deadline=None)
@given(moves)
def test_points_land_on_the_reference(move: tuple[float, float, float, float]) -> None:
    """A face of the reference's proportions, wherever it lies in a picture and however it is turned."""
    points = moved(reference_points(), move)
    np.testing.assert_allclose(transform(points, similarity(points, reference_points())), reference_points(), atol=1e-6)


@pytest.mark.parametrize(("angle", "scale"), [(0.0, 1.0), (0.5, 1.0), (-2.0, 3.3), (0.2, 0.6), (3.0, 6.1)])
def test_what_is_drawn_at_the_points_is_seen_at_the_reference(angle: float, scale: float) -> None:
    points = moved(reference_points(), (angle, scale, 0, 0))
    margin = int(15 * scale)
    points += margin - points.min(axis=0)
    image = np.zeros((*(np.ceil(points.max(axis=0)).astype(int) + margin)[::-1], 3), np.uint8)
    for channel, (x, y) in enumerate(points[[0, 3, 4]]):
        ys, xs = np.mgrid[0 : image.shape[0], 0 : image.shape[1]]
        near = np.exp(-((xs - x) ** 2 + (ys - y) ** 2) / (2 * (3 * scale) ** 2))
        image[..., channel] = np.round(255 * near)
    chip = align(image, points)
    assert chip.image.shape == (224, 224, 3)
    for channel, place in enumerate(reference_points()[[0, 3, 4]]):
        weight = chip.image[..., channel].astype(float)
        ys, xs = np.mgrid[0:224, 0:224]
        found = np.array([(xs * weight).sum(), (ys * weight).sum()]) / weight.sum()
        assert np.abs(found - place).max() < 0.3


@pytest.mark.parametrize(("angle", "scale"), [(25, 1.0), (-90, 1.0), (180, 1.0), (10, 1.6), (0, 0.7)])
def test_a_turned_or_scaled_picture_gives_the_same_chip(
    angle: float, scale: float, photo: tuple[np.ndarray, np.ndarray]
) -> None:
    image, landmarks = photo
    points = five_points(landmarks)
    height, width = image.shape[:2]
    side = int(2 * scale * max(height, width))
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), angle, scale)
    matrix[:, 2] += side / 2 - np.array([width / 2, height / 2])
    other = cv2.warpAffine(image, matrix, (side, side), flags=cv2.INTER_AREA)
    chip, again = align(image, points), align(other, transform(points, matrix))
    inside = chip.image.any(axis=2) & again.image.any(axis=2)
    difference = np.abs(chip.image.astype(int) - again.image).mean(axis=2)[inside]
    assert inside.mean() > 0.85
    assert difference.mean() < 3.5
    np.testing.assert_allclose(
        transform(points, chip.matrix), transform(transform(points, matrix), again.matrix), atol=1e-6
    )


def test_a_real_face_lies_where_it_should(photo: tuple[np.ndarray, np.ndarray]) -> None:
    image, landmarks = photo
    chip = align(image, five_points(landmarks))
    again = Landmarks68()(chip.image, DlibHOG()(chip.image)[0].box)
    distance = np.linalg.norm(five_points(again) - reference_points(), axis=1)
    assert distance.max() < 13  # no face has exactly the reference's proportions
    assert distance.mean() < 10


def test_a_large_face_is_averaged_not_sampled() -> None:
    """Stripes finer than the chip's pixels become grey; picking single pixels of them would give moiré."""
    points = moved(reference_points(), (0, 6, 0, 0))
    image = np.zeros((1344, 1344, 3), np.uint8)
    image[:, ::2] = 255
    chip = align(image, points).image[20:-20, 20:-20].astype(int)
    assert abs(chip.mean() - 127.5) < 3
    assert chip.std() < 10


def test_left_and_right_are_those_of_the_picture() -> None:
    landmarks = np.zeros((68, 2))
    landmarks[36:42, 0], landmarks[42:48, 0], landmarks[30, 0], landmarks[48, 0], landmarks[54, 0] = 1, 2, 3, 4, 5
    assert five_points(landmarks)[:, 0].tolist() == [1, 2, 3, 4, 5]


def test_impossible_input(photo: tuple[np.ndarray, np.ndarray]) -> None:
    image, landmarks = photo
    with pytest.raises(DataError, match="68"):
        five_points(landmarks[:67])
    for points in (np.zeros((5, 2)), np.full((5, 2), np.nan), np.ones((4, 2))):
        with pytest.raises(DataError, match="five points"):
            align(image, points)
    with pytest.raises(DataError, match="RGB"):
        align(image[..., 0], five_points(landmarks))
    for size, padding in ((0, 0.3), (224, -0.1)):
        with pytest.raises(ConfigError):
            reference_points(size, padding)
