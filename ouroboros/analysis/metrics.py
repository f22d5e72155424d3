"""From raw logs to numbers: losses, loss reduction, gap recovery, paired differences. Never imports torch.

Losses are nats per token. A statistic is a mapping {part: {seed: value}}: several parts where a claim speaks of several
depths; paired quantities are differences within a seed, so that what the seed decides cancels.
"""

import functools
import itertools
import json
import math
from array import array
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from ..errors import InputError
from ..experiment.arms import ARMS
from ..experiment.plan import RunSpec
from ..experiment.profile import Profile, load_profile
from ..experiment.protocol import switches
from ..log import Run, Series, read_run, read_runs
from .comparison import document_clusters, margin
from .intervals import FEWEST, BySeed, Ratio, above_zero, minus

CUT_STREAM_BATCHES = 20  # protocol.md `evaluation`: of the stream's 50, on which the released cut baseline is scored
NORMS_CONVERGED = 0.5, 2.0  # times the stream's size: step norms that ended outside had no time to reach it
INTERVENTIONS = ("other_sequence", "corpus_mean", "step_mean")  # evaluation.intervened
LADDER = {"step norms alone": "none_nogate", "gate alone": "none_nonorm", "gate and static": "static_nonorm",
          "gate and Controller": "controller_nonorm", "gate and step norms": "none", "both and static": "static",
          "both and Controller": "controller"}


# --------------------------------------------------------------------------------------------------------- reading

@dataclass(frozen=True, eq=False)  # by identity, so that tables can be kept for it
class Results:
    """A profile's declared table rows and the runs that were made."""

    profile: Profile
    runs: Mapping[str, Run]
    given: pd.DataFrame | None = None  # other rows than those of the runs
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
        """See the function `cells`."""
        return cells(self.profile, self.runs) if self.given is None else self.given

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


def load(profile: str, root: Path) -> Results:
    """Read every finished run of a profile. Raises InputError when there is none, or one isn't what it says."""
    declared = load_profile(profile)
    runs = read_runs(declared.folder(root))
    if not runs:
        raise InputError(f"{declared.folder(root)}/runs: no finished run there; make runs PROFILE={profile} makes them")
    return Results(declared, runs)


def hand_over(results: Results, folder: Path) -> None:
    """Write a profile's parsed logs for the processes of its notebooks, which then parse none: see `handed_over`."""
    index, numbers = {}, array("d")
    for name, run in results.runs.items():
        start, series = len(numbers), []
        for (split, metric), found in run.series.items():
            sizes = [len(value) if isinstance(value, list) else None for value in found.values]  # None: a number
            series.append([split, metric, found.updates, sizes])
            for value, size in zip(found.values, sizes, strict=True):
                numbers.append(value) if size is None else numbers.extend(value)
        index[name] = [start, len(numbers), json.dumps({"manifest": run.manifest, "series": series})]
    np.savez(folder / f"{results.profile.name}.npz", numbers=np.frombuffer(numbers), index=np.array(json.dumps(index)))


@functools.lru_cache(maxsize=1)
def handed_over(profile: str, folder: Path) -> Results:
    """What `hand_over` wrote of a profile, as `load` gives it; once for the notebooks that a process executes."""
    return Results(load_profile(profile), _HandedOver(folder / f"{profile}.npz"))


class _HandedOver(Mapping):
    """The runs of a file that `hand_over` wrote, each put together when it is asked for."""

    def __init__(self, file: Path):
        with np.load(file, allow_pickle=False) as parsed:
            self.numbers, self.index = parsed["numbers"], json.loads(str(parsed["index"]))
        self.made: dict[str, Run] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self.index)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, name: str) -> Run:
        if name not in self.made:
            start, end, text = self.index[name]
            numbers, run, series = iter(self.numbers[start:end].tolist()), json.loads(text), {}
            for split, metric, updates, sizes in run["series"]:
                values = [next(numbers) if size is None else list(itertools.islice(numbers, size)) for size in sizes]
                series[split, metric] = Series(updates, values)
            self.made[name] = Run(run["manifest"], series)
        return self.made[name]


