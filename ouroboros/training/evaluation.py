"""Losses per block, in nats per token, for both targets at once; what happens inside the loop; interventions."""

from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..experiment.arms import ARMS
from ..experiment.plan import RunSpec
from ..experiment.profile import Profile
from ..experiment.protocol import DRAWN_DEPTHS
from .corpus import LOOK_AHEAD, Corpus

TARGETS = ("t+1", "t+2")
GIVEN_DEPTH_BATCH = 8  # blocks a forward pass; where depths are drawn, a draw is per micro-batch

STREAM_SHARE = 0.01
SCANNED = 16  # blocks of dev, after those that a screen is scored on (docs/hypotheses.md)
CHUNK = 512  # tokens whose logits are held at a time; from 256 to 1024 the time is the same, the memory proportional

Hidden = Callable[[torch.Tensor, int | None], tuple[torch.Tensor, torch.Tensor]]
"""(B, T) ids, depth -> last hidden states (B, T, d) and the head's weight (V, d)."""


def targets(blocks: torch.Tensor, target: str) -> torch.Tensor:
    """(B, T + 2) tokens -> (B, T) targets of the inputs `blocks[:, :T]`: one or two ahead (protocol.md `target`)."""
    ahead = 1 + TARGETS.index(target)
    return blocks[:, ahead:blocks.shape[1] - LOOK_AHEAD + ahead]


def mean_loss(hidden: torch.Tensor, head: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """(B, T, d) hidden states, (V, d) head and (B, T) token ids -> nats per token, with gradients.

    The logits of all tokens are never held at once. torch before 2.13 has no such loss: the same by checkpointing.
    """
    hidden, flat = hidden.flatten(0, 1), wanted.flatten()
    if hasattr(F, "linear_cross_entropy"):
        return F.linear_cross_entropy(hidden, head, flat,
                                      options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK))
    return torch.cat([checkpoint(_chunk_losses, part, head, ids, use_reentrant=False)
                      for part, ids in zip(hidden.split(CHUNK), flat.split(CHUNK), strict=True)]).mean()


def _chunk_losses(hidden: torch.Tensor, head: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(hidden, head).float(), wanted, reduction="none")


@torch.no_grad()
def token_losses(hidden: torch.Tensor, head: torch.Tensor, *wanted: torch.Tensor) -> list[torch.Tensor]:
    """(B, T, d) hidden states, (V, d) head and token ids, each (B, T) -> (B, T) nats for each of the ids.

    A chunk's logits are made once for all: with a large vocabulary they are a third of an evaluation.
    """
    losses = [[] for _ in wanted]
    chunks = (ids.flatten().split(CHUNK) for ids in wanted)
    for part, *targets_of_part in zip(hidden.flatten(0, 1).split(CHUNK), *chunks, strict=True):
        logits = F.linear(part, head).float()
        log_sum = logits.logsumexp(-1)
        for found, ids in zip(losses, targets_of_part):
            found.append(log_sum - logits.gather(-1, ids[:, None])[:, 0])
    return [torch.cat(found).view(ids.shape) for found, ids in zip(losses, wanted)]


class Depths:
    """The depth of each micro-batch: the given one, or drawn uniformly from {4, 8, 16} (protocol.md `depth`)."""

    def __init__(self, depth: int | str | None, seed: int):
        self.given = None if depth == "mixed" else depth
        self.drawn = depth == "mixed"
        self.generator = np.random.default_rng(seed)

    def next(self) -> int | None:
        return int(self.generator.choice(DRAWN_DEPTHS)) if self.drawn else self.given


@torch.no_grad()
def block_losses(hidden: Hidden, blocks: np.ndarray, depths: Depths, micro_batch: int,
                 scored: tuple[str, ...] = TARGETS) -> dict[str, list[float]]:
    """Each block's mean loss under each target: {"t+1": [...], "t+2": [...]}, one entry a block of (n, T + 2)."""
    losses: dict[str, list[float]] = {target: [] for target in scored}
    for chunk in torch.from_numpy(blocks).split(micro_batch if depths.drawn else GIVEN_DEPTH_BATCH):
        chunk = chunk.long()
        states, head = hidden(chunk[:, :-LOOK_AHEAD], depths.next())
        found = token_losses(states, head, *(targets(chunk, target).to(states.device) for target in scored))
        for target, nats in zip(scored, found):
            losses[target] += nats.mean(1).tolist()
    return losses


