"""What all recipes share: do items in parallel, resume, count every input, write the prepared folder.

A recipe discovers its items, hands them to :meth:`Preparation.run` in one or more stages and gives the rows it got to
:meth:`Preparation.finish`. The engine keeps a journal, one line per finished item, appended only after the item's
files lie under their final names. A killed run therefore continues where it was: what the journal has and the folder
holds is not done again. Settings are stored too, so that outputs of different settings are never mixed.
"""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import pandas as pd
from PIL import Image

from fsvfm.data.manifest import Manifest
from fsvfm.errors import DataError
from fsvfm.recipes.progress import progress
from fsvfm.recipes.sheet import contact_sheet

try:
    import fcntl
except ImportError:  # not on Windows; there two runs into one folder are not noticed
    fcntl = None  # type: ignore[assignment]

#: Everything the engine writes into a prepared folder; `overwrite=true` removes exactly these.
IMAGES, PARSING_MAPS = "images", "parsing_maps"
_STATE = ".prepare"
_JOURNAL = f"{_STATE}/journal.jsonl"
_FILES = ("manifest.parquet", "skipped.csv", "card.json", "contact_sheet.png")
_WRITTEN = (*_FILES, _JOURNAL, IMAGES, PARSING_MAPS, "stats")  # stats: kept there by training, of these images
_PACKAGES = ("fsvfm", "dlib-bin", "opencv-python-headless", "numpy", "pillow")


class Skip(DataError):
    """Raised by a worker: this input yields nothing, for a reason (a few words, the same for all such inputs)."""


class Item(NamedTuple):
    """One input: a key, unique in its stage, that changes when the item's result must; and data for the worker."""

    key: str
    data: dict[str, Any]


class Product(NamedTuple):
    """What a worker made of an item: files (relative to the prepared folder) and values that JSON can hold."""

    files: list[str]
    values: dict[str, Any]


#: A worker is a picklable callable; it is copied once to every process, so it may keep loaded models.
Worker = Callable[[dict[str, Any]], Product]


@dataclass
class Tally:
    """The account of one stage: inputs = written + skipped."""

    stage: str
    inputs: int = 0
    written: int = 0
    reused: int = 0
    skipped: list[tuple[str, str, str]] = field(default_factory=list)

    def line(self) -> str:
        """The account in one line of text."""
        text = f"{self.stage}: {self.inputs} inputs = {self.written} written + {len(self.skipped)} skipped"
        reasons = Counter(reason for _, reason, _ in self.skipped)
        if reasons:
            text += " (" + ", ".join(f"{count} {reason}" for reason, count in reasons.most_common()) + ")"
        return text + (f"; {self.reused} of them by an earlier run" if self.reused else "")


class Prepared(NamedTuple):
    """A finished preparation."""

    manifest: Manifest
    tallies: list[Tally]
    next_step: str = ""


