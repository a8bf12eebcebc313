"""How useful the features are while pre-training: a linear probe on a small labelled manifest."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytorch_lightning as pl
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.distributed.fsdp import FSDPModule

from fsvfm.data.datamodules import make_loader
from fsvfm.data.datasets import LabelledFaces
from fsvfm.data.manifest import Manifest
from fsvfm.data.transforms import test_transform
from fsvfm.ema import reshard
from fsvfm.tasks.pretrain import PretrainTask


class LinearProbe(pl.Callback):
    """Every k epochs: logistic regression on the online encoder's mean patch token, ``probe/auc`` on the ``val`` rows.

    Args:
        manifest: prepared folder with both classes in its ``train`` and ``val`` splits.
        every_n_epochs: interval.
        batch_size: images per forward pass.
    """

    def __init__(self, manifest: str, every_n_epochs: int, batch_size: int = 64) -> None:
        self.manifest, self.every_n_epochs, self.batch_size = Manifest.read(manifest), every_n_epochs, batch_size

    def _features(self, task: PretrainTask, split: str) -> tuple[np.ndarray, np.ndarray]:
        size = task.online.encoder.config.image_size
        rows = LabelledFaces(self.manifest.select(split=split), test_transform(size))
        features = []
        for batch in make_loader(rows, workers=0, batch_size=self.batch_size):
            tokens = task.online.encoder(task.normalise(batch["image"].to(task.device)))
            features.append(tokens[:, 1:].mean(1).float().cpu().numpy())
        return np.concatenate(features), rows.labels

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compute features on every process, since the network may be shared out among them; score on the first."""
        if (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        online = cast(PretrainTask, pl_module).online
        if isinstance(online, FSDPModule):
            online.unshard()  # its encoder is called alone
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            train, labels = self._features(cast(PretrainTask, pl_module), "train")
            val, val_labels = self._features(cast(PretrainTask, pl_module), "val")
        reshard(online)
        if not trainer.is_global_zero:
            return
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, C=0.1)).fit(train, labels)
        auc = roc_auc_score(val_labels, model.predict_proba(val)[:, 1])
        pl_module.log("probe/auc", float(auc), rank_zero_only=True)
