"""Intervals over seeds and blocks: answers worked out by hand, properties, simulated coverage."""

import math
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from simulate_coverage import SHARES, coverage, draw, separate

from ouroboros.analysis import statistics
from ouroboros.analysis.statistics import (
    BySeed,
    Interval,
    Ratio,
    SeedVariance,
    above_zero,
    block_interval,
    block_ratio,
    budget_words,
    document_clusters,
    family,
    interval,
    margin,
    pool_seed_variance,
    scaled,
    settled,
    verdict,
    verdicts,
)
from ouroboros.errors import InputError
from ouroboros.training.corpus import Corpus

T2, T3 = 4.302653, 3.182446  # Student's t at 97.5 %, 2 and 3 degrees of freedom
NUMBERS = ["mean", "low", "high", "low90", "high90", "p"]


def result(low, high, low90=None, high90=None, p=0.5, **changes) -> Interval:
    """A comparison with these bounds, three seeds unless said otherwise."""
    value = (low + high) / 2
    low90 = value - 0.8 * (value - low) if low90 is None else low90
    high90 = value + 0.8 * (high - value) if high90 is None else high90
    return Interval(value, low, high, p=p, low90=low90, high90=high90, **{
        "n": 3, "blocks": 64, "clusters": 20, "margin": 0.01, **changes})


def numbers(found: Interval, scale: float = 1.0) -> list[float]:
    return [scale * getattr(found, name) for name in NUMBERS[:-1]] + [found.p]


