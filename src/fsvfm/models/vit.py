"""Vanilla vision transformers of FS-VFM: sizes, registry, masked encoder for pre-training, downstream backbone."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fsvfm.errors import ConfigError, DataError

NORM_EPS = 1e-6  # LayerNorm epsilon of every transformer block (FS-VFM, networks).


@dataclass(frozen=True)
class ViTConfig:
    """Architecture of a plain vision transformer.

    Attributes:
        name: registry name, for example ``vit_base``.
        patch_size: side of a patch, pixels.
        dim: embedding width.
        depth: number of transformer blocks.
        heads: attention heads per block.
        image_size: side of the square input image, pixels.

    Raises:
        ConfigError: a value is not a positive integer, the image is not divisible into patches,
            or the width is not divisible by the number of heads (or by 4, for the sin-cos embedding).
    """

    name: str
    patch_size: int
    dim: int
    depth: int
    heads: int
    image_size: int = 224

    def __post_init__(self) -> None:
        for key in ("patch_size", "dim", "depth", "heads", "image_size"):
            require_positive(f"model {self.name}: {key}", getattr(self, key))
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"model {self.name}: image_size {self.image_size} is not divisible by patch_size {self.patch_size}; "
                f"use {self.image_size // self.patch_size * self.patch_size or self.patch_size} or another multiple."
            )
        require_heads(f"model {self.name}", self.dim, self.heads)
        if self.dim % 4:
            raise ConfigError(
                f"model {self.name}: dim {self.dim} is not divisible by 4; the sin-cos embedding needs that."
            )

    @property
    def grid_size(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches in the image (L)."""
        return self.grid_size**2

    @classmethod
    def from_mapping(cls, model: Mapping[str, Any]) -> ViTConfig:
        """Read the fields of this class from a model config (a `configs/model` file or `model.json`); ignore the rest.

        What a known size does not state is taken from the registry.

        Raises:
            ConfigError: a required field is missing, or a value is impossible.
        """
        known = asdict(SIZES[model["name"]]) if model.get("name") in SIZES else {}
        known.update({field.name: model[field.name] for field in fields(cls) if field.name in model})
        missing = [field.name for field in fields(cls) if field.name not in known and field.name != "image_size"]
        if missing:
            raise ConfigError(f"model config lacks {', '.join(missing)}; add the missing keys (see configs/model).")
        return cls(**known)


