"""A recipe's steps run over stored scores: an account of each, the thresholds found, and the kept uids as sorted runs.

Every pass reads files and returns a few counts, so nothing of the size of the pool is ever in one place.  Only `where`
needs Spark: those that follow each other are one job (select_sql.py), which leaves a bit per row.  A pass of any other
step is a function of some parts, and runs on threads here or on a cluster's workers.  Each branch starts from the rows
that reached its step; what the branches kept is combined in one pass (select_sets.py).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count, groupby
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import PoolError, StageError
from pipeline.manifest import Counts
from pipeline.schemas import UID
from pipeline.select import NO_SCORE, AtLeast, Sample, Step, Top, check_steps, place_branches
from pipeline.select_draw import Draw, shuffle_uids
from pipeline.select_radix import (
    RADIX_BITS,
    Threshold,
    count_radix,
    count_uid_radix,
    find_last_uid,
    find_threshold,
    key_bits,
    order_keys,
    round_value,
)
from pipeline.select_sets import write_combined
from pipeline.select_sql import filter_rows
from pipeline.select_table import (
    Cut,
    PartGroup,
    Passing,
    ScorePart,
    ScoreTable,
    Spread,
    group_parts,
    read_copies,
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
    """One account per step, by its path (select.walk), in that order."""
    thresholds: Mapping[str, float | None]
    """By path: the smallest score that passed a `top` step (of `lowest` the largest), None when it kept nothing; and
    the value of `at_least` as it was compared."""


@dataclass(frozen=True, slots=True)
class _Run:
    """What the steps share, and what they leave."""

    source: Source
    scratch: str
    counts: dict[str, Counts] = field(default_factory=dict)
    thresholds: dict[str, float | None] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=count)

    def new_folder(self) -> str:
        """Return the URL of a folder that nobody has used yet."""
        return join(self.scratch, f"{MASKS}-{next(self.numbers)}")


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows that reached a step."""

    passing: Passing
    num: int


def select_rows(source: Source, steps: Sequence[Step], scratch: str) -> Selection:
    """Run the steps; files go to SCRATCH.

    Raises ConfigError for steps that cannot be run (select.check_steps) and for SQL that Spark cannot read.
    """
    check_steps(steps, source.types)
    run = _Run(source, scratch)
    rows = _run_steps(run, steps, _Rows(Passing(), source.num_rows), "")
    runs = join(scratch, RUNS)
    kept = int(source.sum_groups(partial(write_kept, source.table, rows.passing, runs), 1)[0])
    if kept != rows.num:
        raise StageError(f"select kept {kept:,} rows and counted {rows.num:,}: scores changed while they were read.")
    return Selection(kept, runs, run.counts, run.thresholds)


def _run_steps(run: _Run, steps: Sequence[Step], rows: _Rows, within: str) -> _Rows:
    """Return what the steps keep of the rows; `within` begins their paths."""
    for is_where, alike in groupby(steps, key=lambda step: step.where is not None):
        if is_where:
            rows = _run_where(run, list(alike), rows, within)
        else:
            for step in alike:
                rows = _run_branches(run, step, rows, within) if step.branches else _run_rule(run, step, rows, within)
    return rows


def _run_where(run: _Run, steps: Sequence[Step], rows: _Rows, within: str) -> _Rows:
    masks, source = run.new_folder(), run.source
    found = filter_rows(source.start(), source.table, rows.passing, source.parts, steps, source.types, masks)
    num = rows.num
    for step, (read, kept, missing) in zip(steps, found.tolist(), strict=True):
        if read != num:
            raise StageError(f"step {step.name!r} read {read:,} rows of {num:,}: scores changed, or a bug.")
        run.counts[within + step.name] = _count(within + step.name, read, kept, missing)
        num = kept
    return _Rows(replace(rows.passing, masks=masks, cuts=()), num)


