import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.pool import Part, list_parts
from pipeline.spans import read_spans, why_broken, write_spans

MakePool = Callable[..., Path]


def write(out: Path, part: Part, rows: list[int], broken: str | None = None) -> None:
    starts = [row * 1024 for row in rows]
    ends = [start + 512 for start in starts]
    write_spans(
        str(out),
        part,
        pa.array(rows, pa.int32()),
        pa.array(starts, pa.int64()),
        pa.array(ends, pa.int64()),
        broken=broken,
    )


@pytest.fixture
def part(make_pool: MakePool) -> Part:
    return list_parts(str(make_pool(4, 1)))[0]


@pytest.mark.parametrize(("rows", "broken"), [([], None), ([2, 0, 3], None), ([1], "cut short at byte 7: ключ")])
def test_round_trip_comes_back_sorted(part: Part, tmp_path: Path, rows: list[int], broken: str | None) -> None:
    write(tmp_path, part, rows, broken)
    spans = read_spans(str(tmp_path), part)
    assert spans is not None and why_broken(spans) == broken
    places, starts, ends = (column.to_pylist() for column in spans.columns)
    assert places == sorted(rows)
    assert starts == [row * 1024 for row in places] and ends == [start + 512 for start in starts]


def test_same_bytes_twice(part: Part, tmp_path: Path) -> None:
    write(tmp_path / "a", part, [1, 0])
    write(tmp_path / "b", part, [0, 1])
    one, two = ((tmp_path / name / "spans" / f"{part.name}.parquet").read_bytes() for name in "ab")
    assert one == two


@pytest.mark.parametrize("which", ["tar", "table"])
def test_another_version_of_tar_or_parquet_has_none(part: Part, tmp_path: Path, which: str) -> None:
    write(tmp_path, part, [0, 1])
    url = getattr(part, which)
    os.utime(url, ns=(1, 1))
    assert read_spans(str(tmp_path), part) is None


def test_absent_and_unreadable_are_none(part: Part, tmp_path: Path) -> None:
    assert read_spans(str(tmp_path), part) is None
    write(tmp_path, part, [0, 1])
    assert read_spans(str(tmp_path), replace(part, name="other")) is None
    (tmp_path / "spans" / f"{part.name}.parquet").write_bytes(b"PAR1 and no more")
    assert read_spans(str(tmp_path), part) is None