def require_positive(what: str, value: object) -> None:
    """Raise ConfigError unless `value` is an integer of at least 1 (a bool is not)."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{what} is {value!r}; expected a positive integer.")


def require_heads(what: str, dim: int, heads: int) -> None:
    """Raise ConfigError unless `dim` splits evenly into `heads`."""
    if dim % heads:
        fitting = [h for h in range(1, dim + 1) if dim % h == 0 and h <= 2 * heads]
        raise ConfigError(f"{what}: dim {dim} is not divisible by heads {heads}; heads that fit: {fitting}.")


# FS-VFM, table of model sizes; ViT-S has 12 heads (timm's has 6). vit_tiny is ours, for demos and tests.
SIZES: dict[str, ViTConfig] = {
    config.name: config
    for config in (
        ViTConfig("vit_tiny", patch_size=16, dim=192, depth=4, heads=3),
        ViTConfig("vit_small", patch_size=16, dim=384, depth=12, heads=12),
        ViTConfig("vit_base", patch_size=16, dim=768, depth=12, heads=12),
        ViTConfig("vit_large", patch_size=16, dim=1024, depth=24, heads=16),
        ViTConfig("vit_huge", patch_size=14, dim=1280, depth=32, heads=16),
    )
}


def list_models(pattern: str = "*") -> list[str]:
    """Return the names of the known sizes that match a shell pattern, smallest first."""
    return fnmatch.filter(SIZES, pattern)


def vit_config(name: str, **overrides: Any) -> ViTConfig:
    """Return the configuration of a known size, with some fields replaced.

    Raises:
        ConfigError: unknown size, unknown field, or an impossible combination of values.
    """
    if name not in SIZES:
        raise ConfigError(f"unknown model {name!r}; expected one of {', '.join(SIZES)}.")
    unknown = sorted(set(overrides) - {field.name for field in fields(ViTConfig)})
    if unknown:
        raise ConfigError(
            f"model {name} has no field {', '.join(unknown)}; fields: {[f.name for f in fields(ViTConfig)]}."
        )
    return replace(SIZES[name], **overrides)


def sincos_pos_embed(dim: int, grid_size: int, cls_token: bool = True) -> Tensor:
    """Compute the fixed two-dimensional sin-cos position embedding of a square grid (MAE, appendix; FS-VFM, networks).

    The first half of the channels encodes the column, the second half the row; each half is sines, then cosines,
    of geometrically spaced frequencies. The CLS token's row is zero.

    Args:
        dim: channels, divisible by 4.
        grid_size: patches along one side (G).
        cls_token: put a zero row for the CLS token first.

    Returns:
        (1, 1 + G², dim) float32, or (1, G², dim) without CLS; patches row-major.

    Raises:
        ConfigError: `dim` is not divisible by 4.
    """
    if dim % 4:
        raise ConfigError(f"sin-cos embedding: dim {dim} is not divisible by 4; choose a multiple of 4.")
    quarter = dim // 4
    frequency = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angle = torch.arange(grid_size, dtype=torch.float64)[:, None] * frequency
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # (G, dim / 2), one row per coordinate
    columns = axis[None, :, :].expand(grid_size, -1, -1)
    rows = axis[:, None, :].expand(-1, grid_size, -1)
    patches = torch.cat([columns, rows], dim=2).reshape(grid_size**2, dim)
    if cls_token:
        patches = torch.cat([torch.zeros(1, dim, dtype=torch.float64), patches])
    return patches[None].float()


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images into flattened patches, row-major: (B, 3, H, W) -> (B, L, p²·3), values ordered (y, x, channel).

    Raises:
        ConfigError: height or width is not divisible by `patch_size`.
    """
    batch, channels, height, width = images.shape
    if height % patch_size or width % patch_size:
        raise ConfigError(
            f"image of {height}x{width} pixels is not divisible into patches of {patch_size}; resize it first."
        )
    rows, columns = height // patch_size, width // patch_size
    cells = images.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return cells.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, patch_size**2 * channels)


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """Undo `patchify` for square images: (B, L, p²·C) -> (B, C, H, W).

    Raises:
        ConfigError: L is not a square number, or the last size is not a multiple of p².
    """
    batch, length, size = patches.shape
    grid = round(length**0.5)
    channels = size // patch_size**2
    if grid**2 != length or channels * patch_size**2 != size:
        raise ConfigError(
            f"patches of shape {tuple(patches.shape)} do not form a square image with patches of {patch_size}."
        )
    cells = patches.reshape(batch, grid, grid, patch_size, patch_size, channels)
    return cells.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, grid * patch_size, grid * patch_size)


def take(tokens: Tensor, ids: Tensor) -> Tensor:
    """Tokens by their place in the sequence: (B, N, d) and (B, K) int64 to (B, K, d)."""
    return tokens.gather(1, ids[:, :, None].expand(-1, -1, tokens.shape[2]))


def make_blocks(dim: int, depth: int, heads: int) -> nn.ModuleList:
    """Build pre-norm transformer blocks: qkv bias, MLP ratio 4, LayerNorm epsilon 1e-6, fused attention."""
    norm = partial(nn.LayerNorm, eps=NORM_EPS)
    return nn.ModuleList(Block(dim, heads, mlp_ratio=4.0, qkv_bias=True, norm_layer=norm) for _ in range(depth))


