"""Lightning data modules: manifests to loaders whose order survives interruption."""

from __future__ import annotations

from typing import Any

import cv2
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from fsvfm.data.datasets import LabelledFaces, PretrainFaces, collate
from fsvfm.data.manifest import Manifest
from fsvfm.data.sampling import EpochSampler
from fsvfm.data.transforms import test_transform, train_transform


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


class FaceDataModule(pl.LightningDataModule):
    """What pre-training and detector data share: a resumable training loader.

    The position inside an epoch is saved with Lightning's checkpoints and restored before the first batch.
    """

    def __init__(self, *, batch_size: int, workers: int, seed: int) -> None:
        super().__init__()
        self.batch_size, self.workers, self.seed = batch_size, workers, seed
        self._sampler: EpochSampler | None = None
        self._resume: dict[str, int] = {}

    def training_rows(self) -> Dataset[Any]:
        """The training data set."""
        raise NotImplementedError

    def train_dataloader(self) -> DataLoader[Any]:
        """Loader of this process's share of every epoch."""
        rows = self.training_rows()
        rank = self.trainer.global_rank if self.trainer else 0
        world = self.trainer.world_size if self.trainer else 1
        self._sampler = EpochSampler(
            len(rows),  # type: ignore[arg-type]
            self.batch_size,
            seed=self.seed,
            rank=rank,
            world_size=world,
        )
        if self._resume:
            self._sampler.set_epoch(self._resume["epoch"], start=self._resume["batches"])
        return make_loader(rows, workers=self.workers, batch_sampler=self._sampler)

    def state_dict(self) -> dict[str, Any]:
        """The epoch, and how many of its batches have been used."""
        if self._sampler is None or self.trainer is None:
            return dict(self._resume)
        taken = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        finished = taken >= self.trainer.num_training_batches
        return {"epoch": self._sampler.epoch + finished, "batches": 0 if finished else taken}

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
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, workers=workers, seed=seed)
        manifest = Manifest.concat([Manifest.read(path) for path in manifests])
        self.manifest = manifest.select(split=split, label=0)
        if limit is not None:
            self.manifest = self.manifest.sample(limit, seed)
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
        augment: values of the ``augment`` group, of which ``crop_scale``, ``flip`` and ``rand_augment`` happen here.
        seed: of order and augmentation.
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
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, workers=workers, seed=seed)
        manifest = Manifest.concat([Manifest.read(path) for path in manifests])
        if methods is not None:
            manifest = manifest.select(methods=["real", *methods])
        self.train = manifest.select(split="train")
        self.val = manifest.select(split="val")
        self.train.require_both_classes("training")
        self.val.require_both_classes("validation")
        transform = train_transform(
            image_size,
            crop_scale=augment["crop_scale"],
            flip=augment["flip"],
            rand_augment=augment["rand_augment"],
        )
        self.train_rows = LabelledFaces(self.train, transform)
        self.val_rows = LabelledFaces(self.val, test_transform(image_size))

    def training_rows(self) -> LabelledFaces:
        """Augmented training faces."""
        return self.train_rows

    def val_dataloader(self) -> DataLoader[Any]:
        """All validation faces, in order, dealt to the processes without padding."""
        world = self.trainer.world_size if self.trainer else 1
        rank = self.trainer.global_rank if self.trainer else 0
        sampler = range(rank, len(self.val_rows), world)
        return make_loader(self.val_rows, workers=self.workers, batch_size=self.batch_size, sampler=sampler)
