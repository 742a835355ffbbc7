"""Filters x one pool part -> score files: OUT/<filter>/<part>.parquet with uid and the filter's columns, in pool order.

One pass over the part's images serves every filter that needs them.  A score file names its filter's identity and the
part's version in its metadata, so a rerun redoes exactly what changed.  Nothing is dropped here: a row that could not
be scored holds nulls and is counted, by reason, in OUT/failures/<part>.parquet.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.contract import Failure, Filter, Score, Scored, check_scored
from pipeline.errors import PoolError
from pipeline.manifest import Counts, hash_json
from pipeline.pool import Part, PartRows, list_columns, read_batches, read_part
from pipeline.schemas import (
    FAILURE_SCHEMA,
    IMAGE,
    PARQUET_SUFFIX,
    REASON_BROKEN_PART,
    REASON_MISSING_COLUMN,
    ROW,
    SCORE_COUNTS,
    SCORE_FILTER,
    SCORE_IDENTITY,
    UID,
)
from pipeline.storage import exists, join, open_file, write_atomic

log = logging.getLogger("winnow")
FAILURES_FOLDER = "failures"
POOL = "pool"
"""Name of the account of the pool's own rows beside one account per filter."""


def score_url(out: str, name: str, part: Part) -> str:
    """Return where the scores of one filter for one part are."""
    return join(out, name, part.name + PARQUET_SUFFIX)


def unit_identity(filter: Filter, part: Part) -> str:
    """Return the hash that decides the bytes of one score file: the filter's identity and the part's version."""
    return hash_json([filter.identity, part.name, part.fingerprints()])


def read_done(out: str, filter: Filter, part: Part) -> Counts | None:
    """Return the account of a finished score file, or None if it is absent, broken, or of another filter or part."""
    url = score_url(out, filter.name, part)
    if not exists(url):
        return None
    try:
        with open_file(url) as file:
            metadata = pq.read_schema(file).metadata or {}
    except (pa.ArrowException, OSError):
        return None
    if metadata.get(SCORE_IDENTITY, b"").decode() != unit_identity(filter, part):
        return None
    return Counts(**json.loads(metadata[SCORE_COUNTS]))


def score_part(part: Part, *, filters: Sequence[Filter], out: str) -> dict[str, Any]:
    """Score one part with every filter that has not done it yet, and return its accounts as plain JSON.

    {"counts": {filter: Counts}, "broken": message or None, "scored": number of score files written}.  A part that
    cannot be read has no counts and a message in "broken", and the other parts go on; a part that lacks what one
    filter reads has nulls in that filter's scores.
    """
    try:
        return _score_readable(part, filters, out)
    except (PoolError, OSError, pa.ArrowException) as error:
        return {"counts": {}, "broken": f"{REASON_BROKEN_PART}: {error}", "scored": 0}


def _score_readable(part: Part, filters: Sequence[Filter], out: str) -> dict[str, Any]:
    done = {f.name: read_done(out, f, part) for f in filters}
    todo = [f for f in filters if done[f.name] is None]
    counts = {name: account for name, account in done.items() if account}
    rows = read_part(part)
    counts[POOL] = Counts(read=rows.num_listed, kept=rows.table.num_rows, failed=rows.failed)
    if todo:
        counts |= _score_rows(part, rows, todo, out)
    return {"counts": {name: asdict(c) for name, c in counts.items()}, "broken": rows.broken, "scored": len(todo)}


def _score_rows(part: Part, rows: PartRows, filters: Sequence[Filter], out: str) -> dict[str, Counts]:
    columns = list_columns(part)
    collected: dict[str, list[pa.Table]] = {f.name: [] for f in filters}
    failures: list[pa.Table] = []
    images = any(IMAGE in f.needs for f in filters)
    for batch in read_batches(part, rows, images=images):
        for filter in filters:
            scored = _score_batch(filter, batch, columns)
            check_scored(filter, batch, scored)
            collected[filter.name].append(_score_table(filter, batch, scored))
            failures.append(_failure_table(filter, part, batch, scored))
    failed = pa.concat_tables([FAILURE_SCHEMA.empty_table(), *failures])
    _write_failures(out, part, filters, failed)
    return {f.name: _write_scores(out, part, f, collected[f.name], failed) for f in filters}


def _score_batch(filter: Filter, batch: pa.RecordBatch, columns: Sequence[str]) -> Scored:
    """Return the filter's scores, or nulls with a failure per row when this part lacks a column that it reads."""
    missing = [column for column in filter.needs if column not in columns]
    if not missing:
        return open_score(filter)(batch)
    nulls = tuple(pa.nulls(batch.num_rows, kind) for _, kind in filter.makes)
    message = f"this part has no column {', '.join(missing)}"
    return Scored(nulls, tuple(Failure(n, REASON_MISSING_COLUMN, message) for n in range(batch.num_rows)))


