"""Losses as pure functions: reconstruction, instance discrimination, contrast (FS-VFM; FSFM, sec. 3); in float32."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fsvfm.errors import ConfigError
from fsvfm.models.vit import patchify, take

PIXEL_EPS = 1e-6  # Added to a patch's variance, so that a flat patch stays finite.
CONTRAST_EPS = 1e-6  # Added inside the logarithm of the contrastive losses; the value without a real face, too.
BASE_TEMPERATURE = 0.07  # The contrastive losses are multiplied by temperature / base temperature.


def patch_targets(images: Tensor, patch_size: int, normalize: bool = True, *, patches: Tensor | None = None) -> Tensor:
    """Pixels to reconstruct, patch by patch.

    Args:
        images: (B, 3, S, S) float, as the network gets them.
        patch_size: side of a patch, pixels.
        normalize: centre every patch and divide it by the root of its own unbiased variance + 1e-6; the papers' choice.
        patches: (B, N) int64 ids of the patches wanted, or None for all L.

    Returns:
        (B, L or N, p²·3) float32.

    Raises:
        ConfigError: the image is not divisible into patches.
    """
    pixels = patchify(images, patch_size)
    if patches is not None:
        pixels = take(pixels, patches)
    pixels = pixels.float()
    if not normalize:
        return pixels
    mean = pixels.mean(dim=-1, keepdim=True)
    variance = pixels.var(dim=-1, keepdim=True, unbiased=True)
    return (pixels - mean) / (variance + PIXEL_EPS).sqrt()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` (any shape) where `mask` (same shape, bool or 0/1) is true; 0 if it never is."""
    mask = mask.bool()
    total = torch.where(mask, values, torch.zeros_like(values)).sum()
    return total / mask.sum().clamp(min=1)


