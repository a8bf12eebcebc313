"""The layouts of the released FSFM and FS-VFM checkpoints: reading them safely, naming their tensors our way and back.

A released file is a `torch.save` of a dictionary: `{model, optimizer, epoch, scaler, args}` for pre-training and for
forgery detection, `{epoch, state_dict, valid_arg, …}` for anti-spoofing. This module knows their tensor names and
shapes; `fsvfm.checkpoint` turns files into `Checkpoint` objects.
"""

from __future__ import annotations

import argparse
import math
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from fsvfm.errors import CheckpointError
from fsvfm.models.vit import list_models, vit_config

KINDS = ("pretrain_online", "pretrain_target", "finetuned", "adapter", "fas", "fas_adapter", "encoder")
# The published code sorts class folders (fake before real) and labels anti-spoofing attacks 0: index 1 is "real".
CLASS_ORDER = ("fake", "real")
UNUSED = "unused."  # our prefix for tensors that a released file carries although no network reads them

_WEIGHT_BIAS = ("weight", "bias")
_BLOCK = tuple(
    f"{part}.{leaf}"
    for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    for leaf in _WEIGHT_BIAS
)
_FAS_DUPLICATE = "embedder.bottleneck_layer.0."
_FAS_EMBED = "embedder.bottleneck_layer_fc."
_FAS_SPARE_HEAD = "backbone.vit.head."


# ---------------------------------------------------------------------------------------------------------------- names


def group_keys(keys: Iterable[str]) -> list[str]:
    """Key names for people: `blocks.0.….weight` to `blocks.11.….weight` become one line `blocks.0…11.* (144 keys)`."""
    families: dict[tuple[str, str], list[int]] = {}
    lines: dict[str, int] = {}
    for key in keys:
        match = re.match(r"(.*?blocks)\.(\d+)\.(.+)$", key)
        if match:
            families.setdefault((match[1], match[3]), []).append(int(match[2]))
        else:
            lines[key] = 1
    merged: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for (prefix, leaf), numbers in families.items():
        merged.setdefault((prefix, tuple(sorted(numbers))), []).append(leaf)
    for (prefix, numbers_), leaves in merged.items():
        contiguous = len(numbers_) > 2 and numbers_ == tuple(range(numbers_[0], numbers_[-1] + 1))
        label = f"{numbers_[0]}…{numbers_[-1]}" if contiguous else ",".join(map(str, numbers_))
        leaf = leaves[0] if len(leaves) == 1 else "*" if len(leaves) == len(_BLOCK) else "{" + ", ".join(leaves) + "}"
        lines[f"{prefix}.{label}.{leaf}"] = len(numbers_) * len(leaves)
    return [name if count == 1 else f"{name} ({count} keys)" for name, count in sorted(lines.items())]


def listing(keys: Iterable[str], limit: int = 20) -> str:
    """`group_keys` as indented text of at most `limit` lines."""
    lines = group_keys(keys)
    shown = [f"\n  {line}" for line in lines[:limit]]
    if len(lines) > limit:
        shown.append(f"\n  … and {len(lines) - limit} more lines")
    return "".join(shown)


def _encoder_names(depth: int, last_norm: str) -> list[str]:
    names = ["cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"]
    names += [f"blocks.{i}.{leaf}" for i in range(depth) for leaf in _BLOCK]
    return names + [f"{last_norm}.{leaf}" for leaf in _WEIGHT_BIAS]


def _decoder_names(depth: int) -> list[str]:
    names = ["pos_embed", "embed.weight", "embed.bias"]
    names += [f"blocks.{i}.{leaf}" for i in range(depth) for leaf in _BLOCK]
    return names + [f"{part}.{leaf}" for part in ("norm", "pred") for leaf in _WEIGHT_BIAS]


def _count_blocks(keys: Iterable[str], prefix: str) -> int:
    numbers = [int(m[1]) for key in keys if (m := re.match(re.escape(prefix) + r"(\d+)\.", key))]
    return max(numbers, default=-1) + 1


