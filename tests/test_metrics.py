"""From raw logs to numbers: every statistic on logs whose numbers are known."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from synthetic import WHOLE, loss, plain, write, write_run, write_searches

from ouroboros.analysis import audit, claims, reference_losses, tables, text
from ouroboros.analysis.comparisons import LADDER, Comparisons
from ouroboros.analysis.ledger import read_claims
from ouroboros.analysis.results import CUT_STREAM_BATCHES, Results, load_results, read_blocks
from ouroboros.analysis.statistics import (
    BySeed,
    Ratio,
    block_interval,
    block_ratio,
    fieller,
    holm,
    interval,
    minus,
    t_interval,
    verdict,
)
from ouroboros.errors import InputError
from ouroboros.experiment.plan import RunSpec
from ouroboros.experiment.profile import load_profile
from ouroboros.log import Series

SEEDS = load_profile(WHOLE).seeds


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    write(root)
    return root


@pytest.fixture(scope="module")
def results(root):
    return load_results(WHOLE, root)


def reported(run, arm, protocol) -> float:
    return read_blocks(run, arm, protocol).mean()


# ------------------------------------------------------------------------------------------------------- intervals

@given(st.lists(st.floats(-5, 5), min_size=3, max_size=6).filter(lambda v: np.std(v) > 1e-6))
def test_the_interval_is_scipys_paired_t(values):
    interval = t_interval(values)
    expected = stats.ttest_rel(values, np.zeros(len(values))).confidence_interval(0.95)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))
    assert interval.low < interval.mean < interval.high


def test_one_seed_has_no_interval_and_says_so():
    interval = t_interval([1.5])
    assert interval.mean == 1.5 and math.isnan(interval.low) and math.isnan(interval.high)
    assert str(interval) == "1.5 (n = 1, no interval)"
    assert str(t_interval([])) == "no runs"
    assert str(t_interval([math.nan])) == "no runs"


def test_what_no_seed_enters_has_no_interval_of_width_zero():
    assert str(t_interval([3.0, 3.0, 3.0])) == "3 (the same in all 3 seeds)"


@pytest.mark.parametrize("n", [3, 5])
def test_the_interval_covers_95_percent_of_seeds(n):
    draws = np.random.default_rng(n).normal(size=(2000, n))
    assert 0.93 < np.mean([i.low < 0 < i.high for i in map(t_interval, draws)]) < 0.97
    assert 0.03 < np.mean([i.p < 0.05 for i in map(t_interval, draws)]) < 0.07


@given(st.lists(st.floats(-5, 5), min_size=3, max_size=6).filter(lambda v: np.std(v) > 1e-6))
def test_the_p_value_is_scipys_paired_t(values):
    assert t_interval(values).p == pytest.approx(stats.ttest_rel(values, np.zeros(len(values))).pvalue, abs=1e-12)


def test_fiellers_interval_worked_by_hand():
    """x = 1, 2, 3 and y = 4, 5, 6: means 2 and 5, all (co)variances of the means 1/3, t(2) = 4.3027."""
    found = fieller(Ratio({0: 1, 1: 2, 2: 3}, {0: 4, 1: 5, 2: 6}))
    assert (found.mean, found.low, found.high, found.n) == pytest.approx((40, -19.24, 59.91, 3), abs=0.01)


@given(st.lists(st.tuples(st.floats(-3, 3), st.floats(3, 4)), min_size=3, max_size=6, unique=True)
       .filter(lambda v: min(np.std(v, axis=0)) > 1e-3))
def test_at_the_ends_of_fiellers_interval_the_t_test_just_rejects(pairs):
    x, y = np.array(pairs).T
    found = fieller(Ratio(dict(enumerate(x)), dict(enumerate(y))))
    for end in (found.low, found.high):
        edge = t_interval(x - end / 100 * y)
        assert min(abs(edge.low), abs(edge.high)) < 1e-6 * (1 + abs(end))
    assert found.low <= found.mean + 1e-9 and found.mean <= found.high + 1e-9


@pytest.mark.parametrize("n", [3, 5])
def test_fiellers_interval_covers_95_percent(n):
    generator = np.random.default_rng(n)
    covered, defined = [], 0
    for _ in range(2000):
        y = generator.normal(5, 0.5, n)
        x = 0.3 * y + generator.normal(0, 0.5, n)  # paired: what a seed does to one it does to the other
        found = fieller(Ratio(dict(enumerate(x)), dict(enumerate(y))))
        covered.append(found.low < 30 < found.high)
        defined += not math.isnan(found.mean)
    assert 0.93 < np.mean(covered) < 0.97 and defined > 1980


def test_a_ratio_by_a_constant_is_the_t_interval_and_by_nothing_is_undefined():
    x = {0: 1.0, 1: 2.0, 2: 4.0}
    by_two, plain = fieller(Ratio(x, dict.fromkeys(x, 2.0))), t_interval(x.values())
    assert (by_two.low, by_two.high) == pytest.approx((50 * plain.low, 50 * plain.high))
    nothing = fieller(Ratio(x, {0: -1.0, 1: 0.5, 2: 1.0}))
    assert math.isnan(nothing.mean) and str(nothing) == "undefined: the gap isn't told to be above 0 (n = 3)"
    assert fieller(Ratio({0: 1.0}, {0: 2.0})).mean == 50
    assert str(fieller(Ratio({}, {}))) == "no runs"


def test_holm_worked_by_hand():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    adjusted = holm({"a": 0.6, "b": math.nan, "c": 0.9})
    assert math.isnan(adjusted["b"]) and (adjusted["a"], adjusted["c"]) == (1.0, 1.0)


# ------------------------------------------------------------------------------------------------------ statistics

def test_statistics_are_paired_by_seed(results):
    comparisons = Comparisons(results, "corrected")
    lead = comparisons.difference("static", "controller", depth=4)
    assert lead == pytest.approx({s: 0.25 + 0.004 * s for s in SEEDS})
    assert comparisons.difference("controller", "cut", depth=4) == pytest.approx(dict.fromkeys(SEEDS, -2))
    recovered = interval(comparisons.recovery("controller"))
    assert (recovered.low, recovered.mean, recovered.high) == pytest.approx((50, 50, 50)) and recovered.n == len(SEEDS)
    assert interval(comparisons.reduction("static", 1)).mean == pytest.approx(100 / 6, rel=0.01)
    leads = comparisons.compare("static", "controller", by="depth")
    assert list(leads) == ["depth 1", "depth 4", "depth 8", "depth 16"]
    falls = comparisons.change("fall from depth to depth", "static")
    assert list(falls) == ["depth 1 to 4", "depth 4 to 8", "depth 8 to 16"]
    assert falls["depth 1 to 4"][0] == pytest.approx(0.75)
    assert comparisons.change("fall from depth 1", "static", "controller")["depth 8"][0] == pytest.approx(7 / 8)
    assert comparisons.change("rise from depth 1", "controller")["depth 16"][1] == pytest.approx(0)
    assert comparisons.compare("none", "controller", by="depth")["depth 1"][2] == pytest.approx(1.5)
    assert comparisons.spread("static")[0] == pytest.approx(1 - 1 / 16)
    gates = comparisons.compare("controller_nogate", "controller", by="own depth")
    assert list(gates) == ["depth 1", "depth 4", "depth 8"] and gates["depth 4"][2] == pytest.approx(2.5)


def test_a_seed_that_lacks_a_part_is_in_no_pair(tmp_path):
    write(tmp_path, keep=lambda spec: spec.id != "static-d4-r8-corrected-s1")
    comparisons = Comparisons(load_results(WHOLE, tmp_path), "corrected")
    assert sorted(comparisons.difference("static", "controller", depth=4)) == sorted(set(SEEDS) - {1})
    assert sorted(comparisons.difference("static", "controller", depth=8)) == list(SEEDS)


def test_another_rank_enters_no_statistic_but_the_one_by_rank(tmp_path):
    profile = write(tmp_path, keep=lambda spec: spec.rank in (None, 8))
    for seed in range(3):
        write_run(tmp_path, profile, RunSpec("controller", 8, 2, "corrected", seed), 1.0)
        write_run(tmp_path, profile, RunSpec("static", 8, 2, "corrected", seed), 4.125)
    results = load_results(WHOLE, tmp_path)
    comparisons, table = Comparisons(results, "corrected"), tables.arm_table(results)
    assert comparisons.loss("controller", 8)[0] == pytest.approx(4.0)
    by_rank = comparisons.compare("static", "controller", by="rank")
    assert list(by_rank) == ["rank 2", "rank 8", "rank 16"]
    assert by_rank["rank 2"] == pytest.approx(dict.fromkeys(range(3), 3.125)) and by_rank["rank 16"] == {}
    row = table.query("arm == 'controller' and depth == 8 and protocol == 'corrected'")
    assert len(row) == 1 and row["loss"].item() == pytest.approx(4 + 0.01 * np.mean(SEEDS))
    curves = tables.curves(comparisons, "controller", 8)
    assert list(curves) == list(SEEDS) and curves.notna().all(axis=None)


def test_what_each_part_adds_is_the_arm_with_it_minus_the_arm_without_it(results):
    comparisons = Comparisons(results, "corrected")
    added = {name: interval(values).mean for name, values in comparisons.steps(4).items()}
    wobble = 0.004  # of static: 0.001 a seed and depth, mean over the seeds that have all parts
    assert added == {"step norms, to the gate": pytest.approx(-0.3), "gate, to the step norms": pytest.approx(-1.2),
                     "static, to both": pytest.approx(2 * wobble - 1.25),
                     "Controller, to both": pytest.approx(-1.5)}
    ladder = {name: interval(values).mean for name, values in comparisons.ladder(4).items()}
    undeclared = {"gate and static", "gate and Controller"}  # at depth 4
    assert set(ladder) == set(LADDER) - undeclared and ladder["gate and step norms"] == pytest.approx(-0.5)
    assert list(comparisons.ladder(8)) == list(LADDER)
    assert "gate alone" not in Comparisons(results, "released").ladder(4)  # it isn't planned there
    at_8 = {name: interval(values).mean for name, values in comparisons.steps(8).items()}
    assert at_8["Controller, to the gate"] == pytest.approx(-0.2) and at_8["static, to the gate"] == pytest.approx(-0.1)


def test_what_one_would_do_instead_stands_beside_the_loops_with_its_counts(results):
    table = tables.instead_table(results).set_index(["arm", "depth"])
    lora, controller = table.xs("lora").iloc[0], table.loc[("controller", 8)]
    assert lora["arm - cut"] == pytest.approx(-2.5) and lora["gap recovery (%)"] == pytest.approx(62.5)
    assert abs(lora["trained parameters"] / controller["trained parameters"] - 1) < 0.03
    assert table.xs("full").iloc[0][["trained parameters", "training (TFLOP a run)"]].tolist() == [0, 0]
    fitted, linear = (table.xs(arm).iloc[0] for arm in ("linear_fit", "linear"))
    assert fitted["forward (MFLOP a token)"] == linear["forward (MFLOP a token)"] < lora["forward (MFLOP a token)"]
    behind = Comparisons(results, "corrected").against(load_profile(WHOLE).instead, "controller")
    assert {arm: interval(values).mean for arm, values in behind.items()} == {
        "lora": pytest.approx(-0.5), "lora_layer": pytest.approx(-1), "linear_fit": pytest.approx(1),
        "linear": pytest.approx(0.5), "cut_coda_lora": pytest.approx(1.5)}


def test_configurations_are_depths_ranks_and_rates_and_each_is_compared_with_its_own_kind(tmp_path):
    profile = write(tmp_path)
    for seed in range(3):
        write_run(tmp_path, profile, RunSpec("controller", 8, 8, "corrected", seed, level="high"), 4.5)
        write_run(tmp_path, profile, RunSpec("static", 8, 8, "corrected", seed, level="high"), 4.75)
    comparisons = Comparisons(load_results(WHOLE, tmp_path), "corrected")
    found = comparisons.compare("static", "controller", by="configuration")
    assert list(found) == [*(f"depth {d}" for d in (1, 4, 8, 16)), "rank 2", "rank 16", "rate low", "rate high"]
    assert found["rate high"] == dict.fromkeys(range(3), 0.25)
    assert comparisons.loss("controller", 8)[0] == pytest.approx(4.0)  # a level enters nothing else
    assert comparisons.spread("controller") == pytest.approx({0: 0.5, 1: 0.49, 2: 0.48})
    released = Comparisons(load_results(WHOLE, tmp_path), "released").compare("static", by="configuration")
    assert list(released) == [f"depth {d}" for d in (1, 4, 8, 16)]


def test_each_protocol_reads_its_own_tokens_and_targets(tmp_path):
    """protocol.md `target`, `evaluation`, `reference`: the numbers of one log that each column reports."""
    profile = write(tmp_path, keep=lambda spec: spec.arm == "cut")
    values = {("heldout", "t+1"): 1.0, ("heldout", "t+2"): 2.0, ("stream", "t+1"): 3.0, ("stream", "t+2"): 4.0,
              ("reference", "t+1"): 5.0, ("reference", "t+2"): 6.0}
    first = CUT_STREAM_BATCHES * profile.training.micro_batch
    run = load_results(WHOLE, tmp_path).runs["cut-any-s0"]
    for (split, target), value in values.items():
        run.series[split, f"loss_{target}"].values[-1] = value
        blocks = run.series[split, f"block_losses_{target}"].values
        spread = 0.5 if split == "stream" else 0.0
        blocks[-1] = [value + spread] * first + [value - spread] * (len(blocks[-1]) - first)
    assert {arm: reported(run, arm, "corrected") for arm in ("full", "cut", "static")} == \
        {"full": 1.0, "cut": 1.0, "static": 1.0}
    released = {arm: reported(run, arm, "released") for arm in ("full", "cut", "static")}
    whole = (first * 4.5 + (50 * profile.training.micro_batch - first) * 3.5) / (50 * profile.training.micro_batch)
    assert released == pytest.approx({"full": 5.0, "cut": 4.5, "static": whole})


@pytest.mark.parametrize("full, defined", [(5.0, True), (7.0, False), (5.99, False)])
def test_no_share_of_a_gap_that_the_blocks_do_not_tell(tmp_path, full, defined):
    """No seed enters full or cut: that the gap is the same in all of them says nothing of it. Blocks wobble by 0.1."""
    def loss(arm, depth, protocol, seed):
        return {"full": full, "cut": 6.0}.get(arm, 5.5)

    write(tmp_path, loss=loss, keep=lambda spec: spec.arm in ("full", "cut", "controller") and not spec.rate)
    results = load_results(WHOLE, tmp_path)
    if full == 5.99:  # each block as far above as the next below
        results.runs["full-any-s0"].series["heldout", "block_losses_t+1"].values[-1] = [6.5, 5.5, 6.4, 5.6]
    found = interval(Comparisons(results, "corrected").recovery("controller", 8))
    assert math.isnan(found.mean) != defined
    if defined:
        assert found.mean == pytest.approx(50)


@pytest.mark.parametrize("column", ["loss", "foreign"])
def test_a_gap_is_told_by_blocks_in_pairs_where_they_are_the_same(tmp_path, column):
    """Each block of the cut model is 1 above the full one's, and blocks differ by far more among themselves."""
    write(tmp_path, keep=lambda spec: spec.arm in ("full", "cut", "controller") and not spec.rate)
    results = load_results(WHOLE, tmp_path)
    for run, more in (("full-any-s0", 0.0), ("cut-any-s0", 1.0)):
        for split in ("heldout", "foreign"):
            blocks = results.runs[run].series[split, "block_losses_t+1"].values
            blocks[-1] = [more + 50.0 * (place % 3) + 0.01 * (place % 5) * more for place in range(len(blocks[-1]))]
    found = Comparisons(results, "corrected")
    assert found.share(found.loss("controller", 8, column=column), column).defined


