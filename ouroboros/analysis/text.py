"""Every sentence that is generated for a notebook, in the notebooks' order (11's: audit_summary.py), and for figures.

Never imports torch. A sentence says no more than its intervals do. Where a direction can flip, all its phrases are
written: for an interval above 0, below 0, and one that leaves it open.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import pandas as pd

from ..experiment.arms import ARMS
from ..experiment.protocol import COLUMNS, switches
from . import reference_losses, reported, statistics
from .comparisons import BLIND, DRAWN, LOOPS, Comparisons, draws_depths
from .ledger import Claim
from .results import Results, shown_depth
from .statistics import ALPHA, NOT_JUDGED, NOTHING, BySeed, Interval, family, holm, interval, minus, verdict, verdicts
from .tables import CONVERGED_SLOPE, budget_table, searched_difference, sized

Words = tuple[str, str, str]  # above 0, below 0, open

CUT_WORDS = ("is worse than the cut model", "is better than the cut model", "is indistinguishable from the cut model")
CONTROLLER_WORDS = ("is behind the Controller", "is ahead of the Controller",
                    "is indistinguishable from the Controller")
STATIC_WORDS = ("the Controller is ahead", "static is ahead", "the two are indistinguishable")
DEEPER = ("the loss is higher", "the loss is lower", "no detectable change of the loss")
ADDED = ("raises the loss", "lowers the loss", "no detectable effect on the loss")
NEEDED = ("the loss rises, so the trained model relies on what it sees", "the loss falls",
          "no detectable change of the loss")
SHOWN = {"other_sequence": "shown another sequence's state", "corpus_mean": "shown the mean state at each step",
         "step_mean": "replaced by its own mean vector at each step"}
TURNS = 0.9  # a least change below this share of the first and the last one is said
NOT_RUN, NO_RUN, TOO_FEW = "not run yet", "no finished run", "too few seeds to judge"
COMPARED = {  # what a difference of losses, the first's minus the second's, says of the two
    NOT_RUN: "not run yet: {first} against {second}{where}",
    statistics.EQUIVALENT: "{first} and {second} are equivalent{where}",
    statistics.UNDECIDED: "no detectable difference between {first} and {second}{where}",
    statistics.BETTER: "{first} is {size} nats ahead of {second}{where}",
    statistics.WORSE: "{first} is {size} nats behind {second}{where}",
}


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


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def _listed(found: Comparisons, where: str, parts: dict[str, BySeed], words: Words, corrected: bool = True) -> str:
    """A family's parts by the phrase that each one's interval allows after Holm's correction (or by itself, where the
    table has it so), each with its mean: a sentence a phrase; then the runs that were asked for and diverged."""
    intervals, said = family(parts), {}
    adjusted = holm({part: each.p for part, each in intervals.items() if each.judged}) if corrected else {}
    for part, each in intervals.items():
        size = f" ({str(each).partition(' ')[0]})" if each.n else ""  # the interval stands in the table
        said.setdefault(phrase(each, words, adjusted.get(part)).removeprefix("is "), []).append(part + size)
    if set(said) <= {NO_RUN}:
        return f"`{found.protocol}`, {where}: {NO_RUN}.{_lost(found)}"
    listed = ". ".join(f"{_capital(answer)}: {', '.join(those)}" for answer, those in said.items())
    return f"`{found.protocol}`, {where}. {listed}.{_lost(found)}"


def _lost(found: Comparisons) -> str:
    """The runs that were asked for and diverged, as a sentence of their own."""
    names = ", ".join(f"`{name}`" for name in sorted(found.diverged))
    return f" Diverged, so in no mean: {names}." if names else ""


def by_protocol(sentence: Callable[[Results, str], str], results: Results) -> list[str]:
    """One of the sentences below under each protocol, `corrected` first."""
    return [sentence(results, protocol) for protocol in results.profile.protocols[::-1]]


def planned(results: Results, *arms: str) -> str:
    """How many runs of some arms are planned in whole columns and not run; nothing where all are there."""
    return missing_of(results, {cell.run.id for cell in results.profile.cells()
                                if cell.arm in arms and cell.protocol in COLUMNS})


def missing_of(results: Results, wanted: set[str]) -> str:
    """How many of some runs aren't there."""
    if not wanted:
        return "Not planned at this profile."
    missing = len(wanted - set(results.runs))
    return f"{_capital(NOT_RUN)}: {missing} of {len(wanted)} planned runs." if missing else ""


# ------------------------------------------------------------------------------------------- 01, what a target is worth

