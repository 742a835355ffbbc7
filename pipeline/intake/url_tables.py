"""Url tables -> a pool, with the fate of every row: stage the tables, download (download.py), read the outcomes.

The tables are copied into OUT/_ingest in pieces of one shard each: under the names that img2dataset can carry, with a
uid for every row, and with the expected hash twice (img2dataset drops the column that it verifies).  Shards are
numbered as img2dataset numbers them: table after table in the order of their names, each begun with a new shard.
"""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config import as_mapping, config
from pipeline.errors import ConfigError, PoolError, check_name
from pipeline.intake.claim import claim_folder
from pipeline.intake.download import ERRORS, SUFFIXES, TABLES, TEMPORARY, Shards, remove_shard
from pipeline.intake.tables import list_table_columns, list_tables, read_tables
from pipeline.lock import hold_lock
from pipeline.manifest import Counts, Manifest, add_counts, find_done, write_manifest
from pipeline.schemas import (
    CAPTION,
    ERROR_MESSAGE,
    PARQUET_SUFFIX,
    PART_PATTERN,
    STATS_SUFFIX,
    STATUS,
    STATUS_SUCCESS,
    TAR_SUFFIX,
    TEXT,
    UID,
    URL,
)
from pipeline.storage import (
    exists,
    is_local,
    join,
    list_folder,
    name_of,
    open_file,
    read_bytes,
    remove,
    sha256_of_file,
    write_atomic,
)
from pipeline.tars import BLOCK_BYTES, END_BLOCKS
from pipeline.uid import derive_uid

INGEST, STATE = "ingest.json", "_ingest"
FORMAT_VERSION = 1
"""Of the pool that ingest writes; a pool that took days is not refused because a score file's format moved on."""
FACE_BBOXES = "face_bboxes"
HASH_DIGITS = {"sha256": 64, "md5": 32}
EXPECTED = "expected_"
"""The table's own hash, carried into parquet and json as expected_sha256 beside img2dataset's sha256."""
ROWS, HASHES = "rows", "hashes"
UID_BYTES = 16
STATUS_FAILED_TO_RESIZE = "failed_to_resize"
HASH_MISMATCH = "hash mismatch"
REASON_NOT_MADE = "shard_not_made"
REASON_NOT_RECORDED = "not_recorded"
REASON_HASH_MISMATCH, REASON_NO_HASH = "hash_mismatch", "no_expected_hash"
REASON_RESIZE, REASON_OTHER = "resize_error", "other_error"
REASONS: tuple[tuple[str, str], ...] = (
    ("X-Robots-Tag", "opted_out"),
    (f"^{HASH_MISMATCH}$", REASON_HASH_MISMATCH),
    ("infinite loop|Redirection to url", "bad_redirect"),
    (r"^HTTP Error (\d{3})", "http_{}"),
    ("unknown url type", "not_http"),
    ("timed out", "timeout"),
    ("answer is larger than", "too_large"),
    ("IncompleteRead", "truncated"),
    ("Name or service not known|getaddrinfo|name resolution|nodename nor servname|No address assoc", "dns_error"),
    ("SSL|TLS|certificate", "tls_error"),
    (r"refused|reset by peer|closed connection|unreachable|No route|Broken pipe|BadStatusLine", "connection_error"),
    ("control characters|nonnumeric port|no host given|IPv6|codec can't encode|label", "bad_url"),
    (r"Image decoding error|imdecode|buf\.empty", "decode_error"),
)
"""What img2dataset (or urllib, or OpenCV through it) says -> the reason that is counted; the first that fits."""


