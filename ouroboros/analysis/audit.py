"""Which effects come from the method, which from the protocol: tables and sentences of the audit. Never imports torch.

A protocol is ten switches (README's table). Here each is flipped alone, in both columns, and what moves is told; all
ten together are the other column. Losses are nats per token, intervals 95 % Student t over seeds, paired.
"""

import math
from collections.abc import Iterator
from functools import partial

import pandas as pd

from ..experiment.arms import ARMS
from ..experiment.protocol import COLUMNS, schedule, switches
from ..log import STEP_TABLES, Run
from . import arithmetic, intervals, tables
from .comparison import interval
from .intervals import BySeed, Ratio, minus, t_interval
from .metrics import Results, Statistics, per_results

HEADLINES = ("loss reduction (%)", "gap recovery (%)", "static - Controller")
LOOPS = ("controller", "static", "none")


def flipped(results: Results) -> Iterator[tuple[str, str, str]]:
    """(column, switch, protocol) of each protocol of the audit: the column itself, each switch, once all of them."""
    for column in COLUMNS:
        yield column, "", column
        for switch in results.profile.flipped:
            yield column, switch, f"{column}+{switch}"
    yield "corrected", "all", "released"


def places(results: Results, switch: str) -> list[tuple[int, int]]:
    """(depth, rank) where a switch is told: the audit's depths; `alpha`, whose settings are one at the base rank, at
    the other ranks."""
    profile = results.profile
    if switch == "alpha":
        return [(profile.depth, rank) for rank in profile.ranks]
    return [(depth, profile.rank) for depth in _depths(results)]


def quantities(statistics: Statistics, depth: int, rank: int, only: str = "") -> dict[str, BySeed | Ratio]:
    """The headline numbers that a protocol reports at one depth and rank, the losses behind them and what these differ
    by; or `only` one of them, so that no run of another is read."""
    def loss(arm: str) -> BySeed:
        return statistics.loss(arm, depth, rank if ARMS[arm].modulated else None)[""]

    def difference(a: str, b: str) -> BySeed:
        return minus(loss(a.lower()), loss(b.lower()))

    pairs = (("static", "Controller"), ("none", "Controller"), ("Controller", "cut"), ("cut", "full"))
    measured = {arm: partial(loss, arm) for arm in ("full", "cut", *LOOPS)}
    measured |= {f"{a} - {b}": partial(difference, a, b) for a, b in pairs}
    measured |= {"loss reduction (%)": lambda: statistics.reduction("controller", depth, rank)[""],
                 "gap recovery (%)": lambda: statistics.recovery("controller", depth, rank)[""]}
    return {name: measure() for name, measure in measured.items() if only in ("", name)}


def effect(column: str, own: BySeed | Ratio, flipped_: BySeed | Ratio) -> intervals.Interval:
    """What a switch's released setting does to a quantity, against its corrected one: its value in a column and with
    the switch flipped, paired by seed; of a ratio, in each seed's own, where both are defined."""
    if any(isinstance(part, Ratio) and math.isnan(interval(part).mean) for part in (own, flipped_)):
        return intervals.NOTHING

    def values(part) -> BySeed:
        if not isinstance(part, Ratio):
            return part
        return {seed: 100 * top / part.denominator[seed] for seed, top in part.numerator.items()
                if part.denominator.get(seed)}

    released, corrected = (own, flipped_) if column == "released" else (flipped_, own)
    return interval(minus(values(released), values(corrected)))


def effect_on(results: Results, column: str, switch: str, quantity: str) -> intervals.Interval:
    """The `effect` of one switch on one quantity at the audit's deepest depth and the base rank."""
    place = _deepest(results), results.profile.rank
    return effect(column, *(quantities(Statistics(results, protocol), *place, quantity)[quantity]
                            for protocol in (column, f"{column}+{switch}")))


@per_results
def switch_table(results: Results, quantity: str = "") -> pd.DataFrame:
    """Every quantity (or one) under every protocol of the audit, and the effect on it of the switch's released setting:
    one row a column (what all else is), switch, depth, rank and quantity. It contains completed runs only."""
    rows, found = [], {}

    def told(protocol: str, depth: int, rank: int) -> dict[str, BySeed | Ratio]:
        """Read once: every switch is set against its column."""
        if (protocol, depth, rank) not in found:
            found[protocol, depth, rank] = quantities(Statistics(results, protocol), depth, rank, quantity)
        return found[protocol, depth, rank]

    for column, switch, protocol in flipped(results):
        for depth, rank in places(results, switch):
            before = told(column, depth, rank)
            for name, part in told(protocol, depth, rank).items():
                moved = effect(column, before[name], part) if switch else intervals.NOTHING
                rows.append({"column": column, "switch": switch or "none", "protocol": protocol, "depth": depth,
                             "rank": rank, "quantity": name, **tables.columns("value", interval(part)),
                             **tables.columns("effect", moved), "effect_p": moved.p})
    table = pd.DataFrame(rows, columns=["column", "switch", "protocol", "depth", "rank", "quantity",
                                        *tables.columns("value", intervals.NOTHING),
                                        *tables.columns("effect", intervals.NOTHING), "effect_p"])
    return table[table["value_n"] > 0].reset_index(drop=True)


