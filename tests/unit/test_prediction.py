"""Scores of photographs and videos: what evaluation would say, judged at thresholds with known errors."""

from __future__ import annotations

import json
import math
import shutil
import threading
import tracemalloc
import warnings
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.special import expit, logit
from scipy.stats import trim_mean

import miniatures
from fsvfm import predictor as predictor_module
from fsvfm.checkpoint import save_export
from fsvfm.data.manifest import Manifest
from fsvfm.errors import CheckpointError, ConfigError, DataError
from fsvfm.evaluation import calibrate_export, predict_manifest
from fsvfm.faces.crop import crop as cut
from fsvfm.faces.crop import square_crop
from fsvfm.faces.detect import Box
from fsvfm.faces.images import load_image
from fsvfm.faces.video import frame_indices, read_frames, write_video
from fsvfm.loaded_detector import load_detector_network
from fsvfm.metrics.calibration import apply_temperature
from fsvfm.prediction import VERDICTS, Face, Frame, Frames, Prediction, Threshold
from fsvfm.predictor import AGGREGATES, Predictor, load_detector
from fsvfm.provenance import faces
from fsvfm.recipes.photos import FaceExtractor
from json_schema import violations
from tiny_detector import write_detector

SCHEMA = json.loads((resources.files("fsvfm") / "prediction.schema.json").read_text())


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_detector(tmp_path_factory.mktemp("plain") / "export")


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory, prepared_dir: Path) -> Path:
    """A detector with temperature, thresholds and no band."""
    folder = write_detector(tmp_path_factory.mktemp("run") / "calibrated", size=48, seed=1, mean=0.3)
    rows = Manifest.read(prepared_dir).select(split="train")
    calibrate_export(folder, rows, source="training people", conformal_alpha=None, batch_size=16, workers=0)
    return folder


@pytest.fixture(scope="module")
def predictor(export: Path) -> Predictor:
    return load_detector(export)


@pytest.fixture(scope="module")
def couple(media_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A photograph of two people, as PNG."""
    file = tmp_path_factory.mktemp("photos") / "two people.png"
    Image.fromarray(np.hstack(miniatures.faces(media_dir)[:2])).save(file)
    return file


@pytest.fixture(scope="module")
def clip(media_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two people side by side, 12 frames; the second one leaves after three."""
    left, right = miniatures.faces(media_dir)[:2]
    file = tmp_path_factory.mktemp("videos") / "clip.mp4"
    frames = (np.hstack([np.roll(left, n % 3, axis=1), right if n < 3 else np.full_like(right, 90)]) for n in range(12))
    write_video(file, frames, rate=10, crf=10)
    return file


def valid(prediction: Prediction) -> dict[str, Any]:
    record = json.loads(json.dumps(prediction.to_dict(), allow_nan=False))
    assert violations(record, SCHEMA) == []
    return record


# ------------------------------------------------------------------------------------------- the same as in evaluation


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_cropped_image_gets_the_score_of_evaluation(
    predictor: Predictor, prepared_dir: Path, tmp_path: Path, suffix: str
) -> None:
    rows = Manifest.read(prepared_dir).select(split="test").table.reset_index(drop=True)
    files = []
    for number, path in enumerate(Manifest.read(prepared_dir).select(split="test").paths()):
        # Larger than the network's input, so that the transform has something to do.
        picture = Image.open(path).resize((101, 101), Image.Resampling.BICUBIC)
        files.append(str(tmp_path / f"{number}{suffix}"))
        picture.save(files[-1], quality=85)
    manifest = Manifest(rows.assign(path=files, parse=""), tmp_path)
    expected = predict_manifest(predictor.members[0], manifest, batch_size=5, workers=0, title="x")
    assert expected is not None
    found = [predictor.predict(file, crop=False) for file in files]
    np.testing.assert_allclose([each.score for each in found], expected["score"], atol=1e-6)
    assert expected["score"].std() > 1e-3
    assert found[0].faces[0].box == (0, 0, 101, 101)


@pytest.mark.parametrize("task", ["forgery", "antispoof"])
def test_faces_are_cut_as_in_preparation(task: str, media_dir: Path, couple: Path, tmp_path: Path) -> None:
    predictor = load_detector(write_detector(tmp_path / "export", task=task))
    image = load_image(couple)
    worker = FaceExtractor(tmp_path, size=None, parser=None, align=task == "antispoof")
    boxes = [found.box for found in worker.detect(image)]
    scores = []
    for number, box in enumerate(boxes):
        worker.save_face(image, box, str(number))
        scores.append(predictor.members[0].score(_batch(tmp_path / "images" / f"{number}.png")).item())
    found = predictor.predict(couple)
    assert len(boxes) == 2
    assert [face.box for face in found.faces] == boxes
    np.testing.assert_allclose([face.score for face in found.faces], scores, atol=1e-6)
    for (box, crop), face in zip(predictor.crops(image), found.faces, strict=True):
        assert box == face.box
        np.testing.assert_allclose(predictor.score_faces([crop]), [face.probability], atol=1e-6)


def _batch(file: Path, size: int = 64) -> Any:
    picture = Image.open(file).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(picture).transpose(2, 0, 1).copy())[None]


