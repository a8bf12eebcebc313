from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fsvfm.errors import ConfigError
from fsvfm.models.vit import ViTConfig, create_backbone
from fsvfm.optim import build_adamw, layer_decay_groups, scale_lr, set_lr, weight_decay_groups

DEPTH = 3
TINY = ViTConfig("test", patch_size=8, dim=24, depth=DEPTH, heads=3, image_size=16)


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = create_backbone(TINY)
        # A head with blocks of its own, to be told apart from the backbone's.
        self.head = nn.ModuleDict({"fc": nn.Linear(24, 2), "blocks": nn.ModuleList([nn.Linear(24, 24)])})


def by_name(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [(names[id(parameter)], group) for group in groups for parameter in group["params"]]
    assert len(found) == len(dict(found))
    return dict(found)


def test_linear_scaling_rule() -> None:
    assert scale_lr(1.5e-4, 4096) == pytest.approx(2.4e-3)
    assert scale_lr(2e-4, 64) == pytest.approx(5e-5)
    with pytest.raises(ConfigError, match="-1"):
        scale_lr(-1, 64)


def test_weight_decay_leaves_biases_and_norms_alone() -> None:
    model = Detector()
    groups = by_name(model, weight_decay_groups(model, 0.05))
    assert set(groups) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        expected = 0.0 if name.endswith("bias") or "norm" in name else 0.05
        assert groups[name]["weight_decay"] == expected, name
        assert (parameter.ndim == 1) == (expected == 0.0)
        assert groups[name]["lr_scale"] == 1.0


def test_frozen_parameters_are_in_no_group() -> None:
    model = Detector()
    model.backbone.requires_grad_(False)
    for groups in (weight_decay_groups(model, 0.1), layer_decay_groups(model, 0.1, 0.5)):
        assert set(by_name(model, groups)) == {name for name, _ in model.named_parameters() if "head" in name}


def test_layer_decay_by_the_rule() -> None:
    model = Detector()
    groups = by_name(model, layer_decay_groups(model, 0.03, 0.5))
    scale = {
        "backbone.cls_token": 0.5**4,
        "backbone.pos_embed": 0.5**4,
        "backbone.patch_embed.proj.weight": 0.5**4,
        "backbone.blocks.0.attn.qkv.weight": 0.5**3,
        "backbone.blocks.2.mlp.fc1.bias": 0.5,
        "backbone.fc_norm.weight": 1.0,
        "head.fc.weight": 1.0,
        "head.blocks.0.weight": 1.0,
    }
    assert {name: groups[name]["lr_scale"] for name in scale} == scale
    undecayed = {name for name, group in groups.items() if group["weight_decay"] == 0.0}
    assert undecayed == {
        name
        for name, p in model.named_parameters()
        if p.ndim == 1 or name in ("backbone.cls_token", "backbone.pos_embed")
    }


def test_layer_decay_reads_wrapped_and_bare_names() -> None:
    weight = nn.Parameter(torch.zeros(2, 2))
    (group,) = layer_decay_groups([("backbone.base_model.model.blocks.1.attn.qkv.w", weight)], 0.0, 0.5, depth=4)
    assert group["lr_scale"] == 0.5**3
    (group,) = layer_decay_groups([("blocks.1.attn.qkv.w", weight)], 0.0, 0.5, depth=4, backbone_prefix="")
    assert group["lr_scale"] == 0.5**3


def test_freezing_the_last_blocks_keeps_the_other_rates() -> None:
    model = Detector()
    before = by_name(model, layer_decay_groups(model, 0.0, 0.5))["backbone.blocks.0.attn.qkv.weight"]["lr_scale"]
    model.backbone.blocks[-1].requires_grad_(False)
    after = by_name(model, layer_decay_groups(model, 0.0, 0.5))["backbone.blocks.0.attn.qkv.weight"]["lr_scale"]
    assert before == after == 0.5**3


def test_layer_decay_refuses_what_it_cannot_place() -> None:
    model = Detector()
    with pytest.raises(ConfigError, match=r"block 2.*depth is 2"):
        layer_decay_groups(model, 0.0, 0.5, depth=2)
    with pytest.raises(ConfigError, match="encoder"):
        layer_decay_groups(model, 0.0, 0.5, backbone_prefix="encoder.")
    for decay in (0.0, 1.5):
        with pytest.raises(ConfigError, match="layer_decay"):
            layer_decay_groups(model, 0.0, decay)


def test_every_group_gets_its_own_rate() -> None:
    model = Detector()
    optimizer = build_adamw(layer_decay_groups(model, 0.03, 0.5), lr=1e-3)
    assert len({group["lr"] for group in optimizer.param_groups}) == DEPTH + 2
    for lr in (1e-3, 2e-4):
        set_lr(optimizer, lr)
        assert all(group["lr"] == lr * group["lr_scale"] for group in optimizer.param_groups)


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ConfigError, match="trainable"):
        build_adamw(weight_decay_groups(nn.Linear(2, 2).requires_grad_(False), 0.1), lr=0.1)


@pytest.mark.parametrize("gradient", [float("nan"), float("inf"), 1.0])
def test_fused_adamw_skips_a_marked_step(gradient: float) -> None:
    """What non-finite steps rely on: no weight, moment or step count changes, and training goes on after."""

    def train(marks: list[float]) -> tuple[list[torch.Tensor], torch.optim.AdamW]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = build_adamw(weight_decay_groups(model, 0.1), lr=0.1)
        for mark in marks:
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, gradient if mark else 0.5)
            optimizer.found_inf = torch.tensor(mark)
            optimizer.step()
        return [parameter.detach() for parameter in model.parameters()], optimizer

    plain, reference = train([0.0, 0.0, 0.0])
    skipping, optimizer = train([1.0, 0.0, 0.0, 1.0, 0.0])
    assert all(torch.equal(a, b) for a, b in zip(plain, skipping, strict=True))
    states = zip(reference.state.values(), optimizer.state.values(), strict=True)
    assert all(torch.equal(one[key], two[key]) for one, two in states for key in ("step", "exp_avg", "exp_avg_sq"))
