"""metrics.csv in the run folder: one row per logging step, kept when a run is continued."""

from __future__ import annotations

import csv
from pathlib import Path

from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter


class MetricsFile(CSVLogger):
    """Lightning's CSV logger, writing straight into the run folder and keeping the rows of an interrupted run.

    Lightning's own deletes the file when a run is resumed. Rows after the step resumed from are dropped, since those
    steps are computed again.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: str) -> None:
        super().__init__(save_dir=folder, name="", version="")
        self.file = Path(folder) / ExperimentWriter.NAME_METRICS_FILE
        self._kept: list[dict[str, str]] = []
        if self.file.is_file():
            with self.file.open(newline="") as source:
                self._kept = list(csv.DictReader(source))
            self.file.unlink()

    @property
    def log_dir(self) -> str:
        """The run folder itself."""
        return self.root_dir

    def keep_until(self, step: int) -> None:
        """Write back the earlier run's rows up to and including ``step``; -1 keeps none."""
        for row in self._kept:
            if int(row["step"]) <= step:
                values = {key: float(value) for key, value in row.items() if key != "step" and value}
                self.experiment.log_metrics(values, int(row["step"]))
        self._kept = []
        self.save()
