"""Figures: the same bytes from the same logs, and a sidecar that says what was plotted and from what."""

import hashlib
import json

import matplotlib.pyplot as plt
import pytest
from synthetic import write

from ouroboros import figures, findings, metrics, tables

ARMS = ("controller", "static", "none")
FIGURES = {
    "losses": lambda r: figures.losses_by_depth(r, ARMS),
    "advantage": figures.advantage,
    "curves": lambda r: figures.training_curves(r, ARMS, 4),
    "gate": figures.gate,
    "overview": figures.overview,
    "configurations": figures.configurations,
    "ladder": figures.ladder,
    "coda": figures.coda,
    "instead": figures.instead,
    "other depths": figures.other_depths,
    "interventions": figures.interventions,
    "steps": lambda r: figures.steps(r, r.profile.depths[-1]),
    "audit": lambda r: figures.audit(r, "static - Controller"),
    **{f"audit {name}": getattr(figures, f"audit_{name}") for name in findings.FINDINGS},
    "gate opening": lambda r: figures.gate_opening(r, r.profile.depth),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    root = tmp_path_factory.mktemp("figures")
    write(root, diverged=("static-d4-r8-corrected-s1",))
    return metrics.load("tiny-first", root)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Only one seed of the cut model and of the shallow arms, at the smoke profile."""
    root = tmp_path_factory.mktemp("few")
    write(root, "smoke", keep=lambda spec: spec.seed == 0 and (spec.arm == "cut" or spec.depth == 1))
    return metrics.load("smoke", root)


@pytest.fixture(autouse=True)
def closed():
    yield
    assert not plt.get_fignums()  # saved figures are closed


def sidecar(figure, results, folder, **options) -> dict:
    figures.save(figure, "name", results, folder, **options)
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
    if name in ("ladder", "coda", "instead"):
        protocols = ("corrected",) * len(figure.axes)
    several = name.startswith("audit ")  # these show all their protocols on one axis
    unitless = ("steps", "gate opening", "audit precision", "audit reference")
    assert "nats per token" in figure.axes[0].get_ylabel() or name in unitless
    for axis, protocol in zip(figure.axes, [""] * len(figure.axes) if several else protocols, strict=True):
        assert several or f"({protocol})" in axis.get_title()
        assert axis.get_ylabel() or axis in figure.axes[0].get_shared_y_axes().get_siblings(figure.axes[0])
        assert axis.get_xlabel() or [label.get_text() for label in axis.get_xticklabels()]
    figures.save(figure, name, results, tmp_path)


def test_the_sidecar_names_the_logs_and_pictures_by_hash(results, tmp_path):
    data = sidecar(figures.advantage(results), results, tmp_path)
    assert set(data["inputs"]) == set(results.runs)
    assert data["inputs"]["cut-any-s0"] == results.runs["cut-any-s0"].manifest["log_sha256"]
    for kind, digest in data["files"].items():
        assert hashlib.sha256((tmp_path / f"name.{kind}").read_bytes()).hexdigest() == digest


def test_the_sidecar_holds_what_was_plotted_intervals_too(results, tmp_path):
    data = sidecar(figures.advantage(results), results, tmp_path)
    table = tables.difference_table(results, "advantage_by_depth").query("protocol == 'corrected'")
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
    base = metrics.base_run(results.profile, tmp_path)
    data = sidecar(figures.base_curve(base), results, tmp_path, runs={"base": base})
    assert data["inputs"] == {"base": base.manifest["log_sha256"]}
    assert [(line["label"], line["x"]) for line in data["plotted"]] == [("heldout", [0, 1000, 2000]),
                                                                        ("dev", [0, 1000, 2000])]
    assert sidecar(figures.base_curve(None), results, tmp_path, runs={})["plotted"] == []


def test_costs_are_shown_in_percent_of_the_full_model(results, tmp_path):
    plotted = sidecar(figures.cost([results.profile]), results, tmp_path)["plotted"]
    lines = {line["label"]: line for line in plotted}
    assert lines["full"]["y"] == [100, 100]
    loop = lines["FLOPs, forward"]
    assert loop["x"] == list(results.profile.depths) and loop["y"] == sorted(loop["y"])
    assert len(set(lines["weights held"]["y"])) == 1 and lines["weights held"]["y"][0] < 100
