"""What DataComp leaves on disk, healthy and with each failure that its users met; oracles are numpy and plain sets."""

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toy import render, toy_row, write_part

from pipeline.datacomp import uid_sets
from pipeline.datacomp.findings import Finding
from pipeline.datacomp.metadata import COLUMNS, check_metadata
from pipeline.datacomp.shard_findings import count_seen
from pipeline.datacomp.shards import check_shards
from pipeline.datacomp.subsets import bring_in_subset, open_multiset
from pipeline.datacomp.tables import parse_column
from pipeline.errors import ConfigError, PoolError
from pipeline.manifest import Counts, read_manifest
from pipeline.subset import read_subset
from pipeline.uid import UID_DTYPE, format_uids

A, B = "a" * 32, "b" * 32


def uids_of(start: int, num: int) -> list[str]:
    return [str(toy_row(n)["uid"]) for n in range(start, start + num)]


def metadata_table(uids: list[str], **columns: Any) -> pa.Table:
    """A parquet as the hub has it."""
    num = len(uids)
    made = {"uid": uids, "url": ["https://x.org/1"] * num, "text": ["a red square"] * num, "sha256": ["0" * 64] * num}
    made |= {
        "original_width": [640] * num,
        "original_height": [480] * num,
        "face_bboxes": [[[0.1, 0.1, 0.2, 0.2]]] * num,
    }
    made |= {name: [0.25] * num for name in COLUMNS if name.startswith("clip_")}
    types = {name: kind for name, (kind, _) in COLUMNS.items()}
    arrays = {name: pa.array(made[name], types[name]) for name in types}
    return pa.table(arrays | columns)


def write_arrays(path: Path, num: int, **other: np.ndarray) -> None:
    widths = {"b32_img": 4, "b32_txt": 4, "l14_img": 6, "l14_txt": 6, "dedup": 5}
    np.savez(path, **{name: np.zeros((num, width), np.float16) for name, width in widths.items()} | other)


@pytest.fixture
def metadata(tmp_path: Path) -> Path:
    """Two files of five rows, with npz."""
    folder = tmp_path / "data" / "metadata"
    folder.mkdir(parents=True)
    for name, start in ((A, 0), (B, 5)):
        pq.write_table(metadata_table(uids_of(start, 5)), folder / f"{name}.parquet")
        write_arrays(folder / f"{name}.npz", 5)
    return folder


def test_healthy_metadata(metadata: Path, tmp_path: Path) -> None:
    section = check_metadata(str(metadata), str(tmp_path / "scratch"))
    assert section.findings == [] and section.counts == Counts(read=10, kept=10)
    assert section.numbers == {"files": 2, "npz files": 2, "rows": 10, "uids": 10, "repeated": 0}
    assert section.facts["columns"]["uid"] == {"string": 2} and section.facts["arrays"]["l14_img"] == {"float16 x 6": 2}
    assert section.uids and format_uids(read_subset(section.uids)).to_pylist() == sorted(uids_of(0, 10))


def rewrite(folder: Path, change: Callable[[pa.Table], pa.Table], name: str = B) -> None:
    path = folder / f"{name}.parquet"
    pq.write_table(change(pq.read_table(path)), path)


def set_column(name: str, values: list[Any], kind: pa.DataType) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        return table.set_column(table.column_names.index(name), name, pa.array(values, kind))

    return change


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def drop(*names: str) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda table: table.drop_columns(list(names)))


def hold(name: str, values: list[Any], kind: pa.DataType | None = None) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, set_column(name, values, kind or pa.string()))


def move_into_part(folder: Path) -> None:
    (folder / "part_3").mkdir()
    for suffix in (".parquet", ".npz"):
        (folder / f"{B}{suffix}").rename(folder / "part_3" / f"{B}{suffix}")


def spoil_pages(folder: Path) -> None:
    """A footer that can be read over data that cannot: what a file system leaves after a crash."""
    path = folder / f"{B}.parquet"
    content = bytearray(path.read_bytes())
    content[4:300] = bytes(296)
    path.write_bytes(bytes(content))


def spoil_faces(path: Path) -> None:
    """Of a sound parquet, make all pages of face_bboxes unreadable."""
    footer = pq.read_metadata(path).row_group(0)
    column = next(c for c in map(footer.column, range(footer.num_columns)) if c.path_in_schema.startswith("face"))
    start = column.dictionary_page_offset or column.data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(content)


