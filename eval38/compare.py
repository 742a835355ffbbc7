"""Several models' results side by side: values with intervals, differences to the first with tests, means of groups.

Reads results folders of `winnow eval` and of DataComp's evaluate.py, whose lines say nothing of model, data or
precision and are marked.  Intervals and tests need outcomes (outcomes.py); without them a difference has no p.
Tests of one model on many tasks are Holm's: a false alarm on any of them is as rare as on one task.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval38.intervals import find_row_task
from eval38.outcomes import read_outcomes
from eval38.results import LIBRARIES, Column, Row, read_results, value_of
from eval38.statistics import (
    CANDIDATES,
    CAPTIONS,
    GROUP,
    LABEL,
    PAIRED_RESAMPLES,
    RESAMPLES,
    Array,
    Columns,
    adjust_holm,
    bootstrap,
    bootstrap_pair,
    compare_mcnemar,
    estimate_p,
    find_interval,
    find_right,
)
from eval38.summary import mean
from eval38.table import NOTHING, align, format_interval, format_share
from eval38.tasks import NUM_COUNTED, REPORTED_GROUPS, TASKS, Task
from pipeline.errors import ConfigError, EvalError
from pipeline.storage import is_folder, is_local

TRUTHS = (LABEL, GROUP, CAPTIONS, CANDIDATES)
"""Columns that the set decides, not the model."""
MADE_WITH = ("precision", *LIBRARIES)
"""Entries of the provenance that move numbers, and that models are best compared in the same of."""
MARKS = ((0.01, "**"), (0.05, "*"))
INCOMPLETE = "†"


@dataclass(frozen=True, slots=True)
class Run:
    """One model's results."""

    label: str
    folder: str
    rows: Mapping[str, Row]


@dataclass(frozen=True, slots=True)
class Compared:
    """One task or mean: what each model has, by label."""

    name: str
    values: Mapping[str, float | None]
    drawn: Mapping[str, Array]
    """Resampled values, of models with outcomes."""
    differences: Mapping[str, Array]
    """Resampled differences to the first model, where both have outcomes."""
    exact_p: Mapping[str, float]
    """Of McNemar's test, where the metric is a share of images."""
    counted: Task | None = None
    incomplete: tuple[str, ...] = ()
    """Models that were not evaluated on every image."""


def read_run(text: str) -> Run:
    """Return the results that FOLDER or LABEL=FOLDER names.  Raises ConfigError when there are none."""
    label, equals, folder = text.partition("=")
    if not equals or (is_local(text) and is_folder(text)):  # a folder's own name may hold =
        label, folder = "", text
    rows = read_results(folder)
    if not rows:
        raise ConfigError(f"{folder!r} holds no eval_results.jsonl with results. Run `winnow eval --out {folder}`.")
    return Run(label or folder.rstrip("/").rsplit("/", 1)[-1], folder, rows)


def compare(
    texts: Sequence[str], *, column: Column = "compat", any_data: bool = False, resamples: int = PAIRED_RESAMPLES
) -> dict[str, Any]:
    """Return the comparison as plain JSON values; differences are to the first model.

    Raises ConfigError for fewer than two models or equal labels, EvalError when a task was evaluated on other data
    for two models, unless `any_data`.
    """
    runs = [read_run(text) for text in texts]
    labels = [run.label for run in runs]
    if len(runs) < 2 or len(set(labels)) < len(labels):
        raise ConfigError(f"two or more models are compared, each with a label of its own, not {labels}: LABEL=FOLDER.")
    if not any_data:
        check_same_data(runs)
    tasks = [_compare_task(task, runs, column, resamples) for task in _list_tasks(runs)]
    return {
        "models": labels,
        "without_provenance": [run.label for run in runs if any("provenance" not in row for row in run.rows.values())],
        "made_otherwise": list_differences(runs),
        "column": column,
        "tasks": _describe(tasks, labels),
        "means": _describe(list(_list_means(tasks, labels)), labels),
    }


