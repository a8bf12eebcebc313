"""Every recorded layout of the released checkpoints is read, explained completely, and written back the same."""

from __future__ import annotations

import argparse
import json
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fsvfm.checkpoint import load_backbone, load_checkpoint, load_into, write_published
from fsvfm.exports import save_export
from fsvfm.models.detector import build_detector
from fsvfm.models.pretrain_net import build_networks
from fsvfm.models.vit import ViTConfig, create_backbone
from fsvfm.published import from_published, infer_model, recognise, to_published

LAYOUTS = {"pretrain_online": "online.", "pretrain_target": "target.", "finetuned": "", "adapter": ""}
SIZES = ("small", "base", "large")
Layout = dict[str, list[int]]


@pytest.fixture(scope="session")
def layouts(golden_dir: Path) -> dict[str, Layout]:
    return json.loads((golden_dir / "checkpoint_layouts.json").read_text())


def stand_in(layout: Layout) -> dict[str, Tensor]:
    """Tensors of the recorded shapes, distinguishable, that take four bytes each."""
    return {key: torch.tensor(float(i + 1)).expand(shape) for i, (key, shape) in enumerate(layout.items())}


def shrunk(layout: Layout, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors of a layout whose widths are all divided by 16 (patch side by 4): consistent again, and small."""
    generator = torch.Generator().manual_seed(seed)

    def smaller(key: str, shape: list[int]) -> list[int]:
        if key.startswith("patch_embed.proj.weight"):
            return [shape[0] // 16, 3, shape[2] // 4, shape[3] // 4]
        return [n // 16 if n >= 96 and n % 16 == 0 else n for n in shape]

    return {key: torch.randn(smaller(key, shape), generator=generator) for key, shape in layout.items()}


def save(path: Path, state: dict[str, Tensor], **more: Any) -> Path:
    args = argparse.Namespace(
        output_dir=PosixPath("/home/someone/out"), blr=1.5e-4, model="fsfm_vit", data=[PosixPath("a")]
    )
    torch.save({"model": state, "optimizer": {}, "epoch": 7, "scaler": {}, "args": args, **more}, path)
    return path


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", LAYOUTS)
def test_names_map_both_ways_without_loss(layouts: dict[str, Layout], kind: str, size: str) -> None:
    published = stand_in(layouts[f"{kind}_{size}"])
    assert recognise(published) == kind
    ours = from_published(published, kind)
    assert len(ours) == len(published)
    back = to_published(ours, kind)
    assert set(back) == set(published)
    assert all(back[key] is published[key] for key in published)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", LAYOUTS)
def test_our_networks_have_exactly_these_tensors(layouts: dict[str, Layout], kind: str, size: str) -> None:
    ours = {f"{LAYOUTS[kind]}{key}": t for key, t in from_published(stand_in(layouts[f"{kind}_{size}"]), kind).items()}
    model = infer_model(ours)
    assert model["name"] == f"vit_{size}"
    with torch.device("meta"):
        if kind.startswith("pretrain"):
            networks = dict(zip(("online.", "target."), build_networks(model), strict=True))
            network = networks[LAYOUTS[kind]]
        else:
            network = build_detector(model, {"name": "adapter" if kind == "adapter" else "full"}, ["fake", "real"])
    expected = {f"{LAYOUTS[kind]}{key}": tuple(t.shape) for key, t in network.state_dict().items()}
    assert {key: tuple(t.shape) for key, t in ours.items()} == expected


@pytest.mark.parametrize("size", SIZES)
def test_full_size_files_are_read(layouts: dict[str, Layout], size: str, tmp_path: Path) -> None:
    save(tmp_path / "checkpoint-7.pth", stand_in(layouts[f"pretrain_online_{size}"]))
    save(tmp_path / "checkpoint-te-7.pth", stand_in(layouts[f"pretrain_target_{size}"]))
    loaded = load_checkpoint(tmp_path / "checkpoint-7.pth")
    assert loaded.networks() == ("online", "target")
    assert len(loaded.state) == len(layouts[f"pretrain_online_{size}"]) + len(layouts[f"pretrain_target_{size}"])
    dim = layouts[f"pretrain_online_{size}"]["cls_token"][-1]
    assert loaded.meta["model"]["dim"] == dim
    assert loaded.meta["model"]["heads"] == {384: 12, 768: 12, 1024: 16}[dim]
    assert loaded.meta["provenance"]["args"]["output_dir"] == "/home/someone/out"


@pytest.mark.parametrize("kind", ["finetuned", "adapter"])
def test_full_size_detectors_carry_the_published_class_order(
    layouts: dict[str, Layout], kind: str, tmp_path: Path
) -> None:
    loaded = load_checkpoint(save(tmp_path / "checkpoint.pth", stand_in(layouts[f"{kind}_small"])))
    assert loaded.meta["class_order"] == ["fake", "real"]
    assert loaded.meta["tune"]["name"] == ("adapter" if kind == "adapter" else "full")
    assert loaded.meta["tune"]["reduction"] == 4


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return set(a) == set(b) and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def released(layouts: dict[str, Layout], tmp_path: Path) -> Path:
    folder = tmp_path / "released"
    folder.mkdir()
    save(folder / "checkpoint-7.pth", shrunk(layouts["pretrain_online_small"], 1))
    save(folder / "checkpoint-te-7.pth", shrunk(layouts["pretrain_target_small"], 2))
    (folder / "pretrain_ds_mean_std.txt").write_text('{"mean": [0.5, 0.4, 0.3], "std": [0.25, 0.24, 0.23]}\n')
    return folder


def test_pretraining_round_trips(released: Path, tmp_path: Path) -> None:
    loaded = load_checkpoint(released / "checkpoint-7.pth", heads=4, decoder_heads=4)
    assert loaded.meta["mean"] == [0.5, 0.4, 0.3]
    # published → ours → published: the same keys, shapes and values.
    save_export(tmp_path / "export", loaded.state, loaded.meta)
    files = write_published(tmp_path / "again", load_checkpoint(tmp_path / "export"))
    assert {f.name for f in files} == {"checkpoint-7.pth", "checkpoint-te-7.pth", "pretrain_ds_mean_std.txt"}
    for name in ("checkpoint-7.pth", "checkpoint-te-7.pth"):
        old, new = (torch.load(p / name, weights_only=False) for p in (released, tmp_path / "again"))
        assert same(old["model"], new["model"])
        assert set(new) == {"model", "optimizer", "epoch", "scaler", "args"}
        assert new["epoch"] == 7
        assert isinstance(new["args"], argparse.Namespace)
        assert new["args"].blr == 1.5e-4
    stats = "pretrain_ds_mean_std.txt"
    assert json.loads((released / stats).read_text()) == json.loads((tmp_path / "again" / stats).read_text())
    # ours → published → ours: bit by bit, metadata too, without saying the heads again.
    back = load_checkpoint(tmp_path / "again" / "checkpoint-7.pth")
    assert same(loaded.state, back.state)
    assert loaded.meta == back.meta


def test_recorded_networks_load_and_start_a_backbone(golden_dir: Path, tmp_path: Path) -> None:
    arrays = np.load(golden_dir / "pretrain_network.npz")
    for prefix, name in (("online/", "checkpoint-3.pth"), ("target/", "checkpoint-te-3.pth")):
        state = {k.removeprefix(prefix): torch.from_numpy(arrays[k]) for k in arrays.files if k.startswith(prefix)}
        save(tmp_path / name, state)
    loaded = load_checkpoint(tmp_path / "checkpoint-3.pth", heads=4, decoder_heads=4)
    assert loaded.meta["mean"] is None
    online, target = build_networks(loaded.meta["model"])
    for name, network in (("online", online), ("target", target)):
        part = {k.removeprefix(f"{name}."): t for k, t in loaded.state.items() if k.startswith(f"{name}.")}
        report = load_into(network, part)
        assert report.unused == report.missing == report.resized == ()
    # The whole-image feature of the recorded target network, computed with what was loaded.
    feature = target(torch.from_numpy(arrays["image"]))
    torch.testing.assert_close(feature, torch.from_numpy(arrays["target_feature"]), rtol=1e-4, atol=1e-5)
    config = ViTConfig.from_mapping(loaded.meta["model"])
    report = load_backbone(create_backbone(config), loaded)
    assert set(report.unused) == {"norm.weight", "norm.bias"}
    assert set(report.missing) == {"fc_norm.weight", "fc_norm.bias"}


def test_recorded_adapter_scores_as_published(golden_dir: Path, tmp_path: Path) -> None:
    arrays = np.load(golden_dir / "downstream_networks.npz")
    state = {k.removeprefix("adapter/"): torch.from_numpy(arrays[k]) for k in arrays.files if k.startswith("adapter/")}
    loaded = load_checkpoint(save(tmp_path / "checkpoint.pth", state), heads=4)
    detector = build_detector(loaded.meta["model"], loaded.meta["tune"], loaded.meta["class_order"]).eval()
    load_into(detector, loaded.state)
    image, logits = torch.from_numpy(arrays["image"]), torch.from_numpy(arrays["adapter_logits"])
    with torch.no_grad():
        torch.testing.assert_close(detector(image).logits, logits, rtol=1e-4, atol=1e-5)
        # Published index 1 is "real", so our score, P(fake), is index 0.
        torch.testing.assert_close(detector.scores(image), logits.softmax(-1)[:, 0], rtol=1e-4, atol=1e-5)
