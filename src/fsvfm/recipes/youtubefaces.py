"""YouTubeFaces: frames of 3,425 videos of 1,595 people, for pre-training (03-datasets, sec. 2).

Raw layout::

    frame_images_DB/<person>/<video>/<number>.<frame>.jpg
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fsvfm.errors import DataError
from fsvfm.recipes.engine import Catalogue, Entry, Prepared, find_files, find_folder
from fsvfm.recipes.listing import differences
from fsvfm.recipes.photos import PHOTO_SUFFIXES
from fsvfm.recipes.stills import prepare_stills

#: As published.
EXPECTED = {"people": 1595, "videos": 3425}


def youtubefaces_catalogue(root: str | Path, *, name: str = "youtubefaces") -> Catalogue:
    """Every frame of every video.

    Args:
        root: folder with `frame_images_DB`, or that folder.
        name: of the data set.

    Raises:
        DataError: no such folder, or no frame in it.
    """
    root = find_folder(root)
    folder = root if root.name.lower() == "frame_images_db" else find_folder(root, "frame_images_DB")
    folder = folder.absolute()
    entries: list[Entry] = []
    videos: set[str] = set()
    people = sorted(place.name for place in os.scandir(folder) if place.is_dir())
    for person in people:
        for file in find_files(folder / person, PHOTO_SUFFIXES):
            inner = file.relative_to(folder).with_suffix("").as_posix()
            video = inner.rpartition("/")[0]
            videos.add(video)
            number = inner.rpartition(".")[2]  # 0.555: frame 555
            more = {"frame": int(number)} if number.isdecimal() else {}
            entries.append(Entry(str(file), inner.replace("/", "_"), 0, "train", "real", video, person, more=more))
    if not entries:
        raise DataError(f"no frame below {folder}; looked for <person>/<video>/*.jpg")
    found = {"people": len(people), "videos": len(videos)}
    card = {
        "about": "YouTubeFaces, every frame",
        "source": {
            "citation": "Wolf, Hassner and Maoz, Face Recognition in Unconstrained Videos with Matched Background "
            "Similarity, CVPR 2011",
            "url": "https://www.cs.tau.ac.il/~wolf/ytfaces/",
        },
        "licence": "research only, after a request; do not redistribute",
        "split": "none is published for this use; all of it is for pre-training",
        "expected": {**EXPECTED, "frames": 621_126},
    }
    return Catalogue(name, entries, card, [], differences("YouTubeFaces", EXPECTED, found))


def youtubefaces(*, name: str, root: str, **driver: Any) -> Prepared:
    """Prepare YouTubeFaces: its catalogue, then :func:`fsvfm.recipes.stills.prepare_stills` with the rest."""
    next_step = "python -m fsvfm.train experiment=pretrain_vitb data=youtubefaces"
    return prepare_stills(youtubefaces_catalogue(root, name=name), next_step=next_step, **driver)
