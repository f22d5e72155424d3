"""From raw logs to committed outputs, and the check that names each place where they disagree."""

import contextlib
import os
import random
import re
import shutil
import subprocess
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from kills import finished, killed
from synthetic import WHOLE, loss, manifest, plain, write, write_base, write_run, write_searches

from ouroboros import log, reproduce
from ouroboros.analysis import pages
from ouroboros.analysis import results as analysed
from ouroboros.analysis.figures import DOT
from ouroboros.analysis.results import Results, load_results
from ouroboros.cli import main
from ouroboros.errors import InputError
from ouroboros.experiment.plan import RunSpec
from ouroboros.experiment.profile import IDENTITY, load_profile
from ouroboros.experiment.protocol import switches
from ouroboros.log import Run, write_atomic

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
    write_searches(root, write(root, "tiny"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reproduce, "JOBS", 1)  # the other core has tests to do
        reproduce.reproduce(["tiny"], root)
        again, results = tmp_path_factory.mktemp("again"), load_results("tiny", root)
        logs = root / "results/tiny/runs"
        logs.rename(root / "gone")  # so that a kernel can't open one
        reproduce.derive(results, root, again)
        (root / "gone").rename(logs)
    return root, again


@pytest.fixture(scope="module")
def results(reproduced):
    return load_results("tiny", reproduced[0])


@pytest.fixture
def derived_before(reproduced, monkeypatch):
    """Deriving, which takes long, copies what was derived before."""
    monkeypatch.setattr(reproduce, "derive", copying(reproduced[1]))


def copying(again: Path):
    def derive(results, root, out, pictures=True):
        if results.profile.name == "tiny":
            shutil.copytree(again, out, dirs_exist_ok=True)
        else:
            write_atomic(out / "results" / results.profile.name / "claims.md", pages.markdown(results))
    return derive


@pytest.fixture
def committed(reproduced, derived_before, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(reproduced[0], tmp_path / "checkout")


@pytest.fixture
def read_before(committed, results, monkeypatch):
    """The same where outputs alone are spoilt: its logs aren't read again."""
    monkeypatch.setattr(reproduce, "load_results", lambda profile, root: results)
    return committed


def files(root: Path) -> dict[str, bytes]:
    return {str(path): (root / path).read_bytes() for path in reproduce._outputs(root, "tiny")}


# -------------------------------------------------------------------------------------------------------- deriving

def test_two_executions_are_the_same_bytes(reproduced):
    """And the second read no log: the runs were handed over."""
    root, again = reproduced
    made = files(root)
    assert made == files(again) and not [name for name, content in made.items() if b"CreationDate" in content]
    assert {"results/tiny/claims.md", "results/tiny/tables/arms.csv", "results/tiny/tables/arms.md",
            "figures/tiny/advantage.png", "figures/tiny/advantage.pdf", "figures/tiny/advantage.json",
            "results/tiny/notebooks/02_gap.ipynb"} <= set(made)


def test_each_set_of_logs_is_dated(reproduced):
    text = (reproduced[0] / "results/README.md").read_text()
    rows = {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.strip("|").split("|")]
                                              for line in text.splitlines() if line.startswith("| tiny"))}
    matrix = sum(plain(spec) and spec.purpose == "matrix" for spec in load_profile("tiny").runs())
    searched = len([*reproduced[0].glob("results/tiny/runs/*-s9-*")])
    assert rows["tiny: matrix"][:4] == [str(matrix), "2026-01-01", "2026-01-01", "0000000"]
    assert rows["tiny: learning-rate search"][:4] == [str(searched), "2026-01-01", "2026-01-01", "0000000"]
    assert rows["tiny: matrix"][-1] == f"{matrix / 3600:.1f}"
    assert set(rows) == {"tiny: matrix", "tiny: learning-rate search", "tiny: base"}


def test_every_notebook_answers_first_and_shows_a_figure_and_a_table(reproduced):
    for path in sorted((reproduced[0] / "results/tiny/notebooks").glob("*.ipynb")):
        outputs = [output for cell in nbformat.read(path, 4).cells for output in cell.get("outputs", ())]
        answer, figure, table = (output["data"] for output in outputs[:3])
        assert all(line.startswith("- ") for line in answer["text/markdown"].splitlines()), path
        assert "image/png" in figure and "<details>" not in table["text/html"], path
        assert not [output for output in outputs if output["output_type"] in ("error", "stream")]


