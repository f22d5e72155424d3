"""Convert a base, save, load: what `OuroborosForCausalLM` adds to transformers' own methods of these names."""

import inspect
import os
import pickle
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.utils import logging

from ..errors import InputError
from .checkpoint import Checkpoint, read_config, resolve, sha256
from .configuration import OuroborosConfig
from .surgery import cut_config, kept_tensors, open_base, residual_bases

logger = logging.get_logger(__name__)


class ConvertedModel:
    """The methods by which a model is made from a base, written to a folder and read again."""

    @classmethod
    def from_base(cls, base, n_prelude: int = 8, recurrent_layer: int = 18, n_coda: int = 8, rank: int = 32, *,
                  revision: str | None = None, gguf_file: str | None = None, dtype: torch.dtype | None = None,
                  attn_implementation: str | None = None, **options) -> "ConvertedModel":
        """Convert a pretrained dense Qwen2, Qwen3, Llama or Mistral model (system.md 2 and 3).

        `base` is a folder, a hub name (with a `revision`), a GGUF file or a model in memory; `gguf_file` names the file
        where folder or repository hold one. Safetensors are read a tensor at a time, so that no more than the kept
        layers is held; GGUF is read whole and dequantised to float32. `dtype` is the base's own unless given;
        `options` are those of OuroborosConfig. Raises InputError when the base can't be read or isn't supported, and
        when split or rank don't fit it.
        """
        known = set(inspect.signature(OuroborosConfig).parameters)
        known -= {"base", "base_reference", "weights_sha256", "kwargs"}
        if unknown := sorted(set(options) - known):
            raise InputError(f"from_base: option '{unknown[0]}' is unknown; one of {', '.join(sorted(known))}")
        options |= dict(n_prelude=n_prelude, recurrent_layer=recurrent_layer, n_coda=n_coda, rank=rank)
        split = OuroborosConfig(**options).split  # what is out of range is said before anything is read
        source = open_base(base, revision, gguf_file)
        config = OuroborosConfig(base=cut_config(source.config, split), **options)
        config.base_reference = source.reference()
        dtype = dtype or source.weights["model.norm.weight"].dtype
        if not isinstance(dtype, torch.dtype):
            raise InputError(f"dtype {dtype!r}: must be a torch.dtype, as torch.bfloat16")
        model = cls._from_config(config, dtype=dtype, attn_implementation=attn_implementation
                                 or source.config._attn_implementation)
        _copy(model.base, kept_tensors(source, split))
        if model.projections:
            for projection, (a, b) in zip(model.projections, residual_bases(source, split, rank), strict=True):
                projection.A.copy_(a)
                projection.B.copy_(b)
        model.recurrence.to(torch.promote_types(dtype, torch.float32))
        if isinstance(base, nn.Module):
            model.generation_config = base.generation_config
            return model.to(base.device)
        if isinstance(source.weights, Checkpoint):  # GGUF has no generation_config.json beside it
            model._load_generation_config(source.weights.folder)
        return model

    def save_pretrained(self, save_directory, self_contained: bool | None = None, state_dict: dict | None = None,
                        **kwargs):
        """Write config.json and safetensors: what was trained, the frozen SVD bases and a reference to the base.

        With `self_contained` the kept layers too; so also by default, with a warning, where a reference would not do:
        the base has no name, or was trained itself. A file is replaced only by a whole one. Raises InputError where a
        reference is asked for and would not do.
        """
        state = self.state_dict() if state_dict is None else state_dict
        if self.config.base.tie_word_embeddings:
            state = {name: tensor for name, tensor in state.items() if name != "base.lm_head.weight"}
        missing = self._why_no_reference()
        if missing and self_contained is False:
            raise InputError(f"save_pretrained: {missing}; save with self_contained=True")
        if missing and self_contained is None:
            logger.warning(f"save_pretrained: {missing}; the checkpoint holds the kept layers too")
        if not (missing or self_contained):
            state = {name: tensor for name, tensor in state.items()
                     if name.startswith("recurrence.") or name.endswith((".A", ".B"))}
        self.config.weights_sha256 = sha256(state)
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
            super().save_pretrained(temporary, state_dict=state, **kwargs)
            for path in Path(temporary).iterdir():
                os.replace(path, folder / path.name)

    def _why_no_reference(self) -> str | None:
        """Why a reference to the base would not do; None if it does."""
        if (self.config.base_reference or {}).get("name") is None:
            return "the base has no name to refer to"
        if any(p.requires_grad for p in self.base.parameters()):
            return "weights of the base are trained, a reference to it would lose them"
        return None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config: OuroborosConfig | None = None, base=None,
                        revision: str | None = None, **kwargs) -> "ConvertedModel":
        """Load what `save_pretrained` wrote, from a folder or the hub; `kwargs` are those of transformers.

        `base` says where the base is now, if not where the checkpoint says. Raises InputError when a file is
        truncated or altered, and when the base isn't the one that was converted.
        """
        folder, _ = resolve(pretrained_model_name_or_path, revision)
        config = config or read_config(OuroborosConfig, folder)
        saved = Checkpoint(folder)
        tensors = {name: saved[name].clone() for name in saved}
        if (found := sha256(tensors)) != config.weights_sha256:
            raise InputError(f"{folder}: the weights were altered, sha256 {found}, config.json says "
                             f"{config.weights_sha256}; save or fetch them again")
        if "base.model.norm.weight" not in tensors:
            tensors |= {f"base.{name}": tensor for name, tensor in _kept_of_reference(config, base)}
        loaded = super().from_pretrained(None, *args, config=config, state_dict=tensors, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
        model.base.requires_grad_(False)  # loading makes new parameters
        model._load_generation_config(folder)
        return loaded

    @classmethod
    def from_release(cls, checkpoint, base, pooling: str = "sequence", **options) -> "ConvertedModel":
        """A checkpoint in the public release's layout: a torch file with `controller`, `gate`, `step_norm` states.

        Read with weights_only=True (the release does otherwise, system.md `pickles`) and filled in by shape and order.
        The file has no frozen part: `base` and `options` are those of `from_base`. Raises InputError for a file that
        can't be read without running code, and where a state doesn't fit.
        """
        model = cls.from_base(base, pooling=pooling, **options)
        parts = {"controller": model.recurrence.modulation, "gate": model.recurrence.gate,
                 "step_norm": model.recurrence.step_norm}
        try:
            states = torch.load(checkpoint, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise InputError(f"{checkpoint}: can't be read as tensors alone ({str(error).strip().splitlines()[0]}); "
                             "give a file that torch.load reads with weights_only=True") from None
        for name, part in parts.items():
            if not isinstance(states, Mapping) or not isinstance(states.get(name), Mapping):
                raise InputError(f"{checkpoint}: has no state '{name}'; the release's layout has {', '.join(parts)}")
            _fill(part, states[name], f"{checkpoint}: state '{name}'")
        return model

    def _load_generation_config(self, folder: Path) -> None:
        if (folder / "generation_config.json").exists():
            self.generation_config = GenerationConfig.from_pretrained(folder)


def _copy(base: nn.Module, tensors) -> None:
    """Fill the cut model's parameters and buffers, all of them, in place."""
    state = base.state_dict()
    left = {name for name in state if not name.endswith((".A", ".B"))}
    if base.config.tie_word_embeddings:
        left.discard("lm_head.weight")
    for name, tensor in tensors:
        if name not in left:
            continue  # as rotary frequencies in old checkpoints
        if state[name].shape != tensor.shape:
            raise InputError(f"base: tensor {name} is {tuple(tensor.shape)}, config.json makes it "
                             f"{tuple(state[name].shape)}; give the base's own config.json")
        state[name].copy_(tensor)
        left.discard(name)
    if left:
        raise InputError(f"base: the checkpoint has no {min(left)}; give a causal LM's whole checkpoint")


def _kept_of_reference(config: OuroborosConfig, base):
    """The kept tensors of the base that a checkpoint refers to, or of `base` in its place. Checks the hash."""
    reference = config.base_reference
    if reference is None:
        raise InputError("config.json: field 'base_reference' is null, but the weights need it; save the model again")
    gguf_file = reference.get("gguf_file")
    if gguf_file and isinstance(base, (str, Path)) and (Path(base) / "model.safetensors").is_file():
        gguf_file = None  # the same tensors, saved as transformers does
    source = open_base(base if base is not None else reference["name"], reference["revision"], gguf_file)
    if (found := sha256(source.weights)) != reference["sha256"]:
        raise InputError(f"base '{source.name}': its weights have sha256 {found}, the checkpoint was made from "
                         f"{reference['sha256']}; pass base= with the folder or model that was converted")
    return kept_tensors(source, config.split)


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
