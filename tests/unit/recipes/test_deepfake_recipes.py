"""Catalogues of the deepfake sets: which file is which video, with which label, in which split — nothing decoded."""

from __future__ import annotations

import json
import shlex
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_module
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

import fsvfm.prepare  # noqa: F401  (registers what its configurations use)
import miniatures
from fsvfm.errors import ConfigError, DataError
from fsvfm.recipes.celebdf import LIST, celebdf_catalogue
from fsvfm.recipes.dfdc import dfdc_catalogue, dfdcp_catalogue
from fsvfm.recipes.diff import diff_catalogue
from fsvfm.recipes.engine import Catalogue
from fsvfm.recipes.faceforensics import (
    METHODS,
    dfd_catalogue,
    ffpp_catalogue,
    ffpp_pretrain_catalogue,
    official_splits,
)
from fsvfm.recipes.wilddeepfake import wdf_catalogue

CONFIGS = Path(__file__).resolve().parents[3] / "configs"

#: Catalogues open no file, so these pictures need no face in them.
PHOTOS = [np.full((32, 32, 3), shade, np.uint8) for shade in (40, 80, 120, 160)]


def by_video(catalogue: Catalogue) -> dict[str, tuple[int, str, str, str, int]]:
    """Label, split, method, subject and frames by video."""
    return {e.video: (e.label, e.split, e.method, e.subject, e.frames) for e in catalogue.entries}


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


# --- FaceForensics++ and DFD --------------------------------------------------------------------------------------


def test_the_shipped_splits_are_the_official_ones(shared_dir: Path) -> None:
    splits = official_splits()
    assert Counter(splits.values()) == {"train": 720, "val": 140, "test": 140}
    assert sorted(splits) == [f"{number:03d}" for number in range(1000)]
    for split, pairs in json.loads((shared_dir / "spec" / "ffpp_splits.json").read_text()).items():
        assert {splits[identity] for pair in pairs for identity in pair} == {split}


@pytest.fixture(scope="module")
def ffpp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ffpp")
    return miniatures.ffpp(root, PHOTOS, methods=(*METHODS, "FaceShifter"))


def test_ffpp_rows(ffpp: Path) -> None:
    catalogue = ffpp_catalogue(ffpp)
    videos = by_video(catalogue)
    assert len(videos) == len(catalogue.entries) == 8 + 4 * 8
    assert videos["youtube/071"] == (0, "train", "real", "071", 128)
    assert videos["Deepfakes/054_071"] == (1, "train", "Deepfakes", "054+071", 32)
    assert videos["NeuralTextures/720_672"] == (1, "val", "NeuralTextures", "720+672", 32)
    assert videos["FaceSwap/974_953"] == (1, "test", "FaceSwap", "974+953", 32)
    assert {entry.method for entry in catalogue.entries} == {"real", *METHODS}  # FaceShifter only if asked for
    assert any("FaceShifter" in warning for warning in catalogue.warnings)
    assert all(Path(entry.file).is_file() for entry in catalogue.entries)
    names = [entry.name for entry in catalogue.entries]
    assert len(set(names)) == len(names)
    assert all(name.replace("_", "").isalnum() for name in names)


def test_no_person_of_ffpp_is_in_two_splits(ffpp: Path) -> None:
    splits: dict[str, set[str]] = {}
    for entry in ffpp_catalogue(ffpp).entries:
        for person in entry.subject.split("+"):
            splits.setdefault(person, set()).add(entry.split)
    assert splits
    assert all(len(found) == 1 for found in splits.values())


def test_ffpp_modes_methods_and_frames(ffpp: Path) -> None:
    each = by_video(ffpp_catalogue(ffpp, mode="each", methods=["deepfakes"]))
    assert {(row[2], row[4]) for row in each.values()} == {("real", 32), ("Deepfakes", 32)}
    shifted = by_video(ffpp_catalogue(ffpp, methods=["FaceShifter"], frames={"fake": 0}))
    assert {(row[2], row[4]) for row in shifted.values()} == {("real", 128), ("FaceShifter", 0)}
    for options in (
        {"mode": "both"},
        {"compression": "c99"},
        {"frames": {"reals": 3}},
        {"frames": {"real": -1}},
        {"frames": {"real": "many"}},
        {"methods": []},
        {"methods": ["FaceSwap", "faceswap"]},
    ):
        with pytest.raises(ConfigError, match=f"recipe.{next(iter(options))}"):
            ffpp_catalogue(ffpp, **options)  # type: ignore[arg-type]


