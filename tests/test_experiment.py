"""Profiles, protocols, arms and run ids."""

import pytest
import yaml

from ouroboros.errors import InputError
from ouroboros.experiment import (
    ARMS,
    CORE,
    PROFILES,
    SWITCHES,
    Audit,
    RunSpec,
    load_profile,
    parse_profile,
    switches,
    trained_under,
)


def test_the_columns_are_the_audits_and_a_flip_moves_one_switch():
    released, corrected = switches("released"), switches("corrected")
    assert len(SWITCHES) == 10 and released["target"] == "t+2" and corrected["target"] == "t+1"
    assert all(released[name] != corrected[name] for name in SWITCHES)
    for name in SWITCHES:
        assert {k for k, v in switches(f"released+{name}").items() if v != released[k]} == {name}
    assert switches("released+" + "+".join(SWITCHES)) == corrected


@pytest.mark.parametrize("protocol", ["improved", "released+speed", "", "released+"])
def test_an_unknown_protocol_is_refused(protocol):
    with pytest.raises(InputError, match=f"protocol '{protocol}'".replace("+", r"\+")):
        switches(protocol)


@pytest.mark.parametrize("name", ["smoke", "tiny", "small", "paper"])
def test_shipped_profiles_validate_and_their_runs_have_ids_of_their_own(name):
    profile = load_profile(name)
    specs = [*profile.runs(), *profile.search_runs()]
    assert len({spec.id for spec in specs}) == len(specs)
    assert all(profile.find(spec.id) == spec for spec in specs)


def test_ids_are_stable():
    assert RunSpec("controller", 4, 8, "corrected", 0).id == "controller-d4-r8-corrected-s0"
    assert RunSpec("cut", None, None, "any", 2).id == "cut-any-s2"
    assert RunSpec("static", 4, 8, "corrected", 9, 0.003).id == "static-d4-r8-corrected-s9-lr0.003"
    assert RunSpec("static", 8, 8, "corrected", 1, level="low").id == "static-d8-r8-corrected-s1-low"
    assert RunSpec("lora", None, None, "corrected", 1).id == "lora-corrected-s1"


def test_the_matrix_is_what_its_profile_says():
    profile = load_profile("paper")
    matrix = profile.matrix.model_copy(update={"seeds": (42, 43, 44, 45, 46)})
    cells = profile.model_copy(update={"matrix": matrix}).plan()
    for protocol in ("released", "corrected"):
        for arm in ("controller", "static", "none"):
            found = {(c.depth, c.seed) for c in cells if (c.arm, c.protocol) == (arm, protocol)}
            seeds = matrix.seeds if protocol == "corrected" else matrix.seeds[:3]
            assert found == {(d, s) for d in (1, 4, 8, 16) for s in seeds}
    assert {(c.rank, c.depth, c.seed) for c in cells if c.arm == "static" and c.rank != 32} == {
        (r, 8, s) for r in (8, 64) for s in (42, 43, 44)}
    gateless = {(c.arm, c.depth) for c in cells if c.protocol == "corrected" and "nogate" in c.arm and c.seed == 43}
    assert gateless == {(a, d) for a in ("controller_nogate", "static_nogate", "none_nogate") for d in (1, 4, 8)} | {
        ("controller_nogate_nonorm", 4)}
    assert {c.arm for c in cells if c.protocol == "released"} == {
        *CORE, "controller_nogate", "controller_nogate_nonorm"}
    assert {(c.arm, c.depth, c.level) for c in cells if c.level} == {
        (arm, 8, level) for arm in ("controller", "static") for level in ("low", "high")}
    assert {(c.arm, c.depth, c.rank, c.seed) for c in cells if c.arm in matrix.instead} == {
        (arm, None, None, seed) for arm in matrix.instead for seed in (42, 43, 44)}


def test_the_core_comes_first_and_then_whole_rows():
    profile = load_profile("paper")
    cells = [c for c in profile.plan() if c.protocol == "corrected"]
    core = [c.arm in CORE and c.rank in (None, profile.rank) and not c.level for c in cells]
    assert core == sorted(core, reverse=True)
    parts = [c.arm for c in cells if c.arm in profile.matrix.parts]
    assert parts == sorted(parts, key=list(profile.matrix.parts).index)  # every seed of an arm, then the next arm


def test_an_audit_flips_one_switch_at_a_time_and_trains_nothing_for_what_only_reads():
    profile = load_profile("tiny")
    profile = profile.model_copy(update={"matrix": profile.matrix.model_copy(update={"audit": None})})
    audit = Audit(depths=(1, 8), switches={"target": 3, "alpha": 1, "evaluation": 2, "pooling": 1},
                  others=("controller_other",))
    plain = set(profile.runs())
    more = profile.model_copy(update={"matrix": profile.matrix.model_copy(update={"audit": audit})})
    found = set(more.runs()) - plain
    assert {(s.protocol, s.seed) for s in found if s.arm == "static"} == {
        (f"{column}+target", seed) for column in ("released", "corrected") for seed in range(3)} | {
        ("corrected+alpha", 0), ("released+alpha", 0), ("released", 0)}  # the pool doesn't enter static
    for protocol in ("corrected+alpha", "released+alpha", "released"):
        assert {s.rank for s in found if s.protocol == protocol and s.arm == "static"} == set(profile.matrix.ranks)
    assert {s.depth for s in found if s.arm == "none"} == {1, 8} and plain <= set(more.runs())
    assert {s.protocol for s in found if s.arm == "controller_other"} == {
        "released", "corrected", "released+pooling", "corrected+pooling"}
    read = [c for c in more.plan() if c.protocol == "released+evaluation" and c.arm == "static"]
    assert {c.run.id for c in read} == {f"static-d{d}-r8-released-s{s}" for d in (1, 8) for s in (0, 1)}
    assert trained_under("corrected+target+reference", "controller") == "corrected+target"
    assert trained_under("released+pooling+rate+depth", "static") == "released+rate"
    assert trained_under("released+pooling+depth", "controller") == "released+pooling+depth"


