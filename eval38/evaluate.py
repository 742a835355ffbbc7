"""Models x the tasks whose data is there -> for each model eval_results.jsonl and its manifest, resumable by task.

Reads evaluation sets in the hub's layout under one folder; writes each result as soon as it is there, the manifest
last.  Models that shape images alike see a set together, so that its images are read and decoded once.  Nothing that is
written holds a time, a host or a device.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from eval38.classify import Outcome
from eval38.config import EvalConfig
from eval38.embed import Embedder, Encoder, Seen, see_images
from eval38.features import FeatureCache, describe_transform, read_features, write_features
from eval38.intervals import keep_with_outcomes, measure_intervals
from eval38.outcomes import write_outcomes
from eval38.plan import BROKEN, EVALUATORS, Plan, plan_tasks
from eval38.python_model import is_python_model
from eval38.ranks import ask_first, do_in_all, gather, join_ranks
from eval38.results import (
    LIBRARIES,
    Column,
    ModelIdentity,
    Row,
    build_provenance,
    build_row,
    check_owner,
    count_images,
    identify_model,
    read_results,
    select_current,
    value_of,
    write_results,
)
from eval38.rows import EvalSet
from eval38.summary import summarize
from eval38.tasks import Task
from pipeline.clip_model import open_model, pick_device
from pipeline.config import as_mapping
from pipeline.errors import ConfigError, EvalError, ModelError, WinnowError
from pipeline.lock import hold_lock
from pipeline.manifest import Manifest, hash_json, read_manifest, write_manifest
from pipeline.schemas import MANIFEST, OUTCOMES_FOLDER
from pipeline.storage import exists, is_folder, join, remove, sweep_temporaries
from training.world import World, place_rank

log = logging.getLogger("winnow")

STAGE = "eval"
MODELS_AT_ONCE = 8
"""Models held in memory, and seeing a set together."""


@dataclass(slots=True)
class Candidate:
    """One model's evaluation under way."""

    model: str
    out: str
    identity: ModelIdentity
    wanted: Mapping[str, Mapping[str, Any]]
    """Provenance by key of every set."""
    rows: dict[str, Row]
    """Lines that hold, by key."""
    broken: dict[str, str]
    """By key: why a set cannot be evaluated."""
    check_lock: Callable[[], None]
    """Raises StageError if another driver took the folder over."""
    embedder: Embedder | None = None
    """None while there is nothing to do."""
    cache: FeatureCache | None = None
    error: WinnowError | None = None
    """Why this model cannot be evaluated."""

    def lacks(self, key: str) -> bool:
        """Return whether the set is still to be evaluated."""
        return self.error is None and key not in self.rows and key not in self.broken


@dataclass(frozen=True, slots=True)
class Setting:
    """What all models are evaluated with."""

    config: EvalConfig
    plan: Plan
    features: str | None
    parents: Mapping[str, str]
    device: str
    quiet: bool
    replace: bool
    world: World = field(repr=False)


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
    replace: bool = False,
) -> Manifest:
    """Evaluate `model` on the sets under `data`; return the manifest, written to `out` after the results.

    `features`: a folder where images' vectors are kept and found again (features.py).

    A task whose result in `out` has the same provenance is not evaluated again.  A broken set is recorded as failed,
    with its message, and the others go on; a line that it has stays.  `parents` names further artifacts this one comes
    from.  `replace`: `out` is the caller's own, and lines of another model there may go.
    Raises EvalError when a named task has no data, or no task could be evaluated; ModelError for the model; ConfigError
    for another model's lines in `out`, StageError while another driver works there.
    """
    places = {"data": data, "parents": parents, "features": features, "device": device}
    made = evaluate_models(config, {out: model}, quiet=quiet, replace=replace, **places)[out]  # type: ignore[arg-type]
    if isinstance(made, WinnowError):
        raise made
    return made


def evaluate_models(
    config: EvalConfig,
    models: Mapping[str, str],
    *,
    data: str,
    parents: Mapping[str, str] | None = None,
    features: str | None = None,
    device: str = "auto",
    quiet: bool = False,
    replace: bool = False,
    at_once: int = MODELS_AT_ONCE,
) -> dict[str, Manifest | WinnowError]:
    """Evaluate several models as `evaluate` does one; `models` has the model string of each results folder.

    `at_once` models are in memory at a time, and read and decode a set once together.  One that cannot be evaluated has
    its error instead of a manifest.  Under torchrun every process calls it, does its share and gets the same answer.
    Raises EvalError when a named task has no data, ConfigError for a device that is not there or when processes were
    started otherwise.
    """
    with join_ranks() as world:
        world.check_same({"models": dict(models), "choices": config, "data": data, "features": features})
        plan = ask_first(world, lambda: plan_tasks(config, data))
        place = do_in_all(world, lambda: check_device(place_rank(pick_device(device))))
        setting = Setting(config, plan, features, parents or {}, place, quiet, replace, world)
        done: dict[str, Manifest | WinnowError] = {}
        outs = list(models)
        for start in range(0, len(outs), at_once):
            with ExitStack() as locks:
                done |= _evaluate_together(setting, {out: models[out] for out in outs[start : start + at_once]}, locks)
        return done


