"""Which bytes of which tar make up each shard: OUT/plan, written before any shard and deleted after the manifest.

plan/parts/<part>.lines   one LINE per row to write, in pool order
plan/parts/<part>.arrow   the pool's own columns of the rows to write
plan/parts/<part>.lost    int64 subset entries of rows without an image, downloaded or not; absent when none
plan/repeats              REPEATs sorted by shard: the lines whose uid is written more than once
plan/repeats_of_parts     int32 lines of the repeats, sorted by part
plan/edges                int64 (2, parts + 1): the lines before each part that are no repeats, and the repeats

A task reads its slices of these and nothing else; the driver holds one byte per subset entry and 40 per repeat.  No run
reads the plan of an earlier one, so it is not synced to disk.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import PoolError, is_out_of_means
from pipeline.manifest import Counts, hash_json
from pipeline.pool import UID_PATTERN, Part, clean_text, read_part
from pipeline.schemas import (
    END,
    IMAGE_EXTENSIONS,
    KEY,
    REASON_BROKEN_PART,
    REASON_MISSING_IMAGE,
    REASON_TRUNCATED_TAR,
    ROW,
    START,
    UID,
)
from pipeline.shard_order import deal, find_edge, permute
from pipeline.spans import read_spans, why_broken
from pipeline.storage import is_local, join, open_file, write_atomic
from pipeline.subset import open_subset, search_subset
from pipeline.tars import BrokenTar, read_rows
from pipeline.uid import parse_uids

PLAN_FOLDER = "plan"
PARTS_FOLDER, REPEATS, REPEATS_OF_PARTS, EDGES = "parts", "repeats", "repeats_of_parts", "edges"
LINES_SUFFIX, COLUMNS_SUFFIX, LOST_SUFFIX = ".lines", ".arrow", ".lost"
NOT_IN_SUBSET = "not_in_subset"
LINE = np.dtype([("row", "<i4"), ("repeat", "<i4"), ("start", "<i8"), ("end", "<i8"), ("uid", "<i8")])
"""Which row of the part's columns, which repeat of it, its bytes in the tar, and where its uid stands in the subset."""
REPEAT = np.dtype([("part", "<i4"), ("line", "<i4")])
PARTS_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One output shard; what is in it follows from its number and OUT/plan."""

    number: int
    num_shards: int
    num_rows: int
    digest: str
    """Of every part's lines: a shard of another plan, in which a part could not be read, say, is not this one."""


def plan_part(part: Part, *, subset_url: str, out: str, scores: str | None = None) -> dict[str, Any]:
    """Find the kept rows of a part, write their lines to OUT/plan; return counts, lines, lost, broken, spans, digest.

    Counts speak of rows to write: a row kept three times is read three times.  `lines` is how many can be written,
    `lost` how many entries of the subset are here without an image.  A part that cannot be read is reported.  `spans`
    says whether SCORES knew where the rows' bytes are; otherwise the tar's headers are read.
    """
    try:
        rows = read_part(part)
    except (PoolError, OSError, pa.ArrowException) as error:
        if is_out_of_means(error):
            raise
        nothing, message = asdict(Counts(read=0, kept=0)), f"{REASON_BROKEN_PART}: {error}"
        return {"counts": nothing, "lines": 0, "lost": 0, "broken": message, "spans": False, "digest": ""}
    uids, subset = parse_uids(rows.table[UID]), open_subset(subset_url)
    places = search_subset(subset, uids, or_equal=False)
    times = search_subset(subset, uids, or_equal=True) - places
    known = read_spans(scores, part) if scores and part.tar else None
    starts, ends, broken = _find_spans(part, rows.table[KEY]) if known is None else _spread_spans(known, len(uids))
    kept, gone = np.flatnonzero((times > 0) & (starts >= 0)), np.flatnonzero((times > 0) & (starts < 0))
    lines, lost = (_make_lines(times[rows], starts[rows], ends[rows], places[rows]) for rows in (kept, gone))
    reason = REASON_TRUNCATED_TAR if broken else REASON_MISSING_IMAGE
    not_kept = int((times == 0).sum())
    counts = Counts(
        read=not_kept + int(times.sum()) + sum(rows.failed.values()),
        kept=len(lines),
        dropped={NOT_IN_SUBSET: not_kept},
        failed=rows.failed | ({reason: len(lost)} if len(lost) else {}),
    )
    counts.check(f"shard plan of part {part.name}")
    _write_lines(out, part, lines, rows.table.drop_columns([ROW]).take(kept))
    entries = np.concatenate([_entries_of(lost), _find_entries(rows.lost[UID], subset)])
    if len(entries):
        _write_array(_plan_url(out, part, LOST_SUFFIX), entries)
    digest = hashlib.sha256(lines.tobytes()).hexdigest()
    told = {"lines": len(lines), "lost": len(entries), "broken": broken, "spans": known is not None, "digest": digest}
    return {"counts": asdict(counts), **told}


