"""CRFR-P against masks recorded from the published implementation: regions exactly, frequencies statistically.

Three views of the same draws catch different faults. Each patch's frequency shows *which* patches are masked. The
number masked inside each region, which the method all but fixes, is a thousand times sharper: it shows a wrong share,
rounding, order of regions or repair. The sum of all squared deviations shows small faults spread over many patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from fsvfm.masking import crfr_p
from fsvfm.regions import COVERABLE, REGION_BIT, REGIONS, region_grid

RECORDED_NAME = {name: "face_boundary" if name == "boundary" else name for name in REGIONS}

DRAWS = 6000  # of ours, for each map and covered region

# Limits in standard errors, for the largest of thousands of comparisons and recorded numbers as random as ours: chance
# exceeds six of them once in 5·10⁸.
Z_PATCH = Z_REGION = Z_TOTAL = 6.0


@dataclass(frozen=True)
class Comparison:
    """Ours and the recorded ones for one covered region: frequencies are (maps, L)."""

    covered: int
    patches: np.ndarray  # (maps, L, regions) bool: who belongs where, recorded
    masked: np.ndarray
    region: np.ndarray
    recorded_masked: np.ndarray
    recorded_region: np.ndarray
    recorded_draws: int
    group: np.ndarray  # (maps, L): region a patch counts for, the covered one first and then in order
    group_mean: np.ndarray  # (maps, regions): how many patches of the group ours mask on average
    group_variance: np.ndarray
    budget: int
    only_budget: bool
    region_inside: bool


@pytest.fixture(scope="module")
def recorded(golden_dir: Path) -> dict[str, np.ndarray]:
    path = golden_dir / "crfrp_masking.npz"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def grid(recorded: dict[str, np.ndarray]) -> np.ndarray:
    maps = recorded["parsing_map"]
    patches = recorded["region_patches/skin"].shape[1]
    return region_grid(maps, round((maps.shape[1] * maps.shape[2] / patches) ** 0.5))


@pytest.fixture(scope="module")
def recorded_draws(recorded: dict[str, np.ndarray]) -> int:
    """The number of recorded draws: the smallest of which every frequency is a whole multiple."""
    frequencies = np.unique(np.concatenate([v.ravel() for k, v in recorded.items() if "mask_frequency/" in k]))
    for draws in range(1, 100_001):
        counts = frequencies.astype(np.float64) * draws
        if np.abs(counts - np.round(counts)).max() < 0.02:
            return draws
    raise AssertionError("the recorded frequencies are not multiples of one number of draws")


@pytest.fixture(scope="module", params=COVERABLE)
def comparison(
    request: pytest.FixtureRequest, recorded: dict[str, np.ndarray], grid: np.ndarray, recorded_draws: int
) -> Comparison:
    covered = request.param
    patches = np.stack([recorded[f"region_patches/{RECORDED_NAME[name]}"] for name in REGIONS], axis=-1).astype(bool)
    recorded_masked = recorded[f"mask_frequency/{RECORDED_NAME[covered]}"].astype(np.float64)
    budgets = np.unique(np.round(recorded_masked.sum(axis=1), 2))
    assert len(budgets) == 1, f"recorded draws mask different numbers of patches: {budgets}"
    budget = round(float(budgets[0]))
    assert budgets[0] == pytest.approx(budget, abs=0.02)

    group = np.full(patches.shape[:2], -1)
    for name in (covered, *(name for name in REGIONS if name != covered)):
        group[(group < 0) & patches[..., REGION_BIT[name]]] = REGION_BIT[name]
    assert (group >= 0).all()

    generator = torch.Generator().manual_seed(20 + REGION_BIT[covered])
    chunk = 500
    batch = torch.from_numpy(grid).repeat(chunk, 1)
    which = torch.full((len(batch),), REGION_BIT[covered])
    in_group = torch.nn.functional.one_hot(torch.from_numpy(group), len(REGIONS)).double()
    masked, region = torch.zeros(grid.shape).double(), torch.zeros(grid.shape).double()
    counts = []
    only_budget = region_inside = True
    for _ in range(DRAWS // chunk):
        drawn = crfr_p(batch, budget, covered=which, generator=generator)
        only_budget &= bool((drawn.masked.sum(dim=1) == budget).all())
        region_inside &= not bool((drawn.region & ~drawn.masked).any())
        by_map = drawn.masked.double().view(chunk, *grid.shape)
        masked += by_map.sum(dim=0)
        region += drawn.region.double().view(chunk, *grid.shape).sum(dim=0)
        counts.append(torch.einsum("cml,mlg->cmg", by_map, in_group))
    inside = torch.cat(counts)
    return Comparison(
        covered=REGION_BIT[covered],
        patches=patches,
        masked=(masked / DRAWS).numpy(),
        region=(region / DRAWS).numpy(),
        recorded_masked=recorded_masked,
        recorded_region=recorded[f"region_mask_frequency/{RECORDED_NAME[covered]}"].astype(np.float64),
        recorded_draws=recorded_draws,
        group=group,
        group_mean=inside.mean(dim=0).numpy(),
        group_variance=inside.var(dim=0).numpy(),
        budget=budget,
        only_budget=only_budget,
        region_inside=region_inside,
    )


def standard_error(ours: np.ndarray, recorded: np.ndarray, recorded_draws: int) -> np.ndarray:
    """Of the difference of two frequencies of the same event."""
    pooled = (ours * DRAWS + recorded * recorded_draws) / (DRAWS + recorded_draws)
    return np.sqrt(pooled * (1 - pooled) * (1 / DRAWS + 1 / recorded_draws))


@pytest.mark.parametrize("region", REGIONS)
def test_region_membership_is_exact(region: str, grid: np.ndarray, recorded: dict[str, np.ndarray]) -> None:
    ours = grid >> REGION_BIT[region] & 1
    np.testing.assert_array_equal(ours, recorded[f"region_patches/{RECORDED_NAME[region]}"])


def test_every_draw_masks_the_recorded_budget_and_its_region(comparison: Comparison) -> None:
    assert comparison.only_budget
    assert comparison.region_inside


def test_every_patch_is_masked_as_often(comparison: Comparison) -> None:
    c = comparison
    error = standard_error(c.masked, c.recorded_masked, c.recorded_draws)
    # One draw more or less is no news, and patches that are always or never masked have no error at all.
    limit = Z_PATCH * error + 2 / c.recorded_draws
    certain = (c.recorded_masked == 0) | (c.recorded_masked == 1)
    limit[certain & (error == 0)] = 1e-6
    np.testing.assert_array_less(np.abs(c.masked - c.recorded_masked), limit)


def test_every_patch_is_in_the_region_mask_as_often(comparison: Comparison) -> None:
    c = comparison
    error = standard_error(c.region, c.recorded_region, c.recorded_draws)
    np.testing.assert_array_less(np.abs(c.region - c.recorded_region), Z_PATCH * error + 1e-6)
    # A region that fits the budget is covered whole, with nothing random about it.
    inside = c.patches[..., c.covered]
    fits = inside.sum(axis=1) <= c.budget
    np.testing.assert_array_equal(c.recorded_region[fits], inside[fits])
    np.testing.assert_array_equal(c.region[fits], inside[fits])


def test_every_region_has_as_many_patches_masked(comparison: Comparison) -> None:
    c = comparison
    for region, name in enumerate(REGIONS):
        recorded_mean = (c.recorded_masked * (c.group == region)).sum(axis=1)
        error = np.sqrt(c.group_variance[:, region] * (1 / DRAWS + 1 / c.recorded_draws))
        # Without repair the number is the same in every draw; with it, events rare enough to be counted on one hand
        # are allowed that much.
        limit = np.where(error > 0, Z_REGION * error + 3 / c.recorded_draws, 1e-4)
        difference = np.abs(c.group_mean[:, region] - recorded_mean)
        np.testing.assert_array_less(difference, limit, err_msg=f"patches that count for {name}")


def test_all_deviations_together_are_what_chance_makes_them(comparison: Comparison) -> None:
    c = comparison
    error = standard_error(c.masked, c.recorded_masked, c.recorded_draws)
    enough = error**2 * c.recorded_draws**2 > 5  # rarer events are far from normal
    total = (((c.masked - c.recorded_masked)[enough] / error[enough]) ** 2).sum()
    degrees = int(enough.sum())
    # The patches of a group share a quota: their deviations cancel, which for k of them makes the variance of the sum
    # of squares 2k · k / (k − 1) in place of 2k.
    same_group = (c.group[:, :, None] == c.group[:, None, :]) & enough[:, None, :]
    k = same_group.sum(axis=2)[enough]
    variance = (2 * k / np.maximum(k - 1, 1)).sum()
    assert abs(total - degrees) < Z_TOTAL * variance**0.5
