"""Further passes over layers of the cut model, and what the full model teaches (docs/hypotheses.md).

Shapes: B batch, T positions, d width, V vocabulary, r rank, K = 7 projections, P passes.
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..errors import InputError
from ..experiment.arms import Arm
from ..experiment.cost import Cost, small
from ..experiment.profile import Profile
from ..model.configuration import PROJECTIONS, SINKS, OuroborosConfig
from ..model.modulation import MODULATIONS, diagonal_of, emitted
from ..model.surgery import truncated_svd
from .corpus import LOOK_AHEAD
from .evaluation import CHUNK
from .refine import projections_of

Factors = tuple[torch.Tensor, torch.Tensor]  # A (r, in), B (out, r)


class Repeated(nn.Module):
    """A layer with further passes over it, or over it and the layers before it, in its place.

    Args:
        layer: the kept layer; it has its own pass as before.
        before: layers that are passed again with it, in their order; they have had their own pass.
        passes: how many, P.
        own: passes before the layer's own; None: it has none, each of the passes is a whole one.
        affine: no passes, but a scale and a shift of each channel in each one's place.

    Damped passes start at h, so the model as it was. `states` are those after each pass, the own one included.
    """

    def __init__(self, layer: nn.Module, width: int, passes: int, before: tuple[nn.Module, ...] = (),
                 own: int | None = 0, affine: bool = False):
        super().__init__()
        self.layer, self.own, self.affine = layer, own, affine
        self.__dict__["before"] = before  # they have their place in the model
        self.passes = nn.ParameterDict({} if own is None else {"gate": torch.zeros(passes, width)})
        if affine:
            self.passes["shift"] = nn.Parameter(torch.zeros(passes, width))
        self.count, self.modulation, self.factors, self.places = passes, None, None, []
        self.states: list[torch.Tensor] = []

    def forward(self, h: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """(B, T, d) -> (B, T, d). Raises InputError for a key/value cache, which has a slot a layer, not a pass."""
        if kwargs.get("past_key_values") is not None:
            raise InputError("use_cache: the key/value cache has no slot for further passes; pass use_cache=False")
        self.states = []
        for t in range(self.count):
            if t == self.own:
                h = self._note(self.layer(h, *args, **kwargs))
            h = self._note(self._pass(h, t, args, kwargs))
        return self._note(self.layer(h, *args, **kwargs)) if self.own == self.count else h

    def _note(self, h: torch.Tensor) -> torch.Tensor:
        self.states.append(h)
        return h

    def _pass(self, h: torch.Tensor, t: int, args: tuple, kwargs: dict) -> torch.Tensor:
        if self.affine:
            return h * (1 + self.passes["gate"][t]) + self.passes["shift"][t]
        new = h
        with emitted(self.places, self._branches(h, t)):
            for layer in (*self.before, self.layer):
                new = layer(new, *args, **kwargs)
        return new if self.own is None else h + self.passes["gate"][t] * (new - h)

    def _branches(self, h: torch.Tensor, t: int) -> list:
        """What this pass does at each of `places`: factors and their diagonal, or a diagonal of LoRA's ranks."""
        m = [None] * len(self.places)
        if self.modulation is not None:
            m = [1 + part for part in self.modulation(h, t, None, None).unbind(-2)]  # K of (B or 1, T or 1, r)
        if self.factors is None:
            return m
        return [(self.factors[f"{name}_A"][t], self.factors[f"{name}_B"][t], part)
                for name, part in zip(PROJECTIONS, m, strict=True)]

    def add_factors(self, factors: list[dict[str, Factors]], trained: bool) -> None:
        """Give each pass low-rank factors of its own: one {projection: (A, B)} a pass."""
        self.factors = nn.ModuleDict({
            f"{name}_{side}": nn.ParameterList(nn.Parameter(of_pass[name][index], requires_grad=trained)
                                               for of_pass in factors)
            for name in PROJECTIONS for index, side in enumerate("AB")})
        self.places = [self._hooked(linear, _add_branch) for linear in projections_of(self.layer).values()]

    def scale(self, modulation: nn.Module) -> None:
        """Scale, by 1 + m at each pass, the factors' ranks; without any, those of the LoRA that the layer has."""
        self.modulation = modulation
        if self.factors is None:
            self.places = [self._hooked(linear.lora_A["default"], _scale_ranks)
                           for linear in projections_of(self.layer).values()]

    @staticmethod
    def _hooked(module: nn.Module, hook) -> int:
        module.register_forward_hook(hook)
        return id(module)


def _add_branch(linear: nn.Module, inputs: tuple, y: torch.Tensor) -> torch.Tensor:
    """(B, T, in) -> y + ((x A^T) * m) B^T, (B, T, out); m None: 1."""
    if (found := diagonal_of(linear)) is None:
        return y
    A, B, m = found
    x = F.linear(inputs[0], A)  # (B, T, r)
    return y + F.linear(x if m is None else x * m, B)


