"""The raw-log format: write, validate, read. Never imports torch.

A run is a folder `results/<profile>/runs/<run id>/`; the base's, `results/<profile>/base/`, has the same two files:

- `log.jsonl`, one measurement a row:
  `{"update": int, "tokens": int, "split": str, "metric": str, "value": float or [float, ...]}`
  - every update: split `train`, metrics `loss` (the protocol's own target, nats per token) and `rate`;
  - at fixed points, update 0 and the last among them: split `heldout`, metric `loss_t+1`, and `steps/gate_open`,
    `steps/state_norm`, `steps/change`: a list, one mean over tokens a recurrence step (`evaluation.Watch`);
  - at the last update: splits `train`, `heldout`, `foreign`, `stream`, `reference` (of the learning-rate search `dev`
    alone), metrics `loss_t+1`, `loss_t+2`, and `block_losses_t+1`, `block_losses_t+2`: a list, one mean loss a block,
    blocks in a fixed order. These rows stand after that update's row of the items above and are taken over more
    blocks: they are the result. For `heldout` and `foreign` also `modulation/...` (`evaluation.Watch.modulation`);
  - at the last update, on the first held-out blocks: metrics `loss_t+1/depth_<n>` of a run of the base depth at other
    depths, and `loss_t+1/as_trained`, `/other_sequence`, `/corpus_mean`, `/step_mean` of a run with a Controller
    (`evaluation.intervened`), and `/first_half`, `/first_half/other_future` (`evaluation.first_half_losses`);
  - at the last update: split `model`, metrics `max_modulation` (largest |m| met on held-out text), `gate_open` (mean of
    sigmoid(b_g)), `moved/<tensor>` (fraction of a trained tensor's elements that changed, of those of steps that ran).
- `manifest.json`, written last: a folder without one is an interrupted run. `MANIFEST_FIELDS` says what it holds;
  `rows` and `log_sha256` seal the log.
"""

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from .errors import InputError

FORMAT = 4
# Format 1, before 2026-11-25: every run was scored on `dev` and, during training, on `foreign`, none on `train`; drawn
# depths went on from one token set to the next.
# Format 2: a run with a Controller has no `first_half` rows. Format 3: `moved/` counts rows of unused steps.
READABLE = (1, 2, 3, 4)
USED_STEPS_ALONE = 4  # the first format whose `moved/` is that of the steps that ran
STEP_TABLES = ("step_norm.weight", "modulation.step.weight", "modulation.table")  # a row a recurrence step
ROW_FIELDS = {"update": int, "tokens": int, "split": str, "metric": str, "value": (int, float, list)}
MANIFEST_FIELDS = {
    "format": int, "run": str, "profile": str, "purpose": str, "seed": int, "config": dict, "commit": (str, type(None)),
    "clean": bool, "packages": dict, "locked": bool, "hardware": dict, "hashes": dict, "trainable": int, "status": str,
    "started": str, "wall_seconds": (int, float), "rows": int, "log_sha256": str,
}
STATUSES = ("finished", "diverged")


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all, making its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        os.chmod(temporary, 0o644)  # mkstemp's files are the owner's alone
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


class RunLog:
    """Writes one run's log; until `finish`, the folder has no manifest.

    Starts empty, unless `fresh` is false: then `keep` must say what of an interrupted run's log stays.
    """

    def __init__(self, folder: Path, fresh: bool = True):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "manifest.json").unlink(missing_ok=True)
        self._file = open(self.folder / "log.jsonl", "a", encoding="utf-8")
        self.rows = 0
        if fresh:
            self.keep(0)

    def keep(self, rows: int) -> bool:
        """Cut the log to its first `rows`; if it has fewer, to none, and say False."""
        lines = (self.folder / "log.jsonl").read_bytes().splitlines(keepends=True)
        self.rows = rows if len(lines) >= rows else 0
        os.truncate(self.folder / "log.jsonl", sum(len(line) for line in lines[:self.rows]))
        return self.rows == rows

    def row(self, update: int, tokens: int, split: str, metric: str, value: float | list[float]) -> None:
        """Append one measurement."""
        row = {"update": int(update), "tokens": int(tokens), "split": split, "metric": metric, "value": value}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self.rows += 1

    def finish(self, manifest: dict) -> None:
        """Close the log and seal it with the manifest, to which `rows` and `log_sha256` are added."""
        self._file.close()
        digest = hashlib.sha256((self.folder / "log.jsonl").read_bytes()).hexdigest()
        sealed = {**manifest, "rows": self.rows, "log_sha256": digest}
        write_atomic(self.folder / "manifest.json", json.dumps(sealed, indent=1) + "\n")


