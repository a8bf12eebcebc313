"""The pre-training step, as a ratio to a plain implementation, and as a share of the device's measured matrix rate.

    python benchmarks/pretraining.py [--model vit_small] [--batch 16] [--device cuda] [--compile default] [--output x]

The step is what training does with a batch that is there: uint8 faces and region grids to masks, forward, backward,
clipping, AdamW and the EMA of the target. The baseline (baseline/training.py) does the same work with the same weights
in plain ways. All rows are measured in turn, several times; a ratio is the median of the ratios of neighbours. Floating
point operations are counted in one step of ours (attention included, element-wise operations not), never taken from a
formula; recomputation under gradient checkpointing does not count as work. The matrix rate is that of square products
on the same device in the same run.
"""

from __future__ import annotations

import copy
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from baseline.training import PlainPretraining
from common import arguments, in_turn, save, table, wall
from masking import synthetic_faces
from omegaconf import OmegaConf
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fsvfm import speed
from fsvfm.ema import ema_update
from fsvfm.models.pretrain_net import shared_parameters
from fsvfm.optim import build_adamw
from fsvfm.regions import region_grid
from fsvfm.tasks.pretrain import PretrainTask

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
MEAN, STD = [0.548, 0.423, 0.365], [0.279, 0.244, 0.235]


def group(name: str, option: str) -> dict[str, Any]:
    """Values of a file in configs."""
    values: Any = OmegaConf.to_container(OmegaConf.load(CONFIGS / name / f"{option}.yaml"))
    return values


def pretrain_task(model: str, device: str, *, checkpointing: bool = False) -> PretrainTask:
    """The papers' task at one of the sizes, with random weights."""
    torch.manual_seed(0)
    loss = group("task", "pretrain")["loss"]
    values = {**group("model", model), "grad_checkpointing": checkpointing}
    task = PretrainTask(
        model=values,
        masking=group("masking", "crfr_p"),
        loss=loss,
        optim=group("optim", "pretrain"),
        mean=MEAN,
        std=STD,
    )
    return task.to(device)


class Step:
    """One training step of ours, as the task, its hooks and the EMA callback do it under Lightning."""

    def __init__(self, task: PretrainTask, images: torch.Tensor, grid: torch.Tensor, bf16: bool) -> None:
        self.task, self.images, self.grid, self.bf16 = task, images, grid, bf16
        self.device = str(images.device)
        self.optimizer: Any = build_adamw(task.parameter_groups(), 1e-4, betas=(0.9, 0.95))
        self.trained = [p for p in task.online.parameters() if p.requires_grad]
        self.online, self.target = shared_parameters(task.online, task.target)
        self.generator = torch.Generator(self.device).manual_seed(0)
        speed.choose_attention(task, fused=speed.fused_is_faster(self.device, bf16))

    def gradients(self) -> None:
        """Forward and backward."""
        self.optimizer.zero_grad()
        with torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.bf16):
            loss = self.task.compute(self.images, self.grid, generator=self.generator).loss
        loss.backward()
        self.finite = torch.isfinite(loss.detach()).float()

    def update(self) -> None:
        """Clip, AdamW, EMA; a step that is not finite changes nothing, and nobody waits to see."""
        norm = torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        taken = torch.isfinite(norm).float() * self.finite
        self.optimizer.found_inf = 1.0 - taken
        self.optimizer.step()
        ema_update(self.target, self.online, 0.004 * taken)

    def __call__(self) -> None:
        """The whole step."""
        self.gradients()
        self.update()


