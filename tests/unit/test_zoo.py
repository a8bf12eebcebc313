"""The zoo's table, how names become files, and what is said when there is no connection."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fsvfm import zoo
from fsvfm.checkpoint import load_checkpoint
from fsvfm.errors import CheckpointError
from fsvfm.models.detector import build_detector
from fsvfm.published import to_published

VIT = {"name": "custom", "image_size": 16, "patch_size": 4, "dim": 8, "depth": 1, "heads": 2}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No test may reach the network; files put by hand lie in a folder of the test."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("FSVFM_WEIGHTS", str(tmp_path / "weights"))
    return tmp_path / "weights" / zoo.REPOSITORY


def put(folder: Path, file: str, content: Any = None) -> Path:
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content if content is not None else {}, path)
    return path


def published_detector() -> dict[str, Any]:
    network = build_detector(VIT, {"name": "full"}, ["fake", "real"])
    return {"model": to_published(network.state_dict(), "finetuned"), "epoch": 4}


def test_every_released_checkpoint_is_listed() -> None:
    files = [entry.file for entry in zoo.ZOO.values()]
    assert len(set(files)) == len(files) == 25
    pretrained = [e for e in zoo.ZOO.values() if e.task == "pretrain"]
    assert {e.file for e in pretrained} == {
        "pretrained_models/VF2_ViT-B/checkpoint-400.pth",
        "pretrained_models/FS-VFM_ViT-S_VF2_600e/checkpoint-599.pth",
        "pretrained_models/FS-VFM_ViT-B_VF2_600e/checkpoint-600.pth",
        "pretrained_models/FS-VFM_ViT-L_VF2_600e/checkpoint-599.pth",
    }
    assert "pretrained_models/FS-VFM_ViT-S_VF2_600e/checkpoint-te-599.pth" in {e.target_file for e in pretrained}
    extensions = "finetuned_models/FS-VFM_extensions"
    for size in "SBL":
        model = f"ViT-{size}_VF2_600e"
        for folder in (
            f"cross_dataset_DFD_and_DiFF/{model}/FT_on_FF++_c23_32frames",
            f"cross_dataset_DFD_and_DiFF/{model}/FT_on_FF++_DF_c23_32frames",
            f"cross_domain_FAS/{model}/MCIO_protocol",
            f"finetune_fs-adapter/cross_dataset_DfD_and_DiFF/{model}/FT_on_FF++_c23_32frames",
            f"finetune_fs-adapter/cross_dataset_DfD_and_DiFF/{model}/FT_on_FF++_DF_c23_32frames",
            f"finetune_fs-adapter/cross_domain_FAS/{model}/MCIO_protocol",
        ):
            assert f"{extensions}/{folder}" in files
    for folder in ("FF++_c23_32frames", "FF++_DF_c23_32frames/correct_version", "MCIO_protocol"):
        assert f"finetuned_models/{folder}" in files


def test_entries_are_complete() -> None:
    for name, entry in zoo.ZOO.items():
        assert name == entry.name
        assert entry.licence == "CC BY-NC 4.0"
        assert entry.mean == pytest.approx((0.5482, 0.4234, 0.3655), abs=1e-4)
        assert entry.std == pytest.approx((0.2789, 0.2439, 0.2349), abs=1e-4)
        assert entry.class_order == (None if entry.kind == "pretrain" else ("fake", "real"))
        assert entry.size in ("vit_small", "vit_base", "vit_large")


def test_patterns_and_suggestions() -> None:
    assert {e.name for e in zoo.list_zoo("*vits*")} == {n for n in zoo.ZOO if "vits" in n}
    assert zoo.list_zoo("nothing*") == []
    assert zoo.find("fsfm_vitb").epochs == 400
    with pytest.raises(CheckpointError, match=r"did you mean.*fsvfm_vitb_dfd"):
        zoo.find("fsvfm_vitb_dfdd")
    with pytest.raises(CheckpointError, match="fsfm_vitb"):
        zoo.find("")


@pytest.mark.parametrize(
    "source", ["zoo:fsfm_vitb", f"hf://{zoo.REPOSITORY}/pretrained_models/VF2_ViT-B/checkpoint-400.pth"]
)
def test_offline_message_says_file_address_and_place(source: str, offline: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(source)
    message, file = str(caught.value), "pretrained_models/VF2_ViT-B/checkpoint-400.pth"
    assert f"https://huggingface.co/{zoo.REPOSITORY}/resolve/main/{file}" in message
    assert str(offline / file) in message


def test_offline_message_for_a_folder() -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint-min_val_loss\.pth"):
        zoo.resolve("zoo:fsvfm_vitb_dfd")


def test_files_put_by_hand_are_found_with_their_company(offline: Path) -> None:
    entry = zoo.find("fsvfm_vits")
    put(offline, entry.file)
    found = zoo.resolve("zoo:fsvfm_vits")
    assert found.path == offline / entry.file
    assert found.entry == entry
    assert any("checkpoint-te-599.pth" in note for note in found.notes)
    put(offline, str(entry.target_file))
    (offline / str(entry.stats_file)).write_text("{}")
    assert zoo.resolve(f"hf://{zoo.REPOSITORY}/{entry.file}").notes == ()
    assert zoo.resolve(f"hf://{zoo.REPOSITORY}/{entry.file}").entry == entry


def test_zoo_statistics_fill_in_for_an_absent_file(offline: Path) -> None:
    put(offline, f"{zoo.find('fsvfm_vitb_dfd').file}/checkpoint.pth", published_detector())
    loaded = load_checkpoint("zoo:fsvfm_vitb_dfd", heads=2)
    assert tuple(loaded.meta["mean"]) == zoo.VGGFACE2_MEAN
    assert loaded.meta["class_order"] == ["fake", "real"]
    assert loaded.meta["provenance"]["licence"] == "CC BY-NC 4.0"
    assert any("zoo entry fsvfm_vitb_dfd" in note for note in loaded.notes)
    # A file beside the weights says more than the table.
    stats = offline / zoo.find("fsvfm_vitb_dfd").file / zoo.STATS_FILE
    stats.write_text(json.dumps({"mean": [0.1, 0.2, 0.3], "std": [0.1, 0.1, 0.1]}))
    assert load_checkpoint("zoo:fsvfm_vitb_dfd", heads=2).meta["mean"] == [0.1, 0.2, 0.3]


def test_hub_cache_is_used_offline(tmp_path: Path) -> None:
    entry = zoo.find("fsvfm_vitb_dfd")
    cache = tmp_path / "hub" / f"models--{zoo.REPOSITORY.replace('/', '--')}"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("a" * 40)
    file = put(cache / "snapshots" / ("a" * 40), f"{entry.file}/checkpoint-min_val_loss.pth", published_detector())
    assert zoo.resolve("zoo:fsvfm_vitb_dfd").path == file


FOLDER = "finetuned_models/x"


@pytest.mark.parametrize(
    ("names", "part", "chosen"),
    [
        (["checkpoint.pth", "log.txt"], "", "checkpoint.pth"),
        (["checkpoint.pth", "checkpoint-min_val_loss.pth", "checkpoint-9.pth"], "", "checkpoint-min_val_loss.pth"),
        (["old/checkpoint.pth", "checkpoint.pth"], "", "checkpoint.pth"),
        (["msu_run_0.pth.tar", "casia_run_0.pth.tar"], "MSU", "msu_run_0.pth.tar"),
        (["only_one.pth.tar", "README.md"], "", "only_one.pth.tar"),
        (["O/checkpoint.pth", "M/checkpoint.pth"], "m/", "M/checkpoint.pth"),
        (["model.json", "model.safetensors"], "", "model.safetensors"),
    ],
)
def test_the_file_of_a_folder(names: list[str], part: str, chosen: str) -> None:
    files = ["elsewhere/checkpoint.pth", f"{FOLDER}y/checkpoint.pth", *(f"{FOLDER}/{name}" for name in names)]
    assert zoo.choose_file(files, FOLDER, part) == f"{FOLDER}/{chosen}"


def test_several_or_no_files_are_explained() -> None:
    files = [f"{FOLDER}/{name}_run_0.pth.tar" for name in ("msu", "casia")]
    with pytest.raises(CheckpointError, match=r"several(.|\n)*msu_run_0(.|\n)*casia_run_0"):
        zoo.choose_file(files, FOLDER)
    with pytest.raises(CheckpointError, match=r"'oulu'(.|\n)*msu_run_0"):
        zoo.choose_file(files, FOLDER, "oulu")
    with pytest.raises(CheckpointError, match="none"):
        zoo.choose_file([], FOLDER)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf://owner-only", "hf://<owner>/<repository>/<file>"),
        ("timm:vit_base", "load_checkpoint"),
        ("fsvfm_vitb", "zoo:fsvfm_vitb"),
        ("/no/such/file.pth", "no checkpoint at"),
        ("zoo:fsvfm_vitb/part", "single file"),
    ],
)
def test_sources_that_are_none(source: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        zoo.resolve(source)


def test_local_exports_are_listed_and_others_are_not(tmp_path: Path) -> None:
    meta = {
        "model": {"name": "vit_tiny"}, "task": "forgery", "kind": "detector", "mean": [0.5] * 3, "std": [0.2] * 3,
        "class_order": ["real", "fake"], "provenance": {"epoch": 9}, "tune": {"name": "lora"},
    }  # fmt: skip
    for name, content in (("a/export", meta), ("b", {"other": "program"}), ("c", [1])):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "model.json").write_text(json.dumps(content))
    (entry,) = zoo.local_exports(tmp_path / "runs")
    assert (entry.size, entry.epochs, entry.class_order) == ("vit_tiny", 9, ("real", "fake"))
    assert entry.tuning == "forgery, lora"
    assert (zoo.find("fsvfm_vitb").tuning, zoo.find("fsvfm_vitb_dfd_adapter").tuning) == ("pretrain", "DfD, adapter")
    assert Path(entry.name) == tmp_path / "runs" / "a" / "export"
    assert zoo.list_zoo("*", tmp_path / "runs")[-1] == entry
    assert zoo.local_exports(tmp_path / "absent") == []
