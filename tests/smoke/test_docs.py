"""The documentation's code runs as it stands there, its tables are made, and the site builds without a warning."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
from PIL import Image

DOCS = Path(__file__).resolve().parents[2] / "docs"
_FENCE = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    language: str
    title: str
    code: str


def blocks(page: str, heading: str | None = None) -> list[Block]:
    """Code blocks of a page, or of one of its sections."""
    text = (DOCS / page).read_text(encoding="utf-8")
    if heading is not None:
        text = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return [Block(*found) for found in _FENCE.findall(text)]


def follow(page: str, folder: Path, heading: str | None = None) -> str:
    """Do what a reader of the page would do, in a folder; returns what was printed."""
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "2"}
    for name in ("FSVFM_DATA", "FSVFM_RUNS"):
        env.pop(name, None)
    told = []
    for block in blocks(page, heading):
        if block.title:
            (folder / block.title).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.title).write_text(block.code)
            continue
        if block.language == "python":  # in this process, which has the heavy imports already
            with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(compile(block.code, page, "exec"), {"__name__": "__main__"})
            told.append(printed.getvalue())
            continue
        command = ["bash", "-euo", "pipefail", "-c", block.code]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        told.append(done.stdout + done.stderr)
        assert done.returncode == 0, f"{page}:\n{block.code}\n{told[-1]}"
        assert "Traceback" not in told[-1], told[-1]
    return "\n".join(told)


def test_walkthrough_runs(tmp_path: Path, media_dir: Path) -> None:
    (tmp_path / "photos").mkdir()
    for photo in sorted((media_dir / "photos").glob("*.jpg"))[:20]:
        shutil.copy(photo, tmp_path / "photos")
    told = follow("walkthrough.md", tmp_path)
    assert "Prepared: " in told
    assert re.search(r"(real|fake|uncertain)$", told, re.MULTILINE)
    for name in (
        "data/demo/contact_sheet.png", "runs/demo_pretrain/metrics.csv", "runs/demo_dfd/test/results.md",
        "scores/predictions.jsonl", "report.html",
    ):  # fmt: skip
        assert (tmp_path / name).is_file(), name
    assert list((tmp_path / "scores" / "annotated").iterdir())
    assert list((tmp_path / "scores" / "explanations").iterdir())


@pytest.fixture
def workplace(tmp_path: Path, prepared_dir: Path) -> Path:
    """A folder with prepared faces where the pages expect them."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "demo").symlink_to(prepared_dir)
    return tmp_path


def test_own_masking_strategy_and_experiment(workplace: Path) -> None:
    follow("extending.md", workplace, "A new masking strategy")
    assert "lower_first" in (workplace / "runs" / "lower_first" / "config.yaml").read_text()
    follow("extending.md", workplace, "An experiment of your own")
    losses = [
        pd.read_csv(workplace / "runs" / name / "metrics.csv")["train/loss_epoch"].dropna().tolist()
        for name in ("lower_first", "as_experiment")
    ]
    assert losses[0] == losses[1], "a file and the command line say the same"


def test_own_head(workplace: Path) -> None:
    follow("extending.md", workplace, "A new head")
    assert '"patch_votes"' in (workplace / "runs" / "patch_votes" / "export" / "model.json").read_text()


def test_own_data_set(tmp_path: Path, media_dir: Path) -> None:
    for number, photo in enumerate(sorted((media_dir / "photos").glob("*.jpg"))[:6]):
        person = tmp_path / "raw" / f"person{number}"
        person.mkdir(parents=True)
        shutil.copy(photo, person / "genuine.jpg")
        pixels = np.asarray(Image.open(photo).convert("RGB"))
        Image.fromarray(255 - (255 - pixels) // 2).save(person / "morph_1.jpg")
    told = follow("extending.md", tmp_path, "A new data set")
    rows = pd.read_parquet(tmp_path / "data" / "morphs" / "manifest.parquet")
    assert set(rows["method"]) == {"real", "morph"}, told
    assert rows.groupby("subject")["split"].nunique().max() == 1


@pytest.mark.parametrize("page", ["metrics.md"])
def test_python_of_other_pages_runs(page: str, tmp_path: Path) -> None:
    follow(page, tmp_path)


def test_quoted_messages_are_real() -> None:
    """What the troubleshooting page quotes is what the code says."""
    source = "".join(path.read_text(encoding="utf-8") for path in (DOCS.parent / "src").rglob("*.py"))
    said = re.sub(r'"\s*\n\s*f?"', "", source)  # strings that go on in the next line
    quoted = re.findall(r"`([^`\n]*)`(?: —|\*\*| \*\*)", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"))
    parts = [part.strip() for text in quoted for part in text.split("…") if len(part.strip()) > 14]
    assert len(parts) > 8
    assert [part for part in parts if part not in said and "=" not in part] == []


def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    # Not --quiet: what is not shown is not counted as a warning either.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=DOCS.parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "site" / "experiments" / "index.html").read_text(encoding="utf-8")
    assert "dfd_vitb_adapter" in page
    assert "<!-- table" not in page
