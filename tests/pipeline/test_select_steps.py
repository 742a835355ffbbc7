"""Select over score files against select written the obvious way (made_scores.expect)."""

import math
import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from made_plans import (
    OWNERS,
    TYPES,
    WHERE,
    assert_as_the_oracle,
    cut_parts,
    draw_top,
    kept,
    make_rows,
    make_source,
    to_table,
)
from made_scores import write_scores

from pipeline.errors import ConfigError, PoolError, StageError
from pipeline.select import Step, Top
from pipeline.select_steps import select_rows, write_kept
from pipeline.select_table import Passing, ScoreTable, clean_batch, group_parts, sum_in_threads
from pipeline.spark import sum_each
from pipeline.storage import list_folder
from pipeline.uid import UID_DTYPE, format_uids


@pytest.mark.parametrize("seed", range(60))
def test_cascades_of_tops(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    rows = make_rows(draw.choice([0, 1, 2, 40, 300]), seed)
    steps = [draw_top(draw, f"top {n}") for n in range(draw.choice([1, 1, 2, 3]))]
    source = make_source(tmp_path / "scores", cut_parts(rows, seed), draw.choice([len(rows), len(rows) + 31]))
    assert_as_the_oracle(source, rows, steps, tmp_path)


@pytest.mark.spark
@pytest.mark.parametrize("seed", range(16))
def test_cascades_with_sql(tmp_path: Path, spark: Any, seed: int) -> None:
    draw = random.Random(seed)
    rows = make_rows(draw.choice([0, 1, 200, 400]), seed)
    kinds = draw.choice(["wt", "tw", "ww", "wtw", "wwtwt", "twtw"])
    sql = draw.sample(list(WHERE)[: len(WHERE) - (draw.random() < 0.7)], kinds.count("w"))
    steps = [
        Step(name=f"where {n}", where=sql.pop()) if kind == "w" else draw_top(draw, f"top {n}")
        for n, kind in enumerate(kinds)
    ]
    source = make_source(tmp_path / "scores", cut_parts(rows, seed), len(rows), spark)
    assert_as_the_oracle(source, rows, steps, tmp_path, WHERE)


@pytest.mark.spark
def test_spark_tasks_count_what_threads_count(tmp_path: Path, spark: Any) -> None:
    rows = make_rows(500, 3)
    steps = [Step(name="top", top=Top(by="single", fraction=0.33)), Step(name="next", top=Top(by="double", count=40))]

    def spread(work: Any, groups: Any, size: int) -> np.ndarray:
        return sum_each(spark, work, groups, size, what="test")

    source = make_source(tmp_path / "scores", cut_parts(rows, 1), 500, spark, spread=spread)
    assert_as_the_oracle(source, rows, steps, tmp_path)


@pytest.mark.spark
def test_spark_task_that_fails_says_why(tmp_path: Path, spark: Any) -> None:
    rows = make_rows(20, 0) + [make_rows(1, 1)[0] | {"uid": "no uid"}]
    source = make_source(tmp_path / "scores", {"a": to_table(rows)}, 21)
    work = partial(write_kept, source.table, Passing(), str(tmp_path / "runs"))
    with pytest.raises(PoolError, match="part 'a': uid 'no uid' in row 20"):
        select_rows(source, [], str(tmp_path / "scratch"))
    with pytest.raises(StageError, match=r"a worker failed.*uid 'no uid' in row 20"):
        sum_each(spark, work, group_parts(source.parts), 1, what="test")


def test_parts_of_many_batches_and_files_cut_otherwise(tmp_path: Path) -> None:
    """Several batches of 65,536 rows, whose row groups differ from file to file; all rows of a part tie in one step."""
    num_rows, rng = 150_001, np.random.default_rng(0)
    uids = np.zeros(num_rows, UID_DTYPE)
    uids["f1"] = rng.permutation(num_rows)
    columns = {
        "single": pa.array(rng.integers(0, 5, num_rows), pa.float32()),
        "half": pa.nulls(num_rows, pa.float16()),
        "double": pa.array(np.zeros(num_rows)),
        "words": pa.array(rng.integers(0, 1000, num_rows), pa.int32()),
        "big": pa.nulls(num_rows, pa.int64()),
        "lang": pa.nulls(num_rows, pa.string()),
    }
    parts = {"a": pa.table({"uid": format_uids(uids)} | columns)}
    source = make_source(tmp_path / "scores", parts, num_rows)
    steps = [Step(name="a", top=Top(by="single", count=70_000)), Step(name="b", top=Top(by="double", count=12_345))]
    selection = select_rows(source, steps, str(tmp_path / "scratch"))
    order = np.lexsort((uids["f1"], -columns["single"].to_numpy()))[:70_000]
    assert kept(selection, tmp_path) == format_uids(np.sort(uids[order])[:12_345]).to_pylist()
    assert selection.counts["b"].kept == 12_345


@pytest.mark.spark
def test_masks_of_parts_of_many_batches(tmp_path: Path, spark: Any) -> None:
    num_rows = 140_003
    uids = np.zeros(num_rows, UID_DTYPE)
    uids["f0"] = np.random.default_rng(1).permutation(num_rows)
    words = (np.arange(num_rows) * 7) % 10
    nulls = {c: pa.nulls(num_rows, pa.type_for_alias(TYPES[c])) for c in ("single", "half", "double", "lang")}
    columns = nulls | {"words": pa.array(words, pa.int32()), "big": pa.array(np.arange(num_rows))}
    table = pa.table({"uid": format_uids(uids)} | columns)
    source = make_source(tmp_path / "scores", {"a": table[:9], "b": table[9:], "c": table[:0]}, num_rows, spark)
    steps = [
        Step(name="words", where="words > 6"),
        Step(name="late", top=Top(by="big", count=20_000)),
        Step(name="odd", where="big % 2 = 1"),
    ]
    selection = select_rows(source, steps, str(tmp_path / "scratch"))
    rows = np.flatnonzero(words > 6)[-20_000:]
    expected = uids[rows[rows % 2 == 1]]
    assert kept(selection, tmp_path) == format_uids(np.sort(expected)).to_pylist()


@pytest.mark.spark
def test_sql_sees_only_rows_that_reached_it(tmp_path: Path, spark: Any) -> None:
    """In ANSI SQL a division by zero is an error: the rows that would divide are dropped by the step before."""
    rows = [row | {"words": n % 3, "big": 6} for n, row in enumerate(make_rows(90, 0))]
    source = make_source(tmp_path / "scores", cut_parts(rows, 2), 90, spark)
    steps = [Step(name="not zero", where="words <> 0"), Step(name="ratio", where="big / words > 4")]
    selection = select_rows(source, steps, str(tmp_path / "scratch"))
    assert selection.counts["ratio"].read == 60 and selection.counts["ratio"].kept == 30
    with pytest.raises(ConfigError, match="not a Spark SQL boolean"):
        select_rows(source, steps[1:], str(tmp_path / "again"))


@pytest.mark.spark
@pytest.mark.parametrize("where", ["words >", "words + single", "nosuchfunction(words)", "words"])
def test_bad_sql_is_a_config_error(tmp_path: Path, spark: Any, where: str) -> None:
    source = make_source(tmp_path / "scores", {"a": to_table(make_rows(5, 0))}, 5, spark)
    with pytest.raises(ConfigError, match="not a Spark SQL boolean"):
        select_rows(source, [Step(name="w", where=where)], str(tmp_path / "scratch"))


def test_whole_numbers_beyond_float64_are_refused(tmp_path: Path) -> None:
    rows = [row | {"big": 2**53 + 1} for row in make_rows(3, 0)]
    source = make_source(tmp_path / "scores", {"a": to_table(rows)}, 3)
    with pytest.raises(PoolError, match="int64 cannot be ordered"):
        select_rows(source, [Step(name="t", top=Top(by="big", count=1))], str(tmp_path / "scratch"))


@pytest.mark.parametrize("fault", ["absent", "shorter", "other rows"])
def test_score_files_that_disagree(tmp_path: Path, fault: str) -> None:
    rows, folder = make_rows(30, 0), tmp_path / "scores"
    source = make_source(folder, {"a": to_table(rows)}, 30)
    other = {"absent": rows, "shorter": rows[:-1], "other rows": rows[::-1]}[fault]
    write_scores(tmp_path / "other", {"a": to_table(other)}, OWNERS)
    (folder / "dfn" / "a.parquet").unlink()
    if fault != "absent":
        (tmp_path / "other" / "dfn" / "a.parquet").rename(folder / "dfn" / "a.parquet")
    with pytest.raises(PoolError, match=r"no scores of 'dfn'|differ in rows|name other rows"):
        source.table.measure(["a"])
        select_rows(source, [Step(name="t", top=Top(by="single", count=3))], str(tmp_path / "scratch"))


def test_nan_becomes_null() -> None:
    batch = pa.RecordBatch.from_pydict({"x": pa.array([1.0, math.nan, None], pa.float32()), "s": ["a", "b", None]})
    assert clean_batch(batch).to_pydict() == {"x": [1.0, None, None], "s": ["a", "b", None]}


def test_groups_hold_every_part_once(tmp_path: Path) -> None:
    parts = ScoreTable({}, {}).measure([])
    assert parts == [] and group_parts(parts) == []
    assert sum_in_threads(lambda group: np.ones(2, np.int64), [], 2).tolist() == [0, 0]
    assert list_folder(str(tmp_path)) == []
