"""Models for the hub: back in three lines, with a card that says what is known and a licence that follows."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import PyTorchModelHubMixin

import fsvfm
from fsvfm import hub
from fsvfm.checkpoint import load_checkpoint
from fsvfm.errors import CheckpointError, ConfigError
from fsvfm.exports import save_export
from fsvfm.hub import FaceModel, Licence, choose_licence, inherited_licence, read_run, upload, write_folder
from fsvfm.loaded_detector import load_detector_network
from fsvfm.metrics.calibration import apply_temperature, calibrate
from fsvfm.metrics.forgery import summarise
from fsvfm.models.detector import build_detector
from fsvfm.models.pretrain_net import build_networks
from fsvfm.report_tables import percent, write_tables

MODEL = {"name": "vit_test", "image_size": 32, "patch_size": 16, "dim": 32, "depth": 2, "heads": 4}
TUNE = {"name": "full", "drop_path": 0.0, "pool": "avg"}
FREE = Licence("apache-2.0", "chosen")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test may reach the network, nor use an account of this machine."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("FSVFM_WEIGHTS", str(tmp_path / "weights"))


def trained(init: str | None = None, **more: Any) -> dict[str, Any]:
    return {"source": "best.ckpt", "layout": "lightning", "hyper_parameters": {"model": {"init": init}}, **more}


def write_detector(folder: Path, provenance: dict[str, Any] | None = None, *, calibrated: bool = True) -> Path:
    torch.manual_seed(0)
    network = build_detector(MODEL, TUNE, ["fake", "real"])
    torch.nn.init.normal_(network.head.fc.weight, std=1)
    meta: dict[str, Any] = {
        "kind": "detector", "task": "forgery", "model": MODEL, "tune": TUNE, "class_order": ["fake", "real"],
        "mean": [0.5, 0.4, 0.3], "std": [0.25, 0.2, 0.3], "provenance": provenance or trained(),
    }  # fmt: skip
    if calibrated:
        scores, labels = np.random.default_rng(0).random(60), np.arange(60) % 2
        meta["calibration"] = calibrate(scores, labels, source="validation faces of /home/me/data/set", level="frame")
    return save_export(folder, network.state_dict(), meta)


def pictures(count: int = 4) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------------------- there and back


def test_a_folder_for_the_hub_loads_in_three_lines(tmp_path: Path) -> None:
    export = write_detector(tmp_path / "run" / "export")
    written, new = write_folder(tmp_path / "folder", load_checkpoint(export), "me/mine", FREE)
    assert new
    assert sorted(path.name for path in written) == sorted(hub.FILES)
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == sorted(hub.FILES)
    expected = load_detector_network(str(export))
    score = expected.score(pictures()).numpy()
    for source in (tmp_path / "folder", str(tmp_path / "folder"), export, tmp_path / "run"):
        model = FaceModel.from_pretrained(source)
        assert isinstance(model, PyTorchModelHubMixin)
        assert not model.training
        found = model(pictures())
        np.testing.assert_allclose(found["score"].detach(), score, atol=1e-6)
        assert expected.calibration
        calibrated = apply_temperature(score, expected.calibration["temperature"])
        np.testing.assert_allclose(found["probability"].detach(), calibrated, atol=1e-6)
    # Everything else here reads the folder, too.
    assert torch.equal(load_detector_network(str(tmp_path / "folder")).score(pictures()), torch.from_numpy(score))


def test_saved_again_with_the_weights_as_they_are_now(tmp_path: Path) -> None:
    model = FaceModel.from_pretrained(write_detector(tmp_path / "run" / "export"))
    with torch.no_grad():
        model.network.head.fc.bias.add_(torch.tensor([1.0, 0.0]))
    model.save_pretrained(tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == sorted(hub.FILES)
    again = FaceModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(pictures())["score"], model(pictures())["score"])
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["architecture"] == "vit_test"


def test_a_pretrained_model_is_its_online_encoder(tmp_path: Path) -> None:
    layers = {
        "representation_decoder": {"depth": 1, "heads": 2, "pos_embed": "sincos"},
        "pixel_decoder": {"dim": 16, "depth": 1, "heads": 2}, "projection": {"hidden": 8, "out": 4},
    }  # fmt: skip
    online, target = build_networks({**MODEL, **layers})
    state = {f"{n}.{k}": t for n, net in (("online", online), ("target", target)) for k, t in net.state_dict().items()}
    state = {key: tensor + 0.1 * torch.randn_like(tensor) for key, tensor in state.items()}
    meta = {"kind": "pretrain", "task": "pretrain", "model": {**MODEL, **layers}, "mean": [0.5] * 3, "std": [0.2] * 3}
    export = save_export(tmp_path / "export", state, meta)
    write_folder(tmp_path / "folder", load_checkpoint(export), "me/mine", FREE)
    assert load_checkpoint(tmp_path / "folder").networks() == ("online", "target")  # pre-training can go on from it
    model = FaceModel.from_pretrained(tmp_path / "folder")
    faces = [face.permute(1, 2, 0).numpy() for face in pictures()]
    expected = fsvfm.load_encoder(str(export)).encode(faces)
    np.testing.assert_allclose(model(pictures())["features"].detach(), expected, atol=1e-6)
    model.save_pretrained(tmp_path / "encoder")
    np.testing.assert_allclose(fsvfm.load_encoder(str(tmp_path / "encoder")).encode(faces), expected, atol=1e-6)
    readme = (tmp_path / "folder" / "README.md").read_text()
    assert "Thresholds" not in readme
    assert 'model(faces)["features"]' in readme


def test_from_the_hub_by_name(tmp_path: Path) -> None:
    """What was downloaded by hand is found as the download would be."""
    export = write_detector(tmp_path / "run" / "export")
    write_folder(tmp_path / "weights" / "me" / "mine", load_checkpoint(export), "me/mine", FREE)
    found = FaceModel.from_pretrained("me/mine")(pictures())
    assert torch.equal(found["score"], FaceModel.from_pretrained(export)(pictures())["score"])
    # The card's second way.
    detector = load_detector_network("hf://me/mine/model.safetensors")
    np.testing.assert_allclose(detector.score(pictures()), found["score"].detach(), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nobody/nothing", "https://huggingface.co/nobody/nothing/resolve/main/model.safetensors"),
        ("runs/no/such", "no folder here, and not <owner>/<name>"),
        ("word", "no folder here"),
    ],
)
def test_names_of_nothing(name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=words):
        FaceModel.from_pretrained(name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError):
        FaceModel.from_pretrained(tmp_path / "empty")


# ----------------------------------------------------------------------------------------------------------- uploading


class Server(ThreadingHTTPServer):
    """The part of the hub that an upload talks to."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.created: dict[str, Any] = {}
        self.files: dict[str, bytes] = {}


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        answer: dict[str, Any] = {}
        if self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            answer = {"url": f"http://{self.headers['Host']}/me/mine", "id": "me/mine"}
        elif "/preupload/" in self.path:
            answer = {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                                for file in json.loads(body)["files"]]}  # fmt: skip
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {"commitUrl": f"http://{self.headers['Host']}/me/mine/commit/0", "commitOid": "0", "success": True}
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with Server() as running:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{running.server_port}")
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def test_an_upload_brings_the_four_files(tmp_path: Path, server: Server) -> None:
    write_folder(tmp_path / "folder", load_checkpoint(write_detector(tmp_path / "export")), "me/mine", FREE)
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    upload(tmp_path / "folder", "me/mine")
    created = server.created
    assert created.get("private") is True or created.get("visibility") == "private"
    assert server.files == {name: (tmp_path / "folder" / name).read_bytes() for name in hub.FILES}


