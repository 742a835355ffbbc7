"""CommonPool's metadata folder: NAME.parquet and NAME.npz, one row per pair, as the hub has them (DataComp README).

DataComp's downloader takes any metadata folder that exists for a whole one (download_upstream.py:160,205), so what was
cut short goes on as a smaller pool; and its code reads npz by position, without a look at their length.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import pyarrow as pa

from pipeline.datacomp.arrays import check_arrays
from pipeline.datacomp.findings import BROKEN, METADATA, NOTE, WARNING, Finding, Section, say_files, say_some
from pipeline.datacomp.tables import TableFile, read_table_file
from pipeline.datacomp.uid_sets import write_distinct
from pipeline.errors import PoolError
from pipeline.filesystem import explained, find_filesystem
from pipeline.intake.url_tables import FACE_BBOXES
from pipeline.manifest import Counts, hash_json
from pipeline.schemas import (
    ARRAYS_SUFFIX,
    CAPTION,
    ORIGINAL_HEIGHT,
    ORIGINAL_WIDTH,
    PARQUET_SUFFIX,
    REASON_BAD_UID,
    REASON_BROKEN_PART,
    REASON_MISSING_COLUMN,
    REASON_NULL_CAPTION,
    SHA256,
    TEXT,
    UID,
    URL,
    similarity_column,
)
from pipeline.storage import is_folder, join, list_sizes, name_of
from pipeline.subset import SUBSET_SUFFIX

SCALES = {"small": 12_800_000, "medium": 128_000_000, "large": 1_280_000_000, "xlarge": 12_800_000_000}
"""Rows of CommonPool at each scale (Gadre et al. 2023, arXiv:2304.14108, section 3)."""
COLUMNS: Mapping[str, tuple[pa.DataType, str]] = {
    UID: (pa.string(), "its rows have no name"),
    URL: (pa.string(), "nothing of it can be downloaded"),
    TEXT: (pa.string(), "no rule on captions works"),
    ORIGINAL_WIDTH: (pa.int64(), "basic_filter and winnow's image_size need it"),
    ORIGINAL_HEIGHT: (pa.int64(), "basic_filter and winnow's image_size need it"),
    similarity_column("clip_b32"): (pa.float32(), "laion2b and clip_score with b32 need it"),
    similarity_column("clip_l14"): (pa.float32(), "clip_score with l14 needs it"),
    FACE_BBOXES: (pa.list_(pa.list_(pa.float64())), "faces are not blurred when images are downloaded"),
    SHA256: (pa.string(), "a downloaded image cannot be compared with the one that was scored"),
}
"""Column -> its Arrow type on the hub, and what is lost without it."""
INTERRUPTED = ".incomplete"
"""How huggingface_hub names a file that is still coming."""
HUB_CACHE = "hf"
"""Beside the metadata folder while DataComp's downloader is at work (download_upstream.py:168)."""
PARTS = "part_"


def check_metadata(folder: str, scratch: str, *, scale: str | None = None) -> Section:
    """Return what is in a metadata folder; its distinct uids stand in SCRATCH/metadata.npy, sorted.

    Reads footers, uids and the headers of npz files; holds 16 bytes a row of the largest file, besides what
    write_distinct does.
    SCRATCH takes 48 bytes a row.  Raises PoolError when the folder is absent or has no parquet.
    """
    names, url = _list_files(folder), join(scratch, f"{METADATA}{SUBSET_SUFFIX}")
    tables: dict[str, TableFile] = {}
    merged = write_distinct(url, _read_uids(folder, names, tables), join(scratch, METADATA))
    counts = _count_rows(tables.values())
    found = sum(name.endswith(ARRAYS_SUFFIX) for name in names)
    numbers = {"files": len(tables), "npz files": found, "rows": counts.read, **counts.failed}
    numbers |= {"uids": merged.num_uids, "repeated": counts.kept - merged.num_uids}
    num_rows = {name: table.num_rows if table.types else None for name, table in tables.items()}
    kinds, array_findings = check_arrays(folder, names, num_rows)
    findings = [
        *_judge_folder(folder, names, tables),
        *_judge_rows(numbers, scale),
        *_judge_columns(tables),
        *array_findings,
    ]
    return Section(counts, numbers, {"arrays": kinds, **_describe_columns(tables)}, findings, url, hash_json(names))


def _read_uids(folder: str, names: Iterable[str], tables: dict[str, TableFile]) -> Iterator[np.ndarray]:
    """Yield each parquet's uids, and leave what else is known of it in `tables`."""
    for name in (name for name in names if name.endswith(PARQUET_SUFFIX)):
        table = read_table_file(join(folder, name), count_nulls=COLUMNS)
        yield table.uids
        tables[name] = replace(table, uids=table.uids[:0].copy())


def _count_rows(tables: Iterable[TableFile]) -> Counts:
    failed: Counter[str] = Counter()
    num_rows = 0
    for table in tables:
        num_rows += table.num_rows
        if table.error:
            failed[REASON_BROKEN_PART] += table.num_rows
        elif UID not in table.types:
            failed[REASON_MISSING_COLUMN] += table.num_rows
        else:
            failed[REASON_BAD_UID] += table.num_bad
    return Counts(read=num_rows, kept=num_rows - failed.total(), failed=dict(sorted((+failed).items())))


