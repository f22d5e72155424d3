"""Verdicts: each claim of the ledger judged on the raw logs. No torch.

`claims.yaml`, which `ledger.py` reads, holds what is reported and the rule that judges it; `pages.py` prints it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
import pandas as pd

from ..errors import InputError
from ..experiment.arms import ARMS
from ..experiment.profile import Profile
from .comparisons import DRAWN, Comparisons, draws_depths
from .ledger import CHANGES, PAPER_RANK, Claim, Measure, read_claims, recomputed
from .results import Results, per_results
from .statistics import ALPHA, FEWEST, BySeed, Interval, Ratio, family, holm, interval

SMALL_SHARE = 0.05  # of the Controller's loss reduction: what the rule `small` lets pass
REPORTED_SCALE = "paper"
VALUES = ("value", "count")  # rules on values of the paper's own model; the others are on signs and trends


class Verdict(StrEnum):
    """What the runs of a profile say of a claim under one protocol (docs/claims.md)."""

    HOLDS = "holds"
    HOLDS_WITHIN = "holds within the margin"
    FAILS = "fails"
    FAILS_WITHIN = "fails within the margin"
    EQUIVALENT = "equivalent"
    UNDECIDED = "undecided"
    NO_RUNS = "no runs"
    NOT_PLANNED = "not planned"
    BY_CONSTRUCTION = "by construction"
    NOT_APPLICABLE = "not applicable"
    NOT_TESTABLE = "not testable at this scale"

    @property
    def side(self) -> int:
        """1: the claim holds; -1: it fails; 0: neither is decided."""
        return self.startswith("holds") - self.startswith("fails")


WITHIN = {Verdict.HOLDS: Verdict.HOLDS_WITHIN, Verdict.FAILS: Verdict.FAILS_WITHIN,
          Verdict.UNDECIDED: Verdict.EQUIVALENT}  # where every part is smaller than the margin


@dataclass(frozen=True)
class Judged:
    """A claim under one protocol: the interval of each part, the verdict and why, the runs asked for that diverged."""

    parts: dict[str, Interval]
    verdict: Verdict
    why: str
    diverged: tuple[str, ...] = ()


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


def judge(claim: Claim, results: Results, protocol: str) -> Judged:
    """Judge one claim by its rule on the measured parts of one protocol."""
    if claim.rule == "count":
        return Judged({}, Verdict.HOLDS, "counted on the model at the paper's shape, in the tests")
    if claim.measure is None:
        return Judged({}, Verdict.NOT_PLANNED, claim.unmeasured)
    found = Comparisons(results, protocol)
    parts = measured(claim.measure, found)
    loops = [arm for arm in claim.measure.arms if arm in ARMS and ARMS[arm].loops]
    if parts and "depth" in claim.measure.by and all(draws_depths(arm, protocol) for arm in loops):
        parts = {"all depths": next(iter(parts.values()))}  # one measurement, so nothing to correct for
    parts = family(parts)
    verdict, why = _verdict(claim, parts, found)
    if claim.rule in ("positive", "negative") and verdict.side and _contradicted(claim, found, verdict):
        verdict, why = Verdict.UNDECIDED, f"{why}, but a diverged run, which has no loss, says otherwise"
    if protocol in claim.notes:
        why += f"; {claim.notes[protocol]}"
    if verdict == Verdict.NOT_PLANNED:
        return Judged({}, verdict, why)
    if drawn := [arm for arm in loops if draws_depths(arm, protocol)]:
        why += f"; {DRAWN}, whatever the depth beside it: {', '.join(f'`{arm}`' for arm in drawn)}"
    short = [arm for arm in loops if any(found.norms_near(arm, depth) is False
                                         for depth in results.profile.depths_of(arm))]
    if short:
        why += f"; step norms far from the stream's size: {', '.join(f'`{arm}`' for arm in short)}"
    return Judged(parts, verdict, why + in_no_mean(found), tuple(sorted(found.diverged)))


def in_no_mean(found: Comparisons) -> str:
    """The runs that were asked for and diverged, as the end of a sentence."""
    names = sorted(found.diverged)
    return f"; diverged, so in no mean: {', '.join(f'`{name}`' for name in names)}" if names else ""


def _contradicted(claim: Claim, found: Comparisons, verdict: Verdict) -> bool:
    """Whether the diverged runs, as endless losses, say otherwise than the runs that are left."""
    if not found.diverged:
        return False
    with np.errstate(invalid="ignore"):
        parts = measured(claim.measure, Comparisons(found.results, found.protocol, endless=True))
    claimed = (1 if claim.rule == "positive" else -1) * verdict.side
    return any(math.isinf(value) and value * claimed < 0 for part in parts.values() for value in part.values())


def _planned(measure: Measure, profile: Profile, protocol: str) -> bool:
    """Whether a profile's plan has the arms of a measure under a protocol, at its depth and rank, and other ranks where
    it is by rank."""
    depths = profile.depths if measure.several_depths else (measure.depth or profile.depth,)
    rank = (measure.rank or PAPER_RANK) * profile.rank / PAPER_RANK
    there = {cell.arm for cell in profile.cells() if cell.protocol == protocol and cell.updates is None
             and cell.depth in (None, *depths) and cell.rank in (None, rank)}
    return set(measure.arms) <= there and (measure.by != "rank" or bool(profile.ranks))


def _verdict(claim: Claim, parts: dict[str, Interval], found: Comparisons) -> tuple[Verdict, str]:
    """The verdict of a claim's rule and why; the first of these that applies."""
    profile, protocol = found.results.profile, found.protocol
    if not parts or any(part.n == 0 for part in parts.values()):
        if found.diverged:
            return Verdict.UNDECIDED, "a part has no finished run"
        if not parts or not _planned(claim.measure, profile, protocol):
            return Verdict.NOT_PLANNED, "this profile's plan has no runs for it"
        return Verdict.NO_RUNS, "no run of this profile measures " + ("it" if len(parts) == 1 else "all of its parts")
    if claim.measure.of_depths and draws_depths(claim.measure.arm, protocol):
        return Verdict.BY_CONSTRUCTION, "this protocol draws the depth itself, so all depths are one run"
    if claim.rule == "value" and profile.name != REPORTED_SCALE:
        return Verdict.NOT_TESTABLE, "an absolute value of the paper's own model"
    if not all(part.judged for part in parts.values()):
        return Verdict.UNDECIDED, f"fewer than {FEWEST} seeds finished"
    if claim.rule == "value":
        half = 0.5 * 10.0 ** -claim.decimals  # a reported value is meant to its last digit
        low, high = min(claim.numbers) - half, max(claim.numbers) + half
        return _by_intervals(parts, lambda i: i.low <= high and low <= i.high, lambda i: i.high < low or high < i.low,
                             "an interval that meets the reported value")
    if claim.rule == "small":
        first = min(found.depths_of("controller"))
        gained = interval(Comparisons(found.results, protocol).difference("controller", "cut", depth=first))
        if not gained.high < 0:
            return (Verdict.NOT_APPLICABLE,
                    "the Controller isn't told to lower the loss, so no share of that can be small")
        bound = SMALL_SHARE * -gained.mean
        return _by_intervals(parts, lambda i: -bound < i.low and i.high < bound,
                             lambda i: i.high < -bound or bound < i.low,
                             f"at most {bound:.3g} either way, {100 * SMALL_SHARE:g} % of the loss reduction")
    sign = 1 if claim.rule == "positive" else -1
    # all parts must hold, so each may be asked at 95 %; that one of several contradicts is asked after Holm
    adjusted = holm({name: part.p for name, part in parts.items()})
    parts = {name: replace(part, p=adjusted[name]) for name, part in parts.items()}
    return _with_margin(*_by_intervals(parts, lambda i: i.side == sign, lambda i: sign * i.mean < 0 and i.p < ALPHA,
                                       "above 0" if sign == 1 else "below 0"), parts)


