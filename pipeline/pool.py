"""Parts of a pool -> Arrow batches.  Reads what img2dataset and CommonPool write; writes nothing.

A part is `NAME.tar` with `NAME.parquet` beside it, a parquet alone (metadata only), or a tar alone.  Where there is a
parquet, its rows are the pool's rows, in its order, and the tar only gives their images; a row whose download failed
(`status` is not success) is counted and left out.  Captions come from `text` or `caption`, or from the .txt member.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import PoolError
from pipeline.manifest import hash_json
from pipeline.schemas import (
    CAPTION,
    CAPTION_EXTENSION,
    IMAGE,
    IMAGE_ERROR,
    IMAGE_EXTENSIONS,
    JSON_EXTENSION,
    KEY,
    ORIGINAL_HEIGHT,
    ORIGINAL_WIDTH,
    PARQUET_SUFFIX,
    REASON_MISSING_IMAGE,
    REASON_NOT_DOWNLOADED,
    REASON_TRUNCATED_TAR,
    ROW,
    STATUS,
    STATUS_SUCCESS,
    TAR_SUFFIX,
    TEXT,
    UID,
    URL,
)
from pipeline.storage import expand, fingerprint, list_folder, name_of, open_file
from pipeline.tars import BrokenTar, TarRow, read_rows
from pipeline.uid import derive_uid

BATCH_ROWS = 256
BATCH_BYTES = 64 << 20
"""A batch with images is handed on when it holds this many rows or image bytes."""


@dataclass(frozen=True, slots=True)
class Part:
    """One piece of a pool, the unit of work; at least one of tar and table is there."""

    name: str
    """File name without suffix; with several sources (`a::b`) it starts with the source's number."""
    tar: str | None
    table: str | None

    def fingerprints(self) -> list[dict[str, Any]]:
        """Return what tells this version of the part's files from another."""
        return [fingerprint(url) for url in (self.tar, self.table) if url]


@dataclass(frozen=True, slots=True)
class PartRows:
    """The rows of a part, without images."""

    table: pa.Table
    """Always has ROW, UID, KEY, TEXT; any other column the pool's parquet has."""
    num_listed: int
    """Rows the part lists, failed downloads included."""
    failed: dict[str, int]
    """Listed rows that are not in `table`, by reason."""
    broken: str | None
    """Why the tar of a part without a parquet ended early, else None; how many rows that cost cannot be known."""


def list_parts(pool: str) -> list[Part]:
    """Return the parts that a folder, glob, brace range or `a::b` list names, in order.

    Raises PoolError when there is none; stats, npz and other files are passed over.
    """
    sources = pool.split("::")
    parts: list[Part] = []
    for number, source in enumerate(sources):
        prefix = f"{number}-" if len(sources) > 1 else ""
        parts += _list_source(source, prefix)
    if not parts:
        raise PoolError(f"pool {pool!r} has no .tar and no .parquet file. Name the folder that img2dataset wrote to.")
    return parts


def _list_source(source: str, prefix: str) -> list[Part]:
    named = [url for url in expand(source) if url.endswith((TAR_SUFFIX, PARQUET_SUFFIX))]
    folders = {url.rsplit("/", 1)[0] if "/" in url else "." for url in named}
    present = {_without_dot(url) for folder in folders for url in list_folder(folder)} | set(named)
    stems = dict.fromkeys(url[: -len(_suffix(url))] for url in named)
    return [_part_of(stem, prefix, present) for stem in stems]


def _without_dot(url: str) -> str:
    return url[2:] if url.startswith("./") else url


def _suffix(url: str) -> str:
    return TAR_SUFFIX if url.endswith(TAR_SUFFIX) else PARQUET_SUFFIX


def _part_of(stem: str, prefix: str, present: set[str]) -> Part:
    tar, table = stem + TAR_SUFFIX, stem + PARQUET_SUFFIX
    return Part(prefix + name_of(stem), tar if tar in present else None, table if table in present else None)


