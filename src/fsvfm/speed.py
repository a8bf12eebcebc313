"""The node ``speed`` of a training: how arithmetic is done, not what is computed. Results change by rounding only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Modes of ``torch.compile``. Those that record CUDA graphs are left out: they reuse one step's memory of results in
#: the next one, which the target's features, kept gradients (accumulation) and logged values do not survive.
COMPILE_MODES = ("default", "max-autotune-no-cudagraphs")
#: Float32 matrix products on a GPU: in float32, or in TF32. (PyTorch's "medium" would be bfloat16, on CPUs too.)
MATMUL_PRECISIONS = ("highest", "high")


def problems(cfg: Mapping[str, Any]) -> list[str]:
    """What is wrong with ``speed`` in a whole training configuration, in words."""
    speed, found = cfg["speed"], []
    if speed["compile"] is not None and speed["compile"] not in COMPILE_MODES:
        found.append(f"speed.compile={speed['compile']}: expected null, {' or '.join(COMPILE_MODES)}")
    elif speed["compile"] is not None and cfg["trainer"]["strategy"] == "fsdp":
        found.append("speed.compile together with trainer.strategy=fsdp is not supported; give speed.compile=null")
    if speed["matmul_precision"] not in MATMUL_PRECISIONS:
        found.append(f"speed.matmul_precision={speed['matmul_precision']}: expected {' or '.join(MATMUL_PRECISIONS)}")
    return found


def apply(cfg: Mapping[str, Any], task: Any) -> str | None:
    """Prepare a task and PyTorch as the node ``speed`` of a whole training configuration says.

    Returns:
        What the user should know, or None.
    """
    import torch

    speed, trainer = cfg["speed"], cfg["trainer"]
    torch.set_float32_matmul_precision(speed["matmul_precision"])
    on_cpu = trainer["accelerator"] == "cpu" or not torch.cuda.is_available()
    fused = speed["fused_attention"]
    bf16 = str(trainer["precision"]).startswith("bf16")
    choose_attention(task, fused=fused_is_faster("cpu" if on_cpu else "cuda", bf16) if fused is None else fused)
    if speed["compile"] is None:
        return None
    compile_networks(task, speed["compile"])
    return f"networks are compiled ({speed['compile']}): the first step of every batch size takes minutes"


def fused_is_faster(device: str, bf16: bool) -> bool:
    """Whether PyTorch's fused attention is the faster one in training.

    On CPUs its backward pass has no bfloat16 matrix products: written out, a block's attention is three times as fast.
    """
    return not (bf16 and device == "cpu")


def choose_attention(task: Any, *, fused: bool) -> None:
    """Let the attention layers of timm's blocks use one fused operation, or products and a softmax, in place."""
    for module in task.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused


def compile_networks(task: Any, mode: str) -> None:
    """Compile a task's networks in place; their state keys stay the same.

    Shapes are static: a training step has only one (the number of visible patches is constant), and every other one,
    such as that of validation, is compiled apart when it comes up.

    Args:
        task: a module whose children are the networks.
        mode: one of ``COMPILE_MODES``.
    """
    for network in task.children():
        if next(network.parameters(), None) is not None:
            network.compile(mode=mode, dynamic=False)
