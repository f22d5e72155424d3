"""Verdicts: each claim of the ledger judged on the raw logs, and what was found in words. No torch.

`claims.yaml`, which `ledger.py` reads, holds what is reported and the rule that judges it.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from ..errors import InputError
from ..experiment.arms import ARMS
from ..experiment.plan import Cell
from ..experiment.profile import Profile
from ..experiment.protocol import switches
from ..experiment.rates import search_of
from . import comparison, intervals, tables
from .comparison import MARGIN, MARGIN_SHARE, margin
from .intervals import FEWEST, BySeed, Interval, Ratio, minus
from .ledger import PAPER_RANK, STATISTICS, Claim, Measure, load, recomputed, reported
from .metrics import Results, Statistics

SMALL_SHARE = 0.05  # of the Controller's loss reduction: what the rule `small` lets pass
REPORTED_SCALE = "paper"
SMOKE = "**smoke: not a result.** "
SOURCES = ("A: the paper's abstract; R: README of the authors' release; C: its code; D: a third "
           "party's digest of the full text, secondary where it is alone")
RULES = {  # as docs/claims.md says them
    "value": "the reported value, at profile `paper` only",
    "positive": "above 0 in every part",
    "negative": "below 0 in every part",
    "small": f"within {100 * SMALL_SHARE:g} % of the Controller's loss reduction",
    "count": "exact, counted on the model",
}


@dataclass(frozen=True)
class Judged:
    """A claim under one protocol: the interval of each part, the verdict and why."""

    parts: dict[str, Interval]
    verdict: str
    why: str


def measured(measure: Measure, statistics: Statistics) -> dict[str, BySeed | Ratio]:
    """The parts of a measure on the runs of one profile and protocol. An arm or a rank that isn't
    there has no seeds."""
    profile = statistics.results.profile
    if not all(arm in ARMS for arm in measure.arms):
        return {"": {}}
    options = measure.model_dump(exclude={"statistic", "baseline"}, exclude_none=True)
    if measure.rank:
        options["rank"] = _scaled(measure.rank, profile)
        if options["rank"] is None:
            return {"": {}}
    if measure.statistic == "against":
        baseline = statistics.loss(measure.baseline)[""]
        return {"": minus(statistics.loss(**options)[""], baseline)}
    return getattr(statistics, measure.statistic)(**options)


def _scaled(rank: int, profile: Profile) -> int | None:
    """A rank of the paper at a profile's base rank; None where that is no whole number."""
    scaled, rest = divmod(rank * profile.rank, PAPER_RANK)
    return None if rest else scaled


def _draws_depths(arm: str, protocol: str) -> bool:
    """Whether the protocol makes one run of all depths of an arm (protocol.md `depth`)."""
    if not ARMS[arm].loops:
        return False
    one, other = (Cell(arm, depth, None, protocol, 0).run for depth in (1, 2))
    return one == other


def judge(claim: Claim, results: Results, protocol: str) -> Judged:
    """Judge one claim by its rule on the measured parts of one protocol."""
    if claim.rule == "count":
        return Judged({}, "holds", "counted on the model at the paper's shape, in the tests")
    if claim.measure is None:
        return Judged({}, "no runs", claim.unmeasured)
    statistics = Statistics(results, protocol)
    by_part = measured(claim.measure, statistics)
    parts = comparison.family(by_part)
    verdict, why = _verdict(claim, parts, statistics)
    signed = claim.rule in ("positive", "negative")
    if signed and statistics.diverged and verdict.split()[0] in ("holds", "fails"):
        verdict, why = _with_diverged(claim, results, protocol, verdict, why)
    loops = [arm for arm in claim.measure.arms if arm in ARMS and ARMS[arm].loops]
    one_run = len(parts) > 1 and all(_draws_depths(arm, protocol) for arm in loops)
    if one_run and verdict.split()[0] in ("holds", "fails"):
        why += "; every part is the same run, so this is one measurement"
    note = claim.notes.get(protocol)
    return Judged(parts, verdict, why + (f"; {note}" if note else "") + _norms(claim, statistics)
                  + _diverged(statistics))


