"""What all commands share: folder names and errors as one line."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
