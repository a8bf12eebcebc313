"""Networks for other programs: a timm state dict, ONNX, and torch.export, each compared with ours once it is written.

What runs elsewhere is a :class:`Portable`: uint8 pixels in, so that the normalisation can be neither forgotten nor done
twice, and scores (or features) out.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsvfm.checkpoint import Checkpoint, encoder_state, load_backbone, normalisation
from fsvfm.errors import CheckpointError, ConfigError, DataError
from fsvfm.exports import is_vit
from fsvfm.loading import load_into
from fsvfm.metrics.calibration import CLIP
from fsvfm.models import timm_backbone
from fsvfm.models.detector import build_backbone, build_detector
from fsvfm.models.vit import ViTConfig

#: Largest difference to ours that a written file may have: of scores, and of features relative to the largest one.
TOLERANCE = {"timm": 1e-6, "onnx": 1e-4, "torch_export": 1e-5}

#: timm's plain ViTs: patch size, width, depth, heads; all for 224 pixels.
TIMM_SIZES = {
    "vit_base_patch16_224": (16, 768, 12, 12),
    "vit_tiny_patch16_224": (16, 192, 12, 3),
    "vit_small_patch16_224": (16, 384, 12, 6),
    "vit_large_patch16_224": (16, 1024, 24, 16),
    "vit_huge_patch14_224": (14, 1280, 32, 16),
}
_TIMM_ARGUMENTS = ("patch_size", "embed_dim", "depth", "num_heads", "img_size")

#: Protocol buffers, which ONNX files are, hold less than 2 GiB; the weights of larger networks lie in a file beside.
_ONNX_LIMIT = 1_900_000_000

#: The largest margin that a score in double precision shows; calibration takes no larger one (as CLIP says).
_LARGEST_MARGIN = float(np.log((1 - CLIP) / CLIP))

Images = np.ndarray
Outputs = dict[str, np.ndarray]


class Portable(nn.Module):
    """A network with its normalisation inside.

    Args:
        network: a :class:`~fsvfm.models.detector.Detector`, or a backbone that gives features.
        meta: the checkpoint's metadata.
        mean: per RGB channel, of pixels in [0, 1].
        std: likewise.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, network: nn.Module, meta: Mapping[str, Any], mean: Iterable[float], std: Iterable[float]
    ) -> None:
        super().__init__()
        self.network = network
        self.meta = dict(meta)
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, 255 * torch.tensor([*values]).view(1, 3, 1, 1), persistent=False)
        self.eval()

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, which: str = "online") -> Self:
        """Build the network of a checkpoint, in evaluation mode on the CPU.

        Args:
            checkpoint: a detector; of any other kind the encoder, with mean pooling as fine-tuning starts from it.
            which: ``online`` or ``target``, for pre-training checkpoints.

        Raises:
            CheckpointError: its normalisation is not known, or there is no such network in it.
        """
        meta = checkpoint.meta
        mean, std = normalisation(checkpoint)
        if checkpoint.kind == "detector":
            quirk = bool(meta["tune"].get("quirk", False))
            network: nn.Module = build_detector(
                meta["model"], meta["tune"], meta["class_order"], task=meta["task"], quirk=quirk
            )
            load_into(network, checkpoint.state)
        else:
            network = build_backbone(meta["model"])
            load_backbone(network, checkpoint, which)
            names = [field.name for field in fields(ViTConfig)] if is_vit(meta["model"]) else [*meta["model"]]
            meta = {**meta, "kind": "encoder", "model": {name: meta["model"][name] for name in names}}
        return cls(network, meta, mean, std)

    @property
    def image_size(self) -> int:
        """Side of the input in pixels."""
        return int(self.meta["model"]["image_size"])

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of what :meth:`forward` gives."""
        if self.meta["kind"] != "detector":
            return ("features",)
        return ("score", "probability") if self.meta.get("calibration") else ("score",)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Score face crops, or describe them.

        Args:
            images: (B, 3, S, S) uint8 RGB.

        Returns:
            of a detector ``score`` (B,) = P(fake), and ``probability`` (B,), the calibrated one, where the checkpoint
            is calibrated; of an encoder ``features`` (B, dim). All float32.

        Raises:
            DataError: images of another size or type.
        """
        size = self.image_size
        if images.dtype != torch.uint8 or images.dim() != 4 or tuple(images.shape[1:]) != (3, size, size):
            raise DataError(
                f"expected RGB pixels 0–255 as uint8 of shape (B, 3, {size}, {size}), got {images.dtype} "
                f"{tuple(images.shape)}; the normalisation is inside the model"
            )
        pixels = (images.float() - self.mean) / self.std
        if self.meta["kind"] != "detector":
            return {"features": self.network(pixels).float()}
        logits = self.network(pixels).logits.float()
        fake = self.meta["class_order"].index("fake")
        margin = logits[:, fake] - logits[:, 1 - fake]
        found = {"score": torch.sigmoid(margin)}
        if calibration := self.meta.get("calibration"):
            margin = margin.clamp(-_LARGEST_MARGIN, _LARGEST_MARGIN)
            found["probability"] = torch.sigmoid(margin / calibration["temperature"])
        return found

    def run(self, images: Images) -> Outputs:
        """:meth:`forward` on arrays, without gradients."""
        with torch.inference_mode():
            return {name: value.cpu().numpy() for name, value in self(torch.from_numpy(images)).items()}


