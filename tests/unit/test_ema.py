from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fsvfm.ema import ema_update


def tensors(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in [(3,), (2, 4), (1, 1, 5)]]


@settings(max_examples=30, deadline=None)
@given(weight=st.floats(0, 1), seed=st.integers(0, 99), as_tensor=st.booleans())
def test_average_by_the_formula(weight: float, seed: int, as_tensor: bool) -> None:
    target, online = tensors(seed), tensors(seed + 1000)
    expected = [(1 - weight) * t.double() + weight * o.double() for t, o in zip(target, online, strict=True)]
    before = [o.clone() for o in online]
    ema_update(target, online, torch.tensor(weight) if as_tensor else weight)
    for actual, value in zip(target, expected, strict=True):
        torch.testing.assert_close(actual.double(), value, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(online, before, strict=True))


@pytest.mark.parametrize("weight", [0.0, torch.tensor(0.0)])
def test_weight_zero_changes_no_bit(weight: float | torch.Tensor) -> None:
    target = tensors(0)
    ema_update(target, tensors(1), weight)
    assert all(torch.equal(a, b) for a, b in zip(target, tensors(0), strict=True))


@pytest.mark.parametrize("weight", [0.004, torch.tensor(0.004)])
def test_equal_tensors_stay_as_they_are(weight: float | torch.Tensor) -> None:
    target = tensors(0)
    ema_update(target, tensors(0), weight)
    assert all(torch.equal(a, b) for a, b in zip(target, tensors(0), strict=True))


def test_parameters_are_updated_in_place_without_gradient() -> None:
    target = torch.nn.Linear(3, 2).requires_grad_(False)
    online = torch.nn.Linear(3, 2)
    pointers = [p.data_ptr() for p in target.parameters()]
    ema_update(target.parameters(), online.parameters(), 0.25)
    assert [p.data_ptr() for p in target.parameters()] == pointers
    assert all(p.grad_fn is None and not p.requires_grad for p in target.parameters())


def test_lists_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"3 target and 2 online"):
        ema_update(tensors(0), tensors(1)[:2], 0.1)
    ema_update([], [], 0.1)
