"""Each switch alone: known numbers in, the effect of each switch out."""

import math

import numpy as np
import pandas as pd
import pytest
from synthetic import WHOLE, plain, write

from ouroboros.analysis import audit, audit_summary
from ouroboros.analysis.results import load_results
from ouroboros.log import Series

SHIFTS = {"target": 0.5, "rate": -0.25, "alpha": 0.125}  # of static, where the switch is flipped


def loss(arm, depth, protocol, seed):
    base = {"full": 2.0, "cut": 6.0, "controller": 4.0, "static": 4.5, "none": 5.0}.get(arm, 5.5)
    column, *flipped = protocol.split("+")
    shift = sum(SHIFTS.get(switch, 0) for switch in flipped) if arm == "static" else 0
    return base + shift + 0.01 * seed * (arm == "static") + (1.0 if column == "released" and arm == "static" else 0)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    root = tmp_path_factory.mktemp("audit")
    write(root, "smoke", loss, keep=lambda spec: True)
    return load_results("smoke", root)


def effect(table, column, switch, quantity, depth=4):
    rows = table.query("column == @column and switch == @switch and quantity == @quantity and depth == @depth")
    assert len(rows) == 1
    return rows.iloc[0]


@pytest.mark.parametrize("column", ["released", "corrected"])
def test_the_effect_of_a_switch_is_the_difference_that_it_makes(results, column):
    table, sign = audit.switch_table(results), 1 if column == "corrected" else -1  # released - corrected, in both
    row = effect(table, column, "target", "static - Controller")
    assert row["effect"] == pytest.approx(sign * 0.5) and row["value_n"] == 3
    assert row["effect_low"] == pytest.approx(sign * 0.5)  # what the seed does cancels within it
    row = effect(table, column, "rate", "static")
    assert row["effect"] == pytest.approx(sign * -0.25) and row["effect_n"] == 1 and math.isnan(row["effect_low"])
    assert effect(table, column, "target", "controller")["effect"] == 0
    assert effect(table, column, "target", "loss reduction (%)")["effect"] == 0
    assert effect(table, "corrected", "target", "loss reduction (%)")["value"] == pytest.approx(100 / 3)


def test_a_row_a_switch_has_its_effect_on_the_headlines_in_both_columns(results):
    table = audit_summary.effects_table(results).set_index("switch")
    lead = "static - Controller, all else {}"
    assert table.loc["target", lead.format("corrected")] == "0.5 (the same in all 3 seeds)"
    assert table.loc["rate", lead.format("corrected")].startswith("-0.25 (n = 1")


def test_all_ten_are_the_other_column(results):
    table = audit.switch_table(results)
    assert effect(table, "corrected", "all", "static")["effect"] == pytest.approx(1)
    assert {*table[table["switch"] == "all"]["column"]} == {"corrected"}  # told once


def test_what_was_not_run_is_in_no_table(tmp_path):
    write(tmp_path, "smoke", loss, keep=plain)
    found = load_results("smoke", tmp_path)
    table = audit.switch_table(found)
    assert set(table[table["quantity"] == "controller"]["switch"]) == {"none", "all", "evaluation", "reference"}
    idle = table[table["switch"].isin(("pooling", "depth")) & (table["quantity"] == "static")]
    assert len(idle) == 8 and (idle["effect"] == 0).all()  # these two don't enter it: no run is missing
    write(tmp_path, keep=lambda spec: plain(spec) and spec.arm in ("static", "none") and spec.depth in (1, 8))
    table = audit.switch_table(load_results(WHOLE, tmp_path))
    idle = table[table["switch"].isin(("pooling", "depth")) & table["quantity"].isin(("static", "none"))]
    assert len(idle) == 16 and (idle["effect"] == 0).all()
    write(tmp_path, "paper", keep=lambda spec: spec.arm in ("full", "cut"))
    none = load_results("paper", tmp_path)  # a profile without an audit
    assert audit.switch_table(none).empty and audit_summary.last_table(none).empty
    assert audit_summary.effects_table(none).empty
    assert audit_summary.answer(none)[0].endswith("one by one: not run yet.")


def test_reading_alone_retrains_nothing(results):
    runs = {cell.run.id for cell in results.profile.cells() if cell.protocol == "released+evaluation"}
    assert "static-d4-r4-released-s0" in runs and not [name for name in runs if "+" in name]


def test_the_last_table_has_a_row_a_switch_that_was_flipped_and_tells_only_what_intervals_tell(results):
    table = audit_summary.last_table(results).set_index("switch")
    assert list(table.index) == ["target", "depth", "pooling", "precision", "alpha", "evaluation", "rate", "reference",
                                 "all"]
    assert "static - Controller lower (all else `released`: depth 1, depth 4)" in table.loc["target", "finding"]
    assert "loss reduction" not in table.loc["target", "finding"]  # that of the Controller, which doesn't move
    assert table.loc["rate", "finding"] == "fewer than 3 seeds: not judged"
    assert table["what we don't know"].str.len().gt(0).all() and set(audit_summary.UNKNOWN) >= set(table.index)


