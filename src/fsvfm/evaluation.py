"""Scoring a detector on test sets: every sample once, scores kept, metrics from all samples."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from omegaconf import DictConfig
from rich.progress import track

from fsvfm import build
from fsvfm.checkpoint import Checkpoint, load_checkpoint, normalisation
from fsvfm.data.datamodules import make_loader
from fsvfm.data.datasets import LabelledFaces
from fsvfm.data.manifest import Manifest
from fsvfm.data.transforms import test_transform
from fsvfm.errors import CheckpointError, DataError
from fsvfm.loading import load_into
from fsvfm.metrics.forgery import summarise
from fsvfm.models.detector import Detector, build_detector
from fsvfm.report import percent, result_rows, write_tables

#: Columns of predictions.parquet besides ``run``, ``testset`` and ``score``.
KEPT = ("path", "label", "method", "video", "subject", "frame", "dataset")


class LoadedDetector(NamedTuple):
    """A detector in evaluation mode with its normalisation; ``score`` takes uint8 images."""

    network: Detector
    mean: torch.Tensor
    std: torch.Tensor
    checkpoint: Checkpoint

    @property
    def image_size(self) -> int:
        """Side of the input in pixels."""
        return int(self.checkpoint.meta["model"]["image_size"])

    def score(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) uint8 images to P(fake), (B,) float32."""
        with torch.inference_mode():
            images = images.to(self.mean.device, non_blocking=True).float()
            return self.network.scores((images - self.mean) / self.std)


def load_detector_network(source: str, *, device: str | torch.device = "cpu") -> LoadedDetector:
    """Load a detector from anything that holds one: an export, a run folder, a released or Lightning checkpoint.

    Raises:
        CheckpointError: the source holds no detector, or lacks its normalisation.
    """
    checkpoint = load_checkpoint(source)
    if checkpoint.kind != "detector":
        raise CheckpointError(
            f"{source} is a {checkpoint.kind} checkpoint, not a detector; fine-tune it first, for example "
            f"`python -m fsvfm.train experiment=demo_dfd model.init={source}`"
        )
    meta = checkpoint.meta
    quirk = bool(meta["tune"].get("quirk", False))
    network = build_detector(meta["model"], meta["tune"], meta["class_order"], task=meta["task"], quirk=quirk)
    load_into(network, checkpoint.state)
    mean, std = (255 * torch.tensor(values, device=device).view(1, 3, 1, 1) for values in normalisation(checkpoint))
    return LoadedDetector(network.to(device).eval(), mean, std, checkpoint)


def predict_manifest(
    detector: LoadedDetector, manifest: Manifest, *, batch_size: int, workers: int, title: str
) -> pd.DataFrame:
    """Score every row of a manifest once.

    Returns:
        The manifest's rows (columns :data:`KEPT`) with ``score`` = P(fake) as float64.

    Raises:
        DataError: a file cannot be read; a test set with holes would not be the test set.
    """
    rows = LabelledFaces(manifest, test_transform(detector.image_size))
    loader = make_loader(rows, workers=workers, batch_size=batch_size)
    scores: list[torch.Tensor] = []
    for batch in track(loader, description=title, disable=not sys.stderr.isatty()):
        if batch["unreadable"]:
            raise DataError(f"{title}: a test image cannot be read: {batch['unreadable'][0]}")
        scores.append(detector.score(batch["image"]))
    table = manifest.table[[*KEPT]].assign(path=manifest.paths())
    table["score"] = torch.cat(scores).double().cpu().numpy()
    return table


def _selection(test: Mapping[str, Any]) -> Manifest:
    methods = None if test["methods"] is None else ["real", *test["methods"]]
    return Manifest.read(test["manifest"]).select(split=test["split"], methods=methods)


def evaluate(cfg: DictConfig, chosen: Mapping[str, str], out: Path) -> dict[str, Any]:
    """Evaluate checkpoints on the protocol's test sets; write predictions and tables.

    Args:
        cfg: composed configuration (``testsets``, ``evaluate``, ``ckpt`` …).
        chosen: label → checkpoint.
        out: folder for the results.

    Returns:
        Results: label → test set → summary (:func:`fsvfm.metrics.forgery.summarise`).

    Raises:
        ConfigError: no test sets, or one that is not prepared.
    """
    build.require_testsets(cfg)
    folder = Path(out)
    device = "cuda" if torch.cuda.is_available() and cfg.trainer.accelerator != "cpu" else "cpu"
    results: dict[str, dict[str, Any]] = {}
    predictions = []
    for label, source in chosen.items():
        detector = load_detector_network(source, device=device)
        for name, test in cfg.testsets.items():
            table = predict_manifest(
                detector,
                _selection(test),
                batch_size=cfg.evaluate.batch_size,
                workers=cfg.data.workers,
                title=f"{label} on {name}",
            )
            # Forgeries made from a test person's own photographs depend on it: draw people, not pictures.
            cluster = "subject" if table["subject"].ne("").all() else "video"
            summary = summarise(table, replicates=cfg.evaluate.replicates, seed=cfg.seed, cluster=cluster)
            results.setdefault(label, {})[name] = summary
            predictions.append(table.assign(run=label, testset=name))
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "predictions.parquet"
    temporary = file.with_suffix(".tmp")
    pd.concat(predictions, ignore_index=True).to_parquet(temporary, index=False)
    temporary.replace(file)
    write_tables(folder, results, made=_made(cfg, chosen))
    _print(results, folder)
    return results


def _made(cfg: DictConfig, chosen: Mapping[str, str]) -> dict[str, Any]:
    packages = ("fsvfm", "torch", "timm", "pytorch-lightning", "numpy")
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "checkpoints": dict(chosen),
        "protocol": str(cfg.protocol.name),
        "seed": cfg.seed,
        "versions": {name: version(name) for name in packages},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }


def _print(results: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    print(f"{'run':<20}{'test set':<16}{'AUC':>20}{'EER':>20}{'AP':>20}   (%, frame level, 95 % interval)")
    rows = {(r["run"], r["testset"], r["metric"]): r for r in result_rows(results) if r["level"] == "frame"}
    for run, sets in results.items():
        for name in sets:
            cells = "".join(f"{percent(rows[run, name, metric]):>20}" for metric in ("auc", "eer", "ap"))
            print(f"{run:<20}{name:<16}{cells}")
    print(f"tables, scores and intervals: {folder}")