def targets(results: Results) -> list[str]:
    """What size of loss a target gives, and what the cut costs."""
    table = reference_losses.levels_table(results).set_index(["split", "target"]).loc["heldout"]
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


def arithmetic(claims: Sequence[Claim] | None = None) -> list[str]:
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
            f"From the losses of the abstract to those of 12 other passages the full model's changes by "
            f"{value['full model, passages - abstract']}, the cut model's by "
            f"{value['cut model, passages - abstract']}. {suggested}",
            "On the passages, the only text that is known to be the same for all three losses, gap recovery is "
            f"{value['gap recovery on the passages']}."]


# ------------------------------------------------------------------------------------------ 02 to 09, the method

def _shown_depth(found: Comparisons) -> int:
    """The depth that sentences are about; where a protocol's plan doesn't have it, the deepest that it has."""
    depth, own = shown_depth(found.results), found.depths_of("controller")
    return depth if depth in own or not own else max(own)


def _loop_at(found: Comparisons, depth: int) -> str:
    """How many passes the Controller's loop makes under a protocol."""
    return f"with {DRAWN}" if draws_depths("controller", found.protocol) else f"at depth {depth}"


def gap(results: Results, protocol: str) -> str:
    """What cutting costs and what comes back at the depth shown."""
    found = Comparisons(results, protocol)
    depth = _shown_depth(found)
    cost, gained = (interval(found.difference(*pair, depth=depth)) for pair in (("cut", "full"), ("controller", "cut")))
    said = f"`{protocol}`: cutting costs {sized(cost)} nats per token."
    if switches(protocol)["target"] == "t+2":
        said = (f"`{protocol}`: the cut model, two tokens ahead, minus the full one, on the next token, is "
                f"{sized(cost)} nats per token: of two targets, so not what cutting costs.")
    if gained.n == 0:
        return f"{said} The Controller has {NO_RUN}."
    return (f"{said} The Controller {_loop_at(found, depth)} "
            f"{phrase(gained, CUT_WORDS)} ({sized(gained)}). Its gap recovery in percent: "
            f"{sized(interval(found.recovery('controller', depth)))}.{_lost(found)}")


def advantage(results: Results, protocol: str) -> str:
    """Controller against static at each depth."""
    found = Comparisons(results, protocol)
    drawn = f", its {DRAWN}" if draws_depths("controller", protocol) else ""
    return _listed(found, f"static - Controller{drawn}", found.compare("static", "controller", by="depth"),
                   STATIC_WORDS)


def by_rate(results: Results) -> list[str]:
    """Static against the Controller at each rate that both were searched at: a sentence a search."""
    return [f"Static - Controller on `dev` at depth {depth}, {updates} updates, one spare seed: "
            + ", ".join(f"{lead:+.3f} ({name.replace('dev loss at', 'rate')})" for name, lead in leads.items()) + "."
            for (depth, updates), leads in searched_difference(results, "static", "controller").items()]


def gate(results: Results, protocol: str) -> str:
    """The loop with and without gate and step norms, against the cut model."""
    found, planned_at = Comparisons(results, protocol), results.profile.depths_of
    drawn = draws_depths("controller", protocol)  # one run of all depths
    against = {ARMS[arm].label + ("" if drawn else f", depth {depth}"): found.difference(arm, "cut", depth=depth)
               for depth in planned_at("controller_nogate")
               for arm in ("controller", "controller_nogate", "controller_nogate_nonorm") if depth in planned_at(arm)}
    return _listed(found, "arm - cut", against, CUT_WORDS, corrected=False)


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
    if draws_depths("controller", protocol):
        spread = "0, since they are one run"
    others = "" if results.profile.ranks or results.profile.levels else " Other ranks and rates aren't planned."
    return (f"`{protocol}`: of {len(leads)} configurations with three seeds or more the Controller is ahead in "
            f"{len(ahead)} ({', '.join(ahead) or 'none'}), static in {len(behind)} ({', '.join(behind) or 'none'}). "
            f"Over them the Controller's largest minus its smallest loss is {spread}.{others}{_lost(found)}")


def parts(results: Results, depth: int) -> str:
    """What each part of the loop adds to the loss at one depth."""
    found = Comparisons(results, "corrected")
    added = {name.replace(", to ", " to "): values for name, values in found.steps(depth).items()}
    return _listed(found, f"depth {depth}, a part added", added, ADDED)


