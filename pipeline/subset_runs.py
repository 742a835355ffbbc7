"""A subset too large for memory: tasks write sorted runs of uids, and a merge range by range makes the subset file.

A run is bare 16-byte uids, sorted and distinct, each followed by its copies where not all are wanted once, with every
SAMPLE_ROWS-th uid in a file beside it.  The samples of all runs say where to cut the uids into ranges of equal size,
however they are spread, and where a range lies in a run.
"""

import hashlib
import io
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from pipeline.storage import CHUNK_BYTES, join, list_folder, open_file, read_bytes, write_atomic
from pipeline.uid import UID_BITS, UID_DTYPE, count_below, sort_uids, unique_uids

RUN_SUFFIX, COPIED_SUFFIX, SAMPLE_SUFFIX, MERGED = ".uids", ".copied", ".sample", "merged"
COPIED_DTYPE = np.dtype([*UID_DTYPE.descr, ("copies", "<u2")])
"""An entry of a run in which uids have copies."""
SAMPLE_ROWS = 256
RANGE_ROWS = 1 << 18


class Merged(NamedTuple):
    """What a merge wrote."""

    num_uids: int
    """Distinct uids."""
    num_copies: int
    """Lines of the file."""
    sha256: str


def write_run(folder: str, name: str, uids: np.ndarray, copies: np.ndarray | None = None) -> None:
    """Write uids (rows,) of UID_DTYPE, in any order, as the run `name`; repeats are written once.

    `copies` (rows,), at most 65,535 each, says how often the subset is to have each uid; of repeats the largest counts.
    The runs of a folder have copies all or none.
    """
    entries = _merge_repeats(uids if copies is None else _add_copies(uids, copies))
    suffix = RUN_SUFFIX if copies is None else COPIED_SUFFIX
    for url, some in ((name + SAMPLE_SUFFIX, _drop_copies(entries[::SAMPLE_ROWS])), (name + suffix, entries)):
        with write_atomic(join(folder, url)) as file:
            file.write(_octets(some))


def _add_copies(uids: np.ndarray, copies: np.ndarray) -> np.ndarray:
    entries = np.empty(len(uids), COPIED_DTYPE)
    entries["f0"], entries["f1"], entries["copies"] = uids["f0"], uids["f1"], copies
    return entries


def _drop_copies(entries: np.ndarray) -> np.ndarray:
    uids = np.empty(len(entries), UID_DTYPE)
    uids["f0"], uids["f1"] = entries["f0"], entries["f1"]
    return uids


def _merge_repeats(entries: np.ndarray) -> np.ndarray:
    """Return the entries of distinct uids in ascending order, with the largest copies of each where they have any."""
    if entries.dtype == UID_DTYPE:
        return unique_uids(entries)
    entries = entries[np.lexsort((entries["copies"], entries["f1"], entries["f0"]))]
    is_last = np.ones(len(entries), bool)
    is_last[:-1] = (entries["f0"][1:] != entries["f0"][:-1]) | (entries["f1"][1:] != entries["f1"][:-1])
    return entries[is_last]


def merge_runs(folder: str, url: str) -> Merged:
    """Write the uids of all runs in FOLDER as a subset file: each once, or as often as the run with most copies says.

    The bytes are those of np.save.  About RANGE_ROWS uids are held at a time (more when there are a thousand runs).
    """
    merged, num_uids, num_copies = join(folder, MERGED), 0, 0
    with write_atomic(merged) as file:
        for entries in _merge_ranges(folder):
            num_uids += len(entries)
            for lines in _repeat(entries):
                file.write(_octets(lines))
                num_copies += len(lines)
    digest = hashlib.sha256()
    with open_file(merged) as source, write_atomic(url) as file:
        piece = numpy_header(num_copies)
        while piece:
            digest.update(piece)
            file.write(piece)
            piece = source.read(CHUNK_BYTES)
    return Merged(num_uids, num_copies, digest.hexdigest())


def _repeat(entries: np.ndarray) -> Iterator[np.ndarray]:
    """Yield each uid as often as its copies say, RANGE_ROWS lines or a little more at a time."""
    if entries.dtype == UID_DTYPE:
        yield entries
        return
    uids, ends = _drop_copies(entries), np.cumsum(entries["copies"], dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    borders = [*np.searchsorted(ends, np.arange(0, total, RANGE_ROWS), "right").tolist(), len(uids)]
    for first, last in pairwise(borders):
        yield np.repeat(uids[first:last], entries["copies"][first:last])


def _octets(entries: np.ndarray) -> memoryview:
    return np.ascontiguousarray(entries).view(np.uint8).data


def numpy_header(num_lines: int) -> bytes:
    """Return what np.save writes before the lines; it needs their number, so it is written when the merge is done."""
    header = io.BytesIO()
    described = {"descr": UID_DTYPE.descr, "fortran_order": False, "shape": (num_lines,)}
    np.lib.format.write_array_header_1_0(header, described)
    return header.getvalue()


def _merge_ranges(folder: str) -> Iterator[np.ndarray]:
    """Yield the entries of distinct uids of all runs in ascending order, a range at a time."""
    runs = [url for url in list_folder(folder) if url.endswith((RUN_SUFFIX, COPIED_SUFFIX))]
    dtype = COPIED_DTYPE if any(url.endswith(COPIED_SUFFIX) for url in runs) else UID_DTYPE
    samples = [_read(read_bytes(url.rpartition(".")[0] + SAMPLE_SUFFIX), UID_DTYPE) for url in runs]
    for low, high in pairwise(_choose_borders(samples)):
        pieces = [_read_range(url, dtype, sample, low, high) for url, sample in zip(runs, samples, strict=True)]
        yield _merge_repeats(np.concatenate([np.empty(0, dtype), *pieces]))


def _choose_borders(samples: Sequence[np.ndarray]) -> list[int]:
    """Return ascending numbers from 0 to 2^128 that cut the runs into ranges of about RANGE_ROWS uids."""
    drawn = sort_uids(np.concatenate([np.empty(0, UID_DTYPE), *samples]))
    step = max(RANGE_ROWS // SAMPLE_ROWS, len(samples))
    inner = {(int(high) << 64) | int(low) for high, low in drawn[step::step]}
    return sorted({0, *inner, 1 << UID_BITS})


def _read_range(url: str, dtype: np.dtype[np.void], sample: np.ndarray, low: int, high: int) -> np.ndarray:
    """Return the entries of a run whose uids are in [low, high); only the blocks that hold them are read."""
    first, last = max(0, count_below(sample, low) - 1), count_below(sample, high)
    block_bytes = SAMPLE_ROWS * dtype.itemsize
    with open_file(url, ahead=1 << 16) as file:
        file.seek(first * block_bytes)
        entries = _read(file.read((last - first) * block_bytes) if last > first else b"", dtype)
    return entries[count_below(entries, low) : count_below(entries, high)]


def _read(content: bytes, dtype: np.dtype[np.void]) -> np.ndarray:
    return np.frombuffer(content, dtype)
