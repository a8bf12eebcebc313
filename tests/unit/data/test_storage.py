"""Packed images: nothing is lost, and a row reads the same from a shard as from its file."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from fsvfm.data import storage
from fsvfm.errors import DataError

IMAGES = hnp.arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40), st.just(3)))


@settings(max_examples=60, deadline=None)
@given(image=IMAGES)
def test_fsz_loses_nothing(image: np.ndarray) -> None:
    np.testing.assert_array_equal(storage.decode_fsz(storage.encode_fsz(image)), image)


def test_fsz_of_a_photograph_is_no_larger_than_a_png(media_dir: Path) -> None:
    image = np.asarray(Image.open(sorted((media_dir / "photos").iterdir())[0]).convert("RGB").resize((224, 224)))
    png = io.BytesIO()
    Image.fromarray(image).save(png, "PNG")
    assert len(storage.encode_fsz(image)) < 1.2 * len(png.getvalue())


@pytest.mark.parametrize("data", [b"", b"FSZ1", b"FSZ1\x02\x00\x02\x00nonsense", b"PNG"])
def test_damaged_bytes_are_named(data: bytes) -> None:
    with pytest.raises(DataError):
        storage.decode_image(data, "shard x")


def test_a_range_of_a_tar_reads_like_the_file(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "face.png")
    with tarfile.open(tmp_path / "000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        tar.add(tmp_path / "face.png", "face.png")
    with tarfile.open(tmp_path / "000.tar") as tar:
        member = tar.getmembers()[0]
    packed = f"{tmp_path}/000.tar@{member.offset_data}+{member.size}"
    assert storage.is_packed(packed)
    assert not storage.is_packed(str(tmp_path / "face.png"))
    np.testing.assert_array_equal(storage.read_image(packed), pixels)
    np.testing.assert_array_equal(storage.read_image(tmp_path / "face.png"), pixels)
    with pytest.raises(DataError, match="shorter than its manifest"):
        storage.read_bytes(f"{tmp_path}/000.tar@{member.offset_data}+99999999")
    with pytest.raises(DataError, match=r"nowhere\.tar does not exist"):
        storage.read_bytes(f"{tmp_path}/nowhere.tar@0+1")


def test_a_remote_shard_is_fetched_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    monkeypatch.setenv("FSVFM_CACHE", str(tmp_path / "cache"))
    remote = fsspec.filesystem("memory")
    with remote.open("/set/000.tar", "wb") as file:
        file.write(bytes(range(100)))
    assert storage.read_bytes("memory://set/000.tar@10+5") == bytes(range(10, 15))
    remote.rm("/set/000.tar")
    assert storage.read_bytes("memory://set/000.tar@20+2") == bytes([20, 21])
    assert [p.name for p in (tmp_path / "cache" / "shards").rglob("*") if p.is_file()] == ["000.tar"]
    with pytest.raises(DataError, match="cannot be fetched"):
        storage.read_bytes("memory://set/absent.tar@0+1")
    with pytest.raises(DataError, match=r"cannot be fetched|another package"):
        storage.read_bytes("nosuchscheme://set/absent.tar@0+1")
