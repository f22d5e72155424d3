"""pyproject.toml, requirements.lock, environment.yml and the Makefile never disagree."""

import importlib.metadata
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import ouroboros
from ouroboros.experiment import PROFILES

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LINES = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
LOCK = dict(line.split("==") for line in LINES)


def test_the_lock_pins_one_exact_version_a_line():
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line) for line in LINES)  # no local tag such as +cpu
    assert list(LOCK) == sorted(LOCK) and len(LOCK) == len(LINES)
    assert LOCK["torch"] == "2.13.0"
    assert not [name for name in LOCK if name.startswith(("nvidia", "cuda", "triton"))]  # a GPU is no requirement


def test_the_lock_satisfies_pyproject():
    declared = [*PROJECT["dependencies"], *sum(PROJECT["optional-dependencies"].values(), [])]
    for requirement in map(Requirement, declared):
        name = canonicalize_name(requirement.name)
        assert name in LOCK, name
        assert requirement.specifier.contains(LOCK[name]), f"{requirement} but {LOCK[name]}"


def test_conda_installs_the_same_lock():
    *conda, with_pip = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert conda == ["python=3.11", "pip"]  # whatever else came from conda could differ from the lock
    assert with_pip == {"pip": ["-r requirements.lock", "-e ."]}
    assert SpecifierSet(PROJECT["requires-python"]).contains("3.11.0")


def test_the_makefile_installs_the_same_lock():
    text = (ROOT / "Makefile").read_text()
    assert text.count("pip install") == 2
    assert "pip install --quiet -r requirements.lock" in text
    assert "pip install --quiet --no-deps --no-build-isolation -e ." in text


def test_this_environment_is_the_locks_and_runs_on_every_python_3_11():
    installed = {name: importlib.metadata.metadata(name) for name in LOCK}
    assert {name: metadata["Version"].split("+")[0] for name, metadata in installed.items()} == LOCK
    newer = [name for name, data in installed.items() if "3.11.0" not in SpecifierSet(data["Requires-Python"] or "")]
    assert not newer


def test_the_corpora_read_locked_packages_only():
    for file in PROFILES.glob("*.yaml"):
        corpus = yaml.safe_load(file.read_text())["corpus"]
        if corpus["kind"] == "docstrings":
            assert {canonicalize_name(name) for name in (*corpus["packages"], *corpus["foreign"])} <= set(LOCK), file


def test_one_version():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == ouroboros.__version__


def test_make_help_names_every_target():
    help = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = {"help", "reproduce", "test", "smoke", "runs", "rerun", "verify", "base", "bench", "lab", "lint", "clean"}
    assert set(re.findall(r"^  make (\w+)", help, re.M)) == targets


@pytest.mark.parametrize("settings, folder", [
    ({}, ".venv"),
    ({"VIRTUAL_ENV": "/envs/mine"}, "/envs/mine"),
    ({"CONDA_PREFIX": "/conda/envs/mine", "CONDA_DEFAULT_ENV": "mine"}, "/conda/envs/mine"),
    ({"CONDA_PREFIX": "/conda", "CONDA_DEFAULT_ENV": "base"}, ".venv"),  # conda's own environment is left alone
    ({"VIRTUAL_ENV": "/envs/mine", "CONDA_PREFIX": "/conda", "CONDA_DEFAULT_ENV": "base"}, "/envs/mine"),
])
def test_make_uses_the_active_environment(settings, folder):
    environment = {"PATH": "/usr/bin:/bin", **settings}
    help = subprocess.run(["make", "-s", "help"], cwd=ROOT, env=environment, capture_output=True, text=True).stdout
    assert help.endswith(f"environment: {folder}\n")
