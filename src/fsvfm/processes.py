"""The processes of a command that scores: one per device, each with its share of the rows."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from omegaconf import DictConfig


class Processes(NamedTuple):
    """The place of this process among those that score together."""

    rank: int
    world: int
    device: torch.device

    def share(self, length: int) -> range:
        """Rows of this process: every ``world``-th, so that no row is padded or seen twice."""
        return range(self.rank, length, self.world)

    def gather(self, part: Any) -> list[Any]:
        """Parts of all processes, in the order of their ranks, on every one of them; a barrier, too."""
        if self.world == 1:
            return [part]
        parts: list[Any] = [None] * self.world
        dist.all_gather_object(parts, part)
        return parts


def join(trainer: DictConfig) -> Processes:
    """Take part in the command's processes, starting them where the configuration asks for several devices.

    A group that exists already (training has just ended, torchrun, SLURM) is used as it is. Fewer GPUs than asked for
    are no obstacle to scoring: those that are there are used, or the processor.

    Args:
        trainer: the ``trainer`` group: ``accelerator``, ``devices`` and ``num_nodes``.
    """
    gpus = torch.cuda.device_count() if trainer.accelerator != "cpu" else 0
    if dist.is_initialized():
        local = int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device("cuda", local) if gpus else torch.device("cpu")
        return Processes(dist.get_rank(), dist.get_world_size(), device)
    asked = trainer.devices if isinstance(trainer.devices, int) and trainer.devices > 0 else max(1, gpus)
    if trainer.accelerator != "cpu":
        asked = min(asked, max(1, gpus))
    if asked * trainer.num_nodes == 1 and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes(0, 1, torch.device("cuda" if gpus else "cpu"))
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator="gpu" if gpus else "cpu", devices=asked, num_nodes=trainer.num_nodes, strategy="ddp")
    fabric.launch()
    return Processes(fabric.global_rank, fabric.world_size, fabric.device)
