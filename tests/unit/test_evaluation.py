"""Evaluation: every sample once, the same numbers however the work is dealt out, gaps that stay gaps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from fsvfm import build, evaluation
from fsvfm.checkpoint import save_export
from fsvfm.data.manifest import Manifest
from fsvfm.errors import CheckpointError, ConfigError, DataError
from fsvfm.evaluation import CorruptedFaces, calibrate_export, evaluate, predict_manifest
from fsvfm.loaded_detector import ON_CPU, load_detector_network
from fsvfm.metrics.calibration import apply_temperature
from fsvfm.models.detector import build_detector
from fsvfm.models.vit import ViTConfig
from fsvfm.processes import Processes

TINY = ViTConfig("vit_test", patch_size=16, dim=32, depth=2, heads=4, image_size=64)
TUNE = {"name": "full", "drop_path": 0.0, "frozen_drop_path": False, "reduction": 4, "quirk": False}
CPU = torch.device("cpu")


def write_detector(folder: Path, *, class_order: tuple[str, str] = ("real", "fake"), task: str = "forgery") -> Path:
    """A random detector whose logit difference follows the image's blue channel a little."""
    torch.manual_seed(0)
    network = build_detector(TINY, TUNE, class_order, task=task)
    head = network.head.fc if task == "forgery" else network.head.embed
    torch.nn.init.normal_(head.weight, std=0.5)
    model = {"name": "vit_test", "image_size": 64, "patch_size": 16, "dim": 32, "depth": 2, "heads": 4}
    meta = {
        "kind": "detector", "task": task, "model": model, "tune": TUNE, "class_order": list(class_order),
        "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25],
    }  # fmt: skip
    return save_export(folder, network.state_dict(), meta)


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_detector(tmp_path_factory.mktemp("detector") / "export")


@pytest.fixture
def config(compose_config, prepared_dir: Path, tmp_path: Path) -> DictConfig:
    cfg = compose_config("evaluate", "experiment=demo_dfd", "protocol=demo", "data.workers=0", "evaluate.replicates=50")
    with open_dict(cfg):
        for test in cfg.testsets.values():
            test.manifest = str(prepared_dir)
    return cfg


def test_every_row_is_scored_once_at_any_batch_size_and_share(detector: Path, prepared_dir: Path) -> None:
    loaded = load_detector_network(str(detector))
    manifest = Manifest.read(prepared_dir)
    whole = predict_manifest(loaded, manifest, batch_size=64, workers=0, title="all")
    assert whole is not None
    assert list(whole["path"]) == manifest.paths()
    assert whole["score"].between(0, 1).all()
    assert whole["score"].std() > 1e-3
    for batch_size, workers in ((1, 0), (7, 2), ("auto", 0)):
        again = predict_manifest(loaded, manifest, batch_size=batch_size, workers=workers, title="again")
        assert again is not None
        np.testing.assert_allclose(again["score"], whole["score"], atol=1e-6)
    shares = [list(Processes(rank, 3, CPU).share(len(manifest))) for rank in range(3)]
    assert sorted(row for share in shares for row in share) == list(range(len(manifest)))


class Crowded(torch.nn.Module):
    """A network on a device whose memory takes only so many images."""

    def __init__(self, network: torch.nn.Module, room: int) -> None:
        super().__init__()
        self.network, self.room, self.class_order = network, room, network.class_order
        self.tried: list[int] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.tried.append(len(images))
        if len(images) > self.room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return self.network(images)


def test_a_batch_that_does_not_fit_is_halved_and_the_evaluation_goes_on(detector: Path, prepared_dir: Path) -> None:
    plain, manifest = load_detector_network(str(detector)), Manifest.read(prepared_dir)
    options: dict = {"batch_size": 16, "workers": 0, "title": "x"}
    expected = predict_manifest(plain, manifest, **options)
    loaded = load_detector_network(str(detector))
    loaded.network = crowded = Crowded(loaded.network, 5)
    found = predict_manifest(loaded, manifest, **options)
    assert found is not None
    assert expected is not None
    np.testing.assert_allclose(found["score"], expected["score"], atol=1e-6)
    assert crowded.tried[:4] == [16, 8, 4, 4]
    assert max(crowded.tried[3:]) == 4  # what does not fit is not tried again
    assert sum(crowded.tried[2:]) == len(manifest)
    loaded.network = Crowded(plain.network, 0)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        loaded.score(torch.zeros(3, 3, 64, 64, dtype=torch.uint8))
    assert plain.score(torch.zeros(0, 3, 64, 64, dtype=torch.uint8)).shape == (0,)