def test_what_a_run_logs_of_itself(results):
    comparisons = Comparisons(results, "corrected")
    assert comparisons.at_other_depths("static")["depth 24"][0] == pytest.approx(4.125 + 0.16)
    assert comparisons.at_other_depths("none")["depth 8"][2] == pytest.approx(5.52)
    rises = {kind: values[1] for kind, values in comparisons.interventions(4).items()}
    assert rises == pytest.approx({"other_sequence": 0.03, "corpus_mean": 0.02, "step_mean": 0.01})
    assert comparisons.compare("controller", "cut", by="text", depth=1)["foreign"][1] == pytest.approx(-2)
    assert list(comparisons.compare("controller", "cut", by="text", depth=1)) == ["train", "heldout", "foreign"]
    assert comparisons.logged("static", 4, "loss_t+1/as_trained") == {}  # it has no Controller to show anything


def test_the_tables_of_steps_and_of_the_modulation(results):
    table = tables.steps_table(results, 16)
    row = table.query("protocol == 'corrected' and arm == 'none' and step == 3").iloc[0]
    found = row["gate_open"], row["change"], row["state_norm"], row["change_n"]
    assert found == pytest.approx((0.3, 1 / 3, 2, len(SEEDS)))
    assert table.groupby(["protocol", "arm"]).size().eq(16).all()
    none = Results(results.profile, {})
    assert list(tables.steps_table(none, 16)) == ["protocol", "arm", "step"]  # a table without rows can be read again
    table = tables.modulation_table(results, 8)
    found = table.query("protocol == 'released' and projection == 'up_proj'").set_index("arm")["over_inputs"]
    assert found.to_dict() == {"controller": 0.5, "static": 0.0} and len(table) == 2 * 2 * 7


