"""Explanations: they point at planted evidence, add up, agree with independent computations, and follow the weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import expit, logit
from scipy.stats import spearmanr
from timm.utils import AttentionExtract

from fsvfm.checkpoint import save_export
from fsvfm.errors import CheckpointError, ConfigError, DataError
from fsvfm.explain import TOLERANCE, Explanation, Reconstructor, explain, load_reconstructor, overlay, reconstruct
from fsvfm.faces.crop import crop, square_crop
from fsvfm.faces.detect import make_detector
from fsvfm.faces.images import load_image
from fsvfm.loaded_detector import LoadedDetector, load_detector_network
from fsvfm.metrics.calibration import apply_temperature
from fsvfm.models.detector import Detector, build_detector
from fsvfm.models.heads import DetectorOutput
from fsvfm.models.pretrain_net import OnlineNetwork, PretrainNetConfig
from fsvfm.models.vit import ViTConfig, patchify
from fsvfm.regions import LABELS, REGIONS

MODEL = {"name": "vit_test", "image_size": 64, "patch_size": 8, "dim": 32, "depth": 3, "heads": 2}
SIZE, PATCH, GRID = 64, 8, 8
GREY = 102  # of the mean colour below, a whole number
DECODERS = {
    "representation_decoder": {"depth": 1, "heads": 2, "pos_embed": "sincos"},
    "pixel_decoder": {"dim": 32, "depth": 1, "heads": 2},
    "projection": {"hidden": 16, "out": 8},
}
LORA = {"rank": 2, "alpha": 4.0, "dropout": 0.1, "targets": ["qkv", "proj"]}


def scramble(network: torch.nn.Module, seed: int, std: float = 0.3) -> None:
    """Other weights, large enough that attention is not flat and nothing stays undecided."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "norm" not in name:
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))


def exported(
    folder: Path,
    *,
    tune: dict[str, Any] | None = None,
    task: str = "forgery",
    class_order: Sequence[str] = ("real", "fake"),
    seed: int = 0,
    **meta: Any,
) -> LoadedDetector:
    """A detector with random weights, written and loaded again."""
    tune = {"name": "full", "drop_path": 0.0, **(tune or {})}
    network = build_detector(MODEL, tune, class_order, task=task, quirk=bool(tune.get("quirk")))
    scramble(network, seed)
    described = {
        "kind": "detector", "task": task, "model": MODEL, "tune": tune, "class_order": list(class_order),
        "mean": [GREY / 255] * 3, "std": [0.25, 0.2, 0.3], **meta,
    }  # fmt: skip
    save_export(folder, network.state_dict(), described)
    return load_detector_network(str(folder))


@pytest.fixture
def detector(tmp_path: Path) -> LoadedDetector:
    return exported(tmp_path / "export")


@pytest.fixture
def face() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)


def parsed_as(regions: np.ndarray) -> Callable[..., np.ndarray]:
    """A parser that labels whole patches, (G, G) of label names' indices."""
    labels = np.kron(regions, np.ones((PATCH, PATCH))).astype(np.uint8)
    return lambda face, landmarks=None: labels


