"""RFFR through the library's own training: values of the recipes, warm-up in steps, halved batches, a whole run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from fsvfm import build, runner
from fsvfm.checkpoint import load_checkpoint
from fsvfm.data.datamodules import ForgeryData
from fsvfm.data.datasets import LabelledFaces
from fsvfm.data.manifest import Manifest
from fsvfm.data.transforms import test_transform as plain_transform
from fsvfm.errors import ConfigError
from fsvfm.exports import save_export
from fsvfm.faces.images import save_png
from fsvfm.loaded_detector import load_detector_network
from fsvfm.models.detector import build_detector
from fsvfm.tasks.forgery import ForgeryTask
from fsvfm.tasks.pretrain import PretrainTask

Compose = Callable[..., DictConfig]
CONFIGS = Path(__file__).resolve().parents[3] / "configs"


# --- values -----------------------------------------------------------------------------------------------------------


def test_pretraining_has_the_papers_values(compose_config: Compose) -> None:
    cfg = compose_config("train", "experiment=rffr_pretrain")
    expected = {
        "model.dim": 768, "model.depth": 12, "model.heads": 12, "model.pixel_decoder.dim": 512,
        "model.pixel_decoder.depth": 8, "model.pixel_decoder.heads": 16, "model.patch_size": 16,
        "masking.strategy": "random", "masking.ratio": 0.75, "task.loss.norm_pix": False, "task.loss.reconstruction": 1,
        "task.loss.region": 0, "task.loss.similarity": 0, "data.mean": [0, 0, 0], "data.std": [1, 1, 1],
        "data.crop_scale": None, "optim.optimizer": "adamw", "optim.betas": [0.9, 0.95], "optim.weight_decay": 0.05,
        "optim.base_lr": 1.5e-4, "optim.scale_lr": True, "optim.schedule": "warmup_cosine", "optim.min_lr": 0,
        "optim.warmup_steps": 2500, "trainer.max_steps": 25000, "trainer.max_epochs": -1,
        "trainer.gradient_clip_val": None,
    }  # fmt: skip
    assert {key: OmegaConf.select(cfg, key) for key in expected} == expected
    effective = cfg.data.batch_size * cfg.trainer.devices * cfg.trainer.accumulate_grad_batches
    assert effective == cfg.optim.effective_batch == 600


def test_detector_has_the_papers_values(compose_config: Compose) -> None:
    cfg = compose_config("train", "experiment=rffr")
    expected = {
        "model.family": "rffr", "model.mode": "paper", "model.block_keep": 0.25, "model.patch_size": 16,
        "model.image_size": 224, "model.branch": {"dim": 768, "depth": 12, "heads": 12},
        "model.generator": {"dim": 768, "depth": 12, "heads": 12,
                            "pixel_decoder": {"dim": 512, "depth": 8, "heads": 16}},
        "model.branch_init": "timm:vit_base_patch16_224.orig_in21k_ft_in1k", "tune.name": "full", "tune.drop_path": 0,
        "data.mean": [0, 0, 0], "data.std": [1, 1, 1], "data.batch_size": 32, "data.balance": "batch",
        "optim.optimizer": "adam", "optim.base_lr": 2e-5, "optim.scale_lr": False, "optim.schedule": "constant",
        "optim.weight_decay": 0, "optim.betas": [0.9, 0.999], "optim.layer_decay": None, "trainer.devices": 1,
        "callbacks.best.monitor": "val/auc", "callbacks.best.mode": "max", "augment.crop_scale": None,
        "augment.flip": 0, "augment.rand_augment": None, "augment.random_erasing": 0, "augment.mixup": 0,
        "augment.cutmix": 0, "augment.label_smoothing": 0,
    }  # fmt: skip
    assert {key: OmegaConf.select(cfg, key) for key in expected} == expected
    assert cfg.model.init.endswith("rffr_pretrain/export")


def test_both_sizes_have_the_same_values() -> None:
    sizes = [OmegaConf.load(CONFIGS / "model" / f"{name}.yaml") for name in ("rffr", "rffr_tiny")]
    tables: list[Any] = [OmegaConf.to_container(size) for size in sizes]
    first, second = tables
    assert first.keys() == second.keys()
    for part in ("generator", "branch"):
        assert first[part].keys() == second[part].keys()


# --- learning rate ----------------------------------------------------------------------------------------------------


class Rates(pl.Callback):
    """The learning rate of every optimisation step, as the optimiser used it."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        self.seen.append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_warm_up_and_cosine_are_counted_in_steps(compose_config: Compose, prepared_dir: Path, accumulate: int) -> None:
    """25,000 and 2,500 in the recipe, 12 and 5 here, on epochs of three or two steps."""
    cfg = compose_config(
        "train", "experiment=demo_rffr_pretrain", f"paths.data={prepared_dir.parent}", "model.image_size=32",
        "data.batch_size=5", "trainer.max_epochs=-1", "trainer.max_steps=12", "optim.warmup_steps=5", "~callbacks",
        "+callbacks={}", "+trainer.enable_checkpointing=false", "+trainer.enable_progress_bar=false",
        "trainer.precision=32-true", f"trainer.accumulate_grad_batches={accumulate}", "optim.base_lr=0.256",
    )  # fmt: skip
    data = build.build_data(cfg)
    task = build.build_task(cfg, data)
    assert len(data.train_dataloader()) == 3
    rates = Rates()
    build.create(cfg.trainer, callbacks=[rates], logger=False).fit(task, datamodule=data)
    peak = 0.256 * 5 * accumulate / 256
    warm = [peak * step / 5 for step in range(5)]
    cosine = [peak * 0.5 * (1 + math.cos(math.pi * (step - 5) / (12 - 5))) for step in range(5, 12)]
    assert rates.seen == pytest.approx(warm + cosine, rel=1e-9)


