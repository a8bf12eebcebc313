"""Online and target networks of FS-VFM pre-training (arXiv 2510.10663; FSFM, arXiv 2412.12032, sec. 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsvfm.errors import ConfigError, DataError, MaskingError
from fsvfm.models.vit import (
    NORM_EPS,
    ViTConfig,
    ViTEncoder,
    init_linear_and_norm,
    make_blocks,
    require_heads,
    require_positive,
    sincos_pos_embed,
    take,
)


@dataclass(frozen=True)
class RepresentationDecoderConfig:
    """Decoder of the identity branch, as wide as the encoder.

    Attributes:
        depth: transformer blocks.
        heads: attention heads; must divide the encoder's width.
        pos_embed: ``sincos`` (paper) or ``zeros`` (reference: what the released checkpoints were trained with).
    """

    depth: int = 2
    heads: int = 16
    pos_embed: str = "sincos"

    def __post_init__(self) -> None:
        require_positive("representation_decoder.depth", self.depth)
        require_positive("representation_decoder.heads", self.heads)
        if self.pos_embed not in ("sincos", "zeros"):
            raise ConfigError(
                f"representation_decoder.pos_embed is {self.pos_embed!r}; expected sincos (paper) or zeros (reference)."
            )


@dataclass(frozen=True)
class PixelDecoderConfig:
    """Decoder that reconstructs pixels.

    Attributes:
        dim: width; divisible by `heads` and by 4.
        depth: transformer blocks.
        heads: attention heads.
    """

    dim: int = 512
    depth: int = 8
    heads: int = 16

    def __post_init__(self) -> None:
        for key in ("dim", "depth", "heads"):
            require_positive(f"pixel_decoder.{key}", getattr(self, key))
        require_heads("pixel_decoder", self.dim, self.heads)


@dataclass(frozen=True)
class ProjectionConfig:
    """Projector and predictor: hidden width and output width."""

    hidden: int = 4096
    out: int = 256

    def __post_init__(self) -> None:
        require_positive("projection.hidden", self.hidden)
        require_positive("projection.out", self.out)


@dataclass(frozen=True)
class PretrainNetConfig:
    """Everything of the pre-training networks besides the encoder; the defaults are the papers'."""

    representation_decoder: RepresentationDecoderConfig = field(default_factory=RepresentationDecoderConfig)
    pixel_decoder: PixelDecoderConfig = field(default_factory=PixelDecoderConfig)
    projection: ProjectionConfig = field(default_factory=ProjectionConfig)

    @classmethod
    def from_mapping(cls, model: Mapping[str, Any]) -> PretrainNetConfig:
        """Read the three parts from a model config (a `configs/model` file or `model.json`); ignore the rest.

        Raises:
            ConfigError: a part has an unknown key or an impossible value.
        """
        return cls(
            representation_decoder=_read(RepresentationDecoderConfig, "representation_decoder", model),
            pixel_decoder=_read(PixelDecoderConfig, "pixel_decoder", model),
            projection=_read(ProjectionConfig, "projection", model),
        )


Part = TypeVar("Part", RepresentationDecoderConfig, PixelDecoderConfig, ProjectionConfig)