def test_batch_sizes(detector: Path) -> None:
    for room, largest in ((64, 64), (40, 16), (3, 1), (1, 1)):  # half of what just fits, where something did not
        loaded = load_detector_network(str(detector))
        loaded.network = Crowded(loaded.network, room)
        assert loaded.largest_batch(64) == largest
    assert loaded.batch_size(7) == 7
    assert loaded.batch_size("auto") == ON_CPU
    for wrong in (0, -1, "many", None):
        with pytest.raises(ConfigError, match=f"auto, or 1 or more, got {wrong}"):
            loaded.batch_size(wrong)


def test_half_precision_is_measured(
    config: DictConfig, detector: Path, prepared_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sklearn.metrics import roc_auc_score

    with open_dict(config):
        config.evaluate.precision = "bf16-mixed"
    evaluate(config, {"mine": str(detector)}, tmp_path / "out")
    half = pd.read_parquet(tmp_path / "out" / "predictions.parquet").query("testset == 'demo_seen'")
    rows = build.testset_rows(config.testsets.demo_seen)
    exact = predict_manifest(load_detector_network(str(detector)), rows, batch_size=9, workers=0, title="x")
    assert exact is not None
    largest = np.abs(half["score"].to_numpy() - exact["score"].to_numpy()).max()
    assert 1e-5 < largest < 0.05
    after, before = (100 * roc_auc_score(table["label"], table["score"]) for table in (half, exact))
    made = json.loads((tmp_path / "out" / "results.json").read_text())["made"]
    (note,) = [text for text in made["notes"] if text.startswith("mine on demo_seen")]
    assert f"bf16-mixed; on {len(rows)} faces" in note
    assert f"by {largest:.2g} at most" in note
    assert f"AUC is {after:.2f} % instead of {before:.2f} % ({after - before:+.2f})" in note
    assert made["precision"] == "bf16-mixed"
    assert note in (tmp_path / "out" / "results.md").read_text()
    # Large test sets: only so many faces; of one class they have no AUC.
    monkeypatch.setattr(evaluation, "_CHECKED", 1)
    evaluate(config, {"mine": str(detector)}, tmp_path / "few")
    notes = json.loads((tmp_path / "few" / "results.json").read_text())["made"]["notes"]
    assert any("on 1 faces" in text and "no AUC" in text for text in notes)
    with pytest.raises(ConfigError, match="precision=16-true"):
        load_detector_network(str(detector), precision="16-true")


def test_a_swapped_class_order_gives_the_same_scores(tmp_path: Path, prepared_dir: Path) -> None:
    plain = load_detector_network(str(write_detector(tmp_path / "a" / "export")))
    swapped_file = write_detector(tmp_path / "b" / "export", class_order=("fake", "real"))
    swapped = load_detector_network(str(swapped_file))
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(swapped.network.head.fc, name).copy_(getattr(plain.network.head.fc, name).flip(0))
    manifest = Manifest.read(prepared_dir)
    scores = [predict_manifest(d, manifest, batch_size=64, workers=0, title="x")["score"] for d in (plain, swapped)]
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-7)
    assert np.abs(scores[0] - 0.5).max() > 0.01  # else an inversion could not be seen


