"""Row ids: 32 lower-case hex digits, 128 bits, held as two uint64 (high, low) that sort as the text does.

The pair layout is DataComp's subset dtype `u8,u8` (DataComp README, "Submitting").
"""

import hashlib
import re

import numpy as np
import pyarrow as pa

from pipeline.errors import PoolError

UID_DTYPE = np.dtype([("f0", "<u8"), ("f1", "<u8")])
"""numpy's name for `u8,u8`: f0 = hex digits 0-15, f1 = hex digits 16-31."""
UID_FIELDS = ("f0", "f1")
HEX_DIGITS = 32
_VALUE_OF_DIGIT = np.full(256, 255, np.uint8)
_VALUE_OF_DIGIT[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16)
_DIGITS = np.frombuffer(b"0123456789abcdef", np.uint8)


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
    text = np.frombuffer(array.buffers()[2], np.uint8)[offsets[0] : offsets[-1]]
    values = _VALUE_OF_DIGIT[text].reshape(-1, HEX_DIGITS)
    if (values == 255).any():
        _raise_first_bad(array)
    octets = (values[:, 0::2] << 4) | values[:, 1::2]
    words = np.ascontiguousarray(octets).view(">u8").astype(np.uint64)
    return np.ascontiguousarray(words).view(UID_DTYPE).reshape(-1)


def _raise_first_bad(array: pa.Array) -> None:
    for position, value in enumerate(array.to_pylist()):
        if value is None or not re.fullmatch("[0-9a-f]{32}", value):
            raise PoolError(
                f"uid {value!r} in row {position} is not 32 lower-case hex digits, as CommonPool writes them."
            )


def format_uids(uids: np.ndarray) -> pa.Array:
    """Return the Arrow string array of 32 hex digits each, in order; the inverse of parse_uids."""
    words = np.stack([uids["f0"], uids["f1"]], axis=1).astype(">u8")
    octets = np.ascontiguousarray(words).view(np.uint8).reshape(len(uids), 16)
    digits = np.empty((len(uids), HEX_DIGITS), np.uint8)
    digits[:, 0::2], digits[:, 1::2] = _DIGITS[octets >> 4], _DIGITS[octets & 15]
    offsets = np.arange(len(uids) + 1, dtype=np.int32) * HEX_DIGITS
    return pa.StringArray.from_buffers(len(uids), pa.py_buffer(offsets.tobytes()), pa.py_buffer(digits.tobytes()))


def sort_uids(uids: np.ndarray) -> np.ndarray:
    """Return the uids in ascending order, repeats kept."""
    return uids[np.lexsort((uids["f1"], uids["f0"]))]


def is_sorted(uids: np.ndarray) -> bool:
    """Return whether the uids ascend (repeats allowed)."""
    high, low = uids["f0"], uids["f1"]
    ascends = (high[:-1] < high[1:]) | ((high[:-1] == high[1:]) & (low[:-1] <= low[1:]))
    return bool(ascends.all())


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
