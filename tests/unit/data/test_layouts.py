"""Folders in published layouts become manifests without a file being written into them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fsvfm import build
from fsvfm.data import layouts
from fsvfm.data.datamodules import AntispoofData
from fsvfm.data.datasets import PretrainFaces
from fsvfm.data.layouts import Listed, from_folder, protocol_columns, read_lists
from fsvfm.data.manifest import Manifest
from fsvfm.errors import DataError
from fsvfm.faces.images import save_png
from fsvfm.regions import region_grid


def write(root: Path, *names: str, size: int = 8) -> None:
    for name in names:
        save_png(root / name, np.full((size, size, 3), 90, np.uint8))


def rows(manifest: Manifest, *columns: str) -> list[tuple[object, ...]]:
    table = manifest.table.sort_values("path")
    return list(table[["path", *columns]].itertuples(index=False, name=None))


# --- Faces with parsing maps -----------------------------------------------------------------------------------------


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    """Three faces of two videos in the reference's layout: PNG and int8 (1, 224, 224) arrays."""
    root = tmp_path / "vf2"
    (root / "parsing_maps").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for stem in ("000_frame_0", "000_frame_17", "train_n000002_0001_01"):
        save_png(root / "images" / f"{stem}.png", rng.integers(0, 255, (224, 224, 3), dtype=np.uint8))
        labels = rng.integers(0, 11, (1, 14, 14)).repeat(16, 1).repeat(16, 2).astype(np.int8)
        np.save(root / "parsing_maps" / f"{stem}.npy", labels)
    return root


def test_faces_with_parsing_maps_are_read_as_they_are(faces: Path) -> None:
    before = sorted(faces.rglob("*"))
    manifest = Manifest.read(faces)
    assert sorted(faces.rglob("*")) == before
    assert rows(manifest, "parse", "video", "frame", "label", "split", "dataset") == [
        ("images/000_frame_0.png", "parsing_maps/000_frame_0.npy", "000", 0, 0, "train", "vf2"),
        ("images/000_frame_17.png", "parsing_maps/000_frame_17.npy", "000", 17, 0, "train", "vf2"),
        (
            "images/train_n000002_0001_01.png",
            "parsing_maps/train_n000002_0001_01.npy",
            "train_n000002_0001_01",
            0,
            0,
            "train",
            "vf2",
        ),
    ]
    sample = PretrainFaces(manifest)[1]
    assert not sample["unreadable"]
    labels = np.load(faces / "parsing_maps/000_frame_17.npy")[0].astype(np.uint8)
    torch.testing.assert_close(sample["grid"], torch.from_numpy(region_grid(labels, 16)))


def test_an_image_without_its_map_is_left_out_and_told(faces: Path) -> None:
    write(faces, "images/alone.png")
    with pytest.warns(UserWarning, match=r"1 of 4 images have no parsing map"):
        assert len(Manifest.read(faces)) == 3
    for file in (faces / "parsing_maps").iterdir():
        file.rename(file.with_stem(f"other_{file.stem}"))
    with pytest.raises(DataError, match=r"no image in .* has a parsing map of the same name"):
        Manifest.read(faces)


# --- Class folders ---------------------------------------------------------------------------------------------------


def test_class_folders(tmp_path: Path) -> None:
    write(tmp_path, "real/ann/1.png", "real/2.png", "fake_x/3.png")
    table = from_folder(tmp_path).table
    assert list(table["path"]) == ["fake_x/3.png", "real/2.png", "real/ann/1.png"]
    assert list(table["method"]) == ["fake_x", "real", "real"]
    assert list(table["subject"]) == ["3", "2", "ann"]
    assert set(table["split"]) == {"test"}
    write(tmp_path, "other/4.png")
    with pytest.raises(DataError, match=r"is the folder .*other real or fake"):
        from_folder(tmp_path)
    assert len(from_folder(tmp_path, classes={"other": 1})) == 4


