"""The section about zero-shot results: tasks x models, group means, the labelled averages, and what is missing.

Values are as DataComp computes them; a line more gives a task's or the average's corrected value where it is another.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from pipeline.report.blocks import Absent, Block, Cell, Figure, Fold, Panel, Section, Table
from pipeline.report.charts import HALF_WIDTH, WIDTH, Line, Score, choose_colours, draw_lines, draw_scores
from pipeline.report.formats import NOTHING, count_nouns, format_count, format_percent
from pipeline.report.published import DAGGER, GROUPS, list_published
from pipeline.report.read import CURVES, EVALS, NO_FILTER, RunFolder, is_network
from pipeline.schemas import EVAL_CURVE

CORRECTED = "value_corrected"
Facts = Mapping[str, Any]
Models = Mapping[str, Facts]
"""Facts of an evaluation's manifest, by label of the model."""


def build_evaluation(run: RunFolder) -> Section:
    """Return the results of every model on every task it was evaluated on."""
    models = {label: manifest.facts for label, manifest in run.evals.items()}
    if not models:
        return Section("Evaluation", _draw_curves(run) or [Absent("The run folder holds no evaluation.")])
    tasks = {key: task for facts in models.values() for key, task in facts["tasks"].items()}
    done = [key for key in tasks if any(_find_value(facts, key) is not None for facts in models.values())]
    blocks: list[Block] = []
    if done:
        colours = choose_colours(run.labels, reference=NO_FILTER)
        blocks.append(_draw_tasks(models, tasks, done, colours))
    blocks.append(_list_tasks(models, tasks))
    blocks += list_published(models)
    blocks += _list_missing(models)
    return Section("Evaluation", blocks + _draw_curves(run))


def _draw_curves(run: RunFolder) -> list[Block]:
    """Return a drawing of the average over a run's checkpoints, and one for each group or, without an average, task."""
    colours = choose_colours(run.labels, reference=NO_FILTER)
    counts_samples = all(point["samples"] is not None for points in run.curves.values() for point in points)
    found = _collect_curves(run, "samples" if counts_samples else "step")
    if not found:
        return []
    width = WIDTH if len(found) == 1 else HALF_WIDTH
    x_label = "samples seen" if counts_samples else "steps"
    draw, panels = partial(draw_lines, width=width, smoothed=False, marked=True), []
    for name, curves in found.items():
        lines = [Line(colours[label], points, is_dashed=is_network(label)) for label, points in curves.items()]
        panels.append(Panel(GROUPS.get(name, name), draw(lines, x_label=x_label, y_label="per cent")))
    return [
        Figure(
            caption="Zero-shot results of the checkpoints that a run kept: the average and each group's mean, over the "
            "tasks that were evaluated.",
            source=f"{CURVES}/*/{EVAL_CURVE}",
            panels=panels,
            num_columns=1 if len(found) == 1 else 2,
            legend=[(colours[label], label) for label in run.curves],
        )
    ]


def _collect_curves(run: RunFolder, place: str) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Return what is drawn -> label -> points (place, per cent)."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for label, points in run.curves.items():
        for point in points:
            average = point["average"]
            means = {average["label"].capitalize(): average["value"], **point["groups"]}
            for name, value in (means if average["num_tasks"] else point["tasks"]).items():
                if value is not None:
                    found.setdefault(name, {}).setdefault(label, []).append((point[place], 100 * value))
    return found


def _find_value(facts: Facts, key: str) -> float | None:
    value: float | None = facts["tasks"].get(key, {}).get("value")
    return value


def _find_interval(facts: Facts, key: str) -> Sequence[float] | None:
    interval: Sequence[float] | None = facts.get("intervals", {}).get("compat", {}).get("tasks", {}).get(key)
    return interval


def _draw_tasks(models: Models, tasks: Facts, keys: Sequence[str], colours: Mapping[str, str]) -> Figure:
    rows = [
        Score(
            tasks[key]["name"],
            {name: _find_value(f, key) for name, f in models.items()},
            tasks[key]["random_baseline"],
            {name: found for name, f in models.items() if (found := _find_interval(f, key))},
        )
        for key in keys
    ]
    lines = " The thin line is the 95 % interval over the images." if any(row.intervals for row in rows) else ""
    return Figure(
        caption=f"Main metric of each task by model, in per cent. The vertical mark is what guessing scores.{lines}",
        source=f"{EVALS}/*/manifest.json",
        panels=[Panel("", draw_scores(rows, colours))],
        legend=[(colours[name], name) for name in models],
    )


