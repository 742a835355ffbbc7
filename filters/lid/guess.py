"""fastText's likeliest label for a batch of captions, and which captions only fastText itself can tell.

Sums in another order than fastText's differ in the last bits, so captions with two nearly equal labels are handed back,
and so are those that hold a mark fastText treats in its own way.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from filters.lid.model import LABEL_PREFIX, read_model
from filters.lid.tree import LabelTree, build_tree, find_likeliest
from filters.lid.words import END_OF_LINE, WordSums, embed_captions

LONG_BYTES = 8_192
"""A longer caption is handed back: rounding grows with its n-grams, and so does memory."""

Guess = Callable[[pa.Array], tuple[np.ndarray, np.ndarray, np.ndarray]]
"""Captions (rows,) -> names of labels, object (rows,); float32 (rows,) probabilities; bool (rows,): ask fastText."""


def open_guess(path: str) -> Guess:
    """Return the function for a model file; it hands every caption back when the model is not of lid.176's kind."""
    model = read_model(path)
    if model is None:
        return _hand_back
    return partial(
        _guess,
        WordSums(model),
        build_tree(model),
        np.array([label.removeprefix(LABEL_PREFIX) for label in model.labels], object),
    )


def _hand_back(texts: pa.Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.full(len(texts), None), np.zeros(len(texts), np.float32), np.ones(len(texts), np.bool_)


def _guess(
    sums: WordSums, tree: LabelTree, names: np.ndarray, texts: pa.Array
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    long = pc.greater(pc.binary_length(texts), LONG_BYTES).fill_null(False)
    hidden_RD, counts_R = embed_captions(sums, pc.if_else(long, "", texts))
    labels_R, log_probabilities_R, near_R = find_likeliest(tree, hidden_RD)
    unsure_R = near_R | (counts_R == 0) | long.to_numpy(zero_copy_only=False)
    for mark in (LABEL_PREFIX, END_OF_LINE.decode()):
        unsure_R |= pc.match_substring(texts, mark).fill_null(False).to_numpy(zero_copy_only=False)
    return names[labels_R], np.exp(log_probabilities_R), unsure_R
