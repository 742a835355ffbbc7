"""The checkpoints of a run, evaluated together -> a curve over steps: a line of curve.jsonl each, and a table.

OUT/step-00000500/   results of one checkpoint, as `winnow eval` writes them
OUT/curve.jsonl      {"step", "samples", "average", "average_corrected", "interval", "groups", "tasks", "incomplete",
                     "failed"} or {"step", "samples", "error"}: values in [0, 1], tasks by key as DataComp computes them
OUT/manifest.json    written last; its parents are the evaluations of the checkpoints
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from eval38.checkpoints import Checkpoint, find_checkpoints
from eval38.config import EvalConfig
from eval38.evaluate import evaluate_models
from eval38.table import align, format_interval, format_share
from pipeline.config import as_mapping
from pipeline.errors import ConfigError, EvalError, StageError, WinnowError
from pipeline.lock import hold_lock
from pipeline.manifest import Manifest, read_manifest, write_manifest
from pipeline.schemas import EVAL_CURVE
from pipeline.storage import join, write_bytes
from training.world import is_first

STAGE = "eval curve"
STEP_FOLDER = "step-{:08d}"
MAX_TASK_COLUMNS = 6
"""A table with more tasks shows the means of the groups instead."""

Point = dict[str, Any]
"""One line of the curve."""


def evaluate_checkpoints(config: EvalConfig, *, run: str, data: str, out: str, **places: Any) -> list[Point]:
    """Evaluate every kept checkpoint of a run and return the curve, written to `out` before the manifest.

    `run` is as find_checkpoints takes it; `places` goes to evaluate_models.  What is done stays.
    Raises EvalError when no checkpoint could be evaluated or `out` holds something else, ConfigError when that is the
    curve of another run, StageError while another driver works there, ModelError for a run without checkpoints.
    """
    before = read_manifest(out)
    if before and before.stage != STAGE:
        raise EvalError(f"{out!r} holds the output of {before.stage!r}: name another --out for a curve.")
    found = {join(out, STEP_FOLDER.format(one.step)): one for one in find_checkpoints(run)}
    models = {folder: one.model for folder, one in found.items()}
    with hold_lock(out, STAGE) if is_first() else nullcontext():
        made = evaluate_models(config, models, data=data, **places)
        return _write_curve(config, out, found, made)


def _write_curve(
    config: EvalConfig, out: str, found: Mapping[str, Checkpoint], made: Mapping[str, Manifest | WinnowError]
) -> list[Point]:
    for one in made.values():
        if isinstance(one, ConfigError | StageError):  # of the folder, not of the checkpoint
            raise one
    points = [describe_point(one, made[folder]) for folder, one in found.items()]
    whole = {str(found[folder].step): one.identity for folder, one in made.items() if isinstance(one, Manifest)}
    if not whole:
        raise EvalError("no checkpoint could be evaluated:\n" + "\n".join(map(str, made.values())))
    if is_first():
        write_bytes(join(out, EVAL_CURVE), "".join(json.dumps(p, allow_nan=False) + "\n" for p in points).encode())
        manifest = Manifest(stage=STAGE, config=as_mapping(config), parents=whole)
        if read_manifest(out) != manifest:
            write_manifest(out, manifest)
    return points


def describe_point(one: Checkpoint, made: Manifest | WinnowError) -> Point:
    """Return a checkpoint's line."""
    place: Point = {"step": one.step, "samples": one.samples}
    if isinstance(made, WinnowError):
        return {**place, "error": str(made)}
    facts = made.facts
    return {
        **place,
        "average": facts["average"],
        "average_corrected": facts["average_corrected"],
        "interval": facts["intervals"]["compat"]["average"],
        "groups": {key: group["value"] for key, group in facts["groups"].items() if group["value"] is not None},
        "tasks": {key: task["value"] for key, task in facts["tasks"].items()},
        "incomplete": [key for key, task in facts["tasks"].items() if task["incomplete"]],
        "failed": {key: task["message"] for key, task in facts["tasks"].items() if task["status"] == "failed"},
    }


def format_curve(points: Sequence[Point]) -> str:
    """Return the curve as a table: a row per checkpoint, in per cent; errors below."""
    done = [point for point in points if "error" not in point]
    what = "tasks" if max(len(point["tasks"]) for point in done) <= MAX_TASK_COLUMNS else "groups"
    names = list(dict.fromkeys(name for point in done for name in point[what]))
    rows = [["step", "samples", "average %", "95 % interval", "corrected %", *names]]
    rows += [[*_describe_place(point), *_describe_values(point, what, names)] for point in points]
    labels = dict.fromkeys(point["average"]["label"] for point in done)
    notes = [f"The average is a {label}." for label in labels if label.startswith("partial")]
    if incomplete := dict.fromkeys(key for point in done for key in point["incomplete"]):
        notes.append(f"Not every image was evaluated of {', '.join(incomplete)}.")
    notes += [f"step {point['step']:,} failed: {point['error']}" for point in points if "error" in point]
    return "\n".join([*align(rows, left=()), *([""] if notes else []), *notes]) + "\n"


def _describe_place(point: Point) -> list[str]:
    return [f"{point['step']:,}", "-" if point["samples"] is None else f"{point['samples']:,}"]


def _describe_values(point: Point, what: str, names: Sequence[str]) -> list[str]:
    if "error" in point:
        return ["failed", "", "", *("" for _ in names)]
    values: Mapping[str, float | None] = point[what]
    average, corrected = point["average"]["value"], point["average_corrected"]["value"]
    shares = [format_share(values.get(name)) for name in names]
    return [format_share(average), format_interval(point["interval"]), format_share(corrected), *shares]
