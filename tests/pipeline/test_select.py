import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.errors import ConfigError
from pipeline.select import (
    Selection,
    Step,
    Threshold,
    Top,
    clean_batch,
    count_radix,
    find_columns,
    find_threshold,
    order_keys,
    select_rows,
)
from pipeline.spark import open_table
from pipeline.uid import format_uids

SPECIAL = [0.0, -0.0, 1.5, -1.5, 1e-45, -1e-45, 3.4e38, -3.4e38, math.inf, -math.inf, 0.28, 0.28]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nth_largest_is_that_of_a_sort(dtype: type) -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([np.array(SPECIAL, dtype), rng.normal(size=300).astype(dtype), np.full(40, 0.25, dtype)])
    keys, bits = order_keys(values), 8 * values.itemsize
    for n, expected in enumerate(np.sort(values)[::-1], start=1):
        found = find_threshold(partial(count_below, keys, bits), lambda _, n=n: n, bits=bits)
        above, tied = int((values > expected).sum()), int((values == expected).sum())
        assert found == Threshold(float(expected), above, tied, n - above), n


def count_below(keys: np.ndarray, bits: int, prefix: int, depth: int) -> np.ndarray:
    return count_radix(keys, prefix=prefix, depth=depth, bits=bits)


def test_threshold_of_nothing_and_of_more_than_there_is() -> None:
    keys = order_keys(np.array([1.0, 2.0], np.float32))
    assert find_threshold(partial(count_below, keys, 32), lambda _: 0, bits=32) is None
    assert find_threshold(partial(count_below, keys[:0], 32), lambda _: 5, bits=32) is None
    assert find_threshold(partial(count_below, keys, 32), lambda n: n + 5, bits=32) == Threshold(1.0, 1, 1, 1)


def test_order_keys_sort_as_values() -> None:
    values = np.array(SPECIAL, np.float32)
    assert (np.sort(values) == values[np.argsort(order_keys(values), kind="stable")]).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "a"}, "either where or top"),
        ({"name": "a", "where": "x > 1", "top": Top(by="x", count=1)}, "either where or top"),
    ],
)
def test_step_has_one_rule(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Step(**settings)


@pytest.mark.parametrize(
    "settings", [{}, {"fraction": 0.1, "count": 3}, {"fraction": 1.1}, {"fraction": -0.1}, {"count": -1}]
)
def test_top_is_a_fraction_or_a_count(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="top by 'x'"):
        Top(by="x", **settings)


def test_columns_are_found_and_unknown_ones_named() -> None:
    steps = [Step(name="a", where="words > 2 AND language = 'chars'"), Step(name="b", top=Top(by="dfn", count=1))]
    assert find_columns(steps, ["words", "chars", "language", "dfn"]) == ["dfn", "language", "words"]
    with pytest.raises(ConfigError, match="did you mean 'dfn_score'"):
        find_columns([Step(name="b", top=Top(by="dfn_scor", count=1))], ["dfn_score"])
    with pytest.raises(ConfigError, match="did you mean 'words'"):
        find_columns([Step(name="b", where="wordz > 1")], ["words"])


def test_nan_becomes_null() -> None:
    batch = pa.RecordBatch.from_pydict({"x": pa.array([1.0, math.nan, None], pa.float32()), "s": ["a", "b", None]})
    assert clean_batch(batch).to_pydict() == {"x": [1.0, None, None], "s": ["a", "b", None]}


UIDS = [f"{n * 7919 % 1000:032x}" for n in range(1000)]
SCORES = [
    None if n % 50 == 0 else math.nan if n % 50 == 1 else np.float32(round((n % 97) / 97, 1)) for n in range(1000)
]
WORDS = [None if n % 31 == 0 else n % 10 for n in range(1000)]
SCHEMA = pa.schema([("uid", pa.string()), ("score", pa.float32()), ("words", pa.int32())])


def read_rows(bounds: tuple[int, int]) -> Iterator[pa.RecordBatch]:
    part = slice(*bounds)
    columns = [
        pa.array(UIDS[part]),
        pa.array([None if s is None else float(s) for s in SCORES[part]], pa.float32()),
        pa.array(WORDS[part], pa.int32()),
    ]
    yield clean_batch(pa.RecordBatch.from_arrays(columns, schema=SCHEMA))


def select(spark: Any, *steps: Step) -> Selection:
    table = open_table(spark, read_rows, [(0, 300), (300, 301), (301, 301), (301, 1000)], SCHEMA)
    return select_rows(table, steps, num_rows=1000)


def kept(selection: Selection) -> set[str]:
    uids: list[str] = format_uids(selection.uids).to_pylist()
    assert len(uids) == len(set(uids))
    return set(uids)


def scored() -> list[tuple[float, str]]:
    """Rows with a score, best first, equal scores by ascending uid."""
    rows = [(float(s), u) for s, u in zip(SCORES, UIDS, strict=True) if s is not None and not math.isnan(s)]
    return sorted(rows, key=lambda row: (-row[0], row[1]))


@pytest.mark.spark
def test_no_step_keeps_all(spark: Any) -> None:
    assert kept(select(spark)) == set(UIDS)


@pytest.mark.spark
def test_where_counts_nulls_apart(spark: Any) -> None:
    found = select(spark, Step(name="words", where="words > 2"), Step(name="score", where="score >= 0.5 OR words = 9"))
    words = {u for u, w in zip(UIDS, WORDS, strict=True) if w is not None and w > 2}
    assert found.counts["words"].read == 1000
    assert found.counts["words"].kept == len(words)
    assert found.counts["words"].dropped["no_score"] == sum(w is None for w in WORDS)
    expected = {
        u
        for u, w, s in zip(UIDS, WORDS, SCORES, strict=True)
        if w is not None and w > 2 and (w == 9 or (s is not None and not math.isnan(s) and s >= 0.5))
    }
    assert kept(found) == expected
    for counts in found.counts.values():
        counts.check("step")


@pytest.mark.spark
@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.3, 0.5, 1.0])
def test_top_fraction_is_exact_and_ties_go_by_uid(spark: Any, fraction: float) -> None:
    found = select(spark, Step(name="top", top=Top(by="score", fraction=fraction)))
    assert kept(found) == {u for _, u in scored()[: int(1000 * fraction)]}


