"""Whose face is it: following people from frame to frame by the overlap of their boxes."""

from __future__ import annotations

from collections.abc import Sequence

from fsvfm.errors import ConfigError
from fsvfm.faces.detect import Box, Detection


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
    """Gives every face of a video an id that it keeps while its box overlaps that of the frame before.

    Pairs of known and new boxes are matched greedily, largest overlap first. Ids are 0, 1, … in the order of
    appearance and are never given twice.

    Args:
        least: smallest overlap (intersection over union) that counts as the same face.
        patience: frames for which a face may be missing and still get its id back.

    Raises:
        ConfigError: `least` outside 0–1 (0 itself excluded), or negative `patience`.
    """

    def __init__(self, least: float = 0.3, patience: int = 5) -> None:
        if not 0 < least <= 1:
            raise ConfigError(f"the least overlap of a track must be above 0 and at most 1, got {least}")
        if patience < 0:
            raise ConfigError(f"the patience of a tracker must be 0 or more frames, got {patience}")
        self.least, self.patience = least, patience
        self._boxes: dict[int, Box] = {}
        self._missing: dict[int, int] = {}
        self._next = 0

    def __call__(self, detections: Sequence[Detection]) -> list[int]:
        """Ids of the faces of the next frame, in the order of `detections`; a frame without faces must be told too."""
        pairs = sorted(
            (
                (overlap(box, detection.box), -track, -place)
                for track, box in self._boxes.items()
                for place, detection in enumerate(detections)
            ),
            reverse=True,
        )
        ids: dict[int, int] = {}
        seen: set[int] = set()
        for shared, track, place in pairs:
            if shared >= self.least and -track not in seen and -place not in ids:
                ids[-place] = -track
                seen.add(-track)
        for place in range(len(detections)):
            if place not in ids:
                ids[place] = self._next
                self._next += 1
        lost = {track: self._missing.get(track, 0) + 1 for track in self._boxes if track not in seen}
        self._missing = {track: frames for track, frames in lost.items() if frames <= self.patience}
        kept = {track: self._boxes[track] for track in self._missing}
        self._boxes = kept | {ids[place]: detection.box for place, detection in enumerate(detections)}
        return [ids[place] for place in range(len(detections))]
