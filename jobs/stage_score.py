"""The score stage: pool -> SCORES/<filter>/<part>.parquet, one Spark task a part; and the retry of failed rows."""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from filters import build_filter
from jobs.stages import Start, warn_broken
from pipeline.config import as_mapping
from pipeline.contract import Filter, check_needs
from pipeline.errors import ConfigError, PoolError, StageError, check_name
from pipeline.filesystem import find_place
from pipeline.ledger import Ledger, Unit, find_new, identity_of, read_ledger, write_ledger
from pipeline.lock import hold_lock
from pipeline.manifest import Counts, Manifest, add_counts, find_done, hash_json, read_manifest, write_manifest
from pipeline.npz import list_arrays
from pipeline.pool import Part, count_rows, list_columns, list_parts
from pipeline.retry import retry_part
from pipeline.schemas import FAILURES_FOLDER, IMAGE, LEDGER, MANIFEST, PARQUET_SUFFIX, POOL, REQUEST, SPANS_FOLDER
from pipeline.score import raise_if_all_broken, score_part
from pipeline.spark import run_each
from pipeline.storage import (
    exists,
    is_local,
    join,
    list_sizes,
    read_bytes,
    remove,
    sweep_temporaries,
    write_bytes,
)
from pipeline.stored import find_array_readers, find_makers
from pipeline.target_aware import TARGET_AWARE, list_target_aware

log = logging.getLogger("winnow")
FILE_OPTIONS = frozenset({"model", "centroids", "targets", "detector", "table", "weights"})
"""Options of filters that may name a file."""
NO_SCORES = "{!r} holds no finished scores to retry. `winnow score` goes on where it stopped."


def run_score(
    start: Start,
    pool: str,
    entries: Sequence[Mapping[str, Any]],
    out: str,
    *,
    fresh: bool = False,
    tasks_per_gpu: int = 1,
    quiet: bool = False,
) -> Manifest:
    """Score every part of a pool with the recipe's filters into OUT/<filter>/<part>.parquet.

    `fresh` deletes what these filters made in OUT before.  Raises ConfigError for no filter, an unknown one or two of
    one name, PoolError when no part can be scored, StageError when another driver works on OUT.
    """
    if not entries:
        raise ConfigError(
            "the recipe scores nothing: its `score` list is empty. `winnow filters` lists what it can hold."
        )
    parts, filters = list_parts(pool), [build_filter(entry) for entry in entries]
    owners = _own_columns(filters)
    _check_first_part(parts, filters)
    _keep_off_the_pool(out, parts, filters)
    with hold_lock(out, "score") as check_lock:
        if fresh:
            discard_scores(out, [f.name for f in filters])
        known = read_ledger(out)
        wanted = _name_inputs(filters, parts, known)
        if more := _find_more(out, wanted):
            return more
        done = find_done(out, wanted, is_whole=partial(_has_every_score, out))
        _write_request(out, pool, entries, parts)
        if done:
            return done
        _sweep(out, filters)
        units = [Unit(part, tuple(known.get(part.name, ()))) for part in parts]
        work = partial(score_part, filters=filters, out=out)
        sizes = [count_rows(part) for part in parts] if is_local(pool) else None
        each = partial(run_each, what="score", sizes=sizes, unit="row", quiet=quiet)
        results = each(start(), work, units, tasks_per_gpu=_share_gpus(filters, tasks_per_gpu))
        raise_if_all_broken(results)
        _say_why(results)
        write_ledger(out, {part.name: r["inputs"] for part, r in zip(parts, results, strict=True) if r["inputs"]})
        manifest = _finish(wanted, owners, filters, parts, results, out)
        _sweep(out, filters)
        check_lock()
        write_manifest(out, manifest)
    return manifest


def _keep_off_the_pool(out: str, parts: Sequence[Part], filters: Sequence[Filter]) -> None:
    """Raise ConfigError when scores would be written over files of the pool."""
    ours = {find_place(join(out, name)) for name in (FAILURES_FOLDER, SPANS_FOLDER, *(f.name for f in filters))}
    for url in (url for part in parts for url in (part.tar, part.table) if url):
        if find_place(url).rpartition("/")[0] in ours:
            raise ConfigError(f"{url!r} lies where scores would be written. Name another --out, or filter `name:`.")


def _share_gpus(filters: Sequence[Filter], tasks_per_gpu: int) -> int | None:
    """Return how many tasks share a GPU, or None when no filter runs on one."""
    return tasks_per_gpu if any(f.runs_on_device for f in filters) else None


def discard_scores(out: str, names: Sequence[str]) -> None:
    """Delete OUT's manifest, ledger, failures and spans, and the scores of the named filters and the manifest's."""
    made = read_manifest(out)
    if made and made.stage != "score":
        raise StageError(f"{out!r} holds the output of {made.stage!r}, so --fresh deletes nothing there.")
    folders = {FAILURES_FOLDER, SPANS_FOLDER, *names, *(made.config["filters"] if made else ())}
    log.warning("score: starting over, deleting %s in %s", ", ".join(sorted(folders)), out)
    for name in [MANIFEST, LEDGER, REQUEST, *sorted(folders)]:
        remove(join(out, name))


