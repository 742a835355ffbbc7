"""Exact global thresholds and uid bounds by a radix search over bits: a few counting passes, and nothing is held.

Two passes of 65,536 counts find the n-th largest float32 (four find a float64), and up to eight more the last uid among
equal scores.  Who runs the passes over stored scores: select_steps.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pipeline.uid import UID_BITS

RADIX_BITS = 16
SINGLE_TYPES = ("float", "halffloat")
"""Arrow's names for floats that float32 holds."""


def key_bits(kind: str) -> int:
    """Return the bits of the order keys of a score column, by the name of its Arrow type."""
    return 32 if kind in SINGLE_TYPES else 64


def round_value(value: float, kind: str) -> float:
    """Return a threshold rounded to the type of a score column: what numpy compares a column with."""
    with np.errstate(over="ignore"):
        return float(np.array(value, {"halffloat": "f2", "float": "f4"}.get(kind, "f8")))


def order_keys(values: np.ndarray) -> np.ndarray:
    """Return unsigned keys that sort as the float32 or float64 values do (no NaN); -0.0 and 0.0 share one key."""
    unsigned = np.dtype(f"u{values.dtype.itemsize}")
    sign = unsigned.type(1 << (8 * unsigned.itemsize - 1))
    raw = (values + values.dtype.type(0)).view(unsigned)
    keys: np.ndarray = np.where(raw & sign, np.invert(raw), raw | sign)
    return keys


def value_of_key(key: int, bits: int) -> float:
    """Return the float whose order key this is."""
    sign, unsigned, floating = (1 << 31, np.uint32, np.float32) if bits == 32 else (1 << 63, np.uint64, np.float64)
    raw = key ^ sign if key & sign else ~key & ((1 << bits) - 1)
    return float(np.array([raw], unsigned).view(floating)[0])


def count_radix(keys: np.ndarray, *, prefix: int, depth: int, bits: int) -> np.ndarray:
    """Return int64 (65536,): how many keys with the given high `depth` x 16 bits have each value of the next 16."""
    shift = bits - RADIX_BITS * (depth + 1)
    if depth:
        keys = keys[(keys >> np.array(shift + RADIX_BITS, keys.dtype)) == np.array(prefix, keys.dtype)]
    digits = (keys >> np.array(shift, keys.dtype)) & np.array((1 << RADIX_BITS) - 1, keys.dtype)
    return np.bincount(digits.astype(np.int64), minlength=1 << RADIX_BITS)


@dataclass(frozen=True, slots=True)
class Threshold:
    """The n-th largest value of a column, and what stands around it."""

    value: float
    num_above: int
    """Rows with a larger value."""
    num_tied: int
    """Rows with exactly this value."""
    num_taken: int
    """How many of the tied rows the first n are."""


def find_threshold(
    count_pass: Callable[[int, int], np.ndarray], wanted_of: Callable[[int], int], *, bits: int
) -> Threshold | None:
    """Return the n-th largest value from `bits`/16 counting passes; the values themselves are never held.

    n = wanted_of(number of values), at most that number; None when it is 0.
    """
    counts = count_pass(0, 0)
    wanted = min(wanted_of(int(counts.sum())), int(counts.sum()))
    if wanted <= 0:
        return None
    prefix, remaining = 0, wanted
    for depth in range(bits // RADIX_BITS):
        counts = counts if depth == 0 else count_pass(prefix, depth)
        from_top = np.cumsum(counts[::-1])
        place = int(np.searchsorted(from_top, remaining))
        remaining -= int(from_top[place - 1]) if place else 0
        digit = (1 << RADIX_BITS) - 1 - place
        prefix = (prefix << RADIX_BITS) | digit
    return Threshold(value_of_key(prefix, bits), wanted - remaining, int(counts[digit]), remaining)


def find_last_uid(count_pass: Callable[[int, int], np.ndarray], wanted: int) -> tuple[int, int]:
    """Return (last, num): the least 128-bit number that `wanted` rows or more do not exceed, and how many do not.

    `count_pass` is that of `count_uid_radix`, `wanted` in [1, rows].  `num` exceeds `wanted` when rows share the last
    uid.  Ends as soon as a whole bucket is wanted, for then the uids in it need not be told apart: after about
    log(rows) / log(65,536) passes when uids are hashes, after eight at most.
    """
    prefix, num_below = 0, 0
    for depth in range(UID_BITS // RADIX_BITS):
        up_to = np.cumsum(count_pass(prefix, depth))
        digit = int(np.searchsorted(up_to, wanted - num_below))
        prefix = (prefix << RADIX_BITS) | digit
        if num_below + int(up_to[digit]) == wanted or (depth + 1) * RADIX_BITS == UID_BITS:
            rest = UID_BITS - RADIX_BITS * (depth + 1)
            return ((prefix + 1) << rest) - 1, num_below + int(up_to[digit])
        num_below += int(up_to[digit - 1]) if digit else 0
    raise AssertionError("the last depth returns")


def count_uid_radix(uids: np.ndarray, *, prefix: int, depth: int) -> np.ndarray:
    """Return int64 (65536,): as count_radix, of the 128 bits of uids (rows,) of UID_DTYPE."""
    if depth < 4:
        return count_radix(uids["f0"], prefix=prefix, depth=depth, bits=64)
    within = RADIX_BITS * (depth - 4)
    low = uids["f1"][uids["f0"] == np.uint64(prefix >> within)]
    return count_radix(low, prefix=prefix & ((1 << within) - 1), depth=depth - 4, bits=64)
