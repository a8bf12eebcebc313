"""Where images lie: in files of their own or, packed, in byte ranges of tar shards; with a fast lossless codec.

A packed image is named in the manifest like a file, by shard, offset and length: ``shards/000012.tar@1536+70312``.
Nothing else changes: any row can be read at any time by any process with one positioned read, so order, augmentation
and resuming are exactly those of loose files. The shards are ordinary tar files in WebDataset's naming, so other tools
read them too. Measured against LitData, MosaicML Streaming and WebDataset's own reader in docs/performance.md.

A remote shard (``s3://…``) is fetched once, whole, into the local cache when one of its images is first asked for.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import struct
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa

from fsvfm.errors import DataError

#: Path of a packed image: shard, offset, length.
_RANGE = re.compile(r"(.+\.tar)@(\d+)\+(\d+)")
_URL = re.compile(r"[a-z][a-z0-9+.-]*://")

_MAGIC = b"FSZ1"
_HEADER = struct.Struct("<4sHH")
_LEVEL = 3  # of zstd: 1 is little faster to write, 9 little smaller

#: Ways of packing images. ``fsz`` is lossless; ``keep`` copies the files as they are; ``jpeg`` loses what a forgery
#: detector may look for and is there for pre-training at scale.
CODECS = ("fsz", "keep", "jpeg")


def encode_fsz(image: np.ndarray) -> bytes:
    """Compress (H, W, 3) uint8 without loss: channel planes, each row minus the one above, zstd.

    About the size of a PNG of the same picture; decodes about four times as fast.

    Raises:
        DataError: another array, or a side of more than 65,535 pixels.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or max(image.shape) > 0xFFFF:
        raise DataError(f"expected an (H, W, 3) uint8 image of at most 65,535 pixels a side, got {image.shape}")
    planes = np.ascontiguousarray(image.transpose(2, 0, 1))
    planes[:, 1:] -= image.transpose(2, 0, 1)[:, :-1]
    body = pa.Codec("zstd", _LEVEL).compress(planes.tobytes(), asbytes=True)
    return _HEADER.pack(_MAGIC, image.shape[0], image.shape[1]) + body


def decode_fsz(data: bytes) -> np.ndarray:
    """Undo :func:`encode_fsz`: (H, W, 3) uint8 RGB, a view on channel planes.

    Raises:
        DataError: not such bytes, or damaged ones.
    """
    try:
        magic, height, width = _HEADER.unpack_from(data)
        if magic != _MAGIC:
            raise ValueError("no FSZ header")
        size = 3 * height * width
        planes = np.frombuffer(_codec().decompress(data[_HEADER.size :], size), np.uint8).reshape(3, height, width)
    except (ValueError, OSError, struct.error, pa.ArrowException) as error:
        raise DataError(f"packed image cannot be decoded ({error}); pack the data set again") from error
    return np.cumsum(planes, axis=1, dtype=np.uint8).transpose(1, 2, 0)


@functools.cache
def _codec() -> pa.Codec:
    return pa.Codec("zstd")


def decode_image(data: bytes, name: str) -> np.ndarray:
    """Decode any packed or ordinary picture's bytes to (H, W, 3) uint8 RGB.

    Raises:
        DataError: not a decodable picture; ``name`` is what the message calls it.
    """
    if data[:4] == _MAGIC:
        return decode_fsz(data)
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
    if image is None:
        raise DataError(
            f"{name} is not a readable image; run the recipe again with verify=true, or remove its row from the "
            "manifest"
        )
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def read_image(path: str | Path) -> np.ndarray:
    """Decode a prepared image, a file or a packed one, to (H, W, 3) uint8 RGB.

    Raises:
        DataError: absent, or not a decodable image.
    """
    name = str(path)
    return decode_image(read_bytes(name), name)


def is_packed(path: str) -> bool:
    """Whether a manifest's path names a byte range of a shard."""
    return _RANGE.fullmatch(path) is not None


def read_bytes(path: str) -> bytes:
    """Bytes of a file, or of the range of a shard that the path names.

    Raises:
        DataError: absent, or the shard ends before the range does.
    """
    found = _RANGE.fullmatch(path)
    if found is None:
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise DataError(
                f"{path} does not exist or cannot be read; run the recipe again with verify=true, or remove its row "
                "from the manifest"
            ) from error
    shard, offset, size = found[1], int(found[2]), int(found[3])
    data = os.pread(_open(shard), size, offset)
    if len(data) != size:
        raise DataError(f"{shard} is shorter than its manifest says (truncated copy?); pack or fetch it again")
    return data


@functools.lru_cache(maxsize=512)  # far more shards than that stay closed: descriptors are a limited good
def _shard(shard: str) -> _Shard:
    return _Shard(shard)


def _open(shard: str) -> int:
    return _shard(shard).descriptor


class _Shard:
    """An open shard; closed when the cache lets go of it."""

    def __init__(self, shard: str) -> None:
        file = fetch(shard) if is_remote(shard) else Path(shard)
        try:
            self.descriptor = os.open(file, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"shard {shard} does not exist or cannot be opened ({error}); pack again") from error

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def cache_folder() -> Path:
    """Where remote shards are kept: ``FSVFM_CACHE``, by default ``~/.cache/fsvfm``."""
    return Path(os.environ.get("FSVFM_CACHE", Path.home() / ".cache" / "fsvfm")) / "shards"


def is_remote(path: object) -> bool:
    """Whether a path is a URL, such as ``s3://bucket/folder``."""
    return isinstance(path, str) and _URL.match(path) is not None


def fetch(url: str, *, again: bool = False) -> Path:
    """A remote file's local copy, fetched whole if it is not there yet; complete or absent, also among processes.

    Args:
        url: of the file.
        again: fetch it even if it is there, since it may have changed (manifests; shards never do).

    Raises:
        DataError: the file is absent, or the file system's package is not installed.
    """
    local = cache_folder() / hashlib.sha256(url.encode()).hexdigest()[:16] / url.rsplit("/", 1)[-1]
    if local.is_file() and not again:
        return local
    import fsspec

    local.parent.mkdir(parents=True, exist_ok=True)
    temporary = local.with_name(f".{local.name}.{os.getpid()}.tmp")
    try:
        with fsspec.open(url, "rb") as source, temporary.open("wb") as copy:
            while piece := source.read(1 << 22):
                copy.write(piece)
        temporary.replace(local)
    except ImportError as error:
        raise DataError(f"{url} needs another package ({error}); for S3: pip install 'fsvfm[s3]'") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{url} cannot be fetched ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)
    return local
