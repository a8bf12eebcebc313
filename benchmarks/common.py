"""What every benchmark shares: options, clocks, the table, and the JSON with the machine it was measured on."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="tiny sizes, seconds: does it run? the figures mean nothing")
    parser.add_argument("--output", type=Path, help="where to write the figures as JSON")
    return parser


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


def wall(run: Callable[[], object], device: str = "cpu") -> float:
    """Seconds of one call, with the device's work included."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        torch.cuda.synchronize(device)
    else:
        start = time.perf_counter()
        run()
    return time.perf_counter() - start


def own_cpu(run: Callable[[], object]) -> float:
    """Seconds that this process computed during one call: other work on the machine does not count."""
    start = time.process_time()
    run()
    return time.process_time() - start


def in_turn(
    runs: Mapping[str, Callable[[], object]], repeats: int, clock: Callable[[Callable[[], object]], float] = wall
) -> dict[str, np.ndarray]:
    """(repeats,) seconds of each, measured in turn, so that a busy moment does not hit one of them alone."""
    taken: dict[str, np.ndarray] = {name: np.empty(repeats) for name in runs}
    for repeat in range(repeats):
        for name, run in runs.items():
            taken[name][repeat] = clock(run)
    return taken


def table(heading: str, columns: Mapping[str, str], rows: Mapping[str, Mapping[str, float | None]]) -> None:
    """Print rows of figures under the columns {name: format}; a figure that is absent or None is left out."""
    label = max(len(name) for name in rows) + 2
    widths = {name: max(len(name) + 2, 12) for name in columns}
    print(heading)
    print(" " * label + "".join(f"{name:>{widths[name]}}" for name in columns))
    for row, figures in rows.items():
        cells = []
        for name, form in columns.items():
            value = figures.get(name)
            cells.append(f"{'' if value is None else format(value, form):>{widths[name]}}")
        print(f"{row:<{label}}{''.join(cells)}".rstrip())


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the figures were measured on: date, processor, cores, versions, GPU."""
    import torch

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor()
    facts = {
        "date": date.today().isoformat(), "cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "python": platform.python_version(), "torch": torch.__version__,
    }  # fmt: skip
    if device.startswith("cuda"):
        facts |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return facts


def save(options: argparse.Namespace, figures: Mapping[str, Any], device: str = "cpu") -> None:
    """Write the figures, with settings and machine, where ``--output`` says; complete or not at all."""
    if options.output is None:
        return
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    report = {"settings": settings, "machine": machine(device), **figures}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = options.output.with_name(options.output.name + ".tmp")
    unfinished.write_text(json.dumps(report, indent=2, ensure_ascii=False, default=str) + "\n")
    unfinished.replace(options.output)
