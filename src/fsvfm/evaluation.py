"""Scoring a detector on test sets: every sample once, scores kept, metrics from all samples.

A test set without a number is a gap with its reason; the others are evaluated all the same, and the command says at its
end that something is missing.
"""

from __future__ import annotations

import platform
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf
from rich.progress import track
from torch.utils.data import Subset

from fsvfm import build, processes
from fsvfm.cli import say
from fsvfm.data.corruptions import corrupt
from fsvfm.data.datamodules import make_loader
from fsvfm.data.datasets import LabelledFaces
from fsvfm.data.manifest import Manifest, check_leaks
from fsvfm.data.sampling import derive_seed
from fsvfm.data.storage import read_image
from fsvfm.data.transforms import test_transform
from fsvfm.errors import ConfigError, DataError, FsvfmError, MetricError
from fsvfm.exports import save_export
from fsvfm.loaded_detector import LoadedDetector, load_detector_network
from fsvfm.metrics import antispoof, calibration, forgery
from fsvfm.models.detector import cost
from fsvfm.processes import Processes
from fsvfm.report_tables import families, percent, result_rows, write_tables

#: Columns of predictions.parquet besides ``run``, ``testset`` and ``score``.
KEPT = ("path", "label", "method", "video", "subject", "frame", "dataset")

#: Metrics of a corrupted test set.
_ROBUSTNESS = ("auc", "eer", "hter")

#: Bootstrap replicates of the metrics on validation faces, which only loggers show.
_VALIDATION_REPLICATES = 200

METRICS = {"forgery": forgery, "antispoof": antispoof}

#: Faces of a test set that are also scored in float32, to measure what half precision does.
_CHECKED = 512


class CorruptedFaces(LabelledFaces):
    """Every row under every corruption: sample ``v · N + i`` is row ``i`` under ``variants[v]``.

    The corruption's seed follows from the image's path alone, so that no batch, worker or process changes it.
    """

    def __init__(self, manifest: Manifest, image_size: int, variants: Sequence[tuple[str, int]]) -> None:
        super().__init__(manifest, test_transform(image_size))
        self.variants = list(variants)
        self.seeds = [zlib.crc32(path.encode()) for path in manifest.table["path"]]

    def __len__(self) -> int:
        return len(self.paths) * len(self.variants)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        variant, row = divmod(int(index), len(self.paths))
        name, severity = self.variants[variant]
        image = corrupt(read_image(self.paths[row]), name, severity, self.seeds[row])
        pixels = torch.from_numpy(np.ascontiguousarray(self.transform(image).transpose(2, 0, 1)))
        return {"image": pixels, "label": int(self.labels[row]), "index": int(index), "unreadable": []}


def predict(
    detector: LoadedDetector,
    rows: LabelledFaces,
    *,
    batch_size: int | str,
    workers: int,
    title: str,
    group: Processes | None = None,
) -> np.ndarray | None:
    """P(fake) of every sample of a data set, each scored once.

    Args:
        detector: on this process's device.
        rows: samples with ``image`` (3, S, S) uint8 and ``unreadable``.
        batch_size: images per forward pass, or ``auto``: see :meth:`LoadedDetector.batch_size`.
        workers: loader processes.
        title: for the progress bar and messages.
        group: the processes that share the work; None is this one alone.

    Returns:
        (N,) float64 on the first process, None on the others.

    Raises:
        DataError: a file cannot be read on any process; a test set with holes would not be the test set.
    """
    group = group or Processes(0, 1, detector.mean.device)
    mine = group.share(len(rows))
    batch_size = detector.batch_size(batch_size)
    problem, scores = "", np.empty(0)
    try:
        loader = make_loader(Subset(rows, mine), workers=workers, batch_size=batch_size)
        parts: list[torch.Tensor] = []
        for batch in track(loader, description=title, disable=group.rank > 0 or not sys.stderr.isatty()):
            if batch["unreadable"]:
                raise DataError(f"{title}: a test image cannot be read: {batch['unreadable'][0]}")
            parts.append(detector.score(batch["image"]))
        scores = torch.cat(parts).cpu().numpy() if parts else scores
    except DataError as error:
        problem = str(error)
    # Problems are gathered too, and raised everywhere: a process that left early would let the others wait forever.
    found = group.gather((problem, scores))
    for text, _ in found:
        if text:
            raise DataError(text)
    if group.rank:
        return None
    merged = np.empty(len(rows))
    for rank, (_, part) in enumerate(found):
        merged[rank :: group.world] = part
    return merged


