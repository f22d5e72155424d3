"""One style, one function a figure; each is saved as PNG and PDF with a sidecar of what it was made from.

Never imports torch. Losses are nats per token, bars are 95 % intervals (docs/statistics.md).
"""

import functools
import hashlib
import io
import json
import os
from pathlib import Path

os.environ["MPLBACKEND"] = "Agg"  # importing matplotlib fails at a backend that it doesn't know
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.container import ErrorbarContainer
from PIL import Image

from ..experiment import cost as counted
from ..experiment.profile import Profile
from ..experiment.protocol import COLUMNS, SWITCHES
from ..log import Run, write_atomic
from . import arithmetic, comparison, intervals, levels, metrics, tables
from . import audit as audited
from .metrics import Results

# Okabe and Ito (2008): told apart by colour-blind readers, and in print by their markers
COLOURS = {"full": "#000000", "cut": "#7f7f7f", "controller": "#0072B2", "static": "#D55E00", "none": "#009E73",
           "controller_nogate": "#CC79A7", "controller_nogate_nonorm": "#E69F00", "lora": "#CC79A7",
           "linear": "#E69F00", "affine": "#56B4E9", "refine": "#F0E442",
           "bare": "#7f7f7f", "unigram": "#7f7f7f", "bigram": "#7f7f7f",  # what nothing was trained for
           "released": "#000000", "corrected": "#56B4E9"}  # a switch's settings, where no arm is told apart
MARKERS = {"full": "*", "cut": "x", "controller": "o", "static": "s", "none": "^", "controller_nogate": "v",
           "controller_nogate_nonorm": "D", "lora": "P", "linear": "X", "affine": "p", "refine": "d",
           "bare": "+", "unigram": "1", "bigram": "2", "released": "D", "corrected": "h"}
STYLE = {"figure.figsize": (7.0, 3.2), "figure.dpi": 150, "font.size": 9, "axes.titlesize": 9, "axes.spines.top": False,
         "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False,
         "figure.constrained_layout.use": True, "pdf.fonttype": 42, "svg.hashsalt": "ouroboros"}
plt.rcdefaults()  # a user's matplotlibrc changes no figure
plt.rcParams.update(STYLE)


def _style(arm: str) -> dict:
    """Colour and marker of an arm: its own, or those of the arm that it is a variant of."""
    known = arm if arm in COLOURS else arm.split("_")[0]
    return {"color": COLOURS[known], "marker": MARKERS[known]}


def _shows_runs(draw):
    """Note on a figure the runs that were read for it, {run id: Run}."""
    @functools.wraps(draw)
    def drawn(results: Results, *args, **kwargs):
        with results.reading() as read:
            figure = draw(results, *args, **kwargs)
        figure.runs = {name: results.runs[name] for name in sorted(read)}
        return figure

    return drawn


def save(figure, name: str, results: Results, folder: Path) -> None:
    """Write <folder>/<name>.png, .pdf and .json: the arrays plotted, and the seals of the raw logs that it shows."""
    if results.profile.name == "smoke":
        figure.text(0.5, 0.5, "smoke: not a result", fontsize=40, color="red", alpha=0.25, ha="center", va="center",
                    rotation=20)
    files = {}
    for kind, undated in (("png", {"Software": None}), ("pdf", {"CreationDate": None, "Producer": None})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, metadata=undated)
        figure.set_layout_engine("none")  # what the first format laid out holds for the second
        content = _indexed(buffer) if kind == "png" else buffer.getvalue()
        write_atomic(folder / f"{name}.{kind}", content)
        files[kind] = hashlib.sha256(content).hexdigest()
    inputs = {name: run.manifest["seal"] for name, run in getattr(figure, "runs", {}).items()}
    sidecar = {"figure": name, "profile": results.profile.name, "inputs": inputs, "files": files,
               "plotted": _plotted(figure)}
    write_atomic(folder / f"{name}.json", json.dumps(sidecar, indent=1) + "\n")
    plt.close(figure)


def _indexed(png: io.BytesIO) -> bytes:
    """The picture with a palette of 256 colours: it looks the same at a third of the size, and is committed twice."""
    indexed = io.BytesIO()
    Image.open(png).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(indexed, "png", optimize=True)
    return indexed.getvalue()