def used_keys(checkpoint: Checkpoint, which: str = "online", *, head: bool = True) -> list[str]:
    """The tensors of a checkpoint that a :class:`Portable` of it computes with, or without its head."""
    if checkpoint.kind == "detector":
        return [key for key in checkpoint.state if head or not key.startswith("head.")]
    inside = encoder_state(checkpoint, which)
    prefix = f"{which}.encoder." if checkpoint.kind == "pretrain" else "encoder."
    return [f"{prefix}{key}" for key in inside if not key.startswith("norm.")]


# ---------------------------------------------------------------------------------------------------------- comparing


class Change(NamedTuple):
    """How far outputs are from ours: the largest and the mean absolute difference, and the largest value of ours."""

    largest: float
    mean: float
    scale: float


def sample_images(size: int, count: int = 8) -> Images:
    """Generated pictures (N, 3, S, S) uint8, always the same: patches of colour with some noise, in rising contrast."""
    generator = torch.Generator().manual_seed(0)
    patches = torch.rand(count, 3, 5, 5, generator=generator)
    noise = torch.rand(count, 3, size, size, generator=generator) - 0.5
    smooth = F.interpolate(patches, size=(size, size), mode="bilinear")
    contrast = torch.linspace(0.1, 1, count).view(-1, 1, 1, 1)  # a detector may be too sure of gaudy ones to compare
    return (255 * (0.5 + contrast * (smooth - 0.5 + 0.2 * noise)).clamp(0, 1)).to(torch.uint8).numpy()


def change(ours: Outputs, theirs: Outputs) -> Change:
    """Compare outputs of the same images.

    Raises:
        CheckpointError: other names or shapes, or numbers that are not finite.
    """
    shapes = [{name: values.shape for name, values in found.items()} for found in (ours, theirs)]
    if shapes[0] != shapes[1]:
        raise CheckpointError(f"the written model gives {shapes[1]} where ours gives {shapes[0]}")
    if not all(np.isfinite(values).all() for found in (ours, theirs) for values in found.values()):
        raise CheckpointError("the model's outputs are not finite on generated pictures; its weights are damaged")
    differences = [np.abs(ours[name].astype(np.float64) - theirs[name]) for name in ours]
    scale = max(1.0, *(float(np.abs(values).max()) for values in ours.values()))
    return Change(max(float(d.max()) for d in differences), float(np.mean([d.mean() for d in differences])), scale)


