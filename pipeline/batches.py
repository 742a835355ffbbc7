"""Rows of a part -> Arrow batches, with their images or without, each row once.

With images, batches come in the tar's order, for a tar is read from one end to the other; ROW says where a row stands
in the pool's order.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import pyarrow as pa

from pipeline.pool import Part, PartRows, clean_text
from pipeline.ranges import read_ranges
from pipeline.schemas import (
    END,
    IMAGE,
    IMAGE_ERROR,
    IMAGE_EXTENSIONS,
    KEY,
    REASON_MISSING_IMAGE,
    REASON_TRUNCATED_TAR,
    ROW,
    START,
    UID,
)
from pipeline.tars import BrokenTar, read_rows, unpack_row

BATCH_ROWS = 256
BATCH_BYTES = 64 << 20
"""A batch with images is handed on when it holds this many rows or image bytes."""
PLAIN_ROWS, PLAIN_BYTES = 1 << 16, 8 << 20
"""Most rows and, about, most bytes of a batch without images: words stand in many captions, and are looked up once."""
VECTOR_ROWS = 4096
"""Most rows of a batch with vectors."""


def read_batches(part: Part, rows: PartRows, *, images: bool, max_rows: int = PLAIN_ROWS) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a part in batches, each row once; without images at most `max_rows` in each.

    With `images`, batches have IMAGE, IMAGE_ERROR, START and END and come in the tar's order, rows without an image
    last; ROW gives each row's place in the pool's order.  Batches are bounded in rows and image bytes.
    """
    if not images:
        num_fit = PLAIN_BYTES * rows.table.num_rows // max(1, rows.table.nbytes)
        yield from rows.table.combine_chunks().to_batches(max_chunksize=max(1, min(max_rows, num_fit)))
        return
    place = {key: row for row, key in reversed(list(enumerate(rows.table[KEY].to_pylist())))}
    waiting: list[_Found] = []
    waiting_bytes, cut = 0, rows.broken is not None
    try:
        for tar_row in read_rows(part.tar, repeats=True) if part.tar else ():
            row = place.pop(clean_text(tar_row.key) or "", None)
            if row is None:
                continue
            image = tar_row.find(IMAGE_EXTENSIONS)
            waiting.append(_Found(row, image, None if image is not None else REASON_MISSING_IMAGE, *tar_row.span))
            waiting_bytes += len(image or b"")
            if len(waiting) >= BATCH_ROWS or waiting_bytes >= BATCH_BYTES:
                yield _make_batch(rows.table, waiting)
                waiting, waiting_bytes = [], 0
    except BrokenTar:
        cut = True
    why = REASON_TRUNCATED_TAR if cut else REASON_MISSING_IMAGE
    waiting += [_Found(row, None, why, None, None) for row in _rows_left(rows.table, place)]
    for start in range(0, len(waiting), BATCH_ROWS):
        yield _make_batch(rows.table, waiting[start : start + BATCH_ROWS])


def read_whole(rows: PartRows, columns: Collection[str]) -> Iterator[pa.RecordBatch]:
    """Yield all rows of a part in one batch, in the pool's order: ROW, UID, KEY and those of `columns` that it has.

    An empty part gives no batch.
    """
    wanted = [name for name in rows.table.column_names if name in {ROW, UID, KEY, *columns}]
    yield from rows.table.select(wanted).combine_chunks().to_batches()


def read_chosen(
    part: Part, rows: PartRows, chosen: Sequence[int], *, spans: Mapping[int, tuple[int, int]], images: bool
) -> Iterator[pa.RecordBatch]:
    """Yield what read_batches does for some rows (places, ascending) only, reading their own bytes in the tar.

    `spans` has the bytes [start, end) of the rows that have an image.
    """
    if not images:
        yield from rows.table.take(pa.array(chosen, pa.int32())).combine_chunks().to_batches()
        return
    here = [row for row in chosen if row in spans]
    waiting: list[_Found] = []
    waiting_bytes = 0
    for row, packed in zip(here, read_ranges(part.tar or "", [spans[row] for row in here]), strict=True):
        waiting.append(_Found(row, unpack_row(packed, part.tar or "").find(IMAGE_EXTENSIONS), None, *spans[row]))
        waiting_bytes += len(packed)
        if len(waiting) >= BATCH_ROWS or waiting_bytes >= BATCH_BYTES:
            yield _make_batch(rows.table, waiting)
            waiting, waiting_bytes = [], 0
    waiting += [_Found(row, None, REASON_MISSING_IMAGE, None, None) for row in chosen if row not in spans]
    for start in range(0, len(waiting), BATCH_ROWS):
        yield _make_batch(rows.table, waiting[start : start + BATCH_ROWS])


def _rows_left(table: pa.Table, place: dict[str, int]) -> list[int]:
    """Return the rows the tar did not give: keys still in `place`, and repeats of a key (the first has the image)."""
    first: dict[str, int] = {}
    keys = enumerate(table[KEY].to_pylist())
    return [row for row, key in keys if first.setdefault(key, row) != row or place.get(key) == row]


class _Found(NamedTuple):
    """What the tar has of one row."""

    row: int
    image: bytes | None
    error: str | None
    start: int | None
    end: int | None


def _make_batch(table: pa.Table, waiting: Sequence[_Found]) -> pa.RecordBatch:
    rows, images, errors, starts, ends = zip(*waiting, strict=True)
    taken = table.take(pa.array(rows, pa.int32()))
    taken = taken.append_column(IMAGE, pa.array(images, pa.binary()))
    taken = taken.append_column(IMAGE_ERROR, pa.array(errors, pa.string()))
    taken = taken.append_column(START, pa.array(starts, pa.int64()))
    taken = taken.append_column(END, pa.array(ends, pa.int64()))
    return taken.combine_chunks().to_batches()[0]
