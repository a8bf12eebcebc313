"""Training steps the plain way, kept to measure ours against.

The networks are ours, so that both do the same work, but with attention written out: all L × L weights, softmax,
product. Everything around them is what a first script would do: normalised float32 images from the host, masks one
image at a time from the parsing maps, pixels predicted and compared everywhere and the rest thrown away, the loss read
back in every step, an optimiser and an EMA that go through the parameters one by one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from baseline.masking import crfr_p_loop
from torch import Tensor, nn
from torch.nn import functional as F


def write_out_attention(network: nn.Module) -> None:
    """Make timm's attention layers multiply, take the softmax and multiply, instead of one fused operation."""
    for module in network.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False


class PlainStep:
    """One optimisation step of a network.

    Args:
        network: what is trained.
        device: where.
        bf16: autocast to bfloat16.
        clip: largest gradient norm, None for no limit.
    """

    def __init__(self, network: nn.Module, device: str, bf16: bool, clip: float | None) -> None:
        write_out_attention(network)
        self.network, self.device, self.bf16, self.clip = network, device, bf16, clip
        trained = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.05, foreach=False, fused=False)

    def loss(self) -> Tensor:
        """Loss of a batch."""
        raise NotImplementedError

    def __call__(self) -> float:
        """Forward, backward, update; the loss."""
        with torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.bf16):
            loss = self.loss()
        value = loss.item()
        if not np.isfinite(value):
            raise FloatingPointError(f"loss is {value}")
        self.optimizer.zero_grad()
        loss.backward()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.clip, foreach=False)
        self.optimizer.step()
        if self.device != "cpu":
            torch.cuda.synchronize(self.device)
        return value


class PlainPretraining(PlainStep):
    """Pre-training: reconstruction of masked patches and of the covered region, and the target's features.

    Args:
        online: network that is trained.
        target: its moving average.
        images: (B, 3, S, S) float32, normalised, on the host.
        maps: (B, S, S) uint8 parsing maps.
        device: where the networks are.
        bf16: autocast to bfloat16.
    """

    def __init__(
        self, online: Any, target: nn.Module, images: Tensor, maps: np.ndarray, device: str, bf16: bool
    ) -> None:
        super().__init__(online, device, bf16, clip=1.0)
        write_out_attention(target)
        self.target, self.images, self.maps = target, images, maps
        self.rng = np.random.default_rng(0)

    def loss(self) -> Tensor:
        """L = L_rec + 0.007 · L_region + 0.1 · L_sim."""
        patch = self.network.encoder.config.patch_size
        masked, region = (torch.from_numpy(m).to(self.device) for m in crfr_p_loop(self.maps, 0.75, patch, self.rng))
        images = self.images.to(self.device)
        output = self.network(images, masked)  # type: ignore[operator]
        batch, _, side, _ = images.shape
        cells = images.reshape(batch, 3, side // patch, patch, side // patch, patch)
        pixels = torch.einsum("bkrysx->brsyxk", cells).reshape(batch, -1, 3 * patch**2)
        pixels = (pixels - pixels.mean(-1, keepdim=True)) / (pixels.var(-1, keepdim=True) + 1e-6) ** 0.5
        error = (output.prediction.float() - pixels).pow(2).mean(-1)
        with torch.no_grad():
            feature = self.target(images)
        similarity = -0.5 * F.cosine_similarity(output.feature, feature, dim=-1).mean()
        return (error * masked).sum() / masked.sum() + 0.007 * (error * region).sum() / region.sum() + 0.1 * similarity

    def __call__(self) -> float:
        """The step, then the moving average, parameter by parameter."""
        value = super().__call__()
        own = dict(self.network.named_parameters())
        with torch.no_grad():
            for name, parameter in self.target.named_parameters():
                parameter.data = 0.996 * parameter.data + 0.004 * own[name].data
        return value


class PlainFinetuning(PlainStep):
    """Fine-tuning of a detector: cross entropy on two classes.

    Args:
        network: detector, images to logits and projection.
        images: (B, 3, S, S) float32, normalised, on the host.
        labels: (B,) int64.
        device: where the network is.
        bf16: autocast to bfloat16.
    """

    def __init__(self, network: nn.Module, images: Tensor, labels: Tensor, device: str, bf16: bool) -> None:
        super().__init__(network, device, bf16, clip=None)
        self.images, self.labels = images, labels

    def loss(self) -> Tensor:
        """Cross entropy."""
        logits, _ = self.network(self.images.to(self.device))
        return F.cross_entropy(logits.float(), self.labels.to(self.device))
