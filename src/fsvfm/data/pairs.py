"""Pairs for SLADD: a face, a reference of the other class, the landmarks of both, and the mask of a known forgery."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader

from fsvfm.data.datamodules import FaceDataModule
from fsvfm.data.datasets import LabelledFaces
from fsvfm.data.manifest import Manifest
from fsvfm.data.sampling import derive_seed
from fsvfm.data.storage import read_image
from fsvfm.data.transforms import resize, test_transform
from fsvfm.errors import DataError
from fsvfm.faces.detect import DlibHOG, find_faces
from fsvfm.faces.landmarks import Landmarks68

#: Column with the 68 landmarks, x and y in turn, in pixels of the stored picture; recipes write it.
LANDMARKS = "landmarks"

#: Column with the file of a fake's mask, white where it is forged; empty where it is not known.
MASK = "mask"

_REFERENCES = 16  # tried before a face goes without
_SEARCHED = 320  # pixels: larger pictures are shrunk for the face detector


class Pairs(LabelledFaces):
    """Faces with references.

    Sample: as of :class:`~fsvfm.data.datasets.LabelledFaces`, and ``reference`` (3, S, S) uint8, a random face of the
    other class; ``landmarks`` and ``reference_landmarks`` (68, 2) float32, in pixels of the two; ``map`` (S, S) float32
    in 0–1, the forged region, and ``map_known``: 0 for a fake whose mask is not known, whose ``map`` is empty like a
    real face's.

    Landmarks are the manifest's where it has them; else dlib finds them, once in every loader process. They are NaN
    where no face is found.

    Args:
        manifest: rows of both classes; the columns ``landmarks`` and ``mask`` are used where they are there.
        image_size: side S in pixels.
    """

    def __init__(self, manifest: Manifest, image_size: int) -> None:
        super().__init__(manifest, test_transform(image_size))
        self.image_size = image_size
        self.points = _stored_landmarks(manifest.table)
        self.masks = manifest.files(MASK) if MASK in manifest.table else None
        self.others = {label: np.flatnonzero(self.labels != label) for label in (0, 1)}
        self._found: dict[int, np.ndarray] = {}
        self._search: tuple[DlibHOG, Landmarks68] | None = None

    def load(self, index: int, seed: int) -> dict[str, Any]:
        """One face with its reference."""
        picture = read_image(self.paths[index])
        label = int(self.labels[index])
        rng = np.random.default_rng(derive_seed(seed, 1))
        for other in rng.choice(self.others[label], _REFERENCES):
            reference = read_image(self.paths[other])
            reference_points = self._landmarks(int(other), reference)
            if np.isfinite(reference_points).all():
                break
        map_ = self._map(index)
        return {
            **self.sample(picture, index, seed),
            "reference": torch.from_numpy(np.ascontiguousarray(self.transform(reference).transpose(2, 0, 1))),
            "landmarks": torch.from_numpy(self._landmarks(index, picture)),
            "reference_landmarks": torch.from_numpy(reference_points),
            "map": torch.zeros(self.image_size, self.image_size) if map_ is None else torch.from_numpy(map_),
            "map_known": float(not label or map_ is not None),
        }

    def _landmarks(self, index: int, picture: np.ndarray) -> np.ndarray:
        """(68, 2) float32 in pixels of the resized picture, NaN without a face."""
        points = self.points[index]
        if not np.isfinite(points).all():
            if index not in self._found:
                self._found[index] = self._locate(picture)
            points = self._found[index]
        height, width = picture.shape[:2]
        # Pixel centres lie at whole numbers: the first pixel reaches from -0.5 to 0.5.
        scale = self.image_size / np.array([width, height], np.float32)
        return ((points + np.float32(0.5)) * scale - np.float32(0.5)).astype(np.float32)

    def _locate(self, picture: np.ndarray) -> np.ndarray:
        if self._search is None:
            self._search = DlibHOG(), Landmarks68()
        detector, landmarks = self._search
        faces = find_faces(detector, picture, _SEARCHED)
        return landmarks(picture, faces[0].box) if faces else np.full((68, 2), np.nan, np.float32)

    def _map(self, index: int) -> np.ndarray | None:
        file = self.masks[index] if self.masks is not None else ""
        if not file:
            return None
        mask = resize(read_image(file), self.image_size)[..., 0]
        return mask.astype(np.float32) / 255


def _stored_landmarks(table: pd.DataFrame) -> np.ndarray:
    """(N, 68, 2) float32 of the column ``landmarks``; NaN where it is not there or says nothing."""
    points = np.full((len(table), 136), np.nan, np.float32)
    if LANDMARKS in table:
        for row, values in enumerate(table[LANDMARKS].tolist()):
            if isinstance(values, list | np.ndarray) and len(values) == 136:
                points[row] = values
    return points.reshape(-1, 68, 2)


class PairData(FaceDataModule):
    """Pairs of faces for training, faces for validation.

    Args:
        manifests: prepared folders, manifest files, or folders in a published layout.
        methods: manipulation methods to train on (``real`` is always included); null takes all.
        image_size: side in pixels.
        batch_size: faces per device and micro-batch; each comes with its reference.
        frames: ``train`` and ``val``: most frames of a real video, evenly spread; a forged video gives so many divided
            by the number of methods, rounded up, so that the classes balance. null takes all.
        workers: loader processes per device.
        seed: of order and references.

    Raises:
        DataError: only one class for training or validation.
    """

    def __init__(
        self,
        manifests: list[str],
        *,
        methods: list[str] | None,
        image_size: int,
        batch_size: int,
        frames: dict[str, int] | None,
        workers: int,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, workers=workers, seed=seed)
        manifest = Manifest.concat([Manifest.read(path, extra=[LANDMARKS, MASK]) for path in manifests])
        if methods is not None:
            manifest = manifest.select(methods=["real", *methods])
        self.train, self.val = (
            _fewer_frames(manifest.select(split=split), frames[split] if frames else None) for split in ("train", "val")
        )
        self.train.require_both_classes("training")
        self.val.require_both_classes("validation")
        self.train_rows = Pairs(self.train, image_size)
        self.val_rows = LabelledFaces(self.val, test_transform(image_size))

    def training_rows(self) -> Pairs:
        """Training faces with references."""
        return self.train_rows

    def val_dataloader(self) -> DataLoader[Any]:
        """All validation faces, dealt to the processes."""
        return self.in_order(self.val_rows)


def _fewer_frames(manifest: Manifest, limit: int | None) -> Manifest:
    """At most `limit` evenly spread frames of every real video, and a share of it of every forged one."""
    if limit is None:
        return manifest
    if limit < 1:
        raise DataError(f"data.frames: {limit} frames of a video; expected 1 or more, or null for all")
    table = manifest.table
    methods = table.loc[table["label"] == 1, "method"].nunique()
    most = {0: limit, 1: -(-limit // max(methods, 1))}
    kept = np.zeros(len(table), dtype=bool)
    for key, rows in table.groupby(["dataset", "video", "label"], sort=False)["frame"]:
        order = rows.sort_values(kind="stable").index.to_numpy()
        count = min(most[key[2]], len(order))  # type: ignore[index]
        kept[order[np.linspace(0, len(order) - 1, count).round().astype(int)]] = True
    return manifest._subset(kept)
