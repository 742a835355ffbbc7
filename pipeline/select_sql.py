"""The `where` steps: Spark SQL over the score columns of the rows that still pass; what comes back is a bit per row.

One Spark job evaluates the steps that follow each other.  Only columns that the SQL reads enter the JVM, and no uid.
A step is evaluated for exactly the rows that reached it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import ConfigError
from pipeline.schemas import ROW
from pipeline.select import Step, find_columns
from pipeline.select_table import Passing, ScorePart, ScoreTable, clean_batch, read_passing, write_mask
from pipeline.spark import collect_rows, open_table

SQL_ERRORS = (
    "AnalysisException",
    "ArithmeticException",
    "ArrayIndexOutOfBoundsException",
    "DateTimeException",
    "NumberFormatException",
    "ParseException",
    "SparkRuntimeException",
)
"""pyspark's names for what a user's SQL can get wrong."""
SPARK_TYPES = {
    "halffloat": pa.float32(),
    "uint8": pa.int16(),
    "uint16": pa.int32(),
    "uint32": pa.int64(),
    "large_string": pa.string(),
}
"""Arrow types that Spark lacks -> the next wider one."""
NO_SPARK_TYPES = ("uint64", "string_view", "binary_view")
"""Arrow types that Spark lacks, with none that is wider."""
PART = "__part__"
"""int32: which of the parts a row is of."""
VERDICT = "__step{}__"
"""boolean: whether a row passes a step; null when SQL cannot tell, or the row had been dropped before."""


def filter_rows(
    session: Any,
    table: ScoreTable,
    passing: Passing,
    parts: Sequence[ScorePart],
    steps: Sequence[Step],
    types: Mapping[str, str],
    masks: str,
) -> np.ndarray:
    """Write a mask per part into MASKS; return int64 (steps, 3): rows read, kept, and without an answer.

    Raises ConfigError for SQL that Spark cannot read, or that fails on a row.
    """
    columns = find_columns(steps, types)
    fields = [(PART, pa.int32()), (ROW, pa.int64()), *((c, parse_type(types[c])) for c in columns)]
    read = partial(read_sql_rows, table, passing, columns)
    try:
        frame = open_table(session, read, list(enumerate(parts)), pa.schema(fields))
        for number, step in enumerate(steps):
            before = VERDICT.format(number - 1) if number else "true"
            rule = f"CASE WHEN {before} THEN ({step.where}) AND true END"  # AND: a number is no boolean
            frame = frame.selectExpr("*", f"{rule} AS {VERDICT.format(number)}")
        verdicts = [VERDICT.format(number) for number in range(len(steps))]
        write = partial(write_verdicts, tuple(parts), masks, len(steps))
        frame = frame.select(PART, ROW, *verdicts).mapInArrow(write, "step long, read long, kept long, missing long")
        rows = collect_rows(frame, what="select")
    except Exception as error:
        raise _explain_sql(error, steps) from None
    counts = np.zeros((len(steps), 3), np.int64)
    for step_number, *found in rows:
        counts[step_number] += found
    return counts


def parse_type(name: str) -> pa.DataType:
    """Return the Arrow type in which Spark can hold a column whose type a manifest names, e.g. "float".

    Raises ConfigError for a type that is no scalar, or that Spark has no like of.
    """
    if name in NO_SPARK_TYPES:
        raise ConfigError(f"Spark has no type like {name}: write the column as int64, double or string.")
    try:
        return SPARK_TYPES.get(name) or pa.type_for_alias(name)
    except ValueError:
        raise ConfigError(f"a score column of type {name} cannot be selected by.") from None


def read_sql_rows(
    table: ScoreTable, passing: Passing, columns: Sequence[str], item: tuple[int, ScorePart]
) -> Iterator[pa.RecordBatch]:
    """Yield PART, ROW and the columns, NaN as null, of one part's passing rows in pool order."""
    number, part = item
    start = 0
    for batch, kept in read_passing(table, passing, part, columns):
        rows = np.flatnonzero(kept)
        wanted = clean_batch(batch.select(list(columns)).take(pa.array(rows)))
        arrays = [pa.repeat(pa.scalar(number, pa.int32()), len(rows)), pa.array(rows + start), *wanted.columns]
        yield pa.RecordBatch.from_arrays(arrays, names=[PART, ROW, *columns])
        start += batch.num_rows


def write_verdicts(
    parts: Sequence[ScorePart], masks: str, num_steps: int, batches: Iterable[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    """Write one mask per part of the rows that pass every step; yield (step, read, kept, missing) of this task.

    The rows of a part are together and in order: the job has no shuffle.
    """
    counts = np.zeros((num_steps, 3), np.int64)
    number, mask = -1, np.empty(0, bool)
    for batch in batches:
        passed = count_verdicts(np.ones(batch.num_rows, bool), batch.columns[2:], counts)
        of_part, rows = (batch.column(place).to_numpy() for place in (0, 1))
        for part in np.unique(of_part):
            if part != number:
                _finish_part(parts, masks, number, mask)
                number, mask = int(part), np.zeros(parts[part].num_rows, bool)
            mask[rows[passed & (of_part == part)]] = True
    _finish_part(parts, masks, number, mask)
    columns = [pa.array(np.arange(num_steps)), *(pa.array(column) for column in counts.T)]
    yield pa.RecordBatch.from_arrays(columns, names=["step", "read", "kept", "missing"])


def count_verdicts(passed: np.ndarray, verdicts: Sequence[pa.Array], counts: np.ndarray) -> np.ndarray:
    """Return bool (rows,): which of the rows that `passed` pass every step.

    Adds to int64 (steps, 3) counts of read, kept and missing.
    """
    for count, verdict in zip(counts, verdicts, strict=True):
        missing = passed & verdict.is_null().to_numpy(zero_copy_only=False)
        kept = passed & verdict.fill_null(False).to_numpy(zero_copy_only=False)
        count += passed.sum(), kept.sum(), missing.sum()
        passed = kept
    return passed


def _finish_part(parts: Sequence[ScorePart], masks: str, number: int, mask: np.ndarray) -> None:
    if number >= 0:
        write_mask(masks, parts[number], mask)


def _explain_sql(error: Exception, steps: Sequence[Step]) -> Exception:
    """Return a ConfigError for SQL that Spark cannot read; any other error as it is."""
    if type(error).__name__ not in SQL_ERRORS:
        return error
    text = "; ".join(f"{step.name}: {step.where}" for step in steps if step.where)
    said = str(error).strip().splitlines()[0]
    return ConfigError(f"a where step is not a Spark SQL boolean over the score columns ({text}): {said}")
