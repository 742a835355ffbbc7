"""The section about training runs: curves over samples seen, what each run was, and for one run alone its choices."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from pipeline.manifest import add_counts
from pipeline.report.blocks import Absent, Block, Cell, Figure, Note, Panel, Section, Table
from pipeline.report.charts import HALF_WIDTH, WIDTH, Line, choose_colours, draw_lines
from pipeline.report.formats import NOTHING, format_count, format_decimal, format_tally
from pipeline.report.read import NETWORKS, NO_FILTER, RUNS, RunFolder, TrainedRun, is_network
from pipeline.schemas import MANIFEST, METRICS, ZEROSHOT

CURVES = {
    "learning_rate": "Learning rate",
    "logit_scale": "Logit scale",
    "grad_norm": "Gradient norm, before clipping",
    "samples_per_s": "Samples a second",
    "data_wait": "Share of the time spent waiting for data",
    "mfu": "Share of the GPU's bf16 peak used by the model (MFU)",
}
"""Fields of metrics.jsonl that are drawn small, and their titles."""
NOISY = ("grad_norm", "samples_per_s", "data_wait", "mfu")
"""Those drawn with a running mean."""
Points = list[tuple[float, float]]


def build_training(run: RunFolder) -> Section:
    """Return the curves of all runs, a drawing for each quantity, and what each run was."""
    if not run.runs:
        return Section("Training", [Absent("The run folder holds no training run.")])
    colours = choose_colours(run.labels, reference=NO_FILTER)
    blocks: list[Block] = [
        *_draw_loss(run, colours),
        *_draw_zeroshot(run, colours),
        *_draw_small(run, colours),
        _list_runs(run),
    ]
    return Section("Training", blocks)


def _name_sources(run: RunFolder, *files: str) -> str:
    folders = [""] if run.is_lone_run else [f"{RUNS}/*/", f"{NETWORKS}/*/"]
    return ", ".join(folder + file for file in files for folder in folders)


def _tell_dashed(runs: Sequence[TrainedRun]) -> str:
    return "; filter networks dashed." if any(is_network(r.label) for r in runs) else "."


def _draw_loss(run: RunFolder, colours: Mapping[str, str]) -> list[Block]:
    drawn = {r.label: r for r in run.runs if _read_points(r.metrics, "loss")}
    if not drawn:
        return []
    lines = _make_lines({label: _read_points(r.metrics, "loss") for label, r in drawn.items()}, colours)
    return [
        Figure(
            caption="Training loss against samples seen: faint as logged, strong as the running mean over 5 % of the "
            "logged steps" + _tell_dashed(list(drawn.values())),
            source=_name_sources(run, METRICS),
            panels=[Panel("", draw_lines(lines, x_label="samples seen", y_label="contrastive loss, nats"))],
            legend=_list_legend(drawn, colours),
        )
    ]


def _draw_zeroshot(run: RunFolder, colours: Mapping[str, str]) -> list[Block]:
    """Return one drawing for each task that any run was measured on while it trained."""
    drawn = {r.label: r for r in run.runs if r.points}
    tasks = list(dict.fromkeys(task for r in drawn.values() for point in r.points for task in point["tasks"]))
    width = WIDTH if len(tasks) == 1 else HALF_WIDTH
    draw, panels = partial(draw_lines, width=width, smoothed=False, marked=True), []
    for task in tasks:
        found = {label: _read_task(r, task) for label, r in drawn.items()}
        lines = _make_lines({label: points for label, points in found.items() if points}, colours)
        if lines:
            panels.append(Panel(task, draw(lines, x_label="samples seen", y_label="main metric, %")))
    if not panels:
        return []
    return [
        Figure(
            caption="Zero-shot results while training, with the weights of that moment"
            + _tell_dashed([*drawn.values()]),
            source=_name_sources(run, ZEROSHOT),
            panels=panels,
            num_columns=1 if len(tasks) == 1 else 2,
            legend=_list_legend(drawn, colours),
        )
    ]


def _read_task(run: TrainedRun, task: str) -> Points:
    known = [(point["samples"], point["tasks"].get(task)) for point in run.points]
    return [(samples, 100 * value) for samples, value in known if value is not None]


def _draw_small(run: RunFolder, colours: Mapping[str, str]) -> list[Block]:
    panels = []
    drawn: dict[str, TrainedRun] = {}
    for field, title in CURVES.items():
        found = {r.label: _read_points(r.metrics, field) for r in run.runs}
        found = {label: points for label, points in found.items() if points}
        drawn |= {r.label: r for r in run.runs if r.label in found}
        if found:
            scaled, unit = _scale_small(found)
            lines = _make_lines(scaled, colours)
            drawing = draw_lines(lines, x_label="samples seen", y_label=unit, width=HALF_WIDTH, smoothed=field in NOISY)
            panels.append(Panel(title, drawing))
    if not panels:
        return []
    return [
        Figure(
            caption="How training went, as logged; where values are noisy faint and strong as above"
            + _tell_dashed(list(drawn.values())),
            source=_name_sources(run, METRICS),
            panels=panels,
            num_columns=2,
            legend=_list_legend(drawn, colours),
        )
    ]


def _scale_small(found: Mapping[str, Points]) -> tuple[dict[str, Points], str]:
    """Return the curves in a unit in which their numbers are short, and that unit; '' where they are so already."""
    highest = max(abs(y) for points in found.values() for _, y in points)
    if highest == 0 or highest >= 0.01:
        return dict(found), ""
    exponent = math.floor(math.log10(highest))
    scaled = {label: [(x, y / 10**exponent) for x, y in points] for label, points in found.items()}
    return scaled, f"times 1e{exponent}"


def _make_lines(found: Mapping[str, Points], colours: Mapping[str, str]) -> list[Line]:
    return [Line(colours[label], points, is_dashed=is_network(label)) for label, points in found.items()]


def _list_legend(labels: Mapping[str, Any], colours: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(colours[label], label) for label in labels] if len(labels) > 1 else []


def _read_points(lines: Sequence[Mapping[str, Any]], field: str) -> Points:
    return [(line["samples"], line[field]) for line in lines if "samples" in line and line.get(field) is not None]


def _list_runs(run: RunFolder) -> Table:
    unfinished = [r.label for r in run.runs if r.manifest is None]
    notes = [f"Not finished: {', '.join(unfinished)}; their last logged values are given."] if unfinished else []
    notes += [note for r in run.runs if (note := _tell_failed(r))]
    return Table(
        caption="Training runs. Final loss is the mean over the last tenth of the steps; samples per second is the "
        "median over the logged steps.",
        source=_name_sources(run, MANIFEST, METRICS),
        columns=("Run", "Model", "Parameters", "Batch", "Samples seen", "Distinct rows", "Epochs", "Loss", "Samples/s"),
        rows=[_describe_run(r) for r in run.runs],
        left=(0, 1),
        notes=notes,
    )


def _tell_failed(run: TrainedRun) -> str:
    """Return which rows a run could not use, '' when it used all."""
    if run.manifest is None:
        return ""
    rows = add_counts(run.manifest.counts.values())
    if not rows.failed:
        return ""
    return f"{run.label}: of {format_count(rows.read)} rows these could not be used: {format_tally(rows.failed)}."


def _describe_run(run: TrainedRun) -> list[str | Cell]:
    facts: Mapping[str, Any] = run.manifest.facts if run.manifest else {}
    config: Mapping[str, Any] = run.manifest.config if run.manifest else {}
    last: Mapping[str, Any] = run.metrics[-1] if run.metrics else {}
    rates = [m["samples_per_s"] for m in run.metrics if m.get("samples_per_s")]
    return [
        run.label,
        str(config.get("model", NOTHING)),
        format_count(facts.get("num_parameters")),
        format_count(config.get("batch_size")),
        format_count(facts.get("samples_seen", last.get("samples"))),
        format_count(facts.get("distinct_rows")),
        format_decimal(facts.get("mean_epochs"), 1),
        format_decimal(facts.get("final_loss", last.get("loss")), 3),
        format_decimal(statistics.median(rates), 0) if rates else NOTHING,
    ]


def build_choices(run: TrainedRun) -> Section:
    """Return all that decides the weights of one run."""
    if run.manifest is None:
        return Section("Choices", [Absent(f"The run is not finished: there is no {MANIFEST}.")])
    values = {**run.manifest.config, **{f"made from: {name}": of for name, of in run.manifest.parents.items()}}
    return Section(
        "Choices",
        [
            Note(f"Identity: {run.manifest.identity}."),
            Table(
                caption="What decides the weights; fields that are not there have their defaults.",
                source=MANIFEST,
                columns=("Field", "Value"),
                rows=[
                    [name, Cell(text=value if isinstance(value, str) else json.dumps(value), code=True)]
                    for name, value in values.items()
                ],
                left=(0, 1),
            ),
        ],
    )