def predict_manifest(
    detector: LoadedDetector,
    manifest: Manifest,
    *,
    batch_size: int | str,
    workers: int,
    title: str,
    group: Processes | None = None,
) -> pd.DataFrame | None:
    """Score every row of a manifest once; see :func:`predict`.

    Returns:
        The manifest's rows (columns :data:`KEPT`, absolute paths) with ``score`` = P(fake), or None on other processes.
    """
    rows = LabelledFaces(manifest, test_transform(detector.image_size))
    scores = predict(detector, rows, batch_size=batch_size, workers=workers, title=title, group=group)
    return None if scores is None else _with_scores(manifest, scores)


def _with_scores(manifest: Manifest, scores: np.ndarray) -> pd.DataFrame:
    return manifest.table[[*KEPT]].assign(path=manifest.paths(), score=scores)


# ---------------------------------------------------------------------------------------------------------- test sets


def _training_rows(source: str) -> Manifest | None:
    """What a checkpoint was trained on, as far as the run folder around it tells; None where it is not known."""
    path = Path(source).expanduser()
    folder = path if path.is_dir() else path.parent
    files = [place / "config.yaml" for place in (folder, folder.parent)]
    file = next((f for f in files if f.is_file()), None)
    data = OmegaConf.select(OmegaConf.load(file), "data.manifests") if file else None
    manifests = [path for path in data or [] if build.prepared(path)]
    if not manifests:
        return None
    return Manifest.concat([Manifest.read(p, extra=["origin"]) for p in manifests])


def _clusters(table: pd.DataFrame) -> str:
    """What the bootstrap draws: people where every sample shows one known person, else videos as in the papers.

    Forgeries made from a person's own photograph rise and fall with it. Where a forgery is made of two people
    (``000+003``) people overlap, and are no independent draws any more.
    """
    one = table["subject"].ne("").all() and not table["subject"].str.contains("+", regex=False).any()
    return "subject" if one and table.groupby(["dataset", "video"])["subject"].nunique().max() == 1 else "video"


def _calibrated(table: pd.DataFrame, stored: Mapping[str, Any]) -> dict[str, Any]:
    """What the stored temperature and thresholds do on this test set."""
    scores, labels = table["score"].to_numpy(), table["label"].to_numpy()
    after = calibration.apply_temperature(scores, stored["temperature"])
    errors = {
        f"ece_{name}": {"value": calibration.expected_calibration_error(values, labels)}
        for name, values in (("before", scores), ("after", after))
    }
    curves = {"before": calibration.reliability(scores, labels), "after": calibration.reliability(after, labels)}
    return {
        "calibration": {
            **errors, "reliability": curves, "temperature": stored["temperature"], "source": stored["source"],
        },
        "operating": {
            name: {"threshold": point["threshold"], **calibration.rates_at(after, labels, point["threshold"])}
            for name, point in stored["thresholds"].items()
        },
    }  # fmt: skip


def _robustness(
    detector: LoadedDetector, rows: Manifest, names: Sequence[str], cfg: DictConfig, title: str, group: Processes
) -> dict[str, Any]:
    """Frame-level metrics of the same rows under every corruption and severity."""
    variants = [(name, level) for name in names for level in cfg.evaluate.severities]
    faces = CorruptedFaces(rows, detector.image_size, variants)
    options: dict[str, Any] = {"batch_size": cfg.evaluate.batch_size, "workers": cfg.data.workers}
    scores = predict(detector, faces, title=f"{title}, corrupted", group=group, **options)
    if scores is None:
        return {}
    labels, clusters = rows.table["label"], rows.table["dataset"] + "/" + rows.table[_clusters(rows.table)]
    bootstrap: dict[str, Any] = {"replicates": cfg.evaluate.replicates, "seed": cfg.seed}
    curves: dict[str, Any] = {}
    for (name, level), part in zip(variants, scores.reshape(len(variants), -1), strict=True):
        metrics = METRICS[detector.checkpoint.meta["task"]].evaluate(part, labels, clusters, **bootstrap)["metrics"]
        curves.setdefault(name, {})[str(level)] = {m: metrics[m] for m in _ROBUSTNESS if m in metrics}
    return curves


