"""Caption length in words and code points (DataComp "basic" filtering, Gadre et al. 2023, arXiv:2304.14108).

Words are Python's str.split() and code points len(str), as basic_filter counts (baselines/apply_filter.py:219-220 of
DataComp).  The caption rule of image_based counts the tokens of fasttext.tokenize instead (:67): other white space, and
a token for each newline.  A null caption, on which DataComp fails, has null of all.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from filters.captions import (
    IS_FASTTEXT_SPACE,
    count_in_rows,
    find_null_captions,
    find_python_space,
    find_words,
    read_bytes,
)
from pipeline.config import config
from pipeline.contract import Filter, Score, Scored
from pipeline.schemas import CAPTION_CHARS, CAPTION_FASTTEXT_WORDS, CAPTION_WORDS, TEXT


@config
class Options:
    """No choices."""


def build(name: str, options: Options) -> Filter:
    """Return the filter; it has no options."""
    makes = tuple((column, pa.int32()) for column in (CAPTION_WORDS, CAPTION_CHARS, CAPTION_FASTTEXT_WORDS))
    return Filter(name=name, needs=(TEXT,), makes=makes, version=2, settings={}, load=load)


def load() -> Score:
    """Return the scoring function; there is nothing to open."""
    return score


def score(batch: pa.RecordBatch) -> Scored:
    """Return three int32 (rows,): words split at white space, code points, fastText tokens; null for a null caption."""
    texts = batch.column(TEXT)
    text_B, offsets = read_bytes(texts)
    words = count_in_rows(find_words(find_python_space(text_B), offsets), offsets)
    columns = (words, pc.utf8_length(texts), _count_tokens(text_B, offsets))
    known = texts.is_valid()
    return Scored(
        tuple(pc.if_else(known, pa.array(c).cast(pa.int32()), None) for c in columns), find_null_captions(texts)
    )


def _count_tokens(text_B: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Return int64 (rows,): len(fasttext.tokenize(text)), in which each newline is one more token, "</s>"."""
    counts = count_in_rows(find_words(IS_FASTTEXT_SPACE[text_B], offsets), offsets)
    counts += count_in_rows(np.flatnonzero(text_B == ord("\n")), offsets)
    return counts
