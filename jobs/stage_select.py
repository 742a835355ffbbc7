"""The select stage: stored scores -> SUBSETS/<name>.npy and <name>.json."""

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from jobs.stages import Start
from pipeline.errors import ConfigError, StageError
from pipeline.join import ForeignTable, join_tables, open_tables
from pipeline.lock import hold_lock
from pipeline.manifest import Manifest, find_done, hash_json, read_manifest, write_manifest
from pipeline.schemas import PARQUET_SUFFIX, POOL, SCORE_COUNTS, SCORE_FILTER, SCORE_IDENTITY
from pipeline.score_files import read_metadata
from pipeline.select import Step, check_steps, describe_steps, find_columns, is_entry_list
from pipeline.select_source import Source
from pipeline.select_steps import select_rows
from pipeline.select_table import READERS, PartGroup, ScoreTable, Spread, sum_in_threads
from pipeline.spark import sum_each
from pipeline.storage import exists, join, remove, sha256_of_file, sweep_temporaries
from pipeline.subset import SUBSET_SUFFIX
from pipeline.subset_runs import merge_runs

log = logging.getLogger("winnow")
DRIVER_ROWS = 50_000_000
"""Up to so many rows the threads of the driver count faster than Spark starts; beyond, Spark's workers do."""


def run_select(
    start: Start,
    scores: str,
    name: str,
    steps: Sequence[Step],
    out: str,
    *,
    tables: Sequence[str] = (),
    fresh: bool = False,
) -> Manifest:
    """Write OUT/<name>.npy with the uids that pass the steps, and OUT/<name>.json as its manifest.

    No step keeps every scored row; rows that share a uid are one entry, with the most copies that one of them has, and
    the shards stage finds them all.  `tables`
    are parquet files with a uid column, whose other columns join the scores: null for a row they lack.  `fresh` selects
    again what is already there.
    Raises StageError without scores or when another driver works on OUT, ConfigError for an unknown column, PoolError
    for a table that cannot be joined.
    """
    scored, foreign = require_scores(scores), open_tables(tables)
    parents = name_versions(scores, scored, set(_choose_columns(scored, foreign, steps).values()))
    parents |= {table.name: table.identity for table in foreign}
    wanted = Manifest(stage="select", config=describe_steps(steps), parents=parents)
    url, manifest_name, scratch = join(out, name + SUBSET_SUFFIX), f"{name}.json", join(out, f".tmp-select-{name}")

    def is_whole(done: Manifest) -> bool:
        return exists(url) and sha256_of_file(url) == done.facts["sha256"]

    with hold_lock(out, "select") as check_lock:
        stale = exists(join(out, manifest_name))
        if fresh:
            log.warning("select: starting over with subset %s in %s", name, out)
            remove(join(out, manifest_name))
        if done := find_done(out, wanted, name=manifest_name, is_whole=is_whole):
            return done
        if stale:
            remove(url)  # what stood under this name is of other steps or scores
        remove(scratch)
        sweep_temporaries(out)
        try:
            source = _open_source(start, scores, scored, foreign, steps, scratch)
            kept = select_rows(source, steps, scratch)
            merged = merge_runs(kept.runs, url)
        finally:
            remove(scratch)
        facts = {"rows": kept.rows, "uids": merged.num_uids, "copies": merged.num_copies, "sha256": merged.sha256}
        facts |= {"thresholds": kept.thresholds} | ({"found": kept.found} if kept.found else {})
        manifest = replace(wanted, counts=kept.counts, facts=facts)
        check_lock()
        write_manifest(out, manifest, name=manifest_name)
    return manifest


def name_versions(scores: str, scored: Manifest, filters: Iterable[str]) -> dict[str, str]:
    """Return for each of the filters a hash of who made its scores from what, and of which rows failed.

    Filters that came or went beside them change nothing; a retry that mends rows does.
    Raises StageError when parts were scored with different settings, as two drivers at work in one folder would.
    """
    versions = {}
    for name in sorted(filters):
        urls = [join(scores, name, part + PARQUET_SUFFIX) for part in scored.facts["parts"]]
        with ThreadPoolExecutor(READERS) as readers:
            found = list(readers.map(read_metadata, urls))
        if len({json.dumps(one.get(SCORE_FILTER), sort_keys=True) for one in found if one}) > 1:
            raise StageError(
                f"parts of {name!r} in {scores!r} were scored with different settings. Run `winnow score` again."
            )
        made = [[one.get(SCORE_IDENTITY, scored.identity), one.get(SCORE_COUNTS)] for one in found]
        parts = list(zip(scored.facts["parts"], made, strict=True))
        versions[f"scores of {name}"] = hash_json([scored.counts[POOL].read, parts])
    return versions


def _choose_columns(scored: Manifest, foreign: Sequence[ForeignTable], steps: Sequence[Step]) -> dict[str, str]:
    """Return the scores that the steps read, each with the filter that made it; one score where they read none.

    Raises ConfigError for a column that is unknown, or of both scores and a table.
    """
    owners, types = scored.facts["columns"], _join_types(scored, foreign)
    own = {column: owners[column] for column in find_columns(steps, types) if column in owners}
    return own or dict([next(iter(owners.items()))])


def _join_types(scored: Manifest, foreign: Sequence[ForeignTable]) -> dict[str, str]:
    types = scalar_types(scored) | {c: kind for c, kind in scored.facts["types"].items() if is_entry_list(kind)}
    for other in foreign:
        for column in sorted(other.types.keys() & types.keys()):
            raise ConfigError(f"column {column!r} of {other.pattern!r} stands in the scores too. Rename one of them.")
        types |= other.types
    return types


def _open_source(
    start: Start, scores: str, scored: Manifest, foreign: Sequence[ForeignTable], steps: Sequence[Step], scratch: str
) -> Source:
    """Return the score table that the steps need, foreign columns joined to it in files under SCRATCH."""
    types, own = _join_types(scored, foreign), _choose_columns(scored, foreign, steps)
    check_steps(steps, types)
    columns = find_columns(steps, types)
    table = ScoreTable({name: join(scores, name) for name in sorted(set(own.values()))}, own)
    parts = table.measure(scored.facts["parts"])
    table = join_tables(start, table, parts, foreign, columns, join(scratch, "joined"))
    num_pool = scored.counts[POOL].read
    return Source(table, parts, types, num_pool, start, _choose_spread(start, sum(p.num_rows for p in parts)))


def _choose_spread(start: Start, num_rows: int) -> Spread:
    if num_rows <= DRIVER_ROWS:
        return sum_in_threads

    def spread(work: Callable[[PartGroup], np.ndarray], groups: Sequence[PartGroup], size: int) -> np.ndarray:
        return sum_each(start(), work, groups, size, what="select")

    return spread


def require_scores(scores: str) -> Manifest:
    """Return the manifest of finished scores.  Raises StageError when there is none."""
    found = read_manifest(scores)
    if found is None:
        raise StageError(f"{scores!r} holds no finished scores. Run `winnow score --pool POOL --out {scores}` first.")
    return found


def scalar_types(scored: Manifest) -> dict[str, str]:
    """Return the score columns that hold one value a row, with the names of their Arrow types."""
    return {column: kind for column, kind in scored.facts["types"].items() if "list" not in kind}
