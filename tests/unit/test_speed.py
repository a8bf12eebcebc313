"""Fast paths against plain ones: compiled and eager, masked patches and all, checkpointed and kept, both attentions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor

from fsvfm import build, losses, speed
from fsvfm.errors import ConfigError
from fsvfm.masking import COVERING
from fsvfm.models.detector import build_detector
from fsvfm.models.vit import vit_config
from fsvfm.tasks.pretrain import PretrainTask

Compose = Callable[..., DictConfig]
MODEL: dict[str, Any] = {
    "name": "small", "image_size": 32, "patch_size": 8, "dim": 24, "depth": 2, "heads": 3,
    "representation_decoder": {"depth": 1, "heads": 4}, "pixel_decoder": {"dim": 16, "depth": 2, "heads": 2},
    "projection": {"hidden": 32, "out": 8}, "grad_checkpointing": False,
}  # fmt: skip
OPTIM = {"optimizer": "adamw", "schedule": "constant"}
LOSS = {
    "reconstruction": 1.0, "region": 0.007, "similarity": 0.1, "kind": "simsiam", "options": {}, "norm_pix": True,
}  # fmt: skip


def pretrain_task(strategy: str = "crfr_p", **model: Any) -> PretrainTask:
    """A small task whose weights are random everywhere, the same at every call."""
    task = PretrainTask(
        model={**MODEL, **model},
        masking={"strategy": strategy, "ratio": 0.75, "draw": "image"},
        loss=dict(LOSS), optim=dict(OPTIM), mean=[0.5] * 3, std=[0.25] * 3,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return task


def batch(size: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return images, torch.randint(0, 256, (size, 16), dtype=torch.uint8, generator=generator)


def step(task: PretrainTask, *, bf16: bool = False, **options: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses and gradients of one step, always with the same masks."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        result = task.compute(*batch(), generator=torch.Generator().manual_seed(3), **options)
    result.loss.backward()
    parts = {"loss": result.loss.detach(), **{k: v.detach() for k, v in result.parts.items()}}
    return parts, {name: p.grad for name, p in task.online.named_parameters() if p.grad is not None}


def same(actual: Any, expected: Any, *, share: float = 1e-5) -> None:
    """Equal to a share of the largest value of each tensor."""
    for found, wanted in zip(actual, expected, strict=True):
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            tolerance = share * float(value.abs().max()) + 1e-7
            torch.testing.assert_close(
                found[name], value, rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
            )


@pytest.mark.parametrize("strategy", ["crfr_p", "frp"])
def test_predicting_masked_patches_only_changes_nothing_in_the_loss(strategy: str) -> None:
    hidden, everywhere = step(pretrain_task(strategy)), step(pretrain_task(strategy), whole=True)
    same(hidden, everywhere)

    # The same from the definition: all patches predicted and compared, then weighted by the masks.
    task = pretrain_task(strategy)
    pixels, grid = batch()
    images = task.normalise(pixels)
    masks = task.masker(grid, generator=torch.Generator().manual_seed(3))
    output = task.online(images, masks.masked)
    targets = losses.patch_targets(images, 8)
    parts = {
        "reconstruction": losses.reconstruction_loss(output.prediction, targets, masks.masked),
        "similarity": losses.simsiam(output.feature, task.target(images)),
    }
    if strategy in COVERING:
        parts["region"] = losses.reconstruction_loss(output.prediction, targets, masks.region)
    loss = sum((LOSS[name] * value for name, value in parts.items()), torch.zeros(()))
    loss.backward()
    plain = {"loss": loss.detach(), **{k: v.detach() for k, v in parts.items()}}
    same(hidden, (plain, {name: p.grad for name, p in task.online.named_parameters()}))


def test_a_whole_prediction_has_every_patch_and_the_short_one_the_masked_ones() -> None:
    task = pretrain_task()
    results = [
        task.compute(*batch(), generator=torch.Generator().manual_seed(3), whole=whole).output
        for whole in (True, False)
    ]
    assert [output.prediction.shape for output in results] == [(4, 16, 192), (4, 12, 192)]
    for image, ids in enumerate(results[1].hidden):
        torch.testing.assert_close(results[0].prediction[image, ids], results[1].prediction[image])


def test_checkpointed_is_plain() -> None:
    same(step(pretrain_task(grad_checkpointing=True)), step(pretrain_task()))


@pytest.mark.parametrize(("bf16", "share"), [(False, 1e-5), (True, 0.1)])
def test_both_attentions_agree(bf16: bool, share: float) -> None:
    fused, plain = pretrain_task(), pretrain_task()
    speed.choose_attention(fused, fused=True)
    speed.choose_attention(plain, fused=False)
    assert {m.fused_attn for m in plain.modules() if hasattr(m, "fused_attn")} == {False}
    same(step(plain, bf16=bf16), step(fused, bf16=bf16), share=share)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_is_eager(checkpointing: bool) -> None:
    eager, compiled = (pretrain_task(grad_checkpointing=checkpointing) for _ in range(2))
    speed.compile_networks(compiled, "default")
    assert compiled.state_dict().keys() == eager.state_dict().keys()
    same(step(compiled), step(eager), share=1e-4)


@pytest.mark.slow
def test_a_compiled_detector_is_the_eager_one() -> None:
    tune = {"name": "full", "drop_path": 0.0}
    config = vit_config("vit_tiny", image_size=32, depth=1)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    network = build_detector(config, tune, ["real", "fake"])
    expected = network(images).logits
    speed.compile_networks(torch.nn.ModuleList([network]), "default")
    torch.testing.assert_close(network(images).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def torch_settings() -> Any:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("overrides", "fused"),
    [
        ([], True),
        (["trainer.precision=bf16-mixed"], False),
        (["trainer.precision=bf16-mixed", "speed.fused_attention=true"], True),
        (["speed.fused_attention=false"], False),
    ],
)
def test_the_settings_arrive(compose_config: Compose, torch_settings: None, overrides: list[str], fused: bool) -> None:
    cfg = compose_config(
        "train", "experiment=demo_pretrain", "trainer.accelerator=cpu", "trainer.precision=32-true",
        "speed.matmul_precision=highest", *overrides,
    )  # fmt: skip
    task = pretrain_task()
    assert speed.apply(cfg, task) is None
    assert torch.get_float32_matmul_precision() == "highest"
    assert {m.fused_attn for m in task.modules() if hasattr(m, "fused_attn")} == {fused}
    note = speed.apply(compose_config("train", "experiment=demo_pretrain", "speed.compile=default"), task)
    assert note is not None
    assert "minutes" in note
    assert all(network._compiled_call_impl is not None for network in (task.online, task.target))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("speed.compile=reduce-overhead", "reduce-overhead: expected null, default or max-autotune-no-cudagraphs"),
        ("speed.matmul_precision=medium", "medium: expected highest or high"),
    ],
)
def test_impossible_settings_are_named(compose_config: Compose, prepared_dir: Path, override: str, words: str) -> None:
    cfg = compose_config("train", "experiment=demo_pretrain", f"data.manifests=[{prepared_dir}]", override)
    with pytest.raises(ConfigError, match=words):
        build.check(cfg)


def test_compiling_sharded_networks_is_refused(compose_config: Compose) -> None:
    cfg = compose_config("train", "experiment=demo_pretrain", "trainer=fsdp", "speed.compile=default")
    assert any("fsdp" in problem for problem in speed.problems(cfg))
