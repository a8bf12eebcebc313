"""Videos: what a file really holds, its frames by number, upright, and writing one.

Frames are decoded in order, what the wanted ones do not need is skipped, and only they are converted to RGB. Seeking to
every wanted frame instead decodes most of the video again and again (`benchmarks/video.py`), and lands beside the frame
in some files. What containers claim is not believed: frames are counted by reading the file's packets, which costs a
few per cent of decoding them.
"""

from __future__ import annotations

import uuid
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import av
import av.error
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from fsvfm.errors import ConfigError, DataError
from fsvfm.faces.images import MAX_PIXELS, what_it_is

#: Files that count as videos.
VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".m4v", ".webm", ".mpg", ".mpeg", ".wmv")

#: Local files only: a playlist named .mp4 must not make the reader fetch addresses.
_OPTIONS = {"protocol_whitelist": "file"}


class VideoInfo(NamedTuple):
    """What a video file holds.

    Attributes:
        frames: pictures that the file holds, counted.
        width: of the upright picture, in pixels; pixels are taken as square.
        height: of the upright picture, in pixels.
        rate: frames per second, on average; 0 if the file does not tell.
        rotation: degrees counter-clockwise by which the stored pictures are turned to stand upright: 0, 90, 180, 270.
        claimed: frames that the container says it holds, 0 if it says nothing. More than `frames`: the file is cut off,
            or its header is wrong.
    """

    frames: int
    width: int
    height: int
    rate: float
    rotation: int
    claimed: int


def frame_indices(frames: int, wanted: int) -> list[int]:
    """Evenly spaced frames of a video, first and last included (03-datasets, sec. 1).

    Args:
        frames: number of frames in the video.
        wanted: number of frames wanted; 0 takes all.

    Returns:
        `linspace(0, frames − 1, wanted)`, truncated to integers; each index once, ascending. A video shorter than
        `wanted` yields fewer.

    Raises:
        DataError: a video without frames.
        ConfigError: a negative number of frames wanted.
    """
    if frames < 1:
        raise DataError(f"a video of {frames} frames has nothing to extract; is the file damaged?")
    if wanted < 0:
        raise ConfigError(f"the number of frames wanted must be 0 (all) or more, got {wanted}")
    if wanted == 0:
        return list(range(frames))
    return np.unique(np.linspace(0, frames - 1, wanted).astype(int)).tolist()


def probe(path: str | Path) -> VideoInfo:
    """Count a video's frames and say how large and how fast it is.

    Raises:
        DataError: the file is absent, empty, no video (the message says what it is where that is easy to tell), holds
            sound only, or none of its pictures can be decoded.
    """
    return _survey(Path(path))[0]


def read_frames(path: str | Path, indices: Iterable[int] | None = None) -> Iterator[tuple[int, np.ndarray]]:
    """Frames of a video in order, upright.

    A frame's index is its place among the frames that the video shows. Frames that the decoder marks as damaged are
    left out.

    Args:
        path: any container and codec of FFmpeg.
        indices: ascending; None takes all. They are drawn one at a time, the next one only after the frame of the one
            before was dealt with, so that a generator may decide by that frame. Reading stops after the last.

    Yields:
        (index, frame): frame (H, W, 3) uint8 RGB.

    Raises:
        DataError: as :func:`probe`; indices that do not ascend; or, after everything that can be read was yielded,
            a wanted frame that cannot be (for all frames: fewer than the container claims).
    """
    path = Path(path)
    info, times = _survey(path)
    expected = max(info.frames, info.claimed)
    wanted = _Wanted(range(expected) if indices is None else indices, path)
    read = 0
    if wanted.index is None:
        return
    with _open(path) as (container, stream):
        for index, frame in _numbered(container, stream, times, wanted):
            while wanted.index is not None and wanted.index < index:
                wanted.give_up()
            if wanted.index == index and frame.is_corrupt:
                wanted.give_up()
            elif wanted.index == index:
                yield index, _upright(frame)
                read += 1
                wanted.advance()
            if wanted.index is None:
                break
    if wanted.index is not None:
        wanted.lost.append(wanted.index)
    if wanted.lost:
        of_all = f" of {expected}" if indices is None else ""
        raise DataError(
            f"{path}: {read}{of_all} frames could be read, frame {wanted.lost[0]} could not. The file is truncated "
            f"or damaged ({info.frames} of {expected} frames are there); fetch it again, or go on with what was read"
        )


