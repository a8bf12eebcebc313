"""Following people by their boxes."""

from __future__ import annotations

import numpy as np
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


# --------------------------------------------------------------------------------------------------- by who they are


class Someone:
    """A face with a descriptor that lies at a place of one dimension; it counts how often it was asked."""

    def __init__(self, place: float) -> None:
        self.place, self.asked = place, 0

    @property
    def descriptor(self) -> np.ndarray:
        self.asked += 1
        return np.array([self.place, 0.0])


def see(tracker: Tracker, *faces: tuple[int, float]) -> list[int]:
    """Ids of faces at (x, place of the descriptor)."""
    return tracker([face(x) for x, _ in faces], [Someone(place) for _, place in faces])


def test_who_moved_is_known_again() -> None:
    tracker = Tracker(patience=1)
    assert see(tracker, (0, 0.0), (300, 2.0)) == [0, 1]
    assert see(tracker, (900, 2.1), (600, -0.2)) == [1, 0]
    for _ in range(10):
        assert see(tracker) == []
    assert see(tracker, (0, 2.2), (600, 5.0)) == [1, 2]
    assert see(tracker, (1300, 0.3)) == [0]
    assert tracker.aliases == {}


def test_far_apart_frames_are_no_evidence() -> None:
    near, far = Tracker(near=True), Tracker(near=False)
    for tracker, expected in ((near, [0]), (far, [1])):
        assert see(tracker, (0, 0.0)) == [0]
        assert see(tracker, (0, 2.0)) == expected  # another person in the same place


def test_the_nearest_person_gets_the_face() -> None:
    tracker = Tracker(near=False)
    assert see(tracker, (0, 0.0), (300, 0.8)) == [0, 1]
    assert see(tracker, (0, 0.5), (300, 0.45)) == [1, 0]


def test_who_stays_is_seldom_asked() -> None:
    tracker, people = Tracker(), [Someone(0.0) for _ in range(1000)]
    for person in people:
        assert tracker([face(0)], [person]) == [0]
    asked = [number for number, person in enumerate(people, start=1) if person.asked]
    assert asked == [2**power for power in range(10)]


def test_an_id_of_a_blurred_face_becomes_an_alias() -> None:
    tracker = Tracker(patience=1)
    for _ in range(4):
        assert see(tracker, (0, 0.0)) == [0]
    for _ in range(3):
        see(tracker)
    found = [see(tracker, (600, place))[0] for place in (0.7, 0.5, 0.3, 0.3, 0.3, 0.3)]
    assert found == [1, 1, 1, 0, 0, 0]  # as soon as the mean is near enough, which the fourth frame tells
    assert tracker.aliases == {1: 0}
    assert see(tracker, (600, 0.3), (0, 0.2)) == [0, 2]  # its box is that of the older one now
    for _ in range(20):
        see(tracker, (600, 0.3), (0, 0.2))  # like each other, but two in one picture
    assert tracker.aliases == {1: 0}


def test_the_box_of_an_alias_is_forgotten() -> None:
    tracker = Tracker(patience=1)
    see(tracker, (0, 0.0))
    for _ in range(3):
        see(tracker)
    assert [see(tracker, (600, place)) for place in (0.7, 0.3)] == [[1], [0]]
    assert see(tracker, (600, 0.3), (650, 5.0)) == [0, 2]  # the second one overlaps the box that was 1's


def test_who_was_seen_with_an_alias_was_seen_with_the_person() -> None:
    tracker = Tracker(patience=1)
    see(tracker, (0, 0.0))
    for _ in range(3):
        see(tracker)
    assert see(tracker, (600, 0.7), (900, 1.2)) == [1, 2]
    assert see(tracker, (600, 0.3), (900, 1.2)) == [0, 2]
    for _ in range(30):
        assert see(tracker, (900, 0.2)) == [2]
    assert tracker.aliases == {1: 0}


places = st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 1.0, 1.3])


@given(
    st.booleans(),
    st.lists(st.lists(st.tuples(st.integers(0, 5), places), max_size=4, unique_by=lambda each: each[0]), max_size=12),
)
def test_two_in_one_picture_are_never_one_person(near: bool, frames: list[list[tuple[int, float]]]) -> None:
    tracker = Tracker(near=near, patience=1)
    found = [see(tracker, *[(70 * x, place) for x, place in faces]) for faces in frames]

    def final(track: int) -> int:
        while track in tracker.aliases:
            assert tracker.aliases[track] < track
            track = tracker.aliases[track]
        return track

    for ids in found:
        assert len({final(track) for track in ids}) == len(ids)


@pytest.mark.parametrize("options", [{"least": 0.0}, {"least": 1.5}, {"patience": -1}])
def test_impossible_options(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Tracker(**options)  # type: ignore[arg-type]