def test_push_to_hub_brings_the_same(tmp_path: Path, server: Server) -> None:
    model = FaceModel.from_pretrained(write_detector(tmp_path / "export"))
    with pytest.raises(ConfigError, match="licence=<SPDX"):
        model.push_to_hub("me/mine")
    assert not server.files
    model.push_to_hub("me/mine", licence="mit")
    assert set(server.files) == set(hub.FILES)
    readme = server.files["README.md"].decode()
    assert 'from_pretrained("me/mine")' in readme
    assert yaml.safe_load(readme.split("---")[1])["license"] == "mit"


def test_without_a_connection_the_folder_stays(tmp_path: Path) -> None:
    write_folder(tmp_path / "folder", load_checkpoint(write_detector(tmp_path / "export")), "me/mine", FREE)
    with pytest.raises(CheckpointError, match=r"folder is complete, but (.|\n)*hf upload me/mine"):
        upload(tmp_path / "folder", "me/mine")
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == sorted(hub.FILES)


# ---------------------------------------------------------------------------------------------------------------- card


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run with its data set's card, and results of it and, in another file, of another detector."""
    rng = np.random.default_rng(0)
    data = tmp_path / "data" / "mine"
    data.mkdir(parents=True)
    counts = [{"split": split, "label": label, "images": 10 + label, "method": "x", "dataset": "mine"}
              for split in ("train", "test") for label in (0, 1)]  # fmt: skip
    (data / "card.json").write_text(json.dumps({"about": "faces", "licence": "ask its authors", "counts": counts}))
    folder = tmp_path / "runs" / "first"
    write_detector(folder / "export")
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": {"name": "mine", "manifests": [str(data)]}}))
    table = summarise_table(rng)
    for place, label, source in (("test", "first", folder / "export"), ("evaluation", "other", tmp_path / "other")):
        (folder / place).mkdir()
        summary = summarise(table, replicates=20, seed=0)
        made = {"checkpoints": {label: str(source)}, "notes": [f"about {label}"]}
        write_tables(folder / place, {label: {f"{label}_set": summary}}, made=made)
    return folder


