"""Backbones of timm as starting points (`timm:<name>`): weights and normalisation.

Plain ViTs, the architecture of the papers (`models.vit`) of any size, are read as such. timm has many relatives with
additional or other parts (LayerScale, register tokens, norm before the blocks, rotary positions …), whose tensors in a
plain ViT would give another function than the one that was trained. Those, and all other architectures, are networks of
`model.family=timm`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor

from fsvfm.errors import CheckpointError, ConfigError
from fsvfm.models.vit import ViTConfig, create_backbone
from fsvfm.published import listing
from fsvfm.zoo import fetch, fetch_address

TIMM = "timm:"
WEIGHTS = "model.safetensors"  # in the hub repository of every plain ViT of timm
_CLASSIFIER = "head."

#: A tensor that the visual transformer of every CLIP of OpenAI's kind has.
CLIP_VISUAL = "visual.class_embedding"
#: Its width and patch size to the network in timm; the original activation is QuickGELU.
_CLIP_SIZES = {
    (768, 32): "vit_base_patch32_clip_quickgelu_224",
    (768, 16): "vit_base_patch16_clip_quickgelu_224",
    (1024, 14): "vit_large_patch14_clip_quickgelu_224",
}


class TimmWeights(NamedTuple):
    """A network of timm: tensors by its names without classifier, `model` table, normalisation, provenance."""

    state: dict[str, Tensor]
    model: dict[str, Any]
    mean: list[float]
    std: list[float]
    provenance: dict[str, Any]


def load_timm(source: str) -> TimmWeights:
    """Load `timm:<name>`: from the weights folder (`<repository>/model.safetensors`), the hub's cache or the hub.

    Raises:
        CheckpointError: unknown name, no connection, or a file that does not fit.
    """
    name = source.removeprefix(TIMM)
    _require_known(name)
    facts = timm.get_pretrained_cfg(name)
    with torch.device("meta"):
        bare = timm.create_model(name, pretrained=False, num_classes=0).state_dict()
        model = _architecture(name, timm.create_model(name, pretrained=False), facts)
    path = fetch(facts.hf_hub_id, WEIGHTS) if facts.hf_hub_id else fetch_address(facts.url, f"timm/{name}")
    try:
        # timm reads its own file and checks every key, the classifier's too; a safetensors file runs no code.
        filled = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay={"file": str(path), "custom_load": False}
        )
    except Exception as error:  # damaged file (safetensors' error) or other keys or shapes (RuntimeError)
        reason = " ".join(str(error).split())[:400]
        raise CheckpointError(f"{path} does not hold the weights of {source}; download it again ({reason})") from None
    state = {key: tensor for key, tensor in filled.state_dict().items() if key in bare}
    provenance = {
        "source": source, "layout": "timm", "weights": f"{facts.architecture}.{facts.tag}",
        "repository": facts.hf_hub_id or facts.url, "licence": facts.license or "see its repository",
    }  # fmt: skip
    return TimmWeights(state, model, list(facts.mean), list(facts.std), provenance)


def _architecture(name: str, theirs: Any, facts: Any) -> dict[str, Any]:
    """The `model` table: of a plain ViT, else of the family timm."""
    try:
        return plain_architecture(name, theirs)
    except CheckpointError:
        architecture, size = str(facts.architecture), int(facts.input_size[-1])
        return {"name": architecture, "family": "timm", "architecture": architecture, "image_size": size}


def load_clip(tensors: Mapping[str, Tensor], path: Path) -> TimmWeights:
    """The visual transformer of a CLIP of OpenAI's kind, such as FaRL's, under timm's names.

    Args:
        tensors: of the file; those of the text transformer are left out.
        path: of the file, for provenance and messages.

    Raises:
        CheckpointError: a size that timm does not have, or tensors that do not fit it.
    """
    width, _, patch, _ = tensors["visual.conv1.weight"].shape
    if (width, patch) not in _CLIP_SIZES:
        raise CheckpointError(f"{path}: no CLIP of width {width} and patch {patch} is known; expected {_CLIP_SIZES}")
    architecture = _CLIP_SIZES[width, patch]
    facts = timm.get_pretrained_cfg(architecture)
    with torch.device("meta"):
        bare = timm.create_model(architecture, num_classes=0)
    renamed = checkpoint_filter_fn(dict(tensors), bare)
    wanted = bare.state_dict()
    state = {key: tensor.float() for key, tensor in renamed.items() if key in wanted}
    if lacking := [key for key in wanted if key not in state]:
        raise CheckpointError(f"{path} is no whole CLIP; it lacks{listing(lacking)}")
    model = {"name": architecture, "family": "timm", "architecture": architecture, "image_size": facts.input_size[-1]}
    provenance = {"source": path.name, "layout": "clip", "licence": "see its source"}
    return TimmWeights(state, model, list(facts.mean), list(facts.std), provenance)


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
    supported = "a plain ViT has a CLS token, learned positions, pre-norm blocks and nothing else"
    if type(theirs) is not VisionTransformer:
        raise CheckpointError(f"timm's {name} is no plain ViT but a {type(theirs).__name__}; {supported}")
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
        raise CheckpointError(f"timm's {name} is no plain ViT; {supported}:\n" + "\n".join(problems))
    return asdict(config)
