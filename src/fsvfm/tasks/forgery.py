"""Forgery detection: fine-tuning a pre-trained encoder as a real/fake detector (DfD and DiFF; 02 §1–5)."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import BinaryAUROC

from fsvfm.checkpoint import Checkpoint, load_backbone
from fsvfm.errors import ConfigError
from fsvfm.losses import real_anchor_contrastive
from fsvfm.models import timm_backbone
from fsvfm.models.detector import build_detector, class_targets, fake_probability
from fsvfm.optim import layer_decay_groups, weight_decay_groups
from fsvfm.tasks.base import BaseTask

#: Class order of detectors trained here; released ones differ, and every checkpoint stores its own.
CLASS_ORDER = ("real", "fake")


class ForgeryResult(NamedTuple):
    """One batch: total loss, its parts (scalars), P(fake) (B,) and every image's classification loss (B,)."""

    loss: Tensor
    parts: dict[str, Tensor]
    scores: Tensor
    losses: Tensor


class ForgeryTask(BaseTask):
    """A detector, tuned fully, by FS-Adapter or by linear probe.

    Args:
        model: values of the ``model`` group.
        tune: values of the ``tune`` group: ``name``, ``drop_path``, ``contrast_weight`` …
        augment: ``mixup`` and ``cutmix`` alphas, ``mixup_switch`` (share of cutmix), ``label_smoothing``,
            ``random_erasing`` (probability); done on the device, on normalised images.
        optim: values of the ``optim`` group.
        mean: per-channel mean of the pre-training set, pixels in [0, 1].
        std: per-channel standard deviation.
        class_order: what logit i stands for.
        seed: of initialisation, mixup and drop path.
    """

    #: Name of the task, which decides the head.
    name: ClassVar[str] = "forgery"

    def __init__(
        self,
        *,
        model: dict[str, Any],
        tune: dict[str, Any],
        augment: dict[str, Any],
        optim: dict[str, Any],
        mean: list[float],
        std: list[float],
        class_order: list[str] = list(CLASS_ORDER),  # noqa: B006  (never changed)
        seed: int = 0,
    ) -> None:
        super().__init__(mean=mean, std=std, optim=optim, seed=seed)
        self.save_hyperparameters()
        self.tune, self.augment, self.class_order = dict(tune), dict(augment), list(class_order)
        quirk = bool(tune.get("quirk", False))
        self.detector = build_detector(model, tune, class_order, task=self.name, quirk=quirk)
        if tune["contrast_weight"] and tune["name"] != "adapter":
            raise ConfigError(
                f"tune.contrast_weight={tune['contrast_weight']} needs the adapter's projection; use tune=adapter or 0"
            )
        projection = getattr(self.detector.head, "projection", None)
        if projection is not None and not tune["contrast_weight"]:
            projection.requires_grad_(False)  # no loss would use it, and DDP waits for every trained parameter
        mixes = augment["mixup"] or augment["cutmix"]
        self.mixup = (
            Mixup(
                mixup_alpha=augment["mixup"],
                cutmix_alpha=augment["cutmix"],
                switch_prob=augment["mixup_switch"],
                label_smoothing=augment["label_smoothing"],
                num_classes=2,
            )
            if mixes
            else None
        )
        self.val_auc: Metric = BinaryAUROC()

    @property
    def exported(self) -> str:
        """The checkpoint that the run exports: the one with the lowest validation loss."""
        return "best"

    def initialise(self, checkpoint: Checkpoint) -> str:
        """Start the backbone from a pre-trained encoder (the online network's), or take over a whole detector.

        Returns:
            What was loaded, in words.

        Raises:
            CheckpointError: another architecture, or keys that nobody can explain.
        """
        backbone: Any = self.detector.backbone
        if hasattr(backbone, "initialise"):  # of several networks, which know themselves what a checkpoint is for
            return str(backbone.initialise(checkpoint))
        return str(load_backbone(backbone, checkpoint))

    def compute(self, images: Tensor, labels: Tensor, *, augment: bool) -> ForgeryResult:
        """Classification loss, plus the weighted contrastive loss under FS-Adapter; no trainer needed.

        Args:
            images: (B, 3, S, S) uint8.
            labels: (B,) int64, 0 real, 1 fake.
            augment: erase, mix and smooth labels as in training.
        """
        targets = class_targets(labels, self.class_order)
        images = self.normalise(images)
        soft = F.one_hot(targets, 2).float()
        if augment:
            if self.augment["random_erasing"]:
                images = RandomErasing(self.augment["random_erasing"], mode="pixel", device=self.device.type)(images)
            if self.mixup is not None:
                images, soft = self.mixup(images, targets)
            elif self.augment["label_smoothing"]:
                smoothing = self.augment["label_smoothing"]
                soft = soft * (1 - smoothing) + smoothing / 2
        logits, projection = self.detector(images)
        logits = logits.float()
        losses = torch.sum(-soft * F.log_softmax(logits, dim=-1), dim=-1)
        parts = {"classification": losses.mean()}
        loss = parts["classification"]
        if augment and self.tune["contrast_weight"] and projection is not None:
            # Labels as they were before mixing (02 §3).
            parts["contrast"] = real_anchor_contrastive(
                projection.float(),
                targets,
                real_class=self.class_order.index("real"),
                temperature=self.tune["contrast_temperature"],
                base_temperature=self.tune["contrast_base_temperature"],
            )
            loss = loss + self.tune["contrast_weight"] * parts["contrast"]
        return ForgeryResult(loss, parts, fake_probability(logits.detach(), self.class_order), losses.detach())

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """One micro-batch."""
        result = self.compute(batch["image"], batch["label"], augment=True)
        self.observe(result.loss)
        self.log_loss(result.loss, len(batch["image"]))
        for name, value in result.parts.items():
            self.log(f"train/loss_{name}", value.detach(), on_step=True)
        return result.loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Loss and frame AUC on all validation faces."""
        result = self.compute(batch["image"], batch["label"], augment=False)
        size = len(batch["label"])
        self.log("val/loss", result.loss, on_epoch=True, sync_dist=True, batch_size=size, prog_bar=True)
        self.val_auc.update(result.scores, batch["label"])
        self.log("val/auc", self.val_auc, on_epoch=True, batch_size=size)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Layer-wise decay for full fine-tuning, unless it is null; otherwise one learning rate for all parameters."""
        weight_decay = self.optim["weight_decay"]
        if self.tune["name"] == "full" and self.optim["layer_decay"] is not None:
            backbone = self.detector.backbone
            layers = timm_backbone.layers(backbone) if timm_backbone.architecture(backbone) else None
            return layer_decay_groups(self.detector, weight_decay, self.optim["layer_decay"], layers=layers)
        return weight_decay_groups(self.detector, weight_decay)
