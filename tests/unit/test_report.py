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
from fsvfm.metrics.forgery import summarise
from fsvfm.report import result_rows, write_report, write_tables


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
