"""Sweeps on this machine, through submitit; tests/slurm.sh runs the same on a SLURM cluster of one node."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from conftest import CORE, profile_data, write_searches
from synthetic import write_run

from ouroboros import cli
from ouroboros.errors import AGAIN, InputError
from ouroboros.experiment.profile import parse_profile
from ouroboros.log import read_run, read_runs
from ouroboros.training import status, sweep
from ouroboros.training.run import execute

COMMAND = Path(__file__).parent / "helpers" / "command.py"


@pytest.fixture
def small(text):
    """A profile of five runs beside its search, which is made."""
    data = profile_data(text)
    data["plan"] = [data["plan"][0], {"arms": list(CORE), "depths": [1], "seeds": [0]}]
    return data


def matrix(profile) -> list:
    return [spec for spec in profile.runs() if spec.purpose == "matrix"]


def test_two_sweeps_at_once_make_every_run_once_as_one_process_would(small, root):
    """While logs are read again and again, as `reproduce` reads them: none is ever half there."""
    profile = parse_profile(small, "t")
    assert len(matrix(profile)) == 5
    (root / "data.json").write_text(json.dumps(small))
    other = subprocess.Popen([sys.executable, str(COMMAND), str(root), "runs", "--purpose", "matrix", "--jobs", "1"],
                             stderr=subprocess.PIPE, text=True)
    jobs = root / ".cache/jobs/test"
    while not jobs.exists() and other.poll() is None:  # its sweep has begun; its job has yet to import torch
        time.sleep(0.05)
    seen, over = [0], threading.Event()

    def read() -> None:
        while not over.wait(0.1):
            seen.append(len(read_runs(profile.folder(root))))

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read)
        try:
            sweep.run_missing(profile, root, 1, "matrix")
            _, err = other.communicate(timeout=900)
        finally:  # or the pool would wait for its reader
            over.set()
            other.kill()  # nothing, where it has ended
        reading.result()  # what it raised
    assert other.returncode == 0, err
    assert seen == sorted(seen) and len(set(seen)) > 1
    assert not sweep.missing(profile, root, "matrix")
    for spec in matrix(profile):
        made = read_run(profile.run_path(spec.id, root))  # whole: two at once would have broken the seal
        alone = execute(profile, spec.id, root, root / "alone" / f"{spec.id}.jsonl", progress=False)
        assert made.log.equals(read_run(alone).log)
    assert len(list((root / ".cache/jobs/test").iterdir())) == 2  # a folder for each sweep


def test_what_stops_a_job_is_said_in_one_line(small, root):
    small["evaluation"]["final_blocks"] = 10**6
    profile = parse_profile(small, "t")
    write_searches(root, profile)
    with pytest.raises(InputError, match="corpus: split .* are asked for") as error:
        sweep.run_missing(profile, root, 1, "matrix")
    assert "\n" not in str(error.value)


def test_the_plans_order_is_kept_and_an_arm_that_waits_holds_no_other_up(text, root, monkeypatch):
    data = profile_data(text)
    data["plan"] = [{"arms": ["static", "none", "cut"], "depths": [2], "seeds": [0]}, *data["plan"][:1]]
    profile, made = parse_profile(data, "t"), []
    for rate in (1e-3, 1e-2, 3e-2):
        profile.run_path(f"static-d2-r4-corrected-s9-lr{rate:g}", root).unlink()

    def make(worker, spec):
        made.append(spec.id)
        write_run(root, profile, spec, 1.0 if spec.rate == 1e-2 else 2.0)
        return True

    monkeypatch.setattr(sweep.Worker, "_make", make)
    assert sweep.Worker(profile, root, None, "local")() is None
    # none and cut needn't wait; static comes as soon as its search has ended, the step outward included
    assert made == ["none-d2-corrected-s0", "cut-any-s0", "static-d2-r4-corrected-s9-lr0.001",
                    "static-d2-r4-corrected-s9-lr0.01", "static-d2-r4-corrected-s9-lr0.03", "static-d2-r4-corrected-s0"]


def test_what_waits_for_a_search_that_nobody_makes_ends_the_sweep_in_one_line(small, root):
    profile = parse_profile(small, "t")
    profile.run_path("static-d2-r4-corrected-s9-lr0.01", root).unlink()
    with pytest.raises(InputError, match="1 runs are left, 'static-d1-r4-corrected-s0' first"):
        sweep.run_missing(profile, root, 1, "matrix")
    assert len(sweep.missing(profile, root, "matrix")) == 1


def test_a_job_that_is_killed_is_said_and_the_next_sweep_goes_on(small, root, monkeypatch):
    profile = parse_profile(small, "t")
    kill = sweep._wait

    def killing(ready, jobs, cluster):
        while jobs and not (children := psutil.Process(int(jobs[0].job_id)).children()):
            time.sleep(0.1)
        if jobs:
            children[0].kill()
        kill(ready, jobs, cluster)

    monkeypatch.setattr(sweep, "_wait", killing)
    with pytest.raises(InputError, match="was killed"):
        sweep.run_missing(profile, root, 1, "matrix")
    monkeypatch.setattr(sweep, "_wait", kill)
    sweep.run_missing(profile, root, 1, "matrix")
    assert not sweep.missing(profile, root, "matrix")


def test_sigterm_saves_every_run_under_way(small, root):
    """Of runs so slow that none ends before the signal. How a saved run goes on is test_resume.py's."""
    small["training"] |= {"updates": 400, "micro_batch": 1, "accumulation": 1, "block": 16}
    small["evaluation"]["points"] = 400
    (root / "data.json").write_text(json.dumps(small))
    profile = parse_profile(small, "t")
    write_searches(root, profile)
    process = subprocess.Popen([sys.executable, str(COMMAND), str(root), "runs", "--purpose", "matrix"],
                               stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 300

    def under_way() -> int:
        return sum(s.update > 0 and s.state == "running" for s in status.status(profile, root))

    while under_way() < 2 and time.time() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == AGAIN, err
    assert err.splitlines()[-1] == ("stopped: asked to stop, the state of the runs under way is saved; run the same "
                                    "command again")
    found = list(status.status(profile, root))
    saved = [s.run for s in found if s.state == "interrupted"]
    assert len(saved) == 2 and not [s for s in found if s.state == "running"]
    assert all((profile.unfinished(run, root) / "checkpoint.safetensors").exists() for run in saved)


def test_what_is_asked_of_slurm_is_what_the_profile_says(small, root, tmp_path, monkeypatch):
    """The script that sbatch would get; no cluster is at hand here."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("srun", "sbatch"):
        (commands / name).write_text("#!/bin/sh\n[ $(basename $0) = srun ] || { cp $1 $SCRIPT; "
                                     "echo Submitted batch job 7; }\n")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("SCRIPT", str(tmp_path / "script"))
    small["resources"] |= {"gpus": 2, "cpus": 3, "memory_gb": 5, "minutes": 77, "partition": "fast"}
    profile = parse_profile(small, "t")
    executor = sweep._executor(profile, root, "slurm")
    sweep._submit(executor, sweep.Worker(profile, root, "matrix", "slurm"), 4, 2)
    lines = set((tmp_path / "script").read_text().splitlines())
    assert {f"#SBATCH --{line}" for line in ("array=0-3%4", "gpus-per-node=2", "cpus-per-task=3", "mem=5GB", "time=77",
                                             "partition=fast", "requeue", "signal=USR2@120")} <= lines


def test_without_slurm_it_is_refused_in_one_line(small, root, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(cli, "load_profile", lambda name: parse_profile(small, "t"))
    assert cli.main(["runs", "--purpose", "matrix", "--cluster", "slurm"], root) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("error: cluster 'slurm'") and "srun" in err


def test_a_sweep_waits_for_the_runs_of_another_one_and_says_what_is_left(small, root, monkeypatch):
    profile = parse_profile(small, "t")
    *others, last = matrix(profile)
    for spec in others:
        write_run(root, profile, spec, 4.0)
    monkeypatch.setattr(sweep, "_submit", lambda *_: [])  # its own jobs have nothing to do
    with status.hold("test", last.id, root):  # as a job of another sweep would hold it; then it lets go
        asked = []

        def elsewhere(*args):
            asked.append(args)
            return len(asked) < 3
        monkeypatch.setattr(sweep, "is_running", elsewhere)
        with pytest.raises(InputError, match=f"1 runs are left, '{last.id}' first"):
            sweep.run_missing(profile, root, 1, "matrix")
    assert len(asked) == 3


def test_local_jobs_take_the_gpus_in_turn(root, monkeypatch, small):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    seen = []
    monkeypatch.setattr("submitit.AutoExecutor.submit", lambda executor, worker: seen.append(worker))
    monkeypatch.setattr(sweep, "missing", lambda *_: [])
    profile = parse_profile(small | {"resources": {"gpus": 2}}, "t")
    executor, worker = sweep._executor(profile, root, "local"), sweep.Worker(profile, root, "matrix", "local")
    sweep._submit(executor, worker, 3, gpus=2)
    assert [job.gpus for job in seen] == ["4,6", "7,4", "6,7"]
    assert seen[1]() is None and os.environ["CUDA_VISIBLE_DEVICES"] == "7,4"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    with pytest.raises(InputError, match="field 'resources.gpus': 4, but 3 can be seen"):
        sweep._submit(executor, worker, 1, gpus=4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8932f937")
    with pytest.raises(InputError, match="CUDA_VISIBLE_DEVICES 'GPU-8932f937': .* by number"):
        sweep._submit(executor, worker, 1, gpus=1)
