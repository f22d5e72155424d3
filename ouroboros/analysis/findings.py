"""The audit in words: at most three sentences a switch, and the last table. Never imports torch.

Every sentence is generated from a table of `audit` and says no more than its intervals do; the words are of the
released code and of this scale, not of the paper.
"""

import math

import pandas as pd

from ..experiment.protocol import COLUMNS, SWITCHES
from . import claims
from .arithmetic import BLOCK, MICRO_STEPS, PEAK, UPDATES
from .audit import (
    HEADLINES,
    depth_table,
    effect_on,
    leak_table,
    moved_table,
    over_depths,
    place,
    rate_table,
    reach_table,
    reference_table,
    switch_table,
    target_effect,
    target_table,
)
from .claims import AGAINST_CONTROLLER, AGAINST_CUT, AGAINST_STATIC
from .intervals import LEVEL, NOTHING, Interval, holm
from .metrics import Results

DEEPER = ("is lower at the deeper one", "is higher at the deeper one", "shows no detectable difference")
SHRINKS = ("shrinks with depth", "grows with depth", "shows no detectable change with depth")
DEPENDS = ("rises, so it depends on text to come", "falls, so it depends on text to come", "shows no detectable change")
ADDS = ("adds to it", "takes from it", "has no detectable effect on it")
RAISES = ("raises", "lowers", "has no detectable effect on")


def _of(row: dict | None, column: str) -> Interval:
    """The interval in a table's row."""
    if row is None:
        return NOTHING
    return Interval(row[column], row[f"{column}_low"], row[f"{column}_high"], int(row[f"{column}_n"]))


def _row(table: pd.DataFrame, **fields) -> dict | None:
    """The last row (the deepest) with these fields; None where nothing was run."""
    for name, value in fields.items():
        table = table[table[name] == value] if len(table) else table
    return table.iloc[-1].to_dict() if len(table) else None


def _told(found: Interval, words: tuple[str, str, str]) -> str:
    if found.n > 1 and found.low == found.high == 0:
        return f"doesn't change (0 in each of {found.n} seeds)"
    return f"{found.told(*words)} ({found})"


def target(results: Results) -> list[str]:
    """What the target explains: the size of the losses, and that held-out text did not improve."""
    table, reported = target_table(results), claims.reported(claims.load())
    full, cut = (_row(table, arm=arm) for arm in ("full", "cut"))
    lines = []
    if full and cut:
        lines.append(f"The same weights, not trained here: on the next token the full model has "
                     f"{full['scored on t+1']:.3f} and the cut one {cut['scored on t+1']:.3f}, on the token after it "
                     f"{full['scored on t+2']:.3f} and {cut['scored on t+2']:.3f} (reported of another model and other "
                     f"text: {reported['L36']} and {reported['L17']}).")
    two, one = (_row(table, arm="controller", protocol=protocol) for protocol in ("released", "released+target"))
    own, next_ = "t+2, arm - cut", "t+1, arm - cut"
    lines.append(f"Trained on t+2 (`released`), the Controller on held-out text {_told(_of(two, own), AGAINST_CUT)} on "
                 f"t+2 and {_told(_of(two, next_), AGAINST_CUT)} on the next token; trained on the next token, all "
                 f"else as released, it {_told(_of(one, next_), AGAINST_CUT)} there.")
    effects = [f"{_told(target_effect(results, column), RAISES)} with all else `{column}`" for column in COLUMNS]
    lines.append(f"Training on t+2 rather than on the next token changes Controller - cut on the next token: it "
                 f"{' and '.join(effects)}.")
    return lines


def pooling(results: Results) -> list[str]:
    """How much of the lead over static is a look ahead."""
    table, lead, half = leak_table(results), "static - Controller", "second half replaced"
    effects = [f"{_told(effect_on(results, column, 'pooling', lead), ADDS)} with all else `{column}`"
               for column in COLUMNS]
    lines = [f"What the sequence pool does to the Controller's lead ({lead}), against the causal one: it "
             f"{' and '.join(effects)}."]
    other = _row(table, protocol="corrected+pooling")
    lines.append(f"With the sequence pool, all else `corrected`, an arm like it that reads another text "
                 f"{_told(_of(other, 'Controller reading another sequence - Controller'), AGAINST_CONTROLLER)}.")
    pooled = [_row(table, protocol=name) for name in ("released", "released+depth", "corrected+pooling")]
    told = [f"{_told(_of(row, half), DEPENDS)} under `{row['protocol']}`"
            for row in pooled if row and row[f"{half}_n"]]  # older logs don't have it
    told.append(f"with the causal pool it {_told(_of(_row(table, protocol='corrected'), half), DEPENDS)}")
    lines.append("A block's second half replaced, the next-token loss on its first half, whose own tokens stay in the "
                 f"pool, {'; '.join(told)}.")
    return lines


