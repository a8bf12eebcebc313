"""The table of a sweep: rows found from configurations, seeds averaged, and nothing averaged over less in silence."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from fsvfm.errors import DataError
from fsvfm.metrics import antispoof, forgery
from fsvfm.report_tables import write_tables
from fsvfm.sweeps import collect, statistic, write_sweep

TARGETS = {"M": "msu", "C": "casia"}
WriteRun = Callable[..., Path]


def predictions(seed: int, pull: float) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    label = np.tile([0, 1], 40)
    table = pd.DataFrame({"label": label, "score": np.clip(rng.normal(0.5 + pull * (2 * label - 1), 0.2), 0, 1)})
    table = table.assign(video=[f"v{i // 4}{y}" for i, y in enumerate(label)], subject="", dataset="d")
    return table.assign(path=[f"/{i}.png" for i in range(len(table))])


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """Leave what a run leaves: a resolved configuration and, unless unfinished, its results."""

    def write(
        experiment: str = "fas_vitb", *, seed: int = 0, target: str = "M", model: str = "vit_base", tune: str = "full",
        finished: bool = True, folder: str = "", result: str = "test", scores: bool = False, **more: object,
    ) -> Path:  # fmt: skip
        name = f"{experiment}__seed-{seed}__target-{target}"
        run = tmp_path / "runs" / (folder or name)
        run.mkdir(parents=True, exist_ok=True)
        testset = f"fas_{TARGETS[target]}"
        base_lr = {"full": 1e-5, "adapter": 5e-2}[tune]
        config = {
            "name": name, "seed": seed,
            "task": {"_target_": "fsvfm.tasks.antispoof.AntispoofTask", "seed": seed, "model": {"name": model}},
            "model": {"name": model, "dim": len(model)}, "tune": {"name": tune}, "optim": {"base_lr": base_lr},
            "data": {"target": TARGETS[target], "seed": seed, "manifests": [f"x/{TARGETS[target]}"], "workers": seed},
            "protocol": {"name": "fas_mcio"}, "paths": {"run": str(run)},
            "testsets": {testset: {"manifest": "x", "split": "test"}}, **more,
        }  # fmt: skip
        OmegaConf.save(OmegaConf.create(config), run / "config.yaml")
        if finished:
            table = predictions(100 * seed + ord(target) + len(model) + len(tune), 0.15)
            made = {"published": PUBLISHED, "notes": [f"{name}: selection=target_best"]}
            write_tables(run / result, {name: {testset: antispoof.summarise(table, replicates=0)}}, made=made)
            if scores:
                table.assign(run=name, testset=testset).to_parquet(run / result / "predictions.parquet")
        return run

    return write


PUBLISHED = [
    {"method": "FSFM ViT-B", "experiment": "fas_vitb", "level": "video", "metric": "hter", "source": "FSFM, CVPR 2025",
     "values": {"fas_msu": 3.78, "fas_casia": 3.16}, "mean": 3.47},
]  # fmt: skip


def hter(run: Path, testset: str) -> float:
    """Read straight from a run's results."""
    (summary,) = json.loads((run / "test/results.json").read_text())["runs"].values()
    return summary[testset]["video"]["metrics"]["hter"]["value"]