def eyes_at(place: tuple[int, int]) -> Callable[..., np.ndarray]:
    """One patch shows an eye, the left half is nose besides, the right half mouth."""
    regions = np.full((GRID, GRID), LABELS.index("nose"))
    regions[:, GRID // 2 :] = LABELS.index("upper_lip")
    regions[place] = LABELS.index("left_eye")
    return parsed_as(regions)


class OnePatch(Detector):
    """Its logit of fake is a weighted sum of one patch's pixels, and of nothing else."""

    def __init__(self, like: Detector, place: tuple[int, int]) -> None:
        super().__init__(like.backbone, like.head, like.class_order)
        generator = torch.Generator().manual_seed(1)
        self.window = torch.zeros(1, 3, SIZE, SIZE)
        rows, columns = (slice(PATCH * at, PATCH * (at + 1)) for at in place)
        self.window[..., rows, columns] = 0.05 * torch.randn(1, 3, PATCH, PATCH, generator=generator)

    def forward(self, images: torch.Tensor) -> DetectorOutput:
        fake = (images * self.window).flatten(1).sum(dim=1)
        return DetectorOutput(torch.stack([torch.full_like(fake, 0.3), fake], dim=1), None)


def attentive(like: Detector, place: tuple[int, int]) -> Detector:
    """A real transformer whose first block attends to one patch everywhere and copies its blueness for the head."""
    network = build_detector(MODEL, {"name": "full"}, like.class_order)
    patch = 1 + place[0] * GRID + place[1]
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        vit, first, head = network.backbone, network.backbone.blocks[0], network.head.fc
        for channel, sign in ((0, 1), (1, -1)):  # in pairs, so that normalisation finds no mean to take away
            vit.patch_embed.proj.weight[channel, 2] = sign * 0.3 / PATCH**2
            vit.pos_embed[0, 1:, 2 + channel] = -sign
            vit.pos_embed[0, patch, 2 + channel] = sign
            first.attn.proj.weight[5 + channel, 5] = sign
        dim, half = MODEL["dim"], MODEL["dim"] // 2
        first.attn.qkv.bias[[0, half]] = 1  # queries of both heads: the same everywhere
        first.attn.qkv.weight[[dim, dim + half], 2] = 16  # keys: here is the patch
        first.attn.qkv.weight[2 * dim + 5, 0] = 1  # value: its blueness
        head.weight[network.class_order.index("fake"), 5] = 4
    return network.eval()


# ------------------------------------------------------------------------------------------------------------- planted


@pytest.mark.parametrize("place", [(0, 0), (2, 5), (7, 3)])
@pytest.mark.parametrize("class_order", [("real", "fake"), ("fake", "real")])
def test_all_views_find_the_patch_that_the_detector_attends_to(tmp_path, face, place, class_order) -> None:
    loaded = exported(tmp_path / "export", class_order=class_order)
    loaded = replace(loaded, network=attentive(loaded.network, place))
    for blue, sign in ((250, 1), (10, -1)):
        rows, columns = (slice(PATCH * at, PATCH * (at + 1)) for at in place)
        face[rows, columns, 2] = blue
        found = explain(loaded, face, parser=eyes_at(place))
        for name in ("rollout", "gradient"):
            values = found.patches[name]
            assert np.unravel_index(np.abs(values).argmax(), values.shape) == place
            assert np.abs(values[place]) > 0.4 * np.abs(values).sum()
        assert np.sign(found.patches["gradient"][place]) == sign
        strongest = max(found.regions, key=lambda name: abs(found.regions[name].logit))
        assert strongest == "eyes"
        assert np.sign(found.regions["eyes"].logit) == sign == np.sign(found.regions["eyes"].probability)
        assert abs(found.regions["eyes"].logit) > 5 * abs(found.regions["nose"].logit)
        for name, values in found.maps.items():
            y, x = np.unravel_index(np.abs(values).argmax(), values.shape)
            assert (y // PATCH, x // PATCH) == place, name


def test_a_linear_detector_is_explained_exactly(detector: LoadedDetector, face: np.ndarray) -> None:
    toy = OnePatch(detector.network, (3, 6))
    found = explain(replace(detector, network=toy), face, methods=("gradient", "regions"), parser=eyes_at((3, 6)))
    normalised = (torch.from_numpy(face.copy()).permute(2, 0, 1)[None].float() - detector.mean) / detector.std
    expected = patchify(toy.window * normalised, PATCH)[0].double().sum(dim=1).reshape(GRID, GRID).numpy()
    np.testing.assert_allclose(found.patches["gradient"], expected, atol=1e-5)
    assert (np.delete(found.patches["gradient"].ravel(), 3 * GRID + 6) == 0).all()
    assert found.regions["eyes"].logit == pytest.approx(expected[3, 6], abs=1e-5)
    assert found.regions["nose"].logit == found.regions["mouth"].logit == 0
    assert found.completeness is not None
    assert found.completeness["gap"] == pytest.approx(0, abs=1e-5)
    assert found.logit == pytest.approx(expected.sum() - 0.3, abs=1e-5)


class Bent(OnePatch):
    """Its logit is a function of a weighted sum of one row of patches, which the patches then share by their parts."""

    def __init__(self, like: Detector, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__(like, (2, 0))
        self.window = self.window[..., :PATCH].repeat(1, 1, 1, GRID)
        self.function = function

    def forward(self, images: torch.Tensor) -> DetectorOutput:
        fake = self.function((images * self.window).flatten(1).sum(dim=1))
        return DetectorOutput(torch.stack([torch.zeros_like(fake), fake], dim=1), None)


@pytest.mark.parametrize(("bend", "points"), [("cubic", 16), ("step", 100)])
def test_gradients_are_exact_for_bent_detectors_and_find_sudden_steps(detector, face, bend, points) -> None:
    """Two points integrate a quadratic slope exactly; a step at a tenth of the way is found by halving pieces."""
    normalised = (torch.from_numpy(face.copy()).permute(2, 0, 1)[None].float() - detector.mean) / detector.std
    window = Bent(detector.network, torch.tanh).window
    parts = patchify(window * normalised, PATCH)[0].double().sum(dim=1)
    whole = float(parts.sum())
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "cubic": lambda u: (u / whole) ** 3,
        "step": lambda u: 2 * torch.tanh(300 * (u / whole - 0.1)),
    }
    toy = Bent(detector.network, functions[bend])
    found = explain(replace(detector, network=toy), face, methods=["gradient"])
    assert found.completeness is not None
    rise = {"cubic": 1.0, "step": 4.0}[bend]
    assert found.completeness["difference"] == pytest.approx(rise, abs=1e-4)
    assert found.completeness["points"] <= points
    tolerance = 1e-5 if bend == "cubic" else TOLERANCE[0]
    expected = (rise * parts / whole).reshape(GRID, GRID).numpy()
    np.testing.assert_allclose(found.patches["gradient"], expected, rtol=tolerance, atol=1e-6)
    assert abs(found.completeness["gap"]) <= tolerance * rise


# --------------------------------------------------------------------------------------------------------- references


@pytest.mark.parametrize("pool", ["avg", "cls"])
def test_rollout_is_the_product_of_the_attention_that_timm_extracts(tmp_path, face, pool) -> None:
    loaded = exported(tmp_path / "export", tune={"pool": pool})
    values = explain(loaded, face, methods=["rollout"]).patches["rollout"]
    for block in loaded.network.backbone.blocks:
        block.attn.fused_attn = False
    image = (torch.from_numpy(face.copy()).permute(2, 0, 1)[None].float() - loaded.mean) / loaded.std
    extracted = AttentionExtract(loaded.network.backbone, method="hook")(image)
    assert len(extracted) == MODEL["depth"]
    whole = np.eye(1 + GRID**2)
    for attention in extracted.values():
        mean = attention[0].detach().double().mean(dim=0).numpy()
        whole = (0.5 * mean + 0.5 * np.eye(len(mean))) @ whole
    row = whole[1:].mean(axis=0) if pool == "avg" else whole[0]
    np.testing.assert_allclose(values.ravel(), row[1:] / row[1:].sum(), rtol=1e-4)
    assert values.sum() == pytest.approx(1)


def test_effects_are_those_of_scoring_a_picture_with_the_region_painted_over(detector, face) -> None:
    rng = np.random.default_rng(2)
    labels = np.kron(rng.integers(0, 8, (GRID * 2, GRID * 2)), np.ones((4, 4))).astype(np.uint8)  # four to a patch
    found = explain(detector, face, methods=["regions"], parser=lambda face, landmarks=None: labels)

    def score(picture: np.ndarray) -> float:
        return float(detector.score(torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)))[None]))

    wanted = {"eyes": (4, 5), "nose": (6,), "mouth": (7, 8, 9), "background": (0,), "eyebrows": (2, 3)}
    for name, parts in wanted.items():
        masked, count = face.copy(), 0
        for y in range(0, SIZE, PATCH):
            for x in range(0, SIZE, PATCH):
                if np.isin(labels[y : y + PATCH, x : x + PATCH], parts).any():
                    masked[y : y + PATCH, x : x + PATCH] = GREY
                    count += 1
        assert found.regions[name].patches == count > 0
        assert found.regions[name].logit == pytest.approx(logit(score(face)) - logit(score(masked)), abs=1e-4)
        assert found.regions[name].probability == pytest.approx(score(face) - score(masked), abs=1e-5)
    # A patch of several regions shows the effect of the first in walking order: of eyebrows before that of eyes.
    first = np.isin(labels.reshape(GRID, PATCH, GRID, PATCH), (2, 3)).any(axis=(1, 3))
    np.testing.assert_allclose(found.patches["regions"][first], found.regions["eyebrows"].logit)
    assert "hair" not in found.regions
    assert any("hair" in note for note in found.notes)


