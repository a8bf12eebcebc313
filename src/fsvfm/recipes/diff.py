"""DiFF: faces made or changed by diffusion models, in four subsets (03-datasets, sec. 4).

Raw layout::

    DiFF_real/{train,val,test}/**.jpg                        real faces, on request
    {val,test}/{T2I,I2I,FS,FE}/<generator>/**.png            text-to-image, image-to-image, face swapping, face editing

The one set of real faces stands against each of the four subsets. Detectors for DiFF are trained on FaceForensics++.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fsvfm.errors import ConfigError, DataError
from fsvfm.recipes.engine import Catalogue, Entry, Prepared, find_files, find_folder
from fsvfm.recipes.listing import complete, left_out
from fsvfm.recipes.photos import PHOTO_SUFFIXES
from fsvfm.recipes.stills import prepare_stills

#: Text-to-image, image-to-image, face swapping, face editing.
SUBSETS = ("T2I", "I2I", "FS", "FE")


def diff_catalogue(root: str | Path, *, name: str = "diff", splits: Sequence[str] = ("val", "test")) -> Catalogue:
    """Real faces and the forgeries of all four subsets; a fake's method is `<subset>/<generator>`.

    Args:
        root: folder with `DiFF_real`, `val` and `test`.
        name: of the data set.
        splits: of val and test, the only ones with forgeries.

    Raises:
        ConfigError: another split, or none.
        DataError: no folder of real faces, or a split without a single forgery.
    """
    if not splits or not set(splits) <= {"val", "test"}:
        raise ConfigError(
            f"recipe.splits={list(splits)}: expected val, test or both; there are no forgeries for training"
        )
    root = find_folder(root)
    entries: list[Entry] = []
    warnings: list[str] = []
    for split in splits:
        folder = find_folder(root, "DiFF_real", split)
        faces = [
            _entry(file, folder, f"DiFF_real/{split}", 0, split, "real") for file in find_files(folder, PHOTO_SUFFIXES)
        ]
        if not faces:
            raise DataError(
                f"no picture below {folder}; the real faces of DiFF come on request, apart from the forgeries"
            )
        entries += faces
        forged = []
        for subset in SUBSETS:
            try:
                folder = find_folder(root, split, subset)
            except DataError as error:  # a subset is a download of its own
                warnings.append(f"{split} is without the subset {subset}: {error}")
                continue
            for file in find_files(folder, PHOTO_SUFFIXES):
                inner = file.relative_to(folder.absolute()).parts
                method = f"{subset}/{inner[0]}" if len(inner) > 1 else subset
                forged.append(_entry(file, folder, f"{split}/{subset}", 1, split, method))
        if not forged:
            raise DataError(f"no forgery in {root / split}; looked for {', '.join(SUBSETS)} with pictures below them")
        entries += forged
    there = {place.name for place in find_folder(root, "DiFF_real").iterdir() if place.is_dir()}
    others = sorted(name for name in there if name.lower() not in splits)
    warnings += left_out("folder(s) of DiFF_real", others, "not in recipe.splits")
    card = {
        "about": "DiFF, diffusion facial forgery",
        "source": {
            "citation": "Cheng et al., Diffusion Facial Forgery Detection, ACM MM 2024",
            "url": "https://github.com/iLearn-Lab/MM24-DiFF",
        },
        "licence": "research only; the real faces come after a request; do not redistribute",
        "split": f"official: {', '.join(splits)}; one set of real faces for all four subsets",
        "options": {"splits": list(splits)},
    }
    return complete(name, entries, card, warnings=warnings)


def _entry(file: Path, folder: Path, place: str, label: int, split: str, method: str) -> Entry:
    inner = f"{place}/{file.relative_to(folder.absolute()).as_posix()}"
    return Entry(str(file), inner, label, split, method, inner.rpartition(".")[0])


def diff(*, name: str, root: str, splits: Sequence[str], **driver: Any) -> Prepared:
    """Prepare DiFF: :func:`diff_catalogue`, then :func:`fsvfm.recipes.stills.prepare_stills` with the rest."""
    return prepare_stills(diff_catalogue(root, name=name, splits=splits), **driver)