# ------------------------------------------------------------------------------------------------------- what was read

def test_statistics_say_what_they_read(results):
    with results.reading() as outer:
        Comparisons(results, "corrected").difference("none", "cut", depth=4)
        with results.reading() as inner:
            Comparisons(results, "released").loss("full")
    assert inner == {f"full-any-s{seed}" for seed in (0, 1, 2)}  # seeds 3 and 4 are of `corrected` alone
    assert outer == inner | {f"{name}-s{seed}" for name in ("none-d4-corrected", "cut-any") for seed in SEEDS}
    with results.reading() as after:
        pass
    assert after == set()


def test_a_run_that_was_not_made_is_not_read(tmp_path):
    write(tmp_path, keep=lambda spec: spec.arm in ("cut", "none") and spec.seed == 1)
    results = load_results(WHOLE, tmp_path)
    with results.reading() as read:
        Comparisons(results, "corrected").difference("none", "cut", depth=4)
    assert read == {"cut-any-s1", "none-d4-corrected-s1"}


def test_a_kept_table_says_again_what_it_read(results):
    read = []
    for _ in range(2):
        with results.reading() as found:
            table = audit.switch_table(results, True)
        read.append((found, table))
    assert read[0][0] == read[1][0] and read[0][1] is read[1][1]
    assert {results.runs[name].manifest["arm"] for name in read[0][0]} == {"controller", "static", "full", "cut"}


