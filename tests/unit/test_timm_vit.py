"""Backbones of timm: the same function as in timm, plain ViTs as ours and all others as networks of timm."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor

from fsvfm import build
from fsvfm.checkpoint import encoder_state, load_backbone, load_checkpoint, normalisation, resize_pos_embed
from fsvfm.errors import CheckpointError, ConfigError
from fsvfm.explain import explain
from fsvfm.exports import save_export
from fsvfm.formats import Portable, write_timm
from fsvfm.library import load_encoder
from fsvfm.loaded_detector import load_detector_network
from fsvfm.models import timm_backbone
from fsvfm.models.detector import build_detector, cost
from fsvfm.models.vit import ViTConfig, create_backbone, vit_config
from fsvfm.optim import layer_decay_groups
from fsvfm.timm_vit import plain_architecture

TINY = "vit_tiny_patch16_224.augreg_in21k"
SMALL = "vit_small_patch32_224.augreg_in21k"
TUNE = {"name": "full", "drop_path": 0.0, "frozen_drop_path": False, "reduction": 4, "contrast_weight": 0.0}


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
def test_relatives_are_told_from_plain_vits_by_what_is_different(name: str, words: list[str]) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    with pytest.raises(CheckpointError) as caught:
        plain_architecture(name, model)
    assert all(word in str(caught.value) for word in [*words, "no plain ViT", name.split(".")[0]])


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


# ----------------------------------------------------------------------------------- networks that are no plain ViT

#: Small ones of timm: a ViT with LayerScale, and a convolutional network.
DINO = "vit_small_patch14_dinov2.lvd142m"
CNN = "efficientnet_lite0.ra_in1k"


def table(name: str, image_size: int) -> dict[str, Any]:
    architecture = name.split(".")[0]
    return {"name": architecture, "family": "timm", "architecture": architecture, "image_size": image_size}


@torch.no_grad()
def test_a_cnn_computes_what_it_does_in_timm(weights: Path, tmp_path: Path) -> None:
    model = put(weights, CNN)
    loaded = load_checkpoint(f"timm:{CNN}")
    assert loaded.meta["model"] == table(CNN, 224)
    assert normalisation(loaded) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert not any("classifier" in key for key in loaded.state)
    again = load_checkpoint(save_export(tmp_path / "export", loaded.state, loaded.meta))
    assert again.meta == loaded.meta
    detector = build_detector(table(CNN, 96), TUNE, ["real", "fake"]).eval()
    report = load_backbone(detector.backbone, again)
    assert report.missing == report.unused == report.resized == ()
    images = torch.randn(2, 3, 96, 96)
    feature, _ = detector.features(images)
    torch.testing.assert_close(feature, model.forward_head(model.forward_features(images), pre_logits=True))


@torch.no_grad()
def test_positions_come_to_another_size_as_in_timm(weights: Path) -> None:
    model = put(weights, DINO)
    backbone = timm_backbone.create(table(DINO, 112)).eval()
    report = load_backbone(backbone, load_checkpoint(f"timm:{DINO}"))
    assert report.resized == ("pos_embed",)
    model.set_input_size(img_size=112)
    images = torch.randn(1, 3, 112, 112)
    torch.testing.assert_close(backbone(images), model(images), rtol=0, atol=1e-5)


def test_a_checkpoint_of_another_architecture_is_refused(weights: Path) -> None:
    put(weights, CNN)
    loaded = load_checkpoint(f"timm:{CNN}")
    for model, words in ((vit_config("vit_tiny"), "a plain ViT"), (table("resnet18", 64), "timm's resnet18")):
        backbone = create_backbone(model) if isinstance(model, ViTConfig) else timm_backbone.create(model)
        with pytest.raises(CheckpointError, match=rf"holds timm's efficientnet_lite0, but .* is {words}"):
            load_backbone(backbone, loaded)


def test_without_a_connection_it_says_what_to_put_where(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(weights / "none"))
    monkeypatch.setattr("torch.hub.download_url_to_file", lambda *_: (_ for _ in ()).throw(OSError("no route")))
    with pytest.raises(CheckpointError, match=r"xception-43020ad28\.pth is not here(.|\n)*Put it at: .*timm/legacy_x"):
        load_checkpoint("timm:legacy_xception.tf_in1k")
    for name in ("vit_base_patch14_dinov2.lvd142m", "vit_base_patch16_dinov3.lvd1689m", "tf_efficientnet_b4.ap_in1k"):
        with pytest.raises(CheckpointError, match=rf"model\.safetensors of timm/{name} is not here(.|\n)*Put it at"):
            load_checkpoint(f"timm:{name}")


@torch.no_grad()
def test_the_visual_half_of_a_clip_is_read_from_a_file(tmp_path: Path) -> None:
    """Against open_clip's own transformer with the same weights, QuickGELU included."""
    import open_clip

    torch.manual_seed(0)
    theirs = open_clip.create_model("ViT-B-32-quickgelu", pretrained=None).visual.eval()
    state = {f"visual.{key}": tensor for key, tensor in theirs.state_dict().items()}
    torch.save({"state_dict": {**state, "logit_scale": torch.ones(())}}, tmp_path / "clip.pth")
    loaded = load_checkpoint(tmp_path / "clip.pth")
    assert loaded.meta["model"] == table("vit_base_patch32_clip_quickgelu_224", 224)
    assert loaded.meta["mean"] == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    backbone = timm_backbone.create(loaded.meta["model"]).eval()
    load_backbone(backbone, loaded)
    images = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(backbone(images) @ theirs.proj, theirs(images), rtol=0, atol=1e-4)


