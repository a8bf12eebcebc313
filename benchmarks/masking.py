"""Speed of batched CRFR-P from region grids, as a ratio to a plain loop over images and their parsing maps.

    python benchmarks/masking.py [--batch 256] [--seconds 3] [--output masking.json]

Both run on one CPU thread and on the same synthetic faces (224×224, patch 16, ratio 0.75). The loop derives the regions
from the parsing map each time, as it must; the batch version reads the region grid that preparation stored, and the
table also shows what deriving that grid costs, once per image.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from baseline.masking import crfr_p_loop
from common import arguments, images_per_second, save, table

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


def main() -> None:
    """Measure, print a table, and write JSON if asked to."""
    parser = arguments(__doc__)
    parser.add_argument("--batch", type=int, default=256, help="images per call")
    parser.add_argument("--seconds", type=float, default=3.0, help="time spent on each row")
    options = parser.parse_args()
    if options.dry:
        options.batch, options.seconds = 4, 0.0

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

    heading = f"batch {options.batch}, {grid.shape[1]} patches, {budget} masked, one CPU thread"
    figures = {name: {"images/s": value, "ratio": value / loop} for name, value in rows.items()}
    table(heading, {"images/s": ",.0f", "ratio": ".1f"}, figures)
    save(options, {"patches": grid.shape[1], "budget": budget, "rows": figures})


if __name__ == "__main__":
    main()
