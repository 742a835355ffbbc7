"""k-means over stored embeddings by faiss: the clusters of DataComp's image_based filter (Gadre et al. 2023, App. P).

The defaults are DataComp's (baselines/image_based_clustering.py:28-72): 100,000 clusters, 20 iterations, seed 0, no
subsampling inside faiss, float32 and L2.  Its sampling of rows (:98-103) draws with replacement in processes without a
seed; here a seeded hash of the uid says who is in, so a sample is reproducible, whatever the order of parts, and has no
row twice.  The same sample in the same order gives the same bytes on one machine, with one thread or several: faiss
updates each centroid in one thread, in the order of the rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import field
from typing import Any, Literal, NamedTuple

import numpy as np

from pipeline.config import config
from pipeline.embeddings import find_whole
from pipeline.errors import ConfigError
from pipeline.gather import Batches, spool
from pipeline.manifest import Counts
from pipeline.nearest import Rule, assign, place_centroids
from pipeline.schemas import REASON_MISSING_EMBEDDING
from pipeline.select import Step
from pipeline.select_draw import shuffle_uids
from pipeline.uid import UID_BITS, is_at_most

NOT_SAMPLED = "sample"
"""Account of rows that the sample leaves out."""


@config
class FitConfig:
    """How centroids are found, and which of them are targets."""

    kind: Literal["kmeans"] = "kmeans"
    embedding: str
    """Column that is clustered: a key of the pool's npz such as l14_img, or a score such as clip_img."""
    rows: list[Step] = field(default_factory=list)
    """Rules over scores that say which rows are clustered (DataComp: its caption filter); none: all rows."""
    clusters: int = 100_000
    """Number of centroids."""
    iterations: int = 20
    seed: int = 0
    """Of k-means, and of the sample."""
    sample: float = 1.0
    """Share of the rows that k-means sees, in (0, 1]; DataComp: 0.3 for its large pool, 0.03 for xlarge."""
    max_points_per_centroid: int = 10_000_000
    """faiss draws so many rows per centroid at most; DataComp's number means all."""
    levels: Literal[1, 2] = 1
    """1: k-means, as DataComp.  2: k-means into sqrt(clusters) parts, then in each of them; see fit_two_level."""
    assign: Rule = "dot"
    """How target embeddings find their clusters: dot as DataComp, or l2."""
    targets: str | None = None
    """Embeddings whose clusters are the targets (embeddings.py says what can be read); none: no targets are found."""
    target_column: str | None = None
    """Column or key of the target embeddings, where their files have several."""
    centroids: str | None = None
    """Centroids that are there already, .npy or DataComp's .pt: nothing is trained."""

    def __post_init__(self) -> None:
        for name in ("clusters", "iterations", "max_points_per_centroid"):
            if getattr(self, name) < 1:
                raise ConfigError(f"fit: {name} {getattr(self, name)} is below 1.")
        if not 0 < self.sample <= 1:
            raise ConfigError(f"fit: sample {self.sample} is not in (0, 1]; 1 takes every row.")
        if not 0 <= self.seed < 1 << 31:
            raise ConfigError(f"fit: seed {self.seed} is not in [0, 2^31), the seeds that faiss takes.")


class Fit(NamedTuple):
    """Centroids, and how near the embeddings are to them."""

    centroid_KD: np.ndarray
    """float32."""
    error: float
    """Squared distance to the nearest centroid, summed over `rows` embeddings, in the last iteration."""
    rows: int
    """Embeddings that faiss looked at; max_points_per_centroid may leave some out."""


def fit_centroids(sample_ND: np.ndarray, config: FitConfig, *, spherical: bool = False) -> Fit:
    """Return the centroids of a float16 or float32 matrix of finite numbers, on every GPU that faiss sees, else on CPU.

    float16 rows are widened 32,768 at a time, so beside the sample itself (which may be mapped from disk, and is read
    from end to end once per iteration) memory holds the centroids a few times and an id and a distance per row.
    `spherical` is for rows of length 1: nearest is the largest dot product, and centroids are brought to length 1.
    Raises ConfigError for fewer rows than clusters.
    """
    if len(sample_ND) < config.clusters:
        raise ConfigError(
            f"{config.clusters:,} clusters cannot be made of {len(sample_ND):,} embeddings: each needs one at least. "
            "Set fit's `clusters` lower or `sample` higher."
        )
    fit = fit_two_level if config.levels == 2 else _train
    return fit(sample_ND, config.clusters, config, spherical)


