"""SemDeDup: how near a row is to any earlier row of its cluster (Abbas et al. 2023, arXiv:2303.09540, section 3).

Written from the paper's definitions; its repository's licence is non-commercial.  Spherical k-means on unit vectors;
a cluster's rows in the order of their distance to the centroid; a row's similarity is its largest cosine with a row
before it.  A rule `similarity <= 1 - eps` then drops what SemDeDup drops; eps has no single published default.
"""

from collections.abc import Iterator
from dataclasses import field
from typing import Any, Literal

import numpy as np

from pipeline.clip_model import AUTO, pick_device
from pipeline.config import config
from pipeline.gather import Gathered, permute, split_blocks, spool, to_units
from pipeline.kmeans import FitConfig, fit_centroids, is_sampled
from pipeline.nearest import assign, place_centroids
from pipeline.select import Step
from pipeline.select_draw import shuffle_uids
from pipeline.uid_table import make_table

FIRST = -1.0
"""Similarity of the first row of a cluster: no cosine is less, so every threshold keeps it."""
NEAREST_CENTROIDS = 20
"""Of density-based pruning's d_inter (Abbas et al. 2024, arXiv:2401.04578)."""
TILE_ROWS, CENTROID_ROWS = 2048, 256


@config
class DedupConfig:
    """How rows are clustered and put in order; defaults are those of the paper's published configuration."""

    kind: Literal["semdedup"] = "semdedup"
    embedding: str
    """Column that is compared: a key of the pool's npz such as l14_img, or a score such as clip_img."""
    rows: list[Step] = field(default_factory=list)
    """Rules over scores that say which rows are compared; none: all rows.  The others have no value."""
    clusters: int = 50_000
    """Number of centroids.  The work within clusters grows with the squares of their sizes."""
    iterations: int = 100
    seed: int = 1234
    """Of k-means, of the sample, and of keep: random."""
    sample: float = 1.0
    """Share of the rows that k-means sees, in (0, 1]."""
    levels: Literal[1, 2] = 1
    """As that of k-means (pipeline/kmeans.py): 2 is much faster for many clusters."""
    keep: Literal["hard", "easy", "random"] = "hard"
    """Which row of a pair comes first and so stays: the farther from the centroid, the nearer, or either by chance."""

    def __post_init__(self) -> None:
        self.clustering()

    def clustering(self) -> FitConfig:
        """Return what k-means is told.  Raises ConfigError for what cannot be."""
        same = ("embedding", "clusters", "iterations", "seed", "sample", "levels")
        return FitConfig(**{name: getattr(self, name) for name in same})


