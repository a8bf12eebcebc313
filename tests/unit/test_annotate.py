"""Annotated copies and timelines: the original's size and length, boxes where the faces are, readable to the eye."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fsvfm.annotate import COLOURS, annotate, draw, timeline
from fsvfm.errors import DataError
from fsvfm.faces.detect import Box
from fsvfm.faces.video import probe, read_frames, write_video
from fsvfm.prediction import Face, Frame, Prediction, Threshold


def face(number: int, box: tuple[int, int, int, int], probability: float = 0.9, verdict: str = "fake") -> Face:
    return Face(number, Box(*box), probability, probability, verdict)


def is_colour(pixels: np.ndarray, verdict: str, tolerance: int = 0) -> np.ndarray:
    return (np.abs(pixels.astype(int) - COLOURS[verdict]) <= tolerance).all(axis=-1)


def test_boxes_are_drawn_where_the_faces_are() -> None:
    image = np.full((300, 400, 3), 120, np.uint8)
    shown = draw(image, [face(0, (100, 100, 200, 220)), face(1, (-20, 5, 60, 90), 0.1, "real")], "title")
    assert (image == 120).all()
    assert is_colour(shown[100:220, 100], "fake").all()
    assert is_colour(shown[219, 100:200], "fake").all()
    assert is_colour(shown[89, 0:60], "real").all()  # a box beyond the edge is cut off there
    assert (shown[240:] == 120).all()
    assert (shown[110:210, 110:190] == 120).all()
    plate = shown[70:100, 100:180]
    assert is_colour(plate, "fake").any()
    assert (plate > 200).all(axis=-1).any()  # white letters
    for size in ((1, 1), (5, 400), (400, 5)):  # the smallest pictures do not break it
        assert draw(np.zeros((*size, 3), np.uint8), [face(0, (0, 0, 3, 3))], "real").shape == (*size, 3)


def test_a_photograph_keeps_its_size(tmp_path: Path) -> None:
    Image.new("RGB", (321, 123), "white").save(tmp_path / "x.y.png")
    prediction = Prediction(str(tmp_path / "x.y.png"), "photo", "fake", 0.9, 0.9, [face(0, (50, 50, 100, 100))])
    copy = annotate(prediction, tmp_path / "out" / "x.y")
    assert copy == tmp_path / "out" / "x.y.png"
    with Image.open(copy) as picture:
        assert picture.size == (321, 123)
        assert is_colour(np.asarray(picture)[75, 50], "fake")


@pytest.fixture
def video(tmp_path: Path) -> Prediction:
    """Twenty gray frames; a face moves from left to right between frames 4 and 12, another is there once."""
    file = tmp_path / "gray.mp4"
    write_video(file, (np.full((160, 320, 3), 128, np.uint8) for _ in range(20)), rate=10, crf=5)
    frames = [
        Frame(4, 0.4, [face(0, (20, 60, 60, 100)), face(1, (250, 100, 290, 140), 0.2, "real")]),
        Frame(12, 1.2, [face(0, (180, 60, 220, 100), 0.7)]),
    ]
    judged = Threshold("eer", 0.5, "x", band={"alpha": 0.1, "low": 0.4, "high": 0.6}).describe()
    tracks = [face(0, (20, 60, 60, 100)), face(1, (250, 100, 290, 140), 0.2, "real")]
    return Prediction(str(file), "video", "fake", 0.8, 0.8, tracks, frames, judged)


def test_boxes_move_between_the_scored_frames(video: Prediction, tmp_path: Path) -> None:
    copy = annotate(video, tmp_path / "out" / "copy")
    info, original = probe(copy), probe(video.source)
    assert (info.frames, info.width, info.height, info.rate) == (20, 320, 160, original.rate)
    shown = dict(read_frames(copy))
    for index, left in ((4, 20), (8, 100), (12, 180), (14, 180)):
        columns = np.flatnonzero(is_colour(shown[index][80], "fake", 70))
        assert columns.size, index
        assert abs(columns.min() - left) <= 3, index
        assert abs(columns.max() - (left + 39)) <= 3, index
    for index in (0, 3):  # nothing is known before the first scored frame
        assert not is_colour(shown[index][60:], "fake", 70).any()
    assert is_colour(shown[4][120], "real", 70).any()
    assert not is_colour(shown[8][120], "real", 70).any()  # gone in the next scored frame


def test_what_cannot_be_annotated(video: Prediction, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="camera"):
        annotate(Prediction("webcam:0", "webcam"), tmp_path / "copy")
    Path(video.source).unlink()
    with pytest.raises(DataError, match="not a file"):
        annotate(video, tmp_path / "copy")
    assert not list(tmp_path.iterdir())


def test_a_timeline_shows_every_face(video: Prediction, tmp_path: Path) -> None:
    video.source = "cost $5 & <b>.mp4"  # no mathematics, no markup
    for name, prediction in (("a", video), ("b", Prediction("x", "video", "no face", frames=[Frame(0, None, [])]))):
        file = timeline(prediction, tmp_path / name)
        assert file == tmp_path / f"{name}.png"
        with Image.open(file) as picture:
            assert picture.width > 600
            pixels = np.asarray(picture.convert("RGB"))
        assert (pixels == 0).all(axis=-1).any() or name == "b"  # the threshold's line and the text
        coloured = (np.ptp(pixels.astype(int), axis=-1) > 60).sum()
        assert (coloured > 200) == (name == "a")
