"""What `status` says while runs go on, after a kill and after a resume; and that no run is made twice at once."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import profile_data
from synthetic import write_run

from ouroboros.cli import main
from ouroboros.errors import Busy, InputError
from ouroboros.experiment.profile import parse_profile
from ouroboros.log import WorkingLog
from ouroboros.training import status
from ouroboros.training.run import execute

RUN = "static-d2-r4-corrected-s0"
SLOW = Path(__file__).parent / "helpers" / "slow.py"


def state(profile, root, run=RUN):
    return next(s for s in status.status(profile, root) if s.run == run)


@pytest.fixture
def slow(root, text):
    """Starts RUN in a process that stops for long after its fourth update; ends it at the end."""
    (root / "data.json").write_text(json.dumps(profile_data(text)))
    started = []

    def start() -> subprocess.Popen:
        process = subprocess.Popen([sys.executable, str(SLOW), str(root), RUN], stdout=subprocess.PIPE, text=True,
                                   env=os.environ | {"OMP_NUM_THREADS": "1"})
        started.append(process)
        assert process.stdout.readline() == "4 updates made\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_run_is_missing_running_interrupted_and_running_again(profile, root, slow):
    """And while a process makes it, another one is refused and leaves its log alone."""
    assert state(profile, root) == status.Status(RUN, "missing", 0, 6, None, "", None)
    process = slow()
    running = state(profile, root)
    assert (running.state, running.update, running.updates) == ("running", 4, 6)
    assert running.loss > 0 and running.of == "train" and running.left > 0
    log = root / "results/test/unfinished" / RUN / "rows.jsonl"
    before = log.read_bytes()
    with pytest.raises(Busy, match=r"process \d+ on .* makes it"):
        execute(profile, RUN, root, progress=False)
    assert log.read_bytes() == before and issubclass(Busy, InputError)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed = state(profile, root)
    assert (killed.state, killed.update, killed.left) == ("interrupted", 4, None)
    slow()  # no checkpoint was due: it begins again, so all four updates are of this stretch
    again = state(profile, root)
    assert (again.state, again.update) == ("running", 4) and again.left is not None


def test_a_finished_a_diverged_and_an_untrained_run(profile, root, monkeypatch):
    execute(profile, RUN, root, progress=False)
    execute(profile, "cut-any-s0", root, progress=False)
    monkeypatch.setattr("ouroboros.training.trainer.EXPLODED", 0.1)
    execute(profile, "none-d2-corrected-s0", root, progress=False)
    done, cut, diverged = (state(profile, root, run) for run in (RUN, "cut-any-s0", "none-d2-corrected-s0"))
    assert (done.state, done.update, done.of) == ("finished", 6, "heldout") and done.left is None
    assert (cut.state, cut.update, cut.updates, cut.of) == ("finished", 0, 0, "heldout")
    assert (diverged.state, diverged.update) == ("diverged", 0)
    table, searched = status.report(profile, root), 3 * 5
    assert table.count("\n") == len(profile.runs()) + 5 + 2  # 5 steps outward; a head, a blank, the counts
    assert f"{len(profile.runs()) + 5 - searched - 3} missing, 1 diverged, {searched + 2} finished" in table


def test_a_run_whose_rate_is_still_searched_is_planned_and_the_others_are_not(profile, root):
    profile.run_path("static-d2-r4-corrected-s9-lr0.001", root).unlink()
    waiting = state(profile, root)
    assert waiting.state == "planned" and "1 runs are left, 'static-d2-r4-corrected-s9-lr0.001' first" in waiting.why
    assert state(profile, root, "none-d2-corrected-s0").state == "missing"
    assert state(profile, root, "cut-any-s0").state == "missing"
    assert state(profile, root, "static-d2-r4-corrected-s9-lr0.001").state == "missing"
    assert RUN in [spec.id for spec in status.missing(profile, root)]  # planned is not made
    with pytest.raises(InputError, match="its learning rate is still searched"):
        execute(profile, RUN, root, progress=False)


@pytest.mark.parametrize("change, field", [
    ({"rank": 8}, "config.rank"),
    ({"training": {"updates": 7, "micro_batch": 2, "accumulation": 2, "block": 32}}, "config.training"),
])
def test_a_log_of_another_identity_is_listed_and_never_overwritten(profile, root, text, change, field):
    """The run's name is the same; what made it isn't."""
    for log in profile.folder(root).glob("runs/*"):  # of the searches
        log.unlink()
    path = write_run(root, profile, profile.find("cut-any-s0"), 4.0)
    other, before = parse_profile(profile_data(text) | change, "t"), path.read_bytes()
    found = state(other, root, "cut-any-s0")
    assert found.state == "mismatched" and f"field '{field}'" in found.why
    for refusing in (lambda: status.missing(other, root), lambda: status.made(other.find("cut-any-s0"), other, root)):
        with pytest.raises(InputError, match=f"cut-any-s0.jsonl: field '{field}'.*another run's log") as error:
            refusing()
        assert "\n" not in str(error.value)
    assert path.read_bytes() == before


def test_a_log_of_an_earlier_protocol_is_listed_and_never_overwritten(profile, root):
    path = write_run(root, profile, profile.find("cut-any-s0"), 4.0, protocol_version=1)
    before = path.read_bytes()
    found = state(profile, root, "cut-any-s0")
    assert found.state == "mismatched" and "field 'protocol_version': is 1" in found.why
    with pytest.raises(InputError, match="cut-any-s0.jsonl: field 'protocol_version'.*another run's log"):
        status.missing(profile, root)
    assert path.read_bytes() == before


def test_half_a_row_is_not_read(profile, root):
    log = WorkingLog(profile.unfinished(RUN, root))
    log.row(0, "heldout", "curve/loss_t+1", 5.0)
    log.row(1, "train", "loss", 4.0)
    log._file.write('{"update": 2, "tok')
    log._file.flush()
    found = state(profile, root)
    assert (found.state, found.update, found.loss, found.of) == ("interrupted", 1, 4.0, "train")


def test_time_left_counts_from_where_the_run_went_on(monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1100.0)
    note = {"update": 50, "time": 1000.0}
    assert status._left(note, 70, 100) == pytest.approx(150)  # 20 updates in 100 s, 30 are left
    assert status._left(note, 50, 100) is None and status._left({}, 70, 100) is None
    assert status._left({"update": None, "time": 1000.0}, 70, 100) is None  # it isn't known yet where it goes on


def test_the_command_says_it_and_refuses_an_unknown_profile(capsys, tmp_path):
    assert main(["status", "--profile", "smoke"], tmp_path) == 0
    out = capsys.readouterr().out
    assert "controller-d4-r4-corrected-s0" in out and out.rstrip().endswith("planned")
    assert main(["status", "--profile", "huge"], tmp_path) == 2
