"""NormSim-D against plain loops: every round's moment, values and ties; none, all and equal rows."""

import math
from typing import Any

import numpy as np
import pytest
from made_embeddings import draw, draw_uids

from pipeline.errors import ConfigError, PoolError
from pipeline.gather import gather_rows
from pipeline.norm_sim_d import NormSimDConfig, find_lowest, fit_survivors, sum_moment


def survive(uids: np.ndarray, vector_ND: np.ndarray, *args: Any) -> np.ndarray:
    with gather_rows([(uids, vector_ND)]) as rows:
        return fit_survivors(rows, *args)


def moment(rows: list[list[float]]) -> list[list[float]]:
    """Mean of u u'."""
    dims = range(len(rows[0]))
    return [[math.fsum(u[i] * u[j] for u in rows) / len(rows) for j in dims] for i in dims]


def value(u: list[float], s: list[list[float]]) -> float:
    dims = range(len(u))
    return float(np.float32(math.fsum(u[i] * s[i][j] * u[j] for i in dims for j in dims)))


def unit(row: np.ndarray) -> list[float]:
    length = math.sqrt(math.fsum(float(x) ** 2 for x in row))
    return [float(x) / length for x in row]


def loop(
    units: dict[int, list[float]], num_kept: int, rounds: int, first: list[list[float]] | None
) -> tuple[dict[int, int], dict[int, float]]:
    """Round and value by uid, as the paper says, in Python floats."""
    left, found, values, number = sorted(units), {}, {}, 0
    step = math.ceil(max(len(left) - num_kept, 0) / rounds)
    while len(left) > num_kept:
        number += 1
        s = first if first and number == 1 else moment([units[uid] for uid in left])
        scored = sorted((value(units[uid], s), uid) for uid in left)
        for score, uid in scored[: min(step, len(left) - num_kept)]:
            found[uid], values[uid] = number, score
            left.remove(uid)
    for uid in left:
        found[uid], values[uid] = number + 1, value(units[uid], moment([units[u] for u in left]))
    return found, values


@pytest.mark.parametrize("num_kept", [0, 1, 13, 60, 70, 99])
@pytest.mark.parametrize("rounds", [1, 7, 500])
@pytest.mark.parametrize("first", ["pool", "rows"])
def test_as_plain_loops(num_kept: int, rounds: int, first: str) -> None:
    uids, vector_ND = draw_uids(70), draw(70, 4, dtype=np.float32)
    uids["f0"] >>= np.uint64(1)
    vector_ND[10:20] = vector_ND[10]  # ties go by uid
    vector_ND[::3] *= 9
    units = {int(uid): unit(row) for uid, row in zip(uids["f0"], vector_ND, strict=True)}
    pool_ND = draw(200, 4, seed=5)
    s_DD, number = sum_moment([pool_ND[:90], np.full((3, 4), np.nan), np.zeros((2, 4)), pool_ND[90:]])
    of_pool = moment([unit(row) for row in pool_ND])
    np.testing.assert_allclose(s_DD / number, of_pool, rtol=1e-12)
    table = survive(uids, vector_ND, num_kept, rounds, s_DD / number if first == "pool" else None)
    wanted, values = loop(units, num_kept, rounds, of_pool if first == "pool" else None)
    assert table["f0"].tolist() == sorted(units)
    assert dict(zip(table["f0"].tolist(), table["round"].tolist(), strict=True)) == wanted
    for uid, found in zip(table["f0"].tolist(), table["value"].tolist(), strict=True):
        assert found == pytest.approx(values[uid], rel=1e-6, abs=1e-12)
    assert table["kept"].sum() == min(num_kept, 70)
    assert (table["round"][table["kept"]] == table["round"].max()).all()


def test_equal_rows_go_by_uid() -> None:
    table = survive(draw_uids(20), np.tile(draw(1), (20, 1)), 5, 3)
    assert table["round"].tolist() == [1] * 5 + [2] * 5 + [3] * 5 + [4] * 5
    np.testing.assert_allclose(table["value"], 1, rtol=1e-6)


def test_a_pool_of_two_models_is_refused() -> None:
    with pytest.raises(PoolError, match="embeddings of 16 float16 and of 8 float16 cannot stand in one matrix"):
        sum_moment([draw(9), draw(9, 8)])


def test_no_rows() -> None:
    assert len(survive(draw_uids(0), draw(0), 5, 3)) == 0
    assert sum_moment([])[1] == 0


def test_the_order_of_the_pool_does_not_matter() -> None:
    uids, vector_ND = draw_uids(300), draw(300)
    assert survive(uids, vector_ND, 50, 20).tobytes() == survive(uids[::-1], vector_ND[::-1], 50, 20).tobytes()


def test_the_lowest_and_of_equal_ones_the_first() -> None:
    values = np.array([2, 1, 1, 0, 1, 3], np.float32)
    for number, wanted in ((1, [3]), (2, [1, 3]), (3, [1, 2, 3]), (4, [1, 2, 3, 4]), (6, [0, 1, 2, 3, 4, 5])):
        assert np.flatnonzero(find_lowest(values, number)).tolist() == wanted


def test_how_many_stay() -> None:
    assert NormSimDConfig(embedding="x").count_wanted(1000) == 200
    assert NormSimDConfig(embedding="x", fraction=0.29).count_wanted(100) == 29
    assert NormSimDConfig(embedding="x", count=7).count_wanted(100) == 7
    for wrong in ({"fraction": 0.2, "count": 3}, {"fraction": 1.2}, {"count": -1}, {"rounds": 0}):
        with pytest.raises(ConfigError):
            NormSimDConfig(embedding="x", **wrong)
