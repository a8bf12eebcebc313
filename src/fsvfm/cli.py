"""What every command shares: an error made on purpose is one line, not a traceback."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fsvfm.errors import FsvfmError

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


OmegaConf.register_new_resolver("slug", slug, replace=True)
OmegaConf.register_new_resolver("suffix", suffix, replace=True)
OmegaConf.register_new_resolver("cpu_precision", cpu_precision, replace=True)


def rank() -> int:
    """Number of this process among those of a distributed run, from what launchers put into the environment."""
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 0


def say(text: str) -> None:
    """Print, on the first process only."""
    if rank() == 0:
        print(text, flush=True)


def guard(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run a command; print an :class:`FsvfmError` as ``error: …`` on stderr and leave with status 1."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except FsvfmError as error:
            if os.environ.get("HYDRA_FULL_ERROR"):
                raise
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)
        except KeyboardInterrupt:
            print("interrupted; run the same command again to continue", file=sys.stderr)
            sys.exit(130)

    return run
