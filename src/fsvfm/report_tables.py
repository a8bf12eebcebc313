"""Results as tables: JSON, CSV, Markdown and LaTeX.

A number that is absent stays visibly absent: a test set that could not be evaluated is a gap with its reason, and a
mean exists only where everything it is taken over has a value. Runs of different tasks have different metrics and are
never in one table. Published numbers stand beside ours, marked as such, and never enter a mean.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from fsvfm.errors import MetricError

#: Results of an evaluation: run name → test set → summary (of :func:`fsvfm.metrics.forgery.summarise` or
#: :func:`fsvfm.metrics.antispoof.summarise`), or a gap: ``{"gap": "why there is no number"}``.
Results = Mapping[str, Mapping[str, Mapping[str, Any]]]

LEVELS = ("frame", "video")
NAMES = {
    "hter": "HTER",
    "auc": "AUC",
    "eer": "EER",
    "ap": "AP",
    "accuracy": "Acc.",
    "balanced_accuracy": "Bal. acc.",
    "tpr_at_fpr_1": "TPR@FPR 1 %",
    "tpr_at_fpr_5": "TPR@FPR 5 %",
    "far": "FAR",
    "frr": "FRR",
    "threshold": "Threshold",
}
#: Values that are no shares: printed as they are, and no mean is taken of them.
PLAIN = ("threshold",)
#: What a detector costs, as evaluation stores it: key, heading, unit.
COSTS = (("parameters", "parameters, M", 1e6), ("trained", "trained, M", 1e6), ("gflops", "GFLOPs", 1.0))
#: Errors; of everything else more is better.
LOWER_IS_BETTER = ("hter", "eer", "far", "frr")


# ---------------------------------------------------------------- numbers


class Family(NamedTuple):
    """Runs and test sets that share their metrics, in the order of the results."""

    metrics: tuple[str, ...]
    definitions: dict[str, str]
    results: Results

    @property
    def title(self) -> str:
        """The task, in words."""
        return "Face anti-spoofing" if "hter" in self.metrics else "Forgery detection"

    @property
    def attack(self) -> str:
        """What label 1 is called."""
        return "attack" if "hter" in self.metrics else "fake"

    @property
    def headlines(self) -> list[str]:
        """The metrics that the papers' tables show."""
        shown = ("hter", "auc", "tpr_at_fpr_1") if "hter" in self.metrics else ("auc",)
        return [name for name in shown if name in self.metrics] or list(self.metrics[:1])

    @property
    def headline_levels(self) -> list[str]:
        """The levels that the papers' tables show: anti-spoofing is decided by video."""
        return ["video"] if "hter" in self.metrics else self.levels

    @property
    def levels(self) -> list[str]:
        """The levels worth a table: frame, and video where a video has more than one frame anywhere."""
        found = [s for _, _, s in _summaries(self.results) if "frame" in s and "video" in s]
        return list(LEVELS) if any(s["video"]["n"] != s["frame"]["n"] for s in found) else ["frame"]


def _summaries(results: Results) -> Iterable[tuple[str, str, Mapping[str, Any]]]:
    return ((run, name, summary or {}) for run, by_set in results.items() for name, summary in by_set.items())


def _metrics(summary: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(m for level in LEVELS for m in summary.get(level, {}).get("metrics", {})))


def families(results: Results) -> list[Family]:
    """Split results by their metrics; a gap goes where its run, else its test set, has numbers."""
    kind = {(run, name): _metrics(summary) for run, name, summary in _summaries(results)}
    known = list(dict.fromkeys(filter(None, kind.values()))) or [("auc",)]

    def belongs(run: str, name: str) -> tuple[str, ...]:
        beside = [k for (r, _), k in kind.items() if k and r == run] + [
            k for (_, n), k in kind.items() if k and n == name
        ]
        return kind[run, name] or (beside or known)[0]

    found = []
    for metrics in known:
        part: dict[str, dict[str, Mapping[str, Any]]] = {}
        definitions: dict[str, str] = {}
        for run, name, summary in _summaries(results):
            if belongs(run, name) == metrics:
                part.setdefault(run, {})[name] = summary
                definitions |= {m: text for m, text in summary.get("definitions", {}).items() if m in metrics}
        found.append(Family(metrics, definitions, part))
    return found


