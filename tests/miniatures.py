"""Tiny raw layouts of the public deepfake sets: right names and lists, short real videos of real faces.

Nothing is kept in the repository: clips are encoded from the photographs of the `media_dir` fixture, each once per
session, and written wherever a layout wants them. A drawn face would not do, since the face detector must find it.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from fsvfm.faces.detect import DlibHOG
from fsvfm.faces.video import write_video

#: Photographs of different people, large and frontal enough for dlib.
_NUMBERS = ("001", "002", "003", "005", "006", "007")

#: Pairs of ids of FaceForensics++, as they stand in the official splits.
FFPP_PAIRS = {"train": (("071", "054"), ("087", "081")), "val": (("720", "672"),), "test": (("953", "974"),)}
FFPP_METHODS = ("Deepfakes", "Face2Face", "FaceSwap", "NeuralTextures")

_encoded: dict[str, bytes] = {}


@functools.cache
def faces(media_dir: Path, size: int = 168) -> list[np.ndarray]:
    """Photographs cut to a person's head and shoulders, (size, size, 3) uint8 RGB."""
    cut = []
    for number in _NUMBERS:
        picture = cv2.cvtColor(cv2.imread(str(media_dir / "photos" / f"{number}.jpg")), cv2.COLOR_BGR2RGB)
        scale = 400 / max(picture.shape[:2])
        picture = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        box = DlibHOG(upsample=1)(picture)[0].box
        half = int(0.85 * max(box.width, box.height))
        x, y = (box.left + box.right) // 2 + half, (box.top + box.bottom) // 2 + half
        padded = cv2.copyMakeBorder(picture, half, half, half, half, cv2.BORDER_REFLECT)
        cut.append(cv2.resize(padded[y - half : y + half, x - half : x + half], (size, size)))
    return cut


