"""``python -m fsvfm.evaluate experiment=<name>`` or ``ckpt=<checkpoint> protocol=<name>``: scores, metrics, tables."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from fsvfm import cli


@hydra.main(version_base="1.3", config_path="pkg://fsvfm.configs", config_name="evaluate")
@cli.guard
def main(cfg: DictConfig) -> None:
    """Evaluate as configured."""
    from fsvfm.runner import evaluate_once

    evaluate_once(cfg)


if __name__ == "__main__":
    main()
