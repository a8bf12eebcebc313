"""How a training is spread over devices: ``ddp`` (every process holds all weights) and ``fsdp`` (each holds a share).

Lightning's own strategies, with what this library needs set.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping
from typing import Any

import torch
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map


def choose(trainer: Mapping[str, Any]) -> Any:
    """The ``strategy`` argument of a Lightning Trainer for the values of the ``trainer`` group.

    ``auto`` is DDP where there are several processes; ``fsdp`` is FSDP2. Other names are left to Lightning.
    """
    name, devices = trainer["strategy"], trainer["devices"]
    if not isinstance(devices, int) or devices < 1:
        devices = torch.cuda.device_count()
    if name == "ddp" or (name == "auto" and devices * trainer["num_nodes"] > 1):
        # Buffers (position embeddings, normalisation) are the same everywhere and never change: nothing to broadcast.
        return DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)
    return Sharded() if name == "fsdp" else name


class Sharded(ModelParallelStrategy):
    """FSDP2 over all processes: parameters, gradients and optimiser states in equal shares, on GPUs or processors.

    Lightning's ``FSDPStrategy`` (FSDP1) refuses processors and flattens parameters, on which the EMA target and the
    parameter groups could not be kept apart. The task says what is a unit of sharding (``configure_model``).

    Checkpoints are whole: tensor by tensor they are gathered into one file like that of any other run, which one or
    any number of processes continue, with FSDP or without, and which `fsvfm.export` reads. (PyTorch's sharded format
    describes itself by a pickle, and this library opens none.) The first process needs main memory for it: weights,
    target and two moments, about 16 bytes per trained parameter.
    """

    strategy_name = "fsdp"
    lightning_restore_optimizer = True  # a property of the class above
    # Before the optimisers are made, which asks for the training loader: the data must know by then where they stand.
    restore_checkpoint_after_setup = False

    def __init__(self) -> None:
        super().__init__(save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """All processes share the parameters; there is no tensor parallelism."""
        self._data_parallel_size, self._tensor_parallel_size = self.world_size, 1
        super().setup_environment()

    @contextlib.contextmanager
    def block_backward_sync(self) -> Generator[None]:
        """Gradients of all but an optimisation step's last micro-batch stay where they are, whole, until it."""
        roots = [module for module in self.lightning_module.children() if isinstance(module, FSDPModule)]  # type: ignore[union-attr]
        for root in roots:
            root.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            for root in roots:
                root.set_requires_gradient_sync(True)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole tensors, on the first process; a collective."""
        return self._gathered(self.lightning_module.state_dict())  # type: ignore[union-attr]

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """An optimiser's state as without sharding, on the first process; a collective."""
        return self._gathered(getattr(optimizer, "optimizer", optimizer).state_dict())

    def _gathered(self, state: dict[str, Any]) -> dict[str, Any]:
        def whole(value: Any) -> Any:
            value = value.full_tensor() if isinstance(value, DTensor) else value
            return (value.cpu() if isinstance(value, Tensor) else value) if self.is_global_zero else None

        found = tree_map(whole, state)
        return found if self.is_global_zero else {}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """The whole file, mapped into the memory of every process."""
        return torch.load(checkpoint_path, map_location="cpu", mmap=True, weights_only=True)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Keep this process's share of every tensor."""
        module = self.lightning_module
        shares = module.state_dict()  # type: ignore[union-attr]
        saved = {name: _share(value, shares.get(name)) for name, value in checkpoint["state_dict"].items()}
        module.load_state_dict(saved, strict=strict)  # type: ignore[union-attr]

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Keep this process's share of the moments."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state = {
                number: {key: _share(value, parameters[number]) for key, value in moments.items()}
                for number, moments in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})


def _share(whole: Any, like: Any) -> Any:
    """Of a tensor the share of this process, if another one of its shape is shared out; anything else as it is."""
    if not isinstance(like, DTensor) or not isinstance(whole, Tensor) or whole.shape != like.shape:
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)


def shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Share a network among the processes of a mesh, in place: every transformer block is a unit, the rest is one."""
    for module in network.modules():
        if isinstance(module, nn.ModuleList):
            for block in module:
                fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
