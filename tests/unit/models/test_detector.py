"""Detectors: what trains, what stays, and what the classes mean."""

from __future__ import annotations

import hashlib

import pytest
import torch
from timm.layers import DropPath

from fsvfm.errors import ConfigError
from fsvfm.models.detector import build_detector, class_targets, fake_probability
from fsvfm.models.heads import AdapterHead, FASHead
from fsvfm.models.vit import ViTConfig, vit_config

ORDER = ["real", "fake"]
TINY = ViTConfig("tiny", image_size=32, patch_size=8, dim=32, depth=3, heads=2)
TUNES = {
    "full": {"name": "full", "drop_path": 0.1},
    "adapter": {"name": "adapter", "drop_path": 0.1, "frozen_drop_path": True},
    "linear": {"name": "linear", "drop_path": 0.0, "frozen_drop_path": False},
}


def digest(module: torch.nn.Module) -> str:
    blob = hashlib.sha256()
    for name, value in module.state_dict().items():
        blob.update(name.encode() + value.numpy().tobytes())
    return blob.hexdigest()


@pytest.mark.parametrize(
    ("name", "forgery", "antispoof"),
    [("vit_small", 84_578, 477_794), ("vit_base", 335_042, 1_119_938), ("vit_large", 594_178, 1_640_194)],
)
def test_adapter_trains_exactly_the_papers_number_of_parameters(name, forgery, antispoof):
    with torch.device("meta"):
        assert build_detector(vit_config(name), TUNES["adapter"], ORDER).trainable_parameters() == forgery
        fas = build_detector(vit_config(name), TUNES["adapter"], ORDER, task="antispoof")
        assert fas.trainable_parameters() == antispoof


