"""Every sentence that is generated for a notebook, in the notebooks' order, and for figures. Never imports torch.

A sentence says no more than its intervals do. Where a direction can flip, all its phrases are written: for an interval
above 0, below 0, and one that leaves it open.
"""

import math
from collections.abc import Callable, Iterable

import pandas as pd

from ..experiment.arms import ARMS
from ..experiment.profile import load_profile
from ..experiment.protocol import COLUMNS, SWITCHES, switches
from . import audit, levels, reported, statistics
from .comparisons import BLIND, Comparisons
from .ledger import Claim, numbers, read_claims
from .reported import BLOCK, MICRO_STEPS, PEAK, UPDATES
from .results import Results, shown_depth
from .statistics import ALPHA, FEWEST, NOT_JUDGED, NOTHING, Interval, family, holm, interval, minus, verdict, verdicts
from .tables import CONVERGED_SLOPE, arm_table, interval_of, sized

Words = tuple[str, str, str]  # above 0, below 0, open

CUT_WORDS = ("is worse than the cut model", "is better than the cut model", "is indistinguishable from the cut model")
CONTROLLER_WORDS = ("is behind the Controller", "is ahead of the Controller",
                    "is indistinguishable from the Controller")
STATIC_WORDS = ("the Controller is ahead", "static is ahead", "the two are indistinguishable")
ADDED = ("raises the loss", "lowers the loss", "no detectable effect on the loss")
NEEDED = ("the loss rises, so the trained model relies on what it sees", "the loss falls",
          "no detectable change of the loss")
DEEPER = ("is lower at the deeper one", "is higher at the deeper one", "shows no detectable difference")
SHRINKS = ("shrinks with depth", "grows with depth", "shows no detectable change with depth")
DEPENDS = ("rises, so it depends on text to come", "falls, so it depends on text to come", "shows no detectable change")
ADDS = ("adds to it", "takes from it", "has no detectable effect on it")
RAISES = ("raises", "lowers", "has no detectable effect on")
SHOWN = {"other_sequence": "shown another sequence's state", "corpus_mean": "shown the mean state at each step",
         "step_mean": "replaced by its own mean vector at each step"}
NOT_RUN, NO_RUN, TOO_FEW = "not run yet", "no finished run", "too few seeds to judge"
COMPARED = {  # what a difference of losses, the first's minus the second's, says of the two
    NOT_RUN: "not run yet: {first} against {second}{where}",
    NOT_JUDGED: "too few seeds to judge {first} against {second}{where}",
    statistics.EQUIVALENT: "{first} and {second} are equivalent{where}",
    statistics.UNDECIDED: "no detectable difference between {first} and {second}{where}",
    statistics.BETTER: "{first} is {size} nats ahead of {second}{where}",
    statistics.WORSE: "{first} is {size} nats behind {second}{where}",
}
GATE, NORM = "the gate's baseline - L17", "a step norm's weight, from 1, bfloat16"  # rows of `reported`
REPORTED_LOSSES = {"L17": "the cut model on training text", "h17": "the cut model on passages",
                   "gate.before": "the intact model before the refiner", "L36": "the full model"}


def phrase(found: Interval, words: Words, p: float | None = None) -> str:
    """The phrase that an interval allows, `p` being its own corrected over a family, and whether all of it is too small
    to matter; fewer than three trained seeds allow none."""
    above, below, open_ = words
    if found.n == 0:
        return NO_RUN
    if not found.judged:
        return f"can't be judged from {'one seed' if found.n == 1 else 'two seeds'}"
    if not found.side or (p is not None and p >= ALPHA):
        return f"{open_}: equivalent" if found.small else open_
    return (above if found.side > 0 else below) + (", within the margin" if found.small else "")


