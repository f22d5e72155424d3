"""A run killed at any moment and started again ends with the log of one never killed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import profile_data, write_searches

from ouroboros.errors import AGAIN
from ouroboros.experiment.profile import parse_profile
from ouroboros.log import WorkingLog, read_run
from ouroboros.training import resume, trainer
from ouroboros.training.run import execute

RUN = "controller-dmixed-r4-released-s0"  # draws depths, rounds to bf16: all the state there is
SCRIPT = Path(__file__).parent / "helpers" / "killed.py"


@pytest.fixture
def never_killed(profile, root):
    return read_log(execute(profile, RUN, root, progress=False))


def read_log(path):
    """All that a log says but when it was made, and in what time."""
    run = read_run(path)
    made = {name: value for name, value in run.manifest.items() if name not in ("started", "wall_seconds", "seal")}
    return made, dict(run.series)


def started_again(tmp_path, root, text, *arguments):
    """Run killed.py on a copy of `root`; the finished process, the run's log and the folder of what it measured."""
    again = tmp_path / "again"
    if not again.exists():
        shutil.copytree(root, again)
        (again / "results/test/runs" / f"{RUN}.jsonl").unlink()
        (again / "data.json").write_text(json.dumps(profile_data(text)))
    done = subprocess.run([sys.executable, str(SCRIPT), str(again), *arguments], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=200)
    return done, again / "results/test/runs" / f"{RUN}.jsonl", again / "results/test/unfinished" / RUN


@pytest.mark.parametrize("seed", ["1", "2"])
def test_eight_kills_at_random_points_leave_the_log_as_it_would_have_been(seed, never_killed, tmp_path, root, text):
    done, log, folder = started_again(tmp_path, root, text, "kills", seed)
    assert done.returncode == 0, done.stderr
    counted = json.loads(done.stdout.splitlines()[-1])
    assert counted["kills"] == 8 and counted["with a checkpoint"] >= 2
    assert read_log(log) == never_killed
    assert not folder.exists() and not [path for path in log.parent.iterdir() if path.name[0] == "."]


def test_sigterm_saves_and_says_again_and_the_same_command_goes_on(never_killed, tmp_path, root, text, profile):
    done, log, folder = started_again(tmp_path, root, text, "stop")
    assert done.returncode == AGAIN == 75 and done.stdout.strip().endswith("run the same command again"), done.stderr
    assert (folder / "checkpoint.safetensors").exists() and not log.exists()
    updates = []
    train = trainer.score

    def watched(*args, **kwargs):
        updates.append(args[5])
        return train(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ouroboros.training.trainer.score", watched)
        execute(profile, RUN, tmp_path / "again", progress=False)
    assert read_log(log) == never_killed and 0 not in updates  # it went on, it didn't begin again


def test_a_checkpoint_of_another_run_or_a_damaged_one_is_left(never_killed, root, profile, text, tmp_path):
    _, log, folder = started_again(tmp_path, root, text, "stop")
    again = tmp_path / "again"
    whole = (folder / "checkpoint.safetensors").read_bytes()
    (folder / "checkpoint.safetensors").write_bytes(whole[:-40])
    execute(profile, RUN, again, progress=False)
    assert read_log(log) == never_killed
    changed = parse_profile(profile_data(text, depth=3), "test.yaml")
    log.unlink()
    _, log, folder = started_again(tmp_path, root, text, "stop")
    for path in again.glob("results/test/runs/*"):
        path.unlink()
    write_searches(again, changed)
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        keep = WorkingLog.keep
        patch.setattr(WorkingLog, "keep", lambda log, rows: kept.append(rows) or keep(log, rows))
        execute(changed, RUN, again, progress=False)
    assert kept == [0]


def test_random_numbers_go_on_where_they_stopped(profile, root, text, tmp_path):
    """A base with dropout draws some at every step."""
    path = profile.base_folder(root) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_dropout": 0.3}))
    never_killed = read_log(execute(profile, RUN, root, progress=False))
    _, log, folder = started_again(tmp_path, root, text, "stop")
    torch.manual_seed(77)
    execute(profile, RUN, tmp_path / "again", progress=False)
    assert read_log(log) == never_killed
    with pytest.MonkeyPatch.context() as patch:  # or this test couldn't fail
        patch.setattr(torch, "set_rng_state", lambda state: None)
        log.unlink()
        _, log, folder = started_again(tmp_path, root, text, "stop")
        execute(profile, RUN, tmp_path / "again", progress=False)
    assert read_log(log) != never_killed


def test_a_log_shorter_than_its_checkpoint_begins_again(never_killed, root, profile, text, tmp_path):
    _, log, folder = started_again(tmp_path, root, text, "stop")
    lines = (folder / "rows.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "rows.jsonl").write_bytes(b"".join(lines[:-3]))
    execute(profile, RUN, tmp_path / "again", progress=False)
    assert read_log(log) == never_killed


def test_without_need_no_checkpoint_is_written(profile, root, monkeypatch):
    written = []
    monkeypatch.setattr(resume, "write_atomic", lambda path, content: written.append(path))
    execute(profile, RUN, root, progress=False)
    assert not written  # 60 s apart, and the run is shorter
