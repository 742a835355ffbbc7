"""How well score columns tell right rows from wrong ones, and how far they agree with each other.  Pure; numpy only.

What a column keeps at a fraction is what the step `top` keeps: the rows with the largest scores, of equal ones those
with the smaller uid, and never a row without a score.  N rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.select import Top


@dataclass(frozen=True, slots=True)
class Ranking:
    """A score column of all rows, put in order."""

    value_N: np.ndarray
    """float64; NaN for a row without a score."""
    best: np.ndarray
    """int64 (rows with a score,): best first."""

    @property
    def num_null(self) -> int:
        """Rows without a score."""
        return len(self.value_N) - len(self.best)


def rank_rows(value_N: np.ndarray, uids: np.ndarray) -> Ranking:
    """Return the order of float64 scores (NaN: none) of rows with the uids, (N,) of UID_DTYPE."""
    scored = np.flatnonzero(~np.isnan(value_N))
    order = np.lexsort((uids["f1"][scored], uids["f0"][scored], -value_N[scored]))
    return Ranking(value_N, scored[order])


def average_ranks(values: np.ndarray) -> np.ndarray:
    """Return float64 ranks, 1 for the smallest; equal values share the mean of their ranks.  No NaN."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    is_first = np.ones(len(values), bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    starts = np.flatnonzero(is_first)
    ends = np.append(starts[1:], len(values))
    ranks = np.empty(len(values))
    ranks[order] = np.repeat((starts + 1 + ends) / 2, ends - starts)
    return ranks


def spearman(first_N: np.ndarray, second_N: np.ndarray) -> float | None:
    """Return Spearman's correlation of two columns over the rows where neither is NaN: Pearson's of average ranks.

    None when there are fewer than two such rows, or one column has a single value there.
    """
    both = ~(np.isnan(first_N) | np.isnan(second_N))
    first, second = average_ranks(first_N[both]), average_ranks(second_N[both])
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    first, second = first - first.mean(), second - second.mean()
    return float(first @ second / np.sqrt((first @ first) * (second @ second)))


def measure_auroc(values: np.ndarray, is_right: np.ndarray) -> float | None:
    """Return the chance that a right row has a larger score than a wrong one, ties counted half; None without either.

    values has no NaN.  Mann and Whitney's U by average ranks.
    """
    num_right = int(is_right.sum())
    num_pairs = num_right * (len(values) - num_right)
    if not num_pairs:
        return None
    return float((average_ranks(values)[is_right].sum() - num_right * (num_right + 1) / 2) / num_pairs)


def measure_average_precision(values: np.ndarray, is_right: np.ndarray) -> float | None:
    """Return the mean precision over the right rows, each at the threshold of its own score; None without a right row.

    Rows of equal score come in together, so their order does not matter (scikit-learn's average_precision_score).
    """
    if not is_right.any():
        return None
    order = np.argsort(-values, kind="stable")
    ordered, hits = values[order], np.cumsum(is_right[order])
    ends = np.append(np.flatnonzero(ordered[1:] != ordered[:-1]), len(values) - 1)
    gained = np.diff(hits[ends], prepend=0)
    return float((gained * (hits[ends] / (ends + 1))).sum() / hits[-1])


def count_wanted(fraction: float, num_pool: int) -> int:
    """Return how many rows a fraction of the pool is to the step `top`.  Raises ConfigError when not in [0, 1]."""
    return Top(by="any", fraction=fraction).count_wanted(num_pool=num_pool, num_input=num_pool)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What a column keeps at one fraction, against the truth."""

    fraction: float
    rows: int
    """Rows kept; fewer than wanted when too few have a score."""
    precision: float | None
    """Share of right rows among those kept that the truth names; None when it names none."""
    recall: float | None
    """Share of all right rows, those without a score included, that is kept; None when no row is right."""


def judge_fractions(
    ranking: Ranking, is_right_N: np.ndarray, is_known_N: np.ndarray, fractions: Sequence[float], *, num_pool: int
) -> list[Kept]:
    """Return precision and recall at each fraction of the pool.  A row that is not known is never right."""
    num_right, found = int(is_right_N.sum()), []
    for fraction in fractions:
        kept = ranking.best[: count_wanted(fraction, num_pool)]
        hits, num_known = int(is_right_N[kept].sum()), int(is_known_N[kept].sum())
        precision, recall = hits / num_known if num_known else None, hits / num_right if num_right else None
        found.append(Kept(fraction=fraction, rows=len(kept), precision=precision, recall=recall))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """What two columns both keep at one fraction."""

    fraction: float
    shared: int
    """Rows that both keep."""
    of_first: float | None
    """As a share of what the first keeps; None when it keeps nothing."""
    jaccard: float | None
    """As a share of what either keeps; None when neither keeps anything."""


def compare_kept(first: Ranking, second: Ranking, fractions: Sequence[float], *, num_pool: int) -> list[Overlap]:
    """Return how far two columns keep the same rows at each fraction of the pool."""
    found = []
    for fraction in fractions:
        num = count_wanted(fraction, num_pool)
        is_kept = np.zeros(len(first.value_N), bool)
        is_kept[first.best[:num]] = True
        num_first, num_second = len(first.best[:num]), len(second.best[:num])
        shared = int(is_kept[second.best[:num]].sum())
        either = num_first + num_second - shared
        of_first, jaccard = shared / num_first if num_first else None, shared / either if either else None
        found.append(Overlap(fraction=fraction, shared=shared, of_first=of_first, jaccard=jaccard))
    return found
