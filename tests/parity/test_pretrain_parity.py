"""Pre-training networks, losses, gradients, schedules and groups against numbers recorded from the published code.

Everything about the recorded network is read from its arrays, except the number of heads, which no array shows.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from fsvfm import losses
from fsvfm.ema import ema_update
from fsvfm.models.pretrain_net import (
    OnlineNetwork,
    OnlineOutput,
    PixelDecoderConfig,
    PretrainNetConfig,
    ProjectionConfig,
    RepresentationDecoderConfig,
    TargetNetwork,
    build_networks,
    shared_buffers,
    shared_parameters,
)
from fsvfm.models.vit import ViTConfig, create_backbone, sincos_pos_embed, vit_config
from fsvfm.optim import layer_decay_groups, weight_decay_groups
from fsvfm.schedule import ema_momentum, warmup_cosine

HEADS = 4  # of every recorded network (README of the recorded numbers)
RELATIVE, ABSOLUTE = 1e-5, 2e-6
SIZES = ("small", "base", "large")

RENAMED = [
    (r"^rep_decoder_(pos_embed|embed|blocks|norm|pred)", r"representation_decoder.\1"),
    (r"^decoder_(pos_embed|embed|blocks|norm|pred)", r"pixel_decoder.\1"),
    (r"^(projector|predictor)\.projection_head\.", r"\1."),
    (r"^(cls_token|pos_embed|patch_embed|blocks|norm)(?=\.|$)", r"encoder.\1"),
]


def own_name(published: str) -> str:
    """Translate a published parameter name of the pre-training networks."""
    for pattern, replacement in RENAMED:
        renamed, count = re.subn(pattern, replacement, published)
        if count:
            return renamed
    return published


def close(actual: Tensor | float, expected: Any, what: str, absolute: float = ABSOLUTE) -> None:
    torch.testing.assert_close(
        torch.as_tensor(actual, dtype=torch.float32),
        torch.as_tensor(np.asarray(expected), dtype=torch.float32),
        rtol=RELATIVE,
        atol=absolute,
        msg=lambda text: f"{what}: {text}",
    )


def depth_of(names: list[str], prefix: str) -> int:
    return 1 + max(int(name[len(prefix) :].split(".")[0]) for name in names if name.startswith(prefix))


class Recorded(NamedTuple):
    arrays: dict[str, np.ndarray]
    online: OnlineNetwork
    target: TargetNetwork

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Arrays below a prefix, as tensors under our names."""
        return {
            own_name(name.removeprefix(prefix)): torch.from_numpy(array)
            for name, array in self.arrays.items()
            if name.startswith(prefix)
        }

    def tensor(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name])


@pytest.fixture
def recorded(golden_dir: Path) -> Recorded:
    with np.load(golden_dir / "pretrain_network.npz") as file:
        arrays = {name: file[name] for name in file.files}
    names = [name.removeprefix("online/") for name in arrays if name.startswith("online/")]
    dim, _, patch_size, _ = arrays["online/patch_embed.proj.weight"].shape
    vit = ViTConfig(
        "recorded",
        patch_size=patch_size,
        dim=dim,
        depth=depth_of(names, "blocks."),
        heads=HEADS,
        image_size=arrays["image"].shape[-1],
    )
    hidden, out = arrays["online/projector.projection_head.3.weight"].shape[::-1]
    config = PretrainNetConfig(
        RepresentationDecoderConfig(depth=depth_of(names, "rep_decoder_blocks."), heads=HEADS),
        PixelDecoderConfig(
            dim=arrays["online/decoder_embed.weight"].shape[0],
            depth=depth_of(names, "decoder_blocks."),
            heads=HEADS,
        ),
        ProjectionConfig(hidden=hidden, out=out),
    )
    online, target = build_networks(vit, config)
    result = Recorded(arrays, online, target)
    online.load_state_dict(result.part("online/"))
    target.load_state_dict(result.part("target/"))
    return result


class Step(NamedTuple):
    output: OnlineOutput
    feature: Tensor
    parts: dict[str, Tensor]
    total: Tensor


def run_step(recorded: Recorded) -> Step:
    """One step with the published weights of the losses."""
    images, masked = recorded.tensor("image"), recorded.tensor("mask").bool()
    region = recorded.tensor("region_mask").bool()
    output = recorded.online(images, masked, budget=int(masked[0].sum()))
    feature = recorded.target(images)
    patch_size = recorded.online.encoder.config.patch_size
    parts = {}
    for kind, normalize in (("normpix", True), ("rawpix", False)):
        pixels = losses.patch_targets(images, patch_size, normalize)
        parts[f"loss_rec_masked_{kind}"] = losses.reconstruction_loss(output.prediction, pixels, masked)
        parts[f"loss_rec_region_{kind}"] = losses.reconstruction_loss(output.prediction, pixels, region)
    parts["loss_sim"] = losses.simsiam(output.feature, feature)
    total = parts["loss_rec_masked_normpix"] + 0.007 * parts["loss_rec_region_normpix"] + 0.1 * parts["loss_sim"]
    return Step(output, feature, parts, total)


