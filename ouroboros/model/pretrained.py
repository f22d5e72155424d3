"""Convert a base, save, load: what `OuroborosForCausalLM` adds to transformers' own methods of these names."""

import copy
import functools
import inspect
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import dispatch_model
from accelerate.utils.modeling import get_state_dict_offloaded_model
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerFast
from transformers.integrations.accelerate import _get_device_map, check_and_set_device_map
from transformers.utils import logging

from ..errors import InputError
from .checkpoint import FLOATS, TOKENIZER, Checkpoint, check_tied, read_config, resolve, sha256, tensors_of
from .configuration import AS_BASE, SINKS, OuroborosConfig
from .surgery import cut_config, kept_layers, open_base, residual_bases, taken_tensors

logger = logging.get_logger(__name__)
FIELDS = set(inspect.signature(OuroborosConfig).parameters) - {"base", "base_reference", "weights_sha256", "kwargs"}
FREE = {"depth", "alpha", "pooling", "gate_bias", "use_cache"}  # of these: what may be given anew when loading
HUB = {"cache_dir", "force_download", "local_files_only", "token"}
KEPT = "kept_sha256"  # a reference's file says in it which kept layers it was trained on
CODE = "modeling_ouroboros"  # the file by which the Auto classes find ours under trust_remote_code
AUTO = {"AutoConfig": "OuroborosConfig", "AutoModel": "OuroborosModel", "AutoModelForCausalLM": "OuroborosForCausalLM"}


