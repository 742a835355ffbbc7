import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from pipeline.tars import (
    BrokenTar,
    _parse_plain,
    make_member,
    pack_row,
    read_rows,
    rename_packed,
    rename_row,
    split_name,
    unpack_row,
    write_rows,
)
from pipeline.tars import TarRow as Row

LONG = "folder/" + "x" * 150


def row(key: str, **contents: bytes) -> Row:
    return Row(key, tuple(make_member(f"{key}.{extension}", content) for extension, content in contents.items()))


ROWS = [row("000", jpg=b"j" * 700, txt=b""), row(LONG, jpg=b"k" * 512, txt="ключ".encode()), row("ключ", png=b"p")]


def write(path: Path, rows: list[Row] = ROWS) -> str:
    with path.open("wb") as file:
        assert write_rows(file, rows) == len(rows)
    return str(path)


def contents(rows: list[Row]) -> list[tuple[str, list[tuple[str, bytes]]]]:
    return [(r.key, [(m.name, m.content) for m in r.members]) for r in rows]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jpg", ("a", "jpg")),
        ("a/b.c/d.seg.PNG", ("a/b.c/d", "seg.png")),
        ("noext", ("noext", "")),
        ("a.b/c", ("a.b/c", "")),
    ],
)
def test_key_ends_at_the_first_dot(name: str, expected: tuple[str, str]) -> None:
    assert split_name(name) == expected


def test_round_trip_and_same_bytes_twice(tmp_path: Path) -> None:
    url = write(tmp_path / "a.tar")
    assert contents(list(read_rows(url))) == contents(ROWS)
    assert Path(write(tmp_path / "b.tar")).read_bytes() == Path(url).read_bytes()


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_reads_what_the_standard_library_writes_and_the_reverse(tmp_path: Path, format: int) -> None:
    names = ["a.jpg", "a.txt", "дом.jpg"] + ([] if format == tarfile.USTAR_FORMAT else [LONG + ".jpg"])
    with tarfile.open(tmp_path / "a.tar", "w", format=format) as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = 3, 12345.5
            archive.addfile(info, io.BytesIO(b"abc"))
        folder = tarfile.TarInfo("folder/")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    assert [m.name for r in read_rows(str(tmp_path / "a.tar")) for m in r.members] == names[:2] + names[2:]
    with tarfile.open(write(tmp_path / "b.tar")) as archive:
        assert archive.getnames() == [m.name for r in ROWS for m in r.members]