def compare(model: Portable, run: Callable[[Images], Outputs]) -> Change:
    """A written model against ours, on generated pictures in batches of several sizes (1, 3 and 4)."""
    images = sample_images(model.image_size)
    ours = model.run(images)
    parts = [run(part) for part in np.split(images, [1, 4])]
    return change(ours, {name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def require_agreement(model: Portable, run: Callable[[Images], Outputs], kind: str) -> Change:
    """:func:`compare`, as an error where the difference is larger than a change of library explains.

    Raises:
        CheckpointError: it is.
    """
    found = compare(model, run)
    if found.largest > TOLERANCE[kind] * found.scale:
        raise CheckpointError(
            f"format={kind}: the written model differs from ours by {found.largest:.2g} on generated pictures "
            f"({TOLERANCE[kind]:g} is allowed), so it was not kept; please report this with the versions of "
            "torch, timm, onnx and onnxruntime"
        )
    return found


@contextmanager
def _written(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder for new files; they are moved into `folder` when all went well."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; out=… names a folder")
    if (folder / "model.json").exists():
        raise CheckpointError(f"{folder} is an export of ours, which this would damage; choose another folder")
    temporary = folder / f".{os.getpid()}.tmp"
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in sorted(temporary.iterdir()):
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


# --------------------------------------------------------------------------------------------------------------- timm


class TimmFile(NamedTuple):
    """A file for timm and how to load it."""

    path: Path
    line: str
    change: Change


def timm_arguments(config: ViTConfig, pool: str = "avg") -> tuple[str, dict[str, Any]]:
    """Name that timm has for an architecture, with the arguments in which it is another one.

    Args:
        config: the architecture.
        pool: ``avg`` or ``cls``.

    Returns:
        a name that ``timm.create_model`` knows, and further arguments of it.
    """
    ours = dict(
        zip(
            _TIMM_ARGUMENTS,
            (config.patch_size, config.dim, config.depth, config.heads, config.image_size),
            strict=True,
        )
    )

    def others(name: str) -> dict[str, Any]:
        theirs = dict(zip(_TIMM_ARGUMENTS, (*TIMM_SIZES[name], 224), strict=True))
        return {key: value for key, value in ours.items() if value != theirs[key]}

    name = min(TIMM_SIZES, key=lambda name: ("embed_dim" in others(name), len(others(name))))
    return name, {"num_classes": 0, "global_pool": "avg" if pool == "avg" else "token", **others(name)}


def write_timm(folder: str | os.PathLike[str], model: Portable) -> TimmFile:
    """Write the backbone as ``model.safetensors`` with timm's names, and ``config.json`` with what timm wants to know.

    Raises:
        CheckpointError: timm's features are not ours, or timm has no such network.
    """
    backbone: Any = model.network.backbone if model.meta["kind"] == "detector" else model.network
    pool = (model.meta.get("tune") or {}).get("pool", "avg")
    table = model.meta["model"]
    if is_vit(table):
        name, arguments = timm_arguments(ViTConfig.from_mapping(table), pool)
        facts_of = {"first_conv": "patch_embed.proj", "classifier": "head"}
    elif timm_backbone.architecture(backbone):
        name, arguments = str(table["architecture"]), {"num_classes": 0}
        if timm_backbone.takes_image_size(name):
            arguments["img_size"] = model.image_size
        facts_of = {key: backbone.pretrained_cfg[key] for key in ("first_conv", "classifier")}
    else:
        raise CheckpointError(
            f"format=timm writes a backbone of timm, and a network of model.family={table['family']} has none; choose "
            "format=export, onnx or torch_export"
        )
    mean, std = ([float(v) for v in model.meta[key]] for key in ("mean", "std"))
    size = model.image_size
    facts = {
        "architecture": name,
        "num_classes": 0,
        "global_pool": arguments.get("global_pool"),
        "num_features": backbone.num_features,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [3, size, size], "fixed_input_size": True, "num_classes": 0, "mean": mean, "std": std,
            "interpolation": "bicubic", "crop_pct": 1.0, **facts_of,
        },
    }  # fmt: skip
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in backbone.state_dict().items()}
    with _written(folder) as new:
        file = new / "model.safetensors"
        metadata = {"format": "pt", "architecture": name, "mean": json.dumps(mean), "std": json.dumps(std)}
        safetensors.torch.save_file({key: tensor.clone() for key, tensor in state.items()}, file, metadata=metadata)
        (new / "config.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        theirs = timm.create_model(name, **arguments, checkpoint_path=str(file)).eval()
        features = Portable(theirs, {**model.meta, "kind": "encoder"}, mean, std)
        ours = Portable(backbone, {**model.meta, "kind": "encoder"}, mean, std)
        found = require_agreement(ours, features.run, "timm")
    path = Path(folder) / "model.safetensors"
    words = ", ".join(f"{key}={value!r}".replace("'", '"') for key, value in arguments.items())
    return TimmFile(path, f'timm.create_model("{name}", {words}, checkpoint_path="{path.as_posix()}")', found)


# -------------------------------------------------------------------------------------------------------------- graphs


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters warn about their own internals, partly through logging."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


def properties(model: Portable) -> dict[str, str]:
    """What a program that scores with a written model must know, as text; values that are no plain text are JSON."""
    meta, size = model.meta, model.image_size
    calibration = meta.get("calibration")
    about = {
        "task": meta["task"],
        "model": meta["model"],
        "input": f"images: (N, 3, {size}, {size}) uint8 RGB face crops; the normalisation is inside",
        "mean": meta["mean"],
        "std": meta["std"],
    }
    if meta["kind"] == "detector":
        about |= {
            "class_order": meta["class_order"],
            "score": "P(fake); fake stands for attack in anti-spoofing",
            "calibration": calibration,
            "thresholds": (calibration or {}).get("thresholds"),
        }
    about["licence"] = (meta.get("provenance") or {}).get("licence")
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items() if value}


