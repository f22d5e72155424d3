"""The ledger: what is reported, what follows from it, and verdicts and sentences that follow the numbers."""

import json
import re

import pytest
import synthetic
from synthetic import WHOLE, write

from ouroboros.analysis import claims, pages, statistics, text
from ouroboros.analysis.claims import judge
from ouroboros.analysis.comparisons import INTERVENTIONS, Comparisons
from ouroboros.analysis.ledger import Measure, read_claims
from ouroboros.analysis.results import Results, load_results
from ouroboros.cli import main
from ouroboros.experiment.plan import RunSpec
from ouroboros.experiment.profile import load_profile

LEDGER = {claim.id: claim for claim in read_claims()}
TINY = load_profile(WHOLE)
SEEDS, RANKS = len(TINY.seeds), TINY.ranks
FEW = 3  # seeds of what isn't in the core
TRENDS = [name for name, claim in LEDGER.items() if claim.rule not in ("value", "count")]
# the seeds of `synthetic.loss` agree closely, so every trend that it has can be told
AS_REPORTED = {"helps": "holds", "ahead": "holds", "ahead_ranks": "holds" if RANKS else "not planned",
               "most_at_1": "holds", "flat": "holds",
               "static_improves": "holds", "gate_essential": "holds", "gate_essential_nonorm": "holds",
               "gate_helps": "holds", "nogate_worse": "not planned", "gate_better": "not planned",
               "heldout": "fails"}


def results_of(root, loss=synthetic.loss, **options):
    write(root, loss=loss, **options)
    return load_results(WHOLE, root)


def mirrored(arm, depth, protocol, seed):
    """Every trend of `synthetic.loss` turned round: 12 minus the loss, the cut model in its place."""
    value = synthetic.loss(arm, depth, protocol, seed)
    return value if arm in ("cut", "full") else 12 - value


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return results_of(tmp_path_factory.mktemp("claims"))


@pytest.fixture(scope="module")
def flipped(tmp_path_factory):
    return results_of(tmp_path_factory.mktemp("flipped"), mirrored)


def verdicts(results, protocol):
    return {name: judge(LEDGER[name], results, protocol).verdict for name in TRENDS}


# --------------------------------------------------------------------------------------------------------- verdicts

def test_trends_hold_where_the_numbers_are_as_reported(results):
    assert verdicts(results, "corrected") == AS_REPORTED


def test_trends_fail_where_the_numbers_are_turned_round(flipped):
    turned = verdicts(flipped, "corrected")
    assert {name for name, verdict in turned.items() if verdict == "fails"} == {
        "ahead", "most_at_1", "static_improves", "gate_essential", "gate_essential_nonorm", "gate_helps",
        "helps"} | ({"ahead_ranks"} if RANKS else set())
    assert turned["heldout"] == "holds"  # 12 - 4 is no better than the cut model's 6


def by_construction(results, protocol):
    return {name for name, claim in LEDGER.items()
            if judge(claim, results, protocol).verdict == "by construction"}


def test_what_a_protocol_makes_so_is_said_to_be_so(results):
    """`released` draws the Controller's depth, static's is given."""
    assert by_construction(results, "released") == {"c1", "c4", "c8", "c16", "flat", "range"}
    assert "draws the depth" in judge(LEDGER["c4"], results, "released").why
    flat = judge(LEDGER["flat"], results, "corrected")
    assert flat.verdict == "holds" and "5 % of the loss reduction" in flat.why


def test_by_construction_follows_the_protocol_not_the_claim(results):
    assert not by_construction(results, "corrected") | by_construction(results, "released+depth")
    measure = Measure(statistic="rise from depth 1", arm="static")
    static = LEDGER["flat"].model_copy(update={"measure": measure})
    assert judge(static, results, "released").verdict != "by construction"


def test_a_verdict_has_a_side_or_is_open():
    assert [claims.Verdict(said).side for said in ("holds", "holds within the margin", "fails within the margin",
                                                   "fails", "equivalent", "undecided")] == [1, 1, -1, -1, 0, 0]


def test_parts_that_are_one_run_are_one_measurement(results):
    for name in ("helps", "heldout", "gate_helps", "gate_essential"):
        assert list(judge(LEDGER[name], results, "released").parts) == ["all depths"], name
        assert "depth 4" in judge(LEDGER[name], results, "corrected").parts, name
    assert len(judge(LEDGER["ahead"], results, "released").parts) > 1  # static's depths are its own