def _plotted(figure) -> list[dict]:
    """Every labelled line of a figure with its error bars, rounded to 6 significant digits."""
    lines = []
    for number, axes in enumerate(figure.axes):
        for container in [*axes.containers, *axes.lines]:
            label = container.get_label()
            if label and not label.startswith("_"):
                bars = isinstance(container, ErrorbarContainer)
                x, y = (container.lines[0] if bars else container).get_data()
                arrays = {"x": x, "y": y}
                if bars:
                    ends = np.array(container.lines[2][0].get_segments())  # (points, 2, xy)
                    arrays |= {"low": ends[:, 0, 1], "high": ends[:, 1, 1]}
                rounded = {key: [float(f"{v:.6g}") for v in np.asarray(values, dtype=float)]
                           for key, values in arrays.items()}
                lines.append({"axes": number, "label": label} | rounded)
    return lines


def _axes_by_protocol(results: Results, title: str, x: str, y: str):
    protocols = results.profile.protocols
    figure, axes = plt.subplots(1, len(protocols), squeeze=False)
    for axis, protocol in zip(axes[0], protocols, strict=True):
        axis.set(title=f"{title} ({protocol})", xlabel=x, ylabel=y)
    return figure, dict(zip(protocols, axes[0], strict=True))


def _name(results: Results, arm: str, protocol: str, depth: int | None = None, name: str | None = None) -> str:
    """An arm's name in a figure, with what its reader must know."""
    short = metrics.Statistics(results, protocol).norms_converged(arm, depth) is False
    return f"{name or arm} (norms not converged)" if short else name or arm


def _points(axis, rows: pd.DataFrame, arm: str, label: str | None = None, shift: float = 0.0) -> None:
    """Means with their intervals against depth, `shift` beside it; a mean of one seed has no bar."""
    rows = rows.dropna(subset=["loss"]).sort_values("depth")
    if rows.empty:
        return
    bars = np.nan_to_num(np.array([rows["loss"] - rows["loss_low"], rows["loss_high"] - rows["loss"]]).astype(float))
    axis.errorbar(rows["depth"].astype(int) + shift, rows["loss"], yerr=bars, label=label or arm, capsize=3,
                  **_style(arm))


@_shows_runs
def losses_by_depth(results: Results, arms: tuple[str, ...]):
    """Loss against depth for some arms, between the full and the cut model, and what a unigram reaches."""
    levels = {"full": ":", "cut": "--", "unigram": "-."}
    table = tables.arm_table(results, (*levels, *arms), results.profile.protocols)
    figure, axes = _axes_by_protocol(results, "loss by depth", "depth (recurrence steps)", "loss (nats per token)")
    for protocol, axis in axes.items():
        part = table[table["protocol"] == protocol]
        for arm, dashes in levels.items():
            for loss in part[part["arm"] == arm]["loss"].dropna():
                axis.axhline(loss, color=COLOURS[arm], linestyle=dashes, label=arm)
        for arm in arms:
            rows = part[part["arm"] == arm]
            known = {"one run": rows["shared"].all(), "norms not converged": rows["norms converged"].eq(False).any()}
            notes = [note for note, holds in known.items() if holds]
            _points(axis, rows, arm, f"{arm} ({', '.join(notes)})" if notes else arm)
        axis.set_xticks(results.profile.depths)
        axis.legend()
    return figure


@_shows_runs
def advantage(results: Results):
    """Static minus Controller, paired by seed, against depth; above 0 the Controller is ahead."""
    table = tables.difference_table(results, "advantage_by_depth", gap=None)
    figure, axes = _axes_by_protocol(results, "static - Controller", "depth (recurrence steps)",
                                     "difference (nats per token)")
    for protocol, axis in axes.items():
        rows = table[table["protocol"] == protocol].rename(columns=lambda name: name.replace("difference", "loss"))
        rows = rows.assign(depth=rows["part"].str.removeprefix("depth ").astype(int))
        axis.axhline(0, color="black", linewidth=0.8)
        _points(axis, rows, "controller", "static - Controller")
        axis.set_xticks(results.profile.depths)
    return figure


