"""Time until a command answers, as a ratio to a process that imports at once all that training needs.

    python benchmarks/startup.py [--run <folder of a finished run>] [--repeats 5] [--output startup.json]

Every row is a new process with warm file caches; the least of some repetitions counts. `--run` adds what the command of
a finished run takes to say so: nothing is computed. It is called where its folder `runs` lies.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from common import arguments, in_turn, save, table

TRAIN = ["-m", "fsvfm.train"]
EVERYTHING = "import torch, torchvision, pytorch_lightning, timm, albumentations, hydra"


def call(words: list[str], folder: str) -> None:
    """Run Python with these arguments, in a folder."""
    subprocess.run([sys.executable, *words], cwd=folder, check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    """Measure, print a table, and write JSON if asked to."""
    parser = arguments(__doc__)
    parser.add_argument("--run", type=Path, help="folder of a finished run of an experiment of the same name")
    parser.add_argument("--repeats", type=int, default=5, help="processes of every row (default 5)")
    options = parser.parse_args()
    commands = {
        "an empty process": ["-c", "pass"],
        "baseline: import everything": ["-c", EVERYTHING],
        "import fsvfm": ["-c", "import fsvfm"],
        "train --help": [*TRAIN, "--help"],
        "train --cfg job": [*TRAIN, "--cfg", "job"],
    }
    places = {}
    if options.run:
        run = options.run.resolve()
        commands["train, finished already"] = [*TRAIN, f"experiment={run.name}"]
        places["train, finished already"] = str(run.parent.parent)
    if options.dry:
        options.repeats = 1
        commands = {name: words for name, words in commands.items() if words[0] == "-c" and EVERYTHING not in words}
    with tempfile.TemporaryDirectory() as folder:
        runs: dict[str, Callable[[], object]] = {
            name: partial(call, words, places.get(name, folder)) for name, words in commands.items()
        }
        seconds = in_turn(runs, options.repeats)
    least = {name: float(values.min()) for name, values in seconds.items()}
    base = least.get("baseline: import everything")
    rows = {name: {"seconds": value, "ratio": None if base is None else base / value} for name, value in least.items()}
    table(f"new processes, least of {options.repeats}", {"seconds": ".2f", "ratio": ".1f"}, rows)
    save(options, {"rows": rows, "seconds": {name: values.tolist() for name, values in seconds.items()}})


if __name__ == "__main__":
    main()
