"""The fine-tuning step, full and with FS-Adapter, as a ratio to a plain implementation.

    python benchmarks/finetuning.py [--model vit_small] [--batch 16] [--device cuda] [--compile default] [--output x]

Ours is the task as training calls it: uint8 faces, normalisation, erasing and mixup on the device, the detector, its
losses, AdamW in groups of layers. The baseline (baseline/training.py) trains the same network with attention written
out, an unfused optimiser and a look at the loss in every step, on faces normalised before; it does not augment. Rows
are measured in turn; a ratio is the median of the ratios of neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from baseline.training import PlainFinetuning
from common import arguments, in_turn, save, table, wall
from pretraining import MEAN, STD, group

from fsvfm import speed
from fsvfm.optim import build_adamw
from fsvfm.tasks.forgery import ForgeryTask


def forgery_task(model: str, tune: str, device: str) -> ForgeryTask:
    """The papers' task at one of the sizes, with random weights."""
    torch.manual_seed(0)
    task = ForgeryTask(
        model=group("model", model), tune=group("tune", tune), augment=group("augment", "papers"),
        optim=group("optim", "finetune"), mean=MEAN, std=STD,
    )  # fmt: skip
    return task.to(device)


class Step:
    """One training step of ours."""

    def __init__(self, task: ForgeryTask, images: torch.Tensor, labels: torch.Tensor, bf16: bool) -> None:
        self.task, self.images, self.labels, self.bf16 = task, images, labels, bf16
        speed.choose_attention(task, fused=speed.fused_is_faster(images.device.type, bf16))
        self.optimizer: Any = build_adamw(task.parameter_groups(), 1e-4, betas=(0.9, 0.999))

    def __call__(self) -> None:
        """Forward, backward, AdamW."""
        self.optimizer.zero_grad()
        with torch.autocast(self.images.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.task.compute(self.images, self.labels, augment=True).loss
        loss.backward()
        self.optimizer.found_inf = 1.0 - torch.isfinite(loss.detach()).float()
        self.optimizer.step()


def main() -> None:
    """Measure, print a table, and write JSON if asked to."""
    parser = arguments(__doc__)
    parser.add_argument("--model", default="vit_small", help="an option of configs/model (default vit_small)")
    parser.add_argument("--batch", type=int, default=16, help="faces, an even number (default 16)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--precision", choices=("32", "bf16"), default="bf16")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--repeats", type=int, default=5, help="steps of every row, after two to warm up (default 5)")
    parser.add_argument("--compile", choices=speed.COMPILE_MODES, help="more rows with compiled networks")
    options = parser.parse_args()
    if options.dry:
        options.model, options.batch, options.repeats = "vit_tiny", 2, 1
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("high")
    device, bf16 = options.device, options.precision == "bf16"
    noise = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (options.batch, 3, 224, 224), dtype=torch.uint8, generator=noise)
    labels = torch.arange(options.batch) % 2
    images, truth = pixels.to(device), labels.to(device)

    runs: dict[str, Callable[[], object]] = {}
    for tune in ("full", "adapter"):
        task = forgery_task(options.model, tune, device)
        runs[f"ours, {tune}"] = Step(task, images, truth, bf16)
        plain, floats = forgery_task(options.model, tune, device), task.normalise(images).cpu()
        runs[f"baseline, {tune}"] = PlainFinetuning(plain.detector, floats, labels, device, bf16)
        if options.compile:
            task = forgery_task(options.model, tune, device)
            speed.compile_networks(task, options.compile)
            runs[f"ours, {tune}, compiled"] = Step(task, images, truth, bf16)
    for _ in range(2):
        for run in runs.values():
            run()
    seconds = in_turn(runs, options.repeats, lambda run: wall(run, device))
    rows: dict[str, dict[str, float | None]] = {}
    for name, values in seconds.items():
        base = seconds[f"baseline, {'full' if 'full' in name else 'adapter'}"]
        rows[name] = {"images/s": options.batch / float(np.median(values)), "ratio": float(np.median(base / values))}
    heading = f"{options.model}, batch {options.batch}, {device}, {options.precision}"
    table(f"{heading}, {torch.get_num_threads()} CPU threads", {"images/s": ",.2f", "ratio": ".2f"}, rows)
    save(options, {"rows": rows, "seconds": {name: values.tolist() for name, values in seconds.items()}}, device)


if __name__ == "__main__":
    main()
