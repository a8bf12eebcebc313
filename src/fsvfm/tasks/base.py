"""What every task shares: normalisation on the device, the optimisation recipe, and refusing non-finite steps.

A task is built from plain values only (``save_hyperparameters``), so a checkpoint describes itself.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fsvfm.data.sampling import derive_seed
from fsvfm.data.transforms import normalise
from fsvfm.errors import ConfigError
from fsvfm.optim import build_adamw, scale_lr
from fsvfm.schedule import warmup_cosine
from fsvfm.strategies import shard

#: What the ``optim`` group may choose. Adam takes the weight decay as part of the gradient, AdamW does not.
OPTIM_CHOICES = {"optimizer": ("adamw", "adam"), "schedule": ("warmup_cosine", "constant")}


class BaseTask(pl.LightningModule):
    """A LightningModule that normalises uint8 images, follows a per-step schedule and skips non-finite steps.

    Sub-classes provide :meth:`parameter_groups` and call :meth:`observe` with each micro-batch's loss.

    Args:
        mean: per-channel mean of the pre-training set, pixels in [0, 1].
        std: per-channel standard deviation of the same.
        optim: values of the ``optim`` group: ``optimizer`` (adamw or adam), ``base_lr`` (per 256 images if
            ``scale_lr``, else as it is), ``schedule`` (warmup_cosine or constant), ``betas``, ``weight_decay`` …
        seed: of everything random in a step.

    Raises:
        ConfigError: an optimiser or schedule that does not exist.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, *, mean: list[float], std: list[float], optim: dict[str, Any], seed: int) -> None:
        super().__init__()
        for key, known in OPTIM_CHOICES.items():
            if optim[key] not in known:
                raise ConfigError(f"optim.{key}={optim[key]!r} does not exist; choose one of {', '.join(known)}")
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.optim, self.seed = dict(optim), seed
        # Device flags, read on the host only at logging intervals: 1.0 while every loss since the last step was finite,
        # and whether the last optimisation step was taken.
        self.register_buffer("window_finite", torch.ones(()), persistent=False)
        self.register_buffer("step_taken", torch.ones(()), persistent=False)
        self.window_finite: Tensor
        self.step_taken: Tensor

    def normalise(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 pixels to float32, zero mean and unit variance over the pre-training set."""
        return normalise(images, self.mean, self.std)

    # --- randomness -------------------------------------------------------------------------------------------------

    def micro_step(self, batch_idx: int) -> int:
        """Number of this micro-batch since the start of training; the same after a resume."""
        return self.current_epoch * int(self.trainer.num_training_batches) + batch_idx

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed the global generators from (seed, rank, micro-step): resumed = uninterrupted, with nothing stored."""
        seed = derive_seed(self.seed, 1, self.global_rank, self.micro_step(batch_idx))
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002  (timm's mixup draws from the global generator)
        torch.manual_seed(seed)

    def generator(self, batch_idx: int) -> torch.Generator:
        """A generator on this device for one micro-batch; it differs between processes and steps."""
        seed = derive_seed(self.seed, 2, self.global_rank, self.micro_step(batch_idx))
        return torch.Generator(self.device).manual_seed(seed)

    # --- optimisation -----------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Share every network among the processes, where the strategy is FSDP."""
        if self.device_mesh is not None:
            for network in self.children():
                if next(network.parameters(), None) is not None:
                    shard(network, self.device_mesh["data_parallel"])

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameter groups with ``weight_decay`` and, optionally, ``lr_scale``."""
        raise NotImplementedError

    @property
    def effective_batch(self) -> int:
        """Images per optimisation step over all processes."""
        batch_size = int(self.trainer.datamodule.batch_size)  # type: ignore[attr-defined]
        return batch_size * self.trainer.world_size * self.trainer.accumulate_grad_batches

    def configure_optimizers(self) -> Any:
        """The optimiser and the per-step schedule that the ``optim`` group describes."""
        optim = self.optim
        peak = scale_lr(optim["base_lr"], self.effective_batch) if optim["scale_lr"] else float(optim["base_lr"])
        optimizer = build_adamw(
            self.parameter_groups(),
            peak,
            betas=tuple(optim["betas"]),
            decoupled=optim["optimizer"] == "adamw",
            # It reads `found_inf` on the device, so a non-finite step is skipped without waiting for the host.
            fused=True,
        )
        scheduler = LambdaLR(optimizer, self.schedule_factor(peak))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def schedule_factor(self, peak: float) -> Callable[[int], float]:
        """From the number of an optimisation step to its share of the peak learning rate.

        The warm-up cosine spans the whole training and is evaluated at every step's fractional epoch.
        """
        optim = self.optim
        if optim["schedule"] == "constant":
            return lambda step: 1.0
        total_steps = int(self.trainer.estimated_stepping_batches)
        self.trainer.fit_loop.setup_data()  # not done yet where max_steps alone ends the run
        steps_per_epoch = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
        epochs = total_steps / steps_per_epoch
        warmup_steps = optim.get("warmup_steps")  # runs made before there was this key do not have it
        warmup_epochs = optim["warmup_epochs"] if warmup_steps is None else warmup_steps / steps_per_epoch

        def factor(step: int) -> float:
            epoch = step / steps_per_epoch
            lr = warmup_cosine(
                epoch,
                warmup_epochs=min(warmup_epochs, epochs),
                epochs=epochs,
                peak=peak,
                minimum=min(optim["min_lr"], peak),
            )
            return lr / peak

        return factor

    # --- non-finite steps -------------------------------------------------------------------------------------------

    def observe(self, loss: Tensor) -> None:
        """Note whether a micro-batch's loss is finite; the processes tell each other once per optimisation step."""
        self.window_finite.mul_(torch.isfinite(loss.detach()).float())

    def log_loss(self, loss: Tensor, size: int) -> None:
        """``train/loss_step`` of this process's micro-batch, and ``train/loss_epoch`` over all processes."""
        self.log("train/loss_step", loss.detach(), batch_size=size)
        self.log("train/loss_epoch", loss.detach(), on_step=False, on_epoch=True, sync_dist=True, batch_size=size)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the global norm and mark the step as not to be taken if the norm or any loss in it is not finite.

        Nothing waits for the device: clipping is a multiplication, and the fused optimiser reads the mark itself.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        limit = gradient_clip_val or math.inf
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(self.window_finite, op=torch.distributed.ReduceOp.MIN)
        taken = torch.isfinite(norm).float() * self.window_finite
        cast(Any, optimizer).found_inf = 1.0 - taken
        self.step_taken.copy_(taken)
        self.window_finite.fill_(1.0)
        self.log("train/grad_norm", norm, on_step=True, on_epoch=False)