def depth(results: Results) -> list[str]:
    """Whether the released rule for the depth makes the reported pattern."""
    table, change = depth_table(results), over_depths(results)
    if table.empty:
        return []

    def told(protocol: str, arm: str, words: tuple[str, str, str]) -> str:
        return _told(_of(_row(table, protocol=protocol, arm=arm), change), words)

    lead = "static - Controller"
    return [f"{change}: under `released` the Controller's depths are one run, so that its loss doesn't depend on depth "
            f"is by construction, and `static` {told('released', 'static', DEEPER)}; one rule for both, all else as "
            f"released, the Controller {told('released+depth', 'controller', DEEPER)}.",
            f"The Controller's lead ({lead}) {told('released', lead, SHRINKS)} under `released`; one rule for both, "
            f"all else as released, it {told('released+depth', lead, SHRINKS)}.",
            f"It {told('corrected', lead, SHRINKS)} under `corrected`; with the released rule alone it "
            f"{told('corrected+depth', lead, SHRINKS)}."]


def reference(results: Results) -> list[str]:
    """What the full model is read on, and what becomes of gap recovery."""
    table, gap = reference_table(results), "gap recovery (%)"
    short, same = (_row(table, protocol=protocol) for protocol in ("released", "released+reference"))
    if not short or not same:
        return []
    lines = [f"`released`: the full model has {_of(short, 'full')} on short texts and the next token, "
             f"{_of(same, 'full')} on the text and the target of the other arms; on the blocks that both are read on "
             f"cut - full is {_of(same, 'cut - full, common blocks')}."]
    for column in COLUMNS:
        own, flipped = (_row(table, column=column, reference=setting) for setting in ("short", "same"))
        if own and flipped:
            lines.append(f"Gap recovery in percent, all else `{column}`: with the short texts {_of(own, gap)}, with "
                         f"the others' text and target {_of(flipped, gap)}.")
    return lines


def precision(results: Results) -> list[str]:
    """Which trained tensors move at all."""
    table, lines = moved_table(results), []
    for kept in SWITCHES["precision"]:
        parts = []
        for protocol, part in table[table["precision"] == kept].groupby("protocol", sort=False):
            told = part[part["moved"].notna()]
            still = [f"`{row.tensor}` of `{row.arm}`" for row in told[told["moved"] == 0].itertuples()]
            others = told[told["moved"] > 0]["moved"]
            moved = [f"no element moved of {', '.join(still)}"] * bool(still) + (
                [f"at least {others.min():.1%} of each of {len(others)}{' other' * bool(still)} tensors moved"] *
                bool(len(others)))
            parts.append(f"under `{protocol}` (rate {part['rate'].iloc[0]:g}) {' and '.join(moved)}")
        lines += [f"Kept in {kept}: {'; '.join(parts)}."] * bool(parts)
    return lines


def rate(results: Results) -> list[str]:
    """One shared rate against each arm's own, and how far a table of vectors gets."""
    table, reach, lines = rate_table(results), reach_table(results), []
    for column in COLUMNS:
        parts = []
        for _, rows in table[table["column"] == column].groupby("rates", sort=False) if len(table) else ():
            rows = rows[rows["static - Controller_n"] > 0]
            if len(rows):
                pair = rows[["rate of controller", "rate of static"]].iloc[0].unique()
                where = "; ".join(f"depth {row['depth']} {_told(_of(row, 'static - Controller'), AGAINST_STATIC)}"
                                  for row in rows.to_dict("records"))
                parts.append(f"{rows['rates'].iloc[0]} rate ({' and '.join(pair)}"
                             f"{' for both arms' * (len(pair) == 1)}): {where}")
        if parts:
            lines.append(f"All else `{column}` (static - Controller), {'; '.join(parts)}.")
    arms = {protocol: [_row(reach, protocol=protocol, arm=arm) for arm in ("static", "controller")]
            for protocol in COLUMNS}
    told = [f"`{protocol}` {static['largest m']:.3g}, where one that moves by the whole rate at every update is at "
            f"about {static['reach of a table']:.3g} (the Controller's {controller['largest m']:.3g})"
            for protocol, (static, controller) in arms.items()
            if static and controller and static["largest m_n"] and controller["largest m_n"]]
    if told:
        lines.append(f"The table's largest entry: {'; '.join(told)}; the whole mean residual is added at "
                     f"{reach['adds the residual'].iloc[0]:.3g}.")
    return lines


def diverged(results: Results) -> str:
    """Which runs of the audit have no loss."""
    names = sorted(name for name, run in results.runs.items()
                   if "+" in name and run.manifest["status"] == "diverged")
    return f"Runs with a switch flipped that diverged, so that no table has their loss: {', '.join(names) or 'none'}."


FINDINGS = {"target": target, "depth": depth, "pooling": pooling, "precision": precision, "rate": rate,
            "reference": reference}

