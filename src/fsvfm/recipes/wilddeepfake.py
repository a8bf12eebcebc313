"""WildDeepfake: face sequences from the internet, already cropped by its authors (03-datasets, sec. 3).

Raw layout, after unpacking the archives where they lie::

    {real,fake}_{train,test}/<archive>/{real,fake}/<sequence>/<frame>.png

A sequence takes the place of a video. Its pictures are face crops already and are taken as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fsvfm.errors import ConfigError, DataError
from fsvfm.recipes.engine import Catalogue, Entry, Prepared, find_files, find_folder
from fsvfm.recipes.listing import complete
from fsvfm.recipes.photos import PHOTO_SUFFIXES
from fsvfm.recipes.stills import prepare_stills

_CLASSES = ("real", "fake")
_SPLITS = ("train", "test")


def wdf_catalogue(root: str | Path, *, name: str = "wdf", splits: Sequence[str] = ("test",)) -> Catalogue:
    """The face sequences of one or both splits.

    Args:
        root: folder with `real_test`, `fake_test` and so on.
        name: of the data set.
        splits: train, test; the papers test on it only.

    Raises:
        ConfigError: another split, or none.
        DataError: a folder that is not there, or no picture in it.
    """
    if not splits or not set(splits) <= set(_SPLITS):
        raise ConfigError(f"recipe.splits={list(splits)}: expected some of {', '.join(_SPLITS)}")
    entries: list[Entry] = []
    skipped: list[tuple[str, str]] = []
    for split in splits:
        for label, kind in enumerate(_CLASSES):
            folder = find_folder(root, f"{kind}_{split}|{kind} {split}|{kind}-{split}").absolute()
            pictures = find_files(folder, PHOTO_SUFFIXES)
            if not pictures:
                raise DataError(_nothing(folder))
            for file in pictures:
                inner = file.relative_to(folder).parent.as_posix()
                said = {part.lower() for part in inner.split("/")} & set(_CLASSES)
                if said - {kind}:
                    skipped.append((str(file), "its folders say both real and fake"))
                    continue
                video = f"{kind}_{split}/{inner}"
                entries.append(
                    Entry(
                        str(file),
                        f"{video}/{file.name}",
                        label,
                        split,
                        "WildDeepfake" if label else "real",
                        video,
                        more={"frame": int(file.stem)} if file.stem.isdecimal() else {},
                    )
                )
    card = {
        "about": "WildDeepfake, face crops as distributed",
        "source": {
            "citation": "Zi et al., WildDeepfake: A Challenging Real-World Dataset for Deepfake Detection, ACM MM 2020",
            "url": "https://github.com/OpenTAI/wild-deepfake",
        },
        "licence": "agreement form of WildDeepfake: research only; do not redistribute",
        "split": f"official: {', '.join(splits)}; a folder of pictures is a video",
        "options": {"splits": list(splits)},
    }
    return complete(name, entries, card, skipped=skipped)


def _nothing(folder: Path) -> str:
    archives = find_files(folder, (".tar.gz", ".tgz", ".zip"))
    if archives:
        return (
            f"{folder} holds {len(archives)} archive(s) and no picture; unpack them where they lie, then run this again"
        )
    return f"no picture below {folder}; looked for <archive>/<real or fake>/<sequence>/*.png"


def wdf(*, name: str, root: str, splits: Sequence[str], **driver: Any) -> Prepared:
    """Prepare WildDeepfake: :func:`wdf_catalogue`, then :func:`fsvfm.recipes.stills.prepare_stills` with the rest."""
    return prepare_stills(wdf_catalogue(root, name=name, splits=splits), **driver)
