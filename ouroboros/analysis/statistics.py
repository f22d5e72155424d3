"""Intervals of what is measured at each seed, over seeds and evaluation documents, and the words that they allow.

docs/statistics.md has the method, its measured coverage, the alternatives that were tried and the sources. No torch,
no pandas.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.special import stdtr, stdtrit

from ..errors import InputError

LEVEL = 0.95
ALPHA, TOST_ALPHA = 0.05, 0.10  # of the 95 % interval; of the 90 % one: two one-sided tests at 5 %
FEWEST = 3  # trained seeds that carry a verdict: the spread of two is a single difference
SMALLEST_P = 1e-12  # a smaller p-value is given as this one
CUT_SHARE = 0.10  # of the squared document length, see `document_clusters`
MARGIN, MARGIN_SHARE = 0.01, 0.01  # nats per token; share of the gap
NO_GAP = "the gap isn't told to be above 0"

BETTER, WORSE = "better", "worse"
WITHIN = " within the margin"
EQUIVALENT, UNDECIDED, NOT_JUDGED = "equivalent", "undecided", "not judged"


# --------------------------------------------------------------------------------------------- what is measured

class BySeed(dict[int, float]):
    """{seed: a mean over evaluation blocks, nats per token, or another number}.

    Where the blocks are the same at every seed, `blocks` has their values, {seed: (blocks,)}, and `clusters` (blocks,)
    the documents they belong to. `trained`: whether a seed enters at all. `margin`: below it a difference is too small
    to matter, nats per token. `of`: what was measured, as `controller - cut`, wherever (depth, rank, text).
    """

    def __init__(self, values=(), blocks: Mapping[int, np.ndarray] | None = None, clusters: np.ndarray | None = None,
                 trained: bool = True, margin: float = math.nan, of: str = ""):
        super().__init__(values)
        self.blocks, self.clusters, self.trained, self.margin, self.of = blocks, clusters, trained, margin, of

    def rows(self, seeds: Iterable[int]) -> np.ndarray:
        """(seeds, blocks)."""
        return np.stack([self.blocks[seed] for seed in seeds])


def minus(a: BySeed, b: BySeed) -> BySeed:
    """a - b in each seed that both have, and in each block where these are the same."""
    seeds = [seed for seed in a if seed in b]
    blocks = clusters = None
    if a.blocks and a.clusters is b.clusters:
        blocks, clusters = {seed: a.blocks[seed] - b.blocks[seed] for seed in seeds}, a.clusters
    margin = min((part.margin for part in (a, b) if not math.isnan(part.margin)), default=math.nan)
    return BySeed({seed: a[seed] - b[seed] for seed in seeds}, blocks, clusters, a.trained or b.trained, margin,
                  f"{a.of} - {b.of}")


@dataclass(frozen=True)
class Ratio:
    """A ratio of two means over seeds, in percent."""

    numerator: BySeed
    denominator: BySeed
    defined: bool = True  # False: the denominator is indistinguishable from 0


@dataclass(frozen=True)
class Interval:
    """A mean, or a ratio in percent, over n seeds with its 95 and 90 % intervals.

    `p` is the two-sided p-value of a mean of 0. Without an interval (one seed) bounds and p are NaN; an undefined ratio
    is NaN throughout, and `reason` says why.
    """

    mean: float
    low: float
    high: float
    n: int
    p: float = math.nan
    low90: float = math.nan
    high90: float = math.nan
    blocks: int = 0  # that it covers; 0: over seeds alone
    clusters: int = 0
    pooled: bool = False  # one or two seeds, widened by the seed variance of other cells
    trained: bool = True  # False: no seed enters, blocks alone decide
    margin: float = math.nan  # of the difference, see `BySeed`
    reason: str = ""

    def __str__(self) -> str:
        if self.n == 0:
            return "no runs"
        if math.isnan(self.mean):
            return f"undefined: {self.reason or 'no number'} (n = {self.n})"
        if math.isnan(self.low):
            return f"{self.mean:.4g} (n = {self.n}, no interval)"
        if self.high - self.low < 1e-9:  # of an evaluation that no seed enters, an interval would feign certainty
            return f"{self.mean:.4g} (the same in all {self.n} seeds)"
        half = max(self.high - self.mean, self.mean - self.low)
        rounded = float(f"{half:.1e}")  # 0.0996 is rounded to 0.10 before its digits are counted
        digits = max(0, 1 - math.floor(math.log10(rounded)))  # two of the half-width
        mean, low, high = (f"{x:z.{digits}f}" for x in (self.mean, self.low, self.high))
        how = f"n = {self.n}" + (", seed variance pooled" if self.pooled else "")
        return f"{mean} [{low}, {high}] ({how if self.trained else 'not trained'})"

    @property
    def judged(self) -> bool:
        """Whether it carries a verdict."""
        return self.n >= FEWEST or not self.trained

    @property
    def side(self) -> int:
        """1: the 95 % interval lies above 0; -1: below; 0: it contains 0, or there is none."""
        return 1 if self.low > 0 else -1 if self.high < 0 else 0

    @property
    def small(self) -> bool:
        """Whether the 90 % interval lies within the margin: two one-sided tests at 5 % (TOST)."""
        return -self.margin < self.low90 and self.high90 < self.margin


NOTHING = Interval(math.nan, math.nan, math.nan, 0)


def scaled(found: Interval, factor: float) -> Interval:
    """It in another unit; `factor` is above 0."""
    bounds = ("mean", "low", "high", "low90", "high90", "margin")
    return replace(found, **{name: factor * getattr(found, name) for name in bounds})


# --------------------------------------------------------------------------------------------- seeds alone

def t_interval(values) -> Interval:
    """Student t over seeds; of differences within a seed, the paired one. A percentile bootstrap over 3 to 5 seeds
    would cover 74 to 82 %."""
    values = np.asarray(list(values), dtype=float)
    values = values[np.isfinite(values)]
    n = len(values)
    if n == 0:
        return NOTHING
    mean = float(values.mean())
    if n == 1:
        return Interval(mean, math.nan, math.nan, 1)
    error = float(values.std(ddof=1)) / math.sqrt(n)
    half, half90 = (stdtrit(n - 1, 1 - alpha / 2) * error for alpha in (ALPHA, TOST_ALPHA))
    p = 2 * float(stdtr(n - 1, -abs(mean) / error)) if error > 0 else float(mean == 0)
    return Interval(mean, mean - half, mean + half, n, p, mean - half90, mean + half90)


def fieller(ratio: Ratio) -> Interval:
    """Fieller's (1954) interval of a ratio of paired means, in percent.

    A mean of each seed's own ratio would be biased, and its interval too short, where the denominator varies. Undefined
    (NaN) where the denominator isn't told to be above 0: then the ratio's is no interval. No p: judge the numerator.
    """
    seeds = [seed for seed in ratio.numerator if seed in ratio.denominator]
    x = np.array([ratio.numerator[seed] for seed in seeds], dtype=float)
    y = np.array([ratio.denominator[seed] for seed in seeds], dtype=float)
    n = len(seeds)
    if n == 0:
        return NOTHING
    if not ratio.defined or y.mean() <= 0:
        return Interval(math.nan, math.nan, math.nan, n, reason=NO_GAP)
    if n == 1:
        return Interval(100 * x[0] / y[0], math.nan, math.nan, 1)
    (xx, xy), (_, yy) = np.cov(x, y) / n  # of the means
    t, top, bottom = stdtrit(n - 1, 1 - ALPHA / 2), x.mean(), y.mean()
    a, b, c = bottom**2 - t**2 * yy, top * bottom - t**2 * xy, top**2 - t**2 * xx
    if a <= 0:  # the denominator's interval touches 0
        return Interval(math.nan, math.nan, math.nan, n, reason=NO_GAP)
    root = math.sqrt(max(b**2 - a * c, 0.0))
    return Interval(100 * top / bottom, 100 * (b - root) / a, 100 * (b + root) / a, n)


# --------------------------------------------------------------------------------------------- documents

def document_clusters(lengths, block: int, count: int, separator: int = 1, share: float = CUT_SHARE) -> np.ndarray:
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
    held = int(lengths.sum())
    if held < total:
        raise InputError(f"documents: their lengths hold {held} tokens, {count} blocks have {total}; give the lengths "
                         "of all documents that were packed")
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
        scale = 1 / (1 - 2 * w + np.sum(w**2))
        g = scale * w**2
        # the variance estimate as a quadratic form in the cluster means, with matrix `form`
        form = np.diag(g) - np.outer(g, w) - np.outer(w, g) + g.sum() * np.outer(w, w)
        df = np.trace(form) ** 2 / np.sum(form**2)
        return cls(index, w, scale, float(df))

    def totals(self, differences: np.ndarray) -> np.ndarray:
        """(seeds, C): each cluster's part of a seed's mean over blocks."""
        sums = [np.bincount(self.index, row, len(self.weights)) for row in differences]
        return np.stack(sums) / len(self.index)


# --------------------------------------------------------------------------------------------- seeds and documents

class SeedVariance(NamedTuple):
    """The variance over seeds of a difference's mean over blocks, (nats per token)^2, pooled."""

    variance: float
    df: int


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
    """The spread of a mean: V_seed, and V_block - V_both where that is above 0; `seeds` gives V_seed and its degrees of
    freedom where these are known."""
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


