"""The quarantine: OUT/failures/<part>.parquet, one line per row and filter that could not be scored, and why.

Rows that the pool itself spoiled (not downloaded, no uid) are there too, under the filter "pool".
"""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.contract import Filter, Scored
from pipeline.filesystem import StorageError
from pipeline.manifest import Counts
from pipeline.pool import Part, PartRows
from pipeline.schemas import (
    FAILURE_FILTER,
    FAILURE_MESSAGE,
    FAILURE_REASON,
    FAILURE_SCHEMA,
    FAILURES_FOLDER,
    KEY,
    PARQUET_SUFFIX,
    POOL,
    ROW,
    START,
    UID,
)
from pipeline.score_files import write_parquet
from pipeline.storage import join, open_file

MAX_MESSAGE_CHARS = 500


def make_failures(filter: Filter, part: Part, batch: pa.RecordBatch, scored: Scored) -> pa.Table:
    """Return the rows of a batch that a filter could not score, as FAILURE_SCHEMA."""
    places = pa.array([f.position for f in scored.failures], pa.int32())
    num = len(scored.failures)
    has_tar = START in batch.schema.names
    columns = [
        pa.array([part.name] * num, pa.string()),
        *(batch.column(name).take(places) for name in (ROW, UID, KEY)),
        batch.column(START).take(places) if has_tar else pa.nulls(num, pa.int64()),
        pa.array([filter.name] * num, pa.string()),
        pa.array([f.reason for f in scored.failures], pa.string()),
        pa.array([f.message[:MAX_MESSAGE_CHARS] for f in scored.failures], pa.string()),
    ]
    return pa.table(columns, schema=FAILURE_SCHEMA)


def make_pool_failures(part: Part, rows: PartRows) -> pa.Table:
    """Return the rows that the pool itself spoiled (not downloaded, no uid) as failures of "pool"."""
    num = rows.lost.num_rows
    columns = [
        pa.array([part.name] * num, pa.string()),
        pa.nulls(num, pa.int32()),
        rows.lost[UID],
        rows.lost[KEY],
        pa.nulls(num, pa.int64()),
        pa.array([POOL] * num, pa.string()),
        rows.lost[FAILURE_REASON],
        rows.lost[FAILURE_MESSAGE],
    ]
    return pa.table(columns, schema=FAILURE_SCHEMA)


def count_failures(filter: Filter, num_rows: int, failed: pa.Table) -> Counts:
    """Return the account of one filter on a part of `num_rows`, from the part's failures."""
    own = failed.filter(pc.equal(failed[FAILURE_FILTER], filter.name))[FAILURE_REASON]
    tally = {pair["values"]: pair["counts"] for pair in own.value_counts().to_pylist()}
    return Counts(read=num_rows, kept=num_rows - len(own), failed=dict(sorted(tally.items())))


def merge_failures(out: str, part: Part, filters: Sequence[Filter], failed: pa.Table) -> None:
    """Write the part's failures; what other filters had reported stays."""
    names = {POOL, *(f.name for f in filters)}
    before = read_failures(out, part)
    others = pa.array([name not in names for name in before[FAILURE_FILTER].to_pylist()], pa.bool_())
    write_failures(out, part, pa.concat_tables([before.filter(others), failed]))


def write_failures(out: str, part: Part, failures: pa.Table) -> None:
    """Write the quarantine of a part, in a fixed order."""
    order = [(FAILURE_FILTER, "ascending"), (ROW, "ascending"), (KEY, "ascending")]
    write_parquet(join(out, FAILURES_FOLDER, part.name + PARQUET_SUFFIX), failures.sort_by(order))


def read_failures(out: str, part: Part) -> pa.Table:
    """Return the quarantine of a part as FAILURE_SCHEMA, empty when it is absent, torn or of an older format.

    Raises OSError or StorageError when it is there and cannot be read: what it holds must not be forgotten.
    """
    try:
        with open_file(join(out, FAILURES_FOLDER, part.name + PARQUET_SUFFIX)) as file:
            return pq.read_table(file).cast(FAILURE_SCHEMA)
    except StorageError:
        raise
    except (FileNotFoundError, pa.ArrowInvalid, KeyError, ValueError):
        return FAILURE_SCHEMA.empty_table()
