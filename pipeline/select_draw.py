"""Rows by chance: a seeded shuffle of the uids themselves, so that who is drawn does not depend on order or workers."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.schemas import UID
from pipeline.uid import UID_DTYPE, is_at_most, parse_uids

ROUNDS = 4
STEP = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
"""Increment, shifts and multipliers of splitmix64 (Vigna, prng.di.unimi.it/splitmix64.c, public domain)."""
WORD = (1 << 64) - 1


def shuffle_uids(uids: np.ndarray, seed: int) -> np.ndarray:
    """Return other 128-bit numbers (rows,) of UID_DTYPE, a different one for each different uid; decided by the seed.

    A Feistel network on the two words, so no two uids collide; its keys are the first outputs of splitmix64.
    """
    left, right = uids["f0"], uids["f1"]
    for number in range(1, ROUNDS + 1):
        key = mix_words(np.array([(seed + number * STEP) & WORD], np.uint64))
        left, right = right, left ^ mix_words(right + key)
    shuffled = np.empty(len(uids), UID_DTYPE)
    shuffled["f0"], shuffled["f1"] = left, right
    return shuffled


def mix_words(words: np.ndarray) -> np.ndarray:
    """Return other 64-bit numbers (rows,), a different one for each different word: the end of splitmix64."""
    for shift, multiplier in _MIX:
        words = (words ^ (words >> np.uint64(shift))) * np.uint64(multiplier)
    mixed: np.ndarray = words ^ (words >> np.uint64(31))
    return mixed


@dataclass(frozen=True, slots=True)
class Draw:
    """What a sample step came down to: rows whose shuffled uid is `last` or less."""

    seed: int
    last: int | None
    """128-bit number; None lets no row pass."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Score columns that it reads."""
        return ()

    @property
    def needs_uids(self) -> bool:
        """Whether it reads the uid."""
        return self.last is not None

    def passes(self, batch: pa.RecordBatch) -> np.ndarray:
        """Return bool (rows,)."""
        if self.last is None:
            return np.zeros(batch.num_rows, bool)
        return is_at_most(shuffle_uids(parse_uids(batch.column(UID)), self.seed), self.last)
