"""A subset's rows -> webdataset shards: NNNNNNNN.tar + .parquet + _stats.json, sizes.json, and the manifest last.

Two passes.  Planning (pipeline/shard_plan.py) finds each kept row's bytes in its source tar, from the spans that
scoring left or by reading headers; writing copies those bytes as they are, so nothing is decoded, re-encoded or parsed.
Shards are numbered from 0 without gaps, and their sizes differ by at most one row however many tasks write them.  A uid
that stands r times in the subset is written r times for each pool row that has it, under `<key>`, `<key>-1`, ..., in
different shards; a kept row whose image is gone is counted by reason.

Without a shuffle a shard is a run of the pool: tars are read front to back, neighbours in one read.  With
`shuffle_seed` a shard holds rows of all over the pool: each row is a read of its own (on an object store a request),
and each shard asks every part's plan for its lines.  Copies of a uid are dealt round all shards and cost the same.
Memory is that of one shard's metadata and one window of rows.

That a row's bytes begin with its key is checked as they are copied, so a tar of other rows is noticed even where its
size and time are those of the tar that was planned for.  A shard is sent to disk while it is written; its stats, which
say that it is whole, get their name after tar and parquet are there.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import accumulate, groupby, pairwise, starmap
from operator import itemgetter
from typing import IO, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config import config
from pipeline.errors import ConfigError, PoolError
from pipeline.pool import Part, clean_text
from pipeline.ranges import RangeReader, Span
from pipeline.schemas import KEY, PARQUET_SUFFIX, PART_PATTERN, STATS_SUFFIX, TAR_SUFFIX, UID
from pipeline.shard_folder import PARQUET_BYTES, PLAN, TAR_BYTES, read_stats
from pipeline.shard_order import permute, spread
from pipeline.shard_plan import ShardPlan, pick_lines, read_lines
from pipeline.storage import exists, is_local, join, write_atomic
from pipeline.tars import pack_row, rename_packed, rename_row, unpack_row, write_end

SOURCE_PART = "source_part"
SOURCE_KEY = "source_key"
LOCAL_WINDOW_BYTES, REMOTE_WINDOW_BYTES = 1 << 18, 1 << 23
"""Rows are read this much at a time, neighbours together: what stays in a processor's cache, or a few requests."""
SYNC_BYTES = 1 << 25
"""What is written before it is sent to disk while the next is written."""
SYNCERS = 3


@config
class ShardConfig:
    """How the kept rows are cut into shards."""

    rows_per_shard: int = 10_000
    """Rows in a shard, at most; the last is not shorter than the others by more than one row."""
    keys: Literal["source", "uid"] = "source"
    """`__key__` of a row: the source's key, or `<uid>-<repeat>` as DataComp's resharder writes it."""
    shuffle_seed: int | None = None
    """Seed of one permutation of all rows over all shards; null keeps the pool's order."""

    def __post_init__(self) -> None:
        if self.rows_per_shard < 1:
            raise ConfigError(f"shards: rows_per_shard {self.rows_per_shard} is below 1.")


def write_shard(
    plan: ShardPlan, *, parts: Sequence[Part], out: str, keys: str, shuffle_seed: int | None = None
) -> dict[str, Any]:
    """Write one shard with its sidecars and return {"rows", "tar_bytes", "parquet_bytes", "replaced"}.

    A shard that is already there in the sizes it was written in is left alone; `replaced` says whether one that is not
    gave way to this.
    """
    name = PART_PATTERN.format(plan.number)
    stats, replaced = read_stats(out, plan.number), False
    if stats is None or stats.get(PLAN) != plan.digest:
        replaced = exists(join(out, name + TAR_SUFFIX))
        stats = _write_files(plan, parts, out, keys, shuffle_seed)
    sizes = {field: stats[field] for field in (TAR_BYTES, PARQUET_BYTES)}
    return {"rows": stats["successes"], "replaced": replaced} | sizes


