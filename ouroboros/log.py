"""The raw-log format: one text file a run, `results/<profile>/runs/<run id>.jsonl`. Never imports torch.

Every line is a JSON object. The first one is the manifest; `MANIFEST_FIELDS` says what it holds. Its last field,
`seal`, is the SHA-256 of the whole file without that field. Every other line is a series, one quantity over a run:

    {"split": str, "metric": str, "updates": [int, ...], "values": [float or [float, ...], ...]}

`values[i]` was measured after `updates[i]` updates. Losses are nats per token.

- Split `train`, metric `loss`, at every update: the loss that was trained on, of the protocol's own target.
- Split `heldout` (of a base `dev` too), metrics `curve/...`, at a few updates, the first and the last among them, over
  few blocks: `curve/loss_t+1`, and `curve/steps/gate_open`, `/state_norm`, `/change`: a mean over tokens for each
  recurrence step (`probes.Watch`).
- At the last update only, over more blocks: the results. Splits `train`, `heldout`, `foreign`, `stream`, `reference`
  (in a learning-rate search `dev` alone), metrics `loss_t+1`, `loss_t+2`, and `block_losses_t+1`, `block_losses_t+2`:
  each block's mean loss, blocks in a fixed order. Of `heldout` also `steps/...`, of `heldout` and `foreign`
  `modulation/...`.
- At the last update, on the first held-out blocks: `loss_t+1/depth_<n>`, a run of the base depth at other depths;
  `loss_t+1/as_trained`, `/other_sequence`, `/corpus_mean`, `/step_mean`, `/first_half`, `/first_half/other_future`, a
  run with a Controller that sees something else (`probes.intervened`, `evaluation.first_half_losses`).
- Split `model`, at the last update: `max_modulation` (largest |m| met on held-out text), `gate_open` (mean of
  sigmoid(b_g)), `moved/<tensor>` (fraction of a trained tensor's elements that changed, of those of steps that ran).
- In a run that trains nothing, splits `heldout` and `foreign`: `document_lengths`, the tokens of the documents that the
  scored blocks are packed of, in their order, with one end-of-text token after each.
- Of a base made until 2026-12-01 also `document_tokens` and `document_losses_...`, which nothing reads any more.

The rate at an update isn't logged: it is `rate * protocol.schedule(update - 1, updates, schedule)`. Tokens seen are
`updates * training.tokens_per_update`.
"""

import functools
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from .errors import InputError

