"""One style, one function a figure; each is saved as PNG and PDF with a sidecar of what it was made from.

A figure's title is the sentence that says what it shows (`text`). Losses are nats per token, bars are 95 % intervals
(docs/statistics.md), in forest plots a hollow mark has too few seeds to judge. Never imports torch.
"""

import functools
import hashlib
import io
import json
import os
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

os.environ["MPLBACKEND"] = "Agg"  # importing matplotlib fails at a backend that it doesn't know
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.container import ErrorbarContainer
from PIL import Image

from ..experiment import cost as counted
from ..experiment.arms import ARMS
from ..experiment.profile import Profile
from ..experiment.protocol import COLUMNS
from ..log import write_atomic
from . import audit as audited
from . import pays as paying
from . import tables, text
from .comparisons import INTERVENTIONS, LADDER, LOOPS, Comparisons, by_protocol, draws_depths
from .reference_losses import LEVELS, levels_table
from .results import Results, shown_depth
from .statistics import FEWEST, Interval, family, interval, minus, scaled, t_interval
from .tables import interval_of

# Okabe and Ito (2008): told apart by colour-blind readers, and in print by their markers
LOOKS = {  # colour and marker
    "full": ("#000000", "*"), "cut": ("#7f7f7f", "x"), "controller": ("#0072B2", "o"), "static": ("#D55E00", "s"),
    "none": ("#009E73", "^"), "controller_nogate": ("#CC79A7", "v"), "controller_nogate_nonorm": ("#E69F00", "D"),
    "lora": ("#CC79A7", "P"), "lora_layer": ("#CC79A7", "*"), "linear_fit": ("#E69F00", "v"),
    "linear": ("#E69F00", "X"), "affine": ("#56B4E9", "p"), "refine": ("#F0E442", "d"),
    "bare": ("#7f7f7f", "+"), "unigram": ("#7f7f7f", ">"), "bigram": ("#7f7f7f", "<"),  # nothing was trained for these
    "released": ("#000000", "D"), "corrected": ("#56B4E9", "h")}  # protocols, where no arm is told apart
PLAIN = [{"color": color, "marker": marker} for color, marker in (("#000000", "o"), ("#666666", "s"), ("#a0a0a0", "^"))]
SHORT = {"lora_layer": "LoRA, a layer more", "bare": "kept layers alone", "none": "loop, no modulation",
         "none_nonorm": "loop, its gate alone", "controller_matched": "Controller, matched norms",
         "bigram_seen": "token pairs, a run's own text"}
BRIGHT = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
SHORT_OF_NORMS = " \u2020"
NOTES = "\u2020 step norms far from the size of the stream", "hollow: fewer than three seeds"
STYLE = {"figure.figsize": (7.0, 3.4), "figure.dpi": 150, "font.size": 9, "axes.titlesize": 9, "axes.spines.top": False,
         "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False,
         "legend.fontsize": 8, "figure.titlesize": 10, "figure.constrained_layout.use": True, "pdf.fonttype": 42,
         "svg.hashsalt": "ouroboros"}
plt.rcdefaults()  # a user's matplotlibrc changes no figure
plt.rcParams.update(STYLE)
DEPTH, ARM_CUT = "depth (recurrence steps)", "loss - cut model's (nats per token)"


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


def save(figure, name: str, results: Results, folder: Path, pictures: bool = True) -> str:
    """Write <folder>/<name>.png, .pdf and .json: the finding, the arrays plotted, and the seals of the raw logs that it
    shows. Returns the finding. Without `pictures`, whose drawing takes longest, these two hold a dot."""
    finding = " ".join(figure.get_suptitle().split())
    if results.profile.name == "smoke":
        figure.text(0.5, 0.5, "smoke: not a result", fontsize=40, color="red", alpha=0.25, ha="center", va="center",
                    rotation=20)
    files = {}
    for kind, undated in (("png", {"Software": None}), ("pdf", {"CreationDate": None, "Producer": None})):
        content = _drawn(figure, kind, undated) if pictures else DOT
        write_atomic(folder / f"{name}.{kind}", content)
        files[kind] = hashlib.sha256(content).hexdigest()
    inputs = {name: run.manifest["seal"] for name, run in getattr(figure, "runs", {}).items()}
    sidecar = {"figure": name, "profile": results.profile.name, "finding": finding, "inputs": inputs,
               "files": files, "plotted": _plotted(figure)}
    write_atomic(folder / f"{name}.json", json.dumps(sidecar, indent=1) + "\n")
    plt.close(figure)
    return finding


