"""One style, one function a figure; each is saved as PNG and PDF with a sidecar of what it was made from.

Never imports torch. Losses are nats per token, bars are 95 % intervals (docs/statistics.md).
"""

import functools
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

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
from . import audit as audited
from . import reported, tables
from .comparisons import INTERVENTIONS, LADDER, LOOPS, Comparisons, by_protocol
from .levels import LEVELS, levels_table
from .results import Results, shown_depth
from .statistics import FEWEST, Interval, family, interval
from .tables import interval_of

# Okabe and Ito (2008): told apart by colour-blind readers, and in print by their markers
LOOKS = {  # colour and marker
    "full": ("#000000", "*"), "cut": ("#7f7f7f", "x"), "controller": ("#0072B2", "o"), "static": ("#D55E00", "s"),
    "none": ("#009E73", "^"), "controller_nogate": ("#CC79A7", "v"), "controller_nogate_nonorm": ("#E69F00", "D"),
    "lora": ("#CC79A7", "P"), "linear": ("#E69F00", "X"), "affine": ("#56B4E9", "p"), "refine": ("#F0E442", "d"),
    "bare": ("#7f7f7f", "+"), "unigram": ("#7f7f7f", "1"), "bigram": ("#7f7f7f", "2"),  # nothing was trained for these
    "released": ("#000000", "D"), "corrected": ("#56B4E9", "h")}  # a switch's settings, where no arm is told apart
STYLE = {"figure.figsize": (7.0, 3.2), "figure.dpi": 150, "font.size": 9, "axes.titlesize": 9, "axes.spines.top": False,
         "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False,
         "figure.constrained_layout.use": True, "pdf.fonttype": 42, "svg.hashsalt": "ouroboros"}
plt.rcdefaults()  # a user's matplotlibrc changes no figure
plt.rcParams.update(STYLE)
DEPTH, DIFFERENCE = "depth (recurrence steps)", "difference (nats per token)"


# ---------------------------------------------------------------------------------------------------------- saving

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


# ------------------------------------------------------------------------------------------- what figures are made of

def _style(arm: str) -> dict:
    """Colour and marker of an arm: its own, or those of the arm that it is a variant of."""
    return dict(zip(("color", "marker"), LOOKS.get(arm) or LOOKS[arm.split("_")[0]], strict=True))


def _name(found: Comparisons, arm: str, depth: int | None = None, name: str | None = None) -> str:
    """An arm's name in a figure, with what its reader must know."""
    short = found.norms_converged(arm, depth) is False
    return f"{name or arm} (norms not converged)" if short else name or arm


def _lines(results: Results, title: str, x: str, y: str, draw: Callable, ticks: Sequence = (), legend: bool = True):
    """A panel a protocol, each drawn by `draw(axis, comparisons)`."""
    several = by_protocol(results)
    figure, axes = plt.subplots(1, len(several), squeeze=False)
    for axis, found in zip(axes[0], several, strict=True):
        axis.set(title=f"{title} ({found.protocol})", xlabel=x, ylabel=y)
        draw(axis, found)
        if ticks:
            axis.set_xticks(ticks)
        if legend and axis.get_legend_handles_labels()[1]:
            axis.legend()
    return figure


def _points(axis, points: Iterable[tuple[float, Interval]], arm: str, label: str, **style) -> None:
    """Means with their intervals, each (x, interval); a mean of one seed has no bar."""
    shown = sorted(((x, found) for x, found in points if np.isfinite(found.mean)), key=lambda point: point[0])
    if shown:
        x, found = zip(*shown, strict=True)
        sides = [[each.mean - each.low for each in found], [each.high - each.mean for each in found]]
        bars = np.maximum(np.nan_to_num(sides), 0)  # of a ratio whose seeds agree a side may round below 0
        axis.errorbar(x, [each.mean for each in found], yerr=bars, label=label, capsize=3, **_style(arm) | style)


