"""From raw logs to numbers: losses, loss reduction, gap recovery, paired differences, intervals. Never imports torch.

Losses are nats per token. A statistic is a mapping {part: {seed: value}}: several parts where a claim speaks of several
depths; paired quantities are differences within a seed, so that what the seed decides cancels.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from . import cost
from .errors import InputError
from .experiment import ARMS, PROJECTIONS, Profile, load_profile, switches
from .runlog import Run, read_run, read_runs

LEVEL = 0.95
CUT_STREAM_BATCHES = 20  # AUDIT `evaluation`: the released cut baseline is scored on the first 20 micro-batches of 50
SPLITS = ("train", "heldout", "foreign")  # new text of the training split, held-out text, text of other sources
INTERVENTIONS = ("other_sequence", "corpus_mean", "step_mean")  # evaluation.intervened
LADDER = {"step norms alone": "none_nogate", "gate alone": "none_nonorm", "gate and step norms": "none",
          "both and static": "static", "both and Controller": "controller"}
LAST_SHARE = 0.2  # of the updates: where the slope of a training curve is taken
CONVERGED_SLOPE = 0.02  # nats per token over that last fifth: steeper runs are labelled as not converged

BySeed = dict[int, float]


# --------------------------------------------------------------------------------------------------------- reading

@dataclass(frozen=True)
class Results:
    """A profile's declared table rows and the runs that were made."""

    profile: Profile
    runs: Mapping[str, Run]
    cells: pd.DataFrame


def load(profile: str, root: Path) -> Results:
    """Read every finished run of a profile. Raises InputError when there is none, or one isn't what it says."""
    declared = load_profile(profile)
    runs = read_runs(declared.folder(root))
    if not runs:
        raise InputError(f"{declared.folder(root)}/runs: no finished run there; make runs PROFILE={profile} makes them")
    return Results(declared, runs, cells(declared, runs))


def last_value(run: Run, split: str, metric: str, default=None):
    """The last value logged of a metric on a split. Raises InputError when there is none, and no default."""
    rows = run.log[(run.log["split"] == split) & (run.log["metric"] == metric)]
    if rows.empty and default is not None:
        return default
    if rows.empty:
        raise InputError(f"run '{run.manifest['run']}': log.jsonl has no row of split '{split}', metric '{metric}'; "
                         "make the run again")
    return rows["value"].iloc[-1]


def headline(run: Run, arm: str, protocol: str) -> float:
    """The loss that a protocol reports for an arm (AUDIT `target`, `evaluation`, `reference`)."""
    setting = switches(protocol)
    if arm == "full" and setting["reference"] == "short":
        return last_value(run, "reference", "loss_t+1")
    if setting["evaluation"] == "splits":
        return last_value(run, "heldout", f"loss_{setting['target']}")
    losses = last_value(run, "stream", f"block_losses_{setting['target']}")
    if arm == "cut":
        losses = losses[:CUT_STREAM_BATCHES * run.manifest["config"]["training"]["micro_batch"]]
    return float(np.mean(losses))


def cells(profile: Profile, runs: Mapping[str, Run]) -> pd.DataFrame:
    """One row a declared cell: arm, depth, rank, protocol, seed, level of the rate, run, shared, status and losses.

    `shared`: the run is shown in several rows, since the protocol makes them one. `status` is `missing` where no run
    was made; the losses of a run that isn't `finished` are NaN, so no mean is taken over it unseen.
    """
    plan = profile.plan()
    # full and cut aren't trained: both columns read one log, which makes no two results one
    times = pd.Series([(cell.run.id, cell.protocol) for cell in plan]).value_counts()
    rows = []
    for cell in plan:
        run = runs.get(cell.run.id)
        status = run.manifest["status"] if run else "missing"
        row = {"arm": cell.arm, "depth": cell.depth, "rank": cell.rank, "protocol": cell.protocol, "seed": cell.seed,
               "level": cell.level or "", "run": cell.run.id, "shared": bool(times[cell.run.id, cell.protocol] > 1),
               "status": status, "loss": math.nan} | dict.fromkeys(SPLITS, math.nan)
        if status == "finished":
            row["loss"] = headline(run, cell.arm, cell.protocol)
            # the release scores held-out text on the next token: in both columns (AUDIT `target`)
            row |= {split: last_value(run, split, "loss_t+1") for split in ("heldout", "foreign")}
            # logs of before 2026-11-25 have no new text of the training split
            row["train"] = last_value(run, "train", "loss_t+1", math.nan)
        rows.append(row)
    return pd.DataFrame(rows).astype({"depth": "Int64", "rank": "Int64"})


