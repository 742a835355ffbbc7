import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toy import render, tar_row, toy_row, write_part

from pipeline.batches import read_batches, read_chosen
from pipeline.errors import PoolError
from pipeline.pool import Part, list_columns, list_parts, pool_identity, read_part
from pipeline.schemas import END, IMAGE, IMAGE_ERROR, KEY, ROW, START, TEXT, UID
from pipeline.tars import TarRow, make_member, write_rows

MakePool = Callable[..., Path]


def rows_of(part: Part, *, images: bool = True) -> list[dict[str, object]]:
    batches = read_batches(part, read_part(part), images=images)
    return sorted((row for batch in batches for row in batch.to_pylist()), key=lambda row: row[ROW])


def test_parts_of_a_folder_a_glob_and_two_sources(make_pool: MakePool) -> None:
    one, two = make_pool(8, 2, "one"), make_pool(4, 1, "two")
    parts = list_parts(str(one))
    assert [p.name for p in parts] == ["00000000", "00000001"]
    assert all(p.tar and p.table for p in parts)
    assert list_parts(f"{one}/*.tar") == parts
    assert list_parts(f"{one}/{{00000000..00000001}}.tar") == parts
    assert [p.name for p in list_parts(f"{one}::{two}")] == ["0-00000000", "0-00000001", "1-00000000"]


def test_parts_of_one_name_in_two_folders_stay_apart(make_pool: MakePool, tmp_path: Path) -> None:
    make_pool(4, 1, "one"), make_pool(4, 1, "two")
    for pattern in (f"{tmp_path}/{{one,two}}", f"{tmp_path}/*/*.tar", f"{tmp_path}/{{one,two}}/00000000.tar"):
        assert [p.name for p in list_parts(pattern)] == ["0-00000000", "1-00000000"]


