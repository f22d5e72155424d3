"""Comparisons of two arms: one interval over seeds and evaluation blocks, and the words it allows.

A comparison is an array of differences, (seeds, blocks): first arm minus second, with the same seed
and on the same block, in nats per token. Every seed meets every block, and both are samples: other
seeds and other texts would give another mean. Blocks that share a document belong together in one
cluster (`document_clusters`).

The variance of the mean is V_seed + V_block - V_both (Cameron, Gelbach and Miller 2011): from the
spread over seeds, from the spread over clusters, and from their interaction, which is contained in
both and must count once. Each part keeps its own Student t, and the half-widths add as squares
(Howe 1974; Zou and Donner 2008):

    half-width^2 = t(seeds - 1)^2 V_seed + t(df)^2 max(V_block - V_both, 0)

This is the interval over seeds alone, widened by what the blocks add. Where nothing was trained,
all seeds are equal, V_seed and V_both are 0, and the blocks alone decide. With clusters of unequal
size, V_block is scaled to be unbiased, and df matches the variance of V_block (Bell and McCaffrey
2002), both for clusters that each share one effect; equal clusters give C - 1 degrees of freedom.

docs/statistics.md has the measured coverage and the alternatives that were tried.

Sources: Cameron, Gelbach and Miller, J. Bus. Econ. Stat. 29, 238 (2011). Howe, J. Am. Stat. Assoc.
69, 789 (1974). Zou and Donner, Stat. Med. 27, 1693 (2008). Bell and McCaffrey, Surv. Methodol. 28,
169 (2002). Fieller, J. R. Stat. Soc. B 16, 175 (1954), the ratio. Schuirmann, J. Pharmacokinet.
Biopharm. 15, 657 (1987), equivalence by two one-sided tests (TOST).
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import brentq
from scipy.special import stdtrit

from ..errors import InputError
from .intervals import FEWEST, NO_GAP, BySeed, Interval, Ratio, fieller, holm, t_interval

ALPHA = 0.05  # of the 95 % interval
TOST_ALPHA = 0.10  # of the 90 % interval: two one-sided tests at 5 %
SMALLEST_P = 1e-12  # a smaller p-value is given as this one
CUT_SHARE = 0.10  # of the squared document length, see `document_clusters`
MARGIN, MARGIN_SHARE = 0.01, 0.01  # nats per token; share of the gap

BETTER, WORSE = "better", "worse"
WITHIN = " within the margin"
EQUIVALENT, UNDECIDED, NOT_JUDGED = "equivalent", "undecided", "not judged"


@dataclass(frozen=True)
class SeedVariance:
    """The variance over seeds of a difference's mean over blocks, (nats per token)^2, pooled."""

    variance: float
    df: int


# ------------------------------------------------------------------------------------- clusters

def document_clusters(lengths, block: int, count: int, separator: int = 1,
                      share: float = CUT_SHARE) -> np.ndarray:
    """Group consecutive blocks so that the documents are almost never cut between two clusters.

    Packed documents run on from block to block, so "blocks that share a document" chains nearly all
    blocks into one cluster. Instead, the boundaries that cut least are taken as cluster boundaries:
    one that cuts a document into a + b tokens loses the covariance 2ab out of (a + b)^2, and all of
    them together may lose at most `share` of the sum of squared lengths. So if documents were all
    that blocks have in common, the variance would be at most 10 % too small, the interval 5 %.
    `share` 0 cuts only where a document ends.

    Args:
        lengths: (documents,) tokens of each document in the order they were packed, as
            `Corpus.lengths` gives them for blocks without a seed.
        block: tokens in a block. count: number of blocks.
        separator: tokens put after each document: 1 with packing `separated`, 0 with `joined`.

    Returns: (count,) int64, the cluster of each block: 0, 0, 1, 1, 1, 2, ...
    Raises: InputError when the documents hold less than count blocks.
    """
    lengths = np.asarray(lengths, dtype=np.int64) + separator
    ends, total = np.cumsum(lengths), block * count
    if not len(ends) or ends[-1] < total:
        held = int(ends[-1]) if len(ends) else 0
        raise InputError(f"comparison: document lengths hold {held} tokens, {count} blocks have "
                         f"{total}; give the lengths of all documents that were packed")
    ends = np.minimum(ends, total)
    starts = np.minimum(np.cumsum(lengths) - lengths, total)
    boundaries = np.arange(1, count) * block
    cut = np.searchsorted(ends, boundaries, side="right")  # the document that a boundary cuts
    lost = 2.0 * (boundaries - starts[cut]) * (ends[cut] - boundaries)
    # several boundaries in one document lose together at most the sum of what each loses
    order = np.argsort(lost, kind="stable")
    allowed = order[np.cumsum(lost[order]) <= share * np.sum((ends - starts) ** 2.0)]
    new = np.zeros(count, dtype=np.int64)
    new[allowed + 1] = 1
    return np.cumsum(new)


