"""The tables: what was measured with its intervals as frames, one function a table. Never imports torch."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd

from ..experiment import cost
from ..experiment.arms import ARMS, PROJECTIONS
from ..experiment.cost import Cost, Shape
from ..experiment.forecast import update_flops
from ..experiment.learning_rates import dev_loss, planned
from ..experiment.plan import RunSpec
from ..experiment.profile import Profile, load_profile
from ..experiment.protocol import travel
from ..log import Run, Series
from .comparisons import LOOPS, Comparisons, by_protocol, draws_depths
from .ledger import numbers, read_claims
from .reported import PEAK, UPDATES
from .results import Results, per_results
from .statistics import (
    NOTHING,
    BySeed,
    Interval,
    budget_words,
    family,
    holm,
    interval,
    t_interval,
    verdict,
    verdicts,
)

LAST_SHARE = 0.2  # of the updates: where the slope of a training curve is taken
CONVERGED_SLOPE = 0.02  # nats per token over that last fifth: steeper runs are labelled as not converged
BUDGETED = (("controller", "cut"), ("static", "cut"), ("none_nonorm", "cut"), ("lora", "cut"), ("static", "controller"),
            ("none_nonorm", "controller"), ("controller_matched", "controller"), ("lora", "controller"))


def columns(name: str, found: Interval) -> dict:
    """An interval as fields of a table's row."""
    return {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high, f"{name}_n": found.n}


def interval_of(row: Mapping | None, name: str) -> Interval:
    """The interval in a table's row, as `columns` put it there; without p and margin."""
    if row is None:
        return NOTHING
    return Interval(row[name], row[f"{name}_low"], row[f"{name}_high"], int(row[f"{name}_n"]))


def sized(found: Interval) -> str:
    """A mean with its interval, for where the number of seeds stands elsewhere."""
    return str(found).rpartition(" (")[0]


def brief(frame: pd.DataFrame, headings: Mapping[str, str], across: str | None = None) -> pd.DataFrame:
    """Some columns of a table, {column: heading}, to be read: an interval in one cell, arms in words, four digits, and
    no row whose intervals weren't run. Empty where the table lacks a column. `across`: this column's values become
    columns of the one measured."""
    if not set(headings) <= set(frame):
        return pd.DataFrame()
    measured = [column for column in headings if f"{column}_low" in frame]
    if measured:
        frame = frame[frame[[f"{column}_n" for column in measured]].gt(0).any(axis=1)]
    rows = frame.to_dict("records")
    shown = pd.DataFrame({heading: [_cell(row, column) for row in rows] for column, heading in headings.items()})
    if across and len(shown):
        (value,) = measured
        kept = [heading for column, heading in headings.items() if column not in (across, value)]
        shown = shown.pivot_table(values=headings[value], index=kept, columns=headings[across], aggfunc="first",
                                  sort=False).reset_index().rename_axis(columns=None)
    return shown


def _cell(row: Mapping, column: str) -> str:
    value = row[column]
    if f"{column}_low" in row:
        if pd.isna(row[f"{column}_n"]):  # a column that means nothing to this arm
            return ""
        return sized(interval_of(row, column))  # how many seeds is a column of its own
    if column == "arm" and value in ARMS:
        return ARMS[value].label.removeprefix("the ")
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.1f}" if column.startswith("%") else f"{value:.4g}"
    return "" if value is pd.NA else str(value)


# ----------------------------------------------------------------------------------------------------- every arm

