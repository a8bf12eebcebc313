"""Every shipped configuration composes, has no hidden holes, and builds its task at a small size."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from fsvfm import build, zoo
from fsvfm.annotated import read_comments
from fsvfm.errors import ConfigError
from fsvfm.models.detector import build_detector

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
Compose = Callable[..., DictConfig]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_composes_and_builds_small(
    compose_config: Compose, prepared_dir: Path, antispoof_dir: Path, marked_dir: Path, name: str
) -> None:
    if name.startswith("fas"):
        data_set, batch = ["target=M", f"paths.data={antispoof_dir}", "data.batch_size=2"], 16
    elif "sbi" in name:
        data_set, batch = [f"data.manifests=[{marked_dir}]", "data.batch_size=4"], 4
    else:
        data_set, batch = [f"data.manifests=[{prepared_dir}]", "data.batch_size=4"], 4
        data_set += [] if "pretrain" in name else ["data.methods=null"]
    cfg = compose_config(
        "train",
        f"experiment={name}",
        *data_set,
        "data.workers=0",
        "model=sladd_tiny" if "sladd" in name else "model=vit_tiny",
        "model.image_size=64",
        "model.init=null",
        "trainer.accelerator=cpu",
        "trainer.devices=1",
        "run=[fit]",
    )
    build.check(cfg)
    data = build.build_data(cfg)
    task = build.build_task(cfg, data)
    images = next(iter(data.train_dataloader()))["image"]
    assert images.shape == (batch, 3, 64, 64)
    assert task.hparams["mean"] == pytest.approx(task.mean.flatten().div(255).tolist())
    assert task.parameter_groups()
    build.create(cfg.trainer)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_starts_from_a_checkpoint_of_its_size(compose_config: Compose, name: str) -> None:
    cfg = compose_config("train", f"experiment={name}", *(["target=M"] if name.startswith("fas") else []))
    init = cfg.model.init
    if init is not None and init.startswith("zoo:"):
        entry = zoo.find(init.removeprefix("zoo:"))
        assert (entry.kind, entry.size) == ("pretrain", cfg.model.name)
        assert f"vit{cfg.model.name[4]}" in name
        assert ("fsfm" in name) == (entry.name == "fsfm_vitb")
    for other in (cfg.ckpt or {}).values():
        assert Path(other).parent.name in EXPERIMENTS


@pytest.mark.parametrize(
    "group",
    ["task", "model", "tune", "masking", "augment", "protocol", "optim", "trainer", "logger", "testset", "target"],
)
def test_options_of_a_group_have_the_same_keys(group: str) -> None:
    """Overriding one option by another never leaves a key undefined (tasks and loggers differ by nature)."""
    options: dict[str, Any] = {path.stem: OmegaConf.load(path) for path in (CONFIGS / group).glob("*.yaml")}
    if group == "trainer":  # they extend the default one
        extended = [set(values) for name, values in options.items() if name != "default"]
        assert all(keys <= {"defaults", *options["default"]} for keys in extended)
        options = {"default": options["default"]}
    keys = {name: tuple(sorted(set(map(str, values)) - {"defaults"})) for name, values in options.items()}
    if group == "protocol":  # a protocol may also set how to evaluate
        keys = {name: tuple(set(found) - {"evaluate", "ckpt"}) for name, found in keys.items()}
        inner = {name: sorted(values.protocol) for name, values in options.items()}
        assert all(found == ["name", "published", "task"] for found in inner.values()), inner
    if group == "model":  # alike within a family of networks; the baselines that are plain ViTs extend one of ours
        families = {name: values.family for name, values in options.items() if "defaults" not in values}
        assert len({keys[name] for name, family in families.items() if family == "timm"}) == 1
        keys = {name: found for name, found in keys.items() if families.get(name) == "vit"}
    if group not in ("task", "logger"):
        assert len(set(keys.values())) == 1, keys
    assert options


@pytest.mark.parametrize("kind", ["PretrainData", "ForgeryData", "AntispoofData", "SelfBlendedData"])
def test_data_of_a_kind_have_the_same_keys(kind: str) -> None:
    """`data` and what a data module takes belong together."""
    options = {path.stem: OmegaConf.load(path) for path in (CONFIGS / "data").glob("*.yaml")}
    keys = {name: tuple(sorted(map(str, v))) for name, v in options.items() if v["_target_"].endswith(f".{kind}")}
    assert len(set(keys.values())) == 1, keys


@pytest.mark.parametrize(
    "group", ["data", "testset", "protocol", "experiment", "tune", "model", "augment", "optim", "sweep", "scale"]
)
def test_every_option_says_what_it_is(group: str) -> None:
    for path in sorted((CONFIGS / group).glob("*.yaml")):
        first = next(line for line in path.read_text("utf-8").splitlines() if not line.startswith("# @package"))
        assert first.startswith("# "), path.name


#: Groups whose options set other groups' values: their first lines say where those are from.
_SETTERS = ("experiment", "sweep", "scale")


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_value_has_a_comment(path: Path) -> None:
    """Beside it, above it, or at what it is part of; `_target_` says what it is by itself."""
    found = read_comments(path.read_text("utf-8"))
    assert found.header, "the first lines say what the file is"
    if path.parent.name in _SETTERS:
        return
    for key in found.leaves:
        if key[0] != "defaults" and key[-1] != "_target_":
            assert any(key[:end] in found.by_key for end in range(1, len(key) + 1)), ".".join(key)


# 02 §5: GPUs, batch per GPU, epochs, base lr, layer decay, weight decay, weight of the contrastive loss; and the start.
DEVICES, LAYER_DECAY, CONTRAST = 0, 4, 6
RECIPES: dict[str, tuple[tuple[Any, ...], str, str]] = {
    "dfd_vits": ((2, 32, 10, 2e-4, 0.65, 0.03, 0), "fsvfm_vits", "full"),
    "dfd_vitb": ((2, 32, 10, 2e-4, 0.60, 0.03, 0), "fsvfm_vitb", "full"),
    "dfd_vitl": ((2, 32, 10, 5e-5, 0.90, 0.01, 0), "fsvfm_vitl", "full"),
    "dfd_vitb_fsfm": ((2, 32, 10, 2.5e-4, 0.65, 0.05, 0), "fsfm_vitb", "full"),
    "diff_vits": ((2, 32, 10, 5e-5, 0.95, 0.05, 0), "fsvfm_vits", "full"),
    "diff_vitb": ((2, 32, 10, 5e-5, 0.90, 0.03, 0), "fsvfm_vitb", "full"),
    "diff_vitl": ((2, 32, 10, 5e-5, 0.90, 0.05, 0), "fsvfm_vitl", "full"),
    "diff_vitb_fsfm": ((2, 32, 10, 1e-4, 0.90, 0.03, 0), "fsfm_vitb", "full"),
    "diff_vitb_fsfm_cvpr": ((2, 256, 50, 5e-4, 0.65, 0.05, 0), "fsfm_vitb", "full"),
    "dfd_vits_adapter": ((2, 256, 60, 1e-3, None, 0, 0.01), "fsvfm_vits", "adapter"),
    "dfd_vitb_adapter": ((2, 128, 50, 5e-3, None, 0, 0.01), "fsvfm_vitb", "adapter"),
    "dfd_vitl_adapter": ((2, 128, 50, 1e-2, None, 0, 0.1), "fsvfm_vitl", "adapter"),
    "diff_vits_adapter": ((2, 128, 60, 1e-2, None, 0, 0.01), "fsvfm_vits", "adapter"),
    "diff_vitb_adapter": ((2, 128, 50, 1e-2, None, 0, 0.05), "fsvfm_vitb", "adapter"),
    "diff_vitl_adapter": ((2, 512, 50, 5e-3, None, 0, 0.1), "fsvfm_vitl", "adapter"),
}
VALUES = (
    "trainer.devices", "data.batch_size", "trainer.max_epochs", "optim.base_lr", "optim.layer_decay",
    "optim.weight_decay", "tune.contrast_weight",
)  # fmt: skip


def test_every_detector_experiment_is_in_the_table() -> None:
    baselines = {"dfd_baseline", "dfd_xception", "dfd_efficientnet_b4"}
    assert set(RECIPES) | baselines == {name for name in EXPERIMENTS if name.startswith(("dfd", "diff"))}
    assert set(ANTISPOOF) == {name for name in EXPERIMENTS if name.startswith("fas")}


@pytest.mark.parametrize("name", RECIPES)
def test_forgery_recipes_have_the_papers_values(compose_config: Compose, name: str) -> None:
    values, init, tune = RECIPES[name]
    cfg = compose_config("train", f"experiment={name}")
    assert {key: OmegaConf.select(cfg, key) for key in VALUES} == dict(zip(VALUES, values, strict=True))
    assert (cfg.model.init, cfg.tune.name) == (f"zoo:{init}", tune)
    assert cfg.tune.drop_path == 0.1
    assert (cfg.tune.contrast_temperature, cfg.tune.contrast_base_temperature) == (0.07, 0.07)
    assert (cfg.optim.warmup_epochs, cfg.optim.min_lr, list(cfg.optim.betas)) == (5, 1e-6, [0.9, 0.999])
    assert (cfg.optim.optimizer, cfg.optim.schedule, cfg.optim.scale_lr) == ("adamw", "warmup_cosine", True)
    effective = cfg.data.batch_size * cfg.trainer.devices * cfg.trainer.accumulate_grad_batches
    assert effective == cfg.optim.effective_batch
    assert (cfg.trainer.gradient_clip_val, cfg.trainer.precision) == (None, "bf16-mixed")
    assert (cfg.callbacks.best.monitor, cfg.callbacks.best["mode"]) == ("val/loss", "min")
    augment = cfg.augment
    assert (list(augment.crop_scale), augment.flip, augment.random_erasing) == ([0.08, 1.0], 0.5, 0.25)
    assert (augment.mixup, augment.cutmix, augment.mixup_switch, augment.label_smoothing) == (0.8, 1.0, 0.5, 0.1)
    assert augment.rand_augment == "rand-m9-mstd0.5-inc1"
    # The pre-training set's normalisation, which the checkpoint brings, but for the recipe of the CVPR text.
    imagenet = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]) if name.endswith("cvpr") else (None, None)
    assert (cfg.data.mean, cfg.data.std) == imagenet
    testsets = {
        "dfd": ["celebdf_v2", "dfdc", "dfdcp", "wdf"],
        "diff": ["diff_t2i", "diff_i2i", "diff_fs", "diff_fe"],
    }[name.split("_")[0]]
    assert list(cfg.testsets) == testsets
    assert cfg.protocol.task == "forgery"
    assert (cfg.data.name, cfg.data.methods) == (
        ("ffpp_c23", None) if name.startswith("dfd") else ("ffpp_c23_deepfakes", ["Deepfakes"])
    )


# Learning rate, weight decay, weight of the contrastive loss, drop path.
ANTISPOOF = {
    "fas_vits": (2.5e-5, 1e-6, 0, 0), "fas_vitb": (2.5e-5, 1e-6, 0, 0), "fas_vitl": (1e-5, 1e-5, 0, 0),
    "fas_vits_adapter": (5e-2, 1e-6, 0.1, 0.1), "fas_vitb_adapter": (5e-2, 5e-5, 0.1, 0.1),
    "fas_vitl_adapter": (1e-3, 1e-7, 0.2, 0.1),
}  # fmt: skip


@pytest.mark.parametrize("name", ANTISPOOF)
def test_antispoofing_recipes_have_the_papers_values(compose_config: Compose, name: str) -> None:
    cfg = compose_config("train", f"experiment={name}", "target=M")
    found = (cfg.optim.base_lr, cfg.optim.weight_decay, cfg.tune.contrast_weight, cfg.tune.drop_path)
    assert found == ANTISPOOF[name]
    assert (cfg.optim.optimizer, cfg.optim.schedule, cfg.optim.scale_lr) == ("adam", "constant", False)
    assert (cfg.trainer.max_steps, cfg.data.evaluate_every, cfg.data.batch_size) == (4001, 100, 24)
    assert cfg.tune.contrast_temperature == 0.07
    assert (cfg.data.shots, cfg.data.target) == (0, "msu")


@pytest.mark.parametrize("protocol", sorted(path.stem for path in (CONFIGS / "protocol").glob("*.yaml")))
def test_published_numbers_belong_to_test_sets_and_experiments(compose_config: Compose, protocol: str) -> None:
    cfg = compose_config("train", f"protocol={protocol}")
    for row in cfg.protocol.published:
        assert sorted(row) == ["experiment", "level", "mean", "method", "metric", "source", "values"]
        assert row.experiment is None or row.experiment in EXPERIMENTS
        assert set(row["values"]) <= set(cfg.testsets)
        assert all(50 < value < 100 or row.metric == "hter" for value in row["values"].values())
        if len(row["values"]) == len(cfg.testsets):  # a mean is of all test sets, rounded like the values
            assert row.mean == pytest.approx(sum(row["values"].values()) / len(row["values"]), abs=0.0151)
        assert row["values"] or row.mean is not None


def test_published_numbers_of_the_cross_set_table(compose_config: Compose) -> None:
    """02 §7, from the papers' text."""
    rows = compose_config("train", "protocol=dfd_cross").protocol.published
    found = {(row.method, row.level): ([*row["values"].values()], row.mean) for row in rows if row["values"]}
    assert found == {
        ("FSFM ViT-B", "video"): ([91.44, 83.47, 89.71, 86.96], 87.90),
        ("ViT-B, supervised on ImageNet", "video"): ([86.24, 74.48, 82.11, 81.20], 81.01),
        ("MAE ViT-B", "video"): ([79.51, 75.93, 87.10, 80.96], 80.88),
        ("DINO ViT-B", "video"): ([80.47, 76.90, 84.64, 82.06], 81.02),
        ("FS-VFM ViT-L", "video"): ([95.17, 87.75, 93.35], None),
        ("FS-VFM ViT-L", "frame"): ([87.64], None),
    }


