"""Base, sweep and `reproduce` killed by SIGKILL at random moments, again and again, then left to finish.

    kills.py FOLDER KILLS SEED      FOLDER holds `data.json`, a small profile; `make audit-kill` kills 100 times

Half of the kills hit a base and two workers of a sweep that run at once, in processes that are forked before torch
computes. Exits with 1 unless all that is left is what one undisturbed process leaves, but for times.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from ouroboros.analysis import pages
from ouroboros.analysis.results import Results
from ouroboros.experiment.profile import Profile, parse_profile
from ouroboros.log import read_runs
from ouroboros.training import resume
from ouroboros.training.pretraining import pretrain
from ouroboros.training.status import missing
from ouroboros.training.sweep import Worker

TIMES = ("started", "wall_seconds", "seal")


def forked(job) -> int:
    """A process that does a job; its id."""
    if pid := os.fork():
        return pid
    torch.set_num_threads(1)
    try:
        job()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def left(root: Path) -> dict[str, object]:
    """Every file below results/, {name: content}; a log without what differs from time to time."""
    found = {}
    for path in sorted((root / "results").rglob("*")):
        if path.is_file() and "unfinished" not in path.parts:
            content = path.read_bytes()
            if path.suffix == ".jsonl":
                first, *rest = content.decode().splitlines()
                manifest = {name: value for name, value in json.loads(first).items() if name not in TIMES}
                content = [manifest, *rest]
            found[str(path.relative_to(root))] = content
    return found


def killed(jobs: list, seconds: float, generator: random.Random) -> int:
    """Do jobs at once, kill each at some moment within `seconds`; how many weren't through by then."""
    at = sorted((generator.uniform(0, seconds), pid) for pid in map(forked, jobs))
    count, begun = 0, time.monotonic()
    for moment, pid in at:
        time.sleep(max(0.0, begun + moment - time.monotonic()))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status) or status == 0, "a job failed"
        count += os.WIFSIGNALED(status)
    return count


def finished(jobs: list) -> float:
    """Do jobs at once, to their ends; in how many seconds."""
    begun = time.monotonic()
    for pid in [forked(job) for job in jobs]:
        assert os.waitpid(pid, 0)[1] == 0, "a job failed"
    return time.monotonic() - begun


def main(folder: Path, kills: int, seed: int) -> int:
    profile, generator = parse_profile(json.loads((folder / "data.json").read_text()), "t"), random.Random(seed)
    resume.SECONDS = 0  # a checkpoint at every update
    alone, root, counts = folder / "alone", folder / "killed", {}
    lasted = [finished([base(profile, alone)]), finished([sweep(profile, alone)])]
    for name, jobs, seconds, wanted in (("base", [base(profile, root)], lasted[0], kills // 3),
                                        ("sweep", [sweep(profile, root)] * 2, lasted[1], kills - kills // 3)):
        counts[name] = 0
        while counts[name] < wanted:
            counts[name] += killed(jobs, seconds, generator)
            if name == "base" and (profile.base_folder(root) / "base.jsonl").exists() and counts[name] < wanted:
                shutil.rmtree(root)  # it got through: once more from nothing
            if name == "sweep" and not missing(profile, root):
                shutil.rmtree(root / "results" / "test" / "runs")
        finished(jobs[:1] if name == "base" else [*jobs, reading(profile, root)])
    differ = sorted(name for name in left(alone).keys() | left(root).keys()
                    if left(alone).get(name) != left(root).get(name))
    litter = [name for name in differ if Path(name).name.startswith(".")]  # of a file that was being written
    print(json.dumps({"kills": counts, "runs": len(profile.runs()), "files": len(left(alone)), "litter": len(litter),
                      "differ": [name for name in differ if name not in litter]}))
    return int(differ != litter)


def base(profile: Profile, root: Path):
    return lambda: pretrain(profile, root)


def sweep(profile: Profile, root: Path):
    def work():
        if said := Worker(profile, root, None, "local")():
            raise RuntimeError(said)
    return work


def reading(profile: Profile, root: Path):
    """Judges claims from what logs are there, again and again, until the sweep is through."""
    def work():
        while missing(profile, root):
            pages.markdown(Results(profile, read_runs(profile.folder(root))))
    return work


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
