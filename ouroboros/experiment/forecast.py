"""What the runs of a plan need before they are made: hours, memory, disk, entry by entry. Never imports torch."""

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from .arms import ARMS
from .cost import BYTES, FLOAT32, Cost, Shape
from .plan import RunSpec
from .profile import Profile
from .protocol import DRAWN_DEPTHS
from .schema import Entry

DOCUMENT_TOKENS = 1000  # of a hub's document; FineWeb-edu's sample-10BT has 9.67 million documents of 10e9 tokens
LOSS_BYTES = 10  # of a block's loss in a log
NUMBER_BYTES = 20  # of any other number there


@dataclass(frozen=True)
class Speed:
    """FLOPs a second that one run sustains in its updates and in its evaluations, and how that is known."""

    updates: float
    evaluations: float
    known: str


def update_flops(spec: RunSpec, profile: Profile) -> float:
    """FLOPs of what a run learns from: its updates, or a closed form's passes through the full model."""
    training = profile.at(spec).training
    tokens = training.updates * training.tokens_per_update
    if spec.trained:
        return tokens * _mean(Cost.of(profile, spec.arm, spec.rank).training, _depths(spec), training.block)
    return tokens * Cost.of(profile, "full").forward(1, training.block) if spec.fit == "least squares" else 0.0


def evaluation_flops(spec: RunSpec, profile: Profile) -> float:
    """FLOPs of a run's evaluations: during training and at the end."""
    cost, training, evaluation = Cost.of(profile, spec.arm, spec.rank), profile.training, profile.evaluation
    each = training.block * _mean(cost.forward, _depths(spec), training.block)
    if spec.chooses:
        return evaluation.others * each
    blocks = _final_blocks(profile) if spec.purpose == "matrix" else evaluation.final_blocks + evaluation.others
    if spec.trained:
        blocks += evaluation.points * evaluation.blocks
    if spec.seed not in (profile.probes.seeds or (spec.seed,)):
        return blocks * each
    if ARMS[spec.arm].modulation == "controller":  # as trained, 3 interventions, own and other future
        blocks += 6 * profile.probes.blocks
    total = blocks * each
    if spec.depth in (profile.depth, "mixed"):
        others = training.block * _mean(cost.forward, profile.probes.depths, training.block)
        total += len(profile.probes.depths) * profile.probes.blocks * others
    return total


def _final_blocks(profile: Profile) -> int:
    """Blocks scored at the end of a run: held-out, new, each other split's, and the stream's."""
    evaluation = profile.evaluation
    return (evaluation.final_blocks + (1 + len(profile.corpus.unseen)) * evaluation.others
            + evaluation.stream_batches * profile.training.micro_batch)


def _depths(spec: RunSpec) -> tuple[int, ...]:
    return DRAWN_DEPTHS if spec.depth == "mixed" else (spec.depth or 1,)


def _mean(flops: Callable[[int, int], int], depths: tuple[int, ...], block: int) -> float:
    return sum(flops(depth, block) for depth in depths) / len(depths)


def seconds(spec: RunSpec, profile: Profile, speed: Speed) -> float:
    """How long one run takes."""
    return update_flops(spec, profile) / speed.updates + evaluation_flops(spec, profile) / speed.evaluations


def memory(spec: RunSpec, profile: Profile) -> int:
    """Bytes that a run holds at its peak, the base that it is cut from not counted."""
    cost, training = Cost.of(profile, spec.arm, spec.rank), profile.training
    if not spec.trained:
        return cost.frozen() * BYTES[profile.base.dtype]
    return cost.memory(max(_depths(spec)), training.micro_batch * training.block, profile.base.dtype)


def disk(specs: list[RunSpec], profile: Profile) -> dict[str, int]:
    """Bytes on disk: the base, the tokens of the corpus (where its size isn't known, of what a run trains on), and of
    all runs together the logs and the trained tensors."""
    training, corpus = profile.training, profile.corpus
    tokens = training.updates * training.tokens_per_update
    if corpus.documents:
        tokens = corpus.documents * DOCUMENT_TOKENS * sum(map(len, corpus.sources.values()))
    trained = [spec for spec in specs if spec.trained]
    blocks = _final_blocks(profile)
    return {"base": Shape.of(profile).parameters(Shape.of(profile).layers) * BYTES[profile.base.dtype],
            "tokens": tokens * FLOAT32,
            "trained tensors": FLOAT32 * sum(sum(Cost.of(profile, s.arm, s.rank).trainable().values()) for s in
            trained), "raw logs": sum(profile.at(spec).training.updates * NUMBER_BYTES + 2 * blocks * LOSS_BYTES for
            spec in trained)}


def forecast(profile: Profile, missing: list[RunSpec], speed: Speed, jobs: int) -> str:
    """What the missing runs need, a line an entry of the plan in its order with a running sum: for `runs --dry-run`."""
    left, rows, total = set(missing), [], 0.0
    for number, entry in enumerate(profile.plan, 1):
        specs = [spec for spec in profile.runs_of(entry) if spec in left]
        left -= set(specs)
        if specs:
            hours = [seconds(spec, profile, speed) / 3600 for spec in specs]
            total += sum(hours) / jobs
            rows.append({"entry": number, "runs": len(specs), "hours": sum(hours) / jobs, "sum": total,
                         "longest run": max(hours), "GB": max(memory(spec, profile) for spec in specs) / 1e9,
                         "what": _words(entry)})
    stored = disk(missing, profile)
    return (f"{pd.DataFrame(rows).to_markdown(index=False, tablefmt='plain', floatfmt='.3g')}\n\n"
            f"{len(missing)} runs are missing, made in this order\n"
            f"time: {total:,.3g} hours with {jobs} {'job' if jobs == 1 else 'jobs'} at once, "
            f"{speed.updates / 1e12:.3g} TFLOP/s in updates and {speed.evaluations / 1e12:.3g} in evaluations "
            f"({speed.known}){_base_words(profile, speed)}\n"
            f"memory: at most {max(row['GB'] for row in rows):.3g} GB a run, the base that it is cut from not counted\n"
            f"disk: {sum(stored.values()) / 1e9:,.3g} GB: "
            + ", ".join(f"{name} {size / 1e9:.3g}" for name, size in stored.items()))


def _words(entry: Entry) -> str:
    """An entry in few words."""
    parts = [entry.purpose if entry.purpose != "matrix" else "", " ".join(entry.arms),
             f"depth {' '.join(map(str, entry.depths))}" if entry.depths else "",
             f"rank {' '.join(map(str, entry.ranks))}" if entry.ranks else "", " ".join(entry.protocols),
             f"seed {' '.join(map(str, entry.seeds))}", f"{entry.updates} updates" if entry.updates else ""]
    return ", ".join(part for part in parts if part)


def _base_words(profile: Profile, speed: Speed) -> str:
    recipe, shape = profile.base.pretraining, Shape.of(profile)
    if not recipe or profile.base_of:
        return ""
    forward = shape.layers * shape.layer_flops(recipe.block) + shape.head_flops
    hours = 3 * forward * recipe.updates * recipe.batch * recipe.block / speed.updates / 3600
    return f"; before them make base PROFILE={profile.name}, {hours:.3g} hours unless it is there"