# ------------------------------------------------------------------------------------- variance

@dataclass(frozen=True, eq=False)
class _Clusters:
    """What the cluster sizes decide. C clusters; `weights` are their shares of the blocks."""

    index: np.ndarray  # (blocks,) cluster of each block, 0 to C - 1
    weights: np.ndarray  # (C,)
    scale: np.ndarray  # (C,) makes the sum of squared residuals an unbiased variance
    df: float

    @classmethod
    def of(cls, labels) -> "_Clusters":
        _, index, sizes = np.unique(labels, return_inverse=True, return_counts=True)
        w = sizes / sizes.sum()
        # with cluster means of variance 1, E[(w_c (mean_c - mean))^2] = w_c^2 (1 - 2 w_c + sum w^2)
        scale = 1 / (1 - 2 * w + np.sum(w**2)) if len(w) > 1 else np.full(1, math.nan)
        g = scale * w**2
        # the variance estimate as a quadratic form in the cluster means, with matrix `form`
        form = np.diag(g) - np.outer(g, w) - np.outer(w, g) + g.sum() * np.outer(w, w)
        df = np.trace(form) ** 2 / np.sum(form**2)
        return cls(index, w, scale, float(df))

    def totals(self, differences: np.ndarray) -> np.ndarray:
        """(seeds, C): each cluster's part of a seed's mean over blocks."""
        sums = [np.bincount(self.index, row, len(self.weights)) for row in differences]
        return np.stack(sums) / len(self.index)


@dataclass(frozen=True)
class _Spread:
    """A mean and the two parts of its variance, each with its degrees of freedom."""

    mean: float
    seed_variance: float
    seed_df: float
    block_variance: float
    block_df: float

    def half(self, alpha: float) -> float:
        """The half-width of the 1 - alpha interval."""
        seed_t, block_t = stdtrit((self.seed_df, self.block_df), alpha / 2)  # below 0; squared here
        return math.sqrt(seed_t**2 * self.seed_variance + block_t**2 * self.block_variance)

    def p(self) -> float:
        """The alpha whose interval just touches 0."""
        if self.mean == 0:
            return 1.0
        if self.half(SMALLEST_P) <= abs(self.mean):
            return SMALLEST_P
        return float(brentq(lambda alpha: self.half(alpha) - abs(self.mean), SMALLEST_P, 1.0,
                            xtol=1e-14, rtol=1e-9))


def _spread(totals: np.ndarray, clusters: _Clusters, seeds: tuple[float, float] | None) -> _Spread:
    """The spread of a mean; `seeds` gives its variance over seeds and df where these are known."""
    n_seeds, weights = len(totals), clusters.weights
    rows = totals.sum(axis=1)  # (seeds,) each seed's mean
    mean = rows.mean()
    residual = totals.mean(axis=0) - weights * mean  # (C,)
    block_variance = np.sum(clusters.scale * residual**2)
    if n_seeds > 1:
        both = totals - totals.mean(axis=0) - np.outer(rows - mean, weights)  # (seeds, C)
        block_variance -= np.sum(clusters.scale * both**2) / (n_seeds * (n_seeds - 1))
    if seeds is None:
        seeds = float(rows.var(ddof=1)) / n_seeds, n_seeds - 1
    return _Spread(float(mean), *seeds, max(float(block_variance), 0.0), clusters.df)


# ---------------------------------------------------------------------------------- comparisons

