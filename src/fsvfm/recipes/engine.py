"""What all recipes share: do items in parallel, resume, count every input, write the prepared folder.

A recipe discovers what there is (:class:`Catalogue`), shows it (:meth:`Preparation.plan`), has it done in one or more
stages (:meth:`Preparation.run`) and gives the rows it got to :meth:`Preparation.finish`. The engine keeps a journal,
one line per finished item, appended only after the item's files lie under their final names. A killed run therefore
continues where it was: what the journal has and the folder holds is not done again. Settings are stored too, so that
outputs of different settings are never mixed.

Several machines may share the work: `shard="3/16"` does a sixteenth of the items and keeps a journal of its own. Which
items these are follows from their keys alone. Whoever finds at its end that nothing is left writes the manifest.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any, NamedTuple

import cv2
from PIL import Image

from fsvfm.data.manifest import MANIFEST_NAME, Manifest, write_rows
from fsvfm.errors import ConfigError, DataError
from fsvfm.recipes.journal import PATTERN, Journal, Results
from fsvfm.recipes.plan import Plan, make_plan
from fsvfm.recipes.progress import progress
from fsvfm.recipes.sheet import contact_sheet

try:
    import fcntl
except ImportError:  # not on Windows; there two runs into one folder are not noticed
    fcntl = None  # type: ignore[assignment]

#: Folders that workers write to. Everything that is written into a prepared folder is named here; `overwrite=true`
#: removes exactly this.
IMAGES, PARSING_MAPS, SHARDS = FOLDERS = ("images", "parsing_maps", "shards")
_STATE = ".prepare"
_FILES = (MANIFEST_NAME, "skipped.csv", "card.json", "contact_sheet.png")
_WRITTEN = (*_FILES, *FOLDERS, "stats")  # stats: kept there by training, of these images
_PACKAGES = ("fsvfm", "dlib-bin", "opencv-python-headless", "numpy", "pillow")


#: Of the worker processes: one thread each, since together they fill the cores; and glibc keeps a frame's memory for
#: the next frame instead of giving it back every time, which costs a video's preparation about 4 %.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_TRIM_THRESHOLD_": "1000000000",
    "MALLOC_MMAP_THRESHOLD_": "1000000000",
}


class Skip(DataError):
    """Raised by a worker: this input yields nothing, for a reason (a few words, the same for all such inputs)."""


class Item(NamedTuple):
    """One input: a key, unique in its stage, that changes when the item's result must; and data for the worker.

    The data must be picklable; an :class:`Entry` does, and spares a million dictionaries where there are a million.
    """

    key: str
    data: Any


class Product(NamedTuple):
    """What a worker made of an item.

    Attributes:
        files: written, relative to the prepared folder.
        values: what the rows need to know, JSON values.
        missed: pieces of the item that yielded nothing, such as `("frame 12", "no face found")`.
        images: how many pieces yielded something; by default the number of files in `images`.
    """

    files: list[str]
    values: dict[str, Any]
    missed: Sequence[tuple[str, str]] = ()
    images: int | None = None


class Entry(NamedTuple):
    """One raw file of a data set, and what is known of it before it is opened.

    Attributes:
        file: absolute path.
        name: plain and unique in the data set; images are named after it, `{name}_frame_{index}.png` or `{name}.png`.
        label: 0 real, 1 fake or attack.
        split: train, val or test.
        method: how it was forged; `real` for label 0.
        video: id of the video, unique in the data set.
        subject: person id; several, joined by `+`, where a forgery is made of several people; empty if unknown.
        frames: wanted of a video, 0 for all of them; 1 for a still.
        more: further columns of the manifest, JSON values.
    """

    file: str
    name: str
    label: int
    split: str
    method: str
    video: str
    subject: str = ""
    frames: int = 1
    more: Mapping[str, Any] = {}


class Catalogue(NamedTuple):
    """What the raw folder of a data set holds: discovered, not opened yet.

    Attributes:
        name: of the data set.
        entries: its files.
        card: what is to be said of the data set: about, source (citation, url), licence, expected counts; JSON values.
        skipped: (file, reason) found unusable already now; they go into the account.
        warnings: sentences for the person who runs it, such as a count that differs from the published one.
    """

    name: str
    entries: list[Entry]
    card: dict[str, Any]
    skipped: Sequence[tuple[str, str]] = ()
    warnings: Sequence[str] = ()


#: A worker is a picklable callable; it is copied once to every process, so it may keep loaded models.
Worker = Callable[[Any], Product]


@dataclass
class Tally:
    """The account of one stage: inputs = written + skipped, and of the pieces inputs are made of: images + missed.

    Attributes:
        stage: its name.
        inputs: items, of which
        written: yielded something; and
        reused: were finished by an earlier run.
        images: that were written.
        skipped: (item, reason, detail).
        missed: (item, piece, reason), such as a frame without a face.
        planned: nothing was done; `inputs` and `reused` only say what would be.
    """

    stage: str
    inputs: int = 0
    written: int = 0
    reused: int = 0
    images: int = 0
    skipped: list[tuple[str, str, str]] = field(default_factory=list)
    missed: list[tuple[str, str, str]] = field(default_factory=list)
    planned: bool = False

    def line(self) -> str:
        """The account in one line of text."""
        if self.planned:
            return f"{self.stage}: {self.inputs} inputs, {self.reused} of them done by an earlier run"
        text = f"{self.stage}: {self.inputs} inputs = {self.written} written + {len(self.skipped)} skipped"
        text += _reasons(reason for _, reason, _ in self.skipped)
        if self.missed:
            wanted = self.images + len(self.missed)
            text += f"; {wanted} images = {self.images} written + {len(self.missed)} missed"
            text += _reasons(reason for _, _, reason in self.missed)
        return text + (f"; {self.reused} of them by an earlier run" if self.reused else "")


def _reasons(reasons: Iterable[str]) -> str:
    counted = Counter(reasons).most_common()
    return " (" + ", ".join(f"{count} {reason}" for reason, count in counted) + ")" if counted else ""


@dataclass
class Prepared:
    """What a preparation came to.

    Attributes:
        root: prepared folder.
        tallies: account of every stage.
        next_step: what a person would do with it.
        plan: what the catalogue holds, after a dry run.
        unfinished: why there is no manifest (yet); empty where there is one.
    """

    root: Path
    tallies: list[Tally]
    next_step: str = ""
    plan: Plan | None = None
    unfinished: str = ""

    @cached_property
    def manifest(self) -> Manifest:
        """The manifest, read when it is asked for.

        Raises:
            DataError: the preparation is not finished.
        """
        if self.unfinished:
            raise DataError(f"{self.root} has no manifest: {self.unfinished}")
        return Manifest.read(self.root)


class Preparation:
    """One prepared folder in the making. Use as a context manager.

    Args:
        out: folder to write; made if absent.
        settings: everything that decides what the outputs are; JSON values.
        workers: processes; None takes the cores this process may use.
        overwrite: remove an earlier result made with other settings, instead of refusing.
        retry_skipped: try inputs again that an earlier run skipped.
        verify: decode the images that are there, and make damaged ones again.
        shard: do only a part of the items, such as `3/16`, beside others that do the other parts in the same folder.
        dry_run: write nothing, do nothing: say what there is and how much of it is done.

    Raises:
        ConfigError: a shard that is none, or one that should overwrite.
        DataError: the folder was made with other settings, holds something else, or is being written by another run.
    """

    def __init__(
        self,
        out: str | Path,
        settings: dict[str, Any],
        *,
        workers: int | None = None,
        overwrite: bool = False,
        retry_skipped: bool = False,
        verify: bool = False,
        shard: str | None = None,
        dry_run: bool = False,
    ) -> None:
        self.out = Path(out).expanduser().absolute()
        try:
            self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        except TypeError as error:
            raise ConfigError(f"settings of a preparation must be JSON values ({error}): {settings}") from error
        self.workers = workers or available_cores()
        self.overwrite, self.retry_skipped, self.verify = overwrite, retry_skipped, verify
        self.shard, self.dry_run = _parse_shard(shard), dry_run
        if self.shard and overwrite:
            raise ConfigError(
                "overwrite=true cannot be combined with shard=...: one shard would remove what another has just made; "
                f"remove {self.out} first"
            )
        self.tallies: dict[str, Tally] = {}
        self._plan: Plan | None = None
        self._unfinished = "it was a dry run (dry_run=true)" if dry_run else ""
        self._locks: list[IO[str]] = []

    def __enter__(self) -> Preparation:
        state = self.out / _STATE
        if self.out.exists() and (not self.out.is_dir() or (any(self.out.iterdir()) and not state.is_dir())):
            raise DataError(
                f"{self.out} is there already and was not made by this command; choose an empty or new folder (out=...)"
            )
        if self.dry_run:
            stale = self._settings_changed(state / "settings.json")
            self._journal = Journal(state, None, self._keeper() if not stale else lambda record: False)
            return self
        state.mkdir(parents=True, exist_ok=True)
        try:
            # Shards share the folder with each other, and with nobody else.
            self._lock("lock", exclusive=self.shard is None)
            if self.shard:
                self._lock("lock-{}-of-{}".format(*self.shard))
            self._compare_settings(state / "settings.json")
            if self.shard is None:
                for leftover in self._leftovers():  # of a killed run
                    leftover.unlink(missing_ok=True)
            name = "journal-{}-of-{}.jsonl".format(*self.shard) if self.shard else "journal.jsonl"
            self._journal = Journal(state, name, self._keeper())
            for folder in (self.out / IMAGES, self.out / PARSING_MAPS):
                folder.mkdir(exist_ok=True)
        except BaseException:
            self._unlock()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._journal.close()
        self._unlock()

    def plan(self, catalogue: Catalogue) -> Plan:
        """Count what the catalogue holds, and put what it leaves out into the account; a dry run shows it.

        Raises:
            DataError: two entries have one name.
        """
        self._plan = make_plan(catalogue, self.settings)
        if catalogue.skipped:
            skipped = [(file, reason, "") for file, reason in catalogue.skipped]
            taken = len(catalogue.entries)
            self.tallies["discovery"] = Tally("discovery", taken + len(skipped), taken, skipped=skipped)
        if not self.dry_run:
            for text in catalogue.warnings:
                print(f"warning: {text}", file=sys.stderr, flush=True)
        return self._plan

    def run(self, stage: str, items: Sequence[Item], worker: Worker) -> Mapping[str, dict[str, Any]]:
        """Do what is missing of a stage; a stage may be run several times with further items.

        Returns:
            Values of every item that was not skipped, by key, in the order of `items`; they are read when asked for.
            Nothing in a dry run, and as long as other shards have work left: there is no use in going on then, and
            :meth:`finish` knows.

        Raises:
            DataError: a key twice, or a worker process died.
        """
        keys = [item.key for item in items]
        if len(set(keys)) != len(keys):
            twice = [key for key, count in Counter(keys).items() if count > 1]
            raise DataError(f"{stage}: {len(twice)} input(s) occur more than once: {', '.join(twice[:5])}")
        tally = self.tallies.setdefault(stage, Tally(stage))
        mine = [item for item in items if self._is_mine(item.key)]
        if self.dry_run:
            tally.planned = True
            tally.inputs += len(mine)
            tally.reused += sum(self._is_done(stage, item.key) for item in mine)
            return {}
        if self._unfinished:  # an earlier stage is; this one may depend on it
            return {}
        missing = [item for item in mine if not self._is_done(stage, item.key)]
        if self.verify:
            missing += self._damaged(stage, [item for item in mine if self._is_done(stage, item.key)])
        tally.reused += len(mine) - len(missing)
        del mine
        if missing:
            with progress(stage, len(missing)) as advance:
                for record in self._work_off(stage, missing, worker):
                    self._journal.add(record)
                    advance()
        del missing
        if self.shard and (left := self._left_to_others(stage, keys)):
            self._unfinished = f"{left} of {len(keys)} {stage} are left to other shards"
            keys = [key for key in keys if self._is_mine(key)]
        written: list[str] = []
        for key in keys:
            tally.images += self._journal.images(stage, key)
            if self._journal.missed(stage, key):
                tally.missed += [(key, *piece) for piece in self._journal.record(stage, key)["missed"]]
            if self._journal.skipped(stage, key):
                record = self._journal.record(stage, key)
                tally.skipped.append((key, record["skipped"], record["detail"]))
            else:
                written.append(key)
        tally.inputs += len(keys)
        tally.written += len(written)
        return {} if self._unfinished else Results(self._journal, stage, written)

    def finish(self, rows: Iterable[Mapping[str, Any]], card: dict[str, Any], next_step: str = "") -> Prepared:
        """Write manifest, account, card and contact sheet. Same inputs and settings give the same bytes.

        Nothing is written in a dry run, or while other shards have work left.

        Args:
            rows: one per image, with the columns of :mod:`fsvfm.data.manifest`. A generator keeps millions of them out
                of the memory.
            card: what is to be said of the data set: name, source, licence, ….
            next_step: what a person would do with it.

        Raises:
            DataError: nothing was written, the account does not add up, or the rows break the schema.
        """
        tallies = list(self.tallies.values())
        if self._unfinished:
            plan = self._plan if self.dry_run else None
            return Prepared(self.out, tallies, next_step, plan, self._unfinished)
        if self.shard:
            self._lock("finish", wait=True)
        if self._finished_by_another():
            return Prepared(self.out, tallies, next_step)
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(["stage", "input", "piece", "reason", "detail"])
        for tally in tallies:
            writer.writerows([tally.stage, key, "", reason, detail] for key, reason, detail in tally.skipped)
            writer.writerows([tally.stage, key, piece, reason, ""] for key, piece, reason in tally.missed)
        write_atomically(self.out / "skipped.csv", table.getvalue())
        for tally in tallies:
            if tally.inputs != tally.written + len(tally.skipped):
                raise DataError(f"the account does not add up, which is a fault of the recipe: {tally.line()}")
        staged = self.out / _STATE / MANIFEST_NAME
        for leftover in staged.parent.glob(".rows-*"):  # of a killed run
            shutil.rmtree(leftover, ignore_errors=True)
        if not write_rows(rows, staged):
            lines = "; ".join(tally.line() for tally in tallies)
            raise DataError(f"no face was written to {self.out} ({lines}); the reasons are in {self.out}/skipped.csv")
        try:
            manifest = Manifest.read(staged, extra=["parse"], root=self.out)
        except DataError:
            staged.unlink()
            raise
        account = {
            tally.stage: {
                "inputs": tally.inputs,
                "written": tally.written,
                "skipped": len(tally.skipped),
                "images": tally.images,
                "missed": len(tally.missed),
            }
            for tally in tallies
        }
        text = {
            **card,
            **({"warnings": list(self._plan.warnings)} if self._plan and self._plan.warnings else {}),
            "settings": self.settings,
            "account": account,
            "counts": manifest.counts().to_dict("records"),
            "rows": len(manifest),
            "rows_sha256": manifest.digest(),
            "versions": _versions(),
        }
        write_atomically(self.out / "card.json", json.dumps(text, indent=1, ensure_ascii=False) + "\n")
        contact_sheet(manifest, self.out / "contact_sheet.png")
        for leftover in self._leftovers():  # of killed shards; nobody is at work any more
            leftover.unlink(missing_ok=True)
        staged.replace(self.out / MANIFEST_NAME)  # last: a folder with a manifest is complete
        return Prepared(self.out, tallies, next_step)

    def _lock(self, name: str, *, exclusive: bool = True, wait: bool = False) -> None:
        if fcntl is None:
            return
        file = (self.out / _STATE / name).open("w")
        self._locks.append(file)
        try:
            fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise DataError(
                f"another run is writing to {self.out}; wait for it, or choose another out=. (Several machines may "
                "share the work: each with another shard=1/4, shard=2/4, …)"
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            text = f"warning: {self.out} is on a file system without locks; see to it that no two runs do the same part"
            print(text, file=sys.stderr, flush=True)

    def _unlock(self) -> None:
        for file in reversed(self._locks):
            file.close()
        self._locks = []

    def _is_mine(self, key: str) -> bool:
        # By the key alone: whatever the order of the items, and whatever else there is.
        if self.shard is None:
            return True
        number = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
        return number % self.shard[1] == self.shard[0] - 1

    def _left_to_others(self, stage: str, keys: Sequence[str]) -> int:
        """How many items nobody has finished.

        Of several shards that end at the same time, at least one finds everything: each has its own journal on the disk
        before it reads those of the others.
        """
        self._journal.sync()
        self._journal.refresh()
        return sum(not self._journal.has(stage, key) for key in keys)

    def _finished_by_another(self) -> bool:
        """Whether another shard wrote the manifest, of all that there is, while this one waited for the lock."""
        manifest = self.out / MANIFEST_NAME
        journals = [path.stat().st_mtime for path in (self.out / _STATE).glob(PATTERN)]
        return self.shard is not None and manifest.is_file() and manifest.stat().st_mtime > max(journals)

    def _settings_changed(self, stored: Path) -> str:
        """Differences from the settings that the folder was made with, one a line.

        Raises:
            DataError: there are some, and they may not be overwritten.
        """
        if not stored.is_file():
            return ""
        old = json.loads(stored.read_text(encoding="utf-8"))
        changed = "\n  ".join(
            f"{name}: {old.get(name)!r} → {self.settings.get(name)!r}"
            for name in sorted(old.keys() | self.settings.keys())
            if old.get(name) != self.settings.get(name)
        )
        if changed and not self.overwrite:
            raise DataError(
                f"{self.out} was prepared with other settings:\n  {changed}\n"
                "Choose another folder with out=..., or replace it with overwrite=true"
            )
        return changed

    def _compare_settings(self, stored: Path) -> None:
        if self._settings_changed(stored):
            for target in (*(self.out / name for name in _WRITTEN), *stored.parent.glob(PATTERN)):
                if target.is_dir():
                    shutil.rmtree(target)
                else:
                    target.unlink(missing_ok=True)
        elif stored.is_file():
            return
        write_atomically(stored, json.dumps(self.settings, indent=1, sort_keys=True))

    def _keeper(self) -> Callable[[dict[str, Any]], bool]:
        """Whether the files of an earlier run's record are still there; folders are listed once, no file is asked."""
        there = {
            f"{place.relative_to(self.out).as_posix()}/{name}"
            for folder in FOLDERS
            for place, _, names in _walk(self.out / folder)
            for name in names
        }
        return lambda record: "skipped" in record or there.issuperset(record["files"])

    def _leftovers(self) -> Iterator[Path]:
        """Half-written files; images are written to a hidden name first."""
        for folder in FOLDERS:
            for place, _, names in _walk(self.out / folder):
                yield from (place / name for name in names if name.startswith(".") and name.endswith(".tmp"))

    def _is_done(self, stage: str, key: str) -> bool:
        return self._journal.has(stage, key) and not (self.retry_skipped and self._journal.skipped(stage, key))

    def _damaged(self, stage: str, items: Sequence[Item]) -> list[Item]:
        """Items of which a file does not decode."""
        if not items:
            return []

        def intact(files: list[str]) -> bool:
            return all(_decodes(self.out / name) for name in files)

        damaged = []
        with ThreadPoolExecutor(self.workers) as pool, progress(f"{stage}: verifying", len(items)) as advance:
            for start in range(0, len(items), 1024):
                part = items[start : start + 1024]
                files = [self._journal.record(stage, item.key).get("files", []) for item in part]
                for item, good in zip(part, pool.map(intact, files), strict=True):
                    if not good:
                        damaged.append(item)
                    advance()
        return damaged

    def _work_off(self, stage: str, items: Sequence[Item], worker: Worker) -> Iterator[dict[str, Any]]:
        workers = min(self.workers, len(items))
        if workers == 1 or len(items) < 4:  # starting processes would take longer
            for item in items:
                yield _record(stage, worker, item)
            return
        # spawn: libraries with threads of their own (OpenCV, torch) do not survive a fork reliably.
        context = multiprocessing.get_context("spawn")
        before = {name: os.environ.get(name) for name in _ENVIRONMENT}
        os.environ.update(_ENVIRONMENT)
        pool = ProcessPoolExecutor(workers, context, initializer=_start_process, initargs=(worker,))
        finished: SimpleQueue[Future[dict[str, Any]]] = SimpleQueue()
        queue, running = iter(items), 0
        try:
            while True:
                # A short queue: millions of items must not all lie in memory twice.
                for item in islice(queue, 4 * workers - running):
                    pool.submit(_record_in_process, stage, item).add_done_callback(finished.put)
                    running += 1
                if not running:
                    return
                yield finished.get().result()
                running -= 1
        except BrokenProcessPool as error:
            raise DataError(
                f"{stage}: a worker process ended unexpectedly (often: out of memory; try fewer workers=...). "
                "What is finished is kept; the same command continues"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def find_folder(root: str | Path, *names: str) -> Path:
    """The folder `root/names[0]/names[1]/…`, whatever the case of its names: distributions differ (`DeepFakes`).

    Args:
        root: folder that is there.
        names: one per level; a name may hold alternatives, separated by `|`, of which the first found is taken.

    Raises:
        DataError: no such folder; the message says what was looked for, and what is there.
    """
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise DataError(f"no folder {folder}")
    for name in names:
        there = {entry.name: entry for entry in sorted(folder.iterdir()) if entry.is_dir()}
        lower = {key.lower(): entry for key, entry in reversed(there.items())}
        wanted = name.split("|")
        found = next((there.get(each) or lower.get(each.lower()) for each in wanted if each.lower() in lower), None)
        if found is None:
            listed = ", ".join(list(there)[:8]) + (", …" if len(there) > 8 else "")
            raise DataError(
                f"no folder {folder / ' or '.join(wanted)} (upper or lower case does not matter); "
                f"{folder} has {'the folders ' + listed if there else 'no sub-folder'}. Is {root} the folder that "
                "holds the download as it was unpacked?"
            )
        folder = found
    return folder


def find_files(folder: str | Path, suffixes: Iterable[str], recursive: bool = True) -> list[Path]:
    """Files with one of the suffixes (`.mp4`; upper or lower case), sorted by path; hidden ones are left out.

    Returns:
        absolute paths; empty if there is none.

    Raises:
        DataError: no such folder.
    """
    folder = Path(folder).expanduser().absolute()
    if not folder.is_dir():
        raise DataError(f"no folder {folder}")
    allowed = tuple({suffix.lower() for suffix in suffixes})
    found: list[str] = []
    for place, folders, names in os.walk(folder, followlinks=True):
        found += [f"{place}/{name}" for name in names if name.lower().endswith(allowed) and not name.startswith(".")]
        folders[:] = [name for name in folders if recursive and not name.startswith(".")]
    return [Path(name) for name in sorted(found)]


def spread(name: str) -> str:
    """A name in one of 256 sub-folders, by a hash: `3f/name`. Frames are named after their video's, to lie together.

    Millions of files in one folder are too much for a network file system, and for whoever lists it.
    """
    return f"{hashlib.sha256(name.encode()).hexdigest()[:2]}/{name}"


def available_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that it appears complete or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _record(stage: str, worker: Worker, item: Item) -> dict[str, Any]:
    record = {"stage": stage, "key": item.key}
    try:
        product = worker(item.data)
        if not product.files:
            reasons = Counter(reason for _, reason in product.missed)
            reason = reasons.most_common(1)[0][0] if reasons else "nothing to write"
            detail = f"in none of {len(product.missed)} pieces" if reasons else ""
            return {**record, "skipped": reason, "detail": detail, "missed": product.missed}
    except Skip as skip:
        return {**record, "skipped": str(skip), "detail": "", "missed": []}
    except DataError as error:
        return {**record, "skipped": "unreadable", "detail": str(error), "missed": []}
    images = sum(name.startswith(f"{IMAGES}/") for name in product.files) if product.images is None else product.images
    return {**record, "images": images, "missed": product.missed, "files": product.files, "values": product.values}


_worker: Worker | None = None


def _start_process(worker: Worker) -> None:
    global _worker
    _worker = worker
    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A killed parent cannot stop its pool, and idle workers would wait for work forever.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _record_in_process(stage: str, item: Item) -> dict[str, Any]:
    if _worker is None:
        raise RuntimeError("the worker process was not started by the engine")
    return _record(stage, _worker, item)


def _walk(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    for place, folders, names in os.walk(folder):
        yield Path(place), folders, names


def _parse_shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    part, _, count = str(text).partition("/")
    if not (part.isdecimal() and count.isdecimal() and 1 <= int(part) <= int(count)):
        raise ConfigError(f"shard={text} is no part of a whole; expected for example shard=3/16, the third of sixteen")
    return int(part), int(count)


def _decodes(path: Path) -> bool:
    try:
        if path.suffix != ".png":
            return path.stat().st_size > 0
        with Image.open(path) as image:
            image.load()
        return True
    except Exception:  # decoders raise anything on damaged data
        return False


def _versions() -> dict[str, str]:
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
