"""Layer-wise learning-rate decay as it acts: on every parameter, at every step, under the scheduler, and on weights."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from omegaconf import DictConfig
from torch import Tensor

from fsvfm import build

Compose = Callable[..., DictConfig]
DEPTH, DECAY, BATCH, STEPS, EPOCHS, BASE = 4, 0.5, 4, 4, 3, 0.32
SMALL = (
    "experiment=demo_dfd", "run=[fit]", "model.init=null", "model.image_size=32", f"data.batch_size={BATCH}",
    "~callbacks", "+callbacks={}", "+trainer.enable_checkpointing=false", "+trainer.enable_progress_bar=false",
    f"trainer.max_epochs={EPOCHS}", f"trainer.limit_train_batches={STEPS}", "trainer.limit_val_batches=0",
    "trainer.precision=32-true", f"optim.base_lr={BASE}", f"optim.layer_decay={DECAY}", "optim.weight_decay=0.1",
)  # fmt: skip


def layer(name: str) -> int:
    """Layer of a parameter as the papers count: 0 embeddings, i + 1 block i, layers + 1 fc_norm and head."""
    if found := re.match(r"backbone\.blocks\.(\d+)\.", name):
        return int(found[1]) + 1
    return 0 if re.match(r"backbone\.(cls_token|pos_embed|patch_embed\.)", name) else DEPTH + 1


class Watch(pl.Callback):
    """The rate of each parameter before every step, as it stands in the optimiser, and how far the parameter went."""

    def __init__(self) -> None:
        self.rates: list[dict[str, float]] = []
        self.decays: list[dict[str, float]] = []
        self.moved: list[dict[str, float]] = []
        self._before: dict[str, Tensor] = {}

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        names = {id(parameter): name for name, parameter in pl_module.detector.named_parameters()}
        groups = [(names[id(p)], group) for group in optimizer.param_groups for p in group["params"]]
        self.rates.append({name: group["lr"] for name, group in groups})
        self.decays.append({name: group["weight_decay"] for name, group in groups})
        self._before = {name: p.detach().clone() for name, p in pl_module.detector.named_parameters()}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        parameters = pl_module.detector.named_parameters()
        self.moved.append({name: float((p.detach() - self._before[name]).abs().max()) for name, p in parameters})


def fit(compose_config: Compose, prepared_dir: Path, *overrides: str) -> Watch:
    cfg = compose_config("train", *SMALL, f"paths.data={prepared_dir.parent}", *overrides)
    data = build.build_data(cfg)
    task, watch = build.build_task(cfg, data), Watch()
    build.create(cfg.trainer, callbacks=[watch], logger=False).fit(task, datamodule=data)
    assert len(watch.rates) == STEPS * EPOCHS
    return watch


def test_every_parameter_has_the_rate_of_its_layer_at_every_step(compose_config: Compose, prepared_dir: Path) -> None:
    watch = fit(compose_config, prepared_dir, "optim.warmup_epochs=1")
    peak, minimum = BASE * BATCH / 256, 1e-6
    for step, rates in enumerate(watch.rates):
        epoch = step / STEPS
        cosine = minimum + (peak - minimum) / 2 * (1 + math.cos(math.pi * (epoch - 1) / (EPOCHS - 1)))
        schedule = peak * epoch if epoch < 1 else cosine
        for name, rate in rates.items():
            assert rate == pytest.approx(schedule * DECAY ** (DEPTH + 1 - layer(name)), rel=1e-6, abs=1e-15), name
    assert {layer(name) for name in watch.rates[-1]} == set(range(DEPTH + 2))
    # The scheduler did not flatten them: at the last step the head still learns 32 times as fast as the embeddings.
    last = watch.rates[-1]
    assert last["head.fc.weight"] / last["backbone.pos_embed"] == pytest.approx(DECAY ** -(DEPTH + 1), rel=1e-6)
    for name, decay in watch.decays[-1].items():
        plain = name.endswith(".bias") or "norm" in name or name in ("backbone.cls_token", "backbone.pos_embed")
        assert decay == (0.0 if plain else 0.1), name


def test_weights_move_by_the_rate_of_their_layer(compose_config: Compose, prepared_dir: Path) -> None:
    """Adam's first step moves a weight by its learning rate, whatever its gradient: the rate is seen in the weights."""
    watch = fit(compose_config, prepared_dir, "optim.warmup_epochs=0", "optim.weight_decay=0")
    peak = BASE * BATCH / 256
    for name, moved in watch.moved[0].items():
        assert moved == pytest.approx(peak * DECAY ** (DEPTH + 1 - layer(name)), rel=0.02), name


@pytest.mark.parametrize("tune", ["adapter", "linear", "lora"])
def test_a_frozen_backbone_has_one_rate(compose_config: Compose, prepared_dir: Path, tune: str) -> None:
    watch = fit(compose_config, prepared_dir, f"tune={tune}", "optim.warmup_epochs=1", "optim.layer_decay=null")
    for rates in watch.rates:
        assert len(set(rates.values())) == 1
        assert all(name.startswith("head.") or ".lora_" in name for name in rates)
    for name, moved in watch.moved[-2].items():
        assert (moved > 0) == (name in watch.rates[0]), name
