"""Which effects come from the method, which from the protocol: the tables of the audit. Never imports torch.

A protocol is ten switches (README's table). Here each is flipped alone, in both columns, and what moves is shown; all
ten together are the other column. Losses are nats per token, intervals 95 % Student t over seeds, paired.
"""

import math
from collections.abc import Iterator
from functools import partial

import pandas as pd

from ..experiment.arms import ARMS
from ..experiment.protocol import COLUMNS, schedule, switches
from ..log import Run
from .comparisons import LOOPS, Comparisons
from .reported import ADDS_RESIDUAL, reach
from .results import Results, per_results
from .statistics import NOTHING, BySeed, Interval, Ratio, interval, minus, t_interval
from .tables import columns

HEADLINES = ("loss reduction (%)", "gap recovery (%)", "static - Controller")


def flipped(results: Results) -> Iterator[tuple[str, str, str]]:
    """(column, switch, protocol) of each protocol of the audit: the column itself, each switch, once all of them."""
    for column in COLUMNS:
        yield column, "", column
        for switch in results.profile.flipped:
            yield column, switch, f"{column}+{switch}"
    yield "corrected", "all", "released"


def _under(results: Results, *names: str) -> Iterator[tuple[dict[str, str], dict[str, str], Comparisons]]:
    """Both columns, alone and with one of some switches flipped: the fields of a table's row that say which it is, the
    protocol's settings, its runs."""
    for column, switch, protocol in flipped(results):
        if switch in ("", *names):
            yield {"column": column, "protocol": protocol}, switches(protocol), Comparisons(results, protocol)


def places(results: Results, switch: str) -> list[tuple[int, int]]:
    """(depth, rank) where a switch is flipped: the audit's depths; `alpha`, whose settings are one at the base rank, at
    the other ranks."""
    profile = results.profile
    if switch == "alpha":
        return [(profile.depth, rank) for rank in profile.ranks]
    return [(depth, profile.rank) for depth in profile.audit_depths]


def deepest(results: Results) -> int:
    return max(results.profile.audit_depths, default=results.profile.depth)


# ------------------------------------------------------------------------------------- every switch, every quantity

def quantities(found: Comparisons, depth: int, rank: int, only: tuple[str, ...] = ()) -> dict[str, BySeed | Ratio]:
    """The headline numbers that a protocol reports at one depth and rank, the losses behind them and what these differ
    by; or `only` some of them, so that no run of another is read."""
    def loss(arm: str) -> BySeed:
        return found.loss(arm, depth, rank if ARMS[arm].modulated else None)

    pairs = (("static", "Controller"), ("none", "Controller"), ("Controller", "cut"), ("cut", "full"))
    measured = {arm: partial(loss, arm) for arm in ("full", "cut", *LOOPS)}
    measured |= {f"{a} - {b}": lambda a=a, b=b: minus(loss(a.lower()), loss(b.lower())) for a, b in pairs}
    measured |= {"loss reduction (%)": lambda: found.reduction("controller", depth, rank),
                 "gap recovery (%)": lambda: found.recovery("controller", depth, rank)}
    return {name: measure() for name, measure in measured.items() if not only or name in only}


def effect(column: str, own: BySeed | Ratio, flipped_: BySeed | Ratio) -> Interval:
    """What a switch's released setting does to a quantity, against its corrected one: its value in a column and with
    the switch flipped, paired by seed; of a ratio, in each seed's own, where both are defined."""
    if any(isinstance(part, Ratio) and math.isnan(interval(part).mean) for part in (own, flipped_)):
        return NOTHING

    def values(part: BySeed | Ratio) -> BySeed:
        if not isinstance(part, Ratio):
            return part
        return BySeed({seed: 100 * top / part.denominator[seed] for seed, top in part.numerator.items()
                       if part.denominator.get(seed)})

    released, corrected = (own, flipped_) if column == "released" else (flipped_, own)
    difference = minus(values(released), values(corrected))
    found = interval(difference)
    if difference.trained or found.high > found.low:
        return found
    return Interval(found.mean, math.nan, math.nan, found.n)  # two readings of one model: nothing varies


