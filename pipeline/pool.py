"""Parts of a pool and their rows, images aside.  Reads what img2dataset and CommonPool write; writes nothing.

A part is `NAME.tar` with `NAME.parquet` beside it, a parquet alone (metadata only), or a tar alone.  Where there is a
parquet, its rows are the pool's rows, in its order, and the tar only gives their images; a row whose download failed
(`status` is not success) or whose uid is none is counted and left out.  Captions come from `text` or `caption`, or from
the .txt member.  A `NAME.npz` beside the parquet holds embeddings, row by row, as CommonPool's do (stored.py).
"""

import json
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import PoolError, is_out_of_means
from pipeline.manifest import hash_json
from pipeline.schemas import (
    ARRAYS_SUFFIX,
    CAPTION,
    CAPTION_EXTENSION,
    END,
    ERROR_MESSAGE,
    FAILURE_MESSAGE,
    FAILURE_REASON,
    IMAGE,
    IMAGE_ERROR,
    IMAGE_EXTENSIONS,
    JSON_EXTENSION,
    KEY,
    ORIGINAL_HEIGHT,
    ORIGINAL_WIDTH,
    PARQUET_SUFFIX,
    REASON_BAD_UID,
    REASON_DUPLICATE_KEY,
    REASON_NOT_DOWNLOADED,
    ROW,
    START,
    STATUS,
    STATUS_SUCCESS,
    TAR_SUFFIX,
    TEXT,
    UID,
    URL,
)
from pipeline.storage import expand, fingerprint, fingerprint_all, folder_of, list_folder, name_of, open_file
from pipeline.tars import BrokenTar, TarRow, read_rows
from pipeline.uid import derive_uid

UID_PATTERN = r"^[0-9a-f]{32}$"
UID_BYTES = 16
MAX_SIDE_PX = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Part:
    """One piece of a pool, the unit of work; at least one of tar and table is there."""

    name: str
    """File name without suffix; where parts come from several folders it starts with the folder's number."""
    tar: str | None
    table: str | None
    arrays: str | None = None
    """An npz whose arrays have one row for each row that the parquet lists, in its order."""

    def fingerprints(self) -> list[dict[str, Any]]:
        """Return what tells this version of the part's files from another."""
        return [fingerprint(url) for url in (self.tar, self.table) if url]


@dataclass(frozen=True, slots=True)
class PartRows:
    """The rows of a part, without images."""

    table: pa.Table
    """Always has ROW, UID and KEY; TEXT and any other column the pool's parquet has, or those asked for."""
    num_listed: int
    """Rows the part lists, failed downloads included."""
    lost: pa.Table
    """Listed rows that are not in `table`, as LOST_SCHEMA."""
    broken: str | None
    """Why the tar of a part without a parquet ended early, else None; how many rows that cost cannot be known."""
    listed: np.ndarray | None = None
    """int64 (rows,): where each row of `table` stands among the rows that the parquet lists; None without a parquet."""

    @property
    def failed(self) -> dict[str, int]:
        """Listed rows that are not in `table`, by reason."""
        return {pair["values"]: pair["counts"] for pair in self.lost[FAILURE_REASON].value_counts().to_pylist()}


LOST_SCHEMA = pa.schema([(name, pa.string()) for name in (UID, KEY, FAILURE_REASON, FAILURE_MESSAGE)])


def list_parts(pool: str) -> list[Part]:
    """Return the parts that a folder, glob, brace range or `a::b` list names, in order.

    Raises PoolError when there is none; stats, hidden and other files are passed over.
    """
    urls = [url for url in expand(pool) if url.endswith((TAR_SUFFIX, PARQUET_SUFFIX))]
    stems = dict.fromkeys(url[: -len(_suffix(url))] for url in urls if not name_of(url).startswith("."))
    if not stems:
        raise PoolError(f"pool {pool!r} has no .tar and no .parquet file. Name the folder that img2dataset wrote to.")
    folders = list(dict.fromkeys(map(folder_of, stems)))
    present = {folder: {name_of(url) for url in list_folder(folder)} for folder in folders}
    parts = []
    for stem in stems:
        name, folder = name_of(stem), folder_of(stem)
        suffixes = (TAR_SUFFIX, PARQUET_SUFFIX, ARRAYS_SUFFIX)
        tar, table, arrays = (stem + s if name + s in present[folder] else None for s in suffixes)
        prefix = f"{folders.index(folder)}-" if len(folders) > 1 else ""
        parts.append(Part(prefix + name, tar, table, arrays if table else None))
    return parts


def _suffix(url: str) -> str:
    return TAR_SUFFIX if url.endswith(TAR_SUFFIX) else PARQUET_SUFFIX


