"""A run folder -> its artifacts, read but not judged.  Whatever is not there is None or empty; nothing is required."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import fsspec

from pipeline.config import read_config
from pipeline.errors import StageError
from pipeline.manifest import Manifest, read_manifest
from pipeline.schemas import EVAL_CURVE, EVENTS, METRICS, ZEROSHOT
from pipeline.select import Step
from pipeline.storage import exists, join, list_folder, name_of, read_bytes
from pipeline.subset import SUBSET_SUFFIX

RECIPE = "recipe.json"
SCORES, SUBSETS, SHARDS = "scores", "subsets", "shards"
NETWORKS, RUNS, EVALS, CURVES = "networks", "runs", "eval", "curves"
NETWORK_PREFIX = "network-"
"""Filter networks are evaluated under this and their name."""
NETWORK_LABEL = "network "
TRAIN_STAGE = "train"
"""What the manifest of a training run says it is."""
HERE = "."
"""The folder of a training run that is reported on alone."""
NO_FILTER = "none"
"""The subset that keeps the whole pool: what the others are compared with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subset:
    """What a subset's steps kept."""

    name: str
    manifest: Manifest
    url: str | None
    """The .npy of its uids; None when it is not there."""
    steps: tuple[Step, ...]

    @property
    def num_rows(self) -> int:
        """Rows kept."""
        return int(self.manifest.facts["rows"])

    @property
    def num_copies(self) -> int:
        """Rows kept, each as often as the subset wants it: what the shards are to hold."""
        facts = self.manifest.facts
        return self.num_rows + int(facts["copies"]) - int(facts["uids"]) if "copies" in facts else self.num_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedRun:
    """One training run, finished or not."""

    label: str
    """The run's name; `network NAME` for a filter network."""
    folder: str
    """Where it is, within the run folder."""
    manifest: Manifest | None
    """None while it is not finished."""
    metrics: tuple[Mapping[str, Any], ...]
    """The lines of metrics.jsonl."""
    points: tuple[Mapping[str, Any], ...]
    """The lines of zeroshot.jsonl."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFolder:
    """Everything a run folder holds."""

    url: str
    recipe: Mapping[str, Any]
    scores: Manifest | None
    subsets: tuple[Subset, ...]
    """In the recipe's order, then by name."""
    shards: Mapping[str, Manifest]
    runs: tuple[TrainedRun, ...]
    """Filter networks last."""
    evals: Mapping[str, Manifest]
    """By label; filter networks last."""
    curves: Mapping[str, Sequence[Mapping[str, Any]]]
    """By label: the checkpoints of a run evaluated together, the lines of curve.jsonl without those that failed."""
    events: tuple[Mapping[str, Any], ...]

    @property
    def is_lone_run(self) -> bool:
        """Whether the folder is that of one training run, and not of a recipe's."""
        return [run.folder for run in self.runs] == [HERE]

    @property
    def labels(self) -> list[str]:
        """Names of subsets, runs and models in the page's order; each has one colour everywhere."""
        return list(
            dict.fromkeys([*(s.name for s in self.subsets), *(r.label for r in self.runs), *self.evals, *self.curves])
        )


def read_run(url: str) -> RunFolder:
    """Return what a run folder holds.

    Raises StageError when it holds nothing to report on, or a file in it is not what its name says.
    """
    recipe = _read_json(join(url, RECIPE))
    order = list(recipe.get("subsets", ()))
    run = RunFolder(
        url=url,
        recipe=recipe,
        scores=read_manifest(join(url, SCORES)),
        subsets=tuple(_read_subsets(join(url, SUBSETS), order)),
        shards=_read_manifests(join(url, SHARDS), order),
        runs=(
            *_read_run(url, HERE, name_of(url)),
            *_read_runs(url, RUNS, order),
            *_read_runs(url, NETWORKS, list(recipe.get("networks", ()))),
        ),
        evals=_read_evals(join(url, EVALS), order),
        curves=_read_curves(join(url, CURVES), order),
        events=tuple(_read_lines(join(url, EVENTS))),
    )
    if not (run.recipe or run.scores or run.subsets or run.shards or run.runs or run.evals or run.curves):
        raise StageError(
            f"{url!r} holds nothing to report on: there is no {RECIPE}, {SCORES}, {SUBSETS}, {SHARDS}, {RUNS}, "
            f"{EVALS} or {CURVES} in it. Name the folder that `winnow run --out` made."
        )
    return run