def _norms(claim: Claim, statistics: Statistics) -> str:
    """Which of a claim's arms ended with step norms far from the stream that they read, at any depth."""
    known = [arm for arm in claim.measure.arms if arm in ARMS and ARMS[arm].loops]
    depths = {arm: statistics.results.profile.depths_of(arm) for arm in known}
    short = [arm for arm in known if any(statistics.norms_converged(arm, depth) is False for depth in depths[arm])]
    return f"; norms not converged: {', '.join(f'`{arm}`' for arm in short)}" if short else ""


def _diverged(statistics: Statistics) -> str:
    names = sorted(statistics.diverged)
    return f"; diverged, so in no mean: {', '.join(f'`{name}`' for name in names)}" if names else ""


def _with_diverged(claim: Claim, results: Results, protocol: str, verdict: str,
                   why: str) -> tuple[str, str]:
    """A verdict of the runs that are left stands if the diverged ones, as endless losses, say the same."""
    with np.errstate(invalid="ignore"):
        parts = measured(claim.measure, Statistics(results, protocol, endless=True))
    claimed = 1 if claim.rule == "positive" else -1
    signs = {claimed * math.copysign(1, value) for values in parts.values() for value in values.values()
             if math.isinf(value)}
    expected = 1 if verdict.startswith("holds") else -1
    if signs <= {expected}:
        return verdict, why
    return "undecided", f"{why}, but a diverged run, which has no loss, says otherwise"


def _verdict(claim: Claim, parts: dict[str, Interval], statistics: Statistics) -> tuple[str, str]:
    rule, results, protocol = claim.rule, statistics.results, statistics.protocol
    if any(interval.n == 0 for interval in parts.values()):
        if statistics.diverged:
            return "undecided", "a part has no finished run"
        return "no runs", "no run of this profile measures " + ("it" if len(parts) == 1 else "all of its parts")
    if claim.measure.of_depths and _draws_depths(claim.measure.arm, protocol):
        return "by construction", "this protocol draws the depth itself, so all depths are one run"
    if rule == "value" and results.profile.name != REPORTED_SCALE:
        return "not testable at this scale", "an absolute value of the paper's own model"
    if not all(interval.judged for interval in parts.values()):
        return "undecided", f"fewer than {FEWEST} seeds finished"
    if rule == "value":
        half = 0.5 * 10.0 ** -claim.decimals  # a reported value is meant to its last digit
        low, high = min(claim.numbers) - half, max(claim.numbers) + half
        return _by_intervals(parts, lambda i: i.low <= high and low <= i.high, lambda i: i.high < low or high < i.low,
                             "an interval that meets the reported value")
    if rule == "small":
        shallowest = results.profile.depths[0]
        gained = comparison.interval(Statistics(results, protocol).against_cut("controller", shallowest)[""])
        if not gained.high < 0:
            return "not applicable", "the Controller isn't told to lower the loss, so no share of that can be small"
        bound = SMALL_SHARE * -gained.mean
        return _by_intervals(parts, lambda i: -bound < i.low and i.high < bound,
                             lambda i: i.high < -bound or bound < i.low, f"+-{bound:.3g} around 0")
    sign = 1 if rule == "positive" else -1
    # all parts must hold, so each may be asked at 95 %; that one of several contradicts is asked after Holm
    adjusted = intervals.holm({name: interval.p for name, interval in parts.items()})
    family = {name: replace(interval, p=adjusted[name]) for name, interval in parts.items()}
    verdict, why = _by_intervals(family, lambda i: i.side == sign,
                                 lambda i: sign * i.mean < 0 and i.p < 1 - intervals.LEVEL,
                                 "above 0" if sign == 1 else "below 0")
    return _with_margin(verdict, why, family)


def _with_margin(verdict: str, why: str, parts: dict[str, Interval]) -> tuple[str, str]:
    """A verdict on signs, with what of it is too small to matter: two one-sided tests against the margin."""
    small = [name for name, interval in parts.items() if interval.small]
    if not small:
        return verdict, why
    at = "" if len(parts) == 1 else f" at: {', '.join(small)}"
    bound = min(interval.margin for interval in parts.values())
    why += f"; smaller than the margin of {bound:.2g} nats{at}"
    if len(small) < len(parts):
        return verdict, why
    return "equivalent" if verdict == "undecided" else f"{verdict} within the margin", why