METADATA_FAILURES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "cut": (lambda f: cut(f / f"{B}.parquet"), "broken", f"1 of 2 files ({B}.parquet: "),
    "empty": (lambda f: (f / f"{B}.parquet").write_bytes(b""), "broken", "cannot be read"),
    "pages": (spoil_pages, "broken", "cannot be read"),
    "no uid": (drop("uid"), "broken", "lack column 'uid'"),
    "no text": (drop("text"), "broken", "lack column 'text'"),
    "no score": (drop("clip_l14_similarity_score"), "warning", "lack column 'clip_l14_similarity_score': clip_score"),
    "double": (hold("original_width", [1.0] * 5, pa.float64()), "warning", "'original_width' is double in 1 files"),
    "null text": (hold("text", ["a", None, "b", None, "c"]), "warning", "2 rows have a null caption"),
    "null url": (hold("url", ["a", None, "b", "d", "c"]), "warning", "1 rows have a null 'url'"),
    "bad uid": (hold("uid", [*uids_of(5, 3), None, "no uid"]), "warning", "2 rows have no uid of 32 hex digits"),
    "repeated": (hold("uid", uids_of(2, 5)), "warning", "3 rows have the uid of another row"),
    "short npz": (lambda f: write_arrays(f / f"{B}.npz", 4), "broken", f"({B}.npz: 4 rows, 5 in the parquet)"),
    "uneven npz": (lambda f: write_arrays(f / f"{B}.npz", 5, dedup=np.zeros((6, 2), "f2")), "broken", "6 rows, 5 in"),
    "cut npz": (lambda f: cut(f / f"{B}.npz"), "broken", f"1 of 2 npz ({B}.npz: cannot be read as npz"),
    "few arrays": (
        lambda f: np.savez(f / f"{B}.npz", l14_img=np.zeros((5, 6), "f2")),
        "warning",
        "no b32_img, b32_txt, ",
    ),
    "no npz": (lambda f: (f / f"{B}.npz").unlink(), "warning", f"1 of 2 files ({B}.parquet) have no npz"),
    "no parquet": (lambda f: (f / f"{B}.parquet").unlink(), "warning", f"1 of 2 npz ({B}.npz) have no parquet"),
    "incomplete": (lambda f: (f / "x.incomplete").touch(), "warning", "an interrupted download left x.incomplete"),
    "cache": (lambda f: (f.parent / "hf").mkdir(), "warning", "an interrupted download left ../hf"),
    "parts": (move_into_part, "warning", f"1 of 2 files (part_3/{B}.parquet) stand in part_* folders"),
    "other": (lambda f: (f / "README.md").touch(), "note", "passed over: README.md"),
}


@pytest.mark.parametrize(("spoil", "level", "message"), METADATA_FAILURES.values(), ids=METADATA_FAILURES)
def test_what_is_wrong_with_metadata_is_named(
    metadata: Path, tmp_path: Path, spoil: Callable[[Path], object], level: str, message: str
) -> None:
    spoil(metadata)
    section = check_metadata(str(metadata), str(tmp_path / "scratch"))
    assert [(f.level, message in f.message) for f in section.findings] == [(level, True)], section.findings
    section.counts.check("metadata")
    kept = section.counts.kept
    assert section.numbers["uids"] + section.numbers["repeated"] == kept and json.dumps(section.facts, allow_nan=False)


def test_caption_serves_as_text_and_more_columns_are_noted(metadata: Path, tmp_path: Path) -> None:
    for name in (A, B):
        rewrite(
            metadata,
            lambda table: table.rename_columns(["caption" if c == "text" else c for c in table.column_names]),
            name,
        )
    found = check_metadata(str(metadata), str(tmp_path / "scratch")).findings
    assert [(f.level, f.message.split(":")[0]) for f in found] == [
        ("warning", "all 2 files lack column 'text'"),
        ("note", "columns that the hub's files do not have"),
    ]


def test_scale_says_how_much_is_missing(metadata: Path, tmp_path: Path) -> None:
    (finding,) = check_metadata(str(metadata), str(tmp_path / "scratch"), scale="small").findings
    assert finding.level == "warning" and "10 rows are 0.00% of the 12,800,000 of small" in finding.message


def test_faces_are_not_read(metadata: Path, tmp_path: Path) -> None:
    """They are the widest column, and no footer says how many are null."""
    spoil_faces(metadata / f"{B}.parquet")
    with pytest.raises((OSError, pa.ArrowException)):
        pq.read_table(metadata / f"{B}.parquet", columns=["face_bboxes"])
    assert check_metadata(str(metadata), str(tmp_path / "scratch")).findings == []


