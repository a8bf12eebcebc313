from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fsvfm.errors import DataError
from fsvfm.faces.crop import crop, square_crop
from fsvfm.faces.detect import Box


@st.composite
def boxes(draw: st.DrawFn) -> tuple[Box, int, int]:
    """A box whose upper left corner lies inside a picture; it may reach out on the right and below."""
    width, height = draw(st.integers(20, 2000)), draw(st.integers(20, 2000))
    left, top = draw(st.integers(-50, width - 10)), draw(st.integers(-50, height - 10))
    return Box(left, top, left + draw(st.integers(60, 900)), top + draw(st.integers(60, 900))), width, height


@settings(deadline=None)
@given(boxes())
def test_the_crop_lies_inside_and_is_never_larger_than_asked(case: tuple[Box, int, int]) -> None:
    box, width, height = case
    try:
        x, y, side = square_crop(box, width, height)
    except DataError:  # the shifted corner may lie beyond the picture
        assert (box.left + box.right) // 2 - int(1.3 * max(box.width, box.height)) // 2 >= width or (
            box.top + box.bottom
        ) // 2 - int(1.3 * max(box.width, box.height)) // 2 >= height
        return
    assert 0 <= x < x + side <= width
    assert 0 <= y < y + side <= height
    assert 1 <= side <= int(1.3 * max(box.width, box.height))
    assert crop(np.zeros((height, width), np.uint8), x, y, side).shape == (side, side)


def test_far_from_the_edges_the_crop_is_centred_on_the_box() -> None:
    assert square_crop(Box(400, 500, 500, 600), 1000, 1000) == (385, 485, 130)
    assert square_crop((400, 500, 500, 600), 1000, 1000, scale=2.0) == (350, 450, 200)


@pytest.mark.parametrize("box", [Box(5, 5, 5, 5), Box(300, 5, 310, 15)])
def test_a_box_without_pixels_is_refused(box: Box) -> None:
    with pytest.raises(DataError, match="no crop"):
        square_crop(box, 100, 100)


def test_crop_takes_the_named_pixels_and_refuses_to_reach_out() -> None:
    image = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
    np.testing.assert_array_equal(crop(image, 5, 1, 3), image[1:4, 5:8])
    for x, y, side in ((6, 1, 3), (5, 4, 3), (-1, 0, 3), (0, 0, 0)):
        with pytest.raises(DataError, match="inside"):
            crop(image, x, y, side)
