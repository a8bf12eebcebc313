"""The landmark parser against an independent segmentation network, on real photographs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fsvfm.faces.crop import crop, square_crop
from fsvfm.faces.detect import DlibHOG
from fsvfm.faces.images import load_image, resize
from fsvfm.faces.landmarks import Landmarks68
from fsvfm.faces.parse import LandmarkParser
from fsvfm.regions import REGION_BIT, region_grid

LEAST_F1 = {"eyebrows": 0.80, "eyes": 0.90, "nose": 0.93, "mouth": 0.95, "boundary": 0.80, "hair": 0.65, "skin": 0.96}
SIZE = 224


@pytest.fixture(scope="module")
def grids(golden_dir: Path, media_dir: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Region names, and what the network and our parser say: (photographs, regions, patches) bool each."""
    with np.load(golden_dir / "parsing_grids.npz") as recorded:
        names, squares = recorded["name"].tolist(), recorded["crop_x_y_size"].tolist()
        regions, expected = recorded["regions"].tolist(), recorded["grid"].astype(bool)
    patch = SIZE // round(expected.shape[-1] ** 0.5)
    detector, predictor, parser = DlibHOG(), Landmarks68(), LandmarkParser()
    found = np.zeros_like(expected)
    for index, (name, square) in enumerate(zip(names, squares, strict=True)):
        image = load_image(media_dir / name)
        height, width = image.shape[:2]
        # A photograph may show several people; the recorded crop says which face is meant.
        boxes = [d.box for d in detector(image) if square_crop(d.box, width, height) == tuple(square)]
        assert boxes, f"no detection in {name} has the recorded crop {square}"
        x, y, side = square
        landmarks = (predictor(image, boxes[0]) - np.float32([x, y])) * np.float32(SIZE / side)
        labels = parser(resize(crop(image, x, y, side), SIZE), landmarks)
        assert labels is not None
        grid = region_grid(labels, patch)
        found[index] = [grid >> REGION_BIT[region] & 1 for region in regions]
    return regions, expected, found


@pytest.mark.parametrize("region", LEAST_F1)
def test_patch_f1(region: str, grids: tuple[list[str], np.ndarray, np.ndarray]) -> None:
    regions, expected, found = grids
    truth, ours = expected[:, regions.index(region)], found[:, regions.index(region)]
    f1 = 2 * (truth & ours).sum() / (truth.sum() + ours.sum())
    print(f"{region}: patch F1 {f1:.3f}")
    assert f1 >= LEAST_F1[region]