def _parts(axis, parts: dict, arm: str, label: str, shift: float = 0.0) -> None:
    """The intervals of parts whose names end in a number, against that number, `shift` beside it."""
    _points(axis, ((int(name.split()[-1]) + shift, found) for name, found in family(parts).items()), arm, label)


def _categories(axis, shown: list[tuple[str, str, Interval]]) -> None:
    """Intervals side by side, each (label, arm, interval); one without runs, or undefined, leaves its place empty."""
    axis.axhline(0, color="black", linewidth=0.8)
    for place, (label, arm, found) in enumerate(shown):
        hollow = {"markerfacecolor": "none"} if found.n < FEWEST else {}  # too few seeds to judge
        _points(axis, [(place, found)], arm, label.replace("\n", ", "), linestyle="none", **hollow)
        if found.n and not np.isfinite(found.mean):
            axis.annotate("undefined", (place, 0), rotation=90, ha="center", va="bottom", fontsize=7)
    axis.set_xticks(range(len(shown)), [label for label, _, _ in shown], fontsize=7)
    axis.set_xlim(-0.5, max(len(shown), 1) - 0.5)
    if sum(max(map(len, label.split("\n"))) for label, _, _ in shown) > 40:  # characters that fit side by side
        axis.set_xticks(range(len(shown)), [label.replace("\n", " ") for label, _, _ in shown], rotation=45, ha="right",
                        rotation_mode="anchor", fontsize=7)


class Panel(NamedTuple):
    """Intervals side by side, as `_categories` takes them (None: nothing is drawn); `switch`: a legend of its settings
    is shown."""

    title: str
    shown: list[tuple[str, str, Interval]] | None
    x: str = ""
    y: str = ""
    switch: str = ""


def _panels(panels: Sequence[Panel], sharey: bool = False, height: float = 3.2, below: bool = False):
    """Panels beside, or below, each other."""
    figure, axes = plt.subplots(*((len(panels), 1) if below else (1, len(panels))), sharey=sharey, squeeze=False)
    figure.set_size_inches(7.0, height)
    for axis, panel in zip(axes.flat, panels, strict=True):
        if panel.shown is not None:
            _categories(axis, panel.shown)
            if panel.switch:
                _settings(axis, panel.switch)
        axis.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
    return figure


def _rows(table: pd.DataFrame, column: str, label: str, switch: str = "", setting: str = "") -> list:
    """The intervals in a column of a table's rows that were run. `label` is a template of a row's fields; a mark's
    style is its arm's, or of a `switch` that of the setting in a row's field `setting`."""
    rows = [(row, interval_of(row, column)) for row in table.to_dict("records")]
    return [(label.format(**row), _setting(switch, row[setting]) if switch else row["arm"], found)
            for row, found in rows if found.n]


def _setting(switch: str, value: str) -> str:
    """The style of a switch's setting: the column's that has it."""
    return COLUMNS[SWITCHES[switch].index(value)]


def _settings(axis, switch: str) -> None:
    """A legend of a switch's two settings."""
    handles = [plt.Line2D([], [], linestyle="none", **_style(column)) for column in COLUMNS]
    axis.legend(handles, SWITCHES[switch], title=switch, fontsize=7, title_fontsize=7)


# ----------------------------------------------------------------------------------- before and beside any training

@_shows_runs
def levels(results: Results):
    """The losses of what isn't trained on held-out text, under both targets."""
    table = levels_table(results).set_index(["split", "target"]).loc["heldout"]
    names = [name for name in ("uniform", *LEVELS) if table[name].notna().all()]
    figure, axis = plt.subplots()
    for target, marker in (("t+1", "o"), ("t+2", "D")):
        axis.plot(range(len(names)), table.loc[target, names], marker, label=target)
    axis.set(xticks=range(len(names)), xticklabels=names, ylabel="held-out loss (nats per token)",
             title="What each target gives before anything is trained (corrected)")
    axis.legend()
    return figure