def test_seeds_and_targets_become_one_row(write_run: WriteRun, tmp_path: Path) -> None:
    runs = {(s, t): write_run(seed=s, target=t) for s in (0, 1, 2) for t in "MC"}
    sweep = collect(tmp_path / "runs")
    (table,) = sweep.tables
    (row,) = table.rows
    assert table.by == []
    assert (table.seeds, table.columns, table.missing(row)) == ([0, 1, 2], ["fas_msu", "fas_casia"], [])
    found = {(m, c): s for level, m, c, s in table.statistics(row) if level == "video"}
    msu = [hter(runs[s, "M"], "fas_msu") for s in (0, 1, 2)]
    casia = [hter(runs[s, "C"], "fas_casia") for s in (0, 1, 2)]
    assert found["hter", "fas_msu"] == (pytest.approx(statistics.mean(msu)), pytest.approx(statistics.stdev(msu)), 3)
    means = [(a + b) / 2 for a, b in zip(msu, casia, strict=True)]
    assert found["hter", "mean"] == (pytest.approx(statistics.mean(means)), pytest.approx(statistics.stdev(means)), 3)
    assert ("threshold", "mean") not in found
    files = {path.suffix: path.read_text() for path in write_sweep(tmp_path / "out", sweep)}
    text = f"{100 * statistics.mean(msu):.2f} ± {100 * statistics.stdev(msu):.2f}"
    assert f"| **{text}** |" in files[".md"]
    assert text.replace("±", r"$\pm$") in files[".tex"]
    assert "| *FSFM ViT-B (published: FSFM, CVPR 2025)* |  | *3.78* | *3.16* | *3.47* |" in files[".md"]
    assert files[".md"].count("selection=target_best") == 1
    values = json.loads(files[".json"])["tables"][0]["rows"][0]["values"]["video"]["hter"]
    assert list(values["fas_msu"]["seeds"].values()) == pytest.approx(msu)
    assert list(values["mean"]["seeds"].values()) == pytest.approx(means)
    frame = pd.read_csv(tmp_path / "out/sweep.csv").set_index(["level", "metric", "testset"])
    assert frame.loc[("video", "hter", "mean"), "std"] == pytest.approx(statistics.stdev(means))
    assert not list((tmp_path / "out").glob(".*"))


@given(st.dictionaries(st.integers(0, 9), st.floats(0, 1), min_size=0, max_size=8))
def test_statistic_is_mean_and_sample_deviation(values: dict[int, float]) -> None:
    found = statistic(values)
    if not values:
        assert found is None
        return
    assert found is not None
    assert (found.mean, found.n) == (pytest.approx(statistics.mean(values.values())), len(values))
    if len(values) == 1:
        assert found.std is None
    else:
        assert found.std == pytest.approx(statistics.stdev(values.values()), abs=1e-9)


def test_rows_are_what_varies_without_what_follows_from_it(write_run: WriteRun, tmp_path: Path) -> None:
    for model in ("vit_small", "vit_base"):
        for tune in ("full", "adapter"):
            for target in "MC":
                write_run(f"fas_{model}_{tune}", model=model, tune=tune, target=target)
    (table,) = collect(tmp_path / "runs").tables
    # Not model.dim and task.model.name (they follow from model.name), not optim.base_lr (from tune.name).
    assert table.by == ["model.name", "tune.name"]
    keys = {tuple(row.key.values()) for row in table.rows}
    assert keys == {("vit_small", "full"), ("vit_small", "adapter"), ("vit_base", "full"), ("vit_base", "adapter")}
    text = write_sweep(tmp_path, collect(tmp_path / "runs"))[2].read_text()
    assert "±" not in text.split("##", 1)[1], "one seed has no deviation"
    assert "| run | model | tune | seeds |" in text


