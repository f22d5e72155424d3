"""Data parallel runs through `accelerate launch`: the same losses, the same data, one log."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import profile_data, write_searches

from ouroboros.experiment.profile import parse_profile
from ouroboros.log import read_run
from ouroboros.training.run import execute

COMMAND = Path(__file__).parent / "helpers" / "command.py"
TOLERANCE = 1e-5  # nats per token


def launch(root, processes: int, *arguments) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes),
         "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
         str(COMMAND), str(root), *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.fixture
def data(text, root):
    data = profile_data(text)
    data["training"] |= {"micro_batch": 1, "accumulation": 4}
    data["plan"].append({"arms": ["controller"], "depths": [2], "protocols": ["corrected+depth"], "seeds": [0]})

    def write(**changes):
        data["training"] |= changes
        (root / "data.json").write_text(json.dumps(data))
        profile = parse_profile(data, "test.yaml")
        write_searches(root, profile)
        return profile
    return write


@pytest.mark.parametrize("run", ["controller-d2-r4-corrected-s0", "controller-dmixed-r4-corrected+depth-s0"])
def test_two_processes_give_the_log_of_one(data, root, run):
    profile = data()
    process = launch(root, 2, "run", run)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    two = read_run(profile.run_path(run, root))
    assert two.manifest["processes"] == 2
    one = read_run(execute(profile, run, root, root / "one" / f"{run}.jsonl", progress=False))
    assert one.manifest["processes"] == 1
    keys = ["update", "split", "metric"]
    assert two.log[keys].equals(one.log[keys])
    losses = one.log["metric"].str.contains("loss")
    for a, b in zip(one.log["value"][losses], two.log["value"][losses], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE)
    assert one.log["value"][losses].iloc[0] != one.log["value"][losses].iloc[-1]


def test_micro_batches_that_cannot_be_shared_are_refused_in_one_line(data, root):
    profile = data(accumulation=3)
    process = launch(root, 2, "run", "none-d2-corrected-s0")
    out, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and "3 micro-batches can't be shared by 2 processes" in out
    assert not profile.run_path("none-d2-corrected-s0", root).exists()


def test_two_processes_stop_together_and_go_on_as_if_never_stopped(data, root):
    profile, run = data(updates=120, block=8, accumulation=2), "static-d2-r4-corrected-s0"
    folder, path = profile.unfinished(run, root), profile.run_path(run, root)
    process = launch(root, 2, "run", run)
    deadline = time.time() + 90
    while time.time() < deadline and not ((folder / "rows.jsonl").exists() and '"update": 5' in
                                          (folder / "rows.jsonl").read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=90)
    assert process.returncode != 0 and (folder / "checkpoint.safetensors").exists(), out
    again = launch(root, 2, "run", run)
    out, _ = again.communicate(timeout=120)
    assert again.returncode == 0, out
    stopped = read_run(path).series
    path.unlink()
    assert launch(root, 2, "run", run).wait(timeout=120) == 0
    assert read_run(path).series == stopped
    assert len(stopped["train", "loss"].updates) == profile.training.updates == 120