def reach():
    """How far an entry that moves by the whole rate at each update gets by the released settings, in both formats."""
    figure, axis = plt.subplots()
    axis.axhline(reported.ADDS_RESIDUAL, color="black", linestyle="--", label="adds the whole residual")
    shown = np.linspace(0, reported.UPDATES, 26).round().astype(int)
    for name, half, arm in (("float32", False, "controller"), ("bfloat16", True, "static")):
        reached = reported.reach([reported.PEAK] * reported.UPDATES, half)
        axis.plot(shown, reached[shown], label=name, **_style(arm))
    axis.set(title="the most that m can reach", xlabel="update", ylabel="m (no unit)")
    axis.legend()
    return figure


def base_curve(run: Run | None):
    """The base's pretraining: held-out and dev loss against tokens; empty where the base was fetched."""
    figure, axis = plt.subplots()
    axis.set(title="pretraining of the base" if run else "the base was not pretrained here", xlabel="tokens",
             ylabel="loss, t+1 (nats per token)")
    for split, arm in (("heldout", "controller"), ("dev", "static")) if run else ():
        recipe, part = run.manifest["config"]["base"]["pretraining"], tables.curve(run, split, "loss_t+1")
        axis.plot(part["update"] * recipe["batch"] * recipe["block"], part["value"], label=split, **_style(arm))
        axis.legend()
    figure.runs = {"base": run} if run else {}
    return figure


def cost(profiles: list[Profile]):
    """What the Controller's loop costs against depth, in percent of the full model, a panel a profile."""
    figure, axes = plt.subplots(1, len(profiles), squeeze=False)
    for axis, profile in zip(axes[0], profiles, strict=True):
        table = counted.table(profile)
        loop = table[table["arm"] == "controller"]
        axis.axhline(100, color=LOOKS["full"][0], linestyle=":", label="full")
        for (name, column), arm in zip((("FLOPs, forward", "% of full's forward"), ("key/value cache",
                                       "% of full's cache"), ("weights held", "% of full's weights")), LOOPS,
                                       strict=True):
            axis.plot(loop["depth"].astype(int), loop[column], label=name, **_style(arm))
        axis.set(title=f"cost of the loop (shape of {profile.name})", xlabel=DEPTH, ylabel="percent of the full model")
        axis.set_xticks(profile.depths)
        axis.legend()
    return figure


# ----------------------------------------------------------------------------------------------- against depth, update

@_shows_runs
def losses_by_depth(results: Results, arms: tuple[str, ...]):
    """Loss against depth for some arms, between the full and the cut model, and what a unigram reaches."""
    beside = {"full": ":", "cut": "--", "unigram": "-."}
    table = tables.arm_table(results, (*beside, *arms), results.profile.protocols)

    def draw(axis, found: Comparisons) -> None:
        part = table[table["protocol"] == found.protocol]
        for arm, dashes in beside.items():
            for loss in part[part["arm"] == arm]["loss"].dropna():
                axis.axhline(loss, color=LOOKS[arm][0], linestyle=dashes, label=arm)
        for arm in arms:
            rows = part[part["arm"] == arm]
            known = {"one run": rows["shared"].all(), "norms not converged": rows["norms converged"].eq(False).any()}
            notes = ", ".join(note for note, holds in known.items() if holds)
            _points(axis, ((row["depth"], interval_of(row, "loss")) for row in rows.to_dict("records")), arm,
                    f"{arm} ({notes})" if notes else arm)

    return _lines(results, "loss by depth", DEPTH, "loss (nats per token)", draw, results.profile.depths)


@_shows_runs
def advantage(results: Results):
    """Static minus Controller, paired by seed, against depth; above 0 the Controller is ahead."""
    def draw(axis, found: Comparisons) -> None:
        axis.axhline(0, color="black", linewidth=0.8)
        _parts(axis, found.compare("static", "controller", by="depth"), "controller", "static - Controller")

    return _lines(results, "static - Controller", DEPTH, DIFFERENCE, draw, results.profile.depths, legend=False)


