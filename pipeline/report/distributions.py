"""Stored scores -> histograms, top values and rows to look at, in two passes; one part is held at a time.

The first pass finds each column's range from the radix counts that `select` uses; the second fills the bins.  Of a pool
of many rows evenly spaced parts are read, so that a page takes no longer for a billion rows than for a few million.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import ConfigError, PoolError
from pipeline.manifest import Manifest
from pipeline.report.read import Subset
from pipeline.schemas import UID
from pipeline.select import find_columns, walk
from pipeline.select_radix import RADIX_BITS, count_radix, order_keys
from pipeline.select_table import ScoreTable
from pipeline.storage import join
from pipeline.subset import is_in_subset
from pipeline.uid import UID_DTYPE, parse_uids

SURVEY_ROWS = 2_000_000
"""Of a larger pool about this many rows are read, in whole parts."""
NUM_BINS = 48
TAIL_FRACTION = 0.005
"""Share of rows at either end that may lie beyond the axis of a histogram."""
MAX_DISTINCT = 10_000
"""A string column with more values than this is not counted value by value."""
SHORTLIST_ROWS = 8
CANDIDATE_DTYPE = np.dtype([("key", "f8"), ("uid", UID_DTYPE), ("score", "f8"), ("part", "i4")])


@dataclass(slots=True)
class NumberColumn:
    """What is known of a numeric score column."""

    name: str
    is_whole: bool
    num_rows: int = 0
    num_null: int = 0
    """Rows with null or NaN."""
    minimum: float = math.inf
    maximum: float = -math.inf
    total: float = 0.0
    radix: np.ndarray = field(default_factory=lambda: np.zeros(1 << RADIX_BITS, np.int64))
    """Finite values by the high 16 bits of their float32 order keys."""
    edges: np.ndarray = field(default_factory=lambda: np.empty(0))
    counts: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    """(bins + 2,) rows per bin; the first and the last lie beyond the axis."""
    kept: dict[str, np.ndarray] = field(default_factory=dict)
    """The same of the rows that a subset keeps, by subset."""


@dataclass(slots=True)
class TextColumn:
    """What is known of a string score column."""

    name: str
    num_rows: int = 0
    num_null: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    kept: dict[str, Counter[str]] = field(default_factory=dict)
    is_many: bool = False
    """More than MAX_DISTINCT values, so `counts` is not whole."""


Column = NumberColumn | TextColumn


class Shortlist:
    """The few rows with the smallest keys offered; equal keys by ascending uid, so parts may come in any order."""

    def __init__(self) -> None:
        self.rows = np.empty(0, CANDIDATE_DTYPE)

    def offer(self, rows: np.ndarray) -> None:
        """Take in rows of CANDIDATE_DTYPE."""
        joined = np.concatenate([self.rows, rows])
        joined = joined[_are_least(joined["key"])]
        if len(joined) > SHORTLIST_ROWS:  # many share the last key
            is_last = joined["key"] == joined["key"].max()
            is_last[is_last] = ~_are_least(joined["uid"]["f0"][is_last])
            joined = joined[~is_last]
        uids = joined["uid"]
        self.rows = joined[np.lexsort((uids["f1"], uids["f0"], joined["key"]))[:SHORTLIST_ROWS]]


def _are_least(values: np.ndarray) -> np.ndarray:
    """Return bool (N,): which values are among the SHORTLIST_ROWS smallest; more, where some equal the last of them."""
    if len(values) <= SHORTLIST_ROWS:
        return np.ones(len(values), bool)
    least: np.ndarray = values <= np.partition(values, SHORTLIST_ROWS - 1)[SHORTLIST_ROWS - 1]
    return least


@dataclass(frozen=True, slots=True)
class Ranked:
    """A subset whose rows are looked at, and by which score."""

    name: str
    by: str | None
    """Column of its last top step; None when it has none."""
    threshold: float | None
    lists: dict[str, Shortlist] = field(default_factory=dict)
    """By name: any_kept, any_dropped, and with a score highest, lowest, above, below."""


@dataclass(frozen=True, slots=True)
class Distributions:
    """What the two passes found."""

    columns: Mapping[str, Column]
    users: Mapping[str, Sequence[str]]
    """Column -> subsets whose steps read it."""
    ranked: Mapping[str, Ranked]
    unreadable: Mapping[str, str]
    """Part -> why its scores could not be read."""
    num_read: int
    """Parts that were read, or could not be."""


@dataclass(frozen=True, slots=True)
class ScoreFiles:
    """Where stored scores are, which parts of them to read, and which of these cannot be."""

    url: str
    manifest: Manifest
    every: int
    """One part in so many is read."""
    unreadable: dict[str, str] = field(default_factory=dict)

    @property
    def columns(self) -> list[str]:
        """Columns of numbers or strings; embeddings are left out."""
        return [name for name, kind in self.manifest.facts["types"].items() if "list" not in kind]

    @property
    def parts(self) -> list[tuple[int, str]]:
        """Number and name of the parts to read."""
        return list(enumerate(self.manifest.facts["parts"]))[:: self.every]

    def read(self) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Yield (number of the part, batch of UID and all columns); a part that fails is noted and passed over."""
        owners = {column: self.manifest.facts["columns"][column] for column in self.columns}
        table = ScoreTable({name: join(self.url, name) for name in sorted(set(owners.values()))}, owners)
        for number, name in self.parts:
            if name in self.unreadable:
                continue
            try:
                batches = [b for part in table.measure([name]) for b in table.read(part.name, self.columns, uids=True)]
            except (PoolError, pa.ArrowException, OSError) as error:
                self.unreadable[name] = str(error)
                continue
            for batch in batches:
                yield number, batch


