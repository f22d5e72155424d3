"""Raw logs with known numbers, for tests of the analysis; nothing made of them is ever a result."""

import math
from pathlib import Path

import numpy as np

from ouroboros.experiment.arms import ARMS, PROJECTIONS
from ouroboros.experiment.learning_rates import planned, read_searches
from ouroboros.experiment.plan import RunSpec
from ouroboros.experiment.profile import load_profile
from ouroboros.experiment.protocol import PROTOCOL_VERSION, switches
from ouroboros.log import write_run as write_log

SPLITS = ("train", "heldout", "foreign", "stream", "reference")  # and newer, of a profile that has it


def loss(arm: str, depth: int | str | None, protocol: str, seed: int) -> float:
    """As the paper reports it: full < Controller < static (most at depth 1) < cut < gateless; seeds differ a little."""
    depth = 8 if depth == "mixed" else depth
    base = {"full": 2.0, "cut": 6.0, "controller": 4.0, "static": depth and 4.0 + 1.0 / depth, "none": 5.5,
            "controller_nogate": 6.5, "static_nogate": 6.6, "none_nogate": 6.7, "none_nonorm": 5.8,
            "controller_nonorm": 5.6, "static_nonorm": 5.7, "controller_nogate_nonorm": 7.0, "static_wide": 4.4,
            "controller_blind": 4.3, "controller_other": 4.3, "lora": 3.5, "full_lora": 1.5, "lora_layer": 3.0,
            "linear_fit": 5.0, "linear": 4.5, "controller_matched": 3.9, "static_matched": 4.1, "none_matched": 5.4,
            "affine": 5.8, "bare": 6.2, "unigram": 7.5, "bigram": 7.2, "bigram_seen": 7.4,
            "refine": 3.0, "refine_nogate": 6.5, "refine_base": 6.3,
            **dict.fromkeys(("untrained", "untrained_matched", "untrained_nonorm"), 6.4),
            **{f"cut_{ends}": 7.0 - 0.1 * ends for ends in (2, 4, 6, 10, 12)}}
    for middle in ("controller", "cut"):
        base[f"{middle}_coda_lora"] = base[middle] - 0.5
    base = base[arm]
    return base + 0.01 * seed + (0.001 * seed * (depth or 0) if arm == "static" else 0)


WHOLE = str(Path(__file__).with_name("whole.yaml"))  # the plan that `write` fills unless told otherwise
RATE = 1e-3  # that runs train at, unless a level or a search says otherwise


def manifest(spec: RunSpec, profile, **changes) -> dict:
    """A run's manifest before it is sealed."""
    trained = ARMS[spec.arm].trained
    level = next((entry.levels[spec.level] for entry in profile.plan if spec.level in entry.levels), 1.0)
    return {
        "run": spec.id, "profile": profile.name, "purpose": spec.purpose, **profile.declared(spec), "arm": spec.arm,
        "depth": spec.depth, "rank": spec.rank, "rate": (spec.rate or RATE * level) if trained else None,
        "elementwise_rate": (spec.rate or RATE * level) * (spec.factor or 1) if trained else None,
        "flops": {"forward": 10**6, "training": 3 * 10**6},
        "protocol": spec.protocol, "switches": switches(spec.protocol) if trained else None, "seed": spec.seed,
        "level": spec.level, "protocol_version": PROTOCOL_VERSION,
        "config": profile.at(spec).model_dump(mode="json", exclude={"plan", "siblings"}), "commit": "0" * 40,
        "clean": True, "lock": None, "packages": {}, "hardware": {},
        "hashes": {"corpus": profile.corpus.sha256 or "c", "tokenizer": "t", "base": "b", "trained": None},
        "trainable": 0, "trainable_parts": {}, "status": "finished", "started": "2026-01-01T00:00:00+0000",
        "wall_seconds": 1.0, **changes}


class Rows(list):
    """A log's rows in memory: hundreds of logs are written a test."""

    def row(self, update: int, split: str, metric: str, value) -> None:
        self.append({"update": int(update), "split": split, "metric": metric, "value": value})


