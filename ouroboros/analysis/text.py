"""Every sentence that is generated for a notebook, in the notebooks' order, and for figures. Never imports torch.

A sentence says no more than its intervals do. Where a direction can flip, all its phrases are written: for an interval
above 0, below 0, and one that leaves it open.
"""

import math
from collections.abc import Iterable

import pandas as pd

from ..experiment.profile import load_profile
from ..experiment.protocol import COLUMNS, SWITCHES, switches
from . import audit, levels, reported, statistics
from .claims import in_no_mean
from .comparisons import BLIND, Comparisons
from .ledger import Claim, numbers, read_claims
from .reported import BLOCK, MICRO_STEPS, PEAK, UPDATES
from .results import Results, shown_depth
from .statistics import ALPHA, NOT_JUDGED, NOTHING, Interval, family, holm, interval, minus, verdict, verdicts
from .tables import CONVERGED_SLOPE, arm_table, interval_of

Words = tuple[str, str, str]  # above 0, below 0, open

CUT_WORDS = ("is worse than the cut model", "is better than the cut model", "is indistinguishable from the cut model")
CONTROLLER_WORDS = ("is behind the Controller", "is ahead of the Controller",
                    "is indistinguishable from the Controller")
STATIC_WORDS = ("the Controller is ahead", "static is ahead", "the two are indistinguishable")
ADDED = ("raises the loss", "lowers the loss", "has no detectable effect on the loss")
NEEDED = ("the loss rises, so the trained model relies on what it sees", "the loss falls",
          "the loss shows no detectable change")
DEEPER = ("is lower at the deeper one", "is higher at the deeper one", "shows no detectable difference")
SHRINKS = ("shrinks with depth", "grows with depth", "shows no detectable change with depth")
DEPENDS = ("rises, so it depends on text to come", "falls, so it depends on text to come", "shows no detectable change")
ADDS = ("adds to it", "takes from it", "has no detectable effect on it")
RAISES = ("raises", "lowers", "has no detectable effect on")
SHOWN = {"other_sequence": "shown another sequence's state", "corpus_mean": "shown the mean state at each step",
         "step_mean": "replaced by its own mean vector at each step"}
NOT_RUN, TOO_FEW = "not run yet", "too few seeds to judge"
COMPARED = {  # what a difference of losses, the first's minus the second's, says of the two
    NOT_RUN: "not run yet: {first} against {second}{where}",
    NOT_JUDGED: "too few seeds to judge {first} against {second}{where}",
    statistics.EQUIVALENT: "{first} and {second} are equivalent{where}",
    statistics.UNDECIDED: "no detectable difference between {first} and {second}{where}",
    statistics.BETTER: "{first} is {size} nats ahead of {second}{where}",
    statistics.WORSE: "{first} is {size} nats behind {second}{where}",
}
REPORTED_LOSSES = {"L17": "the cut model on training text", "h17": "the cut model on passages",
                   "gate.before": "the intact model before the refiner", "L36": "the full model"}


def phrase(found: Interval, words: Words, p: float | None = None) -> str:
    """The phrase that an interval allows, `p` being its own corrected over a family, and whether all of it is too small
    to matter; fewer than three trained seeds allow none."""
    above, below, open_ = words
    if found.n == 0:
        return "has no finished run"
    if not found.judged:
        return f"can't be judged from {'one seed' if found.n == 1 else 'two seeds'}"
    if not found.side or (p is not None and p >= ALPHA):
        return f"{open_}: equivalent" if found.small else open_
    return (above if found.side > 0 else below) + (", within the margin" if found.small else "")


def _with_size(found: Interval, words: Words) -> str:
    if found.n > 1 and found.low == found.high == 0:
        return f"doesn't change (0 in each of {found.n} seeds)"
    return f"{phrase(found, words)} ({found})"


def _listed(found: dict[str, Interval], words: Words, name: str = "{}") -> str:
    """Each of some intervals with its phrase."""
    return "; ".join(f"{name.format(part)} {phrase(each, words)} ({each})" for part, each in found.items())


def _corrected(parts: dict, words: Words, name: str = "`{}`") -> str:
    """Each of some parts with the phrase that its interval allows after Holm over the parts."""
    found = family(parts)
    adjusted = holm({part: each.p for part, each in found.items() if each.judged})
    return "; ".join(f"{name.format(part)} {phrase(each, words, adjusted.get(part))} ({each})"
                     for part, each in found.items())