def _train(sample_ND: np.ndarray, num_clusters: int, config: FitConfig, spherical: bool) -> Fit:
    """Return what faiss finds: Lloyd's iterations from rows drawn by chance; an empty cluster splits a large one."""
    faiss, dim = _import_faiss(), sample_ND.shape[1]
    clustering = faiss.Clustering(dim, num_clusters)
    clustering.niter, clustering.seed = config.iterations, config.seed
    clustering.min_points_per_centroid = 1  # faiss warns below 39, and does the same
    clustering.max_points_per_centroid = config.max_points_per_centroid
    clustering.spherical = spherical
    index = faiss.IndexFlatIP(dim) if spherical else faiss.IndexFlatL2(dim)
    if faiss.get_num_gpus():
        index = faiss.index_cpu_to_all_gpus(index)
    if sample_ND.dtype == np.float16:
        codec = faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16)
        clustering.train_encoded(sample_ND.view(np.uint8), codec, index)
    else:
        clustering.train(sample_ND, index)
    stats = clustering.iteration_stats
    rows = min(len(sample_ND), num_clusters * config.max_points_per_centroid)
    found = stats.at(stats.size() - 1).obj if stats.size() else None  # none for as many rows as clusters
    error = 0.0 if found is None else 2 * (rows - found) if spherical else found  # |x - c|^2 = 2 - 2 x.c
    return Fit(faiss.vector_to_array(clustering.centroids).reshape(num_clusters, dim), float(error), rows)


def _import_faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise ConfigError("k-means needs faiss: pip install 'winnow[spark]', or name a fit's `centroids`.") from None
    return faiss


def fit_two_level(sample_ND: np.ndarray, num_clusters: int, config: FitConfig, spherical: bool = False) -> Fit:
    """Return centroids found in two steps: sqrt(clusters) of all rows, then of each part its share of the clusters.

    A part's share of them is its share of the rows, which are held in memory part by part.  The work falls by about
    sqrt(clusters) / 2, 158 times at 100,000.  A row is compared within its part only: of 200,000 crops of real images
    in 4,096 clusters, squared distances were 1.4 % larger than with one level, and 62 % of the rows had the same
    verdict about 500 targets, where another seed of one level gives 69 %.  The centroids' lengths differ more, so under
    `dot` more rows fall into target clusters (46 % and 37 %); under `l2` they do not.
    tests/bench/clusters.py measures it.
    """
    coarse = _train(sample_ND, round(num_clusters**0.5), config, spherical)
    centroids = place_centroids(coarse.centroid_KD, "l2")
    part_N = np.concatenate([assign(block, centroids).id_N for block in _blocks(sample_ND)])
    sizes = np.bincount(part_N, minlength=len(coarse.centroid_KD))
    order = np.argsort(part_N, kind="stable")
    edges = np.concatenate([[0], np.cumsum(sizes)])
    fits = [
        _train(sample_ND[order[edges[number] : edges[number + 1]]], int(share), config, spherical)
        for number, share in enumerate(apportion(sizes, num_clusters))
        if share
    ]
    centroid_KD = np.concatenate([fit.centroid_KD for fit in fits])
    return Fit(centroid_KD, sum(fit.error for fit in fits), sum(fit.rows for fit in fits))


def _blocks(sample_ND: np.ndarray, rows: int = 1 << 16) -> Iterator[np.ndarray]:
    return (sample_ND[start : start + rows] for start in range(0, len(sample_ND), rows))


def apportion(sizes: np.ndarray, total: int) -> np.ndarray:
    """Return int64 shares of `total` in proportion to `sizes`: at least 1 where there is any, never above the size.

    Largest remainders are served first.  `total` must lie between the number of sizes that are not 0 and their sum.
    """
    exact = sizes * (total / sizes.sum())
    shares: np.ndarray = np.minimum(np.maximum(np.floor(exact).astype(np.int64), sizes > 0), sizes)
    while missing := total - int(shares.sum()):
        step = 1 if missing > 0 else -1
        free = (shares < sizes) if missing > 0 else (shares > 1)
        order = np.argsort(np.where(free, (shares - exact) * step, np.inf), kind="stable")
        shares[order[: min(abs(missing), int(free.sum()))]] += step
    return shares


@contextmanager
def gather_sample(
    batches: Batches, config: FitConfig, *, folder: str | None = None
) -> Iterator[tuple[np.ndarray, Counts]]:
    """Yield (the sampled embeddings as one matrix, where all rows went), from uids and (rows, D) blocks in pool order.

    The sample lies in a file without a name in `folder` (default: the system's temporary folder), mapped: it takes
    2 D bytes of disk a row (19.7 GB for 12.8 M rows of 768), and memory as far as there is some to spare.
    A row that has no embedding (find_whole) is counted as failed.  Raises PoolError when blocks differ in D or type.
    """
    read = kept = whole = 0

    def choose() -> Iterator[np.ndarray]:
        nonlocal read, kept, whole
        for uids, block_ND in batches:
            whole_N = find_whole(block_ND)
            chosen_N = whole_N & is_sampled(uids, config.sample, config.seed)
            read, whole, kept = read + len(uids), whole + int(whole_N.sum()), kept + int(chosen_N.sum())
            yield block_ND[chosen_N]

    with spool(choose(), folder) as sample_ND:
        dropped = {NOT_SAMPLED: whole - kept} if kept < whole else {}
        failed = {REASON_MISSING_EMBEDDING: read - whole} if whole < read else {}
        yield sample_ND, Counts(read=read, kept=kept, dropped=dropped, failed=failed)


def is_sampled(uids: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Return bool (rows,): which uids a seeded sample of a share in (0, 1] has; a smaller sample lies in a larger."""
    last = int(share * 2.0**UID_BITS) - 1
    return is_at_most(shuffle_uids(uids, seed), max(last, 0))
