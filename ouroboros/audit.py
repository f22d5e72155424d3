"""Which effects come from the method, which from the protocol: tables and sentences of the audit. Never imports torch.

A protocol is ten switches (README's table). Here each is flipped alone, in both columns, and what moves is told; all
ten together are the other column. Losses are nats per token, intervals 95 % Student t over seeds, paired.
"""

import math
from collections.abc import Iterator

import pandas as pd

from . import arithmetic, intervals, tables
from .experiment import ARMS, COLUMNS, SWITCHES, switches
from .intervals import BySeed, Ratio, interval, t_interval
from .metrics import Results, Statistics, last_value
from .runlog import STEP_TABLES, USED_STEPS_ALONE

HEADLINES = ("loss reduction (%)", "gap recovery (%)", "static - Controller")
LOOPS = ("controller", "static", "none")


def flipped(results: Results) -> Iterator[tuple[str, str, str]]:
    """(column, switch, protocol) of every protocol of the audit: the column itself, each switch, all of them."""
    audit = results.profile.matrix.audit
    for column in COLUMNS:
        yield column, "", column
        for switch in SWITCHES:
            if audit and switch in audit.switches and switch != "alpha":  # that one says nothing at the base rank
                yield column, switch, f"{column}+{switch}"
        yield column, "all", next(other for other in COLUMNS if other != column)


def quantities(statistics: Statistics, depth: int) -> dict[str, BySeed | Ratio]:
    """The headline numbers that a protocol reports at one depth, and the losses behind them."""
    losses = {arm: statistics.loss(arm, depth)[""] for arm in ("full", "cut", *LOOPS)}
    return losses | {"static - Controller": statistics.advantage(depth)[""],
                     "loss reduction (%)": statistics.reduction("controller", depth)[""],
                     "gap recovery (%)": statistics.recovery("controller", depth)[""]}


def _effect(with_: BySeed | Ratio, without: BySeed | Ratio) -> intervals.Interval:
    """What flipping does to a quantity, paired by seed; of a ratio, in each seed's own, where both are defined."""
    if any(isinstance(part, Ratio) and math.isnan(interval(part).mean) for part in (with_, without)):
        return intervals.NOTHING

    def values(part) -> BySeed:
        if not isinstance(part, Ratio):
            return part
        return {seed: 100 * top / part.denominator[seed] for seed, top in part.numerator.items()
                if part.denominator.get(seed)}

    a, b = values(with_), values(without)
    return t_interval(a[seed] - b[seed] for seed in a if seed in b)


def switch_table(results: Results) -> pd.DataFrame:
    """Every quantity under every protocol of the audit, and what flipping the switch did to it: one row a column,
    switch, depth and quantity. Nothing is in it that wasn't run."""
    audit, rows = results.profile.matrix.audit, []
    for depth in audit.depths if audit else ():
        plain = {column: quantities(Statistics(results, column), depth) for column in COLUMNS}
        for column, switch, protocol in flipped(results):
            for name, part in quantities(Statistics(results, protocol), depth).items():
                found = interval(part)
                row = {"column": column, "switch": switch or "none", "protocol": protocol, "depth": depth,
                       "quantity": name, **tables.columns("value", found)}
                effect = _effect(part, plain[column][name]) if switch else intervals.NOTHING
                rows.append(row | {"effect": effect.mean, "effect_low": effect.low, "effect_high": effect.high})
    columns = ["column", "switch", "protocol", "depth", "quantity", "value", "value_low", "value_high", "value_n",
               "effect", "effect_low", "effect_high"]
    table = pd.DataFrame(rows, columns=columns)
    return table[table["value_n"] > 0].reset_index(drop=True)


def scored(statistics: Statistics, arm: str, depth: int, target: str) -> BySeed:
    """An arm's loss on held-out text on one target, whatever the protocol reports."""
    return statistics.logged(arm, depth, f"loss_{target}")


