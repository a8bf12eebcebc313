from __future__ import annotations

import importlib.machinery
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fsvfm.errors import ConfigError, DataError, FaceModelError
from fsvfm.faces.crop import crop, square_crop
from fsvfm.faces.detect import Box, Detection, DlibHOG
from fsvfm.faces.images import load_image, resize
from fsvfm.faces.landmarks import Landmarks68
from fsvfm.faces.parse import DETECTOR_URL, PARSER_URL, FacerParser, LandmarkParser, make_parser
from fsvfm.regions import LABELS

SIZE = 224


def drawn_face() -> tuple[np.ndarray, np.ndarray]:
    """A schematic upright face: dark hair, light skin, blue background; and its 68 points."""
    image = np.full((SIZE, SIZE, 3), (40, 70, 200), np.uint8)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    aside, down = (columns - 112) / 70.0, rows - 100
    image[(np.abs(aside / 1.25) ** 3 + (np.minimum(down, 0) / 90) ** 2 < 1) & (down < 10)] = (30, 20, 15)
    image[(aside**2 + np.where(down < 0, (down / 72) ** 2, (down / 105) ** 2)) < 1] = (220, 180, 150)
    angle = np.linspace(np.pi, 0, 17)
    points = np.zeros((68, 2))
    points[:17] = np.stack([112 + 70 * np.cos(angle), 100 + 105 * np.sin(angle)], 1)
    points[17:22] = [(62, 84), (72, 79), (82, 78), (92, 80), (100, 83)]
    points[22:27] = [(124, 83), (132, 80), (142, 78), (152, 79), (162, 84)]
    points[27:31] = [(112, 98), (112, 110), (112, 121), (112, 132)]
    points[31:36] = [(97, 142), (104, 145), (112, 147), (120, 145), (127, 142)]
    points[36:42] = [(70, 100), (77, 95), (86, 95), (94, 100), (86, 104), (77, 104)]
    points[42:48] = [(130, 100), (138, 95), (147, 95), (154, 100), (147, 104), (138, 104)]
    points[48:60] = [(84, 170), (95, 164), (105, 161), (112, 163), (119, 161), (129, 164), (140, 170),
                     (129, 180), (119, 184), (112, 185), (105, 184), (95, 180)]  # fmt: skip
    points[60:68] = [(88, 170), (104, 167), (112, 168), (120, 167), (136, 170), (120, 176), (112, 177), (104, 176)]
    return image, points.astype(np.float32)


def place(labels: np.ndarray, name: str) -> tuple[float, float]:
    """Mean x and y of a label."""
    rows, columns = np.nonzero(labels == LABELS.index(name))
    assert len(rows), f"{name} is missing"
    return columns.mean(), rows.mean()


@pytest.fixture(scope="module")
def parser() -> LandmarkParser:
    return LandmarkParser()


def test_every_label_is_where_a_face_has_it(parser: LandmarkParser) -> None:
    face, points = drawn_face()
    labels = parser(face, points)
    assert labels is not None
    assert labels.shape == (SIZE, SIZE)
    assert labels.dtype == np.uint8
    x = {name: place(labels, name)[0] for name in LABELS}
    y = {name: place(labels, name)[1] for name in LABELS}
    assert (
        y["hair"] < y["left_eyebrow"] < y["left_eye"] < y["nose"] < y["upper_lip"] < y["inner_mouth"] < y["lower_lip"]
    )
    # Left and right are the image's, as in LaPa.
    assert x["left_eye"] < x["nose"] < x["right_eye"]
    assert x["left_eyebrow"] < x["nose"] < x["right_eyebrow"]


def test_hair_and_background_follow_the_colours(parser: LandmarkParser) -> None:
    face, points = drawn_face()
    labels = parser(face, points)
    assert labels is not None
    hair, sky, skin = (face[..., 0] == value for value in (30, 40, 220))
    above = np.arange(SIZE)[:, None] < 75  # the brows
    assert (labels[hair & above] == LABELS.index("hair")).mean() > 0.85
    assert (labels[sky & above] == LABELS.index("background")).mean() > 0.85
    assert (labels[skin] != LABELS.index("hair")).mean() > 0.95


