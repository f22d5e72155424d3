"""The learning rate of each run: the best on `dev` of its arm's search, read from the raw logs. Never imports torch."""

import math
from collections.abc import Mapping
from pathlib import Path

from .errors import InputError
from .experiment import ARMS, SHARED_RATE_LIMIT, Profile, RunSpec, switches
from .log import Run, read_run


def read_searches(profile: Profile, root: Path) -> dict[str, Run]:
    """The finished runs of the profile's learning-rate searches, {run id: Run}; those of another identity left out."""
    found = {}
    for spec in profile.search_runs():
        path = profile.run_path(spec.id, root)
        if path.exists():
            run = read_run(path)
            if profile.mismatch(run.manifest, spec) is None:
                found[spec.id] = run
    return found


def search_of(arm: str, depth: int | str | None, profile: Profile) -> list[RunSpec]:
    """The search whose best rate an arm takes at a depth: its own, or its sibling's; there, or the plan's first."""
    arm = profile.siblings.get(arm, arm)
    runs = [spec for spec in profile.search_runs() if spec.arm == arm]
    return [spec for spec in runs if spec.depth == depth] or [spec for spec in runs if spec.depth == runs[0].depth]


def dev_loss(run: Run) -> float:
    """The dev loss that a search's run ended at, nats per token; infinite where it diverged."""
    return run.last("dev", "loss_t+1") if run.manifest["status"] == "finished" else math.inf


def rate_of(spec: RunSpec, profile: Profile, searches: Mapping[str, Run]) -> float:
    """The peak learning rate of a run (AUDIT `rate`). A flipped switch keeps the rates of its column; a level is a
    factor.

    Raises InputError while the search isn't finished, and where every rate of it diverged.
    """
    if spec.rate is not None:
        return spec.rate
    shared = switches(spec.protocol)["rate"] == "shared"
    arm, depth = ("controller", None) if shared else (spec.arm, spec.depth)
    search = [point for point in search_of(arm, depth, profile) if not shared or point.rate <= SHARED_RATE_LIMIT]
    if left := [point.id for point in search if point.id not in searches]:
        raise InputError(f"run '{spec.id}': its learning rate is still searched, {len(left)} runs are left, "
                         f"'{left[0]}' first: python -m ouroboros runs --profile {profile.name} --purpose rate")
    losses = {point.rate: dev_loss(searches[point.id]) for point in search}
    best = min(losses, key=losses.get, default=None)
    if best is None or math.isinf(losses[best]):
        limit = f" up to {SHARED_RATE_LIMIT:g}" if shared else ""
        raise InputError(f"run '{spec.id}': no rate of the search{limit} works for arm '{arm}'; add lower rates to its "
                         f"entry in the plan of profile '{profile.name}'")
    return best * next((entry.levels[spec.level] for entry in profile.plan if spec.level in entry.levels), 1.0)


def waits(spec: RunSpec, profile: Profile, searches: Mapping[str, Run]) -> str | None:
    """Why a run can't be made yet, since its learning rate isn't known; None if it can."""
    try:
        if ARMS[spec.arm].trained:
            rate_of(spec, profile, searches)
    except InputError as error:
        return str(error)
    return None
