"""Learning rates are chosen per arm and depth on `dev`, from the searches' raw logs alone."""

import pytest
from conftest import profile_data
from synthetic import write_run

from ouroboros.errors import InputError
from ouroboros.experiment import learning_rates
from ouroboros.experiment.arms import ARMS
from ouroboros.experiment.learning_rates import Rates, planned, rates_of, read_searches, waits
from ouroboros.experiment.plan import RunSpec
from ouroboros.experiment.profile import parse_profile


def searching(text, *entries, arms=("controller", "static"), siblings=None, **matrix) -> object:
    """A profile whose plan is these searches, then some runs."""
    data = profile_data(text)
    data["plan"] = [*({"purpose": "rate", "arms": list(arms), "seeds": [9]} | entry for entry in entries),
                    {"arms": ["full", "cut", *arms, *(siblings or {})], "depths": [1, 2], "seeds": [0]} | matrix]
    data["siblings"] = siblings or {}
    return parse_profile(data, "t")


def finish(profile, root, losses: dict, status="finished") -> None:
    """Logs of a search: {(arm, depth, rate or factor): dev loss}."""
    for spec in planned(profile, read_searches(profile, root)):
        loss = losses.get((spec.arm, spec.depth, spec.rate or spec.factor))
        if spec.purpose == "rate" and loss is not None:
            write_run(root, profile, spec, loss, status)


def of(profile, root, arm="static", depth=2, protocol="corrected", **more) -> Rates:
    rank = 4 if ARMS[arm].modulated else None
    return rates_of(RunSpec(arm, depth, rank, protocol, 0, **more), profile, read_searches(profile, root))


GRID = {"depths": [2], "rates": [1e-3, 3e-3, 1e-2]}


def test_each_arm_has_its_own_best_on_dev(text, tmp_path):
    profile = searching(text, GRID | {"rates": [1e-3, 3e-3, 1e-2, 3e-2]})
    losses = {"controller": (3, 2, 4, 5), "static": (3, 1.6, 1.5, 1.7)}
    finish(profile, tmp_path, {(arm, 2, rate): loss for arm, found in losses.items()
                               for rate, loss in zip(profile.plan[0].rates, found, strict=True)})
    assert of(profile, tmp_path, "controller") == Rates(3e-3, 3e-3) and of(profile, tmp_path) == Rates(1e-2, 1e-2)


def test_a_search_goes_one_step_outward_while_its_best_is_at_an_edge(text, tmp_path):
    profile = searching(text, GRID, arms=["static"])
    finish(profile, tmp_path, {("static", 2, 1e-3): 3, ("static", 2, 3e-3): 2, ("static", 2, 1e-2): 1})

    def left() -> list[float]:
        searches = read_searches(profile, tmp_path)
        return [spec.rate for spec in planned(profile, searches) if spec.rate and spec.id not in searches]

    assert left() == [3e-2]
    with pytest.raises(InputError, match="1 runs are left, 'static-d2-r4-corrected-s9-lr0.03' first"):
        of(profile, tmp_path)
    finish(profile, tmp_path, {("static", 2, 3e-2): 0.5})
    assert left() == [1e-1]
    finish(profile, tmp_path, {("static", 2, 1e-1): 0.7})
    assert left() == [] and of(profile, tmp_path).matrix == 3e-2
    assert profile.find("static-d2-r4-corrected-s9-lr0.1").rate == 1e-1  # a step's run can be made alone


def test_a_search_goes_downward_too_and_stops_where_the_next_one_diverged(text, tmp_path):
    profile = searching(text, GRID, arms=["static"])
    finish(profile, tmp_path, {("static", 2, 1e-3): 1, ("static", 2, 3e-3): 2, ("static", 2, 1e-2): 3})
    finish(profile, tmp_path, {("static", 2, 3e-4): 0}, status="diverged")
    assert of(profile, tmp_path).matrix == 1e-3


def test_the_elementwise_factor_is_searched_at_the_best_rate(text, tmp_path):
    profile = searching(text, GRID | {"factors": [10, 30]}, arms=["static", "none_nonorm"])
    names = [spec.id for spec in profile.search_runs()]
    assert "static-d2-r4-corrected-s9-x10" in names and not [n for n in names if "none_nonorm" in n and "-x" in n]
    finish(profile, tmp_path, {("static", 2, 1e-3): 3, ("static", 2, 3e-3): 2, ("static", 2, 1e-2): 3})
    search = profile.find("static-d2-r4-corrected-s9-x10")
    assert rates_of(search, profile, read_searches(profile, tmp_path)) == Rates(3e-3, 3e-3 * 10)
    with pytest.raises(InputError, match="2 runs are left, 'static-d2-r4-corrected-s9-x10' first"):
        of(profile, tmp_path)
    finish(profile, tmp_path, {("static", 2, 10): 1.5, ("static", 2, 30): 1.7})
    assert of(profile, tmp_path) == Rates(3e-3, 3e-3 * 10)
    # a gate alone has no such tensor: its search is its grid
    finish(profile, tmp_path, {("none_nonorm", 2, 1e-3): 3, ("none_nonorm", 2, 3e-3): 2, ("none_nonorm", 2, 1e-2): 3})
    assert of(profile, tmp_path, "none_nonorm") == Rates(3e-3, 3e-3)


