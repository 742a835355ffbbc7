"""Row ids: 32 lower-case hex digits, 128 bits, held as two uint64 (high, low) that sort as the text does.

The pair layout is DataComp's subset dtype `u8,u8` (DataComp README, "Submitting").
"""

import binascii
import hashlib
import re
from typing import NoReturn

import numpy as np
import pyarrow as pa

from pipeline.errors import PoolError

UID_DTYPE = np.dtype([("f0", "<u8"), ("f1", "<u8")])
"""numpy's name for `u8,u8`: f0 = hex digits 0-15, f1 = hex digits 16-31."""
UID_FIELDS = ("f0", "f1")
HEX_DIGITS = 32
UID_BITS, UID_BYTES = 128, 16
CHECKED_ROWS = 1 << 20


def parse_uids(uids: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Return (rows,) of UID_DTYPE for an Arrow string array, in order.

    Raises PoolError naming the first value that is null or not 32 lower-case hex digits.
    """
    array = uids.combine_chunks() if isinstance(uids, pa.ChunkedArray) else uids
    if len(array) == 0:
        return np.empty(0, UID_DTYPE)
    array = array.cast(pa.large_string())
    offsets = np.frombuffer(array.buffers()[1], np.int64)[array.offset : array.offset + len(array) + 1]
    if array.null_count or not (np.diff(offsets) == HEX_DIGITS).all():
        _raise_first_bad(array)
    text = memoryview(array.buffers()[2]).cast("B")[offsets[0] : offsets[-1]]
    try:
        octets = binascii.unhexlify(text)
    except binascii.Error:
        _raise_first_bad(array)
    if binascii.hexlify(octets) != text:  # upper-case digits
        _raise_first_bad(array)
    return _read_octets(octets)


def read_uids(uids: pa.Array) -> np.ndarray:
    """Return (rows,) of UID_DTYPE for a column of a foreign table: 32 hex digits, or 16 bytes as they are spelt.

    Raises PoolError for another type, a null, or text that is not a uid.
    """
    if pa.types.is_string(uids.type) or pa.types.is_large_string(uids.type):
        return parse_uids(uids)
    if uids.type != pa.binary(UID_BYTES) or uids.null_count:
        what = f"{uids.null_count} nulls" if uids.type == pa.binary(UID_BYTES) else f"type {uids.type}"
        raise PoolError(f"the uid column has {what}; it should hold 32 hex digits or {UID_BYTES} bytes in every row.")
    start = uids.offset * UID_BYTES
    return _read_octets(memoryview(uids.buffers()[1])[start : start + len(uids) * UID_BYTES])


def _read_octets(octets: bytes | memoryview) -> np.ndarray:
    return np.frombuffer(octets, ">u8").astype("<u8").view(UID_DTYPE)


def _raise_first_bad(array: pa.Array) -> NoReturn:
    for position, value in enumerate(array.to_pylist()):
        if value is None or not re.fullmatch("[0-9a-f]{32}", value):
            raise PoolError(
                f"uid {value!r} in row {position} is not 32 lower-case hex digits, as CommonPool writes them."
            )
    raise AssertionError("there is a bad uid")


def format_uids(uids: np.ndarray) -> pa.Array:
    """Return the Arrow string array of 32 hex digits each, in order; the inverse of parse_uids."""
    words = np.stack([uids["f0"], uids["f1"]], axis=1).astype(">u8")
    digits = binascii.hexlify(words.tobytes())
    offsets = np.arange(len(uids) + 1, dtype=np.int32) * HEX_DIGITS
    return pa.StringArray.from_buffers(len(uids), pa.py_buffer(offsets.tobytes()), pa.py_buffer(digits))


def sort_uids(uids: np.ndarray) -> np.ndarray:
    """Return the uids in ascending order, repeats kept."""
    order = np.argsort(uids["f0"])
    high = uids["f0"][order]
    if (high[1:] == high[:-1]).any():  # rare where uids are hashes, and twice the work
        order = np.lexsort((uids["f1"], uids["f0"]))
    return uids[order]


def unique_uids(uids: np.ndarray) -> np.ndarray:
    """Return the distinct uids in ascending order."""
    uids = sort_uids(uids)
    first = np.ones(len(uids), bool)
    first[1:] = (uids["f0"][1:] != uids["f0"][:-1]) | (uids["f1"][1:] != uids["f1"][:-1])
    return uids[first]


def is_sorted(uids: np.ndarray) -> bool:
    """Return whether the uids ascend (repeats allowed); a mapped file is looked at piece by piece."""
    pieces = (uids[start : start + CHECKED_ROWS + 1] for start in range(0, len(uids), CHECKED_ROWS))
    return all(_ascends(piece["f0"], piece["f1"]) for piece in pieces)


def _ascends(high: np.ndarray, low: np.ndarray) -> bool:
    return bool(((high[:-1] < high[1:]) | ((high[:-1] == high[1:]) & (low[:-1] <= low[1:]))).all())


def count_below(uids: np.ndarray, uid: int) -> int:
    """Return how many of the sorted uids are less than a number in [0, 2^128]."""
    if uid >> UID_BITS:
        return len(uids)
    high, low = np.uint64(uid >> 64), np.uint64(uid & ((1 << 64) - 1))
    start, stop = (int(np.searchsorted(uids["f0"], high, side)) for side in ("left", "right"))
    return start + int(np.searchsorted(uids["f1"][start:stop], low))


def is_at_most(uids: np.ndarray, uid: int) -> np.ndarray:
    """Return bool (rows,): which uids are not greater than a 128-bit number."""
    high, low = np.uint64(uid >> 64), np.uint64(uid & ((1 << 64) - 1))
    least: np.ndarray = (uids["f0"] < high) | ((uids["f0"] == high) & (uids["f1"] <= low))
    return least


def derive_uid(*content: bytes | str | None) -> str:
    """Return a uid from what a row holds (image bytes or url, and caption), for pools that name no rows.

    The first 128 bits of a sha256 over the pieces, each preceded by its length; absent differs from empty.
    """
    digest = hashlib.sha256()
    for piece in content:
        octets = piece.encode() if isinstance(piece, str) else piece
        digest.update(b"-" if octets is None else b"%d:" % len(octets))
        digest.update(octets or b"")
    return digest.hexdigest()[:HEX_DIGITS]
