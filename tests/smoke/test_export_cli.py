"""`python -m fsvfm.export` as a user runs it."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fsvfm import export
from fsvfm.checkpoint import load_checkpoint, write_published
from fsvfm.exports import save_export
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
