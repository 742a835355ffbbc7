"""What several tests of pipeline/datacomp make: uids of every kind, and files that are spoiled."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from toy import toy_row

from pipeline.uid import UID_DTYPE

A, B = "a" * 32, "b" * 32
KINDS = ("hashes", "numbers", "few", "ends", "sorted", "one", "none")


def uids_of(start: int, num: int) -> list[str]:
    return [str(toy_row(n)["uid"]) for n in range(start, start + num)]


def rewrite(folder: Path, change: Callable[[pa.Table], pa.Table], name: str = B) -> None:
    path = folder / f"{name}.parquet"
    pq.write_table(change(pq.read_table(path)), path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


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
