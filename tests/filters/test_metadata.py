import math
from typing import Any

import pyarrow as pa
import pytest

from filters import build_filter
from pipeline.errors import ConfigError

NAN = math.nan


def score(values: pa.Array, kind: str) -> tuple[list[Any], list[int]]:
    """Values and the places of failures."""
    filter = build_filter({"filter": "metadata", "columns": {"x": kind}})
    scored = filter.load()(pa.RecordBatch.from_arrays([values], names=["x"]))
    assert all(f.reason == "no_value" and "no x" in f.message for f in scored.failures)
    return scored.columns[0].to_pylist(), [f.position for f in scored.failures]


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        (pa.array([0.25, None, NAN, -1.0], pa.float32()), "float", [0.25, None, None, -1.0]),
        (pa.array([0.5, NAN], pa.float16()), "float", [0.5, None]),
        (pa.array([0.1], pa.float64()), "double", [0.1]),
        (pa.array([2**24 + 1], pa.int64()), "float", [2.0**24]),
        (pa.array(["0.5", "x", None, "nan"]), "float", [0.5, None, None, None]),
        (pa.array([3.0, 3.5, NAN]), "int", [3, None, None]),
        (pa.array([2**63], pa.uint64()), "int", [None]),
        (pa.array(["ü", ""]), "string", ["ü", ""]),
        (pa.array([True, None]), "bool", [True, None]),
        (pa.array([], pa.float32()), "float", []),
        (pa.array([None], pa.null()), "float", [None]),
        (pa.array([[1.0]]), "float", [None]),
    ],
)
def test_values_come_through_and_what_is_none_is_counted(values: pa.Array, kind: str, expected: list[Any]) -> None:
    found, failed = score(values, kind)
    assert found == expected
    assert failed == [place for place, value in enumerate(expected) if value is None]


@pytest.mark.parametrize(
    ("columns", "word"), [({}, "name a column"), ({"x": "float32"}, "'float32'; say one of"), ({"x": 3}, "columns")]
)
def test_a_bad_wish_is_an_error(columns: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        build_filter({"filter": "metadata", "columns": columns})
