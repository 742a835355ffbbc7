"""Which rows a batch gets: (seed, position) -> row, by name.  Pure, so that the position is all the state there is.

exact      epoch after epoch, every row floor or ceil of its share, and copies of one row in different batches
datacomp   shards drawn with replacement and read whole, as open_clip's --dataset-resampled, which DataComp's runs use

`exact` lays the epochs of order.py end to end.  Where a batch would hold two copies of a row (index.py: twin_N), or, as
it spans two epochs, a row of the last twice, the second changes places with a row of another batch, and nothing else
moves.  A row with more copies than its epoch has batches cannot be kept apart: what is over stays where it fell.

With `window_shards`, for object stores, an epoch draws an order of its shards, and its rows come window after window of
that many shards, shuffled within each; what makes it exact is the same, and a row changes places within its window
where it can.  The rows of a batch stand in the order of their shards, so that each of several processes needs few.

`datacomp` differs from open_clip 3.3.0 data.py in what made that stream irreproducible or cut it: one stream for the
run, not one per loader process, so a batch comes from one or two shards and not from one per GPU; rows are shuffled
within windows of WINDOW_ROWS of the stream, not through a buffer of that size; no buffer is thrown away when a
checkpoint is written; an unreadable row is replaced, not left out; the budget is exact.  What is the same: each draw
takes every shard with equal chance, whatever its size, so that all rows have one expectation, the count of a shard is
binomial, and after n rows of N a share of about exp(-n / N) was never seen.  A set with a share has its shards drawn as
often as gives its rows that share.  Copies of a row may meet in a batch, as they do there.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from training.index import RowIndex
from training.order import draw_uniform, hash_counters, order_epoch, order_shards, shuffle_window

WINDOW_ROWS = 5000
"""open_clip's shuffle buffer."""
DRAWS_AT_ONCE = 4096


class Sampler(Protocol):
    """What a name stands for."""

    window_rows: int
    """Rows that come from few shards; 0 if they come from all."""

    def rows_at(self, positions: range) -> np.ndarray:
        """Return int64 (positions,): the row at each."""


def open_sampler(name: str, index: RowIndex, *, batch_size: int, seed: int, window_shards: int = 0) -> Sampler:
    """Return the sampler of that name over the rows of an index; a window is of `exact` alone."""
    if name == "datacomp":
        return DatacompSampler(index, seed=seed)
    return ExactSampler(index, batch_size=batch_size, seed=seed, window_shards=window_shards)


@dataclass(slots=True)
class Epoch:
    """The rows of one epoch, in order, and where it is cut."""

    number: int
    order: np.ndarray
    """The row at each place."""
    twin_P: np.ndarray
    """What its copies share."""
    edges: list[int]
    """Where the batches begin, and where the epoch ends; the first and last may be parts of one."""
    windows: list[int]
    """The same of its windows, which are whole."""
    everywhere: set[int] = field(default_factory=set)
    """Twins that every batch was found to hold.  No swap changes that, so no other copy need look for a place."""

    @property
    def batch_P(self) -> np.ndarray:
        """The batch of each place."""
        return np.repeat(np.arange(len(self.edges) - 1), np.diff(self.edges))

    def list_batches(self, place: int, allowed: range) -> Iterator[range]:
        """Yield the allowed batches that lie in the place's window, then all that are allowed."""
        window = bisect_right(self.windows, place)
        first = bisect_left(self.edges, self.windows[window - 1])
        stop = bisect_right(self.edges, self.windows[window]) - 1
        near = range(max(first, allowed.start), min(stop, allowed.stop))
        if near and near != allowed:
            yield near
        yield allowed


