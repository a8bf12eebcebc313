"""One self-contained page about runs and their evaluation, or the table of a sweep: ``python -m fsvfm.report``.

python -m fsvfm.report [pretrain=<run folder>] [runs={name: <run folder>}] [evaluation=<folder>] [out=report.html]
python -m fsvfm.report sweep=<folder of run folders, or globs> [by=[model.name]] [reference={key: value}] [out=<folder>]
"""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from omegaconf import DictConfig, OmegaConf
from PIL import Image, ImageOps

from fsvfm import cli
from fsvfm.errors import DataError
from fsvfm.report_figures import (
    histogram_figure,
    methods_figure,
    reliability_figure,
    robustness_figure,
    roc_figure,
    training_figure,
)
from fsvfm.report_tables import (
    PUBLISHED,
    Family,
    calibration_tables,
    comparison_table,
    corruption_legend,
    families,
    headline_tables,
    interval_text,
    method_rows,
    method_table,
    metric_name,
    notes,
    percent,
    result_rows,
    robustness_rows,
    robustness_table,
    testsets,
    write_tables,
    write_text,
)

__all__ = ["main", "percent", "result_rows", "write_report", "write_tables"]

MAX_PANELS = 6
#: Of all packages of an environment, those a reader looks for.
PACKAGES = ("fsvfm", "torch", "pytorch-lightning", "timm", "numpy")
FACES = 6


