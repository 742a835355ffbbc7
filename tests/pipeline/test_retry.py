import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toy import render, toy_row, write_part

from pipeline.contract import Failure, Filter, Scored
from pipeline.errors import StageError
from pipeline.ledger import Unit
from pipeline.pool import list_parts
from pipeline.retry import retry_part
from pipeline.schemas import IMAGE, KEY, TEXT
from pipeline.score import score_part

MOODS = {"bad": True}
SEEN: list[list[str]] = []


def score_moody(batch: pa.RecordBatch) -> Scored:
    """Image sizes; rows 1 and 4 fail while the mood is bad."""
    keys = batch.column(KEY).to_pylist()
    SEEN.append(keys)
    bad = [n for n, key in enumerate(keys) if MOODS["bad"] and key in ("000000001", "000000004")]
    sizes = [None if n in bad else len(image or b"") for n, image in enumerate(batch.column(IMAGE).to_pylist())]
    return Scored((pa.array(sizes, pa.int32()),), tuple(Failure(n, "moody", "not today") for n in bad))


def load() -> Callable[[pa.RecordBatch], Scored]:
    return score_moody


MOODY = Filter(name="moody", needs=(IMAGE, TEXT), makes=(("size", pa.int32()),), version=1, settings={}, load=load)


@pytest.fixture
def scored(tmp_path: Path) -> tuple[Unit, str]:
    rows = [toy_row(n) for n in range(6)]
    write_part(tmp_path / "p", "0", rows, {row["key"]: render("red", n, side=20 + n) for n, row in enumerate(rows)})
    unit, out = Unit(list_parts(str(tmp_path / "p"))[0]), str(tmp_path / "out")
    MOODS["bad"] = True
    score_part(unit, filters=[MOODY], out=out)
    SEEN.clear()
    return unit, out


def test_only_failed_rows_are_read_and_the_result_is_as_if_they_had_never_failed(
    scored: tuple[Unit, str], tmp_path: Path
) -> None:
    unit, out = scored
    MOODS["bad"] = False
    result = retry_part(unit, filters=[MOODY], out=out, reason="moody")
    assert SEEN == [["000000001", "000000004"]]
    assert (result["tried"], result["mended"]) == (2, 2)
    assert result["counts"]["moody"] == {"read": 6, "kept": 6, "dropped": {}, "failed": {}}
    score_part(unit, filters=[MOODY], out=str(tmp_path / "undisturbed"))
    for name in ("moody/0.parquet", "failures/0.parquet"):
        assert (Path(out) / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def test_what_fails_again_stays_in_quarantine(scored: tuple[Unit, str]) -> None:
    unit, out = scored
    before = (Path(out) / "failures" / "0.parquet").read_bytes()
    result = retry_part(unit, filters=[MOODY], out=out, reason="moody")
    assert (result["tried"], result["mended"]) == (2, 0)
    assert (Path(out) / "failures" / "0.parquet").read_bytes() == before


def test_another_reason_touches_nothing(scored: tuple[Unit, str]) -> None:
    unit, out = scored
    result = retry_part(unit, filters=[MOODY], out=out, reason="unreadable_image")
    assert (result["tried"], SEEN) == (0, [])


def test_scores_of_another_pool_or_filter_are_not_patched(scored: tuple[Unit, str]) -> None:
    unit, out = scored
    with pytest.raises(StageError, match="is not what its scores were made of"):
        retry_part(unit, filters=[replace(MOODY, version=2)], out=out, reason="moody")
    pq.write_table(pq.read_table(str(unit.part.table)).slice(0, 3), unit.part.table)
    with pytest.raises(StageError, match="Run `winnow score`"):
        retry_part(unit, filters=[MOODY], out=out, reason="moody")


def test_rows_of_a_touched_tar_are_found_without_their_spans(scored: tuple[Unit, str], tmp_path: Path) -> None:
    unit, out = scored
    os.utime(str(unit.part.tar), (0, 0))
    MOODS["bad"] = False
    assert retry_part(unit, filters=[MOODY], out=out, reason="moody")["mended"] == 2
    score_part(unit, filters=[MOODY], out=str(tmp_path / "undisturbed"))
    assert (Path(out) / "moody" / "0.parquet").read_bytes() == (
        tmp_path / "undisturbed" / "moody" / "0.parquet"
    ).read_bytes()
