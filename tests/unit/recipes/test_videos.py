"""Videos to faces: which frames, whose face, and an account of everything that yielded nothing."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from fsvfm.errors import ConfigError, DataError
from fsvfm.faces import parse
from fsvfm.faces.align import reference_points
from fsvfm.faces.crop import square_crop
from fsvfm.faces.detect import DlibHOG
from fsvfm.faces.images import load_image, load_labels
from fsvfm.faces.video import write_video
from fsvfm.recipes.engine import Catalogue, Entry, Prepared, Product
from fsvfm.recipes.photos import FaceExtractor
from fsvfm.recipes.videos import VideoFaces, prepare_videos
from fsvfm.regions import region_grid

#: Its copies share the models, once they are loaded.
EXTRACTOR = FaceExtractor(Path(), size=None, parser=None, max_side=None)


def portrait(media_dir: Path, name: str, side: int = 128) -> np.ndarray:
    """Head and shoulders from a photograph, (side, side, 3)."""
    image = load_image(media_dir / "photos" / f"{name}.jpg")[::2, ::2].copy()
    box = DlibHOG()(image)[0].box
    x, y, length = square_crop(box, image.shape[1], image.shape[0], 1.8)
    return cv2.resize(image[y : y + length, x : x + length], (side, side), interpolation=cv2.INTER_AREA)


@pytest.fixture(scope="module")
def face(media_dir: Path) -> np.ndarray:
    return portrait(media_dir, "001")


@pytest.fixture(scope="module")
def other(media_dir: Path) -> np.ndarray:
    return portrait(media_dir, "005")


def film(path: Path, faces: list[np.ndarray | None], **options: Any) -> Path:
    """A clip of 160×160 pixels; in every frame the face lies a little lower, or there is only a wall (None)."""
    frames = []
    for number, face in enumerate(faces):
        frame = np.full((160, 160, 3), 90, np.uint8)
        if face is not None:
            frame[number : number + 128, 16:144] = face
        frames.append(frame)
    write_video(path, frames, crf=15, **options)
    return path


def entry(file: Path, frames: int = 3, **more: Any) -> Entry:
    return Entry(str(file), file.stem, 0, "train", "real", f"video/{file.stem}", "ann", frames, more)


def work(out: Path, entry: Entry, *, track: bool = False, sampling: str = "spread", **options: Any) -> Product:
    return VideoFaces(replace(EXTRACTOR, out=out, **options), track, sampling)(entry)


def frames_of(product: Product) -> list[int]:
    return [face["frame"] for face in product.values["faces"]]


def prepare(out: Path, entries: list[Entry], **options: Any) -> Prepared:
    catalogue = Catalogue("films", entries, {"about": "made for this test", "options": {"frames": 3}})
    settings = {"size": None, "scale": 1.3, "detector": "dlib_hog", "parser": None, "workers": 1}
    return prepare_videos(catalogue, out=out, **(settings | options))


def test_a_folder_of_films_becomes_faces_and_rows(face: np.ndarray, other: np.ndarray, tmp_path: Path) -> None:
    film(tmp_path / "a.mp4", [face] * 9)
    film(tmp_path / "b.avi", [other] * 2)
    film(tmp_path / "wall.mp4", [None] * 4)
    film(tmp_path / "blink.mp4", [face, None, face])
    (tmp_path / "torn.mp4").write_bytes(b"<html>")
    fake = entry(tmp_path / "b.avi", 4, take=7)._replace(label=1, method="swap", subject="bob")
    entries = [entry(tmp_path / "a.mp4"), fake, *(entry(tmp_path / f"{n}.mp4") for n in ("wall", "blink", "torn"))]
    prepared = prepare(tmp_path / "out", entries)
    table = prepared.manifest.table
    assert list(zip(table["video"], table["frame"], strict=True)) == [
        ("video/a", 0), ("video/a", 4), ("video/a", 8),
        ("video/b", 0), ("video/b", 1),
        ("video/blink", 0), ("video/blink", 2),
    ]  # fmt: skip
    swapped = table[table["video"] == "video/b"]
    assert set(swapped["label"]) == {1}
    assert set(swapped["method"]) == {"swap"}
    assert set(swapped["take"]) == {7}
    assert set(swapped["subject"]) == {"bob"}
    assert set(swapped["origin"]) == {str(tmp_path / "b.avi")}
    assert [Path(path).name for path in table["path"][:3]] == [f"a_frame_{index}.png" for index in (0, 4, 8)]

    tally = prepared.tallies[-1]
    assert (tally.inputs, tally.written) == (5, 3)
    assert {(Path(file).name, reason) for file, reason, _ in tally.skipped} == {
        ("wall.mp4", "no face found"),
        ("torn.mp4", "unreadable"),
    }
    with (tmp_path / "out" / "skipped.csv").open() as file:
        text = "\n".join(",".join(line.values()) for line in csv.DictReader(file))
    assert "blink.mp4,frame 1,no face found" in text
    assert "HTML page" in text

    # The pixels are those of the papers' preparation, done by hand with another reader.
    capture = cv2.VideoCapture(str(tmp_path / "a.mp4"))
    for index, path in zip((0, 4, 8), prepared.manifest.paths(), strict=False):
        capture.set(cv2.CAP_PROP_POS_FRAMES, index)
        frame = cv2.cvtColor(capture.read()[1], cv2.COLOR_BGR2RGB)
        x, y, side = square_crop(DlibHOG()(frame)[0].box, 160, 160)
        np.testing.assert_array_equal(load_image(path), frame[y : y + side, x : x + side])


def test_a_second_run_does_nothing_again_and_gives_the_same(face: np.ndarray, tmp_path: Path) -> None:
    entries = [entry(film(tmp_path / f"{name}.mp4", [face, None, face])) for name in "abcd"]
    first = prepare(tmp_path / "out", entries)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.p*") if path.is_file()}
    lost = first.manifest.paths()[1]
    Path(lost).unlink()
    again = prepare(tmp_path / "out", entries, workers=2)
    assert again.tallies[-1].reused == 3
    assert {path: path.read_bytes() for path in before} == before
    with pytest.raises(DataError, match="track"):
        prepare(tmp_path / "out", entries, track=True)


def test_for_pretraining_there_are_parsing_maps_and_grids(face: np.ndarray, tmp_path: Path) -> None:
    prepared = prepare(tmp_path / "out", [entry(film(tmp_path / "a.mp4", [face] * 3), 2)], size=224, parser="landmarks")
    table = prepared.manifest.table
    assert len(table) == 2
    for place, path in enumerate(prepared.manifest.paths()):
        assert load_image(path).shape == (224, 224, 3)
        labels = load_labels(tmp_path / "out" / table["parse"].iloc[place])
        for patch in (16, 14):
            grids = prepared.manifest.grids(patch)
            assert grids is not None
            np.testing.assert_array_equal(grids[place], region_grid(labels, patch))


class Halves:
    """A parser that takes batches: the upper half is hair, the lower skin; in the second face nothing is found."""

    def batch(self, faces: np.ndarray) -> list[np.ndarray | None]:
        labels = np.full(faces.shape[1:3], 1, np.uint8)
        labels[: len(labels) // 2] = 10
        return [None if place == 1 else labels for place in range(len(faces))]


def test_a_gpu_parses_the_faces_of_all_films_together(
    face: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setitem(parse.PARSERS, "facer", Halves)
    entries = [entry(film(tmp_path / f"{name}.mp4", [face] * 2), 2) for name in "ab"]
    prepared = prepare(tmp_path / "out", entries, size=64, parser="facer")
    table = prepared.manifest.table
    assert list(zip(table["video"], table["frame"], strict=True)) == [("video/a", 0), ("video/b", 0), ("video/b", 1)]
    assert [Path(path).stem for path in table["parse"]] == ["a_frame_0", "b_frame_0", "b_frame_1"]
    assert prepared.manifest.grids(16) is not None
    assert [reason for _, _, reason in prepared.tallies[-1].missed] == ["no face parsing"]


def test_frames_are_tried_once_each_and_all_if_asked(face: np.ndarray, tmp_path: Path) -> None:
    file = film(tmp_path / "a.mp4", [face, face, None, face])
    product = work(tmp_path, entry(file, 32))
    assert frames_of(product) == [0, 1, 3]
    assert list(product.missed) == [("frame 2", "no face found")]
    assert work(tmp_path, entry(file, 0)).values == product.values
    assert len(product.files) == len(set(product.files)) == 3


def test_the_antispoofing_frames_and_their_replacements(face: np.ndarray, tmp_path: Path) -> None:
    frames: list[np.ndarray | None] = [face] * 24
    file = film(tmp_path / "a.mp4", frames)
    assert frames_of(work(tmp_path, entry(file), sampling="fas")) == [6, 18]
    frames[6:9] = [None] * 3
    file = film(tmp_path / "b.mp4", frames)
    assert frames_of(work(tmp_path, entry(file), sampling="fas")) == [9, 18]
    frames[18:] = [None] * 6
    product = work(tmp_path, entry(film(tmp_path / "c.mp4", frames)), sampling="fas")
    assert frames_of(product) == [9]
    assert list(product.missed) == [("frames 18 to 23", "no face found")]
    product = work(tmp_path, entry(film(tmp_path / "d.mp4", [face] * 9)), sampling="fas")
    assert frames_of(product) == [6]
    assert list(product.missed) == [("frame 10", "video too short")]
    with pytest.raises(DataError, match="5 frames are too few"):
        work(tmp_path, entry(film(tmp_path / "e.mp4", [face] * 5)), sampling="fas")


def test_aligned_chips_show_the_same_place(face: np.ndarray, tmp_path: Path) -> None:
    file = film(tmp_path / "a.mp4", [face] * 5)
    product = work(tmp_path, entry(file, 2), align=True)
    for values in product.values["faces"]:
        assert load_image(tmp_path / values["image"]).shape == (224, 224, 3)
        points = np.array(values["landmarks"]).reshape(68, 2)
        eyes = np.stack([points[36:42].mean(axis=0), points[42:48].mean(axis=0)])
        assert np.abs(eyes - reference_points()[:2]).max() < 12
    small = work(tmp_path, entry(file, 1), align=True, size=112)
    assert load_image(tmp_path / small.files[0]).shape == (112, 112, 3)


def test_one_person_is_followed_only_if_asked(face: np.ndarray, other: np.ndarray, tmp_path: Path) -> None:
    """Two people; whoever is in focus has the higher score, and the focus changes from the left one to the right."""

    def frame(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return np.concatenate([left, np.full((128, 32, 3), 90, np.uint8), right], axis=1)

    soft_face, soft_other = (cv2.GaussianBlur(picture, (0, 0), 3) for picture in (face, other))
    frames = [frame(face, soft_other), frame(soft_face, other), frame(soft_face, other)]
    scores = [{d.box.left > 128: d.score for d in DlibHOG()(each)} for each in frames]
    assert scores[0][False] > scores[0][True]
    assert scores[1][True] > scores[1][False]
    write_video(tmp_path / "two.mp4", frames, crf=15)
    by_score = work(tmp_path, entry(tmp_path / "two.mp4"))
    assert [values["box"][0] > 128 for values in by_score.values["faces"]] == [False, True, True]
    followed = work(tmp_path, entry(tmp_path / "two.mp4"), track=True)
    assert [values["box"][0] > 128 for values in followed.values["faces"]] == [False, False, False]


def test_a_truncated_film_gives_what_it_has_and_says_what_is_missing(face: np.ndarray, tmp_path: Path) -> None:
    file = film(tmp_path / "a.avi", [face] * 30, gop=5)
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
    product = work(tmp_path, entry(file, 4))
    frames = frames_of(product)
    assert frames[0] == 0
    assert len(frames) >= 3
    assert max(frames) < 28
    piece, reason = product.missed[-1]
    assert reason == "missing from the file"
    assert piece.endswith("of 30 frames")
    assert len(frames) + len(product.missed) - 1 == 4  # a last frame cut in half is not readable, and counted


def test_impossible_settings(tmp_path: Path) -> None:
    for options in ({"sampling": "often"}, {"parser": "landmarks", "size": None}):
        with pytest.raises(ConfigError, match=r"recipe\."):
            prepare(tmp_path / "out", [], **options)
    assert not (tmp_path / "out").exists()
