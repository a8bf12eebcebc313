"""Where recorded numbers and real photographs are; tests that need them skip with a reason where they are absent."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_module
from omegaconf import DictConfig
from PIL import Image

from fsvfm.data.manifest import Manifest
from fsvfm.regions import region_grid

REPOSITORY = Path(__file__).resolve().parent.parent


def _existing(folder: Path, variable: str) -> Path:
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; set {variable} to the folder to run this test")
    return folder


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder with recorded numbers and media (`FSVFM_SHARED`, default `../shared`)."""
    default = REPOSITORY.parent / "shared"
    return _existing(Path(os.environ.get("FSVFM_SHARED", default)).resolve(), "FSVFM_SHARED")


@pytest.fixture(scope="session")
def golden_dir(request: pytest.FixtureRequest) -> Path:
    """Numbers recorded from the published implementation (`FSVFM_GOLDEN`, default `<shared>/golden`)."""
    if folder := os.environ.get("FSVFM_GOLDEN"):
        return _existing(Path(folder).resolve(), "FSVFM_GOLDEN")
    return _existing(request.getfixturevalue("shared_dir") / "golden", "FSVFM_GOLDEN")


@pytest.fixture(scope="session")
def media_dir(shared_dir: Path) -> Path:
    """Real photographs (`photos/`) and clips (`videos/`)."""
    return _existing(shared_dir / "media", "FSVFM_SHARED")


def make_prepared(folder: Path, *, people: int = 24, size: int = 64, seed: int = 0) -> Path:
    """A prepared folder of generated faces: smooth noise with face-shaped parses; fakes have a blue cast."""
    rng = np.random.default_rng(seed)
    rows = []
    (folder / "images").mkdir(parents=True)
    (folder / "parsing_maps").mkdir()
    ys, xs = np.mgrid[0:size, 0:size] / size - 0.5
    for person in range(people):
        split = "train" if person < people * 2 // 3 else "val" if person < people * 5 // 6 else "test"
        noise = Image.fromarray(rng.integers(60, 200, (4, 4, 3), dtype=np.uint8))
        pixels = np.asarray(noise.resize((size, size), Image.Resampling.BICUBIC))
        labels = np.where(xs**2 + ys**2 < 0.18, 1, np.where(ys < 0, 10, 0)).astype(np.uint8)
        for label, (cx, cy) in {
            2: (-0.2, -0.2),
            3: (0.2, -0.2),
            4: (-0.2, -0.1),
            5: (0.2, -0.1),
            6: (0, 0.05),
            8: (0, 0.25),
        }.items():
            jitter = rng.uniform(-0.03, 0.03, 2)
            labels[((xs - cx - jitter[0]) ** 2 + (ys - cy - jitter[1]) ** 2) < 0.004] = label
        for label, method in ((0, "real"), (1, "self_blend"), (1, "face_swap")):
            name = f"p{person:03d}_{method}"
            image = pixels.copy()
            if label:
                image[size // 4 : -size // 4, size // 4 : -size // 4, 2] = 255
            Image.fromarray(image).save(folder / "images" / f"{name}.png")
            row = {
                "path": f"images/{name}.png",
                "label": label,
                "split": split,
                "dataset": "generated",
                "method": method,
                "video": name,
                "subject": f"p{person:03d}",
                "frame": 0,
                "parse": "",
                "grid_p16": None,
            }
            if not label:
                Image.fromarray(labels).save(folder / "parsing_maps" / f"{name}.png")
                row |= {"parse": f"parsing_maps/{name}.png", "grid_p16": region_grid(labels, 16)}
            rows.append(row)
    Manifest(pd.DataFrame(rows), folder).write()
    return folder


@pytest.fixture(scope="session")
def prepared_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small prepared folder: 24 generated people, three splits, one kind of seen and one of unseen fakes."""
    return make_prepared(tmp_path_factory.mktemp("data") / "demo")


@pytest.fixture(scope="session")
def marked_dir(tmp_path_factory: pytest.TempPathFactory, prepared_dir: Path) -> Path:
    """The same with 68 landmarks, on a spiral, of every real face."""
    rows = Manifest.read(prepared_dir, extra=())
    angles = np.linspace(0, 6 * np.pi, 68)
    points = 32 + np.linspace(4, 22, 68)[:, None] * np.column_stack([np.cos(angles), np.sin(angles)])
    marks = [points.astype(np.float32).ravel() if label == 0 else None for label in rows.table["label"]]
    folder = tmp_path_factory.mktemp("marked")
    Manifest(rows.table.assign(path=rows.paths(), landmarks=marks), folder).write()
    return folder


#: Videos per split and class of the generated anti-spoofing sets: (train real, train attack, test of each).
ANTISPOOF_SETS = {"msu": (4, 6, 4), "casia": (5, 5, 3), "replay": (9, 4, 3), "oulu": (4, 4, 3), "celeb": (12, 15, 0)}


def make_antispoof(folder: Path, *, size: int = 48, seed: int = 0) -> Path:
    """Prepared folders ``<folder>/<set>`` of generated videos with two frames each; attacks have a blue middle."""
    rng = np.random.default_rng(seed)
    for name, (reals, attacks, tests) in ANTISPOOF_SETS.items():
        (folder / name / "images").mkdir(parents=True)
        rows = []
        for split, label, count in (
            ("train", 0, reals), ("train", 1, attacks), ("test", 0, tests), ("test", 1, tests)
        ):  # fmt: skip
            for number in range(count):
                video = f"{split}_{'attack' if label else 'real'}_{number}"
                noise = Image.fromarray(rng.integers(60, 200, (4, 4, 3), dtype=np.uint8))
                pixels = np.array(noise.resize((size, size), Image.Resampling.BICUBIC))
                if label:
                    pixels[size // 4 : -size // 4, size // 4 : -size // 4, 2] = 255
                for frame in (6, 50):
                    path = f"images/{video}_frame_{frame}.png"
                    Image.fromarray(np.clip(pixels + frame // 10, 0, 255).astype(np.uint8)).save(folder / name / path)
                    rows.append(
                        {
                            "path": path, "label": label, "split": split, "dataset": name, "video": video,
                            "method": "print" if label else "real", "subject": "", "frame": frame,
                        }
                    )  # fmt: skip
        Manifest(pd.DataFrame(rows[::-1]), folder / name).write()
    return folder


@pytest.fixture(scope="session")
def antispoof_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared anti-spoofing sets msu, casia, replay, oulu and celeb, small and of unequal sizes, in ``fas``."""
    root = tmp_path_factory.mktemp("antispoof")
    make_antispoof(root / "fas")
    return root


@pytest.fixture
def compose_config(tmp_path: Path) -> Callable[..., DictConfig]:
    """Compose a shipped configuration: ``compose_config("train", "experiment=demo_pretrain", …)``."""

    def compose(name: str, *overrides: str) -> DictConfig:
        with initialize_config_module("fsvfm.configs", version_base="1.3"):
            run = [f"paths.run={tmp_path / 'run'}", f"paths.runs={tmp_path}"]
            named = [] if any(text.startswith("name=") for text in overrides) else ["name=test"]
            return hydra_compose(name, overrides=[*overrides, *run, *named])

    return compose
