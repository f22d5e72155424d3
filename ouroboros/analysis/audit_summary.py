"""The answer of notebook 11, the audit, and its two summaries. Never imports torch."""

import pandas as pd

from ..experiment.protocol import COLUMNS, SWITCHES
from . import audit
from .reported import BLOCK, MICRO_STEPS, PEAK, UPDATES
from .results import Results
from .statistics import ALPHA, FEWEST, holm
from .tables import interval_of
from .text import NOT_RUN, TOO_FEW, missing_of

EFFECTS = tuple(f"{quantity}, all else {column}" for quantity in audit.HEADLINES[:0:-1] for column in COLUMNS)
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


def answer(results: Results) -> list[str]:
    """Which switches move a headline number at the deepest depth, and by how much: a line a number."""
    table, lines = audit.switch_table(results), []
    flipped = table[table["quantity"].isin(audit.HEADLINES) & table["effect_n"].gt(0)]
    table = flipped[flipped["effect_n"] >= FEWEST]
    for quantity in audit.HEADLINES[::-1]:
        ways: dict[str, list[str]] = {}
        for switch in (*SWITCHES, "all"):
            part = table[table["switch"] == switch]
            last = part[_detectable(part) & part["quantity"].eq(quantity) & part["depth"].eq(part["depth"].max())]
            for row in last.drop_duplicates("column", keep="last").itertuples():
                beside = "" if switch == "all" else f", all else {row.column}"
                ways.setdefault("raised" if row.effect > 0 else "lowered", []).append(
                    f"{'all ten' if switch == 'all' else switch} ({row.effect:+.2g}{beside})")
        if ways:
            moved = "; ".join(f"{way} by the released setting of {', '.join(names)}" for way, names in ways.items())
            lines.append(f"`{quantity}`: {moved}.")
    if lines or len(table):
        return lines or ["No switch has a detectable effect on a headline number."]
    return [f"The switches between `corrected` and `released`, one by one: {TOO_FEW if len(flipped) else NOT_RUN}."]


def planned(results: Results) -> str:
    """How many runs with a switch flipped are planned and not run; nothing where all are there."""
    return missing_of(results, {cell.run.id for cell in results.profile.cells() if "+" in cell.run.protocol})


def last_table(results: Results) -> pd.DataFrame:
    """One row a switch: what its released setting moves, against the corrected one, and what isn't known. Contains
    completed runs only."""
    rows, table = [], audit.switch_table(results)
    table = table[table["quantity"].isin(audit.HEADLINES)]
    # of all ten switches together there is nothing else that a column would be of
    table = table.assign(column=("all else `" + table["column"] + "`: ").mask(table["switch"] == "all", ""))
    for switch in (*SWITCHES, "all"):
        part = table[table["switch"] == switch]
        if part["effect_n"].gt(0).any():
            part = part[(part["effect_n"] > 0) | (part["quantity"] == "gap recovery (%)")]  # which may be undefined
            rows.append({"switch": switch, "finding": _finding(part), "what we don't know": UNKNOWN[switch]})
    return pd.DataFrame(rows, columns=["switch", "finding", "what we don't know"])


def effects_table(results: Results) -> pd.DataFrame:
    """A row a switch: its effect on the lead and on gap recovery, all else either column, at the deepest depth."""
    table = audit.switch_table(results, True)
    table, rows = table[table["effect_n"] > 0], {}
    for row in table.to_dict("records"):
        name = f"{row['quantity']}, all else {row['column']}"
        if name in EFFECTS:
            switch = "all ten" if row["switch"] == "all" else row["switch"]
            rows.setdefault(switch, {"switch": switch} | dict.fromkeys(EFFECTS, ""))[name] = str(
                interval_of(row, "effect"))
    return pd.DataFrame(rows.values())


def _detectable(part: pd.DataFrame) -> pd.Series:
    """Which of a switch's effects are, after Holm's correction over them: one run that stands at several depths is one
    effect, and one that is 0 in every seed is none."""
    effects = list(zip(part["column"], part["quantity"], part["effect"], strict=True))
    moving = ~((part["effect_low"] == 0) & (part["effect_high"] == 0))
    adjusted = holm({effect: p for effect, p, moves in zip(effects, part["effect_p"], moving, strict=True) if moves})
    return pd.Series([adjusted.get(effect, 1.0) < ALPHA for effect in effects], index=part.index, dtype=bool)


def _finding(part: pd.DataFrame) -> str:
    """What a switch's released setting moves, and which protocols leave a number undefined."""
    judged = part["effect_n"] >= FEWEST
    if not judged.any():
        return f"fewer than {FEWEST} seeds: not judged"
    sure = _detectable(part[judged]).reindex(part.index, fill_value=False)
    alone = ((part["effect_low"] > 0) | (part["effect_high"] < 0)) & judged & ~sure
    found = [_directions(part[sure]) or "No detectable effect on a headline number"]
    if alone.any():
        found.append(f"By its own interval only: {_directions(part[alone])}")
    if len(undefined := part[part["value"].isna()]):
        names = " and ".join(f"`{name}`" for name in undefined["protocol"].unique())
        found.append(f"Gap recovery undefined under {names}")
    return ". ".join(found)


def _directions(rows: pd.DataFrame) -> str:
    """Where some effects are, and which way they go, by quantity."""
    return "; ".join(f"{quantity} " + ", ".join(
        f"{'higher' if up else 'lower'} ({column}{', '.join(map(audit.place, part.itertuples()))})"
        for (column, up), part in found.groupby(["column", found["effect"] > 0], sort=False))
        for quantity, found in rows.groupby("quantity", sort=False))