class ExactSampler:
    """Every row floor or ceil of its share, copies apart.  What it keeps are the last two epochs, to save work."""

    def __init__(self, index: RowIndex, *, batch_size: int, seed: int, window_shards: int = 0) -> None:
        self.sets = tuple((part.num_rows, part.per_epoch) for part in index.sets)
        self.length = sum(per_epoch for _, per_epoch in self.sets)
        self.batch_size, self.seed = batch_size, seed
        distinct, self.twin_N = np.unique(index.twin_N, return_inverse=True)
        repeats = any(per_epoch > num_rows for num_rows, per_epoch in self.sets)
        self.may_meet = repeats or len(distinct) < index.num_rows
        self.num_windows, self.window_rows = 1, 0
        if window_shards:
            shards, self.shard_N = np.unique(index.tar_N, return_inverse=True)
            self.num_shards = len(shards)
            self.num_windows = -(-self.num_shards // window_shards)
            self.window_rows = -(-self.length // self.num_windows)
        self._orders: dict[int, np.ndarray] = {}

    def rows_at(self, positions: range) -> np.ndarray:
        """Return int64 (positions,): the row at each."""
        epochs = range(positions.start // self.length, -(-positions.stop // self.length))
        pieces = []
        for epoch in epochs:
            start = epoch * self.length
            pieces.append(self._order(epoch)[max(0, positions.start - start) : positions.stop - start])
        return np.concatenate(pieces).astype(np.int64)

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            while len(self._orders) > 1:
                del self._orders[next(iter(self._orders))]
            self._orders[epoch] = self._make_order(epoch)
        return self._orders[epoch]

    def _make_order(self, epoch: int) -> np.ndarray:
        """Return the rows of an epoch, none in its first batch that the epoch before puts there.

        Rows of that batch change places with rows of whole batches only, so the last one holds what _part_twins put
        there, and no epoch depends on more than the one before.
        """
        drawn = self._part_twins(epoch)
        before = min(epoch * self.length % self.batch_size, self.length)
        if before:
            kept = self._orders.get(epoch - 1)
            last = (self._part_twins(epoch - 1).order if kept is None else kept)[-before:]
            whole = range(1, len(drawn.edges) - 1 - bool((epoch + 1) * self.length % self.batch_size))
            end, theirs = drawn.edges[1], self.twin_N[last]
            for place in np.flatnonzero(np.isin(drawn.twin_P[:end], theirs)):
                self._swap_away(drawn, int(place), np.concatenate([theirs, drawn.twin_P[:end]]), whole)
        return self._sort_batches(drawn) if self.window_rows else drawn.order

    def _part_twins(self, epoch: int) -> Epoch:
        """Return an epoch with no two copies in one batch as far as this epoch fills it."""
        drawn = self._draw(epoch)
        if not self.may_meet:
            return drawn
        twin_P, batch_P, edges = drawn.twin_P, drawn.batch_P, drawn.edges
        by_batch = np.lexsort((twin_P, batch_P))
        same = (np.diff(twin_P[by_batch]) == 0) & (np.diff(batch_P[by_batch]) == 0)
        for place in np.sort(by_batch[1:][same]):
            own = twin_P[edges[batch_P[place]] : edges[batch_P[place] + 1]]
            if (own == twin_P[place]).sum() > 1:
                self._swap_away(drawn, int(place), own, range(len(edges) - 1))
        return drawn

    def _draw(self, epoch: int) -> Epoch:
        """Return an epoch as it is drawn; of one window, in the order of order.py, else that order window by window."""
        order = order_epoch(self.seed, epoch, self.sets).copy()
        windows = [0, self.length]
        if self.num_windows > 1:
            window_P = (self._place_shards(epoch) * self.num_windows // self.num_shards)[self.shard_N[order]]
            order = order[np.argsort(window_P, kind="stable")]
            windows = [0, *np.cumsum(np.bincount(window_P, minlength=self.num_windows)).tolist()]
        first = -epoch * self.length % self.batch_size
        edges = [0, *range(first or self.batch_size, self.length, self.batch_size), self.length]
        return Epoch(epoch, order, self.twin_N[order], edges, windows)

    def _place_shards(self, epoch: int) -> np.ndarray:
        """Return int64 (shards,): the place of each in an epoch."""
        return np.argsort(order_shards(self.seed, epoch, self.num_shards))

    def _sort_batches(self, drawn: Epoch) -> np.ndarray:
        """Return the order with the rows of each batch in the order of their shards."""
        place_P = self._place_shards(drawn.number)[self.shard_N[drawn.order]]
        sorted_order: np.ndarray = drawn.order[np.lexsort((place_P, drawn.batch_P))]
        return sorted_order

    def _swap_away(self, drawn: Epoch, place: int, taken: np.ndarray, batches: range) -> None:
        """Let a row change places with one of another batch: none there is its copy, and that one's is not in `taken`.

        The search starts at a batch drawn by (seed, position).  Where no batch will do the row stays.
        """
        twin, lacking = int(drawn.twin_P[place]), 0
        if twin in drawn.everywhere:
            return
        position = np.array([drawn.number * self.length + place])
        number = int(hash_counters(self.seed ^ (0xA9A7 << 32), position, 1)[0, 0])
        for near in drawn.list_batches(place, batches):
            for shift in range(len(near)):
                batch = near[(number + shift) % len(near)]
                theirs = drawn.twin_P[drawn.edges[batch] : drawn.edges[batch + 1]]
                lacking += twin not in theirs
                free = () if twin in theirs else np.flatnonzero(~np.isin(theirs, taken))
                if len(free):
                    other = drawn.edges[batch] + free[number % len(free)]
                    for values in (drawn.order, drawn.twin_P):
                        values[[place, other]] = values[[other, place]]
                    return
        if not lacking:
            drawn.everywhere.add(twin)


class DatacompSampler:
    """Shards with replacement, read whole.  What it keeps is which shards were drawn so far, 16 bytes each."""

    def __init__(self, index: RowIndex, *, seed: int) -> None:
        _, self.first_S, self.num_S = np.unique(index.tar_N, return_index=True, return_counts=True)
        weights = np.concatenate([np.full(part.num_rows, part.per_epoch / part.num_rows) for part in index.sets])
        self.chance_S = np.cumsum(weights[self.first_S]) / weights[self.first_S].sum()
        self.seed, self.window_rows = seed, max(WINDOW_ROWS, int(self.num_S.max()))
        self.shard_D, self.end_D = np.empty(0, np.int64), np.empty(0, np.int64)

    def rows_at(self, positions: range) -> np.ndarray:
        """Return int64 (positions,): the row at each."""
        windows = range(positions.start // WINDOW_ROWS, -(-positions.stop // WINDOW_ROWS))
        places = np.concatenate([w * WINDOW_ROWS + shuffle_window(self.seed, w, WINDOW_ROWS) for w in windows])
        start = positions.start - windows.start * WINDOW_ROWS
        place_P = places[start : start + len(positions)]
        self._draw_until(int(windows.stop) * WINDOW_ROWS)
        draw_P = np.searchsorted(self.end_D, place_P, side="right")
        shard_P = self.shard_D[draw_P]
        rows: np.ndarray = self.first_S[shard_P] + place_P - (self.end_D[draw_P] - self.num_S[shard_P])
        return rows

    def _draw_until(self, num_rows: int) -> None:
        """Draw shards until they hold that many rows."""
        while not len(self.end_D) or self.end_D[-1] < num_rows:
            drawn = len(self.end_D)
            more = max(DRAWS_AT_ONCE, drawn)
            uniform_D = draw_uniform(self.seed ^ (0x54A2 << 32), np.arange(drawn, drawn + more), 1)[:, 0]
            shard_D = np.minimum(np.searchsorted(self.chance_S, uniform_D, side="right"), len(self.first_S) - 1)
            ends = np.cumsum(self.num_S[shard_D]) + (self.end_D[-1] if drawn else 0)
            self.shard_D, self.end_D = np.append(self.shard_D, shard_D), np.append(self.end_D, ends)
