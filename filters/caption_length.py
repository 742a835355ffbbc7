"""Caption length in words and code points (DataComp "basic" filtering, Gadre et al. 2023, arXiv:2304.14108).

Words are Python's str.split(), code points are len(str), as in DataComp baselines/apply_filter.py, get_fasttext and
caption rules of basic_filter; a null caption, on which DataComp fails, has null of both.
"""

import pyarrow as pa

from pipeline.config import config
from pipeline.contract import Failure, Filter, Score, Scored
from pipeline.schemas import CAPTION_CHARS, CAPTION_WORDS, REASON_NULL_CAPTION, TEXT


@config
class Options:
    """No choices."""


def score(batch: pa.RecordBatch) -> Scored:
    """Return two int32 (rows,): words split at white space, and code points; null for a null caption."""
    texts = batch.column(TEXT).to_pylist()
    words = pa.array([None if t is None else len(t.split()) for t in texts], pa.int32())
    chars = pa.array([None if t is None else len(t) for t in texts], pa.int32())
    return Scored((words, chars), find_null_captions(texts))


def find_null_captions(texts: list[str | None]) -> tuple[Failure, ...]:
    """Return one failure per null caption."""
    return tuple(Failure(i, REASON_NULL_CAPTION, "the caption is null") for i, t in enumerate(texts) if t is None)


def load() -> Score:
    """Return the scoring function; there is nothing to open."""
    return score


def build(name: str, options: Options) -> Filter:
    """Return the filter; it has no options."""
    makes = ((CAPTION_WORDS, pa.int32()), (CAPTION_CHARS, pa.int32()))
    return Filter(name=name, needs=(TEXT,), makes=makes, version=1, settings={}, load=load)
