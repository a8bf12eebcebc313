"""Processes, launchers and signals through the real command line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

TRAIN = [sys.executable, "-m", "fsvfm.train"]
SMALL = (
    "experiment=demo_pretrain", "model.image_size=64", "trainer.max_epochs=4", "trainer.log_every_n_steps=1",
    "trainer.precision=32-true", "callbacks.panels=null", "callbacks.periodic=null", "data.workers=0",
    "data.mean=[0.5,0.5,0.5]", "data.std=[0.25,0.25,0.25]",
)  # fmt: skip
DETECTOR = [word for word in SMALL if not word.startswith(("experiment", "callbacks"))]


class Place:
    """Where commands run, with a folder of prepared faces."""

    def __init__(self, data: Path, path: Path) -> None:
        self.path = path
        self.env = {**os.environ, "FSVFM_DATA": str(data), "FSVFM_RUNS": str(path), "OMP_NUM_THREADS": "1"}

    def start(self, *command: str) -> subprocess.Popen[str]:
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=self.path, env=self.env, **output)  # type: ignore[call-overload]

    def run(self, *command: str, status: int = 0) -> str:
        process = self.start(*command)
        told = process.communicate()[0]
        assert process.returncode == status, told
        return told

    def exported(self, name: str) -> dict[str, Tensor]:
        return load_file(self.path / name / "export" / "model.safetensors")

    def assert_same_course(self, a: str, b: str) -> None:
        """Loss and gradient norm of every step agree up to rounding."""
        tables = [pd.read_csv(self.path / name / "metrics.csv") for name in (a, b)]
        for column in ("train/loss_step", "train/grad_norm", "train/loss_epoch"):
            left, right = (table[["step", column]].dropna().reset_index(drop=True) for table in tables)
            pd.testing.assert_frame_equal(left, right, rtol=1e-3, atol=0)


@pytest.fixture
def place(prepared_dir: Path, tmp_path: Path) -> Place:
    return Place(prepared_dir.parent, tmp_path)


def program(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], atol: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol, msg=name)


def test_slurm_launcher_asks_for_what_the_trainer_needs(place: Place) -> None:
    """A dry run: what would be given to sbatch."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    programs, script = place.path / "bin", place.path / "job.sh"
    program(programs, "srun", "exit 1")
    program(programs, "sbatch", f'for last; do :; done; cp "$last" {script}; echo "only a dry run" >&2; exit 1')
    place.env["PATH"] = f"{programs}{os.pathsep}{place.env['PATH']}"
    overrides = ("experiment=pretrain_vitb", "seed=0,1,2", "trainer.num_nodes=2", "hydra.launcher.partition=gpu")
    told = place.run(*TRAIN, "-m", "hydra/launcher=slurm", *overrides, status=1)
    assert "only a dry run" in told
    lines = script.read_text().splitlines()
    for option in (
        "array=0-2%3", "nodes=2", "ntasks-per-node=4", "gpus-per-node=4", "partition=gpu", "signal=USR2@300",
        "time=1440", "requeue", "open-mode=append",
    ):  # fmt: skip
        assert f"#SBATCH --{option}" in lines
    assert lines[-1].startswith("srun ")


@pytest.mark.slow
@pytest.mark.parametrize("spread", [(), ("trainer=ddp", "trainer.devices=2"), ("trainer=fsdp", "trainer.devices=2")])
def test_a_signal_to_one_process_stops_all_and_the_run_continues(place: Place, spread: tuple[str, ...]) -> None:
    overrides = (*SMALL, "trainer.max_epochs=20", *spread, f"data.batch_size={4 // (2 if spread else 1)}")
    requeued = place.path / "requeued"
    program(place.path / "bin", "scontrol", f"echo $@ > {requeued}")
    place.env["PATH"] = f"{place.path / 'bin'}{os.pathsep}{place.env['PATH']}"
    place.run(*TRAIN, *overrides, "name=whole")
    process = place.start("env", "SLURM_JOB_ID=12", *TRAIN, *overrides, "name=parts")
    folder = place.path / "parts"
    while not (folder / "checkpoints" / "last.ckpt").is_file() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    told = process.communicate()[0]
    assert process.returncode == 75, told
    assert "SIGUSR1: stopped after step" in told
    assert requeued.read_text() == "requeue 12\n"
    before = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert before % 4, "in the middle of an epoch"
    assert f"at step {before}" in place.run(*TRAIN, *overrides, "name=parts")
    assert_close(place.exported("parts"), place.exported("whole"), atol=0)
    tables = [pd.read_csv(place.path / name / "metrics.csv") for name in ("whole", "parts")]
    whole, parts = (table[["step", "train/loss_step"]].dropna().reset_index(drop=True) for table in tables)
    pd.testing.assert_frame_equal(whole, parts, check_exact=True)


@pytest.mark.slow
def test_sharded_torchrun_and_another_number_of_devices(place: Place) -> None:
    # With pictures and a linear probe on the way: all processes must take part in them.
    watched = ("callbacks=pretrain_probe", "callbacks.probe.every_n_epochs=2", "callbacks.panels.every_n_epochs=2")
    two = (*[word for word in SMALL if "panels" not in word], *watched)
    two = (*two, "trainer.devices=2", "data.batch_size=2", "trainer.accumulate_grad_batches=2")
    place.run(*TRAIN, *two, "trainer=ddp", "name=ddp")
    place.run(*TRAIN, *two, "trainer=fsdp", "name=fsdp")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=2", "--standalone"]
    told = place.run(*torchrun, "-m", "fsvfm.train", *two, "name=torchrun")
    assert told.count("effective batch 8,") == 1
    assert_close(place.exported("torchrun"), place.exported("ddp"), atol=0)
    assert_close(place.exported("fsdp"), place.exported("ddp"), atol=2e-4)
    place.assert_same_course("fsdp", "ddp")
    # What the sharded run saved, on one device.
    (place.path / "fsdp" / "fit.done.json").unlink()
    refused = place.run(*TRAIN, *two, "name=fsdp", "trainer.devices=1", status=1)
    keep = "data.batch_size=2 trainer.accumulate_grad_batches=4"
    assert keep in refused
    told = place.run(*TRAIN, *two, "name=fsdp", "trainer.devices=1", *keep.split())
    assert "continuing" in told
    assert_close(place.exported("fsdp"), place.exported("ddp"), atol=2e-4)


@pytest.mark.slow
def test_sharded_detector_equals_the_copied_one(place: Place) -> None:
    two = ("experiment=demo_dfd", "run=[fit]", "model.init=null", *DETECTOR, "trainer.devices=2", "data.batch_size=4")
    for name in ("ddp", "fsdp"):
        place.run(*TRAIN, *two, f"trainer={name}", f"name={name}")
    place.assert_same_course("fsdp", "ddp")
    assert_close(place.exported("fsdp"), place.exported("ddp"), atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["demo_pretrain", "demo_dfd", "demo_dfd_adapter"])
def test_deterministic_runs_are_equal(place: Place, experiment: str) -> None:
    words = [f"experiment={experiment}", *(SMALL[1:] if experiment == "demo_pretrain" else DETECTOR)]
    words += ["run=[fit]", "model.init=null", "data.batch_size=4", "trainer.deterministic=true"]
    for name in ("a", "b"):
        place.run(*TRAIN, *words, f"name={name}")
    assert_close(place.exported("a"), place.exported("b"), atol=0)
