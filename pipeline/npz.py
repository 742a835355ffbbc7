"""Arrays of an npz file, rows read by their place: CommonPool's embeddings, gigabytes a file, one key of them wanted.

np.savez stores each array uncompressed in a zip, so a run of rows is a run of bytes.  An array that was compressed is
read whole.  Nothing is unpickled.
"""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import IO, Any

import numpy as np

from pipeline.errors import PoolError
from pipeline.storage import open_file

NPY = ".npy"
LOCAL_HEADER_BYTES = 30
NAME_LENGTHS = slice(26, 30)
"""Where a zip member's own header says how long its name and extra field are, uint16 each."""
MAX_GAP_ROWS = 8
"""Rows nearer to each other than this are read in one go."""


@dataclass(frozen=True, slots=True)
class NpzArray:
    """One float matrix (num_rows, dim) of an npz."""

    url: str
    name: str
    num_rows: int
    dim: int
    dtype: np.dtype[Any]
    start: int | None
    """Where its first row lies in the file; None when it is compressed."""


def list_arrays(url: str) -> dict[str, NpzArray]:
    """Return the float matrices of an npz by key; others are passed over.  Raises PoolError when it cannot be read."""
    with _opened(url) as (file, archive):
        members = [info for info in archive.infolist() if info.filename.endswith(NPY)]
        found = [_describe(url, file, archive, info) for info in members]
    return {array.name: array for array in found if array}


@contextmanager
def _opened(url: str) -> Iterator[tuple[IO[bytes], zipfile.ZipFile]]:
    try:
        with open_file(url) as file, zipfile.ZipFile(file) as archive:
            yield file, archive
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, OSError) as error:
        if isinstance(error, PoolError):
            raise
        raise PoolError(f"{url} cannot be read as npz: {error}") from None


def _describe(url: str, file: IO[bytes], archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> NpzArray | None:
    with archive.open(info) as member:
        shape, by_column, dtype = _read_header(member)
        header_bytes = member.tell()
    if len(shape) != 2 or by_column or dtype.kind != "f":
        return None
    start = None
    if info.compress_type == zipfile.ZIP_STORED:
        file.seek(info.header_offset)
        lengths = np.frombuffer(file.read(LOCAL_HEADER_BYTES)[NAME_LENGTHS], "<u2")
        start = info.header_offset + LOCAL_HEADER_BYTES + int(lengths.sum()) + header_bytes
        if start + shape[0] * shape[1] * dtype.itemsize > archive.start_dir:
            raise PoolError(f"{url}: {info.filename} is shorter than its header says.")
    return NpzArray(url, info.filename.removesuffix(NPY), shape[0], shape[1], dtype, start)


def _read_header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return (shape, whether columns are contiguous, dtype) of the .npy that begins here."""
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_column, dtype = read(member)
    return shape, by_column, dtype


def read_array_rows(array: NpzArray, rows: np.ndarray) -> np.ndarray:
    """Return (len(rows), dim) of the array's own dtype; `rows` int64, ascending.  Raises PoolError."""
    with _opened(array.url) as (file, archive):
        if array.start is None:
            with archive.open(array.name + NPY) as member:
                chosen: np.ndarray = np.lib.format.read_array(member, allow_pickle=False)[rows]
            return chosen
        found = np.empty((len(rows), array.dim), array.dtype)
        for first, last in _find_runs(rows):
            found[first:last] = _read_run(file, array, rows[first:last])
    return found


def _find_runs(rows: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield (first, last + 1) of the places in `rows` whose rows lie near each other."""
    breaks = np.flatnonzero(np.diff(rows) > MAX_GAP_ROWS) + 1
    bounds = [0, *breaks.tolist(), len(rows)]
    return (pair for pair in pairwise(bounds) if pair[0] < pair[1])


def _read_run(file: IO[bytes], array: NpzArray, rows: np.ndarray) -> np.ndarray:
    first, num = int(rows[0]), int(rows[-1] - rows[0]) + 1
    row_bytes = array.dim * array.dtype.itemsize
    assert array.start is not None
    file.seek(array.start + first * row_bytes)
    content = file.read(num * row_bytes)
    if len(content) != num * row_bytes:
        raise PoolError(f"{array.url}: {array.name} ends before row {first + num}.")
    chosen: np.ndarray = np.frombuffer(content, array.dtype).reshape(num, array.dim)[rows - first]
    return chosen
