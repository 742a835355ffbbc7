"""The Spark stages as functions: score, select, shards.  Each writes its manifest last and is skipped when done.

Single verbs (score_pool.py, ...) and whole recipes (run_recipe.py) call the same three.  `start` returns the Spark
session (pipeline.spark.lazy_session); a stage that is done never calls it.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from filters import build_filter
from pipeline.config import as_mapping
from pipeline.contract import Filter, check_needs
from pipeline.errors import ConfigError, PoolError, StageError, check_name
from pipeline.manifest import Counts, Manifest, add_counts, find_done, read_manifest, write_manifest
from pipeline.pool import Part, count_rows, list_columns, list_parts, pool_identity
from pipeline.schemas import EVENTS, PARQUET_SUFFIX, UID
from pipeline.score import POOL, raise_if_all_broken, read_scores, score_part
from pipeline.select import (
    RADIX_BITS,
    Step,
    Top,
    check_steps,
    clean_batch,
    count_radix,
    find_columns,
    find_threshold,
    order_keys,
    select_rows,
)
from pipeline.shards import (
    ShardConfig,
    claim_folder,
    drop_plan,
    finish_folder,
    has_every_shard,
    plan_part,
    plan_shards,
    prepare_folder,
    write_shard,
)
from pipeline.spark import open_table, run_each
from pipeline.storage import (
    exists,
    join,
    list_folder,
    name_of,
    read_bytes,
    sha256_of_file,
    sweep_temporaries,
    write_bytes,
)
from pipeline.subset import SUBSET_SUFFIX, read_subset, write_subset

log = logging.getLogger("winnow")
Start = Callable[[], Any]
SCORES_FOLDER, SUBSETS_FOLDER, SHARDS_FOLDER = "scores", "subsets", "shards"


@contextmanager
def timed(run: str, stage: str, name: str = "") -> Iterator[None]:
    """Append one line with the stage's wall time to RUN/events.jsonl, whatever happens inside."""
    start = time.perf_counter()
    outcome = "failed"
    try:
        yield
        outcome = "done"
    finally:
        seconds = round(time.perf_counter() - start, 2)
        line = json.dumps({"stage": stage, "name": name, "outcome": outcome, "seconds": seconds})
        url = join(run, EVENTS)
        write_bytes(url, (read_bytes(url) if exists(url) else b"") + line.encode() + b"\n")


def run_score(
    start: Start, pool: str, entries: Sequence[Mapping[str, Any]], out: str, *, quiet: bool = False
) -> Manifest:
    """Score every part of a pool with the recipe's filters into OUT/<filter>/<part>.parquet.

    Raises ConfigError for no filter, an unknown one or two of one name, PoolError when no part can be scored.
    """
    if not entries:
        raise ConfigError(
            "the recipe scores nothing: its `score` list is empty. `winnow filters` lists what it can hold."
        )
    parts, filters = list_parts(pool), [build_filter(entry) for entry in entries]
    owners = _own_columns(filters)
    _check_first_part(parts, filters)
    config = {"filters": {f.name: {"version": f.version, **as_mapping(f.settings)} for f in filters}}
    wanted = Manifest(stage="score", config=config, parents={"pool": pool_identity(parts)})
    if done := find_done(out, wanted, is_whole=partial(_has_every_score, out)):
        return done
    work = partial(score_part, filters=filters, out=out)
    sizes = [count_rows(part) for part in parts]
    results = run_each(start(), work, parts, what="score", sizes=sizes, unit="row", quiet=quiet)
    raise_if_all_broken(results)
    broken = {part.name: r["broken"] for part, r in zip(parts, results, strict=True) if r["broken"]}
    _warn_broken("score", broken)
    counts = {f.name: _sum_counts(results, f.name) for f in filters}
    scored = [part.name for part, r in zip(parts, results, strict=True) if r["counts"]]
    types = {column: str(kind) for f in filters for column, kind in f.makes}
    facts = {"columns": owners, "types": types, "parts": scored, "broken": broken}
    manifest = Manifest(
        stage="score",
        config=config,
        parents=wanted.parents,
        counts={POOL: _sum_counts(results, POOL), **counts},
        facts=facts,
    )
    for name in [*counts, "failures"]:
        sweep_temporaries(join(out, name))
    write_manifest(out, manifest)
    return manifest


