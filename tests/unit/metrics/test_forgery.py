"""DfD metrics: against scikit-learn, and properties that any right implementation has."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from sklearn import metrics as sk

from fsvfm.errors import MetricError
from fsvfm.metrics.forgery import (
    DEFINITIONS,
    METRICS,
    auc,
    curve,
    eer,
    evaluate,
    metric,
    roc_points,
    summarise,
    tpr_at_fpr,
    video_scores,
)


@st.composite
def samples(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Scores on a coarse grid, so that ties are common, with both classes."""
    n = draw(st.integers(2, 40))
    scores = draw(st.lists(st.integers(0, 12), min_size=n, max_size=n))
    labels = draw(st.lists(st.integers(0, 1), min_size=n, max_size=n).filter(lambda x: 0 < sum(x) < len(x)))
    return np.array(scores) / 12, np.array(labels)


@given(samples())
@settings(deadline=None)
def test_agrees_with_scikit_learn(data):
    scores, labels = data
    fpr, tpr, _ = sk.roc_curve(labels, scores, drop_intermediate=False)
    assert auc(scores, labels) == pytest.approx(sk.roc_auc_score(labels, scores), abs=1e-12)
    assert metric("ap", scores, labels) == pytest.approx(sk.average_precision_score(labels, scores), abs=1e-12)
    assert metric("accuracy", scores, labels) == pytest.approx(sk.accuracy_score(labels, scores >= 0.5))
    expected = sk.balanced_accuracy_score(labels, scores >= 0.5)
    assert metric("balanced_accuracy", scores, labels) == pytest.approx(expected)
    assert metric("tpr_at_fpr_5", scores, labels) == pytest.approx(tpr[fpr <= 0.05].max())
    assert tpr_at_fpr(scores, labels, 0.3) == pytest.approx(tpr[fpr <= 0.3].max())
    ours = roc_points(scores, labels)
    np.testing.assert_allclose(ours[0], fpr)
    np.testing.assert_allclose(ours[1], tpr)


def test_eer_is_the_root_that_a_solver_finds():
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2, 301)
    scores = rng.normal(labels, 1.0)  # no ties, so that interpolation over FPR is a function almost everywhere
    fpr, tpr, _ = sk.roc_curve(labels, scores)
    root = brentq(lambda x: 1 - x - np.interp(x, fpr, tpr), 0, 1)
    assert eer(scores, labels) == pytest.approx(root, abs=1e-9)


@given(samples())
@settings(deadline=None)
def test_ranking_metrics_do_not_see_monotone_transforms_or_order(data):
    scores, labels = data
    order = np.random.default_rng(0).permutation(len(scores))
    for name in ("auc", "eer", "ap", "tpr_at_fpr_1"):
        value = metric(name, scores, labels)
        assert metric(name, np.exp(3 * scores) - 7, labels) == pytest.approx(value, abs=1e-12)
        assert metric(name, scores[order], labels[order]) == value
        assert 0 <= value <= 1
    assert auc(1 - scores, labels) == pytest.approx(1 - auc(scores, labels))
    assert auc(scores, 1 - labels) == pytest.approx(1 - auc(scores, labels))


@given(samples())
@settings(deadline=None)
def test_eer_lies_where_both_errors_meet(data):
    scores, labels = data
    value = eer(scores, labels)
    fpr, tpr, _ = roc_points(scores, labels)
    left, right = fpr + tpr <= 1, fpr + tpr >= 1
    assert fpr[left].max() - 1e-12 <= value <= fpr[right].min() + 1e-12
    assert (1 - tpr[right]).max() - 1e-12 <= value <= (1 - tpr[left]).min() + 1e-12


def test_known_extremes():
    labels = np.array([0, 0, 1, 1])
    perfect = evaluate([0.1, 0.2, 0.8, 0.9], labels, range(4), replicates=0)["metrics"]
    assert {name: m["value"] for name, m in perfect.items()} == {
        name: 0.0 if name == "eer" else 1.0 for name in METRICS
    }
    assert perfect["auc"]["low"] is None
    assert eer([0.9, 0.8, 0.2, 0.1], labels) == 1.0
    assert auc([0.5] * 4, labels) == 0.5
    assert eer([0.5] * 4, labels) == 0.5


def test_weights_count_like_repeated_samples():
    rng = np.random.default_rng(0)
    scores, labels = rng.random(30).round(1), rng.integers(0, 2, 30)
    weights = rng.integers(0, 4, (3, 30))
    weighted = curve(scores, labels, weights.astype(float))
    for row, counts in enumerate(weights):
        for name, function in METRICS.items():
            expected = metric(name, np.repeat(scores, counts), np.repeat(labels, counts))
            assert function(weighted)[row] == pytest.approx(expected), name


