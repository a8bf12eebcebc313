"""Which sample comes when: a seeded order per epoch that any process can compute and any run can re-enter.

Nothing random is stored. The order of an epoch and the seed of every augmentation follow from
``(seed, epoch, position)``, so a run resumed in the middle of an epoch, or with another number of loader workers,
sees exactly what the uninterrupted run would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from fsvfm.errors import DataError


class Draw(NamedTuple):
    """One request to a data set: which row, and the seed of everything random that happens to it."""

    row: int
    seed: int


def derive_seed(*parts: int) -> int:
    """Mix integers into one seed in [0, 2⁶³); different tuples give unrelated seeds."""
    return int(np.random.SeedSequence([part & 0xFFFFFFFF for part in parts]).generate_state(1, np.uint64)[0] >> 1)


class EpochSampler(Sampler[list[Draw]]):
    """Batches of :class:`Draw` for one process of a distributed run; used as a DataLoader's ``batch_sampler``.

    Each epoch is one permutation of all rows, dealt to the processes batch by batch; what does not fill a batch on
    every process is left out of that epoch (another permutation, so other rows, next time). Static batch shapes keep
    ``torch.compile`` and the effective-batch rule honest.

    Args:
        length: number of rows in the data set.
        batch_size: rows per batch and process.
        seed: of the permutations and augmentations.
        rank: index of this process.
        world_size: number of processes.

    Raises:
        DataError: fewer rows than one batch for every process.
    """

    def __init__(self, length: int, batch_size: int, *, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        if length < batch_size * world_size:
            raise DataError(
                f"the training set has {length} images, fewer than one batch of {batch_size} for each of "
                f"{world_size} process(es); lower data.batch_size to at most {length // world_size} or add data"
            )
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self.start = 0
        # Lightning looks for `batch_sampler.sampler.set_epoch`.
        self.sampler = self

    def set_epoch(self, epoch: int, start: int | None = None) -> None:
        """Choose the epoch; ``start`` is the first batch to yield (kept when the epoch stays the same)."""
        if start is not None:
            self.start = start
        elif epoch != self.epoch:
            self.start = 0
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[Draw]]:
        # Everything is fixed here, not at the first `next`: loaders may prefetch before the epoch is announced.
        order = np.random.default_rng(derive_seed(self.seed, self.epoch)).permutation(self.length)
        per_step = self.batch_size * self.world_size
        epoch = self.epoch
        batches = (
            order[step * per_step + self.rank * self.batch_size :][: self.batch_size]
            for step in range(self.start, len(self))
        )
        return ([Draw(int(i), derive_seed(self.seed, epoch, int(i))) for i in batch] for batch in batches)