# ------------------------------------------------------------------------------------------- 01, what a target is worth

def targets(results: Results) -> list[str]:
    """What the tables of levels say, a sentence each; nothing of what wasn't run."""
    table = levels.levels_table(results).set_index(["split", "target"]).loc["heldout"]
    one, two = table.loc["t+1"], table.loc["t+2"]
    known = ""
    if not math.isnan(two["unigram"]):
        side = "worse" if two["full"] > two["unigram"] else "better"
        known = f", a unigram {two['unigram']:.2f}: on t+2 the full model is {side} than word frequencies"
    lines = [f"on held-out text, on t+1 and t+2, the full model has {one['full']:.2f} and {two['full']:.2f} nats per "
             f"token, the cut one {one['cut']:.2f} and {two['cut']:.2f}, a uniform guess {one['uniform']:.2f} on "
             f"either{known}.", _shares(table)]
    if not math.isnan(one["double norm"]):
        lines.append("norming the intact model's last state twice, as the released evaluation does, changes its loss "
                     f"by {one['double norm'] - one['full']:+.2f} on t+1 and {two['double norm'] - two['full']:+.2f} "
                     "on t+2.")
    if len(damage := levels.damage_table(results)) > 1:
        ends = ", ".join(f"{row['kept']} {row['heldout - full']:.2f}" for _, row in damage.iterrows())
        lines.append(f"the cut costs, by the layers kept (held-out, cut - full): {ends}.")
    untrained = levels.untrained_table(results)
    if untrained["norms at 1"].notna().any():
        first, last = untrained.iloc[0], untrained.iloc[-1]
        starts = "; ".join(f"{name} {first[name]:.2f} and {last[name]:.2f}" for name in levels.STARTS
                           if not math.isnan(first[name]))
        lines.append(f"before any update the loop has, at depths {first['depth']:g} and {last['depth']:g}: {starts}; "
                     f"the cut model has {first['cut']:.2f} on the same blocks.")
    if len(stream := levels.stream_table(results)):
        enters = stream.iloc[results.profile.split.prelude]
        lines.append(f"the stream that enters the loop, after layer {enters['layer']:g}, has a root mean square of "
                     f"{enters['tokens']:.2f} per channel, its first token {enters['first token']:.1f}; a step norm "
                     "begins at 1.")
    return [f"`corrected`: {line}" for line in lines]


def _shares(table: pd.DataFrame) -> str:
    """Losses of two vocabularies side by side: as shares of a uniform guess's."""
    told = numbers(read_claims())
    words = load_profile("paper").base.model["vocab_size"]
    shares = "; ".join(f"{what} {float(told[name]):g}, {float(told[name]) / math.log(words):.0%}"
                       for name, what in REPORTED_LOSSES.items())
    share = table.div(table["uniform"], axis="index")
    here = "; ".join(f"{arm} {share.loc['t+1', arm]:.0%} on t+1, {share.loc['t+2', arm]:.0%} on t+2"
                     for arm in ("full", "cut"))
    return f"as shares of a uniform guess's loss, measured: {here}; reported (of ln {words:,}): {shares}."


def arithmetic(claims: list[Claim] | None = None) -> str:
    """What the arithmetic of the reported numbers shows."""
    checks, set_up = reported.table(claims), reported.settings().set_index("quantity")["recomputed"]
    value = checks.set_index("quantity")["recomputed"]
    compared = checks[checks["agrees"] != ""]
    off = [f"{row.quantity} (reported {row.reported}, recomputed {row.recomputed})"
           for row in compared[compared["agrees"] == "no"].itertuples()]
    exceptions = f"; not: {'; '.join(off)}" if off else ""
    apart, norm = value["the gate's baseline - L17"], set_up["a step norm's weight, from 1, bfloat16"]
    suggested = "Both go the same way, so nothing here says that their targets differ."
    if value["full and cut model go the same way"] == "no":
        suggested = ("Opposite directions suggest that L36 and L17 don't share a target, and gap recovery divides by "
                     "their difference. These numbers can't exclude that the texts alone did it.")
    return "\n".join([
        f"- `paper`: {len(compared) - len(off)} of {len(compared)} checks give the reported number, to its digits"
        f"{exceptions}.",
        f"- From the training text to the passages the full model's loss changes by "
        f"{value['full model, passages - training text']}, the cut model's by "
        f"{value['cut model, passages - training text']}. {suggested}",
        "- On the passages, where one source has all three losses, gap recovery is "
        f"{value['gap recovery on the passages']}.",
        f"- The gate's comparison begins {apart} from the loss of the unmodified 17-layer "
        "model: it is of another system, an intact model whose last layer is looped.",
        "- By the released settings an entry kept in bfloat16 that starts at 1 ends at "
        f"{norm}; a static table's entries reach "
        f"{set_up['largest m of a static table, bfloat16']} in bfloat16 and "
        f"{set_up['largest m of a static table, float32']} in float32, where "
        f"{set_up['m that adds the whole residual']} would add the residual."])


