"""The subset file: a sorted .npy of `u8,u8` uids, a multiset (a uid may repeat), as DataComp's resharder reads it.

Source of the format: DataComp README ("Submitting") and resharder.py, load_subset.  DataComp does not check the order,
and an unsorted file makes its binary search miss rows; here it is an error.
"""

import functools
import shutil
import tempfile

import numpy as np

from pipeline.errors import PoolError
from pipeline.manifest import hash_json
from pipeline.storage import CHUNK_BYTES, exists, fingerprint, is_local, open_file, write_atomic
from pipeline.uid import UID_DTYPE, is_sorted, sort_uids

SUBSET_SUFFIX = ".npy"
NUMPY_MAGIC = b"\x93NUMPY"


def write_subset(url: str, uids: np.ndarray) -> None:
    """Write uids (rows,) of UID_DTYPE, in any order, as a sorted subset file; atomic, repeats kept."""
    with write_atomic(url) as file:
        np.save(file, sort_uids(uids))


def read_subset(url: str) -> np.ndarray:
    """Return the sorted uids (rows,) of UID_DTYPE; a local file is mapped, not read.

    Raises PoolError if it is absent, of another type, or out of order.
    """
    uids = open_subset(url)
    if not is_sorted(uids):
        raise PoolError(
            f"{url} is not sorted, so a binary search would miss rows. Sort it: numpy.sort(a, order=['f0','f1'])."
        )
    return uids


def open_subset(url: str) -> np.ndarray:
    """Return what read_subset does without the pass that checks the order, for workers whose driver has made it."""
    if not exists(url):
        raise PoolError(f"there is no subset file at {url!r}.")
    try:
        uids = _parse(url)
    except ValueError as error:
        raise PoolError(f"{url} is neither a .npy file nor bare 16-byte uids: {error}") from None
    if uids.dtype != UID_DTYPE or uids.ndim != 1:
        raise PoolError(f"{url} holds {uids.dtype} of shape {uids.shape}; a subset is one row of {UID_DTYPE.descr}.")
    return uids


def _parse(url: str) -> np.ndarray:
    """Return the array of an .npy file, or of bare 16-byte uids, which DataComp's resharder also takes."""
    with open_file(url) as file:
        is_numpy = file.read(len(NUMPY_MAGIC)) == NUMPY_MAGIC
    if not is_numpy and url.endswith(SUBSET_SUFFIX):
        raise ValueError("no .npy header")
    return map_array(url, is_numpy=is_numpy)


def map_array(url: str, *, is_numpy: bool = True) -> np.ndarray:
    """Return the array of an .npy file (or bare uids) mapped; of a remote file a copy on disk is."""
    return _map(url, is_numpy) if is_local(url) else _map_remote(url, hash_json(fingerprint(url)), is_numpy)


def _map(path: str, is_numpy: bool) -> np.ndarray:
    return np.load(path, "r", allow_pickle=False) if is_numpy else np.memmap(path, UID_DTYPE, "r")


@functools.lru_cache(maxsize=1)
def _map_remote(url: str, version: str, is_numpy: bool) -> np.ndarray:
    """Return a remote file mapped from a copy on disk: one download a process, whatever the number of its tasks.

    `version` tells the file from one that was written over it.  The copy has no name any more when this returns.
    """
    with tempfile.NamedTemporaryFile(prefix="winnow-subset-") as copy:
        with open_file(url) as file:
            shutil.copyfileobj(file, copy, CHUNK_BYTES)
        copy.flush()
        return _map(copy.name, is_numpy)


def is_in_subset(uids: np.ndarray, subset: np.ndarray) -> np.ndarray:
    """Return bool (rows,): whether each uid stands in the sorted subset."""
    if not len(subset):
        return np.zeros(len(uids), bool)
    nearest = subset[np.minimum(search_subset(subset, uids, or_equal=False), len(subset) - 1)]
    found: np.ndarray = (nearest["f0"] == uids["f0"]) & (nearest["f1"] == uids["f1"])
    return found


def search_subset(subset: np.ndarray, uids: np.ndarray, *, or_equal: bool) -> np.ndarray:
    """Return int64 (rows,): how many subset entries are below each uid (or equal to it).

    A binary search of all rows at once, on both words.  np.searchsorted on structured rows compares them one by one in
    Python (41 us a row), and on one word it would copy that column of a mapped subset.
    """
    low, left = np.zeros(len(uids), np.int64), len(subset)
    while left:  # each answer lies in low to low + left
        half = (left + 1) // 2
        low += half * is_below(subset[low + (half - 1)], uids, or_equal=or_equal)
        left -= half
    return low


def is_below(entries: np.ndarray, uids: np.ndarray, *, or_equal: bool) -> np.ndarray:
    """Return bool (rows,): whether each entry is below the uid beside it (or equal to it)."""
    first, second = entries["f0"], entries["f1"]
    within = second <= uids["f1"] if or_equal else second < uids["f1"]
    below: np.ndarray = (first < uids["f0"]) | ((first == uids["f0"]) & within)
    return below
