"""From a catalogue of pictures to a prepared folder: detect, crop and parse every one (03-datasets, sec. 1)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fsvfm.errors import ConfigError, DataError
from fsvfm.faces import images
from fsvfm.recipes.engine import IMAGES, Catalogue, Entry, Item, Preparation, Prepared, Product, Skip, spread
from fsvfm.recipes.photos import FaceExtractor, entry_row, save_parse

#: Raise when the same settings would give other images, so that older outputs are not taken for new ones.
VERSION = 1

#: Crops that the network parser gets at once on a GPU.
BATCH = 64

#: Channel values up to this count as black border.
_BLACK = 10

_HDF5 = (".hdf5", ".h5")


def prepare_stills(
    catalogue: Catalogue,
    *,
    out: str | Path,
    size: int | None,
    scale: float,
    detector: str | None,
    parser: str | None,
    max_side: int | None,
    align: bool = False,
    trim: bool = False,
    workers: int | None = None,
    next_step: str = "",
    **engine: Any,
) -> Prepared:
    """Prepare the pictures of a catalogue.

    Args:
        catalogue: what to prepare; an entry's `more["frame"]` is the frame that a picture of a video has, and the
            place of a picture inside an HDF5 file.
        out: folder to write.
        size: side of the saved faces in pixels; None keeps their own.
        scale: side of a crop relative to the face box.
        detector: face detector; None takes the pictures as they are, since they are faces already.
        parser: face parser; None makes no parsing maps (only pre-training needs them).
        max_side: larger pictures are shrunk for the detector.
        align: turn and scale the face to a fixed place of its eyes and mouth, instead of cropping a square.
        trim: cut black borders off first.
        workers: processes; None takes all cores.
        next_step: what a person would do with the result.
        engine: switches of :class:`fsvfm.recipes.engine.Preparation`.

    Raises:
        ConfigError: settings that contradict each other.
        DataError: no face at all, rows that break the manifest's schema, or `out` holds something else.
    """
    if parser is not None and size is None:
        raise ConfigError("recipe.parser needs recipe.size (224 for the published models): region grids have one size")
    if align and (detector is None or size is None):
        raise ConfigError("recipe.align needs recipe.detector and recipe.size: it places a found face in a chip")
    settings = {
        "recipe": f"{catalogue.name}: pictures, version {VERSION}",
        "options": catalogue.card.get("options", {}),
        "size": size,
        "scale": scale,
        "detector": detector,
        "parser": parser,
        "max_side": max_side,
        "align": align,
        "trim": trim,
    }
    with Preparation(out, settings, workers=workers, **engine) as preparation:
        preparation.plan(catalogue)
        later = parser is not None and parses_in_batches(parser)
        faces = FaceExtractor(
            preparation.out,
            size,
            scale,
            detector,
            None if later else parser,
            max_side,
            keep_landmarks=False,
            align=align,
        )
        items = [Item(key, entry) for key, entry in zip(_keys(catalogue.entries), catalogue.entries, strict=True)]
        values = preparation.run("pictures", items, StillExtractor(faces, trim))
        found = parse_in_batches(preparation, values, str(parser)) if later else values.items()
        entry_of = {item.key: item.data for item in items}
        rows = (entry_row(catalogue.name, entry_of[key], face) for key, face in found)  # millions: one at a time
        return preparation.finish(rows, {"name": catalogue.name, **catalogue.card}, next_step)


def _keys(entries: Sequence[Entry]) -> Iterator[str]:
    """What the engine calls each entry: its file, with the frame where a file holds several."""
    for entry in entries:
        many = entry.file.lower().endswith(_HDF5)
        yield f"{entry.file} frame {entry.more.get('frame', 0)}" if many else entry.file


@dataclass
class StillExtractor:
    """Worker: one entry of a catalogue → its face."""

    faces: FaceExtractor
    trim: bool = False

    def __call__(self, entry: Entry) -> Product:
        """Read the entry's picture and write its face under the entry's name."""
        image = load_still(entry)
        if self.trim:
            image = trim_black(image)
        return self.faces.save_face(image, self.faces.find(image), spread(entry.name))


def load_still(entry: Entry) -> np.ndarray:
    """The picture of an entry: an image file, or a frame of an HDF5 file.

    Returns:
        (H, W, 3) uint8 RGB, upright.

    Raises:
        DataError: the file is absent, unreadable, or has no such frame.
    """
    if not entry.file.lower().endswith(_HDF5):
        return images.load_image(entry.file)
    frame = int(entry.more.get("frame", 0))
    with open_hdf5(entry.file) as file:
        group = file.get(f"Frame_{frame}")
        if group is None:
            raise DataError(f"{entry.file} has no Frame_{frame}; it has {', '.join(list(file)[:5])}")
        array = np.asarray(group["array"] if "array" in group else next(iter(group.values())))
    if array.ndim == 3 and array.shape[0] == 3:
        array = array.transpose(1, 2, 0)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise DataError(f"{entry.file}: Frame_{frame} is {array.dtype} {array.shape}; expected (3, H, W) uint8 colours")
    return np.ascontiguousarray(array)


def open_hdf5(path: str | Path) -> Any:
    """An HDF5 file opened for reading; the package for it is only needed here.

    Raises:
        DataError: the package is missing, or it is no such file.
    """
    try:
        import h5py  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError as error:
        raise DataError(f"reading {path} needs the package h5py; install it with `pip install fsvfm[wmca]`") from error
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise DataError(f"{path} is not a readable HDF5 file ({error})") from error


def trim_black(image: np.ndarray) -> np.ndarray:
    """Cut black borders off.

    Args:
        image: (H, W, 3) uint8 RGB.

    Returns:
        (h, w, 3) view of the smallest part that holds every pixel brighter than black.

    Raises:
        Skip: the whole picture is black.
    """
    bright = image.max(axis=2) > _BLACK
    rows, columns = np.flatnonzero(bright.any(axis=1)), np.flatnonzero(bright.any(axis=0))
    if len(rows) == 0:
        raise Skip("black picture")
    return image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


# --- Parsing on a GPU ------------------------------------------------------------------------------------------------


def parses_in_batches(parser: str) -> bool:
    """Whether a network does the parsing and there is a GPU for it: it wants one process with full batches."""
    if parser != "facer":
        return False
    import torch

    return torch.cuda.is_available()


def parse_in_batches(
    preparation: Preparation, values: Mapping[str, dict[str, Any]], parser: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Parse faces that are written already, as a second stage in this process.

    Args:
        preparation: the running one.
        values: of the faces, by key.
        parser: name of a parser that takes batches.

    Returns:
        (key, values) of the faces that have a parse, with its file and region grids, in order.
    """
    keys = list(values)
    chunks = [keys[start : start + BATCH] for start in range(0, len(keys), BATCH)]
    items = []
    for chunk in chunks:
        digest = hashlib.sha256("\n".join(chunk).encode()).hexdigest()[:16]  # another batch is another input
        items.append(Item(f"{len(chunk)} faces from {chunk[0]} on ({digest})", [values[key]["image"] for key in chunk]))
    workers, preparation.workers = preparation.workers, 1
    try:
        done = preparation.run("parsing", items, BatchParser(preparation.out, parser))
    finally:
        preparation.workers = workers

    def parsed() -> Iterator[tuple[str, dict[str, Any]]]:
        for chunk, item in zip(chunks, items, strict=True):
            found = done.get(item.key, {})
            for key, image in zip(chunk, item.data, strict=True):
                if image in found:
                    yield key, {**values[key], **found[image]}

    return parsed()  # the work is done by now; only reading it is left for later


