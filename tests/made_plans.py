"""Rows, score files and random plans for the tests of select, and the check of a plan against made_scores.expect."""

import itertools
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from made_scores import Row, Where, expect, write_scores

from pipeline.select import AtLeast, Sample, Step, Top
from pipeline.select_steps import Selection, Source, select_rows
from pipeline.select_table import ScoreTable
from pipeline.subset import read_subset
from pipeline.subset_runs import merge_runs
from pipeline.uid import format_uids

TYPES = {"single": "float", "double": "double", "words": "int32", "big": "int64", "half": "halffloat", "lang": "string"}
OWNERS = {"single": "clip", "half": "clip", "double": "dfn", "words": "length", "big": "length", "lang": "language"}
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, None, 1e-45, -1e-45, 0.25, -0.25]


def make_rows(num_rows: int, seed: int) -> list[Row]:
    """Rows with many ties, nulls, NaN, both zeros and, here and there, a uid that another row has."""
    draw = random.Random(seed)

    def number(digits: int) -> float | None:
        return draw.choice(SPECIAL) if draw.random() < 0.2 else round(draw.uniform(-1, 1), digits)

    rows = []
    for _ in range(num_rows):
        uid = f"{draw.getrandbits(128):032x}" if draw.random() < 0.9 or not rows else draw.choice(rows)["uid"]
        single = number(1)
        rows.append(
            {
                "uid": uid,
                "single": None if single is None else float(np.float32(single)),
                "half": None if single is None else float(np.float16(single)),
                "double": number(2),
                "words": None if draw.random() < 0.1 else draw.randrange(-3, 9),
                "big": draw.choice([None, -(2**53), 2**53, 0, 1, -7]),
                "lang": draw.choice([None, "en", "de", "fr"]),
            }
        )
    return rows


def to_table(rows: Sequence[Row]) -> pa.Table:
    fields = {name: pa.type_for_alias(kind) for name, kind in TYPES.items()}
    with np.errstate(over="ignore"):
        arrays = {name: pa.array([row[name] for row in rows], kind) for name, kind in fields.items()}
    return pa.table({"uid": pa.array([row["uid"] for row in rows], pa.string())} | arrays)


def make_source(folder: Path, parts: dict[str, pa.Table], num_pool: int, spark: Any = None, **settings: Any) -> Source:
    write_scores(folder, parts, OWNERS)
    table = ScoreTable({name: str(folder / name) for name in set(OWNERS.values())}, OWNERS)
    return Source(table, table.measure(list(parts)), TYPES, num_pool, lambda: spark, **settings)


def cut_parts(rows: Sequence[Row], seed: int) -> dict[str, pa.Table]:
    """Parts of uneven size, some without a row."""
    draw = random.Random(seed)
    borders = sorted([0, len(rows), *(draw.randint(0, len(rows)) for _ in range(draw.choice([0, 3, 6])))])
    return {f"{n:08d}": to_table(rows[a:b]) for n, (a, b) in enumerate(itertools.pairwise(borders))}


def kept(selection: Selection, folder: Path) -> list[str]:
    """Return the subset's lines as text, as they are read from its file."""
    url = str(folder / "subset.npy")
    merged = merge_runs(selection.runs, url)
    uids: list[str] = format_uids(read_subset(url)).to_pylist()
    assert (merged.num_uids, merged.num_copies) == (len(set(uids)), len(uids))
    return uids


def assert_as_the_oracle(
    source: Source, rows: Sequence[Row], steps: Sequence[Step], folder: Path, where: Any = None
) -> Selection:
    selection = select_rows(source, steps, str(folder / "scratch"))
    expected = expect(rows, steps, source.num_pool, where, TYPES)
    assert list(selection.counts.items()) == list(expected.counts.items())
    assert selection.thresholds == pytest.approx(expected.thresholds, abs=0)
    assert {path: found for path, found in selection.found.items() if "scales" not in found} == expected.found
    assert selection.rows == expected.rows
    assert kept(selection, folder) == expected.lines
    return selection


