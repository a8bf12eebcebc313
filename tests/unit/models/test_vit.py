from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fsvfm.errors import ConfigError, DataError
from fsvfm.models.vit import (
    SIZES,
    ViTConfig,
    ViTEncoder,
    create_backbone,
    list_models,
    patchify,
    sincos_pos_embed,
    unpatchify,
    vit_config,
)

TINY = ViTConfig("test", patch_size=8, dim=24, depth=2, heads=3, image_size=32)
CONFIGS = Path(__file__).resolve().parents[3] / "configs" / "model"


def randomised(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random values everywhere, so that no term is zero by initialisation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in module.parameters():
            tensor.normal_(std=0.2, generator=generator)
    return module


def test_registry_lists_sizes_by_pattern() -> None:
    assert list_models() == ["vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge"]
    assert list_models("*_s*") == ["vit_small"]
    assert list_models("resnet*") == []


def test_overrides_change_only_what_they_name() -> None:
    config = vit_config("vit_base", image_size=64, patch_size=8)
    assert (config.grid_size, config.num_patches) == (8, 64)
    assert (config.dim, config.depth, config.heads) == (768, 12, 12)
    assert vit_config("vit_base").image_size == 224


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"image_size": 225}, ["225", "16"]),
        ({"heads": 7}, ["768", "7"]),
        ({"depth": 0}, ["depth"]),
        ({"dim": True}, ["dim"]),
        ({"dim": 30, "heads": 3}, ["30", "4"]),
        ({"width": 3}, ["width"]),
    ],
)
def test_impossible_values_are_named(values: dict[str, int], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        vit_config("vit_base", **values)
    assert all(word in str(error.value) for word in words)


def test_unknown_model_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="vit_small"):
        vit_config("vit_medium")


@pytest.mark.parametrize("name", list_models())
def test_config_files_agree_with_the_registry(name: str) -> None:
    values = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert ViTConfig.from_mapping(values) == SIZES[name]


def test_every_config_file_has_the_same_keys() -> None:
    def keys(value: object) -> object:
        return {key: keys(inner) for key, inner in value.items()} if isinstance(value, dict) else None

    values = [yaml.safe_load(path.read_text()) for path in sorted(CONFIGS.glob("vit_*.yaml"))]
    shapes = [keys(each) for each in values if each.get("family") == "vit"]
    assert len(shapes) >= len(SIZES)
    assert all(shape == shapes[0] for shape in shapes)


def test_config_of_an_unknown_size_must_be_complete() -> None:
    with pytest.raises(ConfigError, match="depth"):
        ViTConfig.from_mapping({"name": "mine", "patch_size": 16, "dim": 32, "heads": 4})