def test_a_lead_that_shrinks_with_depth_is_told_apart_from_one_that_stays(tmp_path):
    def shrinking(arm, depth, protocol, seed):
        shrinks = arm == "static" and depth == 1 and protocol != "corrected"
        return loss(arm, depth, protocol, seed) + (1.0 if shrinks else 0)

    write(tmp_path, "smoke", shrinking, keep=lambda spec: plain(spec) or "+depth" in spec.protocol)
    table = audit.depth_table(load_results("smoke", tmp_path)).set_index(["protocol", "arm"])["depth 1 - depth 4"]
    lead = table.xs("static - Controller", level="arm")
    assert lead.to_dict() == pytest.approx({"released": 1, "released+depth": 1, "corrected": 0, "corrected+depth": 0})


def test_models_are_told_by_what_they_were_trained_on(results):
    table = audit.target_table(results).set_index(["arm", "protocol"])
    assert table.loc[("static", "released"), "trained on"] == "t+2"
    assert table.loc[("static", "released+target"), "trained on"] == "t+1"
    assert table.loc[("static", "corrected+target"), "scored on t+2"] == pytest.approx(5.01)
    assert [protocol for arm, protocol in table.index if arm == "cut"] == ["corrected"]


def test_two_readings_of_a_model_that_nothing_trained_have_no_interval(tmp_path):
    """They are the same in every seed, so an interval over seeds would have no width."""
    constant = {"full": 2.0, "cut": 6.0}
    write(tmp_path, "smoke", lambda arm, depth, protocol, seed: constant.get(arm) or loss(arm, depth, protocol, seed))
    results = load_results("smoke", tmp_path)
    for run in results.runs.values():  # the stream, which `released` reads, has other losses than held-out text
        for (split, metric), series in list(run.series.items()):
            if split == "stream" and run.manifest["arm"] == "cut":
                run.series[split, metric] = Series(series.updates, [np.array(series.values[-1]) + 1])
    rows = audit.switch_table(results).query("switch == 'all'").set_index(["quantity", "depth"])
    cut = rows.loc["cut"].iloc[0]
    assert cut["effect"] and np.isnan(cut["effect_low"]) and np.isnan(cut["effect_p"])
    assert rows.loc["controller"]["effect_low"].notna().all()


@pytest.mark.parametrize("column", ["released", "corrected"])
def test_alpha_is_told_at_the_other_ranks(results, column):
    rows = audit.switch_table(results).query("switch == 'alpha' and column == @column").set_index("quantity")
    assert {*rows["rank"]} == {*results.profile.ranks} and {*rows["depth"]} == {results.profile.depth}
    assert rows.loc["static - Controller", "effect"] == pytest.approx(0.125 if column == "corrected" else -0.125)
    assert rows.loc["gap recovery (%)", "effect_n"] == 1 and "none" not in rows.index


def test_what_many_effects_could_show_by_chance_is_told_apart(results, tmp_path):
    """Seeds that differ a little: the effect's own interval leaves 0 out, Holm's correction doesn't."""
    def wavering(arm, depth, protocol, seed):
        wavers = arm == "static" and protocol == "corrected+target"
        return loss(arm, depth, protocol, seed) + (0.2 * seed * (1 + depth / 10) if wavers else 0)

    write(tmp_path, "smoke", wavering, keep=lambda spec: plain(spec) or "+target" in spec.protocol)
    finding = audit_summary.last_table(load_results("smoke", tmp_path)).set_index("switch").loc["target", "finding"]
    assert "static - Controller lower (all else `released`: depth 1, depth 4)" in finding.split("By its own")[0]
    assert "By its own interval only: static - Controller higher (all else `corrected`: depth 1, depth 4)" in finding


def test_the_pool_and_the_depth_and_the_reach_are_told(results):
    leak = audit.leak_table(results)
    assert {(row.protocol, row.pooling) for row in leak.itertuples()} == {
        ("released", "sequence"), ("corrected", "causal"), ("released+pooling", "causal"),
        ("corrected+pooling", "sequence"), ("released+depth", "sequence"), ("corrected+depth", "causal")}
    other = leak["static - Controller reading another sequence"].notna()  # planned at depth 4, not with `depth` flipped
    assert (other == (leak["depth"].eq(4) & ~leak["protocol"].str.endswith("+depth"))).all()
    assert leak["second half replaced"].dropna().to_list() == pytest.approx([0.04] * 12)
    depth = audit.depth_table(results).set_index(["protocol", "arm"])
    assert depth.loc[("released", "controller"), "depth rule"] == "drawn"
    assert depth.loc[("corrected+depth", "static"), "depth 1 - depth 4"] == 0
    reach = audit.reach_table(results)
    assert list(reach["arm"].unique()) == ["controller", "static"] and set(reach["depth"]) == {1, 4}
    assert (reach["largest m"] == 1.5).all()


def test_the_headlines_are_the_part_of_the_table_at_the_last_places(results):
    whole = audit.switch_table(results)
    part = whole[whole["quantity"].isin(audit.HEADLINES)]
    last = part.drop_duplicates(["column", "switch", "quantity"], keep="last").reset_index(drop=True)
    assert 0 < len(last) < len(part)
    pd.testing.assert_frame_equal(audit.switch_table(results, True), last)
