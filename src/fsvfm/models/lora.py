"""LoRA: trainable low-rank updates of a frozen backbone's linear layers (Hu et al., ICLR 2022), by the peft library.

A layer computes W x + b + alpha / rank · B A x with W and b frozen, A (rank, in) and B (out, rank) trained; B starts at
zero, so that training begins at the pre-trained network. `fold` puts the update into W: exports are plain detectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fsvfm.errors import CheckpointError, ConfigError

#: Linear layers of a transformer block that may be updated, by the names in ``tune.lora.targets``.
LAYERS = {"qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}

# peft's names: the original layer moves one level down, beside the two matrices of the only update there is.
_BASE, _A, _B = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"


def add_lora(
    backbone: VisionTransformer, *, rank: int, alpha: float, dropout: float = 0.0, targets: Sequence[str]
) -> None:
    """Put low-rank updates into every block of a backbone, in place; afterwards they alone are trainable in it.

    Args:
        backbone: timm ViT.
        rank: of the updates; an (out, in) layer gets rank · (in + out) parameters.
        alpha: the update counts alpha / rank times.
        dropout: on the input of the update, in [0, 1).
        targets: keys of :data:`LAYERS`.

    Raises:
        ConfigError: an impossible value; all are named.
    """
    unknown = [target for target in targets if target not in LAYERS]
    wrong = []
    if unknown or not targets:
        wrong.append(f"tune.lora.targets={list(targets)}: expected some of {', '.join(LAYERS)}")
    if not isinstance(rank, int) or not 1 <= rank <= backbone.embed_dim:
        wrong.append(f"tune.lora.rank={rank}: expected a whole number from 1 to the width {backbone.embed_dim}")
    if alpha <= 0:
        wrong.append(f"tune.lora.alpha={alpha}: expected a positive number (alpha / rank scales the update)")
    if not 0.0 <= dropout < 1.0:
        wrong.append(f"tune.lora.dropout={dropout}: expected a value in [0, 1)")
    if wrong:
        raise ConfigError("; ".join(wrong))
    # Imported here: it takes seconds, and no other way of tuning needs it.
    from peft import LoraConfig, inject_adapter_in_model

    # A pattern of whole names: a list of endings would also find the patch embedding's `proj`.
    layers = "|".join(LAYERS[target].replace(".", r"\.") for target in targets)
    settings = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # declared whole, used as a factor
        lora_dropout=dropout,
        target_modules=rf"blocks\.\d+\.({layers})",
        bias="none",
    )
    inject_adapter_in_model(settings, backbone)


def is_lora_dropout(name: str) -> bool:
    """Whether a module of this name is the dropout on an update's input."""
    return ".lora_dropout." in name


def renamed_for(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A plain network's tensors under the names they have in a module with low-rank updates (or without: unchanged)."""
    own = set(module.state_dict())

    def name(key: str) -> str:
        layer, _, leaf = key.rpartition(".")
        moved = f"{layer}{_BASE}{leaf}"
        return moved if moved in own else key

    return {name(key): tensor for key, tensor in state.items()}


def has_lora(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict holds low-rank updates."""
    return any(key.endswith(_A) for key in state)


def fold(state: Mapping[str, Tensor], *, alpha: float) -> dict[str, Tensor]:
    """The plain network that a network with low-rank updates computes: W + alpha / rank · B A in the place of W.

    Args:
        state: tensors of a network with updates, under peft's names.
        alpha: as in :func:`add_lora`; the rank is that of A.

    Returns:
        the tensors of the plain network, under its names; tensors without an update are the same objects.

    Raises:
        CheckpointError: an update that is incomplete or does not fit its layer.
    """
    plain = {key.replace(_BASE, "."): tensor for key, tensor in state.items() if ".lora_" not in key}
    for key, a in state.items():
        if not key.endswith(_A):
            continue
        layer = key.removesuffix(_A)
        b, weight = state.get(f"{layer}{_B}"), plain.get(f"{layer}.weight")
        if b is None or weight is None or b.shape[1] != len(a) or weight.shape != (len(b), a.shape[1]):
            raise CheckpointError(
                f"the low-rank update of {layer} is incomplete or of another size than the layer: A "
                f"{tuple(a.shape)}, B {None if b is None else tuple(b.shape)}, "
                f"W {None if weight is None else tuple(weight.shape)}"
            )
        update = (alpha / len(a)) * (b.float() @ a.float())
        plain[f"{layer}.weight"] = (weight.float() + update).to(weight.dtype)
    return plain
