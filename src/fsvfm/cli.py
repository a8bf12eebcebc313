"""What every command shares: an error made on purpose is one line, not a traceback."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
import re
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal import utils as hydra_utils
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import (
    CompactHydraException,
    ConfigCompositionException,
    HydraException,
    OverrideParseException,
)
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from fsvfm.errors import ConfigError, FsvfmError, Preempted

_LONGEST = 120


def slug(base: object, overrides: object) -> str:
    """A folder name from an experiment and its overrides, such as ``demo_dfd__seed-1``; long ones end in a digest.

    It holds no character that would need quoting when the folder is given to another command.
    """
    items = [re.sub(r"[^\w.]+", "-", item).strip("-") for item in str(overrides).split(",") if item]
    text = "__".join([str(base or "run"), *items])
    if len(text) <= _LONGEST:
        return text
    return f"{text[:_LONGEST]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def suffix(value: object, default: object) -> str:
    """``_value`` for a name that tells where a setting is not the default one; nothing where it is."""
    return "" if value == default else f"_{value}"


def cpu_precision() -> str:
    """``bf16-mixed`` where the processor multiplies bfloat16 in hardware (twice as fast there), else ``32-true``."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "32-true"
    return "bf16-mixed" if "avx512_bf16" in flags or "amx_bf16" in flags else "32-true"


def choice(*groups: str) -> str | None:
    """The option chosen of the first of these groups that has one; None where none has."""
    chosen = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    return next((str(chosen[group]) for group in groups if chosen.get(group)), None)


OmegaConf.register_new_resolver("choice", choice, replace=True)
OmegaConf.register_new_resolver("slug", slug, replace=True)
OmegaConf.register_new_resolver("suffix", suffix, replace=True)
OmegaConf.register_new_resolver("cpu_precision", cpu_precision, replace=True)


def launched() -> str | None:
    """What a launcher put into the environment as the number of this process among those of a run; None without one."""
    found = (os.environ.get(name, "") for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))
    return next((text for text in found if text.isdigit()), None)


def rank() -> int:
    """Number of this process among those of a distributed run."""
    return int(launched() or 0)


def say(text: str) -> None:
    """Print, on the first process only."""
    if rank() == 0:
        print(text, flush=True)


def sweeping() -> bool:
    """Whether this is one run of several of the same command."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def import_extensions(cfg: Any) -> None:
    """Import the modules of the setting ``imports``, which register a user's own strategies or networks.

    Raises:
        ConfigError: a module that cannot be imported.
    """
    for name in (cfg.get("imports") if isinstance(cfg, DictConfig) else None) or []:
        try:
            import_module(name)
        except ImportError as error:
            raise ConfigError(
                f"imports: {name} cannot be imported ({error}); expected the name of a module in the current folder, "
                "on PYTHONPATH or installed"
            ) from None


def guard(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run a command; print an :class:`FsvfmError` as ``error: …`` on stderr and leave with status 1.

    A point of a sweep does not leave: its error is handed to Hydra, which goes on with the other points and fails at
    the end.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            import_extensions(args[0] if args else None)
            return function(*args, **kwargs)
        except Preempted as stop:
            say(str(stop))
            sys.exit(stop.status)
        except FsvfmError as error:
            if os.environ.get("HYDRA_FULL_ERROR"):
                raise
            print(f"error: {error}", file=sys.stderr)
            if sweeping():
                raise CompactHydraException(f"error: {error}") from None
            sys.exit(1)
        except Exception:
            if sweeping():  # Hydra shows the traceback of one point only, and that at the end
                traceback.print_exc()
            raise
        except KeyboardInterrupt:
            print("interrupted; run the same command again to continue", file=sys.stderr)
            sys.exit(130)

    return run


def command(config_name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """``@hydra.main`` and :func:`guard` for a command: Hydra's own errors are one line too, and ``--cfg job`` explains.

    Args:
        config_name: the primary configuration in ``fsvfm.configs``.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        start = hydra.main(version_base="1.3", config_path="pkg://fsvfm.configs", config_name=config_name)
        entry = start(guard(function))

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            # Hydra reports by printing and leaving; this is the one place where its report can be another.
            usual = hydra_utils.run_and_report
            hydra_utils.run_and_report = functools.partial(_report, usual, config_name)
            try:
                return entry(*args, **kwargs)
            except (ConfigCompositionException, OverrideParseException) as error:  # with --help
                _leave(error, config_name)
            finally:
                hydra_utils.run_and_report = usual

        return run

    return decorate


def _report(usual: Callable[..., Any], config_name: str, function: Callable[[], Any]) -> Any:
    """Hydra's ``run_and_report``, with our words for what cannot be composed and comments in ``--cfg job``."""

    def told() -> Any:
        try:
            arguments = hydra_utils.get_args()
            if arguments.cfg != "job" or not GlobalHydra.instance().is_initialized():
                return function()
            from fsvfm.annotated import annotate

            with contextlib.redirect_stdout(io.StringIO()) as shown:
                function()
            loader, name = GlobalHydra.instance().config_loader(), arguments.config_name or config_name
            sys.stdout.write(annotate(shown.getvalue(), loader, name, arguments.overrides))
        except (ConfigCompositionException, OverrideParseException) as error:
            _leave(error, config_name)

    return usual(told)


def _leave(error: HydraException, config_name: str) -> NoReturn:
    if os.environ.get("HYDRA_FULL_ERROR"):
        raise error
    from fsvfm.suggest import explain

    arguments = hydra_utils.get_args()
    print(f"error: {explain(error, arguments.config_name or config_name, arguments.overrides)}", file=sys.stderr)
    sys.exit(1)
