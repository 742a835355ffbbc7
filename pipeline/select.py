"""A recipe's steps -> the rows that pass, over stored scores.  Exact, global, streaming; no image is read.

Steps run in order and each narrows the one before.  `where` is a Spark SQL boolean over score columns.  `top` keeps the
rows with the largest scores, and its threshold is exact: a radix search over the bits of the score needs two passes
of 65,536 counts for float32 (four for other types), never the column itself.  Null and NaN never pass, and are counted.

The functions take a Spark DataFrame and speak SQL to it; nothing here imports pyspark.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import config
from pipeline.errors import ConfigError, check_name
from pipeline.manifest import Counts
from pipeline.schemas import UID
from pipeline.uid import UID_DTYPE, UID_FIELDS, parse_uids

SQL_ERRORS = ("AnalysisException", "ParseException", "ArithmeticException", "NumberFormatException")
"""pyspark's names for what a user's SQL can get wrong."""
RADIX_BITS = 16
NO_SCORE = "no_score"
"""Account of rows whose score is null or NaN where a step needs one."""


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
    """What `fraction` is a share of: all rows of the pool, or the rows that reached this step."""
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


@dataclass(frozen=True, slots=True)
class Selection:
    """What a recipe's steps kept."""

    uids: np.ndarray
    """(kept,) of UID_DTYPE, in no particular order."""
    counts: Mapping[str, Counts]
    """One account per step, in order."""
    thresholds: Mapping[str, float | None]
    """The smallest score that passed each `top` step; None when it kept nothing."""


def check_steps(steps: Sequence[Step], types: Mapping[str, str]) -> None:
    """Raise ConfigError for a step named twice or NO_SCORE, or a `top` by a column that is not a number.

    `types` maps each score column to the name of its Arrow type.
    """
    names = [step.name for step in steps]
    for name in names:
        if names.count(name) > 1 or name == NO_SCORE:
            raise ConfigError(f"select step {name!r}: each step needs a name of its own, and {NO_SCORE!r} is taken.")
    for step in steps:
        if step.top and types.get(step.top.by) == "string":
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


