"""Bootstrap intervals over clusters: videos or people are drawn again, never single frames.

Frames of one video (and forgeries made from one person) rise and fall together, so an interval over frames would be far
too narrow. Each replicate draws whole clusters with replacement and gives every sample the number of times its cluster
was drawn as a weight; metrics then work on weights, all replicates at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from fsvfm.errors import MetricError

#: Weights held in memory at once (replicates × samples); 2 million doubles are 16 MB.
_CHUNK = 2_000_000


def cluster_weights(
    labels: np.ndarray, groups: np.ndarray, replicates: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Draw clusters with replacement, stratified so that no replicate lacks a class.

    Clusters are drawn separately among those that hold only real samples, only fake ones, and both, so each replicate
    has the data's number of clusters of each kind. The order of the samples does not matter: clusters are taken in
    the order of their ids.

    Args:
        labels: (N,) 0 real, 1 fake.
        groups: (N,) cluster id of each sample (video or person), any type that sorts.
        replicates: number of bootstrap replicates R.
        rng: the source of randomness.

    Yields:
        (r, N) float64 weights, the r of all pieces adding up to R.
    """
    ids, cluster = np.unique(groups, return_inverse=True)
    has_fake = np.bincount(cluster, weights=labels == 1, minlength=len(ids)) > 0
    has_real = np.bincount(cluster, weights=labels == 0, minlength=len(ids)) > 0
    kind = has_real + 2 * has_fake
    strata = [np.flatnonzero(kind == value) for value in (1, 2, 3)]
    rows = max(1, _CHUNK // len(labels))
    for start in range(0, replicates, rows):
        count = min(rows, replicates - start)
        yield _draw(strata, count, rng)[:, cluster]


def _draw(strata: list[np.ndarray], count: int, rng: np.random.Generator) -> np.ndarray:
    """How often each cluster is drawn, (count, clusters), each stratum as many times as it has clusters."""
    weights = np.zeros((count, sum(map(len, strata))))
    for members in strata:
        size = len(members)
        if size == 0:
            continue
        drawn = rng.integers(size, size=(count, size)) + size * np.arange(count)[:, None]
        weights[:, members] = np.bincount(drawn.ravel(), minlength=count * size).reshape(count, size)
    return weights


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray],
    labels: np.ndarray,
    groups: np.ndarray,
    *,
    replicates: int = 1000,
    seed: int = 0,
) -> np.ndarray:
    """Evaluate statistics on cluster-bootstrap replicates.

    Args:
        statistic: maps (r, N) sample weights to (r, M) values of M statistics.
        labels: (N,) 0 real, 1 fake.
        groups: (N,) cluster ids.
        replicates: R ≥ 1.
        seed: the same seed and data give the same replicates.

    Returns:
        (R, M) float64.

    Raises:
        MetricError: no replicate was asked for, or groups and labels differ in length.
    """
    if replicates < 1:
        raise MetricError(f"a bootstrap needs at least 1 replicate, got {replicates}")
    if len(groups) != len(labels):
        raise MetricError(f"{len(labels)} samples but {len(groups)} cluster ids; give one id per sample")
    rng = np.random.default_rng(seed)
    return np.concatenate([statistic(weights) for weights in cluster_weights(labels, groups, replicates, rng)])


def percentile_interval(values: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Percentile interval of each column: (R, M) replicates → lower and upper limits, each (M,).

    Raises:
        MetricError: the level is not strictly between 0 and 1.
    """
    if not 0 < level < 1:
        raise MetricError(f"an interval's level lies strictly between 0 and 1 (0.95 for 95 %), got {level}")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


class TestSamples(NamedTuple):
    """One test set as several detectors see it.

    Attributes:
        labels: (N,) 0 real, 1 fake.
        groups: (N,) cluster ids; the same id in two test sets is the same video or person.
        scores: name of a detector → (N,) its scores. Test sets need not have the same detectors.
    """

    labels: np.ndarray
    groups: np.ndarray
    scores: dict[str, np.ndarray]


TestSamples.__test__ = False  # type: ignore[attr-defined]  # not a pytest class


def paired_bootstrap(
    metric: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray],
    testsets: Sequence[TestSamples],
    *,
    replicates: int = 2000,
    seed: int = 0,
) -> list[dict[str, np.ndarray]]:
    """A metric of several detectors on the same cluster-bootstrap replicates of several test sets.

    In a replicate every detector meets the same draw, so that the differences between them vary less than each of
    them; a video or person that is in several test sets is drawn equally often in all of them. Clusters are stratified
    by the test sets and classes that they are in, so no replicate lacks a class anywhere.

    Args:
        metric: maps scores (N,), labels (N,) and weights (r, N) to (r,) values.
        testsets: what is drawn from.
        replicates: R ≥ 1.
        seed: the same seed and data give the same replicates.

    Returns:
        For each test set: name of a detector → (R,) values.

    Raises:
        MetricError: no replicate was asked for.
    """
    if replicates < 1:
        raise MetricError(f"a bootstrap needs at least 1 replicate, got {replicates}")
    if not testsets:
        return []
    ids, clusters = np.unique(np.concatenate([t.groups for t in testsets]), return_inverse=True)
    owners = np.split(clusters, np.cumsum([len(t.groups) for t in testsets])[:-1])
    places = np.zeros((len(ids), 2 * len(testsets)), dtype=bool)
    for number, (part, owner) in enumerate(zip(testsets, owners, strict=True)):
        places[owner, 2 * number + part.labels] = True
    _, kind = np.unique(places, axis=0, return_inverse=True)
    strata = [np.flatnonzero(kind == value) for value in range(kind.max() + 1)]
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // max(len(t.labels) for t in testsets))
    found: list[dict[str, list[np.ndarray]]] = [{name: [] for name in part.scores} for part in testsets]
    for start in range(0, replicates, rows):
        weights = _draw(strata, min(rows, replicates - start), rng)
        for part, owner, values in zip(testsets, owners, found, strict=True):
            for name, scores in part.scores.items():
                values[name].append(metric(scores, part.labels, weights[:, owner]))
    return [{name: np.concatenate(pieces) for name, pieces in values.items()} for values in found]


def difference_p(differences: np.ndarray) -> float:
    """Two-sided p of "no difference" from (R,) bootstrap differences: twice the smaller tail at zero, ≥ 2 / (R + 1)."""
    tail = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    return min(1.0, 2 * (1 + tail) / (1 + len(differences)))
