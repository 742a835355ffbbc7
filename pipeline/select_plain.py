"""`where` steps that are plain comparisons: Spark SQL's answers without Spark.

Plain is what nearly every recipe says: `near_imagenet`, `caption_words > 2`, `caption_language = 'en'`, and such terms
joined by AND.  Short numbers are compared in double precision, in which every way that Spark may go gives one answer;
longer ones, other types and all other SQL are Spark's (select_sql.py).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.select import TEXT_TYPES
from pipeline.select_sql import count_verdicts
from pipeline.select_table import PartGroup, Passing, ScoreTable, clean_batch, read_passing, write_mask

TERM = re.compile(
    r"""\s*(?:`([^`]+)`|([A-Za-z_]\w*))(?:\s*(=|==|!=|<>|<=|>=|<|>)\s*(?:(-?\d{1,7}(?:\.\d{1,8})?)|'([^'\\]*)'))?\s*"""
)
AND = re.compile(r"(?<=\s)AND(?=\s)", re.IGNORECASE)
NO_NAMES = {"true", "false", "null"}
NUMBER_TYPES = {"int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "halffloat", "float", "double"}
COMPARE: Mapping[str, Callable[..., pa.Array]] = {
    "=": pc.equal,
    "==": pc.equal,
    "!=": pc.not_equal,
    "<>": pc.not_equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}


class Term(NamedTuple):
    """A comparison of a column, or a column of booleans."""

    column: str
    operator: str = ""
    value: float | str | None = None


def parse_plain(where: str, types: Mapping[str, str]) -> list[Term] | None:
    """Return the terms of which all must hold, or None where the SQL is not plain."""
    terms: list[Term] = []
    place = 0
    while found := TERM.match(where, place):
        quoted, name, operator, number, text = found.groups()
        value = text if number is None else float(number)
        term = Term(quoted or name, operator or "", value)
        if (name and name.lower() in NO_NAMES) or not _fits(types.get(term.column), value):
            return None
        terms.append(term)
        if found.end() == len(where):
            return terms
        joint = AND.match(where, found.end())
        if joint is None:
            return None
        place = joint.end()
    return None


def _fits(kind: str | None, value: float | str | None) -> bool:
    """Return whether a column of this Arrow type can be compared with a value here; None is no value."""
    if value is None:
        return kind == "bool"
    return kind in (TEXT_TYPES if isinstance(value, str) else NUMBER_TYPES)


def filter_plainly(
    table: ScoreTable, passing: Passing, rules: Sequence[Sequence[Term]], masks: str, group: PartGroup
) -> np.ndarray:
    """Write a mask per part into MASKS; return int64 (rules * 3,): rows read, kept, and without an answer, of each."""
    counts = np.zeros((len(rules), 3), np.int64)
    columns = sorted({term.column for rule in rules for term in rule})
    for part in group.parts:
        passed = []
        for batch, kept in read_passing(table, passing, part, columns):
            values = clean_batch(batch.select(columns))
            verdicts = [reduce(pc.and_kleene, [_compare(values, term) for term in rule]) for rule in rules]
            passed.append(count_verdicts(kept, verdicts, counts))
        write_mask(masks, part, np.concatenate(passed))
    return counts.ravel()


def _compare(batch: pa.RecordBatch, term: Term) -> pa.Array:
    """Return bool (rows,), null where the column is null."""
    values = batch.column(term.column)
    if term.value is None:
        return values
    if not isinstance(term.value, str):
        values = values.cast(pa.float64(), safe=False)
    return COMPARE[term.operator](values, term.value)
