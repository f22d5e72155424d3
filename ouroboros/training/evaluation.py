"""Losses per block, in nats per token, for both targets at once; what happens inside the loop; interventions."""

from collections.abc import Callable
from contextlib import contextmanager

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..experiment.plan import RunSpec
from ..experiment.profile import Profile
from ..experiment.protocol import DRAWN_DEPTHS
from ..model.configuration import PROJECTIONS
from .corpus import LOOK_AHEAD, Corpus

TARGETS = ("t+1", "t+2")
GIVEN_DEPTH_BATCH = 8  # blocks a forward pass; where depths are drawn, a draw is per micro-batch

STREAM_SHARE = 0.01
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
    """The token set scored during training: held-out blocks, separated, the same for every run but the search's, which
    are scored on none."""
    if spec.purpose == "rate":
        return {}
    return {"heldout": corpus.blocks("heldout", profile.training.block, profile.evaluation.blocks, "separated")}


def final(profile: Profile, corpus: Corpus, spec: RunSpec) -> dict[str, np.ndarray]:
    """The token sets scored at the end of a run, each (blocks, T + 2): for the learning-rate search `dev` alone, which
    no other run looks at; for every other run what either column of the protocol reads.

    `train` is text of the training split that the run didn't train on. `stream` stands for what the released code
    scores, the first micro-batches of the training stream with documents run together; see `stream_kind`. `reference`
    is the start of a few held-out documents (protocol.md `reference`). `newer` is there where the corpus has it.
    """
    training, count = profile.training, profile.evaluation.others
    if spec.purpose == "rate":
        return {"dev": corpus.blocks("dev", training.block, count, "separated")}
    sets = {"heldout": corpus.blocks("heldout", training.block, profile.evaluation.final_blocks, "separated"),
            **{split: corpus.blocks(split, training.block, count, "separated") for split in profile.corpus.unseen}}
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
    the batch (see `apart`). In a model that doesn't look ahead nothing changes (protocol.md `pooling`)."""
    half, losses = (blocks.shape[1] - LOOK_AHEAD) // 2, []
    for chunk in torch.from_numpy(blocks).split(GIVEN_DEPTH_BATCH):
        chunk = chunk.long()
        if other_future:
            chunk = torch.cat([chunk[:, :half], chunk[:, half:].roll(1, dims=0)], dim=1)
        states, head = hidden(chunk[:, :-LOOK_AHEAD], depths.next())
        wanted = chunk[:, 1:half].to(states.device)
        losses += token_losses(states[:, :half - 1], head, wanted)[0].mean(1).tolist()
    return losses


