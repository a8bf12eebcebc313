"""From a catalogue of videos to a prepared folder: decode in order, detect, crop (03-datasets, sec. 1 and 5)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsvfm.errors import ConfigError, DataError
from fsvfm.faces.detect import Box
from fsvfm.faces.track import follow
from fsvfm.faces.video import frame_indices, probe, read_frames
from fsvfm.recipes.engine import Catalogue, Entry, Item, Preparation, Prepared, Product, Skip, spread
from fsvfm.recipes.photos import FaceExtractor, entry_row
from fsvfm.recipes.stills import parse_in_batches, parses_in_batches

#: Raise when the same settings would give other images, so that older outputs are not taken for new ones.
VERSION = 1

#: Which frames of a video are taken: `spread` evenly over it, or the two of the anti-spoofing protocols.
SAMPLINGS = ("spread", "fas")

#: First frame of the anti-spoofing protocols; recordings begin with a camera that is still adjusting.
_FAS_FIRST = 6


def prepare_videos(
    catalogue: Catalogue,
    *,
    out: str | Path,
    size: int | None,
    scale: float,
    detector: str,
    parser: str | None,
    max_side: int | None = None,
    align: bool = False,
    track: bool = False,
    sampling: str = "spread",
    workers: int | None = None,
    next_step: str = "",
    **engine: Any,
) -> Prepared:
    """Prepare the videos of a catalogue: `{name}_frame_{index}.png` for every frame with a face.

    Frames without a face, and frames that a damaged file lacks, are left out and counted; a video without any face is
    skipped as a whole.

    Args:
        catalogue: what to prepare; an entry's `frames` are spread evenly over its video, first and last included.
        out: folder to write.
        size: side of the saved faces in pixels; None keeps their own (for aligned chips: 224).
        scale: side of a crop relative to the face box.
        detector: face detector.
        parser: face parser; None makes no parsing maps (only pre-training needs them).
        max_side: larger frames are shrunk for the detector; None searches them as they are, as the papers do.
        align: turn and scale the face to a fixed place of its eyes and mouth, instead of cropping a square.
        track: stay with the person of the first frame (by the overlap of the boxes); otherwise every frame's face is
            the one with the highest score, as in the papers.
        sampling: one of :data:`SAMPLINGS`; `fas` takes frames 6 and 6 + ⌊n/2⌋ of n, each replaced by the next readable
            one with a face, whatever an entry's `frames` are.
        workers: processes; None takes all cores.
        next_step: what a person would do with the result.
        engine: switches of :class:`fsvfm.recipes.engine.Preparation`.

    Raises:
        ConfigError: settings that contradict each other.
        DataError: no face at all, rows that break the manifest's schema, or `out` holds something else.
    """
    if sampling not in SAMPLINGS:
        raise ConfigError(f"recipe.sampling={sampling!r}: expected one of {', '.join(SAMPLINGS)}")
    if parser is not None and size is None and not align:
        raise ConfigError("recipe.parser needs recipe.size (224 for the published models): region grids have one size")
    settings = {
        "recipe": f"{catalogue.name}: videos, version {VERSION}",
        "options": catalogue.card.get("options", {}),
        "size": size,
        "scale": scale,
        "detector": detector,
        "parser": parser,
        "max_side": max_side,
        "align": align,
        "track": track,
        "sampling": sampling,
    }
    with Preparation(out, settings, workers=workers, **engine) as preparation:
        preparation.plan(catalogue)
        later = parser is not None and parses_in_batches(parser)
        at_once = None if later else parser
        extractor = FaceExtractor(preparation.out, size, scale, detector, at_once, max_side, align=align)
        items = [Item(entry.file, entry) for entry in catalogue.entries]
        faces = _Faces(preparation.run("videos", items, VideoFaces(extractor, track, sampling)))
        found = parse_in_batches(preparation, faces, str(parser)) if later else faces.items()
        entry_of = {item.key: item.data for item in items}
        rows = (entry_row(catalogue.name, entry_of[faces.video_of(image)], face) for image, face in found)
        return preparation.finish(rows, {"name": catalogue.name, **catalogue.card}, next_step)


class _Faces(Mapping[str, dict[str, Any]]):
    """The faces of all videos by image file, in order; a video's are read when one of them is asked for."""

    def __init__(self, videos: Mapping[str, dict[str, Any]]) -> None:
        self._videos = videos
        self._places = {
            face["image"]: (key, place) for key in videos for place, face in enumerate(videos[key]["faces"])
        }
        self._last: tuple[str, list[dict[str, Any]]] = ("", [])

    def video_of(self, image: str) -> str:
        """Key of the video that an image is from."""
        return self._places[image][0]

    def __getitem__(self, image: str) -> dict[str, Any]:
        key, place = self._places[image]
        if self._last[0] != key:
            self._last = key, self._videos[key]["faces"]
        return self._last[1][place]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


