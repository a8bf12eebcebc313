"""Scoring photographs and videos: every face found, cropped as in training, scored, and judged at a threshold.

Of a video every face is followed from frame to frame. A track's score is that of its frames put together: their mean
(the papers'), their mean without the lowest and highest tenth, or the mean of the five highest. What comes out, and
what decides, is told in :mod:`fsvfm.prediction`.

Faces are cut as in training: as the export says, else in squares of 1.3 times the box. A detector for face
anti-spoofing, where "fake" is an attack, then gets aligned chips instead.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image
from scipy.special import expit, logit
from yaml import YAMLError

from fsvfm.data.transforms import test_transform
from fsvfm.errors import ConfigError, DataError
from fsvfm.faces.align import align, five_points
from fsvfm.faces.crop import crop as cut
from fsvfm.faces.crop import square_crop
from fsvfm.faces.detect import Box, Detection, check_rgb, find_faces, make_detector
from fsvfm.faces.identity import Person, Recogniser
from fsvfm.faces.images import load_image, to_rgb
from fsvfm.faces.landmarks import Landmarks68
from fsvfm.faces.sources import WEBCAM, kind_of, readable
from fsvfm.faces.track import Tracker
from fsvfm.faces.video import frame_indices, probe, read_frames
from fsvfm.loaded_detector import LoadedDetector, load_detector_network
from fsvfm.metrics.calibration import CLIP, apply_temperature
from fsvfm.prediction import Face, Frame, Frames, Prediction, choose_threshold
from fsvfm.threads import ahead, in_parallel

#: Side of a crop relative to the face box in training, where the export does not tell.
SCALE = 1.3

#: A video of which more than this share cannot be read gets an error instead of a verdict.
UNREADABLE = 0.1

#: Frames that are no further apart (in seconds, at 25 a second where the file tells no rate) show a face in one place.
NEAR = 0.2

#: Most frames in which faces are looked for at the same time; each takes some 50 MB at 1280 pixels, and one core.
SEARCHED = 8

#: Frames that are decoded, and frames whose faces wait for the network, before those before them are dealt with.
DECODED, FOUND = 2, 8


def _mean(values: np.ndarray) -> float:
    return float(values.mean())


def _trimmed(values: np.ndarray) -> float:
    away = len(values) // 10
    return float(np.sort(values)[away : len(values) - away].mean())


def _top_k(values: np.ndarray) -> float:
    return float(np.sort(values)[-5:].mean())


#: Ways of putting the frames of a track together.
AGGREGATES: dict[str, Callable[[np.ndarray], float]] = {"mean": _mean, "trimmed": _trimmed, "top_k": _top_k}


# ----------------------------------------------------------------------------------------------------------- predictor


class _Found(NamedTuple):
    """A frame before its faces are scored: their ids and boxes, and their crops in the members' sizes."""

    frame: Frame
    boxes: list[tuple[int, Box]]
    faces: list[dict[int, np.ndarray]]