def _by_intervals(parts, holds, fails, claimed: str) -> tuple[str, str]:
    """holds: every part does; fails: one part's whole interval contradicts; undecided: between."""
    failing = [name for name, interval in parts.items() if fails(interval)]
    open_ = [name for name, interval in parts.items() if not fails(interval) and not holds(interval)]
    at = "" if len(parts) == 1 else f" at: {', '.join(failing or open_)}"
    if failing:
        return "fails", f"claimed {claimed}; the whole interval contradicts it{at}"
    if open_:
        alone = [name for name in open_ if parts[name].p >= 1 - intervals.LEVEL and (parts[name].low > 0 or
                                                                                    parts[name].high < 0)]
        before = f"; before Holm's correction it is contradicted at: {', '.join(alone)}" if alone else ""
        return "undecided", f"claimed {claimed}; the interval leaves it open{at}{before}"
    return "holds", f"claimed {claimed}; " + ("the interval lies there" if len(parts) == 1 else "every interval does")


def ledger(results: Results) -> pd.DataFrame:
    """One row a claim and protocol: what is reported, recomputed and measured, the verdict and why."""
    return with_runs(results).drop(columns="runs")


def with_runs(results: Results) -> pd.DataFrame:
    """The ledger with the runs that each row was read from."""
    return pd.DataFrame([row for claim in load() for row in records(claim, results)])


def records(claim: Claim, results: Results) -> list[dict]:
    """A claim's rows of the ledger, one a protocol, with the runs that were read."""
    again, rows = recomputed(claim, load()), []
    for protocol in results.profile.protocols:
        with results.reading() as read:
            judged = judge(claim, results, protocol)
        rows.append({
            "id": claim.id, "claim": claim.what, "reported": claim.told, "source": claim.sources,
            "recomputed": "" if again is None else f"{again:.{claim.decimals}f}", "protocol": protocol,
            "measured": "; ".join(f"{name}: {i}" if name else str(i) for name, i in judged.parts.items()),
            "verdict": judged.verdict, "why": judged.why, "runs": " ".join(sorted(read))})
    return rows


def _searched(results: Results) -> int:
    """The depth at which the Controller's rate was searched first."""
    return search_of("controller", None, results.profile)[0].depth


def _covered(results: Results) -> str:
    if results.clusters:
        return "training seeds and, of losses on held-out text, evaluation documents (docs/statistics.md)"
    return "training seeds, not the choice of evaluation blocks"


def markdown(results: Results) -> str:
    """The whole of claims.md: verdicts in a small table, a section a claim on signs and trends, values folded away."""
    made = results.cells.drop_duplicates("run")["status"].value_counts()
    counts = ", ".join(f"{made[s]} {s}" for s in ("finished", "diverged", "missing") if s in made)
    mark = SMOKE if results.profile.name == "smoke" else ""
    frame = with_runs(results)
    values = frame["id"].isin([claim.id for claim in load() if claim.rule in ("value", "count")])
    verdicts = frame[~values].pivot(index="id", columns="protocol", values="verdict")
    order = frame[~values]["id"].drop_duplicates()
    table = verdicts.loc[order, [*results.profile.protocols]].reset_index()
    table["id"] = [f"[{name}](#{name})" for name in table["id"]]
    sections = [_section(rows) for _, rows in frame[~values].groupby("id", sort=False)]
    return "\n".join([
        f"# Claims at profile `{results.profile.name}`", "",
        f"{mark}Generated from the raw logs; runs of the matrix: {counts}. Sources: {SOURCES}. Measured values are "
        f"means over seeds with paired 95 % intervals, nats per token unless said otherwise; the intervals cover "
        f"{_covered(results)}. Under `corrected` an arm trains at the rates that are best on `dev` at depth "
        f"{_searched(results)} with a spare seed. The rules, `ouroboros/analysis/claims.yaml`, were written before the "
        "runs but for what is dated there. Every row as data: [tables/claims.csv](tables/claims.csv).", "",
        table.to_markdown(index=False, disable_numparse=True), "", *sections,
        "## Values of the paper's own model", "",
        f"They are judged at profile `{REPORTED_SCALE}` only; what was measured here stands beside them.", "",
        "<details><summary>all of them</summary>", "", _values(frame[values]), "", "</details>", ""])


