"""The claims as typed: every row of the reported numbers, strict fields, what follows from numbers."""

import re
from pathlib import Path

import pytest
import yaml
from synthetic import WHOLE, write

from ouroboros.analysis import claims, ledger, pages
from ouroboros.analysis.comparisons import Comparisons
from ouroboros.analysis.ledger import read_claims
from ouroboros.analysis.results import load_results
from ouroboros.errors import InputError
from ouroboros.experiment.arms import ARMS
from ouroboros.experiment.cost import Cost
from ouroboros.experiment.profile import load_profile

ROOT = Path(__file__).parents[1]
CLAIMS = read_claims()
LEDGER = {claim.id: claim for claim in CLAIMS}
# the reported numbers, typed again by hand: (value, source)
REPORTED = {
    "L36": ("1.378", "R"), "L17": ("8.975", "R"), "Lc": (["5.073", "5.082"], "R"),
    "red": ("43.4", "AR"), "rec": ("51.3", "AR"),
    "c1": ("5.082", "R"), "c2": ("5.081", "D"), "c4": ("5.075", "R"), "c8": ("5.080", "R"),
    "c16": ("5.078", "D"), "cr8": ("5.078", "D"), "cr64": ("5.079", "D"),
    "clr": ("5.073", "D"), "slr": ("5.091", "D"),
    "s1": ("6.519", "R"), "s4": ("5.246", "R"), "s8": ("5.119", "R"), "s16": ("5.106", "D"),
    "adv1": ("1.437", "AR"), "adv4": ("0.171", "R"), "adv8": ("0.039", "R"),
    "adv16": ("0.028", "D"), "ahead": (None, "A"), "nogate": ("+0.20", "RDC"),
    "gate": ("-3.49", "RD"), "params": ("9.2", "AR"), "heldout": (None, "AR"),
    "h36": ("1.683", "D"), "h17": ("5.690", "D"), "hc": ("5.961", "D"), "hmit": ("+0.24", "D"),
    "range": ("0.009", "R")}
ALSO = {"adv1": ["1.44"], "gate": ["9.42", "5.93"], "params": ["0.6"], "hc": ["3", "12"],
        "hmit": ["+0.27"]}
WORDS = {"ahead": "all", "ahead_ranks": "all", "nogate": "worse", "heldout": "no improvement"}


# ---------------------------------------------------------------------------------------- section 8

def test_every_row_is_there_digit_for_digit():
    assert {name: (LEDGER[name].reported, "".join(LEDGER[name].source))
            for name in REPORTED} == REPORTED
    assert {name: list(LEDGER[name].also.values()) for name in REPORTED if LEDGER[name].also} == ALSO
    assert {name: LEDGER[name].words for name in WORDS} == WORDS


def test_numbers_are_the_typed_digits():
    assert LEDGER["h17"].numbers == [5.69] and LEDGER["h17"].decimals == 3
    assert LEDGER["h17"].reported_text == "5.690 nats per token"
    assert LEDGER["Lc"].numbers == [5.073, 5.082]
    assert LEDGER["Lc"].reported_text == "5.073 to 5.082 nats per token"
    assert LEDGER["gate"].reported_text == "-3.49 nats per token (before: 9.42, after: 5.93)"
    assert LEDGER["heldout"].reported_text == "no improvement" and LEDGER["flat"].reported_text == "as stated"
    values = ledger.numbers(CLAIMS)
    assert str(values["nogate"]) == "0.20" and str(values["Lc.low"]) == "5.073" and "ahead" not in values
    assert str(values["gate.before"]) == "9.42"


def test_what_d_alone_has_is_secondary():
    secondary = {"c2", "c16", "cr8", "cr64", "clr", "slr", "s16", "adv16", "h36", "h17", "hc",
                 "hmit"}
    assert {name for name, claim in LEDGER.items() if claim.secondary} == secondary
    assert LEDGER["c2"].sources == "D (secondary)" and LEDGER["gate"].sources == "R D"