def test_results_tables_and_predictions(config: DictConfig, detector: Path, tmp_path: Path) -> None:
    results = evaluate(config, {"mine": str(detector)}, tmp_path / "out")
    assert set(results["mine"]) == {"demo_seen", "demo_unseen"}
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"results.json", "results.csv", "results.md", "results.tex", "predictions.parquet"} <= names
    table = pd.read_parquet(tmp_path / "out" / "predictions.parquet")
    seen = table[table["testset"] == "demo_seen"]
    assert set(seen["method"]) == {"real", "self_blend"}
    # The metrics can be had again from the predictions alone.
    from sklearn.metrics import roc_auc_score

    again = roc_auc_score(seen["label"], seen["score"])
    assert results["mine"]["demo_seen"]["frame"]["metrics"]["auc"]["value"] == pytest.approx(again)


def test_missing_and_unusable_sets_are_gaps_and_the_mean_is_not_taken_over_the_rest(
    config: DictConfig, detector: Path, prepared_dir: Path, tmp_path: Path
) -> None:
    reals = Manifest.read(prepared_dir).select(label=0)
    one_class = Manifest(reals.table.assign(path=reals.paths(), parse=""), tmp_path)
    one_class.write(tmp_path / "reals.parquet")
    mixed = Manifest.read(prepared_dir).select(split="test")
    Manifest(mixed.table.assign(path=mixed.paths(), video="one", subject="", parse=""), tmp_path).write(
        tmp_path / "mixed.parquet"
    )
    with open_dict(config):
        base = OmegaConf.to_container(config.testsets.demo_seen)
        config.testsets.absent = {**base, "manifest": str(tmp_path / "nowhere")}
        config.testsets.reals = {**base, "manifest": str(tmp_path / "reals.parquet"), "methods": None}
        config.testsets.mixed = {**base, "manifest": str(tmp_path / "mixed.parquet"), "methods": None}
        config.testsets.pattern = {**base, "methods": ["T2I/*"]}
    with pytest.raises(DataError, match="4 test set") as raised:
        evaluate(config, {"mine": str(detector)}, tmp_path / "out")
    for text in ("not prepared", "all real", "labelled real and", "T2I/\\*"):
        assert raised.match(text)
    runs = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]["mine"]
    assert "gap" in runs["absent"]
    assert "frame" in runs["demo_seen"]
    rows = pd.read_csv(tmp_path / "out" / "results.csv")
    mean = rows[(rows["testset"] == "mean") & (rows["metric"] == "auc")]
    assert len(mean)
    assert mean["value"].isna().all()


