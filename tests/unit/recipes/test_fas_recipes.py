"""The anti-spoofing sets: labels, splits, people and frames of every raw layout, down to a batch for a detector."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

import miniatures
import miniatures_fas
from fsvfm.data.datamodules import AntispoofData
from fsvfm.data.datasets import LabelledFaces, collate
from fsvfm.data.manifest import Manifest
from fsvfm.data.transforms import test_transform as plain
from fsvfm.errors import ConfigError, DataError
from fsvfm.faces.align import five_points, reference_points
from fsvfm.faces.detect import DlibHOG
from fsvfm.faces.images import load_image
from fsvfm.faces.landmarks import Landmarks68
from fsvfm.recipes.antispoofing import (
    casia_catalogue,
    cefa_catalogue,
    celeb_catalogue,
    msu_catalogue,
    oulu_catalogue,
    replay_catalogue,
    surf_catalogue,
)
from fsvfm.recipes.engine import Catalogue, Prepared

#: Catalogues open no file, so these pictures need no face in them.
GREY = [np.full((168, 168, 3), shade, np.uint8) for shade in (60, 100, 140)]


def prepare(recipe: str, root: Path, out: Path, *overrides: str) -> Prepared:
    with initialize_config_module("fsvfm.configs", version_base="1.3"):
        cfg = compose("prepare", [f"recipe={recipe}", f"root={root}", f"out={out}", *overrides])
    return instantiate(cfg.recipe, _partial_=True, _convert_="all")(out=str(out), workers=1)


def by_video(catalogue: Catalogue) -> dict[str, tuple[str, str, str]]:
    """Split, method and subject by video; the method says the class."""
    assert all((each.method == "real") == (each.label == 0) for each in catalogue.entries)
    return {each.video: (each.split, each.method, each.subject) for each in catalogue.entries}


@pytest.fixture(scope="module")
def photos(media_dir: Path) -> list[np.ndarray]:
    return miniatures.faces(media_dir)


@pytest.fixture(scope="module")
def made(photos: list[np.ndarray], tmp_path_factory: Any) -> Callable[[str], Prepared]:
    """The prepared miniature of a set of videos, made once."""

    @functools.cache
    def make(name: str) -> Prepared:
        folder = tmp_path_factory.mktemp(name)
        return prepare(name, getattr(miniatures_fas, name)(folder / "raw", photos), folder / "out")

    return make


@pytest.fixture(scope="module")
def distance() -> Callable[[np.ndarray], float]:
    """How far eyes and corners of the mouth of a chip are from their places, in pixels; noses differ too much."""
    detect, landmarks = DlibHOG(), Landmarks68()

    def measure(chip: np.ndarray) -> float:
        found = five_points(landmarks(chip, detect(chip)[0].box))
        return float(np.abs(found - reference_points(224))[[0, 1, 3, 4]].max())

    return measure


# --- Catalogues of the videos ----------------------------------------------------------------------------------------


def test_replay_attack(tmp_path: Path) -> None:
    catalogue = replay_catalogue(miniatures_fas.replay(tmp_path, GREY))
    name = "client001_session01_webcam_authenticate_adverse_1"
    attack = "attack_print_client{}_session01_highdef_photo_adverse"
    assert by_video(catalogue) == {
        f"train/real/{name}": ("train", "real", "001"),
        "devel/real/client002_session01_webcam_authenticate_adverse_1": ("val", "real", "002"),
        "test/real/client003_session01_webcam_authenticate_adverse_1": ("test", "real", "003"),
        f"train/attack/fixed/{attack.format('001')}": ("train", "print_photo", "001"),
        f"train/attack/hand/{attack.format('001')}": ("train", "print_photo", "001"),  # the same name, another video
        f"devel/attack/fixed/{attack.format('002')}": ("val", "print_photo", "002"),
        f"test/attack/fixed/{attack.format('003')}": ("test", "print_photo", "003"),
    }
    assert {each.frames for each in catalogue.entries} == {2}
    assert any("1 video(s) left out, enrolment" in text for text in catalogue.warnings)
    assert any("train attack 2 (published: 300)" in text for text in catalogue.warnings)
    miniatures.write_clip(tmp_path / "competition_icb2013/test/real/a.mov", GREY[0])
    miniatures.write_clip(tmp_path / "test/elsewhere/b.mov", GREY[0])
    catalogue = replay_catalogue(tmp_path)
    assert len(catalogue.entries) == 7
    assert [(Path(file).name, reason) for file, reason in catalogue.skipped] == [
        ("b.mov", "its folders do not say split and class")
    ]


def test_msu(tmp_path: Path) -> None:
    root = miniatures_fas.msu(tmp_path, GREY)
    catalogue = msu_catalogue(root)
    assert by_video(catalogue) == {
        "scene01/attack/attack_client001_android_SD_ipad_video_scene01": ("train", "ipad_video", "001"),
        "scene01/attack/attack_client002_android_SD_ipad_video_scene01": ("test", "ipad_video", "002"),
        "scene01/real/real_client001_android_SD_scene01": ("train", "real", "001"),
        "scene01/real/real_client002_android_SD_scene01": ("test", "real", "002"),
    }
    assert Counter(reason for _, reason in catalogue.skipped) == {"its client is in neither list": 2}
    (root / "train_sub_list.txt").write_text("01 02\n")
    with pytest.raises(DataError, match="client 2 stands in train_sub_list"):
        msu_catalogue(root)
    (root / "train_sub_list.txt").unlink()
    with pytest.raises(DataError, match=r"no file train_sub_list\.txt below"):
        msu_catalogue(root)


def test_oulu(tmp_path: Path) -> None:
    root = miniatures_fas.oulu(tmp_path, GREY)
    (root / "Train_files" / "notes.avi").write_bytes(b"")
    catalogue = oulu_catalogue(root)
    assert by_video(catalogue) == {
        "Train_files/1_1_01_1": ("train", "real", "01"),
        "Train_files/1_1_01_2": ("train", "print_1", "01"),
        "Train_files/1_1_01_5": ("train", "replay_2", "01"),
        "Test_files/1_1_36_1": ("test", "real", "36"),
        "Test_files/1_1_36_4": ("test", "replay_1", "36"),
    }
    assert [reason for _, reason in catalogue.skipped] == ["not named <phone>_<session>_<user>_<file>"]


def test_casia(tmp_path: Path) -> None:
    root = miniatures_fas.casia(tmp_path, GREY)
    catalogue = casia_catalogue(root)
    assert by_video(catalogue) == {
        f"{split}_release/1/{clip}": (split, method, f"{split}_1")
        for split in ("train", "test")
        for clip, method in (("1", "real"), ("HR_1", "real"), ("4", "warped_photo"), ("HR_4", "video"))
    }
    (root / "test_release").rename(root / "test")
    with pytest.raises(DataError, match=r"test_release .*train_release"):
        casia_catalogue(root)


@pytest.mark.parametrize(
    ("clip", "label"),
    [(name, 0) for name in ("1", "2", "HR_1")]
    + [(name, 1) for name in ("3", "4", "5", "6", "7", "8", "HR_2", "HR_3", "HR_4")],
)
def test_every_clip_of_casia_has_its_label(clip: str, label: int, tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / f"{split}_release/7").mkdir(parents=True)
        (tmp_path / f"{split}_release/7/{clip}.avi").write_bytes(b"")
    assert [each.label for each in casia_catalogue(tmp_path).entries] == [label, label]


# --- Catalogues of the pictures --------------------------------------------------------------------------------------


def test_celeba_spoof(tmp_path: Path) -> None:
    root = miniatures_fas.celeb(tmp_path, GREY) / "CelebA_Spoof"
    videos = by_video(celeb_catalogue(root))
    assert len(videos) == 9
    assert videos["train/1/live/000001"] == ("train", "real", "1")
    assert videos["test/10/spoof/000008"] == ("test", "attack", "10")
    assert by_video(celeb_catalogue(root / "Data")) == videos
    listing = tmp_path / "list.txt"
    listing.write_text("Data/train/1/live/000001.png 0\ntest/10/spoof/000008.png,1\nData/train/1/live/9.png 0\n")
    some = celeb_catalogue(root, images=str(listing))
    assert sorted(by_video(some)) == ["test/10/spoof/000008", "train/1/live/000001"]
    assert [reason for _, reason in some.skipped] == ["no such file"]
    with pytest.raises(DataError, match=r"recipe\.images"):
        celeb_catalogue(root, images=str(tmp_path / "nowhere.txt"))


def test_a_sample_of_celeba_spoof(tmp_path: Path) -> None:
    root = miniatures_fas.celeb(tmp_path, GREY) / "CelebA_Spoof"
    drawn = [by_video(celeb_catalogue(root, sample=1, seed=seed)) for seed in range(6)]
    assert all(
        Counter((split, method) for split, method, _ in each.values())
        == dict.fromkeys([("train", "real"), ("train", "attack"), ("test", "real"), ("test", "attack")], 1)
        for each in drawn
    )
    assert len({tuple(sorted(each)) for each in drawn}) > 1
    assert drawn[3] == by_video(celeb_catalogue(root, sample=1, seed=3))
    assert len(celeb_catalogue(root, sample=99).entries) == 9
    with pytest.raises(ConfigError, match=r"recipe\.sample=0"):
        celeb_catalogue(root, sample=0)


def test_cefa_takes_the_listed_tenths_of_a_clip(tmp_path: Path) -> None:
    lists = miniatures_fas.lists(tmp_path / "txt", miniatures_fas.CEFA)
    catalogue = cefa_catalogue(miniatures_fas.cefa(tmp_path / "raw", GREY), lists=lists)
    found = {
        each.name: (Path(each.file).stem, each.split, each.method, each.video, dict(each.more))
        for each in catalogue.entries
    }
    # 25 pictures: the tenths begin with numbers 1, 3, 5 …
    assert found == {
        "cefa_train_real_1_260_1_1_1_05": (
            "0011", "train", "real", "cefa/train/real/1_260_1_1_1", {"frame": 5, "shot": 1, "source": 1},
        ),
        "cefa_train_real_1_260_1_1_1_00": (
            "0001", "train", "real", "cefa/train/real/1_260_1_1_1", {"frame": 0, "shot": 0, "source": 1},
        ),
        "cefa_train_fake_1_260_3_2_2_07": (
            "0015", "train", "cloth", "cefa/train/fake/1_260_3_2_2", {"frame": 7, "shot": 1, "source": 1},
        ),
        "cefa_test_real_3_272_1_1_1_09": (
            "0019", "test", "real", "cefa/test/real/3_272_1_1_1", {"frame": 9, "shot": 0, "source": 0},
        ),
        "cefa_test_fake_3_272_3_2_4_00": (
            "0001", "test", "screen", "cefa/test/fake/3_272_3_2_4", {"frame": 0, "shot": 0, "source": 0},
        ),
    }  # fmt: skip
    assert all("profile" in each.file for each in catalogue.entries)
    assert list(catalogue.skipped) == [("cefa/test/fake/3_499_3_2_3_00.jpg", "listed, but not in the raw folder")]


def test_surf_finds_files_by_their_path_in_the_list(tmp_path: Path) -> None:
    lists = miniatures_fas.lists(tmp_path / "txt", miniatures_fas.SURF)
    raw = miniatures_fas.surf(tmp_path / "raw", GREY)
    found = {
        Path(each.file).relative_to(raw).as_posix(): (each.split, each.method)
        for each in surf_catalogue(raw, lists=lists).entries
    }
    assert found == {
        "Training/real_part/CLKJ_AS0005/real.rssdk/color/5.jpg": ("train", "real"),
        "Training/fake_part/CLKJ_AS0005/06_enm_b.rssdk/color/120.jpg": ("train", "attack_06"),
        "Val/0000/000000-color.jpg": ("test", "real"),
        "Val/0001/000100-color.jpg": ("test", "attack"),
    }
    with pytest.raises(DataError, match="no list of surf"):
        surf_catalogue(raw, lists=miniatures_fas.lists(tmp_path / "other", miniatures_fas.CEFA))


# --- From raw data to a batch ----------------------------------------------------------------------------------------


def sample(made: Prepared) -> dict[str, Any]:
    """A batch of everything, as detectors are tested on it."""
    rows = LabelledFaces(Manifest.read(made.root), plain(224))
    return collate([rows[index] for index in range(len(rows))])


@pytest.mark.parametrize("name", ["replay", "msu", "oulu", "casia"])
def test_two_aligned_frames_of_every_video(
    name: str, made: Callable[[str], Prepared], distance: Callable[[np.ndarray], float]
) -> None:
    prepared = made(name)
    table = prepared.manifest.table
    assert set(table["dataset"]) == {name}
    frames = table.groupby("video")["frame"].apply(sorted).tolist()
    assert all(each == [6, 6 + miniatures_fas.FRAMES // 2] for each in frames)
    batch = sample(prepared)
    assert batch["image"].shape == (len(table), 3, 224, 224)
    assert batch["label"].tolist() == table["label"].tolist()
    assert not batch["unreadable"]
    for split in ("train", "test"):
        prepared.manifest.select(split=split).require_both_classes(split)
    assert distance(load_image(prepared.manifest.select(label=0).paths()[0])) < 12


def test_pictures_of_celeba_spoof_are_aligned(
    photos: list[np.ndarray], tmp_path: Path, distance: Callable[[np.ndarray], float]
) -> None:
    root = miniatures_fas.celeb(tmp_path / "raw", photos) / "CelebA_Spoof"
    made = prepare("celeb", root, tmp_path / "out", "recipe.sample=1")
    assert len(made.manifest) == 4
    assert set(made.manifest.table["dataset"]) == {"celeb"}
    assert sample(made)["image"].shape == (4, 3, 224, 224)
    assert distance(load_image(made.manifest.select(label=0).paths()[0])) < 12


@pytest.mark.parametrize("name", ["cefa", "surf", "wmca"])
def test_listed_pictures_are_taken_as_they_are_without_borders(
    name: str, photos: list[np.ndarray], tmp_path: Path
) -> None:
    if name == "wmca":
        pytest.importorskip("h5py", reason="reading WMCA needs h5py")
    listed = getattr(miniatures_fas, name.upper())
    lists = miniatures_fas.lists(tmp_path / "txt", listed)
    raw = getattr(miniatures_fas, name)(tmp_path / "raw", photos)
    made = prepare(name, raw, tmp_path / "out", f"recipe.lists={lists}")
    table = made.manifest.table
    absent = 0 if name == "surf" else 1
    assert len(table) == len({file for files in listed.values() for file in files}) - absent
    assert sum(len(tally.skipped) for tally in made.tallies) == absent
    assert set(table["dataset"]) == {name}
    assert sample(made)["label"].tolist() == table["label"].tolist()
    saved = dict(zip(table["video"] + "/" + table["frame"].astype(str), made.manifest.paths(), strict=True))
    if name == "wmca":
        assert load_image(saved["wmca/train/real/2018-08-24_004_03_000_0_01/3"])[0, 0, 0] == 170
    else:
        video, expected = "surf/test/real/Val_0000_000000-color/0", photos[1]
        if name == "cefa":
            video, expected = "cefa/train/real/1_260_1_1_1/5", photos[0][::4, ::4].copy()
            expected[:12, :12] = 40 + 8 * 10
        without, with_border = (
            cv2.resize(picture, (224, 224), interpolation=cv2.INTER_CUBIC).astype(int)
            for picture in (expected, miniatures_fas.bordered(expected))
        )
        found = load_image(saved[video])  # JPEG's ringing leaves some pixels of a border
        assert np.abs(found - without).mean() < 0.4 * np.abs(found - with_border).mean()


def test_prepared_sets_feed_the_protocol(made: Callable[[str], Prepared]) -> None:
    """Two prepared sets as sources, a third as target: the batches of the anti-spoofing task."""
    data = AntispoofData(
        [str(made(name).root) for name in ("casia", "oulu")], domains=["casia", "oulu", "msu"], target="msu", shots=0,
        val_share=0, selection="last", image_size=64, batch_size=2, evaluate_every=1, workers=0,
        augment={"crop_scale": None, "flip": True, "rand_augment": None, "saturation": None},
    )  # fmt: skip
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (8, 3, 64, 64)  # two of each class and source
    assert batch["label"].sum() == 4
    assert set(data.train.table["frame"]) == {6}  # the first frame of every training video
