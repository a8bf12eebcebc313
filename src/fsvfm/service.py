"""Scoring what strangers send: limits, a queue, worker processes and temporary files; no web framework in here.

Every upload is dealt with in a process of its own kind, which holds the detector. A file that crashes a decoder, or
takes longer than it may, costs that process and nobody else's answer: it is ended, and a new one takes its place. What
an upload may be is checked there too, before anything is decoded. Files live in one temporary folder, each in its own
sub-folder from its arrival until its answer is ready; results are kept in memory only, the latest few.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import queue
import secrets
import shutil
import signal
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from fsvfm.errors import ConfigError, DataError, FsvfmError

if TYPE_CHECKING:
    import numpy as np

    from fsvfm.explain import Reconstructor
    from fsvfm.prediction import Prediction
    from fsvfm.predictor import Predictor

#: Pictures that are decoded; Pillow knows others that would start programs (EPS) or open further files.
PICTURES = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")

#: Containers of videos that are opened; a playlist would make FFmpeg read other files of this machine.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,asf"

#: Seconds that a process may take to load its models.
START_SECONDS = 300

#: Faces of a result that can be explained, and their longest side in pixels.
SHOWN, CROP_SIDE = 12, 1024

#: Bytes of faces that are kept for explanations; the oldest results make room.
KEPT = 64_000_000

#: Longest side of an annotated picture.
PICTURE_SIDE = 1600

#: Seconds after which an upload that nobody asked to score is removed.
FORGOTTEN = 300


class Busy(FsvfmError):
    """All places are taken: try again later."""


class TooSlow(FsvfmError):
    """An upload took longer than it may."""


class Stopped(FsvfmError):
    """The service is shutting down."""


@dataclass(frozen=True)
class Limits:
    """What an upload may cost.

    Attributes:
        max_upload_mb: size of a request's body in MB (10⁶ bytes).
        max_pixels: of a picture, or of a frame.
        max_video_seconds: length of a video.
        max_seconds: processing time of one upload, from the moment that a process takes it.
        concurrency: worker processes, that is uploads at the same time.
        queue: uploads that may wait for one.

    Raises:
        ConfigError: an impossible value.
    """

    max_upload_mb: float = 100
    max_pixels: int = 30_000_000
    max_video_seconds: float = 600
    max_seconds: float = 120
    concurrency: int = 1
    queue: int = 16

    def __post_init__(self) -> None:
        for name in ("max_upload_mb", "max_pixels", "max_video_seconds", "max_seconds", "concurrency"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)}: expected a number above 0")
        if not 0 <= self.queue <= 32 - self.concurrency:
            raise ConfigError(
                f"queue={self.queue}, concurrency={self.concurrency}: expected 0 or more waiting, and 32 together"
            )

    @property
    def max_bytes(self) -> int:
        """Size of a request's body."""
        return int(self.max_upload_mb * 1_000_000)

    def text(self) -> str:
        """One line for people."""
        return (
            f"up to {self.max_upload_mb:g} MB, {self.max_pixels / 1e6:g} million pixels, "
            f"{self.max_video_seconds:g} s of video and {self.max_seconds:g} s of processing"
        )


# ------------------------------------------------------------------------------------------------------ what came in


@dataclass
class Upload:
    """A file that was sent.

    Attributes:
        token: stands for it; 128 random bits.
        folder: where it lies, under a name of our own.
        name: what the sender calls it, for reading only.
        arrived: on the monotonic clock.
    """

    token: str
    folder: Path
    name: str = "upload"
    arrived: float = field(default_factory=time.monotonic)

    @property
    def path(self) -> Path:
        """The file; of its name only a suffix is kept that says photograph or video, which decides how it is read."""
        from fsvfm.faces.sources import PHOTO_SUFFIXES
        from fsvfm.faces.video import VIDEO_SUFFIXES

        suffix = PurePosixPath(self.name).suffix.lower()
        return self.folder / f"input{suffix if suffix in (*PHOTO_SUFFIXES, *VIDEO_SUFFIXES) else ''}"