class ConvertedModel:
    """How a model is made from a base, written and read again; mixed into OuroborosModel, whose parts it uses."""

    _gives: tuple | None = None  # what the base gives: the split and its kept tensors' sha256; None if not known

    @classmethod
    def from_base(cls, base, n_prelude: int = 8, recurrent_layer: int = 18, n_coda: int = 8, rank: int = 32, *,
                  revision: str | None = None, gguf_file: str | None = None, subfolder: str = "",
                  dtype: torch.dtype | str | None = None, attn_implementation: str | None = None, device_map=None,
                  texts=None, **options) -> "ConvertedModel":
        """Convert a pretrained model of one of the FAMILIES (system.md 2 and 3).

        `base` is a folder, a hub name (with a `revision`), a GGUF file, a folder or repository with a `gguf_file`, or a
        model in memory. `dtype` is the base's own unless given; `options` are those of OuroborosConfig and HUB. Step
        norms start at one, `step_norm="matched"` starts them at the stream's size on `texts`, strings or lists of token
        ids. Raises InputError for a base that isn't supported or can't be read, and options that don't fit it.
        """
        if (matched := options.get("step_norm") == "matched") == (texts is None):
            raise InputError("texts: step_norm='matched' is measured on them, nothing else is; give both or neither")
        options |= {"step_norm": True} if matched else {}
        hub = {name: options.pop(name) for name in HUB & options.keys()}
        if unknown := sorted(options.keys() - FIELDS):
            raise InputError(f"from_base: option '{unknown[0]}' is unknown; one of {', '.join(sorted(FIELDS))}")
        options |= dict(n_prelude=n_prelude, recurrent_layer=recurrent_layer, n_coda=n_coda, rank=rank)
        split = OuroborosConfig(**options).split  # what is out of range is said before anything is read
        source = open_base(base, revision, gguf_file, subfolder, **hub)
        config = OuroborosConfig(base=cut_config(source.config, split), **options)
        config.base_reference = source.reference()
        own = getattr(source.weights.get("model.embed_tokens.weight"), "dtype", torch.float32)  # none: `fill` says so
        found = own if dtype in (None, "auto") else getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if found not in FLOATS:
            raise InputError(f"dtype {dtype!r}: must be one of {', '.join(str(kind) for kind in FLOATS)} or 'auto'")
        attention = attn_implementation or source.config._attn_implementation
        model = cls._from_config(config, dtype=found, attn_implementation=attention).eval()
        fill(model.base, taken_tensors(source.weights, kept_layers(source.config.num_hidden_layers, split)))
        if model.projections:
            for projection, (a, b) in zip(model.projections, residual_bases(source, split, rank), strict=True):
                projection.A.copy_(a)
                projection.B.copy_(b)
        model._gives = split, sha256(_kept(model._own(model.state_dict())))
        if isinstance(base, nn.Module):
            model.generation_config = copy.deepcopy(base.generation_config)
            model.to(base.device)
        elif isinstance(source.weights, Checkpoint):  # GGUF has no generation_config.json beside it
            model._load_generation_config(source.weights.folder)
        if device_map is not None:
            dispatch_model(model, _get_device_map(model, check_and_set_device_map(device_map), None, None))
        if matched:
            model._match(texts)
        return model

    def _match(self, texts) -> None:
        texts = [texts] if isinstance(texts, str) else list(texts)
        if any(isinstance(text, str) for text in texts):
            if not (files := self._tokenizer()):
                raise InputError("texts: the base's tokenizer isn't at hand; give lists of token ids")
            texts = PreTrainedTokenizerFast.from_pretrained(files[0].parent)(texts)["input_ids"]
        rows = [torch.as_tensor(text, device=self.device) for text in texts]
        if any(row.dim() != 1 for row in rows) or max(map(len, rows), default=0) <= SINKS:
            raise InputError(f"texts: none is a text of more than {SINKS} tokens, the first of which aren't measured")
        ids, mask = (pad_sequence(x, batch_first=True) for x in (rows, [torch.ones_like(row) for row in rows]))
        self.recurrence.step_norm.match(lambda: self.hidden(ids, mask), mask)

    def save_pretrained(self, save_directory, self_contained: bool | None = None, state_dict: dict | None = None,
                        push_to_hub: bool = False, **kwargs):
        """Write config.json and safetensors: what was trained, the frozen SVD bases and a reference to the base.

        With `self_contained` the kept layers and the base's tokenizer too; so also, with a warning, where a reference
        wouldn't do. Files of an earlier save go. Raises InputError for what can't be loaded again.
        """
        folder = Path(save_directory)
        _refuse(kwargs, "save_pretrained", "variant", "distributed_checkpoint")
        self._check_place(folder)
        given = self.state_dict() if state_dict is None else state_dict
        given = get_state_dict_offloaded_model(self) if any(x.is_meta for x in given.values()) else given
        state = self._own(given)
        missing = self._why_no_reference(state)
        if missing and self_contained is False:
            raise InputError(f"save_pretrained: {missing}; save with self_contained=True")
        if missing and self_contained is None:
            logger.warning(f"save_pretrained: {missing}; the checkpoint holds the kept layers too")
        whole = bool(missing or self_contained)
        if not whole:
            state = {n: state[n] for n in state.keys() - _kept(state).keys()} | {KEPT: _fingerprint(_kept(state))}
        self.config.weights_sha256 = sha256(state)
        self.config.auto_map = {auto: f"{CODE}.{name}" for auto, name in AUTO.items()}
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
            adapted, self._hf_peft_config_loaded = self._hf_peft_config_loaded, False
            try:  # the names as they were hashed, not as an adapter's file might map them
                super().save_pretrained(temporary, state_dict=state, **kwargs | {"save_original_format": False})
            finally:
                self._hf_peft_config_loaded = adapted
            if adapted:
                super().save_pretrained(temporary, state_dict=given, **kwargs)
            if (Path(temporary) / "config.json").exists():  # else another process writes
                _place(Path(temporary), folder, self._tokenizer() if whole else [])
        if push_to_hub:
            known = inspect.signature(super().push_to_hub).parameters.keys() & kwargs.keys() - {"repo_id"}
            self.push_to_hub(kwargs.get("repo_id", folder.name), self_contained=self_contained, state_dict=state_dict,
                             **{name: kwargs[name] for name in known})

    def push_to_hub(self, *args, self_contained: bool | None = None, state_dict: dict | None = None, **kwargs):
        """As transformers', which calls `save_pretrained`; a base that is a folder here isn't referred to."""
        whole = Path(self.config.base_reference.get("name") or "").is_dir() or self_contained  # no name: "" is one too
        self.save_pretrained = functools.partial(self.save_pretrained, self_contained=whole, state_dict=state_dict)
        try:
            return super().push_to_hub(*args, **kwargs)
        finally:
            del self.save_pretrained

    def _check_place(self, folder: Path) -> None:
        names = filter(None, (self.config.base_reference.get("name"), self.config.base.name_or_path))
        if folder.is_dir() and any(Path(name).is_dir() and folder.samefile(name) for name in names):
            raise InputError(f"save_pretrained: {folder} is the base's own folder, which would be lost; name another")
        if (folder / "adapter_config.json").exists() and not self._hf_peft_config_loaded:
            raise InputError(f"save_pretrained: {folder} holds an adapter, which loading would add; name another")

    def _own(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A state without adapters, a tied head once. Raises InputError unless config.json makes just these tensors."""
        with torch.device("meta"):
            made = type(self)(copy.deepcopy(self.config)).state_dict()
        if self._hf_peft_config_loaded:
            state = {re.sub(r"\.(base_layer|original_module)\.", ".", name): state[name] for name in state}
            state = {name: state[name] for name in made.keys() & state.keys()}
        for name in sorted(made.keys() ^ state.keys()) or (n for n in made if made[n].shape != state[n].shape):
            raise InputError(f"save_pretrained: tensor {name} isn't what the configuration makes, so it couldn't be "
                             "loaded; merge adapters (merge_and_unload), change layers together with the configuration")
        pools = getattr(self.recurrence.modulation, "config", self.config).pooling == self.config.pooling
        scaled = all(part.scale == self.config.alpha / self.config.rank for part in self.projections)
        for field in ["pooling"] * (not pools) + ["alpha"] * (not scaled):
            raise InputError(f"save_pretrained: config.{field} isn't what is computed with; load with {field}=")
        if tied := self.config.base.tie_word_embeddings:
            check_tied(state, "base.")
        return {name: tensor for name, tensor in state.items() if not tied or name != "base.lm_head.weight"}

    def _why_no_reference(self, state: Mapping[str, torch.Tensor]) -> str | None:
        if self.config.base_reference.get("name") is None:
            return "the base has no name to refer to that gives its tensors"
        kept = _kept(state)
        if any(p.requires_grad for name, p in self.named_parameters() if name in kept):
            return "weights of the base are trained, a reference to it would lose them"
        if self._gives != (self.config.split, sha256(kept)):
            return "the kept layers aren't known to be the base's, a reference to it would lose what differs"
        return None

    def _tokenizer(self) -> list[Path]:
        """The files of the base's tokenizer, where the base is at hand and the vocabulary is still its own."""
        base, name = self.config.base_reference, self.config.base.name_or_path
        try:
            folder, _ = resolve(base.get("name") or name, base.get("revision"), None, base.get("subfolder", ""),
                                local_files_only=True)
            same = read_config(AutoConfig, folder).vocab_size == self.config.vocab_size
        except InputError:
            return []
        return [folder / file for file in TOKENIZER if same and (folder / file).exists()]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config: OuroborosConfig | None = None, base=None,
                        revision: str | None = None, subfolder: str = "", gguf_file: str | None = None,
                        **kwargs) -> "ConvertedModel":
        """Load what `save_pretrained` wrote, from a folder or the hub; `kwargs` are those of transformers.

        `base` says where the base is now (in it, a `gguf_file`), if not where the checkpoint says: a relative name from
        here, then from the checkpoint's folder upwards. Fields that are FREE may be given. Raises InputError for
        altered files, another base, and a folder of another model.
        """
        _refuse(kwargs, "from_pretrained", "variant", "quantization_config", "state_dict")
        hub = {name: kwargs.pop(name) for name in HUB & kwargs.keys()}
        folder, _ = resolve(pretrained_model_name_or_path, revision, None, subfolder, **hub)
        stored = read_config(OuroborosConfig, folder)
        if stored.base is None:
            raise InputError(f"{folder / 'config.json'}: field 'base' is missing; save the model again")
        if config is None:
            config = copy.deepcopy(stored)
            for name in [name for name in kwargs if hasattr(config, name) and not name.endswith("dtype")]:
                if name in (*AS_BASE, "num_hidden_layers", "tie_word_embeddings"):
                    raise InputError(f"from_pretrained: {name} is the base's, or follows from the depth; leave it out")
                setattr(config, name, kwargs.pop(name))
        for name in sorted(FIELDS - FREE):
            if (value := getattr(config, name)) != getattr(stored, name):
                raise InputError(f"{name} {value!r}: the weights were made with {getattr(stored, name)!r}; reconvert")
        OuroborosConfig(**{name: getattr(config, name) for name in FREE})  # says what is out of range
        tensors, kept = {name: tensor.clone() for name, tensor in Checkpoint(folder).items()}, {}
        if sha256(tensors) != stored.weights_sha256:
            raise InputError(f"{folder}: the weights were altered, config.json has another sha256; save them again")
        tensors.pop(KEPT, None)  # the base is checked as a whole
        if "base.model.embed_tokens.weight" not in tensors:  # cloned: a base in memory keeps its own, a file may change
            kept = {f"base.{name}": tensor.clone()
                    for name, tensor in _kept_of_reference(stored, folder, base, gguf_file, hub)}
        adapter = dict(kwargs.pop("adapter_kwargs", None) or {})  # from an Auto class, with the path
        path = adapter.pop("_adapter_model_path", folder if (folder / "adapter_config.json").exists() else None)
        adapter_name, wanted = kwargs.pop("adapter_name", "default"), kwargs.pop("output_loading_info", False)
        model, report = super().from_pretrained(None, *args, config=config, state_dict=tensors | kept,
                                                output_loading_info=True, **kwargs)
        if odd := sorted({*report["missing_keys"], *report["unexpected_keys"]}):
            raise InputError(f"{folder}: tensor {odd[0]} is in only one of weights and config.json; save it again")
        model.base.requires_grad_(False)  # loading makes new parameters
        if kept:
            model._gives = stored.split, sha256({name: tensor.to(model.dtype) for name, tensor in kept.items()})
        model.name_or_path = model.config.name_or_path = str(pretrained_model_name_or_path)
        if kwargs.get("generation_config") is None:
            model._load_generation_config(folder)
        if path:
            model._put_on(str(path), adapter_name, adapter)
        return (model, report) if wanted else model

    def _load_from_state_dict(self, state_dict, prefix: str, *args):
        """As PyTorch's. Raises InputError for a reference's tensors on another base, whose layers they lack."""
        own, trained_on = self.state_dict(), state_dict.pop(prefix + KEPT, None)
        given = {name: state_dict[prefix + name] for name in own if prefix + name in state_dict}
        lacks = all(given[name].data_ptr() == own[name].data_ptr() for name in _kept(given))  # accelerate adds our own
        odd = [name for name in given if lacks and name.endswith(".A") and not own[name].is_meta and
               not torch.allclose(given[name].to(own[name]), own[name], atol=0.01)]  # unit vectors, perhaps rounded
        if lacks and trained_on is not None and not any(tensor.is_meta for tensor in own.values()):
            odd += [KEPT] * (not torch.equal(trained_on.cpu(), _fingerprint(_kept(self._own(own)))))
        if odd:
            raise InputError(f"load_state_dict: {odd[0]} isn't this model's, so the state is of another base, whose "
                             "layers it lacks; load it with from_pretrained, or convert its base")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _put_on(self, adapter: str, name: str, hub: dict) -> None:
        """Add a saved adapter, by peft itself: transformers' `load_adapter` would lose the magnitudes of DoRA."""
        from peft import PeftConfig, load_peft_weights, set_peft_model_state_dict

        config = PeftConfig.from_pretrained(adapter, **hub)
        config.inference_mode = True
        self.add_adapter(config, name)
        weights = {k.removeprefix("base_model.model."): x for k, x in load_peft_weights(adapter, "cpu", **hub).items()}
        if odd := set_peft_model_state_dict(self, weights, name).unexpected_keys:
            raise InputError(f"{adapter}: {odd[0]} has no place in this model; give its own adapter")

    def _load_generation_config(self, folder: Path) -> None:
        if (folder / "generation_config.json").exists():
            self.generation_config = GenerationConfig.from_pretrained(folder, _from_model_config=False)  # depth too


