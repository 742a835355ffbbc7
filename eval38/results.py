"""eval_results.jsonl: one line per task in DataComp's form, strict JSON, with what the numbers were made from.

    {"key": ..., "dataset": display name, "metrics": {..., "main_metric": number},          as DataComp writes it
     "corrected": {..., "main_metric": number},                                              ours from here
     "images": N, "images_expected": N or null, "incomplete": bool,
     "failed": {reason: count}, "lost": ["0.tar:s12: reason: message", ...], "provenance": {...},
     "outcomes": {"compat": sha256 of its file (outcomes.py), ...}}

`metrics` are computed as DataComp computes them, mistakes included; `corrected` is there only for a task where there
is one, and holds only what is otherwise (docs/EVAL.md).  DataComp's aggregate_scores.py reads the file.
A line whose provenance is what would be evaluated now is kept; one of the same model that was made otherwise is made
again; one of another model, or of nobody knows which, is never overwritten unasked.
"""

import hashlib
import importlib.metadata
import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from eval38.config import Precision
from eval38.python_model import is_python_model, open_python_model, read_code
from eval38.tasks import TASKS, Task
from pipeline.clip_model import HUB_PREFIX, OpenedClip, fetch_weights, find_clip, open_model, sha256_of_model
from pipeline.errors import ConfigError, EvalError
from pipeline.hub_files import HUB_CONFIG
from pipeline.manifest import Counts
from pipeline.schemas import EVAL_RESULTS, FORMAT_VERSION
from pipeline.storage import exists, join, read_bytes, sha256_of_file, write_bytes

if TYPE_CHECKING:
    from eval38.classify import Outcome

log = logging.getLogger("winnow")

MAX_NAMED = 100
"""Lost images named in a line; all of them are counted."""

Column = Literal["compat", "corrected"]
"""As DataComp computes it, or rightly."""

REVISIONS = {"vtab/clevr_closest_object_distance": 2}
"""Raised when the numbers of a task that stays otherwise the same change; part of its provenance."""
OF_ONE_TASK = ("data_hash", "revision")
"""Entries of the provenance that differ between the tasks of one run."""
OF_THE_MODEL = ("model", "model_sha256")
"""Entries that say which model it was."""
LIBRARIES = {"open_clip": "open_clip_torch", "timm": "timm", "torch": "torch", "pillow": "pillow"}
"""Whose versions stand in the provenance: the entry's name, and the distribution's."""

Row = dict[str, Any]
"""One line of the results file."""


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """What tells a model from another, whatever place its file lies in."""

    name: str
    """Architecture, with its pretrained tag if it has one."""
    sha256: str
    """Of the weights file; for fresh weights, of the weights; for a user's own model, of its module and weights."""
    config_sha256: str | None = None
    """Of the config that comes with a hub id: it decides pixels and tokens, and the hub may change it."""


def identify_model(model: str, *, device: str) -> tuple[ModelIdentity, OpenedClip | None]:
    """Return a model's identity, and the model itself if it had to be opened for that (fresh weights)."""
    if is_python_model(model):
        made = open_python_model(model, device=device)
        return ModelIdentity(model, hash_weights(made, code=read_code(model))), made
    source = find_clip(model)
    has_tag = source.weights is not None and not exists(source.weights)
    name = f"{source.name}/{source.weights}" if has_tag else source.name
    sha256 = sha256_of_model(model)
    if sha256 is not None:
        config = fetch_weights(source, hub_file=HUB_CONFIG) if source.architecture.startswith(HUB_PREFIX) else None
        return ModelIdentity(name, sha256, sha256_of_file(config) if config else None), None
    opened = open_model(model, device=device)
    return ModelIdentity(name, hash_weights(opened)), opened


def hash_weights(opened: OpenedClip, *, code: bytes = b"") -> str:
    """Return the hex sha256 of the code that made a model, if it is known, and of its tensors, by name."""
    import torch

    digest = hashlib.sha256(code)
    for name, tensor in sorted(opened.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())  # numpy has no bfloat16
    return digest.hexdigest()


def build_provenance(key: str, model: ModelIdentity, *, data_hash: str, precision: Precision) -> dict[str, Any]:
    """Return all that decides a task's numbers: model, data, number format, library versions and our revision."""
    revision = {"revision": REVISIONS[key]} if key in REVISIONS else {}
    hub_config = {"model_config": model.config_sha256} if model.config_sha256 else {}
    versions = {name: importlib.metadata.version(distribution) for name, distribution in LIBRARIES.items()}
    return {
        **revision,
        "model": model.name,
        "model_sha256": model.sha256,
        "data_hash": data_hash,
        "precision": precision,
        "winnow_format": FORMAT_VERSION,
        **hub_config,
        **versions,
    }


def build_row(task: Task, outcome: "Outcome", provenance: Mapping[str, Any]) -> Row:
    """Return the line of one evaluated task."""
    main = outcome.metrics[task.metric] if task.metric else None
    corrected: dict[str, Any] = {}
    if outcome.corrected is not None:
        right = outcome.corrected.get(task.metric, main) if task.metric else None
        corrected = {"corrected": {**outcome.corrected, "main_metric": right}}
    failed = Counter(lost.reason for lost in outcome.lost)
    wrong_size = task.images is not None and outcome.num_images != task.images
    return {
        "key": task.key,
        "dataset": task.name,
        "metrics": {**outcome.metrics, "main_metric": main},
        **corrected,
        "images": outcome.num_images,
        "images_expected": task.images,
        "incomplete": bool(outcome.lost) or wrong_size,
        "failed": dict(sorted(failed.items())),
        "lost": [f"{lost.name}: {lost.reason}: {lost.message}" for lost in outcome.lost[:MAX_NAMED]],
        "provenance": dict(provenance),
    }


