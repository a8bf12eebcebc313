"""Folders in published layouts, read as they are: no manifest is written into them, none is needed.

Four layouts are known (:data:`LAYOUTS`): pre-training faces with parsing maps, class folders, the face anti-spoofing
bundles, and FaceForensics++ frames with masks. :meth:`fsvfm.data.manifest.Manifest.read` asks here where a folder holds
no manifest.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pandas as pd

from fsvfm.data.manifest import SPLITS, Manifest, class_of_folder
from fsvfm.errors import DataError

#: Suffixes of ready face images.
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

#: A file name that says video and frame: `000_003_frame_12`, `1_HR_1_frame0`.
_FRAME = re.compile(r"(?P<video>.+?)_frame_?(?P<frame>\d{1,9})")

#: Anti-spoofing sets whose file names end in a frame number without a word: `3_272_1_1_1_09`.
NUMBERED = ("wmca", "cefa", "surf")
_NUMBERED = re.compile(r"(?P<video>.+)_(?P<frame>\d{1,9})")

_SHOWN = 5


class Layout(NamedTuple):
    """A published layout: its name, what it looks like, whether a folder has it, and how it is read."""

    name: str
    looks: str
    matches: Callable[[Path], bool]
    read: Callable[[Path], Manifest]


def known(folder: str | Path) -> bool:
    """Whether a folder has a published layout; a quick look, the files are not counted."""
    return Path(folder).is_dir() and any(layout.matches(Path(folder)) for layout in LAYOUTS)


def read(folder: str | Path) -> Manifest:
    """Rows of a folder in a published layout.

    Raises:
        DataError: none of the layouts or several at once, a preparation that was not finished, or broken contents.
    """
    folder = Path(folder)
    if (folder / ".prepare").is_dir():
        raise DataError(f"no manifest at {folder}: its preparation was not finished; run the same command again")
    found = [layout for layout in LAYOUTS if layout.matches(folder)]
    if len(found) == 1:
        return found[0].read(folder)
    looks = "\n".join(f"  - {layout.name}: {layout.looks}" for layout in LAYOUTS)
    if found:
        names = " and ".join(layout.name for layout in found)
        raise DataError(f"{folder} looks like {names} at once; keep only one of these in the folder:\n{looks}")
    raise DataError(
        f"no manifest at {folder}; expected a folder that `python -m fsvfm.prepare recipe=...` made, a .parquet or "
        f".csv file, or a folder in one of the published layouts:\n{looks}"
    )


# --- Faces with parsing maps -----------------------------------------------------------------------------------------


def _has_parsing_maps(folder: Path) -> bool:
    maps = folder / "parsing_maps"
    return (folder / "images").is_dir() and maps.is_dir() and any(name.endswith(".npy") for name in _names(maps))


def _read_faces(folder: Path) -> Manifest:
    """`images/<stem>.png` with `parsing_maps/<stem>.npy`: real faces for pre-training, all of them in `train`."""
    images = sorted(name for name in _names(folder / "images") if name.lower().endswith(IMAGE_SUFFIXES))
    maps = {name[:-4] for name in _names(folder / "parsing_maps") if name.endswith(".npy")}
    stems = [name[: name.rfind(".")] for name in images]
    kept = [place for place, stem in enumerate(stems) if stem in maps]
    if not kept:
        raise DataError(f"no image in {folder}/images has a parsing map of the same name in {folder}/parsing_maps")
    if len(kept) < len(images):
        left_out = len(images) - len(kept)
        warnings.warn(
            f"{folder}: {left_out} of {len(images)} images have no parsing map and are left out", stacklevel=3
        )
    names = [_FRAME.fullmatch(stems[place]) for place in kept]
    rows = {
        "path": [f"images/{images[place]}" for place in kept],
        "label": 0,
        "split": "train",
        "dataset": folder.name,
        "method": "real",
        "video": [name["video"] if name else stems[place] for place, name in zip(kept, names, strict=True)],
        "subject": "",
        "frame": [int(name["frame"]) if name else 0 for name in names],
        "parse": [f"parsing_maps/{stems[place]}.npy" for place in kept],
    }
    return Manifest(pd.DataFrame(rows), folder)


# --- Class folders ---------------------------------------------------------------------------------------------------


def _has_class_folders(folder: Path) -> bool:
    places = [folder, *(folder / split for split in SPLITS)]
    return any(class_of_folder(name) is not None for place in places for name in _folders(place))


def from_folder(
    root: str | Path,
    *,
    split: str = "test",
    dataset: str | None = None,
    classes: Mapping[str, int] | None = None,
    suffixes: Iterable[str] = IMAGE_SUFFIXES,
) -> Manifest:
    """Manifest of ready face images in one sub-folder per class, taken as they are (03-datasets, sec. 6).

    The class folders lie in `root`, or in `train`, `val` and `test` below it. `real*` and `fake*` folders are
    recognised, others need `classes={"folder": 0 or 1}`. Where a file name says video and frame
    (`<video>_frame_<index>`), a sub-folder of a fake class is the method. Otherwise the last sub-folder is the person
    or video, one above it the method, and a file without sub-folder stands for itself. A fake without such a
    sub-folder has its class folder's name as method.

    Args:
        root: the folder.
        split: of all rows, where there are no `train`, `val` and `test` folders.
        dataset: name of the data set; by default the folder's.
        classes: label by folder name.
        suffixes: of the files that count as images.

    Raises:
        DataError: no such folder, a class folder without a known label, no image, or a video in two splits.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise DataError(f"no folder {root}; expected one sub-folder per class, such as {root}/real and {root}/fake")
    allowed = tuple(suffix.lower() for suffix in suffixes)
    splits = [name for name in SPLITS if (root / name).is_dir()]
    rows: list[dict[str, Any]] = []
    for part in splits or [""]:
        for folder in _folders(root / part):
            label = class_of_folder(folder, classes)
            if label is None:
                raise DataError(
                    f"is the folder {root / part / folder} real or fake? Only names that start with 'real' or 'fake' "
                    f"are recognised; say so with classes={{{folder}: 0}} (real) or 1 (fake)"
                )
            for file in _files(root / part / folder, allowed):
                rows.append(
                    {
                        "path": (PurePosixPath(part) / folder / file).as_posix(),
                        "label": label,
                        "split": part or split,
                        "dataset": dataset or root.name,
                        **_place(PurePosixPath(file), folder, label, part),
                    }
                )
    if not rows:
        raise DataError(f"no image below {root}; looked for {', '.join(sorted(allowed))} in one sub-folder per class")
    return Manifest(pd.DataFrame(rows), root)


