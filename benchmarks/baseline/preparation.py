"""Photographs to faces in a plain loop: open, find the face, crop, resize, save."""

from __future__ import annotations

from pathlib import Path

import dlib
import numpy as np
from PIL import Image, ImageOps


def prepare(photos: list[Path], out: Path, size: int, scale: float, detect: bool) -> int:
    """Write one PNG per photograph with a face; how many there were."""
    detector, written = dlib.get_frontal_face_detector(), 0
    for photo in photos:
        image = ImageOps.exif_transpose(Image.open(photo)).convert("RGB")
        if detect:
            found = detector(np.asarray(image), 1)
            if not found:
                continue
            box = max(found, key=lambda one: one.area())
            half = int(max(box.width(), box.height()) * scale) // 2
            x, y = box.center().x, box.center().y
            image = image.crop(
                (max(x - half, 0), max(y - half, 0), min(x + half, image.width), min(y + half, image.height))
            )
        image.resize((size, size), Image.Resampling.BICUBIC).save(out / f"{photo.stem}.png")
        written += 1
    return written
