"""Finding photographs, naming their crops, dealing people out to splits, and the crop of a real photograph."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fsvfm.errors import ConfigError, DataError
from fsvfm.faces.crop import square_crop
from fsvfm.faces.detect import DlibHOG
from fsvfm.faces.images import load_image, load_labels, save_png
from fsvfm.recipes.engine import Skip
from fsvfm.recipes.photos import FaceExtractor, face_row, file_names, find_photos, split_people
from fsvfm.regions import region_grid


def test_photographs_are_found_with_the_person_they_show(tmp_path: Path) -> None:
    for name in ("Ana.jpg", "ana.png", "Zoë/1.jpg", "Zoë/deep/2.JPG", ".hidden/3.jpg", ".4.jpg", "note.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    photos = {photo.path.relative_to(tmp_path).as_posix(): photo for photo in find_photos(tmp_path)}
    people = {name: photo.person for name, photo in photos.items()}
    assert people == {"Ana.jpg": "Ana", "ana.png": "ana", "Zoë/1.jpg": "Zoë", "Zoë/deep/2.JPG": "Zoë/deep"}
    names = {name: photo.name for name, photo in photos.items()}
    assert names["Zoë/1.jpg"] == "zoe_1"
    assert len(set(names.values())) == 4
    with pytest.raises(DataError, match="no folder"):
        find_photos(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no photograph"):
        find_photos(tmp_path / "empty")


@given(st.lists(st.text(min_size=1, max_size=12), unique=True, max_size=20))
def test_file_names_are_plain_unique_and_independent_of_order(paths: list[str]) -> None:
    names = file_names(paths)
    assert len(set(names)) == len(paths)
    assert all(name and set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_") for name in names)
    backwards = dict(zip(reversed(paths), file_names(list(reversed(paths))), strict=True))
    assert [backwards[path] for path in paths] == names


@given(people=st.lists(st.integers(0, 60).map(str), min_size=1, max_size=150), val=st.floats(0, 0.3))
def test_people_are_dealt_out_in_order_and_in_proportion(people: list[str], val: float) -> None:
    fractions = {"train": 0.7 - val, "val": val, "test": 0.3}
    count = len(set(people))
    if count < 3 + (val > 0):
        with pytest.raises(DataError, match="too few"):
            split_people(people, fractions, {"test": 2})
        return
    split_of = split_people(people, fractions, {"test": 2})
    assert list(split_of) == list(dict.fromkeys(people))
    order = [("train", "val", "test").index(split) for split in split_of.values()]
    assert order == sorted(order)
    sizes = Counter(split_of.values())
    assert sizes["test"] == max(2, round(0.3 * count))
    assert ("val" in sizes) == (val > 0)


@pytest.mark.parametrize("fractions", [{"train": 0.5}, {"train": 0.5, "dev": 0.5}, {"train": 1.5, "test": -0.5}])
def test_wrong_shares_are_told(fractions: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="sum to 1"):
        split_people(list("abcdef"), fractions, {})


def test_no_face_and_no_photograph(tmp_path: Path) -> None:
    save_png(tmp_path / "wall.png", np.full((80, 80, 3), 120, np.uint8))
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 torn")
    extractor = FaceExtractor(tmp_path, size=224, parser=None)
    with pytest.raises(Skip, match="no face found"):
        extractor({"path": str(tmp_path / "wall.png"), "name": "wall"})
    with pytest.raises(DataError, match=r"torn\.jpg"):
        extractor({"path": str(tmp_path / "torn.jpg"), "name": "torn"})
    assert not (tmp_path / "images").exists()


def test_a_photograph_becomes_crop_parse_and_grids(media_dir: Path, tmp_path: Path) -> None:
    photo = media_dir / "photos" / "001.jpg"
    product = FaceExtractor(tmp_path, size=224)({"path": str(photo), "name": "a"})
    assert product.files == ["images/a.png", "parsing_maps/a.png"]
    image = load_image(photo)
    x, y, side = square_crop(DlibHOG()(image)[0].box, image.shape[1], image.shape[0])
    reference = Image.fromarray(image[y : y + side, x : x + side]).resize((224, 224), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(load_image(tmp_path / "images/a.png"), np.asarray(reference))
    labels = load_labels(tmp_path / "parsing_maps/a.png")
    row = face_row(product.values)
    for patch in (16, 14):
        np.testing.assert_array_equal(row[f"grid_p{patch}"], region_grid(labels, patch))
    # The landmarks are those of the crop: they fall where the parsing map has eyes, nose and mouth.
    points = row["landmarks"].reshape(68, 2)
    for part, expected in ((slice(36, 42), {4, 5}), (slice(42, 48), {4, 5}), (slice(60, 68), {7, 8, 9})):
        column, line = points[part].mean(axis=0).round().astype(int)
        assert labels[line, column] in expected


def test_the_photograph_is_turned_as_the_camera_says(media_dir: Path, tmp_path: Path) -> None:
    upright = Image.open(media_dir / "photos" / "001.jpg").convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise for viewing
    upright.save(tmp_path / "upright.png")
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    extractor = FaceExtractor(tmp_path, size=112, parser=None)
    for name in ("upright", "turned"):
        extractor({"path": str(tmp_path / f"{name}.png"), "name": name})
    np.testing.assert_array_equal(
        load_image(tmp_path / "images/turned.png"), load_image(tmp_path / "images/upright.png")
    )


def test_a_large_photograph_is_shrunk_for_the_detector_only(media_dir: Path, tmp_path: Path) -> None:
    photo = str(media_dir / "photos" / "001.jpg")
    whole = FaceExtractor(tmp_path, size=None, parser=None)({"path": photo, "name": "whole"}).values
    small = FaceExtractor(tmp_path, size=None, parser=None, max_side=500)({"path": photo, "name": "small"}).values
    a, b = np.array(whole["box"]), np.array(small["box"])
    overlap = np.prod(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]))
    union = np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - overlap
    assert overlap / union > 0.6
    side = load_image(tmp_path / "images/small.png").shape[0]
    assert side > 1.1 * (b[2] - b[0])  # pixels of the photograph, not of the shrunk copy
