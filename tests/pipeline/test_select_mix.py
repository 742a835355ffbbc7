import math
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pytest

from pipeline.select_mix import _sum_squares, add_up, sum_exactly
from pipeline.select_scores import Mixture, read_score

SPECIAL = [0.0, -0.0, 5e-324, -5e-324, 2.2e-308, 1.7e308, -1.7e308, 0.1, 1 / 3, -1e-17, 2**53 + 2.0]


@pytest.mark.parametrize("seed", range(5))
def test_sums_are_exact_in_any_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = np.concatenate([SPECIAL, rng.normal(0, 1, 3000) * 10.0 ** rng.integers(-200, 200, 3000)])
    parts = np.split(rng.permutation(values), [1, 7, 2000])
    assert add_up(sum(sum_exactly(part) for part in parts)) == sum(map(Fraction, values.tolist()), Fraction(0))


def test_squares_are_exact() -> None:
    values = np.random.default_rng(0).normal(0, 1, 3000) * 10.0 ** np.random.default_rng(1).integers(-120, 120, 3000)
    assert add_up(_sum_squares(values)) == sum((Fraction(v) ** 2 for v in values.tolist()), Fraction(0))


def test_a_whole_batch_of_the_largest_mantissas_fits() -> None:
    values = np.full(65_536, math.nextafter(1, 0))
    assert add_up(sum_exactly(values)) == 65_536 * Fraction(values[0].item())
    assert add_up(sum_exactly(-values)) == -65_536 * Fraction(values[0].item())


def test_a_mixture_has_a_score_where_every_column_has_a_number() -> None:
    a = pa.array([1.0, 2.0, None, math.nan, math.inf, 1e200, 4.0], pa.float64())
    b = pa.array([10, 20, 30, 40, 50, 60, None], pa.int32())
    batch = pa.RecordBatch.from_pydict({"a": a, "b": b})
    mixture = Mixture(("a", "b"), (0.5, -2.0), (1.0, 10.0), (4.0, 0.0))
    np.testing.assert_equal(read_score(mixture, batch), [0, 0.125, *[math.nan] * 5])
    plain = Mixture(("b",), (2.0,), (10.0,), (5.0,))
    np.testing.assert_equal(read_score(plain, batch), [0, 4, 8, 12, 16, 20, math.nan])
