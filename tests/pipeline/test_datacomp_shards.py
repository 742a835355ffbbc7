"""Shards as img2dataset and DataComp's resharder leave them, healthy and with each failure."""

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from made_datacomp import cut, make_uids, rewrite, uids_of
from toy import render, toy_row, write_part

from pipeline.datacomp.shard_findings import count_seen
from pipeline.datacomp.shards import check_shards
from pipeline.manifest import Counts
from pipeline.subset import read_subset
from pipeline.uid import format_uids


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
