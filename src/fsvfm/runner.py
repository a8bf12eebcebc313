"""The agenda of a run: fit, export, test; finished steps are not done again, interrupted ones continue."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from fsvfm import build
from fsvfm.checkpoint import load_checkpoint
from fsvfm.errors import ConfigError
from fsvfm.evaluation import evaluate
from fsvfm.exports import save_export


def rank() -> int:
    """Number of this process among those of the run, before and after Lightning has set them up."""
    return int(getattr(rank_zero_only, "rank", 0))


def train(cfg: DictConfig) -> None:
    """Work through ``run``.

    Raises:
        ConfigError: a configuration that cannot run; all problems are told together.
    """
    build.check(cfg)
    folder = build.run_folder(cfg)
    if rank() == 0:
        build.settle_folder(cfg)
        record(folder)
    for step in cfg.run:
        marker = folder / f"{step}.done.json"
        if marker.is_file() and cfg.resume == "auto":
            print(f"{step}: finished already in {folder} (resume=never starts over)", flush=True)
            continue
        if step == "test" and rank():
            continue
        started = time.monotonic()
        {"fit": fit, "test": test}[step](cfg, folder)
        if rank() == 0:
            _write_json(marker, {"finished": _now(), "seconds": round(time.monotonic() - started, 1)})


def fit(cfg: DictConfig, folder: Path) -> None:
    """Train, then export the checkpoint that counts: the lowest validation loss, or the last one in pre-training."""
    from fsvfm.callbacks.csv_log import MetricsFile

    data = build.build_data(cfg)
    task = build.build_task(cfg, data)
    trainer = build.build_trainer(cfg)
    resume = resume_path(cfg, folder)
    step = -1
    if resume is not None:
        step = int(torch.load(resume, map_location="cpu", weights_only=True, mmap=True)["global_step"])
        print(f"continuing {resume} at step {step}", flush=True)
    for logger in trainer.loggers:
        if isinstance(logger, MetricsFile):
            logger.keep_until(step)
    trainer.fit(task, datamodule=data, ckpt_path=resume, weights_only=True)
    if trainer.interrupted:
        raise KeyboardInterrupt
    if trainer.is_global_zero:
        best = folder / "checkpoints" / "best.ckpt"
        last = folder / "checkpoints" / "last.ckpt"
        export(best if "ForgeryTask" in cfg.task._target_ else last, folder / "export")


def test(cfg: DictConfig, folder: Path) -> None:
    """Score the exported checkpoint on the protocol's test sets."""
    evaluate(cfg, chosen={str(cfg.name): str(folder / "export")}, out=folder / "test")


test.__test__ = False  # type: ignore[attr-defined]  # not a pytest test


def export(checkpoint: Path, folder: Path) -> None:
    """Write the small export (safetensors + JSON) of a Lightning checkpoint."""
    loaded = load_checkpoint(checkpoint)
    meta = {**loaded.meta, "provenance": {**loaded.meta.get("provenance", {}), "exported": _now()}}
    save_export(folder, loaded.state, meta)
    print(f"exported {checkpoint.name} to {folder}", flush=True)


def resume_path(cfg: DictConfig, folder: Path) -> Path | None:
    """The checkpoint to continue from, or None to start at the beginning.

    Raises:
        ConfigError: an explicit checkpoint that does not exist.
    """
    if cfg.resume == "never":
        return None
    last = folder / "checkpoints" / "last.ckpt"
    if cfg.resume == "auto":
        return last if last.is_file() else None
    path = Path(str(cfg.resume)).expanduser()
    if not path.is_file():
        raise ConfigError(f"resume={cfg.resume}: no such checkpoint; expected auto, never, or a .ckpt file of a run")
    return path


def record(folder: Path) -> None:
    """Keep what a reader needs to know about how a run was made: command, code, packages, machine."""
    environment: dict[str, Any] = {
        "time": _now(),
        "command": build.command_line(),
        "git": _git(),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "packages": dict(sorted((d.metadata["Name"], d.version) for d in distributions())),
    }
    _write_json(folder / "environment.json", environment)


def _git() -> dict[str, Any] | None:
    """Commit of the source tree and whether it was changed, or None outside a checkout."""
    here = Path(__file__).parent

    def ask(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "changed": bool(ask("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _write_json(path: Path, content: Any) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1))
    temporary.replace(path)
