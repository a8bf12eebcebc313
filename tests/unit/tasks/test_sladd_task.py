"""SLADD: losses by hand, the policy's gradient on toy problems, forging a batch, and training."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from drawn_faces import face_points, picture
from fsvfm import build, runner
from fsvfm.checkpoint import Checkpoint, load_checkpoint
from fsvfm.data.datasets import collate
from fsvfm.data.manifest import Manifest
from fsvfm.data.pairs import PairData, Pairs
from fsvfm.errors import CheckpointError, ConfigError
from fsvfm.faces.images import save_png
from fsvfm.faces.synthesis import BLENDINGS, REGIONS
from fsvfm.loaded_detector import load_detector_network
from fsvfm.models.sladd import KINDS, Actions, Backbone, Choices, Policy, choose
from fsvfm.models.sladd import build as build_parts
from fsvfm.tasks.sladd import Forged, SladdTask, am_softmax, policy_loss, with_mirror_images

Compose = Callable[..., DictConfig]
MODEL = {
    "name": "tiny",
    "family": "sladd",
    "image_size": 64,
    "architecture": "test_resnet",
    "mode": "paper",
    "scale": 30.0,
}
TUNE = {"name": "full", "contrast_weight": 0}


def make_task(**changes: Any) -> SladdTask:
    torch.manual_seed(0)
    values: dict[str, Any] = {
        "model": {**MODEL, **changes.pop("model", {})}, "tune": TUNE,
        "loss": {"margin": 0.45, "map": 0.1, "kind": 0.05, "ratio": 0.1},
        "policy": {"lr": 5e-5, "entropy": 1e-5}, "deform": 10.0,
        "optim": {"optimizer": "adam", "schedule": "constant", "base_lr": 2e-4, "weight_decay": 5e-4},
        "mean": [0.5] * 3, "std": [0.5] * 3,
    }  # fmt: skip
    return SladdTask(**{**values, **changes})


@pytest.fixture(scope="module")
def pairs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated faces of 64 px with landmarks, real and fake, two thirds of them for training."""
    folder = tmp_path_factory.mktemp("pairs") / "demo"
    rows = []
    for person in range(12):
        split = "train" if person < 8 else "val" if person < 10 else "test"
        for label, method in ((0, "real"), (1, "self_blend"), (1, "face_swap")):
            name, image = f"p{person}_{method}", picture(person, 64)
            if label:
                image[16:48, 16:48, 2] = 255
            save_png(folder / f"images/{name}.png", image)
            rows.append(
                {
                    "path": f"images/{name}.png", "label": label, "split": split, "dataset": "generated",
                    "method": method, "video": name, "subject": f"p{person}", "frame": 0,
                    "landmarks": face_points(64).ravel(), "mask": "",
                }
            )  # fmt: skip
    save_png(folder / "masks/p0.png", np.repeat(255 * np.eye(64, dtype=np.uint8)[..., None], 3, axis=2))
    rows[1]["mask"] = "masks/p0.png"
    Manifest(pd.DataFrame(rows), folder).write()
    return folder


def batch_of(folder: Path, rows: list[int]) -> dict[str, Any]:
    data = Pairs(Manifest.read(folder).select(split="train"), 64)
    return collate([data[row] for row in rows])


def acting(blendings: list[str], *, region: int = 9, ratio: float = 0.5) -> Actions:
    """Chosen actions without a policy."""
    count = len(blendings)
    blending = torch.tensor([BLENDINGS.index(name) for name in blendings])
    zero = torch.zeros(count)
    return Actions(torch.full((count,), region), blending, torch.full((count,), ratio), zero, zero, zero, zero)


# --- losses -----------------------------------------------------------------------------------------------------------