def test_class_folders_below_splits_with_methods_and_frames(tmp_path: Path) -> None:
    write(
        tmp_path,
        "train/real/000_frame_0.png",
        "train/real/000_frame_3.png",
        "train/fake/Deepfakes/000_003_frame_0.png",
        "train/fake/FaceSwap/000_003_frame_0.png",
        "val/fake/FaceSwap/v7/12.png",
        "val/real/1.png",
        "test/real/1.png",
        "test/fake/.hidden.png",
        "test/fake/1.PNG",
    )
    assert build.prepared(tmp_path)
    assert rows(Manifest.read(tmp_path), "split", "label", "method", "video", "subject", "frame") == [
        ("test/fake/1.PNG", "test", 1, "fake", "test/fake/1", "", 0),
        ("test/real/1.png", "test", 0, "real", "test/real/1", "", 0),
        ("train/fake/Deepfakes/000_003_frame_0.png", "train", 1, "Deepfakes", "fake/Deepfakes/000_003", "", 0),
        ("train/fake/FaceSwap/000_003_frame_0.png", "train", 1, "FaceSwap", "fake/FaceSwap/000_003", "", 0),
        ("train/real/000_frame_0.png", "train", 0, "real", "real/000", "", 0),
        ("train/real/000_frame_3.png", "train", 0, "real", "real/000", "", 3),
        ("val/fake/FaceSwap/v7/12.png", "val", 1, "FaceSwap", "fake/FaceSwap/v7", "FaceSwap/v7", 0),
        ("val/real/1.png", "val", 0, "real", "val/real/1", "", 0),
    ]


def test_a_video_in_two_split_folders_is_a_leak(tmp_path: Path) -> None:
    write(tmp_path, "train/real/000_frame_0.png", "test/real/000_frame_9.png")
    with pytest.raises(DataError, match=r"real/000 \(train, test\)"):
        Manifest.read(tmp_path)


# --- Face anti-spoofing bundles --------------------------------------------------------------------------------------

LISTS = {
    "msu_real_train": ["msu/train/real/a_frame0.png", "msu/train/real/b_frame0.png", "msu/test/real/c_frame0.png"],
    "msu_fake_train": ["msu/train/fake/a_frame0.png"],
    "msu_real_test": ["msu/test/real/c_frame0.png"],
    "msu_fake_test": ["msu/test/fake/d_frame0.png"],
    "msu_real_shot": ["msu/train/real/b_frame0.png"],
    "msu_fake_shot": ["msu/train/fake/e_frame0.png"],
}


def bundle(root: Path, lists: dict[str, list[str]], more: Sequence[str] = (), end: str = "\n") -> Path:
    for name, lines in lists.items():
        (root / "txt").mkdir(parents=True, exist_ok=True)
        (root / "txt" / f"{name}.txt").write_bytes((end.join(lines) + end).encode())
        write(root / "frame", *lines, *more)
    return root


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"])
def test_a_bundle_is_read_as_its_lists_say(tmp_path: Path, end: str) -> None:
    more = ["msu/test/real/c_frame1.png", "msu/train/real/a_frame1.png", "msu/test/real/z_frame0.png"]
    root = bundle(tmp_path / "MCIO", LISTS, more, end)
    assert build.prepared(root)
    assert rows(Manifest.read(root), "label", "split", "video", "frame", "shot", "source") == [
        ("frame/msu/test/fake/d_frame0.png", 1, "test", "msu/test/fake/d", 0, 0, 0),
        ("frame/msu/test/real/c_frame0.png", 0, "test", "msu/test/real/c", 0, 0, 1),  # a source may be trained on it
        ("frame/msu/test/real/c_frame1.png", 0, "test", "msu/test/real/c", 1, 0, 0),  # the second frame of a target
        ("frame/msu/train/fake/a_frame0.png", 1, "train", "msu/train/fake/a", 0, 0, 1),
        ("frame/msu/train/fake/e_frame0.png", 1, "train", "msu/train/fake/e", 0, 2, 0),
        ("frame/msu/train/real/a_frame0.png", 0, "train", "msu/train/real/a", 0, 0, 1),
        ("frame/msu/train/real/b_frame0.png", 0, "train", "msu/train/real/b", 0, 1, 1),
    ]
    table = Manifest.read(root).table
    assert set(table["dataset"]) == {"msu"}
    assert set(table["method"]) == {"real", "attack"}