def _against(found: Comparisons, arms: Iterable[str], other: str, depth: int, words: Words) -> str:
    """Some arms minus another one; where it loops, at a depth."""
    against = {ARMS[arm].label: values for arm, values in found.against(arms, other, depth).items()}
    at = f" at depth {depth}" if ARMS[other].loops else ""
    return _listed(found, f"arm - {ARMS[other].label.removeprefix('the ')}{at}", against, words)


def blind(results: Results, depth: int) -> str:
    """Whether the Controller's input is worth anything at equal capacity."""
    return _against(Comparisons(results, "corrected"), BLIND, "controller", depth, CONTROLLER_WORDS)


def instead(results: Results) -> list[str]:
    """What one would do instead of looping, against the cut model and the Controller."""
    return [_against(Comparisons(results, "corrected"), results.profile.instead, other, shown_depth(results), words)
            for other, words in (("cut", CUT_WORDS), ("controller", CONTROLLER_WORDS))]


def by_text(results: Results, protocol: str) -> str:
    """Where the Controller's gain over the cut model is found: new training text, held-out, foreign."""
    found = Comparisons(results, protocol)
    depth = _shown_depth(found)
    return _listed(found, f"Controller {_loop_at(found, depth)}, by kind of text",
                   found.compare("controller", "cut", by="text", depth=depth), CUT_WORDS)


def newer(results: Results, protocol: str) -> str:
    """Whether a verdict on held-out text is another one on text that is newer than the base."""
    found = Comparisons(results, protocol)
    pairs = {"Controller - cut": ("controller", "cut"), "static - Controller": ("static", "controller"),
             "LoRA - Controller": ("lora", "controller"), "Controller - token pairs": ("controller", "bigram_seen")}

    def judged_on(split: str) -> dict[str, str]:
        return verdicts(family({f"{name}, {depth}": part for name, pair in pairs.items()
                                for depth, part in found.compare(*pair, by="depth", column=split).items()}))

    old, new = judged_on("heldout"), judged_on("newer")
    judged = [name for name in old if NOT_JUDGED not in (old[name], new[name])]
    if not judged:
        return f"`{protocol}`: no comparison with three seeds is scored on newer text."
    differ = [f"{name} ({old[name]} on held-out, {new[name]} on newer text)"
              for name in judged if old[name] != new[name]]
    named = [name for name in pairs if any(each.startswith(name) for each in judged)]
    same = (f"`{protocol}`: {len(judged) - len(differ)} of {len(judged)} verdicts on held-out text are the same on "
            f"text that is newer than the base ({', '.join(named)}; at each depth).")
    return f"{same} Others: {'; '.join(differ)}." if differ else same


def passages(results: Results) -> str:
    """On the nearest to the paper's twelve passages that there is here, where one set of texts has every loss."""
    wanted = {"full": ("full", "corrected"), "cut": ("cut", "corrected")} | {
        f"the Controller's loop under `{protocol}`": ("controller", protocol)
        for protocol in results.profile.protocols[::-1]}
    losses = {}
    for name, (arm, protocol) in wanted.items():
        found = Comparisons(results, protocol)
        losses[name] = [run.last("reference", "loss_t+1", math.nan) for run in found.runs_of(arm, _shown_depth(found))]
    mean = {name: sum(each) / len(each) for name, each in losses.items() if each}
    if len(mean) < len(wanted) or math.isnan(sum(mean.values())) or mean["cut"] <= mean["full"]:
        return ""
    full, cut = mean.pop("full"), mean.pop("cut")
    listed = ", ".join(f"{loss:.2f} of {name} (wins back {100 * (cut - loss) / (cut - full):.0f} %, "
                       f"n = {len(losses[name])})" for name, loss in mean.items())
    return (f"On the openings of 12 held-out documents, which stand for the paper's 12 passages: next-token loss "
            f"{full:.2f} of the full model, {cut:.2f} of the cut one; {listed}.")


def other_depths(results: Results) -> str:
    """What the Controller's runs of the base depth lose or gain when they are scored at other depths."""
    found, base = Comparisons(results, "corrected"), results.profile.depth
    losses = found.at_other_depths("controller")
    own = losses.pop(f"depth {base}", BySeed())
    against = {f"at {depth}": minus(part, own) for depth, part in losses.items()}
    return _listed(found, f"the Controller trained at depth {base}, scored at another", against, DEEPER)


def matched(results: Results) -> str:
    """Loops whose step norms begin at the stream's size, minus the same that begin at 1."""
    found = Comparisons(results, "corrected")
    against = {f"{ARMS[arm].label}, depth {depth}": found.difference(f"{arm}_matched", arm, depth=depth)
               for arm in LOOPS for depth in found.results.profile.depths_of(f"{arm}_matched")}
    return _listed(found, "step norms that begin at the stream's size, minus at 1", against, ADDED) if against else ""