def forged(photo: np.ndarray) -> np.ndarray:
    """The photograph with a blurred patch in the middle: told apart from it, and still a face to the detector."""
    height, width = photo.shape[:2]
    fake = photo.copy()
    inner = slice(height // 3, -height // 3), slice(width // 3, -width // 3)
    fake[inner] = cv2.GaussianBlur(photo, (0, 0), 2)[inner]
    return fake


def write_clip(path: Path, photo: np.ndarray, frames: int = 6, size: int = 160, rate: int = 25) -> Path:
    """Write a short H.264 video of a photograph that moves by a pixel or two.

    Args:
        path: with a video suffix; its folders are made.
        photo: (H, W, 3) uint8 RGB.
        frames: number of frames.
        size: side of the square picture in pixels.
        rate: frames per second.
    """
    key = f"{hashlib.sha256(photo.tobytes()).hexdigest()} {frames} {size} {rate} {path.suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if key in _encoded:
        path.write_bytes(_encoded[key])
        return path
    larger = cv2.resize(photo, (size + 8, size + 8), interpolation=cv2.INTER_AREA)
    corners = [(round(4 + 4 * np.cos(index)), round(4 + 4 * np.sin(index))) for index in range(frames)]
    write_video(path, (larger[y : y + size, x : x + size] for y, x in corners), rate=rate)
    _encoded[key] = path.read_bytes()
    return path


def write_picture(path: Path, photo: np.ndarray) -> Path:
    """Write a photograph as PNG or JPEG; its folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), cv2.cvtColor(photo, cv2.COLOR_RGB2BGR))
    return path


def ffpp(
    root: Path,
    photos: Sequence[np.ndarray],
    *,
    compression: str = "c23",
    methods: Sequence[str] = FFPP_METHODS,
    suffix: str = ".mp4",
    frames: int = 6,
) -> Path:
    """FaceForensics++: four ids in training, two in validation, two in the test split; each pair forged both ways."""
    number = 0
    for pairs in FFPP_PAIRS.values():
        for pair in pairs:
            for first, second in (pair, pair[::-1]):
                photo, number = photos[number % len(photos)], number + 1
                place = f"{compression}/videos"
                write_clip(root / f"original_sequences/youtube/{place}/{first}{suffix}", photo, frames)
                for method in methods:
                    file = root / f"manipulated_sequences/{method}/{place}/{first}_{second}{suffix}"
                    write_clip(file, forged(photo), frames)
    return root


def dfd(root: Path, photos: Sequence[np.ndarray], *, compression: str = "raw") -> Path:
    """DeepFakeDetection: two actors, each forged with the other's face."""
    for actor, other in (("01", "02"), ("02", "01")):
        photo = photos[int(actor)]
        write_clip(root / f"original_sequences/actors/{compression}/videos/{actor}__hugging_happy.mp4", photo)
        fake = (
            f"manipulated_sequences/DeepFakeDetection/{compression}/videos/{actor}_{other}__hugging_happy__A1B2C3D4.mp4"
        )
        write_clip(root / fake, forged(photo))
    return root


def celebdf(root: Path, photos: Sequence[np.ndarray], *, methods: Sequence[str] = ()) -> Path:
    """Celeb-DF v1 and v2, or Celeb-DF++ with `methods` such as `FaceSwap/SimSwap`; one real video is not listed."""
    lines = []
    for person in (0, 1):
        write_clip(root / f"Celeb-real/id{person}_0000.mp4", photos[person])
        lines.append(f"1 Celeb-real/id{person}_0000.mp4")
        for method in methods or ("",):
            name = f"Celeb-synthesis/{method}/id{person}_id{1 - person}_0000.mp4".replace("//", "/")
            write_clip(root / name, forged(photos[person]))
            lines.append(f"0 {name}")
    write_clip(root / "YouTube-real/00170.mp4", photos[2])
    lines.append("1 YouTube-real/00170.mp4")
    write_clip(root / "Celeb-real/id5_0009.mp4", photos[3])
    (root / "List_of_testing_videos.txt").write_text("\n".join(lines) + "\n")
    return root


def dfdc(root: Path, photos: Sequence[np.ndarray]) -> Path:
    """DFDC: two real and two forged test videos in two parts."""
    rows = [("aalscayrfi.mp4", 0), ("bbnpqmdwhb.mp4", 1), ("ccvtgimuqk.mp4", 0), ("ddlrxobzny.mp4", 1)]
    for number, (name, label) in enumerate(rows):
        photo = photos[number // 2]
        write_clip(root / f"test/ori_videos/part_{number // 2}/{name}", forged(photo) if label else photo)
    with (root / "test/labels.csv").open("w", newline="") as table:
        csv.writer(table).writerows([("filename", "label"), *rows])
    return root


def dfdcp(root: Path, photos: Sequence[np.ndarray]) -> Path:
    """DFDC preview: real videos and both methods in the test set, one video in the training set."""
    facts = {}
    for number, (path, label, part) in enumerate(
        (
            ("original_videos/643634/643634_A_000.mp4", "real", "test"),
            ("original_videos/1224068/1224068_B_001.mp4", "real", "test"),
            ("method_A/643634/643634_1224068_A_000.mp4", "fake", "test"),
            ("method_B/1224068/1224068_643634_B_001.mp4", "fake", "test"),
            ("original_videos/300/300_A_002.mp4", "real", "train"),
        )
    ):
        photo = photos[number % 2]
        write_clip(root / path, forged(photo) if label == "fake" else photo)
        target = path.split("/")[1]
        facts[path] = {"label": label, "set": part, "target_id": target, "swapped_id": None, "augmentations": []}
    facts["method_A/643634/643634_1224068_A_000.mp4"]["swapped_id"] = "1224068"
    (root / "dataset.json").write_text(json.dumps(facts))
    return root


def wdf(root: Path, photos: Sequence[np.ndarray], *, splits: Sequence[str] = ("train", "test")) -> Path:
    """WildDeepfake: two sequences of three cropped faces for each class and split."""
    for split in splits:
        for kind in ("real", "fake"):
            for number in (0, 1):
                edge = len(photos[number]) // 6  # the sequences are cropped already
                photo = photos[number][edge:-edge, edge:-edge]
                for frame in (7, 8, 10):
                    picture = np.roll(forged(photo) if kind == "fake" else photo, frame - 8, axis=1)
                    write_picture(root / f"{kind}_{split}/{number}/{kind}/{number + 3}/{frame}.png", picture)
    return root


def diff(root: Path, photos: Sequence[np.ndarray]) -> Path:
    """DiFF: two real faces per split, and one forgery by one or two generators in each subset."""
    generators = {"T2I": ("SDXL", "Midjourney"), "I2I": ("LoRA",), "FS": ("DiffFace",), "FE": ("Imagic",)}
    for split in ("train", "val", "test"):
        for number in (0, 1):
            write_picture(root / f"DiFF_real/{split}/{split}_{number}.jpg", photos[number])
    for split in ("val", "test"):
        for subset, names in generators.items():
            for number, name in enumerate(names):
                write_picture(root / f"{split}/{subset}/{name}/a smiling person, {number}.png", forged(photos[number]))
    return root
