"""Figures of the report as inline SVG that takes its text colour from the page, so that it reads light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from fsvfm.errors import MetricError
from fsvfm.metrics.forgery import metric, roc_points, video_scores

#: Mid-tones that keep a contrast of 3:1 on white and on near-black, told apart by colour-blind eyes too.
COLOURS = ("#2f7ed8", "#d97706", "#129675", "#b8509e", "#7a6ff0", "#8a8a2a")
#: Drawn instead of black, then replaced by the page's text colour.
_INK = "#010203"
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fsvfm",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.color": "#808080",
    "legend.frameon": False,
    "legend.fontsize": 9,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
}


def png(figure: Figure) -> Image.Image:
    """A figure as an RGB picture on white, for loggers."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format="png", dpi=100, facecolor="white", bbox_inches="tight")
    return Image.open(buffer).convert("RGB")


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    # Without a fixed size the picture scales with its column, up to its natural width.
    text = re.sub(r'^<svg([^>]*?) height="[^"]*"', r"<svg\1", text)
    width = f'style="max-width: {figure.get_figwidth() * 96:.0f}px"'
    text = re.sub(r'^<svg([^>]*?) width="[^"]*"', rf"<svg\1 {width}", text)
    return text.replace(_INK, "currentColor")


def _panels(count: int, height: float = 3.5) -> tuple[Figure, list]:
    columns = 2 if count in (2, 4) else min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(4.2 * columns, height * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).ravel())


def draw_roc(table: pd.DataFrame, attack: str = "fake") -> Figure:
    """ROC curves, one panel per test set, one line per run, on video scores where videos have several frames.

    Args:
        table: predictions with ``run``, ``testset``, ``label``, ``score`` and optionally ``video``.
        attack: what label 1 is called.
    """
    with matplotlib.rc_context(_STYLE):
        sets, runs = list(table["testset"].unique()), list(table["run"].unique())
        figure, axes = _panels(max(1, len(sets)))
        for axis, name in zip(axes, sets, strict=False):
            axis.plot([0, 1], [0, 1], color="#808080", linewidth=1, linestyle=":")
            level = "image"
            for run in runs:
                part = table[(table["testset"] == name) & (table["run"] == run)]
                scores, labels = part["score"].to_numpy(), part["label"].to_numpy()
                try:
                    if "video" in part and part["video"].nunique() < len(part):
                        _, scores, labels = video_scores(scores, part["video"], labels)
                        level = "video"
                    fpr, tpr, _ = roc_points(scores, labels)
                    label = f"{run}: AUC {100 * metric('auc', scores, labels):.1f} %"
                except MetricError:
                    axis.plot([], [], color=COLOURS[runs.index(run) % len(COLOURS)], label=f"{run}: no curve")
                    continue
                axis.plot(fpr, tpr, color=COLOURS[runs.index(run) % len(COLOURS)], linewidth=2, label=label)
            axis.set(
                title=f"{name} ({level} level)", xlabel=f"reals called {attack} (FPR)", ylabel=f"{attack}s found (TPR)"
            )
            axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
            axis.legend(loc="lower right")
        for axis in axes[len(sets) :]:
            axis.set_visible(False)
        return figure


def roc_figure(table: pd.DataFrame, attack: str = "fake") -> str:
    """:func:`draw_roc` as inline SVG."""
    with matplotlib.rc_context(_STYLE):
        return _svg(draw_roc(table, attack))


def histogram_figure(table: pd.DataFrame, attack: str = "fake") -> str:
    """Histograms of the score for reals and fakes, one panel per run and test set; inline SVG (arguments as above)."""
    with matplotlib.rc_context(_STYLE):
        groups = list(table.groupby(["testset", "run"], sort=False))
        figure, axes = _panels(max(1, len(groups)))
        for axis, ((name, run), part) in zip(axes, groups, strict=False):
            for label, word, colour in ((0, "real", COLOURS[2]), (1, attack, COLOURS[3])):
                scores = part.loc[part["label"] == label, "score"]
                axis.hist(scores, bins=20, range=(0, 1), color=colour, alpha=0.6, label=f"{word} ({len(scores)})")
            axis.axvline(0.5, color="#808080", linewidth=1, linestyle=":")
            axis.set(title=f"{run} · {name}", xlabel=f"score = P({attack})", ylabel="images", xlim=(0, 1))
            axis.legend()
        for axis in axes[len(groups) :]:
            axis.set_visible(False)
        return _svg(figure)