def empty(figure) -> bool:
    """Whether a figure shows nothing, since nothing of it was run; such a figure is closed."""
    nothing = not _plotted(figure)
    if nothing:
        plt.close(figure)
    return nothing


def _drawn(figure, kind: str, metadata: dict) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, metadata=metadata)
    figure.set_layout_engine("none")  # what the first format laid out holds for the second
    return _as_png(Image.open(buffer).convert("RGB")) if kind == "png" else buffer.getvalue()


def _as_png(picture: Image.Image) -> bytes:
    """With a palette of 256 colours: it looks the same at a third of the size, and is committed twice."""
    indexed = io.BytesIO()
    picture.quantize(256, dither=Image.Dither.NONE).save(indexed, "png", optimize=True)
    return indexed.getvalue()


DOT = _as_png(Image.new("RGB", (1, 1)))


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
                    side = 0 if container.has_xerr else 1
                    ends = np.array(container.lines[2][0].get_segments())  # (points, 2, xy)
                    arrays |= {"low": ends[:, 0, side], "high": ends[:, 1, side]}
                rounded = {key: [float(f"{v:.6g}") for v in np.asarray(values, dtype=float)]
                           for key, values in arrays.items()}
                lines.append({"axes": number, "label": label} | rounded)
    return lines


# ------------------------------------------------------------------------------------------- what figures are made of

def _style(arm: str) -> dict:
    """Colour and marker of an arm: its own, or those of the arm that it is a variant of."""
    return dict(zip(("color", "marker"), LOOKS.get(arm) or LOOKS[arm.split("_")[0]], strict=True))


def _words(arm: str) -> str:
    return SHORT.get(arm) or ARMS[arm].label.removeprefix("the ")


def _name(arm: str, depth: int | None, *several: Comparisons) -> str:
    """An arm in words, and whether its step norms ended far from the stream's size under any of some protocols."""
    short = any(found.norms_near(arm, depth) is False for found in several)
    return _words(arm) + SHORT_OF_NORMS * short


def _titled(figure, finding: str):
    if "corrected" in {axis.get_title() for axis in figure.axes}:
        finding += " (corrected protocol)"
    figure.suptitle(textwrap.fill(finding, 92), x=0.01, ha="left")
    return figure


def _lines(results: Results, finding: str, x: str, y: str, draw: Callable, ticks: Sequence = ()):
    """A panel a protocol that was run, all with the same scale, each drawn by `draw(axis, comparisons)`."""
    several = _run_under(results)
    figure, axes = plt.subplots(1, len(several), squeeze=False, sharey=True)
    for axis, found in zip(axes[0], several, strict=True):
        draw(axis, found)
        _named(axis, found.protocol, x, y if axis is axes[0][0] else "", ticks)
    _legend(figure)
    return _titled(figure, finding)


def _run_under(results: Results) -> list[Comparisons]:
    """The protocols with a loop that was run; all where there is none."""
    cells = results.cells[results.cells["arm"].isin(LOOPS) & results.cells["status"].eq("finished")]
    several = by_protocol(results)
    return [found for found in several if found.protocol in set(cells["protocol"])] or several


def _named(axis, title: str, x: str, y: str, ticks: Sequence = ()) -> None:
    axis.set(title=title, xlabel=x, ylabel=y, **({"xticks": ticks} if ticks else {}))


