"""The checkpoints one can name: every released FSFM and FS-VFM checkpoint, files on the hub, and local exports.

`resolve` turns what a user writes as a checkpoint (`zoo:<name>`, `hf://<owner>/<repository>/<file>`, a path) into a
local file, downloading what is missing: the file, its target network and its normalisation statistics.
"""

from __future__ import annotations

import difflib
import fnmatch
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from fsvfm.errors import CheckpointError

REPOSITORY = "Wolowolo/fsfm-3c"
LICENCE = "CC BY-NC 4.0"
STATS_FILE = "pretrain_ds_mean_std.txt"
#: Normalisation of every released checkpoint: VGGFace2, per RGB channel, images in [0, 1].
VGGFACE2_MEAN = (0.5482207536697388, 0.42340534925460815, 0.3654651641845703)
VGGFACE2_STD = (0.2789176106452942, 0.2438540756702423, 0.23493893444538116)
_WEIGHT_SUFFIXES = (".pth", ".pt", ".pth.tar", ".ckpt", ".safetensors")
_PREFERRED = ("checkpoint-min_val_loss.pth", "checkpoint.pth")


@dataclass(frozen=True)
class ZooEntry:
    """One released checkpoint, or a local export.

    `file` is a path inside the hub's repository; where it has no suffix it is a folder whose weights file is looked up.
    `epochs` are those of the named task (None: trained by iterations); `class_order` names logits 0 and 1; `tune` is
    how a detector was tuned (None: it is none).
    """

    name: str
    size: str
    data: str
    epochs: int | None
    task: str
    file: str
    target_file: str | None = None
    stats_file: str | None = None
    mean: tuple[float, ...] | None = VGGFACE2_MEAN
    std: tuple[float, ...] | None = VGGFACE2_STD
    class_order: tuple[str, ...] | None = None
    licence: str = LICENCE
    kind: str = "detector"
    tune: str | None = None
    repository: str | None = REPOSITORY

    @property
    def tuning(self) -> str:
        """What the checkpoint is for, in the words of the table."""
        return self.task if self.tune is None else f"{self.task}, {self.tune}"


def _pretrained(name: str, size: str, folder: str, epochs: int, file_epoch: int) -> ZooEntry:
    at = f"pretrained_models/{folder}"
    return ZooEntry(
        name, size, "VGGFace2", epochs, "pretrain", f"{at}/checkpoint-{file_epoch}.pth",
        f"{at}/checkpoint-te-{file_epoch}.pth", f"{at}/{STATS_FILE}", kind="pretrain",
    )  # fmt: skip


def _detector(name: str, size: str, data: str, epochs: int | None, task: str, folder: str) -> ZooEntry:
    at = f"finetuned_models/{folder}"
    return ZooEntry(
        name, size, data, epochs, task, at, stats_file=f"{at}/{STATS_FILE}", class_order=("fake", "real"),
        tune="adapter" if name.endswith("adapter") else "full",
    )  # fmt: skip