def target_table(results: Results) -> pd.DataFrame:
    """Held-out text scored on the next token and on the one after it, by what a model was trained to predict."""
    rows, depth = [], _deepest(results)
    protocols = [protocol for _, switch, protocol in flipped(results) if switch in ("", "target")]
    for protocol in dict.fromkeys(protocols):
        statistics = Statistics(results, protocol)
        for arm in ("full", "cut", *LOOPS):
            runs = statistics.runs_of(arm, depth)
            if runs and not (ARMS[arm].fit == "none" and protocol != COLUMNS[1]):  # those two are the same in all
                trained = switches(protocol)["target"] if ARMS[arm].trained else "not trained here"
                row = {"arm": arm, "protocol": protocol, "trained on": trained}
                for target in ("t+1", "t+2"):
                    own, cut = (scored(statistics, name, depth, target) for name in (arm, "cut"))
                    row |= tables.columns(f"scored on {target}", t_interval(own.values()))
                    row |= tables.columns(f"{target}, arm - cut", t_interval(own[s] - cut[s] for s in own if s in cut))
                rows.append(row)
    return pd.DataFrame(rows)


def leak_table(results: Results) -> pd.DataFrame:
    """What the first half of a block loses when its second half is replaced, by what the Controller pools; 0 where it
    doesn't look ahead. Beside it the Controller's lead over static, and that of one reading another sequence."""
    rows = []
    for column, switch, protocol in flipped(results):
        if switch in ("", "pooling"):
            statistics = Statistics(results, protocol)
            for depth in _depths(results):
                own, replaced = (statistics.logged("controller", depth, f"loss_t+1/first_half{suffix}")
                              for suffix in ("", "/other_future"))
                leak = t_interval(replaced[seed] - own[seed] for seed in own if seed in replaced)
                other = statistics.behind("controller_other", "static", depth)
                informed = statistics.behind("controller", "controller_other", depth)
                rows.append({"column": column, "protocol": protocol, "pooling": switches(protocol)["pooling"],
                             "depth": depth, **tables.columns("lost without its own future", leak),
                             **tables.columns("static - Controller", t_interval(
                                 statistics.advantage(depth)[""].values())),
                             **tables.columns("static - Controller reading another sequence", interval(other)),
                             **tables.columns("Controller reading another sequence - Controller", interval(informed))})
    return pd.DataFrame(rows)


def moved_table(results: Results) -> pd.DataFrame:
    """The share of each trained tensor's elements that training changed at all, by the precision they are kept in.

    Of one run, the first of the newest format. Older formats count the rows of unused steps too: of their tensors with
    a row a step only those are told that moved whole or not at all.
    """
    rows, depth = [], _deepest(results)
    for _, switch, protocol in flipped(results):
        if switch in ("", "precision"):
            for arm in LOOPS[:2]:
                runs = Statistics(results, protocol).runs_of(arm, depth)
                for run in sorted(runs, key=lambda run: -run.manifest["format"])[:1]:
                    log = run.log[run.log["metric"].str.startswith("moved/")]
                    found = [{"protocol": protocol, "precision": switches(protocol)["precision"], "arm": arm,
                              "tensor": row.metric.removeprefix("moved/recurrence."), "moved": float(row.value)}
                             for row in log.itertuples()]
                    rows += [row for row in found if run.manifest["format"] >= USED_STEPS_ALONE
                             or row["tensor"] not in STEP_TABLES or row["moved"] in (0, 1)]
    table = pd.DataFrame(rows, columns=["protocol", "precision", "arm", "tensor", "moved"])
    return table.pivot_table(index=["arm", "tensor"], columns="protocol", values="moved", sort=False).reset_index()


