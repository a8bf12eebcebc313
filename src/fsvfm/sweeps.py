"""The table of a sweep: runs that differ in seed, target and settings, as means and deviations over seeds, compared.

A multirun such as ``python -m fsvfm.train -m experiment=fas_vitb target=M,C,I,O seed=0,1,2,3,4`` leaves one run folder
per point. Runs that differ in nothing but seed, target and test set are one row; a row's number for a test set is the
mean over seeds with the sample standard deviation, and its overall mean is taken over test sets for each seed first,
then over seeds. What one row has and another lacks is named: nothing is averaged over fewer runs in silence.

Rows are compared with a reference row by a paired bootstrap, from the scores that the runs kept: in a replicate both
rows meet the same draw of the test set's videos or people and, where there are several seeds, of the seeds; each seed's
value is computed on its own and then averaged. With one seed, intervals and p say nothing about others.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from omegaconf import OmegaConf

from fsvfm.errors import DataError
from fsvfm.metrics import antispoof, forgery
from fsvfm.metrics.bootstrap import TestSamples, difference_p, paired_bootstrap, percentile_interval
from fsvfm.metrics.samples import video_scores
from fsvfm.report_figures import sweep_figure
from fsvfm.report_tables import (
    LOWER_IS_BETTER,
    PLAIN,
    PUBLISHED,
    Family,
    Row,
    Table,
    families,
    latex,
    markdown,
    metric_name,
    notes,
    published_row,
    related,
    write_text,
)
from fsvfm.runner import FAILED

#: Settings that never tell two rows apart: where a run lies, what it reports, what is tested.
_ASIDE = (
    "name", "run", "resume", "ckpt", "evaluate", "logger", "paths", "hydra", "protocol", "testsets", "objective",
    "ablation", "callbacks",
)  # fmt: skip
_ASIDE_KEYS = ("trainer.devices", "trainer.default_root_dir", "data.workers", "data.target", "data.prepare")
_CALLBACKS = "callbacks.ema."  # of the callbacks, this one is part of the method
_RESULTS = ("test/results.json", "evaluation/results.json")
_ABLATION = "ablation.reference."
_DIFFERENCE = ("difference", "difference_low", "difference_high", "p")


class Run(NamedTuple):
    """A run folder: its flattened settings and its summaries by test set; ``problem`` says why there are none.

    ``scores`` is the file with the score of every sample, and ``label`` the run's name in it.
    """

    folder: Path
    settings: dict[str, Any]
    summaries: dict[str, Mapping[str, Any]]
    published: list[Mapping[str, Any]]
    notes: list[str]
    problem: str = ""
    failed: bool = False
    scores: Path | None = None
    label: str = ""

    @property
    def name(self) -> str:
        """The experiment: the run's name without its overrides."""
        return str(self.settings.get("name", self.folder.name)).split("__")[0]

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.settings.get("seed", 0))

    @property
    def target(self) -> str:
        """The data set that training left out, or empty."""
        return str(self.settings.get("data.target") or "")

    @property
    def testsets(self) -> list[str]:
        """What it was or will be tested on."""
        planned = [key.split(".")[1] for key in self.settings if key.startswith("testsets.")]
        return list(dict.fromkeys([*planned, *self.summaries]))

    @property
    def reference(self) -> dict[str, Any]:
        """Settings of the row that its sweep compares with."""
        return {k.removeprefix(_ABLATION): v for k, v in self.settings.items() if k.startswith(_ABLATION)}


class Statistic(NamedTuple):
    """A mean over ``n`` seeds with their sample standard deviation, which a single seed has not."""

    mean: float
    std: float | None
    n: int


class Comparison(NamedTuple):
    """A row's value with its 95 % interval and, against the reference row, the difference, its interval and p.

    Fractions; over the ``seeds`` that both rows have. The reference row has no difference to itself.
    """

    value: float
    low: float
    high: float
    difference: float | None
    difference_low: float | None
    difference_high: float | None
    p: float | None
    seeds: list[int]