def testsets(results: Results) -> list[str]:
    """Names of all test sets of any run, in order of appearance."""
    names = list(dict.fromkeys(name for by_set in results.values() for name in by_set))
    if "mean" in names:
        raise MetricError("a test set cannot be called 'mean': the tables use that name for the mean over test sets")
    return names


testsets.__test__ = False  # type: ignore[attr-defined]  # not a pytest test


def _value(cell: Any, gap: str) -> dict[str, Any]:
    """A number or ``{"value", "low", "high"}`` as such, or a gap."""
    cell = cell if isinstance(cell, Mapping) else {"value": cell}
    if cell.get("value") is None:
        return {"value": None, "low": None, "high": None, "gap": str(cell.get("gap") or gap)}
    return {key: cell.get(key) for key in ("value", "low", "high")} | {"gap": ""}


def _mean(cells: Sequence[Mapping[str, Any]], what: str) -> dict[str, Any]:
    """The mean of all cells, or a gap if one of them has no value."""
    values = [cell["value"] for cell in cells if cell["value"] is not None]
    if len(values) < len(cells):
        return _value(None, f"{len(values)} of {len(cells)} {what} have a value")
    return _value(float(np.mean(values)), "")


def result_rows(results: Results) -> list[dict[str, Any]]:
    """One row per run, test set, level and metric; gaps and means over test sets included.

    Returns:
        Rows with ``run``, ``testset`` (``mean`` for the mean over sets), ``method`` (always empty, see
        :func:`method_rows`), ``level`` (frame, video), ``metric``, ``value``, ``low``, ``high`` (fractions or None),
        ``n``, ``real``, ``fake`` (samples), ``gap`` (why there is no value, else empty). A mean has a value only if
        every test set of any run with these metrics has one for this run.
    """
    testsets(results)
    rows = []
    for family in families(results):
        sets = testsets(family.results)
        for run, by_set in family.results.items():
            for level in LEVELS:
                for metric in family.metrics:
                    summaries = {name: by_set.get(name) or {"gap": "not evaluated"} for name in sets}
                    found = [
                        _row(run, name, "", level, metric, summary, str(summary.get("gap") or ""))
                        for name, summary in summaries.items()
                    ]
                    rows += found
                    if len(sets) > 1:
                        mean = _value(None, "not averaged") if metric in PLAIN else _mean(found, "sets")
                        count = sum(row["value"] is not None for row in found)
                        where = {"run": run, "testset": "mean", "method": "", "level": level, "metric": metric}
                        rows.append({**where, **mean, "n": count, "real": None, "fake": None})
    return rows


def method_rows(results: Results) -> list[dict[str, Any]]:
    """Rows as of :func:`result_rows` for single methods: each method's fakes against all reals of its test set."""
    return [
        _row(run, name, method, level, metric, part, "")
        for family in families(results)
        for run, name, summary in _summaries(family.results)
        for method, part in summary.get("method", {}).items()
        for level in LEVELS
        for metric in family.metrics
    ]


def _row(
    run: str, name: str, method: str, level: str, metric: str, summary: Mapping[str, Any], gap: str
) -> dict[str, Any]:
    part = summary.get(level, {})
    row = {"run": run, "testset": name, "method": method, "level": level, "metric": metric}
    row |= _value(part.get("metrics", {}).get(metric), gap or f"no {level}-level {metric}")
    count = 0 if row["gap"] else part["n"]
    return row | {"n": count, "real": part.get("real"), "fake": part.get("fake", part.get("attack"))}


