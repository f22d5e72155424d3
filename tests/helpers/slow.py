"""A run for test_status, in a process of its own, that waits after its fourth update until it is killed.

    slow.py FOLDER RUN       FOLDER holds `data.json`, the profile
"""

import json
import sys
import time
from pathlib import Path

from ouroboros.experiment.profile import parse_profile
from ouroboros.log import WorkingLog
from ouroboros.training import resume
from ouroboros.training.run import execute

root = Path(sys.argv[1])
resume.SECONDS = 3600  # no checkpoint before that
row = WorkingLog.row


def waiting(log, update, split, metric, value):
    row(log, update, split, metric, value)
    if (update, split, metric) == (4, "train", "loss"):
        print("4 updates made", flush=True)
        time.sleep(600)


WorkingLog.row = waiting
execute(parse_profile(json.loads((root / "data.json").read_text()), "test.yaml"), sys.argv[2], root,
                 progress=False)
