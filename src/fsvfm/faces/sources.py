"""What is to be scored: one photograph or video, a folder, a pattern, a list or a camera, as a stream of inputs.

Nothing is held in memory but the names of one block of a folder, so that a folder of a million files can be scored.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from fsvfm.errors import DataError
from fsvfm.faces.video import VIDEO_SUFFIXES

#: Files that count as photographs.
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")

#: A camera of this machine: ``webcam:0``.
WEBCAM = "webcam:"

#: Files that name other inputs, one per line.
LIST_SUFFIX = ".txt"

#: A folder is listed in alphabetical order if it has at most so many entries, a larger one block by block.
BLOCK = 10_000

_ANY = ", ".join((*PHOTO_SUFFIXES, *VIDEO_SUFFIXES))


class Input(NamedTuple):
    """One thing to score.

    Attributes:
        source: the file's path as the user would write it, or ``webcam:<number>``.
        kind: ``photo``, ``video`` or ``webcam``.
        error: why it cannot be read, where that is known already.
    """

    source: str
    kind: str
    error: str | None = None


def inputs(what: str | Path | Sequence[str | Path]) -> Iterator[Input]:
    """Everything that a source stands for, in a stable order.

    A file is taken whatever its name. Of folders and patterns files with the suffix of a photograph or video are
    taken; hidden files and folders are left out, and every real folder is visited once, whatever links lead to it.

    Args:
        what: a photograph or video; a folder, searched with its sub-folders; a pattern such as ``shots/**/*.png``; a
            text file (``.txt``) with a file or folder per line, relative to the list, empty lines and those that
            begin with ``#`` left out; ``webcam:0``; or several of these.

    Yields:
        inputs; one with an ``error`` for what an entry of a list, or a sub-folder, cannot give.

    Raises:
        DataError: nothing is there: no such file, a folder or pattern without a photograph or video, an empty list.
    """
    if isinstance(what, str | Path):
        yield from _some(what, _one(str(what)))
        return
    for each in what:
        try:
            yield from _some(each, _one(str(each)))
        except DataError as error:
            yield Input(str(each), "photo", str(error))


def count(what: str | Path | Sequence[str | Path]) -> int:
    """How many inputs there are, found by listing them.

    Raises:
        DataError: as :func:`inputs`.
    """
    return sum(1 for _ in inputs(what))


def kind_of(path: str | Path) -> str:
    """Whether a source is a ``photo``, a ``video`` or a ``webcam``: by its suffix, else by what the file holds."""
    text = str(path)
    if text.startswith(WEBCAM):
        return "webcam"
    suffix = Path(text).suffix.lower()
    if suffix in VIDEO_SUFFIXES:
        return "video"
    if suffix in PHOTO_SUFFIXES or not Path(text).is_file():
        return "photo"
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(text):
            return "photo"
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError):
        return "video"


def readable(source: str) -> str:
    r"""A file's name as text that any file format and terminal takes: bytes that are no UTF-8 become ``\xff``."""
    return source.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _some(what: str | Path, found: Iterator[Input]) -> Iterator[Input]:
    """The same, or an error if there is nothing."""
    first = next(found, None)
    if first is None:
        raise DataError(f"{readable(str(what))} holds no photograph and no video; looked for {_ANY}")
    yield first
    yield from found


def _one(text: str) -> Iterator[Input]:
    path = Path(text).expanduser()
    if text.startswith(WEBCAM):
        number = text.removeprefix(WEBCAM)
        if not number.isdecimal():
            raise DataError(f"{text}: expected webcam:<number>, such as webcam:0 for the first camera")
        yield Input(text, "webcam")
    elif path.is_dir():
        yield from _walk(path, depth=None)
    elif path.suffix.lower() == LIST_SUFFIX and path.is_file():
        yield from _list(path)
    elif path.exists():
        yield Input(str(path), kind_of(path))
    elif any(sign in text for sign in "*?["):
        yield from _matching(path)
    else:
        raise DataError(
            f"{readable(text)} does not exist; expected a photograph, a video, a folder, a pattern such as "
            "'shots/*.jpg', a list (.txt) or webcam:0"
        )


def _list(path: Path) -> Iterator[Input]:
    # Names of files are bytes: what is no UTF-8 must still name the file.
    with path.open(encoding="utf-8", errors="surrogateescape") as lines:
        for number, line in enumerate(lines):
            entry = (line.removeprefix("\ufeff") if number == 0 else line).rstrip("\r\n")
            if not entry.strip() or entry.startswith("#"):
                continue
            file = path.parent / Path(entry).expanduser()
            if file.is_dir():
                found = False
                for each in _walk(file, depth=None):
                    found = True
                    yield each
                if not found:
                    yield Input(str(file), "photo", f"{readable(str(file))} holds no photograph and no video")
            elif entry.startswith(WEBCAM):
                yield Input(entry, "webcam")
            else:
                yield Input(str(file), kind_of(file))


def _walk(folder: Path, depth: int | None) -> Iterator[Input]:
    """Media files below a folder, at most `depth` folders deep; files of a folder come before its sub-folders."""
    seen: set[tuple[int, int]] = set()
    waiting = [(folder, 0)]
    while waiting:
        here, level = waiting.pop()
        inner: list[tuple[Path, int]] = []
        try:
            status = here.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(here) as entries:
                while block := sorted(islice(entries, BLOCK), key=lambda entry: entry.name):
                    for entry in block:
                        if entry.name.startswith("."):
                            continue
                        file = here / entry.name
                        if _is_folder(entry):
                            if depth is None or level < depth:
                                inner.append((file, level + 1))
                        elif file.suffix.lower() in PHOTO_SUFFIXES:
                            yield Input(str(file), "photo")
                        elif file.suffix.lower() in VIDEO_SUFFIXES:
                            yield Input(str(file), "video")
        except OSError as error:
            yield Input(str(here), "photo", f"the folder {readable(str(here))} cannot be listed ({error.strerror})")
        waiting += reversed(inner)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _matching(pattern: Path) -> Iterator[Input]:
    """Files that match a pattern; ``**`` stands for any number of folders."""
    parts = pattern.parts
    fixed = next(place for place, part in enumerate(parts) if any(sign in part for sign in "*?["))
    root, rest = Path(*parts[:fixed]), parts[fixed:]
    if not root.is_dir():
        raise DataError(f"{readable(str(pattern))} matches nothing: there is no folder {readable(str(root))}")
    depth = None if "**" in rest else len(rest) - 1
    for found in _walk(root, depth):
        if found.error or _matches(Path(found.source).relative_to(root).parts, rest):
            yield found


def _matches(parts: Sequence[str], patterns: Sequence[str]) -> bool:
    if not patterns:
        return not parts
    if patterns[0] == "**":
        return any(_matches(parts[skipped:], patterns[1:]) for skipped in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], patterns[0]) and _matches(parts[1:], patterns[1:])
