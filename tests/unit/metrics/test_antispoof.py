"""FAS metrics against a direct reading of their definition."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from fsvfm.errors import MetricError
from fsvfm.metrics import forgery
from fsvfm.metrics.antispoof import DEFINITIONS, antispoof_metrics, evaluate, hter_at, statistics, summarise

STEPS = np.arange(10_001) / 10_000


def direct(real_scores: np.ndarray, is_real: np.ndarray) -> dict[str, float]:
    """The definition, step by step of the grid."""
    far = (real_scores[is_real == 0] >= STEPS[:, None]).mean(axis=1)
    frr = (real_scores[is_real == 1] < STEPS[:, None]).mean(axis=1)
    gap = np.abs(far - frr)
    last = np.flatnonzero(gap == gap.min())[-1]
    return {"threshold": STEPS[last], "far": far[last], "frr": frr[last], "hter": (far[last] + frr[last]) / 2}


@st.composite
def samples(draw: st.DrawFn, decimals: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """P(real), often on steps of the grid, and is_real, with both classes."""
    n = draw(st.integers(2, 40))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    real = rng.permutation(np.append(rng.integers(0, 2, n - 2), [0, 1]))
    return np.clip(rng.normal(0.4 + 0.2 * real, 0.3), 0, 1).round(draw(st.integers(1, decimals))), real


@given(samples())
@settings(deadline=None, max_examples=40)
def test_threshold_is_the_last_minimum_on_the_grid(data):
    scores, real = data
    got = antispoof_metrics(scores, real)
    where = direct(scores, real)
    assert {name: getattr(got, name) for name in where} == where
    assert got.auc == pytest.approx(sk.roc_auc_score(real, scores))
    assert got.accuracy == pytest.approx(sk.accuracy_score(real, scores >= where["threshold"]))
    assert 1 - got.hter == pytest.approx(sk.balanced_accuracy_score(real, scores >= where["threshold"]))
    fpr, tpr, _ = sk.roc_curve(real, scores, drop_intermediate=False)
    assert got.tpr_at_fpr_1 == tpr[fpr <= 0.01].max()


@given(samples(decimals=6), st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_each_replicate_chooses_its_own_threshold_and_counts_like_repeated_samples(data, seed):
    scores, real = data
    weights = np.random.default_rng(seed).integers(0, 4, (5, len(scores))).astype(float)
    weights[:, [np.argmax(real == 1), np.argmax(real == 0)]] += 1  # no class is lost
    found = statistics(1 - scores, 1 - real, weights)
    for row, counts in enumerate(weights.astype(int)):
        again = np.repeat(1 - (1 - scores), counts), np.repeat(real, counts)
        expected = direct(*again) | {"auc": sk.roc_auc_score(again[1], again[0])}
        for name, value in expected.items():
            assert found[name][row] == pytest.approx(value, abs=1e-12), name


@given(samples(), st.randoms())
@settings(deadline=None, max_examples=25)
def test_order_does_not_change_a_bit(data, random):
    scores, real = data
    order = list(range(len(scores)))
    random.shuffle(order)
    assert antispoof_metrics(scores[order], real[order]) == antispoof_metrics(scores, real)


def test_monotone_maps_change_hter_but_no_ranking_metric():
    # Scores that all lie between two steps of the grid cannot be told apart by any of its thresholds.
    scores, real = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]), np.array([0, 1, 0, 0, 1, 1])
    before, after = antispoof_metrics(scores, real), antispoof_metrics(scores / 100_000, real)
    assert (before.auc, before.tpr_at_fpr_1) == (after.auc, after.tpr_at_fpr_1)
    assert before.hter == pytest.approx(1 / 3)
    assert after.hter == 0.5


def test_given_threshold_is_used():
    got = antispoof_metrics([0.2, 0.6, 0.7, 0.9], [0, 0, 1, 1], threshold=0.5)
    assert (got.far, got.frr, got.hter) == (0.5, 0.0, 0.25)
    assert hter_at([0.2, 0.6, 0.7, 0.9], [0, 0, 1, 1], 0.5) == 0.25
    assert hter_at([0.2, 0.6, 0.7, 0.9], [0, 0, 1, 1], 0.7) == 0.0
    assert hter_at([0.2, 0.6, 0.7, 0.9], [0, 0, 1, 1], 0.8) == 0.25


@given(samples(), st.floats(0, 1))
@settings(deadline=None, max_examples=25)
def test_the_chosen_threshold_is_one_like_any_other(data, threshold):
    scores, real = data
    chosen = antispoof_metrics(scores, real)
    assert hter_at(scores, real, chosen.threshold) == chosen.hter
    assert hter_at(scores, real, threshold) == pytest.approx(1 - sk.balanced_accuracy_score(real, scores >= threshold))


@pytest.mark.parametrize(
    ("scores", "real", "message"),
    [
        ([0.1, np.nan], [0, 1], "1 of 2 scores are not finite.*sample 1"),
        ([0.1, 1.2], [0, 1], r"P\(real\) in \[0, 1\]"),
        ([0.1, 0.2], [1, 1], "all 2 samples are real"),
        ([0.1, 0.2], [0, 0], "all 2 samples are attack"),
        ([0.1, 0.2], [0, 2], "labels must be 0 .attack. or 1 .real."),
    ],
)
def test_bad_samples_are_refused_by_name(scores, real, message):
    with pytest.raises(MetricError, match=message):
        antispoof_metrics(scores, real)


def test_a_threshold_is_a_number():
    with pytest.raises(MetricError, match="nan"):
        hter_at([0.1, 0.2], [0, 1], float("nan"))


def table(seed: int = 0) -> pd.DataFrame:
    """Two frames of each of 60 videos with P(attack); masks are hard, prints easy."""
    rng = np.random.default_rng(seed)
    rows = []
    for person in range(20):
        for method, mean in (("real", 0.3), ("print", 0.8), ("mask", 0.4)):
            for frame in range(2):
                score = float(np.clip(rng.normal(mean, 0.2), 0, 1))
                rows.append((score, int(method != "real"), f"{method}/{person}", f"p{person}", method, frame))
    return pd.DataFrame(rows, columns=["score", "label", "video", "subject", "method", "frame"])


def test_summary_has_the_shape_of_forgery_detection_s_and_the_papers_numbers():
    data = table()
    got, other = summarise(data, replicates=40), forgery.summarise(data, replicates=40)
    assert list(got) == list(other)
    assert [list(got[level]) for level in ("frame", "video")] == [list(other[level]) for level in ("frame", "video")]
    assert set(got["video"]["metrics"]) == set(DEFINITIONS) == set(got["definitions"])
    json.dumps(got)
    videos = data.groupby("video").agg({"score": "mean", "label": "first"})
    papers = antispoof_metrics(1 - videos["score"], 1 - videos["label"])
    for name, cell in got["video"]["metrics"].items():
        assert cell["value"] == pytest.approx(getattr(papers, name), abs=1e-12), name
        assert cell["low"] <= cell["high"], name
    frames = antispoof_metrics(1 - data["score"], 1 - data["label"])
    assert got["frame"]["metrics"]["hter"]["value"] == frames.hter
    assert (got["frame"]["n"], got["video"]["n"], got["video"]["clusters"]) == (120, 60, 60)
    assert summarise(data, replicates=5, cluster="subject")["video"]["clusters"] == 20


def test_summary_breaks_down_by_attack_type():
    data = table()
    got = summarise(data, replicates=0)["method"]
    assert set(got) == {"print", "mask"}
    part = data[data["method"] != "mask"]
    expected = antispoof_metrics(1 - part["score"], 1 - part["label"])
    assert got["print"]["frame"]["metrics"]["hter"] == {"value": expected.hter, "low": None, "high": None}
    assert got["print"]["video"]["metrics"]["hter"]["value"] < got["mask"]["video"]["metrics"]["hter"]["value"]


def test_interval_of_hter_is_the_spread_over_redrawn_videos():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 150)
    scores = 1 / (1 + np.exp(-rng.normal(2 * labels - 1, 1)))
    cell = evaluate(scores, labels, np.arange(300), replicates=400, seed=3)["metrics"]["hter"]
    draws = []
    for _ in range(400):  # a plain bootstrap, written out
        chosen = np.concatenate([rng.integers(0, 150, 150), rng.integers(150, 300, 150)])
        draws.append(antispoof_metrics(1 - scores[chosen], 1 - labels[chosen]).hter)
    assert [cell["low"], cell["high"]] == pytest.approx(np.quantile(draws, [0.025, 0.975]).tolist(), abs=0.012)
    assert cell["low"] < cell["value"] < cell["high"]


def test_summary_does_not_depend_on_the_order_of_rows():
    data = table()
    assert summarise(data.sample(frac=1, random_state=1), replicates=30) == summarise(data, replicates=30)


def test_summary_refuses_what_it_cannot_use():
    data = table()
    with pytest.raises(MetricError, match=r"bad\.png"):
        summarise(data.assign(path=["bad.png"] + ["x.png"] * 119, score=[np.nan] + [0.5] * 119))
    with pytest.raises(MetricError, match="real/0"):
        summarise(data.assign(label=[1, *data["label"][1:]]))
    with pytest.raises(MetricError, match="all 40 samples are real"):
        summarise(data[data["label"] == 0])
    with pytest.raises(MetricError, match=r"\[0, 1\]"):
        summarise(data.assign(score=data["score"] + 1))
