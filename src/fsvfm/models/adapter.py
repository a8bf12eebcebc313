"""FS-Adapter: a bottleneck on the pooled feature of a frozen backbone (FS-VFM, parameter-efficient tuning)."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from fsvfm.errors import ConfigError


class Adapted(NamedTuple):
    """``hidden`` (B, dim / reduction), on which the contrastive loss works, and ``feature`` (B, dim)."""

    hidden: Tensor
    feature: Tensor


class FSAdapter(nn.Module):
    """Two linear layers without bias: h = ReLU(W1 f), a = ReLU(W2 h).

    Args:
        dim: width of the backbone's pooled feature.
        reduction: the bottleneck is ``dim / reduction`` wide (4 in the paper).

    Raises:
        ConfigError: the reduction does not divide the width.
    """

    def __init__(self, dim: int, reduction: int = 4) -> None:
        super().__init__()
        if reduction < 1 or dim % reduction:
            raise ConfigError(
                f"tune.reduction={reduction} does not divide the backbone's width {dim}; the paper uses 4"
            )
        self.width = dim // reduction
        self.down = nn.Linear(dim, self.width, bias=False)
        self.up = nn.Linear(self.width, dim, bias=False)

    def forward(self, feature: Tensor) -> Adapted:
        """(B, dim) pooled features → hidden (B, dim / reduction) and adapted feature (B, dim), both ≥ 0."""
        hidden = F.relu(self.down(feature))
        return Adapted(hidden, F.relu(self.up(hidden)))
