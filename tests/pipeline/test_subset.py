from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.errors import PoolError
from pipeline.subset import is_in_subset, open_subset, read_subset, search_subset, write_subset
from pipeline.uid import UID_DTYPE, parse_uids


def count(uids: np.ndarray, subset: np.ndarray) -> np.ndarray:
    """How often each uid stands in the subset."""
    above: np.ndarray = search_subset(subset, uids, or_equal=True)
    return above - search_subset(subset, uids, or_equal=False)


def uids(*pairs: tuple[int, int]) -> np.ndarray:
    return np.array(list(pairs), UID_DTYPE)


def test_file_is_what_datacomp_reads_and_writes(tmp_path: Path) -> None:
    """DataComp: np.array([(int(uid[:16], 16), int(uid[16:32], 16)) ...], np.dtype("u8,u8")), sorted, np.save."""
    texts = ["ff" * 16, "00" * 16, "0f" * 16, "0f" * 16]
    write_subset(str(tmp_path / "ours.npy"), parse_uids(pa.array(texts)))
    theirs = np.array([(int(u[:16], 16), int(u[16:32], 16)) for u in texts], np.dtype("u8,u8"))
    theirs.sort()
    np.save(tmp_path / "theirs.npy", theirs)
    assert (tmp_path / "ours.npy").read_bytes() == (tmp_path / "theirs.npy").read_bytes()
    assert (read_subset(str(tmp_path / "theirs.npy")) == theirs).all()


def test_counts_equal_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    subset = np.zeros(400, UID_DTYPE)
    subset["f0"], subset["f1"] = rng.integers(0, 12, 400), rng.integers(0, 6, 400)
    subset.sort()
    asked = uids(*((h, low) for h in range(-0, 14) for low in range(8)), (2**64 - 1, 2**64 - 1))
    expected = [sum(tuple(s) == tuple(a) for s in subset.tolist()) for a in asked.tolist()]
    assert count(asked, subset).tolist() == expected
    assert is_in_subset(asked, subset).tolist() == [number > 0 for number in expected]


@pytest.mark.parametrize("size", [0, 3])
def test_empty_sides(size: int) -> None:
    some = uids(*((1, n) for n in range(size)))
    assert count(some, np.empty(0, UID_DTYPE)).tolist() == [0] * size
    assert count(np.empty(0, UID_DTYPE), some).tolist() == []
    assert is_in_subset(some, np.empty(0, UID_DTYPE)).tolist() == [False] * size
    assert is_in_subset(np.empty(0, UID_DTYPE), some).tolist() == []


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (uids((2, 0), (1, 0)), "not sorted"),
        (uids((1, 2), (1, 1)), "not sorted"),
        (np.arange(3), "a subset is one row"),
        (np.zeros((2, 2), UID_DTYPE), "a subset is one row"),
    ],
)
def test_files_that_would_mislead_are_refused(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.save(tmp_path / "s.npy", array)
    with pytest.raises(PoolError, match=message):
        read_subset(str(tmp_path / "s.npy"))


def test_absent_bare_odd_and_pickled_files(tmp_path: Path) -> None:
    with pytest.raises(PoolError, match="no subset file"):
        read_subset(str(tmp_path / "none.npy"))
    np.save(tmp_path / "p.npy", np.array([{}], object), allow_pickle=True)
    (tmp_path / "raw").write_bytes(uids((1, 2), (3, 4)).tobytes())
    assert read_subset(str(tmp_path / "raw")).tolist() == [(1, 2), (3, 4)]
    (tmp_path / "odd").write_bytes(b"17 bytes, no uids")
    with pytest.raises(PoolError, match="neither"):
        read_subset(str(tmp_path / "odd"))
    with pytest.raises(PoolError, match=r"neither a \.npy file"):
        read_subset(str(tmp_path / "p.npy"))


def test_a_remote_subset_is_fetched_once_and_again_when_it_changed() -> None:
    url = "memory://subsets/remote.npy"
    uids = np.zeros(3, UID_DTYPE)
    uids["f1"] = [1, 2, 3]
    write_subset(url, uids)
    first = open_subset(url)
    assert open_subset(url) is first and first.tolist() == uids.tolist()
    write_subset(url, uids[:2])
    assert open_subset(url).tolist() == uids[:2].tolist()
