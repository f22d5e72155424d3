"""Verdicts: each claim of the ledger judged on the raw logs, as tables and pages. No torch.

`claims.yaml`, which `ledger.py` reads, holds what is reported and the rule that judges it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from ..errors import InputError
from ..experiment.arms import ARMS
from ..experiment.plan import Cell
from ..experiment.rates import search_of
from .comparisons import Comparisons
from .ledger import CHANGES, PAPER_RANK, Claim, Measure, numbers, read_claims, recomputed
from .results import Results
from .statistics import ALPHA, FEWEST, MARGIN, MARGIN_SHARE, BySeed, Interval, Ratio, family, holm, interval, margin

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
VALUES = ("value", "count")  # rules on values of the paper's own model; the others are on signs and trends


@dataclass(frozen=True)
class Judged:
    """A claim under one protocol: the interval of each part, the verdict and why."""

    parts: dict[str, Interval]
    verdict: str
    why: str


def measured(measure: Measure, found: Comparisons) -> dict[str, BySeed | Ratio]:
    """The parts of a measure on the runs of one profile and protocol. An arm or a rank that isn't
    there has no seeds."""
    profile = found.results.profile
    rank, rest = divmod((measure.rank or PAPER_RANK) * profile.rank, PAPER_RANK)
    if rest or not all(arm in ARMS for arm in measure.arms) or (measure.by == "rank" and not profile.ranks):
        return {"": BySeed()}
    at = {"depth": measure.depth} | ({"rank": rank} if measure.rank else {})
    if measure.statistic == "loss":
        return found.compare(measure.arm, measure.minus, by=measure.by, column=measure.column, **at)
    if measure.statistic in CHANGES:
        return found.change(measure.statistic, measure.arm, measure.minus)
    if measure.statistic == "spread":
        return {"": found.spread(measure.arm)}
    return {"": getattr(found, measure.statistic)(measure.arm, **at)}


def _draws_depths(arm: str, protocol: str) -> bool:
    """Whether the protocol makes one run of all depths of an arm (protocol.md `depth`)."""
    one, other = (Cell(arm, depth, None, protocol, 0).run for depth in (1, 2))
    return ARMS[arm].loops and one == other


def judge(claim: Claim, results: Results, protocol: str) -> Judged:
    """Judge one claim by its rule on the measured parts of one protocol."""
    if claim.rule == "count":
        return Judged({}, "holds", "counted on the model at the paper's shape, in the tests")
    if claim.measure is None:
        return Judged({}, "no runs", claim.unmeasured)
    found = Comparisons(results, protocol)
    parts = family(measured(claim.measure, found))
    verdict, why = _verdict(claim, parts, found)
    decided = verdict.split()[0] in ("holds", "fails")
    if decided and claim.rule in ("positive", "negative") and found.diverged and _contradicted(claim, found, verdict):
        verdict, decided, why = "undecided", False, f"{why}, but a diverged run, which has no loss, says otherwise"
    loops = [arm for arm in claim.measure.arms if arm in ARMS and ARMS[arm].loops]
    if decided and len(parts) > 1 and all(_draws_depths(arm, protocol) for arm in loops):
        why += "; every part is the same run, so this is one measurement"
    if protocol in claim.notes:
        why += f"; {claim.notes[protocol]}"
    short = [arm for arm in loops if any(found.norms_converged(arm, depth) is False
                                         for depth in results.profile.depths_of(arm))]
    if short:
        why += f"; norms not converged: {', '.join(f'`{arm}`' for arm in short)}"
    return Judged(parts, verdict, why + in_no_mean(found))


def in_no_mean(found: Comparisons) -> str:
    """The runs that were asked for and diverged, as the end of a sentence."""
    names = sorted(found.diverged)
    return f"; diverged, so in no mean: {', '.join(f'`{name}`' for name in names)}" if names else ""


def _contradicted(claim: Claim, found: Comparisons, verdict: str) -> bool:
    """Whether the diverged runs, as endless losses, say otherwise than the runs that are left."""
    with np.errstate(invalid="ignore"):
        parts = measured(claim.measure, Comparisons(found.results, found.protocol, endless=True))
    claimed = (1 if claim.rule == "positive" else -1) * (1 if verdict.startswith("holds") else -1)
    return any(math.isinf(value) and value * claimed < 0 for part in parts.values() for value in part.values())


def _verdict(claim: Claim, parts: dict[str, Interval], found: Comparisons) -> tuple[str, str]:
    """The verdict of a claim's rule and why; the first of these that applies."""
    profile, protocol = found.results.profile, found.protocol
    if any(part.n == 0 for part in parts.values()):
        if found.diverged:
            return "undecided", "a part has no finished run"
        return "no runs", "no run of this profile measures " + ("it" if len(parts) == 1 else "all of its parts")
    if claim.measure.of_depths and _draws_depths(claim.measure.arm, protocol):
        return "by construction", "this protocol draws the depth itself, so all depths are one run"
    if claim.rule == "value" and profile.name != REPORTED_SCALE:
        return "not testable at this scale", "an absolute value of the paper's own model"
    if not all(part.judged for part in parts.values()):
        return "undecided", f"fewer than {FEWEST} seeds finished"
    if claim.rule == "value":
        half = 0.5 * 10.0 ** -claim.decimals  # a reported value is meant to its last digit
        low, high = min(claim.numbers) - half, max(claim.numbers) + half
        return _by_intervals(parts, lambda i: i.low <= high and low <= i.high, lambda i: i.high < low or high < i.low,
                             "an interval that meets the reported value")
    if claim.rule == "small":
        gained = interval(Comparisons(found.results, protocol).difference("controller", "cut", depth=profile.depths[0]))
        if not gained.high < 0:
            return "not applicable", "the Controller isn't told to lower the loss, so no share of that can be small"
        bound = SMALL_SHARE * -gained.mean
        return _by_intervals(parts, lambda i: -bound < i.low and i.high < bound,
                             lambda i: i.high < -bound or bound < i.low, f"+-{bound:.3g} around 0")
    sign = 1 if claim.rule == "positive" else -1
    # all parts must hold, so each may be asked at 95 %; that one of several contradicts is asked after Holm
    adjusted = holm({name: part.p for name, part in parts.items()})
    parts = {name: replace(part, p=adjusted[name]) for name, part in parts.items()}
    return _with_margin(*_by_intervals(parts, lambda i: i.side == sign, lambda i: sign * i.mean < 0 and i.p < ALPHA,
                                       "above 0" if sign == 1 else "below 0"), parts)