def test_ffpp_in_other_spelling_and_container(ffpp: Path, tmp_path: Path) -> None:
    """The same data set under `DeepFakes`, `C23` and `.AVI`: the same videos, methods and names."""
    root = tmp_path / "ff"
    for file in ffpp.rglob("*.mp4"):
        place = file.relative_to(ffpp).as_posix().replace("Deepfakes", "DeepFakes").replace("c23", "C23")
        touch(root, place.replace("original_sequences", "Original_Sequences").replace(".mp4", ".AVI"))
    here, there = ffpp_catalogue(root), ffpp_catalogue(ffpp)
    assert by_video(here) == by_video(there)
    assert [entry.name for entry in here.entries] == [entry.name for entry in there.entries]


def test_ffpp_says_what_is_missing(ffpp: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manipulated_sequences.*FaceSwp.*FaceSwap"):  # and what is there
        ffpp_catalogue(ffpp, methods=["FaceSwp"])
    with pytest.raises(DataError, match=r"original_sequences.*no sub-folder"):
        ffpp_catalogue(tmp_path)
    with pytest.raises(DataError, match=r"youtube.c40.*c23"):
        ffpp_catalogue(ffpp, compression="c40")
    with pytest.raises(DataError, match="no folder"):
        ffpp_catalogue(tmp_path / "nowhere")
    for folder in ("original_sequences/youtube", "manipulated_sequences/Deepfakes"):
        (tmp_path / folder / "c23" / "videos").mkdir(parents=True)
    with pytest.raises(DataError, match="nothing to prepare"):
        ffpp_catalogue(tmp_path, methods=["Deepfakes"])


def test_ffpp_files_outside_the_splits_are_accounted_for(ffpp: Path, tmp_path: Path) -> None:
    shutil.copytree(ffpp, tmp_path / "ff")
    place = "manipulated_sequences/Deepfakes/c23/videos"
    touch(tmp_path / "ff", f"{place}/071_720.mp4", f"{place}/trailer.mp4", f"{place}/.054_071.mp4", f"{place}/list.txt")
    catalogue = ffpp_catalogue(tmp_path / "ff")
    assert by_video(catalogue) == by_video(ffpp_catalogue(ffpp))
    assert {Path(file).name: reason for file, reason in catalogue.skipped} == {
        "071_720.mp4": "its two ids belong to different splits",
        "trailer.mp4": "not in the official splits",
    }
    touch(tmp_path / "ff", f"{place}/054_071.avi")
    with pytest.raises(DataError, match=r"054_071\.\w+ and .*054_071\.\w+ would both be Deepfakes/054_071"):
        ffpp_catalogue(tmp_path / "ff")


def test_counts_that_differ_from_the_published_ones_are_told(ffpp: Path, tmp_path: Path) -> None:
    warnings = " ".join(ffpp_catalogue(ffpp).warnings)
    assert "real c23: train 4 (published: 720), val 2 (published: 140)" in warnings
    assert "Face2Face c23: train 4 (published: 720), val 2 (published: 140), test 2" in warnings
    videos = [f"original_sequences/youtube/c23/videos/{number:03d}.mp4" for number in range(1000)]
    videos += [f"manipulated_sequences/FaceSwap/c23/videos/{n:03d}_{n:03d}.mp4" for n in range(1000)]
    complete = ffpp_catalogue(touch(tmp_path, *videos), methods=["FaceSwap"])
    assert Counter((entry.method, entry.split) for entry in complete.entries) == {
        (method, part): number
        for method in ("real", "FaceSwap")
        for part, number in {"train": 720, "val": 140, "test": 140}.items()
    }
    assert not complete.warnings


def test_pretraining_takes_real_training_and_validation_videos(ffpp: Path) -> None:
    catalogue = ffpp_pretrain_catalogue(ffpp, frames=0)
    assert by_video(catalogue) == {
        f"youtube/{identity}": (0, split, "real", identity, 0)
        for split, pairs in miniatures.FFPP_PAIRS.items()
        if split != "test"
        for pair in pairs
        for identity in pair
    }


def test_dfd_rows(tmp_path: Path) -> None:
    catalogue = dfd_catalogue(miniatures.dfd(tmp_path, PHOTOS))
    assert by_video(catalogue) == {
        "actors/01__hugging_happy": (0, "test", "real", "01", 32),
        "actors/02__hugging_happy": (0, "test", "real", "02", 32),
        "DeepFakeDetection/01_02__hugging_happy__A1B2C3D4": (1, "test", "DeepFakeDetection", "01+02", 32),
        "DeepFakeDetection/02_01__hugging_happy__A1B2C3D4": (1, "test", "DeepFakeDetection", "02+01", 32),
    }
    with pytest.raises(DataError, match=r"actors.c23.*raw"):
        dfd_catalogue(tmp_path, compression="c23")


# --- Celeb-DF -----------------------------------------------------------------------------------------------------


def test_celebdf_takes_listed_videos_only_and_one_is_real(tmp_path: Path) -> None:
    root = miniatures.celebdf(tmp_path, PHOTOS)
    catalogue = celebdf_catalogue(root, youtube_real=True)
    assert by_video(catalogue) == {
        "Celeb-real/id0_0000": (0, "test", "real", "id0", 32),
        "Celeb-real/id1_0000": (0, "test", "real", "id1", 32),
        "Celeb-synthesis/id0_id1_0000": (1, "test", "Celeb-synthesis", "id0+id1", 32),
        "Celeb-synthesis/id1_id0_0000": (1, "test", "Celeb-synthesis", "id1+id0", 32),
        "YouTube-real/00170": (0, "test", "real", "", 32),
    }
    told = " ".join(catalogue.warnings)
    assert "Celeb-real/id5_0009.mp4" in told  # there, but not listed
    assert "5 (published: 518)" in told
    without = celebdf_catalogue(root)
    assert set(by_video(catalogue)) - set(by_video(without)) == {"YouTube-real/00170"}
    assert any("YouTube-real/00170.mp4" in warning for warning in without.warnings)


def test_listed_but_absent_videos_are_skipped_with_the_reason(tmp_path: Path) -> None:
    root = miniatures.celebdf(tmp_path, PHOTOS)
    (root / "Celeb-synthesis/id0_id1_0000.mp4").unlink()
    (root / "Celeb-real/id0_0000.mp4").rename(root / "Celeb-real/ID0_0000.AVI")
    catalogue = celebdf_catalogue(root)
    assert set(by_video(catalogue)) == {"Celeb-real/id0_0000", "Celeb-real/id1_0000", "Celeb-synthesis/id1_id0_0000"}
    assert catalogue.skipped == [(str(root / "Celeb-synthesis/id0_id1_0000.mp4"), "listed but absent")]
    assert any(warning.startswith("1 of 5 listed videos are not there") for warning in catalogue.warnings)


def test_celebdf_methods_of_the_third_version_stay_apart(tmp_path: Path) -> None:
    root = miniatures.celebdf(tmp_path, PHOTOS, methods=("FaceSwap/SimSwap", "FaceSwap/GHOST", "TalkingFace/FLOAT"))
    catalogue = celebdf_catalogue(root, name="celebdf_pp", version="++", youtube_real=True)
    methods = Counter(entry.method for entry in catalogue.entries)
    assert methods == {"real": 3, "FaceSwap/SimSwap": 2, "FaceSwap/GHOST": 2, "TalkingFace/FLOAT": 2}
    videos = [entry.video for entry in catalogue.entries]
    assert len(set(videos)) == len(videos)  # id0_id1_0000 is there once per method
    assert any("FaceSwap 2 (published: 8)" in warning for warning in catalogue.warnings)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 Celeb-real/id0_0000.mp4", "contradicts its folder"),
        ("1 Celeb-synthesis/id0_id1_0000.mp4", "contradicts its folder"),
        ("1 Other/id0.mp4", "contradicts its folder"),
        ("2 Celeb-real/id0_0000.mp4", "line 6.*expected"),
        ("Celeb-real/id0_0000.mp4", "line 6.*expected"),
    ],
)
def test_a_celebdf_list_that_lies_is_refused(tmp_path: Path, line: str, message: str) -> None:
    root = miniatures.celebdf(tmp_path, PHOTOS)
    with (root / LIST).open("a") as lines:
        lines.write(line + "\n")
    with pytest.raises(DataError, match=message):
        celebdf_catalogue(root)


