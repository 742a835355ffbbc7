"""A Spark standalone cluster on loopback, of one master and two workers, and a Python that has no winnow."""

import contextlib
import json
import os
import signal
import site
import socket
import subprocess
import time
import urllib.request
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyspark
import pytest
import torch

from pipeline.clip_model import open_model
from pipeline.java import find_java

SPARK_HOME = Path(pyspark.__file__).parent
START_S = 60
DEFAULTS = """spark.eventLog.enabled true
spark.eventLog.dir file://{events}
spark.eventLog.compress false
spark.eventLog.rolling.enabled false
spark.scheduler.minRegisteredResourcesRatio 1.0
"""


@dataclass(frozen=True)
class Site:
    """Where Spark programs are started from: a folder with nothing of winnow in it."""

    folder: Path
    environment: dict[str, str]
    master: str = ""

    def executors_of_tasks(self, last: int) -> list[set[str]]:
        """Return for each of the last applications the executors that finished tasks of it (from Spark's event log)."""
        ended = [self.tasks_of(log, "SparkListenerTaskEnd") for log in self.logs()[-last:]]
        return [{task["Executor ID"] for task in tasks if not task["Failed"]} for tasks in ended]

    def logs(self) -> list[Path]:
        """Return the event logs of all applications, the latest last."""
        return sorted((self.folder / "events").iterdir(), key=lambda p: p.stat().st_mtime_ns)

    def tasks_of(self, log: Path, event: str) -> list[dict[str, Any]]:
        """Return what an event log says of each task when it started, or ended."""
        events = [json.loads(line) for line in log.read_text().splitlines()]
        return [e["Task Info"] for e in events if e["Event"] == event]


def make_bare_python(folder: Path, environment: dict[str, str]) -> str:
    """Return a Python that has every package of this one but winnow.

    A .pth file adds the folder of our packages to its path; the .pth files in there, winnow's editable install among
    them, are then not read.
    """
    venv.create(folder, symlinks=True)
    packages = next(p for p in site.getsitepackages() if (Path(p) / "pyspark").is_dir())
    next(folder.glob("lib/python3*/site-packages")).joinpath("packages.pth").write_text(packages)
    ask = "import torch, pyspark, pipeline"
    python = str(folder / "bin" / "python")
    done = subprocess.run([python, "-c", ask], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert "No module named 'pipeline'" in done.stderr, done.stderr
    return python


@pytest.fixture(scope="module")
def spark_site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A working folder, an event log, and the environment of a driver or worker that knows no checkout."""
    folder = tmp_path_factory.mktemp("site")
    for name in ("events", "conf"):
        (folder / name).mkdir()
    (folder / "conf" / "spark-defaults.conf").write_text(DEFAULTS.format(events=folder / "events"))
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "SPARK_ENV_LOADED")}
    environment |= {"SPARK_HOME": str(SPARK_HOME), "JAVA_HOME": find_java().home, "SPARK_LOCAL_IP": "127.0.0.1"}
    environment |= {"SPARK_CONF_DIR": str(folder / "conf"), "SPARK_DAEMON_MEMORY": "512m"}
    environment |= {
        "JAVA_TOOL_OPTIONS": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
    }  # short lives: half the start's work
    return Site(folder, environment | {"PYSPARK_PYTHON": make_bare_python(folder / "python", environment)})


@pytest.fixture(scope="module")
def standalone(spark_site: Site) -> Iterator[Site]:
    """A running master with two registered workers of one core each; all killed at the end, whatever happens.

    They have two loopback addresses: Spark starts no second attempt of a task on the host of the first.
    """
    port, web = _free_port(), _free_port()
    url = f"spark://127.0.0.1:{port}"
    prefix = "org.apache.spark.deploy."
    commands = [[prefix + "master.Master", "--host", "127.0.0.1", "--port", str(port), "--webui-port", str(web)]]
    worker = [prefix + "worker.Worker", url, "--webui-port", "0", "--cores", "1", "--memory", "1g"]
    own = (["--host", f"127.0.0.{n + 1}", "--work-dir", str(spark_site.folder / f"worker{n}")] for n in range(2))
    commands += [[*worker, *words] for words in own]
    with contextlib.ExitStack() as stack:
        for number, command in enumerate(commands):
            stack.enter_context(_daemon(command, spark_site, spark_site.folder / f"daemon{number}.log"))
        _wait_for_workers(f"http://127.0.0.1:{web}/json", 2)
        yield Site(spark_site.folder, spark_site.environment, url)


def _free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return int(asked.getsockname()[1])


@contextlib.contextmanager
def _daemon(command: list[str], place: Site, log: Path) -> Iterator[None]:
    """Run one of Spark's daemons in a process group of its own, and end that group."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(SPARK_HOME / "bin" / "spark-class"), *command],
            cwd=place.folder,
            env=place.environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield
    finally:
        for number, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(patience)
        assert process.poll() is not None


def _wait_for_workers(url: str, number: int) -> None:
    """Return when the master's page counts that many living workers."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError), urllib.request.urlopen(url, timeout=5) as page:
            if json.load(page)["aliveworkers"] == number:
                return
        time.sleep(0.2)
    raise TimeoutError(f"{url} has not {number} workers after {START_S} s")


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model string of a tiny CLIP with fixed weights, in a file that every worker can read."""
    path = tmp_path_factory.mktemp("model") / "tiny.pt"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        torch.save(open_model("winnow-vit-tiny").model.state_dict(), path)
    return f"winnow-vit-tiny@{path}"
