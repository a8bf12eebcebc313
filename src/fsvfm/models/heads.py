"""Heads on the pooled feature of a backbone: linear, FS-Adapter, and the anti-spoofing head.

All take ``(feature (B, dim), tokens (B, 1 + L, dim))`` and return logits (B, classes) and, with an adapter, the
L2-normalised projection for the contrastive loss. Only the anti-spoofing head's quirk looks at the tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsvfm.errors import ConfigError
from fsvfm.models.adapter import FSAdapter


class DetectorOutput(NamedTuple):
    """``logits`` (B, classes) in the order of the detector's classes; ``projection`` (B, p) of unit length or None."""

    logits: Tensor
    projection: Tensor | None


def _classifier(inputs: int, classes: int) -> nn.Linear:
    """Last layer that starts undecided: weight N(0, 2e-5), bias 0."""
    layer = nn.Linear(inputs, classes)
    nn.init.normal_(layer.weight, std=2e-5)
    nn.init.zeros_(layer.bias)
    return layer


class LinearHead(nn.Module):
    """logits = W f + b."""

    def __init__(self, dim: int, classes: int = 2) -> None:
        super().__init__()
        self.fc = _classifier(dim, classes)

    def forward(self, feature: Tensor, tokens: Tensor | None = None) -> DetectorOutput:
        """(B, dim) → logits (B, classes), no projection."""
        return DetectorOutput(self.fc(feature), None)


class AdapterHead(nn.Module):
    """FS-Adapter: logits = W [f; a] + b with a the adapted feature; z = normalise(P h) for the loss only."""

    def __init__(self, dim: int, classes: int = 2, reduction: int = 4) -> None:
        super().__init__()
        self.adapter = FSAdapter(dim, reduction)
        self.projection = nn.Linear(self.adapter.width, self.adapter.width)
        self.fc = _classifier(2 * dim, classes)

    def forward(self, feature: Tensor, tokens: Tensor | None = None) -> DetectorOutput:
        """(B, dim) → logits (B, classes) and projection (B, dim / reduction) of unit length."""
        hidden, adapted = self.adapter(feature)
        logits = self.fc(torch.cat([feature, adapted], dim=-1))
        return DetectorOutput(logits, F.normalize(self.projection(hidden), dim=-1))


class FASHead(nn.Module):
    """Anti-spoofing head: Linear to 512 → ReLU → Dropout → x / sqrt(2 ‖x‖) → Linear with weights of unit length.

    The classifier works with its weight L2-normalised over the class axis. In training that is done in place, before
    every forward, as the published code does it: checkpoints hold whatever the last optimiser step left. In evaluation
    the weight stays as it is, so that a score does not depend on how many faces were scored before.

    Args:
        dim: width of the pooled feature.
        classes: number of classes.
        reduction: None for the bare head; a number puts FS-Adapter in front, the embedder then sees [f; a].
        quirk: compute as the published code does in full fine-tuning: the sequence [pooled feature, patch tokens]
            goes through, and the norm is taken over its positions for each channel instead of over the channels;
            position 0 gives the logits. Released fully fine-tuned anti-spoofing checkpoints need it.

    Raises:
        ConfigError: the quirk together with an adapter, which no released checkpoint combines.
    """

    def __init__(
        self,
        dim: int,
        classes: int = 2,
        *,
        reduction: int | None = None,
        quirk: bool = False,
        width: int = 512,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        if quirk and reduction is not None:
            raise ConfigError("the anti-spoofing quirk belongs to full fine-tuning; turn it off with tune=adapter")
        self.quirk = quirk
        self.adapter: FSAdapter | None = None
        self.projection: nn.Linear | None = None
        if reduction is not None:
            self.adapter = FSAdapter(dim, reduction)
            self.projection = nn.Linear(self.adapter.width, self.adapter.width)
        self.embed = nn.Linear(dim if reduction is None else 2 * dim, width)
        nn.init.normal_(self.embed.weight, std=0.005)
        nn.init.constant_(self.embed.bias, 0.1)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(width, classes)

    def embedding(self, inputs: Tensor) -> Tensor:
        """(B, d), or with the quirk (B, positions, d) → embedding (B, 512), position 0 of it."""
        hidden = self.dropout(F.relu(self.embed(inputs)))
        axis = 1 if self.quirk else -1
        length = torch.linalg.vector_norm(hidden, dim=axis, keepdim=True, dtype=torch.float32)
        # The floor, under the root, keeps zeros (all units dead or dropped) from 0/0 in the value and in the gradient.
        hidden = hidden / (2 * length).clamp_min(1e-12).sqrt()
        return hidden[:, 0] if self.quirk else hidden

    def classify(self, embedding: Tensor) -> Tensor:
        """(B, 512) → logits (B, classes)."""
        if not self.training:
            return F.linear(embedding, F.normalize(self.fc.weight, dim=0), self.fc.bias)
        # Through .data: not part of the gradient, and no version check fails when two batches run before one backward.
        self.fc.weight.data.copy_(F.normalize(self.fc.weight.data, dim=0))
        return self.fc(embedding)

    def forward(self, feature: Tensor, tokens: Tensor | None = None) -> DetectorOutput:
        """(B, dim) features and, for the quirk, (B, 1 + L, dim) tokens (CLS first) → logits (B, classes)."""
        if self.quirk:
            if tokens is None:
                raise ConfigError("the anti-spoofing quirk works on the token sequence; pass tokens (B, 1 + L, dim)")
            return DetectorOutput(self.classify(self.embedding(torch.cat([feature[:, None], tokens[:, 1:]], 1))), None)
        if self.adapter is None or self.projection is None:
            return DetectorOutput(self.classify(self.embedding(feature)), None)
        hidden, adapted = self.adapter(feature)
        logits = self.classify(self.embedding(torch.cat([feature, adapted], dim=-1)))
        return DetectorOutput(logits, F.normalize(self.projection(hidden), dim=-1))
