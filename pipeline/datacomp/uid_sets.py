"""Sets and multisets of uids that need not fit in memory: sorted on disk, compared piece by piece."""

from collections.abc import Iterable, Iterator
from itertools import pairwise

import numpy as np

from pipeline.ranges import read_ranges
from pipeline.storage import join, remove, sha256_of_file, write_atomic, write_bytes
from pipeline.subset import is_below, is_in_subset, search_subset
from pipeline.subset_runs import Merged, merge_runs, numpy_header, write_run
from pipeline.uid import UID_BYTES, UID_DTYPE, is_sorted, sort_uids, unique_uids

RUN_ROWS = 1 << 20
"""Uids sorted at a time; that takes some 50 bytes for each."""
BORDER_SAMPLES = 64
"""Of each RUN_ROWS, to cut uids into ranges of about that size."""
LOOKED_UP = 100_000


def write_distinct(url: str, pieces: Iterable[np.ndarray], scratch: str) -> Merged:
    """Write every uid once, as a sorted subset file; SCRATCH takes 32 bytes a uid meanwhile.

    `pieces` are arrays (rows,) of UID_DTYPE in any order; RUN_ROWS of them are held, or one piece if that is longer.
    Besides, 0.25 byte of every uid is held, to cut the sorted runs into ranges.
    """
    held, num_held, num_runs = [np.empty(0, UID_DTYPE)], 0, 0
    for piece in pieces:
        held.append(piece)
        num_held += len(piece)
        if num_held >= RUN_ROWS:
            write_run(scratch, f"{num_runs:06d}", np.concatenate(held))
            held, num_held, num_runs = held[:1], 0, num_runs + 1
    if num_held:
        write_run(scratch, f"{num_runs:06d}", np.concatenate(held))
    merged = merge_runs(scratch, url)
    remove(scratch)
    return merged


def write_sorted(url: str, uids: np.ndarray, scratch: str) -> Merged:
    """Write uids (rows,), usually mapped and in any order, as a sorted subset file, repeats kept: np.save's bytes.

    Unless they are sorted already, SCRATCH takes 16 bytes a uid meanwhile.  About RUN_ROWS uids are held (all copies
    of a uid at once, if there are more of them).
    """
    num_uids, last = 0, np.empty(0, UID_DTYPE)
    with write_atomic(url) as file:
        file.write(numpy_header(len(uids)))
        for piece in _split(uids) if is_sorted(uids) else _sort_outside(uids, scratch):
            num_uids += int(_mark_first(piece, last).sum())
            last = piece[-1:]
            file.write(piece.tobytes())
    remove(scratch)
    return Merged(num_uids, len(uids), sha256_of_file(url))


def _split(uids: np.ndarray) -> Iterator[np.ndarray]:
    return (uids[start : start + RUN_ROWS] for start in range(0, len(uids), RUN_ROWS))


def _mark_first(uids: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Return bool (rows,): which of the sorted uids differ from the one before; `before` (at most 1,) precedes them."""
    joined = np.concatenate([before, uids])
    first = np.ones(len(joined), bool)
    first[1:] = (joined["f0"][1:] != joined["f0"][:-1]) | (joined["f1"][1:] != joined["f1"][:-1])
    return first[len(before) :]


def _sort_outside(uids: np.ndarray, scratch: str) -> Iterator[np.ndarray]:
    """Yield all uids in ascending order, a range at a time: sorted runs on disk, cut at the same borders."""
    drawn = sort_uids(uids[:: max(1, RUN_ROWS // BORDER_SAMPLES)])
    borders = unique_uids(drawn[BORDER_SAMPLES::BORDER_SAMPLES])
    runs = []
    for number, piece in enumerate(_split(uids)):
        run, url = sort_uids(piece), join(scratch, f"{number:06d}")
        write_bytes(url, run.tobytes())
        edges = [0, *search_subset(run, borders, or_equal=False).tolist(), len(run)]
        runs.append((url, [(first * UID_BYTES, last * UID_BYTES) for first, last in pairwise(edges)]))
    for number in range(len(borders) + 1):
        pieces = [content for url, spans in runs for content in read_ranges(url, spans[number : number + 1])]
        if any(pieces):
            yield sort_uids(np.frombuffer(b"".join(pieces), UID_DTYPE))


def count_shared(uids: np.ndarray, others: np.ndarray) -> int:
    """Return how many distinct uids of the first stand in the second; both (rows,) are sorted, and usually mapped."""
    num_shared, last = 0, np.empty(0, UID_DTYPE)
    for piece in _split(uids):
        first = np.flatnonzero(_mark_first(piece, last))
        num_shared += int(is_in_subset(piece[first], others).sum())
        last = piece[-1:]
    return num_shared


def find_disorder(uids: np.ndarray) -> tuple[int, int | None]:
    """Return how many uids (rows,) are less than the one before, and the first such row."""
    num, where = 0, None
    for start in range(0, len(uids), RUN_ROWS):
        piece = uids[start : start + RUN_ROWS + 1]
        high, low = piece["f0"], piece["f1"]
        falls = np.flatnonzero((high[1:] < high[:-1]) | ((high[1:] == high[:-1]) & (low[1:] < low[:-1])))
        num += len(falls)
        if where is None and len(falls):
            where = start + int(falls[0]) + 1
    return num, where


def look_up(uids: np.ndarray) -> tuple[int, int]:
    """Return (distinct uids looked up, found) by binary searches of an unsorted file, as DataComp's resharder does.

    LOOKED_UP of them, or somewhat more, evenly spaced.  The rest it does not find, and those found it repeats: over a
    pool with all uids the repeats add up to len(uids), so its own check of that number notices nothing.
    Source: resharder.py:927-929, 1190-1194.
    """
    drawn = unique_uids(uids[:: max(1, len(uids) // LOOKED_UP)])
    found = _search_as_numpy(uids, drawn, or_equal=True) > _search_as_numpy(uids, drawn, or_equal=False)
    return len(drawn), int(found.sum())


def _search_as_numpy(unsorted: np.ndarray, uids: np.ndarray, *, or_equal: bool) -> np.ndarray:
    """Return int64 (rows,): what np.searchsorted, left or right, says of each uid: where nothing is sorted it depends
    on which entries are compared, and search_subset compares others.
    """
    low, high = np.zeros(len(uids), np.int64), np.full(len(uids), len(unsorted), np.int64)
    while (searching := low < high).any():
        middle = (low + high) // 2
        below = is_below(unsorted[np.minimum(middle, len(unsorted) - 1)], uids, or_equal=or_equal)
        low = np.where(searching & below, middle + 1, low)
        high = np.where(searching & ~below, middle, high)
    return low