def _by_intervals(parts: dict[str, Interval], holds: Callable, fails: Callable,
                  claimed: str) -> tuple[Verdict, str]:
    """holds: every part does; fails: one part's whole interval contradicts; undecided: between."""
    failing = [name for name, part in parts.items() if fails(part)]
    open_ = [name for name, part in parts.items() if not fails(part) and not holds(part)]
    at = _at(parts, failing or open_)
    if failing:
        return Verdict.FAILS, f"claimed {claimed}; the whole interval contradicts it{at}"
    if open_:
        alone = [name for name in open_ if parts[name].p >= ALPHA and parts[name].side]
        before = f"; before Holm's correction it is contradicted at: {', '.join(alone)}" if alone else ""
        return Verdict.UNDECIDED, f"claimed {claimed}; the interval leaves it open{at}{before}"
    where = "the interval lies there" if len(parts) == 1 else "every interval does"
    return Verdict.HOLDS, f"claimed {claimed}; {where}"


def _with_margin(verdict: Verdict, why: str, parts: dict[str, Interval]) -> tuple[Verdict, str]:
    """A verdict on signs, with what of it is too small to matter: two one-sided tests against the margin."""
    small = [name for name, part in parts.items() if part.small]
    if not small:
        return verdict, why
    bound = min(part.margin for part in parts.values())
    why += f"; smaller than the margin of {bound:.2g} nats{_at(parts, small)}"
    return verdict if len(small) < len(parts) else WITHIN[verdict], why


def _at(parts: dict[str, Interval], some: list[str]) -> str:
    return "" if len(parts) == 1 else f" at: {', '.join(some)}"


# ------------------------------------------------------------------------------------------- claims as tables

def records(claim: Claim, results: Results) -> list[dict]:
    """A claim's rows, one a protocol: what is reported, recomputed and measured, the verdict and why, the runs that
    were read."""
    again, rows = recomputed(claim, read_claims()), []
    changes = claim.measure is not None and claim.measure.statistic in CHANGES
    change = f"{claim.measure.statistic}, " if changes else ""
    for protocol in results.profile.protocols:
        with results.reading() as read:
            judged = judge(claim, results, protocol)
        if not any(part.n for part in judged.parts.values()):
            read = set()  # what else was looked for measures nothing
        rows.append({
            "id": claim.id, "claim": claim.what, "reported": claim.reported_text, "source": claim.sources,
            "recomputed": "" if again is None else f"{again:.{claim.decimals}f}", "protocol": protocol,
            "measured": "; ".join(f"{change}{name}: {i}" if name else str(i) for name, i in judged.parts.items()),
            "verdict": str(judged.verdict), "why": judged.why, "runs": " ".join(sorted(read)),
            "diverged": " ".join(judged.diverged)})
    return rows


@per_results
def with_runs(results: Results) -> pd.DataFrame:
    """One row a claim and protocol: see `records`."""
    return pd.DataFrame([row for claim in read_claims() for row in records(claim, results)])


def find(name: str) -> Claim:
    """The claim of an id. Raises InputError naming those that there are."""
    claims = {claim.id: claim for claim in read_claims()}
    if name not in claims:
        raise InputError(f"claim '{name}': unknown; one of {', '.join(claims)}")
    return claims[name]
