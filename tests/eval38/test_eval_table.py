from typing import Any

import pytest

from eval38.classify import Outcome
from eval38.results import build_row
from eval38.summary import average_of, mean_of_group, summarize
from eval38.table import format_comparison, format_share, format_table
from eval38.tasks import TASKS, Task, find_task


def _row(task: Task, value: float, *, images: int | None = None) -> dict[str, Any]:
    metrics: dict[str, float | None] = {str(task.metric): value}
    corrected: dict[str, float | None] | None = {"acc_worst_region": 0.75} if task.key == "wilds/fmow" else None
    return build_row(task, Outcome(metrics, images or task.images or 1, (), corrected), {})


def _facts(values: dict[str, float], *, broken: dict[str, str] | None = None) -> dict[str, Any]:
    broken = broken or {}
    asked = [task for task in TASKS if task.key in values or task.key in broken]
    rows = {key: _row(find_task(key), value, images=7 if key == "mnist" else None) for key, value in values.items()}
    without = [task for task in TASKS if task not in asked and task.key != "cars"]
    return summarize(asked, rows, broken, without_data=without)


def test_whole_averages() -> None:
    rows = {task.key: _row(task, 0.25) for task in TASKS if task.counted}
    assert average_of(rows) == {"label": "average over 38 tasks", "value": 0.25, "num_tasks": 38, "num_incomplete": 0}
    corrected = average_of(rows, "corrected")
    assert corrected["num_tasks"] == 38 and corrected["value"] == pytest.approx(0.25 + 0.5 / 38)


def test_a_metric_over_nothing_is_not_averaged() -> None:
    rows = {"mnist": _row(find_task("mnist"), 0.5)}
    rows["misc/winogavil"] = build_row(find_task("misc/winogavil"), Outcome({"jaccard_score_10-12": None}, 1, ()), {})
    assert average_of(rows) == {
        "label": "partial average over 1 of 38 tasks",
        "value": 0.5,
        "num_tasks": 1,
        "num_incomplete": 0,
    }


@pytest.mark.parametrize("keys", [[], ["mnist"], ["mnist", "cifar10", "vtab/pets"]])
def test_partial_average_says_so(keys: list[str]) -> None:
    found = average_of({key: _row(find_task(key), 0.5) for key in keys})
    assert found["label"] == f"partial average over {len(keys)} of 38 tasks"
    assert found["value"] == (0.5 if keys else None)


def test_group_mean_says_over_how_many() -> None:
    rows = {"vtab/pets": _row(find_task("vtab/pets"), 0.5), "mnist": _row(find_task("mnist"), 0.1)}
    assert mean_of_group("vtab", rows) == {
        "name": "VTAB",
        "value": 0.5,
        "num_tasks": 1,
        "of": 13,
        "num_incomplete": 0,
    }
    assert mean_of_group("retrieval", rows)["value"] is None


def test_table() -> None:
    values = {"vtab/pets": 0.5, "mnist": 0.1234, "wilds/fmow": 0.0}
    facts = _facts(values, broken={"cifar10": "its folder has 4 classes"})
    of_tasks = {"mnist": [0.1, 0.15], "vtab/pets": [0.5, 0.5]}
    compat = {"tasks": of_tasks, "groups": {"vtab": [0.5, 0.5], "retrieval": None}, "average": [0.2, 0.25]}
    facts["intervals"] = {"compat": compat, "corrected": {"average": None}}
    lines = format_table(facts).splitlines()
    assert [line.rstrip() for line in lines[:10]] == [
        "task             metric                     %  95 % interval  corrected %  random %  images",
        "CIFAR-10         acc1                       -                                 10.00       -  failed",
        "MNIST *          acc1                   12.34   [10.0, 15.0]                  10.04       7",
        "Oxford-IIIT Pet  mean_per_class_recall  50.00   [50.0, 50.0]                   2.70   3,669",
        "FMoW             acc_worst_region        0.00                       75.00      2.72  22,108",
        "",
        "ImageNet (0 of 1 tasks)                                            -",
        "ImageNet dist. shifts (0 of 6 tasks)                               -",
        "VTAB (1 of 13 tasks)                                           50.00  [50.0, 50.0]",
        "Retrieval (0 of 3 tasks)                                           -",
    ]
    text = " ".join(lines)
    assert "partial average over 3 of 38 tasks, as DataComp computes it *  20.78  [20.0, 25.0]" in text
    assert "partial average over 3 of 38 tasks, corrected *                45.78" in text
    assert "* Incomplete, and so are the means they enter: MNIST (7 of 10,000 images)." in text
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
    assert found["average"] == ["30.00 (2/38) *", "60.00 (2/38) *"]
    assert found["average over the counted tasks that all have (1)"] == ["20.00 *", "30.00 *"]
    assert "average, corrected" not in found
    assert "* Not every image of the set, or of a set in the mean, was evaluated." in text


def test_a_mean_with_an_incomplete_set_is_marked() -> None:
    rows = {task.key: _row(task, 0.25, images=7 if task.key == "vtab/pets" else None) for task in TASKS}
    facts = summarize(TASKS, rows, {}, without_data=())
    assert facts["average"]["num_incomplete"] == facts["average_corrected"]["num_incomplete"] == 1
    shown = format_table(facts).splitlines()
    marked = [line.partition(" *")[0] for line in shown if " *" in line and not line.startswith("*")]
    assert marked == [
        "Oxford-IIIT Pet",
        "VTAB (13 of 13 tasks)",
        "average over 38 tasks, as DataComp computes it",
        "average over 38 tasks, corrected",
    ]


def test_comparison_says_why_a_task_failed() -> None:
    facts = _facts({"vtab/pets": 0.5}, broken={"cifar10": "its folder has 4 classes"})
    assert format_comparison({"a": facts, "b": facts}).count("CIFAR-10 failed: its folder has 4 classes") == 1


def test_comparison_gives_corrected_averages_where_they_differ() -> None:
    text = format_comparison({"a": _facts({"wilds/fmow": 0.25}), "b": _facts({"mnist": 0.5})})
    (line,) = [line for line in text.splitlines() if line.startswith("average, corrected")]
    assert line.split() == ["average,", "corrected", "75.00", "(1/38)", "50.00", "(1/38)", "*"]


@pytest.mark.parametrize(("value", "text"), [(None, "-"), (0.0, "0.00"), (1.0, "100.00"), (0.123456, "12.35")])
def test_share(value: float | None, text: str) -> None:
    assert format_share(value) == text
