"""Predicting a stream of inputs: results written as they come, tables at the end, an account that adds up.

In the folder ``out``, while it is written and when it is finished:

- ``run.json``: settings, detectors, what every result shares, and at the end the account;
- ``predictions.partial.jsonl``: one result per line, as they come; it becomes ``predictions.jsonl``;
- ``predictions.csv`` and ``predictions.parquet``: one row per face (:data:`COLUMNS`), one for an input without any;
- ``annotated/``, ``timelines/`` and ``explanations/``, where asked for.

The exit status is meant for scripts, and only 0 means that everything is in order: 0 every input has the verdict real;
10 at least one is fake; 11 none is fake, but for some there is no verdict (uncertain, or no face); 20 none is fake, but
some could not be scored; 30 some are fake and some could not be scored. Mistakes in the command itself give 1.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from fsvfm.errors import ConfigError, DataError, FsvfmError
from fsvfm.faces.images import load_image
from fsvfm.faces.sources import Input, count, inputs, readable
from fsvfm.faces.video import read_frames
from fsvfm.prediction import Prediction
from fsvfm.predictor import Predictor
from fsvfm.recipes.progress import progress

#: Columns of the tables and their types.
COLUMNS = {
    "source": pa.string(), "kind": pa.string(), "verdict": pa.string(), "probability": pa.float64(),
    "score": pa.float64(), "face": pa.int64(), "face_verdict": pa.string(), "face_probability": pa.float64(),
    "face_score": pa.float64(), "left": pa.int64(), "top": pa.int64(), "right": pa.int64(), "bottom": pa.int64(),
    "frames": pa.int64(), "threshold": pa.float64(), "error": pa.string(),
}  # fmt: skip

PARTIAL, FINAL = "predictions.partial.jsonl", "predictions.jsonl"

_ROWS = 1000  # of a table that are held in memory

#: Without a folder to write to, every result is printed; with one, only so many are.
_PRINTED = 50


class Account:
    """Inputs by what became of them."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def add(self, record: Mapping[str, Any]) -> None:
        """Count a result."""
        self.counts["failed" if record["error"] is not None else record["verdict"]] += 1

    @property
    def total(self) -> int:
        """How many inputs there were."""
        return self.counts.total()

    def exit_status(self) -> int:
        """What a script gets to know; see the module's docstring."""
        found = self.counts
        if found["failed"]:
            return 30 if found["fake"] else 20
        if found["fake"]:
            return 10
        return 11 if found["uncertain"] or found["no face"] else 0

    def to_dict(self) -> dict[str, int]:
        """Plain values for JSON."""
        scored = {name: self.counts[name] for name in ("real", "fake", "uncertain")}
        rest = {"no_face": self.counts["no face"], "failed": self.counts["failed"]}
        return {"inputs": self.total, "scored": sum(scored.values()), **scored, **rest}

    def text(self) -> str:
        """One line for people."""
        found = self.to_dict()
        return (
            f"{found['inputs']} inputs = {found['scored']} scored ({found['real']} real, {found['fake']} fake, "
            f"{found['uncertain']} uncertain) + {found['no_face']} without a face + {found['failed']} failed"
        )


