"""Every shipped configuration composes, has no hidden holes, and builds its task at a small size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from fsvfm import build
from fsvfm.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
Compose = Callable[..., DictConfig]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_composes_and_builds_small(compose_config: Compose, prepared_dir: Path, name: str) -> None:
    cfg = compose_config(
        "train",
        f"experiment={name}",
        f"data.manifests=[{prepared_dir}]",
        "data.batch_size=4",
        "data.workers=0",
        "model=vit_tiny",
        "model.image_size=64",
        "model.init=null",
        "trainer.accelerator=cpu",
        "trainer.devices=1",
        "run=[fit]",
    )
    build.check(cfg)
    data = build.build_data(cfg)
    task = build.build_task(cfg, data)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (4, 3, 64, 64)
    assert task.hparams["mean"] == pytest.approx(task.mean.flatten().div(255).tolist())
    build.create(cfg.trainer)


@pytest.mark.parametrize(
    "group", ["task", "model", "tune", "masking", "augment", "protocol", "optim", "trainer", "logger"]
)
def test_options_of_a_group_have_the_same_keys(group: str) -> None:
    """Overriding one option by another never leaves a key undefined (tasks and loggers differ by nature)."""
    options = {path.stem: OmegaConf.load(path) for path in (CONFIGS / group).glob("*.yaml")}
    keys = {name: tuple(sorted(set(map(str, values)) - {"defaults"})) for name, values in options.items()}
    if group not in ("task", "logger"):
        assert len(set(keys.values())) == 1, keys
    assert options


@pytest.mark.parametrize(
    ("name", "values"),
    [
        # 01 §5: micro-batch · accumulation · GPUs = 4096, lr 2.4e-3.
        ("pretrain_vits", {"data.batch_size": 512, "trainer.accumulate_grad_batches": 2, "trainer.max_epochs": 600}),
        ("pretrain_vitb", {"data.batch_size": 256, "trainer.accumulate_grad_batches": 4, "trainer.max_epochs": 600}),
        ("pretrain_vitl", {"data.batch_size": 256, "trainer.accumulate_grad_batches": 4, "trainer.max_epochs": 600}),
        ("pretrain_vitb_400e", {"data.batch_size": 256, "trainer.max_epochs": 400}),
        (
            "dfd_vitb",
            {"optim.base_lr": 2e-4, "optim.layer_decay": 0.6, "optim.weight_decay": 0.03, "data.batch_size": 32},
        ),
    ],
)
def test_recipes_have_the_papers_values(compose_config: Compose, name: str, values: dict[str, object]) -> None:
    cfg = compose_config("train", f"experiment={name}")
    for key, expected in values.items():
        assert OmegaConf.select(cfg, key) == expected, key
    effective = cfg.data.batch_size * cfg.trainer.devices * cfg.trainer.accumulate_grad_batches
    assert effective == cfg.optim.effective_batch
    if name.startswith("pretrain"):
        assert (cfg.optim.base_lr, cfg.optim.weight_decay, cfg.optim.warmup_epochs) == (1.5e-4, 0.05, 40)
        assert list(cfg.optim.betas) == [0.9, 0.95]
        assert (cfg.masking.strategy, cfg.masking.ratio, cfg.trainer.gradient_clip_val) == ("crfr_p", 0.75, 1.0)
        assert (cfg.task.loss.region, cfg.task.loss.similarity, cfg.task.loss.kind) == (0.007, 0.1, "simsiam")
        assert (cfg.callbacks.ema.base, cfg.callbacks.ema.final) == (0.996, 1.0)


def test_all_problems_are_told_together(compose_config: Compose, tmp_path: Path) -> None:
    cfg = compose_config(
        "train", "experiment=dfd_vitb", f"paths.data={tmp_path}", "model.image_size=220", "optim.base_lr=0",
        "trainer.precision=16-mixed", "model.init=nowhere.pth",
    )  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        build.check(cfg)
    message = str(caught.value)
    for part in ("220", "optim.base_lr", "16-mixed", "nowhere.pth", "ffpp_c23", "celebdf_v2", "fsvfm.prepare", "GPU"):
        assert part in message, part


def test_a_run_folder_is_not_mixed_with_another_configuration(compose_config: Compose, prepared_dir: Path) -> None:
    base = ("experiment=demo_pretrain", f"paths.data={prepared_dir.parent}")
    build.settle_folder(compose_config("train", *base))
    build.settle_folder(compose_config("train", *base, "data.workers=2", "logger=tensorboard"))
    with pytest.raises(ConfigError, match=r"masking\.ratio: 0\.75 → 0\.5"):
        build.settle_folder(compose_config("train", *base, "masking.ratio=0.5"))
    with pytest.raises(ConfigError, match=r"model\.dim"):
        build.settle_folder(compose_config("train", *base, "model=vit_small"))
    build.settle_folder(compose_config("train", *base, "masking.ratio=0.5", "resume=never"))
