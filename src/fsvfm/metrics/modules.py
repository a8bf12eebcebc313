"""Metrics as torchmetrics modules, for what that library lacks or defines otherwise.

They keep every sample, gather them over processes, and compute once from all of them with this package's functions:
a value does not depend, to the last bit, on how samples were split into batches and processes. Call ``update`` in the
validation step and hand the module to ``self.log``. Score = P(fake) or P(attack), label 1 fake or attack.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from fsvfm.errors import MetricError
from fsvfm.metrics.antispoof import antispoof_metrics
from fsvfm.metrics.forgery import eer, tpr_at_fpr
from fsvfm.metrics.samples import check_samples, video_scores

_UNKNOWN = -1  # index of a sample whose index was not given


class SampleMetric(Metric):
    """Base: keeps scores, labels and, where given, the samples' indices; every sample counts once.

    Samplers of distributed runs repeat samples so that all processes get equally many. Those that share an index are
    counted once.

    Args:
        kwargs: of :class:`torchmetrics.Metric`.
    """

    is_differentiable = False
    full_state_update = False
    needs: tuple[str, ...] = ("scores", "labels")
    scores: list[Tensor]
    labels: list[Tensor]
    samples: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._keep("scores", "labels", "samples")

    def _keep(self, *names: str) -> None:
        for name in names:
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, scores: Tensor, labels: Tensor, samples: Tensor | None = None) -> None:
        """Take in a batch.

        Args:
            scores: (B,) P(fake).
            labels: (B,) integers, 0 real, 1 fake.
            samples: (B,) integers, index of each sample in its data set.

        Raises:
            MetricError: tensors of other shapes or types.
        """
        self._take(scores, samples, labels=labels)

    def _take(self, scores: Tensor, samples: Tensor | None, **columns: Tensor) -> None:
        """Check all of a batch, then append all of it."""
        if scores.ndim != 1:
            raise MetricError(f"scores must be a list of one number per sample, got shape {tuple(scores.shape)}")
        columns["samples"] = torch.full(scores.shape, _UNKNOWN) if samples is None else samples
        checked = {name: _integers(name, values, scores) for name, values in columns.items()}
        for name, values in checked.items():
            getattr(self, name).append(values)
        self.scores.append(scores.detach().to(_float(scores.device)))

    @abstractmethod
    def value(self, *arrays: np.ndarray) -> float:
        """The metric of all samples; takes the states named by ``needs``, each (N,)."""

    def compute(self) -> Tensor:
        """The metric of all samples of all processes, a scalar.

        Raises:
            MetricError: no sample, only one class, a score that is not finite, and what else the metric refuses.
        """
        if not len(self.scores):
            raise MetricError(f"{type(self).__name__} has seen no samples; call update before compute")
        states = {name: dim_zero_cat(getattr(self, name)).cpu().numpy() for name in self._reductions}
        order = np.lexsort((states["scores"], states["samples"]))
        index = states["samples"][order]
        kept = order[(index == _UNKNOWN) | (np.diff(index, prepend=_UNKNOWN) != 0)]
        check_samples(states["scores"][kept], states["labels"][kept])
        value = self.value(*(states[name][kept] for name in self.needs))
        return torch.tensor(value, device=self.device, dtype=torch.get_default_dtype())

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        # For a process without samples torchmetrics gathers float32 in place of each state, which does not match the
        # other processes' types.
        for name in self._reductions:
            if not len(getattr(self, name)):
                kind = _float(self.device) if name == "scores" else torch.int64
                setattr(self, name, [torch.empty(0, dtype=kind, device=self.device)])
        super()._sync_dist(*args, **kwargs)


class HTER(SampleMetric):
    """Half total error rate at the grid threshold chosen on these samples, see :mod:`fsvfm.metrics.antispoof`."""

    higher_is_better = False

    def value(self, *arrays: np.ndarray) -> float:
        """HTER in [0, 1] of P(attack) and labels."""
        scores, labels = arrays
        return antispoof_metrics(1 - scores, 1 - labels).hter


class EqualErrorRate(SampleMetric):
    """Equal error rate on the interpolated ROC curve, solved exactly; torchmetrics' EER takes the nearest threshold."""

    higher_is_better = False

    def value(self, *arrays: np.ndarray) -> float:
        """EER in [0, 1] of scores and labels."""
        return eer(*arrays)


