"""Latency of prediction: a photograph and a minute of video, end to end, and the memory that a long video takes.

    python benchmarks/prediction.py --photo face.jpg [--ckpt <detector>] [--minutes 1 60] [--all] [--output x.json]

Without `--ckpt` a ViT-B with random weights stands for a detector: it takes as long as a trained one. The video is made
for the purpose: 25 frames per second of 1280×720, H.264, in which the photograph (it must show a face) moves before a
noisy background. Times are wall-clock, with as many CPU threads as OMP_NUM_THREADS says or the machine has. "Loaded" is
what a program pays that keeps the detector, as `fsvfm.serve` does; "the command" is `python -m fsvfm.predict` from its
start to its end. The same 32 frames are also scored with nothing overlapping: decoding, finding faces and the network
one after the other. `--all` also scores every frame of the minute, not only 32.

Memory is the highest resident size of that command, of videos of several lengths: as users run it, and with every frame
scored and written to `out`, where whatever grows with the frames must show. Face detector and ViT-B would make the
latter take hours and need the same for every frame, so that there a ViT-Tiny scores whole frames.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any
from unittest.mock import patch

import av
import torch
from common import arguments, save, wall
from video import LENGTH, clip

from fsvfm.checkpoint import save_export
from fsvfm.faces.images import load_image
from fsvfm.faces.video import write_video
from fsvfm.models.detector import build_detector
from fsvfm.models.vit import vit_config
from fsvfm.predictor import load_detector

RATE = 25

#: Runs the command and prints its highest memory in MB: not ru_maxrss, which begins with that of the starting process.
_PEAK = """
import sys
from fsvfm.predict import main
try:
    main()
finally:
    status = open("/proc/self/status").read()
    print("peak", int(status.split("VmHWM:")[1].split()[0]) / 1024)
"""


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


def write_minute(path: Path, photo: Any, minutes: float = 1) -> Path:
    """A video of the clip again and again, of whole seconds."""
    frames = round(minutes * 60) * RATE
    again = chain.from_iterable(clip(photo) for _ in repeat(None, -(-frames // LENGTH)))
    write_video(path, islice(again, frames), rate=RATE, gop=RATE)
    return path


def repeated(path: Path, source: Path, times: int) -> Path:
    """A video so many times in a row, without encoding it anew."""
    with av.open(str(path), "w") as target:
        stream, start = None, 0
        for _ in range(times):
            with av.open(str(source)) as container:
                pictures = container.streams.video[0]
                stream = stream or target.add_stream_from_template(pictures)
                for packet in container.demux(pictures):
                    if packet.pts is None or packet.dts is None:  # the empty one at the end
                        continue
                    packet.pts, packet.dts, packet.stream = packet.pts + start, packet.dts + start, stream
                    target.mux(packet)
                start += pictures.duration
    return path


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Least of some repetitions."""
    return min(wall(run) for _ in range(repeats))


def command(*words: str) -> tuple[float, float]:
    """Run `fsvfm.predict`: seconds, and its highest memory in MB."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", _PEAK, *words], capture_output=True, text=True)
    taken = time.perf_counter() - start
    if done.returncode not in (0, 10, 11):
        raise SystemExit(f"fsvfm.predict {' '.join(words)} failed:\n{done.stdout}{done.stderr}")
    return taken, float(done.stdout.split("peak ")[1])


def latencies(
    options: Any, photo: Path, ckpt: str, minute: Path, predictor: Any, image: Any, crops: Any
) -> Iterator[tuple[str, float]]:
    """Rows of the table, as they are measured."""
    repeats = options.repeats
    yield "photograph, the command", seconds(lambda: command(f"ckpt={ckpt}", f"input={photo}"), repeats)
    yield "photograph, loaded", seconds(lambda: predictor.predict(photo), repeats)
    yield "  of it: decode, find and cut faces", seconds(lambda: predictor.crops(load_image(photo)), repeats)
    yield "  of it: the network", seconds(lambda: predictor.score_faces(crops), repeats)
    yield "video, 32 frames, the command", seconds(lambda: command(f"ckpt={ckpt}", f"input={minute}"), repeats)
    yield "video, 32 frames, loaded", seconds(lambda: predictor.predict(minute), repeats)
    with (
        patch("fsvfm.predictor.ahead", lambda items, depth: (item for item in items)),
        patch("fsvfm.predictor.in_parallel", lambda function, items, *_: (function(item) for item in items)),
    ):
        yield "  one thing after the other", seconds(lambda: predictor.predict(minute), repeats)
    if options.all:
        yield "video, every frame, loaded", seconds(lambda: predictor.predict(minute, frames=0), 1)


def main() -> None:
    """Measure, print a table, and write JSON if asked to."""
    parser = arguments(__doc__)
    parser.add_argument("--photo", type=Path, required=True, help="photograph with a face")
    parser.add_argument("--ckpt", help="a detector; default a ViT-B with random weights")
    parser.add_argument("--minutes", type=int, nargs="*", default=[1, 10], help="lengths of the videos for the memory")
    parser.add_argument("--all", action="store_true", help="also time every frame of the minute")
    parser.add_argument("--repeats", type=int, default=3, help="of every measurement; the fastest counts")
    options = parser.parse_args()
    if options.dry:
        options.minutes, options.repeats = [1, 2], 1

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ckpt = options.ckpt or str(random_detector(folder / "vit_base"))
        predictor = load_detector(ckpt, device="cpu")
        photo, image = options.photo.absolute(), load_image(options.photo)
        crops = [face for _, face in predictor.crops(image)]
        if not crops:
            parser.error(f"no face found in {options.photo}")
        minute = write_minute(folder / "minute.mp4", image, 1 / 60 if options.dry else 1)
        print(f"{torch.get_num_threads()} CPU threads of {os.cpu_count()}; {Path(ckpt).parent.name}")
        print(f"photograph of {image.shape[1]}×{image.shape[0]} with {len(crops)} face(s); video of 1280×720")
        rows = {}
        for label, value in latencies(options, photo, ckpt, minute, predictor, image, crops):
            rows[label] = value
            print(f"{label:<60}{value:>9.2f} s", flush=True)
        small = str(random_detector(folder / "vit_tiny", "vit_tiny"))
        memory: dict[str, dict[str, float]] = {}
        for minutes in options.minutes:
            video = repeated(folder / f"{minutes}.mp4", minute, minutes)
            ways = {
                "32 frames": ("frames=32",),
                "every frame": ("frames=0", "crop=false", f"out={folder / 'out'}", "resume=never"),
            }
            for way, words in ways.items():
                detector = ckpt if way == "32 frames" else small
                taken, peak = command(f"ckpt={detector}", f"input={video}", *words)
                memory.setdefault(way, {})[str(minutes)] = peak
                print(f"{f'{minutes} min, {way}: highest memory':<60}{peak:>9.0f} MB {taken:>9.1f} s", flush=True)
            video.unlink()
    save(options, {"seconds": rows, "memory_mb": memory})


if __name__ == "__main__":
    main()
