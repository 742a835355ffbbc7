"""Scoring again into the same folder: what counts as done, with columns that lie beside the pool's rows."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.stage_score import run_score
from pipeline.manifest import Manifest

pytestmark = pytest.mark.spark
NUM_ROWS, DIM = 6, 3


def make_pool(folder: Path) -> Path:
    """Two parts with an npz each."""
    folder.mkdir(exist_ok=True)
    for part in range(2):
        names = [f"{part * NUM_ROWS + n:032x}" for n in range(NUM_ROWS)]
        scores = pa.array(np.arange(NUM_ROWS), pa.float32())
        pq.write_table(
            pa.table({"uid": names, "caption": names, "s1": scores, "s2": scores}), folder / f"{part}.parquet"
        )
        np.savez(folder / f"{part}.npz", l14_img=np.eye(NUM_ROWS, DIM, dtype=np.float16))
    return folder


def make_cluster(folder: Path) -> dict[str, Any]:
    np.save(folder / "c.npy", np.eye(DIM, dtype=np.float32))
    np.save(folder / "t.npy", np.array([0]))
    places = {"centroids": str(folder / "c.npy"), "targets": str(folder / "t.npy")}
    return {"filter": "image_cluster", "name": "cluster", "embedding": "l14_img", **places}


@pytest.fixture
def score(spark: Any, tmp_path: Path) -> Any:
    def run(*entries: dict[str, Any]) -> Manifest:
        return run_score(lambda: spark, str(tmp_path / "pool"), entries, str(tmp_path / "out"), quiet=True)

    make_pool(tmp_path / "pool")
    return run


def take(**columns: str) -> dict[str, Any]:
    return {"filter": "metadata", "columns": columns}


def test_other_columns_of_the_same_filter_are_made(score: Any) -> None:
    assert sorted(score(take(s1="float")).facts["columns"]) == ["s1"]
    assert sorted(score(take(s1="float", s2="float")).facts["columns"]) == ["s1", "s2"]
    assert score(take(s1="string")).facts["types"] == {"s1": "string"}


def test_captions_can_be_scores_too(score: Any, tmp_path: Path) -> None:
    score(take(caption="string"), {"filter": "caption_length"})
    (columns,) = {tuple(pq.read_table(f).column_names) for f in (tmp_path / "out" / "metadata").iterdir()}
    assert columns == ("uid", "caption")


@pytest.mark.parametrize("spoil", ["gone", "replaced"])
def test_an_npz_that_is_gone_or_another_is_noticed(score: Any, tmp_path: Path, spoil: str) -> None:
    length, cluster = {"filter": "caption_length"}, make_cluster(tmp_path)
    before = score(length, cluster)
    assert before.counts["cluster"].kept == 2 * NUM_ROWS
    (tmp_path / "pool" / "1.npz").unlink()
    if spoil == "replaced":
        np.savez(tmp_path / "pool" / "1.npz", l14_img=np.full((NUM_ROWS, DIM), np.nan, np.float16))
        assert "cluster" not in score(length).counts  # the scores of before are no longer those of this pool
    reason = {"gone": "missing_column", "replaced": "missing_embedding"}[spoil]
    assert score(length, cluster).counts["cluster"].failed == {reason: NUM_ROWS}


def test_fewer_filters_keep_what_the_others_scored(score: Any, tmp_path: Path) -> None:
    length, cluster = {"filter": "caption_length"}, make_cluster(tmp_path)
    assert score(length, cluster) == score(length) == score(cluster)


def test_why_an_npz_is_broken_stands_with_its_readers_alone(score: Any, tmp_path: Path) -> None:
    (tmp_path / "pool" / "1.npz").write_bytes(b"broken")
    length, cluster = {"filter": "caption_length"}, make_cluster(tmp_path)
    made = score(length, cluster)
    assert "npz" in made.facts["broken"]["1"]
    (tmp_path / "out" / "manifest.json").unlink()  # as if killed just before it was written
    assert score(length, cluster) == made
    with_cluster = (tmp_path / "out" / "caption_length" / "1.parquet").read_bytes()
    run_again = score({"filter": "caption_length"})
    assert run_again == made and (tmp_path / "out" / "caption_length" / "1.parquet").read_bytes() == with_cluster
    assert b"npz" not in pq.read_schema(tmp_path / "out" / "caption_length" / "1.parquet").metadata[b"winnow_pool"]
