"""Leaving on a signal and going on: with the same weights, on other devices, sharded or not."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import Tensor

from fsvfm import build
from fsvfm.callbacks import preemption
from fsvfm.checkpoint import load_checkpoint
from fsvfm.errors import ConfigError, Preempted

Compose = Callable[..., DictConfig]
COMMON = ("model.image_size=64", "trainer.max_epochs=3", "trainer.log_every_n_steps=1", "trainer.accelerator=cpu")
COMMON = (*COMMON, "data.workers=0", "trainer.precision=32-true")
PRETRAIN = (
    "experiment=demo_pretrain",
    "callbacks.panels=null",
    "callbacks.periodic=null",
    *COMMON,
    "data.batch_size=4",
)
FORGERY = ("experiment=demo_dfd", "run=[fit]", "model.init=null", "augment=papers", "tune.drop_path=0.2", *COMMON)
FORGERY = (*FORGERY, "data.batch_size=4", "trainer.limit_train_batches=5")


class Send(pl.Callback):
    """A signal to this very process in the middle of a micro-batch."""

    def __init__(self, after: int, number: int) -> None:
        self.after, self.number = after, number

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.after -= 1
        if self.after == 0:
            os.kill(os.getpid(), self.number)


class Seen(pl.Callback):
    """The images of every optimisation step, by a number that tells them apart."""

    def __init__(self) -> None:
        self.steps: dict[int, list[int]] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        codes = batch["image"].long().flatten(1) @ torch.arange(batch["image"][0].numel())
        self.steps.setdefault(trainer.global_step, []).extend(codes.tolist())


def fit(cfg: DictConfig, *callbacks: pl.Callback, resume: Path | None = None) -> tuple[pl.Trainer, dict[str, Tensor]]:
    data = build.build_data(cfg)
    task = build.build_task(cfg, data)
    trainer = build.build_trainer(cfg)
    trainer.callbacks[:0] = callbacks  # type: ignore[attr-defined]
    trainer.fit(task, datamodule=data, ckpt_path=resume, weights_only=True)
    return trainer, {key: value.clone() for key, value in task.state_dict().items()}


@pytest.fixture
def configure(compose_config: Compose, prepared_dir: Path, tmp_path: Path) -> Compose:
    def configure(name: str, *overrides: str) -> DictConfig:
        (tmp_path / name).mkdir(exist_ok=True)
        cfg = compose_config("train", *overrides, f"paths.data={prepared_dir.parent}")
        cfg.paths.run = str(tmp_path / name)
        return cfg

    return configure


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    ("overrides", "after", "stopped", "number"),
    [
        (PRETRAIN, 6, 6, signal.SIGUSR1),  # in the second epoch
        ((*PRETRAIN, "trainer.accumulate_grad_batches=2"), 5, 3, signal.SIGTERM),  # in the first half of a step
        (PRETRAIN, 4, 5, signal.SIGINT),  # in an epoch's last step: the epoch ends first
        (FORGERY, 7, 7, signal.SIGUSR2),
    ],
)
def test_stopped_by_a_signal_and_continued_equals_uninterrupted(
    configure: Compose, overrides: tuple[str, ...], after: int, stopped: int, number: int
) -> None:
    before = signal.getsignal(number)
    _, expected = fit(configure("whole", *overrides))
    cfg = configure("parts", *overrides)
    with pytest.raises(Preempted, match=rf"stopped after step {stopped}; .*last\.ckpt") as stop:
        fit(cfg, Send(after, number))
    assert stop.value.status == (130 if number == signal.SIGINT else 75)
    assert signal.getsignal(number) == before
    last = Path(cfg.paths.run) / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == stopped
    _, resumed = fit(cfg, resume=last)
    assert equal(resumed, expected)


def test_the_steps_take_the_same_images_in_micro_batches_of_another_size(configure: Compose) -> None:
    whole, parts = Seen(), Seen()
    # 16 images: 4 steps in an epoch.
    fit(configure("whole", *PRETRAIN), whole)
    with pytest.raises(Preempted):
        fit(configure("parts", *PRETRAIN), Send(6, signal.SIGTERM), parts)
    del parts.steps[6]  # was fetched, not taken
    cfg = configure("parts", *PRETRAIN, "data.batch_size=2", "trainer.accumulate_grad_batches=2")
    trainer, _ = fit(cfg, parts, resume=Path(cfg.paths.run) / "checkpoints" / "last.ckpt")
    assert trainer.global_step == 12
    assert parts.steps == whole.steps
    # Now from the end of an epoch, and back to larger micro-batches.
    parts.steps = {step: images for step, images in parts.steps.items() if step < 12}
    cfg = configure("parts", *PRETRAIN, "trainer.max_epochs=4")
    trainer, _ = fit(cfg, parts, resume=Path(cfg.paths.run) / "checkpoints" / "last.ckpt")
    assert trainer.global_step == 16
    assert all(len(set(parts.steps[step])) == 4 for step in range(12, 16))
    everything = {image for images in whole.steps.values() for image in images}
    assert {image for step in range(12, 16) for image in parts.steps[step]} == everything


def test_a_continued_run_keeps_its_effective_batch(configure: Compose, capsys: Any) -> None:
    four = ("trainer.devices=4", "trainer.accumulate_grad_batches=2", "data.batch_size=8")  # 64
    build.settle_folder(configure("run", *PRETRAIN, *four))
    with pytest.raises(ConfigError, match=r"64 images in an optimisation step; now there would be 16") as error:
        build.settle_folder(configure("run", *PRETRAIN, *four, "trainer.devices=1"))
    keep = "data.batch_size=8 trainer.accumulate_grad_batches=8"
    assert keep in str(error.value)
    assert "resume=" in str(error.value)
    build.settle_folder(configure("run", *PRETRAIN, "trainer.devices=1", *keep.split()))
    assert "micro-batches of 8 images instead of 32" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"data\.batch_size=6|divides"):
        build.settle_folder(configure("run", *PRETRAIN, *four, "trainer.devices=3"))
    build.settle_folder(configure("run", *PRETRAIN, *four, "trainer.devices=3", "resume=never"))


def test_requeued_on_slurm_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    asked = tmp_path / "asked"
    program = tmp_path / "scontrol"
    program.write_text(f"#!/bin/sh\necho $@ >> {asked}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    preemption.requeue()
    assert not asked.exists()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    preemption.requeue()
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    preemption.requeue()
    assert asked.read_text() == "requeue 7\nrequeue 5_2\n"
    program.write_text("#!/bin/sh\necho not today >&2; exit 1\n")
    preemption.requeue()
    assert "could not be queued again: not today" in capsys.readouterr().out


def test_unknown_signal_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="SIGNOPE"):
        preemption.Preemption(["SIGTERM", "SIGNOPE"], str(tmp_path))


@pytest.fixture
def no_group(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Strategies of one process that start a process group all the same; nothing of it is left."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "NODE_RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.usefixtures("no_group")
@pytest.mark.parametrize("overrides", [PRETRAIN, (*FORGERY, "augment=light", "tune.drop_path=0")])
def test_sharded_training_and_its_checkpoints_equal_plain_ones(configure: Compose, overrides: tuple[str, ...]) -> None:
    overrides = (*overrides, "trainer.accumulate_grad_batches=2", "trainer.gradient_clip_val=1.0")
    # One process holds everything; that several compute the same is tested in test_sharded and, slowly, in the CLI.
    _, expected = fit(configure("plain", *overrides))
    cfg = configure("sharded", *overrides, "trainer=fsdp")
    with pytest.raises(Preempted):
        fit(cfg, Send(6, signal.SIGTERM))
    last = Path(cfg.paths.run) / "checkpoints" / "last.ckpt"
    saved = torch.load(last, weights_only=True)
    assert all(type(value) is Tensor for value in saved["state_dict"].values())
    _, continued = fit(configure("continued", *overrides), resume=last)  # without sharding
    assert continued.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(continued[name], value, rtol=1e-4, atol=1e-5)
    fit(cfg, resume=last)  # with
    for name, value in load_checkpoint(last).state.items():
        plain = expected.get(name, expected.get(f"detector.{name}"))
        torch.testing.assert_close(value, plain, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.usefixtures("no_group")
def test_gradients_are_exchanged_once_per_optimisation_step(configure: Compose) -> None:
    counts, broadcasts = {}, {}
    for accumulate in (4, 8):  # of 8 micro-batches
        words = ("data.batch_size=2", f"trainer.accumulate_grad_batches={accumulate}", "trainer.max_epochs=1")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            trainer, _ = fit(configure(f"every_{accumulate}", *PRETRAIN, *words, "trainer=ddp"))
        assert trainer.global_step == 8 // accumulate
        found = {event.key: event.count for event in profile.key_averages()}
        counts[trainer.global_step] = found["c10d::allreduce_"]
        broadcasts[trainer.global_step] = found.get("c10d::broadcast_", 0)
    assert max(broadcasts.values()) < 16, "weights at the start, decisions at the end; no buffers at 8 forward passes"
    per_step = counts[2] - counts[1]
    assert 1 <= per_step <= 3  # DDP's buckets: a small first one, then 25 MiB each
    assert counts[1] - per_step < 8  # what does not depend on the steps: means over an epoch