def _section(rows: pd.DataFrame) -> str:
    """A claim: what is reported, and under each protocol the verdict, what was measured, why, the runs."""
    first = rows.iloc[0]
    lines = [f"## {first['id']}", "", f"{first['claim'][0].upper()}{first['claim'][1:]}. Reported: {first['reported']} "
             f"(source {first['source']}).", ""]
    for row in rows.to_dict("records"):
        measured = f" {row['measured']}." if row["verdict"] != row["measured"] else ""
        lines += [f"- **`{row['protocol']}`: {row['verdict']}.**{measured} {row['why'][0].upper()}{row['why'][1:]}."]
        if row["runs"]:
            links = ", ".join(f"[{name}](runs/{name}.jsonl)" for name in row["runs"].split())
            lines += [f"  <details><summary>{len(row['runs'].split())} runs</summary>{links}</details>"]
    return "\n".join([*lines, ""])


def _values(rows: pd.DataFrame) -> str:
    """The absolute values, protocols side by side."""
    shown = rows.assign(measured=rows["measured"].where(rows["measured"] != "", rows["why"]))
    plain = shown["verdict"].str.startswith("not testable") | (shown["verdict"] == shown["measured"])
    shown = shown.assign(cell=shown["measured"].where(plain, shown["verdict"] + ": " + shown["measured"]))
    table = shown.pivot(index="id", columns="protocol", values="cell")
    first = rows.drop_duplicates("id").set_index("id")[["claim", "reported", "recomputed", "source"]]
    return first.join(table).reset_index().to_markdown(index=False, disable_numparse=True)


def one(name: str, results: Results) -> str:
    """A claim of one profile as text: what is reported, the rule, its formula, verdicts, and the runs behind them.
    Raises InputError for an id that no claim has."""
    claim = find(name)
    rows = records(claim, results)
    lines = [f"{claim.id}: {claim.what}", f"reported: {claim.told}; source {claim.sources}",
             f"judged by: {_judged_by(claim)}; rule: {RULES[claim.rule]}"]
    if rows[0]["recomputed"] and claim.recompute.of:
        lines.append(f"formula: {claim.recompute.function} of {', '.join(claim.recompute.of)}; of the reported values "
                     f"{rows[0]['recomputed']}")
    for row in rows:
        lines += [f"\n{row['protocol']}: {row['verdict']}", f"  measured: {row['measured'] or 'nothing'}",
                  f"  why: {row['why']}", *(f"  results/{results.profile.name}/runs/{run}.jsonl"
                                            for run in row["runs"].split())]
    return "\n".join(lines)


def find(name: str) -> Claim:
    """The claim of an id. Raises InputError naming those that there are."""
    claims = {claim.id: claim for claim in load()}
    if name not in claims:
        raise InputError(f"claim '{name}': unknown; one of {', '.join(claims)}")
    return claims[name]


# -------------------------------------------------------------------------------------------- sheet

def sheet() -> pd.DataFrame:
    """What will be judged and how, before any run: one row a claim, nothing measured."""
    rows = [{"id": claim.id, "claim": claim.what, "source": claim.sources,
             "reported": claim.told, "open": claim.unsupported or claim.open or "",
             "judged by": _judged_by(claim), "rule": RULES[claim.rule], "margin": _margin(claim)}
            for claim in load()]
    return pd.DataFrame(rows)


def _judged_by(claim: Claim) -> str:
    """The arms and runs that a claim's measure reads."""
    measure = claim.measure
    if measure is None:
        return f"nothing yet: {claim.unmeasured}" if claim.unmeasured else "the model, not trained"
    own, (_, over) = [], STATISTICS[measure.statistic]
    if measure.depth:
        own.append(f"depth {measure.depth}")
    if measure.rank:
        own.append(f"rank {measure.rank} (base rank {PAPER_RANK})")
    if over:
        own.append(over)
    loops = any(arm not in ARMS or ARMS[arm].loops for arm in measure.arms)
    where = f"; {', '.join(own) or 'base depth'}" if loops else ""
    return ", ".join(f"`{arm}`" for arm in measure.arms) + where