@pytest.mark.spark
def test_top_as_datacomp_counts(spark: Any) -> None:
    """get_threshold: t = the value at index int(N f) of the descending sort; rows >= t are kept."""
    found = select(spark, Step(name="top", top=Top(by="score", fraction=0.3, ties="datacomp")))
    threshold = scored()[300][0]
    assert found.thresholds["top"] == threshold
    assert kept(found) == {u for s, u in scored() if s >= threshold}


@pytest.mark.spark
def test_fraction_of_pool_and_of_input(spark: Any) -> None:
    first = Step(name="words", where="words >= 5")
    passed = {u for u, w in zip(UIDS, WORDS, strict=True) if w is not None and w >= 5}
    best = [u for _, u in scored() if u in passed]
    of_pool = select(spark, first, Step(name="top", top=Top(by="score", fraction=0.2)))
    assert kept(of_pool) == set(best[:200])
    of_input = select(spark, first, Step(name="top", top=Top(by="score", fraction=0.2, of="input")))
    assert kept(of_input) == set(best[: len(best) // 5])


@pytest.mark.spark
def test_top_of_an_integer_column_and_more_than_there_are(spark: Any) -> None:
    found = select(spark, Step(name="top", top=Top(by="words", count=5000)))
    assert len(kept(found)) == sum(w is not None for w in WORDS)
    found = select(spark, Step(name="top", top=Top(by="words", count=150)))
    assert len(kept(found)) == 150 and found.thresholds["top"] == 8


@pytest.mark.spark
@pytest.mark.parametrize("where", ["words >", "words + score", "nosuchfunction(words)"])
def test_bad_sql_is_a_config_error(spark: Any, where: str) -> None:
    with pytest.raises(ConfigError, match="not a Spark SQL boolean"):
        select(spark, Step(name="w", where=where))
