"""The package's public functions besides :func:`~fsvfm.predictor.load_detector`, for use as ``fsvfm.load_encoder``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from fsvfm.checkpoint import Checkpoint, load_backbone, load_checkpoint, normalisation
from fsvfm.data.transforms import normalise
from fsvfm.errors import ConfigError, DataError, MetricError
from fsvfm.faces.images import resize
from fsvfm.faces.parse import make_parser
from fsvfm.masking import Masker, Masks
from fsvfm.metrics import antispoof, forgery
from fsvfm.models.detector import build_backbone
from fsvfm.models.vit import create_backbone, vit_config
from fsvfm.regions import region_grid

__all__ = ["Encoder", "create_model", "evaluate_scores", "load_encoder", "mask_faces", "parse_face"]


def create_model(name: str, *, ckpt: str | None = None, drop_path: float = 0.0, **fields: Any) -> VisionTransformer:
    """The backbone that downstream training starts from: timm's ViT with mean pooling and without a classifier.

    Args:
        name: a size, such as ``vit_base``.
        ckpt: pre-trained weights: anything that :func:`~fsvfm.checkpoint.load_checkpoint` reads; None leaves it
            untrained.
        drop_path: stochastic depth.
        fields: of the size to replace, such as ``image_size=256``.

    Returns:
        a module that maps (B, 3, S, S) normalised images to features (B, dim).

    Raises:
        ConfigError: an unknown size or field.
        CheckpointError: no such checkpoint, or one of another architecture.
    """
    backbone = create_backbone(vit_config(name, **fields), drop_path=drop_path)
    if ckpt is not None:
        load_backbone(backbone, load_checkpoint(ckpt, target=False))
    return backbone


class Encoder(NamedTuple):
    """A pre-trained backbone in evaluation mode with its normalisation.

    Attributes:
        network: maps (B, 3, S, S) normalised images to features (B, dim).
        mean: (1, 3, 1, 1), of pixels 0–255.
        std: likewise.
        checkpoint: what was loaded.
    """

    network: nn.Module
    mean: torch.Tensor
    std: torch.Tensor
    checkpoint: Checkpoint

    @property
    def image_size(self) -> int:
        """Side of the input in pixels."""
        return int(self.checkpoint.meta["model"]["image_size"])

    def encode(self, faces: Sequence[np.ndarray]) -> np.ndarray:
        """Features of face crops.

        Args:
            faces: (H, W, 3) uint8 RGB of any size.

        Returns:
            (N, dim) float32: of a plain ViT the mean of the patch tokens, layer-normalised; of another network of timm
            its own pooled feature.
        """
        images = np.stack([resize(face, self.image_size) for face in faces]).transpose(0, 3, 1, 2)
        with torch.inference_mode():
            pixels = torch.from_numpy(np.ascontiguousarray(images)).to(self.mean.device)
            features: torch.Tensor = self.network(normalise(pixels, self.mean, self.std))
        return features.float().cpu().numpy()


def load_encoder(source: str, *, device: str = "cpu", which: str = "online") -> Encoder:
    """Load the encoder of a checkpoint for features of faces.

    Args:
        source: an export, a run folder, a released checkpoint, ``hf://…`` or ``zoo:…``; of a detector its backbone.
        device: torch device.
        which: network of a pre-training checkpoint: ``online`` or ``target``.

    Raises:
        CheckpointError: no checkpoint there, or it lacks the network or its normalisation.
        ConfigError: a detector without a single backbone (RFFR, SLADD).
    """
    checkpoint = load_checkpoint(source, target=which == "target")
    tune = checkpoint.meta.get("tune") or {}
    backbone = build_backbone(checkpoint.meta["model"], pool=tune.get("pool", "avg"))
    load_backbone(backbone, checkpoint, which)
    mean, std = (255 * torch.tensor(v, device=device).view(1, 3, 1, 1) for v in normalisation(checkpoint))
    return Encoder(backbone.to(device).eval(), mean, std, checkpoint)


def parse_face(face: np.ndarray, *, parser: str = "landmarks") -> np.ndarray:
    """Facial regions of a face crop.

    Args:
        face: (H, W, 3) uint8 RGB.
        parser: ``landmarks`` (offline) or ``facer`` (a network, the papers').

    Returns:
        (H, W) uint8, 0–10 in the order of :data:`fsvfm.regions.LABELS`.

    Raises:
        DataError: no such picture, or no face in it.
        ConfigError: an unknown parser.
        FaceModelError: the parser's package or files are missing.
    """
    labels = make_parser(parser)(face)
    if labels is None:
        raise DataError("no face found in the picture; give a crop with one face, with some space around it")
    return labels


def mask_faces(
    faces: Sequence[np.ndarray],
    *,
    strategy: str = "crfr_p",
    ratio: float = 0.75,
    size: int = 224,
    patch_size: int = 16,
    parser: str = "landmarks",
    seed: int | None = None,
) -> Masks:
    """Mask face crops as pre-training does.

    Args:
        faces: (H, W, 3) uint8 RGB, one face each.
        strategy: ``crfr_p`` (the papers'), ``crfr_r``, ``fasking_i``, ``frp`` or ``random``.
        ratio: share of patches to mask.
        size: side that the network sees, in pixels.
        patch_size: of the network, in pixels.
        parser: see :func:`parse_face`.
        seed: of the random choice; None takes another one each time.

    Returns:
        ``masked`` and ``region``, (N, L) bool with L patches row by row.

    Raises:
        DataError: no face in a crop (it is named by its place), or a size that the patches do not divide.
        MaskingError: an unknown strategy or an impossible ratio.
        ConfigError: no faces, or an unknown parser.
    """
    if not len(faces):
        raise ConfigError("no faces to mask")
    parse = make_parser(parser)
    grids = []
    for place, face in enumerate(faces):
        labels = parse(resize(face, size))
        if labels is None:
            raise DataError(f"no face found in picture {place}; give crops with one face, with some space around it")
        grids.append(region_grid(labels, patch_size))
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return Masker(strategy, ratio)(torch.from_numpy(np.stack(grids)), generator=generator)


def evaluate_scores(
    scores: Any,
    labels: Any,
    *,
    videos: Any = None,
    methods: Any = None,
    task: str = "forgery",
    replicates: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """The field's metrics on scores of any detector, with bootstrap intervals.

    Args:
        scores: (N,) P(fake) in [0, 1].
        labels: (N,) 0 real, 1 fake.
        videos: (N,) ids of the videos that the samples are from; None takes every sample as one of its own.
        methods: (N,) names of the manipulations, for a breakdown.
        task: ``forgery`` or ``antispoof``, which decides the metrics.
        replicates: bootstrap replicates; 0 for no intervals.
        seed: of the bootstrap.

    Returns:
        see :func:`fsvfm.metrics.summary.summarise`.

    Raises:
        MetricError: scores outside [0, 1] or not finite, only one class, arrays of different length.
        ConfigError: an unknown task.
    """
    summaries = {"forgery": forgery.summarise, "antispoof": antispoof.summarise}
    if task not in summaries:
        raise ConfigError(f"task={task!r}: expected one of {', '.join(summaries)}")
    columns = {"score": np.asarray(scores), "label": np.asarray(labels)}
    columns["video"] = np.arange(len(columns["score"])) if videos is None else np.asarray(videos)
    if methods is not None:
        columns["method"] = np.asarray(methods)
    if len({len(column) for column in columns.values()}) > 1:
        lengths = ", ".join(f"{len(column)} {name}s" for name, column in columns.items())
        raise MetricError(f"every sample needs one value of each kind, got {lengths}")
    return summaries[task](pd.DataFrame(columns), replicates=replicates, seed=seed)
