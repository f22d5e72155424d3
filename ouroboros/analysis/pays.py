"""Does a loop pay? What docs/hypotheses.md asks, of the runs that it names. Never imports torch.

Losses are nats per token; a gain is the bar's loss minus the candidate's.
"""

import json
import math
from collections.abc import Iterator

import numpy as np
import pandas as pd

from ..experiment.arms import ARMS
from ..experiment.cost import Cost
from ..experiment.learning_rates import planned
from ..log import Run
from .comparisons import Comparisons
from .results import Results
from .statistics import FEWEST, NOTHING, BySeed, Interval, interval, minus
from .tables import columns, interval_of, sized
from .text import missing_of

HEADLINE = "values"  # the class of docs/hypotheses.md that pays.json is about
WINS, CLOSE = 0.02, 0.01  # of the gap
YES = "Yes"
TAUGHT_BAR = "lora_distilled"  # of a candidate that learns from the full model
GATE = 0.3  # at which a scan's losses are compared
SAME = 0.02  # training FLOPs that differ by less count as equal
OTHERS = {"values+layer": "With a layer more stored", "inference": "At equal FLOPs a token"}


def _runs(results: Results, *purposes: str) -> list[Run]:
    """The finished runs of these purposes of which the plan says a class; noted as read."""
    found = [run for run in results.runs.values() if run.manifest.get("class")
             and run.manifest["purpose"] in purposes and run.manifest["status"] == "finished"
             and not ARMS[run.manifest["arm"]].scans]
    results.note(run.manifest["run"] for run in found)
    return found


def _updates(run: Run) -> int:
    return run.manifest["config"]["training"]["updates"]


def screened(results: Results) -> pd.DataFrame:
    """One row an arm of the screen, the best first: class, budget, its best rates, loss on dev, and what it costs."""
    rows, runs = {}, _runs(results, "rate", "screen")
    own = {run.manifest["arm"] for run in runs if run.manifest["purpose"] == "screen"}
    for run in runs:
        made, loss = run.manifest, run.last("dev", "loss_t+1")
        if made["purpose"] == "rate" and made["arm"] in own:
            continue  # searched after the screen, to be confirmed
        if loss < rows.get(made["arm"], {"dev": math.inf})["dev"]:
            rows[made["arm"]] = {"arm": made["arm"], "class": made["class"], "budget": made["budget"], "dev": loss,
                                 "rate": made["rate"], "gates' rate": made.get("elementwise_rate"),
                                 **_costs(results, run)}
    table = pd.DataFrame(rows.values())
    return table.sort_values("dev", ignore_index=True) if rows else table


def _costs(results: Results, run: Run) -> dict[str, float]:
    cost, flops = Cost.of(results.profile, run.manifest["arm"]), run.manifest["flops"]
    return {"trained values": run.manifest["trainable"], "stored values (million)": (
        cost.frozen() + run.manifest["trainable"]) / 1e6, "forward (MFLOP a token)": flops["forward"] / 1e6,
        "training (MFLOP a token)": flops["training"] / 1e6, "updates": _updates(run)}


def chosen(results: Results) -> dict[str, list[str]]:
    """What is confirmed: the two best arms of each class on dev among those with the headline's budget, and a third
    that is CLOSE to the second."""
    table = screened(results)
    if table.empty:
        return {"candidate": [], "baseline": []}
    found = {}
    for kind in ("candidate", "baseline"):
        rows = table[(table["budget"] == HEADLINE) & (table["class"] == kind)]
        close = rows["dev"].iloc[2:3] <= rows["dev"].iloc[:2].max() + CLOSE * gap(results)
        found[kind] = rows["arm"].head(2 + int(close.sum())).tolist()
    return found


def losses(results: Results, arm: str, split: str = "heldout", updates: int | None = None) -> BySeed:
    """An arm's confirmed loss, seed by seed and block by block; `updates`: the profile's own number."""
    updates = updates or results.profile.training.updates
    runs = {run.manifest["seed"]: run for run in _runs(results, "pays")
            if run.manifest["arm"] == arm and _updates(run) == updates}
    clusters = results.clusters.get(split)
    blocks = {seed: np.array(run.last(split, "block_losses_t+1")) for seed, run in runs.items()} \
        if clusters is not None else None
    return BySeed({seed: run.last(split, "loss_t+1") for seed, run in runs.items()}, blocks, clusters, of=arm)


