"""What logs are committed: how many, from when, by which code, on what machine. Never imports torch."""

import json
from pathlib import Path

import pandas as pd

from .experiment import PROFILES
from .runlog import read_run

UNCOMMITTED = ("smoke",)
HEAD = """# The raw logs

Generated from the manifests. `runs/<id>/` holds a run's manifest and log, `base/` the base model with its own;
`tables/`, `notebooks/` and `claims.md` are derived from them, and `make verify` derives them again. `bench/` are
measurements of time and memory, which no test asserts. Hours are wall time summed over runs, of which two went at a
time on two cores. The code of a commit is `git show <commit>`; each manifest has the whole lock, and the hashes of
text, base and log.

"""


def _row(what: str, manifests: list[dict]) -> dict:
    dates = sorted(m.get("started", m.get("date", ""))[:10] for m in manifests)
    commits = sorted({m["commit"][:7] for m in manifests if m["commit"]})
    machines = sorted({f"{m['hardware'].get('cores', '?')} cores of {m['hardware'].get('processor', '?')}"
                       for m in manifests})
    packages = sorted({", ".join(f"{name} {m['packages'][name]}" for name in ("torch", "transformers")
                                 if name in m["packages"]) for m in manifests})
    hours = sum(m.get("wall_seconds", 0) for m in manifests) / 3600
    return {"logs": what, "runs": len(manifests), "first": dates[0], "last": dates[-1], "commits": " ".join(commits),
            "hardware": "; ".join(machines), "packages": "; ".join(packages), "hours": f"{hours:.1f}" if hours else ""}


def table(root: Path) -> pd.DataFrame:
    """One row a set of logs: the base, the learning-rate search and the matrix of each profile, each benchmark.

    Raises InputError for a run that isn't what its manifest says.
    """
    results, sets = Path(root) / "results", {}
    for profile in sorted(path.stem for path in PROFILES.glob("*.yaml") if path.stem not in UNCOMMITTED):
        for manifest in sorted((results / profile).glob("*/**/manifest.json")):
            made = read_run(manifest.parent).manifest
            kind = {"rate": "learning-rate search"}.get(made["purpose"], made["purpose"])
            sets.setdefault(f"{profile}: {kind}", []).append(made)
    for path in sorted((results / "bench").glob("*.json")):
        sets[f"bench: {path.stem}"] = [json.loads(path.read_text(encoding="utf-8"))]
    return pd.DataFrame([_row(what, manifests) for what, manifests in sets.items()])


def markdown(root: Path) -> str:
    """The whole of results/README.md."""
    return HEAD + table(root).to_markdown(index=False, disable_numparse=True) + "\n"
