"""Exponential moving average of the online network: the target of FS-VFM pre-training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from fsvfm.errors import ConfigError
from fsvfm.models.pretrain_net import shared_parameters
from fsvfm.schedule import ema_momentum
from fsvfm.tasks.pretrain import PretrainTask


@torch.no_grad()
def ema_update(target: Iterable[Tensor], online: Iterable[Tensor], weight: float | Tensor) -> None:
    """Move the target towards the online network, in place: target += weight · (online − target).

    Args:
        target: tensors to update, float.
        online: tensors of the same shapes, dtypes and order.
        weight: 1 − momentum, in [0, 1]; a float, or a tensor of no dimensions on the same device. A tensor lets
            the device decide: weight 0 (a step that must not count) leaves the target as it is, and nothing waits.
            The online tensors themselves must be finite: 0 times NaN is NaN.

    Raises:
        ValueError: the two sequences differ in length.
    """
    targets, onlines = list(target), list(online)
    if len(targets) != len(onlines):
        raise ValueError(f"EMA over {len(targets)} target and {len(onlines)} online tensors; expected as many of each.")
    if not targets:
        return
    if not isinstance(weight, Tensor) or weight.device.type == "cpu":
        torch._foreach_lerp_(targets, onlines, float(weight))
        return
    # A scalar tensor given to lerp would be read back from the device; multiplication takes it where it is.
    step = torch._foreach_sub(onlines, targets)
    torch._foreach_mul_(step, weight)
    torch._foreach_add_(targets, step)


def reshard(*networks: nn.Module) -> None:
    """Give up the gathered copies that FSDP keeps of a root module's parameters after a forward pass."""
    for network in networks:
        if isinstance(network, FSDPModule):
            network.reshard()


class EMATarget(pl.Callback):
    """Moves the target network of a :class:`PretrainTask` after each micro-batch or each optimisation step.

    The momentum follows a cosine from ``base`` to ``final`` over all updates of the run. All it needs is a function of
    the trainer's progress, so there is no state to save: the target itself lies in the task's checkpoint. Sharded
    parameters (FSDP) are updated shard by shard; processes that hold copies (DDP) compute the same update.

    Args:
        base: momentum of the first update.
        final: momentum approached at the end.
        update: ``micro_batch`` (the published code: also between optimisation steps) or ``optimisation_step``.

    Raises:
        ConfigError: another ``update``, or a momentum outside [0, 1].
    """

    def __init__(self, base: float = 0.996, final: float = 1.0, update: str = "micro_batch") -> None:
        if update not in ("micro_batch", "optimisation_step"):
            raise ConfigError(f"callbacks.ema.update={update!r}; expected micro_batch or optimisation_step")
        if not (0 <= base <= 1 and 0 <= final <= 1):
            raise ConfigError(f"callbacks.ema: momentum from {base} to {final}; expected values in [0, 1]")
        self.base, self.final, self.update = base, final, update
        self._stepped = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember where a resumed run stands."""
        self._stepped = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One update, of weight zero after an optimisation step that was not taken."""
        task = cast(PretrainTask, pl_module)
        stepped = trainer.global_step != self._stepped
        self._stepped = trainer.global_step
        if not task.discriminates:
            return
        if self.update == "optimisation_step":
            if not stepped:
                return
            iteration, iterations = trainer.global_step - 1, int(trainer.estimated_stepping_batches)
        else:
            iteration = task.micro_step(batch_idx)
            iterations = int(trainer.num_training_batches) * (trainer.max_epochs or 1)
        momentum = ema_momentum(iteration, base=self.base, final=self.final, iterations=iterations)
        # Between optimisation steps the online network stands still, whatever a loss was: the target moves towards it.
        weight = (1 - momentum) * task.step_taken if stepped else 1 - momentum
        reshard(task.online, task.target)
        online, target = shared_parameters(task.online, task.target)
        ema_update(target, online, weight)
        # As a tensor of the host: a bare number would be copied to the device, and the host would wait for that.
        task.log("train/ema_momentum", torch.tensor(momentum), batch_size=1)