@_shows_runs
def other_depths(results: Results):
    """Held-out loss of the runs of the base depth when they are scored at other depths."""
    base = results.profile.depth

    def draw(axis, found: Comparisons) -> None:
        axis.axvline(base, color="black", linewidth=0.8, linestyle="--")
        for arm in LOOPS:
            _parts(axis, found.at_other_depths(arm), arm, arm)

    return _lines(results, f"trained at depth {base}, scored at others", "depth when scored",
                         "held-out loss, t+1 (nats per token)", draw, results.profile.probes.depths)


@_shows_runs
def interventions(results: Results):
    """What the Controller's held-out loss rises by when it sees something else, against depth."""
    depths = results.profile.depths

    def draw(axis, found: Comparisons) -> None:
        axis.axhline(0, color="black", linewidth=0.8)
        for number, (kind, arm) in enumerate(zip(INTERVENTIONS, LOOPS, strict=True)):
            _parts(axis, {f"depth {d}": found.interventions(d)[kind] for d in depths}, arm, kind.replace("_", " "),
                   shift=0.3 * (number - 1))

    return _lines(results, "Controller shown something else", DEPTH, "rise of the loss (nats per token)", draw,
                         depths)


@_shows_runs
def steps(results: Results, depth: int):
    """How much each recurrence step changes the state, relative to the state before it."""
    rows = tables.steps_table(results, depth).to_dict("records")

    def draw(axis, found: Comparisons) -> None:
        for arm in LOOPS:
            _points(axis, ((row["step"], interval_of(row, "change")) for row in rows
                           if (row["protocol"], row["arm"]) == (found.protocol, arm)), arm, arm)
        axis.set_yscale("log")

    return _lines(results, f"change by step, depth {depth}", "recurrence step", "|new state - state| / |state|",
                         draw)


@_shows_runs
def training_curves(results: Results, arms: tuple[str, ...], depth: int):
    """Held-out next-token loss during training, mean over seeds, at one depth."""
    curves = tables.curves(results, arms, depth)

    def draw(axis, found: Comparisons) -> None:
        for arm in arms:
            part = curves[(curves["protocol"] == found.protocol) & (curves["arm"] == arm)]
            if not part.empty:
                axis.plot(part["update"], part["value"], label=_name(found, arm, depth), **_style(arm))

    return _lines(results, f"training, depth {depth}", "update", "held-out loss, t+1 (nats per token)", draw)


