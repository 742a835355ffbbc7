"""What filters over stored embeddings share: which rows have a usable vector, and the failures of the others."""

import numpy as np
import pyarrow as pa

from pipeline.contract import Failure
from pipeline.embeddings import find_whole, to_matrix
from pipeline.schemas import REASON_MISSING_EMBEDDING

MAX_ABS = 1e6
"""Embeddings have unit length, so a number beyond this is damage, and its products would overflow float32."""


def find_usable(matrix_ND: np.ndarray) -> np.ndarray:
    """Return bool (rows,): which rows are vectors of finite numbers of a sane size."""
    usable: np.ndarray = find_whole(matrix_ND)
    usable[usable] = np.abs(matrix_ND[usable]).max(axis=1, initial=0).astype(np.float32) <= MAX_ABS
    return usable


def read_vectors(batch: pa.RecordBatch, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Return float16 or float32 (rows, D), and bool (rows,): which of them are usable.

    Raises PoolError for a column that holds no embeddings.
    """
    matrix_ND = to_matrix(batch.column(column))
    return matrix_ND, find_usable(matrix_ND)


def explain_missing(usable_N: np.ndarray, columns: str) -> tuple[Failure, ...]:
    """Return a failure per row that is not usable; `columns` is what the message calls the vectors."""
    message = f"{columns} is null, not finite, or beyond {MAX_ABS:,.0f}"
    return tuple(Failure(row, REASON_MISSING_EMBEDDING, message) for row in np.flatnonzero(~usable_N).tolist())
