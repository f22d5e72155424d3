"""OuroborosModel: prelude, gated recurrence with modulated weights, coda (system.md 5); OuroborosForCausalLM: its head.

Shapes: B batch, T positions, d width, V vocabulary.
"""

import copy
import functools
from collections.abc import Callable

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel, masking_utils
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import local_torch_dtype
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import can_return_tuple

from ..errors import InputError
from .cache import RecurrentCache, RunningMean, Slot
from .configuration import SINKS, OuroborosConfig, check_whole, take_layers, weights_of
from .modulation import MODULATIONS, Mask, ModulatedLinear, emitted, places_in
from .pretrained import ConvertedModel

# what transformers' causal LMs take besides the arguments by name: what position_ids say too; for the loss
PACKED = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
LOSS = {"num_items_in_batch", "shift_labels", "ignore_index"}
WRAPPERS = ("forward", "_compiled_call_impl")  # of accelerate and compile: they call the module they were made for


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

    @torch.no_grad()
    def match(self, forward: Callable[[], object], mask: torch.Tensor | None = None) -> list[float]:
        """Set each step's weights to the size of what it norms (docs/protocol.md, matched), returned a step each.

        `forward` runs the loop. The size is the root mean square, the median over tokens but each row's first SINKS and
        those where `mask` (B, T), padded on the right, is 0; steps beyond have the last one's.
        """
        found = []

        def measure(module, inputs) -> None:
            h, t = inputs
            h = h[:, SINKS:] if mask is None else h[:, SINKS:][mask[:, SINKS:].bool()]
            found.append(h.float().square().mean(-1).sqrt().median().item())
            self.weight[t:] = found[-1]

        with self.register_forward_pre_hook(measure):
            forward()
        return found


