"""Data parallel runs through `accelerate launch`: the same losses, the same data, one log."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import profile_data, write_searches

from ouroboros.experiment.profile import parse_profile
from ouroboros.log import read_run
from ouroboros.training.run import execute

COMMAND, HELD = (Path(__file__).parent / "helpers" / f"{name}.py" for name in ("command", "held"))
PATIENCE = 900  # seconds, for what hangs: a slow machine takes a minute and more only to start two processes
RUNS = ("controller-d2-r4-corrected-s0", "controller-dmixed-r4-corrected+depth-s0")
TOLERANCE = 1e-5  # nats per token


def launch(processes: int, *arguments, script: Path = COMMAND) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes),
         "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
         str(script), *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"})


def said(process: subprocess.Popen) -> str:
    """What a launch said, once it has ended; one that hangs is killed with its ranks, or it would slow what follows."""
    try:
        return process.communicate(timeout=PATIENCE)[0]
    except subprocess.TimeoutExpired:
        launcher = psutil.Process(process.pid)
        for each in (*launcher.children(recursive=True), launcher):
            each.kill()
        raise


def data_of(text, **training) -> dict:
    data = profile_data(text)
    data["training"] |= {"micro_batch": 1, "accumulation": 4, **training}
    data["plan"].append({"arms": ["controller"], "depths": [2], "protocols": ["corrected+depth"], "seeds": [0]})
    return data


def written(folder, data: dict):
    """The profile, in a folder with its searches."""
    (folder / "data.json").write_text(json.dumps(data))
    profile = parse_profile(data, "test.yaml")
    write_searches(folder, profile)
    return profile


@pytest.fixture(scope="module")
def launched(text, root_of, tmp_path_factory):
    """What one launch of two processes leaves and says: RUNS in a folder, then in another one a run of three
    micro-batches. Starting processes is what takes long."""
    plain = root_of(parse_profile(profile_data(text), "test.yaml"))
    root, odd = (shutil.copytree(plain, tmp_path_factory.mktemp(name), dirs_exist_ok=True) for name in ("root", "odd"))
    written(root, data_of(text))
    written(odd, data_of(text, accumulation=3))
    commands = [*((str(root), "run", run, ",") for run in RUNS), (str(odd), "run", "none-d2-corrected-s0")]
    process = launch(2, *itertools.chain(*commands))
    out = said(process)
    return root, odd, process.returncode, out


@pytest.mark.parametrize("run", RUNS)
def test_two_processes_give_the_log_of_one(launched, text, run):
    root, _, _, out = launched
    profile = parse_profile(data_of(text), "test.yaml")
    assert profile.run_path(run, root).exists(), out
    two = read_run(profile.run_path(run, root))
    assert two.manifest["processes"] == 2
    one = read_run(execute(profile, run, root, root / "one" / f"{run}.jsonl", progress=False))
    assert one.manifest["processes"] == 1
    keys = ["update", "split", "metric"]
    assert two.log[keys].equals(one.log[keys])
    losses = one.log["metric"].str.contains("loss")
    for a, b in zip(one.log["value"][losses], two.log["value"][losses], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE)
    assert max(one.last(*key) for key in one.series if key[1].startswith("moved/")) > 0.9  # it did train


def test_micro_batches_that_cannot_be_shared_are_refused_in_one_line(launched):
    _, odd, code, out = launched
    assert code != 0 and "3 micro-batches can't be shared by 2 processes" in out
    assert not (odd / "results/test/runs/none-d2-corrected-s0.jsonl").exists()


def test_two_processes_stop_together_and_go_on_as_if_never_stopped(text, root, tmp_path_factory):
    profile, run = written(root, data_of(text, updates=12, block=8, accumulation=2)), "static-d2-r4-corrected-s0"
    whole = shutil.copytree(root, tmp_path_factory.mktemp("whole"), dirs_exist_ok=True)
    folder = profile.unfinished(run, root)
    process = launch(2, str(root), "run", run, script=HELD)
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline and not (
            (folder / "rows.jsonl").exists() and '"update": 5' in (folder / "rows.jsonl").read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out = said(process)
    assert process.returncode != 0 and (folder / "checkpoint.safetensors").exists(), out
    again = launch(2, str(root), "run", run, ",", str(whole), "run", run)
    out = said(again)
    assert again.returncode == 0, out
    stopped, never = (read_run(profile.run_path(run, place)).series for place in (root, whole))
    assert stopped == never
    assert len(stopped["train", "loss"].updates) == profile.training.updates == 12
