"""What a preparation would do, told before anything is opened or written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from fsvfm.data.manifest import SPLITS
from fsvfm.errors import DataError

if TYPE_CHECKING:
    from fsvfm.recipes.engine import Catalogue

# A PNG of a face takes about 1.3 bytes per pixel; crops that keep their own size are about this many pixels wide.
_BYTES_PER_PIXEL, _OWN_SIZE = 1.3, 300


class Plan(NamedTuple):
    """What a catalogue holds.

    Attributes:
        name: of the data set.
        counts: files, videos, subjects and wanted images per split, class and method; images are -1 where all frames of
            a video are wanted.
        skipped: left out at discovery, by reason.
        warnings: of the catalogue.
        gigabytes: a rough estimate of the result; 0 where the number of images is not known.
    """

    name: str
    counts: pd.DataFrame
    skipped: dict[str, int]
    warnings: Sequence[str]
    gigabytes: float

    def text(self) -> str:
        """The plan for people."""
        shown = self.counts.assign(images=self.counts["images"].astype(object).where(self.counts["images"] >= 0, "all"))
        lines = [f"{self.name}: {self.counts['files'].sum():,} files", shown.to_string(index=False)]
        if self.skipped:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.skipped.items())
            lines.append(f"left out: {sum(self.skipped.values()):,} ({reasons})")
        lines += [f"warning: {text}" for text in self.warnings]
        if self.gigabytes:
            lines.append(f"about {self.gigabytes:,.3f} GB on the disk (a rough estimate)")
        return "\n".join(lines)


def make_plan(catalogue: Catalogue, settings: dict[str, Any]) -> Plan:
    """Count a catalogue.

    Args:
        catalogue: to count.
        settings: of the preparation; `size` decides the estimate of the disk space.

    Raises:
        DataError: two entries have one name, so that one's images would replace the other's.
    """
    groups: dict[tuple[str, int, str], list[Any]] = {}
    names: set[str] = set()
    for entry in catalogue.entries:
        if entry.name in names:
            raise DataError(
                f"{catalogue.name}: two files would be saved under the name {entry.name}, one of them {entry.file}; "
                "this is a fault of the recipe"
            )
        names.add(entry.name)
        group = groups.setdefault((entry.split, entry.label, entry.method), [0, 0, set(), set()])
        group[0] += 1
        group[1] = -1 if entry.frames == 0 or group[1] < 0 else group[1] + entry.frames
        group[2].add(entry.video)
        group[3].update(entry.subject.split("+") if entry.subject else ())
    place = {split: number for number, split in enumerate(SPLITS)}
    ordered = sorted(groups.items(), key=lambda group: (place.get(group[0][0], len(place)), *group[0]))
    counts = pd.DataFrame(
        [
            {
                "split": split or "(later)",  # dealt out when it is known who has a face
                "class": "fake" if label else "real",
                "method": method,
                "files": files,
                "videos": len(videos),
                "subjects": len(subjects),
                "images": images,
            }
            for (split, label, method), (files, images, videos, subjects) in ordered
        ],
        columns=["split", "class", "method", "files", "videos", "subjects", "images"],
    )
    images = int(counts["images"].sum()) if (counts["images"] >= 0).all() else 0
    gigabytes = images * (settings.get("size") or _OWN_SIZE) ** 2 * _BYTES_PER_PIXEL / 1e9
    skipped = Counter(reason for _, reason in catalogue.skipped)
    return Plan(catalogue.name, counts, dict(skipped.most_common()), catalogue.warnings, gigabytes)
