"""Whose face it is, on photographs of people who are in several of them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fsvfm.errors import DataError, FaceModelError
from fsvfm.faces.detect import DlibHOG
from fsvfm.faces.identity import Person, Recogniser
from fsvfm.faces.images import load_image
from fsvfm.faces.track import SAME_PERSON

#: Photographs of the development set, by person.
PEOPLE = (("011", "012"), ("014", "015"), ("018", "019"), ("020", "021"))


@pytest.fixture(scope="module")
def people(media_dir: Path) -> list[list[Person]]:
    recogniser, detector = Recogniser(), DlibHOG()
    images = [[load_image(media_dir / "photos" / f"{number}.jpg") for number in each] for each in PEOPLE]
    return [[recogniser(image, detector(image)[0].box) for image in each] for each in images]


def test_faces_of_one_person_are_near_and_those_of_two_are_not(people: list[list[Person]]) -> None:
    descriptors = [[person.descriptor for person in each] for each in people]
    assert descriptors[0][0].shape == (128,)
    for number, (one, other) in enumerate(descriptors):
        assert np.linalg.norm(one - other) < SAME_PERSON
        for stranger in descriptors[:number]:
            assert min(np.linalg.norm(a - b) for a in (one, other) for b in stranger) > SAME_PERSON


def test_several_threads_may_ask_at_once(people: list[list[Person]]) -> None:
    expected = [person.descriptor for each in people for person in each]
    again = [Person(person._chip, person._network) for each in people for person in each]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda person: person.descriptor, again))
    np.testing.assert_array_equal(found, expected)


def test_what_is_wrong_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    image, box = np.full((90, 90, 3), 127, np.uint8), (10, 10, 70, 70)
    with pytest.raises(DataError, match="uint8"):
        Recogniser()(image.astype(float), box)  # type: ignore[arg-type]
    package = tmp_path / "face_recognition_models"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(FaceModelError, match=r"face recognition network .* is missing"):
        Recogniser()
    for name in ("dlib_face_recognition_resnet_model_v1.dat", "shape_predictor_5_face_landmarks.dat"):
        (package / "models" / name).write_text("no model")
    with pytest.raises(FaceModelError, match="is not dlib's"):
        Recogniser()(image, box)  # type: ignore[arg-type]
