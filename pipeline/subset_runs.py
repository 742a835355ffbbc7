"""A subset too large for memory: tasks write sorted runs of uids, and a merge range by range makes the subset file.

A run is bare 16-byte uids, sorted and distinct, with every SAMPLE_ROWS-th of them in a file beside it.  The samples of
all runs say where to cut the uids into ranges of equal size, however they are spread, and where a range lies in a run.
"""

import hashlib
import io
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from pipeline.storage import CHUNK_BYTES, join, list_folder, open_file, read_bytes, write_atomic
from pipeline.uid import UID_BITS, UID_DTYPE, count_below, sort_uids, unique_uids

RUN_SUFFIX, SAMPLE_SUFFIX, MERGED = ".uids", ".sample", "merged"
SAMPLE_ROWS = 256
RANGE_ROWS = 1 << 18


def write_run(folder: str, name: str, uids: np.ndarray) -> None:
    """Write uids (rows,) of UID_DTYPE, in any order, as the run `name`; repeats are written once."""
    uids = unique_uids(uids)
    for suffix, some in ((SAMPLE_SUFFIX, uids[::SAMPLE_ROWS]), (RUN_SUFFIX, uids)):
        with write_atomic(join(folder, name + suffix)) as file:
            file.write(_octets(some))


def merge_runs(folder: str, url: str) -> tuple[int, str]:
    """Write the distinct uids of all runs in FOLDER as a subset file; return their number and the file's sha256.

    The bytes are those of np.save.  About RANGE_ROWS uids are held at a time (more when there are a thousand runs).
    """
    merged, num_uids = join(folder, MERGED), 0
    with write_atomic(merged) as file:
        for uids in _merge_ranges(folder):
            file.write(_octets(uids))
            num_uids += len(uids)
    digest = hashlib.sha256()
    with open_file(merged) as source, write_atomic(url) as file:
        piece = _numpy_header(num_uids)
        while piece:
            digest.update(piece)
            file.write(piece)
            piece = source.read(CHUNK_BYTES)
    return num_uids, digest.hexdigest()


def _octets(uids: np.ndarray) -> memoryview:
    return np.ascontiguousarray(uids).view(np.uint8).data


def _numpy_header(num_uids: int) -> bytes:
    """Return what np.save writes before the uids; it needs their number, so it is written when the merge is done."""
    header = io.BytesIO()
    described = {"descr": UID_DTYPE.descr, "fortran_order": False, "shape": (num_uids,)}
    np.lib.format.write_array_header_1_0(header, described)
    return header.getvalue()


def _merge_ranges(folder: str) -> Iterator[np.ndarray]:
    """Yield the distinct uids of all runs in ascending order, a range at a time."""
    runs = [url for url in list_folder(folder) if url.endswith(RUN_SUFFIX)]
    samples = [_read_uids(read_bytes(url.removesuffix(RUN_SUFFIX) + SAMPLE_SUFFIX)) for url in runs]
    for low, high in pairwise(_choose_borders(samples)):
        pieces = [_read_range(url, sample, low, high) for url, sample in zip(runs, samples, strict=True)]
        yield unique_uids(np.concatenate([np.empty(0, UID_DTYPE), *pieces]))


def _choose_borders(samples: Sequence[np.ndarray]) -> list[int]:
    """Return ascending numbers from 0 to 2^128 that cut the runs into ranges of about RANGE_ROWS uids."""
    drawn = sort_uids(np.concatenate([np.empty(0, UID_DTYPE), *samples]))
    step = max(RANGE_ROWS // SAMPLE_ROWS, len(samples))
    inner = {(int(high) << 64) | int(low) for high, low in drawn[step::step]}
    return sorted({0, *inner, 1 << UID_BITS})


def _read_range(url: str, sample: np.ndarray, low: int, high: int) -> np.ndarray:
    """Return the uids of a run that are in [low, high); only the blocks that hold them are read."""
    first, last = max(0, count_below(sample, low) - 1), count_below(sample, high)
    block_bytes = SAMPLE_ROWS * UID_DTYPE.itemsize
    with open_file(url, ahead=1 << 16) as file:
        file.seek(first * block_bytes)
        uids = _read_uids(file.read((last - first) * block_bytes) if last > first else b"")
    return uids[count_below(uids, low) : count_below(uids, high)]


def _read_uids(content: bytes) -> np.ndarray:
    return np.frombuffer(content, UID_DTYPE)
