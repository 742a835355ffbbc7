"""Which device and how many threads a task is given.  The GPUs' addresses are made up, the scheduling is Spark's."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline import spark as edge
from pipeline.devices import count_cores
from pipeline.errors import StageError
from pipeline.java import find_java

pytestmark = pytest.mark.spark

CLUSTER = """
import json, os, time
from pipeline.spark import run_each
from pipeline.spark_session import open_session

def make():
    def work(number):
        from pipeline.devices import find_seat
        start = time.time()
        time.sleep(1)
        seat = find_seat()
        return {"device": seat.device, "threads": seat.threads, "start": start, "end": time.time()}
    return work

with open_session("local-cluster[1,4,1024]") as session:
    run_each(session, make(), range(4), what="warm up", quiet=True)
    found = {n: run_each(session, make(), range(8), what="seats", quiet=True, tasks_per_gpu=n) for n in (None, 1, 2)}
    print(json.dumps(found))
"""


def count_together(tasks: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """The most tasks that one device had at a time."""
    most: dict[str, int] = {}
    for task in tasks:
        same = [other for other in tasks if other["device"] == task["device"]]
        together = sum(other["start"] <= task["start"] < other["end"] for other in same)
        most[task["device"]] = max(together, most.get(task["device"], 0))
    return most


@pytest.mark.parametrize(("gpus", "tasks_per_gpu"), [(2, 1), (1, 1), (1, 2), (3, 4)])
def test_one_machine_deals_its_gpus(
    gpus: int, tasks_per_gpu: int, spark: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """local[2] runs two tasks at once: two seats at most.  Every item is done once, and a process stays on its GPU."""

    def work(number: int) -> dict[str, Any]:
        import time

        from pipeline.devices import find_seat

        (tmp_path / str(number)).touch(exist_ok=False)
        start, seat = time.time(), find_seat()
        time.sleep(0.05)
        assert seat
        return {"number": number, "device": seat.device, "pid": os.getpid(), "start": start, "end": time.time()}

    monkeypatch.setattr(edge, "count_gpus", lambda: gpus)
    done = edge.run_each(spark, work, range(12), what="seats", quiet=True, tasks_per_gpu=tasks_per_gpu)
    assert [task["number"] for task in done] == list(range(12))
    assert len({(task["pid"], task["device"]) for task in done}) == len({task["pid"] for task in done})
    assert all(number <= tasks_per_gpu for number in count_together(done).values())
    assert {task["device"] for task in done} <= {f"cuda:{n}" for n in range(min(2, gpus))}


def test_without_gpus_or_the_wish_for_one_tasks_share_the_cores(spark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(_: int) -> dict[str, Any]:
        import torch

        from pipeline.devices import find_seat

        seat = find_seat()
        assert seat
        return {"seat": [seat.device, seat.threads], "torch": torch.get_num_threads()}

    wanted = {"seat": ["cpu", max(1, count_cores() // 2)], "torch": 1}
    assert edge.run_each(spark, work, range(2), what="seats", quiet=True, tasks_per_gpu=1) == [wanted] * 2
    monkeypatch.setattr(edge, "count_gpus", lambda: 8)
    assert edge.run_each(spark, work, range(2), what="seats", quiet=True) == [wanted] * 2


@pytest.mark.parametrize("tasks_per_gpu", [None, 1])
def test_what_a_task_says_comes_through(tasks_per_gpu: int | None, spark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(_: int) -> dict[str, Any]:
        from pipeline.errors import StageError

        try:
            raise ValueError("inner")
        except ValueError as error:
            raise StageError("filter 'x' failed on part '7': ValueError: inner") from error

    monkeypatch.setattr(edge, "count_gpus", lambda: 1)
    with pytest.raises(StageError, match=r"^score: a worker failed: filter 'x' failed on part '7': ValueError: inner"):
        edge.run_each(spark, work, [1], what="score", quiet=True, tasks_per_gpu=tasks_per_gpu)


@pytest.mark.slow
def test_a_cluster_deals_gpus_to_one_stage(tmp_path: Path) -> None:
    """An executor of four cores and two GPUs: stages on the CPU use the cores, model stages so many tasks a GPU."""
    script = tmp_path / "gpus.sh"
    script.write_text("""#!/bin/sh\necho '{"name": "gpu", "addresses": ["0", "1"]}'\n""")
    script.chmod(0o755)
    settings = {"spark.executor.cores": "4", "spark.executor.memory": "512m"}
    for owner in ("worker", "executor"):
        settings[f"spark.{owner}.resource.gpu.amount"] = "2"
        settings[f"spark.{owner}.resource.gpu.discoveryScript"] = str(script)
    words = [word for key, value in settings.items() for word in ("--conf", f"{key}={value}")]
    environment = os.environ | {"PYSPARK_SUBMIT_ARGS": " ".join([*words, "pyspark-shell"])}
    environment |= {"JAVA_HOME": find_java().home}
    command = [sys.executable, "-c", CLUSTER]
    ran = subprocess.run(
        command,
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    on_cpu, alone, shared = found["null"], found["1"], found["2"]
    assert {(task["device"], task["threads"]) for task in on_cpu} == {("cpu", 1)}
    assert {(task["device"], task["threads"]) for task in alone} == {("cuda:0", 2), ("cuda:1", 2)}
    assert {(task["device"], task["threads"]) for task in shared} == {("cuda:0", 1), ("cuda:1", 1)}
    assert count_together(on_cpu)["cpu"] > 2
    assert set(count_together(alone).values()) == {1} and set(count_together(shared).values()) == {2}


def test_a_killed_worker_loses_nothing_of_its_seat(spark: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def work(number: int) -> dict[str, Any]:
        import os
        import signal

        with (tmp_path / "log").open("a") as log:
            log.write(f"{number}\n")
        if number == 3 and not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {"number": number}

    monkeypatch.setattr(edge, "count_gpus", lambda: 1)
    results = edge.run_each(spark, work, range(6), what="score", quiet=True, tasks_per_gpu=2)
    assert results == [{"number": n} for n in range(6)]
    assert (tmp_path / "log").read_text().split().count("3") == 2
