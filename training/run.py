"""One training run, top to bottom: shards -> run directory (what that holds: training/__init__.py).

Kill it at any moment and call it again with the same config: on a CPU in fp32 the same bytes come out.
Several processes (world.py) do the same side by side; the first alone writes.
"""

import logging
import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial

import torch
from tqdm import tqdm

from pipeline.clip_model import pick_device, sha256_of_model
from pipeline.config import as_mapping
from pipeline.errors import ConfigError, StageError, Stopped
from pipeline.lock import hold_lock
from pipeline.manifest import Counts, Manifest, find_done, hash_json, write_manifest
from pipeline.schemas import METRICS, REASON_UNREADABLE_IMAGE, RUN_CAPTIONS, RUN_INDEX, ZEROSHOT
from pipeline.storage import fingerprint_all, join, remove, sweep_temporaries
from training.captioned import TrainSet, as_sets, identify_sets, split_heldout
from training.checkpoint import (
    RunState,
    Saver,
    gather_account,
    hand_over_optimizer,
    load_resume,
    place_save,
    remove_saves,
    save_weights,
)
from training.config import TrainConfig, describe_choices
from training.data import Batch, open_batches
from training.flops import count_flops, find_peak
from training.images import Crop, read_crop
from training.index import RowIndex
from training.index_file import read_sets_once
from training.locked import can_store, store_features
from training.metrics import MetricsLog, Report
from training.optim import build_optimizer, learning_rate_at
from training.reports import check_reports, open_reports, sign_in
from training.sharding import assign_owners
from training.start import Start, begin_siglip, find_start, open_start
from training.step import check_batch_norms, spread_towers, take_step
from training.stopping import find_collapse, guessing_loss, take_until, watch_sigterm
from training.text import check_cut, share_of_tokens
from training.world import World, join_world, place_rank
from training.zeroshot import Measure, ZeroshotLog, check_measure, is_due

log = logging.getLogger("winnow")


def train(
    config: TrainConfig,
    *,
    data: str | Sequence[TrainSet],
    out: str,
    init: str | None = None,
    parents: Mapping[str, str] | None = None,
    measure: Measure | None = None,
    device: str = "auto",
    quiet: bool = False,
) -> Manifest:
    """Train on the tars that `data` names, or on sets, into the folder `out`, and return the manifest.

    What is done already is not done again.
    `init` names weights to start from: a model string, or an open_clip tag of config.model's architecture.
    `parents` identifies the data; without it the files' names, sizes and times do.  `device`: auto, cpu, cuda, cuda:1.
    `measure` evaluates the tasks of config.zeroshot (zeroshot.py); it changes nothing of the run.
    Raises PoolError when no row is usable, ModelError when the model does not open, StageError when the loss diverges
    or another process is at work in `out`, ConfigError for what does not go together.  Under torchrun every process
    calls it and gets the same manifest.
    """
    check_measure(config, measure)
    check_reports(config.report_to)
    place = choose_device(device)
    with join_world(config, place) as world:
        world.check_same(as_mapping(config) | {"data": str(data), "out": out, "init": init})
        start = find_start(config.model, init, out=out, lock_text=config.lock_text)
        wanted = world.share(plan_run(config, data, weights=sha256_of_model(start.model), parents=parents))
        rest = partial(_train_rest, config, world, wanted, start, out=out, measure=measure, place=place, quiet=quiet)
        with hold_lock(out, wanted.stage) if world.is_first else nullcontext(lambda: None) as check_lock:
            done = world.share(find_done(out, wanted, keep_stale=True) if world.is_first else None)
            manifest = done or rest(as_sets(data), check_lock=check_lock)
            if world.is_first:
                for left in (RUN_INDEX, RUN_CAPTIONS):
                    remove(join(out, left))
                if done is None and config.keep_checkpoints == 1:
                    remove_saves(out)
        world.share(None)  # all return when all is written
        return manifest


