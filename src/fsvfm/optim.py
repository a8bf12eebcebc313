"""Parameter groups, the linear learning-rate rule and AdamW (FS-VFM, optimisation)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from fsvfm.errors import ConfigError

Group = dict[str, Any]
NamedParameters = Iterable[tuple[str, nn.Parameter]]

_BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")
_EMBEDDING = re.compile(r"(?:^|\.)(cls_token|pos_embed|mask_token|patch_embed\..*)$")
_NO_DECAY_TOKEN = re.compile(r"(?:^|\.)(cls_token|pos_embed)$")


def scale_lr(base_lr: float, effective_batch: int) -> float:
    """Return base_lr · effective_batch / 256; the batch counts devices, nodes and accumulation.

    Raises:
        ConfigError: a rate or batch that is not positive.
    """
    if base_lr <= 0 or effective_batch <= 0:
        raise ConfigError(f"base lr {base_lr} with an effective batch of {effective_batch}; expected both above 0.")
    return base_lr * effective_batch / 256


def weight_decay_groups(parameters: nn.Module | NamedParameters, weight_decay: float) -> list[Group]:
    """Split trainable parameters into decayed ones and the rest, for pre-training.

    Biases and everything one-dimensional (norms) are not decayed; CLS and mask token are, being matrices by shape.
    Frozen parameters belong to no group.

    Args:
        parameters: a module, or (name, parameter) pairs.
        weight_decay: decay of the first group, >= 0.

    Returns:
        Groups {name, params, weight_decay, lr_scale = 1}; empty groups are left out.
    """
    groups: dict[str, Group] = {}
    for name, parameter in _trainable(parameters):
        kind = "no_decay" if _one_dimensional(name, parameter) else "decay"
        _add(groups, kind, parameter, 0.0 if kind == "no_decay" else weight_decay, 1.0)
    return list(groups.values())


def layer_decay_groups(
    parameters: nn.Module | NamedParameters,
    weight_decay: float,
    layer_decay: float | None,
    *,
    depth: int | None = None,
    backbone_prefix: str = "backbone.",
    layers: Mapping[str, int] | None = None,
) -> list[Group]:
    """Split trainable parameters by layer, each with lr_scale = layer_decay ** (depth + 1 − id), for fine-tuning.

    Layer 0 holds the embeddings, layer i + 1 block i, layer depth + 1 `fc_norm`, the head and all else.
    One-dimensional parameters, CLS and position embedding are not decayed.

    Args:
        parameters: a module, or (name, parameter) pairs.
        weight_decay: >= 0.
        layer_decay: in (0, 1]; 1 gives every layer the full rate.
        depth: transformer blocks of the backbone; None counts them by name.
        backbone_prefix: what the backbone's names begin with; "" for a bare backbone. Blocks of anything
            else (an adapter's, say) count as head.
        layers: layer of every parameter of the backbone by its name in it, from 0, for backbones without such
            blocks; the head comes one layer after the last.

    Returns:
        Groups {name, params, weight_decay, lr_scale}, from the embeddings to the head. A scheduler must multiply
        by lr_scale, see `set_lr`.

    Raises:
        ConfigError: decay out of range, a block with an index of `depth` or more, or no block to count.
    """
    if layer_decay is None or not 0.0 < layer_decay <= 1.0:
        raise ConfigError(f"layer_decay is {layer_decay}; expected a value in (0, 1].")
    pairs = list(parameters.named_parameters() if isinstance(parameters, nn.Module) else parameters)
    if layers is not None:
        depth = max(layers.values())
    elif depth is None:
        depth = _count_blocks([name for name, _ in pairs], backbone_prefix)
    groups: dict[str, Group] = {}
    order: dict[str, int] = {}
    for name, parameter in _trainable(pairs):
        if layers is None:
            layer = _layer_id(name, depth, backbone_prefix)
        else:
            layer = layers.get(name.removeprefix(backbone_prefix), depth + 1)
        in_backbone = name.startswith(backbone_prefix)
        plain = _one_dimensional(name, parameter) or (in_backbone and _NO_DECAY_TOKEN.search(name) is not None)
        key = f"layer_{layer}_{'no_decay' if plain else 'decay'}"
        _add(groups, key, parameter, 0.0 if plain else weight_decay, layer_decay ** (depth + 1 - layer))
        order[key] = layer
    return [groups[key] for key in sorted(groups, key=lambda key: order[key])]


def _count_blocks(names: list[str], backbone_prefix: str) -> int:
    # Frozen blocks count too: freezing the last ones must not raise the rate of the others.
    found = (_BLOCK.search(name) for name in names if name.startswith(backbone_prefix))
    indices = [int(block.group(1)) for block in found if block]
    if not indices:
        raise ConfigError(f"no parameter is named {backbone_prefix}blocks.<number>; give backbone_prefix or depth.")
    return max(indices) + 1


def _layer_id(name: str, depth: int, backbone_prefix: str) -> int:
    if not name.startswith(backbone_prefix):
        return depth + 1
    inner = name[len(backbone_prefix) :]
    if _EMBEDDING.search(inner):
        return 0
    block = _BLOCK.search(inner)
    if block is None:
        return depth + 1
    index = int(block.group(1))
    if index >= depth:
        raise ConfigError(f"parameter {name} is in block {index}, but depth is {depth}; give the backbone's own depth.")
    return index + 1


def _trainable(parameters: nn.Module | NamedParameters) -> list[tuple[str, nn.Parameter]]:
    pairs = parameters.named_parameters() if isinstance(parameters, nn.Module) else parameters
    return [(name, parameter) for name, parameter in pairs if parameter.requires_grad]


def _one_dimensional(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim <= 1 or name.endswith(".bias")


def _add(groups: dict[str, Group], name: str, parameter: nn.Parameter, weight_decay: float, lr_scale: float) -> None:
    group = groups.setdefault(name, {"name": name, "params": [], "weight_decay": weight_decay, "lr_scale": lr_scale})
    group["params"].append(parameter)


def build_adamw(
    groups: list[Group],
    lr: float,
    *,
    betas: tuple[float, float] = (0.9, 0.95),
    fused: bool = True,
    decoupled: bool = True,
) -> torch.optim.Optimizer:
    """Build AdamW over parameter groups, each at lr · its lr_scale.

    The fused kernel also skips a whole step, on the device, where `optimizer.found_inf` (float32, no dimensions) is 1:
    weights, moments and step counts stay as they are. fp16 training with a gradient scaler sets that attribute itself.

    Args:
        groups: from `weight_decay_groups` or `layer_decay_groups`.
        lr: learning rate of a group with lr_scale 1, >= 0.
        betas: decay of the two moments; (0.9, 0.95) in pre-training, (0.9, 0.999) in fine-tuning.
        fused: use the fused kernel.
        decoupled: False builds Adam instead: the weight decay is added to the gradient, so the moments see it.

    Raises:
        ConfigError: nothing to train.
    """
    if not any(group["params"] for group in groups):
        raise ConfigError("no trainable parameter is left for the optimiser; check what is frozen.")
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizer = kind(groups, lr=lr, betas=betas, fused=fused)
    set_lr(optimizer, lr)
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the rate lr · lr_scale (lr_scale 1 where a group has none); call it every step."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
