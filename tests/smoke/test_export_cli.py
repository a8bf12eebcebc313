"""`python -m fsvfm.export` as a user runs it."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import roc_auc_score

from fsvfm import export
from fsvfm.checkpoint import load_checkpoint, write_published
from fsvfm.data.manifest import Manifest
from fsvfm.evaluation import predict_manifest
from fsvfm.exports import save_export
from fsvfm.loaded_detector import load_detector_network
from fsvfm.models.detector import build_detector
from fsvfm.models.pretrain_net import build_networks
from fsvfm.zoo import ZOO

MODEL: dict[str, Any] = {
    "name": "custom", "image_size": 16, "patch_size": 4, "dim": 8, "depth": 2, "heads": 2,
    "representation_decoder": {"depth": 1, "heads": 2, "pos_embed": "sincos"},
    "pixel_decoder": {"dim": 8, "depth": 1, "heads": 2},
    "projection": {"hidden": 8, "out": 4},
}  # fmt: skip


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


Command = Callable[..., Done]


@pytest.fixture
def fsvfm_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """The command in this process (starting Python takes longer than the work); one test starts it as a user does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FSVFM_WEIGHTS", str(tmp_path / "w"))
    monkeypatch.delenv("FSVFM_RUNS", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def run(*words: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["fsvfm.export", *words])
        capfd.readouterr()
        try:
            export.run()
            code = 0
        except SystemExit as left:
            code = int(left.code or 0)
        return Done(code, *capfd.readouterr())

    return run


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """A released pre-training checkpoint whose arguments hold a path and none of our metadata."""
    online, target = build_networks(MODEL)
    state = {f"{n}.{k}": t for n, net in (("online", online), ("target", target)) for k, t in net.state_dict().items()}
    meta = {"kind": "pretrain", "task": "pretrain", "model": MODEL, "mean": [0.5] * 3, "std": [0.2] * 3}
    folder = tmp_path / "released"
    write_published(folder, load_checkpoint(save_export(tmp_path / "runs" / "mine" / "export", state, meta)))
    for file in folder.glob("*.pth"):
        content = torch.load(file, weights_only=False)
        torch.save({**content, "args": argparse.Namespace(output_dir=Path("/x"))}, file)
    return folder


def test_list_shows_the_zoo_and_our_runs(released: Path, tmp_path: Path, fsvfm_export: Command) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "FSVFM_RUNS"}
    done = subprocess.run(
        [sys.executable, "-m", "fsvfm.export", "list"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in ZOO:
        assert f"zoo:{name} " in done.stdout
    assert "runs/mine/export" in done.stdout
    assert "CC BY-NC 4.0" in done.stdout
    assert "0.548 0.423 0.365" in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["released", "runs"]  # Hydra leaves no litter
    only = fsvfm_export("list", "pattern=*vitl*adapter")
    assert only.stdout.count("zoo:") == 3


def test_both_ways(released: Path, tmp_path: Path, fsvfm_export: Command) -> None:
    done = fsvfm_export("ckpt=released/checkpoint-0.pth", "out=ours", "heads=2", "decoder_heads=2", "which=both")
    assert done.returncode == 0, done.stderr
    assert "used" in done.stdout
    assert "online.encoder.blocks.0,1.* (24 keys)" in done.stdout
    assert "left out 0 tensors" in done.stdout
    assert "missing: nothing" in done.stdout
    done = fsvfm_export("convert", "ckpt=ours", "out=theirs", "format=published")
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "theirs").iterdir()) == [
        "checkpoint-0.pth", "checkpoint-te-0.pth", "pretrain_ds_mean_std.txt",
    ]  # fmt: skip
    for name in ("checkpoint-0.pth", "checkpoint-te-0.pth"):
        old, new = (torch.load(p / name, weights_only=False)["model"] for p in (released, tmp_path / "theirs"))
        assert old.keys() == new.keys()
        assert all(torch.equal(old[key], new[key]) for key in old)


def test_one_network(released: Path, tmp_path: Path, fsvfm_export: Command) -> None:
    source = ("ckpt=released/checkpoint-0.pth", "heads=2", "decoder_heads=2")
    done = fsvfm_export(*source, "out=t", "which=target")
    assert done.returncode == 0, done.stderr
    assert "missing: the online network" in done.stdout
    assert load_checkpoint(tmp_path / "t").networks() == ("target",)
    (released / "checkpoint-te-0.pth").unlink()
    done = fsvfm_export(*source, "out=u", "which=target")
    assert done.returncode == 1
    assert "has no network 'target'" in done.stderr
    assert not (tmp_path / "u").exists()


def test_errors_are_sentences(released: Path, tmp_path: Path, fsvfm_export: Command) -> None:
    content = torch.load(released / "checkpoint-0.pth", weights_only=False)
    content["model"]["extra.weight"] = torch.ones(1)
    torch.save(content, tmp_path / "odd.pth")
    for words, message in (
        ((), "ckpt=… is missing"),
        (("ckpt=odd.pth", "out=x"), "extra.weight"),
        (("ckpt=zoo:fsvfm_vitb", "out=x"), "https://huggingface.co/Wolowolo/fsfm-3c/resolve/main/pretrained_models"),
        (("ckpt=zoo:fsvfm_vitbb", "out=x"), "did you mean"),
        (("ckpt=odd.pth", "out=x", "format=onnx", "which=all"), "which=all"),
        (("list", "pattern=zzz"), "pattern=zzz"),
    ):
        done = fsvfm_export(*words)
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "x").exists()


