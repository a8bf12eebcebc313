"""Where a detector's score comes from: maps over a face, and numbers by facial region.

Each view answers another question, and none of them proves anything about the picture; they describe the detector.

- ``rollout``: from which patches attention carries information to the feature that the head sees (Abnar and Zuidema,
  ACL 2020). It knows neither head nor classes: where the detector looks, not what it concludes.
- ``gradient``: what every patch adds to the logit, compared with a face of the mean colour: integrated gradients
  (Sundararajan et al., ICML 2017). The patches add up to the difference of the two logits, and how far numerical
  integration misses that is reported. The patch embedding is linear, so that integrating over pixels or over patch
  embeddings gives the same sums.
- ``regions``: by how much the score changes when eyes, mouth, … are masked; a patch counts to every region of the
  method's own grid (:mod:`fsvfm.regions`) that it touches.
- ``reconstruction``: how much of every patch's contrast the pre-trained network fails to predict from other patches.
  It says what is unusual to a model of real faces, whatever the detector thinks.

Masked patches, and the face that integration starts from, have the mean colour of the pre-training set: zeros to the
network. A blurred copy would look more natural, but blur is what many forgeries betray themselves by, so that a
detector may rightly take it as evidence. A flat patch is unusual too: a small change says little.

Positive numbers and red speak for fake (for attack, in anti-spoofing), negative ones and blue for real. Logits and
probabilities are calibrated where the detector is.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import matplotlib
import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.special import expit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fsvfm.checkpoint import load_checkpoint, normalisation
from fsvfm.data.transforms import normalise, resize
from fsvfm.errors import CheckpointError, ConfigError, DataError
from fsvfm.faces.detect import check_rgb
from fsvfm.faces.parse import FaceParser, make_parser
from fsvfm.loaded_detector import LoadedDetector
from fsvfm.loading import load_into
from fsvfm.losses import PIXEL_EPS
from fsvfm.models.pretrain_net import OnlineNetwork, PretrainNetConfig
from fsvfm.models.vit import ViTConfig, patchify, unpatchify
from fsvfm.regions import REGION_BIT, REGIONS, region_grid

#: Integrated gradients start with so many pieces of the way, each a Gauss-Legendre rule of two points, and halve pieces
#: that do not add up while there are fewer points than the limit.
PIECES, POINTS = 8, 96

#: How far the sum of the patches may be off: the larger of a share of the logits' difference and a number of logits.
TOLERANCE = (0.05, 0.02)

#: Faces per forward pass.
_BATCH = 8

#: Shuffles of the patches for reconstruction; with each, a quarter of them is visible at a time.
_SHUFFLES = 4
_QUARTERS = 4

#: Squared grey levels added to the variance of a patch that its error is divided by, so that the noise of a flat patch,
#: which nothing could predict, is no error.
_FLAT = 4.0


class View(NamedTuple):
    """How a map is read: its title and unit, and whether it has two sides (fake and real)."""

    title: str
    unit: str
    signed: bool


VIEWS = {
    "rollout": View("attention rollout", "share of attention, %", False),
    "gradient": View("integrated gradients", "logit per patch", True),
    "regions": View("occlusion by region", "logit lost by masking", True),
    "reconstruction": View("reconstruction error", "share of contrast", False),
}

#: Colours of two-sided and one-sided maps.
_SIGNED, _PLAIN = "RdBu_r", "inferno"
_RED, _BLUE = "#b2182b", "#2166ac"


# -------------------------------------------------------------------------------------------------------------- result


@dataclass(frozen=True)
class RegionEffect:
    """What a region contributes: the face's value minus that of the face with the region masked.

    Attributes:
        patches: how many patches were masked.
        logit: change of the calibrated logit; positive where the region speaks for fake.
        probability: change of the calibrated probability.
    """

    patches: int
    logit: float
    probability: float


@dataclass
class Explanation:
    """Maps and numbers that explain one score.

    Attributes:
        face: (H, W, 3) uint8, as it was given.
        task: the detector's, ``forgery`` or ``antispoof``.
        score: P(fake) as the network gives it.
        probability: the calibrated score; the score itself without calibration.
        logit: of the probability.
        temperature: of the calibration; 1 without.
        patches: view → (G, G) float64, one value per patch: rollout in shares that sum to 1, gradient in logits,
            regions in logits (of the first region in walking order that the patch belongs to), reconstruction in
            shares of the patch's contrast.
        regions: region → effect, in walking order; only those present in the face.
        completeness: of the gradients: ``sum`` of the patches, the ``difference`` between the logits of the face and of
            the mean colour that it should be, the ``gap`` between both, and how many ``points`` it took; None without.
        reconstructed: (S, S, 3) uint8 face put together from predictions of hidden patches; None without an encoder.
        omitted: view → why it is missing.
        notes: what a reader must know.
    """

    face: np.ndarray
    task: str
    score: float
    probability: float
    logit: float
    temperature: float
    patches: dict[str, np.ndarray] = field(default_factory=dict)
    regions: dict[str, RegionEffect] = field(default_factory=dict)
    completeness: dict[str, float] | None = None
    reconstructed: np.ndarray | None = None
    omitted: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def maps(self) -> dict[str, np.ndarray]:
        """View → (H, W) float32 over the face: two-sided views in [-1, 1] (red 1, blue -1), the others in [0, 1]."""
        return {name: self._map(name) for name in self.patches}

    def _map(self, name: str) -> np.ndarray:
        return _stretched(self.patches[name], self.limits(name), self.face.shape)

    def overlay(self, name: str) -> np.ndarray:
        """One map in colour over the face, (H, W, 3) uint8.

        Raises:
            ConfigError: there is no such map; says why where that is known.
        """
        if name not in self.patches:
            why = self.omitted.get(name, f"it was not asked for; there are {', '.join(self.patches) or 'none'}")
            raise ConfigError(f"no map {name!r}: {why}")
        return overlay(self.face, self._map(name), signed=VIEWS[name].signed)

    def limits(self, name: str) -> tuple[float, float]:
        """Values of patches at the two ends of a map's colour scale."""
        values = self.patches[name]
        if VIEWS[name].signed:
            most = float(np.abs(values).max()) or 1.0
            return -most, most
        return float(values.min()), float(values.max())

    def figure(self, path: str | os.PathLike[str]) -> Path:
        """Write one PNG: the face, every map over it with its legend, and bars by region.

        Raises:
            DataError: the file cannot be written.
        """
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            _drawn(self).savefig(temporary, format="png", dpi=100)
            temporary.replace(target)
        except OSError as error:
            raise DataError(f"{target} cannot be written ({error.strerror or error})") from None
        finally:
            temporary.unlink(missing_ok=True)
        return target

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the pictures are left out."""
        return {
            "task": self.task,
            "score": self.score,
            "probability": self.probability,
            "logit": self.logit,
            "temperature": self.temperature,
            "regions": {name: asdict(effect) for name, effect in self.regions.items()},
            "maps": {
                name: {"title": VIEWS[name].title, "signed": VIEWS[name].signed, "patches": values.tolist()}
                for name, values in self.patches.items()
            },
            "completeness": self.completeness,
            "omitted": dict(self.omitted),
            "notes": list(self.notes),
        }


# ------------------------------------------------------------------------------------------------------------- explain


def explain(
    detector: LoadedDetector,
    face: np.ndarray,
    *,
    methods: Sequence[str] = ("rollout", "gradient", "regions"),
    encoder: str | os.PathLike[str] | Reconstructor | None = None,
    parser: FaceParser | None = None,
) -> Explanation:
    """Explain a detector's score of one face.

    Args:
        detector: of any task and way of tuning.
        face: (H, W, 3) uint8 RGB crop of any size, cut as for scoring.
        methods: some of :data:`VIEWS`.
        encoder: pre-training checkpoint, or one that :func:`load_reconstructor` has loaded; adds ``reconstruction``.
        parser: says where the regions are; None takes the offline parser, which loads its models at every call.

    Returns:
        The explanation. Regions are omitted, with the reason, where no face is found in the crop.

    Raises:
        DataError: not such an image.
        ConfigError: an unknown method, or ``reconstruction`` without an encoder.
        CheckpointError: the encoder cannot reconstruct.
    """
    check_rgb(face)
    wanted = dict.fromkeys([methods] if isinstance(methods, str) else methods)
    if unknown := [name for name in wanted if name not in VIEWS]:
        raise ConfigError(f"unknown explanation {', '.join(map(repr, unknown))}; choose among {', '.join(VIEWS)}")
    if encoder is not None:
        wanted["reconstruction"] = None
    elif "reconstruction" in wanted:
        raise ConfigError("the reconstruction error needs a pre-training checkpoint: give encoder=<export folder>")

    # Callers may score under inference_mode, which would forbid gradients.
    with torch.inference_mode(False), torch.no_grad():
        image = _normalised(face, detector.image_size, detector.mean, detector.std)
        logit = float(_logits(detector, image))
        temperature = _temperature(detector)
        scores = float(expit(logit * temperature)), float(expit(logit))
        found = Explanation(face, detector.checkpoint.meta["task"], *scores, logit, temperature)
        if "rollout" in wanted and (reason := _no_rollout(detector.network.backbone)):
            found.omitted["rollout"] = reason
        elif "rollout" in wanted:
            found.patches["rollout"] = attention_rollout(detector, image)
            if detector.network.backbone.global_pool == "avg":
                found.notes.append(
                    "rollout follows the mean of the patch tokens, which the head sees, not the CLS token"
                )
        if "gradient" in wanted:
            found.patches["gradient"], found.completeness = integrated_gradients(detector, image)
            if abs(found.completeness["gap"]) > _allowed(found.completeness["difference"]):
                found.notes.append("integrated gradients do not add up; read them as a sketch (see completeness)")
        if "regions" in wanted:
            _explain_regions(found, detector, image, parser or make_parser("landmarks"))
        if encoder is not None:
            loaded = encoder if isinstance(encoder, Reconstructor) else load_reconstructor(encoder)
            found.patches["reconstruction"], found.reconstructed = reconstruction_error(loaded, face)
    return found


def _normalised(face: np.ndarray, size: int, mean: Tensor, std: Tensor) -> Tensor:
    """(1, 3, S, S) float32 on the network's device, exactly what scoring feeds it."""
    pixels = torch.from_numpy(np.ascontiguousarray(resize(face, size).transpose(2, 0, 1)))[None]
    return normalise(pixels.to(mean.device), mean, std)


