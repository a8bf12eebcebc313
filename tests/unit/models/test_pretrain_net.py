from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fsvfm.errors import ConfigError, MaskingError
from fsvfm.models.pretrain_net import (
    OnlineNetwork,
    PixelDecoderConfig,
    PretrainNetConfig,
    ProjectionConfig,
    RepresentationDecoderConfig,
    TargetNetwork,
    build_networks,
    copy_to_target,
    insert_mask_tokens,
    shared_buffers,
    shared_parameters,
    visible_ids,
)
from fsvfm.models.vit import ViTConfig, list_models, vit_config

VIT = ViTConfig("test", patch_size=8, dim=24, depth=2, heads=3, image_size=32)
LENGTH = VIT.num_patches
CONFIG = PretrainNetConfig(
    RepresentationDecoderConfig(depth=1, heads=4),
    PixelDecoderConfig(dim=16, depth=1, heads=2),
    ProjectionConfig(hidden=32, out=8),
)
CONFIGS = Path(__file__).resolve().parents[3] / "configs" / "model"


def networks(seed: int = 0) -> tuple[OnlineNetwork, TargetNetwork]:
    """Networks with random values everywhere, so that no term is zero by initialisation."""
    online, target = build_networks(VIT, CONFIG)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in online.parameters():
            parameter.normal_(std=0.2, generator=generator)
    copy_to_target(online, target)
    return online, target


def random_mask(batch: int, budget: int, seed: int = 0) -> Tensor:
    order = torch.rand(batch, LENGTH, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)
    return order < budget


@settings(max_examples=30, deadline=None)
@given(batch=st.integers(1, 4), budget=st.integers(1, LENGTH - 1), seed=st.integers(0, 999))
def test_visible_ids_are_the_unmasked_ones_in_order(batch: int, budget: int, seed: int) -> None:
    masked = random_mask(batch, budget, seed)
    expected = [[i for i in range(LENGTH) if not row[i]] for row in masked.tolist()]
    assert visible_ids(masked, budget).tolist() == expected


@settings(max_examples=30, deadline=None)
@given(batch=st.integers(1, 4), budget=st.integers(1, LENGTH - 1), seed=st.integers(0, 999))
def test_mask_tokens_go_where_the_mask_is(batch: int, budget: int, seed: int) -> None:
    masked = random_mask(batch, budget, seed)
    keep = visible_ids(masked, budget)
    tokens, mask_token = torch.randn(batch, 1 + LENGTH - budget, 4), torch.randn(1, 1, 4)
    full = insert_mask_tokens(tokens, mask_token, keep, LENGTH)
    assert torch.equal(full[:, 0], tokens[:, 0])
    for image in range(batch):
        visible = iter(tokens[image, 1:])
        for patch in range(LENGTH):
            expected = mask_token[0, 0] if masked[image, patch] else next(visible)
            assert torch.equal(full[image, 1 + patch], expected)


def test_shapes_and_norms() -> None:
    online, target = networks()
    images, masked = torch.randn(2, 3, 32, 32), random_mask(2, 12)
    output = online(images, masked, budget=12)
    assert output.prediction.shape == (2, LENGTH, 8 * 8 * 3)
    assert output.tokens.shape == (2, 1 + LENGTH - 12, 24)
    assert output.representation.shape == (2, 1 + LENGTH, 24)
    for feature in (output.feature, target(images)):
        assert feature.shape == (2, 8)
        torch.testing.assert_close(feature.norm(dim=1), torch.ones(2))


def test_branches_compute_what_the_paper_says() -> None:
    """Both branches written out again from their parts, in another way: masked tokens chosen with `where`."""
    online, target = networks()
    images, masked = torch.randn(2, 3, 32, 32), random_mask(2, 10, seed=3)
    output = online(images, masked, budget=10)
    tokens = online.encoder(images, visible_ids(masked, 10))

    def fill(values: Tensor) -> Tensor:
        spread = torch.zeros(2, LENGTH, 24)
        spread[~masked] = values[:, 1:].reshape(-1, 24)
        patches = torch.where(masked[:, :, None], online.mask_token, spread)
        return torch.cat([values[:, :1], patches], dim=1)

    identity, pixel = online.representation_decoder, online.pixel_decoder
    x = fill(identity.embed(tokens)) + identity.pos_embed
    x = identity.pred(identity.norm(identity.blocks[0](x)))
    torch.testing.assert_close(output.representation, x)
    feature = F.normalize(online.predictor(online.projector(x.mean(dim=1))), dim=1)
    torch.testing.assert_close(output.feature, feature)
    x = pixel.embed(fill(tokens)) + pixel.pos_embed
    torch.testing.assert_close(output.prediction, pixel.pred(pixel.norm(pixel.blocks[0](x)))[:, 1:])

    x = identity.embed(online.encoder(images)) + identity.pos_embed
    x = identity.pred(identity.norm(identity.blocks[0](x))).mean(dim=1)
    torch.testing.assert_close(target(images), F.normalize(online.projector(x), dim=1))


def test_only_visible_pixels_reach_the_online_network() -> None:
    online, _ = networks()
    images, masked = torch.randn(1, 3, 32, 32), random_mask(1, 6)
    hidden = masked.reshape(1, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    one = online(images, masked, budget=6)
    two = online(torch.where(hidden, torch.full_like(images, 9.0), images), masked, budget=6)
    assert torch.equal(one.prediction, two.prediction)
    assert torch.equal(one.feature, two.feature)


def test_images_of_a_batch_do_not_mix() -> None:
    online, _ = networks()
    images, masked = torch.randn(3, 3, 32, 32), random_mask(3, 9)
    together = online(images, masked, budget=9)
    alone = online(images[1:2], masked[1:2], budget=9)
    torch.testing.assert_close(together.prediction[1:2], alone.prediction)
    torch.testing.assert_close(together.feature[1:2], alone.feature)


def test_target_is_a_frozen_copy_without_gradient() -> None:
    online, target = build_networks(VIT, CONFIG)
    assert not any(parameter.requires_grad for parameter in target.parameters())
    assert all(parameter.requires_grad for parameter in online.parameters())
    assert not target(torch.randn(1, 3, 32, 32)).requires_grad
    state = online.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in target.state_dict().items())
    extra = {name.split(".")[0] for name in set(state) - set(target.state_dict())}
    assert extra == {"predictor", "pixel_decoder"}
    with torch.no_grad():
        online.mask_token.add_(1.0)
    assert not torch.equal(target.mask_token, online.mask_token)


