"""Speed of the pre-training loader, per core, as a ratio to PIL + ``.npy`` + masking per image.

    python benchmarks/loading.py [--images 512] [--seconds 5] [--data <prepared folder>] [--output loading.json]

Every row makes the same thing on one CPU thread: a batch of normalised 224×224 images with CRFR-P masks. Rows that
begin with … leave out masks and normalisation, which training does on the device. Ours reads PNG files, then packed
copies (``fsz`` lossless, ``jpeg``), in the order that training reads them. Without ``--data`` the faces are synthetic:
smooth shapes with sensor noise, about as hard to compress as photographs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import torch
from baseline.loading import load_batch
from common import arguments, images_per_second, save, table
from masking import synthetic_faces
from PIL import Image

from fsvfm.data.datasets import PretrainFaces, collate
from fsvfm.data.manifest import Manifest
from fsvfm.data.sampling import EpochSampler
from fsvfm.faces.images import save_labels, save_png
from fsvfm.masking import crfr_p
from fsvfm.recipes.pack import pack
from fsvfm.regions import region_grid

SIZE, PATCH, BATCH = 224, 16, 64
MEAN, STD = np.array([0.548, 0.423, 0.365], np.float32), np.array([0.279, 0.244, 0.235], np.float32)


def synthetic_data(folder: Path, count: int) -> Manifest:
    """A prepared folder of synthetic faces."""
    rng = np.random.default_rng(0)
    rows = []
    for number, labels in enumerate(synthetic_faces(count, rng)):
        coarse = rng.integers(40, 215, (8, 8, 3), dtype=np.uint8)
        picture = np.asarray(Image.fromarray(coarse).resize((SIZE, SIZE), Image.Resampling.BICUBIC), np.float32)
        picture = picture + labels[..., None] * 4 + rng.normal(0, 2.0, picture.shape)
        name = f"face_{number:06d}"
        save_png(folder / f"images/{name}.png", picture.clip(0, 255).astype(np.uint8))
        save_labels(folder / f"parsing_maps/{name}.png", labels)
        rows.append(
            {
                "path": f"images/{name}.png", "label": 0, "split": "train", "dataset": "synthetic", "method": "real",
                "video": name, "subject": "", "frame": 0, "parse": f"parsing_maps/{name}.png",
                "grid_p16": region_grid(labels, PATCH),
            }
        )  # fmt: skip
    manifest = Manifest(pd.DataFrame(rows), folder)
    manifest.write()
    return manifest


def main() -> None:
    """Measure, print a table, and write JSON if asked to."""
    parser = arguments(__doc__)
    parser.add_argument("--images", type=int, default=512, help="faces in the set")
    parser.add_argument("--seconds", type=float, default=5.0, help="time spent on each row")
    parser.add_argument("--data", type=Path, help="prepared folder with parsing maps (224 pixels); default: synthetic")
    options = parser.parse_args()
    if options.dry:
        options.images, options.seconds = BATCH, 0.0
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source = options.data or folder / "files"
        manifest = Manifest.read(source) if options.data else synthetic_data(source, options.images)
        manifest = manifest.select(label=0).sample(options.images, 0)
        maps = folder / "npy"  # the published layout keeps maps as .npy; the baseline reads those
        maps.mkdir()
        plain = []
        for number, parse in enumerate(manifest.parse_paths() or []):
            file = maps / f"{number}.npy"
            np.save(file, np.asarray(Image.open(parse or ""), np.int8)[None])
            plain.append(file)
        files = [Path(path) for path in manifest.paths()]
        rng = np.random.default_rng(0)
        rows: dict[str, float] = {}

        parts = cycle(range(0, len(files) - BATCH + 1, BATCH))

        def baseline() -> None:
            start = next(parts)
            load_batch(files[start : start + BATCH], plain[start : start + BATCH], MEAN, STD, rng)

        rows["baseline: PIL, .npy, masks in a loop"] = images_per_second(baseline, BATCH, options.seconds)
        generator = torch.Generator().manual_seed(0)
        mean, std = (255 * torch.from_numpy(values).view(1, 3, 1, 1) for values in (MEAN, STD))
        kinds = {"PNG files": source}
        for codec in ("fsz", "jpeg"):
            pack(source, out=folder / codec, codec=codec, workers=1)
            kinds[f"packed, {codec}" + (" (lossless)" if codec == "fsz" else " (quality 95)")] = folder / codec
        for name, place in kinds.items():
            dataset = PretrainFaces(Manifest.read(place).select(label=0), image_size=SIZE, patch_size=PATCH)
            batches = cycle(list(EpochSampler(len(dataset), BATCH)))

            def load(dataset: PretrainFaces = dataset, batches: cycle = batches) -> dict[str, Any]:
                return collate([dataset[draw] for draw in next(batches)])

            def ours(load: Callable[[], dict[str, Any]] = load) -> None:
                batch = load()
                crfr_p(batch["grid"], 147, generator=generator)
                batch["image"].float().sub_(mean).div_(std)  # as tasks do, there on the device

            rows[f"ours, {name}"] = images_per_second(ours, BATCH, options.seconds)
            rows[f"… a loader process' part, {name}"] = images_per_second(load, BATCH, options.seconds)
    base = next(iter(rows.values()))
    figures = {name: {"images/s": value, "ratio": value / base} for name, value in rows.items()}
    heading = f"{len(files)} faces of {SIZE}×{SIZE}, batches of {BATCH}, one CPU thread"
    table(heading, {"images/s": ",.0f", "ratio": ".1f"}, figures)
    save(options, {"faces": len(files), "rows": figures})


if __name__ == "__main__":
    main()
