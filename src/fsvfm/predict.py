"""``python -m fsvfm.predict ckpt=<detector> input=<photo|video|folder|pattern|list|webcam:0>``: scores and verdicts."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fsvfm import cli
from fsvfm.errors import ConfigError

#: Keys whose values are names of files, in which any character may stand.
_PATHS = ("input", "out", "ckpt", "encoder")


def quoted(arguments: Sequence[str]) -> list[str]:
    """Arguments with file names quoted for Hydra, so that ``input=me (2).jpg`` needs no quotes within quotes."""
    if "-m" in arguments or "--multirun" in arguments:
        return list(arguments)  # a comma then separates the points of a sweep
    result = []
    for text in arguments:
        key, sign, value = text.partition("=")
        plain = key in _PATHS and value and value[0] not in "[{'\"$" and value != "null"
        if sign and plain and (key not in ("ckpt", "encoder") or not re.fullmatch(r"[\w./:@+-]+", value)):
            # Hydra reads pairs of backslashes, and a backslash before a quote, as one character.
            escaped = re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), value)
            text = f"{key}='{escaped}'"
        result.append(text)
    return result


def predict(cfg: DictConfig) -> int:
    """Score what the configuration asks for; returns the exit status of :mod:`fsvfm.scoring`."""
    missing = [key for key in ("ckpt", "input") if OmegaConf.is_missing(cfg, key)]
    if missing:
        usage = "python -m fsvfm.predict ckpt=<detector> input=<photo|video|folder|'pattern'|list.txt|webcam:0>"
        raise ConfigError(f"{' and '.join(f'{key}=…' for key in missing)} must be given: {usage}")
    from fsvfm import scoring
    from fsvfm.predictor import load_detector, member_sources

    settings: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        loading = ("device", "face_detector", "threshold", "max_side", "batch_size", "precision")
        predictor = load_detector(settings["ckpt"], **{key: settings[key] for key in loading})
    for warning in told:
        if warning.category is UserWarning:
            cli.say(f"warning: {warning.message}")
    names = ("frames", "aggregate", "crop", "annotate", "timeline", "explain", "encoder")
    # What changes a result may not differ when an interrupted run is continued.
    same = {key: settings[key] for key in settings if key not in ("out", "resume", "device", "batch_size")}
    same["weights"] = {name: scoring.fingerprint(path) for name, path in member_sources(settings["ckpt"]).items()}
    account = scoring.run(
        predictor,
        settings["input"],
        same,
        out=None if settings["out"] is None else Path(settings["out"]),
        resume=settings["resume"],
        **{name: settings[name] for name in names},
    )
    return account.exit_status()


@cli.command("predict")
def _main(cfg: DictConfig) -> None:
    sys.exit(predict(cfg))


def main() -> None:
    """Predict as the command line says."""
    sys.argv[1:] = quoted(sys.argv[1:])
    _main()


if __name__ == "__main__":
    main()