def _train_rest(
    config: TrainConfig,
    world: World,
    wanted: Manifest,
    start: Start,
    sets: Sequence[TrainSet],
    *,
    out: str,
    measure: Measure | None,
    place: torch.device,
    quiet: bool,
    check_lock: Callable[[], None],
) -> Manifest:
    """Train from the last save, or the start, to the end; write the weights and the manifest, and return that."""
    quiet = quiet or not world.is_first
    reported = config.report_to if world.is_first else ()
    sign_in(reported)
    opened = open_start(start, config, device=place)
    check_batch_norms(opened.model, world)
    if config.cut_text:
        check_cut(opened.model, config.model)
    model, crop = opened.model, read_crop(opened.train_transform, config.augment, config.pixels)
    index = read_sets_once(sets, opened, out=out, architecture=start.architecture, quiet=quiet, world=world)
    if config.heldout:
        index, _ = split_heldout(index, config.heldout, seed=config.seed)
    if can_store(config, model, index):
        weights = wanted.parents["lock_text"]
        made_UD = store_features(config, model, index, out=out, weights=weights, quiet=quiet, world=world)
        index = replace(index, feature_UD=made_UD)
    never_N = torch.zeros(index.num_rows, dtype=torch.bool)
    scaler = torch.amp.GradScaler(place.type, enabled=config.precision == "fp16")
    optimizer = build_optimizer(model, config)
    owners = assign_owners(config, optimizer, world)
    state = RunState(model, optimizer, never_N, never_N.clone(), scaler, world=world, owners=owners)
    if world.is_first:
        sweep_temporaries(out)
    if not load_resume(out, state, identity=wanted.identity):
        begin_siglip(model, config, tell=world.is_first)
    with (
        open_reports(reported, out, step=state.step, identity=wanted.identity) as reports,
        closing(_open_rest(config, state, index, crop, pin=place.type == "cuda")) as batches,
        closing(
            Saver(out, identity=wanted.identity, keep=config.keep_checkpoints, step=state.step, check_lock=check_lock)
        ) as saver,
    ):
        metrics = _open_metrics(config, state, index, place, out=out, reports=reports)
        spread_towers(config, state)
        points = ZeroshotLog(join(out, ZEROSHOT), opened=opened, measure=measure, metrics=metrics, quiet=quiet)
        try:
            _run_steps(config, state, batches, crop, metrics=metrics, points=points, saver=saver, quiet=quiet)
        finally:
            metrics.flush()
    gather_account(state)
    manifest = world.share(_finish(wanted, config, state, index))
    if world.is_first:
        save_weights(out, model, architecture=start.architecture)
        write_manifest(out, manifest)
    return manifest


def _open_metrics(
    config: TrainConfig,
    state: RunState,
    index: RowIndex,
    place: torch.device,
    *,
    out: str,
    reports: Sequence[Report],
) -> MetricsLog:
    """Return the run's metrics, with the work of a sample counted."""
    share = share_of_tokens(index.token_UL) if config.cut_text else 1.0
    if index.feature_UD is not None:
        share = 0.0
    return MetricsLog(
        join(out, METRICS),
        step=state.step,
        batch_size=config.batch_size,
        flops=count_flops(state.model, context_length=index.token_UL.shape[1], token_share=share),
        peak=find_peak(place, state.world.size),
        reports=reports,
    )


def choose_device(device: str) -> torch.device:
    """Return the device named; `auto` is a GPU if there is one.  There, float32 matmuls use TF32, as open_clip's.

    Raises ConfigError for one that torch cannot compute on.
    """
    try:
        place = torch.device(place_rank(pick_device(device)))
        torch.zeros(1, device=place).item()  # `meta` has no numbers, and a build without CUDA no such device
    except (RuntimeError, AssertionError) as error:
        why = str(error).partition("\n")[0].rstrip(".")
        raise ConfigError(f"device {device!r} cannot be trained on ({why}): say auto, cpu, cuda or cuda:1.") from None
    if place.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
    return place


