"""Tables of the documentation that are made from what they describe: experiments and released checkpoints.

MkDocs calls :func:`on_page_markdown` for every page; a line ``<!-- table: <name> -->`` becomes the table of that name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from omegaconf import DictConfig

from fsvfm.zoo import ZOO

EXPERIMENTS = Path(__file__).resolve().parent.parent / "configs" / "experiment"
_MARK = re.compile(r"^<!-- table: (\w+) -->$", re.MULTILINE)

Column = tuple[str, Callable[[DictConfig], Any]]


def _batch(cfg: DictConfig) -> str:
    parts = [cfg.trainer.devices, cfg.data.batch_size, cfg.trainer.accumulate_grad_batches]
    text = " × ".join(str(part) for part in parts[:2])
    return text if parts[2] == 1 else f"{text} × {parts[2]} steps"


def _length(cfg: DictConfig) -> str:
    steps = cfg.trainer.max_steps
    return f"{steps:,} steps" if steps > 0 else f"{cfg.trainer.max_epochs} epochs"


def _decay(cfg: DictConfig) -> Any:
    return "–" if cfg.optim.layer_decay is None or cfg.tune.name != "full" else cfg.optim.layer_decay


LOSSES = ("reconstruction", "region", "similarity")
COMMON: tuple[Column, ...] = (
    ("model", lambda cfg: cfg.model.name),
    ("starts from", lambda cfg: cfg.model.init or "–"),
    ("data", lambda cfg: cfg.data.name),
    ("devices × batch", _batch),
    ("length", _length),
    ("base lr", lambda cfg: f"{cfg.optim.base_lr:g}"),
    ("weight decay", lambda cfg: f"{cfg.optim.weight_decay:g}"),
)
PRETRAIN: tuple[Column, ...] = (
    *COMMON,
    ("warm-up", lambda cfg: f"{cfg.optim.warmup_epochs:g} epochs"),
    ("masking", lambda cfg: f"{cfg.masking.strategy}, {cfg.masking.ratio:g}"),
    ("weights rec / region / sim", lambda cfg: " / ".join(f"{cfg.task.loss[name]:g}" for name in LOSSES)),
)
DETECTOR: tuple[Column, ...] = (
    *COMMON,
    ("tuning", lambda cfg: cfg.tune.name),
    ("layer decay", _decay),
    ("drop path", lambda cfg: f"{cfg.tune.drop_path:g}"),
    ("contrast", lambda cfg: f"{cfg.tune.contrast_weight:g}" if cfg.tune.contrast_weight else "–"),
    ("protocol", lambda cfg: cfg.protocol.name),
)


def _markdown(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _about(name: str) -> str:
    """The sentence at the top of an experiment's file."""
    lines = (EXPERIMENTS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    told = [line.lstrip("# ") for line in lines if line.startswith("#") and "@package" not in line]
    return told[0] if told else ""


def experiments() -> str:
    """Every experiment with its values, task by task."""
    groups: dict[str, list[tuple[str, DictConfig]]] = {"pretrain": [], "forgery": [], "antispoof": []}
    with initialize_config_module("fsvfm.configs", version_base="1.3"):
        for path in sorted(EXPERIMENTS.glob("*.yaml")):
            overrides = [f"experiment={path.stem}", "name=docs"]
            if path.stem.startswith("fas_"):
                overrides.append("target=M")
            cfg = compose("train", overrides)
            kind = "pretrain" if cfg.task._target_.endswith("PretrainTask") else "forgery"
            groups["antispoof" if cfg.task._target_.endswith("AntispoofTask") else kind].append((path.stem, cfg))
    titles = {"pretrain": "Pre-training", "forgery": "Forgery detection", "antispoof": "Anti-spoofing (target M shown)"}
    text = []
    for kind, found in groups.items():
        columns = PRETRAIN if kind == "pretrain" else DETECTOR
        rows = [[f"`{name}`", *(value(cfg) for _, value in columns)] for name, cfg in found]
        text += [f"## {titles[kind]}", "", _markdown(["experiment", *(title for title, _ in columns)], rows), ""]
        text += [f"- `{name}`: {_about(name)}" for name, _ in found] + [""]
    return "\n".join(text)


def zoo() -> str:
    """Released checkpoints that can be named."""
    rows = [
        [f"`zoo:{e.name}`", e.size, e.data, e.tuning, e.epochs or "–", f"`{e.file}`", e.licence] for e in ZOO.values()
    ]
    return _markdown(["name", "size", "trained on", "for", "epochs", "file on the hub", "licence of the weights"], rows)


TABLES: dict[str, Callable[[], str]] = {"experiments": experiments, "zoo": zoo}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the tables in."""
    return _MARK.sub(lambda found: TABLES[found[1]](), markdown)
