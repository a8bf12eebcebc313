from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fsvfm import losses
from fsvfm.errors import ConfigError

DOUBLE = {"rtol": 1e-5, "atol": 1e-6}


def features(rows: int, seed: int, dim: int = 6) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


# --- reconstruction ---------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(batch=st.integers(1, 3), patch=st.integers(2, 5), seed=st.integers(0, 999))
def test_patch_targets_have_zero_mean_and_unit_unbiased_variance(batch: int, patch: int, seed: int) -> None:
    images = torch.randn(batch, 3, 2 * patch, 2 * patch, generator=torch.Generator().manual_seed(seed))
    target = losses.patch_targets(images, patch)
    assert target.shape == (batch, 4, 3 * patch**2)
    torch.testing.assert_close(target.mean(-1), torch.zeros(batch, 4), **DOUBLE)
    torch.testing.assert_close(target.var(-1), torch.ones(batch, 4), rtol=1e-3, atol=1e-3)


def test_raw_targets_are_the_pixels() -> None:
    image = torch.arange(48, dtype=torch.float32).reshape(1, 3, 4, 4)
    target = losses.patch_targets(image, 2, normalize=False)
    assert target[0, 1].tolist() == [2, 18, 34, 3, 19, 35, 6, 22, 38, 7, 23, 39]


def test_a_flat_patch_stays_finite() -> None:
    assert losses.patch_targets(torch.full((1, 3, 8, 8), 0.7), 4).abs().max() < 1e-3


def test_reconstruction_is_the_mean_over_masked_patches_of_the_batch() -> None:
    prediction, target = features(2 * 4, 0).reshape(2, 4, 6), features(2 * 4, 1).reshape(2, 4, 6)
    masked = torch.tensor([[True, False, False, False], [True, True, True, False]])
    errors = [
        sum((prediction[b, p, c] - target[b, p, c]).item() ** 2 for c in range(6)) / 6
        for b, p in masked.nonzero().tolist()
    ]
    # Every patch counts the same, however many its image has.
    assert losses.reconstruction_loss(prediction, target, masked).item() == pytest.approx(sum(errors) / 4, rel=1e-5)


def test_patches_outside_the_mask_have_no_influence() -> None:
    prediction, target = features(4, 0)[None].requires_grad_(), features(4, 1)[None]
    masked = torch.tensor([[True, False, True, False]])
    losses.reconstruction_loss(prediction, target, masked).backward()
    assert prediction.grad[masked].all()
    assert not prediction.grad[~masked].any()


def test_an_empty_region_gives_zero_and_no_gradient() -> None:
    prediction = features(4, 0)[None].requires_grad_()
    loss = losses.reconstruction_loss(prediction, features(4, 1)[None], torch.zeros(1, 4, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(prediction.grad, torch.zeros_like(prediction))


def test_half_precision_predictions_are_compared_in_float32() -> None:
    prediction, target = 300 * torch.ones(1, 4, 6), torch.zeros(1, 4, 6)
    loss = losses.reconstruction_loss(prediction.half(), target, torch.ones(1, 4, dtype=torch.bool))
    assert loss.dtype == torch.float32
    assert loss.item() == 90000  # beyond float16


# --- similarity: independent references, sample by sample ------------------------------------------------------------


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a @ b) / (a.norm() * b.norm()))


def reference_infonce(a: Tensor, b: Tensor, t: float, negatives: str) -> float:
    total = 0.0
    for i in range(len(a)):
        logits = [cosine(a[i], b[j]) / t if negatives == "all" or i == j else 0.0 for j in range(len(b))]
        total += math.log(sum(map(math.exp, logits))) - logits[i]
    return 2 * t * total / len(a)


def reference_contrast(x: Tensor, positive: Callable[[int, int], bool], t: float, base: float) -> float:
    total = 0.0
    for i in range(len(x)):
        others = [j for j in range(len(x)) if j != i]
        denominator = sum(math.exp((cosine(x[i], x[j]) - 1) / t) for j in others) + 1e-6
        terms = [(cosine(x[i], x[j]) - 1) / t - math.log(denominator) for j in others if positive(i, j)]
        total -= sum(terms) / len(terms) if terms else 0.0
    return t / base * total / len(x)


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 6), seed=st.integers(0, 999), temperature=st.floats(0.05, 2.0))
def test_similarity_losses_by_their_definitions(rows: int, seed: int, temperature: float) -> None:
    a, b = features(rows, seed).double(), features(rows, seed + 1000).double()
    mean = sum(cosine(a[i], b[i]) for i in range(rows)) / rows
    t = temperature
    expected = {
        ("simsiam",): -0.5 * mean,
        ("byol",): 2 - 2 * mean,
        ("infonce", "all"): reference_infonce(a, b, t, "all"),
        ("infonce", "positive"): reference_infonce(a, b, t, "positive"),
        ("mocov3", None): reference_infonce(a, b, t, "all"),
        ("simclr", None): reference_contrast(torch.cat([a, b]), lambda i, j: (i - j) % rows == 0, t, 0.07),
    }
    for (name, *extra), value in expected.items():
        options = {"temperature": t} if extra else {}
        if extra and extra[0]:
            options["negatives"] = extra[0]
        actual = losses.SIMILARITY[name](a, b, **options)
        assert actual.item() == pytest.approx(value, rel=1e-4, abs=1e-5), (name, extra)


