"""Where numbers and pictures of a run go: metrics.csv always; TensorBoard, Weights & Biases or MLflow beside it.

All loggers get the same scalars from Lightning. Those of :class:`Shows` get pictures and tables too, which lie in the
run folder as well. A run that is continued goes on in the same place: what was logged after the step it continues from
is dropped where that is possible (metrics.csv, TensorBoard), and logged again with the same step where it is not.
"""

from __future__ import annotations

import csv
import json
import platform
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import pandas as pd
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from pytorch_lightning.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from pytorch_lightning.utilities import rank_zero_only

from fsvfm.cli import rank


@runtime_checkable
class Shows(Protocol):
    """A logger that shows more than scalars."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Show scalars."""

    def show_picture(self, key: str, picture: Image.Image, step: int) -> None:
        """Show an RGB picture under a name with ``/`` between its parts."""

    def show_table(self, key: str, table: pd.DataFrame, step: int) -> None:
        """Show a table of strings and numbers."""


class MetricsFile(CSVLogger):
    """Lightning's CSV logger, writing straight into the run folder and keeping the rows of an interrupted run.

    Lightning's own deletes the file when a run is resumed.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: str) -> None:
        super().__init__(save_dir=folder, name="", version="")
        self.file = Path(folder) / ExperimentWriter.NAME_METRICS_FILE
        self._kept: list[dict[str, str]] = []
        if rank() == 0 and self.file.is_file():  # other processes start later, and would delete what this one wrote
            with self.file.open(newline="") as source:
                self._kept = list(csv.DictReader(source))
            self.file.unlink()

    @property
    def log_dir(self) -> str:
        """The run folder itself."""
        return self.root_dir

    def continue_at(self, step: int) -> None:
        """Write back the earlier run's rows before ``step``; those from it on are computed again."""
        for row in self._kept:
            if int(row["step"]) < step:
                values = {key: float(value) for key, value in row.items() if key != "step" and value}
                self.experiment.log_metrics(values, int(row["step"]))
        self._kept = []
        self.save()