# ------------------------------------------------------------------------------------------ 02 to 09, the method

def gap(results: Results, protocol: str) -> str:
    """What cutting costs and what comes back at the base depth."""
    found = Comparisons(results, protocol)
    cost, gained = (interval(found.difference(arm, "cut")) for arm in ("full", "controller"))
    return (f"`{protocol}`: full - cut is {cost} nats per token; the Controller at depth {results.profile.depth} "
            f"{phrase(gained, CUT_WORDS)} ({gained}), a gap recovery in percent of "
            f"{interval(found.recovery('controller'))}{in_no_mean(found)}.")


def converged(results: Results) -> str:
    """Which arms still moved at the end, and why a flat end is no proof: comparisons hold for the budget."""
    table, training = arm_table(results), results.profile.training
    budget = (f"Every arm trained for {training.updates} updates of {training.tokens_per_update} tokens. A flat end "
              "under a rate that has decayed doesn't show that more training would change nothing. ")
    moving = table[table["converged"].eq(False) & table["last_slope"].notna()]
    if table["last_slope"].isna().all():
        return budget + "Too few evaluations in the last fifth of training to say whether any arm has converged."
    if moving.empty:
        return budget + "No arm's held-out loss still moved by more than " \
            f"{CONVERGED_SLOPE:g} nats per token over the last fifth of training."
    names = [f"`{row.arm}` depth {row.depth} {row.protocol} ({row.last_slope:+.3f})" for row in moving.itertuples()]
    return (budget + "Still moving (next-token loss on held-out blocks over the last fifth, nats per token, of "
            "the least settled seed; under a protocol that trains on another target that loss may rise), so their "
            "comparisons hold for this budget only: " + ", ".join(names) + ".")


def advantage(results: Results, protocol: str) -> str:
    """Controller against static at each depth."""
    found = Comparisons(results, protocol)
    listed = _listed(family(found.compare("static", "controller", by="depth")), STATIC_WORDS, "at {}")
    return f"`{protocol}` (static - Controller): {listed}{in_no_mean(found)}."


def gate(results: Results, protocol: str) -> str:
    """The loop with and without gate and step norms, against the cut model."""
    found, planned = Comparisons(results, protocol), results.profile.depths_of
    against = {f"`{arm}` at depth {depth}": interval(found.difference(arm, "cut", depth=depth))
               for depth in planned("controller_nogate")
               for arm in ("controller", "controller_nogate", "controller_nogate_nonorm") if depth in planned(arm)}
    return f"`{protocol}` (arm - cut): {_listed(against, CUT_WORDS)}{in_no_mean(found)}."


def configurations(results: Results, protocol: str) -> str:
    """Controller against static over depths, ranks and rates, and how far the Controller spreads."""
    found = Comparisons(results, protocol)
    leads = family(found.compare("static", "controller", by="configuration"))
    leads = {name: each for name, each in leads.items() if each.n > 1}
    ahead, behind = ([name for name, each in leads.items() if each.side == side] for side in (1, -1))
    spread = interval(found.spread("controller"))
    spread = "not measured, since some weren't run" if spread.n == 0 else spread
    if switches(protocol)["depth"] == "drawn":
        spread = "0, since they are one run"
    return (f"`{protocol}`: of {len(leads)} configurations with two seeds or more the Controller is ahead in "
            f"{len(ahead)} ({', '.join(ahead) or 'none'}), static in {len(behind)} ({', '.join(behind) or 'none'}); "
            f"over them the Controller's largest minus its smallest loss is {spread}{in_no_mean(found)}.")


