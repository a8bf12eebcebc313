"""From a composed configuration to data, task, callbacks, loggers and trainer — in this order, in this one place.

:func:`check` looks at the configuration as a whole before anything heavy starts and reports all problems together.
"""

from __future__ import annotations

import fnmatch
import logging
import shlex
import sys
import warnings
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from fsvfm import speed
from fsvfm.cli import say
from fsvfm.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from fsvfm.data.manifest import Manifest

#: Keys of the ``data`` group that describe the data set; all others are arguments of the data module.
DATA_FACTS = ("name", "prepare", "mean", "std")
#: What ``run`` may list. Both of the last two need test sets.
STEPS = ("fit", "finetune", "test", "evaluate")

#: Beginnings of checkpoint names that are no local paths.
REMOTE = ("hf://", "zoo:", "timm:")


def prepared(folder: str | Path) -> bool:
    """Whether a manifest is there: a prepared folder, a Parquet or CSV file, or a folder in a published layout."""
    if "://" in str(folder):  # remote; reading it will tell
        return True
    path = Path(folder).expanduser()
    if path.is_file() or (path / "manifest.parquet").is_file() or (path / "manifest.csv").is_file():
        return True
    from fsvfm.data import layouts  # with pandas, which most checks do without

    return layouts.known(path)


#: How to give a value that no experiment can know.
_CHOICES = {
    "data.target": "which data set is left out? choose target=M, C, I or O (MCIO), or target=W, CeFA or S (WCS)",
    "model.init": "FaRL's weights are no download of the hub: get FaRL-Base-Patch16-LAIONFace20M-ep64.pth from "
    "github.com/FacePerceiver/FaRL and give model.init=<that file>",
}


def _missing_values(cfg: DictConfig) -> list[str]:
    missing = sorted(OmegaConf.missing_keys(cfg))
    usual = "choose an experiment=… that sets it, or give {}=…"
    return [f"{key} has no value; {_CHOICES.get(key, usual.format(key))}" for key in missing]


def _data_problems(cfg: DictConfig) -> list[str]:
    problems = []
    wanted = [(cfg.data.name, path, cfg.data.prepare) for path in cfg.data.manifests] if "fit" in cfg.run else []
    if {"test", "evaluate"} & set(cfg.run):
        wanted += [(name, test.manifest, test.prepare) for name, test in cfg.get("testsets", {}).items()]
        if not cfg.get("testsets"):
            problems.append(
                f"run={list(cfg.run)} is to test, but the protocol has no test sets; choose protocol=… or run=[fit]"
            )
    for name, path, how in wanted:
        if not prepared(path):
            where = Path(path).expanduser().absolute()
            problems.append(f"data set {name}: no manifest in {where}; prepare it with\n      {how}")
    return list(dict.fromkeys(problems))


def testset_rows(test: Mapping[str, Any]) -> Manifest:
    """Rows of a test set as its configuration says: its split, all reals, and the fakes of its methods.

    ``methods`` may hold shell patterns (``T2I/*``).

    Raises:
        DataError: not prepared, a pattern without a match, or only one class left.
    """
    from fsvfm.data.manifest import Manifest

    if not prepared(test["manifest"]):
        raise DataError(f"not prepared: no manifest in {Path(test['manifest']).absolute()}; run {test['prepare']}")
    rows = Manifest.read(test["manifest"], extra=["origin"]).select(split=test["split"], datasets=test["datasets"])
    if test["methods"] is not None:
        there = sorted(rows.table.loc[rows.table["label"] == 1, "method"].unique())
        chosen = []
        for pattern in test["methods"]:
            found = fnmatch.filter(there, pattern)
            if not found:
                raise DataError(f"no fake in {rows.source} has the method {pattern!r}; there are {', '.join(there)}")
            chosen += found
        rows = rows.select(methods=["real", *chosen])
    rows.require_both_classes("testing")
    return rows