def clean_batch(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return the batch with every NaN as null, so that no comparison passes it (to Spark NaN is the largest value)."""
    columns = []
    for values in batch.columns:
        floating = pa.types.is_floating(values.type)
        columns.append(pc.if_else(pc.is_nan(values), pa.scalar(None, values.type), values) if floating else values)
    return pa.RecordBatch.from_arrays(columns, schema=batch.schema)


def select_rows(table: Any, steps: Sequence[Step], *, num_rows: int) -> Selection:
    """Return the rows of a score table (Spark DataFrame of UID and score columns, NaN already null) that pass.

    `num_rows` is what `of: pool` is a share of.  Raises ConfigError for SQL that Spark cannot read.
    """
    table = table.cache()
    try:
        return _run_steps(table, steps, num_rows)
    except Exception as error:
        raise _explain_sql(error, steps) from None
    finally:
        table.unpersist()


def _run_steps(table: Any, steps: Sequence[Step], num_rows: int) -> Selection:
    passing, rules = "true", []
    thresholds: dict[str, float | None] = {}
    for step in steps:
        if step.top:
            rule, thresholds[step.name] = _compile_top(table, passing, step.top, num_rows)
            unknown = f"`{step.top.by}` IS NULL"
        else:
            rule, unknown = f"({step.where})", f"({step.where}) IS NULL"
        rules.append((step, passing, rule, unknown))
        passing = f"{passing} AND coalesce({rule}, false)"
    counts = _count_steps(table, rules)
    return Selection(_collect_uids(table.where(passing)), counts, thresholds)


def _count_steps(table: Any, rules: list[tuple[Step, str, str, str]]) -> dict[str, Counts]:
    if not rules:
        return {}
    columns = []
    for number, (_, before, rule, unknown) in enumerate(rules):
        columns.append(f"count_if({before}) AS read{number}")
        columns.append(f"count_if({before} AND coalesce({rule}, false)) AS kept{number}")
        columns.append(f"count_if({before} AND {unknown} AND NOT coalesce({rule}, false)) AS null{number}")
    row = table.selectExpr(*columns).collect()[0].asDict()
    counts: dict[str, Counts] = {}
    for number, (step, *_) in enumerate(rules):
        read, kept, null = (int(row[f"{what}{number}"]) for what in ("read", "kept", "null"))
        dropped = {step.name: read - kept - null, NO_SCORE: null}
        counts[step.name] = Counts(read=read, kept=kept, dropped={k: n for k, n in dropped.items() if n})
    return counts


def _explain_sql(error: Exception, steps: Sequence[Step]) -> Exception:
    """Return a ConfigError for SQL that Spark cannot read; any other error as it is."""
    if type(error).__name__ not in SQL_ERRORS:
        return error
    text = "; ".join(f"{step.name}: {step.where}" for step in steps if step.where)
    said = str(error).strip().splitlines()[0]
    return ConfigError(f"a where step is not a Spark SQL boolean over the score columns ({text}): {said}")


def _compile_top(table: Any, passing: str, top: Top, num_rows: int) -> tuple[str, float | None]:
    """Return the SQL rule of a top step, with its threshold filled in, and the threshold."""
    table = table.where(f"{passing} AND `{top.by}` IS NOT NULL").select(UID, top.by)

    def count_wanted(available: int) -> int:
        return top.count_wanted(num_pool=num_rows, num_input=available)

    found = find_threshold(_count_by_radix(table, top.by), count_wanted, bits=_key_bits(table, top.by))
    if found is None:
        return "false", None
    column, value = f"`{top.by}`", _literal(found.value)
    if top.ties == "datacomp" or found.num_taken == found.num_tied:
        return f"{column} >= {value}", found.value
    last = table.where(f"{column} = {value}").orderBy(UID).limit(found.num_taken).agg({UID: "max"}).collect()[0][0]
    return f"({column} > {value} OR ({column} = {value} AND `{UID}` <= '{last}'))", found.value


def _literal(value: float) -> str:
    """Return a SQL literal that is exactly this double (a float32 score widens to it without loss)."""
    return f"CAST('{value!r}' AS DOUBLE)"


def _key_bits(table: Any, column: str) -> int:
    return 32 if dict(table.dtypes)[column] == "float" else 64


def _count_by_radix(table: Any, column: str) -> Callable[[int, int], np.ndarray]:
    """Return a pass over the column: (prefix, depth) -> counts (65536,) of the 16 key bits after that prefix."""
    bits = _key_bits(table, column)

    def count_pass(prefix: int, depth: int) -> np.ndarray:
        def task(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            total = np.zeros(1 << RADIX_BITS, np.int64)
            for batch in batches:
                values = (
                    batch.column(0).cast(pa.float32() if bits == 32 else pa.float64()).to_numpy(zero_copy_only=False)
                )
                total += count_radix(order_keys(values), prefix=prefix, depth=depth, bits=bits)
            buckets = np.flatnonzero(total)
            yield pa.RecordBatch.from_pydict({"bucket": pa.array(buckets, pa.int64()), "n": pa.array(total[buckets])})

        rows = table.select(column).mapInArrow(task, "bucket long, n long").groupBy("bucket").sum("n").collect()
        counts = np.zeros(1 << RADIX_BITS, np.int64)
        for bucket, number in rows:
            counts[bucket] = number
        return counts

    return count_pass


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


def _collect_uids(table: Any) -> np.ndarray:
    """Return the uids of a DataFrame as two words each: 16 bytes a row reach the driver, never the 32 digits."""

    def task(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            words = parse_uids(batch.column(0))
            columns = [pa.array(np.ascontiguousarray(words[f]).view(np.int64)) for f in UID_FIELDS]
            yield pa.RecordBatch.from_arrays(columns, names=["high", "low"])

    rows = table.select(UID).mapInArrow(task, "high long, low long").toArrow()
    uids = np.empty(rows.num_rows, UID_DTYPE)
    for field, column in zip(UID_FIELDS, ("high", "low"), strict=True):
        uids[field] = rows[column].to_numpy().view(np.uint64)
    return uids
