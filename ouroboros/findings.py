"""The audit in words: at most three sentences a switch, and the last table. Never imports torch.

Every sentence is generated from a table of `audit` and says no more than its intervals do; the words are of the
released code and of this scale, not of the paper.
"""

import math

import pandas as pd

from . import claims
from .arithmetic import BLOCK, MICRO_STEPS, UPDATES
from .audit import (
    HEADLINES,
    LOOPS,
    depth_table,
    leak_table,
    moved_table,
    over_depths,
    place,
    rate_table,
    reach_table,
    reference_table,
    switch_table,
    target_table,
)
from .claims import AGAINST_CONTROLLER, AGAINST_CUT, AGAINST_STATIC
from .experiment import COLUMNS, SWITCHES
from .intervals import LEVEL, NOTHING, Interval, holm
from .metrics import Results

STEPS_HELP = ("is lower at the deeper one", "is higher at the deeper one", "can't be told to differ")
LEAKS = ("rises, so it looks ahead", "falls", "can't be told to move")
BARELY = 0.5  # of a tensor's elements: fewer than these moved


def _of(row: dict, column: str) -> Interval:
    """The interval in a table's row."""
    return Interval(row[column], row[f"{column}_low"], row[f"{column}_high"], int(row[f"{column}_n"]))


def _row(table: pd.DataFrame, **fields) -> dict | None:
    """The last row (the deepest) with these fields; None where nothing was run."""
    for name, value in fields.items():
        table = table[table[name] == value] if len(table) else table
    return table.iloc[-1].to_dict() if len(table) else None


def _told(row: dict | None, column: str, words: tuple[str, str, str]) -> str:
    found = NOTHING if row is None else _of(row, column)
    return f"{found.told(*words)} ({found})"


def target(results: Results) -> list[str]:
    """What the target explains: the size of the losses, and that held-out text did not improve."""
    table, reported = target_table(results), claims.reported(claims.load())
    full, cut = (_row(table, arm=arm) for arm in ("full", "cut"))
    lines = []
    if full and cut:
        lines.append(f"The same weights, not trained here: on the next token the full model has "
                     f"{full['scored on t+1']:.3f} and the cut one {cut['scored on t+1']:.3f}, on the token after it "
                     f"{full['scored on t+2']:.3f} and {cut['scored on t+2']:.3f} (reported of another model "
                     f"and other text: {reported['L36']} and {reported['L17']}).")
    two, one = (_row(table, arm="controller", protocol=protocol) for protocol in ("released", "released+target"))
    lines.append(f"Trained on t+2 (`released`), the Controller on held-out text "
                 f"{_told(two, 't+2, arm - cut', AGAINST_CUT)} on t+2 and {_told(two, 't+1, arm - cut', AGAINST_CUT)} "
                 f"on the next token; trained on the next token, all else as released, it "
                 f"{_told(one, 't+1, arm - cut', AGAINST_CUT)} there.")
    if two and one:
        trained, other = _of(one, "t+1, arm - cut"), _of(two, "t+1, arm - cut")
        lines.append("So the target " + (
            "alone decides whether held-out text improves." if trained.high < 0 < other.low else
            "alone doesn't explain that held-out text is no better: with the next token as the target it isn't either."
            if trained.low > 0 and other.low > 0 else "isn't told to decide whether held-out text improves."))
    return lines


def pooling(results: Results) -> list[str]:
    """How much of the lead over static is a look ahead."""
    table = leak_table(results)
    sequence, causal = (_row(table, protocol=protocol) for protocol in ("corrected+pooling", "corrected"))
    released, flipped = (_row(table, protocol=protocol) for protocol in ("released", "released+pooling"))
    leak, lead = "lost without its own future", "static - Controller"
    measured = [row for row in (released, _row(table, protocol="released+depth")) if row and row[f"{leak}_n"]]
    source = (measured or [released or {"protocol": "released"}])[0]  # older logs don't have it
    return [
        f"Its second half replaced, the loss on a block's first half with the sequence pool "
        f"{_told(measured[0] if measured else None, leak, LEAKS)} under `{source['protocol']}` and "
        f"{_told(sequence, leak, LEAKS)} with all else `corrected`; with the causal pool it "
        f"{_told(causal, leak, LEAKS)}.",
        f"static - Controller, `corrected`: with the causal pool {_told(causal, lead, AGAINST_STATIC)}, with the "
        f"sequence pool {_told(sequence, lead, AGAINST_STATIC)}; `released`: with the sequence pool "
        f"{_told(released, lead, AGAINST_STATIC)}, with the causal one {_told(flipped, lead, AGAINST_STATIC)}.",
        f"With the sequence pool over another text, the Controller "
        f"{_told(sequence, 'Controller reading another sequence - Controller', AGAINST_CONTROLLER)}."]