def patch_errors(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each patch: (B, N, p²·3) and (B, N, p²·3) to (B, N) float32."""
    return (prediction.float() - target.float()).square().mean(dim=-1)


def reconstruction_loss(prediction: Tensor, target: Tensor, masked: Tensor) -> Tensor:
    """Mean over the patches of `masked`, in the whole batch, of the patch's mean squared error.

    With the mask of all hidden patches it is L_rec, with the region mask L_region; a region mask that is empty
    everywhere (strategies that cover no region) gives 0, not NaN.

    Args:
        prediction: (B, L, p²·3) float.
        target: (B, L, p²·3) float, from `patch_targets`.
        masked: (B, L) bool.

    Returns:
        Scalar, float32, >= 0.
    """
    return masked_mean(patch_errors(prediction, target), masked)


def simsiam(prediction: Tensor, target: Tensor) -> Tensor:
    """SimSiam form of the online branch: −½ · mean cosine of (B, d) and (B, d); in [−0.5, 0.5]. The papers' L_sim."""
    return -0.5 * F.cosine_similarity(prediction.float(), target.float(), dim=-1).mean()


def byol(prediction: Tensor, target: Tensor) -> Tensor:
    """BYOL: 2 − 2 · mean cosine of (B, d) and (B, d); in [0, 4]."""
    return 2.0 - 2.0 * F.cosine_similarity(prediction.float(), target.float(), dim=-1).mean()


def infonce(prediction: Tensor, target: Tensor, *, temperature: float = 0.1, negatives: str = "all") -> Tensor:
    """InfoNCE from prediction to target, times 2 · temperature.

    Args:
        prediction: (B, d) float.
        target: (B, d) float; row i is the positive of prediction i.
        temperature: > 0.
        negatives: ``all``: the logits of other images are their cosines / temperature. ``positive``: only the positive
            pair is compared, the logits of others are 0 (that is what the published option computes).

    Returns:
        Scalar, float32, >= 0.

    Raises:
        ConfigError: unknown `negatives`, or a temperature that is not positive.
    """
    if negatives not in ("all", "positive"):
        raise ConfigError(f"infonce negatives {negatives!r}; expected all or positive.")
    _check_temperature(temperature)
    logits = F.normalize(prediction.float(), dim=-1) @ F.normalize(target.float(), dim=-1).T / temperature
    if negatives == "positive":
        logits = torch.diag(logits.diagonal())
    own = torch.arange(len(logits), device=logits.device)
    return 2.0 * temperature * F.cross_entropy(logits, own)


def mocov3(prediction: Tensor, target: Tensor, *, temperature: float = 0.1) -> Tensor:
    """MoCo v3 contrastive loss of one direction: 2 · temperature · cross entropy over the batch, (B, d) and (B, d)."""
    return infonce(prediction, target, temperature=temperature, negatives="all")


def simclr(prediction: Tensor, target: Tensor, *, temperature: float = 0.1) -> Tensor:
    """SimCLR (NT-Xent) over the 2B features of both networks, (B, d) each, times temperature / 0.07, as published."""
    pair = torch.arange(len(prediction), device=prediction.device)
    features = torch.cat([prediction.float(), target.float()])
    return supcon(features, torch.cat([pair, pair]), temperature=temperature)


def supcon(
    features: Tensor, labels: Tensor, *, temperature: float = 0.07, base_temperature: float = BASE_TEMPERATURE
) -> Tensor:
    """Supervised contrastive loss: every other sample of the same label is a positive.

    Args:
        features: (N, d) float, normalised here; several views of a sample are several rows.
        labels: (N,) integer.
        temperature: > 0.
        base_temperature: the loss is multiplied by temperature / base_temperature; > 0.

    Returns:
        Scalar, float32, the mean over all N anchors; an anchor without positives contributes 0.

    Raises:
        ConfigError: a temperature that is not positive.
    """
    return _contrast(features, labels[:, None] == labels[None, :], temperature, base_temperature)


def real_anchor_contrastive(
    features: Tensor,
    labels: Tensor,
    real_class: int,
    temperature: float = 0.07,
    base_temperature: float = BASE_TEMPERATURE,
) -> Tensor:
    """Contrastive loss whose positive pairs are real–real only (FS-VFM, FS-Adapter): fakes are not attracted.

    Args:
        features: (N, d) float, normalised here.
        labels: (N,) integer, the labels before mixup.
        real_class: the label of real faces.
        temperature: > 0.
        base_temperature: the loss is multiplied by temperature / base_temperature; > 0.

    Returns:
        Scalar, float32: the sum over real anchors divided by N (anchors of both kinds, as published). 0 with a single
        real face; the constant 1e-6 with none.

    Raises:
        ConfigError: a temperature that is not positive.
    """
    real = labels == real_class
    loss = _contrast(features, real[:, None] & real[None, :], temperature, base_temperature)
    return torch.where(real.any(), loss, torch.full_like(loss, CONTRAST_EPS))


def _contrast(features: Tensor, positives: Tensor, temperature: float, base_temperature: float) -> Tensor:
    """Mean over anchors of the mean −log p over positives (N, N); p is a softmax over all others of features (N, d)."""
    _check_temperature(temperature)
    _check_temperature(base_temperature)
    features = F.normalize(features.float(), dim=-1)
    logits = features @ features.T / temperature
    # The largest logit, the sample's own, is subtracted first; the recorded values have the epsilon relative to it.
    logits = logits - logits.max(dim=1, keepdim=True).values.detach()
    others = ~torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    log_sum = ((logits.exp() * others).sum(dim=1, keepdim=True) + CONTRAST_EPS).log()
    positives = positives & others
    per_anchor = -((logits - log_sum) * positives).sum(dim=1) / positives.sum(dim=1).clamp(min=1)
    return temperature / base_temperature * per_anchor.mean()


def _check_temperature(value: float) -> None:
    if not value > 0:
        raise ConfigError(f"temperature is {value}; expected a value above 0.")


class _Gather(torch.autograd.Function):
    """All processes' features; backward hands each process the gradient of its own rows."""

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        ctx.rows = len(features)
        parts = [torch.empty_like(features) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, features.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        start = dist.get_rank() * ctx.rows
        # Every process computes the same loss of the joint batch, and DDP averages parameter gradients over processes:
        # multiplying by their number makes the result the gradient of the joint batch, without another exchange.
        return gradients[0][start : start + ctx.rows] * dist.get_world_size()


def gather_features(features: Tensor) -> Tensor:
    """Concatenate the features of all processes; the identity outside torch.distributed.

    Args:
        features: (B, d) float, the same B in every process.

    Returns:
        (B · processes, d), in rank order. This process's rows keep their gradient, scaled so that the usual averaging
        of gradients over processes gives exactly the gradient of one process with the joint batch.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return features
    return cast(Tensor, _Gather.apply(features))


def _over_joint_batch(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Give a loss that compares a sample with the whole batch the features of all processes."""

    @functools.wraps(loss)
    def gathered(prediction: Tensor, target: Tensor, **options: Any) -> Tensor:
        return loss(gather_features(prediction), gather_features(target), **options)

    return gathered


# L_sim by name: (prediction (B, d), target (B, d), **options) -> scalar, over the joint batch of all processes.
SIMILARITY: dict[str, Callable[..., Tensor]] = {
    "simsiam": simsiam,
    "byol": byol,
    "infonce": _over_joint_batch(infonce),
    "mocov3": _over_joint_batch(mocov3),
    "simclr": _over_joint_batch(simclr),
}
