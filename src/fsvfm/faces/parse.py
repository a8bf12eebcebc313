"""Face parsing: which pixel is skin, eyebrow, eye, nose, lip, hair or background.

Two backends behind one interface (:class:`FaceParser`): ``facer`` is the papers' parser (FSFM, implementation details;
a network, weights to fetch), ``landmarks`` works offline from dlib's 68 points.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import scipy.ndimage
import torch

from fsvfm.errors import ConfigError, DataError, FaceModelError
from fsvfm.faces.detect import DlibHOG, FaceDetector, check_rgb
from fsvfm.faces.landmarks import Landmarks68
from fsvfm.faces.networks import DETECTOR, DETECTOR_URL, Weights, facer_network, require_facer
from fsvfm.regions import LABELS

_LABEL = {name: index for index, name in enumerate(LABELS)}


class FaceParser(Protocol):
    """Anything that parses a face crop."""

    def __call__(self, face: np.ndarray, landmarks: np.ndarray | None = None) -> np.ndarray | None:
        """Label every pixel of a face crop.

        Args:
            face: (S, S, 3) uint8 RGB crop of any side.
            landmarks: (68, 2) float, x and y in pixels **of the crop**, if they are known already; a backend that
                does not need them ignores them.

        Returns:
            (S, S) uint8 labels in the order of :data:`fsvfm.regions.LABELS`; None if no face was found in the crop.
            Callers count and list such crops.

        Raises:
            DataError: not such a crop, or not such landmarks.
            FaceModelError: the backend or its weights are not available.
        """
        ...


# --- Parsing from landmarks ------------------------------------------------------------------------------------------
# Lengths are in units of the face height h (nose root 27 to chin 8), widths beside the face in units of half the jaw's
# width a (points 0 and 16). They are general proportions, fitted once on photographs against a segmentation network.

_BROW_THICKNESS = 0.045  # dlib's points run along the upper edge of the brow
_BROW_OUTER_END = 0.05  # the outermost point lies beyond the hair of the brow, by this part of its length
_EYE_WIDTH = 0.87  # the corner points lie outside the open eye
_EYE_LIFT = 0.0044
_NOSE_ROOT_ABOVE, _NOSE_ROOT_HALF_WIDTH = 0.035, 0.0225
_NOSE_WING_WIDER, _NOSE_SIDE_WIDER, _NOSE_SIDE_ABOVE = 0.0175, 0.0375, 0.14
_MOUTH_WIDTH, _MOUTH_HEIGHT = 0.97, 0.91

_FOREHEAD_HEIGHT, _FOREHEAD_WIDTH = 0.735, 0.84  # half axes of the arc over points 0 and 16
_ARC_EXPONENT = 3.4  # of the superellipse; 2 would be an ellipse
_HEAD_WIDTH, _HEAD_HEIGHT = 1.225, 1.225  # the hair's outer arc relative to a and to the forehead's arc

_SOFT_HAIRLINE, _SOFT_CHEEK, _SOFT_HEAD = 0.04, 0.01, 0.11  # how sure the arcs are: widths of their logistic edges
_HAIRLINE_FROM = -0.13  # above this height (0: points 0 and 16) hair may hang over the forehead
_SIDE_HAIR_TO, _SIDE_HAIR_FADE = 0.7, 0.2  # hair beside the face grows unlikely around this height
_EAR_FROM, _EAR_FADE, _EAR_CHANCE = 0.09, 0.05, 0.75  # below this height skin beside the face is ear or neck

_COLOUR_GRID, _COLOUR_BINS, _COLOUR_ROUNDS = 112, 16, 3
_COLOUR_FLOOR = 4e-4  # chance of a colour that a region has not shown yet
_COLOUR_BLUR = 0.4  # pixels of the colour grid


class LandmarkParser:
    """Offline approximation of a parsing network: polygons through dlib's 68 landmarks, hair by place and colour.

    Eyebrows, eyes, nose, lips and inner mouth are polygons through their landmarks. Skin reaches from the jaw line to
    an arc over the forehead, hair lies in a larger arc above and beside it. Both arcs are only likely places: the
    picture's own colours of skin, hair and background, estimated in these places, decide where they meet. Glasses
    count as skin, ears and neck as background. Hair below the chin, hats, hands and strong profiles come out wrong.

    Measured on 96 photographs against an independent segmentation network, F1 over 16-pixel patches of a 224-pixel
    crop: eyebrows 0.90, eyes 0.94, nose 0.95, mouth 0.96, boundary 0.83, hair 0.71, skin 0.97, background 0.86. The
    proportions were fitted on the same photographs; fitted anew on one half of them and measured on the other, hair
    is 0.03 lower, eyes, boundary and background by up to 0.02, the rest the same.

    Args:
        detector: finds the face where the caller gives no landmarks; default dlib's HOG detector.
        landmarks: predicts the points then; default dlib's predictor.

    Raises:
        FaceModelError: the landmark predictor's file is missing.
    """

    def __init__(self, detector: FaceDetector | None = None, landmarks: Landmarks68 | None = None) -> None:
        self.detector = detector or DlibHOG()
        self.landmarks = landmarks or Landmarks68()

    def __call__(self, face: np.ndarray, landmarks: np.ndarray | None = None) -> np.ndarray | None:
        """See :class:`FaceParser`; with ``landmarks`` given, a face is taken to be there."""
        check_rgb(face)
        if landmarks is None:
            found = self.detector(face)
            if not found:
                return None
            landmarks = self.landmarks(face, found[0].box)
        if landmarks.shape != (68, 2) or not np.isfinite(landmarks).all():
            raise DataError(f"expected 68 finite landmarks (68, 2), got {landmarks.dtype} {landmarks.shape}")
        points = landmarks.astype(np.float64)
        frame = _Frame(points)
        labels = _skin_and_hair(face, points, frame)
        for label, polygon in _features(points, frame):
            _fill(labels, polygon, _LABEL[label])
        return labels


class _Frame:
    """The face's own axes: unit vectors to the image right and to the chin, centre between 0 and 16, and its sizes."""

    def __init__(self, points: np.ndarray) -> None:
        across = points[42:48].mean(axis=0) - points[36:42].mean(axis=0)
        self.height = float(np.linalg.norm(points[8] - points[27]))
        self.half_width = float(np.linalg.norm(points[16] - points[0])) / 2
        if np.linalg.norm(across) < 1 or self.height < 1 or self.half_width < 1:
            raise DataError("the landmarks span less than a pixel; were they given in pixels of the crop?")
        self.right = across / np.linalg.norm(across)
        self.down = np.array([-self.right[1], self.right[0]])
        self.centre = (points[0] + points[16]) / 2

    def stretch(self, polygon: np.ndarray, across: float, along: float) -> np.ndarray:
        """Scale a polygon about its mean along the face's axes."""
        middle = polygon.mean(axis=0)
        offset = polygon - middle
        return (
            middle
            + np.outer(offset @ self.right * across, self.right)
            + np.outer(offset @ self.down * along, self.down)
        )


