"""pyproject.toml, requirements.lock, environment.yml and the Makefile never disagree; the user's environment changes no
result."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import lock_hashes
import nbformat
import pytest
import yaml
from conftest import profile_data
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from synthetic import write

import ouroboros
from ouroboros import cli, provenance, reproduce
from ouroboros.analysis.results import load_results
from ouroboros.errors import InputError
from ouroboros.experiment.profile import PROFILES, parse_profile
from ouroboros.log import read_run
from ouroboros.training import sweep
from ouroboros.training.run import execute

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LINES, SITE_LINES = ([line for line in (ROOT / lock).read_text().splitlines() if not line.startswith("#")]
                     for lock in ("requirements.lock", "docs/site/site.lock"))
LOCK, SITE_LOCK = (dict(line.split("==") for line in lines) for lines in (LINES, SITE_LINES))


@pytest.mark.parametrize("lines, lock", [(LINES, LOCK), (SITE_LINES, SITE_LOCK)])
def test_a_lock_pins_one_exact_version_a_line(lines, lock):
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line) for line in lines)  # no local tag such as +cpu
    assert list(lock) == sorted(lock) and len(lock) == len(lines)


@pytest.mark.parametrize("lock, hashed", lock_hashes.HASHED.items())
def test_a_file_is_installed_only_if_its_hash_is_known(lock, hashed, tmp_path):
    """Every pin but torch's has hashes, and no other line stands beside it; pip refuses a file of another one."""
    pins = [line for line in (ROOT / lock).read_text().splitlines() if not line.startswith(("#", "torch=="))]
    entries = (ROOT / hashed).read_text().replace(" \\\n   ", "").splitlines()[1:]
    assert [entry.split()[0] for entry in entries] == pins
    assert all(re.fullmatch(r"\S+( --hash=sha256:[0-9a-f]{64})+", entry) for entry in entries)
    name, version = pins[0].split("==")
    (tmp_path / f"{name.replace('-', '_')}-{version}-py3-none-any.whl").write_bytes(b"another file")
    asked = tmp_path / "asked.hashes"
    asked.write_text(entries[0])
    found = subprocess.run([sys.executable, "-m", "pip", "install", "--dry-run", "--isolated", "--ignore-installed",
                            "--no-deps", "--no-index", f"--find-links={tmp_path}", "--require-hashes", "-r", asked],
                           capture_output=True, text=True)
    assert found.returncode and "DO NOT MATCH THE HASHES" in found.stderr


def test_the_site_changes_nothing_of_the_lock():
    assert not set(SITE_LOCK) & set(LOCK)


def test_the_lock_has_no_gpu():
    assert LOCK["torch"] == "2.13.0"
    assert not [name for name in LOCK if name.startswith(("nvidia", "cuda", "triton"))]  # a GPU is no requirement