def _run_branches(run: _Run, step: Step, rows: _Rows, within: str) -> _Rows:
    path = within + step.name
    run.counts[path] = Counts(read=rows.num, kept=rows.num)  # stands before those of its branches
    ends = [_run_steps(run, branch, rows, start) for start, branch in place_branches(step, path)]
    kept = ends[0] if step.cascade is not None else _combine(run, step.kind, rows, ends)
    run.counts[path] = _count(path, rows.num, kept.num, 0)
    return kept


def _combine(run: _Run, kind: str, rows: _Rows, ends: Sequence[_Rows]) -> _Rows:
    """Return the rows that a step's branches, which kept `ends` of `rows`, come to."""
    passings = [end.passing for end in ends]
    if kind == "minus":
        passings = [rows.passing, *passings]
    folder = run.new_folder()
    write = partial(write_combined, run.source.table, kind, passings, folder)
    num = int(run.source.sum_groups(write, 1)[0])
    if kind == "minus":
        return _Rows(replace(rows.passing, masks=folder, cuts=()), num)
    has_copies = kind == "add" or any(passing.has_copies for passing in passings)
    return _Rows(Passing(folder, copies=folder if has_copies else None), num)


def _run_rule(run: _Run, step: Step, rows: _Rows, within: str) -> _Rows:
    path, passing = within + step.name, rows.passing
    kept, missing = rows.num, 0
    if step.top:
        cut, kept, missing = _cut_top(run.source, rows, step.top)
        passing, run.thresholds[path] = passing.add(cut), cut.value
    elif step.at_least:
        cut, kept, missing = _cut_at_least(run.source, rows, step.at_least)
        passing, run.thresholds[path] = passing.add(cut), cut.value
    elif step.sample:
        draw, kept = _draw_sample(run.source, rows, step.sample)
        passing = passing.add(draw)
    elif step.repeat:
        passing = replace(passing, times=passing.times * step.repeat)
    run.counts[path] = _count(path, rows.num, kept, missing)
    return _Rows(passing, kept)


def _count(path: str, read: int, kept: int, missing: int) -> Counts:
    dropped = {path: read - kept - missing, NO_SCORE: missing}
    return Counts(read=read, kept=kept, dropped={reason: n for reason, n in dropped.items() if n})


def _cut_top(source: Source, rows: _Rows, top: Top) -> tuple[Cut, int, int]:
    """Return what a top step comes down to, how many rows it keeps, and how many have no score."""
    found, num_scored = find_cut(source, rows.passing, top, rows.num)
    missing = rows.num - num_scored
    if found is None:
        return Cut(top.by, None), 0, missing
    if top.ties == "datacomp" or found.num_taken == found.num_tied:
        return Cut(top.by, found.value, lowest=top.lowest), found.num_above + found.num_tied, missing
    last, num_below = find_last_uid(partial(_count_ties, source, rows.passing, top.by, found), found.num_taken)
    return Cut(top.by, found.value, last, top.lowest), found.num_above + num_below, missing


def find_cut(source: Source, passing: Passing, top: Top, num_rows: int) -> tuple[Threshold | None, int]:
    """Return the threshold of a top step, None when it keeps nothing, and how many of its rows have a score.

    `num_rows` is how many pass.  To DataComp's rule the rows without a score are the last of the order: when the place
    it looks at is one of theirs, it keeps nothing; past the end, where its code stops, every score passes.
    """
    num_scored, bits = 0, key_bits(source.types[top.by])

    def count_wanted(available: int) -> int:
        nonlocal num_scored
        num_scored = available
        wanted = top.count_wanted(num_pool=source.num_pool, num_input=available)
        return 0 if top.ties == "datacomp" and available < wanted <= num_rows else wanted

    def count_pass(prefix: int, depth: int) -> np.ndarray:
        work = partial(count_values, source.table, passing, top.by, bits, prefix, depth, top.lowest)
        return source.sum_groups(work)

    found = find_threshold(count_pass, count_wanted, bits=bits)
    return replace(found, value=0.0 - found.value) if found and top.lowest else found, num_scored