def value_of(row: Row, column: Column) -> float | None:
    """Return the main metric of a line in one of the two columns; they are the same unless the line corrects it."""
    value: float | None = row["corrected" if column == "corrected" and column in row else "metrics"]["main_metric"]
    return value


def count_images(row: Row) -> Counts:
    """Return where the images of a line went."""
    return Counts(read=row["images"] + sum(row["failed"].values()), kept=row["images"], failed=row["failed"])


def read_results(folder: str) -> dict[str, Row]:
    """Return the lines of the results file in `folder` by key; {} when there is none.

    A line without provenance (DataComp wrote it) is returned too.  Raises EvalError for a line that is no result.
    """
    url = join(folder, EVAL_RESULTS)
    if not exists(url):
        return {}
    rows: dict[str, Row] = {}
    for number, line in enumerate(read_bytes(url).splitlines(), start=1):
        try:
            row = json.loads(line)
            check_line(row)
            if row["key"] in rows:
                raise ValueError(f"a second line of {row['key']}")
            rows[row["key"]] = row
        except ValueError as error:
            raise EvalError(
                f"{url} line {number} is no result ({error}). Move the file away, or name another folder."
            ) from None
    return rows


def check_line(row: Any) -> None:
    """Raise ValueError unless a parsed line has what is read of one, each of its kind."""
    if not isinstance(row, dict):
        raise ValueError("it should be an object with key, dataset and metrics")
    columns = {name: row[name] for name in ("metrics", "corrected") if isinstance(row.get(name), dict)}
    provenance, outcomes = row.get("provenance") or {}, row.get("outcomes") or {}
    right = {
        "key": isinstance(row.get("key"), str),
        "dataset": isinstance(row.get("dataset"), str),
        "metrics": "metrics" in columns,
        "corrected": "corrected" not in row or "corrected" in columns,
        "main_metric": all(isinstance(of.get("main_metric", ""), int | float | None) for of in columns.values()),
        "provenance": isinstance(provenance, dict),
        "data_hash": not isinstance(provenance, dict) or not provenance or isinstance(provenance.get("data_hash"), str),
        "outcomes": isinstance(outcomes, dict) and all(isinstance(sha256, str) for sha256 in outcomes.values()),
    }
    if wrong := [name for name, is_right in right.items() if not is_right]:
        raise ValueError(f"{' and '.join(wrong)} missing or of another kind")


def check_owner(folder: str, rows: Mapping[str, Row], model: ModelIdentity) -> None:
    """Raise ConfigError if `folder` holds lines of another model, or without provenance: they would be lost."""
    url, wanted = join(folder, EVAL_RESULTS), (model.name, model.sha256)
    made = {key: tuple(map((row.get("provenance") or {}).get, OF_THE_MODEL)) for key, row in rows.items()}
    foreign = {key: of for key, of in made.items() if of != wanted}
    if not foreign:
        return
    (key, of), *_ = foreign.items()
    whose = f"by {of[0]} ({str(of[1])[:12]})" if any(of) else "by a model that they do not name"
    raise ConfigError(
        f"{url} holds {len(foreign)} lines that were not made by {model.name} ({model.sha256[:12]}) and would be lost, "
        f"as that of {key}, made {whose}. Name another --out, or move the file away."
    )


def write_results(folder: str, rows: Iterable[Row]) -> None:
    """Write the results file whole and atomically: the task list's order, then own sets by name.

    Raises ValueError for a number that is not finite: JSON has none.
    """
    order = {task.key: number for number, task in enumerate(TASKS)}
    ordered = sorted(rows, key=lambda row: (order.get(row["key"], len(order)), row["key"]))
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in ordered]
    write_bytes(join(folder, EVAL_RESULTS), "".join(lines).encode())


def select_current(found: Mapping[str, Row], wanted: Mapping[str, Mapping[str, Any]]) -> dict[str, Row]:
    """Return the lines that hold for what is wanted now, by key; each other line is logged with what changed.

    `wanted` has the provenance of each task that is asked for and can be read.  A line of another task stays if it was
    made by the same model in the same way; whether its data changed is seen when they are asked for and read.
    """
    same_run = {name: value for p in wanted.values() for name, value in p.items() if name not in OF_ONE_TASK}
    kept = {}
    for key, row in found.items():
        differences = list_changes(row.get("provenance") or {}, wanted.get(key, same_run))
        if differences:
            action = "evaluated again" if key in wanted else "dropped"
            log.warning("eval: %s is %s because %s", key, action, "; ".join(differences))
        else:
            kept[key] = row
            if key in wanted:
                log.info("eval: %s is kept, nothing changed", key)
    return kept


def list_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return one phrase per entry of `new` that `old` has otherwise."""
    return [
        f"{name} changed from {old.get(name, 'absent')} to {value}"
        for name, value in new.items()
        if old.get(name) != value
    ]
