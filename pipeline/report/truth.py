"""Subsets against a truth file (uid, kind) and against each other.  Pure; a truth is never an input to a filter."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import ConfigError, PoolError, check_name
from pipeline.schemas import UID
from pipeline.storage import open_file
from pipeline.subset import is_in_subset, search_subset
from pipeline.uid import format_uids, parse_uids, sort_uids

KIND = "kind"
OVERLAP_ROWS = 1_000_000
"""Rows of the largest subset by which overlaps are estimated, where it has more."""


@dataclass(frozen=True, slots=True)
class Truth:
    """What each row of a pool really is."""

    uids: np.ndarray
    """(rows,) of UID_DTYPE, in the file's order."""
    codes: np.ndarray
    """(rows,) int64: position in `kinds`."""
    kinds: tuple[str, ...]
    """Most frequent first."""
    right_kinds: tuple[str, ...]
    """Kinds that a filter should keep; none means that right and wrong are not known."""

    @property
    def is_right(self) -> np.ndarray:
        """(rows,) bool."""
        wanted: np.ndarray = np.isin(self.codes, [self.kinds.index(kind) for kind in self.right_kinds])
        return wanted


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """One subset against the truth; every number is over the rows of the truth file."""

    num_kept: int
    """Rows of the truth that the subset keeps."""
    precision: float | None
    """Share of right rows among those kept; None without right kinds, or when nothing is kept."""
    recall: float | None
    """Share of the right rows that are kept; None without right kinds, or when no row is right."""
    kept_fractions: Mapping[str, float]
    """Share kept of each kind."""
    num_unknown: int
    """Distinct rows of the subset that the truth does not name."""


def read_truth(url: str, right_kinds: Sequence[str] = ()) -> Truth:
    """Return the truth in a parquet with uid and kind.

    Raises PoolError when it cannot be read or lacks one of them, ConfigError for a right kind that it does not hold.
    """
    try:
        with open_file(url) as file:
            table = pq.read_table(file, columns=[UID, KIND])
    except (pa.ArrowException, OSError, KeyError) as error:
        raise PoolError(f"truth {url!r} is not a parquet file with columns {UID!r} and {KIND!r}: {error}") from None
    missing = {UID, KIND} - set(table.column_names)
    if missing:
        raise PoolError(f"truth {url!r} lacks the columns {sorted(missing)}.")
    return build_truth(parse_uids(table[UID]), table[KIND].to_pylist(), right_kinds)


def build_truth(uids: np.ndarray, kinds: Sequence[str | None], right_kinds: Sequence[str] = ()) -> Truth:
    """Return a truth from uids and their kinds.  Raises ConfigError for a right kind that no row has, PoolError for a
    row without a kind."""
    if None in kinds:
        raise PoolError(f"row {list(kinds).index(None)} of the truth has no kind.")
    names, codes, counts = np.unique(np.array(kinds, dtype=str), return_inverse=True, return_counts=True)
    order = np.lexsort((names, -counts))
    place_of = np.empty(len(order), np.int64)
    place_of[order] = np.arange(len(order))
    found = tuple(str(name) for name in names[order])
    for kind in right_kinds:
        check_name(kind, found, kind="kind of the truth")
    if right_kinds and len(set(right_kinds)) < len(right_kinds):
        raise ConfigError(f"the right kinds {list(right_kinds)} name one twice.")
    return Truth(uids, place_of[codes.reshape(-1)], found, tuple(right_kinds))


def compare_subset(truth: Truth, subset: np.ndarray) -> Agreement:
    """Return how well a sorted subset agrees with the truth; a row that repeats in the subset counts once."""
    is_kept = is_in_subset(truth.uids, subset)
    distinct = drop_repeats(subset)
    unknown = ~is_in_subset(distinct, sort_uids(truth.uids))
    hits, num_kept, num_right = int((is_kept & truth.is_right).sum()), int(is_kept.sum()), int(truth.is_right.sum())
    totals = np.bincount(truth.codes, minlength=len(truth.kinds))
    kept = np.bincount(truth.codes[is_kept], minlength=len(truth.kinds))
    return Agreement(
        num_kept=num_kept,
        precision=hits / num_kept if truth.right_kinds and num_kept else None,
        recall=hits / num_right if num_right else None,
        kept_fractions={kind: float(k / n) for kind, k, n in zip(truth.kinds, kept, totals, strict=True)},
        num_unknown=int(unknown.sum()),
    )


def find_kinds(truth: Truth, uids: np.ndarray) -> dict[str, str]:
    """Return uid (hex) -> kind for those of `uids` that the truth names; the first counts where one repeats."""
    named = is_in_subset(truth.uids, sort_uids(uids))
    texts = format_uids(truth.uids[named]).to_pylist()
    pairs = zip(texts, truth.codes[named].tolist(), strict=True)
    return {uid: truth.kinds[code] for uid, code in reversed(list(pairs))}


def drop_repeats(subset: np.ndarray) -> np.ndarray:
    """Return the sorted subset with each uid once (np.unique would compare structured rows one by one)."""
    is_new = np.ones(len(subset), bool)
    is_new[1:] = (subset["f0"][1:] != subset["f0"][:-1]) | (subset["f1"][1:] != subset["f1"][:-1])
    return subset[is_new]


def cut_alike(subsets: Mapping[str, np.ndarray], num_rows: int = OVERLAP_ROWS) -> dict[str, np.ndarray]:
    """Return the part of each sorted subset below one uid, which leaves the largest `num_rows`; small ones stay whole.

    A uid is a hash, so a row in two subsets is below it or not by chance, and shares of the parts estimate the whole's.
    """
    largest = max(subsets.values(), key=len)
    if len(largest) <= num_rows:
        return dict(subsets)
    limit = largest[num_rows : num_rows + 1]
    return {name: uids[: int(search_subset(uids, limit, or_equal=False)[0])] for name, uids in subsets.items()}


def measure_overlap(first: np.ndarray, second: np.ndarray) -> float | None:
    """Return the Jaccard index |A and B| / |A or B| of the distinct rows of two subsets; None if both are empty."""
    first, second = drop_repeats(first), drop_repeats(second)
    num_shared = int(is_in_subset(first, second).sum())
    num_either = len(first) + len(second) - num_shared
    return num_shared / num_either if num_either else None