def test_am_softmax_against_a_calculation_by_hand() -> None:
    cosines = torch.tensor([[0.8, 0.3], [0.2, -0.5]])
    found = am_softmax(cosines, torch.tensor([0, 1]), margin=0.45, scale=30.0)
    # log(1 + exp(30 (0.3 - (0.8 - 0.45)))) and log(1 + exp(30 (0.2 - (-0.5 - 0.45))))
    expected = [math.log1p(math.exp(30 * (0.3 - 0.35))), math.log1p(math.exp(30 * (0.2 + 0.95)))]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    assert torch.allclose(
        am_softmax(cosines, torch.tensor([1, 0]), 0.0, 1.0),
        torch.nn.functional.cross_entropy(cosines, torch.tensor([1, 0]), reduction="none"),
    )


def test_modes_put_cosines_or_raw_outputs_into_the_softmax() -> None:
    heads = {mode: build_parts({**MODEL, "mode": mode}, TUNE)[1].eval() for mode in ("paper", "reference")}
    feature = torch.randn(5, heads["paper"].ratio.in_features)
    cosine, raw = (heads[mode].margins(feature) for mode in ("paper", "reference"))
    assert cosine.abs().max() <= 1
    assert torch.allclose(cosine, heads["paper"].margins(7 * feature), atol=1e-6)  # length does not matter
    assert torch.allclose(heads["reference"].margins(7 * feature) - 7 * raw, -6 * heads["reference"].fc.bias, atol=1e-5)
    logits = {mode: head(feature, None).logits for mode, head in heads.items()}  # type: ignore[arg-type]
    assert torch.allclose(logits["paper"], 30 * cosine)
    assert torch.equal(logits["reference"], raw)
    with pytest.raises(ConfigError, match=r"model\.mode='other'"):
        build_parts({**MODEL, "mode": "other"}, TUNE)


def test_map_is_16_by_16_and_each_loss_counts_where_it_applies() -> None:
    task = make_task(model={"image_size": 256}).eval()
    images = torch.randint(0, 256, (4, 3, 256, 256), dtype=torch.uint8)
    _, maps = task.detector.features(task.normalise(images))
    assert task.head.map(maps.middle).shape == (4, 1, 16, 16)
    kinds = ["mixup", "alpha", "real", "data set"]
    map_ = torch.zeros(4, 256, 256)
    map_[:2, :16, :32] = 1  # two cells
    truth = Forged(
        images, torch.tensor([1, 1, 0, 1]), torch.tensor([KINDS.index(kind) for kind in kinds]),
        torch.tensor([0.7, 0, 0, 0]), map_, torch.tensor([1.0, 1, 1, 0]),
    )  # fmt: skip
    losses = task.losses(truth)
    feature, maps = task.detector.features(task.normalise(images))
    found = task.head.map(maps.middle).squeeze(1)
    wanted = torch.zeros(4, 16, 16)
    wanted[:2, 0, :2] = 1
    expected = ((found - wanted) ** 2).mean((1, 2))
    assert torch.allclose(losses.map[:3], expected[:3], rtol=1e-5)
    assert losses.map[3] == 0  # the data set does not say where it is forged
    assert losses.ratio[0].item() == pytest.approx((task.head.ratio(feature)[0, 0].item() - 0.7) ** 2, rel=1e-4)
    assert losses.ratio[1:].eq(0).all()
    assert losses.kind.shape == losses.classification.shape == (4,)


def test_mirror_images_keep_their_truth() -> None:
    truth = Forged(
        torch.arange(2 * 3 * 4 * 4).view(2, 3, 4, 4), torch.tensor([0, 1]), torch.tensor([3, 4]),
        torch.tensor([0.0, 0.5]), torch.arange(32.0).view(2, 4, 4), torch.tensor([1.0, 0.0]),
    )  # fmt: skip
    both = with_mirror_images(truth)
    assert torch.equal(both.image[2:], truth.image.flip(-1))
    assert torch.equal(both.map[2:], truth.map.flip(-1))
    assert both.label.tolist() == [0, 1, 0, 1]
    assert both.ratio.tolist() == [0.0, 0.5, 0.0, 0.5]


