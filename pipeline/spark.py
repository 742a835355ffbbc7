"""The Spark session, and "run this for each item".  The only file outside jobs/ that imports pyspark.

Pixels never pass through the JVM: a task is handed a part's name, reads, decodes and infers in one Python worker, and
sends back a few counts.  Library code stays pure and is given to Spark as a picklable function.
"""

import functools
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from tqdm import tqdm

from pipeline.errors import StageError, WinnowError
from pipeline.java import find_java

Item = TypeVar("Item")
POLL_S = 0.2
PARTITIONS_PER_CORE = 4
LOCAL_DEFAULT = "local[*]"


@contextmanager
def open_session(master: str | None = None, *, name: str = "winnow") -> Iterator[Any]:
    """Yield a SparkSession and stop it at the end.

    `master` None uses what spark-submit or the environment says, else every core of this machine.
    Raises StageError when there is no pyspark or no Java.
    """
    try:
        from pyspark.sql import SparkSession
    except ImportError:
        raise StageError("this stage runs on Spark, and pyspark is absent: pip install 'winnow[spark]'.") from None
    local = (master or os.environ.get("MASTER") or LOCAL_DEFAULT).startswith("local")
    _prepare_environment()
    builder = SparkSession.builder.appName(name)
    if master or "SPARK_ENV_LOADED" not in os.environ:
        builder = builder.master(master or LOCAL_DEFAULT)
    for key, value in _settings(local).items():
        builder = builder.config(key, value)
    with _quiet_start():
        session = builder.getOrCreate()
    session.sparkContext.setLogLevel("OFF")
    logging.getLogger("SQLQueryContextLogger").setLevel(logging.CRITICAL)  # it prints every SQL error with Java's stack
    try:
        yield session
    finally:
        session.stop()


@contextmanager
def lazy_session(master: str | None = None, *, name: str = "winnow") -> Iterator[Callable[[], Any]]:
    """Yield a function that starts the session when it is first called, so that finished stages need no Java."""
    with ExitStack() as stack:
        yield functools.cache(lambda: stack.enter_context(open_session(master, name=name)))


def _settings(local: bool) -> dict[str, str]:
    """Return what winnow needs of Spark; all else is left to spark-defaults.conf and spark-submit."""
    settings = {
        "spark.sql.execution.arrow.maxRecordsPerBatch": "65536",
        "spark.python.worker.reuse": "true",
        "spark.ui.showConsoleProgress": "false",
        "spark.sql.session.timeZone": "UTC",
    }
    if local:
        settings |= {
            "spark.driver.memory": "2g",
            "spark.driver.host": "127.0.0.1",
            "spark.driver.bindAddress": "127.0.0.1",
            "spark.ui.enabled": "false",
            "spark.sql.shuffle.partitions": "4",
            "spark.executorEnv.OMP_NUM_THREADS": "1",  # one task per core: no oversubscription
        }
    return settings


def _prepare_environment() -> None:
    if "SPARK_ENV_LOADED" not in os.environ:
        os.environ["JAVA_HOME"] = find_java().home
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    os.environ.setdefault("PYSPARK_DRIVER_PYTHON", sys.executable)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    root = str(Path(__file__).parent.parent)
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if Path(root).is_dir() and root not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, paths)])


@contextmanager
def _quiet_start() -> Iterator[None]:
    """Hide the JVM's start-up notes on stderr; a start that fails shows them."""
    import tempfile

    if "SPARK_ENV_LOADED" in os.environ:  # spark-submit: the log settings are the user's
        yield
        return
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as notes:
        os.dup2(notes.fileno(), 2)
        try:
            yield
        except Exception:
            notes.seek(0)
            os.write(saved, notes.read())
            raise
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def run_each(
    session: Any,
    work: Callable[[Item], dict[str, Any]],
    items: Sequence[Item],
    *,
    what: str,
    sizes: Sequence[int] | None = None,
    unit: str = "part",
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Return work(item) for each item, one Spark task each, in the order of the items.

    `work` must be picklable and return plain JSON.  `sizes` (rows per item, say) weigh the progress bar in `unit`s.
    Raises StageError with the worker's own message when a task fails.
    """
    if not items:
        return []
    frame = session.range(0, len(items), 1, numPartitions=len(items))
    frame = frame.mapInArrow(_make_task(work, items), "id long, result string")
    weights = list(sizes) if sizes and any(sizes) else [1] * len(items)
    rows = _collect_with_progress(session, frame, what, weights, unit if sizes and any(sizes) else "part", quiet)
    return [json.loads(result) for _, result in sorted(rows)]


def _make_task(
    work: Callable[[Item], dict[str, Any]], items: Sequence[Item]
) -> Callable[..., Iterator[pa.RecordBatch]]:
    def task(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for number in batch.column(0).to_pylist():
                result = json.dumps(work(items[number]))
                yield pa.RecordBatch.from_pydict({"id": [number], "result": [result]})

    return task


def _collect_with_progress(
    session: Any, frame: Any, what: str, weights: list[int], unit: str, quiet: bool
) -> list[tuple[int, str]]:
    outcome: dict[str, Any] = {}

    def collect() -> None:
        try:
            outcome["rows"] = [tuple(row) for row in frame.collect()]
        except Exception as error:
            outcome["error"] = error

    before = set(session.sparkContext.statusTracker().getJobIdsForGroup(None))
    thread = threading.Thread(target=collect, name=what)
    thread.start()
    with tqdm(total=sum(weights), desc=what, unit=unit, disable=quiet) as bar:
        while thread.is_alive():
            thread.join(POLL_S)
            done = _count_finished(session, before)
            bar.update(sum(weights) * done // len(weights) - bar.n)
        if "rows" in outcome:
            bar.update(sum(weights) - bar.n)
    if "error" in outcome:
        raise _explain(outcome["error"], what) from None
    rows: list[tuple[int, str]] = outcome["rows"]
    return rows


def _count_finished(session: Any, jobs_before: set[int]) -> int:
    tracker = session.sparkContext.statusTracker()
    finished = 0
    for job in set(tracker.getJobIdsForGroup(None)) - jobs_before:
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
    return StageError(f"{what}: a worker failed: {' '.join(said[:3])[:1000]}")


def open_table(
    session: Any, read: Callable[[Item], Iterator[pa.RecordBatch]], items: Sequence[Item], schema: pa.Schema
) -> Any:
    """Return a DataFrame of the batches that `read` yields for each item; nothing is read yet.

    Small items share a partition: a Spark task costs about as much as reading the scores of a few thousand rows.
    """
    from pyspark.sql.pandas.types import from_arrow_schema

    def task(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for number in batch.column(0).to_pylist():
                yield from (b.cast(schema) for b in read(items[number]))

    most = PARTITIONS_PER_CORE * session.sparkContext.defaultParallelism
    frame = session.range(0, len(items), 1, numPartitions=max(1, min(len(items), most)))
    return frame.mapInArrow(task, from_arrow_schema(schema))