def place(row: pd.Series) -> str:
    """Where a row of `switch_table` is, in the words of tables and figures."""
    return f"rank {row.rank}" if row.switch == "alpha" else f"depth {row.depth}"


def scored(statistics: Statistics, arm: str, depth: int, target: str) -> BySeed:
    """An arm's loss on held-out text on one target, whatever the protocol reports."""
    return statistics.logged(arm, depth, f"loss_{target}")


def target_table(results: Results, arms: tuple[str, ...] = ("full", "cut", *LOOPS, "affine")) -> pd.DataFrame:
    """Held-out text scored on the next token and on the one after it, by what a model was trained to predict."""
    rows, depth = [], _deepest(results)
    protocols = [protocol for _, switch, protocol in flipped(results) if switch in ("", "target")]
    for protocol in dict.fromkeys(protocols):
        statistics = Statistics(results, protocol)
        for arm in arms:
            runs = statistics.runs_of(arm, depth)
            if runs and not (ARMS[arm].fit == "none" and protocol != COLUMNS[1]):  # those two are the same in all
                trained = switches(protocol)["target"] if ARMS[arm].trained else "not trained here"
                row = {"arm": arm, "protocol": protocol, "trained on": trained}
                for target in ("t+1", "t+2"):
                    own, cut = (scored(statistics, name, depth, target) for name in (arm, "cut"))
                    row |= tables.columns(f"scored on {target}", interval(own))
                    row |= tables.columns(f"{target}, arm - cut", interval(minus(own, cut)))
                rows.append(row)
    return pd.DataFrame(rows)


def target_effect(results: Results, column: str) -> intervals.Interval:
    """What training on t+2 rather than on the next token does to Controller - cut on the next token."""
    depth, differences = _deepest(results), []
    for protocol in (column, f"{column}+target"):
        statistics = Statistics(results, protocol)
        differences.append(minus(*(scored(statistics, arm, depth, "t+1") for arm in ("controller", "cut"))))
    return effect(column, *differences)


def leak_table(results: Results, other: bool = True) -> pd.DataFrame:
    """What the next-token loss on a block's first half rises by when its second half is replaced, by what the
    Controller pools; 0 where it doesn't look ahead. A part of the leak: tokens of the first half stay in the pool.

    Beside it the Controller's lead over static, and (unless `other` is false) that of one trained to read another
    sequence, always at the given depth: not set against a Controller whose depths are drawn. Also where the rule for
    the depth is flipped: the pool stays, and the depth is one that both have."""
    rows = []
    for column, switch, protocol in flipped(results):
        if switch in ("", "pooling", "depth"):
            statistics, setting = Statistics(results, protocol), switches(protocol)
            for depth in _depths(results):
                own, replaced = (statistics.logged("controller", depth, f"loss_t+1/first_half{suffix}")
                                 for suffix in ("", "/other_future"))
                row = {"column": column, "protocol": protocol, "pooling": setting["pooling"], "depth": depth,
                       **tables.columns("second half replaced", interval(minus(replaced, own))),
                       **tables.columns("static - Controller", interval(statistics.advantage(depth)[""]))}
                if other:
                    lead = statistics.behind("controller_other", "static", depth)
                    informed = statistics.behind("controller", "controller_other", depth) \
                        if setting["depth"] == "given" else {}
                    row |= tables.columns("static - Controller reading another sequence", interval(lead))
                    row |= tables.columns("Controller reading another sequence - Controller", interval(informed))
                rows.append(row)
    return pd.DataFrame(rows)


def _moved(run: Run) -> Iterator[tuple[str, float]]:
    """(trained tensor, the share of its elements that training changed), as one run logged it. Older formats count the
    rows of unused steps too: of their tensors with a row a step only those are told that moved whole or not at all."""
    for (_, metric), found in run.series.items():
        if metric.startswith("moved/"):
            tensor, moved = metric.removeprefix("moved/recurrence."), found.values[-1]
            told = _first_format(run) >= 4 or tensor not in STEP_TABLES or moved in (0, 1)
            yield tensor, float(moved) if told else math.nan


def _first_format(run: Run) -> int:
    """The format that a run's log was first written in: before 4, `moved/` counts rows of steps that never ran too."""
    return run.manifest.get("converted", run.manifest)["format"]


def moved_table(results: Results) -> pd.DataFrame:
    """The share of each trained tensor's elements that training changed at all, by the precision they are kept in; of
    one run, the first of the newest format."""
    rows, depth = [], _deepest(results)
    for _, switch, protocol in flipped(results):
        if switch in ("", "precision"):
            for arm in LOOPS[:2]:
                runs = Statistics(results, protocol).runs_of(arm, depth)
                for run in sorted(runs, key=lambda run: -_first_format(run))[:1]:
                    rows += [{"protocol": protocol, "precision": switches(protocol)["precision"],
                              "rate": run.manifest["rate"], "arm": arm, "tensor": tensor, "moved": moved}
                             for tensor, moved in _moved(run)]
    return pd.DataFrame(rows, columns=["protocol", "precision", "rate", "arm", "tensor", "moved"])


