"""Nothing that is read can run code, and everything that is installed may be used: by the source and by metadata."""

import ast
import importlib.metadata
import re
from pathlib import Path

import pytest
import yaml

from ouroboros.experiment.profile import PROFILES

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [path for folder in ("ouroboros", "benchmarks", "docs/site", "tests")
           for path in (ROOT / folder).rglob("*.py")]
SHIPPED = [path for path in SOURCES if "tests" not in path.parts]
PICKLERS = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "_pickle"}
LOCKED = re.findall(r"^([a-z0-9-]+)==", (ROOT / "requirements.lock").read_text(), re.M)
# families that allow use, study and redistribution beside ours; what is copyleft for its own files only is among them
ALLOWED = re.compile(r"\b(MIT|BSD|0BSD|Apache|Apache-2\.0|ISC|PSF|Python Software Foundation|MPL|"
                     r"Mozilla Public License|Unlicense|CC0|HPND|MIT-CMU|Zlib|ZPL|CNRI)\b", re.I)
FORBIDDEN = re.compile(r"\b(A?GPL|LGPL|GNU|SSPL|BUSL|proprietary|non-?commercial)\b", re.I)


def calls(path: Path):
    """(dotted name, keywords, line) of every call in a file."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {key.arg: key.value for key in node.keywords}, node.lineno


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_nothing_shipped_unpickles_evaluates_or_trusts_remote_code(path):
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
            assert node.attr == "UnpicklingError", f"{path}:{node.lineno}"  # what torch raises at one: no more of it
        names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names.append("_pickle" if node.module == "pickle" else node.module)  # no part of it, by its name alone
        assert not {name.partition(".")[0] for name in names} & (PICKLERS - {"pickle"}), f"{path}:{node.lineno}"
    for name, keywords, line in calls(path):
        where = f"{path}:{line}: {name}"
        assert name not in ("eval", "exec", "os.system", "pd.read_pickle", "yaml.load"), where
        assert ast.unparse(keywords.get("trust_remote_code", ast.Constant(False))) == "False", where
        assert name not in ("np.load", "numpy.load", "np.save") or ast.unparse(
            keywords.get("allow_pickle", ast.Constant(False))) == "False", where
        assert "shell" not in keywords, where


def test_torch_reads_tensors_alone():
    found = [(path.name, line) for path in SOURCES for name, keywords, line in calls(path)
             if name == "torch.load" and ast.unparse(keywords.get("weights_only", ast.Constant(False))) != "True"]
    assert found == []


def test_every_yaml_loader_of_ours_is_the_safe_one():
    loaders = {name for path in SOURCES for name, *_ in calls(path) if re.match(r"yaml\.\w*(load|parse)", name)}
    assert loaders == {"yaml.safe_load"}
    for path in SHIPPED:
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("yaml.") and "Loader" in node.attr:
                assert "Safe" in node.attr, f"{path}:{node.lineno}"
    with pytest.raises(yaml.YAMLError):
        yaml.safe_load("!!python/object/apply:os.system ['true']")


def test_no_committed_weights_are_pickled():
    kinds = {".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy"}
    assert not [path for folder in ("results", "notebooks", "figures") for path in (ROOT / folder).rglob("*")
                if path.suffix in kinds]


def licence(name: str) -> str:
    """What a distribution says of its licence: expression, classifiers, or the first lines of its field."""
    metadata = importlib.metadata.metadata(name)
    classifiers = [line for line in metadata.get_all("Classifier") or () if line.startswith("License ::")]
    return " ".join([metadata.get("License-Expression") or "", *classifiers, (metadata.get("License") or "")[:200]])


@pytest.mark.parametrize("name", LOCKED)
def test_a_locked_package_may_be_used_and_given_on(name):
    said = licence(name)
    assert ALLOWED.search(said) and not FORBIDDEN.search(said), f"{name}: {said}"


def test_what_the_corpora_read_has_the_licence_that_the_page_says():
    """docs/licences.md: the packages whose text is read, by licence."""
    page = " ".join((ROOT / "docs/licences.md").read_text().split())
    told = {}
    for kind in ("Apache-2.0", "BSD-3-Clause", "MIT"):
        for names in re.findall(rf"{kind}: ([\w, ]+)\.", page):
            told |= dict.fromkeys(names.split(", "), kind)
    read = {name for path in PROFILES.glob("*.yaml") for config in [yaml.safe_load(path.read_text())["corpus"]]
            if config["kind"] in ("docstrings", "sources")
            for name in (*config["packages"], *config["foreign"], *config.get("newer", ()))}
    assert read == set(told)
    for name, kind in told.items():
        assert kind.partition("-")[0].lower() in licence(name).lower(), name
