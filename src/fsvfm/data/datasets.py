"""Data sets: rows of a manifest to decoded uint8 images, with region grids (pre-training) or labels (detectors)."""

from __future__ import annotations

import random
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from fsvfm.data.manifest import Manifest
from fsvfm.data.sampling import Draw
from fsvfm.data.storage import read_image
from fsvfm.data.transforms import ImageTransform, crop_and_flip, resize
from fsvfm.errors import DataError
from fsvfm.faces.images import load_labels
from fsvfm.regions import region_grid

#: How many neighbours are tried in place of an unreadable file before giving up.
_SUBSTITUTES = 16


class _Rows(Dataset[dict[str, Any]]):
    """A manifest's rows; unreadable files are replaced by a neighbour and reported in the sample."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.paths = manifest.files()

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, index: int, seed: int) -> dict[str, Any]:
        """Decode one row; ``seed`` decides everything random about it."""
        raise NotImplementedError

    def __getitem__(self, draw: Draw | int) -> dict[str, Any]:
        index, seed = draw if isinstance(draw, tuple) else (int(draw), int(draw))
        unreadable: list[str] = []
        for step in range(min(_SUBSTITUTES, len(self))):
            row = (index + step) % len(self)
            try:
                return {**self.load(row, seed), "index": row, "unreadable": unreadable}
            except DataError as error:
                unreadable.append(f"{self.paths[row]}\t{error}")
        raise DataError(
            f"{len(unreadable)} files in a row could not be read, the first: {unreadable[0]}. "
            "Is the data set mounted and complete?"
        )


class PretrainFaces(_Rows):
    """Real faces with their region grids.

    Sample: ``image`` (3, S, S) uint8 tensor, ``grid`` (L,) uint8 tensor of region bits, ``index`` row number,
    ``unreadable`` list of ``path<TAB>reason`` for files replaced on the way.

    Args:
        manifest: rows with a ``grid_p<patch_size>`` column, or a ``parse`` column from which grids are computed.
        image_size: side S in pixels; a multiple of ``patch_size``.
        patch_size: side of a patch in pixels.
        crop_scale: random resized crop and flip of image and parsing map alike; None (default) uses the whole face.
        need_regions: False for strategies that ignore regions (random masking): rows without a parse are fine then.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        image_size: int = 224,
        patch_size: int = 16,
        crop_scale: tuple[float, float] | None = None,
        need_regions: bool = True,
    ) -> None:
        super().__init__(manifest)
        self.image_size, self.patch_size, self.crop_scale = image_size, patch_size, crop_scale
        has_parse = "parse" in manifest.table and manifest.table["parse"].ne("").any()
        self.parses = manifest.files("parse") if has_parse else None
        # Stored grids fit one image size; another size, and random crops, need the parsing map itself.
        stored = manifest.grids(patch_size)
        fits = stored is not None and stored.shape[1] == (image_size // patch_size) ** 2
        self.grids = stored if fits and crop_scale is None else None
        self.need_regions = need_regions
        if need_regions and self.grids is None and self.parses is None:
            raise DataError(
                f"the manifest {manifest.source} has neither a grid_p{patch_size} column for {image_size} px nor "
                "parsing maps; prepare the data with a parser (recipe.parser=landmarks or facer), "
                "or choose masking=random, which needs none"
            )

    def load(self, index: int, seed: int) -> dict[str, Any]:
        """One face with its region grid."""
        image = read_image(self.paths[index])
        if self.grids is not None:
            image = resize(image, self.image_size)
            grid = self.grids[index]
        elif not self.need_regions and self.crop_scale is None:
            image = resize(image, self.image_size)
            grid = np.zeros((self.image_size // self.patch_size) ** 2, dtype=np.uint8)
        else:
            image, labels = self._with_labels(image, index, seed)
            grid = region_grid(labels, self.patch_size)
        return {
            "image": torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))),
            "grid": torch.from_numpy(np.array(grid, dtype=np.uint8)),
        }

    def _with_labels(self, image: np.ndarray, index: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        path = self.parses[index] if self.parses is not None else None
        if not path:
            raise DataError(f"{self.paths[index]} has no parsing map")
        labels = load_labels(path)
        if labels.shape != image.shape[:2]:
            raise DataError(
                f"{self.paths[index]} is {image.shape[1]}×{image.shape[0]} px but its parsing map {path} is "
                f"{labels.shape[1]}×{labels.shape[0]} px; both must show the same crop at the same size"
            )
        if self.crop_scale is not None:
            rng = np.random.default_rng(seed)
            return crop_and_flip(image, labels, self.image_size, scale=self.crop_scale, rng=rng)
        if labels.shape != (self.image_size, self.image_size):
            shape = (self.image_size, self.image_size)
            labels = cv2.resize(labels, shape, interpolation=cv2.INTER_NEAREST_EXACT)
        return resize(image, self.image_size), labels


class LabelledFaces(_Rows):
    """Faces with labels for detectors.

    Sample: ``image`` (3, S, S) uint8 tensor, ``label`` 0 (real) or 1 (fake), ``video`` and ``domain``: numbers of the
    video and of the data set among those of this selection, ``index``, ``unreadable``.
    """

    def __init__(self, manifest: Manifest, transform: ImageTransform) -> None:
        super().__init__(manifest)
        self.transform = transform
        table = manifest.table
        self.labels = table["label"].to_numpy(dtype=np.int64)
        self.domains = table["dataset"].factorize()[0]
        self.videos = table.groupby(["dataset", "video"], sort=False).ngroup().to_numpy()

    def load(self, index: int, seed: int) -> dict[str, Any]:
        """One augmented face with its label."""
        return self.sample(read_image(self.paths[index]), index, seed)

    def sample(self, image: np.ndarray, index: int, seed: int) -> dict[str, Any]:
        """The sample of a row whose picture, (H, W, 3) uint8 RGB, has been read."""
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002  (timm draws from the global generator)
        torch.manual_seed(seed)
        image = self.transform(image)
        return {
            "image": torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))),
            "label": int(self.labels[index]),
            "video": int(self.videos[index]),
            "domain": int(self.domains[index]),
        }


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack tensors and numbers; join the lists of unreadable files."""
    unreadable = [line for sample in samples for line in sample["unreadable"]]
    batch = default_collate([{k: v for k, v in sample.items() if k != "unreadable"} for sample in samples])
    return {**batch, "unreadable": unreadable}