def _read(part: type[Part], name: str, model: Mapping[str, Any]) -> Part:
    values = model.get(name) or {}
    known = [f.name for f in fields(part)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ConfigError(f"{name} has no key {', '.join(unknown)}; expected {', '.join(known)}.")
    return part(**values)


class OnlineOutput(NamedTuple):
    """What one forward pass of the online network gives.

    Attributes:
        prediction: (B, L, p²·3) predicted pixels of every patch, or (B, budget, p²·3) of the `hidden` ones; None where
            not asked for.
        feature: (B, out) float32 identity feature, L2-normalised; None where not asked for.
        tokens: (B, 1 + K, dim) encoder output for CLS and the K visible patches.
        representation: (B, 1 + L, dim) output of the representation decoder; None where `feature` is.
        hidden: (B, budget) int64 ids of the masked patches, ascending.
    """

    prediction: Tensor | None
    feature: Tensor | None
    tokens: Tensor
    representation: Tensor | None
    hidden: Tensor


def split_ids(masked: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """Ids of the visible and of the masked patches, each ascending.

    Args:
        masked: (B, L) bool, exactly `budget` true per row (not checked: that would wait for the GPU).
        budget: masked patches per image, 0 < budget < L.

    Returns:
        (B, L - budget) and (B, budget) int64.

    Raises:
        MaskingError: `masked` is not two-dimensional, or the budget is out of range.
    """
    if masked.ndim != 2 or not 0 < budget < masked.shape[1]:
        raise MaskingError(
            f"mask of shape {tuple(masked.shape)} with a budget of {budget}; expected (B, L) and 0 < budget < L."
        )
    order = masked.to(torch.uint8).argsort(dim=1, stable=True)
    return order[:, :-budget], order[:, -budget:]


def visible_ids(masked: Tensor, budget: int) -> Tensor:
    """The visible half of :func:`split_ids`: (B, L - budget) int64."""
    return split_ids(masked, budget)[0]


def insert_mask_tokens(tokens: Tensor, mask_token: Tensor, keep: Tensor, num_patches: int) -> Tensor:
    """Put visible tokens back in their places and the mask token everywhere else.

    Args:
        tokens: (B, 1 + K, dim), CLS first.
        mask_token: (1, 1, dim).
        keep: (B, K) int64 patch ids of the tokens after CLS.
        num_patches: L.

    Returns:
        (B, 1 + L, dim), CLS first, patches row-major.
    """
    batch, _, dim = tokens.shape
    patches = mask_token.to(tokens.dtype).expand(batch, num_patches, dim)
    patches = patches.scatter(1, keep[:, :, None].expand(-1, -1, dim), tokens[:, 1:])
    return torch.cat([tokens[:, :1], patches], dim=1)


class MLPHead(nn.Sequential):
    """Projector or predictor: Linear, LayerNorm (not batch norm), ReLU, Linear; (B, d_in) -> (B, d_out)."""

    def __init__(self, d_in: int, d_hidden: int, d_out: int) -> None:
        super().__init__(nn.Linear(d_in, d_hidden), nn.LayerNorm(d_hidden), nn.ReLU(), nn.Linear(d_hidden, d_out))


class RepresentationDecoder(nn.Module):
    """Decoder of the identity branch at the encoder's width: linear, mask tokens, positions, blocks, norm, linear."""

    pos_embed: Tensor

    def __init__(self, vit: ViTConfig, config: RepresentationDecoderConfig) -> None:
        super().__init__()
        require_heads("representation_decoder", vit.dim, config.heads)
        positions = sincos_pos_embed(vit.dim, vit.grid_size)
        # The published code left this embedding at zero, and never trained it; its checkpoints carry the zeros.
        self.register_buffer("pos_embed", positions if config.pos_embed == "sincos" else torch.zeros_like(positions))
        self.embed = nn.Linear(vit.dim, vit.dim)
        self.blocks = make_blocks(vit.dim, config.depth, config.heads)
        self.norm = nn.LayerNorm(vit.dim, eps=NORM_EPS)
        self.pred = nn.Linear(vit.dim, vit.dim)

    def forward(self, tokens: Tensor, mask_token: Tensor, keep: Tensor | None = None) -> Tensor:
        """Decode encoder tokens into a representation of the whole image.

        Args:
            tokens: (B, 1 + K, dim) encoder output; K = L where nothing is masked.
            mask_token: (1, 1, dim).
            keep: (B, K) ids of the visible patches, or None where nothing is masked.

        Returns:
            (B, 1 + L, dim), CLS included.
        """
        tokens = self.embed(tokens)
        if keep is not None:
            tokens = insert_mask_tokens(tokens, mask_token, keep, self.pos_embed.shape[1] - 1)
        tokens = tokens + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens)
        return self.pred(self.norm(tokens))


class PixelDecoder(nn.Module):
    """Decoder of pixels: mask tokens at encoder width, linear, positions, blocks, norm, linear; CLS dropped."""

    pos_embed: Tensor

    def __init__(self, vit: ViTConfig, config: PixelDecoderConfig) -> None:
        super().__init__()
        self.register_buffer("pos_embed", sincos_pos_embed(config.dim, vit.grid_size))
        self.embed = nn.Linear(vit.dim, config.dim)
        self.blocks = make_blocks(config.dim, config.depth, config.heads)
        self.norm = nn.LayerNorm(config.dim, eps=NORM_EPS)
        self.pred = nn.Linear(config.dim, vit.patch_size**2 * 3)

    def forward(self, tokens: Tensor, mask_token: Tensor, keep: Tensor, wanted: Tensor | None = None) -> Tensor:
        """Predict the pixels of every patch, or of some.

        Args:
            tokens: (B, 1 + K, dim) encoder output (not the representation decoder's).
            mask_token: (1, 1, dim).
            keep: (B, K) ids of the visible patches.
            wanted: (B, N) int64 ids of the patches to predict, or None for all L.

        Returns:
            (B, L or N, p²·3), ordered as `patchify` orders the pixels of a patch.
        """
        tokens = insert_mask_tokens(tokens, mask_token, keep, self.pos_embed.shape[1] - 1)
        tokens = self.embed(tokens) + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens)
        if wanted is None:
            return self.pred(self.norm(tokens))[:, 1:]
        return self.pred(self.norm(take(tokens, 1 + wanted)))  # behind CLS


