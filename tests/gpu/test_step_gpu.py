"""The training step on a CUDA device: it never makes the host wait, and what is fast computes what is plain."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from fsvfm import build, speed
from fsvfm.ema import EMATarget, ema_update
from fsvfm.models.pretrain_net import shared_parameters
from fsvfm.optim import build_adamw
from fsvfm.tasks.pretrain import PretrainTask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
Compose = Callable[..., DictConfig]


def pretrain_task(name: str = "vit_tiny", **model: Any) -> PretrainTask:
    """The papers' task at one of the sizes, the same random weights at every call."""
    group: Any = {
        key: OmegaConf.to_container(OmegaConf.load(CONFIGS / key / f"{option}.yaml"))
        for key, option in (("model", name), ("masking", "crfr_p"), ("optim", "pretrain"))
    }
    loss: Any = OmegaConf.to_container(OmegaConf.load(CONFIGS / "task" / "pretrain.yaml").loss)
    torch.manual_seed(0)
    task = PretrainTask(
        model={**group["model"], **model}, masking=group["masking"], optim=group["optim"],
        loss=loss, mean=[0.5] * 3, std=[0.25] * 3,
    )  # fmt: skip
    return task.cuda()


def batch(size: int, patches: int = 196) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (size, 3, 224, 224), dtype=torch.uint8, generator=generator)
    grid = torch.randint(0, 256, (size, patches), dtype=torch.uint8, generator=generator)
    return images.cuda(), grid.cuda()


def step(task: PretrainTask, size: int = 4, *, bf16: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients, always with the same masks."""
    images, grid = batch(size)
    with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        loss = task.compute(images, grid, generator=torch.Generator("cuda").manual_seed(2)).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in task.online.named_parameters() if p.grad is not None}


def same(actual: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]], share: float) -> None:
    """Losses and gradients equal, to a share of the norm of each gradient."""
    torch.testing.assert_close(actual[0], expected[0], rtol=share, atol=share)
    assert actual[1].keys() == expected[1].keys()
    largest = max(float(value.norm()) for value in expected[1].values())
    for name, value in expected[1].items():
        # Gradients that are nothing but rounding are compared on the scale of the largest one.
        allowed = share * max(float(value.norm()), 1e-3 * largest)
        assert float((actual[1][name] - value).norm()) <= allowed, name


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Raise where the host waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_whole_step_never_waits() -> None:
    task = pretrain_task()
    optimizer: Any = build_adamw(task.parameter_groups(), 1e-4)
    trained = [p for p in task.online.parameters() if p.requires_grad]
    online, target = shared_parameters(task.online, task.target)
    images, grid = batch(8)
    generator = torch.Generator("cuda").manual_seed(0)

    def whole() -> None:
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = task.compute(images, grid, generator=generator).loss
        loss.backward()
        taken = torch.isfinite(torch.nn.utils.clip_grad_norm_(trained, 1.0)).float() * torch.isfinite(loss.detach())
        optimizer.found_inf = 1.0 - taken
        optimizer.step()
        ema_update(target, online, 0.004 * taken)

    whole()  # creates the optimiser's state and the handles of libraries
    before = [p.detach().clone() for p in target]
    with no_waiting():
        whole()
        whole()
    assert any(not torch.equal(a, b) for a, b in zip(before, target, strict=True))


class WatchSteps(pl.Callback):
    """Forbids waiting in the middle of an epoch: from the end of the third micro-batch to that of the sixth."""

    seen = 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        if 2 < batch_idx <= 5:
            self.seen += 1
        if batch_idx == 5:
            torch.cuda.set_sync_debug_mode("default")


def test_training_never_waits_between_logged_steps(compose_config: Compose, prepared_dir: Path) -> None:
    cfg = compose_config(
        "train", "experiment=demo_pretrain", f"data.manifests=[{prepared_dir}]", "model.image_size=64",
        "data.batch_size=2", "trainer.accelerator=gpu", "trainer.precision=bf16-mixed", "trainer.max_epochs=1",
        "trainer.log_every_n_steps=1000", "~callbacks", "+callbacks={}",
        "+trainer.enable_checkpointing=false", "+trainer.enable_progress_bar=false",
    )  # fmt: skip
    data = build.build_data(cfg)
    task = build.build_task(cfg, data)
    watch = WatchSteps()
    try:
        build.create(cfg.trainer, callbacks=[EMATarget(), watch], logger=False).fit(task, datamodule=data)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert watch.seen == 3


def test_bf16_is_close_to_float32() -> None:
    (loss, _), (exact, _) = step(pretrain_task()), step(pretrain_task(), bf16=False)
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0.02)


def test_both_attentions_agree() -> None:
    plain = pretrain_task()
    speed.choose_attention(plain, fused=False)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        same(step(plain, bf16=False), step(pretrain_task(), bf16=False), 1e-3)
    finally:
        torch.set_float32_matmul_precision(before)


def test_checkpointed_is_plain() -> None:
    same(step(pretrain_task(grad_checkpointing=True)), step(pretrain_task()), 1e-2)


@pytest.mark.parametrize("bf16", [False, True])
def test_compiled_is_eager(bf16: bool) -> None:
    compiled, eager = pretrain_task(), pretrain_task()
    speed.compile_networks(compiled, "default")
    # Fused kernels round once where eager ones round several times.
    same(step(compiled, bf16=bf16), step(eager, bf16=bf16), 0.1 if bf16 else 1e-2)


def test_ema_on_the_device_is_that_on_the_host() -> None:
    generator = torch.Generator().manual_seed(0)
    target, online = ([torch.randn(7, 5, generator=generator) for _ in range(3)] for _ in range(2))
    moved, copies = [t.cuda() for t in target], [o.cuda() for o in online]
    weight = torch.tensor(0.25, device="cuda")
    ema_update(target, online, 0.25)
    with no_waiting():
        ema_update(moved, copies, weight)
    for found, expected in zip(moved, target, strict=True):
        torch.testing.assert_close(found.cpu(), expected)


def test_vit_large_with_checkpointing_fits_80_gb() -> None:
    if torch.cuda.mem_get_info()[1] < 80e9:
        pytest.skip("less than 80 GB of device memory")
    task = pretrain_task("vit_large", grad_checkpointing=True)
    optimizer = build_adamw(task.parameter_groups(), 1e-4)
    online, target = shared_parameters(task.online, task.target)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        optimizer.zero_grad()
        step(task, 256)
        optimizer.step()
        ema_update(target, online, torch.tensor(0.004, device="cuda"))
    assert torch.cuda.max_memory_allocated() < 80e9
