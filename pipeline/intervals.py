"""Confidence intervals of a share, a quantile and a mean, from the incomplete beta function alone, without scipy.

All are two-sided with equal tails.  Share: Clopper and Pearson 1934.  Quantile: by order statistics, free of any
assumption on the distribution (David and Nagaraja, Order Statistics, 3rd edition, section 7.1).  Mean: Student's t.
"""

import math
from collections.abc import Callable, Sequence

from pipeline.errors import ConfigError

MOST_TERMS = 1_000_000
TINY = 1e-300


def check_confidence(confidence: float) -> None:
    """Raise ConfigError unless a confidence level lies strictly between 0 and 1."""
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence {confidence} is not between 0 and 1: 0.95 is the usual one.")


def beta_share(x: float, a: float, b: float) -> float:
    """Return the regularised incomplete beta function I_x(a, b), the share of a beta distribution below x in [0, 1].

    a and b are above 0.  By the continued fraction of DLMF 8.17.22; agrees with scipy to 1e-6 for a + b up to 4e8.
    """
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - beta_share(1 - x, b, a)
    log_front = a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    return math.exp(log_front) / a / _continue_fraction(x, a, b)


def _continue_fraction(x: float, a: float, b: float) -> float:
    """Return 1 + d_1/(1 + d_2/(1 + ...)) by Lentz's method; it ends after about sqrt(a + b) terms."""
    value, upper, lower = 1.0, 1.0, 0.0
    for m in range(MOST_TERMS):
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        even = (m + 1) * (b - m - 1) * x / ((a + 2 * m + 1) * (a + 2 * m + 2))
        for term in (odd, even):
            lower = 1 / (1 + term * lower or TINY)
            upper = 1 + term / upper or TINY
            change = upper * lower
            value *= change
        if abs(change - 1) < 1e-15:
            return value
    raise AssertionError(f"I_{x}({a}, {b}) does not converge")


def beta_quantile(share: float, a: float, b: float) -> float:
    """Return the x in [0, 1] below which `share` of a beta distribution lies, by halving."""
    low, high = 0.0, 1.0
    while low < (middle := (low + high) / 2) < high:
        if beta_share(middle, a, b) < share:
            low = middle
        else:
            high = middle
    return high


def binomial_at_most(hits: int, trials: int, chance: float) -> float:
    """Return the probability that `trials` draws, each a hit with `chance`, give `hits` hits or fewer."""
    if hits < 0 or hits >= trials:
        return float(hits >= trials)
    return beta_share(1 - chance, trials - hits, hits + 1)


def share_interval(hits: int, trials: int, confidence: float, *, most_hits: int | None = None) -> tuple[float, float]:
    """Return the exact interval (Clopper-Pearson) of a share of which `hits` of `trials` draws are an estimate.

    Where the number of hits is only known to lie between `hits` and `most_hits`, the interval covers both ends.
    """
    tail, most = (1 - confidence) / 2, hits if most_hits is None else most_hits
    low = beta_quantile(tail, hits, trials - hits + 1) if hits else 0.0
    high = beta_quantile(1 - tail, most + 1, trials - most) if most < trials else 1.0
    return low, high


def rank_interval(trials: int, share: float, confidence: float) -> tuple[int | None, int | None]:
    """Return ranks (upper, lower), 1 being the largest of `trials` draws, that enclose the value with `share` above it.

    Whatever the distribution, ties included, the value lies between these two order statistics with the confidence or
    more.  None: so few draws give no bound on that side.
    """
    tail = (1 - confidence) / 2
    upper = _first(lambda r: binomial_at_most(r, trials, share) > tail, trials)  # the largest r: P(hits < r) <= tail
    lower = _first(lambda s: 1 - binomial_at_most(s - 1, trials, share) <= tail, trials + 1)
    return upper or None, lower if lower <= trials else None


def _first(holds: Callable[[int], bool], last: int) -> int:
    """Return the first number in [0, last] from which on a condition holds; `last` when it never does."""
    low, high = 0, last
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def student_quantile(confidence: float, degrees: int) -> float:
    """Return the t that Student's distribution with so many degrees of freedom stays within, with the confidence."""
    x = beta_quantile(1 - confidence, degrees / 2, 0.5)
    return math.sqrt(degrees * (1 / x - 1))


def mean_interval(values: Sequence[float], confidence: float) -> tuple[float, float | None]:
    """Return the mean and half the width of its interval (Student's t, n - 1 degrees); None for one value."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, student_quantile(confidence, len(values) - 1) * math.sqrt(variance / len(values))
