"""Columns that lie beside a part: arrays of its npz, and scores of earlier filters."""

import errno
import os
import resource
from dataclasses import replace
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
from pipeline.errors import PoolError, StageError
from pipeline.filesystem import StorageError
from pipeline.ledger import Unit
from pipeline.pool import Part, list_parts, read_part
from pipeline.retry import retry_part
from pipeline.schemas import IMAGE, TEXT
from pipeline.score import score_part
from pipeline.stored import find_array_readers, find_makers, open_scores, open_stored, order_levels, read_stored

DIM = 4
NUM_ROWS = 6


def make_filter(name: str, needs: tuple[str, ...], score: Score, vectors: tuple[str, ...] = ()) -> Filter:
    makes = ((name, pa.float32()),)
    return Filter(
        name=name, needs=needs, vectors=vectors, makes=makes, version=1, settings={}, load=partial(identity, score)
    )


def identity(score: Score) -> Score:
    return score


def count_chars(batch: pa.RecordBatch) -> Scored:
    return Scored((pc.utf8_length(batch.column(TEXT)).cast(pa.float32()),))


def double(name: str, batch: pa.RecordBatch) -> Scored:
    values = batch.column(name)
    missing = pc.indices_nonzero(values.is_null()).to_pylist()
    return Scored((pc.multiply(values, pa.scalar(2, pa.float32())),), tuple(Failure(i, "null", "") for i in missing))


def first_of(name: str, batch: pa.RecordBatch) -> Scored:
    values = [None if v is None else float(v[0]) for v in batch.column(name).to_pylist()]
    missing = tuple(Failure(i, "missing_embedding", "") for i, v in enumerate(values) if v is None)
    return Scored((pa.array(values, pa.float32()),), missing)


CHARS = make_filter("chars", (TEXT,), count_chars)
TWICE = make_filter("twice", ("chars",), partial(double, "chars"))
FOURFOLD = make_filter("fourfold", ("twice", IMAGE), partial(double, "twice"))
FIRST = make_filter("first", ("l14_img",), partial(first_of, "l14_img"), vectors=("l14_img",))


def make_part(tmp_path: Path, *, arrays: int | None = NUM_ROWS, bad: int | None = None) -> Part:
    """A part with a tar in another order than its parquet, and an npz of which row n begins with n."""
    rows = [toy_row(n) for n in range(NUM_ROWS)]
    images: dict[str, bytes | None] = {row["key"]: render("red", n) for n, row in enumerate(rows)}
    write_part(tmp_path / "p", "0", rows[::-1], images)
    if bad is not None:
        rows[bad]["uid"] = "no uid"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p" / "0.parquet")
    if arrays is not None:
        matrix = np.zeros((arrays, DIM), np.float16)
        matrix[:, 0] = np.arange(arrays)
        np.savez(tmp_path / "p" / "0.npz", l14_img=matrix, l14_txt=-matrix)
    return list_parts(str(tmp_path / "p"))[0]


def values_of(out: Path, name: str) -> list[Any]:
    return list(pq.read_table(out / name / "0.parquet")[name].to_pylist())


def test_levels_follow_what_is_needed() -> None:
    filters = [CHARS, FIRST, TWICE, FOURFOLD]
    assert [[f.name for f in level] for level in order_levels(filters)] == [["chars", "first"], ["twice"], ["fourfold"]]
    assert find_makers(filters)["fourfold"] == {"twice": "twice"}
    assert find_makers([TWICE, CHARS])["twice"] == {}  # only what stands before it in the recipe
    assert find_array_readers(filters) == {"first"} and order_levels([]) == []


def test_a_filter_reads_what_others_scored(tmp_path: Path) -> None:
    part, out = make_part(tmp_path), tmp_path / "out"
    result = score_part(Unit(part), filters=[CHARS, TWICE, FOURFOLD], out=str(out))
    assert result["broken"] is None and sorted(result["scored"]) == ["chars", "fourfold", "twice"]
    lengths = [float(len(toy_row(n)["text"])) for n in range(NUM_ROWS)]
    assert values_of(out, "twice") == [2 * n for n in lengths]
    assert values_of(out, "fourfold") == [4 * n for n in lengths]  # whose rows were read in the tar's order
    again = score_part(Unit(part), filters=[CHARS, TWICE, FOURFOLD], out=str(out))
    assert again["scored"] == {} and again["counts"] == result["counts"]


def test_a_changed_filter_takes_those_that_read_it_with_it(tmp_path: Path) -> None:
    part, out = make_part(tmp_path), tmp_path / "out"
    score_part(Unit(part), filters=[CHARS, TWICE], out=str(out))
    other = make_filter("chars", (TEXT, "uid"), partial(negate, count_chars))
    other = Filter(**{f: getattr(other, f) for f in other.__slots__} | {"version": 2})
    again = score_part(Unit(part), filters=[other, TWICE], out=str(out))
    assert sorted(again["scored"]) == ["chars", "twice"]
    assert all(value < 0 for value in values_of(out, "twice"))


def negate(score: Score, batch: pa.RecordBatch) -> Scored:
    return Scored((pc.negate(score(batch).columns[0]),))


@pytest.mark.parametrize("images", [False, True])
def test_arrays_stay_with_their_rows(tmp_path: Path, images: bool) -> None:
    part, out = make_part(tmp_path, bad=2), tmp_path / "out"
    with_images = make_filter("first", ("l14_img", IMAGE), partial(first_of, "l14_img"), vectors=("l14_img",))
    result = score_part(Unit(part), filters=[with_images if images else FIRST], out=str(out))
    assert values_of(out, "first") == [0, 1, 3, 4, 5]
    assert result["counts"]["pool"]["failed"] == {"bad_uid": 1}
    assert [record["name"] for record in result["inputs"]] == ["0.parquet", *(["0.tar"] if images else []), "0.npz"]