# ------------------------------------------------------------------------------------------------------------ cells

@pytest.fixture(scope="module")
def ladder(tmp_path_factory):
    """Two profiles of runs that differ only in those of other budgets: made and far off, and not made."""
    made, without = tmp_path_factory.mktemp("made"), tmp_path_factory.mktemp("without")
    profile = write(made, "smoke")
    longer = [spec for spec in profile.runs() if spec.updates]
    for spec in longer:
        write_run(made, profile, spec, -5.0)
    write(without, "smoke", keep=lambda spec: plain(spec) and not spec.updates)
    for folder in (made, without):
        write_searches(folder, profile)
    return load_results("smoke", made), load_results("smoke", without)


TABLES = {
    "arms": tables.arm_table, "instead": tables.instead_table,
    "search": tables.search_table, "switches": audit.switch_table, "target": audit.target_table,
    "leak": audit.leak_table, "moved": audit.moved_table, "reach": audit.reach_table, "depth": audit.depth_table,
    "rate": audit.rate_table, "reference": audit.reference_table, "claims": claims.with_runs,
    "steps": lambda r: tables.steps_table(r, 4),
    "modulation": lambda r: tables.modulation_table(r, 4),
    "curves": lambda r: tables.curves(Comparisons(r, "corrected"), "controller", 4),
    "configurations": lambda r: tables.difference_table(r, Comparisons.compare, "static", by="configuration"),
    "advantage": lambda r: tables.difference_table(r, Comparisons.compare, "static", "controller", by="depth"),
    "interventions": lambda r: tables.difference_table(r, Comparisons.interventions, 4),
}


def test_the_table_of_rates_has_every_depth_factor_and_step_outward(tmp_path):
    profile = load_profile("smollm2-gpu")
    search = [spec for spec in profile.search_runs() if spec.arm == "static"]
    dev = {3e-4: 5.0, 1e-3: 4.0, 3e-3: 3.0, 1e-2: 3.5}
    outward = replace(next(spec for spec in search if spec.rate == 3e-3), rate=1e-2)
    for spec in [*search, outward]:
        value = dev[spec.rate] if spec.rate else {10: 2.5, 30: 2.75}[spec.factor]
        write_run(tmp_path, profile, spec, value)
    table = tables.search_table(load_results("smollm2-gpu", tmp_path))
    assert table.to_dict("records") == [{
        "arm": "static", "depth": 1, "updates": 200, "dev loss at 0.0003": 5.0, "dev loss at 0.001": 4.0,
        "dev loss at 0.003": 3.0, "dev loss at 0.01": 3.5, "elementwise x10": 2.5, "elementwise x30": 2.75,
        "best rate": 3e-3, "best factor": 10, "at the grid's end": False, "missing": 0,
        "diverged at": ""}]
    assert list(table)[3:7] == [f"dev loss at {rate:g}" for rate in dev]


def test_the_lead_is_said_at_every_rate_that_both_arms_were_searched_at(tmp_path):
    """And at no rate that one of them lacks."""
    profile = load_profile("smollm2-gpu")
    dev = {"static": {3e-4: 5.0, 1e-3: 4.0, 3e-3: 3.0, 10: 2.5, 30: 2.0},
           "controller": {3e-4: 4.75, 1e-3: 4.0, 10: 2.6, 30: 2.125}}
    for spec in profile.search_runs():
        if (value := dev.get(spec.arm, {}).get(spec.rate or spec.factor)) is not None:
            write_run(tmp_path, profile, spec, value)
    results = load_results("smollm2-gpu", tmp_path)
    said = "+0.250 (rate 0.0003), +0.000 (rate 0.001), -0.100 (elementwise x10), -0.125 (elementwise x30)"
    assert text.by_rate(results) == [f"Static - Controller on `dev` at depth 1, 200 updates, one spare seed: {said}."]
    assert text.by_rate(Results(profile, {})) == []


@pytest.mark.parametrize("name", TABLES)
def test_runs_of_another_budget_enter_no_table(name, ladder):
    with_, without = ladder
    with with_.reading() as read:
        table = TABLES[name](with_)
    assert len(table)
    pd.testing.assert_frame_equal(table, TABLES[name](without))
    assert not {run for run in read if run.endswith("-u16")}


def test_the_rows_of_another_budget_have_their_own_places(ladder):
    with_, without = ladder
    longer = with_.cells[with_.cells["updates"] == 16]
    assert set(longer["run"]) == {"controller-d4-r4-corrected-s0-u16", "static-d4-r4-corrected-s0-u16"}
    assert longer["loss"].to_list() == pytest.approx([-5, -5]) and not longer["shared"].any()
    assert (without.cells[without.cells["updates"] == 16]["status"] == "missing").all()
    (row,) = with_.places["corrected", "static", 4, 4, "", 16]
    assert row.run == "static-d4-r4-corrected-s0-u16"
    assert with_.runs[row.run].manifest["config"]["training"]["updates"] == 16



