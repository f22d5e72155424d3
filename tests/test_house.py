"""Who may import whom: the rooms of the package, read off its files."""

import ast
import re
from pathlib import Path

import pytest

from ouroboros.experiment import arms
from ouroboros.model import configuration

PACKAGE = Path(__file__).resolve().parents[1] / "ouroboros"
MAY = {  # what a room imports of the package, beside itself
    "model": {"errors"},
    "experiment": {"errors", "log"},
    "training": {"errors", "log", "provenance", "model", "experiment"},
    "analysis": {"errors", "log", "provenance", "experiment"},
}
HEAVY = {"torch", "transformers", "peft", "accelerate", "safetensors", "datasets"}


def imported(file: Path) -> set[str]:
    """What a file imports, whole names, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.ImportFrom):
            above = file.relative_to(PACKAGE.parent).parts[:-node.level]
            module = ".".join([*above, *filter(None, [node.module])])
            found |= {module} if node.module else {f"{module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("room", MAY)
def test_a_room_imports_what_it_may(room):
    for file in (PACKAGE / room).rglob("*.py"):
        rooms = {name.split(".")[1] for name in imported(file) if name.startswith("ouroboros.")}
        assert rooms <= MAY[room] | {room}, file


@pytest.mark.parametrize("room", ["experiment", "analysis"])
def test_what_is_run_and_what_reads_logs_never_import_torch(room):
    for file in (PACKAGE / room).rglob("*.py"):
        assert not HEAVY & {name.split(".")[0] for name in imported(file)}, file


def test_the_core_is_small():
    lines = {path.name: len(path.read_text().splitlines()) for path in (PACKAGE / "model").glob("*.py")}
    assert sum(lines.values()) < 1400, lines
    assert lines["modulation.py"] + lines["modeling.py"] < 600, lines


def test_the_projections_have_one_order():
    assert arms.PROJECTIONS == tuple(configuration.PROJECTIONS)


def test_the_readme_names_every_file_in_its_room():
    drawn = (PACKAGE.parent / "README.md").read_text().partition("    ouroboros/\n")[2].partition("\n\n")[0]
    parts = re.split(r"^      (?=\S)", drawn, flags=re.M)  # an entry each, with its continuation lines
    for room in ("model", "experiment", "training", "analysis"):
        [part] = [part for part in parts if part.startswith(f"{room}/")]
        words = set(re.split(r"[\s,()]+", part))
        names = {path.stem for path in (PACKAGE / room).glob("*.py")} - {"__init__"}
        assert names <= words, names - words
    for path in PACKAGE.glob("*.py"):
        assert path.stem.startswith("__") or path.name in drawn, path.name


def test_what_code_cites_stands_in_the_docs():
    system, protocol = ((PACKAGE.parent / "docs" / f"{name}.md").read_text() for name in ("system", "protocol"))
    known = {"system.md": set(re.findall(r"^## (\d)\.", system, re.M)) | set(re.findall(r"^\*\*`([^`]+)`\.\*\*", system,
                                                                                       re.M)),
             "protocol.md": set(re.findall(r"^\| `(\w+)` \|", protocol, re.M))}
    files = [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.yaml"), *PACKAGE.parent.glob("tests/*.py")]
    cited = [(file, page, name or number) for file in files
             for page, name, number in re.findall(r"(?<!/)\b(system\.md|protocol\.md)\s+(?:`([^`]+)`|(\d))",
                                                  file.read_text())]
    assert len(cited) > 50 and {page for _, page, _ in cited} == set(known)
    for file, page, name in cited:
        assert name in known[page], f"{file}: {page} has no {name}"
    for file in files:
        assert not re.search(r"\b(SYSTEM|AUDIT)(\.md|\b)", file.read_text()) or file.name == "test_house.py", file