class TargetNetwork(nn.Module):
    """Target (teacher) network: encoder, representation decoder, projector. It sees whole images and gets no gradient.

    Args:
        vit: encoder architecture.
        config: decoders and projection.
        grad_checkpointing: recompute the encoder's blocks in the backward pass.
    """

    def __init__(self, vit: ViTConfig, config: PretrainNetConfig, *, grad_checkpointing: bool = False) -> None:
        super().__init__()
        self.encoder = ViTEncoder(vit, grad_checkpointing=grad_checkpointing)
        # One mask token, of encoder width, serves both decoders; the target keeps a copy, as released checkpoints do.
        self.mask_token = nn.Parameter(torch.zeros(1, 1, vit.dim))
        self.representation_decoder = RepresentationDecoder(vit, config.representation_decoder)
        self.projector = MLPHead(vit.dim, config.projection.hidden, config.projection.out)
        nn.init.normal_(self.mask_token, std=0.02)
        self.representation_decoder.apply(init_linear_and_norm)
        self.projector.apply(init_linear_and_norm)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Map whole images (B, 3, S, S) to L2-normalised float32 features (B, out), without gradient."""
        representation = self.representation_decoder(self.encoder(images), self.mask_token)
        return F.normalize(self.projector(representation.mean(dim=1)).float(), dim=-1)


class OnlineNetwork(TargetNetwork):
    """Online (student) network: the target's parts, a predictor and a pixel decoder. It sees visible patches only."""

    def __init__(self, vit: ViTConfig, config: PretrainNetConfig, *, grad_checkpointing: bool = False) -> None:
        super().__init__(vit, config, grad_checkpointing=grad_checkpointing)
        self.predictor = MLPHead(config.projection.out, config.projection.hidden, config.projection.out)
        self.pixel_decoder = PixelDecoder(vit, config.pixel_decoder)
        self.predictor.apply(init_linear_and_norm)
        self.pixel_decoder.apply(init_linear_and_norm)

    def forward(  # type: ignore[override]
        self,
        images: Tensor,
        masked: Tensor,
        *,
        budget: int | None = None,
        pixels: bool = True,
        instance: bool = True,
        whole: bool = True,
    ) -> OnlineOutput:
        """Encode the visible patches, reconstruct the pixels and compute the identity feature.

        Args:
            images: (B, 3, S, S) float, normalised.
            masked: (B, L) bool, true where the patch is hidden; the same number of true values in every row.
            budget: that number. With None it is read from `masked`, which waits for the device and checks every row.
            pixels: run the pixel decoder; False for instance discrimination only.
            instance: run representation decoder, projector and predictor; False for masked image modelling only.
            whole: predict the pixels of all patches; False: of the masked ones, which is all that the loss looks at.

        Returns:
            OnlineOutput(prediction, feature, tokens, representation, hidden).

        Raises:
            MaskingError: the mask has another shape, or rows with different numbers of masked patches.
            DataError: images of another size.
        """
        expected = (len(images), self.encoder.config.num_patches)
        if masked.shape != expected:
            raise MaskingError(f"mask of shape {tuple(masked.shape)}; expected (B, L) = {expected} for these images.")
        if budget is None:
            budget = _common_budget(masked)
        keep, hidden = split_ids(masked, budget)
        tokens = self.encoder(images, keep)
        prediction = feature = representation = None
        if instance:
            representation = self.representation_decoder(tokens, self.mask_token, keep)
            # The mean runs over all tokens, CLS and mask tokens included.
            feature = self.predictor(self.projector(representation.mean(dim=1)))
            feature = F.normalize(feature.float(), dim=-1)
        if pixels:
            prediction = self.pixel_decoder(tokens, self.mask_token, keep, None if whole else hidden)
        return OnlineOutput(prediction, feature, tokens, representation, hidden)


