"""Calibrated scores and thresholds with known error rates, all from a validation set. Score = P(fake).

Temperature scaling divides the logit of a score by one number T (Guo et al., 2017). That changes no ranking, so AUC
and EER stay; it mends a network that is too sure of itself. A calibrated score is a probability among samples with
the validation set's share of fakes and of its kind; on other data sets it is measured, not promised.

Scores are sigmoids of the logit margin in float64. Computed in float32 they reach exactly 1 at a margin of about 17
and their order is lost; whatever is closer to 0 or 1 than :data:`CLIP` counts as that far away.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit, logit

from fsvfm.errors import MetricError
from fsvfm.metrics.forgery import curve
from fsvfm.metrics.samples import check_probabilities

#: Scores are kept this far from 0 and 1, a logit of ±36: what float64 can still tell from 1.
CLIP = 2.0**-52

#: Temperatures lie between these; without a bound a detector that is no better than chance would have T → ∞.
TEMPERATURES = (0.05, 20.0)

#: Largest false-positive rates for which thresholds are stored.
LIMITS = {"fpr_1": 0.01, "fpr_5": 0.05}

#: With fewer samples of a class a result is given, but marked.
ENOUGH = 20


def _check(scores: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Checked samples in one order, whatever order they came in, so that sums agree to the last bit."""
    scores, labels = check_probabilities(scores, labels)
    order = np.lexsort((scores, labels))
    return scores[order], labels[order]


def _logit(scores: np.ndarray) -> np.ndarray:
    return logit(np.clip(scores, CLIP, 1 - CLIP))


def _separated(logits: np.ndarray, labels: np.ndarray) -> bool:
    """Whether the threshold 0.5 makes no error, so that the likelihood only grows as T → 0."""
    return bool(((2 * labels - 1) * logits >= 0).all())


def fit_temperature(scores: Any, labels: Any) -> float:
    """The temperature with the smallest mean negative log-likelihood of sigmoid(logit(score) / T).

    The likelihood is convex in 1/T, so that the root of its derivative is the one best value; if there is none within
    :data:`TEMPERATURES`, the nearer end is returned. Samples that 0.5 separates without an error have no best value:
    ever sharper scores fit them ever better. Their labels are smoothed as Platt (1999) does, to (n₁ + 1)/(n₁ + 2) for
    the n₁ fakes and 1/(n₀ + 2) for the n₀ reals, which is as sure as so many samples can make one.

    Args:
        scores: (N,) P(fake) on validation samples.
        labels: (N,) 0 real, 1 fake.

    Raises:
        MetricError: scores not finite or outside [0, 1], only one class.
    """
    scores, labels = _check(scores, labels)
    logits = _logit(scores)
    targets = labels.astype(np.float64)
    if _separated(logits, labels):
        fakes = labels.sum()
        targets = np.where(labels == 1, (fakes + 1) / (fakes + 2), 1 / (len(labels) - fakes + 2))

    def slope(log_inverse: float) -> float:
        return float(np.mean((expit(math.exp(log_inverse) * logits) - targets) * logits))

    low, high = (-math.log(value) for value in reversed(TEMPERATURES))
    if slope(low) >= 0:
        return TEMPERATURES[1]
    if slope(high) <= 0:
        return TEMPERATURES[0]
    return math.exp(-brentq(slope, low, high, xtol=1e-12))


