"""The forgery task: learning rates as used, frozen bytes, class order, losses as stated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf

from fsvfm import build
from fsvfm.errors import ConfigError
from fsvfm.losses import real_anchor_contrastive
from fsvfm.schedule import warmup_cosine
from fsvfm.tasks.forgery import ForgeryTask

Compose = Callable[..., DictConfig]
SMALL = (
    "experiment=demo_dfd", "run=[fit]", "model.init=null", "model.image_size=64", "data.batch_size=4", "~callbacks",
    "+callbacks={}", "+trainer.enable_checkpointing=false", "+trainer.enable_progress_bar=false",
    "trainer.max_epochs=2", "trainer.limit_train_batches=4", "trainer.precision=32-true",
)  # fmt: skip


def build_task(compose_config: Compose, prepared_dir: Path, *overrides: str) -> tuple[DictConfig, ForgeryTask, Any]:
    cfg = compose_config("train", *SMALL, f"paths.data={prepared_dir.parent}", *overrides)
    data = build.build_data(cfg)
    return cfg, build.build_task(cfg, data), data  # type: ignore[return-value]


class Rates(pl.Callback):
    """Learning rates of every group at every optimisation step, as the optimiser used them."""

    def __init__(self) -> None:
        self.seen: list[list[tuple[float, float]]] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        self.seen.append([(group["lr"], group["lr_scale"]) for group in optimizer.param_groups])


def test_layer_decay_reaches_the_optimiser_at_every_step(compose_config: Compose, prepared_dir: Path) -> None:
    cfg, task, data = build_task(
        compose_config, prepared_dir, "optim.base_lr=0.01", "optim.layer_decay=0.5", "optim.warmup_epochs=1"
    )
    rates = Rates()
    build.create(cfg.trainer, callbacks=[rates], logger=False).fit(task, datamodule=data)
    peak = 0.01 * 4 / 256
    assert len(rates.seen) == 8
    for step, groups in enumerate(rates.seen):
        lr = warmup_cosine(step / 4, warmup_epochs=1, epochs=2, peak=peak, minimum=1e-6)
        for used, scale in groups:
            assert used == pytest.approx(lr * scale, rel=1e-6, abs=1e-15)
    scales = sorted({scale for _, scale in rates.seen[0]})
    assert scales == pytest.approx([0.5**k for k in range(5, -1, -1)])


@pytest.mark.parametrize("tune", ["adapter", "linear"])
def test_frozen_backbone_keeps_its_bytes(compose_config: Compose, prepared_dir: Path, tune: str) -> None:
    cfg, task, data = build_task(
        compose_config, prepared_dir, f"tune={tune}", "optim.base_lr=1", "optim.warmup_epochs=0"
    )
    before = {name: p.detach().clone() for name, p in task.detector.named_parameters()}
    build.create(cfg.trainer, callbacks=[], logger=False).fit(task, datamodule=data)
    for name, parameter in task.detector.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("backbone."), name


def test_class_order_turns_the_targets_and_not_the_score(compose_config: Compose, prepared_dir: Path) -> None:
    _, task, _ = build_task(compose_config, prepared_dir)
    swapped = ForgeryTask(**{**task.hparams, "class_order": ["fake", "real"]})
    swapped.load_state_dict(task.state_dict())
    for name in ("weight", "bias"):
        own = getattr(swapped.detector.head.fc, name)
        own.data = own.data.flip(0)
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 1, 0])
    with torch.no_grad():
        ours, theirs = (t.eval().compute(images, labels, augment=False) for t in (task, swapped))
    torch.testing.assert_close(ours.scores, theirs.scores)
    torch.testing.assert_close(ours.loss, theirs.loss)
    logits = task.detector(task.normalise(images)).logits
    torch.testing.assert_close(ours.scores, logits.softmax(-1)[:, 1])
    torch.testing.assert_close(ours.loss, F.cross_entropy(logits, labels))


def test_contrast_uses_labels_before_mixup(compose_config: Compose, prepared_dir: Path) -> None:
    _, task, _ = build_task(compose_config, prepared_dir, "tune=adapter", "tune.drop_path=0", "augment=papers")
    task.augment["random_erasing"] = 0.0
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 0, 0])
    projections = []
    task.detector.register_forward_hook(lambda _m, _i, output: projections.append(output.projection.detach()))
    result = task.train().compute(images, labels, augment=True)
    expected = real_anchor_contrastive(projections[0], labels, real_class=0, temperature=0.07, base_temperature=0.07)
    torch.testing.assert_close(result.parts["contrast"].detach(), expected)
    total = result.parts["classification"] + 0.01 * result.parts["contrast"]
    torch.testing.assert_close(result.loss, total)


def test_projection_that_no_loss_uses_is_not_trained(compose_config: Compose, prepared_dir: Path) -> None:
    """DistributedDataParallel waits for a gradient of every trained parameter."""
    _, task, _ = build_task(compose_config, prepared_dir, "tune=adapter", "tune.contrast_weight=0")
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    task.compute(images, torch.tensor([0, 1, 0, 1]), augment=True).loss.backward()
    without = [name for name, p in task.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_contrast_without_adapter_is_refused(compose_config: Compose, prepared_dir: Path) -> None:
    with pytest.raises(ConfigError, match="tune=adapter"):
        build_task(compose_config, prepared_dir, "tune.contrast_weight=0.1")


def test_pretrained_encoder_is_taken_over(compose_config: Compose, prepared_dir: Path, tmp_path: Path) -> None:
    from fsvfm.exports import save_export
    from fsvfm.tasks.pretrain import PretrainTask

    pre = compose_config("train", "experiment=demo_pretrain", "model.image_size=64")
    values: Any = OmegaConf.to_container(pre.task, resolve=True)
    del values["_target_"]
    source = PretrainTask(**values, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.4])
    state = {f"{net}.{k}": v for net in ("online", "target") for k, v in getattr(source, net).state_dict().items()}
    meta = {"kind": "pretrain", "task": "pretrain", "model": values["model"], "class_order": None}
    save_export(tmp_path / "pre", state, {**meta, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]})
    _, task, _ = build_task(compose_config, prepared_dir, f"model.init={tmp_path / 'pre'}")
    assert task.hparams["mean"] == [0.4, 0.5, 0.6]
    weights = dict(task.detector.backbone.named_parameters())
    for name, value in source.online.encoder.named_parameters():
        if not name.startswith("norm."):
            assert torch.equal(weights[name], value), name
    assert torch.equal(weights["pos_embed"], source.online.encoder.pos_embed)
