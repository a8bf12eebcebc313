"""A backbone with a head, what of it is trained, and what its classes mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, cast

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fsvfm.errors import ConfigError
from fsvfm.models import timm_backbone
from fsvfm.models.heads import AdapterHead, DetectorOutput, FASHead, LinearHead
from fsvfm.models.lora import add_lora, is_lora_dropout
from fsvfm.models.vit import ViTConfig, create_backbone

#: Ways of tuning that exist; all but ``full`` freeze the backbone's weights.
TUNES = ("full", "adapter", "linear", "lora")

#: Networks other than plain ViTs, by ``model.family``: module with ``build(model, tune) -> (backbone, head)``. A
#: backbone has timm's ``forward_features`` and ``forward_head(…, pre_logits=True)``; a head takes what those return.
FAMILIES = {
    "timm": "fsvfm.models.timm_backbone",
    "rffr": "fsvfm.models.rffr",
    "sladd": "fsvfm.models.sladd",
}

#: Tasks by name of their head.
TASKS = ("forgery", "antispoof")


class Detector(nn.Module):
    """Backbone, pooled feature, head.

    A frozen backbone (``fc_norm`` and the position embedding included) has no trainable parameter, low-rank updates
    aside, and stays in evaluation mode in training, except for the updates' dropout, and for drop-path if
    ``frozen_drop_path`` is set: the papers' numbers come from code that leaves it active under FS-Adapter, where it is
    an augmentation of the features.

    Args:
        backbone: timm ViT without classifier, or a network of another family with the same two methods.
        head: maps (feature (B, dim), tokens (B, 1 + L, dim)) to :class:`DetectorOutput`.
        class_order: what logit i stands for, a permutation of ``real`` and ``fake``.
        frozen: train the head, and low-rank updates that are added to the backbone later, only.
        frozen_drop_path: with ``frozen``, keep the backbone's drop-path active in training.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        class_order: Sequence[str],
        *,
        frozen: bool = False,
        frozen_drop_path: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.class_order = check_class_order(class_order)
        self.frozen = frozen
        self.frozen_drop_path = frozen_drop_path
        if frozen:
            backbone.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Detector:
        """Training mode, in which a frozen backbone takes part with drop-path and its updates' dropout at most."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
            for name, module in self.backbone.named_modules():
                if is_lora_dropout(name) or (self.frozen_drop_path and isinstance(module, DropPath)):
                    module.train(mode)
        return self

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) normalised images → pooled feature after fc_norm (B, dim), tokens (B, 1 + L, dim) before it."""
        backbone = cast(Any, self.backbone)  # timm's two methods
        tokens = backbone.forward_features(images)
        return backbone.forward_head(tokens, pre_logits=True), tokens

    def forward(self, images: Tensor) -> DetectorOutput:
        """(B, 3, H, W) images, normalised with the pre-training set's mean and std → logits (B, 2) and projection."""
        return self.head(*self.features(images))

    def scores(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) normalised images → P(fake), (B,) float32 in [0, 1]."""
        return fake_probability(self(images).logits, self.class_order)

    def trainable_parameters(self) -> int:
        """Number of parameters that training changes."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)


def build_detector(
    model: Mapping[str, Any] | ViTConfig,
    tune: Mapping[str, Any],
    class_order: Sequence[str],
    *,
    task: str = "forgery",
    quirk: bool = False,
) -> Detector:
    """Build an untrained detector from plain values.

    Args:
        model: a :class:`ViTConfig`, or a mapping with its fields (a ``configs/model`` file, the ``model`` of a
            ``model.json``) and optionally ``grad_checkpointing``; with ``family``, the values of that family.
        tune: ``name`` (full, adapter, linear, lora), ``pool`` (avg: mean of the patch tokens; cls), ``drop_path`` (rate
            of the backbone's stochastic depth), ``frozen_drop_path`` (keep it active in a frozen backbone),
            ``reduction`` (of the adapter), ``lora`` (arguments of :func:`~fsvfm.models.lora.add_lora`) and ``merged``
            (a checkpoint whose low-rank updates are part of its weights: nothing is added).
        class_order: what logit i stands for, ``["real", "fake"]`` for detectors trained here.
        task: ``forgery`` or ``antispoof``, which decides the head.
        quirk: see :class:`~fsvfm.models.heads.FASHead`; anti-spoofing only.

    Raises:
        ConfigError: an unknown way of tuning, task, model or class order.
    """
    name = tune.get("name")
    if name not in TUNES:
        raise ConfigError(f"tune={name!r} does not exist; choose one of {', '.join(TUNES)}")
    if task not in TASKS:
        raise ConfigError(f"task={task!r} has no head; choose one of {', '.join(TASKS)}")
    if quirk and task != "antispoof":
        raise ConfigError("the token-norm quirk exists for task=antispoof only; turn it off")
    keep_drop_path = bool(tune.get("frozen_drop_path", False))
    family = "vit" if isinstance(model, ViTConfig) else str(model.get("family", "vit"))
    if family != "vit":
        if task != "forgery" or name == "lora" or family not in FAMILIES:
            raise ConfigError(
                f"model.family={family!r} with task={task} and tune={name}: expected vit, or one of "
                f"{', '.join(FAMILIES)} with task=forgery and another tune than lora"
            )
        other, classifier = import_module(FAMILIES[family]).build(model, tune)
        return Detector(other, classifier, class_order, frozen=name != "full", frozen_drop_path=keep_drop_path)
    config = model if isinstance(model, ViTConfig) else ViTConfig.from_mapping(model)
    backbone = create_backbone(
        config,
        drop_path=float(tune.get("drop_path") or 0.0),
        pool=tune.get("pool", "avg"),
        grad_checkpointing=not isinstance(model, ViTConfig) and bool(model.get("grad_checkpointing", False)),
    )
    reduction = int(tune.get("reduction", 4)) if name == "adapter" else None
    head: nn.Module
    if task == "antispoof":
        head = FASHead(config.dim, reduction=reduction, quirk=quirk)
    elif reduction is not None:
        head = AdapterHead(config.dim, reduction=reduction)
    else:
        head = LinearHead(config.dim)
    detector = Detector(backbone, head, class_order, frozen=name != "full", frozen_drop_path=keep_drop_path)
    if name == "lora" and not tune.get("merged", False):
        if not tune.get("lora"):
            raise ConfigError("tune=lora needs tune.lora with rank, alpha, dropout and targets (see configs/tune)")
        add_lora(backbone, **tune["lora"])
        detector.train(detector.training)
    return detector