def pool_identity(parts: Sequence[Part]) -> str:
    """Return a hash of every part's file names, sizes and versions."""
    return hash_json([[part.name, part.fingerprints()] for part in parts])


def list_columns(part: Part) -> list[str]:
    """Return the columns a batch of this part will have, IMAGE included when there is a tar.  Raises PoolError."""
    if part.table is None:
        return [ROW, UID, KEY, TEXT, URL, ORIGINAL_WIDTH, ORIGINAL_HEIGHT, IMAGE]
    with _open_parquet(part.table) as parquet:
        names = set(parquet.schema_arrow.names)
    names |= {ROW, UID, KEY} | ({TEXT} if CAPTION in names else set()) | ({IMAGE} if part.tar else set())
    return sorted(names)


def count_rows(part: Part) -> int:
    """Return the rows a part's parquet lists (from its footer), 0 when it has none: for progress bars."""
    if part.table is None:
        return 0
    try:
        with _open_parquet(part.table) as parquet:
            return int(parquet.metadata.num_rows)
    except PoolError:
        return 0


@contextmanager
def _open_parquet(url: str) -> Iterator[pq.ParquetFile]:
    """Yield an open parquet file.  Raises PoolError when it cannot be opened, or read inside the block."""
    with open_file(url) as file:
        try:
            yield pq.ParquetFile(file)
        except (pa.ArrowException, OSError) as error:
            raise PoolError(f"{url} cannot be read as parquet: {error}") from None


def read_part(part: Part) -> PartRows:
    """Return the rows of a part without images, in the pool's order.

    Raises PoolError when the parquet cannot be read, has no caption column, or neither `uid` nor `url` names its rows.
    """
    return _read_from_tar(part.tar) if part.table is None and part.tar else _read_from_table(part)


def _read_from_table(part: Part) -> PartRows:
    assert part.table
    with _open_parquet(part.table) as parquet:
        table = parquet.read()
    num_listed = table.num_rows
    if STATUS in table.column_names:
        table = table.filter(pc.equal(table[STATUS], STATUS_SUCCESS).fill_null(False))
    failed = {REASON_NOT_DOWNLOADED: num_listed - table.num_rows} if table.num_rows < num_listed else {}
    return PartRows(_normalise(table, part.table), num_listed, failed, None)


def _normalise(table: pa.Table, url: str) -> pa.Table:
    """Return the table with ROW, UID, KEY and TEXT columns of the right types."""
    names = table.column_names
    if TEXT not in names and CAPTION not in names:
        raise PoolError(f"{url} has neither a {TEXT!r} nor a {CAPTION!r} column (it has {names}).")
    if TEXT not in names:
        table = table.rename_columns([TEXT if n == CAPTION else n for n in names])
    table = _set(table, TEXT, table[TEXT].cast(pa.string()))
    if UID not in names:
        table = table.append_column(UID, _derive_uids(table, url))
    if KEY not in names:
        table = table.append_column(KEY, pa.array([f"{i:09d}" for i in range(table.num_rows)], pa.string()))
    return table.append_column(ROW, pa.array(range(table.num_rows), pa.int32()))


def _set(table: pa.Table, name: str, values: Any) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, values)


def _derive_uids(table: pa.Table, url: str) -> pa.Array:
    if URL not in table.column_names:
        raise PoolError(f"{url} has neither a {UID!r} nor a {URL!r} column, so its rows have no name that lasts.")
    pairs = zip(table[URL].to_pylist(), table[TEXT].to_pylist(), strict=True)
    return pa.array([derive_uid(link, text) for link, text in pairs], pa.string())