def robustness_rows(results: Results) -> list[dict[str, Any]]:
    """One row per run, test set, metric, corruption and severity, at frame level; means included.

    Returns:
        Rows with ``run``, ``testset``, ``metric``, ``corruption`` (``clean`` for the test set as it is, ``mean`` over
        all corruptions), ``severity`` (``0`` clean, ``1`` to ``5``, ``mean`` over all severities), ``value``, ``low``,
        ``high``, ``gap``. A mean has a value only if every corruption or severity of any run has one. Empty if nothing
        was corrupted.
    """
    rows: list[dict[str, Any]] = []
    for family in families(results):
        curves = [s["robustness"] for _, _, s in _summaries(family.results) if s.get("robustness")]
        corruptions = list(dict.fromkeys(name for curve in curves for name in curve))
        severities = sorted({s for curve in curves for by_level in curve.values() for s in by_level}, key=int)
        cells = [cell for curve in curves for by_level in curve.values() for cell in by_level.values()]
        metrics = [m for m in family.metrics if any(m in cell for cell in cells)]
        for run, name, summary in _summaries(family.results) if curves else ():
            curve = summary.get("robustness") or {}
            gap = str(summary.get("gap") or "not evaluated on corrupted images")
            for metric in metrics:
                where = {"run": run, "testset": name, "metric": metric}

                def add(corruption: str, severity: str, cell: dict[str, Any], where: dict = where) -> dict[str, Any]:
                    rows.append({**where, "corruption": corruption, "severity": severity, **cell})
                    return cell

                add("clean", "0", _value(summary.get("frame", {}).get("metrics", {}).get(metric), gap))
                table = {}
                for corruption in corruptions:
                    found = [curve.get(corruption, {}).get(severity, {}) for severity in severities]
                    line = [_value(c.get(metric), str(c.get("gap") or gap)) for c in found]
                    line = [add(corruption, s, cell) for s, cell in zip(severities, line, strict=True)]
                    table[corruption] = [*line, add(corruption, "mean", _mean(line, "severities"))]
                for index, severity in enumerate([*severities, "mean"]):
                    add("mean", severity, _mean([line[index] for line in table.values()], "corruptions"))
    return rows


def calibration_rows(results: Results) -> list[dict[str, Any]]:
    """Calibration errors and stored thresholds of every run on every test set, at frame level.

    Returns:
        Rows with ``run``, ``testset``, ``threshold`` (its name, empty for the calibration itself), ``quantity``
        (ece_before, ece_after, temperature; threshold, fpr, fnr, balanced_accuracy), ``value``, ``low``, ``high``,
        ``gap``. Empty where nothing was calibrated.
    """
    rows = []
    for run, name, summary in _summaries(results):
        fitted = summary.get("calibration") or {}
        parts: list[tuple[str, Mapping[str, Any], Sequence[str]]] = []
        if fitted:
            parts.append(("", fitted, ("ece_before", "ece_after", "temperature")))
        points = summary.get("operating") or {}
        parts += [(key, point, ("threshold", "fpr", "fnr", "balanced_accuracy")) for key, point in points.items()]
        for key, values, quantities in parts:
            for quantity in quantities:
                cell = _value(values.get(quantity), f"no {quantity}")
                rows.append({"run": run, "testset": name, "threshold": key, "quantity": quantity, **cell})
    return rows


# ---------------------------------------------------------------- tables of text, for Markdown, LaTeX and the page


class Row(NamedTuple):
    """Cells of a table; ``kind`` is ``published``, ``matched`` (ours, beside its published row) or empty."""

    cells: list[str]
    kind: str = ""


class Table(NamedTuple):
    """A table of text; the first ``text`` columns hold words, the others numbers."""

    title: str
    head: list[str]
    rows: list[Row]
    text: int
    about: str = ""


def percent(row: Mapping[Any, Any], dash: str = "–") -> str:
    """``91.4 [88.0–94.2]`` in per cent, without brackets where there is no interval, ``—`` for a gap."""
    if row["value"] is None:
        return "—"
    plain = row.get("metric", row.get("quantity")) in (*PLAIN, "temperature")
    show: Callable[[float], str] = (lambda v: f"{v:.6g}") if plain else (lambda v: f"{100 * v:.1f}")
    text = show(row["value"])
    return text if row["low"] is None else f"{text} [{show(row['low'])}{dash}{show(row['high'])}]"


def metric_name(metric: str) -> str:
    """How a metric is called in tables."""
    return NAMES.get(metric, metric.replace("_", " "))


def threshold_name(name: str) -> str:
    """``fpr_1`` → ``FPR 1 %``, ``eer`` → ``EER``."""
    found = re.fullmatch(r"(fpr|fnr)_(\d+)", name)
    return f"{found[1].upper()} {found[2]} %" if found else name.upper() if len(name) <= 4 else name.replace("_", " ")