def reach_table(results: Results, depths: tuple[int, ...] | None = None) -> pd.DataFrame:
    """At each depth of the audit, or some: the largest |m| met on held-out text, mean over seeds, beside where an entry
    of a table would be that moves by the whole logged rate at every update, and the m that would add the whole mean
    residual."""
    rows = []
    for _, switch, protocol in flipped(results):
        if switch in ("", "rate", "precision"):
            setting = switches(protocol)
            for arm in LOOPS[:2]:
                for depth in _depths(results) if depths is None else depths:
                    runs = Statistics(results, protocol).runs_of(arm, depth)
                    largest = [run.last("model", "max_modulation", math.nan) for run in runs]
                    rates = [_rates(run) for run in runs if arm == "static"]  # the same in every seed
                    reached = arithmetic.reach(rates[0], setting["precision"] == "bfloat16")[-1] if rates else math.nan
                    rows.append({"protocol": protocol, "precision": setting["precision"], "arm": arm, "depth": depth,
                                 "rate": " ".join(sorted({f"{run.manifest['rate']:g}" for run in runs})),
                                 **tables.columns("largest m", t_interval(largest)),
                                 "reach of a table": float(reached),
                                 "adds the residual": 2.0})  # r / alpha, alpha half of r (protocol.md `alpha`)
    return pd.DataFrame(rows)


def _rates(run: Run) -> list[float]:
    """The learning rate of each of a run's updates."""
    made = run.series["train", "loss"].updates
    updates, kind = run.manifest["config"]["training"]["updates"], run.manifest["switches"]["schedule"]
    return [run.manifest["rate"] * schedule(update - 1, updates, kind) for update in made]


def over_depths(results: Results) -> str:
    """The column of `depth_table`: the audit's depths, the shallowest minus the deepest."""
    depths = _depths(results)
    return f"depth {depths[0]} - depth {depths[-1]}" if depths else ""


def depth_table(results: Results) -> pd.DataFrame:
    """Controller, static and the Controller's lead, from the shallowest depth of the audit to the deepest, under each
    rule for the depth."""
    depths, rows = _depths(results), []
    for column, switch, protocol in flipped(results):
        if depths and switch in ("", "depth"):
            statistics = Statistics(results, protocol)
            ends = depths[0], depths[-1]
            changes = {arm: statistics.change_over_depths(arm, *ends) for arm in LOOPS[:2]}
            changes["static - Controller"] = minus(*(statistics.advantage(depth)[""] for depth in ends))
            rows += [{"column": column, "protocol": protocol, "depth rule": switches(protocol)["depth"], "arm": arm,
                      **tables.columns(over_depths(results), interval(change))} for arm, change in changes.items()]
    return pd.DataFrame(rows)


def rate_table(results: Results) -> pd.DataFrame:
    """Controller against static at one shared rate and at each arm's own best: one row a column, rate and depth."""
    depths, rows = results.profile.flipped_depths("rate"), []
    for column, switch, protocol in flipped(results):
        if switch in ("", "rate"):
            statistics = Statistics(results, protocol)
            for depth in depths:
                rates = {arm: {run.manifest["rate"] for run in statistics.runs_of(arm, depth)} for arm in LOOPS[:2]}
                told = {f"rate of {arm}": " ".join(f"{rate:g}" for rate in sorted(found))
                        for arm, found in rates.items()}
                rows.append({"column": column, "protocol": protocol, "rates": switches(protocol)["rate"],
                             "depth": depth, **told,
                             **tables.columns("static - Controller", interval(statistics.advantage(depth)[""]))})
    return pd.DataFrame(rows)


def reference_table(results: Results) -> pd.DataFrame:
    """The full model on the release's 12 short texts and on the text and target of the other arms, and the gap recovery
    that each gives, at the audit's deepest depth; cut - full on the blocks that both are read on."""
    rows, depth = [], _deepest(results)
    for column, switch, protocol in flipped(results):
        if switch in ("", "reference"):
            statistics = Statistics(results, protocol)
            row = {"column": column, "protocol": protocol, "reference": switches(protocol)["reference"]}
            for arm in ("full", "cut", "controller"):
                row |= tables.columns(arm, interval(statistics.loss(arm, depth)[""]))
            row |= tables.columns("cut - full, common blocks", interval(statistics.gap_on_common_blocks()))
            recovered = interval(statistics.recovery("controller", depth)[""])
            rows.append(row | tables.columns("gap recovery (%)", recovered))
    return pd.DataFrame(rows)


def _depths(results: Results) -> tuple[int, ...]:
    return results.profile.audit_depths


def _deepest(results: Results) -> int:
    return max(_depths(results), default=results.profile.depth)