FORMAT = 5  # one file a run, since 2026-11-26; the formats before it were folders of two files
STATUSES = ("finished", "diverged")
MANIFEST_FIELDS = {
    "format": int, "run": str, "profile": str, "purpose": str, "seed": int, "protocol_version": int, "config": dict,
    "commit": (str, type(None)), "clean": bool, "lock": (str, type(None)), "packages": dict, "hardware": dict,
    "hashes": dict, "trainable": int, "status": str, "started": str, "wall_seconds": (int, float), "series": int,
    "seal": str,
}
"""`lock` is the SHA-256 of requirements.lock, `packages` {name: version} where what was installed differs from
it. Of a run of the plan: `arm`, `depth`, `rank`, `rate`, `protocol`, `switches` and `level` too."""
SERIES_FIELDS = {"split": str, "metric": str, "updates": list, "values": list}
SEAL = re.compile(rb', "seal": "([0-9a-f]{64})"\}$')
STEP_TABLES = ("step_norm.weight", "modulation.step.weight", "modulation.table")  # a row a recurrence step


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all, making its folder."""
    path, temporary = Path(path), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        os.chmod(temporary, 0o644)  # mkstemp's files are the owner's alone
        os.replace(temporary, path)
    except BaseException as error:
        if temporary:
            os.unlink(temporary)
        if isinstance(error, OSError):
            error.filename = str(path)  # a full disk names none, a read-only one the temporary file
        raise


class Series(NamedTuple):
    """One quantity over a run: `values[i]`, a number or a list of numbers, was measured after `updates[i]` updates."""

    updates: list[int]
    values: list


@dataclass(frozen=True)
class Run:
    """A validated run: its manifest, and {(split, metric): Series}."""

    manifest: dict
    series: Mapping[tuple[str, str], Series]

    def last(self, split: str, metric: str, default=None):
        """The last value of a series. Raises InputError when the run has no such series and no default is given."""
        if found := self.series.get((split, metric)):
            return found.values[-1]
        if default is not None:
            return default
        raise InputError(f"run '{self.manifest['run']}': its log has no series of split '{split}', metric '{metric}'; "
                         "make the run again")

    @functools.cached_property
    def log(self) -> pd.DataFrame:
        """The same, one measurement a row: columns update, split, metric, value; in the order of the file."""
        rows = [(update, split, metric, value) for (split, metric), found in self.series.items()
                for update, value in zip(*found, strict=True)]
        return pd.DataFrame(rows, columns=["update", "split", "metric", "value"])


# --------------------------------------------------------------------------------------------------------- writing

class WorkingLog:
    """What a run has measured so far: a folder with an append-only file, so that a killed run can go on.

    Starts empty, unless `fresh` is false: then `keep` must say what of an interrupted run's log stays.
    """

    def __init__(self, folder: Path, fresh: bool = True):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "rows.jsonl"
        self._file = open(self.path, "a", encoding="utf-8")
        self.rows = 0
        if fresh:
            self.keep(0)

    def keep(self, rows: int) -> bool:
        """Cut the log to its first `rows`; if it has fewer, to none, and say False."""
        lines = self.path.read_bytes().splitlines(keepends=True)
        self.rows = rows if len(lines) >= rows else 0
        os.truncate(self.path, sum(len(line) for line in lines[:self.rows]))
        return self.rows == rows

    def row(self, update: int, split: str, metric: str, value: float | list[float]) -> None:
        """Append one measurement."""
        row = {"update": int(update), "split": split, "metric": metric, "value": value}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self.rows += 1

    def finish(self, path: Path, manifest: dict) -> None:
        """Write the run's log and seal it, then remove the folder; `format`, `series` and `seal` are added."""
        self._file.close()
        write_run(path, manifest, working_rows(self.path))
        shutil.rmtree(self.folder)


class NoLog:
    """What stands for the log in a process that isn't the first of its run: it counts rows and writes none."""

    rows = 0

    def keep(self, rows: int) -> bool:
        self.rows = rows
        return True

    def row(self, *_) -> None:
        self.rows += 1