def _list_tasks(models: Models, tasks: Facts) -> Table:
    rows = [row for key, task in tasks.items() for row in _describe_columns(models, key, task)]
    starts = [len(rows)]
    groups = dict.fromkeys(group for facts in models.values() for group in facts["groups"])
    rows += [row for group in groups if (row := _describe_group(models, group))]
    starts.append(len(rows))
    rows += _describe_averages(models)
    rows += _describe_corrected(models)
    return Table(
        caption="Zero-shot results in per cent"
        + (", the best model trained on a subset in bold" if len(models) > 1 else "")
        + ". Below the tasks: means of DataComp's groups and the average of its counted tasks, as far as they were "
        "evaluated.",
        source=f"{EVALS}/*/manifest.json",
        columns=("Task", "Metric", "Images", "Random", *models),
        rows=rows,
        left=(0, 1),
        starts=starts,
        notes=_explain(models),
    )


def _describe_columns(models: Models, key: str, task: Facts) -> list[list[str | Cell]]:
    """Return the task's line, and one with its corrected values if a model has another there."""
    corrected = {name: facts["tasks"].get(key, {}).get(CORRECTED) for name, facts in models.items()}
    marks = _mark_incomplete(models, key)
    rows = [_describe_task(models, key, task)]
    if any(
        CORRECTED in facts["tasks"].get(key, {}) and corrected[name] != _find_value(facts, key)
        for name, facts in models.items()
    ):
        rows.append([Cell(text=task["name"], note=" (corrected)"), "", "", "", *_mark_best(corrected, marks)])
    return rows


def _mark_incomplete(models: Models, key: str) -> dict[str, str]:
    return {name: DAGGER if f["tasks"].get(key, {}).get("incomplete") else "" for name, f in models.items()}


def _mark_means(means: Mapping[str, Facts]) -> dict[str, str]:
    return {name: DAGGER if of.get("num_incomplete") else "" for name, of in means.items()}


def _describe_task(models: Models, key: str, task: Facts) -> list[str | Cell]:
    found = {name: facts["tasks"].get(key, {}) for name, facts in models.items()}
    values = {name: of.get("value") for name, of in found.items()}
    images = next((of["images"] for of in found.values() if of.get("images") is not None), None)
    counted = "" if task["counted"] else " (not counted)"
    return [
        Cell(text=task["name"], note=counted),
        Cell(text=task["metric"] or NOTHING, code=True),
        format_count(images),
        format_percent(task["random_baseline"], unit=False),
        *_mark_best(values, _mark_incomplete(models, key)),
    ]


def _mark_best(values: Mapping[str, float | None], notes: Mapping[str, str]) -> list[Cell]:
    """Return the values, the best of those trained on a subset bold if there are two or more."""
    known = [value for name, value in values.items() if value is not None and not is_network(name)]
    best = max(known) if len(known) > 1 else None
    return [
        Cell(
            text=format_percent(value, unit=False),
            strong=value is not None and value == best and not is_network(name),
            note=notes.get(name, ""),
        )
        for name, value in values.items()
    ]


def _describe_group(models: Models, group: str) -> list[str | Cell] | None:
    """Return a line with the group's mean per model, or None when no model has one."""
    found = {name: facts["groups"].get(group, {}) for name, facts in models.items()}
    values = {name: of.get("value") for name, of in found.items()}
    if all(value is None for value in values.values()):
        return None
    sizes = {name: (of.get("num_tasks"), of.get("of")) for name, of in found.items()}
    title = next(str(of["name"]) for of in found.values() if of)
    if len(set(sizes.values())) == 1:
        done, of = next(iter(sizes.values()))
        return [f"{title} (mean of {done} of {of} tasks)", "", "", "", *_mark_best(values, _mark_means(found))]
    notes = {
        name: f"({sizes[name][0]}\u00a0of\u00a0{sizes[name][1]}){mark}" for name, mark in _mark_means(found).items()
    }
    return [f"{title} (mean)", "", "", "", *_mark_best(values, notes)]