def test_cells_that_a_protocol_makes_identical_share_a_run():
    cells = [c for c in load_profile("tiny").plan() if c.seed == 0 and "+" not in c.protocol]
    runs = {}
    for cell in cells:
        runs.setdefault(cell.run.id, []).append(cell)
    shared = {name: len(found) for name, found in runs.items() if len(found) > 1}
    assert shared == {"controller-dmixed-r8-released-s0": 4, "controller_nogate-dmixed-r8-released-s0": 3,
                      "full-any-s0": 2, "cut-any-s0": 2}
    assert sum(c.arm == "controller" and c.protocol == "corrected" and c.rank == 8 and not c.level for c in cells) == 4


def test_the_search_tries_every_trained_arm_on_one_grid_and_a_spare_seed():
    profile = load_profile("paper")
    assert profile.search.seed not in profile.matrix.seeds
    trained = {cell.arm for cell in profile.plan() if ARMS[cell.arm].trained}
    assert {(s.arm, s.rate) for s in profile.search_runs()} == {(a, r) for a in trained for r in profile.search.grid}
    wider = profile.search.model_copy(update={"wider": {"static": (7.0,)}})
    more = set(profile.model_copy(update={"search": wider}).search_runs()) - set(profile.search_runs())
    assert [(s.arm, s.rate) for s in more] == [("static", 7.0)]


@pytest.mark.parametrize("path, value, named", [
    (("depth",), 0, "depth: 0"), (("rank",), "many", "rank: 'many'"), (("speed",), 1, "speed: 1"),
    (("training", "updates"), -3, "training.updates: -3"), (("corpus", "kind"), "web", "corpus.kind: 'web'"),
    (("matrix", "protocols"), ["improved"], "matrix.protocols: protocol 'improved'"),
    (("matrix", "depths"), [4, 0], "matrix.depths.1: 0"),
    (("matrix", "parts"), {"controller_nogate": [0]}, "matrix.parts.controller_nogate.0: 0"),
    (("matrix", "parts"), {"static": [4]}, "matrix.parts: 'static'"),
    (("matrix", "parts"), {"lora": [4]}, "matrix.parts: 'lora'"),
    (("matrix", "instead"), ["cut"], "matrix.instead: 'cut'"),
    (("matrix", "instead"), ["none_nogate"], "matrix.instead: 'none_nogate'"),
    (("matrix", "rates"), {"low": 0}, "matrix.rates.low: 0"),
    (("matrix", "audit"), {"depths": [1], "switches": {"colour": 1}}, "matrix.audit.switches: 'colour'"),
    (("training", "accumulation"), None, "training.accumulation: None"), (("split",), 3, "split: 3"),
])
def test_a_bad_profile_is_refused_in_one_line(path, value, named):
    data = yaml.safe_load((PROFILES / "tiny.yaml").read_text())
    place = data
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    with pytest.raises(InputError) as error:
        parse_profile(data, "mine.yaml")
    assert str(error.value).startswith("mine.yaml: ")
    assert named in str(error.value) and "\n" not in str(error.value)


def test_a_field_that_misses_is_named():
    data = yaml.safe_load((PROFILES / "tiny.yaml").read_text())
    del data["training"]["block"]
    with pytest.raises(InputError, match="^mine.yaml: training.block: .*required"):
        parse_profile(data, "mine.yaml")


def test_an_unknown_profile_or_run_is_refused():
    with pytest.raises(InputError, match="profile '../tiny': unknown; one of paper, small, smoke, tiny"):
        load_profile("../tiny")
    with pytest.raises(InputError, match="run 'controller-d3-r8-corrected-s0'.*declares no such run"):
        load_profile("tiny").find("controller-d3-r8-corrected-s0")


@pytest.mark.parametrize("name, count, some", [
    ("tiny", 388, {"full-any-s0", "cut-any-s2", "controller-d16-r8-corrected-s1", "controller-dmixed-r8-released-s0",
                  "static-d1-r8-released-s2", "none-d8-released-s0", "controller_nogate-d4-r8-corrected-s0",
                  "controller_nogate_nonorm-dmixed-r8-released-s1", "static-d8-r16-corrected-s2", "lora-corrected-s0",
                  "controller-d8-r8-corrected-s0-low"}),
    ("paper", 198, {"controller-dmixed-r32-released-s42", "static-d16-r32-corrected-s44",
                  "controller_nogate-d1-r32-corrected-s43", "controller_coda_full-d8-r32-corrected-s44"}),
])
def test_the_runs_of_a_profile_are_the_declared_ones(name, count, some):
    """Golden: ids name folders of committed logs, so they may not change."""
    ids = [spec.id for spec in load_profile(name).runs()]
    assert len(ids) == count and some <= set(ids)


def test_experiments_are_data_and_load_no_torch():
    import subprocess
    import sys

    code = "import sys, ouroboros.experiment as e; e.load_profile('tiny').runs(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