def _layout(kind: str, keys: Iterable[str], *, published: bool) -> dict[str, str]:
    """All tensors of one released layout as {published name: our name}; depths and options are read off `keys`."""
    keys = set(keys)
    if kind not in KINDS:
        raise CheckpointError(f"unknown checkpoint layout {kind!r}; known: {', '.join(KINDS)}")
    pairs: dict[str, str] = {}
    if kind in ("pretrain_online", "pretrain_target", "encoder"):
        depth = _count_blocks(keys, "blocks." if published else "encoder.blocks.")
        pairs.update({name: f"encoder.{name}" for name in _encoder_names(depth, "norm")})
        if kind == "encoder":
            return pairs
        pairs["mask_token"] = "mask_token"
        decoders = {"rep_decoder_": "representation_decoder."}
        heads = ["projector"]
        if kind == "pretrain_online":
            decoders["decoder_"] = "pixel_decoder."
            heads.append("predictor")
        for theirs, ours in decoders.items():
            blocks = _count_blocks(keys, f"{theirs if published else ours}blocks.")
            pairs.update({theirs + name: ours + name for name in _decoder_names(blocks)})
        for head in heads:
            for i, leaf in ((i, leaf) for i in (0, 1, 3) for leaf in _WEIGHT_BIAS):
                pairs[f"{head}.projection_head.{i}.{leaf}"] = f"{head}.{i}.{leaf}"
        return pairs

    inside = "backbone.vit." if kind.startswith("fas") else ""
    prefix = inside if published else "backbone."
    # Global average pooling replaces the final norm by fc_norm; CLS pooling keeps it.
    last_norm = "norm" if f"{prefix}norm.weight" in keys else "fc_norm"
    depth = _count_blocks(keys, f"{prefix}blocks.")
    pairs.update({inside + name: f"backbone.{name}" for name in _encoder_names(depth, last_norm)})
    if kind.endswith("adapter"):
        pairs[f"{inside}adapter.linear1.weight"] = "head.adapter.down.weight"
        pairs[f"{inside}adapter.linear2.weight"] = "head.adapter.up.weight"
        pairs.update({f"{inside}projector.{leaf}": f"head.projection.{leaf}" for leaf in _WEIGHT_BIAS})
    if kind.startswith("fas"):
        pairs.update({f"{_FAS_EMBED}{leaf}": f"head.embed.{leaf}" for leaf in _WEIGHT_BIAS})
        pairs.update({f"classifier.classifier_layer.{leaf}": f"head.fc.{leaf}" for leaf in _WEIGHT_BIAS})
        # Released FAS adapters also hold the ViT's own two-class head, which their forward pass never reads.
        spare = {f"{_FAS_SPARE_HEAD}{leaf}": f"{UNUSED}{_FAS_SPARE_HEAD}{leaf}" for leaf in _WEIGHT_BIAS}
        if keys & (set(spare) if published else set(spare.values())):
            pairs.update(spare)
    else:
        pairs.update({f"head.{leaf}": f"head.fc.{leaf}" for leaf in _WEIGHT_BIAS})
    return pairs


def recognise(state: Mapping[str, Tensor]) -> str:
    """Name the released layout (one of `KINDS`) of a state dict with published key names.

    Raises:
        CheckpointError: the keys are of no known layout.
    """
    if any(key.startswith("backbone.vit.") for key in state):
        return "fas_adapter" if "backbone.vit.adapter.linear1.weight" in state else "fas"
    for marker, kind in (
        ("adapter.linear1.weight", "adapter"),
        ("head.weight", "finetuned"),
        ("decoder_pred.weight", "pretrain_online"),
        ("rep_decoder_pred.weight", "pretrain_target"),
        ("patch_embed.proj.weight", "encoder"),
    ):
        if marker in state:
            return kind
    raise CheckpointError(
        "this is none of the released layouts (pre-training online or target network, fine-tuned, FS-Adapter, "
        "anti-spoofing); "
        f"its tensors are:{listing(state, 8) or ' none'}"
    )


def _check_names(found: Iterable[str], expected: Iterable[str], kind: str) -> None:
    unknown, missing = sorted(set(found) - set(expected)), sorted(set(expected) - set(found))
    problems = []
    if unknown:
        problems.append(f"keys that do not belong to it:{listing(unknown)}")
    if missing:
        problems.append(f"keys that it lacks:{listing(missing)}")
    if problems:
        raise CheckpointError(f"not a complete {kind!r} checkpoint; " + "\n".join(problems))


