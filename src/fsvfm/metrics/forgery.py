"""Metrics of forgery detection on all samples of a test set at once. Score = P(fake); label 0 real, 1 fake.

Every metric is a function of one :class:`Curve`, the counts of fakes and reals at or above each distinct score. The
counts may be weighted, one row per bootstrap replicate, so that a metric and its interval come from the same code.

Definitions (also written beside the numbers, see :data:`DEFINITIONS`): the field has several for some of these names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from fsvfm.errors import MetricError
from fsvfm.metrics.bootstrap import bootstrap, percentile_interval

#: What each metric's name means here.
DEFINITIONS = {
    "auc": "area under the ROC curve, a tie counts half",
    "eer": "equal error rate: the x with 1 − x = TPR(x) on the linearly interpolated ROC curve, solved exactly",
    "ap": "average precision: precision summed over the steps of recall, fake is the positive class",
    "accuracy": "share of right decisions, fake if score ≥ 0.5",
    "balanced_accuracy": "mean of the shares of reals and of fakes decided rightly, fake if score ≥ 0.5",
    "tpr_at_fpr_1": "largest TPR at a threshold with FPR ≤ 1 %, no interpolation",
    "tpr_at_fpr_5": "largest TPR at a threshold with FPR ≤ 5 %, no interpolation",
}


class Curve(NamedTuple):
    """Counts at or above each threshold; the first column is the threshold +∞, at which nothing is called fake.

    Attributes:
        thresholds: (T,) descending distinct scores, the first +∞.
        fakes: (R, T) weight of fakes with score ≥ threshold (true positives).
        reals: (R, T) weight of reals with score ≥ threshold (false positives).
    """

    thresholds: np.ndarray
    fakes: np.ndarray
    reals: np.ndarray

    @property
    def tpr(self) -> np.ndarray:
        """(R, T) true-positive rate."""
        return self.fakes / self.fakes[:, -1:]

    @property
    def fpr(self) -> np.ndarray:
        """(R, T) false-positive rate."""
        return self.reals / self.reals[:, -1:]


def check_samples(scores: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Scores as (N,) float64 and labels as (N,) int64, or an error that says what is wrong with them.

    Raises:
        MetricError: other shapes, no sample, a score that is not finite, a label other than 0 and 1, only one class.
    """
    scores, raw = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    if scores.ndim != 1 or scores.shape != raw.shape:
        raise MetricError(f"scores and labels must be two lists of one length, got shapes {scores.shape}, {raw.shape}")
    if len(scores) == 0:
        raise MetricError("there are no samples; a metric needs scores of real and of fake samples")
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        raise MetricError(
            f"{len(bad)} of {len(scores)} scores are not finite, the first is sample {bad[0]} ({scores[bad[0]]}); "
            "look at that image and at the network's weights"
        )
    if not np.isin(raw, (0, 1)).all():
        raise MetricError(f"labels must be 0 (real) or 1 (fake), got {sorted(set(raw.tolist()))[:5]}")
    labels = raw.astype(np.int64)
    if labels.min() == labels.max():
        name = ("real", "fake")[labels[0]]
        raise MetricError(
            f"all {len(labels)} samples are {name}; a detection metric needs real and fake samples in the same test set"
        )
    return scores, labels


def curve(scores: Any, labels: Any, weights: np.ndarray | None = None) -> Curve:
    """Count fakes and reals at or above every distinct score.

    Args:
        scores: (N,) P(fake) or any score that grows with it.
        labels: (N,) 0 real, 1 fake.
        weights: (R, N) how often each sample counts, one row per replicate; None counts each once (R = 1).

    Raises:
        MetricError: see :func:`check_samples`.
    """
    scores, labels = check_samples(scores, labels)
    order = np.argsort(-scores, kind="stable")
    scores, labels = scores[order], labels[order]
    last = np.flatnonzero(np.append(np.diff(scores) != 0, True))
    weights = np.ones((1, len(scores))) if weights is None else weights[:, order]
    fakes = np.cumsum(weights * labels, axis=1)[:, last]
    reals = np.cumsum(weights * (1 - labels), axis=1)[:, last]
    start = np.zeros((len(weights), 1))
    return Curve(np.concatenate([[np.inf], scores[last]]), np.hstack([start, fakes]), np.hstack([start, reals]))


def _auc(c: Curve) -> np.ndarray:
    return (np.diff(c.fpr) * (c.tpr[:, 1:] + c.tpr[:, :-1]) / 2).sum(axis=1)


def _eer(c: Curve) -> np.ndarray:
    # FPR + TPR − 1 grows from −1 to 1 along the curve; its root is the equal error rate.
    fpr = c.fpr
    excess = fpr + c.tpr - 1
    rows = np.arange(len(fpr))
    after = np.argmax(excess >= 0, axis=1)
    before = after - 1
    step = -excess[rows, before] / (excess[rows, after] - excess[rows, before])
    return fpr[rows, before] + step * (fpr[rows, after] - fpr[rows, before])


