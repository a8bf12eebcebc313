"""Facial masking on batches of region grids: random, Fasking-I, FRP, CRFR-R and CRFR-P (FSFM, sec. 3.2; FS-VFM).

Every strategy takes ``grid``, (B, L) uint8 with bit ``r`` set where a patch belongs to ``REGIONS[r]`` (see
:mod:`fsvfm.regions`), and masks exactly ``budget`` patches in every image. It runs on the grid's device, treats the
whole batch at once and never makes the host wait for the device.

All of them rest on one picture. Each patch goes to one *group* and gets a random key; one sort by (group, key) then
shuffles the patches inside every group at once. What remains is to say how many to take from the front:

* random, Fasking-I and CRFR-R take the first ``budget`` of the whole row, whose groups are priorities;
* FRP and CRFR-P take a *quota* from the front of every group, whose groups are facial regions.

Random numbers come from the given ``torch.Generator`` only (the device's default one if it is ``None``), so the same
seed on the same kind of device gives the same masks.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fsvfm.errors import MaskingError
from fsvfm.regions import COVERABLE, REGION_BIT, REGIONS

#: Group of a patch that belongs to no region, and the "covered region" of an image that has none to cover.
NO_REGION = len(REGIONS)
_GROUPS = len(REGIONS) + 1

# Sort keys are int64, the group above 56 random bits: two patches practically never share a key.
_RANDOM_BITS = 56

# Rounding moves each quota by at most half a patch and the unrounded quotas add up to the budget, so at most this many
# patches are ever too many or too few.
_MAX_REPAIRS = _GROUPS // 2

_FACIAL_COMPONENTS = sum(1 << REGION_BIT[name] for name in ("eyebrows", "eyes", "nose", "mouth", "hair"))


class Masks(NamedTuple):
    """What a strategy returns.

    Attributes:
        masked: (B, L) bool, exactly ``budget`` ones per row.
        region: (B, L) bool, a subset of ``masked``: the covered region of each image, all False where none is covered.
    """

    masked: Tensor
    region: Tensor


def random_masking(grid: Tensor, budget: int, *, generator: torch.Generator | None = None) -> Masks:
    """Mask uniformly, whatever the face (MAE).

    Args:
        grid: (B, L) uint8 region grid; only its shape and device matter here.
        budget: patches to mask in every image, 0 < budget < L.
        generator: source of randomness, on the grid's device.

    Returns:
        Masks whose region is empty.

    Raises:
        MaskingError: a malformed grid, a budget out of range, a generator of another device.
    """
    _check(grid, budget, generator)
    masked = _mask_first(torch.zeros_like(grid), budget, generator)
    return Masks(masked, torch.zeros_like(masked))


def fasking_i(grid: Tensor, budget: int, *, generator: torch.Generator | None = None) -> Masks:
    """Mask facial components first, then skin and background (MARLIN's tube masking for images; FSFM, ablations).

    Components are eyebrows, eyes, nose, mouth and hair. The choice is uniform among them where they exceed the budget,
    and uniform among the other patches where they do not fill it.

    Args, returns and raises: as :func:`random_masking`.
    """
    _check(grid, budget, generator)
    elsewhere = (grid & _FACIAL_COMPONENTS) == 0
    masked = _mask_first(elsewhere, budget, generator)
    return Masks(masked, torch.zeros_like(masked))


def frp(grid: Tensor, budget: int, *, generator: torch.Generator | None = None) -> Masks:
    """Mask every facial region in proportion to its size (FSFM, sec. 3.2, FRP).

    As :func:`crfr_p` with nothing covered: p = budget / L for all eight regions.

    Args, returns and raises: as :func:`random_masking`.
    """
    _check(grid, budget, generator)
    shuffled = _shuffle(_first_region(grid), generator)
    is_covered = torch.zeros_like(shuffled.size, dtype=torch.bool)
    masked = _mask_quotas(shuffled, _proportional_quotas(shuffled.size, is_covered, budget, generator))
    return Masks(masked, torch.zeros_like(masked))


def crfr_r(
    grid: Tensor,
    budget: int,
    *,
    covered: Tensor | None = None,
    draw: str = "image",
    generator: torch.Generator | None = None,
) -> Masks:
    """Cover one facial region, mask the rest uniformly (FSFM, sec. 3.2, CRFR-R).

    Args, returns and raises: as :func:`crfr_p`.
    """
    _check(grid, budget, generator)
    in_covered = _belongs(grid, _covered_region(grid, covered, draw, generator))
    masked = _mask_first(~in_covered, budget, generator)
    return Masks(masked, masked & in_covered)


def crfr_p(
    grid: Tensor,
    budget: int,
    *,
    covered: Tensor | None = None,
    draw: str = "image",
    generator: torch.Generator | None = None,
) -> Masks:
    """Cover one facial region, mask the rest in proportion (FSFM, sec. 3.2, CRFR-P).

    The covered region is masked whole. The other seven regions, in the order of ``REGIONS``, each take their patches
    that no earlier one took and mask ``round(p · count)`` of them (half to even), p = (budget − covered) / (L −
    covered); what rounding leaves missing or superfluous is repaired with uniformly chosen patches. A covered region
    that fills the budget alone has ``budget`` of its patches masked, and nothing else is. Patches of no region, which
    no parsing map produces, count as a ninth region.

    Args:
        grid: (B, L) uint8, bit r set where a pixel of the patch belongs to region r.
        budget: patches to mask in every image, 0 < budget < L.
        covered: (B,) int64, the region to cover in each image as its index in ``COVERABLE``; None draws it. A region
            absent from an image covers nothing there, and everything is masked in proportion. Values are checked on
            the CPU only: looking at them on an accelerator would make the host wait.
        draw: "image" draws one region per image among those it contains, and masks at random where it contains none
            (paper). "batch" draws one of the six for the whole batch, present or not (published implementation).
        generator: source of randomness, on the grid's device.

    Returns:
        Masks(masked=(B, L) bool with exactly ``budget`` ones per row, region=(B, L) bool, a subset of ``masked``).

    Raises:
        MaskingError: a malformed grid, a budget out of range, a region that cannot be covered, an unknown draw, a
            generator of another device.
    """
    _check(grid, budget, generator)
    region = _covered_region(grid, covered, draw, generator)
    in_covered = _belongs(grid, region)
    group = torch.where(in_covered, region, _first_region(grid))
    # With nothing to cover, all patches form one group that is "covered" beyond the budget: that is random masking.
    group = torch.where(region == NO_REGION, NO_REGION, group)
    shuffled = _shuffle(group, generator)
    is_covered = torch.arange(_GROUPS, device=grid.device) == region
    masked = _mask_quotas(shuffled, _proportional_quotas(shuffled.size, is_covered, budget, generator))
    return Masks(masked, masked & in_covered)


#: Every masking strategy by its name in the configuration.
STRATEGIES: dict[str, Callable[..., Masks]] = {
    "random": random_masking,
    "fasking_i": fasking_i,
    "frp": frp,
    "crfr_r": crfr_r,
    "crfr_p": crfr_p,
}

#: Strategies that cover a region, so that the region loss exists and ``draw`` matters.
COVERING = frozenset({"crfr_r", "crfr_p"})

#: How the region to cover is drawn.
DRAWS = ("image", "batch")


def mask_budget(num_patches: int, ratio: float) -> int:
    """Number of patches to mask in every image, ``int(ratio · num_patches)``.

    Args:
        num_patches: patches of an image (L), at least 2.
        ratio: share of them to mask, 0 < ratio < 1.

    Raises:
        MaskingError: a ratio out of range, or one that leaves nothing visible or nothing masked.
    """
    _check_ratio(ratio)
    budget = int(ratio * num_patches)
    if not 0 < budget < num_patches:
        missing = "masked" if budget == 0 else "visible"
        raise MaskingError(
            f"mask ratio {ratio} of {num_patches} patches masks {budget} and leaves nothing {missing}; "
            "choose another ratio, a larger image or a smaller patch"
        )
    return budget


@dataclass(frozen=True)
class Masker:
    """A masking strategy with its settings, ready to be called on region grids.

    Attributes:
        strategy: a key of ``STRATEGIES``.
        ratio: share of patches to mask, 0 < ratio < 1.
        draw: "image" or "batch", see :func:`crfr_p`; without effect for strategies that cover no region.

    Raises:
        MaskingError: an unknown strategy or draw, a ratio out of range; when called, also a malformed grid or a ratio
            that leaves nothing visible or nothing masked of it.
    """

    strategy: str = "crfr_p"
    ratio: float = 0.75
    draw: str = "image"

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise MaskingError(_unknown("masking strategy", self.strategy, tuple(STRATEGIES)))
        _check_draw(self.draw)
        _check_ratio(self.ratio)

    def __call__(self, grid: Tensor, *, generator: torch.Generator | None = None) -> Masks:
        """Mask a batch: grid (B, L) uint8 to :class:`Masks`, with randomness from ``generator``."""
        _check_grid(grid)
        budget = mask_budget(grid.shape[1], self.ratio)
        options = {"draw": self.draw} if self.strategy in COVERING else {}
        return STRATEGIES[self.strategy](grid, budget, generator=generator, **options)

    def describe(self) -> str:
        """One line for the caption of a panel or a log, such as ``crfr_p, 75 % masked, region drawn per image``."""
        drawn = f", region drawn per {self.draw}" if self.strategy in COVERING else ""
        return f"{self.strategy}, {100 * self.ratio:g} % masked{drawn}"


# --- groups: where a patch counts -------------------------------------------------------------------------------------


def _first_region(grid: Tensor) -> Tensor:
    """(B, L) uint8: the first region in walking order that a patch belongs to, NO_REGION if none.

    Walking order is bit order, so this is the position of the lowest set bit: the number of prefixes without one.
    """
    first = torch.zeros_like(grid)
    for region in range(len(REGIONS)):
        up_to_region = (2 << region) - 1
        first += (grid & up_to_region) == 0
    return first


def _belongs(grid: Tensor, region: Tensor) -> Tensor:
    """(B, L) bool: patches of each image's region, (B, 1) int64; none where that is NO_REGION."""
    bit = torch.where(region == NO_REGION, 0, 1 << region).to(torch.uint8)
    return (grid & bit) != 0


def _covered_region(grid: Tensor, covered: Tensor | None, draw: str, generator: torch.Generator | None) -> Tensor:
    """(B, 1) int64: the region to cover in each image, NO_REGION if it has none."""
    _check_draw(draw)
    batch, device = grid.shape[0], grid.device
    if covered is not None:
        _check_covered(covered, grid)
        return covered.unsqueeze(1)
    if draw == "batch":
        return torch.randint(len(COVERABLE), (1, 1), generator=generator, device=device).expand(batch, 1)
    # The largest of random keys wins, and regions without a patch get a key that cannot.
    present = torch.stack([(grid & (1 << region)).amax(dim=1) != 0 for region in range(len(COVERABLE))], dim=1)
    key = torch.rand(present.shape, generator=generator, device=device).masked_fill(~present, -1)
    best, region = key.max(dim=1, keepdim=True)
    return torch.where(best < 0, NO_REGION, region)


# --- shuffling inside groups: the one sort ----------------------------------------------------------------------------


class _Shuffled(NamedTuple):
    """Patches of each image ordered by group and at random inside a group."""

    order: Tensor  # (B, L) int64, patch at each position
    group: Tensor  # (B, L) int64, group at each position, ascending
    start: Tensor  # (B, G) int64, first position of each group
    size: Tensor  # (B, G) int64, patches of each group


def _random_sort(group: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Sort patches by group, (B, L) of small integers, at random inside a group: sorted keys and order, both int64."""
    key = torch.randint(1 << _RANDOM_BITS, group.shape, generator=generator, device=group.device)
    key += group.to(torch.int64) << _RANDOM_BITS
    return torch.sort(key, dim=1)


def _shuffle(group: Tensor, generator: torch.Generator | None) -> _Shuffled:
    key, order = _random_sort(group, generator)
    # A group starts where its smallest possible key would be inserted.
    smallest_key = torch.arange(_GROUPS + 1, device=group.device) << _RANDOM_BITS
    bounds = torch.searchsorted(key, smallest_key.repeat(group.shape[0], 1))
    return _Shuffled(order, key >> _RANDOM_BITS, bounds[:, :-1], bounds.diff(dim=1))


def _mask_first(priority: Tensor, budget: int, generator: torch.Generator | None) -> Tensor:
    """(B, L) bool: ``budget`` patches of the lowest priority values, (B, L), uniform among equals."""
    _, order = _random_sort(priority, generator)
    masked = torch.zeros_like(priority, dtype=torch.bool)
    return masked.scatter_(1, order[:, :budget], True)


def _mask_quotas(shuffled: _Shuffled, quota: Tensor) -> Tensor:
    """(B, L) bool: the first ``quota`` (B, G) patches of each group."""
    end = (shuffled.start + quota).gather(1, shuffled.group)
    position = torch.arange(end.shape[1], device=end.device)
    return torch.empty_like(end, dtype=torch.bool).scatter_(1, shuffled.order, position < end)


# --- quotas: how many patches a group masks ---------------------------------------------------------------------------


def _proportional_quotas(size: Tensor, is_covered: Tensor, budget: int, generator: torch.Generator | None) -> Tensor:
    """Patches to mask in each group, adding up to ``budget`` in every image.

    Args:
        size: (B, G) int64, patches of each group.
        is_covered: (B, G) bool, at most one group per image: masked whole, as far as the budget allows.
        budget: patches to mask in every image.
        generator: source of randomness for the repair of rounding.

    Returns:
        (B, G) int64, 0 ≤ quota ≤ size.
    """
    patches = size.sum(dim=1, keepdim=True)
    covered = (size * is_covered).sum(dim=1, keepdim=True)
    # Two roundings in double precision, p and then p · size, so that ties fall as they do with Python's floats.
    # Apple's GPUs have no doubles.
    precision = torch.float32 if size.device.type == "mps" else torch.float64
    p = (budget - covered).clamp(min=0).to(precision) / (patches - covered).clamp(min=1)
    quota = torch.where(is_covered, covered.clamp(max=budget), torch.round(p * size).to(torch.int64))
    return _repair(quota, size, is_covered, budget, generator)


def _repair(quota: Tensor, size: Tensor, is_covered: Tensor, budget: int, generator: torch.Generator | None) -> Tensor:
    """Mask further patches, or unmask some outside the covered region, until every image masks exactly ``budget``.

    The patches are chosen uniformly. Those of one group are interchangeable, so choosing a patch means choosing its
    group with probability proportional to the candidates left in it, and moving that group's quota by one.
    """
    missing = budget - quota.sum(dim=1, keepdim=True)
    candidates = torch.where(missing > 0, size - quota, quota.masked_fill(is_covered, 0))
    tickets = torch.rand((quota.shape[0], _MAX_REPAIRS), generator=generator, device=quota.device)
    for step in range(_MAX_REPAIRS):
        upper = candidates.cumsum(dim=1)
        winner = tickets[:, step, None] * upper[:, -1:]
        chosen = (upper - candidates <= winner) & (winner < upper) & (missing.abs() > step)
        quota = quota + missing.sign() * chosen
        candidates = candidates - chosen.to(candidates.dtype)
    return quota


# --- checks: none of them looks at values on an accelerator -----------------------------------------------------------


def _check(grid: Tensor, budget: int, generator: torch.Generator | None) -> None:
    _check_grid(grid)
    patches = grid.shape[1]
    if isinstance(budget, bool) or not isinstance(budget, int) or not 0 < budget < patches:
        raise MaskingError(
            f"mask budget is {budget!r} of {patches} patches; expected a whole number from 1 to {patches - 1}, "
            "so that something is masked and something stays visible (see mask_budget)"
        )
    if generator is not None and generator.device.type != grid.device.type:
        raise MaskingError(
            f"the generator is on {generator.device} but the region grid on {grid.device}; "
            f"create it with torch.Generator({grid.device.type!r})"
        )


def _check_grid(grid: Tensor) -> None:
    if grid.dtype != torch.uint8 or grid.ndim != 2:
        raise MaskingError(
            f"a region grid must be (B, L) uint8, got {tuple(grid.shape)} {grid.dtype}; "
            "fsvfm.regions.region_grid makes one from parsing maps"
        )


def _check_covered(covered: Tensor, grid: Tensor) -> None:
    if covered.dtype != torch.int64 or covered.shape != grid.shape[:1] or covered.device != grid.device:
        raise MaskingError(
            f"covered must be ({grid.shape[0]},) torch.int64 on {grid.device}, one region per image, "
            f"got {tuple(covered.shape)} {covered.dtype} on {covered.device}"
        )
    if covered.device.type == "cpu" and ((covered < 0) | (covered >= len(COVERABLE))).any():
        allowed = ", ".join(f"{index} {name}" for index, name in enumerate(COVERABLE))
        raise MaskingError(f"covered holds {covered.unique().tolist()}; regions that can be covered are {allowed}")


def _check_ratio(ratio: float) -> None:
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio < 1:
        raise MaskingError(
            f"mask ratio is {ratio!r}; expected a number above 0, or nothing is masked, and below 1, or nothing stays "
            "visible (0.75 in the papers)"
        )


def _check_draw(draw: str) -> None:
    if draw not in DRAWS:
        raise MaskingError(_unknown("draw", draw, DRAWS) + " (one region per image, or one for the whole batch)")


def _unknown(what: str, value: object, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(str(value).lower().replace("-", "_"), known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"unknown {what} {value!r}; {hint}choose one of {', '.join(known)}"
