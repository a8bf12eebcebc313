"""Files for other programs compute what ours compute; what does not agree is not kept."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import timm
import torch
from torch import Tensor

import fsvfm
from fsvfm import formats
from fsvfm.checkpoint import load_checkpoint, save_export
from fsvfm.errors import CheckpointError, ConfigError, DataError
from fsvfm.formats import (
    Portable,
    change,
    require_agreement,
    timm_arguments,
    write_onnx,
    write_timm,
    write_torch_export,
)
from fsvfm.loaded_detector import LoadedDetector, load_detector_network
from fsvfm.metrics.calibration import apply_temperature, calibrate
from fsvfm.models.detector import build_detector
from fsvfm.models.vit import SIZES, ViTConfig, create_backbone

MODEL = {"name": "vit_test", "image_size": 32, "patch_size": 16, "dim": 32, "depth": 2, "heads": 4}


def write(folder: Path, *, task: str = "forgery", classes: tuple[str, str] = ("real", "fake"), calibrated: bool = False,
          model: dict[str, Any] = MODEL, **tune: Any) -> Path:  # fmt: skip
    """A detector with random weights everywhere, whose scores differ from picture to picture."""
    torch.manual_seed(0)
    tune = {"name": "full", "reduction": 4, **tune}
    network = build_detector(model, tune, classes, task=task, quirk=tune.get("quirk", False))
    for name, parameter in network.named_parameters():
        torch.nn.init.normal_(parameter, mean=float(name.endswith("norm.weight")), std=0.1)
    torch.nn.init.normal_(network.head.fc.weight, std=3)
    meta: dict[str, Any] = {
        "kind": "detector", "task": task, "model": model, "tune": tune, "class_order": list(classes),
        "mean": [0.5, 0.4, 0.3], "std": [0.25, 0.2, 0.3],
    }  # fmt: skip
    if calibrated:
        scores = np.random.default_rng(0).random(100)
        meta["calibration"] = calibrate(scores, np.arange(100) % 2, source="faces", conformal_alpha=0.1)
    return save_export(folder, network.state_dict(), meta)


def pictures(count: int = 5, size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def load(folder: Path, **options: Any) -> tuple[Portable, LoadedDetector]:
    path = write(folder, **options)
    return Portable.from_checkpoint(load_checkpoint(path)), load_detector_network(str(path))


def normalised(detector: LoadedDetector, images: Tensor) -> Tensor:
    return (images.float() - detector.mean) / detector.std


# --------------------------------------------------------------------------------------------------------------- timm


@pytest.mark.parametrize(
    ("change_of", "tune", "words"),
    [
        ({}, {}, ["img_size=32", "embed_dim=32", "depth=2", "num_heads=4", 'global_pool="avg"']),
        ({"dim": 384, "heads": 12, "depth": 1}, {}, ['"vit_small_patch16_224"', " num_heads=12,"]),
        ({"dim": 192, "heads": 3, "depth": 4}, {"pool": "cls"}, ['"vit_tiny_patch16_224"', 'global_pool="token"']),
        ({"patch_size": 8}, {"name": "adapter"}, ["patch_size=8"]),
    ],
)
def test_timm_gives_our_features_with_the_printed_line(
    change_of: dict[str, Any], tune: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    model, detector = load(tmp_path / "export", model={**MODEL, **change_of}, **tune)
    file = write_timm(tmp_path / "out", model)
    assert all(word in file.line for word in words), file.line
    size = model.image_size
    images = normalised(detector, pictures(2, size))
    with torch.no_grad():
        expected = detector.network.features(images)[0]
        theirs = eval(file.line, {"timm": timm}).eval()  # as a user pastes it
        np.testing.assert_allclose(theirs(images), expected, atol=1e-6)
    assert expected.std() > 0.1
    facts = json.loads((tmp_path / "out" / "config.json").read_text())["pretrained_cfg"]
    assert (facts["mean"], facts["std"], facts["input_size"]) == ([0.5, 0.4, 0.3], [0.25, 0.2, 0.3], [3, size, size])
    with safetensors.safe_open(file.path, "pt") as content:
        assert json.loads(content.metadata()["mean"]) == [0.5, 0.4, 0.3]


def test_timm_reads_the_folder_by_itself(tmp_path: Path) -> None:
    model, detector = load(tmp_path / "export")
    write_timm(tmp_path / "out", model)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = normalised(detector, pictures())
    with torch.no_grad():
        np.testing.assert_allclose(theirs(images), detector.network.features(images)[0], atol=1e-6)
    assert list(timm.data.resolve_model_data_config(theirs)["mean"]) == [0.5, 0.4, 0.3]


def test_timm_names_of_the_papers_sizes() -> None:
    """The base and large models need no further argument; ViT-S has twice the heads of timm's."""
    further = {name: timm_arguments(size)[1] for name, size in SIZES.items()}
    plain = {"num_classes": 0, "global_pool": "avg"}
    assert further["vit_base"] == further["vit_large"] == further["vit_huge"] == plain
    assert further["vit_small"] == {**plain, "num_heads": 12}
    assert further["vit_tiny"] == {**plain, "depth": 4}
    for size in SIZES.values():
        name, arguments = timm_arguments(size)
        with torch.device("meta"):
            theirs, ours = timm.create_model(name, **arguments), create_backbone(size)
        assert theirs.blocks[0].attn.num_heads == size.heads
        shapes = [{k: v.shape for k, v in network.state_dict().items()} for network in (theirs, ours)]
        assert shapes[0] == shapes[1]


