"""``python -m fsvfm.train experiment=<name>``: fit, then test, as the agenda ``run`` says."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from fsvfm import cli


@hydra.main(version_base="1.3", config_path="pkg://fsvfm.configs", config_name="train")
@cli.guard
def main(cfg: DictConfig) -> None:
    """Train as configured."""
    from fsvfm.runner import train

    train(cfg)


if __name__ == "__main__":
    main()