def comparison_table(family: Family, costs: Mapping[str, Mapping[str, float]]) -> Table | None:
    """Size, cost and headline metric of every run side by side, or None where no size is known."""
    if not any(run in costs for run in family.results):
        return None
    level, metric = family.headline_levels[-1], "auc" if "auc" in family.metrics else family.headlines[0]
    sets = testsets(family.results)
    columns = [*sets, *(["mean"] if len(sets) > 1 else [])]
    shown = (r for r in result_rows(family.results) if (r["level"], r["metric"]) == (level, metric))
    cells = {(row["run"], row["testset"]): row for row in shown}
    rows = []
    for run in family.results:
        found = costs.get(run) or {}
        size = ["—" if key not in found else f"{found[key] / unit:.4g}" for key, _, unit in COSTS]
        rows.append(Row([run, *size, *(percent(cells[run, name]) for name in columns)]))
    head = ["run", *(title for _, title, _ in COSTS), *(f"{metric_name(metric)}, {name}" for name in columns)]
    about = (
        f"{metric_name(metric)} at {level} level, per cent. Parameters in millions: all, and those that were trained. "
        "GFLOPs: 10⁹ operations of one forward pass for one image, a multiplication with an addition counting as two."
    )
    return Table("Comparison", head, rows, 1, about)


def level_tables(family: Family) -> list[Table]:
    """All metrics of every run on every test set, one table per level."""
    frame = pd.DataFrame(result_rows(family.results))
    tables = []
    for level in family.levels:
        rows = []
        part = frame[frame["level"] == level].astype(object).replace({np.nan: None})
        for (run, name), group in part.groupby(["run", "testset"], sort=False):
            cells = group.set_index("metric", drop=False).to_dict("index")
            first = next(iter(cells.values()))
            label = f"{name} ({first['gap']})" if first["gap"] else str(name)
            count = "" if name == "mean" else str(first["n"])
            rows.append(Row([str(run), label, count, *(percent(cells[m]) for m in family.metrics)]))
        head = ["run", "test set", "n", *map(metric_name, family.metrics)]
        tables.append(Table(f"{level.capitalize()} level", head, rows, 2))
    return tables


def method_table(family: Family) -> Table | None:
    """Headline metrics of every method where a test set has several, else None."""
    kept = {
        run: {name: s for name, s in by_set.items() if len((s or {}).get("method", {})) > 1}
        for run, by_set in family.results.items()
    }
    cells = {
        (r["run"], r["testset"], r["method"], r["level"], r["metric"]): r
        for r in method_rows(kept)
        if any(kept.values())
    }
    if not cells:
        return None
    columns = [(level, metric) for metric in family.headlines for level in family.levels]
    rows = []
    for run, name, method in dict.fromkeys(key[:3] for key in cells):
        of = [cells[run, name, method, level, metric] for level, metric in columns]
        counts = [cells[run, name, method, level, family.metrics[0]]["fake"] for level in family.levels]
        count = " / ".join("—" if n is None else str(n) for n in counts)
        rows.append(Row([run, name, method, count, *map(percent, of)]))
    names = [f"{metric_name(m)}{f', {level}' if len(family.levels) > 1 else ''}" for level, m in columns]
    head = ["run", "test set", "method", f"{family.attack}s ({' / '.join(f'{level}s' for level in family.levels)})"]
    return Table("By method", [*head, *names], rows, 3, f"Each method's {family.attack}s against all reals of its set.")