def pool_identity(parts: Sequence[Part]) -> str:
    """Return a hash of every part's file names, sizes and versions."""
    files = [(part.name, url) for part in parts for url in (part.tar, part.table) if url]
    versions = fingerprint_all([url for _, url in files])
    return hash_json([[name, version] for (name, _), version in zip(files, versions, strict=True)])


def list_columns(part: Part) -> list[str]:
    """Return the columns of a part's batches: no npz arrays, IMAGE when there is a tar.  Raises PoolError."""
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
    try:
        with open_file(url) as file:
            yield pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        if is_out_of_means(error):
            raise
        raise PoolError(f"{url} cannot be read as parquet: {error}") from None


def read_part(part: Part, columns: Collection[str] | None = None) -> PartRows:
    """Return the rows of a part without images, in the pool's order; of its parquet only `columns`, where given.

    Raises PoolError when the parquet cannot be read, has no caption column, or neither `uid` nor `url` names its rows.
    """
    return _read_from_tar(part.tar) if part.table is None and part.tar else _read_from_table(part, columns)


def _read_from_table(part: Part, columns: Collection[str] | None) -> PartRows:
    assert part.table
    with _open_parquet(part.table) as parquet:
        names = parquet.schema_arrow.names
        table = _drop_reserved(parquet.read(None if columns is None else _choose_columns(names, columns)))
        num_listed = table.num_rows
        if CAPTION in (columns or ()) and TEXT not in names and CAPTION in names:
            table = table.append_column(TEXT, table[CAPTION])
        table = _normalise(table, part, names)
    lost = [LOST_SCHEMA.empty_table()]
    kept = pa.array(np.ones(num_listed, bool))
    if STATUS in table.column_names:
        downloaded = pc.equal(table[STATUS].cast(pa.string()), STATUS_SUCCESS).fill_null(False)
        lost.append(_describe_lost(table.filter(pc.invert(downloaded)), REASON_NOT_DOWNLOADED, ERROR_MESSAGE))
        kept = downloaded
    named = pc.match_substring_regex(table[UID], UID_PATTERN).fill_null(False)
    lost.append(_describe_lost(table.filter(pc.and_(kept, pc.invert(named))), REASON_BAD_UID, UID))
    kept = pc.and_(kept, named)
    table, listed = table.filter(kept), np.flatnonzero(kept.to_numpy(zero_copy_only=False))
    table = table.append_column(ROW, pa.array(np.arange(len(listed), dtype=np.int32)))
    return PartRows(table, num_listed, pa.concat_tables(lost), None, listed)


def _choose_columns(names: Sequence[str], columns: Collection[str]) -> list[str]:
    """Return the parquet's columns that hold the wanted ones, what names the rows, and what says which were lost."""
    wanted = {UID, KEY, STATUS, ERROR_MESSAGE, *columns} | (set() if UID in names else {URL, TEXT})
    wanted |= {CAPTION} if TEXT in wanted and TEXT not in names else set()
    return [name for name in names if name in wanted]


def _describe_lost(table: pa.Table, reason: str, says_why: str) -> pa.Table:
    """Return rows that are left out as LOST_SCHEMA; column `says_why`, where the pool has it, is the message."""
    reasons = pa.array([reason] * table.num_rows, pa.string())
    has_message = says_why in table.column_names and pa.types.is_string(table.schema.field(says_why).type)
    messages = _as_text(table, says_why, None) if has_message else pa.nulls(table.num_rows, pa.string())
    return pa.table([table[UID], table[KEY], reasons, messages], schema=LOST_SCHEMA)


def _drop_reserved(table: pa.Table) -> pa.Table:
    """Return the table without columns that reading adds itself, and without repeats of a column's name."""
    first = dict.fromkeys(name for name in table.column_names if name not in (ROW, IMAGE, IMAGE_ERROR, START, END))
    return table.select([table.column_names.index(name) for name in first])


def _normalise(table: pa.Table, part: Part, listed: Sequence[str]) -> pa.Table:
    """Return the table with UID, KEY and, if read, TEXT of type string; uids in lower case without dashes.

    `listed` are all columns of the parquet.
    Raises PoolError when captions or names for the rows are absent or of a type that cannot be text.
    """
    names, url = table.column_names, part.table
    if TEXT not in listed and CAPTION not in listed:
        raise PoolError(f"{url} has neither a {TEXT!r} nor a {CAPTION!r} column (it has {list(listed)}).")
    if TEXT not in listed and TEXT not in names:
        table = table.rename_columns([TEXT if n == CAPTION else n for n in names])
    if TEXT in table.column_names:
        table = _set(table, TEXT, _as_text(table, TEXT, url))
    uids = _as_uids(table, url) if UID in names else _derive_uids(table, url)
    table = _set(table, UID, pc.replace_substring(pc.utf8_lower(uids), "-", ""))
    if KEY not in names and part.tar:
        raise PoolError(f"{url} has no {KEY!r} column, so its rows cannot be told apart in {part.tar}.")
    if KEY in names and pa.types.is_integer(table.schema.field(KEY).type):
        raise PoolError(f"{url}: column {KEY!r} holds numbers, and a tar's keys are text such as 000000012.")
    numbers = pa.array(np.arange(table.num_rows)).cast(pa.string())
    return _set(table, KEY, _as_text(table, KEY, url) if KEY in names else pc.utf8_lpad(numbers, 9, "0"))


