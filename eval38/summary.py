"""Result lines -> the facts of an evaluation: every task with its state, the two averages and the group means.

An average is the plain mean of the main metrics of the counted tasks, as in DataComp's aggregate_scores.py at
4a8df19; while some of the 38 lack a result it is called partial, with how many there are.  `average` is of the metrics
as DataComp computes them, as the group means are, and `average_corrected` of the corrected ones.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from eval38.results import Column, Row, value_of
from eval38.tasks import NUM_COUNTED, REPORTED_GROUPS, TASKS, Group, Task

Status = Literal["done", "failed"]


def summarize(
    asked: Sequence[Task], rows: Mapping[str, Row], broken: Mapping[str, str], *, without_data: Sequence[Task]
) -> dict[str, Any]:
    """Return the facts of an evaluation as plain JSON values.

    asked: the tasks, in order; rows: result lines by key; broken: why a task without a line failed, by key.
    Values are shares in [0, 1]; a mean over no task is null.
    """
    keys = {task.key for task in (*asked, *without_data)}
    return {
        "tasks": {task.key: _describe(task, rows.get(task.key), broken.get(task.key)) for task in asked},
        "average": average_of(rows),
        "average_corrected": average_of(rows, "corrected"),
        "groups": {group: mean_of_group(group, rows) for group in REPORTED_GROUPS},
        "missing": [task.key for task in without_data],
        "not_asked": [task.key for task in TASKS if task.key not in keys],
    }


def _describe(task: Task, row: Row | None, message: str | None) -> dict[str, Any]:
    status: Status = "done" if row else "failed"
    return {
        "name": task.name,
        "group": task.group,
        "counted": task.counted,
        "metric": task.metric,
        "value": value_of(row, "compat") if row else None,
        "value_corrected": value_of(row, "corrected") if row else None,
        "random_baseline": task.random_baseline,
        "images": row["images"] if row else None,
        "images_expected": task.images,
        "incomplete": bool(row and row["incomplete"]),
        "status": status,
        "message": message,
    }


def average_of(rows: Mapping[str, Row], column: Column = "compat") -> dict[str, Any]:
    """Return {label, value, num_tasks, num_incomplete} over the counted tasks that have a result."""
    values, num_incomplete = _values_of((task for task in TASKS if task.counted), rows, column)
    partial = len(values) < NUM_COUNTED
    label = (
        f"partial average over {len(values)} of {NUM_COUNTED} tasks" if partial else f"average over {NUM_COUNTED} tasks"
    )
    return {"label": label, "value": mean(values), "num_tasks": len(values), "num_incomplete": num_incomplete}


def mean_of_group(group: Group, rows: Mapping[str, Row]) -> dict[str, Any]:
    """Return {name, value, num_tasks, of, num_incomplete} over those of the group's `of` tasks that have a result."""
    members = [task for task in TASKS if task.group == group]
    values, num_incomplete = _values_of(members, rows, "compat")
    found = {"name": REPORTED_GROUPS[group], "value": mean(values), "num_tasks": len(values), "of": len(members)}
    return found | {"num_incomplete": num_incomplete}


def _values_of(tasks: Iterable[Task], rows: Mapping[str, Row], column: Column) -> tuple[list[float], int]:
    """Return the main metrics that are there, and how many are not over every image of their set.

    A main metric is null where it has nothing to be taken over.
    """
    there = [rows[task.key] for task in tasks if task.key in rows]
    valued = [(value, row) for row in there if (value := value_of(row, column)) is not None]
    return [value for value, _ in valued], sum(bool(row.get("incomplete")) for _, row in valued)


def list_failed(facts: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """Return `KEY: why` of those of the sets that could not be evaluated."""
    tasks = facts["tasks"]
    return [f"{key}: {tasks[key]['message']}" for key in keys if tasks[key]["status"] == "failed"]


def mean(values: Sequence[float]) -> float | None:
    """Return the plain mean, or None of nothing."""
    return math.fsum(values) / len(values) if values else None