def _refuse(options: dict, where: str, *names: str) -> None:
    for name in names:
        if options.pop(name, None) not in (None, False):
            raise InputError(f"{where}: {name} isn't supported; leave it out")


def _kept(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of a model's state what the base gives: the kept layers, embeddings, last norm and a head of its own."""
    return {name: tensor for name, tensor in state.items()
            if name.startswith("base.") and not name.endswith((".A", ".B"))}


def _fingerprint(kept: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """(32) bytes, those of the hash of kept tensors in bfloat16: the same after a cast to it, not to float16."""
    return torch.tensor(list(bytes.fromhex(sha256(kept, torch.bfloat16))), dtype=torch.uint8)


def _place(made: Path, folder: Path, tokenizer: list[Path]) -> None:
    """Move a whole checkpoint to its folder; config.json, with the weights' hash, once an earlier save's are gone."""
    (made / f"{CODE}.py").write_text('"""The classes of this checkpoint are those of the package `ouroboros`."""\n\n'
                                     f"from ouroboros import {', '.join(AUTO.values())}  # noqa: F401\n")
    for file in tokenizer if not (folder / TOKENIZER[0]).exists() else ():
        shutil.copyfile(file, made / file.name)
    names = {path.name for path in made.iterdir()}
    for name in sorted(names - {"config.json"}):
        os.replace(made / name, folder / name)
    for path in folder.iterdir():
        if path.name not in names and re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", path.name):
            path.unlink()
    os.replace(made / "config.json", folder / "config.json")


def fill(base: nn.Module, tensors) -> None:
    """Fill the cut model's parameters and buffers, all of them, in place."""
    left = tensors_of(base)
    for name, tensor in tensors:
        if name not in left or left[name].shape != tensor.shape:
            made = f"it {tuple(left[name].shape)}" if name in left else "none of that name"
            raise InputError(f"base: tensor {name} is {tuple(tensor.shape)}, config.json makes {made}; give its own")
        left.pop(name).copy_(tensor)
    if left:
        raise InputError(f"base: the checkpoint has no {min(left)}; give a causal LM's whole checkpoint")


def _kept_of_reference(config: OuroborosConfig, folder: Path, base, gguf_file: str | None, hub: dict):
    """The kept tensors of the base that a checkpoint refers to, or of `base` in its place. Checks the hash."""
    reference = config.base_reference
    if not reference:
        raise InputError("config.json: field 'base_reference' is empty, but the weights need it; save the model again")
    name, where = reference["name"], {}
    if base is None or base == name:
        where = {"revision": reference["revision"], "subfolder": reference.get("subfolder", "")}
        base = next((place / name for place in (Path(), *(folder / "_").resolve().parents)
                     if where["revision"] is None and (place / name).is_dir()), name)
    if not gguf_file and not (isinstance(base, (str, Path)) and any(Path(base).glob("model*.safetensors"))):
        gguf_file = reference.get("gguf_file")  # else the same tensors, saved as transformers does
    try:
        source = open_base(base, gguf_file=gguf_file, **where, **hub)
    except InputError as error:
        raise InputError(f"{folder}: its base can't be had ({error}), make it as a card says, or pass base=") from None
    if (found := sha256(source.weights)) != reference["sha256"]:
        raise InputError(f"{source}: its weights have sha256 {found}, the checkpoint was made from "
                         f"{reference['sha256']}; pass base= with the folder or model that was converted")
    return taken_tensors(source.weights, kept_layers(source.config.num_hidden_layers, config.split))