def plan_run(
    config: TrainConfig,
    data: str | Sequence[TrainSet],
    *,
    weights: str | None = None,
    parents: Mapping[str, str] | None = None,
) -> Manifest:
    """Return the manifest that identifies a run, without counts and facts; `weights` is the sha256 of its start."""
    choices, sets = describe_choices(config), as_sets(data)
    if not isinstance(data, str):
        choices["sets"] = [[part.name, part.share] for part in sets]  # in order: rows are numbered by it
    if config.heldout:
        choices["heldout_copies"] = "left out"  # runs of before trained on them
    if parents is not None:
        origins = dict(parents)
    elif isinstance(data, str):
        origins = {"data": hash_json(fingerprint_all(sets[0].urls))}
    else:
        origins = identify_sets(sets)
    if weights:
        origins["weights"] = weights
    if config.lock_text:
        origins["lock_text"] = sha256_of_model(config.lock_text) or ""
    return Manifest(stage="train", config=choices, parents=origins)


def _open_rest(
    config: TrainConfig, state: RunState, index: RowIndex, crop: Crop, *, pin: bool
) -> Generator[Batch, None, None]:
    """Return this process's part of the batch of every step that is left."""
    if config.batch_size > index.num_rows and state.world.is_first:
        log.warning(
            "train: a batch has %d rows and there are %d to train on, so each batch holds copies, and a copy counts as "
            "a wrong answer: lower batch_size.",
            config.batch_size,
            index.num_rows,
        )
    return open_batches(
        index,
        crop=crop,
        batch_size=config.batch_size,
        seed=config.seed,
        sampler=config.sampler,
        window_shards=config.window_shards,
        steps=range(state.step, config.num_steps),
        num_workers=config.num_workers,
        pin=pin,
        world=state.world,
    )


def _run_steps(
    config: TrainConfig,
    state: RunState,
    batches: Iterable[Batch],
    crop: Crop,
    *,
    metrics: MetricsLog,
    points: ZeroshotLog,
    saver: Saver,
    quiet: bool,
) -> None:
    """Take a step per batch, logging and saving as the config says; on SIGTERM save and raise Stopped."""
    world = state.world
    seen = state.step * config.batch_size
    bar = tqdm(desc="train", unit="sample", total=config.samples, initial=seen, disable=quiet)
    waiting: list[torch.Tensor] = []
    with bar, watch_sigterm() as asked:
        for batch in take_until(asked, metrics.time_waits(batches), world):
            _measure_if_due(config, state, waiting, points, saver)
            is_last = state.step + 1 == config.num_steps
            is_logged = is_last or (state.step + 1) % config.log_every_steps == 0
            is_saved = not is_last and (state.step + 1) % config.checkpoint_every_steps == 0
            loss, grad_norm = take_step(config, state, batch, crop, with_norm=is_logged)
            waiting.append(loss)
            bar.update(config.batch_size)
            if is_logged or is_saved:
                _collect_losses(state, waiting, saver)
            if is_logged and config.precision != "fp16" and not math.isfinite(grad_norm):  # type: ignore[arg-type]
                raise _tell_diverged(f"the gradient became {grad_norm:g} at step {state.step}", state.step, saver)
            if is_logged and world.is_first:
                metrics.write(
                    step=state.step,
                    loss=state.losses[-1],
                    learning_rate=learning_rate_at(state.step - 1, config),
                    logit_scale=float(state.model.logit_scale.detach().exp()),
                    grad_norm=float(grad_norm),  # type: ignore[arg-type]
                )
                bar.set_postfix(loss=f"{state.losses[-1]:.3f}", refresh=False)
            saver.check()
            if is_saved:
                metrics.flush()
                _save_gathered(config, state, saver)
        if state.step < config.num_steps:
            _collect_losses(state, waiting, saver)
            metrics.flush()
            _save_gathered(config, state, saver)
            saver.finish()
            world.share(None)  # until the save is there no process ends, as torchrun would then end the first
            raise Stopped(
                f"train: stopped by SIGTERM after step {state.step} of {config.num_steps}; the state is saved in "
                f"{saver.out}. Run the same command again to go on."
            )
    _check_weights(state, saver)
    _measure_if_due(config, state, waiting, points, saver)
    saver.finish()
    if world.is_first:
        saver.check_lock()
        saver.remove_strange()


