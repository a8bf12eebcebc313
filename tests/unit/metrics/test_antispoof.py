"""FAS metrics against a direct reading of their definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from fsvfm.errors import MetricError
from fsvfm.metrics.antispoof import antispoof_metrics


@given(st.integers(0, 500), st.integers(2, 40))
@settings(deadline=None, max_examples=25)
def test_threshold_is_the_last_minimum_on_the_grid(seed, n):
    rng = np.random.default_rng(seed)
    real = np.append(rng.integers(0, 2, n), [0, 1])
    scores = rng.random(n + 2).round(3)
    got = antispoof_metrics(scores, real)
    steps = np.arange(10_001) / 10_000
    far = (scores[real == 0] >= steps[:, None]).mean(axis=1)
    frr = (scores[real == 1] < steps[:, None]).mean(axis=1)
    last = np.flatnonzero(np.abs(far - frr) == np.abs(far - frr).min())[-1]
    where = (steps[last], far[last], frr[last])
    assert (got.threshold, got.far, got.frr) == pytest.approx(where)
    assert got.hter == pytest.approx((where[1] + where[2]) / 2)
    assert got.auc == pytest.approx(roc_auc_score(real, scores))
    assert got.accuracy == pytest.approx(np.mean((scores >= where[0]) == (real == 1)))


def test_given_threshold_is_used():
    got = antispoof_metrics([0.2, 0.6, 0.7, 0.9], [0, 0, 1, 1], threshold=0.5)
    assert (got.far, got.frr, got.hter) == (0.5, 0.0, 0.25)


@pytest.mark.parametrize(("scores", "message"), [([0.1, np.nan], "not finite"), ([0.1, 1.2], r"\[0, 1\]")])
def test_bad_scores(scores, message):
    with pytest.raises(MetricError, match=message):
        antispoof_metrics(scores, [0, 1])
