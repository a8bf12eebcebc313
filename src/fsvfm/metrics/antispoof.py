"""Metrics of face anti-spoofing: HTER at the threshold of a fixed grid (spec of the papers' protocols).

These work on the probability of *real*, as the papers do; elsewhere score = P(attack), so callers pass ``1 − score``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fsvfm.errors import MetricError
from fsvfm.metrics.forgery import check_samples, metric

GRID = np.arange(10_001) / 10_000


class SpoofMetrics(NamedTuple):
    """All in [0, 1]: ``threshold`` on P(real), the error rates at it, and threshold-free AUC and TPR at FPR ≤ 1 %."""

    threshold: float
    far: float
    frr: float
    hter: float
    accuracy: float
    auc: float
    tpr_at_fpr_1: float


def antispoof_metrics(real_scores: Any, is_real: Any, *, threshold: float | None = None) -> SpoofMetrics:
    """HTER, AUC and TPR at FPR ≤ 1 % on all samples (per-video means of P(real)).

    Args:
        real_scores: (N,) P(real) in [0, 1].
        is_real: (N,) 1 real, 0 attack. Real is the positive class here.
        threshold: accept as real if score ≥ threshold. None: the one of 10,001 equal steps in [0, 1] at which
            |FAR − FRR| is smallest, the last of equals.

    Raises:
        MetricError: scores not finite or outside [0, 1], only one class.
    """
    scores, real = check_samples(real_scores, is_real)
    if scores.min() < 0 or scores.max() > 1:
        raise MetricError(f"P(real) must lie in [0, 1], got {scores.min():.4g} to {scores.max():.4g}")
    genuine, attacks = np.sort(scores[real == 1]), np.sort(scores[real == 0])
    grid = GRID if threshold is None else np.array([threshold])
    rejected = np.searchsorted(genuine, grid, side="left")  # genuine faces below the threshold
    accepted = len(attacks) - np.searchsorted(attacks, grid, side="left")
    gap = np.abs(accepted / len(attacks) - rejected / len(genuine))
    best = len(gap) - 1 - int(np.argmin(gap[::-1]))
    far, frr = accepted[best] / len(attacks), rejected[best] / len(genuine)
    right = len(scores) - accepted[best] - rejected[best]
    return SpoofMetrics(
        threshold=float(grid[best]),
        far=float(far),
        frr=float(frr),
        hter=float((far + frr) / 2),
        accuracy=float(right / len(scores)),
        auc=metric("auc", scores, real),
        tpr_at_fpr_1=metric("tpr_at_fpr_1", scores, real),
    )
