"""Foreign score tables joined to the scores on uid: parquet files in any order -> files in the scores' own row order.

Spark does the join, spilling to disk what memory does not hold; a uid crosses as two words.  What it leaves are score
files without uids, read by position like any other (select_table.ScoreTable).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, pairwise
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import ConfigError, PoolError, StageError
from pipeline.manifest import hash_json
from pipeline.schemas import PARQUET_SUFFIX, ROW, UID
from pipeline.select_sql import PART, parse_type
from pipeline.select_table import BATCH_ROWS, ScorePart, ScoreTable, clean_batch
from pipeline.spark import collect_rows, open_table
from pipeline.storage import expand, fingerprint, join, name_of, open_file, write_atomic
from pipeline.uid import UID_FIELDS, parse_uids, read_uids

KEY_WORDS = ("__high__", "__low__")
"""int64: the uid's two words, bit by bit."""
PARTITION_ROWS = 1 << 19
"""Rows of either table that a task sorts, about: its memory does not grow with the tables."""


@dataclass(frozen=True, slots=True)
class ForeignTable:
    """Parquet files of one schema with a uid column."""

    name: str
    """What manifests call it, the same on every machine."""
    pattern: str
    """Folder, glob or file, as it was given."""
    files: tuple[str, ...]
    types: Mapping[str, str]
    """Column -> name of its Arrow type; columns that are no scalars are left out."""
    identity: str
    """Hash of the files' versions (storage.fingerprint)."""


def open_tables(patterns: Sequence[str]) -> list[ForeignTable]:
    """Return each table's files and columns.

    Raises PoolError for a pattern without a parquet file or a file without uids or of another schema than the first,
    ConfigError for a column that stands in two tables.
    """
    tables = [_open(pattern, f"table {n}: {name_of(pattern)}") for n, pattern in enumerate(patterns, start=1)]
    seen: dict[str, str] = {}
    for table in tables:
        for column in table.types:
            if column in seen:
                raise ConfigError(f"column {column!r} stands in {seen[column]!r} and in {table.pattern!r}; rename one.")
            seen[column] = table.pattern
    return tables


def _open(pattern: str, name: str) -> ForeignTable:
    files = [url for url in expand(pattern) if url.endswith(PARQUET_SUFFIX)]
    if not files:
        raise PoolError(f"{pattern!r} names no {PARQUET_SUFFIX} file to join.")
    schemas = [_read_schema(url) for url in files]
    for url, schema in zip(files, schemas, strict=True):
        if UID not in schema.names:
            raise PoolError(f"{url} has no column {UID!r} to join by; it has {', '.join(schema.names)}.")
        if not schema.equals(schemas[0]):
            raise PoolError(f"{url} has other columns or types than {files[0]}; a table is files of one schema.")
    types = {f.name: str(f.type) for f in schemas[0] if f.name != UID and not pa.types.is_nested(f.type)}
    return ForeignTable(name, pattern, tuple(files), types, hash_json([fingerprint(url) for url in files]))


def _read_schema(url: str) -> pa.Schema:
    try:
        with open_file(url) as file:
            return pq.read_schema(file).remove_metadata()
    except pa.ArrowInvalid as error:
        raise PoolError(f"{url} is not a parquet file: {error}") from None


def join_tables(
    start: Callable[[], Any],
    table: ScoreTable,
    parts: Sequence[ScorePart],
    foreign: Sequence[ForeignTable],
    columns: Iterable[str],
    folder: str,
) -> ScoreTable:
    """Return the score table with those of the foreign columns that `columns` names, joined into files under FOLDER.

    Raises PoolError when a uid stands twice in a foreign table, StageError when a worker cannot read one.
    """
    for number, other in enumerate(foreign):
        wanted = [column for column in columns if column in other.types]
        if wanted:
            target = join(folder, str(number))
            _join(start(), table, parts, other, wanted, target)
            table = table.add_folder(other.name, target, wanted)
    return table


def _join(
    session: Any, table: ScoreTable, parts: Sequence[ScorePart], other: ForeignTable, columns: list[str], folder: str
) -> None:
    words = [(word, pa.int64()) for word in KEY_WORDS]
    values = [(column, parse_type(other.types[column])) for column in columns]
    groups, num_rows = _list_row_groups(other), sum(part.num_rows for part in parts)
    pieces = max(num_rows, sum(rows for _, _, rows in groups)) // PARTITION_ROWS + 1
    right = open_table(session, partial(read_foreign, columns), groups, pa.schema(words + values))
    right = right.repartition(pieces, *KEY_WORDS)
    _check_unique(right, other)
    fields = pa.schema([(PART, pa.int32()), (ROW, pa.int64()), *words])
    left = open_table(session, partial(read_keys, table), list(enumerate(parts)), fields)
    left = left.repartition(pieces, *KEY_WORDS)
    right = right.hint("merge")  # spills; Spark thinks rows that come out of Python few enough to broadcast
    joined = left.join(right, list(KEY_WORDS), "left").select(PART, ROW, *(f"`{column}`" for column in columns))
    joined = joined.toDF(PART, ROW, *(f"column{place}" for place in range(len(columns))))  # "a.b" is a field to Spark
    ordered = joined.repartition(pieces, PART).sortWithinPartitions(PART, ROW)
    write = partial(write_joined, tuple(parts), pa.schema(values), folder)
    rows = collect_rows(ordered.mapInArrow(write, "n long"), what="join")
    found = sum(number for (number,) in rows)
    if found != num_rows:
        raise StageError(f"{found:,} rows came out of the join of {other.pattern!r} and {num_rows:,} scores.")


