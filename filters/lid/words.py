"""Captions -> fastText's hidden vector: the mean of the vectors of all words and n-grams, one batch at a time.

fastText looks up every n-gram of every word of every caption; here each distinct word is looked up once and its sum
remembered, so a caption is the sum of its words.  The order of the additions differs from fastText's and with it the
last bits (tree.py deals with that).  Rules: fastText 0.9.2, src/dictionary.cc getLine, addSubwords,
computeSubwords, hash.  Shapes: B bytes, C characters, K n-grams, W words, T tokens, R captions, D dimensions.
"""

from itertools import repeat

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.sparse import csr_array

from filters.captions import IS_FASTTEXT_SPACE, add_up_in_rows, cut_words, find_words, read_bytes
from filters.lid.model import FastTextModel

END_OF_LINE = b"</s>"
"""A word of the model that closes every line."""
FNV_OFFSET, FNV_PRIME = np.uint32(2166136261), np.uint32(16777619)
MAX_WORDS = 1 << 18
MAX_BYTES = 1 << 24
"""Words remembered, and their bytes: with vectors of 16 dimensions they take about 50 MB."""
CHUNK_BYTES = 1 << 20
"""New words are looked up in chunks of about so many bytes, 100 bytes of memory for each."""


class WordSums:
    """Words seen so far with the sum of their vectors; emptied when full."""

    def __init__(self, model: FastTextModel) -> None:
        self.model = model
        self.ids: dict[bytes, int] = {}
        self.sums_WD = np.zeros((0, model.vectors_VD.shape[1]), np.float32)
        self.counts_W = np.zeros(0, np.int64)
        self.num_bytes = 0

    def find(self, words: pa.Array) -> np.ndarray:
        """Return int64 (len(words),): the row of each distinct word in sums_WD and counts_W, adding those not seen."""
        if len(self.ids) + len(words) > MAX_WORDS or self.num_bytes > MAX_BYTES:
            self.ids.clear()
            self.num_bytes = 0
        ids = _look_up(self.ids, words)
        new = np.flatnonzero(ids < 0)
        if len(new):
            ends = np.cumsum(pc.binary_length(words.take(pa.array(new))).to_numpy())
            self.num_bytes += int(ends[-1])
            for chunk in np.split(new, np.flatnonzero(np.diff(ends // CHUNK_BYTES)) + 1):
                ids[chunk] = self._add(words.take(pa.array(chunk)))
        return ids

    def _add(self, words: pa.Array) -> np.ndarray:
        """Look up new words and return their rows."""
        start, end = len(self.ids), len(self.ids) + len(words)
        if end > len(self.counts_W):
            grown = max(2 * end, 1 << 14)
            self.sums_WD = np.pad(self.sums_WD[:start], ((0, grown - start), (0, 0)))
            self.counts_W = np.pad(self.counts_W[:start], (0, grown - start))
        self.sums_WD[start:end], counts = add_up_words(self.model, words)
        self.counts_W[start:end] = counts
        self.ids.update(zip(words.to_pylist(), range(start, end), strict=True))
        return np.arange(start, end)


def embed_captions(sums: WordSums, texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Return float32 (R, D) hidden vectors and int64 (R,) numbers of words and n-grams, 0 where there is no vector."""
    text_B, offsets = read_bytes(texts)
    space_B = IS_FASTTEXT_SPACE[text_B]
    begins_T = find_words(space_B, offsets)
    tokens = cut_words(text_B, space_B, begins_T).dictionary_encode()
    ids_W = sums.find(tokens.dictionary)
    ids_T = ids_W[tokens.indices.to_numpy(zero_copy_only=False)]
    first_R = np.searchsorted(begins_T, offsets)
    hidden_RD = _add_up(sums.sums_WD, ids_T, first_R)
    counts_R = add_up_in_rows(sums.counts_W[ids_T], first_R)
    if END_OF_LINE in sums.model.words:
        hidden_RD += sums.model.vectors_VD[sums.model.words[END_OF_LINE]]
        counts_R += 1
    hidden_RD /= np.maximum(counts_R, 1).astype(np.float32)[:, None]
    return hidden_RD, counts_R


def _look_up(rows: dict[bytes, int], words: pa.Array) -> np.ndarray:
    """Return int64 (len(words),), -1 for words that are not there."""
    return np.fromiter(map(rows.get, words.to_pylist(), repeat(-1)), np.int64, len(words))


def _add_up(vectors_VD: np.ndarray, rows: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Return float32 (len(bounds) - 1, D): sums of vectors_VD[rows[start:end]] for neighbouring bounds.

    A product with a matrix of ones: it adds in the order of `rows`, and an import of torch for its embedding_bag would
    cost each process seconds.
    """
    places = rows.astype(np.int32), bounds.astype(np.int32)  # with int64 the product takes twice as long
    ones = csr_array((np.ones(len(rows), np.float32), *places), shape=(len(bounds) - 1, len(vectors_VD)))
    return np.asarray(ones @ vectors_VD)


def add_up_words(model: FastTextModel, words: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Return (W, D) sums of the vectors of each word and its n-grams, and int64 (W,) how many they are."""
    rows_CK, ends_W = list_ngram_rows(model, words)
    kept = rows_CK >= 0
    kept_before = np.concatenate([[0], np.cumsum(kept.ravel())])
    bounds_W = kept_before[np.concatenate([[0], ends_W]) * model.longest]
    counts_W = np.diff(bounds_W)
    sums_WD = _add_up(model.vectors_VD, rows_CK[kept], bounds_W)
    known = _look_up(model.words, words)
    has_row = np.flatnonzero(known >= 0)
    sums_WD[has_row] += model.vectors_VD[known[has_row]]
    counts_W[has_row] += 1
    return sums_WD, counts_W


def list_ngram_rows(model: FastTextModel, words: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Return int32 (C, K), the rows of the n-grams that begin at each character of <word>, -1 where there is none,
    and int64 (W,), the character at which each word has ended.

    An n-gram of one character is not counted at a word's border.
    """
    text_B, byte_ends_W = _frame(words)
    begins_C = np.flatnonzero((text_B & 0xC0) != 0x80)
    widths_C = np.diff(np.append(begins_C, len(text_B)))
    bytes_B = text_B.view(np.int8).astype(np.uint32)  # fastText hashes signed bytes
    ends_W = np.searchsorted(begins_C, byte_ends_W)
    starts_W = np.concatenate([[0], ends_W[:-1]])
    left_C = np.repeat(ends_W, ends_W - starts_W) - np.arange(len(begins_C))
    rows_CK = np.full((len(begins_C), model.longest), -1, np.int32)
    hashes, num_buckets = np.full(len(begins_C), FNV_OFFSET), np.uint32(len(model.bucket_rows))
    for size in range(1, model.longest + 1):
        hashes = hashes[: max(0, len(begins_C) - size + 1)]
        _hash_on(hashes, bytes_B, begins_C[size - 1 :], widths_C[size - 1 :])
        if size >= model.shortest:
            buckets = hashes - hashes // num_buckets * num_buckets  # faster than % here
            rows = model.bucket_rows[buckets.astype(np.int64)]
            rows_CK[: len(hashes), size - 1] = np.where(left_C[: len(hashes)] >= size, rows, -1)
        if size == 1:
            rows_CK[starts_W, 0] = rows_CK[ends_W - 1, 0] = -1
    return rows_CK, ends_W


def _frame(words: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Return uint8 (B,), the words as <word><word>..., and int64 (W,), where each has ended."""
    plain_B, offsets = read_bytes(words)
    ends = offsets[1:] + 2 * np.arange(1, len(words) + 1)
    starts = offsets[:-1] + 2 * np.arange(len(words))
    text_B = np.empty(len(plain_B) + 2 * len(words), np.uint8)
    is_border = np.zeros(len(text_B), np.bool_)
    is_border[starts] = is_border[ends - 1] = True
    text_B[starts], text_B[ends - 1] = ord("<"), ord(">")
    text_B[~is_border] = plain_B
    return text_B, ends


def _hash_on(hashes: np.ndarray, bytes_B: np.ndarray, begins: np.ndarray, widths: np.ndarray) -> None:
    """Take one character more into each 32-bit FNV-1a hash, in place."""
    hashes ^= bytes_B[begins]
    hashes *= FNV_PRIME
    for byte in range(1, int(widths.max(initial=1))):
        wider = np.flatnonzero(widths > byte)
        hashes[wider] = (hashes[wider] ^ bytes_B[begins[wider] + byte]) * FNV_PRIME
