"""Columns of a part that lie beside its rows: arrays of its npz, and what earlier filters scored.

A filter that needs `l14_img` or `clip_l14_img` gets it in its batches like any column of the pool's parquet, and need
not know where it comes from.  Vectors are lists of floats; a row that has none is null.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.batches import VECTOR_ROWS, read_batches
from pipeline.contract import Filter
from pipeline.errors import PoolError
from pipeline.filesystem import StorageError
from pipeline.npz import NpzArray, list_arrays, read_array_rows, unpack_array
from pipeline.pool import Part, PartRows, list_columns, read_part
from pipeline.schemas import PARQUET_SUFFIX, ROW, UID
from pipeline.storage import join, open_file

Take = Callable[[np.ndarray], pa.Array]
"""Places of rows within the part's rows, int64 -> the column's values there."""


def find_makers(filters: Sequence[Filter]) -> dict[str, dict[str, str]]:
    """Return filter -> {column it needs: the filter before it in the recipe that makes it}."""
    owners: dict[str, str] = {}
    makers = {}
    for filter in filters:
        makers[filter.name] = {column: owners[column] for column in filter.needs if column in owners}
        owners |= {column: filter.name for column, _ in filter.makes}
    return makers


def order_levels(filters: Sequence[Filter]) -> list[list[Filter]]:
    """Return the filters in groups, each of which needs only what the groups before it make."""
    depths: dict[str, int] = {}
    for name, makers in find_makers(filters).items():
        depths[name] = 1 + max((depths[maker] for maker in makers.values()), default=-1)
    return [[f for f in filters if depths[f.name] == depth] for depth in range(max(depths.values(), default=-1) + 1)]


def find_array_readers(filters: Sequence[Filter]) -> set[str]:
    """Return the names of filters that read vectors which no filter before them makes: those may be in an npz."""
    makers = find_makers(filters)
    return {f.name for f in filters if set(f.vectors) - makers[f.name].keys()}


def open_stored(
    part: Part, rows: PartRows, filters: Sequence[Filter], folder: str, makers: Mapping[str, Mapping[str, str]]
) -> tuple[dict[str, Take], str | None]:
    """Return a Take for each column that the filters need and the part's rows lack, and why its npz cannot be read.

    `makers` are those of find_makers; what they scored is in FOLDER/<filter>.  An npz that is damaged, or has other
    rows, gives a message and no Take.  Raises PoolError when scores are of other rows; OSError, StorageError and
    StageError when files cannot be read now, which says nothing of the part.
    """
    found: dict[str, Take] = {}
    needed = {column: maker for f in filters for column, maker in makers.get(f.name, {}).items()}
    for maker in set(needed.values()):
        found |= open_scores(join(folder, maker), part, rows, [c for c, m in needed.items() if m == maker])
    vectors = {column for f in filters for column in f.vectors} - needed.keys() - set(rows.table.column_names)
    if not vectors or part.arrays is None:
        return found, None
    try:
        return found | open_arrays(part.arrays, rows, vectors), None
    except StorageError:
        raise
    except PoolError as error:
        return found, str(error)


def open_arrays(url: str, rows: PartRows, names: Collection[str]) -> dict[str, Take]:
    """Return a Take for each of the arrays `names` that an npz has; other arrays are not looked at.

    Compressed arrays are unpacked here, into temporary files that go with the Takes.
    Raises PoolError when one is damaged or has not a row for each that the part lists; OSError as list_arrays does.
    """
    return {name: _take_from_array(array, rows) for name, array in list_arrays(url, names).items()}


def _take_from_array(array: NpzArray, rows: PartRows) -> Take:
    if array.num_rows != rows.num_listed or rows.listed is None:
        raise PoolError(f"{array.url}: {array.name} has {array.num_rows:,} rows, its parquet {rows.num_listed:,}.")
    array, listed = unpack_array(array), rows.listed

    def take(places: np.ndarray) -> pa.Array:
        order = np.argsort(places, kind="stable")
        found = np.empty((len(places), array.dim), array.dtype.newbyteorder("="))
        found[order] = read_array_rows(array, listed[places[order]])
        return pa.FixedSizeListArray.from_arrays(pa.array(found.reshape(-1)), array.dim)

    return take


def open_scores(folder: str, part: Part, rows: PartRows, columns: Sequence[str]) -> dict[str, Take]:
    """Return a Take per column of a part's scores FOLDER/<part>.parquet, which are held in memory.

    Raises PoolError when they are not of the part's rows in their order.
    """
    url = join(folder, part.name + PARQUET_SUFFIX)
    with open_file(url) as file:
        table = pq.read_table(file, columns=[UID, *columns]).combine_chunks()
    if not table[UID].equals(rows.table[UID]):
        raise PoolError(
            f"{url}: its uids are not those of the pool's part, whose rows have changed. Score the pool again."
        )
    return {name: _take_from_column(table[name]) for name in columns}


def _take_from_column(values: pa.ChunkedArray) -> Take:
    def take(places: np.ndarray) -> pa.Array:
        taken = values.take(pa.array(places))
        return taken.chunk(0) if taken.num_chunks == 1 else pa.concat_arrays(taken.chunks)

    return take


def add_stored(batches: Iterator[pa.RecordBatch], stored: Mapping[str, Take]) -> Iterator[pa.RecordBatch]:
    """Yield the batches with the stored columns, in place of the pool's own of the same name."""
    for batch in batches:
        places = batch.column(ROW).to_numpy().astype(np.int64)
        columns = dict(zip(batch.schema.names, batch.columns, strict=True))
        columns |= {name: take(places) for name, take in stored.items()}
        yield pa.RecordBatch.from_pydict(columns)


def read_stored(part: Part, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Yield UID and some columns of a part in pool order, from the pool's parquet or its npz.

    Raises PoolError when the part lacks one of them, or as open_arrays does.
    """
    rows = read_part(part, list(columns))
    beside = [column for column in columns if column not in list_columns(part)]
    stored = open_arrays(part.arrays, rows, beside) if part.arrays and beside else {}
    for column in beside:
        if column not in stored:
            raise PoolError(f"part {part.name} has no column {column!r}, in its parquet or its npz.")
    for batch in add_stored(read_batches(part, rows, images=False, max_rows=VECTOR_ROWS), stored):
        yield batch.select([UID, *columns])
