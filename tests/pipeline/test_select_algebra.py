"""The algebra over score files against made_scores.expect, which does each step on Python dicts."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from made_plans import TYPES, WHERE, assert_as_the_oracle, cut_parts, draw_steps, kept, make_rows, make_source, to_table

from pipeline.errors import ConfigError
from pipeline.select import AtLeast, Sample, Step, Top
from pipeline.select_steps import select_rows
from pipeline.spark import sum_each
from pipeline.uid import UID_DTYPE, format_uids

HIGH, LOW = (Step(name=name, top=Top(by="big", count=70_000, lowest=name == "low")) for name in ("high", "low"))
TENTH = Step(name="tenth", sample=Sample(fraction=0.1, seed=3))


@pytest.mark.parametrize("seed", range(60))
def test_random_plans(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    rows = make_rows(draw.choice([0, 3, 60, 250, 250]), seed)
    steps = draw_steps(draw, depth=3)
    source = make_source(tmp_path / "scores", cut_parts(rows, seed), draw.choice([len(rows), len(rows) + 31]))
    assert_as_the_oracle(source, rows, steps, tmp_path)


@pytest.mark.spark
@pytest.mark.parametrize("seed", range(8))
def test_random_plans_with_sql(tmp_path: Path, spark: Any, seed: int) -> None:
    draw = random.Random(1000 + seed)
    rows = make_rows(draw.choice([120, 250]), seed)
    steps = draw_steps(draw, depth=2, sql=list(WHERE), most=2)
    source = make_source(tmp_path / "scores", cut_parts(rows, seed), len(rows), spark)
    assert_as_the_oracle(source, rows, steps, tmp_path, WHERE)


@pytest.mark.spark
def test_spark_tasks_combine_what_threads_combine(tmp_path: Path, spark: Any) -> None:
    rows = make_rows(400, 5)
    half = Step(name="half", top=Top(by="single", fraction=0.5))
    steps = [Step(name="add", add=[[half], [TENTH, Step(name="six", repeat=6)]]), Step(name="not", minus=[TENTH])]

    def spread(work: Any, groups: Any, size: int) -> np.ndarray:
        return sum_each(spark, work, groups, size, what="test")

    source = make_source(tmp_path / "scores", cut_parts(rows, 1), 400, spread=spread)
    assert_as_the_oracle(source, rows, steps, tmp_path)


def make_long_parts(num_rows: int) -> tuple[dict[str, pa.Table], np.ndarray]:
    """Parts of several batches of 65,536 rows; `big` is the row's number."""
    uids = np.zeros(num_rows, UID_DTYPE)
    uids["f0"] = np.random.default_rng(1).permutation(num_rows)
    columns = {name: pa.nulls(num_rows, pa.type_for_alias(kind)) for name, kind in TYPES.items()}
    table = pa.table({"uid": format_uids(uids)} | columns | {"big": pa.array(np.arange(num_rows))})
    return {"a": table[:9], "b": table[9:], "c": table[:0]}, uids


def test_parts_of_many_batches(tmp_path: Path) -> None:
    num_rows = 200_003
    parts, uids = make_long_parts(num_rows)
    source = make_source(tmp_path / "scores", parts, num_rows)
    steps = [
        Step(name="ends", add=[[HIGH], [LOW, Step(name="twice", repeat=2)], [LOW]]),
        Step(name="few", intersect=[[], [Step(name="floor", at_least=AtLeast(by="big", value=69_000))]]),
    ]
    selection = select_rows(source, steps, str(tmp_path / "scratch"))
    copies = np.zeros(num_rows, int)
    copies[69_000:70_000], copies[num_rows - 70_000 :] = 3, 1
    assert kept(selection, tmp_path) == format_uids(np.sort(np.repeat(uids, copies))).to_pylist()
    assert selection.rows == 71_000


def test_copies_go_through_every_rule(tmp_path: Path) -> None:
    rows = make_rows(300, 4)
    half, twice, thrice = Step(name="half", sample=Sample(fraction=0.5)), *(Step(name=f"{n}", repeat=n) for n in (2, 3))
    steps = [
        Step(name="add", add=[[], [half]]),
        twice,
        thrice,
        Step(name="not", minus=[TENTH]),
        Step(name="top", top=Top(by="double", fraction=0.7)),
        Step(name="union", union=[[half], [TENTH, twice]]),
        Step(name="again", sample=Sample(fraction=0.9, of="input", seed=1)),
        Step(name="both", intersect=[[twice], [thrice]]),
        Step(name="then", cascade=[twice, Step(name="floor", at_least=AtLeast(by="double", value=-0.3))]),
    ]
    source = make_source(tmp_path / "scores", cut_parts(rows, 3), 300)
    selection = assert_as_the_oracle(source, rows, steps, tmp_path)
    uids = kept(selection, tmp_path)
    assert {uids.count(uid) for uid in uids} == {24, 48, 96}


def test_a_sample_is_the_same_whatever_the_parts_and_grows_with_its_fraction(tmp_path: Path) -> None:
    rows = make_rows(300, 2)
    drawn = []
    for number, fraction in enumerate([0.1, 0.1, 0.4]):
        source = make_source(tmp_path / f"{number}", cut_parts(rows[:: (-1) ** number], number), 300)
        step = Step(name="s", sample=Sample(fraction=fraction, seed=7))
        drawn.append(kept(select_rows(source, [step], str(tmp_path / f"{number}" / "scratch")), tmp_path))
    assert drawn[0] == drawn[1] and set(drawn[0]) < set(drawn[2])


def test_datacomp_keeps_nothing_when_a_nan_stands_at_its_place(tmp_path: Path) -> None:
    """10 rows of which 6 have a score: index 5 of the descending sort is the last score, 6 to 9 are NaN, 10 is none."""
    rows = [row | {"single": float(n) if n < 6 else None} for n, row in enumerate(make_rows(10, 9))]
    source = make_source(tmp_path / "scores", {"a": to_table(rows)}, 10)
    sizes = {}
    for fraction in (0.5, 0.6, 0.9, 1.0):
        top = Top(by="single", fraction=fraction, ties="datacomp")
        selection = assert_as_the_oracle(source, rows, [Step(name="top", top=top)], tmp_path / f"{fraction}")
        sizes[fraction] = selection.rows
    assert sizes == {0.5: 6, 0.6: 0, 0.9: 0, 1.0: 6}


def test_at_least_compares_in_the_columns_own_type(tmp_path: Path) -> None:
    """float32(0.7) is less than 0.7, and float16(0.7) is more."""
    single, half = float(np.float32(0.7)), float(np.float16(0.7))
    assert single < 0.7 < half
    rows = [row | {"single": single, "half": half, "double": single} for row in make_rows(3, 0)]
    source = make_source(tmp_path / "scores", {"a": to_table(rows)}, 3)
    for by, passing in (("single", 3), ("half", 3), ("double", 0)):
        step = Step(name="s", at_least=AtLeast(by=by, value=0.7))
        assert assert_as_the_oracle(source, rows, [step], tmp_path / by).rows == passing


def test_select_rows_checks_its_steps(tmp_path: Path) -> None:
    source = make_source(tmp_path / "scores", {"a": to_table(make_rows(3, 0))}, 3)
    with pytest.raises(ConfigError, match="uses subset 'x'"):
        select_rows(source, [Step(name="u", use="x")], str(tmp_path / "scratch"))
