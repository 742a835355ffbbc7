"""Batches x filters -> scores, inside one Python worker: the models do not wait for reading and decoding.

One thread reads the tar, a few prepare rows (decode, tokenise), and the task's own thread runs the models, batch after
batch.  What waits or is being scored is bounded in bytes; beside it a task holds one batch being read and one decoded
image a thread (pipeline/images.py bounds its pixels).  Models open once per process and stay for the parts that follow.
"""

import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.contract import Failure, Filter, Score, Scored, TwoStepScore, check_scored
from pipeline.devices import count_cores, count_threads, find_seat
from pipeline.errors import ConfigError, ModelError, StageError
from pipeline.schemas import REASON_MISSING_COLUMN

SLICE_ROWS = 32
"""Rows one thread prepares at a time."""
AHEAD_BYTES = 512 << 20
"""Bound of the batches that wait or are being scored, prepared items included; a lone batch may be larger."""
AHEAD_BATCHES = 8
"""Bound of their number."""


def score_batches(
    batches: Iterator[pa.RecordBatch], filters: Sequence[Filter], *, columns: Sequence[str], part: str = ""
) -> Iterator[tuple[pa.RecordBatch, list[Scored]]]:
    """Yield each batch with one Scored per filter, in order; the next batches are read and prepared meanwhile.

    `columns` are those the part has: a filter that needs another gives nulls and a failure per row.  What reading
    raises is raised here as it is.  A filter that raises ends the work, for a bug or a lack of memory is not a bad row:
    StageError with the filter and the `part`.  No thread outlives the iterator; close it when you stop early.
    """
    lacks = {f.name: [column for column in f.needs if column not in columns] for f in filters}
    opened: dict[str, Score] = {}
    for filter in filters:
        if not lacks[filter.name]:
            with _naming(filter, part):
                opened[filter.name] = open_score(filter)
    steps = {name: score for name, score in opened.items() if isinstance(score, TwoStepScore)}
    ahead = _Ahead(batches, steps)
    try:
        for read in ahead:
            scored = []
            for filter in filters:
                with _naming(filter, part):
                    scores = opened.get(filter.name)
                    scored.append(_score(filter, scores, read) if scores else _nulls(filter, read.batch, lacks))
            yield read.batch, scored
    finally:
        ahead.close()


@dataclass(frozen=True, slots=True)
class _Read:
    """A batch that was read and is being prepared."""

    batch: pa.RecordBatch
    items: dict[str, list[Future[list[Any]]]]
    """Per two-step filter, the items of each slice of the batch."""
    num_bytes: int


class _Ahead:
    """Reads and prepares batches in threads, a bounded number of bytes ahead of who iterates over it."""

    def __init__(self, batches: Iterator[pa.RecordBatch], steps: dict[str, TwoStepScore]) -> None:
        self.batches, self.steps = batches, steps
        self.ready: queue.SimpleQueue[_Read | BaseException | None] = queue.SimpleQueue()
        self.changed = threading.Condition()
        self.held_bytes: list[int] = []
        self.closed = False
        seat = find_seat()
        self.decoders = ThreadPoolExecutor(seat.threads if seat else count_threads(count_cores(), 1), "winnow-prepare")
        self.reader = threading.Thread(target=self._read, name="winnow-read", daemon=True)
        self.reader.start()

    def __iter__(self) -> Iterator[_Read]:
        while (read := self.ready.get()) is not None:
            if isinstance(read, BaseException):
                raise read
            yield read
            with self.changed:
                self.held_bytes.remove(read.num_bytes)
                self.changed.notify()

    def close(self) -> None:
        """Stop reading and preparing, and wait until the threads have ended."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.reader.join()
        self.decoders.shutdown(cancel_futures=True)

    def _read(self) -> None:
        """Run in the reading thread: put every batch, then None, or what was raised."""
        end: BaseException | None = None
        try:
            for batch in self.batches:
                num_bytes = batch.nbytes + batch.num_rows * sum(step.item_bytes for step in self.steps.values())
                if not self._take(num_bytes):
                    break
                items = {name: self._prepare(step, batch) for name, step in self.steps.items()}
                self.ready.put(_Read(batch, items, num_bytes))
        except BaseException as error:
            end = error
        if isinstance(self.batches, Generator):
            self.batches.close()
        self.ready.put(end)

    def _prepare(self, step: TwoStepScore, batch: pa.RecordBatch) -> list[Future[list[Any]]]:
        starts = range(0, batch.num_rows, SLICE_ROWS)
        return [self.decoders.submit(step.prepare, batch.slice(start, SLICE_ROWS)) for start in starts]

    def _take(self, num_bytes: int) -> bool:
        """Wait until there is room for a batch; return False when nobody wants it any more."""
        with self.changed:
            self.changed.wait_for(lambda: self.closed or self._has_room(num_bytes))
            self.held_bytes.append(num_bytes)
            return not self.closed

    def _has_room(self, num_bytes: int) -> bool:
        held = self.held_bytes
        return not held or (len(held) < AHEAD_BATCHES and sum(held) + num_bytes <= AHEAD_BYTES)


@contextmanager
def _naming(filter: Filter, part: str) -> Iterator[None]:
    """Raise what the filter raises as a StageError that names it; winnow's own explanations stay as they are."""
    try:
        yield
    except (ConfigError, ModelError, StageError):
        raise
    except Exception as error:
        where = f" on part {part!r}" if part else ""
        raise StageError(f"filter {filter.name!r} failed{where}: {type(error).__name__}: {error}") from error


def _score(filter: Filter, score: Score, read: _Read) -> Scored:
    """Return the filter's scores, checked against its promise."""
    if isinstance(score, TwoStepScore):
        items = [item for piece in read.items.pop(filter.name) for item in piece.result()]
        if len(items) != read.batch.num_rows:
            raise StageError(f"filter {filter.name!r} prepared {len(items)} items of {read.batch.num_rows} rows.")
        scored = score.finish(read.batch, items)
    else:
        scored = score(read.batch)
    check_scored(filter, read.batch, scored)
    return scored


def _nulls(filter: Filter, batch: pa.RecordBatch, lacks: dict[str, list[str]]) -> Scored:
    """Return nulls with a failure per row, for a part that lacks a column that the filter reads."""
    columns = tuple(pa.nulls(batch.num_rows, kind) for _, kind in filter.makes)
    message = f"this part has no column {', '.join(lacks[filter.name])}"
    return Scored(columns, tuple(Failure(n, REASON_MISSING_COLUMN, message) for n in range(batch.num_rows)))


_OPENED: dict[tuple[str, str | None], Score] = {}
"""Filters open in this process, by identity and the seat's device: a model is loaded once for all parts."""


def open_score(filter: Filter) -> Score:
    """Return the filter's scoring function, opening its model on first use in this process."""
    seat = find_seat()
    key = (filter.identity, seat.device if seat else None)
    if key not in _OPENED:
        _OPENED[key] = filter.load()
    return _OPENED[key]