def _released() -> list[ZooEntry]:
    dfd, diff, fas = "FF++_c23_32frames", "FF++_DF_c23_32frames", "MCIO_protocol"
    mcio = "MCIO + CelebA-Spoof"
    entries = [
        _pretrained("fsfm_vitb", "vit_base", "VF2_ViT-B", 400, 400),
        _pretrained("fsvfm_vits", "vit_small", "FS-VFM_ViT-S_VF2_600e", 600, 599),
        _pretrained("fsvfm_vitb", "vit_base", "FS-VFM_ViT-B_VF2_600e", 600, 600),
        _pretrained("fsvfm_vitl", "vit_large", "FS-VFM_ViT-L_VF2_600e", 600, 599),
        _detector("fsfm_vitb_dfd", "vit_base", "FF++ c23", 10, "DfD", dfd),
        _detector("fsfm_vitb_diff", "vit_base", "FF++ DeepFakes c23", 10, "DiFF", f"{diff}/correct_version"),
        _detector("fsfm_vitb_fas", "vit_base", mcio, None, "FAS", fas),
    ]
    full, peft = "FS-VFM_extensions", "FS-VFM_extensions/finetune_fs-adapter"
    for letter, size in (("S", "vit_small"), ("B", "vit_base"), ("L", "vit_large")):
        name, model = f"fsvfm_vit{letter.lower()}", f"ViT-{letter}_VF2_600e"
        at = f"{full}/cross_dataset_DFD_and_DiFF/{model}"
        entries += [
            _detector(f"{name}_dfd", size, "FF++ c23", 10, "DfD", f"{at}/FT_on_{dfd}"),
            _detector(f"{name}_diff", size, "FF++ DeepFakes c23", 10, "DiFF", f"{at}/FT_on_{diff}"),
            _detector(f"{name}_fas", size, mcio, None, "FAS", f"{full}/cross_domain_FAS/{model}/{fas}"),
        ]
        at, epochs = f"{peft}/cross_dataset_DfD_and_DiFF/{model}", 60 if letter == "S" else 50
        entries += [
            _detector(f"{name}_dfd_adapter", size, "FF++ c23", epochs, "DfD", f"{at}/FT_on_{dfd}"),
            _detector(f"{name}_diff_adapter", size, "FF++ DeepFakes c23", epochs, "DiFF", f"{at}/FT_on_{diff}"),
            _detector(f"{name}_fas_adapter", size, mcio, None, "FAS", f"{peft}/cross_domain_FAS/{model}/{fas}"),
        ]
    return entries


ZOO: dict[str, ZooEntry] = {entry.name: entry for entry in _released()}


def list_zoo(pattern: str = "*", runs: str | Path | None = None) -> list[ZooEntry]:
    """Released checkpoints whose short name matches a shell pattern, then exports below the folder `runs`."""
    entries = [*ZOO.values(), *(local_exports(runs) if runs is not None else [])]
    return [entry for entry in entries if fnmatch.fnmatch(entry.name, pattern)]


def find(name: str) -> ZooEntry:
    """The entry with this short name.

    Raises:
        CheckpointError: no such name; the nearest ones are suggested.
    """
    if name in ZOO:
        return ZOO[name]
    near = difflib.get_close_matches(name, ZOO, n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}?" if near else f"for example {', '.join(list(ZOO)[:4])}."
    raise CheckpointError(
        f"no checkpoint is called {name!r} in the zoo; {hint} `python -m fsvfm.export list` shows all"
    )


def entry_of_file(repository: str, file: str) -> ZooEntry | None:
    """The released checkpoint that a file of a hub repository belongs to, if any."""
    for entry in ZOO.values():
        if entry.repository == repository and (
            file in (entry.file, entry.target_file) or file.startswith(f"{entry.file}/")
        ):
            return entry
    return None


def local_exports(runs: str | Path) -> list[ZooEntry]:
    """Our own exports (folders with `model.json`) below `runs`, named by their path, which is also how to load them."""
    entries = []
    for path in sorted(Path(runs).glob("**/model.json")):
        try:
            meta = json.loads(path.read_text(encoding="utf-8"))
            provenance = meta.get("provenance") or {}
            entry = ZooEntry(
                name=path.parent.as_posix(),
                size=str(meta["model"]["name"]),
                data=str(provenance.get("data", "–")),
                epochs=provenance.get("epoch"),
                task=str(meta["task"]),
                file=path.parent.as_posix(),
                mean=_triple(meta.get("mean")),
                std=_triple(meta.get("std")),
                class_order=tuple(meta.get("class_order") or ()) or None,
                licence=str(provenance.get("licence", "–")),
                kind=str(meta["kind"]),
                tune=(meta.get("tune") or {}).get("name"),
                repository=None,
            )
            entries.append(entry)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # not one of our exports: another program's model.json is none of our business
    return entries


def _triple(values: Sequence[float] | None) -> tuple[float, ...] | None:
    return None if values is None else tuple(float(value) for value in values)


# ----------------------------------------------------------------------------------------------------------- resolving


@dataclass(frozen=True)
class Resolved:
    """A checkpoint found: its local `path`, the released entry it belongs to, and what a user should be told."""

    path: Path
    entry: ZooEntry | None = None
    notes: tuple[str, ...] = field(default=())