def _as_text(table: pa.Table, name: str, url: str | None) -> Any:
    """Return a column as string, bytes that are not UTF-8 replaced; raise PoolError when it is not text at all."""
    kind = table.schema.field(name).type
    if pa.types.is_nested(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        raise PoolError(f"{url}: column {name!r} is {kind}, not text.")
    try:
        text = table[name].cast(pa.string())
        text.validate(full=True)  # reading does not look whether it is UTF-8
        return text
    except pa.ArrowInvalid:
        octets = table[name].cast(pa.binary()).to_pylist()
        return pa.array([o if o is None else o.decode("utf-8", "replace") for o in octets], pa.string())


def _as_uids(table: pa.Table, url: str | None) -> Any:
    kind = table.schema.field(UID).type
    if pa.types.is_fixed_size_binary(kind) and kind.byte_width == UID_BYTES:
        return pa.array([None if u is None else u.hex() for u in table[UID].to_pylist()], pa.string())
    return _as_text(table, UID, url)


def _set(table: pa.Table, name: str, values: Any) -> pa.Table:
    if name not in table.column_names:
        return table.append_column(name, values)
    return table.set_column(table.column_names.index(name), name, values)


def _derive_uids(table: pa.Table, url: str | None) -> pa.Array:
    if URL not in table.column_names:
        raise PoolError(f"{url} has neither a {UID!r} nor a {URL!r} column, so its rows have no name that lasts.")
    pairs = zip(_as_text(table, URL, url).to_pylist(), table[TEXT].to_pylist(), strict=True)
    return pa.array([derive_uid(link, text) for link, text in pairs], pa.string())


def _read_from_tar(url: str) -> PartRows:
    rows: dict[str, dict[str, Any]] = {}
    lost: list[dict[str, Any]] = []
    broken = None
    try:
        for tar_row in read_rows(url, repeats=True):
            row = _describe(tar_row)
            if row[KEY] in rows:
                message = "an earlier row of this tar has this key"
                lost.append(row | {FAILURE_REASON: REASON_DUPLICATE_KEY, FAILURE_MESSAGE: message})
            else:
                rows[row[KEY]] = row | {ROW: len(rows)}
    except BrokenTar as error:
        broken = str(error)
    schema = pa.schema(
        [(ROW, pa.int32()), (UID, pa.string()), (KEY, pa.string()), (TEXT, pa.string()), (URL, pa.string())]
        + [(ORIGINAL_WIDTH, pa.int64()), (ORIGINAL_HEIGHT, pa.int64())]
    )
    table, repeated = pa.Table.from_pylist(list(rows.values()), schema), pa.Table.from_pylist(lost, LOST_SCHEMA)
    return PartRows(table, len(rows) + len(lost), repeated, broken)


def _describe(tar_row: TarRow) -> dict[str, Any]:
    """Return the columns of one row of a tar that has no parquet, from its .json and .txt members."""
    details = _parse_details(tar_row.find([JSON_EXTENSION]))
    caption = tar_row.find([CAPTION_EXTENSION])
    text = caption.decode("utf-8", "replace") if caption is not None else details.get(CAPTION, details.get(TEXT))
    text, uid = clean_text(text), str(details.get(UID)).replace("-", "").lower()
    return {
        UID: uid if re.fullmatch(UID_PATTERN, uid) else derive_uid(tar_row.find(IMAGE_EXTENSIONS), text),
        KEY: clean_text(tar_row.key),
        TEXT: text,
        URL: clean_text(details.get(URL)),
        ORIGINAL_WIDTH: _clean_size(details.get(ORIGINAL_WIDTH)),
        ORIGINAL_HEIGHT: _clean_size(details.get(ORIGINAL_HEIGHT)),
    }


def _parse_details(content: bytes | None) -> dict[str, Any]:
    """Return what a .json member says, or {} when it says nothing that can be read."""
    try:
        details = json.loads(content or b"{}")
    except (ValueError, RecursionError):
        return {}
    return details if isinstance(details, dict) else {}


def clean_text(value: Any) -> str | None:
    """Return text that UTF-8 can hold, or None for what is not text."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else None


def _clean_size(value: Any) -> int | None:
    """Return a whole number of pixels, or None."""
    is_whole = isinstance(value, int | float) and 0 < value <= MAX_SIDE_PX and value == int(value)
    return int(value) if is_whole else None