def fit_duplicates(rows: Gathered, config: DedupConfig, folder: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Return a table by uid of cluster, distance, isolation and similarity, and the unit centroids float32 (K, D).

    distance is 1 - cosine with the centroid, isolation that of find_isolation, similarity as the module says.
    Beside the rows, disk holds them once more; memory about 100 bytes a row, and one cluster twice as float32.
    Raises ConfigError for fewer rows than clusters.
    """
    device = pick_device(AUTO)
    centroid_KD = _fit_centroids(rows, config, folder)
    id_N, distance_N = _assign(rows.matrix_ND, centroid_KD, device)
    order_N = order_rows(rows.uids, id_N, distance_N, config)
    similarity_N = np.empty(len(order_N), np.float32)
    with permute(rows.matrix_ND, order_N, folder) as sorted_ND:
        sizes_K = np.bincount(id_N, minlength=len(centroid_KD))
        similarity_N[order_N] = compare_earlier(sorted_ND, sizes_K, device)
    isolation_N = find_isolation(centroid_KD, device)[id_N]
    columns = {"cluster": id_N, "distance": distance_N, "isolation": isolation_N, "similarity": similarity_N}
    return make_table(rows.uids, columns), centroid_KD


def _fit_centroids(rows: Gathered, config: DedupConfig, folder: str | None) -> np.ndarray:
    def draw() -> Iterator[np.ndarray]:
        uids = split_blocks(rows.uids)
        for uids_n, block_ND in zip(uids, split_blocks(rows.matrix_ND), strict=True):
            yield to_units(block_ND[is_sampled(uids_n, config.sample, config.seed)], block_ND.dtype)

    with spool(draw(), folder) as sample_ND:
        return to_units(fit_centroids(sample_ND, config.clustering(), spherical=True).centroid_KD)


def _assign(matrix_ND: np.ndarray, centroid_KD: np.ndarray, device: str) -> tuple[np.ndarray, np.ndarray]:
    centroids = place_centroids(centroid_KD, "dot", device)
    nearest = [assign(to_units(block_ND), centroids) for block_ND in split_blocks(matrix_ND)]
    cosine_N = np.concatenate([found.value_N for found in nearest])
    return np.concatenate([found.id_N for found in nearest]), np.clip(1 - cosine_N, 0, 2)


def order_rows(uids: np.ndarray, id_N: np.ndarray, distance_N: np.ndarray, config: DedupConfig) -> np.ndarray:
    """Return the places of the rows cluster by cluster, in the order of `keep`; equal distances go by uid.

    `uids` must ascend.
    """
    if config.keep == "random":
        shuffled = shuffle_uids(uids, config.seed)
        return np.lexsort((shuffled["f1"], shuffled["f0"], id_N))
    return np.lexsort((-distance_N if config.keep == "hard" else distance_N, id_N))


def compare_earlier(sorted_ND: np.ndarray, sizes_K: np.ndarray, device: str = "cpu") -> np.ndarray:
    """Return float32 (N,): each row's largest cosine with a row before it in its cluster, FIRST for the first.

    Cluster k is the next sizes_K[k] rows.  Of its matrix of cosines memory holds one tile.
    """
    edges = np.concatenate([[0], np.cumsum(sizes_K)])
    similarity_N = np.empty(len(sorted_ND), np.float32)
    for start, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        if end > start:
            similarity_N[start:end] = _compare_cluster(sorted_ND[start:end], device)
    return similarity_N


def _compare_cluster(cluster_nD: np.ndarray, device: str) -> Any:
    import torch

    unit_nD = torch.cat([torch.from_numpy(to_units(block)).to(device) for block in split_blocks(cluster_nD)])
    best_n = torch.full((len(unit_nD),), FIRST, device=device)
    for start in range(0, len(unit_nD), TILE_ROWS):
        row_nD, best = unit_nD[start : start + TILE_ROWS], best_n[start : start + TILE_ROWS]
        for left in range(0, start, TILE_ROWS):
            torch.maximum(best, (row_nD @ unit_nD[left : left + TILE_ROWS].T).amax(dim=1), out=best)
        own_nn = row_nD @ row_nD.T
        later_nn = torch.ones_like(own_nn, dtype=torch.bool).triu_()
        torch.maximum(best, own_nn.masked_fill_(later_nn, FIRST).amax(dim=1), out=best)
    return best_n.clamp_(-1, 1).cpu().numpy()


def find_isolation(centroid_KD: np.ndarray, device: str = "cpu") -> np.ndarray:
    """Return float32 (K,): mean 1 - cosine of each unit centroid to the NEAREST_CENTROIDS nearest others.

    To all others where there are fewer; NaN for a lone centroid.
    """
    import torch

    vector_KD, num_near = torch.from_numpy(centroid_KD).to(device), min(NEAREST_CENTROIDS, len(centroid_KD) - 1)
    found = np.full(len(centroid_KD), np.nan, np.float32)
    for start in range(0, len(centroid_KD) if num_near else 0, CENTROID_ROWS):
        cosine_kK = vector_KD[start : start + CENTROID_ROWS] @ vector_KD.T
        itself = torch.arange(len(cosine_kK), device=device)
        cosine_kK[itself, itself + start] = -torch.inf
        nearest = cosine_kK.topk(num_near, dim=1).values
        found[start : start + CENTROID_ROWS] = (1 - nearest).mean(dim=1).cpu().numpy()
    return found
