"""Tables and the page: gaps stay gaps, one file holds everything, what is missing is named with its command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fsvfm.errors import DataError, MetricError
from fsvfm.metrics import antispoof
from fsvfm.metrics.forgery import summarise
from fsvfm.report import write_report
from fsvfm.report_tables import result_rows, write_tables


def predictions(folder: Path) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (40, 30, 3), dtype=np.uint8)).save(folder / "face.png")
    parts = []
    for run, pull in (("full", 0.3), ("adapter", 0.1)):
        for testset in ("seen", "un_seen"):
            label = np.tile([0, 1], 12)
            score = np.clip(rng.normal(0.5 + pull * (2 * label - 1), 0.2), 0, 1)
            parts.append(
                pd.DataFrame(
                    {
                        "run": run, "testset": testset, "label": label, "score": score,
                        "path": ["face.png"] * 23 + ["gone.png"], "method": np.where(label, "<swap>", "real"),
                        "video": [f"{testset}{i}" for i in range(24)],
                    }
                )
            )  # fmt: skip
    return pd.concat(parts)


def summaries(table: pd.DataFrame) -> dict:
    return {
        run: {name: summarise(part, replicates=20) for name, part in rows.groupby("testset", sort=False)}
        for run, rows in table.groupby("run", sort=False)
    }


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Fake run folders and an evaluation."""
    for name in ("pretrain", "full", "adapter"):
        run = tmp_path / name
        run.mkdir()
        (run / "config.yaml").write_text("model: {name: vit_tiny}\n")
        (run / "environment.json").write_text(json.dumps({"packages": {"torch": "9.9", "zebra": "1.2.3"}, "gpus": []}))
        (run / "fit.done.json").write_text(json.dumps({"seconds": 12.345678}))
        log = pd.DataFrame(
            {"epoch": [0, 1, 2], "step": [5, 10, 15], "val/loss": [3.0, 2, 1], "val/frame_auc": [0.5, 0.6, 0.7]}
        )
        (run / "csv/version_0").mkdir(parents=True)
        log.to_csv(run / "csv/version_0/metrics.csv", index=False)
    (tmp_path / "pretrain/panels").mkdir()
    Image.new("RGB", (64, 16)).save(tmp_path / "pretrain/panels/epoch_2.png")
    evaluation = tmp_path / "evaluation"
    evaluation.mkdir()
    table = predictions(evaluation)
    table.to_parquet(evaluation / "predictions.parquet")
    write_tables(evaluation, summaries(table), made={"seed": 3})
    return tmp_path


def page(project: Path, **changes) -> str:
    arguments = {
        "pretrain": project / "pretrain", "runs": {"full": project / "full", "adapter": project / "adapter"},
        "evaluation": project / "evaluation",
        "commands": {"pretrain": "make-pre", "evaluation": "make-eval", "adapter": "make-adapter"},
        "notice": "This is not a usable detector.",
    } | changes  # fmt: skip
    return write_report(project / "out/report.html", **arguments).read_text()