class TPRAtFPR(SampleMetric):
    """Largest true-positive rate at a threshold with FPR ≤ ``limit``, no interpolation.

    Args:
        limit: largest false-positive rate in [0, 1].
        positive: the class whose rate it is: ``fake`` in forgery detection, ``real`` in the anti-spoofing papers.
        kwargs: of :class:`torchmetrics.Metric`.

    Raises:
        MetricError: an impossible limit or class.
    """

    higher_is_better = True

    def __init__(self, limit: float, *, positive: Literal["fake", "real"] = "fake", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 <= limit <= 1:
            raise MetricError(f"a false-positive rate lies in [0, 1] (0.01 for 1 %), got {limit}")
        if positive not in ("fake", "real"):
            raise MetricError(f"the positive class is 'fake' or 'real', not {positive!r}")
        self.limit, self.positive = limit, positive

    def value(self, *arrays: np.ndarray) -> float:
        """TPR in [0, 1] of scores and labels."""
        scores, labels = arrays
        if self.positive == "real":
            scores, labels = 1 - scores, 1 - labels
        return tpr_at_fpr(scores, labels, self.limit)


class VideoLevel(SampleMetric):
    """Any binary metric on the means of videos' frame scores.

    Args:
        metric: a module that takes scores and labels (torchmetrics' ``BinaryAUROC()``, :class:`HTER` …), of which a
            copy is used.
        kwargs: of :class:`torchmetrics.Metric`.
    """

    needs = ("scores", "labels", "videos")
    videos: list[Tensor]

    def __init__(self, metric: Metric, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._keep("videos")
        self.metric = metric.clone()
        for part in self.metric.modules():
            if isinstance(part, Metric):
                part.distributed_available_fn = _alone

    def update(  # type: ignore[override]
        self, scores: Tensor, labels: Tensor, videos: Tensor, samples: Tensor | None = None
    ) -> None:
        """Take in a batch of frames.

        Args:
            scores: (B,) P(fake).
            labels: (B,) integers, 0 real, 1 fake.
            videos: (B,) integers, the same for all frames of a video in all processes (text cannot be gathered).
            samples: (B,) integers, index of each frame in its data set.

        Raises:
            MetricError: tensors of other shapes or types.
        """
        self._take(scores, samples, labels=labels, videos=videos)

    def value(self, *arrays: np.ndarray) -> float:
        """The inner metric of scores, labels and videos."""
        scores, labels, videos = arrays
        _, means, truth = video_scores(scores, videos, labels)
        self.metric.reset()
        self.metric.update(
            torch.from_numpy(means).to(self.device, _float(self.device)), torch.from_numpy(truth).to(self.device)
        )
        result = float(self.metric.compute())
        self.metric.reset()
        return result


def _alone() -> bool:
    """Whether an inner metric is to gather over processes: no, it is given the samples of all."""
    return False


def _float(device: torch.device) -> torch.dtype:
    """float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def _integers(name: str, values: Tensor, scores: Tensor) -> Tensor:
    """(B,) int64, or an error."""
    if not isinstance(values, Tensor) or values.is_floating_point() or values.is_complex():
        kind = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise MetricError(
            f"{name} must be a tensor of integers, got {kind}; number them, for example with pandas.factorize"
        )
    if values.shape != scores.shape:
        raise MetricError(f"{len(scores)} scores but {name} of shape {tuple(values.shape)}; give one per score")
    return values.detach().to(scores.device, torch.int64)
