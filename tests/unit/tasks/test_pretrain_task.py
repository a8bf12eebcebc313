"""The pre-training task with its callbacks: EMA target, skipped non-finite steps, ablations, parallel processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from fsvfm import build
from fsvfm.callbacks.guards import NonFiniteGuard
from fsvfm.ema import EMATarget
from fsvfm.errors import ConfigError, TrainingStopped
from fsvfm.masking import Masker, Masks
from fsvfm.models.pretrain_net import shared_parameters
from fsvfm.schedule import ema_momentum
from fsvfm.tasks.pretrain import PretrainResult, PretrainTask

Compose = Callable[..., DictConfig]
SMALL = (
    "experiment=demo_pretrain",
    "model.image_size=64",
    "data.batch_size=4",
    "trainer.log_every_n_steps=1",
    "callbacks={}",
    "+trainer.enable_checkpointing=false",
    "+trainer.enable_progress_bar=false",
)


def task_of(cfg: DictConfig, **changes: Any) -> PretrainTask:
    values = OmegaConf.to_container(cfg.task, resolve=True)
    del values["_target_"]  # type: ignore[arg-type, union-attr]
    return PretrainTask(**{**values, "mean": [0.5] * 3, "std": [0.2] * 3, **changes})  # type: ignore[dict-item]


def config(compose_config: Compose, prepared_dir: Path, *overrides: str) -> DictConfig:
    return compose_config(
        "train", *SMALL, f"paths.data={prepared_dir.parent}", "~callbacks", "+callbacks={}", *overrides
    )


def batch_of(cfg: DictConfig, size: int = 4) -> dict[str, Any]:
    data = build.build_data(cfg)
    data.batch_size = size
    return next(iter(data.train_dataloader()))


def fit(cfg: DictConfig, task: PretrainTask, *callbacks: pl.Callback) -> pl.Trainer:
    trainer = build.create(cfg.trainer, callbacks=list(callbacks), logger=False)
    trainer.fit(task, datamodule=build.build_data(cfg))
    return trainer


class ReplayEMA(pl.Callback):
    """An independent EMA in plain Python, from the weights as they are after each micro-batch."""

    def __init__(self, accumulate: int, update: str) -> None:
        self.accumulate, self.update = accumulate, update
        self.copies: list[Tensor] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        online, _ = shared_parameters(pl_module.online, pl_module.target)
        self.copies = [p.detach().clone() for p in online]
        self.batches = 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.batches += 1
        total = int(trainer.num_training_batches) * trainer.max_epochs
        if self.update == "micro_batch":
            m = ema_momentum(self.batches - 1, base=0.9, final=1.0, iterations=total)
        elif self.batches % self.accumulate == 0:
            m = ema_momentum(
                self.batches // self.accumulate - 1, base=0.9, final=1.0, iterations=total // self.accumulate
            )
        else:
            return
        online, _ = shared_parameters(pl_module.online, pl_module.target)
        self.copies = [m * c + (1 - m) * p.detach() for c, p in zip(self.copies, online, strict=True)]


@pytest.mark.parametrize("update", ["micro_batch", "optimisation_step"])
def test_ema_target_follows_the_online_network(compose_config: Compose, prepared_dir: Path, update: str) -> None:
    cfg = config(
        compose_config,
        prepared_dir,
        "trainer.max_epochs=2",
        "trainer.accumulate_grad_batches=2",
        "optim.warmup_epochs=0",
    )
    task = task_of(cfg)
    replay = ReplayEMA(2, update)
    fit(cfg, task, EMATarget(0.9, 1.0, update), replay)
    _, target = shared_parameters(task.online, task.target)
    for copy, parameter in zip(replay.copies, target, strict=True):
        torch.testing.assert_close(parameter.detach(), copy, rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(a, b) for a, b in zip(*shared_parameters(task.online, task.target), strict=True))


def test_ema_refuses_nonsense() -> None:
    with pytest.raises(ConfigError, match="optimisation_step"):
        EMATarget(update="epoch")
    with pytest.raises(ConfigError, match="momentum"):
        EMATarget(base=1.5)


class Breaking(PretrainTask):
    """A task whose loss is NaN at chosen micro-batches."""

    bad: tuple[int, ...] = ()
    count = 0

    def compute(self, images: Tensor, grid: Tensor, *, generator: torch.Generator | None = None) -> PretrainResult:
        result = super().compute(images, grid, generator=generator)
        self.count += 1
        return result._replace(loss=result.loss * float("nan")) if self.count - 1 in self.bad else result


class Snapshots(pl.Callback):
    """Weights and optimiser state after every micro-batch."""

    def __init__(self) -> None:
        self.states: list[list[Tensor]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        optimizer = trainer.optimizers[0]
        tensors = [*pl_module.parameters(), *(t for s in optimizer.state.values() for t in s.values())]
        self.states.append([t.detach().clone() for t in tensors])


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_non_finite_step_changes_nothing(
    compose_config: Compose, prepared_dir: Path, tmp_path: Path, accumulate: int
) -> None:
    cfg = config(
        compose_config, prepared_dir, "trainer.max_epochs=2", f"trainer.accumulate_grad_batches={accumulate}",
        "optim.warmup_epochs=0", "trainer.gradient_clip_val=1.0",
    )  # fmt: skip
    task = task_of(cfg)
    broken = Breaking(**dict(task.hparams))
    broken.bad = (2,)  # in the second of two micro-batches' windows: its first half
    guard, snapshots = NonFiniteGuard(5, str(tmp_path)), Snapshots()
    fit(cfg, broken, EMATarget(0.9, 1.0, "optimisation_step"), guard, snapshots)
    step = snapshots.states
    if accumulate == 1:
        assert same(step[2], step[1])
        assert not same(step[3], step[2])
    else:
        assert same(step[3], step[1])
        assert not same(step[5], step[3])
    assert guard.state_dict() == {"total": 1, "streak": 0}
    assert all(torch.isfinite(p).all() for p in broken.parameters())


def test_too_many_non_finite_steps_stop_with_the_last_good_state(
    compose_config: Compose, prepared_dir: Path, tmp_path: Path
) -> None:
    cfg = config(compose_config, prepared_dir, "trainer.max_epochs=2", "optim.warmup_epochs=0")
    broken = Breaking(**dict(task_of(cfg).hparams))
    broken.bad = (1, 3, 4, 5, 6, 7)
    snapshots = Snapshots()
    with pytest.raises(TrainingStopped, match=r"3 steps in a row.*last_good\.ckpt"):
        fit(cfg, broken, EMATarget(0.9, 1.0), snapshots, NonFiniteGuard(3, str(tmp_path)))
    assert broken.count == 6
    saved = torch.load(tmp_path / "last_good.ckpt", weights_only=True)
    good = dict(zip((name for name, _ in broken.named_parameters()), snapshots.states[2], strict=False))
    assert all(torch.equal(saved["state_dict"][name], value) for name, value in good.items())


@pytest.mark.parametrize(
    ("weights", "trained", "frozen"),
    [
        ({"similarity": 0.0}, "pixel_decoder", ("representation_decoder", "projector", "predictor")),
        ({"reconstruction": 0.0, "region": 0.0}, "predictor", ("pixel_decoder",)),
    ],
)
def test_ablations_leave_parts_out(
    compose_config: Compose, prepared_dir: Path, weights: dict[str, float], trained: str, frozen: tuple[str, ...]
) -> None:
    cfg = config(compose_config, prepared_dir)
    task = task_of(cfg, loss={**OmegaConf.to_container(cfg.task.loss), **weights})  # type: ignore[dict-item]
    batch = batch_of(cfg)
    result = task.compute(batch["image"], batch["grid"], generator=torch.Generator().manual_seed(0))
    result.loss.backward()
    assert set(result.parts) == ({"similarity"} if "reconstruction" in weights else {"reconstruction", "region"})
    # Every parameter that asks for a gradient gets one (DDP waits for it), the others none.
    for name, parameter in task.online.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
    assert any(p.requires_grad for p in getattr(task.online, trained).parameters())
    assert not any(p.requires_grad for part in frozen for p in getattr(task.online, part).parameters())


@pytest.mark.parametrize("strategy", ["random", "fasking_i", "frp", "crfr_r", "crfr_p"])
@pytest.mark.parametrize("kind", ["simsiam", "byol", "infonce", "mocov3", "simclr"])
def test_every_strategy_with_every_similarity(
    compose_config: Compose, prepared_dir: Path, strategy: str, kind: str
) -> None:
    cfg = config(compose_config, prepared_dir, f"masking={strategy}", f"task.loss.kind={kind}")
    batch = batch_of(cfg)
    result = task_of(cfg).compute(batch["image"], batch["grid"], generator=torch.Generator().manual_seed(0))
    assert torch.isfinite(result.loss)
    assert ("region" in result.parts) == (strategy in ("crfr_r", "crfr_p"))


def test_unknown_similarity_is_named(compose_config: Compose, prepared_dir: Path) -> None:
    cfg = config(compose_config, prepared_dir, "task.loss.kind=cosine")
    with pytest.raises(ConfigError, match=r"cosine.*simsiam"):
        task_of(cfg)


class PixelMasker(Masker):
    """Masks that depend on the image's own grid only, so that a batch may be split at will."""

    def __call__(self, grid: Tensor, *, generator: torch.Generator | None = None) -> Masks:
        rows = [
            super(PixelMasker, self).__call__(row[None], generator=torch.Generator().manual_seed(int(row.long().sum())))
            for row in grid
        ]
        return Masks(torch.cat([m.masked for m in rows]), torch.cat([m.region for m in rows]))