def _legend(figure) -> None:
    """One legend of all panels, below them."""
    shown = {label: handle for axis in figure.axes for handle, label in zip(*axis.get_legend_handles_labels(),
                                                                            strict=True)}
    if shown:
        columns = min(3, max(1, 80 // (6 + max(map(len, shown)))))  # 80 characters fit side by side
        figure.legend(shown.values(), shown, loc="outside lower center", ncols=columns, title=_notes(figure, shown),
                      title_fontsize=8)


def _notes(figure, words: Iterable[str]) -> str:
    """What a dagger in some words, and hollow marks, mean on a figure that has them."""
    hollow = any(line.get_marker() not in ("None", None, "") and line.get_markerfacecolor() == "white"
                 for axis in figure.axes for line in axis.lines)
    return "; ".join(note for there, note in zip((any(SHORT_OF_NORMS in word for word in words), hollow),
                                                 NOTES, strict=True) if there)


def _points(axis, points: Iterable[tuple[float, Interval]], label: str, across: bool = False, **style) -> None:
    """Means with their intervals, each (place, interval), `across` the panel or up; a mean of one seed has no bar."""
    shown = sorted(((x, found) for x, found in points if np.isfinite(found.mean)), key=lambda point: point[0])
    if shown:
        places, found = zip(*shown, strict=True)
        means = [each.mean for each in found]
        sides = [[each.mean - each.low for each in found], [each.high - each.mean for each in found]]
        bars = np.maximum(np.nan_to_num(sides), 0)  # of a ratio whose seeds agree a side may round below 0
        drawn = {"x": means, "y": places, "xerr": bars} if across else {"x": places, "y": means, "yerr": bars}
        axis.errorbar(**drawn, label=label, capsize=3, **style)
        few = [(mean, place) for mean, place, each in zip(means, places, found, strict=True) if not each.judged]
        if few:
            axis.plot(*zip(*(pair if across else pair[::-1] for pair in few), strict=True), linestyle="none", zorder=3,
                      **{key: style[key] for key in ("color", "marker")}, markerfacecolor="white")
        if not across and style.get("linestyle") != "none":
            _band(axis, places, found, style)


def _band(axis, places: Sequence, found: Sequence[Interval], style: dict) -> None:
    """The 95 % interval along a line, where three seeds carry one."""
    judged = [each.n >= FEWEST for each in found]
    low, high = ([getattr(each, side) for each in found] for side in ("low", "high"))
    axis.fill_between(places, low, high, where=judged, color=style["color"], alpha=0.15, linewidth=0)


def _seeds(axis, lines: Iterable[tuple[Sequence, Sequence]], style: dict) -> None:
    """Each seed as a thin line of its own, where there are too few for an interval."""
    for places, values in lines:
        axis.plot(places, values, color=style["color"], linewidth=0.6, alpha=0.7)


def _parts(axis, parts: dict, label: str, shift: float = 0.0, **style) -> None:
    """The intervals of parts whose names end in a number, against that number, `shift` beside it."""
    places = {name: int(name.split()[-1]) + shift for name in parts}
    _points(axis, ((places[name], found) for name, found in family(parts).items()), label, **style)
    few = sorted({seed for values in parts.values() if len(values) < FEWEST for seed in values})
    of = {seed: [name for name in parts if seed in parts[name]] for seed in few}
    _seeds(axis, (([places[name] for name in names], [parts[name][seed] for name in names])
                  for seed, names in of.items()), style)


def _forest(panels: dict[str, list[tuple[str, str, Interval]]], finding: str, x: str, sharex: bool = False):
    """Intervals below each other: {title: [(row, whose style, interval)]}. Panels share the rows; a row that was run in
    none of them is left out, and a panel with no row."""
    panels = {title: shown for title, shown in panels.items() if any(found.n for *_, found in shown)} or panels
    rows = list(dict.fromkeys(row for shown in panels.values() for row, _, found in shown if found.n))
    figure, axes = plt.subplots(1, len(panels), squeeze=False, sharex=sharex, sharey=True,
                                figsize=(7.0, 1.3 + 0.25 * max(len(rows), 4)))
    for axis, (title, shown) in zip(axes[0], panels.items(), strict=True):
        axis.axvline(0, color="black", linewidth=0.8)
        seen = Counter()
        for row, arm, found in (mark for mark in shown if mark[2].n):
            place, style = rows.index(row) + 0.3 * seen[row], _style(arm)
            seen[row] += 1
            _points(axis, [(place, found)], f"{row}, all else {arm}" if arm in COLUMNS else row, across=True,
                    linestyle="none", **style)
            if np.isnan(found.mean):
                axis.annotate("undefined", (0, place), va="center", fontsize=7)
        axis.set_title(title)
    axes[0][0].set_yticks(range(len(rows)), rows, fontsize=8)
    axes[0][0].set_ylim(max(len(rows), 1) - 0.4, -0.6)
    figure.supxlabel("\n".join(filter(None, (x, _notes(figure, rows)))), fontsize=9)
    return _titled(figure, finding)


# ----------------------------------------------------------------------------------- before and beside any training

@_shows_runs
def levels(results: Results):
    """The losses of what isn't trained on held-out text, under both targets."""
    table = levels_table(results).set_index(["split", "target"]).loc["heldout"]
    names = [name for name in ("uniform", *LEVELS) if table[name].notna().all()]
    figure, axis = plt.subplots()
    for number, (target, label) in enumerate((("t+1", "the next token"), ("t+2", "the token after it"))):
        axis.plot(table.loc[target, names], range(len(names)), label=label, linestyle="none", **PLAIN[number])
    axis.set_yticks(range(len(names)), [_words(LEVELS[name]) if name in LEVELS else "uniform guess" for name in names])
    axis.invert_yaxis()
    axis.set_xlabel("held-out loss, nothing trained (nats per token)")
    axis.legend()
    return _titled(figure, text.shown_levels(table.loc["t+1", "full"], table.loc["t+2", "full"]))


def cost(profiles: list[Profile]):
    """What the Controller's loop costs against depth, in percent of the full model, a panel a profile."""
    figure, axes = plt.subplots(1, len(profiles), squeeze=False, sharey=True)
    loops = [table[table["arm"] == "controller"] for table in map(counted.table, profiles)]
    kinds = {"FLOPs, forward": "% of full's forward", "key/value cache": "% of full's cache",
             "weights held": "% of full's weights"}
    for axis, profile, loop in zip(axes[0], profiles, loops, strict=True):
        axis.axhline(100, color=LOOKS["full"][0], linestyle=":", label="full model")
        for number, (name, column) in enumerate(kinds.items()):
            axis.plot(loop["depth"].astype(int), loop[column], label=name, **PLAIN[number])
        _named(axis, f"the shape of {profile.name}", DEPTH, "percent of the full model" * (axis is axes[0][0]),
               profile.depths)
    _legend(figure)
    deepest = loops[0].iloc[-1]
    return _titled(figure, text.shown_cost(int(deepest["depth"]), *(deepest[column] for column in kinds.values())))


# ----------------------------------------------------------------------------------------------- against depth, update

@_shows_runs
def advantage(results: Results):
    """Loss against depth of the loops, between the full and the cut model, `corrected`; and static minus Controller,
    paired by seed, under each protocol: above 0 the Controller is ahead."""
    beside, depths = {"full": ":", "cut": "--", "unigram": "-."}, results.profile.depths
    found = Comparisons(results, "corrected")
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.0, 3.8))
    for arm, dashes in beside.items():
        if losses := found.loss(arm):
            left.axhline(interval(losses).mean, color=LOOKS[arm][0], linestyle=dashes, label=_words(arm))
    for arm in LOOPS:
        at = found.depths_of(arm)
        _points(left, ((depth, interval(found.loss(arm, depth))) for depth in at),
                _words(arm) + SHORT_OF_NORMS * any(found.norms_near(arm, depth) is False for depth in at),
                **_style(arm))
    right.axhline(0, color="black", linewidth=0.8)
    leads = {found.protocol: found.compare("static", "controller", by="depth") for found in by_protocol(results)}
    for protocol, parts in leads.items():
        drawn = ", Controller's depth drawn" if draws_depths("controller", protocol) else ""
        _parts(right, parts, protocol + drawn, **_style(protocol))
    _named(left, "corrected", DEPTH, "loss (nats per token)", depths)
    _named(right, "static table - Controller (nats)", DEPTH, "above 0: Controller ahead", depths)
    right.margins(y=0.1)
    _legend(figure)
    return _titled(figure, text.shown_by_depth(
        {depth: interval(found.difference("controller", "static", depth=depth)) for depth in (depths[0], depths[-1])}))


