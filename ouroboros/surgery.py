"""Pretrained causal LM -> Ouroboros: pick layers, take the mean residual, truncate its SVD (SYSTEM 2 and 3)."""

import copy

import torch
from torch import nn

from .configuration import PROJECTIONS
from .errors import InputError
from .experiment import SplitConfig


def kept_layers(n_layers: int, split: SplitConfig) -> list[int]:
    """Indices of the kept layers: prelude, recurrent, coda.

    Raises InputError when the split doesn't fit the layers, or removes none of them.
    """
    prelude, recurrent, coda = split.prelude, split.recurrent, split.coda
    name = f"split {prelude}/{recurrent}/{coda} (prelude/recurrent layer/coda)"
    if min(prelude, recurrent, coda) < 0 or prelude + 1 + coda > n_layers:
        raise InputError(f"{name}: needs {prelude + 1 + coda} layers, the base has {n_layers}; keep fewer")
    if not prelude <= recurrent < n_layers - coda:
        raise InputError(f"{name}: layer {recurrent} isn't between prelude and coda of a base with {n_layers} layers; "
                         f"choose {prelude} to {n_layers - coda - 1}")
    if prelude + 1 + coda == n_layers:
        raise InputError(f"{name}: removes none of the base's {n_layers} layers, so there is no residual; keep fewer")
    return [*range(prelude), recurrent, *range(n_layers - coda, n_layers)]


def removed_layers(n_layers: int, split: SplitConfig) -> list[int]:
    """Indices of the layers that the mean residual is taken over."""
    return sorted(set(range(n_layers)) - set(kept_layers(n_layers, split)))


def cut_layers(model: nn.Module, split: SplitConfig) -> nn.Module:
    """The base with the kept layers only, each once: the arm `cut`. Weights are shared with `model`."""
    kept = kept_layers(len(model.model.layers), split)
    cut = copy.copy(model)
    cut._modules = dict(model._modules)
    cut.model = copy.copy(model.model)
    cut.model._modules = dict(model.model._modules)
    cut.model.layers = nn.ModuleList(model.model.layers[i] for i in kept)
    cut.model.config = cut.config = copy.deepcopy(model.config)
    cut.config.num_hidden_layers = len(kept)
    if getattr(cut.config, "layer_types", None):
        cut.config.layer_types = [model.config.layer_types[i] for i in kept]
    return cut


def mean_residual(layers: nn.ModuleList, split: SplitConfig, name: str, parent: str) -> torch.Tensor:
    """R = mean over the removed layers of (W_i - W), (out, in) float32, for one projection of the recurrent layer."""
    def weight(index: int) -> torch.Tensor:
        return getattr(getattr(layers[index], parent), name).weight.detach().float()

    removed = removed_layers(len(layers), split)
    return sum(weight(i) for i in removed) / len(removed) - weight(split.recurrent)


def truncated_svd(residual: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, in) and B (out, r) with B A the best rank-r approximation of `residual`; signs fixed, so deterministic.

    In float64: where singular values lie close, float32 would make the bases depend on the machine.
    """
    u, s, vt = torch.linalg.svd(residual.double(), full_matrices=False)
    u, s, vt = u[:, :rank], s[:rank], vt[:rank]
    sign = torch.sign(vt.gather(1, vt.abs().argmax(1, keepdim=True)))  # (r, 1): largest entry of each row positive
    return vt * sign, u * s * sign.T


def residual_bases(base: nn.Module, split: SplitConfig, rank: int):
    """Yield (A, B) for each projection, in the order of PROJECTIONS (SYSTEM section 3)."""
    for name, parent in PROJECTIONS.items():
        yield truncated_svd(mean_residual(base.model.layers, split, name, parent), rank)