def _scale_ranks(lora_A: nn.Module, inputs: tuple, x: torch.Tensor) -> torch.Tensor:
    """(B, T, r) -> the same, each rank scaled."""
    m = diagonal_of(lora_A)
    return x if m is None else x * m


def repeated(model: nn.Module, base: nn.Module, arm: Arm, profile: Profile, cost: Cost) -> None:
    """Put an arm's further passes into the cut model, whose LoRA is there."""
    passes, layers = arm.passes, model.model.layers
    middle = profile.split.prelude
    last = middle if passes.at == "middle" else profile.scanned.looped[passes.layers - 1] + passes.layers - 1
    removed = [index for index in range(middle, len(base.model.layers) - profile.split.coda)
               if index != profile.split.recurrent or passes.kind == "plain"]
    own = None if passes.kind == "plain" else 0 if passes.count else profile.split.recurrent - middle
    layers[last] = place = Repeated(layers[last], model.config.hidden_size, cost.passes,
                                    tuple(layers[last - passes.layers + 1:last]), own, passes.kind == "affine")
    if passes.bases != "none":
        at = base.model.layers[profile.split.recurrent]
        place.add_factors([_residual_factors(base.model.layers[index], at, rank)
                           for index, rank in zip(removed, cost.base_ranks, strict=True)], passes.bases == "trained")
    if passes.modulation != "none":
        widths = {f"{name}_width": width for name, width in small(profile.controller)}
        shape = copy.deepcopy(base.config)  # a configuration sets its parts' attention implementation
        config = OuroborosConfig(shape, rank=cost.looped(cost.lora_ranks, last), max_steps=cost.passes, **widths)
        place.scale(MODULATIONS[passes.modulation](config))
    place.to(model.device)


def _residual_factors(layer: nn.Module, at: nn.Module, rank: int) -> dict[str, Factors]:
    """Low-rank factors of what a removed layer's projections have over the middle one's. Of a layer's own, whose
    residual is 0, as LoRA begins."""
    found = {}
    kept = projections_of(at)
    for name, removed in projections_of(layer).items():
        residual = removed.weight.detach() - kept[name].weight.detach()
        A, B = truncated_svd(residual, rank)
        if layer is at:
            A = torch.empty(A.shape)
            nn.init.kaiming_uniform_(A, a=5**0.5)
        found[name] = A.float().contiguous(), B.float().contiguous()
    return found


class Teacher:
    """The full model, and what of it an arm learns beside the text.

    `states`: after each pass the middle's state shall be the full model's after the matching share of the removed
    layers. `logits`: half of the loss is the divergence from its next-token distribution.
    """

    def __init__(self, base: nn.Module, kind: str, split):
        self.base, self.kind, self.first = base, kind, split.prelude
        self.removed = len(base.model.layers) - split.prelude - split.coda

    def loss(self, model: nn.Module, loss: torch.Tensor, hidden: torch.Tensor, chunk: torch.Tensor) -> torch.Tensor:
        """The loss to train on, from that on the text (nats per token), the last hidden states (B, T, d) and the
        tokens (B, T + 2)."""
        with torch.no_grad():
            base = self.base.to(chunk.device).model
            states = base(chunk[:, :-LOOK_AHEAD], use_cache=False, output_hidden_states=True).hidden_states
        if self.kind == "states":
            return loss + self._apart(model.model.layers[self.first].states, states)
        head = self.base.get_output_embeddings().weight
        parts = zip(hidden.flatten(0, 1).split(CHUNK), states[-1].flatten(0, 1).split(CHUNK), strict=True)
        divergence = sum(checkpoint(_divergence, mine, full, head, use_reentrant=False)
                         for mine, full in parts) / hidden[..., 0].numel()
        return (loss + divergence) / 2

    def _apart(self, mine: list[torch.Tensor], states: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Relative squared error, averaged over tokens (but the first SINKS) and passes."""
        found = []
        for k, h in enumerate(mine, 1):
            wanted = states[self.first + round(self.removed * k / len(mine))][:, SINKS:]
            found.append(((h[:, SINKS:] - wanted).square().sum(-1) / wanted.square().sum(-1)).mean())
        return torch.stack(found).mean()


def _divergence(mine: torch.Tensor, full: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """(N, d) last hidden states of an arm and of the full model -> the summed KL divergence, nats."""
    wanted = F.log_softmax(F.linear(full, head), -1)  # (N, V)
    return F.kl_div(F.log_softmax(F.linear(mine, head), -1), wanted, reduction="sum", log_target=True)