def _measure_if_due(
    config: TrainConfig, state: RunState, waiting: list[torch.Tensor], points: ZeroshotLog, saver: Saver
) -> None:
    """Measure the model after the steps done, if that is a point, and has not diverged."""
    if is_due(config, state.step):
        _collect_losses(state, waiting, saver)
        _check_weights(state, saver)
        points.write(state.step, state.world)


def _save_gathered(config: TrainConfig, state: RunState, saver: Saver) -> None:
    """Let the first process begin a save of what all have seen.  Raises StageError for weights that are not finite."""
    _check_weights(state, saver)
    gather_account(state)
    if state.world.is_first:
        _warn_collapsed(config, state.losses)
        saver.save(state)
    else:
        hand_over_optimizer(state)


def _warn_collapsed(config: TrainConfig, losses: Sequence[float]) -> None:
    """Warn of a model that guesses after it had learned; it may learn again, so the run goes on."""
    learned = find_collapse(losses, config)
    if learned is not None:
        log.warning(
            "train: by step %d the loss is back at that of guessing, %.3f; until step %d it was well below. If it "
            "stays there, start afresh with a lower learning_rate, more warmup_steps or grad_clip_norm.",
            len(losses),
            guessing_loss(config),
            learned,
        )


def _check_weights(state: RunState, saver: Saver) -> None:
    if not all(parameter.isfinite().all() for parameter in state.model.parameters()):
        raise _tell_diverged(f"a weight became infinite or NaN by step {state.step}", state.step, saver)


def _collect_losses(state: RunState, waiting: list[torch.Tensor], saver: Saver) -> None:
    """Fetch the losses since the last fetch.  Raises StageError naming the first step whose loss is not finite."""
    losses = (state.world.add(torch.stack(waiting).cpu()) / state.world.size).tolist() if waiting else ()
    for loss in losses:
        state.losses.append(loss)
        if not math.isfinite(loss):
            step = len(state.losses)
            raise _tell_diverged(f"the loss became {loss} at step {step}", step, saver)
    waiting.clear()


def _tell_diverged(what: str, step: int, saver: Saver) -> StageError:
    """Return the error of a run that diverged, naming the save before that."""
    saver.finish()
    saves = saver.list_saves_before(step)
    last = f"The last good save is {place_save(saver.out, saves[-1])}." if saves else "There is no save before it."
    return StageError(f"train: {what}. {last} Lower learning_rate, raise warmup_steps or set grad_clip_norm.")


def _finish(wanted: Manifest, config: TrainConfig, state: RunState, index: RowIndex) -> Manifest:
    """Return the manifest with where every row went and what came out."""
    tail = state.losses[-max(1, config.num_steps // 10) :]
    return Manifest(
        stage=wanted.stage,
        config=wanted.config,
        parents=wanted.parents,
        counts=_count_rows(index, state.is_unreadable_N),
        facts={
            "samples_seen": state.step * config.batch_size,
            "final_loss": sum(tail) / len(tail),
            "num_parameters": sum(parameter.numel() for parameter in state.model.parameters()),
            "distinct_rows": int(state.is_seen_N.sum()),
            "mean_epochs": config.samples / index.num_rows,
            "unreadable_draws": state.num_unreadable_draws,
        },
    )


def _count_rows(index: RowIndex, is_unreadable_N: torch.Tensor) -> dict[str, Counts]:
    """Return the account of each set, rows whose image could not be decoded included."""
    counts: dict[str, Counts] = {}
    first = 0
    for part in index.sets:
        unreadable = int(is_unreadable_N[first : first + part.num_rows].sum())
        failed = dict(part.counts.failed) | ({REASON_UNREADABLE_IMAGE: unreadable} if unreadable else {})
        counts[part.name] = replace(part.counts, kept=part.num_rows - unreadable, failed=failed)
        first += part.num_rows
    return counts
