"""What the reported numbers say of each other."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ouroboros import arithmetic, claims
from ouroboros.training import schedule


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**100),
                          max_value=2.0**100)))
def test_bfloat16_is_torchs(values):
    expected = torch.tensor(values, dtype=torch.float32).bfloat16().float().numpy()
    assert np.array_equal(arithmetic.bfloat16(np.array(values, dtype=np.float32)), expected)


def test_an_entry_moves_by_the_rate_until_bfloat16_has_no_nearer_neighbour():
    """By hand: from 0.125 on neighbours are 2^-10 apart, half of which is above 3e-4; near 1 they are 2^-7 apart."""
    assert 2**-11 > 3e-4 > 2**-12
    assert arithmetic.reach([3e-4] * 5000, half=True)[-1] == 0.125
    assert (arithmetic.reach([3e-4] * 5000, half=True, start=1.0) == 1.0).all()
    assert arithmetic.reach([3e-4] * 5000, half=False)[-1] == pytest.approx(1.5, rel=1e-3)


def test_the_released_rate_is_the_protocols():
    for update in (0, 100, 124, 9000, 18749):
        ours = arithmetic.PEAK * schedule(update, arithmetic.UPDATES, "stretched")
        assert arithmetic.released_rate(update) == pytest.approx(ours, rel=0.01), update


def test_the_checks_are_what_paper_and_pencil_give():
    table = arithmetic.table().set_index("quantity")
    assert table.loc["loss reduction, %", "computed"] == f"{389.3 / 8.975:.4g} to {390.2 / 8.975:.4g}"
    assert table.loc["gap recovery, %", "computed"] == f"{389.3 / 7.597:.4g} to {390.2 / 7.597:.4g}"
    computed = table.drop(["loss reduction, %", "gap recovery, %"])["computed"].str.replace(",", "").astype(float)
    assert computed["loss with the gate in the gate's comparison, nats per token"] == 5.485
    assert computed["trained parameters, million"] == pytest.approx(9.214592)
    assert computed["trained parameters with the unused vectors"] == pytest.approx(9_218_688, rel=1e-5)
    assert computed["perplexity of the full model"] == pytest.approx(math.exp(1.378), rel=1e-4)
    assert 98 < computed["learning rate at the last update, % of the peak"] < 100
    compared = table[table["agrees"] != ""]["agrees"]
    assert len(compared) == 10 and compared.all()


def test_a_reported_number_that_does_not_follow_is_told(monkeypatch):
    told = claims.reported(claims.load()) | {"adv1": 1.5, "rec": 52.0}
    monkeypatch.setattr(claims, "reported", lambda ledger: told)
    text = arithmetic.found()
    assert "8 of 10" in text and "depth 1" in text and "gap recovery, % (reported 52.0, computed 51.24 to" in text