class Predictor:
    """Finds, crops and scores faces with one detector, or with several whose calibrated logits are averaged.

    Args:
        members: name → detector, all of one task.
        face_detector: name of the face detector; the papers' is ``dlib_hog``.
        threshold: see :func:`choose_threshold`.
        max_side: pictures with a longer side are shrunk to this for the face detector only; None searches them as
            they are (the papers).
        batch_size: faces per forward pass, and the most that are kept of a video; ``auto``: see
            :meth:`~fsvfm.loaded_detector.LoadedDetector.batch_size`.

    Attributes:
        members: the detectors.
        names: their names.
        task: ``forgery`` or ``antispoof``.
        scale: side of a crop relative to the face box.
        threshold: where verdicts come from.
        notes: what a reader of every result must know.

    Raises:
        ConfigError: no detector, detectors of different tasks or crops, an unknown face detector or threshold.
        FaceModelError: a model for finding faces, or for telling people apart, is missing.
    """

    def __init__(
        self,
        members: Mapping[str, LoadedDetector],
        *,
        face_detector: str = "dlib_hog",
        threshold: str | float = "eer",
        max_side: int | None = 1280,
        batch_size: int | str = "auto",
    ) -> None:
        if not members:
            raise ConfigError("no detector to score with; give at least one checkpoint")
        tasks = {name: member.checkpoint.meta["task"] for name, member in members.items()}
        if len(set(tasks.values())) > 1:
            listed = ", ".join(f"{name} ({task})" for name, task in tasks.items())
            raise ConfigError(f"detectors of different tasks cannot be averaged: {listed}")
        self.names, self.members = list(members), list(members.values())
        self.task = next(iter(tasks.values()))
        self.threshold = choose_threshold(self.members, threshold)
        self.face_detector, self.max_side = face_detector, max_side
        self.batch_size = min(member.batch_size(batch_size) for member in self.members)
        self.notes = [note for name, member in members.items() for note in _remarks(name, member, face_detector)]
        self._detect, self._recogniser = make_detector(face_detector), Recogniser()
        cuts = {name: _cut(member) for name, member in members.items()}
        if len(set(cuts.values())) > 1:
            listed = ", ".join(
                f"{name} ({'aligned' if a else f'{s:g} times the box'})" for name, (s, a) in cuts.items()
            )
            raise ConfigError(f"detectors trained on differently cut faces cannot be averaged: {listed}")
        self.scale, aligned = next(iter(cuts.values()))
        self._landmarks = Landmarks68() if aligned else None
        self._transforms = {size: test_transform(size) for size in {member.image_size for member in self.members}}

    # ------------------------------------------------------------------------------------------------------- faces

    def crops(self, image: np.ndarray) -> list[tuple[Box, np.ndarray]]:
        """Faces of a picture, cut as in training.

        Args:
            image: (H, W, 3) uint8 RGB.

        Returns:
            For every face, the most confident first, its box and its crop (S, S, 3) uint8 of its own size.

        Raises:
            DataError: not such an image.
        """
        return [(found.box, face) for found, face in self._faces(image)]

    def crop(self, image: np.ndarray, box: Box | Sequence[int]) -> np.ndarray:
        """One face, cut as in training: (S, S, 3) uint8.

        Raises:
            DataError: not an image of shape (H, W, 3) uint8, or a box that leaves nothing to cut.
        """
        check_rgb(image)
        box = Box(*box)
        if self._landmarks is not None:
            return align(image, five_points(self._landmarks(image, box))).image
        return cut(image, *square_crop(box, image.shape[1], image.shape[0], self.scale))

    def _faces(self, image: np.ndarray) -> list[tuple[Detection, np.ndarray]]:
        faces = []
        for found in find_faces(self._detect, image, self.max_side):
            try:
                faces.append((found, self.crop(image, found.box)))
            except DataError:  # a box beyond the edge, landmarks in one point: nothing there to score
                continue
        return faces

    def member_scores(self, faces: Sequence[np.ndarray]) -> np.ndarray:
        """Raw P(fake) of crops by every member.

        Args:
            faces: crops (H, W, 3) uint8 RGB of any size.

        Returns:
            (N, M) float64.

        Raises:
            DataError: not such crops.
        """
        for face in faces:
            check_rgb(face)
        return self._member_scores([self._prepared(face) for face in faces])

    def score_faces(self, faces: Sequence[np.ndarray]) -> np.ndarray:
        """Calibrated P(fake) of crops.

        Args:
            faces: crops (H, W, 3) uint8 RGB of any size.

        Returns:
            (N,) float64 in [0, 1].

        Raises:
            DataError: not such crops.
        """
        return self._combined(self.member_scores(faces))[1]

    def _prepared(self, face: np.ndarray) -> dict[int, np.ndarray]:
        """A crop in the sizes that the members take; a large crop need not be kept."""
        return {size: transform(face) for size, transform in self._transforms.items()}

    def _member_scores(self, faces: Sequence[Mapping[int, np.ndarray]]) -> np.ndarray:
        scores = np.empty((len(faces), len(self.members)))
        for start in range(0, len(faces), self.batch_size):
            rows = slice(start, start + self.batch_size)
            for column, member in enumerate(self.members):
                images = np.stack([face[member.image_size] for face in faces[rows]]).transpose(0, 3, 1, 2)
                scores[rows, column] = member.score(torch.from_numpy(np.ascontiguousarray(images))).cpu().numpy()
        return scores

    def _combined(self, raw: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(N, M) raw scores to score (N,), probability (N,) and every member's probability (N, M)."""
        if not np.isfinite(raw).all():
            names = [name for name, column in zip(self.names, raw.T, strict=True) if not np.isfinite(column).all()]
            raise DataError(f"{', '.join(names)} gave scores that are not finite; is the checkpoint damaged?")
        members = np.stack(
            [
                apply_temperature(column, member.calibration["temperature"]) if member.calibration else column
                for column, member in zip(raw.T, self.members, strict=True)
            ],
            axis=1,
        )
        if raw.shape[1] == 1:
            return raw[:, 0], members[:, 0], members
        means = [expit(logit(np.clip(values, CLIP, 1 - CLIP)).mean(axis=1)) for values in (raw, members)]
        return means[0], means[1], members

    # ------------------------------------------------------------------------------------------------------ inputs

    def predict(
        self,
        x: str | Path | np.ndarray | Image.Image,
        *,
        frames: int = 32,
        aggregate: str = "mean",
        crop: bool = True,
        advance: Callable[[int, int], None] | None = None,
    ) -> Prediction:
        """Score a photograph or a video.

        Args:
            x: a file, ``webcam:0``, a Pillow picture, or an array (H, W, 3) uint8 RGB.
            frames: how many of a video, evenly spaced; 0 takes all. Of a camera the next ones; 0 until interrupted.
            aggregate: how the frames of a track are put together, a key of :data:`AGGREGATES`.
            crop: False takes pictures that are face crops already, whole.
            advance: called with the numbers of frames done and in all, as a video is scored.

        Raises:
            DataError: the input cannot be read, or more than a tenth of a video cannot.
            ConfigError: an unknown aggregate or an impossible number of frames.
        """
        if aggregate not in AGGREGATES:
            raise ConfigError(f"aggregate={aggregate!r}: expected one of {', '.join(AGGREGATES)}")
        if frames < 0:
            raise ConfigError(f"frames={frames}: expected 0 (all) or more")
        if not isinstance(x, str | Path):
            image = to_rgb(x, "the picture") if isinstance(x, Image.Image) else x
            return self._photo(image, getattr(x, "filename", "") or "picture", crop)
        kind = kind_of(x)
        if kind == "photo":
            prediction = self._photo(load_image(x), str(x), crop)
            prediction.notes += _animation(x)
            return prediction
        if kind == "video":
            return self._video(str(x), frames, aggregate, crop, advance)
        # One by one: what is waiting in a batch would be lost when the recording is interrupted.
        tracker = Tracker()
        found = self._scored(self._found(_camera(str(x), frames), crop, tracker), _of(advance, frames), batch=1)
        return self._followed(str(x), kind, Frames(_until_interrupted(found)), tracker, aggregate, [])

    def failed(self, source: str, kind: str, error: str) -> Prediction:
        """The result of an input that cannot be scored."""
        return Prediction(source, kind, threshold=self.threshold.describe(), notes=list(self.notes), error=error)

    def _photo(self, image: np.ndarray, source: str, crop: bool) -> Prediction:
        check_rgb(image)
        (frame,) = self._scored(self._found([(0, None, image)], crop))
        return self._judged(Prediction(source, "photo", faces=frame.faces, frames=[frame]), [])

    def _video(
        self, source: str, frames: int, aggregate: str, crop: bool, advance: Callable[[int, int], None] | None
    ) -> Prediction:
        info = probe(source)
        indices = frame_indices(info.frames, frames)
        problems: list[str] = []

        def wanted() -> Iterator[tuple[int, float | None, np.ndarray]]:
            try:
                for index, image in read_frames(source, indices):
                    yield index, index / info.rate if info.rate else None, image
            except DataError as error:
                problems.append(str(error))

        # Decoding, finding faces and the network overlap. Other face detectors are networks, with threads of their own.
        threads = min(torch.get_num_threads(), SEARCHED) if self.face_detector == "dlib_hog" else 1
        seconds = (indices[-1] - indices[0]) / max(len(indices) - 1, 1) / (info.rate or 25)
        tracker = Tracker(near=seconds <= NEAR or not crop)
        with (
            closing(ahead(wanted(), DECODED)) as images,
            closing(self._found(images, crop, tracker, threads)) as found,
        ):
            done = Frames(self._scored(found, _of(advance, len(indices))))
        absent = max(info.claimed - info.frames, 0) / max(info.claimed, 1)
        missed = len(indices) - len(done)
        if not done or absent > UNREADABLE or missed > UNREADABLE * len(indices):
            raise DataError(
                problems[0]
                if problems
                else f"{readable(source)} is truncated: it holds {info.frames} of {info.claimed} frames. Fetch it again"
            )
        notes = [f"{missed} of {len(indices)} frames could not be read"] if missed else []
        if absent:
            notes.append(f"the file holds {info.frames} of the {info.claimed} frames that it claims")
        return self._followed(source, "video", done, tracker, aggregate, notes)

    def _found(
        self,
        images: Iterable[tuple[int, float | None, np.ndarray]],
        crop: bool,
        tracker: Tracker | None = None,
        threads: int = 0,
    ) -> Generator[_Found]:
        """Faces of frames, followed by a tracker, or numbered where there is none; looked for here, or in threads."""

        def look(
            picture: tuple[int, float | None, np.ndarray],
        ) -> tuple[Frame, list[Detection], list[Person] | None, list[dict[int, np.ndarray]]]:
            index, time, image = picture
            faces = self._faces(image) if crop else [_whole(image)]
            people = None
            if tracker is not None and crop:  # pictures that are face crops already show one person
                people = [self._recogniser(image, found.box) for found, _ in faces]
                if not tracker.near:
                    _ = [person.descriptor for person in people]  # all are needed; here, while the network computes
            prepared = [self._prepared(face) for _, face in faces]
            return Frame(index, time, []), [found for found, _ in faces], people, prepared

        looking = in_parallel(look, images, threads, threads + FOUND) if threads else (look(each) for each in images)
        with closing(looking) as looked:
            for frame, detections, people, faces in looked:
                ids = range(len(detections)) if tracker is None else tracker(detections, people)
                boxes = [(identity, each.box) for identity, each in zip(ids, detections, strict=True)]
                yield _Found(frame, boxes, faces)

    def _scored(
        self, found: Iterable[_Found], advance: Callable[[int], None] | None = None, batch: int | None = None
    ) -> Iterator[Frame]:
        """Score frames as they come: never more than a batch of small faces is kept."""
        waiting: list[_Found] = []
        for number, each in enumerate(found, start=1):
            waiting.append(each)
            if max(sum(len(one.faces) for one in waiting), len(waiting)) >= (batch or self.batch_size):
                yield from self._finish(waiting)
                waiting = []
            if advance is not None:
                advance(number)
        yield from self._finish(waiting)

    def _finish(self, waiting: Sequence[_Found]) -> Iterator[Frame]:
        score, probability, members = self._combined(self._member_scores([f for each in waiting for f in each.faces]))
        place = 0
        for frame, boxes, _ in waiting:
            for identity, box in boxes:
                frame.faces.append(
                    self._face(identity, box, float(score[place]), float(probability[place]), members[place])
                )
                place += 1
            yield frame

    def _face(
        self, identity: int, box: Box, score: float, probability: float, members: np.ndarray, frames: int = 1
    ) -> Face:
        named = dict(zip(self.names, members.tolist(), strict=True)) if len(self.names) > 1 else {}
        return Face(identity, box, score, probability, self.threshold.verdict(probability), named, frames)

    def _followed(
        self, source: str, kind: str, frames: Frames, tracker: Tracker, aggregate: str, notes: Sequence[str]
    ) -> Prediction:
        """The result of a video from its scored frames, and who turned out to be whom."""
        frames.rename(tracker.aliases)
        together = AGGREGATES[aggregate]
        faces = []
        for track in frames.tracks():
            score, probability, *members = (together(column) for column in track.values.T)
            faces.append(self._face(track.id, track.box, score, probability, np.array(members), len(track.values)))
        prediction = Prediction(source, kind, faces=faces, frames=frames, aggregate=aggregate)
        return self._judged(prediction, notes)

    def _judged(self, prediction: Prediction, notes: Sequence[str]) -> Prediction:
        prediction.threshold = self.threshold.describe()
        prediction.notes = [*self.notes, *notes]
        face = prediction.decisive
        prediction.verdict = "no face" if face is None else face.verdict
        if face is not None:
            prediction.score, prediction.probability = face.score, face.probability
        return prediction


def _of(advance: Callable[[int, int], None] | None, total: int) -> Callable[[int], None] | None:
    """Progress with the total filled in."""
    return None if advance is None else (lambda done: advance(done, total))


def _whole(image: np.ndarray) -> tuple[Detection, np.ndarray]:
    """A picture that is a face crop already."""
    return Detection(Box(0, 0, image.shape[1], image.shape[0]), 0.0), image


def _animation(path: str | Path) -> list[str]:
    try:
        with Image.open(path) as image:
            several = image.format != "MPO" and getattr(image, "is_animated", False)
    except Exception:  # the picture itself was read; how many follow it is not worth an error
        return []
    return ["it holds several pictures; only the first one was scored"] if several else []


def _camera(source: str, frames: int) -> Iterator[tuple[int, float | None, np.ndarray]]:
    """Frames of a camera with the time since the first, until so many were read or the camera stops."""
    import time

    import cv2

    camera = cv2.VideoCapture(int(source.removeprefix(WEBCAM)))
    try:
        start, index = time.monotonic(), 0
        while frames == 0 or index < frames:
            read, image = camera.read()
            if not read:
                if index == 0:
                    raise DataError(f"{source}: no camera answers there; is it connected, and may it be used?")
                return
            yield index, time.monotonic() - start, cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
            index += 1
    finally:
        camera.release()


def _until_interrupted(frames: Iterator[Frame]) -> Iterator[Frame]:
    try:
        yield from frames
    except KeyboardInterrupt:  # Ctrl-C is how one ends a recording
        return


# ------------------------------------------------------------------------------------------------------------- loading


def load_detector(
    source: str | Path | Sequence[str | Path] | Mapping[str, str | Path],
    *,
    device: str = "auto",
    face_detector: str = "dlib_hog",
    threshold: str | float = "eer",
    max_side: int | None = 1280,
    batch_size: int | str = "auto",
    precision: str = "32-true",
) -> Predictor:
    """Load a detector, or an ensemble, for photographs and videos.

    Args:
        source: an export, a run folder, a released checkpoint, ``hf://…`` or ``zoo:…``; several, or name → checkpoint,
            make an ensemble.
        device: ``cpu``, ``cuda`` or ``auto`` (the GPU where there is one).
        face_detector: name of the face detector.
        threshold: ``eer``, ``fpr_1``, ``fpr_5`` or a number; see :func:`choose_threshold`.
        max_side: see :class:`Predictor`.
        batch_size: see :class:`Predictor`.
        precision: of the networks, one of :data:`~fsvfm.loaded_detector.PRECISIONS`.

    Raises:
        CheckpointError: no detector there, or it lacks its normalisation.
        ConfigError: as :class:`Predictor`; a device or precision that does not exist.
        FaceModelError: as :class:`Predictor`.
    """
    if device not in ("auto", "cpu") and not device.startswith("cuda"):
        raise ConfigError(f"device={device!r}: expected auto, cpu or cuda")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device={device}: no CUDA device here; device=cpu works everywhere")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    members = {
        name: load_detector_network(path, device=device, precision=precision)
        for name, path in member_sources(source).items()
    }
    predictor = Predictor(
        members, face_detector=face_detector, threshold=threshold, max_side=max_side, batch_size=batch_size
    )
    for note in predictor.notes:
        warnings.warn(note, stacklevel=2)
    return predictor


