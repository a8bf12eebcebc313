"""One run with every logger, read back from what each left on disk; and the same run again from its folder."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from fsvfm.loggers import MetricsFile, TensorBoard, Wandb

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = (
    "experiment=demo_dfd", "model.init=null", "model.depth=1", "model.image_size=32", "data.batch_size=4",
    "trainer.max_epochs=2", "trainer.log_every_n_steps=1", "trainer.precision=32-true", "evaluate.replicates=20",
)  # fmt: skip


class Runs(NamedTuple):
    """A folder of runs and how to make one."""

    folder: Path
    data: Path

    def train(self, *words: str) -> None:
        env = {**os.environ, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
        env |= {"FSVFM_DATA": str(self.data), "FSVFM_RUNS": "runs"}
        command = [sys.executable, "-m", "fsvfm.train", *words]
        done = subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, prepared_dir: Path) -> Runs:
    """``runs/first``, trained and tested with all loggers."""
    made = Runs(tmp_path_factory.mktemp("logged"), prepared_dir.parent)
    made.train(*SMALL, "name=first", "logger=[wandb,tensorboard,mlflow]")
    return made


@pytest.fixture(scope="module")
def metrics(runs: Runs) -> dict[str, dict[int, float]]:
    """metrics.csv as name → step → value."""
    table = pd.read_csv(runs.folder / "runs" / "first" / "metrics.csv")
    named = {str(c): table[["step", c]].dropna() for c in table.columns if c not in ("step", "epoch")}
    return {name: dict(zip(t["step"].astype(int), t[name], strict=True)) for name, t in named.items()}


def wandb_records(file: Path) -> Iterator[Any]:
    """Records of a ``.wandb`` file: blocks of 32 KiB with LevelDB's log framing, after a header of seven bytes."""
    content = file.read_bytes()
    assert content[:4] == b":W&B"
    place, parts = 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


class WandbRun(NamedTuple):
    """What the offline folders of a run hold together."""

    ids: list[str]
    groups: set[str]
    tags: set[str]
    config: dict[str, Any]
    history: list[dict[str, Any]]
    files: set[str]
    kinds: set[str]


def read_wandb(folder: Path) -> WandbRun:
    run = WandbRun([], set(), set(), {}, [], set(), set())
    for file in sorted(folder.glob("offline-run-*/*.wandb")):
        for record in wandb_records(file):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                run.ids.append(record.run.run_id)
                run.groups.add(record.run.run_group)
                run.tags.update(record.run.tags)
            if kind in ("run", "config"):
                updates = record.run.config.update if kind == "run" else record.config.update
                run.config.update({(u.key or u.nested_key[0]): json.loads(u.value_json) for u in updates})
            if kind == "history":
                row: dict[str, Any] = {}
                for item in record.history.item:
                    value = json.loads(item.value_json)
                    if len(item.nested_key) > 1:  # a picture or table: its parts one by one
                        row.setdefault(item.nested_key[0], {})[item.nested_key[1]] = value
                    else:
                        row[item.key or item.nested_key[0]] = value
                run.history.append(row)
            run.kinds.add(kind)
        run.files.update(
            str(path.relative_to(file.parent / "files")) for path in file.parent.rglob("files/media/**/*.*")
        )
    return run