def _leak_problems(cfg: DictConfig) -> list[str]:
    """Videos and people that would be trained on and tested on."""
    if "fit" not in cfg.run or not {"test", "evaluate"} & set(cfg.run) or "finetune" in cfg.run:
        return []  # of an agenda with `finetune`, the detector's training data counts: see `check`
    from fsvfm.data.manifest import Manifest, check_leaks

    problems = []
    trained_on = Manifest.concat([Manifest.read(path, extra=["origin"]) for path in cfg.data.manifests])
    for name, test in cfg.testsets.items():
        try:
            for warning in check_leaks(trained_on, testset_rows(test)):
                say(f"warning: test set {name}: {warning}")
        except DataError as error:
            problems.append(f"test set {name}: {error}")
    return problems


def _cuda_devices() -> int:
    # Imported here: a run that is finished already, or has other problems, should say so without seconds of loading.
    import torch

    return torch.cuda.device_count()


def _device_problems(cfg: DictConfig) -> list[str]:
    trainer, problems = cfg.trainer, []
    cuda = _cuda_devices()
    devices = trainer.devices if isinstance(trainer.devices, int) else cuda
    if trainer.accelerator == "gpu" and (not cuda or devices > cuda):
        problems.append(
            f"trainer asks for {trainer.devices} GPU(s) per node but {cuda} CUDA device(s) are visible; use e.g. "
            "trainer.accelerator=cpu trainer.devices=1 trainer.precision=32-true, or fewer trainer.devices"
        )
    if str(trainer.precision).startswith("16"):
        problems.append(
            f"trainer.precision={trainer.precision}: float16 needs loss scaling, which hides non-finite steps; "
            "use bf16-mixed (the same speed, no scaling) or 32-true"
        )
    return problems


def _value_problems(cfg: DictConfig) -> list[str]:
    problems = []
    unknown = [step for step in cfg.run if step not in STEPS]
    if unknown or not cfg.run:
        problems.append(f"run={list(cfg.run)}: expected a list of {', '.join(STEPS)}")
    if cfg.model.image_size % cfg.model.get("patch_size", 1):
        problems.append(
            f"model.image_size={cfg.model.image_size} is not a multiple of model.patch_size={cfg.model.patch_size}"
        )
    if "PretrainTask" in cfg.task._target_ and cfg.model.get("family", "vit") != "vit":
        problems.append(f"model={cfg.model.name} (family {cfg.model.family}) cannot be pre-trained; plain ViTs can")
    if not 0 < cfg.masking.ratio < 1:
        problems.append(f"masking.ratio={cfg.masking.ratio}: expected a share between 0 and 1 (the papers use 0.75)")
    if cfg.optim.base_lr <= 0:
        problems.append(f"optim.base_lr={cfg.optim.base_lr}: expected a positive learning rate")
    if cfg.objective.mode not in ("min", "max"):
        problems.append(f"objective.mode={cfg.objective.mode}: expected min or max")
    if cfg.data.batch_size < 1:
        problems.append(f"data.batch_size={cfg.data.batch_size}: expected at least 1")
    if cfg.augment.mixup and "ForgeryTask" in cfg.task._target_ and cfg.data.batch_size % 2:
        problems.append(f"data.batch_size={cfg.data.batch_size} must be even: mixup pairs the images of a batch")
    problems += speed.problems(cfg)
    init = cfg.model.init
    remote = init is not None and str(init).startswith(REMOTE)
    if init is not None and not remote and not Path(str(init)).expanduser().exists():
        problems.append(
            f"model.init={init} does not exist; train it first (an experiment's export is <run folder>/export), give "
            "hf://<repository>/<file>, zoo:<name> (`python -m fsvfm.export list`) or timm:<name>, or model.init=null "
            "for no init"
        )
    return problems


