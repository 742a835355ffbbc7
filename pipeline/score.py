"""Filters x one pool part -> score files (score_files.py), failures (quarantine.py) and spans (spans.py).

One pass over the part's images serves every filter that needs them.  A unit of work is one filter on one part; its
identity is a hash of the filter (kind, version, settings, model) and of the bytes of the files it reads, so a rerun
redoes exactly what changed and says why.  Nothing is dropped here: a row that could not be scored holds nulls and is
counted by reason.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.batches import PLAIN_ROWS, VECTOR_ROWS, read_batches, read_whole
from pipeline.contract import Filter, Scored
from pipeline.errors import PoolError, is_out_of_means
from pipeline.ledger import FileRecord, Unit, digest_file, list_inputs
from pipeline.manifest import Counts, hash_json
from pipeline.pool import Part, PartRows, list_columns, read_part
from pipeline.quarantine import count_failures, make_failures, make_pool_failures, merge_failures, read_failures
from pipeline.schemas import (
    END,
    IMAGE,
    IMAGE_ERROR,
    POOL,
    REASON_BROKEN_PART,
    REASON_TRUNCATED_TAR,
    ROW,
    SCORE_COUNTS,
    SCORE_IDENTITY,
    SCORE_POOL,
    START,
    UID,
)
from pipeline.score_files import read_metadata, say_why, score_url, unit_identity, write_scores
from pipeline.spans import version_of, write_spans
from pipeline.stored import Take, add_stored, find_array_readers, find_makers, open_stored, order_levels
from pipeline.worker import score_batches


@dataclass(frozen=True, slots=True)
class PartScores:
    """What filters say about the rows of one part, not yet written."""

    tables: dict[str, list[pa.Table]]
    """Per filter: ROW, UID and its columns, batch by batch."""
    failures: pa.Table
    version: str
    """Of the part, before it was read."""
    spans: list[pa.RecordBatch]
    """ROW, START, END, IMAGE_ERROR; empty when no image was read."""
    broken: dict[str, str | None]
    """Per filter: why the part, or what it reads beside it, could not be read to the end."""


class _BrokenPart(Exception):
    """A part that cannot be read."""


def score_part(unit: Unit, *, filters: Sequence[Filter], out: str) -> dict[str, Any]:
    """Score one part with every filter that has not done it yet, and return its accounts as plain JSON.

    {"counts": {filter: Counts}, "broken": message or None, "inputs": file records, "scored": {filter: why it was done},
    "reused": filters that were done}.  A part that cannot be read has no counts and a message in "broken", and the
    other parts go on; a part that lacks what one filter reads has nulls in that filter's scores.
    Raises StageError or OSError when scores cannot be written: that is no fault of the part.
    """
    try:
        return _score_levels(unit, filters, out)
    except _BrokenPart as broken:
        return {"counts": {}, "broken": str(broken), "inputs": [], "scored": {}, "reused": []}


def _score_levels(unit: Unit, filters: Sequence[Filter], out: str) -> dict[str, Any]:
    """Return what score_part does: first the filters that need the pool alone, then those that need their scores."""
    part, makers = unit.part, find_makers(filters)
    rows: PartRows | None = None
    pools: dict[str, Any] = {}
    counts: dict[str, Any] = {}
    why: dict[str, list[str]] = {}
    with _blaming_the_part():
        files = digest_files(unit, filters)
    for level in order_levels(filters):
        with _blaming_the_part():
            found = {f.name: read_metadata(score_url(out, f.name, part)) for f in level}
            records = {f.name: [*files[f.name], *describe_scores(out, part, makers[f.name])] for f in level}
            quarantine = read_failures(out, part)
            todo = [f for f in level if not _is_done(f, part, found[f.name], records[f.name], quarantine)]
            if todo:
                rows = rows or read_part(part, {column for f in filters for column in f.needs})
                scores = score_rows(part, rows, todo, stored_in=out, makers=makers)
                pools |= _describe_pools(rows, scores)
        done = [f.name for f in level if f not in todo]
        counts |= {name: found[name][SCORE_COUNTS] for name in done}
        pools |= {name: found[name][SCORE_POOL] for name in done}
        if todo:
            counts |= write_part_scores(out, part, todo, scores, pools, records)
            why |= {f.name: say_why(found[f.name], f, records[f.name]) for f in todo}
    inputs = {record["name"]: record for of_filter in files.values() for record in of_filter}
    return {
        "counts": {POOL: next(iter(pools.values()))["counts"], **counts},
        "broken": next((pools[f.name]["broken"] for f in filters if pools[f.name]["broken"]), None),
        "inputs": list(inputs.values()),
        "scored": why,
        "reused": sorted(counts.keys() - why.keys()),
    }


@contextmanager
def _blaming_the_part() -> Iterator[None]:
    """Turn what reading a part raises into a _BrokenPart, but for a lack of this machine."""
    try:
        yield
    except (PoolError, OSError, pa.ArrowException) as error:
        if is_out_of_means(error):
            raise
        raise _BrokenPart(f"{REASON_BROKEN_PART}: {error}") from None


def _describe_pools(rows: PartRows, scores: PartScores) -> dict[str, Any]:
    """Return the part's own account as each filter's file tells it: the same for all, but for what only one reads."""
    counts = asdict(Counts(read=rows.num_listed, kept=rows.table.num_rows, failed=rows.failed))
    return {name: {"counts": counts, "broken": broken} for name, broken in scores.broken.items()}


def _is_done(
    filter: Filter, part: Part, found: Mapping[bytes, Any], records: Sequence[FileRecord], quarantine: pa.Table
) -> bool:
    """Return whether a score file has the unit's identity, and its failed rows stand in the quarantine."""
    if found.get(SCORE_IDENTITY) != unit_identity(filter, part, records):
        return False
    counts = count_failures(filter, found[SCORE_COUNTS]["read"], quarantine)
    return bool(asdict(counts) == found[SCORE_COUNTS])


