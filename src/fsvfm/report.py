"""Results as tables (JSON, CSV, Markdown, LaTeX) and as one self-contained page: ``python -m fsvfm.report``.

A number that is absent stays visibly absent: a test set that could not be evaluated is a gap with its reason, and the
mean over test sets exists only where every one of them has a value.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import hydra
import jinja2
import numpy as np
import pandas as pd
from omegaconf import DictConfig, OmegaConf
from PIL import Image, ImageOps

from fsvfm.cli import guard
from fsvfm.errors import DataError, MetricError
from fsvfm.metrics.forgery import DEFINITIONS
from fsvfm.report_figures import histogram_figure, roc_figure, training_figure

#: Results of an evaluation: run name → test set → summary of :func:`fsvfm.metrics.forgery.summarise`, or a gap:
#: ``{"gap": "why there is no number"}``.
Results = Mapping[str, Mapping[str, Mapping[str, Any]]]

NAMES = {
    "auc": "AUC",
    "eer": "EER",
    "ap": "AP",
    "accuracy": "Acc.",
    "balanced_accuracy": "Bal. acc.",
    "tpr_at_fpr_1": "TPR@FPR 1 %",
    "tpr_at_fpr_5": "TPR@FPR 5 %",
}
MAX_PANELS = 6
#: Of all packages of an environment, those a reader looks for.
PACKAGES = ("fsvfm", "torch", "pytorch-lightning", "timm", "numpy")
FACES = 6


# ---------------------------------------------------------------- tables


def result_rows(results: Results) -> list[dict[str, Any]]:
    """One row per run, test set, level and metric; gaps and means over test sets included.

    Returns:
        Rows with ``run``, ``testset`` (``mean`` for the mean over sets), ``level`` (frame, video), ``metric``,
        ``value``, ``low``, ``high`` (fractions or None), ``n``, ``gap`` (why there is no value, else empty). A mean
        has a value only if every test set of any run has one for this run.
    """
    sets = testsets(results)
    rows = []
    for run, by_set in results.items():
        for level in ("frame", "video"):
            for metric in DEFINITIONS:
                values = []
                for name in sets:
                    summary = by_set.get(name) or {"gap": "not evaluated"}
                    row: dict[str, Any] = {"run": run, "testset": name, "level": level, "metric": metric}
                    cell = summary.get(level, {}).get("metrics", {}).get(metric)
                    if cell is None:
                        row |= {"value": None, "low": None, "high": None, "n": 0}
                        row["gap"] = str(summary.get("gap") or f"no {level}-level {metric}")
                    else:
                        row |= {key: cell.get(key) for key in ("value", "low", "high")}
                        row |= {"n": summary[level]["n"], "gap": ""}
                        values.append(cell["value"])
                    rows.append(row)
                if len(sets) > 1:
                    whole = len(values) == len(sets)
                    rows.append(
                        {"run": run, "testset": "mean", "level": level, "metric": metric}
                        | {"value": float(np.mean(values)) if whole else None, "low": None, "high": None}
                        | {"n": len(values), "gap": "" if whole else f"{len(values)} of {len(sets)} sets have a value"}
                    )
    return rows


def testsets(results: Results) -> list[str]:
    """Names of all test sets of any run, in order of appearance."""
    names = list(dict.fromkeys(name for by_set in results.values() for name in by_set))
    if "mean" in names:
        raise MetricError("a test set cannot be called 'mean': the tables use that name for the mean over test sets")
    return names


def percent(row: Mapping[Any, Any], dash: str = "–") -> str:
    """``91.4 [88.0–94.2]`` in per cent, without brackets where there is no interval, ``—`` for a gap."""
    if row["value"] is None:
        return "—"
    text = f"{100 * row['value']:.1f}"
    return text if row["low"] is None else f"{text} [{100 * row['low']:.1f}{dash}{100 * row['high']:.1f}]"


def write_tables(folder: str | Path, results: Results, *, made: Mapping[str, Any] | None = None) -> list[Path]:
    """Write ``results.json``, ``.csv``, ``.md`` and ``.tex`` into a folder, each atomically.

    Args:
        folder: made if absent.
        results: see :data:`Results`.
        made: what made them (versions, time, seeds), stored in the JSON.

    Returns:
        The files written.

    Raises:
        MetricError: there are no results, a test set is called ``mean``, or a number is not finite.
    """
    if not any(results.values()):
        raise MetricError("there are no results to write; evaluate at least one run on one test set")
    frame = pd.DataFrame(result_rows(results))
    try:
        text = json.dumps({"runs": results, "made": dict(made or {})}, indent=1, allow_nan=False)
    except ValueError as error:
        raise MetricError(f"the results hold a number that is not finite ({error}); report it as a gap") from error
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "results.json": text + "\n",
        "results.csv": frame.to_csv(index=False),
        "results.md": _markdown(results, frame),
        "results.tex": _latex(results, frame),
    }
    for name, content in files.items():
        write_text(folder / name, content)
    return [folder / name for name in files]


def write_text(path: Path, content: str) -> None:
    """Write a text file under a temporary name, then rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(content, encoding="utf-8")
    temporary.replace(path)


