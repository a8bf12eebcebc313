"""A user's own photographs: one sub-folder per class, optionally below train, val and test folders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fsvfm.data.manifest import SPLITS, class_of_folder
from fsvfm.errors import DataError
from fsvfm.recipes.engine import Catalogue, Entry, Preparation, Prepared
from fsvfm.recipes.photos import FaceExtractor, Photo, face_row, find_photos, photo_item, split_people

#: Raise when the same settings would give other images, so that older outputs are not taken for new ones.
VERSION = 1


def prepare(
    *,
    name: str,
    images: str,
    size: int | None,
    scale: float,
    detector: str,
    parser: str | None,
    max_side: int | None,
    classes: Mapping[str, int] | None,
    splits: Mapping[str, float],
    cache: str,
    out: str,
    workers: int | None = None,
    **engine: Any,
) -> Prepared:
    """Prepare photographs in class folders: `<images>/[train|val|test/]<class>/**`.

    `real*` and `fake*` folders are recognised, any other needs `classes`. A fake's method is its class folder's name.
    A sub-folder below the class is one person (and one video); without it every photograph is its own.

    Args:
        name: of the data set in the manifest.
        images: the folder.
        size: side of the saved crops; None keeps their own (as the papers do for downstream tasks).
        scale: side of a crop relative to the face box.
        detector: face detector.
        parser: face parser; None makes no parsing maps (only pre-training needs them).
        max_side: larger photographs are shrunk for the detector.
        classes: 0 (real) or 1 (fake) by class folder.
        splits: shares of the people in train, val and test, where the folder has no such sub-folders.
        cache: not used; there is nothing to download.
        out: folder to write.
        workers: processes; None takes all cores.
        engine: switches of :class:`fsvfm.recipes.engine.Preparation`.

    Raises:
        ConfigError: unusable `splits`.
        DataError: no such folder, a class without a known label, no face at all, or a person in two splits.
    """
    root = Path(images).expanduser().absolute()
    settings = {
        "recipe": f"folder, version {VERSION}",
        "name": name,
        "images": str(root),
        "size": size,
        "scale": scale,
        "detector": detector,
        "parser": parser,
        "max_side": max_side,
        "classes": dict(classes or {}),
        "splits": dict(splits),
    }
    photos = find_photos(root)
    parts = [_Place(photo, root, classes) for photo in photos]  # before anything is written: it may refuse
    card = {"name": name, "about": "photographs of a folder", "source": {"folder": str(root)}}
    with Preparation(out, settings, workers=workers, **engine) as preparation:
        entries = [part.entry() for part in parts]
        preparation.plan(Catalogue(name, entries, card))
        extractor = FaceExtractor(preparation.out, size, scale, detector, parser, max_side)
        values = preparation.run("photographs", [photo_item(photo) for photo in photos], extractor)
        written = [part for part in parts if part.origin in values]
        split_of: dict[str, str] = {}
        if written and written[0].split is None:
            split_of = split_people([part.subject for part in written], splits, {})
        rows: list[dict[str, Any]] = [
            {
                "label": part.label,
                "split": part.split or split_of[part.subject],
                "dataset": name,
                "method": part.method,
                "video": part.video,
                "subject": part.subject,
                "frame": 0,
                "origin": part.origin,
                **face_row(values[part.origin]),
            }
            for part in written
        ]
        return preparation.finish(rows, card)


class _Place:
    """What a photograph's place in the folder says about it."""

    def __init__(self, photo: Photo, root: Path, classes: Mapping[str, int] | None) -> None:
        inner = photo.path.relative_to(root).parts
        has_split = any((root / name).is_dir() for name in SPLITS)
        self.split = inner[0] if has_split else None
        below = inner[1:] if has_split else inner
        if (has_split and inner[0] not in SPLITS) or len(below) < 2:
            raise DataError(
                f"{photo.path} lies in no class folder; expected {root}/<class>/... or {root}/<train|val|test>/<class>/"
                "..., with class names such as real and fake"
            )
        self.folder = below[0]
        label = class_of_folder(self.folder, classes)
        if label is None:
            raise DataError(
                f"is the folder {self.folder} in {root} real or fake? Names that start with 'real' or 'fake' are "
                f"recognised; say so for others with recipe.classes={{{self.folder}: 0}} (real) or 1 (fake)"
            )
        self.label = label
        self.method = "real" if label == 0 else self.folder
        self.name = photo.name
        self.subject = "/".join(below[1:-1]) or photo.path.stem
        self.video = f"{self.folder}/{self.subject}"
        self.origin = photo.origin

    def entry(self) -> Entry:
        """For the plan; the split may be empty, since people get theirs when it is known who has a face."""
        return Entry(self.origin, self.name, self.label, self.split or "", self.method, self.video, self.subject)