def digest_files(unit: Unit, filters: Sequence[Filter]) -> dict[str, list[FileRecord]]:
    """Return per filter the records of the pool's files that it reads; each file is hashed at most once."""
    readers, part = find_array_readers(filters), unit.part
    read = {f.name: list_inputs(part, images=IMAGE in f.needs, arrays=f.name in readers) for f in filters}
    records = {
        url: digest_file(url, unit.known) for url in dict.fromkeys(url for urls in read.values() for url in urls)
    }
    return {name: [records[url] for url in urls] for name, urls in read.items()}


def describe_scores(out: str, part: Part, makers: Mapping[str, str]) -> list[FileRecord]:
    """Return one record per filter whose scores another filter reads: its identity there, and which rows it failed."""
    records: list[FileRecord] = []
    for name in sorted(set(makers.values())):
        made = read_metadata(score_url(out, name, part))
        digest = hash_json([made.get(SCORE_IDENTITY), made.get(SCORE_COUNTS)])
        records.append({"name": f"{part.name}.{name}", "size": 0, "digest": digest})
    return records


def score_rows(
    part: Part,
    rows: PartRows,
    filters: Sequence[Filter],
    *,
    stored_in: str = "",
    makers: Mapping[str, Mapping[str, str]] | None = None,
) -> PartScores:
    """Return what the filters say about every row of a part; nothing is written.  Raises PoolError, OSError.

    `makers` are those of find_makers, whose scores stand in the folder `stored_in`.
    """
    tables: dict[str, list[pa.Table]] = {f.name: [] for f in filters}
    failures = [make_pool_failures(part, rows)]
    spans: list[pa.RecordBatch] = []
    version = version_of(part)
    stored, broken = open_stored(part, rows, filters, stored_in, makers or {})
    columns = [*list_columns(part), *stored]
    for group in _group(filters):
        images = any(IMAGE in f.needs for f in group)
        for batch, scored in score_batches(_read(part, rows, group, stored), group, columns=columns, part=part.name):
            spans += [batch.select([ROW, START, END, IMAGE_ERROR])] if images else []
            for filter, of_filter in zip(group, scored, strict=True):
                tables[filter.name].append(_score_table(filter, batch, of_filter))
                failures.append(make_failures(filter, part, batch, of_filter))
    reads_broken = {f.name for f in filters if set(f.vectors) - stored.keys()}
    why = {f.name: rows.broken or (broken if f.name in reads_broken else None) for f in filters}
    return PartScores(tables, pa.concat_tables(failures), version, spans, why)