def _features(points: np.ndarray, frame: _Frame) -> list[tuple[str, np.ndarray]]:
    """Polygons of the inner face in the order of painting; left and right are those of the image, as in LaPa."""
    right, down = frame.right * frame.height, frame.down * frame.height
    polygons = []
    for name, brow, outer in (("left_eyebrow", points[17:22], 0), ("right_eyebrow", points[22:27], -1)):
        upper = brow.copy()
        upper[outer] += (brow[-1 - outer] - brow[outer]) * _BROW_OUTER_END
        polygons.append((name, np.concatenate([upper, (upper + down * _BROW_THICKNESS)[::-1]])))
    for name, eye in (("left_eye", points[36:42]), ("right_eye", points[42:48])):
        polygons.append((name, frame.stretch(eye, _EYE_WIDTH, 1.0) - down * _EYE_LIFT))
    root = points[27] - down * _NOSE_ROOT_ABOVE
    left_wing, right_wing = points[31], points[35]
    nose = [
        root - right * _NOSE_ROOT_HALF_WIDTH,
        root + right * _NOSE_ROOT_HALF_WIDTH,
        right_wing - down * _NOSE_SIDE_ABOVE + right * _NOSE_SIDE_WIDER,
        right_wing + right * _NOSE_WING_WIDER,
        points[34],
        points[33],
        points[32],
        left_wing - right * _NOSE_WING_WIDER,
        left_wing - down * _NOSE_SIDE_ABOVE - right * _NOSE_SIDE_WIDER,
    ]
    polygons.append(("nose", np.array(nose)))
    mouth = frame.stretch(points[48:68], _MOUTH_WIDTH, _MOUTH_HEIGHT)  # 0–11 outline of the lips, 12–19 of the opening
    polygons.append(("upper_lip", mouth[[0, 1, 2, 3, 4, 5, 6, 16, 15, 14, 13, 12]]))
    polygons.append(("lower_lip", mouth[[0, 12, 19, 18, 17, 16, 6, 7, 8, 9, 10, 11]]))
    polygons.append(("inner_mouth", mouth[12:20]))
    return polygons


