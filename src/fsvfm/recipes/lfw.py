"""LFW (Labeled Faces in the Wild): 13,233 photographs of 5,749 people, to be had without a request form.

Raw layout::

    lfw/<person>/<person>_0001.jpg

It is fetched with scikit-learn where no folder is given. Large enough to try pre-training, too small for a good model.
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
EXPECTED = {"people": 5749, "photographs": 13_233}

#: Names of the folder in the archives.
FOLDERS = ("lfw", "lfw_funneled", "lfw-deepfunneled")


def lfw_catalogue(root: str | Path, *, name: str = "lfw") -> Catalogue:
    """Every photograph.

    Args:
        root: folder with one sub-folder per person, or one that holds it as `lfw`.
        name: of the data set.

    Raises:
        DataError: no such folder, or no photograph in it.
    """
    root = find_folder(root)
    folder = next((root / inner for inner in FOLDERS if (root / inner).is_dir()), root).absolute()
    entries: list[Entry] = []
    people = sorted(place.name for place in os.scandir(folder) if place.is_dir() and not place.name.startswith("."))
    for person in people:
        for file in find_files(folder / person, PHOTO_SUFFIXES):
            picture = file.relative_to(folder).with_suffix("").as_posix()
            entries.append(Entry(str(file), file.stem, 0, "train", "real", picture, person))
    if not entries:
        raise DataError(f"no photograph in {folder}; looked for <person>/*.jpg. Give the folder as root=<folder>")
    card = {
        "about": "Labeled Faces in the Wild, every photograph",
        "source": {
            "citation": "Huang et al., Labeled Faces in the Wild: A Database for Studying Face Recognition in "
            "Unconstrained Environments, technical report 07-49, University of Massachusetts, Amherst, 2007",
            "url": "http://vis-www.cs.umass.edu/lfw/",
        },
        "licence": "for research; the photographs are from news agencies and belong to their owners",
        "split": "all of it is for pre-training",
        "expected": EXPECTED,
    }
    found = {"people": len(people), "photographs": len(entries)}
    return Catalogue(name, entries, card, [], differences("LFW", EXPECTED, found))


def fetch_lfw(cache: str | Path) -> Path:
    """Folder of the photographs below `cache`, fetched with scikit-learn (200 MB) if they are not there.

    Raises:
        DataError: it cannot be fetched.
    """
    from sklearn.datasets import fetch_lfw_people

    cache = Path(cache).expanduser().absolute()
    try:
        # It fetches and unpacks everything, and then loads the people with so many photographs: one.
        fetch_lfw_people(data_home=str(cache), funneled=False, min_faces_per_person=530, resize=0.1)
    except (OSError, ValueError, EOFError) as error:  # no network, or a torn download
        raise DataError(
            f"LFW cannot be fetched into {cache} ({type(error).__name__}: {error}). Without a network, unpack lfw.tgz "
            "somewhere and give the folder: root=<folder with one sub-folder per person>"
        ) from error
    return cache / "lfw_home" / "lfw"


def lfw(*, name: str, images: str | None, cache: str, **driver: Any) -> Prepared:
    """Prepare LFW, fetched into `cache` unless `images` is its folder: :func:`fsvfm.recipes.stills.prepare_stills`."""
    catalogue = lfw_catalogue(images if images is not None else fetch_lfw(cache), name=name)
    return prepare_stills(catalogue, next_step="python -m fsvfm.train experiment=demo_pretrain data=lfw", **driver)
