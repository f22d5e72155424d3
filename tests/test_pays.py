"""Does a loop pay: what is chosen on dev, what counts as a win on held-out text (docs/hypotheses.md)."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import profile_data
from helpers.synthetic import write_run

from ouroboros.analysis import figures, pays, tables
from ouroboros.analysis.results import Results
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
    plan = [{"purpose": "rate", "arms": ["lora"], "class": "baseline", "budget": "values", "seeds": [9], "updates": 2,
             "rates": [1e-3]}, {"arms": ["full", "cut"], "seeds": SEEDS}, *screen, *confirm]
    data = profile_data(text, plan=plan, scanned={"looped": [0, 0, 0], "kept": 2})
    data["siblings"] = {arm: "lora" for arm in SCREEN if arm != "lora"}
    return parse_profile(data, "test.yaml")


def made(root, profile, heldout: dict[str, float], purposes=("matrix", "rate", "screen", "pays")) -> Results:
    for spec in profile.runs():
        if spec.purpose in purposes:
            value = SCREEN[spec.arm] if spec.chooses else heldout[spec.arm]
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


@pytest.mark.parametrize("distilled, wins", [(None, False), (2.5, False), (3.3, True)])
def test_what_is_taught_wins_only_ahead_of_lora_that_is_taught_too(tmp_path, profile, text, distilled, wins):
    entry = {"class": "baseline", "budget": "values", "arms": ["lora_distilled"], "seeds": SEEDS}
    planned = with_pays(profile, text, *[entry] * (distilled is not None))
    results = made(tmp_path, planned, MORE | {"taught": 2.8, "lora_distilled": distilled})
    found = pays.decided(results)
    assert (found["best"], found["wins"]) == ("taught", wins)
    assert pays.answer(results)[0].startswith("Not decided yet") == (distilled is None)


@pytest.mark.parametrize("layers, said", [(None, "Yes in stored values; at equal FLOPs"), (2.4, "In storage only"),
                                          (3.2, "Yes: ")])
def test_a_winner_pays_in_storage_alone_where_it_is_behind_at_equal_flops(tmp_path, profile, text, layers, said):
    entry = {"class": "baseline", "budget": "inference", "arms": ["lora_layers"], "seeds": SEEDS}
    planned = with_pays(profile, text, *[entry] * (layers is not None))
    results = made(tmp_path, planned, MORE | {"repeat_more": 2.8, "lora_layers": layers})
    assert pays.decided(results)["wins"] and pays.answer(results)[0].startswith(said)
    table = pays.confirmed(results).set_index("arm")
    assert layers is None or np.isnan(table.loc["lora_layers", "gain"])  # it is a bar, not a candidate


@pytest.mark.parametrize("longer, said", [(None, "At equal training FLOPs it isn't confirmed yet"),
                                          (2.7, "9 updates of LoRA on the cut model, its gain is -0.")])
def test_a_winner_is_set_beside_lora_of_as_many_training_flops(tmp_path, profile, text, longer, said):
    entry = {"class": "baseline", "budget": "training", "arms": ["lora"], "seeds": SEEDS, "updates": 9}
    planned = with_pays(profile, text, *[entry] * (longer is not None))
    results = made(tmp_path, planned, LOSSES | {"repeat_more": 2.8})
    for spec in planned.runs():
        if spec.updates == 9:
            write_run(tmp_path, planned, spec, longer + 0.1 * spec.seed)
    results = Results(planned, read_runs(planned.folder(tmp_path)))
    assert said in pays.answer(results)[1] and pays.decided(results)["wins"]


def test_nothing_is_decided_before_every_seed_is_made(tmp_path, profile):
    results = made(tmp_path, profile, LOSSES)
    for left in ("repeat_more-corrected-s4", "lora-corrected-s5"):
        few = {name: run for name, run in results.runs.items() if name != left}
        assert pays.decided(Results(profile, few)) is None and pays.as_json(Results(profile, few)) is None


def test_an_arm_that_is_searched_to_be_confirmed_keeps_its_place_and_rates_in_the_screen(tmp_path, profile):
    data = profile.model_dump(by_alias=True, exclude_defaults=True, mode="json")
    data["plan"].append({"purpose": "rate", "arms": ["repeat_more"], "class": "candidate", "budget": "values",
                         "seeds": [9], "updates": 2, "rates": [3e-3]})
    searched = parse_profile(data, "test.yaml")
    results = made(tmp_path, profile, LOSSES)
    before = pays.screened(results)
    [own] = [spec for spec in searched.search_runs() if spec.arm == "repeat_more"]
    write_run(tmp_path, searched, own, 1.0)
    results = Results(searched, read_runs(searched.folder(tmp_path)))
    assert pays.screened(results).equals(before)
    rate = {spec.purpose: search_of(spec.arm, None, searched, spec.purpose)[0].rate for spec in searched.runs()
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