def _with_size(found: Interval, words: Words) -> str:
    if found.n == 0:
        return NO_RUN
    if found.n > 1 and found.low == found.high == 0:
        return f"doesn't change (0 in each of {found.n} seeds)"
    return f"{phrase(found, words)} ({sized(found)})"


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def _listed(found: dict[str, Interval], words: Words, adjusted: dict | None = None) -> str:
    """Parts by the phrase that their intervals allow, each with its mean: a sentence a phrase."""
    said: dict[str, list[str]] = {}
    for part, each in found.items():
        size = f" ({str(each).partition(' ')[0]})" if each.n else ""  # the interval stands in the table
        answer = phrase(each, words, (adjusted or {}).get(part)).removeprefix("is ")
        said.setdefault(answer, []).append(part + size)
    if set(said) <= {NO_RUN}:
        return _capital(NO_RUN)
    return ". ".join(f"{_capital(answer)}: {', '.join(parts)}" for answer, parts in said.items())


def _corrected(parts: dict, words: Words) -> str:
    """The same after Holm over the parts."""
    found = family(parts)
    return _listed(found, words, holm({part: each.p for part, each in found.items() if each.judged}))


def _lost(found: Comparisons) -> str:
    """The runs that were asked for and diverged, as a sentence of their own."""
    names = ", ".join(f"`{name}`" for name in sorted(found.diverged))
    return f" Diverged, so in no mean: {names}." if names else ""


def by_protocol(sentence: Callable[[Results, str], str], results: Results) -> list[str]:
    """One of the sentences below under each protocol, the text's first."""
    return [sentence(results, protocol) for protocol in results.profile.protocols[::-1]]


def planned(results: Results, *arms: str) -> str:
    """How many runs of some arms are planned in whole columns and not run; nothing where all are there."""
    return _missing(results, {cell.run.id for cell in results.profile.cells()
                              if cell.arm in arms and cell.protocol in COLUMNS})


def audit_planned(results: Results) -> str:
    """The same of the runs with a switch flipped."""
    return _missing(results, {cell.run.id for cell in results.profile.cells() if "+" in cell.run.protocol})


def _missing(results: Results, wanted: set[str]) -> str:
    if not wanted:
        return "Not planned at this profile."
    missing = len(wanted - set(results.runs))
    return f"{_capital(NOT_RUN)}: {missing} of {len(wanted)} planned runs." if missing else ""


# ------------------------------------------------------------------------------------------- 01, what a target is worth

def targets(results: Results) -> list[str]:
    """What size of loss a target gives, and what the cut costs."""
    table = levels.levels_table(results).set_index(["split", "target"]).loc["heldout"]
    one, two = table.loc["t+1"], table.loc["t+2"]
    lines = [f"`corrected`, held-out text: on the next token the full model has {one['full']:.2f} nats per token, the "
             f"cut one {one['cut']:.2f}.",
             f"On the token after it they have {two['full']:.2f} and {two['cut']:.2f}; a uniform guess has "
             f"{one['uniform']:.2f} on either."]
    if not math.isnan(two["unigram"]):
        side = "worse" if two["full"] > two["unigram"] else "better"
        lines.append(f"A unigram has {two['unigram']:.2f} on the token after the next: there the full model is {side} "
                     "than word frequencies.")
    return lines


def before_training(results: Results) -> list[str]:
    """What else is known before any update; nothing of what wasn't run."""
    table, lines = levels.levels_table(results).set_index(["split", "target"]).loc["heldout"], []
    one, two = table.loc["t+1"], table.loc["t+2"]
    if len(damage := levels.damage_table(results)) > 1:
        ends = ", ".join(f"{row['kept']} {row['heldout - full']:.2f}" for _, row in damage.iterrows())
        lines.append(f"The cut costs, by the layers kept (prelude/recurrent/coda): {ends}.")
    if not math.isnan(one["double norm"]):
        lines.append("Norming the intact model's last state twice, as the released evaluation does, changes its loss "
                     f"by {one['double norm'] - one['full']:+.2f} on the next token and "
                     f"{two['double norm'] - two['full']:+.2f} on the one after it.")
    untrained = levels.untrained_table(results)
    if untrained["norms at 1"].notna().any():
        first, last = untrained.iloc[0], untrained.iloc[-1]
        starts = "; ".join(f"{name}, {first[name]:.2f} and {last[name]:.2f}" for name in levels.STARTS
                           if not math.isnan(first[name]))
        lines.append(f"The untrained loop at depths {first['depth']:g} and {last['depth']:g} has: {starts}. The cut "
                     f"model has {first['cut']:.2f} on the same blocks.")
    if len(stream := levels.stream_table(results)):
        enters = stream.iloc[results.profile.split.prelude]
        lines.append(f"The stream that enters the loop, after layer {enters['layer']:g}, has a root mean square of "
                     f"{enters['tokens']:.2f} per channel, its first token {enters['first token']:.1f}. A step norm "
                     "begins at 1.")
    return lines