@per_results
def switch_table(results: Results, headlines: bool = False) -> pd.DataFrame:
    """Every quantity (or the headline numbers, at the last of the places) under every protocol of the audit, and the
    effect on it of the switch's released setting: one row a column (what all else is), switch, depth, rank and
    quantity. It contains completed runs only."""
    rows, kept = [], {}

    def read(*place) -> dict[str, BySeed | Ratio]:
        """Read once: every switch is set against its column."""
        if place not in kept:
            kept[place] = quantities(Comparisons(results, place[0]), *place[1:], HEADLINES if headlines else ())
        return kept[place]

    for column, switch, protocol in flipped(results):
        for depth, rank in places(results, switch)[-1 if headlines else 0:]:
            before = read(column, depth, rank)
            for name, part in read(protocol, depth, rank).items():
                moved = effect(column, before[name], part) if switch else NOTHING
                rows.append({"column": column, "switch": switch or "none", "protocol": protocol, "depth": depth,
                             "rank": rank, "quantity": name, **columns("value", interval(part)),
                             **columns("effect", moved), "effect_p": moved.p})
    table = pd.DataFrame(rows, columns=["column", "switch", "protocol", "depth", "rank", "quantity",
                                        *columns("value", NOTHING), *columns("effect", NOTHING), "effect_p"])
    return table[table["value_n"] > 0].reset_index(drop=True)


def place(row: pd.Series) -> str:
    """Where a row of `switch_table` is, in the words of tables and figures."""
    return f"rank {row.rank}" if row.switch == "alpha" else f"depth {row.depth}"


# -------------------------------------------------------------------------------------------------- switch by switch

def target_table(results: Results) -> pd.DataFrame:
    """Held-out text scored on the next token and on the one after it, by what a model was trained to predict."""
    rows, depth = [], deepest(results)
    for where, setting, found in _under(results, "target"):
        for arm in ("full", "cut", *LOOPS, "affine"):
            runs = found.runs_of(arm, depth)
            if runs and not (ARMS[arm].fit == "none" and where["protocol"] != COLUMNS[1]):  # these are the same in all
                trained = setting["target"] if ARMS[arm].trained else "not trained here"
                row = {"arm": arm, "protocol": where["protocol"], "trained on": trained}
                for target in ("t+1", "t+2"):
                    own, cut = (found.scored(name, depth, target) for name in (arm, "cut"))
                    row |= columns(f"scored on {target}", interval(own))
                    row |= columns(f"{target}, arm - cut", interval(minus(own, cut)))
                rows.append(row)
    return pd.DataFrame(rows)


def leak_table(results: Results) -> pd.DataFrame:
    """What the next-token loss on a block's first half rises by when its second half is replaced, by what the
    Controller pools; 0 where it doesn't look ahead. A part of the leak: tokens of the first half stay in the pool.

    Beside it the Controller's lead over static, and that of one trained to read another sequence, always at the given
    depth: not set against a Controller whose depths are drawn. Also where the rule for the depth is flipped: the pool
    stays, and the depth is one that both have."""
    rows = []
    for where, setting, found in _under(results, "pooling", "depth"):
        for depth in results.profile.audit_depths:
            own, replaced = (found.logged("controller", depth, f"loss_t+1/first_half{suffix}")
                             for suffix in ("", "/other_future"))
            informed = found.difference("controller_other", "controller", depth=depth)
            parts = {"second half replaced": minus(replaced, own),
                     "static - Controller": found.difference("static", "controller", depth=depth),
                     "static - Controller reading another sequence":
                         found.difference("static", "controller_other", depth=depth),
                     "Controller reading another sequence - Controller":
                         informed if setting["depth"] == "given" else BySeed()}
            rows.append(where | {"pooling": setting["pooling"], "depth": depth} | {
                field: value for name, part in parts.items() for field, value in columns(name, interval(part)).items()})
    return pd.DataFrame(rows)