def _read_from_tar(url: str) -> PartRows:
    rows: list[dict[str, Any]] = []
    broken = None
    try:
        for tar_row in read_rows(url):
            rows.append(_describe(tar_row) | {ROW: len(rows)})
    except BrokenTar as error:
        broken = str(error)
    schema = pa.schema(
        [(ROW, pa.int32()), (UID, pa.string()), (KEY, pa.string()), (TEXT, pa.string()), (URL, pa.string())]
        + [(ORIGINAL_WIDTH, pa.int64()), (ORIGINAL_HEIGHT, pa.int64())]
    )
    return PartRows(pa.Table.from_pylist(rows, schema), len(rows), {}, broken)


def _describe(tar_row: TarRow) -> dict[str, Any]:
    """Return the columns of one row of a tar that has no parquet, from its .json and .txt members."""
    try:
        details = json.loads(tar_row.find([JSON_EXTENSION]) or b"{}")
    except ValueError:
        details = {}
    details = details if isinstance(details, dict) else {}
    caption = tar_row.find([CAPTION_EXTENSION])
    text = caption.decode("utf-8", "replace") if caption is not None else details.get(CAPTION, details.get(TEXT))
    text = text if isinstance(text, str) else None
    uid, link = details.get(UID), details.get(URL)
    sizes = {name: details.get(name) for name in (ORIGINAL_WIDTH, ORIGINAL_HEIGHT)}
    return {
        UID: uid if isinstance(uid, str) else derive_uid(tar_row.find(IMAGE_EXTENSIONS), text),
        KEY: tar_row.key,
        TEXT: text,
        URL: link if isinstance(link, str) else None,
        **{name: size if isinstance(size, int) else None for name, size in sizes.items()},
    }


def read_batches(part: Part, rows: PartRows, *, images: bool) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a part in batches, each row once.

    With `images`, batches have IMAGE and IMAGE_ERROR and come in the tar's order, rows without an image last;
    ROW gives each row's place in the pool's order.  Batches are bounded in rows and image bytes.
    """
    if not images:
        yield from rows.table.combine_chunks().to_batches(max_chunksize=BATCH_ROWS * 16)
        return
    place = {key: row for row, key in reversed(list(enumerate(rows.table[KEY].to_pylist())))}
    waiting: list[tuple[int, bytes | None, str | None]] = []
    waiting_bytes, cut = 0, rows.broken is not None
    try:
        for tar_row in read_rows(part.tar) if part.tar else ():
            row = place.pop(tar_row.key, None)
            if row is None:
                continue
            image = tar_row.find(IMAGE_EXTENSIONS)
            waiting.append((row, image, None if image is not None else REASON_MISSING_IMAGE))
            waiting_bytes += len(image or b"")
            if len(waiting) >= BATCH_ROWS or waiting_bytes >= BATCH_BYTES:
                yield _make_batch(rows.table, waiting)
                waiting, waiting_bytes = [], 0
    except BrokenTar:
        cut = True
    why = REASON_TRUNCATED_TAR if cut else REASON_MISSING_IMAGE
    waiting += [(row, None, why) for row in _rows_left(rows.table, place)]
    for start in range(0, len(waiting), BATCH_ROWS):
        yield _make_batch(rows.table, waiting[start : start + BATCH_ROWS])


def _rows_left(table: pa.Table, place: dict[str, int]) -> list[int]:
    """Return the rows the tar did not give: keys still in `place`, and repeats of a key (the first has the image)."""
    first: dict[str, int] = {}
    keys = enumerate(table[KEY].to_pylist())
    return [row for row, key in keys if first.setdefault(key, row) != row or place.get(key) == row]


def _make_batch(table: pa.Table, waiting: list[tuple[int, bytes | None, str | None]]) -> pa.RecordBatch:
    rows, images, errors = zip(*waiting, strict=True)
    taken = table.take(pa.array(rows, pa.int32()))
    taken = taken.append_column(IMAGE, pa.array(images, pa.binary()))
    taken = taken.append_column(IMAGE_ERROR, pa.array(errors, pa.string()))
    return taken.combine_chunks().to_batches()[0]