def headline_tables(family: Family, published: Sequence[Mapping[str, Any]]) -> list[Table]:
    """One table per headline metric and level, test sets as columns; published rows first, where there are any.

    Our mean exists only where we have a value for every column; the published mean is the published one. A run whose
    name is a published row's ``experiment`` is marked as matched and followed by its difference in points.
    """
    ours = {(r["level"], r["metric"], r["run"], r["testset"]): r for r in result_rows(family.results)}
    sets = testsets(family.results)
    theirs = related(published, family.metrics, sets)
    pairs = [(level, metric) for metric in family.headlines for level in family.headline_levels]
    tables = []
    for level, metric in dict.fromkeys([*pairs, *((p["level"], p["metric"]) for p in theirs)]):
        beside = [p for p in theirs if (p["level"], p["metric"]) == (level, metric)]
        columns = list(dict.fromkeys([*(name for p in beside for name in p.get("values") or {}), *sets]))
        averaged = metric not in PLAIN and (len(columns) > 1 or any(p.get("mean") is not None for p in beside))
        rows = [published_row(entry, columns, averaged) for entry in beside]
        for run in family.results:
            found = [ours.get((level, metric, run, name)) or {"value": None, "low": None} for name in columns]
            match = next((p for p in beside if p.get("experiment") == run), None)
            mean = [_mean(found, "sets")] if averaged else []
            rows.append(Row([run, *map(percent, [*found, *mean])], "matched" if match else ""))
            if match:
                values = list(published_values(match, columns).values())
                away = [
                    "—" if c["value"] is None or v is None else f"{100 * c['value'] - v:+.1f}"
                    for c, v in zip([*found, *mean], values, strict=False)
                ]
                rows.append(Row([f"{run} − {match['method']}, points", *away], "difference"))
        head = ["run", *columns, *(["mean"] if averaged else [])]
        tables.append(Table(f"{metric_name(metric)}, {level} level", head, rows, 1))
    return tables


def related(
    published: Sequence[Mapping[str, Any]], metrics: Sequence[str], sets: Sequence[str]
) -> list[Mapping[str, Any]]:
    """The published rows about these metrics and test sets; rows with nothing but a mean are kept."""
    return [p for p in published if p["metric"] in metrics and (not p.get("values") or {*p["values"]} & {*sets})]


def published_row(entry: Mapping[str, Any], columns: Sequence[str], averaged: bool, blank: int = 0) -> Row:
    """A row marked as published, with ``blank`` empty cells after its name."""
    values = published_values(entry, columns)
    cells = [short(values[name]) for name in [*columns, "mean"][: len(columns) + averaged]]
    return Row([f"{entry['method']} (published: {entry['source']})", *[""] * blank, *cells], "published")


def published_values(entry: Mapping[str, Any], columns: Sequence[str]) -> dict[str, float | None]:
    """A published row's values by column; its mean only if it is over these columns, or stands alone."""
    values = {name: (entry.get("values") or {}).get(name) for name in columns}
    whole = not entry.get("values") or all(value is not None for value in values.values())
    return {**values, "mean": entry.get("mean") if whole else None}


def short(value: float | None) -> str:
    """A published number as it was printed, ``—`` for none."""
    return "—" if value is None else f"{value:g}"


def calibration_tables(results: Results) -> list[Table]:
    """Calibration errors, and what the stored thresholds do on each test set; empty where nothing was calibrated."""
    rows = calibration_rows(results)
    sources = {
        (run, name): s["calibration"].get("source", "") for run, name, s in _summaries(results) if s.get("calibration")
    }
    by_part: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        by_part.setdefault((row["run"], row["testset"], row["threshold"]), []).append(percent(row))
    fitted = [Row([run, name, sources[run, name], *cells]) for (run, name, key), cells in by_part.items() if not key]
    points = [Row([run, name, threshold_name(key), *cells]) for (run, name, key), cells in by_part.items() if key]
    tables = []
    if fitted:
        head = ["run", "test set", "fitted on", "ECE before", "ECE after", "temperature"]
        about = "Expected calibration error at frame level, before and after dividing the logit by the temperature."
        tables.append(Table("Calibration", head, fitted, 3, about))
    if points:
        head = ["run", "test set", "threshold for", "score", "FPR", "FNR", "Bal. acc."]
        about = "Thresholds on the calibrated score, chosen on validation data, and their error rates on these sets."
        tables.append(Table("Stored thresholds", head, points, 3, about))
    return tables