def test_rows_that_are_one_run_say_so(results):
    cells = results.cells
    released = cells[(cells["protocol"] == "released") & (cells["arm"] == "controller") & (cells["rank"] == 8)]
    assert released["shared"].all() and released.groupby("seed")["run"].nunique().eq(1).all()
    assert not cells[(cells["protocol"] == "corrected") | cells["arm"].isin(["static", "none"])]["shared"].any()
    table = tables.arm_table(results)
    assert table[(table["protocol"] == "released") & (table["arm"] == "controller")]["depths drawn"].all()
    assert not table[(table["protocol"] == "corrected") | table["arm"].isin(["static", "none"])]["depths drawn"].any()
    other = cells[(cells["protocol"] == "released") & (cells["arm"] == "controller") & (cells["rank"] != 8)]
    assert len(other) == 2 and not other["shared"].any()  # run at the base depth alone


def test_missing_and_diverged_runs_have_no_loss_and_are_counted(tmp_path):
    write(tmp_path, keep=lambda spec: spec.seed < 2 or spec.arm == "cut", diverged=("none-d4-corrected-s1",))
    results = load_results(WHOLE, tmp_path)
    status = results.cells["status"]
    assert set(status) == {"finished", "missing", "diverged"}
    assert results.cells[status != "finished"]["loss"].isna().all()
    row = tables.arm_table(results).query("arm == 'none' and protocol == 'corrected' and depth == 4").iloc[0]
    assert (row["n"], row["diverged"], row["loss"]) == (1, 1, pytest.approx(loss("none", 4, "corrected", 0)))
    assert math.isnan(row["loss_low"])
    comparisons = Comparisons(results, "corrected")
    comparisons.difference("none", "cut", depth=4)
    assert comparisons.diverged == {"none-d4-corrected-s1"}


def test_no_run_at_all_is_refused(tmp_path):
    with pytest.raises(InputError, match="no finished run there; make runs PROFILE=.*whole.yaml"):
        load_results(WHOLE, tmp_path)


def test_a_log_without_a_series_that_is_read_is_refused(tmp_path):
    profile = write(tmp_path, keep=lambda spec: spec.arm == "cut")
    write_run(tmp_path, profile, RunSpec("full", None, None, "any", 0), 2.0)
    run = load_results(WHOLE, tmp_path).runs["full-any-s0"]
    with pytest.raises(InputError, match="'full-any-s0': its log has no series of split 'moon', metric 'loss_t.1'"):
        run.last("moon", "loss_t+1")
    del run.series["foreign", "loss_t+1"]
    with pytest.raises(InputError, match="'full-any-s0': .* split 'foreign'"):
        len(Results(profile, {"full-any-s0": run}).cells)


# ------------------------------------------------------------------------------------- seeds and blocks together

BLOCKS = {"full": [1.0, 2, 3, 2], "cut": [5.0, 7, 6, 6], "unigram": [5.5, 5.5, 5.5, 5.5],
          "controller": [4.0, 5, 5, 4], "static": [4.5, 5, 5, 4.5]}


@pytest.fixture
def documented(tmp_path):
    """Runs that state their documents, one a block, with losses of those of BLOCKS; of trained arms 0.1 more a seed."""
    write(tmp_path, "smoke", keep=lambda spec: plain(spec) and spec.arm in BLOCKS)
    results = load_results("smoke", tmp_path)
    for run in results.runs.values():
        losses = np.array(BLOCKS[run.manifest["arm"]])
        if run.manifest["switches"]:
            losses = losses + 0.1 * run.manifest["seed"] * np.array([1, 1, 2, 0])
        for metric, value in (("loss_t+1", losses.mean()), ("block_losses_t+1", losses.tolist())):
            run.series["heldout", metric] = Series([8], [value])
        if run.manifest["arm"] == "cut":
            run.series["heldout", "document_lengths"] = Series([8], [[63] * 4])
    return results


def test_an_interval_covers_seeds_and_the_documents_of_the_blocks(documented):
    comparisons = Comparisons(documented, "corrected")
    by_hand = np.array(BLOCKS["controller"]) - BLOCKS["cut"] + 0.1 * np.outer([0, 1, 2], [1, 1, 2, 0])
    found = interval(comparisons.difference("controller", "cut", depth=4))
    expected = block_interval(by_hand, [0, 1, 2, 3])
    assert (found.low, found.high, found.p) == pytest.approx((expected.low, expected.high, expected.p))
    assert (found.n, found.blocks, found.clusters, found.trained) == (3, 4, 4, True)
    alone = t_interval(by_hand.mean(1))
    assert found.low < alone.low and alone.high < found.high
    assert found.margin == pytest.approx(0.01)  # 1 % of the gap, 4 nats, is more
    assert interval(comparisons.difference("cut", "controller", depth=4)).high == pytest.approx(-found.low)


def test_a_loss_on_either_target_covers_the_documents_too(documented):
    """As the table of targets has it, whatever the protocol reports."""
    found = Comparisons(documented, "released")
    scored, heldout = (interval(minus(measure("controller"), measure("cut"))) for measure in (
        lambda arm: found.scored(arm, 4, "t+1"), lambda arm: found.loss(arm, 4, column="heldout")))
    assert (scored.low, scored.high, scored.blocks) == (heldout.low, heldout.high, 4)
    assert interval(found.scored("full", None, "t+2")).blocks == 4 and not found.scored("full", None, "t+2").trained
    few = {name: run for name, run in documented.runs.items() if run.manifest["seed"] == 0}  # the others are to come
    assert set(Comparisons(Results(documented.profile, few), "released").scored("controller", 4, "t+1")) == {0}