def check(cfg: DictConfig, detector: DictConfig | None = None) -> None:
    """Validate a configuration as a whole.

    Args:
        cfg: what is to run.
        detector: the configuration of its step ``finetune``, checked now rather than after days of pre-training.

    Raises:
        ConfigError: with every problem found, each saying what to do.
    """
    problems = _problems(cfg)
    if "fit" in cfg.run and cfg.model.family == "rffr" and cfg.model.init is None:
        problems.append(
            "model.init=null: rffr compares faces with a trained generator's reconstructions; give the export of "
            "experiment=rffr_pretrain"
        )
    if detector is not None:
        later = detector.copy()
        later.model.init, later.run = None, ["fit", "test"] if detector.get("testsets") else ["fit"]
        problems += [f"finetune: {problem}" for problem in _problems(later) if problem not in problems]
    if problems:
        listed = "\n".join(f"  {number}. {problem}" for number, problem in enumerate(problems, 1))
        raise ConfigError(f"this run cannot start; {len(problems)} thing(s) to settle first:\n{listed}")


def _problems(cfg: DictConfig) -> list[str]:
    problems = _missing_values(cfg)
    if not problems:
        problems = _value_problems(cfg) + _data_problems(cfg) + _device_problems(cfg)
    if not problems:
        problems = _leak_problems(cfg)
    return problems


def initial_checkpoint(cfg: DictConfig) -> Any:
    """The checkpoint named by ``model.init``, or None."""
    if cfg.model.init is None:
        return None
    from fsvfm.checkpoint import load_checkpoint

    return load_checkpoint(str(cfg.model.init))


def _statistics(cfg: DictConfig, checkpoint: Any, data: Any) -> tuple[list[float], list[float]]:
    """Mean and std: given in ``data``, else the initial checkpoint's, else computed once from the training faces."""
    if cfg.data.mean is not None and cfg.data.std is not None:
        return list(cfg.data.mean), list(cfg.data.std)
    if checkpoint is not None and checkpoint.meta.get("mean") is not None:
        return list(checkpoint.meta["mean"]), list(checkpoint.meta["std"])
    from fsvfm.data.stats import cached_statistics

    manifest = data.manifest if hasattr(data, "manifest") else data.train
    return cached_statistics(manifest, cfg.model.image_size, workers=max(2, cfg.data.workers))


def create(config: DictConfig, *, without: tuple[str, ...] = (), **more: Any) -> Any:
    """Call a config node's ``_target_`` with its other values as plain Python objects.

    Unlike ``hydra.utils.instantiate`` it goes one level deep (tasks want plain values) and lets our errors through.
    """
    values = OmegaConf.to_container(config, resolve=True)
    arguments = {str(k): v for k, v in values.items() if k not in ("_target_", *without)}  # type: ignore[union-attr]
    return get_class(config._target_)(**arguments, **more)


def build_data(cfg: DictConfig) -> pl.LightningDataModule:
    """The data module of the ``data`` group."""
    return create(cfg.data, without=DATA_FACTS)


def build_task(cfg: DictConfig, data: pl.LightningDataModule) -> pl.LightningModule:
    """The task of the ``task`` group, with normalisation filled in and the initial checkpoint loaded."""
    import pytorch_lightning as pl

    pl.seed_everything(cfg.seed, verbose=False)
    checkpoint = initial_checkpoint(cfg)
    mean, std = _statistics(cfg, checkpoint, data)
    task = create(cfg.task, mean=mean, std=std)
    if checkpoint is not None:
        report = task.initialise(checkpoint)
        say(f"initialised from {cfg.model.init}: {report}")
    note = speed.apply(cfg, task)
    if note is not None:
        say(note)
    return task


def micro_batch(cfg: Mapping[str, Any]) -> int:
    """Images that all processes together take at a time (in anti-spoofing: of each class and domain)."""
    trainer, data = cfg["trainer"], cfg["data"]
    if "AntispoofData" in data["_target_"]:  # its batch_size is shared out among the processes
        return int(data["batch_size"])
    devices = trainer["devices"]
    if not isinstance(devices, int) or devices < 1:
        devices = _cuda_devices() or 1
    return int(data["batch_size"] * devices * trainer["num_nodes"])


def effective_batch(cfg: Mapping[str, Any]) -> int:
    """Images of an optimisation step."""
    return micro_batch(cfg) * int(cfg["trainer"]["accumulate_grad_batches"])