def splits(profile: Profile) -> tuple[str, ...]:
    """What next-token losses are told of: new text of the training split, held-out text, text of other sources, and
    where the corpus has it text that is newer than the base."""
    return ("train", "heldout", *profile.corpus.unseen)


def told_depth(results: Results) -> int:
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


def cells(profile: Profile, runs: Mapping[str, Run]) -> pd.DataFrame:
    """One row a declared cell: arm, depth, rank, protocol, seed, level of the rate, run, shared, status and losses.

    `shared`: the run is shown in several rows, since the protocol makes them one. `status` is `missing` where no run
    was made; the losses of a run that isn't `finished` are NaN, so no mean is taken over it unseen.
    """
    plan = profile.cells()
    # full and cut aren't trained: both columns read one log, which makes no two results one
    times = pd.Series([(cell.run.id, cell.protocol) for cell in plan]).value_counts()
    rows = []
    for cell in plan:
        run = runs.get(cell.run.id)
        status = run.manifest["status"] if run else "missing"
        row = {"arm": cell.arm, "depth": cell.depth, "rank": cell.rank, "protocol": cell.protocol, "seed": cell.seed,
               "level": cell.level or "", "updates": cell.updates or profile.training.updates, "run": cell.run.id,
               "shared": bool(times[cell.run.id, cell.protocol] > 1), "status": status, "loss": math.nan}
        row |= dict.fromkeys(splits(profile), math.nan)
        if status == "finished":
            row["loss"] = float(read_blocks(run, cell.arm, cell.protocol).mean())
            # the release scores held-out text on the next token: in both columns (protocol.md `target`)
            row |= {split: run.last(split, "loss_t+1") for split in splits(profile)}
        rows.append(row)
    return pd.DataFrame(rows).astype({"depth": "Int64", "rank": "Int64"})


def base_run(profile: Profile, root: Path) -> Run | None:
    """The log of the base's pretraining; None where the base was fetched, not pretrained here."""
    path = profile.base_folder(root) / "base.jsonl"
    return read_run(path) if path.exists() else None


# ------------------------------------------------------------------------------------------------------ statistics

def reduction(cut: float, arm: float) -> float:
    """Loss reduction in percent, (L17 - Lc) / L17."""
    return 100 * (cut - arm) / cut


def recovery(cut: float, arm: float, full: float) -> float:
    """Gap recovery in percent, (L17 - Lc) / (L17 - L36)."""
    return 100 * (cut - arm) / (cut - full)


def _paired(function, *parts: BySeed) -> BySeed:
    """A number of each seed that all have."""
    seeds = [seed for seed in parts[0] if all(seed in part for part in parts)]
    return BySeed({seed: function(*(part[seed] for part in parts)) for seed in seeds})


