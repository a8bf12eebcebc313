"""A small random detector whose scores differ from picture to picture, as an export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fsvfm.checkpoint import save_export
from fsvfm.models.detector import build_detector
from fsvfm.models.vit import ViTConfig

TUNE = {"name": "full", "drop_path": 0.0, "frozen_drop_path": False, "reduction": 4, "quirk": False}


def write_detector(
    folder: Path, *, task: str = "forgery", size: int = 64, seed: int = 0, mean: float = 0.5, **meta: Any
) -> Path:
    """Write an export; further metadata (``calibration``, ``provenance``) may be given."""
    torch.manual_seed(seed)
    network = build_detector(
        ViTConfig("vit_test", patch_size=16, dim=32, depth=2, heads=4, image_size=size),
        TUNE,
        ("real", "fake"),
        task=task,
    )
    head = network.head.fc if task == "forgery" else network.head.embed
    torch.nn.init.normal_(head.weight, std=0.5)
    model = {"name": "vit_test", "image_size": size, "patch_size": 16, "dim": 32, "depth": 2, "heads": 4}
    facts = {
        "kind": "detector", "task": task, "model": model, "tune": TUNE, "class_order": ["real", "fake"],
        "mean": [mean] * 3, "std": [0.25] * 3, **meta,
    }  # fmt: skip
    return save_export(folder, network.state_dict(), facts)