def robustness_figure(rows: Sequence[Mapping[str, Any]], testset: str) -> str:
    """A metric against severity, one panel per corruption, one line per run with its interval as a band.

    Args:
        rows: of :func:`fsvfm.report_tables.robustness_rows`; AUC is drawn where it is there.
        testset: whose.

    Returns:
        Inline SVG, or an empty string if nothing is there to draw. Missing severities interrupt the line.
    """
    table = pd.DataFrame([row for row in rows if row["testset"] == testset and row["severity"] != "mean"])
    if table.empty or not table["value"].notna().any():
        return ""
    metric_shown = "auc" if (table["metric"] == "auc").any() else table["metric"].iloc[0]
    table = table[table["metric"] == metric_shown]
    table = table.assign(severity=table["severity"].astype(int)).astype(dict.fromkeys(("value", "low", "high"), float))
    runs = list(table["run"].unique())
    names = [name for name in table["corruption"].unique() if name not in ("clean", "mean")]
    ticks = sorted(table["severity"].unique())
    with matplotlib.rc_context(_STYLE):
        columns = min(3, len(names))
        lines = -(-len(names) // columns)
        figure = Figure(figsize=(4.2 * columns, 2.6 * lines), layout="constrained")
        axes = list(figure.subplots(lines, columns, squeeze=False, sharey=True).ravel())
        for index, (axis, name) in enumerate(zip(axes, names, strict=False)):
            for order, run in enumerate(runs):
                line = table[(table["run"] == run) & table["corruption"].isin(["clean", name])].sort_values("severity")
                style = {"color": COLOURS[order % len(COLOURS)]}
                axis.plot(line["severity"], 100 * line["value"], marker="o", markersize=4, linewidth=1.8, **style)
                axis.fill_between(line["severity"], 100 * line["low"], 100 * line["high"], alpha=0.18, lw=0, **style)
            axis.set(title=name.replace("_", " "), xticks=ticks, xticklabels=["clean" if t == 0 else t for t in ticks])
            if metric_shown == "auc":
                axis.axhline(50, color="#808080", linewidth=1, linestyle=":")
            if index % columns == 0:
                axis.set_ylabel(f"{metric_shown.upper()}, %")
            if index + columns >= len(names):
                axis.set_xlabel("severity")
        for axis in axes[len(names) :]:
            axis.set_visible(False)
        for order, run in enumerate(runs):
            axes[0].plot([], [], color=COLOURS[order % len(COLOURS)], linewidth=2, label=run)
        figure.legend(loc="outside upper left", ncols=4)
        return _svg(figure)


def draw_reliability(results: Mapping[str, Mapping[str, Any]]) -> Figure | None:
    """Reliability before and after calibration, one panel per run and test set, with the samples of each bin below.

    Args:
        results: run → test set → summary; those with ``calibration`` are drawn.

    Returns:
        The figure, or None if nothing was calibrated.
    """
    found = [
        (run, name, summary["calibration"])
        for run, by_set in results.items()
        for name, summary in by_set.items()
        if summary and (summary.get("calibration") or {}).get("reliability")
    ]
    if not found:
        return None
    with matplotlib.rc_context(_STYLE):
        columns = 2 if len(found) in (2, 4) else min(len(found), 3)
        lines = -(-len(found) // columns)
        figure = Figure(figsize=(4.2 * columns, 4.3 * lines), layout="constrained")
        grid = figure.add_gridspec(2 * lines, columns, height_ratios=[3.2, 1] * lines)
        for index, (run, name, calibration) in enumerate(found):
            line, column = divmod(index, columns)
            top = figure.add_subplot(grid[2 * line, column])
            below = figure.add_subplot(grid[2 * line + 1, column], sharex=top)
            top.plot([0, 1], [0, 1], color="#808080", linewidth=1, linestyle=":")
            for order, (key, word) in enumerate((("before", "before"), ("after", "calibrated"))):
                bins = calibration["reliability"].get(key)
                if not bins:
                    continue
                values = {k: np.array(bins[k], dtype=float) for k in ("confidence", "rate", "count")}
                used = values["count"] > 0
                error = (calibration.get(f"ece_{key}") or {}).get("value")
                label = word if error is None else f"{word}: ECE {100 * error:.1f} %"
                x, colour = values["confidence"][used], COLOURS[order]
                top.plot(
                    x, values["rate"][used], marker="os"[order], markersize=4, linewidth=1.8, color=colour, label=label
                )
                below.vlines(x + (order - 0.5) * 0.012, 0, values["count"][used], color=colour, linewidth=3)
            top.set(title=f"{run} · {name}", ylabel="share of fakes", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
            top.tick_params(labelbottom=False)
            top.legend(loc="upper left")
            below.set(xlabel="score", ylabel="samples")
            below.set_ylim(bottom=0)
        return figure


def reliability_figure(results: Mapping[str, Mapping[str, Any]]) -> str:
    """:func:`draw_reliability` as inline SVG, or an empty string if nothing was calibrated."""
    figure = draw_reliability(results)
    with matplotlib.rc_context(_STYLE):
        return _svg(figure) if figure else ""


def methods_figure(rows: Sequence[Mapping[str, Any]], level: str, shown: str) -> str:
    """A metric by method with intervals, one panel per test set, one mark per run.

    Args:
        rows: of :func:`fsvfm.report_tables.method_rows`.
        level: frame or video.
        shown: the metric.

    Returns:
        Inline SVG, or an empty string if nothing is there to draw.
    """
    table = pd.DataFrame([r for r in rows if r["level"] == level and r["metric"] == shown and r["value"] is not None])
    if table.empty:
        return ""
    table = table.astype(dict.fromkeys(("value", "low", "high"), float))
    runs, sets = list(table["run"].unique()), list(table["testset"].unique())
    with matplotlib.rc_context(_STYLE):
        most = int(table.groupby("testset")["method"].nunique().max())
        height = 1.3 + 0.12 * most * (1 + len(runs))
        figure, axes = _panels(len(sets), height)
        for axis, name in zip(axes, sets, strict=False):
            part = table[table["testset"] == name]
            methods = list(part["method"].unique())
            for order, run in enumerate(runs):
                line = part[part["run"] == run]
                place = [methods.index(m) + (order - (len(runs) - 1) / 2) * 0.7 / len(runs) for m in line["method"]]
                value, low, high = (100 * line[k].to_numpy() for k in ("value", "low", "high"))
                bars = np.nan_to_num(np.clip([value - low, high - value], 0, None))
                style = {"color": COLOURS[order % len(COLOURS)], "label": run}
                axis.barh(place, value, height=0.62 / len(runs), alpha=0.35, color=style["color"])
                axis.errorbar(value, place, xerr=bars, fmt="o", markersize=4, linewidth=1.6, **style)
            axis.set(yticks=range(len(methods)), yticklabels=methods, xlim=(0, 101), title=f"{name} ({level} level)")
            axis.set_xlabel(f"{shown.upper()}, %")
            axis.invert_yaxis()
            axis.grid(axis="y", visible=False)
        for axis in axes[len(sets) :]:
            axis.set_visible(False)
        if len(runs) > 1:
            figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=4)
        return _svg(figure)


def training_figure(history: pd.DataFrame) -> str:
    """Training curves from a run's ``metrics.csv``: losses, and detection metrics where there are any.

    Args:
        history: Lightning's CSV log; ``epoch`` and ``step`` beside any other columns.

    Returns:
        Inline SVG, or an empty string if nothing is there to draw.
    """
    axis_name = next((c for c in ("epoch", "step") if c in history and history[c].nunique() > 1), None)
    if axis_name is None:
        return ""
    names = [c for c in map(str, history.columns) if c not in ("epoch", "step") and not c.endswith("_step")]
    numeric = [c for c in names if pd.api.types.is_numeric_dtype(history[c]) and history[c].notna().any()]
    losses = [c for c in numeric if "loss" in c.lower()]
    measures = [c for c in numeric if re.search(r"(^|[/_])(auc|eer|ap|accuracy|balanced_accuracy)($|[/_])", c.lower())]
    groups = [(title, found) for title, found in (("losses", losses), ("detection", measures)) if found]
    if not groups:
        return ""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _panels(len(groups))
        for axis, (title, columns) in zip(axes, groups, strict=True):
            for index, column in enumerate(columns):
                line = history[[axis_name, column]].dropna().groupby(axis_name)[column].mean()
                style = {
                    "color": COLOURS[index % len(COLOURS)],
                    "linestyle": ("-", "--", ":")[index // len(COLOURS) % 3],
                }
                axis.plot(line.index, line.to_numpy(), linewidth=1.8, label=column.removesuffix("_epoch"), **style)
            axis.set(title=title, xlabel=axis_name)
            axis.legend()
        return _svg(figure)


def sweep_figure(points: pd.DataFrame) -> str:
    """A metric against a sweep's setting: lines over numbers, dots by category; one panel per test set.

    Args:
        points: ``metric`` (words), ``column`` (test set or mean), ``label`` and ``x`` (number, or nothing) of the row,
            ``value``, ``low`` and ``high`` of the interval, ``std`` over seeds, ``reference`` (bool), ``key`` (words).

    Returns:
        Inline SVG. Bars are 95 % intervals where there are any, else deviations over seeds.
    """
    table = points.astype(dict.fromkeys(("value", "low", "high", "std"), float))
    columns = list(table["column"].unique())
    x = pd.to_numeric(table["x"], errors="coerce")
    numeric = bool(x.notna().any()) and x.nunique() > 1
    with matplotlib.rc_context(_STYLE):
        most = int(table.groupby("column")["label"].nunique().max())
        figure, axes = _panels(len(columns), 3.2 if numeric else 1.1 + 0.3 * most)
        for axis, name in zip(axes, columns, strict=False):
            part = table[table["column"] == name]
            value = 100 * part["value"].to_numpy()
            low = (100 * part["low"]).fillna(pd.Series(value, part.index) - 100 * part["std"].fillna(0)).to_numpy()
            high = (100 * part["high"]).fillna(pd.Series(value, part.index) + 100 * part["std"].fillna(0)).to_numpy()
            bars = np.clip([value - low, high - value], 0, None)
            reference = part["reference"].to_numpy(dtype=bool)
            style = {"fmt": "o", "markersize": 5, "linewidth": 1.6, "color": COLOURS[0]}
            if numeric:
                # Values that are no numbers (null: all there is) stand at the right, after the largest.
                place = pd.to_numeric(part["x"], errors="coerce").to_numpy(dtype=float)
                known = np.sort(place[np.isfinite(place)])
                wide = known[0] > 0 and known[-1] / known[0] >= 20
                beyond = known[-1] * (known[-1] / known[0]) ** 0.2 if wide else known[-1] + 0.2 * (known[-1] - known[0])
                place = np.where(np.isfinite(place), place, beyond)
                axis.plot(place, value, color=COLOURS[0], linewidth=1.2, alpha=0.6)
                axis.errorbar(place, value, yerr=bars, **style)
                axis.plot(place[reference], value[reference], "o", markersize=9, fillstyle="none", color=COLOURS[1])
                if wide:
                    axis.set_xscale("log")
                axis.set_xticks(place, list(part["label"]))
                axis.minorticks_off()
                axis.set(title=name, xlabel=part["key"].iloc[0], ylabel=f"{part['metric'].iloc[0]}, %")
            else:
                place = np.arange(len(part), dtype=float)
                axis.errorbar(value, place, xerr=bars, **style)
                axis.plot(value[reference], place[reference], "o", markersize=9, fillstyle="none", color=COLOURS[1])
                axis.set(yticks=place, yticklabels=list(part["label"]), title=name, ylim=(-0.6, len(part) - 0.4))
                axis.set_xlabel(f"{part['metric'].iloc[0]}, %")
                axis.invert_yaxis()
        for axis in axes[len(columns) :]:
            axis.set_visible(False)
        return _svg(figure)
