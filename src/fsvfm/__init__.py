"""FS-VFM: face-security foundation models (arXiv 2510.10663, extending FSFM, arXiv 2412.12032).

The public names are loaded when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fsvfm.library import create_model, evaluate_scores, load_encoder, mask_faces, parse_face
    from fsvfm.predictor import load_detector

_PUBLIC = {
    "create_model": "fsvfm.library",
    "evaluate_scores": "fsvfm.library",
    "load_detector": "fsvfm.predictor",
    "load_encoder": "fsvfm.library",
    "mask_faces": "fsvfm.library",
    "parse_face": "fsvfm.library",
}

__all__ = ["create_model", "evaluate_scores", "load_detector", "load_encoder", "mask_faces", "parse_face"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
