"""LoRA: what trains, how many parameters, and that merging changes the weights but not the function."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from fsvfm.checkpoint import load_backbone, load_checkpoint, write_published
from fsvfm.errors import CheckpointError, ConfigError
from fsvfm.exports import save_export
from fsvfm.loading import load_into
from fsvfm.models.detector import Detector, build_detector
from fsvfm.models.lora import fold
from fsvfm.models.vit import ViTConfig, create_backbone, vit_config

ORDER = ["real", "fake"]
TINY = ViTConfig("tiny", image_size=32, patch_size=8, dim=32, depth=3, heads=2)
VIT = {"name": "tiny", "image_size": 32, "patch_size": 8, "dim": 32, "depth": 3, "heads": 2}
LORA = {"rank": 4, "alpha": 6, "dropout": 0.0, "targets": ["qkv", "proj"]}
STATS = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1]}


def tune(**changes: Any) -> dict[str, Any]:
    return {"name": "lora", "drop_path": 0.0, "lora": {**LORA, **changes}}


def trained(task: str = "forgery", **changes: Any) -> Detector:
    """A detector whose updates and head are not zero any more."""
    torch.manual_seed(0)
    detector = build_detector(TINY, tune(**changes), ORDER, task=task)
    for name, parameter in detector.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
        assert parameter.requires_grad == (".lora_" in name or name.startswith("head.")), name
    return detector.eval()


@pytest.mark.parametrize("task", ["forgery", "antispoof"])
@pytest.mark.parametrize(
    ("size", "targets", "per_width"),
    # An (out, in) layer gets rank · (in + out): 4 d for qkv, 2 d for proj, 5 d for each layer of the MLP.
    [("vit_small", ["qkv", "proj"], 6), ("vit_base", ["qkv"], 4), ("vit_large", ["qkv", "proj", "fc1", "fc2"], 16)],
)
def test_parameters_are_rank_times_inputs_plus_outputs(
    size: str, targets: list[str], per_width: int, task: str
) -> None:
    config, rank = vit_config(size), 8
    head = 2 * config.dim + 2 if task == "forgery" else (config.dim + 1) * 512 + 2 * 512 + 2
    with torch.device("meta"):
        detector = build_detector(config, tune(rank=rank, targets=targets), ORDER, task=task)
    assert detector.trainable_parameters() == config.depth * rank * config.dim * per_width + head


def test_training_starts_at_the_pretrained_network_and_leaves_its_bytes() -> None:
    torch.manual_seed(0)
    plain = build_detector(TINY, {"name": "linear"}, ORDER).eval()
    detector = build_detector(TINY, tune(), ORDER)
    for key, tensor in detector.state_dict().items():
        if ".lora_" not in key:
            tensor.copy_(plain.state_dict()[key.replace(".base_layer", "")])
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(detector.eval()(images).logits, plain(images).logits, rtol=0, atol=0)

    before = {key: tensor.clone() for key, tensor in detector.state_dict().items()}
    optimiser = torch.optim.AdamW([p for p in detector.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        loss = F.cross_entropy(detector.train()(images).logits, torch.tensor([0, 1, 0, 1]))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for key, tensor in detector.state_dict().items():
        changes = ".lora_" in key or key.startswith("head.")
        assert torch.equal(tensor, before[key]) != changes, key


def test_gradient_checkpointing_reaches_the_updates() -> None:
    images, gradients = torch.randn(2, 3, 32, 32), []
    state = trained().state_dict()
    for recompute in (False, True):
        detector = build_detector({**VIT, "grad_checkpointing": recompute}, tune(), ORDER).train()
        detector.load_state_dict(state)
        detector(images).logits[:, 0].sum().backward()
        gradients.append({k: p.grad for k, p in detector.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert sum(".lora_A" in key for key in gradients[0]) == 2 * TINY.depth
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][key], rtol=1e-4, atol=1e-7)


def test_in_training_only_dropout_and_drop_path_that_were_asked_for_are_active() -> None:
    for keep in (True, False):
        values = {**tune(dropout=0.5), "drop_path": 0.3, "frozen_drop_path": keep}
        detector = build_detector(TINY, values, ORDER)
        for mode in (True, False, True):
            detector.train(mode)
            modules = dict(detector.backbone.named_modules())
            drops = [m.training for name, m in modules.items() if ".lora_dropout." in name]
            assert len(drops) == 2 * TINY.depth
            assert set(drops) == {mode}
            assert {m.training for m in modules.values() if isinstance(m, DropPath)} == {mode and keep}
            assert not detector.backbone.training


def reference_logits(state: dict[str, Tensor], images: Tensor) -> Tensor:
    """A plain timm ViT with these tensors: a detector's export is nothing else."""
    network = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=2, global_pool="avg"
    ).eval()
    names = {key: key.removeprefix("backbone.").replace("head.fc.", "head.") for key in state}
    network.load_state_dict({names[key]: tensor for key, tensor in state.items()}, strict=True)
    return network(images)


