"""The learning rate of each arm: chosen on `dev` from the search's raw logs, written down. Never imports torch."""

import json
from pathlib import Path

from .errors import InputError
from .experiment import SHARED_RATE_LIMIT, Profile, RunSpec, switches
from .runlog import read_run, write_atomic


def search_table(profile: Profile, root: Path) -> list[dict]:
    """Every finished point of the search: arm, rate, dev loss in nats per token (None where the run diverged)."""
    table = []
    for spec in profile.search_runs():
        folder = profile.folder(root) / "runs" / spec.id
        if not (folder / "manifest.json").exists():
            continue
        run = read_run(folder)
        rows = run.log[(run.log["split"] == "dev") & (run.log["metric"] == "loss_t+1")]
        finished = run.manifest["status"] == "finished"
        table.append({"arm": spec.arm, "rate": spec.rate, "dev": float(rows["value"].iloc[-1]) if finished else None})
    return table


def choose(profile: Profile, root: Path) -> dict:
    """{"own": {arm: rate}, "shared": rate, "search": [all points]} (AUDIT `rate`). Raises InputError if points miss."""
    table = search_table(profile, root)
    if len(table) < len(profile.search_runs()):
        raise InputError(f"profile '{profile.name}': {len(table)} of {len(profile.search_runs())} runs of the learning-"
                         f"rate search are there; make runs PROFILE={profile.name} makes the others")

    def best(arm: str, limit: float = float("inf")) -> float:
        points = [p for p in table if p["arm"] == arm and p["dev"] is not None and p["rate"] <= limit]
        if not points:
            raise InputError(f"profile '{profile.name}': no rate of the search up to {limit:g} works for arm '{arm}'; "
                             "widen search.grid")
        return min(points, key=lambda p: p["dev"])["rate"]

    arms = dict.fromkeys(point["arm"] for point in table)
    return {"own": {arm: best(arm) for arm in arms}, "shared": best("controller", SHARED_RATE_LIMIT), "search": table}


def path(profile: Profile, root: Path) -> Path:
    return profile.folder(root) / "rates.json"


def write(profile: Profile, root: Path) -> None:
    """Write results/<profile>/rates.json from the search's logs."""
    write_atomic(path(profile, root), json.dumps(choose(profile, root), indent=1) + "\n")


def rate_of(spec: RunSpec, profile: Profile, root: Path) -> float:
    """The peak learning rate of a run. A flipped switch keeps the rates of its column (AUDIT `rate`); a level is a
    factor of it (`matrix.rates`)."""
    if spec.rate is not None:
        return spec.rate
    if not path(profile, root).exists():
        raise InputError(f"{path(profile, root)}: missing; run the learning-rate search first: python -m ouroboros "
                         f"runs --profile {profile.name} --purpose rate")
    rates = json.loads(path(profile, root).read_text())
    factor = profile.matrix.rates[spec.level] if spec.level else 1
    if switches(spec.protocol)["rate"] == "shared":
        return rates["shared"] * factor
    if spec.arm not in rates["own"]:
        raise InputError(f"{path(profile, root)}: has no rate for arm '{spec.arm}'; run the learning-rate search "
                         f"again: python -m ouroboros runs --profile {profile.name} --purpose rate")
    return rates["own"][spec.arm] * factor
