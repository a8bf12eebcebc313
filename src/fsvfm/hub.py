"""Models on the Hugging Face hub: a folder with the weights, their metadata and a model card, and back in three lines.

    from fsvfm.hub import FaceModel
    model = FaceModel.from_pretrained("<owner>/<name>")     # or a folder
    score = model(faces)["score"]                           # (N, 3, S, S) uint8 RGB face crops → P(fake)

The folder holds our export (``model.safetensors`` and ``model.json``), a small ``config.json`` by which the hub counts
downloads, and ``README.md``, the card. All that reads checkpoints here reads it too, as
``hf://<owner>/<name>/model.safetensors``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, NamedTuple, Self

import timm
import yaml
from huggingface_hub import HfApi, ModelCard, PyTorchModelHubMixin
from omegaconf import OmegaConf

from fsvfm import zoo
from fsvfm.checkpoint import Checkpoint, load_checkpoint
from fsvfm.errors import CheckpointError, ConfigError
from fsvfm.exports import is_vit, read_meta, save_export, size_in_words
from fsvfm.formats import Portable
from fsvfm.published import KINDS
from fsvfm.report_tables import (
    calibration_tables,
    families,
    interval_text,
    level_tables,
    markdown,
    metric_name,
    notes,
    threshold_name,
    write_text,
)

#: What a folder for the hub consists of.
FILES = ("README.md", "config.json", "model.json", "model.safetensors")

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_TASKS = {"forgery": "deepfake detection", "antispoof": "face anti-spoofing", "pretrain": "face representation"}
_ATTACKS = {"forgery": "fake (manipulated or generated)", "antispoof": "a presentation attack (print, replay, mask)"}
#: Names of licences on the hub, for those that a checkpoint here can have.
_IDENTIFIERS = {"CC BY-NC 4.0": "cc-by-nc-4.0"}
_MOST_STEPS = 8  # of initialisations that are followed


def check_repository(name: str) -> str:
    """A name ``<owner>/<name>`` of a repository on the hub.

    Raises:
        ConfigError: it is none.
    """
    if not _REPOSITORY.fullmatch(name):
        raise ConfigError(f"{name!r} names no repository on the hub; expected <owner>/<name>")
    return name


# ------------------------------------------------------------------------------------------------------------- licence


class Licence(NamedTuple):
    """A licence of weights: its name, None where it is not known, and why."""

    name: str | None
    reason: str

    @property
    def identifier(self) -> str:
        """What the hub calls it."""
        name = self.name or "unknown"
        return _IDENTIFIERS.get(name, name).lower().replace(" ", "-")


def inherited_licence(meta: Mapping[str, Any]) -> Licence:
    """The licence that weights have from those they were started from, as far as that can be followed from here.

    Args:
        meta: a checkpoint's metadata.

    Returns:
        with a name None where weights were trained from scratch here (its trainer may choose), or where it is unknown.
    """
    for _ in range(_MOST_STEPS):
        provenance = meta.get("provenance") or {}
        if provenance.get("licence"):
            return Licence(str(provenance["licence"]), f"the licence of {provenance.get('source', 'the weights')}")
        if provenance.get("layout") in KINDS:
            return _published_licence(str(provenance.get("source", "the weights")))
        start = (provenance.get("hyper_parameters") or {}).get("model")
        if not isinstance(start, Mapping):
            return Licence(None, "nothing is recorded about where the weights come from")
        source = start.get("init")
        if not source:
            return Licence(None, "trained from scratch")
        found = _licence_of_source(str(source))
        if isinstance(found, Licence):
            return found
        meta = found
    return Licence(None, "the weights were started from others more often than is followed")


def _licence_of_source(source: str) -> Licence | dict[str, Any]:
    """The licence of a checkpoint that weights were started from, or its metadata, which tell."""
    shown = _shown(source)
    if source.startswith("zoo:"):
        entry = zoo.ZOO.get(source.removeprefix("zoo:").partition("/")[0])
        return Licence(entry.licence if entry else zoo.LICENCE, f"derived from {shown}")
    if source.startswith("timm:"):
        try:
            name = timm.get_pretrained_cfg(source.removeprefix("timm:")).license
        except (RuntimeError, AttributeError):
            name = None
        return Licence(name, f"derived from {shown}")
    if source.startswith("hf://"):
        parts = re.split(r"[/@]", source.removeprefix("hf://"))
        if "/".join(parts[:2]) == zoo.REPOSITORY:
            return Licence(zoo.LICENCE, f"derived from {shown}")
        return Licence(None, f"derived from {shown}; see there")
    path = Path(source).expanduser()
    for folder in (path, path / "export", path.parent, path.parent.parent / "export"):
        if (folder / "model.json").is_file():
            return read_meta(folder)
    if path.suffix == ".pth":
        return _published_licence(shown)
    return Licence(None, f"derived from {shown}, which is not here to be asked")


def _published_licence(source: str) -> Licence:
    return Licence(zoo.LICENCE, f"derived from {source}, a file of the published code, whose released weights have it")


def choose_licence(meta: Mapping[str, Any], given: str | None, *, needed: bool) -> Licence:
    """The licence to publish weights under.

    Args:
        meta: the checkpoint's metadata.
        given: what the user says, for weights whose licence is not inherited.
        needed: an unknown one is an error.

    Raises:
        ConfigError: the user's contradicts the inherited one, or there is none.
    """
    inherited = inherited_licence(meta)
    if given:
        chosen = Licence(given, f"{inherited.reason}; chosen by who publishes it")
        if inherited.name and chosen.identifier != inherited.identifier:
            raise ConfigError(
                f"licence={given}: these weights have {inherited.name} ({inherited.reason}); leave licence=… out"
            )
        return chosen if inherited.name is None else inherited
    if needed and inherited.name is None:
        raise ConfigError(
            f"the weights' licence is not known ({inherited.reason}); say it with licence=<SPDX identifier>, such as "
            "licence=apache-2.0, after making sure that the training data and the initial weights permit it"
        )
    return inherited


# --------------------------------------------------------------------------------------------------- what a run tells


class Run(NamedTuple):
    """What the folder of a run tells of a checkpoint in it: training data sets, and its results."""

    data: tuple[Mapping[str, Any], ...] = ()
    results: Mapping[str, Mapping[str, Any]] | None = None
    notes: tuple[str, ...] = ()


def read_run(source: str | os.PathLike[str], label: str) -> Run:
    """Read the folder of a run around a checkpoint: its configuration and the results beside it, if there are any.

    Args:
        source: an export, the run's folder, or a checkpoint in it.
        label: what the checkpoint is called in tables.
    """
    path = Path(source).expanduser()
    if not path.exists():  # a name of the zoo, an address
        return Run()
    path = path.resolve()
    around = (path, path.parent, path.parent.parent)
    run = next((folder for folder in around if (folder / "config.yaml").is_file()), None)
    sets: dict[str, Any] = {}
    remarks: list[str] = []
    places = [path, path.parent, *([run, run / "test", run / "evaluation"] if run else [])]
    for place in dict.fromkeys(places):
        if (place / "results.json").is_file():
            found, said = _results(place / "results.json", path, run)
            sets |= found
            remarks += said
    results = {label: sets} if sets else None
    return Run(tuple(_data(run)) if run else (), results, tuple(dict.fromkeys(remarks)))


def _results(file: Path, checkpoint: Path, run: Path | None) -> tuple[Mapping[str, Any], list[str]]:
    """The results of one checkpoint, and what is to be known about them; nothing if the file is about others."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        runs, made = dict(content["runs"]), content.get("made") or {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}, []
    own = {checkpoint, checkpoint.parent} if checkpoint.is_file() else {checkpoint, checkpoint / "export"}
    if run:
        own |= {run, run / "export"}
    for label, source in (made.get("checkpoints") or {}).items():
        place = Path(str(source)).expanduser()
        if label in runs and place.resolve() in own:
            return runs[label], notes(made)
    if len(runs) == 1 and run and file.parent == run / "test":  # what a run tests is itself, also where it was moved
        return next(iter(runs.values())), notes(made)
    return {}, []