def test_celebdf_without_its_list(tmp_path: Path) -> None:
    root = miniatures.celebdf(tmp_path, PHOTOS)
    (root / LIST).rename(root / LIST.lower())
    assert celebdf_catalogue(root).entries
    (root / LIST.lower()).write_text("\n")
    with pytest.raises(DataError, match="is empty"):
        celebdf_catalogue(root)
    (root / LIST.lower()).write_bytes(b"1 Celeb-real/\xff\xfe.mp4")
    with pytest.raises(DataError, match="not readable text"):
        celebdf_catalogue(root)
    (root / LIST.lower()).unlink()
    with pytest.raises(DataError, match=r"no List_of_testing_videos\.txt in .* Celeb-real"):
        celebdf_catalogue(root)


# --- DFDC ---------------------------------------------------------------------------------------------------------


def test_dfdc_rows(tmp_path: Path) -> None:
    root = miniatures.dfdc(tmp_path, PHOTOS)
    touch(root, "test/ori_videos/part_0/extra.mp4")
    (root / "test/ori_videos/part_1/ddlrxobzny.mp4").unlink()
    for given_root in (root, root / "test"):
        catalogue = dfdc_catalogue(given_root)
        assert by_video(catalogue) == {
            "aalscayrfi": (0, "test", "real", "", 32),
            "bbnpqmdwhb": (1, "test", "DFDC", "", 32),
            "ccvtgimuqk": (0, "test", "real", "", 32),
        }
        assert catalogue.skipped == [(str(root / "test/ddlrxobzny.mp4"), "listed but absent")]
        told = " ".join(catalogue.warnings)
        assert "4 (published: 5000)" in told
        assert "ori_videos/part_0/extra.mp4" in told