def depth(results: Results) -> list[str]:
    """Whether the released rule for the depth makes the reported pattern."""
    table, change = depth_table(results), over_depths(results)
    if table.empty:
        return []

    def arms(protocol: str) -> str:
        return " and ".join(f"`{arm}` {_told(_row(table, protocol=protocol, arm=arm), change, STEPS_HELP)}"
                            for arm in LOOPS[:2])

    return [f"`released` ({change}): the Controller's depths are one run, so that its loss doesn't depend on depth is "
            f"by construction; `static` "
            f"{_told(_row(table, protocol='released', arm='static'), change, STEPS_HELP)}.",
            f"One rule for both, all else as released: {arms('released+depth')}.",
            f"`corrected`: {arms('corrected')}."]


def reference(results: Results) -> list[str]:
    """What the full model is read on, and what becomes of gap recovery."""
    table = reference_table(results)
    short, same = (_row(table, protocol=protocol) for protocol in ("released", "released+reference"))
    if not short or not same:
        return []
    lines = [f"`released`: the full model has {_of(short, 'full')} on short texts and the next token, "
             f"{_of(same, 'full')} on the blocks and the target of the other arms, where the cut one has "
             f"{_of(same, 'cut')}."]
    for column in COLUMNS:
        own, flipped = (_row(table, column=column, reference=setting) for setting in ("short", "same"))
        if own and flipped:
            lines.append(f"Gap recovery, all else `{column}`: with the short texts {_of(own, 'gap recovery (%)')} %, "
                         f"on the same blocks {_of(flipped, 'gap recovery (%)')} %.")
    return lines


def precision(results: Results) -> list[str]:
    """Which trained tensors move at all."""
    table, lines = moved_table(results), []
    for protocol in ("released", "corrected+precision", "corrected"):
        if protocol in table:
            still = table[table[protocol] < BARELY]
            names = [f"`{row['tensor']}` of `{row['arm']}` ({row[protocol]:.0%})" for row in still.to_dict("records")]
            lines.append(f"`{protocol}`: " + (f"fewer than half of the elements moved of {', '.join(names)}."
                                              if names else "of every trained tensor at least half of the elements "
                                              "moved."))
    return lines


def rate(results: Results) -> list[str]:
    """One shared rate against each arm's own, and how far a table of vectors gets."""
    table, reach, lines = rate_table(results), reach_table(results), []
    for column in COLUMNS:
        parts = [f"{row['rates']} rates, depth {row['depth']}: {_told(row, 'static - Controller', AGAINST_STATIC)}"
                 for row in table[table["column"] == column].to_dict("records")] if len(table) else []
        if parts:
            lines.append(f"All else `{column}` (static - Controller): " + "; ".join(parts) + ".")
    rows = [_row(reach, protocol=protocol, arm="static") for protocol in COLUMNS]
    told = [f"`{row['protocol']}` {row['largest m']:.3g} of at most {row['a table can reach']:.3g}"
            for row in rows if row and row["largest m_n"]]
    if told:
        lines.append("The table's largest entry: " + ", ".join(told) + "; the whole mean residual is added at "
                     f"{rows[0]['adds the residual']:.3g}.")
    return lines


FINDINGS = {"target": target, "depth": depth, "pooling": pooling, "precision": precision, "rate": rate,
            "reference": reference}

