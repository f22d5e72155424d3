"""The configuration of an Ouroboros model: a base model's configuration and what the surgery adds to it."""

import copy
from math import isfinite
from numbers import Integral, Real
from typing import NamedTuple

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..errors import InputError

PROJECTIONS = {  # the seven modulated projections (system.md 3) and the submodule that holds each
    "q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn", "o_proj": "self_attn",
    "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp",
}
FAMILIES = (  # model types whose loop is compared with the base's own cut, tests/test_families.py
    "llama", "mistral", "qwen2", "qwen3", "olmo", "olmo2", "olmo3", "smollm3", "stablelm", "gemma", "gemma2",
    "gemma3_text", "granite", "cohere", "cohere2", "ministral3", "exaone4", "ernie4_5", "helium", "hunyuan_v1_dense",
    "seed_oss", "phi3", "glm", "glm4")
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}  # in one weight
FUSING = {"phi3": FUSED.keys(), "glm": {"gate_up_proj"}, "glm4": {"gate_up_proj"}}  # in which family
PER_LAYER = ("layer_types", "no_rope_layers")  # a configuration's lists with an entry a layer
SINKS = 4  # first positions of a text, where the residual stream is far larger than elsewhere
POOLINGS = ("causal", "sequence")
COUNTS = ("depth", "max_steps", "rank", "state_width", "step_width", "hidden_width", "output_width")  # 1 or more
AS_BASE = (  # what others read off any model's configuration, where the base's has it: TRL makes logits with the last
    "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "max_position_embeddings", "logit_scale", "logits_scaling", "final_logit_softcapping")


class Split(NamedTuple):
    """system.md 2: the first `prelude` layers, the layer with index `recurrent`, the last `coda` layers."""

    prelude: int
    recurrent: int
    coda: int


def check_whole(field: str, value, least: int) -> int:
    """`value`, Python's or NumPy's. Raises InputError unless it is a whole number, `least` or more."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise InputError(f"{field} {value!r}: must be a whole number, {least} or more")
    return int(value)


def weights_of(config: PretrainedConfig) -> dict[tuple[str, str], list[int]]:
    """The weights of a layer in the order of PROJECTIONS, {(submodule, name): rows of each projection in it}."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    q, k, up = head * config.num_attention_heads, head * config.num_key_value_heads, config.intermediate_size
    rows = dict(zip(PROJECTIONS, (q, k, k, config.hidden_size, up, up, config.hidden_size), strict=True))
    fused = {part: name for name in FUSING.get(config.model_type, ()) for part in FUSED[name]}
    found = {}
    for name, parent in PROJECTIONS.items():
        found.setdefault((parent, fused.get(name, name)), []).append(rows[name])
    return found


def take_layers(config: PretrainedConfig, indices: list[int]) -> PretrainedConfig:
    """A copy of a configuration for the layers with these indices, in this order, some of them more than once."""
    taken = copy.copy(config)
    taken.num_hidden_layers = len(indices)
    for field in PER_LAYER:
        if getattr(config, field, None):
            setattr(taken, field, [getattr(config, field)[index] for index in indices])
    return taken


class OuroborosConfig(PretrainedConfig):
    """Split, depth, rank and parts of an Ouroboros model (system.md 2 to 5). InputError for a value out of range.

    Args:
        base: the cut base's configuration (`surgery.cut_config`), as an object or a dict with `model_type`.
        n_prelude, recurrent_layer, n_coda: the first layers kept, the index of the looped one, the last layers kept.
        depth: times the recurrent layer is applied, 1 or more; may be given anew at each forward call.
        max_steps: entries of the step tables; step t reads entry min(t, max_steps - 1).
        rank, alpha: r, columns of the frozen SVD bases; the low-rank branch is scaled by alpha / r.
        modulation: `controller`, `static` (a learned table), `none`, or a name in `modulation.MODULATIONS`.
        pooling: what the Controller reads at position t: the mean of the hidden state over positions <= t (`causal`),
            or over the whole sequence (`sequence`), which looks ahead.
        gate, step_norm, gate_bias: whether the recurrence has them; b_g at the start, at -2 a gate of 0.119.
        state_width, step_width, hidden_width, output_width: the Controller's (system.md 4).
        base_reference: `name`, `revision`, `sha256` of the base's weights and any `gguf_file`; empty if not converted.
        weights_sha256: of the tensors in the file that `save_pretrained` wrote; set there, checked when loading.
    """

    model_type = "ouroboros"
    sub_configs = {"base": AutoConfig}

    def __init__(self, base=None, n_prelude=8, recurrent_layer=18, n_coda=8, depth=8, max_steps=64, rank=32,
                 alpha=16.0, modulation="controller", pooling="causal", gate=True, step_norm=True, gate_bias=-2.0,
                 state_width=256, step_width=128, hidden_width=256, output_width=128, base_reference=None,
                 weights_sha256=None, use_cache=True, **kwargs):
        if isinstance(base, dict):
            base = CONFIG_MAPPING[base["model_type"]](**base)
        self.base, self.n_prelude, self.recurrent_layer, self.n_coda = base, n_prelude, recurrent_layer, n_coda
        self.depth, self.max_steps, self.rank, self.alpha = depth, max_steps, rank, alpha
        self.modulation, self.pooling = modulation, pooling
        self.gate, self.step_norm, self.gate_bias = gate, step_norm, gate_bias
        self.state_width, self.step_width = state_width, step_width
        self.hidden_width, self.output_width = hidden_width, output_width
        self.base_reference, self.weights_sha256, self.use_cache = base_reference or {}, weights_sha256, use_cache
        from .modulation import MODULATIONS  # here: that file reads this one

        for field, choices in (("modulation", (*MODULATIONS, "none")), ("pooling", POOLINGS)):
            if getattr(self, field) not in choices:
                raise InputError(f"{field} '{getattr(self, field)}': unknown; one of {', '.join(choices)}")
        for field in ("n_prelude", "recurrent_layer", "n_coda", *COUNTS):
            setattr(self, field, check_whole(field, getattr(self, field), least=1 if field in COUNTS else 0))
        for field, boolean in (("gate", True), ("step_norm", True), ("alpha", False), ("gate_bias", False)):
            value = getattr(self, field)
            if isinstance(value, bool) != boolean or not isinstance(value, Real) or not isfinite(value):
                kind = "true or false" + " (from_base: or matched)" * (field == "step_norm") if boolean else "a number"
                raise InputError(f"{field} {value!r}: must be {kind}")
            setattr(self, field, value if boolean else float(value))  # NumPy's can't be saved
        if base is not None:
            defaults = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")  # where not given
            kwargs = {name: getattr(base, name, None) for name in defaults} | kwargs
        super().__init__(**{name: value for name, value in kwargs.items() if name not in AS_BASE})

    def to_dict(self) -> dict:
        """As transformers', with what is read off the base: peft looks for it here."""
        return super().to_dict() | {name: getattr(self, name) for name in AS_BASE if hasattr(self, name)}

    @property
    def num_hidden_layers(self) -> int:
        """Slots for keys and values at the configured depth: prelude, a step each, coda."""
        return self.n_prelude + self.depth + self.n_coda

    @property
    def split(self) -> Split:
        """Prelude, recurrent layer and coda."""
        return Split(prelude=self.n_prelude, recurrent=self.recurrent_layer, coda=self.n_coda)

    def order(self, depth: int) -> list[int]:
        """Indices of the kept layers as they are applied: prelude, the recurrent one `depth` times, coda."""
        layers = list(range(self.base.num_hidden_layers))
        return layers[:self.n_prelude] + [self.n_prelude] * depth + layers[self.n_prelude + 1:]

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As transformers', but `base` is left to the model's `from_pretrained`: the Auto classes hand it on."""
        base = kwargs.pop("base", None)
        found = super().from_dict(config_dict, **kwargs)
        return found if base is None or not isinstance(found, tuple) else (found[0], found[1] | {"base": base})

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: transformers would copy this file beside the weights, `save_pretrained` writes what is needed."""


for _name in AS_BASE:  # live: what is set, as by `resize_token_embeddings`, is computed with
    setattr(OuroborosConfig, _name, property(lambda self, name=_name: getattr(self.base, name),
                                             lambda self, value, name=_name: setattr(self.base, name, value)))
