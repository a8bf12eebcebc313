"""What every metric asks of its samples, and the mean over a video's frames. Score = P(fake); label 0 real, 1 fake."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from fsvfm.errors import MetricError


def check_samples(scores: Any, labels: Any, names: tuple[str, str] = ("real", "fake")) -> tuple[np.ndarray, np.ndarray]:
    """Scores as (N,) float64 and labels as (N,) int64, or an error that says what is wrong with them.

    Args:
        scores: (N,) numbers.
        labels: (N,) 0 or 1.
        names: what 0 and 1 stand for, in messages.

    Raises:
        MetricError: other shapes, no sample, a score that is not finite, a label other than 0 and 1, only one class.
    """
    scores, raw = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    if scores.ndim != 1 or scores.shape != raw.shape:
        raise MetricError(f"scores and labels must be two lists of one length, got shapes {scores.shape}, {raw.shape}")
    if len(scores) == 0:
        raise MetricError(f"there are no samples; a metric needs scores of {names[0]} and of {names[1]} samples")
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        raise MetricError(
            f"{len(bad)} of {len(scores)} scores are not finite, the first is sample {bad[0]} ({scores[bad[0]]}); "
            "look at that image and at the network's weights"
        )
    if not np.isin(raw, (0, 1)).all():
        raise MetricError(f"labels must be 0 ({names[0]}) or 1 ({names[1]}), got {sorted(set(raw.tolist()))[:5]}")
    labels = raw.astype(np.int64)
    if labels.min() == labels.max():
        raise MetricError(
            f"all {len(labels)} samples are {names[labels[0]]}; "
            f"a detection metric needs {names[0]} and {names[1]} samples in the same test set"
        )
    return scores, labels


def check_probabilities(
    scores: Any, labels: Any, names: tuple[str, str] = ("real", "fake")
) -> tuple[np.ndarray, np.ndarray]:
    """Like :func:`check_samples`, for scores that must be the probability of class 1.

    Raises:
        MetricError: as :func:`check_samples`; a score outside [0, 1].
    """
    scores, labels = check_samples(scores, labels, names)
    if scores.min() < 0 or scores.max() > 1:
        raise MetricError(
            f"scores must be probabilities P({names[1]}) in [0, 1], got {scores.min():.4g} to {scores.max():.4g}"
        )
    return scores, labels


def video_scores(scores: Any, videos: Any, labels: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean of a video's frame scores.

    Args:
        scores: (N,) P(fake) per frame.
        videos: (N,) id of the frame's video, unique in its data set (FF++ ``000_003`` exists once per manipulation, so
            the id holds the manipulation's name too).
        labels: (N,) 0 real, 1 fake.

    Returns:
        ids (V,) sorted, scores (V,) float64, labels (V,) int64. The order of the frames does not change a single bit.

    Raises:
        MetricError: as :func:`check_samples`; ids missing; a video whose frames carry both labels.
    """
    scores, labels = check_samples(scores, labels)
    videos = np.asarray(videos)
    if videos.shape != scores.shape or pd.isna(videos).any():
        raise MetricError("every sample needs a video id (for a photograph: its own name); some are missing")
    ids, index, counts = np.unique(videos, return_inverse=True, return_counts=True)
    fakes = np.bincount(index, weights=labels)
    mixed = np.flatnonzero((fakes > 0) & (fakes < counts))
    if len(mixed):
        names = ", ".join(str(ids[i]) for i in mixed[:5])
        raise MetricError(
            f"{len(mixed)} video(s) have frames labelled real and frames labelled fake: {names}. "
            "A video id must be unique in its data set; put the method's name into it"
        )
    # Frames are summed in the order of their scores, so that batches and workers cannot change the last bit.
    order = np.lexsort((scores, index))
    sums = np.add.reduceat(scores[order], np.concatenate([[0], np.cumsum(counts)[:-1]]))
    return ids, sums / counts, (fakes > 0).astype(np.int64)