def _write_files(plan: ShardPlan, parts: Sequence[Part], out: str, keys: str, seed: int | None) -> dict[str, Any]:
    """Write a shard's tar, parquet and stats, named in this order when all are on disk, and return the stats."""
    lines, owners, table = _gather_lines(plan, parts, out, seed)
    table, renamed = _name_rows(table, lines, keys)
    stem = join(out, PART_PATTERN.format(plan.number))
    with (
        write_atomic(stem + STATS_SUFFIX) as stats_file,
        write_atomic(stem + PARQUET_SUFFIX) as table_file,
        write_atomic(stem + TAR_SUFFIX) as tar_file,
        _syncing(out) as sync,
    ):
        _copy_rows(tar_file, parts, owners, lines, table[SOURCE_KEY].to_pylist(), renamed, sync)
        sync(tar_file)
        pq.write_table(table, table_file, compression="zstd")
        sync(table_file)
        counted = {"count": len(lines), "successes": len(lines), "failed_to_download": 0, "failed_to_resize": 0}
        stats = counted | {TAR_BYTES: tar_file.tell(), PARQUET_BYTES: table_file.tell(), PLAN: plan.digest}
        stats_file.write(json.dumps(stats).encode())
        sync(stats_file)
    return stats


@contextmanager
def _syncing(out: str) -> Iterator[Callable[[IO[bytes]], None]]:
    """Yield a function that begins to send a file's bytes to disk; at the end of the block they are there."""
    begun: list[Future[None]] = []

    def sync(file: IO[bytes]) -> None:
        if is_local(out):
            file.flush()
            begun.append(syncers.submit(os.fsync, file.fileno()))

    with ThreadPoolExecutor(SYNCERS) as syncers:
        yield sync
        for each in begun:
            each.result()


def _gather_lines(
    plan: ShardPlan, parts: Sequence[Part], out: str, seed: int | None
) -> tuple[np.ndarray, np.ndarray, pa.Table]:
    """Return a shard's LINEs in the order to write them, the number of each one's part, and the pool's columns."""
    picked = pick_lines(out, plan, seed)
    lines, tables = [], []
    for number in np.unique(picked["part"]):
        part = parts[number]
        found, table = read_lines(out, part, picked["line"][picked["part"] == number])
        added = {SOURCE_PART: pa.repeat(part.name, len(found)), SOURCE_KEY: table[KEY]}
        table = table.drop_columns([column for column in added if column in table.column_names])
        for column, values in added.items():
            table = table.append_column(column, values)
        lines.append(found)
        tables.append(table)
    gathered = np.concatenate(lines)
    order = np.arange(len(gathered))
    if seed is not None:
        order = permute(order, len(order), f"{seed}/{plan.number}")
    order = order[spread(gathered["uid"][order])]
    table = _stack(tables)
    is_sorted = bool((np.diff(order) == 1).all())
    return gathered[order], picked["part"][order], table if is_sorted else table.take(order)


def _stack(tables: list[pa.Table]) -> pa.Table:
    """Return the tables one under the other; a column that two parts hold as types that do not mix becomes text."""
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException:
        kinds: dict[str, set[pa.DataType]] = {}
        for field in (field for table in tables for field in table.schema):
            kinds.setdefault(field.name, set()).add(field.type)
        mixed = {name for name, found in kinds.items() if len(found) > 1}
        return pa.concat_tables([_spell(table, mixed) for table in tables], promote_options="default")


def _spell(table: pa.Table, names: set[str]) -> pa.Table:
    for place, name in enumerate(table.column_names):
        if name in names:
            texts = [None if value is None else str(value) for value in table[name].to_pylist()]
            table = table.set_column(place, name, pa.array(texts, pa.string()))
    return table


def _name_rows(table: pa.Table, lines: np.ndarray, keys: str) -> tuple[pa.Table, list[tuple[str, str] | None]]:
    """Return the table with the keys the rows will have, and (source's key, new key) of each row that changes it.

    A row is called after its source's key or `<uid>-0`, a repeat of it `<key>-1` or `<uid>-1`, and so on; where two
    rows of a shard would have one name, the later takes the next number that is free.
    """
    if keys == "source" and not lines["repeat"].any() and pc.count_distinct(table[SOURCE_KEY]).as_py() == len(lines):
        return table, [None] * len(lines)
    sources = table[SOURCE_KEY].to_pylist()
    stems = table[UID].to_pylist() if keys == "uid" else sources
    taken: set[str] = set()
    written = []
    for stem, repeat in zip(stems, lines["repeat"].tolist(), strict=True):
        wished = f"{stem}-{repeat}" if repeat or keys == "uid" else stem
        while wished in taken:
            repeat += 1
            wished = f"{stem}-{repeat}"
        taken.add(wished)
        written.append(wished)
    renamed = [None if old == new else (old, new) for old, new in zip(sources, written, strict=True)]
    return table.set_column(table.column_names.index(KEY), KEY, pa.array(written, pa.string())), renamed


