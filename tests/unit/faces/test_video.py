"""Videos: the right frames under the right numbers, upright; damaged and foreign files told apart and named."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fsvfm.errors import ConfigError, DataError
from fsvfm.faces import video
from fsvfm.faces.video import VideoInfo, frame_indices, probe, read_frames, write_video

BITS = 6


def numbered(number: int, width: int = 96, height: int = 64) -> np.ndarray:
    """A picture that says its number: six dark or bright stripes, above a smooth background that moves."""
    ys, xs = np.mgrid[0:height, 0:width]
    frame = np.stack([xs + number, ys * 2, (xs + ys) // 2 + 40], axis=-1) % 200
    stripe = width // BITS
    for bit in range(BITS):
        frame[: height // 2, bit * stripe : (bit + 1) * stripe] = 220 if number >> bit & 1 else 30
    return frame.astype(np.uint8)


def number_of(frame: np.ndarray) -> int:
    stripe = frame.shape[1] // BITS
    top = frame[2 : frame.shape[0] // 2 - 4]
    return sum(1 << bit for bit in range(BITS) if top[:, bit * stripe + 4 : (bit + 1) * stripe - 4].mean() > 125)


def clip(path: Path, frames: int = 40, *, width: int = 96, height: int = 64, gop: int | None = None) -> Path:
    write_video(path, (numbered(i, width, height) for i in range(frames)), gop=gop)
    return path


def mux(path: Path, frames: int, *, rotation: int = 0, times: list[int] | None = None, first: int = 0) -> Path:
    """A video made with PyAV itself, for what `write_video` does not do: `times` in milliseconds, first below zero."""
    options = {"movflags": "faststart", "use_editlist": "1", "avoid_negative_ts": "disabled"}
    with av.open(str(path), "w", options=options if path.suffix == ".mp4" else {}) as container:
        stream = container.add_stream("libx264", rate=25, options={"bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        for number in range(frames):
            picture = av.VideoFrame.from_ndarray(numbered(number), format="rgb24")
            picture.pts = times[number] if times else (number + first) * 40
            picture.time_base = Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def opencv(path: Path) -> list[np.ndarray]:
    """All frames, as another reader sees them: in order, turned as the file says."""
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    frames = []
    while capture.grab():
        frames.append(cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB))
    return frames


# --- Which frames ---------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 5000), st.integers(1, 300))
def test_frames_ascend_from_first_to_last(frames: int, wanted: int) -> None:
    indices = frame_indices(frames, wanted)
    assert indices[0] == 0
    assert indices == sorted(set(indices))
    assert all(isinstance(index, int) and 0 <= index < frames for index in indices)
    if wanted > 1:
        assert indices[-1] == frames - 1
    assert len(indices) == min(frames, wanted) or frames < wanted
    gaps = np.diff(indices)
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


def test_none_wanted_is_all_of_them() -> None:
    assert frame_indices(5, 0) == [0, 1, 2, 3, 4]
    assert frame_indices(2, 4) == [0, 1]
    with pytest.raises(DataError):
        frame_indices(0, 4)
    with pytest.raises(ConfigError):
        frame_indices(10, -1)


# --- Reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".mp4", ".avi", ".mkv", ".mov"])
def test_every_frame_comes_under_its_number(suffix: str, tmp_path: Path) -> None:
    file = clip(tmp_path / f"a{suffix}", gop=7)
    assert probe(file)[:4] == (40, 96, 64, 25.0)
    wanted = [0, 1, 6, 7, 8, 20, 39]
    frames = dict(read_frames(file, wanted))
    assert list(frames) == wanted
    assert [number_of(frame) for frame in frames.values()] == wanted
    everything = [frame for _, frame in read_frames(file)]
    reference = opencv(file)
    assert len(everything) == len(reference) == 40
    for frame, expected in zip(everything, reference, strict=True):
        assert frame.dtype == np.uint8
        assert frame.flags.c_contiguous
        np.testing.assert_array_equal(frame, expected)


def test_real_clips_agree_with_another_reader(media_dir: Path) -> None:
    for name in ("clip_01", "clip_03", "clip_05"):
        file = media_dir / "videos" / f"{name}.mp4"
        reference = opencv(file)
        assert probe(file).frames == probe(file).claimed == len(reference)
        wanted = frame_indices(len(reference), 9)
        frames = dict(read_frames(file, wanted))
        assert list(frames) == wanted
        for index, frame in frames.items():
            np.testing.assert_array_equal(frame, reference[index])


@pytest.mark.parametrize(
    "options", [{}, {"bf": "8", "b-pyramid": "normal"}, {"bf": "0"}, {"x264-params": "open-gop=1"}]
)
def test_what_is_skipped_changes_no_wanted_frame(options: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "a.mp4"
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"g": "20"} | options)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for number in range(60):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered(number), format="rgb24")))
        container.mux(stream.encode(None))
    reference = opencv(file)
    rng = np.random.default_rng(0)
    for count in (1, 2, 5, 20):
        wanted = sorted(rng.choice(60, count, replace=False).tolist())
        for index, frame in read_frames(file, wanted):
            np.testing.assert_array_equal(frame, reference[index])


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_frames_stand_upright_whatever_the_telephone_did(rotation: int, tmp_path: Path) -> None:
    file = mux(tmp_path / "phone.mp4", 4, rotation=rotation)
    info = probe(file)
    assert info.rotation == rotation
    assert (info.width, info.height) == ((96, 64) if rotation == 180 else (64, 96))
    frames = [frame for _, frame in read_frames(file)]
    for frame, reference in zip(frames, opencv(file), strict=True):
        assert frame.shape == (info.height, info.width, 3)
        np.testing.assert_array_equal(frame, reference)
    assert number_of(np.rot90(frames[3], -rotation // 90)) == 3


def test_a_variable_frame_rate_changes_no_number(tmp_path: Path) -> None:
    times = np.cumsum([0] + [400 if i % 5 == 0 else 10 for i in range(29)]).tolist()
    file = mux(tmp_path / "phone.mp4", 30, times=times)
    assert probe(file).frames == 30
    assert [number_of(frame) for _, frame in read_frames(file)] == list(range(30))
    assert [number_of(frame) for _, frame in read_frames(file, [3, 11, 29])] == [3, 11, 29]


def test_frames_that_the_container_cuts_away_do_not_count(tmp_path: Path) -> None:
    file = mux(tmp_path / "trimmed.mp4", 30, first=-10)
    info = probe(file)
    shown = [number_of(frame) for _, frame in read_frames(file)]
    assert shown == list(range(10, 30))
    assert len(opencv(file)) == info.frames == info.claimed == 20


def test_what_was_done_with_a_frame_may_decide_the_next(tmp_path: Path) -> None:
    file = clip(tmp_path / "a.mp4")
    seen: list[int] = []

    def next_index() -> Iterator[int]:
        yield 2
        yield 30 if seen == [2] else 4

    for index, _ in read_frames(file, next_index()):
        seen.append(index)
    assert seen == [2, 30]


def test_frames_must_be_asked_for_in_order_and_be_there(tmp_path: Path) -> None:
    file = clip(tmp_path / "a.mp4", 8)
    assert list(read_frames(file, [])) == []
    for indices in ([3, 3], [3, 2], [-1]):
        with pytest.raises(DataError, match=r"in order and from 0 on"):
            list(read_frames(file, indices))
    with pytest.raises(DataError, match=r"2 frames could be read, frame 9 could not.*8 of 8 frames are there"):
        list(read_frames(file, [0, 5, 9]))


# --- Damaged and foreign files --------------------------------------------------------------------------------------


def readable(file: Path, indices: list[int] | None = None) -> tuple[list[int], str]:
    """Numbers of the frames that come before the error, and the error."""
    numbers = []
    try:
        for index, _ in read_frames(file, indices):
            numbers.append(index)
    except DataError as error:
        return numbers, str(error)
    pytest.fail(f"{file} was read without an error")


def test_a_truncated_video_yields_what_is_there_and_then_says_so(tmp_path: Path) -> None:
    whole = mux(tmp_path / "whole.mp4", 60).read_bytes()
    file = tmp_path / "cut.mp4"
    file.write_bytes(whole[: len(whole) * 3 // 4])
    info = probe(file)
    assert 0 < info.frames < info.claimed == 60
    numbers, message = readable(file)
    assert info.frames - 2 <= len(numbers) <= info.frames
    assert numbers == list(range(len(numbers)))
    assert str(file) in message
    assert f"{len(numbers)} of 60 frames" in message
    pictures = dict(read_frames(tmp_path / "whole.mp4"))
    for index, frame in read_frames(file, numbers):  # a last frame cut in half would differ
        np.testing.assert_array_equal(frame, pictures[index])
    whole_enough = list(read_frames(file, range(info.frames - 2)))  # nothing missing of what was asked for
    assert len(whole_enough) == info.frames - 2


def test_a_missing_index_at_the_end_is_no_video(tmp_path: Path) -> None:
    file = clip(tmp_path / "a.mp4")
    file.write_bytes(file.read_bytes()[:-400])
    with pytest.raises(DataError, match=r"a\.mp4 is not a video.*damaged"):
        probe(file)


def test_damage_in_the_middle_costs_the_frames_there(tmp_path: Path) -> None:
    file = clip(tmp_path / "a.mp4", 60, gop=10)
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle - 600 : middle] = np.random.default_rng(0).bytes(600)
    file.write_bytes(content)
    numbers, message = readable(file)
    assert 20 < len(numbers) < 60
    assert f"{len(numbers)} of 60 frames" in message


def test_frames_that_the_decoder_calls_damaged_are_left_out_under_their_numbers(tmp_path: Path) -> None:
    whole = clip(tmp_path / "whole.mkv", 60, gop=10).read_bytes()
    rng, file, found = np.random.default_rng(0), tmp_path / "a.mkv", 0
    for _ in range(6):
        content = bytearray(whole)
        for place in rng.integers(len(whole) // 4, len(whole) * 3 // 4, 5):
            content[place] = int(rng.integers(256))
        file.write_bytes(content)
        times: list[int] = []
        damaged: dict[int, bool] = {}  # by time
        with av.open(str(file)) as container:
            container.streams.video[0].codec_context.thread_count = 1
            for packet in container.demux(video=0):
                times += [packet.pts] if packet.size else []
                with contextlib.suppress(av.error.FFmpegError):
                    damaged |= {frame.pts: frame.is_corrupt for frame in packet.decode()}
        if any(damaged.values()):
            found += 1
            good = [place for place, time in enumerate(sorted(times)) if damaged.get(time) is False]
            assert readable(file)[0] == good
    assert found


def test_a_wrong_count_in_the_header_is_not_believed(tmp_path: Path) -> None:
    file = clip(tmp_path / "a.avi", 12)
    content = bytearray(file.read_bytes())
    stream = content.index(b"strh") + 8  # its field dwLength is the ninth 32-bit word
    assert struct.unpack_from("<I", content, stream + 32) == (12,)
    struct.pack_into("<I", content, stream + 32, 500)
    struct.pack_into("<I", content, content.index(b"avih") + 8 + 16, 500)
    file.write_bytes(content)
    info = probe(file)
    assert (info.frames, info.claimed) == (12, 500)
    assert [index for index, _ in read_frames(file, frame_indices(info.frames, 4))] == [0, 3, 7, 11]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>gone</html>", "HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (bytes(range(256)) * 20, "FFmpeg"),
        (b"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nhttp://127.0.0.1:9/a.ts\n", "not a video"),
    ],
)
def test_what_is_no_video_is_told(content: bytes, words: str, tmp_path: Path) -> None:
    file = tmp_path / "a.mp4"
    file.write_bytes(content)
    for read in (lambda: probe(file), lambda: next(read_frames(file))):
        with pytest.raises(DataError, match=words) as caught:
            read()
        assert str(file) in str(caught.value)


def test_sound_and_nothing(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "song.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        sound = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
        sound.sample_rate = 44100
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    with pytest.raises(DataError, match=r"song\.mp4.*sound only"):
        probe(tmp_path / "song.mp4")
    with pytest.raises(DataError, match=r"absent\.mp4 is not a file"):
        probe(tmp_path / "absent.mp4")


def test_gigantic_frames_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = clip(tmp_path / "a.mp4", 2)
    monkeypatch.setattr(video, "MAX_PIXELS", 96 * 64 - 1)
    with pytest.raises(DataError, match="96×64 pixels"):
        probe(file)


# --- Writing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height"), [(96, 64), (97, 64), (96, 65), (131, 75)])
def test_a_written_video_keeps_size_and_colours(width: int, height: int, tmp_path: Path) -> None:
    frames = [numbered(i, width, height) for i in range(5)]
    write_video(tmp_path / "a.mp4", iter(frames), rate=29.97, crf=10)
    assert probe(tmp_path / "a.mp4") == VideoInfo(5, width, height, 29.97, 0, 5)
    for (_, found), frame in zip(read_frames(tmp_path / "a.mp4"), frames, strict=True):
        difference = np.abs(found.astype(int) - frame)[4:-4, 4:-4]
        assert difference.mean() < 4
        assert abs(found.mean(axis=(0, 1)) - frame.mean(axis=(0, 1))).max() < 1.5


def test_quality_key_frames_and_bytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (20, 64, 64, 3), dtype=np.uint8)
    sizes = []
    for crf in (15, 23, 40):
        write_video(tmp_path / f"{crf}.mp4", frames, crf=crf, gop=4)
        sizes.append((tmp_path / f"{crf}.mp4").stat().st_size)
    assert sizes[0] > 1.2 * sizes[1] > 1.2 * 1.2 * sizes[2]
    with av.open(str(tmp_path / "23.mp4")) as container:
        keys = [index for index, frame in enumerate(container.decode(video=0)) if frame.key_frame]
    assert max(np.diff([*keys, 20])) <= 4
    first = (tmp_path / "23.mp4").read_bytes()
    write_video(tmp_path / "23.mp4", frames, crf=23, gop=4)
    assert (tmp_path / "23.mp4").read_bytes() == first


@pytest.mark.parametrize(
    ("frames", "name", "options", "error"),
    [
        ([], "a.mp4", {}, DataError),
        ([np.zeros((8, 8), np.uint8)], "a.mp4", {}, DataError),
        ([np.zeros((8, 8, 3), np.float32)], "a.mp4", {}, DataError),
        ([np.zeros((16, 16, 3), np.uint8), np.zeros((16, 18, 3), np.uint8)], "a.mp4", {}, DataError),
        ([np.zeros((16, 16, 3), np.uint8)], "a.mp4", {"codec": "libnothing"}, ConfigError),
        ([np.zeros((16, 16, 3), np.uint8)], "a.mp4", {"codec": "aac"}, ConfigError),
        ([np.zeros((16, 16, 3), np.uint8)], "a.mp4", {"rate": -1}, ConfigError),
        ([np.zeros((16, 16, 3), np.uint8)], "a.nothing", {}, ConfigError),
        ([np.zeros((16, 16, 3), np.uint8)], "file/a.mp4", {}, DataError),
    ],
)
def test_what_cannot_be_written_leaves_nothing_behind(
    frames: list[np.ndarray], name: str, options: dict[str, object], error: type[Exception], tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"in the way")
    with pytest.raises(error, match=name):
        write_video(tmp_path / name, frames, **options)  # type: ignore[arg-type]
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
