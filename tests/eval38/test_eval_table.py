from typing import Any

import pytest

from eval38.classify import Outcome
from eval38.results import build_row
from eval38.summary import average_of, mean_of_group, summarize
from eval38.table import format_comparison, format_share, format_table
from eval38.tasks import TASKS, Task, find_task


def _row(task: Task, value: float, *, images: int | None = None) -> dict[str, Any]:
    metrics: dict[str, float | None] = {str(task.metric): value}
    return build_row(task, Outcome(metrics, images or task.images or 1, ()), {})


def _facts(values: dict[str, float], *, broken: dict[str, str] | None = None) -> dict[str, Any]:
    broken = broken or {}
    asked = [task for task in TASKS if task.key in values or task.key in broken or task.key == "wilds/fmow"]
    rows = {key: _row(find_task(key), value, images=7 if key == "mnist" else None) for key, value in values.items()}
    without = [task for task in TASKS if task not in asked and task.key != "cars"]
    return summarize(asked, rows, broken, without_data=without)


def test_whole_average() -> None:
    rows = {task.key: _row(task, 0.25) for task in TASKS if task.counted}
    assert average_of(rows) == {"label": "average over 38 tasks", "value": 0.25, "num_tasks": 38}


@pytest.mark.parametrize("keys", [[], ["mnist"], ["mnist", "cifar10", "vtab/pets"]])
def test_partial_average_says_so(keys: list[str]) -> None:
    found = average_of({key: _row(find_task(key), 0.5) for key in keys})
    assert found["label"] == f"partial average over {len(keys)} of 38 tasks"
    assert found["value"] == (0.5 if keys else None)


def test_group_mean_says_over_how_many() -> None:
    rows = {"vtab/pets": _row(find_task("vtab/pets"), 0.5), "mnist": _row(find_task("mnist"), 0.1)}
    assert mean_of_group("vtab", rows) == {"name": "VTAB", "value": 0.5, "num_tasks": 1, "of": 13}
    assert mean_of_group("retrieval", rows)["value"] is None


def test_table() -> None:
    facts = _facts({"vtab/pets": 0.5, "mnist": 0.1234}, broken={"cifar10": "its folder has 4 classes"})
    lines = format_table(facts).splitlines()
    assert [line.rstrip() for line in lines[:10]] == [
        "task             metric                     %  random %  images",
        "CIFAR-10         acc1                       -     10.00       -  failed",
        "MNIST *          acc1                   12.34     10.04       7",
        "Oxford-IIIT Pet  mean_per_class_recall  50.00      2.70   3,669",
        "FMoW             acc_worst_region           -      2.72       -  not implemented yet",
        "",
        "ImageNet (0 of 1 tasks)                   -",
        "ImageNet dist. shifts (0 of 6 tasks)      -",
        "VTAB (1 of 13 tasks)                  50.00",
        "Retrieval (0 of 3 tasks)                  -",
    ]
    text = " ".join(lines)
    assert "partial average over 2 of 38 tasks    31.17" in text
    assert "* MNIST is incomplete: 7 of 10,000 images." in text
    assert "CIFAR-10 failed: its folder has 4 classes" in text
    assert "No data: vtab/caltech101, " in text and "Not asked for: cars." in text
    assert max(map(len, lines)) <= 110


def test_comparison_adds_an_average_over_shared_tasks() -> None:
    text = format_comparison(
        {"small": _facts({"mnist": 0.2, "cifar10": 0.4}), "large model": _facts({"mnist": 0.3, "vtab/pets": 0.9})}
    )
    rows = [line.split("  ") for line in text.splitlines()]
    found = {row[0]: [cell.strip() for cell in row[1:] if cell.strip()] for row in rows}
    assert found["%"] == ["small", "large model"]
    assert found["MNIST"] == ["20.00 *", "30.00 *"]
    assert found["CIFAR-10"] == ["40.00", "-"] and found["Oxford-IIIT Pet"] == ["-", "90.00"]
    assert found["VTAB"] == ["- (0/13)", "90.00 (1/13)"]
    assert found["average"] == ["30.00 (2/38)", "60.00 (2/38)"]
    assert found["average over the counted tasks that all have (1)"] == ["20.00", "30.00"]


@pytest.mark.parametrize(("value", "text"), [(None, "-"), (0.0, "0.00"), (1.0, "100.00"), (0.123456, "12.35")])
def test_share(value: float | None, text: str) -> None:
    assert format_share(value) == text