def _read_json(url: str) -> dict[str, Any]:
    if not exists(url):
        return {}
    try:
        content = json.loads(read_bytes(url))
    except ValueError as error:
        raise StageError(f"{url} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise StageError(f"{url} should hold a mapping, not {type(content).__name__}.")
    return content


def _read_lines(url: str) -> list[dict[str, Any]]:
    """Return the JSON lines of a file that may still be written: lines that are not whole are left out."""
    if not exists(url):
        return []
    lines = []
    for line in read_bytes(url).splitlines():
        try:
            content = json.loads(line)
        except ValueError:
            continue
        if isinstance(content, dict):
            lines.append(content)
    return lines


def _sort_names(names: Iterable[str], order: Sequence[str]) -> list[str]:
    places = {name: place for place, name in enumerate(order)}
    return sorted(names, key=lambda name: (places.get(name, len(places)), name))


def _list_folders(url: str, order: Sequence[str]) -> list[str]:
    """Return the names of the folders directly in a folder; [] when it does not exist."""
    filesystem, path = fsspec.core.url_to_fs(url)
    if not filesystem.isdir(path):
        return []
    found = [name_of(e["name"]) for e in filesystem.ls(path, detail=True) if e["type"] == "directory"]
    return _sort_names(found, order)


def _read_subsets(folder: str, order: Sequence[str]) -> list[Subset]:
    suffix = ".json"
    names = [name_of(url).removesuffix(suffix) for url in list_folder(folder) if url.endswith(suffix)]
    return [_read_subset(folder, name) for name in _sort_names(names, order)]


def _read_subset(folder: str, name: str) -> Subset:
    manifest = read_manifest(folder, name=f"{name}.json")
    assert manifest
    url = join(folder, name + SUBSET_SUFFIX)
    steps = [read_config(Step, step, where=f"step of subset {name!r}") for step in manifest.config.get("steps", ())]
    return Subset(name=name, manifest=manifest, url=url if exists(url) else None, steps=tuple(steps))


def _read_manifests(folder: str, order: Sequence[str]) -> dict[str, Manifest]:
    found = {name: read_manifest(join(folder, name)) for name in _list_folders(folder, order)}
    return {name: manifest for name, manifest in found.items() if manifest}


def _read_runs(url: str, kind: str, order: Sequence[str]) -> list[TrainedRun]:
    prefix = "" if kind == RUNS else NETWORK_LABEL
    names = _list_folders(join(url, kind), order)
    return [run for name in names for run in _read_run(url, f"{kind}/{name}", prefix + name)]


def _read_run(url: str, folder: str, label: str) -> list[TrainedRun]:
    """Return the training run in a folder of the run folder; [] when there is none."""
    place = url if folder == HERE else join(url, folder)
    manifest = read_manifest(place)
    metrics, points = (tuple(_read_lines(join(place, name))) for name in (METRICS, ZEROSHOT))
    if not (manifest or metrics) or (manifest and manifest.stage != TRAIN_STAGE):
        return []
    return [TrainedRun(label=label, folder=folder, manifest=manifest, metrics=metrics, points=points)]


def _read_curves(folder: str, order: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    found = {name: _read_lines(join(folder, name, EVAL_CURVE)) for name in _list_folders(folder, order)}
    whole = {name: [point for point in points if "error" not in point] for name, points in found.items()}
    return {_label_model(name): points for name, points in whole.items() if points}


def _read_evals(folder: str, order: Sequence[str]) -> dict[str, Manifest]:
    found = _read_manifests(folder, order)
    names = sorted(found, key=lambda name: name.startswith(NETWORK_PREFIX))
    return {_label_model(name): found[name] for name in names}


def _label_model(name: str) -> str:
    return NETWORK_LABEL + name.removeprefix(NETWORK_PREFIX) if name.startswith(NETWORK_PREFIX) else name


def is_network(label: str) -> bool:
    """Return whether a label names a filter network rather than a run on a subset."""
    return label.startswith(NETWORK_LABEL)
