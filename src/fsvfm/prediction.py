"""What is known about a photograph or video once it is scored: faces, frames, and the verdict at a threshold.

Three numbers must not be confused. A *score* is the network's P(fake). A *probability* is that score after the
temperature stored in the export; without calibration it is the score itself, and the result says so. A *verdict*
compares the probability with a threshold:

- ``fake`` if it reaches the threshold, else ``real``;
- ``uncertain`` where a conformal band is stored and the probability lies in it, or band and threshold disagree;
- ``no face`` where none was found.

Of a video every face is followed from frame to frame. The video's verdict is that of its most suspicious track among
those long enough: seen in at least a quarter as many frames as the longest one, so that a face that flickers up once
does not decide. A picture's verdict is that of its most suspicious face.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np
from scipy.special import expit, logit

from fsvfm.errors import ConfigError
from fsvfm.faces.detect import Box
from fsvfm.faces.sources import readable
from fsvfm.metrics.calibration import CLIP

if TYPE_CHECKING:
    from fsvfm.loaded_detector import LoadedDetector

#: A track decides about a video if it has this share of the longest track's frames.
LONG_ENOUGH = 0.25

VERDICTS = ("real", "fake", "uncertain", "no face")


# ------------------------------------------------------------------------------------------------------------- results


@dataclass(slots=True)
class Face:
    """A face of a picture or frame, or one followed through a video.

    Attributes:
        id: 0, 1, …: in a picture by the face detector's confidence, in a video by appearance; it stays with the face.
        box: as the face detector gives it, in pixels; of a track in the frame with its highest probability.
        score: P(fake) as the network gives it.
        probability: the calibrated score.
        verdict: ``real``, ``fake`` or ``uncertain``.
        members: probability by each member of an ensemble; empty for a single detector.
        frames: in how many of the scored frames it was seen.
    """

    id: int
    box: Box
    score: float
    probability: float
    verdict: str
    members: dict[str, float] = field(default_factory=dict)
    frames: int = 1

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "box": [int(side) for side in self.box]}


@dataclass(slots=True)
class Frame:
    """A scored frame: its number in the video, its time in seconds (None if the file tells no rate), its faces."""

    index: int
    time: float | None
    faces: list[Face]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"index": self.index, "time": self.time, "faces": [face.to_dict() for face in self.faces]}


class Track(NamedTuple):
    """A face through the frames of a video: its id, its box where its probability is highest, and its frames' numbers.

    ``values`` is (N, 2 + M) float64: score, probability, and the probability by each of M members.
    """

    id: int
    box: Box
    values: np.ndarray


class Frames(Sequence[Frame]):
    """The scored frames of a video, in order; objects are made when they are looked at.

    They are kept in columns, about 80 bytes for a frame with a face, where the objects take 600: of an hour of which
    every frame is scored a few megabytes stay in memory.

    Args:
        frames: drawn once, one at a time; all faces have the same members.
    """

    def __init__(self, frames: Iterable[Frame]) -> None:
        self._index, self._time, self._end = array("q"), array("d"), array("q")
        self._id, self._box, self._verdict, self._values = array("q"), array("q"), array("b"), array("d")
        self._members: tuple[str, ...] = ()
        for frame in frames:
            for face in frame.faces:
                self._members = self._members or tuple(face.members)
                self._id.append(face.id)
                self._box.extend(face.box)
                self._verdict.append(VERDICTS.index(face.verdict))
                self._values.extend((face.score, face.probability, *face.members.values()))
            self._index.append(frame.index)
            self._time.append(math.nan if frame.time is None else frame.time)
            self._end.append(len(self._id))

    def __len__(self) -> int:
        return len(self._index)

    @overload
    def __getitem__(self, place: int) -> Frame: ...
    @overload
    def __getitem__(self, place: slice) -> list[Frame]: ...
    def __getitem__(self, place: int | slice) -> Frame | list[Frame]:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        place = range(len(self))[place]  # counts from the end, and raises IndexError, as a list does
        time = self._time[place]
        faces = range(self._end[place - 1] if place else 0, self._end[place])
        return Frame(self._index[place], None if math.isnan(time) else time, [self._face(face) for face in faces])

    def _face(self, row: int) -> Face:
        width = 2 + len(self._members)
        score, probability, *members = self._values[width * row : width * (row + 1)]
        named = dict(zip(self._members, members, strict=True))
        return Face(self._id[row], self._box_of(row), score, probability, VERDICTS[self._verdict[row]], named)

    def _box_of(self, row: int) -> Box:
        return Box(*self._box[4 * row : 4 * row + 4])

    def rename(self, aliases: Mapping[int, int]) -> None:
        """Give faces other ids: id → the one to have instead, which may have another one in turn."""
        for row, old in enumerate(self._id):
            while old in aliases:
                old = aliases[old]
            self._id[row] = old

    def tracks(self) -> Iterator[Track]:
        """Every face that was followed, by its id."""
        ids = np.asarray(self._id)
        values = np.asarray(self._values).reshape(len(ids), 2 + len(self._members))
        order = np.argsort(ids, kind="stable")
        for rows in np.split(order, np.flatnonzero(np.diff(ids[order])) + 1) if len(ids) else ():
            highest = int(rows[values[rows, 1].argmax()])
            yield Track(int(ids[highest]), self._box_of(highest), values[rows])


@dataclass
class Prediction:
    """What is known about one photograph or video; as JSON it follows ``fsvfm/prediction.schema.json``.

    Attributes:
        source: the file, or what stands for it.
        kind: ``photo``, ``video`` or ``webcam``.
        verdict: one of :data:`VERDICTS`; None if it could not be scored.
        score: of the face that decides; None without a face.
        probability: likewise, calibrated.
        faces: of the picture; of a video one per track, put together over its frames.
        frames: what was scored of a video, in order; one frame for a photograph.
        threshold: where the verdict comes from, see :meth:`Threshold.describe`.
        aggregate: how frames of a track were put together.
        notes: what a reader must know.
        error: why it could not be scored; None if it was.
    """

    source: str
    kind: str
    verdict: str | None = None
    score: float | None = None
    probability: float | None = None
    faces: list[Face] = field(default_factory=list)
    frames: Sequence[Frame] = ()
    threshold: dict[str, Any] | None = None
    aggregate: str = "mean"
    notes: list[str] = field(default_factory=list)
    error: str | None = None

    @property
    def decisive(self) -> Face | None:
        """The face that the verdict is about."""
        return max(_long_enough(self.faces), key=lambda face: face.probability, default=None)

    @property
    def peak(self) -> tuple[Frame, Face] | None:
        """The frame in which the face that decides is most suspicious, and the face as it is there."""
        if (decisive := self.decisive) is None:
            return None
        shown = ((frame, face) for frame in self.frames for face in frame.faces if face.id == decisive.id)
        return max(shown, key=lambda pair: pair[1].probability, default=None)

    def summary(self) -> dict[str, Any]:
        """Plain values for JSON, without the frames."""
        return {
            "source": readable(self.source),
            "kind": self.kind,
            "verdict": self.verdict,
            "score": self.score,
            "probability": self.probability,
            "faces": [face.to_dict() for face in self.faces],
            "threshold": self.threshold,
            "aggregate": self.aggregate,
            "notes": list(self.notes),
            "error": self.error,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**self.summary(), "frames": [frame.to_dict() for frame in self.frames]}


def _long_enough(faces: Sequence[Face]) -> list[Face]:
    longest = max((face.frames for face in faces), default=0)
    return [face for face in faces if face.frames >= LONG_ENOUGH * longest]


# ----------------------------------------------------------------------------------------------------------- threshold


@dataclass(frozen=True)
class Threshold:
    """A limit on the probability, with what is known about its errors.

    Attributes:
        name: ``eer``, ``fpr_1``, ``fpr_5``, or ``number`` for one that the user gave.
        value: fake is decided at or above it.
        fpr: share of real faces called fake where it was measured; None if it never was.
        fnr: share of fakes called real, likewise.
        origin: what it was measured on, or why it was not, in words.
        level: what was judged there, ``frame`` or ``video``; None if it was not measured.
        note: what limits these rates; empty if nothing does.
        band: ``alpha``, ``low`` and ``high`` of the conformal band; None without one.
        calibrated: whether probabilities are calibrated.
    """

    name: str
    value: float
    origin: str
    fpr: float | None = None
    fnr: float | None = None
    level: str | None = None
    note: str = ""
    band: dict[str, float] | None = None
    calibrated: bool = False

    def verdict(self, probability: float) -> str:
        """``real``, ``fake`` or ``uncertain``; with a band, what the threshold's and the band's guarantees allow."""
        low, high = (self.band["low"], self.band["high"]) if self.band else (math.inf, -math.inf)
        if self.band and low <= probability <= high:
            return "uncertain"
        if probability >= self.value:
            return "fake" if probability > high else "uncertain"
        return "real" if probability < low else "uncertain"

    def describe(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def text(self) -> str:
        """One sentence for people."""
        share = f"{self.value:.3f}" if self.name == "number" else f"{self.name} = {self.value:.3f}"
        if self.fpr is None or self.fnr is None:
            return f"Verdict at threshold {share}; its error rates are unknown: {self.origin}."
        what = {"frame": "faces", "video": "videos"}.get(str(self.level), "samples")
        text = (
            f"Verdict at threshold {share}, which calls {self.fpr:.1%} of real {what} fake and {self.fnr:.1%} of fake "
            f"{what} real, measured on {self.origin}."
        )
        return text + (f" {self.note}." if self.note else "")


def choose_threshold(members: Sequence[LoadedDetector], asked: str | float) -> Threshold:
    """The threshold for one detector or for an ensemble.

    Args:
        members: one has the thresholds of its calibration; several the mean of theirs, in logits, whose error rates
            nobody has measured.
        asked: ``eer``, ``fpr_1``, ``fpr_5``, or a number from 0 to 1. Without calibration ``eer`` is 0.5.

    Raises:
        ConfigError: an unknown name, or an error rate that a detector without calibration cannot promise.
    """
    stored = [member.calibration for member in members]
    calibrated = all(stored)
    band = stored[0].get("conformal") if len(stored) == 1 and stored[0] else None
    shared: dict[str, Any] = {
        "calibrated": calibrated,
        "band": {name: float(band[name]) for name in ("alpha", "low", "high")} if band else None,
    }
    if (number := _number(asked)) is not None:
        if not 0 <= number <= 1:
            raise ConfigError(f"threshold={asked}: a threshold on P(fake) lies between 0 and 1")
        return Threshold("number", number, "a number given by the user", **shared)
    name = str(asked)
    if name not in ("eer", "fpr_1", "fpr_5"):
        raise ConfigError(f"threshold={name!r}: expected eer, fpr_1, fpr_5 or a number from 0 to 1")
    without = [m.checkpoint.source for m, calibration in zip(members, stored, strict=True) if not calibration]
    if without:
        if name != "eer":
            raise ConfigError(
                f"threshold={name} needs calibration, and {', '.join(without)} has none: take a number, threshold=eer "
                "(0.5 without calibration), or calibrate it: python -m fsvfm.export ckpt=… out=… calibrate=<data>"
            )
        whose = "a member of the ensemble" if len(members) > 1 else "the detector"
        return Threshold(name, 0.5, f"{whose} is not calibrated, so 0.5 is used", **shared)
    points = [calibration["thresholds"][name] for calibration in stored if calibration]
    if len(points) > 1:
        value = float(expit(np.mean([logit(np.clip(point["threshold"], CLIP, 1 - CLIP)) for point in points])))
        origin = "the mean of the members' thresholds (in logits), never measured for the ensemble"
        return Threshold(name, value, origin, **shared)
    calibration, point = stored[0] or {}, points[0]
    return Threshold(
        name,
        float(point["threshold"]),
        str(calibration["source"]),
        fpr=float(point["fpr"]),
        fnr=float(point["fnr"]),
        level=str(calibration.get("level", "frame")),
        note=str(point.get("note", "")),
        **shared,
    )


def _number(value: str | float) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None