def evaluate(cfg: DictConfig, chosen: Mapping[str, str], out: Path) -> dict[str, Any]:
    """Evaluate checkpoints on the protocol's test sets; write predictions and tables.

    All processes of a distributed run call this together; the first one computes metrics and writes.

    Args:
        cfg: composed configuration (``testsets``, ``evaluate``, ``ckpt`` …).
        chosen: label → checkpoint.
        out: folder for the results.

    Returns:
        Results: label → test set → summary (:func:`fsvfm.metrics.forgery.summarise` or, for anti-spoofing,
        :func:`fsvfm.metrics.antispoof.summarise`; with ``calibration``, ``operating`` and ``robustness`` where there
        are such), or ``{"gap": reason}``.

    Raises:
        ConfigError: no test sets, or a checkpoint of another task than the protocol's.
        DataError: at the end, if a test set has no numbers; everything else is written.
    """
    group = processes.join(cfg.trainer)
    results: dict[str, dict[str, Any]] = {}
    predictions, notes, costs = [], list[str](), dict[str, dict[str, float]]()
    for label, source in chosen.items():
        if reason := build.absent_run(source):
            results[label] = {name: {"gap": reason} for name in cfg.testsets}
            continue
        detector = load_detector_network(source, device=group.device, precision=cfg.evaluate.precision)
        task = detector.checkpoint.meta["task"]
        if cfg.protocol.task not in (None, task):
            raise ConfigError(
                f"{source} is a detector for {task}, but protocol={cfg.protocol.name} is about {cfg.protocol.task}; "
                "choose a protocol of its task, or name test sets yourself with protocol=none testset=[…]"
            )
        notes += _remarks(label, detector)
        costs[label] = cost(detector.network, detector.image_size)
        trained_on = _training_rows(source)
        for name, test in cfg.testsets.items():
            title = f"{label} on {name}"
            try:
                corrupt_too = cfg.evaluate.corrupted_sets is None or name in cfg.evaluate.corrupted_sets
                variants = list(cfg.evaluate.corruptions) if corrupt_too else []
                table, summary = _evaluate_one(cfg, detector, test, title, group, trained_on, variants, notes)
                if table is not None:
                    predictions.append(table.assign(run=label, testset=name))
            except (DataError, MetricError) as error:
                summary = {"gap": str(error)}
            results.setdefault(label, {})[name] = summary
    if group.rank:
        return {}
    _write(out, cfg, chosen, results, predictions, notes, costs)
    if predictions:
        from fsvfm import logged  # with matplotlib, which scoring alone does without

        logged.show(cfg, pd.concat(predictions, ignore_index=True), results, out)
    missing = [
        f"  {run} on {name}: {s['gap']}" for run, sets in results.items() for name, s in sets.items() if "gap" in s
    ]
    if missing:
        listed = "\n".join(missing)
        raise DataError(f"{len(missing)} test set(s) have no numbers; the others are in {out}:\n{listed}")
    return results


def _evaluate_one(
    cfg: DictConfig,
    detector: LoadedDetector,
    test: Mapping[str, Any],
    title: str,
    group: Processes,
    trained_on: Manifest | None,
    corruptions: Sequence[str],
    notes: list[str],
) -> tuple[pd.DataFrame | None, dict[str, Any]]:
    """Predictions and summary of one detector on one test set; nothing but on the first process."""
    rows = build.testset_rows(test)
    if trained_on is not None:
        notes += [f"{title}: {text}" for text in check_leaks(trained_on, rows)]
    options: dict[str, Any] = {"batch_size": cfg.evaluate.batch_size, "workers": cfg.data.workers, "group": group}
    table = predict_manifest(detector, rows, title=title, **options)
    exact = None
    if detector.precision != "32-true":
        some = rows.sample(_CHECKED, derive_seed(cfg.seed))
        exact = predict_manifest(replace(detector, precision="32-true"), some, title=f"{title}, float32", **options)

    summary: dict[str, Any] = {}
    problem: FsvfmError | None = None
    if table is not None:
        try:
            summary = METRICS[detector.checkpoint.meta["task"]].summarise(
                table, cluster=_clusters(table), replicates=cfg.evaluate.replicates, seed=cfg.seed
            )
            if detector.calibration:
                summary |= _calibrated(table, detector.calibration)
            if exact is not None:
                notes.append(f"{title}: {_effect(detector.precision, table, exact)}")
        except MetricError as error:
            problem = error  # raised below: the other processes still expect this one at the corrupted images
    if corruptions:
        summary["robustness"] = _robustness(detector, rows, corruptions, cfg, title, group)
    if problem is not None:
        raise problem
    return table, summary


def _effect(precision: str, table: pd.DataFrame, exact: pd.DataFrame) -> str:
    """What a precision did to scores, in words, by the rows of `exact`, which were scored in float32 too."""
    half = table.drop_duplicates("path").set_index("path")["score"].loc[exact["path"]].to_numpy()
    largest = np.abs(half - exact["score"].to_numpy()).max()
    compared = f"on {len(exact)} faces scored in float32 too"
    text = f"computed in {precision}; {compared}, P(fake) differs by {largest:.2g} at most"
    if exact["label"].nunique() < 2:
        return f"{text}; they are of one class, so that there is no AUC"
    before, after = (100 * forgery.auc(scores, exact["label"]) for scores in (exact["score"], half))
    return f"{text}, their AUC is {after:.2f} % instead of {before:.2f} % ({after - before:+.2f})"


