"""Backbones of timm: the same function as in timm, refused where ours would be another one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor

from fsvfm import build
from fsvfm.checkpoint import encoder_state, load_backbone, load_checkpoint, normalisation, resize_pos_embed
from fsvfm.errors import CheckpointError
from fsvfm.exports import save_export
from fsvfm.models.vit import ViTConfig, create_backbone, vit_config
from fsvfm.timm_vit import plain_architecture

TINY = "vit_tiny_patch16_224.augreg_in21k"
SMALL = "vit_small_patch32_224.augreg_in21k"


@pytest.fixture(autouse=True)
def weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No test may reach the network; files put by hand lie in a folder of the test."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("FSVFM_WEIGHTS", str(tmp_path / "weights"))
    return tmp_path / "weights"


def put(weights: Path, name: str, *, without: str = "") -> torch.nn.Module:
    """A model of timm with random weights, whose file lies where the real one would be put by hand."""
    torch.manual_seed(1)
    model = timm.create_model(name, pretrained=False, num_classes=timm.get_pretrained_cfg(name).num_classes).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    state = {key: tensor.contiguous() for key, tensor in model.state_dict().items() if key != without}
    file = weights / "timm" / name / "model.safetensors"
    file.parent.mkdir(parents=True)
    safetensors.torch.save_file(state, file)
    return model


def pooled(model: torch.nn.Module, images: Tensor) -> Tensor:
    """The tokens of timm, mean of the patches before the final norm, then a fresh LayerNorm: the papers' feature."""
    model.norm = torch.nn.Identity()
    mean = model.forward_features(images)[:, 1:].mean(1)
    return F.layer_norm(mean, mean.shape[1:], eps=1e-6)


@torch.no_grad()
def test_features_are_those_of_timm(weights: Path) -> None:
    model, images = put(weights, TINY), torch.randn(2, 3, 224, 224)
    loaded = load_checkpoint(f"timm:{TINY}")
    assert loaded.kind == "encoder"
    assert loaded.meta["model"] == {
        "name": "vit_tiny_patch16_224", "image_size": 224, "patch_size": 16, "dim": 192, "depth": 12, "heads": 3,
    }  # fmt: skip
    assert normalisation(loaded) == ([0.5] * 3, [0.5] * 3)
    assert loaded.meta["provenance"]["weights"] == TINY
    assert loaded.meta["provenance"]["licence"] == "apache-2.0"
    assert not any("head" in key for key in loaded.state)
    config = ViTConfig.from_mapping(loaded.meta["model"])

    backbone = create_backbone(config, pool="cls").eval()
    report = load_backbone(backbone, loaded)
    assert report.missing == report.unused == report.resized == ()
    torch.testing.assert_close(backbone.forward_features(images), model.forward_features(images), rtol=0, atol=1e-6)

    backbone = create_backbone(config).eval()
    report = load_backbone(backbone, loaded)
    assert (set(report.missing), set(report.unused)) == (
        {"fc_norm.weight", "fc_norm.bias"}, {"norm.weight", "norm.bias"},
    )  # fmt: skip
    torch.testing.assert_close(backbone(images), pooled(model, images), rtol=0, atol=1e-6)


def test_an_export_of_it_is_a_checkpoint_like_any_other(weights: Path, tmp_path: Path) -> None:
    put(weights, TINY)
    loaded = load_checkpoint(f"timm:{TINY}")
    again = load_checkpoint(save_export(tmp_path / "export", loaded.state, loaded.meta))
    assert again.meta == loaded.meta
    assert all(torch.equal(again.state[key], tensor) for key, tensor in loaded.state.items())


def test_another_image_size_resizes_the_positions(weights: Path) -> None:
    put(weights, TINY)
    loaded = load_checkpoint(f"timm:{TINY}")
    backbone = create_backbone(vit_config("vit_tiny", depth=12, image_size=96))
    assert load_backbone(backbone, loaded).resized == ("pos_embed",)
    assert torch.equal(backbone.pos_embed, resize_pos_embed(encoder_state(loaded)["pos_embed"], 6))


