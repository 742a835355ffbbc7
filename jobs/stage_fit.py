"""The fit stage: stored embeddings -> OUT/centroids.npy, and OUT/targets.npy where the config names target embeddings.

The one stage that looks at all rows before any can be judged; image_cluster then judges row by row.  It runs in one
process, on the GPUs that it sees.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from jobs.stage_select import name_versions, run_select
from jobs.stages import Start, warn_broken
from pipeline.clip_model import AUTO, pick_device
from pipeline.config import as_mapping
from pipeline.embeddings import hash_embedding_set, read_embedding_set, to_matrix
from pipeline.errors import ConfigError, PoolError, StageError
from pipeline.filesystem import StorageError
from pipeline.kmeans import FitConfig, fit_centroids, gather_sample
from pipeline.ledger import FileRecord, Ledger, digest_file, identity_of, read_ledger, write_ledger
from pipeline.lock import hold_lock
from pipeline.manifest import Counts, Manifest, find_done, hash_json, read_manifest, write_manifest
from pipeline.nearest import find_targets, place_centroids, read_centroids
from pipeline.pool import Part, list_parts
from pipeline.schemas import CENTROIDS, MANIFEST, TARGETS, UID
from pipeline.select_table import ScoreTable
from pipeline.storage import (
    exists,
    expand,
    fingerprint_all,
    is_local,
    join,
    remove,
    sha256_of_file,
    sweep_temporaries,
    write_atomic,
)
from pipeline.stored import read_stored
from pipeline.subset import SUBSET_SUFFIX, count_in_subset, read_subset
from pipeline.uid import parse_uids

log = logging.getLogger("winnow")
PLACES = ("rows", "targets", "target_column", "centroids")
"""Fields of a FitConfig that lead to bytes; the bytes decide the result, and stand in the manifest as parents."""
ROWS, TARGET_ROWS = "rows", "targets"
"""Accounts of the manifest: the rows that were there to be clustered, and the target embeddings."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows that k-means may see."""

    batches: Iterable[tuple[np.ndarray, np.ndarray]]
    """Uids and float (rows, D), NaN where a row has no embedding; in the order of the pool."""
    counts: Mapping[str, Counts] = field(default_factory=dict)
    """Accounts of the steps that left these rows of the pool, if there were any."""
    broken: Mapping[str, str] = field(default_factory=dict)
    """Parts that have no rows here, or only the first of them, and why; whole when the batches are read."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where embeddings are, and what decides them."""

    batches: Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]]
    """As those of Rows."""
    parents: Mapping[str, str]
    broken: Mapping[str, str]
    """As that of Rows."""
    ledger: Ledger = field(default_factory=dict)
    """Files of the pool that were hashed."""


def check_files(name: str, config: FitConfig) -> None:
    """Raise ConfigError when the fit `name` reads files that are not there: hours of scoring may come before it."""
    for field_name in ("targets", "centroids"):
        if place := getattr(config, field_name):
            try:
                expand(place)
            except PoolError:
                raise ConfigError(
                    f"fit {name!r}: no {field_name} at {place!r}. Say where: fit.{name}.{field_name}=PATH."
                ) from None


