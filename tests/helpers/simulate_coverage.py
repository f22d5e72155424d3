"""How often the intervals of `ouroboros.analysis.statistics` cover the truth, by simulation.

    python tests/helpers/simulate_coverage.py [simulations]

prints the tables of docs/statistics.md (4,000 simulations take about ten minutes on one core).
"""

import sys
from dataclasses import dataclass, replace

import numpy as np

from ouroboros.analysis.statistics import (
    block_interval,
    block_ratio,
    document_clusters,
    pool_seed_variance,
    t_interval,
    verdict,
)

# what seeds, documents and their interaction each add to the standard error of the mean
SHARES = {
    "seeds 10x": (1, 0.1, 0.1), "seeds alone": (1, 0, 0),
    "blocks 10x": (0.1, 1, 0.1), "blocks alone": (0, 1, 0),
    "seeds = blocks": (1, 1, 0.1), "seeds = blocks / 3": (0.33, 1, 0.1),
    "interaction 10x": (0.1, 0.1, 1), "interaction alone": (0, 0, 1),
    "seeds = interaction": (1, 0.1, 1), "blocks = interaction": (0.1, 1, 1), "all equal": (1, 1, 1),
}
UNEVEN = (1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 4, 4, 5, 6, 7, 8, 9)  # blocks of a document, 64 in all
EFFECTS = {
    "normal": lambda generator, shape: generator.normal(size=shape),
    "heavy": lambda generator, shape: generator.standard_t(3, shape) / np.sqrt(3),
    "skewed": lambda generator, shape: generator.exponential(size=shape) - 1,
}


@dataclass(frozen=True)
class Layout:
    """`mixing` (blocks, documents): each document's share of a block; `clusters` (blocks,)."""

    mixing: np.ndarray
    clusters: np.ndarray


def separate(blocks: int) -> Layout:
    """One document a block."""
    return Layout(np.eye(blocks), np.arange(blocks))


def uneven() -> Layout:
    """64 blocks of 18 documents, one to nine blocks each."""
    clusters = np.repeat(np.arange(len(UNEVEN)), UNEVEN)
    return Layout(np.eye(len(UNEVEN))[clusters], clusters)


def packed(blocks: int, generator: np.random.Generator, block: int = 256) -> Layout:
    """Documents of 20 to 2,000 tokens (median 230) packed one after the other."""
    lengths = np.exp(generator.normal(np.log(230), 0.9, 10 * blocks)).astype(int) + 2
    ends = np.cumsum(lengths)
    used = int(np.searchsorted(ends, blocks * block)) + 1
    first = np.arange(blocks)[:, None] * block
    # (blocks, documents) tokens of a document in a block
    inside = np.minimum(ends, first + block) - np.maximum(ends - lengths, first)
    return Layout(np.clip(inside, 0, None)[:, :used] / block,
                  document_clusters(lengths, block, blocks, separator=0))


LAYOUTS = {
    "64 documents": (lambda generator: separate(64), "normal"),
    "18 uneven": (lambda generator: uneven(), "normal"),
    "64 packed": (lambda generator: packed(64, generator), "normal"),
    "64 packed, heavy": (lambda generator: packed(64, generator), "heavy"),
    "256 packed, heavy": (lambda generator: packed(256, generator), "heavy"),
}


def draw(layout: Layout, shares, seeds: int, generator, effect: str = "normal") -> np.ndarray:
    """Differences (seeds, blocks) of mean 0; each of `shares` is an exact standard error."""
    seed, document, both = shares
    spread = np.sqrt(np.sum(layout.mixing.mean(axis=0) ** 2))  # of the mean, by documents
    by_document = EFFECTS[effect](generator, (seeds + 1, layout.mixing.shape[1])) / spread
    effects = document * by_document[0] + both * np.sqrt(seeds) * by_document[1:]
    return seed * np.sqrt(seeds) * generator.normal(size=(seeds, 1)) + effects @ layout.mixing.T


def drawn(name: str, shares, seeds: int, simulations: int, generator):
    """Yields (differences, clusters): packed documents are drawn anew every 50 simulations."""
    make, effect = LAYOUTS[name]
    for simulation in range(simulations):
        if simulation % 50 == 0:
            layout = make(generator)
        yield draw(layout, shares, seeds, generator, effect), layout.clusters


def coverage(name: str, shares, seeds: int, simulations: int, generator) -> np.ndarray:
    """In percent: the 95 % interval, the 90 % interval, Student t over seeds alone."""
    hits = np.zeros(3)
    for d, clusters in drawn(name, shares, seeds, simulations, generator):
        found, alone = block_interval(d, clusters), t_interval(d.mean(axis=1))
        hits += [found.low <= 0 <= found.high, found.low90 <= 0 <= found.high90,
                 alone.low <= 0 <= alone.high]
    return 100 * hits / simulations


