"""The row schema: what is refused, what is selected, and that a manifest survives being written."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fsvfm.data.manifest import COLUMNS, Manifest, check_leaks, class_of_folder, leaks, problems, write_rows
from fsvfm.errors import ConfigError, DataError


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
    assert [
        np.frombuffer(value, np.uint8).tolist() for value in pd.read_parquet(tmp_path)["grid_p16"]
    ] == grids.tolist()
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


def test_class_folders() -> None:
    assert [class_of_folder(name) for name in ("real", "Real_c23", "fake-swap", "other")] == [0, 0, 1, None]
    assert class_of_folder("real", {"real": 1}) == 1


def test_people_of_a_forgery_count_one_by_one(tmp_path: Path) -> None:
    table = rows(4, subject=["000", "000+003", "003", "003+000"], video=["000", "000_003", "003", "003_000"])
    counts = Manifest(table, tmp_path).counts()
    assert list(counts["subjects"]) == [2, 2]
    with pytest.raises(DataError) as caught:
        Manifest(table.assign(split=["train", "train", "test", "test"]), tmp_path)
    assert "2 subject(s) in more than one split, a leak: 000 (train, test); 003 (train, test)" in str(caught.value)
    names = table.assign(subject="", video=["a+b", "b", "c", "d"], split=["train", "test", "test", "test"])
    assert len(Manifest(names, tmp_path)) == 4  # only people are joined so, videos may be called anything


def test_columns_that_nobody_asked_for_are_not_read(tmp_path: Path) -> None:
    grids = np.arange(24, dtype=np.uint8).reshape(6, 4)
    points = [np.arange(3, dtype=np.float32)] * 6
    Manifest(rows(grid_p16=list(grids), grid_p14=list(grids), landmarks=points), tmp_path).write()
    assert {"grid_p16", "grid_p14", "landmarks"} <= set(Manifest.read(tmp_path).table)
    some = Manifest.read(tmp_path, extra=["grid_p14", "grid_p8"])
    np.testing.assert_array_equal(some.grids(14), grids)
    assert some.grids(16) is None
    assert list(Manifest.read(tmp_path, extra=()).table) == list(COLUMNS)


def test_older_manifests_hold_grids_as_lists(tmp_path: Path) -> None:
    grids = np.random.default_rng(0).integers(0, 255, (6, 9), dtype=np.uint8)
    rows(grid_p16=[grid.tolist() for grid in grids]).to_parquet(tmp_path / "manifest.parquet")
    manifest = Manifest.read(tmp_path)
    np.testing.assert_array_equal(manifest.grids(16), grids)
    np.testing.assert_array_equal(manifest.select(label=1).grids(16), grids[1::2])


def test_grids_of_two_image_sizes_do_not_hinder_concatenation(tmp_path: Path) -> None:
    small = Manifest(rows(grid_p16=[np.zeros(4, np.uint8)] * 6, grid_p14=[np.ones(5, np.uint8)] * 6), tmp_path / "a")
    large = Manifest(rows(dataset="e", grid_p16=[np.zeros(9, np.uint8)] * 6), tmp_path / "b")
    both = Manifest.concat([small, large])
    assert both.grids(16) is None
    np.testing.assert_array_equal(both.select(datasets="d").grids(14), np.ones((6, 5)))


def test_files_are_the_paths_made_one_by_one(tmp_path: Path) -> None:
    absolute = [f"/elsewhere/{i}.png" if i % 2 else f"images/{i}.png" for i in range(6)]
    manifest = Manifest(rows(path=absolute, parse=["a.png", None, "", "b.png", None, ""]), tmp_path)
    for column in ("path", "parse"):
        files = manifest.files(column)
        assert list(files) == manifest.paths(column)
        assert files[-1] == manifest.paths(column)[-1]
        assert files[1:3] == manifest.paths(column)[1:3]
        assert list(pickle.loads(pickle.dumps(files))) == list(files)
        with pytest.raises(IndexError):
            files[6]
    with pytest.raises(DataError, match="no column 'mask'"):
        manifest.files("mask")


def test_rows_in_parts_are_the_rows_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A column may appear late, be missing in a part, or hold whole numbers here and nothing there."""
    lines: list[dict[str, object]] = rows(20).to_dict("records")
    for number, line in enumerate(lines):
        if number % 3 == 0:
            line["grid_p16"] = np.full(4, number, np.uint8)
        if number > 11:
            line["shot"] = number
            line["origin"] = f"/raw/{number}.jpg"
    assert write_rows(iter(lines), tmp_path / "once.parquet") == 20
    monkeypatch.setattr("fsvfm.data.manifest._ROWS_AT_ONCE", 4)
    assert write_rows(iter(lines), tmp_path / "parts.parquet") == 20
    once, parts = (Manifest.read(tmp_path / f"{name}.parquet") for name in ("once", "parts"))
    assert once.digest() == parts.digest()
    assert list(parts.table["origin"][:12].isna()) == [True] * 12
    assert list(parts.table["shot"][12:]) == list(range(12, 20))
    np.testing.assert_array_equal(parts._subset(np.arange(0, 20, 3)).grids(16)[:, 0], np.arange(0, 20, 3))
    for name in ("grid_p16", "origin", "shot"):
        pd.testing.assert_series_equal(once.table[name], parts.table[name], check_dtype=name != "shot")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["once.parquet", "parts.parquet"]
    assert write_rows(iter(()), tmp_path / "none.parquet") == 0
    assert not (tmp_path / "none.parquet").exists()


