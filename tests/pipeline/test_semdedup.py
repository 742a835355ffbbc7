"""SemDeDup against plain loops over pairs: order, ties, duplicates, lone rows; isolation of clusters."""

import math
from collections.abc import Sequence
from typing import Any

import faiss
import numpy as np
import pytest
from made_embeddings import draw, draw_uids

from pipeline.errors import ConfigError
from pipeline.gather import gather_rows
from pipeline.kmeans import FitConfig, fit_centroids
from pipeline.nearest import assign, place_centroids
from pipeline.select_draw import shuffle_uids
from pipeline.semdedup import TILE_ROWS, DedupConfig, compare_earlier, find_isolation, fit_duplicates


def cosine(left: Sequence[float], right: Sequence[float]) -> float:
    product = sum(a * b for a, b in zip(left, right, strict=True))
    return product / math.sqrt(sum(a * a for a in left) * sum(b * b for b in right))


def dedup(uids: np.ndarray, vector_ND: np.ndarray, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    config = DedupConfig(**{"embedding": "x", "clusters": 6, "iterations": 5} | options)
    with gather_rows([(uids, vector_ND)]) as rows:
        return fit_duplicates(rows, config, None)


def plant(number: int = 150) -> tuple[np.ndarray, np.ndarray]:
    """Rows of which each fifth is the one before it again, and some are many times the length."""
    vector_ND = draw(number, 8, dtype=np.float32)
    vector_ND[4::5] = vector_ND[3::5]
    vector_ND[::7] *= 30
    return draw_uids(number), vector_ND


@pytest.mark.parametrize("keep", ["hard", "easy", "random"])
def test_as_loops_over_pairs(keep: str) -> None:
    uids, vector_ND = plant()
    table, centroid_KD = dedup(uids, vector_ND, keep=keep)
    assert len(table) == 150 and table["f0"].tolist() == sorted(uids["f0"].tolist())
    of_uid = dict(zip(uids["f0"].tolist(), vector_ND.tolist(), strict=True))
    rows = [of_uid[uid] for uid in table["f0"].tolist()]
    shuffled = [tuple(key) for key in shuffle_uids(table, 1234).tolist()]
    for n, row in enumerate(rows):
        cosines = [cosine(row, c) for c in centroid_KD.tolist()]
        assert cosines[table["cluster"][n]] == pytest.approx(max(cosines), abs=1e-6)
        assert table["distance"][n] == pytest.approx(1 - max(cosines), abs=1e-6)

    def before(n: int, m: int) -> bool:
        """Whether row n comes before row m of its cluster; both are places in the order of uids."""
        if keep == "random":
            return shuffled[n] < shuffled[m]
        near, other = float(table["distance"][n]), float(table["distance"][m])
        return n < m if near == other else (near > other) == (keep == "hard")

    for m, row in enumerate(rows):
        earlier = [n for n in range(150) if table["cluster"][n] == table["cluster"][m] and n != m and before(n, m)]
        wanted = max((cosine(rows[n], row) for n in earlier), default=-1.0)
        assert table["similarity"][m] == pytest.approx(wanted, abs=2e-6)
    drops = table["similarity"] > 0.999
    assert drops.sum() >= 30 and (table["similarity"] == -1).sum() == len(set(table["cluster"].tolist()))


def test_the_order_of_the_pool_does_not_matter() -> None:
    uids, vector_ND = plant()
    first, _ = dedup(uids, vector_ND, sample=0.5)
    again, _ = dedup(uids[::-1], vector_ND[::-1], sample=0.5)
    assert first.tobytes() == again.tobytes()
    assert dedup(uids, vector_ND, sample=0.5, seed=1)[0].tobytes() != first.tobytes()


def test_one_cluster() -> None:
    table, centroid_KD = dedup(*plant(), clusters=1)
    assert len(centroid_KD) == 1 and set(table["cluster"].tolist()) == {0}
    assert np.isnan(table["isolation"]).all() and (table["similarity"] == -1).sum() == 1


def test_one_row_per_cluster() -> None:
    vector_ND = np.eye(8, dtype=np.float16)[:6] * 3
    table, _ = dedup(draw_uids(6), vector_ND)
    assert sorted(table["cluster"].tolist()) == list(range(6))
    assert (table["similarity"] == -1).all() and (table["distance"] == 0).all() and (table["isolation"] == 1).all()


@pytest.mark.parametrize("clusters", [1, 4])
def test_all_rows_equal(clusters: int) -> None:
    """One stays: the one with the smallest uid, for all are equally far."""
    table, _ = dedup(draw_uids(40), np.tile(draw(1), (40, 1)), clusters=clusters)
    assert table["similarity"][0] == -1 and (np.abs(table["similarity"][1:] - 1) < 1e-6).all()
    assert (np.abs(table["distance"]) < 1e-5).all()


def test_opposite_rows_have_no_centroid_to_speak_of() -> None:
    vector_ND = np.array([[1, 0], [-1, 0]] * 5, np.float32)
    table, centroid_KD = dedup(draw_uids(10), vector_ND, clusters=1)
    assert np.isfinite(centroid_KD).all() and (table["similarity"] >= -1).all()
    assert ((table["similarity"] > 0.99).sum(), (table["similarity"] == -1).sum()) in {(8, 2), (9, 1)}


def test_fewer_rows_than_clusters() -> None:
    with pytest.raises(ConfigError, match="6 clusters cannot be made of 3 embeddings"):
        dedup(draw_uids(3), draw(3))
    with pytest.raises(ConfigError, match="fit: clusters 0 is below 1"):
        DedupConfig(embedding="x", clusters=0)


def test_clusters_longer_than_a_tile() -> None:
    rows, sizes = draw(2 * TILE_ROWS + 50, 4, dtype=np.float32), np.array([0, 2 * TILE_ROWS + 40, 0, 9, 1])
    found, unit = compare_earlier(rows, sizes), rows / np.linalg.norm(rows, axis=1, keepdims=True)
    for n in (0, 1, TILE_ROWS - 1, TILE_ROWS, 2 * TILE_ROWS, 2 * TILE_ROWS + 39):
        assert found[n] == pytest.approx((unit[:n] @ unit[n]).max(initial=-1), abs=2e-6)
    for n in range(9):
        last = unit[2 * TILE_ROWS + 40 : 2 * TILE_ROWS + 49]
        assert found[2 * TILE_ROWS + 40 + n] == pytest.approx((last[:n] @ last[n]).max(initial=-1), abs=2e-6)
    assert found[-1] == -1


@pytest.mark.parametrize("number", [2, 5, 21, 300])
def test_isolation_is_of_the_twenty_nearest(number: int) -> None:
    centroid_KD = draw(number, 6, dtype=np.float32)
    found = find_isolation(centroid_KD)
    for k in range(0, number, 7):
        gaps = sorted(1 - cosine(centroid_KD[k].tolist(), other.tolist()) for other in np.delete(centroid_KD, k, 0))
        near = gaps[:20]
        assert found[k] == pytest.approx(sum(near) / len(near), abs=1e-5)


def test_k_means_is_faiss_own_spherical_one() -> None:
    vector_ND = draw(2000, dtype=np.float32)
    vector_ND /= np.linalg.norm(vector_ND, axis=1, keepdims=True)
    limits = {"min_points_per_centroid": 1, "max_points_per_centroid": 10_000_000}
    peer = faiss.Kmeans(16, 30, niter=10, seed=3, spherical=True, **limits)
    peer.train(vector_ND)
    config = FitConfig(embedding="x", clusters=30, iterations=10, seed=3)
    fit = fit_centroids(vector_ND, config, spherical=True)
    np.testing.assert_array_equal(fit.centroid_KD, peer.centroids)
    np.testing.assert_allclose(np.linalg.norm(fit.centroid_KD, axis=1), 1, atol=1e-6)
    near = assign(vector_ND, place_centroids(fit.centroid_KD, "l2")).value_N.mean()
    assert fit.error / fit.rows == pytest.approx(near, rel=0.05)


def test_two_levels_stay_on_the_sphere() -> None:
    vector_ND = draw(3000, dtype=np.float32)
    vector_ND /= np.linalg.norm(vector_ND, axis=1, keepdims=True)
    errors = []
    for levels in (1, 2):
        fit = fit_centroids(vector_ND, FitConfig(embedding="x", clusters=100, levels=levels), spherical=True)
        np.testing.assert_allclose(np.linalg.norm(fit.centroid_KD, axis=1), 1, atol=1e-6)
        errors.append(fit.error / fit.rows)
    assert errors[1] < 1.15 * errors[0]