def check_same_data(runs: Sequence[Run]) -> None:
    """Raise EvalError with the tasks for which two models saw other data; a line without provenance is believed."""
    other = []
    for key in dict.fromkeys(key for run in runs for key in run.rows):
        rows = [(run.label, run.rows[key]) for run in runs if key in run.rows]
        hashes = {label: row["provenance"]["data_hash"] for label, row in rows if row.get("provenance")}
        if len(set(hashes.values())) > 1:
            other.append(f"{key} ({', '.join(f'{label}: {found[:8]}' for label, found in hashes.items())})")
    if other:
        raise EvalError(
            f"{len(other)} tasks were evaluated on other data: {'; '.join(other[:5])}. Evaluate both models on one "
            "folder, or say --any-data if the folders hold the same sets."
        )


def list_differences(runs: Sequence[Run]) -> dict[str, dict[str, str]]:
    """Return entry -> label -> value of number format and library versions that are not the same in all lines."""
    found: dict[str, dict[str, str]] = {}
    for name in MADE_WITH:
        made = {run.label: {(row.get("provenance") or {}).get(name) for row in run.rows.values()} for run in runs}
        known = {label: sorted(map(str, values - {None})) for label, values in made.items()}
        if len({value for values in known.values() for value in values}) > 1:
            found[name] = {label: " and ".join(values) or "not known" for label, values in known.items()}
    return found


def _list_tasks(runs: Sequence[Run]) -> list[Task]:
    keys = dict.fromkeys(key for run in runs for key in run.rows)
    known = [task.key for task in TASKS if task.key in keys]
    return [find_row_task(key) for key in (*known, *sorted(keys.keys() - set(known)))]


def _compare_task(task: Task, runs: Sequence[Run], column: Column, resamples: int) -> Compared:
    values = {run.label: _take_value(run.rows.get(task.key), column) for run in runs}
    found = {run.label: _take_outcomes(task, run, column) for run in runs}
    columns = {label: of for label, of in found.items() if of is not None and values[label] is not None}
    metric, (first, *others) = task.metric, (run.label for run in runs)
    incomplete = tuple(run.label for run in runs if run.rows.get(task.key, {}).get("incomplete"))
    if metric is None:
        return Compared(task.name, values, {}, {}, {}, None, incomplete)
    drawn = {label: bootstrap(metric, of, key=task.key, resamples=RESAMPLES) for label, of in columns.items()}
    pairs = [label for label in others if {first, label} <= columns.keys() and _is_pair(columns[first], columns[label])]
    differences = {
        label: bootstrap_pair(metric, columns[first], columns[label], key=task.key, resamples=resamples)
        for label in pairs
    }
    right = {label: find_right(columns[label]) for label in (first, *pairs)} if metric == "acc1" and pairs else {}
    exact_p = {label: compare_mcnemar(right[first], right[label]) for label in pairs if right}
    return Compared(task.name, values, drawn, differences, exact_p, task if task.counted else None, incomplete)


def _take_value(row: Row | None, column: Column) -> float | None:
    value = value_of(row, column) if row else None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _take_outcomes(task: Task, run: Run, column: Column) -> Columns | None:
    named = (run.rows.get(task.key) or {}).get("outcomes") or {}
    of: Column = column if column in named else "compat"
    return read_outcomes(run.folder, task, sha256=named.get(of), column=of)


def _is_pair(first: Columns, second: Columns) -> bool:
    """Return whether two models' outcomes are of the same images in the same order, as far as the truth tells."""
    names = [name for name in TRUTHS if name in first]
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in names)


def _list_means(tasks: Sequence[Compared], labels: Sequence[str]) -> Iterable[Compared]:
    """Yield the means of DataComp's groups and of all counted tasks, over those tasks that every model has."""
    shared = [one for one in tasks if one.counted and all(value is not None for value in one.values.values())]
    for group, name in REPORTED_GROUPS.items():
        members = [one for one in shared if one.counted and one.counted.group == group]
        of = sum(task.group == group for task in TASKS)
        if members:
            yield _average(f"{name} ({len(members)} of {of} tasks)", members, labels)
    if shared:
        whole = len(shared) == NUM_COUNTED
        over = f"average over {NUM_COUNTED}" if whole else f"partial average over {len(shared)} of {NUM_COUNTED}"
        yield _average(f"{over} tasks", shared, labels)