def test_a_bald_head_before_the_same_wall_has_little_hair(parser: LandmarkParser) -> None:
    face, points = drawn_face()
    bald = face.copy()
    bald[face[..., 0] == 30] = (40, 70, 200)
    with_hair, without = parser(face, points), parser(bald, points)
    assert with_hair is not None
    assert without is not None
    assert (without == LABELS.index("skin")).sum() > 0.9 * (with_hair == LABELS.index("skin")).sum()


def test_mirroring_the_crop_mirrors_the_labels(parser: LandmarkParser) -> None:
    face, points = drawn_face()
    order = [*range(16, -1, -1), *range(26, 16, -1), *range(27, 31), *range(35, 30, -1),
             45, 44, 43, 42, 47, 46, 39, 38, 37, 36, 41, 40,
             54, 53, 52, 51, 50, 49, 48, 59, 58, 57, 56, 55, 64, 63, 62, 61, 60, 67, 66, 65]  # fmt: skip
    mirrored = (np.float32([SIZE - 1, 0]) + points * np.float32([-1, 1]))[order]
    swap = np.array([0, 1, 3, 2, 5, 4, 6, 7, 8, 9, 10])
    labels, other = parser(face, points), parser(np.ascontiguousarray(face[:, ::-1]), mirrored)
    assert labels is not None
    assert other is not None
    assert (labels == swap[other[:, ::-1]]).mean() > 0.97


@pytest.mark.parametrize("scale", [0.5, 2.5])
def test_the_size_of_the_crop_does_not_matter(scale: float, parser: LandmarkParser) -> None:
    face, points = drawn_face()
    side = int(SIZE * scale)
    labels, scaled = parser(face, points), parser(resize(face, side), points * np.float32(scale))
    assert labels is not None
    assert scaled is not None
    assert scaled.shape == (side, side)
    rows = ((np.arange(side) + 0.5) / scale).astype(int).clip(0, SIZE - 1)
    assert (labels[rows][:, rows] == scaled).mean() > 0.95


def test_parsing_twice_gives_the_same_and_leaves_the_input(parser: LandmarkParser) -> None:
    face, points = drawn_face()
    before, before_points = face.copy(), points.copy()
    np.testing.assert_array_equal(parser(face, points), pickle.loads(pickle.dumps(parser))(face, points))
    np.testing.assert_array_equal(face, before)
    np.testing.assert_array_equal(points, before_points)


@pytest.mark.parametrize("colour", [0, 255])
def test_flat_crops_and_points_outside_are_survived(colour: int, parser: LandmarkParser) -> None:
    _, points = drawn_face()
    labels = parser(np.full((SIZE, SIZE, 3), colour, np.uint8), points * 1.4 - 90)
    assert labels is not None
    assert labels.max() < len(LABELS)


def test_no_face_in_the_crop_is_none(parser: LandmarkParser) -> None:
    assert parser(np.full((SIZE, SIZE, 3), 127, np.uint8)) is None


def test_without_landmarks_the_parser_finds_them(media_dir: Path, parser: LandmarkParser) -> None:
    image = load_image(sorted((media_dir / "photos").iterdir())[1])
    box = DlibHOG()(image)[0].box
    x, y, side = square_crop(box, image.shape[1], image.shape[0])
    points = (Landmarks68()(image, box) - np.float32([x, y])) * np.float32(SIZE / side)
    face = resize(crop(image, x, y, side), SIZE)
    alone, told = parser(face), parser(face, points)
    assert alone is not None
    assert told is not None
    assert (alone == told).mean() > 0.9


def test_bad_landmarks_are_refused(parser: LandmarkParser) -> None:
    face, points = drawn_face()
    for wrong in (points[:5], np.full((68, 2), np.nan, np.float32), points / SIZE, np.zeros((68, 2), np.float32)):
        with pytest.raises(DataError, match="landmarks"):
            parser(face, wrong)
    with pytest.raises(DataError, match="RGB"):
        parser(face[..., 0], points)


