"""Two models' answers side by side: the same, opposite or open, and what explains an opposite one."""

import pytest
import synthetic
from synthetic import write

from ouroboros.analysis import scales
from ouroboros.analysis.overview import QUESTIONS
from ouroboros.analysis.results import load_results, results_at_hand
from ouroboros.experiment.plan import RunSpec

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
    assert (found["the same?"], found["tiny says it with"]) == ("yes", "")


@pytest.mark.parametrize("deep, longer, why", [
    (5.0, 3.0, "the cut"),
    (3.0, 5.0, "the budget (4 x the tokens)"),
    (5.0, 5.0, "the cut or the budget (4 x the tokens)"),
    (3.0, 3.0, "neither the cut nor the budget (4 x the tokens)"),
    (3.0, None, "not the cut"),
    (None, None, "too few seeds"),  # 16 times the tokens have one
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
    assert found["tiny, depth 8"] == "no, by 25 %" and (found["the same?"], found["tiny says it with"]) == ("no", why)


@pytest.mark.parametrize("words, said", [
    (["", scales.NOT_RUN], "not tested yet"), ([scales.NOT_RUN, scales.OPEN], "tested, open"),
    ([scales.FEW, scales.NOT_RUN], "too few seeds"), ([scales.OPEN, "no"], "not b"), ([scales.OPEN, "yes"], "b")])
def test_what_was_tested_is_not_said_to_be_untested(words, said):
    assert scales.why(scales.Answer("yes"), list(zip("ab", map(scales.Answer, words)))) == said


def test_less_than_the_margin_is_no_other_answer_than_equivalent(tmp_path):
    """Both are told apart at smollm2, by less than matters."""
    large = row(results_of(tmp_path, "smollm2", 4.005), results_of(tmp_path, "tiny", 4.0))
    assert large["smollm2, depth 8"] == large["tiny, depth 8"] == "equivalent" and large["the same?"] == "yes"


def test_a_run_that_diverged_at_another_depth_says_nothing_of_this_one(tmp_path):
    tiny = results_of(tmp_path, "tiny", 4.4)
    for path in tmp_path.glob("results/tiny/runs/static-d8-*.jsonl"):
        path.unlink()
    for spec in tiny.profile.runs():
        if spec.arm == "static" and spec.depth == 1 and spec.purpose == "matrix" and spec.protocol == "corrected":
            synthetic.write_run(tmp_path, tiny.profile, spec, 9.0, status="diverged")
    found = row(results_of(tmp_path, "smollm2", 5.0), load_results("tiny", tmp_path))
    assert found["tiny, depth 8"] == "not run yet"


def test_what_is_open_or_not_run_is_said_to_be_so(tmp_path):
    results_of(tmp_path, "tiny", 4.0)  # equal to the Controller
    for path in tmp_path.glob("results/tiny/runs/lora-corrected-s[12].jsonl"):
        path.unlink()
    found = scales.table(results_of(tmp_path, "smollm2", 5.0), load_results("tiny", tmp_path)).set_index("question")
    assert found.loc[QUESTION, "tiny, depth 8"] == "equivalent" and found.loc[QUESTION, "the same?"] == "no"
    lora = found[found.index.str.contains("LoRA")].iloc[0]
    assert lora["tiny, depth 8"] == "too few seeds" and lora["the same?"] == "open"
    assert "not run yet" in set(found["tiny, depth 8"])
    assert "Does the loop need its gate?" not in found.index  # smollm2 doesn't plan it
    assert "Does what the Controller reads matter, or does a constant do?" not in found.index  # nor this at depth 8


def test_counts_of_a_longer_run_are_of_a_longer_runs_text(tmp_path):
    """At four times the tokens the loop isn't set against pairs that were counted in a quarter of them."""
    tiny = results_of(tmp_path, "tiny", 4.4)
    question = next(question for question in QUESTIONS if question.other == "bigram_seen")
    longer = scales.scales(tiny, [])[1]
    assert longer.updates == 1600 and str(scales.answer(longer, question, 8)) == "not run yet"
    profile = tiny.profile
    for seed, updates, value in [(s, u, v) for s in range(3) for u, v in ((None, 5.0), (1600, 3.0))]:
        spec = RunSpec("bigram_seen", None, None, "corrected", seed, updates=updates)
        synthetic.write_run(tmp_path, profile, spec, value + 0.001 * seed)
    own, longer = scales.scales(load_results("tiny", tmp_path), [])[:2]
    assert [str(scales.answer(scale, question, 8)) for scale in (own, longer)] == ["yes, by 25 %", "no, by 25 %"]


def test_the_page_names_what_is_changed(tmp_path):
    deep, first = results_of(tmp_path, "tiny-deep", 5.0), results_of(tmp_path, "smollm2", 5.0)
    page = scales.markdown(first, results_of(tmp_path, "tiny", 3.0), [deep])
    assert "| tiny, cut deeper" in page and "columns on the right change `tiny` in one respect" in page
