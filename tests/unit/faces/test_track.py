"""Following people by their boxes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fsvfm.errors import ConfigError
from fsvfm.faces.detect import Box, Detection
from fsvfm.faces.track import Tracker, follow, overlap

boxes = st.builds(
    lambda x, y, w, h: Box(x, y, x + w, y + h),
    st.integers(-50, 50), st.integers(-50, 50), st.integers(0, 60), st.integers(0, 60),
)  # fmt: skip


def face(x: int, y: int = 0, side: int = 100, score: float = 1.0) -> Detection:
    return Detection(Box(x, y, x + side, y + side), score)


def pixels(box: Box) -> set[tuple[int, int]]:
    return {(x, y) for x in range(box.left, box.right) for y in range(box.top, box.bottom)}


@given(boxes, boxes)
def test_overlap_counts_pixels(a: Box, b: Box) -> None:
    union = pixels(a) | pixels(b)
    assert overlap(a, b) == overlap(b, a)
    assert overlap(a, b) == pytest.approx(len(pixels(a) & pixels(b)) / len(union) if union else 0.0)


def test_the_first_frame_takes_the_best_and_the_others_the_nearest() -> None:
    ann, bob = face(0, score=1.0), face(300, score=2.0)
    assert follow([ann, bob], None) == bob
    assert follow([ann, bob], Box(10, 0, 110, 100)) == ann
    assert follow([bob, ann], Box(10, 0, 110, 100)) == ann
    assert follow([], bob.box) is None


def test_who_left_the_box_is_looked_for_by_score() -> None:
    assert follow([face(0, score=1.0), face(300, score=2.0)], Box(800, 0, 900, 100)) == face(300, score=2.0)


def test_ids_stay_with_the_faces_whatever_the_order() -> None:
    tracker = Tracker()
    assert tracker([face(0), face(300)]) == [0, 1]
    assert tracker([face(310), face(10)]) == [1, 0]
    assert tracker([face(20), face(600), face(320)]) == [0, 2, 1]


def test_the_larger_overlap_wins() -> None:
    tracker = Tracker(least=0.1)
    assert tracker([face(0)]) == [0]
    # The first of the two overlaps as well, but less.
    assert tracker([face(40), face(10)]) == [1, 0]


def test_a_face_elsewhere_is_another_one() -> None:
    tracker = Tracker()
    assert tracker([face(0)]) == [0]
    assert tracker([face(60)]) == [1]  # overlap 0.25
    assert tracker([face(100), face(10)]) == [1, 0]


def test_a_face_may_be_missing_for_a_while() -> None:
    for absent, expected in ((3, [0]), (4, [1])):
        tracker = Tracker(patience=3)
        tracker([face(0)])
        for _ in range(absent):
            assert tracker([]) == []
        assert tracker([face(0)]) == expected, absent


def test_the_count_of_missing_frames_starts_anew() -> None:
    tracker = Tracker(patience=2)
    for _ in range(4):
        assert tracker([face(0)]) == [0]
        tracker([])
        tracker([])


@given(st.lists(st.lists(boxes, max_size=5), max_size=6))
def test_ids_are_unique_in_a_frame_and_count_up(frames: list[list[Box]]) -> None:
    tracker, seen = Tracker(), set[int]()
    for frame in frames:
        ids = tracker([Detection(box, 1.0) for box in frame])
        assert len(set(ids)) == len(ids) == len(frame)
        new = sorted(set(ids) - seen)
        assert new == list(range(len(seen), len(seen) + len(new)))
        seen |= set(ids)


@pytest.mark.parametrize("options", [{"least": 0.0}, {"least": 1.5}, {"patience": -1}])
def test_impossible_options(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Tracker(**options)  # type: ignore[arg-type]
