"""Speed of batched CRFR-P from region grids, as a ratio to a plain loop over images and their parsing maps.

    python benchmarks/masking.py [--batch 256] [--seconds 3] [--output masking.json]

Both run on one CPU thread and on the same synthetic faces (224×224, patch 16, ratio 0.75). The loop derives the regions
from the parsing map each time, as it must; the batch version reads the region grid that preparation stored, and the
table also shows what deriving that grid costs, once per image.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from baseline.masking import crfr_p_loop

from fsvfm.masking import STRATEGIES, crfr_p, mask_budget
from fsvfm.regions import region_grid

SIZE, PATCH, RATIO = 224, 16, 0.75


# Parsing labels painted one over the other, as ellipses: label, centre (x, y) from the middle of the face, radii.
FACE = (
    (10, 0.0, -0.12, 0.38, 0.42),
    (1, 0.0, 0.05, 0.29, 0.38),
    (2, -0.13, -0.13, 0.09, 0.02),
    (3, 0.13, -0.13, 0.09, 0.02),
    (4, -0.13, -0.06, 0.06, 0.025),
    (5, 0.13, -0.06, 0.06, 0.025),
    (6, 0.0, 0.06, 0.05, 0.1),
    (7, 0.0, 0.22, 0.11, 0.02),
    (8, 0.0, 0.24, 0.11, 0.02),
    (9, 0.0, 0.26, 0.11, 0.02),
)


def synthetic_faces(count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, 224, 224) uint8 parsing maps of faces whose place and size vary."""
    y, x = np.mgrid[0:SIZE, 0:SIZE] / SIZE - 0.5
    maps = np.zeros((count, SIZE, SIZE), dtype=np.uint8)
    for labels in maps:
        (dx, dy), scale = rng.uniform(-0.06, 0.06, size=2), rng.uniform(0.8, 1.15)
        for label, cx, cy, rx, ry in FACE:
            labels[(((x - dx) / scale - cx) / rx) ** 2 + (((y - dy) / scale - cy) / ry) ** 2 < 1] = label
    return maps


def images_per_second(run: Callable[[], object], images: int, seconds: float) -> float:
    """Median over repetitions, after one for warming up."""
    run()
    durations = []
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(durations) < 3:
        start = time.perf_counter()
        run()
        durations.append(time.perf_counter() - start)
    return images / float(np.median(durations))


def main() -> None:
    """Measure, print a table, and write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256, help="images per call")
    parser.add_argument("--seconds", type=float, default=3.0, help="time spent on each row")
    parser.add_argument("--output", type=Path, help="where to write the figures as JSON")
    options = parser.parse_args()

    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    maps = synthetic_faces(options.batch, rng)
    grid = torch.from_numpy(region_grid(maps, PATCH))
    budget = mask_budget(grid.shape[1], RATIO)
    generator = torch.Generator().manual_seed(0)

    def speed(run: Callable[[], object]) -> float:
        return images_per_second(run, options.batch, options.seconds)

    loop = speed(lambda: crfr_p_loop(maps, RATIO, PATCH, rng))
    batched = speed(lambda: crfr_p(grid, budget, generator=generator))
    rows = {"crfr_p, loop over parsing maps": loop, "crfr_p, batch of region grids": batched}
    for name in sorted(STRATEGIES.keys() - {"crfr_p"}):
        rows[f"{name}, batch of region grids"] = speed(partial(STRATEGIES[name], grid, budget, generator=generator))
    rows["region grid from parsing map (once, at preparation)"] = speed(lambda: region_grid(maps, PATCH))

    print(f"batch {options.batch}, {grid.shape[1]} patches, {budget} masked, one CPU thread")
    print(f"{'':54}{'images/s':>12}{'ratio':>9}")
    for name, value in rows.items():
        print(f"{name:54}{value:12,.0f}{value / loop:9.1f}")
    if options.output:
        figures = {"batch": options.batch, "patches": grid.shape[1], "budget": budget, "torch": torch.__version__}
        report = {**figures, "ratio": batched / loop, "images_per_second": rows}
        unfinished = options.output.with_name(options.output.name + ".tmp")
        unfinished.write_text(json.dumps(report, indent=2) + "\n")
        unfinished.replace(options.output)


if __name__ == "__main__":
    main()
