"""Anti-spoofing: balanced data of several domains, the loss, the optimiser, and which checkpoint counts."""

from __future__ import annotations

import colorsys
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from sklearn.metrics import roc_auc_score

from fsvfm import build
from fsvfm.checkpoint import load_checkpoint
from fsvfm.data.datasets import read_image
from fsvfm.data.manifest import Manifest
from fsvfm.data.transforms import scale_saturation, test_transform, train_transform
from fsvfm.errors import ConfigError, DataError
from fsvfm.tasks.antispoof import AntispoofTask

Compose = Callable[..., DictConfig]
SOURCES = ["casia", "replay", "oulu", "celeb"]
SMALL = (
    "run=[fit]", "model=vit_tiny", "model.init=null", "model.image_size=32", "model.depth=2", "data.batch_size=2",
    "data.workers=0", "data.evaluate_every=4", "data.val_share=0.3", "trainer.max_steps=6", "trainer.accelerator=cpu",
    "trainer.precision=32-true", "trainer.log_every_n_steps=1", "data.mean=[0.5,0.5,0.5]", "data.std=[0.2,0.2,0.2]",
)  # fmt: skip

ALL_VIDEOS = ("task.selection=last", "data.val_share=0")


@pytest.fixture
def small(compose_config: Compose, antispoof_dir: Path) -> Callable[..., DictConfig]:
    """A small configuration: ``small("target=M", "tune=adapter")``."""

    def compose(*overrides: str) -> DictConfig:
        named = [text for text in overrides if text.startswith("experiment=")] or ["experiment=fas_vitb"]
        others = [text for text in overrides if not text.startswith("experiment=")]
        return compose_config("train", *named, *SMALL, f"paths.data={antispoof_dir}", *others)

    return compose


def fit(cfg: DictConfig, *callbacks: pl.Callback, resume: Path | None = None) -> tuple[AntispoofTask, pl.Trainer]:
    data = build.build_data(cfg)
    task = build.build_task(cfg, data)
    trainer = build.build_trainer(cfg)
    trainer.callbacks[:0] = callbacks  # type: ignore[attr-defined]
    trainer.loggers[0].continue_at(torch.load(resume, weights_only=True)["global_step"] if resume else 0)  # type: ignore[attr-defined]
    trainer.fit(task, datamodule=data, ckpt_path=resume, weights_only=True)
    trainer.loggers[0].save()
    return task, trainer  # type: ignore[return-value]


# --- data -------------------------------------------------------------------------------------------------------------


def test_batches_hold_every_class_of_every_source_and_never_the_target(small: Compose) -> None:
    data: Any = build.build_data(small("target=M", "data.batch_size=3", *ALL_VIDEOS))
    assert len(data.train_dataloader()) == 4
    table = data.train.table
    # One frame per video, the first, of every source video of the training split.
    assert set(table["frame"]) == {6}
    assert set(table["split"]) == {"train"}
    counts = Counter(zip(table["dataset"], table["label"], strict=True))
    sizes = {"casia": (5, 5), "replay": (9, 4), "oulu": (4, 4), "celeb": (12, 15)}
    assert counts == {(name, label): sizes[name][label] for name in SOURCES for label in (0, 1)}
    seen: Counter[int] = Counter()
    for epoch in range(5):
        loader = data.train_dataloader()
        loader.batch_sampler.set_epoch(epoch)
        for batch in loader:
            rows = table.iloc[batch["index"].numpy()]
            assert Counter(zip(rows["dataset"], rows["label"], strict=True)) == dict.fromkeys(counts, 3)
            assert batch["label"].tolist() == rows["label"].tolist()
            seen.update(batch["index"].tolist())
    # 60 draws of each stream: the 12 real faces of CelebA-Spoof five times each, the 4 of OULU 15 times each.
    by_stream = {key: [seen[i] for i in rows] for key, rows in table.groupby(["dataset", "label"]).indices.items()}
    assert by_stream["celeb", 0] == [5] * 12
    assert by_stream["oulu", 0] == [15] * 4