def working_rows(path: Path) -> list[dict]:
    """The whole rows of a working log; the last line of one that is being written may be half a row."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:  # not begun, or finished just now
        lines = []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def write_run(path: Path, manifest: dict, rows: list[dict]) -> None:
    """Write a run's log from its rows (update, split, metric, value), whole or not at all.

    Raises ValueError if a quantity was measured twice at one update: one of the two would be lost.
    """
    series: dict[tuple[str, str], Series] = {}
    for row in rows:
        found = series.setdefault((row["split"], row["metric"]), Series([], []))
        if found.updates and found.updates[-1] >= row["update"]:
            raise ValueError(f"{path}: {row['split']} {row['metric']} is measured twice at update {row['update']}")
        found.updates.append(row["update"])
        found.values.append(row["value"])
    lines = [json.dumps({"format": FORMAT, **manifest, "series": len(series)})]
    lines += [json.dumps({"split": split, "metric": metric, **found._asdict()}, separators=(",", ":"))
              for (split, metric), found in series.items()]
    seal = hashlib.sha256("".join(line + "\n" for line in lines).encode()).hexdigest()
    lines[0] = f'{lines[0][:-1]}, "seal": "{seal}"}}'
    write_atomic(path, "".join(line + "\n" for line in lines))


# --------------------------------------------------------------------------------------------------------- reading

def _object(line: bytes, where: str) -> dict:
    def refuse(name: str):
        raise ValueError(name)

    try:
        data = json.loads(line.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise InputError(f"{where}: not a JSON object; the file is truncated or was edited: restore it from its "
                         "commit, or remove it and make the run again")
    return data


def _check_fields(data: dict, fields: dict, where: str) -> None:
    for field, kind in fields.items():
        if field not in data:
            raise InputError(f"{where}: field '{field}' is missing; restore the file from its commit")
        if not isinstance(data[field], kind) or (kind is int and isinstance(data[field], bool)):
            raise InputError(f"{where}: field '{field}': {data[field]!r:.80} is of the wrong type; restore the file "
                             "from its commit")


def _finite(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _series(data: dict, where: str) -> Series:
    _check_fields(data, SERIES_FIELDS, where)
    updates, values = data["updates"], data["values"]
    if not (updates and all(type(update) is int and update >= 0 for update in updates)
            and all(a < b for a, b in zip(updates, updates[1:], strict=False))):
        raise InputError(f"{where}: field 'updates': whole numbers in rising order are wanted; restore the file from "
                         "its commit")
    if len(values) != len(updates) or not all(_finite(value) or (isinstance(value, list) and all(map(_finite, value)))
                                              for value in values):
        raise InputError(f"{where}: field 'values': a finite number, or a list of them, is wanted for each of "
                         f"{len(updates)} updates; restore the file from its commit")
    return Series(updates, values)


def _content(path: Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such log; make the run, or restore the file from its commit") from None
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror}); a log is a file that this user may read") from None


def _manifest(line: bytes, path: Path) -> dict:
    where = f"{path}: line 1"
    manifest = _object(line, where)
    if manifest.get("format") != FORMAT:
        raise InputError(f"{where}: field 'format': {manifest.get('format')!r} is unknown; this version reads {FORMAT}")
    _check_fields(manifest, MANIFEST_FIELDS, where)
    if manifest["status"] not in STATUSES:
        raise InputError(f"{where}: field 'status': '{manifest['status']}' is unknown; one of {', '.join(STATUSES)}")
    if manifest["run"] != Path(path).stem:
        raise InputError(f"{where}: field 'run': '{manifest['run']}' isn't the file's name; restore the file from its "
                         "commit")
    return manifest


def read_manifest(path: Path) -> dict:
    """The first line of a run's log. Raises InputError as `read_run` does, but doesn't check the seal."""
    return _manifest(_content(path).partition(b"\n")[0], path)


def read_run(path: Path) -> Run:
    """Read and validate one run's log. Raises InputError naming file, line and field: truncated or edited logs."""
    content = _content(path)
    first, _, rest = content.partition(b"\n")
    manifest, sealed = _manifest(first, path), SEAL.search(first)
    body = b"" if sealed is None else first[:sealed.start()] + b"}\n" + rest
    if sealed is None or hashlib.sha256(body).hexdigest() != manifest["seal"]:
        raise InputError(f"{path}: its seal doesn't fit: the log is truncated or was edited; restore it from its "
                         "commit")
    series: dict[tuple[str, str], Series] = {}
    for number, line in enumerate(rest.splitlines(), 2):
        where = f"{path}: line {number}"
        data = _object(line, where)
        found = _series(data, where)
        if (data["split"], data["metric"]) in series:
            raise InputError(f"{where}: a second series of split '{data['split']}', metric '{data['metric']}'; restore "
                             "the file from its commit")
        series[data["split"], data["metric"]] = found
    if len(series) != manifest["series"]:
        raise InputError(f"{path}: {len(series)} series, the manifest says {manifest['series']}; restore the file from "
                         "its commit")
    return Run(manifest, series)


def read_runs(folder: Path) -> dict[str, Run]:
    """Every run of a profile's folder, {run id: Run}, in the order of their names."""
    return {path.stem: read_run(path) for path in sorted(Path(folder).glob("runs/*.jsonl"))}