# ------------------------------------------------------------------------------------------------------- intervals

@dataclass(frozen=True)
class Interval:
    """A mean over n seeds and its 95 % interval; NaN bounds where n < 2: one seed has none.

    `p` is the two-sided p-value of a mean of 0. A ratio whose denominator can't be told from 0 is NaN throughout.
    """

    mean: float
    low: float
    high: float
    n: int
    p: float = math.nan

    def __str__(self) -> str:
        if self.n == 0:
            return "no runs"
        if math.isnan(self.mean):
            return f"undefined: the gap's interval touches 0 (n = {self.n})"
        if self.n == 1:
            return f"{self.mean:.4g} (n = 1, no interval)"
        if self.high - self.low < 1e-9:  # of an evaluation that no seed enters, an interval would feign certainty
            return f"{self.mean:.4g} (the same in all {self.n} seeds)"
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}] (n = {self.n})"


NOTHING = Interval(math.nan, math.nan, math.nan, 0)


def t_interval(values) -> Interval:
    """Student t over seeds; of differences within a seed, the paired one. A percentile bootstrap over 3 to 5 seeds
    would cover 74 to 82 %."""
    values = np.asarray(list(values), dtype=float)
    values = values[np.isfinite(values)]
    n = len(values)
    if n == 0:
        return NOTHING
    mean = float(values.mean())
    if n == 1:
        return Interval(mean, math.nan, math.nan, 1)
    error = float(values.std(ddof=1)) / math.sqrt(n)
    half = _t(n) * error
    p = 2 * float(stats.t.sf(abs(mean) / error, n - 1)) if error > 0 else float(mean == 0)
    return Interval(mean, mean - half, mean + half, n, p)


def _t(n: int) -> float:
    """The quantile of Student's t that makes a 95 % interval from n seeds."""
    return float(stats.t.ppf(0.5 + LEVEL / 2, n - 1))


@dataclass(frozen=True)
class Ratio:
    """A ratio of two means over seeds, in percent: a part of a statistic, as a BySeed is."""

    numerator: BySeed
    denominator: BySeed


def fieller(ratio: Ratio) -> Interval:
    """Fieller's (1954) interval of a ratio of paired means, in percent.

    A mean of each seed's own ratio would be biased, and its interval too short, where the denominator varies. Undefined
    (NaN) where the denominator's own interval touches 0: then the ratio's is no interval. No p: judge the numerator.
    """
    seeds = [seed for seed in ratio.numerator if seed in ratio.denominator]
    x = np.array([ratio.numerator[seed] for seed in seeds], dtype=float)
    y = np.array([ratio.denominator[seed] for seed in seeds], dtype=float)
    n = len(seeds)
    if n == 0:
        return NOTHING
    if n == 1:
        return Interval(100 * x[0] / y[0], math.nan, math.nan, 1)
    (xx, xy), (_, yy) = np.cov(x, y) / n  # of the means
    t, top, bottom = _t(n), x.mean(), y.mean()
    a, b, c = bottom**2 - t**2 * yy, top * bottom - t**2 * xy, top**2 - t**2 * xx
    if a <= 0:  # the denominator's interval touches 0
        return Interval(math.nan, math.nan, math.nan, n)
    root = math.sqrt(max(b**2 - a * c, 0.0))
    return Interval(100 * top / bottom, 100 * (b - root) / a, 100 * (b + root) / a, n)


def interval(part: BySeed | Ratio) -> Interval:
    """The interval of a statistic's part."""
    return fieller(part) if isinstance(part, Ratio) else t_interval(part.values())


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Holm's (1979) adjusted p-values of a family; NaN where there was none, which counts for nothing."""
    told = sorted((value, name) for name, value in p.items() if not math.isnan(value))
    adjusted, largest = dict.fromkeys(p, math.nan), 0.0
    for place, (value, name) in enumerate(told):
        largest = max(largest, min(1.0, (len(told) - place) * value))
        adjusted[name] = largest
    return adjusted