@per_results
def arm_table(results: Results) -> pd.DataFrame:
    """Per protocol, arm and depth, at the base rank and the chosen rate: loss, held-out loss, loss reduction, gap
    recovery; whether the run and its step norms converged."""
    profile, cells, rows = results.profile, results.cells, []
    cells = cells[(cells["rank"].fillna(profile.rank) == profile.rank) & (cells["level"] == "")
                  & (cells["updates"] == profile.training.updates)]
    groups = cells.groupby(["protocol", "arm", "depth"], dropna=False, sort=False)
    for (protocol, arm, depth), group in groups:
        depth = None if pd.isna(depth) else int(depth)
        found = Comparisons(results, protocol)
        row = {"protocol": protocol, "arm": arm, "depth": depth, "n": int((group["status"] == "finished").sum()),
               "diverged": int((group["status"] == "diverged").sum()), "depths drawn": draws_depths(arm, protocol)}
        row |= columns("loss", interval(found.loss(arm, depth)))
        row |= columns("heldout", interval(found.loss(arm, depth, column="heldout")))
        if ARMS[arm].fit != "none":
            row |= columns("reduction", interval(found.reduction(arm, depth)))
            row |= columns("recovery", interval(found.recovery(arm, depth)))
        if ARMS[arm].trained:
            slopes = [last_slope(curve(results.runs[name]))
                      for name in group[group["status"] == "finished"]["run"]]
            row["last_slope"] = max(slopes, key=abs, default=math.nan)  # the least settled seed's
            row["converged"] = None if math.isnan(row["last_slope"]) else abs(row["last_slope"]) <= CONVERGED_SLOPE
        if ARMS[arm].step_norm:
            row |= {"norms": found.norms_reached(arm, depth), "norms near the stream's": found.norms_near(arm, depth)}
        rows.append(row)
    return pd.DataFrame(rows).astype({"depth": "Int64"})


def instead_table(results: Results) -> pd.DataFrame:
    """What one would do instead, beside the loop at each depth, `corrected`: trained parameters, FLOPs of a token
    forward and of a whole run, loss minus the cut model's in nats per token and in percent of the gap."""
    found, profile, rows = Comparisons(results, "corrected"), results.profile, []
    loops = [(arm, depth) for arm in LOOPS[::-1] for depth in profile.depths]
    for arm, depth in [("full", None), *((arm, None) for arm in profile.instead), *loops]:
        counted = cost.Cost.of(profile, arm)
        recovered = interval(found.recovery(arm, depth))
        rows.append({
            "arm": arm, "depth": depth, "trained parameters": sum(counted.trainable().values()),
            "forward (MFLOP a token)": counted.forward(depth or 1, profile.training.block) / 1e6,
            "training (TFLOP a run)": update_flops(RunSpec(arm, depth, None, "corrected", 0), profile) / 1e12,
            **columns("arm - cut", interval(found.difference(arm, "cut", depth=depth))),
            "gap recovery (%)": recovered.mean, "low (%)": recovered.low, "high (%)": recovered.high,
            "norms near the stream's": found.norms_near(arm, depth)})
    return pd.DataFrame(rows).astype({"depth": "Int64"})


# --------------------------------------------------------------------------------------------------- differences

def difference_table(results: Results, measure: Callable[..., Mapping[str, BySeed]], *args, gap: str | None = "loss",
                     **kwargs) -> pd.DataFrame:
    """What a method of `Comparisons` gives for some arguments under each protocol: mean, low, high and n in nats per
    token and in percent of the gap between cut and full in column `gap` of the cells (`part`: in the column that a
    part is named by; None: not); p-values after Holm over the parts with a verdict; what that says of the first arm of
    the difference (`statistics.verdict`); and how many of the runs behind all parts of a protocol diverged, so have no
    loss. A protocol without runs has no rows."""
    rows = []
    for found in by_protocol(results):
        parts = measure(found, *args, **kwargs)
        intervals = family(parts)
        if not any(each.n for each in intervals.values()):
            continue
        adjusted = holm({part: each.p for part, each in intervals.items() if each.judged})
        words = verdicts(intervals)
        for part, values in parts.items():
            row = {"protocol": found.protocol, "part": part} | columns("difference", intervals[part])
            row |= {"p (Holm)": adjusted.get(part, math.nan), "the first is": words[part]}
            row |= {"diverged": len(found.diverged)}
            if gap:
                share = interval(found.share(values, part if gap == "part" else gap))
                row |= {"% of gap": share.mean, "% of gap low": share.low, "% of gap high": share.high}
            rows.append(row)
    empty = ["protocol", "part", *columns("difference", NOTHING), "p (Holm)", "the first is", "diverged"]
    return pd.DataFrame(rows, columns=None if rows else empty)


def budgeted(profile: Profile) -> list[tuple[str, int]]:
    """(arm, depth) of what the plan has at other budgets too."""
    entries = [entry for entry in profile.plan if entry.updates and entry.purpose == "matrix"]
    return list(dict.fromkeys((arm, depth) for entry in entries for depth in entry.depths for arm in entry.arms))


