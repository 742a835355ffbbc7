"""Embeddings as they are stored, nearest centroids, k-means: against torch, float64 sums and faiss itself."""

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from made_embeddings import draw, draw_uids
from made_scores import write_scores

from pipeline.embeddings import hash_embedding_set, read_embedding_set, to_matrix
from pipeline.errors import ConfigError, PoolError
from pipeline.kmeans import FitConfig, apportion, fit_centroids, gather_sample, is_sampled
from pipeline.manifest import Counts
from pipeline.nearest import BLOCK_CENTROIDS, BLOCK_ROWS, Rule, assign, find_targets, place_centroids, read_centroids

# Columns and files.

HALF = pa.float16()


@pytest.mark.parametrize("kind", [pa.list_(HALF, 2), pa.list_(HALF), pa.large_list(HALF), pa.list_(pa.float64())])
def test_a_column_of_vectors_is_a_matrix(kind: pa.DataType) -> None:
    rows = pa.array([[9, 9], [1, 2], None, [3, None], [5, 6]], kind)[1:]
    found = to_matrix(rows)
    assert found.dtype == (np.float32 if kind.value_type == pa.float64() else np.float16)
    np.testing.assert_array_equal(found, [[1, 2], [np.nan, np.nan], [3, np.nan], [5, 6]])
    assert to_matrix(rows[:0]).shape[0] == 0


def test_vectors_that_are_empty_are_none() -> None:
    np.testing.assert_array_equal(to_matrix(pa.array([[], [1.5], None])), [[np.nan], [1.5], [np.nan]])
    assert to_matrix(pa.array([[], None], pa.list_(HALF))).shape == (2, 0)
    for column, why in ((pa.array([[1.0], [1.0, 2.0]]), "1 and 2 numbers"), (pa.array(["a"]), "type string")):
        with pytest.raises(PoolError, match=why):
            to_matrix(column)


def save_scores(folder: Path, vector_ND: np.ndarray) -> tuple[str, str]:
    column = pa.FixedSizeListArray.from_arrays(pa.array(vector_ND.reshape(-1)), vector_ND.shape[1])
    table = pa.table({"uid": [f"{n:032x}" for n in range(len(vector_ND))], "clip_img": column})
    write_scores(folder / "s", {"b": table[:7], "a": table[7:]}, {"clip_img": "clip"})
    return str(folder / "s"), "clip_img"


def save_parquet(folder: Path, vector_ND: np.ndarray) -> tuple[str, str]:
    pq.write_table(pa.table({"v": list(vector_ND[:7])}), folder / "1.parquet")
    pq.write_table(pa.table({"v": list(vector_ND[7:])}), folder / "2.parquet")
    return f"{folder}/*.parquet", "v"


def save_npz(folder: Path, vector_ND: np.ndarray) -> tuple[str, str]:
    np.savez(folder / "x.npz", l14_img=vector_ND, b32_img=vector_ND[:, :2])
    return str(folder), "l14_img"


def save_npy(folder: Path, vector_ND: np.ndarray) -> tuple[str, None]:
    np.save(folder / "x.npy", vector_ND)
    return str(folder / "x.npy"), None


def save_pt(folder: Path, vector_ND: np.ndarray) -> tuple[str, None]:
    """As DataComp's five files of ImageNet, here two."""
    for name, some in (("1.pt", vector_ND[:7]), ("2.pt", vector_ND[7:])):
        torch.save({"image_features": torch.from_numpy(some.copy()), "n": 1}, folder / name)
    return f"{folder}/1.pt::{folder}/2.pt", None


@pytest.mark.parametrize("save", [save_scores, save_parquet, save_npz, save_npy, save_pt])
def test_every_kind_of_embedding_set(tmp_path: Path, save: Callable[..., tuple[str, str | None]]) -> None:
    vector_ND = draw(11)
    url, column = save(tmp_path, vector_ND)
    blocks = list(read_embedding_set(url, column))
    np.testing.assert_array_equal(np.concatenate(blocks), vector_ND)
    assert {block.dtype for block in blocks} == {np.dtype(np.float16)}
    before = hash_embedding_set(url, column)
    (tmp_path / "again").mkdir()
    other, _ = save(tmp_path / "again", vector_ND[::-1].copy())
    assert hash_embedding_set(other, column) != before