def compare(differences, clusters, pooled: SeedVariance | None = None,
            evaluated_only: bool = False) -> Interval:
    """The mean difference of two arms, with an interval that covers seeds and blocks.

    With three seeds or more, `pooled` isn't used. With one or two it gives the seed variance (two
    seeds add their own), and the interval is marked. Without it, two seeds have a wide interval of
    their own and one seed has none. Where two rows or more are equal, nothing was trained and the
    blocks alone decide; for a single row say so with `evaluated_only`.

    Args:
        differences: (seeds, blocks) first arm minus second, nats per token.
        clusters: (blocks,) the cluster of each block.
        pooled: from `pool_seed_variance`.
        evaluated_only: no seed enters: neither arm was trained.

    Raises: InputError for shapes that don't fit, a value that isn't finite, fewer than two clusters
        or rows that differ although nothing was trained.
    """
    d, grouped = _checked(differences, clusters)
    alike = _untrained(d, evaluated_only)
    uses_pooled = pooled is not None and len(d) < FEWEST and not alike
    covered = dict(n=len(d), blocks=d.shape[1], clusters=len(grouped.weights), pooled=uses_pooled,
                   trained=not alike)
    if len(d) == 1 and not alike and not uses_pooled:
        return Interval(float(d.mean()), math.nan, math.nan, **covered)
    spread = _spread(grouped.totals(d), grouped, _seed_part(d, pooled, alike))
    mean, half, half90 = spread.mean, spread.half(ALPHA), spread.half(TOST_ALPHA)
    return Interval(mean, mean - half, mean + half, p=spread.p(), low90=mean - half90,
                    high90=mean + half90, **covered)


def ratio(numerator, denominator, clusters, pooled: SeedVariance | None = None,
          evaluated_only: bool = False) -> Interval:
    """The ratio of two mean differences in percent, by Fieller's argument.

    A value r lies in the interval where `numerator - r * denominator` isn't significantly different
    from 0 by the interval of `compare`; so what the two share, blocks included, is accounted for,
    and the interval contains 0 exactly where the numerator's does. `p` is the numerator's.

    Args: as `compare`; numerator and denominator are both (seeds, blocks). `pooled` is the
        numerator's; it asks for a denominator that no seed enters, as cut minus full is.

    Returns: undefined (NaN, with a reason) where the denominator's interval isn't above 0.
    """
    top, grouped = _checked(numerator, clusters)
    bottom, _ = _checked(denominator, clusters)
    if top.shape != bottom.shape:
        raise InputError(f"comparison: the numerator has shape {top.shape}, the denominator "
                         f"{bottom.shape}; score both on the same seeds and blocks")
    base = compare(bottom, clusters, evaluated_only=evaluated_only or len(bottom) == 1)
    above = compare(top, clusters, pooled, evaluated_only)
    alike = _untrained(top, evaluated_only) and _untrained(bottom, evaluated_only)
    covered = dict(n=len(top), blocks=top.shape[1], clusters=len(grouped.weights),
                   pooled=above.pooled, trained=not alike)
    if not base.low > 0:
        return Interval(math.nan, math.nan, math.nan, **covered, reason=NO_GAP)
    value = above.mean / base.mean
    if math.isnan(above.low):
        return Interval(100 * value, math.nan, math.nan, **covered)
    if above.pooled and not _untrained(bottom, len(bottom) == 1):
        raise InputError("comparison: a pooled seed variance is given, but the denominator depends "
                         "on the seed; make three seeds or leave it out")
    # the seed variance is known beforehand where it is pooled or 0; else it depends on the ratio
    seeds = _seed_part(top, pooled, alike) if alike or above.pooled else None
    top_totals, bottom_totals = grouped.totals(top), grouped.totals(bottom)

    def excess(candidate: float, alpha: float) -> float:
        """Above 0 where the interval rejects this ratio."""
        spread = _spread(top_totals - candidate * bottom_totals, grouped, seeds)
        return abs(spread.mean) - spread.half(alpha)

    low, high = _bounds(lambda r: excess(r, ALPHA), value, base.mean)
    low90, high90 = _bounds(lambda r: excess(r, TOST_ALPHA), value, base.mean)
    return Interval(100 * value, 100 * low, 100 * high, p=above.p, low90=100 * low90, high90=100 * high90,
                    **covered)


