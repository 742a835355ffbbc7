"""Spark's part: "run this for each item", tables from tasks, sums over tasks.  spark_session.py opens the session.

Pixels never pass through the JVM: a task is handed a part's name, reads, decodes and infers in one Python worker, and
sends back a few counts.  Library code stays pure and is given to Spark as a picklable function.
"""

import json
import logging
import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from pipeline.devices import (
    VISIBLE_DEVICES,
    Seat,
    count_cores,
    count_gpus,
    count_threads,
    deal_seats,
    name_device,
    take_seat,
)
from pipeline.errors import StageError, WinnowError
from pipeline.packed import Packed
from pipeline.spark_session import is_one_machine

Item = TypeVar("Item")
POLL_S = 0.2
POLL_LOG_S = 10.0
"""Between two lines of progress in a log, where none overwrites the one before."""
GPU = "gpu"
"""Spark's name of the resource."""
RESULT_COLUMNS = "id long, result string"
PARTITIONS_PER_CORE = 4


def run_each(
    session: Any,
    work: Callable[[Item], dict[str, Any]],
    items: Sequence[Item],
    *,
    what: str,
    sizes: Sequence[int] | None = None,
    unit: str = "part",
    quiet: bool = False,
    tasks_per_gpu: int | None = None,
) -> list[dict[str, Any]]:
    """Return work(item) for each item, one Spark task each, in the order of the items.

    `work` must be picklable and return plain JSON.  `sizes` (rows per item, say) weigh the progress bar in `unit`s.
    `tasks_per_gpu` is for work that runs models on GPUs, where there are any: how many tasks share one; None keeps the
    work on the CPU.  Each task has a seat (pipeline/devices.py) while it runs.
    Raises StageError with the worker's own message when a task fails.
    """
    if not items:
        return []
    weights, packed = list(sizes) if sizes and any(sizes) else [1] * len(items), Packed(items)
    unit = unit if sizes and any(sizes) else "part"
    seats = _deal_local_seats(session, tasks_per_gpu)
    with tempfile.TemporaryDirectory() as claims:
        if seats:
            frame = session.range(0, len(seats), 1, numPartitions=len(seats))
            frame = frame.mapInArrow(_make_gpu_task(work, packed, seats, claims), RESULT_COLUMNS)
            count_finished = partial(_count_marks, claims)
        else:
            task = _make_task(work, packed, _count_local_threads(session))
            frame = session.range(0, len(items), 1, numPartitions=len(items))
            frame = frame.mapInArrow(task, RESULT_COLUMNS, profile=_ask_for_gpus(session, tasks_per_gpu))
            count_finished = partial(_count_finished, session, _list_jobs(session))
        rows = _collect_with_progress(frame, what, weights, unit, quiet, count_finished)
    results = dict(rows)
    if results.keys() != set(range(len(items))):
        raise StageError(f"{what}: {len(results)} of {len(items)} results came back. Run the same command again.")
    return [json.loads(results[number]) for number in range(len(items))]


def _count_local_threads(session: Any) -> int | None:
    """Return each task's decoding threads when the tasks share this machine's cores, None on a cluster."""
    if not is_one_machine(session):
        return None
    return count_threads(count_cores(), session.sparkContext.defaultParallelism)


def _deal_local_seats(session: Any, tasks_per_gpu: int | None) -> list[Seat]:
    """Return the GPU seats of this machine, none on a cluster or without GPUs; local[N] bounds their number."""
    if tasks_per_gpu is None or not is_one_machine(session):
        return []
    at_once = session.sparkContext.defaultParallelism
    return deal_seats(count_gpus(), tasks_per_gpu, cores=count_cores(), most=at_once)