def apply_temperature(scores: Any, temperature: float) -> np.ndarray:
    """Calibrated scores sigmoid(logit(score) / T), float64 of the scores' shape.

    Raises:
        MetricError: the temperature is not a positive number, or a score is not in [0, 1].
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise MetricError(f"a temperature is a positive number, got {temperature}")
    scores = np.asarray(scores, dtype=np.float64)
    if not ((scores >= 0) & (scores <= 1)).all():
        raise MetricError("calibration takes scores in [0, 1] (sigmoids of logit margins); some are not, or are NaN")
    return expit(_logit(scores) / temperature)


def reliability(scores: Any, labels: Any, bins: int = 15) -> dict[str, list[float]]:
    """Points of a reliability diagram: equal-width bins of P(fake), each closed on its right side, empty ones left out.

    Args:
        scores: (N,) P(fake).
        labels: (N,) 0 real, 1 fake.
        bins: number of bins between 0 and 1.

    Returns:
        ``confidence`` (mean score of each bin), ``rate`` (its share of fakes), ``count`` (its number of samples).

    Raises:
        MetricError: as :func:`fit_temperature`; no bin.
    """
    if bins < 1:
        raise MetricError(f"a reliability diagram needs at least 1 bin, got {bins}")
    scores, labels = _check(scores, labels)
    index = np.searchsorted(np.arange(1, bins) / bins, scores, side="left")
    count = np.bincount(index, minlength=bins)
    filled = count > 0
    sums = (np.bincount(index, weights=values, minlength=bins)[filled] for values in (scores, labels))
    confidence, rate = ((total / count[filled]).tolist() for total in sums)
    return {"confidence": confidence, "rate": rate, "count": count[filled].tolist()}


def expected_calibration_error(scores: Any, labels: Any, bins: int = 15) -> float:
    """Expected calibration error in [0, 1]: mean over samples of |share of fakes − mean score| of the sample's bin.

    The binary definition, on P(fake) over [0, 1] in equal-width bins; not the one on the predicted class' confidence
    over [0.5, 1], whose values differ.

    Raises:
        MetricError: as :func:`reliability`.
    """
    points = {name: np.array(values) for name, values in reliability(scores, labels, bins).items()}
    return float((points["count"] * np.abs(points["rate"] - points["confidence"])).sum() / points["count"].sum())


def rates_at(scores: Any, labels: Any, threshold: float) -> dict[str, float]:
    """Error rates of deciding fake if score ≥ threshold.

    Returns:
        ``fpr`` (share of reals called fake), ``fnr`` (share of fakes called real), ``balanced_accuracy``.

    Raises:
        MetricError: as :func:`fit_temperature`; a threshold that is no number.
    """
    if not math.isfinite(threshold):
        raise MetricError(f"a threshold is a number, got {threshold}")
    scores, labels = _check(scores, labels)
    fpr = float(np.mean(scores[labels == 0] >= threshold))
    fnr = float(np.mean(scores[labels == 1] < threshold))
    return {"fpr": fpr, "fnr": fnr, "balanced_accuracy": 1 - (fpr + fnr) / 2}


def operating_points(scores: Any, labels: Any) -> dict[str, dict[str, Any]]:
    """Thresholds with stated error rates on these samples; fake is decided if score ≥ threshold.

    ``fpr_1`` and ``fpr_5`` are the lowest observed scores at which at most 1 % and 5 % of reals are called fake (just
    above the highest score where there is none), ``eer`` the one with the smallest |FPR − FNR|, the highest of equals.

    Args:
        scores: (N,) P(fake) on validation samples, calibrated if the thresholds are to be used on calibrated scores.
        labels: (N,) 0 real, 1 fake.

    Returns:
        Name → ``threshold``, ``fpr`` and ``fnr`` at it on these samples, ``n`` (number of reals), ``supported``
        (whether there are enough samples to tell such a rate at all) and ``note`` (why not, else empty).

    Raises:
        MetricError: as :func:`fit_temperature`.
    """
    scores, labels = _check(scores, labels)
    c = curve(scores, labels)
    fpr, fnr = c.fpr[0], 1 - c.tpr[0]
    reals, fakes = int((labels == 0).sum()), int(labels.sum())
    # The first threshold of a curve is +∞; any number above all scores decides the same and can be stored.
    thresholds = np.concatenate([[np.nextafter(scores.max(), np.inf)], c.thresholds[1:]])
    columns = {name: int(np.flatnonzero(fpr <= limit)[-1]) for name, limit in LIMITS.items()}
    columns["eer"] = int(np.argmin(np.abs(fpr - fnr)))
    notes = {
        name: f"{reals} real samples cannot tell an error rate of {limit:.0%}: one of them is {1 / reals:.1%}"
        for name, limit in LIMITS.items()
        if reals * limit < 1
    }
    if min(reals, fakes) < ENOUGH:
        notes["eer"] = f"{reals} real and {fakes} fake samples are too few; {ENOUGH} of each are the least"
    return {
        name: {
            "threshold": float(thresholds[column]),
            "fpr": float(fpr[column]),
            "fnr": float(fnr[column]),
            "n": reals,
            "supported": name not in notes,
            "note": notes.get(name, ""),
        }
        for name, column in columns.items()
    }


def conformal_band(scores: Any, labels: Any, alpha: float) -> dict[str, Any]:
    """Band of scores for which the answer is "uncertain", by class-conditional split conformal prediction.

    The verdict is real if score < low, fake if score > high, and uncertain otherwise. Of new samples of each class,
    exchangeable with that class' samples here, at least 1 − α get the right verdict or "uncertain"; the guarantee
    holds for any detector and any sample size, over the draw of both sets. Frames of one video are not exchangeable
    with frames of others: give one score per video where videos are judged.

    ``high`` is the k-th smallest score of the n reals, k = ⌈(n + 1)(1 − α)⌉, and 1 if k > n; ``low`` mirrors it on the
    fakes. Where the classes lie so far apart that low > high, no score needs to be uncertain, and both become the
    middle between them, which can only cover more.

    Args:
        scores: (N,) P(fake) on validation samples.
        labels: (N,) 0 real, 1 fake.
        alpha: largest share of wrong verdicts in each class, strictly between 0 and 1.

    Returns:
        ``alpha``, ``low``, ``high``, ``uncertain`` (share of these samples inside the band), ``supported`` (False where
        a class is so small that its verdict is never contradicted) and ``note``.

    Raises:
        MetricError: as :func:`fit_temperature`; an α outside (0, 1).
    """
    if not 0 < alpha < 1:
        raise MetricError(f"a conformal band's alpha lies strictly between 0 and 1 (0.1 for 10 % errors), got {alpha}")
    scores, labels = _check(scores, labels)
    reals, fakes = scores[labels == 0], scores[labels == 1]  # each ascending

    def rank(n: int) -> int:
        return math.ceil(round((n + 1) * (1 - alpha), 9))  # 0.9 · 70 is a little more than 63 in floating point

    high = float(reals[rank(len(reals)) - 1]) if rank(len(reals)) <= len(reals) else 1.0
    low = float(fakes[-rank(len(fakes))]) if rank(len(fakes)) <= len(fakes) else 0.0
    if low > high:
        low = high = (low + high) / 2
    few = [f"{len(s)} {name}" for name, s in (("real", reals), ("fake", fakes)) if rank(len(s)) > len(s)]
    return {
        "alpha": float(alpha),
        "low": low,
        "high": high,
        "uncertain": float(np.mean((scores >= low) & (scores <= high))),
        "supported": not few,
        "note": f"{' and '.join(few)} samples are too few for alpha {alpha:g}; the band reaches the end" if few else "",
    }


def calibrate(
    scores: Any, labels: Any, *, source: str, level: str = "frame", conformal_alpha: float | None = None
) -> dict[str, Any]:
    """All that an export stores about calibration, as JSON-ready values.

    Args:
        scores: (N,) P(fake) on validation samples, before calibration.
        labels: (N,) 0 real, 1 fake.
        source: what the validation samples are, in words.
        level: what a sample is, ``frame`` or ``video``.
        conformal_alpha: α of a band of "uncertain" scores, None for no band.

    Returns:
        ``temperature``, ``source``, ``level``, ``real`` and ``fake`` (numbers of samples), ``ece_before`` and
        ``ece_after`` (on these samples), ``thresholds`` (:func:`operating_points`) and ``conformal``
        (:func:`conformal_band` or None), both on the calibrated score, and ``notes`` on what limits all this.

    Raises:
        MetricError: only one class, scores not finite or outside [0, 1], an impossible level or α.
    """
    if level not in ("frame", "video"):
        raise MetricError(f"a detector is calibrated on 'frame' or 'video' scores, not {level!r}")
    scores, labels = _check(scores, labels)
    temperature = fit_temperature(scores, labels)
    calibrated = apply_temperature(scores, temperature)
    reals, fakes = int((labels == 0).sum()), int(labels.sum())
    notes = []
    if min(reals, fakes) < ENOUGH:
        notes.append(f"{reals} real and {fakes} fake samples are few; calibration on them is a rough guess")
    if _separated(_logit(scores), labels):
        notes.append("no error at 0.5 on these samples; the temperature comes from smoothed labels")
    if temperature in TEMPERATURES:
        notes.append(
            f"no temperature within {TEMPERATURES[0]:g} to {TEMPERATURES[1]:g} fits best; this is the nearer end"
        )
    if ends := int(np.sum((scores < CLIP) | (scores > 1 - CLIP))):
        notes.append(f"{ends} scores are so close to 0 or 1 that they were taken as {CLIP:.1g} away from it")
    return {
        "temperature": temperature,
        "source": source,
        "level": level,
        "real": reals,
        "fake": fakes,
        "ece_before": expected_calibration_error(scores, labels),
        "ece_after": expected_calibration_error(calibrated, labels),
        "thresholds": operating_points(calibrated, labels),
        "conformal": None if conformal_alpha is None else conformal_band(calibrated, labels, conformal_alpha),
        "notes": notes,
    }
