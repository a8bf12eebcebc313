from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fsvfm.errors import ConfigError
from fsvfm.schedule import ema_momentum, warmup_cosine

RECIPE = {"warmup_epochs": 4, "epochs": 20, "peak": 2e-3, "minimum": 1e-5}


@pytest.mark.parametrize(
    ("epoch", "value"),
    [(0, 0.0), (1, 5e-4), (3.5, 1.75e-3), (4, 2e-3), (12, 1.005e-3), (20, 1e-5), (25, 1e-5)],
)
def test_warmup_then_cosine(epoch: float, value: float) -> None:
    assert warmup_cosine(epoch, **RECIPE) == pytest.approx(value, rel=1e-12, abs=0)


def test_first_quarter_of_the_cosine() -> None:
    value = warmup_cosine(8, **RECIPE)
    assert value == pytest.approx(1e-5 + (2e-3 - 1e-5) * (1 + math.sqrt(0.5)) / 2)


@given(
    epochs=st.integers(1, 600),
    share=st.floats(0, 1),
    steps=st.lists(st.floats(0, 1), min_size=2, max_size=20),
    peak=st.floats(1e-6, 1),
)
def test_rises_in_the_warmup_and_falls_after(epochs: int, share: float, steps: list[float], peak: float) -> None:
    warmup = share * epochs
    options = {"warmup_epochs": warmup, "epochs": epochs, "peak": peak, "minimum": 0.1 * peak}
    points = [(step * epochs, warmup_cosine(step * epochs, **options)) for step in sorted(steps)]
    assert all(0 <= value <= peak * (1 + 1e-12) for _, value in points)
    for (epoch, first), (later, second) in itertools.pairwise(points):
        if later < warmup:
            assert first <= second
        elif epoch >= warmup:
            assert second <= first * (1 + 1e-12)


def test_no_warmup_starts_at_the_peak() -> None:
    assert warmup_cosine(0, warmup_epochs=0, epochs=10, peak=0.5) == 0.5


@pytest.mark.parametrize("change", [{"epochs": 0}, {"warmup_epochs": 21}, {"warmup_epochs": -1}])
def test_impossible_recipes_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="warm-up"):
        warmup_cosine(1, **{**RECIPE, **change})


def test_negative_progress_is_refused() -> None:
    with pytest.raises(ConfigError, match="epoch"):
        warmup_cosine(-0.1, **RECIPE)


@pytest.mark.parametrize(
    ("iteration", "value"), [(0, 0.9), (50, 0.9 + 0.1 * (1 - math.sqrt(0.5)) / 2), (100, 0.95), (200, 1.0), (300, 1.0)]
)
def test_momentum_follows_a_cosine(iteration: int, value: float) -> None:
    assert ema_momentum(iteration, base=0.9, final=1.0, iterations=200) == pytest.approx(value, rel=1e-12)


@given(base=st.floats(0, 1), iterations=st.integers(1, 10**6), share=st.floats(0, 1))
def test_momentum_stays_between_its_ends(base: float, iterations: int, share: float) -> None:
    momentum = ema_momentum(int(share * iterations), base=base, final=1.0, iterations=iterations)
    assert base - 1e-12 <= momentum <= 1.0


@pytest.mark.parametrize(
    "change", [{"iterations": 0}, {"iteration": -1}, {"base": 1.1}, {"final": -0.1}, {"base": math.nan}]
)
def test_impossible_momenta_are_refused(change: dict[str, float]) -> None:
    options = {"iteration": 0, "base": 0.996, "final": 1.0, "iterations": 10, **change}
    with pytest.raises(ConfigError, match="EMA"):
        ema_momentum(options.pop("iteration"), **options)
