"""Calibration: against grid search, scikit-learn, torchmetrics, and simulated detectors whose truth is known."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss, roc_auc_score, roc_curve
from torchmetrics.functional.classification import binary_calibration_error

from fsvfm.errors import MetricError
from fsvfm.metrics.calibration import (
    apply_temperature,
    calibrate,
    conformal_band,
    expected_calibration_error,
    fit_temperature,
    operating_points,
    rates_at,
    reliability,
)


def detector(seed: int, n: int = 400, temperature: float = 1.0, gap: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """Scores whose logits are ``temperature`` times the right ones, and labels."""
    rng = np.random.default_rng(seed)
    right = rng.normal(0, gap, n)
    return expit(temperature * right), (rng.random(n) < expit(right)).astype(int)


# --------------------------------------------------------------------------------------------------------- temperature


@pytest.mark.parametrize("truth", [0.4, 1.0, 2.5, 6.0])
def test_temperature_of_a_simulated_detector_is_found(truth):
    scores, labels = detector(0, n=40_000, temperature=truth)
    assert fit_temperature(scores, labels) == pytest.approx(truth, rel=0.03)


@given(st.integers(0, 999), st.floats(0.3, 5))
@settings(deadline=None, max_examples=20)
def test_no_temperature_of_a_grid_is_better(seed, truth):
    scores, labels = detector(seed, n=60, temperature=truth, gap=1.5)
    found = fit_temperature(scores, labels)

    def loss(temperatures: np.ndarray) -> np.ndarray:
        margins = np.log(scores / (1 - scores)) * (2 * labels - 1)
        return np.log1p(np.exp(-margins / temperatures[:, None])).mean(axis=1)

    grid = np.geomspace(0.05, 20, 400)
    losses = loss(grid)
    assert loss(np.array([found]))[0] <= losses.min() + 1e-12
    assert loss(np.array([found]))[0] == pytest.approx(log_loss(labels, apply_temperature(scores, found)))
    assert grid[max(0, losses.argmin() - 1)] <= found <= grid[min(399, losses.argmin() + 1)]


def test_temperature_does_not_depend_on_order_and_changes_no_ranking():
    scores, labels = detector(1)
    order = np.random.default_rng(0).permutation(len(scores))
    temperature = fit_temperature(scores, labels)
    assert fit_temperature(scores[order], labels[order]) == temperature
    after = apply_temperature(scores, temperature)
    assert after.dtype == np.float64
    assert roc_auc_score(labels, after) == roc_auc_score(labels, scores)
    assert ((after >= 0.5) == (scores >= 0.5)).all()
    np.testing.assert_allclose(logit(after) * temperature, logit(scores), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("n", [3, 50, 2000])
def test_perfectly_separated_samples_are_as_sure_as_their_number_allows(n):
    # All logits are ±4: the best temperature makes every score its smoothed label, (n + 1) / (n + 2).
    scores, labels = np.repeat(expit([-4.0, 4.0]), n), np.repeat([0, 1], n)
    after = apply_temperature(scores, fit_temperature(scores, labels))
    np.testing.assert_allclose(after, np.repeat([1 / (n + 2), (n + 1) / (n + 2)], n), rtol=1e-9)


def test_a_detector_no_better_than_chance_gets_the_highest_temperature():
    scores, labels = detector(3)
    assert fit_temperature(1 - scores, labels) == 20.0
    assert fit_temperature([0.5] * 4, [0, 1, 0, 1]) == 20.0
    assert fit_temperature([0.4999, 0.5001], [0, 1]) == 0.05


def test_saturated_scores_stay_finite_and_wrong_ones_weigh_as_much_as_float64_can_tell():
    scores, labels = np.array([0.0, 1.0, 0.0, 1.0, 0.2, 0.9]), np.array([0, 1, 1, 0, 0, 1])
    temperature = fit_temperature(scores, labels)
    assert math.isfinite(temperature)
    after = apply_temperature(scores, temperature)
    assert np.isfinite(logit(after)).all()
    assert logit(after[1]) * temperature == pytest.approx(-np.log(2.0**-52))
    assert after[1] == pytest.approx(1 - after[0])


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_temperatures(temperature):
    with pytest.raises(MetricError, match="positive number"):
        apply_temperature([0.3], temperature)


@pytest.mark.parametrize("score", [1.5, -0.1, float("nan")])
def test_scores_that_are_no_probabilities_are_not_calibrated(score):
    with pytest.raises(MetricError, match=r"\[0, 1\]"):
        apply_temperature([0.3, score], 1.0)


# ---------------------------------------------------------------------------------------------------------- reliability


@given(st.integers(0, 999), st.integers(1, 20))
@settings(deadline=None, max_examples=30)
def test_reliability_and_ece_agree_with_two_libraries(seed, bins):
    scores, labels = detector(seed, n=200, temperature=2.0)
    points = reliability(scores, labels, bins)
    rate, confidence = calibration_curve(labels, scores, n_bins=bins)
    np.testing.assert_allclose(points["rate"], rate)
    np.testing.assert_allclose(points["confidence"], confidence)
    assert sum(points["count"]) == 200
    # Torchmetrics works in float32.
    other = binary_calibration_error(torch.from_numpy(scores), torch.from_numpy(labels), n_bins=bins)
    assert expected_calibration_error(scores, labels, bins) == pytest.approx(float(other), abs=1e-5)


def test_ece_by_hand():
    scores, labels = [0.1, 0.1, 0.9, 0.9], [0, 1, 1, 1]
    assert reliability(scores, labels, 2) == {
        "confidence": [pytest.approx(0.1), pytest.approx(0.9)],
        "rate": [0.5, 1.0],
        "count": [2, 2],
    }
    assert expected_calibration_error(scores, labels, 2) == pytest.approx((0.4 + 0.1) / 2)
    # 0 and 1 belong to the first and last bin, an inner edge to the bin below it.
    assert reliability([0.0, 0.5, 1.0], [0, 1, 1], 2)["count"] == [2, 1]


def test_scaling_mends_a_network_that_is_too_sure():
    scores, labels = detector(5, n=20_000, temperature=3.0)
    fresh, truth = detector(6, n=20_000, temperature=3.0)
    after = apply_temperature(fresh, fit_temperature(scores, labels))
    assert expected_calibration_error(fresh, truth) > 0.1
    assert expected_calibration_error(after, truth) < 0.015


def test_no_bins():
    with pytest.raises(MetricError, match="at least 1 bin"):
        reliability([0.1, 0.9], [0, 1], 0)


# ----------------------------------------------------------------------------------------------------- operating points


@given(st.integers(0, 999), st.integers(2, 300), st.sampled_from([1, 2, 6]))
@settings(deadline=None, max_examples=40)
def test_operating_points_are_the_lowest_thresholds_within_their_rates(seed, n, decimals):
    rng = np.random.default_rng(seed)
    labels = np.append(rng.integers(0, 2, n), [0, 1])
    scores = np.clip(rng.normal(0.4 + 0.2 * labels, 0.25), 0, 1).round(decimals)
    points = operating_points(scores, labels)
    reals, fakes = scores[labels == 0], scores[labels == 1]
    for name, limit in (("fpr_1", 0.01), ("fpr_5", 0.05)):
        point = points[name]
        assert point["fpr"] == pytest.approx((reals >= point["threshold"]).mean())
        assert point["fnr"] == pytest.approx((fakes < point["threshold"]).mean())
        assert point["fpr"] <= limit
        for lower in np.unique(scores[scores < point["threshold"]]):
            assert (reals >= lower).mean() > limit
        fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
        assert 1 - point["fnr"] == pytest.approx(tpr[fpr <= limit].max())
        assert point["n"] == len(reals)
        assert point["supported"] == (len(reals) >= 1 / limit)
    gaps = [abs((reals >= t).mean() - (fakes < t).mean()) for t in np.unique(scores)]
    assert abs(points["eer"]["fpr"] - points["eer"]["fnr"]) <= min(gaps) + 1e-12


def test_too_few_reals_are_marked_and_explained():
    scores, labels = detector(0, n=150)
    points = operating_points(scores, labels)
    assert not points["fpr_1"]["supported"]
    assert "error rate of 1%" in points["fpr_1"]["note"]
    assert points["fpr_5"]["supported"]
    assert points["fpr_5"]["note"] == ""


def test_a_rate_of_exactly_one_per_cent_is_within_one_per_cent():
    reals, fakes = np.append(np.linspace(0, 0.3, 99), 0.9), np.linspace(0.5, 1, 100)
    point = operating_points(np.append(reals, fakes), np.repeat([0, 1], 100))["fpr_1"]
    assert (point["threshold"], point["fpr"], point["fnr"]) == (0.5, 0.01, 0.0)


def test_a_real_on_top_leaves_a_finite_threshold_that_calls_nothing_fake():
    for top in (0.9, 1.0):
        point = operating_points([0.1, top, 0.5, 0.6], [0, 0, 1, 1])["fpr_1"]
        assert (point["fpr"], point["fnr"]) == (0.0, 1.0)
        assert top < point["threshold"] < 1.001
        stored = json.loads(json.dumps(point["threshold"]))
        assert rates_at([0.1, top, 0.5, 0.6], [0, 0, 1, 1], stored) == {
            "fpr": 0.0,
            "fnr": 1.0,
            "balanced_accuracy": 0.5,
        }


def test_rates_at_a_threshold():
    assert rates_at([0.1, 0.5, 0.5, 0.9], [0, 0, 1, 1], 0.5) == {"fpr": 0.5, "fnr": 0.0, "balanced_accuracy": 0.75}
    with pytest.raises(MetricError, match="a threshold is a number"):
        rates_at([0.1, 0.5], [0, 1], float("nan"))


# ------------------------------------------------------------------------------------------------------- conformal band


def verdicts(scores: np.ndarray, band: dict) -> np.ndarray:
    """-1 real, 1 fake, 0 uncertain."""
    return np.where(scores < band["low"], -1, np.where(scores > band["high"], 1, 0))


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.3])
@pytest.mark.parametrize(("gap", "n"), [(1.0, 25), (3.0, 60), (12.0, 40)])
def test_each_class_is_covered_as_often_as_promised(alpha, gap, n):
    rng = np.random.default_rng(7)
    rounds, wrong = 400, np.zeros(2)
    for _ in range(rounds):
        labels = np.repeat([0, 1, 0, 1], [n, n, 200, 200])
        scores = expit(rng.normal(gap * (labels - 0.5), 1).round(1))  # rounded, so that there are ties
        band = conformal_band(scores[: 2 * n], labels[: 2 * n], alpha)
        assert band["low"] <= band["high"]
        given_verdicts, truth = verdicts(scores[2 * n :], band), labels[2 * n :]
        wrong += [(given_verdicts[truth == 0] == 1).mean(), (given_verdicts[truth == 1] == -1).mean()]
    assert (wrong / rounds <= alpha + 0.01).all()  # the simulation's own error is about 0.004
    if gap == 1:  # and where the classes overlap, the band is not wider than it must be
        assert (wrong / rounds >= alpha - 1 / (n + 1) - 0.03).all()


@given(st.integers(0, 999), st.integers(1, 60), st.integers(1, 60), st.floats(0.02, 0.6))
@settings(deadline=None, max_examples=60)
def test_band_keeps_its_promise_on_leaving_one_out(seed, n_real, n_fake, alpha):
    # Split conformal in its elementary form: among n + 1 exchangeable scores, at most α (n + 1) can be called wrong
    # when each is judged by the others.
    rng = np.random.default_rng(seed)
    reals, fakes = rng.random(n_real + 1).round(2) * 0.8, 0.3 + 0.7 * rng.random(n_fake).round(2)
    wrong = 0
    for i in range(n_real + 1):
        others = np.delete(reals, i)
        band = conformal_band(np.concatenate([others, fakes]), np.repeat([0, 1], [n_real, n_fake]), alpha)
        wrong += int(verdicts(reals[i : i + 1], band)[0] == 1)
    assert wrong <= alpha * (n_real + 1) + 1e-9


def test_band_by_hand():
    # 9 of each: k = ⌈10 · 0.8⌉ = 8, the eighth smallest real and the eighth largest fake.
    reals, fakes = np.arange(1, 10) / 20, np.arange(5, 14) / 20
    band = conformal_band(np.concatenate([reals, fakes]), np.repeat([0, 1], 9), 0.2)
    assert (band["low"], band["high"]) == (6 / 20, 8 / 20)
    assert band["uncertain"] == pytest.approx((3 + 3) / 18)
    assert band["supported"]
    # ⌈70 · 0.9⌉ is 63 although 70 · (1 − 0.1) is a little more in floating point.
    reals = np.arange(69) / 100
    assert conformal_band(np.append(reals, 0.1), np.append(np.zeros(69), 1), 0.1)["high"] == 62 / 100


def test_classes_far_apart_need_no_band():
    scores, labels = np.concatenate([np.linspace(0, 0.2, 50), np.linspace(0.8, 1, 50)]), np.repeat([0, 1], 50)
    band = conformal_band(scores, labels, 0.1)
    assert band["low"] == band["high"] == pytest.approx(0.5)
    assert band["uncertain"] == 0


def test_too_few_samples_make_everything_uncertain():
    band = conformal_band([0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1], 0.1)
    assert (band["low"], band["high"], band["uncertain"]) == (0.0, 1.0, 1.0)
    assert not band["supported"]
    assert "2 real and 2 fake" in band["note"]


@pytest.mark.parametrize("alpha", [0.0, 1.0, 10.0, -0.1])
def test_impossible_alpha(alpha):
    with pytest.raises(MetricError, match="alpha"):
        conformal_band([0.1, 0.9], [0, 1], alpha)


# ------------------------------------------------------------------------------------------------------------ calibrate


def test_calibration_holds_everything_and_on_the_calibrated_score():
    scores, labels = detector(0, n=1000, temperature=2.0)
    got = calibrate(scores, labels, source="val of FF++", conformal_alpha=0.1)
    assert json.loads(json.dumps(got)) == got
    assert set(got) == {
        "temperature", "source", "level", "real", "fake", "ece_before", "ece_after", "thresholds", "conformal", "notes",
    }  # fmt: skip
    assert (got["source"], got["level"], got["real"] + got["fake"], got["notes"]) == ("val of FF++", "frame", 1000, [])
    after = apply_temperature(scores, got["temperature"])
    assert got["ece_before"] == expected_calibration_error(scores, labels) > got["ece_after"]
    assert got["ece_after"] == expected_calibration_error(after, labels)
    for point in got["thresholds"].values():
        rates = rates_at(after, labels, point["threshold"])
        assert (rates["fpr"], rates["fnr"]) == pytest.approx((point["fpr"], point["fnr"]))
    assert got["conformal"] == conformal_band(after, labels, 0.1)
    assert calibrate(scores, labels, source="")["conformal"] is None


def test_calibration_does_not_depend_on_order():
    scores, labels = detector(0, n=300)
    order = np.random.default_rng(0).permutation(300)
    first = calibrate(scores, labels, source="", conformal_alpha=0.2)
    assert calibrate(scores[order], labels[order], source="", conformal_alpha=0.2) == first


@pytest.mark.parametrize(
    ("scores", "labels", "note"),
    [
        ([0.6, 0.2, 0.4, 0.9], [0, 0, 1, 1], "2 real and 2 fake samples are few"),
        ([0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1], "no error at 0.5"),
        ([0.9, 0.8, 0.2, 0.1], [0, 0, 1, 1], "this is the nearer end"),
        ([0.1, 1.0, 0.8, 1.0], [0, 0, 1, 1], "2 scores are so close to 0 or 1"),
    ],
)
def test_what_limits_a_calibration_is_noted(scores, labels, note):
    assert any(note in text for text in calibrate(scores, labels, source="")["notes"])


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([0.1, 0.2], [0, 0], "all 2 samples are real"),
        ([0.1, np.nan, 0.3], [0, 1, 1], "1 of 3 scores are not finite.*sample 1"),
        ([-2.0, 3.0], [0, 1], "probabilities"),
        ([], [], "no samples"),
    ],
)
def test_samples_that_allow_no_calibration(scores, labels, message):
    with pytest.raises(MetricError, match=message):
        calibrate(scores, labels, source="")


def test_unknown_level():
    with pytest.raises(MetricError, match="'frame' or 'video'"):
        calibrate([0.1, 0.9], [0, 1], source="", level="image")