@pytest.mark.parametrize("changes, said", [
    ([0.4, 0.2, 0.3], "falls from 0.4 to 0.2 at step 2 and rises to 0.3"), ([0.4, 0.3, 0.2], "falls from 0.4 to 0.2"),
    ([0.4, 0.2, 0.19], "falls from 0.4 to 0.19"), ([0.4, 0.2, 0.21], "falls from 0.4 to 0.21"),
    ([0.1, 0.2, 0.3], "rises from 0.1 to 0.3"), ([0.3, 0.1, 0.3], "at step 2 and rises to 0.3"),
])
def test_steps_that_change_less_and_then_more_are_said_to(changes, said):
    found = [statistics.t_interval([change, change + 1e-6, change - 1e-6]) for change in changes]
    assert text.shown_steps(len(changes), found).endswith(said)


def test_losses_of_two_targets_are_no_cost(results):
    assert "of two targets, so not what cutting costs" in text.gap(results, "released")
    assert "cutting costs" in text.gap(results, "corrected")


def test_what_nothing_measures_is_not_planned(results):
    for name in ("c2", "clr", "slr", "h36", "h17", "hc", "hmit", "gate", "nogate"):
        for protocol in ("released", "corrected"):
            assert judge(LEDGER[name], results, protocol).verdict == "not planned", name
    assert "none is 1e-3" in judge(LEDGER["clr"], results, "corrected").why


def test_a_claim_over_depths_is_judged_at_those_that_its_protocol_has(tmp_path):
    """SmolLM2's plan has depth 1 alone under `released`: no claim on a change over depths can be judged there."""
    write(tmp_path, "smollm2", keep=lambda spec: spec.purpose == "matrix")
    found = load_results("smollm2", tmp_path)
    verdicts = {name: judge(LEDGER[name], found, "released") for name in TRENDS}
    judged = ("helps", "ahead", "heldout")
    assert [verdicts[name].verdict for name in judged] == ["holds", "holds", "fails"]
    assert [tuple(verdicts[name].parts) for name in judged] == [("all depths",), ("depth 1",), ("all depths",)]
    assert {verdicts[name].verdict for name in ("most_at_1", "flat", "static_improves")} == {"not planned"}
    planned = {name for name, claim in LEDGER.items() if claim.rule == "value"
               and judge(claim, found, "released").verdict != "not planned"}
    assert planned == {"L36", "L17", "c1", "s1", "adv1", "range"}
    assert judge(LEDGER["ahead"], found, "corrected").parts.keys() == {"depth 1", "depth 8"}


def test_against_a_baseline_is_paired_by_seed(results):
    """LoRA is at 3.5 and a cut model at 6, and a hundredth more at each seed."""
    claim = LEDGER["gate_better"]
    measure = claim.measure.model_copy(update={"arm": "lora", "minus": "cut"})
    judged = judge(claim.model_copy(update={"measure": measure}), results, "corrected")
    assert judged.verdict == "holds" and judged.parts[""].n == FEW
    assert judged.parts[""].mean == pytest.approx(-2.5)
    turned = measure.model_copy(update={"arm": "cut", "minus": "lora"})
    turned = claim.model_copy(update={"measure": turned})
    assert judge(turned, results, "corrected").verdict == "fails"


def test_a_rank_of_the_paper_is_a_share_of_the_base_rank(results):
    """Base rank 8 stands for 32, so 2 and 16 for the paper's 8 and 64; 1 has no whole one."""
    found = Comparisons(results, "corrected")
    for rank, own in ((8, 2), (64, 16), (32, 8)):
        measured = claims.measured(Measure(arm="controller", rank=rank), found)
        assert measured == {"": found.loss("controller", rank=own)} and measured[""], rank
    assert claims.measured(Measure(arm="controller", rank=1), found) == {"": {}}


def test_absolute_values_are_judged_at_the_papers_scale_only(results):
    for name in ("L36", "red", "rec", "adv1", "range", "gate_cut", "nogate_cut"):
        judged = judge(LEDGER[name], results, "corrected")
        seeds = FEW if name in ("range", "nogate_cut") else SEEDS
        assert judged.verdict == "not testable at this scale" and judged.parts[""].n == seeds
    paper = Results(results.profile.model_copy(update={"name": "paper"}), results.runs)
    assert judge(LEDGER["L36"], paper, "corrected").verdict == "fails"  # 2 and a little, not 1.378
    mean = 2 + 0.01 * sum(TINY.seeds) / SEEDS
    for typed in (f"{mean}", [f"{mean - 0.005}", "9.0"], ["1.0", f"{mean + 0.005}"]):
        claim = LEDGER["L36"].model_copy(update={"reported": typed})
        assert judge(claim, paper, "corrected").verdict == "holds"


