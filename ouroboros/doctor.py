"""What of this machine differs from the lock and from the machines that made the committed logs, and what that may
change. Imports torch only to ask how it computes."""

import os
import platform
from collections.abc import Iterator
from pathlib import Path

from .errors import InputError
from .log import read_manifest
from .provenance import check_environment, locked_versions, no_history, other_versions, processor

# whose other version may change what
RUNS = {"torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers", "datasets", "numpy"}
CORPUS = {"control", "gepa", "mne", "networkx", "sktime", "sympy", "tabicl", "torchmetrics", "xarray"}
OUTPUTS = {"numpy", "pandas", "scipy", "matplotlib", "tabulate", "papermill", "nbconvert", "pyyaml", "pydantic"}


def differences(root: Path) -> Iterator[str]:
    """One line a difference: what is other here, and what that may change."""
    lock = locked_versions(root)
    if not lock:
        yield f"{root / 'requirements.lock'}: not there, so versions can't be compared"
    for name, installed in other_versions(lock).items():
        yield f"{name} {installed or 'not installed'}, the lock has {lock[name]}: {_may_change(name)}"
    try:
        check_environment()
    except InputError as error:
        yield str(error)
    yield from _machine(root)
    if why := no_history(root):
        yield f"logs made here name no commit: {why}"


def _may_change(name: str) -> str:
    """What another version of a package may change."""
    found = [what for names, what in ((RUNS, "the numbers of new runs"), (CORPUS, "the text, which is then refused"),
                                      (OUTPUTS, "derived tables, figures and notebooks")) if name in names]
    return "may change " + " and ".join(found) if found else "changes no number that we know of"


def _machine(root: Path) -> Iterator[str]:
    """Another processor, or other instructions, round otherwise: derived outputs stay, new runs differ."""
    import torch

    made = [read_manifest(path)["hardware"] for path in root.glob("results/*/runs/*.jsonl")]
    here = {"processor": processor(), "instructions": torch.backends.cpu.get_cpu_capability()}
    for field, value in here.items():
        known = sorted({hardware[field] for hardware in made if hardware.get(field)})
        if known and value not in known:
            yield (f"{field} {value}, the committed logs were made on {' and '.join(known)}: products are rounded "
                   "otherwise, so new runs end up to 2e-4 nats per token elsewhere, loops without a gate further; "
                   "`rerun` allows 0.01")
    if torch.cuda.is_available():
        yield f"a GPU, {torch.cuda.get_device_name()}, which runs will use: its numbers differ from a CPU's"
    if not made:
        yield f"{root / 'results'}: no committed logs, so this machine can't be compared with theirs"


def report(root: Path) -> str:
    """The differences, or that there are none, after a line on this machine."""
    found = [*differences(root)]
    here = (f"Python {platform.python_version()} on {processor()}, {os.cpu_count()} cores; "
            f"{len(locked_versions(root))} packages in the lock")
    return "\n".join([f"{here}: {'these differ' if found else 'nothing differs'}", *(f"- {line}" for line in found)])