@_shows_runs
def training_curves(results: Results, arms: tuple[str, ...], depth: int):
    """Held-out next-token loss during training, mean over seeds, at one depth."""
    curves = tables.curves(results, arms, depth)
    figure, axes = _axes_by_protocol(results, f"training, depth {depth}", "update",
                                     "held-out loss, t+1 (nats per token)")
    for protocol, axis in axes.items():
        for arm in arms:
            part = curves[(curves["protocol"] == protocol) & (curves["arm"] == arm)]
            if not part.empty:
                axis.plot(part["update"], part["value"], label=_name(results, arm, protocol, depth),
                          color=COLOURS[arm], marker=MARKERS[arm])
        if axis.lines:
            axis.legend()
    return figure


def base_curve(run: Run | None):
    """The base's pretraining: held-out and dev loss against tokens; empty where the base was fetched."""
    figure, axis = plt.subplots()
    axis.set(title="pretraining of the base" if run else "the base was not pretrained here", xlabel="tokens",
             ylabel="loss, t+1 (nats per token)")
    recipe = run.manifest["config"]["base"]["pretraining"] if run else {"batch": 0, "block": 0}
    tokens = recipe["batch"] * recipe["block"]  # an update
    for split, colour, marker in (("heldout", "#0072B2", "o"), ("dev", "#D55E00", "s")) if run else ():
        part = tables.curve(run, split, "loss_t+1")
        axis.plot(part["update"] * tokens, part["value"], label=split, color=colour, marker=marker)
        axis.legend()
    figure.runs = {"base": run} if run else {}
    return figure


def _parts(axis, parts: dict, arm: str, label: str, shift: float = 0.0) -> None:
    """The intervals of a statistic whose parts end in a number, against that number."""
    rows = [{"depth": int(name.split()[-1]), "loss": i.mean, "loss_low": i.low, "loss_high": i.high}
            for name, i in comparison.family(parts).items()]
    _points(axis, pd.DataFrame(rows), arm, label, shift)


@_shows_runs
def other_depths(results: Results):
    """Held-out loss of the runs of the base depth when they are scored at other depths."""
    base = results.profile.depth
    figure, axes = _axes_by_protocol(results, f"trained at depth {base}, scored at others", "depth when scored",
                                     "held-out loss, t+1 (nats per token)")
    for protocol, axis in axes.items():
        statistics = metrics.Statistics(results, protocol)
        axis.axvline(base, color="black", linewidth=0.8, linestyle="--")
        for arm in ("controller", "static", "none"):
            _parts(axis, statistics.at_other_depths(arm), arm, arm)
        axis.set_xticks(results.profile.probes.depths)
        if axis.containers:
            axis.legend()
    return figure


@_shows_runs
def interventions(results: Results):
    """What the Controller's held-out loss rises by when it sees something else, against depth."""
    figure, axes = _axes_by_protocol(results, "Controller shown something else", "depth (recurrence steps)",
                                     "rise of the loss (nats per token)")
    styles = dict(zip(metrics.INTERVENTIONS, ("controller", "static", "none"), strict=True))
    for protocol, axis in axes.items():
        statistics, depths = metrics.Statistics(results, protocol), results.profile.depths
        axis.axhline(0, color="black", linewidth=0.8)
        for number, (kind, style) in enumerate(styles.items()):
            _parts(axis, {f"depth {d}": statistics.interventions(d)[kind] for d in depths}, style,
                   kind.replace("_", " "), shift=0.3 * (number - 1))
        axis.set_xticks(depths)
        if axis.containers:
            axis.legend()
    return figure


@_shows_runs
def steps(results: Results, depth: int):
    """How much each recurrence step changes the state, relative to the state before it."""
    table = tables.steps_table(results, depth)
    figure, axes = _axes_by_protocol(results, f"change by step, depth {depth}", "recurrence step",
                                     "|new state - state| / |state|")
    for protocol, axis in axes.items():
        for arm in ("controller", "static", "none"):
            rows = table[(table["protocol"] == protocol) & (table["arm"] == arm)] if len(table) else table
            if len(rows):
                _points(axis, rows.drop(columns="depth", errors="ignore").rename(
                    columns=lambda name: name.replace("change", "loss").replace("step", "depth")), arm)
        axis.set_yscale("log")
        if axis.containers:
            axis.legend()
    return figure