def test_sincos_by_the_formula() -> None:
    dim, grid = 16, 5
    table = sincos_pos_embed(dim, grid)
    assert table.shape == (1, 1 + grid**2, dim)
    assert not table[0, 0].any()
    for row, column in [(0, 0), (1, 3), (4, 2)]:
        expected = []
        for coordinate in (column, row):
            angles = [coordinate / 10000 ** (i / (dim // 4)) for i in range(dim // 4)]
            expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        torch.testing.assert_close(table[0, 1 + row * grid + column], torch.tensor(expected))
    assert torch.equal(sincos_pos_embed(dim, grid, cls_token=False), table[:, 1:])
    with pytest.raises(ConfigError, match="divisible by 4"):
        sincos_pos_embed(18, grid)


@settings(max_examples=20, deadline=None)
@given(batch=st.integers(1, 3), grid=st.integers(1, 4), patch=st.integers(1, 5), seed=st.integers(0, 99))
def test_patchify_keeps_pixels_in_place(batch: int, grid: int, patch: int, seed: int) -> None:
    images = torch.randn(batch, 3, grid * patch, grid * patch, generator=torch.Generator().manual_seed(seed))
    patches = patchify(images, patch)
    assert patches.shape == (batch, grid**2, patch**2 * 3)
    for index in range(grid**2):
        y, x = index // grid * patch, index % grid * patch
        window = images[:, :, y : y + patch, x : x + patch]
        assert torch.equal(patches[:, index], window.permute(0, 2, 3, 1).flatten(1))
    assert torch.equal(unpatchify(patches, patch), images)


def test_patchify_refuses_other_sizes() -> None:
    with pytest.raises(ConfigError, match="10x12"):
        patchify(torch.zeros(1, 3, 10, 12), 4)
    with pytest.raises(ConfigError, match="square"):
        unpatchify(torch.zeros(1, 5, 12), 2)


def test_keeping_all_patches_is_the_whole_image() -> None:
    encoder = randomised(ViTEncoder(TINY))
    images = torch.randn(2, 3, 32, 32)
    everything = torch.arange(TINY.num_patches).expand(2, -1)
    torch.testing.assert_close(encoder(images, everything), encoder(images))


def test_order_of_kept_patches_does_not_matter() -> None:
    encoder = randomised(ViTEncoder(TINY))
    images = torch.randn(2, 3, 32, 32)
    keep = torch.tensor([[1, 5, 9], [0, 2, 15]])
    order = torch.tensor([2, 0, 1])
    tokens, shuffled = encoder(images, keep), encoder(images, keep[:, order])
    torch.testing.assert_close(tokens[:, 0], shuffled[:, 0])
    torch.testing.assert_close(tokens[:, 1:][:, order], shuffled[:, 1:])


def test_hidden_patches_are_not_seen() -> None:
    encoder = randomised(ViTEncoder(TINY))
    images = torch.randn(1, 3, 32, 32)
    changed = images.clone()
    changed[:, :, :8, :8] += 10.0  # patch 0
    keep = torch.tensor([[1, 2, 7]])
    assert torch.equal(encoder(images, keep), encoder(changed, keep))
    assert not torch.allclose(encoder(images), encoder(changed))


def test_position_of_a_visible_patch_matters() -> None:
    encoder = randomised(ViTEncoder(TINY))
    images = torch.randn(1, 3, 8, 8).repeat(1, 1, 4, 4)  # the same patch everywhere
    assert not torch.allclose(encoder(images, torch.tensor([[0]])), encoder(images, torch.tensor([[6]])), atol=1e-3)


def test_gradient_checkpointing_changes_nothing() -> None:
    plain = randomised(ViTEncoder(TINY))
    saving = randomised(ViTEncoder(TINY, grad_checkpointing=True))
    images = torch.randn(2, 3, 32, 32)
    for encoder in (plain, saving):
        encoder(images).square().mean().backward()
    for one, two in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)


def test_encoder_refuses_other_image_sizes() -> None:
    with pytest.raises(DataError, match="32, 32"):
        ViTEncoder(TINY)(torch.zeros(1, 3, 40, 40))


def test_initialisation() -> None:
    torch.manual_seed(0)
    encoder = ViTEncoder(ViTConfig("test", patch_size=8, dim=192, depth=1, heads=3, image_size=16))
    weight = encoder.patch_embed.proj.weight
    bound = math.sqrt(6 / (8 * 8 * 3 + 192))
    assert weight.abs().max() <= bound
    assert weight.abs().max() > 0.95 * bound
    assert not encoder.patch_embed.proj.bias.any()
    assert float(encoder.cls_token.detach().std()) == pytest.approx(0.02, rel=0.3)
    assert not encoder.blocks[0].attn.qkv.bias.any()
    assert torch.equal(encoder.pos_embed, sincos_pos_embed(192, 2))
    assert "pos_embed" not in dict(encoder.named_parameters())


@pytest.mark.parametrize("pool", ["avg", "cls"])
def test_backbone_pools_what_it_says(pool: str) -> None:
    backbone = randomised(create_backbone(TINY, pool=pool)).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens = backbone.patch_embed(images)
        tokens = torch.cat([backbone.cls_token.expand(2, -1, -1), tokens], dim=1) + backbone.pos_embed
        for block in backbone.blocks:
            tokens = block(tokens)
        expected = backbone.fc_norm(tokens[:, 1:].mean(1)) if pool == "avg" else backbone.norm(tokens)[:, 0]
        torch.testing.assert_close(backbone(images), expected)
    assert backbone.pos_embed.requires_grad


def test_backbone_drop_path_acts_in_training_only() -> None:
    backbone = randomised(create_backbone(TINY, drop_path=0.5))
    images = torch.randn(8, 3, 32, 32)
    torch.manual_seed(0)
    assert not torch.allclose(backbone(images), backbone(images))
    backbone.eval()
    assert torch.equal(backbone(images), backbone(images))


def test_backbone_refuses_unknown_values() -> None:
    with pytest.raises(ConfigError, match="pool"):
        create_backbone(TINY, pool="max")
    with pytest.raises(ConfigError, match="drop_path"):
        create_backbone(TINY, drop_path=1.0)