def block_bootstrap(sums, sizes, generator: np.random.Generator, draws: int = 2000) -> Interval:
    """The mean per token of a quantity summed by document (or by block), interval by resampling these whole.

    Tokens of one document aren't independent; `n` is the number of documents.
    """
    sums, sizes = np.asarray(sums, dtype=float), np.asarray(sizes, dtype=float)
    picked = generator.integers(0, len(sums), (draws, len(sums)))
    means = sums[picked].sum(1) / sizes[picked].sum(1)  # (draws,)
    low, high = np.quantile(means, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    return Interval(float(sums.sum() / sizes.sum()), float(low), float(high), len(sums))


# ------------------------------------------------------------------------------------------------------ statistics

def reduction(cut: float, arm: float) -> float:
    """Loss reduction in percent, (L17 - Lc) / L17."""
    return 100 * (cut - arm) / cut


def recovery(cut: float, arm: float, full: float) -> float:
    """Gap recovery in percent, (L17 - Lc) / (L17 - L36)."""
    return 100 * (cut - arm) / (cut - full)


def _paired(function, *parts: BySeed) -> BySeed:
    return {seed: function(*(part[seed] for part in parts)) for seed in parts[0] if all(seed in p for p in parts)}


def _minus(a: BySeed, b: BySeed) -> BySeed:
    return _paired(lambda x, y: x - y, a, b)


class Statistics:
    """The quantities that claims are about, under one protocol; each returns {part: {seed: value}}.

    `diverged` collects the runs that were asked for and have no loss because they diverged: no mean hides them.
    """

    def __init__(self, results: Results, protocol: str):
        self.results, self.protocol = results, protocol
        self.depths = results.profile.matrix.depths
        self.diverged: set[str] = set()

    def _rows(self, arm: str, depth: int | None, rank: int | None, level: str = "") -> pd.DataFrame:
        """The declared rows of an arm under this protocol, a seed each."""
        rows, profile = self.results.cells, self.results.profile
        rows = rows[(rows["arm"] == arm) & (rows["protocol"] == self.protocol) & (rows["level"] == level)]
        if ARMS[arm].loops:
            rows = rows[rows["depth"] == (depth or profile.depth)]
            rows = rows[rows["rank"].fillna(0) == (rank or profile.rank_of(arm) or 0)]
        return rows

    def _losses(self, arm: str, depth: int | None = None, column: str = "loss", rank: int | None = None,
                level: str = "") -> BySeed:
        rows = self._rows(arm, depth, rank, level)
        self.diverged |= set(rows[rows["status"] == "diverged"]["run"])
        rows = rows[np.isfinite(rows[column])]
        return {int(seed): float(value) for seed, value in zip(rows["seed"], rows[column], strict=True)}

    def runs_of(self, arm: str, depth: int | None = None) -> list[Run]:
        """The finished runs of an arm at a depth (the base depth), a seed each, in the order of the matrix."""
        rows = self._rows(arm, depth, None)
        return [self.results.runs[name] for name in rows[rows["status"] == "finished"]["run"]]

    def _depth_parts(self, function, depths=None) -> dict[str, BySeed]:
        return {f"depth {depth}": function(depth) for depth in depths or self.depths}

    def loss(self, arm: str, depth: int | None = None) -> dict[str, BySeed]:
        return {"": self._losses(arm, depth)}

    def reduction(self, arm: str, depth: int | None = None) -> dict[str, BySeed]:
        return {"": _paired(reduction, self._losses("cut"), self._losses(arm, depth))}

    def gap(self, column: str = "loss") -> BySeed:
        """What cutting costs, cut - full: as the protocol reports it, or in next-token loss on a split."""
        return _minus(self._losses("cut", column=column), self._losses("full", column=column))

    def recovery(self, arm: str, depth: int | None = None) -> dict[str, Ratio]:
        """Gap recovery, (L17 - Lc) / (L17 - L36), in percent."""
        return {"": Ratio(_minus(self._losses("cut"), self._losses(arm, depth)), self.gap())}

    def against_cut(self, arm: str, depth: int | None = None) -> dict[str, BySeed]:
        return {"": _minus(self._losses(arm, depth), self._losses("cut"))}

    def against_cut_by_depth(self, arm: str) -> dict[str, BySeed]:
        return self._depth_parts(lambda depth: self.against_cut(arm, depth)[""])

    def heldout_against_cut_by_depth(self, arm: str) -> dict[str, BySeed]:
        cut = self._losses("cut", column="heldout")
        return self._depth_parts(lambda depth: _minus(self._losses(arm, depth, "heldout"), cut))

    def advantage(self, depth: int) -> dict[str, BySeed]:
        return {"": _minus(self._losses("static", depth), self._losses("controller", depth))}

    def advantage_by_depth(self) -> dict[str, BySeed]:
        return self._depth_parts(lambda depth: self.advantage(depth)[""])

    def gain_over_none_by_depth(self, arm: str) -> dict[str, BySeed]:
        """What the modulation adds to loop, gate and step norms."""
        return self._depth_parts(lambda depth: _minus(self._losses("none", depth), self._losses(arm, depth)))

    def advantage_by_rank(self) -> dict[str, BySeed]:
        """Static minus Controller at the base depth, at each rank; nothing where the matrix has one rank only."""
        profile = self.results.profile
        if not profile.matrix.ranks:
            return {"": {}}
        return {f"rank {rank}": _minus(self._losses("static", rank=rank), self._losses("controller", rank=rank))
                for rank in sorted({profile.rank, *profile.matrix.ranks})}

    def behind(self, arm: str, other: str, depth: int) -> BySeed:
        """How far one arm lies below another at a depth: other - arm."""
        return _minus(self._losses(other, depth), self._losses(arm, depth))

    def change_over_depths(self, arm: str, first: int, last: int) -> BySeed:
        """What more steps take off an arm's loss."""
        return _minus(self._losses(arm, first), self._losses(arm, last))

    def at_rank(self, arm: str, rank: int) -> BySeed:
        """An arm's loss at the base depth and another rank."""
        return self._losses(arm, rank=rank)

    def lead_at_1_over_other_depths(self) -> dict[str, BySeed]:
        first = self.advantage(1)[""]
        return self._depth_parts(lambda d: _minus(first, self.advantage(d)[""]), [d for d in self.depths if d != 1])

    def against_depth_1(self, arm: str) -> dict[str, BySeed]:
        first = self._losses(arm, 1)
        return self._depth_parts(lambda d: _minus(self._losses(arm, d), first), [d for d in self.depths if d != 1])

    def gain_from_depth_to_depth(self, arm: str) -> dict[str, BySeed]:
        steps = zip(self.depths, self.depths[1:], strict=False)
        return {f"depth {a} to {b}": _minus(self._losses(arm, a), self._losses(arm, b)) for a, b in steps}

    def without_gate_minus_with(self) -> dict[str, BySeed]:
        return self._depth_parts(lambda d: _minus(self._losses("controller_nogate", d), self._losses("controller", d)),
                                 self.results.profile.matrix.gateless_depths)

    def configurations(self, arm: str) -> dict[str, BySeed]:
        """The arm's loss at every depth, and at the base depth at every other rank and rate that the matrix has."""
        matrix, protocol = self.results.profile.matrix, self.protocol
        found = self._depth_parts(lambda depth: self._losses(arm, depth))
        if protocol == "corrected":
            found |= {f"rank {rank}": self._losses(arm, rank=rank) for rank in matrix.ranks}
            found |= {f"rate {level}": self._losses(arm, level=level) for level in matrix.rates}
        return found

    def spread(self, arm: str) -> dict[str, BySeed]:
        """Largest minus smallest loss over the configurations."""
        return {"": _paired(lambda *losses: max(losses) - min(losses), *self.configurations(arm).values())}

    def advantage_by_configuration(self) -> dict[str, BySeed]:
        """Static minus Controller in each configuration; rates are each arm's own, or the same factor of it."""
        static, controller = self.configurations("static"), self.configurations("controller")
        return {name: _minus(static[name], controller[name]) for name in static}

    def ladder(self, depth: int) -> dict[str, BySeed]:
        """Loss minus the cut model's of a loop with more and more parts, at one depth."""
        return {name: self.against_cut(arm, depth)[""] for name, arm in LADDER.items()}

    def bought(self, depth: int) -> dict[str, BySeed]:
        """What each part takes off the loss, at one depth: the arm without it minus the arm with it."""
        steps = {"step norms, to the gate": ("none_nonorm", "none"), "gate, to the step norms": ("none_nogate", "none"),
                 "static, to both": ("none", "static"), "Controller, to both": ("none", "controller")}
        return {name: _minus(self._losses(without, depth), self._losses(with_, depth))
                for name, (without, with_) in steps.items()}

    def gate_by_arm(self, depth: int) -> dict[str, BySeed]:
        """Without the gate minus with it, step norms kept, at one depth."""
        return {arm: _minus(self._losses(f"{arm}_nogate", depth), self._losses(arm, depth))
                for arm in ("controller", "static", "none")}

    def blind_minus_controller(self, depth: int) -> dict[str, BySeed]:
        """What is lost without the input, at one depth: a table, and two arms with the Controller's parameter count."""
        return {arm: _minus(self._losses(arm, depth), self._losses("controller", depth))
                for arm in ("static", "static_wide", "controller_blind")}

    def coda(self, depth: int) -> dict[str, BySeed]:
        """Loss minus the cut model's with the coda frozen, trained by LoRA and trained whole, at one depth."""
        return {f"{arm}{suffix}": self.against_cut(f"{arm}{suffix}", depth)[""]
                for arm in ("controller", "static", "none") for suffix in ("", "_coda_lora", "_coda_full")}

    def instead(self) -> dict[str, BySeed]:
        """Loss minus the cut model's of what one would do instead of looping."""
        return {arm: self.against_cut(arm)[""] for arm in self.results.profile.matrix.instead}

    def instead_minus_controller(self) -> dict[str, BySeed]:
        """Loss of what one would do instead minus the Controller's at the base depth; below 0 it is better."""
        return {arm: _minus(self._losses(arm), self._losses("controller"))
                for arm in self.results.profile.matrix.instead}

    # -------------------------------------------------------------------------------------- what a run logs of itself

    def logged(self, arm: str, depth: int | None, metric: str) -> dict[int, float | list[float]]:
        """The last value that each seed's run logged of a metric on held-out text: {seed: a number or a list}; a run
        that logged none (before 2026-11-25) isn't in it."""
        found = self._losses(arm, depth)  # only finished runs have a loss
        rows = self._rows(arm, depth, None)
        runs = {int(seed): run for seed, run in zip(rows["seed"], rows["run"], strict=True)}
        values = {seed: last_value(self.results.runs[runs[seed]], "heldout", metric, math.nan) for seed in found}
        return {seed: value for seed, value in values.items() if np.isfinite(value).all()}

    def split_against_cut(self, arm: str, depth: int) -> dict[str, BySeed]:
        """Next-token loss minus the cut model's, on new text of the training split, on held-out and foreign text."""
        return {split: _minus(self._losses(arm, depth, split), self._losses("cut", column=split)) for split in SPLITS}

    def at_other_depths(self, arm: str) -> dict[str, BySeed]:
        """Held-out next-token loss of the runs of the base depth, scored at each depth."""
        profile = self.results.profile
        return {f"depth {depth}": self.logged(arm, profile.depth, f"loss_t+1/depth_{depth}")
                for depth in profile.probes.depths}

    def interventions(self, depth: int) -> dict[str, BySeed]:
        """What the Controller's loss rises by when it sees something else (`evaluation.intervened`)."""
        own = self.logged("controller", depth, "loss_t+1/as_trained")
        return {kind: _minus(self.logged("controller", depth, f"loss_t+1/{kind}"), own) for kind in INTERVENTIONS}


# ---------------------------------------------------------------------------------------------------------- tables

def _base_cells(results: Results) -> pd.DataFrame:
    """The rows at the base rank and the chosen rate."""
    cells = results.cells
    return cells[(cells["rank"].fillna(results.profile.rank) == results.profile.rank) & (cells["level"] == "")]


def arm_table(results: Results) -> pd.DataFrame:
    """Per protocol, arm and depth: loss, held-out loss, loss reduction and gap recovery over seeds; convergence."""
    rows = []
    groups = _base_cells(results).groupby(["protocol", "arm", "depth"], dropna=False, sort=False)
    for (protocol, arm, depth), group in groups:
        depth = None if pd.isna(depth) else int(depth)
        statistics = Statistics(results, protocol)
        row = {"protocol": protocol, "arm": arm, "depth": depth, "n": int((group["status"] == "finished").sum()),
               "diverged": int((group["status"] == "diverged").sum()), "shared": bool(group["shared"].any())}
        row |= columns("loss", t_interval(group["loss"]))
        row |= columns("heldout", t_interval(group["heldout"]))
        if ARMS[arm].fit != "none":
            row |= columns("reduction", t_interval(statistics.reduction(arm, depth)[""].values()))
            row |= columns("recovery", fieller(statistics.recovery(arm, depth)[""]))
        if ARMS[arm].trained:
            slopes = [last_slope(results.runs[name]) for name in group[group["status"] == "finished"]["run"]]
            row["last_slope"] = float(np.mean(slopes)) if slopes else math.nan
            row["converged"] = bool(slopes) and abs(row["last_slope"]) <= CONVERGED_SLOPE
        rows.append(row)
    return pd.DataFrame(rows).astype({"depth": "Int64"})


def difference_table(results: Results, statistic: str, gap: str | None = "loss", **arguments) -> pd.DataFrame:
    """A statistic's parts under each protocol: mean, low, high and n in nats per token and in percent of the gap
    between cut and full in column `gap` of the cells (None: not); p-values after Holm over the parts; and how many of
    the runs behind all parts of a protocol diverged, so have no loss."""
    rows = []
    for protocol in results.profile.matrix.protocols:
        statistics = Statistics(results, protocol)
        parts = getattr(statistics, statistic)(**arguments)
        intervals = {part: interval(values) for part, values in parts.items()}
        adjusted = holm({part: found.p for part, found in intervals.items()})
        for part, values in parts.items():
            row = {"protocol": protocol, "part": part} | columns("difference", intervals[part])
            row |= {"p (Holm)": adjusted[part], "diverged": len(statistics.diverged)}
            if gap:
                share = fieller(Ratio(values, statistics.gap(gap)))
                row |= {"% of gap": share.mean, "% of gap low": share.low, "% of gap high": share.high}
            rows.append(row)
    return pd.DataFrame(rows)


def steps_table(results: Results, depth: int) -> pd.DataFrame:
    """Of each protocol, arm and recurrence step of the runs at one depth, at the end: gate opening, norm of the state,
    its relative change; means over seeds, with intervals."""
    rows = []
    for protocol in results.profile.matrix.protocols:
        statistics = Statistics(results, protocol)
        for arm in ("controller", "static", "none"):
            seen = {name: list(statistics.logged(arm, depth, f"steps/{name}").values())
                    for name in ("gate_open", "state_norm", "change")}
            for step in range(max(map(len, seen["change"]), default=0)):
                row = {"protocol": protocol, "arm": arm, "step": step + 1}
                for name, by_seed in seen.items():  # a seed whose drawn depths never reached the step has no value
                    row |= columns(name, t_interval(values[step] for values in by_seed if step < len(values)))
                rows.append(row)
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=["protocol", "arm", "step"])


