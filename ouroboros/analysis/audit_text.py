"""Every sentence and summary of notebook 11, the audit; how sentences are made is `text.py`'s. Never imports torch."""

import math
from collections.abc import Iterable

import pandas as pd

from ..experiment.protocol import COLUMNS, SWITCHES
from . import audit
from .ledger import numbers, read_claims
from .reported import BLOCK, MICRO_STEPS, PEAK, UPDATES
from .results import Results
from .statistics import ALPHA, FEWEST, Interval, holm, minus
from .tables import interval_of, sized
from .text import CONTROLLER_WORDS, CUT_WORDS, NOT_RUN, STATIC_WORDS, TOO_FEW, Words, listed, missing_of, with_size

DEEPER = ("is lower at the deeper one", "is higher at the deeper one", "shows no detectable difference")
SHRINKS = ("shrinks with depth", "grows with depth", "shows no detectable change with depth")
DEPENDS = ("rises, so it depends on text to come", "falls, so it depends on text to come", "shows no detectable change")
ADDS = ("adds to it", "takes from it", "has no detectable effect on it")
RAISES = ("raises", "lowers", "has no detectable effect on")
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


def _row(table: pd.DataFrame, **fields) -> dict | None:
    """The last row (the deepest) with these fields; None where nothing was run."""
    for name, value in fields.items():
        table = table[table[name] == value] if len(table) else table
    return table.iloc[-1].to_dict() if len(table) else None


def _in_both_columns(effects: Iterable[Interval], words: Words) -> list[str]:
    return [f"{with_size(effect, words)}, all else `{column}`"
            for column, effect in zip(COLUMNS, effects, strict=True)]


def _flipped(results: Results, switch: str) -> bool:
    """Whether a switch has an effect that was run."""
    table = audit.switch_table(results)
    return bool((table["switch"].eq(switch) & table["effect_n"].gt(0)).any())


def target(results: Results) -> list[str]:
    """What the target explains: the size of the losses, and that held-out text did not improve."""
    table, theirs, lines = audit.target_table(results), numbers(read_claims()), []
    full, cut = (_row(table, arm=arm) for arm in ("full", "cut"))
    if full and cut:
        lines.append(f"Not trained here: on the next token the full model has {full['scored on t+1']:.3f} and the cut "
                     f"one {cut['scored on t+1']:.3f}. On the token after it they have {full['scored on t+2']:.3f} and "
                     f"{cut['scored on t+2']:.3f} (reported, of another model and other text: {theirs['L36']} and "
                     f"{theirs['L17']}).")
    if not _flipped(results, "target"):
        return lines

    def said(protocol: str, target: str) -> str:
        row = _row(table, arm="controller", protocol=protocol)
        return with_size(interval_of(row, f"{target}, arm - cut"), CUT_WORDS)

    depth = audit.deepest(results)
    effects = (audit.effect_on(results, column, "target", lambda found: minus(
        *(found.logged(arm, depth, "loss_t+1") for arm in ("controller", "cut")))) for column in COLUMNS)
    return [*lines,
            f"Trained on t+2 (`released`), the Controller scored on t+2 {said('released', 't+2')}; scored on the next "
            f"token it {said('released', 't+1')}. Trained on the next token, all else as released, it "
            f"{said('released+target', 't+1')} there.",
            "What training on t+2 rather than on the next token does to Controller - cut, scored on the next token: "
            f"{'; '.join(_in_both_columns(effects, RAISES))}."]