def _place(file: PurePosixPath, folder: str, label: int, split: str) -> dict[str, Any]:
    """What the place of a file below its class folder says: method, video, subject, frame."""
    above = file.parent.parts
    name = _FRAME.fullmatch(file.stem)
    method, subject = folder, ""
    if name:
        method = above[0] if above else folder
        video = "/".join([folder, *above, name["video"]])
    elif above:
        method = above[0] if len(above) > 1 else folder
        subject = "/".join(above)
        video = f"{folder}/{subject}"
    else:
        # A bare name such as 1.png says nothing beyond its own folder: the same in two splits is no leak.
        subject = file.stem if not split else ""
        video = "/".join([*([split] if split else []), folder, file.stem])
    frame = int(name["frame"]) if name else 0
    return {"method": method if label else "real", "video": video, "subject": subject, "frame": frame}


# --- Face anti-spoofing bundles --------------------------------------------------------------------------------------


class Listed(NamedTuple):
    """A file of an anti-spoofing protocol: path relative to `frame/`, label, and which lists name it."""

    path: str
    label: int
    lists: frozenset[str]


_LIST = re.compile(r"(?P<set>\w+)_(?P<label>real|fake)_(?P<kind>train|test|shot)\.txt", re.IGNORECASE)


def _has_bundle(folder: Path) -> bool:
    lists = folder / "txt"
    return (folder / "frame").is_dir() and lists.is_dir() and any(map(_LIST.fullmatch, _names(lists)))