class LossModule(nn.Module):
    def __init__(self, task: PretrainTask) -> None:
        super().__init__()
        self.task = task

    def forward(self, images: Tensor, grid: Tensor) -> Tensor:
        return self.task.compute(images, grid).loss


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    saved = torch.load(f"{folder}/inputs.pt", weights_only=True)
    task = PretrainTask(**saved["hparams"])
    task.masker = PixelMasker(strategy="frp")
    task.load_state_dict(saved["state"])
    parallel = nn.parallel.DistributedDataParallel(LossModule(task))
    half = slice(rank * 4, rank * 4 + 4)
    parallel(saved["image"][half], saved["grid"][half]).backward()
    torch.save({n: p.grad for n, p in task.online.named_parameters()}, f"{folder}/grads{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["simsiam", "infonce"])
def test_two_processes_have_the_gradients_of_the_joint_batch(
    compose_config: Compose, prepared_dir: Path, tmp_path: Path, kind: str
) -> None:
    cfg = config(compose_config, prepared_dir, f"task.loss.kind={kind}", "masking=frp")
    task, batch = task_of(cfg), batch_of(cfg, 8)
    task.masker = PixelMasker(strategy="frp")
    inputs = {"hparams": dict(task.hparams), "state": task.state_dict()}
    torch.save({**inputs, "image": batch["image"], "grid": batch["grid"]}, tmp_path / "inputs.pt")
    LossModule(task)(batch["image"], batch["grid"]).backward()
    torch.multiprocessing.spawn(_worker, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        grads = torch.load(tmp_path / f"grads{rank}.pt", weights_only=True)
        for name, parameter in task.online.named_parameters():
            torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_linear_probe_is_logged(compose_config: Compose, prepared_dir: Path) -> None:
    cfg = config(compose_config, prepared_dir, "trainer.max_epochs=2")
    probe = build.create(OmegaConf.create({
        "_target_": "fsvfm.callbacks.probe.LinearProbe", "manifest": str(prepared_dir), "every_n_epochs": 2,
    }))  # fmt: skip
    trainer = fit(cfg, task_of(cfg), probe)
    # The generated fakes have a blue centre: any features tell them apart.
    assert float(trainer.callback_metrics["probe/auc"]) > 0.9


class Seeds(pl.Callback):
    """The seed of the masks of every micro-batch."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(pl_module.generator(batch_idx).initial_seed())


def test_masks_differ_between_all_steps_of_all_epochs(compose_config: Compose, prepared_dir: Path) -> None:
    cfg = config(compose_config, prepared_dir, "trainer.max_epochs=2")
    seeds = Seeds()
    fit(cfg, task_of(cfg), seeds)
    assert len(seeds.seen) == len(set(seeds.seen)) == 8
