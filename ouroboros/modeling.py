"""OuroborosForCausalLM: prelude, gated recurrence with modulated weights, coda (SYSTEM section 5).

Shapes: B batch, T positions, d width, V vocabulary.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import CausalLMOutput

from .configuration import PROJECTIONS, OuroborosConfig
from .errors import InputError
from .experiment import SplitConfig
from .modulation import MODULATIONS, ModulatedLinear
from .surgery import cut_layers, residual_bases


class StepNorm(nn.Module):
    """RMSNorm with a weight vector of its own at each step, in float32 at least (SYSTEM section 5, item 3)."""

    eps = 1e-6

    def __init__(self, config: OuroborosConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.max_steps, config.base.hidden_size))

    def forward(self, h: torch.Tensor, t: int) -> torch.Tensor:
        """(B, T, d) -> (B, T, d)."""
        x = h.to(torch.promote_types(h.dtype, torch.float32))
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return (x * self.weight[t]).to(h.dtype)


class Gate(nn.Module):
    """h <- g * h' + (1 - g) * h with g = sigmoid(W_g [h'; h] + b_g), elementwise (SYSTEM section 5, item 4)."""

    def __init__(self, config: OuroborosConfig):
        super().__init__()
        width = config.base.hidden_size
        self.linear = nn.Linear(2 * width, width)
        nn.init.zeros_(self.linear.weight)
        nn.init.constant_(self.linear.bias, config.gate_bias)

    def forward(self, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        """(B, T, d), (B, T, d) -> (B, T, d)."""
        both = torch.cat([new, old], dim=-1).to(self.linear.weight.dtype)
        g = torch.sigmoid(self.linear(both)).to(new.dtype)
        return g * new + (1 - g) * old


class Recurrence(nn.Module):
    """What is trained: modulation, gate and step norms; absent parts are None."""

    def __init__(self, config: OuroborosConfig):
        super().__init__()
        self.max_steps = config.max_steps
        self.modulation = MODULATIONS[config.modulation](config) if config.modulation != "none" else None
        self.gate = Gate(config) if config.gate else None
        self.step_norm = StepNorm(config) if config.step_norm else None

    def forward(self, h: torch.Tensor, depth: int, layer, projections, mask: torch.Tensor | None) -> torch.Tensor:
        """Apply `layer` `depth` times, (B, T, d) -> (B, T, d), its `projections` modulated anew at each step."""
        for step in range(depth):
            t = min(step, self.max_steps - 1)
            if self.modulation is not None:
                m = self.modulation(h, t, mask)  # (B or 1, T or 1, K, r)
                for projection, diagonal in zip(projections, m.unbind(-2), strict=True):
                    projection.m = diagonal
            new = layer(h)
            if self.step_norm is not None:
                new = self.step_norm(new, t)
            h = new if self.gate is None else self.gate(new, h)
        for projection in projections:
            projection.m = None  # no graph outlives the call
        return h


class OuroborosForCausalLM(PreTrainedModel, GenerationMixin):
    """A cut base model whose recurrent layer is applied `depth` times; only `recurrence` is trained.

    `base` is the base model's own class with the kept layers. All its weights are frozen, and so are the SVD bases.
    """

    config_class = OuroborosConfig
    base_model_prefix = "base"
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_cache_class = False

    def __init__(self, config: OuroborosConfig):
        super().__init__(config)
        base = config.base
        self.base = AutoModelForCausalLM.from_config(base, attn_implementation=config._attn_implementation)
        self.base.requires_grad_(False)
        layer = self.base.model.layers[config.n_prelude]
        if config.modulation != "none":
            for name, parent in PROJECTIONS.items():
                linear = getattr(getattr(layer, parent), name)
                if config.rank > min(linear.weight.shape):
                    raise InputError(f"rank {config.rank}: larger than projection {name}, which is "
                                     f"{linear.out_features} x {linear.in_features}; choose at most "
                                     f"{min(linear.weight.shape)}")
                setattr(getattr(layer, parent), name, ModulatedLinear(linear, config.rank, config.alpha))
        self.recurrence = Recurrence(config)

    def _init_weights(self, module):  # every part initialises itself
        pass

    @property
    def projections(self) -> list[ModulatedLinear]:
        """The recurrent layer's modulated projections, in the order of PROJECTIONS; empty without modulation."""
        layer = self.base.model.layers[self.config.n_prelude]
        found = [getattr(getattr(layer, parent), name) for name, parent in PROJECTIONS.items()]
        return [p for p in found if isinstance(p, ModulatedLinear)]

    @classmethod
    def from_base(cls, base, n_prelude: int = 8, recurrent_layer: int = 18, n_coda: int = 8,
                  rank: int = 32, **options) -> "OuroborosForCausalLM":
        """Convert a pretrained causal LM (a name, a folder or a model with q/k/v/o and gate/up/down projections).

        `options` are those of OuroborosConfig. Raises InputError when split or rank don't fit the base.
        """
        if isinstance(base, (str, bytes)) or hasattr(base, "__fspath__"):
            base = AutoModelForCausalLM.from_pretrained(base)
        split = SplitConfig(prelude=n_prelude, recurrent=recurrent_layer, coda=n_coda)
        cut = cut_layers(base, split)
        config = OuroborosConfig(base=cut.config, n_prelude=n_prelude, recurrent_layer=recurrent_layer, n_coda=n_coda,
                                 rank=rank, **options)
        config._attn_implementation = base.config._attn_implementation
        model = cls(config).to(base.dtype)
        model.base.load_state_dict(cut.state_dict(), strict=False)  # all but the SVD bases
        if model.projections:
            for projection, (a, b) in zip(model.projections, residual_bases(base, split, rank), strict=True):
                projection.A.copy_(a)
                projection.B.copy_(b)
        return model

    def get_input_embeddings(self):
        return self.base.get_input_embeddings()

    def get_output_embeddings(self):
        return self.base.get_output_embeddings()

    def hidden(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None,
               depth: int | None = None) -> torch.Tensor:
        """(B, T) token ids and mask -> (B, T, d) final normed hidden states."""
        depth = self.config.depth if depth is None else depth
        if depth < 1:
            raise InputError(f"depth {depth}: must be 1 or more")
        model, config = self.base.model, self.config
        layers = model.layers
        with torch.no_grad():  # nothing is trained up to the loop
            h = model.embed_tokens(input_ids)
            positions = _positions(input_ids, attention_mask)
            rotary = model.rotary_emb(h, positions)
            masks = _masks(config.base, h, attention_mask, positions)

        def layer(index: int, h: torch.Tensor) -> torch.Tensor:
            return layers[index](h, attention_mask=masks[index], position_ids=positions, position_embeddings=rotary)

        with torch.no_grad():
            for index in range(config.n_prelude):
                h = layer(index, h)
        h = self.recurrence(h, depth, lambda h: layer(config.n_prelude, h), self.projections, attention_mask)
        for index in range(config.n_prelude + 1, len(layers)):
            h = layer(index, h)
        return model.norm(h)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None,
                labels: torch.Tensor | None = None, depth: int | None = None, **kwargs) -> CausalLMOutput:
        """Logits (B, T, V); with `labels` (B, T) the loss too, nats per token: shifted inside, -100 ignored."""
        logits = self.base.lm_head(self.hidden(input_ids, attention_mask, depth))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, depth=None, **kwargs):
        """Generation without a cache: the whole text at each token."""
        return {"input_ids": input_ids, "attention_mask": attention_mask, "depth": depth}


def _positions(input_ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(B or 1, T) position ids; padding on the left doesn't count."""
    if mask is None:
        return torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def _masks(config, h: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor) -> list:
    """Each kept layer's attention mask: causal under every implementation, sliding where the base says so."""
    arguments = dict(config=config, inputs_embeds=h, attention_mask=mask, past_key_values=None, position_ids=positions)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    makers = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
    made = {kind: makers[kind](**arguments) for kind in set(kinds)}
    return [made[kind] for kind in kinds]
