"""Putting a state dict into a module so that every key is accounted for."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsvfm.errors import CheckpointError
from fsvfm.published import listing


@dataclass(frozen=True)
class LoadReport:
    """What `load_into` did with every key: loaded, not needed, left at its initial value, interpolated."""

    used: tuple[str, ...]
    unused: tuple[str, ...]
    missing: tuple[str, ...]
    resized: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"used {len(self.used)} keys"]
        for name, keys in (("resized", self.resized), ("unused", self.unused), ("missing", self.missing)):
            if keys:
                parts.append(f"{name} {len(keys)} keys:{listing(keys)}")
        return "\n".join(parts)


def load_into(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    expect_missing: Iterable[str] = (),
    expect_unused: Iterable[str] = (),
    resize: bool = True,
) -> LoadReport:
    """Copy a state dict into a module; every key is either used or was expected not to be.

    Args:
        module: receives the tensors in place, on its own device and in its own dtype.
        state: our key names → tensors.
        expect_missing: shell patterns of module keys that may keep their initial values.
        expect_unused: shell patterns of state keys that may be left over.
        resize: interpolate position embeddings of another grid size (reported); otherwise that is an error.

    Raises:
        CheckpointError: keys missing or left over that no pattern explains, or tensors of another shape. The module is
            unchanged then.
    """
    own = module.state_dict()
    missing, unused = [k for k in own if k not in state], [k for k in state if k not in own]
    used = {key: state[key] for key in own if key in state}  # in the model's order, the embeddings first
    resized, problems = [], []
    for key, tensor in used.items():
        wanted = own[key].shape
        if tensor.shape == wanted:
            continue
        grid = math.isqrt(max(wanted[1] - 1, 0)) if len(wanted) == 3 else 0
        is_position = key.split(".")[-1] == "pos_embed" and tensor.dim() == 3 and tensor.shape[::2] == wanted[::2]
        if resize and is_position and grid * grid + 1 == wanted[1]:
            used[key] = resize_pos_embed(tensor, grid)
            resized.append(key)
        else:
            problems.append(f"{key} is {tuple(tensor.shape)} in the checkpoint, {tuple(wanted)} in the model")
    lines = "".join(f"\n  {p}" for p in problems[:6]) + (
        f"\n  … and {len(problems) - 6} more" if len(problems) > 6 else ""
    )
    text = [f"tensors of another shape (another model size?):{lines}"] if problems else []
    for keys, patterns, what in (
        (missing, tuple(expect_missing), "the model needs keys that the checkpoint lacks"),
        (unused, tuple(expect_unused), "the checkpoint has keys that the model does not know"),
    ):
        unexplained = [k for k in keys if not any(fnmatch.fnmatchcase(k, p) for p in patterns)]
        if unexplained:
            text.append(f"{what}:{listing(unexplained)}")
    if text:
        raise CheckpointError(f"the checkpoint does not fit {type(module).__name__}; " + "\n".join(text))
    module.load_state_dict(used, strict=False)
    return LoadReport(tuple(used), tuple(unused), tuple(missing), tuple(resized))


def resize_pos_embed(pos_embed: Tensor, grid: int) -> Tensor:
    """Bicubic interpolation of a (1, 1 + g², dim) position embedding to (1, 1 + grid², dim); the CLS position is kept.

    Raises:
        CheckpointError: the patch positions are no square grid, or `grid` is not positive.
    """
    old = math.isqrt(max(pos_embed.shape[1] - 1, 0))
    if pos_embed.dim() != 3 or old * old + 1 != pos_embed.shape[1] or old == 0 or grid < 1:
        raise CheckpointError(
            f"cannot resize a position embedding of shape {tuple(pos_embed.shape)} to a {grid}×{grid} grid"
        )
    if old == grid:
        return pos_embed
    cls, patches = pos_embed[:, :1], pos_embed[:, 1:]
    image = patches.reshape(1, old, old, -1).permute(0, 3, 1, 2).float()
    image = F.interpolate(image, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([cls, image.flatten(2).transpose(1, 2).to(pos_embed.dtype)], dim=1)