def _by_intervals(parts: dict[str, Interval], holds: Callable, fails: Callable, claimed: str) -> tuple[str, str]:
    """holds: every part does; fails: one part's whole interval contradicts; undecided: between."""
    failing = [name for name, part in parts.items() if fails(part)]
    open_ = [name for name, part in parts.items() if not fails(part) and not holds(part)]
    at = _at(parts, failing or open_)
    if failing:
        return "fails", f"claimed {claimed}; the whole interval contradicts it{at}"
    if open_:
        alone = [name for name in open_ if parts[name].p >= ALPHA and parts[name].side]
        before = f"; before Holm's correction it is contradicted at: {', '.join(alone)}" if alone else ""
        return "undecided", f"claimed {claimed}; the interval leaves it open{at}{before}"
    return "holds", f"claimed {claimed}; " + ("the interval lies there" if len(parts) == 1 else "every interval does")


def _with_margin(verdict: str, why: str, parts: dict[str, Interval]) -> tuple[str, str]:
    """A verdict on signs, with what of it is too small to matter: two one-sided tests against the margin."""
    small = [name for name, part in parts.items() if part.small]
    if not small:
        return verdict, why
    bound = min(part.margin for part in parts.values())
    why += f"; smaller than the margin of {bound:.2g} nats{_at(parts, small)}"
    if len(small) < len(parts):
        return verdict, why
    return "equivalent" if verdict == "undecided" else f"{verdict} within the margin", why


