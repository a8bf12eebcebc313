"""``python -m fsvfm.train experiment=<name>``: fit, then test, as the agenda ``run`` says; with ``-m`` many times."""

from __future__ import annotations

from omegaconf import DictConfig

from fsvfm import cli


@cli.command("train")
def main(cfg: DictConfig) -> float | None:
    """Train as configured; a search is told the ``objective``."""
    from fsvfm.runner import apart, train, train_apart

    return train_apart(cfg) if apart(cfg) else train(cfg)


if __name__ == "__main__":
    main()
