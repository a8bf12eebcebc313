"""Cluster bootstrap: clusters stay whole, classes stay present, intervals cover."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from fsvfm.errors import MetricError
from fsvfm.metrics.bootstrap import (
    TestSamples,
    bootstrap,
    cluster_weights,
    difference_p,
    paired_bootstrap,
    percentile_interval,
)
from fsvfm.metrics.forgery import METRICS, curve, evaluate


def draw(labels, groups, replicates, seed=0):
    return np.concatenate(list(cluster_weights(labels, groups, replicates, np.random.default_rng(seed))))


@given(st.integers(2, 30), st.integers(1, 6), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_clusters_are_drawn_whole_and_both_classes_stay(n, size, seed):
    rng = np.random.default_rng(seed)
    groups = np.array([f"g{i}" for i in rng.integers(0, max(1, n // size), n)])
    labels = np.append(rng.integers(0, 2, n - 2), [0, 1])
    weights = draw(labels, groups, 23, seed)
    assert weights.shape == (23, n)
    for group in set(groups):
        assert (np.ptp(weights[:, groups == group], axis=1) == 0).all()
    assert (weights[:, labels == 1].sum(1) > 0).all()
    assert (weights[:, labels == 0].sum(1) > 0).all()
    firsts = [np.flatnonzero(groups == group)[0] for group in set(groups)]
    assert (weights[:, firsts].sum(1) == len(firsts)).all()  # as many clusters as the data has


def test_pieces_do_not_matter_much_and_seed_decides(monkeypatch):
    labels, groups = np.tile([0, 1], 50), np.arange(100) // 4
    first = draw(labels, groups, 40, seed=7)
    np.testing.assert_array_equal(first, draw(labels, groups, 40, seed=7))
    assert not np.array_equal(first, draw(labels, groups, 40, seed=8))


def test_standard_error_of_a_mean_is_the_textbook_one():
    rng = np.random.default_rng(0)
    values = rng.normal(size=400)
    labels = np.repeat([0, 1], 200)
    means = bootstrap(lambda w: (w @ values / w.sum(1))[:, None], labels, np.arange(400), replicates=4000, seed=1)
    # Stratified: the variance within the two halves.
    expected = np.sqrt((values[:200].var() + values[200:].var()) / 200) / 2
    assert means.std() == pytest.approx(expected, rel=0.06)


def test_copied_frames_do_not_narrow_the_interval():
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 2, 60)
    scores = np.clip(rng.normal(0.4 + 0.2 * labels, 0.2), 0, 1)
    width = {}
    cases = [
        ("videos", 1, np.arange(60)),
        ("frames by video", 10, np.repeat(np.arange(60), 10)),
        ("frames", 10, np.arange(600)),
    ]
    for name, times, groups in cases:
        m = evaluate(np.repeat(scores, times), np.repeat(labels, times), groups, replicates=800)["metrics"]["auc"]
        assert m["low"] <= m["value"] <= m["high"]
        width[name] = m["high"] - m["low"]
    assert width["frames by video"] == pytest.approx(width["videos"], rel=1e-9)
    assert width["frames"] < 0.6 * width["videos"]


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(5)
    truth, hits, rounds = 0.76025, 0, 120  # P(N(1, 1) > N(0, 1)) = Φ(1/√2)
    for _ in range(rounds):
        labels = np.repeat([0, 1], 60)
        normal = rng.normal(labels.astype(float), 1)
        m = evaluate(1 / (1 + np.exp(-normal)), labels, np.arange(120), replicates=200)["metrics"]["auc"]
        hits += m["low"] <= truth <= m["high"]
    assert 0.87 <= hits / rounds <= 1.0


def test_bad_requests():
    with pytest.raises(MetricError, match="at least 1 replicate"):
        bootstrap(lambda w: w, np.array([0, 1]), np.array([0, 1]), replicates=0)
    with pytest.raises(MetricError, match="2 samples but 3"):
        bootstrap(lambda w: w, np.array([0, 1]), np.array([0, 1, 2]))
    with pytest.raises(MetricError, match="level"):
        percentile_interval(np.zeros((3, 1)), 95)


@given(st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_paired_draws_are_the_same_for_all_and_shared_over_test_sets(seed):
    rng = np.random.default_rng(seed)
    # People with a real picture each; two of them are forged one way, two the other: two test sets share the reals.
    people = np.array([f"p{i}" for i in range(6)])
    first = TestSamples(
        np.repeat([0, 1], [6, 2]), np.append(people, ["p0", "p1"]), {"a": rng.random(8), "b": rng.random(8)}
    )
    second = TestSamples(np.repeat([0, 1], [6, 2]), np.append(people, ["p4", "p5"]), {"b": rng.random(8)})
    seen = []

    def weighted(scores, labels, weights):
        seen.append(weights)
        return (weights * scores).sum(1)

    one, two = paired_bootstrap(weighted, [first, second], replicates=31, seed=seed)
    assert (set(one), set(two)) == ({"a", "b"}, {"b"})
    assert one["a"].shape == (31,)
    a, b, c = seen
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(a[:, :6], c[:, :6])
    np.testing.assert_array_equal(a[:, :2], a[:, 6:])  # a person is drawn with all their pictures
    assert (a[:, 6:].sum(1) == 2).all(), "as many forged people as there are"
    assert (c[:, 6:].sum(1) == 2).all()
    assert (a[:, :6].sum(1) == 6).all()
    np.testing.assert_allclose(one["b"], b @ first.scores["b"])


def test_paired_auc_is_that_of_the_repeated_samples():
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2, 40)
    samples = TestSamples(labels, np.arange(40), {"x": rng.random(40), "y": rng.random(40)})
    drawn = {}

    def auc(scores, labels, weights):
        drawn.setdefault("weights", weights)
        return METRICS["auc"](curve(scores, labels, weights))

    (found,) = paired_bootstrap(auc, [samples], replicates=20, seed=1)
    for name, scores in samples.scores.items():
        expected = [roc_auc_score(labels, scores, sample_weight=w) for w in drawn["weights"]]
        np.testing.assert_allclose(found[name], expected, atol=1e-12)


def test_p_is_twice_the_smaller_tail():
    assert difference_p(np.array([-1.0, 1, 1, 1])) == pytest.approx(2 * 2 / 5)
    assert difference_p(np.full(999, 0.1)) == pytest.approx(0.002)
    assert difference_p(np.zeros(9)) == 1
    with pytest.raises(MetricError, match="at least 1"):
        paired_bootstrap(lambda s, y, w: w.sum(1), [], replicates=0)
