"""What size a loss has before anything is trained: by target, by layers kept, in the untrained loop. Never imports
torch.

Losses are nats per token; every number is of one run, since nothing in these runs is drawn.
"""

import math

import numpy as np
import pandas as pd

from ..experiment.arms import ARMS
from ..log import Run
from .results import Results, splits

LEVELS = {"unigram": "unigram", "bigram": "bigram", "bare": "bare", "cut": "cut", "full": "full",
          "double norm": "refine_base"}
STARTS = {"norms at 1": "untrained", "norms at the stream's size": "untrained_matched",
          "without norms": "untrained_nonorm"}


def _run(results: Results, arm: str) -> Run | None:
    """The first finished run of an arm that isn't trained; of `refine_base` the released one, which norms twice."""
    protocol = "released" if ARMS[arm].middle == "intact" else "corrected"
    rows = [row for row in results.cells.itertuples()
            if (row.arm, row.protocol, row.status) == (arm, protocol, "finished")]
    results.note(row.run for row in rows[:1])
    return results.runs[rows[0].run] if rows else None


def _last(run: Run | None, split: str, metric: str) -> float:
    return math.nan if run is None else run.last(split, metric)


def levels_table(results: Results) -> pd.DataFrame:
    """On each split and target: a uniform guess (ln V), counts of the training text (`bigram` on t+2: of pairs with a
    token between), the kept layers without any in the middle, cut, full, and full with its last state normed twice
    (system.md `double norm`)."""
    runs = {name: _run(results, arm) for name, arm in LEVELS.items()}
    uniform = math.log(results.profile.base.model["vocab_size"])
    return pd.DataFrame([{"split": split, "target": target, "uniform": uniform}
                         | {name: _last(run, split, f"loss_{target}") for name, run in runs.items()}
                         for split in splits(results.profile) for target in ("t+1", "t+2")])


def levels_by_model(results: Results) -> pd.DataFrame:
    """The levels of held-out text, a row a model that was run, a column a target."""
    table = levels_table(results).set_index(["split", "target"]).loc["heldout"].T.dropna()
    names = [ARMS[LEVELS[name]].label if name in LEVELS else "uniform guess" for name in table.index]
    return pd.DataFrame(table.assign(model=names)).reset_index(drop=True)


def damage_table(results: Results) -> pd.DataFrame:
    """Next-token loss by how many layers are kept at either end, the recurrent one between them; and minus the full
    model's, the cut's damage."""
    profile, full, rows = results.profile, _run(results, "full"), []
    own = max(profile.split.prelude, profile.split.coda)
    ends = {arm.ends: name for name, arm in ARMS.items() if arm.ends} | {own: "cut"}
    for _, name in sorted(ends.items()):
        if run := _run(results, name):
            split, row = profile.split_of(name), {"arm": name}
            row |= {"kept": f"{split.prelude}/1/{split.coda}", "layers": split.prelude + 1 + split.coda}
            for text in splits(profile):
                row[text] = run.last(text, "loss_t+1")
                row[f"{text} - full"] = row[text] - _last(full, text, "loss_t+1")
            rows.append(row)
    return pd.DataFrame(rows, columns=["arm", "kept", "layers", *(f"{text}{end}" for text in splits(profile)
                                                                 for end in ("", " - full"))])


def untrained_table(results: Results) -> pd.DataFrame:
    """Next-token loss of the loop before any update, by depth, on the few held-out blocks that probes are scored on,
    beside cut and full on the same blocks."""
    probes, runs = results.profile.probes, {name: _run(results, arm) for name, arm in STARTS.items()}
    beside = {arm: _run(results, arm) for arm in ("cut", "full")}
    same = {arm: math.nan if run is None else float(np.mean(run.last("heldout", "block_losses_t+1")[:probes.blocks]))
            for arm, run in beside.items()}
    return pd.DataFrame([{"depth": depth} | {name: _last(run, "heldout", f"loss_t+1/depth_{depth}")
                                             for name, run in runs.items()} | same for depth in probes.depths])


def stream_table(results: Results) -> pd.DataFrame:
    """The residual stream's root mean square per channel after the embedding (layer 0) and each layer of the base: the
    median over tokens, and that of each block's first token, an attention sink."""
    run = _run(results, "refine_base")
    found = {name: [] if run is None else run.last("model", f"{name}_rms") for name in ("layer", "sink")}
    return pd.DataFrame({"layer": range(len(found["layer"])), "tokens": found["layer"], "first token": found["sink"]})