def test_filters_that_read_no_vector_do_not_open_the_npz(tmp_path: Path) -> None:
    part, out = make_part(tmp_path), tmp_path / "out"
    Path(part.arrays or "").write_bytes(b"broken")
    result = score_part(Unit(part), filters=[CHARS], out=str(out))
    assert result["broken"] is None and [record["name"] for record in result["inputs"]] == ["0.parquet"]


@pytest.mark.parametrize("spoil", ["absent", "broken", "short"])
def test_without_a_usable_npz_its_readers_fail_row_by_row_and_the_others_go_on(tmp_path: Path, spoil: str) -> None:
    part, out = make_part(tmp_path, arrays={"absent": None, "broken": NUM_ROWS, "short": 5}[spoil]), tmp_path / "out"
    if spoil == "broken":
        Path(part.arrays or "").write_bytes(b"broken")
    result = score_part(Unit(part), filters=[CHARS, FIRST], out=str(out))
    assert result["counts"]["chars"]["kept"] == NUM_ROWS
    assert result["counts"]["first"]["failed"] == {"missing_column": NUM_ROWS}
    said = {"absent": None, "broken": "cannot be read as npz", "short": "has 5 rows, its parquet 6"}[spoil]
    assert (result["broken"] is None) if said is None else (said in result["broken"])
    if spoil == "short":
        make_part(tmp_path)
        assert score_part(Unit(part), filters=[CHARS, FIRST], out=str(out))["scored"].keys() == {"first"}


def test_a_column_is_read_from_wherever_it_is(tmp_path: Path) -> None:
    part = make_part(tmp_path, bad=2)
    from_npz = [v[0] for batch in read_stored(part, ["l14_img"]) for v in batch.column("l14_img").to_pylist()]
    from_pool = [v for batch in read_stored(part, ["key"]) for v in batch.column("key").to_pylist()]
    assert from_npz == [0, 1, 3, 4, 5]
    assert from_pool == [toy_row(n)["key"] for n in (0, 1, 3, 4, 5)]
    with pytest.raises(Exception, match="no column 'l14'"):
        list(read_stored(part, ["l14"]))


def test_only_the_arrays_that_are_asked_for_are_looked_at(tmp_path: Path) -> None:
    part, out = make_part(tmp_path), tmp_path / "out"
    with np.load(part.arrays or "") as arrays:
        np.savez(part.arrays or "", **arrays, pca=np.zeros((2, 3)))
    result = score_part(Unit(part), filters=[FIRST], out=str(out))
    assert result["broken"] is None and values_of(out, "first") == [*range(NUM_ROWS)]
    assert next(read_stored(part, ["l14_img"])).num_rows == NUM_ROWS


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damage_inside_an_array_costs_only_its_readers(tmp_path: Path, save) -> None:
    part, out = make_part(tmp_path), tmp_path / "out"
    npz = Path(part.arrays or "")
    save(npz, l14_img=np.random.default_rng(0).normal(size=(NUM_ROWS, 4096)))
    raw = bytearray(npz.read_bytes())
    raw[raw.index(b"PK\1\2") + 16] ^= 1  # its checksum
    npz.write_bytes(raw)
    result = score_part(Unit(part), filters=[CHARS, FIRST], out=str(out))
    assert result["counts"]["chars"]["kept"] == NUM_ROWS and "Bad CRC-32" in result["broken"]
    assert result["counts"]["first"]["failed"] == {"missing_column": NUM_ROWS}
    again = retry_part(Unit(part), filters=[CHARS, FIRST], out=str(out), reason="missing_column")
    assert again["mended"] == 0 and "Bad CRC-32" in again["broken"]


def test_compressed_arrays_stay_open_from_first_batch_to_last(tmp_path: Path) -> None:
    part = make_part(tmp_path)
    matrix = np.arange(NUM_ROWS * DIM, dtype=np.float32).reshape(NUM_ROWS, DIM)
    np.savez_compressed(part.arrays or "", l14_img=matrix)
    stored, _ = open_stored(part, read_part(part, [TEXT]), [FIRST], "", {})
    Path(part.arrays or "").unlink()
    assert stored["l14_img"](np.array([4, 0])).to_pylist() == matrix[[4, 0]].tolist()


def test_a_lack_of_means_is_not_the_fault_of_the_npz(tmp_path: Path) -> None:
    part = make_part(tmp_path)
    rows = read_part(part, [TEXT])
    with pytest.raises(StorageError, match="no kind of storage"):
        open_stored(replace(part, arrays="nosuch://a.npz"), rows, [FIRST], "", {})
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
            open_stored(part, rows, [FIRST], "", {})
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_full_temporary_folder_is_not_the_fault_of_the_npz(tmp_path: Path) -> None:
    part = make_part(tmp_path)
    np.savez_compressed(part.arrays or "", l14_img=np.zeros((NUM_ROWS, 9999)))
    rows, limits = read_part(part, [TEXT]), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(StageError, match=r"\(TMPDIR\) cannot be written: File too large"):
            open_stored(part, rows, [FIRST], "", {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_scores_of_rows_in_another_order_are_refused(tmp_path: Path) -> None:
    part, out = make_part(tmp_path), tmp_path / "out"
    score_part(Unit(part), filters=[CHARS], out=str(out))
    table = pq.read_table(part.table)
    pq.write_table(table.take(list(range(NUM_ROWS))[::-1]), part.table)
    with pytest.raises(PoolError, match=r"its uids are not those of the pool's part.*Score the pool again"):
        open_scores(str(out / "chars"), part, read_part(part, [TEXT]), ["chars"])
