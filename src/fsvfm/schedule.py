"""Schedules as plain functions of the training progress (FS-VFM, optimisation; numbers in, number out)."""

from __future__ import annotations

import math

from fsvfm.errors import ConfigError


def warmup_cosine(epoch: float, *, warmup_epochs: float, epochs: float, peak: float, minimum: float = 0.0) -> float:
    """Learning rate: linear warm-up from 0 to `peak`, then half a cosine down to `minimum`.

    Evaluated per optimisation step at the fractional epoch.

    Args:
        epoch: progress in epochs, >= 0, fractional; past `epochs` the value stays at `minimum`.
        warmup_epochs: length of the warm-up in epochs, in [0, epochs].
        epochs: length of the training in epochs, > 0.
        peak: value at the end of the warm-up.
        minimum: value at the end of the training.

    Raises:
        ConfigError: epochs, warm-up or progress out of range.
    """
    if epochs <= 0 or not 0 <= warmup_epochs <= epochs:
        raise ConfigError(
            f"warm-up of {warmup_epochs} in {epochs} epochs; expected epochs > 0 and 0 <= warm-up <= epochs."
        )
    if epoch < 0:
        raise ConfigError(f"epoch is {epoch}; expected a progress of 0 or more.")
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    if epoch >= epochs:
        return minimum
    progress = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    return minimum + (peak - minimum) * 0.5 * (1.0 + math.cos(math.pi * progress))


def ema_momentum(iteration: int, *, base: float = 0.996, final: float = 1.0, iterations: int) -> float:
    """Momentum of the target network: a cosine from `base` at iteration 0 to `final` at `iterations` and after.

    An iteration is whatever the update is counted by: an optimisation step, or a micro-batch (reference).

    Args:
        iteration: index of the update, >= 0.
        base: first value, in [0, 1].
        final: last value, in [0, 1].
        iterations: number of updates in the whole training, > 0.

    Raises:
        ConfigError: a value out of range.
    """
    if iterations <= 0 or iteration < 0:
        raise ConfigError(f"EMA iteration {iteration} of {iterations}; expected iteration >= 0 and iterations > 0.")
    if not (0.0 <= base <= 1.0 and 0.0 <= final <= 1.0):
        raise ConfigError(f"EMA momentum from {base} to {final}; expected values in [0, 1].")
    progress = min(iteration / iterations, 1.0)
    return final - (final - base) * 0.5 * (1.0 + math.cos(math.pi * progress))