def gate_table(results: Results, depth: int) -> pd.DataFrame:
    """How far the Controller's gate opens at each recurrence step, over training, at one depth: means over tokens and
    seeds, by protocol, update and step."""
    rows = []
    for protocol in results.profile.matrix.protocols:
        for run in Statistics(results, protocol).runs_of("controller", depth):
            log = run.log[(run.log["split"] == "heldout") & (run.log["metric"] == "steps/gate_open")]
            for row in log.drop_duplicates("update").itertuples():
                rows += [{"protocol": protocol, "update": row.update, "step": step, "gate_open": value}
                         for step, value in enumerate(row.value, 1)]
    columns = ["protocol", "update", "step"]
    frame = pd.DataFrame(rows, columns=[*columns, "gate_open"])
    return frame.groupby(columns, sort=False)["gate_open"].agg(gate_open="mean", n="count").reset_index()


def modulation_table(results: Results, depth: int) -> pd.DataFrame:
    """Of each protocol, arm and projection at one depth: root mean square of m, of its standard deviation over tokens
    and of the mean vector's over steps, and the norm of the update relative to W; means over steps and seeds."""
    rows = []
    for protocol in results.profile.matrix.protocols:
        statistics = Statistics(results, protocol)
        for arm in ("controller", "static"):
            for projection in PROJECTIONS:
                row = {"protocol": protocol, "arm": arm, "projection": projection}
                for name in ("size", "over_inputs", "over_steps", "update"):
                    values = statistics.logged(arm, depth, f"modulation/{name}/{projection}").values()
                    row |= columns(name, t_interval(map(np.mean, values)))
                rows.append(row)
    return pd.DataFrame(rows)