def test_detectors_are_compared_by_size_cost_and_accuracy(config: DictConfig, detector: Path, tmp_path: Path) -> None:
    """What was not trained yet is a gap that says how; sizes are counted once for each run."""
    absent = tmp_path / "runs" / "demo_dfd_adapter" / "export"
    chosen = {"mine": str(detector), "later": str(absent)}
    with open_dict(config):
        config.ckpt = chosen
    assert build.checkpoints(config) == chosen
    with pytest.raises(DataError, match=r"2 test set\(s\)(.|\n)*fsvfm\.train experiment=demo_dfd_adapter"):
        evaluate(config, chosen, tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    network = load_detector_network(str(detector)).network
    assert stored["made"]["costs"]["mine"]["parameters"] == sum(p.numel() for p in network.parameters())
    assert list(stored["made"]["costs"]) == list(pd.read_csv(tmp_path / "out" / "costs.csv")["run"]) == ["mine"]
    lines = (tmp_path / "out" / "results.md").read_text().split("## Comparison")[1].split("##")[0].splitlines()
    head, mine, later = ([c.strip() for c in line.split("|")[1:-1]] for line in (lines[4], lines[6], lines[7]))
    assert head[:4] == ["run", "parameters, M", "trained, M", "GFLOPs"]
    assert head[4:] == ["AUC, demo_seen", "AUC, demo_unseen", "AUC, mean"]
    value = stored["runs"]["mine"]["demo_seen"]["frame"]["metrics"]["auc"]["value"]
    assert mine[4].startswith(f"{100 * value:.1f} [")
    assert later == ["later", *["—"] * 6]
    assert "parameters, M & trained, M" in (tmp_path / "out" / "results.tex").read_text()


@pytest.mark.parametrize(
    "chosen",
    [
        {"mine": "{nowhere}/demo_dfd/export"},  # nothing to compare with
        {"mine": "{detector}", "other": "{nowhere}/my_own/export"},  # nobody knows how that is made
        {"mine": "{detector}", "other": "{nowhere}/demo_dfd/exports"},
    ],
)
def test_a_checkpoint_that_is_not_there_is_an_error(
    config: DictConfig, detector: Path, tmp_path: Path, chosen: dict[str, str]
) -> None:
    with open_dict(config):
        config.ckpt = {n: path.format(detector=detector, nowhere=tmp_path / "none") for n, path in chosen.items()}
    with pytest.raises(ConfigError, match="no checkpoint at"):
        build.checkpoints(config)


def test_methods_may_be_patterns(prepared_dir: Path) -> None:
    test = {"manifest": str(prepared_dir), "split": "test", "datasets": None, "methods": ["self_*"], "prepare": "…"}
    assert set(build.testset_rows(test).table["method"]) == {"real", "self_blend"}


def test_scores_that_are_not_finite_are_a_gap(config: DictConfig, tmp_path: Path) -> None:
    folder = write_detector(tmp_path / "broken" / "export")
    loaded = load_detector_network(str(folder))
    state = {key: torch.full_like(t, float("nan")) if key == "head.fc.bias" else t
             for key, t in loaded.checkpoint.state.items()}  # fmt: skip
    save_export(folder, state, loaded.checkpoint.meta)
    with pytest.raises(DataError, match="not finite"):
        evaluate(config, {"broken": str(folder)}, tmp_path / "out")


def test_a_detector_of_another_task_is_refused(config: DictConfig, tmp_path: Path) -> None:
    spoof = write_detector(tmp_path / "spoof" / "export", task="antispoof")
    with pytest.raises(ConfigError, match=r"antispoof.*protocol=demo is about forgery"):
        evaluate(config, {"spoof": str(spoof)}, tmp_path / "out")


def test_an_encoder_cannot_be_evaluated(tmp_path: Path) -> None:
    model = {"name": "vit_test", "image_size": 64, "patch_size": 16, "dim": 32, "depth": 2, "heads": 4}
    network = build_detector(TINY, TUNE, ("real", "fake"))
    state = {f"encoder.{k.removeprefix('backbone.')}": t for k, t in network.state_dict().items()
             if k.startswith("backbone.") and "fc_norm" not in k}  # fmt: skip
    meta = {"kind": "encoder", "task": "pretrain", "model": model, "mean": [0.5] * 3, "std": [0.2] * 3}
    folder = save_export(tmp_path / "encoder", state, meta)
    with pytest.raises(CheckpointError, match=r"not a detector .*fine-tune"):
        load_detector_network(str(folder))


def test_testing_on_training_videos_is_refused(config: DictConfig, prepared_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    detector = write_detector(run / "export")
    rows = Manifest.read(prepared_dir)
    OmegaConf.save({"data": {"manifests": [str(prepared_dir)]}}, run / "config.yaml")
    leaked = rows.select(split="train")
    leaked = Manifest(leaked.table.assign(path=leaked.paths(), split="test", parse=""), tmp_path)
    leaked.write(tmp_path / "leaked.parquet")
    with open_dict(config):
        config.testsets.leaked = {**config.testsets.demo_seen, "manifest": str(tmp_path / "leaked.parquet")}
    with pytest.raises(DataError, match="leaked"):
        evaluate(config, {"mine": str(detector)}, tmp_path / "out")
    runs = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]["mine"]
    assert "gap" in runs["leaked"]
    assert "gap" not in runs["demo_seen"]


def test_calibration_is_stored_in_the_export_and_reported(
    config: DictConfig, tmp_path: Path, prepared_dir: Path
) -> None:
    folder = write_detector(tmp_path / "run" / "export")
    rows = Manifest.read(prepared_dir).select(split="train")
    before = load_detector_network(str(folder))
    calibrate_export(folder, rows, source="training people", conformal_alpha=0.2, batch_size=16, workers=0)
    after = load_detector_network(str(folder))
    stored = after.calibration
    assert stored is not None
    assert stored["source"] == "training people"
    assert set(stored["thresholds"]) == {"fpr_1", "fpr_5", "eer"}
    assert stored["conformal"]["alpha"] == 0.2
    for key, tensor in before.checkpoint.state.items():
        assert torch.equal(tensor, after.checkpoint.state[key])
    # The threshold does on its own set what it says.
    table = predict_manifest(after, rows, batch_size=16, workers=0, title="x")
    assert table is not None
    calibrated = apply_temperature(table["score"].to_numpy(), stored["temperature"])
    point = stored["thresholds"]["fpr_5"]
    assert (calibrated[table["label"] == 0] >= point["threshold"]).mean() == pytest.approx(point["fpr"])
    assert point["fpr"] <= 0.05
    results = evaluate(config, {"mine": str(folder)}, tmp_path / "out")
    assert set(results["mine"]["demo_seen"]["operating"]) == {"fpr_1", "fpr_5", "eer"}
    assert results["mine"]["demo_seen"]["calibration"]["temperature"] == stored["temperature"]


def test_corrupted_copies(config: DictConfig, detector: Path, prepared_dir: Path, tmp_path: Path) -> None:
    rows = Manifest.read(prepared_dir).select(split="test")
    variants = [("jpeg", 1), ("gaussian_noise", 5)]
    faces, fewer = CorruptedFaces(rows, 64, variants), CorruptedFaces(rows.select(label=1), 64, variants[1:])
    # Neither the order of asking nor the other rows change a pixel.
    noisy = [i for i in range(len(rows)) if rows.table["label"][i] == 1]
    for place, row in reversed(list(enumerate(noisy))):
        assert torch.equal(faces[len(rows) + row]["image"], fewer[place]["image"])
    assert not torch.equal(faces[0]["image"], faces[len(rows)]["image"])
    with open_dict(config):
        config.evaluate.corruptions, config.evaluate.severities = ["jpeg", "gaussian_noise"], [1, 5]
    results = evaluate(config, {"mine": str(detector)}, tmp_path / "out")
    curves = results["mine"]["demo_seen"]["robustness"]
    assert {name: set(levels) for name, levels in curves.items()} == {
        "jpeg": {"1", "5"},
        "gaussian_noise": {"1", "5"},
    }
    assert 0 <= curves["jpeg"]["5"]["auc"]["low"] <= curves["jpeg"]["5"]["auc"]["value"] <= 1


def _two_processes(rank: int, port: int, detector: str, folder: str, out: str) -> None:
    import os

    import torch.distributed as dist

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    loaded, group = load_detector_network(detector), Processes(rank, 2, CPU)
    manifest = Manifest.read(folder)
    options: dict = {"batch_size": 16, "workers": 0, "title": "two", "group": group}
    table = predict_manifest(loaded, manifest, **options)
    # A file that only one process meets is an error on both, and the next gathering still finds them together.
    paths = manifest.paths()
    paths[1] = "/nowhere.png"
    broken = Manifest(manifest.table.assign(path=paths, parse=""), folder)
    try:
        predict_manifest(loaded, broken, **options)
        raised = False
    except DataError as error:
        raised = "nowhere" in str(error)
    again = predict_manifest(loaded, manifest, **options)
    assert raised
    assert (table is None) == (again is None) == (rank == 1)
    if table is not None and again is not None:
        assert table["score"].equals(again["score"])
        table.to_parquet(out)
    dist.destroy_process_group()


def test_two_processes_score_what_one_scores(detector: Path, prepared_dir: Path, tmp_path: Path) -> None:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (port, str(detector), str(prepared_dir), str(tmp_path / "two.parquet"))
    torch.multiprocessing.spawn(_two_processes, arguments, nprocs=2)
    two = pd.read_parquet(tmp_path / "two.parquet")
    one = predict_manifest(
        load_detector_network(str(detector)), Manifest.read(prepared_dir), batch_size=16, workers=0, title="one"
    )
    assert one is not None
    assert list(one["path"]) == list(two["path"])
    np.testing.assert_allclose(one["score"], two["score"], atol=1e-7)
