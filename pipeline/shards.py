"""A subset's rows -> webdataset shards: NNNNNNNN.tar + .parquet + _stats.json, sizes.json, and the manifest last.

Two passes.  Planning finds each kept row's bytes in its source tar by reading headers only; writing copies those bytes
as they are, so nothing is decoded, re-encoded or parsed.  Shards are numbered from 0 without gaps, and their sizes
differ by at most one row however many tasks write them.  A uid that stands r times in the subset is written r times for
each pool row that has it, under `<key>`, `<key>-1`, ...; a kept row whose image is gone is counted by reason.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import config
from pipeline.errors import ConfigError, PoolError
from pipeline.manifest import Counts, hash_json, read_manifest
from pipeline.pool import Part, read_part
from pipeline.schemas import (
    IMAGE_EXTENSIONS,
    KEY,
    PARQUET_SUFFIX,
    PART_PATTERN,
    REASON_BROKEN_PART,
    REASON_MISSING_IMAGE,
    REASON_TRUNCATED_TAR,
    ROW,
    SIZES,
    STATS_SUFFIX,
    TAR_SUFFIX,
    UID,
)
from pipeline.storage import (
    exists,
    join,
    list_folder,
    name_of,
    open_file,
    read_bytes,
    remove,
    write_atomic,
    write_bytes,
)
from pipeline.subset import count_in_subset, open_subset
from pipeline.tars import BrokenTar, pack_row, read_rows, rename_row, unpack_row, write_end
from pipeline.uid import parse_uids

PLAN_FOLDER = "plan"
PLAN_IDENTITY = "identity.json"
OWNER = "owner"
SOURCE_PART = "source_part"
SOURCE_KEY = "source_key"
NOT_IN_SUBSET = "not_in_subset"
SHARD_FILES = re.compile(r"(\.tmp-.*|\d{8}(\.tar|\.parquet|_stats\.json)|sizes\.json|manifest\.json)")
PLAN_SCHEMA = pa.schema([(ROW, pa.int32()), ("repeat", pa.int32()), ("start", pa.int64()), ("end", pa.int64())])
"""One line per row to write: its place in the part, which repeat, and its bytes in the source tar."""


@config
class ShardConfig:
    """How the kept rows are cut into shards."""

    rows_per_shard: int = 10_000
    """Rows in a shard, at most; the last is not shorter than the others by more than one row."""
    keys: Literal["source", "uid"] = "source"
    """`__key__` of a row: the source's key, or `<uid>-<repeat>` as DataComp's resharder writes it."""

    def __post_init__(self) -> None:
        if self.rows_per_shard < 1:
            raise ConfigError(f"shards: rows_per_shard {self.rows_per_shard} is below 1.")


@dataclass(frozen=True, slots=True)
class Piece:
    """Lines [first, last) of one part's plan."""

    part: Part
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One output shard: its number and the plan lines it is made of."""

    number: int
    pieces: tuple[Piece, ...]


def plan_part(part: Part, *, subset_url: str, out: str) -> dict[str, Any]:
    """Find the kept rows of a part, write their byte ranges to OUT/plan, and return counts, lines, found and broken.

    Counts speak of rows to write: a row kept three times is read three times.  `found` is how many subset entries this
    part answers.  A part that cannot be read is reported.
    """
    try:
        rows = read_part(part)
    except (PoolError, OSError, pa.ArrowException) as error:
        nothing = asdict(Counts(read=0, kept=0))
        return {"counts": nothing, "lines": 0, "found": 0, "broken": f"{REASON_BROKEN_PART}: {error}"}
    uids = parse_uids(rows.table[UID])
    times = count_in_subset(uids, open_subset(subset_url))
    spans, broken = _find_spans(part)
    lines, lost = _plan_lines(rows.table[KEY].to_pylist(), times, spans)
    reason = REASON_TRUNCATED_TAR if broken else REASON_MISSING_IMAGE
    not_kept = int((times == 0).sum())
    counts = Counts(
        read=not_kept + int(times.sum()) + sum(rows.failed.values()),
        kept=len(lines),
        dropped={NOT_IN_SUBSET: not_kept},
        failed=rows.failed | ({reason: lost} if lost else {}),
    )
    counts.check(f"shard plan of part {part.name}")
    with write_atomic(_plan_url(out, part)) as file:
        pq.write_table(pa.Table.from_pylist(lines, PLAN_SCHEMA), file)
    found = int(times[np.unique(uids, return_index=True)[1]].sum())
    return {"counts": asdict(counts), "lines": len(lines), "found": found, "broken": broken}


def _plan_url(out: str, part: Part) -> str:
    return join(out, PLAN_FOLDER, part.name + PARQUET_SUFFIX)


def _find_spans(part: Part) -> tuple[dict[str, tuple[int, int]], str | None]:
    """Return key -> byte range of every row with an image, and why the tar ended early if it did."""
    spans: dict[str, tuple[int, int]] = {}
    if part.tar is None:
        return spans, None
    try:
        for row in read_rows(part.tar, contents=False):
            if any(m.extension in IMAGE_EXTENSIONS for m in row.members):
                spans.setdefault(row.key, row.span)
    except BrokenTar as error:
        return spans, str(error)
    return spans, None


def _plan_lines(
    keys: Sequence[str], times: np.ndarray, spans: Mapping[str, tuple[int, int]]
) -> tuple[list[dict[str, int]], int]:
    """Return one line per row to write, and how many could not be planned because their image is gone."""
    lines: list[dict[str, int]] = []
    lost = 0
    unused = dict(spans)
    for row in np.flatnonzero(times).tolist():
        span = unused.pop(keys[row], None)
        if span is None:
            lost += int(times[row])
            continue
        repeats = range(int(times[row]))
        lines += [{ROW: row, "repeat": repeat, "start": span[0], "end": span[1]} for repeat in repeats]
    return lines, lost


def plan_shards(parts: Sequence[Part], lines: Sequence[int], rows_per_shard: int) -> list[ShardPlan]:
    """Return the output shards over all parts' plan lines, in pool order, of sizes that differ by at most one."""
    total = sum(lines)
    num_shards = -(-total // rows_per_shard)
    edges = [total * number // num_shards for number in range(num_shards + 1)] if num_shards else []
    spans = list(pairwise([0, *accumulate(lines)]))
    plans = []
    for number, (first, last) in enumerate(pairwise(edges)):
        cuts = ((p, max(first, s), min(last, e), s) for p, (s, e) in zip(parts, spans, strict=True))
        plans.append(ShardPlan(number, tuple(Piece(p, a - s, b - s) for p, a, b, s in cuts if a < b)))
    return plans


def write_shard(plan: ShardPlan, *, out: str, keys: str) -> dict[str, Any]:
    """Write one shard with its sidecars and return {"rows"}; a shard that is already there is left alone."""
    name = PART_PATTERN.format(plan.number)
    stats_url = join(out, name + STATS_SUFFIX)
    if exists(stats_url):  # written last, so tar and parquet are whole
        return {"rows": json.loads(read_bytes(stats_url))["successes"]}
    taken: set[str] = set()
    pieces = [(piece.part, _read_plan(out, piece)) for piece in plan.pieces]
    tables = [_describe_rows(part, lines, keys, taken) for part, lines in pieces]
    with write_atomic(join(out, name + TAR_SUFFIX)) as file:
        position = 0
        for (part, lines), table in zip(pieces, tables, strict=True):
            for packed in _copy_rows(part, lines, table):
                position += file.write(packed)
        write_end(file, position)
    sidecar = _stack(tables)
    with write_atomic(join(out, name + PARQUET_SUFFIX)) as file:
        pq.write_table(sidecar, file, compression="zstd")
    stats = {"count": sidecar.num_rows, "successes": sidecar.num_rows, "failed_to_download": 0, "failed_to_resize": 0}
    write_bytes(stats_url, json.dumps(stats).encode())
    return {"rows": sidecar.num_rows}


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


def _read_plan(out: str, piece: Piece) -> pa.Table:
    with open_file(_plan_url(out, piece.part)) as file:
        return pq.read_table(file).slice(piece.first, piece.last - piece.first)


def _describe_rows(part: Part, lines: pa.Table, keys: str, taken: set[str]) -> pa.Table:
    """Return the pool's own columns of the rows to write, with the key each will have and where it came from.

    Keys that are `taken` in this shard already (a repeat, or another source's row) get a number; `taken` grows.
    """
    table = read_part(part).table.take(lines[ROW])
    source_keys = table[KEY].to_pylist()
    wished = [f"{uid}-0" for uid in table[UID].to_pylist()] if keys == "uid" else source_keys
    written = [_take_key(key, taken) for key in wished]
    added = {SOURCE_PART: [part.name] * len(written), SOURCE_KEY: source_keys}
    table = table.drop_columns([ROW, *(name for name in added if name in table.column_names)])
    table = table.set_column(table.column_names.index(KEY), KEY, pa.array(written, pa.string()))
    for name, values in added.items():
        table = table.append_column(name, pa.array(values, pa.string()))
    return table


def _take_key(key: str, taken: set[str]) -> str:
    """Return `key`, or the first of `key-1`, `key-2`, ... (for `uid-0`: `uid-1`, ...) that is free, and take it."""
    stem = key.removesuffix("-0")
    free = next(k for k in (key, *(f"{stem}-{n}" for n in range(1, len(taken) + 2))) if k not in taken)
    taken.add(free)
    return free


def _copy_rows(part: Part, lines: pa.Table, table: pa.Table) -> Iterator[bytes]:
    """Yield the tar bytes of each line: the source's own, or repacked where the key changes."""
    assert part.tar
    starts, ends = lines["start"].to_pylist(), lines["end"].to_pylist()
    names = zip(table[KEY].to_pylist(), table[SOURCE_KEY].to_pylist(), strict=True)
    with open_file(part.tar) as source:
        for start, end, (key, source_key) in zip(starts, ends, names, strict=True):
            source.seek(start)
            packed: bytes = source.read(end - start)
            if len(packed) < end - start:
                raise PoolError(f"{part.tar} became shorter while its rows were copied.")
            yield packed if key == source_key else pack_row(rename_row(unpack_row(packed, part.tar), key))


def claim_folder(out: str, parts: Sequence[Part]) -> None:
    """Mark `out` as winnow's to write shards into; nothing is deleted yet.

    Raises PoolError when the folder is the pool's own, or holds files and no sign that `winnow shards` wrote them.
    """
    present = {name_of(url) for url in list_folder(out)}
    sources = {url.rsplit("/", 1)[0] for part in parts for url in (part.tar, part.table) if url and "/" in url}
    made = read_manifest(out)
    ours = exists(join(out, PLAN_FOLDER, OWNER)) or (made is not None and made.stage == "shards")
    foreign = sorted(name for name in present if not ours or not SHARD_FILES.fullmatch(name))
    if foreign or out.rstrip("/") in sources:
        what = f"files that it did not write ({foreign[0]}, ...)" if foreign else "the pool itself"
        raise PoolError(f"`winnow shards` does not write into {out!r}, which holds {what}. Name an empty folder.")
    write_bytes(join(out, PLAN_FOLDER, OWNER), b"")


def prepare_folder(out: str, identity: str) -> None:
    """Empty a claimed folder, unless it holds the unfinished shards of this very identity."""
    url = join(out, PLAN_FOLDER, PLAN_IDENTITY)
    if exists(url) and json.loads(read_bytes(url)) == identity:
        return
    for old in list_folder(out):
        remove(old)
    for old in list_folder(join(out, PLAN_FOLDER)):
        if name_of(old) != OWNER:
            remove(old)
    write_bytes(url, json.dumps(identity).encode())


def has_every_shard(out: str) -> bool:
    """Return whether every tar that sizes.json speaks of is there with its sidecars."""
    present = {name_of(url) for url in list_folder(out)}
    sizes = json.loads(read_bytes(join(out, SIZES))) if SIZES in present else {"": 0}
    stems = [tar.removesuffix(TAR_SUFFIX) for tar in sizes]
    return all({s + TAR_SUFFIX, s + PARQUET_SUFFIX, s + STATS_SUFFIX} <= present for s in stems)


def finish_folder(out: str, rows: Sequence[int]) -> dict[str, Any]:
    """Write sizes.json, drop the plan, and return the facts of the manifest."""
    sizes = {PART_PATTERN.format(n) + TAR_SUFFIX: rows_in for n, rows_in in enumerate(rows)}
    write_bytes(join(out, SIZES), json.dumps(sizes).encode())
    return {"num_shards": len(rows), "rows": sum(rows), "sizes_sha256": hash_json(sizes)}


def drop_plan(out: str) -> None:
    """Delete the plan; called after the manifest is there."""
    remove(join(out, PLAN_FOLDER))