def test_a_detector_of_ones_own_is_used() -> None:
    asked = []

    def detector(image: np.ndarray) -> list[Detection]:
        asked.append(image.shape)
        return [Detection(Box(40, 40, 184, 184), 1.0)]

    face, _ = drawn_face()
    assert LandmarkParser(detector=detector)(face) is not None
    assert asked == [face.shape]


# --- facer: a stand-in for the third-party package, with its interface but without its networks -----------------------

NAMES = ["background", "face", "rb", "lb", "re", "le", "nose", "ulip", "imouth", "llip", "hair"]
InstallFacer = Callable[..., dict[str, Any]]


@pytest.fixture
def install_facer(monkeypatch: pytest.MonkeyPatch) -> InstallFacer:
    def install(scores: list[float], names: list[str] = NAMES, error: Exception | None = None) -> dict[str, Any]:
        seen: dict[str, Any] = {}

        def face_detector(name: str, device: torch.device, **options: Any) -> Any:
            seen["detector"] = (name, options)

            def detect(images: torch.Tensor) -> dict[str, torch.Tensor]:
                assert images.dtype == torch.uint8
                seen["images"] = images
                n = len(scores)
                points = torch.arange(n).float()[:, None, None].expand(n, 5, 2)
                return {"scores": torch.tensor(scores), "points": points, "image_ids": torch.zeros(n, dtype=torch.long)}

            return detect

        def face_parser(name: str, device: torch.device, **options: Any) -> Any:
            seen["parser"] = (name, options)
            if error:
                raise error

            class Parser:
                label_names = names

                def __call__(self, images: torch.Tensor, faces: dict[str, torch.Tensor]) -> dict[str, Any]:
                    seen["points"] = faces["points"]
                    # Column x carries the parser's own label x.
                    logits = torch.nn.functional.one_hot(torch.arange(images.shape[3]) % len(names), len(names))
                    return {"seg": {"logits": logits.T[None, :, None].float().expand(1, -1, images.shape[2], -1)}}

            return Parser()

        module = types.ModuleType("facer")
        module.__spec__ = importlib.machinery.ModuleSpec("facer", None)
        module.face_detector, module.face_parser = face_detector, face_parser  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "facer", module)
        return seen

    return install


def test_facer_takes_the_best_face_with_the_papers_models(install_facer: InstallFacer) -> None:
    seen = install_facer([0.4, 0.9, 0.5])
    face = np.random.default_rng(0).integers(0, 255, (11, 11, 3), dtype=np.uint8)
    labels = make_parser("facer", device="cpu")(face)
    assert labels is not None
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, np.tile(np.arange(11), (11, 1)))
    assert seen["detector"] == ("retinaface/mobilenet", {"model_path": None, "threshold": 0.3})
    assert seen["parser"] == ("farl/lapa/448", {"model_path": None})
    np.testing.assert_array_equal(seen["images"][0].permute(1, 2, 0).numpy(), face)
    assert seen["points"].unique().tolist() == [1.0]


