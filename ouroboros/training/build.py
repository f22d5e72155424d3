"""An arm's model from its run: the base, its kept layers, a loop; LoRA, linear maps (system.md 2 to 6).

Shapes: B batch, T positions, d width.
"""

import copy
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM

from ..errors import InputError, first_line
from ..experiment.arms import ARMS, PROJECTIONS
from ..experiment.cost import Cost
from ..experiment.plan import RunSpec
from ..experiment.profile import Profile
from ..experiment.protocol import switches
from ..experiment.schema import SplitConfig
from ..model.configuration import Split, take_layers
from ..model.modeling import OuroborosForCausalLM
from ..model.surgery import cut_config, kept_layers
from . import blind  # noqa: F401 (it adds its modulations)
from .corpus import LOOK_AHEAD
from .extra_passes import Teacher, repeated
from .refine import Intact, Refiner

RIDGE = 1e-6  # of the mean squared state: so that a direction that no state has doesn't break the fit
FIT_BATCH = 8  # blocks a forward pass
REFINE_RANK = 4  # that the base rank is divided by: LoRA matrices of rank 8 where it is 32


class MappedLayer(nn.Module):
    """The recurrent layer between two linear maps, each h + W h + b, in place of the removed layers on its side.

    The maps start as the identity, so the model as the cut one; they stay in float32 when the base is in half
    precision.
    """

    def __init__(self, layer: nn.Module, width: int):
        super().__init__()
        self.layer = layer
        self.before, self.after = nn.Linear(width, width), nn.Linear(width, width)
        for parameter in (*self.before.parameters(), *self.after.parameters()):
            nn.init.zeros_(parameter)

    def forward(self, h: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """(B, T, d) -> (B, T, d)."""
        h = h + self.before(h.to(self.before.weight.dtype)).to(h.dtype)
        h = self.layer(h, *args, **kwargs)
        return h + self.after(h.to(self.after.weight.dtype)).to(h.dtype)


class Affine(nn.Module):
    """A scale and a shift of each channel, h * (1 + scale) + shift, in a layer's place; it starts as the identity."""

    def __init__(self, width: int):
        super().__init__()
        self.affine = nn.ParameterDict({"scale": torch.zeros(width), "shift": torch.zeros(width)})

    def forward(self, h: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """(B, T, d) -> (B, T, d)."""
        scale, shift = self.affine["scale"], self.affine["shift"]
        return (h.to(scale.dtype) * (1 + scale) + shift).to(h.dtype)


class Nothing(nn.Module):
    """What stands where a layer stood."""

    def forward(self, h: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """(B, T, d) -> the same."""
        return h


def cut_layers(model: nn.Module, split: Split, more: int = 0) -> nn.Module:
    """The base with the kept layers only, each once: the arm `cut`. Weights are shared with `model`, modules aren't.

    `more` layers after the recurrent one are kept too. Raises InputError where one is the coda's already.
    """
    kept = kept_layers(len(model.model.layers), split)
    config = cut_config(model.config, split)
    if more:
        if split.recurrent + more in kept:
            raise InputError(f"split {split.prelude}/{split.recurrent}/{split.coda} (prelude/recurrent layer/coda): "
                             f"fewer than {more} removed layers follow the recurrent one, so they can't be kept too")
        kept[split.prelude + 1:split.prelude + 1] = range(split.recurrent + 1, split.recurrent + more + 1)
        config = take_layers(copy.deepcopy(model.config), kept)
    # the modules are copied, the weights are not
    cut = copy.deepcopy(model, memo={id(p): p for p in model.parameters()})
    cut.model.config = cut.config = config
    cut.model.layers = nn.ModuleList(cut.model.layers[old] for old in kept)
    for index, layer in enumerate(cut.model.layers):
        layer.self_attn.layer_idx = index  # its slot in a key/value cache
    return cut


def load_base(profile: Profile, root: Path) -> nn.Module:
    """The profile's pretrained base. Raises InputError when there is none, or one whose tensors aren't all there, of
    the right shape, and finite: transformers would draw the missing ones at random."""
    source = profile.base_source(root)
    if profile.base.path is None and not (source / "model.safetensors").exists():
        raise InputError(f"{source}: no base there; make base PROFILE={profile.base_of or profile.name} pretrains it")
    try:
        base, found = AutoModelForCausalLM.from_pretrained(
            source, use_safetensors=True, dtype=getattr(torch, profile.base.dtype), output_loading_info=True,
            ignore_mismatched_sizes=True)  # they are named below
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"base '{source}': can't be loaded ({first_line(error)}); name a folder with config.json and "
                         "safetensors") from None
    bad = {"misses": found["missing_keys"], "has no place for": found["unexpected_keys"],
           "has another shape for": [name for name, *_ in found["mismatched_keys"]],
           "has numbers that aren't finite in": [name for name, p in base.named_parameters() if not p.isfinite().all()]}
    for what, names in bad.items():
        if names:
            raise InputError(f"base '{source}': {what} {len(names)} tensors, '{min(names)}' first; restore its files, "
                             "or make it again")
    return base.eval()


def build(spec: RunSpec, profile: Profile, base: nn.Module) -> nn.Module:
    """The arm's model on `base`, whose weights it shares where it doesn't train them; what is trained has gradients.

    `full` is the base itself, and what stands for an arm without a network. The maps of `linear_fit` are still to be
    fitted (`fit_maps`).
    """
    arm = ARMS[spec.arm]
    torch.manual_seed(spec.seed)
    base.requires_grad_(False)
    if arm.middle == "counts" or arm.middle == "all" and not arm.trained:
        return base
    released = spec.protocol.startswith("released")
    if arm.middle == "intact":
        return Intact(base, norms=2 if released else 1)
    if arm.middle == "refine":
        return Refiner(base, spec.depth, max(1, profile.rank // REFINE_RANK), gate=arm.gate, dead=released,
                       pooling=switches(spec.protocol)["pooling"], max_steps=profile.max_steps, **widths(profile))
    if arm.loops:
        model = _loop(spec, profile, base)
    elif arm.middle == "all":
        model = copy.deepcopy(base, memo={id(p): p for p in base.parameters()})
    else:
        model = cut_layers(base, profile.split_of(spec.arm), arm.more)
    if arm.middle == "maps":
        layers, place = model.model.layers, profile.split.prelude
        layers[place] = MappedLayer(layers[place], model.config.hidden_size).to(model.device)
    if arm.middle in ("affine", "none"):
        place = Affine(model.config.hidden_size).to(model.device) if arm.trained else Nothing()
        model.model.layers[profile.split.prelude] = place
    if arm.lora != "none":
        _add_lora(model.base if arm.loops else model, Cost.of(profile, spec.arm, spec.rank).lora_ranks)
    if arm.passes:
        repeated(model, base, arm, profile, Cost.of(profile, spec.arm))
    if arm.teacher != "none":
        model.__dict__["teacher"] = Teacher(base, arm.teacher, profile.split)  # no part of it
    if not arm.loops:
        model.config.use_cache = False  # a cache would be filled in training too
    return model


def _loop(spec: RunSpec, profile: Profile, base: nn.Module) -> OuroborosForCausalLM:
    arm, split, rank = ARMS[spec.arm], profile.split, spec.rank or profile.rank
    protocol = switches("corrected" if spec.protocol == "any" else spec.protocol)  # any: without modulation
    # protocol.md `alpha`, scaled: half the profile's base rank at every rank, or half the rank itself
    alpha = (profile.rank if protocol["alpha"] == "fixed" else rank) / 2
    return OuroborosForCausalLM.from_base(
        base, split.prelude, split.recurrent, split.coda, rank=rank, alpha=alpha, **widths(profile),
        depth=profile.depth if spec.depth == "mixed" else spec.depth, max_steps=profile.max_steps,
        modulation=arm.modulation, pooling=protocol["pooling"], gate=arm.gate, step_norm=arm.step_norm)


def widths(profile: Profile) -> dict[str, int]:
    """The Controller's widths as the configuration names them."""
    return {f"{name}_width": width for name, width in profile.controller}


def _add_lora(model: nn.Module, ranks: tuple[int, ...]) -> None:
    """LoRA on the seven projections of each layer, at that layer's rank (0: none), scaled by 1; in float32."""
    pattern = {rf"model\.layers\.{index}\..*": rank for index, rank in enumerate(ranks) if rank}
    config = LoraConfig(target_modules=rf"model\.layers\.({'|'.join(str(i) for i, r in enumerate(ranks) if r)})\..*\."
                                       rf"({'|'.join(PROJECTIONS)})",
                        r=1, lora_alpha=1, rank_pattern=pattern, alpha_pattern=pattern)
    inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()


def part_of(name: str) -> str:
    """Which part of an arm a trained tensor belongs to: `modulation`, `gate`, `step_norm`, `lora`, `maps`, `affine`,
    `passes`."""
    if name.startswith("recurrence."):
        return name.split(".")[1]
    if ".lora_" in name:
        return "lora"
    if ".affine." in name:
        return "affine"
    return "maps" if ".before." in name or ".after." in name else "passes"


@torch.no_grad()
def fit_maps(model: nn.Module, base: nn.Module, split: SplitConfig, blocks: Iterable[np.ndarray]) -> None:
    """Fit both maps of a `MappedLayer` in closed form, on batches (B, T + 2) of tokens.

    Ridge least squares, in float64, from the full base's hidden states before the removed layers on each side to those
    after them.
    """
    mapped, last = model.model.layers[split.prelude], len(base.model.layers) - split.coda
    sides = {"before": (split.prelude, split.recurrent), "after": (split.recurrent + 1, last)}
    sums = {name: [0.0, 0.0] for name in sides}
    for chunk in blocks:
        ids = torch.from_numpy(chunk)[:, :-LOOK_AHEAD].long().to(base.device)
        states = base.model(ids, use_cache=False, output_hidden_states=True).hidden_states
        for name, (start, end) in sides.items():
            x, y = (states[index].flatten(0, 1).double() for index in (start, end))  # (B T, d)
            ones = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
            sums[name][0] = sums[name][0] + ones.T @ ones
            sums[name][1] = sums[name][1] + ones.T @ (y - x)
    for name, (gram, product) in sums.items():
        ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        solved, linear = torch.linalg.solve(gram + ridge, product), getattr(mapped, name)  # (d + 1, d)
        linear.weight.copy_(solved[:-1].T)
        linear.bias.copy_(solved[-1])