class Output:
    """The folder that results are written to; an interrupted run's are kept and continued.

    Args:
        folder: made if it is not there.
        settings: what must be the same to continue.
        shared: further facts for ``run.json``.
        resume: ``auto`` continues an interrupted run; ``never`` starts over.

    Raises:
        ConfigError: an interrupted run with other settings, or an unknown value of `resume`.
        DataError: the folder cannot be written.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], shared: Mapping[str, Any], resume: str) -> None:
        if resume not in ("auto", "never"):
            raise ConfigError(f"resume={resume}: expected auto (continue an interrupted run) or never (start over)")
        self.folder, self.settings, self.shared = folder, json.loads(json.dumps(settings)), dict(shared)
        self.account = Account()
        self._done: set[bytes] = set()
        self._columns = dict(COLUMNS)
        self._columns |= {f"probability_{name}": pa.float64() for name in self.shared.get("ensemble", [])}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if resume == "never":
                (folder / PARTIAL).unlink(missing_ok=True)
            elif (folder / PARTIAL).is_file():
                self._require_same_settings()
                self._take_over()
            self._write_run(finished=None)
            self._file = (folder / PARTIAL).open("a", encoding="utf-8")
        except OSError as error:
            raise DataError(f"{folder} cannot be written ({error}); choose another folder with out=…") from error

    def has(self, source: str) -> bool:
        """Whether an earlier run has dealt with this input."""
        return _digest(readable(source)) in self._done

    def add(self, record: Mapping[str, Any]) -> None:
        """Write a result of :class:`Scoring`; it is safe from the death of this process when this returns."""
        for part in _line(record):
            self._file.write(part)
        self._file.flush()
        self.account.add(record)

    def finish(self) -> None:
        """Make the tables and give everything its final name."""
        self._file.close()
        names = ("predictions.csv", "predictions.parquet")
        for name, write in zip(names, (self._write_csv, self._write_parquet), strict=True):
            write(self.folder / f".{name}.tmp")
        for name in names:
            (self.folder / f".{name}.tmp").replace(self.folder / name)
        (self.folder / PARTIAL).replace(self.folder / FINAL)
        self._write_run(finished=_now())

    def close(self) -> None:
        """Stop early; what was written stays."""
        self._file.close()

    def _require_same_settings(self) -> None:
        try:
            before = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))["settings"]
        except (OSError, ValueError, KeyError):
            before = {}
        keys = [key for key in self.settings if before.get(key) != self.settings[key]]
        if keys:
            listed = "\n".join(f"  {key}: {before.get(key)!r} → {self.settings[key]!r}" for key in keys)
            raise ConfigError(
                f"{self.folder} holds an interrupted run with other settings:\n{listed}\n"
                "Give it the same ones to continue it, resume=never to start over, or choose another folder"
            )

    def _take_over(self) -> None:
        """Count what an interrupted run has finished, and cut off a line that it did not."""
        with (self.folder / PARTIAL).open("rb+") as file:
            good = 0
            for line in file:
                try:
                    record = _read(line)
                    if not line.endswith(b"\n"):
                        break
                    self.account.add(record)
                    self._done.add(_digest(record["source"]))
                except (ValueError, KeyError, TypeError):
                    break
                good += len(line)
            file.truncate(good)

    def _write_run(self, finished: str | None) -> None:
        facts = {
            "settings": self.settings,
            **self.shared,
            "version": metadata.version("fsvfm"),
            "finished": finished,
            "account": self.account.to_dict() if finished else None,
        }
        _write_json(self.folder / "run.json", facts)

    def _rows(self) -> Iterator[dict[str, Any]]:
        with (self.folder / PARTIAL).open(encoding="utf-8") as lines:
            for line in lines:
                yield from table_rows(_read(line))

    def _write_csv(self, path: Path) -> None:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self._columns, restval="")
            writer.writeheader()
            writer.writerows(self._rows())

    def _write_parquet(self, path: Path) -> None:
        schema = pa.schema(list(self._columns.items()))
        with pq.ParquetWriter(path, schema) as writer:
            block: list[dict[str, Any]] = []
            for row in self._rows():
                block.append(row)
                if len(block) == _ROWS:
                    writer.write_table(pa.Table.from_pylist(block, schema=schema))
                    block = []
            writer.write_table(pa.Table.from_pylist(block, schema=schema))


def table_rows(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows of the tables for one result: one per face, or one alone."""
    row = {key: record[key] for key in ("source", "kind", "verdict", "probability", "score", "error")}
    row["threshold"] = (record["threshold"] or {}).get("value")
    for face in record["faces"]:
        named = {f"face_{key}": face[key] for key in ("verdict", "probability", "score")}
        sides = dict(zip(("left", "top", "right", "bottom"), face["box"], strict=True))
        members = {f"probability_{name}": value for name, value in face["members"].items()}
        yield {**row, "face": face["id"], **named, **sides, "frames": face["frames"], **members}
    if not record["faces"]:
        yield row


