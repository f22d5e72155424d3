"""command.py, whose run waits after its fifth update until it is asked to stop: held.py FOLDER run RUN"""

import signal
import sys
import time

from command import given

from ouroboros.log import WorkingLog

row = WorkingLog.row


def waiting(log, update, split, metric, value):
    if (update, split, metric) != (5, "train", "loss"):
        row(log, update, split, metric, value)
        return
    asked, stop = [], signal.getsignal(signal.SIGTERM)  # before the row is seen: no signal is missed
    signal.signal(signal.SIGTERM, lambda *of: (asked.append(of), stop(*of)))
    row(log, update, split, metric, value)
    while not asked:
        time.sleep(0.01)


WorkingLog.row = waiting
sys.exit(given(*sys.argv[1:]))
