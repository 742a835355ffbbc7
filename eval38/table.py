"""The facts of an evaluation -> plain text: one model's tasks, or several models side by side.  Values in per cent.

Values are as DataComp computes them; where the corrected one is another, it stands beside it.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from eval38.summary import mean
from eval38.tasks import NUM_COUNTED

WIDTH = 110
NOTHING = "-"
INCOMPLETE = " *"
"""Behind a task, or a mean with a task, of which not every image was evaluated."""

Facts = Mapping[str, Any]
"""`facts` of an evaluation's manifest."""


def format_table(facts: Facts) -> str:
    """Return one model's results: tasks, group means, the labelled averages, then what is incomplete or missing."""
    intervals = facts.get("intervals", {}).get("compat", {})
    lines = align(
        [["task", "metric", "%", "95 % interval", "corrected %", "random %", "images", ""]]
        + [
            [
                task["name"] + _mark(task["incomplete"]),
                task["metric"] or NOTHING,
                format_share(task["value"]),
                format_interval(intervals.get("tasks", {}).get(key)),
                "" if task["value_corrected"] == task["value"] else format_share(task["value_corrected"]),
                format_share(task["random_baseline"]),
                NOTHING if task["images"] is None else f"{task['images']:,}",
                "" if task["status"] == "done" else task["status"],
            ]
            for key, task in facts["tasks"].items()
        ],
        left=(0, 1, 7),
    )
    of_groups = intervals.get("groups", {})
    means = [
        [_name_group(group), format_share(group["value"]), format_interval(of_groups.get(key))]
        for key, group in facts["groups"].items()
    ]
    averages = [
        [
            f"{facts[key]['label']}, {words}{_mark(facts[key].get('num_incomplete'))}",
            format_share(facts[key]["value"]),
            format_interval(facts.get("intervals", {}).get(column, {}).get("average")),
        ]
        for key, column, words in (
            ("average", "compat", "as DataComp computes it"),
            ("average_corrected", "corrected", "corrected"),
        )
    ]
    return "\n".join(lines + [""] + align([*means, *averages], left=(0,)) + _explain(facts)) + "\n"


def format_comparison(models: Mapping[str, Facts]) -> str:
    """Return several models side by side: rows are tasks, columns models, in the order given.

    Averages over different tasks do not compare, so one over the counted tasks that all models have is added.
    """
    tasks = {key: task["name"] for facts in models.values() for key, task in facts["tasks"].items()}
    rows = [["%", *models]]
    for key, name in tasks.items():
        found = [facts["tasks"].get(key, {}) for facts in models.values()]
        rows.append([name, *(format_share(t.get("value")) + _mark(t.get("incomplete")) for t in found)])
    return "\n".join(align(rows + _compare_means(models), left=(0,)) + _explain_comparison(models)) + "\n"


def _compare_means(models: Mapping[str, Facts]) -> list[list[str]]:
    """Return the rows of group means and averages; a mean that no model has a task for is left out."""
    rows = []
    groups = dict.fromkeys(group for facts in models.values() for group in facts["groups"])
    for group in groups:
        means = [facts["groups"][group] for facts in models.values()]
        if any(m["num_tasks"] for m in means):
            cells = [
                f"{format_share(m['value'])} ({m['num_tasks']}/{m['of']}){_mark(m.get('num_incomplete'))}"
                for m in means
            ]
            rows.append([means[0]["name"], *cells])
    averages = [facts["average"] for facts in models.values()]
    if any(a["num_tasks"] for a in averages):
        rows.append(["average", *map(_count_average, averages)])
    if any(facts["average_corrected"] != facts["average"] for facts in models.values()):
        rows.append(["average, corrected", *(_count_average(facts["average_corrected"]) for facts in models.values())])
    if shared := find_shared(models):
        found = [[facts["tasks"][key] for key in shared] for facts in models.values()]
        cells = [
            format_share(mean([task["value"] for task in tasks])) + _mark(any(task["incomplete"] for task in tasks))
            for tasks in found
        ]
        rows.append([f"average over the counted tasks that all have ({len(shared)})", *cells])
    return rows


def _explain_comparison(models: Mapping[str, Facts]) -> list[str]:
    """Return the lines below the table: what the mark means, and why tasks failed."""
    tasks = [task for facts in models.values() for task in facts["tasks"].values()]
    note = "* Not every image of the set, or of a set in the mean, was evaluated."
    notes = [note] if any(task["incomplete"] for task in tasks) else []
    notes += dict.fromkeys(f"{task['name']} failed: {task['message']}" for task in tasks if task["status"] == "failed")
    return ["", *_wrap(notes)] if notes else []


def _count_average(average: Mapping[str, Any]) -> str:
    return (
        f"{format_share(average['value'])} ({average['num_tasks']}/{NUM_COUNTED}){_mark(average.get('num_incomplete'))}"
    )


def _mark(incomplete: Any) -> str:
    return INCOMPLETE if incomplete else ""


def find_shared(models: Mapping[str, Facts]) -> list[str]:
    """Return the keys of the counted tasks that every model has a value for."""
    first, *_ = models.values()
    return [
        key
        for key, task in first["tasks"].items()
        if task["counted"] and all(f["tasks"].get(key, {}).get("value") is not None for f in models.values())
    ]


def format_share(value: float | None) -> str:
    """Return a share in [0, 1] as per cent with two digits, or a dash."""
    return NOTHING if value is None else f"{100 * value:.2f}"


def format_interval(interval: Sequence[float] | None) -> str:
    """Return an interval of shares in per cent with one digit, or nothing."""
    return f"[{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else ""


def align(rows: Sequence[Sequence[str]], *, left: Sequence[int]) -> list[str]:
    """Return the rows as lines of equal columns; those in `left` are flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [
        [
            cell.ljust(width) if n in left else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    ]
    return ["  ".join(row).rstrip() for row in cells]


def _name_group(group: Mapping[str, Any]) -> str:
    return f"{group['name']} ({group['num_tasks']} of {group['of']} tasks){_mark(group.get('num_incomplete'))}"


def _explain(facts: Facts) -> list[str]:
    """Return the lines below the table: incomplete and failed tasks, tasks without data, tasks not asked for."""
    tasks = facts["tasks"].values()
    incomplete = [f"{task['name']} ({_count_images(task)})" for task in tasks if task["incomplete"]]
    notes = [f"* Incomplete, and so are the means they enter: {', '.join(incomplete)}."] if incomplete else []
    notes += [f"{task['name']} failed: {task['message']}" for task in tasks if task["status"] == "failed"]
    for what, keys in (("No data", facts["missing"]), ("Not asked for", facts["not_asked"])):
        if keys:
            notes.append(f"{what}: {', '.join(keys)}.")
    return ["", *_wrap(notes)] if notes else []


def _wrap(notes: Sequence[str]) -> list[str]:
    return [line for note in notes for line in textwrap.wrap(note, WIDTH, subsequent_indent="  ")]


def _count_images(task: Mapping[str, Any]) -> str:
    expected = "" if task["images_expected"] is None else f" of {task['images_expected']:,}"
    return f"{task['images']:,}{expected} images"