@_shows_runs
def other_depths(results: Results):
    """Held-out loss of the runs of the base depth when they are scored at other depths."""
    base, scored = results.profile.depth, results.profile.probes.depths

    def draw(axis, found: Comparisons) -> None:
        axis.axvline(base, color="black", linewidth=0.8, linestyle="--")
        for arm in LOOPS:
            _parts(axis, found.at_other_depths(arm), _words(arm), **_style(arm))

    ends = max(scored), min(scored, key=lambda depth: abs(depth - base))  # the base depth where it is probed
    parts = Comparisons(results, "corrected").at_other_depths("controller")
    further = interval(minus(*(parts[f"depth {depth}"] for depth in ends)))
    finding = text.compared(further, f"the Controller scored at depth {ends[0]}", f"itself at depth {ends[1]}")
    return _lines(results, finding, f"depth when scored, trained at {base}", "next-token loss (nats per token)", draw,
                  scored)


@_shows_runs
def interventions(results: Results):
    """What the Controller's held-out loss rises by when it sees something else, against depth."""
    depths = results.profile.depths

    def draw(axis, found: Comparisons) -> None:
        axis.axhline(0, color="black", linewidth=0.8)
        axis.margins(x=0.1)
        for number, kind in enumerate(INTERVENTIONS):
            _parts(axis, {f"depth {d}": found.interventions(d)[kind] for d in depths}, text.SHOWN[kind],
                   shift=0.3 * (number - 1), **_style("controller") | {"marker": "osD"[number]})

    rise = Comparisons(results, "corrected").interventions(shown_depth(results))["other_sequence"]
    finding = text.compared(interval(rise), "the Controller shown another text", "itself shown its own",
                            f" at depth {shown_depth(results)}")
    return _lines(results, finding, DEPTH, "rise of the loss (nats per token)", draw, depths)