@pytest.mark.parametrize("tune", ["full", "adapter", "linear"])
def test_training_changes_what_it_should_and_nothing_else(tune):
    torch.manual_seed(0)
    detector = build_detector(TINY, TUNES[tune], ORDER).train()
    backbone, head = digest(detector.backbone), digest(detector.head)
    optimiser = torch.optim.AdamW([p for p in detector.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        output = detector(torch.randn(4, 3, 32, 32))
        loss = torch.nn.functional.cross_entropy(output.logits, torch.tensor([0, 1, 0, 1]))
        if output.projection is not None:
            loss = loss + output.projection[:, 0].mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert (digest(detector.backbone) == backbone) == (tune != "full")
    assert digest(detector.head) != head
    assert all(p.grad is None for p in detector.backbone.parameters()) == (tune != "full")


def test_frozen_backbone_is_in_evaluation_mode_but_for_the_drop_path_that_was_asked_for():
    for tune, active in (("full", True), ("adapter", True), ("linear", False)):
        detector = build_detector(TINY, {**TUNES[tune], "drop_path": 0.3}, ORDER)
        for mode in (True, False, True):
            detector.train(mode)
            drops = [m.training for m in detector.backbone.modules() if isinstance(m, DropPath)]
            assert drops
            assert all(d == (mode and active) for d in drops)
            assert detector.head.training == mode
            assert detector.backbone.fc_norm.training == (mode and tune == "full")


def test_frozen_drop_path_varies_training_features_and_only_those():
    images = torch.randn(8, 3, 32, 32)
    for keep in (True, False):
        tune = {"name": "adapter", "drop_path": 0.5, "frozen_drop_path": keep}
        detector = build_detector(TINY, tune, ORDER).train()
        assert torch.equal(detector.features(images)[0], detector.features(images)[0]) != keep
        detector.eval()
        assert torch.equal(detector.features(images)[0], detector.features(images)[0])


def test_state_dict_has_the_documented_keys():
    keys = {
        "full": {"head.fc.weight", "head.fc.bias"},
        "adapter": {
            "head.adapter.down.weight", "head.adapter.up.weight", "head.projection.weight", "head.projection.bias",
            "head.fc.weight", "head.fc.bias",
        },
    }  # fmt: skip
    for tune, expected in keys.items():
        state = build_detector(TINY, TUNES[tune], ORDER).state_dict()
        assert {k for k in state if k.startswith("head.")} == expected
        assert {"backbone.cls_token", "backbone.pos_embed", "backbone.fc_norm.weight"} <= set(state)
        assert not any(k.startswith("backbone.norm.") for k in state)
    fas = build_detector(TINY, TUNES["full"], ORDER, task="antispoof").state_dict()
    assert {k for k in fas if k.startswith("head.")} == {
        "head.embed.weight", "head.embed.bias", "head.fc.weight", "head.fc.bias"
    }  # fmt: skip


def test_pooled_feature_is_the_normed_mean_of_patches_without_cls():
    detector = build_detector(TINY, TUNES["full"], ORDER).eval()
    torch.nn.init.normal_(detector.backbone.fc_norm.weight)
    feature, tokens = detector.features(torch.randn(2, 3, 32, 32))
    mean = tokens[:, 1:].mean(1)
    norm = detector.backbone.fc_norm
    expected = (mean - mean.mean(-1, keepdim=True)) / (mean.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(feature, expected * norm.weight + norm.bias)


def test_new_heads_start_undecided():
    images = torch.randn(4, 3, 32, 32)
    for tune in TUNES.values():
        scores = build_detector(TINY, tune, ORDER).eval().scores(images)
        torch.testing.assert_close(scores, torch.full((4,), 0.5), atol=1e-3, rtol=0)


def test_fake_probability_follows_the_stored_order():
    logits = torch.tensor([[2.0, -1.0], [0.0, 3.0]], dtype=torch.float64)
    probability = torch.softmax(logits, -1).float()
    torch.testing.assert_close(fake_probability(logits, ["real", "fake"]), probability[:, 1])
    torch.testing.assert_close(fake_probability(logits, ["fake", "real"]), probability[:, 0])
    labels = torch.tensor([0, 1, 1])
    assert class_targets(labels, ["real", "fake"]).tolist() == [0, 1, 1]
    assert class_targets(labels, ["fake", "real"]).tolist() == [1, 0, 0]


@pytest.mark.parametrize("order", [["real", "fake"], ["fake", "real"]])
def test_training_in_either_order_gives_high_scores_to_fakes(order):
    torch.manual_seed(0)
    labels = torch.tensor([0, 1] * 8)
    images = torch.randn(16, 3, 32, 32) * 0.1 + (labels[:, None, None, None] * 2 - 1)
    detector = build_detector(TINY, TUNES["linear"], order)
    optimiser = torch.optim.Adam(detector.head.parameters(), lr=0.05)
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(detector(images).logits, class_targets(labels, order))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    scores = detector.eval().scores(images)
    assert scores[labels == 1].min() > scores[labels == 0].max()


@pytest.mark.parametrize("order", [[], ["real"], ["real", "real"], ["live", "spoof"], "fake", ["real", "fake", "x"]])
def test_class_order_is_never_guessed(order):
    with pytest.raises(ConfigError, match="class_order"):
        fake_probability(torch.zeros(1, 2), order)
    with pytest.raises(ConfigError, match="class_order"):
        build_detector(TINY, TUNES["full"], order)


def test_bad_requests_are_named():
    with pytest.raises(ConfigError, match=r"tune='prompt'.*full, adapter, linear, lora"):
        build_detector(TINY, {"name": "prompt"}, ORDER)
    with pytest.raises(ConfigError, match="task='segmentation'"):
        build_detector(TINY, TUNES["full"], ORDER, task="segmentation")
    with pytest.raises(ConfigError, match="antispoof only"):
        build_detector(TINY, TUNES["full"], ORDER, quirk=True)
    with pytest.raises(ConfigError, match="reduction=5"):
        build_detector(TINY, {**TUNES["adapter"], "reduction": 5}, ORDER)
    with pytest.raises(ConfigError, match="3 classes"):
        fake_probability(torch.zeros(2, 3), ORDER)
    with pytest.raises(ConfigError, match="quirk"):
        FASHead(8, reduction=4, quirk=True)
    with pytest.raises(ConfigError, match="token sequence"):
        FASHead(8, quirk=True)(torch.zeros(1, 8))


def test_projection_has_unit_length_and_the_head_sees_feature_and_adapted():
    head = AdapterHead(32)
    feature = torch.randn(5, 32)
    output = head(feature)
    assert output.projection.shape == (5, 8)
    torch.testing.assert_close(output.projection.norm(dim=-1), torch.ones(5))
    head.fc.weight.data[:, 32:] = 0  # without the adapted half only the feature speaks
    torch.testing.assert_close(head(feature).logits, feature @ head.fc.weight[:, :32].T + head.fc.bias)


@pytest.mark.parametrize("quirk", [False, True])
def test_anti_spoofing_head_survives_dead_units(quirk):
    head = FASHead(8, quirk=quirk).train()
    torch.nn.init.constant_(head.embed.bias, -100.0)
    feature = torch.randn(2, 8, requires_grad=True)
    loss = head(feature, torch.randn(2, 5, 8)).logits.sum()
    loss.backward()
    assert loss.isfinite()
    assert feature.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in head.parameters())


def test_anti_spoofing_classifier_is_normalised_over_classes_before_each_forward():
    head = FASHead(8, dropout=0)
    torch.nn.init.normal_(head.fc.weight, std=3)
    before, feature = head.fc.weight.clone(), torch.randn(3, 8)
    evaluated = head.eval()(feature).logits
    assert torch.equal(head.fc.weight, before)  # a score must not depend on how often the head was used
    torch.testing.assert_close(head.train()(feature).logits, evaluated)
    losses = [head(torch.randn(3, 8)).logits.sum() for _ in range(2)]  # two forwards, then one backward
    sum(losses).backward()
    torch.testing.assert_close(head.fc.weight.norm(dim=0), torch.ones(512))
