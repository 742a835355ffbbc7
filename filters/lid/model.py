"""A fastText model file (lid.176.bin, lid.176.ftz) as arrays.

Format: fastText 0.9.2, src/fasttext.cc saveModel, args.cc, dictionary.cc, densematrix.cc, quantmatrix.cc,
productquantizer.cc; all numbers are little-endian.  A .ftz holds its vectors as product quantisation codes (Joulin et
al. 2016, arXiv:1612.03651), which are decoded here, and keeps only some n-grams.
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import ModelError

MAGIC, VERSION = 793712314, 12
HIERARCHICAL_SOFTMAX, SUPERVISED = 1, 3
CENTROIDS = 256
LABEL_PREFIX = "__label__"
"""A word that begins with it is a label, not a word, to fastText, and so is each label of a model (src/dictionary.cc
getType, getLine)."""


@dataclass(frozen=True, slots=True)
class FastTextModel:
    """What predicting needs.  Shapes: D dimensions, V rows, L labels, N inner nodes of the tree of labels."""

    words: dict[bytes, int]
    """Word -> its row of vectors_VD."""
    labels: list[str]
    """With their prefix, as in __label__en."""
    label_counts: list[int]
    """How often each was in the training data: the tree of labels is built from them."""
    vectors_VD: np.ndarray
    """float32: one row per word, then one per bucket of n-grams."""
    nodes_ND: np.ndarray
    """float32: one row per inner node of the tree (hierarchical softmax)."""
    bucket_rows: np.ndarray
    """int32 (buckets,): row of an n-gram's hash, -1 where the file leaves it out."""
    shortest: int
    longest: int
    """Characters of an n-gram, word borders included."""


class _Reader:
    """A place in a mapped file."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def take(self, kinds: str) -> tuple[Any, ...]:
        """Return numbers, by struct's letters."""
        values = struct.unpack_from("<" + kinds, self.data, self.at)
        self.at += struct.calcsize("<" + kinds)
        return values

    def take_string(self) -> bytes:
        """Return the bytes before the next NUL."""
        start, end = self.at, self.data.find(b"\0", self.at)
        if end < 0:
            raise ValueError("it ends within a word")
        self.at = end + 1
        return self.data[start:end]

    def take_array(self, kind: str, count: int) -> np.ndarray:
        """Return a copy of numbers, (count,)."""
        values = np.frombuffer(self.data, kind, count, self.at).copy()
        self.at += values.nbytes
        return values


def read_model(path: str) -> FastTextModel | None:
    """Return the model, or None when it is no classifier of the kind of lid.176.

    That is a tree of labels that begin with LABEL_PREFIX, no word n-grams.
    Raises ModelError when the file is not a fastText model, has no labels, or is cut short.
    """
    try:
        with Path(path).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(_Reader(data))
    except (struct.error, ValueError) as error:
        remedy = "download it again, or name one such as lid.176.bin."
        raise ModelError(f"{path!r} is not a whole fastText classifier ({error}); {remedy}") from None


def _read(reader: _Reader) -> FastTextModel | None:
    magic, version = reader.take("2i")
    if magic != MAGIC:
        raise ValueError(f"it begins with {magic}, not {MAGIC}")
    _, _, _, _, _, word_ngrams, loss, kind, buckets, shortest, longest, _, _ = reader.take("12id")
    if kind != SUPERVISED:
        raise ValueError("it holds word vectors and no labels")
    if (version, word_ngrams, loss) != (VERSION, 1, HIERARCHICAL_SOFTMAX):
        return None
    size, num_words, num_labels, _, num_kept = reader.take("3i2q")
    entries = [(reader.take_string(), *reader.take("qb")) for _ in range(size)]
    labels = [word.decode() for word, _, _ in entries[num_words:]]
    if not all(label.startswith(LABEL_PREFIX) for label in labels):
        return None
    kept = reader.take_array("<i4", 2 * num_kept).reshape(-1, 2) if num_kept >= 0 else None
    (is_quantised,) = reader.take("?")
    vectors_VD = _read_quantised(reader) if is_quantised else _read_dense(reader)
    (is_output_quantised,) = reader.take("?")
    nodes_ND = _read_quantised(reader) if is_quantised and is_output_quantised else _read_dense(reader)
    return FastTextModel(
        words={word: row for row, (word, _, _) in enumerate(entries[:num_words])},
        labels=labels,
        label_counts=[count for _, count, _ in entries[num_words:]],
        vectors_VD=vectors_VD,
        nodes_ND=nodes_ND[: num_labels - 1],
        bucket_rows=_find_rows(buckets, kept, num_words),
        shortest=shortest,
        longest=longest,
    )


def _find_rows(buckets: int, kept: np.ndarray | None, num_words: int) -> np.ndarray:
    """Return int32 (buckets,): the row of each; `kept` is (bucket, n-gram's number) pairs, None when all are."""
    if kept is None:
        return np.arange(num_words, num_words + buckets, dtype=np.int32)
    rows = np.full(buckets, -1, np.int32)
    rows[kept[:, 0]] = kept[:, 1] + num_words
    return rows


def _read_dense(reader: _Reader) -> np.ndarray:
    """Return float32 (rows, dimensions)."""
    rows, dimensions = reader.take("2q")
    return reader.take_array("<f4", rows * dimensions).reshape(rows, dimensions)


def _read_quantised(reader: _Reader) -> np.ndarray:
    """Return the decoded float32 (rows, dimensions)."""
    has_norms, rows, _, num_codes = reader.take("?2qi")
    matrix = _decode(reader.take_array("u1", num_codes).reshape(rows, -1), *_read_centroids(reader))
    if has_norms:
        matrix *= _decode(reader.take_array("u1", rows).reshape(rows, 1), *_read_centroids(reader))
    return matrix


def _read_centroids(reader: _Reader) -> tuple[np.ndarray, int, int]:
    """Return float32 (dimensions * CENTROIDS,), dimensions, and how many of them a code stands for."""
    dimensions, _, width, _ = reader.take("4i")
    return reader.take_array("<f4", dimensions * CENTROIDS), dimensions, width


def _decode(codes: np.ndarray, centroids: np.ndarray, dimensions: int, width: int) -> np.ndarray:
    """Return float32 (rows, dimensions) of uint8 codes (rows, subspaces); the last subspace may be narrower."""
    parts = []
    for subspace, start in enumerate(range(0, dimensions, width)):
        own = min(width, dimensions - start)
        table = centroids[start * CENTROIDS :][: own * CENTROIDS].reshape(CENTROIDS, own)
        parts.append(table[codes[:, subspace]])
    return np.concatenate(parts, axis=1)
