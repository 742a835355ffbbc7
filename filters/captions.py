"""Captions of a batch as one run of bytes: where words begin, by fastText's white space and by Python's.

All rows are looked at together, byte by byte in numpy, so a row costs a fraction of a microsecond.  Shapes: B bytes of
all captions, R rows, T words of all captions.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.contract import Failure
from pipeline.schemas import REASON_NULL_CAPTION

FASTTEXT_SPACE = b" \n\r\t\v\f\0"
"""What ends a token for Dictionary::readWord (fastText 0.9.2, src/dictionary.cc)."""
PYTHON_SPACE = [c.encode() for c in map(chr, range(0x3001)) if c.isspace()]
"""What str.split() splits at, as UTF-8; U+3000 is the last (tests/filters/test_caption_length.py checks it)."""


def _list_bytes(values: bytes) -> np.ndarray:
    table = np.zeros(256, np.bool_)
    table[list(values)] = True
    return table


IS_FASTTEXT_SPACE = _list_bytes(FASTTEXT_SPACE)
IS_ASCII_SPACE = _list_bytes(b"".join(s for s in PYTHON_SPACE if len(s) == 1))
BEGINS_WIDE_SPACE = _list_bytes(bytes(s[0] for s in PYTHON_SPACE if len(s) > 1))
WIDE_SPACE = {n: np.array([int.from_bytes(s) for s in PYTHON_SPACE if len(s) == n], np.int32) for n in (2, 3)}
"""White space of n bytes, as big-endian numbers."""


def find_null_captions(texts: pa.Array) -> tuple[Failure, ...]:
    """Return one failure per null caption."""
    rows = pc.indices_nonzero(texts.is_null()).to_pylist()
    return tuple(Failure(row, REASON_NULL_CAPTION, "the caption is null") for row in rows)


def read_bytes(texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Return the UTF-8 of strings or binaries, uint8 (B,), and where each begins and the last ends, int64 (R + 1,).

    Bytes are not copied.  A null caption has no bytes that count: look at the array's own nulls.
    """
    texts = texts if pa.types.is_binary(texts.type) else texts.cast(pa.string())
    _, offsets, data = texts.buffers()
    if not len(texts) or data is None:
        return np.zeros(0, np.uint8), np.zeros(len(texts) + 1, np.int64)
    ends = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1].astype(np.int64)
    return np.frombuffer(data, np.uint8)[ends[0] : ends[-1]], ends - ends[0]


def find_python_space(text_B: np.ndarray) -> np.ndarray:
    """Return bool (B,): bytes of white space that str.split() splits at."""
    space_B: np.ndarray = IS_ASCII_SPACE[text_B]
    begins = np.flatnonzero(BEGINS_WIDE_SPACE[text_B])
    codes = np.zeros(len(begins), np.int32)
    for byte in range(3):
        codes = codes << 8 | text_B[np.minimum(begins + byte, len(text_B) - 1)]
    for width, known in WIDE_SPACE.items():
        found = begins[np.isin(codes >> 8 * (3 - width), known)]
        space_B[(found[:, None] + np.arange(width)).ravel()] = True
    return space_B


def find_words(space_B: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Return the int64 positions of the first byte of each word: of each run of other bytes within one caption."""
    begins_B = ~space_B
    first = offsets[:-1][offsets[:-1] < len(space_B)]
    is_word = begins_B[first]
    begins_B[1:] &= space_B[:-1]
    begins_B[first] = is_word
    return np.flatnonzero(begins_B)


def cut_words(text_B: np.ndarray, space_B: np.ndarray, begins_T: np.ndarray) -> pa.Array:
    """Return binary (T,): the words that begin at begins_T, without the white space between them."""
    seen_B = np.cumsum(~space_B, dtype=np.int32)
    offsets = np.append(seen_B[begins_T] - 1, seen_B[-1:]) if len(begins_T) else np.zeros(1)
    buffers = [None, pa.py_buffer(offsets.astype(np.int32)), pa.py_buffer(text_B[~space_B])]
    return pa.Array.from_buffers(pa.binary(), len(begins_T), buffers)


def add_up_in_rows(values_T: np.ndarray, first_R: np.ndarray) -> np.ndarray:
    """Return int64 (R,): the sum of whole numbers or bools from each row's first place, (R + 1,), to the next row's."""
    sums = np.zeros(len(values_T) + 1, np.int64)
    np.cumsum(values_T, out=sums[1:])
    return np.diff(sums[first_R])


def count_in_rows(positions: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Return int64 (R,): how many of the sorted byte positions lie in each caption."""
    return np.diff(np.searchsorted(positions, offsets))