def from_published(state: Mapping[str, Tensor], kind: str | None = None) -> dict[str, Tensor]:
    """Rename the tensors of one released network to our names; nothing is copied or changed.

    Args:
        state: published names → tensors of one network.
        kind: one of `KINDS`; recognised from the keys if None.

    Returns:
        our names → the same tensors: `encoder.*`, `representation_decoder.*`, … for pre-training, `backbone.*` and
        `head.*` for detectors, `unused.*` for what a file carries without using it.

    Raises:
        CheckpointError: a key too many or too few (all are listed), or two different copies of the FAS embedder.
    """
    kind = kind or recognise(state)
    state = dict(state)
    if kind.startswith("fas"):
        for leaf in _WEIGHT_BIAS:  # one layer, registered twice by the published module
            copy, original = state.pop(_FAS_DUPLICATE + leaf, None), state.get(_FAS_EMBED + leaf)
            if copy is not None and original is not None and not torch.equal(copy, original):
                raise CheckpointError(
                    f"{_FAS_DUPLICATE}{leaf} and {_FAS_EMBED}{leaf} must be the same tensor but differ: "
                    "the file was altered"
                )
    pairs = _layout(kind, state, published=True)
    _check_names(state, pairs, kind)
    return {pairs[key]: tensor for key, tensor in state.items()}


