"""Agreement of score columns, against scikit-learn, scipy and the definitions written out over all pairs."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score

from pipeline.agreement import (
    average_ranks,
    compare_kept,
    count_wanted,
    judge_fractions,
    measure_auroc,
    measure_average_precision,
    rank_rows,
    spearman,
)
from pipeline.uid import UID_DTYPE


def make_uids(num: int, seed: int = 0) -> np.ndarray:
    uids = np.empty(num, UID_DTYPE)
    words = np.random.default_rng(seed).integers(0, 4, (num, 2))  # first words repeat
    uids["f0"], uids["f1"] = words[:, 0], np.random.default_rng(seed + 1).permutation(num)
    return uids


def make_values(num: int, seed: int, *, levels: int = 9) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.where(rng.random(num) < 0.1, np.nan, rng.integers(0, levels, num) / 4 - 1)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("levels", [2, 9, 10_000])
def test_rank_measures_with_ties(seed: int, levels: int) -> None:
    first, second = make_values(300, seed, levels=levels), make_values(300, seed + 50, levels=levels)
    second = np.where(np.random.default_rng(seed).random(300) < 0.5, first, second)
    both = ~(np.isnan(first) | np.isnan(second))
    assert average_ranks(first[both]).tolist() == stats.rankdata(first[both]).tolist()
    assert spearman(first, second) == pytest.approx(stats.spearmanr(first[both], second[both]).statistic)
    values = first[both]
    is_right = np.random.default_rng(seed).random(len(values)) < 0.3
    assert measure_auroc(values, is_right) == pytest.approx(roc_auc_score(is_right, values))
    assert measure_average_precision(values, is_right) == pytest.approx(average_precision_score(is_right, values))


def test_auroc_is_the_share_of_pairs_in_order() -> None:
    values, is_right = np.array([0.3, 0.1, 0.3, 0.9, -1.0]), np.array([True, False, False, True, True])
    pairs = [
        (a > b) + (a == b) / 2
        for (a, r), (b, s) in itertools.product(zip(values, is_right, strict=True), repeat=2)
        if r and not s
    ]
    assert measure_auroc(values, is_right) == pytest.approx(sum(pairs) / len(pairs))


def test_nothing_to_compare_is_none_not_a_number() -> None:
    none, one, flat = np.array([np.nan, np.nan]), np.array([1.0, np.nan]), np.array([2.0, 2.0])
    assert spearman(none, flat) is spearman(one, one) is spearman(flat, np.array([1.0, 2.0])) is None
    assert measure_auroc(flat, np.array([True, True])) is None
    assert measure_average_precision(flat, np.array([False, False])) is None
    assert measure_auroc(np.empty(0), np.empty(0, bool)) is None
    ranking = rank_rows(none, make_uids(2))
    (kept,) = judge_fractions(ranking, np.zeros(2, bool), np.ones(2, bool), [0.5], num_pool=2)
    (shared,) = compare_kept(ranking, ranking, [0.5], num_pool=2)
    assert (kept.rows, kept.precision, kept.recall) == (0, None, None) and ranking.num_null == 2
    assert (shared.shared, shared.of_first, shared.jaccard) == (0, None, None)


@pytest.mark.parametrize("seed", range(3))
def test_what_is_kept_is_the_top_step_written_out(seed: int) -> None:
    num, num_pool, uids = 120, 150, make_uids(120, seed)
    first, second = make_values(num, seed), make_values(num, seed + 9)
    rng = np.random.default_rng(seed)
    is_known = rng.random(num) < 0.9
    is_right = is_known & (rng.random(num) < 0.4)
    fractions = (0.0, 0.05, 0.29, 1.0)

    def keep(values: np.ndarray, fraction: float) -> set[int]:
        rows = sorted(
            (n for n in range(num) if not math.isnan(values[n])),
            key=lambda n: (-values[n], int(uids["f0"][n]) << 64 | int(uids["f1"][n])),
        )
        return set(rows[: math.floor(fraction * num_pool + 1e-9)])

    one, two = rank_rows(first, uids), rank_rows(second, uids)
    judged = judge_fractions(one, is_right, is_known, fractions, num_pool=num_pool)
    compared = compare_kept(one, two, fractions, num_pool=num_pool)
    for fraction, found, overlap in zip(fractions, judged, compared, strict=True):
        a, b = keep(first, fraction), keep(second, fraction)
        hits, known = sum(is_right[n] for n in a), sum(is_known[n] for n in a)
        assert found.rows == len(a) and found.precision == (hits / known if known else None)
        assert found.recall == hits / is_right.sum()
        assert overlap.shared == len(a & b) and overlap.of_first == (len(a & b) / len(a) if a else None)
        assert overlap.jaccard == (len(a & b) / len(a | b) if a | b else None)


def test_fractions_count_as_the_top_step_does() -> None:
    assert [count_wanted(f, 100) for f in (0.29, 0.57, 1.0, 0.001)] == [29, 57, 100, 0]