def parts(results: Results, depth: int) -> str:
    """What each part of the loop adds to the loss at one depth."""
    found = Comparisons(results, "corrected")
    added = {name.replace(", to ", " to "): values for name, values in found.steps(depth, sign=-1).items()}
    return (f"`corrected`, depth {depth}: {_corrected(added, ADDED, 'adding {}')}; against the cut model, "
            f"{_corrected(found.ladder(depth), CUT_WORDS, '{}')}{in_no_mean(found)}.")


def blind(results: Results, depth: int) -> str:
    """Whether the Controller's input is worth anything at equal capacity."""
    found = Comparisons(results, "corrected")
    listed = _corrected(found.against(BLIND, "controller", depth), CONTROLLER_WORDS)
    return f"`corrected`, depth {depth} (arm - Controller): {listed}{in_no_mean(found)}."


def instead(results: Results) -> str:
    """What one would do instead of looping, against the cut model and the Controller."""
    found, arms = Comparisons(results, "corrected"), results.profile.instead
    return (f"`corrected`, Controller at depth {results.profile.depth}: "
            f"{_corrected(found.against(arms, 'cut'), CUT_WORDS)}; beside the Controller, "
            f"{_corrected(found.against(arms, 'controller'), CONTROLLER_WORDS)}{in_no_mean(found)}.")


def by_text(results: Results, protocol: str) -> str:
    """Where the Controller's gain over the cut model is found: new training text, held-out, foreign."""
    found, depth = Comparisons(results, protocol), results.profile.depth
    listed = _listed(family(found.compare("controller", "cut", by="text")), CUT_WORDS, "on `{}` text it")
    return f"`{protocol}`, Controller at depth {depth}, next token: {listed}{in_no_mean(found)}."


def newer(results: Results, protocol: str) -> str:
    """Whether a verdict on held-out text is another one on text that is newer than the base."""
    found, pairs = Comparisons(results, protocol), (("controller", "cut"), ("static", "controller"))

    def judged_on(split: str) -> dict[str, str]:
        cut, static = (found.compare(*pair, by="depth", column=split) for pair in pairs)
        return verdicts(family({f"{name}, {depth}": part[depth] for depth in cut for name, part in
                                (("Controller - cut", cut), ("static - Controller", static))}))

    old, new = judged_on("heldout"), judged_on("newer")
    judged = [name for name in old if NOT_JUDGED not in (old[name], new[name])]
    if not judged:
        return f"`{protocol}`: no comparison with three seeds is scored on newer text."
    differ = [f"{name} ({old[name]} on held-out, {new[name]} on newer text)"
              for name in judged if old[name] != new[name]]
    return (f"`{protocol}`: of {len(judged)} comparisons, on text that is newer than the base "
            + (f"{len(differ)} are told otherwise than on held-out text: {'; '.join(differ)}." if differ
               else "none is told otherwise than on held-out text."))


def coda(results: Results) -> str:
    """The loops with their coda trained."""
    found, depth = Comparisons(results, "corrected"), results.profile.depth
    against = found.coda(depth)
    if not any("_coda_" in name for name in against):
        return "`corrected`: this profile has no arm whose coda is trained."
    return f"`corrected`, depth {depth}: {_corrected(against, CUT_WORDS)}{in_no_mean(found)}."


def interventions(results: Results, protocol: str) -> str:
    """Whether the Controller's input matters, from the interventions at the base depth."""
    found, depth = Comparisons(results, protocol), results.profile.depth
    rises = "; ".join(f"{SHOWN[kind]}, {phrase(rise, NEEDED)} ({rise})" for kind, rise in
                      ((kind, interval(values)) for kind, values in found.interventions(depth).items()))
    return (f"`{protocol}`, depth {depth}: {rises}; beside it, static - Controller is "
            f"{interval(found.difference('static', 'controller', depth=depth))}{in_no_mean(found)}.")


# -------------------------------------------------------------------------------------------------- 11, the audit

def _row(table: pd.DataFrame, **fields) -> dict | None:
    """The last row (the deepest) with these fields; None where nothing was run."""
    for name, value in fields.items():
        table = table[table[name] == value] if len(table) else table
    return table.iloc[-1].to_dict() if len(table) else None


def _in_both_columns(effects: Iterable[Interval], words: Words) -> list[str]:
    return [f"{_with_size(effect, words)} with all else `{column}`"
            for column, effect in zip(COLUMNS, effects, strict=True)]