def shares(results: Results) -> str:
    """Losses of two vocabularies side by side: as shares of a uniform guess's."""
    table = levels.levels_table(results).set_index(["split", "target"]).loc["heldout"]
    paper = numbers(read_claims())
    words = load_profile("paper").base.model["vocab_size"]
    theirs = "; ".join(f"{what} {float(paper[name]):g}, {float(paper[name]) / math.log(words):.0%}"
                       for name, what in REPORTED_LOSSES.items())
    share = table.div(table["uniform"], axis="index")
    here = "; ".join(f"{arm} {share.loc['t+1', arm]:.0%} on the next token, {share.loc['t+2', arm]:.0%} on the one "
                     "after" for arm in ("full", "cut"))
    return (f"As shares of a uniform guess's loss, measured: {here}. Reported, as shares of ln {words:,}: {theirs}.")


def arithmetic(claims: list[Claim] | None = None) -> list[str]:
    """What the arithmetic of the reported numbers shows."""
    checks = reported.table(claims)
    value = checks.set_index("quantity")["recomputed"]
    compared = checks[checks["agrees"] != ""]
    off = [f"{row.quantity} (reported {row.reported}, recomputed {row.recomputed})"
           for row in compared[compared["agrees"] == "no"].itertuples()]
    exceptions = f"; not: {'; '.join(off)}" if off else ""
    suggested = "Both go the same way, so nothing here says that their targets differ."
    if value["full and cut model go the same way"] == "no":
        suggested = ("Opposite directions suggest that L36 and L17 don't share a target, and gap recovery divides by "
                     "their difference. These numbers can't exclude that the texts alone did it.")
    agree = len(compared) - len(off)
    return [f"Reported numbers: {agree} of {len(compared)} checks agree to the digits given{exceptions}.",
            f"From the training text to the passages the full model's loss changes by "
            f"{value['full model, passages - training text']}, the cut model's by "
            f"{value['cut model, passages - training text']}. {suggested}",
            "On the passages, where one source has all three losses, gap recovery is "
            f"{value['gap recovery on the passages']}."]


def settings() -> list[str]:
    """What follows from the released settings, and from the loss that the gate's comparison begins at."""
    value, apart = reported.settings().set_index("quantity")["recomputed"], reported.table().set_index("quantity")
    return [f"The gate's comparison begins {apart.loc[GATE, 'recomputed']} from the loss of the unmodified "
            "17-layer model. It is of another system: an intact model whose last layer is looped.",
            "By the released settings an entry kept in bfloat16 that starts at 1 ends at "
            f"{value[NORM]}. A static table's entries reach "
            f"{value['largest m of a static table, bfloat16']} in bfloat16 and "
            f"{value['largest m of a static table, float32']} in float32; {value['m that adds the whole residual']} "
            "would add the residual."]


# ------------------------------------------------------------------------------------------ 02 to 09, the method

def gap(results: Results, protocol: str) -> str:
    """What cutting costs and what comes back at the depth shown."""
    found, depth = Comparisons(results, protocol), shown_depth(results)
    cost, gained = (interval(found.difference(*pair, depth=depth)) for pair in (("cut", "full"), ("controller", "cut")))
    if gained.n == 0:
        return f"`{protocol}`: cutting costs {sized(cost)} nats per token. The Controller has {NO_RUN}."
    return (f"`{protocol}`: cutting costs {sized(cost)} nats per token. The Controller at depth {depth} "
            f"{phrase(gained, CUT_WORDS)} ({sized(gained)}). Its gap recovery in percent: "
            f"{sized(interval(found.recovery('controller', depth)))}.{_lost(found)}")


