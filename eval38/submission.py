"""Results -> the files of a DataComp leaderboard entry.  Nothing is sent anywhere.

    OUT/<scale>_scale/results.jsonl     DataComp's own keys alone: key, dataset, metrics with main_metric
    OUT/<scale>_scale/checkpoint.pt     if given
    OUT/<scale>_scale/samples/<file>    the subset files, if given

Source: mlfoundations/datacomp at 4a8df19, evaluate.py (push_files_to_hub, and the lines it writes) and
aggregate_scores.py, which takes a file of exactly 38 lines whose main metric is not null.
"""

import json
import math
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from eval38.python_model import is_python_model
from eval38.results import Row, read_results
from eval38.summary import mean
from eval38.tasks import NUM_COUNTED, REPORTED_GROUPS, TASKS
from pipeline.errors import ConfigError, EvalError, check_file_name, check_name
from pipeline.schemas import CHECKPOINT
from pipeline.storage import (
    exists,
    join,
    list_folder,
    name_of,
    open_file,
    sha256_of_file,
    write_atomic,
    write_bytes,
)
from pipeline.subset import open_subset

SCALES = ("small", "medium", "large", "xlarge")
RESULTS_FILE, SAMPLES_FOLDER = "results.jsonl", "samples"


@dataclass(frozen=True, slots=True)
class Submission:
    """What was written."""

    folder: str
    files: tuple[str, ...]
    """Relative to the folder."""
    scores: Mapping[str, float]
    """What aggregate_scores.py prints."""


def write_submission(
    results: str,
    out: str,
    *,
    scale: str,
    checkpoint: str | None = None,
    samples: Sequence[str] = (),
    allow_incomplete: bool = False,
) -> Submission:
    """Write the submission folder of one results folder, the results last.

    Raises EvalError unless all 38 counted tasks have a value, over every image of the set (unless
    `allow_incomplete`), by one model in one number format; ConfigError for a wrong scale or file, a checkpoint that
    is not the model's, or a folder that holds files of another entry.
    """
    check_name(scale, SCALES, kind="scale")
    rows = read_results(results)
    _check_rows(rows, results, allow_incomplete=allow_incomplete)
    folder = join(out, f"{scale}_scale")
    copies = _plan_copies(checkpoint, samples)
    if checkpoint:
        _check_checkpoint(checkpoint, next(rows[task.key] for task in TASKS if task.counted), results)
    _check_alone(folder, {*copies, RESULTS_FILE})
    lines = [json.dumps(_strip(rows[task.key]), allow_nan=False) + "\n" for task in TASKS if task.key in rows]
    for name, source in copies.items():
        with open_file(source) as content, write_atomic(join(folder, name)) as file:
            shutil.copyfileobj(content, file)
    write_bytes(join(folder, RESULTS_FILE), "".join(lines).encode())
    return Submission(folder, (*copies, RESULTS_FILE), aggregate(rows))


def _check_rows(rows: Mapping[str, Row], where: str, *, allow_incomplete: bool) -> None:
    counted = [task for task in TASKS if task.counted]
    without = [task.name for task in counted if _main_metric(rows.get(task.key)) is None]
    if without:
        raise EvalError(
            f"{where} has a value for {NUM_COUNTED - len(without)} of the {NUM_COUNTED} tasks that a submission needs. "
            f"Without: {', '.join(without)}."
        )
    incomplete = [task.name for task in counted if rows[task.key].get("incomplete")]
    if incomplete and not allow_incomplete:
        raise EvalError(f"{where}: not every image was evaluated of {', '.join(incomplete)}. Fetch these sets again.")
    for name in ("model_sha256", "precision"):
        found = {str((rows[task.key].get("provenance") or {}).get(name)) for task in counted}
        if len(found) > 1:
            raise EvalError(f"{where} mixes results of {len(found)} values of {name}: {', '.join(sorted(found))}.")


def _main_metric(row: Row | None) -> float | None:
    value = row["metrics"].get("main_metric") if row else None
    return float(value) if _is_number(value) else None


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def _strip(row: Row) -> dict[str, Any]:
    """Return a line with DataComp's keys alone; a metric that is not a number is null, as JSON has no NaN."""
    metrics = {name: value if _is_number(value) else None for name, value in row["metrics"].items()}
    return {"key": row["key"], "dataset": row["dataset"], "metrics": metrics}


def _plan_copies(checkpoint: str | None, samples: Sequence[str]) -> dict[str, str]:
    """Return name -> source of the files to copy.  Raises ConfigError for one that is not there or no subset."""
    copies = {CHECKPOINT: checkpoint} if checkpoint else {}
    for source in samples:
        name = name_of(source)
        check_file_name(name, kind="samples file")
        if f"{SAMPLES_FOLDER}/{name}" in copies:
            raise ConfigError(f"two samples files are called {name!r}: rename one, DataComp keeps them in one folder.")
        copies[f"{SAMPLES_FOLDER}/{name}"] = source
    for source in copies.values():
        if not exists(source):
            raise ConfigError(f"{source!r} does not exist.")
    for source in samples:
        open_subset(source)
    return copies


def _check_checkpoint(checkpoint: str, row: Row, where: str) -> None:
    """Raise ConfigError for a file that is not the weights of the results, as far as these say which those are.

    DataComp's lines do not; of a model of the user's own Python they have a hash that is no file's.
    """
    made = row.get("provenance") or {}
    wanted = made.get("model_sha256")
    if not wanted or is_python_model(str(made.get("model"))):
        return
    found = sha256_of_file(checkpoint)
    if found != wanted:
        raise ConfigError(
            f"checkpoint {checkpoint!r} (sha256 {found[:12]}) is not the one that {where} is of ({str(wanted)[:12]}): "
            "name that file, or evaluate this one."
        )


def _check_alone(folder: str, names: Collection[str]) -> None:
    """Raise ConfigError for files of another entry, which would be taken for this one's."""
    there = [name_of(url) for url in list_folder(folder)]
    there += [f"{SAMPLES_FOLDER}/{name_of(url)}" for url in list_folder(join(folder, SAMPLES_FOLDER))]
    if others := [name for name in there if name not in names]:
        raise ConfigError(f"{folder} holds {', '.join(others)} of another entry. Delete it, or name another --out.")


def aggregate(rows: Mapping[str, Row]) -> dict[str, float]:
    """Return ImageNet, the three group means and the average, in aggregate_scores.py's words and order."""
    values = {task.key: value for task in TASKS if (value := _main_metric(rows.get(task.key))) is not None}
    scores = {
        name: mean([values[task.key] for task in TASKS if task.group == group and task.key in values])
        for group, name in REPORTED_GROUPS.items()
    }
    scores["Average"] = mean([values[task.key] for task in TASKS if task.counted and task.key in values])
    return {name: value for name, value in scores.items() if value is not None}
