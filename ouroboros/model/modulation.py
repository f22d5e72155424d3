"""Frozen low-rank branches, and what emits their diagonals: the Controller, or a static table (system.md 3 and 4).

Shapes: B batch, T positions, d width, r rank, K = 7 projections.
"""

import threading
from collections.abc import Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F

from .cache import RunningMean
from .configuration import PROJECTIONS, OuroborosConfig

Mask = torch.Tensor | list[int] | None  # what pooling leaves out, (B, T) with 0 there, or lengths of packed documents
_running = threading.local()  # what the step that runs in this thread has emitted: modules are shared by threads
_hooking = threading.Lock()  # one hook an adapter, however many threads call


@contextmanager
def emitted(places: list[int], diagonals):
    """While this is entered, in this thread, `diagonal_of` the module with the id places[i] is diagonals[i]; where ids
    repeat, of fused projections, these side by side."""
    before, found = getattr(_running, "diagonals", {}), {}
    for place, m in zip(places, diagonals, strict=True):
        found[place] = torch.cat([found[place], m], dim=-1) if place in found else m
    _running.diagonals = found
    try:
        yield
    finally:
        _running.diagonals = before


def diagonal_of(module: nn.Module) -> torch.Tensor | None:
    """The m that the running step has emitted for a weight, broadcasting to (B, T, r); None outside of steps."""
    return getattr(_running, "diagonals", {}).get(id(module))


class ModulatedLinear(nn.Linear):
    """y = x W^T + b + (alpha / r) ((x A^T) * m) B^T, with W, b, A, B frozen and m emitted anew at each step.

    `A` (r, in), `B` (out, r): the truncated SVD of the mean residual (system.md 3); of `parts` fused projections one
    below the other and block by block, parts * r in place of r. Without m, the layer as it was.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, parts: int = 1):
        out_features, in_features = linear.weight.shape
        super().__init__(in_features, out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias  # the same storage, not a copy
        self.scale = alpha / rank
        self.register_buffer("A", linear.weight.new_zeros(parts * rank, in_features))
        self.register_buffer("B", linear.weight.new_zeros(out_features, parts * rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        m = diagonal_of(self)
        if m is None:
            return F.linear(x, self.weight, self.bias)
        flat = x.flatten(0, -2)  # (B T, in), so that addmm adds the branch to y in one pass
        y = F.linear(flat, self.weight, self.bias)  # (B T, out); half under autocast
        branch = F.linear(flat, self.A).to(y.dtype).view(*x.shape[:-1], -1) * m.to(y.dtype)  # (B, T, parts r)
        return torch.addmm(y, branch.flatten(0, -2), self.B.T.to(y.dtype), alpha=self.scale).view(*x.shape[:-1], -1)

    def update(self, m: torch.Tensor) -> torch.Tensor:
        """What one vector m (r,) adds to the weight, (out, in), on m's device and in its dtype."""
        return self.scale * (self.B.to(m) * m) @ self.A.to(m)


def places_in(layer: nn.Module, weights: Mapping[tuple[str, str], list[int]]) -> list[int]:
    """Where a step's diagonals go in the layer, in the order of PROJECTIONS: the ids of what holds them (`weights_of`).

    An adapter around a weight (peft's) takes its place, and the branch stands beside it, not inside: so adapters that
    scale or rotate what they wrap can be merged into the weight alone.
    """
    places = []
    for (parent, name), rows in weights.items():
        place = getattr(getattr(layer, parent), name)
        if not isinstance(place, ModulatedLinear):
            with _hooking:
                if _add_branch not in place._forward_hooks.values():
                    place.register_forward_hook(_add_branch)
        places += [id(place)] * len(rows)
    return places