@_shows_runs
def steps(results: Results, depth: int):
    """How much each recurrence step changes the state, relative to the state before it, and how far the gate opens."""
    table, several = tables.steps_table(results, depth), _run_under(results)
    kinds = {"change": "change of the state\n(share of it)", "gate_open": "gate's opening\n(share of the new state)"}
    figure, axes = plt.subplots(2, len(several), squeeze=False, sharex=True, sharey="row", figsize=(7.0, 4.6))
    for first, line, (kind, y) in zip((True, False), axes, kinds.items(), strict=True):
        for axis, found in zip(line, several, strict=True):
            for arm in LOOPS:
                rows = table[(table["protocol"] == found.protocol) & (table["arm"] == arm)].to_dict("records")
                _points(axis, ((row["step"], interval_of(row, kind)) for row in rows), _words(arm), **_style(arm))
            _named(axis, found.protocol if first else "", "" if first else "recurrence step",
                   y if axis is line[0] else "")
    axes[0][0].set_yscale("log")
    _legend(figure)
    own = table[(table["protocol"] == "corrected") & (table["arm"] == "controller")].to_dict("records")
    return _titled(figure, text.shown_steps(depth, [interval_of(row, "change") for row in own]))


@_shows_runs
def training_curves(results: Results, arms: tuple[str, ...], depth: int):
    """Held-out next-token loss during training at one depth: the mean over seeds with its interval, or each seed."""
    def draw(axis, found: Comparisons) -> None:
        for arm in arms:
            losses = tables.curves(found, arm, depth)
            if losses.empty:
                continue
            axis.plot(losses.index, losses.mean(axis=1), label=_name(arm, depth, found), **_style(arm))
            if len(losses.columns) >= FEWEST:
                _band(axis, losses.index, [t_interval(row) for row in losses.to_numpy()], _style(arm))
            else:
                _seeds(axis, ((losses.index, losses[seed]) for seed in losses), _style(arm))

    own = Comparisons(results, "corrected")
    means = {arm: tables.curves(own, arm, depth).mean(axis=1) for arm in arms}
    slopes = {_words(arm): tables.last_slope(losses) for arm, losses in means.items() if len(losses)}
    return _lines(results, text.shown_slopes(depth, slopes), "update", "next-token loss (nats per token)", draw)


