"""A loop as a plain, deeper model of its base's own class, where it is one: `OuroborosForCausalLM.unroll`."""

import copy

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from .errors import InputError
from .model.checkpoint import tensors_of
from .model.configuration import take_layers, weights_of
from .model.modeling import OuroborosForCausalLM
from .model.pretrained import fill
from .model.surgery import taken_tensors


@torch.no_grad()
def unroll(model: OuroborosForCausalLM, depth: int | None = None) -> PreTrainedModel:
    """The same function without this package: a model of the base's class in which each step is a layer of its own.

    A step's W + (alpha / r) B diag(m) A (system.md 3) is merged in the base's dtype. Raises InputError for a gate, step
    norms and a modulation that reads the hidden states, which are no weights, and for adapters on the base.
    """
    depth, loop = model._depth(depth, None), model.recurrence
    reads = loop.modulation is not None and getattr(loop.modulation, "reads", True)
    for part, there in (("gate", loop.gate), ("step norms", loop.step_norm), ("modulation by the state", reads)):
        if there:
            raise InputError(f"unroll: a plain model has no {part}; convert with gate=False, step_norm=False and "
                             "modulation 'static' or 'none'")
    if model._hf_peft_config_loaded or any(hasattr(module, "base_layer") for module in model.modules()):
        raise InputError("unroll: the model has adapters; merge them into the weights first (merge_and_unload)")
    order = model.config.order(depth)
    config = copy.deepcopy(take_layers(model.config.base, order))
    plain = AutoModelForCausalLM.from_config(config, dtype=model.dtype).to(model.device)
    plain.generation_config = copy.deepcopy(model.generation_config)  # its stop tokens
    plain.generation_config.__dict__.pop("depth", None)
    fill(plain, taken_tensors(tensors_of(model.base), order))
    for step in range(depth if model.projections else 0):
        unread = model.get_input_embeddings().weight[None, :1]  # (1, 1, d), of the right dtype and device
        m = loop.modulation(unread, min(step, loop.max_steps - 1), None)[0, 0]  # (K, r)
        weights = weights_of(config)
        parts = m.split([len(rows) for rows in weights.values()])  # of (1 or more, r)
        for place, projection, diagonal in zip(weights, model.projections, parts, strict=True):
            layer = f"model.layers.{model.config.n_prelude + step}"
            plain.get_submodule(".".join([layer, *place])).weight += projection.update(diagonal.flatten())
    return plain.eval()
