"""Metrics of forgery detection on all samples of a test set at once. Score = P(fake); label 0 real, 1 fake.

Every metric is a function of one :class:`Curve`, the counts of fakes and reals at or above each distinct score. The
counts may be weighted, one row per bootstrap replicate, so that a metric and its interval come from the same code.

Definitions (also written beside the numbers, see :data:`DEFINITIONS`): the field has several for some of these names.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from fsvfm.errors import MetricError
from fsvfm.metrics import summary
from fsvfm.metrics.samples import check_samples as check_samples
from fsvfm.metrics.samples import video_scores as video_scores

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


def tpr_at_fpr(scores: Any, labels: Any, limit: float) -> float:
    """Largest TPR in [0, 1] at a threshold with FPR ≤ ``limit``, no interpolation; errors as :func:`check_samples`."""
    return float(_tpr_at(limit)(curve(scores, labels))[0])


def roc_points(scores: Any, labels: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ROC curve: false-positive rates, true-positive rates and thresholds, each (T,), from (0, 0) at +∞ to (1, 1)."""
    c = curve(scores, labels)
    return c.fpr[0], c.tpr[0], c.thresholds


def statistics(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """All of :data:`METRICS`, each (R,), from scores (N,), labels (N,) and weights (R, N)."""
    c = curve(scores, labels, weights)
    return {name: function(c) for name, function in METRICS.items()}


#: ``evaluate(scores, labels, groups, …)``: all metrics with intervals, see :func:`fsvfm.metrics.summary.evaluate`.
evaluate = partial(summary.evaluate, statistics)

#: ``summarise(table, …)``: what is reported of one test set, see :func:`fsvfm.metrics.summary.summarise`.
summarise = partial(summary.summarise, statistics, DEFINITIONS)