def _add_branch(adapter: nn.Module, inputs: tuple, y: torch.Tensor) -> torch.Tensor:
    """The adapter's output, (B, T, out), and the branch of the projection in it, of the adapter's own input."""
    m = diagonal_of(adapter)
    if m is None:
        return y
    projection = next(module for module in adapter.modules() if isinstance(module, ModulatedLinear))
    return y + projection.scale * F.linear(F.linear(inputs[0], projection.A) * m.to(y.dtype), projection.B)


def pool(h: torch.Tensor, mask: Mask, pooling: str, past: RunningMean | None = None) -> torch.Tensor:
    """What the Controller reads, (B, T, d) hidden states -> (B, T, d) if `causal`, (B, 1, d) if `sequence`.

    `causal` is the mean over positions <= t, those in `past` included; `sequence` over all (protocol.md `pooling`), in
    float32 at least. Positions where `mask` is 0 are left out; packed documents pooled each alone, -> (B, T, d) always.
    """
    if isinstance(mask, list):
        alone = [pool(part[None], None, pooling).expand(-1, len(part), -1) for part in h.flatten(0, 1).split(mask)]
        return torch.cat(alone, dim=1).view(h.shape)
    h = h.to(torch.promote_types(h.dtype, torch.float32))
    weight = h.new_ones(*h.shape[:2], 1) if mask is None else mask[..., None].to(h.dtype)  # (B, T, 1)
    h = h if mask is None else h * weight
    if pooling == "sequence":
        return h.sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)
    total, count = h.cumsum(1), weight.cumsum(1)
    if past is not None:
        total, count = past.update(total, count)
    return total / count.clamp(min=1)


class Controller(nn.Module):
    """The hypernetwork: pooled hidden state and step -> one diagonal per projection (system.md 4).

    The heads start at zero, so the model starts as the unmodulated one. The seven bias-free heads are one matrix.
    """

    pools = reads = True  # reads earlier tokens, so that a cache needs their mean; reads the input at all

    def __init__(self, config: OuroborosConfig):
        super().__init__()
        self.rank, self.config = config.rank, config
        self.state = nn.Linear(config.base.hidden_size, config.state_width)
        self.step = nn.Embedding(config.max_steps, config.step_width)
        self.hidden = nn.Linear(config.state_width + config.step_width, config.hidden_width)
        self.output = nn.Linear(config.hidden_width, config.output_width)
        self.heads = nn.Linear(config.output_width, len(PROJECTIONS) * config.rank, bias=False)
        nn.init.zeros_(self.heads.weight)

    def features(self, h: torch.Tensor, t: int, mask: Mask, past: RunningMean | None = None) -> torch.Tensor:
        """What the heads read, u of section 4: the arguments of `forward` -> (B, T or 1, output_width)."""
        z = F.silu(self.state(pool(h, mask, self.config.pooling, past).to(self.state.weight.dtype)))
        e = self.step(torch.full((), t, device=z.device)).expand(*z.shape[:2], -1)  # called: so offloaded ones come
        return F.silu(self.output(F.silu(self.hidden(torch.cat([z, e], dim=-1)))))

    def forward(self, h: torch.Tensor, t: int, mask: Mask, past: RunningMean | None = None) -> torch.Tensor:
        """(B, T, d) hidden states, step t, `Mask`, what was seen before -> (B, T or 1, K, r)."""
        return self.heads(self.features(h, t, mask, past)).unflatten(-1, (len(PROJECTIONS), self.rank))


class StaticModulation(nn.Module):
    """The comparison: a learned diagonal per step and projection, blind to the input (system.md 6)."""

    pools = reads = False

    def __init__(self, config: OuroborosConfig):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(config.max_steps, len(PROJECTIONS), config.rank))

    def forward(self, h: torch.Tensor, t: int, mask: Mask, past: RunningMean | None = None) -> torch.Tensor:
        """Any input, step t -> (1, 1, K, r)."""
        return self.table[t][None, None]


MODULATIONS = {"controller": Controller, "static": StaticModulation}  # `training/blind.py` adds the blind ones