def _has_every_score(out: str, done: Manifest) -> bool:
    """Return whether no part is left to be tried again, and the score files that a manifest speaks of are there."""
    if set(done.facts["broken"]) - set(done.facts["parts"]):
        return False
    present = {name: {name_of(url) for url in list_folder(join(out, name))} for name in done.config["filters"]}
    expected = {part + PARQUET_SUFFIX for part in done.facts["parts"]}
    return all(expected <= found for found in present.values())


def _own_columns(filters: Sequence[Filter]) -> dict[str, str]:
    owners: dict[str, str] = {}
    for filter in filters:
        for column, _ in filter.makes:
            if column in owners:
                raise ConfigError(
                    f"filters {owners[column]!r} and {filter.name!r} both make {column!r}; give one a `name:`."
                )
            owners[column] = filter.name
    return owners


def _check_first_part(parts: Sequence[Part], filters: Sequence[Filter]) -> None:
    """Raise PoolError at once when the first part that can be read lacks a column that a filter needs."""
    for part in parts:
        try:
            columns = list_columns(part)
        except PoolError:
            continue
        for filter in filters:
            check_needs(filter, columns)
        return


def _sum_counts(results: Sequence[Mapping[str, Any]], name: str) -> Counts:
    return add_counts(Counts(**r["counts"][name]) for r in results if name in r["counts"])


def _warn_broken(stage: str, broken: Mapping[str, str]) -> None:
    for part, message in broken.items():
        log.warning("%s: part %s: %s", stage, part, message)


def run_select(start: Start, scores: str, name: str, steps: Sequence[Step], out: str) -> Manifest:
    """Write OUT/<name>.npy with the uids that pass the steps, and OUT/<name>.json as its manifest.

    No step keeps every scored row.  Raises StageError without scores, ConfigError for an unknown column.
    """
    scored = _require_scores(scores)
    wanted = Manifest(stage="select", config=as_mapping({"steps": steps}), parents={"scores": scored.identity})
    url, manifest_name = join(out, name + SUBSET_SUFFIX), f"{name}.json"

    def is_whole(done: Manifest) -> bool:
        return exists(url) and sha256_of_file(url) == done.facts["sha256"]

    if done := find_done(out, wanted, name=manifest_name, is_whole=is_whole):
        return done
    columns = find_columns(steps, _scalar_columns(scored))
    check_steps(steps, scored.facts["types"])
    owners = {c: scored.facts["columns"][c] for c in columns} or dict(scored.facts["columns"])
    schema = pa.schema([(UID, pa.string())] + [(c, _type_of(scored.facts["types"][c])) for c in columns])
    parts = [Part(part, None, None) for part in scored.facts["parts"]]
    table = open_table(start(), partial(_read_clean, scores, columns, owners), parts, schema)
    kept = select_rows(table, steps, num_rows=scored.counts[POOL].read)
    write_subset(url, np.unique(kept.uids))  # rows that share a uid are one entry; the shards stage finds them all
    facts = {"rows": len(kept.uids), "sha256": sha256_of_file(url), "thresholds": kept.thresholds}
    manifest = Manifest(stage="select", config=wanted.config, parents=wanted.parents, counts=kept.counts, facts=facts)
    write_manifest(out, manifest, name=manifest_name)
    return manifest


def _require_scores(scores: str) -> Manifest:
    found = read_manifest(scores)
    if found is None:
        raise StageError(f"{scores!r} holds no finished scores. Run `winnow score --pool POOL --out {scores}` first.")
    return found


def _scalar_columns(scored: Manifest) -> list[str]:
    return [column for column, kind in scored.facts["types"].items() if "list" not in kind]


def _type_of(name: str) -> pa.DataType:
    return {"int32": pa.int32(), "float": pa.float32(), "double": pa.float64(), "string": pa.string()}[name]