def test_the_lock_satisfies_pyproject():
    extras = {None: PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
    del extras["neighbours"]  # at their newest, in a job of their own
    for extra, declared in extras.items():
        lock = SITE_LOCK if extra == "site" else LOCK
        for requirement in map(Requirement, declared):
            name = canonicalize_name(requirement.name)
            assert name in lock, name
            assert requirement.specifier.contains(lock[name]), f"{requirement} but {lock[name]}"


def test_conda_installs_the_same_lock():
    *conda, with_pip = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert conda == ["python=3.11", "pip"]  # whatever else came from conda could differ from the lock
    assert with_pip == {"pip": ["-r requirements.lock", "-e ."]}
    assert SpecifierSet(PROJECT["requires-python"]).contains("3.11.0")


def test_the_makefile_installs_the_same_lock():
    text = (ROOT / "Makefile").read_text()
    assert text.count("pip install") == 4
    assert ("pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r docs/site/site.hashes"
            in text)
    assert "pip install --quiet --no-deps --require-hashes -r .requirements.hashes" in text
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
            read = (*corpus["packages"], *corpus["foreign"], *corpus.get("newer", ()))
            assert {canonicalize_name(name) for name in read} <= set(LOCK), file


def test_one_version():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == ouroboros.__version__


def test_both_ways_to_cite_say_the_same():
    """Zenodo reads `.zenodo.json` alone where it is there."""
    cff, zenodo = (yaml.safe_load((ROOT / name).read_text()) for name in ("CITATION.cff", ".zenodo.json"))
    assert [zenodo[field] for field in ("title", "version", "license", "publication_date", "creators", "keywords")] == [
        cff["title"], cff["version"], cff["license"], str(cff["date-released"]), cff["authors"], cff["keywords"]]


def test_make_help_names_every_target():
    help = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = {"help", "reproduce", "test", "smoke", "runs", "rerun", "compare", "checkpoints", "verify", "base",
               "doctor", "bench", "lab", "site", "lint", "clean", "audit-verify", "audit-kill"}
    assert set(re.findall(r"^  make ([\w-]+)", help, re.M)) == targets


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


# ------------------------------------------------------------------------- the user's environment changes no result

HOSTILE = {
    "ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_DYNAMO_BACKEND": "inductor",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1",
    "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", "PYTHONHASHSEED": "7", "TZ": "Asia/Kolkata",
    "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",  # open() reads and writes ASCII
    "MPLBACKEND": "no such backend",
}
MATPLOTLIBRC = "text.usetex: True\nfont.size: 30\nlines.linewidth: 9\nsavefig.dpi: 20\naxes.facecolor: red\n"
ANALYSIS = """
import sys
from pathlib import Path
from ouroboros.analysis import claims, figures, inventory, pages, tables
from ouroboros.analysis.results import load_results
from ouroboros.reproduce import Output
root, out = map(Path, sys.argv[1:])
results = load_results("smoke", root)
output = Output(results, out)
output.figure(figures.advantage(results), "advantage")
output.table(tables.arm_table(results), "arms")
out.mkdir(exist_ok=True)
(out / "claims.md").write_bytes(pages.markdown(results).encode())
(out / "logs.md").write_bytes(inventory.markdown(root).encode())
"""


def python(*arguments, cwd=ROOT, **variables) -> subprocess.CompletedProcess:
    """A Python process that finds this checkout, with variables set (None: not set) beside those that are."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    environment = {name: str(value) for name, value in environment.items() if value is not None}
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, env=environment,
                          capture_output=True, text=True, errors="replace")


@pytest.fixture
def made(text, root):
    """A function that makes one run in a process with some variables, and returns it."""
    (root / "data.json").write_text(json.dumps(profile_data(text)))

    def make(*launcher, **variables):
        (root / LOG).unlink(missing_ok=True)
        done = python(*launcher, ROOT / "tests/helpers/command.py", root, "run", RUN, **variables)
        assert done.returncode == 0, done.stderr
        return read_run(root / LOG)
    return make


@pytest.fixture
def alone(text, root):
    """The same run made in this process."""
    return read_run(execute(parse_profile(profile_data(text), "t"), RUN, root, root / "here" / f"{RUN}.jsonl",
                            progress=False))


RUN = "controller-d2-r4-corrected-s0"
LOG = f"results/test/runs/{RUN}.jsonl"
LAUNCH = ("-m", "accelerate.commands.launch")


def test_a_run_is_that_of_a_sweeps_job(alone, text, root):
    worker = sweep.Worker(parse_profile(profile_data(text), "test.yaml"), root, "matrix", "local")
    worker._make(worker.profile.find(RUN))
    job = read_run(root / LOG)
    assert job.log.equals(alone.log)
    assert job.manifest["hardware"] == alone.manifest["hardware"]


def test_a_run_is_the_same_in_any_environment(made, alone, tmp_path):
    """Accelerate's own configuration, which its launcher reads, included."""
    folder = tmp_path / "home/accelerate"
    folder.mkdir(parents=True)
    (folder / "default_config.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nmixed_precision: bf16\n"
        "dynamo_config: {dynamo_backend: INDUCTOR}\nnum_machines: 1\nnum_processes: 1\nuse_cpu: false\n")
    there = made(*LAUNCH, HF_HOME=tmp_path / "home", cwd=tmp_path, **HOSTILE)
    assert there.log.equals(alone.log)
    for run in (alone, there):  # as in a job of a sweep, whatever the environment says
        assert run.manifest["hardware"]["threads"] == 1
        assert run.manifest["hardware"]["device"] == "cpu"
        assert run.manifest["hardware"]["mixed_precision"] == "no"


@pytest.mark.parametrize("name", provenance.REFUSED)
def test_a_setting_that_nothing_overrides_is_refused(name, monkeypatch):
    for harmless in ("", "0", "false", "False"):
        monkeypatch.setenv(name, harmless)
        provenance.check_environment()
    monkeypatch.setenv(name, "True")
    with pytest.raises(InputError, match=f"{name} 'True'"):
        provenance.check_environment()


@pytest.mark.parametrize("command", ["base", "run"])
def test_it_is_refused_in_one_line_before_anything_is_made(command, profile, root, monkeypatch, capsys):
    monkeypatch.setattr(cli, "load_profile", lambda name: profile)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    before = {path for path in root.rglob("*") if "results" in path.parts}
    assert cli.main(["base", "--force"] if command == "base" else ["run", RUN], root) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: environment variable ACCELERATE_USE_FSDP 'true'")
    assert err.count("\n") == 1
    assert {path for path in root.rglob("*") if "results" in path.parts} == before


@pytest.fixture(scope="module")
def locales(tmp_path_factory):
    """A function that makes a locale and gives the folder it lies in; nothing is to be made of C."""
    folder = tmp_path_factory.mktemp("locales")

    def made(locale: str) -> Path:
        name, _, encoding = locale.partition(".")
        if encoding and not shutil.which("localedef"):
            pytest.skip("localedef isn't installed")
        if encoding:
            subprocess.run(["localedef", "-i", name, "-f", encoding, folder / locale], capture_output=True)
        if encoding and not (folder / locale).exists():
            pytest.skip(f"the source of locale {name} isn't installed")
        return folder
    return made


def analysed(root: Path, folder: Path, **variables) -> dict[Path, bytes]:
    """What a process of that working directory derives from the logs under a root."""
    done = python("-c", ANALYSIS, root, folder / "out", cwd=folder, **variables)
    assert done.returncode == 0, done.stderr
    return {path.relative_to(folder): path.read_bytes() for path in (folder / "out").rglob("*.*")}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Logs, and what is derived from them in a plain environment."""
    root, folder = tmp_path_factory.mktemp("logs"), tmp_path_factory.mktemp("here")
    write(root, "smoke")
    return root, analysed(root, folder, **dict.fromkeys(HOSTILE))


# a decimal comma in another encoding; I's lower case isn't i
@pytest.mark.parametrize("locale", ["C", "de_DE.ISO-8859-1", "tr_TR.UTF-8"])
def test_tables_figures_and_verdicts_are_the_same_in_any_environment(locale, locales, here, tmp_path):
    (tmp_path / "matplotlibrc").write_text(MATPLOTLIBRC)
    root, derived = here
    variables = HOSTILE | {"LC_ALL": locale, "LOCPATH": locales(locale), "MATPLOTLIBRC": tmp_path}
    assert len(derived) == 7 and analysed(root, tmp_path, **variables) == derived


@pytest.mark.parametrize("kernel", [False, True])
def test_a_notebook_is_run_by_this_python_without_the_users_startup_files(tmp_path, kernel):
    code = "import sys, os\nprint(sys.prefix, {'marked', 'marked_too'} & set(globals()), 1 / 3)"
    cells = [nbformat.v4.new_code_cell("profile = ''", metadata={"tags": ["parameters"]}),
             nbformat.v4.new_code_cell(code)]
    spec = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": spec})
    nbformat.write(notebook, tmp_path / "a.ipynb")
    for file, text in (("ipython/profile_default/startup/a.py", "marked = 1"), ("startup.py", "marked_too = 1"),
                       ("ipython/profile_default/ipython_kernel_config.py",
                        "get_config().InteractiveShell.separate_in = ''\n1 / 0"),
                       ("jupyter/kernels/python3/kernel.json",
                        json.dumps({"argv": ["false"], "display_name": "other", "language": "python"}))):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    script = ("import sys; from pathlib import Path; from ouroboros.reproduce import execute_notebook; "
              "a = Path(sys.argv[1]); "
              "execute_notebook(a / 'a.ipynb', a / 'out/a.ipynb', {'profile': 'tiny'}, {}, " + f"{kernel})")
    done = python("-c", script, tmp_path, IPYTHONDIR=tmp_path / "ipython", PYTHONSTARTUP=tmp_path / "startup.py",
                  JUPYTER_PATH=tmp_path / "jupyter", JUPYTER_DATA_DIR=tmp_path / "jupyter")
    assert done.returncode == 0, done.stderr
    printed = nbformat.read(tmp_path / "out/a.ipynb", 4).cells[-1].outputs[0].text
    assert printed == f"{sys.prefix} set() {1 / 3}\n"


# ------------------------------------------------------------------------------------------------ git and its absence

GIT = ("git", "-c", "user.name=a", "-c", "user.email=a@b")


def repository(folder: Path) -> str:
    """A repository with one commit; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "file").write_text("text")
    for command in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "one"]):
        subprocess.run([*GIT, "-C", folder, *command], check=True)
    return subprocess.run([*GIT, "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()


@pytest.fixture
def asked_anew():
    """What is asked, or said, once a process."""
    provenance._state.cache_clear()
    provenance.note.cache_clear()


def no_git(folder: Path, monkeypatch) -> None:
    repository(folder)
    monkeypatch.setenv("PATH", str(folder))


def no_history(folder: Path, monkeypatch) -> None:
    folder.mkdir()


def history_of_a_folder_above(folder: Path, monkeypatch) -> None:
    repository(folder.parent)
    folder.mkdir()


def another_users(folder: Path, monkeypatch) -> None:
    repository(folder)
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")


def no_commit(folder: Path, monkeypatch) -> None:
    subprocess.run([*GIT, "init", "-q", folder], check=True)


@pytest.mark.parametrize("situation, said", [
    (no_git, "git isn't installed"), (no_history, "no git history"), (history_of_a_folder_above, "no git history"),
    (another_users, "safe.directory"), (no_commit, "has no commit")])
def test_without_a_history_one_line_says_so_and_all_else_goes_on(situation, said, tmp_path, monkeypatch, capsys,
                                                                 asked_anew):
    folder = tmp_path / "checkout"
    situation(folder, monkeypatch)
    write(folder, "tiny", keep=lambda spec: spec.arm == "cut")
    for _ in range(2):
        made = provenance.provenance(folder)
    assert made["commit"] is None and made["clean"] is False
    out, err = capsys.readouterr()
    assert not out and err.startswith("note: no commit is recorded: ") and said in err and err.count("\n") == 1
    results = load_results("tiny", folder)
    assert list(reproduce._provenance_faults(results, folder)) == []
    out, err = capsys.readouterr()
    assert not out and err.startswith("note: whether the commits of the runs exist isn't checked: ")
    assert said in err and err.count("\n") == 1


def test_a_shallow_clone_knows_its_commit_but_not_the_runs(tmp_path, capsys, asked_anew):
    repository(tmp_path / "whole")
    subprocess.run([*GIT, "-C", tmp_path / "whole", "commit", "-q", "--allow-empty", "-m", "two"], check=True)
    subprocess.run([*GIT, "clone", "-q", "--depth", "1", f"file://{tmp_path}/whole", tmp_path / "shallow"], check=True)
    write(tmp_path / "shallow", "tiny", keep=lambda spec: spec.arm == "cut")
    assert provenance.provenance(tmp_path / "shallow")["commit"]
    results = load_results("tiny", tmp_path / "shallow")
    assert list(reproduce._provenance_faults(results, tmp_path / "shallow")) == []
    assert "shallow" in capsys.readouterr().err


def test_the_commit_is_the_checkouts_whatever_the_users_git_is_told(tmp_path, monkeypatch, asked_anew):
    mine, other = repository(tmp_path / "mine"), tmp_path / "other"
    repository(other)
    subprocess.run([*GIT, "-C", other, "commit", "-q", "--allow-empty", "-m", "two"], check=True)
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(other))
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "status.showUntrackedFiles")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "no")
    assert provenance._state(tmp_path / "mine") == (mine, True)
    provenance._state.cache_clear()
    (tmp_path / "mine/new.py").touch()
    assert provenance._state(tmp_path / "mine") == (mine, False)


def test_a_checkout_that_is_not_at_its_commit_is_said_before_hours_are_spent(tmp_path, capsys, asked_anew):
    def git(*words):
        subprocess.run([*GIT, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "code.py").write_text("x = 1\n")
    git("add", ".")
    git("commit", "-m", "first")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "log").write_text("made meanwhile")
    assert provenance._state.__wrapped__(tmp_path)[1] and not capsys.readouterr().err
    (tmp_path / "queue.lock").write_text("")
    assert not provenance._state.__wrapped__(tmp_path)[1]
    assert "isn't at its commit (?? queue.lock): verify will refuse logs" in capsys.readouterr().err
