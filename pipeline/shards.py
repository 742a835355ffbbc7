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
from itertools import groupby, pairwise, starmap
from typing import IO, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config import config
from pipeline.errors import ConfigError, PoolError
from pipeline.pool import Part, clean_text
from pipeline.schemas import KEY, PARQUET_SUFFIX, PART_PATTERN, STATS_SUFFIX, TAR_SUFFIX, UID
from pipeline.shard_folder import PARQUET_BYTES, PLAN, TAR_BYTES, read_stats
from pipeline.shard_order import permute, spread
from pipeline.shard_plan import ShardPlan, pick_lines, read_lines
from pipeline.storage import exists, is_local, join, read_ranges, write_atomic
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
    num_bytes = LOCAL_WINDOW_BYTES if is_local(parts[int(owners[0])].tar or "") else REMOTE_WINDOW_BYTES
    edges = list(zip(lines["start"].tolist(), lines["end"].tolist(), strict=True))
    synced = 0
    for runs in _find_windows(owners, lines, num_bytes):
        tars = [parts[int(owners[run.start])].tar or "" for run in runs]
        spans = [(edges[run.start][0], edges[run.stop - 1][1]) for run in runs]
        for run, tar, (origin, _), packed in zip(runs, tars, spans, _read_spans(tars, spans), strict=True):
            inside = [(start - origin, end - origin) for start, end in edges[run]]
            _check_keys(packed, inside, keys[run], tar)
            file.write(_rename(packed, inside, renamed[run], tar) if any(renamed[run]) else packed)
        if file.tell() - synced >= SYNC_BYTES:
            synced = file.tell()
            sync(file)
    write_end(file, file.tell())


def _find_windows(owners: np.ndarray, lines: np.ndarray, num_bytes: int) -> Iterator[list[slice]]:
    """Yield the runs of rows of one window after another.

    A window is `num_bytes` (or one row) at most; a run is rows of a window that stand side by side in one tar.
    """
    starts, ends = lines["start"], lines["end"]
    window = np.cumsum(ends - starts) // num_bytes
    apart = (owners[1:] != owners[:-1]) | (starts[1:] != ends[:-1]) | (window[1:] != window[:-1])
    edges = [0, *(np.flatnonzero(apart) + 1).tolist(), len(lines)]
    for _, runs in groupby(starmap(slice, pairwise(edges)), key=lambda run: window[run.start]):
        yield list(runs)


def _read_spans(tars: Sequence[str], spans: Sequence[tuple[int, int]]) -> list[bytes]:
    """Return the bytes of each span of its tar; a tar is opened once and read front to back."""
    pieces = [b""] * len(tars)
    order = sorted(range(len(tars)), key=lambda place: (tars[place], spans[place]))
    for tar, group in groupby(order, key=tars.__getitem__):
        places = list(group)
        for place, packed in zip(places, read_ranges(tar, [spans[place] for place in places]), strict=True):
            pieces[place] = packed
    return pieces


def _check_keys(packed: bytes, spans: Sequence[tuple[int, int]], keys: Sequence[str], tar: str) -> None:
    """Raise PoolError unless each span begins with a member of its row's key: the tar is the one planned for."""
    for (start, end), key in zip(spans, keys, strict=True):
        name = key.encode() + b"."
        if packed.startswith((name, b"./" + name), start):
            continue
        if clean_text(unpack_row(packed[start:end], tar).key) != key:  # a name with a header of its own, or no text
            raise PoolError(
                f"{tar} does not have row {key!r} where it was found before: another file of the same size and time "
                "has taken its place. Touch it, so that this is seen, and run the command again."
            )


def _rename(
    packed: bytes, spans: Sequence[tuple[int, int]], renamed: Sequence[tuple[str, str] | None], tar: str
) -> bytes | bytearray:
    """Return a run's tar bytes with the rows at `spans` under their new names."""
    patched = bytearray(packed)
    if all(rename_packed(patched, *span, *names) for span, names in zip(spans, renamed, strict=True) if names):
        return patched
    rows = ((packed[start:end], names) for (start, end), names in zip(spans, renamed, strict=True))
    return b"".join(pack_row(rename_row(unpack_row(row, tar), names[1])) if names else row for row, names in rows)
