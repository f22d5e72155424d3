"""Who is at work on a run, and how far each run of a profile is. Never imports torch.

A run that is being made is held: a file in `.cache/running/<profile>/` is locked by the process that makes it, and the
system lets go of the lock when that process ends, however it ends. So `running` is never a guess.
"""

import json
import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pandas as pd
from filelock import FileLock, Timeout

from ..errors import Busy, InputError
from ..experiment.learning_rates import planned, read_searches, waits
from ..experiment.plan import RunSpec
from ..experiment.profile import Profile
from ..log import Run, read_manifest, read_run, working_rows, write_atomic

STATES = ("running", "interrupted", "missing", "planned", "mismatched", "diverged", "finished")
LOSSES = (("train", "loss"), ("heldout", "curve/loss_t+1"), ("heldout", "loss_t+1"))  # the last of an update is shown


def _note_path(profile: str, run_id: str, root: Path) -> Path:
    return Path(root) / ".cache" / "running" / profile / f"{run_id}.json"


def _lock(note: Path) -> FileLock:
    """The lock beside a note: waited for shortly, as `is_running` takes it too while it looks."""
    return FileLock(note.with_suffix(".lock"), timeout=0.2)


@contextmanager
def hold(profile: str, run_id: str, root: Path):
    """Hold a run for this process; yields a function that notes the update from which the run goes on.

    Raises Busy when another process makes the run.
    """
    path = _note_path(profile, run_id, root)
    path.parent.mkdir(parents=True, exist_ok=True)

    def began(update: int | None) -> None:
        note = {"pid": os.getpid(), "host": platform.node(), "update": update, "time": time.time()}
        write_atomic(path, json.dumps(note))

    lock = _lock(path)
    try:
        lock.acquire()
    except Timeout:
        raise Busy(f"run '{run_id}': {_maker(path)} makes it; wait for it: python -m ouroboros status --profile "
                   f"{profile} shows how far it is") from None
    try:
        began(None)  # it isn't known yet where it goes on
        yield began
    finally:
        lock.release()


def is_running(profile: str, run_id: str, root: Path) -> bool:
    """Whether a process makes the run now."""
    path = _note_path(profile, run_id, root)
    if not path.exists():
        return False
    try:
        with _lock(path):
            return False
    except Timeout:
        return True


def _note(path: Path) -> dict:
    """What the maker of a run noted; empty before the first one did."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _maker(path: Path) -> str:
    note = _note(path)
    return f"process {note['pid']} on {note['host']}" if note else "another process"


@dataclass(frozen=True)
class Status:
    """One run: its state (of STATES), updates made, the last loss in nats per token and what it is of, seconds left.

    A `planned` run waits for the search of its learning rate; `mismatched`: a log of that name is there, but `why` it
    isn't the run that the plan means. `left` is None unless the run is running and has made an update since it began or
    went on.
    """

    run: str
    state: str
    update: int
    updates: int
    loss: float | None = None
    of: str = ""
    left: float | None = None
    why: str = ""


def made(spec: RunSpec, profile: Profile, root: Path) -> bool:
    """Whether the run's log is there. Raises InputError where a log of its name is of another identity."""
    path = profile.run_path(spec.id, root)
    if not path.exists():
        return False
    if why := profile.mismatch(read_manifest(path), spec):
        raise InputError(f"{path}: {why}; it is another run's log: move it away, or restore the profile that made it")
    return True


def missing(profile: Profile, root: Path, purpose: str | None = None) -> list[RunSpec]:
    """The runs of the plan (of one purpose) that aren't made, in the plan's order. Raises InputError as `made` does."""
    runs = planned(profile, read_searches(profile, root))
    return [spec for spec in runs if purpose in (None, spec.purpose) and not made(spec, profile, root)]


def status(profile: Profile, root: Path) -> Iterator[Status]:
    """The state of every run of the plan, in its order."""
    searches = read_searches(profile, root)
    for spec in planned(profile, searches):
        yield _status(spec, profile, Path(root), searches)


def _status(spec: RunSpec, profile: Profile, root: Path, searches: Mapping[str, Run]) -> Status:
    path = profile.run_path(spec.id, root)
    updates = profile.at(spec).training.updates if spec.fit != "none" else 0
    if path.exists():
        run = read_run(path)
        if why := profile.mismatch(run.manifest, spec):
            return Status(spec.id, "mismatched", 0, updates, why=why)
        return Status(spec.id, run.manifest["status"], *_last(run.log.to_dict("records"), updates))
    note = _note_path(profile.name, spec.id, root)
    rows = working_rows(profile.unfinished(spec.id, root) / "rows.jsonl")
    update, *last = _last(rows, updates)
    if is_running(profile.name, spec.id, root):
        return Status(spec.id, "running", update, *last, _left(_note(note), update, updates))
    if path.exists():  # it ended while its log was read
        return _status(spec, profile, root, searches)
    if not rows and (why := waits(spec, profile, searches)):
        return Status(spec.id, "planned", 0, updates, why=why.partition(": ")[2])
    return Status(spec.id, "interrupted" if rows else "missing", update, *last)


def _last(rows: list[dict], updates: int) -> tuple[int, int, float | None, str]:
    """The last update and how many there are, and the newest loss: held-out if there is one, else training."""
    losses = [row for row in rows if (row["split"], row["metric"]) in LOSSES]
    if not losses:
        return 0, updates, None, ""
    last = max(losses, key=lambda row: (row["update"], LOSSES.index((row["split"], row["metric"]))))
    return last["update"], updates, last["value"], last["split"]


def _left(note: dict, update: int, updates: int) -> float | None:
    if note.get("update") is None:
        return None
    made = update - note["update"]
    return (time.time() - note["time"]) / made * (updates - update) if made > 0 else None


def report(profile: Profile, root: Path) -> str:
    """A table with one line a run, and one line that counts the states."""
    found = list(status(profile, root))
    table = pd.DataFrame([{"run": s.run, "state": s.state, "update": f"{s.update}/{s.updates}",
                           "loss": "" if s.loss is None else f"{s.loss:.4f} {s.of}",
                           "left": s.why if s.left is None else str(timedelta(seconds=round(s.left)))}
                          for s in found])
    counts = [(state, sum(s.state == state for s in found)) for state in STATES]
    return (f"{table.to_markdown(index=False, tablefmt='plain', disable_numparse=True)}\n\n"
            f"profile {profile.name}, {len(found)} runs: " + ", ".join(f"{n} {state}" for state, n in counts if n))