def test_nulls_are_counted_where_the_footer_does_not_say(metadata: Path, tmp_path: Path) -> None:
    table = metadata_table(uids_of(5, 5), text=pa.array(["a", None, None, "b", None]))
    pq.write_table(table, metadata / f"{B}.parquet", write_statistics=False, row_group_size=2)
    (finding,) = check_metadata(str(metadata), str(tmp_path / "scratch")).findings
    assert "3 rows have a null caption" in finding.message


@pytest.mark.parametrize("folder", ["nowhere", "empty"])
def test_no_metadata_is_an_error(tmp_path: Path, folder: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(PoolError, match="--data_dir"):
        check_metadata(str(tmp_path / folder), str(tmp_path / "scratch"))


@pytest.mark.parametrize(
    ("column", "uids", "num_bad"),
    [
        (pa.array([], pa.string()), [], 0),
        (pa.array([A, B.upper()]), [A, B], 0),
        (pa.array([f"{A[:8]}-{A[8:]}", None, "", "x" * 32, A + "0", "\u00e4" * 16]), [A], 5),
        (pa.array([A, None], pa.large_string()), [A], 1),
        (pa.array([bytes.fromhex(B), None], pa.binary(16)), [B], 1),
        (pa.array([1, 2]), [], 2),
        (pa.array([A, B, A]).dictionary_encode(), [A, B, A], 0),
    ],
)
def test_uids_are_read_from_what_holds_them(column: pa.Array, uids: list[str], num_bad: int) -> None:
    found, bad = parse_column(column)
    assert format_uids(found).to_pylist() == uids and bad == num_bad


KINDS = ("hashes", "numbers", "few", "ends", "sorted", "one", "none")


def make_uids(kind: str, num: int = 1000) -> np.ndarray:
    rng = np.random.default_rng(0)
    uids = np.zeros(0 if kind == "none" else num, UID_DTYPE)
    if kind in ("hashes", "sorted"):
        uids["f0"], uids["f1"] = rng.integers(0, 2**64, (2, num), dtype=np.uint64)
    elif kind == "numbers":
        uids["f1"] = rng.permutation(num)
    elif kind == "few":
        uids["f0"], uids["f1"] = rng.integers(0, 3, num), rng.integers(0, 9, num)
    elif kind == "ends":
        uids["f0"], uids["f1"] = rng.choice(np.array([0, 1, 2**64 - 1], np.uint64), (2, num))
    return np.sort(uids) if kind == "sorted" else uids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("run_rows", [64, 700, 1 << 20])
def test_sorting_outside_memory_is_numpys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, run_rows: int
) -> None:
    monkeypatch.setattr(uid_sets, "RUN_ROWS", run_rows)
    uids = make_uids(kind)
    merged = uid_sets.write_sorted(str(tmp_path / "ours.npy"), uids, str(tmp_path / "scratch"))
    np.save(tmp_path / "theirs.npy", np.sort(uids))
    assert (tmp_path / "ours.npy").read_bytes() == (tmp_path / "theirs.npy").read_bytes()
    assert merged[:2] == (len(set(uids.tolist())), len(uids)) and not (tmp_path / "scratch").exists()
    distinct = uid_sets.write_distinct(str(tmp_path / "d.npy"), np.array_split(uids, 7), str(tmp_path / "scratch"))
    assert (np.load(tmp_path / "d.npy") == np.unique(uids)).all() and distinct.num_uids == len(np.unique(uids))
    others = np.sort(uids[::3])
    assert uid_sets.count_shared(np.sort(uids), others) == len(set(uids.tolist()) & set(others.tolist()))


def test_sorting_holds_no_more_than_a_few_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(uid_sets, "RUN_ROWS", 500)
    ranges = [len(piece) for piece in uid_sets._sort_outside(make_uids("hashes", 8_000), str(tmp_path / "scratch"))]
    assert sum(ranges) == 8_000 and max(ranges) < 3 * 500


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("run_rows", [10, 1 << 20])
def test_disorder_is_found(monkeypatch: pytest.MonkeyPatch, kind: str, run_rows: int) -> None:
    monkeypatch.setattr(uid_sets, "RUN_ROWS", run_rows)
    uids = make_uids(kind, 100)
    listed = uids.tolist()
    falls = [row for row in range(1, len(listed)) if listed[row] < listed[row - 1]]
    assert uid_sets.find_disorder(uids) == (len(falls), falls[0] if falls else None)