def moved_table(results: Results) -> pd.DataFrame:
    """The share of each trained tensor's elements that training changed at all, by the precision they are kept in; of
    one run."""
    rows = []
    for where, setting, found in _under(results, "precision"):
        for arm in LOOPS[:2]:
            rows += [{"protocol": where["protocol"], "precision": setting["precision"], "rate": run.manifest["rate"],
                      "arm": arm, "tensor": metric.removeprefix("moved/recurrence."), "moved": float(moved.values[-1])}
                     for run in found.runs_of(arm, deepest(results))[:1]
                     for (_, metric), moved in run.series.items() if metric.startswith("moved/")]
    return pd.DataFrame(rows, columns=["protocol", "precision", "rate", "arm", "tensor", "moved"])


def reach_table(results: Results) -> pd.DataFrame:
    """At each depth of the audit: the largest |m| met on held-out text, mean over seeds, beside where an entry
    of a table would be that moves by the whole logged rate at every update, and the m that would add the whole mean
    residual."""
    rows = []
    for where, setting, found in _under(results, "rate", "precision"):
        for arm in LOOPS[:2]:
            for depth in results.profile.audit_depths:
                runs = found.runs_of(arm, depth)
                largest = [run.last("model", "max_modulation", math.nan) for run in runs]
                reached = math.nan
                if runs and arm == "static":  # its rates are the same in every seed
                    reached = float(reach(_rates(runs[0]), setting["precision"] == "bfloat16")[-1])
                rows.append({"protocol": where["protocol"], "precision": setting["precision"], "arm": arm,
                             "depth": depth, "rate": _shown_rates(runs), **columns("largest m", t_interval(largest)),
                             "reach of a table": reached, "adds the residual": ADDS_RESIDUAL})
    return pd.DataFrame(rows)


def _rates(run: Run) -> list[float]:
    """The learning rate of a table at each of a run's updates."""
    made = run.series["train", "loss"].updates
    updates, kind = run.manifest["config"]["training"]["updates"], run.manifest["switches"]["schedule"]
    peak = run.manifest["elementwise_rate"]
    return [peak * schedule(update - 1, updates, kind) for update in made]


def _shown_rates(runs: list[Run]) -> str:
    return " ".join(f"{rate:g}" for rate in sorted({run.manifest["rate"] for run in runs}))


def depth_table(results: Results) -> pd.DataFrame:
    """Controller, static and the Controller's lead, from the shallowest depth of the audit to the deepest, under each
    rule for the depth."""
    depths, rows = results.profile.audit_depths, []
    for where, setting, found in _under(results, "depth") if len(depths) > 1 else ():
        at = {arm: [found.loss(arm, depth) for depth in (depths[0], depths[-1])] for arm in LOOPS[:2]}
        at["static - Controller"] = [minus(*pair) for pair in zip(at["static"], at["controller"], strict=True)]
        change = f"depth {depths[0]} - depth {depths[-1]}"
        rows += [where | {"depth rule": setting["depth"], "arm": arm, **columns(change, interval(minus(*ends)))}
                 for arm, ends in at.items()]
    return pd.DataFrame(rows)


def rate_table(results: Results) -> pd.DataFrame:
    """Controller against static at one shared rate and at each arm's own best: one row a column, rate and depth."""
    rows = []
    for where, setting, found in _under(results, "rate"):
        for depth in results.profile.flipped_depths("rate"):
            rows.append(where | {"rates": setting["rate"], "depth": depth}
                        | {f"rate of {arm}": _shown_rates(found.runs_of(arm, depth)) for arm in LOOPS[:2]}
                        | columns("static - Controller",
                                  interval(found.difference("static", "controller", depth=depth))))
    return pd.DataFrame(rows)


def reference_table(results: Results) -> pd.DataFrame:
    """The full model on the release's 12 short texts and on the text and target of the other arms, and the gap recovery
    that each gives, at the audit's deepest depth; cut - full on the blocks that both are read on."""
    rows, depth = [], deepest(results)
    for where, setting, found in _under(results, "reference"):
        row = where | {"reference": setting["reference"]}
        for arm in ("full", "cut", "controller"):
            row |= columns(arm, interval(found.loss(arm, depth)))
        row |= columns("cut - full, common blocks", interval(found.gap_on_common_blocks()))
        rows.append(row | columns("gap recovery (%)", interval(found.recovery("controller", depth))))
    return pd.DataFrame(rows)