def test_seeds_that_disagree_leave_it_open(tmp_path):
    def loss(arm, depth, protocol, seed):
        return 6.0 if arm == "cut" else 5.0 + (seed - 1) * (1 if arm == "static" else -1)

    judged = judge(LEDGER["ahead"], results_of(tmp_path, loss), "corrected")
    assert judged.verdict == "undecided" and "leaves it open at: depth 1, depth 4" in judged.why


def test_one_part_among_several_fails_a_claim_only_after_holm(tmp_path):
    """At depth 1 static is ahead at p = 0.03, elsewhere nothing is told: one of four is no contradiction yet."""
    wobble = {0: -0.15, 1: -0.05, 2: 0.2, 3: 0.1, 4: -0.1}

    def loss(arm, depth, protocol, seed):
        lead = 0.05 if depth != 1 else -0.21
        return {"full": 2.0, "cut": 6.0}.get(arm, 4.0 + (lead + wobble[seed] if arm == "static" else 0))

    results = results_of(tmp_path, loss)
    first = statistics.t_interval(
        Comparisons(results, "corrected").difference("static", "controller", depth=1).values())
    assert first.high < 0 and 0.0125 < first.p < 0.05, first
    judged = judge(LEDGER["ahead"], results, "corrected")
    assert judged.verdict == "undecided" and "at: depth 1, depth 4" in judged.why
    assert "; before Holm's correction it is contradicted at: depth 1" in judged.why
    assert "at: depth 1, depth 4" not in judged.why.partition("before Holm")[2]
    alone = Measure(arm="static", minus="controller", depth=1)
    alone = LEDGER["ahead"].model_copy(update={"measure": alone})
    assert judge(alone, results, "corrected").verdict == "fails"


def test_one_seed_is_no_verdict_and_none_is_no_run(tmp_path):
    results = results_of(tmp_path, keep=lambda spec: spec.seed == 0 and "nogate" not in spec.arm)
    assert judge(LEDGER["ahead"], results, "corrected").why == "fewer than 3 seeds finished"
    assert judge(LEDGER["gate_essential"], results, "corrected").verdict == "no runs"


def test_a_claim_whose_part_was_not_run_has_no_verdict(tmp_path):
    results = results_of(tmp_path, keep=lambda spec: spec.depth != 16)
    judged = judge(LEDGER["ahead"], results, "corrected")
    assert judged.verdict == "no runs" and judged.parts["depth 4"].n == SEEDS
    assert judged.why == "no run of this profile measures all of its parts"
    none = results_of(tmp_path / "none", keep=lambda spec: spec.arm == "cut")
    assert judge(LEDGER["L36"], none, "corrected").why == "no run of this profile measures it"


def test_what_is_measured_says_of_what_and_where_only_where_there_are_several(results):
    def row(name):
        return next(row for row in claims.records(LEDGER[name], results) if row["protocol"] == "corrected")

    assert row("static_improves")["measured"].startswith("fall from depth to depth, depth 1 to 4: ")
    assert row("helps")["measured"].startswith("depth 1: ")
    one = LEDGER["helps"].model_copy(update={"measure": Measure(arm="lora", minus="cut")})
    assert "every interval does" in judge(LEDGER["helps"], results, "corrected").why
    assert "the interval lies there" in judge(one, results, "corrected").why
    turned = judge(one.model_copy(update={"rule": "positive"}), results, "corrected")
    assert turned.verdict == "fails" and " at: " not in turned.why


def test_diverged_runs_are_named_never_averaged(tmp_path):
    lost = [f"controller_nogate-d4-r8-corrected-s{seed}" for seed in range(3)]
    some, all_ = (results_of(tmp_path / name, diverged=diverged)
                  for name, diverged in (("some", lost[:1]), ("all", lost)))
    judged = judge(LEDGER["gate_essential"], some, "corrected")
    assert judged.parts["depth 4"].n == 2 and f"diverged, so in no mean: `{lost[0]}`" in judged.why
    judged = judge(LEDGER["gate_essential"], all_, "corrected")
    assert judged.verdict == "undecided" and all(name in judged.why for name in lost)
    assert re.search(r"recurrence is worse than the cut model +\| \w+ +\| \w+ \(a run diverged\)", pages.summary(some))
    assert lost[2] in text.gate(all_, "corrected")
    assert "diverged" not in text.gate(all_, "released")