def _list_files(folder: str) -> dict[str, int]:
    """Return the names and bytes of the files in the folder, and of those in its part_* folders as part_0/NAME."""
    if not is_folder(folder):
        raise PoolError(f"{folder!r} is no folder. --metadata takes the one that DataComp's --data_dir holds.")
    filesystem, path = find_filesystem(folder)
    with explained(folder):
        entries = filesystem.ls(path, detail=True)
    inner = sorted(name_of(entry["name"]) for entry in entries if entry["type"] == "directory")
    names = list_sizes(folder)
    for part in (name for name in inner if name.startswith(PARTS)):
        names |= {join(part, name): num_bytes for name, num_bytes in list_sizes(join(folder, part)).items()}
    names = {name: num_bytes for name, num_bytes in names.items() if not name_of(name).startswith(".")}
    if not any(name.endswith(PARQUET_SUFFIX) for name in names):
        raise PoolError(f"{folder!r} has no {PARQUET_SUFFIX} file. Name the metadata folder in DataComp's --data_dir.")
    return names


def _describe_columns(tables: Mapping[str, TableFile]) -> dict[str, object]:
    types: dict[str, Counter[str]] = {}
    nulls: Counter[str] = Counter()
    for table in tables.values():
        nulls.update(table.nulls)
        for column, kind in table.types.items():
            types.setdefault(column, Counter())[str(kind)] += 1
    sizes = [table.num_rows for table in tables.values()]
    return {
        "columns": {column: dict(sorted(kinds.items())) for column, kinds in sorted(types.items())},
        "nulls": {column: number for column, number in sorted(nulls.items()) if number},
        "rows_per_file": {"least": min(sizes), "most": max(sizes)},
    }


def _judge_folder(folder: str, names: Iterable[str], tables: Mapping[str, TableFile]) -> Iterator[Finding]:
    broken = {name: table.error for name, table in tables.items() if table.error}
    if broken:
        message = f"{say_files(broken, len(tables))} cannot be read"
        yield Finding(BROKEN, METADATA, f"{message}. Delete and download again; winnow's stages go on without them.")
    signs = [name for name in names if name.endswith(INTERRUPTED)]
    signs += [f"../{HUB_CACHE}"] if is_folder(join(_parent_of(folder), HUB_CACHE)) else []
    if signs:
        message = (
            f"an interrupted download left {say_some(signs)}. DataComp's downloader goes on with the files that came"
        )
        yield Finding(WARNING, METADATA, f"{message}: run it with --overwrite_metadata.")
    inner = [name for name in tables if "/" in name]
    if inner:
        message = f"{say_files(inner, len(tables))} stand in {PARTS}* folders, where DataComp's baselines do not look"
        remedy = f"Its downloader moves them up at its end; do so, or give winnow --pool '.../{PARTS}*/*'"
        yield Finding(WARNING, METADATA, f"{message}. {remedy}.")
    other = [name for name in names if not name.endswith((PARQUET_SUFFIX, ARRAYS_SUFFIX, INTERRUPTED))]
    if other:
        yield Finding(NOTE, METADATA, f"files of other kinds are passed over: {say_some(other)}.")


def _parent_of(folder: str) -> str:
    parent, slash, _ = folder.rstrip("/").rpartition("/")
    return parent if slash else "."


def _judge_rows(numbers: Mapping[str, int], scale: str | None) -> Iterator[Finding]:
    rows, repeated, bad = (numbers.get(name, 0) for name in ("rows", "repeated", REASON_BAD_UID))
    if scale and rows != SCALES[scale]:
        share = f"{rows:,} rows are {rows / SCALES[scale]:.2%} of the {SCALES[scale]:,} of {scale}"
        remedy = "Download the rest, or remember that a fraction is one of these rows"
        yield Finding(WARNING, METADATA, f"{share}. {remedy}.")
    if repeated:
        message = f"{repeated:,} rows have the uid of another row: DataComp's filters write it for each of them"
        yield Finding(WARNING, METADATA, f"{message}, winnow once. Look for a file that is there twice.")
    if bad:
        message = f"{bad:,} rows have no uid of 32 hex digits: DataComp's filters stop at the first"
        yield Finding(WARNING, METADATA, f"{message}, winnow leaves them out and counts them as {REASON_BAD_UID}.")


def _judge_columns(tables: Mapping[str, TableFile]) -> Iterator[Finding]:
    readable = {name: table for name, table in tables.items() if table.types}
    for column, (kind, loss) in COLUMNS.items():
        lacking = [name for name, table in readable.items() if column not in table.types]
        if lacking:
            has_caption = column == TEXT and all(CAPTION in readable[name].types for name in lacking)
            level = BROKEN if column in (UID, TEXT) and not has_caption else WARNING
            yield Finding(level, METADATA, f"{say_files(lacking, len(readable))} lack column {column!r}: {loss}.")
        found = (table.types.get(column, kind) for table in readable.values())
        other = Counter(str(t) for t in found if t not in (kind, pa.large_string() if kind == pa.string() else kind))
        if other:
            types = ", ".join(f"{name} in {number:,} files" for name, number in sorted(other.items()))
            yield Finding(WARNING, METADATA, f"column {column!r} is {types}; on the hub it is {kind}.")
        yield from _judge_nulls(column, sum(table.nulls.get(column, 0) for table in readable.values()))
    more = sorted({column for table in readable.values() for column in table.types} - COLUMNS.keys())
    if more:
        yield Finding(NOTE, METADATA, f"columns that the hub's files do not have: {say_some(more)}.")


def _judge_nulls(column: str, nulls: int) -> Iterator[Finding]:
    if nulls and column == TEXT:
        message = (
            f"{nulls:,} rows have a null caption: DataComp's rules on captions stop at the first, winnow counts them"
        )
        yield Finding(WARNING, METADATA, f"{message} as {REASON_NULL_CAPTION}.")
    elif nulls and column != UID:
        yield Finding(WARNING, METADATA, f"{nulls:,} rows have a null {column!r}: no rule on it keeps them.")