class Statistics:
    """The quantities that claims are about, under one protocol; each returns {part: {seed: value}}.

    `diverged` collects the runs that were asked for and have no loss because they diverged: no mean hides them. With
    `endless` such a run's loss is infinite.
    """

    def __init__(self, results: Results, protocol: str, endless: bool = False, updates: int | None = None):
        self.results, self.protocol, self.endless = results, protocol, endless
        self.updates = updates or results.profile.training.updates
        self.diverged: set[str] = set()
        self._margins: dict[str, float] = {}

    @property
    def depths(self) -> tuple[int, ...]:
        return self.results.profile.depths

    def _rows(self, arm: str, depth: int | None, rank: int | None, level: str = "") -> list:
        """The declared rows of an arm under this protocol, a seed each."""
        profile = self.results.profile
        place = (depth or profile.depth, rank or profile.rank_of(arm)) if ARMS[arm].loops else (None, None)
        rows = self._declared_rows(arm, *place, level)
        self.results.note(row.run for row in rows)
        return rows

    def _declared_rows(self, arm: str, *place) -> list:
        updates = self.updates if ARMS[arm].fit == "gradient" else self.results.profile.training.updates
        return self.results.places.get((self.protocol, arm, *place, updates), [])

    def _losses(self, arm: str, depth: int | None = None, column: str = "loss", rank: int | None = None,
                level: str = "") -> BySeed:
        rows = self._rows(arm, depth, rank, level)
        self.diverged |= {row.run for row in rows if row.status == "diverged"}
        endless = {row.seed: math.inf for row in rows if self.endless and row.status == "diverged"}
        losses = {row.seed: getattr(row, column) for row in rows} | endless
        losses = {seed: value for seed, value in losses.items() if not math.isnan(value)}
        blocks, clusters = self._blocks(rows, arm, column) if not endless else (None, None)
        trained = RunSpec(arm, depth, rank, self.protocol, 0).fit != "none"
        return BySeed(losses, blocks, clusters, trained, self._margin(column))

    def _blocks(self, rows: list, arm: str, column: str) -> tuple[dict | None, np.ndarray | None]:
        """The losses behind a column of the cells block by block, and their clusters: where these are the same blocks
        at every seed, as on held-out, foreign and newer text."""
        setting = switches(self.protocol)
        own = setting["evaluation"] != "splits" or arm == "full" and setting["reference"] == "short"
        if column == "loss" and own:
            return None, None
        split, target = ("heldout", setting["target"]) if column == "loss" else (column, "t+1")
        clusters = self.results.clusters.get(split)
        if clusters is None:
            return None, None
        return {row.seed: np.array(self.results.runs[row.run].last(split, f"block_losses_{target}"))
                for row in rows if row.status == "finished"}, clusters

    def _margin(self, column: str) -> float:
        """The margin of a difference in a column: see `comparison.margin`; the gap is between means over seeds."""
        if column not in self._margins:  # not noted as read: it enters words, no number
            full, cut = ([getattr(row, column) for row in self._declared_rows(arm, None, None, "")
                          if row.status == "finished"] for arm in ("full", "cut"))
            self._margins[column] = margin(float(np.mean(cut) - np.mean(full)) if full and cut else None)
        return self._margins[column]

    def runs_of(self, arm: str, depth: int | None = None) -> list[Run]:
        """The finished runs of an arm at a depth (the base depth), a seed each, in the order of the matrix."""
        return [self.results.runs[row.run] for row in self._rows(arm, depth, None) if row.status == "finished"]

    def _depth_parts(self, function, depths=None) -> dict[str, BySeed]:
        return {f"depth {depth}": function(depth) for depth in depths or self.depths}

    def loss(self, arm: str, depth: int | None = None, rank: int | None = None,
             column: str = "loss") -> dict[str, BySeed]:
        return {"": self._losses(arm, depth, column, rank)}

    def reduction(self, arm: str, depth: int | None = None, rank: int | None = None) -> dict[str, Ratio]:
        """Loss reduction, (L17 - Lc) / L17, in percent."""
        cut = self._losses("cut")
        return {"": Ratio(minus(cut, self._losses(arm, depth, rank=rank)), cut)}

    def gap(self, column: str = "loss") -> BySeed:
        """What cutting costs, cut - full: as the protocol reports it, or in next-token loss on a split."""
        return minus(self._losses("cut", column=column), self._losses("full", column=column))

    def gap_on_common_blocks(self) -> BySeed:
        """cut - full on the blocks that both are read on; nothing where the full model is read on other texts."""
        if switches(self.protocol)["reference"] == "short":
            return {}
        blocks = [{run.manifest["seed"]: read_blocks(run, arm, self.protocol) for run in self.runs_of(arm)}
                  for arm in ("cut", "full")]

        def gap(cut: np.ndarray, full: np.ndarray) -> float:
            common = min(len(cut), len(full))  # both begin at the first block
            return float(cut[:common].mean() - full[:common].mean())

        return _paired(gap, *blocks)

    def share(self, values: BySeed, column: str = "loss") -> Ratio:
        """A quantity in percent of the gap; undefined where the blocks that were read leave open whether there is one
        (no seed enters full or cut, so seeds can't tell)."""
        runs = [run for arm in ("full", "cut") for run in self.runs_of(arm)[:1]]
        if len(runs) < 2:
            return Ratio(values, self.gap(column))
        if column == "loss":
            full, cut = (read_blocks(run, arm, self.protocol) for run, arm in zip(runs, ("full", "cut"), strict=True))
        else:
            full, cut = (np.array(run.last(column, "block_losses_t+1")) for run in runs)
        setting = switches(self.protocol)
        same = column != "loss" or (setting["evaluation"], setting["reference"]) == ("splits", "same")
        return Ratio(values, self.gap(column), above_zero(cut, full, same))

    def recovery(self, arm: str, depth: int | None = None, rank: int | None = None) -> dict[str, Ratio]:
        """Gap recovery, (L17 - Lc) / (L17 - L36), in percent."""
        return {"": self.share(minus(self._losses("cut"), self._losses(arm, depth, rank=rank)))}

    def recovery_from_best(self, arm: str, depth: int | None = None) -> dict[str, Ratio]:
        """Gap recovery counted from the lower of the cut model and a unigram, in percent: what is worse than a unigram
        has a gap that anything closes."""
        start = min((self._losses(name) for name in ("cut", "unigram")),
                    key=lambda losses: float(np.mean(list(losses.values()))) if losses else math.inf)
        gap = minus(start, self._losses("full"))
        return {"": Ratio(minus(start, self._losses(arm, depth)), gap, bool(gap) and np.mean(list(gap.values())) > 0)}

    def norms_reached(self, arm: str, depth: int | None = None) -> float:
        """Where an arm's step norms ended: their mean weight in parts of the root mean square of the stream that they
        read before training, mean over seeds and steps; NaN without step norms, or where a log doesn't say."""
        found = []
        for run in self.runs_of(arm, depth):
            if ("model", "stream_rms") in run.series and ("model", "step_norm") in run.series:
                found.append(np.mean(run.last("model", "step_norm")) / np.mean(run.last("model", "stream_rms")))
        return float(np.mean(found)) if found else math.nan

    def norms_converged(self, arm: str, depth: int | None = None) -> bool | None:
        """Whether an arm's step norms ended near the size of the stream; None without them, or where no log says."""
        reached = self.norms_reached(arm, depth)
        return None if math.isnan(reached) else NORMS_CONVERGED[0] <= reached <= NORMS_CONVERGED[1]

    def against_cut(self, arm: str, depth: int | None = None) -> dict[str, BySeed]:
        return {"": minus(self._losses(arm, depth), self._losses("cut"))}

    def against_cut_by_depth(self, arm: str) -> dict[str, BySeed]:
        return self._depth_parts(lambda depth: self.against_cut(arm, depth)[""])

    def heldout_against_cut_by_depth(self, arm: str) -> dict[str, BySeed]:
        cut = self._losses("cut", column="heldout")
        return self._depth_parts(lambda depth: minus(self._losses(arm, depth, "heldout"), cut))

    def advantage(self, depth: int | None = None, rank: int | None = None) -> dict[str, BySeed]:
        return {"": minus(self._losses("static", depth, rank=rank), self._losses("controller", depth, rank=rank))}

    def advantage_by_depth(self) -> dict[str, BySeed]:
        return self._depth_parts(lambda depth: self.advantage(depth)[""])

    def gain_over_none_by_depth(self, arm: str) -> dict[str, BySeed]:
        """What the modulation adds to loop, gate and step norms."""
        return self._depth_parts(lambda depth: minus(self._losses("none", depth), self._losses(arm, depth)))

    def advantage_by_rank(self) -> dict[str, BySeed]:
        """Static minus Controller at the base depth, at each rank; nothing where the matrix has one rank only."""
        profile = self.results.profile
        if not profile.ranks:
            return {"": {}}
        return {f"rank {rank}": self.advantage(rank=rank)[""] for rank in sorted({profile.rank, *profile.ranks})}

    def behind(self, arm: str, other: str, depth: int) -> BySeed:
        """How far one arm lies below another at a depth: other - arm."""
        return minus(self._losses(other, depth), self._losses(arm, depth))

    def change_over_depths(self, arm: str, first: int, last: int) -> BySeed:
        """What more steps take off an arm's loss."""
        return minus(self._losses(arm, first), self._losses(arm, last))

    def lead_at_1_over_other_depths(self) -> dict[str, BySeed]:
        first = self.advantage(1)[""]
        return self._depth_parts(lambda d: minus(first, self.advantage(d)[""]), [d for d in self.depths if d != 1])

    def against_depth_1(self, arm: str) -> dict[str, BySeed]:
        first = self._losses(arm, 1)
        return self._depth_parts(lambda d: minus(self._losses(arm, d), first), [d for d in self.depths if d != 1])

    def gain_from_depth_to_depth(self, arm: str) -> dict[str, BySeed]:
        steps = zip(self.depths, self.depths[1:], strict=False)
        return {f"depth {a} to {b}": minus(self._losses(arm, a), self._losses(arm, b)) for a, b in steps}

    def without_gate_minus_with(self) -> dict[str, BySeed]:
        return self._depth_parts(lambda d: minus(self._losses("controller_nogate", d), self._losses("controller", d)),
                                 self.results.profile.depths_of("controller_nogate"))

    def configurations(self, arm: str) -> dict[str, BySeed]:
        """The arm's loss at every depth, and at the base depth at every other rank and rate that the matrix has."""
        profile, protocol = self.results.profile, self.protocol
        found = self._depth_parts(lambda depth: self._losses(arm, depth))
        if protocol == "corrected":
            found |= {f"rank {rank}": self._losses(arm, rank=rank) for rank in profile.ranks}
            found |= {f"rate {level}": self._losses(arm, level=level) for level in profile.levels}
        return found

    def spread(self, arm: str) -> dict[str, BySeed]:
        """Largest minus smallest loss over the configurations."""
        return {"": _paired(lambda *losses: max(losses) - min(losses), *self.configurations(arm).values())}

    def advantage_by_configuration(self) -> dict[str, BySeed]:
        """Static minus Controller in each configuration; rates are each arm's own, or the same factor of it."""
        static, controller = self.configurations("static"), self.configurations("controller")
        return {name: minus(static[name], controller[name]) for name in static}

    def ladder(self, depth: int) -> dict[str, BySeed]:
        """Loss minus the cut model's of a loop with more and more parts, at one depth; of those declared there."""
        return {name: self.against_cut(arm, depth)[""] for name, arm in LADDER.items() if self._declared(arm, depth)}

    def bought(self, depth: int) -> dict[str, BySeed]:
        """What each part takes off the loss, at one depth: the arm without it minus the arm with it."""
        steps = {"step norms, to the gate": ("none_nonorm", "none"), "gate, to the step norms": ("none_nogate", "none"),
                 "static, to the gate": ("none_nonorm", "static_nonorm"),
                 "Controller, to the gate": ("none_nonorm", "controller_nonorm"),
                 "static, to both": ("none", "static"), "Controller, to both": ("none", "controller")}
        return {name: minus(self._losses(without, depth), self._losses(with_, depth))
                for name, (without, with_) in steps.items()
                if self._declared(without, depth) and self._declared(with_, depth)}

    def _declared(self, arm: str, depth: int) -> bool:
        return depth in self.results.profile.depths_of(arm)

    def gate_by_arm(self, depth: int) -> dict[str, BySeed]:
        """Without the gate minus with it, step norms kept, at one depth."""
        return {arm: minus(self._losses(f"{arm}_nogate", depth), self._losses(arm, depth))
                for arm in ("controller", "static", "none")}

    def after_next(self) -> dict[str, list[float]]:
        """Loss of the full and the cut model on the token after the next one, held-out text, a value a seed."""
        return {arm: [run.last("heldout", "loss_t+2") for run in self.runs_of(arm)] for arm in ("full", "cut")}

    def blind_minus_controller(self, depth: int) -> dict[str, BySeed]:
        """What is lost without the input, at one depth: a table, and two arms with the Controller's parameter count."""
        return {arm: minus(self._losses(arm, depth), self._losses("controller", depth))
                for arm in ("static", "static_wide", "controller_blind")}

    def coda(self, depth: int) -> dict[str, BySeed]:
        """Loss minus the cut model's with the coda frozen, trained by LoRA and trained whole, at one depth."""
        names = [f"{arm}{suffix}" for arm in ("controller", "static", "none", "cut")
                 for suffix in ("", "_coda_lora", "_coda_full")]
        return {name: self.against_cut(name, depth)[""] for name in names
                if name in self.results.profile.arms and name != "cut"}

    def instead(self) -> dict[str, BySeed]:
        """Loss minus the cut model's of what one would do instead of looping."""
        return {arm: self.against_cut(arm)[""] for arm in self.results.profile.instead}

    def instead_minus_controller(self, depth: int | None = None) -> dict[str, BySeed]:
        """Loss of what one would do instead minus the Controller's at a depth (the base depth); below 0 it is
        better."""
        return {arm: minus(self._losses(arm), self._losses("controller", depth))
                for arm in self.results.profile.instead}

    # -------------------------------------------------------------------------------------- what a run logs of itself

    def logged(self, arm: str, depth: int | None, metric: str) -> dict[int, float | list[float]]:
        """The last value that each seed's run logged of a metric on held-out text: {seed: a number or a list}; a run
        whose log's format is of before that metric isn't in it."""
        found = self._losses(arm, depth)  # only finished runs have a loss
        runs = {row.seed: row.run for row in self._rows(arm, depth, None)}
        values = {seed: self.results.runs[runs[seed]].last("heldout", metric, math.nan) for seed in found}
        return {seed: value for seed, value in values.items() if np.isfinite(value).all()}

    def split_against_cut(self, arm: str, depth: int) -> dict[str, BySeed]:
        """Next-token loss minus the cut model's, on each of the `splits`."""
        return {split: minus(self._losses(arm, depth, split), self._losses("cut", column=split))
                for split in splits(self.results.profile)}

    def on(self, split: str) -> dict[str, BySeed]:
        """The two comparisons that the claims are about, in next-token loss on one of the `splits`, at each depth."""
        cut, found = self._losses("cut", column=split), {}
        for depth in self.depths:
            static, controller = (self._losses(arm, depth, split) for arm in ("static", "controller"))
            found |= {f"Controller - cut, depth {depth}": minus(controller, cut),
                      f"static - Controller, depth {depth}": minus(static, controller)}
        return found

    def at_other_depths(self, arm: str) -> dict[str, BySeed]:
        """Held-out next-token loss of the runs of the base depth, scored at each depth."""
        profile = self.results.profile
        return {f"depth {depth}": self.logged(arm, profile.depth, f"loss_t+1/depth_{depth}")
                for depth in profile.probes.depths}

    def interventions(self, depth: int) -> dict[str, BySeed]:
        """What the Controller's loss rises by when it sees something else (`evaluation.intervened`)."""
        own = self.logged("controller", depth, "loss_t+1/as_trained")
        return {kind: minus(self.logged("controller", depth, f"loss_t+1/{kind}"), own) for kind in INTERVENTIONS}
