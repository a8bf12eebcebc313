"""What all commands share: folder names, errors as one line, ``--cfg job`` that explains, completion."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_module
from hydra.errors import MissingConfigException
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from fsvfm.__main__ import COMMANDS
from fsvfm.__main__ import main as list_commands
from fsvfm.annotated import read_comments
from fsvfm.cli import guard, rank, slug
from fsvfm.errors import ConfigError


def test_names_of_runs() -> None:
    assert slug("demo_dfd", "") == "demo_dfd"
    assert slug(None, "protocol=demo") == "run__protocol-demo"
    assert slug("demo_dfd", "masking.ratio=0.6,seed=1") == "demo_dfd__masking.ratio-0.6__seed-1"


@given(st.text(max_size=400))
def test_names_are_safe_and_short(overrides: str) -> None:
    name = slug("pretrain_vitb", overrides)
    assert re.fullmatch(r"[\w.-]+", name)
    assert len(name) <= 130
    assert name == slug("pretrain_vitb", overrides)


def test_long_settings_that_differ_have_names_that_differ() -> None:
    common = "a=" + "x" * 200
    assert slug("e", common + "1") != slug("e", common + "2")


def test_an_error_of_ours_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    @guard
    def command() -> None:
        raise ConfigError("no such thing; choose another")

    with pytest.raises(SystemExit) as caught:
        command()
    assert caught.value.code == 1
    assert capsys.readouterr().err == "error: no such thing; choose another\n"


def test_rank_comes_from_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert rank() == 0
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert rank() == 1
    monkeypatch.setenv("RANK", "5")
    assert rank() == 5


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Run ``fsvfm.<name>`` in this process: (exit status, output, errors)."""
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def run(name: str, *words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
        status = 0
        try:
            importlib.import_module(f"fsvfm.{name}").main()
        except SystemExit as left:
            status = left.code if isinstance(left.code, int) else 0
        told = capsys.readouterr()
        return status, told.out, told.err

    return run


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["experiment=demo_pretrian"], "there is no experiment=demo_pretrian; did you mean demo_pretrain"),
        (
            ["experiment=demo_dfd", "trainer.max_epoch=3"],
            "no setting 'trainer.max_epoch'; did you mean trainer.max_epochs",
        ),
        (["modle=vit_base"], "no setting 'modle'; did you mean model?"),
        (["masking=crfp"], "there is no masking=crfp; did you mean crfr_p"),
        (["accumulate_grad_batches=3"], "did you mean trainer.accumulate_grad_batches?"),
        (["target=Q"], "there is no target=Q (target: C, CeFA, I, M, O, S, W)"),
        (["name=a=b=,"], "cannot read 'name=a=b=,'"),
        (["--config-name=tran"], "Cannot find primary config 'tran'"),
        (["-m", "experiment=demo_dfd,demo_dgd"], "did you mean demo_dfd"),
        (["experiment=demo_pretrian", "--help"], "there is no experiment=demo_pretrian; did you mean demo_pretrain"),
        (["experiment=demo_pretrian", "--cfg", "job"], "there is no experiment=demo_pretrian"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_misspelt_command_line_is_one_line_with_the_nearest(
    command: Callable[..., tuple[int, str, str]], words: list[str], expected: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    status, _, told = command("train", *words)
    assert status == 1
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert expected in told
    assert "-m" in words or not list(tmp_path.iterdir())


def test_hydras_own_words_on_request(
    command: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(MissingConfigException, match="demo_pretrian"):
        command("train", "experiment=demo_pretrian")


EXPLAINED = [
    ("train", "experiment=demo_pretrain"),
    ("train", "experiment=dfd_vitb_adapter", "data.batch_size=16", "logger=[wandb,tensorboard,mlflow]"),
    ("train", "experiment=fas_vitb", "target=M"),
    ("evaluate", "protocol=robustness_demo"),
    ("prepare", "recipe=ffpp"),
    ("predict",),
    ("report",),
    ("export",),
]


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(value, dict) and value:
        for key, entry in value.items():
            yield from leaves(entry, (*path, str(key)))
    else:
        yield path


@pytest.mark.parametrize("words", EXPLAINED, ids=" ".join)
def test_cfg_job_explains_every_value(command: Callable[..., tuple[int, str, str]], words: tuple[str, ...]) -> None:
    status, shown, _ = command(words[0], *words[1:], "--cfg", "job")
    assert status == 0
    with initialize_config_module("fsvfm.configs", version_base="1.3"):
        plain = compose(words[0], overrides=list(words[1:]))
    values = yaml.safe_load(shown)
    assert values == OmegaConf.to_container(plain, resolve=False)  # comments change nothing
    told = read_comments(shown)
    known = {*told.by_key, ()} if told.header else set(told.by_key)
    for path in leaves(values):
        if path[-1] != "_target_" and path[0] not in ("testsets", "recipe"):
            assert any(path[:end] in known for end in range(1, len(path) + 1)), ".".join(path)


def test_cfg_job_says_where_a_value_is_from(command: Callable[..., tuple[int, str, str]]) -> None:
    _, shown, _ = command("train", "experiment=dfd_vitb", "seed=3", "--cfg", "job")
    lines = {line.split(":")[0].strip(): line for line in shown.splitlines()}
    assert re.search(r"^seed: 3 +# of initialisation, [^\[]* \[command line\]$", shown, flags=re.MULTILINE)
    assert lines["layer_decay"].endswith("[experiment/dfd_vitb]")
    assert "[" not in lines["min_lr"]
    _, part, _ = command("train", "experiment=dfd_vitb", "--cfg", "job", "--package", "optim")
    assert part.startswith("# @package optim\n")
    assert "# learning rate per 256 images … [experiment/dfd_vitb]" in part
    assert yaml.safe_load(part)["base_lr"] == 2e-4


def test_comments_beside_above_and_below() -> None:
    text = """# @package _global_
# About the file.
# More of it.
a: 1   # beside, with "quotes" and # a hash
b: "no # comment"
# above
c:
  d: [1,
      2]   # beside a list
  e: >-    # beside a text
    # not a comment
    text
  # above f
  f: 3
         # continued
g: {h: 1, i: 2}  # both
"""
    found = read_comments(text)
    assert found.header == "About the file. More of it."
    assert found.by_key == {
        ("a",): 'beside, with "quotes" and # a hash', ("c",): "above", ("c", "e"): "beside a text",
        ("c", "f"): "above f continued", ("g", "h"): "both", ("g", "i"): "both",
    }  # fmt: skip
    assert found.leaves == [("a",), ("b",), ("c", "d"), ("c", "e"), ("c", "f"), ("g", "h"), ("g", "i")]


def test_commands_are_listed_and_suggested(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fsvfm"])
    list_commands()
    shown = capsys.readouterr().out
    assert all(f"  {name}" in shown for name in COMMANDS)
    monkeypatch.setattr(sys, "argv", ["fsvfm", "evalute"])
    with pytest.raises(SystemExit) as left:
        list_commands()
    assert left.value.code == 2
    assert "did you mean evaluate?" in capsys.readouterr().err


def test_completion_in_bash() -> None:
    """The console script's own completion, which asks Hydra; the words are what bash would hand over."""
    program = Path(sys.executable).parent
    if not (program / "fsvfm").is_file():
        pytest.skip("the console script is not installed beside this Python")
    script = """eval "$(fsvfm completion)"
    ask() { COMP_LINE="$*"; COMP_WORDS=($*); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _fsvfm; echo "${COMPREPLY[@]}"; }
    ask fsvfm tr
    ask fsvfm train masking=cr
    ask fsvfm train experiment=demo_dfd trainer.max_"""
    env = {**os.environ, "PATH": f"{program}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:3] == [
        "train",
        "masking=crfr_p masking=crfr_r",
        "trainer.max_epochs= trainer.max_steps=",
    ]
