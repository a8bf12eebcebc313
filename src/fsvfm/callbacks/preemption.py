"""Leaving in time: a signal ends a run after the optimisation step under way, with a checkpoint that continues it."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from lightning_fabric.plugins.environments import LightningEnvironment

from fsvfm.cli import say
from fsvfm.errors import ConfigError, Preempted

#: Whoever sends one of these takes the machine away for good (scancel, Ctrl-C) or queues the job again by himself.
_FINAL = (signal.SIGTERM, signal.SIGINT)
#: Exit statuses: sysexits.h's "temporary failure, try again", and what shells give for Ctrl-C.
_TRY_AGAIN, _CTRL_C = 75, 130


class Preemption(pl.Callback):
    """One mechanism for SLURM, Kubernetes, spot machines and Ctrl-C: save ``last.ckpt``, then leave.

    The signal may reach any one of several processes. They tell each other once per optimisation step, on the host and
    in the background (an all-reduce of one number, read one step later), so that no step waits, and all stop after the
    same one. The checkpoint lies in the middle of an epoch; continued from it, a run equals an uninterrupted one. Where
    an epoch is about to end, it ends first, with its validation and checkpoints.

    This stands in for Lightning's own handling, which requeues on SLURM only, writes checkpoints of another name, and
    makes the host of every process wait for the device at each micro-batch to learn whether a signal came.

    Args:
        signals: their names. Those other than ``SIGTERM`` and ``SIGINT`` also queue a SLURM job again.
        folder: where ``last.ckpt`` goes.

    Raises:
        ConfigError: an unknown signal.
        Preempted: at the first micro-batch after the checkpoint; with the exit status 75, or 130 for ``SIGINT``.
    """

    def __init__(self, signals: list[str], folder: str) -> None:
        unknown = [name for name in signals if name not in signal.Signals.__members__]
        if unknown:
            raise ConfigError(f"callbacks.preemption.signals: there is no {', '.join(unknown)}; expected e.g. SIGUSR1")
        self.signals = [signal.Signals[name] for name in signals]
        self.checkpoint = Path(folder) / "last.ckpt"
        self._came = 0  # number of the signal that reached this process
        self._agreed = 0  # … and of the one that all know of
        self._step, self._saved = 0, False
        self._group: Any = None
        self._asked: tuple[Any, torch.Tensor] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take over the signals. Lightning's handlers are there by now; at its end it restores those before them."""
        if threading.current_thread() is threading.main_thread():
            for number in self.signals:
                signal.signal(number, self._note)
        self._step = trainer.global_step
        if trainer.world_size > 1:
            self._group = dist.new_group(backend="gloo")
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def _note(self, number: int, frame: Any) -> None:
        if self._came == number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: at once
        if not self._came:
            self._came = number
            os.write(sys.stderr.fileno(), b"\nstopping after this step, with a checkpoint\n")

    def _exchange(self) -> int:
        """The signal that any process knew of an optimisation step ago; tells the others what is known here now."""
        if self._group is None:
            return self._came
        if self._asked is not None:
            work, number = self._asked
            work.wait()
            self._agreed = self._agreed or int(number)
        number = torch.tensor(self._came)
        self._asked = dist.all_reduce(number, op=dist.ReduceOp.MAX, group=self._group, async_op=True), number
        return self._agreed

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimisation step: save, if it is the last one."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        self._agreed = self._exchange()
        steps = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        if self._agreed and not (trainer.is_last_batch and steps > 1):
            trainer.save_checkpoint(self.checkpoint, weights_only=False)  # also optimiser and position
            self._saved = True

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Leave, now that the saved step's metrics have been written as well."""
        if not self._saved:
            return
        if trainer.is_global_zero and self._agreed not in _FINAL:
            requeue()
        trainer.strategy.barrier("requeued")  # a process that ends earlier may take the others with it
        # Lightning kills everything when a process that it started itself ends with another status than 0.
        environment = getattr(trainer.strategy, "cluster_environment", None)
        started = isinstance(environment, LightningEnvironment) and not trainer.is_global_zero
        raise Preempted(
            f"{signal.Signals(self._agreed).name}: stopped after step {trainer.global_step}; the same command "
            f"continues from {self.checkpoint}",
            status=0 if started else _CTRL_C if self._agreed == signal.SIGINT else _TRY_AGAIN,
        )


def requeue() -> None:
    """Queue the SLURM job (or the task of an array) again that this process belongs to; outside SLURM do nothing."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
        problem = done.stderr.strip() if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    say(f"job {job} could not be queued again: {problem}" if problem else f"job {job} is queued again")
