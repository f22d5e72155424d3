"""What an arm costs, counted on its model, and how fast this machine is."""

import timeit
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoConfig, AutoModelForCausalLM

from ..experiment.plan import RunSpec
from ..experiment.profile import Profile
from ..experiment.protocol import DRAWN_DEPTHS
from . import evaluation
from .build import build
from .corpus import LOOK_AHEAD
from .trainer import as_hidden, training_loss

aten = torch.ops.aten
COUNTS = flop_registry | {  # what torch counts, and two it doesn't: y += a b in place, and attention on a CPU
    aten.addmm_: lambda y, a, b, **_: 2 * a.shape[0] * a.shape[1] * b.shape[1],
    aten._scaled_dot_product_flash_attention_for_cpu:
        lambda q, k, v, *_, **__: sdpa_flop_count(q.shape, k.shape, v.shape),
    aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape),
}


class _Counter(TorchDispatchMode):
    """Adds up the FLOPs of what runs inside. (torch's `FlopCounterMode` hooks modules too and fails on ours.)"""

    total = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if count := COUNTS.get(operation._overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


def flops(model: nn.Module, spec: RunSpec, profile: Profile) -> dict[str, int]:
    """FLOPs a token of a forward pass with logits and, of an arm that is trained, of one with its backward pass
    (`training`), its teacher's included, on blocks of the profile's length; where depths are drawn, their mean.

    A FLOP is a multiplication or an addition in a matrix product. An optimizer's step, a few FLOPs a trained parameter,
    isn't counted. The model's parameters are as before, without gradients; nothing is drawn.
    """
    ids = torch.zeros(1, profile.training.block, dtype=torch.long, device=next(model.parameters()).device)
    depths = DRAWN_DEPTHS if spec.depth == "mixed" else (spec.depth,)
    found = {"forward": 0, "training": 0} if spec.trained else {"forward": 0}
    for depth in depths:
        for kind in found:
            with _Counter() as counter, torch.set_grad_enabled(kind == "training"):
                states, head = as_hidden(model)(ids, depth)
                logits = F.linear(states, head.to(states.dtype))
                if kind == "training":
                    loss, teacher = logits.sum(), getattr(model, "teacher", None)
                    if teacher is not None:
                        loss = teacher.loss(model, loss, states, F.pad(ids, (0, LOOK_AHEAD)))
                    loss.backward()
            found[kind] += counter.total / len(depths) / ids.numel()
    model.zero_grad(set_to_none=True)
    return {kind: round(value) for kind, value in found.items()}


def speed(profile: Profile) -> tuple[float, float]:
    """FLOPs a second of the Controller's updates and evaluations on this machine, one thread, on a random base."""
    profile.register_arms()  # a process of its own hasn't read the profile's file
    torch.set_num_threads(1)
    kind = dict(profile.base.model or {})
    config = AutoConfig.for_model(kind.pop("model_type", "qwen2"), **kind)
    depth, training = profile.depths[0], profile.training
    spec = RunSpec("controller", depth, profile.rank, "corrected", 0)
    model = build(spec, profile, AutoModelForCausalLM.from_config(config).eval())
    chunk = torch.randint(config.vocab_size, (training.micro_batch, training.block + evaluation.LOOK_AHEAD))
    head = model.get_output_embeddings().weight

    def update() -> None:
        training_loss(model, head, chunk, depth, "t+1").backward()

    def evaluate() -> None:
        evaluation.block_losses(as_hidden(model), chunk.numpy(), evaluation.Depths(depth, 0), training.micro_batch)

    tokens, cost = training.micro_batch * training.block, flops(model, spec, profile)
    return tokens * cost["training"] / _seconds(update), tokens * cost["forward"] / _seconds(evaluate)


def _seconds(call: Callable[[], None]) -> float:
    """Seconds of a call, the median of three after one that warms up."""
    return float(np.median(timeit.repeat(call, number=1, repeat=4)[1:]))
