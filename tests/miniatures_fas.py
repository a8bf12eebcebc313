"""Tiny raw layouts of the pre-training and anti-spoofing sets, made of the photographs of :mod:`miniatures`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from miniatures import forged, write_clip, write_picture

#: Frames of a miniature video: enough for frames 6 and 6 + ⌊n/2⌋.
FRAMES = 13


def vggface2(root: Path, photos: Sequence[np.ndarray]) -> Path:
    """Two people in training, one in the test folder; one picture without a face."""
    for number, (place, photo) in enumerate(
        (
            ("train/n000002/0001_01", 0),
            ("train/n000002/0002_01", 0),
            ("train/n000003/0001_01", 1),
            ("test/n000001/0001_01", 2),
        )
    ):
        write_picture(root / f"{place}.jpg", np.roll(photos[photo], number, axis=1))
    write_picture(root / "train/n000003/0009_02.jpg", np.full((120, 120, 3), 128, np.uint8))
    return root


def youtubefaces(root: Path, photos: Sequence[np.ndarray]) -> Path:
    """Two people, the first with two videos."""
    for place, photo in (("Ann_Lee/0", 0), ("Ann_Lee/1", 0), ("Bob_Ray/2", 1)):
        for frame in (1, 34):
            write_picture(
                root / f"frame_images_DB/{place}/{place[-1]}.{frame}.jpg", np.roll(photos[photo], frame, axis=0)
            )
    (root / "frame_images_DB" / "Ann_Lee.labeled_faces.txt").write_text("not a picture\n")
    return root


def lfw(root: Path, photos: Sequence[np.ndarray]) -> Path:
    """Three people, the first with two photographs."""
    for name, number, photo in (("Ann_Lee", 1, 0), ("Ann_Lee", 2, 0), ("Bob_Ray", 1, 1), ("Cy_Dee", 1, 2)):
        write_picture(root / f"lfw/{name}/{name}_{number:04d}.jpg", np.roll(photos[photo], number, axis=1))
    return root


def _clip(path: Path, photo: np.ndarray, attack: bool) -> None:
    write_clip(path, forged(photo) if attack else photo, FRAMES)


def replay(root: Path, photos: Sequence[np.ndarray]) -> Path:
    """One client per split, one real video and one attack each; an enrolment video beside them."""
    for number, split in enumerate(("train", "devel", "test")):
        client = f"client{number + 1:03d}"
        photo = photos[number]
        _clip(root / f"{split}/real/{client}_session01_webcam_authenticate_adverse_1.mov", photo, False)
        for holding in ("fixed", "hand") if split == "train" else ("fixed",):
            name = f"attack_print_{client}_session01_highdef_photo_adverse.mov"
            _clip(root / f"{split}/attack/{holding}/{name}", photo, True)
    _clip(root / "enroll/train/client001_session01_webcam_enroll_adverse.mov", photos[0], False)
    return root


def msu(root: Path, photos: Sequence[np.ndarray]) -> Path:
    """Two clients and one that is in neither list."""
    for client, photo in (("001", 0), ("002", 1), ("055", 2)):
        place = root / "scene01"
        _clip(place / f"real/real_client{client}_android_SD_scene01.mp4", photos[photo], False)
        _clip(place / f"attack/attack_client{client}_android_SD_ipad_video_scene01.mov", photos[photo], True)
    (root / "train_sub_list.txt").write_text("01\n")
    (root / "test_sub_list.txt").write_text("002\r\n")
    return root


def oulu(root: Path, photos: Sequence[np.ndarray]) -> Path:
    """One user per folder, a real video and an attack each."""
    for folder, user, photo in (("Train", 1, 0), ("Dev", 21, 1), ("Test", 36, 2)):
        for file in (1, 2, 5) if folder == "Train" else (1, 4):
            _clip(root / f"{folder}_files/1_1_{user:02d}_{file}.avi", photos[photo], file != 1)
    return root


def casia(root: Path, photos: Sequence[np.ndarray]) -> Path:
    """Person 1 of either folder, who are two people; four clips each."""
    for folder, photo in (("train_release", 0), ("test_release", 1)):
        for clip in ("1", "HR_1", "4", "HR_4"):
            _clip(root / folder / "1" / f"{clip}.avi", photos[photo], clip in ("4", "HR_4"))
    return root


def celeb(root: Path, photos: Sequence[np.ndarray]) -> Path:
    """Two people in training, one in the test folder, with the boxes that come beside the pictures."""
    number = 0
    for place, photo in (("train/1", 0), ("train/2", 1), ("test/10", 2)):
        for kind in ("live", "spoof"):
            for _ in range(2 if kind == "spoof" else 1):
                number += 1
                picture = np.roll(forged(photos[photo]) if kind == "spoof" else photos[photo], number, axis=1)
                write_picture(root / f"CelebA_Spoof/Data/{place}/{kind}/{number:06d}.png", picture)
                (root / f"CelebA_Spoof/Data/{place}/{kind}/{number:06d}_BB.txt").write_text("1 2 3 4 0.99")
    return root


def lists(root: Path, listed: Mapping[str, Sequence[str]]) -> Path:
    """The lists of a protocol: `{"cefa_real_train": ["cefa/train/real/….jpg"], …}`."""
    root.mkdir(parents=True, exist_ok=True)
    for name, lines in listed.items():
        (root / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))
    return root


def bordered(photo: np.ndarray) -> np.ndarray:
    """The picture with 17 black pixels above, 9 below, 5 at the left and 30 at the right."""
    return np.pad(photo, ((17, 9), (5, 30), (0, 0)))


#: Listed files of CeFA and what stands in the raw folder beside it.
CEFA = {
    "cefa_real_train": ["cefa/train/real/1_260_1_1_1_05.jpg", "cefa/train/real/1_260_1_1_1_00.jpg"],
    "cefa_fake_train": ["cefa/train/fake/1_260_3_2_2_07.jpg"],
    "cefa_real_test": ["cefa/test/real/3_272_1_1_1_09.jpg"],
    "cefa_fake_test": ["cefa/test/fake/3_272_3_2_4_00.jpg", "cefa/test/fake/3_499_3_2_3_00.jpg"],
    "cefa_real_shot": ["cefa/train/real/1_260_1_1_1_05.jpg"],
    "cefa_fake_shot": ["cefa/train/fake/1_260_3_2_2_07.jpg"],
}


def cefa(root: Path, photos: Sequence[np.ndarray]) -> Path:
    """Four clips of 25 pictures; picture k is the photograph with k in its first pixel. One listed clip is absent."""
    for place, photo in (
        ("AF/AF-260-198006250024/1_260_1_1_1", photos[0]),
        ("AF/AF-260-198006250024/1_260_3_2_2", forged(photos[0])),
        ("EA/EA-272-198006250024/3_272_1_1_1", photos[1]),
        ("EA/EA-272-198006250024/3_272_3_2_4", forged(photos[1])),
    ):
        for number in range(25):
            picture = photo[::4, ::4].copy()
            picture[:12, :12] = 40 + 8 * number
            write_picture(root / place / "profile" / f"{number + 1:04d}.png", bordered(picture))
            write_picture(root / place / "depth" / f"{number + 1:04d}.png", picture[:2, :2])
    return root


SURF = {
    "surf_real_train": ["surf/train/real/Training_real_part_CLKJ_AS0005_real.rssdk_color_5.jpg"],
    "surf_fake_train": ["surf/train/fake/Training_fake_part_CLKJ_AS0005_06_enm_b.rssdk_color_120.jpg"],
    "surf_real_test": ["surf/test/real/Val_0000_000000-color.jpg"],
    "surf_fake_test": ["surf/test/fake/Val_0001_000100-color.jpg"],
}


def surf(root: Path, photos: Sequence[np.ndarray]) -> Path:
    """The listed pictures, with depth pictures beside them."""
    for place, photo in (
        ("Training/real_part/CLKJ_AS0005/real.rssdk/color/5.jpg", photos[0]),
        ("Training/real_part/CLKJ_AS0005/real.rssdk/depth/5.jpg", photos[0]),
        ("Training/fake_part/CLKJ_AS0005/06_enm_b.rssdk/color/120.jpg", forged(photos[0])),
        ("Val/0000/000000-color.jpg", photos[1]),
        ("Val/0000/000000-depth.jpg", photos[1]),
        ("Val/0001/000100-color.jpg", forged(photos[1])),
    ):
        write_picture(root / place, bordered(photo))
    return root


WMCA = {
    "wmca_real_train": [f"wmca/train/real/2018-08-24_004_03_000_0_01_{frame:02d}.jpg" for frame in (0, 3)],
    "wmca_fake_train": ["wmca/train/fake/2018-08-24_004_03_000_3_17_03.jpg"],
    "wmca_real_test": ["wmca/test/real/2018-09-01_011_01_000_0_01_00.jpg"],
    "wmca_fake_test": ["wmca/test/fake/2018-09-01_011_01_000_5_02_07.jpg"],
}


def wmca(root: Path, photos: Sequence[np.ndarray]) -> Path:
    """Four HDF5 files with five frames of (3, 128, 128) uint8 each, so that one listed frame is not there."""
    import h5py

    for place, photo in (
        ("2018-08-24/004_03_000_0_01", photos[0]),
        ("2018-08-24/004_03_000_3_17", forged(photos[0])),
        ("2018-09-01/011_01_000_0_01", photos[1]),
        ("2018-09-01/011_01_000_5_02", forged(photos[1])),
    ):
        file = root / f"{place}.hdf5"
        file.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(file, "w") as target:
            for frame in range(5):
                picture = photo[20:148, 20:148].copy()
                picture[:8, :8] = 50 + 40 * frame
                target.create_dataset(f"Frame_{frame}/array", data=picture.transpose(2, 0, 1))
    return root