def test_what_no_reported_number_stands_behind_says_so():
    """Static at ranks 8 and 64 has no value in any source; the gate's are of another system."""
    assert {name for name, claim in LEDGER.items() if claim.unsupported} == {"ahead_ranks",
                                                                             "gate_cut",
                                                                             "nogate_cut"}
    assert "ranks 8 and 64" in LEDGER["ahead_ranks"].unsupported
    assert {name for name, claim in LEDGER.items() if claim.open} == {"L36", "rec", "range"}


def test_the_gates_numbers_are_judged_on_their_own_system():
    for name, arm in (("gate", "refine"), ("gate_better", "refine"), ("nogate", "refine_nogate"),
                      ("nogate_worse", "refine_nogate")):
        assert LEDGER[name].measure.arms == (arm, "refine_base")
    assert LEDGER["gate_cut"].measure.arms == ("controller", "cut")
    assert LEDGER["nogate_cut"].measure.arms == ("controller_nogate", "cut")
    for name in ("gate_cut", "nogate_cut", "gate_essential", "gate_helps"):
        assert "cut model" in LEDGER[name].what


def test_every_measure_can_be_asked_of_the_runs(tmp_path):
    write(tmp_path)
    results = load_results(WHOLE, tmp_path)
    found = Comparisons(results, "corrected")
    for claim in CLAIMS:
        measure = claim.measure
        if measure is None:
            assert claim.rule == "count" or claim.unmeasured, claim.id
            continue
        asked = claims.measured(measure, found)
        assert any(asked.values()) or claims.judge(claim, results, "corrected").verdict == "not planned", claim.id
        assert all(arm in ARMS or arm.startswith("refine") for arm in measure.arms), claim.id


@pytest.mark.parametrize("name, value, digits", [("red", 43.4, 0.05), ("rec", 51.3, 0.05), ("adv1",
                                                                                            1.437,
                                                                                            5e-4),
                                                 ("adv4", 0.171, 5e-4), ("adv8", 0.039, 5e-4),
                                                 ("adv16", 0.028, 5e-4), ("range", 0.009, 5e-4),
                                                 ])
def test_the_reported_arithmetic_holds(name, value, digits):
    assert ledger.recomputed(LEDGER[name], CLAIMS) == pytest.approx(value, abs=digits)


def test_the_reported_parameters_are_those_of_the_paper_profile():
    counted = sum(Cost.of(load_profile("paper"), "controller").trainable().values())
    assert ledger.recomputed(LEDGER["params"], CLAIMS) * 1e6 == pytest.approx(counted, abs=0.5)


# ------------------------------------------------------------------------------------------- strict

GOOD = {"id": "x", "what": "a loss", "reported": "5.690", "unit": "nats per token", "source": ["R"],
        "rule": "value", "measure": {"arm": "full"}}


def read(folder, *entries):
    file = folder / "claims.yaml"
    file.write_text(yaml.safe_dump(list(entries)))
    read_claims.cache_clear()  # a ledger is read once a process
    return read_claims(file)


def test_a_good_claim_is_read(tmp_path):
    assert read(tmp_path, GOOD)[0].reported == "5.690"
    least = {"what": "x", "measure": {"arm": "full", "depth": 1, "rank": 1}}
    assert read(tmp_path, GOOD | least)[0].what == "x"


