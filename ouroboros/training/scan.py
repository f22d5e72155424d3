"""Which layer would best be kept in the middle, or passed again: the cut model, untrained (docs/hypotheses.md)."""

from collections.abc import Iterator

import numpy as np
from torch import nn

from ..experiment.profile import Profile
from .build import cut_layers
from .extra_passes import Repeated
from .trainer import plain_loss

PASSES = {1: (1, 3, 7), 2: (1,), 3: (1,)}  # {neighbours that are passed together: how often, beside their own pass}
GATES = (0.1, 0.3, 1.0)


def scan(base: nn.Module, profile: Profile, blocks: np.ndarray) -> Iterator[tuple[str, list[float]]]:
    """Yield (name, mean losses on blocks (n, T + 2), nats per token, under t+1).

    `kept`: one entry a middle layer that could be kept. `again_<layers>x<passes>_g<gate>`: one a first layer, by its
    place in the cut model.
    """
    split = profile.split
    middle = range(split.prelude, len(base.model.layers) - split.coda)
    yield "kept", [
        plain_loss(cut_layers(base, split.model_copy(update={"recurrent": index})), blocks) for index in middle]
    cut = cut_layers(base, split)
    layers = list(cut.model.layers)
    for count, often in PASSES.items():
        for passes in often:
            for gate in GATES:
                losses = []
                for last in range(count - 1, len(layers)):
                    place = Repeated(layers[last], cut.config.hidden_size, passes, tuple(layers[last - count + 1:last]))
                    nn.init.constant_(place.passes["gate"], gate)
                    cut.model.layers[last] = place
                    losses.append(plain_loss(cut, blocks))
                    cut.model.layers[last] = layers[last]
                yield f"again_{count}x{passes}_g{gate:g}", losses
