"""SLADD: a detector trained against a policy that makes the forgeries it finds hardest (CVPR 2022, arXiv 2203.12208).

In every step the policy looks at pairs of a face and a reference and chooses how to forge the real faces; the forgeries
are made; the detector learns from them and from the data set's own fakes, and the policy from the detector's losses.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fsvfm.checkpoint import Checkpoint
from fsvfm.data.sampling import derive_seed
from fsvfm.errors import ConfigError
from fsvfm.faces.synthesis import BLENDINGS, synthesise
from fsvfm.models.detector import class_targets, fake_probability
from fsvfm.models.sladd import KINDS, Actions, Head, Maps, Policy, choose
from fsvfm.tasks.forgery import CLASS_ORDER, ForgeryResult, ForgeryTask

#: Nothing is mixed, erased or smoothed: the forgeries are the augmentation.
_NO_AUGMENT = {"mixup": 0.0, "cutmix": 0.0, "random_erasing": 0.0, "label_smoothing": 0.0}


class Forged(NamedTuple):
    """A batch after synthesis, and the truth about it.

    `image` (B, 3, S, S) uint8; `label` (B,) 0 real, 1 fake; `kind` (B,) places in ``KINDS``; `ratio` (B,) of the
    mixups, others 0; `map` (B, S, S) float32, the forged region; `known` (B,) bool, whether the map is known.
    """

    image: Tensor
    label: Tensor
    kind: Tensor
    ratio: Tensor
    map: Tensor
    known: Tensor


class Losses(NamedTuple):
    """Of every image (B,): AM-softmax of real/fake, squared error of map and ratio, AM-softmax of the kind."""

    classification: Tensor
    map: Tensor
    kind: Tensor
    ratio: Tensor


class SladdTask(ForgeryTask):
    """A detector of :mod:`fsvfm.models.sladd` and the policy that forges for it.

    With ``model.mode=reference`` the policy learns as in the published code: every image of the batch, forged or not,
    is rewarded with the batch's mean loss. By default each forgery is rewarded with its own loss, relative to the mean
    over the batch's real faces, and only for the choices that mattered: the region where something was pasted, the
    ratio under mixup.

    Args:
        model: values of the ``model`` group, of the family sladd.
        tune: values of the ``tune`` group; ``full`` or ``linear``.
        loss: ``margin`` of AM-softmax, and the weights ``map``, ``kind`` and ``ratio``.
        policy: ``lr`` (constant, like the detector's) and ``entropy``, the weight of its entropy.
        deform: standard deviation of the region's deformation, in pixels of a face of side 256.
        optim: values of the ``optim`` group.
        mean: per-channel mean.
        std: per-channel standard deviation.
        class_order: what logit i stands for.
        seed: of initialisation, dropout, choices and forgeries.

    Raises:
        ConfigError: a network of another family, or a setting that does not exist.
    """

    def __init__(
        self,
        *,
        model: dict[str, Any],
        tune: dict[str, Any],
        loss: dict[str, float],
        policy: dict[str, float],
        deform: float,
        optim: dict[str, Any],
        mean: list[float],
        std: list[float],
        class_order: list[str] = list(CLASS_ORDER),  # noqa: B006  (never changed)
        seed: int = 0,
    ) -> None:
        if model.get("family") != "sladd":
            raise ConfigError(
                f"task=sladd needs a network of the family sladd, got model={model['name']}; use model=sladd"
            )
        super().__init__(
            model=model, tune=tune, augment=_NO_AUGMENT, optim=optim, mean=mean, std=std, class_order=class_order,
            seed=seed,
        )  # fmt: skip
        self.save_hyperparameters()
        self.mode, self.scale = str(model["mode"]), float(model["scale"])
        self.weights, self.policy_options, self.deform = dict(loss), dict(policy), deform
        self.policy = Policy(str(model["architecture"]))
        self._threads: ThreadPoolExecutor | None = None

    def initialise(self, checkpoint: Checkpoint) -> str:
        """Start both networks from a checkpoint of their CNN; the policy's first layer sees six channels and is new."""
        return f"{super().initialise(checkpoint)}; policy: {self.policy.backbone.initialise(checkpoint)}"

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Detector and policy with a learning rate each; the weight decay is of all parameters, as published.

        No gradient passes from one to the other, so one optimiser with two groups is two optimisers.
        """
        decay, rate = self.optim["weight_decay"], self.policy_options["lr"] / self.optim["base_lr"]
        detector = [parameter for parameter in self.detector.parameters() if parameter.requires_grad]
        return [
            {"name": "detector", "params": detector, "weight_decay": decay, "lr_scale": 1.0},
            {"name": "policy", "params": list(self.policy.parameters()), "weight_decay": decay, "lr_scale": rate},
        ]

    # --- forging ----------------------------------------------------------------------------------------------------

    def choose(self, batch: dict[str, Any], generator: torch.Generator | None = None) -> Actions:
        """What the policy would do with each pair of a batch; `generator` on the task's device."""
        choices = self.policy(self.normalise(batch["image"]), self.normalise(batch["reference"]))
        return choose(choices, self.mode, generator)

    def forge(self, batch: dict[str, Any], actions: Actions, seed: int) -> Forged:
        """Make the forgeries that were chosen: of real faces only, on the host, one thread per image.

        A face without landmarks, or whose region turns out to be nearly nothing, stays as it is and is real.

        Args:
            batch: of :class:`~fsvfm.data.pairs.Pairs`.
            actions: of :meth:`choose`.
            seed: of everything random.
        """
        images, references = (batch[name].cpu().numpy().transpose(0, 2, 3, 1) for name in ("image", "reference"))
        points, others = (batch[name].cpu().numpy() for name in ("landmarks", "reference_landmarks"))
        label, known, map_ = batch["label"].cpu(), batch["map_known"].cpu(), batch["map"].cpu().clone()
        region, blending, ratio = (actions[i].detach().cpu() for i in range(3))
        kind = torch.where(label == 1, KINDS.index("data set"), KINDS.index("real"))

        def one(row: int) -> Any:
            return synthesise(
                images[row], points[row], references[row], others[row],
                np.random.default_rng(derive_seed(seed, row)),
                region=int(region[row]), blending=BLENDINGS[int(blending[row])], ratio=float(ratio[row]),
                sigma=self.deform,
            )  # fmt: skip

        usable = np.isfinite(points).all(axis=(1, 2)) & np.isfinite(others).all(axis=(1, 2))
        rows = [i for i in range(len(label)) if not label[i] and usable[i] and BLENDINGS[blending[i]] != "none"]
        if self._threads is None:
            self._threads = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
        forged, label = batch["image"].cpu().clone(), label.clone()
        for row, made in zip(rows, self._threads.map(one, rows), strict=True):
            if not made.mask.any():
                continue
            forged[row] = torch.from_numpy(made.image.transpose(2, 0, 1).copy())
            label[row], kind[row], map_[row] = 1, blending[row], torch.from_numpy(made.mask)
        ratio = torch.where(kind == BLENDINGS.index("mixup"), ratio, 0.0)
        return Forged(*(tensor.to(self.device) for tensor in (forged, label, kind, ratio, map_, known)))

    # --- losses -----------------------------------------------------------------------------------------------------

    def losses(self, truth: Forged) -> Losses:
        """What the detector is trained by, of every image (B,), unweighted.

        The ratio counts for mixups, the map where it is known: real faces (nothing is forged), own forgeries, and fakes
        of the data set with a mask.
        """
        feature, maps = self.detector.features(self.normalise(truth.image))
        head, margin, scale = self.head, self.weights["margin"], self.scale
        found = head.map(cast(Maps, maps).middle).float().squeeze(1)
        wanted = F.adaptive_avg_pool2d(truth.map[:, None], found.shape[-2:]).squeeze(1)
        mixup = (truth.kind == KINDS.index("mixup")).float()
        targets = class_targets(truth.label, self.class_order)
        return Losses(
            classification=am_softmax(head.margins(feature), targets, margin, scale),
            map=((found - wanted) ** 2).mean(dim=(1, 2)) * truth.known,
            kind=am_softmax(head.kind(feature), truth.kind, margin, scale),
            ratio=(head.ratio(feature).float().squeeze(-1) - truth.ratio) ** 2 * mixup,
        )

    def compute(self, images: Tensor, labels: Tensor, *, augment: bool = False) -> ForgeryResult:
        """AM-softmax loss of real and fake, and scores; no trainer needed, and no policy.

        Args:
            images: (B, 3, S, S) uint8.
            labels: (B,) int64, 0 real, 1 fake.
            augment: has no meaning here.
        """
        feature, _ = self.detector.features(self.normalise(images))
        outputs = self.head.margins(feature)
        losses = am_softmax(outputs, class_targets(labels, self.class_order), self.weights["margin"], self.scale)
        scores = fake_probability(self.head.scale * outputs.detach(), self.class_order)
        return ForgeryResult(losses.mean(), {"classification": losses.mean()}, scores, losses.detach())

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """One micro-batch: choose, forge, and the losses of detector and policy in one backward pass."""
        actions = self.choose(batch, self.generator(batch_idx))
        truth = self.forge(batch, actions, derive_seed(self.seed, 3, self.global_rank, self.micro_step(batch_idx)))
        parts = self.losses(with_mirror_images(truth))
        each = parts.classification + sum(
            self.weights[name] * getattr(parts, name) for name in ("map", "kind", "ratio")
        )
        rewards = each.detach().view(2, -1).mean(dim=0)
        policy = policy_loss(actions, rewards, batch["label"] == 0, truth.kind, self.mode)
        loss = each.mean() + policy - self.policy_options["entropy"] * actions.entropy.mean()
        self.observe(loss)
        self.log("train/loss", each.mean(), on_step=True, on_epoch=True, batch_size=len(batch["image"]))
        for name, value in parts._asdict().items():
            self.log(f"train/loss_{name}", value.detach().mean(), on_step=True)
        self.log("train/loss_policy", policy.detach(), on_step=True)
        self.log("train/policy_entropy", actions.entropy.detach().mean(), on_step=True)
        self.log("train/forged", (truth.kind < KINDS.index("real")).float().mean(), on_step=True)
        return loss

    @property
    def head(self) -> Head:
        """The detector's head."""
        return cast(Head, self.detector.head)


def with_mirror_images(truth: Forged) -> Forged:
    """A batch followed by its mirror images, as the published code trains on."""
    mirrored = truth._replace(image=truth.image.flip(-1), map=truth.map.flip(-1))
    return Forged(*(torch.cat(pair) for pair in zip(truth, mirrored, strict=True)))


def am_softmax(outputs: Tensor, targets: Tensor, margin: float, scale: float) -> Tensor:
    """Cross entropy of scale · (output − margin at the target) (Wang et al. 2018).

    Args:
        outputs: (B, C), cosines.
        targets: (B,) int64.
        margin: by which the target's cosine must be ahead, >= 0.
        scale: of the cosines in the softmax, > 0.

    Returns:
        (B,) float32.
    """
    outputs = outputs.float()
    return F.cross_entropy(scale * (outputs - margin * F.one_hot(targets, outputs.shape[1])), targets, reduction="none")


def policy_loss(actions: Actions, losses: Tensor, real: Tensor, kind: Tensor, mode: str) -> Tensor:
    """REINFORCE: its gradient makes choices likelier that the detector finds hard.

    Args:
        actions: what was chosen.
        losses: (B,) of the detector on what came of it, without gradients.
        real: (B,) bool, images that could be forged.
        kind: (B,) places in ``KINDS``, what came of them.
        mode: ``paper``: own loss minus the mean over real images, for the choices that had an effect. ``reference``:
            the batch's mean loss, for all images and choices.

    Returns:
        Scalar; finite, and without gradient where no image could be forged.
    """
    if mode == "reference":
        return -(actions.log_region + actions.log_blending + actions.log_ratio).mean() * losses.mean()
    count = real.sum().clamp_min(1)
    advantage = (losses - (losses * real).sum() / count) * real
    pasted, mixed = kind < KINDS.index("real"), kind == KINDS.index("mixup")
    chance = actions.log_blending + pasted * actions.log_region + mixed * actions.log_ratio
    return -(advantage * chance).sum() / count
