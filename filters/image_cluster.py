"""The cluster of a stored image embedding, and whether it is one of the target clusters (DataComp's image_based).

Source: Gadre et al. 2023, arXiv:2304.14108, and baselines/apply_filter.py:81-108,183-190.  `winnow fit` makes the
centroids and the targets, or takes DataComp's own.  assign `dot` gives DataComp's clusters, `l2` the nearest centroid
(pipeline/nearest.py).  DataComp puts an embedding with NaN into cluster 0; here it has none, and is counted.
"""

from collections.abc import Mapping
from functools import partial

import numpy as np
import pyarrow as pa

from filters.vectors import explain_missing, read_vectors
from pipeline.clip_model import AUTO, pick_device
from pipeline.config import config
from pipeline.contract import Filter, Score, Scored
from pipeline.embeddings import NPY_SUFFIX, hash_embedding_set, read_embedding_set, read_npy
from pipeline.errors import ConfigError
from pipeline.nearest import Centroids, Rule, assign, find_targets, place_centroids, read_centroids
from pipeline.schemas import cluster_column, in_targets_column
from pipeline.storage import exists, sha256_of_file


@config
class Options:
    """Which clusters, of which embedding."""

    embedding: str
    """Column of image embeddings: a key of the pool's npz such as l14_img, or one that an earlier filter makes."""
    centroids: str
    """float32 (K, D): .npy, as `winnow fit` writes it, or DataComp's .pt."""
    targets: str
    """Ids of the target centroids: .npy of whole numbers, as `winnow fit` writes it.  Or some target embeddings, .npy
    or .pt, whose clusters each worker looks up; of a million that takes hours, and `winnow fit` does it once."""
    assign: Rule = "dot"
    """dot: the largest raw dot product, as DataComp.  l2: the nearest centroid, which k-means put the row to."""


def build(name: str, options: Options) -> Filter:
    """Return the filter, with the hashes of both files in its identity.  Raises ConfigError when one is not there."""
    for what in ("centroids", "targets"):
        place = getattr(options, what)
        if not exists(place):
            raise ConfigError(f"filter {name!r}: there are no {what} at {place!r}. `winnow fit` makes them.")
    hashes = _hash_files(options)
    return Filter(
        name=name,
        needs=(options.embedding,),
        makes=((cluster_column(name), pa.int32()), (in_targets_column(name), pa.bool_())),
        version=2,
        settings={"embedding": options.embedding, "assign": options.assign} | hashes,
        load=partial(load, options, hashes),
        vectors=(options.embedding,),
        runs_on_device=True,
        target_aware=True,
    )


def _hash_files(options: Options) -> dict[str, str]:
    return {"centroids": sha256_of_file(options.centroids), "targets": hash_embedding_set(options.targets)}


def load(options: Options, hashes: Mapping[str, str]) -> Score:
    """Return the scoring function with the centroids on its device.

    Raises ConfigError for centroids or targets that are none, or not those of the hashes.
    """
    centroids = place_centroids(read_centroids(options.centroids), options.assign, pick_device(AUTO))
    is_target_K = np.zeros(len(centroids.vector_KD), bool)
    is_target_K[_read_targets(options.targets, centroids)] = True
    now = _hash_files(options)
    for what in (what for what in hashes if now[what] != hashes[what]):
        raise ConfigError(f"{what} {getattr(options, what)!r} changed since this run began. Start it again.")
    return partial(score, options.embedding, centroids, is_target_K)


def _read_targets(url: str, centroids: Centroids) -> np.ndarray:
    """Return the ids in an .npy of whole numbers, or those of the embeddings in it."""
    found = read_npy(url) if url.endswith(NPY_SUFFIX) else None
    if found is None or found.dtype.kind not in "iu":
        return find_targets(read_embedding_set(url), centroids)[0]
    num_clusters = len(centroids.vector_KD)
    wrong = found[(found < 0) | (found >= num_clusters)] if found.ndim == 1 else found.reshape(-1)
    if len(wrong):
        raise ConfigError(
            f"targets {url!r} should be a row of ids in [0, {num_clusters:,}), and are {found.shape} with {wrong[0]}. "
            "Are they ids of other centroids?"
        )
    return found


def score(embedding: str, centroids: Centroids, is_target_K: np.ndarray, batch: pa.RecordBatch) -> Scored:
    """Return int32 (rows,) cluster ids and bool (rows,) whether they are targets; null where there is no embedding.

    Raises ConfigError when embeddings and centroids differ in length.
    """
    matrix_ND, usable_N = read_vectors(batch, embedding)
    id_N = np.zeros(batch.num_rows, np.int32)
    id_N[usable_N] = assign(matrix_ND[usable_N], centroids).id_N
    columns = (pa.array(id_N, mask=~usable_N), pa.array(is_target_K[id_N], mask=~usable_N))
    return Scored(columns, explain_missing(usable_N, embedding))
