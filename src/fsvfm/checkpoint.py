"""Checkpoints: one way to load all of them, a report of every key, our small export format, and the released layouts.

`load_checkpoint` accepts an export folder, a released `.pth`, a Lightning `.ckpt` of ours, `hf://…`, `zoo:…` and
`timm:…`, and always returns a `Checkpoint` with our tensor names and the same metadata:

    {"format": "fsvfm-export", "version": 1, "kind": "pretrain" | "encoder" | "detector",
     "task": "pretrain" | "forgery" | "antispoof", "model": {name, image_size, patch_size, dim, depth, heads, …},
     "tune": {…} or None, "mean": [r, g, b] or None, "std": [r, g, b] or None,
     "class_order": ["real", "fake"] in the order of the logits or None, "provenance": {…}}

`pretrain` states hold `online.*` and `target.*`, detectors `backbone.*` and `head.*`, encoders `encoder.*`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fsvfm import zoo
from fsvfm.errors import CheckpointError
from fsvfm.exports import PREFIXES, check_state, is_triple, is_vit, plain, read_meta, save_export, validate_meta
from fsvfm.loading import LoadReport, load_into, resize_pos_embed
from fsvfm.models import timm_backbone
from fsvfm.models.lora import fold, has_lora, renamed_for
from fsvfm.models.vit import SIZES
from fsvfm.published import (
    CLASS_ORDER,
    UNUSED,
    from_published,
    infer_model,
    listing,
    load_torch_file,
    recognise,
    to_published,
)
from fsvfm.timm_vit import CLIP_VISUAL, TIMM, TimmWeights, load_clip, load_timm
from fsvfm.zoo import STATS_FILE, ZooEntry

__all__ = [
    "Checkpoint", "LoadReport", "encoder_state", "from_published", "load_backbone", "load_checkpoint", "load_into",
    "normalisation", "read_meta", "resize_pos_embed", "save_export", "to_published", "validate_meta", "write_published",
]  # fmt: skip

# A pre-trained ViT has a final norm; with global pooling a fresh fc_norm stands in its place. The head is new.
# Low-rank updates start at zero.
DOWNSTREAM_UNUSED, DOWNSTREAM_MISSING = ("norm.*",), ("fc_norm.*", "head.*", "*.lora_*")
_OWN_META = "fsvfm_meta"  # entry in a released container we wrote: our metadata as JSON text, so that nothing is lost


@dataclass(frozen=True)
class Checkpoint:
    """What was loaded: `kind`, tensors under our names, metadata, where it came from, remarks, and tensors set aside.

    `left_out` are tensors of the file which no network of ours or theirs uses (kept, so that they can be written back).
    """

    kind: str
    state: dict[str, Tensor]
    meta: dict[str, Any]
    source: str
    notes: tuple[str, ...] = ()
    left_out: dict[str, Tensor] = field(default_factory=dict)

    def networks(self) -> tuple[str, ...]:
        """Which of "online" and "target" a pre-training checkpoint holds; empty for other kinds."""
        return tuple(n for n in ("online", "target") if any(key.startswith(f"{n}.") for key in self.state))

    def only(self, which: str) -> Checkpoint:
        """The same with one network of a pre-training checkpoint: "online", "target", or "both" for no change."""
        if which == "both":
            return self
        if self.kind != "pretrain" or which not in self.networks():
            has = " and ".join(self.networks()) or f"no online or target network (it is of kind {self.kind!r})"
            raise CheckpointError(f"{self.source} has no network {which!r}; it has {has}")
        kept = {key: tensor for key, tensor in self.state.items() if key.startswith(f"{which}.")}
        model = {**self.meta["model"], **({"pixel_decoder": None} if which == "target" else {})}
        return replace(self, state=kept, meta={**self.meta, "model": model})


# ------------------------------------------------------------------------------------------------------------ metadata


def normalisation(checkpoint: Checkpoint) -> tuple[list[float], list[float]]:
    """Per-channel mean and standard deviation (RGB, images in [0, 1]) the checkpoint's network was trained with.

    Raises:
        CheckpointError: the checkpoint does not say, and guessing would silently lower every result.
    """
    mean, std = checkpoint.meta.get("mean"), checkpoint.meta.get("std")
    if mean is None or std is None:
        raise CheckpointError(
            f"{checkpoint.source} does not say the normalisation it was trained with. Put {STATS_FILE} of its "
            'pre-training set beside it (one line {"mean": [r, g, b], "std": [r, g, b]}), or give mean=[…] and std=[…]'
        )
    return list(mean), list(std)


def _read_stats(folder: Path) -> tuple[list[float], list[float]] | None:
    path = folder / STATS_FILE
    if not path.is_file():
        return None
    try:
        stats = json.loads(path.read_text(encoding="utf-8"))
        mean, std = stats["mean"], stats["std"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f'{path} must be one JSON line {{"mean": [r, g, b], "std": [r, g, b]}} ({error})'
        ) from None
    if not (is_triple(mean, positive=False) and is_triple(std, positive=True)):
        raise CheckpointError(f"{path}: mean and std must be three numbers each, std above 0; found {mean} and {std}")
    return list(mean), list(std)


# ------------------------------------------------------------------------------------------------------------- loading


def load_checkpoint(
    source: str | os.PathLike[str],
    *,
    target: bool = True,
    heads: int | None = None,
    decoder_heads: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Checkpoint:
    """Load any checkpoint onto the CPU, with our tensor names and complete metadata, without running code from it.

    Args:
        source: an export folder (or its `model.safetensors`, or a run folder holding `export/`), a released `.pth` or
            a folder with one, a Lightning `.ckpt` of ours (low-rank updates become part of the weights),
            `hf://<owner>/<repository>/<file>`, `zoo:<short name>`, or `timm:<model name>`.
        target: for pre-training checkpoints also load the target network (released: `checkpoint-te-*.pth` beside it).
        heads: attention heads, for released files of a width that is no known size.
        decoder_heads: attention heads of both decoders of such a file (published: 16).
        mean: normalisation the network was trained with, where nothing else tells it (file beside it, zoo, export).
        std: likewise.

    Raises:
        CheckpointError: absent, damaged, unsafe, of no known layout, of inconsistent sizes, or with unexplained keys.
    """
    if os.fspath(source).startswith(TIMM):
        loaded = _encoder(load_timm(os.fspath(source)), os.fspath(source))
    else:
        loaded = _load_file(source, target, heads, decoder_heads)
    meta = dict(loaded.meta)
    if mean is not None and std is not None:
        meta |= {"mean": list(mean), "std": list(std)}
    elif mean is not None or std is not None:
        raise CheckpointError("mean and std belong together; give both or none")
    if not target:
        loaded = replace(
            loaded, state={k: v for k, v in loaded.state.items() if not k.startswith("target.")} or loaded.state
        )
    return replace(loaded, meta=validate_meta(meta), source=os.fspath(source))


def _load_file(
    source: str | os.PathLike[str], target: bool, heads: int | None, decoder_heads: int | None
) -> Checkpoint:
    resolved = zoo.resolve(source, target=target)
    path = _weights_file(resolved.path)
    if path.suffix == ".safetensors":
        loaded = _load_export(path.parent, path)
    else:
        content = load_torch_file(path)
        if not isinstance(content, Mapping):
            raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a table with a model in it")
        if "pytorch-lightning_version" in content:
            loaded = _load_lightning(path, content)
        else:
            loaded = _load_published(path, content, resolved.entry, target, heads, decoder_heads)
    return replace(loaded, notes=(*resolved.notes, *loaded.notes))


def _encoder(found: TimmWeights, source: str) -> Checkpoint:
    meta = {
        "kind": "encoder", "task": "pretrain", "model": found.model, "tune": None, "mean": found.mean, "std": found.std,
        "class_order": None, "provenance": found.provenance,
    }  # fmt: skip
    return Checkpoint("encoder", {f"encoder.{key}": tensor for key, tensor in found.state.items()}, meta, source)


def _weights_file(path: Path) -> Path:
    """The file to read for a path: itself, or the weights of the folder that it is."""
    if not path.is_dir():
        return path
    for folder in (path, path / "export"):
        if (folder / "model.json").is_file():
            return folder / "model.safetensors"
    files = [p.as_posix() for p in sorted(path.glob("*.pth")) if not p.name.startswith("checkpoint-te-")]
    return Path(zoo.choose_file(files, path.as_posix()))


def _load_export(folder: Path, weights: Path) -> Checkpoint:
    meta = read_meta(folder)
    try:
        state = safetensors.torch.load_file(weights)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{weights} cannot be read: it is absent, damaged or incomplete ({error})") from None
    left_out = {key: state.pop(key) for key in [k for k in state if k.startswith(UNUSED)]}
    check_state(state, meta)
    return Checkpoint(meta["kind"], state, meta, str(folder), left_out=left_out)


def _load_lightning(path: Path, content: Mapping[str, Any]) -> Checkpoint:
    parameters = dict(content.get("hyper_parameters") or {})
    # torch.compile puts its own level into names.
    state = {key.replace("_orig_mod.", ""): tensor for key, tensor in content["state_dict"].items()}
    for name in ("mean", "std"):  # buffers, scaled to the images' range; the hyper-parameters have the plain values
        state.pop(name, None)
    if any(key.startswith(PREFIXES["pretrain"]) for key in state):
        kind, task = "pretrain", "pretrain"
    else:
        kind = "detector"
        # SLADD's policy only serves its training; a detector is exported without it.
        state = {k.removeprefix("detector."): tensor for k, tensor in state.items() if not k.startswith("policy.")}
        task = "antispoof" if "head.embed.weight" in state else "forgery"
    given, tune = dict(parameters.get("model") or {}), parameters.get("tune")
    if has_lora(state):
        state = fold(state, alpha=_lora_alpha(path, tune))
        tune = {**(tune or {}), "merged": True}  # build_detector adds nothing, the updates are in the weights
    strangers = [key for key in state if not key.startswith(PREFIXES[kind])]
    if strangers:
        raise CheckpointError(f"{path} has keys that are neither networks nor normalisation:{listing(strangers)}")
    if kind == "detector" and not parameters.get("class_order"):
        raise CheckpointError(
            f"{path} does not say which of its logits means fake (no class_order in its hyper-parameters); "
            "a guess could invert every score, so it is not loaded"
        )
    if is_vit(given):
        model = infer_model(
            state,
            heads=given.get("heads"),
            representation_heads=(given.get("representation_decoder") or {}).get("heads"),
            pixel_heads=(given.get("pixel_decoder") or {}).get("heads"),
        )
        model["name"] = given.get("name") or model["name"]
    else:
        model = {key: value for key, value in given.items() if key != "init"}
    meta = {
        "kind": kind, "task": task, "model": model, "tune": tune,
        "mean": parameters.get("mean"), "std": parameters.get("std"),
        "class_order": parameters.get("class_order") if kind == "detector" else None,
        "provenance": {
            "source": path.name, "layout": "lightning", "epoch": content.get("epoch"),
            "global_step": content.get("global_step"), "hyper_parameters": plain(parameters),
        },
    }  # fmt: skip
    return Checkpoint(kind, state, meta, str(path))


def _lora_alpha(path: Path, tune: Mapping[str, Any] | None) -> float:
    alpha = ((tune or {}).get("lora") or {}).get("alpha")
    if not isinstance(alpha, int | float):
        raise CheckpointError(f"{path} has low-rank updates but does not say their alpha (tune.lora.alpha)")
    return float(alpha)


def _load_published(
    path: Path,
    content: Mapping[str, Any],
    entry: ZooEntry | None,
    target: bool,
    heads: int | None,
    decoder_heads: int | None,
) -> Checkpoint:
    arguments = plain(content.get("args") or {})
    own = json.loads(arguments.pop(_OWN_META)) if isinstance(arguments.get(_OWN_META), str) else None
    tensors = _tensors(path, content)
    if CLIP_VISUAL in tensors:
        return _encoder(load_clip(tensors, path), str(path))
    layout = recognise(tensors)
    state = from_published(tensors, layout)
    notes: list[str] = []
    left_out = {key: state.pop(key) for key in [k for k in state if k.startswith(UNUSED)]}
    if layout == "pretrain_target":
        state = {f"target.{key}": tensor for key, tensor in state.items()}
        notes.append("this is a target network alone; the online network is the file without -te-")
    elif layout == "pretrain_online":
        state = {f"online.{key}": tensor for key, tensor in state.items()}
        sibling = path.with_name(path.name.replace("checkpoint-", "checkpoint-te-", 1))
        if target and sibling != path and sibling.is_file():
            other = from_published(_tensors(sibling, load_torch_file(sibling)), "pretrain_target")
            state |= {f"target.{key}": tensor for key, tensor in other.items()}
        elif target:
            notes.append(
                f"no target network: there is no {sibling.name} beside it (needed only to continue pre-training)"
            )

    if own:
        model_heads = own["model"]["heads"]
        decoders = [(own["model"].get(d) or {}).get("heads") for d in ("representation_decoder", "pixel_decoder")]
    else:
        model_heads, decoders = heads, [decoder_heads, decoder_heads]
    model = infer_model(state, heads=model_heads, representation_heads=decoders[0], pixel_heads=decoders[1])

    detector = layout in ("finetuned", "adapter", "fas", "fas_adapter")
    kind = "detector" if detector else "encoder" if layout == "encoder" else "pretrain"
    classes = state["head.fc.weight"].shape[0] if detector else 2
    if classes != 2:
        raise CheckpointError(
            f"{path} separates {classes} classes; a detector here has two, {' and '.join(CLASS_ORDER)}"
        )
    stats = _read_stats(path.parent)
    if stats is None and entry is not None and entry.mean is not None and entry.std is not None:
        stats = list(entry.mean), list(entry.std)
        notes.append(f"normalisation from the zoo entry {entry.name}: no {STATS_FILE} beside the file")
    elif stats is None and own is None:
        notes.append(f"normalisation unknown: no {STATS_FILE} beside the file")
    meta: dict[str, Any] = {
        "kind": kind,
        "task": "antispoof" if layout.startswith("fas") else "forgery" if detector else "pretrain",
        "model": model,
        "tune": _tune(layout, state) if detector else None,
        "mean": stats[0] if stats else None,
        "std": stats[1] if stats else None,
        "class_order": list(CLASS_ORDER) if detector else None,
        "provenance": {
            "source": path.name, "layout": layout, "epoch": content.get("epoch"), "args": arguments,
            "container": {k: plain(v) for k, v in content.items() if k in _FAS_ENTRIES},
            **({"zoo": entry.name, "licence": entry.licence, "data": entry.data} if entry else {}),
        },
    }  # fmt: skip
    if own:
        meta = {**meta, **own, "model": {**model, **own["model"], "pixel_decoder": model.get("pixel_decoder")}}
        if "pixel_decoder" not in model:
            meta["model"].pop("pixel_decoder")
        if detector and own.get("class_order") != list(CLASS_ORDER):
            state = _swap_classes(state)
    return Checkpoint(kind, state, meta, str(path), tuple(notes), left_out)


_FAS_ENTRIES = ("valid_arg", "best_model_EER", "best_model_ACER", "best_model_ACC", "threshold")


def _tensors(path: Path, content: Mapping[str, Any]) -> dict[str, Tensor]:
    state = content.get("model", content.get("state_dict", content))
    if not isinstance(state, Mapping) or not state or not all(isinstance(t, Tensor) for t in state.values()):
        raise CheckpointError(
            f'{path} is no checkpoint of a released kind: expected tensors under "model" or "state_dict", '
            f"found {', '.join(map(str, list(content)[:8])) or 'nothing'}"
        )
    return dict(state)


def _tune(layout: str, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """How a released detector is put together, in the words of the config group `tune`."""
    adapter = layout.endswith("adapter")
    down = state.get("head.adapter.down.weight")
    return {
        "name": "adapter" if adapter else "full",
        "drop_path": 0.0,
        "frozen_drop_path": False,
        "reduction": int(down.shape[1] // down.shape[0]) if down is not None else 4,
        "pool": "cls" if "backbone.norm.weight" in state else "avg",
        # Released fully fine-tuned anti-spoofing models were trained with the norm over tokens and need it to score.
        "quirk": layout == "fas",
    }


def _swap_classes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same detector with logits 0 and 1 exchanged."""
    return {k: t.flip(0) if k in ("head.fc.weight", "head.fc.bias") else t for k, t in state.items()}


