"""The prelude's states, kept on disk: it is frozen, so every run of a base meets the same ones on the same tokens.

Worth it where a prelude costs more than a file: on SmolLM2-135M it is 19 % of an update at depth 1. What is read back
is what was computed, bit for bit, so no result changes.
"""

import hashlib
import io
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..experiment.profile import Profile
from ..log import write_atomic
from .build import Nothing


class KeptPrelude(nn.Module):
    """In the place of a model's first layer: the state after the last layer of the prelude, (B, T, d), read from
    `folder` where a run has met this batch of embeddings before, else computed and written there."""

    def __init__(self, layers: list[nn.Module], folder: Path):
        super().__init__()
        self.layers, self.folder = nn.ModuleList(layers), folder

    def forward(self, h: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """(B, T, d) embeddings -> (B, T, d)."""
        content = h.detach().cpu().contiguous().numpy()
        name = hashlib.sha256(f"{content.shape} {h.dtype}".encode() + content.tobytes()).hexdigest()
        file = self.folder / f"{name}.npy"
        if file.exists():
            return torch.from_numpy(np.load(file, allow_pickle=False)).to(h.device)
        for layer in self.layers:
            h = layer(h, *args, **kwargs)
        buffer = io.BytesIO()
        np.save(buffer, h.detach().cpu().numpy(), allow_pickle=False)
        write_atomic(file, buffer.getvalue())
        return h


@contextmanager
def kept(model: nn.Module, profile: Profile, root: Path, base_sha256: str):
    """While this is entered a model takes its prelude's states from disk, if the profile says so and nothing in the
    prelude is trained.

    The tokens that it is given must be whole blocks, without padding or cache.
    """
    inner, count = getattr(model, "base", model).model, profile.split.prelude
    prelude = [inner.embed_tokens, *inner.layers[:count]]
    if not (profile.keep_prelude and count) or any(p.requires_grad for module in prelude for p in module.parameters()):
        yield
        return
    folder, layers = Path(root) / ".cache" / "prelude" / f"{base_sha256[:16]}-{count}", inner.layers
    states = KeptPrelude(list(layers[:count]), folder)
    inner.layers = nn.ModuleList([states, *(Nothing() for _ in layers[1:count]), *layers[count:]])
    try:
        yield
    finally:  # what is saved is the model as it is made
        inner.layers = layers