def test_only_parts_with_a_verdict_have_a_p_and_a_protocol_without_runs_has_no_rows(documented):
    few = {name: run for name, run in documented.runs.items() if run.manifest["switches"] is None or (
        run.manifest["protocol"] == "corrected" and run.manifest["seed"] == 0)}
    table = tables.difference_table(Results(documented.profile, few), Comparisons.compare, "static", "controller",
                                    by="depth")
    assert set(table["protocol"]) == {"corrected"} and table["difference"].notna().any()
    assert table["p (Holm)"].isna().all() and set(table["the first is"]) == {"not judged"}
    whole = tables.difference_table(documented, Comparisons.compare, "static", "controller", by="depth")
    assert whole["p (Holm)"].notna().any()
    none = tables.difference_table(Results(load_profile("smollm2"), documented.runs), Comparisons.coda, 8)
    assert none.empty and {"protocol", "part", "difference_low"} <= set(none)


def test_what_no_seed_enters_is_judged_by_its_documents_alone(documented):
    comparisons = Comparisons(documented, "corrected")
    gap = interval(comparisons.difference("cut", "full"))
    d = np.array(BLOCKS["cut"]) - BLOCKS["full"]
    assert (gap.low, gap.high) == pytest.approx(tuple(stats.ttest_1samp(d, 0).confidence_interval(0.95)))
    assert gap.judged and not gap.trained and gap.n == 3 and "not trained" in str(gap)


def test_gap_recovery_covers_the_documents_too(documented):
    comparisons = Comparisons(documented, "corrected")
    cut, full = (np.repeat([BLOCKS[arm]], 3, 0) for arm in ("cut", "full"))
    arm = np.array(BLOCKS["static"]) + 0.1 * np.outer([0, 1, 2], [1, 1, 2, 0])
    found, expected = interval(comparisons.recovery("static", 4)), block_ratio(cut - arm, cut - full, np.arange(4))
    assert (found.low, found.mean, found.high) == pytest.approx((expected.low, expected.mean, expected.high))


def test_a_difference_of_losses_on_other_texts_has_no_blocks(documented):
    controller = Comparisons(documented, "corrected").loss("controller", 4)
    elsewhere = BySeed({0: 1.0, 1: 2.0, 2: 3.0})
    for part in (minus(controller, elsewhere), minus(elsewhere, controller)):
        assert part.blocks is None and part.clusters is None and len(part) == 3
        assert interval(Ratio(controller, part)).blocks == 0


def test_blocks_that_are_each_seeds_own_are_judged_over_seeds_alone(documented):
    found = interval(Comparisons(documented, "released").difference("static", "controller", depth=4))
    assert found.blocks == 0 and found.n == 3  # the start of each seed's training stream


def test_a_small_difference_is_told_as_small(documented):
    for name, run in documented.runs.items():
        if run.manifest["arm"] == "static" and "corrected" in name:
            other = documented.runs[name.replace("static", "controller")]
            shifted = [value + 1e-3 for value in other.last("heldout", "block_losses_t+1")]
            run.series["heldout", "block_losses_t+1"] = Series([8], [shifted])
            run.series["heldout", "loss_t+1"] = Series([8], [float(np.mean(shifted))])
    found = interval(Comparisons(documented, "corrected").difference("static", "controller", depth=4))
    assert verdict(found) == "worse within the margin"
    assert text.phrase(found, ("is behind", "is ahead", "is open")) == "is behind, within the margin"
    assert "The Controller is ahead, within the margin: " in text.advantage(documented, "corrected")
    judged = claims.judge(next(c for c in read_claims() if c.what == "Controller ahead of static at every depth"),
                          documented, "corrected")
    assert judged.verdict == "holds within the margin" and "smaller than the margin of 0.01 nats" in judged.why


def test_norms_that_had_no_time_to_reach_the_stream_are_said(results, tmp_path):
    write(tmp_path, "smoke", keep=lambda spec: plain(spec) and spec.arm in ("cut", "full", "static", "controller"))
    found = load_results("smoke", tmp_path)
    assert math.isnan(Comparisons(found, "corrected").norms_reached("static", 4))  # not logged
    for run in found.runs.values():
        if run.manifest["arm"] == "static":
            run.series["model", "stream_rms"] = Series([8], [[4.0] * 4])
            run.series["model", "step_norm"] = Series([8], [[1.0, 1.0, 1.5, 1.5]])
    assert Comparisons(found, "corrected").norms_reached("static", 4) == pytest.approx(1.25 / 4)
    row = tables.arm_table(found).query("arm == 'static' and protocol == 'corrected' and depth == 4").iloc[0]
    assert row["norms"] == pytest.approx(0.3125) and row["norms near the stream's"] is False
    ahead = claims.judge(next(c for c in read_claims() if c.what == "Controller ahead of static at every depth"),
                         found, "corrected")
    assert "step norms far from the stream's size: `static`" in ahead.why


def test_a_ladder_of_budgets_reads_each_budgets_own_runs(tmp_path, monkeypatch):
    profile = load_profile("smoke")
    for spec in profile.runs():
        if spec.arm in ("controller", "static", "cut", "full") and plain(spec) and spec.purpose == "matrix":
            longer = 0.6 if spec.updates and spec.arm == "static" else 0
            write_run(tmp_path, profile, spec, loss(spec.arm, spec.depth, spec.protocol, spec.seed) - longer)
    results = load_results("smoke", tmp_path)
    table = tables.budget_table(results).set_index(["difference", "tokens"])
    before, after = (table.loc[("static - controller", tokens)] for tokens in (2048, 4096))
    assert before["nats"] == pytest.approx(0.25, abs=0.01) and before["the first is"] == "worse"
    assert after["nats"] == pytest.approx(-0.35, abs=0.01) and after["nats_n"] == 1
    assert after["the first is"] == "not judged" and after["told"] == "not settled up to 4,096 tokens"
    assert table.loc[("controller - cut", 4096), "nats"] == pytest.approx(-2)  # the cut model has no budget
    [said] = text.budgets(results)
    assert said.startswith("`corrected`, depth 4, from 2,048 to 4,096 tokens: not settled up to 4,096 tokens: `contr")
    assert "`static - controller` (+0.25 to -0.35 nats)" in said
    shown = table.reset_index()
    assert text.shown_budgets(shown) == "With more tokens 0 of 3 differences are settled, none changes sign"
    turned = shown.assign(told="changes sign between 2,048 and 4,096 tokens")
    assert text.shown_budgets(turned).endswith("static - cut, static - controller")
    further = shown[shown["difference"] == "controller - cut"].iloc[-1:].assign(tokens=8192)
    monkeypatch.setattr(text, "budget_table", lambda _: pd.concat([shown, further], ignore_index=True))
    rest, longer = text.budgets(results)  # each difference with the largest budget that it has
    assert "to 4,096 tokens" in rest and "`controller - cut`" not in rest
    assert "to 8,192 tokens" in longer and "`static" not in longer