class Gate(nn.Module):
    """h <- g * h' + (1 - g) * h with g = sigmoid(W_g [h'; h] + b_g), elementwise (system.md 5, item 4)."""

    def __init__(self, config: OuroborosConfig):
        super().__init__()
        self.linear = nn.Linear(2 * config.base.hidden_size, config.base.hidden_size)
        nn.init.zeros_(self.linear.weight)
        nn.init.constant_(self.linear.bias, config.gate_bias)

    def forward(self, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        """(B, T, d), (B, T, d) -> (B, T, d)."""
        both = torch.cat([new, old], dim=-1).to(self.linear.weight.dtype)
        g = torch.sigmoid(self.linear(both)).to(new.dtype)
        return g * new + (1 - g) * old


class Recurrence(GradientCheckpointingLayer):
    """One step: modulation, gate and step norms, each None where absent. Checkpointed, it is recomputed as a whole."""

    def __init__(self, config: OuroborosConfig):
        super().__init__()
        self.max_steps = config.max_steps
        self.modulation = MODULATIONS[config.modulation](config) if config.modulation != "none" else None
        self.gate = Gate(config) if config.gate else None
        self.step_norm = StepNorm(config) if config.step_norm else None

    def forward(self, h: torch.Tensor, step: int, layer: Callable[..., torch.Tensor], places: list[int],
                mask: Mask = None, past: RunningMean | None = None, **arguments) -> torch.Tensor:
        """Apply `layer` once, (B, T, d) -> (B, T, d), the projections with the ids `places` modulated for this step.

        `mask` is what pooling leaves out, `past` what it has seen. No argument is a module: accelerate would move it.
        """
        t = min(step, self.max_steps - 1)
        m = () if self.modulation is None else self.modulation(h, t, mask, past).unbind(-2)  # K of (B or 1, T or 1, r)
        with emitted(places, m):
            new = layer(h, **arguments)
        new = new if self.step_norm is None else self.step_norm(new, t)
        return new if self.gate is None else self.gate(new, h)


class OuroborosModel(ConvertedModel, PreTrainedModel):
    """A cut base, `base`, frozen, whose recurrent layer runs `depth` times in `recurrence`, which alone is trained."""

    config_class = OuroborosConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _keep_in_fp32_modules_strict = ["recurrence"]
    _tied_weights_keys = {"base.lm_head.weight": "base.model.embed_tokens.weight"}  # where the configuration says so

    def __init__(self, config: OuroborosConfig):
        kept, there = config.n_prelude + 1 + config.n_coda, getattr(config.base, "num_hidden_layers", 0)
        if there != kept:
            raise InputError(f"base: its configuration has {there} layers, the split keeps {kept}; call from_base")
        self._supports_sdpa = AutoModelForCausalLM._model_mapping[type(config.base)]._supports_sdpa
        super().__init__(config)
        self.base = AutoModelForCausalLM.from_config(config.base, attn_implementation=config._attn_implementation)
        self.base.requires_grad_(False)
        if config.modulation != "none":
            for (parent, name), rows in weights_of(config.base).items():
                part = getattr(self.recurrent_layer, parent)
                linear = getattr(part, name)
                if config.rank > min(*rows, linear.in_features):
                    raise InputError(f"rank {config.rank}: larger than projection {name}, which is {min(rows)} x "
                                     f"{linear.in_features}; choose its smaller side or less")
                setattr(part, name, ModulatedLinear(linear, config.rank, config.alpha, len(rows)))
        with local_torch_dtype(torch.promote_types(torch.get_default_dtype(), torch.float32)):
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
        """The recurrent layer's modulated weights, in the order of `weights_of`; empty without modulation."""
        places = map(".".join, weights_of(self.config.base))  # each may be wrapped by an adapter
        return [module for place in places for module in self.recurrent_layer.get_submodule(place).modules()
                if isinstance(module, ModulatedLinear)]

    def hidden(self, input_ids: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None,
               depth: int | None = None, position_ids: torch.Tensor | None = None,
               inputs_embeds: torch.Tensor | None = None, cache: RecurrentCache | None = None) -> list[torch.Tensor]:
        """(B, T) token ids -> 1 + P + depth + C states (B, T, d): embeddings, then after each layer; the last normed.

        `attention_mask` (B, S) covers the tokens in `cache` too; padding on either side changes nothing. Where
        `position_ids` don't go up by one, documents are packed: neither attention nor pool reaches over. Raises
        InputError for a depth below 1 or not the cache's, a mask of another shape, packing with a mask or a cache.
        """
        depth = self._depth(depth, cache)
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        seen = 0 if cache is None else cache.get_seq_length()
        shape, wanted = getattr(attention_mask, "shape", None), (tokens.shape[0], seen + tokens.shape[1])
        if attention_mask is not None and shape != wanted:
            raise InputError(f"attention_mask of shape {shape and tuple(shape)}: must be {wanted} (batch, tokens)")
        documents = _documents(position_ids, attention_mask, tokens.shape[0])
        if documents and cache is not None:
            raise InputError("position_ids: don't go up by one within a row, and packed documents need use_cache=False")
        pooled = documents
        if attention_mask is not None:
            attention_mask = attention_mask.bool()  # as attention reads it
            pooled = attention_mask[:, seen:]
            if position_ids is None:  # padding on the left doesn't count
                position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, seen:]
        layer, modulated = self.recurrent_layer, self.config.modulation != "none"
        layer.gradient_checkpointing = False  # recomputed alone it would lack its modulation; the step is, as a whole
        places = places_in(layer, weights_of(self.config.base)) if modulated else []
        # a compiled step (`recurrence.compile()`) would be compiled anew as a cache's slots change; its hooks run
        apply = self.recurrence if cache is None else self.recurrence._call_impl
        states, means = [], [None] * depth if cache is None else cache.means

        def in_slot(slot: int, call: Callable, *of_step) -> Callable:
            def called(h: torch.Tensor, past_key_values: Cache | None = None, **arguments) -> torch.Tensor:
                states.append(h)
                return call(h, *of_step, past_key_values=None if cache is None else Slot(cache, slot), **arguments)
            return called

        model, first = self.base.model, self.config.n_prelude
        calls = [(kept,) for kept in model.layers]
        calls[first:first + 1] = [(apply, t, layer.__call__, places, pooled, means[t]) for t in range(depth)]
        inside = {"layers": [in_slot(slot, *call) for slot, call in enumerate(calls)],
                  "config": take_layers(model.config, self.config.order(depth))}
        out = _call(model, inside, input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                    past_key_values=cache, inputs_embeds=inputs_embeds, use_cache=cache is not None, return_dict=True)
        return [*states, out.last_hidden_state]

    def _depth(self, depth: int | None, cache: RecurrentCache | None) -> int:
        depth = check_whole("depth", (self.config if cache is None else cache).depth if depth is None else depth, 1)
        if cache is not None and depth != cache.depth:
            raise InputError(f"depth {depth}: the key/value cache was made at depth {cache.depth}; start a new one")
        return depth

    def _cache(self, past_key_values: Cache | None, use_cache: bool | None, depth: int | None,
               packed: bool) -> Cache | None:
        """The cache to read and write: the given one, a new one, or None; see `forward`."""
        pools = self.recurrence.modulation is not None and getattr(self.recurrence.modulation, "pools", True)
        leaks = pools and self.config.pooling == "sequence"
        if use_cache is None:
            use_cache = self.config.use_cache and not (self.recurrence.training or leaks or packed)
        if past_key_values is None and not use_cache:
            return None
        layers = (*self.base.model.layers, self.recurrence)
        if any(layer.training and getattr(layer, "gradient_checkpointing", False) for layer in layers):
            raise InputError("use_cache: layers under gradient checkpointing keep none; eval(), or use_cache=False")
        if leaks:
            raise InputError("use_cache: pooling 'sequence' averages over tokens still to come, so cached states "
                             "would be wrong; pass use_cache=False and no drafts, or convert with pooling='causal'")
        if past_key_values is None:
            return RecurrentCache(self.config, self._depth(depth, None), pools)
        if not isinstance(past_key_values, RecurrentCache) or (pools and past_key_values.means[0] is None):
            raise InputError(f"past_key_values: a {type(past_key_values).__name__} has no slot a recurrence step, or "
                             "no means for the pool; pass the model's own, or none")
        return past_key_values

    @can_return_tuple
    def forward(self, input_ids: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None,
                position_ids: torch.Tensor | None = None, past_key_values: RecurrentCache | None = None,
                inputs_embeds: torch.Tensor | None = None, use_cache: bool | None = None, depth: int | None = None,
                output_hidden_states: bool | None = None, **kwargs) -> BaseModelOutputWithPast:
        """(B, T) token ids -> the last hidden state (B, T, d), normed.

        `depth` is this call's; `output_hidden_states` gives what `hidden` does. A key/value cache that is given grows
        always; one is made if `use_cache` is True, or None in evaluation, unless the configuration says no, the pooling
        is `sequence` or documents are packed. Raises InputError as `hidden` does, and for another cache or keyword.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("forward: give either input_ids or inputs_embeds")
        if kwargs.pop("output_attentions", None) or self.config.output_attentions:
            raise InputError("output_attentions: isn't kept; use a forward hook on model.recurrent_layer.self_attn")
        kwargs.pop("cache_position", None)  # older code's: where the cache ends
        if unknown := sorted(kwargs.keys() - LOSS - (set() if position_ids is None else PACKED)):
            raise InputError(f"forward: '{unknown[0]}' is unknown, or isn't enough without position_ids; leave it out")
        packed = attention_mask is None and _documents(position_ids, None, 1) is not None
        cache = self._cache(past_key_values, use_cache, depth, packed)
        states = self.hidden(input_ids, attention_mask, depth, position_ids, inputs_embeds, cache)
        shown = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return BaseModelOutputWithPast(states[-1], cache, hidden_states=tuple(states) if shown else None)


class OuroborosForCausalLM(OuroborosModel, GenerationMixin):
    """OuroborosModel, which is its `model`, with the base's head."""

    def __init__(self, config: OuroborosConfig):
        super().__init__(config)
        self.__dict__["_model"] = None  # transformers has asked for it before this one was whole

    def __copy__(self):
        copied = type(self).__new__(type(self))
        copied.__dict__ |= self.__dict__ | {"_model": copy.copy(self.model)}  # its own, with the same hooks
        return copied

    @property
    def model(self) -> OuroborosModel:
        """The loop without the head. Both have one table of modules, so that each tensor has one name."""
        model = self.__dict__.get("_model")
        if model is None or model._modules is not self._modules:  # not made yet, or a shallow copy's
            model = self.__dict__["_model"] = OuroborosModel.__new__(OuroborosModel)
            model.__dict__ |= {name: value for name, value in self.__dict__.items() if name not in WRAPPERS}
            nn.Module.__init__(model)  # hooks of its own
            model.__dict__ |= {"_modules": self._modules, "_model": None}
        model.__dict__ |= {"config": self.config, "training": self.training}
        return model

    @can_return_tuple
    def forward(self, input_ids: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None,
                position_ids: torch.Tensor | None = None, past_key_values: RecurrentCache | None = None,
                inputs_embeds: torch.Tensor | None = None, labels: torch.Tensor | None = None,
                use_cache: bool | None = None, depth: int | None = None, logits_to_keep: int | torch.Tensor = 0,
                output_hidden_states: bool | None = None, **kwargs) -> CausalLMOutputWithPast:
        """(B, T) token ids -> logits (B, T, V); with `labels` (B, T) the loss too, nats per token.

        Labels are shifted inside, -100 is ignored. `logits_to_keep` last positions, or those at its indices, get logits
        (0: all). The rest is as in `OuroborosModel.forward`.
        """
        loop = functools.partial(self.model, depth=depth, output_hidden_states=output_hidden_states, return_dict=True)
        inside = {self.base.base_model_prefix: loop, "vocab_size": self.config.vocab_size,
                  "_loss_function": self.loss_function}  # else the logits and the loss are the base's own
        return _call(self.base, inside, input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                     past_key_values=past_key_values, inputs_embeds=inputs_embeds, labels=labels, use_cache=use_cache,
                     logits_to_keep=logits_to_keep, **kwargs | {"return_dict": True})

    def prepare_inputs_for_generation(self, input_ids, inputs_embeds=None, **kwargs):
        """As the base's: one with two ranges of positions begins a new cache in the second. InputError for drafts."""
        inputs = self.base.prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        if inputs.get("past_key_values") is None and (past := kwargs.get("past_key_values")) is not None:
            if past.record_past:
                raise InputError("drafts, crop: at these positions this base's cache begins anew; leave them out")
            inputs["depth"] = past.depth
        return inputs

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args):
        """As transformers', with the cache that `forward` makes. Raises InputError where another kind is asked for."""
        if model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False:
            return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        if (kind := generation_config.cache_implementation) not in (None, "dynamic"):
            raise InputError(f"cache_implementation '{kind}': the key/value cache is the model's own; leave it out")
        model_kwargs["past_key_values"] = self._cache(None, True, model_kwargs.get("depth"), packed=False)
        if generation_config.is_assistant:
            model_kwargs["past_key_values"].activate_past_recording()

    def init_continuous_batching(self, *args, **kwargs):
        """Raises InputError: its paged cache has no slot a recurrence step, nor a running mean."""
        raise InputError("continuous batching: its paged cache has no slot a recurrence step; call generate")

    def _prepare_generation_config(self, *args, **kwargs):
        """As transformers'; a `depth` in the generation configuration counts as one given to `generate`."""
        generation_config, arguments = super()._prepare_generation_config(*args, **kwargs)
        if generation_config.assistant_early_exit:
            raise InputError("assistant_early_exit: a loop has no earlier layer to exit at; draft with another depth")
        if getattr(generation_config, "depth", None) is not None:
            arguments.setdefault("depth", generation_config.depth)
        given = {arguments.get("depth"), getattr(arguments.get("past_key_values"), "depth", None)}
        if given - {None, self.config.depth} and generation_config.guidance_scale not in (None, 1):
            raise InputError("guidance_scale: transformers gives its second pass no depth; set config.depth instead")
        return generation_config, arguments


