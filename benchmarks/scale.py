"""Memory and time of preparing, and of starting an epoch on, millions of images; indices only, no pixels.

    python benchmarks/scale.py [--images 3000000] [--files] [--folder /tmp/scale] [--output scale.json]

Processes one after the other, so that each one's memory is its own: `prepare` takes a catalogue of so many pictures
through the engine to a manifest, with a worker that says what a face extractor would say; `epoch` reads the manifest,
builds the pre-training data set and draws the first batch (PyTorch alone is about 0.9 GB of it); `inspect` looks at the
result. With `--files`, empty ones are made for the pictures, and `resume` finds out that nothing is left to do.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import arguments, save

from fsvfm.data.manifest import Manifest
from fsvfm.recipes.engine import IMAGES, PARSING_MAPS, Catalogue, Entry, Item, Preparation, Product, spread
from fsvfm.recipes.inspect import inspect

PER_PERSON = 340  # as in VGGFace2


class Extractor:
    """Worker: what is known of a face that was cropped and parsed."""

    def __init__(self, out: Path | None) -> None:
        self.out = out
        rng = np.random.default_rng(0)
        self.grids = [rng.integers(0, 256, size, dtype=np.uint8).tobytes().hex() for size in (196, 256)]

    def __call__(self, entry: Entry) -> Product:
        """Values as a real extractor returns them."""
        files = [f"{folder}/{spread(entry.name)}.png" for folder in (IMAGES, PARSING_MAPS)]
        if self.out is not None:
            for file in files:
                try:
                    (self.out / file).touch()
                except FileNotFoundError:
                    (self.out / file).parent.mkdir(parents=True)
                    (self.out / file).touch()
        grid16, grid14 = self.grids
        values = {"image": files[0], "parse": files[1], "grid_p16": grid16, "grid_p14": grid14}
        return Product(files, {**values, "box": [10, 20, 200, 210]})


def catalogue(images: int) -> Catalogue:
    """So many pictures, 340 of each person."""
    entries = []
    for number in range(images):
        person = f"n{number // PER_PERSON:06d}"
        name = f"train_{person}_{number % PER_PERSON:04d}_01"
        entries.append(Entry(f"/data/VGGFace2/train/{person}/{name}.jpg", name, 0, "train", "real", name, person))
    return Catalogue("generated", entries, {"about": "generated"})


def prepare(images: int, out: Path, files: bool) -> None:
    """From a catalogue to a manifest."""
    found = catalogue(images)
    with Preparation(out, {"version": 1}, workers=1) as preparation:
        preparation.plan(found)
        items = [Item(entry.name, entry) for entry in found.entries]
        values = preparation.run("pictures", items, Extractor(out if files else None))
        rows = (
            {
                "path": face["image"],
                "label": entry.label,
                "split": entry.split,
                "dataset": found.name,
                "method": entry.method,
                "video": entry.video,
                "subject": entry.subject,
                "frame": 0,
                "origin": entry.file,
                "parse": face["parse"],
                "grid_p16": bytes.fromhex(face["grid_p16"]),
                "grid_p14": bytes.fromhex(face["grid_p14"]),
            }
            for entry, face in zip(found.entries, values.values(), strict=True)
        )
        preparation.finish(rows, found.card)


def resume(images: int, out: Path, files: bool) -> None:
    """Find out what is left to do: nothing."""
    found = catalogue(images)
    with Preparation(out, {"version": 1}, dry_run=True) as preparation:
        preparation.plan(found)
        preparation.run("pictures", [Item(entry.name, entry) for entry in found.entries], Extractor(None))
        print(preparation.tallies["pictures"].line(), file=sys.stderr)


def epoch(images: int, out: Path, files: bool) -> None:
    """From the manifest to the first batch of row numbers."""
    from fsvfm.data.datasets import PretrainFaces
    from fsvfm.data.sampling import EpochSampler

    rows = Manifest.read(out, extra=["grid_p16", "parse"]).select(split="train", label=0)
    data = PretrainFaces(rows, image_size=224, patch_size=16)
    batch = next(iter(EpochSampler(len(data), min(256, images))))
    print(f"first row {batch[0].row}", file=sys.stderr)


def look(images: int, out: Path, files: bool) -> None:
    """Counts, leaks, missing files."""
    print(inspect(out).text(), file=sys.stderr)


STEPS = {"prepare": prepare, "resume": resume, "epoch": epoch, "inspect": look}


def main() -> None:
    """Run every step in a process of its own and print a table."""
    parser = arguments(__doc__)
    parser.add_argument("--images", type=int, default=3_000_000)
    parser.add_argument("--files", action="store_true", help="make empty files for the pictures")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.dry:
        options.images = 1000
    if options.step:
        start, used = time.perf_counter(), time.process_time()
        STEPS[options.step](options.images, options.folder, options.files)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        numbers = {
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - used,
            "peak_gb": peak / 1e9,
        }
        print(json.dumps({name: round(value, 2) for name, value in numbers.items()}))
        return
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary) / "prepared"
        print(f"{options.images:,} images\n{'step':<10}{'seconds':>10}{'CPU s':>10}{'peak GB':>10}", flush=True)
        for step in STEPS:
            if step == "resume" and not options.files:
                continue
            command = [
                sys.executable,
                __file__,
                "--step",
                step,
                "--images",
                str(options.images),
                "--folder",
                str(folder),
            ]
            command += ["--files"] if options.files else []
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[step] = json.loads(done.stdout.splitlines()[-1])
            print(f"{step:<10}" + "".join(f"{value:>10.2f}" for value in found[step].values()), flush=True)
    save(options, {"rows": found})


if __name__ == "__main__":
    main()