def test_what_a_smaller_scale_does_not_keep_is_read_off_profile_and_logs(results):
    table = tables.scale_table(results).set_index("quantity")
    assert table.loc["updates"].tolist() == ["18,750", "200"] and table.loc["vocabulary", "paper"] == "151,936"
    assert table.loc["cut - full (nats)", "paper"] == "7.597 (reported)"
    assert table.loc["cut - full (nats)", "whole"].startswith("4 (the same")
    assert table.loc["layers held"].tolist() == ["17 of 36", "7 of 12"]
    assert float(table.loc["travel of a norm weight", "paper"]) == pytest.approx(5.6, abs=0.05)  # system.md `travel`
    # half a cosine's peak on average
    assert float(table.loc["travel of a norm weight", "whole"]) == pytest.approx(0.001 * 200 / 2, rel=0.02)


def test_sentences_of_other_depths_and_of_norms_that_begin_elsewhere(results, tmp_path):
    said = text.other_depths(results)  # 0.01 nats for each step away from depth 8
    assert "the Controller trained at depth 8, scored at another. The loss is higher: at depth 1 (0.07)" in said
    assert text.matched(results) == ""  # not planned
    write(tmp_path, "smollm2", keep=lambda spec: spec.arm.removesuffix("_matched") in ("none", "static", "controller"))
    said = text.matched(load_results("smollm2", tmp_path))
    assert "minus at 1. Can't be judged from one seed: Controller, depth 1 (-0.1)" in said


def test_a_search_that_is_under_way_says_how_many_runs_are_missing(tmp_path):
    profile = load_profile("smoke")
    first = [spec for spec in profile.search_runs() if spec.arm == "lora"][0]
    write_run(tmp_path, profile, first, 4.0)
    table = tables.search_table(load_results("smoke", tmp_path)).set_index("arm")
    assert table.index.tolist() == ["lora"] and table.loc["lora", "missing"] >= 1


def test_a_verdict_that_differs_on_newer_text_is_named(tmp_path):
    root, profile = tmp_path, load_profile("smoke")
    for spec in profile.runs():
        if spec.arm in ("controller", "static", "cut", "full") and plain(spec) and spec.purpose == "matrix":
            write_run(root, profile, spec, loss(spec.arm, spec.depth, spec.protocol, spec.seed))
    same = load_results("smoke", root)
    said = text.newer(same, "corrected")
    assert said.startswith("`corrected`: 4 of 4 verdicts on held-out text are the same on text that is newer than")
    assert said.endswith("(Controller - cut, static - Controller; at each depth).")  # the pairs that were run
    for name, run in same.runs.items():
        if name.startswith("static-d1") and "corrected" in name:
            run.series["newer", "loss_t+1"] = Series([8], [1.0])
    words = text.newer(Results(profile, same.runs), "corrected")
    assert "`corrected`: 3 of 4 verdicts" in words
    assert "static - Controller, depth 1 (worse on held-out, better on newer text)" in words


def test_levels_are_told_for_both_targets(documented):
    table = reference_losses.levels_table(documented).set_index(["split", "target"])
    assert table.loc[("heldout", "t+1"), "unigram"] == 5.5 and table.loc[("heldout", "t+1"), "cut"] == 6
    assert table["uniform"].eq(math.log(1024)).all() and math.isnan(table.loc[("heldout", "t+2"), "bare"])
    assert [split for split, target in table.index if target == "t+2"] == ["train", "heldout", "foreign", "newer"]


# ------------------------------------------------------------------------------------------------------ convergence

def test_the_slope_is_of_the_last_fifth(results):
    run = results.runs["none-d4-corrected-s0"]
    points = tables.curve(run)
    assert points.index.is_unique and len(points) == results.profile.evaluation.points
    late = points[points.index >= 160].tolist()  # of 200 updates
    assert tables.last_slope(points) == pytest.approx(late[-1] - late[0])
    few = pd.Series({0: 9.0, 100: 5.0, 200: 4.0, 300: 3.7})  # one evaluation in the last fifth: its part of -0.3
    assert tables.last_slope(few) == pytest.approx(-0.3 * 60 / 100) and math.isnan(tables.last_slope(few[:1]))
    table = tables.arm_table(results)
    assert np.allclose(table["last_slope"].dropna(), late[-1] - late[0])
    settled = table[(table["arm"] == "none") & (table["n"] > 0)]["converged"]
    assert settled.eq(abs(late[-1] - late[0]) <= tables.CONVERGED_SLOPE).all()


def test_curves_are_of_finished_seeds(results):
    curves = tables.curves(Comparisons(results, "corrected"), "none", 4)
    assert curves.iloc[-1].to_dict() == pytest.approx({seed: 5.5 + 0.01 * seed + math.exp(-5) for seed in SEEDS})
    assert tables.curves(Comparisons(results, "corrected"), "none", 3).empty


# --------------------------------------------------------------------------------- what a comparison is made of

@pytest.mark.parametrize("reached, near", [(math.nan, None), (0.49, False), (0.5, True), (1.0, True), (2.0, True),
                                           (2.01, False)])
