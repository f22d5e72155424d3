"""A checkpoint's tensors by name and their hash: safetensors one at a time, GGUF as a whole. No pickle is loaded."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, GgufConfig, PretrainedConfig, PreTrainedModel

from ..errors import InputError, first_line, require

PATTERNS = ["config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json",
            "adapter_config.json", "adapter_model.safetensors"]
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # what is computed with; float8 holds codes


def resolve(name: str | Path, revision: str | None = None, gguf_file: str | None = None, subfolder: str = "",
            **hub) -> tuple[Path, str | None]:
    """The folder of a checkpoint and its revision: a local folder has none, the hub's is a commit. `hub` are arguments
    of `snapshot_download`; of a repository with a `gguf_file` only that is fetched."""
    if not name or not isinstance(name, (str, Path)):
        raise InputError(f"checkpoint {name!r}: must be a folder or a repository's name")
    if (Path(name) / subfolder).is_dir():
        return Path(name) / subfolder, None
    try:
        wanted = [str(Path(subfolder, file)) for file in ([gguf_file] if gguf_file else [*PATTERNS, *TOKENIZER])]
        folder = Path(snapshot_download(str(name), revision=revision, allow_patterns=wanted, **hub))
        return folder / subfolder, folder.name  # the hub's cache names a snapshot by its commit
    except (HFValidationError, OSError) as error:
        tried = "" if isinstance(error, HFValidationError) else f", and the hub doesn't give it ({first_line(error)})"
        raise InputError(f"checkpoint '{name}': no such folder{tried}; name a folder or a repository") from None


def read_config(kind: type, folder: Path):
    """The folder's config.json, read by `kind`: OuroborosConfig, or AutoConfig for a base's. InputError for another."""
    wanted = getattr(kind, "model_type", None)
    try:
        there = PretrainedConfig.get_config_dict(folder)[0].get("model_type")
        if there == wanted or (wanted is None and there != "ouroboros"):
            return kind.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{folder / 'config.json'}: can't be read ({first_line(error)}); save it again") from None
    raise InputError(f"{folder}: holds a {there} model, " + ("no Ouroboros model; convert it with from_base" if wanted
                                                             else "converted already; load it with from_pretrained"))


class Checkpoint(Mapping[str, torch.Tensor]):
    """A folder's tensors, of one safetensors file or shards, each mapped when read. InputError for a broken file."""

    def __init__(self, folder: Path, tied: bool = False):  # tied: without the head
        self.folder = folder
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        if single.exists():  # rather than shards, as in transformers
            self._files = dict.fromkeys(self._open(single, lambda file: list(file.keys())), single)
        elif index.exists():
            try:
                places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                self._files = {name: folder / file for name, file in places.items()}
            except (ValueError, KeyError, TypeError, AttributeError):
                raise InputError(f"{index}: no JSON with a weight_map; save or fetch the checkpoint again") from None
        else:
            raise InputError(f"{folder}: holds no model.safetensors, nor an index of shards; save it with transformers")
        if tied:
            check_tied(self)
            self._files.pop("lm_head.weight", None)

    def _open(self, path: Path, read):
        try:
            with safe_open(path, "pt") as file:
                return read(file)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: can't be read ({first_line(error)}); the file is truncated, altered or missing, "
                             "save or fetch it again") from None

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._open(self._files[name], lambda file: file.get_tensor(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def gguf_metadata(file: Path) -> tuple[dict, tuple[str, ...]]:
    """The keys of a GGUF file's header (long arrays as their length), and the names of its tensors. Raises InputError
    when the file can't be read or the package `gguf` isn't installed."""
    require("gguf", "reads GGUF files")
    from transformers.integrations.gguf import read_gguf_metadata

    try:
        return read_gguf_metadata(str(file))
    except Exception as error:  # whatever a broken header leads to: no common class
        raise InputError(f"{file}: can't be read as GGUF ({first_line(error)}); fetch the file again") from None


def read_gguf(file: Path) -> PreTrainedModel:
    """The causal LM in a GGUF file, in memory, dequantised to float32. InputError for what transformers passes over."""
    metadata, names = gguf_metadata(file)
    if (scaling := metadata.get(f"{metadata['general.architecture']}.rope.scaling.type", "none")) != "none":
        raise InputError(f"{file}: its rotary positions are scaled ({scaling}), which transformers doesn't read from "
                         "GGUF; give the model's safetensors")
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, output_loading_info=True,
            quantization_config=GgufConfig(dequantize=True))  # else it couldn't be saved
    except Exception as error:  # as above
        raise InputError(f"{file}: transformers can't read it ({first_line(error)}); fetch the file again") from None
    taken = len(tensors_of(model)) - len(report["missing_keys"])
    if report["missing_keys"] or taken != len(names):
        raise InputError(f"{file}: holds {len(names)} tensors, transformers' {type(model).__name__} takes {taken} and "
                         f"misses {len(report['missing_keys'])}; give the model's safetensors")
    return model.eval()


def gguf_file_of(config: PretrainedConfig) -> str | None:
    """The GGUF file, by its name in folder or repository, that transformers loaded a model from."""
    return getattr(getattr(config, "quantization_config", None), "gguf_file", None)


def tensors_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A model's tensors by name, as a file of it would hold them: a tied head once, no SVD bases."""
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith((".A", ".B"))}
    if model.config.tie_word_embeddings:
        check_tied(state)
        state.pop("lm_head.weight", None)
    return state


def check_tied(weights: Mapping[str, torch.Tensor], prefix: str = "") -> None:
    """Raises InputError for a head that the configuration calls tied and that holds other values."""
    head, embedding = (weights.get(f"{prefix}{name}.weight") for name in ("lm_head", "model.embed_tokens"))
    if not (head is None or embedding is None or head.is_meta or torch.equal(head, embedding)):
        raise InputError(f"tie_word_embeddings is true, but {prefix}lm_head.weight has other values; make it false")


def sha256(weights: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None) -> str:
    """The hash of tensors, cast to `dtype`: names, dtypes, shapes and bytes; the same however they are sharded."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().to(dtype or weights[name].dtype).contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