def by_tokens(results: Results) -> pd.DataFrame:
    """Mean dev loss of each arm at each number of training tokens it was confirmed at, and the screen's."""
    rows = [{"arm": run.manifest["arm"], "dev": run.last("dev", "loss_t+1"), "tokens": _updates(run)
             * results.profile.training.tokens_per_update} for run in _runs(results, "pays")]
    if not rows:
        return pd.DataFrame()
    confirmed = {row["arm"] for row in rows}
    rows += [{"arm": row["arm"], "dev": row["dev"], "tokens": row["updates"]
              * results.profile.training.tokens_per_update} for row in screened(results).to_dict("records")
             if row["arm"] in confirmed]
    return pd.DataFrame(rows).groupby(["arm", "tokens"], sort=True)["dev"].mean().reset_index()


def gap(results: Results) -> float:
    """What cutting costs on held-out text; NaN where it isn't measured."""
    full, cut = (Comparisons(results, "corrected").loss(arm, column="heldout") for arm in ("full", "cut"))
    return float(np.mean(list(cut.values())) - np.mean(list(full.values()))) if full and cut else math.nan


def _confirmed_dev(results: Results, kind: str) -> dict[str, float]:
    """Mean dev loss of each arm of a class that the screen chose, at the headline's budget; nothing before the screen
    is whole and all that it chose is confirmed.

    What is distilled comes after, of the best. A candidate of which a seed diverged isn't there; a baseline's would
    make the bar another one, so then there is none.
    """
    profile, runs = results.profile, results.runs
    screen = [spec for spec in planned(profile, runs) if spec.purpose in ("rate", "screen") and profile.declared(spec)]
    finalists = [spec for spec in profile.runs() if spec.purpose == "pays" and spec.updates is None
                 and ARMS[spec.arm].teacher != "logits" and profile.declared(spec)["budget"] == HEADLINE]
    results.note(spec.id for spec in finalists)
    arms = chosen(results)[kind]
    if any(spec.id not in runs for spec in (*screen, *finalists)) or not {*arms} <= {spec.arm for spec in finalists}:
        return {}
    seeds = {arm: losses(results, arm, "dev") for arm in arms}
    whole = {arm: float(np.mean(list(found.values()))) for arm, found in seeds.items()
             if len(found) == sum(spec.arm == arm for spec in finalists) >= FEWEST}
    return whole if kind == "candidate" or len(whole) == len(arms) else {}


def _best(results: Results, kind: str) -> str | None:
    """The confirmed arm of a class with the lowest mean dev loss."""
    means = _confirmed_dev(results, kind)
    return min(means, key=means.get, default=None)


def decided(results: Results) -> dict | None:
    """Best candidate against bar at equal stored and trained values, for pays.json; None before both are confirmed, and
    where LoRA that learns from the full model must be beaten too, and isn't confirmed."""
    best, bar = _best(results, "candidate"), _best(results, "baseline")
    if best is None or bar is None:
        return None
    gain, margin = _gain(results, best, bar), WINS * gap(results)
    wins = _word(gain, margin) == YES
    if wins and ARMS[best].teacher != "none":
        taught = _gain(results, best, TAUGHT_BAR)
        if taught.n < FEWEST:
            return None
        wins = bool(taught.low > 0)
    return {"best": best, "bar": bar, "gain": gain.mean, "interval": [gain.low, gain.high], "seeds": gain.n,
            "wins": wins, "margin": margin, "budget": HEADLINE,
            "updates": results.profile.training.updates, "measured": "held-out text, next token, nats per token"}


def as_json(results: Results) -> str | None:
    """`results/<profile>/pays.json`."""
    found = decided(results)
    return json.dumps(found, indent=1) + "\n" if found else None


