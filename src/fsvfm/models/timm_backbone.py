"""Any backbone of timm in a detector (`model.family=timm`): CNNs, and ViTs that have more parts than the papers' one.

Network, pooling and names of tensors are timm's own: what the classifier of the published weights saw is the feature of
a face. `tune.pool` is for plain ViTs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import timm
from timm.models import group_parameters
from torch import Tensor, nn

from fsvfm.errors import ConfigError
from fsvfm.loading import LoadReport, load_into
from fsvfm.models.heads import AdapterHead, LinearHead


def create(model: Mapping[str, Any], *, drop_path: float = 0.0) -> nn.Module:
    """A backbone without classifier and with initial weights.

    Args:
        model: `architecture` (a name of timm, without a tag), `image_size`, and optionally `grad_checkpointing`.
        drop_path: rate of stochastic depth, in [0, 1), where the architecture has it.

    Raises:
        ConfigError: timm has no such architecture, or the architecture lacks what is asked of it.
    """
    name = str(model.get("architecture"))
    if not timm.is_model(name) or "." in name:
        raise ConfigError(
            f"model.architecture={name!r} is no architecture of timm; expected a name without a tag, such as "
            "legacy_xception (`timm.list_models()` shows all); published weights are chosen by model.init=timm:<name>"
        )
    options: dict[str, Any] = {"num_classes": 0}
    if takes_image_size(name):
        options["img_size"] = int(model["image_size"])
    if drop_path:
        options["drop_path_rate"] = float(drop_path)
    try:
        backbone = timm.create_model(name, pretrained=False, **options)
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise ConfigError(f"timm cannot build {name} with {options}: {error}") from None
        raise ConfigError(
            f"tune.drop_path={drop_path}: {name} has no stochastic depth; give tune.drop_path=0"
        ) from None
    except (AssertionError, ValueError) as error:
        raise ConfigError(f"timm cannot build {name} with {options}: {error}") from None
    patch = getattr(getattr(backbone, "patch_embed", None), "patch_size", None)
    if patch and int(model["image_size"]) % patch[0]:
        raise ConfigError(f"model.image_size={model['image_size']} is not a multiple of the {patch[0]} px of {name}")
    if model.get("grad_checkpointing"):
        try:
            backbone.set_grad_checkpointing(True)
        except (AssertionError, AttributeError):
            raise ConfigError(f"model.grad_checkpointing=true: {name} cannot do that; give false") from None
    return backbone


def takes_image_size(name: str) -> bool:
    """Whether an architecture is built for one image size (ViTs); others (CNNs) take any."""
    facts = timm.get_pretrained_cfg(name)
    return bool(facts is not None and facts.fixed_input_size)


def build(model: Mapping[str, Any], tune: Mapping[str, Any]) -> tuple[nn.Module, nn.Module]:
    """Backbone and head of a detector; see :func:`fsvfm.models.detector.build_detector`.

    Raises:
        ConfigError: as of :func:`create`, or an adapter whose reduction does not divide the width.
    """
    backbone: Any = create(model, drop_path=float(tune.get("drop_path") or 0.0))
    width = int(getattr(backbone, "head_hidden_size", None) or backbone.num_features)
    if tune.get("name") == "adapter":
        return backbone, AdapterHead(width, reduction=int(tune.get("reduction", 4)))
    return backbone, LinearHead(width)


def architecture(backbone: nn.Module) -> str | None:
    """The name in timm of a backbone that :func:`create` built; None of any other network."""
    facts: Any = getattr(backbone, "pretrained_cfg", None)
    return facts.get("architecture") if isinstance(facts, dict) else None


def load(backbone: nn.Module, state: Mapping[str, Tensor], model: Mapping[str, Any]) -> LoadReport:
    """Fill a backbone with the weights of the same architecture, which may be of another image size.

    timm itself brings positions to the other size.

    Args:
        backbone: of :func:`create`.
        state: timm's names → tensors, without a classifier.
        model: of the weights: `architecture`, `image_size`.

    Raises:
        CheckpointError: keys or shapes that do not fit.
    """
    own = backbone.state_dict()
    resized = tuple(key for key, tensor in state.items() if key in own and tensor.shape != own[key].shape)
    if resized and hasattr(backbone, "set_input_size"):
        native: Any = create(model)
        load_into(native, state, resize=False)
        native.set_input_size(img_size=cast(Any, backbone).patch_embed.img_size)
        state = native.state_dict()
        return replace(load_into(backbone, state, resize=False), resized=resized)
    return load_into(backbone, state, resize=False)


def layers(backbone: nn.Module) -> dict[str, int]:
    """Layer of every parameter by its name, from 0 (stem) to the last (what follows the blocks), as timm groups them.

    Raises:
        ConfigError: timm does not say for this architecture.
    """
    matcher = getattr(backbone, "group_matcher", None)
    if matcher is None:
        raise ConfigError(
            f"optim.layer_decay: timm has no layers for {architecture(backbone)}; give optim.layer_decay=null"
        )
    found: dict[str, int] = group_parameters(backbone, matcher(coarse=False), reverse=True)
    return found
