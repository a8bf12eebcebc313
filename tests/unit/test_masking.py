"""Masking strategies: exact budgets, who may be masked, how often, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fsvfm.errors import MaskingError
from fsvfm.masking import COVERING, DRAWS, STRATEGIES, Masker, Masks, crfr_p, crfr_r, fasking_i, mask_budget
from fsvfm.regions import COVERABLE, REGION_BIT, REGIONS, region_grid

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "masking"
COMPONENTS = ("eyebrows", "eyes", "nose", "mouth", "hair")

# How far a frequency may be from its probability, in standard errors. The seeds are fixed: nothing is left to chance.
Z = 5.0


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bits(*names: str) -> int:
    return sum(1 << REGION_BIT[name] for name in names)


def grid_of(*parts: tuple[int, int]) -> torch.Tensor:
    """(1, L) grid from runs of (how many patches, which bits)."""
    return torch.tensor([[value for count, value in parts for _ in range(count)]], dtype=torch.uint8)


def has(grid: torch.Tensor, region: str) -> torch.Tensor:
    return (grid & bits(region)) != 0


#: A face of 64 patches whose regions overlap as real ones do.
FACE = grid_of(
    (3, bits("eyebrows", "skin")),
    (2, bits("eyebrows", "eyes", "skin")),
    (3, bits("eyes", "skin")),
    (1, bits("eyes", "nose", "skin")),
    (3, bits("nose", "skin")),
    (4, bits("mouth", "skin")),
    (9, bits("boundary", "hair", "skin")),
    (8, bits("boundary", "skin", "background")),
    (9, bits("hair")),
    (5, bits("hair", "background")),
    (7, bits("skin")),
    (10, bits("background")),
)


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, int, int]:
    """A batch of arbitrary grids (any byte is possible, few kinds of bytes are common), a budget and a seed."""
    batch, patches = draw(st.integers(1, 4)), draw(st.integers(2, 50))
    palette = draw(st.lists(st.integers(0, 255), min_size=1, max_size=6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    grid = torch.from_numpy(rng.choice(np.array(palette, dtype=np.uint8), size=(batch, patches)))
    return grid, draw(st.integers(1, patches - 1)), draw(st.integers(0, 2**32 - 1))


def spec_quotas(row: np.ndarray, budget: int, covered: int | None) -> tuple[dict[int, np.ndarray], dict[int, int]]:
    """Patches of each group and its quota before repair, from one row of bits, as the method is told step by step."""
    groups: dict[int, np.ndarray] = {}
    quotas: dict[int, int] = {}
    free = np.ones(len(row), dtype=bool)
    inside = 0
    if covered is not None:
        groups[covered] = (row >> covered & 1).astype(bool)
        free &= ~groups[covered]
        inside = int(groups[covered].sum())
        quotas[covered] = min(inside, budget)
    p = (budget - inside) / (len(row) - inside) if inside < budget else 0.0
    for region in range(len(REGIONS)):
        if region != covered:
            groups[region] = (row >> region & 1).astype(bool) & free
            free &= ~groups[region]
            quotas[region] = round(p * int(groups[region].sum()))
    groups[len(REGIONS)] = free  # patches of no region count as one more
    quotas[len(REGIONS)] = round(p * int(free.sum()))
    return groups, quotas


def spec_probability(row: np.ndarray, budget: int, covered: int | None) -> np.ndarray:
    """Exact probability that each patch is masked by CRFR-P with this region covered (or by FRP)."""
    groups, quotas = spec_quotas(row, budget, covered)
    total = sum(quotas.values())
    missing = budget - total
    removable = total - (quotas[covered] if covered is not None else 0)
    probability = np.zeros(len(row))
    for group, patches in groups.items():
        if not patches.any():
            continue
        masked = quotas[group] / int(patches.sum())
        if missing > 0:
            masked += (1 - masked) * missing / (len(row) - total)
        elif missing < 0 and group != covered:
            masked *= 1 + missing / removable
        probability[patches] = masked
    return probability


def frequency(
    strategy: str, row: torch.Tensor, budget: int, draws: int = 20_000, **options: object
) -> tuple[np.ndarray, int]:
    masks = STRATEGIES[strategy](row.expand(draws, -1), budget, generator=seeded(11), **options)
    return masks.masked.double().mean(dim=0).numpy(), draws


def assert_frequency(observed: np.ndarray, expected: np.ndarray, draws: int) -> None:
    tolerance = Z * np.sqrt(expected * (1 - expected) / draws) + 1e-9
    np.testing.assert_array_less(np.abs(observed - expected), tolerance)


# --- always true ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(max_examples=80, deadline=None)
@given(case=cases(), draw=st.sampled_from(DRAWS))
def test_masks_exactly_the_budget_and_the_region_is_part_of_it(
    strategy: str, case: tuple[torch.Tensor, int, int], draw: str
) -> None:
    grid, budget, seed = case
    before = grid.clone()
    options = {"draw": draw} if strategy in COVERING else {}
    masks = STRATEGIES[strategy](grid, budget, generator=seeded(seed), **options)
    assert isinstance(masks, Masks)
    for mask in masks:
        assert mask.dtype == torch.bool
        assert mask.shape == grid.shape
    assert masks.masked.sum(dim=1).tolist() == [budget] * len(grid)
    assert not (masks.region & ~masks.masked).any()
    assert torch.equal(grid, before)
    if strategy not in COVERING:
        assert not masks.region.any()
    again = STRATEGIES[strategy](grid, budget, generator=seeded(seed), **options)
    assert torch.equal(masks.masked, again.masked)
    assert torch.equal(masks.region, again.region)


@pytest.mark.parametrize("strategy", sorted(COVERING))
@settings(max_examples=80, deadline=None)
@given(case=cases(), data=st.data())
def test_covers_the_given_region_whole_or_as_far_as_the_budget_goes(
    strategy: str, case: tuple[torch.Tensor, int, int], data: st.DataObject
) -> None:
    grid, budget, seed = case
    covered = torch.tensor(data.draw(st.lists(st.integers(0, 5), min_size=len(grid), max_size=len(grid))))
    masks = STRATEGIES[strategy](grid, budget, covered=covered, generator=seeded(seed))
    for row, region, masked, which in zip(grid, masks.region, masks.masked, covered.tolist(), strict=True):
        patches = has(row, COVERABLE[which])
        if int(patches.sum()) <= budget:
            assert torch.equal(region, patches)
        else:
            assert not (region & ~patches).any()
            assert torch.equal(region, masked)


def assert_quotas_but_for_repair(grid: torch.Tensor, budget: int, covered: int | None, seed: int) -> None:
    if covered is None:
        masked = STRATEGIES["frp"](grid, budget, generator=seeded(seed)).masked
    else:
        masked = crfr_p(grid, budget, covered=torch.full((len(grid),), covered), generator=seeded(seed)).masked
    for row, mask in zip(grid.numpy(), masked.numpy(), strict=True):
        groups, quotas = spec_quotas(row, budget, covered)
        missing = budget - sum(quotas.values())
        change = [int((mask & groups[group]).sum()) - quotas[group] for group in groups]
        assert sum(change) == missing
        assert sum(abs(step) for step in change) == abs(missing)  # never masked here to be unmasked there
        if covered is not None and missing < 0:
            assert change[0] == 0  # the covered group comes first


@settings(max_examples=150, deadline=None)
@given(case=cases(), covered=st.none() | st.integers(0, 5))
def test_every_region_gets_its_quota_but_for_the_repair(
    case: tuple[torch.Tensor, int, int], covered: int | None
) -> None:
    grid, budget, seed = case
    assert_quotas_but_for_repair(grid, budget, covered, seed)


@pytest.mark.parametrize("covered", [None, *range(len(COVERABLE))])
def test_regions_are_walked_in_order(covered: int | None) -> None:
    # Every pair of regions meets in some patches, so any other order counts some of them elsewhere.
    pairs = [(2 + first, 1 << first | 1 << second) for first in range(8) for second in range(first, 8)]
    grid = grid_of(*pairs)
    for budget in range(1, grid.shape[1], 9):
        assert_quotas_but_for_repair(grid, budget, covered, seed=budget)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_uses_only_the_given_generator(strategy: str) -> None:
    state = torch.get_rng_state()
    STRATEGIES[strategy](FACE.expand(8, -1), 40, generator=seeded(3))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    first = STRATEGIES[strategy](FACE.expand(8, -1), 40)
    torch.manual_seed(5)
    assert torch.equal(first.masked, STRATEGIES[strategy](FACE.expand(8, -1), 40).masked)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_images_of_a_batch_are_masked_differently(strategy: str) -> None:
    masked = STRATEGIES[strategy](FACE.expand(32, -1), 40, generator=seeded(3)).masked
    assert len(masked.unique(dim=0)) > 16


@pytest.mark.parametrize("patches", [16, 144, 196, 256, 576])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_other_sizes(strategy: str, patches: int) -> None:
    grid = torch.randint(1, 256, (3, patches), dtype=torch.uint8, generator=seeded(0))
    masks = Masker(strategy)(grid, generator=seeded(1))
    assert masks.masked.sum(dim=1).tolist() == [int(0.75 * patches)] * 3


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_grid_that_is_not_contiguous_and_an_empty_batch(strategy: str) -> None:
    grid = torch.randint(1, 256, (40, 6), dtype=torch.uint8, generator=seeded(0)).t()
    masked = STRATEGIES[strategy](grid, 30, generator=seeded(1)).masked
    assert torch.equal(masked, STRATEGIES[strategy](grid.contiguous(), 30, generator=seeded(1)).masked)
    assert STRATEGIES[strategy](FACE[:0], 30).masked.shape == (0, 64)


# --- probabilities ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [7, 31, 48, 60])
@pytest.mark.parametrize("covered", range(len(COVERABLE)))
def test_crfr_p_masks_each_patch_with_the_probability_of_the_method(covered: int, budget: int) -> None:
    observed, draws = frequency("crfr_p", FACE, budget, covered=torch.full((20_000,), covered))
    assert_frequency(observed, spec_probability(FACE[0].numpy(), budget, covered), draws)


@pytest.mark.parametrize("budget", [7, 31, 48, 60])
def test_frp_masks_each_patch_with_the_probability_of_the_method(budget: int) -> None:
    observed, draws = frequency("frp", FACE, budget)
    assert_frequency(observed, spec_probability(FACE[0].numpy(), budget, None), draws)


@pytest.mark.parametrize(("budget", "missing"), [(31, 3), (35, -3)])
def test_repair_chooses_uniformly_among_all_candidates(budget: int, missing: int) -> None:
    # Seven groups of 2 patches and the background of 30. The small ones ask for 1.4 each and round down, or for 1.6 and
    # round up; the background rounds by little. How many of the three repairs fall on it is hypergeometric.
    grid = grid_of(*((2, 1 << region) for region in range(7)), (30, bits("background")))
    _, quotas = spec_quotas(grid[0].numpy(), budget, None)
    assert budget - sum(quotas.values()) == missing
    in_background, everywhere = (30 - quotas[7], 44 - budget + 3) if missing > 0 else (quotas[7], budget + 3)
    share = in_background / everywhere
    mean, variance = 3 * share, 3 * share * (1 - share) * (everywhere - 3) / (everywhere - 1)

    draws = 20_000
    masked = STRATEGIES["frp"](grid.expand(draws, -1), budget, generator=seeded(2)).masked
    repaired = (masked[:, 14:].sum(dim=1) - quotas[7]).abs().double()
    assert float(repaired.mean()) == pytest.approx(mean, abs=Z * (variance / draws) ** 0.5)
    assert float(repaired.var()) == pytest.approx(variance, rel=0.05)


@pytest.mark.parametrize("budget", [4, 12])
def test_repair_reaches_the_budget_when_every_region_rounds_the_same_way(budget: int) -> None:
    # Eight regions of two patches ask for half a patch each and get none, or for one and a half and get two.
    grid = grid_of(*((2, 1 << region) for region in range(8))).expand(200, -1)
    masked = STRATEGIES["frp"](grid, budget, generator=seeded(2)).masked
    assert masked.sum(dim=1).tolist() == [budget] * 200


def test_random_is_uniform_whatever_the_face() -> None:
    observed, draws = frequency("random", FACE, 37)
    assert_frequency(observed, np.full(64, 37 / 64), draws)


def test_crfr_r_masks_the_rest_uniformly() -> None:
    observed, draws = frequency("crfr_r", FACE, 40, covered=torch.full((20_000,), REGION_BIT["nose"]))
    nose = has(FACE, "nose")[0].numpy()
    assert_frequency(observed, np.where(nose, 1.0, (40 - nose.sum()) / (64 - nose.sum())), draws)


@pytest.mark.parametrize("budget", [20, 39, 48])
def test_fasking_i_masks_components_before_anything_else(budget: int) -> None:
    observed, draws = frequency("fasking_i", FACE, budget)
    component = ((FACE & bits(*COMPONENTS)) != 0)[0].numpy()
    inside = int(component.sum())
    assert inside == 39
    expected = np.where(component, min(1, budget / inside), max(0, budget - inside) / (64 - inside))
    assert_frequency(observed, expected, draws)


@pytest.mark.parametrize("strategy", sorted(COVERING))
def test_a_region_as_large_as_the_budget_is_masked_uniformly_and_alone(strategy: str) -> None:
    grid = grid_of((20, bits("hair")), (10, bits("hair", "background")), (10, bits("background")))
    hair = has(grid, "hair")
    covered = torch.full((20_000,), REGION_BIT["hair"])
    for budget in (12, 29, 30):
        masks = STRATEGIES[strategy](grid.expand(20_000, -1), budget, covered=covered, generator=seeded(4))
        assert torch.equal(masks.masked, masks.region)
        expected = np.where(hair[0].numpy(), budget / 30, 0.0)
        assert_frequency(masks.masked.double().mean(dim=0).numpy(), expected, 20_000)
    masks = STRATEGIES[strategy](grid.expand(50, -1), 31, covered=covered[:50], generator=seeded(4))
    assert torch.equal(masks.region, hair.expand(50, -1))
    assert (masks.masked & ~hair).sum(dim=1).tolist() == [1] * 50


# --- which region is covered ------------------------------------------------------------------------------------------


def which_region(grid: torch.Tensor, region: torch.Tensor) -> list[str | None]:
    """Name of the covered region of each image, for grids whose regions differ and fit the budget."""
    names = []
    for row, covered in zip(grid, region, strict=True):
        names.append(next((name for name in COVERABLE if covered.any() and torch.equal(has(row, name), covered)), None))
    return names


@pytest.mark.parametrize("strategy", sorted(COVERING))
def test_per_image_draw_is_uniform_over_the_regions_present(strategy: str) -> None:
    no_nose_no_hair = FACE & ~bits("nose", "hair") & 0xFF
    draws = 3000
    grid = torch.cat([FACE, no_nose_no_hair]).repeat_interleave(draws, dim=0)
    region = STRATEGIES[strategy](grid, 48, generator=seeded(7)).region
    for start, present in ((0, COVERABLE), (draws, ("eyebrows", "eyes", "mouth", "boundary"))):
        names = which_region(grid[start : start + draws], region[start : start + draws])
        assert set(names) == set(present)
        share = 1 / len(present)
        for name in present:
            assert names.count(name) / draws == pytest.approx(share, abs=Z * (share * (1 - share) / draws) ** 0.5)


@pytest.mark.parametrize("strategy", sorted(COVERING))
def test_per_batch_draw_is_one_region_for_all_and_uniform_over_the_six(strategy: str) -> None:
    no_nose = FACE & ~bits("nose") & 0xFF
    grid = torch.cat([FACE, no_nose, FACE])
    generator = seeded(9)
    draws = 1500
    seen = []
    for _ in range(draws):
        region = STRATEGIES[strategy](grid, 48, draw="batch", generator=generator).region
        first, second, third = which_region(grid, region)
        assert first == third
        assert second == (None if first == "nose" else first)  # an absent region covers nothing
        seen.append(first)
    assert set(seen) == set(COVERABLE)
    for name in COVERABLE:
        assert seen.count(name) / draws == pytest.approx(1 / 6, abs=Z * (5 / 36 / draws) ** 0.5)


def test_an_absent_region_covers_nothing_and_the_rest_is_proportional() -> None:
    no_nose = FACE & ~bits("nose") & 0xFF
    observed, draws = frequency("crfr_p", no_nose, 45, covered=torch.full((20_000,), REGION_BIT["nose"]))
    assert_frequency(observed, spec_probability(no_nose[0].numpy(), 45, REGION_BIT["nose"]), draws)
    assert not crfr_p(no_nose, 45, covered=torch.tensor([REGION_BIT["nose"]])).region.any()


@pytest.mark.parametrize("strategy", sorted(COVERING))
def test_nothing_to_cover_means_random_masking(strategy: str) -> None:
    # Skin beside background with no patch of both, in groups that proportional masking would keep apart.
    grid = grid_of((10, bits("skin")), (30, bits("background")))
    draws = 20_000
    masks = STRATEGIES[strategy](grid.expand(draws, -1), 25, generator=seeded(1))
    assert not masks.region.any()
    assert_frequency(masks.masked.double().mean(dim=0).numpy(), np.full(40, 25 / 40), draws)
    skin = masks.masked[:, :10].double().sum(dim=1)
    hypergeometric = 25 * 0.25 * 0.75 * 15 / 39
    assert float(skin.var()) == pytest.approx(hypergeometric, rel=0.06)


def test_a_covered_image_beside_one_with_nothing_to_cover() -> None:
    grid = torch.cat([FACE, torch.zeros_like(FACE), grid_of((64, bits("skin")))])
    masks = crfr_p(grid, 48, generator=seeded(1))
    assert masks.region.any(dim=1).tolist() == [True, False, False]
    assert masks.masked.sum(dim=1).tolist() == [48, 48, 48]


@pytest.mark.parametrize("label", range(11))
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_parse_of_one_label_only(strategy: str, label: int) -> None:
    grid = torch.from_numpy(region_grid(np.full((2, 64, 64), label), 16))
    for draw in DRAWS:
        masks = Masker(strategy, 0.75, draw)(grid, generator=seeded(label))
        assert masks.masked.sum(dim=1).tolist() == [12, 12]
        if strategy in COVERING and draw == "image":
            assert masks.region.sum(dim=1).tolist() == [12 if label >= 2 else 0] * 2


# --- no waiting for the device ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_never_looks_at_values_on_the_device(strategy: str) -> None:
    # Tensors of the meta device have no values: whatever wants one, as .item() or boolean indexing do, raises.
    grid = torch.zeros(4, 196, dtype=torch.uint8, device="meta")
    every: list[dict[str, object]] = [{}]
    if strategy in COVERING:
        every = [{"draw": draw} for draw in DRAWS] + [{"covered": torch.zeros(4, dtype=torch.int64, device="meta")}]
    for options in every:
        masks = STRATEGIES[strategy](grid, 147, **options)
        assert masks.masked.shape == masks.region.shape == (4, 196)
        assert masks.masked.device.type == masks.region.device.type == "meta"


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_masks_on_the_gpu_without_synchronising(strategy: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    grid = FACE.expand(64, -1).contiguous().cuda()
    generator = torch.Generator("cuda").manual_seed(1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        masks = [Masker(strategy, 0.75, draw)(grid, generator=generator) for draw in DRAWS]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for masked, region in masks:
        assert masked.device == grid.device
        assert masked.sum(dim=1).tolist() == [48] * 64
        assert not (region & ~masked).any()


# --- settings and refusals --------------------------------------------------------------------------------------------


def test_mask_budget_is_the_whole_part() -> None:
    assert mask_budget(196, 0.75) == 147
    assert mask_budget(256, 0.75) == 192
    assert mask_budget(10, 0.19) == 1
    assert mask_budget(2, 0.99) == 1


@pytest.mark.parametrize("ratio", [0, 1, 1.0, -0.2, 1.5, float("nan"), float("inf"), True, None, "0.75"])
def test_a_ratio_out_of_range_is_refused(ratio: object) -> None:
    with pytest.raises(MaskingError, match="mask ratio"):
        mask_budget(196, ratio)
    with pytest.raises(MaskingError, match="mask ratio"):
        Masker(ratio=ratio)


def test_a_ratio_that_masks_nothing_says_so_with_numbers() -> None:
    with pytest.raises(MaskingError, match=r"0\.05 of 16 patches masks 0 and leaves nothing masked"):
        Masker(ratio=0.05)(torch.zeros(1, 16, dtype=torch.uint8))
    with pytest.raises(MaskingError, match="of 1 patches"):
        mask_budget(1, 0.75)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bad_grids_budgets_and_generators_are_refused(strategy: str) -> None:
    mask = STRATEGIES[strategy]
    for grid in (FACE.int(), FACE.float(), FACE[0], FACE[None]):
        with pytest.raises(MaskingError, match="region grid must be"):
            mask(grid, 3)
        with pytest.raises(MaskingError, match="region grid must be"):
            Masker(strategy)(grid)
    for budget in (0, -1, 64, 65, 10.0, True):
        with pytest.raises(MaskingError, match="of 64 patches; expected a whole number from 1 to 63"):
            mask(FACE, budget)
    with pytest.raises(MaskingError, match="generator is on cpu"):
        mask(FACE.to("meta"), 3, generator=seeded(0))


@pytest.mark.parametrize("mask", [crfr_r, crfr_p])
def test_bad_covered_regions_and_draws_are_refused(mask: Callable[..., Masks]) -> None:
    pair = FACE.expand(2, -1)
    for covered in (torch.zeros(3, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2)):
        with pytest.raises(MaskingError, match=r"covered must be \(2,\) torch.int64"):
            mask(pair, 40, covered=covered)
    for value in (-1, 6, 7, 8):
        with pytest.raises(MaskingError, match="5 hair"):
            mask(pair, 40, covered=torch.tensor([0, value]))
    with pytest.raises(MaskingError, match="unknown draw 'images'; did you mean 'image'"):
        mask(pair, 40, draw="images")


def test_masker_refuses_unknown_names_and_suggests_near_ones() -> None:
    with pytest.raises(MaskingError, match="unknown masking strategy 'CRFR-P'; did you mean 'crfr_p'"):
        Masker("CRFR-P")
    with pytest.raises(MaskingError, match="choose one of random, fasking_i, frp, crfr_r, crfr_p"):
        Masker("zzz")
    with pytest.raises(MaskingError, match="unknown draw 'bach'; did you mean 'batch'"):
        Masker("random", draw="bach")


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_masker_is_its_strategy_with_the_settings(strategy: str, draw: str) -> None:
    grid = FACE.expand(6, -1)
    options = {"draw": draw} if strategy in COVERING else {}
    expected = STRATEGIES[strategy](grid, 38, generator=seeded(2), **options)
    masks = Masker(strategy, ratio=0.6, draw=draw)(grid, generator=seeded(2))
    assert torch.equal(masks.masked, expected.masked)
    assert torch.equal(masks.region, expected.region)


def test_masker_describes_itself() -> None:
    assert Masker().describe() == "crfr_p, 75 % masked, region drawn per image"
    assert Masker("crfr_r", 0.9, "batch").describe() == "crfr_r, 90 % masked, region drawn per batch"
    assert Masker("fasking_i", 0.5).describe() == "fasking_i, 50 % masked"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_has_a_config_that_builds_it(strategy: str) -> None:
    values = yaml.safe_load((CONFIGS / f"{strategy}.yaml").read_text(encoding="utf-8"))
    assert values == {"strategy": strategy, "ratio": 0.75, "draw": "image"}
    assert Masker(**values)(FACE).masked.sum() == 48


def test_there_is_no_config_without_a_strategy() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(STRATEGIES)


def test_fasking_i_fills_from_anywhere_else_when_there_is_no_component() -> None:
    grid = grid_of((8, bits("skin")), (8, bits("background")))
    assert fasking_i(grid, 12, generator=seeded(0)).masked.sum() == 12
