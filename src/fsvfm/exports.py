"""Our export format: a folder with `model.safetensors` (tensors) and `model.json` (all else there is to know)."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from fsvfm.errors import CheckpointError
from fsvfm.published import infer_model, listing

FORMAT, VERSION = "fsvfm-export", 1
PREFIXES = {"pretrain": ("online.", "target."), "encoder": ("encoder.",), "detector": ("backbone.", "head.")}
TASKS = ("pretrain", "forgery", "antispoof")
#: What `model` must say of a network that is no plain ViT, and of one that is.
NUMBERS = {False: ("image_size",), True: ("image_size", "patch_size", "dim", "depth", "heads")}


def is_vit(model: Mapping[str, Any]) -> bool:
    """Whether a model table describes a plain ViT, and not a network of another family (models.detector.FAMILIES)."""
    return model.get("family", "vit") == "vit"


def size_in_words(model: Mapping[str, Any]) -> str:
    """Input and architecture of a model table, in words."""
    pixels = f"{model['image_size']}×{model['image_size']} pixels"
    if is_vit(model):
        return (
            f"{pixels}, patch {model['patch_size']}, width {model['dim']}, {model['depth']} blocks, "
            f"{model['heads']} heads"
        )
    architecture = model.get("architecture")
    return f"{pixels}, family {model['family']}{f', architecture {architecture}' if architecture else ''}"


def validate_meta(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Check metadata (see the module's docstring) and return a plain copy with `format` and `version` filled in.

    Raises:
        CheckpointError: entries that are missing or impossible; all of them are named.
    """
    meta = {"tune": None, "provenance": {}, "format": FORMAT, "version": VERSION, **plain(dict(meta))}
    if meta["format"] != FORMAT or meta["version"] != VERSION:
        raise CheckpointError(
            f"format {meta['format']!r} version {meta['version']!r} is not ours ({FORMAT!r} version {VERSION}); "
            "a newer export needs a newer fsvfm"
        )
    wrong = []
    if meta.get("kind") not in PREFIXES:
        wrong.append(f"kind: {meta.get('kind')!r}, expected one of {', '.join(PREFIXES)}")
    if meta.get("task") not in TASKS:
        wrong.append(f"task: {meta.get('task')!r}, expected one of {', '.join(TASKS)}")
    model = meta.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("name"), str):
        wrong.append("model: expected a table with name, image_size, patch_size, dim, depth and heads")
    else:
        for key in NUMBERS[is_vit(model)]:
            if not isinstance(model.get(key), int) or model[key] <= 0:
                wrong.append(f"model.{key}: {model.get(key)!r}, expected a positive whole number")
    for key in ("mean", "std"):
        values = meta.setdefault(key, None)
        if values is not None and not is_triple(values, positive=key == "std"):
            wrong.append(f"{key}: {values!r}, expected three numbers{' above 0' if key == 'std' else ''}, or null")
    order = meta.setdefault("class_order", None)
    if order is not None and sorted(order) != ["fake", "real"]:
        wrong.append(f'class_order: {order!r}, expected ["real", "fake"] or ["fake", "real"]')
    if order is None and meta.get("kind") == "detector":
        wrong.append(
            "class_order: a detector without it could be silently inverted; say which class logits 0 and 1 are"
        )
    if wrong:
        raise CheckpointError("invalid checkpoint metadata:" + "".join(f"\n  {line}" for line in wrong))
    return meta


def is_triple(values: Any, *, positive: bool) -> bool:
    """Whether `values` are three finite numbers (above 0 if `positive`)."""
    return (
        isinstance(values, Sequence)
        and len(values) == 3
        and all(isinstance(v, int | float) and math.isfinite(v) and (v > 0 or not positive) for v in values)
    )


def plain(value: Any) -> Any:
    """A value as JSON can hold it: tables, lists, text, finite numbers; everything else as text."""
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy and torch
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def check_state(state: Mapping[str, Tensor], meta: Mapping[str, Any]) -> dict[str, Any]:
    """Tensor names and shapes against metadata; returns the architecture the shapes show.

    Of networks that are no plain ViT only the names are looked at; the network itself checks the rest when it is built.
    """
    prefixes = PREFIXES[meta["kind"]]
    strangers = [key for key in state if not key.startswith(prefixes)]
    if strangers:
        raise CheckpointError(
            f"keys that no {meta['kind']} checkpoint has ({', '.join(prefixes)}):{listing(strangers)}"
        )
    model = meta["model"]
    if not is_vit(model):
        return dict(model)
    inferred = infer_model(
        state,
        heads=model["heads"],
        representation_heads=(model.get("representation_decoder") or {}).get("heads"),
        pixel_heads=(model.get("pixel_decoder") or {}).get("heads"),
    )
    for key in ("patch_size", "dim", "depth", "image_size"):
        if inferred[key] != model[key]:
            raise CheckpointError(
                f"metadata says {key} {model[key]}, but the tensors are of a ViT with {key} {inferred[key]}"
            )
    return inferred


def save_export(
    folder: str | os.PathLike[str],
    state: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    *,
    left_out: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write an export (`model.safetensors`, `model.json`); the folder appears complete or not at all.

    Args:
        folder: replaced if it is an export already.
        state: our key names → tensors, any device.
        meta: see the module's docstring.
        left_out: tensors named `unused.*` that are only kept (`Checkpoint.left_out`).

    Returns:
        the folder.

    Raises:
        CheckpointError: invalid metadata, tensors that do not fit it, or the folder holds other files.
    """
    folder = Path(folder)
    meta = validate_meta(meta)
    check_state(state, meta)
    others = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else ["a file"] if folder.exists() else []
    others = [name for name in others if name not in ("model.json", "model.safetensors")]
    if others:
        raise CheckpointError(f"{folder} is no export (it holds {', '.join(others[:5])}); choose another folder")
    tensors = {**state, **(left_out or {})}
    temporary = folder.parent / f".{folder.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        # Copied: safetensors refuses tensors that share storage, and networks may (views, tied layers).
        copies = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
        safetensors.torch.save_file(copies, temporary / "model.safetensors", metadata={"format": "pt"})
        (temporary / "model.safetensors").chmod(0o644)  # the library makes it readable for its owner only
        text = json.dumps(meta, indent=2, ensure_ascii=False, allow_nan=False)
        (temporary / "model.json").write_text(text + "\n", encoding="utf-8")
        old = folder.parent / f".{folder.name}.{os.getpid()}.old"
        if folder.exists():
            folder.replace(old)
        temporary.replace(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def read_meta(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata of an export folder, checked.

    Raises:
        CheckpointError: no `model.json`, or it is no valid metadata.
    """
    path = Path(folder) / "model.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is no export: it has no model.json") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(meta, dict):
        raise CheckpointError(f"{path} must hold a table, found {type(meta).__name__}")
    return validate_meta({"format": "none", "version": "none", **meta})