def summarise_table(rng: np.random.Generator) -> Any:
    import pandas as pd

    labels = np.arange(60) % 2
    columns = {"label": labels, "score": np.clip(0.4 * labels + 0.6 * rng.random(60), 0, 1)}
    return pd.DataFrame({**columns, "video": np.arange(60).astype(str), "method": "x", "dataset": "mine"})


def test_the_card_says_what_is_known(run: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(run / "export")
    write_folder(tmp_path / "folder", checkpoint, "me/mine", FREE)
    readme = (tmp_path / "folder" / "README.md").read_text()
    front = yaml.safe_load(readme.split("---")[1])
    assert (front["license"], front["library_name"]) == ("apache-2.0", "fsvfm")
    for title in ("Use", "Training data", "Results", "Thresholds", "Intended use", "Limits", "Licence"):
        assert f"\n## {title}\n" in readme
    results = json.loads((run / "test" / "results.json").read_text())["runs"]["first"]["first_set"]
    auc = percent({"metric": "auc", **results["frame"]["metrics"]["auc"]})
    assert "[" in auc  # its interval
    assert f"| mine | first_set | 60 | {auc} |" in readme
    assert "other_set" not in readme  # results of another detector
    assert "> about first" in readme
    assert "- mine: faces; 10 real and 11 fake training images; terms of the data: ask its authors" in readme
    point = checkpoint.meta["calibration"]["thresholds"]["eer"]
    assert f"| EER | {point['threshold']:.6g} | {100 * point['fpr']:.1f} % | {100 * point['fnr']:.1f} % |" in readme
    assert "fitted on validation faces of set." in readme
    assert "trained from scratch" in readme
    for file in ("README.md", "model.json"):
        assert "/home/me" not in (tmp_path / "folder" / file).read_text()
        assert str(tmp_path) not in (tmp_path / "folder" / file).read_text()


def test_a_card_without_results_or_calibration_says_so(tmp_path: Path) -> None:
    export = write_detector(tmp_path / "export", calibrated=False)
    write_folder(tmp_path / "folder", load_checkpoint(export), "me/mine", FREE)
    readme = (tmp_path / "folder" / "README.md").read_text()
    assert "No results lie beside this checkpoint" in readme
    assert "never calibrated" in readme
    assert "- not recorded" in readme


def test_results_of_a_run_that_was_moved_are_still_its_own(run: Path, tmp_path: Path) -> None:
    moved = run.rename(tmp_path / "elsewhere")
    for source in (moved, moved / "export", moved / "export" / "model.safetensors"):
        found = read_run(source, "me")
        assert found.results
        assert list(found.results["me"]) == ["first_set"]
    assert read_run("zoo:fsvfm_vitb", "me").results is None


def test_an_edited_card_is_kept(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(write_detector(tmp_path / "export"))
    write_folder(tmp_path / "folder", checkpoint, "me/mine", FREE)
    readme = tmp_path / "folder" / "README.md"
    readme.write_text(readme.read_text() + "\nI measured it in the rain.\n")
    (tmp_path / "folder" / "model.safetensors").unlink()
    written, new = write_folder(tmp_path / "folder", checkpoint, "me/mine", FREE)
    assert not new
    assert all(path.is_file() for path in written)
    assert "in the rain" in readme.read_text()
    with pytest.raises(ConfigError, match=r"says license: apache-2\.0, but these weights have cc-by-nc-4\.0"):
        write_folder(tmp_path / "folder", checkpoint, "me/mine", Licence("CC BY-NC 4.0", "derived"))


# ------------------------------------------------------------------------------------------------------------- licence


@pytest.mark.parametrize(
    ("provenance", "expected"),
    [
        (trained("zoo:fsvfm_vitb"), "cc-by-nc-4.0"),
        (trained("hf://Wolowolo/fsfm-3c/pretrained_models/x.pth"), "cc-by-nc-4.0"),
        (trained("timm:vit_base_patch16_224.mae"), "cc-by-nc-4.0"),
        (trained("timm:vit_base_patch16_224.augreg_in21k"), "apache-2.0"),
        (trained("/somewhere/checkpoint-600.pth"), "cc-by-nc-4.0"),
        ({"source": "checkpoint.pth", "layout": "finetuned"}, "cc-by-nc-4.0"),
        (trained(None, licence="MIT"), "mit"),
        (trained(None), "unknown"),
        (trained("hf://somebody/else/model.safetensors"), "unknown"),
        (trained("/nowhere/export"), "unknown"),
        ({}, "unknown"),
    ],
)
def test_the_licence_follows_from_the_initial_weights(provenance: dict[str, Any], expected: str) -> None:
    assert inherited_licence({"provenance": provenance}).identifier == expected


def test_the_licence_is_followed_through_our_own_runs(tmp_path: Path) -> None:
    first = write_detector(tmp_path / "first" / "export", trained("zoo:fsvfm_vitb"))
    second = write_detector(tmp_path / "second" / "export", trained(str(tmp_path / "first")))
    third = load_checkpoint(write_detector(tmp_path / "third" / "export", trained(str(second))))
    assert inherited_licence(third.meta).name == "CC BY-NC 4.0"
    circle = write_detector(tmp_path / "circle", trained(str(tmp_path / "circle")))
    assert inherited_licence(load_checkpoint(circle).meta).name is None
    # It is recorded in what is published, so that it can be followed from there.
    licence = choose_licence(third.meta, None, needed=True)
    write_folder(tmp_path / "folder", third, "me/mine", licence)
    again = inherited_licence(load_checkpoint(tmp_path / "folder").meta)
    assert again.name == "CC BY-NC 4.0"
    assert first.is_dir()


def test_a_licence_cannot_be_chosen_against_the_inherited_one(tmp_path: Path) -> None:
    derived, own = {"provenance": trained("zoo:fsvfm_vitb")}, {"provenance": trained()}
    with pytest.raises(ConfigError, match=r"licence=apache-2\.0: these weights have CC BY-NC 4\.0"):
        choose_licence(derived, "apache-2.0", needed=True)
    assert choose_licence(derived, "cc-by-nc-4.0", needed=True).name == "CC BY-NC 4.0"
    assert choose_licence(own, "apache-2.0", needed=True).name == "apache-2.0"
    assert choose_licence(own, None, needed=False).name is None
    with pytest.raises(ConfigError, match="trained from scratch"):
        choose_licence(own, None, needed=True)