def audit_target(results: Results) -> list[str]:
    """What the target explains: the size of the losses, and that held-out text did not improve."""
    table, theirs, lines = audit.target_table(results), numbers(read_claims()), []
    full, cut = (_row(table, arm=arm) for arm in ("full", "cut"))
    if full and cut:
        lines.append(f"The same weights, not trained here: on the next token the full model has "
                     f"{full['scored on t+1']:.3f} and the cut one {cut['scored on t+1']:.3f}, on the token after it "
                     f"{full['scored on t+2']:.3f} and {cut['scored on t+2']:.3f} (reported of another model and other "
                     f"text: {theirs['L36']} and {theirs['L17']}).")

    def said(protocol: str, target: str) -> str:
        row = _row(table, arm="controller", protocol=protocol)
        return _with_size(interval_of(row, f"{target}, arm - cut"), CUT_WORDS)

    depth = audit.deepest(results)
    effects = (audit.effect_on(results, column, "target", lambda found: minus(
        *(found.logged(arm, depth, "loss_t+1") for arm in ("controller", "cut")))) for column in COLUMNS)
    released, corrected = _in_both_columns(effects, RAISES)
    return [*lines,
            f"Trained on t+2 (`released`), the Controller on held-out text {said('released', 't+2')} on t+2 and "
            f"{said('released', 't+1')} on the next token; trained on the next token, all else as released, it "
            f"{said('released+target', 't+1')} there.",
            "Training on t+2 rather than on the next token changes Controller - cut on the next token: it "
            f"{released} and {corrected}."]


def audit_pooling(results: Results) -> list[str]:
    """How much of the lead over static is a look ahead."""
    table, lead, half = audit.leak_table(results), "static - Controller", "second half replaced"
    effects = (audit.effect_on(results, column, "pooling", lambda found: found.difference(
        "static", "controller", depth=audit.deepest(results))) for column in COLUMNS)
    released, corrected = _in_both_columns(effects, ADDS)
    other = interval_of(_row(table, protocol="corrected+pooling"), "Controller reading another sequence - Controller")
    rises = {protocol: interval_of(_row(table, protocol=protocol), half)
             for protocol in ("released", "released+depth", "corrected+pooling", "corrected")}
    pooled = [f"{_with_size(rise, DEPENDS)} under `{protocol}`" for protocol, rise in rises.items()
              if rise.n and protocol != "corrected"]  # older logs don't have it
    causal = f"with the causal pool it {_with_size(rises['corrected'], DEPENDS)}"
    return [f"What the sequence pool does to the Controller's lead ({lead}), against the causal one: it {released} and "
            f"{corrected}.",
            "With the sequence pool, all else `corrected`, an arm like it that reads another text "
            f"{_with_size(other, CONTROLLER_WORDS)}.",
            "A block's second half replaced, the next-token loss on its first half, whose own tokens stay in the pool, "
            f"{'; '.join([*pooled, causal])}."]


def audit_depth(results: Results) -> list[str]:
    """Whether the released rule for the depth makes the reported pattern."""
    table, change, lead = audit.depth_table(results), audit.over_depths(results), "static - Controller"
    if table.empty:
        return []

    def said(protocol: str, arm: str, words: Words) -> str:
        return _with_size(interval_of(_row(table, protocol=protocol, arm=arm), change), words)

    return [f"{change}: under `released` the Controller's depths are one run, so that its loss doesn't depend on depth "
            f"is by construction, and `static` {said('released', 'static', DEEPER)}; one rule for both, all else as "
            f"released, the Controller {said('released+depth', 'controller', DEEPER)}.",
            f"The Controller's lead ({lead}) {said('released', lead, SHRINKS)} under `released`; one rule for both, "
            f"all else as released, it {said('released+depth', lead, SHRINKS)}.",
            f"It {said('corrected', lead, SHRINKS)} under `corrected`; with the released rule alone it "
            f"{said('corrected+depth', lead, SHRINKS)}."]


def audit_reference(results: Results) -> list[str]:
    """What the full model is read on, and what becomes of gap recovery."""
    table, gap_column = audit.reference_table(results), "gap recovery (%)"
    short, same = (_row(table, protocol=protocol) for protocol in ("released", "released+reference"))
    if not short or not same:
        return []
    lines = [f"`released`: the full model has {interval_of(short, 'full')} on short texts and the next token, "
             f"{interval_of(same, 'full')} on the text and the target of the other arms; on the blocks that both are "
             f"read on cut - full is {interval_of(same, 'cut - full, common blocks')}."]
    for column in COLUMNS:
        own, flipped = (_row(table, column=column, reference=setting) for setting in ("short", "same"))
        if own and flipped:
            lines.append(f"Gap recovery in percent, all else `{column}`: with the short texts "
                         f"{interval_of(own, gap_column)}, with the others' text and target "
                         f"{interval_of(flipped, gap_column)}.")
    return lines


