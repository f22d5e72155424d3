"""A trigram language model: the least that a base must beat to be called a language model."""

from collections import Counter, defaultdict
from collections.abc import Iterable

import numpy as np

DISCOUNT = 0.75  # Kneser and Ney (1995); a common fixed value


class Trigram:
    """Interpolated Kneser-Ney over token ids: trigram counts, backing off to continuation counts, then uniform."""

    def __init__(self, documents: Iterable[np.ndarray], vocab_size: int, start: int):
        self.vocab_size, self.start = vocab_size, start
        trigrams: Counter = Counter()
        for document in documents:
            padded = [start, start, *document.tolist()]
            trigrams.update(zip(padded, padded[1:], padded[2:], strict=False))
        # order 3 counts tokens; orders 2 and 1 count in how many different contexts a continuation was seen
        self.counts = [defaultdict(Counter) for _ in range(3)]
        for (a, b, c), count in trigrams.items():
            self.counts[2][a, b][c] = count
            self.counts[1][b,][c] += 1
        for (_,), followers in self.counts[1].items():
            self.counts[0][()].update(followers.keys())
        self.totals = [{context: followers.total() for context, followers in order.items()} for order in self.counts]

    def probability(self, context: tuple[int, ...], token: int) -> float:
        lower = self.probability(context[1:], token) if context else 1 / self.vocab_size
        order = len(context)
        followers = self.counts[order].get(context)
        if not followers:
            return lower
        kept = max(followers[token] - DISCOUNT, 0.0) + DISCOUNT * len(followers) * lower
        return kept / self.totals[order][context]

    def loss(self, document: np.ndarray) -> float:
        """Summed nats of a document's tokens, the first one given the start of text."""
        padded = [self.start, self.start, *document.tolist()]
        steps = zip(padded, padded[1:], padded[2:], strict=False)
        return -float(np.sum(np.log([self.probability((a, b), c) for a, b, c in steps])))