def _average(name: str, members: Sequence[Compared], labels: Sequence[str]) -> Compared:
    """Return the mean of tasks; resampled only where every member is."""
    drawn = {
        label: _mean([one.drawn[label] for one in members])
        for label in labels
        if all(label in one.drawn for one in members)
    }
    paired = [label for label in labels[1:] if all(label in one.differences for one in members)]
    return Compared(
        name,
        {label: mean([value for one in members if (value := one.values[label]) is not None]) for label in labels},
        drawn,
        {label: _mean([one.differences[label] for one in members]) for label in paired},
        {},
        incomplete=tuple(label for label in labels if any(label in one.incomplete for one in members)),
    )


def _mean(drawn: Sequence[Array]) -> Array:
    value_B: Array = np.mean(drawn, axis=0)
    return value_B


def _describe(found: Sequence[Compared], labels: Sequence[str]) -> list[dict[str, Any]]:
    """Return the tasks or means as plain values; p-values of each model are adjusted together."""
    lines: list[dict[str, Any]] = [
        {
            "name": one.name,
            "key": one.counted.key if one.counted else None,
            "values": dict(one.values),
            "incomplete": list(one.incomplete),
            "intervals": {label: list(find_interval(value_B)) for label, value_B in one.drawn.items()},
            "differences": {label: _describe_difference(one, labels[0], label) for label in labels[1:]},
        }
        for one in found
    ]
    for label in labels[1:]:
        tested = [line["differences"][label] for line in lines if line["differences"][label]["p"] is not None]
        for difference, p in zip(tested, adjust_holm([d["p"] for d in tested]), strict=True):
            difference["p_adjusted"] = p
    return lines


def _describe_difference(one: Compared, first: str, label: str) -> dict[str, Any]:
    values = one.values[first], one.values[label]
    drawn = one.differences.get(label)
    exact = one.exact_p.get(label)
    return {
        "value": None if values[0] is None or values[1] is None else values[1] - values[0],
        "interval": None if drawn is None else list(find_interval(drawn)),
        "test": None if drawn is None else "bootstrap" if exact is None else "McNemar",
        "p": None if drawn is None else estimate_p(drawn) if exact is None else exact,
        "p_adjusted": None,
    }


def format_compared(facts: Mapping[str, Any]) -> str:
    """Return the comparison as a plain table: values with their intervals, then each difference to the first model."""
    first, *others = facts["models"]
    head = ["%", *facts["models"], *(f"{label} - {first}" for label in others)]
    rows = [head, *(_format_line(line, facts["models"]) for line in (*facts["tasks"], *facts["means"]))]
    lines = align(rows, left=(0,))
    notes = [
        "",
        f"Column: {facts['column']}. In brackets: 95 % bootstrap intervals over images; not over training runs.",
        "* and **: p below 0.05 and 0.01 by a paired test (McNemar's for accuracy, else the bootstrap), adjusted",
        "by Holm over the tasks, and over the means.",
    ]
    if any(line["incomplete"] for line in (*facts["tasks"], *facts["means"])):
        notes.append(f"{INCOMPLETE} Not every image of the set, or of a set in the mean, was evaluated.")
    notes += [
        f"{label}: lines without provenance, so model, data and precision are not known."
        for label in facts["without_provenance"]
    ]
    for name, values in facts["made_otherwise"].items():
        said = ", ".join(f"{label}: {value}" for label, value in values.items())
        notes.append(f"{name} is not the same ({said}): part of a difference may come from that.")
    return "\n".join([*lines[: len(facts["tasks"]) + 1], "", *lines[len(facts["tasks"]) + 1 :], *notes]) + "\n"


def _format_line(line: Mapping[str, Any], labels: Sequence[str]) -> list[str]:
    cells = [line["name"]]
    for label in labels:
        interval = format_interval(line["intervals"].get(label))
        mark = f" {INCOMPLETE}" if label in line["incomplete"] else ""
        cells.append(f"{format_share(line['values'][label])}{mark} {interval}".rstrip())
    for label in labels[1:]:
        difference = line["differences"][label]
        value, p = difference["value"], difference["p_adjusted"]
        mark = next((f" {mark}" for limit, mark in MARKS if p is not None and p < limit), "")
        text = NOTHING if value is None else f"{100 * value:+.2f}"
        cells.append(f"{text} {format_interval(difference['interval'])}{mark}".rstrip())
    return cells
