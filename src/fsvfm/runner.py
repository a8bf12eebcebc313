"""The agenda of a run: fit, fine-tune, test; finished steps are not done again, interrupted ones continue.

``run: [fit, finetune, evaluate]`` is a point of a pre-training sweep: the encoder is trained in ``<run>``, a detector
made of it, by another experiment, in ``<run>/finetune``, and its scores on the protocol go to ``<run>/evaluation``.
"""

from __future__ import annotations

import contextlib
import csv
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from fsvfm import build, provenance
from fsvfm.cli import launched, rank, say, sweeping
from fsvfm.errors import ConfigError, MetricError, Preempted
from fsvfm.provenance import digests, now, write_json

# Heavy packages are imported where they are used: saying that a run is finished, or what it lacks, takes a second.


#: Written into a run's folder when it fails, removed when it succeeds: the step and the reason, for reports.
FAILED = "failed.json"


def train(cfg: DictConfig) -> float | None:
    """Work through ``run``.

    Returns:
        ``objective`` of the last training, which a search wants to know; None where nothing of that name was measured.

    Raises:
        ConfigError: a configuration that cannot run; all problems are told together.
    """
    folder, step = build.run_folder(cfg), "start"
    try:
        detector = detector_config(cfg, folder) if "finetune" in cfg.run else None
        if not all(_marker(cfg, name).is_file() for name in cfg.run) or cfg.resume != "auto":
            build.check(cfg, detector)
        if rank() == 0:
            build.settle_folder(cfg)
        for step in cfg.run:
            marker = _marker(cfg, step)
            if marker.is_file() and cfg.resume == "auto":
                say(f"{step}: finished already in {folder} (resume=never starts over)")
                if step == "finetune" and detector is not None:
                    train(detector)  # its folder knows with which settings
                continue
            if rank() == 0:
                provenance.record(cfg, folder)
            started = time.monotonic()
            if step == "finetune" and detector is not None:
                train(detector)
            else:
                {"fit": fit, "test": test, "evaluate": evaluate_last}[step](cfg, folder)
            if rank() == 0:
                write_json(marker, {"finished": now(), "seconds": round(time.monotonic() - started, 1)})
    except Preempted:
        raise
    except Exception as error:
        if rank() == 0:
            _note_failure(cfg, folder, step, error)
        raise
    (folder / FAILED).unlink(missing_ok=True)
    return objective(cfg)


def apart(cfg: DictConfig) -> bool:
    """Whether a point of a sweep has to run in a process of its own: where it starts others by itself.

    They are started by the command line of this process, which has to be the point's and not the sweep's. Where a
    launcher started all processes (SLURM, torchrun), nothing is left to start.
    """
    return sweeping() and cfg.trainer.devices != 1 and not launched()


def train_apart(cfg: DictConfig) -> float | None:
    """As :func:`train`, in a new process, by the command that repeats this point alone.

    Raises:
        ConfigError: the process failed; it has said why.
    """
    hydra = HydraConfig.get()
    mine = [source.path for source in hydra.runtime.config_sources if source.provider == "command-line"]
    words = ["fsvfm.train", *(f"--config-dir={path}" for path in mine), *hydra.overrides.task]
    words += ["hydra.mode=RUN", f"hydra.run.dir='{hydra.runtime.output_dir}'"]
    if subprocess.run([sys.executable, "-m", *words], check=False).returncode:
        raise ConfigError(f"{cfg.name} failed; its reason is above and in {Path(cfg.paths.run) / FAILED}")
    return objective(cfg)


def _note_failure(cfg: DictConfig, folder: Path, step: str, error: Exception) -> None:
    """Leave the reason in the run's folder, for reports; a run that did not start leaves its settings with it."""
    reason: dict[str, Any] = {"step": step, "error": f"{type(error).__name__}: {error}", "time": now()}
    reason["traceback"] = traceback.format_exc()
    if not (folder / "config.yaml").is_file():
        with contextlib.suppress(OmegaConfBaseException):  # values that refer to missing ones
            reason["config"] = OmegaConf.to_container(cfg, resolve=True)
    write_json(folder / FAILED, reason)


def detector_config(cfg: DictConfig, folder: Path) -> DictConfig:
    """The run that ``finetune`` describes: its experiment, on this run's network and export, in ``<run>/finetune``.

    It has this run's processes, so accelerator, devices and nodes are not the experiment's.
    Its protocol becomes this run's too, unless this run has test sets of its own: both are tested on the same.

    Raises:
        ConfigError: ``finetune.experiment`` is not set.
    """
    if cfg.finetune.experiment is None:
        raise ConfigError(
            "run contains `finetune`, but nothing says how; choose finetune.experiment=<a detector's experiment>, such "
            "as dfd_vitb, and finetune.overrides=[…] for what should differ from it"
        )
    overrides = [f"experiment={cfg.finetune.experiment}", *cfg.finetune.overrides]
    if GlobalHydra.instance().is_initialized():  # with the search path of this command
        detector = compose("train", overrides)
    else:
        with initialize_config_module("fsvfm.configs", version_base="1.3"):
            detector = compose("train", overrides)
    with open_dict(detector), open_dict(cfg):
        detector.name, detector.seed, detector.run = cfg.name, cfg.seed, ["fit"]
        detector.resume = "never" if cfg.resume == "never" else "auto"
        detector.paths = {**OmegaConf.to_container(cfg.paths, resolve=True), "run": str(folder / "finetune")}  # type: ignore[dict-item]
        detector.model = {**OmegaConf.to_container(cfg.model, resolve=True), "init": str(folder / "export")}  # type: ignore[dict-item]
        detector.logger = cfg.logger
        for key in ("accelerator", "devices", "num_nodes"):
            detector.trainer[key] = cfg.trainer[key]
        if cfg.get("testsets"):
            detector.protocol, detector.testsets = cfg.protocol, cfg.testsets
        else:
            cfg.protocol, cfg.testsets = detector.protocol, detector.get("testsets", {})
    return detector


