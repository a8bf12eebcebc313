"""How a run was made, kept in its folder: command, overrides, code, data, seeds, packages, machine."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from fsvfm import build

#: Files of a prepared folder that say what is in it.
_DATA = ("manifest.*", "card.json")
#: What is remembered of earlier calls in the same folder (packages are long, and rarely what differs).
_EARLIER = ("time", "command", "overrides", "git", "machine")


def record(cfg: DictConfig, folder: Path) -> None:
    """Write ``environment.json``, ``overrides.yaml`` and, where the source was changed, ``changes.patch``.

    ``environment.json`` holds ``time``, ``command``, ``overrides``, ``git``, ``seed``, ``deterministic``, ``data``
    (SHA-256 of every manifest and card), ``machine`` and ``packages``. A run continued by another command, commit or
    machine keeps what it was before under ``earlier``. ``config.yaml``, the resolved configuration, is written by
    :func:`fsvfm.build.settle_folder`; ``rerun.yaml`` is the same as a primary configuration, see :func:`rerun`.
    """
    overrides = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    state, patch = _git()
    environment: dict[str, Any] = {
        "time": now(),
        "command": build.command_line(),
        "overrides": overrides,
        "git": state,
        "seed": cfg.seed,
        "deterministic": bool(cfg.trainer.deterministic),
        "data": _data(cfg),
        "machine": _machine(),
        "packages": dict(sorted((d.metadata["Name"], d.version) for d in distributions())),
    }
    file = folder / "environment.json"
    if file.is_file():
        before = json.loads(file.read_text())
        environment["earlier"] = before.pop("earlier", [])
        if any(before.get(key) != environment[key] for key in _EARLIER if key != "time"):
            environment["earlier"].append({key: before.get(key) for key in _EARLIER})
    write_json(file, environment)
    _write(folder / "overrides.yaml", OmegaConf.to_yaml(OmegaConf.create(overrides)))
    _write(folder / "rerun.yaml", rerun(cfg, folder))
    if patch:
        _write(folder / "changes.patch", patch)


def rerun(cfg: DictConfig, folder: Path) -> str:
    """The resolved configuration as a primary one, which makes the same run again in another folder.

    ``python -m fsvfm.train --config-dir=<folder> --config-name=rerun name=again``: every value is the one that was
    used, whatever has changed in ``configs/`` since; the run's own folder is left open.
    """
    values = OmegaConf.to_container(cfg, resolve=True)
    content = _elsewhere(values, str(cfg.paths.run), "${paths.run}")
    content["paths"]["run"] = "${hydra:runtime.output_dir}"
    content["resume"] = "auto"
    text = yaml.safe_dump(
        {"defaults": [{"hydra": "default"}, "_self_"], **content}, sort_keys=False, allow_unicode=True
    )
    command = f"python -m fsvfm.train --config-dir={shlex.quote(str(folder))} --config-name=rerun name=again"
    return f"# Makes this run again, with the values it had:\n#   {command}\n{text}"


def _elsewhere(value: Any, old: str, new: str) -> Any:
    """Put another folder in place of the run's own, in all texts."""
    if isinstance(value, dict):
        return {key: _elsewhere(entry, old, new) for key, entry in value.items()}
    if isinstance(value, list):
        return [_elsewhere(entry, old, new) for entry in value]
    if isinstance(value, str) and (value == old or value.startswith(f"{old}/")):
        return new + value[len(old) :]
    return value


def digests(path: Path, patterns: Sequence[str]) -> dict[str, str]:
    """SHA-256 of a file, or of the files in a folder that match a pattern, by name."""
    files = [path] if path.is_file() else sorted(file for pattern in patterns for file in path.glob(pattern))
    found = {}
    for file in files:
        with file.open("rb") as content:
            found[file.name] = hashlib.file_digest(content, "sha256").hexdigest()
    return found


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def faces(folders: Sequence[str]) -> dict[str, Any] | None:
    """How the faces in prepared folders were cut: ``detector``, ``scale`` and ``align``, as their cards tell.

    None where they do not tell, pictures were taken as they are, or folders differ.
    """
    found = []
    for folder in folders:
        card = Path(folder).expanduser() / "card.json"
        settings = json.loads(card.read_text(encoding="utf-8")).get("settings", {}) if card.is_file() else {}
        if not settings.get("detector") or "scale" not in settings:
            return None
        found.append(
            {"detector": settings["detector"], "scale": settings["scale"], "align": bool(settings.get("align"))}
        )
    return found[0] if found and all(each == found[0] for each in found) else None


def write_json(path: Path, content: Any) -> None:
    """Write JSON under its name only when it is complete."""
    _write(path, json.dumps(content, indent=1))


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _data(cfg: DictConfig) -> dict[str, dict[str, str]]:
    """Folder → digests of manifest and card; nothing for remote folders and published layouts, which have neither."""
    folders = [*cfg.data.manifests, *(test.manifest for test in (cfg.get("testsets") or {}).values())]
    return {str(folder): digests(Path(folder).expanduser(), _DATA) for folder in dict.fromkeys(folders)}


def _machine() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ram_gib": _ram_gib(),
        "gpus": [f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus],
        "cuda": torch.version.cuda if gpus else None,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _ram_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):  # no such names on this system
        return None


def _git() -> tuple[dict[str, Any] | None, str]:
    """Commit, digest of the changes and untracked code of the source tree, and the changes as a patch.

    None and nothing outside a checkout.
    """
    here = Path(__file__).resolve().parent

    def ask(*words: str) -> str:
        # Bytes that are no UTF-8 (a changed binary file) are replaced: the record is for reading.
        done = subprocess.run(["git", *words], cwd=here, capture_output=True, check=True)
        return done.stdout.decode("utf-8", "replace")

    try:
        # Installed from a wheel inside some other checkout, the commit around us would say nothing about us.
        ask("ls-files", "--error-unmatch", "__init__.py")
        commit = ask("rev-parse", "HEAD").strip()
        status = ask("status", "--porcelain").splitlines()
        patch = ask("diff", "HEAD") if status else ""
    except (OSError, subprocess.CalledProcessError):
        return None, ""
    changes = {"sha256": hashlib.sha256(patch.encode()).hexdigest()} if patch else None
    untracked = [line[3:] for line in status if line.startswith("??") and line.endswith((".py", ".yaml", "/"))]
    return {"commit": commit, "changed": bool(status), "patch": changes, "untracked": untracked}, patch