class Scoring:
    """Scores inputs one after the other; what goes wrong with one of them is its result.

    Args:
        predictor: scores.
        frames: see :meth:`~fsvfm.predictor.Predictor.predict`, like `aggregate` and `crop`.
        aggregate: likewise.
        crop: likewise.
        out: folder for pictures.
        annotate: write annotated copies.
        timeline: write plots of videos.
        explain: explain the faces.
        encoder: pre-training checkpoint whose reconstruction error is to be shown too.

    Raises:
        ConfigError: pictures are asked for without a folder.
        CheckpointError: the encoder cannot reconstruct.
    """

    def __init__(
        self,
        predictor: Predictor,
        *,
        frames: int = 32,
        aggregate: str = "mean",
        crop: bool = True,
        out: Path | None = None,
        annotate: bool = False,
        timeline: bool = False,
        explain: bool = False,
        encoder: str | None = None,
    ) -> None:
        asked = [
            name for name, wanted in (("annotate", annotate), ("timeline", timeline), ("explain", explain)) if wanted
        ]
        if asked and out is None:
            raise ConfigError(f"{asked[0]}=true writes pictures and needs a folder: out=<folder>")
        self.predictor, self.out, self.crop = predictor, out, crop
        self.options = {"frames": frames, "aggregate": aggregate, "crop": crop}
        self.annotate, self.timeline = annotate, timeline
        self.explain = _explainer(encoder) if explain else None

    def __call__(self, each: Input, advance: Callable[[int, int], None] | None = None) -> dict[str, Any]:
        """Score one input; returns its record for the JSON Lines, whose ``frames`` are still objects."""
        try:
            if each.error:
                raise DataError(each.error)
            source = each.source if each.kind == "webcam" else Path(each.source)
            prediction = self.predictor.predict(source, advance=advance, **self.options)  # type: ignore[arg-type]
        except ConfigError:
            raise  # true of every input
        except Exception as error:
            # Decoders raise anything on damaged data; one file among a million must not end the run.
            known = isinstance(error, FsvfmError)
            text = str(error) if known else f"{each.source} cannot be scored ({type(error).__name__}: {error})"
            prediction = self.predictor.failed(each.source, each.kind, readable(text))
        return self._with_pictures(prediction)

    def _with_pictures(self, prediction: Prediction) -> dict[str, Any]:
        made: dict[str, Any] = {}
        wanted: list[tuple[str, Callable[[Prediction], Any]]] = []
        if prediction.error is None and prediction.frames:
            if self.annotate and prediction.kind != "webcam":
                wanted.append(("annotated", self._annotate))
            if self.timeline and prediction.kind != "photo":
                wanted.append(("timeline", self._timeline))
            if self.explain and prediction.kind != "webcam":
                wanted.append(("explanations", self._explain))
        for name, make in wanted:
            try:
                made[name] = make(prediction)
            except ConfigError:
                raise
            except Exception as error:  # the scores are there; a picture that is not must not take them along
                prediction.notes.append(f"no {name} could be made ({readable(str(error))})")
        return {**prediction.summary(), **made, "frames": prediction.frames}

    def _place(self, folder: str, prediction: Prediction) -> Path:
        if self.out is None:
            raise ConfigError("pictures need a folder: out=<folder>")
        return self.out / folder / picture_name(prediction.source)

    def _relative(self, file: Path) -> str:
        return file.relative_to(self.out or ".").as_posix()

    def _annotate(self, prediction: Prediction) -> str:
        from fsvfm.annotate import annotate

        return self._relative(annotate(prediction, self._place("annotated", prediction)))

    def _timeline(self, prediction: Prediction) -> str:
        from fsvfm.annotate import timeline

        return self._relative(timeline(prediction, self._place("timelines", prediction)))

    def _explain(self, prediction: Prediction) -> list[dict[str, Any]]:
        """Every face of a photograph; of a video the deciding face in the frame where it is most suspicious."""
        found = []
        for index, image, face in self._explained(prediction):
            crop = self.predictor.crop(image, face.box) if self.crop else image
            for name, member in zip(self.predictor.names, self.predictor.members, strict=True):
                explanation = cast(Callable[..., Any], self.explain)(member, crop)
                place = self._place("explanations", prediction)
                place = place.with_name(f"{place.name}_face{face.id}_{name}")
                place.parent.mkdir(parents=True, exist_ok=True)
                picture = explanation.figure(place.with_name(f"{place.name}.png"))
                numbers = explanation.to_dict()
                _write_json(place.with_name(f"{place.name}.json"), numbers)
                facts = {"face": face.id, "frame": index, "member": name, "picture": self._relative(picture)}
                found.append({**facts, "regions": numbers["regions"], "omitted": numbers["omitted"]})
        return found

    def _explained(self, prediction: Prediction) -> Iterator[tuple[int, Any, Any]]:
        if prediction.kind == "photo":
            image = load_image(prediction.source)
            yield from ((0, image, face) for face in prediction.faces)
        elif (peak := prediction.peak) is not None:
            frame, face = peak
            for index, image in read_frames(prediction.source, [frame.index]):
                yield index, image, face


def _explainer(encoder: str | None) -> Callable[..., Any]:
    """Explains a member's score of a crop; models are loaded once."""
    from fsvfm import explain
    from fsvfm.faces.parse import make_parser

    options: dict[str, Any] = {"parser": make_parser("landmarks")}
    if encoder is not None:
        options["encoder"] = explain.load_reconstructor(encoder)
    return partial(explain.explain, **options)


def picture_name(source: str) -> str:
    """A file name for pictures of an input: its own name, and a digest of its whole path that keeps names apart."""
    stem = readable(Path(source).stem).encode()[:100].decode(errors="ignore").replace("\\", "_").replace(":", "_")
    return f"{stem}.{hashlib.sha256(source.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"


