"""A score as a step reads it from a batch: one column, or a weighted sum of several, each normalised."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.errors import PoolError

LARGEST = 1e150
"""Numbers of a mixture that are larger count as absent, as infinite ones do: their squares are no float64."""


@dataclass(frozen=True, slots=True)
class Mixture:
    """The sum over columns of weight x (value - offset) / scale; a column whose scale is 0 adds 0."""

    columns: tuple[str, ...]
    weights: tuple[float, ...]
    offsets: tuple[float, ...]
    scales: tuple[float, ...]

    def read(self, batch: pa.RecordBatch) -> np.ndarray:
        """Return float64 (rows,), NaN where a column has no number."""
        total = np.zeros(batch.num_rows)
        for values, weight, offset, scale in zip(
            read_numbers(self.columns, batch), self.weights, self.offsets, self.scales, strict=True
        ):
            total += weight * (values - offset) / scale if scale else 0 * values
        return total


Score = str | Mixture
"""A column's name, or a mixture."""


def name_columns(score: Score) -> tuple[str, ...]:
    """Return the columns that a score reads."""
    return (score,) if isinstance(score, str) else score.columns


def read_score(score: Score, batch: pa.RecordBatch) -> np.ndarray:
    """Return floats (rows,), NaN where there is no score: float64 of a mixture, of a column as to_floats."""
    return to_floats(batch.column(score)) if isinstance(score, str) else score.read(batch)


def read_numbers(columns: tuple[str, ...], batch: pa.RecordBatch) -> np.ndarray:
    """Return float64 (columns, rows), NaN where a value is absent, infinite or beyond LARGEST."""
    numbers = np.array([to_floats(batch.column(column)) for column in columns], np.float64)
    numbers[~(np.abs(numbers) <= LARGEST)] = np.nan
    return numbers


def to_floats(column: pa.Array) -> np.ndarray:
    """Return float32 for half and single floats, float64 for any other number; NaN where the value is null.

    Raises PoolError for whole numbers beyond 2^53, which no float64 tells apart.
    """
    single = pa.types.is_float32(column.type) or pa.types.is_float16(column.type)
    try:
        floats: np.ndarray = column.cast(pa.float32() if single else pa.float64()).to_numpy(zero_copy_only=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise PoolError(
            f"scores of type {column.type} cannot be ordered as numbers: {error}. Write the column as double, whole "
            "numbers beyond 2^53 rounded."
        ) from None
    return floats
