"""The fit stage: stored embeddings of a whole pool -> OUT/centroids.npy, table.npy or probe.npz, as its kind says.

The one stage that looks at all rows before any can be judged; a filter then judges row by row by what it found.  It
runs in one process, on the GPUs that it sees.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from jobs.fit_kinds import FIT_KINDS, KIND, KMEANS, ROWS, TARGET_ROWS, AnyFit, Made, fit_kmeans, list_embeddings
from jobs.fit_source import Rows, keep_subset, open_pool, open_scores
from jobs.stage_select import run_select
from jobs.stages import Start
from pipeline.config import as_mapping
from pipeline.embeddings import hash_embedding_set
from pipeline.errors import ConfigError, PoolError, StageError
from pipeline.kmeans import FitConfig
from pipeline.ledger import read_ledger, write_ledger
from pipeline.lock import hold_lock
from pipeline.manifest import Manifest, find_done, hash_json, read_manifest, write_manifest
from pipeline.norm_sim_d import NormSimDConfig
from pipeline.probe import ProbeConfig
from pipeline.schemas import CENTROIDS, MANIFEST, POOL
from pipeline.storage import exists, expand, join, remove, sha256_of_file, sweep_temporaries, write_atomic
from pipeline.subset import SUBSET_SUFFIX, read_subset

log = logging.getLogger("winnow")
INPUTS = ("targets", "centroids", "positives")
"""Fields of a fit's config that name files of embeddings."""
PLACES = ("rows", "target_column", *INPUTS)
"""Fields that lead to bytes; the bytes decide the result, and stand in the manifest as parents."""
SHARES = ("fraction", "count")
"""Fields of which the manifest has the number of rows that they came to."""


def list_inputs(config: AnyFit) -> dict[str, str]:
    """Return field -> place of the embeddings that a fit reads beside the pool."""
    return {name: place for name in INPUTS if (place := getattr(config, name, None))}


def check_files(name: str, config: AnyFit) -> None:
    """Raise ConfigError when the fit `name` reads files that are not there: hours of scoring may come before it."""
    for field_name, place in list_inputs(config).items():
        try:
            expand(place)
        except PoolError:
            raise ConfigError(
                f"fit {name!r}: no {field_name} at {place!r}. Say where: fit.{name}.{field_name}=PATH."
            ) from None


def warn_if_other(name: str, config: AnyFit, made: Manifest) -> None:
    """Log where the fit that is there was made by other choices than the recipe's; inputs are not looked at."""
    wanted = {option: value for option, value in _list_choices(config).items() if option not in SHARES}
    for option in (option for option in wanted if made.config.get(option) != wanted[option]):
        log.warning(
            "fit %s was made with %s %r, and the recipe says %r: run `winnow fit` again, unless that is meant.",
            *(name, option, made.config.get(option), wanted[option]),
        )


