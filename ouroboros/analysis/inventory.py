"""What logs are committed: how many, from when, by which code, on what machine. Never imports torch."""

import json
from pathlib import Path

import pandas as pd

from ..experiment.profile import PROFILES
from ..log import read_manifest
from ..provenance import lock_sha256, locked_versions

UNCOMMITTED = ("smoke",)
HEAD = """# The raw logs

Generated from the first lines of the logs. `runs/<run id>.jsonl` is a run's log, `checkpoints/base/` a base model that
was pretrained here, with its log. `checkpoints/<run id>/` is what a run trained, `continuations.md` what such models
write; `make checkpoints` scores them against their logs. `tables/`, `notebooks/`, `claims.md` and the checkpoints'
cards are derived from the logs, and `make verify` derives them again. `bench/` are measurements of time and memory,
which no test asserts. Hours are wall time summed over runs, of which two went at a time on two cores. The code of a
commit is `git show <commit>`; each log names the lock that its packages come from by its hash, and has the hashes of
text, base and itself.

The runs of an earlier protocol, 562 of `tiny` in which norms and tables had no rate of their own and could hardly move
(until 2026-11-25; later `tiny-first`), are in `results/tiny-first` of commit `cf28ae8`, with what they gave and the
script that rebuilds their older files. The base of `tiny` is theirs, and its log bears that name.

"""


def _packages(manifest: dict, root: Path) -> str:
    """The versions of torch and transformers that a log was made with, where it or the lock of today says them; else
    which lock it was."""
    versions = manifest["packages"]  # of a run, where they aren't its lock's
    if manifest.get("lock") == lock_sha256(root):
        versions = locked_versions(root) | versions
    told = [f"{name} {versions[name]}" for name in ("torch", "transformers") if versions.get(name)]
    return ", ".join(told) or (f"lock {manifest['lock'][:12]}" if manifest.get("lock") else "")


def _row(what: str, manifests: list[dict], root: Path) -> dict:
    dates = sorted(m.get("started", m.get("date", ""))[:10] for m in manifests)
    commits = sorted({m["commit"][:7] for m in manifests if m["commit"]})
    machines = sorted({f"{m['hardware'].get('cores', '?')} cores of {m['hardware'].get('processor', '?')}"
                       for m in manifests})
    packages = sorted({_packages(m, root) for m in manifests})
    hours = sum(m.get("wall_seconds", 0) for m in manifests) / 3600
    return {"logs": what, "runs": len(manifests), "first": dates[0], "last": dates[-1], "commits": " ".join(commits),
            "hardware": "; ".join(machines), "packages": "; ".join(packages), "hours": f"{hours:.1f}" if hours else ""}


def table(root: Path) -> pd.DataFrame:
    """One row a set of logs: the base, the learning-rate search and the matrix of each profile, each benchmark."""
    results, sets = Path(root) / "results", {}
    for profile in sorted(path.stem for path in PROFILES.glob("*.yaml") if path.stem not in UNCOMMITTED):
        logs = [results / profile / "checkpoints/base/base.jsonl", *sorted((results / profile).glob("runs/*.jsonl"))]
        for manifest in map(read_manifest, filter(Path.exists, logs)):
            kind = {"rate": "learning-rate search"}.get(manifest["purpose"], manifest["purpose"])
            sets.setdefault(f"{profile}: {kind}", []).append(manifest)
    for path in sorted((results / "bench").glob("*.json")):
        sets[f"bench: {path.stem}"] = [json.loads(path.read_text(encoding="utf-8"))]
    return pd.DataFrame([_row(what, manifests, root) for what, manifests in sets.items()])


def markdown(root: Path) -> str:
    """The whole of results/README.md."""
    return HEAD + table(root).to_markdown(index=False, disable_numparse=True) + "\n"