def check_device(device: str) -> str:
    """Return the device.  Raises ConfigError if it is not torch's, or not there."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ConfigError(f"device {device!r} cannot be used: {reason}. Say auto, cpu or a GPU that is here.") from None
    return device


def _evaluate_together(
    setting: Setting, models: Mapping[str, str], locks: ExitStack
) -> dict[str, Manifest | WinnowError]:
    done: dict[str, Manifest | WinnowError] = {}
    candidates = []
    for out, model in models.items():
        try:
            candidates.append(_begin(setting, model, out, locks))
        except WinnowError as error:
            done[out] = error
        except OSError as error:  # the others go on
            done[out] = ModelError(f"model {model!r}: {error}")
    for found in setting.plan.sets.values():
        _evaluate_set(setting, found, [one for one in candidates if one.lacks(found.task.key)])
    for one in candidates:
        done[one.out] = _finish(setting, one)
    return {out: done[out] for out in models}


def _begin(setting: Setting, model: str, out: str, locks: ExitStack) -> Candidate:
    """Return a model with the lines of its results that hold, opened and its prompts read if there is more to do."""
    config, plan, world = setting.config, setting.plan, setting.world
    identity, opened = do_in_all(world, lambda: identify_model(model, device=setting.device))
    if any(other != identity for other in gather(world, lambda: identity)):
        raise ModelError(f"model {model!r} has other weights in other processes: name a file of weights.")
    wanted = {
        key: build_provenance(key, identity, data_hash=found.data_hash, precision=config.precision)
        for key, found in plan.sets.items()
    }
    check_lock = _lock_folder(setting, out, locks)
    rows = ask_first(world, lambda: _keep_rows(setting, identity, wanted, out))
    one = Candidate(model, out, identity, wanted, rows, dict(plan.broken), check_lock)
    todo = [found for key, found in plan.sets.items() if one.lacks(key)]
    if todo:
        opened = opened or do_in_all(world, lambda: open_model(model, device=setting.device))
        encoder = Encoder(opened, device=setting.device, precision=config.precision)
        one.embedder = Embedder(encoder, quiet=setting.quiet, world=world)
        one.cache = FeatureCache(setting.features, describe_encoder(encoder, identity)) if setting.features else None
        one.embedder.embed_texts(
            [prompt for found in todo for prompt in EVALUATORS[found.task.kind].list_prompts(found)]
        )
    return one


def _lock_folder(setting: Setting, out: str, locks: ExitStack) -> Callable[[], None]:
    """Hold the results folder, in the first process, until `locks` are let go; return the check of the lock."""
    checks: list[Callable[[], None]] = []

    def hold() -> None:
        for url in (out, setting.features):
            if url and exists(url) and not is_folder(url):
                raise EvalError(f"{url!r} is a file: name a folder, which need not be there yet.")
        try:
            checks.append(locks.enter_context(hold_lock(out, STAGE)))
        except OSError as error:
            raise EvalError(f"results cannot be written to {out!r} ({error}): name another --out.") from None

    ask_first(setting.world, hold)
    return checks[0] if checks else lambda: None


def _keep_rows(
    setting: Setting, identity: ModelIdentity, wanted: Mapping[str, Mapping[str, Any]], out: str
) -> dict[str, Row]:
    before = read_manifest(out)
    if before and before.stage != STAGE:
        raise EvalError(f"{out!r} holds the output of {before.stage!r}, which results would overwrite: name another.")
    found = read_results(out)
    if not setting.replace:
        check_owner(out, found, identity)
    for folder in (out, join(out, OUTCOMES_FOLDER)):
        sweep_temporaries(folder)
    kept = keep_with_outcomes(out, select_current(found, wanted))
    for key in sorted(kept.keys() & setting.plan.broken):
        log.warning("eval: %s cannot be read now; its line of before stays, and is not in this evaluation", key)
    return kept


def _evaluate_set(setting: Setting, found: EvalSet, candidates: Sequence[Candidate]) -> None:
    """Add a line, a message or an error to each candidate, and write the results."""
    key, told = found.task.key, set()
    for one, seen in _see_set(setting, found, candidates):
        assert one.embedder
        try:
            if isinstance(seen, Exception):
                raise seen
            outcome = EVALUATORS[found.task.kind].evaluate(found, seen, one.embedder)
        except ModelError as error:
            one.error = error
            continue
        except BROKEN as error:
            one.broken[key] = str(error)
            log.error("eval: %s failed: %s", key, error)
            continue
        one.rows[key] = record(found.task, outcome, one.wanted[key], one.out if setting.world.is_first else None)
        if setting.world.is_first:
            _write_rows(one)
        if one.rows[key]["incomplete"]:
            told.add(describe_incomplete(one.rows[key]))
    for words in sorted(told):
        log.warning("eval: %s", words)


def _see_set(
    setting: Setting, found: EvalSet, candidates: Sequence[Candidate]
) -> list[tuple[Candidate, Seen[Any] | Exception]]:
    """Return what each model makes of the images, from its feature cache or of one pass with those that shape alike."""
    seen: list[tuple[Candidate, Seen[Any] | Exception]] = []
    alike: dict[str, list[Candidate]] = {}
    for one in candidates:
        if one.cache and (kept := ask_first(setting.world, partial(read_features, one.cache, found))):
            seen.append((one, kept))
        elif one.embedder:
            alike.setdefault(describe_geometry(one.model, one.embedder.encoder), []).append(one)
    for group in alike.values():
        fresh = _see_together(setting, found, [one.embedder.encoder for one in group if one.embedder])
        for one, made in zip(group, fresh, strict=True):
            if one.cache and setting.world.is_first and isinstance(made, Seen):
                write_features(one.cache, found, made)
            seen.append((one, made))
    return seen


def _see_together(setting: Setting, found: EvalSet, encoders: Sequence[Encoder]) -> Sequence[Seen[Any] | Exception]:
    task = found.task
    try:
        return see_images(
            EVALUATORS[task.kind].read_rows(found),
            encoders,
            batch_size=setting.config.batch_size,
            name=task.name,
            total=None if task.kind == "winogavil" else task.images,  # its rows are instances, not images
            quiet=setting.quiet,
            world=setting.world,
        )
    except BROKEN as error:
        return [error] * len(encoders)


def _finish(setting: Setting, one: Candidate) -> Manifest | WinnowError:
    """Write the manifest and return it, in every process the first's; or return why there is none."""
    plan, world = setting.plan, setting.world
    done = {task.key: one.rows[task.key] for task in plan.asked if task.key in one.rows.keys() - one.broken.keys()}
    if one.error or not done:
        return one.error or _tell_none_done(plan, one.broken)
    return ask_first(world, lambda: _write_manifest(setting, one, done))