def run_fit(
    start: Start,
    config: FitConfig,
    out: str,
    *,
    pool: str | None = None,
    scores: str | None = None,
    fresh: bool = False,
) -> Manifest:
    """Fit the embeddings of a pool, or of its scores, into OUT; `config.rows` first selects rows into OUT/rows.npy.

    No pool is needed for scores, nor for centroids that are there already.  Parts that cannot be read are left out.
    Raises ConfigError without what the config needs, StageError without finished scores, and as run_select and
    fit_rows do.
    """
    scored = read_manifest(scores) if scores else None
    if scores and not scored:
        raise StageError(f"{scores!r} holds no finished scores. Run `winnow score --pool POOL --out {scores}` first.")
    if config.centroids:
        return fit_rows(lambda: Rows(()), config, out, parents={}, fresh=fresh)
    source = _open_scores(scores, scored, config.embedding) if scores and scored else None
    source = source or _open_pool(pool, config.embedding, read_ledger(out), read_ledger(scores) if scores else {})
    parents, subset, counts = dict(source.parents), None, {}
    if config.rows:
        if not scores:
            raise ConfigError("a fit's `rows` are rules over scores: say where these are (--scores).")
        selected = run_select(start, scores, ROWS, config.rows, out, fresh=fresh)
        subset, parents = join(out, ROWS + SUBSET_SUFFIX), {**parents, ROWS: selected.facts["sha256"]}
        counts = {f"{ROWS}/{step}": found for step, found in selected.counts.items()}

    def open_rows() -> Rows:
        batches = source.batches()
        return Rows(_keep_subset(batches, read_subset(subset)) if subset else batches, counts, source.broken)

    manifest = fit_rows(open_rows, config, out, parents=parents, fresh=fresh)
    if source.ledger and source.ledger != read_ledger(out):
        write_ledger(out, source.ledger)
    return manifest


def _open_scores(scores: str, scored: Manifest, column: str) -> Source | None:
    """Return the scored parts' embeddings, or None when no filter makes the column."""
    owner = scored.facts["columns"].get(column)
    if owner is None:
        return None
    broken = {name: why for name, why in scored.facts["broken"].items() if name not in scored.facts["parts"]}
    batches = partial(read_scored, scores, owner, scored.facts["parts"], column)
    return Source(batches, name_versions(scores, scored, [owner]), broken)


