"""What a model made of each image of a task, in a small file beside the results: OUT/outcomes/<set>.npz.

Arrays of integers, one row per image that was evaluated, in the order of the set:

    classification     label (N,), top (N, K) the best classes in order, best (N,) the first of them (but for ties)
    worst of a group   the same, and group (N,)
    retrieval          captions (N,), captions_right (N,) of them at rank 1, image_right (N,) 0 or 1
    WinoGAViL          candidates (N,), shared (N,) and union (N,) of the choice and the truth

With them a metric's interval and a paired test need neither model nor images.  Stored as numpy's npz without pickles
or compression, in the smallest unsigned type; the same outcomes give the same bytes.  A task whose corrected column
rests on other outcomes has a second file, <set>.corrected.npz.
"""

import hashlib
import io
from collections.abc import Mapping

import numpy as np

from eval38.results import Column
from eval38.statistics import (
    BEST,
    CANDIDATES,
    CAPTIONS,
    CAPTIONS_RIGHT,
    GROUP,
    IMAGE_RIGHT,
    LABEL,
    SHARED,
    TOP,
    UNION,
    Array,
    Columns,
    measure,
)
from eval38.tasks import Task, folder_of
from pipeline.errors import EvalError
from pipeline.schemas import ARRAYS_SUFFIX, OUTCOMES_FOLDER
from pipeline.storage import exists, join, read_bytes, write_bytes

KINDS = (
    {LABEL, TOP, BEST},
    {LABEL, TOP, BEST, GROUP},
    {CAPTIONS, CAPTIONS_RIGHT, IMAGE_RIGHT},
    {CANDIDATES, SHARED, UNION},
)
TOLERANCE = 1e-6
"""Between the metric of the outcomes and the one in the results, which may have been rounded to float32."""


def place_of(folder: str, task: Task, column: Column = "compat") -> str:
    """Return where the outcomes of a task lie in a results folder."""
    part = "" if column == "compat" else f".{column}"
    return join(folder, OUTCOMES_FOLDER, f"{folder_of(task)}{part}{ARRAYS_SUFFIX}")


def write_outcomes(
    folder: str, task: Task, columns: Mapping[str, Array], *, value: float | None, column: Column = "compat"
) -> str:
    """Write a task's outcomes and return their sha256.

    Raises EvalError unless they are of a known kind and their main metric is `value`: outcomes that say something else
    than the results would be a bug in winnow.
    """
    small = {name: _shrink(name, columns[name]) for name in sorted(columns)}
    _check(small, task.key)
    if task.metric is not None and value is not None:
        found = measure(task.metric, small)
        if abs(found - value) > TOLERANCE:
            raise EvalError(f"{task.key}: outcomes say {found}, results {value}. This is a bug in winnow.")
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **small)
    write_bytes(place_of(folder, task, column), file.getvalue())
    return hashlib.sha256(file.getvalue()).hexdigest()


def _shrink(name: str, values: Array) -> Array:
    values = np.asarray(values)
    if values.dtype.kind not in "iub" or (values.size and int(values.min()) < 0):
        raise EvalError(f"outcome {name!r} should be integers from 0, not {values.dtype} {values!r:.60}.")
    return np.ascontiguousarray(values.astype(np.min_scalar_type(int(values.max(initial=0)))))


def _check(columns: Mapping[str, Array], where: str) -> None:
    if set(columns) not in KINDS:
        raise EvalError(f"{where}: outcomes {sorted(columns)} are of no known kind.")
    sizes = {len(values) for values in columns.values() if values.ndim}
    dims = {name: values.ndim for name, values in columns.items()}
    if len(sizes) != 1 or any(found != 1 + (name == TOP) for name, found in dims.items()):
        raise EvalError(f"{where}: outcomes have shapes { {name: v.shape for name, v in columns.items()} }.")


def read_outcomes(folder: str, task: Task, *, sha256: str | None, column: Column = "compat") -> Columns | None:
    """Return a task's outcomes, or None when there are none or the results name none (sha256 is None).

    Raises EvalError when the file is not the one that the results name, or holds something else.
    """
    url = place_of(folder, task, column)
    if sha256 is None or not exists(url):
        return None
    content = read_bytes(url)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise EvalError(f"{url} is not the file that the results name. Delete the task's line and evaluate it again.")
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            columns = {name: arrays[name] for name in arrays.files}
    except Exception as error:  # whatever numpy makes of bytes that are no arrays
        raise EvalError(
            f"{url} holds no outcomes ({type(error).__name__}: {error}). Delete it and evaluate the task again."
        ) from None
    _check(columns, url)
    if any(values.dtype.kind != "u" for values in columns.values()):
        raise EvalError(f"{url} holds other numbers than integers from 0.")
    return {name: values.astype(np.int64) for name, values in columns.items()}