@pytest.fixture
def detector(tmp_path: Path) -> Path:
    """A random anti-spoofing detector without the quirk, at `detector`; its scores follow the blue of a picture."""
    torch.manual_seed(0)
    model = {key: MODEL[key] for key in ("name", "image_size", "patch_size", "dim", "depth", "heads")}
    model |= {"image_size": 32, "patch_size": 16}
    tune = {"name": "full", "reduction": 4, "quirk": False}
    network = build_detector(model, tune, ["real", "fake"], task="antispoof")
    torch.nn.init.normal_(network.head.embed.weight, std=0.5)
    meta = {
        "kind": "detector", "task": "antispoof", "model": model, "tune": tune, "class_order": ["real", "fake"],
        "mean": [0.5] * 3, "std": [0.25] * 3,
    }  # fmt: skip
    return save_export(tmp_path / "detector", network.state_dict(), meta)


def test_onnx_with_int8_tells_what_the_auc_does(
    detector: Path, prepared_dir: Path, tmp_path: Path, fsvfm_export: Command
) -> None:
    pytest.importorskip("onnxruntime")
    done = fsvfm_export("ckpt=detector", "out=onnx", "format=onnx", "quantise=int8", f"check={prepared_dir}")
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "onnx").iterdir()) == ["model.int8.onnx", "model.onnx"]
    assert re.search(r"ONNX Runtime agrees with ours: largest difference \d\.\de-\d\d", done.stdout)
    assert "int8 changes score by" in done.stdout
    found = dict(re.findall(r"  (onnx|int8): .*AUC ([\d.]+ % → [\d.]+ % \([+-][\d.]+\))", done.stdout))
    rows = Manifest.read(prepared_dir).select(split="test")
    table = predict_manifest(load_detector_network("detector"), rows, batch_size=8, workers=0, title="test")
    assert table is not None
    auc = 100 * roc_auc_score(table["label"], table["score"])
    assert found["onnx"] == f"{auc:.2f} % → {auc:.2f} % (+0.00)"
    assert found["int8"].startswith(f"{auc:.2f} % → ")
    assert not done.stderr


def test_timm_prints_the_line(detector: Path, tmp_path: Path, fsvfm_export: Command) -> None:
    done = fsvfm_export("ckpt=detector", "out=timm", "format=timm")
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "timm").iterdir()) == ["config.json", "model.safetensors"]
    assert 'checkpoint_path="timm/model.safetensors")' in done.stdout
    assert "left out 4 tensors" in done.stdout  # of the head


def test_torch_export(detector: Path, tmp_path: Path, fsvfm_export: Command) -> None:
    done = fsvfm_export("ckpt=detector", "out=graph", "format=torch_export")
    assert done.returncode == 0, done.stderr
    assert "the file, read again, agrees with ours" in done.stdout
    assert [p.name for p in (tmp_path / "graph").iterdir()] == ["model.pt2"]


def test_the_published_code_scores_antispoofing_without_the_quirk_differently(
    detector: Path, fsvfm_export: Command
) -> None:
    done = fsvfm_export("ckpt=detector", "out=theirs", "format=published")
    assert done.returncode == 0, done.stderr
    assert "note: the published code scores this detector differently" in done.stdout


def test_a_card_is_written_first_and_published_later(detector: Path, tmp_path: Path, fsvfm_export: Command) -> None:
    words = ("ckpt=detector", "out=hub", "push_to_hub=me/mine")
    done = fsvfm_export(*words)
    assert done.returncode == 1
    assert "say it with licence=<SPDX identifier>" in done.stderr
    assert not (tmp_path / "hub").exists() or not any((tmp_path / "hub").iterdir())
    done = fsvfm_export(*words, "licence=apache-2.0", "card_only=true")
    assert done.returncode == 0, done.stderr
    assert "wrote hub/README.md" in done.stdout
    assert (tmp_path / "hub" / "model.safetensors").is_file()
    done = fsvfm_export(*words, "licence=apache-2.0")  # there is no network
    assert done.returncode == 1
    assert "kept hub/README.md" in done.stdout
    assert "hub is complete, but it could not be uploaded to me/mine" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("format=onnx", "quantise=int4"), "expected int8"),
        (("quantise=int8",), "quantise=int8 is for format=onnx"),
        (("format=timm", "check=x"), "check=… compares"),
        (("push_to_hub=mine",), "expected <owner>/<name>"),
        (("push_to_hub=me/mine", "format=onnx"), "leave format=export"),
        (("card_only=true",), "card_only=… belongs to push_to_hub"),
        (("licence=mit",), "licence=… belongs to push_to_hub"),
        (("format=onnx", "check=nowhere"), "nowhere"),
        (("format=torch",), "expected one of export, published, timm, onnx, torch_export"),
    ],
)
def test_impossible_wishes(words: tuple[str, ...], message: str, detector: Path, fsvfm_export: Command) -> None:
    done = fsvfm_export("ckpt=detector", "out=x", *words)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
