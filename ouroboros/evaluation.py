"""Losses per block, in nats per token, for both targets at once."""

from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .corpus import LOOK_AHEAD, Corpus
from .experiment import DRAWN_DEPTHS, Profile

TARGETS = ("t+1", "t+2")
GIVEN_DEPTH_BATCH = 8  # blocks a forward pass; where depths are drawn, a draw is per micro-batch

CHUNK = 512  # tokens whose logits are held at a time; from 256 to 1024 the time is the same, the memory proportional

Hidden = Callable[[torch.Tensor, int | None], tuple[torch.Tensor, torch.Tensor]]
"""(B, T) ids, depth -> last hidden states (B, T, d) and the head's weight (V, d)."""


def targets(blocks: torch.Tensor, target: str) -> torch.Tensor:
    """(B, T + 2) tokens -> (B, T) targets of the inputs `blocks[:, :T]`: one or two tokens ahead (AUDIT `target`)."""
    ahead = 1 + TARGETS.index(target)
    return blocks[:, ahead:blocks.shape[1] - LOOK_AHEAD + ahead]


def token_losses(hidden: torch.Tensor, head: torch.Tensor, wanted: torch.Tensor,
                 reduction: str = "none") -> torch.Tensor:
    """(B, T, d) hidden states, (V, d) head and (B, T) token ids -> (B, T) nats, or their mean.

    The logits of all tokens are never held at once. torch before 2.13 has no such loss: the same by checkpointing.
    """
    hidden, flat = hidden.flatten(0, 1), wanted.flatten()
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK)
        losses = F.linear_cross_entropy(hidden, head, flat, reduction=reduction, options=options)
    else:
        losses = torch.cat([checkpoint(_chunk_losses, part, head, ids, use_reentrant=False)
                            for part, ids in zip(hidden.split(CHUNK), flat.split(CHUNK), strict=True)])
        losses = losses.mean() if reduction == "mean" else losses
    return losses if reduction == "mean" else losses.view(wanted.shape)


def _chunk_losses(hidden: torch.Tensor, head: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(hidden, head).float(), wanted, reduction="none")


class Depths:
    """The depth of each micro-batch: the given one, or drawn uniformly from {4, 8, 16} (AUDIT `depth`)."""

    def __init__(self, depth: int | str | None, seed: int):
        self.given = None if depth == "mixed" else depth
        self.drawn = depth == "mixed"
        self.generator = np.random.default_rng(seed)

    def next(self) -> int | None:
        return int(self.generator.choice(DRAWN_DEPTHS)) if self.drawn else self.given


@torch.no_grad()
def block_losses(hidden: Hidden, blocks: np.ndarray, depths: Depths, micro_batch: int) -> dict[str, list[float]]:
    """Each block's mean loss under each target: {"t+1": [...], "t+2": [...]}, one entry a block of (n, T + 2)."""
    losses: dict[str, list[float]] = {target: [] for target in TARGETS}
    for chunk in torch.from_numpy(blocks).split(micro_batch if depths.drawn else GIVEN_DEPTH_BATCH):
        chunk = chunk.long()
        states, head = hidden(chunk[:, :-LOOK_AHEAD], depths.next())
        for target in TARGETS:
            losses[target] += token_losses(states, head, targets(chunk, target).to(states.device)).mean(1).tolist()
    return losses


def during(profile: Profile, corpus: Corpus) -> dict[str, np.ndarray]:
    """The token sets scored during training: a few blocks of each split, separated, the same for every run."""
    block, count = profile.training.block, profile.evaluation.blocks
    return {split: corpus.blocks(split, block, count, "separated") for split in ("dev", "heldout", "foreign")}


def final(profile: Profile, corpus: Corpus, seed: int) -> dict[str, np.ndarray]:
    """Every token set that either column of the protocol reads, each (blocks, T + 2).

    `stream` is what the released code scores: the first micro-batches of the training stream (AUDIT `evaluation`),
    with documents run together. `reference` is the start of a few held-out documents (AUDIT `reference`).
    """
    training, count = profile.training, profile.evaluation.final_blocks
    sets = {split: corpus.blocks(split, training.block, count, "separated") for split in ("dev", "heldout", "foreign")}
    stream = profile.evaluation.stream_batches * training.micro_batch
    sets["stream"] = corpus.blocks("train", training.block, stream, "joined", seed)
    sets["reference"] = corpus.reference()
    return sets
