"""Figures of the report as inline SVG that takes its text colour from the page, so that it reads light and dark."""

from __future__ import annotations

import io
import re

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

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


def _panels(count: int) -> tuple[Figure, list]:
    columns = 2 if count in (2, 4) else min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(4.2 * columns, 3.5 * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).ravel())


def roc_figure(table: pd.DataFrame) -> str:
    """ROC curves, one panel per test set, one line per run, on video scores where videos have several frames.

    Args:
        table: predictions with ``run``, ``testset``, ``label``, ``score`` and optionally ``video``.

    Returns:
        Inline SVG.
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
            axis.set(title=f"{name} ({level} level)", xlabel="reals called fake (FPR)", ylabel="fakes found (TPR)")
            axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
            axis.legend(loc="lower right")
        for axis in axes[len(sets) :]:
            axis.set_visible(False)
        return _svg(figure)


def histogram_figure(table: pd.DataFrame) -> str:
    """Histograms of P(fake) for reals and fakes, one panel per run and test set; inline SVG (columns as above)."""
    with matplotlib.rc_context(_STYLE):
        groups = list(table.groupby(["testset", "run"], sort=False))
        figure, axes = _panels(max(1, len(groups)))
        for axis, ((name, run), part) in zip(axes, groups, strict=False):
            for label, word, colour in ((0, "real", COLOURS[2]), (1, "fake", COLOURS[3])):
                scores = part.loc[part["label"] == label, "score"]
                axis.hist(scores, bins=20, range=(0, 1), color=colour, alpha=0.6, label=f"{word} ({len(scores)})")
            axis.axvline(0.5, color="#808080", linewidth=1, linestyle=":")
            axis.set(title=f"{run} · {name}", xlabel="score = P(fake)", ylabel="images", xlim=(0, 1))
            axis.legend()
        for axis in axes[len(groups) :]:
            axis.set_visible(False)
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
