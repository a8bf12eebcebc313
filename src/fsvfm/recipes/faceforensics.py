"""FaceForensics++ and DeepFakeDetection (DFD), which is distributed with it (03-datasets, sec. 2 and 3).

Raw layout, as the official download script makes it::

    original_sequences/youtube/{raw,c23,c40}/videos/000.mp4
    original_sequences/actors/{raw,c23,c40}/videos/01__exit_phone_room.mp4                        (DFD)
    manipulated_sequences/<method>/{raw,c23,c40}/videos/000_003.mp4
    manipulated_sequences/DeepFakeDetection/{raw,c23,c40}/videos/01_02__exit_phone_room__YVGY8LOK.mp4

FaceForensics++ has 1,000 source videos. A forged one is named `<target>_<source>`; the official splits are lists of id
pairs (`ffpp_splits.json`), both ids and both orders of which belong to the split.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from fsvfm.errors import ConfigError
from fsvfm.faces.video import VIDEO_SUFFIXES
from fsvfm.recipes.engine import Catalogue, Entry, Prepared, find_files, find_folder
from fsvfm.recipes.listing import check_choice, check_frames, complete, differences, left_out
from fsvfm.recipes.videos import prepare_videos

COMPRESSIONS = ("raw", "c23", "c40")

#: The four manipulations of the papers' protocols, as the official folders spell them.
METHODS = ("Deepfakes", "Face2Face", "FaceSwap", "NeuralTextures")

#: Frames per real and per forged video: balanced over all four manipulations together, or within each of them.
MODES: Mapping[str, Mapping[str, int]] = {"all": {"real": 128, "fake": 32}, "each": {"real": 32, "fake": 32}}

#: Videos of each manipulation, and source videos, in the official splits.
EXPECTED = {"train": 720, "val": 140, "test": 140}

_SPELLING = {name.lower(): name for name in (*METHODS, "FaceShifter")}
_SOURCE = {
    "citation": "Rössler et al., FaceForensics++: Learning to Detect Manipulated Facial Images, ICCV 2019",
    "url": "https://github.com/ondyari/FaceForensics",
}
_DFD_SOURCE = {
    "citation": "Dufour and Gully, Contributing Data to Deepfake Detection Research, Google AI 2019; "
    "distributed with FaceForensics++",
    "url": "https://github.com/ondyari/FaceForensics",
}
_LICENCE = "FaceForensics Terms of Use: non-commercial research, after a request; do not redistribute videos or faces"


def official_splits() -> dict[str, str]:
    """Split (train, val, test) of each of the 1,000 video ids."""
    pairs = json.loads((files("fsvfm.recipes") / "ffpp_splits.json").read_text(encoding="utf-8"))
    return {identity: split for split, listed in pairs.items() for pair in listed for identity in pair}


def ffpp_catalogue(
    root: str | Path,
    *,
    name: str = "ffpp_c23",
    compression: str = "c23",
    mode: str = "all",
    methods: Sequence[str] | None = None,
    frames: Mapping[str, int] | None = None,
) -> Catalogue:
    """Real and forged videos of FaceForensics++ in the official splits.

    Args:
        root: folder with `original_sequences` and `manipulated_sequences`.
        name: of the data set.
        compression: raw, c23 (light) or c40 (strong).
        mode: `all`, 128 frames of a real and 32 of a forged video; `each`, 32 of both.
        methods: manipulations; None takes :data:`METHODS`.
        frames: `real` and `fake` frames per video in place of the mode's; 0 takes all.

    Raises:
        ConfigError: an unknown compression or mode, or frames that are no numbers.
        DataError: a folder that is not there, or no video in it.
    """
    root = Path(root).expanduser()
    check_choice(compression, COMPRESSIONS, "recipe.compression")
    wanted = {**MODES[check_choice(mode, tuple(MODES), "recipe.mode")], **(frames or {})}
    if set(wanted) != {"real", "fake"}:
        raise ConfigError(f"recipe.frames={dict(frames or {})}: expected numbers for real and fake")
    number = {label: check_frames(wanted[kind], f"recipe.frames.{kind}") for label, kind in enumerate(("real", "fake"))}
    chosen = [_SPELLING.get(method.lower(), method) for method in (METHODS if methods is None else methods)]
    if not chosen or len(set(chosen)) != len(chosen):
        raise ConfigError(f"recipe.methods={list(methods or [])}: expected different manipulations, at least one")
    folders = {"real": find_folder(root, "original_sequences", "youtube", compression, "videos")}
    for method in chosen:
        folders[method] = find_folder(root, "manipulated_sequences", method, compression, "videos")
    entries: list[Entry] = []
    skipped: list[tuple[str, str]] = []
    warnings: list[str] = []
    for method, folder in folders.items():
        label = int(method != "real")
        found, unusable = _official(folder, label, method, number[label])
        entries += found
        skipped += unusable
        warnings += differences(f"{method} {compression}", EXPECTED, Counter(entry.split for entry in found))
    used = {folders[method].parents[1].name for method in chosen}
    there = {place.name for place in folders[chosen[0]].parents[2].iterdir() if place.is_dir()}
    warnings += left_out("manipulation(s)", sorted(there - used), "not in recipe.methods")
    card = {
        "about": f"FaceForensics++, compression {compression}, {', '.join(chosen)}",
        "source": _SOURCE,
        "licence": _LICENCE,
        "split": "official: train, val, test by the id in the first three characters of a file's name",
        "expected": {"videos": EXPECTED, "of": "the source videos and each manipulation"},
        "options": {"compression": compression, "mode": mode, "methods": chosen, "frames": wanted},
    }
    return complete(name, entries, card, skipped=skipped, warnings=warnings)


def ffpp_pretrain_catalogue(
    root: str | Path, *, name: str = "ffpp_pretrain", compression: str = "c23", frames: int = 128
) -> Catalogue:
    """The real videos of the training and validation splits, for pre-training.

    Args:
        root: folder with `original_sequences`.
        name: of the data set.
        compression: raw, c23 or c40.
        frames: per video; 0 takes all.

    Raises:
        ConfigError: an unknown compression, or no number of frames.
        DataError: a folder that is not there, or no video in it.
    """
    check_choice(compression, COMPRESSIONS, "recipe.compression")
    folder = find_folder(root, "original_sequences", "youtube", compression, "videos")
    found, skipped = _official(folder, 0, "real", check_frames(frames))
    entries = [entry for entry in found if entry.split != "test"]
    tested = [entry.video for entry in found if entry.split == "test"]
    expected = {split: number for split, number in EXPECTED.items() if split != "test"}
    warnings = differences(f"source videos {compression}", expected, Counter(entry.split for entry in entries))
    warnings += left_out("video(s)", tested, "detectors are tested on them")
    card = {
        "about": f"real videos of FaceForensics++ {compression}, training and validation splits",
        "source": _SOURCE,
        "licence": _LICENCE,
        "split": "official; the test videos are left out, detectors are tested on them",
        "expected": {"videos": expected},
        "options": {"compression": compression, "frames": frames},
    }
    return complete(name, entries, card, skipped=skipped, warnings=warnings)


def dfd_catalogue(root: str | Path, *, name: str = "dfd", compression: str = "raw", frames: int = 32) -> Catalogue:
    """DeepFakeDetection: actors' videos and forgeries of them, all of it a test set.

    Args:
        root: folder with `original_sequences` and `manipulated_sequences`.
        name: of the data set.
        compression: raw, c23 or c40.
        frames: per video; 0 takes all.

    Raises:
        ConfigError: an unknown compression, or no number of frames.
        DataError: a folder that is not there, or no video in it.
    """
    check_choice(compression, COMPRESSIONS, "recipe.compression")
    check_frames(frames)
    places = (
        (0, "real", "actors", find_folder(root, "original_sequences", "actors", compression, "videos")),
        (
            1,
            "DeepFakeDetection",
            "DeepFakeDetection",
            find_folder(root, "manipulated_sequences", "DeepFakeDetection", compression, "videos"),
        ),
    )
    entries = [
        Entry(str(file), "", label, "test", method, f"{place}/{file.stem}", _actors(file.stem), frames)
        for label, method, place, folder in places
        for file in find_files(folder, VIDEO_SUFFIXES, recursive=False)
    ]
    card = {
        "about": f"DeepFakeDetection, compression {compression}",
        "source": _DFD_SOURCE,
        "licence": _LICENCE,
        "split": "none is published; all of it is a test set",
        "options": {"compression": compression, "frames": frames},
    }
    return complete(name, entries, card)


def _official(folder: Path, label: int, method: str, frames: int) -> tuple[list[Entry], list[tuple[str, str]]]:
    """Videos of a folder that belong to an official split, and the others with the reason."""
    splits = official_splits()
    place = method if label else "youtube"
    entries, skipped = [], []
    for file in find_files(folder, VIDEO_SUFFIXES, recursive=False):
        people = re.findall(r"\d{3}", file.stem) if re.fullmatch(r"\d{3}(_\d{3})?", file.stem) else [file.stem[:3]]
        found = {splits.get(person) for person in people}
        if None in found:
            skipped.append((str(file), "not in the official splits"))
        elif len(found) > 1:
            skipped.append((str(file), "its two ids belong to different splits"))
        else:
            split = splits[people[0]]
            entries.append(Entry(str(file), "", label, split, method, f"{place}/{file.stem}", "+".join(people), frames))
    return entries, skipped


def _actors(stem: str) -> str:
    """Who is in a DFD video: `01__scene` shows actor 01, `01_02__scene__CODE` the face of 02 on 01."""
    people = re.match(r"(\d+)(?:_(\d+))?__", stem)
    return "+".join(filter(None, people.groups())) if people else ""


def ffpp(
    *,
    name: str,
    root: str,
    compression: str,
    mode: str,
    methods: Sequence[str] | None,
    frames: Mapping[str, int] | None,
    **driver: Any,
) -> Prepared:
    """Prepare FaceForensics++: :func:`ffpp_catalogue`, then :func:`~fsvfm.recipes.videos.prepare_videos`."""
    found = ffpp_catalogue(root, name=name, compression=compression, mode=mode, methods=methods, frames=frames)
    return prepare_videos(found, **driver)


def ffpp_pretrain(*, name: str, root: str, compression: str, frames: int, **driver: Any) -> Prepared:
    """Prepare its real videos: :func:`ffpp_pretrain_catalogue`, then :func:`~fsvfm.recipes.videos.prepare_videos`."""
    return prepare_videos(ffpp_pretrain_catalogue(root, name=name, compression=compression, frames=frames), **driver)


def dfd(*, name: str, root: str, compression: str, frames: int, **driver: Any) -> Prepared:
    """Prepare DFD: :func:`dfd_catalogue`, then :func:`~fsvfm.recipes.videos.prepare_videos` with the rest."""
    return prepare_videos(dfd_catalogue(root, name=name, compression=compression, frames=frames), **driver)