def test_what_holds_no_embeddings_is_explained(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(3))
    torch.save({"features": torch.zeros(2, 2)}, tmp_path / "x.pt")
    np.savez(tmp_path / "x.npz", l14_img=draw(3))
    (tmp_path / "x.txt").write_text("x")
    (tmp_path / "bad.npy").write_bytes(b"\x93NUMPY")
    for name, column, why in (
        ("ids.npy", None, "3 of int64, not a matrix"),
        ("x.pt", None, "unknown matrix of .* 'image_features': did you mean 'features'"),
        ("x.npz", "l14", "did you mean 'l14_img'"),
        ("x.txt", None, r"holds \.txt"),
        ("", None, r"holds \.npy, \.npz, \.pt"),
    ):
        with pytest.raises(ConfigError, match=why):
            list(read_embedding_set(str(tmp_path / name), column))
    with pytest.raises(PoolError, match="cannot be read as npy"):
        list(read_embedding_set(str(tmp_path / "bad.npy")))


@pytest.mark.parametrize("protocol", [2, 4])
def test_centroids_as_datacomp_saves_them(tmp_path: Path, protocol: int) -> None:
    """torch.save of a numpy array: protocol 4 in baselines/image_based_clustering.py:214."""
    centroid_KD = draw(5, dtype=np.float32)
    torch.save(centroid_KD, tmp_path / "c.pt", pickle_protocol=protocol)
    np.testing.assert_array_equal(read_centroids(str(tmp_path / "c.pt")), centroid_KD)


def test_centroids_as_others_save_them(tmp_path: Path) -> None:
    centroid_KD = torch.tensor([[1.0, 2.5], [0, -3]])
    for kind in (centroid_KD, centroid_KD.to(torch.bfloat16), torch.nn.Parameter(centroid_KD)):
        torch.save(kind, tmp_path / "c.pt")
        torch.save({"image_features": kind}, tmp_path / "x.pt")
        for found in (read_centroids(str(tmp_path / "c.pt")), *read_embedding_set(str(tmp_path / "x.pt"))):
            np.testing.assert_array_equal(found, centroid_KD)
    with pytest.raises(ConfigError, match="holds a dict"):
        read_centroids(str(tmp_path / "x.pt"))


class Command:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


def test_a_pickle_that_does_more_is_not_run(tmp_path: Path) -> None:
    torch.save({"image_features": Command(tmp_path / "ran")}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "y.pt", "w") as archive:
        archive.writestr("y/data.pkl", pickle.dumps(Command(tmp_path / "ran")))
    (tmp_path / "z.pt").write_bytes(pickle.dumps(Command(tmp_path / "ran")))
    (tmp_path / "text.pt").write_text("hello")
    for name in ("x.pt", "y.pt", "z.pt", "text.pt"):
        with pytest.raises(PoolError, match="holds neither"):
            list(read_embedding_set(str(tmp_path / name)))
    assert not (tmp_path / "ran").exists()


# Nearest centroids.


def test_dot_is_what_datacomp_computes() -> None:
    rows, clusters = BLOCK_ROWS + 5, BLOCK_CENTROIDS + 7
    embedding_ND = draw(rows)
    centroid_KD = draw(clusters, seed=1, dtype=np.float32) * np.linspace(0.2, 1, clusters, dtype=np.float32)[:, None]
    found = assign(embedding_ND, place_centroids(centroid_KD, "dot"))
    similarity = torch.einsum("ik,jk->ij", torch.from_numpy(embedding_ND).float(), torch.from_numpy(centroid_KD))
    np.testing.assert_array_equal(found.id_N, torch.argmax(similarity, dim=1))
    np.testing.assert_allclose(found.value_N, similarity.max(dim=1).values, rtol=1e-6)
    assert found.id_N.dtype == np.int32 and found.id_N.max() > BLOCK_CENTROIDS


def test_l2_is_the_least_distance_and_not_the_largest_dot() -> None:
    rows, clusters = BLOCK_ROWS + 5, BLOCK_CENTROIDS + 7
    embedding_ND = draw(rows, dtype=np.float32)
    centroid_KD = draw(clusters, seed=1, dtype=np.float32) * np.linspace(0.2, 1, clusters, dtype=np.float32)[:, None]
    found = assign(embedding_ND, place_centroids(centroid_KD, "l2"))
    x_ND, c_KD = embedding_ND.astype(np.float64), centroid_KD.astype(np.float64)
    distance_NK = (x_ND**2).sum(1)[:, None] - 2 * x_ND @ c_KD.T + (c_KD**2).sum(1)
    np.testing.assert_array_equal(found.id_N, distance_NK.argmin(1))
    np.testing.assert_allclose(found.value_N, distance_NK.min(1), atol=1e-5)
    assert (assign(embedding_ND, place_centroids(centroid_KD, "dot")).id_N != found.id_N).mean() > 0.05


