"""Pretrained causal LM -> Ouroboros: pick layers, take the mean residual, truncate its SVD (system.md 2 and 3)."""

import copy
import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from ..errors import InputError
from .checkpoint import FLOATS, Checkpoint, gguf_file_of, read_config, read_gguf, resolve, sha256, tensors_of
from .configuration import FAMILIES, Split, take_layers, weights_of

LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
HARMLESS = "rotary_emb.inv_freq"  # a buffer of old checkpoints, computed anew: the one tensor that may be left out
FULL_SVD = 512  # up to this many rows or columns the whole SVD is cheap
FULL_SHARE = 1 / 16  # and where more than this share of the triplets is wanted the randomized SVD would err by over 1 %
OVERSAMPLING, ITERATIONS = 8, 3  # of the randomized SVD: white noise, its hardest case, stays within 1 %


def kept_layers(n_layers: int, split: Split) -> list[int]:
    """Indices of the kept layers. Raises InputError when the split doesn't fit the layers, or removes none of them."""
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


@dataclasses.dataclass(frozen=True)
class Base:
    """A pretrained causal LM to convert: its configuration, its tensors, and what names it."""

    config: PretrainedConfig
    weights: Mapping[str, torch.Tensor]  # by name, read when asked for
    name: str | None = None  # a folder's from the root, so that it is found from everywhere
    revision: str | None = None
    gguf_file: str | None = None  # its name in the folder or repository, where the weights are in one
    subfolder: str = ""  # of the repository

    def __str__(self) -> str:
        return f"base '{self.name}'" if self.name else "base"

    def reference(self) -> dict:
        """Name, revision and hash of the weights; reads them all. A GGUF file's hash is that of its float32 tensors."""
        found = {"name": self.name, "revision": self.revision, "sha256": sha256(self.weights)}
        return found | {field: value for field in ("gguf_file", "subfolder") if (value := getattr(self, field))}


def open_base(base, revision: str | None = None, gguf_file: str | None = None, subfolder: str = "", **hub) -> Base:
    """A base from a folder, a hub name, a GGUF file (alone, or in one of these) or a model in memory.

    GGUF is read whole and dequantised to float32. A model in memory has the name that it was loaded by, if that gives
    its tensors still. `hub` as `resolve` takes it. Raises InputError for a checkpoint that can't be read, quantised
    weights and an unsupported model, naming the tensor or layer.
    """
    if isinstance(base, (str, Path)) and str(base).endswith(".gguf") and Path(base).is_file():
        base, gguf_file = Path(base).parent, Path(base).name
    if isinstance(base, nn.Module):
        if getattr(base, "get_output_embeddings", lambda: None)() is None:
            raise InputError(f"base: a {type(base).__name__} has no language model's head; give a causal LM")
        return _named(_checked(Base(base.config, tensors_of(base))), getattr(base, "name_or_path", None))
    folder, revision = resolve(base, revision, gguf_file, subfolder, **hub)
    name, subfolder = (str(base), subfolder) if revision else (os.path.abspath(folder), "")
    if gguf_file is not None:
        model = read_gguf(folder / gguf_file)
        return _checked(Base(model.config, tensors_of(model), name, revision, gguf_file, subfolder))
    config = read_config(AutoConfig, folder)
    return _checked(Base(config, Checkpoint(folder, config.tie_word_embeddings), name, revision, None, subfolder))


def _named(base: Base, name: str | None) -> Base:
    """A base in memory with the name under which its tensors can be read again, to the last bit; else without."""
    try:
        found = open_base(name, None, gguf_file_of(base.config), local_files_only=True)
    except InputError:
        return base
    same = sha256(found.weights) == sha256(base.weights)
    return dataclasses.replace(found, config=base.config, weights=base.weights) if same else base


