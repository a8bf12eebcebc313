"""Data sets, their order, and normalisation statistics, on generated faces and on damaged ones."""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fsvfm.callbacks.guards import UnreadableFiles
from fsvfm.data.datamodules import ForgeryData, PretrainData
from fsvfm.data.datasets import LabelledFaces, PretrainFaces, collate
from fsvfm.data.manifest import Manifest
from fsvfm.data.sampling import EpochSampler, derive_seed
from fsvfm.data.stats import cached_statistics, channel_statistics
from fsvfm.data.transforms import crop_and_flip, test_transform, train_transform
from fsvfm.errors import ConfigError, DataError
from fsvfm.regions import region_grid

PAPERS = {"crop_scale": (0.08, 1.0), "flip": 0.5, "rand_augment": "rand-m9-mstd0.5-inc1"}


@pytest.fixture
def damaged(prepared_dir: Path, tmp_path: Path) -> Path:
    """A copy of the prepared folder that tests may damage."""
    return shutil.copytree(prepared_dir, tmp_path / "demo", ignore=shutil.ignore_patterns("stats"))


def real_rows(folder: Path) -> Manifest:
    return Manifest.read(folder).select(split="train", label=0)


# --- order --------------------------------------------------------------------------------------------------------


@given(
    length=st.integers(8, 60),
    batch=st.integers(1, 4),
    world=st.integers(1, 2),
    epoch=st.integers(0, 5),
    seed=st.integers(0, 9),
)
def test_an_epoch_deals_every_row_at_most_once(length: int, batch: int, world: int, epoch: int, seed: int) -> None:
    dealt = []
    for rank in range(world):
        sampler = EpochSampler(length, batch, seed=seed, rank=rank, world_size=world)
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert [len(b) for b in batches] == [batch] * len(sampler)
        dealt += [draw.row for b in batches for draw in b]
    assert len(dealt) == len(set(dealt)) == length // (batch * world) * batch * world
    assert set(dealt) <= set(range(length))


def test_an_epoch_can_be_entered_in_the_middle() -> None:
    whole = EpochSampler(50, 4, seed=3)
    whole.set_epoch(2)
    part = EpochSampler(50, 4, seed=3)
    part.set_epoch(2, start=5)
    assert list(part) == list(whole)[5:]
    part.set_epoch(2)  # announcing the same epoch keeps the place, another one starts at its beginning
    assert list(part) == list(whole)[5:]
    part.set_epoch(3)
    whole.set_epoch(3)
    assert list(part) == list(whole)


def test_epochs_and_augmentation_seeds_differ() -> None:
    sampler = EpochSampler(40, 4, seed=0)
    first = [d for b in sampler for d in b]
    sampler.set_epoch(1)
    second = [d for b in sampler for d in b]
    assert [d.row for d in first] != [d.row for d in second]
    assert {d.seed for d in first}.isdisjoint(d.seed for d in second)
    assert len({derive_seed(0, i) for i in range(1000)}) == 1000


def test_too_few_rows_for_a_batch() -> None:
    with pytest.raises(DataError, match=r"6 images.*data\.batch_size to at most 3"):
        EpochSampler(6, 4, world_size=2)


# --- pre-training faces -------------------------------------------------------------------------------------------


def test_stored_grids_equal_grids_from_the_parsing_maps(prepared_dir: Path) -> None:
    manifest = real_rows(prepared_dir)
    stored = PretrainFaces(manifest, image_size=64, patch_size=16)
    assert stored.grids is not None
    for index in range(len(stored)):
        labels = np.asarray(Image.open(manifest.parse_paths()[index]))  # type: ignore[index, arg-type]
        np.testing.assert_array_equal(stored[index]["grid"], region_grid(labels, 16))
    finer = PretrainFaces(manifest, image_size=128, patch_size=16)
    assert finer[0]["image"].shape == (3, 128, 128)
    assert finer[0]["grid"].shape == (64,)
    patch8 = PretrainFaces(manifest, image_size=64, patch_size=8)
    labels = np.asarray(Image.open(manifest.parse_paths()[3]))  # type: ignore[index, arg-type]
    np.testing.assert_array_equal(patch8[3]["grid"], region_grid(labels, 8))