# --- policy -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["paper", "reference"])
def test_policy_prefers_what_the_detector_is_weak_on(mode: str) -> None:
    """A detector that loses on one blending and one region: their probabilities rise, those of the others fall."""
    torch.manual_seed(0)
    region, blending, ratio = (torch.zeros(n, requires_grad=True) for n in (10, 4, 1))
    optimiser = torch.optim.Adam([region, blending, ratio], lr=0.05)
    generator = torch.Generator().manual_seed(0)
    size = 32 if mode == "paper" else 2  # the batch's mean reward says less, the larger the batch
    for _ in range(150 if mode == "paper" else 600):
        actions = choose(
            Choices(region.expand(size, -1), blending.expand(size, -1), ratio.expand(size)), mode, generator
        )
        kind = torch.where(actions.blending == 3, KINDS.index("real"), actions.blending)
        losses = 1.0 * (actions.blending == 1) + 1.0 * ((actions.region == 6) & (actions.blending != 3))
        optimiser.zero_grad()
        policy_loss(actions, losses, torch.ones(size, dtype=torch.bool), kind, mode).backward()
        optimiser.step()
    assert blending.softmax(0).argmax() == 1
    assert blending.softmax(0)[1] > 0.5
    assert region.softmax(0).argmax() == 6
    assert region.softmax(0)[6] > 0.3


@pytest.mark.parametrize(("harder", "sign"), [("low", -1), ("high", 1)])
def test_ratio_moves_to_where_the_detector_is_weak(harder: str, sign: int) -> None:
    torch.manual_seed(0)
    ratio = torch.zeros(1, requires_grad=True)
    optimiser = torch.optim.Adam([ratio], lr=0.05)
    generator = torch.Generator().manual_seed(1)
    for _ in range(100):
        choices = Choices(torch.zeros(32, 10), torch.tensor([-50.0, -50, 50, -50]).expand(32, -1), ratio.expand(32))
        actions = choose(choices, "paper", generator)
        losses = actions.ratio if harder == "high" else 1 - actions.ratio
        optimiser.zero_grad()
        policy_loss(actions, losses, torch.ones(32, dtype=torch.bool), actions.blending, "paper").backward()
        optimiser.step()
    assert sign * ratio.item() > 1


def test_policy_learns_from_real_faces_and_effective_choices_only() -> None:
    logs = [torch.zeros(4, requires_grad=True) for _ in range(3)]
    actions = Actions(torch.zeros(4).long(), torch.tensor([0, 2, 3, 2]), torch.zeros(4), *logs, torch.zeros(4))
    kind = torch.tensor([0, 2, KINDS.index("real"), KINDS.index("data set")])
    policy_loss(actions, torch.tensor([4.0, 1.0, 1.0, 9.0]), kind != 4, kind, "paper").backward()
    region, blending, ratio = ([*torch.round(log.grad * 3).tolist()] for log in logs)  # type: ignore[operator]
    assert blending == [-2, 1, 1, 0]  # minus the advantage over the real faces' mean loss, 2; the data set's fake: 0
    assert region == [-2, 1, 0, 0]  # nothing was pasted on the third
    assert ratio == [0, 1, 0, 0]  # only the second was mixed


