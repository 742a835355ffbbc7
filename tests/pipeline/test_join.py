"""Foreign tables joined to score files, against a dictionary."""

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_scores import write_scores

from jobs.stage_select import run_select
from pipeline.errors import ConfigError, PoolError, StageError
from pipeline.join import open_tables
from pipeline.select import Step, Top
from pipeline.subset import read_subset
from pipeline.uid import format_uids

OWNERS = {"score": "clip", "words": "length"}


def write_pool(folder: Path, uids: list[str]) -> str:
    """Scores of the uids in three parts, one of them empty; `words` is the place of the row."""
    num = len(uids)
    scores = [n / num for n in range(num)]
    table = pa.table({"uid": uids, "score": pa.array(scores, pa.float32()), "words": pa.array(range(num), pa.int32())})
    third = num // 3
    parts = {"00000000": table[:third], "00000001": table[:0], "00000002": table[third:]}
    return str(write_scores(folder, parts, OWNERS))


def draw_uids(num: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [f"{draw.getrandbits(128):032x}" for _ in range(num)]


def write_table(url: Path, uids: list[str], values: list[float | None], *, kind: str = "text") -> Path:
    column = pa.array(uids) if kind == "text" else pa.array([bytes.fromhex(u) for u in uids], pa.binary(16))
    if kind == "large":
        column = pa.array(uids, pa.large_string())
    table = pa.table({"uid": column, "nice": values, "tag": [f"t{n % 3}" for n in range(len(uids))]})
    url.parent.mkdir(exist_ok=True)
    pq.write_table(table, url, row_group_size=17)
    return url


@pytest.mark.spark
@pytest.mark.parametrize("kind", ["text", "large", "bytes"])
def test_rules_over_joined_columns(tmp_path: Path, spark: Any, kind: str) -> None:
    uids = draw_uids(100)
    uids[60] = uids[3]  # two rows of the pool may share a uid: both get the value
    scores = write_pool(tmp_path / "scores", uids)
    known = sorted(set(uids[:80] + draw_uids(50, seed=1)), key=lambda u: u[::-1])
    nice = {u: None if n % 9 == 0 else float("nan") if n % 9 == 1 else float(n % 20) for n, u in enumerate(known)}
    for half in (0, 1):
        write_table(tmp_path / "nice" / f"{half}.parquet", known[half::2], [nice[u] for u in known[half::2]], kind=kind)
    write_table(tmp_path / "more.parquet", uids[50:60], [0.0] * 10)
    pq.write_table(
        pq.read_table(tmp_path / "more.parquet").rename_columns(["uid", "more", "other"]), tmp_path / "more.parquet"
    )
    steps = [
        Step(name="late", where="words >= 20 AND (more = 0 OR nice > 2)"),
        Step(name="nice", top=Top(by="nice", count=25, ties="exact")),
    ]
    tables = [str(tmp_path / "nice"), str(tmp_path / "more.parquet")]
    made = run_select(lambda: spark, scores, "s", steps, str(tmp_path / "out"), tables=tables)

    def is_late(n: int) -> bool:
        value = nice.get(uids[n])
        return n >= 20 and (50 <= n < 60 or uids[n] in uids[50:60] or (value is not None and value > 2))

    late = [n for n in range(100) if is_late(n)]
    scored = [n for n in late if nice.get(uids[n]) is not None and nice[uids[n]] == nice[uids[n]]]
    best = sorted(scored, key=lambda n: (-(nice[uids[n]] or 0), uids[n]))[:25]
    expected = sorted({uids[n] for n in best})
    assert format_uids(read_subset(str(tmp_path / "out" / "s.npy"))).to_pylist() == expected
    assert made.counts["late"].kept == made.counts["nice"].read == len(late)
    assert made.counts["nice"].dropped["no_score"] == len(late) - len(scored)
    assert len(made.parents) == 3
    assert not list((tmp_path / "out").glob(".tmp*"))
    again = run_select(lambda: pytest.fail("done"), scores, "s", steps, str(tmp_path / "out"), tables=tables)
    assert again == made
    write_table(tmp_path / "nice" / "0.parquet", known[::2], [5.0] * len(known[::2]), kind=kind)
    changed = run_select(lambda: spark, scores, "s", steps, str(tmp_path / "out"), tables=tables)
    assert changed.identity != made.identity


@pytest.mark.spark
def test_a_uid_that_stands_twice_is_named(tmp_path: Path, spark: Any) -> None:
    uids = draw_uids(10)
    scores = write_pool(tmp_path / "scores", uids)
    twice = ["f" * 32, *draw_uids(4, seed=2), "f" * 32]
    write_table(tmp_path / "t.parquet", twice, [1.0] * 6)
    with pytest.raises(PoolError, match=r"uid f{32} stands more than once in .*t\.parquet"):
        steps = [Step(name="a", top=Top(by="nice", count=1))]
        run_select(lambda: spark, scores, "s", steps, str(tmp_path / "out"), tables=[str(tmp_path / "t.parquet")])


@pytest.mark.spark
def test_a_bad_uid_is_named_with_its_file(tmp_path: Path, spark: Any) -> None:
    scores = write_pool(tmp_path / "scores", draw_uids(10))
    write_table(tmp_path / "t.parquet", [*draw_uids(3), "DEADBEEF"], [1.0] * 4)
    with pytest.raises(StageError, match=r"t\.parquet, row group 0: uid 'DEADBEEF' in row 3"):
        steps = [Step(name="a", top=Top(by="nice", count=1))]
        run_select(lambda: spark, scores, "s", steps, str(tmp_path / "out"), tables=[str(tmp_path / "t.parquet")])


def test_a_table_that_no_step_reads_is_not_joined(tmp_path: Path) -> None:
    uids = draw_uids(9)
    scores, table = write_pool(tmp_path / "scores", uids), write_table(tmp_path / "t.parquet", uids, [1.0] * 9)
    steps = [Step(name="a", top=Top(by="score", count=2))]
    run_select(lambda: pytest.fail("no Spark"), scores, "s", steps, str(tmp_path / "out"), tables=[str(table)])
    assert len(read_subset(str(tmp_path / "out" / "s.npy"))) == 2


@pytest.mark.parametrize("fault", ["none", "no uid", "two schemas", "no parquet", "twice"])
def test_tables_that_cannot_be_joined(tmp_path: Path, fault: str) -> None:
    table = write_table(tmp_path / "t" / "a.parquet", draw_uids(3), [1.0] * 3)
    patterns = [str(tmp_path / "t")]
    if fault == "none":
        table.unlink()
    elif fault == "no uid":
        pq.write_table(pa.table({"id": [1]}), table)
    elif fault == "two schemas":
        pq.write_table(pa.table({"uid": ["0" * 32], "nice": [1]}), tmp_path / "t" / "b.parquet")
    elif fault == "no parquet":
        table.write_bytes(b"PAR?")
    else:
        patterns *= 2
    with pytest.raises((PoolError, ConfigError), match=r"no file|no column 'uid'|one schema|not a parquet|rename one"):
        open_tables(patterns)


def test_a_column_of_both_is_refused(tmp_path: Path) -> None:
    scores = write_pool(tmp_path / "scores", draw_uids(4))
    pq.write_table(pa.table({"uid": draw_uids(4), "score": [1.0] * 4}), tmp_path / "t.parquet")
    with pytest.raises(ConfigError, match=r"'score' of .* stands in the scores too"):
        run_select(lambda: None, scores, "s", [], str(tmp_path / "out"), tables=[str(tmp_path / "t.parquet")])


@pytest.mark.spark
def test_foreign_columns_that_spark_finds_hard(tmp_path: Path, spark: Any) -> None:
    uids = draw_uids(9)
    scores, url = write_pool(tmp_path / "scores", uids), str(tmp_path / "t.parquet")
    hashes, days = pa.array(range(9), pa.uint64()), ["2020-02-02"] * 8 + ["soon"]
    pq.write_table(pa.table({"uid": uids, "hash": hashes, "day": days, "a.b": [float(n) for n in range(9)]}), url)

    def keep(**rule: Any) -> int:
        steps = [Step(name="rule", **rule)]
        return run_select(lambda: spark, scores, "s", steps, str(tmp_path / "out"), tables=[url]).counts["rule"].kept

    assert keep(top=Top(by="a.b", count=2)) == 2
    with pytest.raises(ConfigError, match="no type like uint64: write the column as int64"):
        keep(top=Top(by="hash", count=2))
    with pytest.raises(ConfigError, match="rule: to_date"):
        keep(where="to_date(day) > '2020-01-01'")