def test_files_arrays_and_pillow_pictures_agree(predictor: Predictor, couple: Path) -> None:
    from_file = predictor.predict(couple)
    image = load_image(couple)
    turned = Image.fromarray(np.rot90(image, 1))  # what a camera held sideways stores, with a note to turn it back
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.info["exif"] = exif.tobytes()
    turned.getexif()[0x0112] = 6
    for other in (image, Image.open(couple), turned):
        again = predictor.predict(other)
        assert [face.score for face in again.faces] == [face.score for face in from_file.faces]
    assert valid(from_file)["source"].endswith("two people.png")
    with pytest.raises(DataError, match="uint8"):
        predictor.predict(np.zeros((8, 8, 3)))


def test_a_picture_is_as_suspicious_as_its_most_suspicious_face(predictor: Predictor, couple: Path) -> None:
    found = predictor.predict(couple)
    assert [face.id for face in found.faces] == [0, 1]
    assert found.probability == max(face.probability for face in found.faces)
    assert found.probability != min(face.probability for face in found.faces)
    assert found.decisive is not None
    assert found.verdict == found.decisive.verdict
    assert found.frames[0].faces == found.faces
    nobody = predictor.predict(np.full((80, 80, 3), 127, np.uint8))
    assert (nobody.verdict, nobody.score, nobody.faces) == ("no face", None, [])
    valid(nobody)


# ---------------------------------------------------------------------------------------------------------- of a video


def test_a_video_is_followed_face_by_face(predictor: Predictor, clip: Path) -> None:
    found = predictor.predict(clip, frames=0)
    valid(found)
    assert [frame.index for frame in found.frames] == list(range(12))
    assert found.frames[5].time == pytest.approx(0.5)
    assert sorted(face.frames for face in found.faces) == [3, 12]
    for track in found.faces:
        seen = [face for frame in found.frames for face in frame.faces if face.id == track.id]
        assert track.score == pytest.approx(np.mean([face.score for face in seen]))
        assert track.box == max(seen, key=lambda face: face.probability).box
    # A frame's score is that of the same picture alone.
    images = dict(read_frames(clip, [4]))
    assert found.frames[4].faces[0].score == pytest.approx(predictor.predict(images[4]).faces[0].score, abs=1e-6)
    sparse = predictor.predict(clip, frames=5)
    assert [frame.index for frame in sparse.frames] == frame_indices(12, 5)


@pytest.mark.parametrize("rate", [25, 1])
def test_who_moves_stays_one_face_and_a_cut_brings_another(
    predictor: Predictor, media_dir: Path, tmp_path: Path, rate: int
) -> None:
    """Of one person who jumps from side to side a frame of another one is in the middle, where the first one was."""
    ann, bob = miniatures.faces(media_dir)[0], miniatures.faces(media_dir)[3]  # the first three show one person
    empty = np.full_like(ann, 90)
    shots = [np.hstack(each) for each in ((ann, empty), (empty, ann), (ann, empty), (bob, empty), (empty, ann))]
    write_video(tmp_path / "cut.mkv", shots, rate=rate, crf=5)
    found = predictor.predict(tmp_path / "cut.mkv", frames=0)
    ids = [[face.id for face in frame.faces] for frame in found.frames]
    if rate == 1:  # a second apart: boxes tell nothing
        assert ids == [[0], [0], [0], [1], [0]]
    else:  # as close as frames of one shot: the box does
        assert ids == [[0], [0], [0], [0], [0]]
    assert sum(face.frames for face in found.faces) == 5


