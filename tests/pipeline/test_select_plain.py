"""Plain comparisons against Spark SQL, and what is not plain."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.select_plain import COMPARE, NUMBER_TYPES, Term, _compare, parse_plain
from pipeline.select_sql import parse_type
from pipeline.select_table import clean_batch

TYPES = {"words": "int32", "text": "string", "flag": "bool", "odd name": "double", "big": "uint64", "day": "date32"}
NUMBERS = ("0", "-1", "2.5", "-0.25", "0.28", "3", "200", "9999999", "9999999.12345678", "65504")
TEXTS = ("'en'", "''", "'a AND b'", "'\"'", "'é'", "'💐'", "'\ue000'")


@pytest.mark.parametrize(
    ("where", "terms"),
    [
        ("words > 2", [Term("words", ">", 2)]),
        (" `odd name`<=-0.50 ", [Term("odd name", "<=", -0.5)]),
        ("text = 'a AND b' and flag", [Term("text", "=", "a AND b"), Term("flag")]),
        ("words<>3 AND words!=4 AND words == 5", [Term("words", o, v) for o, v in (("<>", 3), ("!=", 4), ("==", 5))]),
    ],
)
def test_what_is_plain(where: str, terms: list[Term]) -> None:
    assert parse_plain(where, TYPES) == terms


@pytest.mark.parametrize(
    "where",
    [
        *(
            "",
            "words",
            "words >",
            "words > 2 AND",
            "words > 2 OR flag",
            "words > 2AND flag",
            "NOT flag",
            "true",
            "flag = 1",
        ),
        *(
            "words > 12345678",
            "words > 1e3",
            "words > 2L",
            "words > '2'",
            "text > 2",
            "text = 'it''s'",
            "text = 'a\\n'",
        ),
        *('text = "en"', "2 < words", "words + 1 > 2", "big > 1", "day = '2020-01-01'", "wordz > 2", "WORDS > 2"),
        *("words > 2 -- few", "(words > 2)", "words > 2 AND nosuch", "words = text", "words <=> 2", "words > - 2"),
    ],
)
def test_what_is_left_to_spark(where: str) -> None:
    assert parse_plain(where, TYPES) is None


def _make_table() -> pa.RecordBatch:
    floats = [0.0, -0.0, 1, -1, 2, 3, 0.28, 0.25, -0.25, 2.5, 65504, 9999999, np.nan, np.inf, -np.inf]
    floats.append(float(np.nextafter(np.float32(0.28), np.float32(1))))
    texts = ["en", "EN", "en ", "", "a AND b", '"', "é", "e\u0301", "💐", "\ue000", "\uffff", "'", "e", "eng", "\0"]
    columns: dict[str, list[Any]] = {"flag": [True, False], "text": texts}
    for name in NUMBER_TYPES:
        if "int" in name:
            edges = np.iinfo(name)
            columns[name] = [v for v in (-1, 0, 1, 2, 3, 200, 9999999) if edges.min <= v <= edges.max]
            columns[name] += [edges.min, edges.min + 1, edges.max - 1, edges.max]
        else:
            with np.errstate(over="ignore"):
                columns[name] = list(
                    np.array(floats, np.float16 if name == "halffloat" else name.replace("float", "float32"))
                )
    length = 1 + max(map(len, columns.values()))
    arrays = {
        name: pa.array(
            values + [None] * (length - len(values)), pa.type_for_alias(name) if name in NUMBER_TYPES else None
        )
        for name, values in columns.items()
    }
    return pa.RecordBatch.from_pydict(arrays)


@pytest.mark.spark
def test_spark_gives_the_same_answers(spark: Any) -> None:
    batch = _make_table()
    types = {field.name: str(field.type) for field in batch.schema}
    wheres = [f"{name} {operator} {value}" for name in NUMBER_TYPES for operator in "<=" for value in NUMBERS]
    wheres += [f"double {operator} {value}" for operator in COMPARE for value in NUMBERS]
    wheres += [f"text {operator} {value}" for operator in COMPARE for value in TEXTS] + ["flag", "`flag`"]
    cleaned = clean_batch(batch)
    kinds = [parse_type(types[name]) for name in batch.schema.names]
    table = pa.table([c.cast(k) for c, k in zip(cleaned.columns, kinds, strict=True)], names=batch.schema.names)
    frame = spark.createDataFrame(table).coalesce(1)
    for start in range(0, len(wheres), 100):
        some = wheres[start : start + 100]
        theirs = frame.selectExpr(*(f"{where} AS c{n}" for n, where in enumerate(some))).toArrow()
        for where, column in zip(some, theirs.columns, strict=True):
            (term,) = parse_plain(where, types) or []
            assert _compare(cleaned, term).to_pylist() == column.to_pylist(), where