def instead_table(results: Results) -> pd.DataFrame:
    """What one would do instead, beside the loop at each depth, `corrected`: trained parameters, FLOPs of a token
    forward and of a whole run, loss minus the cut model's in nats per token and in percent of the gap."""
    statistics, profile, rows = Statistics(results, "corrected"), results.profile, []
    loops = [(arm, depth) for arm in ("none", "static", "controller") for depth in profile.matrix.depths]
    for arm, depth in [("full", None), *((arm, None) for arm in profile.matrix.instead), *loops]:
        counted, by_seed = cost.Cost.of(profile, arm), statistics.against_cut(arm, depth)[""]
        row = {"arm": arm, "depth": depth, "trained parameters": sum(counted.trainable().values()),
               "forward (MFLOP a token)": counted.forward(depth or 1, profile.training.block) / 1e6,
               "training (TFLOP a run)": _training_flops(profile, arm, depth) / 1e12}
        share = fieller(Ratio({seed: -value for seed, value in by_seed.items()}, statistics.gap()))
        rows.append(row | columns("arm - cut", t_interval(by_seed.values())) | {
            "gap recovery (%)": share.mean, "low (%)": share.low, "high (%)": share.high})
    return pd.DataFrame(rows).astype({"depth": "Int64"})


def _training_flops(profile: Profile, arm: str, depth: int | None) -> float:
    """FLOPs of what a run learns from: its updates, or a closed form's passes through the full model."""
    counted, block = cost.Cost.of(profile, arm), profile.training.block
    tokens = profile.training.updates * profile.training.tokens_per_update
    if ARMS[arm].trained:
        return tokens * counted.training(depth or 1, block)
    return tokens * cost.Cost.of(profile, "full").forward(1, block) if ARMS[arm].fit != "none" else 0.0