UNKNOWN = {  # what no run here can settle
    "target": "whether the reported losses were on t+2: another model, other text",
    "depth": "the Controller of the paper's table at fixed depths",
    "pooling": f"the leak at {BLOCK:,} tokens a block, where a mean over all positions tells less of the next one",
    "schedule": f"what a decaying rate is worth over {UPDATES:,} updates",
    "precision": f"bfloat16 arithmetic, and {UPDATES:,} updates: here only what is kept is rounded",
    "alpha": "static's losses at the paper's other ranks: none is reported",
    "packing": "packing at evaluation: the stream's text is joined in both settings here",
    "evaluation": f"how much of {MICRO_STEPS:,} micro-steps' first tokens is remembered",
    "rate": "each arm's best rate at the paper's scale",
    "reference": "L36 on FineWeb-edu",
    "all": "interactions of two or more switches",
}


def _directions(rows: pd.DataFrame) -> str:
    """Where some effects on one quantity are, and which way they go."""
    return ", ".join(f"{'higher' if up else 'lower'} in `{column}` ({', '.join(map(place, part.itertuples()))})"
                     for (column, up), part in rows.groupby(["column", rows["effect"] > 0], sort=False))


def _moved(part: pd.DataFrame) -> str:
    """What a switch is told to move, with Holm's correction over its effects on headline numbers; what only the
    effect's own interval tells; what it leaves undefined."""
    if part["effect_n"].max() < 2:
        return "one seed: nothing can be told"
    undefined = part[part["value"].isna()]
    told = part.index.map(holm(part["effect_p"].to_dict())) < 1 - LEVEL
    alone = ((part["effect_low"] > 0) | (part["effect_high"] < 0)) & ~told

    def named(rows: pd.DataFrame) -> str:
        return "; ".join(f"{quantity} {_directions(found)}" for quantity, found in rows.groupby("quantity", sort=False))

    return ". ".join([named(part[told]) or "No headline number is told to move",
                      *([f"By its own interval only: {named(part[alone])}"] if alone.any() else []),
                      *(f"Undefined: {quantity} in {' and '.join(f'`{column}`' for column in found['column'].unique())}"
                        for quantity, found in undefined.groupby("quantity", sort=False))])


def _effects(part: pd.DataFrame) -> str:
    """A switch's effects on one quantity, by column and place; once where all places have one run."""
    found: dict[str, dict[str, str]] = {}
    for row in part.itertuples():
        bounds = "" if math.isnan(row.effect_low) else f" [{row.effect_low:+.3g}, {row.effect_high:+.3g}]"
        text = "undefined" if math.isnan(row.effect) else \
            "unchanged" if row.effect_low == row.effect_high == 0 else f"{row.effect:+.3g}{bounds}"
        found.setdefault(row.column, {})[place(row)] = text
    return "; ".join(f"{column}, {where}: {text}" for column, texts in found.items() for where, text in (
        {"everywhere": next(iter(texts.values()))} if len(texts) > 1 == len(set(texts.values())) else texts).items())


def last_table(results: Results) -> pd.DataFrame:
    """One row a switch: what it is told to move, the runs behind that, its effect on each headline number in both
    columns, and what isn't known. Nothing is in it that wasn't run."""
    table, rows = switch_table(results), []
    table = table[table["quantity"].isin(HEADLINES)]
    for switch in (*SWITCHES, "all"):
        part = table[table["switch"] == switch]
        seeds = sorted({*part["effect_n"]} - {0})
        if not seeds:
            continue
        evidence = f"seeds: {' to '.join(str(int(n)) for n in {seeds[0], seeds[-1]})}; table `switches`" + (
            f", figure `audit_{switch}`" if switch in FINDINGS else "")
        part = part[(part["effect_n"] > 0) | part["value"].isna()]
        rows.append({"switch": switch, "finding": _moved(part), "evidence": evidence}
                    | {f"effect on {name}": _effects(part[part["quantity"] == name]) for name in HEADLINES}
                    | {"what we don't know": UNKNOWN[switch]})
    return pd.DataFrame(rows, columns=["switch", "finding", "evidence", *(f"effect on {q}" for q in HEADLINES),
                                       "what we don't know"])