# ------------------------------------------------------------------------------------------------------------- modules


def encoder_state(checkpoint: Checkpoint, which: str = "online") -> dict[str, Tensor]:
    """The ViT of a checkpoint for a downstream backbone: keys `cls_token`, `pos_embed`, `patch_embed.*`, `blocks.*`, …

    Pre-trained ViTs bring their final `norm`, which a backbone with global pooling has no place for; it has a fresh
    `fc_norm` and head instead (02 §1 of the papers' recipe). `load_backbone` expects exactly that.

    Args:
        checkpoint: any kind; a detector gives its tuned backbone, with `fc_norm`.
        which: "online" (what the papers fine-tune) or "target", for pre-training checkpoints.

    Raises:
        CheckpointError: the checkpoint has no such network.
    """
    if checkpoint.kind == "pretrain":
        prefix = f"{which}.encoder."
        if which not in checkpoint.networks():
            has = " and ".join(checkpoint.networks())
            raise CheckpointError(f"{checkpoint.source} has no network {which!r} to start from; it has {has}")
    else:
        prefix = "backbone." if checkpoint.kind == "detector" else "encoder."
    return {key.removeprefix(prefix): tensor for key, tensor in checkpoint.state.items() if key.startswith(prefix)}


def load_backbone(backbone: nn.Module, checkpoint: Checkpoint, which: str = "online") -> LoadReport:
    """Start a downstream backbone from a checkpoint; see `encoder_state` for what is used and what stays fresh.

    Args:
        backbone: a plain ViT (`models.vit.create_backbone`), or a network of timm (`models.timm_backbone.create`).
        checkpoint: of the same kind of network.
        which: see `encoder_state`.

    Raises:
        CheckpointError: another architecture (says which settings would fit), or keys that nobody can explain.
    """
    state = encoder_state(checkpoint, which)
    model = checkpoint.meta["model"]
    here = timm_backbone.architecture(backbone)
    there = None if is_vit(model) else model.get("architecture") or f"networks of the family {model['family']}"
    if here != there:
        found, wanted = (f"timm's {name}" if name else "a plain ViT (model.family=vit)" for name in (there, here))
        raise CheckpointError(
            f"{checkpoint.source} holds {found}, but the model to start from it is {wanted}; give another model=…, or "
            "another checkpoint as model.init"
        )
    if here is not None:
        return timm_backbone.load(backbone, state, model)
    backbone = cast(VisionTransformer, backbone)
    _require_same_architecture(backbone, checkpoint)
    return load_into(
        backbone, renamed_for(backbone, state), expect_missing=DOWNSTREAM_MISSING, expect_unused=DOWNSTREAM_UNUSED
    )