# --- batches ----------------------------------------------------------------------------------------------------------


def halves(prepared_dir: Path, **more: Any) -> ForgeryData:
    augment = {"crop_scale": None, "flip": 0.0, "rand_augment": None, "saturation": None}
    options = {"batch_size": 6, "balance": "batch", **more}
    return ForgeryData([str(prepared_dir)], methods=None, image_size=16, workers=0, augment=augment, **options)


def test_every_batch_is_half_real(prepared_dir: Path) -> None:
    data = halves(prepared_dir)
    labels = data.train_rows.labels
    assert (labels == 1).sum() == 2 * (labels == 0).sum()
    sampler = data.sampler(0, 1)
    drawn: dict[int, list[int]] = {0: [], 1: []}
    for epoch in range(4):
        batches = list(sampler.batches(epoch, 0))
        assert len(batches) == len(sampler) == len(labels) // 6
        for batch in batches:
            for label in (0, 1):
                rows = [draw.row for draw in batch if labels[draw.row] == label]
                assert len(rows) == 3
                drawn[label] += rows
    # A class comes round at its own pace: no row is left out, none comes twice as often as another one.
    for label in (0, 1):
        counts = np.bincount(drawn[label], minlength=len(labels))[labels == label]
        assert counts.min() > 0
        assert counts.max() - counts.min() <= 1


def test_processes_share_a_halved_batch(prepared_dir: Path) -> None:
    whole = halves(prepared_dir, batch_size=8).sampler(0, 1)
    parts = [halves(prepared_dir, batch_size=4).sampler(rank, 2) for rank in range(2)]
    labels = halves(prepared_dir).train_rows.labels
    for together, *pieces in zip(*(s.batches(1, 2) for s in (whole, *parts)), strict=True):
        assert sorted(draw for piece in pieces for draw in piece) == sorted(together)
        assert [labels[[draw.row for draw in piece]].sum() for piece in pieces] == [2, 2]


@pytest.mark.parametrize("wrong", [{"batch_size": 5}, {"weights": {"generated": 1.0}}])
def test_batches_that_cannot_be_halved_are_refused(prepared_dir: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"balance=batch.*even"):
        halves(prepared_dir, **wrong)


# --- the published lists ----------------------------------------------------------------------------------------------


