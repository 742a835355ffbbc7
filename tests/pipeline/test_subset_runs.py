import hashlib
from pathlib import Path

import numpy as np
import pytest

from pipeline import subset_runs
from pipeline.storage import list_folder, open_file
from pipeline.subset_runs import RANGE_ROWS, merge_runs, write_run
from pipeline.uid import UID_DTYPE, sort_uids


def make_uids(kind: str, num: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    uids = np.zeros(num, UID_DTYPE)
    if kind == "hashes":
        uids["f0"], uids["f1"] = rng.integers(0, 2**64, (2, num), dtype=np.uint64)
    elif kind == "numbers":
        uids["f1"] = rng.permutation(num) + seed * num // 2
    elif kind == "few":
        uids["f0"], uids["f1"] = rng.integers(0, 3, num), rng.integers(0, 900, num)
    elif kind == "ends":
        uids["f0"], uids["f1"] = rng.choice(np.array([0, 1, 2**64 - 1], np.uint64), (2, num))
    return uids


@pytest.mark.parametrize("kind", ["hashes", "numbers", "few", "ends", "one"])
@pytest.mark.parametrize("sizes", [[], [0], [1], [3, 0, 2], [300_000, 260_000, 5, 120_000]])
def test_merged_file_is_that_of_numpy(tmp_path: Path, kind: str, sizes: list[int]) -> None:
    parts = [make_uids(kind, size, seed) for seed, size in enumerate(sizes)]
    for number, uids in enumerate(parts):
        write_run(str(tmp_path / "runs"), f"{number}", uids)
    merged = merge_runs(str(tmp_path / "runs"), str(tmp_path / "ours.npy"))
    expected = np.unique(sort_uids(np.concatenate([np.empty(0, UID_DTYPE), *parts])))
    np.save(tmp_path / "theirs.npy", expected)
    written = (tmp_path / "ours.npy").read_bytes()
    assert written == (tmp_path / "theirs.npy").read_bytes()
    assert merged == (len(expected), len(expected), hashlib.sha256(written).hexdigest())


@pytest.mark.parametrize("kind", ["hashes", "few", "one"])
@pytest.mark.parametrize("sizes", [[0], [1], [3, 0, 2], [60_000, 26_000, 5]])
def test_copies_are_lines_and_the_largest_counts(tmp_path: Path, kind: str, sizes: list[int]) -> None:
    most: dict[tuple[int, int], int] = {}
    for number, size in enumerate(sizes):
        uids, copies = make_uids(kind, size, number), np.random.default_rng(number).integers(1, 30, size)
        write_run(str(tmp_path / "runs"), f"{number}", uids, copies)
        for uid, times in zip(uids.tolist(), copies.tolist(), strict=True):
            most[uid] = max(times, most.get(uid, 0))
    merged = merge_runs(str(tmp_path / "runs"), str(tmp_path / "ours.npy"))
    expected = np.array([uid for uid in sorted(most) for _ in range(most[uid])], UID_DTYPE)
    np.save(tmp_path / "theirs.npy", expected)
    assert (tmp_path / "ours.npy").read_bytes() == (tmp_path / "theirs.npy").read_bytes()
    assert merged[:2] == (len(most), len(expected))


def test_many_copies_are_written_piece_by_piece() -> None:
    entries = np.zeros(9, subset_runs.COPIED_DTYPE)
    entries["f1"], entries["copies"] = np.arange(9), [65_535] * 4 + [1, 65_535, 2, 65_535, 65_535]
    pieces = list(subset_runs._repeat(entries))
    assert max(len(piece) for piece in pieces) <= RANGE_ROWS + 65_535
    assert (np.concatenate(pieces)["f1"] == np.repeat(np.arange(9), entries["copies"])).all()


@pytest.mark.parametrize("kind", ["hashes", "numbers"])
def test_no_more_than_a_range_is_held(tmp_path: Path, kind: str) -> None:
    """Also when the uids are consecutive numbers: ranges are cut where the runs' samples say, not evenly."""
    for seed in range(3):
        write_run(str(tmp_path), f"{seed}", make_uids(kind, 400_000, seed))
    ranges = [len(uids) for uids in subset_runs._merge_ranges(str(tmp_path))]
    assert len(ranges) >= 2
    assert max(ranges) <= 1.1 * RANGE_ROWS


def test_a_remote_subset(tmp_path: Path) -> None:
    """Any fsspec URL; what is written is what a local file would hold."""
    uids = make_uids("hashes", 3000, 0)
    for folder in (str(tmp_path), "memory://subset-runs"):
        write_run(f"{folder}/runs", "a", uids[:1500])
        write_run(f"{folder}/runs", "b", uids[1400:])
        merge_runs(f"{folder}/runs", f"{folder}/subset.npy")
    with open_file("memory://subset-runs/subset.npy") as file:
        assert file.read() == (tmp_path / "subset.npy").read_bytes()
    assert not [url for url in list_folder(str(tmp_path)) if "tmp" in url.rsplit("/", 1)[1]]