# -------------------------------------------------------------------------------------------------------------- graphs

KINDS: list[dict[str, Any]] = [
    {"calibrated": True, "classes": ("fake", "real")},
    {"task": "antispoof", "quirk": True},
    {"task": "antispoof", "name": "adapter", "calibrated": True},
]


def expected_outputs(detector: LoadedDetector, images: Tensor) -> dict[str, np.ndarray]:
    """By the code that evaluation uses, in double precision."""
    scores = detector.score(images).numpy()
    found = {"score": scores}
    if detector.calibration:
        found["probability"] = apply_temperature(scores, detector.calibration["temperature"])
    assert scores.std() > 0.01
    return found


@pytest.mark.parametrize("options", KINDS)
def test_onnx_gives_our_scores_at_any_batch_size(options: dict[str, Any], tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    model, detector = load(tmp_path / "export", **options)
    graphs = write_onnx(tmp_path / "out", model)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.onnx"]
    assert graphs["onnx"].change.largest <= 1e-4
    session = runtime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 2, 5):
        images = pictures(count)
        expected = expected_outputs(detector, pictures())
        names = [output.name for output in session.get_outputs()]
        found = dict(zip(names, session.run(None, {"images": images.numpy()}), strict=True))
        assert found.keys() == expected.keys()
        for name, values in found.items():
            assert values.shape == (count,)
            np.testing.assert_allclose(values, expected[name][:count], atol=1e-4)
    stored = onnx.load(tmp_path / "out" / "model.onnx")
    about = {entry.key: entry.value for entry in stored.metadata_props}
    assert json.loads(about["class_order"]) == list(options.get("classes", ("real", "fake")))
    assert json.loads(about["mean"]) == [0.5, 0.4, 0.3]
    assert ("thresholds" in about) == ("calibrated" in options)
    if "calibrated" in options:
        assert json.loads(about["thresholds"])["eer"] == detector.calibration["thresholds"]["eer"]  # type: ignore[index]
    assert str(Path(formats.__file__).parent).encode() not in (tmp_path / "out" / "model.onnx").read_bytes()


@pytest.mark.parametrize("options", KINDS[1:])
def test_torch_export_gives_our_scores_at_any_batch_size(options: dict[str, Any], tmp_path: Path) -> None:
    model, detector = load(tmp_path / "export", **options)
    write_torch_export(tmp_path / "out", model)
    extra = {"fsvfm.json": ""}
    program = torch.export.load(tmp_path / "out" / "model.pt2", extra_files=extra).module()
    for count in (1, 5):
        found = program(pictures(count))
        for name, values in expected_outputs(detector, pictures()).items():
            np.testing.assert_allclose(found[name].numpy(), values[:count], atol=1e-5)
    assert json.loads(json.loads(extra["fsvfm.json"])["class_order"]) == ["real", "fake"]