def audit_precision(results: Results) -> list[str]:
    """Which trained tensors move at all."""
    table, lines = audit.moved_table(results), []
    for kept in SWITCHES["precision"]:
        parts = [f"under `{protocol}` (rate {part['rate'].iloc[0]:g}) {_which_moved(part[part['moved'].notna()])}"
                 for protocol, part in table[table["precision"] == kept].groupby("protocol", sort=False)]
        if parts:
            lines.append(f"Kept in {kept}: {'; '.join(parts)}.")
    return lines


def _which_moved(known: pd.DataFrame) -> str:
    still = [f"`{row.tensor}` of `{row.arm}`" for row in known[known["moved"] == 0].itertuples()]
    others, said = known[known["moved"] > 0]["moved"], []
    if still:
        said.append(f"no element moved of {', '.join(still)}")
    if len(others):
        said.append(f"at least {others.min():.1%} of each of {len(others)}{' other' if still else ''} tensors moved")
    return " and ".join(said)


def audit_rate(results: Results) -> list[str]:
    """One shared rate against each arm's own, and how far a table of vectors gets."""
    table, reach, lines, lead = audit.rate_table(results), audit.reach_table(results), [], "static - Controller"
    for column in COLUMNS:
        parts = []
        for rates, rows in table[table["column"] == column].groupby("rates", sort=False) if len(table) else ():
            rows = rows[rows[f"{lead}_n"] > 0]
            if len(rows):
                pair = rows[["rate of controller", "rate of static"]].iloc[0].unique()
                where = "; ".join(f"depth {row['depth']} {_with_size(interval_of(row, lead), STATIC_WORDS)}"
                                  for row in rows.to_dict("records"))
                parts.append(f"{rates} rate ({' and '.join(pair)}{' for both arms' if len(pair) == 1 else ''}): "
                             f"{where}")
        if parts:
            lines.append(f"All else `{column}` ({lead}), {'; '.join(parts)}.")
    arms = {protocol: [_row(reach, protocol=protocol, arm=arm) for arm in ("static", "controller")]
            for protocol in COLUMNS}
    reached = [f"`{protocol}` {static['largest m']:.3g}, where one that moves by the whole rate at every update is at "
               f"about {static['reach of a table']:.3g} (the Controller's {controller['largest m']:.3g})"
               for protocol, (static, controller) in arms.items()
               if static and controller and static["largest m_n"] and controller["largest m_n"]]
    if reached:
        lines.append(f"The table's largest entry: {'; '.join(reached)}; the whole mean residual is added at "
                     f"{reach['adds the residual'].iloc[0]:.3g}.")
    return lines


def audit_diverged(results: Results) -> str:
    """Which runs of the audit have no loss."""
    names = sorted(name for name, run in results.runs.items()
                   if "+" in name and run.manifest["status"] == "diverged")
    return f"Runs with a switch flipped that diverged, so that no table has their loss: {', '.join(names) or 'none'}."


SWITCH_SENTENCES = {"target": audit_target, "depth": audit_depth, "pooling": audit_pooling,
                    "precision": audit_precision, "rate": audit_rate, "reference": audit_reference}
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


def _finding(part: pd.DataFrame) -> str:
    """What a switch's released setting moves, and which protocols leave a number undefined.

    Holm's correction is over its effects: one run that stands at several depths is one effect, and one that is 0 in
    every seed is none.
    """
    if part["effect_n"].max() < 2:
        return "one seed: can't be judged"
    effects = list(zip(part["column"], part["quantity"], part["effect"], strict=True))
    moving = ~((part["effect_low"] == 0) & (part["effect_high"] == 0))
    adjusted = holm({effect: p for effect, p, moves in zip(effects, part["effect_p"], moving, strict=True) if moves})
    sure = pd.Series([adjusted.get(effect, 1.0) < ALPHA for effect in effects], index=part.index, dtype=bool)
    alone = ((part["effect_low"] > 0) | (part["effect_high"] < 0)) & ~sure
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


# --------------------------------------------------------------------- what a figure shows: its title and alt text