def reach_table(results: Results) -> pd.DataFrame:
    """The largest |m| met on held-out text, mean over seeds, beside what an entry of a table reaches that moves by the
    whole rate at every update, and the m that would add the whole mean residual."""
    rows = []
    for _, switch, protocol in flipped(results):
        if switch in ("", "rate", "precision"):
            setting = switches(protocol)
            for arm in LOOPS[:2]:
                for depth in _depths(results):
                    runs = Statistics(results, protocol).runs_of(arm, depth)
                    largest = [last_value(run, "model", "max_modulation", math.nan) for run in runs]
                    rates = sorted({run.manifest["rate"] for run in runs})
                    most = [arithmetic.reach(rate, results.profile.training.updates, setting["precision"] == "bfloat16")
                            for rate in rates[-1:] if arm == "static"]
                    rows.append({"protocol": protocol, "precision": setting["precision"], "arm": arm, "depth": depth,
                                 "rate": " ".join(f"{rate:g}" for rate in rates),
                                 **tables.columns("largest m", t_interval(largest)),
                                 "a table can reach": float(most[0][-1]) if most else math.nan,
                                 "adds the residual": 2.0})  # r / alpha, alpha half of r (AUDIT `alpha`)
    return pd.DataFrame(rows)


def depth_table(results: Results) -> pd.DataFrame:
    """Controller and static from the shallowest depth of the audit to the deepest, under each rule for the depth."""
    audit, rows = results.profile.matrix.audit, []
    for column, switch, protocol in flipped(results):
        if audit and switch in ("", "depth"):
            statistics = Statistics(results, protocol)
            first, last = audit.depths[0], audit.depths[-1]
            for arm in LOOPS[:2]:
                by_seed = statistics.change_over_depths(arm, first, last)
                rows.append({"column": column, "protocol": protocol, "depth rule": switches(protocol)["depth"],
                             "arm": arm, **tables.columns(f"depth {first} - depth {last}", interval(by_seed))})
    return pd.DataFrame(rows)


def rate_table(results: Results) -> pd.DataFrame:
    """Controller against static at one shared rate and at each arm's own best: one row a column, rate and depth."""
    audit, rows = results.profile.matrix.audit, []
    for column, switch, protocol in flipped(results):
        if audit and switch in ("", "rate"):
            statistics = Statistics(results, protocol)
            for depth in sorted({*audit.depths, *audit.rate_depths}):
                rates = {arm: {run.manifest["rate"] for run in statistics.runs_of(arm, depth)} for arm in LOOPS[:2]}
                told = {f"rate of {arm}": " ".join(f"{rate:g}" for rate in sorted(found))
                        for arm, found in rates.items()}
                rows.append({"column": column, "protocol": protocol, "rates": switches(protocol)["rate"],
                             "depth": depth, **told,
                             **tables.columns("static - Controller", interval(statistics.advantage(depth)[""]))})
    return pd.DataFrame(rows)


def reference_table(results: Results) -> pd.DataFrame:
    """The full model on the release's 12 short texts and on the blocks and target of the other arms, and the gap
    recovery that each gives, at the audit's deepest depth."""
    rows, depth = [], _deepest(results)
    for column, switch, protocol in flipped(results):
        if switch in ("", "reference"):
            statistics = Statistics(results, protocol)
            row = {"column": column, "protocol": protocol, "reference": switches(protocol)["reference"]}
            for arm in ("full", "cut", "controller"):
                row |= tables.columns(arm, interval(statistics.loss(arm, depth)[""]))
            recovered = interval(statistics.recovery("controller", depth)[""])
            rows.append(row | tables.columns("gap recovery (%)", recovered))
    return pd.DataFrame(rows)


def alpha_table(results: Results) -> pd.DataFrame:
    """Controller and static at the other ranks with alpha scaled with the rank, and with one alpha for all."""
    rows, profile = [], results.profile
    for rank in profile.matrix.ranks:
        for arm in LOOPS[:2]:
            scaled, fixed = (Statistics(results, protocol).at_rank(arm, rank)
                             for protocol in ("corrected", "corrected+alpha"))
            effect = t_interval(fixed[seed] - scaled[seed] for seed in fixed if seed in scaled)
            rows.append({"rank": rank, "arm": arm, **tables.columns("scaled", t_interval(scaled.values())),
                         **tables.columns("fixed", t_interval(fixed.values())),
                         **tables.columns("fixed - scaled", effect)})
    return pd.DataFrame(rows)


def _depths(results: Results) -> tuple[int, ...]:
    audit = results.profile.matrix.audit
    return audit.depths if audit else ()


def _deepest(results: Results) -> int:
    return max(_depths(results), default=results.profile.depth)
