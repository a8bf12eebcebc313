"""Training on real faces alone: pairs in one batch, the same after a resume, no forgery read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fsvfm.data.manifest import Manifest
from fsvfm.data.self_blended import PairSampler, SelfBlendedData
from fsvfm.errors import ConfigError, DataError

AUGMENT = {"crop_scale": [0.5, 1.0], "flip": 0.5, "rand_augment": None, "saturation": None}


def data(folder: Path, **changes: Any) -> SelfBlendedData:
    options: dict[str, Any] = {"image_size": 48, "batch_size": 6, "workers": 0, "augment": AUGMENT, "seed": 3}
    return SelfBlendedData([str(folder)], **{**options, **changes})


def test_every_face_comes_with_its_self_blend(marked_dir: Path) -> None:
    module = data(marked_dir, augment={**AUGMENT, "crop_scale": None})
    rows = module.train_rows
    assert (rows.faces, len(rows)) == (16, 32)
    assert set(module.train.table["label"]) == {0}
    alike = []
    for batch in module.train_dataloader():
        reals, fakes = batch["image"].float().chunk(2)
        assert batch["label"].tolist() == [0] * 3 + [1] * 3
        assert (batch["index"][3:] - batch["index"][:3]).tolist() == [16] * 3
        assert batch["video"][:3].tolist() == batch["video"][3:].tolist()
        # Outside the face, where the mask is 0, both are flipped and coloured alike; coding differs a little.
        alike += [(real - fake)[:, :4, :4].abs().mean().item() for real, fake in zip(reals, fakes, strict=True)]
        assert all((real != fake).any() for real, fake in zip(reals, fakes, strict=True))
    assert len(alike) == 15  # five batches of three; the sixteenth face waits for another epoch
    assert max(alike) < 6


def test_an_epoch_resumed_is_the_same(marked_dir: Path) -> None:
    whole = list(data(marked_dir).train_dataloader())
    module = data(marked_dir)
    module.load_state_dict({"epoch": 0, "batches": 3})
    for one, other in zip(whole[3:], module.train_dataloader(), strict=True):
        assert torch.equal(one["image"], other["image"])
    module.load_state_dict({"epoch": 1, "batches": 0})
    assert not torch.equal(whole[0]["image"], next(iter(module.train_dataloader()))["image"])


def test_processes_share_the_faces() -> None:
    samplers = [PairSampler(20, 4, seed=1, rank=rank, world_size=2) for rank in (0, 1)]
    draws = [draw for sampler in samplers for batch in sampler for draw in batch]
    assert [len(sampler) for sampler in samplers] == [5, 5]
    assert sorted(draw.row for draw in draws) == list(range(40))
    seeds = {draw.row: draw.seed for draw in draws}
    assert all(seeds[row] == seeds[row + 20] for row in range(20))
    assert len({seeds[row] for row in range(20)}) == 20


def test_validation_is_the_same_every_time_and_without_forgeries(marked_dir: Path) -> None:
    module = data(marked_dir)
    first, second = ([*module.val_dataloader()] for _ in range(2))
    images = torch.cat([batch["image"] for batch in first])
    assert torch.equal(images, torch.cat([batch["image"] for batch in second]))
    assert torch.cat([batch["label"] for batch in first]).tolist() == [0] * 4 + [1] * 4
    assert not hasattr(module, "val")  # nothing to calibrate on


def test_what_is_missing_is_told(marked_dir: Path, prepared_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"16 of 16 real faces .* have no landmarks"):
        data(prepared_dir)
    rows = Manifest.read(marked_dir, extra=["landmarks"])
    marks = rows.table["landmarks"].to_list()
    marks[int(np.flatnonzero(rows.table["label"] == 0)[2])] = None
    Manifest(rows.table.assign(landmarks=marks), tmp_path).write()
    with pytest.raises(DataError, match=r"1 of 16 real faces"):
        data(tmp_path)
    with pytest.raises(ConfigError, match="must be even"):
        data(marked_dir, batch_size=5).train_dataloader()