def _find_spans(part: Part, keys: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray, str | None]:
    """Return the start and end byte (rows,) of each row with an image, -1 for others, and why the tar ended early.

    Of several rows with one key the first has the image, as in pipeline.batches.read_batches.
    """
    starts, ends = np.full(len(keys), -1, np.int64), np.full(len(keys), -1, np.int64)
    place = {key: row for row, key in reversed(list(enumerate(keys.to_pylist())))}
    broken = None
    try:
        for tar_row in read_rows(part.tar, contents=False, repeats=True) if part.tar else ():
            row = place.pop(clean_text(tar_row.key) or "", None)
            if row is not None and any(m.extension in IMAGE_EXTENSIONS for m in tar_row.members):
                starts[row], ends[row] = tar_row.span
    except BrokenTar as error:
        broken = str(error)
    return starts, ends, broken


def _spread_spans(spans: pa.Table, num_rows: int) -> tuple[np.ndarray, np.ndarray, str | None]:
    starts, ends = np.full(num_rows, -1, np.int64), np.full(num_rows, -1, np.int64)
    rows = spans[ROW].to_numpy()
    starts[rows], ends[rows] = spans[START].to_numpy(), spans[END].to_numpy()
    return starts, ends, why_broken(spans)


def _make_lines(times: np.ndarray, starts: np.ndarray, ends: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return one LINE per row and repeat, in order."""
    rows = np.repeat(np.arange(len(times)), times)
    lines = np.empty(len(rows), LINE)
    lines["row"], lines["repeat"] = rows, np.arange(len(rows)) - (np.cumsum(times) - times)[rows]
    lines["start"], lines["end"], lines["uid"] = starts[rows], ends[rows], places[rows]
    return lines


def _entries_of(lines: np.ndarray) -> np.ndarray:
    """Return int64 (lines,): the subset entry that each line answers; a uid's repeats stand side by side there."""
    entries: np.ndarray = lines["uid"] + lines["repeat"]
    return entries


def _find_entries(uids: pa.ChunkedArray, subset: np.ndarray) -> np.ndarray:
    """Return int64: the subset entries of uids (text, or what is none)."""
    named = parse_uids(uids.filter(pc.match_substring_regex(uids, UID_PATTERN).fill_null(False)))
    places = search_subset(subset, named, or_equal=False)
    times = search_subset(subset, named, or_equal=True) - places
    nowhere = np.zeros(len(times), np.int64)
    return _entries_of(_make_lines(times, nowhere, nowhere, places))


def _plan_url(out: str, part: Part, suffix: str) -> str:
    return join(out, PLAN_FOLDER, PARTS_FOLDER, part.name + suffix)


def _write_lines(out: str, part: Part, lines: np.ndarray, columns: pa.Table) -> None:
    _write_array(_plan_url(out, part, LINES_SUFFIX), lines)
    with (
        write_atomic(_plan_url(out, part, COLUMNS_SUFFIX), lasting=False) as file,
        pa.ipc.new_file(file, columns.schema) as writer,
    ):
        writer.write_table(columns.combine_chunks())


def read_lines(out: str, part: Part, lines: np.ndarray) -> tuple[np.ndarray, pa.Table]:
    """Return the LINEs numbered `lines` (ascending) of a part, and the pool's columns for each of them."""
    first, columns_url = int(lines[0]), _plan_url(out, part, COLUMNS_SUFFIX)
    found = _read_array(_plan_url(out, part, LINES_SUFFIX), LINE, first, int(lines[-1]) + 1)[lines - first]
    if is_local(columns_url):  # mapped: only the rows taken are read
        with pa.memory_map(columns_url) as source:
            return found, pa.ipc.open_file(source).read_all().take(found["row"])
    with open_file(columns_url) as file:
        return found, pa.ipc.open_file(pa.BufferReader(file.read())).read_all().take(found["row"])


def plan_shards(
    parts: Sequence[Part], planned: Sequence[Mapping[str, Any]], rows_per_shard: int, *, out: str, num_uids: int
) -> tuple[list[ShardPlan], int]:
    """Return the output shards over all parts' plan lines, and how many subset entries are in no part that was read.

    Writes which lines are repeats to OUT/plan.  `planned` is what plan_part said of each part, `num_uids` the length of
    the subset.  Sizes differ by at most one.
    """
    lines = [told["lines"] for told in planned]
    total = sum(lines)
    num_shards = -(-total // rows_per_shard)
    times = _count_lines(parts, lines, out, num_uids)
    repeats = _find_repeats(parts, lines, out, times)
    repeats_in = np.bincount(repeats["part"], minlength=len(parts))
    singles_in = np.array(lines, np.int64) - repeats_in
    edges = np.stack([np.concatenate([[0], np.cumsum(each)]) for each in (singles_in, repeats_in)])
    _write_array(join(out, PLAN_FOLDER, EDGES), edges.astype("<i8"))
    by_shard = np.lexsort((repeats["line"], repeats["part"], deal(len(repeats), num_shards)))
    _write_array(join(out, PLAN_FOLDER, REPEATS), repeats[by_shard])
    by_part = np.lexsort((repeats["line"], repeats["part"]))
    _write_array(join(out, PLAN_FOLDER, REPEATS_OF_PARTS), repeats["line"][by_part])
    shares = pairwise([find_edge(total, num_shards, number) for number in range(num_shards + 1)] if total else [])
    digest = hash_json([told["digest"] for told in planned])
    plans = [ShardPlan(number, num_shards, last - first, digest) for number, (first, last) in enumerate(shares)]
    for part in (part for part, told in zip(parts, planned, strict=True) if told["lost"]):
        times[_read_array(_plan_url(out, part, LOST_SUFFIX), np.int64)] = 1
    return plans, num_uids - int(np.count_nonzero(times))


def _count_lines(parts: Sequence[Part], lines: Sequence[int], out: str, num_uids: int) -> np.ndarray:
    """Return uint8 (num_uids,): how many lines answer each subset entry, 2 for more and for entries of one uid."""
    times = np.zeros(num_uids, np.uint8)
    for _, found in _read_all_lines(parts, lines, out):
        once, more = np.unique(_entries_of(found), return_counts=True)
        times[once] = np.minimum(times[once] + more, 2)
        again = found[found["repeat"] > 0]
        times[again["uid"]] = times[_entries_of(again)] = 2
    return times


def _find_repeats(parts: Sequence[Part], lines: Sequence[int], out: str, times: np.ndarray) -> np.ndarray:
    """Return the REPEATs of all parts sorted by uid: every line whose uid has more than one, in whichever parts."""
    found, uids = [np.empty(0, REPEAT)], [np.empty(0, np.int64)]
    for number, of_part in _read_all_lines(parts, lines, out) if (times > 1).any() else ():
        repeated = np.flatnonzero(times[_entries_of(of_part)] > 1)
        repeats = np.empty(len(repeated), REPEAT)
        repeats["part"], repeats["line"] = number, repeated
        found.append(repeats)
        uids.append(of_part["uid"][repeated])
    return np.concatenate(found)[np.argsort(np.concatenate(uids), kind="stable")]


def _read_all_lines(parts: Sequence[Part], lines: Sequence[int], out: str) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (number of the part, its LINEs) of each part that has lines."""

    def read(number: int) -> np.ndarray:
        return _read_array(_plan_url(out, parts[number], LINES_SUFFIX), LINE, 0, lines[number])

    numbers = [number for number, num_lines in enumerate(lines) if num_lines]
    with ThreadPoolExecutor(PARTS_AT_ONCE) as readers:
        for at in range(0, len(numbers), PARTS_AT_ONCE):
            some = numbers[at : at + PARTS_AT_ONCE]
            yield from zip(some, readers.map(read, some), strict=True)


def pick_lines(out: str, plan: ShardPlan, seed: int | None) -> np.ndarray:
    """Return the REPEAT-typed (part, line) pairs of one shard, sorted."""
    singles_before, repeats_before = _read_array(join(out, PLAN_FOLDER, EDGES), "<i8").reshape(2, -1)
    num_singles, num_repeats = int(singles_before[-1]), int(repeats_before[-1])
    total = num_singles + num_repeats
    first, last = (find_edge(num_repeats, plan.num_shards, plan.number + n) for n in range(2))
    begin, end = (find_edge(total, plan.num_shards, plan.number + n) for n in range(2))
    singles = np.arange(begin - first, end - last)
    if seed is not None:
        singles = np.sort(permute(singles, num_singles, str(seed)))
    owners = np.searchsorted(singles_before, singles, "right") - 1
    picked = np.empty(len(singles), REPEAT)
    picked["part"] = owners
    for part in np.unique(owners):
        begin, end = repeats_before[part : part + 2].tolist()
        url = join(out, PLAN_FOLDER, REPEATS_OF_PARTS)
        skipped = _read_array(url, "<i4", begin, end) if begin < end else np.empty(0, "<i4")
        num_lines = int(np.diff(singles_before[part : part + 2])[0]) + len(skipped)
        here = slice(*np.searchsorted(owners, [part, part + 1]))
        picked["line"][here] = np.delete(np.arange(num_lines), skipped)[singles[here] - singles_before[part]]
    picked = np.concatenate([picked, _read_array(join(out, PLAN_FOLDER, REPEATS), REPEAT, first, last)])
    return picked[np.lexsort((picked["line"], picked["part"]))]


def _write_array(url: str, array: np.ndarray) -> None:
    with write_atomic(url, lasting=False) as file:
        file.write(array.tobytes())


def _read_array(url: str, dtype: Any, first: int = 0, last: int | None = None) -> np.ndarray:
    """Return items [first, last) of a file of bare `dtype` items."""
    size = np.dtype(dtype).itemsize
    with open_file(url) as file:
        file.seek(int(first) * size)
        return np.frombuffer(file.read() if last is None else file.read((int(last) - int(first)) * size), dtype)


def find_gaps(parts: Sequence[Part]) -> Mapping[str, int]:
    """Return the runs of numbers missing between numbered parts of one folder -> how many; {} when there are none.

    img2dataset leaves such gaps where a shard failed, and DataComp's resharder stops at some of them without a word.
    """
    gaps: dict[str, int] = {}
    numbers: dict[str, list[str]] = {}
    for part in parts:
        folder, _, name = part.name.rpartition("-")
        if name.isdecimal() and name.isascii():
            numbers.setdefault(folder, []).append(name)
    for folder, names in numbers.items():
        for before, after in pairwise(sorted(names, key=int)):
            if missing := max(0, int(after) - int(before) - 1):
                first, last = (str(n).zfill(len(before)) for n in (int(before) + 1, int(after) - 1))
                gaps[f"{folder}{'-' if folder else ''}{first}" + (f" to {last}" if missing > 1 else "")] = missing
    return gaps