def _list_row_groups(table: ForeignTable) -> list[tuple[str, int, int]]:
    """Return (file, number, rows) of every row group."""
    groups = []
    for url in table.files:
        with open_file(url) as file:
            found = pq.ParquetFile(file).metadata
        groups += [(url, number, found.row_group(number).num_rows) for number in range(found.num_row_groups)]
    return groups


def _check_unique(right: Any, other: ForeignTable) -> None:
    """Raise PoolError that names the first uid that stands twice."""
    twice = right.groupBy(*KEY_WORDS).count().where("count > 1")
    found = collect_rows(
        twice.selectExpr(f"min(struct({', '.join(KEY_WORDS)})) AS first", "count(*) AS n"), what="join"
    )
    first, number = found[0]
    if number:
        uid = "".join(f"{word % (1 << 64):016x}" for word in first)
        raise PoolError(
            f"uid {uid} stands more than once in {other.pattern!r} ({number:,} such uids): keep one row each."
        )


def read_foreign(columns: Sequence[str], item: tuple[str, int, int]) -> Iterator[pa.RecordBatch]:
    """Yield KEY_WORDS and the columns, NaN as null, of one row group of a foreign table."""
    url, row_group, _ = item
    with open_file(url) as file:
        reader = pq.ParquetFile(file)
        for batch in reader.iter_batches(BATCH_ROWS, [row_group], [UID, *columns], use_threads=False):
            try:
                words = _split_words(read_uids(batch.column(UID)))
            except PoolError as error:
                raise PoolError(f"{url}, row group {row_group}: {error}") from None
            values = clean_batch(batch.select(list(columns))).columns
            yield pa.RecordBatch.from_arrays([*words, *values], names=[*KEY_WORDS, *columns])


def read_keys(table: ScoreTable, item: tuple[int, ScorePart]) -> Iterator[pa.RecordBatch]:
    """Yield PART, ROW and KEY_WORDS of one part in pool order."""
    number, part = item
    start = 0
    for batch in table.read(part.name, [], uids=True):
        rows = np.arange(start, start + batch.num_rows)
        which = pa.repeat(pa.scalar(number, pa.int32()), batch.num_rows)
        words = _split_words(parse_uids(batch.column(UID)))
        yield pa.RecordBatch.from_arrays([which, pa.array(rows), *words], names=[PART, ROW, *KEY_WORDS])
        start += batch.num_rows


def _split_words(uids: np.ndarray) -> list[pa.Array]:
    return [pa.array(np.ascontiguousarray(uids[field]).view(np.int64)) for field in UID_FIELDS]


def write_joined(
    parts: Sequence[ScorePart], schema: pa.Schema, folder: str, batches: Iterable[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    """Write the rows of each part, which come sorted by PART and ROW, to FOLDER/<part>.parquet; yield their number."""
    total = 0
    for number, pieces in _split_parts(batches, schema):
        url = join(folder, parts[number].name + PARQUET_SUFFIX)
        with write_atomic(url) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
            for piece in pieces:
                writer.write_batch(piece)
                total += piece.num_rows
    yield pa.RecordBatch.from_pydict({"n": pa.array([total])})


def _split_parts(
    batches: Iterable[pa.RecordBatch], schema: pa.Schema
) -> Iterator[tuple[int, Iterator[pa.RecordBatch]]]:
    """Yield (part number, its batches of the schema's columns) as itertools.groupby does: use one before the next.

    In `batches` these columns follow PART and ROW, under any names.
    """

    def cut() -> Iterator[tuple[int, pa.RecordBatch]]:
        for batch in batches:
            of_part = batch.column(0).to_numpy()
            values = pa.RecordBatch.from_arrays(batch.columns[2:], names=schema.names)
            borders = [0, *(np.flatnonzero(np.diff(of_part)) + 1).tolist(), len(of_part)]
            for start, stop in pairwise(borders):
                if stop > start:
                    yield int(of_part[start]), values.slice(start, stop - start).cast(schema)

    for number, pieces in groupby(cut(), key=itemgetter(0)):
        yield number, (piece for _, piece in pieces)
