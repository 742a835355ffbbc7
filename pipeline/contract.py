"""What a filter promises: pure scores for a batch of rows, same rows, same order, nothing dropped.

A filter only scores.  Cuts are rules over stored scores (select.py), so a new threshold never reads an image again.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa

from pipeline.errors import PoolError, StageError
from pipeline.manifest import hash_json
from pipeline.schemas import FORMAT_VERSION, IMAGE


class Failure(NamedTuple):
    """A row that a filter could not score; its columns hold null there."""

    position: int
    """Index of the row within the batch."""
    reason: str
    """A short fixed name, counted: unreadable_image, missing_image, ..."""
    message: str
    """What went wrong with this row."""


class Scored(NamedTuple):
    """What a filter says about one batch."""

    columns: tuple[pa.Array, ...]
    """One array per column that the filter makes, each as long as the batch."""
    failures: tuple[Failure, ...] = ()


Score = Callable[[pa.RecordBatch], Scored]
"""Pure: no Spark, network, clock or global; a null score is null, never NaN or -1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoStepScore:
    """A Score in two steps, for filters with a model: threads prepare the next rows while the model works on these."""

    prepare: Callable[[pa.RecordBatch], list[Any]]
    """Returns one item per row: decoded, tokenised.  Runs in several threads at once, each on a slice of a batch."""
    finish: Callable[[pa.RecordBatch, list[Any]], Scored]
    """Runs the model on a batch and its items, in one thread."""
    item_bytes: int
    """What one item holds, about; the worker bounds the bytes that wait."""

    def __call__(self, batch: pa.RecordBatch) -> Scored:
        """Return the scores of a batch, both steps in turn."""
        return self.finish(batch, self.prepare(batch))


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """One declared score, ready to be opened on a worker."""

    name: str
    """Names the score files, and the columns of filters that can stand in a recipe twice."""
    needs: tuple[str, ...]
    """Columns of the batches it reads: of the pool, or of filters before it in the recipe.  IMAGE: tars are read."""
    makes: tuple[tuple[str, pa.DataType], ...]
    """Columns it adds, with their types."""
    version: int
    """Raised when the same settings start giving other values."""
    settings: Mapping[str, Any]
    """All that decides the values, as JSON: options, model name, model sha256."""
    load: Callable[[], Score]
    """Opens models, once per worker.  Must be picklable: a module-level function or a partial of one."""
    vectors: tuple[str, ...] = ()
    """Those of `needs` that hold embeddings; they may also lie in the npz beside a part's parquet (stored.py)."""
    runs_on_device: bool = False
    """Whether its model runs on the device that a task is given (pipeline/devices.py): a GPU, where there is one."""
    target_aware: bool = False
    """Whether it reads train data of evaluation tasks (target_aware.py): a mark, which decides no value."""
    whole_part: bool = False
    """Whether a row's scores depend on the other rows of its part: it gets all of them in one batch, without images."""

    def __post_init__(self) -> None:
        if self.whole_part and IMAGE in self.needs:
            raise StageError(f"filter {self.name!r} needs a whole part and its images, which no memory holds.")

    @property
    def identity(self) -> str:
        """Hex sha256 of everything that decides the values."""
        makes = [[column, str(kind)] for column, kind in self.makes]
        return hash_json([FORMAT_VERSION, self.name, self.version, makes, self.settings])


def check_needs(filter: Filter, columns: list[str]) -> None:
    """Raise PoolError unless the pool has every column the filter reads."""
    missing = [column for column in filter.needs if column not in columns]
    if missing:
        own = sorted(column for column in columns if not column.startswith("__"))
        vectors = [column for column in missing if column in filter.vectors]
        where = (
            "Put NAME.npz beside each NAME.parquet (DataComp: --download_npz)" if vectors else "Add them to the parquet"
        )
        raise PoolError(
            f"filter {filter.name!r} needs columns {missing}, which the pool lacks (it has {own}). "
            f"{where}, or leave the filter out of the recipe."
        )


def check_scored(filter: Filter, batch: pa.RecordBatch, scored: Scored) -> None:
    """Raise StageError unless the filter kept its promise for this batch."""
    if len(scored.columns) != len(filter.makes):
        raise StageError(f"filter {filter.name!r} made {len(scored.columns)} columns, promised {len(filter.makes)}.")
    for (column, kind), values in zip(filter.makes, scored.columns, strict=True):
        if values.type != kind or len(values) != batch.num_rows:
            raise StageError(
                f"filter {filter.name!r}: column {column!r} is {len(values)} x {values.type}, "
                f"promised {batch.num_rows} x {kind}."
            )
