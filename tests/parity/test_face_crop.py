"""Crops and frame indices as recorded from the published preparation scripts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fsvfm.faces.crop import square_crop
from fsvfm.faces.video import frame_indices


@pytest.fixture(scope="module")
def tables(golden_dir: Path) -> dict[str, Any]:
    return json.loads((golden_dir / "tables.json").read_text())


def test_square_crop(tables: dict[str, Any]) -> None:
    recorded = tables["face_crop"]
    assert recorded["cases"]
    for case in recorded["cases"]:
        found = square_crop(tuple(case["face_ltrb"]), case["width"], case["height"], recorded["scale"])
        assert list(found) == case["crop_x_y_size"], case


def test_frame_indices(tables: dict[str, Any]) -> None:
    assert tables["frame_indices"]
    for case in tables["frame_indices"]:
        # The scripts ask for a frame of a short video several times; one row of it is enough.
        assert frame_indices(case["total"], case["frames"]) == sorted(set(case["indices"])), case