def _describe_averages(models: Models) -> list[list[str | Cell]]:
    """Return the average as the facts label it; models evaluated on different tasks get a comparable line besides."""
    averages = {name: facts["average"] for name, facts in models.items()}
    values = {name: average["value"] for name, average in averages.items()}
    labels, marks = {average["label"] for average in averages.values()}, _mark_means(averages)
    if len(labels) == 1:
        label = labels.pop()
        return [[Cell(text=label[:1].upper() + label[1:], strong=True), "", "", "", *_mark_best(values, marks)]]
    notes = {name: f"({average['num_tasks']}){marks[name]}" for name, average in averages.items()}
    cells = [Cell(text=cell.text, note=cell.note) for cell in _mark_best(values, notes)]
    shared = find_shared(models)
    if not shared:
        return [["Averages over different tasks", "", "", "", *cells]]
    means = {name: math.fsum(f["tasks"][key]["value"] for key in shared) / len(shared) for name, f in models.items()}
    title = f"Average over the {count_nouns(len(shared), 'counted task')} that all have"
    lacking = {
        name: DAGGER if any(f["tasks"][key]["incomplete"] for key in shared) else "" for name, f in models.items()
    }
    return [["Averages over different tasks", "", "", "", *cells], [title, "", "", "", *_mark_best(means, lacking)]]


def _describe_corrected(models: Models) -> list[list[str | Cell]]:
    """Return a line with the corrected averages if one differs from DataComp's."""
    averages = {name: facts.get("average_corrected", facts["average"]) for name, facts in models.items()}
    if all(average == models[name]["average"] for name, average in averages.items()):
        return []
    marks = _mark_means(averages)
    notes = {name: f"({average['num_tasks']}){marks[name]}" for name, average in averages.items()}
    values = {name: average["value"] for name, average in averages.items()}
    same = len({average["label"] for average in averages.values()}) == 1
    cells = _mark_best(values, marks) if same else [Cell(text=c.text, note=c.note) for c in _mark_best(values, notes)]
    return [["Corrected average", "", "", "", *cells]]


def find_shared(models: Models) -> list[str]:
    """Return the counted tasks that every model has a value for."""
    first = next(iter(models.values()))
    return [
        key
        for key, task in first["tasks"].items()
        if task["counted"] and all(_find_value(facts, key) is not None for facts in models.values())
    ]


def _explain(models: Models) -> list[str]:
    """Return notes on incomplete tasks, tasks without a result, and averages whose labels differ."""
    notes = _explain_incomplete(models) + _explain_states(models)
    labels = {name: facts["average"]["label"] for name, facts in models.items()}
    if len(set(labels.values())) > 1:
        said = "; ".join(f"{name}: {label}" for name, label in labels.items())
        notes.append(f"Averages over different tasks do not compare. {said}.")
    return notes


def _explain_incomplete(models: Models) -> list[str]:
    """Return one note per set of models, with the tasks that are incomplete for just these."""
    by_task: dict[str, list[str]] = {}
    for name, facts in models.items():
        for task in facts["tasks"].values():
            if task["incomplete"]:
                by_task.setdefault(f"{task['name']} ({_count_images(task)})", []).append(name)
    by_models: dict[tuple[str, ...], list[str]] = {}
    for task, names in by_task.items():
        by_models.setdefault(tuple(names), []).append(task)
    notes = [f"{DAGGER} Incomplete for {', '.join(names)}: {', '.join(tasks)}." for names, tasks in by_models.items()]
    return [*notes, "Means and averages that such a task enters are not those of the whole sets."] if notes else []


def _count_images(task: Facts) -> str:
    expected = task.get("images_expected")
    of = "" if expected is None else f" of {format_count(expected)}"
    return f"{format_count(task['images'])}{of} images"


def _explain_states(models: Models) -> list[str]:
    """Return one note per reason why tasks have no result, with the tasks and, unless it is all, the models."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for name, facts in models.items():
        for task in facts["tasks"].values():
            if task["status"] != "done":
                reason = (task["status"], task.get("message") or "")
                found.setdefault(reason, {}).setdefault(task["name"], []).append(name)
    notes = []
    for (status, message), tasks in found.items():
        named = [
            task + ("" if len(names) == len(models) else f" ({', '.join(names)})") for task, names in tasks.items()
        ]
        notes.append(f"{status[:1].upper()}{status[1:]}: {', '.join(named)}. {message}".rstrip())
    return notes


def _list_missing(models: Models) -> list[Block]:
    """Return folded lists of the tasks without data and of those not asked for."""
    blocks: list[Block] = []
    for field, what in (("missing", "without data"), ("not_asked", "not asked for")):
        by_keys: dict[tuple[str, ...], list[str]] = {}
        for name, facts in models.items():
            if facts.get(field):
                by_keys.setdefault(tuple(facts[field]), []).append(name)
        for keys, names in by_keys.items():
            whom = "" if len(names) == len(models) else f" ({', '.join(names)})"
            blocks.append(Fold(f"{count_nouns(len(keys), 'task')} {what}{whom}", ", ".join(keys)))
    return blocks
