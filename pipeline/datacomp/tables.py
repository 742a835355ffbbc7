"""One parquet of metadata or of a shard: its rows, the types and nulls of its columns, its uids."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import PoolError
from pipeline.pool import UID_PATTERN
from pipeline.schemas import STATUS, UID
from pipeline.storage import name_of, open_file
from pipeline.uid import UID_BYTES, UID_DTYPE, parse_uids, read_uids

BATCH_ROWS = 1 << 17


@dataclass(slots=True)
class TableFile:
    """What one parquet holds."""

    num_rows: int = 0
    """As its footer says."""
    types: dict[str, pa.DataType] = field(default_factory=dict)
    nulls: dict[str, int] = field(default_factory=dict)
    """Column -> rows without a value; of the columns asked for that are not nested."""
    statuses: dict[str, int] = field(default_factory=dict)
    """img2dataset's status -> rows; empty where there is no such column."""
    uids: np.ndarray = field(default_factory=lambda: np.empty(0, UID_DTYPE))
    """Of every row that has one; of those with a status, only where it is the one asked for."""
    num_bad: int = 0
    """Rows, of the status asked for, whose uid is none."""
    error: str | None = None
    """Why it cannot be read; what stands above may then be half of it, and there are no uids."""


def read_table_file(url: str, *, count_nulls: Collection[str] = (), status: str | None = None) -> TableFile:
    """Return what a parquet holds, 16 bytes a row of it; `status` chooses the rows whose uids count.

    Of the data uid and status are read.  Nulls are taken from the footer, which does not say them of nested columns: so
    those are left out.  A column is read only where a footer without statistics leaves its nulls to be counted.
    """
    found = TableFile()
    try:
        with open_file(url) as file:
            parquet = pq.ParquetFile(file)
            found.num_rows = parquet.metadata.num_rows
            found.types = {field.name: field.type for field in parquet.schema_arrow}
            flat = {name for name, kind in found.types.items() if not pa.types.is_nested(kind)}
            found.nulls = {name: _count_nulls(parquet, name) for name in count_nulls if name in flat}
            _read_rows(parquet, found, status)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        found.error = " ".join(str(error).replace(url, name_of(url)).split())
        found.uids = np.empty(0, UID_DTYPE)
    return found


def _read_rows(parquet: pq.ParquetFile, found: TableFile, status: str | None) -> None:
    columns = [name for name in (UID, STATUS) if name in found.types]
    pieces = [found.uids]
    for batch in parquet.iter_batches(BATCH_ROWS, columns=columns, use_threads=False) if columns else ():
        if STATUS in columns:
            statuses = batch.column(STATUS).cast(pa.string()).fill_null("null")
            for pair in statuses.value_counts().to_pylist():
                found.statuses[pair["values"]] = found.statuses.get(pair["values"], 0) + pair["counts"]
            batch = batch.filter(pc.equal(statuses, status)) if status else batch
        if UID in columns:
            uids, num_bad = parse_column(batch.column(UID))
            pieces.append(uids)
            found.num_bad += num_bad
    found.uids = np.concatenate(pieces)


def _count_nulls(parquet: pq.ParquetFile, name: str) -> int:
    footer, total = parquet.metadata, 0
    places = [n for n in range(footer.num_columns) if footer.schema.column(n).path == name]
    for group in range(footer.num_row_groups):
        known: Any = footer.row_group(group).column(places[0]).statistics if places else None
        if known is not None and known.has_null_count:
            total += known.null_count
        else:
            total += sum(b.column(0).null_count for b in parquet.iter_batches(BATCH_ROWS, [group], [name]))
    return total


def parse_column(column: pa.Array) -> tuple[np.ndarray, int]:
    """Return the uids (rows that have one,) of UID_DTYPE, in order, and how many rows have none.

    As pool.py does it: case and dashes do not matter, and 16 bytes are a uid too.
    """
    if column.type == pa.binary(UID_BYTES):
        return read_uids(column.drop_null()), column.null_count
    texts = column.cast(pa.string())
    try:
        return parse_uids(texts), 0
    except (PoolError, UnicodeDecodeError):
        texts = pc.replace_substring(pc.utf8_lower(texts), "-", "")
        named = texts.filter(pc.match_substring_regex(texts, UID_PATTERN).fill_null(False))
        return parse_uids(named), len(texts) - len(named)
