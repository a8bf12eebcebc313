"""Latency of prediction: a photograph and a minute of video, end to end, and the memory that a long video takes.

    python benchmarks/prediction.py --photo face.jpg [--ckpt <detector>] [--minutes 1 10] [--all] [--output x.json]

Without `--ckpt` a ViT-B with random weights stands for a detector: it takes as long as a trained one. The video is made
for the purpose: 25 frames per second of 1280×720, H.264, in which the photograph (it must show a face) moves before a
noisy background. Times are wall-clock, with as many CPU threads as OMP_NUM_THREADS says or the machine has; models are
loaded before. The same 32 frames are also scored with nothing overlapping: decoding, finding faces and the network one
after the other. `--all` also scores every frame of the first video, not only 32. Memory is the highest resident size of
a process of its own that scores every fifth frame, one for each length, so that nothing else is in it. What grows with
a video would show there whatever finds and judges the faces, so that a small network scores whole frames: the face
detector and a ViT-B would make the measurement take hours.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import chain, repeat
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import arguments, save, wall
from video import LENGTH, clip

from fsvfm.checkpoint import save_export
from fsvfm.faces.images import load_image
from fsvfm.faces.video import write_video
from fsvfm.models.detector import build_detector
from fsvfm.models.vit import vit_config
from fsvfm.prediction import load_detector

RATE = 25
_PEAK = "import sys; sys.path.insert(0, sys.argv[1]); import prediction; prediction.report_peak(*sys.argv[2:])"


def random_detector(folder: Path, name: str = "vit_base") -> Path:
    """An export with random weights."""
    torch.manual_seed(0)
    config = vit_config(name)
    tune = {"name": "full", "drop_path": 0.0, "frozen_drop_path": False, "reduction": 4}
    network = build_detector(config, tune, ("real", "fake"))
    fields = ("image_size", "patch_size", "dim", "depth", "heads")
    meta = {
        "kind": "detector", "task": "forgery", "tune": tune, "class_order": ["real", "fake"], "mean": [0.5] * 3,
        "std": [0.25] * 3, "model": {"name": name, **{key: getattr(config, key) for key in fields}},
    }  # fmt: skip
    return save_export(folder, network.state_dict(), meta)


def write_minutes(path: Path, photo: Any, minutes: float) -> Path:
    """A video of so many minutes: the clip again and again."""
    frames = int(minutes * 60 * RATE)
    again = chain.from_iterable(clip(photo) for _ in repeat(None, -(-frames // LENGTH)))
    write_video(path, (frame for _, frame in zip(range(frames), again, strict=False)), rate=RATE)
    return path


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Least of some repetitions."""
    return min(wall(run) for _ in range(repeats))


def report_peak(ckpt: str, video: str, frames: str) -> None:
    """In a process of its own: score a video, print this process's highest memory in MB."""
    found = load_detector(ckpt, device="cpu").predict(video, frames=int(frames), crop=False)
    # Not ru_maxrss, which begins with that of the process that started this one.
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) / 1024
    print(json.dumps({"frames": len(found.frames), "peak_mb": round(peak, 1)}))


def main() -> None:
    """Measure, print a table, and write JSON if asked to."""
    parser = arguments(__doc__)
    parser.add_argument("--photo", type=Path, required=True, help="photograph with a face")
    parser.add_argument("--ckpt", help="a detector; default a ViT-B with random weights")
    parser.add_argument("--minutes", type=float, nargs="+", default=[1, 10], help="lengths of the videos")
    parser.add_argument("--all", action="store_true", help="also time every frame of the first video")
    parser.add_argument("--repeats", type=int, default=2, help="of every measurement; the fastest counts")
    options = parser.parse_args()
    if options.dry:
        options.minutes, options.repeats = [0.05], 1

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ckpt = options.ckpt or str(random_detector(folder / "vit_base"))
        start = time.perf_counter()
        predictor = load_detector(ckpt, device="cpu")
        loading = time.perf_counter() - start
        image = load_image(options.photo)
        predictor.predict(options.photo)  # loads the face detector
        crops = [face for _, face in predictor.crops(image)]
        if not crops:
            parser.error(f"no face found in {options.photo}")
        videos = {m: write_minutes(folder / f"{m:g}.mp4", image, m) for m in options.minutes}
        first = videos[options.minutes[0]]
        height, width = image.shape[:2]
        rows = {
            "load the detector": loading,
            f"one photograph ({width}×{height}, {len(crops)} face(s)), end to end": seconds(
                lambda: predictor.predict(options.photo), options.repeats
            ),
            "  of it: decode, find and cut faces": seconds(
                lambda: predictor.crops(load_image(options.photo)), options.repeats
            ),
            "  of it: the network": seconds(lambda: predictor.score_faces(crops), options.repeats),
            f"{options.minutes[0]:g} min of 720p video, 32 frames": seconds(
                lambda: predictor.predict(first), options.repeats
            ),
        }
        with patch("fsvfm.prediction.ahead", lambda items, depth: (item for item in items)):
            rows["  one thing after the other"] = seconds(lambda: predictor.predict(first), options.repeats)
        if options.all:
            rows[f"{options.minutes[0]:g} min of 720p video, every frame"] = seconds(
                lambda: predictor.predict(first, frames=0), 1
            )
        small = str(random_detector(folder / "vit_tiny", "vit_tiny"))
        peaks = {}
        for minutes, video in videos.items():
            command = [sys.executable, "-c", _PEAK, str(Path(__file__).parent), small, str(video)]
            done = subprocess.run(
                [*command, str(int(minutes * 60 * RATE / 5))], capture_output=True, text=True, check=True
            )
            peaks[f"{minutes:g}"] = json.loads(done.stdout)

    threads = torch.get_num_threads()
    print(f"{threads} CPU threads of {os.cpu_count()}")
    print("\n".join(f"{label:<60}{value:>9.2f} s" for label, value in rows.items()))
    for minutes, peak in peaks.items():
        label = f"highest memory, {minutes} min ({peak['frames']} frames scored)"
        print(f"{label:<60}{peak['peak_mb']:>9.0f} MB")
    save(options, {"seconds": rows, "memory": peaks})


if __name__ == "__main__":
    main()
