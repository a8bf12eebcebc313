"""RFFR, real face foundation representation (arXiv 2303.08439): what a model of real faces cannot reconstruct.

A masked autoencoder that has seen real faces only, frozen, reconstructs blocks of 3×3 patches from the rest of the
image. Two ViTs look at the image and at the residual; their features, side by side, are classified.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from fsvfm.checkpoint import Checkpoint, load_backbone, load_checkpoint
from fsvfm.errors import CheckpointError, ConfigError
from fsvfm.loading import load_into
from fsvfm.models.heads import LinearHead
from fsvfm.models.pretrain_net import PixelDecoder, PixelDecoderConfig, visible_ids
from fsvfm.models.vit import ViTConfig, ViTEncoder, create_backbone, patchify, unpatchify

#: Patches along the side of a block.
SIDE = 3
#: Residuals are amplified, then clipped to [−1, 1].
GAIN = 4.0
#: ``paper``: what the text describes. ``reference``: what the published code computes; see :class:`RFFR`.
MODES = ("paper", "reference")

#: Blocks to reconstruct in one forward pass of the generator: with ViT-B at 224 px, below 1 GiB of memory.
_PASS = 64
#: Parts of a pre-training network that do not reconstruct pixels.
_UNUSED = ("representation_decoder.*", "projector.*", "predictor.*")


def block_patches(grid: int) -> Tensor:
    """Patches of every block: the blocks tile rows and columns 1 to grid − 2, so that each has neighbours all around.

    Args:
        grid: patches along one side of the image; 14 gives 4×4 blocks, 144 of 196 patches.

    Returns:
        (blocks, 9) int64 patch ids; blocks row-major over the image, patches row-major in their block.

    Raises:
        ConfigError: blocks do not fit into such a grid.
    """
    blocks, rest = divmod(grid - 2, SIDE)
    if blocks < 1 or rest:
        raise ConfigError(
            f"RFFR needs a grid of 2 + {SIDE}k patches on each side, 14 in the paper, not {grid}; choose "
            "model.image_size = 14 · model.patch_size"
        )
    start = 1 + SIDE * torch.arange(blocks)
    corners = (start[:, None] * grid + start).flatten()
    inside = (torch.arange(SIDE)[:, None] * grid + torch.arange(SIDE)).flatten()
    return corners[:, None] + inside


def residual(reconstruction: Tensor, images: Tensor) -> Tensor:
    """clamp(4 · (reconstruction − image), −1, 1): signed, pixels of both in [0, 1], any shape."""
    return (GAIN * (reconstruction - images)).clamp(-1, 1)


class Generator(nn.Module):
    """The frozen masked autoencoder: encoder, mask token and pixel decoder of a pre-training network.

    Args:
        vit: encoder.
        decoder: pixel decoder.
    """

    blocks: Tensor
    visible: Tensor

    def __init__(self, vit: ViTConfig, decoder: PixelDecoderConfig) -> None:
        super().__init__()
        self.encoder = ViTEncoder(vit)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, vit.dim))
        self.pixel_decoder = PixelDecoder(vit, decoder)
        blocks = block_patches(vit.grid_size)
        hidden = torch.zeros(len(blocks), vit.num_patches, dtype=torch.bool).scatter_(1, blocks, True)
        self.register_buffer("blocks", blocks, persistent=False)
        self.register_buffer("visible", visible_ids(hidden, SIDE**2), persistent=False)
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor, chosen: Tensor) -> Tensor:
        """Reconstruct blocks, each from all the rest of the original image.

        Args:
            images: (B, 3, S, S) float32, pixels in [0, 1].
            chosen: (k,) int64 numbers of the blocks, on the images' device.

        Returns:
            (B, 3, S, S) float32: reconstructions in the chosen blocks, the image's own pixels everywhere else.
        """
        size = self.encoder.config.patch_size
        which_image = torch.arange(len(images), device=images.device).repeat_interleave(len(chosen))
        which_block = chosen.repeat(len(images))
        parts = []
        for image, block in zip(which_image.split(_PASS), which_block.split(_PASS), strict=True):
            keep = self.visible[block]
            predicted = self.pixel_decoder(self.encoder(images[image], keep), self.mask_token, keep)
            hidden = self.blocks[block][:, :, None].expand(-1, -1, predicted.shape[2])
            parts.append(predicted.gather(1, hidden).float())
        patches = patchify(images, size)
        found = torch.cat(parts).reshape(len(images), -1, patches.shape[2])
        return unpatchify(patches.index_copy(1, self.blocks[chosen].flatten(), found), size)


class RFFR(nn.Module):
    """Generator and two ViTs; in place of a ViT in a :class:`~fsvfm.models.detector.Detector`.

    In training each block is seen with probability ``block_keep``, the same blocks in the whole batch and on all
    processes, and all of them if none was drawn; in evaluation all blocks are. The ViTs get the CLS token and the
    patches of these blocks; positions are added before the others are dropped. Only blocks that are seen are
    reconstructed.

    With ``mode="reference"`` it computes what the published code does: the gather of the patches loses the CLS token,
    so that the first patch of the first block stands in its place, and the index is raised twice, so that the
    residual's ViT sees the right-hand neighbour of every patch (where that is in no seen block, zeros).

    Args:
        vit: encoder of the generator.
        decoder: pixel decoder of the generator.
        branch: architecture of both ViTs.
        mode: one of :data:`MODES`.
        block_keep: probability in (0, 1].
        branch_init: what both ViTs start from when :meth:`initialise` is called; None leaves them random.
        drop_path: rate of stochastic depth in both ViTs.
        grad_checkpointing: recompute their blocks in the backward pass.

    Raises:
        ConfigError: an unknown mode, an impossible probability, or a grid that blocks do not fit into.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        vit: ViTConfig,
        decoder: PixelDecoderConfig,
        branch: ViTConfig,
        *,
        mode: str = "paper",
        block_keep: float = 0.25,
        branch_init: str | None = None,
        drop_path: float = 0.0,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise ConfigError(f"model.mode={mode!r} does not exist; choose one of {', '.join(MODES)}")
        if not 0 < block_keep <= 1:
            raise ConfigError(f"model.block_keep={block_keep}: expected a probability above 0, 0.25 in the paper")
        self.mode, self.block_keep, self.branch_init = mode, block_keep, branch_init
        self.generator = Generator(vit, decoder)
        options: dict[str, Any] = {"drop_path": drop_path, "pool": "cls", "grad_checkpointing": grad_checkpointing}
        self.image_branch = create_backbone(branch, **options)
        self.residual_branch = create_backbone(branch, **options)
        if mode == "reference":
            for each in (self.image_branch, self.residual_branch):
                each.cls_token.requires_grad_(False)  # nobody sees it, and DDP waits for every trained parameter
        # Images come as pixels in [0, 1], which the generator takes; their own ViT is used to ImageNet's statistics.
        self.register_buffer("mean", torch.tensor(IMAGENET_DEFAULT_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_DEFAULT_STD).view(1, 3, 1, 1))
        self.train(self.training)

    def train(self, mode: bool = True) -> RFFR:
        """Training mode, in which the generator takes no part."""
        super().train(mode)
        self.generator.eval()
        return self

    def choose_blocks(self) -> Tensor:
        """Numbers of the blocks to see now, (k,) int64 ascending, k > 0; see the class."""
        device = self.generator.blocks.device
        everything = torch.arange(len(self.generator.blocks), device=device)
        if not self.training:
            return everything
        seen = torch.rand(len(everything)) < self.block_keep
        if dist.is_available() and dist.is_initialized():
            # Each process has its own random numbers; the first one's choice is that of the whole batch.
            shared = seen.to(device)
            dist.broadcast(shared, src=0)
            seen = shared.cpu()
        return seen.nonzero().flatten().to(device) if seen.any() else everything

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) pixels in [0, 1] → (B, n, 2 · dim) tokens of both ViTs, the one that is the feature first."""
        chosen = self.choose_blocks()
        patches = self.generator.blocks[chosen].flatten()
        paper = self.mode == "paper"
        normalised = (images - self.mean) / self.std
        seen = _tokens(self.image_branch, normalised, patches, cls=paper)
        difference = residual(self.generator(images, chosen), images)
        missed = _tokens(self.residual_branch, difference, patches if paper else patches + 1, cls=paper)
        return torch.cat([seen, missed], dim=2)

    def forward_head(self, tokens: Tensor, pre_logits: bool = True) -> Tensor:
        """(B, n, 2 · dim) tokens → (B, 2 · dim) feature: CLS of both ViTs or, in reference mode, their first patch."""
        return tokens[:, 0]

    def initialise(self, checkpoint: Checkpoint) -> str:
        """Take over the generator from its pre-training and start the ViTs from ``branch_init``, or a whole detector.

        Returns:
            What was loaded, in words.

        Raises:
            CheckpointError: no pre-training checkpoint, or one of another normalisation, target or architecture.
        """
        if checkpoint.kind == "detector":
            whole = {k.removeprefix("backbone."): v for k, v in checkpoint.state.items() if k.startswith("backbone.")}
            return f"whole detector: {load_into(self, whole)}"
        _require_plain_pixels(checkpoint)
        online = {key.removeprefix("online."): v for key, v in checkpoint.only("online").state.items()}
        used = load_into(self.generator, online, expect_unused=_UNUSED).used
        report = f"generator: used {len(used)} keys, all but those of the identity branch"
        if self.branch_init is None:
            return f"{report}; both ViTs start at random (model.branch_init=null)"
        start = load_checkpoint(self.branch_init)
        loaded = [load_backbone(branch, start) for branch in (self.image_branch, self.residual_branch)]
        return f"{report}; both ViTs from {self.branch_init}: {loaded[0]}"


def _tokens(vit: VisionTransformer, images: Tensor, patches: Tensor, *, cls: bool) -> Tensor:
    """(B, 3, S, S), (n,) patch ids → (B, n, dim) tokens after the final norm, behind the CLS token if ``cls``."""
    tokens = (vit.patch_embed(images) + vit.pos_embed[:, 1:])[:, patches]
    if cls:
        first = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(images), -1, -1)
        tokens = torch.cat([first.to(tokens.dtype), tokens], dim=1)
    if vit.grad_checkpointing and torch.is_grad_enabled():
        for block in vit.blocks:
            tokens = recomputed(block, tokens, use_reentrant=False)
    else:
        tokens = vit.blocks(tokens)
    return vit.norm(tokens)


def _require_plain_pixels(checkpoint: Checkpoint) -> None:
    """Refuse a generator whose reconstructions are no pixels in [0, 1]: its residuals would be of another kind."""
    how = "train it with experiment=rffr_pretrain, and give its export as model.init"
    if checkpoint.kind != "pretrain":
        raise CheckpointError(f"{checkpoint.source} is of kind {checkpoint.kind!r}, no generator of RFFR; {how}")
    mean, std = checkpoint.meta.get("mean"), checkpoint.meta.get("std")
    loss = (checkpoint.meta["provenance"].get("hyper_parameters") or {}).get("loss") or {}
    if [mean, std] != [[0, 0, 0], [1, 1, 1]] or loss.get("norm_pix", True):
        raise CheckpointError(
            f"{checkpoint.source} was trained with mean {mean}, std {std} and norm_pix={loss.get('norm_pix', True)}; "
            f"RFFR's generator reconstructs pixels in [0, 1] (mean 0, std 1, norm_pix=false): {how}"
        )


def build(model: Mapping[str, Any], tune: Mapping[str, Any]) -> tuple[RFFR, LinearHead]:
    """Backbone and head, untrained, from the values of the ``model`` and ``tune`` groups.

    Args:
        model: ``image_size``, ``patch_size``, ``generator`` (``dim``, ``depth``, ``heads``, ``pixel_decoder``),
            ``branch`` (``dim``, ``depth``, ``heads``), and arguments of :class:`RFFR`.
        tune: ``name`` (full, or linear) and ``drop_path``.

    Raises:
        ConfigError: another way of tuning, or impossible values.
    """
    if tune["name"] not in ("full", "linear"):
        raise ConfigError(f"RFFR has no tune={tune['name']}; choose full (the paper's) or linear")
    sizes = {"image_size": model["image_size"], "patch_size": model["patch_size"]}
    generator = dict(model["generator"])
    decoder = PixelDecoderConfig(**generator.pop("pixel_decoder"))
    backbone = RFFR(
        ViTConfig("generator", **sizes, **generator),
        decoder,
        ViTConfig("branch", **sizes, **model["branch"]),
        mode=model["mode"],
        block_keep=model["block_keep"],
        branch_init=model["branch_init"],
        drop_path=float(tune.get("drop_path") or 0.0),
        grad_checkpointing=bool(model.get("grad_checkpointing", False)),
    )
    head = LinearHead(2 * model["branch"]["dim"])
    head.fc.reset_parameters()  # as in the published code; our other detectors start undecided
    return backbone, head
