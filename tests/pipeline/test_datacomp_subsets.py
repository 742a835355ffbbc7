"""Uids sorted outside memory, and subset files of every form; the oracles are numpy and plain sets."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_datacomp import KINDS, A, B, make_uids

from pipeline.datacomp import uid_sets
from pipeline.datacomp.findings import Finding
from pipeline.datacomp.subsets import bring_in_subset, open_multiset
from pipeline.errors import ConfigError, PoolError
from pipeline.manifest import Counts, read_manifest
from pipeline.subset import read_subset
from pipeline.uid import UID_DTYPE


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
