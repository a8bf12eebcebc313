"""CRFR-P one image at a time from its parsing map: the plain way, kept to measure the batch version against."""

from __future__ import annotations

import numpy as np

LABELS_OF = {
    "eyebrows": (2, 3),
    "eyes": (4, 5),
    "nose": (6,),
    "mouth": (7, 8, 9),
    "hair": (10,),
    "skin": (1,),
    "background": (0,),
}
WALK = ("eyebrows", "eyes", "nose", "mouth", "boundary", "hair", "skin", "background")


def region_patches(labels: np.ndarray, patch: int) -> dict[str, np.ndarray]:
    """Patches of each region, (L,) bool by name, of one (H, W) parsing map."""
    rows, columns = labels.shape[0] // patch, labels.shape[1] // patch
    found = {}
    for region, wanted in LABELS_OF.items():
        pixels = np.isin(labels, wanted)
        found[region] = pixels.reshape(rows, patch, columns, patch).any(axis=(1, 3)).ravel()
    found["boundary"] = found["skin"] & (found["hair"] | found["background"])
    return found


def crfr_p_loop(
    parsing_maps: np.ndarray, ratio: float, patch: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Mask (B, H, W) parsing maps image by image: masked and region, both (B, L) bool."""
    masks, regions = [], []
    for labels in parsing_maps:
        patches = region_patches(labels, patch)
        total = len(patches["skin"])
        budget = int(ratio * total)
        present = [name for name in WALK[:6] if patches[name].any()]
        masked = np.zeros(total, dtype=bool)
        region = np.zeros(total, dtype=bool)
        if not present:
            masked[rng.choice(total, budget, replace=False)] = True
            masks.append(masked)
            regions.append(region)
            continue
        covered = present[rng.integers(len(present))]
        inside = np.flatnonzero(patches[covered])
        if len(inside) >= budget:
            region[rng.choice(inside, budget, replace=False)] = True
            masks.append(region.copy())
            regions.append(region)
            continue
        region[inside] = True
        masked[inside] = True
        assigned = region.copy()
        share = (budget - len(inside)) / (total - len(inside))
        for name in WALK:
            if name == covered:
                continue
            own = np.flatnonzero(patches[name] & ~assigned)
            assigned[own] = True
            masked[rng.choice(own, round(share * len(own)), replace=False)] = True
        missing = budget - int(masked.sum())
        if missing > 0:
            masked[rng.choice(np.flatnonzero(~masked), missing, replace=False)] = True
        elif missing < 0:
            masked[rng.choice(np.flatnonzero(masked & ~region), -missing, replace=False)] = False
        masks.append(masked)
        regions.append(region)
    return np.stack(masks), np.stack(regions)
