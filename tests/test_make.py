"""The Makefile runs nothing that a user gives it, and says in one line what it can't use.

A shell script stands in for the environment's Python: it writes down what it was called with.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STUB = """#!/bin/sh
for argument in "$@"; do printf '%s\\037' "$argument" >> "$0.calls"; done
echo >> "$0.calls"
case "$*" in "-m pip --version") test ! -e "$0.nopip";; esac
"""
EVIL = ["{};touch {}", "$(shell touch {1})", "$(touch {1})", "`touch {1}`", '"; touch {1}; "', "'; touch {1}; '",
        "a b", "| touch {1}", "$HOME", "$$(touch {1})", "a\\", "#", "${{HOME}}", "é & touch {1}"]


def stub(environment: Path, pip: bool = True) -> Path:
    python = environment / "bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(STUB)
    python.chmod(0o755)
    if not pip:
        python.with_name("python.nopip").touch()
    return environment


@pytest.fixture
def checkout(tmp_path):
    """A copy of what make reads, in a folder with a space."""
    folder = tmp_path / "my checkout"
    folder.mkdir()
    for name in ("Makefile", "requirements.lock", ".requirements.hashes", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    (folder / "notebooks").mkdir()
    return folder


@pytest.fixture
def environment(tmp_path):
    return stub(tmp_path / "environment")


def make(checkout, *arguments, **variables) -> subprocess.CompletedProcess:
    given = {"PATH": os.environ["PATH"]} | {name: str(value) for name, value in variables.items()}
    return subprocess.run(["make", *arguments], cwd=checkout, env=given, capture_output=True, text=True)


def calls(environment: Path) -> list[list[str]]:
    """The arguments of each call of the stub, without those that set the environment up."""
    file = environment / "bin/python.calls"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    found = [line.split("\037")[:-1] for line in lines]
    return [call for call in found if call[:1] != ["-c"] and call[:2] != ["-m", "pip"]]


def snapshot(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")}


def ouroboros(*arguments: str) -> list[str]:
    return ["-m", "ouroboros", *arguments]


# ------------------------------------------------------------------------------------------------- what is called

@pytest.mark.parametrize("arguments, expected", [
    (["reproduce"], [["reproduce"]]),
    (["verify"], [["verify"]]),
    (["reproduce", "PROFILE=small"], [["reproduce", "--profile=small"]]),
    (["verify", "PROFILE=small"], [["verify", "--profile=small"]]),
    (["verify", "PROFILE="], [["verify"]]),
    (["runs"], [["runs", "--profile=tiny"]]),
    (["runs", "PROFILE=small", "JOBS=3", "CLUSTER=slurm", "DRY_RUN=1"],
     [["runs", "--profile=small", "--jobs=3", "--cluster=slurm", "--dry-run"]]),
    (["rerun", "RUN=cut-any-s0"], [["rerun", "--profile=tiny", "--", "cut-any-s0"]]),
    (["rerun"], [["rerun", "--profile=tiny", "--"]]),
    (["compare", "ARM=arms/x.yaml", "PROFILE=smollm2", "JOBS=1"],
     [["compare", "--profile=smollm2", "--jobs=1", "--", "arms/x.yaml"]]),
    (["base"], [["base", "--profile=tiny"]]),
    (["base", "FORCE=1"], [["base", "--profile=tiny", "--force"]]),
    (["bench"], [["bench"]]),
    (["verify", "JOBS=3", "FORCE=0", "WHATEVER=x"], [["verify"]]),  # what a target doesn't know is ignored
])
def test_each_target_calls_its_command(arguments, expected, checkout, environment):
    done = make(checkout, *arguments, VIRTUAL_ENV=environment)
    assert done.returncode == 0, done.stderr
    assert calls(environment) == [ouroboros(*call) for call in expected]


@pytest.mark.parametrize("target", ["smoke", "reproduce"])
def test_smoke_is_made_from_nothing_and_derived_once(target, checkout, environment):
    assert make(checkout, target, "PROFILE=smoke", "JOBS=3", VIRTUAL_ENV=environment).returncode == 0
    assert calls(environment) == [
        ouroboros("base", "--profile=smoke"), ouroboros("runs", "--profile=smoke", "--jobs=3"),
        ouroboros("tour", "--profile=smoke"), ouroboros("reproduce", "--profile=smoke")]


def test_lint_is_ruff_and_stripped_notebooks_and_ci_runs_it(checkout, environment):
    (checkout / "notebooks/00_model.ipynb").touch()
    assert make(checkout, "lint", VIRTUAL_ENV=environment).returncode == 0
    assert calls(environment) == [
        ["-m", "ruff", "check", "."],
        ["-m", "nbstripout", "--verify", "--keep-id", "notebooks/00_model.ipynb"]]
    assert "\nmake lint\n" in (ROOT / ".ci/run").read_text()
    assert "bash .ci/run" in (ROOT / ".github/workflows/ci.yml").read_text()


def test_clean_removes_what_smoke_made_and_no_committed_result(checkout, environment):
    kept = ["results/smollm2/runs/a.jsonl", "figures/tiny/b.png", "results/README.md", "ouroboros/c.py"]
    gone = [".cache/base/d", "results/smoke/runs/e.jsonl", "figures/smoke/f.png", "build/site/g.html"]
    for name in (*kept, *gone, "tests/h.py", "notebooks/i.ipynb"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).touch()
    assert make(checkout, "clean").returncode == 0
    assert [name for name in (*kept, *gone) if (checkout / name).exists()] == kept


def test_the_site_is_built_anew(checkout, environment):
    (checkout / "build/site").mkdir(parents=True)
    assert make(checkout, "site", VIRTUAL_ENV=environment).returncode == 0
    assert not (checkout / "build/site").exists()
    [call] = calls(environment)
    assert call[:2] == ["-m", "sphinx"] and call[-2:] == [".", "build/site"]


# --------------------------------------------------------------------------------------------- what is never run

def values(evidence: Path) -> list[str]:
    return [text.format("tiny", evidence) for text in EVIL]


@pytest.mark.parametrize("number", range(len(EVIL)))
@pytest.mark.parametrize("given", ["on the command line", "in the environment"])
def test_a_value_reaches_the_command_as_it_was_given(number, given, checkout, environment, tmp_path):
    value = values(tmp_path / "ran")[number]
    variables = dict.fromkeys(("PROFILE", "JOBS", "CLUSTER", "RUN", "PYTHON"), value)
    on_line = [f"{name}={text}" for name, text in variables.items()]
    if given == "on the command line":
        done = make(checkout, "runs", "rerun", *on_line, VIRTUAL_ENV=environment)
    else:
        done = make(checkout, "runs", "rerun", VIRTUAL_ENV=environment, **variables)
    assert done.returncode == 0, done.stderr
    assert calls(environment) == [
        ouroboros("runs", f"--profile={value}", f"--jobs={value}", f"--cluster={value}"),
        ouroboros("rerun", f"--profile={value}", "--", value)]
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["WHATEVER", "OUROBOROS", "RUN_PYTHON", "ENVIRONMENT", "CONDA", "JOBS_OPTION",
                                  "PROFILE_OR_ALL", "flag"])
def test_a_variable_that_is_the_makefiles_own_or_nobodys_runs_nothing(name, checkout, environment, tmp_path):
    for text in (f"touch {tmp_path}/ran;", f"$(shell touch {tmp_path}/ran)", f"`touch {tmp_path}/ran`"):
        assert make(checkout, "verify", f"{name}={text}", VIRTUAL_ENV=environment).returncode == 0
    assert calls(environment) == [ouroboros("verify")] * 3
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["VIRTUAL_ENV", "CONDA_PREFIX"])
@pytest.mark.parametrize("number", range(len(EVIL)))
def test_a_path_of_an_environment_runs_nothing(name, number, checkout, tmp_path):
    value = values(tmp_path / "ran")[number].replace("/", "")  # one folder's name
    before = snapshot(tmp_path)
    for done in (make(checkout, "verify", **{name: value}), make(checkout, "verify", f"{name}={value}")):
        assert done.returncode == 2
        refused(done, value)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["FORCE", "DRY_RUN"])
@pytest.mark.parametrize("value", ["0", "no", "1;ls", "1 $(shell touch ran)"])
def test_a_flag_is_1_or_not_given(name, value, checkout, environment):
    done = make(checkout, {"FORCE": "base", "DRY_RUN": "runs"}[name], f"{name}={value}", VIRTUAL_ENV=environment)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"error: {name} '{value}'" in done.stderr
    assert calls(environment) == [] and not (checkout / "ran").exists()


# --------------------------------------------------------------------------------------------------- environments

def refused(done: subprocess.CompletedProcess, *named: str) -> None:
    """The project says one line; make adds its own."""
    said, by_make = done.stderr.splitlines()
    assert done.returncode == 2 and not done.stdout
    assert said.startswith("error: ") and by_make.startswith("make: ***")
    assert all(name in said for name in named)


@pytest.mark.parametrize("target", ["reproduce", "verify", "test", "lint", "base"])
def test_an_environment_whose_path_holds_a_space_is_refused(target, checkout, tmp_path):
    environment = stub(tmp_path / "my environment")
    before = snapshot(tmp_path)
    refused(make(checkout, target, VIRTUAL_ENV=environment), str(environment), "space")
    assert snapshot(tmp_path) == before and not calls(environment)


def test_an_environment_without_pip_is_refused_and_one_that_has_it_again_is_set_up(checkout, tmp_path):
    environment = stub(tmp_path / "environment", pip=False)
    refused(make(checkout, "verify", VIRTUAL_ENV=environment), str(environment), "pip")
    assert "install" not in (environment / "bin/python.calls").read_text()
    assert not (environment / ".ouroboros-installed").exists() and not calls(environment)
    (environment / "bin/python.nopip").unlink()
    assert make(checkout, "verify", VIRTUAL_ENV=environment).returncode == 0
    assert (environment / ".ouroboros-installed").read_text() == f"{checkout}\n"


def test_a_real_environment_without_pip_is_refused(checkout, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    before = snapshot(tmp_path / "bare")
    refused(make(checkout, "verify", VIRTUAL_ENV=tmp_path / "bare"), "pip")
    assert snapshot(tmp_path / "bare") == before


@pytest.mark.parametrize("python", ["nowhere", "ls", "echo hello", "$(touch ran)"])
def test_a_python_that_is_none_is_refused_before_an_environment_is_made(python, checkout):
    before = snapshot(checkout)
    refused(make(checkout, "verify", f"PYTHON={python}"), f"'{python}'", "PYTHON=")
    assert snapshot(checkout) == before


def test_an_environment_is_set_up_once_and_again_when_the_lock_or_the_checkout_changes(checkout, environment):
    def installs() -> int:
        assert make(checkout, "verify", VIRTUAL_ENV=environment).returncode == 0
        text = (environment / "bin/python.calls").read_text()
        return len(re.findall("-r\037requirements.lock", text))

    assert [installs(), installs()] == [1, 1]
    stamp = environment / ".ouroboros-installed"
    now = stamp.stat().st_mtime
    for count, name in enumerate(("requirements.lock", ".requirements.hashes", "pyproject.toml"), 2):
        os.utime(stamp, (now + 10 * count,) * 2)
        os.utime(checkout / name, (now + 10 * count + 5,) * 2)
        assert installs() == count
        os.utime(stamp, (now + 10 * count + 6,) * 2)
        assert installs() == count
    stamp.write_text("/another/checkout\n")
    os.utime(stamp, (now + 100,) * 2)
    assert installs() == 5


@pytest.mark.parametrize("old, new", [(r"tqdm==.*", "tqdm==1.0"), (r"tqdm==.*\n", ""), (r"tqdm", "extra==1.0\ntqdm")])
def test_a_lock_whose_hashes_are_of_other_versions_installs_nothing(old, new, checkout, environment):
    lock = checkout / "requirements.lock"
    lock.write_text(re.sub(old, new, lock.read_text(), count=1))
    refused(make(checkout, "verify", VIRTUAL_ENV=environment), "requirements.lock", ".requirements.hashes")
    assert "install" not in (environment / "bin/python.calls").read_text()


def test_a_command_that_fails_fails_make(checkout, environment):
    python = environment / "bin/python"
    python.write_text(STUB + 'case "$*" in *ouroboros*) echo "error: no" >&2; exit 2;; esac\n')
    refused_by_command = make(checkout, "-s", "verify", VIRTUAL_ENV=environment)
    assert refused_by_command.returncode == 2
    assert refused_by_command.stderr.splitlines()[0] == "error: no"
