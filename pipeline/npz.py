"""Arrays of an npz file, rows read by their place: CommonPool's embeddings, gigabytes a file, one key of them wanted.

np.savez stores each array uncompressed in a zip, so a run of rows is a run of bytes.  An array that was compressed is
unpacked once, into a temporary file.  The zip's checksum of an array is compared before its rows are used, but not on
a remote store, where that would fetch it twice.  Nothing is unpickled.
"""

import errno
import shutil
import tempfile
import tokenize
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import IO, Any

import numpy as np

from pipeline.errors import PoolError, WinnowError
from pipeline.filesystem import writing
from pipeline.ranges import read_ranges
from pipeline.storage import CHUNK_BYTES, is_local, open_file

NPY = ".npy"
LOCAL_HEADER_BYTES = 30
NAME_LENGTHS = slice(26, 30)
"""Where a zip member's own header says how long its name and extra field are, uint16 each."""
HEADER_AHEAD_BYTES = 1 << 14
"""What reading headers asks a remote store for at once."""
MAX_GAP_ROWS = 8
"""Rows nearer to each other than this are read in one go."""
MAX_FLOAT_BYTES = 8
"""Arrow has no wider floats."""
DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    tokenize.TokenError,
    SyntaxError,
    TypeError,
    ValueError,
    EOFError,
    RuntimeError,
)
"""What zipfile and numpy raise on bytes that are no npz, or one that is encrypted (RuntimeError)."""


@dataclass(frozen=True, slots=True)
class NpzArray:
    """One matrix (num_rows, dim) of floats in an npz."""

    url: str
    name: str
    num_rows: int
    dim: int
    dtype: np.dtype[Any]
    start: int | None
    """Where its first row lies in the file; None when it is compressed."""
    unpacked: np.ndarray | None = field(default=None, compare=False)
    """The matrix itself, mapped from a temporary file without a name; only unpack_array makes it."""


def list_arrays(url: str, names: Collection[str] | None = None) -> dict[str, NpzArray]:
    """Return the matrices of an npz by key, or those among `names`; only headers are read.

    What is no matrix of floats, lies by column or has no column is passed over.  Raises PoolError when the npz is
    damaged, encrypted or not one, or an array is not as long as its header says; OSError when it cannot be read now.
    """
    with _opened(url, ahead=HEADER_AHEAD_BYTES) as (file, archive):
        members = {info.filename.removesuffix(NPY): info for info in archive.infolist() if info.filename.endswith(NPY)}
        found = [_describe(url, file, archive, members[name]) for name in members if names is None or name in names]
    return {array.name: array for array in found if array}


@contextmanager
def _opened(url: str, ahead: int | None = None) -> Iterator[tuple[IO[bytes], zipfile.ZipFile]]:
    """Yield an npz as a file and as an archive.  Raises PoolError for damage alone, and lets OSError pass."""
    try:
        with open_file(url, ahead=ahead) as file, zipfile.ZipFile(file) as archive:
            yield file, archive
    except WinnowError:
        raise
    except (*DAMAGE, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # a place before the file's first byte
            raise
        raise PoolError(f"{url} cannot be read as npz: {error}") from None


def _describe(url: str, file: IO[bytes], archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> NpzArray | None:
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise PoolError(f"{url}: {info.filename} is compressed in a way that numpy is not. Save it with np.savez.")
    with archive.open(info) as member:
        shape, by_column, dtype = _read_header(member)
        header_bytes = member.tell()
    if len(shape) != 2 or not shape[1] or by_column or dtype.kind != "f" or dtype.itemsize > MAX_FLOAT_BYTES:
        return None
    num_bytes = shape[0] * shape[1] * dtype.itemsize
    if info.file_size != header_bytes + num_bytes:
        raise PoolError(f"{url}: {info.filename} has {info.file_size:,} bytes, which is not what its header says.")
    start = None
    if info.compress_type == zipfile.ZIP_STORED:
        file.seek(info.header_offset)
        lengths = np.frombuffer(file.read(LOCAL_HEADER_BYTES)[NAME_LENGTHS], "<u2")
        start = info.header_offset + LOCAL_HEADER_BYTES + int(lengths.sum()) + header_bytes
        if start + num_bytes > archive.start_dir:
            raise PoolError(f"{url}: {info.filename} ends behind the end of the archive.")
    return NpzArray(url, info.filename.removesuffix(NPY), shape[0], shape[1], dtype, start)


def _read_header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return (shape, whether columns are contiguous, dtype) of the .npy that begins here."""
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_column, dtype = read(member)
    return shape, by_column, dtype


def unpack_array(array: NpzArray) -> NpzArray:
    """Return the array ready to be read often: checked, and unpacked if it was compressed.

    The temporary file, as large as the array, goes with the returned object.  A remote array that was not compressed is
    not looked at.
    Raises PoolError when the array is damaged, StageError when the temporary folder is full.
    """
    if array.unpacked is not None or not array.num_rows:
        return array
    if array.start is not None:
        if is_local(array.url):
            _compare_checksum(array)
        return array
    with (
        _opened(array.url) as (_, archive),
        archive.open(array.name + NPY) as member,
        writing(f"{tempfile.gettempdir()} (TMPDIR)"),
        tempfile.TemporaryFile() as copy,
    ):
        _read_header(member)
        shutil.copyfileobj(member, copy, CHUNK_BYTES)  # to its end, where zipfile compares the checksum
        copy.flush()
        mapped = np.memmap(copy, array.dtype, "r", shape=(array.num_rows, array.dim))
    return replace(array, unpacked=mapped.view(np.ndarray))


def _compare_checksum(array: NpzArray) -> None:
    with _opened(array.url) as (_, archive), archive.open(array.name + NPY) as member:
        while member.read(CHUNK_BYTES):  # to its end, where zipfile compares
            pass


def read_array_rows(array: NpzArray, rows: np.ndarray) -> np.ndarray:
    """Return (len(rows), dim) of the array's own dtype; `rows` int64, ascending.

    Only the bytes of these rows are read, and of gaps of up to MAX_GAP_ROWS; a compressed array is unpacked whole
    unless unpack_array has done it.  Raises as unpack_array does, and PoolError when the file became shorter.
    """
    if array.start is None:
        matrix_ND = unpack_array(array).unpacked
        return np.empty((0, array.dim), array.dtype) if matrix_ND is None else matrix_ND[rows]
    row_bytes, runs = array.dim * array.dtype.itemsize, list(_find_runs(rows))
    edges = [(int(rows[first]), int(rows[last - 1]) + 1) for first, last in runs]
    spans = [(array.start + start * row_bytes, array.start + end * row_bytes) for start, end in edges]
    found = np.empty((len(rows), array.dim), array.dtype)
    for (first, last), (start, _), content in zip(runs, edges, read_ranges(array.url, spans), strict=True):
        found[first:last] = np.frombuffer(content, array.dtype).reshape(-1, array.dim)[rows[first:last] - start]
    return found


def _find_runs(rows: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield (first, last + 1) of the places in `rows` whose rows lie near each other."""
    breaks = np.flatnonzero(np.diff(rows) > MAX_GAP_ROWS) + 1
    bounds = [0, *breaks.tolist(), len(rows)]
    return (pair for pair in pairwise(bounds) if pair[0] < pair[1])
