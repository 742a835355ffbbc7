"""Clusters of image_based, measured: `python -m tests.bench.clusters [--rows N --clusters K --dim D] [--fit N]`.

Assignment: the rate of pipeline.nearest.assign on N float16 rows and K centroids beside a bare torch.mm of the same
size (blocks of rows times all centroids, nothing done with the scores) and beside faiss (IndexFlatIP.search, k = 1), in
turn, in one process, by the clock and by the CPU time of its threads, which neighbours disturb less.
With --fit N: k-means of N rows in one level and in two, seeds 0 and 1: seconds, squared distances, and how the verdicts
(is a row's cluster a target's?) differ from those of one level and seed 0.  Rows are drawn by chance, or read with
--embeddings URL [--column NAME].
With --parts N: of two levels alone, whether the nearest of all centroids is one of a row's own part, where k-means
looked for it, and how much farther the nearest of the part is; for 100,000 clusters, where one level would take days.
Asserts nothing.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import faiss
import numpy as np
import torch

from pipeline.embeddings import read_embedding_set
from pipeline.kmeans import FitConfig, _train, apportion, fit_centroids
from pipeline.nearest import BLOCK_ROWS, Rule, assign, find_targets, place_centroids

NUM_TARGETS = 500
SAMPLE_ROWS = 20_000
RULES: tuple[Rule, ...] = ("dot", "l2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--clusters", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--fit", type=int, default=0, metavar="N", help="measure k-means on N rows instead")
    parser.add_argument("--parts", type=int, default=0, metavar="N", help="compare parts with the whole on N rows")
    parser.add_argument("--embeddings", metavar="URL")
    parser.add_argument("--column")
    args = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, faiss {faiss.__version__}")
    if args.fit or args.parts:
        rows = args.fit or args.parts
        rows_ND = draw(rows, args.dim)
        if args.embeddings:
            rows_ND = np.concatenate(list(read_embedding_set(args.embeddings, args.column)))
            rows_ND = rows_ND[np.random.default_rng(0).permutation(len(rows_ND))[:rows]]
        (compare_levels if args.fit else compare_parts)(rows_ND, args.clusters)
    else:
        compare_assignment(draw(args.rows, args.dim), draw(args.clusters, args.dim, seed=1), args.rounds)


def draw(rows: int, dim: int, *, seed: int = 0) -> np.ndarray:
    """Return float16 unit vectors round 1,000 centres."""
    rng = np.random.default_rng(seed)
    centre_CD = np.random.default_rng(99).standard_normal((1000, dim), np.float32)
    drawn_ND = centre_CD[rng.integers(0, 1000, rows)] + rng.standard_normal((rows, dim), np.float32)
    return (drawn_ND / np.linalg.norm(drawn_ND, axis=1, keepdims=True)).astype(np.float16)


def compare_assignment(rows_ND: np.ndarray, centroid_KD: np.ndarray, rounds: int) -> None:
    """Print milliseconds per 1,000 rows, and the medians over rounds of the peers' times in units of each one's own."""
    wide_ND, wide_KD = rows_ND.astype(np.float32), centroid_KD.astype(np.float32)
    row_ND, vector_KD = torch.from_numpy(wide_ND), torch.from_numpy(wide_KD)
    index = faiss.IndexFlatIP(wide_KD.shape[1])
    index.add(wide_KD)
    placed = {by: place_centroids(wide_KD, by) for by in ("dot", "l2")}
    score_nK = torch.empty((BLOCK_ROWS, len(vector_KD)))
    work: dict[str, Callable[[], object]] = {
        "torch.mm": lambda: [torch.mm(n, vector_KD.T, out=score_nK[: len(n)]) for n in row_ND.split(BLOCK_ROWS)],
        "faiss": lambda: index.search(wide_ND, 1),
        "assign dot": lambda: assign(rows_ND, placed["dot"]),
        "assign l2": lambda: assign(rows_ND, placed["l2"]),
    }
    print(f"{len(rows_ND):,} rows x {len(centroid_KD):,} centroids x {rows_ND.shape[1]}, {rounds} rounds")
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, call in work.items():
            start = time.perf_counter(), time.process_time()
            call()
            spent[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    for which, clock in enumerate(("clock", "CPU time")):
        for name, times in spent.items():
            own = [pair[which] for pair in times]
            print(
                f"  {clock:10s}{name:12s}{statistics.median(own) / len(rows_ND) * 1e6:9.1f} ms per 1,000 rows", end=""
            )
            for peer in ("torch.mm", "faiss"):
                ratio = statistics.median(pair[which] / mine for pair, mine in zip(spent[peer], own, strict=True))
                print(f"{ratio:7.2f} of {peer}", end="")
            print()


def compare_levels(rows_ND: np.ndarray, clusters: int) -> None:
    """Print what two levels cost and change; another seed of one level is what change is to be judged by."""
    target_ND, rows_ND = rows_ND[:NUM_TARGETS], rows_ND[NUM_TARGETS:]
    flat = FitConfig(embedding="", clusters=clusters)
    print(f"{len(rows_ND):,} rows of {rows_ND.shape[1]}, {clusters:,} clusters, {NUM_TARGETS} target embeddings")
    errors: list[float] = []
    verdicts: dict[str, np.ndarray] = {}
    for name, config in {
        "one level": flat,
        "one level, seed 1": replace(flat, seed=1),
        "two levels": replace(flat, levels=2),
        "two levels, seed 1": replace(flat, levels=2, seed=1),
    }.items():
        start = time.perf_counter()
        centroid_KD = fit_centroids(rows_ND, config).centroid_KD
        seconds = time.perf_counter() - start
        errors.append(float(assign(rows_ND, place_centroids(centroid_KD, "l2")).value_N.mean()))
        print(f"  {name:20s}{seconds:8.1f} s  mean squared distance {errors[-1]:.5f} ({errors[-1] / errors[0]:.4f})")
        for by in RULES:
            centroids = place_centroids(centroid_KD, by)
            hits, _ = find_targets([target_ND], centroids)
            inside_N = np.isin(assign(rows_ND, centroids).id_N, hits)
            first_N = verdicts.setdefault(by, inside_N)
            print(
                f"    {by:4s}{len(hits):8,} target clusters, {inside_N.mean():.2%} of rows in them, "
                f"same verdict {(inside_N == first_N).mean():.2%}",
                flush=True,
            )


def compare_parts(rows_ND: np.ndarray, clusters: int) -> None:
    """Print how often, of SAMPLE_ROWS rows, the part's nearest centroid is the nearest of all, and the distances."""
    config = FitConfig(embedding="", clusters=clusters, levels=2)
    start = time.perf_counter(), time.process_time()
    centroid_KD = fit_centroids(rows_ND, config).centroid_KD
    clock, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
    print(f"{len(rows_ND):,} rows of {rows_ND.shape[1]}, {clusters:,} clusters: {clock:.0f} s, {cpu:.0f} s of CPU")
    coarse = place_centroids(_train(rows_ND, round(clusters**0.5), config, spherical=False).centroid_KD, "l2")
    part_N = assign(rows_ND, coarse).id_N
    shares = apportion(np.bincount(part_N, minlength=len(coarse.vector_KD)), clusters)
    edges = np.concatenate([[0], np.cumsum(shares)])
    rows = np.sort(np.random.default_rng(0).permutation(len(rows_ND))[:SAMPLE_ROWS])
    exact = assign(rows_ND[rows], place_centroids(centroid_KD, "l2"))
    in_part_n = np.searchsorted(edges, exact.id_N, "right") - 1 == part_N[rows]
    own_n = np.zeros(len(rows), np.float32)
    for part in np.unique(part_N[rows]):
        here = part_N[rows] == part
        own_n[here] = assign(
            rows_ND[rows][here], place_centroids(centroid_KD[edges[part] : edges[part + 1]], "l2")
        ).value_N
    print(f"the nearest of all is of the row's own part for {in_part_n.mean():.2%} of {len(rows):,} rows")
    print(f"squared distance of the part's nearest: {own_n.mean() / exact.value_N.mean():.4f} of that of all")


if __name__ == "__main__":
    main()
