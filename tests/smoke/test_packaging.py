"""The wheel carries the configs and runs from another directory, and so does `-m` with multirun."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def call(*command: str | Path, cwd: Path, ok: bool = True) -> str:
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that sees the installed dependencies, but fsvfm only from the built wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("src", "configs"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source, cwd=folder)
    venv.create(folder / "env", with_pip=False)
    site = next((folder / "env").glob("lib/python*/site-packages"))
    wheel = next(folder.glob("*.whl"))
    shutil.unpack_archive(wheel, site, "zip")
    dependencies = [p for p in sys.path if p.endswith("site-packages")]
    # After our own site-packages, so that the wheel's fsvfm wins; the editable install's finder is not processed.
    (site / "dependencies.pth").write_text("\n".join(dependencies))
    return folder / "env" / "bin" / "python"


def test_wheel_composes_and_lists_from_another_directory(wheel_python: Path, tmp_path: Path) -> None:
    where = call(
        wheel_python, "-c", "import fsvfm, fsvfm.configs as c; print(fsvfm.__file__, *c.__path__)", cwd=tmp_path
    )
    assert str(REPOSITORY / "src") not in where
    shown = call(wheel_python, "-m", "fsvfm.train", "experiment=pretrain_vitb", "--cfg", "job", cwd=tmp_path)
    assert "strategy: crfr_p" in shown
    listing = call(wheel_python, "-m", "fsvfm", cwd=tmp_path)
    assert "prepare" in listing


def test_user_configs_extend_ours(wheel_python: Path, tmp_path: Path) -> None:
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    own = "# @package _global_\ndefaults:\n  - demo_pretrain\nmasking: {ratio: 0.6}\n"
    (tmp_path / "mine" / "experiment" / "own.yaml").write_text(own)
    shown = call(
        wheel_python, "-m", "fsvfm.train", "--config-dir", "mine", "experiment=own", "--cfg", "job", cwd=tmp_path
    )
    assert "ratio: 0.6" in shown


def test_multirun_from_the_wheel_says_what_is_missing(wheel_python: Path, tmp_path: Path) -> None:
    told = call(
        wheel_python,
        "-m",
        "fsvfm.train",
        "-m",
        "experiment=demo_pretrain",
        "masking=random,crfr_p",
        cwd=tmp_path,
        ok=False,
    )
    assert "python -m fsvfm.prepare recipe=demo" in told
    assert not (tmp_path / "outputs").exists()
