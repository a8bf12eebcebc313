"""``python -m fsvfm.evaluate experiment=<name>`` or ``ckpt=<checkpoint> protocol=<name>``: scores, metrics, tables."""

from __future__ import annotations

from omegaconf import DictConfig

from fsvfm import cli


@cli.command("evaluate")
def main(cfg: DictConfig) -> None:
    """Evaluate as configured."""
    from fsvfm.runner import evaluate_once

    evaluate_once(cfg)


if __name__ == "__main__":
    main()