def plain_name(name: str | None) -> str:
    """The last part of a file's name as sent, without folders and signs that cannot be seen; at most 120 signs."""
    last = PurePosixPath((name or "").replace("\\", "/")).name
    seen = "".join(sign for sign in last if sign.isprintable())
    return seen[-120:].strip(" .") or "upload"


@dataclass
class Scored:
    """A result.

    Attributes:
        record: as ``fsvfm/prediction.schema.json`` says.
        token: stands for the faces, if they were kept; empty otherwise.
        faces: ids of the faces that can be explained.
        annotated: JPEG of the photograph, or of the video's most suspicious frame; None without one.
        timeline: PNG; None for a photograph.
    """

    record: dict[str, Any]
    token: str = ""
    faces: tuple[int, ...] = ()
    annotated: bytes | None = None
    timeline: bytes | None = None


class Service:
    """Scores uploads within limits.

    Args:
        settings: ``ckpt``, ``encoder``, ``frames``, ``aggregate`` and what
            :func:`~fsvfm.predictor.load_detector` takes.
        limits: of every upload.

    Attributes:
        folder: temporary, removed by :meth:`close`; ``uploads`` in it holds what is being dealt with, ``work`` what
            libraries leave behind.
        facts: about the detector: ``task``, ``names``, ``threshold`` in words, ``notes``, and a ``blank`` record
            of an upload that failed.

    Raises:
        FsvfmError: the models cannot be loaded.
    """

    def __init__(self, settings: Mapping[str, Any], limits: Limits) -> None:
        self.limits = limits
        self.folder = Path(tempfile.mkdtemp(prefix="fsvfm-serve-"))
        self._lock = threading.Lock()
        self._inside = 0
        self._closed = False
        self._uploads: dict[str, Upload] = {}
        self._kept: OrderedDict[str, dict[int, bytes]] = OrderedDict()
        self._idle: queue.Queue[Worker] = queue.Queue()
        for name in ("uploads", "work"):
            (self.folder / name).mkdir()
        shared = {**settings, "limits": limits, "folder": self.folder / "work"}
        self._workers = [Worker(shared) for _ in range(limits.concurrency)]
        try:
            for worker in self._workers:
                self.facts = worker.wait()
                self._idle.put(worker)
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------------------------------------------ uploads

    def expect(self) -> Upload:
        """Room for a file that is coming: to be filled, named, and given to :meth:`score` or :meth:`remove`.

        Raises:
            Busy: too many lie there already.
            Stopped: the service is shutting down.
        """
        self.forget()
        token = secrets.token_hex(16)
        upload = Upload(token, self.folder / "uploads" / token)
        with self._lock:
            if self._closed:
                raise Stopped("the service is shutting down")
            if len(self._uploads) >= self.limits.queue + 2 * self.limits.concurrency:
                raise Busy("too many uploads at once; try again in a minute")
            self._uploads[token] = upload
        upload.folder.mkdir()
        return upload

    def find(self, token: object) -> Upload | None:
        """The upload that a token stands for."""
        with self._lock:
            return self._uploads.get(token) if isinstance(token, str) else None

    def remove(self, upload: Upload) -> None:
        """Delete an upload; it may be gone already."""
        with self._lock:
            self._uploads.pop(upload.token, None)
        shutil.rmtree(upload.folder, ignore_errors=True)

    def forget(self) -> None:
        """Delete uploads that nobody asked to score, or whose answer nobody can be waiting for any more."""
        limits = self.limits
        longest = FORGOTTEN + limits.max_seconds * (limits.queue + 2) / limits.concurrency
        with self._lock:
            old = [each for each in self._uploads.values() if time.monotonic() - each.arrived > longest]
        for each in old:
            self.remove(each)

    def state(self) -> dict[str, Any]:
        """Whether uploads are taken, by what, and how many there are."""
        return {
            "status": "stopping" if self._closed else "ok",
            "version": metadata.version("fsvfm"),
            "task": self.facts["task"],
            "members": self.facts["names"],
            "uploads": self._inside,
        }

    # --------------------------------------------------------------------------------------------------------- jobs

    def score(self, upload: Upload, *, pictures: bool = False) -> Scored:
        """Score an upload and delete it, whatever happens.

        Args:
            upload: complete.
            pictures: make pictures of the result, and keep the faces for :meth:`explain` and :meth:`mask`.

        Returns:
            the result; what is wrong with the file is its ``error``.

        Raises:
            Busy: too many are waiting.
            TooSlow: it took longer than it may.
            Stopped: the service is shutting down.
        """
        try:
            scored, crops = self._run("score", path=str(upload.path), name=upload.name, pictures=pictures)
        except DataError as error:  # it crashed its process
            return Scored({**self.facts["blank"], "source": upload.name, "error": f"{upload.name}: {error}"})
        finally:
            self.remove(upload)
        if crops:
            scored.token, scored.faces = secrets.token_hex(16), tuple(crops)
            with self._lock:
                self._kept[scored.token] = crops
                sizes = [sum(map(len, faces.values())) for faces in self._kept.values()]
                while sum(sizes) > KEPT and len(sizes) > 1:
                    self._kept.popitem(last=False)
                    del sizes[0]
        return scored

    def explain(self, token: str, face: int) -> list[dict[str, Any]]:
        """Why a face of a kept result got its score, by every member: see :meth:`Desk.explain`.

        Raises:
            DataError: the result is no longer kept.
            Busy, TooSlow, Stopped: as :meth:`score`.
        """
        return self._run("explain", crop=self._crop(token, face))

    def mask(self, token: str, face: int, ratio: float, seed: int) -> dict[str, Any]:
        """A face of a kept result under every masking strategy: see :meth:`Desk.mask`.

        Raises:
            DataError: the result is no longer kept; no landmarks in the face.
            Busy, TooSlow, Stopped: as :meth:`score`.
        """
        return self._run("mask", crop=self._crop(token, face), ratio=ratio, seed=seed)

    def _crop(self, token: str, face: int) -> bytes:
        with self._lock:
            crops = self._kept.get(token, {})
        if face not in crops:
            raise DataError("this face is no longer kept; drop the photograph or video again")
        return crops[face]

    def _run(self, task: str, **arguments: Any) -> Any:
        with self._place(), self._worker() as worker:
            try:
                return worker.do(task, arguments, self.limits.max_seconds)
            except FsvfmError:
                if self._closed:
                    raise Stopped("the service is shutting down") from None
                raise

    @contextmanager
    def _place(self) -> Iterator[None]:
        """One of the places of those being served and those waiting."""
        with self._lock:
            if self._closed:
                raise Stopped("the service is shutting down")
            if self._inside >= self.limits.concurrency + self.limits.queue:
                raise Busy(f"{self.limits.queue} uploads are waiting already; try again in a minute")
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1

    @contextmanager
    def _worker(self) -> Iterator[Worker]:
        worker = self._idle.get()
        try:
            if self._closed:
                raise Stopped("the service is shutting down")
            yield worker
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """End the processes and delete every file."""
        self._closed = True
        for worker in self._workers:
            worker.end()
        shutil.rmtree(self.folder, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------ process


class Worker:
    """A process that holds the models, seen from the service; it is replaced when it dies or must be ended."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = settings
        self._ended = False
        self._lock = threading.Lock()
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy the locks of this process's threads
        self._link, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, self._settings), daemon=True)
        self._process.start()
        theirs.close()
        self._facts: dict[str, Any] | None = None

    def wait(self) -> dict[str, Any]:
        """What the process tells once its models are loaded.

        Raises:
            ConfigError: they cannot be loaded.
        """
        if self._facts is None:
            try:
                if not self._link.poll(START_SECONDS):
                    raise ConfigError(f"the detector took longer than {START_SECONDS} s to load")
                kind, told = self._link.recv()
            except (EOFError, OSError):
                raise ConfigError("the process that loads the detector died; is there enough memory?") from None
            if kind != "ready":
                raise ConfigError(told)
            self._facts = told
        return self._facts

    def do(self, task: str, arguments: Mapping[str, Any], seconds: float) -> Any:
        """Have a method of :class:`Desk` run.

        Raises:
            DataError: what the method raises, or the process died over it.
            TooSlow: it was ended after so many seconds.
        """
        if not self._process.is_alive():  # ended by somebody else while it had nothing to do
            self._replace()
        self.wait()
        try:
            self._link.send((task, arguments))
            if not self._link.poll(seconds):
                self._replace()
                raise TooSlow(f"it took longer than the limit of {seconds:g} s")
            kind, answer = self._link.recv()
        except (EOFError, OSError):
            self._replace()
            raise DataError("the file made its reader crash; it is damaged") from None
        if kind != "done":
            raise DataError(answer)
        return answer

    def _replace(self) -> None:
        with self._lock:
            self._kill()
            self._link.close()
            if not self._ended:
                self._start()

    def end(self) -> None:
        """End the process for good."""
        with self._lock:
            self._ended = True
            self._kill()

    def _kill(self) -> None:
        self._process.kill()
        self._process.join()


def _work(link: Connection, settings: Mapping[str, Any]) -> None:
    """Main function of a process: load the models, then do what is asked until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    tempfile.tempdir = os.environ["TMPDIR"] = str(settings["folder"])  # of libraries that are never told to clean up
    try:
        desk = Desk(settings)
    except Exception as error:
        link.send(("failed", str(error) if isinstance(error, FsvfmError) else f"{type(error).__name__}: {error}"))
        return
    link.send(("ready", desk.facts()))
    while True:
        try:
            task, arguments = link.recv()
        except EOFError:  # the service is gone
            return
        try:
            answer = ("done", getattr(desk, task)(**arguments))
        except FsvfmError as error:
            answer = ("refused", str(error))
        except Exception as error:  # its text may name files of this machine
            answer = ("refused", f"it cannot be dealt with ({type(error).__name__})")
        link.send(answer)


class Desk:
    """What a process does: everything that touches an upload's content.

    Args:
        settings: see :class:`Service`, with its ``limits``.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        import warnings

        import torch

        from fsvfm.faces.parse import make_parser
        from fsvfm.predictor import load_detector

        limits: Limits = settings["limits"]
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // limits.concurrency))
        self.limits = limits
        self.options = {name: settings[name] for name in ("frames", "aggregate")}
        names = ("device", "face_detector", "threshold", "max_side", "batch_size")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the notes say the same, and every answer has them
            self.predictor: Predictor = load_detector(settings["ckpt"], **{name: settings[name] for name in names})
        self.parser = make_parser("landmarks")
        self.encoder: Reconstructor | None = None
        if settings["encoder"] is not None:
            from fsvfm.explain import load_reconstructor

            self.encoder = load_reconstructor(settings["encoder"])

    def facts(self) -> dict[str, Any]:
        """See :class:`Service`."""
        predictor = self.predictor
        return {
            "task": predictor.task,
            "names": predictor.names,
            "threshold": predictor.threshold.text(),
            "notes": predictor.notes,
            "blank": predictor.failed("upload", "photo", "").to_dict(),
        }

    # -------------------------------------------------------------------------------------------------------- score

    def score(self, path: str, name: str, pictures: bool) -> tuple[Scored, dict[int, bytes]]:
        """Score a file: the result, and PNGs of its faces by their id if pictures are asked for."""
        from fsvfm.faces.sources import kind_of

        kind = "photo"
        try:
            kind = kind_of(path)
            self._vet(path, kind)
            prediction = self.predictor.predict(path, **self.options)
        except FsvfmError as error:
            prediction = self.predictor.failed(name, kind, str(error).replace(path, name))
        except Exception as error:  # decoders raise anything on damaged data, and may name files of this machine
            prediction = self.predictor.failed(name, kind, f"{name} cannot be scored ({type(error).__name__})")
        scored, crops = Scored({}), dict[int, bytes]()
        if pictures and prediction.error is None:
            try:
                scored, crops = self._with_pictures(prediction, Path(path), name)
            except Exception as error:  # the scores are there; a picture that is not must not take them along
                prediction.notes.append(f"no pictures could be made ({type(error).__name__})")
        prediction.source = name
        prediction.notes = [note.replace(path, name) for note in prediction.notes]
        scored.record = prediction.to_dict()
        return scored, crops

    def _vet(self, path: str, kind: str) -> None:
        """Refuse what is too large or too long before it is decoded, and formats that are not to be opened at all."""
        if Path(path).stat().st_size == 0:
            raise DataError(f"{path} is empty (0 bytes)")
        size = self._photo_size(path) if kind == "photo" else self._video_size(path)
        if size[0] * size[1] > self.limits.max_pixels:
            raise DataError(
                f"{path} has {size[0]}×{size[1]} pixels; the limit here is {self.limits.max_pixels:,} in all"
            )

    def _photo_size(self, path: str) -> tuple[int, int]:
        import warnings

        from PIL import Image, UnidentifiedImageError

        from fsvfm.faces.images import what_it_is

        try:
            Image.init()
            known = [name for name in PICTURES if name in Image.OPEN]
            with warnings.catch_warnings(), Image.open(path, formats=known) as image:
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                return image.size
        except UnidentifiedImageError:
            raise DataError(f"{path} is not a picture: {what_it_is(Path(path), 'this service')}") from None
        except Image.DecompressionBombError:
            raise DataError(f"{path} claims too many pixels; the limit is {self.limits.max_pixels:,}") from None
        except Exception as error:
            raise DataError(f"{path} cannot be decoded; it is truncated or damaged") from error

    def _video_size(self, path: str) -> tuple[int, int]:
        import av
        import av.error

        from fsvfm.faces.images import what_it_is

        try:
            opened = av.open(path, options={"protocol_whitelist": "file", "format_whitelist": CONTAINERS})
        except (av.error.FFmpegError, OSError, ValueError):
            raise DataError(f"{path} is not a video: {what_it_is(Path(path), 'this service')}") from None
        with opened as container:
            seconds = (container.duration or 0) / 1_000_000
            if seconds > self.limits.max_video_seconds:
                raise DataError(
                    f"{path} is {seconds:.0f} s long; the limit here is {self.limits.max_video_seconds:g} s. "
                    "Cut out the part in question"
                )
            sizes = [(stream.width, stream.height) for stream in container.streams.video]
            return max(sizes, key=lambda size: size[0] * size[1], default=(0, 0))

    def _with_pictures(self, prediction: Prediction, path: Path, name: str) -> tuple[Scored, dict[int, bytes]]:
        from fsvfm.annotate import draw, timeline
        from fsvfm.faces.images import load_image
        from fsvfm.faces.video import read_frames

        scored = Scored({})
        if prediction.kind == "photo":
            image, faces = load_image(path), prediction.faces
            crops = {face.id: _crop_png(self.predictor.crop(image, face.box)) for face in faces[:SHOWN]}
            scored.annotated = _jpeg(draw(image, faces))
            return scored, crops
        crops = {}
        if (peak := prediction.peak) is not None:
            frame, face = peak
            for _, image in read_frames(path, [frame.index]):
                scored.annotated = _jpeg(draw(image, frame.faces))
                crops[face.id] = _crop_png(self.predictor.crop(image, face.box))
        prediction.source = name  # the plot's title
        scored.timeline = timeline(prediction, path.with_name("timeline")).read_bytes()
        return scored, crops

    # --------------------------------------------------------------------------------------------- about one face

    def explain(self, crop: bytes) -> list[dict[str, Any]]:
        """Explanations of a face by every member.

        Returns:
            for each member its ``name``, ``probability``, ``views`` (title, unit, limits, JPEG ``picture``),
            ``regions`` (name → logit, probability), ``omitted`` views with reasons, and ``notes``.
        """
        from fsvfm.explain import VIEWS, explain

        face = _from_png(crop)
        found = []
        for name, member in zip(self.predictor.names, self.predictor.members, strict=True):
            explained = explain(member, face, parser=self.parser, encoder=self.encoder)
            views = [
                {
                    "title": VIEWS[view].title,
                    "unit": VIEWS[view].unit,
                    "signed": VIEWS[view].signed,
                    "limits": [value * (100 if view == "rollout" else 1) for value in explained.limits(view)],
                    "picture": _jpeg(explained.overlay(view)),
                }
                for view in explained.patches
            ]
            found.append(
                {
                    "name": name,
                    "probability": explained.probability,
                    "face": _jpeg(face),
                    "views": views,
                    "regions": {region: (e.logit, e.probability) for region, e in explained.regions.items()},
                    "omitted": {VIEWS[view].title: reason for view, reason in explained.omitted.items()},
                    "notes": explained.notes,
                }
            )
        return found

    def mask(self, crop: bytes, ratio: float, seed: int) -> dict[str, Any]:
        """A face under every masking strategy, with what the pre-trained network predicts from the rest.

        Returns:
            JPEGs: the ``face``, its ``regions``, and under ``strategies`` for each its ``masked`` face (grey: hidden,
            red: the covered region) and ``predicted``, None without an encoder; and whether it ``reconstructs``.

        Raises:
            DataError: no landmarks in the face.
        """
        import numpy as np
        import torch

        from fsvfm.explain import reconstruct
        from fsvfm.faces.images import LABEL_COLOURS, resize
        from fsvfm.masking import STRATEGIES, Masker
        from fsvfm.regions import region_grid

        config = self.encoder.network.encoder.config if self.encoder else None
        size, patch = (config.image_size, config.patch_size) if config else (224, 16)
        face = resize(_from_png(crop), size)
        labels = self.parser(face)
        if labels is None:
            raise DataError("no facial landmarks were found in this face, and masking needs them")
        grid = torch.from_numpy(region_grid(labels, patch))[None]
        strategies = {}
        for name in STRATEGIES:
            masks = Masker(name, ratio)(grid, generator=torch.Generator().manual_seed(seed))
            hidden, covered = (
                np.kron(flags[0].view(size // patch, -1).numpy(), np.ones((patch, patch))).astype(bool)
                for flags in masks
            )
            masked = np.where(hidden[..., None], 128, face).astype(np.uint8)
            masked[covered] = (200, 60, 60)
            predicted = reconstruct(self.encoder, face, masks.masked) if self.encoder else None
            strategies[name] = {"masked": _jpeg(masked), "predicted": None if predicted is None else _jpeg(predicted)}
        coloured = (0.45 * face + 0.55 * np.asarray(LABEL_COLOURS)[labels]).astype(np.uint8)
        made = {"face": _jpeg(face), "regions": _jpeg(coloured), "strategies": strategies}
        return {**made, "reconstructs": self.encoder is not None}


def _jpeg(image: np.ndarray) -> bytes:
    """A picture to look at, (H, W, 3) uint8, as JPEG."""
    from PIL import Image

    picture, out = Image.fromarray(image), io.BytesIO()
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    picture.save(out, "JPEG", quality=88)
    return out.getvalue()


def _crop_png(face: np.ndarray) -> bytes:
    """A face to go on with; lossless unless it is far larger than any detector sees it."""
    from PIL import Image

    picture, out = Image.fromarray(face), io.BytesIO()
    picture.thumbnail((CROP_SIDE, CROP_SIDE), Image.Resampling.BICUBIC)
    picture.save(out, "PNG", compress_level=1)
    return out.getvalue()


def _from_png(crop: bytes) -> np.ndarray:
    import numpy as np
    from PIL import Image

    with Image.open(io.BytesIO(crop)) as image:
        return np.asarray(image.convert("RGB"))