def levels(results: Results) -> list[str]:
    """The levels worth a table: frame, and video where a video has more than one frame anywhere."""
    summaries = [s for by_set in results.values() for s in by_set.values() if s and "frame" in s]
    return ["frame", "video"] if any(s["video"]["n"] != s["frame"]["n"] for s in summaries) else ["frame"]


def interval_text(results: Results) -> str:
    """How the intervals were made, in words."""
    for by_set in results.values():
        for summary in by_set.values():
            if summary and (interval := summary.get("interval")) and interval["replicates"]:
                return (
                    f"In brackets: {100 * interval['level']:g} % intervals, {interval['kind']} over "
                    f"{interval['over']}s, {interval['replicates']} replicates, seed {interval['seed']}."
                )
    return "No intervals were asked for."


def _markdown(results: Results, frame: pd.DataFrame) -> str:
    lines = ["# Results", "", "Per cent; score = P(fake). " + interval_text(results), ""]
    for level in levels(results):
        lines += [f"## {level.capitalize()} level", ""]
        lines += ["| run | test set | n | " + " | ".join(NAMES.values()) + " |", "|---|---|--:|" + "--:|" * len(NAMES)]
        part = frame[frame["level"] == level]
        for (run, name), rows in part.groupby(["run", "testset"], sort=False):
            cells = rows.set_index("metric").replace({np.nan: None}).to_dict("index")
            first = next(iter(cells.values()))
            label = f"{name} ({first['gap']})" if first["gap"] else name
            count = "" if name == "mean" else first["n"]
            lines.append(f"| {run} | {label} | {count} | " + " | ".join(percent(cells[m]) for m in NAMES) + " |")
        lines.append("")
    lines += [f"- **{NAMES[name]}**: {text}." for name, text in DEFINITIONS.items()]
    return "\n".join(lines) + "\n"


def _latex(results: Results, frame: pd.DataFrame) -> str:
    def escape(text: str) -> str:
        return re.sub(r"([_&%#$])", r"\\\1", str(text))

    columns = [*testsets(results), "mean"] if len(testsets(results)) > 1 else testsets(results)
    lines = ["% AUC in per cent. " + interval_text(results)]
    for level in levels(results):
        lines += [f"% {level} level", r"\begin{tabular}{l" + "r" * len(columns) + "}", r"\toprule"]
        lines += ["Run & " + " & ".join(map(escape, columns)) + r" \\", r"\midrule"]
        part = frame[(frame["level"] == level) & (frame["metric"] == "auc")].replace({np.nan: None})
        for run, rows in part.groupby("run", sort=False):
            cells = rows.set_index("testset").to_dict("index")
            body = " & ".join(percent(cells[name], "--").replace("—", "---") for name in columns)
            lines.append(f"{escape(str(run))} & {body}" + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}"]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- the page


