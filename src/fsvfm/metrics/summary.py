"""What is reported of a test set, whatever the metrics: two levels, intervals over clusters, each method on its own.

:mod:`fsvfm.metrics.forgery` and :mod:`fsvfm.metrics.antispoof` give their metrics as one function, the
:data:`Statistics`; the rest of a summary is the same for both and is made here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from fsvfm.errors import MetricError
from fsvfm.metrics.bootstrap import bootstrap, percentile_interval
from fsvfm.metrics.samples import check_probabilities, video_scores

#: Maps scores (N,), labels (N,) and weights (R, N), or None for R = 1, to the metrics by name, each (R,).
Statistics = Callable[[np.ndarray, np.ndarray, np.ndarray | None], dict[str, np.ndarray]]


def evaluate(
    statistics: Statistics,
    scores: Any,
    labels: Any,
    groups: Any,
    *,
    replicates: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Any]:
    """All metrics with percentile bootstrap intervals over clusters.

    Args:
        statistics: the metrics.
        scores: (N,) P(fake) in [0, 1].
        labels: (N,) 0 real, 1 fake.
        groups: (N,) ids of the clusters that are drawn again (videos or people).
        replicates: bootstrap replicates; 0 leaves the intervals out (``low`` and ``high`` are None).
        seed: of the bootstrap.
        level: of the interval.

    Returns:
        ``{"n", "real", "fake", "clusters", "metrics": {name: {"value", "low", "high"}}}``, fractions in [0, 1].

    Raises:
        MetricError: as :func:`~fsvfm.metrics.samples.check_probabilities`.
    """
    scores, labels = check_probabilities(scores, labels)
    groups = np.asarray(groups)
    found = {name: float(value[0]) for name, value in statistics(scores, labels, None).items()}
    low: list[float | None] = [None] * len(found)
    high: list[float | None] = [None] * len(found)
    if replicates:
        drawn = bootstrap(
            lambda weights: np.stack(list(statistics(scores, labels, weights).values()), axis=1),
            labels,
            groups,
            replicates=replicates,
            seed=seed,
        )
        low, high = (limit.tolist() for limit in percentile_interval(drawn, level))
    return {
        "n": len(scores),
        "real": int((labels == 0).sum()),
        "fake": int(labels.sum()),
        "clusters": len(np.unique(groups)),
        "metrics": {name: {"value": found[name], "low": low[i], "high": high[i]} for i, name in enumerate(found)},
    }


def summarise(
    statistics: Statistics,
    definitions: Mapping[str, str],
    table: pd.DataFrame,
    *,
    replicates: int = 1000,
    seed: int = 0,
    cluster: str = "video",
    level: float = 0.95,
) -> dict[str, Any]:
    """Everything that is reported about the scores of one detector on one test set.

    Args:
        statistics: the metrics.
        definitions: metric name → what it means, for the result.
        table: one row per sample with ``score`` (P(fake)), ``label`` (0 real, 1 fake) and ``video`` (id); optional
            ``method`` (for the breakdown), ``subject`` (needed for ``cluster="subject"``), ``dataset`` (video ids and
            subjects are then taken as unique within it only), ``path`` (to name a bad sample).
        replicates: bootstrap replicates, 0 for none.
        seed: of the bootstrap.
        cluster: what is drawn again: ``video`` as in the papers' protocols, or ``subject`` where several samples show
            one person (forgeries made from a test person's own photograph).
        level: of the intervals.

    Returns:
        A JSON-ready dict: ``frame`` and ``video`` (each as :func:`evaluate`), ``method`` (name → the same two levels,
        that method's fakes against all reals), ``interval`` (how the intervals were made), ``definitions``.

    Raises:
        MetricError: a column is missing, or samples from which the metrics cannot be computed.
    """
    if cluster not in ("video", "subject"):
        raise MetricError(f"intervals are drawn over 'video' or 'subject', not {cluster!r}")
    missing = [name for name in dict.fromkeys(("score", "label", "video", cluster)) if name not in table]
    if missing:
        raise MetricError(f"the table of scores has no column {', '.join(missing)}; it has {', '.join(table.columns)}")
    if (bad := table[~np.isfinite(table["score"].astype(float))]).shape[0] and "path" in table:
        raise MetricError(f"{len(bad)} of {len(table)} scores are not finite, the first is of {bad['path'].iloc[0]}")

    def levels(part: pd.DataFrame) -> dict[str, Any]:
        videos, groups = _ids(part, "video"), _ids(part, cluster)
        ids, scores, labels = video_scores(part["score"], videos, part["label"])
        owner = pd.Series(groups).groupby(videos).agg(["first", "nunique"]).loc[ids]
        if (owner["nunique"] > 1).any():
            raise MetricError(f"video {owner.index[owner['nunique'] > 1][0]} shows several subjects; draw over videos")
        options: dict[str, Any] = {"replicates": replicates, "seed": seed, "level": level}
        return {
            "frame": evaluate(statistics, part["score"], part["label"], groups, **options),
            "video": evaluate(statistics, scores, labels, owner["first"].to_numpy(), **options),
        }

    methods = sorted(table.loc[table["label"] == 1, "method"].astype(str).unique()) if "method" in table else []
    summary = levels(table)
    summary["method"] = {
        name: levels(table[(table["label"] == 0) | (table["method"].astype(str) == name)]) for name in methods
    }
    summary["interval"] = {
        "level": level,
        "over": cluster,
        "replicates": replicates,
        "seed": seed,
        "kind": "percentile bootstrap",
    }
    summary["definitions"] = dict(definitions)
    return summary


def _ids(table: pd.DataFrame, column: str) -> np.ndarray:
    """Ids of a column as text, made unique over data sets where the table holds several."""
    if table[column].isna().any():
        raise MetricError(f"{int(table[column].isna().sum())} samples have no {column}; every sample needs one")
    ids = table[column].astype(str)
    if "dataset" in table and table["dataset"].nunique() > 1:
        ids = table["dataset"].astype(str) + "/" + ids
    return ids.to_numpy(dtype=str)