def survey_scores(
    url: str,
    manifest: Manifest,
    subsets: Sequence[Subset],
    uids: Mapping[str, np.ndarray],
    *,
    max_rows: int = SURVEY_ROWS,
) -> Distributions:
    """Return the distributions of all score columns, split by the subsets that use them.

    `uids` has the sorted uids of each subset whose file is there; the others are not split.  Of more than `max_rows`
    rows (0: any number) evenly spaced parts that hold about so many are read.
    """
    num_rows = max((counts.read for counts in manifest.counts.values()), default=0)
    files = ScoreFiles(url, manifest, every=max(1, math.ceil(num_rows / max_rows)) if max_rows else 1)
    columns: dict[str, Column] = {name: _open_column(name, manifest.facts["types"][name]) for name in files.columns}
    present = [subset for subset in subsets if subset.name in uids]
    users: dict[str, list[str]] = {name: [] for name in columns}
    for subset in present:
        for name in _find_used(subset, columns):
            users[name].append(subset.name)
    ranked = {subset.name: _rank_subset(subset, columns) for subset in present if subset.steps}
    for _, batch in files.read():
        for column in columns.values():
            _measure(column, batch.column(column.name))
    marks = _list_thresholds(present)
    for column in columns.values():
        _prepare(column, users[column.name], marks.get(column.name, []))
    for part, batch in files.read():
        _tally_batch(columns, users, ranked, uids, part, batch)
    return Distributions(columns, users, ranked, files.unreadable, len(files.parts))


def _open_column(name: str, kind: str) -> Column:
    if kind in ("string", "large_string", "bool"):
        return TextColumn(name)
    return NumberColumn(name, is_whole=kind.startswith(("int", "uint")))


def _find_used(subset: Subset, columns: Mapping[str, Column]) -> list[str]:
    """Return the columns that a subset's steps read; none when it was made from other scores than these."""
    lists = [step.balance.entries for _, step in walk(subset.steps) if step.balance]
    try:
        return [column for column in find_columns(subset.steps, [*columns, *lists]) if column in columns]
    except ConfigError:
        return []


def _rank_subset(subset: Subset, columns: Mapping[str, Column]) -> Ranked:
    """Return a subset with its last top step that kept something."""
    thresholds = subset.manifest.facts.get("thresholds", {})
    for step in reversed(subset.steps):
        if step.top and not step.top.lowest and step.top.by in columns and thresholds.get(step.name) is not None:
            return Ranked(subset.name, step.top.by, float(thresholds[step.name]))
    return Ranked(subset.name, None, None)


def list_thresholds(subset: Subset, column: str) -> list[float]:
    """Return the thresholds of a subset's top and at_least steps on a column, in order."""
    thresholds = subset.manifest.facts.get("thresholds", {})
    found = [thresholds.get(path) for path, by in _list_ranked(subset) if by == column]
    return [float(value) for value in found if value is not None]


def _list_ranked(subset: Subset) -> list[tuple[str, str]]:
    """Return (path, column) of each step that cuts a column at a threshold."""
    rules = ((path, step.top or step.at_least) for path, step in walk(subset.steps))
    return [(path, rule.by) for path, rule in rules if rule and rule.by]


def _list_thresholds(subsets: Sequence[Subset]) -> dict[str, list[float]]:
    names = {by for subset in subsets for _, by in _list_ranked(subset)}
    return {name: [value for subset in subsets for value in list_thresholds(subset, name)] for name in names}


def _to_numbers(values: pa.Array) -> np.ndarray:
    """Return float64 (rows,), null as NaN."""
    numbers: np.ndarray = values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return numbers


def _to_texts(values: pa.Array) -> pa.Array:
    return values.cast(pa.string())


def _measure(column: Column, values: pa.Array) -> None:
    """First pass: nulls, range and radix counts of numbers, counts of strings."""
    column.num_rows += len(values)
    if isinstance(column, TextColumn):
        column.num_null += values.null_count
        column.counts.update(_count_values(_to_texts(values)))
        if len(column.counts) > MAX_DISTINCT:
            column.is_many, column.counts = True, Counter()
        return
    numbers = _to_numbers(values)
    column.num_null += int(np.isnan(numbers).sum())
    numbers = numbers[np.isfinite(numbers)]
    if len(numbers):
        column.minimum = min(column.minimum, float(numbers.min()))
        column.maximum = max(column.maximum, float(numbers.max()))
        column.total += float(numbers.sum())
        keys = order_keys(np.clip(numbers, -3e38, 3e38).astype(np.float32))
        column.radix += count_radix(keys, prefix=0, depth=0, bits=32)