def block_interval(differences, clusters, pooled: SeedVariance | None = None,
                   evaluated_only: bool = False) -> Interval:
    """The mean difference of two arms, with an interval that covers seeds and blocks.

    With three seeds or more, `pooled` isn't used. With one or two it gives the seed variance (two
    seeds add their own), and the interval is marked. Without it, two seeds have a wide interval of
    their own and one seed has none.

    Args:
        differences: (seeds, blocks) first arm minus second, nats per token, of the same blocks at every seed.
        clusters: (blocks,) the cluster of each block.
        pooled: from `pool_seed_variance`.
        evaluated_only: no seed enters: neither arm was trained.
    """
    d, grouped = np.asarray(differences, dtype=float), _Clusters.of(clusters)
    uses_pooled = pooled is not None and len(d) < FEWEST and not evaluated_only
    covered = dict(n=len(d), blocks=d.shape[1], clusters=len(grouped.weights), pooled=uses_pooled,
                   trained=not evaluated_only)
    if len(d) == 1 and not evaluated_only and not uses_pooled:
        return Interval(float(d.mean()), math.nan, math.nan, **covered)
    spread = _spread(grouped.totals(d), grouped, _seed_part(d, pooled, evaluated_only))
    mean, half, half90 = spread.mean, spread.half(ALPHA), spread.half(TOST_ALPHA)
    return Interval(mean, mean - half, mean + half, p=spread.p(), low90=mean - half90,
                    high90=mean + half90, **covered)