def test_norms_are_near_the_stream_from_a_half_to_twice_its_size(results, monkeypatch, reached, near):
    monkeypatch.setattr(Comparisons, "norms_reached", lambda *_: reached)
    assert Comparisons(results, "corrected").norms_near("static", 4) is near


def test_a_verdict_names_each_arm_whose_norms_are_far_at_any_depth_and_no_other(tmp_path, monkeypatch):
    write(tmp_path, "smoke", keep=lambda spec: plain(spec) and spec.arm in ("cut", "full", "static", "controller"))
    results, claim = load_results("smoke", tmp_path), next(
        c for c in read_claims() if c.what == "Controller ahead of static at every depth")
    far = {("static", 4)}
    monkeypatch.setattr(Comparisons, "norms_near", lambda _, arm, depth=None: (arm, depth) not in far)
    assert "far from the stream's size: `static`" in claims.judge(claim, results, "corrected").why
    far.add(("controller", 1))
    assert "far from the stream's size: `static`, `controller`" in claims.judge(claim, results, "corrected").why
    far.clear()
    assert "far from" not in claims.judge(claim, results, "corrected").why


def test_only_the_diverged_runs_that_were_asked_for_are_collected(tmp_path):
    write(tmp_path, "smoke", keep=lambda spec: plain(spec) and spec.arm in ("cut", "full", "static", "controller"),
          diverged=("static-d4-r4-corrected-s1", "controller-d1-r4-corrected-s2", "controller-d4-r4-corrected-s0"))
    found = Comparisons(load_results("smoke", tmp_path), "corrected")
    assert set(found.loss("static", 4)) == {0, 2} and found.diverged == {"static-d4-r4-corrected-s1"}
    assert set(found.difference("static", "controller", depth=4)) == {2}
    assert found.diverged == {"static-d4-r4-corrected-s1", "controller-d4-r4-corrected-s0"}
    assert [run.manifest["seed"] for run in found.runs_of("static", 4)] == [0, 2]
    endless = Comparisons(found.results, "corrected", endless=True).loss("static", 4)
    assert endless[1] == math.inf and set(endless) == {0, 1, 2} and endless.blocks is None


def test_seeds_enter_where_either_arm_was_trained(results):
    found = Comparisons(results, "corrected")
    trained = {arm: found.loss(arm, depth=4).trained for arm in ("full", "cut", "controller", "lora")}
    assert trained == {"full": False, "cut": False, "controller": True, "lora": True}
    assert found.difference("cut", "controller", depth=4).trained and not found.difference("cut", "full").trained


@pytest.mark.parametrize("there", [("cut", "controller"), ("full", "controller")])
def test_without_both_full_and_cut_there_is_no_share_of_the_gap(tmp_path, there):
    write(tmp_path, "smoke", keep=lambda spec: plain(spec) and spec.arm in there)
    found = Comparisons(load_results("smoke", tmp_path), "corrected")
    share = found.share(found.loss("controller", 4))
    assert share.denominator == {} and interval(share).n == 0
    assert set(found.gap_on_common_blocks()) == set()


def test_changes_over_depths_go_from_the_first_to_the_others_or_from_each_to_the_next(results, monkeypatch):
    found = Comparisons(results, "corrected")
    losses = {depth: loss("static", depth, "corrected", 0) for depth in (1, 4, 8, 16)}
    rise, fall, steps = (found.change(kind, "static") for kind in (
        "rise from depth 1", "fall from depth 1", "fall from depth to depth"))
    assert {name: part[0] for name, part in rise.items()} == pytest.approx(
        {f"depth {depth}": losses[depth] - losses[1] for depth in (4, 8, 16)})
    assert {name: part[0] for name, part in fall.items()} == pytest.approx(
        {name: -part[0] for name, part in rise.items()})
    assert {name: part[0] for name, part in steps.items()} == pytest.approx(
        {f"depth {a} to {b}": losses[a] - losses[b] for a, b in ((1, 4), (4, 8), (8, 16))})
    other = found.change("rise from depth 1", "static", "controller")
    assert other["depth 4"][0] == pytest.approx(1 / 4 - 1)
    monkeypatch.setattr(found, "depths_of", lambda arm: (4, 8))
    assert found.change("rise from depth 1", "static") == {}  # where depth 1 isn't planned there is none


def test_a_spread_is_over_all_configurations_and_of_seeds_that_have_all(tmp_path):
    write(tmp_path, "smoke", keep=lambda spec: plain(spec) and spec.arm == "static" or spec.arm in ("cut", "full"))
    found = Comparisons(load_results("smoke", tmp_path), "corrected")
    assert set(found.spread("static")) == {0}  # other ranks and rates were run with one seed
    assert found.spread("static")[0] == pytest.approx(
        loss("static", 1, "corrected", 0) - loss("static", 4, "corrected", 0))


def test_reduction_and_recovery_divide_by_the_cut_loss_and_by_the_gap(tmp_path):
    words = {"full": 2.0, "cut": 6.0, "controller": 4.0}
    write(tmp_path, "smoke", loss=lambda arm, *_: words[arm], keep=lambda spec: plain(spec) and spec.arm in words)
    found = Comparisons(load_results("smoke", tmp_path), "corrected")
    of = {name: interval(getattr(found, name)("controller", 4)).mean for name in ("reduction", "recovery")}
    assert of == pytest.approx({"reduction": 100 * 2 / 6, "recovery": 100 * 2 / 4})


def test_a_claim_by_rank_of_a_profile_without_ranks_is_of_no_runs(tmp_path):
    write(tmp_path, "smoke", keep=lambda spec: plain(spec) and spec.arm in ("cut", "full", "static", "controller"))
    results = load_results("smoke", tmp_path)
    claim = next(c for c in read_claims() if c.measure and c.measure.by == "rank")
    assert len(claims.measured(claim.measure, Comparisons(results, "corrected"))) > 1
    plan = tuple(entry for entry in results.profile.plan if not entry.ranks)
    bare = Results(results.profile.model_copy(update={"plan": plan}), results.runs)
    assert claims.measured(claim.measure, Comparisons(bare, "corrected")) == {"": {}}