def run_fit(
    start: Start,
    config: AnyFit,
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
    if isinstance(config, FitConfig) and config.centroids:
        return fit_rows(lambda: Rows(()), config, out, parents={}, fresh=fresh)
    if isinstance(config, NormSimDConfig) and scored:  # so that its share is of the rows that `top` takes shares of
        config = replace(config, fraction=None, count=config.count_wanted(scored.counts[POOL].read))
    columns = list_embeddings(config)
    source = open_scores(scores, scored, columns) if scores and scored else None
    source = source or open_pool(pool, columns, read_ledger(out), read_ledger(scores) if scores else {})
    parents, subset, counts = dict(source.parents), None, {}
    if config.rows:
        if not scores:
            raise ConfigError("a fit's `rows` are rules over scores: say where these are (--scores).")
        selected = run_select(start, scores, ROWS, config.rows, out, fresh=fresh)
        subset, parents = join(out, ROWS + SUBSET_SUFFIX), {**parents, ROWS: selected.facts["sha256"]}
        counts = {f"{ROWS}/{step}": found for step, found in selected.counts.items()}

    def open_rows() -> Rows:
        batches = source.batches()
        batches = keep_subset(batches, read_subset(subset)) if subset else batches
        return Rows(batches, counts, source.broken, source.batches)

    manifest = fit_rows(open_rows, config, out, parents=parents, fresh=fresh)
    if source.ledger and source.ledger != read_ledger(out):
        write_ledger(out, source.ledger)
    return manifest


def fit_rows(
    open_rows: Callable[[], Rows], config: AnyFit, out: str, *, parents: Mapping[str, str], fresh: bool = False
) -> Manifest:
    """Write what the kind of fit makes (jobs/fit_kinds.py) into OUT, and OUT/manifest.json last.

    `open_rows` is called only when rows are needed; `parents` name what it reads and by which rules.
    Raises ConfigError for too few rows or files that hold something else, StageError when another driver works on OUT.
    """
    wanted = _describe(config, parents)
    with hold_lock(out, "fit") as check_lock:
        if fresh:
            log.warning("fit: starting over in %s", out)
            remove(join(out, MANIFEST))
        before = read_manifest(out)
        done = find_done(out, wanted, is_whole=lambda made: _is_whole(out, made))
        if done:
            return done
        sweep_temporaries(out)
        made = _find_other_targets(before, wanted, config, out) or FIT_KINDS[config.kind].make(open_rows, config, out)
        for name in {name for kind in FIT_KINDS.values() for name in kind.files.values()} - made.files.keys():
            remove(join(out, name))  # that of another fit must not stand beside these
        files = {name: _save(join(out, name), content) for name, content in made.files.items()}
        manifest = replace(wanted, counts=made.counts, facts={**made.facts, "files": files})
        check_lock()
        write_manifest(out, manifest)
    return manifest


def _find_other_targets(before: Manifest | None, wanted: Manifest, config: AnyFit, out: str) -> Made | None:
    """Return what k-means makes when only its targets are not those of the fit that is there: centroids stay."""
    if before is None or not isinstance(config, FitConfig) or config.centroids or before.config != wanted.config:
        return None
    old, new = ({name: it for name, it in m.parents.items() if name != "targets"} for m in (before, wanted))
    url, digest = join(out, CENTROIDS), before.facts["files"].get(CENTROIDS)
    if old != new or not exists(url) or sha256_of_file(url) != digest:
        return None
    made = fit_kmeans(lambda: Rows(()), replace(config, centroids=url), out)
    rows = {name: counts for name, counts in before.counts.items() if name != TARGET_ROWS}
    facts = {name: before.facts[name] for name in ("mean_squared_distance", "broken")}
    return Made(made.files, {**rows, **made.counts}, {**facts, **made.facts})


def _describe(config: AnyFit, parents: Mapping[str, str]) -> Manifest:
    """Return the manifest that is wanted.  Raises ConfigError when a file is not there."""
    if isinstance(config, FitConfig) and config.centroids:
        if not exists(config.centroids):
            raise ConfigError(f"fit: there are no centroids at {config.centroids!r}.")
        parents = {"centroids": sha256_of_file(config.centroids)}
    if isinstance(config, FitConfig) and config.targets:
        parents = {**parents, "targets": hash_embedding_set(config.targets, config.target_column)}
    if isinstance(config, ProbeConfig):
        hashes = [hash_embedding_set(config.positives, column) for column in config.list_positive_columns()]
        parents = {**parents, "positives": hash_json(hashes)}
    return Manifest(stage="fit", config=_list_choices(config), parents=parents)


def _list_choices(config: AnyFit) -> dict[str, Any]:
    """Return what decides the result beside the inputs."""
    number = FIT_KINDS[config.kind].version
    version = {"version": number} if number > 1 else {}  # manifests of version 1 are older than versions
    if isinstance(config, FitConfig) and config.centroids:
        return {"assign": config.assign} | version
    choices = {name: value for name, value in as_mapping(config).items() if name not in PLACES}
    if config.kind == KMEANS:
        del choices[KIND]  # manifests of k-means are older than kinds
    return choices | version


def _is_whole(out: str, made: Manifest) -> bool:
    files: Mapping[str, str] = made.facts["files"]
    return all(exists(join(out, name)) and sha256_of_file(join(out, name)) == digest for name, digest in files.items())


def _save(url: str, content: np.ndarray | Mapping[str, np.ndarray]) -> str:
    """Write an .npy or .npz file and return its sha256."""
    with write_atomic(url) as file:
        if isinstance(content, Mapping):
            np.savez(file, **dict[str, Any](content))
        else:
            np.save(file, content, allow_pickle=False)
    return sha256_of_file(url)
