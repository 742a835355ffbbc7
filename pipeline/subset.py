"""The subset file: a sorted .npy of `u8,u8` uids, a multiset (a uid may repeat), as DataComp's resharder reads it.

Source of the format: DataComp README ("Submitting") and resharder.py, load_subset.  DataComp does not check the order,
and an unsorted file makes its binary search miss rows; here it is an error.
"""

import io
from typing import Literal

import numpy as np

from pipeline.errors import PoolError
from pipeline.storage import exists, read_bytes, write_atomic
from pipeline.uid import UID_DTYPE, is_sorted, sort_uids

SUBSET_SUFFIX = ".npy"


def write_subset(url: str, uids: np.ndarray) -> None:
    """Write uids (rows,) of UID_DTYPE, in any order, as a sorted subset file; atomic, repeats kept."""
    with write_atomic(url) as file:
        np.save(file, sort_uids(uids))


def read_subset(url: str) -> np.ndarray:
    """Return the sorted uids (rows,) of UID_DTYPE.  Raises PoolError if absent, of another type, or out of order."""
    if not exists(url):
        raise PoolError(f"there is no subset file at {url!r}.")
    try:
        uids: np.ndarray = np.load(io.BytesIO(read_bytes(url)), allow_pickle=False)
    except ValueError as error:
        raise PoolError(f"{url} is not a numpy .npy file: {error}") from None
    if uids.dtype != UID_DTYPE or uids.ndim != 1:
        raise PoolError(f"{url} holds {uids.dtype} of shape {uids.shape}; a subset is one row of {UID_DTYPE.descr}.")
    if not is_sorted(uids):
        raise PoolError(
            f"{url} is not sorted, so a binary search would miss rows. Sort it: numpy.sort(a, order=['f0','f1'])."
        )
    return uids


def count_in_subset(uids: np.ndarray, subset: np.ndarray) -> np.ndarray:
    """Return int64 (rows,): how often each uid stands in the sorted subset; 0 when it does not."""
    if len(subset) == 0 or len(uids) == 0:
        return np.zeros(len(uids), np.int64)
    counts: np.ndarray = _search(subset, uids, "right") - _search(subset, uids, "left")
    return counts


def _search(subset: np.ndarray, uids: np.ndarray, side: Literal["left", "right"]) -> np.ndarray:
    """Return np.searchsorted over (high, low) pairs, by the high words and then within equal high words.

    numpy compares structured rows one by one (41 us a row); two plain integer searches do the same work.
    """
    high, low = np.ascontiguousarray(subset["f0"]), subset["f1"]
    starts = np.searchsorted(high, uids["f0"], "left")
    ends = np.searchsorted(high, uids["f0"], "right")
    found = starts.copy()
    unique = ends - starts == 1
    at = starts[unique]
    passed = low[at] < uids["f1"][unique] if side == "left" else low[at] <= uids["f1"][unique]
    found[unique] += passed
    for row in np.flatnonzero(ends - starts > 1):
        found[row] += np.searchsorted(low[starts[row] : ends[row]], uids["f1"][row], side)
    return found
