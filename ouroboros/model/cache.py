"""The key/value cache: a slot a recurrence step, and the running mean that causal pooling needs."""

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from ..errors import InputError
from .configuration import OuroborosConfig, take_layers


class RunningMean(DynamicLayer):
    """What causal pooling keeps of the tokens seen, float32 at least: sum `keys` (B, 1, d), count `values` (B, 1, 1).

    While it records the past, as assisted decoding asks, it keeps both for every token: some can be taken back.
    """

    is_croppable = record_past = False  # so transformers asks it to record before it crops

    def activate_past_recording(self) -> None:
        self.record_past = True

    def update(self, total: torch.Tensor, count: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T, d) and (B, T, 1) cumulative over new positions -> the same over all positions so far."""
        if not self.is_initialized:
            self.lazy_initialization(total, count)
            self.keys, self.values = torch.zeros_like(total[:, :1]), torch.zeros_like(count[:, :1])
        total, count = total + self.keys[:, -1:], count + self.values[:, -1:]
        self.keys, self.values = (torch.cat([old, new], dim=1) if self.record_past else new[:, -1:]
                                  for old, new in ((self.keys, total), (self.values, count)))
        return total, count

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove and self.is_initialized:
            if not 0 < -tokens_to_remove < self.keys.shape[1]:
                raise InputError(f"crop({tokens_to_remove}): so many tokens weren't recorded; give minus their number, "
                                 "and call the cache's activate_past_recording() before they come")
            self.keys, self.values = self.keys[:, :tokens_to_remove], self.values[:, :tokens_to_remove]


class RecurrentCache(DynamicCache):
    """For one depth: slot i is prelude i's, P + t step t's, the rest the coda's; each step a mean if it `pools`."""

    def __init__(self, config: OuroborosConfig, depth: int, pools: bool):
        means = [RunningMean() for _ in range(depth if pools else 0)]
        Cache.__init__(self, layers=DynamicCache(config=take_layers(config.base, config.order(depth))).layers + means)
        self.depth, self.means, self.record_past = depth, means or [None] * depth, False

    def activate_past_recording(self) -> None:
        super().activate_past_recording()
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        for layer in reversed(self.layers):  # the means first: where they refuse, nothing is taken from the slots
            layer.crop(tokens_to_remove)


class Slot:
    """One slot of a cache, whichever index the attention module that writes to it carries."""

    def __init__(self, cache: RecurrentCache, index: int):
        self.cache, self.index = cache, index

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args, **kwargs):
        return self.cache.update(keys, values, self.index, *args, **kwargs)