def _gain(results: Results, arm: str, bar: str) -> Interval:
    return interval(minus(losses(results, bar), losses(results, arm)))


def _word(gain: Interval, margin: float) -> str:
    """Whether a gain wins, nearly does, or doesn't (docs/hypotheses.md)."""
    if gain.low > 0 and gain.mean > margin:
        return YES
    return "Nearly, but not by the rule" if gain.low > 0 or gain.mean > margin else "No"


def _same_flops(arm: str) -> str | None:
    """LoRA on the cut model with as many layers more as an arm makes extra passes; None where there is no such arm."""
    passes = ARMS[arm].passes
    return {1: "lora_layer", 3: "lora_layers"}.get(passes.count) if passes and passes.kind == "damped" else None


def _layers_more(arm: str) -> str:
    """What a block's pass applies beyond the bar at equal FLOPs, said beside it."""
    more = ARMS[arm].passes.layers - 1
    return f" (it applies {more} layer{'s' * (more > 1)} more than that bar)" if more else ""


def _bar(results: Results, arm: str, kind: str, budget: str) -> str | None:
    """The arm that another one's gain is on; a distilled one's is distilled too. None of a bar itself, and of one of
    another class than the headline's."""
    bar = _best(results, "baseline") if budget == HEADLINE else None
    if kind == "candidate" and budget in OTHERS:
        bar = _same_flops(arm) if budget == "inference" else "lora_layer"
    bar = f"{bar}_distilled" if bar and ARMS[arm].teacher == "logits" else bar
    return None if bar == arm else bar


def confirmed(results: Results) -> pd.DataFrame:
    """One row a confirmed arm: its held-out loss, and what it gains on its class's bar."""
    rows = []
    for run in _runs(results, "pays"):
        made = run.manifest
        if _updates(run) == results.profile.training.updates and made["arm"] not in [row["arm"] for row in rows]:
            bar = _bar(results, made["arm"], made["class"], made["budget"])
            rows.append({"arm": made["arm"], "class": made["class"], "budget": made["budget"], "bar": bar or "",
                         **columns("loss", interval(losses(results, made["arm"]))),
                         **columns("gain", _gain(results, made["arm"], bar) if bar else NOTHING),
                         **_costs(results, run)})
    table = pd.DataFrame(rows)
    return table.sort_values("loss", ignore_index=True) if rows else table


def scanned(results: Results) -> pd.DataFrame:
    """What the scan measured on dev: a row an untrained change of the cut model, its loss minus the cut model's."""
    run = next((run for run in results.runs.values() if ARMS[run.manifest["arm"]].scans), None)
    if run is None:
        return pd.DataFrame()
    results.note([run.manifest["run"]])
    split, rows = results.profile.split, []
    kept = run.last("dev", "loss_t+1/kept")
    cut = kept[split.recurrent - split.prelude]
    rows += [{"what": "kept in the middle", "layer": split.prelude + place, "layers": 1, "passes": 0, "g": math.nan,
              "loss": loss, "loss - cut": loss - cut} for place, loss in enumerate(kept)]
    for (_, metric), found in run.series.items():
        if metric.startswith("loss_t+1/again_"):
            often, gate = metric.removeprefix("loss_t+1/again_").split("_g")
            layers, passes = map(int, often.split("x"))
            rows += [{"what": "passed again", "layer": place, "layers": layers, "passes": passes, "g": float(gate),
                      "loss": loss, "loss - cut": loss - cut} for place, loss in enumerate(found.values[-1])]
    return pd.DataFrame(rows)


def scan_choice(table: pd.DataFrame, recurrent: int) -> dict[str, list[int] | int]:
    """What the scan's rules choose, as the profile's `scanned`: of one, two, three neighbours passed once more the
    first, and the other middle layer."""
    again = _compared(table)
    looped = [int(again[again["layers"] == layers].sort_values("loss")["layer"].iloc[0]) for layers in (1, 2, 3)]
    kept = table[(table["what"] == "kept in the middle") & (table["layer"] != recurrent)].sort_values("loss")
    return {"looped": looped, "kept": int(kept["layer"].iloc[0])}


