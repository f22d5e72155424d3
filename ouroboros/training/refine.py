"""The system behind the paper's evidence for its gate: an intact model whose last layer is looped.

Nothing is cut: the last layer, which the intact model has applied once, is applied `depth` times
more, its weights changed by a Controller that emits LoRA matrices (system.md 8,
`refiner`). What is said of the release is read off its `gated_refiner.py`, `refiner.py`,
`controller.py`, `dynamic_lora.py` and `config.py`.

Shapes: B batch, T positions, d width, r rank, K = 7 projections, n matrices in a dictionary.
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..model.configuration import PROJECTIONS, OuroborosConfig, check_whole
from ..model.modeling import Recurrence
from ..model.modulation import Controller, RunningMean, diagonal_of

DICTIONARY = 8  # n, the default of the release's configuration class
SCALE = 2.0  # of the LoRA branch, alpha / r: its default too; the settings of that run are open


class LoraLinear(nn.Linear):
    """y = x W^T + b + SCALE x A(t)^T B(t)^T, with W and b frozen.

    A(t) = sum_i a_i(t) A_i and B(t) = sum_i b_i(t) B_i, from the dictionaries `A` (n, r, in) and
    `B` (out, n, r). The coefficients are what the step emits, a then b, (B, T or 1, 2 n); without
    them it is the linear layer as it was, bit for bit. A(t) and B(t) are never formed: each token has its own
    for the cost of two products through n r columns.
    """

    def __init__(self, linear: nn.Linear, a: nn.Parameter, b: nn.Parameter):
        out_features, in_features = linear.weight.shape
        super().__init__(in_features, out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias  # the same storage, not a copy
        self.A, self.B = a, b

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, self.weight, self.bias)
        m = diagonal_of(self)
        if m is None:
            return y
        a, b = m[..., None].chunk(2, dim=-2)  # (B, T or 1, n, 1)
        parts = F.linear(x.to(self.A.dtype), self.A.flatten(0, 1))  # (B, T, n r): every A_i x
        inner = (a * parts.unflatten(-1, self.A.shape[:2])).sum(-2, keepdim=True)  # (B, T, 1, r)
        branch = F.linear((b * inner).flatten(-2), self.B.flatten(1))  # (B, T, out)
        return y + SCALE * branch.to(y.dtype)

    def update(self, m: torch.Tensor) -> torch.Tensor:
        """What one vector of coefficients (2 n,) adds to the weight, (out, in)."""
        a, b = m.chunk(2)
        mixed = torch.einsum("n,nri->ri", a, self.A.to(m))
        return SCALE * torch.einsum("n,onr->or", b, self.B.to(m)) @ mixed


class LoraController(Controller):
    """The hypernetwork that emits whole LoRA matrices, as coefficients of A and of B.

    As in the release: for each projection a bias-free head for A's coefficients and one for B's,
    over dictionaries of n matrices that are trained too, their entries as large as there.
    Ours: the trunk and its widths are those of the paper's Controller; a matrix of a dictionary is
    one tensor, in the release a product of two; the halting confidence, which the release reads too
    and which is always 0 at a given depth, is left out.

    `dead`, as in the release: both heads begin at zero. The branch is a product of what they emit,
    so each head's gradient is proportional to the other's output, and trunk and dictionaries get
    none through heads that are zero: exactly 0 at every update (system.md `dead Controller`). No loss
    of a model with a dead Controller depends on our choices, nor on n and SCALE. Otherwise only B's
    head begins at zero, as in LoRA: the branch begins at zero as well, but can leave it.
    """

    def __init__(self, config: OuroborosConfig, layer: nn.Module, dead: bool):
        super().__init__(config)
        shapes = {name: linear.weight.shape for name, linear in projections_of(layer).items()}
        rank = config.rank
        self.A = nn.ParameterDict({name: torch.randn(DICTIONARY, rank, i) / (3 * i**0.5)
                                   for name, (_, i) in shapes.items()})
        self.B = nn.ParameterDict({name: torch.randn(o, DICTIONARY, rank) / (3 * rank**0.5)
                                   for name, (o, _) in shapes.items()})
        width, out = config.output_width, len(PROJECTIONS) * DICTIONARY
        self.heads = nn.ModuleDict({side: nn.Linear(width, out, bias=False) for side in "AB"})
        for head in self.heads.values():
            nn.init.zeros_(head.weight)
        if not dead:
            nn.init.normal_(self.heads["A"].weight, std=width**-0.5)

    def forward(self, h: torch.Tensor, t: int, mask: torch.Tensor | None,
                past: RunningMean | None = None) -> torch.Tensor:
        """(B, T, d) hidden states, step t -> coefficients (B, T or 1, K, 2 n), A's before B's."""
        u = self.features(h, t, mask, past)
        return torch.cat([self.heads[side](u).unflatten(-1, (len(PROJECTIONS), DICTIONARY))
                          for side in "AB"], dim=-1)


def projections_of(layer: nn.Module) -> dict[str, nn.Linear]:
    """A decoder layer's seven projections by name."""
    return {name: getattr(getattr(layer, parent), name) for name, parent in PROJECTIONS.items()}