def test_a_table_in_a_notebook_is_small_or_folded_beside_its_csv(reproduced):
    """Of the committed notebooks too, which hold more runs than the synthetic ones; what is left of an older smoke run
    here is nobody's."""
    committed = [path for path in ROOT.glob("results/*/notebooks/*.ipynb") if "smoke" not in path.parts]
    for path in [*reproduced[0].glob("results/*/notebooks/*.ipynb"), *committed]:
        for cell in nbformat.read(path, 4).cells if path.name != reproduce.TOUR else ():
            for page in [output["data"]["text/html"] for output in cell.get("outputs", ())
                         if "text/html" in output.get("data", {})]:
                if folded := re.fullmatch('<details><summary>.*<a href="([^"]+)">CSV</a>.*</details>', page, re.DOTALL):
                    assert (path.parent / folded[1]).exists(), (path, folded[1])
                else:
                    rows = page.partition("<tbody>")[2].count("<tr>")
                    assert 1 <= rows <= 12 and page.count("<th>") <= 8, (path, cell.source)


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
        profile = "tiny" if path.name == reproduce.TOUR else "smollm2"  # the headline
        tagged = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", ())]
        assert tagged == [f'profile = "{profile}"']
        assert cells[0].source.startswith("# ") and cells[0].source.splitlines()[0].endswith("?")


def test_notebooks_type_no_measured_number():
    """What was found stands in outputs only: prose may hold reported numbers, code none but its own."""
    measured = re.compile(r"\d\.\d{3,}")
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        assert not measured.search("\n".join(cell.source for cell in nbformat.read(path, 4).cells)), path


def test_the_readme_opens_with_the_verdicts(reproduced, results):
    root, _ = reproduced
    assert (root / "README.md").read_text() == README.replace(
        f"{reproduce.BEGIN}\n{reproduce.END}", reproduce.readme_block(results))  # the other has no logs there
    assert pages.summary(results) in (root / "README.md").read_text()


def test_the_repositorys_readme_has_the_marks():
    text = (ROOT / "README.md").read_text()
    assert text.count(reproduce.BEGIN) == text.count(reproduce.END) == 1
    assert text.index(reproduce.BEGIN) < text.index("\n## ")  # on the first screen


def test_a_matrix_that_has_hardly_begun_derives_and_smoke_is_marked(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reproduce, "JOBS", 1)
    root = checkout(tmp_path)
    write(root, "smoke", keep=lambda spec: spec.id == "cut-any-s0", base=False)
    reproduce.reproduce(["smoke"], root)
    assert "no runs" in capsys.readouterr().out
    assert (root / "results/smoke/tables/arms.md").read_text().startswith("**smoke: not a result.**")
    assert "**smoke: not a result.**" in (root / "results/smoke/claims.md").read_text()
    assert (root / "README.md").read_text() == README  # another profile's verdicts open it
    assert not (root / "results/README.md").exists()  # its logs aren't committed
    plain = tmp_path / "plain"  # as `verify` derives, of one notebook
    for notebook in (root / "notebooks").glob("*.ipynb"):
        if notebook.name != "10_cost.ipynb":
            notebook.unlink()
    reproduce.derive(load_results("smoke", root), root, plain, pictures=False)
    assert {path.read_bytes() for path in plain.glob("figures/smoke/*.p*")} == {DOT}
    assert {found for _, found in reproduce._differences("smoke", root, plain)} == {"committed, but nothing derives it"}


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
        reproduce.execute_notebook(notebook(tmp_path, 'profile = "tiny-deep"'), target, {"profil": "smoke"}, {})
    assert not target.exists()