def _data(run: Path) -> Iterator[Mapping[str, Any]]:
    """Name, licence and size of every prepared folder that a run was trained on, as far as they are here."""
    try:
        config = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
        data = config["data"] if isinstance(config, dict) else None
    except Exception:  # a file of somebody else: YAML's errors and OmegaConf's have no common base
        return
    if not isinstance(data, dict):
        return
    manifests = data.get("manifests") or ([data["manifest"]] if data.get("manifest") else [])
    for manifest in manifests:
        entry: dict[str, Any] = {"name": PurePath(str(manifest)).name, "methods": data.get("methods")}
        try:
            card = json.loads((Path(str(manifest)) / "card.json").read_text(encoding="utf-8"))
            entry |= {key: card[key] for key in ("about", "source", "licence", "counts") if key in card}
        except (OSError, ValueError, TypeError):
            pass
        yield entry


# ---------------------------------------------------------------------------------------------------------------- card


def card(meta: Mapping[str, Any], *, repository: str, licence: Licence, run: Run | None = None) -> str:
    """The model card: README.md with the hub's metadata on top.

    Args:
        meta: the checkpoint's metadata.
        repository: ``<owner>/<name>``.
        licence: of the weights.
        run: what the run's folder tells.
    """
    run = run or Run()
    detector, task = meta["kind"] == "detector", meta["task"]
    front: dict[str, Any] = {
        "library_name": "fsvfm",
        "pipeline_tag": "image-classification" if detector else "image-feature-extraction",
        "tags": ["face", _TASKS[task].replace(" ", "-"), "vision-transformer", "fs-vfm", "pytorch_model_hub_mixin"],
    }
    front |= _licence_entries(licence)
    sections = [
        f"# {repository.partition('/')[2]}", _about(meta),
        "## Use", _usage(meta, repository),
        "## Training data", _training(meta, run),
        "## Results", _metrics(run),
        *(["## Thresholds", _thresholds(meta.get("calibration"))] if detector else []),
        "## Intended use", _intended(meta),
        "## Limits", _limits(meta, run),
        "## Licence", _licence_text(licence),
    ]  # fmt: skip
    top = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    return f"---\n{top}---\n\n" + "\n\n".join(sections) + "\n"


