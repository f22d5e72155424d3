"""Who is at work on a run, and how far each run of a profile is. Never imports torch.

A run that is being made is claimed: a file in `.cache/running/<profile>/` is locked by the process that makes it, and
the system lets go of the lock when that process ends, however it ends. So `running` is never a guess.
"""

import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from .errors import Busy
from .experiment import ARMS, Profile, RunSpec
from .runlog import read_run

STATES = ("running", "interrupted", "missing", "diverged", "finished")


def _claim_path(profile: str, run_id: str, root: Path) -> Path:
    return Path(root) / ".cache" / "running" / profile / f"{run_id}.json"


def _held(file) -> bool:
    """Whether another process holds the lock of an open file; if not, this one does until the file is closed."""
    for _ in range(3):  # `status` holds a lock too while it looks
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
        except BlockingIOError:
            time.sleep(0.05)
    return True


@contextmanager
def claim(profile: str, run_id: str, root: Path):
    """Hold a run for this process; yields a function that notes the update from which the run goes on.

    Raises Busy when another process makes the run.
    """
    path = _claim_path(profile, run_id, root)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        if _held(file):
            raise Busy(f"run '{run_id}': {_maker(path)} makes it; wait for it: python -m ouroboros status --profile "
                       f"{profile} shows how far it is")

        def began(update: int | None) -> None:
            note = {"pid": os.getpid(), "host": platform.node(), "update": update, "time": time.time()}
            file.truncate(0)
            file.write(json.dumps(note))
            file.flush()

        began(None)  # it isn't known yet where it goes on
        yield began


def is_made(profile: str, run_id: str, root: Path) -> bool:
    """Whether a process makes the run now."""
    path = _claim_path(profile, run_id, root)
    if not path.exists():
        return False
    with open(path, "a+", encoding="utf-8") as file:
        return _held(file)


def _note(path: Path) -> dict:
    """What the maker of a run noted; empty where it is just being written."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, FileNotFoundError):
        return {}


def _maker(path: Path) -> str:
    note = _note(path)
    return f"process {note['pid']} on {note['host']}" if note else "another process"


@dataclass(frozen=True)
class Status:
    """One run: its state (of STATES), updates made, the last loss in nats per token and what it is of, seconds left.

    `left` is None unless the run is running and has made an update since it began or went on.
    """

    run: str
    state: str
    update: int
    updates: int
    loss: float | None
    of: str
    left: float | None


def status(profile: Profile, root: Path) -> Iterator[Status]:
    """The state of every run that the profile declares, the learning-rate search's first."""
    for spec in (*profile.search_runs(), *profile.runs()):
        yield _status(spec, profile, Path(root))


def _status(spec: RunSpec, profile: Profile, root: Path) -> Status:
    folder, updates = profile.folder(root) / "runs" / spec.id, profile.training.updates if ARMS[spec.arm].trained else 0
    if (folder / "manifest.json").exists():
        run = read_run(folder)
        update, loss, of = _last(run.log.to_dict("records"))
        return Status(spec.id, run.manifest["status"], update, updates, loss, of, None)
    path = _claim_path(profile.name, spec.id, root)
    log = folder / "log.jsonl"
    update, loss, of = _last(_rows(log)) if log.exists() else (0, None, "")
    if is_made(profile.name, spec.id, root):
        return Status(spec.id, "running", update, updates, loss, of, _left(_note(path), update, updates))
    if (folder / "manifest.json").exists():  # it ended while its log was read
        return _status(spec, profile, root)
    return Status(spec.id, "interrupted" if log.exists() else "missing", update, updates, loss, of, None)


def _rows(log: Path) -> list[dict]:
    """The whole rows of a log that is being written: its last line may be half a row."""
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _last(rows: list[dict]) -> tuple[int, float | None, str]:
    """The last update, and the newest loss: on held-out text if there is one of that update, else in training."""
    losses = [row for row in rows if (row["split"], row["metric"]) in (("heldout", "loss_t+1"), ("train", "loss"))]
    if not losses:
        return 0, None, ""
    return losses[-1]["update"], losses[-1]["value"], losses[-1]["split"]


def _left(note: dict, update: int, updates: int) -> float | None:
    if note.get("update") is None:
        return None
    made = update - note["update"]
    return (time.time() - note["time"]) / made * (updates - update) if made > 0 else None


def _duration(seconds: float | None) -> str:
    if seconds is None or not np.isfinite(seconds):
        return ""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def report(profile: Profile, root: Path) -> str:
    """A table with one line a run, and one line that counts the states."""
    found = list(status(profile, root))
    table = pd.DataFrame([{"run": s.run, "state": s.state, "update": f"{s.update}/{s.updates}",
                           "loss": "" if s.loss is None else f"{s.loss:.4f} {s.of}", "left": _duration(s.left)}
                          for s in found])
    counts = [(state, sum(s.state == state for s in found)) for state in STATES]
    return (f"{table.to_markdown(index=False, tablefmt='plain', disable_numparse=True)}\n\n"
            f"profile {profile.name}, {len(found)} runs: " + ", ".join(f"{n} {state}" for state, n in counts if n))
