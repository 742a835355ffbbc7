"""Failed rows -> scored again, and nothing else: the quarantine of one part, one reason at a time.

Only the rows' own bytes are read, by their place in the tar.  What now works replaces the nulls in the score files;
what fails again stays in quarantine with its new reason.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.batches import read_batches, read_chosen
from pipeline.contract import Filter, Scored
from pipeline.errors import StageError
from pipeline.ledger import FileRecord, Unit
from pipeline.manifest import Counts
from pipeline.pool import Part, PartRows, list_columns, read_part
from pipeline.quarantine import count_failures, make_failures, read_failures, write_failures
from pipeline.schemas import (
    END,
    FAILURE_FILTER,
    FAILURE_REASON,
    IMAGE,
    ROW,
    SCORE_COUNTS,
    SCORE_IDENTITY,
    START,
    UID,
)
from pipeline.score import describe_scores, digest_files
from pipeline.score_files import read_metadata, score_url, unit_identity, write_parquet
from pipeline.spans import read_spans
from pipeline.storage import open_file
from pipeline.stored import add_stored, find_makers, open_stored
from pipeline.worker import score_batches


def retry_part(unit: Unit, *, filters: Sequence[Filter], out: str, reason: str) -> dict[str, Any]:
    """Score the part's rows that failed for `reason` again; return plain JSON.

    {"counts", "tried", "mended", "broken": why the part's npz cannot be read, or None}.

    Raises StageError when the part or a filter is not what the scores were made of.
    """
    makers = find_makers(filters)
    files = digest_files(unit, filters)
    for filter in filters:
        _check_same(
            unit.part, filter, [*files[filter.name], *describe_scores(out, unit.part, makers[filter.name])], out
        )
    failed = read_failures(out, unit.part)
    again = failed.filter(pc.equal(failed[FAILURE_REASON], reason))
    mended, broken = 0, None
    for filter in filters:
        if filter.whole_part:  # what it reads has not changed, and its rows cannot be scored without the others
            continue
        rows = again.filter(pc.equal(again[FAILURE_FILTER], filter.name))[ROW].drop_null().to_pylist()
        if rows:
            found, why = _retry_rows(unit, filter, rows, out, makers)
            mended, broken = mended + found, broken or why
    counts = {f.name: read_metadata(score_url(out, f.name, unit.part))[SCORE_COUNTS] for f in filters}
    return {"counts": counts, "tried": again.num_rows, "mended": mended, "broken": broken}


def _check_same(part: Part, filter: Filter, records: Sequence[FileRecord], out: str) -> None:
    found = read_metadata(score_url(out, filter.name, part)).get(SCORE_IDENTITY)
    if found != unit_identity(filter, part, records):
        raise StageError(
            f"part {part.name} or filter {filter.name!r} is not what its scores were made of. "
            "Run `winnow score`, which redoes what changed."
        )


def _retry_rows(
    unit: Unit, filter: Filter, rows: Sequence[int], out: str, makers: Mapping[str, Mapping[str, str]]
) -> tuple[int, str | None]:
    """Score some rows of a part again in their places; return how many succeed, and why its npz cannot be read."""
    part, images = unit.part, IMAGE in filter.needs
    listed = read_part(part, filter.needs)
    stored, broken = open_stored(part, listed, [filter], out, makers)
    batches = add_stored(_read_rows(part, listed, sorted(rows), out, images=images), stored)
    present = [*list_columns(part), *stored]
    failures: list[pa.Table] = []
    places: list[int] = []
    columns: list[Scored] = []
    for batch, (scored,) in score_batches(batches, [filter], columns=present, part=part.name):
        failures.append(make_failures(filter, part, batch, scored))
        places += batch.column(ROW).to_pylist()
        columns.append(scored)
    failed = pa.concat_tables(failures)
    before, tried = read_failures(out, part), set(rows)
    kept = [f != filter.name or row not in tried for f, row in _pairs(before)]
    merged = pa.concat_tables([before.filter(pa.array(kept, pa.bool_())), failed])
    _replace(filter, score_url(out, filter.name, part), places, columns, merged)
    write_failures(out, part, merged)
    num_failed: int = failed.num_rows
    return len(rows) - num_failed, broken


def _read_rows(part: Part, listed: PartRows, rows: list[int], out: str, *, images: bool) -> Iterator[pa.RecordBatch]:
    """Yield the batches of some rows: by their spans, or where they have none by reading the tar as scoring does."""
    spans = read_spans(out, part) if images else None
    where = {line[ROW]: (line[START], line[END]) for line in spans.to_pylist()} if spans else {}
    if not images or all(row in where for row in rows):
        yield from read_chosen(part, listed, rows, spans=where, images=images)
        return
    wanted = pa.array(rows, pa.int32())
    for batch in read_batches(part, listed, images=True):
        if (chosen := batch.filter(pc.is_in(batch.column(ROW), value_set=wanted))).num_rows:
            yield chosen


def _pairs(failures: pa.Table) -> list[tuple[str, int | None]]:
    return list(zip(failures[FAILURE_FILTER].to_pylist(), failures[ROW].to_pylist(), strict=True))


def _replace(filter: Filter, url: str, places: list[int], scored: Sequence[Scored], failures: pa.Table) -> None:
    """Write the score file again with new values at `places` and a new account."""
    with open_file(url) as file:
        table = pq.read_table(file)
    order = np.arange(table.num_rows)
    order[places] = table.num_rows + np.arange(len(places))
    columns = [table[UID]]
    for number, (name, _) in enumerate(filter.makes):
        new = [s.columns[number] for s in scored]
        columns.append(pa.chunked_array([*table[name].chunks, *new]).take(pa.array(order)))
    counts: Counts = count_failures(filter, table.num_rows, failures)
    metadata = {**table.schema.metadata, SCORE_COUNTS: json.dumps(asdict(counts))}
    write_parquet(url, pa.table(columns, names=table.column_names).replace_schema_metadata(metadata))