def _licence_entries(licence: Licence) -> dict[str, str]:
    if licence.name is None:
        return {"license": "other", "license_name": "unknown"}
    return {"license": licence.identifier}


def _about(meta: Mapping[str, Any]) -> str:
    model, tune = meta["model"], meta.get("tune") or {}
    kind = "a plain vision transformer, " if is_vit(model) else ""
    size = f"{model['name']}: {kind}{size_in_words(model)}"
    if meta["kind"] == "detector":
        what = f"A detector for {_TASKS[meta['task']]} (tuning: {tune.get('name', 'unknown')})."
        order = ", ".join(meta["class_order"])
        return f"{what} {size}. Its score is P(fake); logits 0, 1 stand for {order}."
    return f"An encoder of faces, pre-trained without labels. {size}."


def _usage(meta: Mapping[str, Any], repository: str) -> str:
    size = meta["model"]["image_size"]
    output = "score" if meta["kind"] == "detector" else "features"
    comment = "P(fake)" if output == "score" else f"features, (N, {meta['model'].get('dim', 'dim')})"
    lines = [
        "```python",
        "from fsvfm.hub import FaceModel",
        f'model = FaceModel.from_pretrained("{repository}")',
        f'{output} = model(faces)["{output}"]  # faces: (N, 3, {size}, {size}) uint8 RGB face crops → {comment}',
        "```",
    ]
    address = f"hf://{repository}/model.safetensors"
    if output == "score":
        lines += [
            "", "Whole photographs and videos, with the faces found in them:", "",
            "```python",
            "import fsvfm",
            f'detector = fsvfm.load_detector("{address}")',
            'print(detector.predict("photograph.jpg").verdict)',
            "```",
        ]  # fmt: skip
    else:
        lines += ["", f"Fine-tuning starts from it with `python -m fsvfm.train … model.init={address}`."]
    lines += [
        "",
        "The normalisation is inside; crops are squares around the face with the margin of the training data.",
    ]
    return "\n".join(lines)


