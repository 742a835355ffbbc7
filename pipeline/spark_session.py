"""The Spark session: opened with what winnow needs, this code sent to the workers, closed at the end.

With spark.py the only file outside jobs/ that imports pyspark.
"""

import functools
import logging
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from pipeline.code_zip import served_code
from pipeline.errors import StageError
from pipeline.java import find_java
from pipeline.storage import join

LOCAL_DEFAULT = "local[*]"
LOCAL_FAILURES = 3
"""A task may fail this often on one machine; a cluster has Spark's own spark.task.maxFailures."""
LOCAL_JAVA_OPTIONS = "-XX:+UseSerialGC -XX:TieredStopAtLevel=1"
"""G1 takes memory that is free before it collects.  Optimising what runs for seconds costs more than it saves: 18 s of
processor time to the first answer, 11 s without; SQL over 4 million rows 33 and 26 s, a join of them the same."""
FORWARDED = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION")
"""Variables of the driver that a cluster's Python workers get too: where the storage is, and no secret."""

SPELLED = {"--driver-memory": "spark.driver.memory", "--driver-java-options": "spark.driver.extraJavaOptions"}
"""Settings that spark-submit has words of their own for."""


@contextmanager
def open_session(master: str | None = None, *, name: str = "winnow") -> Iterator[Any]:
    """Yield a SparkSession and stop it at the end, unless it was there before: then it is somebody else's.

    `master` None uses what spark-submit or the environment says, else every core of this machine.  The workers of a
    cluster are sent this code, unless spark-submit --py-files did that.
    Raises StageError when there is no pyspark or no Java, or the cluster's master does not answer.
    """
    try:
        from pyspark.sql import SparkSession
    except ImportError:
        raise StageError("this stage runs on Spark, and pyspark is absent: pip install 'winnow[spark]'.") from None
    _prepare_environment()
    master = _let_tasks_fail(master or _find_master())
    builder = SparkSession.builder.appName(name).master(master)
    for key, value in _settings(master, _list_chosen()).items():
        builder = builder.config(key, value)
    is_given = SparkSession.getActiveSession() is not None
    with _quiet_start():
        session = builder.getOrCreate()
    session.sparkContext.setLogLevel("OFF")
    logging.getLogger("SQLQueryContextLogger").setLevel(logging.CRITICAL)  # it prints every SQL error with Java's stack
    try:
        with nullcontext() if is_one_machine(session) else served_code(session.sparkContext):
            yield session
    finally:
        if not is_given:
            session.stop()


def _let_tasks_fail(master: str) -> str:
    """Return local[N] as local[N,LOCAL_FAILURES], so that a worker killed for its memory does not end the job."""
    cores = re.fullmatch(r"local(?:\[([^,\]]+)\])?", master)
    return f"local[{cores[1] or 1},{LOCAL_FAILURES}]" if cores else master


def _find_master() -> str:
    """Return the master that spark-submit or the environment names, else every core of this machine."""
    if not _is_submitted():
        return os.environ.get("MASTER") or LOCAL_DEFAULT
    return _read_submitted().get("spark.master", LOCAL_DEFAULT)


def _read_submitted() -> dict[str, str]:
    from pyspark import SparkConf, SparkContext

    SparkContext._ensure_initialized()  # only then does SparkConf know what spark-submit was told
    return dict(SparkConf().getAll())


def _list_chosen() -> set[str]:
    """Return the names of the settings that the user makes, in spark-defaults.conf or in words for spark-submit."""
    if _is_submitted():
        return set(_read_submitted())
    from pyspark.find_spark_home import _find_spark_home

    words = os.environ.get("PYSPARK_SUBMIT_ARGS", "")
    named = re.search(r"--properties-file[\s=]+(\S+)", words)
    folder = os.environ.get("SPARK_CONF_DIR") or join(_find_spark_home(), "conf")
    file = Path(named[1] if named else join(folder, "spark-defaults.conf"))
    lines = file.read_text(errors="replace") if file.is_file() else ""
    chosen = re.findall(r"^\s*(spark\.[\w.]+)", lines, re.MULTILINE)
    chosen += re.findall(r"(?:--conf|-c)[\s=]+[\"']?(spark\.[\w.]+)", words)
    return {*chosen, *(name for word, name in SPELLED.items() if word in words)}


def _is_submitted() -> bool:
    """Return whether spark-submit started this process."""
    return "SPARK_ENV_LOADED" in os.environ


@contextmanager
def lazy_session(master: str | None = None, *, name: str = "winnow") -> Iterator[Callable[[], Any]]:
    """Yield a function that starts the session when it is first called, so that finished stages need no Java."""
    with ExitStack() as stack:
        yield functools.cache(lambda: stack.enter_context(open_session(master, name=name)))


def _settings(master: str, chosen: set[str]) -> dict[str, str]:
    """Return what winnow asks of Spark; what the user has `chosen` is the user's, but for the time zone."""
    settings = {
        "spark.sql.execution.arrow.maxRecordsPerBatch": "65536",
        "spark.python.worker.reuse": "true",
        "spark.ui.showConsoleProgress": "false",
    }
    settings |= {f"spark.executorEnv.{name}": os.environ[name] for name in FORWARDED if name in os.environ}
    if master.startswith("local"):  # local-cluster included
        settings |= {
            "spark.driver.memory": "2g",
            "spark.driver.extraJavaOptions": LOCAL_JAVA_OPTIONS,
            "spark.driver.host": "127.0.0.1",
            "spark.driver.bindAddress": "127.0.0.1",
            "spark.ui.enabled": "false",
            "spark.sql.shuffle.partitions": "4",
            "spark.executorEnv.OMP_NUM_THREADS": "1",  # one task per core: no oversubscription
        }
    mine = {name: value for name, value in settings.items() if name not in chosen}
    return mine | {"spark.sql.session.timeZone": "UTC"}  # a `where` over times means the same everywhere


def _prepare_environment() -> None:
    if not _is_submitted():
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
    if _is_submitted():  # spark-submit: the log settings are the user's
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


def is_one_machine(session: Any) -> bool:
    """Return whether driver and tasks share this machine as one process: Spark's local[N], which knows no GPUs."""
    return re.match(r"local(\[|$)", session.sparkContext.master) is not None
