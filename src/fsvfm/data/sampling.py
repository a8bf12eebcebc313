"""Which sample comes when: a seeded order per epoch that any process can compute and any run can re-enter.

Nothing random is stored. The order of an epoch and the seed of every augmentation follow from
``(seed, epoch, position)``, so a run resumed in the middle of an epoch, or with another number of loader workers,
sees exactly what the uninterrupted run would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


class ResumableSampler(Sampler[list[Draw]]):
    """Batches of :class:`Draw` for one process of a distributed run; used as a DataLoader's ``batch_sampler``.

    Sub-classes say how many batches an epoch has (``__len__``) and what they are (:meth:`batches`), as a function of
    their arguments and the epoch alone.
    """

    def __init__(self, *, seed: int, rank: int, world_size: int) -> None:
        self.seed, self.rank, self.world_size = seed, rank, world_size
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
        raise NotImplementedError

    def batches(self, epoch: int, start: int) -> Iterator[list[Draw]]:
        """Batches of an epoch for this process, from number ``start`` on."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[list[Draw]]:
        # Epoch and start are fixed here, not at the first `next`: loaders may prefetch before the epoch is announced.
        return self.batches(self.epoch, self.start)


class EpochSampler(ResumableSampler):
    """Every row once per epoch or, with weights, as often as its weight says.

    Each epoch is one permutation of all rows, dealt to the processes batch by batch; what does not fill a batch on
    every process is left out of that epoch (another permutation, so other rows, next time). Static batch shapes keep
    ``torch.compile`` and the effective-batch rule honest. With weights, the N draws of an epoch are a systematic
    sample: row i comes ⌊N·wᵢ⌋ or ⌈N·wᵢ⌉ times, which varies less than independent draws would.

    Args:
        length: number of rows in the data set.
        batch_size: rows per batch and process.
        weights: (N,) probability of each row to be drawn, summing to 1; None draws each once.
        seed: of the permutations and augmentations.
        rank: index of this process.
        world_size: number of processes.

    Raises:
        DataError: fewer rows than one batch for every process.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        weights: np.ndarray | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(seed=seed, rank=rank, world_size=world_size)
        if length < batch_size * world_size:
            raise DataError(
                f"the training set has {length} images, fewer than one batch of {batch_size} for each of "
                f"{world_size} process(es); lower data.batch_size to at most {length // world_size} or add data"
            )
        self.length, self.batch_size = length, batch_size
        self.cumulative = None if weights is None else np.cumsum(weights)

    def __len__(self) -> int:
        return self.length // (self.batch_size * self.world_size)

    def batches(self, epoch: int, start: int) -> Iterator[list[Draw]]:
        """Consecutive pieces of the epoch's permutation."""
        rng = np.random.default_rng(derive_seed(self.seed, epoch))
        if self.cumulative is None:
            order = rng.permutation(self.length)
        else:
            points = (np.arange(self.length) + rng.random()) / self.length
            rows = np.searchsorted(self.cumulative, points, side="right")
            order = rng.permutation(np.minimum(rows, self.length - 1))  # rounding may leave the last sum below 1
        per_step = self.batch_size * self.world_size
        for step in range(start, len(self)):
            place = step * per_step + self.rank * self.batch_size
            # By place where a row may come twice in an epoch: each time it is augmented anew.
            yield [
                Draw(int(i), derive_seed(self.seed, epoch, int(i) if self.cumulative is None else self.length + n))
                for n, i in enumerate(order[place : place + self.batch_size], place)
            ]


class BalancedSampler(ResumableSampler):
    """The same number of rows of every stream in every batch, whatever the streams' sizes (FS-VFM, anti-spoofing).

    A stream (one class of one source domain) is an endless concatenation of permutations of its rows: element k is
    ``permutation(seed, stream, k // n)[k % n]`` for n rows. Batch t holds the elements ``t · size`` to
    ``(t + 1) · size − 1`` of every stream, so small domains come round more often than large ones, each at its own
    pace, and none loses a row. Any batch can be computed without those before it. Process r of w takes the r-th of w
    equal pieces of every stream's block: together they are the batch of a single process.

    Args:
        streams: rows of the data set, one array for each stream.
        size: rows of each stream in a batch, over all processes.
        batches_per_epoch: length of an epoch; the next one goes on where this one ends.
        seed: of the permutations and augmentations.
        rank: index of this process.
        world_size: number of processes.

    Raises:
        DataError: an empty stream, or a size that the processes cannot share equally.
    """

    def __init__(
        self,
        streams: Sequence[np.ndarray],
        size: int,
        batches_per_epoch: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(seed=seed, rank=rank, world_size=world_size)
        empty = [number for number, rows in enumerate(streams) if len(rows) == 0]
        if empty or not streams:
            raise DataError(
                f"no row to draw from in stream(s) {empty or 'none was given'}; each batch needs all of them"
            )
        if size < 1 or size % world_size:
            raise DataError(
                f"{size} images of every class and domain cannot be shared equally by {world_size} processes; choose a "
                "number of devices that divides data.batch_size, or another data.batch_size"
            )
        self.streams = [np.asarray(rows) for rows in streams]
        self.size, self.batches_per_epoch = size, batches_per_epoch
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def __len__(self) -> int:
        return self.batches_per_epoch

    def element(self, stream: int, k: int) -> Draw:
        """The k-th row of a stream, and the seed of this occurrence's augmentation."""
        rows = self.streams[stream]
        cycle, place = divmod(k, len(rows))
        if self._orders.get(stream, (-1,))[0] != cycle:  # kept while it lasts; it follows from its number alone
            order = np.random.default_rng(derive_seed(self.seed, stream, cycle)).permutation(rows)
            self._orders[stream] = (cycle, order)
        return Draw(int(self._orders[stream][1][place]), derive_seed(self.seed, stream, k, 1))

    def batches(self, epoch: int, start: int) -> Iterator[list[Draw]]:
        """The piece of every stream's block that this process takes, stream after stream."""
        share = self.size // self.world_size
        for t in range(epoch * len(self) + start, (epoch + 1) * len(self)):
            first = t * self.size + self.rank * share
            yield [self.element(stream, first + j) for stream in range(len(self.streams)) for j in range(share)]
