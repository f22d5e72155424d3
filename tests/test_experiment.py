"""Profiles, protocols, arms and run ids."""

import itertools
import re
from pathlib import Path

import pytest
import yaml
from conftest import profile_data

from ouroboros.errors import InputError
from ouroboros.experiment.arms import ARMS
from ouroboros.experiment.plan import RunSpec
from ouroboros.experiment.profile import PROFILES, load_profile, parse_profile
from ouroboros.experiment.protocol import SWITCHES, switches, trained_under


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


SHIPPED = sorted(path.stem for path in PROFILES.glob("*.yaml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_profiles_validate_and_their_runs_have_ids_of_their_own(name):
    profile = load_profile(name)
    specs = profile.runs()
    assert len({spec.id for spec in specs}) == len(specs)
    assert all(profile.find(spec.id) == spec for spec in specs)


def test_ids_are_stable():
    assert RunSpec("controller", 4, 8, "corrected", 0).id == "controller-d4-r8-corrected-s0"
    assert RunSpec("cut", None, None, "any", 2).id == "cut-any-s2"
    assert RunSpec("static", 4, 8, "corrected", 9, 0.003).id == "static-d4-r8-corrected-s9-lr0.003"
    assert RunSpec("static", 8, 8, "corrected", 1, level="low").id == "static-d8-r8-corrected-s1-low"
    assert RunSpec("lora", None, None, "corrected", 1).id == "lora-corrected-s1"


def test_a_plan_is_an_ordered_list_and_an_unfinished_one_a_smaller_whole_one():
    """Every entry's runs stand together, seed by seed, in the order of the file."""
    profile = load_profile("tiny")
    runs, place = profile.runs(), 0
    for entry in profile.plan:
        own = [run for run in profile.runs_of(entry) if run in runs[place:]]
        assert runs[place:place + len(own)] == own
        place += len(own)
    assert place == len(runs) and len(set(runs)) == len(runs)
    controllers = [run.seed for run in profile.runs_of(profile.plan[2])]
    assert controllers == sorted(controllers)


def test_an_entry_is_every_combination_of_its_lists(text):
    data = profile_data(text)
    data["plan"] = [data["plan"][0], {"arms": ["controller", "none", "lora", "cut"], "depths": [1, 2], "ranks": [2, 4],
                                      "protocols": ["released", "corrected"], "seeds": [0, 1]}]
    profile = parse_profile(data, "t")
    cells = {(c.arm, c.depth, c.rank, c.protocol, c.seed) for c in profile.cells()}
    both = list(itertools.product(("released", "corrected"), (0, 1)))
    assert cells == {("controller", d, r, *rest) for d in (1, 2) for r in (2, 4) for rest in both} | {
        ("none", d, None, *rest) for d in (1, 2) for rest in both} | {
        (arm, None, None, *rest) for arm in ("lora", "cut") for rest in both}
    assert profile.depths == (1, 2) and profile.ranks == (2,) and profile.instead == ("lora",)
    assert profile.protocols == ("released", "corrected") and profile.seeds == (0, 1)


def test_depths_ranks_and_updates_are_the_profiles_where_an_entry_names_none(text):
    data = profile_data(text)
    data["plan"] = [data["plan"][0], {"arms": ["static"], "seeds": [0]},
                    {"arms": ["static"], "seeds": [1], "updates": 6}, {"arms": ["static"], "seeds": [0], "updates": 24}]
    assert [run.id for run in parse_profile(data, "t").runs() if run.purpose == "matrix"] == [
        "static-d2-r4-corrected-s0", "static-d2-r4-corrected-s1", "static-d2-r4-corrected-s0-u24"]


def test_what_only_reads_trains_nothing_and_what_does_not_enter_an_arm_shares_its_columns_run():
    assert trained_under("corrected+target+reference", "controller") == "corrected+target"
    assert trained_under("released+pooling+rate+depth", "static") == "released+rate"
    assert trained_under("released+pooling+depth", "controller") == "released+pooling+depth"
    cells = load_profile("tiny").cells()
    read = [c for c in cells if c.protocol == "released+evaluation" and c.arm == "static"]
    assert {c.run.id for c in read} == {f"static-d8-r8-released-s{s}" for s in (0, 1, 2)}


def test_cells_that_a_protocol_makes_identical_share_a_run():
    cells = [c for c in load_profile("tiny").cells() if c.seed == 0 and "+" not in c.protocol]
    runs = {}
    for cell in cells:
        runs.setdefault(cell.run.id, []).append(cell)
    shared = {name: len(found) for name, found in runs.items() if len(found) > 1}
    assert shared == {"full-any-s0": 2, "cut-any-s0": 2, "bare-any-s0": 2, "unigram-any-s0": 2, "bigram-any-s0": 2,
                      "controller-dmixed-r8-released-s0": 4}


@pytest.mark.parametrize("name", SHIPPED)
def test_every_trained_arm_has_a_search_or_a_siblings_with_a_seed_that_no_result_has(name):
    profile = load_profile(name)
    spare = {run.seed for run in profile.search_runs()}
    assert len(spare) == 1 and not spare & set(profile.seeds)
    searched = {run.arm for run in profile.search_runs()}
    for arm in profile.arms:
        assert not ARMS[arm].trained or profile.siblings.get(arm, arm) in searched


def test_a_run_is_the_plans_if_what_made_it_is(profile):
    spec = profile.find("static-d2-r4-corrected-s0")
    config = profile.model_dump(mode="json", exclude={"plan", "siblings"})
    manifest = {"protocol_version": 2, "config": config, "hashes": {"corpus": "c"}}
    assert profile.mismatch(manifest, spec) is None
    for field, change in (("controller", {"state": 9}), ("evaluation", {"points": 9}), ("split", {"prelude": 9})):
        other = manifest | {"config": config | {field: config[field] | change}}
        name, value = next(iter(change.items()))
        assert f"field 'config.{field}': '{name}' is {value}" in profile.mismatch(other, spec)
    assert "field 'protocol_version': is 1" in profile.mismatch(manifest | {"protocol_version": 1}, spec)
    assert profile.mismatch(manifest | {"config": config | {"resources": {}, "name": "moved"}}, spec) is None
    pinned = profile.model_copy(update={"corpus": profile.corpus.model_copy(update={"sha256": "d" * 64})})
    pinned_config = pinned.model_dump(mode="json", exclude={"plan", "siblings"})
    assert "field 'hashes.corpus'" in pinned.mismatch(manifest | {"config": pinned_config}, spec)


@pytest.mark.parametrize("path, value, named", [
    (("depth",), 0, "depth: 0"), (("rank",), "many", "rank: 'many'"), (("speed",), 1, "speed: 1"),
    (("training", "updates"), -3, "training.updates: -3"), (("corpus", "kind"), "web", "corpus.kind: 'web'"),
    (("plan", 2, "protocols"), ["improved"], "plan.2.protocols: protocol 'improved'"),
    (("plan", 2, "protocols"), ["released+colour"], "plan.2.protocols: protocol 'released+colour'"),
    (("plan", 2, "depths"), [4, 0], "plan.2.depths.1: 0"), (("plan", 2, "arms"), ["stati"], "plan.2.arms: 'stati'"),
    (("plan", 2, "arms"), [], "plan.2.arms: []"), (("plan", 2, "seeds"), [-1], "plan.2.seeds.0: -1"),
    (("plan", 2, "levels"), {"low": 0}, "plan.2.levels.low: 0"),
    (("plan", 2, "purpose"), "fun", "plan.2.purpose: 'fun'"),
    (("plan", 2, "seeds"), [0, 9], "plan: seed 9 is a search's and another entry's"),
    (("plan", 2, "rates"), [1e-3], "plan.2.rates: [0.001]: an entry of purpose 'rate'"),
    (("plan", 2, "factors"), [10], "plan.2.factors: [10.0]: only an entry of purpose 'rate'"),
    (("plan", 0, "rates"), [], "plan.0.rates: []"), (("plan", 0, "rates"), [2e-3], "plan.0.rates: 0.002: rates are"),
    (("plan", 0, "seeds"), [8, 9], "plan.0: a search is made under 'corrected' with one seed"),
    (("plan",), [], "plan: []"), (("siblings", "lora"), "static", "siblings.lora: 'static'"),
    (("siblings", "static_wide"), "lora_layer", "siblings.static_wide: 'lora_layer'"),
    (("siblings",), {}, "is trained and has no learning rate"),
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
    with pytest.raises(InputError, match="profile '../tiny': unknown; one of paper, small, smoke, smollm2, "):
        load_profile("../tiny")
    with pytest.raises(InputError, match="run 'controller-d3-r8-corrected-s0'.*declares no such run"):
        load_profile("tiny").find("controller-d3-r8-corrected-s0")


def test_the_protocol_page_has_a_row_for_each_switch():
    page = (Path(__file__).parents[1] / "docs" / "protocol.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == list(SWITCHES)