@pytest.mark.parametrize("kind", ["hashes", "few", "sorted"])
def test_lookups_in_an_unsorted_file_are_numpys(kind: str) -> None:
    """DataComp's resharder calls np.searchsorted for one uid, left and right, and writes right - left rows."""
    uids = make_uids(kind, 500)
    distinct = [np.array([uid], UID_DTYPE)[0] for uid in sorted(set(uids.tolist()))]
    found = [uid for uid in distinct if np.searchsorted(uids, uid, "right") > np.searchsorted(uids, uid, "left")]
    assert uid_sets.look_up(uids) == (len(distinct), len(found))
    assert (len(found) == len(distinct)) == (kind == "sorted")


def subset_numbers(tmp_path: Path, url: Path) -> tuple[dict[str, int], list[Finding]]:
    section = bring_in_subset(str(url), "mine", str(tmp_path / "out"), str(tmp_path / "scratch"))
    return section.numbers, section.findings


def test_sorted_subset_keeps_its_bytes(tmp_path: Path) -> None:
    np.save(tmp_path / "mine.npy", make_uids("sorted"))
    numbers, findings = subset_numbers(tmp_path, tmp_path / "mine.npy")
    assert (tmp_path / "out" / "mine.npy").read_bytes() == (tmp_path / "mine.npy").read_bytes()
    assert numbers == {"rows": 1000, "uids": 1000} and findings == []


@pytest.mark.parametrize("name", ["mine.npy", "mine.bin", "mine"])
def test_bare_unsorted_subset_with_repeats(tmp_path: Path, name: str) -> None:
    """np.memmap writes such files, under any name; the resharder copies one to sample_ids.npy as it is."""
    uids = np.repeat(make_uids("hashes", 400), 2)
    uids.tofile(tmp_path / name)
    numbers, findings = subset_numbers(tmp_path, tmp_path / name)
    made = np.load(tmp_path / "out" / "mine.npy")
    assert made.dtype == np.dtype("u8,u8") and (made == np.sort(uids)).all()
    assert numbers == {"rows": 800, "uids": 400} and [f.level for f in findings] == ["warning", "note", "note"]
    assert "out of order in" in findings[0].message and "of 400 of its uids" in findings[0].message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes, which is no whole number"),
        (b"\0" * 40, "40 bytes, which is no whole number"),
        ((A + "\n").encode() * 16, "is text"),
        (np.zeros((3, 2), "u8"), r"uint64 of shape \(3, 2\)"),
        (np.array([A, B]), "<U32 of shape"),
        (np.zeros(3, ">u8,>u8"), "of shape"),
        (b"\x93NUMPY\x01\0", "neither a .npy file"),
        (None, "there is no subset file"),
    ],
)
def test_what_is_no_subset_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "mine.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)
    with pytest.raises(PoolError, match=message):
        open_multiset(str(path))


