"""A score column in numbers: values at given ranks, quantiles and a histogram, exact and streamed.

A pass over the stored column adds up counts, so nothing of the size of the pool is held: one pass for what is finite,
two (four for float64) for all ranks at once, and one for the histogram.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from pipeline.schemas import UID
from pipeline.select_draw import Draw, shuffle_uids
from pipeline.select_radix import (
    RADIX_BITS,
    Threshold,
    count_radix,
    count_uid_radix,
    find_last_uid,
    key_bits,
    order_keys,
    value_of_key,
)
from pipeline.select_scores import to_floats
from pipeline.select_table import PartGroup, ScorePart, ScoreTable, group_parts, sum_in_threads
from pipeline.uid import parse_uids

NUM_BUCKETS = 1 << RADIX_BITS
NUM_BINS = 50
QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.85, 0.9, 0.95, 0.99)


@dataclass(frozen=True, slots=True)
class Column:
    """One stored score column, all its rows or a sample of them."""

    table: ScoreTable
    parts: Sequence[ScorePart]
    by: str
    kind: str
    """Name of its Arrow type."""
    draw: Draw | None = None
    """Which rows are looked at; None: all."""

    @property
    def num_rows(self) -> int:
        """Rows of all parts, drawn or not."""
        return sum(part.num_rows for part in self.parts)

    def sum(self, count: Callable[[np.ndarray], np.ndarray], size: int) -> np.ndarray:
        """Return the sum of count(values), int64 (size,), over all batches; NaN stands for null."""
        return sum_in_threads(partial(self._count_group, count, size), group_parts(self.parts), size)

    def _count_group(self, count: Callable[[np.ndarray], np.ndarray], size: int, group: PartGroup) -> np.ndarray:
        return sum((count(values) for part in group.parts for values in self._read(part)), np.zeros(size, np.int64))

    def _read(self, part: ScorePart) -> Iterator[np.ndarray]:
        for batch in self.table.read(part.name, [self.by], uids=self.draw is not None):
            values = to_floats(batch.column(self.by))
            yield values[self.draw.passes(batch)] if self.draw else values


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """How a column's scores lie; quantiles and histogram are of the finite ones."""

    num_rows: int
    num_null: int
    """Rows without a score: null or NaN."""
    num_infinite: int
    minimum: float | None
    """None, as the maximum, when no score is finite."""
    maximum: float | None
    quantiles: Mapping[str, float]
    """Share -> the smallest score that at least this share of them does not exceed."""
    edges: Sequence[float]
    """NUM_BINS equal bins from the minimum to the maximum; a score on an edge is in the bin above it, but the last."""
    counts: Sequence[int]


def draw_rows(column: Column, num_wanted: int, seed: int) -> tuple[Column, int]:
    """Return the column of `num_wanted` rows drawn by a seeded hash of the uid, and how many they are.

    The same rows as a `sample` step draws; they are more than wanted when the last ones share a uid.
    """
    last, num_drawn = find_last_uid(partial(_count_uids, column, seed), num_wanted)
    return replace(column, draw=Draw(seed, last)), num_drawn


def _count_uids(column: Column, seed: int, prefix: int, depth: int) -> np.ndarray:
    def count(group: PartGroup) -> np.ndarray:
        total = np.zeros(NUM_BUCKETS, np.int64)
        for part in group.parts:
            for batch in column.table.read(part.name, [], uids=True):
                uids = shuffle_uids(parse_uids(batch.column(UID)), seed)
                total += count_uid_radix(uids, prefix=prefix, depth=depth)
        return total

    return sum_in_threads(count, group_parts(column.parts), NUM_BUCKETS)


def count_scored(column: Column) -> tuple[int, int, int]:
    """Return how many rows have a score, and how many of these are plus and minus infinity."""

    def count(values: np.ndarray) -> np.ndarray:
        return np.array([(~np.isnan(values)).sum(), np.isposinf(values).sum(), np.isneginf(values).sum()])

    num_scored, highest, lowest = column.sum(count, 3).tolist()
    return num_scored, highest, lowest


def find_ranked(column: Column, ranks: Sequence[int]) -> list[Threshold]:
    """Return the value at each rank among the rows with a score; rank 1 is the largest.

    There must be ranks, each in [1, such rows].
    """
    bits = key_bits(column.kind)
    places = [(0, rank) for rank in ranks]  # bits known so far, and the rank among the keys that begin with them
    for depth in range(bits // RADIX_BITS):
        prefixes = sorted({prefix for prefix, _ in places})
        count = partial(_count_keys, prefixes, depth, bits)
        counts = column.sum(count, len(prefixes) * NUM_BUCKETS).reshape(-1, NUM_BUCKETS)
        steps = [_step_down(counts[prefixes.index(prefix)], left) for prefix, left in places]
        known = [prefix << RADIX_BITS for prefix, _ in places]
        places = [(prefix | digit, left) for prefix, (digit, left, _) in zip(known, steps, strict=True)]
    return [
        Threshold(value_of_key(key, bits), rank - left, num_tied, left)
        for rank, (key, left), (_, _, num_tied) in zip(ranks, places, steps, strict=True)
    ]


def _count_keys(prefixes: Sequence[int], depth: int, bits: int, values: np.ndarray) -> np.ndarray:
    """Return int64 (prefixes x 65536,): how many order keys that begin with each prefix go on with each digit."""
    keys = order_keys(values[~np.isnan(values)])
    return np.concatenate([count_radix(keys, prefix=prefix, depth=depth, bits=bits) for prefix in prefixes])


def _step_down(counts: np.ndarray, left: int) -> tuple[int, int, int]:
    """Return the digit at which the `left`-th largest key is, its rank among those with the digit, and their number."""
    from_top = np.cumsum(counts[::-1])
    place = int(np.searchsorted(from_top, left))
    num_tied = int(counts[NUM_BUCKETS - 1 - place])
    return NUM_BUCKETS - 1 - place, left - int(from_top[place]) + num_tied, num_tied


def describe_column(column: Column) -> Distribution:
    """Return the distribution of a column, all rows looked at."""
    num_scored, highest, lowest = count_scored(column)
    num_finite = num_scored - highest - lowest
    counts = {"num_rows": column.num_rows, "num_null": column.num_rows - num_scored, "num_infinite": highest + lowest}
    if not num_finite:
        return Distribution(**counts, minimum=None, maximum=None, quantiles={}, edges=[], counts=[])
    ascending = [1, num_finite, *(max(1, math.ceil(round(share * num_finite, 6))) for share in QUANTILES)]
    found = find_ranked(column, [highest + num_finite + 1 - place for place in ascending])
    least, most, *values = (one.value for one in found)
    edges = 2 * np.linspace(least / 2, most / 2, NUM_BINS + 1)  # most - least may be no float64
    return Distribution(
        **counts,
        minimum=least,
        maximum=most,
        quantiles=dict(zip(map(str, QUANTILES), values, strict=True)),
        edges=edges.tolist(),
        counts=column.sum(partial(_count_bins, edges), NUM_BINS).tolist(),
    )


def _count_bins(edges: np.ndarray, values: np.ndarray) -> np.ndarray:
    places = np.searchsorted(edges, values[np.isfinite(values)], side="right") - 1
    return np.bincount(np.clip(places, 0, NUM_BINS - 1), minlength=NUM_BINS)