@pytest.mark.parametrize("by", ["dot", "l2"])
def test_of_equal_centroids_the_first_wins(by: Rule) -> None:
    centroid_KD = draw(50, dtype=np.float32)
    twice_KD = np.tile(centroid_KD, (2 + BLOCK_CENTROIDS // 50, 1))
    embedding_ND = draw(300, seed=1)
    found, wanted = (assign(embedding_ND, place_centroids(c_KD, by)).id_N for c_KD in (twice_KD, centroid_KD))
    np.testing.assert_array_equal(found, wanted)


def test_rows_alone_and_together_have_the_same_cluster() -> None:
    embedding_ND, centroids = draw(200, 64), place_centroids(draw(500, 64, seed=1, dtype=np.float32), "dot")
    together = assign(embedding_ND, centroids)
    for size in (1, 3, 70):
        pieces = [assign(embedding_ND[n : n + size], centroids) for n in range(0, 200, size)]
        np.testing.assert_array_equal(together.id_N, np.concatenate([p.id_N for p in pieces]))
        np.testing.assert_array_equal(together.value_N, np.concatenate([p.value_N for p in pieces]))
    assert assign(embedding_ND[:0], centroids).id_N.shape == (0,)


def test_targets_are_the_clusters_of_whole_embeddings() -> None:
    target_ND = draw(100, seed=3)
    target_ND[4], target_ND[5, 2] = np.nan, np.inf
    centroids = place_centroids(draw(400, seed=1, dtype=np.float32), "dot")
    ids, counts = find_targets([target_ND[:50], target_ND[50:]], centroids)
    keep = np.r_[0:4, 6:100]
    np.testing.assert_array_equal(ids, np.unique(assign(target_ND[keep], centroids).id_N))
    assert counts == Counts(read=100, kept=98, failed={"missing_embedding": 2})
    with pytest.raises(ConfigError, match="embeddings of 8 numbers cannot be compared with centroids of 16"):
        find_targets([draw(3, 8)], centroids)


@pytest.mark.parametrize("bad", [np.zeros(3), np.zeros((0, 3)), np.zeros((2, 2), int), np.array([[1, np.nan]])])
def test_centroids_that_are_none(tmp_path: Path, bad: np.ndarray) -> None:
    np.save(tmp_path / "c.npy", bad)
    with pytest.raises(ConfigError, match=r"centroids .*(not a matrix of floats|NaN)"):
        read_centroids(str(tmp_path / "c.npy"))


# k-means.


def train_as_datacomp(sample_ND: np.ndarray, num_clusters: int) -> np.ndarray:
    """baselines/image_based_clustering.py:28-72 on one CPU index."""
    clustering = faiss.Clustering(sample_ND.shape[1], num_clusters)
    clustering.niter, clustering.seed, clustering.max_points_per_centroid = 20, 0, 10000000
    clustering.train(sample_ND.astype(np.float32), faiss.IndexFlatL2(sample_ND.shape[1]))
    return faiss.vector_float_to_array(clustering.centroids).reshape(num_clusters, -1)


def test_the_defaults_give_datacomps_centroids() -> None:
    sample_ND = draw(4000)
    for some in (sample_ND, sample_ND.astype(np.float32)):
        fit = fit_centroids(some, FitConfig(embedding="l14_img", clusters=64))
        np.testing.assert_array_equal(fit.centroid_KD, train_as_datacomp(sample_ND, 64))


@pytest.mark.parametrize("levels", [1, 2])
def test_threads_change_no_bit(levels: int) -> None:
    sample_ND, config = draw(3000), FitConfig(embedding="x", clusters=100, levels=levels)
    made, threads = [], faiss.omp_get_max_threads()
    for number in (1, 2, 4, 2):
        faiss.omp_set_num_threads(number)
        made.append(fit_centroids(sample_ND, config).centroid_KD)
    faiss.omp_set_num_threads(threads)
    assert made[0].shape == (100, 16) and np.isfinite(made[0]).all()
    assert len({fit.tobytes() for fit in made}) == 1


def test_two_levels_are_nearly_as_near() -> None:
    sample_ND = draw(6000)
    errors = []
    for levels in (1, 2):
        centroid_KD = fit_centroids(sample_ND, FitConfig(embedding="x", clusters=200, levels=levels)).centroid_KD
        errors.append(assign(sample_ND, place_centroids(centroid_KD, "l2")).value_N.mean())
    assert errors[1] < 1.15 * errors[0]


def test_as_many_rows_as_clusters_and_fewer() -> None:
    sample_ND = draw(10)
    for levels in (1, 2):
        fit = fit_centroids(sample_ND, FitConfig(embedding="x", clusters=10, levels=levels))
        assert assign(sample_ND, place_centroids(fit.centroid_KD, "l2")).value_N.max() < 1e-6
    with pytest.raises(ConfigError, match=r"11 clusters cannot be made of 10 embeddings"):
        fit_centroids(sample_ND, FitConfig(embedding="x", clusters=11))


@pytest.mark.parametrize("levels", [1, 2])
def test_the_mean_distance_is_of_the_rows_that_were_looked_at(levels: Literal[1, 2]) -> None:
    sample_ND = draw(4000)
    for most in (10_000_000, 150):
        config = FitConfig(embedding="x", clusters=9, levels=levels, max_points_per_centroid=most)
        fit = fit_centroids(sample_ND, config)
        mean = assign(sample_ND, place_centroids(fit.centroid_KD, "l2")).value_N.mean()
        assert 0.95 < fit.error / fit.rows / mean < 1.05


@pytest.mark.parametrize(
    ("sizes", "total", "shares"),
    [
        ([100, 100], 10, [5, 5]),
        ([97, 1, 1, 1], 4, [1, 1, 1, 1]),
        ([97, 1, 1, 1], 10, [7, 1, 1, 1]),
        ([50, 0, 30, 20], 7, [4, 0, 2, 1]),
        ([5, 5, 0], 10, [5, 5, 0]),
        ([1, 9], 9, [1, 8]),
    ],
)
def test_shares(sizes: list[int], total: int, shares: list[int]) -> None:
    assert apportion(np.array(sizes), total).tolist() == shares


# The sample.


def test_a_sample_depends_on_uids_and_seed_alone() -> None:
    uids = draw_uids(50_000)
    chosen = is_sampled(uids, 0.3, 0)
    assert abs(chosen.mean() - 0.3) < 4 * (0.3 * 0.7 / 50_000) ** 0.5
    np.testing.assert_array_equal(is_sampled(uids[::-1], 0.3, 0)[::-1], chosen)
    assert (is_sampled(uids, 0.5, 0) | ~chosen).all()
    assert 0.05 < (is_sampled(uids, 0.3, 1) & chosen).mean() < 0.13
    assert is_sampled(uids, 1.0, 0).all() and not is_sampled(uids, 1e-300, 0).any()


def test_rows_are_gathered_in_order_and_counted(tmp_path: Path) -> None:
    uids, vector_ND = draw_uids(1000), draw(1000)
    vector_ND[[3, 500]] = np.nan
    config = FitConfig(embedding="x", sample=0.5)
    batches = [(uids[n : n + 300], vector_ND[n : n + 300]) for n in range(0, 1000, 300)]
    wanted = is_sampled(uids, 0.5, 0) & np.isfinite(vector_ND).all(1)
    with gather_sample(batches, config, folder=str(tmp_path)) as (sample_ND, counts):
        np.testing.assert_array_equal(sample_ND, vector_ND[wanted])
        assert sample_ND.dtype == np.float16 and not list(tmp_path.iterdir())
    kept = int(wanted.sum())
    assert counts == Counts(read=1000, kept=kept, dropped={"sample": 998 - kept}, failed={"missing_embedding": 2})
    with gather_sample([(uids[:3], np.empty((3, 0), np.float32))], config) as (sample_ND, counts):
        assert counts == Counts(read=3, kept=0, failed={"missing_embedding": 3}) and len(sample_ND) == 0
    mixed = [(uids[:9], draw(9)), (uids[:9], draw(9, 8))]
    with pytest.raises(PoolError, match="cannot stand in one matrix"), gather_sample(mixed, FitConfig(embedding="x")):
        pass


def test_damaged_rows_do_not_abort_faiss() -> None:
    vector_ND = draw(100, dtype=np.float32)
    vector_ND[3], vector_ND[4] = 1e38, 2e6
    config = FitConfig(embedding="x", clusters=3, iterations=2)
    with gather_sample([(draw_uids(100), vector_ND)], config) as (sample_ND, counts):
        assert counts == Counts(read=100, kept=98, failed={"missing_embedding": 2})
        assert np.isfinite(fit_centroids(sample_ND, config).centroid_KD).all()


@pytest.mark.parametrize(
    "wrong", [{"clusters": 0}, {"iterations": 0}, {"sample": 0}, {"sample": 1.1}, {"seed": -1}, {"seed": 1 << 31}]
)
def test_configs_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="fit: "):
        FitConfig(embedding="x", **wrong)


def test_a_remote_npy_is_read_whole() -> None:
    import fsspec

    file = io.BytesIO()
    np.save(file, draw(5))
    fsspec.filesystem("memory").pipe_file("/x.npy", file.getvalue())
    np.testing.assert_array_equal(np.concatenate(list(read_embedding_set("memory://x.npy"))), draw(5))