def _count_values(values: pa.Array) -> dict[str, int]:
    found = pc.value_counts(values.drop_null())
    return dict(zip(found.field("values").to_pylist(), found.field("counts").to_pylist(), strict=True))


def _prepare(column: Column, users: Sequence[str], marks: Sequence[float]) -> None:
    """Make room for the second pass."""
    if isinstance(column, TextColumn):
        column.kept = {name: Counter() for name in users}
        return
    column.edges = find_edges(column, marks)
    num_places = len(column.edges) + 1
    column.counts = np.zeros(num_places, np.int64)
    column.kept = {name: np.zeros(num_places, np.int64) for name in users}


def find_edges(column: NumberColumn, marks: Sequence[float] = ()) -> np.ndarray:
    """Return the bin edges (bins + 1,) of a column's histogram; empty when it has no finite value.

    The axis spans the values, without the far tails where these would squeeze the rest; it always holds the marks.
    """
    if not column.radix.any():
        return np.empty(0)
    low, high = _find_quantiles(column.radix)
    if column.maximum - column.minimum <= 1.25 * (high - low) or low == high:
        low, high = column.minimum, column.maximum
    low, high = max(min([low, *marks]), column.minimum), min(max([high, *marks]), column.maximum)
    if column.is_whole:
        low, high = math.floor(low), math.ceil(high)
        width = -(-(high - low + 1) // NUM_BINS)
        num_bins = -(-(high - low + 1) // width)
        edges: np.ndarray = low - 0.5 + width * np.arange(num_bins + 1)
        return edges
    if low == high:
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, NUM_BINS + 1)


def _find_quantiles(radix: np.ndarray) -> tuple[float, float]:
    """Return the values below and above which TAIL_FRACTION of the rows lie, to within a hundredth of their size."""
    keys = (np.arange(1 << RADIX_BITS, dtype=np.uint32) << RADIX_BITS).astype(np.uint32)
    sign = np.uint32(1 << 31)
    values = np.where(keys & sign, keys ^ sign, ~keys).astype(np.uint32).view(np.float32)
    share = np.cumsum(radix) / radix.sum()
    first, last = np.searchsorted(share, TAIL_FRACTION), np.searchsorted(share, 1 - TAIL_FRACTION)
    return float(values[first]), float(values[last])


def _tally_batch(
    columns: Mapping[str, Column],
    users: Mapping[str, Sequence[str]],
    ranked: Mapping[str, Ranked],
    uids: Mapping[str, np.ndarray],
    part: int,
    batch: pa.RecordBatch,
) -> None:
    """Second pass: fill the bins, and offer the rows to the shortlists."""
    rows = parse_uids(batch.column(UID))
    used = dict.fromkeys([*(name for names in users.values() for name in names), *ranked])
    is_kept = {name: is_in_subset(rows, uids[name]) for name in used}
    for name, column in columns.items():
        if isinstance(column, TextColumn):
            _tally_texts(column, _to_texts(batch.column(name)), is_kept)
        elif len(column.edges):
            _tally_numbers(column, _to_numbers(batch.column(name)), is_kept)
    for subset in ranked.values():
        scores = _to_numbers(batch.column(subset.by)) if subset.by else np.zeros(len(rows))
        _offer_rows(subset, rows, scores, is_kept[subset.name], part)


def _tally_texts(column: TextColumn, values: pa.Array, is_kept: Mapping[str, np.ndarray]) -> None:
    for name, counter in column.kept.items():
        if not column.is_many:
            counter.update(_count_values(values.filter(pa.array(is_kept[name]))))


def _tally_numbers(column: NumberColumn, numbers: np.ndarray, is_kept: Mapping[str, np.ndarray]) -> None:
    places = np.searchsorted(column.edges, numbers, "right")
    places[numbers == column.edges[-1]] -= 1
    known = ~np.isnan(numbers)
    num_places = len(column.counts)
    column.counts += np.bincount(places[known], minlength=num_places)
    for name, counts in column.kept.items():
        counts += np.bincount(places[known & is_kept[name]], minlength=num_places)


def _offer_rows(subset: Ranked, uids: np.ndarray, scores: np.ndarray, kept: np.ndarray, part: int) -> None:
    known = np.isfinite(scores)
    wishes: dict[str, tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]] = {
        "any_kept": (kept & known, np.zeros_like),
        "any_dropped": (~kept & known, np.zeros_like),
    }
    if subset.threshold is not None:
        threshold = subset.threshold
        wishes |= {
            "highest": (kept & known, lambda score: -score),
            "lowest": (~kept & known, lambda score: score),
            "above": (kept & known, lambda score: np.abs(score - threshold)),
            "below": (~kept & known & (scores <= threshold), lambda score: threshold - score),
        }
    for name, (wanted, make_key) in wishes.items():
        rows = np.zeros(int(wanted.sum()), CANDIDATE_DTYPE)
        rows["uid"], rows["score"], rows["part"] = uids[wanted], scores[wanted], part
        rows["key"] = make_key(scores[wanted])
        subset.lists.setdefault(name, Shortlist()).offer(rows)