def stream_kind(profile: Profile) -> str:
    """Which blocks stand for the released final evaluation, the `start` of the training stream or `fresh` ones
    (protocol.md `evaluation`, scaled form): the start is 0.02 % of the paper's training; where it is over 1 % of a
    run's, it would be remembered."""
    training = profile.training
    share = profile.evaluation.stream_batches * training.micro_batch / (
        training.updates * training.micro_batch * training.accumulation)
    return "fresh" if share > STREAM_SHARE else "start"


def during(profile: Profile, corpus: Corpus, spec: RunSpec) -> dict[str, np.ndarray]:
    """The token set scored during training: held-out blocks, separated, the same for every run but those that choose,
    which are scored on none."""
    if spec.chooses:
        return {}
    return {"heldout": corpus.blocks("heldout", profile.training.block, profile.evaluation.blocks, "separated")}


def final(profile: Profile, corpus: Corpus, spec: RunSpec) -> dict[str, np.ndarray]:
    """The token sets scored at the end of a run, each (blocks, T + 2): where something is chosen `dev` alone; for runs
    of docs/hypotheses.md held-out text and `dev`; for every other run what either column of the protocol reads.

    `train` is text of the training split that the run didn't train on. `stream` stands for what the released code
    scores, the first micro-batches of the training stream with documents run together; see `stream_kind`. `reference`
    is the start of a few held-out documents (protocol.md `reference`). `newer` is there where the corpus has it.
    """
    training, count = profile.training, profile.evaluation.others
    if ARMS[spec.arm].scans:  # other blocks than what it chooses is judged on
        return {"dev": corpus.blocks("dev", training.block, count + SCANNED, "separated")[count:]}
    if spec.chooses:
        return {"dev": corpus.blocks("dev", training.block, count, "separated")}
    sets = {"heldout": corpus.blocks("heldout", training.block, profile.evaluation.final_blocks, "separated")}
    if spec.purpose == "pays":  # the best is chosen on dev here too
        return sets | {"dev": corpus.blocks("dev", training.block, count, "separated")}
    sets |= {split: corpus.blocks(split, training.block, count, "separated") for split in profile.corpus.unseen}
    seen = training.updates * training.accumulation * training.micro_batch
    seen += seen // 20 + 1  # joined documents reach further into the stream than separated ones
    # a copy, or the whole stream would stay in memory
    sets["train"] = corpus.blocks("train", training.block, seen + count, "separated", spec.seed)[-count:].copy()
    stream = profile.evaluation.stream_batches * training.micro_batch
    start = seen if stream_kind(profile) == "fresh" else 0
    sets["stream"] = corpus.blocks("train", training.block, start + stream, "joined", spec.seed)[start:].copy()
    sets["reference"] = corpus.reference()
    return sets


@torch.no_grad()
def first_half_losses(hidden: Hidden, blocks: np.ndarray, depths: Depths, other_future: bool) -> list[float]:
    """Each block's mean next-token loss over its first half; with `other_future` its second half is another block's of
    the batch (see `spaced`). In a model that doesn't look ahead nothing changes (protocol.md `pooling`)."""
    half, losses = (blocks.shape[1] - LOOK_AHEAD) // 2, []
    for chunk in torch.from_numpy(blocks).split(GIVEN_DEPTH_BATCH):
        chunk = chunk.long()
        if other_future:
            chunk = torch.cat([chunk[:, :half], chunk[:, half:].roll(1, dims=0)], dim=1)
        states, head = hidden(chunk[:, :-LOOK_AHEAD], depths.next())
        wanted = chunk[:, 1:half].to(states.device)
        losses += token_losses(states[:, :half - 1], head, wanted)[0].mean(1).tolist()
    return losses


def spaced(blocks: np.ndarray, batch: int = GIVEN_DEPTH_BATCH) -> np.ndarray:
    """The blocks in an order in which those of one batch lie far from each other, so in different documents."""
    stride = -(-len(blocks) // batch)
    return np.concatenate([blocks[start::stride] for start in range(stride)])