def test_gradients_add_up_to_the_difference_from_the_mean_colour(detector: LoadedDetector, face: np.ndarray) -> None:
    found = explain(detector, face, methods=["gradient"])
    flat = torch.full((1, 3, SIZE, SIZE), GREY, dtype=torch.uint8)
    start = logit(float(detector.score(flat)))
    complete = found.completeness
    assert complete is not None
    assert complete["difference"] == pytest.approx(found.logit - start, abs=1e-4)
    assert complete["sum"] == pytest.approx(found.patches["gradient"].sum())
    assert complete["gap"] == pytest.approx(complete["sum"] - complete["difference"])
    assert abs(complete["gap"]) <= max(TOLERANCE[0] * abs(complete["difference"]), TOLERANCE[1])


def test_a_calibrated_detector_is_explained_in_calibrated_logits(tmp_path: Path, face: np.ndarray) -> None:
    point = {"threshold": 0.5, "fpr": 0.1, "fnr": 0.1}
    calibration = {
        "temperature": 2.5, "source": "test", "thresholds": dict.fromkeys(("fpr_1", "fpr_5", "eer"), point),
        "conformal": None,
    }  # fmt: skip
    plain, warm = (
        explain(exported(tmp_path / name, **meta), face, parser=eyes_at((1, 1)))
        for name, meta in (("a", {}), ("b", {"calibration": calibration}))
    )
    assert warm.score == pytest.approx(plain.score)
    assert warm.probability == pytest.approx(float(apply_temperature(np.array([plain.score]), 2.5)[0]))
    assert warm.temperature == 2.5
    assert warm.logit == pytest.approx(plain.logit / 2.5)
    for name in ("gradient", "regions"):
        np.testing.assert_allclose(warm.patches[name], plain.patches[name] / 2.5, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(warm.patches["rollout"], plain.patches["rollout"])


# -------------------------------------------------------------------------------------------------------- sanity check


@pytest.mark.parametrize("view", ["rollout", "gradient", "regions"])
def test_randomised_weights_change_the_maps(tmp_path: Path, face: np.ndarray, view: str) -> None:
    """The model randomisation test of Adebayo et al. (2018): a map that survives it explains the picture only."""
    regions = np.arange(GRID * GRID).reshape(GRID, GRID) % len(LABELS)
    first = exported(tmp_path / "first", seed=0)
    correlations = []
    for seed in range(6):
        other = exported(tmp_path / f"other{seed}", seed=seed)
        maps = [explain(d, face, methods=[view], parser=parsed_as(regions)).patches[view] for d in (first, other)]
        correlations.append(spearmanr(maps[0].ravel(), maps[1].ravel()).statistic)
    assert correlations[0] == pytest.approx(1)
    # Few regions have few ranks, so that chance alone makes single correlations large.
    assert abs(np.mean(correlations[1:])) < 0.4
    assert max(correlations[1:]) < 0.9


def test_another_head_changes_what_speaks_for_fake_but_not_where_attention_looks(detector, face) -> None:
    before = explain(detector, face, parser=eyes_at((0, 0)))
    scramble(detector.network.head, seed=9)
    after = explain(detector, face, parser=eyes_at((0, 0)))
    np.testing.assert_array_equal(before.patches["rollout"], after.patches["rollout"])
    assert spearmanr(before.patches["gradient"].ravel(), after.patches["gradient"].ravel()).statistic < 0.8
    assert before.regions != after.regions


# -------------------------------------------------------------------------------------------------- kinds of detectors

KINDS: dict[str, dict[str, Any]] = {
    "cls": {"tune": {"pool": "cls"}},
    "adapter": {"tune": {"name": "adapter", "reduction": 4}},
    "linear": {"tune": {"name": "linear"}},
    "lora": {"tune": {"name": "lora", "merged": True, "lora": LORA}},
    "antispoof": {"task": "antispoof"},
    "antispoof, norm over tokens": {"task": "antispoof", "tune": {"quirk": True}},
    "antispoof adapter": {"task": "antispoof", "tune": {"name": "adapter", "reduction": 4}},
}


def check(loaded: LoadedDetector, face: np.ndarray) -> Explanation:
    """Explain; the score is that of scoring, before and after, and everything is finite."""
    pixels = torch.from_numpy(np.ascontiguousarray(face.transpose(2, 0, 1)))[None]
    score = float(loaded.score(pixels))
    found = explain(loaded, face, parser=eyes_at((2, 2)))
    assert set(found.maps) == {"rollout", "gradient", "regions"}
    assert found.score == pytest.approx(score, abs=1e-6)
    assert found.probability == found.score == pytest.approx(expit(found.logit))
    for values in found.patches.values():
        assert values.shape == (GRID, GRID)
        assert np.isfinite(values).all()
        assert np.ptp(values) > 0
    assert float(loaded.score(pixels)) == pytest.approx(score, abs=1e-7)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_export_is_explained(tmp_path: Path, face: np.ndarray, kind: str) -> None:
    found = check(exported(tmp_path / "export", **KINDS[kind]), face)
    assert any("mean of the patch tokens" in note for note in found.notes) == (kind != "cls")
    assert found.to_dict()["task"] == KINDS[kind].get("task", "forgery")


def test_low_rank_updates_that_are_not_folded_count(tmp_path: Path, face: np.ndarray) -> None:
    loaded = exported(tmp_path / "export", tune={"name": "linear"})
    network = build_detector(MODEL, {"name": "lora", "lora": LORA}, ("real", "fake"))
    scramble(network, seed=4)
    check(replace(loaded, network=network.eval()), face)


def test_explaining_works_where_gradients_are_off(detector: LoadedDetector, face: np.ndarray) -> None:
    expected = explain(detector, face, methods=["gradient"]).patches["gradient"]
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            found = explain(detector, face, methods=["gradient"])
        np.testing.assert_allclose(found.patches["gradient"], expected, atol=1e-6)
    assert all(parameter.grad is None for parameter in detector.network.parameters())


# ------------------------------------------------------------------------------------------------------ reconstruction


def pretrained(folder: Path, *, seed: int = 0, channels: Sequence[float] = (0.25,) * 3, **loss: Any) -> Path:
    model = {**MODEL, **DECODERS}
    network = OnlineNetwork(ViTConfig.from_mapping(model), PretrainNetConfig.from_mapping(model))
    scramble(network, seed)
    meta = {
        "kind": "pretrain", "task": "pretrain", "model": model, "tune": None, "class_order": None,
        "mean": [GREY / 255] * 3, "std": list(channels), "provenance": {"hyper_parameters": {"loss": loss}},
    }  # fmt: skip
    return save_export(folder, {f"online.{key}": tensor for key, tensor in network.state_dict().items()}, meta)


def without_prediction(source: Path) -> Reconstructor:
    encoder = load_reconstructor(source)
    torch.nn.init.zeros_(encoder.network.pixel_decoder.pred.weight)
    torch.nn.init.zeros_(encoder.network.pixel_decoder.pred.bias)
    return encoder


@pytest.mark.parametrize("norm_pix", [True, False])
def test_the_error_of_a_network_that_predicts_nothing_is_known(tmp_path, detector, face, norm_pix) -> None:
    """Zeros stand for the patch's own mean, or for the mean colour."""
    encoder = without_prediction(pretrained(tmp_path / "pretrained", norm_pix=norm_pix))
    found = explain(detector, face, methods=[], encoder=encoder)
    cells = face.reshape(GRID, PATCH, GRID, PATCH, 3).astype(np.float64)
    centre = cells.mean(axis=(1, 3, 4), keepdims=True) if norm_pix else GREY
    expected = ((cells - centre) ** 2).mean(axis=(1, 3, 4)) / (cells.var(axis=(1, 3, 4)) + 4)
    np.testing.assert_allclose(found.patches["reconstruction"], expected, rtol=1e-4)
    assert found.reconstructed is not None
    picture = found.reconstructed.reshape(GRID, PATCH, GRID, PATCH, 3)
    np.testing.assert_allclose(picture, np.broadcast_to(np.round(centre), cells.shape), atol=1)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_hidden_patches_are_predicted_and_the_others_stay(tmp_path: Path, face: np.ndarray, norm_pix: bool) -> None:
    encoder = without_prediction(pretrained(tmp_path / "pretrained", norm_pix=norm_pix))
    masked = torch.arange(GRID**2)[None] % 4 != 0
    picture = reconstruct(encoder, face, masked).reshape(GRID, PATCH, GRID, PATCH, 3)
    cells = face.reshape(GRID, PATCH, GRID, PATCH, 3).astype(np.float64)
    centre = cells.mean(axis=(1, 3, 4), keepdims=True) if norm_pix else np.array(GREY)
    hidden = masked.numpy().reshape(GRID, 1, GRID, 1, 1)
    np.testing.assert_allclose(picture, np.where(hidden, np.round(centre), cells), atol=1)


def test_every_patch_is_predicted_from_a_quarter_that_it_is_not_in(tmp_path, detector, face) -> None:
    encoder = load_reconstructor(pretrained(tmp_path / "pretrained", norm_pix=False))
    visible: list[torch.Tensor] = []
    encoder.network.encoder.register_forward_hook(lambda module, inputs, output: visible.append(inputs[1]))
    before = explain(detector, face, methods=[], encoder=encoder).reconstructed
    passes = torch.cat(visible)
    assert passes.shape[1] == GRID**2 // 4
    assert (torch.bincount(passes.flatten(), minlength=GRID**2) == len(passes) // 4).all()
    assert before is not None
    face[8:16, 24:32] = 255 - face[8:16, 24:32]
    after = explain(detector, face, methods=[], encoder=encoder).reconstructed
    assert after is not None
    np.testing.assert_array_equal(after[8:16, 24:32], before[8:16, 24:32])
    assert (after != before).any()


def test_reconstruction_is_repeatable_follows_the_weights_and_shows_what_is_odd(tmp_path, detector, face) -> None:
    # Contrast varies from patch to patch, as in photographs: it must not be what the map shows.
    strength = np.kron(np.random.default_rng(1).uniform(0.1, 1, (GRID, GRID)), np.ones((PATCH, PATCH)))[..., None]
    face = np.round(GREY + strength * (face.astype(float) - 128) / 2).astype(np.uint8)
    sources = [pretrained(tmp_path / str(seed), seed=seed, channels=(0.2, 0.3, 0.25)) for seed in (0, 1)]
    first, again, other = (
        explain(detector, face, methods=[], encoder=source).patches["reconstruction"]
        for source in (sources[0], sources[0], sources[1])
    )
    np.testing.assert_array_equal(first, again)
    assert (first > 0).all()
    assert abs(spearmanr(first.ravel(), other.ravel()).statistic) < 0.5
    assert first.max() > 1.2 * first.min()
    odd = np.full_like(face, GREY)  # flat to the network in all channels
    odd[16:24, 40:48] = np.arange(8)[:, None] * 20
    values = explain(detector, odd, methods=[], encoder=load_reconstructor(sources[0])).maps["reconstruction"]
    assert values[20, 44] == 1
    assert np.delete(values.reshape(GRID, PATCH, GRID, PATCH).max(axis=(1, 3)).ravel(), 2 * GRID + 5).max() < 0.05


def test_what_cannot_reconstruct_is_refused(tmp_path: Path, detector: LoadedDetector, face: np.ndarray) -> None:
    with pytest.raises(CheckpointError, match="pre-training checkpoint"):
        explain(detector, face, encoder=detector.checkpoint.source)
    idle = pretrained(tmp_path / "idle", reconstruction=0.0, region=0.0)
    with pytest.raises(CheckpointError, match="without reconstruction"):
        load_reconstructor(idle)


# ------------------------------------------------------------------------------------------------------------ pictures


def test_a_photograph_is_explained_in_pictures_and_numbers(tmp_path: Path, detector, media_dir: Path) -> None:
    image = load_image(media_dir / "photos" / "003.jpg")
    box = make_detector("dlib_hog")(image)[0].box
    face = crop(image, *square_crop(box, image.shape[1], image.shape[0], 1.3))
    big = ViTConfig.from_mapping({**MODEL, "image_size": 224, "patch_size": 16})
    network = build_detector(big, {"name": "full"}, ("real", "fake")).eval()
    scramble(network, seed=3, std=0.1)
    meta = {**detector.checkpoint.meta, "model": {**MODEL, "image_size": 224, "patch_size": 16}}
    detector.checkpoint.meta.update(meta)
    encoder = pretrained(tmp_path / "pretrained")
    found = explain(replace(detector, network=network), face, encoder=encoder)
    assert list(found.regions) == [name for name in REGIONS if name in found.regions]
    assert {"eyebrows", "eyes", "nose", "mouth", "boundary", "skin"} <= set(found.regions)
    assert set(found.maps) == {"rollout", "gradient", "regions", "reconstruction"}
    for name, values in found.maps.items():
        assert values.shape == face.shape[:2]
        assert values.dtype == np.float32
        low, high = (-1, 1) if name in ("gradient", "regions") else (0, 1)
        assert low <= values.min() < values.max() <= high
        assert found.overlay(name).shape == face.shape
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["regions"]["nose"]["logit"] == found.regions["nose"].logit
    assert np.shape(plain["maps"]["gradient"]["patches"]) == (14, 14)
    path = found.figure(tmp_path / "figure.png")
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 300
    assert [entry.name for entry in tmp_path.glob("*.png")] == ["figure.png"]
    assert not list(tmp_path.glob(".*tmp"))


def test_without_a_face_the_regions_are_omitted_and_the_rest_is_there(tmp_path: Path, detector, face) -> None:
    found = explain(detector, face)
    assert found.regions == {}
    assert set(found.maps) == {"rollout", "gradient"}
    assert "landmarks" in found.omitted["regions"]
    assert found.to_dict()["omitted"] == found.omitted
    with pytest.raises(ConfigError, match="landmarks"):
        found.overlay("regions")
    assert found.figure(tmp_path / "figure.png").stat().st_size > 10_000


def test_faces_of_any_size_are_explained_as_they_are_scored(detector: LoadedDetector) -> None:
    tall = np.random.default_rng(3).integers(0, 256, (97, 51, 3), dtype=np.uint8)
    found = explain(detector, tall, methods=["rollout", "gradient"])
    assert {values.shape for values in found.maps.values()} == {(97, 51)}
    resized = np.asarray(Image.fromarray(tall).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    score = detector.score(torch.from_numpy(resized.transpose(2, 0, 1).copy())[None])
    assert found.score == pytest.approx(float(score), abs=1e-6)


def test_red_speaks_for_fake_blue_for_real_and_nothing_stays_grey(face: np.ndarray) -> None:
    values = np.zeros((SIZE, SIZE))
    values[:10], values[10:20] = 1, -1
    picture = overlay(face, values, signed=True).astype(int)
    assert (picture[:10, :, 0] > picture[:10, :, 2]).all()
    assert (picture[10:20, :, 2] > picture[10:20, :, 0]).all()
    assert (picture[20:] == picture[20:, :, :1]).all()
    with pytest.raises(DataError, match="does not fit"):
        overlay(face, values[:5])


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"methods": ["rolout"]}, ConfigError, "'rolout'.*rollout, gradient"),
        ({"methods": ["reconstruction"]}, ConfigError, "encoder="),
        ({"face": np.zeros((8, 8), dtype=np.uint8)}, DataError, "uint8"),
    ],
)
def test_impossible_requests_say_what_to_do(detector, face, options, error, text) -> None:
    with pytest.raises(error, match=text):
        explain(detector, **{"face": face, **options})


def test_a_figure_that_cannot_be_written_is_an_error_of_one_line(tmp_path: Path, detector, face) -> None:
    found = explain(detector, face, methods=["rollout"])
    with pytest.raises(DataError, match="cannot be written"):
        found.figure(tmp_path / "absent" / "figure.png")