@dataclass
class BatchParser:
    """Worker: names of written faces → their parsing maps. Files are read and written by threads beside the GPU."""

    out: Path
    parser: str
    _models: dict[str, Any] = field(default_factory=dict, repr=False)

    def __call__(self, names: list[str]) -> Product:
        """Parse the faces `names` (relative to the prepared folder), all of one size."""
        if not self._models:
            from fsvfm.faces.parse import make_parser

            self._models = {"parse": make_parser(self.parser), "threads": ThreadPoolExecutor(8)}
        threads = self._models["threads"]
        faces = np.stack(list(threads.map(lambda name: images.load_image(self.out / name), names)))
        parses = self._models["parse"].batch(faces)
        found = [(name, labels) for name, labels in zip(names, parses, strict=True) if labels is not None]
        values: dict[str, dict[str, Any]] = {name: {} for name, _ in found}

        def save(name: str, labels: np.ndarray) -> list[str]:
            return save_parse(self.out, name.removeprefix(f"{IMAGES}/").removesuffix(".png"), labels, values[name])

        written = threads.map(lambda each: save(*each), found)
        # The faces themselves count as this stage's images: one without a parse is missed.
        files = [file for (name, _), parse in zip(found, written, strict=True) for file in (name, *parse)]
        missed = [(name, "no face parsing") for name in names if name not in values]
        return Product(files, values, missed)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_models": {}}
