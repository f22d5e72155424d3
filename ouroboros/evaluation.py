"""Losses per block, in nats per token, for both targets at once."""

from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F

from .corpus import LOOK_AHEAD, Corpus
from .experiment import DRAWN_DEPTHS, Profile

TARGETS = ("t+1", "t+2")
GIVEN_DEPTH_BATCH = 8  # blocks a forward pass; where depths are drawn, a draw is per micro-batch

Logits = Callable[[torch.Tensor, int | None], torch.Tensor]  # (B, T) ids, depth -> (B, T, V)


def targets(blocks: torch.Tensor, target: str) -> torch.Tensor:
    """(B, T + 2) tokens -> (B, T) targets of the inputs `blocks[:, :T]`: one or two tokens ahead (AUDIT `target`)."""
    ahead = 1 + TARGETS.index(target)
    return blocks[:, ahead:blocks.shape[1] - LOOK_AHEAD + ahead]


def token_losses(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """(B, T, V) logits and (B, T) token ids -> (B, T) nats."""
    return F.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), reduction="none").view(wanted.shape)


class Depths:
    """The depth of each micro-batch: the given one, or drawn uniformly from {4, 8, 16} (AUDIT `depth`)."""

    def __init__(self, depth: int | str | None, seed: int):
        self.given = None if depth == "mixed" else depth
        self.drawn = depth == "mixed"
        self.generator = np.random.default_rng(seed)

    def next(self) -> int | None:
        return int(self.generator.choice(DRAWN_DEPTHS)) if self.drawn else self.given


@torch.no_grad()
def block_losses(logits: Logits, blocks: np.ndarray, depths: Depths, micro_batch: int) -> dict[str, list[float]]:
    """Each block's mean loss under each target: {"t+1": [...], "t+2": [...]}, one entry a block of (n, T + 2)."""
    losses: dict[str, list[float]] = {target: [] for target in TARGETS}
    for chunk in torch.from_numpy(blocks).split(micro_batch if depths.drawn else GIVEN_DEPTH_BATCH):
        scores = logits(chunk[:, :-LOOK_AHEAD], depths.next())
        for target in TARGETS:
            losses[target] += token_losses(scores, targets(chunk, target).to(scores.device)).mean(1).tolist()
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
