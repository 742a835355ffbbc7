"""The image_cluster filter: DataComp's own assignment of frozen rows, absent embeddings, wrong files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from filters import build_filter
from pipeline.contract import check_scored
from pipeline.errors import ConfigError

CASE = json.loads((Path(__file__).parent / "datacomp_image_based.json").read_text())


def save_files(folder: Path, centroid_KD: Any, targets: Any) -> dict[str, str]:
    np.save(folder / "centroids.npy", np.asarray(centroid_KD, np.float32))
    np.save(folder / "targets.npy", np.asarray(targets))
    places = {what: str(folder / f"{what}.npy") for what in ("centroids", "targets")}
    return {"filter": "image_cluster", "name": "image_based", "embedding": "l14_img", **places}


def batch(rows: list[list[float] | None], dim: int) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict({"l14_img": pa.array(rows, pa.list_(pa.float16(), dim))})


@pytest.mark.parametrize("targets", ["ids", "embeddings", "pt"])
def test_same_clusters_as_datacomp(tmp_path: Path, targets: str) -> None:
    """What get_centroid_ids_gpu and image_filter_helper of baselines/apply_filter.py gave for the same rows."""
    dim, target_ND = CASE["dim"], np.array(CASE["targets"], np.float16)
    entry = save_files(tmp_path, CASE["centroids"], CASE["target_ids"] if targets == "ids" else target_ND)
    if targets == "pt":
        torch.save({"image_features": torch.from_numpy(target_ND)}, tmp_path / "targets.pt")
        torch.save(np.array(CASE["centroids"], np.float32), tmp_path / "centroids.pt", pickle_protocol=4)
        entry |= {"targets": str(tmp_path / "targets.pt"), "centroids": str(tmp_path / "centroids.pt")}
    filter = build_filter(entry)
    rows = batch(CASE["embeddings"], dim)
    scored = filter.load()(rows)
    check_scored(filter, rows, scored)
    assert [name for name, _ in filter.makes] == ["image_based_cluster", "image_based_in_targets"]
    assert scored.columns[0].to_pylist() == CASE["ids"]
    kept = [uid for uid, inside in zip(CASE["uids"], scored.columns[1].to_pylist(), strict=True) if inside]
    assert sorted(kept) == CASE["kept"] and 0 < len(kept) < len(rows)
    assert scored.failures == ()


def test_l2_is_another_choice(tmp_path: Path) -> None:
    entry = save_files(tmp_path, [[1, 0], [0.5, 0]], [1])
    rows = batch([[0.5, 0.1]], 2)
    for by, cluster in (("dot", 0), ("l2", 1)):
        filter = build_filter(entry | {"assign": by})
        assert [column.to_pylist() for column in filter.load()(rows).columns] == [[cluster], [cluster == 1]]
    assert build_filter(entry).identity != filter.identity


def test_rows_without_an_embedding(tmp_path: Path) -> None:
    nan, inf = float("nan"), float("inf")
    filter = build_filter(save_files(tmp_path, np.eye(3), [0, 2]))
    rows = batch([[0, 0, 1], None, [1, nan, 0], [0, 1, 0], [inf, 0, 0], [0, 0, 0]], 3)
    scored = filter.load()(rows)
    check_scored(filter, rows, scored)
    assert scored.columns[0].to_pylist() == [2, None, None, 1, None, 0]
    assert scored.columns[1].to_pylist() == [True, None, None, False, None, True]
    assert [(f.position, f.reason) for f in scored.failures] == [(n, "missing_embedding") for n in (1, 2, 4)]
    free = pa.RecordBatch.from_pydict({"l14_img": pa.array([None, []], pa.list_(pa.float32()))})
    for none in (rows[:0], rows[1:3], free):
        check_scored(filter, none, filter.load()(none))


def test_identity_follows_the_bytes_not_the_path(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    entries = [save_files(tmp_path / folder, np.eye(3), [0, 2]) for folder in "ab"]
    first, second = (build_filter(entry).identity for entry in entries)
    assert first == second
    for centroids, targets in ((np.eye(3) * 2, [0, 2]), (np.eye(3), [0])):
        assert build_filter(save_files(tmp_path / "b", centroids, targets)).identity != first


@pytest.mark.parametrize("what", ["centroids", "targets"])
def test_files_that_change_under_a_run_are_not_used(tmp_path: Path, what: str) -> None:
    filter = build_filter(save_files(tmp_path, np.eye(3), [0]))
    save_files(tmp_path, np.eye(3)[::-1] if what == "centroids" else np.eye(3), [2] if what == "targets" else [0])
    with pytest.raises(ConfigError, match=f"{what} .* changed since this run began"):
        filter.load()


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([0, 3], r"ids in \[0, 3\), and are \(2,\) with 3"),
        ([-1], "with -1"),
        ([[0, 1]], r"are \(1, 2\)"),
        ([[0.5, 1.0]], "embeddings of 2 numbers cannot be compared with centroids of 3"),
    ],
)
def test_targets_that_are_none(tmp_path: Path, targets: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_filter(save_files(tmp_path, np.eye(3), targets)).load()


def test_no_target_at_all(tmp_path: Path) -> None:
    filter = build_filter(save_files(tmp_path, np.eye(3), np.empty(0, np.int32)))
    assert filter.load()(batch([[1, 0, 0]], 3)).columns[1].to_pylist() == [False]


def test_wrong_places_and_models_are_explained(tmp_path: Path) -> None:
    entry = save_files(tmp_path, np.eye(3), [0])
    with pytest.raises(ConfigError, match="no targets at '/no'"):
        build_filter(entry | {"targets": "/no"})
    with pytest.raises(ConfigError, match="embeddings of 2 numbers"):
        build_filter(entry).load()(batch([[1, 0]], 2))
    with pytest.raises(ConfigError, match="assign"):
        build_filter(entry | {"assign": "cosine"})
