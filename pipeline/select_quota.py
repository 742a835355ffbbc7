"""Quotas per cluster (DBP, Abbas et al. 2024, arXiv:2401.04578): complexity, how many rows to keep, and which.

Held are a few numbers per cluster.  Distances are summed in steps of 2^-30, so that no sum depends on an order.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import PoolError
from pipeline.schemas import UID
from pipeline.select_bounds import Bounds, Digit, count_digits, find_bounds, is_within
from pipeline.select_draw import shuffle_uids
from pipeline.select_radix import key_bits, order_keys
from pipeline.select_rules import Quota
from pipeline.select_scores import to_floats
from pipeline.select_source import Rows, Source
from pipeline.select_table import PartGroup, Passing, ScoreTable, read_passing
from pipeline.uid import parse_uids

MAX_CLUSTERS = 1 << 20
STEPS = 1 << 30
"""Steps of a distance of 1."""
FARTHEST = 64
"""Distances lie within this: 65,536 of them, in steps, are a whole number that float64 holds."""


@dataclass(frozen=True, slots=True)
class Order:
    """The order of rows within their clusters: what a quota keeps comes first."""

    cluster: str
    distance: str
    keep: Literal["hard", "easy", "random"]
    seed: int
    bits: int
    """Of the order keys of distances."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Score columns that it reads."""
        return (self.cluster, self.distance)

    @property
    def word_bits(self) -> list[int]:
        """Bits of each word of a row's key."""
        return [64, 64] if self.keep == "random" else [self.bits, 64, 64]

    def needs_uids(self, num_words: int) -> bool:
        """Return whether so many words of the keys have the uid in them."""
        return num_words > (0 if self.keep == "random" else 1)

    def read(self, batch: pa.RecordBatch, num_words: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """Return the rows' clusters, int64 (rows,), -1 where they have none, and the first words of their keys."""
        clusters, distances = read_clusters(self.cluster, self.distance, batch)
        uids = parse_uids(batch.column(UID)) if self.needs_uids(num_words) else None
        if self.keep == "random":
            return clusters, [] if uids is None else _split_words(shuffle_uids(uids, self.seed))[:num_words]
        keys = order_keys(np.nan_to_num(distances))
        words = [(np.invert(keys) if self.keep == "hard" else keys).astype(np.uint64)]
        return clusters, words if uids is None else [*words, *_split_words(uids)][:num_words]


def _split_words(uids: np.ndarray) -> list[np.ndarray]:
    return [np.ascontiguousarray(uids[word]) for word in ("f0", "f1")]


def read_clusters(cluster: str, distance: str, batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray]:
    """Return clusters int64 (rows,), -1 where a row has no cluster or no distance, and distances (rows,) of floats."""
    distances = to_floats(batch.column(distance))
    clusters = pc.fill_null(batch.column(cluster).cast(pa.int64(), safe=False), -1).to_numpy()
    return np.where(np.isnan(distances) | (clusters < 0), -1, clusters), distances


@dataclass(frozen=True, slots=True)
class QuotaCut:
    """What a quota step came down to: the last key that each cluster keeps."""

    order: Order
    bounds: Bounds
    num_words: int
    """Words of the keys that have to be compared: uids need not be where no cluster ends among equal distances."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Score columns that it reads."""
        return self.order.columns

    @property
    def needs_uids(self) -> bool:
        """Whether it reads the uid."""
        return self.order.needs_uids(self.num_words)

    def passes(self, batch: pa.RecordBatch) -> np.ndarray:
        """Return bool (rows,); a row without a cluster or a distance does not pass."""
        return is_within(*self.order.read(batch, self.num_words), self.bounds)


def cut_quota(source: Source, rows: Rows, quota: Quota) -> tuple[QuotaCut, int, int, dict[str, Any]]:
    """Return what a quota step comes down to, how many rows it keeps, how many it cannot judge, and what it found."""
    num_K, complexity_K = _measure_clusters(source, rows.passing, quota)
    num_scored = int(num_K.sum())
    wanted = min(quota.count_wanted(num_pool=source.num_pool, num_input=num_scored), num_scored)
    quota_K = allot(num_K, complexity_K, wanted, temperature=quota.temperature, min_share=quota.min_share)
    order = Order(quota.cluster, quota.distance, quota.keep, quota.seed, key_bits(source.types[quota.distance]))

    def count_pass(digit: Digit, words_KW: np.ndarray, open_K: np.ndarray) -> np.ndarray:
        work = partial(count_order, source.table, rows.passing, order, digit, words_KW, open_K)
        return source.sum_groups(work, len(open_K) << digit.width).reshape(len(open_K), -1)

    bounds = find_bounds(count_pass, quota_K, order.word_bits)
    kept_K = bounds.num_K[num_K > 0]
    found = {"clusters": len(kept_K)}
    if len(kept_K):
        found |= {"fewest": int(kept_K.min()), "most": int(kept_K.max())}
    ends_in_uids = (bounds.words_KW[bounds.any_K, 1:] != np.uint64(2**64 - 1)).any()
    cut = QuotaCut(order, bounds, len(order.word_bits) if ends_in_uids else 1)
    return cut, int(kept_K.sum()), rows.num - num_scored, found


def _measure_clusters(source: Source, passing: Passing, quota: Quota) -> tuple[np.ndarray, np.ndarray]:
    """Return int64 (K,) rows and float64 (K,) complexity of each cluster, NaN where that is not known."""
    columns = (quota.cluster, quota.distance, quota.isolation)
    last = source.list_groups(partial(find_last_cluster, source.table, passing, columns), 1).max(initial=0)
    num_clusters = int(last)
    work = partial(sum_clusters, source.table, passing, columns, num_clusters)
    sums = source.sum_groups(work, 4 * num_clusters).reshape(4, num_clusters)
    num_K, distance_K, num_isolated_K, isolation_K = sums
    with np.errstate(invalid="ignore"):
        return num_K, (distance_K / num_K / STEPS) * (isolation_K / num_isolated_K / STEPS)


def find_last_cluster(
    table: ScoreTable, passing: Passing, columns: tuple[str, str, str], group: PartGroup
) -> np.ndarray:
    """Return int64 (1,): 1 + the largest cluster of the passing rows.

    Raises PoolError for a cluster of MAX_CLUSTERS or more, or a distance or isolation that is not within FARTHEST.
    """
    last = -1
    for part in group.parts:
        for batch, kept in read_passing(table, passing, part, columns):
            last = max(last, read_clusters(*columns[:2], batch)[0][kept].max(initial=-1))
            for column in columns[1:]:
                values = to_floats(batch.column(column))[kept]
                if (np.abs(values) > FARTHEST).any():
                    far = np.nanmax(np.abs(values))
                    raise PoolError(f"{column} has {far}; a quota's distances lie within {FARTHEST}. Scale the column.")
    if last >= MAX_CLUSTERS:
        raise PoolError(f"{columns[0]} has cluster {last}; a quota's are below {MAX_CLUSTERS:,}. Number them anew.")
    return np.array([last + 1], np.int64)


def sum_clusters(
    table: ScoreTable, passing: Passing, columns: tuple[str, str, str], num_clusters: int, group: PartGroup
) -> np.ndarray:
    """Return int64 (4 x K,) of the passing rows: rows, distances in steps, rows with an isolation, these in steps."""
    total = np.zeros((4, num_clusters), np.int64)
    for part in group.parts:
        for batch, kept in read_passing(table, passing, part, columns):
            clusters, distances = read_clusters(*columns[:2], batch)
            kept &= clusters >= 0
            isolated = read_clusters(columns[0], columns[2], batch)[0] >= 0
            total[:2] += _sum_steps(clusters[kept], distances[kept], num_clusters)
            kept &= isolated
            total[2:] += _sum_steps(clusters[kept], to_floats(batch.column(columns[2]))[kept], num_clusters)
    return total.reshape(-1)


def _sum_steps(clusters: np.ndarray, values: np.ndarray, num_clusters: int) -> np.ndarray:
    """Return int64 (2, K): rows and sums in steps of each cluster."""
    steps = np.rint(values.astype(np.float64) * STEPS)
    return np.stack([np.bincount(clusters, w, num_clusters).astype(np.int64) for w in (None, steps)])


def count_order(
    table: ScoreTable,
    passing: Passing,
    order: Order,
    digit: Digit,
    words_KW: np.ndarray,
    open_K: np.ndarray,
    group: PartGroup,
) -> np.ndarray:
    """Return count_digits of the passing rows."""
    total = np.zeros(len(open_K) << digit.width, np.int64)
    num_words = digit.word + 1
    for part in group.parts:
        for batch, kept in read_passing(table, passing, part, order.columns, uids=order.needs_uids(num_words)):
            clusters, words = order.read(batch, num_words)
            total += count_digits(np.where(kept, clusters, -1), words, digit, words_KW, open_K)
    return total


def allot(
    num_K: np.ndarray, complexity_K: np.ndarray, wanted: int, *, temperature: float, min_share: float
) -> np.ndarray:
    """Return int64 (K,): how many rows each cluster keeps, `wanted` in all, of num_K; 0 of a cluster without rows.

    They minimise |n - wanted P|^2 with P = softmax(complexity / temperature), between the least and all rows of each
    cluster, and are then rounded to whole numbers of the same sum.  An unknown complexity (NaN) is the mean of others.
    """
    quota_K = np.zeros(len(num_K), np.int64)
    full = num_K > 0
    if wanted and full.any():
        complexity = complexity_K[full]
        known = complexity[~np.isnan(complexity)]
        complexity = np.where(np.isnan(complexity), known.mean() if len(known) else 0, complexity)
        weights = np.exp((complexity - complexity.max()) / temperature)
        most = num_K[full]
        least = int(min_share * wanted / len(most)) if min_share else min(1, wanted // len(most))
        aims = project(weights / weights.sum() * wanted, np.minimum(least, most - 1), most, wanted)
        quota_K[full] = round_to_sum(aims, most, wanted)
    return quota_K


def project(aims: np.ndarray, low: np.ndarray, high: np.ndarray, total: int) -> np.ndarray:
    """Return the float64 (K,) nearest to `aims` with low <= n <= high and sum `total`, which lies between their sums.

    The solution is clip(aims + shift, low, high); the sum grows with the shift and is linear between the places where
    an element meets a bound, so the right piece is found by bisection among these: O(K log K), and exact.
    """
    places = np.sort(np.concatenate([low - aims, high - aims]))
    first, last = 0, len(places) - 1  # the shift lies between these places
    while last - first > 1:
        middle = (first + last) // 2
        below = np.clip(aims + places[middle], low, high).sum() <= total
        first, last = (middle, last) if below else (first, middle)
    between = (places[first] + places[last]) / 2
    free = (low < aims + between) & (aims + between < high)
    fixed = np.clip(aims + between, low, high)
    shift = (total - fixed[~free].sum() - aims[free].sum()) / free.sum() if free.any() else between
    nearest: np.ndarray = np.where(free, np.clip(aims + shift, low, high), fixed)
    return nearest


def round_to_sum(values: np.ndarray, most: np.ndarray, total: int) -> np.ndarray:
    """Return int64 (K,) of sum `total`: each value rounded down, or up where most is left over; equal ones by place."""
    values = np.round(values, 6)
    whole: np.ndarray = np.minimum(np.floor(values), most).astype(np.int64)
    order = np.argsort(whole - values, kind="stable")
    order = order[whole[order] < most[order]]
    whole[order[: total - whole.sum()]] += 1
    return whole