def pooling(results: Results) -> list[str]:
    """How much of the lead over static is a look ahead."""
    if not _flipped(results, "pooling"):
        return []
    table, lead, half = audit.leak_table(results), "static - Controller", "second half replaced"
    effects = (audit.effect_on(results, column, "pooling", lambda found: found.difference(
        "static", "controller", depth=audit.deepest(results))) for column in COLUMNS)
    other = interval_of(_row(table, protocol="corrected+pooling"), "Controller reading another sequence - Controller")
    rises = {protocol: interval_of(_row(table, protocol=protocol), half)
             for protocol in ("released", "released+depth", "corrected+pooling", "corrected")}
    pooled = [f"{with_size(rise, DEPENDS)} under `{protocol}`" for protocol, rise in rises.items()
              if rise.n and protocol != "corrected"]  # older logs don't have it
    causal = f"with the causal pool it {with_size(rises['corrected'], DEPENDS)}"
    return [f"What the sequence pool does to the Controller's lead ({lead}), against the causal one: "
            f"{'; '.join(_in_both_columns(effects, ADDS))}.",
            "With the sequence pool, all else `corrected`, an arm like it that reads another text "
            f"{with_size(other, CONTROLLER_WORDS)}.",
            "When a block's second half is replaced, the next-token loss on its first half "
            f"{'; '.join([*pooled, causal])}."]


def depth(results: Results) -> list[str]:
    """Whether the released rule for the depth makes the reported pattern."""
    table, change, lead = audit.depth_table(results), audit.over_depths(results), "static - Controller"
    if table.empty or not _flipped(results, "depth"):
        return []

    def said(protocol: str, arm: str, words: Words) -> str:
        return with_size(interval_of(_row(table, protocol=protocol, arm=arm), change), words)

    return [f"{change}, `released`: the Controller's depths are one run, so its loss can't depend on depth; `static` "
            f"{said('released', 'static', DEEPER)}. With one rule for both, all else as released, the Controller "
            f"{said('released+depth', 'controller', DEEPER)}.",
            f"The Controller's lead ({lead}) {said('released', lead, SHRINKS)} under `released`. With one rule for "
            f"both, all else as released, it {said('released+depth', lead, SHRINKS)}.",
            f"It {said('corrected', lead, SHRINKS)} under `corrected`; with the released rule alone it "
            f"{said('corrected+depth', lead, SHRINKS)}."]


def reference(results: Results) -> list[str]:
    """What the full model is read on, and what becomes of gap recovery."""
    table, gap_column = audit.reference_table(results), "gap recovery (%)"
    short, same = (_row(table, protocol=protocol) for protocol in ("released", "released+reference"))
    if not short or not same or not _flipped(results, "reference"):
        return []
    full, same_full, common = (sized(interval_of(row, name)) for row, name in (
        (short, "full"), (same, "full"), (same, "cut - full, common blocks")))
    lines = [f"`released`: on short texts and the next token the full model has {full}. On the text and target of the "
             f"other arms it has {same_full}; on the blocks that both are read on, cut - full is {common}."]
    for column in COLUMNS:
        own, flipped = (_row(table, column=column, reference=setting) for setting in ("short", "same"))
        if own and flipped:
            lines.append(f"Gap recovery in percent, all else `{column}`: with the short texts "
                         f"{sized(interval_of(own, gap_column))}; with the others' text and target "
                         f"{sized(interval_of(flipped, gap_column))}.")
    return lines


def precision(results: Results) -> list[str]:
    """Which trained tensors move at all."""
    table, lines = audit.moved_table(results), []
    for kept in SWITCHES["precision"]:
        parts = [f"under `{protocol}` (rate {part['rate'].iloc[0]:g}) {_which_moved(part[part['moved'].notna()])}"
                 for protocol, part in table[table["precision"] == kept].groupby("protocol", sort=False)]
        if parts:
            lines.append(f"Kept in {kept}: {'; '.join(parts)}.")
    return lines


def _which_moved(known: pd.DataFrame) -> str:
    still, others = known[known["moved"] == 0], known[known["moved"] > 0]["moved"]
    said = []
    if len(still):
        arms = "; ".join(f"of `{arm}`, {len(rows)}" for arm, rows in still.groupby("arm", sort=False))
        said.append(f"no element moved in {len(still)} tensors ({arms})")
    if len(others):
        said.append(f"at least {others.min():.1%} of each of {len(others)}{' other' * bool(len(still))} tensors moved")
    return " and ".join(said)


