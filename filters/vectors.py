"""What filters over stored embeddings share: which rows have a usable vector, and the failures of the others."""

import numpy as np
import pyarrow as pa

from pipeline.contract import Failure
from pipeline.embeddings import MAX_ABS, find_whole
from pipeline.gather import join_columns
from pipeline.schemas import REASON_MISSING_EMBEDDING


def read_vectors(batch: pa.RecordBatch, *columns: str) -> tuple[np.ndarray, np.ndarray]:
    """Return float16 or float32 (rows, D), columns side by side, and bool (rows,): which of them are usable.

    Raises PoolError for a column that holds no embeddings.
    """
    matrix_ND = join_columns([batch.column(column) for column in columns])
    return matrix_ND, find_whole(matrix_ND)


def explain_missing(usable_N: np.ndarray, columns: str) -> tuple[Failure, ...]:
    """Return a failure per row that is not usable; `columns` is what the message calls the vectors."""
    message = f"{columns} is null, not finite, or beyond {MAX_ABS:,.0f}"
    return tuple(Failure(row, REASON_MISSING_EMBEDDING, message) for row in np.flatnonzero(~usable_N).tolist())
