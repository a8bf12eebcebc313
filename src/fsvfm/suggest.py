"""Hydra's complaints about a command line, in one line and with what was probably meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import OmegaConf

#: More options than this are counted instead of listed.
_LISTED = 12


def nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean a or b?`` for names that are close, else nothing.

    A key that is right but for its place (``batch_size`` for ``data.batch_size``) counts as close.
    """
    known = list(dict.fromkeys(known))
    last = name.rsplit(".", 1)[-1]
    found = [key for key in known if key != name and key.rsplit(".", 1)[-1] == last][:3]
    found = found or difflib.get_close_matches(name, known, n=3, cutoff=0.75)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def _keys(config: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(config, dict):
        for key, value in config.items():
            yield f"{prefix}{key}"
            yield from _keys(value, f"{prefix}{key}.")


def _settings(config_name: str, overrides: list[str], without: str) -> list[str]:
    """Groups and keys that there are, with as much of the command line as can be composed."""
    if not GlobalHydra.instance().is_initialized():
        return []
    loader = GlobalHydra.instance().config_loader()
    others = [text for text in overrides if re.split(r"[=@]", text.lstrip("+~"))[0] != without]
    for chosen in (others, []):
        try:
            config = loader.load_configuration(config_name, chosen, RunMode.RUN)
        except HydraException:
            continue
        plain = OmegaConf.to_container(config, resolve=False)
        return [*loader.list_groups(""), *_keys({k: v for k, v in plain.items() if k != "hydra"})]  # type: ignore[union-attr]
    return []


def explain(error: HydraException, config_name: str, overrides: list[str]) -> str:
    """What is wrong with a command line and what to do about it.

    Args:
        error: raised while the configuration was composed.
        config_name: the primary configuration.
        overrides: the command line's.
    """
    text = str(error)
    if isinstance(error, OverrideParseException):
        advice = "values with spaces or , = ( ) [ ] { } need quotes: 'key=\"…\"'"
        return f"cannot read {error.override!r} ({text.splitlines()[0]}); {advice}"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        options = list(error.options)
        listed = ", ".join(options) if len(options) <= _LISTED else f"{len(options)} options; --help lists them"
        return f"there is no {group}={name}{nearest(name, options)} ({group}: {listed})"
    if match := re.search(r"Could not override '([^']+)'", text):
        key = match[1]
        hint = nearest(key, _settings(config_name, overrides, key))
        return f"there is no setting {key!r}{hint} (--cfg job prints all settings, with what they mean)"
    cause = f" {error.__cause__}" if error.__cause__ else ""
    return " ".join(f"{text}{cause}".split())