class NoLog:
    """What stands for the log in a process that isn't the first of its run: it counts rows and writes none."""

    rows = 0

    def keep(self, rows: int) -> bool:
        self.rows = rows
        return True

    def row(self, *_) -> None:
        self.rows += 1


@dataclass(frozen=True)
class Run:
    """A validated run: its manifest, and its log as a frame with the columns update, tokens, split, metric, value."""

    manifest: dict
    log: pd.DataFrame


def _json(text: str, where: str) -> dict:
    try:
        data = json.loads(text)
    except ValueError:
        data = None
    if not isinstance(data, dict):
        raise InputError(f"{where}: not a JSON object; the file is truncated or was edited: restore it, or remove the "
                         "run's folder and make the run again")
    return data


def _check_fields(data: dict, fields: dict, where: str) -> None:
    for field, kind in fields.items():
        if field not in data:
            raise InputError(f"{where}: field '{field}' is missing; restore the file from its commit")
        if not isinstance(data[field], kind) or (kind is int and isinstance(data[field], bool)):
            raise InputError(f"{where}: field '{field}': {data[field]!r} is of the wrong type; restore the file from "
                             "its commit")


def read_run(folder: Path) -> Run:
    """Read and validate one run. Raises InputError naming file and field: interrupted, truncated or edited logs."""
    folder = Path(folder)
    paths = folder / "manifest.json", folder / "log.jsonl"
    for path in paths:
        if not path.exists():
            raise InputError(f"{path}: missing; an interrupted run is no result: remove the folder and make the run "
                             "again")
    manifest = _json(paths[0].read_text(encoding="utf-8"), str(paths[0]))
    _check_fields(manifest, MANIFEST_FIELDS, str(paths[0]))
    if manifest["format"] not in READABLE:
        raise InputError(f"{paths[0]}: field 'format': {manifest['format']} is unknown; this version reads "
                         f"{', '.join(map(str, READABLE))}")
    if manifest["status"] not in STATUSES:
        raise InputError(f"{paths[0]}: field 'status': '{manifest['status']}' is unknown; one of {', '.join(STATUSES)}")
    content = paths[1].read_bytes()
    rows = content.decode("utf-8", errors="replace").splitlines()
    if len(rows) != manifest["rows"]:
        raise InputError(f"{paths[1]}: {len(rows)} rows, the manifest says {manifest['rows']}; the log is truncated or "
                         "was edited: restore it from its commit")
    if (found := hashlib.sha256(content).hexdigest()) != manifest["log_sha256"]:
        raise InputError(f"{paths[1]}: sha256 {found[:12]}, the manifest says {manifest['log_sha256'][:12]}; the log "
                         "was edited: restore it from its commit")
    parsed = [_json(row, f"{paths[1]}: line {number}") for number, row in enumerate(rows, 1)]
    for number, row in enumerate(parsed, 1):
        _check_fields(row, ROW_FIELDS, f"{paths[1]}: line {number}")
    return Run(manifest, pd.DataFrame(parsed, columns=list(ROW_FIELDS)))


def read_runs(folder: Path) -> dict[str, Run]:
    """Every finished run of a profile, {run id: Run}; a folder without a manifest is an interrupted run, left out."""
    runs = {path.parent.name: read_run(path.parent) for path in sorted(Path(folder).glob("runs/*/manifest.json"))}
    for name, run in runs.items():
        if run.manifest["run"] != name:
            raise InputError(f"{folder}/runs/{name}/manifest.json: field 'run': '{run.manifest['run']}' isn't the "
                             "folder's name; restore the folder from its commit")
    return runs
