"""Mixtures, quotas, balancing and caps over score files against the same rules on Python dicts (made_joint.py)."""

import itertools
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from made_plans import TYPES, assert_as_the_oracle, kept, make_rows, to_table
from made_scores import Row, write_scores

from pipeline.errors import ConfigError, PoolError
from pipeline.select import AtLeast, Sample, Step, Top
from pipeline.select_rules import Balance, HardCap, Quota, SoftCap
from pipeline.select_source import Source
from pipeline.select_steps import Selection, select_rows
from pipeline.select_table import ScoreTable, group_parts
from pipeline.spark import sum_each

JOINT = {
    "cluster": pa.int32(),
    "distance": pa.float32(),
    "isolation": pa.float32(),
    "logit": pa.float32(),
    "entries": pa.list_(pa.int32()),
}
OWNERS = {c: "all" for c in [*TYPES, *JOINT]}
MIXED = {"mix": {"single": 0.5, "double": -2.0, "words": 0.25}}


def make_joint_rows(num_rows: int, seed: int) -> list[Row]:
    """Rows of made_plans with clusters, distances with ties, lists of entries, and nulls and NaN in all of them."""
    draw = random.Random(seed)
    isolations = [draw.choice([None, math.nan, 0.1, 0.5, 0.9]) for _ in range(9)]

    def single(value: float) -> float:
        return float(np.float32(value))

    rows = []
    for row in make_rows(num_rows, seed):
        cluster = draw.choice([None, -1, *range(9), 0, 0, 0])
        joint = {
            "cluster": cluster,
            "distance": draw.choice([None, math.nan, *(single(n / 10) for n in range(-1, 10))]),
            "isolation": None if cluster is None or cluster < 0 else isolations[cluster],
            "logit": draw.choice([None, math.nan, math.inf, *(single(n / 7) for n in range(-20, 20))]),
            "entries": None if draw.random() < 0.1 else draw.sample(range(12), draw.choice([0, 0, 1, 1, 2, 4])),
        }
        rows.append(row | {name: single(v) if isinstance(v, float) else v for name, v in joint.items()})
    return rows


def make_joint_source(folder: Path, rows: Sequence[Row], cuts: Sequence[int], num_pool: int, **settings: Any) -> Source:
    """The rows in parts that begin at the cuts."""
    borders = [0, *cuts, len(rows)]
    parts = {f"{n:08d}": to_joint_table(rows[a:b]) for n, (a, b) in enumerate(itertools.pairwise(borders))}
    write_scores(folder, parts, OWNERS)
    table = ScoreTable({"all": str(folder / "all")}, OWNERS)
    types = TYPES | {name: str(kind) for name, kind in JOINT.items()}
    return Source(table, table.measure(list(parts)), types, num_pool, lambda: None, **settings)


def to_joint_table(rows: Sequence[Row]) -> pa.Table:
    table = to_table(rows)
    for name, kind in JOINT.items():
        table = table.append_column(name, pa.array([row[name] for row in rows], kind))
    return table


def assert_as_expected(
    folder: Path, rows: Sequence[Row], steps: Sequence[Step], cuts: Sequence[int] = (), more: int = 0
) -> Selection:
    source = make_joint_source(folder / "scores", rows, cuts, len(rows) + more)
    return assert_as_the_oracle(source, rows, steps, folder)


def draw_amount(draw: random.Random) -> dict[str, Any]:
    share = {"fraction": draw.choice([0.0, 0.001, 0.1, 0.33, 0.5, 0.9, 1.0])}
    return draw.choice([share, share, {"count": draw.choice([0, 1, 2, 50, 1000])}]) | {
        "of": draw.choice(["pool", "input"])
    }


def draw_quota(draw: random.Random) -> dict[str, Any]:
    settings = {"temperature": draw.choice([0.01, 0.5, 3]), "min_share": draw.choice([0, 0.5, 1])}
    settings |= {"keep": draw.choice(["hard", "easy", "random"]), "seed": draw.choice([0, -3])}
    where = {"cluster": "cluster", "distance": "distance", "isolation": "isolation"}
    return {"quota": Quota(**where, **settings, **draw_amount(draw))}


def draw_balance(draw: random.Random) -> dict[str, Any]:
    return {"balance": Balance(entries="entries", t=draw.choice([1, 3, 10, 1000]), seed=draw.choice([0, 7]))}


def draw_ranking(draw: random.Random) -> dict[str, Any]:
    return draw.choice([{"by": "logit"}, {"by": "double"}, MIXED | {"norm": draw.choice(["minmax", "z", "none"])}])


def draw_soft(draw: random.Random) -> dict[str, Any]:
    settings = {"alpha": draw.choice([0, 0.15, 2.0]), "batch": draw.choice([1, 7, 1000])}
    settings |= {"temperature": draw.choice([0.2, 1]), "seed": draw.choice([0, 5])}
    return {"soft_cap": SoftCap(**draw_ranking(draw), **settings, **draw_amount(draw))}


def draw_hard(draw: random.Random) -> dict[str, Any]:
    settings = {"cap": draw.choice([1, 3, 15]), "temperature": draw.choice([0.2, 1]), "seed": draw.choice([0, 5])}
    return {"hard_cap": HardCap(**draw_ranking(draw), **settings, **draw_amount(draw))}


def draw_mixed(draw: random.Random) -> dict[str, Any]:
    ranking = MIXED | {"norm": draw.choice(["minmax", "z", "none"])}
    if draw.random() < 0.3:
        return {"at_least": AtLeast(**ranking, value=draw.choice([-1, 0, 0.3]))}
    ties, lowest = draw.choice(["exact", "datacomp"]), draw.random() < 0.3
    return {"top": Top(**ranking, **draw_amount(draw), ties=ties, lowest=lowest)}