def _ap(c: Curve) -> np.ndarray:
    called = c.fakes + c.reals
    precision = np.divide(c.fakes, called, out=np.zeros_like(called), where=called > 0)
    return (np.diff(c.tpr) * precision[:, 1:]).sum(axis=1)


def _at_half(c: Curve) -> tuple[np.ndarray, np.ndarray]:
    """Fakes and reals called fake at the threshold 0.5, each (R,)."""
    column = int((c.thresholds >= 0.5).sum()) - 1
    return c.fakes[:, column], c.reals[:, column]


def _accuracy(c: Curve) -> np.ndarray:
    fakes, reals = _at_half(c)
    return (fakes + c.reals[:, -1] - reals) / (c.fakes[:, -1] + c.reals[:, -1])


def _balanced_accuracy(c: Curve) -> np.ndarray:
    fakes, reals = _at_half(c)
    return (fakes / c.fakes[:, -1] + 1 - reals / c.reals[:, -1]) / 2


def _tpr_at(limit: float) -> Callable[[Curve], np.ndarray]:
    return lambda c: np.where(c.fpr <= limit, c.tpr, 0.0).max(axis=1)


#: Metrics by name; each maps a curve with R rows to (R,) values in [0, 1].
METRICS: dict[str, Callable[[Curve], np.ndarray]] = {
    "auc": _auc,
    "eer": _eer,
    "ap": _ap,
    "accuracy": _accuracy,
    "balanced_accuracy": _balanced_accuracy,
    "tpr_at_fpr_1": _tpr_at(0.01),
    "tpr_at_fpr_5": _tpr_at(0.05),
}


def metric(name: str, scores: Any, labels: Any) -> float:
    """One metric by its name in :data:`METRICS`, as a fraction in [0, 1].

    Raises:
        MetricError: an unknown name, or samples it cannot be computed from.
    """
    if name not in METRICS:
        raise MetricError(f"there is no metric {name!r}; there are {', '.join(METRICS)}")
    return float(METRICS[name](curve(scores, labels))[0])


def auc(scores: Any, labels: Any) -> float:
    """Area under the ROC curve in [0, 1] of (N,) scores; raises MetricError as :func:`check_samples`."""
    return metric("auc", scores, labels)


def eer(scores: Any, labels: Any) -> float:
    """Equal error rate in [0, 1] of (N,) scores: the root of 1 − x = TPR(x); errors as :func:`check_samples`."""
    return metric("eer", scores, labels)