def test_the_digest_is_of_the_rows_and_not_of_their_place(tmp_path: Path) -> None:
    here, there = Manifest(rows(), tmp_path / "a"), Manifest(rows(extra=range(6)), tmp_path / "b")
    assert here.digest() == there.digest()
    assert len(here.digest()) == 64
    here.write()
    assert Manifest.read(tmp_path / "a").digest() == here.digest()
    for change in ({"frame": 1}, {"dataset": "e"}, {"video": [f"v{i}" for i in (1, 0, 2, 3, 4, 5)]}):
        assert Manifest(rows(**change), tmp_path).digest() != here.digest()
    shifted = rows(video=["v0v", "1", *(f"v{i}" for i in range(2, 6))])  # the same letters, divided otherwise
    assert Manifest(shifted, tmp_path).digest() != Manifest(rows(video=["v0", "v1", *shifted.video[2:]]), "/").digest()
    assert here.select(label=0).digest() == Manifest(rows()[::2], tmp_path).digest()


def test_a_broken_manifest_can_be_looked_at(tmp_path: Path) -> None:
    rows(label=[0, 1, 2, 1, 0, 1]).to_parquet(tmp_path / "manifest.parquet")
    with pytest.raises(DataError, match="label other than"):
        Manifest.read(tmp_path)
    table = Manifest.read(tmp_path, check=False).table
    assert [text for text in problems(table) if "label other than" in text]


# --- Leaks between manifests -----------------------------------------------------------------------------------------


def test_what_was_trained_on_is_not_tested_on(tmp_path: Path) -> None:
    splits = ["train", "train", "val", "val", "test", "test"]
    trained = Manifest(rows(split=splits, origin=[f"/raw/{i}.mp4" for i in range(6)]), tmp_path / "a")
    assert check_leaks(trained, trained.select(split="test")) == []

    def tested(**columns: object) -> Manifest:
        base = {"path": "x.png", "video": "new", "subject": "", "split": "test"}
        return Manifest(rows(1, **{**base, **columns}), tmp_path / "b")

    assert check_leaks(trained, tested()) == []
    assert check_leaks(trained, tested(video="v0", dataset="another")) == []  # its ids mean something else
    for shared, message in (
        ({"video": "v0"}, r"1 video\(s\) \(v0\)"),
        ({"subject": "s1"}, r"1 subject\(s\) \(s1\)"),
        ({"subject": "other+s1"}, r"1 subject\(s\) \(s1\)"),
        ({"path": str(tmp_path / "a/images/0.png"), "dataset": "another"}, r"1 image\(s\)"),
        ({"origin": "/raw/1.mp4", "dataset": "another"}, r"1 origin\(s\) \(/raw/1.mp4\)"),
    ):
        with pytest.raises(DataError, match=message + ".*also trained on"):
            check_leaks(trained, tested(**shared))
        (warning,) = check_leaks(trained, tested(**shared), allow=True)
        assert "also trained on" in warning
    (warning,) = check_leaks(trained, tested(video="v2"))
    assert "1 video(s) (v2)" in warning
    assert "validated on" in warning
    table = leaks(trained, tested(video="v0", subject="s2", origin=None))
    assert table.to_dict("records") == [
        {"kind": "video", "dataset": "d", "name": "v0"},
        {"kind": "subject", "dataset": "d", "name": "s2"},
    ]