def test_held_out_videos_are_a_share_of_every_class_and_source(small: Compose) -> None:
    cfg = small("target=I", "data.val_share=0.25")
    data: Any = build.build_data(cfg)
    train, val = data.train.table, data.val.table
    ids = [set(zip(t["dataset"], t["video"], strict=True)) for t in (train, val)]
    assert not ids[0] & ids[1]
    assert set(val["dataset"]) == {"msu", "casia", "oulu", "celeb"}
    assert set(val["frame"]) == {6, 50}  # all frames: scores are averaged by video
    for name, videos in {"msu": (4, 6), "casia": (5, 5), "oulu": (4, 4), "celeb": (12, 15)}.items():
        for label, count in enumerate(videos):
            held = val[(val["dataset"] == name) & (val["label"] == label)]["video"].nunique()
            assert held == max(1, round(count * 0.25))
    again: Any = build.build_data(cfg)
    other: Any = build.build_data(small("target=I", "data.val_share=0.25", "seed=1"))
    assert again.val.table.equals(val)
    assert not other.val.table.equals(val)
    order = [row for batch in data.val_dataloader() for row in batch["index"].tolist()]
    assert order == list(range(len(val)))


def test_a_domain_without_one_class_is_named(small: Compose, antispoof_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(antispoof_dir / "fas", tmp_path / "fas")
    manifest = Manifest.read(tmp_path / "fas" / "oulu")
    table = manifest.table
    Manifest(table[(table["label"] == 0) | (table["split"] == "test")], manifest.root).write()
    with pytest.raises(DataError, match="domain oulu has 0 attack"):
        build.build_data(small("target=M", f"paths.data={tmp_path}"))
    build.build_data(small("target=O", f"paths.data={tmp_path}"))  # as the target it has all it needs
    with pytest.raises(DataError, match=r"no image of the data set\(s\) celeb; there are casia, msu"):
        build.build_data(small("target=M", f"data.manifests=[{tmp_path}/fas/casia,{tmp_path}/fas/msu]",
                               "data.domains=[msu,casia,celeb]"))  # fmt: skip


def test_shots_are_a_further_domain(small: Compose, antispoof_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(antispoof_dir / "fas", tmp_path / "fas")
    with pytest.raises(DataError, match="domain msu has 0 real"):
        build.build_data(small("target=M", "data.shots=2"))
    manifest = Manifest.read(tmp_path / "fas" / "msu")
    table = manifest.table
    train = table["split"] == "train"
    number = table["video"].str.extract(r"_(\d+)$")[0].astype(int)
    table["shot"] = np.where(train & (number == 0), 2, np.where(train & (number < 3), 1, 0))
    Manifest(table, manifest.root).write()
    base = ("target=M", f"paths.data={tmp_path}", "data.batch_size=5")
    data: Any = build.build_data(small(*base, "data.shots=3"))
    assert data.streams[-2:] == [("msu", 0), ("msu", 1)]
    rows = data.train.table
    assert Counter(rows[rows["dataset"] == "msu"]["video"]) == dict.fromkeys(
        [f"train_{kind}_{i}" for kind in ("real", "attack") for i in range(3)], 1
    )
    assert len(next(iter(data.train_dataloader()))["label"]) == 5 * 2 * 5
    # Two of the listed three; and five are not there.
    fewer: Any = build.build_data(small(*base, "data.shots=2"))
    assert (fewer.train.table["dataset"] == "msu").sum() == 4
    with pytest.raises(DataError, match=r"msu has 3 real video\(s\) to train on, expected 5"):
        build.build_data(small(*base, "data.shots=5"))
    # As a source, a data set leaves out what is only in its shot list.
    source: Any = build.build_data(small("target=C", f"paths.data={tmp_path}", *ALL_VIDEOS))
    videos = source.train.table.query("dataset == 'msu'")["video"]
    assert not videos.str.endswith("_0").any()
    assert len(videos) == 3 + 5


def test_published_lists_may_train_on_test_files(small: Compose, antispoof_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(antispoof_dir / "fas", tmp_path / "fas")
    manifest = Manifest.read(tmp_path / "fas" / "oulu")
    table = manifest.table
    table["source"] = (table["video"].str.endswith("_0")).astype(int)
    Manifest(table, manifest.root).write()
    data: Any = build.build_data(small("target=M", f"paths.data={tmp_path}", *ALL_VIDEOS))
    counts = data.train.table.groupby("dataset")["video"].apply(sorted)
    assert counts["oulu"] == ["test_attack_0", "test_real_0", "train_attack_0", "train_real_0"]
    assert len(counts["casia"]) == 10


def test_what_cannot_be_chosen_is_refused(small: Compose, compose_config: Compose, antispoof_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"target=wmca is no data set of this protocol .*data=fas_wcs"):
        build.build_data(small("target=W", "data=fas_mcio"))
    with pytest.raises(ConfigError, match=r"val_share=0 with task.selection=source_best"):
        build.build_data(small("target=M", "data.val_share=0"))
    with pytest.raises(ConfigError, match=r"best_ever.*source_best"):
        build.build_data(small("target=M", "task.selection=best_ever"))
    with pytest.raises(ConfigError, match=r"data\.target.*choose target=M, C, I or O"):
        build.check(small())


def test_processes_share_every_batch(small: Compose) -> None:
    data: Any = build.build_data(small("target=M", "data.batch_size=4"))
    whole = list(data.sampler(0, 1))
    halves = [list(data.sampler(rank, 2)) for rank in (0, 1)]
    for step, batch in enumerate(whole):
        rows = [{draw.row for draw in half[step]} for half in halves]
        streams = [Counter(data.train.table.iloc[[d.row for d in half[step]]]["dataset"]) for half in halves]
        assert streams == [dict.fromkeys(SOURCES, 4)] * 2
        assert sorted(d.row for half in halves for d in half[step]) == sorted(d.row for d in batch)
        assert rows[0] | rows[1] == {draw.row for draw in batch}
    with pytest.raises(DataError, match="4 images of every class and domain cannot be shared equally by 3"):
        data.sampler(0, 3)


@settings(max_examples=30, deadline=None)
@given(
    pixels=st.lists(st.tuples(*[st.integers(0, 255)] * 3), min_size=1, max_size=20),
    factor=st.floats(0.8, 1.2),
)
def test_saturation_alone_is_scaled(pixels: list[tuple[int, int, int]], factor: float) -> None:
    image = np.array([pixels], dtype=np.uint8)
    changed = scale_saturation(image, factor)
    for before, after in zip(image[0] / 255, changed[0] / 255, strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*before)
        expected = colorsys.hsv_to_rgb(hue, min(1, saturation * factor), value)
        np.testing.assert_allclose(after, expected, atol=1.01 / 255)
    np.testing.assert_array_equal(scale_saturation(image, 1.0), image)


def test_the_papers_augmentation(compose_config: Compose, media_dir: Path) -> None:
    """Flip and saturation, each for half of the images; the whole face is kept; testing only resizes."""
    augment = compose_config("train", "experiment=fas_vitb", "target=M").augment
    photo = read_image(next((media_dir / "photos").glob("*.jpg")))[:200, :160]
    keys = ("crop_scale", "flip", "rand_augment", "saturation")
    transform = train_transform(224, **{key: augment[key] for key in keys})
    plain = test_transform(224)(photo)
    assert plain.shape == (224, 224, 3)
    flipped = saturated = 0
    for seed in range(60):
        random.seed(seed)
        torch.manual_seed(seed)
        image = transform(photo)
        straight = min((np.abs(i.astype(int) - plain).mean(), n) for n, i in enumerate((image, image[:, ::-1])))
        assert straight[0] < 12  # nothing was cut off or moved
        flipped += straight[1]
        saturated += straight[0] > 0
    assert 15 < flipped < 45
    assert 15 < saturated < 45


# --- loss and metrics -------------------------------------------------------------------------------------------------


def reference_loss(logits: np.ndarray, labels: np.ndarray, projection: np.ndarray | None, weight: float) -> float:
    """Cross entropy, and the real-anchor contrast, written out image by image in double precision."""
    entropy = 0.0
    for row, label in zip(logits, labels, strict=True):
        shifted = np.exp(row - row.max())
        entropy -= np.log(shifted[label] / shifted.sum()) / len(labels)
    if projection is None:
        return entropy
    contrast = 0.0
    for i in range(len(labels)):
        others = [j for j in range(len(labels)) if j != i]
        peers = [j for j in others if labels[i] == labels[j] == 0]
        top = max(projection[i] @ projection[j] / 0.07 for j in range(len(labels)))
        total = np.log(sum(np.exp(projection[i] @ projection[j] / 0.07 - top) for j in others) + 1e-6)
        if peers:
            contrast -= sum(projection[i] @ projection[j] / 0.07 - top - total for j in peers) / len(peers)
    return entropy + weight * contrast / len(labels)


@pytest.mark.parametrize("tune", ["full", "adapter", "linear"])
def test_loss_equals_an_independent_computation(small: Compose, tune: str) -> None:
    name = "fas_vitl_adapter" if tune == "adapter" else "fas_vitl"
    cfg = small(f"experiment={name}", "target=M", *(["tune=linear"] if tune == "linear" else []), "tune.drop_path=0")
    task: Any = build.build_task(cfg, build.build_data(cfg))
    for module in task.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    torch.nn.init.normal_(task.detector.head.fc.weight, generator=torch.Generator().manual_seed(1))
    seen: list[Any] = []
    task.detector.register_forward_hook(lambda _m, _i, output: seen.append(output))
    images = torch.randint(0, 256, (10, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 0, 0, 1, 1, 0, 1, 0, 1])
    result = task.train().compute(images, labels, augment=True)
    logits, projection = (None if t is None else t.detach().double().numpy() for t in seen[0])
    assert (projection is not None) == (tune == "adapter")
    expected = reference_loss(logits, labels.numpy(), projection, 0.2)
    assert float(result.loss.detach()) == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(result.scores, torch.softmax(seen[0].logits.detach(), -1)[:, 1])
    assert float(result.losses.mean()) == pytest.approx(reference_loss(logits, labels.numpy(), None, 0), rel=1e-5)


def test_validation_is_on_video_means_and_balances_domains(small: Compose) -> None:
    rng = np.random.default_rng(3)
    video = np.repeat(np.arange(40), 2)
    label = (video % 2).astype(np.int64)
    domain = np.where(video < 4, 0, 1)  # one domain is much smaller
    score = np.clip(0.5 + 0.15 * (2 * label - 1) + rng.normal(0, 0.25, 80), 0.01, 0.99)
    loss = -np.log(np.where(label == 1, score, 1 - score))
    cfg = small("target=M", "model.depth=1")
    task: Any = build.build_task(cfg, build.build_data(cfg))
    for part in np.array_split(rng.permutation(80), 7):
        scores, losses, labels, videos, domains = (
            torch.as_tensor(c[part]) for c in (score, loss, label, video, domain)
        )
        task.val_loss.update(losses, labels, domains)
        task.val_hter.update(scores, labels, videos)
        task.val_auc.update(scores, labels, videos)
    got = {name: float(getattr(task, f"val_{name}").compute()) for name in ("loss", "hter", "auc")}
    means = pd.DataFrame({"score": score, "label": label, "video": video}).groupby("video").mean()
    assert got["auc"] == pytest.approx(roc_auc_score(means["label"], means["score"]))
    errors = []
    for threshold in np.arange(10_001) / 10_000:
        real = 1 - means["score"] >= threshold
        far, frr = real[means["label"] == 1].mean(), (~real[means["label"] == 0]).mean()
        errors.append((abs(far - frr), -threshold, (far + frr) / 2))
    assert got["hter"] == pytest.approx(min(errors)[2])
    cells = pd.DataFrame({"loss": loss, "domain": domain, "label": label}).groupby(["domain", "label"])["loss"].mean()
    assert got["loss"] == pytest.approx(cells.mean())
    assert got["loss"] != pytest.approx(loss.mean(), rel=1e-3)


# --- training ---------------------------------------------------------------------------------------------------------


class Watch(pl.Callback):
    """Learning rates and weight decays as used, batch sizes, and validation values."""

    def __init__(self) -> None:
        self.groups: list[Any] = []
        self.sizes: list[int] = []
        self.values: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        assert type(optimizer) is torch.optim.Adam
        self.groups.append([(g["lr"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups])

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.sizes.append(len(batch["label"]))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.values.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")})


def test_adapter_leaves_the_backbone_alone_and_the_rate_is_not_scaled(small: Compose) -> None:
    cfg = small("experiment=fas_vitb_adapter", "target=M")
    data = build.build_data(cfg)
    before = {n: p.detach().clone() for n, p in build.build_task(cfg, data).detector.named_parameters()}
    watch = Watch()
    task, trainer = fit(cfg, watch)
    # Six steps, the second epoch cut short; every parameter in one group, at the rate of the recipe.
    assert trainer.global_step == 6
    trained = [p for p in task.detector.parameters() if p.requires_grad]
    assert watch.groups == [[(0.05, 5e-5, len(trained))]] * 6
    assert watch.sizes == [2 * 2 * 4] * 6
    assert len(watch.values) == 1  # after the first epoch
    for name, parameter in task.detector.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("backbone."), name
    last = torch.load(Path(cfg.paths.run) / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 6


def test_adam_is_coupled_and_skips_what_is_not_finite(small: Compose) -> None:
    """One step of the task equals textbook Adam with the decay in the gradient; a non-finite loss changes nothing."""
    cfg = small(
        "target=M", "optim.weight_decay=0.5", "optim.base_lr=0.01", "trainer.max_steps=2", "task.selection=last"
    )

    class Spy(pl.Callback):
        def __init__(self) -> None:
            self.states: list[torch.Tensor] = []
            self.gradients: list[torch.Tensor] = []

        def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
            self.states.append(pl_module.detector.head.embed.weight.detach().clone())
            self.gradients.append(pl_module.detector.head.embed.weight.grad.clone())

        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                with torch.no_grad():
                    pl_module.mean.fill_(float("nan"))

    spy = Spy()
    task, _ = fit(cfg, spy)
    gradient = spy.gradients[0] + 0.5 * spy.states[0]
    step = 0.01 * gradient / (gradient.abs() + 1e-8)  # bias-corrected moments of the first step
    torch.testing.assert_close(spy.states[1], spy.states[0] - step, rtol=1e-4, atol=1e-7)
    assert not torch.isfinite(spy.gradients[1]).all()
    assert torch.equal(task.detector.head.embed.weight.detach(), spy.states[1])  # type: ignore[union-attr, arg-type]


def test_resumed_equals_uninterrupted(small: Compose, tmp_path: Path) -> None:
    class Interrupt(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 6:
                raise RuntimeError("interrupted")

    def config(name: str) -> DictConfig:
        cfg = small(
            "target=O", "trainer.max_steps=9", "tune.drop_path=0.2", "callbacks.last.every_n_epochs=null",
            "+callbacks.last.every_n_train_steps=1",
        )  # fmt: skip
        (tmp_path / name).mkdir()
        cfg.paths.run = str(tmp_path / name)
        return cfg

    whole, _ = fit(config("whole"))
    cfg = config("parts")
    with pytest.raises(RuntimeError, match="interrupted"):
        fit(cfg, Interrupt())
    resumed, _ = fit(cfg, resume=tmp_path / "parts" / "checkpoints" / "last.ckpt")
    tables = [pd.read_csv(tmp_path / name / "metrics.csv") for name in ("whole", "parts")]
    for column in ("train/loss_step", "val/loss", "val/criterion"):
        first, second = (table[["step", column]].dropna().reset_index(drop=True) for table in tables)
        pd.testing.assert_frame_equal(first, second, check_exact=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_accumulation_uses_the_same_images(small: Compose, tmp_path: Path) -> None:
    """Half the batch, twice as often, is the same step; validation comes after the same number of steps."""

    class Images(Watch):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen.setdefault(trainer.global_step, []).extend(batch["index"].tolist())

    steps = []
    for size, accumulate in ((2, 1), (1, 2)):
        seen: dict[int, list[int]] = {}
        cfg = small("target=M", f"data.batch_size={size}", f"trainer.accumulate_grad_batches={accumulate}")
        cfg.paths.run = str(tmp_path / str(size))
        watch = Images()
        fit(cfg, watch)
        assert len(watch.values) == 1
        steps.append({step: sorted(rows) for step, rows in seen.items()})
    assert len(steps[0]) == 6
    assert steps[0] == steps[1]


@pytest.mark.parametrize("selection", ["last", "source_best", "target_best"])
def test_selection_exports_what_it_claims(small: Compose, selection: str, tmp_path: Path) -> None:
    share = "0" if selection == "target_best" else "0.3"
    cfg = small(
        "target=M", f"task.selection={selection}", f"data.val_share={share}", "data.evaluate_every=2",
        "trainer.max_steps=9", "optim.base_lr=0.003",
    )  # fmt: skip
    watch = Watch()
    task, trainer = fit(cfg, watch)
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    watched = set(data.val_rows.manifest.table["dataset"])
    assert watched == ({"msu"} if selection == "target_best" else set(SOURCES))
    assert (data.val is None) == (selection == "target_best")
    assert len(watch.values) == 4
    key = "hter" if selection == "target_best" else "loss"
    assert all(value["val/criterion"] == value[f"val/{key}"] for value in watch.values)
    exported = Path(cfg.paths.run) / "checkpoints" / f"{task.exported}.ckpt"
    saved = torch.load(exported, weights_only=True)
    if selection == "last":
        assert saved["global_step"] == 9
    else:
        best = int(np.argmin([value["val/criterion"] for value in watch.values]))
        assert saved["global_step"] == 2 * (best + 1)
    # The choice travels with the checkpoint.
    meta = load_checkpoint(exported).meta
    assert meta["task"] == "antispoof"
    assert meta["provenance"]["hyper_parameters"]["selection"] == selection


def test_last_needs_no_held_out_video(small: Compose) -> None:
    cfg = small("target=M", *ALL_VIDEOS)
    task, trainer = fit(cfg)
    assert task.exported == "last"
    assert trainer.global_step == 6
    assert (Path(cfg.paths.run) / "checkpoints" / "last.ckpt").is_file()


# --- configurations ---------------------------------------------------------------------------------------------------

RECIPES = {
    "fas_vits": ("vit_small", 2.5e-5, 1e-6, 0.0, 0.0),
    "fas_vitb": ("vit_base", 2.5e-5, 1e-6, 0.0, 0.0),
    "fas_vitl": ("vit_large", 1e-5, 1e-5, 0.0, 0.0),
    "fas_vits_adapter": ("vit_small", 5e-2, 1e-6, 0.1, None),
    "fas_vitb_adapter": ("vit_base", 5e-2, 5e-5, 0.1, None),
    "fas_vitl_adapter": ("vit_large", 1e-3, 1e-7, 0.2, None),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_have_the_papers_values(compose_config: Compose, name: str) -> None:
    cfg = compose_config("train", f"experiment={name}", "target=O")
    model, lr, decay, contrast, drop_path = RECIPES[name]
    assert (cfg.model.name, cfg.optim.base_lr, cfg.optim.weight_decay) == (model, lr, decay)
    assert cfg.tune.name == ("adapter" if name.endswith("adapter") else "full")
    assert cfg.tune.contrast_weight == contrast
    assert cfg.tune.contrast_temperature == 0.07
    assert drop_path is None or cfg.tune.drop_path == drop_path
    optim = cfg.optim
    assert (optim.optimizer, optim.schedule, optim.scale_lr, optim.layer_decay) == ("adam", "constant", False, None)
    assert (cfg.trainer.max_steps, cfg.data.evaluate_every, cfg.data.batch_size) == (4001, 100, 24)
    assert cfg.model.init == f"zoo:fsvfm_{name.split('_')[1]}"
    assert cfg.augment.saturation == [0.8, 1.2]
    assert (cfg.augment.crop_scale, cfg.augment.flip, cfg.augment.mixup) == (None, 0.5, 0.0)
    assert cfg.task.selection == "source_best"
    # 24 real and 24 attacks of each of four sources.
    assert len([d for d in cfg.data.domains if d != cfg.data.target]) * 2 * cfg.data.batch_size == 192
    assert OmegaConf.missing_keys(cfg) == set()


@pytest.mark.parametrize(
    ("letter", "target", "protocol"),
    [("M", "msu", "fas_mcio"), ("C", "casia", "fas_mcio"), ("I", "replay", "fas_mcio"), ("O", "oulu", "fas_mcio"),
     ("W", "wmca", "fas_wcs"), ("CeFA", "cefa", "fas_wcs"), ("S", "surf", "fas_wcs")],
)  # fmt: skip
def test_a_target_is_left_out_and_tested_on(compose_config: Compose, letter: str, target: str, protocol: str) -> None:
    cfg = compose_config("train", "experiment=fas_vitb", f"target={letter}")
    assert cfg.data.target == target
    assert target in cfg.data.domains
    assert "celeb" in cfg.data.domains
    assert (cfg.data.name, cfg.protocol.name, cfg.protocol.task) == (protocol, protocol, "antispoof")
    assert list(cfg.testsets) == [f"fas_{target}"]
    assert cfg.testsets[f"fas_{target}"].manifest == f"{cfg.paths.data}/fas/{target}"
    assert cfg.testsets[f"fas_{target}"].manifest in cfg.data.manifests
    whole = compose_config("evaluate", "experiment=fas_vitb", f"protocol={protocol}")
    names = re.findall(r"\w+", "msu casia replay oulu" if protocol == "fas_mcio" else "wmca cefa surf")
    assert list(whole.testsets) == [f"fas_{name}" for name in names]