def test_a_diverged_run_can_only_confirm_a_verdict(tmp_path):
    """As an endless loss, a static run says 'Controller ahead', as the claim does; it can't say 'static ahead'."""
    lost = ["static-d4-r8-corrected-s0"]
    ahead = results_of(tmp_path / "ahead", diverged=lost)
    assert judge(LEDGER["ahead"], ahead, "corrected").verdict == "holds"

    def behind(arm, depth, protocol, seed):
        return {"full": 2.0, "cut": 6.0, "static": 4.0}.get(arm, 5.0) + 0.01 * seed * (arm == "static")

    judged = judge(LEDGER["ahead"], results_of(tmp_path / "behind", behind, diverged=lost), "corrected")
    assert judged.verdict == "undecided" and "a diverged run, which has no loss, says otherwise" in judged.why
    assert judge(LEDGER["ahead"], results_of(tmp_path / "none", behind), "corrected").verdict == "fails"


def test_two_seeds_decide_nothing(tmp_path):
    results = results_of(tmp_path, keep=lambda spec: spec.seed < 2)
    judged = judge(LEDGER["ahead"], results, "corrected")
    assert judged.verdict == "undecided" and judged.why == "fewer than 3 seeds finished"


def test_small_is_a_share_of_what_is_gained_and_nothing_is_no_gain(tmp_path):
    def worse(arm, depth, protocol, seed):
        return {"full": 2.0, "cut": 6.0}.get(arm, 7.0) + 0.01 * seed

    assert judge(LEDGER["flat"], results_of(tmp_path, worse), "corrected").verdict == "not applicable"


def test_a_reported_value_is_meant_to_its_last_digit(results):
    paper = Results(results.profile.model_copy(update={"name": "paper"}), results.runs)
    mean = 2 + 0.01 * sum(TINY.seeds) / SEEDS  # 2.02, the same in no two seeds
    steady = paper.cells.assign(loss=paper.cells["loss"].where(paper.cells["arm"] != "full", mean + 0.004))
    paper = Results(paper.profile, paper.runs)
    vars(paper)["cells"] = steady
    for typed, verdict in (("2.02", "holds"), ("2.020", "fails"), ("2.0201", "fails")):
        claim = LEDGER["L36"].model_copy(update={"reported": typed})
        assert judge(claim, paper, "corrected").verdict == verdict, typed


# ------------------------------------------------------------------------------------------------------------ ledger

def test_a_claim_without_runs_names_none_and_each_says_what_is_measured(results, tmp_path):
    write(tmp_path, "smollm2", keep=lambda spec: spec.arm == "cut", base=False)
    rows = claims.with_runs(load_results("smollm2", tmp_path)).set_index(["id", "protocol"])
    assert rows.loc[("ahead_ranks", "corrected"), "verdict"] == "not planned"
    assert rows.loc[["ahead_ranks", "helps"], "runs"].eq("").all() and rows.loc[("L17", "corrected"), "runs"]
    text = pages.markdown(results)
    assert "What is measured: the loss of `static` minus that of `controller`." in text
    assert "What is measured: the loss of `controller`, its rise from depth 1." in text


def test_the_ledger_has_a_row_a_claim_and_protocol(results):
    table = claims.with_runs(results)
    assert len(table) == len(LEDGER) * 2 and not table[["claim", "reported", "verdict", "why"]].eq("").any(axis=None)
    row = table[(table["id"] == "rec") & (table["protocol"] == "corrected")].iloc[0]
    assert row["reported"] == "51.3 %" and row["recomputed"] == "51.3" and row["measured"].startswith("50 ")
    text = pages.markdown(results)
    assert all(f"## {name}\n" in text for name in TRENDS) and "smoke" not in text
    assert all(f"| {name} " in text for name in LEDGER if name not in TRENDS)
    shown = text.partition("<details><summary>all of them")[0]
    assert max(len(line) for line in shown.splitlines() if line.startswith("|")) <= 100


def test_a_claim_names_the_runs_that_it_was_read_from(results):
    table = claims.with_runs(results).set_index(["id", "protocol"])
    runs = table.loc[("ahead", "corrected"), "runs"].split()
    assert {RunSpec(arm, depth, TINY.rank, "corrected", seed).id for arm in ("controller", "static")
            for depth in TINY.depths for seed in TINY.seeds} <= set(runs) <= set(results.runs)
    assert not any("released" in run for run in runs)