def converged(results: Results) -> str:
    """How many arms still moved at the end, and why a flat end is no proof: comparisons hold for the budget."""
    table, training = arm_table(results), results.profile.training
    budget = f"Every arm trained for {training.updates} updates of {training.tokens_per_update} tokens. "
    flat = " A flat end under a rate that has decayed doesn't show that more training would change nothing."
    known = table[table["last_slope"].notna() & table["protocol"].isin(COLUMNS)]
    moving = known[known["converged"].eq(False)]
    if known.empty:
        return budget + "Too few evaluations in the last fifth of training to say whether any arm has converged."
    if moving.empty:
        return (f"{budget}No arm's held-out loss still moved by more than {CONVERGED_SLOPE:g} nats per token over the "
                f"last fifth of training.{flat}")
    most = moving.loc[moving["last_slope"].abs().idxmax()]
    return (f"{budget}Over the last fifth, {len(moving)} of {len(known)} rows still "
            f"moved by more than {CONVERGED_SLOPE:g} nats per token (`last_slope` in the table of every arm), so they "
            f"hold for this budget only. The largest: `{most['arm']}`, depth {most['depth']}, {most['protocol']} "
            f"({most['last_slope']:+.3f}).{flat}")


def advantage(results: Results, protocol: str) -> str:
    """Controller against static at each depth."""
    found = Comparisons(results, protocol)
    listed = _listed(family(found.compare("static", "controller", by="depth")), STATIC_WORDS)
    return f"`{protocol}` (static - Controller). {listed}.{_lost(found)}"


def gate(results: Results, protocol: str) -> str:
    """The loop with and without gate and step norms, against the cut model."""
    found, planned_at = Comparisons(results, protocol), results.profile.depths_of
    against = {f"{ARMS[arm].label}, depth {depth}": interval(found.difference(arm, "cut", depth=depth))
               for depth in planned_at("controller_nogate")
               for arm in ("controller", "controller_nogate", "controller_nogate_nonorm") if depth in planned_at(arm)}
    return f"`{protocol}` (arm - cut). {_listed(against, CUT_WORDS)}.{_lost(found)}"


def configurations(results: Results, protocol: str) -> str:
    """Controller against static over depths, ranks and rates, and how far the Controller spreads."""
    found = Comparisons(results, protocol)
    leads = family(found.compare("static", "controller", by="configuration"))
    leads = {name: each for name, each in leads.items() if each.judged}
    if not leads:
        return f"`{protocol}`: no configuration has three seeds yet."
    ahead, behind = ([name for name, each in leads.items() if each.side == side] for side in (1, -1))
    spread = interval(found.spread("controller"))
    spread = "not measured, since some weren't run" if spread.n == 0 else sized(spread)
    if switches(protocol)["depth"] == "drawn":
        spread = "0, since they are one run"
    return (f"`{protocol}`: of {len(leads)} configurations with three seeds or more the Controller is ahead in "
            f"{len(ahead)} ({', '.join(ahead) or 'none'}), static in {len(behind)} ({', '.join(behind) or 'none'}). "
            f"Over them the Controller's largest minus its smallest loss is {spread}.{_lost(found)}")


def parts(results: Results, depth: int) -> str:
    """What each part of the loop adds to the loss at one depth."""
    found = Comparisons(results, "corrected")
    added = {name.replace(", to ", " to "): values for name, values in found.steps(depth, sign=-1).items()}
    if (listed := _corrected(added, ADDED)) == _capital(NO_RUN):
        return f"`corrected`, depth {depth}, a part added: {NO_RUN}.{_lost(found)}"
    return f"`corrected`, depth {depth}, a part added. {listed}.{_lost(found)}"


def blind(results: Results, depth: int) -> str:
    """Whether the Controller's input is worth anything at equal capacity."""
    found = Comparisons(results, "corrected")
    against = {ARMS[arm].label: values for arm, values in found.against(BLIND, "controller", depth).items()}
    return f"`corrected`, depth {depth} (arm - Controller). {_corrected(against, CONTROLLER_WORDS)}.{_lost(found)}"