def _training(meta: Mapping[str, Any], run: Run) -> str:
    provenance = meta.get("provenance") or {}
    lines = []
    for entry in run.data:
        parts = [str(entry["about"])] if entry.get("about") else []
        if counts := [c for c in entry.get("counts") or [] if isinstance(c, Mapping) and c.get("split") == "train"]:
            totals = [sum(int(c.get("images", 0)) for c in counts if c.get("label") == label) for label in (0, 1)]
            parts.append(f"{totals[0]} real and {totals[1]} fake training images")
        if entry.get("methods"):
            parts.append(f"of the methods {', '.join(map(str, entry['methods']))} only")
        source = entry.get("source")
        terms = entry.get("licence") or (source.get("licence") if isinstance(source, Mapping) else None)
        if terms:
            parts.append(f"terms of the data: {terms}")
        lines.append(f"- {entry['name']}" + (f": {'; '.join(parts)}" if parts else ""))
    if not lines and provenance.get("data"):
        lines.append(f"- {provenance['data']}")
    if not lines:
        lines.append("- not recorded")
    start = ((provenance.get("hyper_parameters") or {}).get("model") or {}).get("init")
    if start:
        lines.append(f"- initial weights: {_shown(str(start))}")
    elif (provenance.get("hyper_parameters") or {}).get("model"):
        lines.append("- initial weights: none, trained from scratch")
    return "\n".join(lines)


def _metrics(run: Run) -> str:
    if not run.results:
        return "No results lie beside this checkpoint: nothing was measured, or elsewhere."
    lines = [f"> {note}\n" for note in run.notes]
    lines += ["Per cent; score = P(fake or attack). " + interval_text(run.results), ""]
    for family in families(run.results):
        for table in [*level_tables(family), *calibration_tables(family.results)]:
            lines += [f"### {table.title}", "", *([table.about, ""] if table.about else []), *markdown(table), ""]
        lines += [f"- **{metric_name(name)}**: {text}." for name, text in family.definitions.items()]
    return "\n".join(lines).rstrip()


def _thresholds(calibration: Mapping[str, Any] | None) -> str:
    if not calibration:
        return (
            "None: this detector was never calibrated. 0.5 is not a meaningful threshold of its score; fit one on "
            "your own validation faces with `python -m fsvfm.export ckpt=… out=… calibrate=<prepared folder>`."
        )
    lines = [
        f"On the calibrated probability (temperature {calibration['temperature']:.4g}), fitted on "
        f"{_shown_words(str(calibration['source']))}. The error rates are those on these faces; on others they are "
        "to be measured.",
        "",
        "| for | threshold | reals called fake | fakes called real | reals | remark |",
        "|---|--:|--:|--:|--:|---|",
    ]
    for name, point in calibration["thresholds"].items():
        lines.append(
            f"| {threshold_name(name)} | {point['threshold']:.6g} | {100 * point['fpr']:.1f} % | "
            f"{100 * point['fnr']:.1f} % | {point.get('n', '')} | {point.get('note', '')} |"
        )
    if band := calibration.get("conformal"):
        lines += [
            "",
            f"Between {band['low']:.4g} and {band['high']:.4g} the verdict is “uncertain” (split conformal, error rate "
            f"{band['alpha']:g} in each class). {band.get('note', '')}".rstrip(),
        ]
    lines += [f"- {note}" for note in calibration.get("notes") or []]
    return "\n".join(lines)


def _intended(meta: Mapping[str, Any]) -> str:
    if meta["kind"] == "detector":
        return (
            f"To support people who examine whether a face in a picture is {_ATTACKS[meta['task']]}, and for research. "
            "A score is a hint to be weighed with other evidence. It is not meant for decisions about people without a "
            "person who decides, for identifying anybody, or for judging pictures without a face."
        )
    return "As a starting point for detectors of forged faces and of presentation attacks, and for research on faces."