@pytest.mark.parametrize("name", sorted(losses.SIMILARITY))
def test_similarity_losses_ignore_length_and_prefer_agreement(name: str) -> None:
    a, b = features(8, 0), features(8, 1)
    loss = losses.SIMILARITY[name]
    torch.testing.assert_close(loss(3.0 * a, 0.2 * b), loss(a, b), **DOUBLE)
    assert loss(a, a) < loss(a, b)
    online = a.clone().requires_grad_()
    loss(online, b).backward()
    assert torch.isfinite(online.grad).all()


def test_unknown_values_are_named() -> None:
    with pytest.raises(ConfigError, match="hard"):
        losses.infonce(features(2, 0), features(2, 1), negatives="hard")
    for name in ("infonce", "mocov3", "simclr"):
        with pytest.raises(ConfigError, match="temperature"):
            losses.SIMILARITY[name](features(2, 0), features(2, 1), temperature=0.0)


# --- contrast over labels -------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(labels=st.lists(st.integers(0, 2), min_size=2, max_size=8), seed=st.integers(0, 999))
def test_label_contrast_by_its_definition(labels: list[int], seed: int) -> None:
    x, y = features(len(labels), seed), torch.tensor(labels)
    expected = reference_contrast(x, lambda i, j: labels[i] == labels[j], 0.5, 0.2)
    actual = losses.supcon(x, y, temperature=0.5, base_temperature=0.2)
    assert actual.item() == pytest.approx(expected, rel=1e-3, abs=1e-5)
    for real in range(3):
        expected = reference_contrast(x, lambda i, j, r=real: labels[i] == labels[j] == r, 0.5, 0.2)
        expected = expected if real in labels else 1e-6
        actual = losses.real_anchor_contrastive(x, y, real, 0.5, 0.2)
        assert actual.item() == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_fakes_are_not_attracted_to_fakes() -> None:
    real, one, two = torch.tensor([1.0, 0, 0, 0]), torch.tensor([0, 1.0, 0, 0]), torch.tensor([0, 0, 1.0, 0])
    y = torch.tensor([0, 0, 1, 1])
    apart = losses.real_anchor_contrastive(torch.stack([real, real, one, two]), y, 0, 0.5)
    together = losses.real_anchor_contrastive(torch.stack([real, real, one, one]), y, 0, 0.5)
    torch.testing.assert_close(apart, together)
    near = losses.real_anchor_contrastive(torch.stack([real, real, real + one, two]), y, 0, 0.5)
    assert near > apart


@pytest.mark.parametrize(("labels", "value"), [([1, 1, 1], 1e-6), ([0, 1, 1], 0.0)])
def test_batches_without_real_pairs_have_a_constant_loss(labels: list[int], value: float) -> None:
    x = features(3, 0).requires_grad_()
    loss = losses.real_anchor_contrastive(x, torch.tensor(labels), 0)
    loss.backward()
    assert loss.item() == pytest.approx(value, rel=1e-6)
    assert torch.equal(x.grad, torch.zeros_like(x))


# --- several processes -----------------------------------------------------------------------------------------------

WORKER = """
import sys
import torch
import torch.distributed as dist
from fsvfm.losses import SIMILARITY, gather_features

rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
data = torch.load(sys.argv[4])
rows = slice(rank * 3, rank * 3 + 3)
assert torch.equal(gather_features(data["x"]), torch.cat([data["x"], data["x"]]))
results = {}
for name, loss in SIMILARITY.items():
    weight = data["weight"].clone().requires_grad_()
    value = loss(data["x"][rows] @ weight, data["y"][rows])
    value.backward()
    dist.all_reduce(weight.grad)
    results[name] = weight.grad / 2  # as DistributedDataParallel averages
torch.save(results, out)
"""


def test_two_processes_get_the_gradient_of_the_joint_batch(tmp_path: Path) -> None:
    data = {"x": features(6, 0), "y": features(6, 1), "weight": features(6, 2)}
    torch.save(data, tmp_path / "data.pt")
    outputs = [tmp_path / f"{rank}.pt" for rank in range(2)]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(tmp_path / "store"), str(output), str(tmp_path / "data.pt")]
        )
        for rank, output in enumerate(outputs)
    ]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    for output in outputs:
        gradients = torch.load(output)
        for name, loss in losses.SIMILARITY.items():
            weight = data["weight"].clone().requires_grad_()
            loss(data["x"] @ weight, data["y"]).backward()
            torch.testing.assert_close(gradients[name], weight.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_gathering_in_one_process_is_the_identity() -> None:
    x = features(3, 0)
    assert losses.gather_features(x) is x


def test_losses_do_not_normalise_in_place() -> None:
    a, b = features(4, 0), features(4, 1)
    before = a.clone(), b.clone()
    for loss in losses.SIMILARITY.values():
        loss(a, b)
    assert torch.equal(a, before[0])
    assert torch.equal(b, before[1])
    assert not torch.allclose(F.normalize(a, dim=1), a)