def to_published(state: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The inverse of `from_published`: our names of one network → published names (FAS: with the embedder's copy).

    Raises:
        CheckpointError: unknown `kind`, or keys that the released layout has no place for (or lacks); all are listed.
    """
    pairs = {ours: theirs for theirs, ours in _layout(kind, state, published=False).items()}
    _check_names(state, pairs, kind)
    result = {pairs[key]: tensor for key, tensor in state.items()}
    if kind.startswith("fas"):
        result.update({_FAS_DUPLICATE + leaf: result[_FAS_EMBED + leaf] for leaf in _WEIGHT_BIAS})
    return result


# --------------------------------------------------------------------------------------------------------- architecture


def _block_shapes(prefix: str, depth: int, dim: int) -> dict[str, tuple[int, ...]]:
    outs = {"norm1": (dim,), "attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim), "norm2": (dim,)}
    outs |= {"mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim)}
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(depth):
        for part, shape in outs.items():
            shapes[f"{prefix}blocks.{i}.{part}.weight"] = shape
            shapes[f"{prefix}blocks.{i}.{part}.bias"] = shape[:1]
    return shapes


def _need(state: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in state:
        raise CheckpointError(f"tensor {key} is missing: the checkpoint is incomplete")
    return state[key]


def infer_model(
    state: Mapping[str, Tensor],
    *,
    heads: int | None = None,
    representation_heads: int | None = None,
    pixel_heads: int | None = None,
) -> dict[str, Any]:
    """Read the architecture off the shapes of a state dict with our names, checking that all shapes belong together.

    The number of attention heads leaves no trace in the shapes: it is taken from the argument, else from the known size
    of the same width (S has 12 heads); decoders have 16 by default, as published.

    Returns:
        plain values {name, image_size, patch_size, dim, depth, heads}; for pre-training also {representation_decoder,
        pixel_decoder (None for a lone target network), projection}, as in the `model` config group.

    Raises:
        CheckpointError: a tensor is missing or of another size than the rest, or the number of heads cannot be known.
    """
    prefixes = ("online.encoder.", "target.encoder.", "backbone.", "encoder.")
    prefix = next((p for p in prefixes if f"{p}cls_token" in state), None)
    if prefix is None:
        raise CheckpointError(
            f"no ViT in the checkpoint: none of {', '.join(p + 'cls_token' for p in prefixes)} is there"
        )
    projection = _need(state, f"{prefix}patch_embed.proj.weight")
    dim, patch = int(state[f"{prefix}cls_token"].shape[-1]), int(projection.shape[-1])
    depth = _count_blocks(state, f"{prefix}blocks.")
    pos_embed = _need(state, f"{prefix}pos_embed")
    tokens = int(pos_embed.shape[1]) - 1
    grid = math.isqrt(max(tokens, 0))
    if grid * grid != tokens:
        raise CheckpointError(f"{prefix}pos_embed has {tokens} patch positions, which is no square grid")

    name, known_heads = "custom", None
    for config in map(vit_config, list_models()):
        if config.dim == dim:
            known_heads = config.heads
            if config.depth == depth and config.patch_size == patch:
                name = config.name
    heads = heads or known_heads
    if heads is None or dim % heads:
        reason = "is of no known size" if heads is None else f"cannot be divided among {heads} heads"
        raise CheckpointError(
            f"width {dim} {reason}; give the number of attention heads (heads=…), shapes do not tell it"
        )
    model: dict[str, Any] = {
        "name": name, "image_size": grid * patch, "patch_size": patch, "dim": dim, "depth": depth, "heads": heads,
    }  # fmt: skip

    base = prefix.removesuffix("encoder.")  # "online.", "target.", "" (encoder alone) or "backbone."
    shapes: dict[str, tuple[int, ...]] = {}
    for network in ("online.", "target.") if base in ("online.", "target.") else (base,):
        if not any(key.startswith(network) for key in state):
            continue
        at = f"{network}encoder." if network in ("online.", "target.", "") else network
        shapes |= {f"{at}cls_token": (1, 1, dim), f"{at}pos_embed": (1, tokens + 1, dim)}
        shapes |= {f"{at}patch_embed.proj.weight": (dim, 3, patch, patch), f"{at}patch_embed.proj.bias": (dim,)}
        shapes |= _block_shapes(at, depth, dim)
    if base in ("online.", "target."):
        shapes |= _infer_pretraining(state, model, base, representation_heads or 16, pixel_heads or 16)
    wrong = [
        f"\n  {key}: {tuple(state[key].shape) if key in state else 'missing'}, expected {shape}"
        for key, shape in shapes.items()
        if key not in state or tuple(state[key].shape) != shape
    ]
    if wrong:
        more = f"\n  … and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise CheckpointError(
            f"tensors of another size than a ViT of width {dim}, depth {depth}, patch {patch} on "
            f"{grid * patch}×{grid * patch} pixels has:{''.join(wrong[:8])}{more}"
        )
    if base == "backbone.":
        _check_head(state, dim)
    return model


def _infer_pretraining(
    state: Mapping[str, Tensor], model: dict[str, Any], base: str, representation_heads: int, pixel_heads: int
) -> dict[str, tuple[int, ...]]:
    """Add the decoders to `model`; return the shapes that decoders and projection heads must then have."""
    dim, tokens = model["dim"], (model["image_size"] // model["patch_size"]) ** 2
    both = [network for network in ("online.", "target.") if any(key.startswith(network) for key in state)]
    depth = _count_blocks(state, f"{base}representation_decoder.blocks.")
    hidden = int(_need(state, f"{base}projector.0.weight").shape[0])
    out = int(_need(state, f"{base}projector.3.weight").shape[0])
    position = _need(state, f"{base}representation_decoder.pos_embed")
    zeros = not position.is_meta and not bool(position.any())
    model["representation_decoder"] = {
        "depth": depth, "heads": representation_heads, "pos_embed": "zeros" if zeros else "sincos",
    }  # fmt: skip
    model["pixel_decoder"] = None
    model["projection"] = {"hidden": hidden, "out": out}
    shapes: dict[str, tuple[int, ...]] = {}

    def decoder(prefix: str, width: int, blocks: int, outputs: int, number_of_heads: int) -> None:
        if width % number_of_heads:
            raise CheckpointError(
                f"{prefix[:-1]}: width {width} cannot be divided among {number_of_heads} heads; give decoder_heads=…"
            )
        shapes.update({f"{prefix}pos_embed": (1, tokens + 1, width), f"{prefix}embed.weight": (width, dim)})
        shapes.update({f"{prefix}norm.weight": (width,), f"{prefix}pred.weight": (outputs, width)})
        shapes.update(_block_shapes(prefix, blocks, width))

    for network in both:
        decoder(f"{network}representation_decoder.", dim, depth, dim, representation_heads)
        shapes |= {f"{network}mask_token": (1, 1, dim)}
        shapes |= {f"{network}projector.0.weight": (hidden, dim), f"{network}projector.3.weight": (out, hidden)}
    if base == "online.":
        width = int(_need(state, "online.pixel_decoder.embed.weight").shape[0])
        blocks = _count_blocks(state, "online.pixel_decoder.blocks.")
        model["pixel_decoder"] = {"dim": width, "depth": blocks, "heads": pixel_heads}
        decoder("online.pixel_decoder.", width, blocks, 3 * model["patch_size"] ** 2, pixel_heads)
        shapes |= {"online.predictor.0.weight": (hidden, out), "online.predictor.3.weight": (out, hidden)}
    return shapes


def _check_head(state: Mapping[str, Tensor], dim: int) -> None:
    """The linear layers of a detector's head must fit the backbone's width (twice that behind an FS-Adapter)."""
    features = 2 * dim if "head.adapter.down.weight" in state else dim
    for layer in ("head.embed", "head.fc"):
        weight = state.get(f"{layer}.weight")
        if weight is None:
            continue
        if weight.dim() != 2 or weight.shape[1] != features:
            raise CheckpointError(
                f"{layer}.weight is {tuple(weight.shape)}, expected (…, {features}) for a ViT of width {dim}"
            )
        features = int(weight.shape[0])


# ------------------------------------------------------------------------------------------------------------- reading


def _posix_text(*parts: str) -> str:
    return str(PurePosixPath(*parts))


def _windows_text(*parts: str) -> str:
    return str(PureWindowsPath(*parts))


def _allowed_globals() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """What may be in a file besides tensors and plain values; each is harmless, and nothing else is ever called.

    Paths of the author's machine become plain text (a WindowsPath could not even be created elsewhere); the numbers of
    anti-spoofing containers are numpy scalars.
    """
    numpy_scalar, numpy_array = np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]
    allowed: list[Any] = [argparse.Namespace, np.dtype, np.ndarray]
    allowed += [type(np.dtype(t)) for t in ("f2", "f4", "f8", "i4", "i8", "u1", "?")]
    for module in ("numpy._core.multiarray", "numpy.core.multiarray"):
        allowed += [(numpy_scalar, f"{module}.scalar"), (numpy_array, f"{module}._reconstruct")]
    for module in ("pathlib", "pathlib._local"):
        allowed += [(_posix_text, f"{module}.{name}") for name in ("Path", "PosixPath", "PurePath", "PurePosixPath")]
        allowed += [(_windows_text, f"{module}.{name}") for name in ("WindowsPath", "PureWindowsPath")]
    return allowed


def load_torch_file(path: Path) -> Any:
    """Read a `torch.save` file without ever running code from it.

    Tensors stay on the CPU and are mapped from the file, so an optimiser state beside the model costs no memory.

    Raises:
        CheckpointError: the file is absent or damaged, or holds an object outside the allow-list (it is named).
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    size = path.stat().st_size
    with safe_globals(_allowed_globals()):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except Exception as error:  # torch raises many types for a damaged file; each ends as one explained error
            names = _offending(path, error)
            if names:
                raise CheckpointError(
                    f"{path} was refused: it is a pickle that wants to use {', '.join(names)}, which is not on the "
                    "list of harmless types, and loading it freely could run any code. If you trust its author, load "
                    'it yourself with torch.load(…, weights_only=False) and save only its "model" entry to a new file.'
                ) from None
            reason = f"{type(error).__name__}: {(str(error).splitlines() or ['no details'])[0]}"
            raise CheckpointError(
                f"{path} ({size:,} bytes) cannot be read: it is damaged, incomplete or no torch checkpoint. "
                f"Download or copy it again. ({reason})"
            ) from None


def _offending(path: Path, error: Exception) -> list[str]:
    if not isinstance(error, pickle.UnpicklingError):
        return []
    try:
        names = list(get_unsafe_globals_in_checkpoint(path))
    except Exception:  # old, non-zip files: only the message tells
        names = []
    return names or re.findall(r"GLOBAL ([\w.]+)", str(error))[:1]