def _report_batch(cfg: DictConfig) -> None:
    effective = effective_batch(cfg)
    if not cfg.optim.scale_lr:
        return say(f"learning rate {cfg.optim.base_lr:g}, whatever the batch size")
    lr = cfg.optim.base_lr * effective / 256
    note = f"effective batch {effective}, peak learning rate {lr:.3g} (= {cfg.optim.base_lr:g} · {effective} / 256)"
    if cfg.optim.effective_batch and effective != cfg.optim.effective_batch:
        note += f"; the recipe was tuned for {cfg.optim.effective_batch}: set data.batch_size, trainer.devices or "
        note += "trainer.accumulate_grad_batches to reach it"
    say(note)


def _quieten() -> None:
    """Leave out Lightning's hints that are no news here; its warnings about the run stay."""
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    for message in (
        ".*Previous log files in this directory will be deleted.*",  # loggers.MetricsFile keeps them
        ".*Checkpoint directory .* exists and is not empty.*",  # runs continue in their folder
        ".*does not have many workers.*",
        ".*is smaller than the logging interval.*",
        ".*your dataloader is not resumable.*",  # it is: data.datamodules keeps the position
        r".*module\(s\) in eval mode at the start.*",  # a frozen backbone is meant to be
        ".*Total length of `list` across ranks is zero.*",  # no validation, as asked
        ".*LeafSpec.*",
        ".*`broadcast_buffers` is deprecated.*",  # its successor is not in all versions of PyTorch that we support
        ".*FSDP2-wrapped module .* returned a view tensor.*",  # nothing is done to it in place
    ):
        warnings.filterwarnings("ignore", message)


def build_loggers(cfg: DictConfig) -> list[Any]:
    """The loggers of the ``logger`` group."""
    return [create(value) for value in cfg.logger.values() if value is not None]


def build_trainer(cfg: DictConfig) -> pl.Trainer:
    """Trainer with the callbacks and loggers of their groups; metrics.csv in the run folder is always written."""
    from fsvfm import strategies
    from fsvfm.loggers import MetricsFile

    _report_batch(cfg)
    _quieten()
    callbacks = [create(value) for value in cfg.callbacks.values() if value is not None]
    loggers = [MetricsFile(str(cfg.paths.run)), *build_loggers(cfg)]
    strategy = strategies.choose(cfg.trainer)
    return create(cfg.trainer, without=("strategy",), strategy=strategy, callbacks=callbacks, logger=loggers)


def run_folder(cfg: DictConfig) -> Path:
    """The run's folder, created."""
    folder = Path(cfg.paths.run)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def checkpoints(cfg: DictConfig) -> dict[str, str]:
    """What to evaluate: label → checkpoint.

    Among several, exports of experiments that were not run yet may be named: see :func:`absent_run`.

    Raises:
        ConfigError: a local checkpoint does not exist.
    """
    if cfg.ckpt is None:
        chosen = {str(cfg.name): str(Path(cfg.paths.run) / "export")}
    elif isinstance(cfg.ckpt, str):
        path = Path(cfg.ckpt)
        chosen = {path.parent.name if path.name == "export" else path.stem: cfg.ckpt}
    else:
        chosen = {str(label): str(path) for label, path in cfg.ckpt.items()}
    local = {label: path for label, path in chosen.items() if not path.startswith(REMOTE)}
    absent = [f"  {label}: {path}" for label, path in local.items() if not Path(path).expanduser().exists()]
    known = [label for label, path in local.items() if absent_run(path)]
    if absent and (len(absent) > len(known) or len(known) == len(chosen)):
        listed = "\n".join(absent)
        raise ConfigError(f"no checkpoint at\n{listed}\nTrain it first, or say what to evaluate with ckpt=<path>")
    return chosen


def absent_run(source: str) -> str:
    """Why there is no checkpoint and what makes it, for `…/<experiment>/export` that does not exist; else empty."""
    path = Path(source).expanduser()
    if source.startswith(REMOTE) or path.exists() or path.name != "export":
        return ""
    experiment = path.parent.name
    if not resources.files("fsvfm.configs").joinpath("experiment", f"{experiment}.yaml").is_file():
        return ""
    return f"not trained yet: `python -m fsvfm.train experiment={experiment}` makes {path}"