def _remarks(label: str, detector: LoadedDetector) -> list[str]:
    """What a reader of the numbers has to know about a checkpoint."""
    parameters = detector.checkpoint.meta.get("provenance", {}).get("hyper_parameters") or {}
    remarks = []
    if parameters.get("selection") == "target_best":
        remarks.append(
            f"{label}: selection=target_best — the iteration was chosen by its error on the target test set itself, as "
            "in the published tables; such numbers are optimistic and only comparable with others chosen that way"
        )
    return remarks + [f"{label}: {note}" for note in detector.checkpoint.notes]


def _write(
    folder: Path,
    cfg: DictConfig,
    chosen: Mapping[str, str],
    results: Mapping[str, Any],
    predictions: Sequence[pd.DataFrame],
    notes: Sequence[str],
    costs: Mapping[str, Mapping[str, float]],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if predictions:
        file = folder / "predictions.parquet"
        temporary = file.with_suffix(".tmp")
        pd.concat(predictions, ignore_index=True).to_parquet(temporary, index=False)
        temporary.replace(file)
    packages = ("fsvfm", "torch", "timm", "pytorch-lightning", "numpy")
    made = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "checkpoints": dict(chosen),
        "protocol": str(cfg.protocol.name),
        "published": OmegaConf.to_container(cfg.protocol.published, resolve=True),
        "notes": list(dict.fromkeys(notes)),
        "costs": dict(costs),
        "seed": cfg.seed,
        "precision": str(cfg.evaluate.precision),
        "versions": {name: version(name) for name in packages},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    write_tables(folder, results, made=made)
    _print(results, folder)
    for note in made["notes"]:
        say(f"note: {note}")


def _print(results: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """The headline metrics of every run and test set, video level where a video has several frames."""
    rows = {(r["run"], r["testset"], r["level"], r["metric"]): r for r in result_rows(results)}
    levels = dict.fromkeys(level for family in families(results) for level in family.levels)
    for level in levels:
        headline = [m for m in ("auc", "eer", "ap", "hter") if any(key[2:] == (level, m) for key in rows)]
        print(f"{'run':<20}{'test set':<16}" + "".join(f"{m.upper():>20}" for m in headline) + f"   (%, {level} level)")
        for run, sets in results.items():
            for name in [*sets, "mean"] if len(sets) > 1 else sets:
                cells = [rows.get((run, name, level, m)) for m in headline]
                if any(cells):
                    print(f"{run:<20}{name:<16}" + "".join(f"{percent(c) if c else '—':>20}" for c in cells))
    print(f"tables, scores and intervals: {folder}")


# --------------------------------------------------------------------------------------------------------- calibration


def calibrate_export(
    folder: Path, rows: Manifest, *, source: str, conformal_alpha: float | None, batch_size: int | str, workers: int,
    group: Processes | None = None,
) -> tuple[pd.DataFrame, dict[str, Any]] | None:  # fmt: skip
    """Fit temperature and thresholds of an exported detector on validation rows and store them in the export.

    Args:
        folder: an export of ours; its ``model.json`` gets the entry ``calibration``.
        rows: validation faces, never test faces.
        source: what they are, in words; stored.
        conformal_alpha: error rate of the split-conformal band, or None for no band.
        batch_size: images per forward pass, or ``auto``.
        workers: loader processes.
        group: the processes that share the work.

    Returns:
        On the first process, the rows with their ``score`` and a summary as of :func:`evaluate`, for figures.

    Raises:
        DataError: an unreadable image.
        MetricError: one class only, or scores that are not finite.
    """
    device = group.device if group else torch.device("cpu")
    detector = load_detector_network(str(folder), device=device)
    table = predict_manifest(detector, rows, batch_size=batch_size, workers=workers, title="calibration", group=group)
    if table is None:
        return None
    fitted = calibration.calibrate(
        table["score"].to_numpy(), table["label"].to_numpy(), source=source, conformal_alpha=conformal_alpha
    )
    save_export(folder, detector.checkpoint.state, {**detector.checkpoint.meta, "calibration": fitted})
    metrics = METRICS[detector.checkpoint.meta["task"]]
    summary = metrics.summarise(table, cluster=_clusters(table), replicates=_VALIDATION_REPLICATES)
    return table, {**summary, **_calibrated(table, fitted)}
