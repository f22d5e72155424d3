"""From raw logs to one frame: a row a declared run, with its losses. Never imports torch. Losses are nats per token."""

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from ..errors import InputError
from ..experiment.profile import Profile, load_profile
from ..experiment.protocol import switches
from ..log import Run, read_run, read_runs
from .statistics import FEWEST, document_clusters

CUT_STREAM_BATCHES = 20  # protocol.md `evaluation`: of the stream's 50, on which the released cut baseline is scored


@dataclass(frozen=True, eq=False)  # by identity, so that tables can be kept for it
class Results:
    """A profile's declared table rows and the runs that were made."""

    profile: Profile
    runs: Mapping[str, Run]
    _read: list[set[str]] = field(default_factory=list)

    @contextmanager
    def reading(self) -> Iterator[set[str]]:
        """Yields the set of the runs that statistics read from while this is entered."""
        self._read.append(set())
        try:
            yield self._read[-1]
        finally:
            self._read.pop()

    def note(self, runs: Iterable[str]) -> None:
        """Say that these runs were read."""
        made = [name for name in runs if name in self.runs]
        for read in self._read:
            read.update(made)

    @functools.cached_property
    def clusters(self) -> dict[str, np.ndarray]:
        """{split: (blocks,) the cluster of documents of each block scored at the end, one array for all runs}; of
        splits whose document lengths a log states, and that hold more than one cluster."""
        found = {}
        for run in self.runs.values():
            for split, metric in run.series:
                if metric == "document_lengths" and split not in found:
                    blocks = run.last(split, "block_losses_t+1")
                    found[split] = document_clusters(run.last(split, metric),
                                                     run.manifest["config"]["training"]["block"], len(blocks))
        return {split: clusters for split, clusters in found.items() if clusters[-1] > 0}

    @functools.cached_property
    def cells(self) -> pd.DataFrame:
        """One row a declared cell: arm, depth, rank, protocol, seed, level of the rate, run, shared, status and losses.

        `shared`: the run is shown in several rows, since the protocol makes them one. `status` is `missing` where no
        run was made; the losses of a run that isn't `finished` are NaN, so no mean is taken over it unseen.
        """
        profile, plan = self.profile, self.profile.cells()
        # full and cut aren't trained: both columns read one log, which makes no two results one
        times = pd.Series([(cell.run.id, cell.protocol) for cell in plan]).value_counts()
        rows = []
        for cell in plan:
            run = self.runs.get(cell.run.id)
            status = run.manifest["status"] if run else "missing"
            row = {"arm": cell.arm, "depth": cell.depth, "rank": cell.rank, "protocol": cell.protocol,
                   "seed": cell.seed, "level": cell.level or "",
                   "updates": cell.updates or profile.training.updates, "run": cell.run.id,
                   "shared": bool(times[cell.run.id, cell.protocol] > 1), "status": status, "loss": math.nan}
            row |= dict.fromkeys(splits(profile), math.nan)
            if status == "finished":
                row["loss"] = float(read_blocks(run, cell.arm, cell.protocol).mean())
                # the release scores held-out text on the next token: in both columns (protocol.md `target`)
                row |= {split: run.last(split, "loss_t+1") for split in splits(profile)}
            rows.append(row)
        return pd.DataFrame(rows).astype({"depth": "Int64", "rank": "Int64"})

    @functools.cached_property
    def places(self) -> dict[tuple, list]:
        """{(protocol, arm, depth, rank, level, updates): its rows of `cells`, a seed each}."""
        found = {}
        for row in self.cells.itertuples():
            depth, rank = (None if pd.isna(value) else int(value) for value in (row.depth, row.rank))
            found.setdefault((row.protocol, row.arm, depth, rank, row.level, row.updates), []).append(row)
        return found


def per_results(function):
    """Compute a table once for each Results and arguments; the runs that were read are noted each time."""
    @functools.cache
    def computed(results: Results, *args):
        with results.reading() as read:
            return function(results, *args), read

    @functools.wraps(function)
    def noted(results: Results, *args):
        table, read = computed(results, *args)
        results.note(read)
        return table

    return noted


def load_results(profile: str, root: Path) -> Results:
    """Read every finished run of a profile. Raises InputError when there is none, or one isn't what it says."""
    found = results_at_hand(profile, root)
    if not found.runs:
        raise InputError(f"{found.profile.folder(root)}/runs: no finished run there; make runs PROFILE={profile} makes "
                         "them")
    return found


def results_at_hand(profile: str, root: Path) -> Results:
    """The same, and no error where there is no run yet."""
    declared = load_profile(profile)
    return Results(declared, read_runs(declared.folder(root)))


def splits(profile: Profile) -> tuple[str, ...]:
    """What next-token losses are reported of: new text of the training split, held-out text, text of other sources,
    and where the corpus has it text that is newer than the base."""
    return ("train", "heldout", *profile.corpus.unseen)


def shown_depth(results: Results) -> int:
    """The depth that the first screen and its figure show: the base depth, or where Controller and cut model haven't
    three seeds there yet, the deepest at which they have."""
    profile, base = results.profile, results.profile.depth

    def seeds(arm: str, depth: int | None, rank: int | None) -> set[int]:  # not noted as read: they enter no number
        rows = results.places.get(("corrected", arm, depth, rank, "", profile.training.updates), ())
        return {row.seed for row in rows if row.status == "finished"}

    judged = [depth for depth in profile.depths
              if len(seeds("controller", depth, profile.rank) & seeds("cut", None, None)) >= FEWEST]
    return base if base in judged or not judged else max(judged)


def read_blocks(run: Run, arm: str, protocol: str) -> np.ndarray:
    """The block losses, (blocks,), whose mean a protocol reports for an arm (protocol.md `target`, `evaluation`,
    `reference`)."""
    setting = switches(protocol)
    if arm == "full" and setting["reference"] == "short":
        return np.array(run.last("reference", "block_losses_t+1"))
    if setting["evaluation"] == "splits":
        return np.array(run.last("heldout", f"block_losses_{setting['target']}"))
    losses = run.last("stream", f"block_losses_{setting['target']}")
    if arm == "cut":
        losses = losses[:CUT_STREAM_BATCHES * run.manifest["config"]["training"]["micro_batch"]]
    return np.array(losses)


def base_run(profile: Profile, root: Path) -> Run | None:
    """The log of the base's pretraining; None where the base was fetched, not pretrained here."""
    path = profile.base_folder(root) / "base.jsonl"
    return read_run(path) if path.exists() else None