@config
class IngestConfig:
    """What decides the bytes of the pool.  The defaults are CommonPool's (DataComp, download_upstream.py:31-145)."""

    url_column: str = URL
    caption_column: str = TEXT
    image_size: int = 512
    """Longest side in px; smaller images stay as they are."""
    resize_mode: Literal["no", "border", "keep_ratio", "keep_ratio_largest", "center_crop"] = "keep_ratio_largest"
    encode_format: Literal["jpg", "png", "webp"] = "jpg"
    blur_faces: bool = True
    """Blur the boxes of `face_bboxes`, where the table has them."""
    mismatched: Literal["fail", "keep"] = "fail"
    """Images whose hash is not the table's: fail the row, or keep it and the verdict (DataComp never checks)."""
    rows_per_shard: int = 10_000

    def __post_init__(self) -> None:
        if self.rows_per_shard < 1 or self.image_size < 1:
            raise ConfigError(
                f"rows per shard {self.rows_per_shard}, image size {self.image_size}: both must be above 0."
            )


@dataclasses.dataclass(frozen=True, slots=True)
class Columns:
    """The columns of the tables that ingest knows, by what they are; None where the tables have none."""

    url: str
    caption: str
    uid: str | None
    boxes: str | None
    hash_kind: str | None
    """Name of the column, and of the hash function."""

    @property
    def texts(self) -> list[str]:
        """Columns that are text, in a fixed order."""
        return [name for name in (self.url, self.caption, self.uid, self.hash_kind) if name]


Download = Callable[[Shards, Sequence[int]], Mapping[int, str]]
"""download(shards, wanted) -> why, for each wanted shard that could not be made."""


def ingest(download: Download, urls: str, options: IngestConfig, out: str) -> Manifest:
    """Make OUT a pool of what the tables' urls hold, and return its manifest, OUT/ingest.json.

    `download` makes the shards asked for and says why for those it could not; they are counted as `shard_not_made`,
    named in facts["missing"], and tried again by the next call.  Only http and https are fetched: `not_http` counts
    the rest, which is never opened.
    Raises ConfigError for an unknown column or when OUT was begun from other tables or choices, PoolError for a table
    that cannot be read.
    """
    tables = list_tables(urls)
    columns = find_columns(tables, options)
    parents = {f"{number}/{name_of(url)}": sha256_of_file(url) for number, url in enumerate(tables)}
    wanted = Manifest(stage="ingest", config=as_mapping(options), parents=parents, format_version=FORMAT_VERSION)
    with hold_lock(out, "ingest"):
        claim_folder(out, wanted, state=STATE)
        if done := find_done(out, wanted, name=INGEST, is_whole=partial(_is_whole, out)):
            return done
        return _make_pool(download, tables, columns, options, out, wanted)


def _make_pool(
    download: Download, tables: Sequence[str], columns: Columns, options: IngestConfig, out: str, wanted: Manifest
) -> Manifest:
    """Stage, download what is not whole, account, and write the manifest."""
    num_rows = stage_tables(tables, columns, options, join(out, STATE, TABLES))
    left = [shard for shard in range(len(num_rows)) if not keep_if_whole(out, shard)]
    missing = dict(download(_describe_shards(columns, options, out, len(num_rows)), left)) if left else {}
    for shard in left:  # what counts is what is there
        if keep_if_whole(out, shard):
            missing.pop(shard, None)
        else:
            missing.setdefault(shard, "its files are not whole")
    results = [read_outcomes(out, shard, rows, columns.hash_kind) for shard, rows in enumerate(num_rows)]
    facts: dict[str, Any] = {
        "num_shards": len(num_rows),
        "missing": {PART_PATTERN.format(shard): why for shard, why in sorted(missing.items())},
        HASHES: dict(sorted(sum((verdicts for _, verdicts in results), Counter()).items())),
    }
    counts = {ROWS: add_counts(counts for counts, _ in results)}
    manifest = dataclasses.replace(wanted, counts=counts, facts=facts)
    write_manifest(out, manifest, name=INGEST)
    for folder in (TABLES, TEMPORARY, ERRORS):
        remove(join(out, STATE, folder))
    return manifest


def _is_whole(out: str, done: Manifest) -> bool:
    stems = [PART_PATTERN.format(shard) for shard in range(done.facts["num_shards"])]
    present = {name_of(url) for url in list_folder(out)}
    return not done.facts["missing"] and present >= {stem + suffix for stem in stems for suffix in SUFFIXES}