@torch.no_grad()
def test_merged_network_is_a_plain_one_and_computes_the_same() -> None:
    for changes in ({}, {"targets": ["qkv", "proj", "fc1", "fc2"], "rank": 7, "alpha": 3}, {"targets": ["fc2"]}):
        detector, images = trained(**changes), torch.randn(8, 3, 32, 32)
        expected = detector(images).logits
        merged = fold(detector.state_dict(), alpha={**LORA, **changes}["alpha"])
        assert set(merged) == set(build_detector(TINY, {"name": "full"}, ORDER).state_dict())
        torch.testing.assert_close(reference_logits(merged, images), expected, rtol=1e-5, atol=1e-5)
        # The update matters: without it the scores are others.
        frozen = {k.replace(".base_layer", ""): t for k, t in detector.state_dict().items() if ".lora_" not in k}
        assert (reference_logits(frozen, images) - expected).abs().max() > 0.05
        # Tensors without an update are passed on, not copied.
        assert merged["backbone.patch_embed.proj.weight"] is not None
        assert torch.equal(merged["backbone.patch_embed.proj.weight"], frozen["backbone.patch_embed.proj.weight"])


def lightning(detector: Detector, **changes: Any) -> dict[str, Any]:
    values = {"model": VIT, "tune": tune(**changes), "class_order": ORDER, **STATS}
    return {
        "epoch": 2, "global_step": 9, "pytorch-lightning_version": "2.6.0", "hyper_parameters": values,
        "state_dict": {f"detector.{key}": tensor for key, tensor in detector.state_dict().items()},
    }  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("task", ["forgery", "antispoof"])
def test_lightning_checkpoint_export_and_released_format_are_merged(tmp_path: Path, task: str) -> None:
    detector, images = trained(task), torch.randn(8, 3, 32, 32)
    torch.save(lightning(detector), tmp_path / "best.ckpt")
    loaded = load_checkpoint(tmp_path / "best.ckpt")
    assert loaded.meta["tune"]["name"] == "lora"
    assert loaded.meta["tune"]["lora"] == LORA
    assert loaded.meta["provenance"]["hyper_parameters"]["tune"]["name"] == "lora"
    save_export(tmp_path / "export", loaded.state, loaded.meta)
    (file, *_) = write_published(tmp_path / "published", loaded)
    for source in (tmp_path / "best.ckpt", tmp_path / "export", file):
        again = load_checkpoint(source)
        assert again.meta["task"] == task
        network = build_detector(again.meta["model"], again.meta["tune"], again.meta["class_order"], task=task).eval()
        assert load_into(network, again.state).missing == ()
        torch.testing.assert_close(network.scores(images), detector.scores(images), rtol=0, atol=1e-5)


def test_a_lora_backbone_starts_from_any_checkpoint(tmp_path: Path) -> None:
    start = trained()
    torch.save(lightning(start), tmp_path / "first.ckpt")
    loaded = load_checkpoint(tmp_path / "first.ckpt")
    detector = build_detector(TINY, tune(), ORDER)
    report = load_backbone(detector.backbone, loaded)
    assert report.unused == ()
    assert all(".lora_" in key for key in report.missing)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        expected = create_backbone(TINY).eval()
        load_into(expected, {k.removeprefix("backbone."): t for k, t in loaded.state.items() if "head." not in k})
        torch.testing.assert_close(detector.eval().features(images)[0], expected(images), rtol=0, atol=0)


def test_a_checkpoint_with_a_hole_is_refused(tmp_path: Path) -> None:
    content = lightning(trained())
    del content["state_dict"]["detector.backbone.blocks.1.attn.proj.lora_B.default.weight"]
    torch.save(content, tmp_path / "hole.ckpt")
    with pytest.raises(CheckpointError, match=r"backbone\.blocks\.1\.attn\.proj is incomplete"):
        load_checkpoint(tmp_path / "hole.ckpt")
    content = lightning(trained())
    content["hyper_parameters"]["tune"] = {"name": "lora"}
    torch.save(content, tmp_path / "no_alpha.ckpt")
    with pytest.raises(CheckpointError, match=r"tune\.lora\.alpha"):
        load_checkpoint(tmp_path / "no_alpha.ckpt")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"targets": ["qkv", "head"]}, ["targets", "qkv, proj, fc1, fc2"]),
        ({"targets": []}, ["targets"]),
        ({"rank": 0, "alpha": 0, "dropout": 1.0}, ["rank=0", "alpha=0", "dropout=1.0"]),
        ({"rank": 64}, ["rank=64", "width 32"]),
    ],
)
def test_impossible_values_are_named_together(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        build_detector(TINY, tune(**changes), ORDER)
    assert all(word in str(caught.value) for word in words)


def test_settings_are_required() -> None:
    with pytest.raises(ConfigError, match=r"tune\.lora with rank"):
        build_detector(TINY, {"name": "lora"}, ORDER)


def test_peft_is_imported_by_lora_only() -> None:
    code = (
        "import sys, fsvfm.checkpoint, fsvfm.models.lora\n"
        "from fsvfm.models.detector import build_detector\n"
        f"build_detector({VIT!r}, {{'name': 'adapter'}}, {ORDER!r})\n"
        "assert 'peft' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