def test_video_scores_are_means_per_id_and_bitwise_independent_of_order():
    rng = np.random.default_rng(1)
    scores = rng.random(200)
    videos = np.array([f"v{i:02d}" for i in rng.integers(0, 17, 200)])
    labels = (np.char.count(videos, "1") > 0).astype(int)
    ids, means, truth = video_scores(scores, videos, labels)
    expected = pd.DataFrame({"v": videos, "s": scores, "l": labels}).groupby("v").agg({"s": "mean", "l": "first"})
    assert list(ids) == list(expected.index)
    np.testing.assert_allclose(means, expected["s"], rtol=1e-12)
    np.testing.assert_array_equal(truth, expected["l"])
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(200)
        np.testing.assert_array_equal(video_scores(scores[order], videos[order], labels[order])[1], means)


def test_video_with_both_labels_is_named():
    with pytest.raises(MetricError, match="000_003"):
        video_scores([0.1, 0.9, 0.2], ["000_003", "000_003", "001"], [0, 1, 0])


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([0.1, np.nan, 0.3], [0, 1, 1], "1 of 3 scores are not finite.*sample 1"),
        ([0.1, np.inf], [0, 1], "not finite"),
        ([0.1, 0.2], [0, 0], "all 2 samples are real"),
        ([0.1, 0.2], [1, 1], "all 2 samples are fake"),
        ([], [], "no samples"),
        ([0.1, 0.2], [0, 2], "labels must be 0"),
        ([0.1, 0.2], [0], "one length"),
        ([0.1, 0.2], [0.0, 0.4], "labels must be 0"),
    ],
)
def test_bad_samples_are_refused_by_name(scores, labels, message):
    with pytest.raises(MetricError, match=message):
        auc(scores, labels)


def test_unknown_metric_and_scores_that_are_no_probabilities():
    with pytest.raises(MetricError, match="no metric 'f1'"):
        metric("f1", [0, 1], [0, 1])
    with pytest.raises(MetricError, match="probabilities"):
        evaluate([-3.0, 3.0], [0, 1], [0, 1])


def table(seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    rows = []
    for person in range(20):
        for method in ("real", "swap", "blend"):
            label = int(method != "real")
            for frame in range(3):
                score = float(np.clip(0.5 + 0.25 * (2 * label - 1) * (method != "blend") + rng.normal(0, 0.2), 0, 1))
                rows.append((score, label, f"{method}/{person}", f"p{person}", method, frame))
    return pd.DataFrame(rows, columns=["score", "label", "video", "subject", "method", "frame"])


def test_summary_holds_both_levels_and_each_method_against_all_reals():
    data = table()
    summary = summarise(data, replicates=50)
    assert (summary["frame"]["n"], summary["video"]["n"], summary["video"]["clusters"]) == (180, 60, 60)
    assert set(summary["method"]) == {"swap", "blend"}
    assert set(summary["definitions"]) == set(summary["frame"]["metrics"]) == set(DEFINITIONS)
    part = data[data["method"] != "blend"]
    expected = sk.roc_auc_score(part["label"], part["score"])
    assert summary["method"]["swap"]["frame"]["metrics"]["auc"]["value"] == pytest.approx(expected)
    assert summary["method"]["swap"]["frame"]["real"] == 60
    assert summarise(data, replicates=50, cluster="subject")["frame"]["clusters"] == 20


def test_summary_does_not_depend_on_the_order_of_rows():
    data = table()
    assert summarise(data.sample(frac=1, random_state=1), replicates=30) == summarise(data, replicates=30)


def test_same_video_id_in_two_data_sets_stays_two_videos():
    data = pd.DataFrame({"score": [0.1, 0.9], "label": [0, 1], "video": ["000", "000"]})
    with pytest.raises(MetricError, match="000"):
        summarise(data, replicates=0)
    assert summarise(data.assign(dataset=["a", "b"]), replicates=0)["video"]["n"] == 2


def test_summary_refuses_what_it_cannot_use():
    data = table()
    with pytest.raises(MetricError, match="no column subject"):
        summarise(data.drop(columns="subject"), cluster="subject")
    with pytest.raises(MetricError, match="'frame'"):
        summarise(data, cluster="frame")
    with pytest.raises(MetricError, match="bad\\.png"):
        summarise(data.assign(path=["bad.png"] + ["x.png"] * 179, score=[np.nan] + [0.5] * 179))
    with pytest.raises(MetricError, match="no video"):
        summarise(data.assign(video=[None, *data["video"][1:]]))
    with pytest.raises(MetricError, match="several subjects"):
        summarise(data.assign(subject=data["frame"].astype(str)), cluster="subject")
