"""A recipe's steps run over stored scores: an account and a threshold per step, and the kept uids as sorted runs.

Every pass reads files and returns a few counts, so nothing of the size of the pool is ever in one place.  `top` steps
need no Spark: a pass is a function of some parts, and runs on threads here or on a cluster's workers.  `where` steps
that follow each other are one Spark job (select_sql.py), which leaves a bit per row.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import PoolError, StageError
from pipeline.manifest import Counts
from pipeline.schemas import UID
from pipeline.select import (
    NO_SCORE,
    RADIX_BITS,
    Step,
    Threshold,
    Top,
    count_radix,
    count_uid_radix,
    find_last_uid,
    find_threshold,
    key_bits,
    order_keys,
)
from pipeline.select_sql import filter_rows
from pipeline.select_table import (
    Cut,
    PartGroup,
    Passing,
    ScorePart,
    ScoreTable,
    Spread,
    group_parts,
    read_passing,
    sum_in_threads,
    to_floats,
)
from pipeline.storage import join
from pipeline.subset_runs import write_run
from pipeline.uid import parse_uids

NUM_BUCKETS = 1 << RADIX_BITS
RUN_ROWS = 1 << 19
RUNS, MASKS = "runs", "masks"


@dataclass(frozen=True, slots=True)
class Source:
    """Stored scores, measured."""

    table: ScoreTable
    parts: Sequence[ScorePart]
    types: Mapping[str, str]
    """Column -> name of its Arrow type."""
    num_pool: int
    """Rows that `of: pool` is a share of."""
    start: Callable[[], Any]
    """Returns the Spark session."""
    spread: Spread = sum_in_threads

    @property
    def num_rows(self) -> int:
        """Rows of all parts."""
        return sum(part.num_rows for part in self.parts)

    def sum_groups(self, work: Callable[[PartGroup], np.ndarray], size: int = NUM_BUCKETS) -> np.ndarray:
        """Return the sum of work(group), int64 (size,), over all parts."""
        return self.spread(work, group_parts(self.parts), size)


@dataclass(frozen=True, slots=True)
class Selection:
    """What a recipe's steps kept."""

    rows: int
    runs: str
    """Folder of the kept uids (subset_runs.py)."""
    counts: Mapping[str, Counts]
    """One account per step, in order."""
    thresholds: Mapping[str, float | None]
    """The smallest score that passed each `top` step; None when it kept nothing."""


def select_rows(source: Source, steps: Sequence[Step], scratch: str) -> Selection:
    """Run the steps; files go to SCRATCH.  Raises ConfigError for SQL that Spark cannot read."""
    passing, num_rows = Passing(), source.num_rows
    counts: dict[str, Counts] = {}
    thresholds: dict[str, float | None] = {}
    for is_top, alike in groupby(steps, key=lambda step: step.top is not None):
        block = list(alike)
        if is_top:
            for step in block:
                assert step.top
                cut, counts[step.name] = _cut(source, passing, step.name, step.top, num_rows)
                passing, num_rows = passing.add(cut), counts[step.name].kept
                thresholds[step.name] = cut.value
        else:
            masks = join(scratch, f"{MASKS}-{len(counts)}")
            found = filter_rows(source.start(), source.table, passing, source.parts, block, source.types, masks)
            counts |= _account(block, num_rows, found)
            passing, num_rows = Passing(masks), counts[block[-1].name].kept
    runs = join(scratch, RUNS)
    kept = int(source.sum_groups(partial(write_kept, source.table, passing, runs), 1)[0])
    if kept != num_rows:
        raise StageError(f"select kept {kept:,} rows and counted {num_rows:,}: scores changed while they were read.")
    return Selection(kept, runs, counts, thresholds)


def _account(steps: Sequence[Step], num_rows: int, found: np.ndarray) -> dict[str, Counts]:
    """Return one account per where step from int64 (steps, 3): rows read, kept, and without an answer."""
    counts = {}
    for step, (read, kept, missing) in zip(steps, found.tolist(), strict=True):
        if read != num_rows:
            raise StageError(f"step {step.name!r} read {read:,} rows of {num_rows:,}: scores changed, or a bug.")
        counts[step.name] = _count(step.name, read, kept, missing)
        num_rows = kept
    return counts


