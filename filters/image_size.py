"""Shorter side and aspect ratio of the source image (DataComp "basic" filtering, Gadre et al. 2023, arXiv:2304.14108).

The sizes are the pool's own `original_width/height`, before img2dataset shrank the image, so no image is read.
"""

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import config
from pipeline.contract import Failure, Filter, Score, Scored
from pipeline.pool import MAX_SIDE_PX
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

    A side that is null, not a number, not above 0 or beyond int32 is unknown; a fraction of a pixel is cut off.
    """
    width, height = (_as_px(batch.column(c)) for c in (ORIGINAL_WIDTH, ORIGINAL_HEIGHT))
    short = pc.min_element_wise(width, height, skip_nulls=False)
    long = pc.max_element_wise(width, height, skip_nulls=False)
    aspect = pc.divide(long.cast(pa.float64()), short.cast(pa.float64()))
    unknown = pc.indices_nonzero(short.is_null()).to_pylist()
    failures = tuple(Failure(i, REASON_UNKNOWN_SIZE, "original_width or original_height is not known") for i in unknown)
    return Scored((short, aspect), failures)


def _as_px(values: pa.Array) -> pa.Array:
    """Return int32 pixels, null where the value is none."""
    if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        return pa.nulls(len(values), pa.int32())
    numbers = values.cast(pa.float64(), safe=False)
    known = pc.fill_null(pc.and_(pc.greater_equal(numbers, 1), pc.less_equal(numbers, MAX_SIDE_PX)), False)
    return pc.if_else(known, numbers, None).cast(pa.int32(), safe=False)