def test_a_failing_cell_is_told_in_a_line(tmp_path):
    book = notebook(tmp_path, 'profile = "tiny-deep"', "raise ValueError(profile)")
    before = dict(os.environ)
    with pytest.raises(InputError, match="one.ipynb: a cell failed with ValueError: smoke"):
        reproduce.execute_notebook(book, tmp_path / "out.ipynb", {"profile": "smoke"},
                                   {"OUROBOROS_ROOT": str(tmp_path)})
    assert os.environ == before and "OUROBOROS_ROOT" not in before


def test_a_notebook_reads_what_was_handed_over_and_a_command_reads_the_logs(results, reproduced, monkeypatch):
    monkeypatch.setenv("OUROBOROS_ROOT", str(reproduced[0]))
    with monkeypatch.context() as patch:
        patch.setattr(reproduce, "_handed_over", {})
        reproduce._hand_over(results.profile, {"cut-any-s0": results.runs["cut-any-s0"]})
        assert list(reproduce.open_profile("tiny")[0].runs) == ["cut-any-s0"]
        assert len(load_results("tiny", reproduced[0]).runs) == len(results.runs)  # what verify reads
    assert len(reproduce.open_profile("tiny")[0].runs) == len(results.runs)


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
    assert reproduce.verify(["tiny"], committed) == []


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
    ("results/tiny/notebooks/02_gap.ipynb", "is better than the cut", "is worse than the cut", "line "),
    ("figures/tiny/advantage.json", r'("y": \[\s+)([\d.]+)', first_number_times(1.01), "line "),
    ("README.md", r"\| holds ", "| fails ", "line "),
    ("results/README.md", r"2026-01-01", "2025-01-01", "line "),
    ("README.md", reproduce.END, "", "the marks"),
    ("results/tiny/tables/arms.csv", r"\A(?s:.*)\Z", "a,b\n1,2\n", "shape"),
    ("results/tiny/tables/arms.csv", r"\A(?s:.*)\Z", "", "line 1: committed ''"),
    ("results/tiny/tables/arms.csv", r"\A", " ", "row 0, column ' protocol'"),
    ("figures/tiny/gate.json", r"\A\{", "", "line 1: "),
    ("results/tiny/notebooks/02_gap.ipynb", "<td>", "<td>1", "line "),
    ("results/tiny/notebooks/02_gap.ipynb", r'(image/png": "iVBO.{200}).', r"\g<1>=", "shows a picture"),
])
def test_an_edited_output_is_named(read_before, path, pattern, new, place):
    edit(read_before / path, pattern, new)
    found = [line for line in reproduce.verify(["tiny"], read_before) if line.startswith(f"{path}: ")]
    assert len(found) == 1 and place in found[0]


def test_digits_beyond_the_sixth_may_differ_between_machines(read_before):
    edit(read_before / "results/tiny/tables/advantage.csv", CELL, first_number_times(1 + 1e-8))
    assert reproduce.verify(["tiny"], read_before) == []


def test_each_log_is_parsed_once_a_command(committed, monkeypatch):
    for command in (reproduce.reproduce, reproduce.verify):
        parsed = Counter()

        def counting(path, read=log.read_run, parsed=parsed):
            parsed[path] += 1
            return read(path)

        with monkeypatch.context() as patch:
            patch.setattr(log, "read_run", counting)
            patch.setattr(analysed, "read_run", counting)
            command(["tiny"], committed)
        runs = {path: count for path, count in parsed.items() if path.name != "base.jsonl"}
        assert set(runs) == {*committed.glob("results/tiny/runs/*.jsonl")} and set(runs.values()) == {1}
        assert parsed.total() <= len(runs) + 1


@pytest.fixture(scope="module")
def both(reproduced, tmp_path_factory):
    """The same beside a few logs of another profile, with what is derived from these: no test changes it."""
    folder = shutil.copytree(reproduced[0], tmp_path_factory.mktemp("both"), dirs_exist_ok=True)
    write(folder, "tiny-deep", keep=lambda spec: spec.arm in ("full", "cut"), base=False)
    write(folder, "smoke", keep=lambda spec: spec.arm == "cut", base=False)  # whose logs aren't committed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reproduce, "derive", copying(reproduced[1]))
        reproduce.reproduce(reproduce.committed(folder), folder)
    return folder


@pytest.fixture
def two(both, derived_before, tmp_path):
    """A copy of it to spoil."""
    return shutil.copytree(both, tmp_path / "both")


