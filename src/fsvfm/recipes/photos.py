"""Photographs to face crops: what every recipe whose raw data are photographs needs."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fsvfm.data.manifest import GRID_PREFIX, SPLITS
from fsvfm.errors import ConfigError, DataError
from fsvfm.faces import images
from fsvfm.faces.align import SIZE, align, five_points, transform
from fsvfm.faces.crop import crop, square_crop
from fsvfm.faces.detect import Box, Detection, find_faces, make_detector
from fsvfm.faces.landmarks import Landmarks68
from fsvfm.recipes.engine import IMAGES, PARSING_MAPS, Entry, Item, Product, Skip
from fsvfm.regions import region_grid

#: Files that count as photographs.
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")

#: Patch sizes for which region grids are kept: those of the published models.
PATCH_SIZES = (16, 14)


class Photo(NamedTuple):
    """A photograph: its file, its name in the prepared folder, whom it shows, and where it is from."""

    path: Path
    name: str
    person: str
    origin: str


def find_photos(folder: str | Path) -> list[Photo]:
    """All photographs below a folder, in the order of their relative paths; hidden files and folders are left out.

    A photograph in the folder itself shows a person of its own, named by the file's stem (`ann.jpg` and `ann.png` show
    the same one). One in a sub-folder shows the person for whom that sub-folder stands, so that people with several
    photographs stay on one side of a split.

    Raises:
        DataError: no such folder, or no photograph in it.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise DataError(f"no folder {folder}; expected one with photographs")
    inner = sorted(
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.suffix.lower() in PHOTO_SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not inner:
        raise DataError(f"no photograph below {folder}; looked for {', '.join(PHOTO_SUFFIXES)}")
    names = file_names([path.as_posix() for path in inner])
    return [
        Photo(
            path=(folder / path).absolute(),
            name=name,
            person=path.parent.as_posix() if len(path.parts) > 1 else path.stem,
            origin=str((folder / path).absolute()),
        )
        for path, name in zip(inner, names, strict=True)
    ]


def file_names(relative_paths: Sequence[str]) -> list[str]:
    """Plain file names (a–z, 0–9, `_`) for relative paths, one each; where two would agree, a hash tells them apart."""

    def plain(path: str) -> str:
        stem = path[: path.rfind(".")] if "." in path.rsplit("/", 1)[-1] else path
        ascii_only = unicodedata.normalize("NFKD", stem).encode("ascii", "ignore").decode().lower()
        return re.sub(r"[^a-z0-9]+", "_", ascii_only).strip("_")[:100] or "photo"

    names = [plain(path) for path in relative_paths]
    count = Counter(names)
    return [
        f"{name}_{hashlib.sha256(path.encode()).hexdigest()[:8]}" if count[name] > 1 else name
        for name, path in zip(names, relative_paths, strict=True)
    ]


def split_people(people: Sequence[str], fractions: Mapping[str, float], at_least: Mapping[str, int]) -> dict[str, str]:
    """Give every person a split: the first people train, the next val, the last test.

    Args:
        people: in the order in which they are dealt out; repeated ones count once.
        fractions: share of train, val and test; they sum to 1, and a share of 0 leaves the split out.
        at_least: fewest people in a split, where its share is not 0.

    Returns:
        split by person.

    Raises:
        ConfigError: shares of unknown splits, or that do not sum to 1.
        DataError: too few people.
    """
    unknown = set(fractions) - set(SPLITS)
    if unknown or abs(sum(fractions.values()) - 1) > 1e-6 or min(fractions.values()) < 0:
        raise ConfigError(f"splits must be shares of {', '.join(SPLITS)} that sum to 1, got {dict(fractions)}")
    order = list(dict.fromkeys(people))
    used = [name for name in SPLITS if fractions.get(name, 0) > 0]
    sizes = {name: max(at_least.get(name, 1), round(fractions[name] * len(order))) for name in used[1:]}
    sizes[used[0]] = len(order) - sum(sizes.values())
    if sizes[used[0]] < at_least.get(used[0], 1):
        needed = sum(at_least.get(name, 1) for name in used)
        raise DataError(
            f"{len(order)} people with a usable face are too few for the splits {', '.join(used)} with separate "
            f"people; at least {needed} are needed, some dozens are sensible"
        )
    dealt = [name for name in used for _ in range(sizes[name])]
    return dict(zip(order, dealt, strict=True))


def photo_item(photo: Photo) -> Item:
    """The item of a photograph for :class:`FaceExtractor`."""
    return Item(photo.origin, {"path": str(photo.path), "name": photo.name})


@dataclass
class FaceExtractor:
    """Worker: photograph → upright RGB, best face, square crop, parsing map, region grids (03-datasets, sec. 1).

    Recipes with other inputs than photographs keep one and call :meth:`detect`, :meth:`find` and :meth:`save_face`
    themselves.

    Attributes:
        out: prepared folder.
        size: side of the saved crop in pixels; None keeps the crop's own.
        scale: side of the crop relative to the face box.
        detector: name of the face detector; None takes pictures that are face crops already, whole.
        parser: name of the face parser; None makes no parsing maps.
        max_side: photographs with a longer side are shrunk to this for the detector only (the crop keeps its pixels):
            the detector's memory grows with the picture, beyond 1 GB for a telephone's.
        align: save chips with eyes, nose and mouth at fixed places (:mod:`fsvfm.faces.align`), of side `size` (224 if
            None), instead of square crops; `scale` means nothing then.
        keep_landmarks: write down the 68 landmarks, from which forgeries are made.
    """

    out: Path
    size: int | None
    scale: float = 1.3
    detector: str | None = "dlib_hog"
    parser: str | None = "landmarks"
    max_side: int | None = 1280
    align: bool = False
    keep_landmarks: bool = True
    _models: dict[str, Any] = field(default_factory=dict, repr=False)

    def __call__(self, data: dict[str, Any]) -> Product:
        """Make crop and parsing map of `data["path"]` under the name `data["name"]`."""
        image = images.load_image(data["path"])
        return self.save_face(image, self.find(image), data["name"])

    def find(self, image: np.ndarray) -> Box | None:
        """Box of the best face in (H, W, 3) uint8 RGB; None, for the whole picture, without a detector.

        Raises:
            Skip: no face found.
        """
        if self.detector is None:
            return None
        found = self.detect(image)
        if not found:
            raise Skip("no face found")
        return found[0].box

    def detect(self, image: np.ndarray) -> list[Detection]:
        """All faces in (H, W, 3) uint8 RGB, best first; beyond `max_side` they are searched in a smaller copy."""
        return find_faces(self._model("detect"), image, self.max_side)

    def save_face(self, image: np.ndarray, box: Box | None, name: str) -> Product:
        """Write the face of a picture: crop, parsing map and grids.

        Args:
            image: (H, W, 3) uint8 RGB.
            box: of the face; None takes the picture as it is.
            name: of the files, without suffix.

        Returns:
            the files, and values for :func:`face_row`.

        Raises:
            Skip: the parser found no face in the crop.
        """
        values: dict[str, Any] = {"image": f"{IMAGES}/{name}.png"}
        points: np.ndarray | None = None
        if box is not None:
            values["box"] = [int(value) for value in box]
            if self.align or self.keep_landmarks or self.parser == "landmarks":
                points = self._model("landmarks")(image, box)
        if box is None:
            face = images.resize(image, self.size) if self.size else image
        elif self.align and points is not None:
            face, matrix = align(image, five_points(points), self.size or SIZE)
            points = transform(points, matrix)
        else:
            x, y, side = square_crop(box, image.shape[1], image.shape[0], self.scale)
            size = self.size or side
            face = images.resize(crop(image, x, y, side), size)
            if points is not None:
                # Pixel centres: the crop's first pixel reaches from -0.5 to 0.5.
                points = (points - np.array([x, y]) + 0.5) * (size / side) - 0.5
        if points is not None and self.keep_landmarks:
            values["landmarks"] = [round(float(value), 2) for value in points.ravel()]
        files = [values["image"]]
        if self.parser is not None:
            labels = self._model("parse")(face, None if points is None else points.astype(np.float32))
            if labels is None:
                raise Skip("no face parsing")
            files += save_parse(self.out, name, labels, values)
        images.save_png(self.out / files[0], face)
        return Product(files, values)

    def _model(self, what: str) -> Any:
        """Detector, landmark predictor or parser, loaded when it is first wanted."""
        if what not in self._models:
            if what == "detect":
                self._models[what] = make_detector(str(self.detector))
            elif what == "landmarks":
                self._models[what] = Landmarks68()
            else:
                from fsvfm.faces.parse import make_parser  # may bring torch; not needed without a parser

                self._models[what] = make_parser(str(self.parser))
        return self._models[what]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_models": {}}


def save_parse(out: Path, name: str, labels: np.ndarray, values: dict[str, Any]) -> list[str]:
    """Write a parsing map (H, W), and put its file and its region grids into `values`; returns the files."""
    values["parse"] = f"{PARSING_MAPS}/{name}.png"
    images.save_labels(out / values["parse"], labels)
    for patch in PATCH_SIZES:
        if labels.shape[0] % patch == 0 and labels.shape[1] % patch == 0:
            values[f"{GRID_PREFIX}{patch}"] = region_grid(labels, patch).tobytes().hex()
    return [values["parse"]]


def entry_row(dataset: str, entry: Entry, values: dict[str, Any]) -> dict[str, Any]:
    """The manifest row of a face: what its catalogue entry says, and what :class:`FaceExtractor` made of it.

    `values` of a video's face hold its `frame`; a picture is frame 0 unless the entry knows better.
    """
    return {
        "label": entry.label,
        "split": entry.split,
        "dataset": dataset,
        "method": entry.method,
        "video": entry.video,
        "subject": entry.subject,
        "frame": values.get("frame", 0),
        "origin": entry.file,
        **entry.more,
        **face_row(values),
    }


def face_row(values: dict[str, Any]) -> dict[str, Any]:
    """The columns of a manifest row that come from :class:`FaceExtractor`: path, parse, region grids, landmarks."""
    row: dict[str, Any] = {"path": values["image"]}
    if "landmarks" in values:
        row["landmarks"] = np.array(values["landmarks"], np.float32)
    if "parse" in values:
        row["parse"] = values["parse"]
    for name, text in values.items():
        if name.startswith(GRID_PREFIX):
            row[name] = np.frombuffer(bytes.fromhex(text), np.uint8)
    return row
