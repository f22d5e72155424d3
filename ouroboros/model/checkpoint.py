"""A checkpoint's tensors by name and their hash: safetensors one at a time, GGUF as a whole. No pickle is loaded."""

import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, GgufConfig, PretrainedConfig, PreTrainedModel

from ..errors import InputError, first_line

PATTERNS = ["config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"]


def resolve(name: str | Path, revision: str | None = None,
            gguf_file: str | None = None) -> tuple[Path, str | None]:
    """The folder of a checkpoint and its revision: a local folder has none, the hub's is a commit.

    Of a repository with a `gguf_file` only that is fetched. Raises InputError when there is neither.
    """
    if not isinstance(name, (str, Path)):
        raise InputError(f"checkpoint {name!r}: must be a folder or a repository's name")
    if Path(name).is_dir():
        return Path(name), None
    try:
        wanted = [gguf_file] if gguf_file else PATTERNS
        folder = Path(snapshot_download(str(name), revision=revision, allow_patterns=wanted))
        return folder, folder.name  # the hub's cache names a snapshot by its commit
    except (HFValidationError, OSError) as error:
        raise InputError(f"checkpoint '{name}': no such folder, and the hub doesn't give it "
                         f"({str(error).strip().splitlines()[0]}); name a folder or a repository") from None


def read_config(kind: type, folder: Path):
    """The folder's config.json, read by `kind`, a configuration class of transformers or AutoConfig.

    Raises InputError when it is missing or can't be read.
    """
    try:
        return kind.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder / 'config.json'}: can't be read ({str(error).strip().splitlines()[0]}); save or "
                         "fetch it again") from None


class Checkpoint(Mapping[str, torch.Tensor]):
    """The tensors of a folder's safetensors files, one file or shards with an index.

    A tensor that is read is mapped from its file, not copied, and the file is closed at once: memory is used only
    while the tensor is. Raises InputError for a missing, truncated or unreadable file.
    """

    def __init__(self, folder: Path, without: tuple[str, ...] = ()):
        self.folder = folder
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        if index.exists():
            try:
                places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            except (ValueError, KeyError):
                raise InputError(f"{index}: no JSON with a weight_map; save or fetch the checkpoint again") from None
            self._files = {name: folder / file for name, file in places.items()}
        elif single.exists():
            self._files = dict.fromkeys(self._open(single, lambda file: list(file.keys())), single)
        else:
            raise InputError(f"{folder}: holds no model.safetensors and no index of shards; convert other formats "
                             "with transformers' save_pretrained")
        for name in without:
            self._files.pop(name, None)

    def _open(self, path: Path, read):
        try:
            with safe_open(path, "pt") as file:
                return read(file)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: can't be read ({str(error).splitlines()[0]}); the file is truncated, altered or "
                             "missing, save or fetch it again") from None

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._open(self._files[name], lambda file: file.get_tensor(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def require_gguf() -> None:
    """Raises InputError unless the package that reads GGUF's tensors is installed."""
    if importlib.util.find_spec("gguf") is None:
        raise InputError("package 'gguf', which reads GGUF files, isn't installed; pip install -r requirements.lock")


def gguf_metadata(file: Path) -> tuple[dict, tuple[str, ...]]:
    """The keys of a GGUF file's header (long arrays as their length), and the names of its tensors.

    Raises InputError when the file can't be read or the package that reads its tensors isn't installed.
    """
    require_gguf()
    from transformers.integrations.gguf import read_gguf_metadata

    try:
        return read_gguf_metadata(str(file))
    except Exception as error:  # whatever a broken header leads to: no common class
        raise InputError(f"{file}: can't be read as GGUF ({first_line(error)}); the file is truncated, altered or "
                         "missing, fetch it again") from None


def read_gguf(file: Path) -> PreTrainedModel:
    """The causal LM in a GGUF file, every tensor dequantised to float32; all of it is held in memory.

    transformers reads it, and would leave out without a word what its class has no place for, or draw at random what
    the file lacks: both are refused. Raises InputError for these, for scaled rotary positions (which transformers
    doesn't take over), and for a file that can't be read.
    """
    metadata, names = gguf_metadata(file)
    scaling = metadata.get(f"{metadata['general.architecture']}.rope.scaling.type", "none")
    if scaling != "none":
        raise InputError(f"{file}: its rotary positions are scaled ({scaling}), which transformers doesn't read from "
                         "GGUF; give the model's safetensors")
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, output_loading_info=True,
            quantization_config=GgufConfig(dequantize=True))  # else it couldn't be saved
    except Exception as error:  # as above
        raise InputError(f"{file}: transformers can't read it ({first_line(error)}); give a whole GGUF file of a "
                         "causal LM") from None
    taken = len(tensors_of(model)) - len(report["missing_keys"])
    if report["missing_keys"] or taken != len(names):
        raise InputError(f"{file}: holds {len(names)} tensors, transformers' {type(model).__name__} takes {taken} and "
                         f"misses {len(report['missing_keys'])}; give the model's safetensors")
    return model.eval()


def gguf_file_of(config: PretrainedConfig) -> str | None:
    """The GGUF file, by its name in folder or repository, that transformers loaded a model from."""
    return getattr(getattr(config, "quantization_config", None), "gguf_file", None)


def tensors_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A model's tensors by name, as a file of it would hold them: a tied head once."""
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    return state


def sha256(weights: Mapping[str, torch.Tensor]) -> str:
    """The hash of tensors: names, dtypes, shapes and bytes; the same however they are sharded."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