def _name_inputs(filters: Sequence[Filter], parts: Sequence[Part], known: Mapping[str, Any]) -> Manifest:
    """Return the manifest that is wanted; its pool is unknown when any file is not the one noted in the ledger."""
    new = _find_new(parts, filters, known)
    pool = f"unknown until read: {len(new)} of {len(parts)} parts are new or touched"
    if not new:
        pool = _pool_identity(parts, [{"inputs": known[part.name]} for part in parts])
    return Manifest(stage="score", config=_describe_filters(filters), parents={"pool": pool})


def _find_new(parts: Sequence[Part], filters: Sequence[Filter], known: Ledger) -> list[str]:
    images, arrays = any(IMAGE in f.needs for f in filters), bool(find_array_readers(filters))
    return find_new(parts, known, images=images, arrays=arrays)


def _find_more(out: str, wanted: Manifest) -> Manifest | None:
    """Return the finished manifest of these filters and others on the same pool, if there is one: nothing is lost."""
    made = read_manifest(out)
    if made is None or made.stage != wanted.stage or made.parents != wanted.parents:
        return None
    asked, there = wanted.config["filters"].items(), made.config["filters"].items()
    return made if asked < there and _has_every_score(out, made) else None


def _describe_filters(filters: Sequence[Filter]) -> dict[str, Any]:
    """Return what decides the scores, but for the pool."""
    aware = list_target_aware(filters)
    return {
        "filters": {f.name: _describe_filter(f) | ({TARGET_AWARE: True} if f.name in aware else {}) for f in filters}
    }


def _describe_filter(filter: Filter) -> dict[str, Any]:
    makes = {column: str(kind) for column, kind in filter.makes}
    return {"version": filter.version, "makes": makes, **as_mapping(filter.settings)}


def _pool_identity(parts: Sequence[Part], results: Sequence[Mapping[str, Any]]) -> str:
    """Return a hash of the bytes of every file that was read."""
    return hash_json([[part.name, identity_of(r["inputs"])] for part, r in zip(parts, results, strict=True)])


def _write_request(out: str, pool: str, entries: Sequence[Mapping[str, Any]], parts: Sequence[Part]) -> None:
    """Note what was asked, for `winnow status` and `winnow retry`."""
    place = "::".join(str(Path(p).absolute()) if is_local(p) else p for p in pool.split("::"))
    placed = [{name: _place_option(name, value) for name, value in entry.items()} for entry in entries]
    asked = {"stage": "score", "pool": place, "entries": placed, "parts": [part.name for part in parts]}
    content, url = (json.dumps(asked, indent=1, ensure_ascii=False, default=str) + "\n").encode(), join(out, REQUEST)
    if not exists(url) or read_bytes(url) != content:
        write_bytes(url, content)


def _place_option(name: str, value: Any) -> Any:
    """Return a filter's option with the path in it, if it has one, absolute: a retry may start anywhere."""
    if name not in FILE_OPTIONS or not isinstance(value, str):
        return value
    if name != "model":
        return "::".join(_make_absolute(path) for path in value.split("::"))
    architecture, at, path = value.rpartition("@")
    return architecture + at + _make_absolute(path)


def _make_absolute(path: str) -> str:
    return str(Path(path).absolute()) if is_local(path) and exists(path) else path


def _sweep(out: str, filters: Sequence[Filter]) -> None:
    for name in [*(f.name for f in filters), FAILURES_FOLDER, SPANS_FOLDER]:
        sweep_temporaries(join(out, name))


def _finish(
    wanted: Manifest,
    owners: Mapping[str, str],
    filters: Sequence[Filter],
    parts: Sequence[Part],
    results: Sequence[Mapping[str, Any]],
    out: str,
) -> Manifest:
    """Return the manifest that was wanted, its pool and accounts known."""
    broken = {part.name: r["broken"] for part, r in zip(parts, results, strict=True) if r["broken"]}
    warn_broken("score", broken)
    scored = [part.name for part, r in zip(parts, results, strict=True) if r["counts"]]
    facts = {
        "columns": dict(owners),
        "types": {column: str(kind) for f in filters for column, kind in f.makes},
        "parts": scored,
        "broken": broken,
        "bytes": {f.name: _measure(out, f.name, scored) for f in filters},
    }
    counts = {name: _sum_counts(results, name) for name in (POOL, *(f.name for f in filters))}
    return replace(wanted, parents={"pool": _pool_identity(parts, results)}, counts=counts, facts=facts)


def _measure(out: str, name: str, parts: Sequence[str]) -> int:
    """Return the bytes of a filter's score files."""
    sizes = list_sizes(join(out, name))
    return sum(sizes.get(part + PARQUET_SUFFIX, 0) for part in parts)


