"""Intervals over seeds and over blocks, of means and of ratios; p-values of a family. Never imports torch."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr, stdtrit

LEVEL = 0.95

BySeed = dict[int, float]


@dataclass(frozen=True)
class Interval:
    """A mean over n seeds and its 95 % interval; NaN bounds where n < 2: one seed has none.

    `p` is the two-sided p-value of a mean of 0. A ratio whose denominator can't be told from 0 is NaN throughout.
    """

    mean: float
    low: float
    high: float
    n: int
    p: float = math.nan

    def __str__(self) -> str:
        if self.n == 0:
            return "no runs"
        if math.isnan(self.mean):
            return f"undefined: the gap isn't told to be above 0 (n = {self.n})"
        if self.n == 1:
            return f"{self.mean:.4g} (n = 1, no interval)"
        if self.high - self.low < 1e-9:  # of an evaluation that no seed enters, an interval would feign certainty
            return f"{self.mean:.4g} (the same in all {self.n} seeds)"
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}] (n = {self.n})"

    def told(self, above: str, below: str, open_: str) -> str:
        """The phrase that the interval allows: it lies above 0, below 0, or leaves that open; one seed allows none."""
        if self.n == 0:
            return "has no finished run"
        if self.n == 1:
            return "can't be judged from one seed"
        if self.low > 0:
            return above
        return below if self.high < 0 else open_


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
    half = _t(n) * error
    p = 2 * float(stdtr(n - 1, -abs(mean) / error)) if error > 0 else float(mean == 0)
    return Interval(mean, mean - half, mean + half, n, p)


def _t(n: int) -> float:
    """The quantile of Student's t that makes a 95 % interval from n seeds."""
    return float(stdtrit(n - 1, 0.5 + LEVEL / 2))


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
        return Interval(math.nan, math.nan, math.nan, n)
    if n == 1:
        return Interval(100 * x[0] / y[0], math.nan, math.nan, 1)
    (xx, xy), (_, yy) = np.cov(x, y) / n  # of the means
    t, top, bottom = _t(n), x.mean(), y.mean()
    a, b, c = bottom**2 - t**2 * yy, top * bottom - t**2 * xy, top**2 - t**2 * xx
    if a <= 0:  # the denominator's interval touches 0
        return Interval(math.nan, math.nan, math.nan, n)
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


def interval(part: BySeed | Ratio) -> Interval:
    """The interval of a statistic's part."""
    return fieller(part) if isinstance(part, Ratio) else t_interval(part.values())


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