def _compared(table: pd.DataFrame) -> pd.DataFrame:
    """A scan's rows that its rules compare."""
    return table[(table["what"] == "passed again") & (table["passes"] == 1) & (table["g"] == GATE)]


def answer(results: Results) -> list[str]:
    """The verdict, its size, and what each step has said so far."""
    wanted = {spec.id for entry in results.profile.plan if entry.role for spec in results.profile.runs_of(entry)}
    lost = sorted(name for name, run in results.runs.items()
                  if run.manifest["purpose"] == "pays" and run.manifest["status"] == "diverged")
    return [*_verdict(results), *_elsewhere(results), missing_of(results, wanted),
            *([f"Diverged, so in no mean: {', '.join(lost)}"] if lost else []),
            *_screen_said(results), *_scan_said(results)]


def _verdict(results: Results) -> list[str]:
    found, arms = decided(results), [_best(results, kind) for kind in ("candidate", "baseline")]
    if None in arms:
        return ["Not decided yet: the screen and what it chooses aren't whole at equal stored and trained values"]
    (best, bar), gain = (ARMS[arm].label for arm in arms), _gain(results, *arms)
    if found is None:
        return [f"Not decided yet: {best} is ahead of {bar}, and must be of LoRA that learns from the full model too"]
    word = _word(gain, found["margin"])
    if found["wins"]:
        said = f"{_at_same_flops(results, arms[0])}: {best} is ahead of {bar}"
    elif word == YES:
        said = f"No: {best} is ahead of {bar}, but not of LoRA that learns from the full model too"
    else:
        said = f"{word}: {best} against {bar}"
    lines = [f"{said}; its gain is {sized(gain)} nats per token (n = {gain.n}), where a win asks for more than "
             f"{found['margin']:.3f}"]
    if arms[1] == "relaxed":  # it is a loop itself
        means = _confirmed_dev(results, "baseline")
        second = min(means.keys() - {"relaxed"}, key=means.get)
        lines.insert(0, "A published loop, relaxed recursion, is the best baseline: that one pays, in storage only, as "
                     f"it applies as many layers as the full model; its gain on {ARMS[second].label} is "
                     f"{sized(_gain(results, 'relaxed', second))} nats per token")
    return lines + ([_at_same_training(results, arms[0])] if found["wins"] else [])


def _elsewhere(results: Results) -> Iterator[str]:
    """The verdict on each candidate that is confirmed in another class than the headline's."""
    margin = WINS * gap(results)
    for row in confirmed(results).to_dict("records"):
        if row["class"] == "candidate" and row["budget"] in OTHERS and row["gain_n"] >= FEWEST:
            gain = interval_of(row, "gain")
            yield (f"{OTHERS[row['budget']]}: {_word(gain, margin)}, {ARMS[row['arm']].label} against "
                   f"{ARMS[row['bar']].label}; its gain is {sized(gain)} nats per token (n = {gain.n})")


def _at_same_flops(results: Results, best: str) -> str:
    """`Yes` of a winner, or in what alone it pays (docs/hypotheses.md)."""
    other = _same_flops(best)
    gain = _gain(results, best, other) if other else NOTHING
    if other and gain.n < FEWEST:
        return "Yes in stored values; at equal FLOPs a token it isn't confirmed yet"
    behind = other is None or gain.high < 0
    return "In storage only, since it is behind at equal FLOPs a token" if behind else YES + _layers_more(best)


def _at_same_training(results: Results, best: str) -> str:
    """A winner against LoRA with as many updates as make its training FLOPs equal."""
    runs = [(run.manifest, run.manifest["flops"]["training"] * _updates(run)) for run in _runs(results, "pays")]
    usual = results.profile.training.updates
    own = next(flops for made, flops in runs if made["arm"] == best and made["budget"] == HEADLINE
               and made["config"]["training"]["updates"] == usual)
    longer = [made for made, flops in runs if made["budget"] == "training" and made["class"] == "baseline"
              and math.isclose(flops, own, rel_tol=SAME)]
    updates = longer[0]["config"]["training"]["updates"] if longer else None
    gain = interval(minus(losses(results, longer[0]["arm"], updates=updates), losses(results, best))) if longer \
        else NOTHING
    if gain.n < FEWEST:
        return "At equal training FLOPs it isn't confirmed yet"
    return (f"At equal training FLOPs, {updates} updates of LoRA on the cut model, its gain is {sized(gain)} nats per "
            f"token (n = {gain.n})")


