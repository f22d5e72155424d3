"""Learning rates are chosen per arm on `dev`, from the search's raw logs alone."""

import json

import pytest

from ouroboros import rates
from ouroboros.errors import InputError
from ouroboros.experiment import ARMS, RunSpec
from ouroboros.log import MANIFEST_FIELDS, RunLog

BLANK = {int: 0, str: "", dict: {}, bool: True}


def write_run(profile, root, spec, dev, heldout=1.0, status="finished"):
    """A log of the search with a first and a last dev loss."""
    log = RunLog(profile.folder(root) / "runs" / spec.id)
    log.row(0, 0, "dev", "loss_t+1", 0.5)  # lower than any last one: the choice must not read it
    if status == "finished":
        log.row(6, 768, "dev", "loss_t+1", dev)
        log.row(6, 768, "heldout", "loss_t+1", heldout)
    blank = {name: BLANK[kind[0] if isinstance(kind, tuple) else kind] for name, kind in MANIFEST_FIELDS.items()}
    log.finish({**blank, "format": 1, "run": spec.id, "status": status})


@pytest.fixture
def searched(profile, tmp_path):
    """Grid 1e-3, 1e-2: the first is best for the Controller on dev, the second for the others."""
    for spec in profile.search_runs():
        best = 1e-3 if spec.arm == "controller" else 1e-2
        write_run(profile, tmp_path, spec, dev=3.0 if spec.rate == best else 4.0,
                  heldout=9.0 if spec.rate == best else 1.0)  # held-out says the opposite
    return tmp_path


def test_each_arm_has_its_own_best_on_dev_and_every_point_is_written(profile, searched):
    rates.write(profile, searched)
    chosen = json.loads(rates.path(profile, searched).read_text())
    trained = [name for name, arm in ARMS.items() if arm.trained]
    assert chosen["own"] == dict.fromkeys(trained, 1e-2) | {"controller": 1e-3}
    assert {(p["arm"], p["rate"], p["dev"]) for p in chosen["search"]} >= {("static", 1e-3, 4.0), ("static", 1e-2, 3.0)}
    assert len(chosen["search"]) == 2 * len(trained)


def test_the_shared_rate_is_the_controllers_best_up_to_a_thousandth(profile, searched):
    for spec in profile.search_runs():
        if spec.arm == "controller":
            write_run(profile, searched, spec, dev=4.0 if spec.rate == 1e-3 else 3.0)
    chosen = rates.choose(profile, searched)
    assert chosen["own"]["controller"] == 1e-2 and chosen["shared"] == 1e-3


def test_a_diverged_point_is_never_chosen_and_stays_in_the_table(profile, searched):
    spec = next(s for s in profile.search_runs() if (s.arm, s.rate) == ("static", 1e-2))
    write_run(profile, searched, spec, dev=None, status="diverged")
    chosen = rates.choose(profile, searched)
    assert chosen["own"]["static"] == 1e-3
    assert {"arm": "static", "rate": 1e-2, "dev": None} in chosen["search"]
    other = next(s for s in profile.search_runs() if (s.arm, s.rate) == ("static", 1e-3))
    write_run(profile, searched, other, dev=None, status="diverged")
    with pytest.raises(InputError, match="works for arm 'static'; widen search.grid"):
        rates.choose(profile, searched)


def test_an_unfinished_search_chooses_nothing(profile, searched):
    (profile.folder(searched) / "runs" / profile.search_runs()[3].id / "manifest.json").unlink()
    count = len(profile.search_runs())
    with pytest.raises(InputError, match=f"{count - 1} of {count} runs.*make runs PROFILE=test"):
        rates.choose(profile, searched)


@pytest.mark.parametrize("protocol, expected", [
    ("corrected", 1e-2), ("released", 1e-3), ("corrected+target", 1e-2), ("released+target+pooling", 1e-3),
    ("released+rate", 1e-2), ("corrected+rate", 1e-3),
])
def test_a_flipped_switch_keeps_the_rates_of_its_column(profile, searched, protocol, expected):
    rates.write(profile, searched)
    assert rates.rate_of(RunSpec("static", 2, 4, protocol, 0), profile, searched) == expected


def test_a_level_is_a_factor_of_the_rate(profile, searched):
    rates.write(profile, searched)
    low, high = (RunSpec("static", 2, 4, "corrected", 0, level=level) for level in ("low", "high"))
    own = rates.rate_of(RunSpec("static", 2, 4, "corrected", 0), profile, searched)
    assert rates.rate_of(low, profile, searched) == own / 2 and rates.rate_of(high, profile, searched) == own * 2


def test_a_run_of_the_search_has_the_rate_of_its_id_and_others_need_the_choice(profile, tmp_path):
    assert rates.rate_of(RunSpec("static", 2, 4, "corrected", 9, 0.3), profile, tmp_path) == 0.3
    with pytest.raises(InputError, match="rates.json: missing; run the learning-rate search first"):
        rates.rate_of(RunSpec("static", 2, 4, "corrected", 0), profile, tmp_path)


def test_an_arm_that_the_search_did_not_try_is_refused_in_one_line(profile, searched):
    rates.write(profile, searched)
    path = rates.path(profile, searched)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"own": {"static": 1e-2}}))
    with pytest.raises(InputError, match="no rate for arm 'none'; run the learning-rate search again"):
        rates.rate_of(RunSpec("none", 1, None, "corrected", 0), profile, searched)