def weights_folder() -> Path:
    """Folder searched before the hub (`<owner>/<repository>/<file>`): `FSVFM_WEIGHTS`, else `weights` in the cache."""
    cache = Path(os.environ.get("FSVFM_CACHE") or Path.home() / ".cache" / "fsvfm")
    return Path(os.environ.get("FSVFM_WEIGHTS") or cache / "weights").expanduser().absolute()


def resolve(source: str | os.PathLike[str], *, target: bool = True) -> Resolved:
    """Find a checkpoint by name, hub address or path, and download what is missing of it.

    Args:
        source: `zoo:<short name>`, `zoo:<short name>/<part of a path>` where a folder holds several files
            (anti-spoofing has one per test set), `hf://<owner>/<repository>[@revision]/<file or folder>`, or a path.
        target: also fetch the target network of a pre-training checkpoint.

    Raises:
        CheckpointError: unknown name, no such file, several files to choose from, or no connection.
    """
    text = os.fspath(source)
    if text.startswith("zoo:"):
        name, _, part = text.removeprefix("zoo:").partition("/")
        entry = find(name)
        return _resolve_hub(entry.repository or REPOSITORY, entry.file, None, part, entry, target)
    if text.startswith("hf://"):
        match = re.fullmatch(r"hf://([^/@]+/[^/@]+)(?:@([^/]+))?/(.+?)/?", text)
        if not match:
            raise CheckpointError(f"{text!r} is no hub address; expected hf://<owner>/<repository>/<file>")
        repository, revision, file = match[1], match[2], match[3]
        return _resolve_hub(repository, file, revision, "", entry_of_file(repository, file), target)
    if text.startswith("timm:"):
        raise CheckpointError(
            f"{text} is more than a file: a model of timm is read by fsvfm.checkpoint.load_checkpoint"
        )
    path = Path(text).expanduser()
    if not path.exists():
        hint = f" Did you mean zoo:{text}?" if text in ZOO else ""
        raise CheckpointError(
            f"no checkpoint at {path}.{hint} A checkpoint is a file, an export folder, hf://… or zoo:<name>"
        )
    return Resolved(path)


def _resolve_hub(
    repository: str, file: str, revision: str | None, part: str, entry: ZooEntry | None, target: bool
) -> Resolved:
    notes: list[str] = []
    if not file.endswith(_WEIGHT_SUFFIXES):
        folder = file
        file = choose_file(_list_folder(repository, folder, revision), folder, part)
        notes.append(f"took {file} from the folder {folder} of {repository}")
    elif part:
        raise CheckpointError(f"zoo entry {entry.name if entry else file} is a single file; drop '/{part}'")
    path = fetch(repository, file, revision)
    name, parent = PurePosixPath(file).name, PurePosixPath(file).parent
    beside = (
        [STATS_FILE] if name.endswith((".pth", ".tar")) else ["model.json"] if name.endswith(".safetensors") else []
    )
    online = re.fullmatch(r"checkpoint-(?!te-)(\d+|min_pretrain_loss)\.pth", name)
    if target and online:
        beside.append(f"checkpoint-te-{online[1]}.pth")
    by_hand = path.is_relative_to(weights_folder())  # then nobody expects a download: what lies beside it counts
    for sibling in beside:
        if by_hand:
            if not (path.parent / sibling).is_file():
                notes.append(f"there is no {sibling} beside {path}")
            continue
        try:
            fetch(repository, (parent / sibling).as_posix(), revision)
        except CheckpointError as error:
            notes.append(f"{sibling} was not fetched from {repository}: {str(error).splitlines()[0]}")
    return Resolved(path, entry, tuple(notes))