def some(seeds: int, blocks: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Differences with seed, block and interaction effects, and clusters of one to four blocks."""
    generator = np.random.default_rng(seed)
    d = draw(separate(blocks), (1, 1, 1), seeds, generator) + 2
    clusters = np.sort(generator.integers(0, (blocks + 2) // 2, blocks))
    clusters[-1] += 1  # two at least
    return d, clusters


# -------------------------------------------------------------------------------- by hand

def test_seeds_and_blocks_add():
    # seed effects -1, 0, 1 and block effects -3, -1, 1, 3 around 10, no interaction
    # V_seed = var(9, 10, 11) / 3 = 1/3; V_block = var(7, 9, 11, 13) / 4 = (20/3) / 4 = 5/3
    found = block_interval(10 + np.add.outer([-1, 0, 1], [-3, -1, 1, 3]), [0, 1, 2, 3])
    half = math.sqrt(T2**2 / 3 + T3**2 * 5 / 3)
    assert found.mean == pytest.approx(10)
    assert [found.low, found.high] == pytest.approx([10 - half, 10 + half], rel=1e-6)
    half90 = math.sqrt(2.919986**2 / 3 + 2.353363**2 * 5 / 3)  # t at 95 %
    assert [found.low90, found.high90] == pytest.approx([10 - half90, 10 + half90], rel=1e-6)
    assert (found.n, found.blocks, found.clusters) == (3, 4, 4)


def test_the_interaction_counts_once():
    # seed effects -1, 0, 1; block effects -2, 2; interaction (1 -1 / -1 1 / 0 0)
    # V_seed = 1/3, V_block = var(-2, 2) / 2 = 4,
    # V_both = (sum of squares 4) / ((3 - 1)(2 - 1)) / (3 * 2) = 1/3
    d = np.add.outer([-1, 0, 1], [-2, 2]) + np.array([[1, -1], [-1, 1], [0, 0]])
    half = math.sqrt(T2**2 / 3 + 12.706205**2 * (4 - 1 / 3))
    assert block_interval(d, ["a", "b"]).high == pytest.approx(half, rel=1e-6)


def test_a_block_variance_below_its_interaction_is_none():
    # block means are equal, so V_block = 0 < V_both: what remains is the interval over seeds
    d = np.array([[1, -1], [-1, 1], [3, 3]])
    # seed means 0, 0, 3: variance 3, of the mean of three 1
    assert block_interval(d, [0, 1]).high == pytest.approx(1 + T2, rel=1e-6)


def test_clusters_of_unequal_size():
    # clusters of 1, 1, 2 blocks with means 0, 4, 2: w = 1/4, 1/4, 1/2; sum w^2 = 3/8
    # residuals w (mean_c - 2) = -1/2, 1/2, 0; scale 1 / (1 - 1/2 + 3/8) = 8/7 for the first two
    # V_block = 2 (1/4)(8/7) = 4/7; the form's trace is 3/8, its squared norm 0.0972578:
    # df = 0.140625 / 0.0972578 = 1.445899
    found = block_interval([[0, 4, 1, 3]], [0, 1, 2, 2], evaluated_only=True)
    half = stats.t.ppf(0.975, 1.445899) * math.sqrt(4 / 7)
    assert [found.mean, found.high] == pytest.approx([2, 2 + half], rel=1e-5)


def test_blocks_alone_are_student_t_over_blocks():
    values = some(1, 12)[0]
    test = stats.ttest_1samp(values[0], 0)
    low, high = test.confidence_interval(0.95)
    for rows in (values, np.repeat(values, 4, axis=0)):  # once, or over four equal ones
        found = block_interval(rows, np.arange(12), evaluated_only=True)
        assert [found.low, found.high, found.p] == pytest.approx([low, high, test.pvalue], rel=1e-6)
        assert not found.trained and not found.pooled and found.n == len(rows)


def test_seeds_alone_are_student_t_over_seeds():
    seeds = np.array([0.3, 0.5, 0.1, 0.9])
    test = stats.ttest_1samp(seeds, 0)
    low, high = test.confidence_interval(0.95)
    found = block_interval(np.repeat(seeds[:, None], 6, axis=1), [0, 0, 1, 1, 2, 2])
    assert [found.low, found.high, found.p] == pytest.approx([low, high, test.pvalue], rel=1e-6)


# ------------------------------------------------------------------------------ properties

@given(st.integers(2, 5), st.integers(6, 20), st.integers(0, 10**6))
@settings(max_examples=60)
def test_bounds_are_in_order_and_agree_with_p(seeds, blocks, seed):
    d, clusters = some(seeds, blocks, seed)
    found = block_interval(d, clusters)
    assert found.low < found.low90 < found.mean < found.high90 < found.high
    assert (found.p < 0.05) == (found.low > 0 or found.high < 0)
    assert (found.p < 0.10) == (found.low90 > 0 or found.high90 < 0)
    alone = stats.ttest_1samp(d.mean(axis=1), 0).confidence_interval(0.95)
    assert found.high >= alone.high - 1e-9  # never narrower than over seeds alone


@given(st.integers(3, 5), st.integers(0, 10**6))
@settings(max_examples=30)
def test_order_and_scale_dont_matter(seeds, seed):
    generator = np.random.default_rng(seed)
    d, clusters = some(seeds, 16, seed)
    found = block_interval(d, clusters)
    for other in (block_interval(d[generator.permutation(seeds)], clusters),
                  block_interval(d, 100 - 3 * clusters)):
        assert numbers(other) == pytest.approx(numbers(found), rel=1e-7, abs=1e-9)
    within = np.lexsort((generator.random(16), clusters))  # blocks change places in their cluster
    anywhere = generator.permutation(16)  # clusters move along
    for order in (within, anywhere):
        other = block_interval(d[:, order], clusters[order])
        assert numbers(other) == pytest.approx(numbers(found), rel=1e-7, abs=1e-9)
    assert numbers(block_interval(7 * d, clusters)) == pytest.approx(numbers(found, 7), rel=1e-7, abs=1e-9)
    turned = block_interval(-d, clusters)
    assert [turned.low, turned.high, turned.p] == pytest.approx([-found.high, -found.low, found.p])


def test_blocks_of_other_clusters_cannot_be_exchanged():
    d, clusters = some(3, 16)
    assert block_interval(d[:, ::-1], clusters).high != pytest.approx(block_interval(d, clusters).high, rel=1e-3)


def test_copying_every_block_adds_nothing():
    # the copies share their block's cluster: no new text, no narrower interval
    d, _ = some(3, 12)
    once, twice = block_interval(d, np.arange(12)), block_interval(np.repeat(d, 2, axis=1), np.arange(24) // 2)
    assert numbers(twice) == pytest.approx(numbers(once))


@pytest.mark.parametrize("what", ["seeds 10x", "blocks alone", "seeds = blocks",
                                  "interaction alone", "all equal"])
def test_coverage(what):
    # 600 simulations have a standard error of 0.9 points; docs/statistics.md has the whole table
    generator = np.random.default_rng(list(SHARES).index(what))
    for name, seeds in (("64 packed, heavy", 3), ("18 uneven", 5)):
        ninety_five, ninety, _ = coverage(name, SHARES[what], seeds, 600, generator)
        assert 92 <= ninety_five <= 99.3 and 87 <= ninety <= 97


def test_seeds_alone_would_not_cover_the_blocks():
    # so the simulation can fail
    generator = np.random.default_rng(0)
    assert coverage("64 packed", SHARES["blocks 10x"], 3, 300, generator)[2] < 60


# ------------------------------------------------------------------------- degenerate cases

def test_equal_values_have_no_width():
    same = block_interval(np.full((3, 4), -0.25), [0, 0, 1, 1])
    assert (same.mean, same.low, same.high) == (-0.25, -0.25, -0.25)
    assert same.p == statistics.SMALLEST_P and verdict(same) == "better"
    nothing = block_interval(np.zeros((3, 4)), [0, 0, 1, 1])
    assert nothing.p == 1 and verdict(replace(nothing, margin=0.01)) == "equivalent"
    assert str(same) == "-0.25 (the same in all 3 seeds)"


GOOD = [[1.0, 2.0, 3.0], [2.0, 3.0, 5.0], [0.0, 1.0, 1.0]]


def test_a_comparison_cannot_be_changed():
    found = block_interval(GOOD, [0, 1, 2])
    with pytest.raises(FrozenInstanceError):
        found.mean = 0.0


# ---------------------------------------------------------------------- one and two seeds

def test_one_seed_without_a_pooled_variance_has_no_interval():
    found = block_interval(GOOD[:1], [0, 1, 2])
    assert found.mean == 2 and all(math.isnan(getattr(found, name)) for name in NUMBERS[1:])
    assert not found.pooled and verdict(found, 0.01) == "not judged"
    assert str(found) == "2 (n = 1, no interval)"


def test_one_seed_is_widened_by_the_pooled_variance():
    # block values 1, 2, 3: V_block = 1/3 with 2 degrees of freedom; V_seed = 0.5 with 4
    found = block_interval(GOOD[:1], [0, 1, 2], SeedVariance(0.5, 4))
    half = math.sqrt(2.776445**2 * 0.5 + T2**2 / 3)
    assert found.high == pytest.approx(2 + half, rel=1e-6)
    assert found.pooled and verdict(found, 100) == "not judged"


def test_two_seeds_add_their_own_variance():
    # seed means 1 and 3: variance 2 with 1 degree of freedom; pooled 0.5 with 4
    # together (4 * 0.5 + 1 * 2) / 5 = 0.8 with 5, of the mean of two 0.4; no block variance
    found = block_interval([[1.0] * 4, [3.0] * 4], [0, 1, 2, 3], SeedVariance(0.5, 4))
    assert found.high == pytest.approx(2 + 2.570582 * math.sqrt(0.4), rel=1e-6)
    assert found.pooled
    own = block_interval([[1.0] * 4, [3.0] * 4], [0, 1, 2, 3])
    assert own.high == pytest.approx(2 + 12.706205, rel=1e-6)
    assert not own.pooled and verdict(own, 100) == "not judged"


def test_three_seeds_or_none_use_no_pooled_variance():
    pooled = SeedVariance(100.0, 4)
    assert block_interval(GOOD, [0, 1, 2], pooled) == block_interval(GOOD, [0, 1, 2])
    untrained = block_interval(GOOD[:1], [0, 1, 2], pooled, evaluated_only=True)
    assert untrained == block_interval(GOOD[:1], [0, 1, 2], evaluated_only=True)
    assert verdict(replace(untrained, margin=100)) == "equivalent"  # one row suffices where no seed enters


def test_a_family_pools_the_seed_variance_of_the_same_comparison_only():
    clusters = np.arange(4)

    def part(of: str, *rows) -> BySeed:
        return BySeed(dict(enumerate(np.mean(rows, axis=1))), dict(enumerate(np.array(rows, dtype=float))), clusters,
                      of=of)

    three = [[1.0] * 4, [2.0] * 4, [3.0] * 4]  # variance 1, 2 degrees of freedom
    found = family({"depth 1": part("a - b", *three), "depth 8": part("a - b", [5.0] * 4),
                    "another": part("c - b", [5.0] * 4)})
    assert (found["depth 8"].pooled, found["another"].pooled) == (True, False)
    assert found["depth 8"].high == pytest.approx(5 + T2, rel=1e-6) and math.isnan(found["another"].high)


def test_pooling_seed_variances():
    # means 1, 2, 3: squares 2, df 2; means 0, 0, 4, 4: squares 16, df 3; two seeds: left out
    cells = [[[0, 2], [2, 2], [3, 3]], [[0, 0], [0, 0], [4, 4], [4, 4]], [[0, 9], [9, 0]]]
    assert pool_seed_variance(cells) == SeedVariance(18 / 5, 5)
    assert pool_seed_variance(cells[2:]) is None


# ------------------------------------------------------------------------------- clusters

def test_clusters_end_where_documents_do():
    # documents of 5 tokens and a separator end at 6, 12, 18; blocks of 4 at 4, 8, 12, 16
    assert document_clusters([5, 5, 5, 5], 4, 5, share=0).tolist() == [0, 0, 0, 1, 1]
    # without separators at 5, 10, 15, 20: no block but the last ends there
    assert document_clusters([5, 5, 5, 5], 4, 5, 0, share=0).tolist() == [0] * 5


def test_clusters_may_cut_a_small_part_of_the_documents():
    # documents 0-4, 4-7, 7-12; the boundary at 8 cuts the last into 1 and 4 tokens and loses 8 of
    # the 16 + 9 + 25 = 50 squared tokens, 16 %
    assert document_clusters([4, 3, 5], 4, 3, separator=0).tolist() == [0, 1, 1]
    assert document_clusters([4, 3, 5], 4, 3, separator=0, share=0.16).tolist() == [0, 1, 2]
    assert document_clusters([4, 3, 500], 4, 3, separator=0).tolist() == [0, 1, 1]  # cut at the end


@given(st.lists(st.integers(1, 60), min_size=40, max_size=80), st.sampled_from([0, 0.1, 0.3]))
@settings(max_examples=60)
def test_clusters_lose_at_most_the_share(lengths, share):
    block, count = 16, sum(lengths) // 16
    clusters = document_clusters(lengths, block, count, 0, share)
    owner = np.repeat(np.arange(len(lengths)), lengths)[:block * count]  # each token's document
    pairs = np.zeros((len(lengths), clusters.max() + 1))
    np.add.at(pairs, (owner, np.repeat(clusters, block)), 1)
    whole = np.sum(pairs.sum(axis=1) ** 2)
    assert np.sum(pairs**2) >= (1 - share) * whole - 1e-6
    assert set(np.diff(clusters)) <= {0, 1}


@pytest.mark.parametrize("packing, separator", [("separated", 1), ("joined", 0)])
def test_clusters_follow_the_packing_of_the_corpus(tmp_path, packing, separator):
    lengths = np.random.default_rng(3).integers(1, 9, 60)
    lengths.astype(np.int64).tofile(tmp_path / "dev.lengths")
    np.repeat(np.arange(60), lengths).astype(np.int32).tofile(tmp_path / "dev.tokens")
    corpus = Corpus(tmp_path, {"end_of_text": -1})
    blocks = corpus.blocks("dev", 8, 24, packing)[:, :8]
    clusters = document_clusters(corpus.lengths("dev"), 8, 24, separator, share=0)
    seen = [set(blocks[clusters == c].ravel()) - {-1} for c in range(clusters.max() + 1)]
    assert len(seen) > 2
    assert not any(left & right for left, right in zip(seen, seen[1:]))


def test_too_few_documents():
    with pytest.raises(InputError, match="hold 8 tokens, 3 blocks have 12"):
        document_clusters([4, 4], 4, 3, separator=0)


# --------------------------------------------------------------------------------- ratios

def fieller(x: np.ndarray, y: np.ndarray) -> list[float]:
    """The closed form over independent pairs, in percent."""
    (xx, xy), (_, yy) = np.cov(x, y) / len(x)
    t, top, bottom = stats.t.ppf(0.975, len(x) - 1), x.mean(), y.mean()
    return sorted(100 * np.roots([bottom**2 - t**2 * yy, -2 * (top * bottom - t**2 * xy),
                                  top**2 - t**2 * xx]))


def test_a_ratio_is_fiellers():
    generator = np.random.default_rng(5)
    y = 2 + generator.normal(size=9)
    x = 0.6 * y + 0.2 * generator.normal(size=9)
    blocks = block_ratio([x], [y], np.arange(9), evaluated_only=True)
    seeds = block_ratio(np.repeat(x[:, None], 4, 1), np.repeat(y[:, None], 4, 1), [0, 1, 2, 3])
    for found in (blocks, seeds):
        assert [found.low, found.high] == pytest.approx(fieller(x, y), rel=1e-6)
        assert found.mean == pytest.approx(100 * x.mean() / y.mean())
        assert found.low < found.low90 < found.mean < found.high90 < found.high
    assert (blocks.trained, seeds.trained) == (False, True)


def test_what_numerator_and_denominator_share_cancels():
    # the arm recovers exactly half of the gap on every block: no interval, however blocks differ
    gap = 3 + some(1, 16)[0]
    found = block_ratio(np.repeat(gap / 2, 3, 0), np.repeat(gap, 3, 0), np.arange(16))
    assert [found.low, found.mean, found.high] == pytest.approx([50, 50, 50])


def arms(seeds: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(1)
    d, clusters = some(seeds, 16, 1)
    full = np.repeat(2 + generator.normal(size=(1, 16)), seeds, 0)
    cut = full + 5 + np.repeat(generator.normal(size=(1, 16)), seeds, 0)
    return cut, cut - d, full, clusters


def gap_recovery(cut, arm, full, clusters) -> Interval:
    return block_ratio(cut - arm, cut - full, clusters)


def test_gap_recovery_ignores_a_constant_in_every_arm():
    cut, arm, full, clusters = arms()
    found = gap_recovery(cut, arm, full, clusters)
    assert found.mean == pytest.approx(100 * (cut - arm).mean() / (cut - full).mean())
    moved = gap_recovery(cut + 3, arm + 3, full + 3, clusters)
    scaled = gap_recovery(4 * cut, 4 * arm, 4 * full, clusters)
    for other in (moved, scaled):
        assert numbers(other) == pytest.approx(numbers(found), rel=1e-6)
    assert found.p == block_interval(cut - arm, clusters).p


def test_gap_recovery_covers_the_blocks_of_the_reference():
    # the gap is 40 on average; its blocks vary alone, with the arm's recovery, or against it
    recovered = 20 + np.array([[1.0, 1, -1, -1]])
    widths = []
    for gap in ([40, 40, 40, 40], [41, 39, 41, 39], [41, 41, 39, 39], [39, 39, 41, 41]):
        found = gap_recovery(np.array([gap]), gap - recovered, np.zeros((1, 4)), np.arange(4))
        assert math.isnan(found.low)  # one trained seed
        found = block_ratio(recovered, [gap], np.arange(4), evaluated_only=True)
        assert found.mean == pytest.approx(50)
        widths.append(found.high - found.low)
    known, alone, together, against = widths
    half = T3 * math.sqrt(4 / 3 / 4)  # of the recovery
    assert known == pytest.approx(100 * 2 * half / 40, rel=1e-6)
    assert together < known < alone < against


def test_a_ratio_without_a_gap_is_undefined():
    cut, arm, full, clusters = arms()
    found = gap_recovery(full, arm, cut, clusters)
    assert all(math.isnan(getattr(found, name)) for name in NUMBERS)
    assert str(found) == "undefined: the gap isn't told to be above 0 (n = 3)"
    # a gap above 0 whose interval isn't: 1 on average, from -3 to 5
    for none in ([[-3.0, 1, 5]], [[0.0, 0, 0]]):
        assert block_ratio([[1.0, 1, 1]], none, [0, 1, 2], evaluated_only=True).reason


def test_a_ratio_of_what_was_not_trained_is_as_sure_as_its_blocks():
    clusters, top, bottom = np.arange(4), np.array([1.0, 2, 3, 4]), np.array([4.0, 6, 5, 7])
    same = [BySeed(dict.fromkeys(range(3), row.mean()), dict.fromkeys(range(3), row), clusters, trained=False)
            for row in (top, bottom)]
    assert interval(Ratio(*same)) == replace(block_ratio([top], [bottom], clusters, evaluated_only=True), n=3)


def test_seeds_that_only_one_of_two_has_are_in_no_ratio():
    clusters, (d, _) = np.arange(8), some(3, 8)
    top, bottom = (BySeed(dict(zip(seeds, rows.mean(axis=1))), dict(zip(seeds, rows)), clusters)
                   for seeds, rows in (((0, 1, 2), d), ((1, 2, 3), d + 5)))
    assert interval(Ratio(top, bottom)) == block_ratio(d[1:], d[:2] + 5, clusters)
    assert interval(Ratio(top, BySeed())).n == 0


def test_a_ratio_of_one_seed():
    cut, arm, full, clusters = arms(1)
    bare = gap_recovery(cut, arm, full, clusters)
    assert bare.mean == pytest.approx(100 * (cut - arm).mean() / (cut - full).mean())
    assert math.isnan(bare.low) and not bare.reason


@pytest.mark.parametrize("count", [1, 4])
def test_blocks_without_a_variance_are_told_by_their_mean(count):
    two, one = np.full(count, 2.0), np.ones(count)
    for paired in (True, False):
        assert above_zero(two, one, paired) and not above_zero(one, two, paired) and not above_zero(one, one, paired)


# ---------------------------------------------------------------------------------- words

@pytest.mark.parametrize("low, high, word", [
    (-0.05, -0.02, "better"), (0.02, 0.05, "worse"),
    (-0.02, -0.001, "better"),  # 90 %: [-0.0181, -0.0029] isn't inside
    (-0.008, -0.001, "better within the margin"), (0.001, 0.008, "worse within the margin"),
    (-0.004, 0.006, "equivalent"),
    (-0.011, 0.006, "equivalent"),  # only the 95 % interval leaves the margin; 90 %: -0.0093
    (-0.02, 0.006, "undecided"), (-0.006, 0.02, "undecided"), (-1, 1, "undecided"),
])
def test_words(low, high, word):
    assert verdict(result(low, high)) == word


def test_the_margin_is_the_smaller_of_two():
    assert margin(7.6) == 0.01 and margin(0.5) == pytest.approx(0.005)
    assert [margin(gap) for gap in (None, math.nan, 0.0, -6.0)] == [0.01] * 4


def test_holm_over_the_parts_of_a_claim():
    # p = 0.02, 0.04: Holm gives 0.04, 0.04; a third part of p = 0.9 makes it 0.06, 0.08
    two = {"depth 1": result(-0.3, -0.1, p=0.02), "depth 4": result(-0.2, -0.01, p=0.04)}
    assert verdicts(two) == {"depth 1": "better", "depth 4": "better"}
    three = two | {"depth 8": result(-0.2, 0.3, p=0.9)}
    assert set(verdicts(three).values()) == {"undecided"}
    few = two | {"depth 8": result(-0.2, 0.3, p=0.9, n=1, pooled=True)}
    assert list(verdicts(few).values()) == ["better", "better", "not judged"]


def test_holm_can_turn_a_small_difference_into_equivalence():
    parts = {"depth 1": result(-0.008, -0.001, p=0.03), "depth 4": result(-0.5, 0.6, p=0.9)}
    assert verdicts(parts)["depth 1"] == "equivalent"


@pytest.mark.parametrize("last, is_settled", [
    (result(-0.3, -0.25), True),
    (result(-0.25, -0.15), False),  # -0.2 is half of -0.4
    (result(-0.26, -0.15), True),  # -0.205 is more
    (result(-0.6, 0.1), False),
    (result(-0.3, -0.25, n=2, pooled=True), True),  # rests on three seeds before, and says so
])
def test_settled(last, is_settled):
    ladder = {1600: last, 100: result(-5, 9), 400: result(-0.5, -0.3)}  # in any order
    assert settled(ladder) == is_settled
    few = "" if last.n > 2 else "; n = 2 at 1,600"
    assert budget_words(ladder) == ("settled" + few if is_settled else "not settled up to 1,600 tokens")


def test_a_sign_that_changes_is_told_with_the_budgets_between_which_it_does():
    ladder = {1600: result(0.3, 0.5), 400: result(-5, 9), 100: result(-0.5, -0.3)}  # in any order
    assert budget_words(ladder) == "changes sign between 100 and 1,600 tokens"
    few = ladder | {6400: result(-0.9, -0.7, n=1, pooled=True)}
    assert budget_words(few) == "changes sign between 1,600 and 6,400 tokens; n = 1 at 6,400"
    assert budget_words(ladder | {6400: result(0.3, 0.5)}) == "settled"


def test_in_another_unit_an_interval_says_the_same():
    found = result(-0.5, -0.3)
    other = scaled(found, 100 / 4)
    assert (other.mean, other.low, other.high) == pytest.approx((25 * found.mean, 25 * found.low, 25 * found.high))
    assert (other.side, other.n, other.p, str(other)[0]) == (found.side, found.n, found.p, str(found)[0])


def test_nothing_is_settled_by_one_budget_or_by_few_seeds():
    few = result(-0.5, -0.3, n=2, pooled=True)
    assert not settled({100: result(-0.5, -0.3)}) and settled({100: result(-0.5, -0.3), 400: result(-0.5, -0.3)})
    assert not settled({100: few, 400: few})


@pytest.mark.parametrize("low, high, text", [
    (-0.64, -0.62, "-0.630 [-0.640, -0.620]"),
    (-0.6444, -0.6156, "-0.630 [-0.644, -0.616]"),
    (0.9004, 1.0996, "1.00 [0.90, 1.10]"),  # a half-width of 0.0996 is 0.10
    (-130.0, 170.0, "20 [-130, 170]"),
    (-0.00011, 0.0001, "0.00000 [-0.00011, 0.00010]"),  # never -0.00000
])
def test_two_digits_of_the_half_width(low, high, text):
    assert str(result(low, high)) == f"{text} (n = 3)"