def _call(part: PreTrainedModel, inside: dict, **arguments):
    """Run a copy of a part of the base, as threads share it, in which these stand for its own. Its hooks run, what they
    set on the copy is set on the part. Raises InputError for another forward."""
    forward, hooked = part.__dict__.get("forward"), hasattr(part, "_hf_hook")  # by accelerate: it wraps the forward
    if not isinstance(part, PreTrainedModel) or (forward and not (hooked and isinstance(forward, functools.partial))):
        raise InputError(f"base, a {type(part).__name__}: has another forward, which doesn't know the loop; use hooks")
    shell = type(part).__new__(type(part))
    shell.__dict__ |= {name: value for name, value in part.__dict__.items() if name not in WRAPPERS}
    if forward:
        inside |= {"_old_forward": shell.forward, "forward": functools.partial(forward.func, shell)}
    shell.__dict__ |= inside  # what is there hides modules
    before = dict(shell.__dict__)
    try:
        return shell(**arguments)
    finally:  # a hook may stop the pass
        part.__dict__ |= {name: new for name, new in shell.__dict__.items() if before.get(name, before) is not new}


def _documents(positions: torch.Tensor | None, mask: torch.Tensor | None, rows: int) -> list[int] | None:
    """The lengths of packed documents, row after row, where position ids don't go up by one within a row; else None."""
    if positions is None or positions.shape[-1] == 1:
        return None
    index = masking_utils.find_packed_sequence_indices(positions)  # as the attention masks separate them
    if index is not None and mask is not None:
        seen = mask[:, -index.shape[1]:].bool()  # position ids of padding may be anything
        if ((index.diff() > 0) & seen[:, 1:] & seen[:, :-1]).any():
            raise InputError("position_ids: don't go up by one within a row, but documents packed with an "
                             "attention_mask would be read as one; leave the mask out")
    if index is None or mask is not None or not index[:, -1].any():  # compiled, an index is made for one document too
        return None
    starts = torch.arange(rows, device=index.device)[:, None] * index.shape[1]  # no document spans two rows
    return (starts + index).flatten().unique_consecutive(return_counts=True)[1].tolist()


for _name in ("get_input_embeddings", "set_input_embeddings", "get_output_embeddings", "set_output_embeddings"):
    setattr(OuroborosModel, _name, lambda self, *value, name=_name: getattr(self.base, name)(*value))
AutoConfig.register(OuroborosConfig.model_type, OuroborosConfig, exist_ok=True)
AutoModel.register(OuroborosConfig, OuroborosModel, exist_ok=True)
AutoModelForCausalLM.register(OuroborosConfig, OuroborosForCausalLM, exist_ok=True)
# Trainer's label smoother shifts the labels of these names' classes alone
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[OuroborosConfig.model_type] = OuroborosForCausalLM.__name__
