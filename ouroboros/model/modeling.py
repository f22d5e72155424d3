"""OuroborosForCausalLM: prelude, gated recurrence with modulated weights, coda (system.md 5).

Shapes: B batch, T positions, d width, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from ..errors import InputError
from .configuration import PROJECTIONS, OuroborosConfig, check_whole
from .modulation import MODULATIONS, ModulatedLinear, RunningMean, emitted, places_in
from .pretrained import ConvertedModel

MASKS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}


class StepNorm(nn.Module):
    """RMSNorm with a weight vector of its own at each step, in float32 at least (system.md 5, item 3)."""

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
    """h <- g * h' + (1 - g) * h with g = sigmoid(W_g [h'; h] + b_g), elementwise (system.md 5, item 4)."""

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


class Recurrence(GradientCheckpointingLayer):
    """One recurrence step, and all that is trained: modulation, gate and step norms; absent parts are None.

    Under gradient checkpointing the step is recomputed as a whole, so that the layer meets the modulation it met.
    """

    def __init__(self, config: OuroborosConfig):
        super().__init__()
        self.max_steps = config.max_steps
        self.modulation = MODULATIONS[config.modulation](config) if config.modulation != "none" else None
        self.gate = Gate(config) if config.gate else None
        self.step_norm = StepNorm(config) if config.step_norm else None

    def forward(self, h: torch.Tensor, step: int, layer: Callable[..., torch.Tensor], places: list[int],
                mask: torch.Tensor | None = None, past: RunningMean | None = None, **arguments) -> torch.Tensor:
        """Apply `layer` once, (B, T, d) -> (B, T, d), the projections with the ids `places` modulated for this step.

        `mask` (B, T) and `past` are what pooling leaves out and what it has seen; `arguments` are the layer's. No
        argument is a module: accelerate's hooks would move it.
        """
        t = min(step, self.max_steps - 1)
        m = () if self.modulation is None else self.modulation(h, t, mask, past).unbind(-2)  # K of (B or 1, T or 1, r)
        with emitted(places, m):
            new = layer(h, **arguments)
        if self.step_norm is not None:
            new = self.step_norm(new, t)
        return new if self.gate is None else self.gate(new, h)


class RecurrentCache(DynamicCache):
    """Keys and values with a slot per recurrence step: prelude i -> i, step t -> P + t, coda after.

    Behind them, for a Controller with causal pooling, each step's running mean. Made for one depth.
    """

    def __init__(self, config: OuroborosConfig, depth: int):
        kinds, window = config.layer_kinds, getattr(config.base, "sliding_window", None)
        kinds = kinds[:config.n_prelude] + [kinds[config.n_prelude]] * depth + kinds[config.n_prelude + 1:]
        slots = [DynamicSlidingWindowLayer(window) if kind == "sliding_attention" else DynamicLayer()
                 for kind in kinds]
        means = [RunningMean() for _ in range(depth if config.modulation == "controller" else 0)]
        Cache.__init__(self, layers=slots + means)
        self.depth, self.means = depth, means or [None] * depth


class _Slot:
    """One slot of a cache, whichever index the attention module that writes to it carries."""

    def __init__(self, cache: RecurrentCache, index: int):
        self.cache, self.index = cache, index

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args, **kwargs):
        return self.cache.update(keys, values, self.index, *args, **kwargs)


class OuroborosForCausalLM(ConvertedModel, PreTrainedModel, GenerationMixin):
    """A cut base model whose recurrent layer is applied `depth` times; only `recurrence` is trained.

    `base` is the base model's own class with the kept layers. All its weights are frozen, and so are the SVD bases.
    `recurrence` stays in float32 when the base is in half precision.
    """

    config_class = OuroborosConfig
    base_model_prefix = "base"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = ["recurrence"]

    def __init__(self, config: OuroborosConfig):
        super().__init__(config)
        base = config.base
        self.base = AutoModelForCausalLM.from_config(base, attn_implementation=config._attn_implementation)
        self.base.requires_grad_(False)
        if config.modulation != "none":
            for name, parent in PROJECTIONS.items():
                linear = getattr(getattr(self.recurrent_layer, parent), name)
                if config.rank > min(linear.weight.shape):
                    raise InputError(f"rank {config.rank}: larger than projection {name}, which is "
                                     f"{linear.out_features} x {linear.in_features}; choose at most "
                                     f"{min(linear.weight.shape)}")
                setattr(getattr(self.recurrent_layer, parent), name,
                        ModulatedLinear(linear, config.rank, config.alpha))
        self.recurrence = Recurrence(config)
        self.post_init()

    def _init_weights(self, module):  # every part initialises itself
        pass

    @property
    def recurrent_layer(self) -> nn.Module:
        """The layer that is applied at every recurrence step."""
        return self.base.model.layers[self.config.n_prelude]

    @property
    def projections(self) -> list[ModulatedLinear]:
        """The recurrent layer's modulated projections, in the order of PROJECTIONS; empty without modulation."""
        return [module for module in self.recurrent_layer.modules() if isinstance(module, ModulatedLinear)]

    def get_input_embeddings(self):
        return self.base.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.base.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.base.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module):
        self.base.set_output_embeddings(value)

    def _set_gradient_checkpointing(self, *args, **kwargs):
        super()._set_gradient_checkpointing(*args, **kwargs)
        # the step is recomputed as a whole; the layer alone would be without its modulation by then
        self.recurrent_layer.gradient_checkpointing = False

    def hidden(self, input_ids: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None,
               depth: int | None = None, position_ids: torch.Tensor | None = None,
               inputs_embeds: torch.Tensor | None = None, cache: RecurrentCache | None = None) -> list[torch.Tensor]:
        """(B, T) token ids -> the hidden states (B, T, d): embeddings, after each prelude layer, recurrence step and
        coda layer, the last one normed.

        `attention_mask` (B, S) covers the tokens in `cache` too, S = T without one. Padding on either side neither
        enters the pool nor changes other rows. Raises InputError for a depth below 1, another depth than the cache's,
        and a mask that isn't (B, S).
        """
        depth = self._depth(depth, cache)
        model, config = self.base.model, self.config
        first, last = config.n_prelude, config.n_prelude + depth
        frozen = not any(p.requires_grad for module in (model.embed_tokens, *model.layers[:first])
                         for p in module.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):  # nothing is trained up to the loop
            h = model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        seen = 0 if cache is None else cache.get_seq_length()
        if attention_mask is not None and attention_mask.shape != (h.shape[0], seen + h.shape[1]):
            raise InputError(f"attention_mask of shape {tuple(attention_mask.shape)}: must be (batch, tokens), here "
                             f"{(h.shape[0], seen + h.shape[1])}")
        if position_ids is None:
            position_ids = _positions(h, attention_mask, seen)
        rotary = model.rotary_emb(h, position_ids)
        masks = _masks(config, h, attention_mask, position_ids, cache)
        pooled = None if attention_mask is None else attention_mask[:, seen:]

        def arguments(index: int, slot: int) -> dict:
            past = None if cache is None else _Slot(cache, slot)
            return dict(attention_mask=masks[index], position_ids=position_ids, position_embeddings=rotary,
                        past_key_values=past, use_cache=cache is not None)

        states = [h]
        with torch.set_grad_enabled(torch.is_grad_enabled() and (not frozen or h.requires_grad)):
            for index in range(first):
                states.append(model.layers[index](states[-1], **arguments(index, index)))
        layer = self.recurrent_layer.__call__
        places = places_in(self.recurrent_layer) if self.config.modulation != "none" else []
        # a compiled step (`recurrence.compile()`) would be compiled anew as the cache's slots change
        apply = self.recurrence if cache is None else self.recurrence.forward
        for step in range(depth):
            past = None if cache is None else cache.means[step]
            states.append(apply(states[-1], step, layer, places, pooled, past, **arguments(first, first + step)))
        for slot, index in enumerate(range(first + 1, len(model.layers)), last):
            states.append(model.layers[index](states[-1], **arguments(index, slot)))
        states[-1] = model.norm(states[-1])
        return states

    def _depth(self, depth: int | None, cache: RecurrentCache | None) -> int:
        if depth is None:
            depth = self.config.depth if cache is None else cache.depth
        check_whole("depth", depth, least=1)
        if cache is not None and depth != cache.depth:
            raise InputError(f"depth {depth}: the key/value cache was made at depth {cache.depth}; start a new one")
        return depth

    def _cache(self, past_key_values: Cache | None, use_cache: bool | None, depth: int | None) -> Cache | None:
        """The cache to read and write: the given one, a new one, or None; see `forward`."""
        leaks = self.config.modulation == "controller" and self.config.pooling == "sequence"
        if use_cache is None:
            use_cache = past_key_values is not None or (self.config.use_cache and not self.training and not leaks)
        if not use_cache:
            return None
        if leaks:
            raise InputError("use_cache: pooling 'sequence' averages over tokens that are still to come, so cached "
                             "states would be wrong; pass use_cache=False, or convert with pooling='causal'")
        if past_key_values is None:
            return RecurrentCache(self.config, self._depth(depth, None))
        if not isinstance(past_key_values, RecurrentCache):
            raise InputError(f"past_key_values: a {type(past_key_values).__name__} has no slot a recurrence step; pass "
                             "the one that the model returned, or none")
        return past_key_values

    @can_return_tuple
    def forward(self, input_ids: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None,
                position_ids: torch.Tensor | None = None, past_key_values: RecurrentCache | None = None,
                inputs_embeds: torch.Tensor | None = None, labels: torch.Tensor | None = None,
                use_cache: bool | None = None, depth: int | None = None, logits_to_keep: int | torch.Tensor = 0,
                output_hidden_states: bool | None = None, **kwargs) -> CausalLMOutputWithPast:
        """(B, T) token ids -> logits (B, T, V); with `labels` (B, T) the loss too, nats per token.

        Labels are shifted inside, -100 is ignored. `depth` takes the place of the configuration's for this call.
        `output_hidden_states` gives embeddings, then the state after each prelude layer, recurrence step and coda
        layer, each (B, T, d), the last one normed. A key/value cache is made in evaluation, unless `use_cache` or the
        configuration says no or the pooling is `sequence`. `logits_to_keep` last positions, or those at its indices,
        get logits; 0 means all. Raises InputError as `hidden` does, and for a cache that can't be right.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("forward: give either input_ids or inputs_embeds")
        cache = self._cache(past_key_values, use_cache, depth)
        states = self.hidden(input_ids, attention_mask, depth, position_ids, inputs_embeds, cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.base.lm_head(states[-1][:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.base.vocab_size, **kwargs)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache,
                                      hidden_states=tuple(states) if output_hidden_states else None)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """No: `generate` leaves the cache to `forward`, which knows the depth."""
        return False


def _positions(h: torch.Tensor, mask: torch.Tensor | None, seen: int) -> torch.Tensor:
    """(B or 1, T) position ids of the new tokens; padding on the left doesn't count."""
    if mask is None:
        return torch.arange(seen, seen + h.shape[1], device=h.device)[None]
    return (mask.long().cumsum(1) - 1).clamp(min=0)[:, seen:]


def _masks(config: OuroborosConfig, h: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor,
           cache: RecurrentCache | None) -> list:
    """Each kept layer's attention mask: causal under every implementation, sliding where the base says so."""
    arguments = dict(config=config.base, inputs_embeds=h, attention_mask=mask, past_key_values=cache,
                     position_ids=positions)
    made = {kind: MASKS[kind](**arguments) for kind in set(config.layer_kinds)}
    return [made[kind] for kind in config.layer_kinds]