def _margin(claim: Claim) -> str:
    function = claim.recompute.function if claim.recompute else ""
    if claim.rule == "count":
        return "none"
    share = {"reduction": ", in % of the cut model's loss", "recovery": ", in % of the gap"}
    return f"min({MARGIN:g} nats, {100 * MARGIN_SHARE:g} % of the gap){share.get(function, '')}"


def sheet_markdown() -> str:
    """The whole of docs/claims.md."""
    claims = reported(load())
    gap = claims["L17"] - claims["L36"]
    return f"""# What the paper claims, and how each claim is judged

Made from `ouroboros/analysis/claims.yaml` by `claims.sheet_markdown()`, before and without any run; verdicts
are in `results/<profile>/claims.md`.

- **Source.** {SOURCES}.
  Numbers have the digits of their source.
- **Open.** What no source states about a claim, or why no reported number stands behind it.
- **Judged by.** The arms whose runs are read, each seed paired with itself. Without a depth, the
  profile's base depth; ranks are the paper's, a profile has the same shares of its base rank.
- **Rule.** A sign holds where every part's 95 % interval lies on its side, and fails where one lies
  on the other after Holm's correction over the parts; fewer than three trained seeds judge nothing.
  Where the protocol makes one run of all depths, what a claim says of one arm at a depth, or at
  different depths, is `by construction`.
- **Margin.** Two losses closer than the smaller of {MARGIN:g} nats per token and
  {100 * MARGIN_SHARE:g} % of the gap (cut - full) count as equal; {MARGIN:g} nats where the gap is
  undefined. At the reported gap of {gap:.3f} nats that is {margin(gap):g} nats. A sign whose every
  90 % interval lies within it holds, or fails, `within the margin`; one that is left open so is
  `equivalent`.

{sheet().to_markdown(index=False, disable_numparse=True)}
"""


def summary(*several: Results) -> str:
    """The verdicts on signs, orders and trends as a short table, one row a claim, for one profile or several side by
    side; without those that no profile has run yet."""
    tables = []
    for results in several:
        frame = ledger(results)
        judged = frame[~frame["id"].isin([c.id for c in load() if c.rule in ("value", "count")])].copy()
        judged.loc[judged["why"].str.contains("diverged, so in no mean"), "verdict"] += " (a run diverged)"
        table = judged.pivot(index=["id", "claim"], columns="protocol", values="verdict")
        order = [(row.id, row.claim) for row in judged.drop_duplicates("id").itertuples()]
        name = f"{results.profile.name}, " if len(several) > 1 else ""
        tables.append(table.loc[order, [*results.profile.protocols]].add_prefix(name))
    table = pd.concat(tables, axis=1)
    run = ~table.eq("no runs").all(axis=1)
    return table[run if run.any() else slice(None)].reset_index().drop(columns="id").to_markdown(index=False)


# -------------------------------------------------------------------------------------------------- found, in words

AGAINST_CUT = ("is worse than the cut model", "is better than the cut model", "is indistinguishable from the cut model")
AGAINST_STATIC = ("the Controller is ahead", "static is ahead", "the two are indistinguishable")


def found_gap(results: Results, protocol: str, depth: int | None = None) -> str:
    """One sentence on what cutting costs and what comes back at a depth (the base depth)."""
    statistics, depth = Statistics(results, protocol), depth or results.profile.depth
    cost = comparison.interval(statistics.against_cut("full")[""])
    gained = comparison.interval(statistics.against_cut("controller", depth)[""])
    back = comparison.interval(statistics.recovery("controller", depth)[""])
    return (f"`{protocol}`: full - cut is {cost} nats per token; the Controller at depth {depth} "
            f"{gained.told(*AGAINST_CUT)} ({gained}), a gap recovery in percent of {back}{_diverged(statistics)}.")