def apart(blocks: np.ndarray, batch: int = GIVEN_DEPTH_BATCH) -> np.ndarray:
    """The blocks in an order in which those of one batch lie far from each other, so in different documents."""
    stride = -(-len(blocks) // batch)
    return np.concatenate([blocks[start::stride] for start in range(stride)])


# ------------------------------------------------------------------------------------------------- inside the loop

class Watch:
    """What passes through the loop while this is entered; of a model without a loop, nothing.

    Of each recurrence step: how far the gate opens, the norm of the state after it, and how much it changed the state,
    relative to the state before; means over tokens. Of the modulation: the moments of m over tokens.
    """

    def __init__(self, model):
        self.loop = getattr(model, "recurrence", None)
        self.projections = [] if self.loop is None else model.projections
        self.largest = 0.0  # |m|
        self._steps: dict[str, dict[int, list[float]]] = {}
        self._moments: dict[int, list] = {}  # step: tokens, sum of m, sum of m^2, both (K, r)

    def __enter__(self) -> "Watch":
        self._hooks = []
        if self.loop is not None:
            self._hooks += [self.loop.register_forward_pre_hook(self._before),
                            self.loop.register_forward_hook(self._after)]
            if self.loop.gate is not None:
                self._hooks.append(self.loop.gate.linear.register_forward_hook(
                    lambda module, inputs, out: self._add("gate_open", torch.sigmoid(out))))
            if self.loop.modulation is not None:
                self._hooks.append(self.loop.modulation.register_forward_hook(self._modulated))
        return self

    def __exit__(self, *_) -> None:
        for hook in self._hooks:
            hook.remove()

    def _before(self, module, inputs) -> None:
        self._step = inputs[1]

    def _after(self, module, inputs, out) -> None:
        norm, before = out.float().norm(dim=-1), inputs[0].float()
        self._add("state_norm", norm)
        self._add("change", (out - before).float().norm(dim=-1) / before.norm(dim=-1))

    def _add(self, name: str, values: torch.Tensor) -> None:
        sums = self._steps.setdefault(name, {}).setdefault(self._step, [0.0, 0])
        sums[0] += values.sum().item()
        sums[1] += values.numel()

    def _modulated(self, module, inputs, m: torch.Tensor) -> None:
        m = m.detach().cpu().double().flatten(0, 1)  # (N, K, r)
        self.largest = max(self.largest, m.abs().max().item())
        moments = self._moments.setdefault(self._step, [0, 0.0, 0.0])
        for place, value in enumerate((len(m), m.sum(0), m.square().sum(0))):
            moments[place] = moments[place] + value

    def steps(self) -> dict[str, list[float]]:
        """{`gate_open`, `state_norm`, `change`: a mean a step}."""
        return {name: [total / count for _, (total, count) in sorted(by_step.items())]
                for name, by_step in self._steps.items()}

    def mean_modulation(self) -> torch.Tensor:
        """The mean m of each step, (steps, K, r) float64."""
        return torch.stack([total / count for _, (count, total, _) in sorted(self._moments.items())])

    @torch.no_grad()
    def modulation(self) -> dict[str, list[float]]:
        """Of each projection, by its name: `size/` the root mean square of m at each step; `over_inputs/` that of its
        standard deviation over tokens; `over_steps/` that of the mean vector's deviation from its mean over steps;
        `update/` the norm of the mean update relative to that of W, at each step."""
        if not self._moments:
            return {}
        mean = self.mean_modulation()
        square = torch.stack([total / count for _, (count, _, total) in sorted(self._moments.items())])
        found = {}
        for index, (name, projection) in enumerate(zip(PROJECTIONS, self.projections, strict=True)):
            m, deviation = mean[:, index], (square[:, index] - mean[:, index].square()).clamp(min=0)
            found[f"size/{name}"] = square[:, index].mean(-1).sqrt().tolist()
            found[f"over_inputs/{name}"] = deviation.mean(-1).sqrt().tolist()
            found[f"over_steps/{name}"] = [(m - m.mean(0)).square().mean().sqrt().item()]
            weight = projection.weight.detach().cpu().double()
            found[f"update/{name}"] = [(projection.update(step).norm() / weight.norm()).item() for step in m]
        return found


SINKS = 4  # first positions of a block, where the residual stream is far larger than elsewhere


@torch.no_grad()
def stream_rms(model, blocks: np.ndarray, depth: int) -> list[float]:
    """The root mean square of what each step norm reads in the untrained loop, (depth,): the median over tokens of
    training text, (n, T + 2), without each block's first SINKS.

    Measured with step norms that are matched already: the weight of each step is set to what that step reads, on the
    way through the loop. They stay so.
    """
    norm, found = model.recurrence.step_norm, []

    def match(module, inputs) -> None:
        h, t = inputs
        found.append(h[:, SINKS:].float().square().mean(-1).sqrt().median().item())
        module.weight[t:] = found[-1]

    hook = norm.register_forward_pre_hook(match)
    try:
        model.hidden(torch.from_numpy(blocks)[:, :-LOOK_AHEAD].long().to(model.device), depth=depth)
    finally:
        hook.remove()
    return found


@torch.no_grad()
def layer_rms(model, blocks: np.ndarray) -> dict[str, list[float]]:
    """The residual stream's root mean square per channel, as the embedding gives it and after each layer of a base, on
    (n, T + 2) tokens: `layer_rms`, the median over tokens without each block's first SINKS, and `sink_rms`, the median
    of each block's first."""
    ids, found = torch.from_numpy(blocks)[:, :-LOOK_AHEAD].long().to(model.device), []

    def note(module, inputs, out) -> None:
        found.append(out.float().square().mean(-1).sqrt())  # (n, T)

    modules = (model.model.embed_tokens, *model.model.layers)
    hooks = [module.register_forward_hook(note) for module in modules]
    try:
        model.model(ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {"layer_rms": [rms[:, SINKS:].median().item() for rms in found],
            "sink_rms": [rms[:, 0].median().item() for rms in found]}


@contextmanager
def intervened(model, kind: str, means: torch.Tensor):
    """The Controller sees something else while this is entered (system.md 4).

    kind `other_sequence`: the states of another sequence of its batch (see `apart`); `corpus_mean`: at every token and
    step the mean of what it reads, `means` (steps, d); `step_mean`: it is replaced by its own mean m, `means`
    (steps, K, r).
    """
    controller, step = model.recurrence.modulation, [0]

    def note(module, inputs):
        step[0] = inputs[1]
        return (inputs[0].roll(1, dims=0), *inputs[1:]) if kind == "other_sequence" else None

    hooks = [controller.register_forward_pre_hook(note)]
    if kind == "corpus_mean":
        hooks.append(controller.state.register_forward_pre_hook(
            lambda module, inputs: (means[step[0]].to(inputs[0]).expand_as(inputs[0]),)))
    if kind == "step_mean":
        hooks.append(controller.register_forward_hook(lambda module, inputs, m: means[step[0]].to(m).expand_as(m)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def reading(model):
    """Yields a function: the mean of what the Controller read since, (steps, d) float64."""
    controller, sums = model.recurrence.modulation, {}

    def note(module, inputs):
        step[0] = inputs[1]

    def add(module, inputs):
        read = inputs[0].detach().cpu().double().flatten(0, 1)  # (N, d)
        count, total = sums.get(step[0], (0, 0.0))
        sums[step[0]] = count + len(read), total + read.sum(0)

    step = [0]
    hooks = [controller.register_forward_pre_hook(note), controller.state.register_forward_pre_hook(add)]
    try:
        yield lambda: torch.stack([total / count for _, (count, total) in sorted(sums.items())])
    finally:
        for hook in hooks:
            hook.remove()
