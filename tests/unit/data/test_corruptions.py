"""Corruptions: the same damage wherever and whenever it is done, growing with severity, and what its name says."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import gaussian_filter

from fsvfm.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from fsvfm.errors import ConfigError, DataError

NAMES = list(CORRUPTIONS)
CONFIGS = Path(__file__).resolve().parents[3] / "configs"


@pytest.fixture(scope="session")
def photos(media_dir: Path) -> list[np.ndarray]:
    """Parts of real photographs, with odd and even sides."""
    images = []
    for index, (height, width) in ((0, (201, 256)), (12, (300, 277)), (37, (224, 224))):
        image = np.asarray(Image.open(media_dir / f"photos/{index:03d}.jpg").convert("RGB"))
        images.append(np.ascontiguousarray(image[:height, :width]))
    return images


def picture(height: int = 96, width: int = 96, seed: int = 0) -> np.ndarray:
    """Smooth colours with some detail."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(30, 220, (5, 5, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=float)
    return np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.mean((a.astype(float) - b) ** 2)))


@pytest.mark.parametrize("name", NAMES)
def test_distance_to_the_photograph_grows_with_severity(photos: list[np.ndarray], name: str) -> None:
    for image in photos:
        kept = image.copy()
        for seed in (0, 1):  # brightness: one makes it lighter, one darker
            distances = [distance(corrupt(image, name, severity, seed), image) for severity in SEVERITIES]
            assert distances[0] > 0.5
            assert all(a < b for a, b in pairwise(distances)), (name, distances)
        np.testing.assert_array_equal(image, kept)


def digests(image: np.ndarray) -> dict[str, str]:
    jobs = [(name, severity, seed) for name in NAMES for severity in (1, 5) for seed in (3, 2**40)]
    return {str(job): hashlib.sha256(corrupt(image, *job).tobytes()).hexdigest() for job in jobs}


def test_same_arguments_same_pixels_in_any_order_and_process() -> None:
    first = digests(picture())
    np.random.seed(99)  # noqa: NPY002  (global generators must not matter)
    image = picture()
    for name, severity, seed in reversed([(n, s, d) for n in NAMES for s in (1, 5) for d in (3, 2**40)]):
        again = hashlib.sha256(corrupt(image, name, severity, seed).tobytes()).hexdigest()
        assert again == first[str((name, severity, seed))], name
    # A fresh interpreter; this file is imported there by its path.
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import test_corruptions as t; print(t.digests(t.picture()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(first)


@pytest.mark.parametrize("name", ["gaussian_noise", "blockwise", "brightness"])
def test_seeds_differ(name: str) -> None:
    assert len({corrupt(picture(), name, 3, seed).tobytes() for seed in range(-4, 8)}) > 1


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"gaussian_noise", "blockwise", "brightness"}))
def test_what_is_not_random_does_not_depend_on_the_seed(name: str) -> None:
    assert len({corrupt(picture(), name, 3, seed).tobytes() for seed in range(3)}) == 1


@given(height=st.integers(1, 90), width=st.integers(1, 90), name=st.sampled_from(NAMES), severity=st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_any_size_keeps_its_shape(height: int, width: int, name: str, severity: int) -> None:
    image = picture(height, width)
    view = np.broadcast_to(image, image.shape)[::-1]  # neither contiguous nor writeable
    out = corrupt(view, name, severity, 0)
    assert out.shape == image.shape
    assert out.dtype == np.uint8
    assert out.flags.c_contiguous
    assert out.flags.writeable
    assert not np.shares_memory(out, image)


def test_jpeg_is_that_of_other_coders() -> None:
    image = picture(97, 130)
    image[:40, :40] = (250, 20, 10)  # red and blue are coded differently: a swap of channels would show
    for severity, quality in enumerate(CORRUPTIONS["jpeg"].values, 1):
        ours = corrupt(image, "jpeg", severity, 0)
        _, coded = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, int(quality)])
        np.testing.assert_array_equal(ours, cv2.imdecode(coded, cv2.IMREAD_COLOR)[..., ::-1])
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=int(quality), subsampling="4:2:0")
        assert distance(ours, np.asarray(Image.open(buffer))) < 0.5, quality
    assert CORRUPTIONS["jpeg"].values == (90, 75, 60, 45, 30)