def _temperature(detector: LoadedDetector) -> float:
    return float(detector.calibration["temperature"]) if detector.calibration else 1.0


def _logits(detector: LoadedDetector, images: Tensor) -> Tensor:
    """(B, 3, S, S) normalised images to calibrated logits of P(fake), (B,) float64."""
    logits = detector.network(images).logits.double()
    fake = detector.network.class_order.index("fake")
    return (logits[:, fake] - logits[:, 1 - fake]) / _temperature(detector)


def _patch_size(detector: LoadedDetector) -> int:
    """Side of the squares that maps are made of: the network's patches, else about a fourteenth of the face."""
    model = detector.checkpoint.meta["model"]
    if model.get("patch_size"):
        return int(model["patch_size"])
    size = detector.image_size
    return min((part for part in range(1, size + 1) if size % part == 0), key=lambda part: abs(part - size / 14))


def _no_rollout(backbone: nn.Module) -> str:
    """Why attention cannot be followed through a backbone; empty for ViTs whose feature is a token or their mean."""
    if not isinstance(backbone, VisionTransformer):
        return f"attention is followed through plain ViTs only, not through a {type(backbone).__name__}"
    if backbone.num_prefix_tokens != 1 or backbone.global_pool not in ("avg", "token"):
        return "attention is followed through ViTs with a CLS token and no other tokens beside the patches"
    return ""