def test_shared_tensors_are_paired_by_name() -> None:
    online, target = networks()
    for shared, count in ((shared_parameters, len(list(target.parameters()))), (shared_buffers, 2)):
        ours, theirs = shared(online, target)
        assert len(ours) == len(theirs) == count
        for one, two in zip(ours, theirs, strict=True):
            assert torch.equal(one, two)
            assert one is not two


def test_every_online_parameter_gets_a_gradient_from_both_branches() -> None:
    online, target = networks()
    images, masked = torch.randn(2, 3, 32, 32), random_mask(2, 12)
    output = online(images, masked, budget=12)
    (output.prediction.square().mean() + (output.feature * target(images)).sum()).backward()
    assert [name for name, p in online.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_branches_can_be_left_out() -> None:
    online, _ = networks()
    images, masked = torch.randn(1, 3, 32, 32), random_mask(1, 5)
    both = online(images, masked, budget=5)
    mim = online(images, masked, budget=5, instance=False)
    assert mim.feature is None
    assert mim.representation is None
    assert torch.equal(mim.prediction, both.prediction)
    identity = online(images, masked, budget=5, pixels=False)
    assert identity.prediction is None
    assert torch.equal(identity.feature, both.feature)


def test_budget_can_be_read_from_the_mask() -> None:
    online, _ = networks()
    images, masked = torch.randn(2, 3, 32, 32), random_mask(2, 7)
    assert torch.equal(online(images, masked).prediction, online(images, masked, budget=7).prediction)
    masked[0, masked[0].nonzero()[0]] = False
    with pytest.raises(MaskingError, match=r"\[6, 7\]"):
        online(images, masked)


@pytest.mark.parametrize("budget", [0, LENGTH, -1])
def test_a_mask_must_leave_something_and_hide_something(budget: int) -> None:
    online, _ = networks()
    with pytest.raises(MaskingError, match=str(budget)):
        online(torch.zeros(1, 3, 32, 32), torch.zeros(1, LENGTH, dtype=torch.bool), budget=budget)


def test_mask_of_another_shape_is_refused() -> None:
    online, _ = networks()
    with pytest.raises(MaskingError, match="16"):
        online(torch.zeros(1, 3, 32, 32), torch.zeros(1, 9, dtype=torch.bool), budget=3)


def test_reference_position_embedding_is_zero_and_inherited() -> None:
    config = PretrainNetConfig(
        RepresentationDecoderConfig(depth=1, heads=4, pos_embed="zeros"), CONFIG.pixel_decoder, CONFIG.projection
    )
    online, target = build_networks(VIT, config)
    assert not online.representation_decoder.pos_embed.any()
    assert not target.representation_decoder.pos_embed.any()
    paper, _ = build_networks(VIT, CONFIG)
    assert paper.representation_decoder.pos_embed.any()
    # What a checkpoint holds wins over how the network was built.
    paper.load_state_dict(online.state_dict())
    assert not paper.representation_decoder.pos_embed.any()


def test_bfloat16_autocast_gives_float32_features() -> None:
    online, target = networks()
    images, masked = torch.randn(2, 3, 32, 32), random_mask(2, 12)
    exact = online(images, masked, budget=12)
    with torch.autocast("cpu", torch.bfloat16):
        output, feature = online(images, masked, budget=12), target(images)
    assert output.feature.dtype == feature.dtype == torch.float32
    torch.testing.assert_close(output.feature, exact.feature, atol=0.05, rtol=0)


@pytest.mark.parametrize("name", list_models())
def test_config_files_build(name: str) -> None:
    values = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    with torch.device("meta"):
        online, target = build_networks(values)
    assert online.encoder.config == vit_config(name)
    assert len(target.encoder.blocks) == values["depth"]
    assert len(online.pixel_decoder.blocks) == values["pixel_decoder"]["depth"]
    assert online.representation_decoder.blocks[0].attn.num_heads == values["representation_decoder"]["heads"]
    assert online.projector[0].out_features == values["projection"]["hidden"]
    if name != "vit_tiny":
        assert PretrainNetConfig.from_mapping(values) == PretrainNetConfig()


@pytest.mark.parametrize(
    ("part", "values", "words"),
    [
        ("representation_decoder", {"pos_embed": "learned"}, ["learned", "sincos", "zeros"]),
        ("representation_decoder", {"heads": 5}, ["192", "5"]),
        ("representation_decoder", {"depth": 0}, ["representation_decoder.depth"]),
        ("pixel_decoder", {"dim": 100, "heads": 16}, ["100", "16"]),
        ("pixel_decoder", {"dim": 6, "heads": 3}, ["6", "divisible by 4"]),
        ("pixel_decoder", {"width": 64}, ["width", "dim"]),
        ("projection", {"out": -1}, ["projection.out"]),
    ],
)
def test_impossible_configs_are_named(part: str, values: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error, torch.device("meta"):
        build_networks({"name": "vit_tiny", "representation_decoder": {"heads": 6}, part: values})
    assert all(word in str(error.value) for word in words)