@_shows_runs
def gate_opening(results: Results, depth: int):
    """How far the Controller's gate opens at some recurrence steps, over training."""
    table = tables.gate_table(results, depth)
    figure, axes = _axes_by_protocol(results, f"gate of the Controller, depth {depth}", "update",
                                     "opening (share of the new state)")
    shown = sorted({1, 2, max(1, depth // 2), depth})
    for protocol, axis in axes.items():
        for step, arm in zip(shown, ("controller", "static", "none", "lora"), strict=False):
            rows = table[(table["protocol"] == protocol) & (table["step"] == step)]
            if len(rows):
                axis.plot(rows["update"], rows["gate_open"], label=f"step {step}", markersize=4, **_style(arm))
        if axis.lines:
            axis.legend()
    return figure


@_shows_runs
def audit(results: Results, quantity: str):
    """What each switch's released setting does to a headline number, a panel a column, a marker a place."""
    table = audited.switch_table(results, quantity)
    table = table[table["switch"] != "none"]
    figure, axes = plt.subplots(len(audited.COLUMNS), 1)
    figure.set_size_inches(7.0, 7.0)
    for axis, column in zip(axes, audited.COLUMNS, strict=True):
        rows = table[table["column"] == column]
        shown = [(f"{row.switch}\n{audited.place(row)}", "controller" if row.switch != "all" else "full",
                  intervals.Interval(row.effect, row.effect_low, row.effect_high, int(row.effect_n)))
                 for row in rows.itertuples() if np.isfinite(row.effect)]
        _categories(axis, shown)
        unit = "" if "%" in quantity else " (nats per token)"
        axis.set(title=f"released setting - corrected setting, all else as in ({column})", xlabel="switch, where",
                 ylabel=f"effect on\n{quantity}{unit}")
    return figure


def _rows(axis, table: pd.DataFrame, column: str, label, arm) -> None:
    """An interval in a table's column, side by side over its rows that were run; `label` and `arm` are functions of a
    row."""
    table = table[table[f"{column}_n"] > 0] if len(table) else table
    _categories(axis, [(label(row), arm(row), intervals.Interval(row[column], row[f"{column}_low"],
                                                                 row[f"{column}_high"], int(row[f"{column}_n"])))
                       for row in table.to_dict("records")])


def _setting(switch: str, value: str) -> str:
    """The style of a switch's setting: the column's that has it."""
    return COLUMNS[SWITCHES[switch].index(value)]


def _settings(axis, switch: str) -> None:
    """A legend of a switch's two settings."""
    handles = [plt.Line2D([], [], linestyle="none", **_style(column)) for column in COLUMNS]
    axis.legend(handles, SWITCHES[switch], title=switch, fontsize=7, title_fontsize=7)


@_shows_runs
def audit_target(results: Results):
    """Each arm minus the cut model on held-out text, a panel the target that is scored."""
    table = audited.target_table(results, audited.LOOPS)
    figure, axes = plt.subplots(1, 2, sharey=True)
    figure.set_size_inches(7.0, 3.8)
    for axis, target in zip(axes, ("t+1", "t+2"), strict=True):
        _rows(axis, table, f"{target}, arm - cut", lambda row: f"{row['arm']}\n{row['protocol']}",
              lambda row: row["arm"])
        axis.set(title=f"scored on {target}", xlabel="arm, protocol")
    axes[0].set_ylabel("arm - cut (nats per token)")
    return figure


@_shows_runs
def audit_pooling(results: Results):
    """The leak, and Controller against static, by what the Controller pools."""
    table = audited.leak_table(results, other=False)
    figure, axes = plt.subplots(1, 2)
    figure.set_size_inches(7.0, 3.8)
    for axis, column, words in zip(axes, ("second half replaced", "static - Controller"),
                                   ("rise of the loss on the first half", "who is ahead"), strict=True):
        _rows(axis, table, column, lambda row: f"{row['protocol']}\nd{row['depth']}",
              lambda row: _setting("pooling", row["pooling"]))
        axis.set(title=words, xlabel="protocol, depth", ylabel=f"{column} (nats per token)")
    _settings(axes[1], "pooling")
    return figure


@_shows_runs
def audit_depth(results: Results):
    """What more steps take off the loss, and off the Controller's lead, by the rule for the depth."""
    table, column = audited.depth_table(results), audited.over_depths(results)
    figure, axes = plt.subplots(1, 2)
    figure.set_size_inches(7.0, 3.8)
    if len(table):
        arms = table["arm"].isin(audited.LOOPS)
        _rows(axes[0], table[arms], column, lambda row: f"{row['arm']}\n{row['protocol']}", lambda row: row["arm"])
        _rows(axes[1], table[~arms], column, lambda row: row["protocol"],
              lambda row: _setting("depth", row["depth rule"]))
        _settings(axes[1], "depth")
    axes[0].set(title="loss: above 0 deeper is better", xlabel="arm, protocol", ylabel=f"{column} (nats per token)")
    axes[1].set(title="static - Controller: above 0 it shrinks", xlabel="protocol",
                ylabel=f"{column} (nats per token)")
    return figure


@_shows_runs
def audit_reference(results: Results):
    """Gap recovery by what the full model is read on; a place stays empty where it is undefined."""
    table = audited.reference_table(results)
    figure, axis = plt.subplots()
    _rows(axis, table, "gap recovery (%)", lambda row: f"{row['protocol']}\n{row['reference']}",
          lambda row: _setting("reference", row["reference"]))
    _settings(axis, "reference")
    axis.set(title="gap recovery of the Controller", xlabel="protocol, texts of the full model",
             ylabel="gap recovery (%)")
    return figure


@_shows_runs
def audit_precision(results: Results):
    """The share of each trained tensor's elements that moved, a panel an arm, a line a protocol."""
    table = audited.moved_table(results)
    protocols = table["protocol"].unique()
    figure, axes = plt.subplots(1, 2, sharey=True)
    figure.set_size_inches(7.0, 3.8)
    for axis, arm in zip(axes, audited.LOOPS[:2], strict=True):
        rows = table[table["arm"] == arm].pivot(index="tensor", columns="protocol", values="moved")
        for number, protocol in enumerate(name for name in protocols if name in rows):
            places = np.arange(len(rows)) + 0.2 * (number - (len(protocols) - 1) / 2)  # beside each other
            style = _style(_setting("precision", table[table["protocol"] == protocol]["precision"].iloc[0]))
            half = {"fillstyle": "left"} if "+" in protocol else {}  # a column's own are whole
            axis.plot(places, rows[protocol], label=protocol, linestyle="none", **style, **half)
        axis.set_xticks(range(len(rows)), rows.index, rotation=45, ha="right", fontsize=7)
        axis.set(title=arm, xlabel="trained tensor")
        if axis.lines:
            axis.legend(fontsize=7)
    axes[0].set_ylabel("share of elements that moved")
    return figure


@_shows_runs
def audit_rate(results: Results):
    """Controller against static at shared and own rates, and the largest entry of m beside what adds the residual."""
    figure, axes = plt.subplots(1, 2)
    figure.set_size_inches(7.0, 3.8)
    _rows(axes[0], audited.rate_table(results), "static - Controller",
          lambda row: f"{row['protocol']}\nd{row['depth']}",
          lambda row: _setting("rate", row["rates"]))
    _settings(axes[0], "rate")
    axes[0].set(title="who is ahead", xlabel="protocol, depth", ylabel="static - Controller (nats per token)")
    table = audited.reach_table(results, results.profile.audit_depths[-1:])
    _rows(axes[1], table, "largest m", lambda row: f"{row['arm']}\n{row['protocol']}", lambda row: row["arm"])
    if len(table):
        axes[1].axhline(table["adds the residual"].iloc[0], color="black", linestyle="--")
    axes[1].set(title="deepest loop; dashed: adds the residual", xlabel="arm, protocol",
                ylabel="largest entry of m (no unit)")
    return figure


def cost(profiles: list[Profile]):
    """What the Controller's loop costs against depth, in percent of the full model, a panel a profile."""
    figure, axes = plt.subplots(1, len(profiles), squeeze=False)
    for axis, profile in zip(axes[0], profiles, strict=True):
        table = counted.table(profile)
        loop = table[table["arm"] == "controller"]
        axis.axhline(100, color=COLOURS["full"], linestyle=":", label="full")
        for (name, column), colour, marker in zip(
                (("FLOPs, forward", "% of full's forward"), ("key/value cache", "% of full's cache"),
                 ("weights held", "% of full's weights")), ("#0072B2", "#D55E00", "#009E73"), "os^", strict=True):
            axis.plot(loop["depth"].astype(int), loop[column], label=name, color=colour, marker=marker)
        axis.set(title=f"cost of the loop (shape of {profile.name})", xlabel="depth (recurrence steps)",
                 ylabel="percent of the full model")
        axis.set_xticks(profile.depths)
        axis.legend()
    return figure


def _categories(axis, shown: list[tuple[str, str, intervals.Interval]]) -> None:
    """Intervals side by side, each (label, arm, interval); one without runs, or undefined, leaves its place empty."""
    axis.axhline(0, color="black", linewidth=0.8)
    for place, (label, arm, interval) in enumerate(shown):
        if np.isfinite(interval.mean):
            sides = [[interval.mean - interval.low], [interval.high - interval.mean]]
            bars = np.maximum(np.nan_to_num(sides), 0)  # of a ratio whose seeds agree a side may round below 0
            hollow = {"markerfacecolor": "none"} if interval.n < 3 else {}  # too few seeds to judge
            axis.errorbar([place], [interval.mean], yerr=bars, label=label.replace("\n", ", "), capsize=3,
                          linestyle="none", **_style(arm), **hollow)
        elif interval.n:
            axis.annotate("undefined", (place, 0), rotation=90, ha="center", va="bottom", fontsize=7)
    axis.set_xticks(range(len(shown)), [label for label, _, _ in shown], fontsize=7)
    axis.set_xlim(-0.5, max(len(shown), 1) - 0.5)
    if sum(max(map(len, label.split("\n"))) for label, _, _ in shown) > 40:  # characters that fit side by side
        axis.set_xticks(range(len(shown)), [label.replace("\n", " ") for label, _, _ in shown], rotation=45, ha="right",
                        rotation_mode="anchor", fontsize=7)


def _intervals(parts: dict) -> dict[str, intervals.Interval]:
    return comparison.family(parts)


def reach():
    """How far an entry that moves by the whole rate at each update gets by the released settings, in both formats."""
    figure, axis = plt.subplots()
    axis.axhline(arithmetic.WHOLE, color="black", linestyle="--", label="adds the whole residual")
    shown = np.linspace(0, arithmetic.UPDATES, 26).round().astype(int)
    for name, half, arm in (("float32", False, "controller"), ("bfloat16", True, "static")):
        reached = arithmetic.reach([arithmetic.PEAK] * arithmetic.UPDATES, half)
        axis.plot(shown, reached[shown], label=name, **_style(arm))
    axis.set(title="the most that m can reach", xlabel="update", ylabel="m (no unit)")
    axis.legend()
    return figure


@_shows_runs
def gate(results: Results):
    """Each gateless arm and the gated one, minus the cut model, at the depths where they were run."""
    arms = ("controller", "controller_nogate", "controller_nogate_nonorm")
    shown = [(arm, depth) for depth in results.profile.depths_of("controller_nogate") for arm in arms
             if depth in results.profile.depths_of(arm)]
    figure, axes = _axes_by_protocol(results, "arm - cut", "", "difference (nats per token)")
    for protocol, axis in axes.items():
        statistics = metrics.Statistics(results, protocol)
        _categories(axis, [(f"{_name(results, arm, protocol, depth)}\nd{depth}", arm,
                            comparison.interval(statistics.against_cut(arm, depth)[""])) for arm, depth in shown])
    return figure


@_shows_runs
def overview(results: Results):
    """Every way to live without the removed layers, loops at one depth, minus the cut model: the README's figure."""
    depth = metrics.told_depth(results)
    arms = ("full", *results.profile.instead, "none_nogate", "none_nonorm", "none", "static", "controller",
            "static_nonorm", "controller_nonorm")
    figure, axes = _axes_by_protocol(results, f"arm - cut, loops at depth {depth}", "",
                                     "difference (nats per token)")
    figure.set_size_inches(7.0, 3.8)
    for protocol, axis in axes.items():
        statistics = metrics.Statistics(results, protocol)
        found = [(arm, comparison.interval(statistics.against_cut(arm, depth)[""])) for arm in arms]
        _categories(axis, [(_name(results, arm, protocol, depth), arm, interval)
                           for arm, interval in found if interval.n])
    return figure


@_shows_runs
def levels_of(results: Results):
    """The losses of what isn't trained on held-out text, under both targets."""
    table = levels.levels_table(results).set_index(["split", "target"]).loc["heldout"]
    names = [name for name in ("uniform", *levels.LEVELS) if table[name].notna().all()]
    figure, axis = plt.subplots()
    for target, marker in (("t+1", "o"), ("t+2", "D")):
        axis.plot(range(len(names)), table.loc[target, names], marker, label=target)
    axis.set(xticks=range(len(names)), xticklabels=names, ylabel="held-out loss (nats per token)",
             title="What each target gives before anything is trained (corrected)")
    axis.legend()
    return figure


@_shows_runs
def configurations(results: Results):
    """Static minus Controller in each configuration; above 0 the Controller is ahead."""
    figure, axes = _axes_by_protocol(results, "static - Controller", "", "difference (nats per token)")
    for protocol, axis in axes.items():
        found = _intervals(metrics.Statistics(results, protocol).advantage_by_configuration())
        _categories(axis, [(name, "controller", interval) for name, interval in found.items()])
    return figure


@_shows_runs
def ladder(results: Results):
    """A loop with more and more parts minus the cut model, `corrected`, a panel a depth."""
    depths = results.profile.depths_of("controller_nogate") or (results.profile.depth,)
    figure, axes = plt.subplots(1, len(depths), squeeze=False, sharey=True)
    for axis, depth in zip(axes[0], depths, strict=True):
        found = _intervals(metrics.Statistics(results, "corrected").ladder(depth))
        _categories(axis, [(_name(results, arm, "corrected", depth, name), arm, found[name])
                           for name, arm in metrics.LADDER.items() if name in found])
        axis.set(title=f"depth {depth} (corrected)")
    axes[0][0].set_ylabel("arm - cut (nats per token)")
    return figure


@_shows_runs
def coda(results: Results):
    """The loops of the base depth with the coda frozen, trained by LoRA and trained whole, minus the cut model."""
    figure, axis = plt.subplots()
    found = _intervals(metrics.Statistics(results, "corrected").coda(results.profile.depth))
    _categories(axis, [(name.replace("_", "\n", 1), name.split("_")[0], interval) for name, interval in found.items()])
    axis.set(title=f"coda frozen and trained, depth {results.profile.depth} (corrected)",
             ylabel="arm - cut (nats per token)")
    return figure


@_shows_runs
def instead(results: Results):
    """Loss minus the cut model's against trained parameters and against the FLOPs of a token."""
    table = tables.instead_table(results)
    figure, axes = plt.subplots(1, 2, sharey=True)
    figure.set_size_inches(7.0, 3.6)
    for axis, column, what in zip(axes, ("trained parameters", "forward (MFLOP a token)"), ("parameters", "FLOPs"),
                                  strict=True):
        axis.axhline(0, color=COLOURS["cut"], linestyle="--")
        for arm, rows in table.dropna(subset=["arm - cut"]).groupby("arm", sort=False):
            bars = np.nan_to_num(np.array([rows["arm - cut"] - rows["arm - cut_low"],
                                           rows["arm - cut_high"] - rows["arm - cut"]]).astype(float))
            hollow = {"markerfacecolor": "none"} if arm not in COLOURS else {}
            short = rows["norms converged"].eq(False).any()
            axis.errorbar(rows[column], rows["arm - cut"], yerr=bars, capsize=3, linestyle="none",
                          label=f"{arm} (norms not converged)" if short else arm,
                          **_style(arm), **hollow)
        axis.set(title=f"against {what} (corrected)", xlabel=column)
        axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
    axes[0].set_ylabel("arm - cut (nats per token)")
    axes[1].legend(fontsize=7)
    return figure
