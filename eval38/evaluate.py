"""One model x the tasks whose data is there -> eval_results.jsonl and its manifest, resumable by task.

Reads evaluation sets in the hub's layout under one folder; writes each result as soon as it is there, the manifest
last.  Nothing that is written holds a time, a host or a device.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from eval38 import classify, fairness, geographic, retrieve, wilds, winogavil
from eval38.classify import Outcome
from eval38.config import EvalConfig
from eval38.embed import Embedder, Encoder
from eval38.features import FeatureCache, describe_transform
from eval38.intervals import keep_with_outcomes, measure_intervals
from eval38.outcomes import write_outcomes
from eval38.results import (
    Column,
    ModelIdentity,
    Row,
    build_provenance,
    build_row,
    count_images,
    identify_model,
    read_results,
    select_current,
    value_of,
    write_results,
)
from eval38.rows import EvalSet, has_data, read_set
from eval38.summary import summarize
from eval38.tasks import TASKS, Kind, Task, find_task, folder_of, own_task
from pipeline.clip_model import open_model, pick_device
from pipeline.config import as_mapping
from pipeline.errors import EvalError, PoolError
from pipeline.manifest import Manifest, hash_json, read_manifest, write_manifest
from pipeline.storage import join, sweep_temporaries

log = logging.getLogger("winnow")

BROKEN = (EvalError, PoolError, OSError)
"""What a set that contradicts itself, or cannot be read, raises."""


class Evaluator(NamedTuple):
    """How tasks of one kind are evaluated."""

    read_set: Callable[[Task, str], EvalSet]
    """(task, data folder) -> the set, checked.  Raises EvalError."""
    list_prompts: Callable[[EvalSet], Iterable[str]]
    """The prompts that are known before the images are read; all tasks' are encoded together."""
    evaluate: Callable[[EvalSet, Embedder], Outcome]
    """Raises EvalError for data that contradict themselves."""


