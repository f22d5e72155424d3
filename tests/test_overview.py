"""README's first screen follows the numbers, and says so where there are none."""

import re

import pytest
import synthetic
from synthetic import WHOLE, write

from ouroboros.analysis import overview, text
from ouroboros.analysis.results import load_results
from ouroboros.experiment.profile import load_profile

SMOKE = load_profile("smoke")
QUESTIONS = {question.arm + "/" + question.other: question.text for question in overview.QUESTIONS}


def results_of(root, loss=synthetic.loss, profile=WHOLE, **options):
    write(root, profile, loss=loss, **options)
    return load_results(profile, root)


def cells(*several) -> dict[str, list[str]]:
    """{question: its answers, a profile each}."""
    return {re.match(r"\[([^]]*)\]", row[0])[1]: list(row[1:])
            for row in overview.questions(*several).itertuples(index=False)}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return results_of(tmp_path_factory.mktemp("overview"))


def turned(arm, depth, protocol, seed):
    """Every difference of `synthetic.loss` turned round."""
    value = synthetic.loss(arm, depth, protocol, seed)
    return value if arm in ("cut", "full") else 12 - value


def test_answers_turn_with_the_numbers(results, tmp_path):
    before, after = cells(results), cells(results_of(tmp_path, turned))
    for pair, (yes, no) in {"controller/cut": ("Yes, by 2 nats", "No, worse, by 1.9"),
                            "controller/static": ("Yes, by 0.", "No, worse, by 0.")}.items():
        assert before[QUESTIONS[pair]][0].startswith(yes) and after[QUESTIONS[pair]][0].startswith(no), pair
    assert "50 % of the gap" in before[QUESTIONS["controller/cut"]][0]


@pytest.mark.parametrize("loop, lora, said", [
    (-1, -3, "Partly. The loop wins back 25 %"), (-3, -1, "Yes. The loop wins back 75 %"),
    (1, -2, "No. The loop ends above the model that was cut"), (-1, None, "nothing is decided"),
    (1, 2, "The table says what is known so far"),
])
def test_the_opening_follows_the_first_two_answers(tmp_path, loop, lora, said):
    def loss(arm, depth, protocol, seed):
        return {"cut": 6, "full": 2, "lora": 6 + (lora or 0)}.get(arm, 6 + loop) + 0.001 * seed
    found = results_of(tmp_path, loss, keep=lambda spec: spec.arm in ("cut", "full", "controller") or
                       spec.arm == "lora" and lora is not None)
    assert said in overview.opening(found)


def test_the_first_screen_says_what_counting_wins_back_and_what_more_tokens_do(results, tmp_path):
    assert "counting pairs" not in overview.opening(results) and not overview.on_more_tokens(results)  # not planned
    found = results_of(tmp_path, profile="smollm2", keep=lambda spec: spec.purpose == "matrix")
    assert overview.opening(found).endswith("; counting pairs of tokens in the text that a run sees -35 %; counting "
                                            "them in the whole training split -30 %.")
    assert "a table in the Controller's place 47 %; the gate alone 5 %; " in overview.opening(found)
    assert overview.foreign_share(found) == (
        "; on text of packages that no run saw, 50 and 62 % (counts of token pairs -35 %)")
    assert overview.adapted(found) == " (with LoRA it wins back 112 % (n = 1))" and overview.adapted(results) == ""
    assert overview.on_more_tokens(found) == ("With 4 times the tokens a single pass wins back 50 %, LoRA 62 % "
                                               "(n = 1). ")


def test_what_isnt_run_or_has_too_few_seeds_is_said_to_be_so(results, tmp_path):
    few = results_of(tmp_path, profile="smoke", keep=lambda spec: spec.arm in ("full", "cut") or
                     (spec.arm, spec.depth, spec.seed) == ("controller", SMOKE.depth, min(SMOKE.seeds)))
    answers = cells(few, results)
    assert answers[QUESTIONS["controller/cut"]][0].startswith("Too few seeds to judge: ")
    assert answers[QUESTIONS["controller/lora"]][0] == text.NOT_RUN
    page = overview.page(few, results)
    assert "(n = 1, too few to judge). Not run yet: the loop against LoRA on the cut model](" in page  # of the figure
    assert "`smoke`, depth 4" in page and "`whole`, depth 8" in page
    matrix, rates = ([run for run in few.profile.runs() if run.purpose == purpose] for purpose in ("matrix", "rate"))
    assert f"{len(few.runs)} of {len(matrix)} planned runs are there, and 0 of {len(rates)} searches of rates" in page


def test_what_the_plan_has_at_another_depth_alone_is_said_to_be_there(tmp_path):
    found = results_of(tmp_path, profile="smollm2", keep=lambda spec: spec.purpose == "matrix")
    answer = cells(found)[QUESTIONS["controller/controller_blind"]][0]
    assert answer.startswith("not planned at depth 8. At depth 1: too few seeds to judge: better by 0.3")
    norms = cells(found)[QUESTIONS["none/none_nonorm"]][0]
    assert norms.endswith("With norms begun at the stream's size, at rates searched for norms that begin at 1, its "
                          "loss is 0.10 nats lower (depth 1, n = 1)")


def test_the_paper_is_answered_first(results):
    page = overview.page(results)
    assert page.startswith("**Are the paper's numbers true?** Their arithmetic is right: 43.4 % and 51.3 % follow")
    assert "changes by +0.305 nats, the cut model's by -3.285 nats" in page and "recovery is -6.8 %" in page


def test_what_the_authors_code_learns_is_said_on_the_next_token_too(results, tmp_path):
    assert overview.why_released(results).endswith(
        "On the next token a Controller trained by it wins back 50 % of the gap (n = 3).")  # 4 between 6 and 2
    found = results_of(tmp_path, keep=lambda spec: spec.protocol in ("any", "corrected"))
    assert overview.why_released(found).endswith("so don't cite them.")


def test_a_diverged_run_is_not_said_to_be_missing(tmp_path):
    found = results_of(tmp_path, diverged={f"lora-corrected-s{seed}" for seed in range(5)},
                       keep=lambda spec: spec.arm in ("full", "cut", "controller", "lora") and "+" not in spec.protocol)
    assert cells(found)[QUESTIONS["controller/lora"]][0] == "no loss: a run diverged"


def test_another_depth_with_another_answer_is_named(tmp_path):
    """A first screen that shows one depth doesn't hide that the sign turns at another."""
    def loss(arm, depth, protocol, seed):
        return {"cut": 6, "full": 2, "controller": 4, "static": 5 if depth == 8 else 3}.get(arm, 5) + 0.001 * seed
    answer = cells(results_of(tmp_path, loss))[QUESTIONS["controller/static"]][0]
    assert answer.startswith("Yes, by 1 nats") and "At depth 1: no, worse, by 1 nats" in answer