def _at(parts: dict[str, Interval], some: list[str]) -> str:
    return "" if len(parts) == 1 else f" at: {', '.join(some)}"


# ------------------------------------------------------------------------------------------- claims as tables

def records(claim: Claim, results: Results) -> list[dict]:
    """A claim's rows, one a protocol: what is reported, recomputed and measured, the verdict and why, the runs that
    were read."""
    again, rows = recomputed(claim, read_claims()), []
    for protocol in results.profile.protocols:
        with results.reading() as read:
            judged = judge(claim, results, protocol)
        rows.append({
            "id": claim.id, "claim": claim.what, "reported": claim.told, "source": claim.sources,
            "recomputed": "" if again is None else f"{again:.{claim.decimals}f}", "protocol": protocol,
            "measured": "; ".join(f"{name}: {i}" if name else str(i) for name, i in judged.parts.items()),
            "verdict": judged.verdict, "why": judged.why, "runs": " ".join(sorted(read))})
    return rows


def with_runs(results: Results) -> pd.DataFrame:
    """One row a claim and protocol: see `records`."""
    return pd.DataFrame([row for claim in read_claims() for row in records(claim, results)])


def table(results: Results, ids: list[str] | None = None) -> pd.DataFrame:
    """One row a claim, of all or some, and protocol, without the runs."""
    found = with_runs(results).drop(columns="runs")
    return found[found["id"].isin(ids)] if ids else found


def _on_signs(found: pd.DataFrame) -> pd.Series:
    """Which rows are of claims on signs, orders and trends."""
    return ~found["id"].isin([claim.id for claim in read_claims() if claim.rule in VALUES])


def _side_by_side(found: pd.DataFrame, results: Results, key: list[str], values: str) -> pd.DataFrame:
    """A column of the rows with protocols side by side, in the ledger's order."""
    order = found.drop_duplicates("id").set_index(key).index
    return found.pivot(index=key, columns="protocol", values=values).loc[order, [*results.profile.protocols]]


def summary(*several: Results) -> str:
    """The verdicts on signs, orders and trends as a short table, one row a claim, for one profile or several side by
    side; without those that no profile has run yet."""
    tables = []
    for results in several:
        found = table(results)
        found.loc[found["why"].str.contains("diverged, so in no mean"), "verdict"] += " (a run diverged)"
        name = f"{results.profile.name}, " if len(several) > 1 else ""
        tables.append(_side_by_side(found[_on_signs(found)], results, ["id", "claim"], "verdict").add_prefix(name))
    both = pd.concat(tables, axis=1)
    run = ~both.eq("no runs").all(axis=1)
    return both[run if run.any() else slice(None)].reset_index().drop(columns="id").to_markdown(index=False)


def markdown(results: Results) -> str:
    """The whole of claims.md: verdicts in a small table, a section a claim on signs and trends, values folded away."""
    made = results.cells.drop_duplicates("run")["status"].value_counts()
    counts = ", ".join(f"{made[s]} {s}" for s in ("finished", "diverged", "missing") if s in made)
    mark = SMOKE if results.profile.name == "smoke" else ""
    covered = ("training seeds and, of losses on held-out text, evaluation documents (docs/statistics.md)"
               if results.clusters else "training seeds, not the choice of evaluation blocks")
    searched = search_of("controller", None, results.profile)[0].depth
    found = with_runs(results)
    signs = found[_on_signs(found)]
    verdicts = _side_by_side(signs, results, ["id"], "verdict").reset_index()
    verdicts["id"] = [f"[{name}](#{name})" for name in verdicts["id"]]
    return "\n".join([
        f"# Claims at profile `{results.profile.name}`", "",
        f"{mark}Generated from the raw logs; runs of the matrix: {counts}. Sources: {SOURCES}. Measured values are "
        f"means over seeds with paired 95 % intervals, nats per token unless said otherwise; the intervals cover "
        f"{covered}. Under `corrected` an arm trains at the rates that are best on `dev` at depth "
        f"{searched} with a spare seed. The rules, `ouroboros/analysis/claims.yaml`, were written before the "
        "runs but for what is dated there. Every row as data: [tables/claims.csv](tables/claims.csv).", "",
        verdicts.to_markdown(index=False, disable_numparse=True), "",
        *(_section(rows) for _, rows in signs.groupby("id", sort=False)),
        "## Values of the paper's own model", "",
        f"They are judged at profile `{REPORTED_SCALE}` only; what was measured here stands beside them.", "",
        "<details><summary>all of them</summary>", "",
        _values(found[~_on_signs(found)]).to_markdown(index=False, disable_numparse=True), "", "</details>", ""])


