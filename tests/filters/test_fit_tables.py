"""The filters that look up what a fit found for each uid: semdedup and norm_sim_d."""

from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from made_embeddings import draw_uids

from filters import build_filter
from pipeline.contract import check_scored
from pipeline.errors import ConfigError
from pipeline.uid import format_uids, sort_uids
from pipeline.uid_table import make_table

UIDS = sort_uids(draw_uids(4))
BATCH = pa.RecordBatch.from_pydict({"uid": format_uids(UIDS[[2, 3, 0, 2]])})
"""The table below has the first three uids."""


def write_table(folder: Path, kind: str) -> dict[str, str]:
    numbers = np.arange(3, dtype=np.int32)
    floats = np.array([0.25, 0.5, 0.75], np.float32)
    columns = {
        "semdedup": {"cluster": numbers, "distance": floats, "isolation": floats * np.nan, "similarity": -floats},
        "norm_sim_d": {"round": numbers + 1, "kept": numbers == 2, "value": floats},
    }
    np.save(folder / "table.npy", make_table(UIDS[:3], columns[kind]))
    return {"filter": kind, "name": "x", "table": str(folder / "table.npy")}


def test_semdedup(tmp_path: Path) -> None:
    filter = build_filter(write_table(tmp_path, "semdedup"))
    scored = filter.load()(BATCH)
    check_scored(filter, BATCH, scored)
    found = dict(zip((name for name, _ in filter.makes), (c.to_pylist() for c in scored.columns), strict=True))
    assert found == {
        "x_cluster": [2, None, 0, 2],
        "x_distance": [0.75, None, 0.25, 0.75],
        "x_isolation": [None] * 4,
        "x_similarity": [-0.75, None, -0.25, -0.75],
    }
    assert [(f.position, f.reason) for f in scored.failures] == [(1, "not_fitted")]


def test_norm_sim_d(tmp_path: Path) -> None:
    filter = build_filter(write_table(tmp_path, "norm_sim_d"))
    scored = filter.load()(BATCH)
    check_scored(filter, BATCH, scored)
    found = dict(zip((name for name, _ in filter.makes), (c.to_pylist() for c in scored.columns), strict=True))
    assert found == {
        "x_round": [3, 0, 1, 3],
        "x_kept": [True, False, False, True],
        "x_value": [0.75, None, 0.25, 0.75],
    }
    assert scored.failures == ()


def test_a_table_on_a_store(tmp_path: Path) -> None:
    entry = write_table(tmp_path, "semdedup")
    fsspec.filesystem("memory").pipe_file("/fits/table.npy", (tmp_path / "table.npy").read_bytes())
    filter = build_filter(entry | {"table": "memory://fits/table.npy"})
    assert filter.identity == build_filter(entry).identity
    assert filter.load()(BATCH).columns[0].to_pylist() == [2, None, 0, 2]


@pytest.mark.parametrize("kind", ["semdedup", "norm_sim_d"])
def test_identity_and_wrong_tables(tmp_path: Path, kind: str) -> None:
    entry = write_table(tmp_path, kind)
    filter = build_filter(entry)
    (tmp_path / "table.npy").rename(tmp_path / "moved.npy")
    assert build_filter(entry | {"table": str(tmp_path / "moved.npy")}).identity == filter.identity
    with pytest.raises(ConfigError, match=f"filter 'x': there is no table at '{tmp_path}/table.npy'"):
        build_filter(entry)
    write_table(tmp_path, "norm_sim_d" if kind == "semdedup" else "semdedup")
    with pytest.raises(ConfigError, match="changed since this run began"):
        filter.load()
    with pytest.raises(ConfigError, match="another fit's"):
        build_filter(entry).load()
    for content in (b"", b"no npy", (tmp_path / "table.npy").read_bytes()[:-1]):
        (tmp_path / "table.npy").write_bytes(content)
        with pytest.raises(ConfigError, match="holds no table"):
            build_filter(entry).load()
