"""Score files: OUT/<filter>/<part>.parquet with uid and a filter's columns, in pool order, and who made it from what.

The identity in a file's metadata decides whether it still counts; the rest of the metadata is to say why not, and to
account for the part without reading it again.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.contract import Filter
from pipeline.errors import StageError
from pipeline.ledger import FileRecord, identity_of
from pipeline.manifest import Counts, describe_changes, hash_json
from pipeline.pool import Part
from pipeline.schemas import (
    PARQUET_SUFFIX,
    ROW,
    SCORE_COUNTS,
    SCORE_FILTER,
    SCORE_IDENTITY,
    SCORE_INPUTS,
    SCORE_POOL,
    UID,
)
from pipeline.storage import exists, join, open_file, write_atomic


def score_url(out: str, name: str, part: Part) -> str:
    """Return where the scores of one filter for one part are."""
    return join(out, name, part.name + PARQUET_SUFFIX)


def unit_identity(filter: Filter, part: Part, records: Sequence[FileRecord]) -> str:
    """Return the hash that decides the bytes of one score file: the filter's identity and the bytes it reads."""
    return hash_json([filter.identity, part.name, identity_of(records)])


def _describe_filter(filter: Filter) -> dict[str, Any]:
    """Return what decides a filter's values, to say later what changed."""
    what = {"name": filter.name, "version": filter.version, "settings": filter.settings}
    return what | {"makes": {column: str(kind) for column, kind in filter.makes}}


def say_why(found: Mapping[bytes, Any], filter: Filter, records: Sequence[FileRecord]) -> list[str]:
    """Return why a unit's old score file, if there was one, does not count."""
    if not found:
        return []
    before = {"filter": found.get(SCORE_FILTER), "input": dict(_by_name(found.get(SCORE_INPUTS, [])))}
    after = {"filter": _describe_filter(filter), "input": dict(_by_name(identity_of(records)))}
    return describe_changes(before, json.loads(json.dumps(after))) or ["its failed rows are not in the quarantine"]


def _by_name(records: Sequence[Sequence[Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((f"*.{name.rpartition('.')[2]}", {"size": size, "digest": digest}) for name, size, digest in records)


def read_metadata(url: str) -> dict[bytes, Any]:
    """Return what a score file says of itself, {} when it is absent or not whole."""
    if not exists(url):
        return {}
    try:
        with open_file(url) as file:
            metadata = pq.read_schema(file).metadata or {}
        packed = (SCORE_FILTER, SCORE_INPUTS, SCORE_COUNTS, SCORE_POOL)
        return {SCORE_IDENTITY: metadata[SCORE_IDENTITY].decode()} | {n: json.loads(metadata[n]) for n in packed}
    except (pa.ArrowException, OSError, KeyError, ValueError):
        return {}


def write_scores(
    out: str,
    part: Part,
    filter: Filter,
    tables: Sequence[pa.Table],
    counts: Counts,
    pool: Mapping[str, Any],
    records: Sequence[FileRecord],
) -> None:
    """Write one filter's scores (tables of ROW, UID and its columns, in any order) in pool order.

    `pool` is the part's own account, which goes into the metadata with the filter's.
    """
    counts.check(f"scores of {filter.name} for part {part.name}")
    schema = pa.schema([(ROW, pa.int32()), (UID, pa.string()), *filter.makes])
    table = pa.concat_tables([schema.empty_table(), *tables]).sort_by(ROW)
    if not np.array_equal(table[ROW].to_numpy(), np.arange(pool["counts"]["kept"])):
        raise StageError(f"{filter.name}, part {part.name}: rows were lost or repeated. This is a bug in winnow.")
    table = table.drop_columns([ROW])
    metadata = {
        SCORE_IDENTITY: unit_identity(filter, part, records),
        SCORE_FILTER: json.dumps(_describe_filter(filter)),
        SCORE_INPUTS: json.dumps(identity_of(records)),
        SCORE_COUNTS: json.dumps(asdict(counts)),
        SCORE_POOL: json.dumps(pool),
    }
    write_parquet(score_url(out, filter.name, part), table.replace_schema_metadata(metadata))


def write_parquet(url: str, table: pa.Table) -> None:
    """Write a table atomically."""
    with write_atomic(url) as file:
        pq.write_table(table, file, compression="zstd")