def test_choices_follow_the_probabilities_and_the_generator() -> None:
    count = 4000
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5])
    choices = Choices(torch.zeros(count, 10), logits.expand(count, -1), torch.zeros(count))
    draw = [choose(choices, "paper", torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draw[0].ratio, draw[1].ratio)
    assert torch.equal(draw[0].region, draw[1].region)
    assert not torch.equal(draw[0].region, draw[2].region)
    shares = torch.bincount(draw[0].blending, minlength=4) / count
    assert torch.allclose(shares, logits.softmax(0), atol=0.03)
    assert torch.allclose(draw[0].log_blending, logits.log_softmax(0)[draw[0].blending])
    uniform = math.log(10) - (logits.softmax(0) * logits.log_softmax(0)).sum().item()
    assert draw[0].entropy[0].item() == pytest.approx(uniform, rel=1e-5)
    assert choose(choices, "reference").ratio.tolist() == [0.5] * count  # as published: no noise


# --- forging ----------------------------------------------------------------------------------------------------------


def test_only_real_faces_are_forged_and_none_leaves_them(pairs_dir: Path) -> None:
    task = make_task()
    batch = batch_of(pairs_dir, [0, 3, 6, 9, 1, 4])
    assert batch["label"].tolist() == [0, 0, 0, 0, 1, 1]
    made = task.forge(batch, acting(["alpha", "poisson", "mixup", "none", "alpha", "mixup"]), seed=3)
    assert made.label.tolist() == [1, 1, 1, 0, 1, 1]
    assert [KINDS[kind] for kind in made.kind] == ["alpha", "poisson", "mixup", "real", "data set", "data set"]
    assert made.ratio.tolist() == [0, 0, 0.5, 0, 0, 0]
    for row in (3, 4, 5):
        assert torch.equal(made.image[row], batch["image"][row])
    for row in (0, 1, 2):
        changed = (made.image[row] != batch["image"][row]).any(0)
        assert changed.any()
        assert not changed[made.map[row] == 0].any()
    assert made.known.tolist() == [1, 1, 1, 1, 1, 0]  # of the data set's fakes only the first has a mask …
    assert torch.equal(made.map[4], torch.eye(64))  # … this one
    assert made.map[3].eq(0).all()
    again = task.forge(batch, acting(["alpha", "poisson", "mixup", "none", "alpha", "mixup"]), seed=3)
    assert torch.equal(again.image, made.image)
    batch["landmarks"][0] = float("nan")  # no face was found
    assert task.forge(batch, acting(["alpha"] * 6), seed=3).label[0] == 0


def test_references_are_of_the_other_class_and_landmarks_follow_the_size(pairs_dir: Path) -> None:
    rows = Pairs(Manifest.read(pairs_dir).select(split="train"), 32)
    for row in (0, 1):
        sample = rows[row]
        is_blue = (sample["reference"][2, 10:22, 10:22] > 240).all().item()  # the fakes' middle
        assert is_blue == (sample["label"] == 0)
        assert torch.allclose(sample["landmarks"], torch.from_numpy((face_points(64) + 0.5) / 2 - 0.5), atol=1e-4)
    assert rows[0]["map_known"] == rows[1]["map_known"] == 1
    assert rows[2]["map_known"] == 0


def test_landmarks_are_found_where_the_manifest_has_none(media_dir: Path, tmp_path: Path) -> None:
    photo = sorted((media_dir / "photos").glob("*.jpg"))[0]
    shutil.copy(photo, tmp_path / "face.jpg")
    save_png(tmp_path / "blank.png", np.full((64, 64, 3), 90, np.uint8))
    keys = ("path", "label", "split", "dataset", "method", "video", "subject", "frame")
    rows = [("face.jpg", 0, "train", "d", "real", "a", "", 0), ("blank.png", 1, "train", "d", "f", "b", "", 0)]
    data = Pairs(Manifest(pd.DataFrame(rows, columns=keys), tmp_path), 128)
    sample = data[0]
    points = sample["landmarks"]
    assert ((points > -20) & (points < 148)).all()
    assert points[36:48, 1].mean() < points[48:68, 1].mean()  # eyes above the mouth
    assert sample["reference_landmarks"].isnan().all()


def test_frames_are_limited_so_that_classes_balance(tmp_path: Path) -> None:
    rows = []
    for split in ("train", "val"):
        for video, method in (("r", "real"), ("a", "A"), ("b", "B")):
            for frame in range(9):
                name = f"{split}_{video}_{frame}.png"
                rows.append((name, int(method != "real"), split, "d", method, f"{split}{video}", "", frame))
    keys = ("path", "label", "split", "dataset", "method", "video", "subject", "frame")
    Manifest(pd.DataFrame(rows, columns=keys), tmp_path).write()
    data = PairData(
        [str(tmp_path)], methods=None, image_size=64, batch_size=4, frames={"train": 5, "val": 2}, workers=0
    )
    counts = data.train.table.groupby("method").size().to_dict()
    assert counts == {"real": 5, "A": 3, "B": 3}
    assert data.train.table.query("method == 'real'")["frame"].tolist() == [0, 2, 4, 6, 8]
    assert data.val.table.groupby("method").size().to_dict() == {"real": 2, "A": 1, "B": 1}


# --- networks and training --------------------------------------------------------------------------------------------


def test_networks_are_the_papers() -> None:
    with torch.device("meta"):
        backbone, head = build_parts({**MODEL, "architecture": "legacy_xception"}, TUNE)
        policy = Policy("legacy_xception")
        maps = backbone.forward_features(torch.zeros(1, 3, 256, 256))
        assert maps.middle.shape == (1, 728, 16, 16)
        assert head.map(maps.middle).shape == (1, 1, 16, 16)
        assert backbone.forward_head(maps).shape == (1, 2048)
        choices = policy(torch.zeros(2, 3, 256, 256), torch.zeros(2, 3, 256, 256))
    assert (choices.region.shape, choices.blending.shape, choices.ratio.shape) == ((2, 10), (2, 4), (2,))
    assert (len(REGIONS), len(KINDS)) == (10, 5)
    assert [layer.p for layer in policy.modules() if isinstance(layer, torch.nn.Dropout)] == [0.5] * 3
    for arch, words in (("nothing", "no network of timm"), ("vit_tiny_patch16_224", "strides")):
        with pytest.raises(ConfigError, match=words):
            Backbone(arch)


@pytest.mark.parametrize("mode", ["paper", "reference"])
def test_every_parameter_gets_a_gradient_and_no_gradient_crosses(pairs_dir: Path, mode: str) -> None:
    """What DistributedDataParallel needs, and what makes one optimiser do for two networks."""
    task = make_task(model={"mode": mode})
    batch = batch_of(pairs_dir, list(range(6)))
    actions = task.choose(batch, torch.Generator().manual_seed(0))
    truth = task.forge(batch, actions, 0)
    losses = task.losses(truth)
    sum(part.sum() for part in losses).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None for p in task.detector.parameters())
    assert all(p.grad is None for p in task.policy.parameters())
    rewards = losses.classification.detach()
    policy_loss(actions, rewards, batch["label"] == 0, truth.kind, mode).backward()
    assert all(p.grad is not None for p in task.policy.parameters())