def _copy_rows(
    file: IO[bytes],
    parts: Sequence[Part],
    owners: np.ndarray,
    lines: np.ndarray,
    keys: Sequence[str],
    renamed: Sequence[tuple[str, str] | None],
    sync: Callable[[IO[bytes]], None],
) -> None:
    """Write the rows' bytes, the source's own but for the names that change, and the tar's end mark."""
    tars = [parts[number].tar or "" for number in owners.tolist()]
    spans = list(zip(lines["start"].tolist(), lines["end"].tolist(), strict=True))
    num_bytes = LOCAL_WINDOW_BYTES if is_local(tars[0]) else REMOTE_WINDOW_BYTES
    buffer, synced = bytearray(), 0
    with RangeReader() as reader:
        for rows in _find_windows(lines, num_bytes):
            edges = list(accumulate((end - start for start, end in spans[rows]), initial=0))
            if len(buffer) < edges[-1]:
                buffer = bytearray(edges[-1])
            _read_window(reader, buffer, edges, tars[rows], spans[rows])
            _check_keys(buffer, edges, keys[rows], tars[rows])
            _write_window(file, buffer, edges, renamed[rows], tars[rows])
            if file.tell() - synced >= SYNC_BYTES:
                synced = file.tell()
                sync(file)
    write_end(file, file.tell())


def _find_windows(lines: np.ndarray, num_bytes: int) -> Iterator[slice]:
    """Yield the rows of one window after another: about `num_bytes` at most, or one row."""
    window = np.cumsum(lines["end"] - lines["start"]) // num_bytes
    yield from starmap(slice, pairwise([0, *(np.flatnonzero(np.diff(window)) + 1).tolist(), len(lines)]))


def _read_window(
    reader: RangeReader, buffer: bytearray, edges: Sequence[int], tars: Sequence[str], spans: Sequence[Span]
) -> None:
    """Read each row's span of its tar into the buffer from its edge on; a tar is read once, front to back."""
    starts = [
        row for row in range(len(tars)) if not row or tars[row] != tars[row - 1] or spans[row][0] != spans[row - 1][1]
    ]
    runs = sorted(
        (tars[a], spans[a][0], spans[b - 1][1], edges[a], edges[b]) for a, b in pairwise([*starts, len(tars)])
    )
    with memoryview(buffer) as view:
        for tar, group in groupby(runs, key=itemgetter(0)):
            places = list(group)
            reader.fill(tar, [place[1:3] for place in places], [view[slice(*place[3:])] for place in places])


def _check_keys(buffer: bytearray, edges: Sequence[int], keys: Sequence[str], tars: Sequence[str]) -> None:
    """Raise PoolError unless each row begins with a member of its key: the tar is the one planned for."""
    for (start, end), key, tar in zip(pairwise(edges), keys, tars, strict=True):
        name = key.encode() + b"."
        if buffer.startswith((name, b"./" + name), start):
            continue
        if clean_text(unpack_row(bytes(buffer[start:end]), tar).key) != key:  # a name with its own header, or no text
            raise PoolError(
                f"{tar} does not have row {key!r} where it was found before: another file of the same size and time "
                "has taken its place. Touch it, so that this is seen, and run the command again."
            )


def _write_window(
    file: IO[bytes],
    buffer: bytearray,
    edges: Sequence[int],
    renamed: Sequence[tuple[str, str] | None],
    tars: Sequence[str],
) -> None:
    """Write the rows under their new names; one whose headers have no room for its name is packed anew."""
    spans = list(pairwise(edges))
    changed = [(row, *names) for row, names in enumerate(renamed) if names]
    outgrown = [(row, new) for row, old, new in changed if not rename_packed(buffer, *spans[row], old, new)]
    written = 0
    with memoryview(buffer) as view:
        for row, name in outgrown:
            start, end = spans[row]
            file.write(view[written:start])
            file.write(pack_row(rename_row(unpack_row(bytes(view[start:end]), tars[row]), name)))
            written = end
        file.write(view[written : edges[-1]])
