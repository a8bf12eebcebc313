"""VGGFace2, the papers' pre-training set: photographs of 9,131 people (03-datasets, sec. 2).

Raw layout::

    {train,test}/n000002/0001_01.jpg
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

from fsvfm.errors import DataError
from fsvfm.recipes.engine import Catalogue, Entry, Prepared, find_files, find_folder
from fsvfm.recipes.listing import differences
from fsvfm.recipes.photos import PHOTO_SUFFIXES
from fsvfm.recipes.stills import prepare_stills

#: People in each folder, and all photographs, as published.
PEOPLE = {"train": 8631, "test": 500}


def vggface2_catalogue(root: str | Path, *, name: str = "vggface2") -> Catalogue:
    """Every photograph of both folders. A picture is named by its path, `train_n000002_0001_01`.

    Args:
        root: folder with `train` and `test`, or one of them.
        name: of the data set.

    Raises:
        DataError: neither folder is there, or no photograph in them.
    """
    root = find_folder(root)
    entries: list[Entry] = []
    people: Counter[str] = Counter()
    for split in ("train", "test"):
        try:
            folder = find_folder(root, split)
        except DataError:
            if split == "test" and not entries:
                raise
            continue
        for person in sorted(place.name for place in os.scandir(folder) if place.is_dir()):
            people[split] += 1
            # Folder by folder: three million paths at once would take gigabytes.
            for file in find_files(folder / person, PHOTO_SUFFIXES):
                inner = file.relative_to(folder.absolute()).with_suffix("").as_posix().replace("/", "_")
                picture = f"{split}_{inner}"
                entries.append(Entry(str(file), picture, 0, split, "real", picture, person))
    if not entries:
        raise DataError(f"no photograph below {root}; looked for train/<identity>/*.jpg and test/<identity>/*.jpg")
    card = {
        "about": "VGGFace2, every photograph of both parts",
        "source": {
            "citation": "Cao et al., VGGFace2: A Dataset for Recognising Faces across Pose and Age, FG 2018",
            "url": "https://www.robots.ox.ac.uk/~vgg/data/vgg_face2/",
        },
        "licence": "research only; its authors no longer distribute it, the photographs belong to their owners",
        "split": "official folders; pre-training takes both",
        "expected": {"people": PEOPLE, "photographs": 3_311_286},
    }
    return Catalogue(name, entries, card, [], differences("people in VGGFace2", PEOPLE, people))


def vggface2(*, name: str, root: str, **driver: Any) -> Prepared:
    """Prepare VGGFace2: :func:`vggface2_catalogue`, then :func:`fsvfm.recipes.stills.prepare_stills` with the rest."""
    catalogue = vggface2_catalogue(root, name=name)
    return prepare_stills(catalogue, next_step="python -m fsvfm.train experiment=pretrain_vitb", **driver)