EVALUATORS: dict[Kind, Evaluator] = {
    "classify": Evaluator(read_set, classify.list_prompts, classify.evaluate),
    "wilds": Evaluator(read_set, classify.list_prompts, wilds.evaluate),
    "geographic": Evaluator(read_set, classify.list_prompts, geographic.evaluate),
    "fairness": Evaluator(fairness.read_faces, fairness.list_prompts, fairness.evaluate),
    "retrieve": Evaluator(retrieve.read_captioned, lambda _: (), retrieve.evaluate),
    "winogavil": Evaluator(winogavil.read_game, winogavil.list_prompts, winogavil.evaluate),
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What is there to be evaluated, and what is not."""

    asked: tuple[Task, ...]
    """In the task list's order, then own sets."""
    without_data: tuple[Task, ...]
    """Tasks of the list whose folder is not there."""
    sets: Mapping[str, EvalSet]
    """By key: sets that agree with their table row."""
    broken: Mapping[str, str]
    """By key: why a set cannot be evaluated."""


def evaluate(
    config: EvalConfig,
    *,
    model: str,
    data: str,
    out: str,
    parents: Mapping[str, str] | None = None,
    features: str | None = None,
    device: str = "auto",
    quiet: bool = False,
) -> Manifest:
    """Evaluate `model` on the sets under `data`; return the manifest, written to `out` after the results.

    `features`: a folder where images' vectors are kept and found again (features.py).

    A task whose result in `out` has the same provenance is not evaluated again.  A broken set is recorded as failed,
    with its message, and the others go on.  `parents` names further artifacts this one comes from.
    Raises EvalError when a named task has no data, or no task could be evaluated; ModelError for the model.
    """
    plan = plan_tasks(config, data)
    device = pick_device(device)
    identity, opened = identify_model(model, device=device)
    wanted = {
        key: build_provenance(key, identity, data_hash=found.data_hash, precision=config.precision)
        for key, found in plan.sets.items()
    }
    sweep_temporaries(out)
    rows = keep_with_outcomes(out, select_current(read_results(out), wanted, without=plan.broken))
    broken = dict(plan.broken)
    todo = [found for key, found in plan.sets.items() if key not in rows]
    if todo:
        encoder = Encoder(opened or open_model(model, device=device), device=device, precision=config.precision)
        cache = FeatureCache(features, describe_encoder(encoder, identity)) if features else None
        embedder = Embedder(encoder, batch_size=config.batch_size, quiet=quiet, features=cache)
        _evaluate_sets(todo, embedder, wanted=wanted, rows=rows, broken=broken, out=out)
    if rows != read_results(out):
        write_results(out, rows.values())
    done = {task.key: rows[task.key] for task in plan.asked if task.key in rows}
    _check_any_done(plan, done, broken)
    manifest = Manifest(
        stage="eval",
        config={**as_mapping(config), "model": identity.name},
        parents={
            **(parents or {}),
            "model": identity.sha256,
            "data": hash_json({key: found.data_hash for key, found in plan.sets.items()}),
        },
        counts={key: count_images(row) for key, row in done.items()},
        facts={
            **summarize(plan.asked, done, broken, without_data=plan.without_data),
            "intervals": measure_intervals(out, done),
        },
    )
    if read_manifest(out) != manifest:
        write_manifest(out, manifest)
    return manifest


def _evaluate_sets(
    todo: Sequence[EvalSet],
    embedder: Embedder,
    *,
    wanted: Mapping[str, Mapping[str, Any]],
    rows: dict[str, Row],
    broken: dict[str, str],
    out: str,
) -> None:
    """Add a line to `rows` or a message to `broken` for each set, and write the results after each."""
    embedder.embed_texts([prompt for found in todo for prompt in EVALUATORS[found.task.kind].list_prompts(found)])
    for found in todo:
        key = found.task.key
        try:
            outcome = EVALUATORS[found.task.kind].evaluate(found, embedder)
        except BROKEN as error:
            broken[key] = str(error)
            log.error("eval: %s failed: %s", key, error)
            continue
        rows[key] = record(found.task, outcome, wanted[key], out)
        write_results(out, rows.values())
        if rows[key]["incomplete"]:
            log.warning("eval: %s", describe_incomplete(rows[key]))


def record(task: Task, outcome: Outcome, provenance: Mapping[str, Any], out: str) -> Row:
    """Write what the model made of each image, and return the line of the task."""
    row = build_row(task, outcome, provenance)
    columns: dict[Column, Mapping[str, Tensor] | None] = {
        "compat": outcome.per_image,
        "corrected": outcome.per_image_corrected,
    }
    written = {
        column: write_outcomes(
            out, task, {name: of.numpy() for name, of in images.items()}, value=value_of(row, column), column=column
        )
        for column, images in columns.items()
        if images is not None
    }
    return {**row, "outcomes": written} if written else row


def describe_encoder(encoder: Encoder, identity: ModelIdentity) -> dict[str, str]:
    """Return everything about a model that decides an image's vector."""
    made_by = build_provenance("", identity, data_hash="", precision=encoder.precision)
    deciding = ("model", "model_sha256", "precision", "open_clip", "torch", "pillow")
    return {name: made_by[name] for name in deciding} | {
        "preprocessing": describe_transform(encoder.opened.eval_transform)
    }


def describe_incomplete(row: Row) -> str:
    """Return which images a result is over, and what was lost."""
    lost = "".join(f", {number} {reason}" for reason, number in row["failed"].items())
    expected = "" if row["images_expected"] is None else f" of {row['images_expected']:,}"
    return f"{row['dataset']} is incomplete: {row['images']:,}{expected} images evaluated{lost}"


def plan_tasks(config: EvalConfig, data: str) -> Plan:
    """Return what the config asks for and what `data` holds, every set checked against its table row.

    Raises EvalError when a named task has no data, or no task is named and none has.
    """
    present = {task.key for task in TASKS if has_data(task, data)}
    named = [find_task(key) for key in config.tasks] or [task for task in TASKS if task.key in present]
    own = tuple(own_task(name) for name in config.own)
    for task in (*named, *own):
        if task.key not in present and not has_data(task, data):
            raise EvalError(f"task {task.key!r} has no data: there is no folder {join(data, folder_of(task))}.")
    asked = (*(task for task in TASKS if task in named), *own)
    if not asked:
        raise EvalError(
            f"{data} holds no evaluation set: looked for {folder_of(TASKS[0])} and {len(TASKS) - 1} others."
        )
    sets: dict[str, EvalSet] = {}
    broken: dict[str, str] = {}
    for task in asked:
        try:
            sets[task.key] = EVALUATORS[task.kind].read_set(task, data)
        except BROKEN as error:
            broken[task.key] = str(error)
            log.error("eval: %s failed: %s", task.key, error)
    return Plan(asked, tuple(task for task in TASKS if task.key not in present), sets, broken)


def _check_any_done(plan: Plan, done: Mapping[str, Row], broken: Mapping[str, str]) -> None:
    if not done:
        reasons = [f"{task.key}: {broken[task.key]}" for task in plan.asked]
        raise EvalError("no task could be evaluated:\n" + "\n".join(reasons))
