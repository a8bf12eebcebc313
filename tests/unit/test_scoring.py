"""Scoring many inputs: an error each for what cannot be scored, accounts that add up, runs that continue."""

from __future__ import annotations

import json
import random
import struct
import tracemalloc
import wave
import zlib
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import miniatures
from fsvfm import scoring
from fsvfm.errors import ConfigError, DataError
from fsvfm.faces.sources import Input
from fsvfm.faces.video import write_video
from fsvfm.prediction import Frame, Frames, Prediction
from fsvfm.predictor import Predictor, load_detector
from fsvfm.scoring import Account, Scoring, picture_name, run
from json_schema import violations
from tiny_detector import write_detector

SCHEMA = json.loads((resources.files("fsvfm") / "prediction.schema.json").read_text())


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return load_detector(write_detector(tmp_path_factory.mktemp("detector") / "export"))


@pytest.fixture(scope="module")
def face(media_dir: Path) -> np.ndarray:
    """A small photograph in which the face detector finds one face."""
    return miniatures.faces(media_dir)[0]


def records(folder: Path, name: str = scoring.FINAL) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
    for record in found:
        assert violations(record, SCHEMA) == [], record["source"]
    return found


def write_bad_inputs(folder: Path, face: np.ndarray) -> dict[str, str]:
    """Files with something wrong with them: name → part of the error, or the verdict's absence of one."""
    picture = Image.fromarray(face)
    folder.mkdir()
    (folder / "empty.jpg").touch()
    (folder / "page.jpg").write_text("<!DOCTYPE html><html><body>404</body></html>")
    (folder / "text.png").write_text("no picture")
    picture.save(folder / "cut.jpg", quality=95)
    whole = (folder / "cut.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    picture.save(folder / "big.png")
    content = bytearray((folder / "big.png").read_bytes())
    content[16:24] = struct.pack(">II", 20_000, 20_000)  # what the header claims is what would be decoded
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    (folder / "big.png").write_bytes(bytes(content))
    (folder / "folder.jpg").mkdir()
    (folder / "folder.jpg" / "inside.png").touch()
    (folder / "gone.jpg").symlink_to("nowhere.jpg")
    (folder / "empty.mp4").touch()
    miniatures.write_clip(folder / "cut.mp4", face)
    whole = (folder / "cut.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    _sound(folder / "sound.mp4")
    write_video(folder / "codec.mkv", (np.full((32, 32, 3), n, np.uint8) for n in range(5)))
    content = (folder / "codec.mkv").read_bytes()
    assert b"V_MPEG4/ISO/AVC" in content
    (folder / "codec.mkv").write_bytes(content.replace(b"V_MPEG4/ISO/AVC", b"V_MPEG9/ISO/XYZ"))
    return {
        "empty.jpg": "0 bytes", "page.jpg": "HTML page", "text.png": "not a picture", "cut.jpg": "truncated",
        "big.png": "limit", "folder.jpg/inside.png": "0 bytes", "gone.jpg": "not a file", "empty.mp4": "0 bytes",
        "cut.mp4": "not a video", "sound.mp4": "sound only", "codec.mkv": "no decoder",
    }  # fmt: skip


def _sound(path: Path) -> None:
    import av

    with wave.open(str(path.with_suffix(".wav")), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(np.zeros(8000, np.int16).tobytes())
    with av.open(str(path.with_suffix(".wav"))) as source, av.open(str(path), "w") as target:
        stream = target.add_stream("aac", rate=8000)
        for frame in source.decode(audio=0):
            target.mux(stream.encode(frame))
        target.mux(stream.encode(None))
    path.with_suffix(".wav").unlink()


def write_odd_inputs(folder: Path, face: np.ndarray) -> dict[str, str]:
    """Files that are unusual and right: name → how to know that the face was found, or that there is none."""
    picture = Image.fromarray(face)
    folder.mkdir()
    alpha = picture.copy()
    alpha.putalpha(Image.new("L", picture.size, 255))
    alpha.save(folder / "alpha.png")
    deep = np.asarray(picture.convert("L")).astype(np.uint16) * 257
    Image.fromarray(deep).save(folder / "deep.png")
    picture.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    picture.quantize(200).save(folder / "moving.gif", save_all=True, append_images=[Image.new("P", picture.size)] * 3)
    for orientation, turn in ((3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_90)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        picture.transpose(turn).save(folder / f"turned {orientation}.png", exif=exif)
    picture.save(folder / "naïve \u202e 顔 (1), x=2.png")
    Image.new("RGB", (20_000, 120), "gray").save(folder / "panorama.png")
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    miniatures.write_clip(folder / "clip.mp4", face)
    return dict.fromkeys((path.name for path in folder.iterdir()), "scored") | {
        "panorama.png": "no face", "dot.png": "no face",
    }  # fmt: skip


def test_bad_and_odd_inputs(predictor: Predictor, face: np.ndarray, tmp_path: Path, capsys: Any) -> None:
    bad = write_bad_inputs(tmp_path / "bad", face)
    odd = write_odd_inputs(tmp_path / "odd", face)
    out = tmp_path / "out"
    account = run(predictor, [str(tmp_path / "bad"), str(tmp_path / "odd")], {}, out=out, annotate=True, timeline=True)
    found = {str(Path(record["source"]).relative_to(tmp_path)): record for record in records(out)}
    assert set(found) == {f"bad/{name}" for name in bad} | {f"odd/{name}" for name in odd}
    for name, part in bad.items():
        record = found[f"bad/{name}"]
        assert part in str(record["error"]), record["error"]
        assert Path(name).name in str(record["error"])
        assert (record["verdict"], record["score"], record["faces"]) == (None, None, [])
    for name, expected in odd.items():
        record = found[f"odd/{name}"]
        assert record["error"] is None, record["error"]
        assert (record["verdict"] == "no face") == (expected == "no face"), name
        if record["kind"] == "photo":
            assert (out / record["annotated"]).is_file()
    # However a camera was held, the upright picture is the same.
    upright = found["odd/naïve \u202e 顔 (1), x=2.png"]
    for orientation in (3, 6):
        assert found[f"odd/turned {orientation}.png"]["faces"] == upright["faces"]
    assert any("first one" in note for note in found["odd/moving.gif"]["notes"])
    assert (out / found["odd/clip.mp4"]["annotated"]).is_file()
    assert (out / found["odd/clip.mp4"]["timeline"]).is_file()
    # The totals add up, everywhere.
    told = account.to_dict()
    assert told["inputs"] == len(found) == told["scored"] + told["no_face"] + told["failed"]
    assert (told["failed"], told["no_face"]) == (len(bad), 2)
    assert json.loads((out / "run.json").read_text())["account"] == told
    printed = capsys.readouterr().out
    assert f"{len(found)} inputs = " in printed
    assert "0 bytes" in printed
    assert "\u202e" not in printed  # which would turn the rest of the line around
    assert not list(out.rglob("*.tmp*"))
    assert not list(out.rglob("*partial*"))
    _check_tables(out)


def _check_tables(out: Path) -> None:
    lines = records(out)
    parquet = pd.read_parquet(out / "predictions.parquet")
    table = pd.read_csv(out / "predictions.csv")
    assert list(table) == list(parquet) == list(scoring.COLUMNS)
    assert len(table) == len(parquet) == sum(max(1, len(record["faces"])) for record in lines)
    for name in ("probability", "face_probability", "left", "threshold"):
        np.testing.assert_allclose(table[name].astype(float), parquet[name].astype(float))
    assert (table["source"] == parquet["source"]).all()
    faces = [face for record in lines for face in record["faces"]]
    kept = parquet.dropna(subset="face")
    np.testing.assert_array_equal(kept[["left", "top", "right", "bottom"]], [face["box"] for face in faces])
    np.testing.assert_array_equal(kept["face_score"], [face["score"] for face in faces])


def test_an_interrupted_run_is_continued(predictor: Predictor, tmp_path: Path, capsys: Any) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for number in range(6):
        Image.new("RGB", (64, 64), (40 * number, 90, 200)).save(folder / f"{number}.png")
    settings = {"frames": 32, "input": str(folder)}

    class Interrupted(Predictor):
        """Ctrl-C at the fourth picture."""

        def predict(self, x: Any, **options: Any) -> Prediction:
            if Path(x).name == "3.png":
                raise KeyboardInterrupt
            return super().predict(x, **options)

    members = dict(zip(predictor.names, predictor.members, strict=True))
    with pytest.raises(KeyboardInterrupt):
        run(Interrupted(members), folder, settings, out=out, crop=False)
    assert len(records(out, scoring.PARTIAL)) == 3
    assert not (out / scoring.FINAL).exists()
    with (out / scoring.PARTIAL).open("a") as file:
        file.write('{"source": "torn off in the mid')
    with pytest.raises(ConfigError, match=r"frames: 32 → 16[\s\S]*resume=never"):
        run(predictor, folder, {**settings, "frames": 16}, out=out, crop=False)
    with pytest.raises(ConfigError, match="resume=always"):
        run(predictor, folder, settings, out=out, crop=False, resume="always")
    before = (out / scoring.PARTIAL).read_text().splitlines()[:3]
    capsys.readouterr()
    account = run(predictor, folder, settings, out=out, crop=False)
    assert "continuing: 3 inputs" in capsys.readouterr().out
    assert account.total == 6
    assert (out / scoring.FINAL).read_text().splitlines()[:3] == before  # kept, not made again
    assert [Path(record["source"]).name for record in records(out)] == [f"{number}.png" for number in range(6)]
    whole = (out / scoring.FINAL).read_text()
    # Finished: the same command makes the same again; another one replaces it.
    run(predictor, folder, settings, out=out, crop=False)
    assert (out / scoring.FINAL).read_text() == whole
    with pytest.raises(KeyboardInterrupt):
        run(Interrupted(members), folder, settings, out=out, crop=False)
    assert (out / scoring.FINAL).read_text() == whole  # until the new run is finished
    account = run(predictor, [str(folder / "5.png")], {"frames": 16}, out=out, crop=False, resume="never")
    assert account.total == len(records(out)) == 1


def test_faces_are_explained(predictor: Predictor, face: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(face).save(tmp_path / "a.png")
    miniatures.write_clip(tmp_path / "b.mp4", face)
    members = {"one": predictor.members[0], "two": predictor.members[0]}
    out = tmp_path / "out"
    run(Predictor(members), [str(tmp_path / "a.png"), str(tmp_path / "b.mp4")], {}, out=out, explain=True, frames=3)
    photo, video = records(out)
    assert [(each["face"], each["member"]) for each in photo["explanations"]] == [(0, "one"), (0, "two")]
    suspicious = max(video["frames"], key=lambda frame: frame["faces"][0]["probability"])
    assert {each["frame"] for each in video["explanations"]} == {suspicious["index"]}
    for record, score in ((photo, photo["score"]), (video, suspicious["faces"][0]["score"])):
        explained = record["explanations"][0]
        assert {"eyes", "mouth"} <= set(explained["regions"])
        with Image.open(out / explained["picture"]) as picture:
            assert picture.width > 200
        # What is explained is the score of the very crop.
        numbers = json.loads((out / explained["picture"]).with_suffix(".json").read_text())
        assert numbers["score"] == pytest.approx(score, abs=1e-5)
    assert not list(out.rglob(".*"))


def test_results_of_a_long_video_take_no_more_memory(
    predictor: Predictor, face: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    miniatures.write_clip(tmp_path / "long.mp4", face)
    scored = predictor.predict(tmp_path / "long.mp4", frames=1)
    (frame,) = scored.frames

    class Patient(Predictor):
        """As if the clip had very many frames."""

        def predict(self, x: Any, **options: Any) -> Prediction:
            many = (Frame(number, number / 25, frame.faces) for number in range(self.number))
            return replace(scored, frames=Frames(many))

    def peak(number: int) -> int:
        patient = Patient(dict(zip(predictor.names, predictor.members, strict=True)))
        patient.number = number
        tracemalloc.start()
        try:
            run(patient, tmp_path / "long.mp4", {}, out=tmp_path / str(number))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(10)  # what is loaded once
    # Numbers in columns, and the line of text that the tables are made from; the frames as dicts would take 2 kB each.
    assert peak(8000) - peak(10) < 8000 * 580
    (record,) = records(tmp_path / "8000")
    assert [each["index"] for each in record["frames"]] == list(range(8000))
    assert record["frames"][7]["faces"] == record["frames"][0]["faces"] == [frame.faces[0].to_dict()]
    _check_tables(tmp_path / "8000")


def test_members_have_columns(predictor: Predictor, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    members = {"first": predictor.members[0], "second": predictor.members[0]}
    run(Predictor(members), tmp_path / "a.png", {}, out=tmp_path / "out", crop=False)
    row = pd.read_parquet(tmp_path / "out" / "predictions.parquet").iloc[0]
    assert row["probability_first"] == row["probability_second"] == pytest.approx(row["face_probability"])


@pytest.mark.parametrize(
    ("counts", "status"),
    [
        ({"real": 3}, 0), ({"real": 1, "fake": 2}, 10), ({"fake": 1, "no face": 1, "uncertain": 1}, 10),
        ({"real": 5, "uncertain": 1}, 11), ({"no face": 1}, 11), ({"real": 5, "failed": 1}, 20),
        ({"uncertain": 1, "failed": 1}, 20), ({"fake": 1, "failed": 1}, 30),
    ],
)  # fmt: skip
def test_only_0_means_that_everything_is_in_order(counts: dict[str, int], status: int) -> None:
    account = Account()
    for name, number in counts.items():
        for _ in range(number):
            failed = name == "failed"
            account.add({"error": "x" if failed else None, "verdict": None if failed else name})
    assert account.exit_status() == status
    assert account.total == sum(counts.values())


def test_an_unforeseen_error_is_one_inputs_result(predictor: Predictor, tmp_path: Path) -> None:
    class Broken(Predictor):
        def predict(self, x: Any, **options: Any) -> Prediction:
            raise ZeroDivisionError("inside a decoder")

    members = dict(zip(predictor.names, predictor.members, strict=True))
    record = Scoring(Broken(members))(Input("x.jpg", "photo"))
    assert violations({**record, "frames": list(record["frames"])}, SCHEMA) == []
    assert record["error"] == "x.jpg cannot be scored (ZeroDivisionError: inside a decoder)"
    record = Scoring(predictor)(Input("x.jpg", "photo", "known before"))
    assert record["error"] == "known before"


def test_settings_that_contradict_each_other(predictor: Predictor, tmp_path: Path) -> None:
    for name in ("annotate", "timeline", "explain"):
        with pytest.raises(ConfigError, match=f"{name}=true.*out="):
            Scoring(predictor, **{name: True})
    with pytest.raises(ConfigError, match="aggregate"):
        Scoring(predictor, aggregate="median")(Input("x.jpg", "photo"))
    with pytest.raises(DataError, match="does not exist"):
        run(predictor, tmp_path / "absent.jpg", {}, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="another folder"):
        run(predictor, tmp_path / "a.png", {}, out=tmp_path / "file")


def test_names_of_pictures_are_short_and_differ() -> None:
    names = [picture_name(source) for source in ("a/x.jpg", "b/x.jpg", "a/x.png", f"{'顔' * 200}.jpg", "a/\udcff.jpg")]
    assert len(set(names)) == 5
    assert all(len(name.encode()) < 120 for name in names)
    assert all(name.startswith("x.") for name in names[:3])


def _mutated(content: bytes, rng: random.Random) -> bytes:
    """Flipped, removed, doubled or cut bytes."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 6)):
        place = rng.randrange(len(data))
        length = rng.choice((1, 1, 2, 4, 30))
        kind = rng.randrange(5)
        if kind == 0:
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[place : place + length] = rng.choice((b"\x00", b"\xff", b"\x7f")) * length
        elif kind == 2:
            del data[place : place + length]
        elif kind == 3:
            data[place:place] = data[place : place + length]
        elif rng.random() < 0.3:
            data = data[: max(1, place)]
    return bytes(data)


def test_mutated_files_never_end_a_run(predictor: Predictor, tmp_path: Path) -> None:
    rng = random.Random(0)
    noise = np.random.default_rng(0).integers(0, 255, (48, 48, 3), dtype=np.uint8)
    smooth = Image.fromarray(noise).resize((72, 72), Image.Resampling.BICUBIC)
    folder, out = tmp_path / "fuzz", tmp_path / "out"
    folder.mkdir()
    for suffix, options in ((".jpg", {"quality": 60}), (".png", {}), (".gif", {}), (".webp", {"quality": 50})):
        smooth.save(tmp_path / f"whole{suffix}", **options)
    for suffix in (".mp4", ".mkv"):
        write_video(tmp_path / f"whole{suffix}", (np.roll(noise, n, axis=0) for n in range(6)))
    for suffix, number in ((".jpg", 110), (".png", 110), (".gif", 30), (".webp", 30), (".mp4", 25), (".mkv", 15)):
        content = (tmp_path / f"whole{suffix}").read_bytes()
        for each in range(number):
            (folder / f"{each:03d}{suffix}").write_bytes(_mutated(content, rng))
    account = run(predictor, folder, {}, out=out, frames=4)
    told = account.to_dict()
    assert told["inputs"] == len(records(out)) == 320
    assert told["failed"] > 80
    assert told["no_face"] + told["scored"] > 30  # some mutations do no harm
    for record in records(out):
        assert (record["error"] is None) == (record["verdict"] is not None)
        # Each error was foreseen: it names the file and says what to make of it.
        assert record["error"] is None or "cannot be scored (" not in record["error"], record["error"]
