"""The public functions of the package, and that importing it costs nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

import fsvfm
import miniatures
from fsvfm.errors import CheckpointError, ConfigError, DataError, MaskingError, MetricError
from fsvfm.loaded_detector import load_detector_network
from fsvfm.masking import mask_budget
from tiny_detector import write_detector


def test_importing_brings_no_torch_and_all_names_are_there() -> None:
    script = (
        "import sys, fsvfm\n"
        "heavy = {'torch', 'numpy', 'dlib', 'cv2', 'timm', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert set(fsvfm.__all__) <= set(dir(fsvfm))\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    for name in fsvfm.__all__:
        assert callable(getattr(fsvfm, name))
    with pytest.raises(AttributeError, match="load_everything"):
        fsvfm.load_everything  # noqa: B018


def test_scoring_waits_for_nothing_of_training(tmp_path: Path) -> None:
    folder = write_detector(tmp_path / "export")
    script = (
        "import sys, numpy, fsvfm, fsvfm.scoring\n"
        f"fsvfm.load_detector({str(folder)!r}).predict(numpy.zeros((64, 64, 3), numpy.uint8), crop=False)\n"
        "heavy = {'pytorch_lightning', 'torchmetrics', 'albumentations', 'peft', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_an_encoder_gives_the_detectors_features(tmp_path: Path) -> None:
    folder = write_detector(tmp_path / "export", mean=0.3)
    detector = load_detector_network(str(folder))
    encoder = fsvfm.load_encoder(str(folder))
    faces = [np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8) for seed in range(3)]
    images = torch.from_numpy(np.stack(faces).transpose(0, 3, 1, 2).copy()).float()
    with torch.inference_mode():
        expected = detector.network.features((images - detector.mean) / detector.std)[0]
    np.testing.assert_allclose(encoder.encode(faces), expected, atol=1e-5)
    assert encoder.encode([faces[0], np.zeros((200, 100, 3), np.uint8)]).shape == (2, 32)
    with pytest.raises(CheckpointError):
        fsvfm.load_encoder(str(tmp_path / "nothing"))


def test_models_by_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = fsvfm.create_model("vit_tiny", image_size=32)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, model.embed_dim)
    folder = str(write_detector(tmp_path / "export"))
    fields = {"image_size": 64, "dim": 32, "depth": 2, "heads": 4}
    loaded = fsvfm.create_model("vit_tiny", ckpt=folder, **fields)
    state = load_detector_network(folder).network.backbone.state_dict()
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[key]), key
    with pytest.raises(ConfigError, match="vit_giant"):
        fsvfm.create_model("vit_giant")
    with pytest.raises(CheckpointError, match="dim"):
        fsvfm.create_model("vit_tiny", ckpt=folder, image_size=64)


def test_faces_are_parsed_and_masked(media_dir: Path) -> None:
    faces = miniatures.faces(media_dir)[:2]
    labels = fsvfm.parse_face(faces[0])
    assert labels.shape == faces[0].shape[:2]
    assert {1, 4, 5, 6} <= set(np.unique(labels))
    masks = fsvfm.mask_faces(faces, ratio=0.6, seed=3)
    assert masks.masked.shape == (2, 196)
    assert masks.masked.sum(dim=1).tolist() == [mask_budget(196, 0.6)] * 2
    assert (masks.region <= masks.masked).all()
    again, other = fsvfm.mask_faces(faces, ratio=0.6, seed=3), fsvfm.mask_faces(faces, ratio=0.6, seed=4)
    assert torch.equal(masks.masked, again.masked)
    assert not torch.equal(masks.masked, other.masked)
    blank = np.zeros((64, 64, 3), np.uint8)
    with pytest.raises(DataError, match="no face"):
        fsvfm.parse_face(blank)
    with pytest.raises(DataError, match="picture 1"):
        fsvfm.mask_faces([faces[0], blank])
    with pytest.raises(MaskingError, match="strategy"):
        fsvfm.mask_faces(faces, strategy="all")
    with pytest.raises(ConfigError, match="no faces"):
        fsvfm.mask_faces([])


def test_scores_of_any_detector_are_evaluated() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 60)
    scores = np.clip(rng.normal(0.4 + 0.2 * labels, 0.2), 0, 1)
    videos = np.arange(60) // 3 + 100 * labels
    found = fsvfm.evaluate_scores(scores, labels, videos=videos, methods=np.where(labels, "x", "real"), replicates=20)
    assert found["frame"]["metrics"]["auc"]["value"] == pytest.approx(roc_auc_score(labels, scores))
    assert found["video"]["n"] == len(np.unique(videos))
    assert set(found["method"]) == {"x"}
    assert "hter" in fsvfm.evaluate_scores(scores, labels, task="antispoof", replicates=0)["video"]["metrics"]
    with pytest.raises(MetricError, match="59"):
        fsvfm.evaluate_scores(scores, labels[:-1])
    with pytest.raises(ConfigError, match="task"):
        fsvfm.evaluate_scores(scores, labels, task="retrieval")