def test_a_batch_gives_what_single_calls_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """Crops with two faces, none and one; what a stand-in paints depends on the crop and on the face chosen."""
    found = {0: [0.5, 0.8], 2: [0.9]}

    def face_detector(*_: Any, **__: Any) -> Any:
        def detect(images: torch.Tensor) -> dict[str, torch.Tensor]:
            faces = [
                (crop, score, place)
                for crop, image in enumerate(images)
                for place, score in enumerate(found.get(int(image[0, 0, 0]), []))
            ]
            ids, scores, places = zip(*faces, strict=True) if faces else ((), (), ())
            points = torch.tensor(places, dtype=torch.float)[:, None, None].expand(-1, 5, 2)
            return {"scores": torch.tensor(scores), "image_ids": torch.tensor(ids, dtype=torch.long), "points": points}

        return detect

    def face_parser(*_: Any, **__: Any) -> Any:
        def parse(images: torch.Tensor, faces: dict[str, torch.Tensor]) -> dict[str, Any]:
            label = images[faces["image_ids"], 0, 0, 0].long() * 3 + faces["points"][:, 0, 0].long()
            logits = torch.nn.functional.one_hot(label, len(NAMES)).float()
            return {"seg": {"logits": logits[:, :, None, None].expand(-1, -1, *images.shape[2:])}}

        parse.label_names = NAMES  # type: ignore[attr-defined]
        return parse

    module = types.ModuleType("facer")
    module.__spec__ = importlib.machinery.ModuleSpec("facer", None)
    module.face_detector, module.face_parser = face_detector, face_parser  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "facer", module)
    faces = np.stack([np.full((8, 8, 3), value, np.uint8) for value in (2, 1, 0)])
    parser = FacerParser(device="cpu")
    together = parser.batch(faces)
    assert [None if labels is None else int(labels[0, 0]) for labels in together] == [6, None, 1]
    for one, face in zip(together, faces, strict=True):
        np.testing.assert_array_equal(one, parser(face))
    assert parser.batch(faces[1:2]) == [None]


def test_facer_without_a_face_is_none(install_facer: InstallFacer) -> None:
    install_facer([])
    assert FacerParser(device="cpu")(np.zeros((8, 8, 3), np.uint8)) is None


def test_facer_labels_in_another_order_are_sorted_and_others_refused(install_facer: InstallFacer) -> None:
    install_facer([0.9], names=NAMES[::-1])
    labels = FacerParser(device="cpu")(np.zeros((11, 11, 3), np.uint8))
    assert labels is not None
    np.testing.assert_array_equal(labels[0], np.arange(11)[::-1])
    install_facer([0.9], names=[*NAMES[:-1], "hat"])
    with pytest.raises(FaceModelError, match="hat"):
        FacerParser(device="cpu")(np.zeros((11, 11, 3), np.uint8))


def test_weights_that_cannot_be_fetched_name_file_address_and_place(install_facer: InstallFacer) -> None:
    install_facer([0.9], error=OSError("no network"))
    with pytest.raises(FaceModelError, match="no network") as caught:
        FacerParser(device="cpu")(np.zeros((8, 8, 3), np.uint8))
    message = str(caught.value)
    assert PARSER_URL in message
    assert str(Path(torch.hub.get_dir()) / "checkpoints" / PARSER_URL.rsplit("/", 1)[1]) in message
    assert "model_path" in message


def test_given_weight_files_must_exist_and_are_used(install_facer: InstallFacer, tmp_path: Path) -> None:
    seen = install_facer([0.9])
    with pytest.raises(FaceModelError, match="model_path") as caught:
        FacerParser(model_path=tmp_path / "absent.pt")
    assert PARSER_URL in str(caught.value)
    with pytest.raises(FaceModelError, match="detector_path") as caught:
        FacerParser(detector_path=tmp_path / "absent.pth")
    assert DETECTOR_URL in str(caught.value)
    (tmp_path / "farl.pt").write_bytes(b"x")
    parser = pickle.loads(pickle.dumps(FacerParser(device="cpu", model_path=tmp_path / "farl.pt")))
    parser(np.zeros((11, 11, 3), np.uint8))
    assert seen["parser"][1]["model_path"] == str(tmp_path / "farl.pt")


def test_a_missing_or_failing_package_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delitem(sys.modules, "facer", raising=False)
    (tmp_path / "facer.py").write_text("raise ImportError('libGL.so.1: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(FaceModelError, match="opencv-python-headless"):
        FacerParser(device="cpu")(np.zeros((8, 8, 3), np.uint8))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FaceModelError, match=r"fsvfm\[facer\]"):
        make_parser("facer")


def test_unknown_parsers_and_options() -> None:
    with pytest.raises(ConfigError, match=r"facer.*landmarks"):
        make_parser("bisenet")
    with pytest.raises(ConfigError, match="colour"):
        make_parser("landmarks", colour=False)
    assert isinstance(make_parser("landmarks"), LandmarkParser)