@pytest.mark.parametrize("change, field, value", [({"reported": 5.69}, "reported", "5.69"),
                                                  ({"reported": "5,690"}, "reported", "'5,690'"),
                                                  ({"reported": ["5.1", "5.2", "5.3"]}, "reported",
                                                   "['5.1', '5.2', '5.3']"), ({"reported": [5.1,
                                                                                            "5.2"]},
                                                                              "reported",
                                                                              "[5.1, '5.2']"),
                                                  ({"reported": None}, "reported", "None"),
                                                  ({"also": {"after": 5.93}}, "also.after", "5.93"),
                                                  ({"unit": None}, "unit", "None"),
                                                  ({"unit": "nats"}, "unit", "'nats'"),
                                                  ({"source": "R"}, "source", "'R'"),
                                                  ({"source": ["X"]}, "source.0", "'X'"),
                                                  ({"source": []}, "source", "[]"),
                                                  ({"source": ["D"]}, "secondary", "False"),
                                                  ({"secondary": True}, "secondary", "True"),
                                                  ({"secondary": "yes"}, "secondary", "'yes'"),
                                                  ({"rule": "bigger"}, "rule", "'bigger'"),
                                                  ({"what": ""}, "what", "''"),
                                                  ({"verdict": "holds"}, "verdict", "'holds'"),
                                                  ({"measure": {"arm": "full", "statistic": "losses"}},
                                                   "measure.statistic", "'losses'"),
                                                  ({"measure": {"arm": "full", "depth": "4"}},
                                                   "measure.depth", "'4'"),
                                                  ({"measure": {"arm": "full", "depth": 0}},
                                                   "measure.depth", "0"),
                                                  ({"measure": {"depth": 4}}, "measure.arm",
                                                   "Field required"),
                                                  ({"measure": {"arm": "full", "by": "depth",
                                                                "depth": 4}},
                                                   "measure.by", "'depth'"),
                                                  ({"measure": {"statistic": "spread", "arm": "full",
                                                                "minus": "cut"}},
                                                   "measure.minus", "'cut'"),
                                                  ({"measure": {"statistic": "fall from depth 1",
                                                                "arm": "static", "depth": 4}},
                                                   "measure.depth", "4"), ({"measure": None},
                                                                                  "measure",
                                                                                  "None"),
                                                  ({"unmeasured": "not yet"}, "measure", "'loss'"),
                                                  ({"recompute": {"function": "ratio", "of": []}},
                                                   "recompute.function", "'ratio'"),
                                                  ({"recompute": {"function": "difference",
                                                                  "of": ["x", "y"]}},
                                                   "recompute.of", "'y'"),
                                                  ({"notes": {"paper": "no"}}, "notes.paper.[key]",
                                                   "'paper'"), ])
def test_a_bad_field_is_one_line_that_names_file_claim_field_and_value(tmp_path, change, field,
                                                                       value):
    with pytest.raises(InputError) as error:
        read(tmp_path, GOOD | change)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"claims.yaml: claim 'x': {field}: {value}")
    assert len(message) > len(f"claims.yaml: claim 'x': {field}: {value}") or value == "Field required"


def test_a_bad_file_is_one_line(tmp_path):
    for text, words in (("- {id: x", "claims.yaml: can't be read as YAML"), ("id: x", "claims.yaml: dict: "),
                        ("- 1", "claims.yaml: claim number 1: the whole: 1: "),
                        ("- {what: a}", "claims.yaml: claim number 1: id: Field required")):
        file = tmp_path / "claims.yaml"
        file.write_text(text)
        with pytest.raises(InputError, match=re.escape(words)) as error:
            read_claims(file)
        assert "\n" not in str(error.value)


def test_two_claims_of_one_id_are_refused(tmp_path):
    with pytest.raises(InputError, match="claims.yaml: claim 'x': id: 'x': another claim has it"):
        read(tmp_path, GOOD, GOOD)


# -------------------------------------------------------------------------------------------- sheet

def test_the_committed_sheet_is_the_ledgers():
    committed = (ROOT / "docs/claims.md").read_text(encoding="utf-8")
    assert committed == pages.sheet_markdown(), "write pages.sheet_markdown() to docs/claims.md"


def test_the_sheet_says_what_will_judge_each_claim():
    sheet = pages.sheet().set_index("id")
    assert list(sheet.index) == list(LEDGER) and sheet.shape[1] + 1 <= 8
    assert not sheet[["claim", "source", "reported", "judged by", "rule",
                      "margin"]].eq("").any(axis=None)
    judged = sheet["judged by"]
    assert judged["c4"] == "`controller`; depth 4" and judged["L36"] == "`full`"
    assert judged["adv8"] == "`static`, `controller`; depth 8"
    assert judged["red"] == "`controller`, `cut`; base depth"
    assert judged["cr64"] == "`controller`; rank 64 (base rank 32)"
    assert judged["gate"] == "`refine`, `refine_base`; depth 4"
    assert judged["clr"].startswith("nothing yet: ")
    assert judged["params"] == "the model, not trained"
    assert sheet.loc["h17", "reported"] == "5.690 nats per token"
    assert sheet.loc["params", "margin"] == "none" and "0.01 nats" in sheet.loc["c4", "margin"]