RULES: list[Callable[[random.Random], dict[str, Any]]] = [draw_quota, draw_balance, draw_soft, draw_hard, draw_mixed]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("rule", RULES, ids=["quota", "balance", "soft", "hard", "mix"])
def test_one_rule(tmp_path: Path, rule: Callable[[random.Random], dict[str, Any]], seed: int) -> None:
    draw = random.Random(seed)
    rows = make_joint_rows(draw.choice([0, 1, 2, 40, 200]), seed)
    cuts = sorted(draw.randint(0, len(rows)) for _ in range(draw.choice([0, 1, 4])))
    assert_as_expected(tmp_path, rows, [Step(name="a", **rule(draw))], cuts, draw.choice([0, 17]))


@pytest.mark.parametrize("seed", range(20))
def test_rules_after_rules_and_in_branches(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    rows = make_joint_rows(150, seed)

    def some() -> Step:
        more = [{"sample": Sample(fraction=0.8, of="input")}, {"repeat": 2}]
        return Step(name=f"s{draw.randrange(10**9)}", **draw.choice([*(rule(draw) for rule in RULES), *more]))

    branches = [[some(), some()], [some()]]
    steps = [some(), Step(name="both", **{draw.choice(["union", "intersect", "add"]): branches}), some()]
    assert_as_expected(tmp_path, rows, [*steps, Step(name="not", minus=[some()])], [40, 41, 90])


@pytest.mark.spark
@pytest.mark.parametrize("rule", RULES, ids=["quota", "balance", "soft", "hard", "mix"])
def test_neither_the_order_of_rows_nor_the_workers_matter(
    tmp_path: Path, rule: Callable[[random.Random], dict[str, Any]], spark: Any
) -> None:
    rows, steps = make_joint_rows(200, 1), [Step(name="a", **rule(random.Random(2)))]
    other = random.Random(0).sample(rows, len(rows))

    def spread(work: Any, groups: Any, size: int) -> np.ndarray:
        return sum_each(spark, work, groups, size, what="test")

    first = make_joint_source(tmp_path / "a", rows, [], 200)
    second = make_joint_source(tmp_path / "b", other, [10, 10, 150], 200, spread=spread)
    found = [select_rows(source, steps, str(tmp_path / f"scratch-{n}")) for n, source in enumerate((first, second))]
    assert (found[0].counts, found[0].thresholds, found[0].found) == (
        found[1].counts,
        found[1].thresholds,
        found[1].found,
    )
    assert kept(found[0], tmp_path) == kept(found[1], tmp_path)


def test_groups_of_parts_are_listed_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.select_table.GROUP_ROWS", 20)
    rows = make_joint_rows(100, 3)
    source = make_joint_source(tmp_path / "scores", rows, [20, 40, 60, 80], 100)
    assert len(group_parts(source.parts)) == 5
    assert_as_the_oracle(source, rows, [Step(name="a", top=Top(**MIXED, norm="minmax", count=20))], tmp_path)


@pytest.mark.parametrize(
    ("column", "value", "rule", "message"),
    [
        ("cluster", 2**30, "quota", "cluster has cluster 1073741824; a quota's are below"),
        ("distance", 100.0, "quota", "distance has 100.0; a quota's distances lie within 64"),
        ("isolation", -math.inf, "quota", "isolation has inf; a quota's distances"),
        ("entries", [3, None], "balance", "a list of entries has entry null or less than 0"),
        ("entries", [2**30], "balance", r"has entry 1073741824; entries are numbers in \[0, 16,777,216\)"),
    ],
)
def test_what_no_rule_can_use_is_told_unless_it_was_dropped(
    tmp_path: Path, column: str, value: Any, rule: str, message: str
) -> None:
    rows = make_joint_rows(50, 1)
    rows = [row | {"big": 0, "cluster": 1, "distance": 0.5, "isolation": 0.5} for row in rows]
    rows[7] |= {column: value, "big": -7}
    step = (
        Step(name="a", **draw_quota(random.Random(1)))
        if rule == "quota"
        else Step(name="a", balance=Balance(entries="entries", t=3))
    )
    source = make_joint_source(tmp_path / "scores", rows, [], 50)
    with pytest.raises(PoolError, match=message):
        select_rows(source, [step], str(tmp_path / "scratch"))
    kept_others = Step(name="others", at_least=AtLeast(by="big", value=0))
    assert_as_the_oracle(source, rows, [kept_others, step], tmp_path)


def test_copies_of_a_cap_are_bounded(tmp_path: Path) -> None:
    """What the caps multiply is known when they have run."""
    rows = [row | {"logit": 1.0} for row in make_joint_rows(1, 0)]
    source = make_joint_source(tmp_path / "scores", rows, [], 1)
    draws = Step(name="many", hard_cap=HardCap(by="logit", count=30_000, cap=30_000))
    for more in (
        Step(name="r", repeat=3),
        Step(name="r", soft_cap=SoftCap(by="logit", count=3)),
        Step(name="r", add=[[], [], []]),
    ):
        with pytest.raises(ConfigError, match=r"'r': a row could get 90,000 copies; at most 65,535"):
            select_rows(source, [draws, more], str(tmp_path / "scratch"))
    found = select_rows(source, [draws, Step(name="r", repeat=2)], str(tmp_path / "scratch"))
    assert len(kept(found, tmp_path)) == 60_000