def _group(filters: Sequence[Filter]) -> list[list[Filter]]:
    """Return the filters by what their batches hold (texts and numbers, vectors, images), then each of whole parts."""
    kinds: list[list[Filter]] = [[], [], []]
    for filter in (f for f in filters if not f.whole_part):
        kinds[2 if IMAGE in filter.needs else int(bool(filter.vectors))].append(filter)
    return [group for group in (*kinds, *([f] for f in filters if f.whole_part)) if group]


def _read(
    part: Part, rows: PartRows, filters: Sequence[Filter], stored: Mapping[str, Take]
) -> Iterator[pa.RecordBatch]:
    """Yield the part's batches for one group of filters, with the stored columns that it needs."""
    needs = {column for f in filters for column in f.needs}
    if filters[0].whole_part:
        batches = read_whole(rows, needs)
    else:
        max_rows = VECTOR_ROWS if any(f.vectors for f in filters) else PLAIN_ROWS
        batches = read_batches(part, rows, images=IMAGE in needs, max_rows=max_rows)
    return add_stored(batches, {column: take for column, take in stored.items() if column in needs})


def write_part_scores(
    out: str,
    part: Part,
    filters: Sequence[Filter],
    scores: PartScores,
    pools: Mapping[str, Any],
    records: Mapping[str, Sequence[FileRecord]],
) -> dict[str, Any]:
    """Write spans, failures and then the scores, and return one account per filter as plain JSON."""
    if scores.spans:
        _write_spans(out, part, scores)
    merge_failures(out, part, filters, scores.failures)
    counts = {}
    for filter in filters:
        tables = scores.tables[filter.name]
        of_filter = count_failures(filter, sum(t.num_rows for t in tables), scores.failures)
        write_scores(out, part, filter, tables, of_filter, pools[filter.name], records[filter.name])
        counts[filter.name] = asdict(of_filter)
    return counts


def _write_spans(out: str, part: Part, scores: PartScores) -> None:
    """Write where the rows that have an image stand in the tar, for the shards stage."""
    kinds = [(ROW, pa.int32()), (START, pa.int64()), (END, pa.int64()), (IMAGE_ERROR, pa.string())]
    table = pa.Table.from_batches(scores.spans, pa.schema(kinds))
    cut = pc.any(pc.equal(table[IMAGE_ERROR], REASON_TRUNCATED_TAR)).as_py()
    table = table.filter(pc.is_null(table[IMAGE_ERROR])).combine_chunks()
    broken = f"{part.tar} ended early when it was scored" if cut else None
    columns = (table[name].combine_chunks() for name in (ROW, START, END))
    write_spans(out, part, *columns, version=scores.version, broken=broken)


def _score_table(filter: Filter, batch: pa.RecordBatch, scored: Scored) -> pa.Table:
    names = [ROW, UID, *(column for column, _ in filter.makes)]
    return pa.table([batch.column(ROW), batch.column(UID), *scored.columns], names=names)


def raise_if_all_broken(results: Sequence[dict[str, Any]]) -> None:
    """Raise PoolError when no part of the pool gave a row and at least one is broken."""
    broken = [r["broken"] for r in results if r["broken"]]
    if broken and not any(r["counts"] and r["counts"][POOL]["read"] for r in results):
        raise PoolError(f"none of the {len(results)} parts could be scored; the first says: {broken[0]}")