def test_crops_move_image_and_parsing_map_alike() -> None:
    labels = np.random.default_rng(0).integers(0, 11, (8, 8), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    image = np.repeat((labels * 20)[..., None], 3, axis=2)
    for seed in range(20):
        out, moved = crop_and_flip(image, labels, 64, scale=(0.3, 1.0), rng=np.random.default_rng(seed))
        assert out.shape == (64, 64, 3)
        # Bicubic smooths edges of blocks; away from them the picture must show its label's grey value.
        agreement = np.mean(np.abs(out[..., 0].astype(int) - moved.astype(int) * 20) <= 10)
        assert agreement > 0.6


def test_augmented_samples_depend_on_the_seed_alone(prepared_dir: Path) -> None:
    rows = LabelledFaces(Manifest.read(prepared_dir).select(split="train"), train_transform(64, **PAPERS))  # type: ignore[arg-type]
    first = rows.load(5, seed=11)["image"]
    rows.load(6, seed=12)
    assert torch.equal(rows.load(5, seed=11)["image"], first)
    assert not torch.equal(rows.load(5, seed=12)["image"], first)


def test_test_transform_is_a_plain_bicubic_resize() -> None:
    image = np.random.default_rng(0).integers(0, 256, (100, 80, 3), dtype=np.uint8)
    expected = Image.fromarray(image).resize((64, 64), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(test_transform(64)(image), np.asarray(expected))


# --- damaged data -------------------------------------------------------------------------------------------------


def test_unreadable_file_is_replaced_and_reported(damaged: Path) -> None:
    manifest = real_rows(damaged)
    Path(manifest.paths()[2]).write_bytes(b"<html>not an image</html>")
    rows = PretrainFaces(manifest, image_size=64)
    sample = rows[2]
    assert sample["index"] == 3
    assert torch.equal(sample["image"], rows[3]["image"])
    assert "not a readable image" in sample["unreadable"][0]
    assert collate([rows[2], rows[3]])["unreadable"] == sample["unreadable"]


def test_parsing_map_of_another_size_or_with_strange_labels(damaged: Path) -> None:
    manifest = real_rows(damaged)
    parses = manifest.parse_paths()
    assert parses is not None
    cv2.imwrite(parses[0], np.zeros((32, 32), np.uint8))
    cv2.imwrite(parses[1], np.full((64, 64), 200, np.uint8))
    rows = PretrainFaces(manifest, image_size=64, patch_size=8)
    with pytest.raises(DataError, match=r"64×64 px but its parsing map .* is 32×32"):
        rows.load(0, 0)
    with pytest.raises(DataError, match="200"):
        rows.load(1, 0)


def test_a_data_set_that_is_gone_is_an_error(damaged: Path) -> None:
    manifest = real_rows(damaged)
    shutil.rmtree(damaged / "images")
    with pytest.raises(DataError, match="files in a row could not be read"):
        PretrainFaces(manifest, image_size=64)[0]


def test_manifest_without_parses_needs_random_masking(damaged: Path) -> None:
    fakes = Manifest.read(damaged).select(methods="self_blend")
    with pytest.raises(DataError, match="masking=random"):
        PretrainFaces(fakes, image_size=64)
    sample = PretrainFaces(fakes, image_size=64, need_regions=False)[0]
    assert sample["grid"].shape == (16,)


def test_run_stops_above_the_tolerated_share(damaged: Path, tmp_path: Path) -> None:
    class Module(pl.LightningModule):
        def training_step(self, batch: dict[str, torch.Tensor]) -> None:
            return None

        def configure_optimizers(self) -> None:
            return None

    data = PretrainData([str(damaged)], split="train", image_size=64, patch_size=16, batch_size=4, workers=0)
    Path(data.dataset.paths[1]).write_bytes(b"")
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    tolerant = pl.Trainer(max_epochs=1, callbacks=[UnreadableFiles(0.5, str(tmp_path))], **options)  # type: ignore[arg-type]
    tolerant.fit(Module(), datamodule=data)
    assert data.dataset.paths[1] in (tmp_path / "unreadable.txt").read_text()
    strict = pl.Trainer(max_epochs=1, callbacks=[UnreadableFiles(0.01, str(tmp_path))], **options)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"1 of 16 training files.*max_share"):
        strict.fit(Module(), datamodule=data)


def test_one_class_is_refused(damaged: Path) -> None:
    with pytest.raises(DataError, match="both classes"):
        ForgeryData(
            [str(damaged)], methods=[], image_size=64, batch_size=4, workers=0, augment={**PAPERS}
        )  # fmt: skip


def test_a_fraction_is_of_the_videos_of_every_method_and_grows(prepared_dir: Path, tmp_path: Path) -> None:
    table = Manifest.read(prepared_dir).table
    table = table.drop(columns=["grid_p16", "parse"])
    # Two frames of every video.
    frames = pd.concat([table.assign(frame=i, path=table["video"] + f"_{i}.png") for i in (0, 1)])
    Manifest(frames, tmp_path).write()

    def rows(fraction: float | None, seed: int = 0) -> pd.DataFrame:
        augment = {**PAPERS, "saturation": None}
        options = {"methods": None, "image_size": 64, "batch_size": 4, "workers": 0, "augment": augment}
        data = ForgeryData([str(tmp_path)], fraction=fraction, seed=seed, **options)
        assert len(data.val) == 2 * 4 * 3, "validation stays whole"
        return data.train.table

    whole = rows(None)
    before: set[str] = set()
    for fraction, videos in ((0.01, 1), (0.25, 4), (0.5, 8), (1.0, 16)):
        part = rows(fraction)
        assert part.groupby("method")["video"].nunique().to_dict() == dict.fromkeys(whole["method"].unique(), videos)
        assert (part.groupby("video").size() == 2).all(), "all frames of a video"
        assert before <= set(part["video"])
        before = set(part["video"])
    assert before == set(whole["video"])
    assert set(rows(0.25)["video"]) != set(rows(0.25, seed=1)["video"])
    for wrong in (0, 1.5):
        with pytest.raises(ConfigError, match=r"data\.fraction"):
            rows(wrong)


# --- statistics ---------------------------------------------------------------------------------------------------


def test_statistics_are_exact(prepared_dir: Path) -> None:
    paths = real_rows(prepared_dir).paths()
    pixels = np.concatenate([np.asarray(Image.open(p)).reshape(-1, 3) for p in paths]).astype(np.float64) / 255
    mean, std, unreadable = channel_statistics(paths, 64)
    np.testing.assert_allclose(mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std(0), rtol=1e-12)
    assert unreadable == 0


def test_statistics_of_images_of_unequal_size_weigh_pixels_not_batches(tmp_path: Path) -> None:
    for name, value in (("a", 10), ("b", 250), ("c", 250)):
        Image.new("RGB", (8, 8), (value, 0, 255)).save(tmp_path / f"{name}.png")
    mean, std, _ = channel_statistics([str(tmp_path / f"{n}.png") for n in "abc"], 8, workers=1)
    assert mean == pytest.approx([170 / 255, 0, 1])
    assert std == pytest.approx([np.std([10, 250, 250]) / 255, 0, 0])


def test_statistics_are_cached_by_selection(damaged: Path) -> None:
    manifest = real_rows(damaged)
    first = cached_statistics(manifest, 64)
    assert len(list((damaged / "stats").glob("*.json"))) == 1
    shutil.rmtree(damaged / "images")
    assert cached_statistics(manifest, 64) == first
    with pytest.raises(DataError, match="none of the"):
        cached_statistics(manifest, 32)