def robustness_table(results: Results) -> Table | None:
    """AUC (or what there is instead) under every corruption and severity, or None if nothing was corrupted."""
    rows = robustness_rows(results)
    if not rows:
        return None
    metric = "auc" if any(row["metric"] == "auc" for row in rows) else rows[0]["metric"]
    lines: dict[tuple[str, str], dict[str, dict[str, dict[str, Any]]]] = {}
    for row in rows:
        if row["metric"] == metric:
            line = lines.setdefault((row["run"], row["testset"]), {}).setdefault(row["corruption"], {})
            line[row["severity"]] = row
    severities = sorted({row["severity"] for row in rows} - {"0", "mean"}, key=int)
    shown = []
    for (run, name), by_corruption in lines.items():
        found = [cell for line in by_corruption.values() for cell in line.values()]
        if all(cell["value"] is None for cell in found):
            shown.append(Row([run, f"{name} ({found[0]['gap']})", "all", *["—"] * (len(severities) + 2)]))
            continue
        clean = percent(by_corruption.pop("clean")["0"])
        for corruption, line in by_corruption.items():
            cells = [percent(line[severity]) for severity in [*severities, "mean"]]
            shown.append(Row([run, name, corruption.replace("_", " "), clean, *cells]))
    head = ["run", "test set", "corruption", "clean", *severities, "mean"]
    about = (
        f"{metric_name(metric)} at frame level by severity, mild to severe; a mean exists only where all have a value."
    )
    return Table("Robustness", head, shown, 3, about)


def corruption_legend(results: Results) -> dict[str, str]:
    """What was done to the images and how much, for the corruptions that results hold."""
    names = {name: None for _, _, summary in _summaries(results) for name in summary.get("robustness") or {}}
    if not names:
        return {}
    from fsvfm.data.corruptions import CORRUPTIONS  # brings video coding along: only where it is needed

    return {
        name.replace("_", " "): f"{CORRUPTIONS[name].about}; {CORRUPTIONS[name].unit}: "
        + ", ".join(f"{value:g}" for value in CORRUPTIONS[name].values)
        for name in names
        if name in CORRUPTIONS
    }


# ---------------------------------------------------------------- files


def write_tables(folder: str | Path, results: Results, *, made: Mapping[str, Any] | None = None) -> list[Path]:
    """Write ``results.json``, ``.csv``, ``.md`` and ``.tex`` into a folder, each atomically.

    Where there is something to put into them, ``robustness.csv``, ``calibration.csv``, ``costs.csv`` are written too.

    Args:
        folder: made if absent.
        results: see :data:`Results`.
        made: what made them (versions, time, seeds), stored in the JSON; ``notes`` (what a reader must know), ``costs``
            (run → :data:`COSTS`) and
            ``published`` (rows of papers: method, experiment, level, metric, values and mean in per cent, source) are
            shown in the tables.

    Returns:
        The files written.

    Raises:
        MetricError: there are no results, a test set is called ``mean``, or a number is not finite.
    """
    if not any(results.values()):
        raise MetricError("there are no results to write; evaluate at least one run on one test set")
    made = dict(made or {})
    try:
        text = json.dumps({"runs": results, "made": made}, indent=1, allow_nan=False)
    except ValueError as error:
        raise MetricError(f"the results hold a number that is not finite ({error}); report it as a gap") from error
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = result_rows(results) + method_rows(results)
    files: dict[str, str | None] = {
        "results.json": text + "\n",
        "results.csv": pd.DataFrame(rows).to_csv(index=False),
        "results.md": _results_markdown(results, made),
        "results.tex": _results_latex(results, made),
    }
    costs = [{"run": run, **found} for run, found in (made.get("costs") or {}).items()]
    for name, more in (
        ("robustness.csv", robustness_rows(results)), ("calibration.csv", calibration_rows(results)),
        ("costs.csv", costs),
    ):  # fmt: skip
        files[name] = pd.DataFrame(more).to_csv(index=False) if more else None
    for name, content in files.items():
        if content is None:
            (folder / name).unlink(missing_ok=True)  # of an earlier evaluation
        else:
            write_text(folder / name, content)
    return [folder / name for name, content in files.items() if content is not None]


