"""What evaluating a detector costs beyond its network, as a ratio to the bare forward pass.

    python benchmarks/evaluation.py [--model vit_tiny] [--images 256] [--device cuda] [--precision bf16-mixed] \
        [--output evaluation.json]

The same decoded faces go through the same network twice: as normalised batches that lie ready on the device, and as
`fsvfm.evaluate` takes them (batches of uint8 images from the loader, copied and normalised, scores gathered, then all
metrics with their bootstrap intervals), in batches of one size and in one precision. Both are timed in turn, several
times; a ratio is the median of the ratios of neighbours. On a CPU the time is this process's own, so that other work on
the machine does not count as overhead; on a GPU it is wall time. Decoding and face detection are not part of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from common import arguments, in_turn, own_cpu, save, table, wall
from omegaconf import OmegaConf
from torch.utils.data import Dataset

from fsvfm.checkpoint import Checkpoint
from fsvfm.evaluation import predict
from fsvfm.loaded_detector import LoadedDetector
from fsvfm.metrics.forgery import summarise
from fsvfm.models.detector import build_detector

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
FRAMES = 32  # of a video, as in the papers


class DecodedFaces(Dataset):
    """Random faces in memory, as `predict` expects its samples."""

    def __init__(self, count: int, size: int) -> None:
        noise = torch.Generator().manual_seed(0)
        self.images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=noise)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "label": index // FRAMES % 2, "unreadable": []}


def random_detector(name: str, device: str, precision: str = "32-true") -> LoadedDetector:
    """A detector with random weights at one of the sizes of configs/model."""
    model: Any = OmegaConf.to_container(OmegaConf.load(CONFIGS / "model" / f"{name}.yaml"))
    torch.manual_seed(0)
    tune = {"name": "full", "drop_path": 0.0}
    network = build_detector(model, tune, ["real", "fake"]).to(device).eval()
    checkpoint = Checkpoint("detector", {}, {"model": model, "tune": tune, "task": "forgery"}, "random weights")
    mean, std = (torch.full((1, 3, 1, 1), value, device=device) for value in (127.5, 64.0))
    return LoadedDetector(network, mean, std, checkpoint, precision)


def main() -> None:
    """Measure, print a table, and write JSON if asked to."""
    parser = arguments(__doc__)
    parser.add_argument("--model", default="vit_tiny", help="an option of configs/model (default vit_tiny)")
    parser.add_argument("--images", type=int, default=256, help="faces; 32 make a video (default 256)")
    parser.add_argument(
        "--batch", type=int, help="faces per forward pass (default what evaluate.batch_size=auto takes)"
    )
    parser.add_argument("--precision", default="32-true", help="32-true or bf16-mixed (default 32-true)")
    parser.add_argument("--replicates", type=int, default=2000, help="of the intervals (default 2000)")
    parser.add_argument(
        "--repeats", type=int, default=5, help="pairs of measurements, after one to warm up (default 5)"
    )
    parser.add_argument("--workers", type=int, default=0, help="loader processes (default 0)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the network (default 1)")
    options = parser.parse_args()
    if options.dry:
        options.images, options.batch, options.replicates, options.repeats = 2 * FRAMES, FRAMES, 20, 1

    torch.set_num_threads(options.threads)
    detector = random_detector(options.model, options.device, options.precision)
    options.batch = detector.batch_size(options.batch or "auto")
    faces = DecodedFaces(options.images, detector.image_size)
    ready = [(b.to(options.device).float() - detector.mean) / detector.std for b in faces.images.split(options.batch)]
    index = np.arange(options.images)
    samples = pd.DataFrame({"label": index // FRAMES % 2, "video": (index // FRAMES).astype(str)})
    scores = np.empty(0)

    def bare() -> None:
        half = torch.autocast(options.device, torch.bfloat16, enabled=options.precision == "bf16-mixed")
        with torch.inference_mode(), half:
            for images in ready:
                detector.network(images)

    def scoring() -> None:
        nonlocal scores
        found = predict(detector, faces, batch_size=options.batch, workers=options.workers, title="benchmark")
        scores = np.empty(0) if found is None else found

    def metrics() -> None:
        summarise(samples.assign(score=scores), replicates=options.replicates)

    steps = {"forward pass alone": bare, "scores": scoring, "metrics and intervals": metrics}
    for run in steps.values():
        run()
    times = in_turn(
        steps, options.repeats, own_cpu if options.device == "cpu" else lambda run: wall(run, options.device)
    )
    network = times["forward pass alone"]
    whole = times["scores"] + times["metrics and intervals"]
    ratios = {
        "scores": float(np.median(times["scores"] / network)),
        "evaluation": float(np.median(whole / network)),
    }

    kind = "CPU time of this process" if options.device == "cpu" else "wall time"
    rows = {
        name: {
            "seconds": float(np.median(values)),
            "ms/face": 1000 * float(np.median(values)) / options.images,
            "ratio": float(np.median(values / network)),
        }
        for name, values in {**times, "evaluation (both)": whole}.items()
    }
    how = f"in batches of {options.batch}, {options.precision}, {options.device}"
    heading = f"{options.model}, {options.images} faces {how}; {kind}"
    table(heading, {"seconds": ".3f", "ms/face": ".3f", "ratio": ".3f"}, rows)
    print(f"evaluation costs {100 * (ratios['evaluation'] - 1):+.1f} % over the forward pass (target: at most 15 %)")
    figures = {"ratios": ratios, "rows": rows, "seconds": {name: values.tolist() for name, values in times.items()}}
    save(options, figures, options.device)


if __name__ == "__main__":
    main()