def preparations() -> list[tuple[str, str, list[str]]]:
    """(config, command, manifests) of every data set that a config names."""
    found = []
    for path in sorted([*CONFIGS.glob("data/*.yaml"), *CONFIGS.glob("testset/*.yaml")]):
        values = OmegaConf.load(path)
        raw: Any = OmegaConf.to_container(values, resolve=False)
        manifests = raw["manifests"] if "manifests" in raw else [raw["manifest"]]
        found.append((f"{path.parent.name}/{path.stem}", raw["prepare"], manifests))
    return found


@pytest.mark.parametrize(("config", "command", "manifests"), preparations(), ids=[p[0] for p in preparations()])
def test_prepare_line_names_a_recipe_that_fills_the_folder(config: str, command: str, manifests: list[str]) -> None:
    """The command, with a folder put for <…>, composes, and what it writes is what the config reads."""
    lines = []
    for part in command.split(" && "):
        choices = [
            text.strip("<>").split(" | ") if " | " in text else ["/raw"] for text in re.findall(r"<[^<>]*>", part)
        ]
        for choice in product(*choices):
            words = iter(choice)
            lines.append(re.sub(r"<[^<>]*>", lambda _, words=words: next(words), part))
    folders = []
    for line in lines:
        python, flag, module, *overrides = shlex.split(line)
        assert (python, flag, module) == ("python", "-m", "fsvfm.prepare")
        with initialize_config_module("fsvfm.configs", version_base="1.3"):
            cfg = compose("prepare", overrides=[*overrides, "paths.run=/run"])
        folders.append(str(cfg.out))
        missing = OmegaConf.missing_keys(cfg)
        assert not missing, missing
    data = str(cfg.paths.data)
    assert sorted(folders) == sorted(manifest.replace("${paths.data}", data) for manifest in manifests)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        # 01 §5: micro-batch · accumulation · GPUs = 4096, lr 2.4e-3.
        ("pretrain_vits", {"data.batch_size": 512, "trainer.accumulate_grad_batches": 2, "trainer.max_epochs": 600}),
        ("pretrain_vitb", {"data.batch_size": 256, "trainer.accumulate_grad_batches": 4, "trainer.max_epochs": 600}),
        ("pretrain_vitl", {"data.batch_size": 256, "trainer.accumulate_grad_batches": 4, "trainer.max_epochs": 600}),
        ("pretrain_vitb_400e", {"data.batch_size": 256, "trainer.max_epochs": 400}),
    ],
)
def test_pretraining_recipes_have_the_papers_values(
    compose_config: Compose, name: str, values: dict[str, object]
) -> None:
    cfg = compose_config("train", f"experiment={name}")
    for key, expected in values.items():
        assert OmegaConf.select(cfg, key) == expected, key
    effective = cfg.data.batch_size * cfg.trainer.devices * cfg.trainer.accumulate_grad_batches
    assert effective == cfg.optim.effective_batch == 4096
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


