"""Whose face is it: following people from frame to frame by the overlap of their boxes, and by who they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from fsvfm.errors import ConfigError
from fsvfm.faces.detect import Box, Detection
from fsvfm.faces.identity import Person

#: Largest distance of a face's descriptor from the mean of a person's that counts as the same person. dlib's own limit
#: between two single faces is 0.6; on real clips of one person each, means need less.
SAME_PERSON = 0.55


def overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes, 0–1; boxes without an area overlap nothing."""
    width = min(a.right, b.right) - max(a.left, b.left)
    height = min(a.bottom, b.bottom) - max(a.top, b.top)
    if width <= 0 or height <= 0:
        return 0.0
    common = width * height
    return common / (a.width * a.height + b.width * b.height - common)


def follow(detections: Sequence[Detection], previous: Box | None) -> Detection | None:
    """The face of the person who was followed so far.

    Args:
        detections: faces of a frame.
        previous: the followed face's box in the last frame that had one; None in the first.

    Returns:
        the detection that overlaps `previous` most; where there is no `previous`, or nothing overlaps it (the person
        moved on between distant frames, or left), the one with the highest score; None if there are no detections.
    """
    if not detections:
        return None
    return max(detections, key=lambda each: (overlap(each.box, previous) if previous else 0.0, each.score))


class Tracker:
    """Gives every face of a video an id that it keeps.

    A box that overlaps one of the frame before is the same face. A face that no box explains is the same person's as
    one seen before, however long ago, if their descriptors are close: people move, leave the picture, and cuts come
    between. Where frames are far apart boxes tell nothing, and descriptors alone decide. Pairs are matched greedily,
    the best first. Ids are 0, 1, … in the order of appearance and are never given twice.

    A face that comes back half turned or blurred may get an id of its own. Therefore a face is described again whenever
    it was seen twice as often, and if all its descriptors together are close to those of an older one that was never in
    the picture with it, its id becomes an alias of that.

    Args:
        near: whether frames follow each other so closely that a box tells whose face it is.
        least: smallest overlap (intersection over union) that counts as the same face.
        patience: frames for which a box may be missing and still tell.

    Attributes:
        aliases: id → the older one of the same person, which frames to come have instead.

    Raises:
        ConfigError: `least` outside 0–1 (0 itself excluded), or negative `patience`.
    """

    def __init__(self, near: bool = True, least: float = 0.3, patience: int = 5) -> None:
        if not 0 < least <= 1:
            raise ConfigError(f"the least overlap of a track must be above 0 and at most 1, got {least}")
        if patience < 0:
            raise ConfigError(f"the patience of a tracker must be 0 or more frames, got {patience}")
        self.near, self.least, self.patience = near, least, patience
        self.aliases: dict[int, int] = {}
        self._boxes: dict[int, Box] = {}
        self._missing: dict[int, int] = {}
        self._people: dict[int, _Known] = {}
        self._next = 0

    def __call__(self, detections: Sequence[Detection], people: Sequence[Person] | None = None) -> list[int]:
        """Ids of the faces of the next frame; a frame without faces must be told too.

        Args:
            detections: the faces.
            people: whose they are, in the same order; None leaves it to the boxes, in all frames then.

        Returns:
            an id for each of `detections`.
        """
        ids: dict[int, int] = {}
        if self.near or people is None:
            overlaps = (
                (-overlap(box, each.box), track, place)
                for track, box in self._boxes.items()
                for place, each in enumerate(detections)
            )
            _match(ids, overlaps, -self.least)
        described = {}
        for place, person in enumerate(people or ()):
            if place not in ids or self._people[ids[place]].is_due:
                described[place] = person.descriptor
        distances = (
            (known.distance(descriptor), track, place)
            for track, known in self._people.items()
            for place, descriptor in described.items()
        )
        _match(ids, distances, SAME_PERSON)
        for place in range(len(detections)):
            if place not in ids:
                ids[place] = self._next
                self._next += 1
        if people is not None:
            for place, track in ids.items():
                self._people.setdefault(track, _Known()).add(described.get(place), ids.values())
            self._find_aliases(ids, described)
        seen = set(ids.values())
        lost = {track: self._missing.get(track, 0) + 1 for track in self._boxes if track not in seen}
        self._missing = {track: frames for track, frames in lost.items() if frames <= self.patience}
        kept = {track: self._boxes[track] for track in self._missing}
        self._boxes = kept | {ids[place]: detection.box for place, detection in enumerate(detections)}
        return [ids[place] for place in range(len(detections))]

    def _find_aliases(self, ids: dict[int, int], places: Iterable[int]) -> None:
        """Compare what was just described with older tracks; ids are changed where they turn out to be one."""
        for place in places:
            track = ids[place]
            known = self._people[track]
            older = [other for other in self._people if other < track and not self._were_together(track, other)]
            distances = {other: self._people[other].distance(known.mean) for other in older}
            nearest = min(older, key=lambda other: distances[other], default=track)
            if nearest != track and distances[nearest] <= SAME_PERSON:
                self.aliases[track] = ids[place] = nearest
                self._people[nearest].take(self._people.pop(track))
                self._boxes.pop(track, None)

    def _were_together(self, a: int, b: int) -> bool:
        return b in self._people[a].together or a in self._people[b].together


class _Known:
    """What is known of a person: in how many frames it was, with which tracks, and the mean of some descriptors."""

    def __init__(self) -> None:
        self.frames = self.count = 0
        self.together: set[int] = set()
        self.total = np.zeros(())

    @property
    def is_due(self) -> bool:
        """Whether it is to be described in the next frame: the first, second, fourth, eighth, …"""
        return (self.frames + 1) & self.frames == 0

    @property
    def mean(self) -> np.ndarray:
        return self.total / self.count

    def distance(self, descriptor: np.ndarray) -> float:
        return float(np.linalg.norm(self.mean - descriptor))

    def add(self, descriptor: np.ndarray | None, together: Iterable[int]) -> None:
        """One more frame, with its descriptor if that was computed, and all tracks that were seen in it."""
        self.frames += 1
        self.together.update(together)
        if descriptor is not None:
            self.total, self.count = self.total + descriptor, self.count + 1

    def take(self, other: _Known) -> None:
        """Add what is known of a track that turned out to be this one."""
        self.total, self.count = self.total + other.total, self.count + other.count
        self.together |= other.together


def _match(ids: dict[int, int], pairs: Iterable[tuple[float, int, int]], limit: float) -> None:
    """Give the ids of known tracks to places, the pair of least cost first; none costs more than the limit."""
    taken = set(ids.values())
    for cost, track, place in sorted(pairs):
        if cost <= limit and track not in taken and place not in ids:
            ids[place] = track
            taken.add(track)