def matrix_rate(device: str, side: int, dtype: torch.dtype) -> float:
    """TFLOP/s of products of square matrices."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    a @ b
    return 2 * side**3 / min(wall(lambda: a @ b, device) for _ in range(10)) / 1e12


def flops(step: Step) -> float:
    """Floating point operations of one step per image; attention is decomposed, so that its products are counted."""
    part = copy.copy(step)
    part.images, part.grid = step.images[:2], step.grid[:2]
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"), counter:
        part.gradients()
    return counter.get_total_flops() / len(part.images)


def peak_gb(run: Callable[[], object], device: str) -> float:
    """Highest memory during a call: of the GPU's tensors; on a CPU of the whole process since it began."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) / 1e9
    run()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def main() -> None:
    """Measure, print a table, and write JSON if asked to."""
    parser = arguments(__doc__)
    parser.add_argument("--model", default="vit_small", help="an option of configs/model (default vit_small)")
    parser.add_argument("--batch", type=int, default=16, help="faces of a micro-batch (default 16)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument(
        "--precision", nargs="+", choices=("32", "bf16"), help="default: bf16 on a GPU, 32 and bf16 on a CPU"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--repeats", type=int, default=5, help="steps of every row, after two to warm up (default 5)")
    parser.add_argument("--checkpointing", action="store_true", help="another row with gradient checkpointing")
    parser.add_argument("--compile", choices=speed.COMPILE_MODES, help="another row with compiled networks")
    parser.add_argument("--alone", action="store_true", help="without the baseline, which takes more memory")
    options = parser.parse_args()
    if options.dry:
        options.model, options.batch, options.repeats, options.checkpointing = "vit_tiny", 2, 1, True
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("high")
    device, cpu = options.device, options.device == "cpu"
    precisions = options.precision or (["32", "bf16"] if cpu else ["bf16"])

    maps = synthetic_faces(options.batch, np.random.default_rng(0))
    noise = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (options.batch, 3, 224, 224), dtype=torch.uint8, generator=noise)
    images = pixels.to(device)

    def clock(run: Callable[[], object]) -> float:
        return wall(run, device)

    names = {"32": "float32", "bf16": "bf16"}
    runs: dict[str, Callable[[], object]] = {}
    for precision in precisions:
        bf16, label = precision == "bf16", names[precision]
        task = pretrain_task(options.model, device)
        grid = torch.from_numpy(region_grid(maps, task.online.encoder.config.patch_size)).to(device)
        runs[f"ours, {label}"] = step = Step(task, images, grid, bf16)
        if not options.alone:
            plain = pretrain_task(options.model, device)
            floats = task.normalise(images).cpu()
            runs[f"baseline, {label}"] = PlainPretraining(plain.online, plain.target, floats, maps, device, bf16)
        if options.checkpointing:
            task = pretrain_task(options.model, device, checkpointing=True)
            runs[f"ours, {label}, checkpointing"] = Step(task, images, grid, bf16)
        if options.compile:
            task = pretrain_task(options.model, device)
            speed.compile_networks(task, options.compile)
            runs[f"ours, {label}, compiled"] = Step(task, images, grid, bf16)
    peaks = {name: peak_gb(run, device) for name, run in runs.items()}
    for run in runs.values():
        run()
    seconds = in_turn(runs, options.repeats, clock)

    main_step = step  # of the last precision
    count = flops(main_step)
    side = 256 if options.dry else 2048 if cpu else 8192
    rates = {p: matrix_rate(device, side, torch.bfloat16 if p == "bf16" else torch.float32) for p in precisions}
    masker = main_step.task.masker
    parts = in_turn(
        {
            "clip, AdamW, EMA": main_step.update,
            "masks": lambda: masker(main_step.grid, generator=main_step.generator),
        },
        max(3, options.repeats),
        clock,
    )
    whole = float(np.median(seconds[f"ours, {names[precisions[-1]]}"]))
    shares = {name: float(np.median(values)) / whole for name, values in parts.items()}
    rows: dict[str, dict[str, float | None]] = {}
    for name, values in seconds.items():
        precision = next(p for p in precisions if names[p] in name)
        speed_of = options.batch / float(np.median(values))
        same, float32 = (seconds.get(f"baseline, {label}") for label in (names[precision], "float32"))
        rows[name] = {
            "images/s": speed_of,
            "TFLOP/s": speed_of * count / 1e12,
            "of rate": speed_of * count / 1e12 / rates[precision],
            "ratio": None if same is None else float(np.median(same / values)),
            "to float32": None if float32 is None else float(np.median(float32 / values)),
            "peak GB": peaks[name],
        }
    columns = {
        "images/s": ",.2f", "TFLOP/s": ".3f", "of rate": ".1%", "ratio": ".2f", "to float32": ".2f", "peak GB": ".2f"
    }  # fmt: skip
    measured = ", ".join(f"{names[p]} {rate:.2f} TFLOP/s" for p, rate in rates.items())
    heading = f"{options.model}, batch {options.batch}, {device}, {torch.get_num_threads()} CPU threads"
    table(f"{heading}; {count / 1e9:.1f} GFLOP per image; matrix products: {measured}", columns, rows)
    print("share of the step: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items()))
    figures = {"gflop_per_image": count / 1e9, "matrix_tflops": rates, "rows": rows, "shares": shares}
    save(options, {**figures, "seconds": {name: values.tolist() for name, values in seconds.items()}}, device)


if __name__ == "__main__":
    main()
