"""The agenda of a run: fit, export, test; finished steps are not done again, interrupted ones continue."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fsvfm import build
from fsvfm.cli import rank, say
from fsvfm.errors import ConfigError, MetricError

# Heavy packages are imported where they are used: saying that a run is finished, or what it lacks, takes a second.


def train(cfg: DictConfig) -> None:
    """Work through ``run``.

    Raises:
        ConfigError: a configuration that cannot run; all problems are told together.
    """
    if not all(_marker(cfg, step).is_file() for step in cfg.run) or cfg.resume != "auto":
        build.check(cfg)
    folder = build.run_folder(cfg)
    if rank() == 0:
        build.settle_folder(cfg)
    for step in cfg.run:
        marker = _marker(cfg, step)
        if marker.is_file() and cfg.resume == "auto":
            say(f"{step}: finished already in {folder} (resume=never starts over)")
            continue
        if rank() == 0:
            record(folder)
        started = time.monotonic()
        {"fit": fit, "test": test}[step](cfg, folder)
        if rank() == 0:
            _write_json(marker, {"finished": _now(), "seconds": round(time.monotonic() - started, 1)})


def _marker(cfg: DictConfig, step: str) -> Path:
    return Path(cfg.paths.run) / f"{step}.done.json"


def fit(cfg: DictConfig, folder: Path) -> None:
    """Train, then export the checkpoint that counts: the lowest validation loss, or the last one in pre-training."""
    import torch

    from fsvfm.callbacks.csv_log import MetricsFile

    data = build.build_data(cfg)
    task = build.build_task(cfg, data)
    trainer = build.build_trainer(cfg)
    resume = resume_path(cfg, folder)
    step = -1
    if resume is not None:
        saved = torch.load(resume, map_location="cpu", weights_only=True, mmap=True)
        require_same_model(resume, saved["hyper_parameters"]["model"], task.hparams["model"])
        step = int(saved["global_step"])
        say(f"continuing {resume} at step {step}")
    for logger in trainer.loggers:
        if isinstance(logger, MetricsFile):
            logger.keep_until(step)
    trainer.fit(task, datamodule=data, ckpt_path=resume, weights_only=True)
    if trainer.interrupted:
        raise KeyboardInterrupt
    if trainer.is_global_zero:
        export(folder / "checkpoints" / f"{task.exported}.ckpt", folder / "export", dataset=str(cfg.data.name))
    trainer.strategy.barrier("exported")
    calibrate(cfg, data, folder / "export")


def calibrate(cfg: DictConfig, data: Any, exported: Path) -> None:
    """Store temperature and thresholds, fitted on the validation faces, in a detector's export."""
    validation = getattr(data, "val", None)
    if validation is None or not cfg.calibration.fit:
        return
    from fsvfm import processes
    from fsvfm.evaluation import calibrate_export

    try:
        calibrate_export(
            exported,
            validation,
            source=f"validation faces of {cfg.data.name}",
            conformal_alpha=cfg.calibration.conformal_alpha,
            batch_size=cfg.evaluate.batch_size,
            workers=cfg.data.workers,
            group=processes.join(cfg.trainer),
        )
    except MetricError as error:
        say(f"the export has no calibration: {error}")


def test(cfg: DictConfig, folder: Path) -> None:
    """Score the exported checkpoint on the protocol's test sets, with every process of the run."""
    from fsvfm.evaluation import evaluate

    evaluate(cfg, {str(cfg.name): str(folder / "export")}, folder / "test")


test.__test__ = False  # type: ignore[attr-defined]  # not a pytest test


def evaluate_once(cfg: DictConfig) -> None:
    """Evaluate ``ckpt`` on the protocol, unless the same was done before.

    Raises:
        ConfigError: a checkpoint or test set that is not there.
    """
    chosen = build.checkpoints(cfg)
    build.require_testsets(cfg)
    out = Path(cfg.evaluate.out)
    record = {
        "settings": [OmegaConf.to_container(part, resolve=True) for part in (cfg.testsets, cfg.evaluate, cfg.protocol)]
        + [cfg.seed],
        "checkpoints": {label: [source, _digests(Path(source))] for label, source in chosen.items()},
        "manifests": {name: _digests(Path(test.manifest)) for name, test in cfg.testsets.items()},
    }
    marker = out / "evaluated.json"
    if cfg.resume == "auto" and marker.is_file() and json.loads(marker.read_text()) == record:
        say(f"evaluated already: {out / 'results.md'} (resume=never does it again)")
        return
    from fsvfm.evaluation import evaluate

    evaluate(cfg, chosen, out)
    if rank() == 0:
        _write_json(marker, record)


def _digests(path: Path) -> dict[str, str]:
    """SHA-256 of the files that a local checkpoint or prepared folder is read from."""
    files = [path] if path.is_file() else sorted([*path.glob("model.*"), *path.glob("manifest.*")])
    digests = {}
    for file in files:
        with file.open("rb") as content:
            digests[file.name] = hashlib.file_digest(content, "sha256").hexdigest()
    return digests


def export(checkpoint: Path, folder: Path, *, dataset: str) -> None:
    """Write the small export (safetensors + JSON) of a Lightning checkpoint, with the data it was trained on."""
    from fsvfm.checkpoint import load_checkpoint
    from fsvfm.exports import save_export

    loaded = load_checkpoint(checkpoint)
    meta = {**loaded.meta, "provenance": {**loaded.meta.get("provenance", {}), "dataset": dataset, "exported": _now()}}
    save_export(folder, loaded.state, meta)
    print(f"exported {checkpoint.name} to {folder}", flush=True)


def require_same_model(checkpoint: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise ConfigError where a checkpoint to resume from has another architecture than the run."""
    passing = ("init", "grad_checkpointing")
    changed = [key for key in sorted({*saved, *wanted}) if saved.get(key) != wanted.get(key) and key not in passing]
    if changed:
        listed = "\n".join(f"  model.{key}: {saved.get(key)!r} → {wanted.get(key)!r}" for key in changed)
        raise ConfigError(
            f"{checkpoint} cannot be resumed, its network is another one:\n{listed}\n"
            "Resume with the same model=…, or start from its weights in a new run with model.init=<export>"
        )


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
    import torch

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
