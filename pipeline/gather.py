"""Embeddings of many batches -> one matrix on disk, mapped; and the same in another order.

What fits more than one part of a pool: k-means, SemDeDup, NormSim-D.  The files have no name, so none is left behind.
"""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.embeddings import find_whole, to_matrix
from pipeline.errors import PoolError
from pipeline.manifest import Counts
from pipeline.schemas import REASON_MISSING_EMBEDDING

REPEATED_UID = "repeated_uid"
"""Account of rows whose uid an earlier row of the pool has."""
BLOCK_ROWS = 1 << 12
Batches = Iterable[tuple[np.ndarray, np.ndarray]]
"""Uids and float (rows, D), NaN where a row has no embedding."""
Kind = tuple[int, np.dtype[Any]]
"""D and type of a matrix of embeddings."""


class Gathered(NamedTuple):
    """The rows of a pool that have a direction, each uid once."""

    uids: np.ndarray
    """(N,) of UID_DTYPE, ascending."""
    matrix_ND: np.ndarray
    """float16 or float32 as stored, mapped."""
    counts: Counts


def join_columns(columns: Sequence[pa.Array]) -> np.ndarray:
    """Return float (rows, sum of D): the vectors of several columns side by side, NaN in rows that lack any.

    D is 0 when one column has no vector at all.  Raises PoolError as to_matrix does.
    """
    matrices = [to_matrix(column) for column in columns]
    if any(matrix_ND.shape[1] == 0 for matrix_ND in matrices):
        return np.empty((len(columns[0]), 0), np.float32)
    return matrices[0] if len(matrices) == 1 else np.concatenate(matrices, axis=1)


def find_directed(block_ND: np.ndarray) -> np.ndarray:
    """Return bool (rows,): which rows are finite and not all zeros, so that a cosine with them is defined."""
    directed: np.ndarray = find_whole(block_ND) & block_ND.any(axis=1)
    return directed


def to_units(block_ND: np.ndarray, dtype: Any = np.float32) -> np.ndarray:
    """Return the rows at length 1, computed in float64; rows of zeros stay zeros."""
    wide_ND = block_ND.astype(np.float64)
    length_N = np.sqrt(np.einsum("nd,nd->n", wide_ND, wide_ND))
    wide_ND /= np.where(length_N > 0, length_N, 1)[:, None]
    return wide_ND.astype(dtype, copy=False)


def split_blocks(matrix_ND: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the rows in order, BLOCK_ROWS at a time."""
    return (matrix_ND[start : start + BLOCK_ROWS] for start in range(0, len(matrix_ND), BLOCK_ROWS))


@contextmanager
def spool(blocks: Iterable[np.ndarray], folder: str | None = None) -> Iterator[np.ndarray]:
    """Yield blocks (rows, D) as one matrix, mapped from a file in `folder` (default: the system's temporary folder).

    Raises PoolError when blocks that have rows differ in D or type.
    """
    rows, kind = 0, None  # type: int, Kind | None
    with tempfile.TemporaryFile(dir=folder) as file:
        for block_ND in blocks:
            if len(block_ND):
                kind = check_kind(kind, block_ND)
                file.write(np.ascontiguousarray(block_ND).data)
                rows += len(block_ND)
        yield _map(file, rows, kind)


def check_kind(kind: Kind | None, block_ND: np.ndarray) -> Kind:
    """Return what the vectors of a block are.  Raises PoolError when those before it were another kind."""
    found = (block_ND.shape[1], block_ND.dtype)
    if kind is not None and kind != found:
        (dim, dtype), (other_dim, other) = kind, found
        raise PoolError(
            f"embeddings of {dim} {dtype} and of {other_dim} {other} cannot stand in one matrix: they are of different "
            "models, or stored differently. Give a pool whose parts have one kind."
        )
    return found


def _map(file: IO[bytes], rows: int, kind: Kind | None) -> np.ndarray:
    if kind is None:
        return np.empty((0, 0), np.float16)
    file.flush()
    return np.memmap(file, kind[1], "c", shape=(rows, kind[0]))


def permute(matrix_ND: np.ndarray, order_M: np.ndarray, folder: str | None = None) -> Any:
    """Return the context of `spool` for matrix_ND[order_M], copied block by block."""
    return spool((matrix_ND[order] for order in split_blocks(order_M)), folder)


@contextmanager
def gather_rows(batches: Batches, folder: str | None = None) -> Iterator[Gathered]:
    """Yield the rows that have a direction, in the order of their uids, so that the order of parts does not matter.

    Of rows that share a uid the first in the pool stands for all.  On disk the matrix lies twice while it is sorted.
    Raises PoolError as spool does.
    """
    with ExitStack() as stack:
        yield _gather(batches, folder, stack)


def _gather(batches: Batches, folder: str | None, stack: ExitStack) -> Gathered:
    read = 0
    found: list[np.ndarray] = [np.empty(0, "u8,u8")]

    def choose() -> Iterator[np.ndarray]:
        nonlocal read
        for uids, block_ND in batches:
            directed_N = find_directed(block_ND)
            read += len(uids)
            found.append(uids[directed_N])
            yield block_ND[directed_N]

    with spool(choose(), folder) as loose_ND:
        uids = np.concatenate(found)
        order = np.lexsort((uids["f1"], uids["f0"]))  # stable
        uids = uids[order]
        is_first = np.append(True, uids[1:] != uids[:-1])[: len(uids)]
        matrix_ND = stack.enter_context(permute(loose_ND, order[is_first], folder))
    kept = int(is_first.sum())
    dropped = {REPEATED_UID: len(uids) - kept} if kept < len(uids) else {}
    failed = {REASON_MISSING_EMBEDDING: read - len(uids)} if len(uids) < read else {}
    return Gathered(uids[is_first], matrix_ND, Counts(read=read, kept=kept, dropped=dropped, failed=failed))