class TensorBoard(TensorBoardLogger):
    """Lightning's TensorBoard logger, with pictures, tables as Markdown, and a clean cut where a run continues."""

    def continue_at(self, step: int) -> None:
        """Hide what an interrupted run logged from ``step`` on."""
        self._kwargs["purge_step"] = step

    @rank_zero_only
    def show_picture(self, key: str, picture: Image.Image, step: int) -> None:
        """Under Images."""
        self.experiment.add_image(key, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    @rank_zero_only
    def show_table(self, key: str, table: pd.DataFrame, step: int) -> None:
        """Under Text."""
        rows: list[Any] = [table.columns, ["---"] * len(table.columns), *table.itertuples(index=False)]
        lines = ["|" + "|".join(_cell(value) for value in row) + "|" for row in rows]
        self.experiment.add_text(key, "\n".join(lines), step)


class Wandb(WandbLogger):
    """Lightning's Weights & Biases logger; the run's id lies in its folder, so that the same command continues it.

    ``WANDB_MODE=offline`` keeps everything on disk for ``wandb sync``.

    Args:
        folder: the run folder; wandb writes below it.
        id: of the run at Weights & Biases; None takes the one in ``wandb_id.txt``, or a new one.
        options: of :class:`pytorch_lightning.loggers.WandbLogger` and ``wandb.init``, such as ``project``, ``group``,
            ``tags`` or ``log_model``.
    """

    def __init__(self, folder: str, id: str | None = None, **options: Any) -> None:
        self._file = Path(folder) / "wandb_id.txt"
        stored = self._file.read_text().strip() if self._file.is_file() else None
        super().__init__(save_dir=folder, id=id or stored or secrets.token_hex(4), **options)
        self._given = id is not None

    def continue_at(self, step: int) -> None:
        """Begin a new run at Weights & Biases when this one starts from the beginning, unless its id was given."""
        if step == 0 and not self._given:
            self._wandb_init["id"] = self._id = secrets.token_hex(4)
        self._store()

    @rank_zero_only
    def _store(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text(f"{self._id}\n")

    @rank_zero_only
    def show_picture(self, key: str, picture: Image.Image, step: int) -> None:
        """As a media panel with a slider over steps."""
        self.log_image(key, [picture], step=step)

    @rank_zero_only
    def show_table(self, key: str, table: pd.DataFrame, step: int) -> None:
        """As a table that can be filtered and joined over runs."""
        self.log_table(key, dataframe=table, step=step)


class MLflow(MLFlowLogger):
    """Lightning's MLflow logger; the run's id lies in its folder, so that the same command continues it.

    Args:
        folder: the run folder.
        tracking_uri: ``sqlite:///<file>``, whose artifacts go into ``mlflow_artifacts`` beside it, or a server.
        options: of :class:`pytorch_lightning.loggers.MLFlowLogger`.
    """

    def __init__(self, folder: str, tracking_uri: str, **options: Any) -> None:
        self._file = Path(folder) / "mlflow_id.txt"
        if tracking_uri.startswith("sqlite:///"):
            database = Path(tracking_uri.removeprefix("sqlite:///"))
            database.parent.mkdir(parents=True, exist_ok=True)
            options["artifact_location"] = (database.parent / "mlflow_artifacts").absolute().as_uri()
        stored = self._file.read_text().strip() if self._file.is_file() else None
        super().__init__(tracking_uri=tracking_uri, run_id=stored, **options)

    def continue_at(self, step: int) -> None:
        """Begin a new MLflow run when this one starts from the beginning; keep the id."""
        if step == 0:
            self._run_id = None
        self._store()

    @rank_zero_only
    def _store(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text(f"{self.run_id}\n")

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Log what is not there yet: MLflow refuses to change a value, and a continued run gives them again."""
        there = self.experiment.get_run(cast(str, self.run_id)).data.params
        fresh = {key: value for key, value in _flat(params) if key not in there}
        super().log_hyperparams(fresh)

    @rank_zero_only
    def show_picture(self, key: str, picture: Image.Image, step: int) -> None:
        """As an artifact."""
        self.experiment.log_image(cast(str, self.run_id), picture, artifact_file=f"{key}_{step:07d}.png")

    @rank_zero_only
    def show_table(self, key: str, table: pd.DataFrame, step: int) -> None:
        """As a CSV artifact."""
        self.experiment.log_text(cast(str, self.run_id), table.to_csv(index=False), f"{key}_{step:07d}.csv")


def start(loggers: Iterable[Logger], cfg: DictConfig, folder: Path, step: int) -> None:
    """Open loggers at the step a run continues from, and give them its configuration and code version.

    Args:
        loggers: of the trainer, not used yet.
        cfg: the composed configuration.
        folder: the run folder, with ``environment.json``.
        step: optimisation steps done before; 0 at the beginning.
    """
    for logger in loggers:
        if isinstance(logger, MetricsFile | TensorBoard | Wandb | MLflow):
            logger.continue_at(step)
        if isinstance(logger, Shows):
            logger.log_hyperparams(_description(cfg, folder))


def finish(loggers: Iterable[Logger]) -> None:
    """Close loggers: the next run of a sweep in this process would log into the same wandb run otherwise."""
    for logger in loggers:
        if isinstance(logger, Wandb) and logger._experiment is not None:
            logger.experiment.finish()
        elif isinstance(logger, TensorBoard):
            logger.finalize("success")  # writes what is left; MLflow was told by the trainer how training ended


def _description(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """The resolved configuration, and what of the environment tells where numbers come from."""
    config = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
    file = folder / "environment.json"
    environment = json.loads(file.read_text()) if file.is_file() else {}
    kept = {key: environment[key] for key in ("command", "git", "machine") if key in environment}
    digests = environment.get("data", {}).items()
    data = [f"{where}/{name} {digest}" for where, found in digests for name, digest in found.items()]
    return {**config, "environment": {**kept, "data": data, "host": platform.node()}}


def _flat(values: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in dict(values).items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