def init_linear_and_norm(module: nn.Module) -> None:
    """Initialise one module, for `nn.Module.apply`: Linear xavier-uniform with zero bias, LayerNorm 1/0."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


class ViTEncoder(nn.Module):
    """Pre-training encoder: patch embedding, fixed sin-cos position embedding, CLS token, blocks, final norm.

    Args:
        config: architecture.
        grad_checkpointing: recompute the blocks in the backward pass (less memory, about a third more time).
    """

    pos_embed: Tensor

    def __init__(self, config: ViTConfig, *, grad_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.grad_checkpointing = grad_checkpointing
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.register_buffer("pos_embed", sincos_pos_embed(config.dim, config.grid_size))
        self.patch_embed = PatchEmbed(config.image_size, config.patch_size, 3, config.dim)
        self.blocks = make_blocks(config.dim, config.depth, config.heads)
        self.norm = nn.LayerNorm(config.dim, eps=NORM_EPS)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as FS-VFM does: CLS N(0, 0.02), patch embedding xavier-uniform as a linear layer, zero bias."""
        self.apply(init_linear_and_norm)
        projection = self.patch_embed.proj
        nn.init.xavier_uniform_(projection.weight.view(self.config.dim, -1))
        nn.init.zeros_(projection.bias)
        nn.init.normal_(self.cls_token, std=0.02)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Encode whole images, or only some of their patches.

        Args:
            images: (B, 3, S, S) float, normalised, S the configured image size.
            keep: (B, K) int64 ids of the patches to encode, or None for all.

        Returns:
            (B, 1 + K, dim) tokens after the final norm, CLS first, patches in the order of `keep`.

        Raises:
            DataError: images of another size.
        """
        size = self.config.image_size
        if images.shape[1:] != (3, size, size):
            raise DataError(
                f"{self.config.name} expects images (B, 3, {size}, {size}); got {tuple(images.shape)}: resize them."
            )
        # Positions are added before patches are dropped, so that a visible patch knows where it is.
        patches = self.patch_embed(images) + self.pos_embed[:, 1:]
        if keep is not None:
            patches = take(patches, keep)
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(images), -1, -1)
        tokens = torch.cat([cls_token.to(patches.dtype), patches], dim=1)
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, use_reentrant=False)
            else:
                tokens = block(tokens)
        return self.norm(tokens)


def create_backbone(
    config: ViTConfig,
    *,
    drop_path: float = 0.0,
    drop_rate: float = 0.0,
    pool: str = "avg",
    grad_checkpointing: bool = False,
) -> VisionTransformer:
    """Build the downstream backbone (FS-VFM): timm's ViT without a head, position embedding trainable.

    Args:
        config: architecture.
        drop_path: stochastic depth of the last block, rising linearly from 0, in [0, 1).
        drop_rate: dropout on the pooled feature, in [0, 1).
        pool: ``avg`` (mean over patch tokens, then `fc_norm`; the papers') or ``cls`` (CLS token after `norm`).
        grad_checkpointing: recompute the blocks in the backward pass.

    Returns:
        A module mapping (B, 3, S, S) float to (B, dim) float; keys as in released fine-tuned files, less the head.

    Raises:
        ConfigError: unknown pooling or a rate out of range.
    """
    if pool not in ("avg", "cls"):
        raise ConfigError(f"pool {pool!r} is unknown; expected avg (mean over patches) or cls.")
    for name, rate in (("drop_path", drop_path), ("drop_rate", drop_rate)):
        if not 0.0 <= rate < 1.0:
            raise ConfigError(f"{name} is {rate}; expected a value in [0, 1).")
    backbone = VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.dim,
        depth=config.depth,
        num_heads=config.heads,
        num_classes=0,
        global_pool="avg" if pool == "avg" else "token",
        norm_layer=partial(nn.LayerNorm, eps=NORM_EPS),
        drop_path_rate=drop_path,
        drop_rate=drop_rate,
    )
    backbone.set_grad_checkpointing(grad_checkpointing)
    return backbone
