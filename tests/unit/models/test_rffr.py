"""RFFR: where blocks lie, what residuals are, which blocks are seen, and both modes against plain implementations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fsvfm.checkpoint import load_checkpoint
from fsvfm.errors import CheckpointError, ConfigError
from fsvfm.exports import save_export
from fsvfm.models import rffr
from fsvfm.models.detector import Detector, build_detector, cost
from fsvfm.models.pretrain_net import OnlineNetwork, PretrainNetConfig
from fsvfm.models.rffr import RFFR, block_patches, residual
from fsvfm.models.vit import ViTConfig, unpatchify

TUNE = {"name": "full", "drop_path": 0.0, "pool": "cls"}
WIDTH, PATCH = 32, 4


def values(grid: int = 8, **more: Any) -> dict[str, Any]:
    """A model table with 4×4-pixel patches; a grid of 8 has 2×2 blocks."""
    return {
        "name": "rffr_test", "family": "rffr", "image_size": PATCH * grid, "patch_size": PATCH, "mode": "paper",
        "block_keep": 0.25, "branch_init": None, "branch": {"dim": WIDTH, "depth": 2, "heads": 4},
        "generator": {"dim": WIDTH, "depth": 2, "heads": 2, "pixel_decoder": {"dim": 16, "depth": 1, "heads": 2}},
        **more,
    }  # fmt: skip


def make(grid: int = 8, **more: Any) -> Detector:
    """A detector whose random generator leaves [0, 1], so that residuals reach both ends of [−1, 1]."""
    torch.manual_seed(0)
    detector = build_detector(values(grid, **more), TUNE, ("real", "fake"))
    for name in ("cls_token", "pos_embed"):  # timm's start at nearly zero, where a wrong position would not show
        for branch in (detector.backbone.image_branch, detector.backbone.residual_branch):
            torch.nn.init.normal_(getattr(branch, name))
    return detector


def faces(grid: int = 8, count: int = 3) -> Tensor:
    return torch.rand(count, 3, PATCH * grid, PATCH * grid, generator=torch.Generator().manual_seed(1))


# --- geometry ---------------------------------------------------------------------------------------------------------


def test_sixteen_blocks_over_rows_and_columns_1_to_12() -> None:
    blocks = block_patches(14)
    assert blocks.shape == (16, 9)
    # Rows 1–3 and columns 1–3; then the next three columns; then the next three rows.
    assert blocks[0].tolist() == [15, 16, 17, 29, 30, 31, 43, 44, 45]
    assert blocks[1].tolist() == [18, 19, 20, 32, 33, 34, 46, 47, 48]
    assert blocks[4].tolist() == [57, 58, 59, 71, 72, 73, 85, 86, 87]
    assert blocks[15].tolist() == [150, 151, 152, 164, 165, 166, 178, 179, 180]
    assert len(blocks.unique()) == 144
    inner = {14 * row + column for row in range(1, 13) for column in range(1, 13)}
    assert set(blocks.flatten().tolist()) == inner


@pytest.mark.parametrize("grid", [2, 4, 13, 16])
def test_grids_without_room_for_blocks_are_refused(grid: int) -> None:
    with pytest.raises(ConfigError, match="14 in the paper"):
        block_patches(grid)


def test_residual_is_amplified_signed_and_clipped() -> None:
    image = torch.tensor([0.5, 0.5, 0.5, 0.0, 1.0])
    found = residual(torch.tensor([0.5, 0.6, 0.4, 0.9, -0.2]), image)
    torch.testing.assert_close(found, torch.tensor([0.0, 0.4, -0.4, 1.0, -1.0]))


# --- residuals --------------------------------------------------------------------------------------------------------


def plain_residual(network: RFFR, image: Tensor, chosen: list[int]) -> Tensor:
    """Block after block with the pre-training network itself: hide nine patches, take their pixels, nothing batched."""
    vit, per_side = network.generator.encoder.config, 2
    model = values()["generator"]
    online = OnlineNetwork(vit, PretrainNetConfig.from_mapping({"pixel_decoder": model["pixel_decoder"],
                                                                "representation_decoder": {"heads": 2}}))  # fmt: skip
    online.load_state_dict(network.generator.state_dict(), strict=False)
    found = torch.zeros_like(image)
    for number in chosen:
        top, left = 1 + 3 * (number // per_side), 1 + 3 * (number % per_side)
        masked = torch.zeros(1, vit.grid_size, vit.grid_size, dtype=torch.bool)
        masked[:, top : top + 3, left : left + 3] = True
        with torch.no_grad():
            output = online.eval()(image[None], masked.flatten(1), instance=False)
        pixels = unpatchify(output.prediction, PATCH)[0]
        rows, columns = slice(PATCH * top, PATCH * (top + 3)), slice(PATCH * left, PATCH * (left + 3))
        difference = 4 * (pixels[:, rows, columns] - image[:, rows, columns])
        found[:, rows, columns] = difference.clip(-1, 1)
    return found


@pytest.mark.parametrize("chosen", [[0, 1, 2, 3], [2], [1, 3]])
@pytest.mark.parametrize("size", [64, 5])
def test_residuals_equal_a_plain_loop(chosen: list[int], size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rffr, "_PASS", size)  # blocks of all images in one pass, or cut where they do not fit
    network, images = make().backbone, faces()
    found = residual(network.generator(images, torch.tensor(chosen)), images)
    expected = torch.stack([plain_residual(network, image, chosen) for image in images])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (expected.min(), expected.max()) == (-1, 1)
    assert expected.abs().lt(1).logical_and(expected.ne(0)).float().mean() > 0
    outside = torch.ones(8, 8, dtype=torch.bool)
    for number in chosen:
        outside[1 + 3 * (number // 2) :, :][:3, 1 + 3 * (number % 2) :][:, :3] = False
    pixels = outside.repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1)
    assert torch.all(found[..., pixels] == 0)
    assert pixels[:PATCH].all() and pixels[:, -PATCH:].all()  # noqa: PT018
    assert (found[..., ~pixels] != 0).float().mean() > 0.99


def test_the_hidden_block_does_not_tell_its_reconstruction() -> None:
    network, images = make().backbone, faces(count=1)
    changed = images.clone()
    changed[:, :, PATCH : 4 * PATCH, PATCH : 4 * PATCH] = 0.5
    first = torch.tensor([0])
    hidden = (..., slice(PATCH, 4 * PATCH), slice(PATCH, 4 * PATCH))
    assert torch.equal(network.generator(images, first)[hidden], network.generator(changed, first)[hidden])


# --- which blocks are seen --------------------------------------------------------------------------------------------


def test_blocks_are_drawn_with_a_quarter_and_all_if_none() -> None:
    network = make(grid=14).backbone.train()
    torch.manual_seed(3)
    draws = [network.choose_blocks().tolist() for _ in range(6000)]
    assert all(draw == sorted(set(draw)) and draw for draw in draws)
    full = sum(len(draw) == 16 for draw in draws) / len(draws)
    assert full == pytest.approx(0.75**16, abs=4 * (0.01 * 0.99 / 6000) ** 0.5)  # none drawn: 1.0 %
    share = torch.stack([torch.bincount(torch.tensor(draw), minlength=16) for draw in draws if len(draw) < 16])
    expected = 0.25 / (1 - 0.75**16)
    torch.testing.assert_close(share.float().mean(0), torch.full((16,), expected), rtol=0, atol=0.025)
    assert network.eval().choose_blocks().tolist() == list(range(16))


def test_the_whole_batch_sees_the_same_blocks() -> None:
    network, images = make().backbone.train(), faces()
    for seed in range(4):
        torch.manual_seed(seed)
        together = network.forward_features(images)
        for number, image in enumerate(images):
            torch.manual_seed(seed)
            alone = network.forward_features(image[None])
            torch.testing.assert_close(alone[0], together[number], rtol=1e-4, atol=1e-5)


def _draw(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    network = make(grid=14).backbone.train()
    torch.manual_seed(100 + rank)  # as the task does: every process has its own
    torch.save([network.choose_blocks() for _ in range(20)], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_all_processes_see_the_same_blocks(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_draw, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert [each.tolist() for each in first] == [each.tolist() for each in second]
    assert len({tuple(each.tolist()) for each in first}) > 15


def test_branches_see_the_chosen_patches_only(monkeypatch: pytest.MonkeyPatch) -> None:
    network, images = make().backbone, faces()
    monkeypatch.setattr(network, "choose_blocks", lambda: torch.tensor([1, 2]))
    tokens = network.forward_features(images)
    assert tokens.shape == (3, 1 + 18, 2 * WIDTH)
    changed = images.clone()
    changed[:, :, :PATCH] = 0.9  # the border, which no block has
    changed[:, :, PATCH : 4 * PATCH, PATCH : 4 * PATCH] = 0.1  # block 0
    found = network.forward_features(changed)
    torch.testing.assert_close(found[..., :WIDTH], tokens[..., :WIDTH], rtol=0, atol=1e-6)
    assert (found[..., WIDTH:] - tokens[..., WIDTH:]).abs().max() > 1e-3  # by the reconstruction, which sees the rest


# --- both modes -------------------------------------------------------------------------------------------------------


def plain_feature(network: RFFR, images: Tensor, chosen: list[int], mode: str) -> Tensor:
    """The method written down with explicit token positions: 0 is CLS, patch p is at p + 1."""
    patches = [int(p) for number in chosen for p in block_patches(8)[number]]
    found = torch.stack([plain_residual(network, image, chosen) for image in images])
    mean, std = (torch.tensor(v)[None, :, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    at = {
        "paper": ([0] + [p + 1 for p in patches], [0] + [p + 1 for p in patches]),
        "reference": ([p + 1 for p in patches], [p + 2 for p in patches]),
    }[mode]
    features = []
    branches = (network.image_branch, network.residual_branch)
    for vit, inputs, positions in zip(branches, ((images - mean) / std, found), at, strict=True):
        sequence = vit._pos_embed(vit.patch_embed(inputs))
        tokens = torch.stack([sequence[:, position] for position in positions], dim=1)
        for block in vit.blocks:
            tokens = block(tokens)
        features.append(vit.norm(tokens)[:, 0])
    return torch.cat(features, dim=1)


@pytest.mark.parametrize("mode", ["paper", "reference"])
def test_modes_equal_a_plain_implementation(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    detector, images = make(mode=mode).eval(), faces()
    network = detector.backbone
    with torch.no_grad():
        feature, tokens = detector.features(images)
        assert tokens.shape == (3, (mode == "paper") + 36, 2 * WIDTH)
        torch.testing.assert_close(feature, plain_feature(network, images, [0, 1, 2, 3], mode), rtol=1e-4, atol=1e-4)
        logits = feature @ detector.head.fc.weight.T + detector.head.fc.bias
        torch.testing.assert_close(detector(images).logits, logits)
        monkeypatch.setattr(network, "choose_blocks", lambda: torch.tensor([1, 3]))
        chosen, _ = detector.train().features(images)
        torch.testing.assert_close(chosen, plain_feature(network, images, [1, 3], mode), rtol=1e-4, atol=1e-4)


def test_all_block_patches_and_no_others_are_tested() -> None:
    network = make(grid=14).backbone.eval()
    assert network.forward_features(faces(14, 1)).shape == (1, 1 + 144, 2 * WIDTH)


@pytest.mark.parametrize("mode", ["paper", "reference"])
def test_what_trains_and_what_stays(mode: str) -> None:
    detector, images = make(mode=mode).train(), faces()
    assert not detector.backbone.generator.training
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    optimiser = torch.optim.Adam([p for p in detector.parameters() if p.requires_grad], lr=1e-2)
    torch.nn.functional.cross_entropy(detector(images).logits, torch.tensor([0, 1, 0])).backward()
    without = [name for name, p in detector.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []  # DistributedDataParallel would wait for them
    optimiser.step()
    same = {name for name, value in detector.state_dict().items() if torch.equal(value, before[name])}
    kept = {name for name in before if name.startswith("backbone.generator.")} | {"backbone.mean", "backbone.std"}
    if mode == "reference":
        kept |= {f"backbone.{branch}_branch.cls_token" for branch in ("image", "residual")}
    assert same == kept


def test_grad_checkpointing_changes_nothing() -> None:
    gradients = []
    for on in (False, True):
        detector = make(grad_checkpointing=on).train()
        torch.manual_seed(5)
        detector(faces()).logits[:, 1].sum().backward()
        gradients.append(detector.backbone.residual_branch.blocks[0].attn.qkv.weight.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"mode": "fast"}, "paper, reference"), ({"block_keep": 0}, "0.25 in the paper"), ({"grid": 9}, "grid of 2 \\+")],
)
def test_impossible_values_are_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make(**wrong)


def test_adapters_are_refused() -> None:
    with pytest.raises(ConfigError, match="choose full"):
        build_detector(values(), {"name": "adapter"}, ("real", "fake"))


# --- starting points and exports --------------------------------------------------------------------------------------


def write_generator(folder: Path, *, norm_pix: bool = False, mean: float = 0.0, kind: str = "pretrain") -> Path:
    vit = ViTConfig("vit_test", patch_size=PATCH, dim=WIDTH, depth=2, heads=2, image_size=32)
    decoders = {
        "pixel_decoder": {"dim": 16, "depth": 1, "heads": 2},
        "representation_decoder": {"depth": 1, "heads": 2},
    }
    torch.manual_seed(7)
    online = OnlineNetwork(vit, PretrainNetConfig.from_mapping({**decoders, "projection": {"hidden": 8, "out": 4}}))
    state = {f"online.{key}": tensor for key, tensor in online.state_dict().items()}
    if kind == "encoder":
        state = {f"encoder.{key}": tensor for key, tensor in online.encoder.state_dict().items()}
    model = {"name": "vit_test", "image_size": 32, "patch_size": PATCH, "dim": WIDTH, "depth": 2, "heads": 2}
    meta = {
        "kind": kind, "task": "pretrain", "model": {**model, **decoders}, "class_order": None, "mean": [mean] * 3,
        "std": [1.0] * 3, "provenance": {"hyper_parameters": {"loss": {"norm_pix": norm_pix}}},
    }  # fmt: skip
    return save_export(folder, state, meta)


def test_generator_and_branches_start_from_checkpoints(tmp_path: Path) -> None:
    source = write_generator(tmp_path / "pre")
    branch = {"dim": WIDTH, "depth": 2, "heads": 2}
    network = make(branch=branch, branch_init=str(source)).backbone
    checkpoint = load_checkpoint(source)
    told = network.initialise(checkpoint)
    assert "generator: used" in told and "both ViTs from" in told  # noqa: PT018
    for key, tensor in network.generator.state_dict().items():
        assert torch.equal(tensor, checkpoint.state[f"online.{key}"]), key
    for vit in (network.image_branch, network.residual_branch):
        for key, tensor in vit.state_dict().items():
            assert torch.equal(tensor, checkpoint.state[f"online.encoder.{key}"]), key
    assert "at random" in make().backbone.initialise(checkpoint)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"norm_pix": True}, "norm_pix=True"), ({"mean": 0.5}, "mean \\[0.5"), ({"kind": "encoder"}, "no generator")],
)
def test_other_pretraining_is_no_generator(wrong: dict[str, Any], words: str, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(write_generator(tmp_path / "pre", **wrong))
    network = make().backbone
    before = network.generator.mask_token.clone()
    with pytest.raises(CheckpointError, match=f"{words}.*experiment=rffr_pretrain"):
        network.initialise(checkpoint)
    assert torch.equal(network.generator.mask_token, before)


def test_a_whole_detector_is_taken_over(tmp_path: Path) -> None:
    source = make()
    meta = {
        "kind": "detector", "task": "forgery", "model": values(), "tune": TUNE, "class_order": ["real", "fake"],
        "mean": [0.0] * 3, "std": [1.0] * 3,
    }  # fmt: skip
    checkpoint = load_checkpoint(save_export(tmp_path / "detector", source.state_dict(), meta))
    torch.manual_seed(9)
    other = build_detector(values(), TUNE, ("real", "fake"))
    other.backbone.initialise(checkpoint)
    images = faces()
    with torch.no_grad():
        torch.testing.assert_close(other.eval().features(images)[0], source.eval().features(images)[0], rtol=0, atol=0)


def test_size_and_cost_at_the_papers_size() -> None:
    """docs/rffr.md tells them; counted from the architecture, multiplications and additions of products."""
    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf

    with initialize_config_module("fsvfm.configs", version_base="1.3"):
        cfg = compose("train", ["experiment=rffr", "paths.run=/run", "paths.runs=/runs", "name=test"])
    model: Any = OmegaConf.to_container(cfg.model, resolve=True)
    with torch.device("meta"):
        detector = build_detector(model, TUNE, ("real", "fake")).eval()
        measured = cost(detector, 224)
    vit, block = 85_798_656, 12 * 512**2 + 13 * 512
    decoder = 768 * 512 + 512 + 8 * block + 2 * 512 + 512 * 768 + 768
    # The generator's positions are buffers, and its mask token is a parameter.
    trained = 2 * vit + 2 * (1536 + 1)
    generator = vit - 197 * 768 + 768 + decoder
    assert (measured["trained"], measured["parameters"]) == (trained, trained + generator)

    def transformer(tokens: int, dim: int, depth: int) -> int:
        return depth * (24 * tokens * dim**2 + 4 * tokens**2 * dim)

    embedding = 2 * 196 * 768 * 768
    once = embedding + transformer(188, 768, 12)
    once += 2 * 197 * 768 * 512 + transformer(197, 512, 8) + 2 * 197 * 512 * 768
    expected = 16 * once + 2 * (embedding + transformer(145, 768, 12)) + 2 * 1536 * 2
    assert measured["gflops"] == pytest.approx(expected / 1e9, rel=0.001)