SWEEPS = sorted(
    path.stem for path in (CONFIGS / "sweep").glob("*.yaml") if path.stem not in ("base", "pretraining", "detection")
)


@pytest.mark.parametrize("name", SWEEPS)
def test_sweep_composes_in_full_and_at_demo_scale(name: str) -> None:
    """Its parameters exist and their values are taken; the reference is what the papers' recipe has."""
    with initialize_config_module("fsvfm.configs", version_base="1.3"):
        full = compose("train", [f"sweep={name}", "paths.run=/run", "name=x"], return_hydra_config=True)
        assert full.hydra.mode.name == "MULTIRUN"
        assert full.ablation.title
        for key, value in (full.ablation.reference or {}).items():
            assert OmegaConf.select(full, key) == value, key
        parser = OverridesParser.create()
        params = parser.parse_overrides([f"{key}={value}" for key, value in full.hydra.sweeper.params.items()])
        assert params
        points = []
        for param in params:
            assert param.is_sweep_override()
            if param.is_discrete_sweep():
                points.append(f"{param.get_key_element()}={list(param.sweep_string_iterator())[-1]}")
        small = compose("train", [f"sweep={name}", "+scale=demo", *points, "paths.run=/run", "name=x"])
    assert (small.trainer.accelerator, small.trainer.devices, small.protocol.name) == ("cpu", 1, "demo")
    assert small.data.name in ("demo_faces", "demo_forgeries")
    assert small.model.name == ("vit_large" if name == "model_scale" else "vit_tiny")
    if "finetune" in full.run:
        assert OmegaConf.select(full, "finetune.experiment") == "dfd_vitb"
        assert full.trainer.devices * 16 == 64, "the detector's effective batch"
        assert list(full.run) == ["fit", "finetune", "evaluate"]


