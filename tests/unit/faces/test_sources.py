"""What there is to score: every file once, in order, whatever the folder looks like, and an error for what is not."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fsvfm.errors import DataError
from fsvfm.faces import sources
from fsvfm.faces.sources import Input, count, inputs, kind_of, readable


@pytest.fixture
def shots(tmp_path: Path) -> Path:
    """A folder with sub-folders, hidden and other files, and names that are no plain words."""
    root = tmp_path / "shots"
    for name in (
        "b.jpg", "a b (1).PNG", "naïve ü, x=1.webp", "clip.MP4", "notes.md", ".hidden.jpg", "sub/deep/c.jpeg",
        "sub/d.mov", ".cache/e.jpg", "empty/readme",
    ):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def names(found: Iterator[Input], root: Path) -> list[str]:
    return [Path(each.source).relative_to(root).as_posix() for each in found]


def test_a_folder_is_walked_in_order(shots: Path) -> None:
    expected = ["a b (1).PNG", "b.jpg", "clip.MP4", "naïve ü, x=1.webp", "sub/d.mov", "sub/deep/c.jpeg"]
    assert names(inputs(shots), shots) == expected
    assert count(str(shots)) == 6
    assert [each.kind for each in inputs(shots)] == ["photo", "photo", "video", "photo", "video", "photo"]
    assert not any(each.error for each in inputs(shots))


def test_folders_that_contain_themselves_are_walked_once(shots: Path) -> None:
    (shots / "sub" / "up").symlink_to(shots)
    (shots / "again").symlink_to(shots / "sub")
    (shots / "self").symlink_to("self")
    (shots / "gone.jpg").symlink_to("nowhere.jpg")
    found = names(inputs(shots), shots)
    assert len(found) == 7
    assert len({Path(name).name for name in found}) == 7
    assert len(names(inputs(f"{shots}/**/*.mov"), shots)) == 1


def test_a_large_folder_is_listed_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "BLOCK", 10)
    for number in range(95):
        (tmp_path / f"{number:03d}.jpg").touch()
    found = names(inputs(tmp_path), tmp_path)
    assert sorted(found) == [f"{number:03d}.jpg" for number in range(95)]
    blocks = [found[start : start + 10] for start in range(0, 95, 10)]
    assert all(block == sorted(block) for block in blocks)
    # The first file is there before the whole folder was listed.
    assert len(list(itertools.islice(inputs(tmp_path), 3))) == 3


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jpg", ["b.jpg"]),
        ("*.[PM]*", ["a b (1).PNG", "clip.MP4"]),
        ("**/*.jp*g", ["b.jpg", "sub/deep/c.jpeg"]),
        ("sub/**", ["sub/d.mov", "sub/deep/c.jpeg"]),
        ("*/d.mov", ["sub/d.mov"]),
        ("s?b/*/*", ["sub/deep/c.jpeg"]),
    ],
)
def test_patterns(shots: Path, pattern: str, expected: list[str]) -> None:
    assert names(inputs(f"{shots}/{pattern}"), shots) == expected


@settings(max_examples=60, deadline=None)
@given(
    files=st.lists(st.lists(st.sampled_from(["a", "b", "ab"]), min_size=1, max_size=3), max_size=6),
    pattern=st.lists(st.sampled_from(["a", "*", "a*", "?", "**"]), min_size=1, max_size=3),
)
def test_patterns_match_what_pathlib_matches(
    tmp_path_factory: pytest.TempPathFactory, files: list[list[str]], pattern: list[str]
) -> None:
    root = tmp_path_factory.mktemp("glob")
    for parts in files:
        path = root.joinpath(*parts[:-1], f"{parts[-1]}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    text = "/".join(["*", *pattern][1:]) + "/*.jpg"  # ends in a file, where both mean the same by **
    wanted = {path.relative_to(root).as_posix() for path in root.glob(text)}
    try:
        found = names(inputs(f"{root}/{text}"), root) if any(s in text for s in "*?") else []
    except DataError:
        found = []
    assert sorted(found) == sorted(wanted)


def test_a_list_names_files_and_folders(shots: Path, tmp_path: Path) -> None:
    listed = tmp_path / "list.txt"
    lines = ["\ufeff# ours", "shots/b.jpg", "", "shots/sub", "shots/missing.jpg", f"{shots}/clip.MP4", "shots/empty"]
    listed.write_text("\r\n".join(lines), encoding="utf-8")
    found = list(inputs(listed))
    assert [Path(each.source).name for each in found] == [
        "b.jpg", "d.mov", "c.jpeg", "missing.jpg", "clip.MP4", "empty",
    ]  # fmt: skip
    assert [each.error is None for each in found] == [True] * 5 + [False]
    listed.write_text("# nothing\n\n")
    with pytest.raises(DataError, match="no photograph and no video"):
        list(inputs(listed))


def test_several_sources_keep_their_errors_to_themselves(shots: Path) -> None:
    found = list(inputs([str(shots / "b.jpg"), str(shots / "absent.jpg"), f"{shots}/sub", "webcam:1", "webcam:x"]))
    assert [each.kind for each in found] == ["photo", "photo", "video", "photo", "webcam", "photo"]
    assert ["does not exist" in (each.error or "") for each in found] == [False, True] + [False] * 4
    assert "webcam:0" in str(found[-1].error)


@pytest.mark.parametrize("what", ["absent.jpg", "absent/*.jpg", "empty", "empty/*.jpg", "webcam:first"])
def test_nothing_to_score_is_an_error(shots: Path, what: str) -> None:
    with pytest.raises(DataError):
        count(what if what.startswith("webcam") else str(shots / what))


def test_a_folder_that_cannot_be_listed_is_one_error(shots: Path) -> None:
    (shots / "closed").mkdir(mode=0)
    found = [each for each in inputs(shots) if each.error]
    if os.geteuid() == 0:
        pytest.skip("root lists every folder")
    assert len(found) == 1
    assert "closed" in str(found[0].error)


def test_a_file_without_a_known_suffix_is_what_it_holds(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "upload", format="PNG")
    (tmp_path / "other").write_bytes(b"\0" * 100)
    assert [kind_of(tmp_path / name) for name in ("upload", "other")] == ["photo", "video"]
    assert next(inputs(tmp_path / "upload")).kind == "photo"


def test_names_that_are_no_unicode_can_be_written_down(tmp_path: Path) -> None:
    name = b"caf\xe9.jpg"
    with open(os.path.join(os.fsencode(tmp_path), name), "wb"):  # noqa: PTH118, PTH123
        pass
    (found,) = inputs(tmp_path)
    assert Path(found.source).exists()
    assert readable(found.source).endswith("caf\\xe9.jpg")
    readable(found.source).encode()