def block_ratio(numerator, denominator, clusters, evaluated_only: bool = False) -> Interval:
    """The ratio of two mean differences in percent, by Fieller's argument.

    A value r lies in the interval where `numerator - r * denominator` isn't significantly different
    from 0 by `block_interval`; so what the two share, blocks included, is accounted for,
    and the interval contains 0 exactly where the numerator's does. `p` is the numerator's.

    Args: as `block_interval`; numerator and denominator are both (seeds, blocks).

    Returns: undefined (NaN, with a reason) where the denominator's interval isn't above 0.
    """
    top, bottom = (np.asarray(part, dtype=float) for part in (numerator, denominator))
    grouped = _Clusters.of(clusters)
    base = block_interval(bottom, clusters, evaluated_only=evaluated_only or len(bottom) == 1)
    above = block_interval(top, clusters, evaluated_only=evaluated_only)
    covered = dict(n=len(top), blocks=top.shape[1], clusters=len(grouped.weights), trained=not evaluated_only)
    if not base.low > 0:
        return Interval(math.nan, math.nan, math.nan, **covered, reason=NO_GAP)
    value = above.mean / base.mean
    if math.isnan(above.low):
        return Interval(100 * value, math.nan, math.nan, **covered)
    seeds = (0.0, 1) if evaluated_only else None  # else the seed variance depends on the ratio
    top_totals, bottom_totals = grouped.totals(top), grouped.totals(bottom)

    def excess(candidate: float, alpha: float) -> float:
        """Above 0 where the interval rejects this ratio."""
        spread = _spread(top_totals - candidate * bottom_totals, grouped, seeds)
        return abs(spread.mean) - spread.half(alpha)

    low, high = _bounds(lambda r: excess(r, ALPHA), value, base.mean)
    low90, high90 = _bounds(lambda r: excess(r, TOST_ALPHA), value, base.mean)
    return Interval(100 * value, 100 * low, 100 * high, p=above.p, low90=100 * low90, high90=100 * high90,
                    **covered)


def pool_seed_variance(cells: Iterable) -> SeedVariance | None:
    """The seed variance of a difference, pooled over its cells with three seeds or more.

    Args: cells: arrays (seeds, blocks), as `block_interval` takes them: the same comparison at other
        depths, ranks or budgets, on as many blocks.

    Returns: None where no cell has three seeds.
    """
    means = [np.mean(cell, axis=1) for cell in cells if len(cell) >= FEWEST]
    df = sum(len(rows) - 1 for rows in means)
    if not df:
        return None
    return SeedVariance(float(sum(np.sum((rows - rows.mean()) ** 2) for rows in means)) / df, df)


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