def _write_json(path: Path, facts: Mapping[str, Any]) -> None:
    """Write a file that appears complete or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def _line(record: Mapping[str, Any]) -> Iterator[str]:
    """A record as a line of JSON, frame by frame: those of an hour would be hundreds of MB as dicts and text."""
    rest = {key: value for key, value in record.items() if key != "frames"}
    dump = partial(json.dumps, ensure_ascii=False, allow_nan=False)
    yield dump(rest)[:-1] + ', "frames": ['
    for place, frame in enumerate(record["frames"]):
        yield (", " if place else "") + dump(frame.to_dict())
    yield "]}\n"


def _read(line: str | bytes) -> dict[str, Any]:
    """A record from its line, with None for every frame, which neither accounts nor tables need."""
    keys = {"index", "time", "faces"}
    record: dict[str, Any] = json.loads(line, object_hook=lambda found: None if found.keys() == keys else found)
    return record


def _digest(source: str) -> bytes:
    return hashlib.blake2b(source.encode(), digest_size=12).digest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


# -------------------------------------------------------------------------------------------------------- the command


def describe(record: Mapping[str, Any]) -> str:
    """A result for people: a line, and one more per face where there are several."""
    if record["error"] is not None:
        return f"failed            {_printable(record['error'])}"
    probability = "    –" if record["probability"] is None else f"{record['probability']:.3f}"
    faces = record["faces"]
    if record["kind"] == "photo":
        what = {0: ""}.get(len(faces), f"  ({len(faces)} face{'s' if len(faces) != 1 else ''})")
    else:
        what = f"  ({len(record['frames'])} frames, {len(faces)} face track{'s' if len(faces) != 1 else ''})"
    lines = [f"{record['verdict']:<11}{probability}  {_printable(record['source'])}{what}"]
    if len(faces) > 1:
        lines += [
            f"  face {face['id']:<4} {face['verdict']:<11}{face['probability']:.3f}  box {face['box']}"
            for face in faces[:20]
        ]
        if len(faces) > 20:
            lines.append(f"  … and {len(faces) - 20} more")
    return "\n".join(lines)


def _printable(text: str) -> str:
    """Text that cannot move a terminal's cursor: control characters of file names as escapes."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def run(
    predictor: Predictor,
    what: Any,
    settings: Mapping[str, Any],
    *,
    out: Path | None,
    resume: str = "auto",
    **options: Any,
) -> Account:
    """Score everything that `what` stands for.

    Args:
        predictor: scores.
        what: see :func:`fsvfm.faces.sources.inputs`.
        settings: what must be the same to continue an interrupted run.
        out: folder to write; None only prints.
        resume: see :class:`Output`.
        options: of :class:`Scoring`.

    Returns:
        what became of the inputs.

    Raises:
        ConfigError: settings that contradict each other.
        DataError: nothing to score, or a folder that cannot be written.
    """
    scoring = Scoring(predictor, out=out, **options)
    total = count(what)
    shared = {
        "members": {
            name: {"source": readable(member.checkpoint.source), "calibration": member.calibration}
            for name, member in zip(predictor.names, predictor.members, strict=True)
        },
        "ensemble": predictor.names if len(predictor.names) > 1 else [],
        "task": predictor.task,
        "threshold": predictor.threshold.describe(),
        "notes": predictor.notes,
    }
    output = Output(out, settings, shared, resume) if out is not None else None
    account = output.account if output else Account()
    if account.total:
        print(f"continuing: {account.total} inputs are done already", flush=True)
    left = max(total - account.total, 0)
    try:
        with ExitStack() as shown:
            # One long video is followed by its frames, several inputs by their number.
            advance = shown.enter_context(progress("inputs", total)) if total > 1 else None
            frames = _FrameProgress(shown) if total == 1 else None
            for each in inputs(what):
                if output and output.has(each.source):
                    if advance:
                        advance()
                    continue
                record = scoring(each, frames)
                if output:
                    output.add(record)
                else:
                    account.add(record)
                if output is None or left <= _PRINTED or record["error"] is not None:
                    print(describe(record), flush=True)
                if advance:
                    advance()
        if output:
            output.finish()
    finally:
        if output:
            output.close()
    print(predictor.threshold.text(), flush=True)
    print(account.text(), flush=True)
    if out is not None:
        print(f"Written: {out / FINAL} and the same as tables (.csv, .parquet)", flush=True)
    return account


class _FrameProgress:
    """Progress of one video, shown from its first frame on."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._advance: Callable[[], None] | None = None

    def __call__(self, done: int, total: int) -> None:
        if self._advance is None and total:
            self._advance = self._stack.enter_context(progress("frames", total))
        if self._advance is not None:
            self._advance()


def fingerprint(path: str) -> str:
    """SHA-256 of a local checkpoint's weights, so that continuing with other ones is noticed; empty for remote ones."""
    place = Path(path).expanduser()
    files: list[Path] = [place] if place.is_file() else sorted(place.glob("**/model.safetensors"))[:1]
    if not files:
        return ""
    with files[0].open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
