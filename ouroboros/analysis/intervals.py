"""What is measured at each seed, and intervals over seeds alone, of means and of ratios; p-values of a family.

Intervals that cover evaluation blocks too are `comparison`'s. Never imports torch.
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr, stdtrit

LEVEL = 0.95
FEWEST = 3  # trained seeds that carry a verdict: the spread of two is a single difference


class BySeed(dict[int, float]):
    """{seed: a mean over evaluation blocks, nats per token, or another number}.

    Where the blocks are the same at every seed, `blocks` has their values, {seed: (blocks,)}, and `clusters` (blocks,)
    the documents they belong to. `trained`: whether a seed enters at all. `margin`: below it a difference is too small
    to matter, nats per token.
    """

    def __init__(self, values=(), blocks: Mapping[int, np.ndarray] | None = None, clusters: np.ndarray | None = None,
                 trained: bool = True, margin: float = math.nan):
        super().__init__(values)
        self.blocks, self.clusters, self.trained, self.margin = blocks, clusters, trained, margin

    @property
    def rows(self) -> np.ndarray:
        """(seeds, blocks)."""
        return np.stack([self.blocks[seed] for seed in self])

    def negative(self) -> "BySeed":
        return minus(BySeed(dict.fromkeys(self, 0.0), self.blocks and {s: 0 * b for s, b in self.blocks.items()},
                            self.clusters, False, self.margin), self)


def minus(a: BySeed, b: BySeed) -> BySeed:
    """a - b in each seed that both have, and in each block where these are the same."""
    seeds = [seed for seed in a if seed in b]
    blocks = clusters = None
    if getattr(a, "blocks", None) and a.clusters is getattr(b, "clusters", None):
        blocks, clusters = {seed: a.blocks[seed] - b.blocks[seed] for seed in seeds}, a.clusters
    trained = getattr(a, "trained", True) or getattr(b, "trained", True)
    margins = (part.margin for part in (a, b) if not math.isnan(getattr(part, "margin", math.nan)))
    margin = min(margins, default=math.nan)
    return BySeed({seed: a[seed] - b[seed] for seed in seeds}, blocks, clusters, trained, margin)


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
        return self.n >= FEWEST or (self.n > 0 and not self.trained)

    @property
    def side(self) -> int:
        """1: the 95 % interval lies above 0; -1: below; 0: it contains 0, or there is none."""
        return 1 if self.low > 0 else -1 if self.high < 0 else 0

    @property
    def small(self) -> bool:
        """Whether the 90 % interval lies within the margin: two one-sided tests at 5 % (TOST)."""
        return -self.margin < self.low90 and self.high90 < self.margin

    def told(self, above: str, below: str, open_: str) -> str:
        """The phrase that the interval allows: it lies above 0, below 0, or leaves that open, and whether all of it is
        too small to matter; fewer than three trained seeds allow none."""
        if self.n == 0:
            return "has no finished run"
        if not self.judged:
            return f"can't be judged from {'one seed' if self.n == 1 else 'two seeds'}"
        if not self.side:
            return f"{open_}: equivalent" if self.small else open_
        return (above if self.side > 0 else below) + (", within the margin" if self.small else "")


NOTHING = Interval(math.nan, math.nan, math.nan, 0)


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
    half, half90 = _t(n) * error, _t(n, 0.90) * error
    p = 2 * float(stdtr(n - 1, -abs(mean) / error)) if error > 0 else float(mean == 0)
    return Interval(mean, mean - half, mean + half, n, p, mean - half90, mean + half90)


def _t(n: int, level: float = LEVEL) -> float:
    """The quantile of Student's t that makes an interval from n seeds."""
    return float(stdtrit(n - 1, 0.5 + level / 2))


NO_GAP = "the gap isn't told to be above 0"


@dataclass(frozen=True)
class Ratio:
    """A ratio of two means over seeds, in percent: a part of a statistic, as a BySeed is."""

    numerator: BySeed
    denominator: BySeed
    told: bool = True  # whether the denominator can be told from 0 at all


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
    if not ratio.told or y.mean() <= 0:
        return Interval(math.nan, math.nan, math.nan, n, reason=NO_GAP)
    if n == 1:
        return Interval(100 * x[0] / y[0], math.nan, math.nan, 1)
    (xx, xy), (_, yy) = np.cov(x, y) / n  # of the means
    t, top, bottom = _t(n), x.mean(), y.mean()
    a, b, c = bottom**2 - t**2 * yy, top * bottom - t**2 * xy, top**2 - t**2 * xx
    if a <= 0:  # the denominator's interval touches 0
        return Interval(math.nan, math.nan, math.nan, n, reason=NO_GAP)
    root = math.sqrt(max(b**2 - a * c, 0.0))
    return Interval(100 * top / bottom, 100 * (b - root) / a, 100 * (b + root) / a, n)


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
    told = sorted((value, name) for name, value in p.items() if not math.isnan(value))
    adjusted, largest = dict.fromkeys(p, math.nan), 0.0
    for place, (value, name) in enumerate(told):
        largest = max(largest, min(1.0, (len(told) - place) * value))
        adjusted[name] = largest
    return adjusted


def block_bootstrap(sums, sizes, generator: np.random.Generator, draws: int = 2000) -> Interval:
    """The mean per token of a quantity summed by document (or by block), interval by resampling these whole.

    Tokens of one document aren't independent; `n` is the number of documents.
    """
    sums, sizes = np.asarray(sums, dtype=float), np.asarray(sizes, dtype=float)
    picked = generator.integers(0, len(sums), (draws, len(sums)))
    means = sums[picked].sum(1) / sizes[picked].sum(1)  # (draws,)
    low, high = np.quantile(means, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    return Interval(float(sums.sum() / sizes.sum()), float(low), float(high), len(sums))