def coda(results: Results) -> str:
    """The Controller's loop with its coda trained too."""
    found, depth = Comparisons(results, "corrected"), results.profile.depth
    against = {ARMS[arm].label: values for arm, values in found.coda(depth).items()}
    return _listed(found, f"depth {depth} (arm - cut model)", against, CUT_WORDS) if against else \
        "`corrected`: this profile has no arm whose coda is trained."


def interventions(results: Results, protocol: str) -> str:
    """Whether the Controller's input matters, from the interventions at the shallowest depth and at the one shown."""
    found = Comparisons(results, protocol)
    shown = _shown_depth(found)
    return " ".join(
        _listed(found, _loop_at(found, depth).removeprefix("at "),
                {SHOWN[kind]: rise for kind, rise in found.interventions(depth).items()}, NEEDED)
        for depth in dict.fromkeys((min(found.depths_of("controller"), default=shown), shown)))


# --------------------------------------------------------------------- what a figure shows: its title and alt text

def few(found: Interval) -> str:
    """What is said beside a size that fewer than three seeds have."""
    return "" if found.judged else f" (n = {found.n}, too few to judge)"


def compared(found: Interval, first: str, second: str, where: str = "") -> str:
    """Who of two has the lower loss, and by how much, from the first's minus the second's."""
    said = NOT_RUN if found.n == 0 else verdict(found).partition(" within")[0]
    if said == NOT_JUDGED:
        said, where = statistics.WORSE if found.mean > 0 else statistics.BETTER, f"{where}{few(found)}"
    size = str(found).partition(" ")[0].removeprefix("-")  # to the digits that its interval allows
    if math.isnan(found.low):
        size = f"{abs(found.mean):.2g}"
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
    """By how much the Controller's first and last step change the state, and the one between that changes it least."""
    if not changes:
        return f"The steps of the Controller at depth {depth}: {NOT_RUN}"
    means = [each.mean for each in changes]
    first, least, last = means[0], min(means), means[-1]
    said = f"From step 1 to step {len(means)} the share of its state that the Controller's loop changes "
    if least < TURNS * min(first, last):
        turn = f"{least:.2g} at step {means.index(least) + 1} and rises to {last:.2g}"
        return f"{said}falls from {first:.2g} to {turn}{few(changes[-1])}"
    return f"{said}{'falls' if last < first else 'rises'} from {first:.2g} to {last:.2g}{few(changes[-1])}"


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
    if not alone:
        return f"The Controller's lead, switch by switch: {NOT_RUN}"
    judged = [each for each in alone if each[2].judged]
    switch, column, effect = max(judged or alone,
                                 key=lambda each: abs(each[2].mean) if each[2].side or not judged else 0)
    if judged and not effect.side:
        return "No switch has a detectable effect on the Controller's lead over the static table"
    return (f"Of the switches, {switch} changes the Controller's lead over the static table most: by "
            f"{effect.mean:+.2g} % of the gap, all else {column}{few(effect)}")


def budgets(results: Results) -> list[str]:
    """What of the differences between arms lasts with more tokens; nothing where the plan has one budget."""
    table, lines = budget_table(results), []
    tokens = table.groupby(["difference", "depth"])["tokens"]  # not all have every budget
    for (depth, few, many), rows in table.groupby(["depth", tokens.transform("min"), tokens.transform("max")]):
        told: dict[str, list[str]] = {}
        for name, part in rows.groupby("difference", sort=False):
            if len(part) > 1:
                first, *_, last = part["nats"]
                told.setdefault(part["told"].iloc[-1], []).append(f"`{name}` ({first:+.2g} to {last:+.2g} nats)")
        if told:
            lines.append(f"`corrected`, depth {depth}, from {few:,} to {many:,} tokens: " + "; ".join(
                f"{words}: {', '.join(names)}" for words, names in told.items()) + ".")
    return lines


def shown_budgets(table: pd.DataFrame) -> str:
    """How many differences are settled, and which change sign, in `tables.budget_table`."""
    several = table[table.duplicated(["difference", "depth"], keep=False)].drop_duplicates(["difference", "depth"])
    if several.empty:
        return f"Larger budgets: {NOT_RUN}"
    turned = several[several["told"].str.startswith("changes sign")]
    which = f"these change sign: {', '.join(turned['difference'])}" if len(turned) else "none changes sign"
    return (f"With more tokens {several['told'].str.startswith('settled').sum()} of {len(several)} differences are "
            f"settled, {which}")