def write_video(
    path: str | Path,
    frames: Iterable[np.ndarray],
    *,
    rate: float = 25,
    crf: int = 23,
    codec: str = "libx264",
    gop: int | None = None,
) -> None:
    """Encode frames as a video; the file appears complete or not at all. The same frames give the same bytes.

    Colours are stored as YUV 4:2:0 (BT.601, tagged so). Pictures of odd width or height, which that format does not
    have, are stored as 4:4:4, so that the video keeps their size; some players do not show those.

    Args:
        path: the file to write; its suffix decides the container (`.mp4`, `.mkv`, `.avi`, …).
        frames: (H, W, 3) uint8 RGB, all of one size; drawn one at a time.
        rate: frames per second.
        crf: constant rate factor of the codec: 0 is lossless or nearly so, FF++'s c23 and c40 are 23 and 40.
        codec: name of an encoder of FFmpeg.
        gop: longest distance between key frames; None leaves it to the codec (libx264: 250).

    Raises:
        DataError: no frames, frames of different size or another type, or the file cannot be written.
        ConfigError: an unknown codec or container, or options that the codec refuses.
    """
    path = Path(path)
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        raise DataError(f"{path}: no frames to write")
    _check_frame(first, first.shape, path)
    height, width = first.shape[:2]
    # The suffix stays last: it decides the container.
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:12]}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(temporary), "w") as container:
            options = {"crf": str(crf)} | ({"g": str(gop)} if gop is not None else {})
            stream = container.add_stream(codec, rate=Fraction(rate).limit_denominator(1001), options=options)
            if not isinstance(stream, VideoStream):
                raise ConfigError(f"{codec} does not encode pictures; expected libx264 or another video encoder")
            stream.width, stream.height = width, height
            stream.pix_fmt = "yuv420p" if width % 2 == 0 and height % 2 == 0 else "yuv444p"
            stream.codec_context.thread_count = 1  # libx264's result depends on the number of threads
            stream.codec_context.colorspace, stream.codec_context.color_range = 5, 1
            for frame in chain([first], frames):
                _check_frame(frame, first.shape, path)
                picture = VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                container.mux(stream.encode(picture.reformat(format=stream.pix_fmt)))
            container.mux(stream.encode(None))
        temporary.replace(path)
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error}); is the folder writable and the disk not full?") from error
    except (av.error.FFmpegError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path}: FFmpeg cannot encode {width}×{height} pixels with codec={codec}, crf={crf}, gop={gop} ({error})"
        ) from error
    finally:
        if temporary.exists():
            temporary.unlink()


class _Wanted:
    """The indices that are asked for, one at a time: `index` is the next one, None after the last."""

    def __init__(self, indices: Iterable[int], path: Path) -> None:
        self._indices, self._path = iter(indices), path
        self.lost: list[int] = []
        self.index: int | None = -1
        self.advance()

    def advance(self) -> None:
        """Draw the next index."""
        before, self.index = self.index, next(self._indices, None)
        if self.index is not None and before is not None and self.index <= before:
            raise DataError(
                f"{self._path}: frames must be asked for in order and from 0 on, got {self.index} after {before}"
            )

    def give_up(self) -> None:
        """Note that the frame cannot be read, and draw the next index."""
        if self.index is not None:
            self.lost.append(self.index)
        self.advance()


