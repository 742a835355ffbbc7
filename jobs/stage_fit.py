"""The fit stage: stored embeddings -> OUT/centroids.npy, and OUT/targets.npy where the config names target embeddings.

The one stage that looks at all rows before any can be judged; image_cluster then judges row by row.  It runs in one
process, on the GPUs that it sees.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from jobs.stage_select import run_select
from jobs.stages import Start
from pipeline.clip_model import AUTO, pick_device
from pipeline.config import as_mapping
from pipeline.embeddings import hash_embedding_set, read_embedding_set, to_matrix
from pipeline.errors import ConfigError, PoolError, StageError
from pipeline.kmeans import FitConfig, fit_centroids, gather_sample
from pipeline.lock import hold_lock
from pipeline.manifest import Counts, Manifest, find_done, hash_json, read_manifest, write_manifest
from pipeline.nearest import find_targets, place_centroids, read_centroids
from pipeline.pool import Part, list_parts, pool_identity
from pipeline.schemas import CENTROIDS, MANIFEST, TARGETS, UID
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

    No pool is needed for centroids that are there already.  Raises ConfigError without what the config needs,
    StageError without finished scores, and as run_select and fit_rows do.
    """
    scored = read_manifest(scores) if scores else None
    if scores and not scored:
        raise StageError(f"{scores!r} holds no finished scores. Run `winnow score --pool POOL --out {scores}` first.")
    if config.centroids:
        return fit_rows(lambda: Rows(()), config, out, parents={}, fresh=fresh)
    if not pool:
        raise ConfigError(f"to cluster {config.embedding!r}, say where its rows are (--pool), or name `centroids`.")
    parts = list_parts(pool)
    parents, subset, counts = name_parents(parts, config.embedding, scored), None, {}
    if config.rows:
        if not scores:
            raise ConfigError("a fit's `rows` are rules over scores: say where these are (--scores).")
        selected = run_select(start, scores, ROWS, config.rows, out, fresh=fresh)
        subset, parents = join(out, ROWS + SUBSET_SUFFIX), {**parents, ROWS: selected.facts["sha256"]}
        counts = {f"{ROWS}/{step}": found for step, found in selected.counts.items()}
    owner = scored.facts["columns"].get(config.embedding) if scored else None
    folder = join(scores or "", owner) if owner else None

    def open_rows() -> Rows:
        batches = read_rows(parts, config.embedding, folder)
        return Rows(_keep_subset(batches, read_subset(subset)) if subset else batches, counts)

    return fit_rows(open_rows, config, out, parents=parents, fresh=fresh)


def read_rows(parts: Sequence[Part], column: str, folder: str | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield uids and embeddings of a pool, batch by batch: a score column in FOLDER, else of the parts themselves."""
    for part in parts:
        for batch in read_stored(part, column, folder):
            yield parse_uids(batch.column(UID)), to_matrix(batch.column(column))


def _keep_subset(
    batches: Iterable[tuple[np.ndarray, np.ndarray]], subset: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for uids, block_ND in batches:
        inside_N = count_in_subset(uids, subset) > 0
        yield uids[inside_N], block_ND[inside_N]


def name_parents(parts: Sequence[Part], column: str, scored: Manifest | None) -> dict[str, str]:
    """Return what decides the embeddings: the filter that made them (of `scored`) and its rows, or the pool's files.

    Other filters of the same scores do not matter: image_cluster itself will be one of them.
    """
    owner = scored.facts["columns"].get(column) if scored else None
    if scored and owner:
        made = [scored.parents, scored.config["filters"][owner], asdict(scored.counts[owner])]
        return {f"scores of {owner}": hash_json(made)}
    arrays = fingerprint_all([part.arrays for part in parts if part.arrays])
    return {"pool": hash_json([pool_identity(parts), arrays])}


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
        for name in (CENTROIDS, TARGETS):
            remove(join(out, name))
        sweep_temporaries(out)
        centroid_KD, counts, facts = _make_centroids(open_rows, config, out)
        facts |= {"clusters": len(centroid_KD), "dim": centroid_KD.shape[1], "files": {}}
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
        fit = fit_centroids(sample_ND, config)
    near = float(f"{fit.error / counts.kept:.5g}")  # its last digits depend on the number of threads
    return fit.centroid_KD, {**rows.counts, ROWS: counts}, {"mean_squared_distance": near}


def _save(url: str, array: np.ndarray) -> str:
    """Write an .npy file and return its sha256."""
    with write_atomic(url) as file:
        np.save(file, array, allow_pickle=False)
    return sha256_of_file(url)