def _section(rows: pd.DataFrame) -> str:
    """A claim: what is reported, and under each protocol the verdict, what was measured, why, the runs."""
    first = rows.iloc[0]
    lines = [f"## {first['id']}", "", f"{first['claim'][0].upper()}{first['claim'][1:]}. Reported: {first['reported']} "
             f"(source {first['source']}).", ""]
    for row in rows.itertuples():
        measured = f" {row.measured}." if row.verdict != row.measured else ""
        lines += [f"- **`{row.protocol}`: {row.verdict}.**{measured} {row.why[0].upper()}{row.why[1:]}."]
        if row.runs:
            links = ", ".join(f"[{name}](runs/{name}.jsonl)" for name in row.runs.split())
            # blank lines: inside of an HTML block links wouldn't be links
            lines += ["", f"  <details><summary>{len(row.runs.split())} runs</summary>", "", f"  {links}", "",
                      "  </details>"]
    return "\n".join([*lines, ""])


def _values(rows: pd.DataFrame) -> pd.DataFrame:
    """The absolute values, protocols side by side."""
    shown = rows["measured"].where(rows["measured"] != "", rows["why"])
    plain = rows["verdict"].str.startswith("not testable") | (rows["verdict"] == shown)
    cells = rows.assign(cell=shown.where(plain, rows["verdict"] + ": " + shown))
    first = rows.drop_duplicates("id").set_index("id")[["claim", "reported", "recomputed", "source"]]
    return first.join(cells.pivot(index="id", columns="protocol", values="cell")).reset_index()


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
    claims = {claim.id: claim for claim in read_claims()}
    if name not in claims:
        raise InputError(f"claim '{name}': unknown; one of {', '.join(claims)}")
    return claims[name]


# -------------------------------------------------------------------------------------------- sheet

def sheet() -> pd.DataFrame:
    """What will be judged and how, before any run: one row a claim, nothing measured."""
    rows = [{"id": claim.id, "claim": claim.what, "source": claim.sources,
             "reported": claim.told, "open": claim.unsupported or claim.open or "",
             "judged by": _judged_by(claim), "rule": RULES[claim.rule], "margin": _margin(claim)}
            for claim in read_claims()]
    return pd.DataFrame(rows)


def _judged_by(claim: Claim) -> str:
    """The arms and runs that a claim's measure reads."""
    measure = claim.measure
    if measure is None:
        return f"nothing yet: {claim.unmeasured}" if claim.unmeasured else "the model, not trained"
    arms = ", ".join(f"`{arm}`" for arm in measure.arms)
    if not any(arm not in ARMS or ARMS[arm].loops for arm in measure.arms):
        return arms
    where = [f"depth {measure.depth}" if measure.depth else "",
             f"rank {measure.rank} (base rank {PAPER_RANK})" if measure.rank else "", measure.places]
    return f"{arms}; {', '.join(filter(None, where)) or 'base depth'}"


def _margin(claim: Claim) -> str:
    if claim.rule == "count":
        return "none"
    share = {"reduction": ", in % of the cut model's loss", "recovery": ", in % of the gap"}
    function = claim.recompute.function if claim.recompute else ""
    return f"min({MARGIN:g} nats, {100 * MARGIN_SHARE:g} % of the gap){share.get(function, '')}"


def sheet_markdown() -> str:
    """The whole of docs/claims.md."""
    told = numbers(read_claims())
    gap = float(told["L17"] - told["L36"])
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