class Graph(NamedTuple):
    """A written model, how far its outputs are from ours, and a function that runs it on (N, 3, S, S) uint8 arrays."""

    path: Path
    change: Change
    run: Callable[[Images], Outputs]


def write_torch_export(folder: str | os.PathLike[str], model: Portable) -> Graph:
    """Write ``model.pt2`` for ``torch.export.load``: batches of any size, metadata in its extra file ``fsvfm.json``.

    Raises:
        CheckpointError: the file, read again, gives other outputs.
    """
    model = copy.deepcopy(model).requires_grad_(False)
    example = torch.from_numpy(sample_images(model.image_size, 2))
    with _written(folder) as new, _quiet(), torch.no_grad():
        program = torch.export.export(model, (example,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}})
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # with the paths of this machine
        extra = {"fsvfm.json": json.dumps(properties(model), indent=2)}
        torch.export.save(program, new / "model.pt2", extra_files=extra)
        again = torch.export.load(new / "model.pt2").module()

        def run(images: Images) -> Outputs:
            with torch.no_grad():
                return {name: value.numpy() for name, value in again(torch.from_numpy(images)).items()}

        found = require_agreement(model, run, "torch_export")
    return Graph(Path(folder) / "model.pt2", found, run)


def onnx_session(path: str | os.PathLike[str]) -> Callable[[Images], Outputs]:
    """A function that runs an ONNX file on (N, 3, S, S) uint8 arrays with ONNX Runtime on the CPU.

    Raises:
        ConfigError: ONNX Runtime is not installed.
    """
    runtime = _package("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = runtime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda images: dict(zip(names, session.run(names, {"images": images}), strict=True))


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"format=onnx needs the package {name.split('.')[0]}, which cannot be imported ({error}): "
            "pip install 'fsvfm[export]'"
        ) from None


def write_onnx(folder: str | os.PathLike[str], model: Portable, *, int8: bool = False) -> dict[str, Graph]:
    """Write ``model.onnx``: input ``images`` (N, 3, S, S) uint8 for any N, outputs named as those of the model.

    Args:
        folder: made if it is not there.
        model: metadata go into the file's ``metadata_props``; see :func:`properties`.
        int8: also write ``model.int8.onnx``, with the weights of all linear layers as int8 and activations quantised
            as they come (dynamic quantisation).

    Returns:
        ``onnx``, and with `int8` ``int8``, whose outputs are allowed to differ.

    Raises:
        ConfigError: a package is missing.
        CheckpointError: ONNX Runtime's outputs are not ours.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        _package(name)
    model = copy.deepcopy(model).requires_grad_(False)
    example = torch.from_numpy(sample_images(model.image_size, 2))
    large = sum(p.numel() * p.element_size() for p in model.parameters()) > _ONNX_LIMIT
    folder = Path(folder)
    with _written(folder) as new:
        file = new / "model.onnx"
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                model, (example,), dynamo=True, verbose=False, input_names=["images"],
                output_names=[*model.outputs], dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            )  # fmt: skip
        if program is None:
            raise CheckpointError("torch.onnx.export gave no program")
        for node in program.model.graph:
            node.metadata_props.clear()  # stack traces with the paths of this machine
        program.model.metadata_props.update(properties(model))
        program.save(str(file), external_data=large)
        run = onnx_session(file)
        graphs = {"onnx": Graph(folder / file.name, require_agreement(model, run, "onnx"), run)}
        if int8:
            smaller = new / "model.int8.onnx"
            _quantise(file, smaller, properties(model), large)
            run = onnx_session(smaller)
            graphs["int8"] = Graph(folder / smaller.name, compare(model, run), run)
    return graphs


def _quantise(source: Path, target: Path, about: Mapping[str, str], large: bool) -> None:
    onnx, quantization = _package("onnx"), _package("onnxruntime.quantization")
    # Shapes that the exporter noted on weights contradict the quantiser, which transposes some of them.
    plain = onnx.load(source, load_external_data=False)
    del plain.graph.value_info[:]
    between = source.with_name("plain.onnx")  # beside the source, whose file of weights it may refer to
    try:
        onnx.save(plain, between)
        with _quiet():
            # The patch embedding, a convolution, stays as it is: it is little work, and everything depends on it.
            quantization.quantize_dynamic(
                between, target, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True,
                weight_type=quantization.QuantType.QInt8, use_external_data_format=large,
            )  # fmt: skip
    finally:
        between.unlink(missing_ok=True)
    smaller = onnx.load(target, load_external_data=False)
    onnx.helper.set_model_props(smaller, dict(about))
    onnx.save(smaller, target)