def _checked(base: Base) -> Base:
    if base.config.model_type == "ouroboros":
        raise InputError(f"{base}: an Ouroboros model, converted already; load it with from_pretrained")
    if getattr(base.config, "quantization_config", None) and not gguf_file_of(base.config):
        raise InputError(f"{base}: quantised (config.json has a quantization_config), its weights are codes; give the "
                         "model in half precision or more")
    if base.config.model_type not in FAMILIES:
        raise InputError(f"{base}: model_type '{base.config.model_type}' isn't supported (see docs/model.md); one of "
                         f"{', '.join(FAMILIES)}")
    layers: dict[int, dict[str, torch.Size]] = {}
    for name, tensor in base.weights.items():
        if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.dtype not in FLOATS:
            raise InputError(f"{base}: {name} is {getattr(tensor, 'dtype', type(tensor))}, packed by a quantiser; load "
                             "the model dequantised, of GGUF with quantization_config=GgufConfig(dequantize=True)")
        if tensor.is_meta:
            raise InputError(f"{base}: {name} is offloaded; load the model without a device_map")
        if tensor.numel() and not all(end.isfinite() for end in tensor.aminmax()):
            raise InputError(f"{base}: {name} holds numbers that aren't finite; fetch it, or make it, again")
        if (match := LAYER.fullmatch(name)) and not name.endswith(HARMLESS):
            layers.setdefault(int(match[1]), {})[match[2]] = tensor.shape
    there = range(base.config.num_hidden_layers)
    for index in sorted({*layers, *there}):
        if odd := layers.get(index, {}).items() ^ (layers.get(0, {}).items() if index in there else set()):
            raise InputError(f"{base}: tensor model.layers.{index}.{min(odd)[0]} isn't in every layer that config.json "
                             "says, in one shape, or is in more; give the base's own config.json and weights")
    return base


def cut_config(config: PretrainedConfig, split: Split) -> PretrainedConfig:
    """The configuration of the base with the kept layers only."""
    cut = take_layers(copy.deepcopy(config), kept_layers(config.num_hidden_layers, split))
    if gguf_file_of(config):
        del cut.quantization_config  # of the file that the base was read from: the kept tensors are plain
    return cut


def taken_tensors(weights: Mapping[str, torch.Tensor], order: list[int]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of the layers in `order` under their new indices, embeddings, last norm and head; one at a time."""
    for name in (name for name in weights if not name.endswith(HARMLESS)):
        match = LAYER.fullmatch(name)
        places = [new for new, old in enumerate(order) if old == int(match[1])] if match else [None]
        yield from ((f"model.layers.{new}.{match[2]}" if match else name, weights[name]) for new in places)


def mean_residual(base: Base, split: Split, name: str, parent: str) -> torch.Tensor:
    """R = mean over the removed layers of (W_i - W), (out, in), of a recurrent layer's weight, in float32 at least."""
    def weight(index: int) -> torch.Tensor:
        tensor = base.weights[f"model.layers.{index}.{parent}.{name}.weight"].detach()
        return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

    layers = range(base.config.num_hidden_layers)
    removed = sorted(set(layers) - set(kept_layers(len(layers), split)))
    return sum(weight(i) for i in removed) / len(removed) - weight(split.recurrent)


def truncated_svd(residual: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, in) and B (out, r) with B A the best rank-r approximation of `residual`; signs fixed, so deterministic.

    Up to FULL_SVD rows or columns in full, in float64: in float32 close singular values would make the bases depend on
    the machine. Beyond, the randomized SVD of Halko et al. (2011, arXiv 0909.4061) with a fixed seed, within 1 %.
    """
    if min(residual.shape) <= FULL_SVD or rank > FULL_SHARE * min(residual.shape):
        u, s, vt = torch.linalg.svd(residual.double(), full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[residual.device] if residual.is_cuda else []):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(residual.float(), q=rank + OVERSAMPLING, niter=ITERATIONS)
        vt = v.T
    u, s, vt = u[:, :rank], s[:rank], vt[:rank]
    sign = torch.sign(vt.gather(1, vt.abs().argmax(1, keepdim=True)))  # (r, 1): largest entry of each row positive
    return vt * sign, u * s * sign.T


def residual_bases(base: Base, split: Split, rank: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (A, B) for each weight of the recurrent layer, in the order of `weights_of` (system.md 3): of fused
    projections each one's own SVD, so that they are modulated as if they stood alone."""
    for (parent, name), rows in weights_of(base.config).items():
        a, b = zip(*(truncated_svd(part, rank) for part in mean_residual(base, split, name, parent).split(rows)))
        yield torch.cat(a), torch.block_diag(*b)
