"""Deepfake Detection Challenge: the test set of the full data set (DFDC) and of the preview (03-datasets, sec. 3).

Raw layouts::

    DFDC/test/labels.csv (filename,label; 1 = fake)       DFDC/test/ori_videos/**/<filename>
    DFDC-preview/dataset.json ({path: {set, label, …}})   DFDC-preview/{original_videos,method_A,method_B}/**.mp4
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

from fsvfm.errors import DataError
from fsvfm.faces.video import VIDEO_SUFFIXES
from fsvfm.recipes.engine import Catalogue, Entry, Prepared, find_files, find_folder
from fsvfm.recipes.listing import Listed, check_frames, complete, differences, left_out, read_text
from fsvfm.recipes.videos import prepare_videos

#: Videos in the test set of the full data set.
EXPECTED = 5000

_SOURCE = {
    "citation": "Dolhansky et al., The DeepFake Detection Challenge (DFDC) Dataset, arXiv 2006.07397, 2020",
    "url": "https://ai.meta.com/datasets/dfdc/",
}
_PREVIEW_SOURCE = {
    "citation": "Dolhansky et al., The Deepfake Detection Challenge (DFDC) Preview Dataset, arXiv 1910.08854, 2019",
    "url": "https://ai.meta.com/datasets/dfdc/",
}
_LICENCE = "DFDC terms: accepted when it is requested; do not redistribute videos or faces"


def dfdc_catalogue(root: str | Path, *, name: str = "dfdc", frames: int = 32) -> Catalogue:
    """The labelled test videos; their forgeries are of several unnamed kinds, all called `DFDC`.

    Args:
        root: folder with `labels.csv` in it or below it; the videos lie below that file's folder.
        name: of the data set.
        frames: per video; 0 takes all.

    Raises:
        ConfigError: no number of frames.
        DataError: no `labels.csv` or several, a row that cannot be read, or no listed video.
    """
    check_frames(frames)
    table = _only_file(find_folder(root), "labels.csv")
    files: dict[str, list[Path]] = {}
    for file in find_files(table.parent, VIDEO_SUFFIXES):
        files.setdefault(file.name.lower(), []).append(file)
    entries: list[Entry] = []
    skipped: list[tuple[str, str]] = []
    labels = _read_labels(table)
    for filename, label in labels.items():
        found = files.pop(filename.lower(), [])
        if len(found) != 1:
            reason = "in several folders" if found else "listed but absent"
            skipped.append((str(found[0] if found else table.parent / filename), reason))
            continue
        method = "DFDC" if label else "real"
        entries.append(Entry(str(found[0]), "", label, "test", method, PurePosixPath(filename).stem, "", frames))
    warnings = differences("labels.csv", {"videos": EXPECTED}, {"videos": len(labels)})
    warnings += _account(skipped, len(labels))
    unused = [file.relative_to(table.parent).as_posix() for found in files.values() for file in found]
    warnings += left_out("video(s)", unused, "labels.csv does not name them")
    card = {
        "about": "Deepfake Detection Challenge, test set",
        "source": _SOURCE,
        "licence": _LICENCE,
        "split": "the videos in test/labels.csv (1 is fake)",
        "expected": {"listed videos": EXPECTED},
        "options": {"frames": frames},
    }
    return complete(name, entries, card, skipped=skipped, warnings=warnings)


def dfdcp_catalogue(root: str | Path, *, name: str = "dfdcp", frames: int = 32) -> Catalogue:
    """The test videos of the preview; the method of a fake is `method_A` or `method_B`.

    Args:
        root: folder with `dataset.json` in it or below it.
        name: of the data set.
        frames: per video; 0 takes all.

    Raises:
        ConfigError: no number of frames.
        DataError: no `dataset.json` or several, an entry that cannot be read, or no test video.
    """
    check_frames(frames)
    table = _only_file(find_folder(root), "dataset.json")
    videos = Listed(table.parent)
    entries: list[Entry] = []
    skipped: list[tuple[str, str]] = []
    others: Counter[str] = Counter()
    for listed, facts in _read_dataset(table).items():
        path = PurePosixPath(listed)
        file = videos.take(listed)
        if facts["set"] != "test":
            others[facts["set"]] += 1
        elif file is None:
            skipped.append((str(table.parent / listed), "listed but absent"))
        else:
            label = int(facts["label"] == "fake")
            people = "+".join(dict.fromkeys(str(facts[key]) for key in ("target_id", "swapped_id") if facts.get(key)))
            method, video = (path.parts[0] if label else "real"), path.with_suffix("").as_posix()
            entries.append(Entry(str(file), "", label, "test", method, video, people, frames))
    warnings = [f"{number} video(s) of the set {kind!r} left out" for kind, number in sorted(others.items())]
    warnings += _account(skipped, len(entries) + len(skipped))
    warnings += left_out("video(s)", videos.unused(), "dataset.json does not name them")
    card = {
        "about": "Deepfake Detection Challenge, preview, test set",
        "source": _PREVIEW_SOURCE,
        "licence": _LICENCE,
        "split": "the videos with set = test in dataset.json",
        "options": {"frames": frames},
    }
    return complete(name, entries, card, skipped=skipped, warnings=warnings)


def _only_file(root: Path, name: str) -> Path:
    found = [file for file in find_files(root, (Path(name).suffix,)) if file.name.lower() == name]
    if len(found) == 1:
        return found[0]
    if not found:
        raise DataError(f"no {name} in {root} or below; it is part of the download and decides the labels")
    raise DataError(f"several {name} below {root}: {', '.join(map(str, found[:3]))}; give the folder of one as root=…")


def _read_labels(table: Path) -> dict[str, int]:
    """Label (1 fake) by file name."""
    rows = list(csv.DictReader(read_text(table).splitlines()))
    if not rows or not {"filename", "label"} <= set(rows[0]):
        raise DataError(
            f"{table} has no rows with the columns filename and label; is it the labels.csv of the test set?"
        )
    labels: dict[str, int] = {}
    for number, row in enumerate(rows, 2):
        if not row["filename"] or row["label"] not in ("0", "1") or row["filename"] in labels:
            raise DataError(f"{table}, line {number}: {row}; expected each filename once, with label 0 or 1 (fake)")
        labels[row["filename"]] = int(row["label"])
    return labels


def _read_dataset(table: Path) -> dict[str, dict[str, Any]]:
    """Facts (at least `set` and `label`, in lower case) by path."""
    text = read_text(table)
    try:
        listed = json.loads(text)
    except ValueError as error:
        raise DataError(f"{table} is not readable JSON: {error}") from error
    facts: dict[str, dict[str, Any]] = {}
    for path, value in listed.items() if isinstance(listed, dict) else ():
        said = {key: str(value.get(key) or "").lower() for key in ("set", "label")} if isinstance(value, dict) else {}
        if said.get("label") not in ("real", "fake") or not said["set"]:
            raise DataError(f"{table}, {path!r}: {value!r}; expected a set and the label real or fake")
        facts[path] = {**value, **said}
    if not facts:
        raise DataError(f"{table} lists no videos; expected {{path: {{set, label, …}}}}")
    return facts


def _account(skipped: list[tuple[str, str]], listed: int) -> list[str]:
    if not skipped:
        return []
    return [f"{len(skipped)} of {listed} listed videos cannot be used; is the download complete?"]


def dfdc(*, name: str, root: str, frames: int, **driver: Any) -> Prepared:
    """Prepare DFDC: :func:`dfdc_catalogue`, then :func:`~fsvfm.recipes.videos.prepare_videos` with the rest."""
    return prepare_videos(dfdc_catalogue(root, name=name, frames=frames), **driver)


def dfdcp(*, name: str, root: str, frames: int, **driver: Any) -> Prepared:
    """Prepare the preview: :func:`dfdcp_catalogue`, then :func:`~fsvfm.recipes.videos.prepare_videos` with the rest."""
    return prepare_videos(dfdcp_catalogue(root, name=name, frames=frames), **driver)