def read_lists(folder: str | Path, datasets: Sequence[str] | None = None) -> dict[str, list[Listed]]:
    """The lists `{set}_{real,fake}_{train,test,shot}.txt` of an anti-spoofing protocol, by data set.

    Args:
        folder: with the lists.
        datasets: sets to read; by default all of them.

    Raises:
        DataError: no list of a set, or a file listed as real and as fake.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise DataError(f"no folder {folder}; expected one with lists such as msu_real_train.txt")
    names: dict[str, dict[str, tuple[int, set[str]]]] = {name: {} for name in datasets or ()}
    for file in sorted(folder.iterdir()):
        match = _LIST.fullmatch(file.name)
        if match is None or (datasets is not None and match["set"].lower() not in names):
            continue
        label, kind = int(match["label"].lower() == "fake"), match["kind"].lower()
        listed = names.setdefault(match["set"].lower(), {})
        for line in file.read_text(encoding="utf-8-sig").splitlines():
            path = line.strip().replace("\\", "/").removeprefix("./")
            if not path:
                continue
            was, kinds = listed.setdefault(path, (label, set()))
            if was != label:
                raise DataError(f"the lists in {folder} name {path} both as real and as fake; the last one is {file}")
            kinds.add(kind)
    missing = sorted(name for name, listed in names.items() if not listed)
    if missing or not names:
        raise DataError(
            f"{folder} has no list of {', '.join(missing) or 'any data set'}; "
            "expected files such as msu_real_train.txt, msu_fake_test.txt, msu_real_shot.txt"
        )
    return {
        name: [Listed(path, label, frozenset(kinds)) for path, (label, kinds) in listed.items()]
        for name, listed in names.items()
    }


def protocol_columns(listed: Sequence[Listed], videos: Sequence[str], name: str) -> list[dict[str, Any]]:
    """Columns `split`, `shot` and `source` of listed files.

    A published training list may name files of the test list too: there a data set is trained on as a source or tested
    on as a target, never both. A row has one split, so such rows are `test` with `source` 1, and a video stays in one
    split.

    Args:
        listed: the files of one data set.
        videos: their video ids.
        name: of the data set, for messages.

    Returns:
        for every file `split`; `source`, 1 where a training list names it; `shot`, 1 where a shot list and a training
        list name it, 2 where only a shot list does, 0 elsewhere.
    """
    tested = {video for file, video in zip(listed, videos, strict=True) if "test" in file.lists}
    columns: list[dict[str, Any]] = []
    leaking: list[str] = []
    for file, video in zip(listed, videos, strict=True):
        source = int("train" in file.lists)
        shot = 0 if "shot" not in file.lists else 1 if source else 2
        if shot and video in tested:
            leaking.append(file.path)
            shot = 0
        columns.append({"split": "test" if video in tested else "train", "shot": shot, "source": source})
    if leaking:
        warnings.warn(
            f"{name}: {len(leaking)} file(s) of the shot lists belong to videos of the test lists and are not used as "
            f"shots: {', '.join(leaking[:_SHOWN])}",
            stacklevel=3,
        )
    return columns


def frame_of(path: str) -> tuple[str, int]:
    """(video, frame) of an anti-spoofing file: `msu/test/real/a_frame1.png` is frame 1 of `msu/test/real/a`."""
    stem = path[: path.rfind(".")]
    match = _FRAME.fullmatch(stem) or (_NUMBERED.fullmatch(stem) if path.split("/")[0] in NUMBERED else None)
    return (match["video"], int(match["frame"])) if match else (stem, 0)


def _read_bundle(folder: Path) -> Manifest:
    """`frame/<set>/…` with `txt/<set>_{real,fake}_{train,test,shot}.txt`: the protocol's rows, as its lists say.

    A test list names the first of two frames (`_frame0`); the second is tested too, where it is there. Data sets of
    which there is no folder at all are left out.
    """
    rows: list[dict[str, Any]] = []
    absent: list[str] = []
    total = 0
    for name, listed in read_lists(folder / "txt").items():
        if not (folder / "frame" / name).is_dir():
            continue
        there = {f"{name}/{file}" for file in _files(folder / "frame" / name, IMAGE_SUFFIXES)}
        known = {file.path for file in listed}
        for file in list(listed):
            sibling = re.sub(r"_frame0(?=\.\w+$)", "_frame1", file.path)
            if "test" in file.lists and sibling not in known and sibling in there:
                listed.append(Listed(sibling, file.label, frozenset({"test"})))
        total += len(listed)
        absent += [file.path for file in listed if file.path not in there]
        frames = [frame_of(file.path) for file in listed]
        protocol = protocol_columns(listed, [video for video, _ in frames], name)
        for file, (video, frame), columns in zip(listed, frames, protocol, strict=True):
            rows.append(
                {
                    "path": f"frame/{file.path}",
                    "label": file.label,
                    "dataset": name,
                    "method": "attack" if file.label else "real",
                    "video": video,
                    "subject": "",
                    "frame": frame,
                    **columns,
                }
            )
    if absent:
        raise DataError(
            f"the lists in {folder}/txt name {total} files, of which {len(absent)} are not below {folder}/frame, the "
            f"first: {', '.join(sorted(absent)[:_SHOWN])}. Is the download complete?"
        )
    if not rows:
        raise DataError(f"{folder}/frame has no folder of a data set that the lists in {folder}/txt name")
    return Manifest(pd.DataFrame(rows), folder)


# --- FaceForensics++ frames with masks (SLADD) ------------------------------------------------------------------------

#: Folders of the four manipulations, and what they are called elsewhere.
_MANIPULATIONS = {"FF-DF": "Deepfakes", "FF-F2F": "Face2Face", "FF-FS": "FaceSwap", "FF-NT": "NeuralTextures"}
_CONFIGS = {"train": "train", "val": "eval", "test": "test"}


def _has_frames_with_masks(folder: Path) -> bool:
    image = folder / "image"
    return (image / "real").is_dir() and any((image / name).is_dir() for name in _MANIPULATIONS)


def _read_frames_with_masks(folder: Path) -> Manifest:
    """`image/real/<id>/<frame>.png`, `image/FF-*/<id>_<id>/<frame>.png`, `mask/…`, `config/{train,eval,test}.json`.

    A config is a list of pairs of ids: both videos, and the forgeries in both directions, belong to its split. A mask
    (`<frame>.png` or `<frame>_mask.png`) is the file of the column `mask`; it is empty where there is none.
    """
    split_of: dict[str, str] = {}
    for split, name in _CONFIGS.items():
        file = folder / "config" / f"{name}.json"
        if not file.is_file():
            continue
        try:
            pairs = [(str(first), str(second)) for first, second in json.loads(file.read_text(encoding="utf-8"))]
        except (ValueError, TypeError) as error:
            raise DataError(
                f'{file} must hold a list of pairs of video ids, such as [["000", "003"]]: {error}'
            ) from None
        split_of |= {clip: split for one, two in pairs for clip in (one, two, f"{one}_{two}", f"{two}_{one}")}
    if not split_of:
        raise DataError(f"{folder}/config has none of train.json, eval.json and test.json, which say the splits")
    rows: list[dict[str, Any]] = []
    unlisted = 0
    for name, method in {"real": "real", **_MANIPULATIONS}.items():
        masks = set(_files(folder / "mask" / name, IMAGE_SUFFIXES))
        for image in map(PurePosixPath, _files(folder / "image" / name, IMAGE_SUFFIXES)):
            clip, frame = image.parent.as_posix(), re.search(r"\d{1,9}", image.stem)
            if clip not in split_of:
                unlisted += 1
                continue
            mask = next((m for m in (str(image), f"{image.with_suffix('')}_mask.png") if m in masks), None)
            rows.append(
                {
                    "path": f"image/{name}/{image}",
                    "label": int(method != "real"),
                    "split": split_of[clip],
                    "dataset": folder.name,
                    "method": method,
                    "video": clip if method == "real" else f"{method}/{clip}",
                    "subject": clip.replace("_", "+"),
                    "frame": int(frame[0]) if frame else 0,
                    "mask": f"mask/{name}/{mask}" if mask else "",
                }
            )
    if unlisted:
        warnings.warn(f"{folder}: {unlisted} frames of videos that no config names are left out", stacklevel=3)
    if not rows:
        raise DataError(f"{folder}/image has no frame of a video that {folder}/config names")
    return Manifest(pd.DataFrame(rows), folder)


# --- Files -----------------------------------------------------------------------------------------------------------


def _names(place: Path) -> Iterator[str]:
    """Names of what lies in a folder, in no order; hidden ones are left out."""
    with os.scandir(place) as entries:
        yield from (entry.name for entry in entries if not entry.name.startswith("."))


def _folders(place: Path) -> list[str]:
    """Names of the sub-folders, sorted, without hidden ones; empty where there is no such place."""
    if not place.is_dir():
        return []
    return sorted(entry.name for entry in place.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _files(place: Path, suffixes: tuple[str, ...]) -> list[str]:
    """Files below a folder, relative to it, sorted; hidden ones are left out."""
    found: list[str] = []
    for folder, folders, names in os.walk(place, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inner = Path(folder).relative_to(place).as_posix()
        prefix = "" if inner == "." else f"{inner}/"
        found += [prefix + name for name in names if name.lower().endswith(suffixes) and not name.startswith(".")]
    return sorted(found)


LAYOUTS = (
    Layout(
        "faces with parsing maps",
        "images/<name>.png and parsing_maps/<name>.npy",
        _has_parsing_maps,
        _read_faces,
    ),
    Layout(
        "class folders",
        "real*/ and fake*/ with images, in the folder itself or in train/, val/ and test/",
        _has_class_folders,
        from_folder,
    ),
    Layout(
        "anti-spoofing bundle",
        "frame/<set>/... and txt/<set>_{real,fake}_{train,test,shot}.txt",
        _has_bundle,
        _read_bundle,
    ),
    Layout(
        "FaceForensics++ frames with masks",
        "image/{real,FF-DF,FF-F2F,FF-FS,FF-NT}/<video>/<frame>.png, mask/FF-*/... and config/{train,eval,test}.json",
        _has_frames_with_masks,
        _read_frames_with_masks,
    ),
)
