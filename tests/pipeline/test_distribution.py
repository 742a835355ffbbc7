"""Ranks, quantiles, histogram and sample of a stored column, against numpy over the whole column."""

import itertools
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from made_scores import shuffle, write_scores

from pipeline.distribution import NUM_BINS, QUANTILES, Column, count_scored, describe_column, draw_rows, find_ranked
from pipeline.select_table import ScoreTable


def make_column(folder: Path, values: pa.Array, parts: int = 3) -> tuple[Column, list[str]]:
    uids = [f"{(n * 0x9E3779B97F4A7C15F39CC0605CEDC835 + 5) % (1 << 128):032x}" for n in range(len(values))]
    table = pa.table({"uid": uids, "s": values})
    cuts = np.linspace(0, len(values), parts + 1).astype(int)
    pieces = {f"{n:08d}": table.slice(a, b - a) for n, (a, b) in enumerate(itertools.pairwise(cuts))}
    write_scores(folder, pieces, {"s": "f"})
    stored = ScoreTable({"f": str(folder / "f")}, {"s": "f"})
    return Column(stored, stored.measure(list(pieces)), "s", str(values.type)), uids


def make_values(kind: pa.DataType, seed: int = 3) -> pa.Array:
    rng = np.random.default_rng(seed)
    numbers = [round(float(x), 2) for x in rng.normal(0, 1, 900)] + [math.inf, -math.inf, math.nan, None, 0.0, -0.0]
    order = rng.permutation(len(numbers))
    return pa.array([numbers[n] for n in order]).cast(kind)


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()])
def test_ranks_quantiles_and_bins_are_numpys(tmp_path: Path, kind: pa.DataType) -> None:
    values = make_values(kind)
    column, _ = make_column(tmp_path / "s", values)
    numbers = np.array([np.nan if v is None else v for v in values.to_pylist()])
    scored = np.sort(numbers[~np.isnan(numbers)])[::-1]
    assert count_scored(column) == (len(scored), 1, 1)
    ranks = [1, 2, 17, 17, 450, len(scored) - 1, len(scored)]
    for rank, found in zip(ranks, find_ranked(column, ranks), strict=True):
        value = scored[rank - 1]
        above, tied = int((scored > value).sum()), int((scored == value).sum())
        assert (found.value, found.num_above, found.num_tied, found.num_taken) == (value, above, tied, rank - above)
    made = describe_column(column)
    finite = scored[np.isfinite(scored)]
    assert (made.num_rows, made.num_null, made.num_infinite) == (906, 2, 2)
    assert (made.minimum, made.maximum) == (finite.min(), finite.max())
    expected = np.quantile(finite, QUANTILES, method="inverted_cdf")
    assert list(made.quantiles.values()) == expected.tolist()
    counts, edges = np.histogram(finite, NUM_BINS, range=(finite.min(), finite.max()))
    assert made.edges == pytest.approx(edges) and sum(made.counts) == len(finite)
    assert list(made.counts) == np.histogram(finite, made.edges)[0].tolist() and abs(made.counts - counts).sum() < 4


@pytest.mark.parametrize(
    ("values", "counts"),
    [
        (pa.array([None, None], pa.float32()), []),
        (pa.array([math.inf, math.nan], pa.float32()), []),
        (pa.array([0.5, 0.5, None], pa.float64()), [2]),
        (pa.array([True, False, True, None]), [1, 2]),
        (pa.array([-3, 4, 4], pa.int32()), [1, 2]),
    ],
)
def test_odd_columns(tmp_path: Path, values: pa.Array, counts: list[int]) -> None:
    column, _ = make_column(tmp_path / "s", values, parts=1)
    made = describe_column(column)
    assert [n for n in made.counts if n] == counts and (made.minimum is None) == (not counts)
    if values.null_count < 2 and made.minimum is None:
        assert (made.num_null, made.num_infinite) == (1, 1)


def test_bins_of_numbers_whose_distance_is_no_number(tmp_path: Path) -> None:
    column, _ = make_column(tmp_path / "s", pa.array([-1.7e308, 0.0, 1.7e308, 1.7e308]), parts=1)
    made = describe_column(column)
    assert (made.edges[0], made.edges[-1]) == (-1.7e308, 1.7e308) and np.isfinite(made.edges).all()
    assert [made.counts[n] for n in (0, NUM_BINS // 2, NUM_BINS - 1)] == [1, 1, 2]


def test_a_sample_is_that_of_the_sample_step(tmp_path: Path) -> None:
    column, uids = make_column(tmp_path / "s", make_values(pa.float32()))
    drawn, num = draw_rows(column, 100, seed=5)
    chosen = sorted(range(len(uids)), key=lambda n: shuffle(uids[n], 5))[:100]
    values = np.array([np.nan if v is None else v for v in make_values(pa.float32()).to_pylist()])[chosen]
    scored = np.sort(values[~np.isnan(values)])[::-1]
    assert num == 100 and count_scored(drawn)[0] == len(scored)
    assert [found.value for found in find_ranked(drawn, [1, 15, len(scored)])] == scored[[0, 14, -1]].tolist()
    assert draw_rows(column, 906, seed=5)[1] == 906 == column.num_rows
