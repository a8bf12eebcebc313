"""``python -m fsvfm`` or ``fsvfm``: what there is to run."""

from __future__ import annotations

import runpy
import sys

COMMANDS = {
    "prepare": "raw photographs to face crops, parsing maps and a manifest",
    "train": "pre-train or fine-tune: experiment=<name>",
    "evaluate": "scores, metrics with intervals and tables of detectors on test sets",
    "predict": "score photographs, videos and folders with a detector",
    "report": "one HTML page about runs and their evaluation",
    "export": "convert checkpoints; `export list` shows the released ones",
}


def main() -> None:
    """Run a command by name, or list them."""
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print("usage: fsvfm <command> [key=value …]   (the same as python -m fsvfm.<command>)\n")
        for name, purpose in COMMANDS.items():
            print(f"  {name:<10}{purpose}")
        print("\nAny command explains itself with --help.")
        sys.exit(0 if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help") else 2)
    command = sys.argv.pop(1)
    runpy.run_module(f"fsvfm.{command}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
