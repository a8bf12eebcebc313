"""The wheel carries the configs and runs from another directory, and so does `-m` with multirun."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import fsvfm
from tiny_detector import write_detector

REPOSITORY = Path(__file__).resolve().parents[2]


def call(*command: str | Path, cwd: Path, ok: bool = True) -> str:
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout + done.stderr


def build_wheel(folder: Path) -> Path:
    """Build the wheel from a copy of the sources, so that nothing is left in the checkout."""
    source = folder / "source"
    source.mkdir()
    for name in ("src", "configs"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source, cwd=folder)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that sees the installed dependencies, but fsvfm only from the built wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    wheel = build_wheel(folder)
    venv.create(folder / "env", with_pip=False)
    site = next((folder / "env").glob("lib/python*/site-packages"))
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


def test_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert project["version"] == citation["version"] == fsvfm.__version__
    assert project["license"] == citation["license"]
    assert f"## {fsvfm.__version__}" in (REPOSITORY / "CHANGELOG.md").read_text()


def test_workflows_and_hooks_call_what_there_is() -> None:
    """What GitHub and pre-commit run exists here: make targets, scripts, tests."""
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE))
    for file in (REPOSITORY / ".github" / "workflows").glob("*.yml"):
        for job in yaml.safe_load(file.read_text())["jobs"].values():
            for command in (step["run"] for step in job["steps"] if "run" in step):
                program, *words = command.split()
                assert (REPOSITORY / program).is_file() if "/" in program else set(words) <= targets, command
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    for hook in hooks:
        for word in hook["entry"].split():
            assert not word.startswith("tests/") or (REPOSITORY / word).is_file(), word
    named = set(re.findall(r"`make ([a-z -]+)`", (REPOSITORY / "CONTRIBUTING.md").read_text()))
    assert {target for words in named for target in words.split()} <= targets


@pytest.mark.slow
def test_wheel_in_an_empty_environment_runs_the_readmes_python(tmp_path: Path) -> None:
    """`pip install` of the wheel with its dependencies from the index, then the README's examples on an export."""
    wheel = build_wheel(tmp_path)
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    uv = shutil.which("uv", path=str(Path(sys.executable).parent))
    install = [uv, "pip", "install", "--python", python] if uv else [python, "-m", "pip", "install"]
    call(*install, wheel, cwd=tmp_path)
    write_detector(tmp_path / "runs" / "demo_dfd" / "export")
    noise = np.random.default_rng(0).integers(0, 255, (160, 160, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "group_photo.jpg")
    examples = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), flags=re.DOTALL)
    assert len(examples) >= 2
    given = "import numpy, torch\nparsing_maps = numpy.ones((2, 224, 224), numpy.uint8)\nparsing_maps[:, :40] = 0\n"
    for code in examples:
        (tmp_path / "example.py").write_text(given + code)
        call(python, "example.py", cwd=tmp_path)
    assert str(REPOSITORY) not in call(python, "-c", "import fsvfm; print(fsvfm.__file__)", cwd=tmp_path)
    assert "prepare" in call(tmp_path / "env" / "bin" / "fsvfm", cwd=tmp_path)