@_shows_runs
def budgets(results: Results):
    """Loss minus the cut model's against the tokens trained on, `corrected`, down to the full model's."""
    profile, (figure, axis) = results.profile, plt.subplots(figsize=(7.0, 4.2))
    for arm, depth in tables.budgeted(profile):
        ladder = {f"tokens {updates * profile.training.tokens_per_update}":
                  Comparisons(results, "corrected", updates=updates).difference(arm, "cut", depth=depth)
                  for updates in profile.budgets}
        at = f", depth {depth}" if ARMS[arm].loops else ""
        _parts(axis, {tokens: part for tokens, part in ladder.items() if part}, _words(arm) + at,
               linestyle=":" if at and depth != profile.depth else "--" if ARMS[arm].matched else "-", **_style(arm))
    for arm, dashes in (("cut", "--"), ("full", ":")) if axis.containers else ():
        axis.axhline(interval(Comparisons(results, "corrected").difference(arm, "cut")).mean, color=LOOKS[arm][0],
                     linestyle=dashes, label=_words(arm))
    axis.set_xscale("log")
    tokens = [updates * profile.training.tokens_per_update for updates in profile.budgets]
    axis.set_xticks(tokens, [f"{each:,}" for each in tokens])
    axis.minorticks_off()
    _named(axis, "corrected", "tokens trained on", ARM_CUT)
    _legend(figure)
    return _titled(figure, text.shown_budgets(tables.budget_table(results)))


# ------------------------------------------------------------------------------------------------------ side by side

@_shows_runs
def overview(results: Results):
    """Every way to live without the removed layers, and counts of token pairs, minus the cut model, `corrected`; loops
    at one depth: README's."""
    depth, found = shown_depth(results), Comparisons(results, "corrected")
    arms = ("full", *results.profile.instead, "bigram", "bigram_seen", "none_nogate", "none_nonorm", "none", "static",
            "controller", "static_nonorm", "controller_nonorm")
    shown = [(_name(arm, depth, found), arm, interval(found.difference(arm, "cut", depth=depth))) for arm in arms]
    figure = _forest({f"loops at depth {depth}; left of 0: better than the cut model": shown},
                     text.shown_overview(results), ARM_CUT)
    for place, each in enumerate(each for _, _, each in shown if each.n):
        figure.axes[0].annotate(f"{each.mean:+.2f}", (each.mean if np.isnan(each.high) else each.high, place), (6, 0),
                                textcoords="offset points", va="center", fontsize=8)
    figure.axes[0].margins(x=0.12)
    return figure


@_shows_runs
def gate(results: Results):
    """Each gateless arm and the gated one, minus the cut model, at the depths where they were run."""
    planned, several = results.profile.depths_of, by_protocol(results)
    shown = [(arm, depth) for depth in planned("controller_nogate")
             for arm in ("controller", "controller_nogate", "controller_nogate_nonorm") if depth in planned(arm)]
    depth = max(planned("controller_nogate"), default=results.profile.depth)
    closed = interval(Comparisons(results, "corrected").difference("controller", "controller_nogate", depth=depth))
    return _forest({found.protocol: [
        (f"{_name(arm, at, *several)}, depth {at}", arm, interval(found.difference(arm, "cut", depth=at)))
        for arm, at in shown] for found in several}, text.compared(
            closed, "the Controller's loop", "the same loop without its gate", f" at depth {depth}"), ARM_CUT)


@_shows_runs
def configurations(results: Results):
    """Static minus Controller in each configuration; above 0 the Controller is ahead."""
    leads = {found.protocol: family(found.compare("static", "controller", by="configuration"))
             for found in by_protocol(results)}
    return _forest({protocol: [(name, "controller", each) for name, each in found.items()]
                    for protocol, found in leads.items()}, text.shown_configurations(leads["corrected"]),
                   "static table - Controller (nats per token)")


@_shows_runs
def ladder(results: Results):
    """A loop with more and more parts minus the cut model, `corrected`, a panel a depth."""
    depths = results.profile.depths_of("none_nonorm") or (results.profile.depth,)
    found, depth = Comparisons(results, "corrected"), shown_depth(results)
    norms = {name: SHORT_OF_NORMS * any(found.norms_near(arm, at) is False for at in depths)
             for name, arm in LADDER.items()}
    normed = interval(found.difference("none", "none_nonorm", depth=depth))
    finding = text.compared(normed, "the unmodulated loop", "the loop without step norms", f" at depth {depth}")
    if normed.n == 0:
        whole = interval(found.difference("controller", "cut", depth=depth))
        finding = text.compared(whole, "the loop with all its parts", "the cut model", f" at depth {depth}")
    return _forest({f"depth {at}": [
        (name + norms[name], LADDER[name], each) for name, each in family(found.ladder(at)).items()]
        for at in depths}, finding, ARM_CUT, sharex=True)