def _limits(meta: Mapping[str, Any], run: Run) -> str:
    lines = [
        "- Accuracy falls on kinds of forgeries, cameras and compressions that were not in the training data; the "
        "results above hold for their test sets.",
        "- It sees one face crop at a time: no sound, no motion, no metadata.",
        "- Differences between groups of people (age, sex, skin) were not measured unless a result above says so.",
    ]
    if meta["kind"] == "detector":
        lines.append("- Whoever wants to deceive it can: it was not hardened against adversarial changes.")
        if not meta.get("calibration"):
            lines.append("- Its score is not calibrated: 0.9 does not mean nine in ten.")
    if any(str(entry["name"]).startswith("demo") for entry in run.data):
        lines.insert(
            0,
            "- **A demo**: minutes of training on a few hundred faces, with coarse forgeries made by this software. It "
            "shows that everything works and says nothing about other pictures.",
        )
    return "\n".join(lines)


def _licence_text(licence: Licence) -> str:
    name = licence.name or "**Not known: find out before you publish or use these weights.**"
    return f"Of the weights: {name} ({licence.reason}). The terms of the training data may restrict their use further."


def _shown(source: str) -> str:
    """A checkpoint's or folder's name without the machine's path to it."""
    return source if re.match(r"(zoo:|timm:|hf://)", source) else "/".join(PurePath(source).parts[-2:]).lstrip("/")


def _shown_words(text: str) -> str:
    return " ".join(PurePath(word).name if word.startswith(("/", "~")) else word for word in text.split(" "))


# ------------------------------------------------------------------------------------------------------------- folders


def publishable(value: Any) -> Any:
    """Metadata for other people: of absolute paths, which tell of the machine and its user, the last part only."""
    if isinstance(value, Mapping):
        return {key: publishable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [publishable(item) for item in value]
    if isinstance(value, str) and re.match(r"(/|~|[A-Za-z]:[\\/])", value):
        return re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    return _shown_words(value) if isinstance(value, str) else value


def write_model(folder: str | os.PathLike[str], checkpoint: Checkpoint, licence: Licence) -> list[Path]:
    """Write weights, metadata and ``config.json`` into a folder, whatever else is in it."""
    folder = Path(folder)
    meta = publishable(checkpoint.meta)
    if licence.name:
        meta["provenance"] = {**(meta.get("provenance") or {}), "licence": licence.name}
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{os.getpid()}.tmp"
    try:
        save_export(temporary, checkpoint.state, meta, left_out=checkpoint.left_out)
        config = {"library_name": "fsvfm", "architecture": meta["model"]["name"], "kind": meta["kind"]}
        config |= {"task": meta["task"], "see": "model.json"}
        write_text(temporary / "config.json", json.dumps(config, indent=2) + "\n")
        written = [folder / file.name for file in sorted(temporary.iterdir())]
        for file in written:
            (temporary / file.name).replace(file)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return written


def _stated_licence(readme: Path) -> str | None:
    """What a card names as the licence."""
    try:
        front = readme.read_text(encoding="utf-8").split("---")[1]
        return str(yaml.safe_load(front)["license"])
    except (OSError, UnicodeDecodeError, IndexError, KeyError, TypeError, yaml.YAMLError):
        return None


def write_folder(
    folder: str | os.PathLike[str], checkpoint: Checkpoint, repository: str, licence: Licence
) -> tuple[list[Path], bool]:
    """Write everything that goes to the hub.

    Args:
        folder: made if it is not there; a ``README.md`` that is in it is kept, for it may have been edited.
        checkpoint: of any kind.
        repository: ``<owner>/<name>``.
        licence: of the weights.

    Returns:
        the files, and whether the card is a new one.

    Raises:
        ConfigError: a card that is there names another licence.
        CheckpointError: the folder cannot be written.
    """
    readme = Path(folder) / "README.md"
    new = not readme.exists()
    if not new:
        stated, expected = _stated_licence(readme), _licence_entries(licence)["license"]
        if stated != expected:
            raise ConfigError(
                f"{readme} says license: {stated}, but these weights have {expected} ({licence.reason}); correct the "
                "card, or delete it to have a new one written"
            )
    written = write_model(folder, checkpoint, licence)
    if new:
        run = read_run(checkpoint.source, repository.partition("/")[2])
        write_text(readme, card(checkpoint.meta, repository=repository, licence=licence, run=run))
    return [readme, *written], new


def upload(folder: str | os.PathLike[str], repository: str) -> str:
    """Upload a folder; a repository that does not exist is made, private.

    Returns:
        the repository's address.

    Raises:
        CheckpointError: no connection, not logged in, or not allowed.
    """
    try:
        api = HfApi()
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=Path(folder), allow_patterns=list(FILES), commit_message="Upload with fsvfm"
        )
    except Exception as error:  # the HTTP library's connection errors share no public base class
        first = (str(error).strip().splitlines() or ["no details"])[0][:200]
        raise CheckpointError(
            f"{folder} is complete, but it could not be uploaded to {repository} ({type(error).__name__}: {first}).\n"
            "  Log in with `hf auth login` and give the same command again where there is a connection, or upload it "
            f"with `hf upload {repository} {folder}`"
        ) from None
    return str(address)