# --------------------------------------------------------------------------------------- parts

def interval(part: BySeed | Ratio, pooled: SeedVariance | None = None) -> Interval:
    """The interval of a statistic's part: over seeds and blocks where every seed has the same blocks, else over seeds
    alone (those of the released stream are each seed's own)."""
    if isinstance(part, Ratio):
        return _share(part)
    if not getattr(part, "blocks", None):
        return replace(t_interval(part.values()), margin=getattr(part, "margin", math.nan))
    if part.trained:
        found = compare(part.rows, part.clusters, pooled)
    else:  # the same rows but for rounding, as of two machines
        found = replace(compare(part.rows.mean(0, keepdims=True), part.clusters, evaluated_only=True), n=len(part))
    return replace(found, margin=part.margin)


def _share(part: Ratio) -> Interval:
    top, bottom = part.numerator, part.denominator
    seeds = [seed for seed in top if seed in bottom]
    if not seeds or not getattr(top, "blocks", None) or top.clusters is not getattr(bottom, "clusters", None):
        return fieller(part)
    rows = [np.stack([of.blocks[seed] for seed in seeds]) for of in (top, bottom)]
    if top.trained or bottom.trained:
        return ratio(*rows, top.clusters)
    alone = (of.mean(0, keepdims=True) for of in rows)
    return replace(ratio(*alone, top.clusters, evaluated_only=True), n=len(seeds))


def family(parts: Mapping[str, BySeed | Ratio]) -> dict[str, Interval]:
    """The intervals of a statistic's parts: one of fewer than three seeds is widened by the seed variance of those
    with three."""
    cells = [part.rows for part in parts.values()
             if getattr(part, "blocks", None) and part.trained and len(part) >= FEWEST]
    pooled = pool_seed_variance(cells)
    return {name: interval(part, pooled) for name, part in parts.items()}


def gap_recovery(cut, arm, full, clusters, pooled: SeedVariance | None = None) -> Interval:
    """(cut - arm) / (cut - full) in percent, from losses (seeds, blocks), nats per token.

    `pooled` is the seed variance of cut - arm.
    """
    cut = np.asarray(cut, dtype=float)
    return ratio(cut - np.asarray(arm, dtype=float), cut - np.asarray(full, dtype=float), clusters,
                 pooled)


def pool_seed_variance(cells: Iterable) -> SeedVariance | None:
    """The seed variance of a difference, pooled over its cells with three seeds or more.

    Args: cells: arrays (seeds, blocks), as `compare` takes them: the same comparison at other
        depths, ranks or budgets, on as many blocks.

    Returns: None where no cell has three seeds.
    """
    means = [np.asarray(cell, dtype=float).mean(axis=1) for cell in cells if len(cell) >= FEWEST]
    df = sum(len(rows) - 1 for rows in means)
    if not df:
        return None
    if not all(np.isfinite(rows).all() for rows in means):
        raise InputError("comparison: a cell to pool has a value that isn't finite; leave it out")
    return SeedVariance(float(sum(np.sum((rows - rows.mean()) ** 2) for rows in means)) / df, df)


def _checked(differences, clusters) -> tuple[np.ndarray, _Clusters]:
    try:
        d, labels = np.asarray(differences, dtype=float), np.asarray(clusters)
    except (TypeError, ValueError):
        raise InputError("comparison: differences aren't one array of numbers, (seeds, blocks); "
                         "give every seed the same blocks") from None
    if d.ndim != 2 or d.size == 0:
        raise InputError(f"comparison: differences have shape {d.shape}, not (seeds, blocks); give "
                         "one row of blocks for each seed")
    if labels.shape != d.shape[1:]:
        raise InputError(f"comparison: clusters have shape {labels.shape}, the differences have "
                         f"{d.shape[1]} blocks; give each block its cluster")
    if not np.isfinite(d).all():
        seed, block = np.argwhere(~np.isfinite(d))[0]
        raise InputError(f"comparison: the difference in row {seed}, block {block} is "
                         f"{d[seed, block]}; leave out the seeds that have no loss")
    grouped = _Clusters.of(labels)
    if len(grouped.weights) < 2:
        raise InputError(f"comparison: all blocks ({d.shape[1]}) are in one cluster, an interval "
                         "takes two; score more documents")
    return d, grouped


