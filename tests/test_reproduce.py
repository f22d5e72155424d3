"""From raw logs to committed outputs, and the check that names each place where they disagree."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import nbformat
import pytest
from synthetic import loss, plain, write, write_run

from ouroboros import claims, metrics, rates, reproduce
from ouroboros.errors import InputError
from ouroboros.experiment import load_profile, switches

ROOT = Path(__file__).resolve().parents[1]
README = f"# Title\n\n{reproduce.BEGIN}\n{reproduce.END}\n\nMore.\n"


def checkout(root: Path) -> Path:
    """A folder with what deriving needs besides logs."""
    shutil.copytree(ROOT / "notebooks", root / "notebooks", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    (root / "pyproject.toml").touch()
    (root / "README.md").write_text(README)
    return root


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory):
    """A checkout whose outputs were made once by `reproduce`, and a folder with the same derived again."""
    root = checkout(tmp_path_factory.mktemp("reproduced"))
    write(root)
    reproduce.reproduce("tiny", root)
    again = tmp_path_factory.mktemp("again")
    reproduce.derive("tiny", root, again)
    return root, again


@pytest.fixture
def committed(reproduced, tmp_path, monkeypatch):
    """A copy to spoil; deriving, which takes long, copies what was derived before."""
    root, again = reproduced
    copy = tmp_path / "checkout"
    shutil.copytree(root, copy)
    monkeypatch.setattr(reproduce, "derive", lambda profile, root, out: shutil.copytree(again, out, dirs_exist_ok=True))
    return copy


def files(root: Path) -> dict[str, bytes]:
    return {str(path): (root / path).read_bytes() for path in reproduce._outputs(root, "tiny")}


# -------------------------------------------------------------------------------------------------------- deriving

def test_two_executions_are_the_same_bytes(reproduced):
    root, again = reproduced
    made = files(root)
    assert made == files(again)
    assert {"results/tiny/claims.md", "results/tiny/tables/arms.csv", "results/tiny/tables/arms.md",
            "figures/tiny/advantage.png", "figures/tiny/advantage.pdf", "figures/tiny/advantage.json",
            "results/tiny/notebooks/01_gap.ipynb"} <= set(made)


def test_each_set_of_logs_is_dated(reproduced):
    text = (reproduced[0] / "results/README.md").read_text()
    (matrix,) = [line for line in text.splitlines() if line.startswith("| tiny: matrix")]
    count = len([*filter(plain, load_profile("tiny").runs())])
    assert [cell.strip() for cell in matrix.strip("|").split("|")][1:5] == [
        str(count), "2026-01-01", "2026-01-01", "0000000"]
    assert matrix.endswith(f"| {count / 3600:.1f}     |") and "| tiny: base" in text


def test_every_notebook_leaves_tables_a_figure_and_a_finding(reproduced):
    for path in sorted((reproduced[0] / "results/tiny/notebooks").glob("*.ipynb")):
        outputs = [output for cell in nbformat.read(path, 4).cells for output in cell.get("outputs", ())]
        assert any("image/png" in output.get("data", {}) for output in outputs)
        assert any("text/html" in output.get("data", {}) for output in outputs)
        counted = path.stem in ("09_cost", "10_arithmetic")  # under no protocol
        told_of = "`paper`" if counted else "`corrected`"
        assert told_of in outputs[-1]["data"]["text/markdown"]
        assert not [output for output in outputs if output["output_type"] in ("error", "stream")]


def test_executed_notebooks_tell_no_time_and_no_place(reproduced):
    for path in (reproduced[0] / "results/tiny/notebooks").glob("*.ipynb"):
        notebook = nbformat.read(path, 4)
        assert set(notebook.metadata) == {"kernelspec"}
        assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells)
        text = path.read_text()
        assert not re.search(r"\d\d:\d\d:\d\d|20\d\d-\d\d-\d\d|duration", text)
        assert str(reproduced[0]) not in text and str(ROOT) not in text and str(Path.home()) not in text


def test_the_repositorys_notebooks_hold_no_outputs_and_have_parameters():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = nbformat.read(path, 4).cells
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
        assert [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", ())] == ['profile = "tiny"']
        assert cells[0].source.startswith("# ") and cells[0].source.splitlines()[0].endswith("?")


def test_notebooks_type_no_measured_number():
    """What was found stands in outputs only: prose may hold reported numbers, code none but its own."""
    measured = re.compile(r"\d\.\d{3,}")
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        assert not measured.search("\n".join(cell.source for cell in nbformat.read(path, 4).cells)), path


def test_the_readme_opens_with_the_verdicts(reproduced):
    root, _ = reproduced
    results = metrics.load("tiny", root)
    assert (root / "README.md").read_text() == README.replace(
        f"{reproduce.BEGIN}\n{reproduce.END}", reproduce.readme_block(results))
    assert claims.summary(results) in (root / "README.md").read_text()


def test_the_repositorys_readme_has_the_marks():
    text = (ROOT / "README.md").read_text()
    assert text.count(reproduce.BEGIN) == text.count(reproduce.END) == 1
    assert text.index(reproduce.BEGIN) < text.index("\n## ")  # on the first screen


def test_a_matrix_that_has_hardly_begun_derives_and_smoke_is_marked(tmp_path, capsys):
    root = checkout(tmp_path)
    write(root, "smoke", keep=lambda spec: spec.id == "cut-any-s0", base=False)
    reproduce.reproduce("smoke", root)
    assert "no runs" in capsys.readouterr().out
    assert (root / "results/smoke/tables/arms.md").read_text().startswith("**smoke: not a result.**")
    assert "**smoke: not a result.**" in (root / "results/smoke/claims.md").read_text()
    assert (root / "README.md").read_text() == README  # another profile's verdicts open it


# -------------------------------------------------------------------------------------------------------- notebooks

def notebook(folder: Path, *sources: str) -> Path:
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    cells[0].metadata["tags"] = ["parameters"]
    metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), folder / "one.ipynb")
    return folder / "one.ipynb"


def test_an_unknown_parameter_stops_the_run(tmp_path):
    target = tmp_path / "out.ipynb"
    with pytest.raises(InputError, match="one.ipynb: parameter 'profil' is unknown; it has profile"):
        reproduce.execute(notebook(tmp_path, 'profile = "tiny"'), target, {"profil": "smoke"}, tmp_path, tmp_path)
    assert not target.exists()


def test_a_failing_cell_is_told_in_a_line(tmp_path):
    book = notebook(tmp_path, 'profile = "tiny"', "raise ValueError(profile)")
    with pytest.raises(InputError, match="one.ipynb: a cell failed with ValueError: smoke"):
        reproduce.execute(book, tmp_path / "out.ipynb", {"profile": "smoke"}, tmp_path, tmp_path)
    assert "OUROBOROS_ROOT" not in os.environ


def test_home_is_found_from_any_folder(tmp_path, monkeypatch):
    root = checkout(tmp_path)
    monkeypatch.chdir(root / "notebooks")
    assert reproduce.home() == root
    monkeypatch.chdir("/")
    assert reproduce.home() == ROOT
    monkeypatch.setenv("OUROBOROS_ROOT", str(root))
    assert reproduce.home() == root


# ------------------------------------------------------------------------------------------------------- verifying

def test_what_was_reproduced_verifies(committed):
    assert reproduce.verify("tiny", committed) == []


def edit(path: Path, pattern: str, new) -> None:
    text, count = re.subn(pattern, new, path.read_text(), count=1)
    assert count == 1, path
    path.write_text(text)


def first_number_times(factor: float):
    return lambda match: match[1] + repr(float(match[2]) * factor)


CELL = r"(corrected,depth 4,)([\d.]+)"  # of advantage.csv


@pytest.mark.parametrize("path, pattern, new, place", [
    ("results/tiny/tables/advantage.csv", CELL, first_number_times(1.0001), "row 6, column 'difference'"),
    ("results/tiny/tables/advantage.md", r"0\.254", "0.255", "line "),
    ("results/tiny/claims.md", r"\| holds ", "| fails ", "line "),
    ("results/tiny/notebooks/01_gap.ipynb", "is better than the cut", "is worse than the cut", "line "),
    ("figures/tiny/advantage.json", r'("y": \[\s+)([\d.]+)', first_number_times(1.01), "line "),
    ("README.md", r"\| holds ", "| fails ", "line "),
    ("results/README.md", r"2026-01-01", "2025-01-01", "line "),
    ("README.md", reproduce.END, "", "the marks"),
    ("results/tiny/tables/arms.csv", r"\A(?s:.*)\Z", "a,b\n1,2\n", "shape"),
    ("figures/tiny/gate.json", r"\A\{", "", "can't be read"),
])
def test_an_edited_output_is_named(committed, path, pattern, new, place):
    edit(committed / path, pattern, new)
    found = [line for line in reproduce.verify("tiny", committed) if line.startswith(f"{path}: ")]
    assert len(found) == 1 and place in found[0]


def test_digits_beyond_the_sixth_may_differ_between_machines(committed):
    edit(committed / "results/tiny/tables/advantage.csv", CELL, first_number_times(1 + 1e-8))
    assert reproduce.verify("tiny", committed) == []


def test_a_difference_of_rounding_alone_is_none():
    assert reproduce._same_text("a 0 b", "a -1.2e-16 b") is None
    assert reproduce._same_text("0.123456", "0.123457") is not None
    assert reproduce._same_text("a\nb", "a") == "2 lines committed, 1 derived"


@pytest.mark.parametrize("name", ["gate.png", "gate.pdf"])
def test_a_picture_must_be_the_one_that_its_sidecar_names(committed, name):
    (committed / "figures/tiny" / name).write_bytes(b"another")
    assert reproduce.verify("tiny", committed) == [f"figures/tiny/{name}: isn't the picture that its sidecar names"]


def test_outputs_too_many_or_too_few_are_named(committed):
    (committed / "results/tiny/tables/base.csv").unlink()
    (committed / "results/tiny/tables/magic.csv").write_text("a\n1\n")
    assert reproduce.verify("tiny", committed) == [
        "results/tiny/tables/base.csv: derived, but not committed",
        "results/tiny/tables/magic.csv: committed, but nothing derives it"]


def test_reproduce_rewrites_only_what_verify_would_fault(committed, capsys):
    table, other = (committed / "results/tiny/tables" / name for name in ("advantage.csv", "arms.csv"))
    edit(table, CELL, first_number_times(1 + 1e-8))
    kept = table.read_bytes()
    os.utime(other, (1, 1))
    edit(committed / "figures/tiny/gate.json", r'("y": \[\s+)(-?[\d.]+)', first_number_times(2))
    (committed / "results/tiny/tables/magic.csv").write_text("a\n1\n")
    reproduce.reproduce("tiny", committed)
    assert table.read_bytes() == kept and other.stat().st_mtime == 1
    assert not (committed / "results/tiny/tables/magic.csv").exists()
    assert reproduce.verify("tiny", committed) == []
    assert "4 outputs written" in capsys.readouterr().out  # a figure is three files, and the table that went


# ------------------------------------------------------------------------------------------------------ provenance

def change_manifest(root: Path, run: str, field: str, value) -> None:
    path = root / ("results/tiny/base" if run == "base" else f"results/tiny/runs/{run}") / "manifest.json"
    data = json.loads(path.read_text())
    *outer, last = field.split(".")
    inner = data
    for key in outer:
        inner = inner[key]
    inner[last] = value
    path.write_text(json.dumps(data))


@pytest.mark.parametrize("run, field, value", [
    ("cut-any-s0", "clean", False),
    ("cut-any-s0", "locked", False),
    ("static-d4-r8-corrected-s1", "hashes.base", "another"),
    ("static-d4-r8-corrected-s1", "config.training", {}),
    ("base", "clean", False),
])
def test_runs_that_may_not_be_committed_are_named(tmp_path, run, field, value):
    write(tmp_path)
    assert list(reproduce._provenance_faults("tiny", tmp_path)) == []
    change_manifest(tmp_path, run, field, value)
    (fault,) = reproduce._provenance_faults("tiny", tmp_path)
    assert f"{run}/manifest.json: field '{field}'" in fault


def test_a_commit_that_the_repository_does_not_know_is_named(tmp_path):
    write(tmp_path, keep=lambda spec: spec.arm == "cut")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "one"], check=True)
    faults, seeds = list(reproduce._provenance_faults("tiny", tmp_path)), load_profile("tiny").matrix.seeds
    assert len(faults) == len(seeds) and all("field 'commit': 000" in fault for fault in faults)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    for seed in seeds:
        change_manifest(tmp_path, f"cut-any-s{seed}", "commit", head)
    assert list(reproduce._provenance_faults("tiny", tmp_path)) == []


def test_rates_must_be_those_that_the_search_chose(tmp_path):
    profile = load_profile("tiny")
    for spec in profile.search_runs():
        write_run(tmp_path, profile, spec, 4 + abs(spec.rate - 3e-3))
    for spec in profile.runs():
        if spec.arm == "static" and spec.seed == 0 and not spec.level:
            rate = 1e-3 if switches(spec.protocol)["rate"] == "shared" else 3e-3
            write_run(tmp_path, profile, spec, loss(spec.arm, spec.depth, spec.protocol, 0), rate=rate)
    rates.write(profile, tmp_path)
    assert list(reproduce._provenance_faults("tiny", tmp_path)) == []
    change_manifest(tmp_path, "static-d4-r8-corrected-s0", "rate", 1e-2)
    (fault,) = reproduce._provenance_faults("tiny", tmp_path)
    assert "static-d4-r8-corrected-s0/manifest.json: field 'rate': 0.01, the search chose 0.003" in fault
    change_manifest(tmp_path, "static-d4-r8-corrected-s0", "rate", 3e-3)
    edit(rates.path(profile, tmp_path), '"dev": [0-9.]+', '"dev": 1.0')
    (fault,) = reproduce._provenance_faults("tiny", tmp_path)
    assert "rates.json: isn't what the search's logs say" in fault