SHARES = (0.0, 0.001, 0.1, 0.3, 0.5, 0.77, 1.0)


def draw_top(draw: random.Random, name: str, shares: Sequence[float] = SHARES) -> Step:
    by = draw.choice([column for column in TYPES if column != "lang"])
    share = {"fraction": draw.choice(shares)}
    amount = draw.choice([share, share, {"count": draw.choice([0, 1, 2, 50, 10**6])}])
    ties, lowest = draw.choice(["exact", "datacomp"]), draw.random() < 0.3
    return Step(name=name, top=Top(by=by, **amount, of=draw.choice(["pool", "input"]), ties=ties, lowest=lowest))


def known(*columns: str) -> Callable[[Row], bool]:
    def ask(row: Row) -> bool:
        return not any(row[c] is None or row[c] != row[c] for c in columns)

    return ask


def rule(text: str, *columns: str) -> Where:
    """Return a rule that has no answer where a column that it reads has none."""
    code = compile(text, text, "eval")
    return lambda row: bool(eval(code, {}, row)) if known(*columns)(row) else None


WHERE: dict[str, Where] = {
    "words > 2": rule("words > 2", "words"),
    "single >= 0": rule("single >= 0", "single"),
    "single = 0 OR double < 0.5": lambda row: (
        True
        if (known("single")(row) and row["single"] == 0) or (known("double")(row) and row["double"] < 0.5)
        else (None if not known("single", "double")(row) else False)
    ),
    "lang = 'en'": rule("lang == 'en'", "lang"),
    "lang IS NULL OR lang <> 'de'": lambda row: row["lang"] != "de",
    "big > 0 AND half > -0.5": lambda row: (
        False
        if (row["big"] is not None and row["big"] <= 0) or (known("half")(row) and row["half"] <= -0.5)
        else (None if not known("big", "half")(row) else True)
    ),
    "words > 100": rule("words > 100", "words"),
}


def draw_rule(draw: random.Random, name: str) -> Step:
    """A step without branches and without SQL, which keeps many rows more often than few."""
    kind = draw.choice(["top", "top", "at_least", "sample", "sample", "repeat"])
    shares = draw.choice([SHARES, (0.6, 0.9, 1.0), (0.8, 1.0)])
    if kind == "top":
        return draw_top(draw, name, shares)
    if kind == "at_least":
        by = draw.choice([column for column in TYPES if column != "lang"])
        value = draw.choice([-0.7, -0.7, -1e-45, 0.1, 0.7, -math.inf, 3])
        return Step(name=name, at_least=AtLeast(by=by, value=value))
    if kind == "sample":
        amount = draw.choice([{"fraction": draw.choice(shares)}, {"count": draw.choice([1, 100, 10**6])}])
        of, seed = draw.choice(["pool", "input"]), draw.choice([0, 1, -5])
        return Step(name=name, sample=Sample(**amount, of=of, seed=seed))
    return Step(name=name, repeat=draw.choice([1, 2, 5]))


def draw_steps(draw: random.Random, depth: int, sql: Sequence[str] = (), most: int = 3) -> list[Step]:
    """A plan of at most `depth` branches within branches, with SQL now and then where some is given."""
    steps = []
    for number in range(draw.randint(0 if depth < 2 else 1, most)):
        name = f"{chr(97 + number)}{draw.randrange(10**6)}"
        if depth and draw.random() < 0.6:
            kind = draw.choice(["union", "intersect", "add", "minus", "cascade"])
            one = kind in ("minus", "cascade")
            branches = [draw_steps(draw, depth - 1, sql, 2) for _ in range(1 if one else draw.randint(1, 3))]
            steps.append(Step(name=name, **{kind: branches[0] if one else branches}))
        elif sql and draw.random() < 0.5:
            steps.append(Step(name=name, where=draw.choice(sql)))
        else:
            steps.append(draw_rule(draw, name))
    return steps
