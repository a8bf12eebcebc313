"""EMA target, clipping and skipping with sharded parameters (FSDP2): the same as with whole ones."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fsvfm.ema import ema_update, reshard
from fsvfm.models.pretrain_net import OnlineNetwork, TargetNetwork, build_networks, shared_parameters

MODEL = {
    "name": "tiny", "image_size": 32, "patch_size": 8, "dim": 32, "depth": 2, "heads": 2,
    "representation_decoder": {"depth": 1, "heads": 2}, "pixel_decoder": {"dim": 16, "depth": 1, "heads": 2},
    "projection": {"hidden": 32, "out": 16},
}  # fmt: skip


def _step(online: OnlineNetwork, target: TargetNetwork, images: Tensor, masked: Tensor) -> None:
    """One optimisation step and one EMA update, as the task and its callback do them."""
    # Not Adam: its first step is the sign of the gradient, which rounding decides where the gradient is nearly zero.
    optimizer = torch.optim.SGD(online.parameters(), lr=1.0)
    output = online(images, masked, budget=12)
    loss = output.prediction.square().mean() - (output.feature * target(images)).sum(-1).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(online.parameters(), 0.1)
    optimizer.step()
    reshard(online, target)
    ours, theirs = shared_parameters(online, target)
    ema_update(theirs, ours, torch.tensor(0.3))


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    online, target = build_networks(MODEL)
    for network in (online, target):
        for block in network.encoder.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(network, mesh=mesh)
    inputs = torch.load(f"{folder}/inputs.pt", weights_only=True)
    _step(online, target, inputs["images"], inputs["masked"])
    assert all(isinstance(p, DTensor) for p in target.parameters())
    full = {name: p.full_tensor() for name, p in target.named_parameters()}
    if rank == 0:
        torch.save(full, f"{folder}/target.pt")
    dist.destroy_process_group()


def test_sharded_ema_equals_plain(tmp_path: Path) -> None:
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    masked = torch.zeros(4, 16, dtype=torch.bool)
    masked[:, :12] = True
    torch.save({"images": images, "masked": masked}, tmp_path / "inputs.pt")
    torch.manual_seed(0)
    online, target = build_networks(MODEL)
    start = {name: p.detach().clone() for name, p in target.named_parameters()}
    _step(online, target, images, masked)
    torch.multiprocessing.spawn(_worker, (str(tmp_path),), nprocs=2)
    sharded = torch.load(tmp_path / "target.pt", weights_only=True)
    for name, parameter in target.named_parameters():
        torch.testing.assert_close(sharded[name], parameter.detach(), rtol=1e-5, atol=1e-6, msg=name)
    assert any(not torch.equal(start[name], parameter) for name, parameter in target.named_parameters())
