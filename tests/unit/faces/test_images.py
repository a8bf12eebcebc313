from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from fsvfm.errors import DataError
from fsvfm.faces.images import MAX_PIXELS, load_image, load_labels, resize, save_labels, save_png


def quadrants(height: int = 24, width: int = 40) -> np.ndarray:
    """Red upper left, green upper right, blue lower left, white lower right."""
    image = np.full((height, width, 3), 255, dtype=np.uint8)
    image[: height // 2, : width // 2] = (255, 0, 0)
    image[: height // 2, width // 2 :] = (0, 255, 0)
    image[height // 2 :, : width // 2] = (0, 0, 255)
    return image


# How a camera stores a picture whose upright form is known, per EXIF orientation (EXIF 2.3, table of tag 274).
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_applied(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](quadrants())))
    stored.save(tmp_path / "photo.png", exif=exif)
    np.testing.assert_array_equal(load_image(tmp_path / "photo.png"), quadrants())


def test_jpeg_from_disk_is_rgb_uint8_contiguous(tmp_path: Path) -> None:
    Image.fromarray(quadrants()).save(tmp_path / "photo.jpg", quality=95, subsampling=0)
    image = load_image(str(tmp_path / "photo.jpg"))
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    assert np.abs(image[4, 4].astype(int) - [255, 0, 0]).max() < 12


def test_transparent_pixels_become_white(tmp_path: Path) -> None:
    rgba = np.zeros((4, 6, 4), dtype=np.uint8)
    rgba[:, :3] = (10, 20, 30, 255)
    rgba[:, 3] = (0, 0, 0, 128)
    Image.fromarray(rgba).save(tmp_path / "cut.png")
    image = load_image(tmp_path / "cut.png")
    assert image[0, 0].tolist() == [10, 20, 30]
    assert image[0, 5].tolist() == [255, 255, 255]
    assert abs(int(image[0, 3, 0]) - 127) <= 1


def test_palette_with_a_transparent_colour(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8)).convert("P")
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.save(tmp_path / "p.png", transparency=0)
    np.testing.assert_array_equal(load_image(tmp_path / "p.png"), [[[255, 255, 255], [200, 100, 50]]])


def test_sixteen_bit_gray_is_scaled_not_clipped(tmp_path: Path) -> None:
    deep = np.array([[0, 257 * 64, 257 * 128, 65535]], dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(load_image(tmp_path / "deep.png")[0, :, 0], [0, 64, 128, 255])


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "LA", "P"])
def test_every_mode_becomes_rgb(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    Image.fromarray(np.full((5, 7, 3), 255, np.uint8)).convert(mode).save(path)
    np.testing.assert_array_equal(load_image(path), np.full((5, 7, 3), 255))


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "a.gif")[0, 0].tolist() == [255, 0, 0]


def jpeg_bytes() -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, format="JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"\n<!DOCTYPE html><html>404</html>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "LFS"),
        (b"not a picture at all", "not a picture"),
        (jpeg_bytes()[:1500], "truncated"),
    ],
)
def test_unreadable_files_are_named_with_their_reason(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "portrait.jpg"
    path.write_bytes(content)
    with pytest.raises(DataError, match=reason) as caught:
        load_image(path)
    assert "portrait.jpg" in str(caught.value)


def test_absent_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "nobody.png", tmp_path):
        with pytest.raises(DataError, match="is not a file"):
            load_image(path)


@settings(deadline=None)
@given(st.integers(0, 3000), st.integers(0, 255))
def test_a_damaged_byte_never_raises_anything_else(tmp_path_factory: pytest.TempPathFactory, at: int, to: int) -> None:
    content = bytearray(jpeg_bytes())
    content[at % len(content)] = to
    path = tmp_path_factory.getbasetemp() / "damaged.jpg"
    path.write_bytes(content)
    try:
        image = load_image(path)
    except DataError:
        return
    assert image.dtype == np.uint8


@pytest.mark.parametrize("side", [int(MAX_PIXELS**0.5) + 1, 60_000])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bomb(side: int, tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))
    with pytest.raises(DataError, match="limit"):
        load_image(path)


def test_resize_is_square_and_keeps_flat_colour() -> None:
    flat = np.full((50, 30, 3), (12, 200, 77), dtype=np.uint8)
    np.testing.assert_array_equal(resize(flat, 24), np.broadcast_to(np.uint8([12, 200, 77]), (24, 24, 3)))


@settings(deadline=None)
@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=20).map(lambda shape: (*shape, 3))))
def test_png_round_trip(tmp_path_factory: pytest.TempPathFactory, image: np.ndarray) -> None:
    path = tmp_path_factory.getbasetemp() / "round" / "trip.png"
    save_png(path, image)
    np.testing.assert_array_equal(load_image(path), image)
    assert [p.name for p in path.parent.iterdir()] == ["trip.png"]


@settings(deadline=None)
@given(hnp.arrays(np.int64, hnp.array_shapes(min_dims=2, max_dims=2, max_side=20), elements=st.integers(0, 10)))
def test_label_round_trip(tmp_path_factory: pytest.TempPathFactory, labels: np.ndarray) -> None:
    path = tmp_path_factory.getbasetemp() / "labels" / "trip.png"
    save_labels(path, labels)
    loaded = load_labels(path)
    assert loaded.dtype == np.uint8
    np.testing.assert_array_equal(loaded, labels)
    with Image.open(path) as image:
        assert image.mode == "P"


def test_the_reference_layout_of_labels_is_read(tmp_path: Path) -> None:
    labels = np.random.default_rng(1).integers(0, 11, (1, 16, 16)).astype(np.int8)
    np.save(tmp_path / "x.npy", labels)
    np.testing.assert_array_equal(load_labels(tmp_path / "x.npy"), labels[0])


def test_labels_outside_the_range_are_refused_on_both_ways(tmp_path: Path) -> None:
    for wrong in (np.full((4, 4), 11), np.full((4, 4), -1)):
        with pytest.raises(DataError, match="0–10"):
            save_labels(tmp_path / "x.png", wrong)
    assert not list(tmp_path.iterdir())
    Image.fromarray(np.full((4, 4), 11, np.uint8)).save(tmp_path / "gray.png")
    with pytest.raises(DataError, match=r"gray\.png.*0–10"):
        load_labels(tmp_path / "gray.png")


def test_what_is_no_parsing_map_is_refused(tmp_path: Path) -> None:
    save_png(tmp_path / "rgb.png", quadrants())
    np.save(tmp_path / "float.npy", np.zeros((4, 4)))
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    for name in ("rgb.png", "float.npy", "broken.png", "absent.png"):
        with pytest.raises(DataError, match=name):
            load_labels(tmp_path / name)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    save_png(path, quadrants())
    before = path.read_bytes()
    with pytest.raises(DataError, match="uint8"):
        save_png(path, quadrants().astype(np.float32))
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(DataError, match="cannot be written"):
        save_png(tmp_path / "folder.png", quadrants())
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.png", "x.png"]


def test_a_file_is_replaced_whole_and_never_rewritten_in_place(tmp_path: Path) -> None:
    """A reader that opened the old file must not see half of the new one."""
    path, other_name = tmp_path / "x.png", tmp_path / "y.png"
    save_png(path, quadrants())
    before = path.read_bytes()
    other_name.hardlink_to(path)
    save_png(path, quadrants()[::-1])
    assert other_name.read_bytes() == before
    np.testing.assert_array_equal(load_image(path), quadrants()[::-1])
