"""Result lines and their outcomes -> confidence intervals of every task, group mean and average, in both columns."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from eval38.outcomes import read_outcomes
from eval38.results import Column, Row, value_of
from eval38.statistics import CONFIDENCE, RESAMPLES, Array, bootstrap, find_interval
from eval38.tasks import REPORTED_GROUPS, TASKS, Task, own_task
from pipeline.errors import EvalError

log = logging.getLogger("winnow")


def measure_intervals(folder: str, rows: Mapping[str, Row]) -> dict[str, Any]:
    """Return {confidence, compat: {tasks: {key: [low, high]}, groups: {...}, average: [low, high] or None}, corrected}.

    A group or average has an interval when every task with a value in it has outcomes.
    """
    tasks = [find_row_task(key) for key in rows]
    found: dict[str, Any] = {"confidence": CONFIDENCE}
    plain = {task.key: drawn for task in tasks if (drawn := _draw(folder, task, rows[task.key], "compat")) is not None}
    found["compat"] = _describe(plain, tasks, rows, "compat")
    mended = {
        task.key: drawn
        for task in tasks
        if "corrected" in rows[task.key].get("outcomes", {})
        if (drawn := _draw(folder, task, rows[task.key], "corrected")) is not None
    }
    found["corrected"] = _describe(plain | mended, tasks, rows, "corrected")
    return found


def find_row_task(key: str) -> Task:
    """Return the task of a result line: a row of the table, or a set of the user's own."""
    return next((task for task in TASKS if task.key == key), None) or own_task(key)


def _draw(folder: str, task: Task, row: Row, column: Column) -> Array | None:
    if task.metric is None or value_of(row, column) is None:
        return None
    columns = read_outcomes(folder, task, sha256=row.get("outcomes", {}).get(column), column=column)
    return None if columns is None else bootstrap(task.metric, columns, key=task.key, resamples=RESAMPLES)


def _describe(
    drawn: Mapping[str, Array], tasks: Iterable[Task], rows: Mapping[str, Row], column: Column
) -> dict[str, Any]:
    valued = [task for task in tasks if value_of(rows[task.key], column) is not None]
    groups = {group: [task for task in valued if task.group == group] for group in REPORTED_GROUPS}
    return {
        "tasks": {task.key: list(find_interval(drawn[task.key])) for task in valued if task.key in drawn},
        "groups": {group: _average(drawn, members) for group, members in groups.items()},
        "average": _average(drawn, [task for task in valued if task.counted]),
    }


def _average(drawn: Mapping[str, Array], members: Iterable[Task]) -> list[float] | None:
    keys = [task.key for task in members]
    if not keys or any(key not in drawn for key in keys):
        return None
    return list(find_interval(np.mean([drawn[key] for key in keys], axis=0)))


def keep_with_outcomes(folder: str, rows: Mapping[str, Row]) -> dict[str, Row]:
    """Return the lines whose outcomes are there and whole, or that need none; the others are to be evaluated again."""
    kept = {}
    for key, row in rows.items():
        task, named = find_row_task(key), row.get("outcomes") or {}
        needed = dict.fromkeys([] if task.metric is None else ["compat", *named])
        if all(_is_whole(folder, task, column, named.get(column)) for column in needed):
            kept[key] = row
        else:
            log.warning("eval: %s is evaluated again because what the model made of each image is gone or damaged", key)
    return kept


def _is_whole(folder: str, task: Task, column: Column, sha256: str | None) -> bool:
    try:
        return read_outcomes(folder, task, sha256=sha256, column=column) is not None
    except EvalError:
        return False
