"""Downstream networks and metrics against numbers recorded from the published implementation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fsvfm.losses import real_anchor_contrastive
from fsvfm.metrics.antispoof import antispoof_metrics
from fsvfm.metrics.forgery import metric, video_scores
from fsvfm.models.detector import Detector, build_detector
from fsvfm.models.heads import FASHead
from fsvfm.models.vit import ViTConfig

HEADS = 4  # attention heads cannot be read from shapes; the recording's description states them
CLOSE = {"rtol": 1e-5, "atol": 2e-6}
Arrays = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def arrays(golden_dir: Path) -> Arrays:
    with np.load(golden_dir / "downstream_networks.npz") as data:
        return {name: torch.from_numpy(np.asarray(data[name])) for name in data.files}


@pytest.fixture(scope="module")
def tables(golden_dir: Path) -> dict:
    return json.loads((golden_dir / "tables.json").read_text())


def part(arrays: Arrays, prefix: str) -> Arrays:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


RENAMED = {
    "head.": "head.fc.", "adapter.linear1.": "head.adapter.down.", "adapter.linear2.": "head.adapter.up.",
    "projector.": "head.projection.",
}  # fmt: skip


def detector(arrays: Arrays, prefix: str, tune: str) -> Detector:
    """A detector with recorded weights; every recorded key must find its place and nothing may stay random."""
    weights = part(arrays, prefix)
    dim, _, patch, _ = weights["patch_embed.proj.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    config = ViTConfig(
        "recorded", image_size=arrays["image"].shape[-1], patch_size=patch, dim=dim, depth=depth, heads=HEADS
    )
    state = {}
    for name, value in weights.items():
        old = next((old for old in RENAMED if name.startswith(old)), None)
        state[RENAMED[old] + name.removeprefix(old) if old else f"backbone.{name}"] = value
    net = build_detector(config, {"name": tune, "drop_path": 0.1}, ["real", "fake"])
    net.load_state_dict(state, strict=True)
    return net.eval()


def fas_head(arrays: Arrays, embedder: str, classifier: str, *, quirk: bool, dim: int) -> FASHead:
    embed, fc = part(arrays, f"{embedder}/bottleneck_layer_fc."), part(arrays, f"{classifier}/classifier_layer.")
    width, inputs = embed["weight"].shape
    head = FASHead(dim, classes=len(fc["weight"]), reduction=4 if inputs == 2 * dim else None, quirk=quirk, width=width)
    head.embed.load_state_dict(embed, strict=True)
    head.fc.load_state_dict(fc, strict=True)
    return head.eval()


@torch.no_grad()
def test_vit_with_linear_head(arrays):
    net = detector(arrays, "vit/", "full")
    torch.testing.assert_close(net.features(arrays["image"])[0], arrays["vit_features"], **CLOSE)
    torch.testing.assert_close(net(arrays["image"]).logits, arrays["vit_logits"], **CLOSE)


@torch.no_grad()
def test_fs_adapter(arrays):
    output = detector(arrays, "adapter/", "adapter")(arrays["image"])
    torch.testing.assert_close(output.logits, arrays["adapter_logits"], **CLOSE)
    torch.testing.assert_close(output.projection, arrays["adapter_projection"], **CLOSE)


@torch.no_grad()
def test_real_anchor_loss_on_the_adapters_projection(arrays):
    projection = detector(arrays, "adapter/", "adapter")(arrays["image"]).projection
    loss = real_anchor_contrastive(projection, arrays["labels"], real_class=0)
    torch.testing.assert_close(loss, arrays["real_anchor_loss"], rtol=2e-5, atol=1e-6)


@torch.no_grad()
def test_anti_spoofing_head_on_features(arrays):
    dim = arrays["fas_in"].shape[1] // 2
    head = fas_head(arrays, "fas_embedder", "fas_classifier_before", quirk=False, dim=dim)
    embedding = head.embedding(arrays["fas_in"])
    torch.testing.assert_close(embedding, arrays["fas_embedding"], **CLOSE)
    before = head.fc.weight.clone()
    torch.testing.assert_close(head.classify(embedding), arrays["fas_logits"], **CLOSE)
    assert torch.equal(head.fc.weight, before)  # only training changes it
    torch.testing.assert_close(head.train().classify(embedding), arrays["fas_logits"], **CLOSE)
    torch.testing.assert_close(head.fc.weight, arrays["fas_classifier_after/classifier_layer.weight"], **CLOSE)


@torch.no_grad()
def test_anti_spoofing_head_on_the_token_sequence(arrays):
    net = detector(arrays, "vit/", "full")
    dim = arrays["fas_full_embedder/bottleneck_layer_fc.weight"].shape[1]
    for quirk in (True, False):
        head = fas_head(arrays, "fas_full_embedder", "fas_classifier_after", quirk=quirk, dim=dim)
        logits = head(*net.features(arrays["image"])).logits
        close = torch.allclose(logits, arrays["fas_full_logits"], rtol=1e-5, atol=1e-5)
        assert close == quirk, "the recorded numbers come from the norm over tokens, and from no other"


def test_detection_metrics(tables):
    recorded = tables["detection_metrics"]
    scores, labels = recorded["scores"], recorded["labels"]
    _, means, truth = video_scores(scores, recorded["videos"], labels)
    # A root finder made the recorded EER; its tolerance is what is allowed here.
    expected = {"auc": 100, "balanced_acc": 100, "acc": 100, "eer": 1}
    names = {"auc": "auc", "balanced_acc": "balanced_accuracy", "acc": "accuracy", "eer": "eer"}
    checked = 0
    for level, (s, y) in {"frame": (scores, labels), "video": (means, truth)}.items():
        for name, scale in expected.items():
            if f"{level}_{name}" in recorded:
                got = scale * metric(names[name], s, y)
                assert got == pytest.approx(recorded[f"{level}_{name}"], rel=1e-9, abs=1e-9), (level, name)
                checked += 1
    assert checked >= 7


def test_anti_spoofing_metrics(tables):
    recorded = tables["fas_metrics"]
    got = antispoof_metrics(recorded["real_scores"], recorded["is_real"])
    assert got.threshold == pytest.approx(recorded["threshold_at_eer"], abs=1e-9)
    assert got.hter == pytest.approx(recorded["hter_at_eer_threshold"], rel=1e-9)
    assert got.hter == pytest.approx(recorded["eer"], rel=1e-9)
    assert got.auc == pytest.approx(recorded["auc"], rel=1e-9)
    assert got.tpr_at_fpr_1 == pytest.approx(recorded["tpr_at_fpr_1pct"], rel=1e-9)
    assert got.accuracy == pytest.approx(recorded["acc_at_threshold"], rel=1e-9)