def write_report(
    out: str | Path,
    *,
    pretrain: str | Path | None,
    runs: Mapping[str, str | Path],
    evaluation: str | Path | None,
    commands: Mapping[str, str] | None = None,
    title: str = "Face forgery detection",
) -> Path:
    """Write one self-contained HTML page about a pre-training, detectors trained from it, and their evaluation.

    Args:
        out: the page; written atomically.
        pretrain: run folder of the pre-training.
        runs: name → run folder of each detector.
        evaluation: folder with ``results.json`` and ``predictions.parquet`` (columns ``run``, ``testset``, ``path``,
            ``label``, ``score``, ``method``).
        commands: ``pretrain``, ``evaluation`` or a run's name → the command that makes that part.
        title: heading of the page.

    Whatever is not there is named on the page, with its command. A run folder may hold
    ``environment.json`` and ``<step>.done.json`` (facts to show: command, hardware, versions, times), ``config.yaml``,
    ``metrics.csv`` anywhere below it, and ``panels/*.png``.

    Returns:
        The page's path.

    Raises:
        DataError: a file that is there cannot be read.
    """
    commands = dict(commands or {})
    folders = {"pretrain": pretrain, **runs}
    parts = [_run(name, Path(folder) if folder else None, commands.get(name, "")) for name, folder in folders.items()]
    found = _evaluation(Path(evaluation) if evaluation else None, commands.get("evaluation", ""))
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fsvfm", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report.html").render(
        title=title, now=f"{datetime.now():%Y-%m-%d %H:%M}", parts=parts, evaluation=found, names=NAMES,
        definitions=DEFINITIONS, percent=percent,
    )  # fmt: skip
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)
    return path


def _run(name: str, folder: Path | None, command: str) -> dict[str, Any]:
    """What a run folder holds, for the template."""
    part: dict[str, Any] = {"name": name, "folder": str(folder or ""), "command": command, "missing": True}
    if folder is None or not folder.is_dir():
        return part
    config = next((p for p in (folder / "config.yaml", folder / ".hydra/config.yaml") if p.is_file()), None)
    logs = sorted(folder.rglob("metrics.csv"), key=lambda p: [int(n) for n in re.findall(r"\d+", str(p.parent))])
    panels = sorted((folder / "panels").glob("*.png"))
    # Evenly over the training, the first and the last included.
    shown = [
        panels[i] for i in sorted({round(x) for x in np.linspace(0, len(panels) - 1, min(MAX_PANELS, len(panels)))})
    ]
    try:
        history = pd.concat([pd.read_csv(p) for p in logs if p.stat().st_size]) if logs else pd.DataFrame()
    except (ValueError, pd.errors.ParserError, OSError) as error:
        raise DataError(f"the training log of {folder} cannot be read ({error}); train again or remove it") from error
    return part | {
        "missing": False,
        "facts": _facts(folder),
        "config": config.read_text(encoding="utf-8") if config else "",
        "curves": training_figure(history),
        "panels": [(p.stem.replace("_", " "), _picture(p)) for p in shown],
        "more_panels": len(panels) - len(shown),
    }


def _facts(folder: Path) -> dict[str, str]:
    """What a run left about how it was made: its environment (the packages that matter) and each step's end."""
    environment = _load(folder / "environment.json") if (folder / "environment.json").is_file() else {}
    if isinstance(packages := environment.get("packages"), Mapping):
        environment["packages"] = {name: packages[name] for name in PACKAGES if name in packages}
    steps = {path.name.removesuffix(".done.json"): _load(path) for path in sorted(folder.glob("*.done.json"))}
    return _flatten({**environment, **steps})


