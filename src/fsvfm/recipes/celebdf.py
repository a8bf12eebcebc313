"""Celeb-DF v1, v2 and Celeb-DF++: the videos of the official test lists (03-datasets, sec. 3).

Raw layout::

    Celeb-real/id0_0000.mp4  YouTube-real/00170.mp4
    Celeb-synthesis/id0_id1_0000.mp4                          (v1, v2)
    Celeb-synthesis/<scenario>/<method>/id0_id1_0000.mp4      (++: FaceSwap, FaceReenact, TalkingFace)
    List_of_testing_videos.txt                                lines `1 YouTube-real/00170.mp4`

In the list **1 is real and 0 is fake**, the opposite of nearly everything else. The folder says the same a second time;
a list that contradicts its folders is refused, since an inverted test set looks like a very good or very bad detector.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

from fsvfm.errors import DataError
from fsvfm.recipes.engine import Catalogue, Entry, Prepared, find_folder
from fsvfm.recipes.listing import Listed, check_choice, check_frames, complete, differences, left_out, read_text
from fsvfm.recipes.videos import prepare_videos

LIST = "List_of_testing_videos.txt"
VERSIONS = ("v1", "v2", "++")

_SYNTHESIS, _YOUTUBE = "celeb-synthesis", "youtube-real"
_REAL = ("celeb-real", _YOUTUBE)
_OLD = {
    "citation": "Li et al., Celeb-DF: A Large-scale Challenging Dataset for DeepFake Forensics, CVPR 2020",
    "url": "https://github.com/yuezunli/celeb-deepfakeforensics",
}
_NEW = {
    "citation": "Li et al., Celeb-DF++: A Large-scale Challenging Video DeepFake Benchmark for Generalizable "
    "Forensics, 2025",
    "url": "https://github.com/OUC-VAS/Celeb-DF-PP",
}
_SOURCES = {"v1": _OLD, "v2": _OLD, "++": _NEW}
_LISTED = {"v2": 518}
_METHODS = {"FaceReenact": 7, "FaceSwap": 8, "TalkingFace": 7}


def celebdf_catalogue(
    root: str | Path, *, name: str = "celebdf_v2", version: str = "v2", youtube_real: bool = False, frames: int = 32
) -> Catalogue:
    """The listed test videos of a Celeb-DF version; the method of a fake is its folder below `Celeb-synthesis`.

    Args:
        root: folder with the test list.
        name: of the data set.
        version: v1, v2 or ++.
        youtube_real: take the listed videos of `YouTube-real` too. The papers' v2 numbers leave them out.
        frames: per video; 0 takes all.

    Raises:
        ConfigError: an unknown version, or no number of frames.
        DataError: no list, a line that cannot be read, a label that contradicts its folder, or no listed video.
    """
    root = find_folder(root)
    check_choice(version, VERSIONS, "recipe.version")
    check_frames(frames)
    videos = Listed(root)
    entries: list[Entry] = []
    skipped: list[tuple[str, str]] = []
    youtube: list[str] = []
    lines = _read_list(root)
    for label, listed in lines:
        path = PurePosixPath(listed)
        if path.parts[0].lower() == _YOUTUBE and not youtube_real:
            youtube.append(listed)
            videos.take(listed)
        elif (file := videos.take(listed)) is None:
            skipped.append((str(root / listed), "listed but absent"))
        else:
            method = "/".join(path.parts[1:-1]) or path.parts[0] if label else "real"
            people = "+".join(dict.fromkeys(re.findall(r"id\d+", path.stem)))
            video = path.with_suffix("").as_posix()
            entries.append(Entry(str(file), "", label, "test", method, video, people, frames))
    warnings = left_out("listed video(s) of YouTube-real", youtube, "recipe.youtube_real is false")
    if version in _LISTED:
        warnings += differences("test list", {"videos": _LISTED[version]}, {"videos": len(lines)})
    if version == "++":
        methods = {entry.method for entry in entries if entry.label}
        scenarios = Counter(method.split("/")[0] for method in methods)
        warnings += differences("methods with a listed video", _METHODS, scenarios)
    warnings += left_out("video(s)", videos.unused(), f"{LIST} does not name them")
    if skipped:
        warnings.append(f"{len(skipped)} of {len(lines)} listed videos are not there; is the download complete?")
    card: dict[str, Any] = {
        "about": f"Celeb-DF {version}, test list" + ("" if youtube_real else ", without YouTube-real"),
        "source": _SOURCES[version],
        "licence": "Terms to Use Celeb-DF: research only, after a request; do not redistribute",
        "split": f"the videos in {LIST} (there 1 is real); all others are not used",
        "options": {"version": version, "youtube_real": youtube_real, "frames": frames},
    }
    if version in _LISTED:
        card["expected"] = {"listed videos": _LISTED[version]}
    if version == "++":
        card["expected"] = {"methods": _METHODS}
    return complete(name, entries, card, skipped=skipped, warnings=warnings)


def _read_list(root: Path) -> list[tuple[int, str]]:
    """Label (0 real, 1 fake) and path of every line of the official list, which has 1 for real."""
    file = next((entry for entry in sorted(root.iterdir()) if entry.name.lower() == LIST.lower()), None)
    if file is None:
        there = ", ".join(sorted(entry.name for entry in root.iterdir())[:8]) or "nothing"
        raise DataError(
            f"no {LIST} in {root}, where there is {there}; it is part of the download and decides the test set"
        )
    rows: list[tuple[int, str]] = []
    for number, line in enumerate(read_text(file).splitlines(), 1):
        if not line.strip():
            continue
        mark, _, listed = line.strip().partition(" ")
        listed = listed.strip().replace("\\", "/")
        if mark not in ("0", "1") or "/" not in listed:
            raise DataError(f"{file}, line {number}: {line!r}; expected `0 <folder>/<video>` (fake) or `1 …` (real)")
        folder = PurePosixPath(listed).parts[0].lower()
        expected = "1" if folder in _REAL else "0" if folder == _SYNTHESIS else None
        if mark != expected:
            raise DataError(
                f"{file}, line {number}: {line!r} contradicts its folder. In the official list 1 is real (Celeb-real, "
                "YouTube-real) and 0 is fake (Celeb-synthesis); use the list as it was downloaded"
            )
        rows.append((1 - int(mark), listed))
    if not rows:
        raise DataError(f"{file} is empty; it is part of the download and decides the test set")
    return rows


def celebdf(*, name: str, root: str, version: str, youtube_real: bool, frames: int, **driver: Any) -> Prepared:
    """Prepare Celeb-DF: :func:`celebdf_catalogue`, then :func:`~fsvfm.recipes.videos.prepare_videos` with the rest."""
    found = celebdf_catalogue(root, name=name, version=version, youtube_real=youtube_real, frames=frames)
    return prepare_videos(found, **driver)
