"""From a raw folder to a number: every deepfake set, as a miniature, through recipe, training and evaluation."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from omegaconf import DictConfig

import fsvfm.prepare  # noqa: F401  (the command's module registers what its configurations use)
import miniatures
from fsvfm import build
from fsvfm.data.manifest import Manifest
from fsvfm.evaluation import predict_manifest
from fsvfm.loaded_detector import LoadedDetector, load_detector_network
from fsvfm.metrics.forgery import summarise
from fsvfm.recipes.engine import Prepared

#: A forgery run of the papers' kind, as small as it gets.
SMALL = (
    "experiment=dfd_vitb", "model=vit_tiny", "model.init=null", "model.image_size=64", "data.batch_size=4",
    "data.workers=0", "trainer.accelerator=cpu", "trainer.devices=1", "trainer.precision=32-true",
    "trainer.max_epochs=1", "trainer.limit_train_batches=1", "trainer.limit_val_batches=1", "evaluate.replicates=20",
)  # fmt: skip

PP_METHODS = ("FaceSwap/SimSwap", "TalkingFace/FLOAT")
LAYOUTS: dict[str, Callable[..., Path]] = {
    "ffpp": miniatures.ffpp,
    "dfd": miniatures.dfd,
    "celebdf_v1": miniatures.celebdf,
    "celebdf_v2": miniatures.celebdf,
    "celebdf_pp": lambda root, photos: miniatures.celebdf(root, photos, methods=PP_METHODS),
    "dfdc": miniatures.dfdc,
    "dfdcp": miniatures.dfdcp,
    "wdf": miniatures.wdf,
    "diff": miniatures.diff,
}
#: Test sets, with fewer frames than by default where they are videos.
TEST_SETS = {name: () if name in ("wdf", "diff") else ("recipe.frames=2",) for name in LAYOUTS if name != "ffpp"}
#: Images in the manifest, by class.
EXPECTED = {
    "dfd": (4, 4), "celebdf_v1": (6, 4), "celebdf_v2": (4, 4), "celebdf_pp": (6, 8), "dfdc": (4, 4), "dfdcp": (4, 4),
    "wdf": (6, 6), "diff": (2, 5),
}  # fmt: skip


@pytest.fixture(scope="module")
def raw(media_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw folders of all sets, made from real photographs."""
    folder = tmp_path_factory.mktemp("raw")
    photos = miniatures.faces(media_dir)
    for name, write in LAYOUTS.items():
        write(folder / name, photos)
    return folder


def prepare(name: str, raw: Path, out: Path, *overrides: str, **engine: Any) -> Prepared:
    """What `python -m fsvfm.prepare recipe=<name> root=… out=…` does, in this process."""
    with initialize_config_module("fsvfm.configs", version_base="1.3"):
        cfg = compose("prepare", [f"recipe={name}", f"root={raw}", f"out={out}", *overrides])
    return instantiate(cfg.recipe, _partial_=True, _convert_="all")(out=str(out), workers=1, **engine)


def fit(folder: Path, *overrides: str) -> pl.Trainer:
    """One training and one validation step of a configured run, in this process."""
    with initialize_config_module("fsvfm.configs", version_base="1.3"):
        cfg: DictConfig = compose("train", [*overrides, "run=[fit]", "name=test", f"paths.run={folder}"])
    build.check(cfg)
    data = build.build_data(cfg)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, limit_train_batches=1, limit_val_batches=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        callbacks=[build.create(cfg.callbacks.ema)] if "ema" in cfg.callbacks else [],
    )  # fmt: skip
    trainer.fit(build.build_task(cfg, data), datamodule=data)
    assert trainer.global_step == 1
    return trainer