def _untrained(d: np.ndarray, evaluated_only: bool) -> bool:
    """Whether no seed enters: two rows or more that are equal, or one of which it is said."""
    equal = bool((d == d[0]).all())
    if evaluated_only and not equal:
        raise InputError("comparison: evaluated_only is given but the seeds differ; leave it out "
                         "where an arm was trained")
    return evaluated_only or (equal and len(d) > 1)


def _seed_part(d: np.ndarray, pooled: SeedVariance | None,
               untrained: bool) -> tuple[float, float] | None:
    """The seed variance of the mean and its df where it isn't just that of three seeds or more."""
    if untrained:
        return 0.0, 1
    if pooled is None or len(d) >= FEWEST:
        return None
    own_df = len(d) - 1
    own = float(d.mean(axis=1).var(ddof=1)) if own_df else 0.0
    df = pooled.df + own_df
    return (pooled.df * pooled.variance + own_df * own) / df / len(d), df


def _bounds(excess: Callable[[float], float], value: float, denominator: float) -> tuple:
    """Where `excess` turns positive on either side of the value; it does, far enough out."""
    half = -excess(value) / denominator
    if half <= 0:
        return value, value
    ends = []
    for step in (-half, half):
        while excess(value + step) <= 0:
            step *= 2
        ends.append(float(brentq(excess, value, value + step, xtol=1e-12 * abs(step))))
    return tuple(ends)


# ---------------------------------------------------------------------------------------- words

def margin(gap: float | None) -> float:
    """The margin of equivalence, nats per token: the smaller of 0.01 and 1 % of the gap.

    `gap` is cut - full for the same target. Where it is undefined (None, NaN or not above 0)
    the margin is 0.01. This was fixed before the runs.
    """
    return min(MARGIN, MARGIN_SHARE * gap) if gap and gap > 0 else MARGIN


def verdict(found: Interval, p: float | None = None) -> str:
    """What a difference of losses, first minus second, says of the first arm; lower is better.

    - `better`, `worse`: the 95 % interval excludes 0;
    - `better within the margin`, `worse within the margin`: so it does, but the 90 % interval lies
      inside +-margin: a real difference that is too small to matter;
    - `equivalent`: the 95 % interval includes 0 and the 90 % interval lies inside +-margin (TOST at
      5 %);
    - `undecided`: neither;
    - `not judged`: fewer than three seeds were trained.

    `p` is an adjusted p-value; below 0.05 it counts as an interval excluding 0.
    """
    if not found.judged:
        return NOT_JUDGED
    if not (found.side if p is None else p < ALPHA):
        return EQUIVALENT if found.small else UNDECIDED
    return (BETTER if found.mean < 0 else WORSE) + (WITHIN if found.small else "")


def verdicts(parts: Mapping[str, Interval]) -> dict[str, str]:
    """The verdict on each part of a claim, differences corrected over the parts by Holm (1979).

    Parts that aren't judged count for nothing. Equivalence isn't corrected.
    """
    adjusted = holm({name: part.p for name, part in parts.items() if part.judged})
    return {name: verdict(part, adjusted.get(name)) for name, part in parts.items()}


def settled(ladder: Mapping[int, Interval]) -> bool:
    """Whether a difference would outlast a larger budget, as far as {tokens: comparison} can say.

    The intervals at the last two budgets exclude 0 on the same side, and the last difference is
    more than half the one before. At least one of the two rests on three seeds.
    """
    if len(ladder) < 2:
        return False
    before, last = (ladder[tokens] for tokens in sorted(ladder)[-2:])
    if not before.judged and not last.judged:
        return False
    return before.side == last.side != 0 and abs(last.mean) > abs(before.mean) / 2


def budget_words(ladder: Mapping[int, Interval]) -> str:
    """`settled`, or `up to N tokens` with the largest budget that was run."""
    if not ladder:
        raise InputError("comparison: a budget ladder has no comparison; run one budget at least")
    return "settled" if settled(ladder) else f"up to {max(ladder):,} tokens"
