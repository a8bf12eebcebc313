"""Training a detector on real faces alone: every face comes with its self-blend, in the same batch (SBI, CVPR 2022)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from fsvfm.data.datamodules import FaceDataModule, make_loader
from fsvfm.data.datasets import LabelledFaces
from fsvfm.data.manifest import Manifest
from fsvfm.data.sampling import Draw, EpochSampler, ResumableSampler, derive_seed
from fsvfm.data.storage import read_image
from fsvfm.data.transforms import ImageTransform, test_transform, train_transform
from fsvfm.errors import ConfigError, DataError
from fsvfm.faces.self_blending import disturb, self_blended_pair


class SelfBlendedFaces(LabelledFaces):
    """Real faces, and behind them as many self-blends: row N + i is made of face i.

    The two rows of a face with the same seed are a pair: made by one blend, and augmented alike. Samples are those of
    :class:`~fsvfm.data.datasets.LabelledFaces`.

    Args:
        manifest: real faces with their ``landmarks``.
        transform: augmentation, drawing from the global generators.
        disturbed: also change colours and compression of both pictures of a pair, as in the published training.

    Raises:
        DataError: a row without landmarks.
    """

    def __init__(self, manifest: Manifest, transform: ImageTransform, *, disturbed: bool) -> None:
        super().__init__(manifest, transform)
        self.landmarks = _landmarks(manifest)
        self.disturbed = disturbed
        self.faces = len(self.paths)
        self.paths = [*self.paths, *self.paths]  # type: ignore[assignment]  # a sequence of text, too
        self.labels = np.repeat([0, 1], self.faces)
        self.domains, self.videos = np.tile(self.domains, 2), np.tile(self.videos, 2)

    def load(self, index: int, seed: int) -> dict[str, Any]:
        """One picture of the pair that a face and a seed make."""
        fake, face = divmod(index, self.faces)
        rng = np.random.default_rng(seed)
        pair = self_blended_pair(read_image(self.paths[face]), self.landmarks[face], rng)
        images: tuple[np.ndarray, ...] = (pair.real, pair.fake)
        if self.disturbed:
            images = disturb(images, rng)
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002  (timm draws from the global generator)
        torch.manual_seed(seed)
        image = self.transform(images[fake])
        return {
            "image": torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))),
            "label": fake,
            "video": int(self.videos[index]),
            "domain": int(self.domains[index]),
        }


def _landmarks(manifest: Manifest) -> np.ndarray:
    """(N, 68, 2) float32 of all rows."""
    column = manifest.table["landmarks"] if "landmarks" in manifest.table else [None] * len(manifest)
    points = [np.asarray(value, np.float32) if isinstance(value, list | np.ndarray) else None for value in column]
    lacking = sum(value is None or value.shape != (136,) for value in points)
    if lacking:
        raise DataError(
            f"{lacking} of {len(manifest)} real faces of {manifest.source} have no landmarks (column landmarks, 136 "
            "numbers), and self-blending needs them; prepare the photographs or videos again with a recipe that finds "
            "faces itself (demo, folder, ffpp, …), which writes them down"
        )
    return np.stack([value for value in points if value is not None]).reshape(-1, 68, 2)


class PairSampler(ResumableSampler):
    """Every face once per epoch, each as two rows with one seed: the face and its self-blend.

    Args:
        faces: number of real faces N; self-blends are rows N to 2N − 1.
        batch_size: images per batch and process, two of each face.
        seed: of order and augmentation.
        rank: index of this process.
        world_size: number of processes.

    Raises:
        ConfigError: an odd batch size.
        DataError: fewer faces than one batch for every process.
    """

    def __init__(self, faces: int, batch_size: int, *, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(seed=seed, rank=rank, world_size=world_size)
        if batch_size % 2:
            raise ConfigError(f"data.batch_size={batch_size} must be even: every real face comes with its self-blend")
        self.faces = faces
        self.order = EpochSampler(faces, batch_size // 2, seed=seed, rank=rank, world_size=world_size)

    def __len__(self) -> int:
        return len(self.order)

    def batches(self, epoch: int, start: int) -> Iterator[list[Draw]]:
        """The real faces of a batch, then their self-blends."""
        for reals in self.order.batches(epoch, start):
            yield [*reals, *(Draw(self.faces + row, seed) for row, seed in reals)]


class SelfBlendedData(FaceDataModule):
    """Real faces of a training and a validation split with their self-blends; forgeries are not even read.

    Validation uses self-blends too, the same ones each time, so that no forgery has a say in which checkpoint counts.
    For the same reason the score stays uncalibrated; `python -m fsvfm.export … calibrate=<prepared folder>` can do it.

    Args:
        manifests: prepared folders or manifest files with the column ``landmarks``.
        image_size: side in pixels.
        batch_size: images per device and micro-batch, half of them real; even.
        workers: loader processes per device.
        augment: values of the ``augment`` group, as in :class:`~fsvfm.data.datamodules.ForgeryData`; what happens on
            single images is the same for both of a pair.
        seed: of order, self-blends and augmentation.

    Raises:
        ConfigError: an odd batch size.
        DataError: a split without real faces, or faces without landmarks.
    """

    def __init__(
        self,
        manifests: list[str],
        *,
        image_size: int,
        batch_size: int,
        workers: int,
        augment: dict[str, Any],
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, workers=workers, seed=seed)
        rows = Manifest.concat([Manifest.read(path, extra=["landmarks"]) for path in manifests])
        here = {name: augment[name] for name in ("crop_scale", "flip", "rand_augment", "saturation")}
        self.train = rows.select(split="train", label=0)
        self.train_rows = SelfBlendedFaces(self.train, train_transform(image_size, **here), disturbed=True)
        val = rows.select(split="val", label=0)
        self.val_rows = SelfBlendedFaces(val, test_transform(image_size), disturbed=False)

    def training_rows(self) -> SelfBlendedFaces:
        """Real faces and their self-blends, augmented."""
        return self.train_rows

    def sampler(self, rank: int, world_size: int) -> PairSampler:
        """Pairs, every face once per epoch."""
        return PairSampler(self.train_rows.faces, self.batch_size, seed=self.seed, rank=rank, world_size=world_size)

    def val_dataloader(self) -> DataLoader[Any]:
        """All validation faces and their self-blends, dealt to the processes."""
        rank, world = self.process
        pairs = range(rank, len(self.val_rows), world)
        draws = [Draw(row, derive_seed(self.seed, row % self.val_rows.faces)) for row in pairs]
        return make_loader(self.val_rows, workers=self.workers, batch_size=self.batch_size, sampler=draws)