def _read_clean(scores: str, columns: Sequence[str], owners: Mapping[str, str], part: Part) -> Iterator[pa.RecordBatch]:
    yield from map(clean_batch, read_scores(scores, part, columns, dict(owners)))


def run_shards(start: Start, pool: str, subset: str, config: ShardConfig, out: str, *, quiet: bool = False) -> Manifest:
    """Write the subset's rows as webdataset shards into OUT.

    Raises PoolError when no kept row is in the pool's tars, or OUT holds tars of somebody else.
    """
    parts = list_parts(pool)
    num_uids = len(read_subset(subset))
    parents = {"pool": pool_identity(parts), "subset": sha256_of_file(subset)}
    wanted = Manifest(stage="shards", config=as_mapping(config), parents=parents)
    claim_folder(out, parts)
    if done := find_done(out, wanted, is_whole=lambda _: has_every_shard(out)):
        drop_plan(out)
        return done
    prepare_folder(out, wanted.identity)
    planned = run_each(start(), partial(plan_part, subset_url=subset, out=out), parts, what="plan", quiet=quiet)
    broken = {part.name: r["broken"] for part, r in zip(parts, planned, strict=True) if r["broken"]}
    _warn_broken("shards", broken)
    plans = plan_shards(parts, [r["lines"] for r in planned], config.rows_per_shard)
    if not plans:
        raise PoolError(f"none of the {num_uids:,} uids of {subset!r} has an image in pool {pool!r}.")
    work = partial(write_shard, out=out, keys=config.keys)
    written = run_each(start(), work, plans, what="shards", unit="shard", quiet=quiet)
    facts = finish_folder(out, [r["rows"] for r in written]) | {"broken": broken}
    counts = {"rows": add_counts(Counts(**r["counts"]) for r in planned)}
    facts["not_in_pool"] = max(0, num_uids - sum(r["found"] for r in planned))
    manifest = Manifest(stage="shards", config=wanted.config, parents=parents, counts=counts, facts=facts)
    sweep_temporaries(out)
    write_manifest(out, manifest)
    drop_plan(out)
    return manifest


def calibrate(scores: str, by: str, *, fraction: float | None, count: int | None) -> dict[str, Any]:
    """Return the exact threshold of a score column for a fraction of the pool or a count, and the rows it keeps.

    Streams over the stored scores without Spark.  Raises ConfigError for a column that cannot be cut, or an empty wish.
    """
    scored = _require_scores(scores)
    check_name(by, _scalar_columns(scored), kind="score column")
    top = Top(by=by, fraction=fraction, count=count)
    check_steps([Step(name="calibrate", top=top)], scored.facts["types"])
    num_pool = scored.counts[POOL].read
    wanted = top.count_wanted(num_pool=num_pool, num_input=num_pool)
    owners = {by: scored.facts["columns"][by]}
    bits = 32 if scored.facts["types"][by] == "float" else 64
    floating = np.float32 if bits == 32 else np.float64

    def read_keys() -> Iterator[np.ndarray]:
        for part in scored.facts["parts"]:
            for batch in _read_clean(scores, [by], owners, Part(part, None, None)):
                yield order_keys(batch.column(by).drop_null().to_numpy(zero_copy_only=False).astype(floating))

    def count_pass(prefix: int, depth: int) -> np.ndarray:
        counts = (count_radix(keys, prefix=prefix, depth=depth, bits=bits) for keys in read_keys())
        return sum(counts, np.zeros(1 << RADIX_BITS, np.int64))

    found = find_threshold(count_pass, lambda available: wanted, bits=bits)
    if found is None or found.num_above + found.num_taken < wanted:
        raise ConfigError(
            f"cannot keep {wanted:,} rows of a pool of {num_pool:,}: not that many have a {by!r}, or none."
        )
    kept = found.num_above + found.num_tied
    return {"by": by, "threshold": found.value, "wanted": wanted, "kept_at_or_above": kept, "pool": num_pool}
