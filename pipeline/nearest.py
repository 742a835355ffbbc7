"""Which centroid an embedding belongs to: a matrix product in blocks with a running maximum; no N x K matrix is held.

`dot` is DataComp's rule, the largest raw dot product of the embedding as float32 with the centroid
(baselines/apply_filter.py:100-105).  Centroids are means and differ in length, so that is not the cluster which k-means
puts the row in; `l2`, the least Euclidean distance, is.  Of equal scores the first centroid wins, as with torch.argmax.
Two scores that differ in the last digits of float32 may change places under another BLAS or on a GPU; on the CPUs that
were tried, how rows are cut into batches and how many threads there are changes nothing.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from pipeline.embeddings import MAX_ABS, TORCH_SUFFIX, find_whole, from_torch, read_npy, read_torch
from pipeline.errors import ConfigError
from pipeline.manifest import Counts
from pipeline.schemas import REASON_MISSING_EMBEDDING

if TYPE_CHECKING:
    import torch

Rule = Literal["dot", "l2"]
BLOCK_ROWS, BLOCK_CENTROIDS = 1024, 4096
"""One matrix product, at most: 16 MiB of float32 scores."""
LEAST_ROWS = 16
"""Fewer rows are filled up with zeros: BLAS adds up narrow matrices in another order, and the last digits differ."""


class Nearest(NamedTuple):
    """One centroid per embedding."""

    id_N: np.ndarray
    """int32."""
    value_N: np.ndarray
    """float32: the dot product, or the squared distance."""


@dataclass(frozen=True, slots=True)
class Centroids:
    """Centroids on a device, ready to be compared with."""

    vector_KD: "torch.Tensor"
    """float32."""
    half_K: "torch.Tensor | None"
    """float32 minus half the squared length, for `l2`: x.c - |c|^2 / 2 is largest where |x - c| is least."""


def read_centroids(url: str) -> np.ndarray:
    """Return float32 (K, D) from an .npy file, or a .pt that holds one array (DataComp's).

    Raises ConfigError unless it is a matrix of finite numbers.
    """
    found = from_torch(url, read_torch(url)) if url.endswith(TORCH_SUFFIX) else read_npy(url)
    if found.ndim != 2 or found.dtype.kind != "f" or not found.size:
        raise ConfigError(f"centroids {url!r} are {found.shape} of {found.dtype}, not a matrix of floats (K, D).")
    centroid_KD = found.astype(np.float32, copy=False)
    broken = np.flatnonzero(~find_whole(centroid_KD))
    if len(broken):
        raise ConfigError(
            f"centroids {url!r}: row {broken[0]} holds NaN, infinity or a number beyond {MAX_ABS:,.0f}, "
            f"and {len(broken) - 1} more do."
        )
    return centroid_KD


def place_centroids(centroid_KD: np.ndarray, by: Rule, device: str = "cpu") -> Centroids:
    """Return float32 centroids on a device.  A writable array stays where it is on the CPU: nothing is copied."""
    import torch

    vector_KD = torch.from_numpy(centroid_KD).to(device)
    return Centroids(vector_KD, _half_lengths(vector_KD) if by == "l2" else None)


def _half_lengths(vector_KD: "torch.Tensor") -> "torch.Tensor":
    import torch

    lengths_K: torch.Tensor = torch.linalg.vector_norm(vector_KD, dim=1)
    return lengths_K.square_().mul_(-0.5)


def assign(embedding_ND: np.ndarray, centroids: Centroids) -> Nearest:
    """Return the centroid of each float16 or float32 embedding, all of them finite.

    Holds BLOCK_ROWS x BLOCK_CENTROIDS scores and as many rows as float32, whatever N and K.
    Raises ConfigError when embeddings and centroids differ in length.
    """
    import torch

    if embedding_ND.shape[1] != centroids.vector_KD.shape[1] and len(embedding_ND):
        raise ConfigError(
            f"embeddings of {embedding_ND.shape[1]} numbers cannot be compared with centroids of "
            f"{centroids.vector_KD.shape[1]}: they are of different models."
        )
    id_N, value_N = np.zeros(len(embedding_ND), np.int32), np.zeros(len(embedding_ND), np.float32)
    device = centroids.vector_KD.device
    for start in range(0, len(embedding_ND), BLOCK_ROWS):
        part_nD = torch.from_numpy(_widen(embedding_ND[start : start + BLOCK_ROWS])).to(device)
        id_n, value_n = _search(part_nD, centroids)
        if centroids.half_K is not None:
            value_n = (part_nD.square().sum(dim=1) - 2 * value_n).clamp_(min=0)
        end = min(start + BLOCK_ROWS, len(embedding_ND))
        id_N[start:end] = id_n[: end - start].cpu().numpy()
        value_N[start:end] = value_n[: end - start].cpu().numpy()
    return Nearest(id_N, value_N)


def _widen(part_nD: np.ndarray) -> np.ndarray:
    """Return the rows as float32, and rows of zeros after them up to LEAST_ROWS."""
    widened_nD = np.zeros((max(len(part_nD), LEAST_ROWS), part_nD.shape[1]), np.float32)
    widened_nD[: len(part_nD)] = part_nD
    return widened_nD


def _search(part_nD: "torch.Tensor", centroids: Centroids) -> "tuple[torch.Tensor, torch.Tensor]":
    """Return (id, score) of the first of the largest scores of each row."""
    import torch

    rows, device, clusters = len(part_nD), part_nD.device, len(centroids.vector_KD)
    num_blocks = -(-clusters // BLOCK_CENTROIDS)
    width = -(-clusters // num_blocks)  # one for all blocks: BLAS adds up a narrow last one in another order
    buffer = torch.empty((rows, width), device=device)
    id_n = torch.zeros(rows, dtype=torch.int64, device=device)
    best_n = torch.full((rows,), -torch.inf, device=device)
    for start in range(0, clusters, width):
        block_kD = centroids.vector_KD[start : start + width]
        score_nk = buffer[:, : len(block_kD)]
        if centroids.half_K is None:
            torch.mm(part_nD, block_kD.T, out=score_nk)
        else:
            torch.addmm(centroids.half_K[start : start + width], part_nD, block_kD.T, out=score_nk)
        value_n, place_n = score_nk.max(dim=1)
        better_n = value_n > best_n
        id_n = torch.where(better_n, place_n + start, id_n)
        best_n = torch.where(better_n, value_n, best_n)
    return id_n, best_n


def find_targets(embeddings: Iterable[np.ndarray], centroids: Centroids) -> tuple[np.ndarray, Counts]:
    """Return the sorted ids (int32) of the centroids that any embedding belongs to, and where the embeddings went.

    Takes blocks (rows, D); rows that are not finite are left out and counted (DataComp, apply_filter.py:551-554, puts
    NaN in cluster 0).
    """
    hit_K = np.zeros(len(centroids.vector_KD), bool)
    read = kept = 0
    for block_ND in embeddings:
        whole_N = find_whole(block_ND)
        hit_K[assign(block_ND[whole_N], centroids).id_N] = True
        read, kept = read + len(block_ND), kept + int(whole_N.sum())
    failed = {REASON_MISSING_EMBEDDING: read - kept} if kept < read else {}
    return np.flatnonzero(hit_K).astype(np.int32), Counts(read=read, kept=kept, failed=failed)