def _common_budget(masked: Tensor) -> int:
    if not len(masked):
        raise DataError("the batch is empty; expected at least one image.")
    counts = masked.sum(dim=1).tolist()
    if len(set(counts)) != 1:
        raise MaskingError(
            f"rows mask different numbers of patches ({sorted(set(counts))}); every image needs the same budget."
        )
    return int(counts[0])


def build_networks(
    model: ViTConfig | Mapping[str, Any],
    config: PretrainNetConfig | None = None,
    *,
    grad_checkpointing: bool | None = None,
) -> tuple[OnlineNetwork, TargetNetwork]:
    """Build freshly initialised pre-training networks.

    Args:
        model: encoder architecture, or a whole model config (a `configs/model` file or `model.json`).
        config: decoders and projection; None takes them from the model config, or the papers' values.
        grad_checkpointing: recompute the online encoder's blocks in the backward pass; None takes it from the model
            config, or False.

    Returns:
        (online, target): the target a copy of the online network's shared part, frozen.

    Raises:
        ConfigError: widths and heads that do not fit.
    """
    values: Mapping[str, Any] = {} if isinstance(model, ViTConfig) else model
    vit = model if isinstance(model, ViTConfig) else ViTConfig.from_mapping(model)
    config = config or PretrainNetConfig.from_mapping(values)
    if grad_checkpointing is None:
        grad_checkpointing = bool(values.get("grad_checkpointing", False))
    online = OnlineNetwork(vit, config, grad_checkpointing=grad_checkpointing)
    target = TargetNetwork(vit, config)
    copy_to_target(online, target)
    return online, target.requires_grad_(False)


def copy_to_target(online: OnlineNetwork, target: TargetNetwork) -> None:
    """Copy every parameter and buffer of the target from the online network, in place."""
    state = online.state_dict()
    target.load_state_dict({key: state[key] for key in target.state_dict()})


def shared_parameters(online: OnlineNetwork, target: TargetNetwork) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the parameters both networks have, in the same order: (online's, target's); what the EMA runs over."""
    own = dict(online.named_parameters())
    pairs = [(own[name], parameter) for name, parameter in target.named_parameters()]
    return [ours for ours, _ in pairs], [theirs for _, theirs in pairs]


def shared_buffers(online: OnlineNetwork, target: TargetNetwork) -> tuple[list[Tensor], list[Tensor]]:
    """Return the buffers both networks have (position embeddings), in the same order: (online's, target's).

    In training they are equal, and an EMA over them changes nothing. The published code averages them as well, which
    shows only where the two networks were loaded with different ones.
    """
    own = dict(online.named_buffers())
    pairs = [(own[name], buffer) for name, buffer in target.named_buffers()]
    return [ours for ours, _ in pairs], [theirs for _, theirs in pairs]