def test_wandb_offline_files_hold_everything(runs: Runs, metrics: dict[str, dict[int, float]]) -> None:
    found = read_wandb(runs.folder / "runs" / "first" / "wandb")
    # Training and testing opened it separately, under one id that lies in the run folder.
    assert set(found.ids) == {(runs.folder / "runs" / "first" / "wandb_id.txt").read_text().strip()}
    assert len(list((runs.folder / "runs" / "first" / "wandb").glob("offline-run-*"))) == 2
    assert (found.groups, found.tags) == ({"demo_dfd"}, {"vit_tiny", "full", "demo_forgeries"})

    assert "stats" in found.kinds  # figures of the machine

    config = yaml.safe_load((runs.folder / "runs" / "first" / "config.yaml").read_text())
    assert found.config["trainer"] == config["trainer"]
    assert found.config["seed"] == 0
    assert found.config["environment"]["command"].startswith("python -m fsvfm.train experiment=demo_dfd")
    assert "commit" in found.config["environment"]["git"]
    assert any("manifest.parquet" in line for line in found.config["environment"]["data"])

    scalars: dict[str, dict[int, float]] = {}
    for row in found.history:
        for key, value in row.items():
            if isinstance(value, int | float) and "trainer/global_step" in row:
                scalars.setdefault(key, {})[int(row["trainer/global_step"])] = value
    assert metrics
    for name, values in metrics.items():
        assert scalars[name] == pytest.approx(values), name
    results = json.loads((runs.folder / "runs" / "first" / "test" / "results.json").read_text())["runs"]["first"]
    auc = results["demo_seen"]["frame"]["metrics"]["auc"]["value"]
    assert next(iter(scalars["test/demo_seen/frame/auc"].values())) == pytest.approx(auc)

    media = {key: value for row in found.history for key, value in row.items() if isinstance(value, dict)}
    for step in ("validation", "test"):
        for key in ("roc", "reliability"):
            assert media[f"{step}/{key}"]["_type"].startswith("image"), key
        assert media[f"{step}/metrics"]["_type"].startswith("table")
    assert "test/wrong/demo_unseen" in media
    assert {Path(name).suffix for name in found.files} >= {".png", ".json"}

    # The dashboard that users import asks for what is there; its first sections are of pre-training, in part.
    dashboard = yaml.safe_load((REPOSITORY / "docs" / "wandb" / "dashboard.yaml").read_text())
    for section in dashboard["sections"]:
        for panel in section["panels"] if section["name"] in ("Validation", "Test sets") else []:
            assert {*panel.get("line", [])} <= set(scalars), panel
            assert {*panel.get("media", [])} <= set(media), panel
            if "line_regex" in panel and "hter" not in panel["line_regex"]:
                assert any(re.search(panel["line_regex"], key) for key in scalars), panel


