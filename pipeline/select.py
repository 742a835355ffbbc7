"""A recipe's steps, what may be asked of them, and exact global thresholds: a radix search over the bits of a score.

Steps run in order and each narrows the one before.  `where` is a Spark SQL boolean over score columns.  `top` keeps the
rows with the largest scores, and its threshold is exact: two counting passes of 65,536 counts find the n-th largest
float32 (four for other types), and up to eight more the last uid among equal scores; no column is ever held.  Null and
NaN never pass, and are counted.  Who runs the passes over stored scores: select_steps.py.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.config import config
from pipeline.errors import ConfigError, check_name
from pipeline.uid import UID_BITS

RADIX_BITS = 16
NO_SCORE = "no_score"
"""Account of rows whose score is null or NaN where a step needs one."""
TEXT_TYPES = ("string", "large_string")
SINGLE_TYPES = ("float", "halffloat")
"""Arrow's names for floats that float32 holds."""


@config
class Top:
    """Keep the rows with the largest values of a score column."""

    by: str
    """Score column; larger is better."""
    fraction: float | None = None
    """Share of rows to keep, in [0, 1]; of what, `of` says.  Give this or `count`."""
    count: int | None = None
    """Number of rows to keep."""
    of: Literal["pool", "input"] = "pool"
    """What `fraction` is a share of: all rows of the pool, or the rows that reached this step and have a score."""
    ties: Literal["exact", "datacomp"] = "exact"
    """exact: precisely n rows, equal scores by ascending uid.  datacomp: all rows >= the value at index n of the
    descending sort, so n+1 rows or more (DataComp baselines/apply_filter.py, get_threshold)."""

    def __post_init__(self) -> None:
        if (self.fraction is None) == (self.count is None):
            raise ConfigError(f"top by {self.by!r}: give either fraction or count.")
        if self.fraction is not None and not 0 <= self.fraction <= 1:
            raise ConfigError(f"top by {self.by!r}: fraction {self.fraction} is not in [0, 1].")
        if self.count is not None and self.count < 0:
            raise ConfigError(f"top by {self.by!r}: count {self.count} is negative.")

    def count_wanted(self, *, num_pool: int, num_input: int) -> int:
        """Return how many rows to keep; 0.29 of 100 is 29, whatever 0.29 * 100 is in binary.

        DataComp's int(N f) has 28 there, and keeps one row more than that.
        """
        if self.count is not None:
            return self.count + (self.ties == "datacomp")
        share = (num_pool if self.of == "pool" else num_input) * (self.fraction or 0)
        return int(share) + 1 if self.ties == "datacomp" else int(round(share, 6))


@config
class Step:
    """One rule of a subset; exactly one of `where` and `top`."""

    name: str
    """What the report calls it."""
    where: str | None = None
    """Spark SQL boolean over score columns, e.g. "caption_words > 2 AND caption_language = 'en'"."""
    top: Top | None = None

    def __post_init__(self) -> None:
        if (self.where is None) == (self.top is None):
            raise ConfigError(f"select step {self.name!r}: give either where or top.")


def check_steps(steps: Sequence[Step], types: Mapping[str, str]) -> None:
    """Raise ConfigError for a step named twice or NO_SCORE, or a `top` by a column that is not a number.

    `types` maps each score column to the name of its Arrow type.
    """
    names = [step.name for step in steps]
    for name in names:
        if names.count(name) > 1 or name == NO_SCORE:
            raise ConfigError(f"select step {name!r}: each step needs a name of its own, and {NO_SCORE!r} is taken.")
    for step in steps:
        if step.top and types.get(step.top.by) in TEXT_TYPES:
            raise ConfigError(f"select step {step.name!r}: {step.top.by!r} holds text, and top needs numbers.")


def find_columns(steps: Sequence[Step], known: Iterable[str]) -> list[str]:
    """Return the score columns that the steps read, sorted.  Raises ConfigError when a step names none."""
    known = set(known)
    used: set[str] = set()
    for step in steps:
        if step.top:
            check_name(step.top.by, known, kind=f"score column in step {step.name!r}")
            used.add(step.top.by)
        elif step.where:
            words = set(re.findall(r"[A-Za-z_]\w*", re.sub(r"'[^']*'", "", step.where)))
            used |= words & known
            if not words & known:
                near = next(iter(sorted(words)), step.where)
                check_name(near, known, kind=f"score column in step {step.name!r}")
    return sorted(used)


def key_bits(kind: str) -> int:
    """Return the bits of the order keys of a score column, by the name of its Arrow type."""
    return 32 if kind in SINGLE_TYPES else 64


def order_keys(values: np.ndarray) -> np.ndarray:
    """Return unsigned keys that sort as the float32 or float64 values do (no NaN); -0.0 and 0.0 share one key."""
    unsigned = np.dtype(f"u{values.dtype.itemsize}")
    sign = unsigned.type(1 << (8 * unsigned.itemsize - 1))
    raw = (values + values.dtype.type(0)).view(unsigned)
    keys: np.ndarray = np.where(raw & sign, np.invert(raw), raw | sign)
    return keys


def _value_of_key(key: int, bits: int) -> float:
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
    return Threshold(_value_of_key(prefix, bits), wanted - remaining, int(counts[digit]), remaining)


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
