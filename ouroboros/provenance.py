"""What a log says of its making: commit, packages, hardware; and which settings of the environment
would change it. Imports torch only where it is loaded anyway."""

import functools
import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from packaging.utils import canonicalize_name

from .errors import InputError

PACKAGE = Path(__file__).parent

# Settings by which a user's environment would change a run's numbers and that no argument overrides.
REFUSED = (
    "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG",  # a run is made by whole copies of the model
    "ACCELERATE_TORCH_DEVICE", "ACCELERATE_USE_CPU",  # CUDA_VISIBLE_DEVICES chooses the device
    # the precision of products
    "NVIDIA_TF32_OVERRIDE", "ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE",
    "PYTORCH_TUNABLEOP_ENABLED",  # would choose kernels by their speed, another one each time
)
HARMLESS = ("", "0", "false", "no", "strict")  # values of REFUSED that are the default
# Of git's own variables, those that would have it read another repository than that of the folder.
ELSEWHERE = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY",
             "GIT_NAMESPACE")


def check_environment() -> None:
    """Raises InputError for a variable of the environment that would change a run's numbers."""
    for name in REFUSED:
        if os.environ.get(name, "").lower() not in HARMLESS:
            raise InputError(f"environment variable {name} '{os.environ[name]}': it would change "
                             "the numbers; unset it (under accelerate launch: leave out the option, "
                             "or its line of the configuration file)")


@functools.cache
def note(text: str) -> None:
    """Say on stderr what can't be checked, once a process."""
    print(f"note: {text}", file=sys.stderr)


def _run_git(root: Path, *args: str, input: str = "") -> subprocess.CompletedProcess | None:
    """None where git isn't installed."""
    environment = {name: value for name, value in os.environ.items() if name not in ELSEWHERE}
    try:
        return subprocess.run(["git", "-C", str(root), *args], env=environment | {"LC_ALL": "C"},
                              input=input, capture_output=True, encoding="utf-8", errors="replace")
    except OSError:
        return None


def _git(root: Path, *args: str) -> str | None:
    done = _run_git(root, *args)
    return done.stdout.strip() if done and done.returncode == 0 else None


def no_history(root: Path) -> str | None:
    """Why git can't say at which commit a folder is, as half a sentence; None where it can."""
    asked = _run_git(root, "rev-parse", "--show-prefix")
    if asked is None:
        return "git isn't installed"
    if "dubious ownership" in asked.stderr:
        return ("git trusts no folder of another user's; git config --global --add safe.directory "
                f"'{Path(root).resolve()}' makes it trust this one")
    if asked.returncode or asked.stdout.strip():  # a prefix: the repository is of a folder above
        return "the folder has no git history of its own"
    return None if _git(root, "rev-parse", "--verify", "HEAD") else "the repository has no commit"


def no_old_commits(root: Path) -> str | None:
    """Why git can't look up older commits, as half a sentence; None where it can."""
    if _git(root, "rev-parse", "--is-shallow-repository") == "true":
        return no_history(root) or "the clone is shallow; git fetch --unshallow completes it"
    return no_history(root)


def unknown_commits(root: Path, commits: Iterable[str | None]) -> set[str | None]:
    """Those of the commits that the repository doesn't have."""
    commits = list(commits)
    asked = _run_git(root, "cat-file", "--batch-check", input="".join(f"{commit}\n" for commit in commits))
    return {commit for commit, answer in zip(commits, asked.stdout.splitlines(), strict=True)
            if not answer.startswith(f"{commit} commit")}


def locked_versions(root: Path) -> dict[str, str]:
    """{package: version} of requirements.lock; empty when there is none."""
    path = Path(root) / "requirements.lock"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    pins = (line.split("#")[0].split(";")[0].strip().split("==") for line in lines if "==" in line)
    return {canonicalize_name(name): version for name, version in pins}


@functools.cache
def code_sha256() -> str:
    """The hash of the code that makes a run: an interrupted one of other code begins again."""
    files = [file for file in sorted(PACKAGE.rglob("*.py")) if "analysis" not in file.relative_to(PACKAGE).parts]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@functools.cache
def _state(root: Path) -> tuple[str | None, bool]:
    """The commit, and whether the checkout is at it: asked once, since a process runs the code that it began with."""
    if why := no_history(root):
        note(f"no commit is recorded: {why}")
        return None, False
    # what runs write while others run is no change of the code; results/ and figures/ are outputs
    changed = _git(root, "status", "--porcelain", "--untracked-files=normal", "--", ".",
                   ":!results", ":!figures")
    if changed:
        note(f"the checkout isn't at its commit ({changed.splitlines()[0]}): verify will refuse logs that are made so")
    return _git(root, "rev-parse", "HEAD"), changed == ""


def lock_sha256(root: Path) -> str | None:
    """The hash of requirements.lock; None where there is none."""
    path = Path(root) / "requirements.lock"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def other_versions(lock: dict[str, str]) -> dict[str, str | None]:
    """{package: installed version} where it isn't the lock's; None where it isn't installed."""
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
    """Git commit and state, the lock and what is installed otherwise, and the machine, as fields of a manifest.

    Raises InputError for a setting of the environment that would change numbers.
    """
    check_environment()
    commit, clean = _state(Path(root))
    return {
        "commit": commit,
        "clean": clean,
        "lock": lock_sha256(root),
        "packages": {name: version for name, version in other_versions(locked_versions(root)).items() if version},
        "hardware": {
            "machine": platform.machine(), "processor": processor(), "cores": os.cpu_count(),
            "system": platform.system(), "python": platform.python_version(),
            **_computing(),
        },
    }


def _computing() -> dict:
    """How torch computes in this process; nothing where it isn't loaded."""
    if "torch" not in sys.modules:
        return {}
    import torch
    from accelerate.state import AcceleratorState, PartialState, is_initialized

    device = PartialState().device
    found = {
        "threads": torch.get_num_threads(), "instructions": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }
    if is_initialized():  # only a run has an Accelerator
        found["mixed_precision"] = AcceleratorState().mixed_precision
    return found


def processor() -> str:
    """The CPU's name, as the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