def build_backbone(model: Mapping[str, Any], *, pool: str = "avg") -> nn.Module:
    """The bare backbone of a model table, untrained: (B, 3, S, S) normalised images → features (B, dim).

    Args:
        model: as for :func:`build_detector`, of family vit or timm.
        pool: of a plain ViT, ``avg`` or ``cls``; timm's other networks have their own.

    Raises:
        ConfigError: another family, whose networks have no single backbone, or an impossible table.
    """
    family = str(model.get("family", "vit"))
    if family == "vit":
        return create_backbone(ViTConfig.from_mapping(model), pool=pool)
    if family == "timm":
        return timm_backbone.create(model)
    raise ConfigError(
        f"a network of model.family={family} has no single backbone, only detectors; expected vit or timm"
    )


def cost(detector: Detector, image_size: int) -> dict[str, float]:
    """Size and computation of a detector, counted, not measured.

    Args:
        detector: in evaluation mode.
        image_size: side of its input in pixels.

    Returns:
        ``parameters``: all of them; ``trained``: those that its tuning changes, without low-rank updates that are
        merged into the weights; ``gflops``: 10⁹ floating-point operations of one forward pass for one image, a
        multiplication with an addition counting as two, in convolutions and matrix products, which is nearly all.
    """
    parameters = list(detector.parameters())
    image = torch.zeros(1, 3, image_size, image_size, device=parameters[0].device)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        detector(image)
    return {
        "parameters": sum(p.numel() for p in parameters),
        "trained": detector.trainable_parameters(),
        "gflops": counter.get_total_flops() / 1e9,
    }


def check_class_order(class_order: Sequence[str]) -> tuple[str, ...]:
    """The class order as a tuple, or an error: it must be a permutation of ``real`` and ``fake``.

    Raises:
        ConfigError: anything else; an order that is guessed may invert every score.
    """
    order = tuple(class_order) if not isinstance(class_order, str) else (class_order,)
    if sorted(order) != ["fake", "real"]:
        raise ConfigError(
            f"class_order={list(order)} must hold 'real' and 'fake' once each, in the order of the logits "
            "(fake stands for attack in anti-spoofing); it is stored with the checkpoint and is never guessed"
        )
    return order


def fake_probability(logits: Tensor, class_order: Sequence[str]) -> Tensor:
    """Score of a face: P(fake) by the stored class order.

    Args:
        logits: (B, 2) of any float dtype.
        class_order: what logit i stands for.

    Returns:
        (B,) float32 in [0, 1].

    Raises:
        ConfigError: a class order that does not fit the logits.
    """
    order = check_class_order(class_order)
    if logits.shape[-1] != len(order):
        raise ConfigError(f"logits of {logits.shape[-1]} classes do not fit class_order={list(order)}")
    return torch.softmax(logits.float(), dim=-1)[..., order.index("fake")]


def class_targets(labels: Tensor, class_order: Sequence[str]) -> Tensor:
    """Labels of the manifest (0 real, 1 fake; any shape) → class indices in the order of the logits, int64."""
    order = check_class_order(class_order)
    lookup = torch.tensor([order.index("real"), order.index("fake")], device=labels.device)
    return lookup[labels.long()]