def read_scored(scores: str, owner: str, parts: Sequence[str], column: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield uids and embeddings that the filter `owner` made, of the named parts in order, batch by batch."""
    table = ScoreTable({owner: join(scores, owner)}, {column: owner})
    for part in table.measure(parts):
        for batch in table.read(part.name, [column], uids=True):
            yield parse_uids(batch.column(UID)), to_matrix(batch.column(column))


def _open_pool(pool: str | None, column: str, *known: Ledger) -> Source:
    """Return the embeddings in the pool's own files.  Raises ConfigError when there is no pool."""
    if not pool:
        raise ConfigError(f"to cluster {column!r}, say where its rows are (--pool), or name `centroids`.")
    parts = list_parts(pool)
    broken: dict[str, str] = {}
    identity, ledger = _digest_pool(parts, known)
    return Source(partial(read_pool, parts, column, broken), {"pool": identity}, broken, ledger)


def _digest_pool(parts: Sequence[Part], known: Sequence[Ledger]) -> tuple[str, Ledger]:
    """Return a hash of the bytes of all tables and npz files, and what to note of them, so as to read them once only.

    On an object store one listing says which version each file has.
    """
    files = {part.name: [url for url in (part.table, part.arrays) if url] for part in parts}
    if not all(is_local(url) for urls in files.values() for url in urls):
        return hash_json(fingerprint_all([url for urls in files.values() for url in urls])), {}

    def digest(name: str) -> list[FileRecord]:
        noted = [record for ledger in known for record in ledger.get(name, ())]
        return [digest_file(url, noted) for url in files[name]]

    with ThreadPoolExecutor() as readers:
        ledger = dict(zip(files, readers.map(digest, files), strict=True))
    return hash_json([[name, identity_of(records)] for name, records in ledger.items()]), ledger


def read_pool(parts: Sequence[Part], column: str, broken: dict[str, str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield uids and embeddings of a pool, batch by batch; `broken` takes up which parts cannot be read, and why.

    Raises PoolError when that is true of all, StorageError when a store refuses.
    """
    for part in parts:
        try:
            for batch in read_stored(part, column):
                yield parse_uids(batch.column(UID)), to_matrix(batch.column(column))
        except StorageError:
            raise
        except PoolError as error:
            broken[part.name] = str(error)
    if len(broken) == len(parts):
        first = next(iter(broken.values()))
        raise PoolError(f"none of the {len(parts)} parts can be clustered; the first says: {first}")


def _keep_subset(
    batches: Iterable[tuple[np.ndarray, np.ndarray]], subset: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for uids, block_ND in batches:
        inside_N = count_in_subset(uids, subset) > 0
        yield uids[inside_N], block_ND[inside_N]


def fit_rows(
    open_rows: Callable[[], Rows], config: FitConfig, out: str, *, parents: Mapping[str, str], fresh: bool = False
) -> Manifest:
    """Write OUT/centroids.npy (float32 (K, D)), OUT/targets.npy (int32, ascending ids) and OUT/manifest.json.

    `open_rows` is called only when centroids are to be trained; `parents` name what it reads and by which rules.
    Raises ConfigError for fewer rows than clusters or files that hold something else, StageError when another driver
    works on OUT.
    """
    wanted = _describe(config, parents)
    with hold_lock(out, "fit") as check_lock:
        if fresh:
            log.warning("fit: starting over in %s", out)
            remove(join(out, MANIFEST))
        done = find_done(out, wanted, is_whole=lambda made: _is_whole(out, made))
        if done:
            return done
        sweep_temporaries(out)
        centroid_KD, counts, facts = _make_centroids(open_rows, config, out)
        facts |= {"clusters": len(centroid_KD), "dim": centroid_KD.shape[1], "files": {}}
        remove(join(out, TARGETS))  # those of other centroids must not stand beside these
        facts["files"][CENTROIDS] = _save(join(out, CENTROIDS), centroid_KD)
        if config.targets:
            centroids = place_centroids(centroid_KD, config.assign, pick_device(AUTO))
            ids, counts[TARGET_ROWS] = find_targets(read_embedding_set(config.targets, config.target_column), centroids)
            facts |= {"target_clusters": len(ids)}
            facts["files"][TARGETS] = _save(join(out, TARGETS), ids)
        manifest = replace(wanted, counts=counts, facts=facts)
        check_lock()
        write_manifest(out, manifest)
    return manifest


def _describe(config: FitConfig, parents: Mapping[str, str]) -> Manifest:
    """Return the manifest that is wanted.  Raises ConfigError when a file is not there."""
    choices = {name: value for name, value in as_mapping(config).items() if name not in PLACES}
    if config.centroids:
        if not exists(config.centroids):
            raise ConfigError(f"fit: there are no centroids at {config.centroids!r}.")
        choices, parents = {"assign": config.assign}, {"centroids": sha256_of_file(config.centroids)}
    if config.targets:
        parents = {**parents, "targets": hash_embedding_set(config.targets, config.target_column)}
    return Manifest(stage="fit", config=choices, parents=parents)


def _is_whole(out: str, made: Manifest) -> bool:
    files: Mapping[str, str] = made.facts["files"]
    return all(exists(join(out, name)) and sha256_of_file(join(out, name)) == digest for name, digest in files.items())


def _make_centroids(
    open_rows: Callable[[], Rows], config: FitConfig, out: str
) -> tuple[np.ndarray, dict[str, Counts], dict[str, Any]]:
    """Return the centroids, trained or read; the accounts of the rows; and what is worth telling of the training."""
    if config.centroids:
        return read_centroids(config.centroids), {}, {}
    rows = open_rows()
    with gather_sample(rows.batches, config, folder=out if is_local(out) else None) as (sample_ND, counts):
        warn_broken("fit", rows.broken)
        fit = fit_centroids(sample_ND, config)
    near = float(f"{fit.error / fit.rows:.5g}")  # its last digits depend on the number of threads
    facts = {"mean_squared_distance": near, "broken": dict(rows.broken)}
    return fit.centroid_KD, {**rows.counts, ROWS: counts}, facts


def _save(url: str, array: np.ndarray) -> str:
    """Write an .npy file and return its sha256."""
    with write_atomic(url) as file:
        np.save(file, array, allow_pickle=False)
    return sha256_of_file(url)
