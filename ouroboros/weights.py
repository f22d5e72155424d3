"""A checkpoint's tensors by name, read one at a time, and their hash. Only safetensors: no pickle is loaded."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open

from .errors import InputError

PATTERNS = ["config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"]


def resolve(name: str | Path, revision: str | None = None) -> tuple[Path, str | None]:
    """The folder of a checkpoint and its revision: a local folder has none, the hub's is a commit.

    Raises InputError when there is neither.
    """
    if not isinstance(name, (str, Path)):
        raise InputError(f"checkpoint {name!r}: must be a folder or a repository's name")
    if Path(name).is_dir():
        return Path(name), None
    try:
        folder = Path(snapshot_download(str(name), revision=revision, allow_patterns=PATTERNS))
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


def sha256(weights: Mapping[str, torch.Tensor]) -> str:
    """The hash of tensors: names, dtypes, shapes and bytes; the same however they are sharded."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
