"""``python -m fsvfm.prepare``: raw data sets to face crops, parsing maps and a manifest; and a look at the result."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError

from fsvfm import cli
from fsvfm.data.manifest import Manifest
from fsvfm.errors import ConfigError
from fsvfm.recipes.engine import Prepared
from fsvfm.recipes.inspect import inspect

#: Switches of the engine that the command passes on.
_SWITCHES = ("workers", "dry_run", "shard", "overwrite", "retry_skipped", "verify")


def prepare(cfg: DictConfig) -> str:
    """Run the recipe; returns what there is now and what to do next."""
    recipe = cfg.recipe
    missing = sorted(f"recipe.{key}" for key in recipe if OmegaConf.is_missing(recipe, key))
    if "root" in recipe and recipe.root is None:
        missing = ["root", *missing]
    if missing:
        raise ConfigError(f"{', '.join(missing)} must be given on the command line, for example {missing[0]}=<value>")
    # Partial, so that the recipe's own errors reach us as they are.
    run = instantiate(recipe, _partial_=True, _convert_="all")
    return _summary(run(out=cfg.out, **{name: cfg[name] for name in _SWITCHES}))


def look(cfg: DictConfig) -> str:
    """Say what is in a prepared folder."""
    try:
        out = cfg.out
    except InterpolationResolutionError:  # not given, and no recipe after which it could be named
        out = None
    return inspect(cfg.inspect, out).text()


def pack(cfg: DictConfig) -> str:
    """Write a packed copy of a prepared folder; returns what there is now."""
    from fsvfm.recipes import pack as packing

    try:
        out = cfg.out
    except InterpolationResolutionError:  # not given: beside the source
        source = Path(cfg.pack).expanduser()
        out = f"{source.parent if source.is_file() else source}_packed"
    return _summary(packing.pack(cfg.pack, out=out, **cfg.packing, **{name: cfg[name] for name in _SWITCHES}))


#: What may be asked for, by the key that asks for it.
ACTIONS: dict[str, Callable[[DictConfig], str]] = {"recipe": prepare, "inspect": look, "pack": pack}


def _summary(prepared: Prepared) -> str:
    lines = [tally.line() for tally in prepared.tallies]
    if prepared.unfinished:
        if prepared.plan is not None:
            lines = [prepared.plan.text(), "", *lines]
        return "\n".join([*lines, "", f"Not written: {prepared.root}/manifest.parquet; {prepared.unfinished}"])
    root = prepared.root
    counts = Manifest.read(root, extra=()).counts().to_string(index=False)  # without millions of grids
    lines += ["", counts, "", f"Prepared: {root}", f"Look at:  {root}/contact_sheet.png"]
    if any(tally.skipped or tally.missed for tally in prepared.tallies):
        lines.append(f"Skipped:  {root}/skipped.csv")
    if prepared.next_step:
        lines.append(f"Next:     {prepared.next_step}")
    return "\n".join(lines)


def _check_recipe_names(arguments: Sequence[str]) -> None:
    """Say which name was meant, before Hydra says that it could not find a file."""
    if any(text.startswith(("--config-dir", "-cd")) for text in arguments):
        return  # recipes of the user's own
    known = sorted(
        Path(file.name).stem
        for file in resources.files("fsvfm.configs").joinpath("recipe").iterdir()
        if file.name.endswith(".yaml")
    )
    for name in (
        name for text in arguments if text.startswith("recipe=") for name in text.removeprefix("recipe=").split(",")
    ):
        if name not in (*known, "null"):
            near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.4)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ConfigError(f"no recipe {name!r}{hint} There are: {', '.join(known)}")


@cli.command("prepare")
def _main(cfg: DictConfig) -> None:
    asked = [key for key in ACTIONS if cfg.get(key) is not None]
    if len(asked) != 1:
        raise ConfigError(
            f"give exactly one of {', '.join(f'{key}=...' for key in ACTIONS)}"
            + (f", not {' and '.join(asked)}" if asked else "; for example recipe=demo")
        )
    print(ACTIONS[asked[0]](cfg), flush=True)


def main() -> None:
    """Do the one thing that the command line asks for."""
    cli.guard(_check_recipe_names)(sys.argv[1:])
    _main()


if __name__ == "__main__":
    main()