@_shows_runs
def instead(results: Results):
    """Loss minus the cut model's against trained parameters and against the FLOPs of a token."""
    table, depth = tables.instead_table(results), shown_depth(results)
    figure, axes = plt.subplots(1, 2, sharey=True, figsize=(7.0, 3.8))
    table["trained parameters (1,000)"] = table["trained parameters"] / 1000
    for axis, column in zip(axes, ("trained parameters (1,000)", "forward (MFLOP a token)"), strict=True):
        axis.axhline(0, color=LOOKS["cut"][0], linestyle="--")
        for arm, rows in table.dropna(subset=["arm - cut"]).groupby("arm", sort=False):
            short = SHORT_OF_NORMS * bool(rows["norms near the stream's"].eq(False).any())
            _points(axis, ((row[column], interval_of(row, "arm - cut")) for row in rows.to_dict("records")),
                    _words(arm) + short, linestyle="none", **_style(arm))
        axis.set(xlabel=column)
        axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
    axes[0].set_ylabel(ARM_CUT)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=7, title_fontsize=7,
                  title=_notes(figure, labels).replace("; ", "\n").replace(" from", "\nfrom"))
    plain = interval(Comparisons(results, "corrected").difference("lora", "controller", depth=depth))
    return _titled(figure, text.compared(plain, "LoRA on the cut model", "the Controller", f" at depth {depth}"))


@_shows_runs
def pays(results: Results):
    """Loss on dev against what an arm stores, computes a token and was trained on; baselines are hollow."""
    screen, budgets = paying.screened(results), paying.by_tokens(results)
    figure, axes = plt.subplots(1, 3, sharey=True, figsize=(7.0, 4.2))
    for number, arm in enumerate(screen.get("arm", ())):
        row = screen.iloc[number]
        style = {"marker": "osD^vPX*hp"[number % 10], "color": BRIGHT[number % len(BRIGHT)], "linestyle": "none",
                 "markerfacecolor": "none" if row["class"] == "baseline" else BRIGHT[number % len(BRIGHT)]}
        for axis, column in zip(axes, ("stored values (million)", "forward (MFLOP a token)")):
            axis.plot(row[column], row["dev"], label=_words(arm), **style)
        rows = budgets[budgets["arm"] == arm] if len(budgets) else budgets
        if len(rows):
            axes[2].plot(rows["tokens"] / 1e6, rows["dev"], label=_words(arm), **style | {"linestyle": "-"})
    for axis, x in zip(axes, ("stored values (million)", "forward (MFLOP a token)", "tokens trained on (million)")):
        axis.set_xlabel(x)
        axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
    axes[0].set_ylabel("loss on dev (nats per token)")
    _legend(figure)
    return _titled(figure, paying.shown(results))


# ---------------------------------------------------------------------------------------------------------- the audit

@_shows_runs
def audit(results: Results):
    """What each switch's released setting does to each headline number, a panel a number, a mark a column."""
    table = audited.switch_table(results, True)
    table = table[(table["switch"] != "none") & table["effect"].notna()]
    shown = {name: [("all ten" if row["switch"] == "all" else row["switch"],
                     "full" if row["switch"] == "all" else row["column"],
                     replace(interval_of(row, "effect"), p=row["effect_p"]))
                    for row in table[table["quantity"] == name].to_dict("records")]
             for name in audited.HEADLINES[::-1]}
    lead, gap = "static - Controller", interval(Comparisons(results, "corrected").difference("cut", "full")).mean
    shown[lead] = [(*row, scaled(effect, 100 / gap)) for *row, effect in shown[lead]]
    finding = text.shown_switches(shown[lead])
    titled = {name.replace(" (%)", "\n(percentage points)").replace(
        lead, "static table - Controller\n(% of the gap)"): rows for name, rows in shown.items()}
    figure = _forest(titled, finding, "what the released setting changes it by")
    looks = {f"all else {column}": _style(column) for column in COLUMNS} | {"all ten at once": _style("full")}
    figure.legend([plt.Line2D([], [], linestyle="none", **look) for look in looks.values()], looks,
                  loc="outside right center")
    return figure