def verified(capsys, root, *arguments) -> list[str]:
    """What `verify` names."""
    capsys.readouterr()
    code = main(["verify", *arguments], root)
    out, err = capsys.readouterr()
    differs = [line.removeprefix("differs: ") for line in err.splitlines() if line.startswith("differs: ")]
    assert code == bool(differs) and bool(out) != bool(differs)
    return differs


def test_verify_checks_every_profile_with_committed_logs_or_the_one_that_is_named(two, capsys):
    assert reproduce.committed(two) == ["tiny-deep", "tiny"]
    for arguments in ([], ["--profile", "tiny-deep"], ["--profile", "tiny"]):
        assert verified(capsys, two, *arguments) == []
    edit(two / "results/tiny-deep/claims.md", "no runs", "holds")
    edit(two / "figures/tiny/gate.json", r'("x": \[\s+)(-?[\d.]+)', first_number_times(2))
    (few,), (whole,) = (verified(capsys, two, "--profile", name) for name in ("tiny-deep", "tiny"))
    assert few.startswith("results/tiny-deep/claims.md: line ")
    assert whole.startswith("figures/tiny/gate.json: line ")
    assert verified(capsys, two) == [few, whole]


def test_verify_says_which_profiles_it_checked(two, capsys):
    for arguments, named in (([], "tiny-deep, tiny"), (["--profile", "tiny-deep"], "tiny-deep")):
        assert main(["verify", *arguments], two) == 0
        assert capsys.readouterr().out == f"verify: everything committed for {named} follows from the raw logs\n"


@pytest.mark.parametrize("arguments", [[], ["--profile", "tiny-deep"], ["--profile", "tiny"]])
def test_all_of_the_readmes_is_checked_whichever_profile_is_named(arguments, two, capsys):
    edit(two / "README.md", r"\| holds ", "| fails ")
    edit(two / "results/README.md", r"(tiny: matrix .*)2026-01-01", r"\g<1>2025-01-01")
    logs, readme = verified(capsys, two, *arguments)
    assert logs.startswith("results/README.md: line ") and readme.startswith("README.md: line ")


def test_the_page_of_two_scales_is_derived_and_checked(two, capsys, monkeypatch):
    monkeypatch.setattr(reproduce, "README_PROFILES", ("tiny", "tiny-deep"))
    reproduce.reproduce(["tiny-deep"], two)
    assert verified(capsys, two) == []
    edit(two / reproduce.SCALES, r"\| yes, ", "| no, ")
    (found,) = verified(capsys, two, "--profile", "tiny-deep")
    assert found.startswith(f"{reproduce.SCALES}: line ")
    monkeypatch.setattr(reproduce, "README_PROFILES", ("tiny", "small"))  # of which one has no logs
    assert verified(capsys, two)[0].startswith(f"{reproduce.SCALES}: line 1: committed '# Two scales")
    reproduce.reproduce(["tiny-deep"], two)
    assert not (two / reproduce.SCALES).exists() and verified(capsys, two) == []


def test_a_readme_without_a_place_for_the_verdicts_is_refused_before_anything_is_written(two):
    edit(two / "README.md", reproduce.END, "")
    edit(two / "results/tiny-deep/claims.md", "no runs", "holds")
    with pytest.raises(InputError, match="README.md: the marks .* must stand there, once each"):
        reproduce.reproduce(["tiny-deep"], two)
    assert "holds" in (two / "results/tiny-deep/claims.md").read_text()


def test_a_profile_whose_logs_are_not_committed_has_no_part_in_the_readmes(two, capsys):
    edit(two / "README.md", r"\| holds ", "| fails ")
    assert verified(capsys, two, "--profile", "smoke") == ["results/smoke/claims.md: derived, but not committed"]


def test_an_edited_log_is_refused_by_its_name(two, capsys):
    path = two / "results/tiny/runs/cut-any-s0.jsonl"
    edit(path, r'"values":\[6\.0\]', '"values":[5.0]')
    for command in (["verify"], ["reproduce"], ["verify", "--profile", "tiny-deep"]):  # README is of these logs
        assert main(command, two) == 2
        assert f"{path}: its seal doesn't fit" in capsys.readouterr().err


