"""``python -m fsvfm.export list`` shows the zoo; ``… ckpt=<any> out=<folder>`` converts checkpoints, both ways.

``format=`` names what is written: our export, the published code's files, or what other programs read.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from fsvfm import cli
from fsvfm.errors import ConfigError

if TYPE_CHECKING:
    from fsvfm.checkpoint import Checkpoint
    from fsvfm.data.manifest import Manifest
    from fsvfm.formats import Graph, Portable

COMMANDS, NETWORKS = ("convert", "list"), ("both", "online", "target")
FORMATS = ("export", "published", "timm", "onnx", "torch_export")
#: Formats that hold one network, ready for use, and not all that a checkpoint holds.
SINGLE = ("timm", "onnx", "torch_export")


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
        if cfg.push_to_hub is not None:
            from fsvfm.hub import check_repository

            try:
                check_repository(str(cfg.push_to_hub))
            except ConfigError as error:
                problems.append(f"push_to_hub={cfg.push_to_hub}: {error}")
    if cfg.calibrate is not None and cfg.format != "export":
        problems.append("calibrate=… is stored in our own export only: leave format=export")
    if cfg.quantise not in (None, "int8"):
        problems.append(f"quantise={cfg.quantise}: expected int8, or null")
    if cfg.quantise is not None and cfg.format != "onnx":
        problems.append(f"quantise={cfg.quantise} is for format=onnx")
    if cfg.check is not None and cfg.format not in ("onnx", "torch_export"):
        problems.append("check=… compares what format=onnx or format=torch_export writes")
    if cfg.push_to_hub is not None and (cfg.format != "export" or cfg.calibrate is not None):
        problems.append("push_to_hub=… publishes our own export as it is: leave format=export, and calibrate before")
    for key in ("card_only", "licence"):
        if cfg[key] and cfg.push_to_hub is None:
            problems.append(f"{key}=… belongs to push_to_hub=<owner>/<name>, which the card names")
    if problems:
        raise ConfigError(
            "\n  ".join(
                [
                    *problems,
                    f"usage: python -m fsvfm.export ckpt=<any checkpoint> out=<folder> [format={'|'.join(FORMATS)}]",
                ]
            )
            + "\n         python -m fsvfm.export list"
        )


def convert(cfg: DictConfig) -> None:
    """Load any checkpoint, write it in the chosen format, and print what was used, left out and missing."""
    from fsvfm.checkpoint import load_checkpoint, write_published
    from fsvfm.exports import save_export

    values: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    single, which = values["format"] in SINGLE, values["which"]
    loaded = load_checkpoint(
        values["ckpt"],
        target=which == "target" if single else which != "online",
        heads=values["heads"],
        decoder_heads=values["decoder_heads"],
        mean=values["mean"],
        std=values["std"],
    )
    if single:
        use(loaded, values)
        return
    chosen = loaded.only(which)
    describe(chosen)
    left_out = [*chosen.left_out, *(key for key in loaded.state if key not in chosen.state)]
    account(list(chosen.state), left_out)
    absent = [name for name in ("online", "target") if chosen.kind == "pretrain" and name not in chosen.networks()]
    print(f"missing: {', '.join(f'the {name} network' for name in absent) or 'nothing'}")
    if values["push_to_hub"] is not None:
        publish(chosen, values)
        return
    if values["format"] == "export":
        written = [save_export(values["out"], chosen.state, chosen.meta, left_out=chosen.left_out)]
    else:
        written = write_published(values["out"], chosen)
        tune = chosen.meta.get("tune") or {}
        if chosen.meta["task"] == "antispoof" and tune.get("name") != "adapter" and not tune.get("quirk"):
            print(
                "note: the published code scores this detector differently: in full anti-spoofing models it always "
                "takes the norm over the tokens, which this one was trained without (tune.quirk=false)"
            )
    print("\n".join(f"wrote {path}" for path in written))
    if values["calibrate"]:
        calibrate(values)


def describe(checkpoint: Checkpoint) -> None:
    """Print what a checkpoint is."""
    from fsvfm.exports import size_in_words

    meta, model = checkpoint.meta, checkpoint.meta["model"]
    print(f"{checkpoint.source}: {checkpoint.kind} checkpoint, task {meta['task']}")
    print(f"  {model['name']}: {size_in_words(model)}")
    print(f"  mean {meta['mean'] or 'unknown'}, std {meta['std'] or 'unknown'}")
    if meta["class_order"]:
        print(f"  class order {', '.join(meta['class_order'])} (logits 0, 1)")
    for note in checkpoint.notes:
        print(f"  note: {note}")


def account(used: Sequence[str], left_out: Sequence[str]) -> None:
    """Print which tensors were used and which were not."""
    from fsvfm.published import listing

    print(f"used {len(used)} tensors:{listing(used)}")
    print(f"left out {len(left_out)} tensors{':' + listing(left_out) if left_out else ''}")


def use(loaded: Checkpoint, values: dict[str, Any]) -> None:
    """Write one network for other programs, compare it with ours, and print how far it is from it."""
    from fsvfm import formats
    from fsvfm.data.manifest import Manifest

    kind, network = values["format"], "target" if values["which"] == "target" else "online"
    rows = Manifest.read(values["check"]).select(split="test") if values["check"] else None
    model = formats.Portable.from_checkpoint(loaded, network)
    describe(loaded)
    used = formats.used_keys(loaded, network, head=kind != "timm")
    account(used, [*loaded.left_out, *(key for key in loaded.state if key not in set(used))])
    if loaded.kind != "detector":
        print("note: features are the mean over the patches; its norm (fc_norm) starts as weight 1, bias 0")
    if kind == "timm":
        file = formats.write_timm(values["out"], model)
        print(f"wrote {file.path}, and config.json beside it")
        print(f"features in timm are ours: largest difference {file.change.largest:.1e} on generated pictures")
        print("load it with")
        print(f"  {file.line}")
        print(f"and give it RGB pixels in [0, 1] normalised with mean {model.meta['mean']} and std {model.meta['std']}")
        return
    if kind == "onnx":
        graphs = formats.write_onnx(values["out"], model, int8=values["quantise"] == "int8")
    else:
        graphs = {kind: formats.write_torch_export(values["out"], model)}
    size, outputs = model.image_size, ", ".join(model.outputs)
    print(f"input images (N, 3, {size}, {size}) uint8 RGB, the normalisation is inside; output {outputs}")
    for name, graph in graphs.items():
        found = graph.change
        print(f"wrote {graph.path} ({graph.path.stat().st_size / 1e6:.1f} MB)")
        if name == "int8":
            print(
                f"  int8 changes {outputs} by {found.mean:.2g} on average and {found.largest:.2g} at most on generated "
                "pictures" + ("" if values["check"] else "; check=<prepared folder> measures the AUC")
            )
        else:
            program = {"onnx": "ONNX Runtime", "torch_export": "the file, read again,"}[name]
            print(f"  {program} agrees with ours: largest difference {found.largest:.1e} on generated pictures")
    if rows is not None:
        measure(model, graphs, rows)


def measure(model: Portable, graphs: dict[str, Graph], rows: Manifest) -> None:
    """Print what written models do to the AUC on faces of a prepared data set (or to features)."""
    import numpy as np

    from fsvfm.data.datamodules import make_loader
    from fsvfm.data.datasets import LabelledFaces
    from fsvfm.data.transforms import test_transform
    from fsvfm.errors import DataError
    from fsvfm.formats import change
    from fsvfm.metrics.forgery import auc

    runs = {"ours": model.run, **{name: graph.run for name, graph in graphs.items()}}
    parts: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in runs}
    for batch in make_loader(LabelledFaces(rows, test_transform(model.image_size)), workers=0, batch_size=16):
        if batch["unreadable"]:
            raise DataError(f"check={rows.source}: an image cannot be read: {batch['unreadable'][0]}")
        for name, run in runs.items():
            parts[name].append(run(batch["image"].numpy()))
    found = {
        name: {key: np.concatenate([part[key] for part in outputs]) for key in model.outputs}
        for name, outputs in parts.items()
    }
    print(f"on {len(rows)} test faces of {rows.source}:")
    labels = rows.table["label"].to_numpy()
    both = len(set(labels.tolist())) == 2
    if model.outputs[0] == "score" and not both:
        print("  they are all real or all fake, so that there is no AUC")
    for name in graphs:
        difference = change(found["ours"], found[name])
        text = f"  {name}: largest difference {difference.largest:.2g}, mean {difference.mean:.2g}"
        if model.outputs[0] == "score" and both:
            before, after = (100 * auc(found[key]["score"], labels) for key in ("ours", name))
            text += f"; AUC {before:.2f} % → {after:.2f} % ({after - before:+.2f})"
        print(text)


def publish(chosen: Checkpoint, values: dict[str, Any]) -> None:
    """Write the folder for the hub, and upload it unless that is not wanted yet."""
    from fsvfm import hub

    repository, card_only = str(values["push_to_hub"]), bool(values["card_only"])
    licence = hub.choose_licence(chosen.meta, values["licence"], needed=not card_only)
    written, new = hub.write_folder(values["out"], chosen, repository, licence)
    print("\n".join(f"wrote {path}" for path in written[0 if new else 1 :]))
    if not new:
        print(f"kept {written[0]}; delete it to have a new card written")
    print(f"licence of the weights: {licence.name or 'not known'} ({licence.reason})")
    if card_only:
        print(f"read {written[0]} and edit it; the same command without card_only=true uploads the folder")
        return
    print(
        f"uploaded to {hub.upload(values['out'], repository)}; a new repository is private until you change that there"
    )


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


@cli.command("export")
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
