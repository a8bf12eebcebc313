"""Lists, JSON files and tables that users bring: what is read, what is left out, and what is refused with its place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st

import miniatures
from fsvfm.data.manifest import Manifest
from fsvfm.errors import ConfigError, DataError
from fsvfm.faces.images import load_image, save_png
from fsvfm.recipes.engine import Catalogue
from fsvfm.recipes.lists import json_catalogue, list_catalogue, table_catalogue

Rows = list[tuple[str, int]]
PICTURES: Rows = [("a.png", 0), ("in a folder/b, c.png", 1), ("d.png", 1)]


def as_list(file: Path, rows: Rows, separator: str = " ", end: str = "\n", start: str = "") -> Path:
    text = start + "".join(f"{path}{separator}{label}{end}" for path, label in rows)
    file.write_bytes(text.encode())
    return file


def as_json(file: Path, rows: Rows) -> Path:
    file.write_text(json.dumps([{"path": path, "label": label} for path, label in rows]))
    return file


def as_csv(file: Path, rows: Rows) -> Path:
    pd.DataFrame(rows, columns=["path", "label"]).to_csv(file, index=False)
    return file


def as_parquet(file: Path, rows: Rows) -> Path:
    pd.DataFrame(rows, columns=["path", "label"]).to_parquet(file)
    return file


FORMATS: dict[str, tuple[Callable[[Path, Rows], Path], Callable[..., Catalogue]]] = {
    "list.txt": (as_list, list_catalogue),
    "list.json": (as_json, json_catalogue),
    "list.csv": (as_csv, table_catalogue),
    "list.parquet": (as_parquet, table_catalogue),
}


def read(catalogue: Catalogue) -> dict[str, int]:
    return {each.video: each.label for each in catalogue.entries}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for path, _ in PICTURES:
        save_png(tmp_path / path, np.full((8, 8, 3), 90, np.uint8))
    return tmp_path


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_says_the_same(name: str, folder: Path) -> None:
    write, load = FORMATS[name]
    catalogue = load(write(folder / name, PICTURES), name="own")
    assert read(catalogue) == dict(PICTURES)
    assert {each.method for each in catalogue.entries if each.label} == {"fake"}
    assert {each.split for each in catalogue.entries} == {"test"}
    assert [Path(each.file) for each in catalogue.entries] == [folder / path for path, _ in PICTURES]
    assert len({each.name for each in catalogue.entries}) == 3


@pytest.mark.parametrize("name", FORMATS)
def test_the_other_convention_prefixes_and_splits(name: str, folder: Path, tmp_path_factory: Any) -> None:
    write, load = FORMATS[name]
    file = write(tmp_path_factory.mktemp("elsewhere") / name, PICTURES)
    catalogue = load(file, name="own", prefix=str(folder), fake_label=0, split="train")
    assert read(catalogue) == {path: 1 - label for path, label in PICTURES}
    assert {each.split for each in catalogue.entries} == {"train"}
    with pytest.raises(DataError, match=r"none of the 3 listed pictures exists, the first: .*recipe\.prefix"):
        load(file, name="own")
    with pytest.raises(ConfigError, match="fake_label"):
        load(file, name="own", fake_label=2)
    with pytest.raises(ConfigError, match=r"recipe\.split"):
        load(file, name="own", split="dev")


@pytest.mark.parametrize("separator", [" ", ",", ", ", " , ", "\t", "   "])
@pytest.mark.parametrize(("start", "end"), [("", "\n"), ("\ufeff", "\r\n"), ("\n\n", "\n\n"), ("", " \n")])
def test_lists_of_all_kinds(folder: Path, separator: str, start: str, end: str) -> None:
    file = as_list(folder / "list.txt", PICTURES, separator, end, start)
    assert read(list_catalogue(file, name="own")) == dict(PICTURES)


@settings(max_examples=150, deadline=None)
@given(
    path=st.text(st.sampled_from("ab 01,;()é"), min_size=1, max_size=14).filter(lambda text: text.strip(" ,") == text),
    label=st.sampled_from([0, 1]),
    separator=st.sampled_from([" ", ",", ", "]),
)
def test_the_label_is_what_stands_last(path: str, label: int, separator: str, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.getbasetemp() / "lists"
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    (folder / "pictures" / path).touch()
    file = as_list(folder / "one.txt", [(path, label)], separator)
    assert read(list_catalogue(file, name="own", prefix=str(folder / "pictures"))) == {path: label}


def test_windows_separators_and_absolute_paths(folder: Path) -> None:
    rows = [("in a folder\\b, c.png", 1), (str(folder / "a.png"), 0)]
    found = list_catalogue(as_list(folder / "list.txt", rows), name="own")
    assert [Path(each.file).name for each in found.entries] == ["b, c.png", "a.png"]


def test_missing_and_repeated_files_are_counted_not_hidden(folder: Path) -> None:
    rows = [*PICTURES, ("lost.png", 1), ("a.png", 0), ("./a.png", 0)]
    catalogue = list_catalogue(as_list(folder / "list.txt", rows), name="own")
    assert read(catalogue) == dict(PICTURES)
    assert [(Path(file).name, reason) for file, reason in catalogue.skipped] == [
        ("lost.png", "no such file"),
        ("a.png", "listed twice"),
        ("a.png", "listed twice"),
    ]


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("list.txt", [("a.png", 0), ("d.png", 2)], r"list\.txt, line 2: the label is '2'; expected 0 .* or 1"),
        ("list.txt", [("a.png", "fake")], "line 1: the label is 'fake'"),
        ("list.json", [("a.png", 0), ("d.png", -1)], "entry 2: the label is '-1'"),
        ("list.json", [("a.png", True)], "entry 1: the label is 'True'"),
        ("list.csv", [("a.png", 0), ("d.png", 0.5)], "row 3: the label is '0.5'"),
        ("list.parquet", [("a.png", 0), ("d.png", 7)], "row 2: the label is '7'"),
        ("list.json", [("", 0)], "entry 1: no path"),
        ("list.csv", [("a.png", 0), ("a.png", 1)], r"row 3: a\.png is listed both as real and as fake"),
    ],
)
def test_wrong_rows_are_refused_with_their_place(name: str, rows: Any, message: str, folder: Path) -> None:
    write, load = FORMATS[name]
    with pytest.raises(DataError, match=message):
        load(write(folder / name, rows), name="own")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.txt", b"a.png\n", r"line 1: 'a\.png' has no label"),
        ("list.txt", b"", "it is empty"),
        ("list.txt", b"\xff\xfe\x00a", "not UTF-8"),
        ("list.json", b"{", "is not JSON"),
        ("list.json", b'{"a.png": 0}', "holds dict; expected a list"),
        ("list.json", b'["a.png"]', "expected a list"),
        ("list.csv", b"file,label\na.png,0\n", r"lacks the column\(s\) path; it has file, label"),
        ("list.parquet", b"no table", "not a readable CSV or Parquet"),
    ],
)
def test_other_files_are_told(name: str, content: bytes, message: str, folder: Path) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        FORMATS[name][1](folder / name, name="own")
    with pytest.raises(DataError, match="is not a file"):
        FORMATS[name][1](folder / f"no_{name}", name="own")


def test_further_columns_are_used(folder: Path) -> None:
    rows = pd.DataFrame(
        {
            "path": [path for path, _ in PICTURES],
            "label": ["0", "1", "1"],
            "split": ["train", "", "val"],
            "method": ["", "swap", ""],
            "video": ["v0", "v1", ""],
            "subject": ["ann", "", None],
            "frame": ["3", "", "12"],
            "age": [30, 40, 50],
        }
    )
    rows.to_csv(folder / "list.csv", index=False)
    rows.to_parquet(folder / "list.parquet")
    (folder / "list.json").write_text(rows.to_json(orient="records"))
    for name in ("list.csv", "list.parquet", "list.json"):
        entries = FORMATS[name][1](folder / name, name="own").entries
        assert [(e.split, e.method, e.video, e.subject, dict(e.more)) for e in entries] == [
            ("train", "real", "v0", "ann", {"frame": 3}),
            ("test", "swap", "v1", "", {}),
            ("val", "fake", "d.png", "", {"frame": 12}),
        ]
    for column, value, message in (
        ("split", "dev", "row 2: the split is 'dev'"),
        ("frame", "x", "row 2: the frame is 'x'"),
        ("method", "real", "row 2: a fake with the method 'real'"),
    ):
        wrong = rows.assign(**{column: value, "label": "1"})
        wrong.to_csv(folder / "wrong.csv", index=False)
        with pytest.raises(DataError, match=message):
            table_catalogue(folder / "wrong.csv", name="own")


def test_a_list_becomes_a_prepared_folder(media_dir: Path, tmp_path: Path) -> None:
    """By the command, with Windows line ends, a path with a blank and a file that is not there."""
    photos = miniatures.faces(media_dir)
    save_png(tmp_path / "real one.png", photos[0])
    save_png(tmp_path / "fake.png", miniatures.forged(photos[1]))
    file = as_list(tmp_path / "list.txt", [("real one.png", 0), ("fake.png", 1), ("lost.png", 1)], ", ", "\r\n")
    command = [sys.executable, "-m", "fsvfm.prepare", "recipe=list", f"root={file}", "recipe.name=own", "workers=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FSVFM_DATA": str(tmp_path / "data")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "no such file" in done.stdout
    manifest = Manifest.read(tmp_path / "data" / "own")
    assert manifest.table[["label", "method", "dataset", "split"]].to_numpy().tolist() == [
        [0, "real", "own", "test"],
        [1, "fake", "own", "test"],
    ]
    assert load_image(manifest.paths()[0]).shape[0] < photos[0].shape[0]
    assert "lost.png" in (manifest.root / "skipped.csv").read_text()


@pytest.mark.parametrize(("recipe", "name"), [("list", "list.txt"), ("json", "list.json"), ("csv", "list.parquet")])
def test_recipes_take_pictures_as_they_are(recipe: str, name: str, folder: Path, tmp_path: Path) -> None:
    file = FORMATS[name][0](folder / name, PICTURES)
    with initialize_config_module("fsvfm.configs", version_base="1.3"):
        cfg = compose("prepare", [f"recipe={recipe}", f"root={file}", "recipe.detector=null", "recipe.split=val"])
    made = instantiate(cfg.recipe, _partial_=True, _convert_="all")(out=str(tmp_path / "out"), workers=1)
    table = made.manifest.table
    assert dict(zip(table["video"], table["label"], strict=True)) == dict(PICTURES)
    assert set(table["split"]) == {"val"}
    assert set(table["dataset"]) == {recipe}
    for path in made.manifest.paths():
        np.testing.assert_array_equal(load_image(path), np.full((8, 8, 3), 90, np.uint8))