def test_int8_is_smaller_and_its_change_is_told(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    model, _ = load(tmp_path / "export", model={**MODEL, "dim": 192, "depth": 1}, calibrated=True)
    graphs = write_onnx(tmp_path / "out", model, int8=True)
    sizes = {name: graph.path.stat().st_size for name, graph in graphs.items()}
    assert sizes["int8"] < 0.6 * sizes["onnx"]
    assert 0 < graphs["int8"].change.mean < 0.1
    assert graphs["int8"].change.largest > graphs["onnx"].change.largest
    images = pictures().numpy()
    ours, theirs = model.run(images), formats.onnx_session(graphs["int8"].path)(images)
    assert 0 < change(ours, theirs).largest < 0.2
    stored = onnx.load(graphs["int8"].path)
    assert (
        sum(node.op_type == "MatMulInteger" for node in stored.graph.node) == 4 + 1
    )  # one block's layers and the head
    about = {entry.key: entry.value for entry in stored.metadata_props}
    assert {"class_order", "mean", "std", "thresholds", "calibration"} <= about.keys()


def test_the_encoder_of_a_pretrained_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pytest.importorskip("onnxruntime")
    state = {f"encoder.{key}": torch.randn_like(tensor) * 0.2
             for key, tensor in create_backbone(ViTConfig(**MODEL), pool="cls").state_dict().items()}  # fmt: skip
    meta = {"kind": "encoder", "task": "pretrain", "model": MODEL, "mean": [0.5] * 3, "std": [0.2] * 3}
    path = save_export(tmp_path / "export", state, meta)
    checkpoint = load_checkpoint(path)
    model = Portable.from_checkpoint(checkpoint)
    faces = pictures()
    expected = fsvfm.load_encoder(str(path)).encode([face.permute(1, 2, 0).numpy() for face in faces])
    np.testing.assert_allclose(model.run(faces.numpy())["features"], expected, atol=1e-6)
    graph = write_onnx(tmp_path / "out", model)["onnx"]
    np.testing.assert_allclose(graph.run(faces.numpy())["features"], expected, atol=1e-4)
    used = set(formats.used_keys(checkpoint))
    assert set(state) - used == {"encoder.norm.weight", "encoder.norm.bias"}


# ---------------------------------------------------------------------------------------------------------- bad inputs


def test_images_of_another_kind_are_refused(tmp_path: Path) -> None:
    model, _ = load(tmp_path / "export")
    for images in (pictures().float() / 255, pictures(size=48), pictures().permute(0, 2, 3, 1), pictures()[0]):
        with pytest.raises(DataError, match=r"uint8 of shape \(B, 3, 32, 32\)"):
            model(images)


def test_what_differs_is_not_kept(tmp_path: Path) -> None:
    model, _ = load(tmp_path / "export")

    def slightly_off(images: np.ndarray) -> dict[str, np.ndarray]:
        return {name: values + 2e-4 for name, values in model.run(images).items()}

    with pytest.raises(CheckpointError, match=r"differs from ours by 0\.0002"):
        require_agreement(model, slightly_off, "onnx")
    with pytest.raises(CheckpointError, match="gives"):
        require_agreement(model, lambda images: {"other": np.zeros(len(images))}, "onnx")
    model.network.head.fc.bias.data.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="not finite"):
        write_torch_export(tmp_path / "out", model)
    assert not (tmp_path / "out").exists()


def test_an_export_of_ours_is_not_overwritten(tmp_path: Path) -> None:
    model, _ = load(tmp_path / "export")
    before = (tmp_path / "export" / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="choose another folder"):
        write_timm(tmp_path / "export", model)
    assert (tmp_path / "export" / "model.safetensors").read_bytes() == before
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        write_timm(tmp_path / "file", model)


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package_is_named(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = load(tmp_path / "export")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"package {package}, (.|\n)*pip install 'fsvfm\[export\]'"):
        write_onnx(tmp_path / "out", model)
    assert not (tmp_path / "out").exists()


def test_writing_a_graph_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model, _ = load(tmp_path / "export", task="antispoof")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    write_torch_export(tmp_path / "out", model)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), key
    assert all(parameter.requires_grad for parameter in model.parameters())