def test_the_parquet_beside_a_tar_is_found_however_it_is_spelled(
    make_pool: MakePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pool(4, 1, "one")
    monkeypatch.chdir(tmp_path / "one")
    for spelled in ("./00000000.tar", "00000000.tar", "./*.tar", ".", f"{tmp_path}//one/00000000.tar", "../one"):
        (part,) = list_parts(spelled)
        assert part.table and part.tar, spelled
    (tmp_path / "one" / "._0.tar").write_bytes(b"")
    assert len(list_parts(".")) == 1


def test_chosen_rows_come_in_batches_as_all_do(make_pool: MakePool) -> None:
    (part,) = list_parts(str(make_pool(600, 1)))
    rows, whole = read_part(part), rows_of(part)
    spans: dict[Any, Any] = {row[ROW]: (row[START], row[END]) for row in whole}
    batches = [*read_chosen(part, rows, list(range(5, 600)), spans=spans, images=True)]
    assert [batch.num_rows for batch in batches] == [256, 256, 83]
    assert [row for batch in batches for row in batch.to_pylist()] == whole[5:]


@pytest.mark.parametrize("kind", [pa.string(), pa.binary(), pa.large_string()])
def test_bytes_that_are_no_utf8_cost_no_other_row(tmp_path: Path, kind: pa.DataType) -> None:
    captions = pa.array([b"a caf\xe9", "ein Café".encode(), None, b"a dog"], pa.binary())
    broken = captions.cast(pa.large_binary()) if kind == pa.large_string() else captions
    texts = pa.Array.from_buffers(kind, 4, broken.buffers(), broken.null_count)
    uids = [f"{n:032x}".encode() for n in range(3)] + [b"\xff" * 32]
    names = pa.Array.from_buffers(pa.string(), 4, pa.array(uids, pa.binary()).buffers())
    pq.write_table(pa.table({UID: names, TEXT: texts}), tmp_path / "0.parquet")
    rows = read_part(list_parts(str(tmp_path))[0])
    assert rows.table[TEXT].to_pylist() == ["a caf\ufffd", "ein Café", None]
    assert rows.failed == {"bad_uid": 1}


def test_pool_without_parts(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(PoolError, match=r"no \.tar and no \.parquet"):
        list_parts(str(tmp_path))


def test_rows_keep_bytes_captions_and_order(make_pool: MakePool) -> None:
    rows = rows_of(list_parts(str(make_pool(600, 1)))[0])
    assert [row[TEXT] for row in rows] == [toy_row(n)["text"] for n in range(600)]
    assert rows[5][IMAGE] == render("green", 5)
    assert all(row[IMAGE_ERROR] is None for row in rows)


def test_without_images_no_tar_is_opened(make_pool: MakePool) -> None:
    part = list_parts(str(make_pool(8, 1)))[0]
    Path(part.tar or "").write_bytes(b"not a tar")
    assert [row[KEY] for row in rows_of(part, images=False)] == [f"{n:09d}" for n in range(8)]


def test_identity_follows_the_files(make_pool: MakePool) -> None:
    pool = make_pool(8, 2)
    before = pool_identity(list_parts(str(pool)))
    assert pool_identity(list_parts(str(pool))) == before
    with (pool / "00000001.tar").open("ab") as file:
        file.write(bytes(512))
    assert pool_identity(list_parts(str(pool))) != before


def test_rows_that_lost_their_image_say_why(make_pool: MakePool, tmp_path: Path) -> None:
    rows = [toy_row(n) for n in range(6)]
    images = {row["key"]: render("red") for row in rows}
    write_part(tmp_path / "p", "0", rows, images | {rows[2]["key"]: None})
    part = list_parts(str(tmp_path / "p"))[0]
    assert [r[IMAGE_ERROR] for r in rows_of(part)] == [None, None, "missing_image", None, None, None]
    whole = Path(part.tar or "").read_bytes()
    Path(part.tar or "").write_bytes(whole[: len(whole) // 2])
    errors = [r[IMAGE_ERROR] for r in rows_of(part)]
    assert set(errors[3:]) == {"truncated_tar"} and len(errors) == 6


def test_failed_downloads_are_counted_not_rows(tmp_path: Path) -> None:
    rows = [toy_row(n) for n in range(4)]
    rows[1]["status"], rows[3]["status"] = "failed_to_download", None
    write_part(tmp_path / "p", "0", rows, {rows[0]["key"]: render("red"), rows[2]["key"]: render("blue")})
    read = read_part(list_parts(str(tmp_path / "p"))[0])
    assert (read.num_listed, read.table.num_rows, read.failed) == (4, 2, {"not_downloaded": 2})


def test_repeated_key_keeps_both_rows_and_one_image(tmp_path: Path) -> None:
    rows = [toy_row(0), toy_row(1)]
    rows[1]["key"] = rows[0]["key"]
    write_part(tmp_path / "p", "0", rows, {rows[0]["key"]: render("red")})
    found = rows_of(list_parts(str(tmp_path / "p"))[0])
    assert [r[UID] for r in found] == [r["uid"] for r in rows]
    assert [r[IMAGE_ERROR] for r in found] == [None, "missing_image"]


def test_tar_alone_reads_json_and_derives_uids(tmp_path: Path) -> None:
    named, bare = (
        tar_row(toy_row(0), render("red")),
        TarRow("x", (make_member("x.png", b"p"), make_member("x.txt", b"caption"))),
    )
    odd = TarRow("y", (make_member("y.jpg", b"j"), make_member("y.json", b"{broken")))
    with (tmp_path / "0.tar").open("wb") as file:
        write_rows(file, [named, bare, odd])
    rows = rows_of(list_parts(str(tmp_path))[0])
    assert rows[0][UID] == toy_row(0)["uid"] and rows[0]["original_width"] == 200
    assert (rows[1][TEXT], rows[1][IMAGE], len(str(rows[1][UID]))) == ("caption", b"p", 32)
    assert rows[2][TEXT] is None
    assert rows_of(list_parts(str(tmp_path))[0]) == rows


def test_tar_alone_cut_short_is_reported(tmp_path: Path) -> None:
    with (tmp_path / "0.tar").open("wb") as file:
        write_rows(file, [tar_row(toy_row(n), render("red")) for n in range(5)])
    whole = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(whole[: len(whole) // 2])
    read = read_part(list_parts(str(tmp_path))[0])
    assert read.broken and "cut short" in read.broken
    assert 0 < read.table.num_rows < 5


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"uid": ["0" * 32]}, "neither a 'text' nor a 'caption'"),
        ({"text": ["a"]}, "neither a 'uid' nor a 'url'"),
    ],
)
def test_parquet_without_a_needed_column(tmp_path: Path, columns: dict[str, list[str]], message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "0.parquet")
    with pytest.raises(PoolError, match=message):
        read_part(list_parts(str(tmp_path))[0])


GOOD = {"uid": ["0a" * 16, "0b" * 16], "text": ["a", "b"], "url": ["u", "v"]}


@pytest.mark.parametrize(
    ("column", "values", "expected"),
    [
        ("uid", pa.array(["0A" * 16, None]), ["0a" * 16]),
        ("uid", pa.array(["0a0a0a0a-0a0a-0a0a-0a0a-0a0a0a0a0a0a", "short"]), ["0a" * 16]),
        ("uid", pa.array(GOOD["uid"], pa.large_string()), GOOD["uid"]),
        ("uid", pa.array(GOOD["uid"]).dictionary_encode(), GOOD["uid"]),
        ("uid", pa.array([b"\x0a" * 16, b"\x0b" * 16], pa.binary(16)), GOOD["uid"]),
        ("text", pa.array(["a", "b"], pa.large_string()), GOOD["uid"]),
        ("status", pa.array([1, 2]), []),
        ("__row__", pa.array([7, 7]), GOOD["uid"]),
        ("image", pa.array(["x", "y"]), GOOD["uid"]),
    ],
)
def test_columns_of_other_types(tmp_path: Path, column: str, values: pa.Array, expected: list[str]) -> None:
    pq.write_table(pa.table(GOOD | {column: values}), tmp_path / "0.parquet")
    part = list_parts(str(tmp_path))[0]
    read = read_part(part)
    assert read.table[UID].to_pylist() == expected
    assert read.num_listed == 2 == read.table.num_rows + sum(read.failed.values())
    assert [row[ROW] for row in rows_of(part, images=False)] == list(range(len(expected)))


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("uid", pa.array([[1], [2]]), "column 'uid' is list"),
        ("text", pa.array([["a"], ["b"]]), "column 'text' is list"),
        ("text", pa.array([1.5, 2.5]), "column 'text' is double"),
    ],
)
def test_columns_that_cannot_be_text(tmp_path: Path, column: str, values: pa.Array, message: str) -> None:
    pq.write_table(pa.table(GOOD | {column: values}), tmp_path / "0.parquet")
    with pytest.raises(PoolError, match=message):
        read_part(list_parts(str(tmp_path))[0])


