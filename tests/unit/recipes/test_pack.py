"""Packing: the same rows, the same samples, fewer files."""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from fsvfm.data.datasets import LabelledFaces, PretrainFaces
from fsvfm.data.manifest import Manifest
from fsvfm.data.sampling import EpochSampler
from fsvfm.data.storage import is_packed, read_image
from fsvfm.data.transforms import train_transform
from fsvfm.errors import ConfigError
from fsvfm.recipes.pack import pack


@pytest.fixture(scope="module", params=["fsz", "keep"])
def packed(request: pytest.FixtureRequest, prepared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / request.param
    pack(prepared_dir, out=out, codec=request.param, images_per_shard=16, workers=1)
    return out


def test_pre_training_from_shards_is_pre_training_from_files(prepared_dir: Path, packed: Path) -> None:
    files, shards = (Manifest.read(folder).select(label=0) for folder in (prepared_dir, packed))
    assert all(map(is_packed, shards.table["path"]))
    for crop_scale in (None, (0.3, 1.0)):  # with crops, the packed parsing maps are read too
        sets = [PretrainFaces(m, image_size=64, patch_size=16, crop_scale=crop_scale) for m in (files, shards)]
        orders = [list(EpochSampler(len(s), 4, seed=3)) for s in sets]
        assert orders[0] == orders[1]
        for draw in orders[0][0] + orders[0][1]:
            ours, theirs = (s[draw] for s in sets)
            assert not ours["unreadable"]
            assert not theirs["unreadable"]
            assert torch.equal(ours["image"], theirs["image"])
            assert torch.equal(ours["grid"], theirs["grid"])


def test_fine_tuning_from_shards_is_fine_tuning_from_files(prepared_dir: Path, packed: Path) -> None:
    transform = train_transform(64, crop_scale=(0.5, 1.0), flip=0.5, rand_augment="rand-m9-mstd0.5-inc1")
    ours, theirs = (LabelledFaces(Manifest.read(folder), transform) for folder in (prepared_dir, packed))
    for draw in next(iter(EpochSampler(len(ours), 12, seed=1))):
        a, b = ours[draw], theirs[draw]
        assert torch.equal(a["image"], b["image"])
        assert (a["label"], a["video"]) == (b["label"], b["video"])


def test_rows_are_kept_and_the_source_is_named(prepared_dir: Path, packed: Path) -> None:
    source, copy = Manifest.read(prepared_dir), Manifest.read(packed)
    for column in ("label", "split", "dataset", "method", "video", "subject", "frame"):
        assert list(source.table[column]) == list(copy.table[column])
    assert list(copy.table["origin"]) == list(source.table["path"])
    reals = [m.select(label=0).grids(16) for m in (source, copy)]
    np.testing.assert_array_equal(*reals)


def test_shards_are_plain_tar_files_that_other_tools_read(prepared_dir: Path, packed: Path) -> None:
    manifest = Manifest.read(prepared_dir)
    shards = sorted((packed / "shards").glob("*.tar"))
    assert len(shards) == -(-len(manifest) // 16)
    with tarfile.open(shards[0]) as tar:
        names = tar.getnames()
        classes = [int(tar.extractfile(name).read()) for name in names if name.endswith(".cls")]  # type: ignore[union-attr]
        keys = [name.split(".")[0] for name in names]
        if "0000000000.png" in names:
            data = np.frombuffer(tar.extractfile("0000000000.png").read(), np.uint8)  # type: ignore[union-attr]
            image = cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
            np.testing.assert_array_equal(image, read_image(manifest.paths()[0]))
    assert classes == list(manifest.table["label"][:16])
    assert keys == sorted(keys)  # members of one sample stand together, as WebDataset wants it


def test_the_same_input_gives_the_same_bytes_at_any_number_of_processes(prepared_dir: Path, tmp_path: Path) -> None:
    for name, workers in (("a", 1), ("b", 2)):
        pack(prepared_dir, out=tmp_path / name, images_per_shard=10, workers=workers)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a" / "shards").iterdir())
    assert files
    for file in [*files, Path("manifest.parquet")]:
        digests = [hashlib.sha256((tmp_path / name / file).read_bytes()).hexdigest() for name in ("a", "b")]
        assert digests[0] == digests[1]


def test_an_interrupted_packing_continues(prepared_dir: Path, tmp_path: Path) -> None:
    pack(prepared_dir, out=tmp_path / "whole", images_per_shard=10, workers=1)
    pack(prepared_dir, out=tmp_path / "cut", images_per_shard=10, workers=1)
    (tmp_path / "cut" / "manifest.parquet").unlink()
    lost = tmp_path / "cut" / "shards" / "000002.tar"
    lost.unlink()
    (tmp_path / "cut" / "shards" / ".000003.tar.1.tmp").write_bytes(b"half")
    again = pack(prepared_dir, out=tmp_path / "cut", images_per_shard=10, workers=1)
    assert again.tallies[0].reused == again.tallies[0].inputs - 1
    assert not list((tmp_path / "cut").rglob("*.tmp"))
    for name in ("shards/000002.tar", "manifest.parquet"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_unreadable_images_are_left_out_and_counted(prepared_dir: Path, tmp_path: Path) -> None:
    source = Manifest.read(prepared_dir)
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    paths = source.paths()
    paths[5] = str(tmp_path / "broken.png")
    Manifest(source.table.assign(path=paths, parse=""), tmp_path).write(tmp_path / "manifest.parquet")
    made = pack(tmp_path / "manifest.parquet", out=tmp_path / "packed", workers=1)
    assert len(made.manifest) == len(source) - 1
    assert "broken.png" in (tmp_path / "packed" / "skipped.csv").read_text()


@pytest.mark.parametrize(
    ("options", "text"),
    [({"codec": "zip"}, "codec='zip'"), ({"quality": 0}, "quality=0"), ({"size": 32}, "parsing maps")],
)
def test_impossible_settings(prepared_dir: Path, tmp_path: Path, options: dict, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        pack(prepared_dir, out=tmp_path / "x", **options)


def test_a_packed_folder_is_read_from_object_storage(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    monkeypatch.setenv("FSVFM_CACHE", str(tmp_path / "cache"))
    fsspec.filesystem("memory").put(f"{packed}/", f"/bucket/{packed.name}/", recursive=True)
    here, there = Manifest.read(packed), Manifest.read(f"memory://bucket/{packed.name}")
    joined = Manifest.concat([there.select(split="train"), here.select(split="test")])
    for manifest in (there, joined):
        rows = LabelledFaces(manifest, lambda image: image)
        place = manifest.table.index[manifest.table["split"] == "train"][3]
        ours = LabelledFaces(here, lambda image: image)[int(here.table.index[here.table["split"] == "train"][3])]
        assert not rows[int(place)]["unreadable"]
        assert torch.equal(rows[int(place)]["image"], ours["image"])