def test_a_table_of_no_rows_agrees_with_itself_alone():
    none, one = (frame.to_csv(index=False) for frame in (pd.DataFrame(), pd.DataFrame({"a": [1]})))
    assert reproduce._difference(".csv", none, none) is None
    assert reproduce._difference(".csv", none, one) and reproduce._difference(".csv", one, none)


def test_a_difference_of_rounding_alone_is_none():
    assert reproduce._same_text("a 0 b", "a -1.2e-16 b") is None
    assert reproduce._same_text("0.123456", "0.123457") and reproduce._same_text("1e-12", "2e-12")  # a p-value's least
    assert reproduce._same_text("1e-3 0.5,", "0.001 0.50000001,") is None
    assert reproduce._same_text("a\nb", "a") == "2 lines committed, 1 derived"


@pytest.mark.parametrize("old, new", [
    ("3235181", "3235182"), ("9214592", "9214593"), ("-1", "1"), ("fd214403466", "fd214403467"),
    ("82e12345", "82e12346"),
    ("12345678e1f", "12345679e1f"), ("a_12345678", "a_12345679"), ("r1.23456789x", "r1.23456780x"), ("0.5", ".05"),
])
def test_counts_and_hashes_are_compared_to_the_last_digit(old, new):
    assert reproduce._same_text(f"| {old} |", f"| {new} |") == f"line 1: committed '| {old} |', derived '| {new} |'"


@pytest.mark.parametrize("name", ["gate.png", "gate.pdf"])
def test_a_picture_must_be_the_one_that_its_sidecar_names(read_before, name):
    (read_before / "figures/tiny" / name).write_bytes(b"another")
    shown = ["results/tiny/notebooks/04_gate.ipynb: shows a picture that is none of the profile's figures"]
    assert reproduce.verify(["tiny"], read_before) == [
        f"figures/tiny/{name}: isn't the picture that its sidecar names"] + shown * name.endswith("png")


def test_outputs_too_many_or_too_few_are_named(read_before):
    (read_before / "results/tiny/tables/arms.csv").unlink()
    (read_before / "results/tiny/tables/magic.csv").write_text("a\n1\n")
    assert reproduce.verify(["tiny"], read_before) == [
        "results/tiny/tables/arms.csv: derived, but not committed",
        "results/tiny/tables/magic.csv: committed, but nothing derives it"]


def test_reproduce_rewrites_only_what_verify_would_fault(committed, capsys):
    table, other = (committed / "results/tiny/tables" / name for name in ("advantage.csv", "arms.csv"))
    edit(table, CELL, first_number_times(1 + 1e-8))
    kept = table.read_bytes()
    os.utime(other, (1, 1))
    edit(committed / "figures/tiny/gate.json", r'("x": \[\s+)(-?[\d.]+)', first_number_times(2))
    (committed / "results/tiny/tables/magic.csv").write_text("a\n1\n")
    reproduce.reproduce(["tiny"], committed)
    assert table.read_bytes() == kept and other.stat().st_mtime == 1
    assert not (committed / "results/tiny/tables/magic.csv").exists()
    assert reproduce.verify(["tiny"], committed) == []
    # a figure is three files, a notebook shows it, and the table that went
    assert "5 outputs written" in capsys.readouterr().out


def test_reproduce_killed_at_any_moment_and_given_again_ends_the_same(committed):
    """`KILLS=100 pytest -k killed` is the long form."""
    def job():
        with contextlib.redirect_stdout(None):
            reproduce.reproduce(["tiny"], committed)

    kills, generator, whole = int(os.environ.get("KILLS", 2)), random.Random(1), files(committed)
    lasted, count = finished([job]), 0
    while count < kills:
        for name in whole:
            (committed / name).unlink(missing_ok=True)
        (committed / "README.md").write_text(README)
        count += killed([job], lasted, generator)
    finished([job])
    assert files(committed) == whole and reproduce.verify(["tiny"], committed) == []


# ------------------------------------------------------------------------------------------------------ provenance