def budget_table(results: Results) -> pd.DataFrame:
    """Differences over the budgets of a ladder, `corrected`, at the depth where they are planned: whether each is
    settled (`statistics.settled`) or known up to a number of tokens only."""
    profile, rows = results.profile, []
    arms = set(budgeted(profile))
    for depth, (first, second) in itertools.product(sorted({depth for _, depth in arms}), BUDGETED):
        if not {(first, depth), (second, depth)} <= arms | {("cut", depth)}:
            continue
        parts = {updates * profile.training.tokens_per_update:
                 Comparisons(results, "corrected", updates=updates).difference(first, second, depth=depth)
                 for updates in profile.budgets}
        ladder = family({tokens: part for tokens, part in parts.items() if part})
        for tokens, found in ladder.items():
            rows.append({"difference": f"{first} - {second}", "depth": depth, "tokens": tokens}
                        | columns("nats", found) | {"the first is": verdict(found), "told": budget_words(ladder)})
    return pd.DataFrame(rows, columns=None if rows else ["difference", "depth", "tokens", "told"])


# ---------------------------------------------------------------------------------------------- inside the loop

def steps_table(results: Results, depth: int) -> pd.DataFrame:
    """Of each protocol, arm and recurrence step of the runs at one depth, at the end: gate opening, norm of the state,
    its relative change; means over seeds, with intervals."""
    rows = []
    for found in by_protocol(results):
        for arm in LOOPS:
            seen = {name: list(found.logged(arm, depth, f"steps/{name}").values())
                    for name in ("gate_open", "state_norm", "change")}
            for step in range(max(map(len, seen["change"]), default=0)):
                row = {"protocol": found.protocol, "arm": arm, "step": step + 1}
                for name, by_seed in seen.items():  # a seed whose drawn depths never reached the step has no value
                    row |= columns(name, t_interval(values[step] for values in by_seed if step < len(values)))
                rows.append(row)
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=["protocol", "arm", "step"])


def modulation_table(results: Results, depth: int) -> pd.DataFrame:
    """Of each protocol, arm and projection at one depth: root mean square of m, of its standard deviation over tokens
    and of the mean vector's over steps, and the norm of the update relative to W; means over steps and seeds."""
    rows = []
    for found in by_protocol(results):
        for arm, projection in itertools.product(LOOPS[:2], PROJECTIONS):
            row = {"protocol": found.protocol, "arm": arm, "projection": projection}
            for name in ("size", "over_inputs", "over_steps", "update"):
                values = found.logged(arm, depth, f"modulation/{name}/{projection}").values()
                row |= columns(name, t_interval(map(np.mean, values)))
            rows.append(row)
    return pd.DataFrame(rows)


# ------------------------------------------------------------------------------------------------------ training

def curve(run: Run) -> pd.Series:
    """The held-out next-token loss at each evaluation of a run, by update, always on the same few blocks."""
    updates, values = run.series.get(("heldout", "curve/loss_t+1"), Series([], []))
    return pd.Series(values, updates, dtype=float)


def curves(found: Comparisons, arm: str, depth: int) -> pd.DataFrame:
    """The same of an arm's finished runs at one depth, a column a seed."""
    return pd.DataFrame({run.manifest["seed"]: curve(run) for run in found.runs_of(arm, depth)})


def last_slope(losses: pd.Series) -> float:
    """Change of a held-out loss, by update, over the last fifth of the updates, nats per token; where that has one
    evaluation, the fifth's part of the change since the evaluation before it. NaN where there is one in all.

    Held-out blocks are always the same ones: the training loss, on new blocks at each update, is too noisy.
    """
    losses, fifth = losses.sort_index(), losses.index.max() * LAST_SHARE
    late = losses[losses.index >= losses.index.max() - fifth]
    if len(late) < 2:
        late = losses[-2:]
    if len(late) < 2:
        return math.nan
    slope, over = np.polyfit(late.index, late, 1)[0], late.index.max() - late.index.min()
    return float(slope * min(over, fifth))