def found_advantage(results: Results, protocol: str) -> str:
    """One sentence on Controller against static at each depth."""
    statistics = Statistics(results, protocol)
    parts = comparison.family(statistics.advantage_by_depth())
    words = [f"at {name} {interval.told(*AGAINST_STATIC)} ({interval})" for name, interval in parts.items()]
    return f"`{protocol}` (static - Controller): " + "; ".join(words) + _diverged(statistics) + "."


def found_gate(results: Results, protocol: str) -> str:
    """One sentence on the loop with and without gate and step norms, against the cut model."""
    statistics, words, profile = Statistics(results, protocol), [], results.profile
    for depth in profile.depths_of("controller_nogate"):
        for arm in ("controller", "controller_nogate", "controller_nogate_nonorm"):
            if depth not in profile.depths_of(arm):
                continue
            interval = comparison.interval(statistics.against_cut(arm, depth)[""])
            words.append(f"`{arm}` at depth {depth} {interval.told(*AGAINST_CUT)} ({interval})")
    return f"`{protocol}` (arm - cut): " + "; ".join(words) + _diverged(statistics) + "."


def found_splits(results: Results, protocol: str) -> str:
    """One sentence on where the Controller's gain over the cut model is found: new training text, held-out, foreign."""
    statistics, depth = Statistics(results, protocol), results.profile.depth
    parts = comparison.family(statistics.split_against_cut("controller", depth))
    words = [f"on `{name}` text it {interval.told(*AGAINST_CUT)} ({interval})" for name, interval in parts.items()]
    return f"`{protocol}`, Controller at depth {depth}, next token: " + "; ".join(words) + _diverged(statistics) + "."


def found_newer(results: Results, protocol: str) -> str:
    """Whether a verdict on held-out text is another one on text that is newer than the base."""
    statistics = Statistics(results, protocol)
    old, new = (comparison.verdicts(comparison.family(statistics.on(split))) for split in ("heldout", "newer"))
    judged = [name for name in old if comparison.NOT_JUDGED not in (old[name], new[name])]
    if not judged:
        return f"`{protocol}`: no comparison with three seeds is scored on newer text."
    differ = [f"{name} ({old[name]} on held-out, {new[name]} on newer text)"
              for name in judged if old[name] != new[name]]
    return (f"`{protocol}`: of {len(judged)} comparisons, on text that is newer than the base "
            + (f"{len(differ)} are told otherwise than on held-out text: {'; '.join(differ)}." if differ
               else "none is told otherwise than on held-out text."))


ADDED = ("raises the loss", "lowers the loss", "has no detectable effect on the loss")
AGAINST_CONTROLLER = ("is behind the Controller", "is ahead of the Controller",
                      "is indistinguishable from the Controller")


def _each(parts: dict, words: tuple[str, str, str], name=str) -> str:
    """Each part of a statistic with the phrase that its interval allows, after Holm over the parts."""
    found = comparison.family(parts)
    adjusted = intervals.holm({part: interval.p for part, interval in found.items()})

    def phrase(part: str) -> str:
        return words[2] if adjusted[part] >= 1 - intervals.LEVEL else found[part].told(*words)

    return "; ".join(f"{name(part)} {phrase(part)} ({found[part]})" for part in found)


def _added(statistics: Statistics, depth: int) -> tuple:
    """What adding each part does to the loss, for `_each`: the change, where `bought` is what the part takes off."""
    return ({name: values.negative() for name, values in statistics.bought(depth).items()}, ADDED,
            lambda name: "adding {} to {}".format(*name.split(", to ")))


def found_configurations(results: Results, protocol: str) -> str:
    """One sentence on Controller against static over depths, ranks and rates, and on how far the Controller spreads."""
    statistics = Statistics(results, protocol)
    found = comparison.family(statistics.advantage_by_configuration())
    found = {name: interval for name, interval in found.items() if interval.n > 1}
    ahead = [name for name, interval in found.items() if interval.low > 0]
    behind = [name for name, interval in found.items() if interval.high < 0]
    spread = comparison.interval(statistics.spread("controller")[""])
    spread = "not measured, since some weren't run" if spread.n == 0 else spread
    if switches(protocol)["depth"] == "drawn":
        spread = "0, since they are one run"
    return (f"`{protocol}`: of {len(found)} configurations with two seeds or more the Controller is ahead in "
            f"{len(ahead)} ({', '.join(ahead) or 'none'}), static in {len(behind)} ({', '.join(behind) or 'none'}); "
            f"over them the Controller's largest minus its smallest loss is {spread}{_diverged(statistics)}.")