def require_testsets(cfg: DictConfig) -> None:
    """Raise ConfigError unless there are test sets and at least one of them is prepared (others become gaps)."""
    tests = cfg.get("testsets") or {}
    if not tests:
        raise ConfigError(
            "there is nothing to test on: choose protocol=<name>, testset=[<name>, …], or an experiment that has one"
        )
    if not any(prepared(test.manifest) for test in tests.values()):
        listed = "\n".join(f"  {name}: {test.manifest} — {test.prepare}" for name, test in tests.items())
        raise ConfigError(f"none of these test sets is prepared:\n{listed}")


#: Settings that may change when a run is continued: they do not change what is computed.
_FREE = (
    "run", "resume", "ckpt", "evaluate", "logger", "paths", "hydra", "protocol", "testsets", "name", "callbacks",
    "objective", "ablation", "speed", "finetune",  # the detector's own folder looks after its settings
)  # fmt: skip


#: How the work is spread over devices may change, too, as long as an optimisation step has as many images.
_SPREAD = (
    "trainer.devices", "trainer.num_nodes", "trainer.strategy", "trainer.accumulate_grad_batches", "data.batch_size",
    "data.workers", "trainer.default_root_dir",
)  # fmt: skip


def _require_same_batch(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise ConfigError unless a continued run has the effective batch it had; tell what else changes."""
    wanted, given, at_once = effective_batch(old), effective_batch(new), micro_batch(new)
    if wanted != given:
        each = int(new["data"]["batch_size"])
        sizes = [size for size in range(each, 0, -1) if wanted % (at_once // each * size) == 0]
        how = "choose a number of devices that divides it"
        if sizes:
            keep = wanted // (at_once // each * sizes[0])
            how = f"keep it with data.batch_size={sizes[0]} trainer.accumulate_grad_batches={keep}"
        raise ConfigError(
            f"{folder} holds a run with {wanted} images in an optimisation step; now there would be {given}. To "
            f"continue it, {how}. To go on with another batch all the same, make it a run of its own: name=<new> "
            f"resume={folder / 'checkpoints' / 'last.ckpt'}"
        )
    if micro_batch(old) != at_once:
        say(
            f"continuing with micro-batches of {at_once} images instead of {micro_batch(old)}: the steps take the same "
            "images in the same order; the masks differ, an in-batch contrast (infonce, mocov3, FS-Adapter) sees other "
            "company, and callbacks.ema.update=micro_batch moves the target at another rate"
        )


def settle_folder(cfg: DictConfig) -> None:
    """Compare with the configuration already in the run folder, then write this one as ``config.yaml``.

    Raises:
        ConfigError: the folder belongs to a run with other settings; continuing would mix the two.
    """
    folder = run_folder(cfg)
    file = folder / "config.yaml"
    new = OmegaConf.to_container(cfg, resolve=True)
    if file.is_file() and cfg.resume != "never":
        old = OmegaConf.to_container(OmegaConf.load(file))
        changed = list(_differences(old, new))
        if changed:
            listed = "\n".join(f"  {key}: {was!r} → {now!r}" for key, was, now in changed[:20])
            raise ConfigError(
                f"{folder} holds a run with other settings:\n{listed}\n"
                "Give this run its own name=…, delete the folder, or start it over with resume=never"
            )
        _require_same_batch(folder, old, new)  # type: ignore[arg-type]
    temporary = file.with_suffix(".tmp")
    OmegaConf.save(OmegaConf.create(new), temporary)
    temporary.replace(file)


def _differences(old: Any, new: Any, prefix: str = "") -> Any:
    """(key, old, new) of every setting that matters and differs."""
    for key in sorted({*old, *new}, key=str):
        name = f"{prefix}{key}"
        if name in _FREE or name in _SPREAD:
            continue
        was, now = old.get(key), new.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            yield from _differences(was, now, f"{name}.")
        elif was != now:
            yield name, was, now


def command_line() -> str:
    """The command as it was given, for records."""
    return shlex.join(["python", "-m", "fsvfm." + Path(sys.argv[0]).stem, *sys.argv[1:]])