def test_video_codes_the_face_with_its_quantisation(photos: list[np.ndarray], tmp_path: Path) -> None:
    """Against the same clip written to a file and read back by OpenCV."""
    import av

    image = photos[2]
    assert {23, 40} < set(CORRUPTIONS["video"].values)
    for severity in (1, 5):
        path = tmp_path / f"{severity}.mp4"
        with av.open(str(path), "w") as clip:
            crf = CORRUPTIONS["video"].values[severity - 1]
            stream = clip.add_stream("libx264", rate=25, options={"crf": str(crf)})
            stream.width, stream.height, stream.pix_fmt = image.shape[1], image.shape[0], "yuv420p"
            for _ in range(5):
                clip.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            clip.mux(stream.encode())
        reader = cv2.VideoCapture(str(path))
        frames = [reader.read()[1] for _ in range(5)]
        theirs = frames[2][..., ::-1]
        ours = corrupt(image, "video", severity, 0)
        assert distance(ours, theirs) < 2.5
        assert distance(ours, theirs) < distance(ours, image) / 1.5


def test_blur_and_resize_are_measured_as_the_network_sees_the_face(photos: list[np.ndarray]) -> None:
    image = photos[2]
    assert image.shape[:2] == (224, 224)
    for severity, sigma in enumerate(CORRUPTIONS["gaussian_blur"].values, 1):
        blurred = gaussian_filter(image.astype(float), (sigma, sigma, 0), mode="mirror")
        assert distance(corrupt(image, "gaussian_blur", severity, 0), blurred) < 0.6
    twice = np.asarray(Image.fromarray(image).resize((448, 448), Image.Resampling.BICUBIC))
    seen = np.asarray(Image.fromarray(corrupt(twice, "gaussian_blur", 4, 0)).resize((224, 224), Image.Resampling.BOX))
    milder, same = (corrupt(image, "gaussian_blur", severity, 0) for severity in (2, 4))
    assert distance(seen, same) < distance(milder, same) / 2
    small = picture(50, 60)
    np.testing.assert_array_equal(corrupt(small, "resize", 4, 0), small)  # smaller than 56 pixels as it is
    assert distance(corrupt(small, "resize", 5, 0), small) > 0


def test_noise_blocks_and_colours_have_their_stated_size() -> None:
    grey = np.full((224, 224, 3), 120, np.uint8)
    for severity, std in enumerate(CORRUPTIONS["gaussian_noise"].values, 1):
        noise = corrupt(grey, "gaussian_noise", severity, 5).astype(float) - 120
        assert noise.std() == pytest.approx(std, rel=0.02, abs=0.1)
        assert abs(noise.mean()) < 1
        assert np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1] < 0.05
    black = np.zeros((224, 224, 3), np.uint8)
    before = np.zeros((224, 224), bool)
    for severity, percent in enumerate(CORRUPTIONS["blockwise"].values, 1):
        covered = corrupt(black, "blockwise", severity, 5).any(axis=2)
        assert 100 * covered.mean() == pytest.approx(percent, abs=0.1)
        assert not (before & ~covered).any(), "blocks of a milder severity stay"
        before = covered
    image = picture()
    level = image.mean()
    ratio = {round(corrupt(image, "brightness", 1, seed).mean() / level, 2) for seed in range(12)}
    assert ratio == {0.9, 1.1}
    assert corrupt(image, "contrast", 5, 0).std() == pytest.approx(image.std() / 4, rel=0.1)
    pale = corrupt(image, "saturation", 5, 0)
    assert (pale.max(axis=2) == pale.min(axis=2)).all()


def test_errors_say_what_there_is() -> None:
    image = picture()
    with pytest.raises(ConfigError, match=r"'fog'.*jpeg.*saturation"):
        corrupt(image, "fog", 1, 0)
    for severity in (0, 6, 1.5):
        with pytest.raises(ConfigError, match=r"1 \(mild\) to 5"):
            corrupt(image, "jpeg", severity, 0)  # type: ignore[arg-type]
    for wrong in (image.astype(float), image[..., 0], image[..., :2], image[:0]):
        with pytest.raises(DataError, match="uint8 RGB"):
            corrupt(wrong, "jpeg", 1, 0)


@pytest.mark.parametrize("protocol", ["robustness_demo", "robustness_dfd"])
def test_protocols_take_all_of_them(protocol: str) -> None:
    config = yaml.safe_load((CONFIGS / "protocol" / f"{protocol}.yaml").read_text())
    assert config["evaluate"]["corruptions"] == NAMES
