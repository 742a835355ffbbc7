"""The quotas as a solution of DBP's problem, and the radix search for the rows of each cluster."""

import numpy as np
import pytest
from scipy.optimize import minimize

from pipeline.select_bounds import Bounds, Digit, count_digits, find_bounds, is_within, list_digits
from pipeline.select_quota import allot, project, round_to_sum


def make_problem(seed: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    rng = np.random.default_rng(seed)
    high = rng.integers(1, 50, size)
    low = np.minimum(rng.integers(0, 10), high - 1)
    total = int(rng.integers(low.sum(), high.sum() + 1))
    return rng.dirichlet(np.full(size, 0.5)) * total, low, high, total


@pytest.mark.parametrize("seed", range(30))
def test_quotas_are_the_nearest_within_their_bounds(seed: int) -> None:
    """Against a general solver."""
    aims, low, high, total = make_problem(seed, 8)
    found = project(aims, low, high, total)
    sums = {"type": "eq", "fun": lambda n: n.sum() - total}
    start = low + (high - low) * (total - low.sum()) / max((high - low).sum(), 1)
    bounds = list(zip(low, high, strict=True))
    best = minimize(lambda n: ((n - aims) ** 2).sum(), start, bounds=bounds, constraints=sums, method="SLSQP")
    assert best.success
    np.testing.assert_allclose(found, best.x, atol=1e-3)


@pytest.mark.parametrize("size", [1, 2, 1000, 100_000])
def test_quotas_fulfil_the_conditions_of_an_optimum(size: int) -> None:
    """All that is between its bounds is shifted alike; what is at a bound would be shifted beyond it."""
    aims, low, high, total = make_problem(size, size)
    found = project(aims, low, high, total)
    assert found.sum() == pytest.approx(total) and (found >= low).all() and (found <= high).all()
    shifts, free = found - aims, (found > low) & (found < high)
    shift = np.median(shifts[free]) if free.any() else shifts.max()
    np.testing.assert_allclose(shifts[free], shift, atol=1e-6)
    assert (shifts[found == low] >= shift - 1e-6).all() or not free.any()
    assert (shifts[found == high] <= shift + 1e-6).all() or not free.any()


def test_rounding_keeps_the_sum_and_the_bounds() -> None:
    values, most = np.array([1.5, 2.5, 0.25, 3.75, 4.0]), np.array([2, 3, 5, 4, 4])
    assert round_to_sum(values, most, 12).tolist() == [2, 2, 0, 4, 4]
    for seed in range(50):
        aims, low, high, total = make_problem(seed, 40)
        found = round_to_sum(project(aims, low, high, total), high, total)
        assert found.sum() == total and (found >= low).all() and (found <= high).all()


@pytest.mark.parametrize(
    ("wanted", "min_share", "expected"),
    [
        (0, 0.5, [0, 0, 0, 0]),
        (40, 0.5, [7, 0, 16, 17]),
        (40, 1, [9, 0, 15, 16]),
        (62, 0.5, [10, 0, 2, 50]),
        (3, 0, [1, 0, 1, 1]),
        (2, 0, [0, 0, 1, 1]),
    ],
)
def test_quotas_grow_with_complexity(wanted: int, min_share: float, expected: list[int]) -> None:
    """Four clusters with softmax 0.18, -, 0.39, 0.43, one of them empty; 62 rows are all, as the third has two then."""
    rows = np.array([10, 0, 2 if wanted == 62 else 30, 50])
    complexity = np.array([0.1, np.nan, 0.5, np.log(3) * 0.5])
    found = allot(rows, complexity, wanted, temperature=0.5, min_share=min_share)
    assert found.tolist() == expected


@pytest.mark.parametrize("seed", range(12))
def test_first_rows_of_each_group_are_those_of_a_sort(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed)
    num_groups, num_rows = int(rng.choice([1, 3, 50])), int(rng.choice([0, 5, 2000]))
    monkeypatch.setattr("pipeline.select_bounds.COUNTS", int(rng.choice([1, 150, 4096])))
    bits = [32, 64, 64] if seed % 2 else [64, 64]
    group_R = rng.integers(-1, num_groups, num_rows)
    highest = [(1, 5, 2**b - 1)[rng.integers(3)] for b in bits]
    words = [rng.integers(0, high, num_rows, np.uint64, endpoint=True) for high in highest]
    sizes = np.bincount(group_R[group_R >= 0], minlength=num_groups)
    wanted_K = np.array([rng.integers(0, size + 1) for size in sizes])
    passes = []

    def count_pass(digit: Digit, words_KW: np.ndarray, open_K: np.ndarray) -> np.ndarray:
        passes.append(digit)
        halves = [slice(None, num_rows // 3), slice(num_rows // 3, None)]
        some = [words[: digit.word + 1] for _ in halves]
        counts = [
            count_digits(group_R[rows], [w[rows] for w in used], digit, words_KW, open_K)
            for rows, used in zip(halves, some, strict=True)
        ]
        return sum(counts).reshape(num_groups, -1)

    bounds = find_bounds(count_pass, wanted_K, bits)
    within = is_within(group_R, words, bounds)
    keys = list(zip(*(word.tolist() for word in words), strict=True))
    for group in range(num_groups):
        ordered = sorted(keys[row] for row in np.flatnonzero(group_R == group))
        last = ordered[wanted_K[group] - 1] if wanted_K[group] else ()
        expected = [row for row in np.flatnonzero(group_R == group) if wanted_K[group] and keys[row] <= last]
        assert np.flatnonzero(within & (group_R == group)).tolist() == expected
        assert bounds.num_K[group] == len(expected)
    assert len(passes) <= len(list_digits(bits, num_groups))


def test_digits_cover_every_bit_once() -> None:
    for bits, num_groups in (([32, 64, 64], 1), ([64], 3000), ([32, 64], 10**6)):
        digits = list_digits(bits, num_groups)
        for word, wide in enumerate(bits):
            covered = [d.shift + n for d in digits if d.word == word for n in reversed(range(d.width))]
            assert covered == list(reversed(range(wide)))


def test_clusters_of_rows_that_never_reached_the_step_do_not_pass() -> None:
    bounds = Bounds(np.zeros((2, 1), np.uint64), np.array([True, False]), np.array([1, 0]))
    group_R, words = np.array([-1, 0, 0, 1, 2, 10**9]), [np.array([0, 0, 1, 0, 0, 0], np.uint64)]
    assert is_within(group_R, words, bounds).tolist() == [False, True, False, False, False, False]