def _survey(path: Path) -> tuple[VideoInfo, np.ndarray]:
    """What :func:`probe` says, and the frames' time stamps in order, int64; none where they tell nothing."""
    with _open(path) as (container, stream):
        first: VideoFrame | None = None
        hidden = pictures = 0
        stamps = array("q")
        for packet in _packets(container, stream):
            if packet.size and packet.is_discard:
                hidden += 1  # cut away by the container's edit list; decoders do not show it
            elif packet.size:
                pictures += 1
                if packet.pts is not None:
                    stamps.append(packet.pts)
            if first is None:
                first = next(_decoded(packet), None)
        if first is None:
            raise DataError(f"{path}: none of its {pictures} pictures can be decoded; the file is damaged")
        height, width = first.height, first.width
        rotation = _rotation(first)
        if rotation in (90, 270):
            width, height = height, width
        claimed = max(stream.frames - hidden, 0)
        info = VideoInfo(pictures, width, height, float(stream.average_rate or 0), rotation, claimed)
        times = np.unique(np.asarray(stamps))
        # Of H.264 in containers with honest times it is certain that a packet is a frame, and which may be skipped.
        honest = container.format.name.startswith(("mov,", "matroska,"))
        certain = honest and stream.codec_context.name == "h264" and len(times) == pictures
        return info, times if certain else times[:0]


def _place(times: np.ndarray, time: int | None) -> int:
    """Which of the frames shows at a time; -1 if none does."""
    if time is None:
        return -1
    place = int(times.searchsorted(time))
    return place if place < len(times) and times[place] == time else -1


def _numbered(
    container: InputContainer, stream: VideoStream, times: np.ndarray, wanted: _Wanted
) -> Iterator[tuple[int, VideoFrame]]:
    """Frames with their index: all that are wanted, and of the others at least those that these refer to."""
    decoded = 0
    for packet in _packets(container, stream):
        if len(times) and wanted.index is not None:
            # Frames to which no other refers need no decoding before the wanted one; often they are half of all.
            passed = 0 <= _place(times, packet.pts) < wanted.index
            stream.codec_context.skip_frame = "NONREF" if passed else "DEFAULT"
        for frame in _decoded(packet):
            index = _place(times, frame.pts) if len(times) else decoded
            decoded += 1
            yield index, frame


@contextmanager
def _open(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The file and its pictures; of several streams the first that is more than a cover picture."""
    if not path.is_file():
        raise DataError(f"{path} is not a file; expected a video")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty (0 bytes); expected a video. Fetch or copy it again")
    try:
        container = av.open(str(path.absolute()), options=_OPTIONS)
    except (av.error.FFmpegError, OSError) as error:
        raise DataError(f"{path} is not a video: {what_it_is(path, 'FFmpeg')} ({error.strerror})") from error
    with container:
        streams = [each for each in container.streams.video if not each.disposition & Disposition.attached_pic]
        if not streams:
            sound = "it holds sound only" if container.streams.audio else "it holds no stream of pictures"
            raise DataError(f"{path} is not a video: {sound}")
        stream = streams[0]
        if stream.codec_context is None:
            raise DataError(f"{path}: FFmpeg has no decoder for its pictures; convert it, for example to H.264")
        if stream.width * stream.height > MAX_PIXELS:
            raise DataError(
                f"{path} claims {stream.width}×{stream.height} pixels; the limit is {MAX_PIXELS:,}, so that no file "
                "can fill the memory"
            )
        # Workers fill the cores together; for one video alone, decoding is not what takes time either.
        stream.codec_context.thread_count = 1
        yield container, stream


def _packets(container: InputContainer, stream: VideoStream) -> Iterator[Packet]:
    """The stream's packets as far as they can be read; an empty one at the end flushes the decoder."""
    try:
        yield from container.demux(stream)
    except (av.error.FFmpegError, OSError):
        return


def _decoded(packet: Packet) -> Iterator[VideoFrame]:
    """Frames that a packet completes; none where it is damaged."""
    try:
        yield from packet.decode()
    except (av.error.FFmpegError, OSError):
        return


def _rotation(frame: VideoFrame) -> int:
    turned = frame.rotation % 360
    return turned if turned in (90, 180, 270) else 0


def _upright(frame: VideoFrame) -> np.ndarray:
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), _rotation(frame) // 90))


def _check_frame(frame: np.ndarray, shape: tuple[int, ...], path: Path) -> None:
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or frame.size == 0:
        raise DataError(f"{path}: expected frames of (H, W, 3) uint8 RGB, got {frame.dtype} {frame.shape}")
    if frame.shape != shape:
        raise DataError(f"{path}: frames of one video must have one size; after {shape} came {frame.shape}")
