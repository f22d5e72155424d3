"""An arm beside the paper's, as one page (docs/own-arm.md). Never imports torch."""

import pandas as pd

from ..experiment.arms import ARMS
from ..experiment.own import BASELINES
from ..experiment.profile import Profile
from ..log import read_runs
from .comparisons import Comparisons
from .results import Results
from .statistics import family, interval, verdicts

NOT_SAID = "not in the log"


def page(profile: Profile, arm: str, root) -> str:
    """What an arm costs and does beside Controller, static table and LoRA: the profile is that of `own.beside`.

    Losses and their differences are on held-out text, in nats per token, with 95 % intervals; differences over three
    baselines are corrected for being three.
    """
    results = Results(profile, read_runs(profile.folder(root)))
    found, depth = Comparisons(results, "corrected"), profile.plan[-1].depths[0]
    rows = pd.DataFrame([_row(found, name, depth) for name in ("full", "cut", *BASELINES, arm)]).fillna("")
    against = family(found.pairs({ARMS[name].label: (arm, name) for name in BASELINES}, depth))
    verdict = verdicts(against)
    differences = pd.DataFrame([{"baseline": name, f"{ARMS[arm].label} minus it": str(minus_it),
                                 "verdict": verdict[name]} for name, minus_it in against.items()])
    made, planned = len(results.runs), len(profile.runs())
    return (f"# {ARMS[arm].label}, beside the paper's arms\n\n"
            f"Profile `{profile.base_of}`, depth {depth}, {profile.training.updates} updates, protocol `corrected`; "
            f"each arm at its own searched rates; {made} runs ({planned} planned before the searches' steps outward). "
            "Losses are of held-out text, nats per token; lower is better.\n\n"
            f"{differences.to_markdown(index=False)}\n\n{rows.to_markdown(index=False)}\n")


def _row(found: Comparisons, arm: str, depth: int) -> dict[str, str]:
    """An arm's row: what it trains, what it costs, its loss, loss minus the cut model's, gap recovery."""
    manifest = next((run.manifest for run in found.runs_of(arm, depth)), None)
    row = {"arm": ARMS[arm].label, "trained parameters": f"{manifest['trainable']:,}" if manifest else ""}
    flops = (manifest or {}).get("flops") or {}
    for kind in ("forward", "training"):
        counted = flops.get(kind)
        row[f"MFLOPs a token, {kind}"] = f"{counted / 1e6:.2f}" if counted else NOT_SAID if ARMS[arm].trained else ""
    row["loss"] = str(interval(found.loss(arm, depth)))
    if arm not in ("full", "cut"):
        row["minus the cut model's"] = str(interval(found.difference(arm, "cut", depth=depth)))
        row["gap recovery (%)"] = str(interval(found.recovery(arm, depth)))
    return row
