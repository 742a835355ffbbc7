"""The kinds of fits: what each is told, what it makes of a pool's rows, and which filter reads that.

A fit sees rows of all parts at once and writes files; its filter then scores row by row.  To add one: a config class
with a `kind`, a function from rows to files, and a row in FIT_KINDS.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jobs.fit_source import Rows
from jobs.stages import warn_broken
from pipeline.clip_model import AUTO, pick_device
from pipeline.config import read_config
from pipeline.embeddings import read_embedding_set
from pipeline.errors import ConfigError, check_name
from pipeline.gather import gather_rows
from pipeline.kmeans import FitConfig, fit_centroids, gather_sample
from pipeline.manifest import Counts
from pipeline.nearest import find_targets, place_centroids, read_centroids
from pipeline.norm_sim_d import NormSimDConfig, fit_survivors, sum_moment
from pipeline.probe import ProbeConfig, draw_negatives, fit_probe, read_positives
from pipeline.schemas import CENTROIDS, PROBE, TABLE, TARGETS
from pipeline.semdedup import DedupConfig, fit_duplicates
from pipeline.storage import is_local

AnyFit = FitConfig | DedupConfig | NormSimDConfig | ProbeConfig
KIND, KMEANS = "kind", "kmeans"
ROWS, TARGET_ROWS, POSITIVES = "rows", "targets", "positives"
"""Accounts of the manifest: the pool's rows that were there to be fitted, target embeddings, positives."""
EPSILONS = (0.001, 0.01, 0.05, 0.1)
"""Of SemDeDup: the manifest tells how many rows each would drop."""


class Made(NamedTuple):
    """What a fit found."""

    files: Mapping[str, np.ndarray | Mapping[str, np.ndarray]]
    """Name -> content: an array for .npy, arrays by name for .npz."""
    counts: Mapping[str, Counts]
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class FitKind:
    """One kind of fit."""

    config: type[Any]
    make: Callable[[Callable[[], Rows], Any, str], Made]
    """(open_rows, config, OUT) -> what it found."""
    filter: str
    """The kind of filter that reads it."""
    options: tuple[str, ...]
    """Options of the filter that the fit decides."""
    files: Mapping[str, str]
    """Option of the filter -> file of the fit that it names."""
    version: int
    """Raised when the same rows may give other files: the fit is then made again (tests/filters/test_versions.py)."""


def read_fit(name: str, values: Any) -> AnyFit:
    """Return the fit that a recipe's `fit.NAME` describes; its `kind` is kmeans when not said.

    Raises ConfigError (did you mean) for an unknown kind or field.
    """
    kind = str(values.get(KIND, KMEANS)) if isinstance(values, Mapping) else KMEANS
    check_name(kind, FIT_KINDS, kind=f"kind of fit {name!r}")
    fit: AnyFit = read_config(FIT_KINDS[kind].config, values, where=f"recipe.fit.{name}")
    return fit


def find_kind(filter: str) -> FitKind:
    """Return the kind of fit that a kind of filter reads.  Raises ConfigError when it reads none."""
    readers = {kind.filter: kind for kind in FIT_KINDS.values()}
    if filter not in readers:
        raise ConfigError(f"filter {filter!r} reads no fit; those that do: {', '.join(readers)}.")
    return readers[filter]


def list_embeddings(config: AnyFit) -> list[str]:
    """Return the columns that a fit reads."""
    return config.list_columns() if isinstance(config, ProbeConfig) else [config.embedding]


def fit_kmeans(open_rows: Callable[[], Rows], config: FitConfig, out: str) -> Made:
    """Return centroids, trained or read, and the ids of those that are targets."""
    centroid_KD, counts, facts = _find_centroids(open_rows, config, out)
    files = {CENTROIDS: centroid_KD}
    facts |= {"clusters": len(centroid_KD), "dim": centroid_KD.shape[1]}
    if config.targets:
        centroids = place_centroids(centroid_KD, config.assign, pick_device(AUTO))
        ids, counts[TARGET_ROWS] = find_targets(read_embedding_set(config.targets, config.target_column), centroids)
        files[TARGETS] = ids
        facts |= {"target_clusters": len(ids)}
    return Made(files, counts, facts)


