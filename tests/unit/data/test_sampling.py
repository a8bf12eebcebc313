"""Balanced batches: every stream in equal parts, nothing lost, any batch from its number alone."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fsvfm.data.sampling import BalancedSampler, Draw, EpochSampler
from fsvfm.errors import DataError


def streams_of(sizes: list[int]) -> list[np.ndarray]:
    ends = np.cumsum(sizes)
    return np.split(np.arange(ends[-1]), ends[:-1])


def drawn(sampler: BalancedSampler, epochs: int, first: int = 0) -> list[list[Draw]]:
    batches = []
    for epoch in range(first, first + epochs):
        sampler.set_epoch(epoch)
        batches += list(sampler)
    return batches


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 13), min_size=1, max_size=5),
    share=st.integers(1, 4),
    world=st.integers(1, 3),
    steps=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_every_batch_is_balanced_and_no_row_is_lost(
    sizes: list[int], share: int, world: int, steps: int, seed: int
) -> None:
    size, streams = share * world, streams_of(sizes)
    options = {"seed": seed, "world_size": world}
    ranks = [drawn(BalancedSampler(streams, size, steps, rank=r, **options), 3) for r in range(world)]
    whole = drawn(BalancedSampler(streams, size, steps, seed=seed), 3)
    owner = {int(row): number for number, rows in enumerate(streams) for row in rows}
    seen: list[list[int]] = [[] for _ in streams]
    for step, batch in enumerate(whole):
        shares = [rank[step] for rank in ranks]
        assert all(len(part) == share * len(streams) for part in shares)
        for number in range(len(streams)):
            block = [draw for draw in batch if owner[draw.row] == number]
            assert len(block) == size
            # The processes' shares, one after the other, are the block of a single process.
            assert [draw for part in shares for draw in part if owner[draw.row] == number] == block
            seen[number] += [draw.row for draw in block]
    for rows, order in zip(streams, seen, strict=True):
        for start in range(0, len(order), len(rows)):
            piece = order[start : start + len(rows)]
            assert len(set(piece)) == len(piece)  # no row twice within a cycle …
            if len(piece) == len(rows):
                assert set(piece) == set(rows.tolist())  # … and none left out
        counts = Counter(order)
        assert max(counts.values()) - min(counts.get(int(row), 0) for row in rows) <= 1


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    epoch=st.integers(0, 40),
    start=st.integers(0, 6),
    seed=st.integers(0, 1000),
)
def test_any_batch_can_be_entered(sizes: list[int], epoch: int, start: int, seed: int) -> None:
    whole = BalancedSampler(streams_of(sizes), 4, 7, seed=seed)
    part = BalancedSampler(streams_of(sizes), 4, 7, seed=seed)
    whole.set_epoch(epoch)
    part.set_epoch(epoch, start=start)
    assert list(part) == list(whole)[start:]
    part.set_epoch(epoch)  # announced again by the trainer: the start is kept
    assert len(list(part)) == 7 - start
    part.set_epoch(epoch + 1)
    assert len(list(part)) == 7


def test_the_order_is_the_stated_permutations_and_seeds_never_repeat() -> None:
    sampler = BalancedSampler([np.array([5, 6, 7]), np.array([1, 9])], 6, 4, seed=11)
    batches = drawn(sampler, 2)
    first = [draw.row for batch in batches for draw in batch[:6]]
    cycles = [tuple(first[i : i + 3]) for i in range(0, len(first), 3)]
    assert len(set(cycles)) > 1  # shuffled anew each cycle
    assert len({draw.seed for batch in batches for draw in batch}) == 8 * 12  # another augmentation at each occurrence
    assert drawn(BalancedSampler([np.array([5, 6, 7]), np.array([1, 9])], 6, 4, seed=12), 2) != batches
    # Streams of equal size are shuffled differently.
    twins = next(iter(BalancedSampler([np.arange(20), np.arange(20)], 20, 1)))
    assert [draw.row for draw in twins[:20]] != [draw.row for draw in twins[20:]]


def test_prefetching_crosses_no_epoch() -> None:
    sampler = BalancedSampler(streams_of([5, 3]), 2, 4)
    loader = iter(sampler)
    head = list(islice(loader, 1))
    sampler.set_epoch(3)
    sampler_zero = BalancedSampler(streams_of([5, 3]), 2, 4)
    assert head + list(loader) == list(sampler_zero)


def test_impossible_samplers_are_refused() -> None:
    with pytest.raises(DataError, match=r"24 images .* 5 processes"):
        BalancedSampler(streams_of([3]), 24, 10, world_size=5)
    with pytest.raises(DataError, match=r"stream\(s\) \[1\]"):
        BalancedSampler([np.arange(3), np.arange(0)], 4, 10)
    with pytest.raises(DataError, match="no row"):
        BalancedSampler([], 4, 10)


@settings(max_examples=40, deadline=None)
@given(
    weights=st.lists(st.floats(0.01, 10), min_size=4, max_size=60),
    seed=st.integers(0, 5),
)
def test_weighted_rows_come_as_often_as_their_weight_says(weights: list[float], seed: int) -> None:
    share = np.array(weights) / np.sum(weights)
    sampler = EpochSampler(len(share), 1, weights=share, seed=seed)
    drawn = np.bincount([batch[0].row for batch in sampler], minlength=len(share))
    assert drawn.sum() == len(share)
    assert (np.abs(drawn - len(share) * share) < 1 + 1e-9).all()  # floor or ceiling of the expectation
    draws = [batch[0] for batch in sampler]
    assert len({draw.seed for draw in draws}) == len(draws)  # a row that comes twice is augmented anew


def test_weighted_epochs_are_shared_and_resumed_like_others() -> None:
    weights = np.array([0.5] + [0.5 / 31] * 31)
    whole = [draw for batch in EpochSampler(32, 8, weights=weights, seed=2) for draw in batch]
    parts = [list(EpochSampler(32, 4, weights=weights, seed=2, rank=rank, world_size=2)) for rank in range(2)]
    dealt = [draw for step in zip(*parts, strict=True) for batch in step for draw in batch]
    assert dealt == whole
    again = EpochSampler(32, 8, weights=weights, seed=2)
    again.set_epoch(0, start=2)
    assert [draw for batch in again for draw in batch] == whole[16:]
