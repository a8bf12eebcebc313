"""P(fake) is P(fake), whoever trained the detector and in whatever order its logits are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fsvfm.checkpoint import load_checkpoint, write_published
from fsvfm.data.manifest import Manifest
from fsvfm.errors import CheckpointError
from fsvfm.evaluation import predict_manifest
from fsvfm.exports import save_export
from fsvfm.loaded_detector import load_detector_network
from fsvfm.models.detector import build_detector

DIM = 192  # a width whose number of heads is known: released files do not state it
VIT = {"name": "custom", "image_size": 224, "patch_size": 16, "dim": DIM, "depth": 2, "heads": 3}
STATS = {"mean": [0.55, 0.42, 0.37], "std": [0.28, 0.24, 0.23]}
TUNES = {"full": {"name": "full"}, "adapter": {"name": "adapter", "reduction": 4}, "linear": {"name": "linear"}}


def exported(folder: Path, task: str, tune: str, order: list[str]) -> Path:
    """A detector with fixed random weights whose logits are in this order; the same function for both orders."""
    torch.manual_seed(5)
    network = build_detector(VIT, TUNES[tune], order, task=task)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.05)
    state = network.state_dict()
    nn.init.normal_(state["head.fc.bias"], mean=1.0)
    if order == ["fake", "real"]:
        state |= {key: state[key].flip(0) for key in ("head.fc.weight", "head.fc.bias")}
    meta = {"kind": "detector", "task": task, "model": VIT, "tune": TUNES[tune], "class_order": order, **STATS}
    return save_export(folder, state, meta)


@pytest.mark.parametrize("task", ["forgery", "antispoof"])
@pytest.mark.parametrize("tune", TUNES)
def test_swapped_logits_give_the_same_scores_everywhere(
    tmp_path: Path, prepared_dir: Path, task: str, tune: str
) -> None:
    """Export, released format and back, single images and whole manifests."""
    images = torch.randint(0, 256, (3, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    test = Manifest.read(prepared_dir).select(split="test")
    rows = Manifest(test.table.iloc[:6], test.root)
    found, tables = {}, {}
    for order in (["real", "fake"], ["fake", "real"]):
        folder = exported(tmp_path / f"{order[0]}_first", task, tune, order)
        (file, *_) = write_published(tmp_path / f"{order[0]}_published", load_checkpoint(folder))
        for kind, source in (("export", folder), ("published", file)):
            detector = load_detector_network(str(source))
            assert list(detector.network.class_order) == order
            found[order[0], kind] = detector.score(images)
        table = predict_manifest(detector, rows, batch_size=4, workers=0, title="test")
        tables[order[0]] = table["score"].to_numpy()
    first, *others = found.values()
    assert (first - 0.5).abs().min() > 0.01  # an inverted one would be far away
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=1e-6)
    np.testing.assert_allclose(*tables.values(), rtol=0, atol=1e-6)
    assert np.abs(tables["real"] - 0.5).min() > 0.01


def test_an_order_that_is_not_stored_is_not_guessed(tmp_path: Path) -> None:
    folder = exported(tmp_path / "export", "forgery", "full", ["real", "fake"])
    text = (folder / "model.json").read_text()
    (folder / "model.json").write_text(text.replace('"class_order"', '"classes"'))
    with pytest.raises(CheckpointError, match="class_order"):
        load_detector_network(str(folder))


# --- released files --------------------------------------------------------------------------------------------------


def random_state(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(11)
    return {key: 0.08 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def vit() -> VisionTransformer:
    return VisionTransformer(
        img_size=224, patch_size=16, embed_dim=DIM, depth=2, num_heads=3, num_classes=2, global_pool="avg"
    ).eval()


def released(kind: str, folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """A file as the published code saves it, key names included, and its tensors."""
    fas, adapter = kind.startswith("fas"), kind.endswith("adapter")
    inside = "backbone.vit." if fas else ""
    shapes = {f"{inside}{key}": tuple(t.shape) for key, t in vit().state_dict().items()}
    if adapter:
        shapes |= {
            f"{inside}adapter.linear1.weight": (DIM // 4, DIM),
            f"{inside}adapter.linear2.weight": (DIM, DIM // 4),
        }
        shapes |= {f"{inside}projector.weight": (DIM // 4, DIM // 4), f"{inside}projector.bias": (DIM // 4,)}
        shapes |= {f"{inside}head.weight": (2, 2 * DIM)}
    if kind == "fas":
        shapes = {key: shape for key, shape in shapes.items() if "vit.head" not in key}
    if fas:
        layer, classifier = "embedder.bottleneck_layer_fc.", "classifier.classifier_layer."
        shapes |= {f"{layer}weight": (512, 2 * DIM if adapter else DIM), f"{layer}bias": (512,)}
        shapes |= {f"{classifier}weight": (2, 512), f"{classifier}bias": (2,)}
    state = random_state(shapes)
    content: dict[str, Any] = {"model": state, "epoch": 9}
    if fas:
        copies = {f"embedder.bottleneck_layer.0.{leaf}": state[f"{layer}{leaf}"] for leaf in ("weight", "bias")}
        content = {"epoch": 40, "state_dict": {**state, **copies}, "threshold": np.float64(0.4)}
    folder.mkdir()
    torch.save(content, folder / "checkpoint.pth")
    (folder / "pretrain_ds_mean_std.txt").write_text(f'{{"mean": {STATS["mean"]}, "std": {STATS["std"]}}}\n')
    return folder / "checkpoint.pth", state


def reference(kind: str, state: dict[str, Tensor], image: Tensor) -> Tensor:
    """Logits of the published network on a normalised image, from the papers' formulas and timm's ViT."""
    network = vit()
    inside = "backbone.vit." if kind.startswith("fas") else ""
    network.load_state_dict({key: state.get(f"{inside}{key}", t) for key, t in network.state_dict().items()
                             if not key.startswith("head.")}, strict=False)  # fmt: skip
    tokens = network.forward_features(image)  # without a last norm: it stands behind the pooling
    norm = network.fc_norm
    feature = F.layer_norm(tokens[:, 1:].mean(1), (DIM,), norm.weight, norm.bias, 1e-6)
    if kind.endswith("adapter"):
        hidden = F.relu(feature @ state[f"{inside}adapter.linear1.weight"].T)
        adapted = F.relu(hidden @ state[f"{inside}adapter.linear2.weight"].T)
        feature = torch.cat([feature, adapted], dim=1)
    if not kind.startswith("fas"):
        return F.linear(feature, state["head.weight"], state["head.bias"])
    embedder = [state[f"embedder.bottleneck_layer_fc.{leaf}"] for leaf in ("weight", "bias")]
    weight, bias = (state[f"classifier.classifier_layer.{leaf}"] for leaf in ("weight", "bias"))
    # Full fine-tuning runs the token sequence through the embedder and normalises over its positions.
    inputs = feature if kind == "fas_adapter" else torch.cat([feature[:, None], tokens[:, 1:]], dim=1)
    hidden = F.relu(F.linear(inputs, *embedder))
    hidden = hidden / torch.sqrt(2 * hidden.norm(dim=1, keepdim=True))
    hidden = hidden if kind == "fas_adapter" else hidden[:, 0]
    return F.linear(hidden, weight / weight.norm(dim=0, keepdim=True), bias)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["finetuned", "adapter", "fas", "fas_adapter"])
def test_released_files_score_a_photograph_as_published(tmp_path: Path, media_dir: Path, kind: str) -> None:
    photo = Image.open(sorted((media_dir / "photos").glob("*.jpg"))[0]).convert("RGB")
    pixels = torch.from_numpy(np.array(photo.resize((224, 224), Image.Resampling.BICUBIC))).permute(2, 0, 1)[None]
    file, state = released(kind, tmp_path / "released")
    detector = load_detector_network(str(file))
    normalised = (pixels / 255 - torch.tensor(STATS["mean"]).view(3, 1, 1)) / torch.tensor(STATS["std"]).view(3, 1, 1)
    logits = reference(kind, state, normalised)
    # Published index 1 is "real", index 0 a fake or an attack.
    expected = logits.double().softmax(-1)[:, 0]
    assert abs(float(expected) - 0.5) > 0.005
    torch.testing.assert_close(detector.score(pixels), expected, rtol=0, atol=1e-5)
    assert detector.checkpoint.meta["task"] == ("antispoof" if kind.startswith("fas") else "forgery")
