"""Bootstrap intervals over clusters: videos or people are drawn again, never single frames.

Frames of one video (and forgeries made from one person) rise and fall together, so an interval over frames would be far
too narrow. Each replicate draws whole clusters with replacement and gives every sample the number of times its cluster
was drawn as a weight; metrics then work on weights, all replicates at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

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
        weights = np.zeros((count, len(ids)))
        for members in strata:
            size = len(members)
            if size == 0:
                continue
            drawn = rng.integers(size, size=(count, size)) + size * np.arange(count)[:, None]
            weights[:, members] = np.bincount(drawn.ravel(), minlength=count * size).reshape(count, size)
        yield weights[:, cluster]


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