def shown(results: Results) -> str:
    """What the figure shows, in one sentence."""
    found, table = decided(results), screened(results)
    if found:
        best, bar = (ARMS[found[name]].label for name in ("best", "bar"))
        gain = _gain(results, found["best"], found["bar"])
        side = {1: "ahead of", -1: "behind", 0: "indistinguishable from"}[gain.side]
        return f"The best loop ({best}) is {side} {bar} by {sized(gain)} nats" if gain.side else \
            f"The best loop ({best}) is {side} {bar}"
    if table.empty:
        return "Not run yet: does a loop pay?"
    label, updates = ARMS[table["arm"].iloc[0]].label, table["updates"].iloc[0]
    if len(table) == 1:
        return f"Only {label} has run yet, at {updates} updates"
    return f"At {updates} updates {label} has the lowest loss of {len(table)} arms (one seed)"


def _screen_said(results: Results) -> list[str]:
    table = screened(results)
    if table.empty:
        return []
    first = table[table["budget"] == HEADLINE].groupby("class")["dev"].min()
    said = "; ".join(f"{row['arm']} {row['dev']:.3f}" for row in table.head(5).to_dict("records"))
    if len(first) < 2:
        return [f"Screen, dev loss at {table['updates'].iloc[0]} updates, one seed: {said}"]
    ahead = first["baseline"] - first["candidate"]
    return [f"Screen, dev loss at {table['updates'].iloc[0]} updates, one seed: the best candidate is "
            f"{'ahead of' if ahead > 0 else 'behind'} the best baseline of as many values by {abs(ahead):.3f}; the "
            f"five lowest of all: {said}", *_other_classes(results, table)]


def _other_classes(results: Results, table: pd.DataFrame) -> Iterator[str]:
    """How near the best candidate of each other class came to its bar in the screen: within 2 % of the gap it is
    confirmed."""
    dev, stored = table.set_index("arm")["dev"], table[table["budget"] == "values+layer"]["arm"]
    bars = {"values+layer": dict.fromkeys(stored, "lora_layer"),
            "inference": {arm: _same_flops(arm) for arm in dev.index}}
    won = (decided(results) or {}).get("wins")
    for budget, bar_of in bars.items():
        gains = {arm: dev[bar] - dev[arm] for arm, bar in bar_of.items() if bar in dev.index}
        if gains:
            best = max(gains, key=gains.get)
            more = _layers_more(best) if budget == "inference" else ""
            near = "is" if gains[best] > -WINS * gap(results) else "isn't"
            # the headline's winner is confirmed there, however near another arm came
            rule = "" if won and budget == "inference" else f"; by the rule it {near} confirmed"
            yield (f"{OTHERS[budget]}, in the screen: {ARMS[best].label} is {'ahead' if gains[best] > 0 else 'behind'} "
                   f"by {abs(gains[best]):.3f}{more}{rule}")


def _scan_said(results: Results) -> list[str]:
    table = scanned(results)
    if table.empty:
        return []
    lines = []
    for layers, rows in _compared(table).groupby("layers"):
        best = rows.sort_values("loss").iloc[0]
        which = f"layer {best['layer']}" if layers == 1 else f"layers {best['layer']} to {best['layer'] + layers - 1}"
        verb = "lowers the loss on dev most" if best["loss - cut"] < 0 else "raises the loss on dev least"
        lines.append(f"Untrained, one extra pass over {which} of the cut model at g = {best['g']:g} {verb}: by "
                     f"{abs(best['loss - cut']):.3f} (16 blocks, no interval)")
    return lines
