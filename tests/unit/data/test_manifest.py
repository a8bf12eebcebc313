"""The row schema: what is refused, what is selected, and that a manifest survives being written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fsvfm.data.manifest import COLUMNS, Manifest, class_of_folder, from_folder
from fsvfm.errors import DataError
from fsvfm.faces.images import save_png


def rows(count: int = 6, **columns: object) -> pd.DataFrame:
    """Valid rows of as many people, alternating real and fake, all of them in training."""
    base = {
        "path": [f"images/{i}.png" for i in range(count)],
        "label": [i % 2 for i in range(count)],
        "split": "train",
        "dataset": "d",
        "method": ["real" if i % 2 == 0 else "swap" for i in range(count)],
        "video": [f"v{i}" for i in range(count)],
        "subject": [f"s{i}" for i in range(count)],
        "frame": 0,
    }
    return pd.DataFrame({**base, **columns})


def test_written_and_read_back_equal(tmp_path: Path) -> None:
    grids = np.random.default_rng(0).integers(0, 255, (6, 196), dtype=np.uint8)
    table = rows(grid_p16=list(grids), parse=[f"parsing_maps/{i}.png" for i in range(6)], extra=range(6))
    written = Manifest(table, tmp_path)
    assert written.write() == tmp_path / "manifest.parquet"
    assert [file.name for file in tmp_path.iterdir()] == ["manifest.parquet"]
    read = Manifest.read(tmp_path)
    pd.testing.assert_frame_equal(read.table, written.table)
    assert read.table["label"].dtype == np.int8
    assert read.table["frame"].dtype == np.int32
    np.testing.assert_array_equal(read.grids(16), grids)
    assert read.paths() == [str(tmp_path / f"images/{i}.png") for i in range(6)]
    assert read.parse_paths() == [str(tmp_path / f"parsing_maps/{i}.png") for i in range(6)]
    assert list(read.table["extra"]) == list(range(6))
    assert list(read.table.columns[: len(COLUMNS)]) == list(COLUMNS)


def test_grids_follow_their_rows_and_need_all_of_them(tmp_path: Path) -> None:
    grids = np.arange(6 * 4, dtype=np.uint8).reshape(6, 4)
    partly = [grid if i % 2 == 0 else None for i, grid in enumerate(grids)]
    Manifest(rows(grid_p16=partly), tmp_path).write()
    manifest = Manifest.read(tmp_path)
    assert manifest.grids(16) is None
    assert manifest.grids(14) is None
    np.testing.assert_array_equal(manifest.select(label=0).grids(16), grids[::2])
    np.testing.assert_array_equal(manifest.select(label=0).sample(2, seed=3).grids(16).shape, (2, 4))


def test_csv_is_read_and_numbers_as_ids_stay_text(tmp_path: Path) -> None:
    rows(video=[f"00{i}" for i in range(6)], subject="").assign(subject=[""] * 6).to_csv(
        tmp_path / "manifest.csv", index=False
    )
    manifest = Manifest.read(tmp_path)
    assert list(manifest.table["video"]) == [f"00{i}" for i in range(6)]
    assert list(manifest.table["subject"]) == [""] * 6


@pytest.mark.parametrize("column", list(COLUMNS))
def test_a_missing_column_is_named(column: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=column):
        Manifest(rows().drop(columns=column), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": [0, 1, 2, 1, 0, 1]}, "label other than 0 .*: 2"),
        ({"label": ["0", "1", "x", "1", "0", "1"]}, "no whole number: 'x'"),
        ({"label": [0, 1, 0.5, 1, 0, 1]}, "no whole number"),
        ({"split": "dev"}, "split other than train, val, test: 'dev'"),
        ({"path": "images/same.png"}, "6 row.* path that occurs more than once: 'images/same.png'"),
        ({"path": ["", "b", "c", "d", "e", "f"]}, "without a path"),
        ({"method": "real"}, "label 1 but the method 'real'"),
        ({"method": "swap"}, "label 0 but a method other than 'real'"),
    ],
)
def test_wrong_rows_are_refused_with_examples(change: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        Manifest(rows(**change), tmp_path)


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        Manifest(rows(split="dev", path="same.png"), tmp_path)
    assert "dev" in str(caught.value)
    assert "same.png" in str(caught.value)


@pytest.mark.parametrize("column", ["video", "subject"])
def test_leaks_are_listed(column: str, tmp_path: Path) -> None:
    splits = ["train", "train", "val", "test", "test", "test"]
    with pytest.raises(DataError) as caught:
        Manifest(rows(split=splits, **{column: ["a", "b", "b", "c", "a", "c"]}), tmp_path)
    assert f"2 {column}(s) in more than one split" in str(caught.value)
    assert "a (train, test); b (train, val)" in str(caught.value)


def test_no_leak_across_data_sets_or_for_unknown_people(tmp_path: Path) -> None:
    splits = ["train", "train", "val", "test", "test", "test"]
    assert len(Manifest(rows(split=splits, subject="", video=list("abcdef")), tmp_path)) == 6
    assert len(Manifest(rows(split=splits, dataset=list("uvwxyz"), subject="same", video="same"), tmp_path)) == 6


@settings(max_examples=60, deadline=None)
@given(
    people=st.lists(st.sampled_from("abcd"), min_size=1, max_size=12),
    data=st.data(),
)
def test_a_leak_is_found_exactly_where_there_is_one(people: list[str], data: st.DataObject) -> None:
    splits = data.draw(st.lists(st.sampled_from(["train", "val", "test"]), min_size=len(people), max_size=len(people)))
    table = rows(len(people), subject=people, split=splits)
    seen: dict[str, set[str]] = {}
    for person, split in zip(people, splits, strict=True):
        seen.setdefault(person, set()).add(split)
    leaking = sorted(person for person, where in seen.items() if len(where) > 1)
    if not leaking:
        Manifest(table, "/nowhere")
        return
    with pytest.raises(DataError) as caught:
        Manifest(table, "/nowhere")
    listed = str(caught.value).split("a leak: ")[1]
    assert [part.split(" ")[0] for part in listed.split("; ")] == leaking


def test_select_combines_conditions_and_says_what_there_is(tmp_path: Path) -> None:
    manifest = Manifest(
        rows(split=["train"] * 3 + ["test"] * 3, method=["real", "a", "real", "b", "real", "a"]), tmp_path
    )
    assert list(manifest.select(split="test", label=1).table["method"]) == ["b", "a"]
    assert list(manifest.select(methods=["real", "b"]).table["path"]) == [f"images/{i}.png" for i in (0, 2, 3, 4)]
    assert len(manifest.select()) == 6
    assert len(manifest.select(split=["train", "test"], datasets="d")) == 6
    with pytest.raises(DataError) as caught:
        manifest.select(split="train", methods="b")
    for part in ("split='train'", "method='b'", "test", "real"):
        assert part in str(caught.value)


def test_both_classes_are_required(tmp_path: Path) -> None:
    manifest = Manifest(rows(), tmp_path)
    manifest.require_both_classes("training")
    with pytest.raises(DataError, match=r"chosen for training are all fake"):
        manifest.select(label=1).require_both_classes("training")


def test_sample_is_reproducible_and_without_repetition(tmp_path: Path) -> None:
    manifest = Manifest(rows(40), tmp_path)
    paths = manifest.sample(10, seed=1).paths()
    assert paths == manifest.sample(10, seed=1).paths()
    assert paths != manifest.sample(10, seed=2).paths()
    assert len(set(paths)) == 10
    assert paths == [path for path in manifest.paths() if path in set(paths)]
    assert manifest.sample(100, seed=1).paths() == manifest.paths()
    with pytest.raises(DataError):
        manifest.sample(0, seed=1)


def test_concatenation_keeps_files_and_finds_repetition(tmp_path: Path) -> None:
    one = Manifest(rows(grid_p16=[np.full(4, i, np.uint8) for i in range(6)]), tmp_path / "one")
    two = Manifest(rows(dataset="e"), tmp_path / "two")
    both = Manifest.concat([one, two])
    assert both.paths() == one.paths() + two.paths()
    np.testing.assert_array_equal(both.select(datasets="d").grids(16), one.grids(16))
    assert both.select(datasets="e").grids(16) is None
    assert Manifest.concat([one]) is one
    with pytest.raises(DataError, match="more than once"):
        Manifest.concat([one, one])
    with pytest.raises(DataError):
        Manifest.concat([])


def test_counts_order_splits(tmp_path: Path) -> None:
    splits = ["test", "test", "val", "val", "train", "train"]
    counts = Manifest(rows(split=splits), tmp_path).counts()
    assert list(counts["split"]) == ["train", "train", "val", "val", "test", "test"]
    assert counts["images"].sum() == 6


def test_relative_paths_are_not_written_elsewhere(tmp_path: Path) -> None:
    manifest = Manifest(rows(), tmp_path / "data")
    with pytest.raises(DataError, match="outside"):
        manifest.write(tmp_path / "other" / "manifest.parquet")
    with pytest.raises(DataError, match="parquet"):
        manifest.write(tmp_path / "data" / "manifest.csv")


def test_unreadable_manifests_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no manifest at"):
        Manifest.read(tmp_path)
    (tmp_path / "manifest.parquet").write_bytes(b"not a table")
    with pytest.raises(DataError, match="not a readable"):
        Manifest.read(tmp_path)
    with pytest.raises(DataError, match="no rows"):
        Manifest(rows(0), tmp_path)


def test_class_folders(tmp_path: Path) -> None:
    assert [class_of_folder(name) for name in ("real", "Real_c23", "fake-swap", "other")] == [0, 0, 1, None]
    assert class_of_folder("real", {"real": 1}) == 1
    for name in ("real/ann/1.png", "real/2.png", "fake_x/3.png"):
        save_png(tmp_path / name, np.zeros((4, 4, 3), np.uint8))
    table = from_folder(tmp_path).table
    assert list(table["path"]) == ["fake_x/3.png", "real/2.png", "real/ann/1.png"]
    assert list(table["method"]) == ["fake_x", "real", "real"]
    assert list(table["subject"]) == ["3", "2", "ann"]
    save_png(tmp_path / "other" / "4.png", np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(DataError, match=r"is the folder .*other real or fake"):
        from_folder(tmp_path)
    assert len(from_folder(tmp_path, classes={"other": 1})) == 4