def _has_every_score(out: str, done: Manifest) -> bool:
    """Return whether no part is left to be tried again, and the score files that a manifest speaks of are there."""
    if set(done.facts["broken"]) - set(done.facts["parts"]):
        return False
    expected = {part + PARQUET_SUFFIX for part in done.facts["parts"]}
    sizes = {name: list_sizes(join(out, name)) for name in (FAILURES_FOLDER, *done.config["filters"])}
    if not all(expected <= present.keys() for present in sizes.values()):
        return False
    return all(sum(sizes[name][file] for file in expected) == size for name, size in done.facts["bytes"].items())


def _say_why(results: Sequence[Mapping[str, Any]]) -> None:
    """Name what changed since earlier scores, once for all parts it touched."""
    changed: Counter[tuple[str, str]] = Counter()
    for result in results:
        for name, reasons in result["scored"].items():
            short = {r if r.startswith("filter.") else r.partition(" from ")[0] for r in reasons}
            changed.update((name, reason) for reason in short)
    for (name, reason), number in changed.items():
        log.warning("score: %s of %s parts by %s again: %s", number, len(results), name, reason)


def _own_columns(filters: Sequence[Filter]) -> dict[str, str]:
    owners: dict[str, str] = {}
    names = [filter.name for filter in filters]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"two filters are called {twice[0]!r}; give one a `name:`.")
    for filter in filters:
        for column, _ in filter.makes:
            if column in owners:
                raise ConfigError(
                    f"filters {owners[column]!r} and {filter.name!r} both make {column!r}; give one a `name:`."
                )
            owners[column] = filter.name
    return owners


def _check_first_part(parts: Sequence[Part], filters: Sequence[Filter]) -> None:
    """Raise PoolError at once when no part that can be read has every column that the filters need."""
    first: PoolError | None = None
    reads_arrays = bool(find_array_readers(filters))
    for part in parts:
        try:
            columns = list_columns(part) + (sorted(list_arrays(part.arrays)) if reads_arrays and part.arrays else [])
        except (PoolError, OSError):
            continue
        try:
            for filter in filters:
                check_needs(filter, columns)
                columns += [column for column, _ in filter.makes]
            return
        except PoolError as error:
            first = first or error
    if first:
        raise first


def _sum_counts(results: Sequence[Mapping[str, Any]], name: str) -> Counts:
    return add_counts(Counts(**r["counts"][name]) for r in results if name in r["counts"])


def run_retry(
    start: Start, out: str, reason: str, *, tasks_per_gpu: int = 1, quiet: bool = False
) -> tuple[Manifest, dict[str, int]]:
    """Score again only the rows of OUT that failed for `reason`; return the new manifest and {"tried", "mended"}.

    Raises StageError without finished scores or when the pool has changed since, ConfigError for a reason that no row
    failed for (did you mean).
    """
    if not exists(join(out, REQUEST)):
        raise StageError(NO_SCORES.format(out))
    asked = json.loads(read_bytes(join(out, REQUEST)))
    filters = [build_filter(entry) for entry in asked["entries"]]
    with hold_lock(out, "retry") as check_lock:
        made, known = read_manifest(out), read_ledger(out)
        if made is None:
            raise StageError(NO_SCORES.format(out))
        check_name(reason, {r for name, c in made.counts.items() if name != POOL for r in c.failed}, kind="reason")
        parts = _find_unchanged(made, asked["pool"], filters, known)
        session = start()
        remove(join(out, MANIFEST))  # until every part is mended, counts and files disagree
        work = partial(retry_part, filters=filters, out=out, reason=reason)
        units = [Unit(part, tuple(known.get(part.name, ()))) for part in parts]
        shared = _share_gpus(filters, tasks_per_gpu)
        results = run_each(session, work, units, what="retry", tasks_per_gpu=shared, quiet=quiet)
        broken = {part.name: r["broken"] for part, r in zip(parts, results, strict=True) if r["broken"]}
        warn_broken("retry", broken)
        counts = {POOL: made.counts[POOL]} | {f.name: _sum_counts(results, f.name) for f in filters}
        sizes = {f.name: _measure(out, f.name, made.facts["parts"]) for f in filters}
        manifest = replace(made, counts=counts, facts={**made.facts, "bytes": sizes})
        sums = {what: sum(r[what] for r in results) for what in ("tried", "mended")}
        makers = {maker for read in find_makers(filters).values() for maker in read.values()}
        is_read = any(counts[name] != made.counts[name] for name in makers)  # other filters read what has changed
        check_lock()
        if not is_read:
            write_manifest(out, manifest)
    if is_read:
        manifest = run_score(start, asked["pool"], asked["entries"], out, tasks_per_gpu=tasks_per_gpu, quiet=quiet)
    return manifest, sums


def _find_unchanged(made: Manifest, pool: str, filters: Sequence[Filter], known: Ledger) -> list[Part]:
    """Return the parts that were scored.  Raises StageError when they or the filters are not what they were."""
    names = set(made.facts["parts"])
    parts = [part for part in list_parts(pool) if part.name in names]
    same = _describe_filters(filters) == made.config
    if not same or len(parts) != len(names) or _find_new(parts, filters, known):
        raise StageError(f"{pool!r} or a filter is not what the scores were made of. Run `winnow score`, then retry.")
    return parts
