"""Two models' answers side by side: the same, opposite or open, and what explains an opposite one."""

import pytest
import synthetic
from synthetic import write

from ouroboros.analysis import scales
from ouroboros.analysis.results import load_results, results_at_hand

ARMS = ("full", "cut", "controller", "static", "lora", "none_nonorm")
QUESTION = "Is the Controller better than a learned table?"


def results_of(root, profile, static, at=None):
    """Few arms of a profile, whose table ends at `static`, or with a budget `at` at its own loss."""
    declared = write(root, profile, keep=lambda spec: False, base=False)
    for spec in declared.runs():
        if spec.purpose == "matrix" and spec.arm in ARMS and spec.depth in (8, None) and spec.protocol in (
                "corrected", "any"):
            value = {"full": 2.0, "cut": 6.0, "controller": 4.0, "static": static, "lora": 3.0}.get(spec.arm, 5.0)
            if spec.arm == "static" and spec.updates in (at or {}):
                value = at[spec.updates]
            synthetic.write_run(root, declared, spec, value + 0.001 * spec.seed)
    return load_results(profile, root)


def row(*found) -> dict:
    return scales.table(*found).set_index("question").loc[QUESTION].to_dict()


def test_the_same_answer_needs_no_reason(tmp_path):
    found = row(results_of(tmp_path, "smollm2", 5.0), results_of(tmp_path, "tiny", 4.4))
    assert found["smollm2, depth 8"] == "yes, by 25 %" and found["tiny, depth 8"] == "yes, by 10 %"
    assert (found["the same?"], found["why not"]) == ("yes", "")


@pytest.mark.parametrize("deep, longer, why", [
    (5.0, 3.0, "the cut"),
    (3.0, 5.0, "the budget (4 x the tokens)"),
    (5.0, 5.0, "the cut or the budget (4 x the tokens)"),
    (3.0, 3.0, "neither the cut nor the budget (4 x the tokens)"),
    (3.0, None, "not the cut"),
    (None, None, "not tested yet"),
])
def test_an_opposite_answer_is_explained_by_what_makes_it_the_same(tmp_path, deep, longer, why):
    tiny = results_of(tmp_path, "tiny", 3.0, {1600: longer} if longer else None)
    if longer is None:
        for path in tmp_path.glob("results/tiny/runs/static-*-u1600.jsonl"):
            path.unlink()
        tiny = load_results("tiny", tmp_path)
    if deep is not None:
        results_of(tmp_path, "tiny-deep", deep)
    found = row(results_of(tmp_path, "smollm2", 5.0), tiny, [results_at_hand("tiny-deep", tmp_path)])
    assert found["tiny, depth 8"] == "no, by 25 %" and (found["the same?"], found["why not"]) == ("no", why)


def test_what_is_open_or_not_run_is_said_to_be_so(tmp_path):
    tiny = results_of(tmp_path, "tiny", 4.0)  # equal to the Controller
    for path in tmp_path.glob("results/tiny/runs/lora-corrected-s[12].jsonl"):
        path.unlink()
    found = scales.table(results_of(tmp_path, "smollm2", 5.0), load_results("tiny", tmp_path)).set_index("question")
    assert found.loc[QUESTION, "tiny, depth 8"] == "equivalent" and found.loc[QUESTION, "the same?"] == "no"
    lora = found[found.index.str.contains("LoRA")].iloc[0]
    assert lora["tiny, depth 8"] == "too few seeds" and lora["the same?"] == "open"
    assert tiny.profile.name == "tiny" and "not run yet" in set(found["tiny, depth 8"])
    assert "Does the loop need its gate?" not in found.index  # smollm2 doesn't plan it