def test_ten_frames_have_a_number_at_the_end(tmp_path: Path) -> None:
    lists = {
        "cefa_real_train": [f"cefa/train/real/3_272_1_1_1_{i:02d}.jpg" for i in range(10)],
        "cefa_fake_test": ["cefa/test/fake/3_230_3_2_2_07.jpg"],
        "wmca_fake_train": ["wmca/train/fake/2018-08-24_004_03_000_3_01_00.jpg"],
    }
    table = Manifest.read(bundle(tmp_path, lists)).table
    cefa = table[(table["dataset"] == "cefa") & (table["label"] == 0)]
    assert set(cefa["video"]) == {"cefa/train/real/3_272_1_1_1"}
    assert sorted(cefa["frame"]) == list(range(10))
    assert set(table["dataset"]) == {"cefa", "wmca"}
    assert "wmca/train/fake/2018-08-24_004_03_000_3_01" in set(table["video"])


def test_a_bundle_feeds_the_protocol_as_it_is(tmp_path: Path) -> None:
    lists = dict(LISTS)
    for name in ("casia", "oulu"):
        for list_name, files in LISTS.items():
            lists[list_name.replace("msu", name)] = [file.replace("msu", name) for file in files]
    data = AntispoofData(
        [str(bundle(tmp_path, lists))], domains=["msu", "casia", "oulu"], target="oulu", shots=1, val_share=0,
        selection="target_best", image_size=16, batch_size=1, evaluate_every=1, workers=0,
        augment={"crop_scale": None, "flip": True, "rand_augment": None, "saturation": None},
    )  # fmt: skip
    trained_on = sorted(data.train.table["path"])
    expected = [path.replace("msu", name) for name in ("msu", "casia") for path in LISTS["msu_real_train"]]
    expected += [f"{name}/train/fake/a_frame0.png" for name in ("msu", "casia")]
    expected += ["oulu/train/real/b_frame0.png", "oulu/train/fake/e_frame0.png"]  # the shots of the target
    assert trained_on == sorted(f"frame/{path}" for path in expected)
    assert next(iter(data.train_dataloader()))["image"].shape == (6, 3, 16, 16)


def test_listed_files_that_are_absent_are_counted(tmp_path: Path) -> None:
    root = bundle(tmp_path, LISTS)
    for name in ("a", "b"):
        (root / f"frame/msu/train/real/{name}_frame0.png").unlink()
    with pytest.raises(DataError, match=r"of which 2 are not below .*: msu/train/real/a_frame0\.png, msu/train/real/b"):
        Manifest.read(root)


def test_a_set_without_a_folder_is_left_out(tmp_path: Path) -> None:
    root = bundle(tmp_path, LISTS)
    (root / "txt" / "oulu_real_train.txt").write_text("oulu/train/real/x_frame0.png\n")
    assert set(Manifest.read(root).table["dataset"]) == {"msu"}


