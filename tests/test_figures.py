"""Figures: the same bytes from the same logs, and a sidecar that says what was plotted and from what."""

import hashlib
import json
import random
import re

import matplotlib.pyplot as plt
import pytest
from synthetic import write

from ouroboros.analysis import figures, tables, text
from ouroboros.analysis.comparisons import Comparisons
from ouroboros.analysis.results import Results, base_run, load_results
from ouroboros.log import Run, Series

ARMS = ("controller", "static", "none")
FIGURES = {
    "losses": lambda r: figures.losses_by_depth(r, ARMS),
    "advantage": figures.advantage,
    "curves": lambda r: figures.training_curves(r, ARMS, 4),
    "gate": figures.gate,
    "overview": figures.overview,
    "levels": figures.levels,
    "configurations": figures.configurations,
    "ladder": figures.ladder,
    "coda": figures.coda,
    "instead": figures.instead,
    "other depths": figures.other_depths,
    "interventions": figures.interventions,
    "steps": lambda r: figures.steps(r, r.profile.depths[-1]),
    "audit": lambda r: figures.audit(r, "static - Controller"),
    **{f"audit {name}": getattr(figures, f"audit_{name}") for name in text.SWITCH_SENTENCES},
    "gate opening": lambda r: figures.gate_opening(r, r.profile.depth),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    root = tmp_path_factory.mktemp("figures")
    write(root, diverged=("static-d4-r8-corrected-s1",))
    return load_results("tiny-first", root)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Only one seed of the cut model and of the shallow arms, at the smoke profile."""
    root = tmp_path_factory.mktemp("few")
    write(root, "smoke", keep=lambda spec: spec.seed == 0 and (spec.arm == "cut" or spec.depth == 1))
    return load_results("smoke", root)


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
def test_two_makings_are_the_same_bytes(name, results, tmp_path):
    for folder in ("a", "b"):
        figures.save(FIGURES[name](results), name, results, tmp_path / folder)
    for kind in ("png", "pdf", "json"):
        first, second = ((tmp_path / folder / f"{name}.{kind}").read_bytes() for folder in "ab")
        assert first == second and b"CreationDate" not in first


@pytest.mark.parametrize("name", FIGURES)
def test_every_axis_has_a_name_and_units_on_what_has_them(name, results, tmp_path):
    figure, protocols = FIGURES[name](results), results.profile.protocols
    if name in ("ladder", "coda", "instead", "levels"):
        protocols = ("corrected",) * len(figure.axes)
    several = name.startswith("audit ")  # these show all their protocols on one axis
    unitless = ("steps", "gate opening", "audit precision", "audit reference")
    assert "nats per token" in figure.axes[0].get_ylabel() or name in unitless
    for axis, protocol in zip(figure.axes, [""] * len(figure.axes) if several else protocols, strict=True):
        assert several or f"({protocol})" in axis.get_title()
        assert axis.get_ylabel() or axis in figure.axes[0].get_shared_y_axes().get_siblings(figure.axes[0])
        assert axis.get_xlabel() or [label.get_text() for label in axis.get_xticklabels()]
    figures.save(figure, name, results, tmp_path)


def test_the_sidecar_names_logs_by_their_seals_and_pictures_by_their_hashes(results, tmp_path):
    data = sidecar(figures.advantage(results), results, tmp_path)
    lost = "static-d4-r8-corrected-s1"  # diverged: read, and in no mean
    assert data["inputs"] == {name: run.manifest["seal"] for name, run in sorted(results.runs.items())
                              if whole(run, "corrected", "released") and run.manifest["arm"] in ARMS[:2]
                              and run.manifest["rank"] == 8 and not run.manifest["level"]}
    assert lost in data["inputs"] and "controller-dmixed-r8-released-s2" in data["inputs"]
    assert set(data["files"]) == {"png", "pdf"}
    for kind, digest in data["files"].items():
        assert hashlib.sha256((tmp_path / f"name.{kind}").read_bytes()).hexdigest() == digest


def whole(run, *protocols) -> bool:
    return run.manifest["protocol"] in protocols


def test_a_figure_of_three_arms_names_no_run_of_another(results, tmp_path):
    data = sidecar(figures.losses_by_depth(results, ARMS), results, tmp_path)
    found = [results.runs[name].manifest for name in data["inputs"]]
    assert {manifest["arm"] for manifest in found} == {"full", "cut", *ARMS}
    assert {manifest["level"] for manifest in found} == {None}
    seeds, both = results.profile.seeds, (0, 1, 2)
    expected = {f"{arm}-any-s{seed}" for arm in ("full", "cut") for seed in seeds}
    expected |= {f"{arm}-d{depth}{rank}-corrected-s{seed}" for depth in (1, 4, 8, 16) for seed in seeds
                 for arm, rank in (("controller", "-r8"), ("static", "-r8"), ("none", ""))}
    expected |= {f"{arm}-d{depth}{rank}-released-s{seed}" for depth in (1, 4, 8, 16) for seed in both
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
IDLE = {"audit depth": {"controller-dmixed-r4-released", "controller-dmixed-r4-corrected+depth"}}


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
    assert sidecar(figures.reach(), results, tmp_path)["inputs"] == {}
    assert sidecar(figures.cost([results.profile]), results, tmp_path)["inputs"] == {}


def test_the_sidecar_holds_what_was_plotted_intervals_too(results, tmp_path):
    data = sidecar(figures.advantage(results), results, tmp_path)
    table = tables.difference_table(results, Comparisons.compare, "static", "controller", by="depth")
    table = table.query("protocol == 'corrected'")
    line = data["plotted"][1]
    assert line["axes"] == 1 and line["x"] == [1, 4, 8, 16]
    assert line["y"] == pytest.approx(table["difference"].tolist(), rel=1e-5)
    assert line["low"] == pytest.approx(table["difference_low"].tolist(), rel=1e-4, abs=1e-5)
    assert line["high"] == pytest.approx(table["difference_high"].tolist(), rel=1e-4, abs=1e-5)


def test_a_line_that_is_one_run_says_so(results, tmp_path):
    labels = {(line["axes"], line["label"]) for line in
              sidecar(figures.losses_by_depth(results, ARMS), results, tmp_path)["plotted"]}
    assert {(0, "controller (one run)"), (1, "controller"), (0, "static"), (1, "cut"), (0, "full")} <= labels


@pytest.mark.parametrize("name", FIGURES)
def test_missing_runs_leave_gaps_and_smoke_is_watermarked(name, few, tmp_path):
    figure = FIGURES[name](few)
    figures.save(figure, name, few, tmp_path)
    assert "smoke: not a result" in [text.get_text() for text in figure.texts]


def test_results_of_other_profiles_are_not_watermarked(results, tmp_path):
    figure = figures.advantage(results)
    figures.save(figure, "name", results, tmp_path)
    assert not figure.texts


def test_the_base_curve_is_made_from_the_bases_log(results, tmp_path):
    write(tmp_path, keep=lambda spec: False)
    base = base_run(results.profile, tmp_path)
    data = sidecar(figures.base_curve(base), results, tmp_path)
    assert data["inputs"] == {"base": base.manifest["seal"]}
    tokens = [0, 10 * 8 * 256, 20 * 8 * 256]  # 10 and 20 updates of 8 blocks of 256 tokens
    assert [(line["label"], line["x"]) for line in data["plotted"]] == [("heldout", tokens), ("dev", tokens)]
    assert data["plotted"][0]["y"] == [8, 6, 4]
    empty = sidecar(figures.base_curve(None), results, tmp_path)
    assert empty["plotted"] == [] and empty["inputs"] == {}


def test_costs_are_shown_in_percent_of_the_full_model(results, tmp_path):
    plotted = sidecar(figures.cost([results.profile]), results, tmp_path)["plotted"]
    lines = {line["label"]: line for line in plotted}
    assert lines["full"]["y"] == [100, 100]
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
    for name in ("losses", "ladder", "overview", "instead"):
        labels = {line["label"] for line in drawn(name, results)[1] if "norms not converged" in line["label"]}
        assert labels and all("none" in label or "step norms" in label for label in labels), name