# --------------------------------------------------------------------------------------------- of what was measured

def interval(part: BySeed | Ratio, pooled: SeedVariance | None = None) -> Interval:
    """The interval of what was measured: over seeds and blocks where every seed has the same blocks, else over seeds
    alone (those of the released stream are each seed's own)."""
    if isinstance(part, Ratio):
        return _ratio_interval(part)
    if not part.blocks:
        return replace(t_interval(part.values()), margin=part.margin)
    rows = part.rows(part)
    if part.trained:
        return replace(block_interval(rows, part.clusters, pooled), margin=part.margin)
    alone = rows.mean(0, keepdims=True)  # the same rows but for rounding, as of two machines
    return replace(block_interval(alone, part.clusters, evaluated_only=True), n=len(part), margin=part.margin)


def _ratio_interval(part: Ratio) -> Interval:
    top, bottom = part.numerator, part.denominator
    seeds = [seed for seed in top if seed in bottom]
    if not seeds or not top.blocks or top.clusters is not bottom.clusters:
        return fieller(part)
    rows = [of.rows(seeds) for of in (top, bottom)]
    if top.trained or bottom.trained:
        return block_ratio(*rows, top.clusters)
    alone = (of.mean(0, keepdims=True) for of in rows)
    return replace(block_ratio(*alone, top.clusters, evaluated_only=True), n=len(seeds))


def family(parts: Mapping[str, BySeed | Ratio]) -> dict[str, Interval]:
    """The intervals of parts that are judged together: one of fewer than three seeds is widened by the seed variance of
    the same comparison at other places with three."""
    cells: dict[str, list[np.ndarray]] = {}
    for part in parts.values():
        if isinstance(part, BySeed) and part.blocks and part.trained:
            cells.setdefault(part.of, []).append(part.rows(part))
    pooled = {of: pool_seed_variance(rows) for of, rows in cells.items()}
    return {name: interval(part, pooled.get(getattr(part, "of", None))) for name, part in parts.items()}


def above_zero(larger: np.ndarray, smaller: np.ndarray, paired: bool) -> bool:
    """Whether the mean of some blocks lies above that of others, by Student's (paired) or Welch's 95 % interval."""
    from scipy import stats  # here, since it takes a second and few notebooks need it

    with warnings.catch_warnings():  # blocks that all differ alike have no variance
        warnings.simplefilter("ignore", RuntimeWarning)
        test = stats.ttest_rel(larger, smaller) if paired else stats.ttest_ind(larger, smaller, equal_var=False)
        low = test.confidence_interval(LEVEL).low
    return bool(low > 0 if math.isfinite(low) else np.mean(larger) > np.mean(smaller))


def holm(p: Mapping[str | int, float]) -> dict[str | int, float]:
    """Holm's (1979) adjusted p-values of a family; NaN where there was none, which counts for nothing."""
    known = sorted((value, name) for name, value in p.items() if not math.isnan(value))
    adjusted, largest = dict.fromkeys(p, math.nan), 0.0
    for place, (value, name) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - place) * value))
        adjusted[name] = largest
    return adjusted


# --------------------------------------------------------------------------------------------- words

def margin(gap: float | None) -> float:
    """The margin of equivalence, nats per token: the smaller of 0.01 and 1 % of the gap.

    `gap` is cut - full for the same target. Where it is undefined (None, NaN or not above 0)
    the margin is 0.01. This was fixed before the runs.
    """
    return min(MARGIN, MARGIN_SHARE * gap) if gap and gap > 0 else MARGIN


def verdict(found: Interval, p: float | None = None) -> str:
    """What a difference of losses, first minus second, says of the first arm; lower is better (docs/statistics.md has
    the words).

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
    """`settled`; between which budgets the sign changes; or `not settled up to N tokens`, the largest one. What rests
    on fewer than three seeds is named."""
    def few(*budgets: int) -> str:
        return "".join(f"; n = {ladder[tokens].n} at {tokens:,}" for tokens in budgets if not ladder[tokens].judged)

    if settled(ladder):
        return "settled" + few(*sorted(ladder)[-2:])
    told = [tokens for tokens in sorted(ladder) if ladder[tokens].side]
    turns = [pair for pair in pairwise(told) if ladder[pair[0]].side != ladder[pair[1]].side]
    if turns:
        before, after = turns[-1]
        return f"changes sign between {before:,} and {after:,} tokens" + few(before, after)
    return f"not settled up to {max(ladder):,} tokens"