def one_run_table(results: Results) -> pd.DataFrame:
    """How sure one run is of itself, `corrected`, base depth, first seed: arm minus cut on the held-out blocks, its
    interval by resampling blocks; beside it the interval over seeds, on those same blocks."""
    statistics, seed, rows = Statistics(results, "corrected"), results.profile.matrix.seeds[0], []
    for arm in ("controller", "static", "none"):
        runs = [run for name in (arm, "cut") for run in statistics.runs_of(name) if run.manifest["seed"] == seed]
        if len(runs) < 2:
            continue
        one, cut = (np.array(last_value(run, "heldout", "block_losses_t+1")) for run in runs)
        within = block_bootstrap(one - cut, np.ones(len(one)), np.random.default_rng(0))
        over = t_interval(statistics.split_against_cut(arm, results.profile.depth)["heldout"].values())
        rows.append({"arm": arm, "seed": seed, "blocks": within.n, "arm - cut": within.mean,
                     "over blocks, low": within.low, "over blocks, high": within.high,
                     "mean over seeds": over.mean, "over seeds, low": over.low, "over seeds, high": over.high,
                     "seeds": over.n})
    return pd.DataFrame(rows)


def search_table(results: Results) -> pd.DataFrame:
    """The learning-rate search: dev loss of every arm (rows) at every rate (columns), and the best rate."""
    rows = []
    for spec in results.profile.search_runs():
        if run := results.runs.get(spec.id):
            finished = run.manifest["status"] == "finished"
            dev = last_value(run, "dev", "loss_t+1") if finished else math.nan
            rows.append({"arm": spec.arm, "rate": spec.rate, "dev": dev})
    if not rows:
        return pd.DataFrame(columns=["arm", "best rate", "at the grid's end"])
    frame = pd.DataFrame(rows)
    table = frame.pivot(index="arm", columns="rate", values="dev").reindex(frame["arm"].drop_duplicates())
    best = table.idxmin(axis=1)
    diverged = frame[frame["dev"].isna()].groupby("arm")["rate"].agg(lambda rates: " ".join(f"{r:g}" for r in rates))
    table.columns = [f"dev loss at {rate:g}" for rate in table.columns]
    ends = frame.groupby("arm")["rate"].agg(["min", "max"]).reindex(table.index)
    return table.assign(**{"best rate": best, "at the grid's end": best.eq(ends["min"]) | best.eq(ends["max"]),
                           "diverged at": diverged.reindex(table.index).fillna("")}).reset_index()