def test_another_architecture_says_which_settings_fit(weights: Path) -> None:
    put(weights, SMALL)
    loaded = load_checkpoint(f"timm:{SMALL}")
    for config, settings in (
        (vit_config("vit_small", patch_size=32), "model.heads=6"),  # shapes alone would fit
        (vit_config("vit_small", heads=6), "model.patch_size=32"),
        (vit_config("vit_base"), "model.patch_size=32 model.dim=384 model.heads=6"),
        (vit_config("vit_small", patch_size=32, depth=6), "model.depth=12 model.heads=6"),
    ):
        with torch.device("meta"):
            backbone = create_backbone(config)
        with pytest.raises(CheckpointError, match=rf"patch 32, width 384, 12 blocks, 6 heads(.|\n)*give {settings},"):
            load_backbone(backbone, loaded)
    load_backbone(create_backbone(vit_config("vit_small", patch_size=32, heads=6)), loaded)


def test_one_override_compares_backbones(
    weights: Path, compose_config: Callable[..., DictConfig], prepared_dir: Path
) -> None:
    model = put(weights, TINY)
    cfg = compose_config(
        "train", "experiment=demo_dfd", f"paths.data={prepared_dir.parent}", "run=[fit]", "model.depth=12",
        f"model.init=timm:{TINY}",
    )  # fmt: skip
    build.check(cfg)
    task = build.build_task(cfg, build.build_data(cfg))
    assert task.hparams["mean"] == [0.5] * 3
    blocks = {k: t for k, t in model.state_dict().items() if k.startswith("blocks.")}
    own = task.detector.backbone.state_dict()
    assert len(blocks) == 144
    assert all(torch.equal(own[key], tensor) for key, tensor in blocks.items())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vit_small_patch14_dinov2.lvd142m", ["blocks.0…11.{ls1.gamma, ls2.gamma}"]),
        ("vit_small_patch14_reg4_dinov2.lvd142m", ["reg_token", "ls1.gamma"]),
        ("vit_base_patch32_clip_224.laion2b", ["norm_pre.weight", "lacks"]),
        ("vit_base_patch16_224_miil.in21k", ["lacks", "attn.qkv.bias"]),
        ("flexivit_small.300ep_in1k", ["pos_embed is (1, 225, 384), not (1, 226, 384)"]),
        ("deit_tiny_distilled_patch16_224.fb_in1k", ["VisionTransformerDistilled"]),
        ("vit_small_patch16_dinov3.lvd1689m", ["Eva"]),
        ("resnet18.a1_in1k", ["ResNet"]),
    ],
)
def test_relatives_are_refused_with_what_is_different(name: str, words: list[str]) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(f"timm:{name}")
    assert all(word in str(caught.value) for word in [*words, "only plain ViTs", name.split(".")[0]])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"act_layer": "quick_gelu"}, "QuickGELU"),
        ({"norm_layer": partial(torch.nn.LayerNorm, eps=1e-5)}, "eps=1e-05"),
    ],
)
def test_other_blocks_with_the_same_tensors_are_refused(changes: dict[str, Any], words: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(TINY, pretrained=False, **changes)
        plain = timm.create_model(TINY, pretrained=False)
    assert plain_architecture(TINY, plain)["heads"] == 3
    with pytest.raises(CheckpointError, match=rf"blocks have .*{words}"):
        plain_architecture(TINY, model)


def test_the_papers_baselines_are_plain() -> None:
    """They get as far as their weights, which are not here."""
    for name in (
        "vit_base_patch16_224.augreg_in21k", "vit_base_patch16_224.mae", "vit_base_patch16_224.dino",
        "vit_small_patch16_224.augreg_in21k", "vit_large_patch16_224.mae", "deit_base_patch16_224.fb_in1k",
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=rf"model\.safetensors of timm/{name} is not here(.|\n)*Put it at"):
            load_checkpoint(f"timm:{name}")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vit_base_patch16_224.mea", ["vit_base_patch16_224.mae"]),
        ("vit_bass_patch16_224", ["vit_base_patch16_224"]),
        ("", ["vit_base_patch16_224.mae"]),
    ],
)
def test_unknown_names_get_suggestions(name: str, words: list[str]) -> None:
    with pytest.raises(CheckpointError, match="did you mean") as caught:
        load_checkpoint(f"timm:{name}")
    assert all(word in str(caught.value) for word in words)


def test_a_file_that_does_not_fit_is_named(weights: Path) -> None:
    put(weights, TINY, without="blocks.3.mlp.fc1.bias")
    file = weights / "timm" / TINY / "model.safetensors"
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not hold(.|\n)*blocks\.3\.mlp\.fc1\.bias"):
        load_checkpoint(f"timm:{TINY}")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not hold"):
        load_checkpoint(f"timm:{TINY}")
