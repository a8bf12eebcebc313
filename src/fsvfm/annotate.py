"""Pictures of a prediction: boxes with scores on a copy of the photograph or video, and a video's scores over time."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from fsvfm.errors import DataError
from fsvfm.faces.detect import Box
from fsvfm.faces.images import load_image, save_png
from fsvfm.faces.video import probe, read_frames, write_video
from fsvfm.prediction import Face, Frame, Prediction

#: Colours of the verdicts, told apart by colour-blind eyes too; the verdict is also written.
COLOURS = {"real": (0, 158, 115), "fake": (213, 60, 20), "uncertain": (230, 159, 0), "no face": (130, 130, 130)}

#: Frame rate of a copy whose original tells none.
_RATE = 25.0

#: A timeline's legend names so many faces, those seen most often.
_NAMED = 10


def draw(image: np.ndarray, faces: Sequence[Face], title: str = "") -> np.ndarray:
    """A copy of a picture with a box and a line of text for every face.

    Args:
        image: (H, W, 3) uint8 RGB.
        faces: with boxes in its pixels.
        title: a line in the upper left corner.

    Returns:
        (H, W, 3) uint8.
    """
    picture = Image.fromarray(np.ascontiguousarray(image))
    pen = ImageDraw.Draw(picture)
    shorter = min(picture.size)
    font = ImageFont.load_default(size=max(10, shorter // 36))
    line = max(1, shorter // 240)
    for face in faces:
        colour = COLOURS[face.verdict]
        pen.rectangle(_ordered(face.box), outline=colour, width=line)
        text = f"{face.id}: {face.verdict} {face.probability:.2f}"
        _write(pen, text, (face.box.left, face.box.top), font, colour, picture.size, above=True)
    if title:
        _write(pen, title, (0, 0), font, (40, 40, 40), picture.size)
    return np.asarray(picture)


def _ordered(box: Box) -> tuple[int, int, int, int]:
    return box.left, box.top, max(box.left, box.right - 1), max(box.top, box.bottom - 1)


def _write(
    pen: ImageDraw.ImageDraw,
    text: str,
    place: tuple[int, int],
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    colour: tuple[int, int, int],
    size: tuple[int, int],
    above: bool = False,
) -> None:
    """White text on a plate that lies inside the picture, at a place or just above it."""
    left, top, right, bottom = (round(side) for side in pen.textbbox((0, 0), text, font=font))
    margin = max(2, (bottom - top) // 4)
    width, height = right - left + 2 * margin, bottom - top + 2 * margin
    x = min(max(place[0], 0), max(size[0] - width, 0))
    y = min(max(place[1] - (height if above else 0), 0), max(size[1] - height, 0))
    pen.rectangle((x, y, x + width, y + height), fill=colour)
    pen.text((x + margin - left, y + margin - top), text, font=font, fill="white")


def annotate(prediction: Prediction, out: str | Path) -> Path:
    """Write an annotated copy of what was predicted: a PNG of a photograph, an MP4 of a video (without sound).

    Boxes of a video's scored frames are carried to the frames between them in a straight line where the same face is
    in both, and the number shown beside a face is that of the last scored frame.

    Args:
        prediction: of a file that is still there.
        out: path of the copy; its suffix is replaced by ``.png`` or ``.mp4``.

    Returns:
        the file written; it appears complete or not at all.

    Raises:
        DataError: the original cannot be read (a camera cannot be read twice), or the copy not be written.
    """
    out = Path(out)
    if prediction.kind == "photo":
        # Not with_suffix: the name may hold dots of its own.
        file = out.with_name(f"{out.name}.png")
        save_png(file, draw(load_image(prediction.source), prediction.faces, _title(prediction)))
        return file
    if prediction.kind != "video":
        raise DataError(f"{prediction.source}: a camera's pictures are not kept; there is nothing to annotate")
    file = out.with_name(f"{out.name}.mp4")
    rate = probe(prediction.source).rate or _RATE
    file.parent.mkdir(parents=True, exist_ok=True)
    write_video(file, _annotated(prediction), rate=rate)
    return file


def _title(prediction: Prediction) -> str:
    if prediction.probability is None:
        return str(prediction.verdict)
    return f"{prediction.verdict}, P(fake) {prediction.probability:.2f}"


def _annotated(prediction: Prediction) -> Iterator[np.ndarray]:
    title = _title(prediction)
    numbers = [frame.index for frame in prediction.frames]
    try:
        for index, image in read_frames(prediction.source):
            yield draw(image, _faces_at(prediction.frames, numbers, index), title)
    except DataError:  # damaged at its end, which the prediction says; the copy ends where the original does
        return


def _faces_at(frames: Sequence[Frame], numbers: Sequence[int], index: int) -> list[Face]:
    """Faces of any frame of a video, from the scored ones around it."""
    place = bisect.bisect_right(numbers, index) - 1
    if place < 0:
        return []
    before = frames[place]
    if before.index == index or place + 1 == len(frames):
        return before.faces if before.index == index or _is_near(numbers, index) else []
    after = frames[place + 1]
    share = (index - before.index) / (after.index - before.index)
    following = {face.id: face for face in after.faces}
    faces = []
    for face in before.faces:
        if face.id in following:
            pairs = zip(face.box, following[face.id].box, strict=True)
            box = Box(*(round((1 - share) * old + share * new) for old, new in pairs))
            faces.append(Face(face.id, box, face.score, face.probability, face.verdict))
    return faces


def _is_near(numbers: Sequence[int], index: int) -> bool:
    """Whether a frame after the last scored one still belongs to it: the distance of two scored ones away at most."""
    step = numbers[-1] - numbers[-2] if len(numbers) > 1 else 1
    return index - numbers[-1] < step


def timeline(prediction: Prediction, out: str | Path) -> Path:
    """Plot the probabilities of a video's faces over time, with the threshold and the band; write it as PNG.

    Args:
        prediction: of a video or camera.
        out: path of the plot; ``.png`` is added.

    Returns:
        the file written; it appears complete or not at all.

    Raises:
        DataError: the file cannot be written.
    """
    out = Path(out)
    file = out.with_name(f"{out.name}.png")
    figure = Figure(figsize=(10, 3.4), dpi=110, layout="constrained")
    axes = figure.subplots()
    in_seconds = all(frame.time is not None for frame in prediction.frames)
    points: dict[int, list[tuple[float, float]]] = {}
    for frame in prediction.frames:
        x = float(frame.time or 0) if in_seconds else frame.index
        for face in frame.faces:
            points.setdefault(face.id, []).append((x, face.probability))
    named = {face.id for face in sorted(prediction.faces, key=lambda face: -face.frames)[:_NAMED]}
    for track in prediction.faces:
        label = f"face {track.id}: {track.verdict} {track.probability:.2f}" if track.id in named else None
        axes.plot(*zip(*points[track.id], strict=True), marker="o", markersize=3, linewidth=1.2, label=label)
    judged = prediction.threshold or {}
    if "value" in judged:
        name = "threshold" if judged["name"] == "number" else f"threshold {judged['name']}"
        axes.axhline(judged["value"], color="black", linestyle="--", linewidth=1, label=f"{name} {judged['value']:.2f}")
    if band := judged.get("band"):
        axes.axhspan(band["low"], band["high"], color=[c / 255 for c in COLOURS["uncertain"]], alpha=0.2)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("seconds" if in_seconds else "frame")
    axes.set_ylabel("P(fake)")
    axes.set_title(f"{Path(prediction.source).name}: {_title(prediction)}", parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    save_png(file, np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[:, :, :3]))
    return file