def test_a_blurred_face_is_renamed_when_its_person_is_known(
    predictor: Predictor, media_dir: Path, tmp_path: Path
) -> None:
    ann = miniatures.faces(media_dir)[0]
    empty, blurred = np.full_like(ann, 90), cv2.GaussianBlur(ann, (0, 0), 4)
    shots = [(ann, empty)] * 4 + [(empty, empty)] * 8 + [(empty, blurred)] + [(empty, ann)] * 3
    write_video(tmp_path / "back.mkv", [np.hstack(shot) for shot in shots], rate=25, crf=5)
    found = predictor.predict(tmp_path / "back.mkv", frames=0)
    assert [[face.id for face in frame.faces] for frame in found.frames] == [[0]] * 4 + [[]] * 8 + [[0]] * 4
    assert [(face.id, face.frames) for face in found.faces] == [(0, 8)]


def test_batches_change_nothing(export: Path, predictor: Predictor, clip: Path) -> None:
    whole = predictor.predict(clip, frames=0).to_dict()
    for size in (1, 5, 64):
        other = load_detector(export, batch_size=size).predict(clip, frames=0).to_dict()
        for a, b in zip(whole["frames"], other["frames"], strict=True):
            assert [face["id"] for face in a["faces"]] == [face["id"] for face in b["faces"]]
            np.testing.assert_allclose(
                [face["score"] for face in a["faces"]], [face["score"] for face in b["faces"]], atol=1e-6
            )


def _threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("ahead", "in_parallel"))]