def columns(name: str, found: Interval) -> dict:
    """An interval as fields of a table's row."""
    return {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high, f"{name}_n": found.n}


def curve(run: Run, split: str, metric: str) -> pd.DataFrame:
    """update, tokens and value of one metric over a run.

    The last update is scored twice, last on more blocks: the curve keeps the first, on the blocks of its other points.
    """
    rows = run.log[(run.log["split"] == split) & (run.log["metric"] == metric)].drop_duplicates("update")
    return rows[["update", "tokens", "value"]].astype({"value": float}).reset_index(drop=True)


def curves(results: Results, split: str = "heldout", metric: str = "loss_t+1") -> pd.DataFrame:
    """Mean over seeds of a metric at each evaluation: protocol, arm, depth, update, value, n."""
    parts = []
    cells = _base_cells(results)
    for row in cells[cells["status"] == "finished"].itertuples():
        if ARMS[row.arm].trained:
            part = curve(results.runs[row.run], split, metric)
            parts.append(part.assign(protocol=row.protocol, arm=row.arm, depth=row.depth))
    if not parts:
        return pd.DataFrame(columns=["protocol", "arm", "depth", "update", "value", "n"])
    keys = ["protocol", "arm", "depth", "update"]
    return pd.concat(parts).groupby(keys, sort=False)["value"].agg(value="mean", n="count").reset_index()


