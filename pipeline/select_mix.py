"""The numbers that normalise a mixture of score columns, over the rows that have all of them: one pass, exact sums.

Sums are of whole numbers, so they do not depend on the order of rows, parts or workers.
"""

import math
from collections.abc import Iterator
from fractions import Fraction
from functools import partial

import numpy as np

from pipeline.select_rules import Ranking
from pipeline.select_scores import Mixture, Score, read_numbers
from pipeline.select_source import Source
from pipeline.select_table import PartGroup, Passing, ScoreTable, read_passing

DIGITS, HALF = 53, 26
"""Bits of a float64's mantissa, and of its lower half."""
PLACES = 2100
"""Exponents of a float64, from LOWEST on."""
LOWEST = -1074
Columns = tuple[str, ...]
Numbers = tuple[float, ...]


def find_score(source: Source, passing: Passing, rule: Ranking) -> Score:
    """Return what the rule orders rows by; a mixture with its normalisation over the passing rows."""
    if rule.mix is None:
        return rule.by or ""
    columns = tuple(rule.columns)
    weights = tuple(float(rule.mix[column]) for column in columns)
    offsets, scales = (0.0,) * len(columns), (1.0,) * len(columns)
    if rule.norm == "minmax":
        offsets, scales = _find_ranges(source, passing, columns)
    elif rule.norm == "z":
        offsets, scales = _find_moments(source, passing, columns)
    return Mixture(columns, weights, offsets, scales)


def _find_ranges(source: Source, passing: Passing, columns: Columns) -> tuple[Numbers, Numbers]:
    """Return the smallest value of each column, and its distance to the largest; 0 and 0 where there is no row."""
    work = partial(measure_ranges, source.table, passing, columns)
    found = source.list_groups(work, 2 * len(columns)).view(np.float64).reshape(-1, 2, len(columns))
    low, high = found[:, 0].min(0, initial=math.inf), found[:, 1].max(0, initial=-math.inf)
    low, high = (np.where(low > high, 0, ends) for ends in (low, high))
    return tuple(low.tolist()), tuple((high - low).tolist())


def measure_ranges(table: ScoreTable, passing: Passing, columns: Columns, group: PartGroup) -> np.ndarray:
    """Return the bits of the smallest and the largest value of each column, (2 x columns,)."""
    ends = np.repeat([[math.inf], [-math.inf]], len(columns), 1)
    for values in _read_whole_rows(table, passing, columns, group):
        ends[0] = np.minimum(ends[0], values.min(1, initial=math.inf))
        ends[1] = np.maximum(ends[1], values.max(1, initial=-math.inf))
    found: np.ndarray = ends.reshape(-1).view(np.int64)
    return found


def _find_moments(source: Source, passing: Passing, columns: Columns) -> tuple[Numbers, Numbers]:
    """Return mean and standard deviation of each column; 0 and 0 where there is no row."""
    work = partial(sum_moments, source.table, passing, columns)
    found = source.sum_groups(work, 1 + 4 * PLACES * len(columns))
    num = max(int(found[0]), 1)
    means, deviations = [], []
    for sums in found[1:].reshape(len(columns), 2, 2 * PLACES):
        mean, square = add_up(sums[0]) / num, add_up(sums[1]) / num
        means.append(float(mean))
        deviations.append(math.sqrt(max(float(square - mean * mean), 0)))
    return tuple(means), tuple(deviations)


def sum_moments(table: ScoreTable, passing: Passing, columns: Columns, group: PartGroup) -> np.ndarray:
    """Return the number of rows, and of each column the sums of values and of squares as sum_exactly has them."""
    total = np.zeros(1 + 4 * PLACES * len(columns), np.int64)
    for values in _read_whole_rows(table, passing, columns, group):
        total[0] += values.shape[1]
        total[1:] += np.concatenate([sums for row in values for sums in (sum_exactly(row), _sum_squares(row))])
    return total


def _sum_squares(values: np.ndarray) -> np.ndarray:
    """Return sum_exactly of the squares: those of two halves of 26 bits (Veltkamp 1968) are float64 numbers."""
    wide = values * ((1 << HALF + 1) + 1)
    high = wide - (wide - values)
    low = values - high
    sums: np.ndarray = sum_exactly(high * high) + sum_exactly(2 * high * low) + sum_exactly(low * low)
    return sums


def _read_whole_rows(table: ScoreTable, passing: Passing, columns: Columns, group: PartGroup) -> Iterator[np.ndarray]:
    """Yield float64 (columns, rows) of the passing rows that have a number in each column."""
    for part in group.parts:
        for batch, kept in read_passing(table, passing, part, columns):
            values = read_numbers(columns, batch)
            yield values[:, kept & ~np.isnan(values).any(0)]


def sum_exactly(values: np.ndarray) -> np.ndarray:
    """Return int64 (2 x PLACES,): sums of the halves of the mantissas of float64 (rows,), by exponent.

    Such arrays can be added: what add_up makes of them is the sum of all the values, and nothing is rounded.
    """
    mantissas, exponents = np.frexp(values)
    whole, places = np.ldexp(mantissas, DIGITS).astype(np.int64), exponents - LOWEST
    halves = (whole >> HALF, whole & ((1 << HALF) - 1))  # of at most 65,536 rows, so that float64 holds their sums
    sums: np.ndarray = np.concatenate([np.bincount(places, half, PLACES) for half in halves]).astype(np.int64)
    return sums


def add_up(sums: np.ndarray) -> Fraction:
    """Return the sum of the values that sum_exactly has seen."""
    high, low = (half.tolist() for half in np.split(sums, 2))
    total = sum(((h << HALF) + part) << place for place, (h, part) in enumerate(zip(high, low, strict=True)))
    return Fraction(total) * Fraction(2) ** (LOWEST - DIGITS)