# --- Weights ---------------------------------------------------------------------------------------------------------


def mixed(tmp_path: Path) -> Manifest:
    """10 rows: 6 real of d, 2 of `swap` and 1 of `blend` in d, 1 `swap` in e."""
    return Manifest(
        rows(
            10,
            label=[0] * 6 + [1] * 4,
            method=["real"] * 6 + ["swap", "swap", "blend", "swap"],
            dataset=["d"] * 9 + ["e"],
        ),
        tmp_path,
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, [1 / 10] * 10),
        ({"balance": "class"}, [1 / 12] * 6 + [1 / 8] * 4),
        ({"balance": "method"}, [1 / 12] * 6 + [1 / 12, 1 / 12, 1 / 4, 1 / 12]),
        ({"datasets": {"d": 3, "e": 1}}, [3 / 4 / 9] * 9 + [1 / 4]),
        ({"datasets": {"e": 1.5, "d": 0.5}, "balance": "class"}, [1 / 48] * 6 + [1 / 24] * 3 + [3 / 4]),
        ({"datasets": {"d": 1, "e": 1}, "balance": "method"}, [1 / 24] * 6 + [1 / 16, 1 / 16, 1 / 8, 1 / 2]),
    ],
)
def test_sampling_weights(arguments: dict[str, object], expected: list[float], tmp_path: Path) -> None:
    np.testing.assert_allclose(mixed(tmp_path).sampling_weights(**arguments), expected, rtol=1e-12)


@pytest.mark.parametrize(
    "arguments", [{"balance": "video"}, {"datasets": {"d": 1}}, {"datasets": {"d": 1, "e": 0}}, {"datasets": {}}]
)
def test_impossible_weights(arguments: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        mixed(tmp_path).sampling_weights(**arguments)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("de"), st.sampled_from(["real", "a", "b", "c"])), min_size=1, max_size=30))
def test_weights_sum_to_one_and_balance_what_they_say(pairs: list[tuple[str, str]]) -> None:
    names, methods = zip(*pairs, strict=True)
    label = [int(method != "real") for method in methods]
    manifest = Manifest(rows(len(pairs), label=label, method=list(methods), dataset=list(names)), "/nowhere")
    for balance in (None, "class", "method"):
        shares = {name: 1 + (name == "e") for name in set(names)}
        weights = pd.Series(manifest.sampling_weights(balance=balance, datasets=shares))
        assert weights.min() > 0
        assert weights.sum() == pytest.approx(1)
        table = manifest.table.assign(weight=weights)
        by_set = table.groupby("dataset")["weight"].sum()
        assert (by_set / pd.Series(shares)).std(ddof=0) == pytest.approx(0, abs=1e-12)
        for _, part in table.groupby("dataset"):
            if balance:
                assert part.groupby("label")["weight"].sum().std(ddof=0) == pytest.approx(0, abs=1e-12)
            if balance == "method":
                fakes = part[part["label"] == 1].groupby("method")["weight"].sum()
                assert len(fakes) == 0 or fakes.std(ddof=0) == pytest.approx(0, abs=1e-12)
