"""Normalisation statistics of a data set: exact per-channel mean and standard deviation, computed once and cached."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from rich.progress import track

from fsvfm.data.datasets import read_image
from fsvfm.data.manifest import Manifest
from fsvfm.data.transforms import resize
from fsvfm.errors import DataError


def _histogram(path: str, size: int) -> np.ndarray:
    image = resize(read_image(path), size)
    return np.stack([np.bincount(image[..., channel].ravel(), minlength=256) for channel in range(3)])


def channel_statistics(paths: list[str], image_size: int, *, workers: int = 4) -> tuple[list[float], list[float], int]:
    """Exact mean and (population) standard deviation over every pixel of every image, per channel.

    The pixels are uint8, so a histogram of 256 exact counts per channel holds all that is needed: no rounding
    accumulates, and the result does not depend on order, batch size or number of workers (the mean of batch means,
    which published code computes, does).

    Args:
        paths: image files.
        image_size: images are resized (bicubic) to this side first, as the network sees them.
        workers: decoding threads.

    Returns:
        (mean, std, unreadable): three floats each, of pixels scaled to [0, 1], and how many files were left out.

    Raises:
        DataError: none of the files could be read.
    """

    def one(path: str) -> np.ndarray | None:
        try:
            return _histogram(path, image_size)
        except DataError:
            return None

    counts, unreadable = np.zeros((3, 256), dtype=np.int64), 0
    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        for result in track(pool.map(one, paths), total=len(paths), description="normalisation statistics"):
            if result is None:
                unreadable += 1
            else:
                counts += result
    total = counts.sum(axis=1)
    if not total[0]:
        raise DataError(f"none of the {len(paths)} images could be read, the first: {paths[0] if paths else '(none)'}")
    values = np.arange(256, dtype=np.int64)
    # Python integers: exact at any number of images.
    first = [int(n) for n in (counts * values).sum(axis=1)]
    second = [int(n) for n in (counts * values**2).sum(axis=1)]
    mean = [s / int(n) / 255 for s, n in zip(first, total, strict=True)]
    variance = [(q * int(n) - s * s) / (int(n) ** 2) / 255**2 for s, q, n in zip(first, second, total, strict=True)]
    return mean, [float(np.sqrt(v)) for v in variance], unreadable


def cached_statistics(manifest: Manifest, image_size: int, *, workers: int = 4) -> tuple[list[float], list[float]]:
    """:func:`channel_statistics` of a manifest's rows, kept in ``stats/`` beside the manifest.

    The cache's name is a digest of the rows' paths and the image size, so another selection has another entry.
    """
    paths = manifest.paths()
    digest = hashlib.sha256("\n".join([str(image_size), *map(str, paths)]).encode()).hexdigest()[:16]
    cache = Path(manifest.root) / "stats" / f"{digest}.json"
    if cache.is_file():
        stored = json.loads(cache.read_text())
        return stored["mean"], stored["std"]
    mean, std, unreadable = channel_statistics(list(paths), image_size, workers=workers)
    record = {"mean": mean, "std": std, "images": len(paths) - unreadable, "image_size": image_size}
    try:
        cache.parent.mkdir(exist_ok=True)
        temporary = cache.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(record, indent=1))
        temporary.replace(cache)
    except OSError:
        # A read-only data folder only costs computing this again.
        pass
    return mean, std