def test_groups_have_a_rate_each_and_decay_everything() -> None:
    groups = make_task().parameter_groups()
    assert [(g["name"], g["lr_scale"], g["weight_decay"]) for g in groups] == [
        ("detector", 1.0, 5e-4), ("policy", 0.25, 5e-4)
    ]  # fmt: skip


def test_both_networks_start_from_the_same_weights() -> None:
    source = Backbone("test_resnet")
    state = {f"encoder.{key}": value for key, value in source.body.state_dict().items()}
    task = make_task()
    task.initialise(Checkpoint("encoder", state, {"model": {}}, "weights"))
    for name, value in source.body.state_dict().items():
        assert torch.equal(task.detector.backbone.body.state_dict()[name], value)
        own = task.policy.backbone.body.state_dict()[name]
        assert torch.equal(own, value) == (own.shape == value.shape), name
    with pytest.raises(CheckpointError, match="does not fit"):
        task.initialise(Checkpoint("encoder", {"encoder.other": torch.zeros(1)}, {"model": {}}, "weights"))


def test_another_familys_network_is_refused() -> None:
    with pytest.raises(ConfigError, match="use model=sladd"):
        make_task(model={"family": "vit"})
    with pytest.raises(ConfigError, match="tune=adapter"):
        make_task(tune={"name": "adapter", "contrast_weight": 0})