def _cut_at_least(source: Source, rows: _Rows, rule: AtLeast) -> tuple[Cut, int, int]:
    """Return as _cut_top does."""
    cut = Cut(rule.by, round_value(rule.value, source.types[rule.by]))
    scored, kept = source.sum_groups(partial(count_passing, source.table, rows.passing, cut), 2).tolist()
    return cut, kept, rows.num - scored


def _draw_sample(source: Source, rows: _Rows, sample: Sample) -> tuple[Draw, int]:
    wanted = min(sample.count_wanted(num_pool=source.num_pool, num_input=rows.num), rows.num)
    if not wanted:
        return Draw(sample.seed, None), 0

    def count_pass(prefix: int, depth: int) -> np.ndarray:
        return source.sum_groups(partial(count_drawn, source.table, rows.passing, sample.seed, prefix, depth))

    last, kept = find_last_uid(count_pass, wanted)
    return Draw(sample.seed, last), kept


def count_passing(table: ScoreTable, passing: Passing, cut: Cut, group: PartGroup) -> np.ndarray:
    """Return int64 (2,): how many of the passing rows have a score, and how many pass the cut too."""
    total = np.zeros(2, np.int64)
    for part in group.parts:
        for batch, kept in read_passing(table, passing, part, [cut.by]):
            total += (kept & ~np.isnan(to_floats(batch.column(cut.by)))).sum(), (kept & cut.passes(batch)).sum()
    return total


def count_drawn(
    table: ScoreTable, passing: Passing, seed: int, prefix: int, depth: int, group: PartGroup
) -> np.ndarray:
    """Return count_uid_radix of the passing rows' shuffled uids."""
    total = np.zeros(NUM_BUCKETS, np.int64)
    for part in group.parts:
        for batch, kept in read_passing(table, passing, part, [], uids=True):
            uids = shuffle_uids(_kept_uids(batch, kept, part), seed)
            total += count_uid_radix(uids, prefix=prefix, depth=depth)
    return total


def count_values(
    table: ScoreTable, passing: Passing, by: str, bits: int, prefix: int, depth: int, lowest: bool, group: PartGroup
) -> np.ndarray:
    """Return count_radix of the order keys of one score column, negated for the lowest, of the passing rows with it."""
    total = np.zeros(NUM_BUCKETS, np.int64)
    for part in group.parts:
        for batch, kept in read_passing(table, passing, part, [by]):
            values = to_floats(batch.column(by))
            values = -values if lowest else values
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
    pieces: list[tuple[np.ndarray, np.ndarray | None]] = []
    held = total = num_runs = 0
    for part in group.parts:
        copies, start = read_copies(passing, part) if passing.has_copies else None, 0
        for batch, kept in read_passing(table, passing, part, [], uids=True):
            some = None if copies is None else copies[start : start + len(kept)][kept]
            pieces.append((_kept_uids(batch, kept, part), some))
            start, held, total = start + len(kept), held + len(pieces[-1][0]), total + len(pieces[-1][0])
            if held >= RUN_ROWS:
                _write_pieces(runs, f"{group.number:06d}-{num_runs:06d}", pieces)
                pieces, held, num_runs = [], 0, num_runs + 1
    if held:
        _write_pieces(runs, f"{group.number:06d}-{num_runs:06d}", pieces)
    return np.array([total])


def _write_pieces(runs: str, name: str, pieces: Sequence[tuple[np.ndarray, np.ndarray | None]]) -> None:
    copies = [some for _, some in pieces if some is not None]
    write_run(runs, name, np.concatenate([uids for uids, _ in pieces]), np.concatenate(copies) if copies else None)


def _kept_uids(batch: pa.RecordBatch, kept: np.ndarray, part: ScorePart) -> np.ndarray:
    uids = batch.column(UID)
    try:
        return parse_uids(uids if kept.all() else uids.filter(pa.array(kept)))
    except PoolError as error:
        raise PoolError(f"scores of part {part.name!r}: {error}") from None
