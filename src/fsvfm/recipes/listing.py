"""What catalogues share: finding listed files whatever their case and suffix, and saying what does not add up.

A catalogue (:class:`fsvfm.recipes.engine.Catalogue`) is made without opening a single picture or video, so that a
wrong folder, a torn list or a missing part of a download shows in seconds and not after hours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from fsvfm.errors import ConfigError, DataError
from fsvfm.faces.video import VIDEO_SUFFIXES
from fsvfm.recipes.engine import Catalogue, Entry, find_files
from fsvfm.recipes.photos import file_names

_SHOWN = 3


class Listed:
    """The files below a folder, to be taken out by the names that a list gives them.

    Distributions differ in upper and lower case and in suffixes (`.mp4`, `.avi`), so neither has to agree.

    Args:
        root: folder that the list's paths start from.
        suffixes: of the files that count.
    """

    def __init__(self, root: Path, suffixes: Iterable[str] = VIDEO_SUFFIXES) -> None:
        self.root = root.absolute()
        self._files = {self._key(file.relative_to(self.root)): file for file in find_files(root, suffixes)}
        self._used: set[str] = set()

    def take(self, listed: str) -> Path | None:
        """The file of a listed path relative to the root, or None where there is none."""
        key = self._key(PurePosixPath(listed))
        self._used.add(key)
        return self._files.get(key)

    def unused(self) -> list[str]:
        """Files that no list asked for, relative to the root."""
        return [file.relative_to(self.root).as_posix() for key, file in self._files.items() if key not in self._used]

    @staticmethod
    def _key(path: PurePath) -> str:
        return path.with_suffix("").as_posix().lower()


def complete(
    name: str,
    entries: Sequence[Entry],
    card: Mapping[str, Any],
    *,
    skipped: Sequence[tuple[str, str]] = (),
    warnings: Sequence[str] = (),
) -> Catalogue:
    """The catalogue, its entries named after their videos (an image set's `video` is the picture's own id).

    Args:
        name: of the data set.
        entries: with an empty `name`; those of one video (a folder of pictures) are named after their files.
        card: what is to be said of the data set.
        skipped: (file, reason) of what was found and cannot be used.
        warnings: sentences for the person who runs it.

    Raises:
        DataError: there is no entry, or two files claim to be one video.
    """
    if not entries:
        reasons = "; ".join(f"{file}: {reason}" for file, reason in skipped[:_SHOWN])
        raise DataError(f"{name}: nothing to prepare in the raw folder" + (f" ({reasons}, …)" if reasons else ""))
    names = file_names([entry.name or f"{entry.video}.x" for entry in entries])
    named = [entry._replace(name=plain) for entry, plain in zip(entries, names, strict=True)]
    first: dict[str, str] = {}
    for entry in named:
        if entry.name in first:
            raise DataError(
                f"{name}: {first[entry.name]} and {entry.file} would both be {entry.video}; remove or rename one"
            )
        first[entry.name] = entry.file
    return Catalogue(name, named, dict(card), list(skipped), list(warnings))


def differences(what: str, expected: Mapping[str, int], found: Mapping[str, int]) -> list[str]:
    """A warning that names every count that is not the published one, or nothing where all are."""
    wrong = {key: number for key, number in expected.items() if found.get(key, 0) != number}
    if not wrong:
        return []
    listed = ", ".join(f"{key} {found.get(key, 0)} (published: {number})" for key, number in wrong.items())
    return [f"{what}: {listed}; is the download complete?"]


def left_out(what: str, files: Sequence[str], why: str) -> list[str]:
    """A sentence about files that were found and are not used, or nothing where there are none."""
    if not files:
        return []
    shown = ", ".join(files[:_SHOWN]) + (", …" if len(files) > _SHOWN else "")
    return [f"{len(files)} {what} left out, {why}: {shown}"]


def read_text(file: Path) -> str:
    """A list or table that came with a data set.

    Raises:
        DataError: it cannot be read as UTF-8 text.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} is not readable text: {error}") from error


def check_frames(frames: int, key: str = "recipe.frames") -> int:
    """A number of frames per video, 0 for all.

    Raises:
        ConfigError: not a whole number from 0.
    """
    if not isinstance(frames, int) or isinstance(frames, bool) or frames < 0:
        raise ConfigError(f"{key}={frames!r}: expected the number of frames per video, 0 for all of them")
    return frames


def check_choice(value: str, choices: Sequence[str], key: str) -> str:
    """One of the choices.

    Raises:
        ConfigError: something else.
    """
    if value not in choices:
        raise ConfigError(f"{key}={value!r}: expected one of {', '.join(choices)}")
    return value
