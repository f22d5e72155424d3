"""What a log says of its making: commit, packages, hardware. Never imports torch."""

import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path


def _git(root: Path, *args: str) -> str | None:
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
def code_sha256() -> str:
    """The hash of this package's sources, as they were when first asked for."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@functools.cache
def _state(root: Path) -> tuple[str | None, bool]:
    """The commit, and whether the checkout is at it: asked once, since a process runs the code that it began with."""
    # what runs write while others run is no change of the code; results/ and figures/ are outputs
    changed = _git(root, "status", "--porcelain", "--", ".", ":!results", ":!figures")
    return _git(root, "rev-parse", "HEAD"), changed == ""


def provenance(root: Path) -> dict:
    """Git commit and state, the lock's packages as installed, and the machine, as fields of a manifest."""
    lock = locked_versions(root)
    installed = {}
    for name in lock:
        try:
            # a local version such as 2.13.0+cpu names the build, not other code
            installed[name] = importlib.metadata.version(name).split("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    commit, clean = _state(Path(root))
    return {
        "commit": commit,
        "clean": clean,
        "packages": installed,
        "locked": bool(lock) and installed == lock,
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