def test_dfdc_tables_that_cannot_be_right_are_refused(tmp_path: Path) -> None:
    root = miniatures.dfdc(tmp_path, PHOTOS)
    table = root / "test/labels.csv"
    for text, message in (
        ("filename,label\naalscayrfi.mp4,REAL\n", "line 2"),
        ("filename,label\naalscayrfi.mp4,0\naalscayrfi.mp4,1\n", "line 3.*once"),
        ("filename,label\naalscayrfi.mp4\n", "line 2"),
        ("name,label\naalscayrfi.mp4,0\n", "filename and label"),
        ("", "filename and label"),
        ("filename,label\nnowhere.mp4,0\n", "listed but absent"),
    ):
        table.write_text(text)
        with pytest.raises(DataError, match=message):
            dfdc_catalogue(root)
    table.unlink()
    with pytest.raises(DataError, match=r"no labels\.csv"):
        dfdc_catalogue(root)
    touch(root, "a/labels.csv", "b/labels.csv")
    with pytest.raises(DataError, match=r"several labels\.csv"):
        dfdc_catalogue(root)


def test_dfdc_preview_rows(tmp_path: Path) -> None:
    catalogue = dfdcp_catalogue(miniatures.dfdcp(tmp_path, PHOTOS))
    assert by_video(catalogue) == {
        "original_videos/643634/643634_A_000": (0, "test", "real", "643634", 32),
        "original_videos/1224068/1224068_B_001": (0, "test", "real", "1224068", 32),
        "method_A/643634/643634_1224068_A_000": (1, "test", "method_A", "643634+1224068", 32),
        "method_B/1224068/1224068_643634_B_001": (1, "test", "method_B", "1224068", 32),
    }
    assert "1 video(s) of the set 'train' left out" in catalogue.warnings
    for text, message in (
        ('{"method_A/1.mp4": {"label": "fake"}}', "expected a set"),
        ('{"method_A/1.mp4": {"label": "maybe", "set": "test"}}', "the label real or fake"),
        ('{"method_A/1.mp4": 1}', "expected a set"),
        ("[]", "lists no videos"),
        ("{", "not readable JSON"),
        ('{"method_A/1.mp4": {"label": "fake", "set": "test"}}', "nothing to prepare.*listed but absent"),
    ):
        (tmp_path / "dataset.json").write_text(text)
        with pytest.raises(DataError, match=message):
            dfdcp_catalogue(tmp_path)


# --- image sets ---------------------------------------------------------------------------------------------------


