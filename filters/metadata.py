"""Numbers and words that the pool's own parquet brings along, as scores: CommonPool's CLIP scores, or anyone's.

CommonPool carries clip_b32_similarity_score and clip_l14_similarity_score for every row (DataComp, arXiv:2304.14108;
its baselines cut by them), so the clip_score and laion2b baselines run from metadata alone.
"""

from functools import partial

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import config
from pipeline.contract import Failure, Filter, Score, Scored
from pipeline.errors import ConfigError
from pipeline.schemas import IMAGE, UID

KINDS = {"float": pa.float32(), "double": pa.float64(), "int": pa.int64(), "string": pa.string(), "bool": pa.bool_()}
REASON_NO_VALUE = "no_value"


@config
class Options:
    """Which columns are scores."""

    columns: dict[str, str]
    """Column of the pool's parquet -> float, double, int, string or bool."""

    def __post_init__(self) -> None:
        if not self.columns:
            raise ConfigError("filter metadata: name a column and its type, as in columns: {clip_score: float}.")
        for column, kind in self.columns.items():
            if column in (UID, IMAGE) or column.startswith("__"):
                raise ConfigError(f"filter metadata: column {column!r} is winnow's own, and no score.")
            if kind not in KINDS:
                raise ConfigError(f"filter metadata: column {column!r} is of type {kind!r}; say one of {list(KINDS)}.")


def build(name: str, options: Options) -> Filter:
    """Return the filter; it makes columns of the same names."""
    makes = tuple((column, KINDS[kind]) for column, kind in options.columns.items())
    return Filter(
        name=name, needs=tuple(options.columns), makes=makes, version=1, settings={}, load=partial(load, makes)
    )


def load(makes: tuple[tuple[str, pa.DataType], ...]) -> Score:
    """Return the scoring function; there is nothing to open."""
    return partial(score, makes)


def score(makes: tuple[tuple[str, pa.DataType], ...], batch: pa.RecordBatch) -> Scored:
    """Return the columns, each (rows,); null, and a failure, where one is null, NaN or not of its type."""
    columns = tuple(_convert(batch.column(column), kind) for column, kind in makes)
    missing: dict[int, str] = {}
    for (column, _), values in zip(makes, columns, strict=True):
        for row in pc.indices_nonzero(values.is_null()).to_pylist():
            missing.setdefault(row, f"the pool has no {column} for this row")
    return Scored(columns, tuple(Failure(row, REASON_NO_VALUE, message) for row, message in sorted(missing.items())))


def _convert(values: pa.Array, kind: pa.DataType) -> pa.Array:
    """Return the values as `kind`, null where they cannot be it."""
    try:
        converted = values.cast(kind, safe=not pa.types.is_floating(kind))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        converted = pa.array([_convert_one(value, kind) for value in values], kind)
    if pa.types.is_floating(kind):
        converted = pc.if_else(pc.is_nan(converted), pa.scalar(None, kind), converted)
    return converted


def _convert_one(value: pa.Scalar, kind: pa.DataType) -> object:
    try:
        return value.cast(kind).as_py()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return None
