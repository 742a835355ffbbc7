"""Intervals against scipy (which scikit-learn brings), against sums written out, and against simulated coverage."""

import math

import numpy as np
import pytest
from scipy import stats

from pipeline.errors import ConfigError
from pipeline.intervals import (
    beta_quantile,
    beta_share,
    binomial_at_most,
    check_confidence,
    mean_interval,
    rank_interval,
    share_interval,
    student_quantile,
)

SHAPES = [(0.5, 0.5), (1, 1), (2, 30), (15, 0.5), (150, 851), (0.5, 2), (1, 10_000), (1_500_000, 8_500_001), (1e8, 3e8)]


@pytest.mark.parametrize(("a", "b"), SHAPES)
def test_beta_is_scipys(a: float, b: float) -> None:
    for share in (1e-6, 0.025, 0.5, 0.975, 1 - 1e-6):
        x = float(stats.beta.ppf(share, a, b))
        assert beta_share(x, a, b) == pytest.approx(share, abs=1e-6)
        assert beta_quantile(share, a, b) == pytest.approx(x, rel=1e-6)
    assert beta_share(0, a, b) == 0 and beta_share(1, a, b) == 1


@pytest.mark.parametrize(("trials", "chance"), [(1, 0.3), (12, 0.15), (40, 0.99), (9, 0.0), (9, 1.0)])
def test_the_binomial_is_the_sum_written_out(trials: int, chance: float) -> None:
    for hits in range(-1, trials + 1):
        terms = [math.comb(trials, n) * chance**n * (1 - chance) ** (trials - n) for n in range(hits + 1)]
        assert binomial_at_most(hits, trials, chance) == pytest.approx(math.fsum(terms), abs=1e-12)


@pytest.mark.parametrize(("hits", "trials"), [(0, 10), (10, 10), (1, 1), (3, 20), (150, 1000), (1_500_000, 10_000_000)])
def test_the_interval_of_a_share_is_clopper_and_pearsons(hits: int, trials: int) -> None:
    expected = stats.binomtest(hits, trials).proportion_ci(0.95, "exact")
    assert share_interval(hits, trials, 0.95) == pytest.approx((expected.low, expected.high), rel=1e-6)


def test_a_count_that_is_only_bounded_gives_the_hull() -> None:
    assert share_interval(3, 20, 0.9, most_hits=7) == (share_interval(3, 20, 0.9)[0], share_interval(7, 20, 0.9)[1])


@pytest.mark.parametrize(
    ("trials", "share"), [(5, 0.15), (100, 0.15), (1000, 0.4), (1000, 0.001), (30, 0.99), (7, 1.0)]
)
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_ranks_are_the_tightest_with_equal_tails(trials: int, share: float, confidence: float) -> None:
    upper, lower = rank_interval(trials, share, confidence)
    tail = (1 - confidence) / 2
    ups = [r for r in range(1, trials + 1) if stats.binom.cdf(r - 1, trials, share) <= tail]
    lows = [s for s in range(1, trials + 1) if stats.binom.sf(s - 1, trials, share) <= tail]
    assert (upper, lower) == (max(ups, default=None), min(lows, default=None))


@pytest.mark.parametrize("values", ["continuous", "tied"])
def test_the_intervals_cover_what_they_promise(values: str) -> None:
    """2,000 samples of a known distribution: of the threshold, and of the share kept at the threshold found."""
    rng, trials, share, confidence = np.random.default_rng(7), 200, 0.15, 0.9
    support = np.arange(12) if values == "tied" else np.arange(100_000)
    threshold = support[len(support) - int(share * len(support)) - (values == "tied")]  # smallest of the top 15 %
    upper, lower = rank_interval(trials, share, confidence)
    assert upper and lower
    rank = round(share * trials)
    hits_value = hits_share = 0
    for _ in range(2000):
        ordered = np.sort(rng.choice(support, trials))[::-1]
        hits_value += ordered[lower - 1] <= threshold <= ordered[upper - 1]
        found = ordered[rank - 1]
        kept = (support >= found).mean()
        low, high = share_interval(rank, trials, confidence, most_hits=int((ordered >= found).sum()))
        hits_share += low <= kept <= high
    noise = 3 * math.sqrt(confidence * (1 - confidence) / 2000)
    assert hits_value / 2000 >= confidence - noise and hits_share / 2000 >= confidence - noise
    if values == "continuous":  # and not by being endlessly wide
        assert hits_value / 2000 <= 0.96 and hits_share / 2000 <= 0.96


@pytest.mark.parametrize("degrees", [1, 2, 3, 9, 200])
def test_students_quantile_is_scipys(degrees: int) -> None:
    for confidence in (0.5, 0.9, 0.95, 0.999):
        assert student_quantile(confidence, degrees) == pytest.approx(stats.t.ppf((1 + confidence) / 2, degrees))


def test_the_mean_of_three_seeds_by_hand() -> None:
    mean, half = mean_interval([0.40, 0.43, 0.46], 0.95)
    assert mean == pytest.approx(0.43) and half == pytest.approx(4.302653 * 0.03 / math.sqrt(3), rel=1e-6)
    assert mean_interval([0.4], 0.95) == (0.4, None)
    assert mean_interval([0.4, 0.4], 0.95) == (0.4, 0.0)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95, -0.1, math.nan])
def test_a_confidence_that_is_none_is_refused(confidence: float) -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        check_confidence(confidence)