def test_published_lists_become_training_data(tmp_path: Path) -> None:
    """Lists of {"path", "label"} with paths relative to a folder, one for training and one for validation."""
    rng = np.random.default_rng(0)
    manifests = []
    for split, count in (("train", 6), ("val", 4)):
        rows = [{"path": f"{split}/clip_{i}/0.png", "label": i % 2} for i in range(count)]
        for row in rows:
            file = tmp_path / "faces" / str(row["path"])
            file.parent.mkdir(parents=True)
            save_png(file, rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
        (tmp_path / f"{split}.json").write_text(json.dumps(rows))
        with initialize_config_module("fsvfm.configs", version_base="1.3"):
            words = [f"root={tmp_path}/{split}.json", f"recipe.prefix={tmp_path}/faces", f"recipe.split={split}"]
            cfg = compose("prepare", ["recipe=json", "recipe.detector=null", *words])
        out = tmp_path / "data" / split
        instantiate(cfg.recipe, _partial_=True, _convert_="all")(out=str(out), workers=1)
        manifests.append(str(out))
    augment = {"crop_scale": None, "flip": 0.0, "rand_augment": None, "saturation": None}
    data = ForgeryData(
        manifests, methods=None, image_size=24, batch_size=4, workers=0, augment=augment, balance="batch"
    )
    batch = next(iter(data.train_dataloader()))
    assert batch["label"].tolist() == [0, 0, 1, 1]
    assert np.bincount(data.val_rows.labels).tolist() == [2, 2]


# --- a run ------------------------------------------------------------------------------------------------------------

SMALL = (
    "model.image_size=128", "model.generator={dim: 32, depth: 1, heads: 2}", "trainer.precision=32-true",
    "model.branch={dim: 32, depth: 2, heads: 2}", "data.batch_size=8",
    "model.generator.pixel_decoder={dim: 16, depth: 1, heads: 2}",
)  # fmt: skip


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of an untrained pre-training task of `experiment=demo_rffr_pretrain`."""
    folder = tmp_path_factory.mktemp("generator") / "export"
    with initialize_config_module("fsvfm.configs", version_base="1.3"):
        sizes = ["model.image_size=128", "model.dim=32", "model.depth=1", "model.heads=2"]
        sizes += ["model.pixel_decoder={dim: 16, depth: 1, heads: 2}", "model.representation_decoder.heads=2"]
        cfg = compose("train", ["experiment=demo_rffr_pretrain", *sizes, "paths.run=/run", "name=test"])
    values: Any = OmegaConf.to_container(cfg.task, resolve=True)
    del values["_target_"]
    torch.manual_seed(3)
    task = PretrainTask(**values, mean=[0.0] * 3, std=[1.0] * 3)
    state = {f"{net}.{k}": v for net in ("online", "target") for k, v in getattr(task, net).state_dict().items()}
    meta = {
        "kind": "pretrain", "task": "pretrain", "model": values["model"], "mean": [0.0] * 3, "std": [1.0] * 3,
        "provenance": {"hyper_parameters": {"loss": values["loss"]}},
    }  # fmt: skip
    return save_export(folder, state, meta)


def test_train_evaluate_and_reload(
    compose_config: Compose, prepared_dir: Path, generator: Path, tmp_path: Path
) -> None:
    cfg = compose_config(
        "train", "experiment=demo_rffr", f"paths.data={prepared_dir.parent}", *SMALL, f"model.init={generator}",
        "model.branch_init=null", "trainer.max_epochs=2", "evaluate.replicates=20", "optim.base_lr=0.01",
        "trainer.check_val_every_n_epoch=1",
    )  # fmt: skip
    runner.train(cfg)
    run = tmp_path / "run"

    # The best checkpoint is the one of the highest validation AUC, and it is what was exported.
    aucs = pd.read_csv(run / "metrics.csv")["val/auc"].dropna().tolist()
    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert len(aucs) == 2
    assert best["epoch"] == int(np.argmax(aucs))
    exported = load_checkpoint(run / "export")
    assert exported.meta["model"]["family"] == "rffr"
    for key, tensor in exported.state.items():
        assert torch.equal(tensor, best["state_dict"][f"detector.{key}"]), key

    # The generator has the bytes that it started with; the branches do not.
    source = load_checkpoint(generator).state
    kept = {k.removeprefix("backbone.generator."): v for k, v in exported.state.items() if ".generator." in k}
    assert len(kept) > 20
    assert all(torch.equal(tensor, source[f"online.{key}"]) for key, tensor in kept.items())

    # A reloaded export scores as the task does, and as the run's own test did.
    faces = Manifest.read(prepared_dir).select(split="test", methods=["real", "self_blend"])
    rows = LabelledFaces(faces, plain_transform(128))
    images = torch.stack([torch.as_tensor(rows[i]["image"]) for i in range(len(rows))])
    task = ForgeryTask.load_from_checkpoint(run / "checkpoints" / "best.ckpt", weights_only=True).eval()
    with torch.no_grad():
        expected = task.detector.scores(task.normalise(images)).double()
    found = load_detector_network(str(run / "export")).score(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    table = pd.read_parquet(run / "test" / "predictions.parquet")
    tested = table[table["testset"] == "demo_seen"]["score"]
    np.testing.assert_allclose(tested, expected, rtol=0, atol=1e-5)
    assert len(set(np.round(expected.numpy(), 6))) > 3

    # Pictures of faces, reconstructions and residuals: three columns, a row for each face.
    picture = np.asarray(Image.open(run / "panels" / "residuals.png"))[18:]
    assert picture.shape == (6 * 128, 3 * 128, 3)
    first, grey = picture[:128], picture[:128, 256:]
    assert np.array_equal(first[:16, :128], first[:16, 128:256])  # the border is not reconstructed
    assert np.all(grey[:16] == 127)
    assert (grey[16:-16, 16:-16] != 127).mean() > 0.9


def test_no_generator_is_a_problem_told_at_the_start(compose_config: Compose, prepared_dir: Path) -> None:
    cfg = compose_config("train", "experiment=demo_rffr", f"paths.data={prepared_dir.parent}", "model.init=null")
    with pytest.raises(ConfigError, match=r"rffr.*generator.*rffr_pretrain"):
        build.check(cfg)


def test_no_image_size_but_that_of_the_blocks(compose_config: Compose) -> None:
    model: Any = OmegaConf.to_container(compose_config("train", "model=rffr_tiny").model, resolve=True)
    with pytest.raises(ConfigError, match="not 12"):
        build_detector({**model, "image_size": 192}, {"name": "full"}, ("real", "fake"))