@pytest.fixture(scope="module")
def detector(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedDetector:
    """A detector after one step on FaceForensics++ `each`, Deepfakes: what the papers train on for DiFF."""
    folder = tmp_path_factory.mktemp("each")
    options = ("recipe.mode=each", "recipe.methods=[Deepfakes]", "recipe.frames={real: 1, fake: 1}")
    manifest = prepare("ffpp", raw / "ffpp", folder / "data", *options).manifest
    assert set(manifest.table["method"]) == {"real", "Deepfakes"}
    assert manifest.table.groupby(["split", "label"]).size().to_dict() == {
        ("train", 0): 4, ("train", 1): 4, ("val", 0): 2, ("val", 1): 2, ("test", 0): 2, ("test", 1): 2,
    }  # fmt: skip
    trainer = fit(folder, *SMALL, f"data.manifests=[{folder / 'data'}]")
    trainer.save_checkpoint(folder / "one_step.ckpt")
    return load_detector_network(str(folder / "one_step.ckpt"))


@pytest.mark.parametrize("name", TEST_SETS)
def test_raw_folder_to_metrics(name: str, raw: Path, detector: LoadedDetector, tmp_path: Path) -> None:
    prepared = prepare(name, raw / name, tmp_path / name, *TEST_SETS[name])
    assert all(tally.inputs == tally.written + len(tally.skipped) for tally in prepared.tallies)
    manifest = Manifest.read(tmp_path / name).select(split="test")
    table = manifest.table
    assert tuple(table["label"].value_counts().sort_index()) == EXPECTED[name]
    assert (table["dataset"] == name).all()
    scored = predict_manifest(detector, manifest, batch_size=16, workers=0, title=name)
    assert scored is not None
    summary = summarise(scored, replicates=0)
    assert summary["frame"]["n"] == len(table)
    assert summary["video"]["n"] == table["video"].nunique()
    assert set(summary["method"]) == set(table.loc[table["label"] == 1, "method"])
    card = json.loads((tmp_path / name / "card.json").read_text())
    assert {"about", "source", "licence", "split", "options", "account"} <= set(card)


def test_every_listed_video_is_in_the_account(raw: Path, tmp_path: Path) -> None:
    root = tmp_path / "DFDC"
    shutil.copytree(raw / "dfdc", root)
    absent, torn, empty, good = sorted(root.rglob("*.mp4"))
    absent.unlink()
    torn.write_bytes(torn.read_bytes()[:300])
    miniatures.write_clip(empty, np.full((64, 64, 3), 90, np.uint8))
    prepared = prepare("dfdc", root, tmp_path / "out", "recipe.frames=2")
    assert set(prepared.manifest.table["video"]) == {good.stem}
    account = pd.read_csv(tmp_path / "out" / "skipped.csv")
    reasons = {Path(file).name: reason for file, reason in zip(account["input"], account["reason"], strict=True)}
    assert reasons == {absent.name: "listed but absent", torn.name: "unreadable", empty.name: "no face found"}


def test_a_dry_run_counts_and_writes_nothing(raw: Path, tmp_path: Path) -> None:
    prepared = prepare("dfdc", raw / "dfdc", tmp_path / "out", dry_run=True)
    assert prepared.plan is not None
    assert "4 (published: 5000)" in prepared.plan.text()
    assert list(tmp_path.iterdir()) == []


def test_real_videos_to_a_pretraining_step(raw: Path, tmp_path: Path) -> None:
    manifest = prepare("ffpp_pretrain", raw / "ffpp", tmp_path / "faces", "recipe.frames=1").manifest
    assert set(manifest.table["label"]) == {0}
    assert manifest.table.groupby("split").size().to_dict() == {"train": 4, "val": 2}
    assert manifest.grids(16).shape == (6, 196)
    fit(
        tmp_path, "experiment=demo_pretrain", f"data.manifests=[{tmp_path / 'faces'}]", "data.split=null",
        "data.batch_size=2", "trainer.precision=32-true",
    )  # fmt: skip


class Folder:
    """A working directory with its own data and runs."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def run(self, command: str, *words: str, ok: bool = True) -> str:
        env = {**os.environ, "FSVFM_DATA": "data", "FSVFM_RUNS": "runs", "OMP_NUM_THREADS": "1"}
        line = [sys.executable, "-m", f"fsvfm.{command}", *words]
        done = subprocess.run(line, cwd=self.path, env=env, capture_output=True, text=True, check=False, timeout=600)
        output = done.stdout + done.stderr
        assert (done.returncode == 0) == ok, output
        assert "Traceback" not in output, output
        return output


def test_faceforensics_to_celebdf_through_the_command_line(raw: Path, tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    told = folder.run("prepare", "recipe=ffpp", f"root={raw / 'ffpp'}", "recipe.frames={real: 2, fake: 1}", "workers=1")
    assert "train 4 (published: 720)" in told
    manifest = Manifest.read(tmp_path / "data" / "ffpp_c23")
    assert len(manifest) == 8 * 2 + 4 * 8
    folder.run("prepare", "recipe=celebdf_v2", f"root={raw / 'celebdf_v2'}", "recipe.frames=2", "workers=1")
    folder.run("train", *SMALL, "run=[fit]", "name=mini")
    told = folder.run("evaluate", *SMALL, "testset=[celebdf_v2]", "name=mini")
    assert "celebdf_v2" in told
    results = json.loads((tmp_path / "runs/mini/evaluation/results.json").read_text())["runs"]["mini"]["celebdf_v2"]
    assert (results["frame"]["real"], results["frame"]["fake"], results["video"]["n"]) == (4, 4, 4)
    scores = pd.read_parquet(tmp_path / "runs/mini/evaluation/predictions.parquet")
    assert np.isfinite(scores["score"]).all()
    assert set(scores["video"]) == {
        "Celeb-real/id0_0000", "Celeb-real/id1_0000", "Celeb-synthesis/id0_id1_0000", "Celeb-synthesis/id1_id0_0000",
    }  # fmt: skip


@pytest.mark.slow
def test_every_test_set_through_the_command_line(raw: Path, tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.run("prepare", "recipe=ffpp", f"root={raw / 'ffpp'}", "recipe.mode=each", "recipe.frames={real: 1, fake: 1}")
    assert (tmp_path / "data" / "ffpp_c23_each").is_dir()
    folder.run("train", *SMALL, "data.manifests=[data/ffpp_c23_each]", "run=[fit]", "name=mini")
    for name, overrides in TEST_SETS.items():
        folder.run("prepare", f"recipe={name}", f"root={raw / name}", *overrides)
    sets = [name for name in TEST_SETS if name != "diff"]  # DiFF has a test set for each of its subsets
    told = folder.run("evaluate", *SMALL, f"testset=[{','.join(sets)}]", "name=mini")
    results = json.loads((tmp_path / "runs/mini/evaluation/results.json").read_text())["runs"]["mini"]
    for name in sets:
        assert name in told
        assert (results[name]["frame"]["real"], results[name]["frame"]["fake"]) == EXPECTED[name]