def _grid(values: Tensor | np.ndarray) -> np.ndarray:
    """(L,) values of patches to (G, G) float64."""
    flat = values.detach().cpu().double().numpy() if isinstance(values, Tensor) else values.astype(np.float64)
    side = round(len(flat) ** 0.5)
    return flat.reshape(side, side)


# ------------------------------------------------------------------------------------------------------------ attention


def attention_maps(network: nn.Module, blocks: Sequence[nn.Module], images: Tensor) -> list[Tensor]:
    """Attention of every block, averaged over heads.

    Fused attention never forms these matrices, so they are computed once more from the block's queries and keys, by
    hooks that leave the network as it is.

    Args:
        network: whose forward pass runs through the blocks.
        blocks: timm transformer blocks.
        images: (B, 3, S, S) normalised.

    Returns:
        For each block (B, 1 + L, 1 + L); rows sum to 1.
    """
    maps: list[Tensor] = []

    def keep(module: Any, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        batch, count = inputs[0].shape[:2]
        qkv = module.qkv(inputs[0]).reshape(batch, count, 3, module.num_heads, module.head_dim).permute(2, 0, 3, 1, 4)
        queries, keys = module.q_norm(qkv[0]), module.k_norm(qkv[1])
        maps.append((queries * module.scale @ keys.transpose(-2, -1)).softmax(dim=-1).mean(dim=1))

    hooks = [cast(nn.Module, block.attn).register_forward_hook(keep) for block in blocks]
    try:
        network(images)
    finally:
        for hook in hooks:
            hook.remove()
    return maps


def attention_rollout(detector: LoadedDetector, image: Tensor) -> np.ndarray:
    """Share of every patch in the pooled feature, by attention alone (Abnar and Zuidema, 2020).

    Half of every token is taken to pass a block by its residual connection, half to be mixed by the attention averaged
    over heads. The product over all blocks is followed from what the head sees: the mean of the patch tokens, or the
    CLS token where the detector pools that.

    Args:
        detector: in evaluation mode.
        image: (1, 3, S, S) normalised.

    Returns:
        (G, G) float64, ≥ 0, sums to 1; the part that comes from the CLS token itself is left out.
    """
    backbone = detector.network.backbone
    with torch.no_grad():
        maps = attention_maps(detector.network, list(cast(Any, backbone).blocks), image)
    share = torch.zeros(maps[0].shape[-1], dtype=torch.float64, device=image.device)
    if backbone.global_pool == "avg":
        share[1:] = 1 / (len(share) - 1)
    else:
        share[0] = 1
    for attention in reversed(maps):
        share = (share + share @ attention[0].double()) / 2
    return _grid(share[1:] / share[1:].sum())


# ------------------------------------------------------------------------------------------------------------ gradients


def integrated_gradients(detector: LoadedDetector, image: Tensor) -> tuple[np.ndarray, dict[str, float]]:
    """What every patch adds to the logit on the way from the mean colour to the face (Sundararajan et al., 2017).

    Transformers change their mind within small parts of the way, where attention tips over. What the patches of a part
    must add up to is known from the logits at its ends, so that parts that miss it are halved.

    Args:
        detector: in evaluation mode.
        image: (1, 3, S, S) normalised.

    Returns:
        (G, G) float64 in calibrated logits, and :attr:`Explanation.completeness`.
    """
    ends = np.linspace(0, 1, PIECES + 1)
    logits = _logits_on_the_way(detector, image, ends)
    difference = logits[1.0] - logits[0.0]
    allowed = _allowed(difference) / PIECES
    pieces, points = list(itertools.pairwise(ends)), 0
    patches = np.zeros((image.shape[-1] // _patch_size(detector)) ** 2)
    while pieces:
        parts = _gradient_parts(detector, image, np.array(pieces))
        points += 2 * len(pieces)
        missed = np.array([logits[high] - logits[low] for low, high in pieces]) - parts.sum(axis=1)
        split = (np.abs(missed) > allowed) & (points < POINTS)
        patches += parts[~split].sum(axis=0)
        halves = [(low, (low + high) / 2, high) for (low, high), again in zip(pieces, split, strict=True) if again]
        logits |= _logits_on_the_way(detector, image, np.array([middle for _, middle, _ in halves]))
        pieces = [piece for low, middle, high in halves for piece in ((low, middle), (middle, high))]
    total = float(patches.sum())
    return _grid(patches), {"sum": total, "difference": difference, "gap": total - difference, "points": points}


def _logits_on_the_way(detector: LoadedDetector, image: Tensor, places: np.ndarray) -> dict[float, float]:
    """Logits at places from 0, the mean colour, to 1, the face."""
    logits: list[float] = []
    with torch.no_grad():
        for some in torch.from_numpy(places).to(image.device).split(_BATCH) if len(places) else ():
            logits += _logits(detector, (some.view(-1, 1, 1, 1) * image).float()).tolist()
    return dict(zip(places.tolist(), logits, strict=True))


def _gradient_parts(detector: LoadedDetector, image: Tensor, pieces: np.ndarray) -> np.ndarray:
    """What every patch adds to the logit on pieces (N, 2) of the way, by two points on each: (N, L) float64."""
    offset = np.array([-1, 1]) / np.sqrt(12)
    width = pieces[:, 1] - pieces[:, 0]
    places = (pieces.mean(axis=1)[:, None] + width[:, None] * offset).ravel()
    parts = []
    for some in torch.from_numpy(places).to(image.device).split(_BATCH):
        with torch.enable_grad():
            points = (some.view(-1, 1, 1, 1) * image).float().requires_grad_()
            (slope,) = torch.autograd.grad(_logits(detector, points).sum(), points)
        parts.append(patchify(slope * image, _patch_size(detector)).double().sum(dim=2))
    return torch.cat(parts).cpu().numpy().reshape(len(pieces), 2, -1).mean(axis=1) * width[:, None]


def _allowed(difference: float) -> float:
    share, logits = TOLERANCE
    return max(share * abs(difference), logits)


# -------------------------------------------------------------------------------------------------------------- regions


def _explain_regions(found: Explanation, detector: LoadedDetector, image: Tensor, parser: FaceParser) -> None:
    """Fill in the effects by region, or the reason why there are none."""
    labels = parser(resize(found.face, detector.image_size))
    if labels is None:
        found.omitted["regions"] = "no face, and so no landmarks, were found in the crop"
        return
    grid = region_grid(labels, _patch_size(detector))
    found.regions.update(region_effects(detector, image, grid))
    if missing := [name for name in REGIONS if name not in found.regions]:
        found.notes.append(f"no patch shows {', '.join(missing)}")
    values = np.zeros(len(grid))
    for name in reversed(found.regions):
        values[_belongs(grid, name)] = found.regions[name].logit
    found.patches["regions"] = _grid(values)


def _belongs(grid: np.ndarray, region: str) -> np.ndarray:
    return (grid >> REGION_BIT[region] & 1).astype(bool)


def region_effects(detector: LoadedDetector, image: Tensor, grid: np.ndarray) -> dict[str, RegionEffect]:
    """Change of the score when each region in turn is masked with the mean colour.

    Args:
        detector: in evaluation mode.
        image: (1, 3, S, S) normalised.
        grid: (L,) uint8 of :func:`~fsvfm.regions.region_grid`, with the detector's patch size.

    Returns:
        Region → effect for the regions that have a patch.
    """
    masks = {name: _belongs(grid, name) for name in REGIONS if _belongs(grid, name).any()}
    size = _patch_size(detector)
    patches = patchify(image, size)
    versions = [torch.ones(len(grid), device=image.device)]
    versions += [torch.from_numpy(~mask).to(image.device).float() for mask in masks.values()]
    logits = []
    with torch.no_grad():
        for part in torch.stack(versions).split(_BATCH):
            logits.append(_logits(detector, unpatchify(patches * part[:, :, None], size)))
    whole, *others = torch.cat(logits).tolist()
    return {
        name: RegionEffect(int(mask.sum()), whole - other, float(expit(whole) - expit(other)))
        for (name, mask), other in zip(masks.items(), others, strict=True)
    }


# ------------------------------------------------------------------------------------------------------- reconstruction


class Reconstructor(NamedTuple):
    """A pre-trained network with its normalisation (per channel, in grey levels), ready to reconstruct."""

    network: OnlineNetwork
    mean: Tensor
    std: Tensor
    norm_pix: bool


def load_reconstructor(source: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> Reconstructor:
    """Load the online network of a pre-training checkpoint.

    Raises:
        CheckpointError: no pre-training checkpoint, one without a trained pixel decoder, or without normalisation.
    """
    checkpoint = load_checkpoint(source, target=False)
    if checkpoint.kind != "pretrain":
        raise CheckpointError(
            f"{source} is of kind {checkpoint.kind!r}, which cannot reconstruct pixels; give a pre-training "
            "checkpoint with both decoders as encoder"
        )
    checkpoint = checkpoint.only("online")
    loss: Mapping[str, Any] = (checkpoint.meta["provenance"].get("hyper_parameters") or {}).get("loss") or {}
    if not (loss.get("reconstruction", 1) or loss.get("region", 1)):
        raise CheckpointError(f"{source} was trained without reconstruction, its pixel decoder never learned anything")
    model = checkpoint.meta["model"]
    network = OnlineNetwork(ViTConfig.from_mapping(model), PretrainNetConfig.from_mapping(model))
    load_into(network, {key.removeprefix("online."): tensor for key, tensor in checkpoint.state.items()})
    mean, std = (255 * torch.tensor(values, device=device).view(1, 3, 1, 1) for values in normalisation(checkpoint))
    # Released checkpoints do not say; the papers normalise the targets.
    return Reconstructor(network.to(device).eval(), mean, std, bool(loss.get("norm_pix", True)))


def reconstruction_error(encoder: Reconstructor, face: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How much of hidden patches is not predicted from visible ones.

    The patches are shuffled and dealt into quarters; one quarter is visible at a time (the papers' ratio of 0.75), so
    that after four passes every patch was hidden three times. Errors and predictions are averaged over several
    shuffles, always the same ones. Where the network was trained on patches of mean 0 and variance 1, mean and contrast
    of its predictions are the patch's own. The error is relative to the patch's variance: in grey levels the map would
    be one of edges, nearly the same for a network with random weights.

    Args:
        encoder: of :func:`load_reconstructor`.
        face: (H, W, 3) uint8 RGB.

    Returns:
        (G, G) float64 squared error as a share of the patch's variance, 1 where its mean is all that is predicted; and
        the mean prediction as (S, S, 3) uint8.

    Raises:
        DataError: not such an image.
    """
    check_rgb(face)
    config = encoder.network.encoder.config
    image = _normalised(face, config.image_size, encoder.mean, encoder.std)
    truth = patchify(image, config.patch_size).double()[0]
    generator = torch.Generator().manual_seed(0)
    orders = torch.stack([torch.randperm(config.num_patches, generator=generator) for _ in range(_SHUFFLES)])
    squares, hidden = torch.zeros_like(truth[:, 0]), torch.zeros_like(truth[:, 0])
    predicted = torch.zeros_like(truth)
    for visible in orders.to(image.device).tensor_split(_QUARTERS, dim=1):
        masked = torch.ones(orders.shape, dtype=torch.bool, device=image.device).scatter_(1, visible, False)
        values = _predicted(encoder, image.expand(_SHUFFLES, -1, -1, -1), masked)
        squares += ((values - truth).square().mean(dim=2) * masked).sum(dim=0)
        predicted += (values * masked[:, :, None]).sum(dim=0)
        hidden += masked.sum(dim=0)
    pixels = _pixels(encoder, (predicted / hidden[:, None])[None])
    contrast = truth.var(dim=1, correction=0) + (_FLAT / encoder.std.square()).mean()
    return _grid(squares / hidden / contrast), pixels


def reconstruct(encoder: Reconstructor, face: np.ndarray, masked: Tensor) -> np.ndarray:
    """A face with its hidden patches as the network predicts them from the visible ones.

    Args:
        encoder: of :func:`load_reconstructor`.
        face: (H, W, 3) uint8 RGB.
        masked: (1, L) bool, true where a patch is hidden.

    Returns:
        (S, S, 3) uint8.

    Raises:
        DataError: not such an image.
        MaskingError: a mask of another shape.
    """
    check_rgb(face)
    config = encoder.network.encoder.config
    image = _normalised(face, config.image_size, encoder.mean, encoder.std)
    masked = masked.to(image.device)
    values = _predicted(encoder, image, masked)
    return _pixels(encoder, torch.where(masked[:, :, None], values, patchify(image, config.patch_size).double()))


def _predicted(encoder: Reconstructor, images: Tensor, masked: Tensor) -> Tensor:
    """Patches (B, L, 3P²) float64, normalised, that the network predicts for masks (B, L) bool.

    Where it was trained on patches of mean 0 and variance 1, their own mean and contrast are put in.
    """
    with torch.no_grad():
        output = encoder.network(images, masked, instance=False)
    values = cast(Tensor, output.prediction).double()
    if encoder.norm_pix:
        truth = patchify(images, encoder.network.encoder.config.patch_size).double()
        values = values * (truth.var(dim=2, keepdim=True) + PIXEL_EPS).sqrt() + truth.mean(dim=2, keepdim=True)
    return values


def _pixels(encoder: Reconstructor, patches: Tensor) -> np.ndarray:
    """Normalised patches (1, L, 3P²) as a picture (S, S, 3) uint8."""
    picture = unpatchify(patches, encoder.network.encoder.config.patch_size) * encoder.std + encoder.mean
    pixels: np.ndarray = picture[0].round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
    return pixels


# ------------------------------------------------------------------------------------------------------------- pictures


def overlay(face: np.ndarray, values: np.ndarray, *, signed: bool = False) -> np.ndarray:
    """Colour a face by a map; the stronger a place, the more its colour covers the face, which is shown in grey.

    Args:
        face: (H, W, 3) uint8 RGB.
        values: (H, W) in [0, 1], or in [-1, 1] with ``signed``: red above 0, blue below.
        signed: which of the two.

    Returns:
        (H, W, 3) uint8.

    Raises:
        DataError: not such a face, or a map of another size.
    """
    check_rgb(face)
    if values.shape != face.shape[:2]:
        raise DataError(f"a map of shape {values.shape} does not fit a face of {face.shape[0]}×{face.shape[1]} pixels")
    colours = matplotlib.colormaps[_SIGNED if signed else _PLAIN]((values + 1) / 2 if signed else values)[..., :3]
    grey = (face @ [0.299, 0.587, 0.114])[..., None] / 255
    strength = 0.8 * np.sqrt(np.abs(values))[..., None]
    return np.round(255 * ((1 - strength) * grey + strength * colours)).clip(0, 255).astype(np.uint8)


def _stretched(values: np.ndarray, limits: tuple[float, float], shape: tuple[int, ...]) -> np.ndarray:
    """Values per patch on a colour scale, repeated over the pixels: what a patch says is not known any finer."""
    low, high = limits
    if low < 0:
        scaled = values / high
    else:
        scaled = (values - low) / (high - low) if high > low else np.zeros_like(values)
    rows, columns = (np.arange(side) * len(values) // side for side in shape[:2])
    return scaled[np.ix_(rows, columns)].astype(np.float32)


def _drawn(found: Explanation) -> Figure:
    panels = 1 + len(found.patches) + (found.reconstructed is not None) + bool(found.regions)
    columns = min(panels, 4)
    lines = -(-panels // columns)
    figure = Figure(figsize=(3.2 * columns, 3.9 * lines), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).ravel())
    for axis in axes[panels:]:
        axis.set_visible(False)
    drawn = iter(axes)
    _picture(next(drawn), found.face, f"P({_attack(found)}) = {found.probability:.3f}")
    for name in found.patches:
        axis = next(drawn)
        _picture(axis, found.overlay(name), VIEWS[name].title)
        _legend(figure, axis, name, found.limits(name), _attack(found))
    if found.reconstructed is not None:
        _picture(next(drawn), found.reconstructed, "predicted where hidden")
    if found.regions:
        _bars(next(drawn), found.regions, _attack(found))
    if found.omitted:
        text = "; ".join(f"no {VIEWS[name].title}: {reason}" for name, reason in found.omitted.items())
        figure.supxlabel(text, fontsize=8)
    return figure


def _attack(found: Explanation) -> str:
    return "attack" if found.task == "antispoof" else "fake"


def _legend(figure: Figure, axis: Any, name: str, limits: tuple[float, float], attack: str) -> None:
    view, (low, high) = VIEWS[name], limits
    factor = 100 if name == "rollout" else 1
    scale = ScalarMappable(Normalize(factor * low, factor * high), _SIGNED if view.signed else _PLAIN)
    bar = figure.colorbar(scale, ax=axis, orientation="horizontal", shrink=0.9, aspect=18, pad=0.03)
    bar.set_label(view.unit + (f" (red: {attack})" if view.signed else ""), fontsize=8)
    bar.ax.tick_params(labelsize=7)
    bar.locator = MaxNLocator(5)
    bar.update_ticks()


def _picture(axis: Any, picture: np.ndarray, title: str) -> None:
    axis.imshow(picture)
    axis.set_title(title, fontsize=10)
    axis.set_axis_off()


def _bars(axis: Any, regions: Mapping[str, RegionEffect], attack: str) -> None:
    names = list(regions)
    logits = [effect.logit for effect in regions.values()]
    axis.barh(names, logits, color=[_RED if value > 0 else _BLUE for value in logits], height=0.65)
    axis.axvline(0, color="#404040", linewidth=0.8)
    axis.invert_yaxis()
    reach = max(map(abs, logits)) or 1.0
    axis.set_xlim(-1.75 * reach, 1.75 * reach)
    for row, effect in enumerate(regions.values()):
        side = 1 if effect.logit >= 0 else -1
        axis.text(
            effect.logit + 0.05 * side * reach, row, f"{effect.probability:+.2f}", va="center", fontsize=7,
            ha="left" if side > 0 else "right",
        )  # fmt: skip
    axis.set_title("what each region adds", fontsize=10)
    axis.set_xlabel(f"logit; numbers: probability (+: {attack})", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