def test_online_and_target_outputs(recorded: Recorded) -> None:
    step = run_step(recorded)
    close(step.output.tokens[:, 0].detach(), recorded.arrays["encoder_cls"], "encoder_cls")
    close(step.output.representation.detach(), recorded.arrays["rep_decoder_out"], "rep_decoder_out")
    close(step.output.prediction.detach(), recorded.arrays["pred"], "pred")
    close(step.output.feature.detach(), recorded.arrays["online_feature"], "online_feature")
    close(step.feature, recorded.arrays["target_feature"], "target_feature")


def test_losses_of_a_step(recorded: Recorded) -> None:
    step = run_step(recorded)
    for name, value in step.parts.items():
        close(value.detach(), recorded.arrays[name], name)
    close(step.total.detach(), recorded.arrays["loss_total"], "loss_total")
    covered = {name for name in recorded.arrays if name.startswith("loss_")}
    assert covered == {*step.parts, "loss_total"}


def test_every_gradient_and_its_norm(recorded: Recorded) -> None:
    run_step(recorded).total.backward()
    expected = recorded.part("grad/")
    actual = {name: parameter.grad for name, parameter in recorded.online.named_parameters()}
    assert set(actual) == set(expected)
    for name, gradient in expected.items():
        assert actual[name] is not None, name
        # Elements that cancel to almost nothing are compared on the scale of their tensor.
        close(actual[name], gradient, name, absolute=RELATIVE * float(gradient.abs().max()) + 1e-8)
    norm = torch.nn.utils.clip_grad_norm_(recorded.online.parameters(), 1.0)
    close(norm, recorded.arrays["grad_norm"], "grad_norm")
    assert all(parameter.grad is None for parameter in recorded.target.parameters())


@pytest.mark.parametrize("as_tensor", [False, True])
def test_target_after_one_ema_update(recorded: Recorded, as_tensor: bool) -> None:
    momentum = float(recorded.arrays["ema_momentum"])
    weight = torch.tensor(1.0 - momentum) if as_tensor else 1.0 - momentum
    for shared in (shared_parameters, shared_buffers):
        online, target = shared(recorded.online, recorded.target)
        ema_update(target, online, weight)
    state, expected = recorded.target.state_dict(), recorded.part("ema/")
    assert set(state) == set(expected)
    before = recorded.part("target/")
    moved = 0
    for name, value in expected.items():
        close(state[name], value, name, absolute=1e-7)
        # Weights are about a hundred times larger than the movement: compare that too.
        scale = float((value - before[name]).abs().max())
        close(state[name] - before[name], value - before[name], f"{name}, movement", absolute=1e-3 * scale + 1.5e-7)
        moved += scale > 0
    assert moved


def test_position_embeddings(recorded: Recorded) -> None:
    """The recorded embeddings carry noise, so that a network that ignores them is found out; ours must be under it."""
    for name in ("pos_embed", "decoder_pos_embed"):
        expected = torch.from_numpy(recorded.arrays[f"online/{name}"])
        ours = sincos_pos_embed(expected.shape[2], round((expected.shape[1] - 1) ** 0.5))
        rows_first = torch.cat(ours.chunk(2, dim=2)[::-1], dim=2)
        cosines_first = torch.cat([ours.chunk(4, dim=2)[i] for i in (1, 0, 3, 2)], dim=2)
        residual = float((expected - ours).std())
        for wrong in (rows_first, cosines_first, torch.zeros_like(ours)):
            assert residual < 0.5 * float((expected - wrong).std())


def test_instance_losses(golden_dir: Path) -> None:
    with np.load(golden_dir / "losses.npz") as file:
        arrays = {name: file[name] for name in file.files}
    x1, x2, labels = (torch.from_numpy(arrays.pop(name)) for name in ("x1", "x2", "labels"))

    def setting(name: str) -> float:
        return float(name.rsplit("_t", 1)[1])

    def supcon(name: str) -> Tensor:
        return losses.supcon(torch.cat([x1, x2]), torch.cat([labels, labels]), temperature=setting(name))

    def real_anchor(name: str) -> Tensor:
        real = int(re.search(r"pos(\d)", name).group(1))
        return losses.real_anchor_contrastive(x1, labels, real, setting(name))

    compute = {
        "simsiam": lambda name: losses.SIMILARITY["simsiam"](x1, x2),
        "byol": lambda name: losses.SIMILARITY["byol"](x1, x2),
        "infonce_all_t": lambda name: losses.SIMILARITY["infonce"](x1, x2, temperature=setting(name)),
        "infonce_positive_t": lambda name: losses.SIMILARITY["infonce"](
            x1, x2, temperature=setting(name), negatives="positive"
        ),
        "mocov3_t": lambda name: losses.SIMILARITY["mocov3"](x1, x2, temperature=setting(name)),
        "simclr_t": lambda name: losses.SIMILARITY["simclr"](x1, x2, temperature=setting(name)),
        "supcon_t": supcon,
        "real_anchor_pos": real_anchor,
        "real_anchor_no_real": lambda name: losses.real_anchor_contrastive(x1, labels, int(labels.max()) + 1),
    }
    for name, expected in arrays.items():
        matching = [function for prefix, function in compute.items() if name.startswith(prefix)]
        assert len(matching) == 1, f"no loss of ours for the recorded {name}"
        close(matching[0](name), expected, name, absolute=1e-9)