def found_parts(results: Results, depth: int) -> str:
    """One sentence on what each part of the loop buys at one depth."""
    statistics = Statistics(results, "corrected")
    return (f"`corrected`, depth {depth}: " + _each(*_added(statistics, depth))
            + "; against the cut model, " + _each(statistics.ladder(depth), AGAINST_CUT) + _diverged(statistics) + ".")


def found_blind(results: Results, depth: int) -> str:
    """One sentence on whether the Controller's input is worth anything at equal capacity."""
    statistics = Statistics(results, "corrected")
    return (f"`corrected`, depth {depth} (arm - Controller): "
            + _each(statistics.blind_minus_controller(depth), AGAINST_CONTROLLER, "`{}`".format)
            + _diverged(statistics) + ".")


def found_instead(results: Results) -> str:
    """One sentence on what one would do instead of looping, against the cut model and the Controller."""
    statistics = Statistics(results, "corrected")
    return (f"`corrected`, Controller at depth {results.profile.depth}: "
            + _each(statistics.instead(), AGAINST_CUT, "`{}`".format) + "; beside the Controller, "
            + _each(statistics.instead_minus_controller(), AGAINST_CONTROLLER, "`{}`".format)
            + _diverged(statistics) + ".")


def found_coda(results: Results) -> str:
    """One sentence on the loops with their coda trained."""
    statistics = Statistics(results, "corrected")
    if not any("_coda_" in name for name in statistics.coda(results.profile.depth)):
        return "`corrected`: this profile has no arm whose coda is trained."
    return (f"`corrected`, depth {results.profile.depth}: "
            + _each(statistics.coda(results.profile.depth), AGAINST_CUT, "`{}`".format) + _diverged(statistics) + ".")


NEEDED = ("the loss rises, so the trained model relies on what it sees", "the loss falls",
          "the loss shows no detectable change")


def found_interventions(results: Results, protocol: str) -> str:
    """One sentence on whether the Controller's input matters, generated from the interventions at the base depth."""
    statistics, depth = Statistics(results, protocol), results.profile.depth
    kinds = {"other_sequence": "shown another sequence's state", "corpus_mean": "shown the mean state at each step",
             "step_mean": "replaced by its own mean vector at each step"}
    words = []
    for kind, values in statistics.interventions(depth).items():
        interval = comparison.interval(values)
        words.append(f"{kinds[kind]}, {interval.told(*NEEDED)} ({interval})")
    lead = comparison.interval(statistics.advantage(depth)[""])
    return (f"`{protocol}`, depth {depth}: " + "; ".join(words) + f"; beside it, static - Controller is {lead}"
            + _diverged(statistics) + ".")


def found_converged(results: Results) -> str:
    """Which arms still moved at the end, and why a flat end is no proof: comparisons hold for the budget."""
    table, training = tables.arm_table(results), results.profile.training
    budget = (f"Every arm trained for {training.updates} updates of {training.tokens_per_update} tokens. A flat end "
              "under a rate that has decayed doesn't show that more training would change nothing. ")
    moving = table[table["converged"].eq(False) & table["last_slope"].notna()]
    if table["last_slope"].isna().all():
        return budget + "Too few evaluations in the last fifth of training to say whether any arm has converged."
    if moving.empty:
        return budget + "No arm's held-out loss still moved by more than " \
            f"{tables.CONVERGED_SLOPE:g} nats per token over the last fifth of training."
    names = [f"`{row.arm}` depth {row.depth} {row.protocol} ({row.last_slope:+.3f})" for row in moving.itertuples()]
    return (budget + "Still moving (next-token loss on held-out blocks over the last fifth, nats per token, of "
            "the least settled seed; under a protocol that trains on another target that loss may rise), so their "
            "comparisons hold for this budget only: " + ", ".join(names) + ".")