def faults(results, root, changes=(), without=()) -> list[str]:
    """The faults of runs when fields of some manifests, {run: {field.field: value}}, are others or runs are missing."""
    runs = {name: run for name, run in results.runs.items() if name not in without}
    for name, fields in dict(changes).items():
        runs[name] = Run(deepcopy(runs[name].manifest), runs[name].series)
        for field, value in fields.items():
            *outer, last = field.split(".")
            inner = runs[name].manifest
            for key in outer:
                inner = inner[key]
            inner[last] = value
    return list(reproduce._provenance_faults(Results(results.profile, runs), root))


RUN = "static-d4-r8-corrected-s1"


@pytest.mark.parametrize("run, field, value, said", [
    ("cut-any-s0", "clean", False, "false; the run is of uncommitted code"),
    ("cut-any-s0", "packages", {"numpy": "1.0"}, "'numpy' is 1.0, neither the lock's version nor one that"),
    (RUN, "packages", {"numpy": "1.0", "scipy": "2.0"}, "'numpy' is 1.0, neither"),
    (RUN, "hashes.base", "another", "isn't the base of results/tiny/checkpoints/base"),
    (RUN, "hashes.corpus", "another", "another, the profile pins 6aa15d25f340"),
    (RUN, "protocol_version", 1, "is 1, the profile says 2"),
    (RUN, "rate", 1e-2, "0.01 and 0.001, the search chose 0.001 and 0.001"),
    (RUN, "elementwise_rate", 1e-2, "0.001 and 0.01, the search chose 0.001 and 0.001"),
])
def test_a_run_that_may_not_be_committed_is_named_with_its_field(run, field, value, said, results, reproduced):
    assert faults(results, reproduced[0]) == []
    (fault,) = faults(results, reproduced[0], {run: {field: value}})
    named = "rate" if field == "elementwise_rate" else field
    assert fault.startswith(f"results/tiny/runs/{run}.jsonl: field '{named}': ") and said in fault


def test_a_version_that_the_profile_names_is_no_fault(results, reproduced):
    profile = results.profile.model_copy(update={"packages": {"numpy": "1.0"}})
    named = Results(profile, results.runs)
    assert faults(named, reproduced[0], {RUN: {"packages": {"numpy": "1.0"}}}) == []
    (fault,) = faults(named, reproduced[0], {RUN: {"packages": {"numpy": "1.0", "scipy": "2.0"}}})
    assert "field 'packages': 'scipy' is 2.0" in fault


@pytest.mark.parametrize("field", IDENTITY)
@pytest.mark.parametrize("run", [RUN, "cut-any-s0"])
def test_a_log_of_another_identity_is_named_with_its_field(field, run, results, reproduced):
    own = results.runs[run].manifest["config"][field]
    within, other = (next(iter(own)), {**own, next(iter(own)): "other"}) if isinstance(own, dict) else ("", own + 1)
    (fault,) = faults(results, reproduced[0], {run: {f"config.{field}": other}})
    assert fault.startswith(f"results/tiny/runs/{run}.jsonl: field 'config.{field}': ")
    assert f"'{within}' is 'other'" in fault if within else f"is {other}, the profile says {own}" in fault


@pytest.mark.parametrize("field", ["resources", "siblings", "plan", "name"])
def test_what_changes_no_number_is_no_identity(field, results, reproduced):
    assert field not in IDENTITY and faults(results, reproduced[0], {RUN: {f"config.{field}": "other"}}) == []


def test_a_base_of_uncommitted_code_is_named(results, tmp_path):
    write_base(tmp_path, results.profile)
    assert faults(results, tmp_path) == []
    path = tmp_path / "results/tiny/checkpoints/base/base.jsonl"
    base = log.read_run(path)
    rows = base.log.to_dict("records")
    log.write_run(path, {**manifest(RunSpec("full", None, None, "any", 0), results.profile), "run": "base",
                         "purpose": "base", "clean": False}, rows)
    (fault,) = faults(results, tmp_path)
    assert "checkpoints/base/base.jsonl: field 'clean': false" in fault