def pooled_coverage(name: str, shares, seeds: int, simulations: int, generator) -> float:
    """One or two seeds, with the seed variance of two other cells of three seeds, in percent."""
    seed, document, both = shares
    hits = 0
    for d, clusters in drawn(name, shares, seeds + 6, simulations, generator):
        # `draw` scales to the standard error of all seeds; only the ratio of the parts matters
        pool = pool_seed_variance([d[seeds:seeds + 3], d[seeds + 3:]])
        found = block_interval(d[:seeds], clusters, pool)
        hits += found.low <= 0 <= found.high
    return 100 * hits / simulations


def ratio_coverage(name: str, shares, seeds: int, gap: float, simulations: int, generator):
    """A true recovery of 50 % of a gap of `gap` standard errors that no seed enters.

    Returns the coverage in percent and the share of defined ratios.
    """
    hits = defined = 0
    for d, clusters in drawn(name, shares, seeds, simulations, generator):
        blocks = draw(separate(d.shape[1]), (0, 1, 0), 1, generator)  # the same for every seed
        bottom = gap + np.repeat(blocks, seeds, axis=0)
        found = block_ratio(0.5 * bottom + d, bottom, clusters)
        if not found.reason:
            defined += 1
            hits += found.low <= 50 <= found.high
    return 100 * hits / max(defined, 1), defined / simulations


def equivalence_error(name: str, shares, seeds: int, simulations: int, generator) -> float:
    """How often a difference as large as the margin is called smaller than it, in percent."""
    margin, wrong = 4 * np.sqrt(np.sum(np.square(shares))), 0
    for d, clusters in drawn(name, shares, seeds, simulations, generator):
        word = verdict(replace(block_interval(d + margin, clusters), margin=margin))
        wrong += word == "equivalent" or word.endswith("within the margin")
    return 100 * wrong / simulations


def print_tables(simulations: int) -> None:
    generator = np.random.default_rng(20260401)
    names = list(LAYOUTS)
    print(f"95 % interval, {simulations} simulations a cell, in percent: 3 seeds / 5 seeds")
    print("| what dominates | " + " | ".join(names) + " | t over seeds alone |")
    nineties, errors = [], []
    for what, shares in SHARES.items():
        found = {(name, seeds): coverage(name, shares, seeds, simulations, generator)
                 for name in names for seeds in (3, 5)}
        cells = [f"{found[name, 3][0]:.1f} / {found[name, 5][0]:.1f}" for name in names]
        alone = [f"{np.mean([found[name, seeds][2] for name in names]):.0f}" for seeds in (3, 5)]
        print(f"| {what} | " + " | ".join(cells) + f" | {' / '.join(alone)} |", flush=True)
        nineties += [values[1] for values in found.values()]
        errors += [equivalence_error("64 packed", shares, seeds, simulations // 2, generator)
                   for seeds in (3, 5)]
    print(f"90 % interval: {min(nineties):.1f} to {max(nineties):.1f}")
    print(f"as large as the margin, called smaller: {min(errors):.1f} to {max(errors):.1f}")
    for seeds in (1, 2):
        found = [pooled_coverage("64 packed", shares, seeds, simulations, generator)
                 for shares in SHARES.values()]
        print(f"pooled, seeds: {seeds}; {min(found):.1f} to {max(found):.1f}", flush=True)
    found = [coverage("64 packed", shares, 2, simulations, generator)[0]
             for shares in SHARES.values()]
    print(f"two seeds by themselves: {min(found):.1f} to {max(found):.1f}", flush=True)
    for gap in (100, 8):
        found = [ratio_coverage("64 packed", shares, 3, gap, simulations // 2, generator)
                 for shares in SHARES.values()]
        print(f"ratio, gap of {gap} standard errors: {min(found)[0]:.1f} to {max(found)[0]:.1f}, "
              f"defined in {100 * min(d for _, d in found):.0f} % or more", flush=True)
    for name, make in (("64 documents", separate(64)), ("18 uneven", uneven())):
        hits = 0
        for _ in range(simulations):
            found = block_interval(draw(make, (0, 1, 0), 3, generator, "skewed"), make.clusters)
            hits += found.low <= 0 <= found.high
        print(f"skewed, blocks alone, {name}: {100 * hits / simulations:.1f}")
    for label, clusters in (("every block by itself", lambda labels: np.arange(len(labels))),
                            ("document_clusters", lambda labels: labels)):
        hits = 0
        for d, labels in drawn("64 packed", (0, 1, 0), 3, simulations, generator):
            found = block_interval(d, clusters(labels))
            hits += found.low <= 0 <= found.high
        print(f"clusters, documents alone, {label}: {100 * hits / simulations:.1f}", flush=True)


if __name__ == "__main__":
    print_tables(int(sys.argv[1]) if len(sys.argv) > 1 else 4000)
