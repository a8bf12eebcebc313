"""``python -m fsvfm.export list`` shows the zoo; ``… ckpt=<any> out=<folder>`` converts checkpoints, both ways."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from fsvfm import cli
from fsvfm.errors import ConfigError

COMMANDS, FORMATS, NETWORKS = ("convert", "list"), ("export", "published"), ("both", "online", "target")


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as aligned columns; the first row is the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def show_zoo(pattern: str, runs: str) -> str:
    """The table of released checkpoints and local exports, as text."""
    from fsvfm.zoo import list_zoo

    def numbers(values: Sequence[float] | None) -> str:
        return " ".join(f"{value:.3f}" for value in values) if values else "unknown"

    entries = list_zoo(pattern, runs)
    if not entries:
        raise ConfigError(f"nothing in the zoo matches pattern={pattern}; leave it out to see all")
    head = ("name", "size", "data", "epochs", "task", "mean", "std", "classes 0, 1", "licence")
    rows = [
        (
            entry.name if entry.repository is None else f"zoo:{entry.name}",
            entry.size,
            entry.data,
            "–" if entry.epochs is None else str(entry.epochs),
            entry.tuning,
            numbers(entry.mean),
            numbers(entry.std),
            ", ".join(entry.class_order) if entry.class_order else "–",
            entry.licence,
        )
        for entry in entries
    ]
    return table([head, *rows])


def _check(cfg: DictConfig) -> None:
    problems = []
    for key, allowed in (("command", COMMANDS), ("format", FORMATS), ("which", NETWORKS)):
        if cfg[key] not in allowed:
            problems.append(f"{key}={cfg[key]}: expected one of {', '.join(allowed)}")
    if cfg.command == "convert":
        problems += [f"{key}=… is missing" for key in ("ckpt", "out") if OmegaConf.is_missing(cfg, key)]
        if (cfg.mean is None) != (cfg.std is None):
            problems.append("mean and std belong together: give both or none")
    if cfg.calibrate is not None and cfg.format != "export":
        problems.append("calibrate=… is stored in our own export only: leave format=export")
    if problems:
        raise ConfigError(
            "\n  ".join(
                [*problems, "usage: python -m fsvfm.export ckpt=<any checkpoint> out=<folder> [format=published]"]
            )
            + "\n         python -m fsvfm.export list"
        )


def convert(cfg: DictConfig) -> None:
    """Load any checkpoint, write it in the chosen format, and print what was used, left out and missing."""
    from fsvfm.checkpoint import load_checkpoint, write_published
    from fsvfm.exports import save_export
    from fsvfm.published import listing

    values: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    loaded = load_checkpoint(
        values["ckpt"],
        target=values["which"] != "online",
        heads=values["heads"],
        decoder_heads=values["decoder_heads"],
        mean=values["mean"],
        std=values["std"],
    )
    chosen = loaded.only(values["which"])
    meta, model = chosen.meta, chosen.meta["model"]
    print(f"{chosen.source}: {chosen.kind} checkpoint, task {meta['task']}")
    print(
        f"  {model['name']}: {model['image_size']}×{model['image_size']} pixels, patch {model['patch_size']}, "
        f"width {model['dim']}, {model['depth']} blocks, {model['heads']} heads"
    )
    print(f"  mean {meta['mean'] or 'unknown'}, std {meta['std'] or 'unknown'}")
    if meta["class_order"]:
        print(f"  class order {', '.join(meta['class_order'])} (logits 0, 1)")
    for note in chosen.notes:
        print(f"  note: {note}")
    print(f"used {len(chosen.state)} tensors:{listing(chosen.state)}")
    left_out = [*chosen.left_out, *(key for key in loaded.state if key not in chosen.state)]
    print(f"left out {len(left_out)} tensors{':' + listing(left_out) if left_out else ''}")
    absent = [name for name in ("online", "target") if chosen.kind == "pretrain" and name not in chosen.networks()]
    print(f"missing: {', '.join(f'the {name} network' for name in absent) or 'nothing'}")
    if values["format"] == "export":
        written = [save_export(values["out"], chosen.state, meta, left_out=chosen.left_out)]
    else:
        written = write_published(values["out"], chosen)
    print("\n".join(f"wrote {path}" for path in written))
    if values["calibrate"]:
        calibrate(values)


def calibrate(values: dict[str, Any]) -> None:
    """Fit temperature and thresholds of the written export on the validation faces of a prepared data set."""
    from pathlib import Path

    from fsvfm.data.manifest import Manifest
    from fsvfm.evaluation import calibrate_export

    rows = Manifest.read(values["calibrate"]).select(split="val")
    calibrate_export(
        Path(values["out"]),
        rows,
        source=f"validation faces of {rows.source}",
        conformal_alpha=values["conformal_alpha"],
        batch_size=64,
        workers=0,
    )
    print(f"calibrated on {len(rows)} validation faces of {rows.source}")


@hydra.main(version_base="1.3", config_path="pkg://fsvfm.configs", config_name="export")
@cli.guard
def main(cfg: DictConfig) -> None:
    """List the zoo or convert a checkpoint."""
    _check(cfg)
    if cfg.command == "list":
        print(show_zoo(str(cfg.pattern), str(cfg.runs)))
    else:
        convert(cfg)


def run() -> None:
    """Accept the bare words `list` and `convert`, which Hydra's grammar has no place for, then start Hydra."""
    sys.argv[1:] = [f"command={word}" if word in COMMANDS else word for word in sys.argv[1:]]
    main()


if __name__ == "__main__":
    run()