def compared(found: Interval, first: str, second: str, where: str = "") -> str:
    """Who of two has the lower loss, and by how much, from the first's minus the second's."""
    said = NOT_RUN if found.n == 0 else verdict(found).partition(" within")[0]
    size = str(found).partition(" ")[0].removeprefix("-")  # to the digits that its interval allows
    said = COMPARED[said].format(first=first, second=second, where=where, size=size)
    return said[0].upper() + said[1:]


def shown_overview(results: Results) -> str:
    """The loop against the cut model and against LoRA on it, at the depth of the first screen."""
    found, depth = Comparisons(results, "corrected"), shown_depth(results)
    cut, lora = (interval(found.difference("controller", other, depth=depth)) for other in ("cut", "lora"))
    return (compared(cut, "the Controller", "the cut model", f" at depth {depth}") + ". "
            + compared(lora, "it", "LoRA on the cut model"))


def shown_by_depth(leads: dict[int, Interval]) -> str:
    """Controller minus static at the shallowest and the deepest depth."""
    (shallow, first), *deeper = leads.items()
    return ". ".join([compared(first, "the Controller", "the static table", f" at depth {shallow}"),
                      *(compared(found, "it", "the table", f" at depth {depth}") for depth, found in deeper)])


def shown_configurations(leads: dict[str, Interval]) -> str:
    """In how many configurations the Controller is ahead, from static minus Controller in each."""
    judged = [each.side for each in leads.values() if each.judged]
    if not judged:
        most = max(leads.values(), key=lambda each: each.n, default=NOTHING)
        return compared(most, "the Controller", "the static table", " in any configuration")
    return (f"The Controller is ahead of the static table in {judged.count(1)} of {len(judged)} configurations with "
            f"three seeds, behind in {judged.count(-1)}")


def shown_levels(one: float, two: float) -> str:
    """The full model's loss on the next token and on the one after it, which no seed enters."""
    known = NOTHING if math.isnan(two - one) else Interval(two - one, two - one, two - one, 1, trained=False)
    return compared(known, "the full model scored on the token after the next", "itself on the next token")


def shown_cost(depth: int, flops: float, cache: float, weights: float) -> str:
    """Each in percent of the full model's."""
    return (f"At depth {depth} the loop holds {weights:.0f} % of the full model's weights and takes {flops:.0f} % of "
            f"its FLOPs and {cache:.0f} % of its cache")


def shown_steps(depth: int, changes: list[Interval]) -> str:
    """By how much the Controller's first and last step change the state."""
    if not changes or not changes[-1].judged:
        return f"The steps of the Controller at depth {depth}: {TOO_FEW if changes else NOT_RUN}"
    first, last = changes[0].mean, changes[-1].mean
    return (f"From step 1 to step {len(changes)} the share of its state that the Controller's loop changes "
            f"{'falls' if last < first else 'rises'} from {first:.2g} to {last:.2g}")


def shown_slopes(depth: int, slopes: dict[str, float]) -> str:
    """What losses still change by over the last fifth of training."""
    known = {name: slope for name, slope in slopes.items() if not math.isnan(slope)}
    if not known:
        return f"Training at depth {depth}: {'too few evaluations to judge its end' if slopes else NOT_RUN}"
    name = max(known, key=lambda each: abs(known[each]))
    if abs(known[name]) <= CONVERGED_SLOPE:
        return f"At depth {depth} no loss changes by more than {CONVERGED_SLOPE:g} nats in the last fifth of training"
    return (f"At depth {depth} the {name}'s loss still {'falls' if known[name] < 0 else 'rises'} by "
            f"{abs(known[name]):.2f} nats in the last fifth of training")


def shown_switches(effects: list[tuple[str, str, Interval]]) -> str:
    """Which switch changes the Controller's lead most: (switch, column, effect)."""
    alone = [each for each in effects if each[1] in COLUMNS]
    if not any(effect.judged for *_, effect in alone):
        return f"The Controller's lead, switch by switch: {TOO_FEW if alone else NOT_RUN}"
    switch, column, effect = max(alone, key=lambda each: abs(each[2].mean) if each[2].judged and each[2].side else 0)
    if not effect.side:
        return "No switch has a detectable effect on the Controller's lead over the static table"
    return (f"Of the switches, {switch} changes the Controller's lead over the static table most: by "
            f"{effect.mean:+.2g} nats, all else {column}")