def test_wilddeepfake_sequences_are_videos(tmp_path: Path) -> None:
    root = miniatures.wdf(tmp_path, PHOTOS)
    (root / "real_test").rename(root / "Real Test")  # as some copies have it
    catalogue = wdf_catalogue(root)
    assert {(e.video, e.label, e.split, e.method) for e in catalogue.entries} == {
        (f"{kind}_test/{number}/{kind}/{number + 3}", label, "test", ("real", "WildDeepfake")[label])
        for label, kind in enumerate(("real", "fake"))
        for number in (0, 1)
    }
    assert len(catalogue.entries) == len({entry.name for entry in catalogue.entries}) == 12
    assert {entry.more["frame"] for entry in catalogue.entries} == {7, 8, 10}
    both = wdf_catalogue(root, splits=["train", "test"])
    assert Counter(entry.split for entry in both.entries) == {"train": 12, "test": 12}
    with pytest.raises(ConfigError, match=r"recipe\.splits"):
        wdf_catalogue(root, splits=["val"])


def test_wilddeepfake_contradictions_and_archives(tmp_path: Path) -> None:
    root = miniatures.wdf(tmp_path, PHOTOS, splits=("test",))
    (root / "fake_test/0/fake").rename(root / "fake_test/0/real")
    catalogue = wdf_catalogue(root)
    assert Counter(reason for _, reason in catalogue.skipped) == {"its folders say both real and fake": 3}
    assert Counter(entry.label for entry in catalogue.entries) == {0: 6, 1: 3}
    shutil.rmtree(root / "fake_test")
    touch(root, "fake_test/0.tar.gz", "fake_test/1.tar.gz")
    with pytest.raises(DataError, match=r"2 archive\(s\).*unpack"):
        wdf_catalogue(root)
    shutil.rmtree(root / "fake_test")
    with pytest.raises(DataError, match=r"fake_test.*real_test"):
        wdf_catalogue(root)


def test_diff_has_one_real_set_for_all_subsets(tmp_path: Path) -> None:
    root = miniatures.diff(tmp_path, PHOTOS)
    catalogue = diff_catalogue(root)
    fakes = {"T2I/SDXL": 1, "T2I/Midjourney": 1, "I2I/LoRA": 1, "FS/DiffFace": 1, "FE/Imagic": 1}
    for split in ("val", "test"):
        methods = Counter(entry.method for entry in catalogue.entries if entry.split == split)
        assert methods == {"real": 2, **fakes}
    assert all((entry.label == 0) == (entry.method == "real") for entry in catalogue.entries)
    assert len({entry.name for entry in catalogue.entries}) == len({e.video for e in catalogue.entries}) == 14
    assert any("train" in warning for warning in catalogue.warnings)  # real faces without forgeries
    test = diff_catalogue(root, splits=["test"])
    assert [e.video for e in test.entries] == [e.video for e in catalogue.entries if e.split == "test"]
    with pytest.raises(ConfigError, match=r"recipe\.splits"):
        diff_catalogue(root, splits=["train"])


def test_diff_with_missing_parts(tmp_path: Path) -> None:
    root = miniatures.diff(tmp_path, PHOTOS)
    shutil.rmtree(root / "val/FE")
    catalogue = diff_catalogue(root)
    assert any(warning.startswith("val is without the subset FE") for warning in catalogue.warnings)
    assert sum(entry.method.startswith("FE") for entry in catalogue.entries) == 1
    shutil.rmtree(root / "val")
    with pytest.raises(DataError, match=r"no forgery in .*val"):
        diff_catalogue(root)
    for picture in (root / "DiFF_real/test").iterdir():
        picture.unlink()
    with pytest.raises(DataError, match="on request"):
        diff_catalogue(root, splits=["test"])
    shutil.rmtree(root / "DiFF_real")
    with pytest.raises(DataError, match="DiFF_real"):
        diff_catalogue(root, splits=["test"])


# --- what holds for all of them -----------------------------------------------------------------------------------

