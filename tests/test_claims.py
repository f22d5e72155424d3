"""The ledger: what is reported, recomputed and measured, and verdicts that follow the numbers."""

import pytest
from synthetic import losses, write_profile

from ouroboros import claims, metrics


def ledger(tmp_path, **options):
    write_profile(tmp_path, **options)
    return claims.ledger(metrics.load("tiny", tmp_path)).set_index(["id", "protocol"])


def test_every_row_of_the_papers_table_is_there_with_its_value():
    reported = {c["id"]: c.get("reported") for c in claims.load()}
    expected = {"L36": 1.378, "L17": 8.975, "Lc": [5.073, 5.082], "red": 43.4, "rec": 51.3, "c1": 5.082, "c4": 5.075,
                "c8": 5.080, "s1": 6.519, "s4": 5.246, "s8": 5.119, "adv1": 1.437, "adv4": 0.171, "adv8": 0.039,
                "nogate": 0.20, "gate": -3.49, "params": 9.2, "range": 0.009}
    assert {name: reported[name] for name in expected} == expected
    assert {"ahead", "heldout"} <= set(reported)


def test_reported_values_that_follow_from_others_do():
    rows = claims.load()
    for claim in rows:
        again = claims.recomputed(claim, rows)
        if again is not None:
            assert again == pytest.approx(claim["reported"], rel=0.002), claim["id"]


def test_absolute_values_are_not_testable_at_this_scale(tmp_path):
    verdicts = ledger(tmp_path)["verdict"]
    for name in ("L36", "L17", "red", "rec", "adv1", "gate"):
        assert set(verdicts[name]) == {"not testable at this scale"}


def test_verdicts_hold_for_numbers_that_agree_and_fail_when_they_are_flipped(tmp_path):
    agree = ledger(tmp_path / "a")["verdict"]
    assert agree["ahead", "corrected"] == agree["most_at_1", "corrected"] == agree["gate_helps", "corrected"] == "holds"
    assert agree["flat", "released"] == "by construction" and agree["flat", "corrected"] == "holds"
    assert agree["static_improves", "corrected"] == "holds" and agree["heldout", "corrected"] == "fails"
    flip = {"static": "controller", "controller": "static"}
    flipped = ledger(tmp_path / "b", loss=lambda arm, *rest: losses(flip.get(arm, arm), *rest))["verdict"]
    assert flipped["ahead", "corrected"] == "fails"


def test_an_interval_across_zero_is_undecided_and_no_run_is_no_verdict(tmp_path):
    noisy = ledger(tmp_path / "a", loss=lambda arm, depth, protocol, seed: losses(arm, depth, protocol, seed)
                   + (3 * (seed - 1) if arm == "static" else 0))["verdict"]
    assert noisy["ahead", "corrected"] == "undecided"
    gone = ledger(tmp_path / "b", skip=lambda s: s.arm == "static")["verdict"]
    assert gone["ahead", "corrected"] == gone["adv1", "corrected"] == "no runs"
    one = ledger(tmp_path / "c", skip=lambda s: s.seed > 0)
    assert one.loc[("ahead", "corrected"), "verdict"] == "undecided"
    assert "one seed" in one.loc[("ahead", "corrected"), "why"]


def test_sentences_follow_the_numbers(tmp_path):
    write_profile(tmp_path / "a")
    write_profile(tmp_path / "b", loss=lambda arm, *rest: 10 - losses(arm, *rest))
    one, other = (metrics.load("tiny", tmp_path / name) for name in "ab")
    assert "the Controller is ahead" in claims.found_advantage(one, "corrected")
    assert "static is ahead" in claims.found_advantage(other, "corrected")
    assert "is better than the cut model" in claims.found_gap(one, "corrected")
    assert "is worse than the cut model" in claims.found_gap(other, "corrected")
    assert claims.found_gate(one, "corrected") != claims.found_gate(other, "corrected")
    assert claims.headline(one) != claims.headline(other)