def objective(cfg: DictConfig) -> float | None:
    """The best value of ``objective.metric`` in ``metrics.csv``, of the detector if there is one; None without any."""
    last = "finetune" if "finetune" in cfg.run else "."
    file = Path(cfg.paths.run) / last / "metrics.csv"
    if rank() or not file.is_file():
        return None
    with file.open(newline="") as lines:
        values = [float(row[cfg.objective.metric]) for row in csv.DictReader(lines) if row.get(cfg.objective.metric)]
    return {"min": min, "max": max}[cfg.objective.mode](values) if values else None


def _marker(cfg: DictConfig, step: str) -> Path:
    return Path(cfg.paths.run) / f"{step}.done.json"


def fit(cfg: DictConfig, folder: Path) -> None:
    """Train, then export the checkpoint that counts: the lowest validation loss, or the last one in pre-training."""
    import torch

    from fsvfm import loggers

    data = build.build_data(cfg)
    task = build.build_task(cfg, data)
    trainer = build.build_trainer(cfg)
    resume = resume_path(cfg, folder)
    step = 0
    if resume is not None:
        saved = torch.load(resume, map_location="cpu", weights_only=True, mmap=True)
        require_same_model(resume, saved["hyper_parameters"]["model"], task.hparams["model"])
        step = int(saved["global_step"])
        say(f"continuing {resume} at step {step}")
    loggers.start(trainer.loggers, cfg, folder, step)
    try:
        trainer.fit(task, datamodule=data, ckpt_path=resume, weights_only=True)
        if trainer.interrupted:
            raise KeyboardInterrupt
        if trainer.is_global_zero:
            facts = {"dataset": str(cfg.data.name), "faces": provenance.faces(cfg.data.manifests)}
            export(folder / "checkpoints" / f"{task.exported}.ckpt", folder / "export", facts)
        trainer.strategy.barrier("exported")
        calibrate(cfg, data, folder, trainer.loggers)
    finally:
        loggers.finish(trainer.loggers)


def calibrate(cfg: DictConfig, data: Any, folder: Path, loggers: Sequence[Any]) -> None:
    """Store temperature and thresholds, fitted on the validation faces, in a detector's export; show what they do."""
    validation = getattr(data, "val", None)
    if validation is None or not cfg.calibration.fit:
        return
    from fsvfm import logged, processes
    from fsvfm.evaluation import calibrate_export

    try:
        scored = calibrate_export(
            folder / "export",
            validation,
            source=f"validation faces of {cfg.data.name}",
            conformal_alpha=cfg.calibration.conformal_alpha,
            batch_size=cfg.evaluate.batch_size,
            workers=cfg.data.workers,
            group=processes.join(cfg.trainer),
        )
    except MetricError as error:
        return say(f"the export has no calibration: {error}")
    if scored is not None:
        table, summary = scored
        table = table.assign(run=cfg.name, testset="validation")
        logged.show(cfg, table, {str(cfg.name): {"validation": summary}}, folder / "validation", loggers)


def test(cfg: DictConfig, folder: Path) -> None:
    """Score the exported checkpoint on the protocol's test sets, with every process of the run."""
    from fsvfm.evaluation import evaluate

    evaluate(cfg, {str(cfg.name): str(folder / "export")}, folder / "test")


test.__test__ = False  # type: ignore[attr-defined]  # not a pytest test


def evaluate_last(cfg: DictConfig, folder: Path) -> None:
    """Score the detector that ``finetune`` made, or without that step this run's own, on the protocol's test sets."""
    from fsvfm.evaluation import evaluate

    made_in = folder / "finetune" if "finetune" in cfg.run else folder
    evaluate(cfg, {str(cfg.name): str(made_in / "export")}, Path(cfg.evaluate.out))


#: Files that a local checkpoint or a prepared folder is read from.
_KEPT = ("model.*", "manifest.*")


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
        "checkpoints": {label: [source, digests(Path(source), _KEPT)] for label, source in chosen.items()},
        "manifests": {name: digests(Path(test.manifest), _KEPT) for name, test in cfg.testsets.items()},
    }
    marker = out / "evaluated.json"
    if cfg.resume == "auto" and marker.is_file() and json.loads(marker.read_text()) == record:
        say(f"evaluated already: {out / 'results.md'} (resume=never does it again)")
        return
    from fsvfm.evaluation import evaluate

    evaluate(cfg, chosen, out)
    if rank() == 0:
        write_json(marker, record)


def export(checkpoint: Path, folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the small export (safetensors + JSON) of a Lightning checkpoint, with facts about its training data."""
    from fsvfm.checkpoint import load_checkpoint
    from fsvfm.exports import save_export

    loaded = load_checkpoint(checkpoint)
    meta = {**loaded.meta, "provenance": {**loaded.meta.get("provenance", {}), **facts, "exported": now()}}
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