class Preparation:
    """One prepared folder in the making. Use as a context manager.

    Args:
        out: folder to write; made if absent.
        settings: everything that decides what the outputs are; JSON values.
        workers: processes; None takes the cores this process may use.
        overwrite: remove an earlier result made with other settings, instead of refusing.
        retry_skipped: try inputs again that an earlier run skipped.
        verify: decode the images that are there, and make damaged ones again.

    Raises:
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
    ) -> None:
        self.out = Path(out).expanduser().absolute()
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.workers = workers or available_cores()
        self.overwrite, self.retry_skipped, self.verify = overwrite, retry_skipped, verify
        self.tallies: dict[str, Tally] = {}

    def __enter__(self) -> Preparation:
        state = self.out / _STATE
        if self.out.exists() and (not self.out.is_dir() or (any(self.out.iterdir()) and not state.is_dir())):
            raise DataError(
                f"{self.out} is there already and was not made by this command; choose an empty or new folder (out=...)"
            )
        state.mkdir(parents=True, exist_ok=True)
        self._lock = (state / "lock").open("w")
        if fcntl is not None:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                self._lock.close()
                raise DataError(f"another run is writing to {self.out}; wait for it, or choose another out=") from error
        try:
            self._compare_settings(state / "settings.json")
            self._records = _read_journal(self.out / _JOURNAL)
            self._journal = (self.out / _JOURNAL).open("a", encoding="utf-8")
        except BaseException:
            self._lock.close()
            raise
        for folder in (self.out / IMAGES, self.out / PARSING_MAPS):
            folder.mkdir(exist_ok=True)
            for leftover in folder.glob(".*.tmp"):  # of a killed run
                leftover.unlink(missing_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._journal.close()
        self._lock.close()

    def run(self, stage: str, items: Sequence[Item], worker: Worker) -> dict[str, dict[str, Any]]:
        """Do what is missing of a stage; a stage may be run several times with further items.

        Returns:
            Values of every item that was not skipped, by key, in the order of `items`.

        Raises:
            DataError: a key twice, or a worker process died.
        """
        keys = [item.key for item in items]
        if len(set(keys)) != len(keys):
            twice = [key for key, count in Counter(keys).items() if count > 1]
            raise DataError(f"{stage}: {len(twice)} input(s) occur more than once: {', '.join(twice[:5])}")
        tally = self.tallies.setdefault(stage, Tally(stage))
        there = {f"{folder}/{file.name}" for folder in (IMAGES, PARSING_MAPS) for file in (self.out / folder).iterdir()}
        missing = [item for item in items if not self._is_done(self._records.get((stage, item.key)), there)]
        tally.reused += len(items) - len(missing)
        if missing:
            with progress(stage, len(missing)) as advance:
                for record in self._work_off(stage, missing, worker):
                    line = json.dumps(record, ensure_ascii=False)
                    self._journal.write(line + "\n")
                    self._journal.flush()
                    # Through JSON, so that a resumed run sees the very values of an uninterrupted one.
                    self._records[stage, record["key"]] = json.loads(line)
                    advance()
        results: dict[str, dict[str, Any]] = {}
        for key in keys:
            record = self._records[stage, key]
            if "skipped" in record:
                tally.skipped.append((key, record["skipped"], record["detail"]))
            else:
                results[key] = record["values"]
        tally.inputs += len(items)
        tally.written += len(results)
        return results

    def finish(self, rows: list[dict[str, Any]], card: dict[str, Any], next_step: str = "") -> Prepared:
        """Write manifest, account, card and contact sheet. Same inputs and settings give the same bytes.

        Args:
            rows: one per image, with the columns of :mod:`fsvfm.data.manifest`.
            card: what is to be said of the data set: name, source, licence, ….
            next_step: what a person would do with it.

        Raises:
            DataError: nothing was written, the account does not add up, or the rows break the schema.
        """
        tallies = list(self.tallies.values())
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(["stage", "input", "reason", "detail"])
        for tally in tallies:
            writer.writerows([tally.stage, *skipped] for skipped in tally.skipped)
        write_atomically(self.out / "skipped.csv", table.getvalue())
        for tally in tallies:
            if tally.inputs != tally.written + len(tally.skipped):
                raise DataError(f"the account does not add up, which is a fault of the recipe: {tally.line()}")
        if not rows:
            lines = "; ".join(tally.line() for tally in tallies)
            raise DataError(f"no face was written to {self.out} ({lines}); the reasons are in {self.out}/skipped.csv")
        manifest = Manifest(pd.DataFrame(rows), self.out)
        account = {
            tally.stage: {"inputs": tally.inputs, "written": tally.written, "skipped": len(tally.skipped)}
            for tally in tallies
        }
        counts = manifest.counts().to_dict("records")
        text = {**card, "settings": self.settings, "account": account, "counts": counts, "versions": _versions()}
        write_atomically(self.out / "card.json", json.dumps(text, indent=1, ensure_ascii=False) + "\n")
        contact_sheet(manifest, self.out / "contact_sheet.png")
        manifest.write()  # last: a folder with a manifest is complete
        return Prepared(manifest, tallies, next_step)

    def _compare_settings(self, stored: Path) -> None:
        if stored.is_file():
            old = json.loads(stored.read_text(encoding="utf-8"))
            changed = "\n  ".join(
                f"{name}: {old.get(name)!r} → {self.settings.get(name)!r}"
                for name in sorted(old.keys() | self.settings.keys())
                if old.get(name) != self.settings.get(name)
            )
            if not changed:
                return
            if not self.overwrite:
                raise DataError(
                    f"{self.out} was prepared with other settings:\n  {changed}\n"
                    "Choose another folder with out=..., or replace it with overwrite=true"
                )
            for name in _WRITTEN:
                target = self.out / name
                if target.is_dir():
                    shutil.rmtree(target)
                else:
                    target.unlink(missing_ok=True)
        write_atomically(stored, json.dumps(self.settings, indent=1, sort_keys=True))

    def _is_done(self, record: dict[str, Any] | None, there: set[str]) -> bool:
        if record is None:
            return False
        if "skipped" in record:
            return not self.retry_skipped
        return all(name in there for name in record["files"]) and (
            not self.verify or all(_decodes(self.out / name) for name in record["files"])
        )

    def _work_off(self, stage: str, items: Sequence[Item], worker: Worker) -> Iterator[dict[str, Any]]:
        workers = min(self.workers, len(items))
        if workers == 1 or len(items) < 4:  # starting processes would take longer
            for item in items:
                yield _record(stage, worker, item)
            return
        # spawn: libraries with threads of their own (OpenCV, torch) do not survive a fork reliably.
        context = multiprocessing.get_context("spawn")
        threads = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"  # for the processes: together they fill the cores
        pool = ProcessPoolExecutor(workers, context, initializer=_start_process, initargs=(worker,))
        queue, running = iter(items), set[Future[dict[str, Any]]]()
        try:
            while True:
                # A short queue: millions of items must not all lie in memory twice.
                for item in islice(queue, 4 * workers - len(running)):
                    running.add(pool.submit(_record_in_process, stage, item))
                if not running:
                    return
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield future.result()
        except BrokenProcessPool as error:
            raise DataError(
                f"{stage}: a worker process ended unexpectedly (often: out of memory; try fewer workers=...). "
                "What is finished is kept; the same command continues"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            if threads is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = threads


def available_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that it appears complete or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _record(stage: str, worker: Worker, item: Item) -> dict[str, Any]:
    try:
        product = worker(item.data)
    except Skip as skip:
        return {"stage": stage, "key": item.key, "skipped": str(skip), "detail": ""}
    except DataError as error:
        return {"stage": stage, "key": item.key, "skipped": "unreadable", "detail": str(error)}
    return {"stage": stage, "key": item.key, "files": product.files, "values": product.values}


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


def _read_journal(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Finished items by (stage, key). A last line cut off by a kill is removed: its item is simply done again."""
    records: dict[tuple[str, str], dict[str, Any]] = {}
    if not path.is_file():
        return records
    complete = 0
    with path.open("rb+") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            complete += len(line)
            try:
                record = json.loads(line)
                records[record["stage"], record["key"]] = record
            except (ValueError, KeyError, TypeError):
                continue
        file.truncate(complete)
    return records


def _decodes(path: Path) -> bool:
    try:
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
