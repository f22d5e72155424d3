"""What a killed run needs to go on: one file, written whole or not at all, without pickles."""

import json
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from .errors import Preempted
from .runlog import RunLog, write_atomic

SECONDS = 60.0  # between two checkpoints; a kill loses no more than that


@contextmanager
def asked_to_stop():
    """Yields a function that says whether SIGTERM has come since; the handler before it is put back."""
    asked = []
    before = signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGTERM, before)


class Checkpoints:
    """The checkpoint of one run: trained tensors, the optimizer's moments, and where log, data and depths stand.

    `run` says which run it is (id, configuration, commit): a checkpoint of another one is not gone on from. `stop` says
    whether the run was asked to stop.
    """

    def __init__(self, path: Path, run: dict, stop=lambda: False):
        self.path, self.run, self.stop = path, run, stop
        self._last = time.monotonic()

    @torch.no_grad()
    def restore(self, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, log: RunLog) -> dict | None:
        """Go back to the checkpoint, the log too; returns what `at_update` was given, None for a run from the start."""
        try:
            with safe_open(self.path, "pt") as file:
                state = json.loads(file.metadata()["state"])
                if state["run"] == self.run and log.keep(state["rows"]):
                    for key in file.keys():  # noqa: SIM118 (no mapping)
                        kind, name = key.split("/", 1)
                        if kind == "trained":
                            trained[name].copy_(file.get_tensor(key))
                        else:
                            device = "cpu" if kind == "step" else trained[name].device
                            optimizer.state[trained[name]][kind] = file.get_tensor(key).to(device, copy=True)
                    return state
        except (FileNotFoundError, SafetensorError):
            pass
        log.keep(0)
        return None

    def at_update(self, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, log: RunLog,
                  **state) -> None:
        """Save if a checkpoint is due or the run was asked to stop; then raises Preempted."""
        if not self.stop() and time.monotonic() - self._last < SECONDS:
            return
        tensors = {f"trained/{name}": parameter.detach() for name, parameter in trained.items()}
        for name, parameter in trained.items():
            tensors |= {f"{kind}/{name}": value for kind, value in optimizer.state[parameter].items()}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        state |= {"run": self.run, "rows": log.rows}
        write_atomic(self.path, safetensors.torch.save(tensors, metadata={"state": json.dumps(state)}))
        self._last = time.monotonic()
        if self.stop():
            raise Preempted(f"{self.run['id']}: asked to stop, its state is saved; run the same command again")
