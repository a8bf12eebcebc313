"""SLADD's two networks (CVPR 2022, arXiv 2203.12208, sec. 3): a detector that also names how a face was forged, and
the policy that chooses, for a face and a reference, the forgery to make.

Both stand on a CNN of timm (Xception in the paper). The detector has five outputs: real or fake, and for training the
kind of blending, the mixing ratio and a map of the forged region. Only the first is used in prediction.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsvfm.errors import CheckpointError, ConfigError
from fsvfm.faces.synthesis import BLENDINGS, REGIONS
from fsvfm.loading import load_into
from fsvfm.models.heads import DetectorOutput

if TYPE_CHECKING:
    from fsvfm.checkpoint import Checkpoint

#: `paper`: AM-softmax on cosines. `reference`: on raw linear outputs, as the published code does; and see `SladdTask`.
MODES = ("paper", "reference")

#: What the detector tells apart beside real and fake: the blendings that change something, real, forged by others.
KINDS = (*BLENDINGS[:3], "real", "data set")

_MAP_STRIDE = 16  # pixels per cell of the forgery map: 16×16 cells of a 256-pixel face, 728 channels in Xception
_DROPOUT = 0.5


class Maps(NamedTuple):
    """Feature maps of a CNN: the `last` (B, d, h, w), and those of stride 16 (B, c, S/16, S/16)."""

    last: Tensor
    middle: Tensor


class Backbone(nn.Module):
    """A CNN of timm that gives its last feature maps and those of stride 16.

    Args:
        architecture: name of the network in timm, ``legacy_xception`` in the paper. Nothing is downloaded.
        channels: of the input.

    Raises:
        ConfigError: no such network, or one without feature maps of stride 16.
    """

    def __init__(self, architecture: str, channels: int = 3) -> None:
        super().__init__()
        if not timm.is_model(architecture):
            raise ConfigError(
                f"model.architecture={architecture!r} is no network of timm; expected a CNN such as legacy_xception"
            )
        self.body = timm.create_model(architecture, pretrained=False, num_classes=0, in_chans=channels)
        strides = [info["reduction"] for info in getattr(self.body, "feature_info", [])]
        if strides[:-1].count(_MAP_STRIDE) != 1 or not hasattr(self.body, "forward_intermediates"):
            raise ConfigError(
                f"model.architecture={architecture!r} has feature maps of strides {strides}; expected a CNN with "
                f"{_MAP_STRIDE} once among them, before the last, such as legacy_xception or resnet18"
            )
        self.place = strides.index(_MAP_STRIDE)
        self.middle_dim = int(self.body.feature_info[self.place]["num_chs"])

    def forward_features(self, images: Tensor) -> Maps:
        """(B, channels, S, S) normalised images → feature maps."""
        last, (middle,) = self.body.forward_intermediates(images, indices=[self.place])
        return Maps(last, middle)

    def forward_head(self, maps: Maps, pre_logits: bool = True) -> Tensor:
        """Feature maps → feature (B, d), averaged over the last ones."""
        return self.body.forward_head(maps.last, pre_logits=True)

    @property
    def dim(self) -> int:
        """Width of the feature."""
        return int(self.body.head_hidden_size)

    def initialise(self, checkpoint: Checkpoint) -> str:
        """Start from a detector of this kind, or from any checkpoint of the same network of timm.

        The first convolution of a network with another number of input channels starts as in the published code, small
        (Xavier, gain 0.02).

        Returns:
            What was loaded, in words.

        Raises:
            CheckpointError: the checkpoint is of another network.
        """
        state = {
            key.removeprefix("backbone.").removeprefix("encoder.").removeprefix("body."): tensor
            for key, tensor in checkpoint.state.items()
            if key.startswith(("backbone.", "encoder."))
        }
        if not state:
            raise CheckpointError(f"{checkpoint.source} holds no backbone to start {type(self.body).__name__} from")
        entry, first = next((n, m) for n, m in self.body.named_modules() if isinstance(m, nn.Conv2d))
        fresh = f"{entry}.weight"
        other = fresh in state and state[fresh].shape != first.weight.shape
        if other:
            nn.init.xavier_normal_(first.weight, gain=0.02)
            state.pop(fresh)
        return str(load_into(self.body, state, expect_missing=[fresh] if other else []))


class Cosine(nn.Module):
    """Cosines between a feature and one direction per class.

    Args:
        dim: of the feature.
        classes: how many.
    """

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, dim))
        nn.init.normal_(self.weight)

    def forward(self, feature: Tensor) -> Tensor:
        """(B, dim) → (B, classes) in [-1, 1]."""
        return F.linear(F.normalize(feature, dim=-1), F.normalize(self.weight, dim=-1))


class Head(nn.Module):
    """Real or fake, and what is only learned for the sake of the features: kind of blending, ratio and map.

    Args:
        dim: width of the feature.
        middle_dim: channels of the maps of stride 16.
        mode: one of :data:`MODES`, which decides what goes into AM-softmax.
        scale: of the cosines in the softmax (AM-softmax's s).

    Raises:
        ConfigError: an unknown mode.
    """

    def __init__(self, dim: int, middle_dim: int, *, mode: str, scale: float) -> None:
        super().__init__()
        if mode not in MODES:
            raise ConfigError(f"model.mode={mode!r} does not exist; choose one of {', '.join(MODES)}")
        classifier = Cosine if mode == "paper" else nn.Linear
        self.scale = float(scale) if mode == "paper" else 1.0
        self.dropout = nn.Dropout(_DROPOUT)
        self.fc = classifier(dim, 2)
        self.kind = classifier(dim, len(KINDS))
        self.ratio = nn.Linear(dim, 1)
        self.map = nn.Sequential(
            nn.Conv2d(middle_dim, middle_dim, 3, padding=1, groups=middle_dim, bias=False),
            nn.Conv2d(middle_dim, 1, 1, bias=False),
            nn.Sigmoid(),
        )

    def margins(self, feature: Tensor) -> Tensor:
        """(B, dim) → (B, 2), what AM-softmax takes: cosines, or raw linear outputs in the mode ``reference``."""
        return self.fc(self.dropout(feature))

    def forward(self, feature: Tensor, maps: Maps) -> DetectorOutput:
        """Logits (B, 2) of real and fake in the detector's class order: scaled cosines, or the raw outputs."""
        return DetectorOutput(self.scale * self.margins(feature), None)


def build(model: Mapping[str, Any], tune: Mapping[str, Any]) -> tuple[Backbone, Head]:
    """Backbone and head of a detector.

    Args:
        model: ``architecture``, ``mode`` and ``scale``, see :class:`Backbone` and :class:`Head`.
        tune: ``name`` is ``full``, or ``linear`` to train the head alone.

    Raises:
        ConfigError: another way of tuning, or as the two classes say.
    """
    if tune["name"] not in ("full", "linear"):
        raise ConfigError(f"tune={tune['name']} does not fit model.family=sladd; choose tune=full or tune=linear")
    backbone = Backbone(str(model["architecture"]))
    return backbone, Head(backbone.dim, backbone.middle_dim, mode=str(model["mode"]), scale=float(model["scale"]))


class Choices(NamedTuple):
    """The policy's preferences: logits of the regions (B, 10) and blendings (B, 4), and the ratio's logit (B,)."""

    region: Tensor
    blending: Tensor
    ratio: Tensor


class Actions(NamedTuple):
    """What the policy chose for each pair, and how likely it was.

    `region` and `blending` (B,) int64, places in ``REGIONS`` and ``BLENDINGS``; `ratio` (B,) in 0–1; `log_region`,
    `log_blending`, `log_ratio` (B,): logarithms of their probabilities (of the ratio: up to a constant), with
    gradients; `entropy` (B,), with gradients.
    """

    region: Tensor
    blending: Tensor
    ratio: Tensor
    log_region: Tensor
    log_blending: Tensor
    log_ratio: Tensor
    entropy: Tensor


class Policy(nn.Module):
    """Chooses a forgery for a face and a reference.

    Args:
        architecture: name of its network in timm.
    """

    def __init__(self, architecture: str) -> None:
        super().__init__()
        self.backbone = Backbone(architecture, channels=6)
        # The maps of stride 16 are not used; the last ones are made from them, so that every parameter is trained.
        dim = self.backbone.dim
        self.region, self.blending, self.ratio = (
            nn.Sequential(nn.Dropout(_DROPOUT), nn.Linear(dim, size)) for size in (len(REGIONS), len(BLENDINGS), 1)
        )

    def forward(self, images: Tensor, references: Tensor) -> Choices:
        """(B, 3, S, S) normalised images and references → preferences."""
        maps = self.backbone.forward_features(torch.cat([images, references], dim=1))
        feature = self.backbone.forward_head(maps)
        region, blending, ratio = self.region(feature), self.blending(feature), self.ratio(feature)
        return Choices(region.float(), blending.float(), ratio.float().squeeze(-1))


def choose(choices: Choices, mode: str, generator: torch.Generator | None = None) -> Actions:
    """Draw a forgery for each pair.

    Region and blending are drawn from their softmax. The ratio is a sigmoid of the policy's output plus unit normal
    noise: without noise nothing would tell in which direction it should move. The published code (``reference``) adds
    none and takes log σ for the ratio's log-probability, which pulls every ratio to 1.

    Args:
        choices: of the policy.
        mode: one of :data:`MODES`.
        generator: source of the draws, on the choices' device.
    """
    picked, chances, entropy = [], [], torch.zeros_like(choices.ratio)
    for logits in (choices.region, choices.blending):
        logarithms = F.log_softmax(logits, dim=-1)
        action = torch.multinomial(logarithms.detach().exp(), 1, generator=generator)
        picked.append(action.squeeze(-1))
        chances.append(logarithms.gather(1, action).squeeze(-1))
        entropy = entropy - (logarithms.exp() * logarithms).sum(dim=-1)
    if mode == "paper":
        noise = torch.empty_like(choices.ratio).normal_(generator=generator)
        drawn = choices.ratio.detach() + noise
        log_ratio = -((drawn - choices.ratio) ** 2) / 2
    else:
        drawn = choices.ratio.detach()
        log_ratio = F.logsigmoid(choices.ratio)
        entropy = entropy - log_ratio * torch.sigmoid(choices.ratio)
    (region, blending), (log_region, log_blending) = picked, chances
    return Actions(region, blending, torch.sigmoid(drawn), log_region, log_blending, log_ratio, entropy)