def _ask_for_gpus(session: Any, tasks_per_gpu: int | None) -> Any:
    """Return a resource profile for one stage of GPU tasks on a cluster whose executors have GPUs, else None.

    The other stages go on with a core a task.  Where spark.task.resource.gpu.amount is set, it rules.
    """
    from pyspark.resource import ResourceProfileBuilder, TaskResourceRequests

    settings = session.sparkContext.getConf()
    num_gpus = int(settings.get("spark.executor.resource.gpu.amount", "0"))
    if tasks_per_gpu is None or not num_gpus or settings.get("spark.task.resource.gpu.amount") is not None:
        return None
    cores = int(settings.get("spark.executor.cores", "1"))
    requests = TaskResourceRequests().cpus(max(1, cores // (num_gpus * tasks_per_gpu)))
    return ResourceProfileBuilder().require(requests.resource(GPU, 1 / tasks_per_gpu)).build


def _make_task(
    work: Callable[[Item], dict[str, Any]], items: Sequence[Item], threads: int | None
) -> Callable[..., Iterator[pa.RecordBatch]]:
    """Return a task that works on the items it is given the numbers of; `threads` None takes Spark's cores per task."""

    def task(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        from pyspark import TaskContext

        context = TaskContext.get()
        gpus = context.resources().get(GPU)
        device = name_device(gpus.addresses if gpus else [], os.environ.get(VISIBLE_DEVICES))
        take_seat(Seat(device, threads or count_threads(context.cpus(), 1)))
        for batch in batches:
            for number in batch.column(0).to_pylist():
                yield _pack_result(number, work(items[number]))

    return task


def _make_gpu_task(
    work: Callable[[Item], dict[str, Any]], items: Sequence[Item], seats: Sequence[Seat], claims: str
) -> Callable[..., Iterator[pa.RecordBatch]]:
    """Return a task that takes one seat for its life and works on items as long as there are any nobody has claimed.

    So a Python worker opens its models on one GPU and never moves.  `claims` is a folder of this machine: NUMBER is
    there once an item was claimed, a link to the file of the seat that claimed it; NUMBER.done once it is finished.
    Another attempt of the task, after its worker died, works on what its seat had claimed again.
    """

    def task(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        (place,) = (n for batch in batches for n in batch.column(0).to_pylist())
        take_seat(seats[place])
        owner = Path(claims, f"seat-{place}")
        owner.touch()
        for number, item in enumerate(items):
            claim = Path(claims, str(number))
            try:
                claim.hardlink_to(owner)
            except FileExistsError:
                if not claim.samefile(owner):
                    continue
            yield _pack_result(number, work(item))
            Path(claims, f"{number}.done").touch()

    return task


def _pack_result(number: int, result: dict[str, Any]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict({"id": [number], "result": [json.dumps(result)]})


def _count_marks(claims: str) -> int:
    return len(list(Path(claims).glob("*.done")))


def _collect_with_progress(
    frame: Any, what: str, weights: list[int], unit: str, quiet: bool, count_finished: Callable[[], int]
) -> list[tuple[int, str]]:
    outcome: dict[str, Any] = {}

    def collect() -> None:
        try:
            outcome["rows"] = [tuple(row) for row in frame.collect()]
        except Exception as error:
            outcome["error"] = error

    thread = threading.Thread(target=collect, name=what)
    thread.start()
    pace_s = POLL_S if sys.stderr.isatty() else POLL_LOG_S
    try:
        with tqdm(total=sum(weights), desc=what, unit=unit, disable=quiet, mininterval=pace_s) as bar:
            while thread.is_alive():
                thread.join(POLL_S)
                bar.update(sum(weights) * count_finished() // len(weights) - bar.n)
            if "rows" in outcome:
                bar.update(sum(weights) - bar.n)
    except BaseException:  # Ctrl-C: no task may go on writing once the driver has given its lock back
        frame.sparkSession.sparkContext.cancelAllJobs()
        thread.join()
        raise
    if "error" in outcome:
        raise _explain(outcome["error"], what) from None
    rows: list[tuple[int, str]] = outcome["rows"]
    return rows


def _list_jobs(session: Any) -> set[int]:
    return set(session.sparkContext.statusTracker().getJobIdsForGroup(None))


def _count_finished(session: Any, jobs_before: set[int]) -> int:
    tracker = session.sparkContext.statusTracker()
    finished = 0
    for job in _list_jobs(session) - jobs_before:
        info = tracker.getJobInfo(job)
        for stage in info.stageIds if info else ():
            stage_info = tracker.getStageInfo(stage)
            finished += stage_info.numCompletedTasks if stage_info else 0
    return finished


def _explain(error: Exception, what: str) -> WinnowError:
    """Return a StageError that carries what the Python worker said, without Spark's own stack."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    traceback_at = next((i for i, line in enumerate(lines) if line.startswith("Traceback")), None)
    if traceback_at is None:
        return StageError(f"{what}: Spark failed: {' '.join(lines[:3])[:600]}")
    logging.getLogger("winnow").debug("%s", error)
    said = [line for line in lines[traceback_at:] if line[:1].strip() and not line.startswith("Traceback")]
    told = re.sub(rf"^{WinnowError.__module__}\.\w+: ", "", " ".join(said[:3])[:1000])
    return StageError(f"{what}: a worker failed: {told}")


def open_table(
    session: Any, read: Callable[[Item], Iterator[pa.RecordBatch]], items: Sequence[Item], schema: pa.Schema
) -> Any:
    """Return a DataFrame of the batches that `read` yields for each item; nothing is read yet.

    Small items share a partition: a Spark task costs about as much as reading the scores of a few thousand rows.
    """
    from pyspark.sql.pandas.types import from_arrow_schema

    packed = Packed(items)

    def task(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for number in batch.column(0).to_pylist():
                yield from (b.cast(schema) for b in read(packed[number]))

    return _spread_items(session, len(items)).mapInArrow(task, from_arrow_schema(schema))


def collect_rows(frame: Any, *, what: str) -> list[tuple[Any, ...]]:
    """Return the few rows of a DataFrame.  Raises StageError with the worker's own message when its Python failed."""
    try:
        return [tuple(row) for row in frame.collect()]
    except Exception as error:
        if type(error).__name__ not in ("PythonException", "Py4JJavaError"):
            raise
        raise _explain(error, what) from None


def sum_each(
    session: Any, work: Callable[[Item], np.ndarray], items: Sequence[Item], size: int, *, what: str
) -> np.ndarray:
    """Return the sum of work(item), int64 (size,), over all items; a task of a few items sends what is not 0.

    The JVM adds the tasks' counts, so the driver gets `size` numbers at most.  Raises as collect_rows does.
    """
    total, packed = np.zeros(size, np.int64), Packed(items)
    if not items:
        return total

    def task(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        counts = np.zeros(size, np.int64)
        for batch in batches:
            for number in batch.column(0).to_pylist():
                counts += work(packed[number])
        places = np.flatnonzero(counts)
        yield pa.RecordBatch.from_arrays([pa.array(places), pa.array(counts[places])], names=["place", "n"])

    frame = _spread_items(session, len(items)).mapInArrow(task, "place long, n long").groupBy("place").sum("n")
    for place, number in collect_rows(frame, what=what):
        total[place] = number
    return total


def _spread_items(session: Any, num_items: int) -> Any:
    """Return a DataFrame of 0 .. num_items - 1, several of them a task."""
    most = PARTITIONS_PER_CORE * session.sparkContext.defaultParallelism
    return session.range(0, num_items, 1, numPartitions=max(1, min(num_items, most)))