def test_contradicting_lists(tmp_path: Path) -> None:
    lists = {**LISTS, "msu_fake_train": ["msu/train/real/a_frame0.png"]}
    with pytest.raises(DataError, match=r"msu/train/real/a_frame0\.png both as real and as fake"):
        Manifest.read(bundle(tmp_path / "labels", lists))
    lists = {**LISTS, "msu_real_shot": ["msu/test/real/c_frame0.png"]}
    with pytest.warns(UserWarning, match=r"1 file\(s\) of the shot lists belong to videos of the test lists"):
        table = Manifest.read(bundle(tmp_path / "shots", lists)).table
    assert list(table.loc[table["shot"] > 0, "path"]) == ["frame/msu/train/fake/e_frame0.png"]


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.sets(st.sampled_from(["train", "test", "shot"]), min_size=1)), max_size=12
    )
)
def test_no_video_is_in_two_splits_whatever_the_lists_say(drawn: list[tuple[str, set[str]]]) -> None:
    listed = [Listed(f"{video}_frame{i}.png", 0, frozenset(lists)) for i, (video, lists) in enumerate(drawn)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        columns = protocol_columns(listed, [video for video, _ in drawn], "x")
    splits: dict[str, set[str]] = {}
    for (video, lists), column in zip(drawn, columns, strict=True):
        splits.setdefault(video, set()).add(column["split"])
        assert column["source"] == ("train" in lists)
        assert column["split"] == "test" or "test" not in lists
        assert not (column["shot"] and column["split"] == "test")
    assert all(len(each) == 1 for each in splits.values())


def test_lists_of_some_sets(tmp_path: Path) -> None:
    root = bundle(tmp_path, LISTS)
    (root / "txt" / "oulu_real_train.txt").write_text("oulu/train/real/x_frame0.png\n")
    assert list(read_lists(root / "txt", ["msu"])) == ["msu"]
    with pytest.raises(DataError, match="no list of wmca"):
        read_lists(root / "txt", ["wmca"])
    with pytest.raises(DataError, match="no folder"):
        read_lists(root / "nowhere")


# --- Which of them ---------------------------------------------------------------------------------------------------


def test_other_folders_are_told_what_is_known(tmp_path: Path) -> None:
    write(tmp_path, "pictures/1.png")
    assert not build.prepared(tmp_path)
    with pytest.raises(DataError) as caught:
        Manifest.read(tmp_path)
    for part in ("no manifest at", "parsing_maps/<name>.npy", "real*/ and fake*/", "txt/<set>_"):
        assert part in str(caught.value)


def test_two_layouts_at_once_are_refused(faces: Path) -> None:
    write(faces, "real/1.png")
    with pytest.raises(DataError, match="looks like faces with parsing maps and class folders at once"):
        Manifest.read(faces)


def test_an_unfinished_preparation_is_not_taken_for_a_layout(faces: Path) -> None:
    (faces / ".prepare").mkdir()
    with pytest.raises(DataError, match="not finished"):
        Manifest.read(faces)


def test_our_own_prepared_folder_keeps_its_manifest(prepared_dir: Path) -> None:
    assert "grid_p16" in Manifest.read(prepared_dir).table
    assert not layouts.known(prepared_dir / "images")


# --- FaceForensics++ frames with masks --------------------------------------------------------------------------------


def test_frames_with_masks_are_read_as_they_are(tmp_path: Path) -> None:
    root = tmp_path / "FF"
    write(root, *(f"image/real/{clip}/{n:04d}.png" for clip in ("000", "003", "007", "100") for n in (0, 1)))
    write(root, "image/FF-DF/000_003/0000.png", "image/FF-NT/003_000/0012.png", "image/FF-F2F/007_012/0000.png")
    write(root, "mask/FF-DF/000_003/0000_mask.png", "mask/FF-F2F/007_012/0000.png")
    for name, pairs in (("train", [["000", "003"]]), ("eval", [["007", "012"]])):
        (root / "config").mkdir(exist_ok=True)
        (root / "config" / f"{name}.json").write_text(json.dumps(pairs))
    assert build.prepared(root)
    with pytest.warns(UserWarning, match="2 frames of videos that no config names"):
        manifest = Manifest.read(root)
    found = {row[0]: row[1:] for row in rows(manifest, "label", "split", "method", "video", "subject", "frame", "mask")}
    assert found.pop("image/real/000/0001.png") == (0, "train", "real", "000", "000", 1, "")
    assert found.pop("image/FF-DF/000_003/0000.png") == (
        1, "train", "Deepfakes", "Deepfakes/000_003", "000+003", 0, "mask/FF-DF/000_003/0000_mask.png",
    )  # fmt: skip
    assert found.pop("image/FF-NT/003_000/0012.png")[1:] == (
        "train", "NeuralTextures", "NeuralTextures/003_000", "003+000", 12, "",
    )  # fmt: skip
    assert found.pop("image/FF-F2F/007_012/0000.png")[-1] == "mask/FF-F2F/007_012/0000.png"
    assert {values[1] for path, values in found.items() if "/007/" in path} == {"val"}
    assert not any("/100/" in path for path in found)
    with pytest.warns(UserWarning, match="no config names"):
        joined = Manifest.concat([from_folder_of_one(tmp_path), Manifest.read(root)])
    assert joined.files("mask")[list(joined.table["path"]).index(str(root / "image/FF-DF/000_003/0000.png"))] == str(
        root / "mask/FF-DF/000_003/0000_mask.png"
    )
    (root / "config" / "train.json").write_text('{"000": 1}')
    with pytest.raises(DataError, match="list of pairs"):
        Manifest.read(root)
    for name in ("train", "eval"):
        (root / "config" / f"{name}.json").unlink()
    with pytest.raises(DataError, match=r"none of train\.json"):
        Manifest.read(root)


def from_folder_of_one(folder: Path) -> Manifest:
    write(folder / "classes", "real/x.png")
    return from_folder(folder / "classes")
