"""``python -m fsvfm.prepare recipe=<name>``: raw photographs to face crops, parsing maps and a manifest."""

from __future__ import annotations

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from fsvfm import cli
from fsvfm.errors import ConfigError
from fsvfm.recipes.engine import Prepared

#: Switches of the engine that the command passes on.
_SWITCHES = ("workers", "overwrite", "retry_skipped", "verify")


@hydra.main(version_base="1.3", config_path="pkg://fsvfm.configs", config_name="prepare")
@cli.guard
def main(cfg: DictConfig) -> None:
    """Prepare a data set as configured, then say what there is and what to do next."""
    missing = sorted(f"recipe.{key}" for key in cfg.recipe if OmegaConf.is_missing(cfg.recipe, key))
    if missing:
        raise ConfigError(f"{', '.join(missing)} must be given on the command line, for example {missing[0]}=<value>")
    # Partial, so that the recipe's own errors reach us as they are.
    recipe = instantiate(cfg.recipe, _partial_=True, _convert_="all")
    print(_summary(recipe(out=cfg.out, **{name: cfg[name] for name in _SWITCHES})))


def _summary(prepared: Prepared) -> str:
    lines = [tally.line() for tally in prepared.tallies]
    counts = prepared.manifest.counts().to_string(index=False)
    root = prepared.manifest.root
    lines += ["", counts, "", f"Prepared: {root}", f"Look at:  {root}/contact_sheet.png"]
    if any(tally.skipped for tally in prepared.tallies):
        lines.append(f"Skipped:  {root}/skipped.csv")
    if prepared.next_step:
        lines.append(f"Next:     {prepared.next_step}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
