"""The races: exact logarithms, the laws of Plackett-Luce, and the caps against numpy's own weighted draws."""

import math

import numpy as np
import pytest

from pipeline.select_race import SPAN_ROWS, draw_hard, draw_soft, exponential, hash_uniforms, log

SEEDS = 400


def make_keys(num_rows: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, num_rows, np.uint64)


def test_logarithms_are_those_of_the_library() -> None:
    values = np.concatenate(
        [10 ** np.random.default_rng(0).uniform(-300, 300, 20_000), [1, 0.5, 2, 5e-324, 1 - 2**-53]]
    )
    np.testing.assert_allclose(log(values), np.log(values), rtol=4e-16, atol=2e-16)
    uniforms = np.concatenate([np.random.default_rng(1).random(20_000), [2.0**-53, 0.5, 1 - 2.0**-53]])
    np.testing.assert_allclose(exponential(uniforms), -np.log1p(-uniforms), rtol=1e-15)
    assert (exponential(uniforms) >= uniforms).all()


def test_uniforms_are_uniform_and_turns_differ() -> None:
    keys = np.arange(100_000, dtype=np.uint64)
    first, second = hash_uniforms(keys, 0), hash_uniforms(keys, 1)
    for values in (first, second, (first + second) % 1):
        counts = np.bincount((values * 100).astype(int), minlength=100)
        assert ((counts - 1000) ** 2 / 1000).sum() < 99 + 5 * math.sqrt(2 * 99)
    assert first.min() > 0 and first.max() < 1


def test_a_batch_is_drawn_as_plackett_and_luce_say() -> None:
    """Sequential draws without replacement from softmax(z): the chance of each pair, by its formula."""
    z, num = np.log([1.0, 2.0, 3.0, 4.0]), 5_000
    keys = make_keys(4 * num, 0).reshape(num, 4)
    pairs = np.array([draw_soft(row, z, alpha=1, batch=2, total=2) for row in keys])
    weights = np.exp(z) / np.exp(z).sum()
    for i in range(4):
        for j in range(i):
            chance = weights[i] * weights[j] * (1 / (1 - weights[i]) + 1 / (1 - weights[j]))
            found = (pairs[:, [i, j]] == 1).all(1).mean()
            assert abs(found - chance) < 4 * math.sqrt(chance * (1 - chance) / num)


def draw_softly_by_numpy(z: np.ndarray, alpha: float, batch: int, total: int, rng: np.random.Generator) -> np.ndarray:
    z, counts = z.copy(), np.zeros(len(z))
    while total:
        size = min(batch, total)
        chances = np.exp(z - z.max())
        drawn = rng.choice(len(z), size, replace=False, p=chances / chances.sum())
        counts[drawn] += 1
        z[drawn] -= alpha
        total -= size
    return counts


def draw_hard_by_numpy(z: np.ndarray, cap: int, total: int, rng: np.random.Generator) -> np.ndarray:
    counts = np.zeros(len(z))
    for _ in range(total):
        chances = np.exp(z) * (counts < cap)
        counts[rng.choice(len(z), p=chances / chances.sum())] += 1
    return counts


@pytest.mark.parametrize("cap", ["soft", "hard"])
def test_expected_copies_are_those_of_numpys_draws(cap: str) -> None:
    """Mean copies of each of 12 rows over 400 runs, by 4.5 standard errors of the difference."""
    z, rng = np.linspace(-2, 2, 12), np.random.default_rng(5)
    if cap == "soft":
        ours = [draw_soft(make_keys(12, n), z, alpha=0.3, batch=5, total=43) for n in range(SEEDS)]
        theirs = [draw_softly_by_numpy(z, 0.3, 5, 43, rng) for _ in range(SEEDS)]
    else:
        ours = [draw_hard(make_keys(12, n), z, cap=6, total=30) for n in range(SEEDS)]
        theirs = [draw_hard_by_numpy(z, 6, 30, rng) for _ in range(SEEDS)]
    assert {int(counts.sum()) for counts in ours} == {43 if cap == "soft" else 30}
    error = np.sqrt((np.var(ours, 0) + np.var(theirs, 0)) / SEEDS)
    assert (abs(np.mean(ours, 0) - np.mean(theirs, 0)) < 4.5 * error + 1e-9).all()
    assert np.ptp(np.mean(theirs, 0)) > 3


def race_all(keys: np.ndarray, z: np.ndarray, alpha: float, batch: int, total: int) -> np.ndarray:
    """draw_soft with a logarithm for every row in every race."""
    z, counts, turn = z.copy(), np.zeros(len(z), int), 0
    while total:
        times = np.log(-np.log1p(-hash_uniforms(keys, turn))) - z
        drawn = np.argsort(times, kind="stable")[: min(batch, total)]
        counts[drawn] += 1
        z[drawn] -= alpha
        total, turn = total - len(drawn), turn + 1
    return counts


@pytest.mark.parametrize("spread", [0, 1, 30, 2000])
@pytest.mark.parametrize("batch", [100, 5000, 149_000, 10**6])
def test_rows_without_a_logarithm_are_none_of_the_first(spread: float, batch: int) -> None:
    """Several spans; with a spread of 2,000 most weights are no float64 beside the largest."""
    num_rows = 2 * SPAN_ROWS + 18_928
    keys, z = make_keys(num_rows, 1), np.random.default_rng(2).normal(0, 1, num_rows) * spread
    total = 3 * min(batch, num_rows) - 7
    assert (draw_soft(keys, z, alpha=0.5, batch=batch, total=total) == race_all(keys, z, 0.5, batch, total)).all()


@pytest.mark.parametrize(("spread", "total"), [(0, 1), (1, 100_000), (3, 400_000), (2000, 300_000), (1, 449_999)])
def test_hard_caps_of_many_rows(spread: float, total: int) -> None:
    num_rows, cap = 150_000, 3
    keys, z = make_keys(num_rows, 1), np.random.default_rng(2).normal(0, 1, num_rows) * spread
    elapsed = np.cumsum([-np.log1p(-hash_uniforms(keys, turn)) for turn in range(cap)], 0)
    order = np.argsort((np.log(elapsed) - z).ravel())[:total]
    assert (draw_hard(keys, z, cap=cap, total=total) == np.bincount(order % num_rows, minlength=num_rows)).all()


def test_equal_times_go_by_place_and_ends_are_ordinary() -> None:
    keys, z = np.zeros(9, np.uint64), np.zeros(9)
    assert draw_soft(keys, z, alpha=0, batch=2, total=4).tolist() == [2, 2] + [0] * 7
    assert draw_hard(keys, z, cap=2, total=3).tolist() == [1, 1, 1] + [0] * 6
    assert draw_hard(keys, z, cap=2, total=100).tolist() == [2] * 9
    for draw in (draw_soft(keys[:0], z[:0], alpha=1, batch=2, total=0), draw_hard(keys[:0], z[:0], cap=1, total=0)):
        assert draw.tolist() == []
    assert draw_soft(keys, z, alpha=1, batch=3, total=0).sum() == draw_hard(keys, z, cap=1, total=0).sum() == 0
