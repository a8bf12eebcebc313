"""Backbones of timm as starting points (`timm:<name>`): weights and normalisation of any plain ViT there is in it.

Plain means the architecture of the papers (`models.vit`), of any size. timm has many relatives with additional or other
parts (LayerScale, register tokens, norm before the blocks, rotary positions …): loading their tensors as far as the
names agree would give another function than the one that was trained, so they are refused with what is different.
"""

from __future__ import annotations

import difflib
from dataclasses import asdict
from typing import Any, NamedTuple

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from fsvfm.errors import CheckpointError, ConfigError
from fsvfm.models.vit import ViTConfig, create_backbone
from fsvfm.published import listing
from fsvfm.zoo import fetch

TIMM = "timm:"
WEIGHTS = "model.safetensors"  # in the hub repository of every plain ViT of timm
_CLASSIFIER = "head."


class TimmViT(NamedTuple):
    """A ViT of timm: tensors under timm's names without its classifier, architecture, normalisation, provenance."""

    state: dict[str, Tensor]
    model: dict[str, Any]
    mean: list[float]
    std: list[float]
    provenance: dict[str, Any]


def load_timm(source: str) -> TimmViT:
    """Load `timm:<name>`: from the weights folder (`<repository>/model.safetensors`), the hub's cache or the hub.

    Raises:
        CheckpointError: unknown name, no plain ViT, no connection, or a file that does not fit.
    """
    name = source.removeprefix(TIMM)
    _require_known(name)
    with torch.device("meta"):
        model = plain_architecture(name, timm.create_model(name, pretrained=False))
    facts = timm.get_pretrained_cfg(name)
    path = fetch(facts.hf_hub_id, WEIGHTS)
    try:
        # timm reads its own file and checks every key, the classifier's too; a safetensors file runs no code.
        filled = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay={"file": str(path), "custom_load": False}
        )
    except Exception as error:  # damaged file (safetensors' error) or other keys or shapes (RuntimeError)
        reason = " ".join(str(error).split())[:400]
        raise CheckpointError(f"{path} does not hold the weights of {source}; download it again ({reason})") from None
    state = {key: tensor for key, tensor in filled.state_dict().items() if not key.startswith(_CLASSIFIER)}
    provenance = {
        "source": source, "layout": "timm", "weights": f"{facts.architecture}.{facts.tag}",
        "repository": facts.hf_hub_id, "licence": facts.license or "see its repository",
    }  # fmt: skip
    return TimmViT(state, model, list(facts.mean), list(facts.std), provenance)


def _require_known(name: str) -> None:
    known = timm.list_models(pretrained=True)
    if name in known or (timm.is_model(name) and timm.is_model_pretrained(name)):
        return
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.4)
    plain = [n for n in known if n.startswith("vit_base_patch16_224.")]
    raise CheckpointError(
        f"timm has no weights called {name!r}; did you mean {', '.join(near or plain)}? "
        "`timm.list_models('vit_*', pretrained=True)` shows all"
    )


def plain_architecture(name: str, theirs: Any) -> dict[str, Any]:
    """The architecture of a plain ViT in the words of the `model` group.

    Args:
        name: of the model in timm.
        theirs: the model, on any device.

    Raises:
        CheckpointError: it is not plain; says in what.
    """
    supported = "only plain ViTs can be loaded (CLS token, learned positions, pre-norm blocks and nothing else)"
    if type(theirs) is not VisionTransformer:
        raise CheckpointError(f"timm's {name} is a {type(theirs).__name__}; {supported}")
    heads = getattr(getattr(theirs.blocks[0], "attn", None), "num_heads", 1)
    patch, image = int(theirs.patch_embed.patch_size[0]), int(theirs.patch_embed.img_size[0])
    try:
        config = ViTConfig(name.split(".")[0], patch, theirs.embed_dim, len(theirs.blocks), heads, image)
    except ConfigError as error:
        raise CheckpointError(f"timm's {name} cannot be built here: {error}") from None
    # Compared with ours, part by part: tensors by name and shape, then the blocks by their printed structure.
    pool = "avg" if "fc_norm.weight" in theirs.state_dict() else "cls"
    with torch.device("meta"):
        ours = create_backbone(config, pool=pool)
    wanted = {key: tuple(tensor.shape) for key, tensor in ours.state_dict().items()}
    found = {key: tuple(t.shape) for key, t in theirs.state_dict().items() if not key.startswith(_CLASSIFIER)}
    extra, lacking = [key for key in found if key not in wanted], [key for key in wanted if key not in found]
    problems = [f"it also has{listing(extra)}"] if extra else []
    problems += [f"it lacks{listing(lacking)}"] if lacking else []
    shared = found.keys() & wanted.keys()
    problems += [f"its {k} is {found[k]}, not {wanted[k]}" for k in sorted(shared) if found[k] != wanted[k]][:4]
    if not problems and str(theirs.blocks) != str(ours.blocks):
        lines = zip(str(theirs.blocks).splitlines(), str(ours.blocks).splitlines(), strict=False)
        problems.append(next(f"its blocks have {a.strip()}, not {b.strip()}" for a, b in lines if a != b))
    if problems:
        raise CheckpointError(f"timm's {name} is no plain ViT, and {supported}:\n" + "\n".join(problems))
    return asdict(config)
