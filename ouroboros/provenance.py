"""What a log says of its making: commit, packages, hardware. Never imports torch."""

import ast
import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent


def git(root: Path, *args: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()  # PEP 503


def locked_versions(root: Path) -> dict[str, str]:
    """{package: version} of requirements.lock; empty when there is none."""
    path = Path(root) / "requirements.lock"
    lines = path.read_text().splitlines() if path.exists() else []
    pins = (line.split("#")[0].split(";")[0].strip().split("==") for line in lines if "==" in line)
    return {_canonical(name): version for name, version in pins}


@functools.cache
def code_sha256(start: Path = PACKAGE / "training.py") -> str:
    """The hash of the code that makes a run: of every definition in the modules that `start` reaches by its imports.

    In which file a definition stands doesn't enter, nor do comments, docstrings and import lines.
    """
    found, left = set(), [start]
    while left:
        file = left.pop()
        if file not in found:
            found.add(file)
            left += _imported(file)
    definitions = (ast.dump(_without_docstrings(node)) for file in found for node in ast.parse(file.read_bytes()).body
                   if not isinstance(node, (ast.Import, ast.ImportFrom, ast.Expr)))
    return hashlib.sha256("\n".join(sorted(definitions)).encode()).hexdigest()


def _imported(file: Path) -> Iterator[Path]:
    """The files of the modules that a module of this package imports from it."""
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = file.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            candidates = [folder, *(folder / alias.name for alias in node.names)]
            yield from (path for path in (c.with_suffix(".py") for c in candidates) if path.exists())


def _without_docstrings(node: ast.AST) -> ast.AST:
    for inner in ast.walk(node):
        if isinstance(inner, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(inner, clean=False) is not None:
            inner.body = inner.body[1:] or [ast.Pass()]
    return node


@functools.cache
def _state(root: Path) -> tuple[str | None, bool]:
    """The commit, and whether the checkout is at it: asked once, since a process runs the code that it began with."""
    # what runs write while others run is no change of the code; results/ and figures/ are outputs
    changed = git(root, "status", "--porcelain", "--", ".", ":!results", ":!figures")
    return git(root, "rev-parse", "HEAD"), changed == ""


def lock_sha256(root: Path) -> str | None:
    """The hash of requirements.lock; None where there is none."""
    path = Path(root) / "requirements.lock"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def _other_versions(lock: dict[str, str]) -> dict[str, str | None]:
    """{package: installed version} where it isn't the lock's; None where the package isn't installed."""
    found = {}
    for name, locked in lock.items():
        try:
            # a local version such as 2.13.0+cpu names the build, not other code
            installed = importlib.metadata.version(name).split("+")[0]
        except importlib.metadata.PackageNotFoundError:
            installed = None
        if installed != locked:
            found[name] = installed
    return found


def provenance(root: Path) -> dict:
    """Git commit and state, the lock and what is installed otherwise, and the machine, as fields of a manifest."""
    commit, clean = _state(Path(root))
    return {
        "commit": commit,
        "clean": clean,
        "lock": lock_sha256(root),
        "packages": _other_versions(locked_versions(root)),
        "hardware": {
            "machine": platform.machine(), "processor": _processor(), "cores": os.cpu_count(),
            "system": platform.system(), "python": platform.python_version(),
        },
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