def find_columns(tables: Sequence[str], options: IngestConfig) -> Columns:
    """Return the columns to read; every table must have those of the first.

    Raises ConfigError with the nearest names when the url or caption column is unknown, PoolError when tables differ.
    """
    present = list_table_columns(tables[0])
    for name, flag in ((options.url_column, "--url-column"), (options.caption_column, "--caption-column")):
        check_name(name, present, kind=f"column of {tables[0]} for {flag}")
    uid, boxes = (name if name in present else None for name in (UID, FACE_BBOXES))
    hash_kind = next((kind for kind in HASH_DIGITS if kind in present), None)
    columns = Columns(options.url_column, options.caption_column, uid, boxes, hash_kind)
    for table in tables[1:]:
        if lacking := [c for c in (*columns.texts, boxes) if c and c not in list_table_columns(table)]:
            raise PoolError(f"{table} lacks columns {lacking}, which {tables[0]} has. Ingest them into two pools.")
    return columns


def stage_tables(tables: Sequence[str], columns: Columns, options: IngestConfig, folder: str) -> list[int]:
    """Write one parquet per shard into `folder`, where it is not there yet, and return the rows of each.

    Raises PoolError when a table cannot be read, or its face boxes are no lists.
    """
    num_rows: list[int] = []
    names = [*columns.texts, *([columns.boxes] if columns.boxes else [])]
    nested = [columns.boxes] if columns.boxes else []
    for url in tables:
        for piece in read_tables(url, names, nested=nested, rows=options.rows_per_shard):
            target = join(folder, PART_PATTERN.format(len(num_rows)) + PARQUET_SUFFIX)
            if not exists(target):
                with write_atomic(target) as file:
                    pq.write_table(_stage_rows(piece, columns, url), file, compression="zstd")
            num_rows.append(piece.num_rows)
    if not num_rows:
        raise PoolError(f"the tables {list(tables)} hold no row.")
    return num_rows


def _stage_rows(piece: pa.Table, columns: Columns, source: str) -> pa.Table:
    """Return the rows under the names that the pool will have, all text as string."""
    links, captions = (_as_text(piece[name], source) for name in (columns.url, columns.caption))
    staged = {URL: links, CAPTION: captions}
    if columns.uid:
        staged[UID] = _as_text(piece[columns.uid], source)
    else:  # as pool.py derives them for a parquet without uids
        pairs = zip(links.to_pylist(), captions.to_pylist(), strict=True)
        staged[UID] = pa.array([derive_uid(link, caption) for link, caption in pairs], pa.string())
    if columns.boxes:
        staged[FACE_BBOXES] = piece[columns.boxes]
        if not pa.types.is_list(staged[FACE_BBOXES].type) and not pa.types.is_large_list(staged[FACE_BBOXES].type):
            raise PoolError(
                f"{source}: {FACE_BBOXES!r} is {staged[FACE_BBOXES].type}, not a list of boxes. Use parquet."
            )
    if kind := columns.hash_kind:
        digits = pc.utf8_lower(pc.utf8_trim_whitespace(_as_text(piece[kind], source)))
        valid = pc.match_substring_regex(digits, f"^[0-9a-f]{{{HASH_DIGITS[kind]}}}$")
        staged[kind] = staged[EXPECTED + kind] = pc.if_else(pc.fill_null(valid, False), digits, None)
    return pa.table(staged)


def _as_text(values: Any, source: str) -> Any:
    """Return a column as string; 16 bytes are a uid and become 32 hex digits."""
    if pa.types.is_fixed_size_binary(values.type) and values.type.byte_width == UID_BYTES:
        return pa.array([None if v is None else v.hex() for v in values.to_pylist()], pa.string())
    try:
        return values.cast(pa.string())
    except pa.ArrowException as error:
        raise PoolError(f"{source}: a column of type {values.type} cannot be read as text: {error}") from None