def _require_same_architecture(backbone: VisionTransformer, checkpoint: Checkpoint) -> None:
    """The number of heads leaves no trace in tensor shapes, so that metadata are compared, not only tensors."""
    model = checkpoint.meta["model"]
    here = {
        "patch_size": int(backbone.patch_embed.patch_size[0]),
        "dim": backbone.embed_dim,
        "depth": len(backbone.blocks),
        "heads": backbone.blocks[0].attn.num_heads,
    }
    there = {key: model[key] for key in here}
    if there == here:
        return
    sizes = {name: {key: getattr(size, key) for key in here} for name, size in SIZES.items()}
    fitting = next((f"model={name}" for name, size in sizes.items() if size == there), None)
    if fitting is None:
        fitting = " ".join(f"model.{key}={there[key]}" for key in here if there[key] != here[key])

    def words(what: Mapping[str, int]) -> str:
        name = next((name for name, size in sizes.items() if size == what), "a ViT")
        return (
            f"{name} (patch {what['patch_size']}, width {what['dim']}, {what['depth']} blocks, {what['heads']} heads)"
        )

    raise CheckpointError(
        f"{checkpoint.source} holds {words(there)}, but the model to start from it is {words(here)}; "
        f"give {fitting}, or another checkpoint as model.init"
    )


