"""An arm beside the paper's, as one page (docs/own-arm.md). Never imports torch."""

import pandas as pd

from ..experiment.arms import ARMS
from ..experiment.learning_rates import search_of
from ..experiment.own_arm import BASELINES
from ..experiment.profile import Profile
from ..log import read_runs
from .comparisons import Comparisons
from .pages import SMOKE
from .results import Results
from .statistics import family, interval, verdicts
from .tables import search_table

NOT_SAID = "not in the log"


def page(profile: Profile, arm: str, root) -> str:
    """What an arm costs and does beside Controller, static table and LoRA: the profile is that of `own_arm.beside`.

    Losses and their differences are on held-out text, in nats per token, with 95 % intervals; verdicts on the three
    differences are corrected for being three.
    """
    results = Results(profile, read_runs(profile.folder(root)))
    found, depth = Comparisons(results, "corrected"), profile.plan[-1].depths[0]
    arms = ("full", "cut", *BASELINES, arm)
    rows = pd.DataFrame([_row(found, name, depth) for name in arms]).fillna("")
    rates = pd.DataFrame([_rates(found, name, depth) for name in (*BASELINES, arm)])
    against = family(found.pairs({ARMS[name].label: (arm, name) for name in BASELINES}, depth))
    verdict = verdicts(against)
    differences = pd.DataFrame([{"baseline": name, f"{ARMS[arm].label} minus it": str(minus_it),
                                 "verdict": verdict[name]} for name, minus_it in against.items()])
    first = next(iter(against.values()))
    mark = SMOKE if profile.base_of == "smoke" else ""
    blocks = f" and {first.blocks} blocks in {first.clusters} groups of documents" if first.blocks else ""
    seeds = ", ".join(map(str, profile.plan[-1].seeds))
    return "\n\n".join([
        f"# {ARMS[arm].label}, beside the paper's arms",
        f"{mark}Profile `{profile.base_of}`, depth {depth}, {profile.training.updates} updates of "
        f"{profile.training.tokens_per_update} tokens, protocol `corrected`, seeds {seeds}; {len(results.runs)} runs. "
        "Losses are of held-out text, nats per token; lower is better.",
        differences.to_markdown(index=False),
        f"Intervals cover {len(profile.plan[-1].seeds)} seeds{blocks}. Verdicts are after Holm's correction over the "
        "three, so one may be undecided although its interval excludes 0; \"within the margin\" is smaller than "
        f"{first.margin:.2g} nats (docs/statistics.md).",
        rows.to_markdown(index=False),
        "LoRA trains the Controller's number of parameters, other arms what their design has.",
        rates.to_markdown(index=False)]) + "\n"


def _rates(found: Comparisons, arm: str, depth: int) -> dict[str, str]:
    """The rates that an arm trained at, and the search that chose them."""
    results, profile = found.results, found.results.profile
    manifest = next((run.manifest for run in found.runs_of(arm, depth)), None)
    search = search_of(arm, depth if ARMS[arm].loops else None, profile)[0]
    table = search_table(results)
    row = table[(table["arm"] == search.arm) & (table["updates"] == profile.at(search).training.updates)]
    where = f"{ARMS[search.arm].label}: " if search.arm != arm else ""
    where += f"{profile.at(search).training.updates} updates" + (f", depth {search.depth}" if search.depth else "")
    end = row.loc[row["depth"].isna() if search.depth is None else row["depth"] == search.depth, "at the grid's end"]
    return {"arm": ARMS[arm].label, "rate": f"{manifest['rate']:g}" if manifest else "",
            "of norms and tables": f"{manifest['elementwise_rate']:g}" if manifest and ARMS[arm].elementwise else "",
            "searched at": where, "best at the grid's end": "yes" if end.any() else "no"}


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