def _describe_shards(columns: Columns, options: IngestConfig, out: str, num_shards: int) -> Shards:
    carried = [UID, *([FACE_BBOXES] if columns.boxes else [])]
    carried += [EXPECTED + columns.hash_kind] if columns.hash_kind else []
    return Shards(
        out=absolute(out),
        state=absolute(join(out, STATE)),
        num_shards=num_shards,
        rows_per_shard=options.rows_per_shard,
        columns=tuple(carried),
        blur_column=FACE_BBOXES if columns.boxes and options.blur_faces else None,
        hash_kind=columns.hash_kind or "sha256",
        verify=columns.hash_kind is not None and options.mismatched == "fail",
        image_size=options.image_size,
        resize_mode=options.resize_mode,
        encode_format=options.encode_format,
    )


def absolute(url: str) -> str:
    """Return a local path in full, as workers elsewhere need it; other URLs as they are."""
    return str(Path(url).absolute()) if is_local(url) else url


def keep_if_whole(out: str, shard: int) -> bool:
    """Return whether a shard is whole; what is left of one that is not is deleted.

    img2dataset itself takes a shard for done when its stats are there, whatever became of the tar and the parquet.
    """
    stem = join(out, PART_PATTERN.format(shard))
    try:
        json.loads(read_bytes(stem + STATS_SUFFIX))
        with open_file(stem + PARQUET_SUFFIX) as file:
            pq.ParquetFile(file)
        with open_file(stem + TAR_SUFFIX) as file:
            num_bytes = file.seek(0, 2)
            file.seek(max(0, num_bytes - END_BLOCKS * BLOCK_BYTES))
            if num_bytes % BLOCK_BYTES == 0 and file.read() == bytes(END_BLOCKS * BLOCK_BYTES):
                return True
    except (OSError, ValueError):  # absent, or cut short (ArrowInvalid is a ValueError)
        pass
    remove_shard(out, shard)
    return False


def read_outcomes(out: str, shard: int, num_rows: int, hash_kind: str | None) -> tuple[Counts, Counter[str]]:
    """Return the account of one shard of `num_rows` staged rows, and what the comparison of hashes gave.

    The second counts "matched", "mismatched" and "unknown" (no hash to compare with) over the images that came.
    """
    url = join(out, PART_PATTERN.format(shard) + PARQUET_SUFFIX)
    if not exists(url):
        return Counts(read=num_rows, kept=0, failed={REASON_NOT_MADE: num_rows}), Counter()
    hashes = [hash_kind, EXPECTED + hash_kind] if hash_kind else []
    with open_file(url) as file:
        table = pq.read_table(file, columns=[STATUS, ERROR_MESSAGE, *hashes])
    success = pc.fill_null(pc.equal(table[STATUS], STATUS_SUCCESS), False)
    kept, lost = table.filter(success), table.filter(pc.invert(success))
    failed = Counter(map(name_reason, lost[STATUS].to_pylist(), lost[ERROR_MESSAGE].to_pylist()))
    failed[REASON_NOT_RECORDED] = num_rows - table.num_rows
    verdicts: Counter[str] = Counter()
    if hash_kind:
        found, expected = (kept[name].to_pylist() for name in hashes)
        verdicts.update(map(_compare, found, expected))
        unknown = lost.filter(pc.equal(lost[ERROR_MESSAGE], HASH_MISMATCH))[EXPECTED + hash_kind].null_count
        failed[REASON_NO_HASH], failed[REASON_HASH_MISMATCH] = unknown, failed[REASON_HASH_MISMATCH] - unknown
        verdicts += Counter(mismatched=failed[REASON_HASH_MISMATCH], unknown=unknown)
    return Counts(read=num_rows, kept=kept.num_rows, failed=dict(sorted((+failed).items()))), verdicts


def _compare(found: str | None, expected: str | None) -> str:
    if expected is None:
        return "unknown"
    return "matched" if found == expected else "mismatched"


def name_reason(status: str | None, message: str | None) -> str:
    """Return the stable reason for what img2dataset says of a row that it lost."""
    for pattern, reason in REASONS:
        if found := re.search(pattern, message or "", re.IGNORECASE):
            return reason.format(*found.groups())
    return REASON_RESIZE if status == STATUS_FAILED_TO_RESIZE else REASON_OTHER
