"""What is shown of scored faces: ROC and reliability curves, a table of metrics, the most wrongly judged faces.

Everything lies as PNG and CSV in ``<folder>/figures``; loggers of the run show the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig
from PIL import Image, ImageDraw

from fsvfm import build
from fsvfm.cli import say
from fsvfm.data.storage import read_image
from fsvfm.errors import FsvfmError
from fsvfm.loggers import Shows, finish
from fsvfm.report_figures import draw_reliability, draw_roc, png
from fsvfm.report_tables import families, result_rows

#: Side of a face in the picture of wrong ones, pixels, and how many there are of each class.
_SIDE, _FACES = 112, 8
_CAPTION = 26


def show(
    cfg: DictConfig,
    table: pd.DataFrame,
    results: Mapping[str, Mapping[str, Any]],
    folder: Path,
    loggers: Sequence[Any] | None = None,
) -> None:
    """Write figures of scored faces and hand them, with the metrics as scalars, to the run's loggers.

    Args:
        cfg: composed configuration; its ``logger`` group is opened where no loggers are given.
        table: scored faces with ``run``, ``testset``, ``path``, ``label``, ``method``, ``score`` and ``video``.
        results: run → test set → summary, see :func:`fsvfm.evaluation.evaluate`.
        folder: where the faces' results are (``<run>/test``, ``evaluation`` or ``validation``); its name is the first
            part of every key, as in ``test/roc``.
        loggers: opened ones.
    """
    split = families(results)
    attack = split[0].attack if len(split) == 1 else "fake"
    pictures = {"roc": png(draw_roc(table, attack))}
    if (reliability := draw_reliability(results)) is not None:
        pictures["reliability"] = png(reliability)
    for (run, name), part in table.groupby(["run", "testset"], sort=False):
        pictures["/".join(["wrong", *([str(run)] if len(results) > 1 else []), str(name)])] = wrong_faces(part, attack)
    numbers = ["value", "low", "high", "n", "real", "fake"]
    rows = pd.DataFrame(result_rows(results)).astype(dict.fromkeys(numbers, float))
    metrics = rows[["run", "testset", "level", "metric", *numbers, "gap"]]

    out = folder / "figures"
    for key, picture in pictures.items():
        _save(picture, out / f"{key.replace('/', '_')}.png")
    temporary = out / "metrics.tmp"
    metrics.to_csv(temporary, index=False)
    temporary.replace(out / "metrics.csv")

    opened = build.build_loggers(cfg) if loggers is None else []
    step = _last_step(Path(cfg.paths.run))
    scalars: dict[str, float] = {}
    for row in metrics.dropna(subset=["value"]).to_dict("records"):
        names = [folder.name, *([row["run"]] if len(results) > 1 else []), row["testset"], row["level"], row["metric"]]
        scalars["/".join(names)] = row["value"]
    for logger in loggers if loggers is not None else opened:
        if isinstance(logger, Shows):
            logger.log_metrics(scalars, step)
            for key, picture in pictures.items():
                logger.show_picture(f"{folder.name}/{key}", picture, step)
            logger.show_table(f"{folder.name}/metrics", metrics, step)
    for logger in opened:
        logger.finalize("success")
    finish(opened)


def wrong_faces(table: pd.DataFrame, attack: str = "fake") -> Image.Image:
    """The faces on the wrong side of a score of 0.5, worst first: those missed above, false alarms below.

    Args:
        table: scored faces of one run and test set.
        attack: what label 1 is called.

    Returns:
        RGB picture with the method and the score of each face, or a line that says that there are none.
    """
    canvas = Image.new("RGB", (_FACES * _SIDE, 2 * (_SIDE + _CAPTION)), "white")
    draw = ImageDraw.Draw(canvas)
    for line, (label, word) in enumerate(((1, attack), (0, "real"))):
        top = line * (_SIDE + _CAPTION)
        group = table[table["label"] == label]
        wrong = group[(group["score"] - label).abs() >= 0.5].sort_values(
            ["score", "path"], ascending=[label == 1, True]
        )
        if wrong.empty:
            draw.text((4, top), f"none of {len(group)} {word} faces is on the wrong side of 0.5", fill="black")
        for column, row in enumerate(wrong.head(_FACES).itertuples()):
            left = column * _SIDE
            draw.text((left + 3, top), str(row.method)[:17], fill="black")
            draw.text((left + 3, top + 12), f"P({attack}) = {row.score:.3f}", fill="black")
            try:
                face = Image.fromarray(read_image(str(row.path))).resize((_SIDE - 4, _SIDE - 4))
                canvas.paste(face, (left + 2, top + _CAPTION))
            except FsvfmError as error:  # scored a moment ago, but storage may fail at any time
                say(f"warning: {error}")
    return canvas


def _last_step(run: Path) -> int:
    """The last step that the run's training logged; 0 where there was none."""
    file = run / "metrics.csv"
    if not file.is_file() or not file.stat().st_size:
        return 0
    return int(max(pd.read_csv(file, usecols=["step"])["step"], default=0))


def _save(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    picture.save(temporary, format="PNG")
    temporary.replace(path)
