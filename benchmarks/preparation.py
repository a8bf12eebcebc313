"""Preparing photographs, as a ratio to a plain loop over them.

    python benchmarks/preparation.py [--photos <folder>] [--workers 2] [--output preparation.json]

Both write 224×224 PNG faces; ours is the recipe of all data sets of pictures, with its journal, account and manifest.
With `--photos`, faces are found and cropped (dlib HOG, upsampled once). Without it, generated pictures of 300×300 are
taken for faces already, so that decoding, resizing and encoding are measured. No parsing maps: the loop has none.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from baseline.preparation import prepare
from common import arguments, in_turn, save, table
from PIL import Image

from fsvfm.recipes.engine import Catalogue, Entry
from fsvfm.recipes.photos import find_photos
from fsvfm.recipes.stills import prepare_stills

SIZE, SCALE = 224, 1.3


def generated(folder: Path, count: int) -> list[Path]:
    """Smooth pictures with sensor noise, as JPEG."""
    rng = np.random.default_rng(0)
    files = []
    for number in range(count):
        coarse = Image.fromarray(rng.integers(40, 215, (8, 8, 3), dtype=np.uint8))
        picture = np.asarray(coarse.resize((300, 300), Image.Resampling.BICUBIC), np.float32)
        noisy = (picture + rng.normal(0, 2.0, picture.shape)).clip(0, 255).astype(np.uint8)
        files.append(folder / f"{number:05d}.jpg")
        Image.fromarray(noisy).save(files[-1], quality=95)
    return files


def main() -> None:
    """Measure, print a table, and write JSON if asked to."""
    parser = arguments(__doc__)
    parser.add_argument("--photos", type=Path, help="folder of photographs with faces; default: generated pictures")
    parser.add_argument("--images", type=int, default=300, help="pictures at most (default 300)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="processes of ours (default 1 and 2)")
    parser.add_argument("--repeats", type=int, default=3, help="of every row (default 3)")
    options = parser.parse_args()
    if options.dry:
        options.images, options.workers, options.repeats = 4, [1], 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.photos:
            photos = [photo.path.resolve() for photo in find_photos(options.photos)][: options.images]
        else:
            (folder / "photos").mkdir()
            photos = generated(folder / "photos", options.images)
        detect = options.photos is not None
        entries = [
            Entry(str(photo), f"{number:05d}", 0, "train", "real", f"{number:05d}")
            for number, photo in enumerate(photos)
        ]
        catalogue = Catalogue("benchmark", entries, {"about": "benchmark"})
        attempts = iter(range(10_000))

        def ours(workers: int) -> Any:
            return prepare_stills(
                catalogue, out=folder / f"ours_{next(attempts)}", size=SIZE, scale=SCALE,
                detector="dlib_hog" if detect else None, parser=None, max_side=None, workers=workers,
            )  # fmt: skip

        def plain() -> int:
            out = folder / f"plain_{next(attempts)}"
            out.mkdir()
            return prepare(photos, out, SIZE, SCALE, detect)

        runs: Any = {"baseline: a loop": plain}
        for workers in options.workers:
            runs[f"ours, {workers} process(es)"] = lambda workers=workers: ours(workers)
        seconds = in_turn(runs, options.repeats)
    base = seconds["baseline: a loop"]
    rows = {
        name: {"images/s": len(photos) / float(np.median(values)), "ratio": float(np.median(base / values))}
        for name, values in seconds.items()
    }
    work = "found, cropped, resized, saved" if detect else "resized, saved"
    table(f"{len(photos)} pictures: {work}", {"images/s": ",.1f", "ratio": ".2f"}, rows)
    save(options, {"pictures": len(photos), "rows": rows, "seconds": {k: v.tolist() for k, v in seconds.items()}})


if __name__ == "__main__":
    main()
