"""The learning rates of each run: the best on `dev` of its arm's search, read from raw logs. Never imports torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import InputError
from ..log import Run, read_run
from .arms import ARMS
from .plan import RunSpec
from .profile import Profile
from .protocol import SHARED_RATE_LIMIT, switches
from .schema import RATES


def read_searches(profile: Profile, root: Path) -> dict[str, Run]:
    """The finished runs of the profile's learning-rate searches, {run id: Run}; those of another identity left out."""
    found = {}
    count = -1
    while count < len(found):  # what a search's runs gave says whether it took a step outward
        count = len(found)
        for spec in planned(profile, found):
            path = profile.run_path(spec.id, root)
            if spec.purpose == "rate" and spec.id not in found and path.exists():
                run = read_run(path)
                if profile.mismatch(run.manifest, spec) is None:
                    found[spec.id] = run
    return found


def search_of(arm: str, depth: int | str | None, profile: Profile, purpose: str = "matrix") -> list[RunSpec]:
    """The search whose rates an arm takes at a depth: its own, or its sibling's; there, or the plan's first. Of several
    budgets the first one's.

    Runs of docs/hypotheses.md take the searches made for it where there are any. A screen takes the sibling's: an arm's
    own search comes after it, of what is confirmed.
    """
    def made_for(name: str, page: bool) -> list[RunSpec]:
        return [spec for entry in profile.plan if entry.purpose == "rate" and bool(entry.role) == page
                for spec in profile.runs_of(entry) if spec.arm == name]

    names, page = (arm, profile.siblings.get(arm, arm)), purpose in ("screen", "pays")
    runs = next(found for name in (names[::-1] if purpose == "screen" else names) for of_page in (page, not page)
                if (found := made_for(name, of_page)))
    runs = [spec for spec in runs if spec.updates == runs[0].updates]
    return [spec for spec in runs if spec.depth == depth] or [spec for spec in runs if spec.depth == runs[0].depth]


def dev_loss(run: Run) -> float:
    """The dev loss that a search's run ended at, nats per token; infinite where it diverged."""
    return run.last("dev", "loss_t+1") if run.manifest["status"] == "finished" else math.inf


def tried(search: list[RunSpec], profile: Profile, searches: Mapping[str, Run]) -> list[RunSpec]:
    """The matrix rates that a search tries: its grid, then one step outward as often as the best is at an edge."""
    points = {spec.rate: spec for spec in search if spec.rate}
    while all(spec.id in searches for spec in points.values()):
        best = min(points, key=lambda rate: dev_loss(searches[points[rate].id]))
        step = (best == max(points)) - (best == min(points))
        place = RATES.index(best) + step
        if step == 0 or math.isinf(dev_loss(searches[points[best].id])) or not 0 <= place < len(RATES):
            break
        points[RATES[place]] = replace(points[best], rate=RATES[place])
    return list(points.values())


def planned(profile: Profile, searches: Mapping[str, Run]) -> list[RunSpec]:
    """Every run of the plan in its order, with the steps outward that its searches have to take by now."""
    found = []
    for entry in profile.plan:
        runs = profile.runs_of(entry)
        if entry.purpose == "rate":
            kinds = dict.fromkeys((run.arm, run.depth) for run in runs)
            for arm, depth in kinds:
                search = [run for run in runs if (run.arm, run.depth) == (arm, depth)]
                found += [*tried(search, profile, searches), *(run for run in search if run.factor)]
        else:
            found += runs
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Rates:
    """Peak learning rates of a run: of its matrices, and of step norms, tables and affines (docs/protocol.md)."""

    matrix: float
    elementwise: float


def rates_of(spec: RunSpec, profile: Profile, searches: Mapping[str, Run]) -> Rates:
    """The rates that a run trains at (protocol.md `rate`). A flipped switch keeps the rates of its column; a level is a
    factor.

    Raises InputError while the search isn't finished, and where every rate of it diverged.
    """
    if spec.rate is not None:
        return Rates(spec.rate, spec.rate)
    shared = switches(spec.protocol)["rate"] == "shared"
    arm, depth = ("controller", None) if shared else (spec.arm, spec.depth)
    search = search_of(arm, depth, profile, spec.purpose)
    points = [point for point in tried(search, profile, searches) if not shared or point.rate <= SHARED_RATE_LIMIT]
    limit = f" up to {SHARED_RATE_LIMIT:g}" if shared else ""
    best = _best(points, spec, profile, searches, f"no rate of the search{limit} works for arm '{arm}'").rate
    level = next((entry.levels[spec.level] for entry in profile.plan if spec.level in entry.levels), 1.0)
    if spec.factor is not None:
        return Rates(best, best * spec.factor)
    factors = [point for point in search if point.factor] if not shared and ARMS[spec.arm].elementwise else []
    one = [point for point in points if point.rate == best]  # the grid was searched at one rate for all: factor 1
    factor = _best([*one, *factors], spec, profile, searches, "").factor or 1.0
    return Rates(best * level, best * level * factor)


def _best(points: list[RunSpec], spec: RunSpec, profile: Profile, searches: Mapping[str, Run], none: str) -> RunSpec:
    """The point with the lowest dev loss. Raises InputError where points aren't made, and `none` where all diverged."""
    if left := [point.id for point in points if point.id not in searches]:
        raise InputError(f"run '{spec.id}': its learning rate is still searched, {len(left)} runs are left, "
                         f"'{left[0]}' first: python -m ouroboros runs --profile {profile.name} --purpose rate")
    losses = {point: dev_loss(searches[point.id]) for point in points}
    best = min(losses, key=losses.get, default=None)
    if best is None or math.isinf(losses[best]):
        raise InputError(f"run '{spec.id}': {none}; add lower rates to its entry in the plan of profile "
                         f"'{profile.name}'")
    return best


def waits(spec: RunSpec, profile: Profile, searches: Mapping[str, Run]) -> str | None:
    """Why a run can't be made yet, since its learning rate isn't known; None if it can."""
    try:
        if spec.trained:
            rates_of(spec, profile, searches)
    except InputError as error:
        return str(error)
    return None
