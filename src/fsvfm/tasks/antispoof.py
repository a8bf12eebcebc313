"""Face anti-spoofing: fine-tuning a pre-trained encoder on several domains, for a domain never seen (02 §1, 4–6)."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from torch import Tensor
from torchmetrics.classification import BinaryAUROC

from fsvfm.data.datamodules import SELECTIONS
from fsvfm.errors import ConfigError
from fsvfm.metrics.modules import HTER, SampleMetric, VideoLevel
from fsvfm.optim import layer_decay_groups
from fsvfm.tasks.forgery import CLASS_ORDER, ForgeryTask


class BalancedLoss(SampleMetric):
    """Mean, over the classes of all domains, of the mean loss of their images.

    No domain counts more for being large, as in the training batches.
    """

    needs = ("scores", "labels", "domains")
    domains: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self._keep("domains")

    def update(self, losses: Tensor, labels: Tensor, domains: Tensor) -> None:  # type: ignore[override]
        """Take in a batch: losses, labels and numbers of the domains, all (B,)."""
        self._take(losses, None, labels=labels, domains=domains)

    def value(self, *arrays: np.ndarray) -> float:
        """The mean of means of losses, labels and domains."""
        losses, labels, domains = arrays
        _, groups = np.unique(2 * domains + labels, return_inverse=True)
        return float((np.bincount(groups, weights=losses) / np.bincount(groups)).mean())


class AntispoofTask(ForgeryTask):
    """An attack detector, tuned fully, by FS-Adapter, LoRA or linear probe: real (0) or attack (1), from one face.

    Everything is as in :class:`~fsvfm.tasks.forgery.ForgeryTask` but the head, the optimiser's groups, and how the
    checkpoint that counts is chosen. ``selection`` is one of

    - ``source_best``: the lowest loss on the held-out source videos. Their HTER would not do: it is zero long before
      training ends, and then says no more.
    - ``last``: the last iteration.
    - ``target_best``: the lowest HTER on the target's test videos, as in the published tables. It looks at the test
      set; the choice is stored with the checkpoint and told wherever its numbers are.

    Args:
        selection: see above.
        model: values of the ``model`` group.
        tune: values of the ``tune`` group; ``quirk`` is there for checkpoints of the published code.
        augment: values of the ``augment`` group.
        optim: values of the ``optim`` group; with ``layer_decay: null`` all parameters have one rate and one decay.
        mean: per-channel mean of the pre-training set, pixels in [0, 1].
        std: per-channel standard deviation.
        class_order: what logit i stands for; ``fake`` is an attack.
        seed: of initialisation, dropout and drop path.

    Raises:
        ConfigError: an unknown selection.
    """

    name: ClassVar[str] = "antispoof"

    def __init__(
        self,
        *,
        selection: str,
        model: dict[str, Any],
        tune: dict[str, Any],
        augment: dict[str, Any],
        optim: dict[str, Any],
        mean: list[float],
        std: list[float],
        class_order: list[str] = list(CLASS_ORDER),  # noqa: B006  (never changed)
        seed: int = 0,
    ) -> None:
        super().__init__(
            model=model, tune=tune, augment=augment, optim=optim, mean=mean, std=std, class_order=class_order, seed=seed
        )
        if selection not in SELECTIONS:
            raise ConfigError(f"task.selection={selection!r} does not exist; choose one of {', '.join(SELECTIONS)}")
        self.save_hyperparameters()
        self.selection = selection
        self.val_loss = BalancedLoss()
        self.val_hter = VideoLevel(HTER())
        self.val_auc = VideoLevel(BinaryAUROC())

    @property
    def exported(self) -> str:
        """The checkpoint that the run exports: the last, or the one with the lowest ``val/criterion``."""
        return "last" if self.selection == "last" else "best"

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Collect scores and losses of the videos that ``selection`` looks at."""
        result = self.compute(batch["image"], batch["label"], augment=False)
        self.val_loss.update(result.losses, batch["label"], batch["domain"])
        for metric in (self.val_hter, self.val_auc):
            metric.update(result.scores, batch["label"], batch["video"])

    def on_validation_epoch_end(self) -> None:
        """``val/loss``, ``val/hter``, ``val/auc``, and ``val/criterion``: what the best checkpoint has least of."""
        values = {}
        for name, metric in (("loss", self.val_loss), ("hter", self.val_hter), ("auc", self.val_auc)):
            values[name] = metric.compute()
            metric.reset()
            # The same on all processes already; sync_dist spares Lightning's advice to say so.
            self.log(f"val/{name}", values[name], sync_dist=True)
        self.log("val/criterion", values["hter" if self.selection == "target_best" else "loss"], sync_dist=True)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """All trainable parameters in one group, each decayed (the papers'), unless ``layer_decay`` is given."""
        decay = self.optim["weight_decay"]
        if self.tune["name"] == "full" and self.optim["layer_decay"] is not None:
            return layer_decay_groups(self.detector, decay, self.optim["layer_decay"])
        trained = [parameter for parameter in self.detector.parameters() if parameter.requires_grad]
        return [{"name": "all", "params": trained, "weight_decay": decay, "lr_scale": 1.0}]
