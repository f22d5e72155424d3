"""Does a loop pay: what is chosen on dev, what counts as a win on held-out text (docs/hypotheses.md)."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import profile_data
from helpers.synthetic import write_run

from ouroboros.analysis import figures, pays, tables
from ouroboros.analysis.results import Results
from ouroboros.errors import InputError
from ouroboros.experiment.learning_rates import search_of
from ouroboros.experiment.profile import parse_profile
from ouroboros.log import WorkingLog, read_runs
from ouroboros.reproduce import home

SCREEN = {"repeat": 3.3, "repeat_more": 3.1, "taught": 3.2, "lora": 3.15, "lora_coda": 3.6, "lora_last": 3.4,
          "repeat_affine": 3.2, "lora_layer": 2.0}
SEEDS = (3, 4, 5)


@pytest.fixture
def profile(text):
    screen = [{"purpose": "screen", "class": kind, "budget": budget, "arms": arms, "updates": 2, "seeds": [9]}
              for kind, budget, arms in (("candidate", "values", ["repeat", "repeat_more", "taught"]),
                                         ("baseline", "values", ["lora_coda", "lora_last", "repeat_affine"]),
                                         ("baseline", "inference", ["lora_layer"]))]
    confirm = [{"purpose": "pays", "class": "candidate", "budget": "values", "arms": ["repeat_more", "taught"],
                "seeds": SEEDS},
               {"purpose": "pays", "class": "baseline", "budget": "values", "arms": ["lora", "repeat_affine"],
                "seeds": SEEDS}]
    searches = [{"purpose": "rate", "arms": arms, "class": kind, "budget": "values", "seeds": [9], "updates": 2,
                 "rates": [rate]} for kind, arms, rate in (("baseline", ["lora"], 1e-3), (
                     "candidate", ["repeat_more", "taught"], 3e-3), ("baseline", ["repeat_affine"], 3e-3))]
    plan = [searches[0], {"arms": ["full", "cut"], "seeds": SEEDS}, *screen, *searches[1:], *confirm]
    data = profile_data(text, plan=plan, scanned={"looped": [0, 0, 0], "kept": 2})
    data["siblings"] = {arm: "lora" for arm in SCREEN if arm != "lora"}
    return parse_profile(data, "test.yaml")


def made(root, profile, heldout: dict[str, float], purposes=("matrix", "rate", "screen", "pays"),
         screen: dict[str, float] | None = None) -> Results:
    for spec in profile.runs():
        if spec.purpose in purposes:
            value = (SCREEN | (screen or {}))[spec.arm] if spec.chooses else heldout[spec.arm]
            # seeds and blocks are paired: they differ alike in all arms, and a little apart
            write_run(root, profile, spec, value + 0.1 * spec.seed + 0.001 * spec.seed * len(spec.arm))
    return Results(profile, read_runs(profile.folder(root)))


LOSSES = {"full": 2.0, "cut": 6.0, "repeat_more": 2.9, "taught": 3.1, "lora": 3.0, "repeat_affine": 3.3}


def test_two_of_each_class_are_chosen_on_dev_among_those_of_equal_values(tmp_path, profile):
    results = made(tmp_path, profile, LOSSES)
    assert pays.chosen(results) == {"candidate": ["repeat_more", "taught"], "baseline": ["lora", "repeat_affine"]}
    assert pays.screened(results)["arm"].iloc[0] == "lora_layer"  # lower, but more is stored


def test_a_third_is_confirmed_too_where_it_is_close_to_the_second(tmp_path, profile):
    """The gap is 4 nats, so 0.04 are close."""
    results = made(tmp_path, profile, LOSSES)
    for spec in profile.runs():
        if spec.purpose == "screen" and spec.arm == "repeat":
            write_run(tmp_path, profile, spec, 4.19)  # the second has 4.154
    results = Results(profile, read_runs(profile.folder(tmp_path)))
    assert pays.chosen(results)["candidate"] == ["repeat_more", "taught", "repeat"]


def test_the_figure_shows_each_arm_and_says_who_is_ahead(tmp_path, profile):
    results = made(tmp_path, profile, LOSSES)
    figure = figures.pays(results)
    plt.close(figure)
    assert all(len(axis.lines) == count for axis, count in zip(figure.axes, (len(SCREEN), len(SCREEN), 4), strict=True))
    title = figure.get_suptitle()
    assert title.startswith("The best loop (LoRA and three extra passes) is ahead of LoRA on the cut model by 0.0")
    confirmed = pays.confirmed(results)
    assert confirmed["arm"].iloc[0] == "repeat_more" and len(confirmed) == 4
    assert np.isnan(confirmed.set_index("arm").loc["lora", "gain"])  # the bar itself


@pytest.mark.parametrize("loop, wins", [(2.85, True), (2.95, False), (3.2, False)])
def test_a_win_is_more_than_two_percent_of_the_gap_and_an_interval_above_zero(tmp_path, profile, loop, wins):
    """The gap is 4 nats, so 0.08 are asked for."""
    results = made(tmp_path, profile, LOSSES | {"repeat_more": loop, "taught": 3.5})
    found = json.loads(pays.as_json(results))
    assert (found["best"], found["bar"], found["seeds"]) == ("repeat_more", "lora", 3)
    assert found["gain"] == pytest.approx(3.0 - loop, abs=0.05)
    assert found["interval"][0] <= found["gain"] <= found["interval"][1]
    assert found["margin"] == pytest.approx(0.08, abs=0.01)
    assert found["wins"] == wins
    assert pays.answer(results)[0].startswith("Yes" if wins else "No" if loop > 3 else "Nearly")


def test_seeds_that_disagree_win_nothing(tmp_path, profile):
    results = made(tmp_path, profile, LOSSES)
    noisy = [spec for spec in profile.runs() if spec.purpose == "pays" and spec.arm == "repeat_more"]
    for spec, value in zip(noisy, (1.0, 3.0, 4.0), strict=True):
        write_run(tmp_path, profile, spec, value)
    results = Results(profile, read_runs(profile.folder(tmp_path)))
    assert not json.loads(pays.as_json(results))["wins"]


def test_the_best_is_chosen_on_dev_not_on_what_is_reported(tmp_path, profile):
    """Dev is as held-out in these logs but for one arm: better on dev, worse on held-out text."""
    results = made(tmp_path, profile, LOSSES)
    for spec in profile.runs():
        if spec.purpose == "pays" and spec.arm == "taught":
            log = WorkingLog(profile.unfinished(spec.id, tmp_path))
            run = results.runs[spec.id]
            for (split, metric), found in run.series.items():
                for update, value in zip(*found, strict=True):
                    shift = -1.0 if split == "dev" else 0.0
                    log.row(update, split, metric, [v + shift for v in value] if isinstance(value, list)
                            else value + shift)
            manifest = {name: value for name, value in run.manifest.items() if name not in ("format", "series", "seal")}
            log.finish(profile.run_path(spec.id, tmp_path), manifest)
    results = Results(profile, read_runs(profile.folder(tmp_path)))
    assert pays.decided(results)["best"] == "taught"


def with_pays(profile, text, *entries):
    """The profile with more to confirm."""
    data = profile_data(text, plan=[], scanned={"looped": [0, 0, 0], "kept": 2})
    data["plan"] = [entry.model_dump(by_alias=True, exclude_defaults=True, mode="json") for entry in profile.plan]
    data["plan"] += [{"purpose": "pays", **entry} for entry in entries]
    data["siblings"] = profile.siblings | {arm: "lora" for entry in entries for arm in entry["arms"] if arm != "lora"}
    return parse_profile(data, "test.yaml")


MORE = LOSSES | {"lora_distilled": 2.5, "repeat_more_distilled": 2.2, "lora_layers": 2.4}


def test_what_is_distilled_afterwards_changes_no_verdict(tmp_path, profile, text):
    distilled = [{"class": kind, "budget": "values", "arms": [arm], "seeds": [3]} for kind, arm in
                 (("baseline", "lora_distilled"), ("candidate", "repeat_more_distilled"))]
    found = pays.decided(made(tmp_path, with_pays(profile, text, *distilled), MORE))
    assert (found["best"], found["bar"], found["seeds"]) == ("repeat_more", "lora", 3)


@pytest.mark.parametrize("distilled, seeds, wins, said", [
    (None, 0, None, "Not decided yet"), (3.3, 2, None, "Not decided yet"), (3.3, 3, True, "Yes"),
    (2.5, 3, False, "No: LoRA and three extra passes, taught the full model's states is ahead of LoRA on the cut "
                    "model, but not of LoRA that learns from the full model too")])
def test_what_is_taught_wins_only_ahead_of_lora_that_is_taught_too(tmp_path, profile, text, distilled, seeds, wins,
                                                                   said):
    entry = {"class": "baseline", "budget": "values", "arms": ["lora_distilled"], "seeds": SEEDS[:seeds]}
    planned = with_pays(profile, text, *[entry] * (distilled is not None))
    results = made(tmp_path, planned, MORE | {"taught": 2.8, "lora_distilled": distilled})
    found = pays.decided(results)
    assert pays.answer(results)[0].startswith(said)
    assert found is None if wins is None else (found["best"], found["wins"]) == ("taught", wins)


def test_what_is_distilled_is_set_against_a_bar_that_is_too(tmp_path, profile, text):
    distilled = [{"class": kind, "budget": "values", "arms": [arm], "seeds": [3]} for kind, arm in
                 (("baseline", "lora_distilled"), ("candidate", "repeat_more_distilled"))]
    table = pays.confirmed(made(tmp_path, with_pays(profile, text, *distilled), MORE)).set_index("arm")
    assert table.loc["repeat_more_distilled", "bar"] == "lora_distilled"
    assert table.loc["repeat_more_distilled", "gain"] == pytest.approx(0.3, abs=0.05)  # 2.5 - 2.2
    assert np.isnan(table.loc["lora_distilled", "gain"])


def test_what_the_screen_chose_must_be_what_is_confirmed(tmp_path, profile):
    data = profile.model_dump(by_alias=True, exclude_defaults=True, mode="json")
    data["plan"][-1]["arms"] = ["repeat_affine"]  # without LoRA, the screen's best baseline
    results = made(tmp_path, parse_profile(data, "test.yaml"), LOSSES | {"repeat_more": 2.8})
    assert pays.decided(results) is None and pays.answer(results)[0].startswith("Not decided yet")


def test_an_extra_arm_that_the_screen_did_not_choose_is_neither_best_nor_bar(tmp_path, profile):
    data = profile.model_dump(by_alias=True, exclude_defaults=True, mode="json")
    data["plan"] += [{"class": "candidate", "budget": "values", "arms": ["repeat"], **change} for change in (
        {"purpose": "rate", "updates": 2, "rates": [3e-3], "seeds": [9]}, {"purpose": "pays", "seeds": SEEDS})]
    results = made(tmp_path, parse_profile(data, "test.yaml"), LOSSES | {"repeat": 1.0})
    assert pays.decided(results)["best"] == "repeat_more"


def test_an_unfinished_screen_decides_nothing(tmp_path, profile):
    results = made(tmp_path, profile, LOSSES)
    few = {name: run for name, run in results.runs.items() if not name.startswith("lora_last")}
    assert pays.decided(results) is not None and pays.decided(Results(profile, few)) is None


@pytest.mark.parametrize("lost, best", [("lora", None), ("repeat_more", "taught")])
def test_a_diverged_bar_is_no_win_and_a_diverged_candidate_is_not_the_best(tmp_path, profile, lost, best):
    results = made(tmp_path, profile, LOSSES)
    [spec] = [spec for spec in profile.runs() if (spec.purpose, spec.arm, spec.seed) == ("pays", lost, 4)]
    write_run(tmp_path, profile, spec, 9.0, status="diverged")
    results = Results(profile, read_runs(profile.folder(tmp_path)))
    found = pays.decided(results)
    assert (found and found["best"]) == best
    assert f"Diverged, so in no mean: {spec.id}" in pays.answer(results)


@pytest.mark.parametrize("loss, word", [(2.0, "Yes"), (2.98, "Nearly"), (3.4, "No")])
def test_a_candidate_of_another_class_has_its_own_bar_and_verdict(tmp_path, profile, text, loss, word):
    entries = [{"class": "candidate", "budget": "inference", "arms": ["repeat"], "seeds": SEEDS},
               {"class": "baseline", "budget": "inference", "arms": ["lora_layer"], "seeds": SEEDS}]
    results = made(tmp_path, with_pays(profile, text, *entries), LOSSES | {"repeat": loss, "lora_layer": 3.0})
    table = pays.confirmed(results).set_index("arm")
    assert table.loc["repeat", "bar"] == "lora_layer"
    assert table.loc["repeat", "gain"] == pytest.approx(3.0 - loss, abs=0.05)
    said = [line for line in pays.answer(results) if line.startswith("At equal FLOPs a token: ")]
    assert len(said) == 1 and said[0].startswith(f"At equal FLOPs a token: {word}")


def test_relaxed_recursion_as_the_bar_is_said_first_with_its_gain(tmp_path, profile):
    data = profile.model_dump(by_alias=True, exclude_defaults=True, mode="json")
    data["plan"][0]["arms"] = ["lora", "relaxed"]
    data["plan"][-1]["arms"] = ["lora", "relaxed"]
    results = made(tmp_path, parse_profile(data, "test.yaml"), LOSSES | {"relaxed": 2.7}, screen={"relaxed": 3.0})
    first = pays.answer(results)[0]
    assert first.startswith("A published loop, relaxed recursion, is the best baseline: that one pays, in storage only")
    assert "its gain on LoRA on the cut model is 0.2" in first


def test_what_is_confirmed_has_rates_of_its_own(profile):
    data = profile.model_dump(by_alias=True, exclude_defaults=True, mode="json")
    data["plan"][-1]["arms"] = ["lora", "lora_last"]
    with pytest.raises(InputError, match="'lora_last': would be confirmed at a sibling's rates; search it first"):
        parse_profile(data, "test.yaml")


@pytest.mark.parametrize("arm, said", [("block_two", "(it applies 1 layer more than that bar)"),
                                       ("block_three", "(it applies 2 layers more than that bar)"), ("repeat", "")])
def test_what_a_block_applies_beyond_its_bar_is_said(tmp_path, profile, arm, said):
    data = profile.model_dump(by_alias=True, exclude_defaults=True, mode="json")
    screen = next(entry for entry in data["plan"] if entry.get("purpose") == "screen")
    screen["arms"] = ["repeat_more", "taught", arm]
    data["siblings"][arm] = "lora"
    del data["plan"][-2:]  # nothing is confirmed yet
    results = made(tmp_path, parse_profile(data, "test.yaml"), LOSSES, screen={arm: 2.5})
    [line] = [line for line in pays.answer(results) if line.startswith("At equal FLOPs a token, in the screen")]
    assert said in line and (said or "it applies" not in line)


@pytest.mark.parametrize("layers, said", [(None, "Yes in stored values; at equal FLOPs"), (2.4, "In storage only"),
                                          (3.2, "Yes: ")])
def test_a_winner_pays_in_storage_alone_where_it_is_behind_at_equal_flops(tmp_path, profile, text, layers, said):
    entry = {"class": "baseline", "budget": "inference", "arms": ["lora_layers"], "seeds": SEEDS}
    planned = with_pays(profile, text, *[entry] * (layers is not None))
    results = made(tmp_path, planned, MORE | {"repeat_more": 2.8, "lora_layers": layers})
    assert pays.decided(results)["wins"] and pays.answer(results)[0].startswith(said)
    table = pays.confirmed(results).set_index("arm")
    assert layers is None or np.isnan(table.loc["lora_layers", "gain"])  # it is a bar, not a candidate


@pytest.mark.parametrize("longer, share, said", [
    (None, 1, "At equal training FLOPs it isn't confirmed yet"),
    (2.7, 0.9, "At equal training FLOPs it isn't confirmed yet"),  # as many FLOPs they aren't
    (2.7, 1.01, "9 updates of LoRA on the cut model, its gain is -0.")])
def test_a_winner_is_set_beside_lora_of_as_many_training_flops(tmp_path, profile, text, longer, said, share):
    entry = {"class": "baseline", "budget": "training", "arms": ["lora"], "seeds": SEEDS, "updates": 9}
    own = {"class": "candidate", "budget": "values", "arms": ["repeat_more"], "seeds": [3], "updates": 9}  # step 3
    planned = with_pays(profile, text, own, *[entry] * (longer is not None))
    results = made(tmp_path, planned, LOSSES | {"repeat_more": 2.8})
    for spec in planned.runs():
        if (spec.arm, spec.updates) == ("lora", 9):
            flops = share * 3e6 * planned.training.updates / 9
            write_run(tmp_path, planned, spec, longer + 0.1 * spec.seed, flops={"forward": 1e6, "training": flops})
    results = Results(planned, read_runs(planned.folder(tmp_path)))
    assert said in pays.answer(results)[1] and pays.decided(results)["wins"]


def test_nothing_is_decided_before_every_seed_is_made(tmp_path, profile):
    results = made(tmp_path, profile, LOSSES)
    for left in ("repeat_more-corrected-s4", "lora-corrected-s5"):
        few = {name: run for name, run in results.runs.items() if name != left}
        assert pays.decided(Results(profile, few)) is None and pays.as_json(Results(profile, few)) is None


def test_an_arm_that_is_searched_to_be_confirmed_keeps_its_place_and_rates_in_the_screen(tmp_path, profile):
    before = pays.screened(made(tmp_path, profile, LOSSES))
    [own] = [spec for spec in profile.search_runs() if spec.arm == "repeat_more"]
    write_run(tmp_path, profile, own, 1.0)
    results = Results(profile, read_runs(profile.folder(tmp_path)))
    assert pays.screened(results).equals(before)
    rate = {spec.purpose: search_of(spec.arm, None, profile, spec.purpose)[0].rate for spec in profile.runs()
            if spec.arm == "repeat_more"}
    assert rate == {"screen": 1e-3, "pays": 3e-3, "rate": 3e-3}


def test_lora_takes_the_pages_search_where_the_page_confirms_it_and_its_own_in_the_matrix(profile, tmp_path):
    first = {"purpose": "rate", "arms": ["lora"], "seeds": [9], "updates": 3, "rates": [1e-2]}
    data = profile.model_dump(by_alias=True, exclude_defaults=True, mode="json")
    both = parse_profile(data | {"plan": [first, *data["plan"]]}, "test.yaml")
    assert {purpose: search_of("lora", None, both, purpose)[0].updates for purpose in ("matrix", "screen", "pays")} == {
        "matrix": 3, "screen": 2, "pays": 2}
    assert search_of("lora_coda", None, both, "screen")[0].updates == 2
    for spec in both.search_runs():
        write_run(tmp_path, both, spec, 5.0 - spec.updates)
    table = tables.search_table(Results(both, read_runs(both.folder(tmp_path))))
    table = table[table["arm"] == "lora"]
    assert table[["updates", "best rate"]].to_numpy().tolist() == [[3, 1e-2], [2, 1e-3]]  # a row each


def test_a_run_has_the_class_of_its_own_entry(profile):
    data = profile.model_dump(by_alias=True, exclude_defaults=True, mode="json")
    data["plan"] += [{"purpose": "pays", "class": "baseline", "budget": "training", "arms": ["lora"], "seeds": SEEDS,
                      "updates": 9}]
    data["plan"][-2]["updates"] = profile.training.updates  # said, though it is the profile's own
    more = parse_profile(data, "test.yaml")
    budgets = {(spec.arm, spec.updates): more.declared(spec)["budget"] for spec in more.runs() if spec.aim == "pays"}
    assert budgets[("lora", None)] == "values" and budgets[("lora", 9)] == "training"


def test_before_both_are_confirmed_nothing_is_decided(tmp_path, profile):
    results = made(tmp_path, profile, LOSSES, purposes=("matrix", "rate", "screen"))
    assert pays.as_json(results) is None
    lines = pays.answer(results)
    assert lines[0].startswith("Not decided yet") and lines[1].startswith("Not run yet: ")
    assert "behind the best baseline of as many values by 0.013" in lines[2]  # 3.1 + 0.099 against 3.15 + 0.036


def test_the_scans_rules_choose_by_the_lowest_loss(tmp_path, profile):
    kept = [5.0, 4.0, 3.0, 6.0]
    again = {"1x1_g0.3": [2.0, 7.0, 5.0], "1x1_g1": [9.0, 1.5, 9.0], "1x3_g0.3": [9.0, 0.1, 0.1],
             "2x1_g0.3": [3.0, 2.0], "3x1_g0.3": [4.0]}
    spec = profile.runs()[0]
    log = WorkingLog(profile.unfinished("scan", tmp_path))
    log.row(0, "dev", "loss_t+1/kept", kept)
    for name, values in again.items():
        log.row(0, "dev", f"loss_t+1/again_{name}", values)
    path = write_run(tmp_path, profile, spec, 4.0)
    made_of = read_runs(profile.folder(tmp_path))[spec.id].manifest
    path.unlink()
    manifest = {name: value for name, value in made_of.items() if name not in ("format", "series", "seal")}
    log.finish(profile.run_path("scan-any-s0", tmp_path), manifest | {"run": "scan-any-s0", "arm": "scan"})
    table = pays.scanned(Results(profile, read_runs(profile.folder(tmp_path))))
    split = profile.split
    assert pays.scan_choice(table, split.recurrent) == {"looped": [0, 1, 0], "kept": split.prelude + 1}
    assert table[table["what"] == "kept in the middle"]["loss - cut"].tolist() == [2.0, 1.0, 0.0, 3.0]


def test_the_profiles_scanned_is_what_the_rules_choose_of_the_committed_scan():
    from ouroboros.analysis.results import load_results
    results = load_results("smollm2", home())
    table = pays.scanned(results)
    wanted = pays.scan_choice(table, results.profile.split.recurrent)
    assert results.profile.scanned.model_dump(mode="json") == wanted