# --------------------------------------------------------------------------------------------------------------- model


class FaceModel(Portable, PyTorchModelHubMixin, library_name="fsvfm"):
    """A detector or encoder from the hub or a folder, by the conventions of ``PyTorchModelHubMixin``.

    Of a pre-training checkpoint it is the online encoder. `save_pretrained` and `push_to_hub` write what
    :func:`write_folder` does.
    """

    source = ""

    @classmethod
    def from_pretrained(  # type: ignore[override]  # tokens and caches are those of the hub's settings
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *, revision: str | None = None
    ) -> Self:
        """Load a model, in evaluation mode on the CPU.

        Args:
            pretrained_model_name_or_path: a folder (any export of ours, too) or ``<owner>/<name>`` on the hub.
            revision: branch, tag or commit on the hub.

        Raises:
            CheckpointError: there is no model of ours, or no connection.
        """
        name = os.fspath(pretrained_model_name_or_path)
        if Path(name).expanduser().is_dir():
            source = name
        elif _REPOSITORY.fullmatch(name):
            source = f"hf://{name}{f'@{revision}' if revision else ''}/model.safetensors"
        else:
            raise CheckpointError(f"{name!r} is no folder here, and not <owner>/<name> of a repository on the hub")
        model = cls.from_checkpoint(load_checkpoint(source, target=False))
        model.source = source
        return model

    def checkpoint(self) -> Checkpoint:
        """The weights as they are now, with their metadata."""
        state = self.network.state_dict()
        if self.meta["kind"] != "detector":
            state = {f"encoder.{key}": tensor for key, tensor in state.items()}
        return Checkpoint(self.meta["kind"], state, self.meta, self.source)

    def _save_pretrained(self, save_directory: Path) -> None:
        write_model(save_directory, self.checkpoint(), choose_licence(self.meta, None, needed=False))

    def generate_model_card(self, repository: str = "<owner>/<name>", licence: str | None = None) -> ModelCard:
        """The card that goes with the model."""
        chosen = choose_licence(self.meta, licence, needed=False)
        run = read_run(self.source, repository.partition("/")[2])
        return ModelCard(card(self.meta, repository=repository, licence=chosen, run=run))

    def push_to_hub(self, repo_id: str, *, licence: str | None = None, **options: Any) -> str:
        """Write the folder and upload it.

        Args:
            repo_id: ``<owner>/<name>``.
            licence: of the weights, where it does not follow from what they were trained from.
            options: ``private``, ``token``, ``commit_message`` and others of ``ModelHubMixin.push_to_hub``.

        Raises:
            ConfigError: no such name, an unknown licence, or one that contradicts that of the initial weights.
        """
        check_repository(repo_id)
        choose_licence(self.meta, licence, needed=True)
        words = {"repository": repo_id, "licence": licence}
        return super().push_to_hub(repo_id, model_card_kwargs=words, **options)