def member_sources(source: str | Path | Sequence[str | Path] | Mapping[str, str | Path]) -> dict[str, str]:
    """Name → checkpoint; what has no name is called after its run folder or file."""
    if isinstance(source, Mapping):
        return {str(name): str(path) for name, path in source.items()}
    named: dict[str, str] = {}
    for path in [source] if isinstance(source, str | Path) else source:
        parts = [part for part in Path(str(path)).with_suffix("").parts if part not in ("export", "checkpoints", "/")]
        base = parts[-1] if parts else str(path)
        name, number = base, 1
        while name in named:
            number += 1
            name = f"{base}_{number}"
        named[name] = str(path)
    return named


def _cut(member: LoadedDetector) -> tuple[float, bool]:
    """How a detector's training faces were cut: the crop's side relative to the box, and whether they were aligned."""
    known = (member.checkpoint.meta.get("provenance") or {}).get("faces") or {}
    aligned = bool(known.get("align", member.checkpoint.meta["task"] == "antispoof"))
    return (SCALE if aligned else float(known.get("scale", SCALE))), aligned


def _remarks(name: str, member: LoadedDetector, face_detector: str) -> list[str]:
    """What every reader of a detector's results must know."""
    remarks = []
    if _is_demo(member):
        remarks.append(
            f"{name} is a demo detector: minutes of training on a few hundred faces with coarse forgeries made by this "
            "software. Its numbers show that everything works and say nothing about this picture"
        )
    known = (member.checkpoint.meta.get("provenance") or {}).get("faces") or {}
    if known.get("detector", face_detector) != face_detector:
        remarks.append(
            f"{name} was trained on faces found by {known['detector']}, and here they are found by {face_detector}, "
            f"whose boxes are others; face_detector={known['detector']} finds the same"
        )
    if member.precision != "32-true":
        remarks.append(
            f"{name} is computed in {member.precision}, its thresholds were found in float32; what that does to scores "
            f"and AUC is measured by fsvfm.evaluate with evaluate.precision={member.precision}"
        )
    return remarks


def _is_demo(member: LoadedDetector) -> bool:
    """Whether a detector was trained on the demo's data, as far as the export or the run folder around it tells."""
    provenance = member.checkpoint.meta.get("provenance") or {}
    told = [provenance.get("dataset"), provenance.get("data"), _trained_on(member.checkpoint.source)]
    told.append(((provenance.get("hyper_parameters") or {}).get("model") or {}).get("init"))
    return any(part.startswith("demo_") for text in told if isinstance(text, str) for part in Path(text).parts)


def _trained_on(source: str) -> str | None:
    """Name of the data of the run that a checkpoint lies in, where there is such a folder around it."""
    for folder in list(Path(source).expanduser().absolute().parents)[:2]:
        try:
            config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"), resolve=False)
            return str(config["data"]["name"])  # type: ignore[call-overload, index]
        except (OSError, YAMLError, KeyError, TypeError):  # no run, or a file of another program
            continue
    return None