UNKNOWN = {  # what no run here can settle
    "target": "whether the reported losses were on t+2: another model, other text",
    "depth": "the Controller of the paper's table at fixed depths",
    "pooling": f"the leak at {BLOCK:,} tokens a block, where a mean over all positions tells less of the next one",
    "schedule": f"what a decaying rate is worth over {UPDATES:,} updates",
    "precision": f"bfloat16 arithmetic, {UPDATES:,} updates, the rate {PEAK:g}: here only what is kept is rounded",
    "alpha": "static's losses at the paper's other ranks: none is reported",
    "packing": "packing at evaluation: the stream's text is joined in both settings here",
    "evaluation": f"how much of {MICRO_STEPS:,} micro-steps' first tokens is remembered",
    "rate": "each arm's best rate at the paper's scale, and here at other depths than the search's",
    "reference": "L36 on FineWeb-edu",
    "all": "interactions of two or more switches",
}


def _directions(rows: pd.DataFrame) -> str:
    """Where some effects on one quantity are, and which way they go."""
    return ", ".join(f"{'higher' if up else 'lower'} ({_else(column)}{', '.join(map(place, part.itertuples()))})"
                     for (column, up), part in rows.groupby(["column", rows["effect"] > 0], sort=False))


def _else(column: str) -> str:
    """What all else is; of all ten switches together there is nothing else."""
    return f"all else `{column}`: " if column else ""


def _judged(part: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    """Which of a switch's effects are told with Holm's correction over them (one run that stands at several depths is
    one effect, and one that is 0 in every seed is none), and which by their own interval only."""
    same = list(zip(part["column"], part["quantity"], part["effect"], strict=True))
    moving = ~((part["effect_low"] == 0) & (part["effect_high"] == 0))
    adjusted = holm({effect: p for effect, p, moves in zip(same, part["effect_p"], moving, strict=True) if moves})
    told = pd.Series([adjusted.get(effect, 1.0) < 1 - LEVEL for effect in same], index=part.index, dtype=bool)
    return told, ((part["effect_low"] > 0) | (part["effect_high"] < 0)) & ~told


def _moved(part: pd.DataFrame) -> str:
    """What a switch's released setting is told to move, and which protocols leave a number undefined."""
    if part["effect_n"].max() < 2:
        return "one seed: nothing can be told"
    undefined, (told, alone) = part[part["value"].isna()], _judged(part)

    def named(rows: pd.DataFrame) -> str:
        return "; ".join(f"{quantity} {_directions(found)}" for quantity, found in rows.groupby("quantity", sort=False))

    found = [named(part[told]) or "No headline number is told to move"]
    if alone.any():
        found.append(f"By its own interval only: {named(part[alone])}")
    if len(undefined):
        names = " and ".join(f"`{name}`" for name in undefined["protocol"].unique())
        found.append(f"Gap recovery undefined under {names}")
    return ". ".join(found)


def _effects(part: pd.DataFrame) -> str:
    """A switch's effects on one quantity, by column and place; once where all places have one run."""
    found: dict[str, dict[str, str]] = {}
    for row in part.itertuples():
        bounds = "" if math.isnan(row.effect_low) else f" [{row.effect_low:+.3g}, {row.effect_high:+.3g}]"
        text = "undefined" if math.isnan(row.effect) else \
            "unchanged" if row.effect_low == row.effect_high == 0 else f"{row.effect:+.3g}{bounds}"
        found.setdefault(row.column, {})[place(row)] = text
    return "; ".join(f"{_else(column)}{', '.join(f'{where} {text}' for where, text in texts.items())}"
                     if len(set(texts.values())) > 1 or len(texts) == 1 else
                     f"{_else(column)}everywhere {next(iter(texts.values()))}" for column, texts in found.items())


def _headlines(results: Results) -> pd.DataFrame:
    """The effects on headline numbers; of all ten switches there is no column that all else is of."""
    table = switch_table(results)
    table = table[table["quantity"].isin(HEADLINES)]
    return table.assign(column=table["column"].mask(table["switch"] == "all", ""))


def last_table(results: Results) -> pd.DataFrame:
    """One row a switch: what its released setting is told to move, against the corrected one; the runs behind that, the
    effect on each headline number in both columns, and what isn't known. Nothing is in it that wasn't run."""
    table, rows = _headlines(results), []
    for switch in (*SWITCHES, "all"):
        part = table[table["switch"] == switch]
        seeds = sorted({int(n) for n in part["effect_n"]} - {0})
        if not seeds:
            continue
        evidence = f"seeds: {' to '.join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))}; table `switches`" + (
            f", figure `audit_{switch}`" if switch in FINDINGS else "")
        part = part[(part["effect_n"] > 0) | (part["quantity"] == "gap recovery (%)")]  # which may be undefined
        rows.append({"switch": switch, "finding": _moved(part), "evidence": evidence}
                    | {f"effect on {name}": _effects(part[part["quantity"] == name]) for name in HEADLINES}
                    | {"what we don't know": UNKNOWN[switch]})
    return pd.DataFrame(rows, columns=["switch", "finding", "evidence", *(f"effect on {q}" for q in HEADLINES),
                                       "what we don't know"])
