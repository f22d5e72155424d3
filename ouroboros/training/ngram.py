"""What can be predicted by counting tokens and pairs of them: it stands beside every table of losses."""

import functools

import numpy as np

DISCOUNT = 0.75  # Kneser and Ney (1995); a common fixed value


class Counts:
    """P(token) by how often it stands in the training text: at all, or so many tokens after the current one.

    `unigram` is add-one; the pairs are interpolated with it by absolute discounting. Two ahead (protocol.md `target`)
    they make a skip-bigram.
    """

    def __init__(self, text: np.ndarray, vocabulary: int, pairs: bool):
        self.text, self.vocabulary, self.pairs = text.astype(np.int64), vocabulary, pairs
        seen = np.bincount(self.text, minlength=vocabulary)
        self.unigram = (seen + 1) / (len(text) + vocabulary)  # (V,)

    def block_losses(self, blocks: np.ndarray, ahead: int, look_ahead: int) -> list[float]:
        """(n, T + look_ahead) tokens -> each block's mean loss on the token `ahead` of each of its T inputs, nats."""
        width = blocks.shape[1] - look_ahead
        now, then = (blocks[:, start:start + width].astype(np.int64) for start in (0, ahead))
        chance = self._given(now, then, ahead) if self.pairs else self.unigram[then]
        return (-np.log(chance)).mean(1).tolist()

    def _given(self, now: np.ndarray, then: np.ndarray, ahead: int) -> np.ndarray:
        keys, counts = self._pairs(ahead)
        firsts = keys // self.vocabulary
        total = np.bincount(firsts, counts, minlength=self.vocabulary)  # (V,) tokens that follow, and how many kinds
        kinds = np.bincount(firsts, minlength=self.vocabulary)
        wanted = now * self.vocabulary + then
        place = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
        count = np.where(keys[place] == wanted, counts[place], 0)
        known = total[now] > 0
        kept = np.maximum(count - DISCOUNT, 0) / np.maximum(total[now], 1)
        left = np.where(known, DISCOUNT * kinds[now] / np.maximum(total[now], 1), 1.0)
        return kept + left * self.unigram[then]

    @functools.cache  # noqa: B019 (one object a run)
    def _pairs(self, ahead: int) -> tuple[np.ndarray, np.ndarray]:
        """The pairs of tokens so far apart, as sorted keys, and how often each was seen."""
        return np.unique(self.text[:-ahead] * self.vocabulary + self.text[ahead:], return_counts=True)