class SweepRow(NamedTuple):
    """Runs with the same settings (``key``) but for seed and target; ``cells`` maps seed and column to a run."""

    name: str
    key: dict[str, Any]
    cells: dict[tuple[int, str], tuple[Run, str]]

    @property
    def runs(self) -> list[Run]:
        """The run folders of the row."""
        return list({run.folder: run for run, _ in self.cells.values()}.values())

    def values(self, level: str, metric: str, column: str) -> dict[int, float]:
        """Seed → value of a test set."""
        found = {}
        for (seed, name), (run, testset) in sorted(self.cells.items()):
            cell = run.summaries.get(testset, {}).get(level, {}).get("metrics", {}).get(metric)
            if name == column and cell is not None and cell["value"] is not None:
                found[seed] = float(cell["value"])
        return found

    def means(self, level: str, metric: str, columns: Sequence[str]) -> dict[int, float]:
        """Seed → mean over test sets, for the seeds that have all of them."""
        by_column = [self.values(level, metric, column) for column in columns]
        whole = sorted(set.intersection(*map(set, by_column))) if by_column else []
        return {seed: float(np.mean([values[seed] for values in by_column])) for seed in whole}


class SweepTable(NamedTuple):
    """Rows that share protocol and metrics: what may be compared."""

    protocol: str
    family: Family
    by: list[str]
    seeds: list[int]
    columns: list[str]
    rows: list[SweepRow]
    published: list[Mapping[str, Any]]
    title: str = ""
    reference: int | None = None
    #: (level, metric, column or ``mean``) → one entry for each row, None where its runs kept no scores.
    compared: dict[tuple[str, str, str], list[Comparison | None]] = {}  # noqa: RUF012  (never changed)

    @property
    def overall(self) -> str:
        """The column by which rows are compared: the mean over test sets, or the only one."""
        return "mean" if len(self.columns) > 1 else self.columns[0]

    def missing(self, row: SweepRow) -> list[dict[str, Any]]:
        """What a row lacks of the table's seeds and test sets, and why."""
        found = []
        metric, level = self.family.headlines[0], self.family.headline_levels[0]
        for column in self.columns:
            values = row.values(level, metric, column)
            for seed in self.seeds:
                if seed not in values:
                    run, testset = row.cells.get((seed, column), (None, ""))
                    gap = run and (
                        run.problem or run.summaries.get(testset, {}).get("gap") or f"no {level}-level {metric}"
                    )
                    found.append({"seed": seed, "testset": column, "why": str(gap or "no run")})
        return found

    def statistics(self, row: SweepRow) -> Iterator[tuple[str, str, str, Statistic | None]]:
        """Level, metric, column (``mean`` over all, where there are several) and statistic, None for a gap."""
        for level in self.family.levels:
            for metric in self.family.metrics:
                for column in self.columns:
                    yield level, metric, column, statistic(row.values(level, metric, column))
                if len(self.columns) > 1 and metric not in PLAIN:
                    yield level, metric, "mean", statistic(row.means(level, metric, self.columns))


class Sweep(NamedTuple):
    """Tables of what was found; ``skipped`` names folders that are no part of them, and why."""

    folder: Path
    tables: list[SweepTable]
    skipped: list[tuple[str, str]]
    notes: list[str]


def statistic(values: Mapping[int, float]) -> Statistic | None:
    """Mean and sample standard deviation over seeds; None where there is no value."""
    numbers = list(values.values())
    if not numbers:
        return None
    return Statistic(
        float(np.mean(numbers)), float(np.std(numbers, ddof=1)) if len(numbers) > 1 else None, len(numbers)
    )


# ---------------------------------------------------------------- collecting


def collect(
    where: str | Path | Sequence[str | Path],
    *,
    by: Sequence[str] | str | None = None,
    reference: Mapping[str, Any] | None = None,
    replicates: int = 2000,
) -> Sweep:
    """Find the runs of a sweep and put them into rows.

    Args:
        where: a folder below which run folders lie, a run folder, a glob of either, or several of these.
        by: keys of the configuration that make the rows. None takes those that vary besides seed and target, without
            the ones that follow from others (the learning rate that comes with each model).
        reference: settings of the row that the others are compared with; None takes what the sweep's configuration
            says (``ablation.reference``), else the row with the best mean.
        replicates: of the paired bootstrap; 0 compares nothing.

    Returns:
        The sweep; one table per protocol and set of metrics.

    Raises:
        DataError: nothing was found, no run has results, a key of ``by`` does not exist, or two runs of one row have
            the same seed and test set.
    """
    places = [where] if isinstance(where, (str, Path)) else list(where)
    folders, skipped = _folders(places)
    runs = []
    for folder in folders:
        run = _read(folder)
        if run.testsets:
            runs.append(run)
        else:
            why = "it has no test sets (a pre-training)" if run.settings and not run.failed else run.problem
            skipped.append((str(folder), why))
    if not any(run.summaries for run in runs):
        listed = "\n".join(f"  {name}: {why}" for name, why in [*((str(r.folder), r.problem) for r in runs), *skipped])
        raise DataError(f"no run with results below {', '.join(map(str, places))}\n{listed}".rstrip())
    wanted = [by] if isinstance(by, str) else by
    tables = [
        _compare(_table(protocol, family, group, wanted), reference, replicates)
        for protocol, family, group in _comparable(runs, skipped)
    ]
    common = Path(os.path.commonpath([run.folder.parent for run in runs]))
    folder = Path(places[0]) if len(places) == 1 and Path(places[0]).is_dir() else common
    return Sweep(folder, tables, skipped, list(dict.fromkeys(note for run in runs for note in run.notes)))