def _count(name: str, read: int, kept: int, missing: int) -> Counts:
    dropped = {name: read - kept - missing, NO_SCORE: missing}
    return Counts(read=read, kept=kept, dropped={reason: n for reason, n in dropped.items() if n})


def _cut(source: Source, passing: Passing, name: str, top: Top, num_rows: int) -> tuple[Cut, Counts]:
    """Return what a top step comes down to, and its account."""
    found, num_scored = find_cut(source, passing, top)
    if found is None:
        return Cut(top.by, None), _count(name, num_rows, 0, num_rows - num_scored)
    if top.ties == "datacomp" or found.num_taken == found.num_tied:
        cut, kept = Cut(top.by, found.value), found.num_above + found.num_tied
    else:
        last, num_below = find_last_uid(partial(_count_ties, source, passing, top.by, found), found.num_taken)
        cut, kept = Cut(top.by, found.value, last), found.num_above + num_below
    return cut, _count(name, num_rows, kept, num_rows - num_scored)


def find_cut(source: Source, passing: Passing, top: Top) -> tuple[Threshold | None, int]:
    """Return the threshold of a top step, None when it keeps nothing, and the number of rows that have a score."""
    num_scored, bits = 0, key_bits(source.types[top.by])

    def count_wanted(available: int) -> int:
        nonlocal num_scored
        num_scored = available
        return top.count_wanted(num_pool=source.num_pool, num_input=available)

    def count_pass(prefix: int, depth: int) -> np.ndarray:
        return source.sum_groups(partial(count_values, source.table, passing, top.by, bits, prefix, depth))

    found = find_threshold(count_pass, count_wanted, bits=bits)
    return found, num_scored


def count_values(
    table: ScoreTable, passing: Passing, by: str, bits: int, prefix: int, depth: int, group: PartGroup
) -> np.ndarray:
    """Return count_radix of the order keys of one score column, of the passing rows that have it."""
    total = np.zeros(NUM_BUCKETS, np.int64)
    for part in group.parts:
        for batch, kept in read_passing(table, passing, part, [by]):
            values = to_floats(batch.column(by))
            keys = order_keys(values[kept & ~np.isnan(values)])
            total += count_radix(keys, prefix=prefix, depth=depth, bits=bits)
    return total


def _count_ties(source: Source, passing: Passing, by: str, found: Threshold, prefix: int, depth: int) -> np.ndarray:
    return source.sum_groups(partial(count_tied_uids, source.table, passing, by, found.value, prefix, depth))


def count_tied_uids(
    table: ScoreTable, passing: Passing, by: str, value: float, prefix: int, depth: int, group: PartGroup
) -> np.ndarray:
    """Return count_uid_radix of the passing rows whose score is `value`."""
    total = np.zeros(NUM_BUCKETS, np.int64)
    for part in group.parts:
        for batch, kept in read_passing(table, passing, part, [by], uids=True):
            tied = kept & (to_floats(batch.column(by)) == value)
            total += count_uid_radix(_kept_uids(batch, tied, part), prefix=prefix, depth=depth)
    return total


def write_kept(table: ScoreTable, passing: Passing, runs: str, group: PartGroup) -> np.ndarray:
    """Write the uids of the passing rows into RUNS, RUN_ROWS or a little more a file; return [number of rows]."""
    pieces: list[np.ndarray] = []
    held = total = num_runs = 0
    for part in group.parts:
        for batch, kept in read_passing(table, passing, part, [], uids=True):
            pieces.append(_kept_uids(batch, kept, part))
            held, total = held + len(pieces[-1]), total + len(pieces[-1])
            if held >= RUN_ROWS:
                write_run(runs, f"{group.number:06d}-{num_runs:06d}", np.concatenate(pieces))
                pieces, held, num_runs = [], 0, num_runs + 1
    if held:
        write_run(runs, f"{group.number:06d}-{num_runs:06d}", np.concatenate(pieces))
    return np.array([total])


def _kept_uids(batch: pa.RecordBatch, kept: np.ndarray, part: ScorePart) -> np.ndarray:
    uids = batch.column(UID)
    try:
        return parse_uids(uids if kept.all() else uids.filter(pa.array(kept)))
    except PoolError as error:
        raise PoolError(f"scores of part {part.name!r}: {error}") from None
