"""Pre-training: masked image modelling and instance discrimination against an EMA target (FS-VFM, "3C" objectives)."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fsvfm.checkpoint import Checkpoint
from fsvfm.errors import ConfigError
from fsvfm.loading import load_into
from fsvfm.losses import SIMILARITY, masked_mean, patch_errors, patch_targets
from fsvfm.masking import COVERING, Masker, Masks, mask_budget
from fsvfm.models.pretrain_net import OnlineOutput, build_networks, copy_to_target
from fsvfm.models.vit import take
from fsvfm.optim import weight_decay_groups
from fsvfm.tasks.base import BaseTask


class PretrainResult(NamedTuple):
    """One micro-batch: the weighted loss, its parts (scalars), and what was masked and predicted."""

    loss: Tensor
    parts: dict[str, Tensor]
    masks: Masks
    output: OnlineOutput
    target_feature: Tensor | None


class PretrainTask(BaseTask):
    """Online and target networks, trained by ``L = w_rec·L_rec + w_region·L_region + w_sim·L_sim`` (01 §4).

    The target network is moved by the callback :class:`fsvfm.ema.EMATarget`, not here. Parts of weight zero are not
    computed: ``similarity: 0`` is MIM only, ``reconstruction: 0`` and ``region: 0`` is ID only.

    Args:
        model: values of the ``model`` group: encoder size, decoders, projection.
        masking: ``strategy``, ``ratio``, ``draw`` (values of the ``masking`` group).
        loss: weights ``reconstruction``, ``region``, ``similarity``; ``kind`` of similarity and its ``options``;
            ``norm_pix``.
        optim: values of the ``optim`` group.
        mean: per-channel mean, pixels in [0, 1].
        std: per-channel standard deviation.
        seed: of initialisation and masks.
    """

    def __init__(
        self,
        *,
        model: dict[str, Any],
        masking: dict[str, Any],
        loss: dict[str, Any],
        optim: dict[str, Any],
        mean: list[float],
        std: list[float],
        seed: int = 0,
    ) -> None:
        super().__init__(mean=mean, std=std, optim=optim, seed=seed)
        self.save_hyperparameters()
        self.loss_options = dict(loss)
        if self.loss_options["kind"] not in SIMILARITY:
            raise ConfigError(
                f"task.loss.kind={self.loss_options['kind']!r} is unknown; choose one of "
                f"{', '.join(sorted(SIMILARITY))}"
            )
        self.online, self.target = build_networks(model)
        self.masker = Masker(**masking)
        patches = (model["image_size"] // model["patch_size"]) ** 2
        self.budget = mask_budget(patches, masking["ratio"])
        # A part that no loss reaches would make DistributedDataParallel wait for its gradients for ever.
        self.online.pixel_decoder.requires_grad_(self.reconstructs)
        for part in (self.online.representation_decoder, self.online.projector, self.online.predictor):
            part.requires_grad_(self.discriminates)

    @property
    def exported(self) -> str:
        """The checkpoint that the run exports: the last one."""
        return "last"

    def initialise(self, checkpoint: Checkpoint) -> str:
        """Continue from a pre-training checkpoint (both networks); without a target, the target becomes a copy.

        Returns:
            What was loaded, in words.

        Raises:
            CheckpointError: another architecture, or keys that nobody can explain.
        """
        online = {key.removeprefix("online."): v for key, v in checkpoint.only("online").state.items()}
        report = f"online: {load_into(self.online, online)}"
        if "target" not in checkpoint.networks():
            copy_to_target(self.online, self.target)
            return f"{report}; the checkpoint has no target network, a copy of the online one takes its place"
        target = {key.removeprefix("target."): v for key, v in checkpoint.only("target").state.items()}
        return f"{report}; target: {load_into(self.target, target)}"

    @property
    def reconstructs(self) -> bool:
        """Whether the pixel decoder is trained (masked image modelling)."""
        return bool(self.loss_options["reconstruction"] or self.loss_options["region"])

    @property
    def discriminates(self) -> bool:
        """Whether the target network is used (instance discrimination)."""
        return bool(self.loss_options["similarity"])

    def compute(
        self, images: Tensor, grid: Tensor, *, generator: torch.Generator | None = None, whole: bool = False
    ) -> PretrainResult:
        """Mask, predict and compare; no trainer needed.

        Args:
            images: (B, 3, S, S) uint8 pixels or normalised float.
            grid: (B, L) uint8 region bits per patch.
            generator: source of the masks, on the images' device.
            whole: predict visible patches too, for pictures; the losses look at masked ones only and stay the same.
        """
        if images.dtype == torch.uint8:
            images = self.normalise(images)
        options = self.loss_options
        masks = self.masker(grid, generator=generator)
        # First, so that its working memory is free again when the online network's activations are kept for backward.
        target_feature = self.target(images) if self.discriminates else None
        output = self.online(
            images, masks.masked, budget=self.budget, pixels=self.reconstructs, instance=self.discriminates, whole=whole
        )
        parts: dict[str, Tensor] = {}
        loss = images.new_zeros(())
        if self.reconstructs:
            prediction = cast(Tensor, output.prediction)
            prediction = take(prediction, output.hidden) if whole else prediction
            patch_size = self.online.encoder.config.patch_size
            targets = patch_targets(images, patch_size, options["norm_pix"], patches=output.hidden)
            errors = patch_errors(prediction, targets)  # (B, budget)
            parts["reconstruction"] = errors.mean()
            if self.masker.strategy in COVERING:
                parts["region"] = masked_mean(errors, masks.region.gather(1, output.hidden))
        if self.discriminates:
            similarity = SIMILARITY[options["kind"]]
            parts["similarity"] = similarity(output.feature, target_feature, **options.get("options", {}))
        for name, value in parts.items():
            loss = loss + options[name] * value
        return PretrainResult(loss, parts, masks, output, target_feature)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """One micro-batch."""
        result = self.compute(batch["image"], batch["grid"], generator=self.generator(batch_idx))
        self.observe(result.loss)
        self.log_loss(result.loss, len(batch["image"]))
        for name, value in result.parts.items():
            self.log(f"train/loss_{name}", value.detach(), on_step=True)
        if result.target_feature is not None:
            feature = cast(Tensor, result.output.feature).detach().float()
            self.log("train/target_cosine", (feature * result.target_feature.float()).sum(-1).mean())
            # For unit vectors spread evenly over d dimensions this is 1; towards 0 the features have collapsed.
            self.log("train/feature_std", feature.std(dim=0).mean() * feature.shape[1] ** 0.5)
        return result.loss

    def parameter_groups(self) -> list[dict[str, Any]]:
        """AdamW groups of the online network: weight decay on matrices only (01 §5)."""
        return weight_decay_groups(self.online, self.optim["weight_decay"])
