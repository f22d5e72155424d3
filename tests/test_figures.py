"""Figures: the same bytes from the same logs, and a sidecar that says what was plotted and from what."""

import functools
import hashlib
import json
import math
import random
import re
from dataclasses import replace

import matplotlib.pyplot as plt
import pytest
from matplotlib.collections import FillBetweenPolyCollection
from matplotlib.text import Text
from synthetic import WHOLE, write

from ouroboros.analysis import figures, tables, text
from ouroboros.analysis.comparisons import Comparisons
from ouroboros.analysis.results import Results, load_results
from ouroboros.analysis.statistics import NOTHING, Interval
from ouroboros.experiment import arms
from ouroboros.log import Run, Series

ARMS = ("controller", "static", "none")
FIGURES = {
    "advantage": figures.advantage,
    "curves": lambda r: figures.training_curves(r, ARMS, 4),
    "gate": figures.gate,
    "overview": figures.overview,
    "levels": figures.levels,
    "configurations": figures.configurations,
    "ladder": figures.ladder,
    "instead": figures.instead,
    "other depths": figures.other_depths,
    "interventions": figures.interventions,
    "steps": lambda r: figures.steps(r, r.profile.depths[-1]),
    "audit": figures.audit,
    "budgets": figures.budgets,
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    root = tmp_path_factory.mktemp("figures")
    write(root, diverged=("static-d4-r8-corrected-s1",))
    return load_results(WHOLE, root)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Only one seed of the cut model and of the shallow arms, at the smoke profile."""
    root = tmp_path_factory.mktemp("few")
    write(root, "smoke", keep=lambda spec: spec.seed == 0 and (spec.arm == "cut" or spec.depth == 1))
    return load_results("smoke", root)


@pytest.fixture(scope="module")
def saved(results, tmp_path_factory):
    """A function that gives a figure, drawn and saved once, and its sidecar: no test changes it."""
    @functools.cache
    def of(name):
        figure = FIGURES[name](results)
        return figure, sidecar(figure, results, tmp_path_factory.mktemp("saved"))
    return of


@pytest.fixture(autouse=True)
def closed():
    yield
    left = plt.get_fignums()
    plt.close("all")
    assert not left  # saved figures are closed


def sidecar(figure, results, folder) -> dict:
    figures.save(figure, "name", results, folder)
    return json.loads((folder / "name.json").read_text())


@pytest.mark.parametrize("name", FIGURES)
def test_units_and_protocols_are_named_and_panels_share_an_axis(name, results, saved):
    figure, _ = saved(name)
    first, named = figure.axes[0], " ".join(label.get_text() for label in figure.findobj(Text))
    assert {"steps": "share of", "audit": "% of the gap"}.get(name, "nats per token") in named
    if name in ("curves", "gate", "configurations", "other depths", "interventions", "steps"):
        assert [axis.get_title() for axis in figure.axes[:2]] == list(results.profile.protocols)
    if name != "advantage":  # losses beside differences
        shared = first.get_shared_y_axes().get_siblings(first)
        assert set(figure.axes[:2]) <= set(shared)


@pytest.mark.parametrize("name", FIGURES)
def test_text_is_words_and_legible_at_half_a_page(name, saved):
    figure, _ = saved(name)
    shown = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    assert min(text.get_fontsize() for text in shown) >= 7
    ids = {name for name in arms.ARMS if "_" in name} | {"controller", "none"}
    assert not [text.get_text() for text in shown if ids & set(re.findall(r"\w+", text.get_text()))]


@pytest.mark.parametrize("name", FIGURES)
def test_the_title_is_a_finding_also_where_runs_are_missing(name, saved, few):
    figure, data = saved(name)
    assert data["finding"] == " ".join(figure.get_suptitle().split())
    sparse = FIGURES[name](few)
    sparse.draw_without_rendering()
    plt.close(sparse)
    for finding in (data["finding"], sparse.get_suptitle()):
        assert finding[0].isupper() and "nan" not in finding


def test_a_finding_turns_with_the_numbers_and_claims_nothing_from_few_seeds():
    ahead, behind = (Interval(mean, mean - 0.01, mean + 0.01, 3) for mean in (-0.125, 0.125))
    assert text.compared(ahead, "the loop", "the table", " at depth 1") == (
        "The loop is 0.125 nats ahead of the table at depth 1")
    assert text.compared(behind, "the loop", "the table") == "The loop is 0.125 nats behind the table"
    open_ = replace(ahead, low=-1.0, high=1.0)
    assert "no detectable difference" in text.compared(open_, "the loop", "the table").lower()
    assert text.compared(replace(ahead, n=2), "the loop", "the table") == (
        "The loop is 0.125 nats ahead of the table (n = 2, too few to judge)")
    one = replace(behind, mean=0.00449512, low=math.nan, high=math.nan, n=1)
    assert text.compared(one, "the loop", "the table") == (
        "The loop is 0.0045 nats behind the table (n = 1, too few to judge)")
    assert text.compared(NOTHING, "the loop", "the table") == "Not run yet: the loop against the table"


@pytest.mark.parametrize("draw", [FIGURES["advantage"], FIGURES["curves"]])
def test_a_curve_has_a_band_where_three_seeds_carry_one_and_thin_lines_where_not(draw, results):
    def drawn(found) -> tuple[int, int]:
        figure = draw(found)
        plt.close(figure)
        thin = [line for line in figure.findobj(plt.Line2D) if line.get_linewidth() == 0.6]
        return sum(bool(band.get_paths()) for band in figure.findobj(FillBetweenPolyCollection)), len(thin)

    bands, lines = drawn(results)
    assert bands >= 3 and not lines
    two = {name: run for name, run in results.runs.items() if run.manifest["seed"] < 2}
    bands, lines = drawn(Results(results.profile, two))
    assert not bands and lines >= 2


def test_the_audits_title_names_the_largest_effect_that_is_judged():
    effects = [("target", "released", Interval(0.5, 0.4, 0.6, 3)), ("rate", "corrected", Interval(-0.7, -0.8, -0.6, 3)),
               ("packing", "released", Interval(9, math.nan, math.nan, 1)), ("all ten", "full", Interval(8, 7, 9, 3))]
    assert "rate changes" in text.shown_switches(effects) and "-0.7 % of the gap, all else corrected" in (
        text.shown_switches(effects))
    assert "target changes" in text.shown_switches(effects[:1] + effects[2:])
    assert text.shown_switches(effects[2:]).endswith("+9 % of the gap, all else released (n = 1, too few to judge)")
    assert text.shown_switches([]).endswith("not run yet")


def test_training_that_still_moves_is_said_with_its_size():
    assert text.shown_slopes(8, {"Controller": -0.3, "static table": 0.1}).startswith(
        "At depth 8 the Controller's loss still falls by 0.30 nats")
    assert text.shown_slopes(8, {"Controller": 0.001}).startswith("At depth 8 no loss changes")
    assert "too few evaluations" in text.shown_slopes(8, {"Controller": math.nan})


def test_the_sidecar_names_logs_by_their_seals_and_pictures_by_their_hashes(results, tmp_path):
    data = sidecar(figures.advantage(results), results, tmp_path)
    lost = "static-d4-r8-corrected-s1"  # diverged: read, and in no mean
    looped = {name: run.manifest["seal"] for name, run in results.runs.items()
              if whole(run, "corrected", "released") and run.manifest["arm"] in ARMS[:2]
              and run.manifest["rank"] == 8 and not run.manifest["level"]}
    assert {name: seal for name, seal in data["inputs"].items() if name.startswith(ARMS[:2])} == looped
    assert lost in data["inputs"] and "controller-dmixed-r8-released-s2" in data["inputs"]
    assert set(data["files"]) == {"png", "pdf"}
    for kind, digest in data["files"].items():
        assert hashlib.sha256((tmp_path / f"name.{kind}").read_bytes()).hexdigest() == digest


def whole(run, *protocols) -> bool:
    return run.manifest["protocol"] in protocols


def test_a_figure_of_three_arms_names_no_run_of_another(results, saved):
    _, data = saved("curves")
    found = [results.runs[name].manifest for name in data["inputs"]]
    assert {manifest["arm"] for manifest in found} == set(ARMS)
    assert {manifest["level"] for manifest in found} == {None}
    seeds, both = results.profile.seeds, (0, 1, 2)
    expected = {f"{arm}-d4{rank}-corrected-s{seed}" for seed in seeds
                for arm, rank in (("controller", "-r8"), ("static", "-r8"), ("none", ""))}
    expected |= {f"{arm}-d4{rank}-released-s{seed}" for seed in both
                 for arm, rank in (("static", "-r8"), ("none", ""))}
    expected |= {f"controller-dmixed-r8-released-s{seed}" for seed in both}
    assert set(data["inputs"]) == expected


@pytest.fixture(scope="module")
def irregular(tmp_path_factory):
    """Every run of the smoke profile, the audit's too, with values that no other run has."""
    root = tmp_path_factory.mktemp("irregular")
    write(root, "smoke", keep=lambda spec: True)
    results = load_results("smoke", root)
    return Results(results.profile, {name: shaken(run, 0.01) for name, run in results.runs.items()})


def shaken(run, share: float):
    """A run with each of its values raised by up to a share."""
    generator = random.Random(f"{run.manifest['run']} {share}")

    def raised(value):
        return [*map(raised, value)] if isinstance(value, list) else value * (1 + share * generator.random())

    return Run(run.manifest, {key: Series(found.updates, [*map(raised, found.values)])
                              for key, found in run.series.items()})


def drawn(name, results) -> tuple[set[str], list]:
    figure = FIGURES[name](results)
    plt.close(figure)
    return set(figure.runs), figures._plotted(figure)


# a run minus itself is drawn, which is 0 whatever it measured
IDLE = {}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_names_exactly_the_runs_behind_what_it_shows(name, irregular):
    named, plotted = drawn(name, irregular)
    kept = {run: irregular.runs[run] for run in named}
    assert drawn(name, Results(irregular.profile, kept)) == (named, plotted)  # no other run is needed
    idle = set()
    without_seed = {run: re.sub(r"-s\d+", "", run) for run in named}
    for configuration in set(without_seed.values()):  # its seeds together: half the time
        seeds = {run: shaken(kept[run], 0.1) for run in kept if without_seed[run] == configuration}
        if drawn(name, Results(irregular.profile, kept | seeds))[1] == plotted:
            idle.add(configuration)
    assert idle == IDLE.get(name, set())


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_made_of_kept_tables_names_the_same_runs(name, irregular):
    results = Results(irregular.profile, irregular.runs)
    with results.reading():
        first = drawn(name, results)
    assert drawn(name, results) == first == drawn(name, irregular)


def test_what_shows_no_run_names_none(results, tmp_path):
    assert sidecar(figures.cost([results.profile]), results, tmp_path)["inputs"] == {}


def test_the_sidecar_holds_what_was_plotted_intervals_too(results, saved):
    _, data = saved("advantage")
    table = tables.difference_table(results, Comparisons.compare, "static", "controller", by="depth")
    table = table.query("protocol == 'corrected'")
    [line] = [each for each in data["plotted"] if each["label"] == "corrected"]
    assert line["axes"] == 1 and line["x"] == [1, 4, 8, 16]
    assert line["y"] == pytest.approx(table["difference"].tolist(), rel=1e-5)
    assert line["low"] == pytest.approx(table["difference_low"].tolist(), rel=1e-4, abs=1e-5)
    assert line["high"] == pytest.approx(table["difference_high"].tolist(), rel=1e-4, abs=1e-5)


def test_a_line_that_is_one_run_says_so(saved):
    labels = {(line["axes"], line["label"]) for line in saved("advantage")[1]["plotted"]}
    assert {(0, "Controller"), (0, "static table"), (0, "cut model"), (0, "full model"), (1, "corrected"),
            (1, "released, Controller's depth drawn")} <= labels


def test_smoke_is_watermarked(few, tmp_path):
    figure = figures.advantage(few)
    figures.save(figure, "name", few, tmp_path)
    assert "smoke: not a result" in [text.get_text() for text in figure.texts]


def test_results_of_other_profiles_are_not_watermarked(saved):
    figure, _ = saved("advantage")
    assert "smoke: not a result" not in [text.get_text() for text in figure.texts]


def test_costs_are_shown_in_percent_of_the_full_model(results, tmp_path):
    plotted = sidecar(figures.cost([results.profile]), results, tmp_path)["plotted"]
    lines = {line["label"]: line for line in plotted}
    assert lines["full model"]["y"] == [100, 100]
    loop = lines["FLOPs, forward"]
    assert loop["x"] == list(results.profile.depths) and loop["y"] == sorted(loop["y"])
    assert len(set(lines["weights held"]["y"])) == 1 and lines["weights held"]["y"][0] < 100


def test_an_arm_whose_norms_did_not_reach_the_stream_says_so_in_each_legend(irregular):
    runs = dict(irregular.runs)
    for name, run in runs.items():
        if run.manifest["arm"] == "none":
            far = {("model", "stream_rms"): Series([8], [[10.0]]), ("model", "step_norm"): Series([8], [[1.0]])}
            runs[name] = Run(run.manifest, run.series | far)
    results = Results(irregular.profile, runs)
    for name in ("advantage", "ladder", "overview", "instead"):
        labels = {line["label"] for line in drawn(name, results)[1] if figures.SHORT_OF_NORMS in line["label"]}
        assert labels and all("no modulation" in label or "step norms" in label for label in labels), name