def _skin_and_hair(face: np.ndarray, points: np.ndarray, frame: _Frame) -> np.ndarray:
    """(H, W) uint8 labels skin, hair or background: a likely place for each, weighed with the colours found there."""
    size = (_COLOUR_GRID, _COLOUR_GRID)
    prior = _places(points, frame, face.shape[0], face.shape[1])
    lab = cv2.cvtColor(cv2.resize(face, size, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2LAB)
    bins = lab.astype(np.int64) * _COLOUR_BINS // 256
    colour = (bins[..., 0] * _COLOUR_BINS + bins[..., 1]) * _COLOUR_BINS + bins[..., 2]
    posterior = prior
    for _ in range(_COLOUR_ROUNDS):
        chance = [_colour_chances(colour, posterior[..., place])[colour] for place in range(3)]
        # Ears and neck share the colours of the face.
        posterior = prior * np.stack([*chance, chance[0]], axis=-1)
        posterior /= posterior.sum(axis=-1, keepdims=True)
        posterior = cv2.GaussianBlur(posterior, (0, 0), _COLOUR_BLUR)
    labels = np.array([_LABEL["skin"], _LABEL["hair"], 0, 0], dtype=np.uint8)[posterior.argmax(axis=-1)]
    return cv2.resize(labels, (face.shape[1], face.shape[0]), interpolation=cv2.INTER_NEAREST)


def _places(points: np.ndarray, frame: _Frame, height: int, width: int) -> np.ndarray:
    """(G, G, 4) float64 chances of skin, hair, background, and ear or neck, from the position alone; they sum to 1."""
    scale = np.array([_COLOUR_GRID / width, _COLOUR_GRID / height])
    angle = np.linspace(0, np.pi, 25)[1:-1]
    power = 2 / _ARC_EXPONENT
    across = np.sign(np.cos(angle)) * np.abs(np.cos(angle)) ** power * frame.half_width * _FOREHEAD_WIDTH
    along = np.sin(angle) ** power * frame.height * _FOREHEAD_HEIGHT
    forehead = frame.centre + np.outer(across, frame.right) - np.outer(along, frame.down)
    inside = np.zeros((_COLOUR_GRID, _COLOUR_GRID), dtype=np.uint8)
    _fill(inside, np.concatenate([points[:17], forehead]) * scale, 1)
    distance = cv2.distanceTransform(inside, cv2.DIST_L2, 3) - cv2.distanceTransform(1 - inside, cv2.DIST_L2, 3)

    rows, columns = np.mgrid[:_COLOUR_GRID, :_COLOUR_GRID]
    offset = np.stack([columns, rows], axis=-1) / scale - frame.centre
    down = offset @ frame.down / frame.height
    aside = np.abs(offset @ frame.right) / (frame.half_width * _HEAD_WIDTH)
    above = np.maximum(-down, 0) / (_FOREHEAD_HEIGHT * _HEAD_HEIGHT)
    radius = (aside**_ARC_EXPONENT + above**_ARC_EXPONENT) ** (1 / _ARC_EXPONENT)  # 1 on the outer arc of the hair
    within_head = (1 - radius) * _HEAD_WIDTH * frame.half_width / frame.height

    edge = np.where(down < _HAIRLINE_FROM, _SOFT_HAIRLINE, _SOFT_CHEEK)
    skin = _logistic(distance / (frame.height * scale.mean()) / edge)
    hair = _logistic(within_head / _SOFT_HEAD) * _logistic((_SIDE_HAIR_TO - down) / _SIDE_HAIR_FADE)
    ear = _EAR_CHANCE * _logistic((down - _EAR_FROM) / _EAR_FADE)
    rest = (1 - skin) * (1 - ear)
    return np.stack([skin, rest * hair, rest * (1 - hair), (1 - skin) * ear], axis=-1)


def _colour_chances(colour: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Smoothed histogram of the colours of a place: (bins³,) float64, every entry above 0."""
    counts = np.bincount(colour.ravel(), weight.ravel(), _COLOUR_BINS**3).reshape((_COLOUR_BINS,) * 3)
    for axis in range(3):
        counts = scipy.ndimage.convolve1d(counts, [0.25, 0.5, 0.25], axis=axis, mode="nearest")
    return counts.ravel() / max(counts.sum(), 1e-12) + _COLOUR_FLOOR


def _logistic(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -30, 30)))


def _fill(labels: np.ndarray, polygon: np.ndarray, value: int) -> None:
    """Paint a polygon in place, to a sixteenth of a pixel; it may reach beyond the array."""
    cv2.fillPoly(labels, [np.round(polygon * 16).astype(np.int32)], value, shift=4)


# --- Parsing with FACER ----------------------------------------------------------------------------------------------

_RELEASES = "https://github.com/FacePerceiver/facer/releases/download/models-v1"
PARSER_URL = f"{_RELEASES}/face_parsing.farl.lapa.main_ema_136500_jit191.pt"

#: FACER's own label names; its r and l are the person's right and left, LaPa's left and right those of the image.
_FACER_LABELS = {
    "background": "background",
    "face": "skin",
    "rb": "left_eyebrow",
    "lb": "right_eyebrow",
    "re": "left_eye",
    "le": "right_eye",
    "nose": "nose",
    "ulip": "upper_lip",
    "imouth": "inner_mouth",
    "llip": "lower_lip",
    "hair": "hair",
}


class FacerParser:
    """The papers' parser: RetinaFace (``retinaface/mobilenet``) and FaRL (``farl/lapa/448``) of the package facer.

    Only the face with the highest detection score is labelled. The networks are loaded at the first call (fetching
    their weights once, if no path is given) and are not pickled.

    Args:
        device: torch device; default the GPU where there is one.
        threshold: least detection score.
        model_path: FaRL's TorchScript file, if it is not to be fetched from :data:`PARSER_URL`.
        detector_path: RetinaFace's file, if it is not to be fetched from :data:`DETECTOR_URL`.

    Raises:
        FaceModelError: the package is missing, or a given path does not exist.
    """

    def __init__(
        self,
        device: str | None = None,
        threshold: float = 0.3,
        model_path: str | Path | None = None,
        detector_path: str | Path | None = None,
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.threshold = threshold
        self.model_path = model_path
        self.detector_path = detector_path
        require_facer(*self._weights())
        self._networks: tuple[Any, Any, np.ndarray] | None = None

    def __call__(self, face: np.ndarray, landmarks: np.ndarray | None = None) -> np.ndarray | None:
        """See :class:`FaceParser`; RetinaFace finds the points that FaRL needs, ``landmarks`` are ignored."""
        check_rgb(face)
        return self.batch(face[None])[0]

    def batch(self, faces: np.ndarray) -> list[np.ndarray | None]:
        """Parse many face crops at once, which is what keeps a GPU busy.

        Args:
            faces: (B, S, S, 3) uint8 RGB.

        Returns:
            for every crop what a call gives: (S, S) uint8 labels, or None where no face was found.
        """
        if self._networks is None:
            self._networks = self._load()
        detector, parser, to_label = self._networks
        images = torch.from_numpy(np.ascontiguousarray(faces)).permute(0, 3, 1, 2).to(self.device)
        parsed: list[np.ndarray | None] = [None] * len(faces)
        with torch.inference_mode():
            found = detector(images)
            if len(found["scores"]) == 0:
                return parsed
            best: dict[int, tuple[float, int]] = {}  # of every crop: (score, place among the found)
            for place, (crop, score) in enumerate(
                zip(found["image_ids"].tolist(), found["scores"].tolist(), strict=True)
            ):
                if crop not in best or score > best[crop][0]:
                    best[crop] = score, place
            chosen = torch.tensor([place for _, place in best.values()], device=self.device)
            logits = parser(images, {key: value[chosen] for key, value in found.items()})["seg"]["logits"]
            for crop, labels in zip(best, logits.argmax(dim=1).cpu().numpy(), strict=True):
                parsed[crop] = to_label[labels]
        return parsed

    def _weights(self) -> tuple[Weights, Weights]:
        return (
            Weights(self.detector_path, "detector_path", DETECTOR_URL),
            Weights(self.model_path, "model_path", PARSER_URL),
        )

    def _load(self) -> tuple[Any, Any, np.ndarray]:
        found, parsed = self._weights()
        detector = facer_network("face_detector", DETECTOR, found, self.device, threshold=self.threshold)
        parser = facer_network("face_parser", "farl/lapa/448", parsed, self.device)
        names = list(parser.label_names)
        if sorted(names) != sorted(_FACER_LABELS):
            raise FaceModelError(
                f"facer's parser labels {names}; expected those of LaPa: {list(_FACER_LABELS)}. "
                "Is another version of facer installed?"
            )
        return detector, parser, np.array([_LABEL[_FACER_LABELS[name]] for name in names], dtype=np.uint8)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_networks": None}


#: Parsers by name, for configurations.
PARSERS: dict[str, Callable[..., FaceParser]] = {"landmarks": LandmarkParser, "facer": FacerParser}


def make_parser(name: str, **options: Any) -> FaceParser:
    """Build a parser from its name in a configuration: ``landmarks`` or ``facer``.

    Raises:
        ConfigError: an unknown name or option.
        FaceModelError: the backend's package or files are missing.
    """
    if name not in PARSERS:
        raise ConfigError(f"unknown face parser {name!r}; known: {', '.join(sorted(PARSERS))}")
    try:
        return PARSERS[name](**options)
    except TypeError as error:
        raise ConfigError(f"face parser {name!r}: {error}") from error