def last_slope(run: Run) -> float:
    """Change of the held-out next-token loss over the last fifth of the updates, nats per token.

    Taken on held-out blocks, always the same ones: the training loss, on new blocks at each update, is too noisy.
    """
    losses = curve(run, "heldout", "loss_t+1")
    losses = losses[losses["update"] >= losses["update"].max() * (1 - LAST_SHARE)]
    if len(losses) < 2:
        return math.nan
    slope = np.polyfit(losses["update"], losses["value"], 1)[0]
    return float(slope * (losses["update"].max() - losses["update"].min()))


# ------------------------------------------------------------------------------------------------------------ base

def base_run(profile: Profile, root: Path) -> Run | None:
    """The log of the base's pretraining; None where the base was fetched, not pretrained here."""
    folder = profile.base_folder(root)
    return read_run(folder) if (folder / "manifest.json").exists() else None


def base_table(run: Run | None) -> pd.DataFrame:
    """The base on held-out documents: itself, cut, a trigram model, and the differences; block bootstrap intervals."""
    if run is None:
        return pd.DataFrame(columns=["quantity", "documents", "loss", "loss_low", "loss_high"])
    sizes = last_value(run, "heldout", "document_tokens")
    losses = {name: np.array(last_value(run, "heldout", f"document_losses_{name}"))
              for name in ("full", "cut", "3gram")}
    quantities = {"full base": losses["full"], "cut base": losses["cut"], "trigram": losses["3gram"],
                  "cut - full": losses["cut"] - losses["full"], "trigram - full": losses["3gram"] - losses["full"]}
    rows = []
    for name, sums in quantities.items():
        interval = block_bootstrap(sums, sizes, np.random.default_rng(0))
        rows.append({"quantity": name, "documents": interval.n} | {
            "loss": interval.mean, "loss_low": interval.low, "loss_high": interval.high})
    return pd.DataFrame(rows)