@dataclass
class VideoFaces:
    """Worker: one video of a catalogue → the faces of some of its frames.

    Attributes:
        faces: finds and writes them.
        track: follow one person through the video.
        sampling: which frames; one of :data:`SAMPLINGS`.
    """

    faces: FaceExtractor
    track: bool = False
    sampling: str = "spread"

    def __call__(self, entry: Entry) -> Product:
        """Write the faces of the entry's video under the entry's name.

        Returns:
            values `{"faces": [...]}` in the order of the frames, each as :func:`entry_row` takes them and
            with its `frame`.

        Raises:
            DataError: no video, or none of the wanted frames can be read.
        """
        info = probe(entry.file)
        wanted = _fas_frames(info.frames) if self.sampling == "fas" else _spread_frames(info.frames, entry.frames)
        place_of = {index: place for place, choices in enumerate(wanted) for index in choices}
        made: dict[int, Product] = {}
        failed: dict[int, str] = {}

        def next_index() -> Iterator[int]:
            # Drawn one by one: a choice that gave a face ends the search for this place.
            for place, choices in enumerate(wanted):
                for index in choices:
                    if place not in made:
                        yield index

        previous: Box | None = None
        troubles: list[str] = []
        for index, frame in _readable(entry.file, next_index(), troubles):
            place = place_of[index]
            found = follow(self.faces.detect(frame), previous)
            if found is None:
                failed[place] = "no face found"
                continue
            if self.track:
                previous = found.box
            try:
                product = self.faces.save_face(frame, found.box, f"{spread(entry.name)}_frame_{index}")
            except Skip as skip:
                failed[place] = str(skip)
                continue
            made[place] = Product(product.files, {**product.values, "frame": index})
        if not made and not failed:
            raise DataError(troubles[0] if troubles else f"{entry.file}: its {info.frames} frames are too few")
        missed = [
            (_text(choices), failed.get(place, "frame not readable" if choices else "video too short"))
            for place, choices in enumerate(wanted)
            if place not in made
        ]
        if info.claimed > info.frames:
            missed.append((f"{info.claimed - info.frames} of {info.claimed} frames", "missing from the file"))
        return Product(
            [file for product in made.values() for file in product.files],
            {"faces": [product.values for product in made.values()]},
            missed,
        )


def _spread_frames(frames: int, wanted: int) -> list[range]:
    """For every wanted frame the choices to try in turn: just itself."""
    return [range(index, index + 1) for index in frame_indices(frames, wanted)]


def _fas_frames(frames: int) -> list[range]:
    """The same for the anti-spoofing protocols: two frames, each followed by what may replace it."""
    second = _FAS_FIRST + frames // 2
    return [range(_FAS_FIRST, min(second, frames)), range(second, frames)]


def _readable(file: str, indices: Iterator[int], troubles: list[str]) -> Iterator[tuple[int, Any]]:
    """Frames as far as the file can be read; what stopped it is put down in `troubles`."""
    try:
        yield from read_frames(file, indices)
    except DataError as error:
        troubles.append(str(error))


def _text(choices: range) -> str:
    return f"frames {choices.start} to {choices.stop - 1}" if len(choices) > 1 else f"frame {choices.start}"
