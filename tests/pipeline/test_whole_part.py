"""Filters that see a whole part at once, beside others that see batches."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from toy import render, toy_row, write_part

from pipeline.contract import Failure, Filter, Score, Scored
from pipeline.errors import StageError
from pipeline.ledger import Unit
from pipeline.pool import list_parts
from pipeline.retry import retry_part
from pipeline.schemas import IMAGE, KEY, ROW, TEXT, UID
from pipeline.score import score_part
from pipeline.spans import read_spans

NUM_ROWS = 300
"""More than a batch with images holds."""
SEEN: list[tuple[str, int, list[str]]] = []


def opened(score: Score) -> Score:
    return score


def rank(batch: pa.RecordBatch) -> Scored:
    """The rank of a row's number within its batch; rows 5 and 6 have none."""
    SEEN.append(("rank", batch.num_rows, batch.schema.names))
    numbers = np.array([v[0] for v in batch.column("numbers").to_pylist()])
    ranks = pa.array(numbers.argsort().argsort(), pa.int32())
    return Scored(
        (pa.array([None if n in (5, 6) else r for n, r in enumerate(ranks.to_pylist())], pa.int32()),),
        tuple(Failure(n, "no_rank", "") for n in (5, 6)),
    )


def measure(batch: pa.RecordBatch) -> Scored:
    SEEN.append(("measure", batch.num_rows, batch.schema.names))
    return Scored((pc.binary_length(batch.column(IMAGE)),))


def make_filter(score: Score, needs: tuple[str, ...], **more: Any) -> Filter:
    name = score.__name__
    return Filter(
        name=name, needs=needs, makes=((name, pa.int32()),), version=1, settings={}, load=partial(opened, score), **more
    )


RANK = make_filter(rank, ("numbers",), vectors=("numbers",), whole_part=True)
MEASURE = make_filter(measure, (IMAGE, TEXT))


@pytest.fixture
def unit(tmp_path: Path) -> Unit:
    SEEN.clear()
    rows = [toy_row(n) for n in range(NUM_ROWS)]
    image = render("red")
    write_part(tmp_path / "pool", "0", rows, {row["key"]: image for row in rows})
    np.savez(tmp_path / "pool" / "0.npz", numbers=np.arange(NUM_ROWS, dtype=np.float32)[::-1, None])
    return Unit(list_parts(str(tmp_path / "pool"))[0])


def test_it_sees_all_rows_at_once_and_only_what_it_needs(unit: Unit, tmp_path: Path) -> None:
    score_part(unit, filters=[RANK, MEASURE], out=str(tmp_path / "out"))
    assert [(name, rows) for name, rows, _ in SEEN] == [("measure", 256), ("measure", 44), ("rank", NUM_ROWS)]
    assert SEEN[-1][2] == [UID, KEY, ROW, "numbers"] and "numbers" not in SEEN[0][2]
    ranks = pq.read_table(tmp_path / "out" / "rank" / "0.parquet")["rank"].to_pylist()
    assert ranks == [None if n in (5, 6) else NUM_ROWS - 1 - n for n in range(NUM_ROWS)]
    spans = read_spans(str(tmp_path / "out"), unit.part)
    assert spans and sorted(spans[ROW].to_pylist()) == list(range(NUM_ROWS))


def test_its_failed_rows_are_not_scored_without_the_others(unit: Unit, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    score_part(unit, filters=[RANK], out=out)
    before = (tmp_path / "out" / "rank" / "0.parquet").read_bytes()
    done = retry_part(unit, filters=[RANK], out=out, reason="no_rank")
    assert (done["tried"], done["mended"], len(SEEN)) == (2, 0, 1)
    assert (tmp_path / "out" / "rank" / "0.parquet").read_bytes() == before


def test_it_cannot_have_images() -> None:
    with pytest.raises(StageError, match="a whole part and its images"):
        make_filter(rank, (IMAGE,), whole_part=True)
