"""Pictures to prepared folders: the pre-training sets from raw layout to a training step, and what the driver does."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig
from PIL import Image

import miniatures
import miniatures_fas
from fsvfm import build
from fsvfm.data.manifest import Manifest
from fsvfm.errors import ConfigError, DataError
from fsvfm.faces import parse
from fsvfm.faces.align import five_points, reference_points
from fsvfm.faces.crop import square_crop
from fsvfm.faces.detect import DlibHOG
from fsvfm.faces.images import load_image, load_labels, save_png
from fsvfm.faces.landmarks import Landmarks68
from fsvfm.recipes import stills
from fsvfm.recipes.engine import Catalogue, Entry, Prepared, Skip
from fsvfm.recipes.lfw import fetch_lfw, lfw_catalogue
from fsvfm.recipes.stills import load_still, prepare_stills, trim_black
from fsvfm.recipes.vggface2 import vggface2_catalogue
from fsvfm.recipes.youtubefaces import youtubefaces_catalogue
from fsvfm.regions import region_grid

SETTINGS: dict[str, Any] = {"size": 224, "scale": 1.3, "detector": "dlib_hog", "parser": None, "max_side": 1280}


def prepare(recipe: str, root: Path, out: Path, *overrides: str, **engine: Any) -> Prepared:
    """The recipe as its configuration has it, in this process."""
    with initialize_config_module("fsvfm.configs", version_base="1.3"):
        cfg = compose("prepare", [f"recipe={recipe}", f"root={root}", f"out={out}", *overrides])
    return instantiate(cfg.recipe, _partial_=True, _convert_="all")(out=str(out), workers=1, **engine)


def entry(file: Path, name: str, **more: Any) -> Entry:
    return Entry(str(file), name, 0, "train", "real", name, **more)


def catalogue(*entries: Entry) -> Catalogue:
    return Catalogue("own", list(entries), {"about": "some pictures"})


def picture(made: Prepared, name: str) -> np.ndarray:
    """The saved face of that name, whatever its folder."""
    (path,) = (path for path in made.manifest.paths() if Path(path).stem == name)
    return load_image(path)


@pytest.fixture(scope="module")
def photos(media_dir: Path) -> list[np.ndarray]:
    return miniatures.faces(media_dir)


# --- The pre-training sets -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["vggface2", "youtubefaces", "lfw"])
def prepared(request: pytest.FixtureRequest, photos: list[np.ndarray], tmp_path_factory: Any) -> tuple[str, Prepared]:
    name: str = request.param
    folder = tmp_path_factory.mktemp(name)
    root = getattr(miniatures_fas, name)(folder / "raw", photos)
    return name, prepare(name, root, folder / "out", "recipe.parser=landmarks")


EXPECTED = {
    "vggface2": {
        "test_n000001_0001_01": ("test", "n000001", "test_n000001_0001_01", 0),
        "train_n000002_0001_01": ("train", "n000002", "train_n000002_0001_01", 0),
        "train_n000002_0002_01": ("train", "n000002", "train_n000002_0002_01", 0),
        "train_n000003_0001_01": ("train", "n000003", "train_n000003_0001_01", 0),
    },
    "youtubefaces": {
        f"{person}_{video}_{video}.{frame}": ("train", person, f"{person}/{video}", frame)
        for person, video in (("Ann_Lee", 0), ("Ann_Lee", 1), ("Bob_Ray", 2))
        for frame in (1, 34)
    },
    "lfw": {
        f"{person}_{number:04d}": ("train", person, f"{person}/{person}_{number:04d}", 0)
        for person, number in (("Ann_Lee", 1), ("Ann_Lee", 2), ("Bob_Ray", 1), ("Cy_Dee", 1))
    },
}


def test_raw_layouts_become_rows(prepared: tuple[str, Prepared]) -> None:
    name, made = prepared
    table = made.manifest.table
    found = {
        Path(row.path).stem: (row.split, row.subject, row.video, row.frame) for row in table.itertuples(index=False)
    }
    assert found == EXPECTED[name]
    assert set(table["label"]) == {0}
    assert set(table["dataset"]) == {name}
    assert all(Path(path).is_file() for path in made.manifest.paths("parse"))
    assert all(load_image(path).shape == (224, 224, 3) for path in made.manifest.paths())
    tally = made.tallies[-1]
    skipped = [(Path(key).name, reason) for key, reason, _ in tally.skipped]
    assert skipped == ([("0009_02.jpg", "no face found")] if name == "vggface2" else [])
    assert tally.inputs == len(EXPECTED[name]) + len(skipped)


def test_grids_are_those_of_the_parsing_maps(prepared: tuple[str, Prepared]) -> None:
    manifest = prepared[1].manifest
    labels = np.stack([load_labels(path) for path in manifest.paths("parse")])
    np.testing.assert_array_equal(manifest.grids(16), region_grid(labels, 16))
    np.testing.assert_array_equal(manifest.grids(14), region_grid(labels, 14))


def test_a_prepared_set_is_pre_trained_on(
    prepared: tuple[str, Prepared], compose_config: Callable[..., DictConfig]
) -> None:
    name, made = prepared
    cfg = compose_config(
        "train", "experiment=demo_pretrain", f"data={name}", f"data.manifests=[{made.root}]", "data.batch_size=2",
        "data.workers=0", "model=vit_tiny", "trainer.accelerator=cpu", "trainer.devices=1",
        "trainer.precision=32-true", "+trainer.fast_dev_run=true", "+trainer.enable_progress_bar=false",
    )  # fmt: skip
    build.check(cfg)
    data = build.build_data(cfg)
    task = build.build_task(cfg, data)
    trainer = build.create(cfg.trainer, logger=False)
    trainer.fit(task, datamodule=data)
    assert trainer.global_step == 1
    assert np.isfinite(trainer.callback_metrics["train/loss_epoch"].item())


def test_a_second_run_does_nothing_again(photos: list[np.ndarray], tmp_path: Path) -> None:
    root = miniatures_fas.lfw(tmp_path / "raw", photos)
    first = prepare("lfw", root, tmp_path / "out", "recipe.parser=null")
    before = (tmp_path / "out" / "manifest.parquet").read_bytes()
    again = prepare("lfw", root, tmp_path / "out", "recipe.parser=null")
    assert again.tallies[-1].reused == first.tallies[-1].inputs == 4
    assert (tmp_path / "out" / "manifest.parquet").read_bytes() == before


def test_what_is_missing_is_told(tmp_path: Path, photos: list[np.ndarray]) -> None:
    (tmp_path / "empty").mkdir()
    for make in (vggface2_catalogue, youtubefaces_catalogue, lfw_catalogue):
        with pytest.raises(DataError, match=r"no folder|no photograph|no frame"):
            make(tmp_path / "empty")
        with pytest.raises(DataError, match="no folder"):
            make(tmp_path / "nowhere")
    warnings = vggface2_catalogue(miniatures_fas.vggface2(tmp_path / "vf2", photos)).warnings
    assert any("train 2 (published: 8631)" in text for text in warnings)


def test_the_frames_folder_itself_and_one_part_alone_will_do(tmp_path: Path, photos: list[np.ndarray]) -> None:
    root = miniatures_fas.youtubefaces(tmp_path / "ytf", photos)
    inner = youtubefaces_catalogue(root / "frame_images_DB").entries
    assert [each.name for each in inner] == [each.name for each in youtubefaces_catalogue(root).entries]
    root = miniatures_fas.vggface2(tmp_path / "vf2", photos)
    (root / "test").rename(tmp_path / "elsewhere")
    assert {each.split for each in vggface2_catalogue(root).entries} == {"train"}


def test_without_a_network_lfw_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(DataError, match=r"cannot be fetched into .*root=<folder"):
        fetch_lfw(tmp_path)


# --- The driver ------------------------------------------------------------------------------------------------------


def test_a_face_is_cropped_as_in_the_papers(photos: list[np.ndarray], tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", photos[0])
    made = prepare_stills(catalogue(entry(tmp_path / "a.png", "a")), out=tmp_path / "out", workers=1, **SETTINGS)
    x, y, side = square_crop(DlibHOG()(photos[0])[0].box, *photos[0].shape[1::-1])
    expected = Image.fromarray(photos[0][y : y + side, x : x + side]).resize((224, 224), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(picture(made, "a"), np.asarray(expected))
    assert "landmarks" not in made.manifest.table


def test_without_a_detector_pictures_stay_as_they_are(photos: list[np.ndarray], tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", photos[0][:90])
    entries = catalogue(entry(tmp_path / "a.png", "a", more={"frame": 7, "shot": 1}))
    settings = {**SETTINGS, "detector": None, "size": None}
    made = prepare_stills(entries, out=tmp_path / "own", workers=1, **settings)
    np.testing.assert_array_equal(picture(made, "a"), photos[0][:90])
    assert made.manifest.table.loc[0, ["frame", "shot"]].tolist() == [7, 1]
    made = prepare_stills(entries, out=tmp_path / "sized", workers=1, **{**settings, "size": 32})
    assert picture(made, "a").shape == (32, 32, 3)


def test_an_aligned_face_has_its_parts_in_their_places(photos: list[np.ndarray], tmp_path: Path) -> None:
    turned = cv2.warpAffine(photos[0], cv2.getRotationMatrix2D((84, 84), 12, 1), (168, 168))
    save_png(tmp_path / "a.png", turned)
    settings = {**SETTINGS, "align": True}
    made = prepare_stills(catalogue(entry(tmp_path / "a.png", "a")), out=tmp_path / "out", workers=1, **settings)
    chip = picture(made, "a")
    found = five_points(Landmarks68()(chip, DlibHOG()(chip)[0].box))
    assert np.abs(found - reference_points(224)).max() < 12
    straight = np.linalg.norm(five_points(Landmarks68()(turned, DlibHOG()(turned)[0].box))[0])
    assert abs(found[0, 1] - found[1, 1]) < 5 < straight


@given(top=st.integers(0, 9), left=st.integers(0, 9), bottom=st.integers(0, 9), right=st.integers(0, 9))
def test_black_borders_are_cut_off_exactly(top: int, left: int, bottom: int, right: int) -> None:
    inner = np.full((5, 7, 3), 200, np.uint8)
    inner[2, 3] = 0  # black inside is no border
    noise = np.random.default_rng(0).integers(0, 8, (5 + top + bottom, 7 + left + right, 3), dtype=np.uint8)
    noise[top : top + 5, left : left + 7] = inner
    np.testing.assert_array_equal(trim_black(noise), inner)


def test_a_black_picture_is_skipped(tmp_path: Path, photos: list[np.ndarray]) -> None:
    with pytest.raises(Skip, match="black"):
        trim_black(np.zeros((4, 4, 3), np.uint8))
    save_png(tmp_path / "dark.png", np.zeros((9, 9, 3), np.uint8))
    save_png(tmp_path / "face.png", np.pad(photos[0], ((3, 0), (0, 8), (0, 0))))
    entries = catalogue(entry(tmp_path / "dark.png", "dark"), entry(tmp_path / "face.png", "face"))
    settings = {**SETTINGS, "detector": None, "size": None, "trim": True}
    made = prepare_stills(entries, out=tmp_path / "out", workers=1, **settings)
    assert [reason for _, reason, _ in made.tallies[-1].skipped] == ["black picture"]
    np.testing.assert_array_equal(picture(made, "face"), trim_black(photos[0]))


def test_settings_that_contradict_each_other(tmp_path: Path) -> None:
    for change in ({"parser": "landmarks", "size": None}, {"align": True, "detector": None}):
        with pytest.raises(ConfigError, match=r"recipe\.size|recipe\.detector"):
            prepare_stills(catalogue(), out=tmp_path / "out", **{**SETTINGS, **change})
    assert not (tmp_path / "out").exists()


def test_files_left_out_at_discovery_are_in_the_account(tmp_path: Path, photos: list[np.ndarray]) -> None:
    save_png(tmp_path / "a.png", photos[0])
    some = catalogue(entry(tmp_path / "a.png", "a"))._replace(skipped=[("lost.png", "no such file")])
    made = prepare_stills(some, out=tmp_path / "out", workers=1, **SETTINGS)
    assert "lost.png,,no such file" in (made.root / "skipped.csv").read_text()
    assert Manifest.read(made.root).table["origin"].tolist() == [str(tmp_path / "a.png")]


# --- HDF5 ------------------------------------------------------------------------------------------------------------


def test_frames_of_hdf5_files(tmp_path: Path, photos: list[np.ndarray]) -> None:
    pytest.importorskip("h5py", reason="reading WMCA needs h5py")
    root = miniatures_fas.wmca(tmp_path, photos)
    file = root / "2018-08-24/004_03_000_0_01.hdf5"
    frames = [load_still(entry(file, "a", more={"frame": frame})) for frame in range(5)]
    assert [int(frame[0, 0, 0]) for frame in frames] == [50, 90, 130, 170, 210]
    np.testing.assert_array_equal(frames[0][20:], photos[0][40:148, 20:148])
    with pytest.raises(DataError, match="has no Frame_9"):
        load_still(entry(file, "a", more={"frame": 9}))
    save_png(tmp_path / "picture.png", photos[0])
    (tmp_path / "picture.png").rename(tmp_path / "picture.hdf5")
    with pytest.raises(DataError, match="not a readable HDF5 file"):
        load_still(entry(tmp_path / "picture.hdf5", "a"))


def test_without_the_package_hdf5_files_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(DataError, match=r"h5py.*fsvfm\[wmca\]"):
        load_still(entry(tmp_path / "a.hdf5", "a"))


# --- Parsing in batches ----------------------------------------------------------------------------------------------


class Stripes:
    """A parser that takes batches: faces whose first pixel is dark have no parse, others columns of labels."""

    sizes: list[int]

    def batch(self, faces: np.ndarray) -> list[np.ndarray | None]:
        type(self).sizes.append(len(faces))
        columns = np.tile(np.arange(faces.shape[2], dtype=np.uint8) % 11, (faces.shape[1], 1))
        return [None if face[0, 0, 0] < 50 else np.roll(columns, int(face[0, 0, 0]), axis=1) for face in faces]


def test_a_gpu_parses_in_batches_after_the_crops(
    tmp_path: Path, photos: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setitem(parse.PARSERS, "facer", Stripes)
    monkeypatch.setattr(stills, "BATCH", 2)
    monkeypatch.setattr(Stripes, "sizes", [], raising=False)
    entries = []
    for number, shade in zip(range(8), itertools.cycle([10, 60, 71, 82]), strict=False):
        face = cv2.resize(photos[0], (32, 32))
        face[:4, :4] = shade
        save_png(tmp_path / f"{number}.png", face)
        entries.append(entry(tmp_path / f"{number}.png", str(number)))
    settings = {**SETTINGS, "detector": None, "size": 32, "parser": "facer"}
    made = prepare_stills(catalogue(*entries), out=tmp_path / "out", workers=2, **settings)
    assert Stripes.sizes == [2, 2, 2, 2]
    table = made.manifest.table
    assert [Path(path).stem for path in table["path"]] == ["1", "2", "3", "5", "6", "7"]
    for path, file in zip(made.manifest.paths(), made.manifest.paths("parse"), strict=True):
        expected = np.roll(np.arange(32) % 11, int(load_image(path)[0, 0, 0]))
        np.testing.assert_array_equal(load_labels(file)[0], expected)
    np.testing.assert_array_equal(
        made.manifest.grids(16), region_grid(np.stack([load_labels(f) for f in made.manifest.paths("parse")]), 16)
    )
    parsing = made.tallies[-1]
    assert [(Path(piece).stem, reason) for _, piece, reason in parsing.missed] == [
        ("0", "no face parsing"),
        ("4", "no face parsing"),
    ]
    assert (parsing.images, parsing.inputs) == (6, 4)
    # Stopped in between: only what is lost is done again, and the result is the same.
    before = (made.root / "manifest.parquet").read_bytes()
    Path(made.manifest.paths("parse")[3]).unlink()
    again = prepare_stills(catalogue(*entries), out=tmp_path / "out", workers=2, **settings)
    assert Stripes.sizes == [2, 2, 2, 2, 2]
    assert (again.root / "manifest.parquet").read_bytes() == before
