"""Shorter side and aspect ratio of the source image (DataComp "basic" filtering, Gadre et al. 2023, arXiv:2304.14108).

The sizes are the pool's own `original_width/height`, before img2dataset shrank the image, so no image is read.
"""

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import config
from pipeline.contract import Failure, Filter, Score, Scored
from pipeline.schemas import ASPECT, MIN_SIDE_PX, ORIGINAL_HEIGHT, ORIGINAL_WIDTH

REASON_UNKNOWN_SIZE = "unknown_size"


@config
class Options:
    """No choices."""


def build(name: str, options: Options) -> Filter:
    """Return the filter; it has no options."""
    makes = ((MIN_SIDE_PX, pa.int32()), (ASPECT, pa.float64()))
    return Filter(name=name, needs=(ORIGINAL_WIDTH, ORIGINAL_HEIGHT), makes=makes, version=1, settings={}, load=load)


def load() -> Score:
    """Return the scoring function; there is nothing to open."""
    return score


def score(batch: pa.RecordBatch) -> Scored:
    """Return int32 (rows,) shorter side in px and float64 (rows,) longer / shorter side; null when a side is unknown.

    A side that is null, zero or negative is unknown.
    """
    width, height = (batch.column(c).cast(pa.int64()) for c in (ORIGINAL_WIDTH, ORIGINAL_HEIGHT))
    known = pc.fill_null(pc.and_(pc.greater(width, 0), pc.greater(height, 0)), False)
    short = pc.if_else(known, pc.min_element_wise(width, height, skip_nulls=False), None)
    long = pc.if_else(known, pc.max_element_wise(width, height, skip_nulls=False), None)
    aspect = pc.divide(long.cast(pa.float64()), short.cast(pa.float64()))
    unknown = [i for i, is_known in enumerate(known.to_pylist()) if not is_known]
    failures = tuple(Failure(i, REASON_UNKNOWN_SIZE, "original_width or original_height is not known") for i in unknown)
    return Scored((short.cast(pa.int32()), aspect), failures)
