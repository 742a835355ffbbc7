"""The score stage: pool -> SCORES/<filter>/<part>.parquet, one Spark task a part."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from filters import build_filter
from jobs.stages import Start, warn_broken
from pipeline.config import as_mapping
from pipeline.contract import Filter, check_needs
from pipeline.errors import ConfigError, PoolError
from pipeline.manifest import Counts, Manifest, add_counts, find_done, write_manifest
from pipeline.pool import Part, count_rows, list_columns, list_parts, pool_identity
from pipeline.schemas import PARQUET_SUFFIX
from pipeline.score import POOL, raise_if_all_broken, score_part
from pipeline.spark import run_each
from pipeline.storage import join, list_folder, name_of, sweep_temporaries


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
    warn_broken("score", broken)
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