def instead(results: Results) -> list[str]:
    """What one would do instead of looping, against the cut model and the Controller."""
    found, depth, lines = Comparisons(results, "corrected"), shown_depth(results), []
    for other, words in (("cut", CUT_WORDS), ("controller", CONTROLLER_WORDS)):
        against = found.against(results.profile.instead, other, depth)
        against = {ARMS[arm].label: values for arm, values in against.items()}
        lines.append(f"`corrected`, Controller at depth {depth} (arm - {ARMS[other].label.removeprefix('the ')}). "
                     f"{_corrected(against, words)}.")
    return [*lines[:-1], lines[-1] + _lost(found)]


def by_text(results: Results, protocol: str) -> str:
    """Where the Controller's gain over the cut model is found: new training text, held-out, foreign."""
    found, depth = Comparisons(results, protocol), shown_depth(results)
    listed = _listed(family(found.compare("controller", "cut", by="text", depth=depth)), CUT_WORDS)
    return f"`{protocol}`, Controller at depth {depth}, by kind of text. {listed}.{_lost(found)}"


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
    same = (f"`{protocol}`: {len(judged) - len(differ)} of {len(judged)} verdicts on held-out text are the same on "
            "text that is newer than the base.")
    return f"{same} Others: {'; '.join(differ)}." if differ else same


def coda(results: Results) -> str:
    """The loops with their coda trained."""
    found, depth = Comparisons(results, "corrected"), results.profile.depth
    against = found.coda(depth)
    if not any("_coda_" in name for name in against):
        return "`corrected`: this profile has no arm whose coda is trained."
    against = {ARMS[arm].label: values for arm, values in against.items()}
    return f"`corrected`, depth {depth} (arm - cut). {_corrected(against, CUT_WORDS)}.{_lost(found)}"


def interventions(results: Results, protocol: str) -> str:
    """Whether the Controller's input matters, from the interventions at the depth shown."""
    found, depth = Comparisons(results, protocol), shown_depth(results)
    rises = {SHOWN[kind]: interval(values) for kind, values in found.interventions(depth).items()}
    return f"`{protocol}`, depth {depth}. {_listed(rises, NEEDED)}.{_lost(found)}"


# -------------------------------------------------------------------------------------------------- 11, the audit

def _row(table: pd.DataFrame, **fields) -> dict | None:
    """The last row (the deepest) with these fields; None where nothing was run."""
    for name, value in fields.items():
        table = table[table[name] == value] if len(table) else table
    return table.iloc[-1].to_dict() if len(table) else None


def _in_both_columns(effects: Iterable[Interval], words: Words) -> list[str]:
    return [f"{_with_size(effect, words)}, all else `{column}`"
            for column, effect in zip(COLUMNS, effects, strict=True)]


def _flipped(results: Results, switch: str) -> bool:
    """Whether a switch has an effect that was run."""
    table = audit.switch_table(results)
    return bool((table["switch"].eq(switch) & table["effect_n"].gt(0)).any())


def audit_target(results: Results) -> list[str]:
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
        return _with_size(interval_of(row, f"{target}, arm - cut"), CUT_WORDS)

    depth = audit.deepest(results)
    effects = (audit.effect_on(results, column, "target", lambda found: minus(
        *(found.logged(arm, depth, "loss_t+1") for arm in ("controller", "cut")))) for column in COLUMNS)
    return [*lines,
            f"Trained on t+2 (`released`), the Controller scored on t+2 {said('released', 't+2')}; scored on the next "
            f"token it {said('released', 't+1')}. Trained on the next token, all else as released, it "
            f"{said('released+target', 't+1')} there.",
            "What training on t+2 rather than on the next token does to Controller - cut, scored on the next token: "
            f"{'; '.join(_in_both_columns(effects, RAISES))}."]