def roc_points(scores: Any, labels: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ROC curve: false-positive rates, true-positive rates and thresholds, each (T,), from (0, 0) at +∞ to (1, 1)."""
    c = curve(scores, labels)
    return c.fpr[0], c.tpr[0], c.thresholds


def video_scores(scores: Any, videos: Any, labels: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean of a video's frame scores.

    Args:
        scores: (N,) P(fake) per frame.
        videos: (N,) id of the frame's video, unique in its data set (FF++ ``000_003`` exists once per manipulation, so
            the id holds the manipulation's name too).
        labels: (N,) 0 real, 1 fake.

    Returns:
        ids (V,) sorted, scores (V,) float64, labels (V,) int64. The order of the frames does not change a single bit.

    Raises:
        MetricError: as :func:`check_samples`; ids missing; a video whose frames carry both labels.
    """
    scores, labels = check_samples(scores, labels)
    videos = np.asarray(videos)
    if videos.shape != scores.shape or pd.isna(videos).any():
        raise MetricError("every sample needs a video id (for a photograph: its own name); some are missing")
    ids, index, counts = np.unique(videos, return_inverse=True, return_counts=True)
    fakes = np.bincount(index, weights=labels)
    mixed = np.flatnonzero((fakes > 0) & (fakes < counts))
    if len(mixed):
        names = ", ".join(str(ids[i]) for i in mixed[:5])
        raise MetricError(
            f"{len(mixed)} video(s) have frames labelled real and frames labelled fake: {names}. "
            "A video id must be unique in its data set; put the method's name into it"
        )
    # Frames are summed in the order of their scores, so that batches and workers cannot change the last bit.
    order = np.lexsort((scores, index))
    sums = np.add.reduceat(scores[order], np.concatenate([[0], np.cumsum(counts)[:-1]]))
    return ids, sums / counts, (fakes > 0).astype(np.int64)


def evaluate(
    scores: Any, labels: Any, groups: Any, *, replicates: int = 1000, seed: int = 0, level: float = 0.95
) -> dict[str, Any]:
    """All metrics with percentile bootstrap intervals over clusters.

    Args:
        scores: (N,) P(fake) in [0, 1].
        labels: (N,) 0 real, 1 fake.
        groups: (N,) ids of the clusters that are drawn again (videos or people).
        replicates: bootstrap replicates; 0 leaves the intervals out (``low`` and ``high`` are None).
        seed: of the bootstrap.
        level: of the interval.

    Returns:
        ``{"n", "real", "fake", "clusters", "metrics": {name: {"value", "low", "high"}}}``, fractions in [0, 1].

    Raises:
        MetricError: as :func:`check_samples`; a score outside [0, 1].
    """
    scores, labels = check_samples(scores, labels)
    groups = np.asarray(groups)
    if scores.min() < 0 or scores.max() > 1:
        raise MetricError(f"scores must be probabilities in [0, 1], got {scores.min():.4g} to {scores.max():.4g}")

    def all_metrics(weights: np.ndarray | None) -> np.ndarray:
        c = curve(scores, labels, weights)
        return np.stack([function(c) for function in METRICS.values()], axis=1)

    values = all_metrics(None)[0].tolist()
    low: list[float | None] = [None] * len(values)
    high: list[float | None] = [None] * len(values)
    if replicates:
        drawn = bootstrap(all_metrics, labels, groups, replicates=replicates, seed=seed)
        low, high = (limit.tolist() for limit in percentile_interval(drawn, level))
    return {
        "n": len(scores),
        "real": int((labels == 0).sum()),
        "fake": int(labels.sum()),
        "clusters": len(np.unique(groups)),
        "metrics": {name: {"value": values[i], "low": low[i], "high": high[i]} for i, name in enumerate(METRICS)},
    }


def summarise(
    table: pd.DataFrame, *, replicates: int = 1000, seed: int = 0, cluster: str = "video", level: float = 0.95
) -> dict[str, Any]:
    """Everything that is reported about the scores of one detector on one test set.

    Args:
        table: one row per sample with ``score`` (P(fake)), ``label`` (0 real, 1 fake) and ``video`` (id); optional
            ``method`` (for the breakdown), ``subject`` (needed for ``cluster="subject"``), ``dataset`` (video ids and
            subjects are then taken as unique within it only), ``path`` (to name a bad sample).
        replicates: bootstrap replicates, 0 for none.
        seed: of the bootstrap.
        cluster: what is drawn again: ``video`` as in the papers' protocols, or ``subject`` where several samples show
            one person (forgeries made from a test person's own photograph).
        level: of the intervals.

    Returns:
        A JSON-ready dict: ``frame`` and ``video`` (each as :func:`evaluate`), ``method`` (name → the same two levels,
        that method's fakes against all reals), ``interval`` (how the intervals were made), ``definitions``.

    Raises:
        MetricError: a column is missing, or samples from which the metrics cannot be computed.
    """
    if cluster not in ("video", "subject"):
        raise MetricError(f"intervals are drawn over 'video' or 'subject', not {cluster!r}")
    missing = [name for name in dict.fromkeys(("score", "label", "video", cluster)) if name not in table]
    if missing:
        raise MetricError(f"the table of scores has no column {', '.join(missing)}; it has {', '.join(table.columns)}")
    if (bad := table[~np.isfinite(table["score"].astype(float))]).shape[0] and "path" in table:
        raise MetricError(f"{len(bad)} of {len(table)} scores are not finite, the first is of {bad['path'].iloc[0]}")

    def levels(part: pd.DataFrame) -> dict[str, Any]:
        videos, groups = _ids(part, "video"), _ids(part, cluster)
        ids, scores, labels = video_scores(part["score"], videos, part["label"])
        owner = pd.Series(groups).groupby(videos).agg(["first", "nunique"]).loc[ids]
        if (owner["nunique"] > 1).any():
            raise MetricError(f"video {owner.index[owner['nunique'] > 1][0]} shows several subjects; draw over videos")
        options: dict[str, Any] = {"replicates": replicates, "seed": seed, "level": level}
        return {
            "frame": evaluate(part["score"], part["label"], groups, **options),
            "video": evaluate(scores, labels, owner["first"].to_numpy(), **options),
        }

    methods = sorted(table.loc[table["label"] == 1, "method"].astype(str).unique()) if "method" in table else []
    summary = levels(table)
    summary["method"] = {
        name: levels(table[(table["label"] == 0) | (table["method"].astype(str) == name)]) for name in methods
    }
    summary["interval"] = {
        "level": level,
        "over": cluster,
        "replicates": replicates,
        "seed": seed,
        "kind": "percentile bootstrap",
    }
    summary["definitions"] = dict(DEFINITIONS)
    return summary


def _ids(table: pd.DataFrame, column: str) -> np.ndarray:
    """Ids of a column as text, made unique over data sets where the table holds several."""
    if table[column].isna().any():
        raise MetricError(f"{int(table[column].isna().sum())} samples have no {column}; every sample needs one")
    ids = table[column].astype(str)
    if "dataset" in table and table["dataset"].nunique() > 1:
        ids = table["dataset"].astype(str) + "/" + ids
    return ids.to_numpy(dtype=str)
