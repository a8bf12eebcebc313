"""Lightning data modules: manifests to loaders whose order survives interruption."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from fsvfm.data.datasets import LabelledFaces, PretrainFaces, collate
from fsvfm.data.manifest import Manifest
from fsvfm.data.sampling import BalancedSampler, EpochSampler, ResumableSampler, derive_seed
from fsvfm.data.transforms import test_transform, train_transform
from fsvfm.errors import ConfigError, DataError


def _one_thread(_: int) -> None:
    """Loader workers share the cores; OpenCV's own pool would fight with them."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def make_loader(dataset: Dataset[Any], *, workers: int, **options: Any) -> DataLoader[Any]:
    """A DataLoader as every command uses it: pinned where a GPU waits, workers kept between epochs."""
    return DataLoader(
        dataset,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=_one_thread,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        **options,
    )


def _augmented(rows: Manifest, image_size: int, augment: dict[str, Any]) -> LabelledFaces:
    """Training faces of a detector; of ``augment``, what happens on single images."""
    here = {name: augment[name] for name in ("crop_scale", "flip", "rand_augment", "saturation")}
    return LabelledFaces(rows, train_transform(image_size, **here))


class FaceDataModule(pl.LightningDataModule):
    """What pre-training and detector data share: a resumable training loader.

    The position inside an epoch is saved with Lightning's checkpoints and restored before the first batch.
    """

    def __init__(self, *, batch_size: int, workers: int, seed: int) -> None:
        super().__init__()
        self.batch_size, self.workers, self.seed = batch_size, workers, seed
        self.row_weights: np.ndarray | None = None  # (N,) of the training rows; None draws each once per epoch
        self._sampler: ResumableSampler | None = None
        self._resume: dict[str, int] = {}

    def training_rows(self) -> Dataset[Any]:
        """The training data set."""
        raise NotImplementedError

    def sampler(self, rank: int, world_size: int) -> ResumableSampler:
        """Which training rows come when, for one process; by default all of them, once per epoch."""
        length = len(self.training_rows())  # type: ignore[arg-type]
        return EpochSampler(
            length, self.batch_size, weights=self.row_weights, seed=self.seed, rank=rank, world_size=world_size
        )

    def train_dataloader(self) -> DataLoader[Any]:
        """Loader of this process's share of every epoch."""
        self._sampler = self.sampler(*self.process)
        if self._resume:
            self._sampler.set_epoch(self._resume["epoch"], start=self._position())
        return make_loader(self.training_rows(), workers=self.workers, batch_sampler=self._sampler)

    def _position(self) -> int:
        """Batches of the epoch that are done already.

        They are counted anew, in Lightning's progress too, where a micro-batch over all processes has another size than
        before the interruption. An epoch's order does not depend on it, so that with the same effective batch the next
        step takes the images that it would have taken.
        """
        done, images = self._resume["batches"], self.batch_size * self.process[1]
        before = self._resume.get("images", images)
        if self.trainer is None or self._sampler is None or images == before:
            return done
        accumulate = self.trainer.accumulate_grad_batches
        there = done * before // (images * accumulate) * accumulate
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        under_way = progress.ready - progress.completed
        progress.ready = progress.started = progress.processed = there if done else len(self._sampler)
        progress.completed = progress.ready - under_way
        return there

    @property
    def process(self) -> tuple[int, int]:
        """Index of this process, and how many there are."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def in_order(self, rows: LabelledFaces) -> DataLoader[Any]:
        """Loader of this process's share of all rows, in order and without padding, for validation."""
        rank, world = self.process
        sampler = range(rank, len(rows), world)
        return make_loader(rows, workers=self.workers, batch_size=self.batch_size, sampler=sampler)

    def state_dict(self) -> dict[str, Any]:
        """The epoch, how many of its batches have been used, and the images of a batch over all processes."""
        if self._sampler is None or self.trainer is None:
            return dict(self._resume)
        taken = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        finished = taken >= self.trainer.num_training_batches
        images = self.batch_size * self.process[1]
        return {"epoch": self._sampler.epoch + finished, "batches": 0 if finished else taken, "images": images}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the checkpoint was written."""
        self._resume = {key: int(value) for key, value in state_dict.items()}


class PretrainData(FaceDataModule):
    """Unlabelled real faces for pre-training; any number of manifests, concatenated.

    Args:
        manifests: prepared folders or manifest files.
        split: rows with this ``split``; null takes all.
        image_size: side in pixels.
        patch_size: side of a patch in pixels.
        batch_size: images per device and micro-batch.
        workers: loader processes per device.
        crop_scale: area range of a random resized crop with flip; null (papers) uses the whole face.
        need_regions: whether the masking strategy uses facial regions.
        limit: use only the first rows after a seeded shuffle (data-scale ablations); null uses all.
        weights: share of every data set in the draws, {name: share}, whatever its size; null draws each row once.
        seed: of order and augmentation.
    """

    def __init__(
        self,
        manifests: list[str],
        *,
        split: str | None,
        image_size: int,
        patch_size: int,
        batch_size: int,
        workers: int,
        crop_scale: tuple[float, float] | None = None,
        need_regions: bool = True,
        limit: int | None = None,
        weights: dict[str, float] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, workers=workers, seed=seed)
        manifest = Manifest.concat([Manifest.read(path, extra=[f"grid_p{patch_size}", "parse"]) for path in manifests])
        self.manifest = manifest.select(split=split, label=0)
        if limit is not None:
            self.manifest = self.manifest.sample(limit, seed)
        if weights is not None:
            self.row_weights = self.manifest.sampling_weights(datasets=weights)
        self.dataset = PretrainFaces(
            self.manifest,
            image_size=image_size,
            patch_size=patch_size,
            crop_scale=tuple(crop_scale) if crop_scale else None,  # type: ignore[arg-type]
            need_regions=need_regions,
        )

    def training_rows(self) -> PretrainFaces:
        """Real faces with region grids."""
        return self.dataset


class ForgeryData(FaceDataModule):
    """Labelled faces for detectors: a training and a validation selection of one or more manifests.

    Args:
        manifests: prepared folders or manifest files.
        methods: manipulation methods to train on (``real`` is always included); null takes all.
        image_size: side in pixels.
        batch_size: images per device and micro-batch.
        workers: loader processes per device.
        augment: values of the ``augment`` group, of which ``crop_scale``, ``flip``, ``rand_augment`` and
            ``saturation`` happen here.
        balance: ``class`` draws as many reals as fakes, ``method`` moreover all methods equally often, ``batch`` puts
            exactly as many reals as fakes into every batch; null draws each row once per epoch.
        weights: share of every data set in the draws, {name: share}, whatever its size; null leaves them.
        fraction: share of the training videos of every data set and method (label-efficiency ablations); null takes
            all. Smaller shares of one seed are part of larger ones. Validation stays whole.
        seed: of order and augmentation.

    Raises:
        ConfigError: with ``balance="batch"``, an odd ``batch_size``, or ``weights``.
    """

    def __init__(
        self,
        manifests: list[str],
        *,
        methods: list[str] | None,
        image_size: int,
        batch_size: int,
        workers: int,
        augment: dict[str, Any],
        balance: str | None = None,
        weights: dict[str, float] | None = None,
        fraction: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, workers=workers, seed=seed)
        manifest = Manifest.concat([Manifest.read(path, extra=()) for path in manifests])
        if methods is not None:
            manifest = manifest.select(methods=["real", *methods])
        self.train = _share_of_videos(manifest.select(split="train"), fraction, seed)
        self.val = manifest.select(split="val")
        self.train.require_both_classes("training")
        self.val.require_both_classes("validation")
        self.halves = balance == "batch"
        if self.halves and (batch_size % 2 or weights is not None):
            raise ConfigError(
                f"data.balance=batch with data.batch_size={batch_size} and data.weights={weights}: expected an even "
                "batch size, half of it real faces, and no weights"
            )
        if not self.halves and (balance is not None or weights is not None):
            self.row_weights = self.train.sampling_weights(balance=balance, datasets=weights)
        self.train_rows = _augmented(self.train, image_size, augment)
        self.val_rows = LabelledFaces(self.val, test_transform(image_size))

    def training_rows(self) -> LabelledFaces:
        """Augmented training faces."""
        return self.train_rows

    def sampler(self, rank: int, world_size: int) -> ResumableSampler:
        """With halves of one class each, an epoch has as many batches as if every row were drawn once."""
        if not self.halves:
            return super().sampler(rank, world_size)
        batch = self.batch_size * world_size
        streams = [np.flatnonzero(self.train_rows.labels == label) for label in (0, 1)]
        batches = max(1, len(self.train_rows) // batch)
        return BalancedSampler(streams, batch // 2, batches, seed=self.seed, rank=rank, world_size=world_size)

    def val_dataloader(self) -> DataLoader[Any]:
        """All validation faces, dealt to the processes."""
        return self.in_order(self.val_rows)


#: How the checkpoint that counts is chosen in anti-spoofing: see :class:`AntispoofData`.
SELECTIONS = ("last", "source_best", "target_best")


def _share_of_videos(rows: Manifest, fraction: float | None, seed: int) -> Manifest:
    """All rows of a share of the videos, of every data set, class and method alike and at least one of each."""
    if fraction is None:
        return rows
    if not 0 < fraction <= 1:
        raise ConfigError(f"data.fraction={fraction}: expected a share of the training videos in (0, 1], or null")
    kept = np.zeros(len(rows), dtype=bool)
    for (name, label, method), group in rows.table.groupby(["dataset", "label", "method"], sort=False, observed=True):
        videos = np.sort(group["video"].astype(str).unique())
        order = np.random.default_rng(derive_seed(seed, zlib.crc32(f"{name}/{label}/{method}".encode())))
        chosen = order.permutation(videos)[: max(1, round(fraction * len(videos)))]
        kept[group.index] |= group["video"].astype(str).isin(chosen).to_numpy()
    return rows._subset(kept)


class AntispoofData(FaceDataModule):
    """Real faces and attacks in equal parts from several source domains; one more domain, the target, is for testing.

    Every batch has ``batch_size`` real faces and as many attacks of every source domain (02 §5), drawn by
    :class:`~fsvfm.data.sampling.BalancedSampler`. Training takes the first frame of every training video. Some source
    videos are held out: they choose the checkpoint, or calibrate it. The target's test videos are looked at in training
    only with ``selection="target_best"``, the way of the published tables.

    A data set is recognised by the manifests' column ``dataset``. Optional columns: ``shot`` and ``source``.

    Args:
        manifests: prepared folders or manifest files, which hold the source domains (column ``dataset``) and, for
            ``target_best`` and few-shot training, the target.
        domains: data sets of the protocol; all but the target are sources.
        target: the data set to leave out.
        shots: add so many of the target's videos of each class (column ``shot`` above 0, the published lists) as one
            more domain; 0 adds none. How often a list repeats a video does not matter: a stream never ends.
        val_share: share of the source videos, by domain and class, that is held out of training.
        selection: what validation looks at: the held-out source videos (``last``, ``source_best``), or the target's
            test videos (``target_best``).
        image_size: side in pixels.
        batch_size: images of each class and domain in a step, over all devices.
        evaluate_every: optimisation steps between validations; this is the length of an epoch.
        workers: loader processes per device.
        augment: values of the ``augment`` group, as in :class:`ForgeryData`.
        seed: of held-out videos, order and augmentation.

    Attributes:
        train: manifest of the training images, stream after stream.
        val: manifest of all frames of the held-out source videos, or None with ``val_share: 0``.
        streams: (domain, label) of each stream.

    Raises:
        ConfigError: a target outside the protocol, an unknown selection, or one without anything to select on.
        DataError: a domain that is not in the manifests or lacks a class, too few shots.
    """

    def __init__(
        self,
        manifests: list[str],
        *,
        domains: list[str],
        target: str,
        shots: int,
        val_share: float,
        selection: str,
        image_size: int,
        batch_size: int,
        evaluate_every: int,
        workers: int,
        augment: dict[str, Any],
        seed: int = 0,
    ) -> None:
        if target not in domains:
            raise ConfigError(
                f"data.target={target} is no data set of this protocol ({', '.join(domains)}); choose another "
                "target=…, or the protocol it belongs to: data=fas_mcio (target=M, C, I, O) or data=fas_wcs "
                "(target=W, CeFA, S)"
            )
        if selection not in SELECTIONS:
            raise ConfigError(f"task.selection={selection!r} does not exist; choose one of {', '.join(SELECTIONS)}")
        if not 0 <= val_share < 1 or (selection == "source_best" and not val_share):
            raise ConfigError(
                f"data.val_share={val_share} with task.selection={selection}: expected a share in [0, 1), above 0 for "
                "source_best, which chooses on held-out source videos"
            )
        manifest = Manifest.concat([Manifest.read(path) for path in manifests])
        sources = [name for name in domains if name != target]
        _require_datasets(manifest, [*sources, target] if shots or selection == "target_best" else sources)
        table = manifest.table
        training, shot = _training_rows(table), _number(table, "shot") > 0
        held = _held_out(table, training & table["dataset"].isin(sources).to_numpy(), val_share, seed)
        usable = dict.fromkeys(sources, training & ~held)
        if shots:
            usable[target] = shot & ~_is(table, "split", "test")
        rows = {
            (name, label): _first_frames(table, which & _is(table, "dataset", name) & _is(table, "label", label))
            for name, which in usable.items()
            for label in (0, 1)
        }
        for (name, label), found in rows.items():
            needed = shots if name == target else 1
            if len(found) < needed:
                raise DataError(
                    f"the domain {name} has {len(found)} {'attack' if label else 'real'} video(s) to train on, "
                    f"expected {needed} or more: every batch needs both classes of every domain. There are:\n"
                    f"{manifest.counts().to_string(index=False)}"
                )
            rows[name, label] = found[:shots] if name == target else found
        # For one device; `setup` shares it among several.
        super().__init__(batch_size=batch_size * len(rows), workers=workers, seed=seed)
        self.size, self.evaluate_every = batch_size, evaluate_every
        self.streams = list(rows)
        self.train = manifest._subset(np.concatenate(list(rows.values())))
        self._positions = np.split(np.arange(len(self.train)), np.cumsum([len(found) for found in rows.values()])[:-1])
        self.val = manifest._subset(held) if held.any() else None
        watched = manifest.select(split="test", datasets=target) if selection == "target_best" else self.val
        if watched is not None:
            watched.require_both_classes("validation")
        self.train_rows = _augmented(self.train, image_size, augment)
        self.val_rows = LabelledFaces(watched, test_transform(image_size)) if watched is not None else None

    def setup(self, stage: str) -> None:
        """Learn the number of devices among which a batch is shared."""
        self.batch_size = self.size * len(self.streams) // self.process[1]

    def training_rows(self) -> LabelledFaces:
        """Augmented training faces."""
        return self.train_rows

    def sampler(self, rank: int, world_size: int) -> BalancedSampler:
        """The same number of images of every class and domain in every batch."""
        steps = self.evaluate_every * (self.trainer.accumulate_grad_batches if self.trainer else 1)
        return BalancedSampler(self._positions, self.size, steps, seed=self.seed, rank=rank, world_size=world_size)

    def val_dataloader(self) -> Any:
        """All frames of the videos that validation looks at, dealt to the processes; nothing if there are none."""
        return self.in_order(self.val_rows) if self.val_rows is not None else []


def _require_datasets(manifest: Manifest, names: Sequence[str]) -> None:
    """Raise DataError unless a manifest has images of all these data sets."""
    there = set(manifest.table["dataset"])
    missing = [name for name in names if name not in there]
    if missing:
        raise DataError(
            f"{manifest.source} has no image of the data set(s) {', '.join(missing)}; there are "
            f"{', '.join(sorted(there))}. Add their folders to data.manifests, or leave them out of data.domains"
        )


def _is(table: pd.DataFrame, column: str, value: str | int) -> np.ndarray:
    return (table[column] == value).to_numpy()


def _number(table: pd.DataFrame, column: str) -> np.ndarray:
    """A column of numbers that not every manifest has; NaN where it says nothing."""
    return table[column].to_numpy(dtype=np.float64) if column in table else np.full(len(table), np.nan)


def _training_rows(table: pd.DataFrame) -> np.ndarray:
    """Mask of the rows that a data set contributes as a source.

    Published lists may name test files among a source's training files (a data set is a source or the target, never
    both): the column ``source`` then says which they are. Without it they are the rows of the training split that are
    not there for few-shot training alone (``shot`` 2).
    """
    source = _number(table, "source")
    usual = _is(table, "split", "train") & (_number(table, "shot") != 2)
    return np.where(np.isnan(source), usual, source == 1)


def _first_frames(table: pd.DataFrame, which: np.ndarray) -> np.ndarray:
    """Row numbers of the first frame of every video among the rows of a mask, in their order."""
    rows = table.loc[which, ["video", "frame"]].reset_index()
    return np.sort(rows.sort_values("frame", kind="stable").drop_duplicates("video")["index"].to_numpy())


def _held_out(table: pd.DataFrame, which: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Mask of the rows, among those of a mask, whose videos are held out: a share of every data set's real and attack
    videos, at least one if there are two.
    """
    held = np.zeros(len(table), dtype=bool)
    if not share:
        return held
    for number, (_, rows) in enumerate(table[which].groupby(["dataset", "label"])):
        videos = np.sort(rows["video"].unique())
        count = min(max(round(share * len(videos)), 1), len(videos) - 1)
        chosen = np.random.default_rng(derive_seed(seed, number)).permutation(videos)[:count]
        held[rows.index[rows["video"].isin(chosen)]] = True
    return held