def search_table(results: Results) -> pd.DataFrame:
    """The learning-rate searches: dev loss of every arm, depth and budget searched (rows) at every matrix rate, then,
    at the best of these, with the elementwise rate every factor above it (columns); the best of both; a run's updates;
    how many of the search's runs are missing.
    """
    profile, searches, missing = results.profile, {}, Counter()
    for spec in planned(profile, results.runs):
        place = spec.arm, spec.depth, spec.updates
        if spec.purpose == "rate" and spec.id in results.runs:
            searches.setdefault(place, {})[spec] = dev_loss(results.runs[spec.id])
        missing[place] += spec.purpose == "rate" and spec.id not in results.runs
    rows = []
    for (arm, depth, updates), losses in searches.items():
        rates = {spec.rate: dev for spec, dev in losses.items() if spec.rate}
        factors = {spec.factor: dev for spec, dev in losses.items() if spec.factor}
        best = min(rates, key=rates.get)
        factor = min([each for each, dev in factors.items() if dev < rates[best]], key=factors.get, default=1)
        rows.append({"arm": arm, "depth": depth, "updates": profile.at(next(iter(losses))).training.updates}
                    | {f"dev loss at {rate:g}": rates[rate] for rate in sorted(rates)}
                    | {f"elementwise x{factor:g}": factors[factor] for factor in sorted(factors)}
                    | {"best rate": best, "best factor": factor,
                       "at the grid's end": best in (min(rates), max(rates)) or factor == max(factors, default=0),
                       "missing": missing[arm, depth, updates],
                       "diverged at": " ".join(f"{rate:g}" for rate in sorted(rates) if math.isinf(rates[rate]))})
    first = ["arm", "depth", "updates"]
    last = ["best rate", "best factor", "at the grid's end", "missing", "diverged at"]
    frame = pd.DataFrame(rows, columns=None if rows else [*first, *last])
    measured = sorted(set(frame) - {*first, *last}, key=lambda name: (name[0], float(name.split()[-1].strip("x"))))
    return frame[[*first, *measured, *last]].replace(math.inf, math.nan).astype({"depth": "Int64"})


def searched_difference(results: Results, arm: str, other: str) -> dict[tuple[int, int], pd.Series]:
    """One arm's dev loss minus another's at each rate and factor that both were searched at, by depth and updates."""
    searches = search_table(results).set_index("arm").groupby(["depth", "updates"])
    return {at: rows.filter(regex="^(dev|elem)").T.eval(f"{arm} - {other}").dropna() for at, rows in searches
            if {arm, other} <= set(rows.index)}


# ------------------------------------------------------------------------------------------------------- the scale

def scale_table(results: Results) -> pd.DataFrame:
    """What a smaller scale doesn't keep, paper beside profile: the cut's damage, text, budget, rates, travel."""
    own, paper = results.profile, load_profile("paper")
    theirs, found = numbers(read_claims()), Comparisons(results, "corrected")
    gap, runs = interval(found.difference("cut", "full", column="heldout")), found.runs_of("controller")[:1]
    rate = runs[0].manifest["rate"] if runs else math.nan
    elementwise = runs[0].manifest["elementwise_rate"] if runs else math.nan
    stream = runs[0].last("model", "stream_rms")[0] if runs else math.nan
    their_travel = travel(PEAK, UPDATES, "stretched")

    def text(profile: Profile) -> str:
        return f"{profile.corpus.kind} of {', '.join(profile.corpus.packages)}"

    rows = [("cut - full (nats)", f"{theirs['L17'] - theirs['L36']:.3f} (reported)", gap),
            ("vocabulary", paper.base.model["vocab_size"], own.base.model["vocab_size"]),
            ("layers held", *(f"{Cost.of(profile, 'cut').layers} of {Shape.of(profile).layers}"
                              for profile in (paper, own))),
            ("text", text(paper), text(own)),
            ("updates", UPDATES, own.training.updates),
            ("tokens an update", paper.training.tokens_per_update, own.training.tokens_per_update),
            ("tokens", UPDATES * paper.training.tokens_per_update,
             own.training.updates * own.training.tokens_per_update),
            ("rate of matrices", PEAK, rate),
            ("rate of norms and tables", PEAK, elementwise),
            ("travel of a matrix entry", their_travel, travel(rate, own.training.updates, "cosine")),
            ("travel of a norm weight", their_travel, travel(elementwise, own.training.updates, "cosine")),
            ("stream that the first norm reads (RMS)", "not reported", stream)]
    return pd.DataFrame([{"quantity": name, "paper": _short(one), own.name: _short(other)}
                         for name, one, other in rows])


def _short(value) -> str:
    if isinstance(value, float):
        return "not run" if math.isnan(value) else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
