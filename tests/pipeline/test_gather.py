"""Rows of many batches as one matrix: order, repeated uids, rows without a direction; tables by uid."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from made_embeddings import draw, draw_uids

from pipeline.contract import Failure
from pipeline.errors import ConfigError, PoolError
from pipeline.gather import gather_rows, join_columns, spool, to_units
from pipeline.manifest import Counts
from pipeline.uid import UID_DTYPE, format_uids
from pipeline.uid_table import NOT_FITTED, find_rows, hash_table, load_lookup, make_table, open_table


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_rows_come_in_the_order_of_their_uids(tmp_path: Path, dtype: type) -> None:
    uids, vector_ND = draw_uids(500), draw(500, dtype=dtype)
    uids[7]["f0"] = uids[8]["f0"]  # only the second word tells them apart
    vector_ND[3], vector_ND[4], vector_ND[5, 2] = np.nan, 0, np.inf
    lost = [3, 4, 5]
    kept = sorted(set(range(500)) - set(lost), key=lambda n: tuple(uids[n]))
    for order in (range(500), range(499, -1, -1)):
        batches = [(uids[list(some)], vector_ND[list(some)]) for some in np.array_split(np.array(order), 7)]
        with gather_rows(batches, str(tmp_path)) as rows:
            np.testing.assert_array_equal(rows.uids, uids[kept])
            np.testing.assert_array_equal(rows.matrix_ND, vector_ND[kept])
            assert rows.matrix_ND.dtype == dtype and not list(tmp_path.iterdir())
        assert rows.counts == Counts(read=500, kept=497, failed={"missing_embedding": 3})


def test_the_first_row_of_a_uid_stands() -> None:
    uids, vector_ND = draw_uids(4)[[0, 1, 0, 0, 2]], draw(5)
    vector_ND[0] = np.nan
    with gather_rows([(uids, vector_ND)]) as rows:
        assert rows.counts == Counts(read=5, kept=3, dropped={"repeated_uid": 1}, failed={"missing_embedding": 1})
        place = rows.uids.tolist().index(tuple(uids[0]))
        np.testing.assert_array_equal(rows.matrix_ND[place], vector_ND[2])


def test_no_row_at_all() -> None:
    for batches in ([], [(draw_uids(3), np.empty((3, 0), np.float32))], [(draw_uids(3), np.zeros((3, 4)))]):
        with gather_rows(batches) as rows:
            assert len(rows.uids) == len(rows.matrix_ND) == rows.counts.kept == 0


def test_blocks_of_two_kinds_are_refused() -> None:
    for other in (draw(9, 8), draw(9, dtype=np.float32)):
        with pytest.raises(PoolError, match="cannot stand in one matrix"), spool([draw(9), other]):
            pass


def test_unit_vectors_whatever_the_size() -> None:
    rows = np.array([[3, 4], [0, 0], [3e-30, 4e-30], [3e30, -4e30], [1e-45, 0]], np.float32)
    wanted = [[0.6, 0.8], [0, 0], [0.6, 0.8], [0.6, -0.8], [1, 0]]
    np.testing.assert_allclose(to_units(rows), wanted, atol=1e-7)
    assert to_units(rows).dtype == np.float32 and to_units(rows, np.float64).dtype == np.float64


def test_columns_side_by_side() -> None:
    left = pa.array([[1.0, 2.0], None, [3.0, 4.0]], pa.list_(pa.float16()))
    right = pa.array([[5.0], [6.0], []], pa.list_(pa.float16()))
    np.testing.assert_array_equal(join_columns([left]), [[1, 2], [np.nan] * 2, [3, 4]])
    np.testing.assert_array_equal(join_columns([left, right]), [[1, 2, 5], [np.nan, np.nan, 6], [3, 4, np.nan]])
    assert join_columns([left, pa.nulls(3, pa.list_(pa.float16()))]).shape == (3, 0)


def test_a_table_is_looked_up(tmp_path: Path) -> None:
    uids = draw_uids(300)
    uids["f0"][200] = uids["f0"][0]  # only the second word tells that it is not there
    uids["f1"][200] = uids["f1"][0] - np.uint64(1)
    there = np.sort(uids[:200], order=["f0", "f1"])
    table = make_table(there, {"round": np.arange(200, dtype=np.int32), "value": np.full(200, np.nan, np.float32)})
    table["value"][5] = 0.5
    np.save(tmp_path / "table.npy", table)
    url, kinds = str(tmp_path / "table.npy"), {"round": pa.int32(), "value": pa.float32()}
    digest = hash_table("x", url)
    batch = pa.RecordBatch.from_pydict({"uid": format_uids(uids)})
    (rounds, values), failures = load_lookup(url, digest, kinds)(batch)
    number = {tuple(uid): n for n, uid in enumerate(there.tolist())}
    wanted = [number.get(tuple(uid)) for uid in uids.tolist()]
    assert rounds.to_pylist() == wanted and 5 in wanted
    assert values.to_pylist() == [0.5 if n == 5 else None for n in wanted]
    assert failures == tuple(Failure(n, "not_fitted", NOT_FITTED) for n in range(200, 300))
    assert load_lookup(url, digest, kinds)(batch[:0]).columns[0].to_pylist() == []


def test_an_empty_table_has_no_row() -> None:
    table = make_table(np.empty(0, UID_DTYPE), {"value": np.empty(0, np.float32)})
    assert not find_rows(table, draw_uids(3))[0].any()


def test_tables_that_are_not_these(tmp_path: Path) -> None:
    url = str(tmp_path / "table.npy")
    with pytest.raises(ConfigError, match="filter 'x': there is no table"):
        hash_table("x", url)
    np.save(url, make_table(draw_uids(1), {"round": np.zeros(1, np.int32)}))
    with pytest.raises(ConfigError, match="changed since this run began"):
        open_table(url, "0" * 64, ["round"])
    with pytest.raises(ConfigError, match="holds f0, f1, round, not f0, f1, kept: another fit's"):
        open_table(url, hash_table("x", url), ["kept"])
    np.save(url, np.zeros(3))
    with pytest.raises(ConfigError, match="holds float64"):
        open_table(url, hash_table("x", url), ["kept"])
