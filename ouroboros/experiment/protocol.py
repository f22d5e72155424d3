"""The protocol: ten switches, the schedule, the scaled-down forms; docs/protocol.md says it in words."""

import math

from ..errors import InputError
from .arms import ARMS

PROTOCOL_VERSION = 2  # what switches, arms and measures mean. 1: until 2026-11-25, see results/README.md

# {switch: (released, corrected)}.
SWITCHES: dict[str, tuple[str, str]] = {
    "target": ("t+2", "t+1"),
    "depth": ("drawn", "given"),
    "pooling": ("sequence", "causal"),
    "schedule": ("stretched", "cosine"),
    "precision": ("bfloat16", "float32"),
    "alpha": ("fixed", "scaled"),
    "packing": ("joined", "separated"),
    "evaluation": ("stream", "splits"),
    "rate": ("shared", "own"),
    "reference": ("short", "same"),
}
COLUMNS = ("released", "corrected")
READING = ("evaluation", "reference")  # switches that change what is read off a log: nothing is trained again
DRAWN_DEPTHS = (4, 8, 16)  # protocol.md `depth`: drawn uniformly at every micro-step
FINAL_SHARE = 1e-6 / 3e-4  # system.md 7 and protocol.md `schedule`: the cosine ends at 1e-6 of a peak of 3e-4
STRETCH = 16  # protocol.md `schedule`: the released horizon is 16 x the number of updates
SHARED_RATE_LIMIT = 1e-3  # protocol.md `rate`, scaled form: the Controller's best rate among those <= 1e-3


def switches(protocol: str) -> dict[str, str]:
    """The ten settings of a protocol: a column, or a column with switches flipped, as in `released+target+pooling`."""
    column, *flipped = protocol.split("+")
    unknown = [name for name in flipped if name not in SWITCHES]
    if column not in COLUMNS or unknown:
        raise InputError(f"protocol '{protocol}': unknown {'switch ' + repr(unknown[0]) if unknown else 'column'}; a "
                         f"protocol is {' or '.join(COLUMNS)}, then +switch for each of {', '.join(SWITCHES)} to flip")
    side = COLUMNS.index(column)
    return {name: values[side ^ (name in flipped)] for name, values in SWITCHES.items()}


def trained_under(protocol: str, arm: str) -> str:
    """The protocol whose runs of an arm a protocol reads: itself without the switches that change only what is read,
    and those that don't enter the arm."""
    column, *flipped = protocol.split("+")
    enters = {"depth": ARMS[arm].modulation == "controller", "pooling": ARMS[arm].reads}
    return "+".join([column, *(name for name in flipped if name not in READING and enters.get(name, True))])


def schedule(update: int, updates: int, kind: str) -> float:
    """The share of the peak rate at an update, counted from 0 (protocol.md `schedule`)."""
    warm_up = max(1, round(updates * (1 / 150 if kind == "stretched" else 0.02)))
    horizon = updates * STRETCH if kind == "stretched" else updates
    if update < warm_up:
        return (update + 1) / warm_up
    progress = (update - warm_up) / max(1, horizon - 1 - warm_up)
    return FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * progress))


def travel(rate: float, updates: int, kind: str) -> float:
    """How far an entry can move in a run: the sum of its learning rates (docs/protocol.md)."""
    return rate * sum(schedule(update, updates, kind) for update in range(updates))