# ------------------------------------------------------------------------------------------------------------- writing


def write_published(folder: str | os.PathLike[str], checkpoint: Checkpoint) -> list[Path]:
    """Write the files the published code reads, and return their paths.

    Pre-training: `checkpoint-{epoch}.pth` and `checkpoint-te-{epoch}.pth`; detectors: `checkpoint.pth` with the classes
    in the published order (logit 1 is "real"), whatever ours is; and `pretrain_ds_mean_std.txt` where the statistics
    are known. Our metadata travel along as text in `args`, so reading the files again gives back this checkpoint.

    Raises:
        CheckpointError: the network has no released layout (for example, it has LoRA weights); the keys are listed.
    """
    folder = Path(folder)
    meta, state = checkpoint.meta, checkpoint.state
    provenance = meta.get("provenance") or {}
    epoch = int(provenance.get("epoch") or 0)
    arguments = argparse.Namespace(
        **{k: v for k, v in (provenance.get("args") or {}).items() if re.fullmatch(r"\w+", k)}
    )
    setattr(arguments, _OWN_META, json.dumps({k: v for k, v in meta.items() if k not in ("format", "version")}))
    files: dict[str, dict[str, Any]] = {}
    if checkpoint.kind == "detector":
        kind = ("fas" if meta["task"] == "antispoof" else "") + (
            "_adapter" if "head.adapter.down.weight" in state else ""
        )
        ordered = state if meta["class_order"] == list(CLASS_ORDER) else _swap_classes(state)
        kind = {"": "finetuned", "_adapter": "adapter"}.get(kind, kind)
        published = to_published({**ordered, **checkpoint.left_out}, kind)
        if kind.startswith("fas"):
            entries = {key: (provenance.get("container") or {}).get(key) for key in _FAS_ENTRIES}
            files["checkpoint.pth"] = {"epoch": epoch, "state_dict": published, **entries, "args": arguments}
        else:
            files["checkpoint.pth"] = _container(published, epoch, arguments)
    elif checkpoint.kind == "encoder":
        files["checkpoint.pth"] = _container(to_published(state, "encoder"), epoch, arguments)
    else:
        for network, infix in (("online", ""), ("target", "te-")):
            if network in checkpoint.networks():
                part = {k.removeprefix(f"{network}."): t for k, t in state.items() if k.startswith(f"{network}.")}
                published = to_published(part, f"pretrain_{network}")
                files[f"checkpoint-{infix}{epoch}.pth"] = _container(published, epoch, arguments)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, content in files.items():
        temporary = folder / f".{name}.{os.getpid()}.tmp"
        try:
            torch.save(content, temporary)
            temporary.replace(folder / name)
        finally:
            temporary.unlink(missing_ok=True)
        written.append(folder / name)
    if meta.get("mean") is not None and meta.get("std") is not None:
        temporary = folder / f".{STATS_FILE}.{os.getpid()}.tmp"
        temporary.write_text(json.dumps({"mean": meta["mean"], "std": meta["std"]}) + "\n", encoding="utf-8")
        temporary.replace(folder / STATS_FILE)
        written.append(folder / STATS_FILE)
    return written


def _container(tensors: dict[str, Tensor], epoch: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The released container; optimiser and scaler are empty, they belong to another program's parameter groups."""
    cpu = {key: tensor.detach().cpu() for key, tensor in tensors.items()}
    return {"model": cpu, "optimizer": {}, "epoch": epoch, "scaler": {}, "args": arguments}
