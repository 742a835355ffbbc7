"""What `top`, `at_least` and `sample` come down to: a threshold and a last uid, found by counting passes."""

from dataclasses import replace
from functools import partial

import numpy as np

from pipeline.select import AtLeast, Sample, Top
from pipeline.select_draw import Draw, shuffle_uids
from pipeline.select_mix import find_score
from pipeline.select_radix import (
    Threshold,
    count_radix,
    count_uid_radix,
    find_last_uid,
    find_threshold,
    key_bits,
    order_keys,
    round_value,
)
from pipeline.select_scores import Score, name_columns, read_score
from pipeline.select_source import NUM_BUCKETS, Rows, Source
from pipeline.select_table import Cut, PartGroup, Passing, ScoreTable, parse_kept_uids, read_passing


def cut_top(source: Source, rows: Rows, top: Top) -> tuple[Cut, int, int]:
    """Return what a top step comes down to, how many rows it keeps, and how many have no score."""
    score = find_score(source, rows.passing, top)
    found, num_scored = _find_top(source, rows, score, top)
    missing = rows.num - num_scored
    if found is None:
        return Cut(score, None), 0, missing
    if top.ties == "datacomp" or found.num_taken == found.num_tied:
        return Cut(score, found.value, lowest=top.lowest), found.num_above + found.num_tied, missing
    last, num_below = find_last_uid(partial(_count_ties, source, rows.passing, score, found), found.num_taken)
    return Cut(score, found.value, last, top.lowest), found.num_above + num_below, missing


def _find_top(source: Source, rows: Rows, score: Score, top: Top) -> tuple[Threshold | None, int]:
    """Return the threshold of a top step, None when it keeps nothing, and how many of its rows have a score.

    To DataComp's rule the rows without a score are the last of the order: when the place it looks at is one of theirs,
    it keeps nothing; past the end, where its code stops, every score passes.
    """
    num_scored, bits = 0, key_bits(source.types[score]) if isinstance(score, str) else 64

    def count_wanted(available: int) -> int:
        nonlocal num_scored
        num_scored = available
        wanted = top.count_wanted(num_pool=source.num_pool, num_input=available)
        return 0 if top.ties == "datacomp" and available < wanted <= rows.num else wanted

    def count_pass(prefix: int, depth: int) -> np.ndarray:
        work = partial(count_values, source.table, rows.passing, score, bits, prefix, depth, top.lowest)
        return source.sum_groups(work)

    found = find_threshold(count_pass, count_wanted, bits=bits)
    return replace(found, value=0.0 - found.value) if found and top.lowest else found, num_scored


def cut_at_least(source: Source, rows: Rows, rule: AtLeast) -> tuple[Cut, int, int]:
    """Return as cut_top does."""
    score = find_score(source, rows.passing, rule)
    kind = source.types[score] if isinstance(score, str) else "double"
    cut = Cut(score, round_value(rule.value, kind))
    scored, kept = source.sum_groups(partial(count_passing, source.table, rows.passing, cut), 2).tolist()
    return cut, kept, rows.num - scored


def draw_sample(source: Source, rows: Rows, sample: Sample) -> tuple[Draw, int]:
    """Return what a sample step comes down to, and how many rows it keeps."""
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
        for batch, kept in read_passing(table, passing, part, name_columns(cut.by)):
            total += (kept & ~np.isnan(read_score(cut.by, batch))).sum(), (kept & cut.passes(batch)).sum()
    return total


def count_drawn(
    table: ScoreTable, passing: Passing, seed: int, prefix: int, depth: int, group: PartGroup
) -> np.ndarray:
    """Return count_uid_radix of the passing rows' shuffled uids."""
    total = np.zeros(NUM_BUCKETS, np.int64)
    for part in group.parts:
        for batch, kept in read_passing(table, passing, part, [], uids=True):
            uids = shuffle_uids(parse_kept_uids(batch, kept, part), seed)
            total += count_uid_radix(uids, prefix=prefix, depth=depth)
    return total


def count_values(
    table: ScoreTable, passing: Passing, by: Score, bits: int, prefix: int, depth: int, lowest: bool, group: PartGroup
) -> np.ndarray:
    """Return count_radix of the order keys of one score, negated for the lowest, of the passing rows that have it."""
    total = np.zeros(NUM_BUCKETS, np.int64)
    for part in group.parts:
        for batch, kept in read_passing(table, passing, part, name_columns(by)):
            values = read_score(by, batch)
            values = -values if lowest else values
            keys = order_keys(values[kept & ~np.isnan(values)])
            total += count_radix(keys, prefix=prefix, depth=depth, bits=bits)
    return total


def _count_ties(source: Source, passing: Passing, by: Score, found: Threshold, prefix: int, depth: int) -> np.ndarray:
    return source.sum_groups(partial(count_tied_uids, source.table, passing, by, found.value, prefix, depth))


def count_tied_uids(
    table: ScoreTable, passing: Passing, by: Score, value: float, prefix: int, depth: int, group: PartGroup
) -> np.ndarray:
    """Return count_uid_radix of the passing rows whose score is `value`."""
    total = np.zeros(NUM_BUCKETS, np.int64)
    for part in group.parts:
        for batch, kept in read_passing(table, passing, part, name_columns(by), uids=True):
            tied = kept & (read_score(by, batch) == value)
            total += count_uid_radix(parse_kept_uids(batch, tied, part), prefix=prefix, depth=depth)
    return total
