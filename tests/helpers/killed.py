"""Runs for test_resume, in processes that are killed: never imported by a test, forked before torch computes.

    killed.py FOLDER kills SEED N   one run, killed by SIGKILL at random points again and again, then left to finish
    killed.py FOLDER stop           one run that gets SIGTERM; exits as the command line does

FOLDER holds `data.json`, the profile. The run's id is RUN.
"""

import json
import os
import random
import signal
import sys
from pathlib import Path

from ouroboros import log as runlog
from ouroboros.errors import AGAIN, Preempted
from ouroboros.experiment.profile import parse_profile
from ouroboros.training import resume
from ouroboros.training.run import execute

RUN = "controller-dmixed-r4-released-s0"
root = Path(sys.argv[1])
profile = parse_profile(json.loads((root / "data.json").read_text()), "test.yaml")
resume.SECONDS = 0  # a checkpoint at every update


class Die:
    """Counts what happens to files and dies, without any cleaning up, when the count is reached."""

    def __init__(self, at: int | None):
        self.at, self.count = at, 0

    def event(self) -> None:
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self) -> None:
        row, replace, fdopen = runlog.WorkingLog.row, os.replace, os.fdopen

        def half_a_row(log, *args):
            self.event()
            log._file.write('{"update": 1, "tok')
            log._file.flush()
            self.event()  # in the middle of a row
            os.truncate(log.path, os.path.getsize(log.path) - 18)
            row(log, *args)

        def slow_replace(source, target):
            self.event()  # written, not in place
            replace(source, target)
            self.event()

        def half_a_file(handle, mode):
            file = fdopen(handle, mode)
            write = file.write

            def halves(content):
                write(content[:len(content) // 2])
                file.flush()
                self.event()  # in the middle of a checkpoint or manifest
                write(content[len(content) // 2:])

            return type("File", (), {"__enter__": lambda s: s, "__exit__": lambda s, *a: file.close(),
                                     "write": lambda s, content: halves(content)})()

        runlog.WorkingLog.row, os.replace, os.fdopen = half_a_row, slow_replace, half_a_file


def child(at: int | None) -> tuple[int, int]:
    """Make the run in a process of its own; its wait status, and how many events there were if it wasn't killed."""
    pid = os.fork()
    if pid == 0:
        die = Die(at)
        die.watch()
        execute(profile, RUN, root, progress=False)
        (root / "events").write_text(str(die.count))
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    return status, int((root / "events").read_text()) if status == 0 else 0


if sys.argv[2] == "kills":
    generator, kills, beyond = random.Random(int(sys.argv[3])), 0, 0
    while kills < int(sys.argv[4]):
        status, _ = child(generator.randrange(1, 90))
        if status == 0:  # it was through before its time: once more from nothing
            profile.run_path(RUN, root).unlink()
            continue
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        kills += 1
        beyond += (profile.unfinished(RUN, root) / "checkpoint.safetensors").exists()
    assert child(None)[0] == 0
    print(json.dumps({"kills": kills, "with a checkpoint": beyond}))
else:
    rows, row = [], runlog.WorkingLog.row

    def terminated(log, *args):
        rows.append(args)
        if len(rows) == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        row(log, *args)

    runlog.WorkingLog.row = terminated
    resume.SECONDS = 3600  # asked to stop, it saves at once
    try:
        execute(profile, RUN, root, progress=False)
    except Preempted as stopped:
        print(stopped)
        sys.exit(AGAIN)
