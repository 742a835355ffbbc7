"""A train block's `zeroshot` and the folder of evaluation sets -> what measures the model while it trains.

The numbers are those of `winnow eval`: its evaluators, its prompts, DataComp's main metrics.  The sets are checked
before training starts; at every point images are read and decoded anew, ahead of the model, so none stay in memory.
"""

import logging
from collections.abc import Mapping
from functools import partial

from eval38.classify import Outcome
from eval38.config import EvalConfig
from eval38.embed import Embedder, Encoder, see_images
from eval38.plan import BROKEN, EVALUATORS
from eval38.rows import EvalSet, has_data
from eval38.tasks import Task, find_task, folder_of, own_task
from pipeline.clip_model import OpenedClip
from pipeline.errors import ConfigError, EvalError, ModelError
from pipeline.storage import join
from training.config import TrainConfig
from training.zeroshot import Measure

log = logging.getLogger("winnow")


def open_zeroshot(config: TrainConfig, data: str | None) -> Measure | None:
    """Return what measures the tasks that a config names, None if it names none; `data` has wds_<task>_test folders.

    Raises ConfigError for an unknown task, one without a main metric, or no `data`; EvalError for a set that is not
    there or contradicts itself.
    """
    if config.zeroshot is None:
        return None
    tasks, own = config.zeroshot.tasks, config.zeroshot.own
    chosen = EvalConfig(tasks=tasks, own=own, precision="bf16" if config.precision == "bf16" else "fp32")
    asked = (*map(find_task, tasks), *map(own_task, own))
    if unmeasured := [task.key for task in asked if task.metric is None]:
        raise ConfigError(f"zeroshot task {unmeasured[0]!r} has no main metric to follow: leave it out.")
    if data is None:
        raise ConfigError(
            f"zeroshot measures {[*tasks, *own]} while training: say where the sets are with --eval-data, or leave it "
            "out with train.zeroshot=null."
        )
    return partial(measure_tasks, {task.key: _open_set(task, data) for task in asked}, chosen)


def _open_set(task: Task, data: str) -> EvalSet:
    if not has_data(task, data):
        raise EvalError(
            f"zeroshot: task {task.key!r} has no data: there is no folder {join(data, folder_of(task))}. Fetch it with "
            "`winnow eval download`, or leave the task out."
        )
    try:
        return EVALUATORS[task.kind].read_set(task, data)
    except BROKEN as error:
        raise EvalError(f"zeroshot: task {task.key!r} cannot be evaluated: {error}") from None


def measure_tasks(sets: Mapping[str, EvalSet], chosen: EvalConfig, opened: OpenedClip) -> dict[str, float | None]:
    """Return the main metric of each set; one that cannot be measured is logged and has None: training goes on."""
    device = str(next(opened.model.parameters()).device)
    embedder = Embedder(Encoder(opened, device=device, precision=chosen.precision), quiet=True)
    values: dict[str, float | None] = {}
    for key, found in sets.items():
        try:
            outcome = _measure_set(found, chosen, embedder)
        except (*BROKEN, ModelError) as error:
            log.error("zeroshot: %s failed: %s", key, error)
            values[key] = None
            continue
        values[key] = outcome.metrics[str(found.task.metric)]
        if outcome.lost:
            log.warning(
                "zeroshot: %s: %d images could not be read: %s", key, len(outcome.lost), outcome.lost[0].message
            )
    return values


def _measure_set(found: EvalSet, chosen: EvalConfig, embedder: Embedder) -> Outcome:
    evaluator = EVALUATORS[found.task.kind]
    rows = evaluator.read_rows(found)
    (seen,) = see_images(rows, [embedder.encoder], batch_size=chosen.batch_size, name=found.task.name, quiet=True)
    if isinstance(seen, ModelError):
        raise seen
    return evaluator.evaluate(found, seen, embedder)
