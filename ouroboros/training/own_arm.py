"""An own arm's modulation: loaded from its file and tried on noise before anything is trained (docs/own-arm.md)."""

import hashlib
import importlib.util
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
    try:
        found.loader.exec_module(module)
        kind = getattr(module, name)
    except Exception as error:  # whatever a user's file raises
        raise InputError(f"{where}: can't be loaded ({type(error).__name__}: {error})") from error
    with torch.random.fork_rng(devices=[]):
        _try(kind, own, profile, base, where)
    MODULATIONS[arm] = kind


@torch.no_grad()
def _try(kind: type, own: OwnArm, profile: Profile, base: PretrainedConfig, where: str) -> None:
    """Call a modulation on noise, at the first steps and the last: its shape, that it leaves the state as it is, that
    it sees no later position, whether it reads the state as is said; that it has something to train."""
    config = OuroborosConfig(base, rank=profile.rank, max_steps=profile.max_steps, **widths(profile))
    h, shape = torch.randn(2, 4, base.hidden_size), (2, 4, len(PROJECTIONS), profile.rank)  # (B, T, d), (B, T, K, r)
    later, other = h.clone(), torch.randn_like(h)
    later[:, 2:] = other[:, 2:]
    given, last = [x.clone() for x in (h, later, other)], profile.max_steps - 1
    steps = 0, min(1, last), last
    try:
        modulation = kind(config)
        for parameter in modulation.parameters():
            nn.init.normal_(parameter)
        seen, ahead, elsewhere = (torch.stack([_wide(modulation(x, t, None, None), shape) for t in steps])
                                  for x in given)
    except Exception as error:
        raise InputError(f"{where}: {type(error).__name__} ({first_line(error)}) in forward(h, t, mask, past) "
                         f"on a state of shape {tuple(h.shape)}; it must return (B or 1, T or 1, {len(PROJECTIONS)}, "
                         "rank)") from error
    if not all(torch.equal(x, before) for x, before in zip(given, (h, later, other), strict=True)):
        raise InputError(f"{where}: changes the hidden states that it is given; emit diagonals, leave h as it is")
    if not torch.equal(seen[:, :, :2], ahead[:, :, :2]):
        raise InputError(f"{where}: what it emits at a position depends on later ones, which a language model can't "
                         "see; read the position itself, or those up to it")
    names = [name for name, parameter in modulation.named_parameters() if parameter.requires_grad]
    if not names:
        raise InputError(f"{where}: has no parameters, so nothing of it would be trained; make them nn.Parameter")
    if unknown := set(own.elementwise) - set(names):
        raise InputError(f"{where}: elementwise: '{min(unknown)}': no tensor of the class; it has {', '.join(names)}")
    if torch.equal(seen, elsewhere) == own.reads:
        raise InputError(f"{where}: reads: {str(own.reads).lower()}: what it emits "
                         f"{'does not depend' if own.reads else 'depends'} on the state; say so")


def _wide(m: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A modulation's result for all sequences and tokens. Raises ValueError where it lacks a projection's diagonal."""
    if m.shape[-2:] != shape[-2:]:
        raise ValueError(f"its result has shape {tuple(m.shape)}")
    return m.expand(shape)