_OPENED: dict[str, Score] = {}
"""Filters open in this worker process, by identity: a model is loaded once and stays for the parts that follow."""


def open_score(filter: Filter) -> Score:
    """Return the filter's scoring function, opening its model on first use in this process."""
    if filter.identity not in _OPENED:
        _OPENED[filter.identity] = filter.load()
    return _OPENED[filter.identity]


def _score_table(filter: Filter, batch: pa.RecordBatch, scored: Scored) -> pa.Table:
    names = [ROW, UID, *(column for column, _ in filter.makes)]
    return pa.table([batch.column(ROW), batch.column(UID), *scored.columns], names=names)


def _failure_table(filter: Filter, part: Part, batch: pa.RecordBatch, scored: Scored) -> pa.Table:
    places = pa.array([f.position for f in scored.failures], pa.int32())
    num = len(scored.failures)
    columns = [
        pa.array([part.name] * num, pa.string()),
        batch.column(ROW).take(places),
        batch.column(UID).take(places),
        pa.array([filter.name] * num, pa.string()),
        pa.array([f.reason for f in scored.failures], pa.string()),
        pa.array([f.message[:500] for f in scored.failures], pa.string()),
    ]
    return pa.table(columns, schema=FAILURE_SCHEMA)


def _write_scores(out: str, part: Part, filter: Filter, tables: list[pa.Table], failed: pa.Table) -> Counts:
    """Write one filter's scores in pool order and return its account."""
    reasons = [r["reason"] for r in failed.select(["filter", "reason"]).to_pylist() if r["filter"] == filter.name]
    num_rows = sum(t.num_rows for t in tables)
    tally = {reason: reasons.count(reason) for reason in sorted(set(reasons))}
    counts = Counts(read=num_rows, kept=num_rows - len(reasons), failed=tally)
    counts.check(f"scores of {filter.name} for part {part.name}")
    schema = pa.schema([(ROW, pa.int32()), (UID, pa.string()), *filter.makes])
    table = pa.concat_tables([schema.empty_table(), *tables]).sort_by(ROW).drop_columns([ROW])
    metadata = {
        SCORE_IDENTITY: unit_identity(filter, part),
        SCORE_FILTER: json.dumps({"name": filter.name, "version": filter.version, "settings": filter.settings}),
        SCORE_COUNTS: json.dumps(asdict(counts)),
    }
    _write_parquet(score_url(out, filter.name, part), table.replace_schema_metadata(metadata))
    return counts


def _write_failures(out: str, part: Part, filters: Sequence[Filter], failed: pa.Table) -> None:
    """Write the part's failures; what other filters had reported stays."""
    url = join(out, FAILURES_FOLDER, part.name + PARQUET_SUFFIX)
    names = {f.name for f in filters}
    if exists(url):
        with open_file(url) as file:
            before = pq.read_table(file)
        others = pa.array([name not in names for name in before["filter"].to_pylist()], pa.bool_())
        failed = pa.concat_tables([before.filter(others), failed])
    _write_parquet(url, failed.sort_by([("filter", "ascending"), (ROW, "ascending")]))


def _write_parquet(url: str, table: pa.Table) -> None:
    with write_atomic(url) as file:
        pq.write_table(table, file, compression="zstd")


def read_scores(out: str, part: Part, columns: Sequence[str], owners: dict[str, str]) -> Iterator[pa.RecordBatch]:
    """Yield UID and the named score columns of one part, zipped from their filters' files in pool order.

    `owners` maps each column to its filter.  Raises PoolError when a file is absent or two files disagree on uids.
    """
    tables = {}
    for name in sorted({owners[c] for c in columns} or set(owners.values())):
        wanted = [UID, *(c for c in columns if owners[c] == name)]
        tables[name] = _read_score_file(score_url(out, name, part), name, wanted)
    uids = next(iter(tables.values()))[UID]
    for name, table in tables.items():
        if not table[UID].equals(uids):
            raise PoolError(f"scores of {name!r} for part {part.name!r} name other rows. Score the pool again.")
    zipped = pa.table([uids, *(tables[owners[c]][c] for c in columns)], names=[UID, *columns])
    yield from zipped.combine_chunks().to_batches()


def _read_score_file(url: str, name: str, columns: Sequence[str]) -> pa.Table:
    if not exists(url):
        raise PoolError(f"there are no scores of {name!r} at {url!r}. Run `winnow score` on the whole pool first.")
    with open_file(url) as file:
        return pq.read_table(file, columns=list(columns))


def raise_if_all_broken(results: Sequence[dict[str, Any]]) -> None:
    """Raise PoolError when no part of the pool could be read."""
    broken = [r["broken"] for r in results if not r["counts"]]
    if results and len(broken) == len(results):
        raise PoolError(f"none of the {len(results)} parts could be scored; the first says: {broken[0]}")
