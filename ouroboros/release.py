"""Checkpoints in the layout of the authors' public release: `OuroborosForCausalLM.from_release`."""

import pickle
from collections.abc import Mapping

import torch
from torch import nn

from .errors import InputError, first_line
from .model.pretrained import ConvertedModel


def from_release(kind: type[ConvertedModel], checkpoint, base, pooling: str = "sequence", **options) -> ConvertedModel:
    """A checkpoint in the public release's layout: a torch file with `controller`, `gate`, `step_norm` states.

    Read with weights_only=True (the release does otherwise, system.md `pickles`) and filled in by shape and order.
    The file has no frozen part: `base` and `options` are those of `from_base`. Raises InputError for a file that
    can't be read without running code, and where a state doesn't fit.
    """
    model = kind.from_base(base, pooling=pooling, **options)
    parts = {"controller": model.recurrence.modulation, "gate": model.recurrence.gate,
             "step_norm": model.recurrence.step_norm}
    try:
        states = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise InputError(f"{checkpoint}: can't be read as tensors alone ({first_line(error)}); "
                         "give a file that torch.load reads with weights_only=True") from None
    for name, part in parts.items():
        if not isinstance(states, Mapping) or not isinstance(states.get(name), Mapping):
            raise InputError(f"{checkpoint}: has no state '{name}'; the release's layout has {', '.join(parts)}")
        _fill(part, states[name], f"{checkpoint}: state '{name}'")
    return model


@torch.no_grad()
def _fill(part: nn.Module, state: Mapping, where: str) -> None:
    """Fill a part's parameters from a state whose names differ: by shape, in order.

    A matrix may be split by rows, as the release's seven heads and 64 norms are.
    """
    left = {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    for name, parameter in part.named_parameters():
        same = [key for key, tensor in left.items() if tensor.shape == parameter.shape][:1]
        rows = same or [key for key, tensor in left.items()
                        if tensor.shape[tensor.ndim - parameter.ndim + 1:] == parameter.shape[1:]
                        and tensor.ndim in (parameter.ndim, parameter.ndim - 1) and parameter.ndim > 1]
        found = [left.pop(key).reshape(-1, *parameter.shape[1:]) for key in rows]
        if sum(len(tensor) for tensor in found) != len(parameter):
            raise InputError(f"{where}: nothing fits {name}, {tuple(parameter.shape)}; convert with the widths, rank "
                             "and base that it was trained with")
        parameter.copy_(torch.cat(found))
    if left:
        raise InputError(f"{where}: {', '.join(left)} fits nothing; convert with the widths, rank and base that it was "
                         "trained with")
