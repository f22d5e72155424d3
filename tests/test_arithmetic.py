"""What the reported numbers say of each other."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ouroboros.analysis import reported, text
from ouroboros.analysis.ledger import read_claims


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**100),
                          max_value=2.0**100)))
def test_bfloat16_is_torchs(values):
    expected = torch.tensor(values, dtype=torch.float32).bfloat16().float().numpy()
    assert np.array_equal(reported.bfloat16(np.array(values, dtype=np.float32)), expected)


def test_an_entry_moves_by_the_rate_until_bfloat16_has_no_nearer_neighbour():
    """By hand: from 0.125 on neighbours are 2^-10 apart, half of which is above 3e-4; near 1 they
    are 2^-7 apart."""
    assert 2**-11 > 3e-4 > 2**-12
    assert reported.reach([3e-4] * 5000, half=True)[-1] == 0.125
    assert (reported.reach([3e-4] * 5000, half=True, start=1.0) == 1.0).all()
    assert reported.reach([3e-4] * 5000, half=False)[-1] == pytest.approx(1.5, rel=1e-3)


def test_the_checks_are_what_paper_and_pencil_give():
    """Each worked by hand from system.md 8, to the digits that are reported."""
    table = reported.table().set_index("quantity")
    assert table.index.is_unique and table.shape[1] + 1 <= 8
    by_hand = {
        "loss reduction, all configurations": "43.4 to 43.5 %",  # 3.893 / 8.975, 3.902 / 8.975
        "loss reduction, depth 8": "43.4 %",  # 3.895 / 8.975 = 0.43398
        "gap recovery, all configurations": "51.2 to 51.4 %",  # 3.893 / 7.597, 3.902 / 7.597
        "gap recovery, depth 8": "51.3 %",  # 3.895 / 7.597 = 0.51270
        # 5.082 gives 51.2 %, 5.075 and 5.073 give 43.5 %
        "configurations that give both percentages": "c2, c8, c16, cr8, cr64",
        "static - Controller, depth 1": "1.437 nats",
        "static - Controller, depth 1, abstract": "1.44 nats",
        "static - Controller, depth 4": "0.171 nats",
        "static - Controller, depth 8": "0.039 nats",
        "static - Controller, depth 16": "0.028 nats",
        "static - Controller, depth 8, rate 1e-3": "0.018 nats",
        "spread over the eight rows of D's table": "0.007 nats",  # 5.082 - 5.075
        "spread with the run at rate 1e-3": "0.009 nats",  # 5.082 - 5.073
        "spread between the ends of Lc": "0.009 nats",
        "loss with the gate": "5.93 nats",
        "loss without the gate": "9.62 nats",
        "the gate's baseline - L17": "+0.445 nats",
        "a uniform guess": "11.93 nats",
        "L17 below a uniform guess": "2.96 nats",
        "the gate's baseline below a uniform guess": "2.51 nats",
        "h17, passages, below a uniform guess": "6.24 nats",
        "full model, passages - abstract": "+0.305 nats",
        "cut model, passages - abstract": "-3.285 nats",
        "Controller, passages - abstract": "+0.881 nats",
        "full and cut model go the same way": "no",
        "gap recovery on the passages": "-6.8 %",  # (5.690 - 5.961) / (5.690 - 1.683)
        "Controller - cut on the passages": "+0.27 nats",
        "what dropout, mixed text or alpha 0.5 took off": "0.03 nats",
        "trainable parameters": "9.2 million",
        "of the Controller": "692,864",
        "of the gate": "8,390,656",
        "of the step norms": "131,072",
        "all of them": "9,214,592",
        "with the two unused vectors": "9,218,688",
        "of the static arm": "8,536,064",
        "the gate's share": "91 %",
        "share of the model with 17 layers": "0.6 %",
        "share of the model with 36 layers": "0.3 %"}
    assert table["recomputed"].to_dict() == by_hand


def test_what_agrees_is_said_and_what_a_row_cant_show():
    table = reported.table().set_index("quantity")
    agrees, limit = table["agrees"], table["what it can't show"]
    assert set(agrees[agrees == "no"].index) == {"spread over the eight rows of D's table"}
    assert (agrees == "yes").sum() == 15 and (agrees.eq("") == table["reported"].eq("")).all()
    assert not limit.eq("").any()
    assert limit[["spread over the eight rows of D's table",
                  "spread with the run at rate 1e-3"]].str.endswith(": open").all()
    assert "target" in limit["gap recovery, depth 8"] and "intact" in limit["loss with the gate"]


def test_what_the_settings_imply():
    table = reported.settings().set_index("quantity")
    updates = table.loc["updates", ["reported", "recomputed", "agrees"]].tolist()
    assert updates == ["18,750", "18,750", "yes"]
    assert table.loc["tokens seen", "recomputed"] == "1.23 billion"  # 1,228,800,000
    assert table.loc["learning rate at the last update", "recomputed"] == "99.1 % of the peak"
    assert table.loc["largest m of a static table, bfloat16", "recomputed"] == "0.125"
    # 18,750 x 3e-4 = 5.625, less what float32 rounds
    assert table.loc["largest m of a static table, float32", "recomputed"] == "5.624"
    assert table.loc["a step norm's weight, from 1, bfloat16", "recomputed"] == "1.000"


def with_reported(**changed):
    return [claim.model_copy(update={"reported": changed.get(claim.id, claim.reported)})
            for claim in read_claims()]


def test_a_reported_number_that_does_not_follow_is_told():
    said = " ".join(text.arithmetic(with_reported(adv1="1.5", rec="52.0")))
    assert "12 of 16 checks" in said  # not adv1, rec over the range and at depth 8, the spread
    assert "depth 1 (reported 1.5 nats, recomputed 1.4 nats)" in said
    assert "gap recovery, depth 8 (reported 52.0 %, recomputed 51.3 %)" in said


def test_the_sentence_on_the_two_texts_turns_with_the_numbers():
    assert "Opposite directions suggest" in " ".join(text.arithmetic())
    turned = " ".join(text.arithmetic(with_reported(h17="9.500")))
    assert "cut model's by +0.525 nats" in turned and "Both go the same way" in turned
    assert "Opposite" not in turned
