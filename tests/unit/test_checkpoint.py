"""Loading, explaining, writing and refusing checkpoints, on files of a few kilobytes."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fsvfm.checkpoint import Checkpoint, encoder_state, load_backbone, load_checkpoint, normalisation, write_published
from fsvfm.errors import CheckpointError
from fsvfm.exports import plain, read_meta, save_export, validate_meta
from fsvfm.loading import load_into, resize_pos_embed
from fsvfm.models.detector import build_detector
from fsvfm.models.pretrain_net import build_networks
from fsvfm.models.vit import ViTConfig, create_backbone
from fsvfm.published import from_published, group_keys, infer_model, recognise, to_published

MODEL: dict[str, Any] = {
    "name": "custom", "image_size": 16, "patch_size": 4, "dim": 8, "depth": 3, "heads": 2,
    "representation_decoder": {"depth": 2, "heads": 4, "pos_embed": "zeros"},
    "pixel_decoder": {"dim": 12, "depth": 1, "heads": 3},
    "projection": {"hidden": 16, "out": 6},
}  # fmt: skip
VIT = {k: v for k, v in MODEL.items() if not isinstance(v, dict)}
STATS = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1]}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return sorted(a) == sorted(b) and all(torch.equal(a[k], b[k]) for k in a)


def pretrain_state(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    online, target = build_networks(MODEL)
    for parameter in target.parameters():
        nn.init.normal_(parameter)
    networks = {"online": online, "target": target}
    return {f"{name}.{key}": t.clone() for name, net in networks.items() for key, t in net.state_dict().items()}


def pretrain_meta(**changes: Any) -> dict[str, Any]:
    return validate_meta({"kind": "pretrain", "task": "pretrain", "model": MODEL, **STATS, **changes})


def detector(tune: str = "full", order: tuple[str, str] = ("real", "fake"), task: str = "forgery") -> nn.Module:
    torch.manual_seed(3)
    network = build_detector(VIT, {"name": tune}, order, task=task).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network


def detector_meta(
    tune: str = "full", order: tuple[str, str] = ("real", "fake"), task: str = "forgery"
) -> dict[str, Any]:
    tuning = {"name": tune, "drop_path": 0.1, "reduction": 4}
    return {"kind": "detector", "task": task, "model": VIT, "tune": tuning, "class_order": list(order), **STATS}


@pytest.fixture
def pretrained(tmp_path: Path) -> Path:
    return save_export(tmp_path / "pretrained", pretrain_state(), pretrain_meta())


@pytest.fixture
def released(pretrained: Path, tmp_path: Path) -> Path:
    """A pre-training checkpoint as the published code writes it, with an optimiser and paths in its arguments."""
    write_published(tmp_path / "released", load_checkpoint(pretrained))
    for file in (tmp_path / "released").glob("*.pth"):
        content = torch.load(file, weights_only=False)
        content["args"] = argparse.Namespace(
            output_dir=Path("/data/out"), log=PurePosixPath("a/b"), win=PureWindowsPath("C:/x"), lr=0.1, epochs=5
        )
        content["optimizer"] = {
            "state": {0: {"step": torch.tensor(1.0)}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.95)}],
        }
        torch.save(content, file)
    return tmp_path / "released"


# --- exports ---------------------------------------------------------------------------------------------------------


def test_export_round_trip(tmp_path: Path) -> None:
    state, meta = pretrain_state(), pretrain_meta(provenance={"epoch": 3, "command": "python -m …"})
    folder = save_export(tmp_path / "deep" / "export", state, meta)
    for source in (folder, folder / "model.safetensors", folder.parent):
        loaded = load_checkpoint(source)
        assert same(loaded.state, state)
        assert loaded.meta == meta
    assert sorted(p.name for p in folder.parent.iterdir()) == ["export"]
    assert sorted(p.name for p in folder.iterdir()) == ["model.json", "model.safetensors"]


def test_export_is_replaced_but_other_folders_are_not(pretrained: Path, tmp_path: Path) -> None:
    changed = pretrain_state(1)
    save_export(pretrained, changed, pretrain_meta())
    assert same(load_checkpoint(pretrained).state, changed)
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.tex").write_text("…")
    with pytest.raises(CheckpointError, match=r"chapter\.tex"):
        save_export(other, changed, pretrain_meta())
    assert [p.name for p in other.iterdir()] == ["chapter.tex"]


def test_failed_export_leaves_nothing(tmp_path: Path) -> None:
    state = pretrain_state()
    del state["online.encoder.blocks.1.attn.qkv.weight"]
    with pytest.raises(CheckpointError, match=r"blocks\.1\.attn\.qkv\.weight: missing"):
        save_export(tmp_path / "x", state, pretrain_meta())
    assert list(tmp_path.iterdir()) == []


def test_tensors_that_share_storage_are_exported(tmp_path: Path) -> None:
    state = {k: t for k, t in pretrain_state().items() if k.startswith("online.")}
    state |= {k.replace("online.", "target."): t for k, t in state.items() if "pixel" not in k and "predictor" not in k}
    save_export(tmp_path / "x", state, pretrain_meta())
    assert same(load_checkpoint(tmp_path / "x").state, state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "zoo"}, "kind: 'zoo'"),
        ({"task": "poetry"}, "task: 'poetry'"),
        ({"model": {**MODEL, "heads": None}}, "model.heads"),
        ({"mean": [0.1, 0.2]}, "mean"),
        ({"std": [0.1, 0.0, 0.2]}, "std"),
        ({"std": [0.1, float("nan"), 0.2]}, "std"),
        ({"class_order": ["fake", "fake"]}, "class_order"),
        ({"kind": "detector"}, "silently inverted"),
        ({"version": 99}, "newer"),
    ],
)
def test_metadata_is_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        validate_meta({**pretrain_meta(), **changes})


def test_all_metadata_problems_are_named_at_once() -> None:
    with pytest.raises(CheckpointError) as caught:
        validate_meta({**pretrain_meta(), "kind": "x", "mean": 3, "class_order": ["dog", "cat"]})
    assert all(word in str(caught.value) for word in ("kind", "mean", "class_order"))


def test_provenance_becomes_plain() -> None:
    messy = {
        "p": Path("a"),
        "n": np.float32(0.5),
        "a": np.arange(2),
        "inf": float("inf"),
        3: {1},
        "ns": argparse.Namespace(x=1),
    }
    assert plain(messy) == {"p": "a", "n": 0.5, "a": [0, 1], "inf": "inf", "3": [1], "ns": {"x": 1}}


@pytest.mark.parametrize("damage", ["truncated", "empty", "other size", "no json", "bad json"])
def test_damaged_export(pretrained: Path, damage: str) -> None:
    weights, text = pretrained / "model.safetensors", pretrained / "model.json"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "empty":
        weights.write_bytes(b"")
    elif damage == "other size":
        text.write_text(text.read_text().replace('"depth": 3', '"depth": 4'))
    elif damage == "no json":
        text.unlink()
    else:
        text.write_text("{")
    source = weights if damage == "no json" else pretrained
    with pytest.raises(CheckpointError):
        load_checkpoint(source)


def test_meta_of_another_program_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not ours"):
        read_meta(tmp_path)


# --- released files --------------------------------------------------------------------------------------------------


def test_released_pretraining_with_target_and_statistics(released: Path) -> None:
    loaded = load_checkpoint(released / "checkpoint-0.pth", heads=2, decoder_heads=1)
    assert same(loaded.state, pretrain_state())
    assert loaded.kind == "pretrain"
    assert normalisation(loaded) == (STATS["mean"], STATS["std"])
    assert loaded.meta["class_order"] is None
    assert loaded.meta["model"]["representation_decoder"]["pos_embed"] == "zeros"
    assert loaded.meta["provenance"]["args"] == {
        "output_dir": "/data/out", "log": "a/b", "win": "C:\\x", "lr": 0.1, "epochs": 5,
    }  # fmt: skip


def test_absent_target_is_reported_not_refused(released: Path) -> None:
    (released / "checkpoint-te-0.pth").unlink()
    loaded = load_checkpoint(released / "checkpoint-0.pth", heads=2, decoder_heads=1)
    assert loaded.networks() == ("online",)
    assert any("checkpoint-te-0.pth" in note for note in loaded.notes)
    assert load_checkpoint(released / "checkpoint-0.pth", heads=2, decoder_heads=1, target=False).notes == ()
    with pytest.raises(CheckpointError, match="no network 'target'"):
        encoder_state(loaded, "target")


def test_target_file_alone(released: Path) -> None:
    loaded = load_checkpoint(released / "checkpoint-te-0.pth", heads=2, decoder_heads=1)
    assert loaded.networks() == ("target",)
    assert loaded.meta["model"]["pixel_decoder"] is None
    assert same(loaded.state, {k: t for k, t in pretrain_state().items() if k.startswith("target.")})


def test_target_of_another_size(released: Path) -> None:
    content = torch.load(released / "checkpoint-te-0.pth", weights_only=False)
    content["model"] = {k: t for k, t in content["model"].items() if not k.startswith("blocks.2")}
    torch.save(content, released / "checkpoint-te-0.pth")
    with pytest.raises(CheckpointError, match=r"target\.encoder\.blocks\.2"):
        load_checkpoint(released / "checkpoint-0.pth", heads=2, decoder_heads=1)


def test_heads_are_asked_for_where_shapes_do_not_tell(released: Path) -> None:
    with pytest.raises(CheckpointError, match="heads="):
        load_checkpoint(released / "checkpoint-0.pth")
    with pytest.raises(CheckpointError, match="decoder_heads="):
        load_checkpoint(released / "checkpoint-0.pth", heads=2)
    assert infer_model({k: torch.empty(s, device="meta") for k, s in vit_shapes(384).items()})["heads"] == 12


def vit_shapes(dim: int) -> dict[str, tuple[int, ...]]:
    network = create_backbone(ViTConfig("x", 4, 8, 1, 2, 16))
    return {
        f"backbone.{k}": tuple(n * dim // 8 if n % 8 == 0 else n for n in t.shape)
        for k, t in network.state_dict().items()
    }


def test_statistics_given_unknown_or_wrong(released: Path) -> None:
    (released / "pretrain_ds_mean_std.txt").unlink()
    loaded = load_checkpoint(released / "checkpoint-0.pth", heads=2, decoder_heads=1)
    assert loaded.meta["mean"] is None
    with pytest.raises(CheckpointError, match=r"pretrain_ds_mean_std\.txt"):
        normalisation(loaded)
    given = load_checkpoint(released / "checkpoint-0.pth", heads=2, decoder_heads=1, mean=[0.1] * 3, std=[0.2] * 3)
    assert normalisation(given) == ([0.1] * 3, [0.2] * 3)
    (released / "pretrain_ds_mean_std.txt").write_text('{"mean": [1, 2], "std": [1, 1, 1]}')
    with pytest.raises(CheckpointError, match="three numbers"):
        load_checkpoint(released / "checkpoint-0.pth", heads=2, decoder_heads=1)


class Harmful:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["args", "model", "all"])
def test_a_pickle_that_runs_code_is_refused(released: Path, tmp_path: Path, where: str, zipped: bool) -> None:
    proof = tmp_path / "proof"
    harmful = Harmful(f"touch {proof}")
    content = torch.load(released / "checkpoint-0.pth", weights_only=False)
    bad = harmful if where == "all" else {**content, where: harmful}
    torch.save(bad, tmp_path / "bad.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"refused.*(posix|nt)\.system"):
        load_checkpoint(tmp_path / "bad.pth", heads=2, decoder_heads=1)
    assert not proof.exists()


def test_a_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save({"model": nn.Linear(2, 2)}, tmp_path / "module.pth")
    with pytest.raises(CheckpointError, match=r"torch\.nn\.modules\.linear\.Linear"):
        load_checkpoint(tmp_path / "module.pth")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_truncated_file(released: Path, share: float) -> None:
    file = released / "checkpoint-0.pth"
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(CheckpointError, match=r"checkpoint-0\.pth .*(damaged|bytes)"):
        load_checkpoint(file)


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    for name, content in (("list.pth", [1]), ("table.pth", {"a": 1}), ("tensors.pth", {"w": torch.ones(2)})):
        torch.save(content, tmp_path / name)
        with pytest.raises(CheckpointError):
            load_checkpoint(tmp_path / name)
    (tmp_path / "text.pth").write_text("hello")
    for name in ("text.pth", "absent.pth"):
        with pytest.raises(CheckpointError, match=name):
            load_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("blocks.1.attn.qkv.weight", (24, 16)),
        ("pos_embed", (1, 16, 8)),
        ("patch_embed.proj.weight", (8, 3, 2, 2)),
        ("decoder_pred.weight", (47, 12)),
        ("projector.projection_head.3.weight", (5, 16)),
    ],
)
def test_a_tensor_of_another_size_is_named(released: Path, key: str, shape: tuple[int, ...]) -> None:
    content = torch.load(released / "checkpoint-0.pth", weights_only=False)
    content["model"][key] = torch.zeros(shape)
    torch.save(content, released / "checkpoint-0.pth")
    with pytest.raises(CheckpointError, match=r"another size|square grid"):
        load_checkpoint(released / "checkpoint-0.pth", heads=2, decoder_heads=1)


def test_unknown_and_missing_keys_are_listed(released: Path) -> None:
    state = torch.load(released / "checkpoint-0.pth", weights_only=False)["model"]
    state["blocks.0.ls1.gamma"] = torch.ones(8)
    state["surprise"] = state.pop("mask_token")
    with pytest.raises(CheckpointError) as caught:
        from_published(state)
    assert all(key in str(caught.value) for key in ("blocks.0.ls1.gamma", "surprise", "mask_token"))


# --- detectors and class order ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [("real", "fake"), ("fake", "real")])
@pytest.mark.parametrize("task", ["forgery", "antispoof"])
@pytest.mark.parametrize("tune", ["full", "adapter"])
def test_detector_round_trip_keeps_scores_and_bits(
    tmp_path: Path, tune: str, task: str, order: tuple[str, str]
) -> None:
    network = detector(tune, order, task)
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        scores = network.scores(images)  # also normalises the anti-spoofing classifier, which changes its weights
        logits = network(images).logits
    meta = detector_meta(tune, order, task)
    ours = load_checkpoint(save_export(tmp_path / "ours", network.state_dict(), meta))
    (file, _) = write_published(tmp_path / "published", ours)
    assert file.name == "checkpoint.pth"
    # For the published code index 1 is "real", whatever our order: the same scores, and ours come back bit by bit.
    content = torch.load(file, weights_only=False)
    published = content["state_dict"] if task == "antispoof" else content["model"]
    layout = recognise(published)
    assert layout == {"forgery": {"full": "finetuned"}, "antispoof": {"full": "fas", "adapter": "fas_adapter"}}[
        task
    ].get(tune, "adapter")
    theirs = build_detector(VIT, {"name": tune}, ("fake", "real"), task=task).eval()
    load_into(theirs, from_published(published))
    with torch.no_grad():
        torch.testing.assert_close(theirs(images).logits.softmax(-1)[:, 1], 1 - scores)
        torch.testing.assert_close(theirs.scores(images), scores)
        assert torch.equal(theirs(images).logits, logits if order == ("fake", "real") else logits.flip(1))
    back = load_checkpoint(file)
    assert same(back.state, ours.state)
    assert back.meta == ours.meta


def test_released_detector_is_fake_first(tmp_path: Path) -> None:
    state = detector("full", ("fake", "real")).state_dict()
    torch.save({"model": to_published(state, "finetuned"), "args": argparse.Namespace()}, tmp_path / "checkpoint.pth")
    loaded = load_checkpoint(tmp_path, heads=2)
    assert loaded.meta["class_order"] == ["fake", "real"]
    assert loaded.meta["tune"] | {"name": "full", "pool": "avg", "quirk": False} == loaded.meta["tune"]
    assert same(loaded.state, state)


def test_cls_pooling_is_stored_and_read_off_released_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tune = {"name": "full", "pool": "cls"}
    network, images = build_detector(VIT, tune, ["fake", "real"]).eval(), torch.randn(4, 3, 16, 16)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    feature, tokens = network.features(images)
    torch.testing.assert_close(feature, tokens[:, 0])  # the norm is part of the backbone then
    state = network.state_dict()
    save_export(tmp_path / "export", state, {**detector_meta(order=("fake", "real")), "tune": tune})
    torch.save({"model": to_published(state, "finetuned")}, tmp_path / "released.pth")
    for source in ("export", "released.pth"):
        loaded = load_checkpoint(tmp_path / source, heads=2)
        again = build_detector(loaded.meta["model"], loaded.meta["tune"], loaded.meta["class_order"]).eval()
        assert load_into(again, loaded.state).missing == ()
        torch.testing.assert_close(again.scores(images), network.scores(images), rtol=0, atol=0)


def fas_container(tune: str, *, spare_head: bool = False) -> dict[str, Any]:
    ours = detector(tune, ("fake", "real"), "antispoof").state_dict()
    state = to_published(ours, "fas_adapter" if tune == "adapter" else "fas")
    if spare_head:
        state |= {"backbone.vit.head.weight": torch.randn(2, 16), "backbone.vit.head.bias": torch.randn(2)}
    return {
        "epoch": 40, "state_dict": state, "valid_arg": [np.float64(0.2), np.inf, 0, np.array([1.0, 2.0])],
        "best_model_EER": np.float64(0.05), "best_model_ACER": 1.0, "best_model_ACC": np.float32(0.9),
        "threshold": np.float64(0.4),
    }  # fmt: skip


@pytest.mark.parametrize(("tune", "spare"), [("full", False), ("adapter", False), ("adapter", True)])
def test_antispoofing_container(tmp_path: Path, tune: str, spare: bool) -> None:
    content = fas_container(tune, spare_head=spare)
    (tmp_path / "in").mkdir()
    torch.save(content, tmp_path / "in" / "msu_vit_0_shot_checkpoint_run_0.pth.tar")
    loaded = load_checkpoint(tmp_path / "in" / "msu_vit_0_shot_checkpoint_run_0.pth.tar", heads=2)
    assert loaded.meta["task"] == "antispoof"
    assert loaded.meta["class_order"] == ["fake", "real"]
    assert loaded.meta["tune"]["quirk"] == (tune == "full")
    assert len(loaded.left_out) == (2 if spare else 0)
    build = build_detector(loaded.meta["model"], loaded.meta["tune"], ["fake", "real"], task="antispoof")
    assert not load_into(build, loaded.state).missing
    # Through our export and back: every tensor of the container, the second copy and the spare head included.
    save_export(tmp_path / "ours", loaded.state, loaded.meta, left_out=loaded.left_out)
    (file, *_) = write_published(tmp_path / "out", load_checkpoint(tmp_path / "ours"))
    again = torch.load(file, weights_only=False)
    assert same(again["state_dict"], content["state_dict"])
    assert "embedder.bottleneck_layer.0.weight" in again["state_dict"]
    assert again["epoch"] == 40
    assert again["threshold"] == 0.4


def test_altered_antispoofing_copy_is_refused(tmp_path: Path) -> None:
    content = fas_container("full")
    content["state_dict"]["embedder.bottleneck_layer.0.bias"] = torch.zeros(512)
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="must be the same tensor"):
        load_checkpoint(tmp_path / "x.pth", heads=2)


def test_three_classes_are_refused(tmp_path: Path) -> None:
    state = to_published(detector().state_dict(), "finetuned")
    state |= {"head.weight": torch.zeros(3, 8), "head.bias": torch.zeros(3)}
    torch.save({"model": state}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="3 classes"):
        load_checkpoint(tmp_path / "x.pth", heads=2)


def test_what_has_no_published_layout_is_not_written(tmp_path: Path) -> None:
    state = {**detector().state_dict(), "backbone.blocks.0.attn.qkv.lora_A.weight": torch.zeros(1, 8)}
    loaded = load_checkpoint(save_export(tmp_path / "x", state, detector_meta()))
    with pytest.raises(CheckpointError, match="lora_A"):
        write_published(tmp_path / "out", loaded)
    assert not (tmp_path / "out").exists()


# --- Lightning -------------------------------------------------------------------------------------------------------


def lightning(state: dict[str, Tensor], **parameters: Any) -> dict[str, Any]:
    return {
        "epoch": 2, "global_step": 9, "pytorch-lightning_version": "2.6.0", "state_dict": state, "loops": {},
        "optimizer_states": [{"state": {}}], "hyper_parameters": {**STATS, **parameters},
    }  # fmt: skip


def test_lightning_pretraining(tmp_path: Path) -> None:
    state = pretrain_state()
    buffers = {"mean": torch.full((1, 3, 1, 1), 127.0), "std": torch.full((1, 3, 1, 1), 60.0)}
    compiled = {k.replace("online.", "online._orig_mod."): t for k, t in state.items()}
    torch.save(lightning({**compiled, **buffers}, model={**MODEL, "init": None}), tmp_path / "last.ckpt")
    loaded = load_checkpoint(tmp_path / "last.ckpt")
    assert same(loaded.state, state)
    assert loaded.meta["model"] == MODEL
    assert normalisation(loaded) == (STATS["mean"], STATS["std"])
    assert loaded.meta["provenance"]["epoch"] == 2


@pytest.mark.parametrize("order", [["real", "fake"], ["fake", "real"]])
def test_lightning_detector(tmp_path: Path, order: list[str]) -> None:
    state = {f"detector.{k}": t for k, t in detector("adapter").state_dict().items()}
    tune = {"name": "adapter", "reduction": 4}
    torch.save(lightning(state, model=VIT, tune=tune, class_order=order), tmp_path / "best.ckpt")
    loaded = load_checkpoint(tmp_path / "best.ckpt")
    assert (loaded.kind, loaded.meta["task"], loaded.meta["class_order"]) == ("detector", "forgery", order)
    assert loaded.meta["tune"] == tune
    assert same(loaded.state, detector("adapter").state_dict())
    torch.save(lightning({**state, "other.weight": torch.ones(1)}, model=VIT), tmp_path / "odd.ckpt")
    with pytest.raises(CheckpointError, match=r"other\.weight"):
        load_checkpoint(tmp_path / "odd.ckpt")


# --- into modules ----------------------------------------------------------------------------------------------------


def test_load_into_reports_every_key(pretrained: Path) -> None:
    state = encoder_state(load_checkpoint(pretrained))
    backbone = create_backbone(ViTConfig("x", 4, 8, 3, 2, 16))
    report = load_into(backbone, state, expect_missing=["fc_norm.*"], expect_unused=["norm.*"])
    assert set(report.used) | set(report.unused) == set(state)
    assert set(report.used) | set(report.missing) == set(backbone.state_dict())
    assert all(torch.equal(t, state[k]) for k, t in backbone.state_dict().items() if k in report.used)
    assert "norm.weight" in str(report)
    assert "fc_norm.weight" in str(report)


def test_unexplained_keys_are_an_error_and_change_nothing(pretrained: Path) -> None:
    state = encoder_state(load_checkpoint(pretrained))
    backbone = create_backbone(ViTConfig("x", 4, 8, 3, 2, 16))
    before = copy.deepcopy(backbone.state_dict())
    state["ghost"] = state.pop("cls_token")
    with pytest.raises(CheckpointError) as caught:
        load_into(backbone, state, expect_missing=["fc_norm.*"], expect_unused=["norm.*"])
    assert "ghost" in str(caught.value)
    assert "cls_token" in str(caught.value)
    assert same(before, backbone.state_dict())


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (ViTConfig("x", 4, 16, 3, 2, 16), "model.dim=8"),
        (ViTConfig("x", 4, 8, 6, 2, 16), "model.depth=3"),
        (ViTConfig("x", 8, 8, 3, 2, 16), "model.patch_size=4"),
        (ViTConfig("x", 4, 8, 3, 4, 16), "model.heads=2"),  # leaves no trace in the tensors' shapes
    ],
)
def test_another_architecture_says_which_settings_fit(pretrained: Path, config: ViTConfig, settings: str) -> None:
    backbone = create_backbone(config)
    before = copy.deepcopy(backbone.state_dict())
    with pytest.raises(
        CheckpointError, match=rf"pretrained holds a ViT \(patch 4, width 8, 3 bl(.|\n)*give {settings},"
    ):
        load_backbone(backbone, load_checkpoint(pretrained))
    assert same(before, backbone.state_dict())


def test_another_size_is_called_by_its_name() -> None:
    sizes = {name: ViTConfig.from_mapping({"name": name}) for name in ("vit_base", "vit_large")}
    with torch.device("meta"):
        networks = {name: create_backbone(config) for name, config in sizes.items()}
    state = {f"encoder.{key}": tensor for key, tensor in networks["vit_large"].state_dict().items()}
    meta = {"kind": "encoder", "task": "pretrain", "model": dataclasses.asdict(sizes["vit_large"]), **STATS}
    large = Checkpoint("encoder", state, validate_meta(meta), "runs/pretrain_vitl/export")
    with pytest.raises(CheckpointError) as caught:
        load_backbone(networks["vit_base"], large)
    words = (
        "runs/pretrain_vitl/export holds vit_large (patch 16, width 1024, 24 blocks, 16 heads)",
        "is vit_base (patch 16, width 768, 12 blocks, 12 heads)", "give model=vit_large, or another checkpoint",
    )  # fmt: skip
    assert all(text in str(caught.value) for text in words)


@pytest.mark.parametrize("which", ["online", "target"])
def test_backbone_at_another_image_size(pretrained: Path, which: str) -> None:
    backbone = create_backbone(ViTConfig("x", 4, 8, 3, 2, 24))
    report = load_backbone(backbone, load_checkpoint(pretrained), which)
    assert report.resized == ("pos_embed",)
    state = encoder_state(load_checkpoint(pretrained), which)
    assert torch.equal(backbone.state_dict()["pos_embed"], resize_pos_embed(state["pos_embed"], 6))
    with pytest.raises(CheckpointError, match="pos_embed"):
        load_into(backbone, state, expect_missing=["fc_norm.*"], expect_unused=["norm.*"], resize=False)


def test_tuned_backbone_can_start_another_detector(tmp_path: Path) -> None:
    state = detector().state_dict()
    loaded = load_checkpoint(save_export(tmp_path / "x", state, detector_meta()))
    backbone = create_backbone(ViTConfig("x", 4, 8, 3, 2, 16))
    report = load_backbone(backbone, loaded)
    assert report.missing == report.unused == ()
    assert torch.equal(backbone.fc_norm.weight, state["backbone.fc_norm.weight"])


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 8), st.integers(1, 10), st.integers(1, 5))
def test_resized_position_embedding(old: int, new: int, dim: int) -> None:
    pos = torch.rand(1, 1 + old * old, dim)
    out = resize_pos_embed(pos, new)
    assert out.shape == (1, 1 + new * new, dim)
    assert torch.equal(out[:, 0], pos[:, 0])
    flat = torch.cat([pos[:, :1], torch.full((1, old * old, dim), 0.7)], 1)
    torch.testing.assert_close(resize_pos_embed(flat, new)[:, 1:], torch.full((1, new * new, dim), 0.7))
    if new == old:
        assert torch.equal(out, pos)


def test_resize_keeps_rows_and_columns_apart() -> None:
    ramp = torch.arange(4.0).repeat(4, 1)  # grows along x only
    pos = torch.cat([torch.zeros(1, 1, 1), ramp.reshape(1, 16, 1)], 1)
    grid = resize_pos_embed(pos, 8)[0, 1:, 0].reshape(8, 8)
    assert torch.allclose(grid, grid[:1].expand(8, 8))
    assert bool((grid[0].diff() > 0).all())
    with pytest.raises(CheckpointError, match="cannot resize"):
        resize_pos_embed(torch.zeros(1, 6, 2), 2)


def test_keys_are_grouped_for_people() -> None:
    block = [
        k.removeprefix("blocks.0.")
        for k in create_backbone(ViTConfig("x", 4, 8, 1, 2, 16)).state_dict()
        if "blocks" in k
    ]
    keys = [f"blocks.{i}.{leaf}" for i in range(12) for leaf in block]
    assert group_keys([*keys, "norm.weight"]) == ["blocks.0…11.* (144 keys)", "norm.weight"]
    assert group_keys(["blocks.1.a", "blocks.4.a"]) == ["blocks.1,4.a (2 keys)"]


def test_stored_json_is_readable(pretrained: Path) -> None:
    meta = json.loads((pretrained / "model.json").read_text())
    assert meta["format"] == "fsvfm-export"
    assert meta["model"]["representation_decoder"]["pos_embed"] == "zeros"