def write_text(path: Path, content: str) -> None:
    """Write a text file under a temporary name, then rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(content, encoding="utf-8")
    temporary.replace(path)


def interval_text(results: Results) -> str:
    """How the intervals were made, in words."""
    for _, _, summary in _summaries(results):
        if (interval := summary.get("interval")) and interval["replicates"]:
            return (
                f"In brackets: {100 * interval['level']:g} % intervals, {interval['kind']} over "
                f"{interval['over']}s, {interval['replicates']} replicates, seed {interval['seed']}."
            )
    return "No intervals were asked for."


def notes(made: Mapping[str, Any]) -> list[str]:
    """What a reader of the numbers must know, each on one line."""
    return [" ".join(str(note).split()) for note in made.get("notes") or []]


PUBLISHED = "Published rows are copied from their source; they were not measured here."


def markdown(table: Table) -> list[str]:
    """Lines of a Markdown table; published rows in italics, matched ones bold."""
    marks = {"published": "*", "matched": "**"}

    def line(cells: Iterable[str], mark: str = "") -> str:
        escaped = (cell.replace("|", "\\|") for cell in cells)
        return "| " + " | ".join(f"{mark}{cell}{mark}" if cell else "" for cell in escaped) + " |"

    align = "|" + "---|" * table.text + "--:|" * (len(table.head) - table.text)
    return [line(table.head), align, *(line(row.cells, marks.get(row.kind, "")) for row in table.rows)]


def latex(table: Table) -> list[str]:
    """Lines of a LaTeX tabular (booktabs); published rows in italics above a rule, matched ones bold."""

    def escape(text: str) -> str:
        text = re.sub(r"([_&%#$])", r"\\\1", text)
        return (
            text.replace("—", "---")
            .replace("–", "--")
            .replace("−", "$-$")
            .replace("±", "$\\pm$")
            .replace("†", "$\\dagger$")
            .replace("Δ", "$\\Delta$")
            .replace("<", "$<$")
        )

    def line(cells: Iterable[str], mark: str = "") -> str:
        return " & ".join(f"\\{mark}{{{cell}}}" if mark and cell else cell for cell in map(escape, cells)) + r" \\"

    marks = {"published": "textit", "matched": "textbf"}
    columns = "l" * table.text + "r" * (len(table.head) - table.text)
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", line([table.head[0].capitalize(), *table.head[1:]])]
    lines.append(r"\midrule")
    for before, row in zip([None, *table.rows], table.rows, strict=False):
        if before and before.kind == "published" != row.kind:
            lines.append(r"\midrule")
        lines.append(line(row.cells, marks.get(row.kind, "")))
    return [*lines, r"\bottomrule", r"\end{tabular}"]


def _results_markdown(results: Results, made: Mapping[str, Any]) -> str:
    lines = ["# Results", ""]
    lines += [line for note in notes(made) for line in (f"> **Note.** {note}", "")]
    lines += ["Per cent; score = P(fake or attack). " + interval_text(results), ""]
    split = families(results)
    for family in split:
        if len(split) > 1:
            lines += [f"# {family.title}", ""]
        beside = [t for t in headline_tables(family, made.get("published") or []) if any(r.kind for r in t.rows)]
        tables: list[Table | None] = [
            comparison_table(family, made.get("costs") or {}),
            *level_tables(family),
            *(t._replace(title=f"Beside published numbers: {t.title}", about=PUBLISHED) for t in beside),
            method_table(family),
            *calibration_tables(family.results),
            robustness_table(family.results),
        ]
        for table in filter(None, tables):
            lines += [f"## {table.title}", "", *([table.about, ""] if table.about else []), *markdown(table), ""]
        if legend := corruption_legend(family.results):
            lines += [*(f"- **{name}**: {text}." for name, text in legend.items()), ""]
        lines += [f"- **{metric_name(name)}**: {text}." for name, text in family.definitions.items()] + [""]
    return "\n".join(lines).rstrip() + "\n"


def _results_latex(results: Results, made: Mapping[str, Any]) -> str:
    lines = [f"% {note}" for note in notes(made)] + ["% Per cent. " + interval_text(results)]
    for family in families(results):
        tables = headline_tables(family, made.get("published") or [])
        if any(row.kind == "published" for table in tables for row in table.rows):
            lines.append(f"% {PUBLISHED}")
        if compared := comparison_table(family, made.get("costs") or {}):
            lines.append(f"% {compared.about}")
            tables = [compared, *tables]
        for table in tables:
            lines += [f"% {table.title}", *latex(table)]
    return "\n".join(lines) + "\n"