class Intact(nn.Module):
    """The intact model, called as the other arms are: what the loop is compared to.

    Args:
        base: a dense Llama-like causal LM of transformers; it is frozen, and not changed otherwise.
        norms: times the last hidden state goes through the final norm. In the release 2: what
            transformers returns is normed already (system.md `double norm`).
    """

    def __init__(self, base: nn.Module, norms: int = 1):
        super().__init__()
        check_whole("norms", norms, least=1)
        self.base, self.norms = base.requires_grad_(False), norms

    @property
    def device(self) -> torch.device:
        return self.base.device

    def get_output_embeddings(self) -> nn.Module:
        return self.base.get_output_embeddings()

    def hidden(self, input_ids: torch.Tensor, depth: int | None = None) -> list[torch.Tensor]:
        """(B, T) token ids -> a list of the last hidden state, (B, T, d), whatever the depth."""
        h = self.base.model(input_ids, use_cache=False).last_hidden_state
        for _ in range(self.norms - 1):
            h = self.base.model.norm(h)
        return [h]

    def forward(self, input_ids: torch.Tensor, depth: int | None = None,
                logits_to_keep: int | torch.Tensor = 0,
                output_hidden_states: bool = False) -> CausalLMOutputWithPast:
        """(B, T) token ids -> logits (B, T, V), and `hidden`'s states where they are asked for.

        `logits_to_keep` last positions, or those at its indices, get logits; 0 means all.
        """
        states = self.hidden(input_ids, depth)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return CausalLMOutputWithPast(logits=self.get_output_embeddings()(states[-1][:, kept]),
                                      hidden_states=tuple(states) if output_hidden_states else None)


class Refiner(Intact):
    """The intact model, then its last layer again, `depth` times; only `recurrence` is trained.

    Args:
        base: as for `Intact`. Its last layer is looped as a copy that shares the weights.
        depth: times the layer is applied again; at 0 this is the intact model, bit for bit.
        rank: r of the LoRA matrices.
        gate: with gate and step norms as in system.md 5, or with neither: h <- layer(h).
        pooling: what the Controller reads, `causal` or `sequence` (protocol.md `pooling`).
        dead: whether the Controller is the release's, which nothing can train (`LoraController`).
        options: widths, max_steps and gate_bias of OuroborosConfig.

    `recurrence` is float32 when the base is in half precision. Raises InputError for a value out of
    range.
    """

    def __init__(self, base: nn.Module, depth: int = 4, rank: int = 8, *, gate: bool = True,
                 pooling: str = "causal", dead: bool = False, **options):
        super().__init__(base)
        check_whole("depth", depth, least=0)
        self.depth, layer = depth, base.model.layers[-1]
        # of a copy: a configuration sets its parts' attention implementation
        config = OuroborosConfig(base=copy.deepcopy(base.config), rank=rank, gate=gate,
                                 step_norm=gate, pooling=pooling, modulation="none", **options)
        # before the layer, which holds the dictionaries too: a tensor's name is the first one
        self.recurrence = Recurrence(config)
        self.recurrence.modulation = modulation = LoraController(config, layer, dead)
        self.recurrence.to(base.device, torch.promote_types(base.dtype, torch.float32))
        # the modules are copied, the weights are not
        self.layer = copy.deepcopy(layer, memo={id(p): p for p in layer.parameters()})
        for name, linear in projections_of(self.layer).items():
            wrapped = LoraLinear(linear, modulation.A[name], modulation.B[name])
            setattr(getattr(self.layer, PROJECTIONS[name]), name, wrapped)

    @property
    def projections(self) -> list[LoraLinear]:
        """The looped layer's projections, in the order of PROJECTIONS."""
        return list(projections_of(self.layer).values())

    def hidden(self, input_ids: torch.Tensor, depth: int | None = None) -> list[torch.Tensor]:
        """(B, T) token ids -> the states (B, T, d) after the last layer and after each step.

        The last one is normed. Raises InputError for a depth below 0.
        """
        depth = self.depth if depth is None else depth
        check_whole("depth", depth, least=0)
        seen = []  # the last layer's output in the intact model, not normed, and what it was called with
        with torch.no_grad(), self.base.model.layers[-1].register_forward_hook(
                lambda module, inputs, keywords, out: seen.extend((out, keywords)), with_kwargs=True):
            self.base.model(input_ids, use_cache=False)
        h, arguments = seen
        states = [h]
        for step in range(depth):
            h = self.recurrence(h, step, self.layer, [id(linear) for linear in self.projections], **arguments)
            states.append(h)
        states[-1] = self.base.model.norm(h)
        return states
