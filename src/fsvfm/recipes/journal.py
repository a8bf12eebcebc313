"""What a preparation has finished: one line of JSON per item, in one file for each process that writes.

Only an index stays in memory, some 200 bytes per item; what a worker said about an item is read from the file when it
is asked for. Several machines may write side by side, each its own file; all read all of them.
"""

from __future__ import annotations

import json
import os
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

#: Names of journals in the folder that holds them.
PATTERN = "journal*.jsonl"


class Journal:
    """Records by stage and key. A record is a dictionary with `stage`, `key`, and either

    - `files` (list of names), `values` (a dictionary), `images` (a number) and `missed` (list of [piece, reason]), or
    - `skipped` (the reason), `detail` and `missed`.

    Args:
        folder: that holds the journals.
        name: file that this process writes; None only reads.
        keep: whether a record that an earlier run wrote counts; it is asked once, when the record is read.
    """

    def __init__(
        self, folder: Path, name: str | None, keep: Callable[[dict[str, Any]], bool] = lambda record: True
    ) -> None:
        self.folder, self.name = folder, name
        self._rows: dict[str, dict[str, int]] = {}
        # By row: which journal, where in it, when, and the little that accounts are made of.
        self._journal, self._offset, self._time = array("H"), array("Q"), array("d")
        self._skipped, self._missed, self._images = array("b"), array("I"), array("I")
        self._names: list[str] = []
        self._ends: list[int] = []
        self._open: dict[str, IO[bytes]] = {}
        self._own: IO[bytes] | None = None
        if name is not None:
            _cut_torn_line(folder / name)
        self.refresh(keep)
        if name is not None:
            self._own = (folder / name).open("ab")
            if name not in self._names:
                self._names.append(name)
                self._ends.append(0)

    def refresh(self, keep: Callable[[dict[str, Any]], bool] = lambda record: True) -> None:
        """Read what was added since the last time; of two records of one item the later counts."""
        for path in sorted(self.folder.glob(PATTERN)):
            if path.name not in self._names:
                self._names.append(path.name)
                self._ends.append(0)
            place = self._names.index(path.name)
            if path.name == self.name and self._own is not None:
                continue  # known as it was written
            with path.open("rb") as file:
                file.seek(self._ends[place])
                for line in file:
                    if not line.endswith(b"\n"):
                        break  # being written, or cut off by a kill: its item is simply done again
                    offset = self._ends[place]
                    self._ends[place] += len(line)
                    try:
                        record = json.loads(line)
                        if keep(record):
                            self._note(record, place, offset)
                        else:  # nor does what an older line says about it
                            self._rows.get(record["stage"], {}).pop(record["key"], None)
                    except (ValueError, KeyError, TypeError):
                        continue

    def add(self, record: dict[str, Any]) -> None:
        """Append a record; it is safe from the death of this process when this returns."""
        if self._own is None or self.name is None:
            raise RuntimeError("this journal is only read")
        record = {**record, "time": round(time.time(), 3)}
        line = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        place = self._names.index(self.name)
        offset = self._ends[place]
        self._own.write(line)
        self._own.flush()
        self._ends[place] += len(line)
        self._note(record, place, offset)

    def sync(self) -> None:
        """Have everything on the disk, where other machines can read it."""
        if self._own is not None:
            os.fsync(self._own.fileno())

    def has(self, stage: str, key: str) -> bool:
        """Whether the item is finished: written or skipped."""
        return key in self._rows.get(stage, {})

    def skipped(self, stage: str, key: str) -> bool:
        """Whether the finished item was skipped."""
        return bool(self._skipped[self._rows[stage][key]])

    def missed(self, stage: str, key: str) -> int:
        """How many pieces of the finished item yielded nothing."""
        return self._missed[self._rows[stage][key]]

    def images(self, stage: str, key: str) -> int:
        """How many images were made of the finished item."""
        return self._images[self._rows[stage][key]]

    def record(self, stage: str, key: str) -> dict[str, Any]:
        """The whole record of a finished item, read from its file."""
        row = self._rows[stage][key]
        name = self._names[self._journal[row]]
        if name not in self._open:
            self._open[name] = (self.folder / name).open("rb")
        file = self._open[name]
        if file.tell() != self._offset[row]:  # seeking would throw away what was read ahead
            file.seek(self._offset[row])
        found: dict[str, Any] = json.loads(file.readline())
        return found

    def close(self) -> None:
        """Close the files; records may still be read."""
        for file in (*self._open.values(), *([self._own] if self._own else [])):
            file.close()
        self._open, self._own = {}, None

    def _note(self, record: dict[str, Any], place: int, offset: int) -> None:
        skipped, missed = "skipped" in record, record.get("missed", ())
        images = record.get("images", 0)
        when = float(record.get("time", 0.0))
        rows = self._rows.setdefault(record["stage"], {})
        row = rows.get(record["key"])
        if row is None:
            rows[record["key"]] = len(self._offset)
            self._journal.append(place)
            self._offset.append(offset)
            self._time.append(when)
            self._skipped.append(skipped)
            self._missed.append(len(missed))
            self._images.append(images)
        elif when >= self._time[row]:
            self._journal[row], self._offset[row], self._time[row] = place, offset, when
            self._skipped[row], self._missed[row], self._images[row] = skipped, len(missed), images


class Results(Mapping[str, dict[str, Any]]):
    """Values of the items that were written, by key and in the items' order, read from the journal one by one."""

    def __init__(self, journal: Journal, stage: str, keys: Sequence[str]) -> None:
        self._journal, self._stage, self._keys = journal, stage, dict.fromkeys(keys)

    def __getitem__(self, key: str) -> dict[str, Any]:
        if key not in self._keys:
            raise KeyError(key)
        values: dict[str, Any] = self._journal.record(self._stage, key)["values"]
        return values

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def _cut_torn_line(path: Path) -> None:
    """Remove a last line that a kill cut off, so that the next record starts a line of its own."""
    if not path.is_file():
        return
    with path.open("rb+") as file:
        size = end = file.seek(0, os.SEEK_END)
        cut = -1
        while end > 0 and cut < 0:
            start = max(0, end - 65536)
            file.seek(start)
            cut = file.read(end - start).rfind(b"\n")
            end = start + cut + 1 if cut >= 0 else start
        if end < size:
            file.truncate(end)