class Tags(HTMLParser):
    """Collects attributes and checks that tags close in order."""

    VOID = frozenset({"meta", "img", "br", "link", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_whole_and_self_contained(project):
    text = page(project)
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    links = [v for _, name, v in tags.attributes if name in ("src", "href", "xlink:href")]
    assert links
    assert all(v.startswith(("data:", "#")) for v in links)
    assert "@import" not in text
    assert not [v for tag, name, v in tags.attributes if tag in ("script", "link")]
    for expected in (
        "This is not a usable detector", "12.35", "9.9", "vit_tiny", "ROC curves", "currentColor",
        "prefers-color-scheme", "epoch 2", "&lt;swap&gt;", "gone.png",
    ):  # fmt: skip
        assert expected in text, expected
    assert "<swap>" not in text
    assert "zebra" not in text
    assert "Missing:" not in text
    results = json.loads((project / "evaluation/results.json").read_text())
    auc = results["runs"]["full"]["un_seen"]["frame"]["metrics"]["auc"]
    assert f"{100 * auc['value']:.1f} [{100 * auc['low']:.1f}–{100 * auc['high']:.1f}]" in text


def test_missing_parts_are_named_with_their_command(project):
    text = page(
        project, pretrain=None, runs={"full": project / "full", "adapter": project / "nowhere"}, evaluation=None
    )
    assert text.count("<code>make-pre</code>") >= 1
    assert text.count("<code>make-adapter</code>") >= 1
    assert text.count("<code>make-eval</code>") >= 1
    assert "val/frame_auc" in text  # what is there is still shown
    (project / "evaluation/predictions.parquet").unlink()
    text = page(project)
    assert "predictions.parquet" in text
    assert "make-eval" in text
    assert "AUC" in text


def test_confident_faces_are_sorted_right_and_wrong(project):
    table = pd.DataFrame(
        {
            "run": "full", "testset": "seen", "path": "face.png", "method": ["real", "m", "m", "real"],
            "label": [0, 1, 1, 0], "score": [0.01, 0.98, 0.03, 0.52],
        }
    )  # fmt: skip
    table.to_parquet(project / "evaluation/predictions.parquet")
    faces = page(project).split('id="faces"')[1].split('id="training"')[0]
    right, wrong = faces.split("Wrong")
    assert right.index("P(fake) 1 %") < right.index("P(fake) 98 %")
    assert wrong.index("P(fake) 3 %") < wrong.index("P(fake) 52 %")
    assert "2 of 4 wrong" in faces


def test_unreadable_parts_are_errors_that_name_the_file(project):
    (project / "evaluation/results.json").write_text("{")
    with pytest.raises(DataError, match=r"results\.json"):
        page(project)
    (project / "evaluation/results.json").write_text('{"runs": {}}')
    (project / "evaluation/predictions.parquet").write_text("no")
    with pytest.raises(DataError, match=r"predictions\.parquet"):
        page(project)


def test_tables_show_gaps_and_never_average_over_fewer_sets(project, tmp_path):
    results = summaries(pd.read_parquet(project / "evaluation/predictions.parquet"))
    results["adapter"]["un_seen"] = {"gap": "all 24 samples are real"}
    rows = pd.DataFrame(result_rows(results)).set_index(["run", "testset", "level", "metric"])
    values = [results["full"][name]["frame"]["metrics"]["auc"]["value"] for name in ("seen", "un_seen")]
    assert rows.loc[("full", "mean", "frame", "auc"), "value"] == pytest.approx(np.mean(values))
    assert pd.isna(rows.loc[("adapter", "mean", "frame", "auc"), "value"])
    assert rows.loc[("adapter", "mean", "frame", "auc"), "gap"] == "1 of 2 sets have a value"
    assert rows.loc[("adapter", "un_seen", "frame", "auc"), "gap"] == "all 24 samples are real"
    files = {p.suffix: p.read_text() for p in write_tables(tmp_path / "t", results)}
    assert "all 24 samples are real" in files[".md"]
    assert "all 24 samples are real" in files[".csv"]
    assert "all 24 samples are real" in files[".json"]
    assert r"un\_seen" in files[".tex"]
    assert files[".tex"].count("---") == 2  # the gap and the mean that it takes away
    write_tables(project / "evaluation", results)
    assert "all 24 samples are real" in page(project)
    assert not list((tmp_path / "t").glob(".*")), "no temporary file stays"


def test_test_set_that_only_one_run_has_is_a_gap_of_the_other(project):
    results = summaries(pd.read_parquet(project / "evaluation/predictions.parquet"))
    del results["full"]["seen"]
    rows = [r for r in result_rows(results) if r["run"] == "full" and r["testset"] == "seen"]
    assert rows
    assert {r["gap"] for r in rows} == {"not evaluated"}
    assert all(r["value"] is None for r in result_rows(results) if r["run"] == "full" and r["testset"] == "mean")


def test_video_level_appears_where_videos_have_frames():
    table = pd.DataFrame({"score": [0.1, 0.2, 0.9, 0.8], "label": [0, 0, 1, 1], "video": ["a", "a", "b", "b"]})
    results = {"full": {"set": summarise(table, replicates=0)}}
    rows = [r for r in result_rows(results) if r["metric"] == "auc"]
    assert {(r["level"], r["n"]) for r in rows} == {("frame", 4), ("video", 2)}


def test_bad_results_are_refused(tmp_path):
    with pytest.raises(MetricError, match="no results"):
        write_tables(tmp_path, {})
    with pytest.raises(MetricError, match="'mean'"):
        write_tables(tmp_path, {"full": {"mean": {"gap": "x"}}})
    with pytest.raises(MetricError, match="not finite"):
        write_tables(tmp_path, {"full": {"set": {"gap": "x", "number": float("nan")}}})


# ---------------------------------------------------------------- what a summary may hold beside metrics


def rows_of(file: Path) -> list[list[str]]:
    """Cells of all Markdown table rows of a file, marks taken off."""
    lines = [line for line in file.read_text().splitlines() if line.startswith("|")]
    return [[cell.strip().strip("*") for cell in line.strip("|").split("|")] for line in lines]


def spoof(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    label = np.tile([0, 1], 40)
    table = pd.DataFrame({"label": label, "score": np.clip(rng.normal(0.3 + 0.4 * label, 0.2), 0, 1)})
    table["video"] = [f"v{i // 4}{y}" for i, y in enumerate(label)]
    return antispoof.summarise(table, replicates=20)


def test_tasks_are_never_in_one_table(project, tmp_path):
    results = summaries(pd.read_parquet(project / "evaluation/predictions.parquet"))
    results["fas"] = {"msu": spoof(), "oulu": spoof(1), "casia": {"gap": "only attacks"}}
    rows = pd.DataFrame(result_rows(results))
    assert set(rows.loc[rows["run"] == "fas", "testset"]) == {"msu", "oulu", "casia", "mean"}
    assert set(rows.loc[rows["run"] == "full", "testset"]) == {"seen", "un_seen", "mean"}
    assert "hter" not in set(rows.loc[rows["run"] == "full", "metric"])
    means = rows[(rows["testset"] == "mean") & (rows["level"] == "video")].set_index(["run", "metric"])
    assert pd.isna(means.loc[("fas", "hter"), "value"])
    assert means.loc[("fas", "hter"), "gap"] == "2 of 3 sets have a value"
    assert means.loc[("full", "auc"), "value"] > 0.5
    del results["fas"]["casia"]
    frame = pd.DataFrame(result_rows(results)).set_index(["run", "testset", "level", "metric"])
    values = [results["fas"][name]["video"]["metrics"]["hter"]["value"] for name in ("msu", "oulu")]
    assert frame.loc[("fas", "mean", "video", "hter"), "value"] == pytest.approx(np.mean(values))
    assert pd.isna(frame.loc[("fas", "mean", "video", "threshold"), "value"]), "thresholds have no mean"
    write_tables(tmp_path / "t", results)
    for line in rows_of(tmp_path / "t/results.md"):
        assert not {"full", "fas"} <= set(line)
    heads = [line for line in rows_of(tmp_path / "t/results.md") if line[0] == "run" and "HTER" in line]
    assert len(heads) == 2  # frame and video level
    assert all("EER" not in head for head in heads)
    text = (tmp_path / "t/results.tex").read_text()
    assert "% HTER, video level" in text
    assert text.count("fas & ") == 3  # HTER, AUC, TPR at video level
    write_tables(project / "evaluation", results)
    text = page(project)
    assert "HTER" in text
    assert "Face anti-spoofing" in text
    threshold = results["fas"]["msu"]["video"]["metrics"]["threshold"]["value"]
    assert f"{threshold:.6g} [" in text


def test_methods_have_their_own_rows(project, tmp_path):
    table = pd.read_parquet(project / "evaluation/predictions.parquet")
    fakes = table["label"] == 1
    table.loc[fakes, "method"] = np.where(np.arange(fakes.sum()) % 3 == 0, "faces/lia", "talk/sad")
    results = summaries(table)
    write_tables(tmp_path / "t", results)
    rows = pd.read_csv(tmp_path / "t/results.csv", keep_default_na=False)
    assert set(rows["method"]) == {"", "faces/lia", "talk/sad"}
    row = rows[
        (rows[["run", "testset", "method", "level", "metric"]] == ["full", "seen", "talk/sad", "frame", "auc"]).all(
            axis=1
        )
    ]
    part = table[(table["run"] == "full") & (table["testset"] == "seen")]
    part = part[(part["label"] == 0) | (part["method"] == "talk/sad")]
    real, fake = (part.loc[part["label"] == y, "score"].to_numpy() for y in (0, 1))
    assert float(row["value"].item()) == pytest.approx(
        np.mean(fake[:, None] > real) + 0.5 * np.mean(fake[:, None] == real)
    )
    assert int(float(row["fake"].item())) == len(fake)
    cells = results["full"]["seen"]["method"]["talk/sad"]["frame"]["metrics"]["auc"]
    expected = [
        "full",
        "seen",
        "talk/sad",
        str(len(fake)),
        f"{100 * cells['value']:.1f} [{100 * cells['low']:.1f}–{100 * cells['high']:.1f}]",
    ]
    assert expected in rows_of(tmp_path / "t/results.md")
    write_tables(project / "evaluation", results)
    text = page(project)
    assert "Results by method" in text
    assert text.count("talk/sad") > 4
    # One method is the whole test set again: no breakdown.
    table.loc[fakes, "method"] = "one"
    write_tables(tmp_path / "t", summaries(table))
    assert "By method" not in (tmp_path / "t/results.md").read_text()


PUBLISHED = [
    {"method": "FSFM ViT-B", "experiment": "full", "level": "frame", "metric": "auc", "source": "FSFM, CVPR 2025",
     "values": {"seen": 91.44, "un_seen": 83.5}, "mean": 87.47},
    {"method": "MAE", "experiment": None, "level": "frame", "metric": "auc", "source": "somewhere",
     "values": {"seen": 80, "elsewhere": 70}, "mean": 75},
    {"method": "Unrelated", "experiment": None, "level": "frame", "metric": "auc", "source": "s", "values": {"x": 1}},
]  # fmt: skip


def test_published_rows_stand_beside_ours_and_are_marked(project, tmp_path):
    results = summaries(pd.read_parquet(project / "evaluation/predictions.parquet"))
    made = {"published": PUBLISHED[:1], "notes": ["full: selection=target_best\nmind this"]}
    write_tables(tmp_path / "t", results, made=made)
    rows = rows_of(tmp_path / "t/results.md")
    assert ["FSFM ViT-B (published: FSFM, CVPR 2025)", "91.44", "83.5", "87.47"] in rows
    seen, other = (results["full"][name]["frame"]["metrics"]["auc"]["value"] for name in ("seen", "un_seen"))
    away = next(row for row in rows if row[0] == "full − FSFM ViT-B, points")
    assert away[1:] == [
        f"{100 * seen - 91.44:+.1f}",
        f"{100 * other - 83.5:+.1f}",
        f"{50 * (seen + other) - 87.47:+.1f}",
    ]
    text = (tmp_path / "t/results.md").read_text()
    assert "| **full** | **" in text
    assert "| **adapter** |" not in text
    assert "not measured here" in text
    assert "> **Note.** full: selection=target_best mind this" in text
    tex = (tmp_path / "t/results.tex").read_text()
    assert r"\textit{FSFM ViT-B (published: FSFM, CVPR 2025)} & \textit{91.44}" in tex
    assert "not measured here" in tex
    assert r"\textbf{full}" in tex
    assert "91.44" not in (tmp_path / "t/results.csv").read_text()
    write_tables(project / "evaluation", results, made=made)
    text = page(project)
    assert '<tr class="published"' in text
    assert '<tr class="matched"' in text
    assert "mind this" in text
    assert "not measured here" in text


def test_means_beside_published_ones_are_over_the_same_sets(project, tmp_path):
    results = summaries(pd.read_parquet(project / "evaluation/predictions.parquet"))
    write_tables(tmp_path / "t", results, made={"published": PUBLISHED})
    rows = rows_of(tmp_path / "t/results.md")
    head = next(row for row in rows if row[1:] == ["seen", "un_seen", "elsewhere", "mean"])
    assert head
    full = next(row for row in rows if row[0] == "full" and len(row) == 5)
    assert full[3:] == ["—", "—"], "we lack a set that the published mean may be about"
    assert next(row for row in rows if row[0].startswith("MAE"))[1:] == ["80", "—", "70", "—"]
    assert not any(row[0].startswith("Unrelated") for row in rows)


def with_robustness(results: dict, severities: tuple[str, ...] = ("1", "3")) -> dict:
    for run, by_set in results.items():
        for summary in by_set.values():
            clean = summary["frame"]["metrics"]["auc"]["value"]
            summary["robustness"] = {
                name: {
                    s: {
                        "auc": {
                            "value": clean - 0.01 * i - 0.02 * int(s) - 0.05 * (run == "adapter"),
                            "low": 0.1,
                            "high": 0.9,
                        }
                    }
                    for s in severities
                }
                for i, name in enumerate(("jpeg", "gaussian_blur"))
            }
    return results


def test_robustness_has_means_only_where_nothing_is_missing(project, tmp_path):
    results = with_robustness(summaries(pd.read_parquet(project / "evaluation/predictions.parquet")))
    del results["adapter"]["seen"]["robustness"]["jpeg"]["3"]
    results["full"]["un_seen"]["robustness"]["jpeg"]["1"]["auc"]["value"] = None
    del results["adapter"]["un_seen"]["robustness"]
    write_tables(tmp_path / "t", results)
    rows = pd.read_csv(tmp_path / "t/robustness.csv", dtype={"severity": str})
    cell = rows.set_index(["run", "testset", "corruption", "severity"])
    clean = results["full"]["seen"]["frame"]["metrics"]["auc"]["value"]
    value = cell["value"]
    assert value["full", "seen", "clean", "0"] == pytest.approx(clean)
    assert value["full", "seen", "jpeg", "3"] == pytest.approx(clean - 0.06)
    assert cell.loc[("full", "seen", "jpeg", "3"), "high"] == 0.9
    assert value["full", "seen", "jpeg", "mean"] == pytest.approx(clean - 0.04)
    assert value["full", "seen", "mean", "3"] == pytest.approx(clean - 0.065)
    assert value["full", "seen", "mean", "mean"] == pytest.approx(clean - 0.045)
    for run, name in (("adapter", "seen"), ("full", "un_seen")):
        assert pd.isna(value[run, name, "jpeg", "mean"])
        assert pd.isna(value[run, name, "mean", "mean"])
        assert value[run, name, "gaussian_blur", "mean"] > 0
    assert cell.loc[("adapter", "seen", "jpeg", "mean"), "gap"] == "1 of 2 severities have a value"
    assert cell.loc[("adapter", "un_seen", "jpeg", "1"), "gap"] == "not evaluated on corrupted images"
    lines = rows_of(tmp_path / "t/results.md")
    assert ["run", "test set", "corruption", "clean", "1", "3", "mean"] in lines
    assert any(line[0] == "full" and line[2] == "mean" and line[-1] == f"{100 * (clean - 0.045):.1f}" for line in lines)
    assert "quality: 90, 75" in (tmp_path / "t/results.md").read_text()
    write_tables(project / "evaluation", results)
    text = page(project)
    assert "AUC against severity of each corruption on un_seen" in text
    assert "gaussian blur" in text
    # An evaluation without corruptions leaves no table of an earlier one.
    write_tables(tmp_path / "t", summaries(pd.read_parquet(project / "evaluation/predictions.parquet")))
    assert not (tmp_path / "t/robustness.csv").exists()
    assert not (tmp_path / "t/calibration.csv").exists()


def test_calibration_and_stored_thresholds_are_reported(project, tmp_path):
    results = summaries(pd.read_parquet(project / "evaluation/predictions.parquet"))
    curves = {"confidence": [0.1, 0.9], "rate": [0.2, 0.7], "count": [11, 13]}
    results["full"]["seen"] |= {
        "calibration": {
            "ece_before": {"value": 0.125}, "ece_after": {"value": 0.0625}, "temperature": 1.75,
            "source": "validation faces", "reliability": {"before": curves, "after": curves},
        },
        "operating": {"fpr_1": {"threshold": 0.9375, "fpr": 0.025, "fnr": 0.4, "balanced_accuracy": None}},
    }  # fmt: skip
    write_tables(tmp_path / "t", results)
    rows = pd.read_csv(tmp_path / "t/calibration.csv").set_index(["threshold", "quantity"])
    assert rows.loc[("fpr_1", "fnr"), "value"] == 0.4
    assert rows.loc[("fpr_1", "balanced_accuracy"), "gap"] == "no balanced_accuracy"
    lines = rows_of(tmp_path / "t/results.md")
    assert ["full", "seen", "validation faces", "12.5", "6.2", "1.75"] in lines
    assert ["full", "seen", "FPR 1 %", "0.9375", "2.5", "40.0", "—"] in lines
    write_tables(project / "evaluation", results)
    text = page(project)
    assert "Reliability before and after" in text
    assert "ECE 12.5 %" in text


def test_command_line(project):
    arguments = [
        "pretrain=pretrain", "runs={full: full, adapter: adapter}", "evaluation=evaluation", "out=report.html"
    ]  # fmt: skip
    command = [sys.executable, "-m", "fsvfm.report", *arguments]
    done = subprocess.run(
        command, cwd=project, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert "report.html" in done.stdout
    assert "ROC curves" in (project / "report.html").read_text()
    (project / "evaluation/results.json").write_text("{")
    done = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