def test_links_and_devices_are_not_rows(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        link = tarfile.TarInfo("evil.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    assert list(read_rows(str(tmp_path / "a.tar"))) == []


@pytest.mark.parametrize("only_headers", [False, True])
def test_every_cut_gives_whole_rows_then_an_error(tmp_path: Path, only_headers: bool) -> None:
    whole = Path(write(tmp_path / "a.tar")).read_bytes()
    spans = [r.span for r in read_rows(str(tmp_path / "a.tar"))]
    for cut in [0, 1, 511, 512, 600, *(end for _, end in spans), *(end - 1 for _, end in spans), spans[1][0] + 700]:
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        rows = []
        with pytest.raises(BrokenTar, match="cut short"):
            for r in read_rows(str(tmp_path / "cut.tar"), contents=not only_headers):
                rows.append(r)
        whole_rows = sum(end <= cut for _, end in spans)
        assert whole_rows - 1 <= len(rows) <= whole_rows, cut  # the last one may lack members that were cut off
        assert [r.key for r in rows] == [r.key for r in ROWS[: len(rows)]]


def test_damaged_header_stops_with_a_position(tmp_path: Path) -> None:
    whole = bytearray(Path(write(tmp_path / "a.tar")).read_bytes())
    second = next(r.span[0] for r in list(read_rows(str(tmp_path / "a.tar")))[1:])
    whole[second + 148] ^= 0xFF
    (tmp_path / "bad.tar").write_bytes(whole)
    with pytest.raises(BrokenTar, match=f"byte {second}"):
        list(read_rows(str(tmp_path / "bad.tar")))


def test_members_that_do_not_stand_together(tmp_path: Path) -> None:
    mixed = [row("a", jpg=b"1"), row("b", jpg=b"2"), row("a", txt=b"3")]
    rows = read_rows(write(tmp_path / "a.tar", mixed))
    assert [next(rows).key, next(rows).key] == ["a", "b"]
    with pytest.raises(BrokenTar, match="do not stand together"):
        next(rows)


def test_leading_dot_slash_is_no_part_of_a_key(tmp_path: Path) -> None:
    assert [r.key for r in read_rows(write(tmp_path / "a.tar", [row("./a", jpg=b"1"), row("./b", jpg=b"2")]))] == [
        "a",
        "b",
    ]


def test_tars_joined_in_one_file_are_refused(tmp_path: Path) -> None:
    whole = Path(write(tmp_path / "a.tar")).read_bytes()
    (tmp_path / "b.tar").write_bytes(whole + whole)
    with pytest.raises(BrokenTar, match="goes on after its end mark"):
        list(read_rows(str(tmp_path / "b.tar")))


@pytest.mark.parametrize("size", [-512, -1, 1 << 38, 1 << 60])
@pytest.mark.parametrize("only_headers", [False, True])
def test_absurd_sizes(tmp_path: Path, size: int, only_headers: bool) -> None:
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (b"\xff" if size < 0 else b"\x80") + (size % (1 << 88)).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "a.tar").write_bytes(bytes(header) + b"x" * 700)
    with pytest.raises(BrokenTar):
        list(read_rows(str(tmp_path / "a.tar"), contents=not only_headers))


def test_sparse_members_are_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.jpg")
    info.type = tarfile.GNUTYPE_SPARSE
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(BrokenTar, match="sparse"):
        list(read_rows(str(tmp_path / "a.tar")))


def test_not_a_tar_and_absurd_name_header(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"this is no tar" * 100)
    with pytest.raises(BrokenTar):
        list(read_rows(str(tmp_path / "a.tar")))
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 33
    (tmp_path / "b.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(BrokenTar, match="plausible"):
        list(read_rows(str(tmp_path / "b.tar")))


def test_span_holds_exactly_the_row(tmp_path: Path) -> None:
    url = write(tmp_path / "a.tar")
    whole = Path(url).read_bytes()
    for expected, read in zip(ROWS, read_rows(url, contents=False), strict=True):
        start, end = read.span
        assert whole[start:end] == pack_row(expected)
        assert contents([unpack_row(whole[start:end], url)]) == contents([expected])


def test_rename_keeps_extensions_and_bytes() -> None:
    renamed = rename_row(row("a", **{"seg.png": b"1", "txt": b"2"}), "b-1")
    assert [(m.name, m.content) for m in renamed.members] == [("b-1.seg.png", b"1"), ("b-1.txt", b"2")]


def random_name(random: np.random.Generator) -> str:
    letters = random.choice(list("abcxyz019/._-ключ"), int(random.integers(1, 60)))
    return "".join(letters).strip("/.") or "a"


def test_fast_header_reading_agrees_with_the_standard_library() -> None:
    """On whole headers of every kind, and on ones with a few bytes changed in the fields that it reads."""
    random = np.random.default_rng(0)
    fields = np.r_[0:100, 124:136, 148:157, 345:512]
    num_plain = 0
    for number in range(3000):
        info = tarfile.TarInfo(random_name(random))
        info.size, info.mode = int(random.integers(0, 1 << 34)), 0o644
        info.type = bytes(random.choice(list(b"0\x00005xL7"), 1).astype(np.uint8))
        header = bytearray(info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")[-512:])
        for at in random.choice(fields, number % 3):
            header[at] = random.choice([0, 32, 47, 48, 56, 128, 255])
        if number % 2:
            header[148:156] = b" " * 8
            header[148:156] = b"%06o\0 " % sum(header)
        plain = _parse_plain(bytes(header))
        if plain is not None:
            num_plain += 1
            expected = tarfile.TarInfo.frombuf(bytes(header), "utf-8", "surrogateescape")
            assert plain == (expected.name, expected.size) and expected.isreg()
    assert 400 < num_plain < 2000


@pytest.mark.parametrize(
    ("key", "new"), [("a", "b" * 90), ("a" * 80, "b"), ("ключ", "uid-0"), ("a/b", "c/d/e"), ("same", "same")]
)
def test_renaming_in_place_is_renaming(key: str, new: str) -> None:
    members = row(key, **{"jpg": b"1" * 700, "seg.png": b"", "txt": b"2"})
    before, after = bytearray(b"xx" + pack_row(members) + b"yy"), pack_row(rename_row(members, new))
    assert rename_packed(before, 2, len(before) - 2, key, new)
    assert bytes(before) == b"xx" + after + b"yy"


@pytest.mark.parametrize(
    ("packed", "key", "new"),
    [
        (pack_row(row("a", jpg=b"1", txt=b"2")), "a", "b" * 98),  # does not fit
        (pack_row(row(LONG, jpg=b"1")), LONG, "b"),  # a long-name header
        (pack_row(row("./a", jpg=b"1")), "a", "b"),
        (pack_row(row("a", jpg=b"1"))[:-512], "a", "b"),  # cut
        (pack_row(row("a", jpg=b"1")) + bytes(512), "a", "b"),
    ],
)
def test_renaming_in_place_changes_all_or_nothing(packed: bytes, key: str, new: str) -> None:
    buffer = bytearray(packed)
    assert not rename_packed(buffer, 0, len(buffer), key, new) and buffer == packed


def test_find_prefers_the_order_asked_for() -> None:
    both = row("a", png=b"p", jpg=b"j")
    assert both.find(("jpg", "png")) == b"j"
    assert both.find(("webp",)) is None


def test_the_last_whole_row_before_a_cut_is_given(tmp_path: Path) -> None:
    rows = [Row(key, (make_member(f"{key}.jpg", b"x" * 900), make_member(f"{key}.txt", b"y"))) for key in "abc"]
    whole = tmp_path / "whole.tar"
    with whole.open("wb") as file:
        write_rows(file, rows)
    spans = [row.span for row in read_rows(str(whole))]
    for cut, wanted in ((spans[1][0] + 600, "a"), (spans[1][0] + 300, ""), (spans[1][1] - 500, "a")):
        (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[:cut])
        for contents in (True, False):
            found = []
            with pytest.raises(BrokenTar):
                for row in read_rows(str(tmp_path / "cut.tar"), contents=contents):
                    found.append(row.key)
            assert "".join(found) == wanted


def test_a_cut_long_name_does_not_end_the_row_before_it(tmp_path: Path) -> None:
    first, second = make_member("a.jpg", b"x"), make_member("a." + "n" * 150, b"y")
    with (tmp_path / "whole.tar").open("wb") as file:
        write_rows(file, [Row("a", (first, second))])
    (tmp_path / "cut.tar").write_bytes((tmp_path / "whole.tar").read_bytes()[: 1024 + 512 + 100])
    with pytest.raises(BrokenTar):
        assert list(read_rows(str(tmp_path / "cut.tar"))) == []
