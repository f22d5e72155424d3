"""Modulations that don't see the text: as many parameters as the Controller, or its network on something else.

Shapes: B batch, T positions, d width, r rank, K = 7 projections.
"""

import torch
from torch import nn

from ..errors import InputError
from ..model.cache import RunningMean
from ..model.configuration import PROJECTIONS, OuroborosConfig
from ..model.modulation import MODULATIONS, Controller, Mask


class WideStatic(nn.Module):
    """A static modulation of the Controller's parameter count: step embedding, then a matrix (the heads' role).

    What it can emit a table can emit as well: it is wider, not richer. The matrix starts at zero, as the heads do.
    """

    pools = reads = False

    def __init__(self, config: OuroborosConfig):
        super().__init__()
        self.rank = config.rank
        out = len(PROJECTIONS) * config.rank
        width = round(sum(p.numel() for p in Controller(config).parameters()) / (config.max_steps + out))
        self.step = nn.Embedding(config.max_steps, width)
        self.heads = nn.Linear(width, out, bias=False)
        nn.init.zeros_(self.heads.weight)

    def forward(self, h: torch.Tensor, t: int, mask: Mask, past: RunningMean | None = None) -> torch.Tensor:
        """Any input, step t -> (1, 1, K, r)."""
        e = self.step(torch.full((), t, device=h.device))
        return self.heads(e).unflatten(-1, (len(PROJECTIONS), self.rank))[None, None]


class BlindController(Controller):
    """The Controller without its input: the same network, the same parameters, a constant where it reads the state."""

    pools = reads = False

    def forward(self, h: torch.Tensor, t: int, mask: Mask, past: RunningMean | None = None) -> torch.Tensor:
        """Any input, step t -> (1, 1, K, r)."""
        return super().forward(h.new_ones(1, 1, h.shape[-1]), t, None)


class OtherController(Controller):
    """The Controller reading another sequence of its batch: what it sees varies as much and says nothing of the text.

    In a batch of one there is no other: it reads its own.
    """

    def forward(self, h: torch.Tensor, t: int, mask: Mask, past: RunningMean | None = None) -> torch.Tensor:
        """(B, T, d), step t -> (B, T or 1, K, r). Raises InputError for several rows of packed documents."""
        if isinstance(mask, list) and len(h) > 1:
            raise InputError("position_ids: 'controller_other' reads another row, whose packed documents end elsewhere;"
                             " give one row a batch, or one document a row")
        return super().forward(h.roll(1, dims=0), t, mask.roll(1, dims=0) if isinstance(mask, torch.Tensor) else mask,
                               past)


MODULATIONS |= {"static_wide": WideStatic, "controller_blind": BlindController, "controller_other": OtherController}