@pytest.mark.parametrize("tune", ["full", "adapter", "linear"])
def test_ways_of_tuning_train_what_they_should(tune: str) -> None:
    detector = build_detector(table(CNN, 64), {**TUNE, "name": tune}, ["real", "fake"]).train()
    width = 1280
    plain = 2 * width + 2
    head = {"full": plain, "linear": plain, "adapter": 2 * width * 320 + 320 * 321 + 2 * width + plain}[tune]
    backbone = sum(p.numel() for p in detector.backbone.parameters())
    assert detector.trainable_parameters() == head + (backbone if tune == "full" else 0)
    norm = next(m for m in detector.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d))
    before = norm.running_mean.clone()
    output = detector(torch.randn(4, 3, 64, 64))
    output.logits.sum().backward()
    assert (output.projection is None) == (tune != "adapter")
    assert torch.equal(norm.running_mean, before) == (tune != "full")  # a frozen backbone keeps its statistics


def test_layer_decay_follows_timms_layers() -> None:
    detector = build_detector(table(CNN, 64), TUNE, ["real", "fake"])
    layers = timm_backbone.layers(detector.backbone)
    groups = layer_decay_groups(detector, 0.1, 0.5, layers=layers)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    named = dict(detector.named_parameters())
    assert len(scale) == len(named)
    assert scale[id(named["head.fc.weight"])] == 1
    assert scale[id(named["backbone.conv_stem.weight"])] == 0.5 ** (max(layers.values()) + 1)
    first, later = (named[f"backbone.blocks.{name}.weight"] for name in ("0.0.conv_dw", "3.0.conv_pw"))
    assert scale[id(first)] < scale[id(later)] < 1


@pytest.mark.parametrize(
    ("changes", "tune", "words"),
    [
        ({"architecture": "resnet1"}, {}, "no architecture of timm"),
        ({"architecture": CNN}, {}, "without a tag"),
        ({"architecture": "legacy_xception"}, {"drop_path": 0.1}, "no stochastic depth"),
        ({"architecture": "legacy_xception", "grad_checkpointing": True}, {}, "grad_checkpointing"),
        ({"architecture": "vit_small_patch14_dinov2", "image_size": 100}, {}, "not a multiple of the 14 px"),
    ],
)
def test_what_a_network_cannot_be_is_told(changes: dict[str, Any], tune: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_detector({**table(CNN, 64), **changes}, {**TUNE, **tune}, ["real", "fake"])


def test_cost_is_counted_by_hand() -> None:
    """Of a ViT: patch embedding; of each block 12 d² per token in its layers and 2 d L per token in attention."""
    config = ViTConfig("vit_test", patch_size=16, dim=32, depth=2, heads=4, image_size=64)
    detector = build_detector(config, {**TUNE, "name": "linear"}, ["real", "fake"]).eval()
    tokens = 1 + 16
    macs = 16 * 32 * 768 + 2 * tokens * (12 * 32 * 32 + 2 * 32 * tokens) + 2 * 32
    found = cost(detector, 64)
    assert found["gflops"] == pytest.approx(2 * macs / 1e9, rel=1e-9)
    assert found["trained"] == 2 * 32 + 2
    assert found["parameters"] == sum(p.numel() for p in detector.parameters())


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """A small CNN as a detector, exported."""
    torch.manual_seed(0)
    network = build_detector(table(CNN, 60), TUNE, ["real", "fake"])
    torch.nn.init.normal_(network.head.fc.weight, std=0.05)
    facts = {
        "kind": "detector", "task": "forgery", "model": table(CNN, 60), "tune": TUNE, "class_order": ["real", "fake"],
        "mean": [0.5] * 3, "std": [0.25] * 3,
    }  # fmt: skip
    return save_export(tmp_path / "cnn", network.state_dict(), facts)


def test_an_exported_cnn_goes_wherever_a_vit_goes(exported: Path, tmp_path: Path) -> None:
    portable = Portable.from_checkpoint(load_checkpoint(exported))
    written = write_timm(tmp_path / "timm", portable)
    assert written.change.largest < 1e-6
    theirs = timm.create_model("efficientnet_lite0", num_classes=0, checkpoint_path=str(written.path)).eval()
    face = np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8)
    encoder = load_encoder(str(exported))
    with torch.no_grad():
        feature = theirs((torch.from_numpy(face).permute(2, 0, 1)[None] / 255 - 0.5) / 0.25)
    np.testing.assert_allclose(encoder.encode([face])[0], feature[0].numpy(), rtol=1e-3, atol=1e-4)


def test_explanations_of_a_cnn_say_what_there_is(exported: Path) -> None:
    detector = load_detector_network(str(exported))
    face = np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8)
    found = explain(detector, face, methods=["rollout", "gradient"])
    assert "EfficientNet" in found.omitted["rollout"]
    assert found.patches["gradient"].shape == (15, 15)  # 60 / 4: four is the divisor next to a fourteenth
    assert found.completeness is not None
    assert abs(found.completeness["gap"]) <= max(0.05 * abs(found.completeness["difference"]), 0.02)