def write_report(
    out: str | Path,
    *,
    pretrain: str | Path | None,
    runs: Mapping[str, str | Path],
    evaluation: str | Path | None,
    commands: Mapping[str, str] | None = None,
    title: str = "Face forgery detection",
    notice: str | None = None,
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
        notice: what a reader must know first; the evaluation's own notes follow it.

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
        title=title, notice=notice, now=f"{datetime.now():%Y-%m-%d %H:%M}", parts=parts, evaluation=found,
        metric_name=metric_name, percent=percent,
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
    for long in ("overrides", "data", "earlier"):  # the command says it, or only the file does
        environment.pop(long, None)
    if isinstance(packages := environment.get("packages"), Mapping):
        environment["packages"] = {name: packages[name] for name in PACKAGES if name in packages}
    steps = {path.name.removesuffix(".done.json"): _load(path) for path in sorted(folder.glob("*.done.json"))}
    return _flatten({**environment, **steps})


def _evaluation(folder: Path | None, command: str) -> dict[str, Any]:
    """Tables, curves and faces of an evaluation folder, for the template."""
    part: dict[str, Any] = {
        "folder": str(folder or ""), "command": command, "missing": True, "predictions": False, "notes": []
    }  # fmt: skip
    if folder is None or not (folder / "results.json").is_file():
        return part
    loaded = _load(folder / "results.json")
    results, made = loaded.get("runs", {}), loaded.get("made", {})
    published = made.get("published") or []
    split = families(results) if results else []
    sets = testsets(results)
    rows = robustness_rows(results)
    part |= {
        "missing": not results,
        "made": _flatten({key: value for key, value in made.items() if key not in ("published", "notes", "costs")}),
        "notes": notes(made),
        "interval": interval_text(results),
        "families": [_family(family, published, made.get("costs") or {}) for family in split],
        "published": PUBLISHED,
        "calibration": calibration_tables(results),
        "reliability": reliability_figure(results),
        "robustness": robustness_table(results),
        "corruptions": corruption_legend(results),
        "robustness_figures": [(name, robustness_figure(rows, name)) for name in sets if rows],
    }
    if not (folder / "predictions.parquet").is_file():
        return part
    try:
        table = pd.read_parquet(folder / "predictions.parquet")
    except (ValueError, OSError) as error:
        raise DataError(f"{folder / 'predictions.parquet'} cannot be read ({error}); evaluate again") from error
    if missing := {"run", "testset", "path", "label", "score", "method"} - set(table):
        raise DataError(f"{folder / 'predictions.parquet'} lacks the columns {sorted(missing)}; evaluate again")
    table = table[np.isfinite(table["score"])]
    attack = {(run, name): f.attack for f in split for run, by_set in f.results.items() for name in by_set}
    faces = []
    for (run, name), group in table.groupby(["run", "testset"], sort=False):
        right = (group["score"] >= 0.5) == (group["label"] == 1)
        ranked = group.assign(confidence=(group["score"] - 0.5).abs(), right=right)
        ranked = ranked.sort_values(["confidence", "path"], ascending=[False, True])
        word = attack.get((run, name), "fake")
        groups = [(ok, _faces(ranked[ranked["right"] == ok].head(FACES), folder, word)) for ok in (True, False)]
        faces.append({"run": run, "testset": name, "groups": groups, "wrong": int((~right).sum()), "n": len(group)})
    word = "fake" if "fake" in attack.values() or not attack else "attack"
    return part | {
        "predictions": True, "roc": roc_figure(table, word), "histogram": histogram_figure(table, word), "faces": faces
    }  # fmt: skip


def _family(
    family: Family, published: list[Mapping[str, Any]], costs: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    """The tables of runs that share their metrics, for the template."""
    sets = testsets(family.results)
    counts = {}
    for level in family.levels:
        for name in sets:
            summary = next((s[name] for s in family.results.values() if level in (s.get(name) or {})), None)
            if summary:
                data = summary[level]
                over = f", {data['clusters']} {summary['interval']['over']}s" if "interval" in summary else ""
                fakes = data.get("fake", data.get("attack"))
                counts[level, name] = f"{data.get('real')} real, {fakes} {family.attack}{over}"
    of_methods = method_table(family)
    rows = method_rows(family.results) if of_methods else []
    level, metric = family.levels[-1], "auc" if "auc" in family.metrics else family.headlines[0]
    return {
        "title": family.title, "metrics": family.metrics, "definitions": family.definitions, "levels": family.levels,
        "runs": list(family.results), "sets": sets, "counts": counts, "headline": family.headlines[0],
        "cells": {(r["level"], r["testset"], r["metric"], r["run"]): r for r in result_rows(family.results)},
        "beside": [t for t in headline_tables(family, published) if any(row.kind for row in t.rows)],
        "comparison": comparison_table(family, costs),
        "methods": of_methods, "methods_figure": methods_figure(rows, level, metric),
    }  # fmt: skip


def _faces(rows: pd.DataFrame, folder: Path, attack: str) -> list[dict[str, Any]]:
    faces = []
    for row in rows.to_dict("records"):
        path = Path(str(row["path"]))
        path = path if path.is_absolute() or path.is_file() else folder / path
        try:
            picture = _picture(path, 128)
        except OSError:
            picture = ""  # the template says that the picture is not here
        truth = f"{attack} · {row['method']}" if row["label"] == 1 else "real"
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


@cli.command("report")
def main(config: DictConfig) -> None:
    """Command line: all settings are in ``configs/report.yaml``."""
    settings: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    del settings["paths"]  # only there for the others to refer to
    sweep, by, reference, replicates, out = (
        settings.pop(key) for key in ("sweep_folder", "by", "reference", "replicates", "out")
    )
    if sweep is not None:
        from fsvfm.sweeps import collect, describe, write_sweep

        found = collect(sweep, by=by, reference=reference, replicates=replicates)
        files = write_sweep(out or found.folder, found)
        print(describe(found))
        print("wrote " + ", ".join(map(str, files)))
        return
    path = write_report(out or "report.html", **settings)
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")


def start() -> None:
    """:func:`main`; here ``sweep=`` is a folder, where Hydra would look for an option of `fsvfm.train`'s group."""
    sys.argv[1:] = [re.sub("^sweep=", "sweep_folder=", word) for word in sys.argv[1:]]
    main()


if __name__ == "__main__":
    start()
