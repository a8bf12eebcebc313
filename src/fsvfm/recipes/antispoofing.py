"""Face anti-spoofing sets: Replay-Attack, MSU-MFSD, OULU-NPU, CASIA-FASD, CelebA-Spoof, WMCA, CeFA, SURF (03, sec. 5).

Videos give two frames each, as aligned chips. The names of the data sets, by which protocols choose them, are `replay`,
`msu`, `oulu`, `casia`, `celeb`, `wmca`, `cefa` and `surf`; their folders lie in `fas/`, so a recipe's `name` is
`fas/msu` and the like. Label 0 is a real face, 1 an attack.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from fsvfm.data.layouts import frame_of, protocol_columns, read_lists
from fsvfm.errors import ConfigError, DataError
from fsvfm.recipes.engine import Catalogue, Entry, Prepared, find_files, find_folder
from fsvfm.recipes.listing import complete, differences, left_out
from fsvfm.recipes.photos import PHOTO_SUFFIXES
from fsvfm.recipes.stills import prepare_stills
from fsvfm.recipes.videos import prepare_videos

_CLASSES = ("real", "attack")

#: Frames that the protocols take of a video.
_FRAMES = 2


# --- Videos ----------------------------------------------------------------------------------------------------------


def replay_catalogue(root: str | Path, *, name: str = "replay") -> Catalogue:
    """Replay-Attack: `{train,devel,test}/{real,attack/{fixed,hand}}/*.mov`; enrolment videos are left out.

    The development set is the `val` split.

    Args:
        root: raw folder.
        name: of the data set.

    Raises:
        DataError: no such folder, or no video in it.
    """
    root = find_folder(root).absolute()
    splits = {"train": "train", "devel": "val", "test": "test"}
    entries: list[Entry] = []
    skipped: list[tuple[str, str]] = []
    enrolment: list[str] = []
    for file in find_files(root, (".mov",)):
        inner = file.relative_to(root)
        places = {part.lower() for part in inner.parts[:-1]}
        if any("enroll" in part or "competition_icb2013" in part for part in places):
            enrolment.append(inner.as_posix())
            continue
        split = [splits[part] for part in splits if part in places]
        label = [number for number, kind in enumerate(_CLASSES) if kind in places]
        if len(split) != 1 or len(label) != 1:
            skipped.append((str(file), "its folders do not say split and class"))
            continue
        kind = re.search(r"attack_([a-z]+)_.*_(photo|video)", file.stem)
        method = "_".join(kind.groups()) if kind else "attack"  # print_photo, mobile_video, highdef_photo …
        entries.append(_video(file, root, label[0], split[0], method, _number("client", file.stem)))
    expected = {"train": (60, 300), "val": (60, 300), "test": (80, 400)}
    card = {
        "about": "Replay-Attack",
        "source": {
            "citation": "Chingovska, Anjos and Marcel, On the Effectiveness of Local Binary Patterns in Face "
            "Anti-spoofing, BIOSIG 2012",
            "url": "https://www.idiap.ch/en/scientific-research/data/replayattack",
        },
        "licence": "after a signed agreement with Idiap: research only; do not redistribute",
        "split": "official: train, devel (as val), test",
    }
    warnings = left_out("video(s)", enrolment, "enrolment is no attack test")
    return _complete(name, entries, card, expected, skipped, warnings)


def msu_catalogue(root: str | Path, *, name: str = "msu") -> Catalogue:
    """MSU-MFSD: `scene01/{real,attack}/*.{mov,mp4}`, the people of each split in two lists.

    Args:
        root: folder with the videos and `train_sub_list.txt`, `test_sub_list.txt`, at any depth.
        name: of the data set.

    Raises:
        DataError: no such folder or list, a person in both lists, or no video.
    """
    root = find_folder(root).absolute()
    split_of: dict[int, str] = {}
    for split in ("train", "test"):
        for number in map(int, re.findall(r"\d+", _find_file(root, f"{split}_sub_list.txt").read_text())):
            if split_of.setdefault(number, split) != split:
                raise DataError(f"client {number} stands in train_sub_list.txt and in test_sub_list.txt of {root}")
    entries: list[Entry] = []
    skipped: list[tuple[str, str]] = []
    for file in find_files(root, (".mov", ".mp4")):
        places = {part.lower() for part in file.relative_to(root).parts[:-1]}
        label = [number for number, kind in enumerate(_CLASSES) if kind in places]
        person = _number("client", file.stem)
        if len(label) != 1 or not person:
            skipped.append((str(file), "its path does not say class and client"))
        elif int(person) not in split_of:
            skipped.append((str(file), "its client is in neither list"))
        else:
            kind = re.search(r"(ipad_video|iphone_video|printed_photo)", file.stem)
            method = kind[1] if kind else "attack"
            entries.append(_video(file, root, label[0], split_of[int(person)], method, person))
    card = {
        "about": "MSU-MFSD, the public part: 35 people",
        "source": {
            "citation": "Wen, Han and Jain, Face Spoof Detection with Image Distortion Analysis, IEEE TIFS 2015",
            "url": "https://sites.google.com/site/huhanhomepage/download/",
        },
        "licence": "after a signed agreement with Michigan State University: research only; do not redistribute",
        "split": "official: train_sub_list.txt, test_sub_list.txt",
    }
    return _complete(name, entries, card, {"train": (30, 90), "test": (40, 120)}, skipped)


def oulu_catalogue(root: str | Path, *, name: str = "oulu") -> Catalogue:
    """OULU-NPU: `{Train,Test}_files/<phone>_<session>_<user>_<file>.avi`; file 1 is real. `Dev_files` are not used.

    Args:
        root: folder with `Train_files` and `Test_files`.
        name: of the data set.

    Raises:
        DataError: a folder that is not there, or no video.
    """
    root = find_folder(root).absolute()
    methods = {2: "print_1", 3: "print_2", 4: "replay_1", 5: "replay_2"}
    entries: list[Entry] = []
    skipped: list[tuple[str, str]] = []
    for split in ("train", "test"):
        for file in find_files(find_folder(root, f"{split}_files"), (".avi",)):
            said = re.fullmatch(r"(\d+)_(\d+)_(\d+)_([1-5])", file.stem)
            if said is None:
                skipped.append((str(file), "not named <phone>_<session>_<user>_<file>"))
                continue
            number = int(said[4])
            entries.append(_video(file, root, int(number != 1), split, methods.get(number, "real"), said[3]))
    card = {
        "about": "OULU-NPU",
        "source": {
            "citation": "Boulkenafet et al., OULU-NPU: A Mobile Face Presentation Attack Database with Real-World "
            "Variations, FG 2017",
            "url": "https://sites.google.com/site/oulunpudatabase/",
        },
        "licence": "after a signed agreement with the University of Oulu: research only; do not redistribute",
        "split": "official: Train_files, Test_files; Dev_files are not used by the cross-set protocols",
    }
    return _complete(name, entries, card, {"train": (360, 1440), "test": (360, 1440)}, skipped)


def casia_catalogue(root: str | Path, *, name: str = "casia") -> Catalogue:
    """CASIA-FASD: `{train,test}_release/<person>/{1..8,HR_1..HR_4}.avi`; 1, 2 and HR_1 are real.

    People are numbered from 1 in both folders and are different people.

    Args:
        root: folder with `train_release` and `test_release`.
        name: of the data set.

    Raises:
        DataError: a folder that is not there, or no video.
    """
    root = find_folder(root).absolute()
    methods = dict.fromkeys(("3", "4", "hr_2"), "warped_photo") | dict.fromkeys(("5", "6", "hr_3"), "cut_photo")
    methods |= dict.fromkeys(("7", "8", "hr_4"), "video") | dict.fromkeys(("1", "2", "hr_1"), "real")
    entries: list[Entry] = []
    skipped: list[tuple[str, str]] = []
    for split in ("train", "test"):
        for file in find_files(find_folder(root, f"{split}_release"), (".avi",)):
            method = methods.get(file.stem.lower())
            if method is None:
                skipped.append((str(file), "no clip of the published names"))
                continue
            entries.append(_video(file, root, int(method != "real"), split, method, f"{split}_{file.parent.name}"))
    card = {
        "about": "CASIA-FASD",
        "source": {
            "citation": "Zhang et al., A Face Antispoofing Database with Diverse Attacks, ICB 2012",
            "url": "http://www.cbsr.ia.ac.cn/english/FASDB_Agreement/Agreement.pdf",
        },
        "licence": "after a signed agreement with CASIA: research only; do not redistribute",
        "split": "official: train_release, test_release",
    }
    return _complete(name, entries, card, {"train": (60, 180), "test": (90, 270)}, skipped)


def _video(file: Path, root: Path, label: int, split: str, method: str, subject: str) -> Entry:
    video = file.relative_to(root).with_suffix("").as_posix()
    return Entry(str(file), "", label, split, method if label else "real", video, subject, frames=_FRAMES)


def _number(word: str, text: str) -> str:
    found = re.search(rf"{word}(\d+)", text, re.IGNORECASE)
    return found[1] if found else ""


def _find_file(root: Path, name: str) -> Path:
    """The file of that name at any depth, whatever its case."""
    found = [file for file in find_files(root, (name,)) if file.name.lower() == name]
    if not found:
        raise DataError(f"no file {name} below {root}; it comes with the data set and says whose videos are for what")
    return found[0]


def _complete(
    name: str,
    entries: list[Entry],
    card: dict[str, Any],
    expected: Mapping[str, tuple[int, int]],
    skipped: list[tuple[str, str]],
    warnings: Sequence[str] = (),
) -> Catalogue:
    """The catalogue, with a warning for every count of videos that is not the published one."""
    published = {
        f"{split} {kind}": n for split, both in expected.items() for kind, n in zip(_CLASSES, both, strict=True)
    }
    found = Counter(f"{entry.split} {_CLASSES[entry.label]}" for entry in entries)
    warnings = [*warnings, *differences(str(card["about"]), published, found)]
    return complete(name, entries, {**card, "expected": {"videos": published}}, skipped=skipped, warnings=warnings)


# --- Pictures --------------------------------------------------------------------------------------------------------


def celeb_catalogue(
    root: str | Path, *, name: str = "celeb", images: str | None = None, sample: int | None = None, seed: int = 0
) -> Catalogue:
    """CelebA-Spoof: `Data/{train,test}/<person>/{live,spoof}/*.{png,jpg}`.

    Args:
        root: folder with `Data`, or that folder.
        name: of the data set.
        images: text file with a picture's path per line, as in `Data/train/1/live/a.png`, to take only these (what
            follows a path does not count); None takes all.
        sample: take so many pictures of each split and class; None takes all.
        seed: of the sample.

    Raises:
        ConfigError: a sample below 1.
        DataError: no such folder or file, or no picture.
    """
    if sample is not None and sample < 1:
        raise ConfigError(f"recipe.sample={sample}: expected a number of pictures from 1, or null for all")
    root = find_folder(root).absolute()
    data = root if root.name.lower() == "data" else find_folder(root, "Data")
    entries: list[Entry] = []
    skipped: list[tuple[str, str]] = []
    if images is None:
        files = [file for split in ("train", "test") for file in find_files(find_folder(data, split), PHOTO_SUFFIXES)]
    else:
        files, skipped = _listed_pictures(Path(images).expanduser(), data)
    for file in files:
        said = re.fullmatch(r"(train|test)/(\d+)/(live|spoof)/.+", file.relative_to(data).as_posix(), re.IGNORECASE)
        if said is None:
            skipped.append((str(file), "not at <train or test>/<person>/<live or spoof>/"))
            continue
        split, person, kind = said[1].lower(), said[2], said[3].lower()
        label = int(kind == "spoof")
        video = file.relative_to(data).with_suffix("").as_posix()
        entries.append(Entry(str(file), "", label, split, "attack" if label else "real", video, person))
    if sample is not None:
        entries = _sampled(entries, sample, seed)
    card = {
        "about": "CelebA-Spoof",
        "source": {
            "citation": "Zhang et al., CelebA-Spoof: Large-Scale Face Anti-Spoofing Dataset with Rich Annotations, "
            "ECCV 2020",
            "url": "https://github.com/ZhangYuanhan-AI/CelebA-Spoof",
        },
        "licence": "non-commercial research, as CelebA; do not redistribute",
        "split": "official folders: train, test",
        "expected": {"pictures": 625_537, "people": 10_177},
        "options": {"images": images, "sample": sample, "seed": seed},
    }
    return complete(name, entries, card, skipped=skipped)


def _listed_pictures(listing: Path, data: Path) -> tuple[list[Path], list[tuple[str, str]]]:
    """Files that a list names, with `Data/` in front or without, and those that do not exist."""
    if not listing.is_file():
        raise DataError(f"recipe.images={listing} is not a file; expected a text file with a path per line")
    files: dict[Path, None] = {}
    skipped: list[tuple[str, str]] = []
    for line in listing.read_text(encoding="utf-8-sig").split("\n"):
        words = line.replace(",", " ").split()
        if not words:
            continue
        inner = re.sub(r"^(\./)?(CelebA_Spoof/)?(Data/)?", "", words[0].replace("\\", "/"), flags=re.IGNORECASE)
        file = data / inner
        if file.is_file():
            files[file] = None
        else:
            skipped.append((str(file), "no such file"))
    return list(files), skipped


def _sampled(entries: list[Entry], sample: int, seed: int) -> list[Entry]:
    chosen: list[int] = []
    for split in ("train", "test"):
        for label in (0, 1):
            places = [i for i, entry in enumerate(entries) if entry.split == split and entry.label == label]
            order = np.random.default_rng([seed, label, split == "test"]).permutation(len(places))[:sample]
            chosen += [places[i] for i in order]
    return [entries[place] for place in sorted(chosen)]


def wmca_catalogue(root: str | Path, *, lists: str | Path, name: str = "wmca") -> Catalogue:
    """WMCA, preprocessed colour faces: `<date>/<client>_<session>_<presenter>_<type>_<instrument>.hdf5`.

    A listed `wmca/train/fake/<date>_<clip>_07.jpg` is frame 7 of that clip.

    Args:
        root: folder with the HDF5 files, at any depth.
        lists: folder with `wmca_real_train.txt` and the other lists of the protocol.
        name: of the data set.

    Raises:
        DataError: no such folder or list, or no file.
    """
    files = {f"{file.parent.name}_{file.stem}": file for file in find_files(root, (".hdf5", ".h5"))}

    def locate(stem: str, frame: int) -> tuple[Path | None, str]:
        clip = stem.rpartition("_")[0]
        said = re.search(r"_\d+_\d+_\d+_(\d+)_\d+$", clip)
        return files.get(clip), f"type_{said[1]}" if said else "attack"

    card = {
        "about": "WMCA, preprocessed colour faces",
        "source": {
            "citation": "George et al., Biometric Face Presentation Attack Detection with Multi-Channel Convolutional "
            "Neural Network, IEEE TIFS 2019",
            "url": "https://www.idiap.ch/en/scientific-research/data/wmca",
        },
        "licence": "after a signed agreement with Idiap: research only; do not redistribute",
    }
    return _from_lists(name, "wmca", lists, locate, card)


def cefa_catalogue(root: str | Path, *, lists: str | Path, name: str = "cefa") -> Catalogue:
    """CASIA-SURF CeFA: `**/<race>_<person>_<device>_<session>_<attack>/profile/*.jpg`.

    A listed `cefa/test/real/3_272_1_1_1_07.jpg` is the first picture of the eighth tenth of that clip.

    Args:
        root: folder with the clips, at any depth.
        lists: folder with `cefa_real_train.txt` and the other lists of the protocol.
        name: of the data set.

    Raises:
        DataError: no such folder or list, or no picture.
    """
    clips: dict[str, Path] = {}
    for place, folders, _ in os.walk(find_folder(root).absolute(), followlinks=True):
        for folder in list(folders):
            if re.fullmatch(r"\d_\d{3}_\d_\d_\d", folder):
                clips[folder] = Path(place) / folder
                folders.remove(folder)
    methods = {"2": "cloth", "3": "print", "4": "screen"}
    pictures: dict[str, list[Path]] = {}

    def locate(stem: str, frame: int) -> tuple[Path | None, str]:
        clip = stem.rpartition("_")[0]
        if clip in clips and clip not in pictures:
            folder = clips[clip]
            inner = next((folder / each for each in ("profile", "color") if (folder / each).is_dir()), folder)
            pictures[clip] = find_files(inner, PHOTO_SUFFIXES, recursive=False)
        found = pictures.get(clip, [])
        file = found[frame * (len(found) // 10)] if len(found) >= 10 and frame < 10 else None
        return file, methods.get(clip[-1], "attack")

    card = {
        "about": "CASIA-SURF CeFA, colour",
        "source": {
            "citation": "Liu et al., CASIA-SURF CeFA: A Benchmark for Multi-modal Cross-ethnicity Face Anti-spoofing, "
            "WACV 2021",
            "url": "https://github.com/liuajian/CASIA-FAS-Dataset",
        },
        "licence": "after a signed agreement with CASIA: research only; do not redistribute",
    }
    return _from_lists(name, "cefa", lists, locate, card)


def surf_catalogue(root: str | Path, *, lists: str | Path, name: str = "surf") -> Catalogue:
    """CASIA-SURF: `Training/{real,fake}_part/<person>/<clip>/color/*.jpg`, `{Val,Testing}/<group>/<number>-color.jpg`.

    A listed file is named by its path: `surf/train/real/Training_real_part_CLKJ_AS0005_real.rssdk_color_120.jpg`.

    Args:
        root: folder with `Training`, `Val` and `Testing`.
        lists: folder with `surf_real_train.txt` and the other lists of the protocol.
        name: of the data set.

    Raises:
        DataError: no such folder or list, or no picture.
    """
    root = find_folder(root).absolute()
    files: dict[str, Path] = {}
    for file in find_files(root, PHOTO_SUFFIXES):
        files[file.relative_to(root).with_suffix("").as_posix().replace("/", "_")] = file

    def locate(stem: str, frame: int) -> tuple[Path | None, str]:
        said = re.search(r"fake_part_CLKJ_[A-Z]+\d+_(\d+)_", stem)
        return files.get(stem), f"attack_{said[1]}" if said else "attack"

    card = {
        "about": "CASIA-SURF, colour",
        "source": {
            "citation": "Zhang et al., A Dataset and Benchmark for Large-scale Multi-modal Face Anti-spoofing, "
            "CVPR 2019",
            "url": "https://github.com/liuajian/CASIA-FAS-Dataset",
        },
        "licence": "after a signed agreement with CASIA: research only; do not redistribute",
    }
    return _from_lists(name, "surf", lists, locate, card)


def _from_lists(
    name: str,
    dataset: str,
    lists: str | Path,
    locate: Callable[[str, int], tuple[Path | None, str]],
    card: dict[str, Any],
) -> Catalogue:
    """The catalogue of what the protocol's lists name.

    Args:
        name: of the data set.
        dataset: its name in the lists.
        lists: folder with the lists.
        locate: (name of a listed file without suffix, its frame) → raw file or None, and the method of an attack.
        card: what is to be said of the data set.
    """
    listed = read_lists(lists, [dataset])[dataset]
    frames = [frame_of(file.path) for file in listed]
    columns = protocol_columns(listed, [video for video, _ in frames], dataset)
    entries: list[Entry] = []
    skipped: list[tuple[str, str]] = []
    for file, (video, frame), column in zip(listed, frames, columns, strict=True):
        found, method = locate(PurePosixPath(file.path).stem, frame)
        if found is None:
            skipped.append((file.path, "listed, but not in the raw folder"))
            continue
        more = {"frame": frame, "shot": column["shot"], "source": column["source"]}
        method = method if file.label else "real"
        entries.append(Entry(str(found), file.path, file.label, column["split"], method, video, more=more))
    card = {**card, "split": "lists of the protocol", "expected": {"listed pictures": len(listed)}}
    return complete(name, entries, {**card, "options": {"lists": str(lists)}}, skipped=skipped)


# --- Recipes ---------------------------------------------------------------------------------------------------------


def replay(*, name: str, root: str, **driver: Any) -> Prepared:
    """Prepare Replay-Attack: :func:`replay_catalogue`, then :func:`fsvfm.recipes.videos.prepare_videos`."""
    return prepare_videos(replay_catalogue(root, name=_own(name)), **driver)


def msu(*, name: str, root: str, **driver: Any) -> Prepared:
    """Prepare MSU-MFSD: :func:`msu_catalogue`, then :func:`fsvfm.recipes.videos.prepare_videos`."""
    return prepare_videos(msu_catalogue(root, name=_own(name)), **driver)


def oulu(*, name: str, root: str, **driver: Any) -> Prepared:
    """Prepare OULU-NPU: :func:`oulu_catalogue`, then :func:`fsvfm.recipes.videos.prepare_videos`."""
    return prepare_videos(oulu_catalogue(root, name=_own(name)), **driver)


def casia(*, name: str, root: str, **driver: Any) -> Prepared:
    """Prepare CASIA-FASD: :func:`casia_catalogue`, then :func:`fsvfm.recipes.videos.prepare_videos`."""
    return prepare_videos(casia_catalogue(root, name=_own(name)), **driver)


def celeb(*, name: str, root: str, images: str | None, sample: int | None, seed: int, **driver: Any) -> Prepared:
    """Prepare CelebA-Spoof: :func:`celeb_catalogue`, then :func:`fsvfm.recipes.stills.prepare_stills`."""
    return prepare_stills(celeb_catalogue(root, name=_own(name), images=images, sample=sample, seed=seed), **driver)


def wmca(*, name: str, root: str, lists: str, **driver: Any) -> Prepared:
    """Prepare WMCA: :func:`wmca_catalogue`, then :func:`fsvfm.recipes.stills.prepare_stills`."""
    return prepare_stills(wmca_catalogue(root, lists=lists, name=_own(name)), **driver)


def cefa(*, name: str, root: str, lists: str, **driver: Any) -> Prepared:
    """Prepare CeFA: :func:`cefa_catalogue`, then :func:`fsvfm.recipes.stills.prepare_stills`."""
    return prepare_stills(cefa_catalogue(root, lists=lists, name=_own(name)), **driver)


def surf(*, name: str, root: str, lists: str, **driver: Any) -> Prepared:
    """Prepare CASIA-SURF: :func:`surf_catalogue`, then :func:`fsvfm.recipes.stills.prepare_stills`."""
    return prepare_stills(surf_catalogue(root, lists=lists, name=_own(name)), **driver)


def _own(name: str) -> str:
    """The data set's own name: `msu` of `fas/msu`."""
    return PurePosixPath(name).name