@pytest.mark.parametrize("keys", [None, [0, 1]])
def test_tar_whose_parquet_has_no_usable_key(make_pool: MakePool, keys: list[int] | None) -> None:
    """Numbering rows instead would pair captions with other rows' images."""
    pool = make_pool(2, 1)
    table = pq.read_table(pool / "00000000.parquet").drop_columns(["key"])
    pq.write_table(table.append_column("key", pa.array(keys)) if keys else table, pool / "00000000.parquet")
    with pytest.raises(PoolError, match="key"):
        read_part(list_parts(str(pool))[0])


@pytest.mark.parametrize(
    "details",
    [
        b'{"caption": "\\ud83d", "url": "\\ud83d"}',
        b'{"original_width": 1' + b"0" * 400 + b"}",
        b"[" * 100_000,
        b"[1]",
        b"\xff",
    ],
)
def test_odd_json_costs_no_row(tmp_path: Path, details: bytes) -> None:
    with (tmp_path / "0.tar").open("wb") as file:
        write_rows(
            file, [TarRow("caf\udce9", (make_member("caf\udce9.jpg", b"j"), make_member("caf\udce9.json", details)))]
        )
    (row,) = rows_of(list_parts(str(tmp_path))[0])
    assert row["original_width"] is None and len(str(row[UID])) == 32


def test_metadata_only_and_caption_spelling(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": ["u", "u", "v"], "caption": ["a", "a", None]}), tmp_path / "0.parquet")
    part = list_parts(str(tmp_path))[0]
    assert IMAGE not in list_columns(part)
    rows = rows_of(part, images=False)
    assert rows[0][UID] == rows[1][UID] != rows[2][UID]
    assert rows[2][TEXT] is None


def test_broken_parquet(tmp_path: Path) -> None:
    (tmp_path / "0.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(PoolError, match="cannot be read as parquet"):
        read_part(list_parts(str(tmp_path))[0])


def test_real_pool_rows_equal_its_parquet(real_data: Path) -> None:
    part = list_parts(str(real_data / "pools" / "openstax"))[0]
    rows = rows_of(part)
    table = pq.read_table(part.table)
    assert [r[UID] for r in rows] == table["uid"].to_pylist()
    assert all(r[IMAGE] for r in rows)
    assert json.dumps([r[TEXT] for r in rows]) == json.dumps(table["text"].to_pylist())