SETS: dict[str, tuple[Callable[..., Path], Callable[..., Catalogue]]] = {
    "ffpp": (miniatures.ffpp, ffpp_catalogue),
    "ffpp_pretrain": (miniatures.ffpp, ffpp_pretrain_catalogue),
    "dfd": (miniatures.dfd, dfd_catalogue),
    "celebdf": (miniatures.celebdf, celebdf_catalogue),
    "dfdc": (miniatures.dfdc, dfdc_catalogue),
    "dfdcp": (miniatures.dfdcp, dfdcp_catalogue),
    "wdf": (miniatures.wdf, wdf_catalogue),
    "diff": (miniatures.diff, diff_catalogue),
}


@pytest.mark.parametrize("name", SETS)
def test_every_catalogue_is_complete_and_repeatable(name: str, tmp_path: Path) -> None:
    write, catalogue = SETS[name]
    root = write(tmp_path / "raw", PHOTOS)
    found = catalogue(root, name="mine")
    assert catalogue(str(root), name="mine") == found
    assert found.name == "mine"
    assert {"about", "source", "licence", "split", "options"} <= set(found.card)
    assert set(found.card["source"]) == {"citation", "url"}
    json.dumps(found.card)
    for entry in found.entries:
        assert Path(entry.file).is_absolute()
        assert Path(entry.file).is_file()
        assert (entry.label == 0) == (entry.method == "real")
        assert entry.video
        json.dumps(dict(entry.more))


@pytest.mark.parametrize("name", [name for name in SETS if name not in ("wdf", "diff")])
def test_frames_per_video_must_be_a_number(name: str, tmp_path: Path) -> None:
    write, catalogue = SETS[name]
    root = write(tmp_path / "raw", PHOTOS)
    with pytest.raises(ConfigError, match=r"recipe\.frames"):
        catalogue(root, frames={"real": -1} if name == "ffpp" else -1)


RECIPES = ("ffpp", "ffpp_pretrain", "dfd", "celebdf_v1", "celebdf_v2", "celebdf_pp", "dfdc", "dfdcp", "wdf", "diff")


def test_what_a_configuration_tells_to_prepare_is_what_it_reads() -> None:
    """The command that a data or testset option names writes the folder that the option reads."""
    told: dict[str, int] = {}
    for file in sorted(CONFIGS.glob("data/*.yaml")) + sorted(CONFIGS.glob("testset/*.yaml")):
        option = OmegaConf.load(file)
        words = shlex.split(option.prepare)
        recipe = next(word.removeprefix("recipe=") for word in words if word.startswith("recipe="))
        if recipe not in RECIPES:
            continue
        told[recipe] = told.get(recipe, 0) + 1
        overrides = [word for word in words[words.index("fsvfm.prepare") + 1 :] if not word.startswith("root=")]
        with initialize_config_module("fsvfm.configs", version_base="1.3"):
            written = compose("prepare", [*overrides, "root=raw", "paths.data=data"])
        option.paths = {"data": "data"}
        read = option.manifests if "manifests" in option else [option.manifest]
        assert list(read) == [written.out], file
        assert any(word.startswith("root=") for word in words), file
    assert set(told) == set(RECIPES)


def test_names_tell_settings_apart() -> None:
    with initialize_config_module("fsvfm.configs", version_base="1.3"):
        for overrides, name in (
            (["recipe=ffpp"], "ffpp_c23"),
            (["recipe=ffpp", "recipe.compression=c40", "recipe.mode=each"], "ffpp_c40_each"),
            (["recipe=dfd"], "dfd"),
            (["recipe=dfd", "recipe.compression=c23"], "dfd_c23"),
        ):
            cfg = compose("prepare", [*overrides, "paths.data=data"])
            assert (cfg.recipe.name, cfg.out) == (name, f"data/{name}")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["071_054", "054", "999", "000", "id", "07 1"]), max_size=6, unique=True))
def test_whatever_lies_in_the_folder_each_file_is_used_or_skipped(tmp_path: Path, stems: list[str]) -> None:
    shutil.rmtree(tmp_path / "raw", ignore_errors=True)
    root = touch(tmp_path / "raw", *(f"original_sequences/youtube/c23/videos/{stem}.mp4" for stem in [*stems, "071"]))
    found = ffpp_pretrain_catalogue(root)
    test_split = {stem for stem in stems if official_splits().get(stem[:3]) == "test"}
    used = {Path(entry.file).stem for entry in found.entries}
    skipped = {Path(file).stem for file, _ in found.skipped}
    assert used | skipped | test_split == {*stems, "071"}
    assert not used & skipped