def test_runs_of_the_plan_that_are_not_made_are_no_fault_and_unplanned_ones_are(results, tmp_path):
    matrix = {name for name, run in results.runs.items() if run.manifest["purpose"] == "matrix"}
    assert faults(results, tmp_path, without=matrix) == []
    assert faults(results, tmp_path, without=matrix - {RUN}) == []
    spec = replace(results.profile.find(RUN), depth=3)
    write_run(tmp_path, results.profile, spec, 4.0)
    unplanned = log.read_run(results.profile.run_path(spec.id, tmp_path))
    more = Results(results.profile, {**results.runs, spec.id: unplanned})
    assert faults(more, tmp_path) == [f"results/tiny/runs/{spec.id}.jsonl: no run of the profile's plan; remove "
                                      "it, or add it to the plan"]


def test_a_run_whose_rates_search_is_not_finished_says_so(results, tmp_path):
    """The search of `static`: its own runs wait, the factors of its rate, and those of the arms that take its rates;
    none at the shared rate, the Controller's."""
    left = "static-d8-r8-corrected-s9-lr0.01"
    found = faults(results, tmp_path, without={left, "static-d8-r8-corrected-s9-lr0.0003"})  # a step that comes later
    waiting = {name for name, run in results.runs.items()
               if results.profile.siblings.get(run.manifest["arm"], run.manifest["arm"]) == "static"
               and run.manifest["rate"] and run.manifest["protocol"] == "corrected" and "-s9-lr" not in name}
    assert len(found) == len(waiting) > 20 and {fault.split(":")[0] for fault in found} == {
        f"results/tiny/runs/{name}.jsonl" for name in waiting}
    assert all(f"its learning rate is still searched, 1 runs are left, '{left}' first" in fault for fault in found)


def test_a_commit_that_the_repository_does_not_know_is_named(tmp_path):
    write(tmp_path, "tiny", keep=lambda spec: spec.arm == "cut")
    results = load_results("tiny", tmp_path)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "one"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    (fault,) = faults(results, tmp_path)
    assert "runs/cut-any-s" in fault and f"field 'commit': {'0' * 40} is unknown" in fault
    changes = {name: {"commit": head} for name in results.runs}
    assert faults(results, tmp_path, changes) == []
    found = faults(results, tmp_path, changes | {"cut-any-s1": {"commit": "1" * 40}, "cut-any-s2": {"commit": None}})
    assert [line.split(" is unknown")[0] for line in found] == [
        f"results/tiny/runs/cut-any-s{seed}.jsonl: field 'commit': {commit}"
        for seed, commit in ((1, "1" * 40), (2, None))]


def test_rates_must_be_those_that_the_search_chose(tmp_path):
    profile = load_profile(WHOLE)
    write_searches(tmp_path, profile, best=3e-3)
    factors = {None: 1.0, "low": 0.3, "high": 3.0}
    for spec in profile.runs():
        if spec.arm == "static" and spec.seed == 0 and spec.purpose == "matrix":
            rate = 1e-3 if switches(spec.protocol)["rate"] == "shared" else 3e-3 * factors[spec.level]
            write_run(tmp_path, profile, spec, loss(spec.arm, spec.depth, spec.protocol, 0), rate=rate,
                      elementwise_rate=rate)
    results = load_results(WHOLE, tmp_path)
    assert faults(results, tmp_path) == []
    (fault,) = faults(results, tmp_path, {"static-d4-r8-corrected-s0": {"rate": 1e-2}})
    assert "static-d4-r8-corrected-s0.jsonl: field 'rate': 0.01 and 0.003, the search chose 0.003 and 0.003" in fault
    # what was chosen stands in no file: another dev loss is another choice
    write_run(tmp_path, profile, profile.find("static-d4-r8-corrected-s9-lr0.01"), 1.0)
    found = faults(load_results(WHOLE, tmp_path), tmp_path)
    own = [name for name in results.runs if name.startswith("static-")
           and results.runs[name].manifest["purpose"] == "matrix"
           and results.runs[name].manifest["switches"]["rate"] == "own"]
    assert len(found) == len(own) and all("the search chose 0.0" in fault for fault in found)
    assert f"results/whole/runs/{own[0]}.jsonl: field 'rate'" in found[0]