def small(compose_config: Compose, pairs_dir: Path, *overrides: str) -> DictConfig:
    return compose_config(
        "train", "experiment=demo_sladd", f"paths.data={pairs_dir.parent}", "run=[fit]", "model.image_size=64",
        "model.architecture=test_resnet", "data.batch_size=6", "trainer.max_epochs=2", "trainer.log_every_n_steps=1",
        "trainer.precision=32-true",
        *overrides,
    )  # fmt: skip


def test_a_run_resumes_bit_for_bit_and_exports_the_detector_alone(
    compose_config: Compose, pairs_dir: Path, tmp_path: Path
) -> None:
    states = []
    for name, epochs in (("whole", [2]), ("halves", [1, 2])):
        for last in epochs:
            cfg = small(compose_config, pairs_dir, f"trainer.max_epochs={last}")
            cfg.paths.run = str(tmp_path / name)
            runner.fit(cfg, build.run_folder(cfg))
        states.append(torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"])
    assert states[0].keys() == states[1].keys()
    assert [key for key in states[0] if not torch.equal(states[0][key], states[1][key])] == []
    assert any(key.startswith("policy.") for key in states[0])
    table = pd.read_csv(tmp_path / "whole" / "metrics.csv")
    wanted = {"train/loss_policy", "train/policy_entropy", "train/forged", "train/loss_map", "val/auc", "val/loss"}
    assert wanted <= set(table.columns)
    assert (tmp_path / "whole" / "panels" / "epoch_0002.png").is_file()
    exported = load_checkpoint(tmp_path / "whole" / "export")
    assert all(key.startswith(("backbone.", "head.")) for key in exported.state)
    meta = json.loads((tmp_path / "whole" / "export" / "model.json").read_text())
    assert (meta["model"]["family"], meta["class_order"]) == ("sladd", ["real", "fake"])
    scores = load_detector_network(str(tmp_path / "whole" / "export")).score(
        torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    )
    assert ((scores > 0) & (scores < 1)).all()


def test_a_step_that_is_not_finite_changes_neither_network(compose_config: Compose, pairs_dir: Path) -> None:
    cfg = small(compose_config, pairs_dir, "trainer.max_epochs=1", "optim.base_lr=0.01", "~callbacks", "+callbacks={}")
    task = build.build_task(cfg, build.build_data(cfg))
    task.head.ratio.bias.data.fill_(float("inf"))
    before = {name: value.clone() for name, value in task.named_parameters()}
    trainer = build.create(cfg.trainer, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(task, datamodule=build.build_data(cfg))
    assert trainer.global_step > 0
    assert all(torch.equal(value, before[name]) for name, value in task.named_parameters())


def test_experiment_has_the_papers_values(compose_config: Compose) -> None:
    cfg = compose_config("train", "experiment=sladd")
    expected = {
        "model.architecture": "legacy_xception", "model.image_size": 256, "model.scale": 30, "model.mode": "paper",
        "task.loss": {"margin": 0.45, "map": 0.1, "kind": 0.05, "ratio": 0.1}, "task.deform": 10,
        "task.policy": {"lr": 5e-5, "entropy": 1e-5}, "optim.optimizer": "adam", "optim.base_lr": 2e-4,
        "optim.weight_decay": 5e-4, "optim.schedule": "constant", "optim.scale_lr": False, "optim.betas": [0.9, 0.999],
        "data.batch_size": 32, "data.frames": {"train": 270, "val": 100}, "data.mean": [0.5] * 3, "data.std": [0.5] * 3,
        "trainer.max_epochs": 30, "trainer.gradient_clip_val": None, "callbacks.best.monitor": "val/auc",
        "callbacks.best.mode": "max",
    }  # fmt: skip
    assert {key: OmegaConf.select(cfg, key) for key in expected} == expected
