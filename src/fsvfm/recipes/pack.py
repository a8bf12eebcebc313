"""Pack a prepared data set into tar shards: a few large files instead of millions of small ones.

The packed folder has the same rows in the same order, so training from it equals training from the files, sample by
sample. Images lie in the shards as :mod:`fsvfm.data.storage` describes.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2

from fsvfm.data.manifest import Manifest
from fsvfm.data.storage import CODECS, encode_fsz, is_packed, read_bytes, read_image
from fsvfm.errors import ConfigError, DataError
from fsvfm.faces.images import resize
from fsvfm.recipes.engine import Item, Preparation, Prepared, Product

#: Raise when the same settings would give other shards.
VERSION = 1

SHARDS = "shards"


def pack(
    manifest: str | Path,
    *,
    out: str | Path,
    codec: str = "fsz",
    quality: int = 95,
    size: int | None = None,
    images_per_shard: int = 4096,
    workers: int | None = None,
    **engine: Any,
) -> Prepared:
    """Write a packed copy of a prepared data set.

    Args:
        manifest: prepared folder or manifest.
        out: folder to write; parsing maps travel along, losslessly.
        codec: ``fsz`` (lossless, decodes about four times as fast as PNG), ``keep`` (the files' own bytes) or ``jpeg``.
        quality: of ``jpeg``, 1 to 100.
        size: side in pixels to which images are scaled first (bicubic), which is where most of the reading time goes
            for large crops; None keeps theirs. Data with parsing maps must keep their size.
        images_per_shard: images in one shard.
        workers: processes; None takes all cores.
        engine: switches of :class:`fsvfm.recipes.engine.Preparation`.

    Raises:
        ConfigError: an unknown codec, an impossible quality or size.
        DataError: no such manifest, or `out` holds something else.
    """
    if codec not in CODECS:
        raise ConfigError(f"codec={codec!r} is unknown; expected one of {', '.join(CODECS)}")
    if not 1 <= quality <= 100 or images_per_shard < 1 or (size is not None and size < 1):
        raise ConfigError(
            f"expected quality from 1 to 100 and images_per_shard and size above 0, got quality={quality}, "
            f"images_per_shard={images_per_shard}, size={size}"
        )
    source = Manifest.read(manifest)
    if size is not None and source.parse_paths() is not None:
        raise ConfigError("size=… would no longer fit the parsing maps; leave it out, or prepare at that size")
    if size is not None and codec == "keep":
        raise ConfigError("codec=keep copies the files' own bytes; scale with codec=fsz or codec=jpeg")
    settings = {
        "recipe": f"pack, version {VERSION}", "manifest": source.digest(), "codec": codec,
        "quality": quality if codec == "jpeg" else None, "size": size, "images_per_shard": images_per_shard,
    }  # fmt: skip
    starts = range(0, len(source), images_per_shard)
    with Preparation(out, settings, workers=workers, **engine) as preparation:
        (preparation.out / SHARDS).mkdir(exist_ok=True)
        worker = ShardWriter(preparation.out, str(manifest), images_per_shard, codec, quality, size)
        made = preparation.run(
            "shards", [Item(f"shard {start // images_per_shard}", start) for start in starts], worker
        )
        card = {
            "name": source.source,
            "about": f"packed copy of {len(source)} images, codec {codec}",
            "source": {"manifest": str(Path(manifest).absolute()), "rows_sha256": source.digest()},
        }
        return preparation.finish(_rows(source, made, images_per_shard), card)


def _rows(source: Manifest, made: Any, images_per_shard: int) -> Iterator[dict[str, Any]]:
    """The source's rows with packed paths; rows that could not be read are left out (and accounted for)."""
    has_parse = "parse" in source.table
    for key, values in made.items():
        part = source.table.iloc[int(key.split()[1]) * images_per_shard :][:images_per_shard]
        for (_, row), image, parse in zip(part.iterrows(), values["images"], values["parses"], strict=True):
            if image:
                packed = {"path": image, **({"parse": parse or ""} if has_parse else {})}
                kept = {str(column): value for column, value in row.items()}
                yield {**kept, "origin": row.get("origin") or row["path"], **packed}


@dataclass
class ShardWriter:
    """Worker: the rows of one shard → a tar file, deterministic to the byte."""

    out: Path
    manifest: str
    images_per_shard: int
    codec: str
    quality: int
    size: int | None

    def __call__(self, start: int) -> Product:
        """Write the shard that begins at row ``start``."""
        rows = self._source()
        images, parses = rows.files(), rows.files("parse") if "parse" in rows.table else None
        name = f"{SHARDS}/{start // self.images_per_shard:06d}.tar"
        temporary = self.out / f"{SHARDS}/.{Path(name).name}.{os.getpid()}.tmp"
        values: dict[str, list[str | None]] = {"images": [], "parses": []}
        missed = []
        try:
            with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
                for row in range(start, min(start + self.images_per_shard, len(rows))):
                    key = f"{row:010d}"
                    parse = parses[row] if parses is not None else ""
                    try:
                        suffix, data = self._encode(images[row])
                        labels = read_bytes(parse) if parse else b""
                    except DataError as error:
                        missed.append((images[row], str(error)))
                        values["images"].append(None)
                        values["parses"].append(None)
                        continue
                    values["images"].append(_add(tar, name, f"{key}{suffix}", data))
                    values["parses"].append(
                        _add(tar, name, f"{key}.parse{Path(parse).suffix}", labels) if parse else None
                    )
                    # WebDataset's convention for the class, so that its own loaders find it.
                    _add(tar, name, f"{key}.cls", str(int(rows.table["label"].iloc[row])).encode())
            temporary.replace(self.out / name)
        finally:
            temporary.unlink(missing_ok=True)
        return Product([name], values, missed, images=sum(image is not None for image in values["images"]))

    def _source(self) -> Manifest:
        if not hasattr(self, "_read"):
            self._read = Manifest.read(self.manifest, extra=["parse"])
        return self._read

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_read"}

    def _encode(self, path: str) -> tuple[str, bytes]:
        if self.codec == "keep":
            return (".image" if is_packed(path) else Path(path).suffix), read_bytes(path)
        image = read_image(path)
        if self.size is not None:
            image = resize(image, self.size)
        if self.codec == "fsz":
            return ".fsz", encode_fsz(image)
        done, data = cv2.imencode(".jpg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, self.quality])
        if not done:
            raise DataError(f"{path} cannot be encoded as JPEG")
        return ".jpg", data.tobytes()


def _add(tar: tarfile.TarFile, shard: str, name: str, data: bytes) -> str:
    """Append a member; returns where its bytes lie, as a manifest's path."""
    info = tarfile.TarInfo(name)  # no owner, no time: same input, same bytes
    info.size = len(data)
    start = tar.offset + tarfile.BLOCKSIZE  # after one header block; USTAR needs one for such short names
    tar.addfile(info, io.BytesIO(data))
    return f"{shard}@{start}+{len(data)}"