def write_run(root: Path, profile, spec: RunSpec, value: float, status: str = "finished", **changes) -> Path:
    """One run that ends at `value` on every split: t+1 and t+2 alike, its blocks around it."""
    log, settings = Rows(), profile.at(spec).training
    updates = settings.updates if ARMS[spec.arm].trained else 0
    if updates:
        for update in range(1, updates + 1):
            log.row(update, "train", "loss", value + math.exp(-5 * update / updates))
        for update in sorted(set(np.linspace(0, updates, profile.evaluation.points).round().astype(int))):
            log.row(update, "heldout", "curve/loss_t+1", value + math.exp(-5 * update / updates))
    if status == "finished":
        blocks = profile.evaluation.stream_batches * settings.micro_batch
        newer = ("newer",) if profile.corpus.newer else ()
        splits = {"matrix": (*SPLITS, *newer), "pays": ("heldout", "dev")}.get(spec.purpose, ("dev",))
        for split in splits:
            for target in ("t+1", "t+2"):
                spread = np.linspace(-0.1, 0.1, blocks if split == "stream" else 4)
                log.row(updates, split, f"loss_{target}", value)
                log.row(updates, split, f"block_losses_{target}", (value + spread - spread.mean()).tolist())
        if ARMS[spec.arm].middle == "intact":
            log.row(updates, "model", "layer_rms", [1.0, 2.0, 4.0])
            log.row(updates, "model", "sink_rms", [1.0, 20.0, 40.0])
        if ARMS[spec.arm].loops and spec.purpose == "matrix":
            write_inside(log, profile, spec, value)
    path = profile.run_path(spec.id, root)
    write_log(path, manifest(spec, profile, status=status, **changes), log)
    return path


def write_inside(log: Rows, profile, spec: RunSpec, value: float) -> None:
    """What a run logs of its loop: the step opens the gate by a tenth more each time and changes the state by 1 / step;
    0.01 nats more for each step away from the base depth; 0.03, 0.02 and 0.01 nats by interventions; 0.04 on a block's
    first half when its second half is replaced."""
    update, depth = profile.at(spec).training.updates, 16 if spec.depth == "mixed" else spec.depth
    rows = {"steps/gate_open": [0.1 * (t + 1) for t in range(depth)], "steps/state_norm": [2.0] * depth,
            "steps/change": [1 / (t + 1) for t in range(depth)]}
    if spec.depth in (profile.depth, "mixed"):
        rows |= {f"loss_t+1/depth_{d}": value + 0.01 * abs(d - profile.depth) for d in profile.probes.depths}
    modulation = ARMS[spec.arm].modulation
    if modulation == "controller":
        rows |= {f"loss_t+1/{kind}": value + rise for kind, rise in
                 (("as_trained", 0), ("other_sequence", 0.03), ("corpus_mean", 0.02), ("step_mean", 0.01),
                  ("first_half", 0), ("first_half/other_future", 0.04))}
    if modulation != "none":
        for name in PROJECTIONS:
            inputs = [0.5 if modulation == "controller" else 0.0] * depth
            rows |= {f"modulation/size/{name}": [1.0] * depth, f"modulation/over_inputs/{name}": inputs,
                     f"modulation/over_steps/{name}": [0.25], f"modulation/update/{name}": [0.125] * depth}
        log.row(update, "model", "max_modulation", 1.5)
        log.row(update, "model", "stream_rms", [4.0])
        log.row(update, "model", "moved/recurrence.step_norm.weight", 0.0)
        log.row(update, "model", "moved/recurrence.modulation.table", 0.25)
    for metric, found in rows.items():
        log.row(update, "heldout", metric, found)


def write_searches(root: Path, profile, best: float = RATE) -> None:
    """The learning-rate searches of a profile: every arm's best rate is `best`, and no factor is better."""
    def left() -> list[RunSpec]:  # a best rate at its grid's end asks for one more
        return [spec for spec in planned(profile, read_searches(profile, root))
                if spec.purpose == "rate" and not profile.run_path(spec.id, root).exists()]

    while runs := left():
        for spec in runs:
            write_run(root, profile, spec, 4 + abs(math.log(spec.rate / best)) if spec.rate else 9.0)


def write_base(root: Path, profile) -> None:
    """The base's log."""
    log = Rows()
    for update in (0, 10, 20):
        for split in ("dev", "heldout"):
            log.row(update, split, "curve/loss_t+1", 8 - update / 5)
    made = manifest(RunSpec("full", None, None, "any", 0), profile)
    write_log(profile.base_folder(root) / "base.jsonl", {**made, "run": "base", "purpose": "base"}, log)


def plain(spec: RunSpec) -> bool:
    """Not one of the audit's, of which there are more than of all others."""
    return "+" not in spec.protocol


def write(root: Path, profile: str = WHOLE, loss=loss, keep=plain, diverged=(), base: bool = True):
    """A profile's matrix under `root`; `keep` chooses the runs that exist, `diverged` names those without a loss."""
    declared = load_profile(profile)
    for spec in filter(keep, (spec for spec in declared.runs() if spec.purpose == "matrix")):
        status = "diverged" if spec.id in diverged else "finished"
        write_run(root, declared, spec, loss(spec.arm, spec.depth, spec.protocol, spec.seed), status)
    if base:
        write_base(root, declared)
    return declared