def _folders(places: Sequence[str | Path]) -> tuple[list[Path], list[tuple[str, str]]]:
    """Run folders at or below places, and folders beside them that hold no run."""
    found: dict[Path, None] = {}
    skipped = []
    for place in places:
        matches = sorted(map(Path, glob.glob(str(Path(place).expanduser()), recursive=True)))  # noqa: PTH207
        if not any(path.is_dir() for path in matches):
            raise DataError(f"sweep={place}: there is no such folder; give a folder of run folders, or a glob of them")
        for path in filter(Path.is_dir, matches):
            files = sorted([*path.rglob("config.yaml"), *path.rglob(FAILED)])
            below = [file.parent for file in files if not _hidden(file.relative_to(path))]
            # What lies inside a run folder (its detector, a logger's files) is part of that run.
            below = list(dict.fromkeys(p for p in below if not set(p.parents) & set(below)))
            found |= dict.fromkeys(below)
            empty = [path] if not below else []
            if path not in below:
                empty += [p for p in sorted(path.iterdir()) if p.is_dir() and not _hidden(p.relative_to(path))]
            skipped += [
                (str(p), "it holds no config.yaml: no run that started")
                for p in empty
                if not any(p in (b, *b.parents) for b in below)
            ]
    return list(found), list(dict.fromkeys(skipped))


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, Mapping) or (not node and prefix):
        return {prefix: node}
    return {
        k: v for key, value in node.items() for k, v in _flat(value, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def _read(folder: Path) -> Run:
    """A run folder's settings and results."""
    failure = _failure(folder)
    try:
        there = (folder / "config.yaml").is_file()
        config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml")) if there else failure.get("config")
    except Exception as error:  # whatever YAML and OmegaConf raise: one broken run must not hide the others
        return Run(folder, {}, {}, [], [], f"config.yaml is unreadable ({type(error).__name__})")
    settings = _flat(config) if isinstance(config, Mapping) else {}
    file = next((folder / name for name in _RESULTS if (folder / name).is_file()), None)
    if file is None and failure:
        told = " ".join(str(failure.get("error")).split())
        return Run(folder, settings, {}, [], [], f"failed in {failure.get('step')}: {told[:300]}", failed=True)
    if file is None:
        return Run(folder, settings, {}, [], [], f"unfinished: there is no {' or '.join(_RESULTS)}")
    try:
        loaded = json.loads(file.read_text(encoding="utf-8"))
        by_run, made = dict(loaded["runs"]), dict(loaded.get("made") or {})
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Run(folder, settings, {}, [], [], f"{file.relative_to(folder)} is unreadable ({error})")
    name = settings.get("name")
    if name not in by_run and len(by_run) != 1:
        problem = f"{file.relative_to(folder)} is about {', '.join(by_run) or 'nothing'}, not about {name}"
        return Run(folder, settings, {}, [], [], problem)
    label = str(name) if name in by_run else next(iter(by_run))
    # A note begins with the run it is about; told once for the experiment, not once for every seed.
    experiment = str(name).split("__")[0]
    remarks = [experiment + note.removeprefix(label) if note.startswith(label) else note for note in notes(made)]
    published = list(made.get("published") or [])
    scores = file.with_name("predictions.parquet")
    return Run(folder, settings, dict(by_run[label]), published, remarks, scores=scores, label=label)


def _failure(folder: Path) -> dict[str, Any]:
    """What a failed run says about itself; empty without a failure."""
    try:
        return dict(json.loads((folder / FAILED).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _comparable(runs: Sequence[Run], skipped: list[tuple[str, str]]) -> Iterator[tuple[str, Family, list[Run]]]:
    """Runs of one protocol with the same metrics; an unfinished run goes with the finished ones of its task."""
    for protocol in dict.fromkeys(_protocol(run) for run in runs):
        group = [run for run in runs if _protocol(run) == protocol]
        finished = {str(run.folder): run.summaries for run in group if run.summaries}
        if not finished:
            skipped += [(str(run.folder), run.problem) for run in group]
            continue
        split = families(finished)
        task = {run.settings.get("task._target_"): f for f in split for run in group if str(run.folder) in f.results}
        for family in split:
            members = [
                run
                for run in group
                if str(run.folder) in family.results
                or (not run.summaries and task.get(run.settings.get("task._target_"), split[0]) is family)
            ]
            yield protocol, family, members


def _protocol(run: Run) -> str:
    return str(run.settings.get("protocol.name") or "")


# ---------------------------------------------------------------- rows


def _table(protocol: str, family: Family, runs: Sequence[Run], by: Sequence[str] | None) -> SweepTable:
    keys = _varying(runs) if by is None else list(by)
    known = {key for run in runs for key in run.settings}
    if unknown := [key for key in keys if key not in known]:
        varying = ", ".join(_candidates(runs)) or "nothing"
        raise DataError(f"by={unknown}: no run has such a setting; what varies is {varying}")
    targets: dict[str, set[str]] = {}
    for run in runs:
        for name in run.testsets:
            targets.setdefault(name, set()).add(run.target)
    rows: dict[str, SweepRow] = {}
    for run in runs:
        key = {name: run.settings.get(name) for name in keys}
        row = rows.setdefault(_text(key), SweepRow(run.name, key, {}))
        if run.name not in row.name.split(" + "):
            rows[_text(key)] = row = row._replace(name=f"{row.name} + {run.name}")
        for name in run.testsets:
            place = (run.seed, name if len(targets[name]) == 1 else f"{run.target}/{name}")
            if place in row.cells:
                other = row.cells[place][0]
                differ = [k for k in _candidates([run, other]) if not k.startswith("data.target")]
                raise DataError(
                    f"{other.folder} and {run.folder} both have seed {run.seed} and test set {place[1]} in one row; "
                    + (
                        f"they differ in {', '.join(differ[:8])}: name what matters in by=[…]"
                        if differ
                        else "leave one out"
                    )
                )
            row.cells[place] = (run, name)
    places = [place for row in rows.values() for place in row.cells]
    published = list({_text(p): p for run in runs for p in run.published}.values())
    # In the order of the published table, where there is one.
    columns = dict.fromkeys(name for p in published for name in p.get("values") or {}) | dict.fromkeys(
        c for _, c in places
    )
    return SweepTable(
        protocol,
        family,
        keys,
        sorted({seed for seed, _ in places}),
        [name for name in columns if any(name == column for _, column in places)],
        _in_order(list(rows.values())),
        published,
        _title(runs, family, protocol),
    )


def _in_order(rows: list[SweepRow]) -> list[SweepRow]:
    """Rows by their settings: numbers as numbers, then null, words as they came."""
    seen: dict[str, int] = {}

    def place(value: Any) -> tuple[int, float]:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return 0, float(value)
        return (1, 0.0) if value is None else (2, float(seen.setdefault(_text(value), len(seen))))

    return sorted(rows, key=lambda row: [place(value) for value in row.key.values()])


def _title(runs: Sequence[Run], family: Family, protocol: str) -> str:
    """The sweep's own title where all runs have the same, else the task; with the protocol."""
    titles = {run.settings.get("ablation.title") for run in runs}
    title = str(titles.pop() or "") if len(titles) == 1 else ""
    return f"{title or family.title}{f', protocol {protocol}' if protocol else ''}"


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _candidates(runs: Sequence[Run]) -> list[str]:
    """Settings that differ between runs and may tell rows apart, those a reader looks for first."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    found = [
        key
        for key in keys
        if (key.split(".")[0] not in _ASIDE or key.startswith(_CALLBACKS))
        and key not in _ASIDE_KEYS
        and key.split(".")[-1] != "seed"
        and len({_text(run.settings.get(key)) for run in runs}) > 1
    ]

    def order(key: str) -> tuple[bool, bool, int]:
        # Groups are repeated inside the task; names and strategies say what other settings follow from.
        return key.startswith("task."), key.split(".")[-1] not in ("name", "strategy"), list(keys).index(key)

    return sorted(found, key=order)


def _varying(runs: Sequence[Run]) -> list[str]:
    """The fewest leading candidates that tell all settings apart; data settings that follow the target do not count."""
    chosen: list[str] = []
    classes = 1
    for key in _candidates(runs):
        if key.startswith("data.") and _follows(runs, key, lambda run: run.target):
            continue
        found = len({_text([run.settings.get(k) for k in [*chosen, key]]) for run in runs})
        if found > classes:
            chosen, classes = [*chosen, key], found
    return chosen


def _follows(runs: Sequence[Run], key: str, cause: Any) -> bool:
    values: dict[Any, set[str]] = {}
    for run in runs:
        values.setdefault(cause(run), set()).add(_text(run.settings.get(key)))
    return len(values) > 1 and all(len(found) == 1 for found in values.values())


# ---------------------------------------------------------------- comparing


def _compare(table: SweepTable, wanted: Mapping[str, Any] | None, replicates: int) -> SweepTable:
    """The table with its reference row and every row's comparison with it, for the headline metrics."""
    row = _reference(table, wanted)
    table = table._replace(reference=row)
    if row is None or not replicates:
        return table
    cache: dict[Path, pd.DataFrame | None] = {}
    compared = {}
    for metric in table.family.headlines:
        for level in table.family.headline_levels:
            for column, found in _compare_metric(table, row, level, metric, replicates, cache).items():
                compared[level, metric, column] = found
    return table._replace(compared=compared)


def _reference(table: SweepTable, wanted: Mapping[str, Any] | None) -> int | None:
    """Index of the row with the wanted settings, else those that the sweep names, else of the best row with values."""
    level, metric = table.family.headline_levels[0], table.family.headlines[0]
    means = [statistic(row.means(level, metric, table.columns)) for row in table.rows]
    valued = [index for index, mean in enumerate(means) if mean is not None]
    wanted = dict(wanted) if wanted else None
    named = wanted or next((run.reference for row in table.rows for run in row.runs if run.reference), {})

    def matches(row: SweepRow) -> bool:
        return all(_text(row.runs[0].settings.get(key)) == _text(value) for key, value in named.items())

    chosen = [index for index in valued if named and matches(table.rows[index])]
    if wanted and not chosen:
        raise DataError(
            f"reference={wanted}: no row with results has these settings; there are "
            + ", ".join(_text(row.key) for row in table.rows)
        )
    sign = -1 if metric in LOWER_IS_BETTER else 1
    return max(chosen or valued, key=lambda index: sign * means[index].mean, default=None)  # type: ignore[union-attr]


def _compare_metric(
    table: SweepTable, reference: int, level: str, metric: str, replicates: int, cache: dict[Path, pd.DataFrame | None]
) -> dict[str, list[Comparison | None]]:
    """One metric's comparisons by column, ``mean`` included where there are several."""

    def value(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
        if "hter" in table.family.metrics:
            return antispoof.statistics(scores, labels, weights)[metric]
        return forgery.METRICS[metric](forgery.curve(scores, labels, weights))

    samples = {column: _samples(table, column, level, cache) for column in table.columns}
    usable = [column for column, found in samples.items() if found is not None]
    draws = paired_bootstrap(value, [samples[c] for c in usable], replicates=replicates)  # type: ignore[misc]
    # Row and seed → (1 + R,): the value, then those of the replicates.
    columns: dict[str, dict[tuple[int, int], np.ndarray]] = {column: {} for column in table.columns}
    for column, drawn in zip(usable, draws, strict=True):
        found = samples[column]
        for name, values in drawn.items():
            place = json.loads(name)
            point = value(found.scores[name], found.labels, None)  # type: ignore[union-attr]
            columns[column][place[0], place[1]] = np.concatenate([point, values])
    if len(table.columns) > 1 and metric not in PLAIN:
        whole = set.intersection(*(set(found) for found in columns.values()))
        columns["mean"] = {place: np.mean([columns[c][place] for c in table.columns], axis=0) for place in whole}
    return {
        column: [_comparison(found, index, reference) for index in range(len(table.rows))]
        for column, found in columns.items()
    }


def _comparison(values: Mapping[tuple[int, int], np.ndarray], row: int, reference: int) -> Comparison | None:
    """A row against the reference in one column, over the seeds that both have."""
    seeds = {index: {seed for r, seed in values if r == index} for index in (row, reference)}
    mine = sorted(seeds[row])
    if not mine:
        return None
    own = _over_seeds(np.stack([values[row, seed] for seed in mine]))
    low, high = percentile_interval(own[1:])
    shared = sorted(seeds[row] & seeds[reference])
    if row == reference or not shared:
        return Comparison(float(own[0]), float(low), float(high), None, None, None, None, mine)
    away = _over_seeds(np.stack([values[row, seed] - values[reference, seed] for seed in shared]))
    left, right = percentile_interval(away[1:])
    p = difference_p(away[1:])
    return Comparison(float(own[0]), float(low), float(high), float(away[0]), float(left), float(right), p, shared)


def _over_seeds(values: np.ndarray) -> np.ndarray:
    """(S, 1 + R) values of each seed to their means, (1 + R,): of the seeds as they are, then of seeds drawn again."""
    count, columns = values.shape
    drawn = np.random.default_rng(0).integers(count, size=(count, columns))
    drawn[:, 0] = np.arange(count)
    return values[drawn, np.arange(columns)].mean(axis=0)


def _samples(table: SweepTable, column: str, level: str, cache: dict[Path, pd.DataFrame | None]) -> TestSamples | None:
    """A test set's samples with the scores of every row and seed that scored exactly them; None without any."""
    labels = groups = first = None
    scores: dict[str, np.ndarray] = {}
    for index, row in enumerate(table.rows):
        for (seed, name), (run, testset) in sorted(row.cells.items()):
            part = _scores(run, testset, cache) if name == column else None
            if part is None:
                continue
            if first is None:
                first = part.index
            if not first.equals(part.index):  # other samples: no pairs
                continue
            dataset = part["dataset"].astype(str) + "/"
            over = (run.summaries[testset].get("interval") or {}).get("over", "video")
            owners = (dataset + part[over].astype(str)).to_numpy(dtype=str)
            values, known = part["score"].to_numpy(), part["label"].to_numpy()
            if level == "video":
                videos = (dataset + part["video"].astype(str)).to_numpy(dtype=str)
                ids, values, known = video_scores(values, videos, known)
                owners = pd.Series(owners).groupby(videos).first().loc[ids].to_numpy(dtype=str)
            labels, groups = known, owners
            scores[json.dumps([index, seed])] = values
    return TestSamples(labels, groups, scores) if labels is not None and groups is not None else None


def _scores(run: Run, testset: str, cache: dict[Path, pd.DataFrame | None]) -> pd.DataFrame | None:
    """The scores of a run on a test set, by path; None where they were not kept or cannot be read."""
    if run.scores is None or "gap" in run.summaries.get(testset, {"gap": ""}):
        return None
    if run.scores not in cache:
        try:
            cache[run.scores] = pd.read_parquet(run.scores)
        except (OSError, ValueError):
            cache[run.scores] = None
    table = cache[run.scores]
    if table is None or not {"run", "testset", "path", "dataset", "video", "subject", "label", "score"} <= set(table):
        return None
    part = table[(table["run"] == run.label) & (table["testset"] == testset)]
    return part.set_index("path").sort_index() if len(part) else None


# ---------------------------------------------------------------- writing


def text_tables(table: SweepTable) -> list[Table]:
    """The papers' table: one per headline metric and level, rows against test sets, published rows first."""
    lacking = [table.missing(row) for row in table.rows]
    averaged = len(table.columns) > 1
    heads = _short_keys(table.by)
    tables = []
    for metric in table.family.headlines:
        for level in table.family.headline_levels:
            beside = [p for p in related(table.published, [metric], table.columns) if p["level"] == level]
            rows = [published_row(entry, table.columns, averaged, blank=len(heads) + 1) for entry in beside]
            compared = table.compared.get((level, metric, table.overall), [])
            compared = compared if any(found and found.difference is not None for found in compared) else []
            rows = [row._replace(cells=[*row.cells, *[""] * (2 * bool(compared))]) for row in rows]
            for index, (row, missing) in enumerate(zip(table.rows, lacking, strict=True)):
                cells = {c: found for lv, m, c, found in table.statistics(row) if (lv, m) == (level, metric)}
                seeds = len({seed for column in table.columns for seed in row.values(level, metric, column)})
                words = [row.name + (" †" if missing else ""), *map(_word, row.key.values()), str(seeds)]
                matched = any(entry.get("experiment") == row.name for entry in beside)
                numbers = [_cell(found, seeds) for found in cells.values()]
                numbers += _against(compared[index], index == table.reference) if compared else []
                rows.append(Row([*words, *numbers], "matched" if matched else ""))
            head = ["run", *heads, "seeds", *table.columns, *(["mean"] if averaged and metric not in PLAIN else [])]
            head += ["Δ [95 %]", "p"] if compared else []
            tables.append(Table(f"{metric_name(metric)}, {level} level", head, rows, 1 + len(heads)))
    return tables


def _short_keys(keys: Sequence[str]) -> list[str]:
    """``model.name`` → ``model``; others by their last part where that is unambiguous."""
    short = [key.split(".")[0] if key.endswith((".name", ".strategy")) else key.split(".")[-1] for key in keys]
    return [name if short.count(name) == 1 else key for name, key in zip(short, keys, strict=True)]


def _word(value: Any) -> str:
    return "null" if value is None else str(value)


def _against(found: Comparison | None, reference: bool) -> list[str]:
    """Difference with its interval, in points, and p."""
    if reference:
        return ["reference", ""]
    if found is None or found.difference is None or found.p is None:
        return ["—", "—"]
    away = [100 * v for v in (found.difference, found.difference_low, found.difference_high) if v is not None]
    text = "{:+.2f} [{:+.2f}, {:+.2f}]".format(*away).replace("-", "−")
    return [text, "<0.001" if found.p < 0.001 else f"{found.p:.3f}"]


def _comparing(table: SweepTable) -> str:
    """How rows were compared, in words; empty where they were not."""
    if table.reference is None or not any(f and f.difference is not None for fs in table.compared.values() for f in fs):
        return ""
    row = table.rows[table.reference]
    named = ", ".join(f"{key} = {_word(value)}" for key, value in row.key.items()) or row.name
    what = "the mean over test sets" if table.overall == "mean" else table.overall
    return (
        f"Δ: difference in {what} from the reference ({named}), in points, with the 95 % interval and the two-sided p "
        "of a paired bootstrap over test videos or people and, where both rows have several, over seeds. With one seed "
        "it says nothing about other seeds, with two or three too little; p is not corrected for the number of rows."
    )


def _cell(found: Statistic | None, seeds: int) -> str:
    if found is None:
        return "—"
    text = f"{100 * found.mean:.2f}" + ("" if found.std is None else f" ± {100 * found.std:.2f}")
    return text if found.n == seeds else f"{text} (n={found.n})"


def _lacks(table: SweepTable) -> list[str]:
    """What rows lack, in words, one line per row."""
    lines = []
    for row in table.rows:
        lacking: dict[tuple[str, int], list[str]] = {}
        for gap in table.missing(row):
            lacking.setdefault((gap["why"], gap["seed"]), []).append(gap["testset"])
        seeds: dict[tuple[str, str], list[str]] = {}
        for (why, seed), names in lacking.items():
            where = "every test set" if names == table.columns else ", ".join(names)
            seeds.setdefault((where, why), []).append(str(seed))
        parts = [f"seed {', '.join(found)} on {where} ({why})" for (where, why), found in seeds.items()]
        if parts:
            label = ", ".join([row.name, *map(_word, row.key.values())])
            lines.append(f"† {label} is incomplete, it lacks {'; '.join(parts)}")
    return lines


def describe(sweep: Sweep) -> str:
    """The sweep as Markdown."""
    lines = ["# Sweep", ""]
    lines += [line for note in sweep.notes for line in (f"> **Note.** {note}", "")]
    lines += [
        "Per cent; mean ± sample standard deviation over seeds. The mean over test sets is taken for each seed first, "
        "of the seeds that have all test sets.",
        "",
    ]
    for table in sweep.tables:
        lines += [f"## {table.title}", ""]
        shown = text_tables(table)
        if any(row.kind == "published" for part in shown for row in part.rows):
            lines += [PUBLISHED, ""]
        for part in shown:
            lines += [f"### {part.title}", "", *markdown(part), ""]
        lines += [line for text in (_comparing(table), *_lacks(table)) if text for line in (text, "")]
    if sweep.skipped:
        lines += ["Not part of the tables:", "", *(f"- {name}: {why}" for name, why in sweep.skipped)]
    return "\n".join(lines).rstrip() + "\n"


def page(sweep: Sweep) -> str:
    """The sweep as one self-contained HTML page with plots."""
    import jinja2

    parts = [
        {
            "title": table.title, "tables": text_tables(table), "comparing": _comparing(table), "lacks": _lacks(table),
            "figures": [sweep_figure(points) for points in _points(table)],
            "definitions": {metric_name(name): text for name, text in table.family.definitions.items()},
        }
        for table in sweep.tables
    ]  # fmt: skip
    loader = jinja2.PackageLoader("fsvfm", ".")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("sweep.html").render(
        title=sweep.tables[0].title if len(sweep.tables) == 1 else "Sweep", parts=parts, notes=sweep.notes,
        skipped=sweep.skipped, folder=str(sweep.folder), published=PUBLISHED,
    )  # fmt: skip


def _points(table: SweepTable) -> Iterator[pd.DataFrame]:
    """What to draw: one table per headline metric and level, a line for each row and test set."""
    for metric in table.family.headlines:
        for level in table.family.headline_levels:
            lines = []
            for index, row in enumerate(table.rows):
                names = [row.name] if len({r.name for r in table.rows}) > 1 or not row.key else []
                label = ", ".join([*names, *map(_word, row.key.values())])
                x = next(iter(row.key.values())) if len(row.key) == 1 else None
                for lv, m, column, found in table.statistics(row):
                    if (lv, m) != (level, metric) or found is None:
                        continue
                    compared = table.compared.get((level, metric, column), [None] * len(table.rows))[index]
                    lines.append(
                        {"metric": f"{metric_name(metric)}, {level} level", "column": column, "label": label, "x": x}
                        | {"value": found.mean, "std": found.std, "reference": index == table.reference}
                        | {"low": getattr(compared, "low", None), "high": getattr(compared, "high", None)}
                        | {"key": _short_keys(table.by)[0] if len(table.by) == 1 else ""}
                    )
            if lines:
                yield pd.DataFrame(lines)


def write_sweep(folder: str | Path, sweep: Sweep) -> list[Path]:
    """Write ``sweep.json``, ``.csv``, ``.md``, ``.tex`` and the page ``.html`` into a folder, each atomically.

    The JSON holds the value of every seed and the run folder it came from, so that rows can be compared seed by seed.

    Returns:
        The files written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    records, tidy, tex = [], [], [f"% {note}" for note in sweep.notes]
    tex.append("% Per cent; mean and sample standard deviation over seeds.")
    for table in sweep.tables:
        rows = []
        for index, row in enumerate(table.rows):
            missing = table.missing(row)
            values: dict[str, Any] = {}
            for level, metric, column, found in table.statistics(row):
                seeds = (
                    row.means(level, metric, table.columns) if column == "mean" else row.values(level, metric, column)
                )
                stated = found._asdict() if found else {"mean": None, "std": None, "n": 0}
                against = table.compared.get((level, metric, column))
                compared = against[index] if against else None
                cell = {**stated, "seeds": seeds} | ({"compared": compared._asdict()} if compared else {})
                values.setdefault(level, {}).setdefault(metric, {})[column] = cell
                tidy.append(
                    {"protocol": table.protocol, "run": row.name, **row.key, "level": level, "metric": metric}
                    | {"testset": column, **stated, "missing": len(missing)}
                    | {name: getattr(compared, name, None) for name in ("low", "high", *_DIFFERENCE)}
                )
            runs = [{"folder": str(r.folder), "seed": r.seed, "target": r.target} for r in row.runs]
            rows.append({"run": row.name, "key": row.key, "runs": runs, "missing": missing, "values": values})
        records.append(
            {"protocol": table.protocol, "metrics": list(table.family.metrics), "by": table.by, "seeds": table.seeds}
            | {"testsets": table.columns, "definitions": table.family.definitions, "published": table.published}
            | {"title": table.title, "reference": table.reference, "rows": rows}
        )
        for part in text_tables(table):
            tex += [f"% {table.title}: {part.title}", *latex(part)]
        tex += [f"% {line}" for line in (_comparing(table), *_lacks(table)) if line]
    content = {"tables": records, "skipped": [{"folder": f, "why": w} for f, w in sweep.skipped], "notes": sweep.notes}
    files = {
        "sweep.json": json.dumps(content, indent=1, allow_nan=False, default=str) + "\n",
        "sweep.csv": pd.DataFrame(tidy).to_csv(index=False),
        "sweep.md": describe(sweep),
        "sweep.tex": "\n".join(tex) + "\n",
        "sweep.html": page(sweep),
    }
    for name, text in files.items():
        write_text(folder / name, text)
    return [folder / name for name in files]