def test_a_factor_that_is_no_better_leaves_one_rate(text, tmp_path):
    profile = searching(text, GRID | {"factors": [10]}, arms=["static"])
    finish(profile, tmp_path, {("static", 2, 1e-3): 3, ("static", 2, 3e-3): 2, ("static", 2, 1e-2): 3})
    finish(profile, tmp_path, {("static", 2, 10): 2.5})
    assert of(profile, tmp_path) == Rates(3e-3, 3e-3)


def test_each_depth_takes_its_own_search_others_the_first(text, tmp_path):
    profile = searching(text, GRID, GRID | {"depths": [1]}, arms=["static"])
    finish(profile, tmp_path, {("static", depth, rate): abs(rate - best) for depth, best in ((2, 3e-3), (1, 1e-3))
                               for rate in GRID["rates"]})
    finish(profile, tmp_path, {("static", 1, 3e-4): 5})
    assert of(profile, tmp_path, depth=2).matrix == 3e-3 and of(profile, tmp_path, depth=1).matrix == 1e-3
    assert of(profile, tmp_path, depth=16).matrix == 3e-3


def test_a_sibling_has_its_siblings_rates(text, tmp_path):
    grid = GRID | {"rates": [1e-3, 3e-3, 1e-2, 3e-2]}
    profile = searching(text, grid, siblings={"static_wide": "static", "static_nonorm": "static"})
    finish(profile, tmp_path, {(arm, 2, rate): abs(rate - best) for rate in grid["rates"]
                               for arm, best in (("controller", 1e-2), ("static", 3e-3))})
    assert of(profile, tmp_path, "static_wide").matrix == 3e-3 and of(profile, tmp_path, "controller").matrix == 1e-2


@pytest.mark.parametrize("protocol, expected", [
    ("corrected", 1e-2), ("released", 1e-3), ("corrected+target", 1e-2), ("released+target+pooling", 1e-3),
    ("released+rate", 1e-2), ("corrected+rate", 1e-3),
])
def test_a_flipped_switch_keeps_the_rates_of_its_column_and_shared_is_one_for_all_tensors(profile, root, protocol,
                                                                                          expected):
    found = of(profile, root, protocol=protocol)
    assert found.matrix == expected
    if expected == 1e-3:
        assert found.elementwise == found.matrix


def test_a_level_is_a_factor_of_both_rates(profile, root):
    own, low, high = (of(profile, root, level=level) for level in (None, "low", "high"))
    assert (low.matrix, high.matrix) == (own.matrix / 2, own.matrix * 2)
    assert (low.elementwise, high.elementwise) == (own.elementwise / 2, own.elementwise * 2)


def test_a_rung_of_a_ladder_keeps_the_rates_of_the_first(profile, root):
    assert of(profile, root, updates=24) == of(profile, root)


def test_a_diverged_point_is_never_chosen(text, tmp_path):
    profile = searching(text, GRID, arms=["static"])
    finish(profile, tmp_path, {("static", 2, 1e-3): 3, ("static", 2, 3e-3): 2})
    finish(profile, tmp_path, {("static", 2, 1e-2): 1}, status="diverged")
    assert of(profile, tmp_path).matrix == 3e-3
    for rate in (1e-3, 3e-3):
        finish(profile, tmp_path, {("static", 2, rate): 1}, status="diverged")
    with pytest.raises(InputError, match="no rate of the search works for arm 'static'; add lower rates"):
        of(profile, tmp_path)


def test_what_waits_says_why_and_other_arms_do_not_wait(text, tmp_path):
    profile = searching(text, GRID)
    finish(profile, tmp_path, {("static", 2, 1e-3): 3, ("static", 2, 3e-3): 2, ("static", 2, 1e-2): 3})
    searches = read_searches(profile, tmp_path)
    static, controller, cut = (RunSpec(arm, depth, None if arm == "cut" else 4, "corrected", 0)
                               for arm, depth in (("static", 2), ("controller", 2), ("cut", None)))
    assert waits(static, profile, searches) is None and waits(cut, profile, searches) is None
    assert "3 runs are left" in waits(controller, profile, searches)


def test_a_search_of_another_identity_is_not_read(text, tmp_path):
    profile = searching(text, GRID, arms=["static"])
    finish(profile, tmp_path, {("static", 2, 1e-3): 3, ("static", 2, 3e-3): 2, ("static", 2, 1e-2): 3})
    other = profile.model_copy(update={"rank": 8})
    assert len(read_searches(profile, tmp_path)) == 3 and read_searches(other, tmp_path) == {}


def test_a_run_of_the_grid_trains_everything_at_the_rate_of_its_id(profile):
    assert learning_rates.rates_of(RunSpec("static", 2, 4, "corrected", 9, rate=0.3), profile, {}) == Rates(0.3, 0.3)