def test_overlapping_changes_nothing_and_leaves_nothing_behind(
    export: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = load_detector(export, batch_size=4)
    advanced: list[tuple[int, int]] = []
    found = predictor.predict(clip, frames=0, advance=lambda *done: advanced.append(done))
    assert advanced == [(n, 12) for n in range(1, 13)]
    with monkeypatch.context() as patch:
        patch.setattr(predictor_module, "ahead", lambda items, depth: (item for item in items))
        assert predictor.predict(clip, frames=0).to_dict() == found.to_dict()

    def interrupted(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as kept:  # holds every frame of the stack, as a debugger would
        predictor.predict(clip, frames=0, advance=interrupted)
    assert (kept.type, _threads()) == (KeyboardInterrupt, [])
    find, calls = predictor._detect, iter(range(100))

    def broken(image: np.ndarray) -> Any:
        if next(calls) == 5:
            raise ZeroDivisionError("inside the face detector")
        return find(image)

    monkeypatch.setattr(predictor, "_detect", broken)
    with pytest.raises(ZeroDivisionError, match="inside the face detector") as raised:
        predictor.predict(clip, frames=0)
    assert (raised.type, _threads()) == (ZeroDivisionError, [])


@st.composite
def scored_frames(draw: st.DrawFn) -> list[Frame]:
    """Frames as they come from scoring: faces of an ensemble or of a single detector."""
    names = draw(st.sampled_from([(), ("a", "b")]))
    shares = st.floats(0, 1)

    def face(identity: int) -> Face:
        box = Box(*draw(st.tuples(*[st.integers(-(2**40), 2**40)] * 4)))
        members = {name: draw(shares) for name in names}
        return Face(identity, box, draw(shares), draw(shares), draw(st.sampled_from(VERDICTS[:3])), members)

    return [
        Frame(draw(st.integers(0, 2**40)), draw(st.none() | shares), [face(each) for each in draw(identities)])
        for _ in range(draw(st.integers(0, 8)))
    ]


identities = st.lists(st.integers(0, 3), max_size=3, unique=True)


@given(scored_frames())
def test_frames_kept_in_columns_are_the_same(frames: list[Frame]) -> None:
    kept = Frames(iter(frames))
    assert list(kept) == frames
    assert kept[1:-1] == frames[1:-1]
    assert [kept[-n - 1] for n in range(len(frames))] == frames[::-1]
    with pytest.raises(IndexError):
        kept[len(frames)]
    tracks = {track.id: track for track in kept.tracks()}
    faces = [face for frame in frames for face in frame.faces]
    assert list(tracks) == sorted({face.id for face in faces})
    for identity, track in tracks.items():
        seen = [face for face in faces if face.id == identity]
        assert track.box == max(seen, key=lambda face: face.probability).box
        assert track.values.tolist() == [[face.score, face.probability, *face.members.values()] for face in seen]
    kept.rename({3: 2, 2: 0})
    renamed = [[{3: 0, 2: 0}.get(face.id, face.id) for face in frame.faces] for frame in frames]
    assert [[face.id for face in frame.faces] for frame in kept] == renamed
    kept = Frames(frames)
    record = valid(Prediction("x", "video", faces=faces, frames=kept, threshold=Threshold("eer", 0.5, "x").describe()))
    assert record["frames"] == json.loads(json.dumps([asdict(frame) for frame in frames]))


def test_frames_of_an_hour_take_megabytes() -> None:
    box = Box(600, 300, 900, 650)
    frames = (Frame(n, n / 25, [Face(300, box, 1 / (n + 1), 1 / (n + 2), "real")]) for n in range(9000))
    tracemalloc.start()
    try:
        kept = Frames(frames)
        taken = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(kept) == 9000
    assert taken < 9000 * 130  # objects would take 600 bytes each


def test_a_flicker_does_not_decide_about_a_video() -> None:
    def face(number: int, probability: float, frames: int) -> Face:
        return Face(number, Box(0, 0, 9, 9), probability, probability, "real", frames=frames)

    faces = [face(0, 0.2, 32), face(1, 0.99, 7), face(2, 0.6, 8), face(3, 0.1, 30)]
    decisive = Prediction("x", "video", faces=faces).decisive
    assert decisive is not None
    assert decisive.id == 2


@given(st.lists(st.floats(0, 1), min_size=1, max_size=50))
def test_aggregates(values: list[float]) -> None:
    scores = np.array(values)
    assert AGGREGATES["mean"](scores) == pytest.approx(np.mean(scores))
    assert AGGREGATES["trimmed"](scores) == pytest.approx(trim_mean(scores, 0.1))
    assert AGGREGATES["top_k"](scores) == pytest.approx(np.mean(sorted(values, reverse=True)[:5]))


def test_aggregates_are_chosen_by_name(predictor: Predictor, clip: Path) -> None:
    found = {name: predictor.predict(clip, frames=0, aggregate=name, crop=False) for name in AGGREGATES}
    scores = np.array([frame.faces[0].score for frame in found["mean"].frames])
    assert np.ptp(scores) > 1e-4
    assert found["mean"].score == pytest.approx(scores.mean())
    assert found["trimmed"].score == pytest.approx(np.sort(scores)[1:-1].mean())
    assert found["top_k"].score == pytest.approx(np.sort(scores)[-5:].mean())
    with pytest.raises(ConfigError, match="mean, trimmed, top_k"):
        predictor.predict(clip, aggregate="median")
    with pytest.raises(ConfigError, match="frames=-1"):
        predictor.predict(clip, frames=-1)


def test_a_long_video_takes_no_more_memory(predictor: Predictor, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 255, (160, 160, 3), dtype=np.uint8)

    def peak(frames: int) -> int:
        file = tmp_path / f"{frames}.mp4"
        write_video(file, (np.roll(picture, n, axis=0) for n in range(frames)), crf=40)
        tracemalloc.start()
        try:
            predictor.predict(file, frames=0, crop=False)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(40)  # what is loaded once
    short, long = peak(40), peak(240)
    # Pictures are 77 kB each; what stays of a frame are its numbers.
    assert long - short < 200 * 2000


def test_a_video_must_be_readable_for_the_most_part(predictor: Predictor, clip: Path, tmp_path: Path) -> None:
    # Matroska can be read up to where it was cut off.
    whole = tmp_path / "whole.mkv"
    write_video(whole, (np.full((64, 64, 3), n, np.uint8) for n in range(100)), rate=10, gop=5)
    content = whole.read_bytes()
    for share, ok in ((1.0, True), (0.5, True), (0.02, False)):
        cut = tmp_path / f"cut_{share}.mkv"
        cut.write_bytes(content[: int(share * len(content))])
        if ok:
            assert predictor.predict(cut, crop=False).verdict in ("real", "fake")
        else:
            with pytest.raises(DataError):
                predictor.predict(cut, crop=False)
    # An MP4 whose index promises more frames than follow.
    fast = tmp_path / "fast.mp4"
    _faststart(whole, fast)
    half = tmp_path / "half.mp4"
    half.write_bytes(fast.read_bytes()[: int(0.6 * fast.stat().st_size)])
    with pytest.raises(DataError, match="truncated"):
        predictor.predict(half, crop=False)
    most = tmp_path / "most.mp4"
    most.write_bytes(fast.read_bytes()[: -int(0.02 * fast.stat().st_size)])
    found = predictor.predict(most, crop=False)
    assert found.verdict in ("real", "fake")
    assert any("claims" in note for note in found.notes)


def _faststart(source: Path, target: Path) -> None:
    import av

    with av.open(str(source)) as old, av.open(str(target), "w", options={"movflags": "faststart"}) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(old.streams.video[0]):
            if packet.size:
                packet.stream = stream
                new.mux(packet)


def test_a_camera_that_is_not_there(predictor: Predictor) -> None:
    with pytest.raises(DataError, match="no camera answers"):
        predictor.predict("webcam:73")


# ----------------------------------------------------------------------------------------- thresholds and calibration


@pytest.mark.parametrize(
    ("probability", "plain", "inside", "above", "below"),
    # band:                  none    .4–.6      .7–.8    .1–.2   with the threshold at .5
    [
        (0.05, "real", "real", "real", "real"),
        (0.15, "real", "real", "real", "uncertain"),
        (0.30, "real", "real", "real", "uncertain"),
        (0.45, "real", "uncertain", "real", "uncertain"),
        (0.50, "fake", "uncertain", "uncertain", "fake"),
        (0.65, "fake", "fake", "uncertain", "fake"),
        (0.75, "fake", "fake", "uncertain", "fake"),
        (0.95, "fake", "fake", "fake", "fake"),
    ],
)
def test_verdicts(probability: float, plain: str, inside: str, above: str, below: str) -> None:
    bands = (None, (0.4, 0.6), (0.7, 0.8), (0.1, 0.2))
    for band, expected in zip(bands, (plain, inside, above, below), strict=True):
        stored = band and {"alpha": 0.1, "low": band[0], "high": band[1]}
        assert Threshold("eer", 0.5, "x", band=stored).verdict(probability) == expected


def test_calibrated_probabilities_and_stored_thresholds(calibrated: Path, couple: Path) -> None:
    stored = load_detector_network(str(calibrated)).calibration
    assert stored is not None
    for name in ("eer", "fpr_1", "fpr_5"):
        predictor = load_detector(calibrated, threshold=name)
        point = stored["thresholds"][name]
        found = predictor.predict(couple)
        judged = valid(found)["threshold"]
        assert (judged["value"], judged["fpr"], judged["fnr"]) == (point["threshold"], point["fpr"], point["fnr"])
        assert (judged["name"], judged["origin"], judged["level"]) == (name, "training people", "frame")
        assert judged["calibrated"]
        assert "training people" in predictor.threshold.text()
    for face in found.faces:
        assert face.probability == pytest.approx(float(apply_temperature(face.score, stored["temperature"])))
        assert face.score != face.probability
    number = load_detector(calibrated, threshold="0.25").threshold
    assert (number.name, number.value, number.fpr) == ("number", 0.25, None)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        load_detector(calibrated, threshold=5)
    with pytest.raises(ConfigError, match="eer, fpr_1, fpr_5"):
        load_detector(calibrated, threshold="fpr")


def test_a_stored_band_makes_verdicts_uncertain(prepared_dir: Path, couple: Path, tmp_path: Path) -> None:
    folder = write_detector(tmp_path / "export")
    rows = Manifest.read(prepared_dir).select(split="train")
    calibrate_export(folder, rows, source="x", conformal_alpha=0.02, batch_size=16, workers=0)
    predictor = load_detector(folder)
    band = predictor.threshold.band
    assert band is not None
    assert band["alpha"] == 0.02
    inside = (band["low"] + band["high"]) / 2
    assert predictor.threshold.verdict(inside) == "uncertain"
    assert valid(predictor.predict(couple))["threshold"]["band"] == band


def test_without_calibration_a_probability_is_the_score_and_the_result_says_so(
    predictor: Predictor, export: Path, couple: Path
) -> None:
    found = predictor.predict(couple)
    assert all(face.probability == face.score for face in found.faces)
    judged = valid(found)["threshold"]
    assert (judged["value"], judged["calibrated"], judged["fpr"]) == (0.5, False, None)
    assert "not calibrated" in judged["origin"]
    assert "unknown" in predictor.threshold.text()
    with pytest.raises(ConfigError, match="calibrate"):
        load_detector(export, threshold="fpr_1")


# ---------------------------------------------------------------------------------------------------------- ensembles


def test_an_ensemble_averages_calibrated_logits(export: Path, calibrated: Path, couple: Path, tmp_path: Path) -> None:
    third = shutil.copytree(calibrated, tmp_path / "third")
    together = load_detector({"a": export, "b": calibrated})
    assert {member.image_size for member in together.members} == {48, 64}
    found = together.predict(couple)
    alone = [load_detector(path).predict(couple) for path in (export, calibrated)]
    for number, face in enumerate(found.faces):
        parts = [each.faces[number] for each in alone]
        assert face.members == pytest.approx({"a": parts[0].probability, "b": parts[1].probability}, abs=1e-9)
        assert face.probability == pytest.approx(expit(np.mean([logit(part.probability) for part in parts])))
        assert face.score == pytest.approx(expit(np.mean([logit(part.score) for part in parts])))
    valid(found)
    assert not together.threshold.calibrated  # one member is not
    assert load_detector([str(calibrated), str(third)]).names == ["calibrated", "third"]
    both = load_detector([calibrated, calibrated])
    assert both.names == ["calibrated", "calibrated_2"]
    single = load_detector(calibrated)
    assert both.threshold.value == pytest.approx(single.threshold.value)
    assert both.threshold.fpr is None  # nobody measured the ensemble
    assert "ensemble" in both.threshold.text()
    for a, b in zip(both.predict(couple).faces, single.predict(couple).faces, strict=True):
        assert a.probability == pytest.approx(b.probability, abs=1e-9)


def test_detectors_of_different_tasks_are_no_ensemble(export: Path, tmp_path: Path) -> None:
    spoof = write_detector(tmp_path / "spoof", task="antispoof")
    with pytest.raises(ConfigError, match="different tasks"):
        load_detector([export, spoof])
    with pytest.raises(ConfigError, match="at least one"):
        load_detector([])


# -------------------------------------------------------------------------------------------------------------- loading


def test_demo_detectors_come_with_a_warning(tmp_path: Path, export: Path) -> None:
    run = tmp_path / "run"
    marks: dict[str, Any] = {
        "provenance": {"provenance": {"dataset": "demo_forgeries"}},
        "init": {"provenance": {"hyper_parameters": {"model": {"init": "runs/demo_pretrain/export"}}}},
    }
    for name, meta in marks.items():
        with pytest.warns(UserWarning, match="demo detector"):
            loaded = load_detector(write_detector(run / name / "export", **meta))
        assert any("demo" in note for note in loaded.predict(np.zeros((40, 40, 3), np.uint8)).notes)
    (run / "config.yaml").write_text("data: {name: demo_forgeries}\n")
    with pytest.warns(UserWarning, match="demo detector"):
        load_detector(write_detector(run / "export"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_detector(export)


def test_faces_are_cut_as_the_export_says(couple: Path, tmp_path: Path) -> None:
    cards = {"wide": {"scale": 2.0}, "again": {"scale": 2.0}, "chips": {"scale": 1.3, "align": True}}
    known = {}
    for name, settings in cards.items():
        (tmp_path / name).mkdir()
        card = {"settings": {"detector": "dlib_hog", **settings}}
        (tmp_path / name / "card.json").write_text(json.dumps(card))
        known[name] = faces([str(tmp_path / name)])
    assert known["wide"] == {"detector": "dlib_hog", "scale": 2.0, "align": False}
    assert faces([str(tmp_path / "wide"), str(tmp_path / "again")]) == known["wide"]
    for unclear in (["wide", "chips"], ["wide", "nowhere"], []):
        assert faces([str(tmp_path / name) for name in unclear]) is None
    card = {"settings": {"detector": None, "scale": 2.0}}
    (tmp_path / "again" / "card.json").write_text(json.dumps(card))
    assert faces([str(tmp_path / "again")]) is None  # pictures were taken as they are

    exports = {
        name: write_detector(tmp_path / name / "export", provenance={"faces": known.get(name)})
        for name in ("wide", "chips", "plain")
    }
    image = load_image(couple)
    loaded = {name: load_detector(path) for name, path in exports.items()}
    for box, crop in loaded["wide"].crops(image):
        np.testing.assert_array_equal(crop, cut(image, *square_crop(box, image.shape[1], image.shape[0], 2.0)))
    for (box, crop), (_, usual) in zip(loaded["plain"].crops(image), loaded["wide"].crops(image), strict=True):
        np.testing.assert_array_equal(crop, cut(image, *square_crop(box, image.shape[1], image.shape[0], 1.3)))
        assert len(crop) < len(usual)
    assert all(crop.shape == (224, 224, 3) for _, crop in loaded["chips"].crops(image))  # however large the box
    assert loaded["wide"].notes == loaded["plain"].notes == []
    with pytest.raises(ConfigError, match=r"wide .2 times the box., plain .1\.3 times"):
        load_detector({"wide": exports["wide"], "plain": exports["plain"]})
    with pytest.warns(UserWarning, match="found by dlib_hog.*here they are found by dlib_cnn"):
        load_detector(exports["wide"], face_detector="dlib_cnn")


def test_half_precision_is_told(export: Path, predictor: Predictor, couple: Path) -> None:
    with pytest.warns(UserWarning, match=r"evaluate\.precision=bf16-mixed"):
        half = load_detector(export, precision="bf16-mixed")
    found, exact = half.predict(couple), predictor.predict(couple)
    scores, expected = ([face.score for face in each.faces] for each in (found, exact))
    assert scores != expected
    np.testing.assert_allclose(scores, expected, atol=0.05)
    assert any("bf16-mixed" in note for note in valid(found)["notes"])
    with pytest.raises(ConfigError, match="precision=half"):
        load_detector(export, precision="half")


def test_what_cannot_be_loaded(tmp_path: Path, export: Path) -> None:
    with pytest.raises(CheckpointError):
        load_detector(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="device"):
        load_detector(export, device="tpu")
    with pytest.raises(ConfigError, match="face detector"):
        load_detector(export, face_detector="haar")
    with pytest.raises(ConfigError, match="batch_size"):
        load_detector(export, batch_size=0)


def test_scores_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    folder = write_detector(tmp_path / "broken")
    loaded = load_detector_network(str(folder)).checkpoint
    state = {k: torch.full_like(t, math.nan) if k == "head.fc.bias" else t for k, t in loaded.state.items()}
    calibration = {"temperature": 2.0, "source": "x", "thresholds": {"eer": {"threshold": 0.5, "fpr": 0, "fnr": 0}}}
    for meta in (loaded.meta, {**loaded.meta, "calibration": calibration}):
        save_export(folder, state, meta)
        for source in (folder, [folder, folder]):
            with pytest.raises(DataError, match="not finite"):
                load_detector(source).predict(np.zeros((40, 40, 3), np.uint8), crop=False)


def test_a_crop_must_lie_in_the_picture(predictor: Predictor) -> None:
    image = np.zeros((100, 100, 3), np.uint8)
    assert predictor.crop(image, (10, 10, 50, 50)).shape == (52, 52, 3)
    with pytest.raises(DataError, match="leaves no crop"):
        predictor.crop(image, Box(150, 150, 190, 190))
    with pytest.raises(DataError, match="uint8"):
        predictor.score_faces([cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)])
    assert predictor.score_faces([]).shape == (0,)