@pytest.mark.parametrize(("large", "demo"), [("pretrain_vitb", "demo_pretrain"), ("dfd_vitb", "demo_dfd")])
def test_demo_scale_is_the_demo(compose_config: Compose, large: str, demo: str) -> None:
    """Written once more in the scale, for every experiment; the same values but for the detector's shorter training."""
    free = ["finetune", "protocol", "testsets", "ckpt", *(["augment"] if "pretrain" in demo else [])]
    small, same = (
        {k: v for k, v in OmegaConf.to_container(cfg, resolve=True).items() if k not in free}  # type: ignore[union-attr]
        for cfg in (
            compose_config("train", f"experiment={large}", "+scale=demo"),
            compose_config("train", f"experiment={demo}"),
        )
    )
    if demo == "demo_dfd":
        assert small["trainer"].pop("max_epochs") < same["trainer"].pop("max_epochs")
    assert small == same


BASELINES = [
    "vit_base_imagenet", "vit_base_mae", "vit_base_dino", "vit_base_dinov2", "vit_base_dinov3", "vit_base_clip",
    "xception", "efficientnet_b4",
]  # fmt: skip


@pytest.mark.parametrize("name", BASELINES)
def test_a_baselines_network_is_the_one_of_its_weights(compose_config: Compose, name: str) -> None:
    model = compose_config("train", "experiment=dfd_baseline", f"model={name}").model
    weights = str(model.init).removeprefix("timm:")
    facts = timm.get_pretrained_cfg(weights)
    assert (model.name, facts.architecture) == (name, weights.split(".")[0])
    assert facts.tag == weights.split(".")[1]
    if model.family == "timm":
        assert model.architecture == facts.architecture
        with torch.device("meta"):
            build_detector(OmegaConf.to_container(model), {"name": "adapter", "reduction": 4}, ["real", "fake"])
    else:
        assert (model.dim, model.depth, model.heads) == (768, 12, 12)


def test_weights_that_nobody_can_fetch_are_asked_for(compose_config: Compose) -> None:
    cfg = compose_config("train", "experiment=dfd_baseline", "model=vit_base_farl", "trainer.accelerator=cpu")
    with pytest.raises(ConfigError, match=r"model\.init has no value(.|\n)*FaRL"):
        build.check(cfg)


def test_mae_and_simsiam_are_our_losses_in_part(compose_config: Compose) -> None:
    for name, loss, strategy in (("mae", (1, 0, 0), "random"), ("simsiam", (0, 0, 1), "crfr_p")):
        cfg = compose_config("train", f"experiment=pretrain_vitb_{name}")
        assert (cfg.task.loss.reconstruction, cfg.task.loss.region, cfg.task.loss.similarity) == loss
        assert (cfg.masking.strategy, cfg.task.loss.kind, cfg.data.name) == (strategy, "simsiam", "vggface2")
