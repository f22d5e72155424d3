"""What a killed run needs to go on: one file, written whole or not at all, without pickles."""

import json
import signal
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..errors import Preempted
from ..log import WorkingLog, write_atomic
from ..model.checkpoint import sha256

SECONDS = 60.0  # between two checkpoints; a kill loses no more than that
SIGNALS = (signal.SIGTERM, signal.SIGUSR2)  # what clusters send before they kill


@contextmanager
def asked_to_stop():
    """Yields a function: the signal of SIGNALS that has come since, or 0; the handlers before are put back."""
    asked = []
    before = {number: signal.signal(number, lambda number, frame: asked.append(number)) for number in SIGNALS}
    try:
        yield lambda: max(asked, key=[signal.SIGTERM, signal.SIGUSR2].index, default=0)  # after the latter, requeue
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _generators() -> dict[str, torch.Tensor]:
    """The states of torch's random numbers: nothing draws any, unless the base has dropout."""
    found = {"random/cpu": torch.get_rng_state()}
    return found | ({"random/cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {})


class Checkpoints:
    """The checkpoint of one run: trained tensors, the optimizer's moments, and where log, data and depths stand.

    `run` says which run it is (id, configuration, code, packages): checkpoints of other runs are ignored. `stop` says
    which signal asked the run to stop, 0 for none; `began` is told at which update the run begins or goes on.
    """

    def __init__(self, path: Path, run: dict, stop: Callable[[], int] = lambda: 0,
                 began: Callable[[int], None] = lambda update: None):
        self.path, self.run, self.stop, self.began = path, run, stop, began
        self._last = time.monotonic()

    @torch.no_grad()
    def restore(self, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer,
                log: WorkingLog) -> dict | None:
        """Go back to the checkpoint, the log too; returns what `save` was given, None for a run from the start.

        A checkpoint of another run, or a broken one, is removed.
        """
        state = self._read(trained, optimizer, log)
        if state is None:
            log.keep(0)
            self.path.unlink(missing_ok=True)
        self.began(state["update"] if state else 0)
        return state

    def _read(self, trained, optimizer, log) -> dict | None:
        try:
            with safe_open(self.path, "pt") as file:
                state = json.loads(file.metadata()["state"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        except (FileNotFoundError, SafetensorError, UnicodeDecodeError, ValueError):
            return None
        if state["run"] != self.run or state["sha256"] != sha256(tensors) or not log.keep(state["rows"]):
            return None
        for key, tensor in tensors.items():
            kind, name = key.split("/", 1)
            if kind == "trained":
                trained[name].copy_(tensor)
            elif kind == "random":
                (torch.set_rng_state if name == "cpu" else torch.cuda.set_rng_state)(tensor)
            else:
                device = "cpu" if kind == "step" else trained[name].device
                optimizer.state[trained[name]][kind] = tensor.to(device, copy=True)
        return state

    def due(self) -> bool:
        """Whether the last checkpoint is old enough for another."""
        return time.monotonic() - self._last >= SECONDS

    def save(self, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, log: WorkingLog,
             **state) -> None:
        """Write the checkpoint; `state` is what `restore` gives back."""
        tensors = {f"trained/{name}": parameter.detach() for name, parameter in trained.items()}
        for name, parameter in trained.items():
            tensors |= {f"{kind}/{name}": value for kind, value in optimizer.state[parameter].items()}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in (tensors | _generators()).items()}
        # the hash: safetensors reads damaged values as any other
        state |= {"run": self.run, "rows": log.rows, "sha256": sha256(tensors)}
        write_atomic(self.path, safetensors.torch.save(tensors, metadata={"state": json.dumps(state)}))
        self._last = time.monotonic()

    def preempted(self) -> Preempted:
        """What to raise once the state is saved."""
        return Preempted(f"{self.run['id']}: asked to stop, its state is saved; run the same command again",
                         self.stop() or signal.SIGTERM)  # another process of the run may be the one that was asked