def rate(results: Results) -> list[str]:
    """One shared rate against each arm's own, and how far a table of vectors gets."""
    table, reach, lines, lead = audit.rate_table(results), audit.reach_table(results), [], "static - Controller"
    for column in COLUMNS:
        parts = []
        for rates, rows in table[table["column"] == column].groupby("rates", sort=False) if len(table) else ():
            rows = rows[rows[f"{lead}_n"] > 0]
            if len(rows):
                pair = rows[["rate of controller", "rate of static"]].iloc[0].unique()
                at = {f"depth {row['depth']}": interval_of(row, lead) for row in rows.to_dict("records")}
                parts.append(f"With {rates} rates ({' and '.join(pair)}{' for both arms' * (len(pair) == 1)}), "
                             f"{listed(at, STATIC_WORDS).removeprefix('The ')}.")
        if parts:
            lines.append(f"All else `{column}` ({lead}). {' '.join(parts)}")
    arms = {protocol: [_row(reach, protocol=protocol, arm=arm) for arm in ("static", "controller")]
            for protocol in COLUMNS}
    reached = [f"`{protocol}` {static['largest m']:.3g}, beside {static['reach of a table']:.3g} if it moved by "
               f"its whole rate at each update (the Controller's: {controller['largest m']:.3g})"
               for protocol, (static, controller) in arms.items()
               if static and controller and static["largest m_n"] and controller["largest m_n"]]
    if reached:
        lines.append(f"The table's largest entry: {'; '.join(reached)}. The whole mean residual is added at "
                     f"{reach['adds the residual'].iloc[0]:.3g}.")
    return lines


def diverged(results: Results) -> str:
    """Which runs of the audit have no loss."""
    names = sorted(name for name, run in results.runs.items()
                   if "+" in name and run.manifest["status"] == "diverged")
    return f"Runs with a switch flipped that diverged, so that no table has their loss: {', '.join(names) or 'none'}."


def last_table(results: Results) -> pd.DataFrame:
    """One row a switch: what its released setting moves, against the corrected one; the runs behind that, the
    effect on each headline number in both columns, and what isn't known. It contains completed runs only."""
    rows, table = [], audit.switch_table(results)
    table = table[table["quantity"].isin(audit.HEADLINES)]
    # of all ten switches together there is nothing else that a column would be of
    table = table.assign(column=("all else `" + table["column"] + "`: ").mask(table["switch"] == "all", ""))
    for switch in (*SWITCHES, "all"):
        part = table[table["switch"] == switch]
        seeds = sorted({int(n) for n in part["effect_n"]} - {0})
        if not seeds:
            continue
        evidence = (f"seeds: {' to '.join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))}; table `switches`, figure "
                    "`audit`")
        part = part[(part["effect_n"] > 0) | (part["quantity"] == "gap recovery (%)")]  # which may be undefined
        rows.append({"switch": switch, "finding": _finding(part), "evidence": evidence}
                    | {f"effect on {name}": _effects(part[part["quantity"] == name]) for name in audit.HEADLINES}
                    | {"what we don't know": UNKNOWN[switch]})
    return pd.DataFrame(rows, columns=["switch", "finding", "evidence", *(f"effect on {q}" for q in audit.HEADLINES),
                                       "what we don't know"])


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


def _effects(part: pd.DataFrame) -> str:
    """A switch's effects on one quantity, by column and place; once where all places have one run."""
    found: dict[str, dict[str, str]] = {}
    for row in part.itertuples():
        bounds = "" if math.isnan(row.effect_low) else f" [{row.effect_low:+.3g}, {row.effect_high:+.3g}]"
        said = f"{row.effect:+.3g}{bounds}"
        if math.isnan(row.effect):
            said = "undefined"
        elif row.effect_low == row.effect_high == 0:
            said = "unchanged"
        found.setdefault(row.column, {})[audit.place(row)] = said
    for column, texts in found.items():
        if len(texts) > 1 and len(set(texts.values())) == 1:
            found[column] = {"everywhere": next(iter(texts.values()))}
    return "; ".join(column + ", ".join(f"{where} {text}" for where, text in texts.items())
                     for column, texts in found.items())