def test_tensorboard_equals_metrics_csv(runs: Runs, metrics: dict[str, dict[int, float]]) -> None:
    events = EventAccumulator(str(runs.folder / "runs" / "first" / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    logged = {name for name in tags["scalars"] if not name.startswith(("test/", "validation/"))} - {"epoch"}
    assert logged == set(metrics)
    for name, values in metrics.items():
        assert {e.step: e.value for e in events.Scalars(name)} == pytest.approx(values, rel=1e-6), name
    assert {"validation/roc", "test/roc", "test/reliability", "test/wrong/demo_seen"} <= set(tags["images"])
    assert "test/metrics/text_summary" in tags["tensors"]


def test_mlflow_by_one_config(
    runs: Runs, metrics: dict[str, dict[int, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    mlflow = pytest.importorskip("mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{runs.folder / 'runs' / 'mlflow.db'}")
    run = client.get_run((runs.folder / "runs" / "first" / "mlflow_id.txt").read_text().strip())
    assert run.data.tags["mlflow.runName"] == "first"
    assert (run.data.params["trainer/max_epochs"], run.info.status) == ("2", "FINISHED")
    for name in ("train/loss_step", "val/auc"):
        logged = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, name)}
        assert logged == pytest.approx(metrics[name])
    left = {path.name for path in (runs.folder / "runs" / "mlflow_artifacts" / run.info.run_id).rglob("*.*")}
    assert any(name.startswith("roc_") for name in left)
    assert any(name.startswith("metrics_") and name.endswith(".csv") for name in left)
    assert not (runs.folder / "mlruns").exists()


def test_the_run_folder_holds_the_same_without_any_logger(runs: Runs) -> None:
    figures = runs.folder / "runs" / "first" / "test" / "figures"
    for name in ("roc", "reliability", "wrong_demo_seen", "wrong_demo_unseen"):
        with Image.open(figures / f"{name}.png") as picture:
            assert np.asarray(picture).std() > 0, name
    table = pd.read_csv(figures / "metrics.csv")
    results = json.loads((figures.parent / "results.json").read_text())["runs"]["first"]
    row = table[(table["testset"] == "demo_unseen") & (table["level"] == "frame") & (table["metric"] == "auc")]
    assert row["value"].item() == pytest.approx(results["demo_unseen"]["frame"]["metrics"]["auc"]["value"])


def test_a_run_folder_says_how_it_was_made(runs: Runs) -> None:
    folder = runs.folder / "runs" / "first"
    environment = json.loads((folder / "environment.json").read_text())
    assert yaml.safe_load((folder / "overrides.yaml").read_text()) == environment["overrides"]
    assert environment["overrides"][0] == "experiment=demo_dfd"
    digest = sha256((runs.data / "demo" / "manifest.parquet").read_bytes()).hexdigest()
    assert environment["data"][str(runs.data / "demo")]["manifest.parquet"] == digest
    machine = environment["machine"]
    assert machine["cores"] >= 1
    assert machine["ram_gib"] > 0
    assert environment["packages"]["torch"]
    assert (environment["seed"], environment["deterministic"]) == (0, False)
    if (environment["git"] or {}).get("patch"):
        patch = (folder / "changes.patch").read_text(encoding="utf-8")
        assert sha256(patch.encode()).hexdigest() == environment["git"]["patch"]["sha256"]


def test_a_run_made_again_from_its_folder_has_the_same_losses(runs: Runs) -> None:
    again = ("--config-dir=runs/first", "--config-name=rerun", "name=again", "run=[fit]", "trainer.deterministic=true")
    runs.train(*again, "logger.wandb=null", "logger.tensorboard=null", "logger.mlflow=null")
    first, second = (pd.read_csv(runs.folder / "runs" / name / "metrics.csv") for name in ("first", "again"))
    columns = [name for name in first.columns if name != "train/images_per_s"]
    pd.testing.assert_frame_equal(first[columns], second[columns])
    assert first["train/loss_step"].notna().sum() > 4
    assert not (runs.folder / "runs" / "again" / "wandb").exists()
    with (runs.folder / "runs" / "again" / "config.yaml").open() as file:
        assert "runs/first" not in json.dumps(yaml.safe_load(file)["callbacks"])


@pytest.mark.parametrize("step", [0, 3])
def test_a_continued_log_has_every_step_once(tmp_path: Path, step: int) -> None:
    """What an interrupted run logged from the step on that it continues from is computed again."""
    for first, names in ((0, ("a", "b")), (step, ("c",))):
        loggers = (MetricsFile(str(tmp_path)), TensorBoard(str(tmp_path), name=None, version="events"))
        for logger in loggers:
            logger.continue_at(first)
            for number in range(first, 6):
                for name in names:
                    logger.log_metrics({name: float(number)}, number)
            logger.save()
            logger.finalize("success")
    expected = {"a": range(step), "b": range(step), "c": range(step, 6)}
    table = pd.read_csv(tmp_path / "metrics.csv")
    events = EventAccumulator(str(tmp_path / "events"))
    shown = events.Reload().Tags()["scalars"]
    for name, steps in expected.items():
        assert list(table.dropna(subset=[name])["step"] if name in table else []) == list(steps), name
        assert ([e.step for e in events.Scalars(name)] if name in shown else []) == list(steps), name


def test_ids_of_runs_elsewhere_are_kept_until_a_run_starts_over(tmp_path: Path) -> None:
    first = Wandb(str(tmp_path), project="p")
    first.continue_at(0)
    stored = (tmp_path / "wandb_id.txt").read_text().strip()
    assert Wandb(str(tmp_path), project="p").version == first.version == stored
    continued = Wandb(str(tmp_path), project="p")
    continued.continue_at(7)
    assert continued.version == stored
    over = Wandb(str(tmp_path), project="p")
    over.continue_at(0)
    assert over.version not in (None, stored)
    given = Wandb(str(tmp_path), project="p", id="mine")
    given.continue_at(0)
    assert given.version == (tmp_path / "wandb_id.txt").read_text().strip() == "mine"
