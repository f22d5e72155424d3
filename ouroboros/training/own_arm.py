"""An own arm's modulation: loaded from its file and tried on noise before anything is trained (docs/own-arm.md)."""

import hashlib
import importlib.util
import sys
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig

from ..errors import InputError, first_line
from ..experiment.arms import PROJECTIONS
from ..experiment.profile import Profile
from ..experiment.schema import OwnArm
from ..model.configuration import OuroborosConfig
from ..model.modulation import MODULATIONS
from .build import widths

TOKENS = 9  # of what a class is tried on: odd, and more than a window of 8


def load_own(arm: str, profile: Profile, base: PretrainedConfig, root: Path) -> None:
    """Make an own arm's modulation known to the model, after trying it; for an arm of the package do nothing.

    Raises InputError where its file isn't the one that the profile names, has no such class, or the class isn't what
    docs/own-arm.md asks of it.
    """
    own = profile.own_arms.get(arm)
    if own is None:
        return
    file, _, name = own.modulation.rpartition(":")
    path, where = Path(root) / file, f"arm '{arm}': {own.modulation}"
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != own.sha256:
        raise InputError(f"{where}: the file isn't there, or isn't the one that profile '{profile.name}' was made "
                         "with; give a changed arm another name")
    module = importlib.util.module_from_spec(found := importlib.util.spec_from_file_location(f"own_{arm}", path))
    sys.modules[module.__name__] = module  # dataclasses and others look a class's file up there
    try:
        found.loader.exec_module(module)
        kind = getattr(module, name)
    except (Exception, SystemExit) as error:  # whatever a user's file raises
        raise InputError(f"{where}: can't be loaded ({type(error).__name__}: {error})") from error
    with torch.random.fork_rng(devices=[]):
        _try(kind, own, profile, base, where)
    MODULATIONS[arm] = kind


def _try(kind: type, own: OwnArm, profile: Profile, base: PretrainedConfig, where: str) -> None:
    """Call a modulation on noise at every step: what would end a run late or make its loss mean nothing is refused."""
    config = OuroborosConfig(base, rank=profile.rank, max_steps=profile.max_steps, **widths(profile))
    modulation = _made(kind, config, own, where)
    h, other = torch.randn(2, 2, TOKENS, base.hidden_size)  # (B, T, d) each

    @torch.no_grad()
    def emitted(x: torch.Tensor) -> torch.Tensor:
        return _emitted(modulation, x, config, where)

    seen = emitted(h)  # (steps, B, T, K, r)
    if not torch.equal(seen, emitted(h)):
        raise InputError(f"{where}: what it emits differs from call to call on the same states; leave out dropout and "
                         "noise, and buffers that a call changes")
    if not seen.isfinite().all():
        raise InputError(f"{where}: what it emits isn't finite on states of size one; mend what divides or overflows")
    for at in range(1, TOKENS):
        if not torch.equal(seen[:, :, :at], emitted(torch.cat([h[:, :at], other[:, at:]], 1))[:, :, :at]):
            raise InputError(f"{where}: what it emits at a position depends on later ones, which a language model "
                             "can't see; read the position itself, or those up to it")
    if not torch.allclose(seen[:, :1], emitted(h[:1]), atol=1e-4, rtol=1e-3):
        raise InputError(f"{where}: what it emits for a sequence depends on the others of its batch; read one alone")
    if torch.equal(seen, emitted(other)) == own.reads:
        raise InputError(f"{where}: reads: {str(own.reads).lower()}: what it emits "
                         f"{'does not depend' if own.reads else 'depends'} on the state; say so")
    _refuse_untrained(modulation, _emitted(modulation, h, config, where), where)


def _made(kind: type, config: OuroborosConfig, own: OwnArm, where: str) -> nn.Module:
    """The modulation, its floating parameters moved a little from where they begin: what begins at 0 hides the rest."""
    try:
        modulation = kind(config)
        trained = {name: each for name, each in modulation.named_parameters() if each.requires_grad}
    except Exception as error:
        raise InputError(f"{where}: {type(error).__name__} ({first_line(error)}) in __init__(config); it must be an "
                         "nn.Module that a configuration makes") from error
    if not trained:
        raise InputError(f"{where}: has no parameters, so nothing of it would be trained; make them nn.Parameter")
    if odd := [name for name, each in trained.items() if each.dtype not in (torch.float32, torch.float64)]:
        raise InputError(f"{where}: '{odd[0]}' is {trained[odd[0]].dtype}; train in float32")
    if unknown := set(own.elementwise) - set(trained):
        raise InputError(f"{where}: elementwise: '{min(unknown)}': no tensor of the class; it has {', '.join(trained)}")
    with torch.no_grad():
        for each in trained.values():
            each.add_(torch.randn_like(each), alpha=0.1)
    return modulation


def _emitted(modulation: nn.Module, h: torch.Tensor, config: OuroborosConfig, where: str) -> torch.Tensor:
    """(B, T, d) -> what a modulation emits at every step, (steps, B, T, K, r)."""
    shape, given, version = (*h.shape[:2], len(PROJECTIONS), config.rank), h.clone(), h._version
    try:
        found = torch.stack([_wide(modulation(h, t, None, None), shape) for t in range(config.max_steps)])
    except Exception as error:
        raise InputError(f"{where}: {type(error).__name__} ({first_line(error)}) in forward(h, t, mask, past) "
                         f"on a state of shape {tuple(h.shape)}; it must return (B or 1, T or 1, {len(PROJECTIONS)}, "
                         "rank)") from error
    if h._version != version or not torch.equal(h, given):  # the first: in place, though here it changed nothing
        raise InputError(f"{where}: changes the hidden states that it is given; emit diagonals, leave h as it is")
    return found


def _refuse_untrained(modulation: nn.Module, emitted: torch.Tensor, where: str) -> None:
    """Refuse parameters that no gradient reaches, and tensors with gradients that aren't among the parameters."""
    reached, nodes, done = set(), [emitted.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in done:
            done.add(node)
            reached |= {node.variable} if hasattr(node, "variable") else set()  # a leaf
            nodes += [following for following, _ in node.next_functions]
    trained = {each: name for name, each in modulation.named_parameters() if each.requires_grad}
    if unused := [name for each, name in trained.items() if each not in reached]:
        raise InputError(f"{where}: '{unused[0]}' has no gradient at any step, so nothing of it would be trained; use "
                         "it, or leave it out")
    if reached - set(trained):
        raise InputError(f"{where}: a tensor with gradients isn't among its parameters, so it would stay as it begins; "
                         "keep modules in an nn.ModuleList, tensors as nn.Parameter")


def _wide(m: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A modulation's result for all sequences and tokens. Raises ValueError where its shape isn't one for that."""
    if m.dim() != len(shape) or m.shape[-2:] != shape[-2:]:
        raise ValueError(f"its result has shape {tuple(m.shape)}")
    return m.expand(shape)
