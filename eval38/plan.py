"""What an evaluation asks for, and what a folder holds -> the sets, checked; and how each kind of task is evaluated."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from eval38 import class_folders, classify, fairness, geographic, retrieve, wilds, winogavil
from eval38.classify import Outcome
from eval38.config import EvalConfig
from eval38.embed import Embedder, Seen
from eval38.rows import EvalSet, ImageRow, LostImage, has_data, read_set
from eval38.tasks import TASKS, Kind, Task, find_task, folder_of, own_task
from pipeline.errors import EvalError, PoolError
from pipeline.storage import join

log = logging.getLogger("winnow")

BROKEN = (EvalError, PoolError, OSError)
"""What a set that contradicts itself, or cannot be read, raises."""


class Evaluator(NamedTuple):
    """How tasks of one kind are evaluated."""

    read_set: Callable[[Task, str], EvalSet]
    """(task, data folder) -> the set, checked.  Raises EvalError."""
    list_prompts: Callable[[EvalSet], Iterable[str]]
    """The prompts that are known before the images are read; all tasks' are encoded together."""
    read_rows: Callable[[EvalSet], Iterable[ImageRow[Any] | LostImage]]
    """The images with what is known of them, in one pass.  Raises EvalError for data that contradict themselves."""
    evaluate: Callable[[EvalSet, Seen[Any], Embedder], Outcome]
    """What a model made of the images -> metrics.  Raises EvalError."""


EVALUATORS: dict[Kind, Evaluator] = {
    "classify": Evaluator(class_folders.read_set, classify.list_prompts, class_folders.read_images, classify.evaluate),
    "wilds": Evaluator(read_set, classify.list_prompts, wilds.read_rows, wilds.evaluate),
    "geographic": Evaluator(read_set, classify.list_prompts, geographic.read_rows, geographic.evaluate),
    "fairness": Evaluator(fairness.read_faces, fairness.list_prompts, fairness.read_rows, fairness.evaluate),
    "retrieve": Evaluator(retrieve.read_captioned, lambda _: (), retrieve.read_rows, retrieve.evaluate),
    "winogavil": Evaluator(winogavil.read_game, winogavil.list_prompts, winogavil.read_candidates, winogavil.evaluate),
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


def plan_tasks(config: EvalConfig, data: str) -> Plan:
    """Return what the config asks for and what `data` holds, every set checked against its table row.

    Raises EvalError when a named task has no data, or no task is named and none has.
    """
    present = {task.key for task in TASKS if has_data(task, data)}
    named = [find_task(key) for key in config.tasks] or [task for task in TASKS if task.key in present]
    own = tuple(own_task(name) for name in config.own)
    for task in (*named, *own):
        if task.key not in present and not has_data(task, data):
            also = f" nor {join(data, task.key)}" if task.group == "own" else ""
            raise EvalError(f"task {task.key!r} has no data: there is no folder {join(data, folder_of(task))}{also}.")
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
