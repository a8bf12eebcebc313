"""Metric modules: batches, processes, samplers' padding and Lightning change nothing."""

from __future__ import annotations

import json
import warnings
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from sklearn import metrics as sk
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Metric
from torchmetrics.classification import BinaryAUROC, BinaryAveragePrecision

from fsvfm.errors import MetricError
from fsvfm.metrics.antispoof import antispoof_metrics
from fsvfm.metrics.modules import HTER, EqualErrorRate, TPRAtFPR, VideoLevel


def frames(n: int = 120, seed: int = 0) -> dict[str, Tensor]:
    """Frames of a dozen videos: scores on a coarse grid (ties), labels, video and sample numbers."""
    rng = np.random.default_rng(seed)
    videos = rng.integers(0, 12, n)
    videos[:2] = 0, 1
    labels = videos % 2
    scores = np.clip(rng.normal(0.4 + 0.2 * labels, 0.2), 0, 1).round(2)
    columns = {"scores": scores, "labels": labels, "videos": videos, "samples": np.arange(n)}
    return {name: torch.from_numpy(values) for name, values in columns.items()}


class Count(Metric):
    """How many samples it was given, by all processes together: tells whether something is gathered twice."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("seen", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, scores: Tensor, labels: Tensor) -> None:
        self.seen += len(scores)

    def compute(self) -> Tensor:
        return self.seen


def metrics() -> dict[str, Metric]:
    return {
        "hter": HTER(),
        "eer": EqualErrorRate(),
        "tpr": TPRAtFPR(0.05),
        "tpr_real": TPRAtFPR(0.1, positive="real"),
        "video_hter": VideoLevel(HTER()),
        "video_auc": VideoLevel(BinaryAUROC()),
        "videos": VideoLevel(Count()),
    }


def feed(metric: Metric, data: dict[str, Tensor], rows: Tensor) -> None:
    names = ["scores", "labels", *(["videos"] if isinstance(metric, VideoLevel) else []), "samples"]
    metric.update(*(data[name][rows] for name in names))


def values(data: dict[str, Tensor], batches: list[Tensor]) -> dict[str, float]:
    found = {}
    for name, metric in metrics().items():
        for rows in batches:
            feed(metric, data, rows)
        found[name] = float(metric.compute())
    return found


def test_values_are_those_of_scikit_learn():
    data = frames()
    got = values(data, [torch.arange(120)])
    scores, labels, videos = (data[name].numpy() for name in ("scores", "labels", "videos"))
    fpr, tpr, _ = sk.roc_curve(labels, scores, drop_intermediate=False)
    assert got["tpr"] == pytest.approx(tpr[fpr <= 0.05].max())
    fpr, tpr, _ = sk.roc_curve(1 - labels, 1 - scores, drop_intermediate=False)
    assert got["tpr_real"] == pytest.approx(tpr[fpr <= 0.1].max())
    spoof = antispoof_metrics(1 - scores, 1 - labels)
    assert got["hter"] == pytest.approx(spoof.hter)
    assert got["hter"] == pytest.approx(1 - sk.balanced_accuracy_score(1 - labels, 1 - scores >= spoof.threshold))
    assert got["videos"] == 12
    means = np.array([scores[videos == v].mean() for v in range(12)])
    assert got["video_auc"] == pytest.approx(sk.roc_auc_score(np.arange(12) % 2, means))
    assert got["video_hter"] == pytest.approx(antispoof_metrics(1 - means, 1 - np.arange(12) % 2).hter)


def test_equal_error_rate_is_the_root_on_the_interpolated_curve():
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2, 301)
    scores = rng.normal(labels, 1.0)
    metric = EqualErrorRate()
    metric.update(torch.from_numpy(scores), torch.from_numpy(labels))
    fpr, tpr, _ = sk.roc_curve(labels, scores)
    assert float(metric.compute()) == pytest.approx(brentq(lambda x: 1 - x - np.interp(x, fpr, tpr), 0, 1), abs=1e-6)


@given(st.randoms(), st.integers(1, 7))
@settings(deadline=None, max_examples=10)
def test_order_batches_and_padding_do_not_change_a_bit(random, pieces):
    data = frames(60)
    order = list(range(60))
    random.shuffle(order)
    padded = order + [random.choice(order) for _ in range(5)]
    assert values(data, list(torch.tensor(padded).chunk(pieces))) == values(data, [torch.arange(60)])


def test_reset_forgets_and_copies_are_independent():
    data, inner = frames(), BinaryAUROC()
    for metric in (*metrics().values(), VideoLevel(inner)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            feed(metric, data, torch.arange(120))
            first = metric.compute()
            metric.reset()
            with pytest.raises(MetricError, match="seen no samples"):
                metric.compute()
        feed(metric, data, torch.arange(120))
        assert torch.equal(metric.compute(), first)
    assert inner.update_count == 0


def test_half_precision_scores_and_boolean_labels_are_taken():
    data = frames()
    metric = TPRAtFPR(0.05)
    metric.update(data["scores"].bfloat16(), data["labels"].bool())
    rounded = data["scores"].bfloat16().double().numpy()
    fpr, tpr, _ = sk.roc_curve(data["labels"].numpy(), rounded, drop_intermediate=False)
    assert float(metric.compute()) == pytest.approx(tpr[fpr <= 0.05].max())


# -------------------------------------------------------------------------------------------------------- bad samples


@pytest.mark.parametrize("name", list(metrics()))
def test_bad_samples_are_refused_by_name(name):
    data = frames()
    metric = metrics()[name]
    feed(metric, data, data["labels"] == 0)
    with pytest.raises(MetricError, match="samples are real"):
        metric.compute()
    metric = metrics()[name]
    feed(
        metric, {**data, "scores": data["scores"].clone().index_fill_(0, torch.tensor(3), torch.nan)}, torch.arange(120)
    )
    with pytest.raises(MetricError, match="1 of 120 scores are not finite"):
        metric.compute()


def test_video_with_both_labels_is_named():
    metric = VideoLevel(BinaryAUROC())
    metric.update(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0, 1, 1]), torch.tensor([41, 41, 5]))
    with pytest.raises(MetricError, match="labelled real and frames labelled fake: 41"):
        metric.compute()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.rand(3, 1), torch.zeros(3).long(), torch.zeros(3).long()), "one number per sample"),
        (
            (torch.rand(3), torch.zeros(3), torch.zeros(3).long()),
            "labels must be a tensor of integers, got torch.float32",
        ),
        ((torch.rand(3), torch.zeros(2).long(), torch.zeros(3).long()), "3 scores but labels of shape"),
        ((torch.rand(3), torch.zeros(3).long(), ["a", "b", "c"]), "videos must be a tensor of integers, got list"),
        ((torch.rand(3), torch.zeros(3).long(), torch.zeros(3).long(), torch.zeros(3)), "samples must be"),
    ],
)
def test_bad_batches_are_refused_and_leave_nothing_behind(arguments, message):
    metric = VideoLevel(BinaryAUROC())
    with pytest.raises(MetricError, match=message):
        metric.update(*arguments)
    assert not any(getattr(metric, state) for state in ("scores", "labels", "samples", "videos"))


def test_impossible_requests():
    with pytest.raises(MetricError, match="false-positive rate"):
        TPRAtFPR(5)
    with pytest.raises(MetricError, match="'attack'"):
        TPRAtFPR(0.01, positive="attack")


# ---------------------------------------------------------------------------------------------------------- processes


def _shares(rank: int) -> list[list[int]]:
    """Batches of two processes for three rounds: unequal, with repeated samples, and all with one process."""
    rounds = [
        (range(17), range(17, 120)),
        ([*range(0, 120, 2), 0, 2], range(1, 120, 2)),
        ([], range(120)),
    ]
    return [list(shares[rank]) for shares in rounds]


def _take_part(rank: int, folder: Path) -> list[dict[str, float]]:
    """Compute all metrics of every round as one of two processes."""
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2, timeout=timedelta(minutes=5))
    data, found = frames(), []
    try:
        for share in _shares(rank):
            results = {}
            for name, metric in metrics().items():
                for rows in torch.tensor(share, dtype=torch.int64).split(25):
                    if len(rows):
                        feed(metric, data, rows)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # compute before update, where a share is empty
                    results[name] = float(metric.compute())
            found.append(results)
    finally:
        dist.destroy_process_group()
    return found


def _other_process(_: int, folder: str) -> None:
    torch.set_num_threads(1)
    (Path(folder) / "other.json").write_text(json.dumps(_take_part(1, Path(folder))))


def test_two_processes_with_unequal_shares_equal_one(tmp_path: Path):
    expected = values(frames(), [torch.arange(120)])
    other = torch.multiprocessing.spawn(_other_process, (str(tmp_path),), nprocs=1, join=False)
    assert _take_part(0, tmp_path) == [expected] * 3
    while not other.join():
        pass
    assert json.loads((tmp_path / "other.json").read_text()) == [expected] * 3


# ----------------------------------------------------------------------------------------------------------- Lightning


class Logs(pl.LightningModule):
    """Validates a fixed table of scores and logs every metric."""

    def __init__(self) -> None:
        super().__init__()
        self.all = torch.nn.ModuleDict({**metrics(), "video_ap": VideoLevel(BinaryAveragePrecision())})

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        data = dict(zip(("scores", "labels", "videos", "samples"), batch, strict=True))
        for name, metric in self.all.items():
            feed(metric, data, torch.arange(len(batch[0])))
            self.log(name, metric, on_epoch=True, batch_size=len(batch[0]))


@pytest.mark.filterwarnings("ignore")
def test_lightning_logs_the_metric_of_the_whole_epoch_each_time():
    model = Logs()
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    for seed in (0, 1):  # the second epoch must not remember the first
        data = frames(seed=seed)
        loader = DataLoader(TensorDataset(*data.values()), batch_size=32)
        logged = trainer.validate(model, loader, verbose=False)[0]
        means = [float(data["scores"][data["videos"] == v].mean()) for v in range(12)]
        expected = sk.average_precision_score(np.arange(12) % 2, means)
        assert logged.pop("video_ap") == pytest.approx(expected, abs=1e-6)
        assert logged == values(data, [torch.arange(120)])