def test_unfinished_and_missing_runs_are_named_and_mark_their_row(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        for target in "MC":
            write_run("full", seed=seed, target=target)
            if (seed, target) != (2, "C"):
                write_run("adapter", tune="adapter", seed=seed, target=target, finished=(seed, target) != (1, "M"))
    (tmp_path / "runs/never_started").mkdir()
    sweep = collect(tmp_path / "runs")
    (table,) = sweep.tables
    rows = {row.name: row for row in table.rows}
    assert table.missing(rows["full"]) == []
    missing = {(gap["seed"], gap["testset"]): gap["why"] for gap in table.missing(rows["adapter"])}
    assert set(missing) == {(1, "fas_msu"), (2, "fas_casia")}
    assert missing[2, "fas_casia"] == "no run"
    assert missing[1, "fas_msu"].startswith("unfinished")
    found = {(m, c): s for level, m, c, s in table.statistics(rows["adapter"]) if level == "video"}
    assert found["hter", "fas_msu"].n == 2
    assert found["hter", "mean"].n == 1, "only seed 0 has both targets"
    assert found["hter", "mean"].std is None
    text = write_sweep(tmp_path / "out", sweep)[2].read_text()
    assert "† adapter, adapter is incomplete, it lacks seed 1 on fas_msu (unfinished" in text
    assert "seed 2 on fas_casia (no run)" in text
    assert "| adapter † |" in text
    assert "(n=2)" in text
    assert "full †" not in text
    assert "never_started: it holds no config.yaml" in text


def test_a_gap_in_the_results_is_a_gap_of_the_sweep(write_run: WriteRun, tmp_path: Path) -> None:
    run = write_run(seed=0)
    write_run(seed=1)
    name = json.loads((run / "test/results.json").read_text())["runs"].popitem()[0]
    write_tables(run / "test", {name: {"fas_msu": {"gap": "all samples are attacks"}}})
    (table,) = collect(tmp_path / "runs").tables
    assert table.missing(table.rows[0]) == [{"seed": 0, "testset": "fas_msu", "why": "all samples are attacks"}]


def test_two_runs_in_one_place_are_refused(write_run: WriteRun, tmp_path: Path) -> None:
    write_run(seed=0)
    write_run(seed=0, folder="copy")
    with pytest.raises(DataError, match=r"(?s)copy.*seed 0.*leave one out"):
        collect(tmp_path / "runs")
    write_run(seed=0, folder="copy", tune="adapter")
    assert len(collect(tmp_path / "runs").tables[0].rows) == 2
    with pytest.raises(DataError, match=r"tune\.name.*by="):
        collect(tmp_path / "runs", by=["model.name"])
    with pytest.raises(DataError, match=r"tuna.*what varies is tune\.name"):
        collect(tmp_path / "runs", by=["tuna"])


def test_tasks_and_protocols_have_their_own_tables(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(seed=seed)
        folder = tmp_path / f"runs/dfd__seed-{seed}"
        config = {"name": folder.name, "seed": seed, "task": {"_target_": "F"}, "protocol": {"name": "dfd"}}
        folder.mkdir()
        OmegaConf.save(OmegaConf.create(config | {"testsets": {"cdf": {}, "dfdc": {}}}), folder / "config.yaml")
        summary = forgery.summarise(predictions(seed, 0.1), replicates=0)
        # evaluation/ may be about several checkpoints; the run's own name decides.
        write_tables(folder / "evaluation", {folder.name: {"cdf": summary, "dfdc": summary}, "other": {"cdf": summary}})
    pretrain = tmp_path / "runs/pretrain"
    pretrain.mkdir()
    OmegaConf.save(OmegaConf.create({"name": "pretrain", "seed": 0, "testsets": {}}), pretrain / "config.yaml")
    sweep = collect(tmp_path / "runs")
    tables = {table.protocol: table for table in sweep.tables}
    assert set(tables) == {"fas_mcio", "dfd"}
    assert "hter" in tables["fas_mcio"].family.metrics
    assert "eer" in tables["dfd"].family.metrics
    assert tables["dfd"].columns == ["cdf", "dfdc"]
    assert [(Path(name).name, "pre-training" in why) for name, why in sweep.skipped] == [("pretrain", True)]
    (tmp_path / "runs/dfd__seed-0/config.yaml").write_text("{")
    assert any("unreadable" in why for _, why in collect(tmp_path / "runs").skipped)


def test_rows_are_compared_on_the_same_samples(write_run: WriteRun, tmp_path: Path) -> None:
    runs = {(tune, seed): write_run(tune=tune, seed=seed, folder=f"{tune}{seed}", scores=True,
                                    ablation={"title": "Tuning", "reference": {"tune.name": "adapter"}})
            for tune in ("full", "adapter") for seed in (0, 1)}  # fmt: skip
    (table,) = collect(tmp_path / "runs", replicates=200).tables
    assert table.title == "Tuning, protocol fas_mcio"
    assert table.reference is not None
    assert table.rows[table.reference].key == {"tune.name": "adapter"}
    full, adapter = (table.compared["video", "hter", "fas_msu"][i] for i in (0, 1))
    if table.reference == 0:
        full, adapter = adapter, full
    assert full is not None
    assert adapter is not None
    mean = {tune: np.mean([hter(runs[tune, seed], "fas_msu") for seed in (0, 1)]) for tune in ("full", "adapter")}
    assert (full.value, adapter.value) == (pytest.approx(mean["full"]), pytest.approx(mean["adapter"]))
    assert full.difference == pytest.approx(mean["full"] - mean["adapter"])
    assert adapter.difference is None
    assert full.difference_low <= full.difference <= full.difference_high
    assert full.low <= full.value <= full.high
    assert 0 < full.p <= 1
    assert full.seeds == [0, 1]
    text = write_sweep(tmp_path / "out", collect(tmp_path / "runs", replicates=200))[2].read_text()
    assert "Δ [95 %] | p |" in text
    assert "| reference |  |" in text
    assert f"{100 * full.difference:+.2f} [".replace("-", "−") in text
    assert "from the reference (tune.name = adapter)" in text
    # The draws are paired: a row does not differ from itself, however few samples there are.
    for file in (runs["full", seed] / "test" for seed in (0, 1)):
        seed = file.parent.name[-1]
        copy = pd.read_parquet(runs["adapter", int(seed)] / "test/predictions.parquet")
        copy.to_parquet(file / "predictions.parquet")
    (table,) = collect(tmp_path / "runs", replicates=50).tables
    same = next(c for c in table.compared["video", "hter", "fas_msu"] if c is not None and c.difference is not None)
    assert (same.difference, same.difference_low, same.difference_high, same.p) == (0, 0, 0, 1)
    (table,) = collect(tmp_path / "runs", replicates=50, reference={"tune.name": "full"}).tables
    assert table.rows[table.reference or 0].key == {"tune.name": "full"}
    with pytest.raises(DataError, match=r"reference=.*tuna.*there are"):
        collect(tmp_path / "runs", reference={"tune.name": "tuna"})
    assert not collect(tmp_path / "runs", replicates=0).tables[0].compared


def test_seeds_that_disagree_widen_the_interval(write_run: WriteRun, tmp_path: Path) -> None:
    """Two seeds, one up and one down by the same: the test samples alone would call either of them sure."""
    for tune in ("full", "adapter"):
        for seed in (0, 1):
            file = write_run(tune=tune, seed=seed, folder=f"{tune}{seed}", scores=True) / "test/predictions.parquet"
            table = pd.read_parquet(file)
            good = (tune == "full") == (seed == 0)
            table.assign(score=table["label"] * 0.8 + 0.1 if good else 0.5).to_parquet(file)
    (table,) = collect(tmp_path / "runs", replicates=400, reference={"tune.name": "adapter"}).tables
    found = next(c for c in table.compared["video", "auc", "fas_msu"] if c is not None and c.difference is not None)
    assert (found.difference, found.difference_low, found.difference_high) == (0, -0.5, 0.5)
    assert found.p > 0.5


def test_the_best_row_is_the_reference_where_none_is_named(write_run: WriteRun, tmp_path: Path) -> None:
    runs = {tune: write_run(tune=tune, folder=tune, scores=True) for tune in ("full", "adapter")}
    (table,) = collect(tmp_path / "runs", replicates=20).tables
    best = min(runs, key=lambda tune: hter(runs[tune], "fas_msu"))  # an error rate: less is better
    assert table.rows[table.reference or 0].key == {"tune.name": best}


def test_runs_on_other_samples_are_not_compared(write_run: WriteRun, tmp_path: Path) -> None:
    write_run(folder="a", scores=True)
    other = write_run(tune="adapter", folder="b", scores=True) / "test/predictions.parquet"
    pd.read_parquet(other).iloc[1:].to_parquet(other)
    (table,) = collect(tmp_path / "runs", replicates=20).tables
    assert all(c is None or c.difference is None for found in table.compared.values() for c in found)
    assert "Δ" not in write_sweep(tmp_path / "out", collect(tmp_path / "runs"))[2].read_text()


def test_a_failed_run_is_a_gap_with_its_reason(write_run: WriteRun, tmp_path: Path) -> None:
    write_run(seed=0)
    write_run("adapter", tune="adapter", seed=0)
    failed = write_run("adapter", tune="adapter", seed=1, finished=False)
    reason = {"step": "fit", "error": "RuntimeError: out of memory\nat all"}
    (failed / "failed.json").write_text(json.dumps(reason))
    # It did not even start: its settings are in the note.
    early = write_run(seed=1, folder="early", finished=False)
    config = OmegaConf.to_container(OmegaConf.load(early / "config.yaml"))
    (early / "config.yaml").unlink()
    (early / "failed.json").write_text(json.dumps({"step": "start", "error": "ConfigError: no", "config": config}))
    (table,) = collect(tmp_path / "runs").tables
    why = {row.key["tune.name"]: table.missing(row)[0]["why"] for row in table.rows}
    assert why == {
        "adapter": "failed in fit: RuntimeError: out of memory at all",
        "full": "failed in start: ConfigError: no",
    }
    text = write_sweep(tmp_path / "out", collect(tmp_path / "runs"))
    assert all("out of memory at all" in file.read_text() for file in text if file.suffix in (".md", ".html", ".tex"))
    # What is in a finished run's folder is not held against it.
    (tmp_path / "runs/fas_vitb__seed-0__target-M/failed.json").write_text("{}")
    assert len(collect(tmp_path / "runs").tables[0].rows) == 2


def test_what_lies_in_a_run_folder_is_part_of_it(write_run: WriteRun, tmp_path: Path) -> None:
    run = write_run(seed=0)
    (run / "finetune").mkdir()
    (run / "finetune/config.yaml").write_text("name: other\ntestsets: {x: {}}\n")
    sweep = collect(tmp_path / "runs")
    assert sweep.skipped == []
    assert sweep.tables[0].columns == ["fas_msu"]
    assert collect(run).tables[0].columns == ["fas_msu"]


def test_numbers_are_in_order_and_drawn(write_run: WriteRun, tmp_path: Path) -> None:
    for share in (0.5, None, 0.05, 10):
        data = {"target": "msu", "fraction": share, "manifests": ["x/msu"]}
        write_run(folder=f"f{share}", data=data, scores=True)
    sweep = collect(tmp_path / "runs", replicates=20)
    assert [row.key["data.fraction"] for row in sweep.tables[0].rows] == [0.05, 0.5, 10, None]
    page = next(path for path in write_sweep(tmp_path / "out", sweep) if path.suffix == ".html").read_text()
    assert "<svg" in page
    assert ">null</text>" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    for text in ("HTER, video level", "95 % bootstrap intervals", "How the metrics are defined"):
        assert text in page


def test_nothing_found_is_an_error_that_says_where_it_looked(write_run: WriteRun, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        collect(tmp_path / "nowhere*")
    write_run(finished=False)
    with pytest.raises(DataError, match=r"(?s)no run with results.*unfinished"):
        collect(tmp_path / "runs")
    run = write_run(seed=3, finished=False)
    (run / "test").mkdir()
    (run / "test/results.json").write_text("{}")
    with pytest.raises(DataError, match=r"results\.json is unreadable"):
        collect(tmp_path / "runs")


def test_command_line(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in (0, 1):
        for target in "MC":
            write_run(seed=seed, target=target)
            write_run("fas_vitb_adapter", seed=seed, target=target, tune="adapter")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def report(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "fsvfm.report", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)

    done = report("sweep=runs/")
    assert done.returncode == 0, done.stderr
    assert "| fas_vitb_adapter | adapter | 2 |" in done.stdout
    assert (tmp_path / "runs/sweep.md").read_text() in done.stdout
    done = report("sweep=[runs/fas_vitb__*]", "by=model.name", "out=tables")
    assert done.returncode == 0, done.stderr
    assert "adapter" not in (tmp_path / "tables/sweep.md").read_text()
    assert "vit_base" in (tmp_path / "tables/sweep.tex").read_text().replace(r"\_", "_")
    for row in (tmp_path / "runs").glob("*/config.yaml"):
        run, testset = row.parent, "fas_msu" if "-M" in row.parent.name else "fas_casia"
        table = predictions(len(run.name) + ord(run.name[-1]), 0.15)
        table.assign(run=run.name, testset=testset).to_parquet(run / "test/predictions.parquet")
    done = report("sweep=runs", "reference={tune.name: adapter}", "replicates=50", "out=tables")
    assert done.returncode == 0, done.stderr
    assert "from the reference (tune.name = adapter)" in done.stdout
    assert "sweep.html" in done.stdout