def choose_file(files: Sequence[str], folder: str, part: str = "") -> str:
    """Pick the weights file of a folder: of all below it whose path contains `part`, a preferred name or the only one.

    Preferred are `checkpoint-min_val_loss.pth`, then `checkpoint.pth`, then an export, each as high up as possible.

    Raises:
        CheckpointError: nothing fits, or several files do; they are listed.
    """
    below = [f for f in files if f.startswith(f"{folder}/") and f.endswith(_WEIGHT_SUFFIXES)]
    inside = {f: f.removeprefix(f"{folder}/") for f in below}
    fitting = [f for f in below if part.lower() in inside[f].lower()]
    for name in (*_PREFERRED, "model.safetensors"):
        named = sorted((f for f in fitting if PurePosixPath(f).name == name), key=lambda f: f.count("/"))
        if named and (len(named) == 1 or named[0].count("/") < named[1].count("/")):
            return named[0]
        if named:
            fitting = named
            break
    if len(fitting) == 1:
        return fitting[0]
    if not fitting:
        wanted = f" containing {part!r}" if part else ""
        have = "".join(f"\n  {inside[f]}" for f in below) or " none"
        raise CheckpointError(f"no weights file{wanted} in {folder}; weights there:{have}")
    raise CheckpointError(
        f"{folder} holds several checkpoints; name one by adding a part of its path, as in zoo:<name>/<part>:"
        + "".join(f"\n  {inside[f]}" for f in fitting[:40])
    )


def _offline_help(repository: str, file: str, revision: str | None, reason: object) -> CheckpointError:
    first = (str(reason).splitlines() or ["no details"])[0][:200]
    return CheckpointError(
        f"{file} of {repository} is not here and could not be downloaded ({type(reason).__name__}: {first}).\n"
        f"  Address: https://huggingface.co/{repository}/resolve/{revision or 'main'}/{file}\n"
        f"  Put it at: {weights_folder() / repository / file}\n"
        "  (or anywhere, and give that path as the checkpoint; FSVFM_WEIGHTS changes the folder)"
    )


def fetch(repository: str, file: str, revision: str | None = None) -> Path:
    """One file of a hub repository: from `weights_folder()`, else the hub's cache, else downloaded with a progress bar.

    Raises:
        CheckpointError: no such file, or no connection; says the address and where to put the file by hand.
    """
    local = weights_folder() / repository / file
    if local.is_file():
        return local
    try:
        return Path(hf_hub_download(repository, file, revision=revision))
    except LocalEntryNotFoundError as error:  # also an EntryNotFoundError, but it means: offline and not in the cache
        raise _offline_help(repository, file, revision, error) from None
    except EntryNotFoundError:
        raise CheckpointError(
            f"{repository} has no file {file} (https://huggingface.co/{repository}/tree/main)"
        ) from None
    except Exception as error:  # the HTTP library's connection errors share no public base class
        raise _offline_help(repository, file, revision, error) from None


def fetch_address(address: str, folder: str) -> Path:
    """One file of the web: from `weights_folder()/<folder>`, else torch's cache, else downloaded.

    Raises:
        CheckpointError: no connection; says the address and where to put the file by hand.
    """
    import torch

    file = address.rsplit("/", 1)[-1]
    places = [weights_folder() / folder / file, Path(torch.hub.get_dir()) / "checkpoints" / file]
    if found := next((place for place in places if place.is_file()), None):
        return found
    try:
        places[1].parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(address, str(places[1]))  # under a temporary name first
    except OSError as error:
        raise CheckpointError(
            f"{file} is not here and could not be downloaded ({type(error).__name__}: {error}).\n"
            f"  Address: {address}\n"
            f"  Put it at: {places[0]}\n"
            "  (FSVFM_WEIGHTS changes the folder)"
        ) from None
    return places[1]


def _list_folder(repository: str, folder: str, revision: str | None) -> list[str]:
    """Files below a folder: those put there by hand if any, else what the hub says, else what its cache holds."""
    local = weights_folder() / repository
    found = [p.relative_to(local).as_posix() for p in sorted((local / folder).rglob("*")) if p.is_file()]
    if any(file.endswith(_WEIGHT_SUFFIXES) for file in found):
        return found
    try:
        return HfApi().list_repo_files(repository, revision=revision)
    except Exception as error:  # the HTTP library's connection errors share no public base class
        try:
            cache = Path(snapshot_download(repository, revision=revision, local_files_only=True))
            return [p.relative_to(cache).as_posix() for p in sorted((cache / folder).rglob("*")) if p.is_file()]
        except (LocalEntryNotFoundError, OSError, ValueError):
            raise _offline_help(repository, f"{folder}/{_PREFERRED[0]}", revision, error) from None