@_shows_runs
def gate_opening(results: Results, depth: int):
    """How far the Controller's gate opens at some recurrence steps, over training."""
    table, shown = tables.gate_table(results, depth), sorted({1, 2, max(1, depth // 2), depth})

    def draw(axis, found: Comparisons) -> None:
        for step, arm in zip(shown, (*LOOPS, "lora"), strict=False):
            rows = table[(table["protocol"] == found.protocol) & (table["step"] == step)]
            if len(rows):
                axis.plot(rows["update"], rows["gate_open"], label=f"step {step}", markersize=4, **_style(arm))

    return _lines(results, f"gate of the Controller, depth {depth}", "update",
                         "opening (share of the new state)", draw)


# ------------------------------------------------------------------------------------------------------ side by side

@_shows_runs
def overview(results: Results):
    """Every way to live without the removed layers, loops at one depth, minus the cut model: the README's figure."""
    depth = shown_depth(results)
    arms = ("full", *results.profile.instead, "none_nogate", "none_nonorm", "none", "static", "controller",
            "static_nonorm", "controller_nonorm")

    def shown(found: Comparisons) -> list:
        against = [(arm, interval(found.difference(arm, "cut", depth=depth))) for arm in arms]
        return [(_name(found, arm, depth), arm, each) for arm, each in against if each.n]

    return _panels([Panel(f"arm - cut, loops at depth {depth} ({found.protocol})", shown(found), y=DIFFERENCE)
                    for found in by_protocol(results)], height=3.8)


@_shows_runs
def gate(results: Results):
    """Each gateless arm and the gated one, minus the cut model, at the depths where they were run."""
    planned = results.profile.depths_of
    shown = [(arm, depth) for depth in planned("controller_nogate")
             for arm in ("controller", "controller_nogate", "controller_nogate_nonorm") if depth in planned(arm)]
    return _panels([Panel(f"arm - cut ({found.protocol})", [
        (f"{_name(found, arm, depth)}\nd{depth}", arm, interval(found.difference(arm, "cut", depth=depth)))
        for arm, depth in shown], y=DIFFERENCE) for found in by_protocol(results)])


@_shows_runs
def configurations(results: Results):
    """Static minus Controller in each configuration; above 0 the Controller is ahead."""
    leads = {found.protocol: family(found.compare("static", "controller", by="configuration"))
             for found in by_protocol(results)}
    return _panels([Panel(f"static - Controller ({protocol})", [(name, "controller", each) for name, each in
                                                                found.items()], y=DIFFERENCE)
                    for protocol, found in leads.items()])


@_shows_runs
def ladder(results: Results):
    """A loop with more and more parts minus the cut model, `corrected`, a panel a depth."""
    depths = results.profile.depths_of("controller_nogate") or (results.profile.depth,)
    found = Comparisons(results, "corrected")
    return _panels([Panel(f"depth {depth} (corrected)", [
        (_name(found, LADDER[name], depth, name), LADDER[name], each)
        for name, each in family(found.ladder(depth)).items()],
        y="arm - cut (nats per token)" if depth == depths[0] else "") for depth in depths], sharey=True)


@_shows_runs
def coda(results: Results):
    """The loops of the base depth with the coda frozen, trained by LoRA and trained whole, minus the cut model."""
    depth = results.profile.depth
    found = family(Comparisons(results, "corrected").coda(depth))
    return _panels([Panel(f"coda frozen and trained, depth {depth} (corrected)", [
        (name.replace("_", "\n", 1), name.split("_")[0], each) for name, each in found.items()],
        y="arm - cut (nats per token)")])


@_shows_runs
def instead(results: Results):
    """Loss minus the cut model's against trained parameters and against the FLOPs of a token."""
    table = tables.instead_table(results)
    figure, axes = plt.subplots(1, 2, sharey=True)
    figure.set_size_inches(7.0, 3.6)
    for axis, column, what in zip(axes, ("trained parameters", "forward (MFLOP a token)"), ("parameters", "FLOPs"),
                                  strict=True):
        axis.axhline(0, color=LOOKS["cut"][0], linestyle="--")
        for arm, rows in table.dropna(subset=["arm - cut"]).groupby("arm", sort=False):
            hollow = {"markerfacecolor": "none"} if arm not in LOOKS else {}
            short = " (norms not converged)" if rows["norms converged"].eq(False).any() else ""
            _points(axis, ((row[column], interval_of(row, "arm - cut")) for row in rows.to_dict("records")), arm,
                    f"{arm}{short}", linestyle="none", **hollow)
        axis.set(title=f"against {what} (corrected)", xlabel=column)
        axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
    axes[0].set_ylabel("arm - cut (nats per token)")
    axes[1].legend(fontsize=7)
    return figure


# ---------------------------------------------------------------------------------------------------------- the audit

@_shows_runs
def audit(results: Results, quantity: str):
    """What each switch's released setting does to a headline number, a panel a column, a marker a place."""
    table = audited.switch_table(results, quantity)
    table = table[(table["switch"] != "none") & table["effect"].notna()]
    unit = "" if "%" in quantity else " (nats per token)"
    return _panels([Panel(f"released setting - corrected setting, all else as in ({column})", [
        (f"{row.switch}\n{audited.place(row)}", "full" if row.switch == "all" else "controller",
         interval_of(row._asdict(), "effect")) for row in table[table["column"] == column].itertuples()],
        "switch, where", f"effect on\n{quantity}{unit}") for column in COLUMNS], height=7.0, below=True)


@_shows_runs
def audit_target(results: Results):
    """Each arm minus the cut model on held-out text, a panel the target that is scored."""
    table = audited.target_table(results, LOOPS)
    return _panels([Panel(f"scored on {target}", _rows(table, f"{target}, arm - cut", "{arm}\n{protocol}"),
                          "arm, protocol", "arm - cut (nats per token)" if target == "t+1" else "")
                    for target in ("t+1", "t+2")], sharey=True, height=3.8)


@_shows_runs
def audit_pooling(results: Results):
    """The leak, and Controller against static, by what the Controller pools."""
    table = audited.leak_table(results, other=False)
    return _panels([Panel(title, _rows(table, column, "{protocol}\nd{depth}", "pooling", "pooling"), "protocol, depth",
                          f"{column} (nats per token)", legend) for title, column, legend in (
        ("rise of the loss on the first half", "second half replaced", ""),
        ("who is ahead", "static - Controller", "pooling"))], height=3.8)


@_shows_runs
def audit_depth(results: Results):
    """What more steps take off the loss, and off the Controller's lead, by the rule for the depth."""
    table, column, arms, lead = audited.depth_table(results), audited.over_depths(results), None, None
    if len(table):
        loops = table["arm"].isin(LOOPS)
        arms = _rows(table[loops], column, "{arm}\n{protocol}")
        lead = _rows(table[~loops], column, "{protocol}", "depth", "depth rule")
    y = f"{column} (nats per token)"
    return _panels([Panel("loss: above 0 deeper is better", arms, "arm, protocol", y),
                    Panel("static - Controller: above 0 it shrinks", lead, "protocol", y, "depth")], height=3.8)


@_shows_runs
def audit_reference(results: Results):
    """Gap recovery by what the full model is read on; a place stays empty where it is undefined."""
    column = "gap recovery (%)"
    rows = _rows(audited.reference_table(results), column, "{protocol}\n{reference}", "reference", "reference")
    return _panels([Panel("gap recovery of the Controller", rows, "protocol, texts of the full model", column,
                          "reference")])


@_shows_runs
def audit_precision(results: Results):
    """The share of each trained tensor's elements that moved, a panel an arm, a line a protocol."""
    table = audited.moved_table(results)
    kept = table.drop_duplicates("protocol").set_index("protocol")["precision"]
    figure, axes = plt.subplots(1, 2, sharey=True)
    figure.set_size_inches(7.0, 3.8)
    for axis, arm in zip(axes, LOOPS[:2], strict=True):
        rows = table[table["arm"] == arm].pivot(index="tensor", columns="protocol", values="moved")
        for number, protocol in enumerate(name for name in kept.index if name in rows):
            places = np.arange(len(rows)) + 0.2 * (number - (len(kept) - 1) / 2)  # beside each other
            style = _style(_setting("precision", kept[protocol]))
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
    table = audited.reach_table(results, results.profile.audit_depths[-1:])
    lead = _rows(audited.rate_table(results), "static - Controller", "{protocol}\nd{depth}", "rate", "rates")
    figure = _panels([
        Panel("who is ahead", lead, "protocol, depth", "static - Controller (nats per token)", "rate"),
        Panel("deepest loop; dashed: adds the residual", _rows(table, "largest m", "{arm}\n{protocol}"),
              "arm, protocol", "largest entry of m (no unit)")], height=3.8)
    if len(table):
        figure.axes[1].axhline(table["adds the residual"].iloc[0], color="black", linestyle="--")
    return figure