def audit_pooling(results: Results) -> list[str]:
    """How much of the lead over static is a look ahead."""
    if not _flipped(results, "pooling"):
        return []
    table, lead, half = audit.leak_table(results), "static - Controller", "second half replaced"
    effects = (audit.effect_on(results, column, "pooling", lambda found: found.difference(
        "static", "controller", depth=audit.deepest(results))) for column in COLUMNS)
    other = interval_of(_row(table, protocol="corrected+pooling"), "Controller reading another sequence - Controller")
    rises = {protocol: interval_of(_row(table, protocol=protocol), half)
             for protocol in ("released", "released+depth", "corrected+pooling", "corrected")}
    pooled = [f"{_with_size(rise, DEPENDS)} under `{protocol}`" for protocol, rise in rises.items()
              if rise.n and protocol != "corrected"]  # older logs don't have it
    causal = f"with the causal pool it {_with_size(rises['corrected'], DEPENDS)}"
    return [f"What the sequence pool does to the Controller's lead ({lead}), against the causal one: "
            f"{'; '.join(_in_both_columns(effects, ADDS))}.",
            "With the sequence pool, all else `corrected`, an arm like it that reads another text "
            f"{_with_size(other, CONTROLLER_WORDS)}.",
            "When a block's second half is replaced, the next-token loss on its first half "
            f"{'; '.join([*pooled, causal])}."]


def audit_depth(results: Results) -> list[str]:
    """Whether the released rule for the depth makes the reported pattern."""
    table, change, lead = audit.depth_table(results), audit.over_depths(results), "static - Controller"
    if table.empty or not _flipped(results, "depth"):
        return []

    def said(protocol: str, arm: str, words: Words) -> str:
        return _with_size(interval_of(_row(table, protocol=protocol, arm=arm), change), words)

    return [f"{change}, `released`: the Controller's depths are one run, so its loss can't depend on depth; `static` "
            f"{said('released', 'static', DEEPER)}. With one rule for both, all else as released, the Controller "
            f"{said('released+depth', 'controller', DEEPER)}.",
            f"The Controller's lead ({lead}) {said('released', lead, SHRINKS)} under `released`. With one rule for "
            f"both, all else as released, it {said('released+depth', lead, SHRINKS)}.",
            f"It {said('corrected', lead, SHRINKS)} under `corrected`; with the released rule alone it "
            f"{said('corrected+depth', lead, SHRINKS)}."]


def audit_reference(results: Results) -> list[str]:
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
    still, others = known[known["moved"] == 0], known[known["moved"] > 0]["moved"]
    said = []
    if len(still):
        arms = "; ".join(f"of `{arm}`, {len(rows)}" for arm, rows in still.groupby("arm", sort=False))
        said.append(f"no element moved in {len(still)} tensors ({arms})")
    if len(others):
        said.append(f"at least {others.min():.1%} of each of {len(others)}{' other' * bool(len(still))} tensors moved")
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
                at = {f"depth {row['depth']}": interval_of(row, lead) for row in rows.to_dict("records")}
                parts.append(f"With {rates} rates ({' and '.join(pair)}{' for both arms' * (len(pair) == 1)}), "
                             f"{_listed(at, STATIC_WORDS).removeprefix('The ')}.")
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


def audit_diverged(results: Results) -> str:
    """Which runs of the audit have no loss."""
    names = sorted(name for name, run in results.runs.items()
                   if "+" in name and run.manifest["status"] == "diverged")
    return f"Runs with a switch flipped that diverged, so that no table has their loss: {', '.join(names) or 'none'}."


SWITCH_SENTENCES = {"target": audit_target, "depth": audit_depth, "pooling": audit_pooling,
                    "precision": audit_precision, "rate": audit_rate, "reference": audit_reference}
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


def audit_answer(results: Results) -> list[str]:
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
            + compared(lora, "the loop", "LoRA on the cut model"))


def shown_by_depth(leads: dict[int, Interval]) -> str:
    """Controller minus static at the shallowest and the deepest depth."""
    (shallow, first), *deeper = leads.items()
    said = [compared(first, "the Controller", "the static table", f" at depth {shallow}")]
    return ". ".join(said + [compared(found, "the Controller", "the table", f" at depth {depth}")
                             for depth, found in deeper])


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
    if math.isnan(two - one):
        return "The full model on the next token and on the one after it: not run yet"
    return (f"On the token after the next the full model's loss is {abs(two - one):.2f} nats "
            f"{'higher' if two > one else 'lower'} than on the next token")


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