def _find_centroids(
    open_rows: Callable[[], Rows], config: FitConfig, out: str
) -> tuple[np.ndarray, dict[str, Counts], dict[str, Any]]:
    """Return the centroids, the accounts of the rows, and what is worth telling of the training."""
    if config.centroids:
        return read_centroids(config.centroids), {}, {}
    rows = open_rows()
    with gather_sample(rows.batches, config, folder=_scratch(out)) as (sample_ND, counts):
        warn_broken("fit", rows.broken)
        fit = fit_centroids(sample_ND, config)
    near = float(f"{fit.error / fit.rows:.5g}")  # its last digits depend on the number of threads
    facts = {"mean_squared_distance": near, "broken": dict(rows.broken)}
    return fit.centroid_KD, {**rows.counts, ROWS: counts}, facts


def fit_semdedup(open_rows: Callable[[], Rows], config: DedupConfig, out: str) -> Made:
    """Return the table of similarities, and the centroids."""
    rows = open_rows()
    with gather_rows(rows.batches, _scratch(out)) as gathered:
        warn_broken("fit", rows.broken)
        table, centroid_KD = fit_duplicates(gathered, config, _scratch(out))
    found = {str(eps): int((table["similarity"] > 1 - eps).sum()) for eps in EPSILONS}
    facts = {"clusters": len(centroid_KD), "dim": centroid_KD.shape[1], "duplicates": found}
    counts = {**rows.counts, ROWS: gathered.counts}
    return Made({TABLE: table, CENTROIDS: centroid_KD}, counts, facts | {"broken": dict(rows.broken)})


def fit_norm_sim_d(open_rows: Callable[[], Rows], config: NormSimDConfig, out: str) -> Made:
    """Return the table of rounds."""
    rows = open_rows()
    first_DD = None
    if config.first == "pool":
        total_DD, number = sum_moment(block_ND for _, block_ND in rows.pool())
        first_DD = total_DD / max(number, 1)
    with gather_rows(rows.batches, _scratch(out)) as gathered:
        warn_broken("fit", rows.broken)
        wanted = config.count_wanted(gathered.counts.read)
        table = fit_survivors(gathered, wanted, config.rounds, first_DD)
    facts = {"wanted": wanted, "kept": int(table["kept"].sum()), "rounds": int(table["round"].max(initial=1)) - 1}
    return Made({TABLE: table}, {**rows.counts, ROWS: gathered.counts}, facts | {"broken": dict(rows.broken)})


def fit_linear_probe(open_rows: Callable[[], Rows], config: ProbeConfig, out: str) -> Made:
    """Return the weights."""
    rows = open_rows()
    negative_QD, counts = draw_negatives(rows.batches, config)
    warn_broken("fit", rows.broken)
    positive_PD, of_positives = read_positives(config)
    probe, facts = fit_probe(positive_PD, negative_QD, config)
    facts |= {"positives": len(positive_PD), "negatives": len(negative_QD)}
    accounts = {**rows.counts, ROWS: counts, POSITIVES: of_positives}
    return Made({PROBE: probe._asdict()}, accounts, {**facts, "broken": dict(rows.broken)})


def _scratch(out: str) -> str | None:
    """Return the folder for files without a name: OUT, or the system's where that is remote."""
    return out if is_local(out) else None


FIT_KINDS: Mapping[str, FitKind] = {
    KMEANS: FitKind(
        config=FitConfig,
        make=fit_kmeans,
        filter="image_cluster",
        options=("embedding", "assign"),
        files={"centroids": CENTROIDS, "targets": TARGETS},
        version=1,
    ),
    "semdedup": FitKind(
        config=DedupConfig, make=fit_semdedup, filter="semdedup", options=(), files={"table": TABLE}, version=1
    ),
    "norm_sim_d": FitKind(
        config=NormSimDConfig, make=fit_norm_sim_d, filter="norm_sim_d", options=(), files={"table": TABLE}, version=1
    ),
    "probe": FitKind(
        config=ProbeConfig,
        make=fit_linear_probe,
        filter="probe",
        options=("embedding",),
        files={"weights": PROBE},
        version=1,
    ),
}