def test_schedules(golden_dir: Path) -> None:
    tables = json.loads((golden_dir / "tables.json").read_text())
    for table in (tables["pretrain_lr"], tables["finetune_lr"]):
        options = {
            "warmup_epochs": table["warmup_epochs"],
            "epochs": table["epochs"],
            "peak": table["lr"],
            "minimum": table["min_lr"],
        }
        for epoch, value in zip(table["at_epoch"], table["value"], strict=True):
            assert warmup_cosine(epoch, **options) == pytest.approx(value, rel=1e-9, abs=1e-18)
    table = tables["ema_momentum"]
    for iteration, value in zip(table["at_iteration"], table["value"], strict=True):
        momentum = ema_momentum(iteration, base=table["base"], final=table["final"], iterations=table["iterations"])
        assert momentum == pytest.approx(value, rel=0, abs=1e-14)


def test_weight_decay_groups_of_pretraining(golden_dir: Path) -> None:
    groups = json.loads((golden_dir / "tables.json").read_text())["pretrain_weight_decay_vit_s"]
    with torch.device("meta"):
        online, _ = build_networks(vit_config("vit_small"))
    names = {id(parameter): name for name, parameter in online.named_parameters()}
    actual = {
        (group["weight_decay"], names[id(parameter)])
        for group in weight_decay_groups(online, max(group["weight_decay"] for group in groups))
        for parameter in group["params"]
    }
    assert actual == {(group["weight_decay"], own_name(name)) for group in groups for name in group["params"]}


class Classifier(torch.nn.Module):
    """The parameter names of a detector: a backbone and a linear head."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.backbone = create_backbone(config)
        self.head = torch.nn.ModuleDict({"fc": torch.nn.Linear(config.dim, 2)})


def test_layer_decay_groups_of_finetuning(golden_dir: Path) -> None:
    table = json.loads((golden_dir / "tables.json").read_text())["layer_decay_vit_s"]
    with torch.device("meta"):
        model = Classifier(vit_config("vit_small"))
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def detector_name(published: str) -> str:
        return published.replace("head.", "head.fc.") if published.startswith("head.") else f"backbone.{published}"

    groups = layer_decay_groups(model, table["weight_decay"], table["layer_decay"])
    actual = {
        names[id(parameter)]: (group["weight_decay"], pytest.approx(group["lr_scale"], rel=1e-12))
        for group in groups
        for parameter in group["params"]
    }
    assert actual == {
        detector_name(name): (group["weight_decay"], group["lr_scale"])
        for group in table["groups"]
        for name in group["params"]
    }
    assert len(groups) == len(table["groups"])


@pytest.mark.parametrize("size", SIZES)
def test_layouts_of_released_networks(golden_dir: Path, size: str) -> None:
    layouts = json.loads((golden_dir / "checkpoint_layouts.json").read_text())
    config = vit_config(f"vit_{size}")
    with torch.device("meta"):
        online, target = build_networks(config)
        backbone = create_backbone(config)
    for network, kind in ((online, "online"), (target, "target")):
        shapes = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
        assert shapes == {own_name(name): shape for name, shape in layouts[f"pretrain_{kind}_{size}"].items()}
    finetuned = {name: shape for name, shape in layouts[f"finetuned_{size}"].items() if not name.startswith("head.")}
    assert {name: list(tensor.shape) for name, tensor in backbone.state_dict().items()} == finetuned


def test_backbone_features(golden_dir: Path) -> None:
    with np.load(golden_dir / "downstream_networks.npz") as file:
        arrays = {name: file[name] for name in file.files}
    state = {name.removeprefix("vit/"): torch.from_numpy(a) for name, a in arrays.items() if name.startswith("vit/")}
    dim, _, patch_size, _ = state["patch_embed.proj.weight"].shape
    image = torch.from_numpy(arrays["image"])
    config = ViTConfig("recorded", patch_size, dim, depth_of(list(state), "blocks."), HEADS, image.shape[-1])
    backbone = create_backbone(config, drop_path=0.1).eval()
    backbone.load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith("head.")})
    with torch.no_grad():
        features = backbone(image)
    close(features, arrays["vit_features"], "vit_features")
    close(
        torch.nn.functional.linear(features, state["head.weight"], state["head.bias"]), arrays["vit_logits"], "logits"
    )
