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

from ouroboros import provenance
from ouroboros.errors import AGAIN
from ouroboros.experiment.profile import parse_profile
from ouroboros.log import WorkingLog, read_run
from ouroboros.training import resume, trainer
from ouroboros.training.run import execute

RUN = "controller-dmixed-r4-released-s0"  # draws depths, rounds to bf16: all the state there is
SCRIPT = Path(__file__).parent / "helpers" / "killed.py"


def read_log(path):
    """All that a log says but when it was made, and in what time."""
    run = read_run(path)
    made = {name: value for name, value in run.manifest.items() if name not in ("started", "wall_seconds", "seal")}
    return made, dict(run.series)


def log_of(folder):
    return folder / "results/test/runs" / f"{RUN}.jsonl"


def unfinished(folder):
    """Where a run that hasn't ended has its checkpoint and what it measured."""
    return folder / "results/test/unfinished" / RUN


@pytest.fixture(scope="module")
def settings(text):
    return parse_profile(profile_data(text), "test.yaml")


@pytest.fixture(scope="module")
def never_killed(settings, root_of, tmp_path_factory):
    folder = shutil.copytree(root_of(settings), tmp_path_factory.mktemp("alone"), dirs_exist_ok=True)
    return read_log(execute(settings, RUN, folder, progress=False))


def killed(source, folder, text, *arguments):
    """Run killed.py on a copy of `source`; the finished process."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    (folder / "data.json").write_text(json.dumps(profile_data(text)))
    return subprocess.run([sys.executable, str(SCRIPT), str(folder), *arguments], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=500)


@pytest.fixture(scope="module")
def terminated(settings, root_of, text, tmp_path_factory):
    """A process that got SIGTERM, and the folder that it left: no test changes it."""
    folder = tmp_path_factory.mktemp("terminated")
    return killed(root_of(settings), folder, text, "stop"), folder


@pytest.fixture
def stopped(terminated, tmp_path):
    """A copy of that folder."""
    return shutil.copytree(terminated[1], tmp_path / "stopped")


def test_a_run_killed_at_random_points_leaves_the_log_as_it_would_have_been(never_killed, tmp_path, root, text):
    """`make audit-kill` is the long form."""
    kills = int(os.environ.get("KILLS", 4))
    done = killed(root, tmp_path / "again", text, "kills", "1", str(kills))
    assert done.returncode == 0, done.stderr
    counted = json.loads(done.stdout.splitlines()[-1])
    assert counted["kills"] == kills and counted["with a checkpoint"] >= 1
    log = log_of(tmp_path / "again")
    assert read_log(log) == never_killed
    assert not unfinished(tmp_path / "again").exists() and not [p for p in log.parent.iterdir() if p.name[0] == "."]


def test_sigterm_saves_and_says_again_and_the_same_command_goes_on(never_killed, terminated, stopped, profile):
    done, _ = terminated
    assert done.returncode == AGAIN == 75 and done.stdout.strip().endswith("run the same command again"), done.stderr
    assert (unfinished(stopped) / "checkpoint.safetensors").exists() and not log_of(stopped).exists()
    updates = []
    train = trainer.score

    def watched(*args, **kwargs):
        updates.append(args[5])
        return train(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ouroboros.training.trainer.score", watched)
        execute(profile, RUN, stopped, progress=False)
    assert read_log(log_of(stopped)) == never_killed and 0 not in updates  # it went on, it didn't begin again


def turned(content: bytes, *places: int) -> bytes:
    """Bits turned round at some places."""
    return bytes(byte ^ 0x55 if place in places else byte for place, byte in enumerate(content))


@pytest.mark.parametrize("damage", [lambda content: content[:-40], lambda content: turned(content, 20),
                                    lambda content: turned(content, *range(0x4000, len(content), 64))],
                         ids=["truncated", "the header", "tensors"])
def test_a_damaged_checkpoint_is_left(damage, never_killed, stopped, profile):
    checkpoint = unfinished(stopped) / "checkpoint.safetensors"
    checkpoint.write_bytes(damage(checkpoint.read_bytes()))
    execute(profile, RUN, stopped, progress=False)
    assert read_log(log_of(stopped)) == never_killed


def test_a_checkpoint_of_another_run_is_left(stopped, text):
    changed = parse_profile(profile_data(text, depth=3), "test.yaml")
    for path in stopped.glob("results/test/runs/*"):
        path.unlink()
    write_searches(stopped, changed)
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        keep = WorkingLog.keep
        patch.setattr(WorkingLog, "keep", lambda log, rows: kept.append(rows) or keep(log, rows))
        execute(changed, RUN, stopped, progress=False)
    assert kept == [0]


def test_the_codes_hash_is_that_of_what_makes_runs(tmp_path, monkeypatch):
    """Wherever the checkout lies, as in a folder of the name of the room that makes none."""
    package = tmp_path / "analysis" / "ouroboros"
    monkeypatch.setattr(provenance, "PACKAGE", package)
    found = []
    for name in ("training/run.py", "analysis/text.py", "training/run.py"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        with open(package / name, "a") as file:
            file.write("x = 1\n")
        found.append(provenance.code_sha256.__wrapped__())
    assert found[0] == found[1] != found[2]


def test_random_numbers_go_on_where_they_stopped(profile, root, text, tmp_path):
    """A base with dropout draws some at every step."""
    path = profile.base_folder(root) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_dropout": 0.3}))
    killed(root, tmp_path / "stopped", text, "stop")
    without = shutil.copytree(tmp_path / "stopped", tmp_path / "without")
    never_killed = read_log(execute(profile, RUN, root, progress=False))
    torch.manual_seed(77)
    execute(profile, RUN, tmp_path / "stopped", progress=False)
    assert read_log(log_of(tmp_path / "stopped")) == never_killed
    with pytest.MonkeyPatch.context() as patch:  # or this test couldn't fail
        patch.setattr(torch, "set_rng_state", lambda state: None)
        execute(profile, RUN, without, progress=False)
    assert read_log(log_of(without)) != never_killed


def test_a_log_shorter_than_its_checkpoint_begins_again(never_killed, stopped, profile):
    rows = unfinished(stopped) / "rows.jsonl"
    rows.write_bytes(b"".join(rows.read_bytes().splitlines(keepends=True)[:-3]))
    execute(profile, RUN, stopped, progress=False)
    assert read_log(log_of(stopped)) == never_killed


def test_without_need_no_checkpoint_is_written(profile, root, monkeypatch):
    written = []
    monkeypatch.setattr(resume, "SECONDS", 3600)
    monkeypatch.setattr(resume, "write_atomic", lambda path, content: written.append(path))
    execute(profile, RUN, root, progress=False)
    assert not written