def _evaluation(folder: Path | None, command: str) -> dict[str, Any]:
    """Table, curves and faces of an evaluation folder, for the template."""
    part: dict[str, Any] = {"folder": str(folder or ""), "command": command, "missing": True, "predictions": False}
    if folder is None or not (folder / "results.json").is_file():
        return part
    loaded = _load(folder / "results.json")
    results = loaded.get("runs", {})
    cells = {(r["level"], r["testset"], r["metric"], r["run"]): r for r in result_rows(results)}
    sets = testsets(results)
    counts = {}
    for level in levels(results):
        for name in sets:
            summary = next((s[name] for s in results.values() if level in (s.get(name) or {})), None)
            if summary:
                data, over = summary[level], summary["interval"]["over"]
                counts[level, name] = f"{data['real']} real, {data['fake']} fake, {data['clusters']} {over}s"
    part |= {
        "missing": not results, "made": _flatten(loaded.get("made", {})), "runs": list(results), "sets": sets,
        "levels": levels(results), "cells": cells, "counts": counts, "interval": interval_text(results),
    }  # fmt: skip
    if not (folder / "predictions.parquet").is_file():
        return part
    try:
        table = pd.read_parquet(folder / "predictions.parquet")
    except (ValueError, OSError) as error:
        raise DataError(f"{folder / 'predictions.parquet'} cannot be read ({error}); evaluate again") from error
    if missing := {"run", "testset", "path", "label", "score", "method"} - set(table):
        raise DataError(f"{folder / 'predictions.parquet'} lacks the columns {sorted(missing)}; evaluate again")
    table = table[np.isfinite(table["score"])]
    faces = []
    for (run, name), rows in table.groupby(["run", "testset"], sort=False):
        right = (rows["score"] >= 0.5) == (rows["label"] == 1)
        ranked = rows.assign(confidence=(rows["score"] - 0.5).abs(), right=right)
        ranked = ranked.sort_values(["confidence", "path"], ascending=[False, True])
        groups = [(ok, _faces(ranked[ranked["right"] == ok].head(FACES), folder)) for ok in (True, False)]
        faces.append({"run": run, "testset": name, "groups": groups, "wrong": int((~right).sum()), "n": len(rows)})
    return part | {
        "predictions": True, "roc": roc_figure(table), "histogram": histogram_figure(table), "faces": faces
    }  # fmt: skip


def _faces(rows: pd.DataFrame, folder: Path) -> list[dict[str, Any]]:
    faces = []
    for row in rows.to_dict("records"):
        path = Path(str(row["path"]))
        path = path if path.is_absolute() or path.is_file() else folder / path
        try:
            picture = _picture(path, 128)
        except OSError:
            picture = ""  # the template says that the picture is not here
        truth = f"fake · {row['method']}" if row["label"] == 1 else "real"
        faces.append({"picture": picture, "score": f"{100 * row['score']:.0f} %", "truth": truth, "file": path.name})
    return faces


def _picture(path: Path, side: int = 1600) -> str:
    """An image file as a data address, no larger than a side in pixels."""
    with Image.open(path) as image:
        picture = ImageOps.exif_transpose(image).convert("RGB")
    picture.thumbnail((side, side))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=84)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _load(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not readable JSON ({error}); run the command that writes it again") from error
    if not isinstance(loaded, dict):
        raise DataError(f"{path} must hold a JSON object, got {type(loaded).__name__}")
    return loaded


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested facts as flat text: ``{"versions": {"torch": "2.6"}}`` → ``{"versions · torch": "2.6"}``."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{str(key).replace('_', ' ')}"
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{name} · ")
        elif isinstance(value, Iterable) and not isinstance(value, str):
            flat[name] = ", ".join(map(str, value))
        else:
            flat[name] = f"{value:.4g}" if isinstance(value, float) else str(value)
    return flat


@hydra.main(version_base="1.3", config_path="pkg://fsvfm.configs", config_name="report")
@guard
def main(config: DictConfig) -> None:
    """Command line: all settings are in ``configs/report.yaml``."""
    settings: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    del settings["paths"]  # only there for the others to refer to
    path = write_report(**settings)
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
