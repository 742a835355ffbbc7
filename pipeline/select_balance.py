"""Balancing by metadata entries (MetaCLIP, Xu et al. 2024, arXiv:2309.16671, metaclip/balancing.py): coins per entry.

Held is a number per entry.  A coin is a seeded hash of uid and entry, so it falls alike wherever the row stands.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import PoolError
from pipeline.schemas import UID
from pipeline.select_draw import STEP, mix_words, shuffle_uids
from pipeline.select_rules import Balance
from pipeline.select_source import Rows, Source
from pipeline.select_table import PartGroup, Passing, ScoreTable, read_passing
from pipeline.uid import parse_uids

MAX_ENTRIES = 1 << 24


@dataclass(frozen=True, slots=True)
class Coins:
    """What a balance step came down to: rows with an entry whose coin says so."""

    entries: str
    seed: int
    limit_E: np.ndarray
    """uint64: coins below it succeed."""
    sure_E: np.ndarray
    """bool: entries that keep every row."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Score columns that it reads."""
        return (self.entries,)

    @property
    def needs_uids(self) -> bool:
        """Whether it reads the uid."""
        return not self.sure_E.all()

    def passes(self, batch: pa.RecordBatch) -> np.ndarray:
        """Return bool (rows,); a row without entries does not pass."""
        rows, entries = read_entries(self.entries, batch)
        known = (entries >= 0) & (entries < len(self.sure_E))  # other entries are of rows that have not passed
        rows, entries = rows[known], entries[known]
        succeeds = self.sure_E[entries]
        if self.needs_uids:
            succeeds = succeeds | (self.throw(batch, rows, entries) < self.limit_E[entries])
        kept = np.zeros(batch.num_rows, bool)
        kept[rows[succeeds]] = True
        return kept

    def throw(self, batch: pa.RecordBatch, rows: np.ndarray, entries: np.ndarray) -> np.ndarray:
        """Return the coins, uint64, of pairs of a row and an entry."""
        keys = shuffle_uids(parse_uids(batch.column(UID)), self.seed)["f0"]
        return mix_words(keys[rows] + (entries + 1).astype(np.uint64) * np.uint64(STEP))


def read_entries(column: str, batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray]:
    """Return (rows, entries) int64 of each pair; -1 is an entry that is null."""
    lists = batch.column(column)
    rows, entries = pc.list_parent_indices(lists).to_numpy().astype(np.int64), pc.list_flatten(lists)
    return rows, pc.fill_null(entries.cast(pa.int64(), safe=False), -1).to_numpy()


def cut_balance(source: Source, rows: Rows, balance: Balance) -> tuple[Coins, int, int, dict[str, Any]]:
    """Return what a balance step comes down to, how many rows it keeps, how many have no list, and what it found."""
    ends = source.list_groups(partial(find_last_entry, source.table, rows.passing, balance.entries), 1)
    num_entries = int(ends.max(initial=0))
    work = partial(count_entries, source.table, rows.passing, balance.entries, num_entries)
    missing, empty, *counts = source.sum_groups(work, 2 + num_entries).tolist()
    limits = [((balance.t << 64) // count if count > balance.t else 0) for count in counts]
    sure_E = np.array(counts, np.int64) <= balance.t
    coins = Coins(balance.entries, balance.seed, np.array(limits, np.uint64), sure_E)
    kept = int(source.sum_groups(partial(count_kept, source.table, rows.passing, coins), 1)[0])
    found = {"entries": sum(count > 0 for count in counts), "frequent": int((~sure_E).sum()), "without_entry": empty}
    return coins, kept, missing, found


def _read_lists(
    table: ScoreTable, passing: Passing, column: str, group: PartGroup
) -> Iterator[tuple[pa.Array, np.ndarray, np.ndarray]]:
    """Yield (lists of the passing rows, their pairs' rows, their pairs' entries) of each batch."""
    for part in group.parts:
        for batch, kept in read_passing(table, passing, part, [column]):
            some = batch.select([column]).filter(pa.array(kept))
            yield some.column(column), *read_entries(column, some)


def find_last_entry(table: ScoreTable, passing: Passing, column: str, group: PartGroup) -> np.ndarray:
    """Return int64 (1,): 1 + the largest entry of the passing rows.

    Raises PoolError for an entry that is null, negative, or of MAX_ENTRIES and more.
    """
    end = 0
    for _, _, entries in _read_lists(table, passing, column, group):
        end = max(end, int(entries.max(initial=-1)) + 1)
        if end > MAX_ENTRIES or (entries < 0).any():
            wrong = end - 1 if end > MAX_ENTRIES else "null or less than 0"
            raise PoolError(f"a list of {column} has entry {wrong}; entries are numbers in [0, {MAX_ENTRIES:,}).")
    return np.array([end], np.int64)


def count_entries(table: ScoreTable, passing: Passing, column: str, num_entries: int, group: PartGroup) -> np.ndarray:
    """Return int64 (2 + E,) of the passing rows: those without a list, with an empty one, and with each entry."""
    total = np.zeros(2 + num_entries, np.int64)
    for lists, rows, entries in _read_lists(table, passing, column, group):
        total[0] += lists.null_count
        total[1] += len(lists) - lists.null_count - len(np.unique(rows))
        total[2:] += np.bincount(entries, minlength=num_entries)
    return total


def count_kept(table: ScoreTable, passing: Passing, coins: Coins, group: PartGroup) -> np.ndarray:
    """Return int64 (1,): how many of the passing rows the coins keep."""
    kept_by_both = passing.add(coins)
    batches = (found for part in group.parts for found in read_passing(table, kept_by_both, part, []))
    return np.array([sum(int(kept.sum()) for _, kept in batches)])