def test_a_file_of_somebody_else_is_not_overwritten(tmp_path: Path) -> None:
    np.save(tmp_path / "mine.npy", make_uids("hashes"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.npy").write_bytes(b"precious")
    with pytest.raises(ConfigError, match="left as it is"):
        subset_numbers(tmp_path, tmp_path / "mine.npy")
    assert (tmp_path / "out" / "mine.npy").read_bytes() == b"precious"


def test_a_changed_subset_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for num in (30, 40):
        np.save(tmp_path / "mine.npy", make_uids("hashes", num))
        assert subset_numbers(tmp_path, tmp_path / "mine.npy")[0]["rows"] == num
    (tmp_path / "out" / "mine.npy").write_bytes(b"cut short")
    assert subset_numbers(tmp_path, tmp_path / "mine.npy")[0]["rows"] == 40
    assert len(read_subset(str(tmp_path / "out" / "mine.npy"))) == 40
    manifest = read_manifest(str(tmp_path / "out"), name="mine.json")
    assert manifest and manifest.counts["rows"] == Counts(read=40, kept=40)


@pytest.mark.parametrize(
    ("numbers", "seen"),
    [([], 0), ([1, 2], 0), ([0], 1), ([0, 1], 2), ([0, 2], 1), ([0, 1, 2, 4, 5, 6], 3), (range(9), 9)],
)
def test_resharder_sees_shards_by_doubling(numbers: list[int], seen: int) -> None:
    """Numbers that guess_num_shards of resharder.py gave for folders with these tars."""
    assert count_seen(set(numbers)) == seen


def write_shard(folder: Path, number: int, *, rows: int = 4) -> None:
    """img2dataset's three files; the last row of each shard failed to download."""
    listed = [toy_row(number * rows + n) for n in range(rows)]
    listed[-1]["status"] = "failed_to_download"
    images = {row["key"]: render("red", 0, side=8) for row in listed[:-1]}
    write_part(folder, f"{number:08d}", listed, images)
    stats = {"count": rows, "successes": rows - 1, "failed_to_download": 1, "failed_to_resize": 0}
    (folder / f"{number:08d}_stats.json").write_text(json.dumps(stats))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "shards"
    for number in range(5):
        write_shard(folder, number)
    return folder


def test_healthy_shards(shards: Path, tmp_path: Path) -> None:
    section = check_shards(str(shards), str(tmp_path / "scratch"))
    assert section.findings == [] and section.counts == Counts(read=20, kept=15, failed={"not_downloaded": 5})
    numbers = {"tars": 5, "stats": 5, "parquets": 5, "rows": 20, "success": 15, "failed_to_download": 5}
    assert section.numbers == numbers | {"uids": 15, "repeated": 0}
    uids = [uid for n, uid in enumerate(uids_of(0, 20)) if n % 4 < 3]
    assert section.uids and format_uids(read_subset(section.uids)).to_pylist() == sorted(uids)


def remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def write_json(name: str, content: Any) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(json.dumps(content))


def flip_status(folder: Path) -> None:
    """One byte of a status is no UTF-8 any more."""
    path = folder / "00000001.parquet"
    pq.write_table(pq.read_table(path), path, compression="none", write_statistics=False)
    path.write_bytes(path.read_bytes().replace(b"success", b"su\xffcess", 1))


def repeat_shard(folder: Path) -> None:
    rows = pq.read_table(folder / "00000001.parquet")
    pq.write_table(rows, folder / "00000003.parquet")


SHARD_FAILURES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "gap": (
        remove("00000003.tar", "00000003.parquet", "00000003_stats.json"),
        ["1 numbers are missing between the tars: 00000003", "would find 3 of 4. Give it --num-shards 5"],
    ),
    "gap off the path": (
        lambda f: [write_shard(f, 5), write_shard(f, 6), *(p.unlink() for p in f.glob("00000004*"))],
        ["1 numbers are missing between the tars: 00000004"],
    ),
    "no stats": (remove("00000003_stats.json"), ["1 of 5 tars (00000003) have no stats: DataComp's resharder passes"]),
    "stopped": (
        remove("00000004_stats.json", "00000004.parquet"),
        ["1 of 5 tars (00000004.tar) have no parquet", "(00000004) have no stats"],
    ),
    "no parquet": (remove("00000004.parquet"), ["1 of 5 tars (00000004.tar) have no parquet"]),
    "empty stats": (
        lambda f: (f / "00000002_stats.json").write_text(""),
        ["(00000002_stats.json: empty) cannot be read"],
    ),
    "other stats": (write_json("00000002_stats.json", [1]), ["no `successes` in it"]),
    "infinite": (write_json("00000002_stats.json", {"successes": float("inf")}), ["no `successes` in it"]),
    "successes": (
        write_json("00000002_stats.json", {"successes": 4}),
        ["(00000002: 4 in the stats, 3 in the parquet)"],
    ),
    "cut tar": (lambda f: cut(f / "00000001.tar"), ["1 of 5 tars (00000001.tar: 20,473 bytes) are not whole"]),
    "no end": (
        lambda f: (f / "00000001.tar").write_bytes((f / "00000001.tar").read_bytes()[:3072]),
        ["(00000001.tar: no end mark) are not whole"],
    ),
    "no tar": (remove("00000004.tar"), ["1 of 5 shards (00000004) have no tar"]),
    "cut parquet": (lambda f: cut(f / "00000001.parquet"), ["1 of 5 parquet (00000001.parquet: "]),
    "flipped byte": (flip_status, ["1 of 5 parquet (00000001.parquet: 'utf-8' codec can't decode byte 0xff"]),
    "no uid": (
        lambda f: rewrite(f, lambda table: table.drop_columns(["uid"]), "00000001"),
        ["1 of 5 parquet (00000001.parquet) have no column 'uid'"],
    ),
    "repeated": (repeat_shard, ["3 images have the uid of another one"]),
    "no parquets": (
        lambda f: [path.unlink() for path in f.glob("*.parquet")],
        ["all 5 tars have no parquet, as when a download was stopped"],
    ),
    "sizes": (
        write_json("sizes.json", {"00000000.tar": 3, "00000001.tar": 9, "00000009.tar": 1}),
        ["sizes.json is not true of 00000009.tar: which is not there; 00000001.tar: 9 for 3"],
    ),
    "five digits": (
        lambda f: [p.rename(f / p.name[3:]) for p in f.iterdir()],
        ["would find 0 of 5. Name them 00000000.tar"],
    ),
}


@pytest.mark.parametrize(("spoil", "messages"), SHARD_FAILURES.values(), ids=SHARD_FAILURES)
def test_what_is_wrong_with_shards_is_named(
    shards: Path, tmp_path: Path, spoil: Callable[[Path], object], messages: list[str]
) -> None:
    spoil(shards)
    section = check_shards(str(shards), str(tmp_path / "scratch"))
    assert len(section.findings) == len(messages), section.findings
    assert all(want in f.message for want, f in zip(messages, section.findings, strict=True)), section.findings
    section.counts.check("shards")
    is_broken = any(f.level == "broken" for f in section.findings)
    assert is_broken == any("parquet (" in message for message in messages)


def test_rows_without_a_tar_have_no_image(shards: Path, tmp_path: Path) -> None:
    (shards / "00000004.tar").unlink()
    write_json("00000007_stats.json", {"successes": 2})(shards)
    section = check_shards(str(shards), str(tmp_path / "scratch"))
    assert section.counts == Counts(read=22, kept=12, failed={"missing_image": 5, "not_downloaded": 5})
    assert section.numbers["uids"] == 12 and section.numbers["repeated"] == 0 and section.uids
    uids = [uid for n, uid in enumerate(uids_of(0, 16)) if n % 4 < 3]
    assert format_uids(read_subset(section.uids)).to_pylist() == sorted(uids)


def reshard(folder: Path, **account: Any) -> None:
    """Turn img2dataset's shards into what the resharder leaves of them."""
    for path in folder.glob("*.parquet"):
        path.unlink()
    meta = {"output_count": 15, "output_shard_count": 5, "num_workers": "2"}
    (folder / "meta.json").write_text(json.dumps(meta | account))


@pytest.mark.parametrize(
    ("account", "uids", "messages"),
    [
        ({}, "sorted", []),
        ({"output_shard_count": 4}, "sorted", ["those from 00000004.tar on are of an earlier run"]),
        ({"output_shard_count": 6}, "sorted", ["the others are lost"]),
        ({"output_count": 14}, "sorted", ["a worker failed", "14 rows were written of the 15"]),
        ({}, "hashes", ["sample_ids.npy is out of order in"]),
        ({"stopped": True}, "sorted", ["the resharder was stopped before its end"]),
    ],
)
def test_output_of_the_resharder(
    shards: Path, tmp_path: Path, account: dict[str, Any], uids: str, messages: list[str]
) -> None:
    reshard(shards, **account)
    if "stopped" in account:
        (shards / "meta.json").write_text("{")
    make_uids(uids, 15).tofile(shards / "sample_ids.npy")
    section = check_shards(str(shards), str(tmp_path / "scratch"))
    assert section.counts == Counts(read=15, kept=15) and section.uids is None
    first, *found = section.findings
    assert first.level == "note" and "DataComp's resharder wrote this" in first.message
    assert len(found) == len(messages) and all(m in f.message for m, f in zip(messages, found, strict=True)), found


def test_many_shards_are_accounted_for(tmp_path: Path) -> None:
    """Any mixture of files that may be missing: rows add up, and every tar without stats is counted."""
    rng = random.Random(0)
    for number in range(12):
        write_shard(tmp_path / "shards", number)
    gone = Counter[str]()
    for path in sorted((tmp_path / "shards").iterdir()):
        if rng.random() < 0.2:
            path.unlink()
            gone[path.suffix] += 1
    section = check_shards(str(tmp_path / "shards"), str(tmp_path / "scratch"))
    section.counts.check("shards")
    assert [12 - gone[s] for s in (".tar", ".json", ".parquet")] == [
        section.numbers[n] for n in ("tars", "stats", "parquets")
    ]
