"""The first rows of every group in an order of their own, exactly: a radix search as select_radix.py's, for all groups.

A row's key is some words of whole numbers, compared one after the other.  Each pass counts the next few bits of the
keys that begin as their group's bound does, as many bits as keep the counts of all groups within COUNTS.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

COUNTS = 1 << 22
"""Counts of a pass at most, for all groups together."""
MOST_BITS = 16


class Digit(NamedTuple):
    """Some bits of a key's word."""

    word: int
    shift: int
    """Bits below them in the word."""
    width: int


class Bounds(NamedTuple):
    """The last key that each of K groups keeps."""

    words_KW: np.ndarray
    """uint64; all of a group with any_K false is 0."""
    any_K: np.ndarray
    """Whether the group keeps a row."""
    num_K: np.ndarray
    """Rows that do not exceed the bound: more than wanted where rows share their whole key."""


CountPass = Callable[[Digit, np.ndarray, np.ndarray], np.ndarray]
"""(digit, words_KW, open_K) -> int64 (K, 2^width), as count_digits of all rows."""


def find_bounds(count_pass: CountPass, wanted_K: np.ndarray, word_bits: Sequence[int]) -> Bounds:
    """Return where the first wanted_K rows of each group end.

    A group is left alone as soon as a whole bucket is wanted.
    """
    num_groups = len(wanted_K)
    words_KW, open_K = np.zeros((num_groups, len(word_bits)), np.uint64), wanted_K > 0
    rest_K, num_K = wanted_K.copy(), wanted_K.copy()
    for digit in list_digits(word_bits, num_groups):
        if not open_K.any():
            break
        up_to = np.cumsum(count_pass(digit, words_KW, open_K), 1)
        groups = np.flatnonzero(open_K)
        found = (up_to[groups] < rest_K[groups, None]).sum(1)
        words_KW[groups, digit.word] |= found.astype(np.uint64) << np.uint64(digit.shift)
        rest_K[groups] -= np.where(found > 0, up_to[groups, found - 1], 0)
        inside = up_to[groups, found] - np.where(found > 0, up_to[groups, found - 1], 0)
        is_last = digit.word == len(word_bits) - 1 and digit.shift == 0
        done = (inside == rest_K[groups]) | is_last
        num_K[groups[done]] += (inside - rest_K[groups])[done]
        _fill(words_KW, groups[done], digit, word_bits)
        open_K[groups[done]] = False
    return Bounds(words_KW, wanted_K > 0, num_K)


def _fill(words_KW: np.ndarray, groups: np.ndarray, digit: Digit, word_bits: Sequence[int]) -> None:
    """Set all bits after the digit, so that what is in its bucket passes."""
    words_KW[groups, digit.word] |= np.uint64((1 << digit.shift) - 1)
    for word in range(digit.word + 1, len(word_bits)):
        words_KW[groups, word] = np.uint64((1 << word_bits[word]) - 1)


def list_digits(word_bits: Sequence[int], num_groups: int) -> list[Digit]:
    """Return the digits of the words, from the highest on."""
    width = max(1, min(MOST_BITS, (COUNTS // max(num_groups, 1)).bit_length() - 1))
    digits = []
    for word, bits in enumerate(word_bits):
        for end in range(bits, 0, -width):
            digits.append(Digit(word, max(end - width, 0), min(width, end)))
    return digits


def count_digits(
    group_R: np.ndarray, words: Sequence[np.ndarray], digit: Digit, words_KW: np.ndarray, open_K: np.ndarray
) -> np.ndarray:
    """Return int64 (K x 2^width,): how many rows of the open groups have each digit, of those that begin as the bound.

    `words` are the words of the rows' keys, uint64 (R,), up to the digit's; group_R is -1 for a row of no group.
    """
    rows = np.flatnonzero(group_R >= 0)
    rows = rows[open_K[group_R[rows]]]
    for place, word in enumerate(words):
        shift = np.uint64(digit.shift + digit.width) if place == digit.word else np.uint64(0)
        if shift < 64:
            rows = rows[word[rows] >> shift == words_KW[group_R[rows], place] >> shift]
    digits = (words[digit.word][rows] >> np.uint64(digit.shift)) & np.uint64((1 << digit.width) - 1)
    places = (group_R[rows] << digit.width) + digits.astype(np.int64)
    return np.bincount(places, minlength=len(open_K) << digit.width)


def is_within(group_R: np.ndarray, words: Sequence[np.ndarray], bounds: Bounds) -> np.ndarray:
    """Return bool (R,): which rows are of a group and do not exceed its bound.

    Words that are not given count as within.
    """
    rows = np.flatnonzero((group_R >= 0) & (group_R < len(bounds.any_K)))
    rows = rows[bounds.any_K[group_R[rows]]]
    bound = bounds.words_KW[group_R[rows]]
    least = np.ones(len(rows), bool)
    for place in reversed(range(len(words))):
        word = words[place][rows]
        least = (word < bound[:, place]) | ((word == bound[:, place]) & least)
    within = np.zeros(len(group_R), bool)
    within[rows[least]] = True
    return within