def test_the_command_prints_a_claim_as_text_and_as_data(tmp_path, capsys):
    write(tmp_path)
    assert main(["claims", "rec", "--profile", WHOLE], tmp_path) == 0
    said = capsys.readouterr().out
    assert "reported: 51.3 %" in said and "formula: recovery of L17, Lc, L36" in said
    assert "results/whole/runs/cut-any-s0.jsonl" in said
    assert main(["claims", "rec", "--json", "--profile", WHOLE], tmp_path) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["protocol"] for row in rows] == ["released", "corrected"] and rows[0]["id"] == "rec"
    assert main(["claims", "--profile", WHOLE], tmp_path) == 0
    assert "Controller ahead of static at every depth" in capsys.readouterr().out
    assert main(["claims", "nothing", "--profile", WHOLE], tmp_path) == 2
    assert capsys.readouterr().err.startswith("error: claim 'nothing': unknown; one of L36")


def test_the_summary_follows_the_verdicts(results, flipped):
    summary = pages.summary(results)
    run = [name for name in TRENDS if AS_REPORTED[name] != "not planned"]
    assert summary.count("\n") == len(run) + 1  # a row a claim, below the table's head
    assert re.search(r"ahead of static at every depth +\| holds +\| holds ", summary)
    assert re.search(r"ahead of static at every depth +\| fails +\| fails ", pages.summary(flipped))


# --------------------------------------------------------------------------------------------------- found, in words

def phrases(said: str) -> dict[str, str]:
    """{part: the phrase that it stands behind} of 'Phrase: part (mean), part (mean). Phrase: ...'."""
    return {part.strip(", "): phrase for phrase, parts in re.findall(r"([A-Z][^:.]*): ((?:[^().]+\([^)]*\))+)", said)
            for part in re.findall(r"([^()]+) \(", parts)}


def test_the_sentences_follow_the_numbers(results, flipped):
    assert "depth 8 is better than the cut model (-2)" in text.gap(results, "corrected")
    worse = 2 - 0.02 * sum(TINY.seeds) / SEEDS
    assert f"depth 8 is worse than the cut model ({worse:.3f} [" in text.gap(flipped, "corrected")
    leads = [phrases(text.advantage(found, "corrected")) for found in (results, flipped)]
    for depth in results.profile.depths:
        assert [each[f"depth {depth}"] for each in leads] == ["The Controller is ahead", "Static is ahead"]
    for found, gated, without in ((results, "Better", "Worse"), (flipped, "Worse", "Better")):
        said = phrases(text.gate(found, "corrected"))
        assert said["Controller, depth 4"] == f"{gated} than the cut model"
        assert said["Controller, no gate, depth 4"] == f"{without} than the cut model"


def test_the_sentence_on_interventions_says_what_moves(results, tmp_path):
    found = text.interventions(results, "corrected")
    assert phrases(found)[text.SHOWN["other_sequence"]] == f"The {text.NEEDED[0][4:]}" and "state (0.03)" in found
    profile = write(tmp_path)
    for seed in TINY.seeds:
        def still(log, profile, spec, value, write_inside=synthetic.write_inside):
            inside = [f"loss_t+1/{kind}" for kind in INTERVENTIONS]
            wobble = value + 1e-3 * (-1) ** spec.seed
            row = log.row
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(log, "row", lambda update, split, metric, found: row(
                    update, split, metric, wobble if metric in inside else found))
                write_inside(log, profile, spec, value)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(synthetic, "write_inside", still)
            synthetic.write_run(tmp_path, profile, RunSpec("controller", 8, 8, "corrected", seed), 4.0)
    found = text.interventions(load_results(WHOLE, tmp_path), "corrected")
    told = [*phrases(found).values()]
    assert len(told) == 3 and all(phrase.startswith("No detectable change of the loss") for phrase in told)
    assert phrases(text.by_text(results, "released"))["heldout"] == "Better than the cut model"


def test_a_sentence_on_one_seed_takes_no_side(tmp_path):
    results = results_of(tmp_path, keep=lambda spec: spec.seed == 0 and spec.arm != "static")
    assert "can't be judged from one seed" in text.gap(results, "corrected")
    assert text.advantage(results, "corrected").endswith("no finished run.")