def _write_rows(one: Candidate) -> None:
    one.check_lock()
    remove(join(one.out, MANIFEST))  # it tells of other lines than are there from now on
    write_results(one.out, one.rows.values())


def _write_manifest(setting: Setting, one: Candidate, done: Mapping[str, Row]) -> Manifest:
    plan = setting.plan
    if one.rows != read_results(one.out):
        _write_rows(one)
    manifest = Manifest(
        stage=STAGE,
        config={**as_mapping(setting.config), "model": one.identity.name},
        parents={
            **setting.parents,
            "model": one.identity.sha256,
            **({"model_config": one.identity.config_sha256} if one.identity.config_sha256 else {}),
            "data": hash_json({key: found.data_hash for key, found in plan.sets.items()}),
        },
        counts={key: count_images(row) for key, row in done.items()},
        facts={
            **summarize(plan.asked, done, one.broken, without_data=plan.without_data),
            "intervals": measure_intervals(one.out, done),
        },
    )
    if read_manifest(one.out) != manifest:
        one.check_lock()
        write_manifest(one.out, manifest)
    return manifest


def _tell_none_done(plan: Plan, broken: Mapping[str, str]) -> EvalError:
    reasons = [f"{task.key}: {broken[task.key]}" for task in plan.asked]
    return EvalError("no task could be evaluated:\n" + "\n".join(reasons))


def record(task: Task, outcome: Outcome, provenance: Mapping[str, Any], out: str | None) -> Row:
    """Write what the model made of each image, if `out` says where, and return the line of the task."""
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
        if images is not None and out is not None
    }
    return {**row, "outcomes": written} if written else row


def describe_geometry(model: str, encoder: Encoder) -> str:
    """Return what is the same for models that shape images alike; of a model of the user's own only itself is sure."""
    if is_python_model(model):
        return model
    shape: Any = encoder.geometry
    fills = [getattr(step, "fill", None) for step in shape.transforms]  # CenterCropOrPad's words leave it out
    return f"{describe_transform(shape)} {fills}"


def describe_encoder(encoder: Encoder, identity: ModelIdentity) -> dict[str, str]:
    """Return everything about a model that decides an image's vector."""
    made_by = build_provenance("", identity, data_hash="", precision=encoder.precision)
    deciding = ("model", "model_sha256", "precision", *LIBRARIES)
    return {name: made_by[name] for name in deciding} | {
        "preprocessing": describe_transform(encoder.opened.eval_transform)
    }


def describe_incomplete(row: Row) -> str:
    """Return which images a result is over, and what was lost."""
    lost = "".join(f", {number} {reason}" for reason, number in row["failed"].items())
    expected = "" if row["images_expected"] is None else f" of {row['images_expected']:,}"
    return f"{row['dataset']} is incomplete: {row['images']:,}{expected} images evaluated{lost}"
