"""Metrics of face anti-spoofing: HTER at the threshold of a fixed grid, as in the papers' protocols.

Elsewhere a score is P(attack) and attacks are the positive class; here the papers' P(real) decides, and real is the
positive class. :func:`summarise` takes P(attack) as every other part does, :func:`antispoof_metrics` takes P(real).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np

from fsvfm.errors import MetricError
from fsvfm.metrics import summary
from fsvfm.metrics.forgery import METRICS, curve
from fsvfm.metrics.samples import check_probabilities

#: Thresholds on P(real) among which the papers choose.
GRID = np.arange(10_001) / 10_000

#: What each metric's name means here. ISO 30107-3 calls FAR and FRR APCER and BPCER where there is one attack type.
DEFINITIONS = {
    "hter": "half total error rate, (FAR + FRR) / 2 at the threshold",
    "auc": "area under the ROC curve, a tie counts half",
    "tpr_at_fpr_1": "largest share of real faces accepted at a threshold that accepts ≤ 1 % of attacks, "
    "no interpolation",
    "far": "false acceptance rate: share of attacks with P(real) ≥ threshold",
    "frr": "false rejection rate: share of real faces with P(real) < threshold",
    "accuracy": "share of right decisions at the threshold",
    "threshold": "on P(real), chosen on the test set itself as in the papers: the one of 10,001 equal steps in [0, 1] "
    "with the smallest |FAR − FRR|, the last of equals (chosen again in each bootstrap replicate)",
}


class SpoofMetrics(NamedTuple):
    """All in [0, 1]: ``threshold`` on P(real), the error rates at it, and threshold-free AUC and TPR at FPR ≤ 1 %."""

    threshold: float
    far: float
    frr: float
    hter: float
    accuracy: float
    auc: float
    tpr_at_fpr_1: float


def _statistics(
    real_scores: np.ndarray, is_real: np.ndarray, weights: np.ndarray | None, grid: np.ndarray = GRID
) -> dict[str, np.ndarray]:
    """The metrics by name, each (R,), from P(real) (N,), is_real (N,) and weights (R, N)."""
    c = curve(real_scores, is_real, weights)
    # Rates change at distinct scores only: of the steps between two scores, the last stands for all of them. Going
    # down the grid, the column of the lowest score ≥ step never decreases.
    steps = grid[::-1]
    columns, first = np.unique(
        len(c.thresholds) - np.searchsorted(c.thresholds[::-1], steps, side="left") - 1, return_index=True
    )
    genuine, attacks = c.fakes[:, -1], c.reals[:, -1]  # the curve's positive class is real here
    accepted = c.reals[:, columns]
    rejected = genuine[:, None] - c.fakes[:, columns]
    gap = np.abs(accepted / attacks[:, None] - rejected / genuine[:, None])
    best = np.argmin(gap, axis=1)
    row = np.arange(len(best))
    far, frr = accepted[row, best] / attacks, rejected[row, best] / genuine
    wrong = accepted[row, best] + rejected[row, best]
    return {
        "hter": (far + frr) / 2,
        "auc": METRICS["auc"](c),
        "tpr_at_fpr_1": METRICS["tpr_at_fpr_1"](c),
        "far": far,
        "frr": frr,
        "accuracy": (genuine + attacks - wrong) / (genuine + attacks),
        "threshold": steps[first[best]],
    }


def antispoof_metrics(real_scores: Any, is_real: Any, *, threshold: float | None = None) -> SpoofMetrics:
    """HTER, AUC and TPR at FPR ≤ 1 % on all samples (per-video means of P(real)).

    Args:
        real_scores: (N,) P(real) in [0, 1].
        is_real: (N,) 1 real, 0 attack. Real is the positive class here.
        threshold: accept as real if score ≥ threshold. None: the one of 10,001 equal steps in [0, 1] at which
            |FAR − FRR| is smallest, the last of equals.

    Raises:
        MetricError: scores not finite or outside [0, 1], only one class, a threshold that is no number.
    """
    if threshold is not None and not np.isfinite(threshold):
        raise MetricError(f"a threshold on P(real) is a number, got {threshold}")
    scores, real = check_probabilities(real_scores, is_real, names=("attack", "real"))
    found = _statistics(scores, real, None, GRID if threshold is None else np.array([threshold], dtype=np.float64))
    return SpoofMetrics(**{name: float(value[0]) for name, value in found.items()})


def hter_at(real_scores: Any, is_real: Any, threshold: float) -> float:
    """HTER in [0, 1] at a threshold on P(real) that was fixed elsewhere, for example on held-out source videos.

    Args:
        real_scores: (N,) P(real) in [0, 1].
        is_real: (N,) 1 real, 0 attack.
        threshold: accept as real if score ≥ threshold.

    Raises:
        MetricError: as :func:`antispoof_metrics`.
    """
    return antispoof_metrics(real_scores, is_real, threshold=threshold).hter


def statistics(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """The metrics of :data:`DEFINITIONS`, each (R,), from P(attack) (N,), labels (N,; 1 attack) and weights (R, N)."""
    return _statistics(1 - scores, 1 - labels, weights)


#: ``evaluate(scores, labels, groups, …)``: all metrics with intervals, see :func:`fsvfm.metrics.summary.evaluate`.
evaluate = partial(summary.evaluate, statistics)

#: ``summarise(table, …)``: what is reported of one test set, see :func:`fsvfm.metrics.summary.summarise`;
#: ``score`` is P(attack), ``label`` 1 attack, and ``method`` the attack type.
summarise = partial(summary.summarise, statistics, DEFINITIONS)
