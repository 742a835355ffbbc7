"""One training run, top to bottom: shards -> run directory (what that holds: training/__init__.py).

Kill it at any moment and call it again with the same config: on a CPU in fp32 the same bytes come out.
"""

import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace

import torch
from tqdm import tqdm

from pipeline.clip_model import open_model, pick_device, sha256_of_model
from pipeline.errors import StageError
from pipeline.manifest import Counts, Manifest, find_done, hash_json, write_manifest
from pipeline.schemas import MANIFEST, METRICS, REASON_UNREADABLE_IMAGE, RESUME, RUN_MODEL
from pipeline.storage import fingerprint, join, remove, sweep_temporaries
from training.captioned import TrainSet, as_sets, identify_sets, read_sets, split_heldout
from training.checkpoint import RunState, load_resume, save_resume, save_weights
from training.config import TrainConfig, describe_choices
from training.data import Batch, open_batches
from training.images import Crop, normalise, read_crop
from training.index import RowIndex
from training.loss import contrastive_loss
from training.metrics import MetricsLog
from training.optim import build_optimizer, clamp_logit_scale, learning_rate_at, set_learning_rate
from training.order import step_seed
from training.start import check_reopens, find_start


def train(
    config: TrainConfig,
    *,
    data: str | Sequence[TrainSet],
    out: str,
    init: str | None = None,
    parents: Mapping[str, str] | None = None,
    device: str = "auto",
    quiet: bool = False,
) -> Manifest:
    """Train on the tars that `data` names, or on sets, into the folder `out`, and return the manifest.

    What is done already is not done again.
    `init` names weights to start from: a model string, or an open_clip tag of config.model's architecture.
    `parents` identifies the data; without it the files' names, sizes and times do.  `device`: auto, cpu, cuda, cuda:1.
    Raises PoolError when no row is usable, ModelError when the model does not open, StageError when the loss diverges.
    """
    start = find_start(config.model, init, out=out)
    sets = as_sets(data)
    wanted = plan_run(config, data, weights=sha256_of_model(start.model), parents=parents)
    if done := find_done(out, wanted):
        remove(join(out, RESUME))
        return done
    place = choose_device(device)
    torch.manual_seed(config.seed)
    opened = open_model(start.model, device=place)
    check_reopens(start, opened)
    model, crop = opened.model.train(), read_crop(opened.train_transform, config.augment)
    index = read_sets(sets, tokenize=opened.tokenize, quiet=quiet)
    if config.heldout:
        index, _ = split_heldout(index, config.heldout, seed=config.seed)
    never_N = torch.zeros(index.num_rows, dtype=torch.bool)
    state = RunState(model, build_optimizer(model, config), never_N, never_N.clone())
    for stale in (MANIFEST, RUN_MODEL):
        remove(join(out, stale))
    sweep_temporaries(out)
    load_resume(out, state, identity=wanted.identity)
    with closing(_open_rest(config, state, index, crop, pin=place.type == "cuda")) as batches:
        _run_steps(config, state, batches, crop, out=out, identity=wanted.identity, quiet=quiet)
    save_weights(out, model, architecture=start.architecture)
    manifest = _finish(wanted, config, state, index)
    write_manifest(out, manifest)
    remove(join(out, RESUME))
    return manifest


def choose_device(device: str) -> torch.device:
    """Return the device named; `auto` is a GPU if there is one.  There, float32 matmuls use TF32, as open_clip's."""
    place = torch.device(pick_device(device))
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
    if isinstance(data, str):
        origins = {"data": hash_json([fingerprint(url) for url in sets[0].urls])}
    else:
        origins = identify_sets(sets)
        choices["sets"] = [[part.name, part.share] for part in sets]  # in order: rows are numbered by it
    origins = dict(origins if parents is None else parents)
    if weights:
        origins["weights"] = weights
    return Manifest(stage="train", config=choices, parents=origins)


def _open_rest(
    config: TrainConfig, state: RunState, index: RowIndex, crop: Crop, *, pin: bool
) -> Generator[Batch, None, None]:
    """Return the batches of every step that is left."""
    return open_batches(
        index,
        crop=crop,
        batch_size=config.batch_size,
        seed=config.seed,
        steps=range(state.step, config.num_steps),
        num_workers=config.num_workers,
        pin=pin,
    )


def _run_steps(
    config: TrainConfig, state: RunState, batches: Iterable[Batch], crop: Crop, *, out: str, identity: str, quiet: bool
) -> None:
    """Take a step per batch, logging and saving as the config says."""
    seen = state.step * config.batch_size
    bar = tqdm(desc="train", unit="sample", total=config.samples, initial=seen, disable=quiet)
    metrics = MetricsLog(join(out, METRICS), step=state.step, batch_size=config.batch_size)
    waiting: list[torch.Tensor] = []
    with bar:
        for batch in batches:
            is_last = state.step + 1 == config.num_steps
            is_logged = is_last or (state.step + 1) % config.log_every_steps == 0
            is_saved = not is_last and (state.step + 1) % config.checkpoint_every_steps == 0
            loss, grad_norm = take_step(config, state, batch, crop, with_norm=is_logged)
            waiting.append(loss)
            bar.update(config.batch_size)
            if is_logged or is_saved:
                _collect_losses(state, waiting, out)
            if is_logged:
                metrics.write(
                    step=state.step,
                    loss=state.losses[-1],
                    learning_rate=learning_rate_at(state.step - 1, config),
                    logit_scale=float(state.model.logit_scale.detach().exp()),
                    grad_norm=float(grad_norm),  # type: ignore[arg-type]
                )
                bar.set_postfix(loss=f"{state.losses[-1]:.3f}", refresh=False)
            if is_saved:
                save_resume(out, state, identity=identity)


def take_step(
    config: TrainConfig, state: RunState, batch: Batch, crop: Crop, *, with_norm: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Train on one batch; return its loss and, if asked or clipping, the gradient norm, both still on the device."""
    model, optimizer, device = state.model, state.optimizer, state.model.logit_scale.device
    torch.manual_seed(step_seed(config.seed, state.step))
    set_learning_rate(optimizer, learning_rate_at(state.step, config))
    image_BCHW = normalise(batch.pixel_BHWC.to(device, non_blocking=True), crop)
    token_BL = batch.token_BL.to(device, non_blocking=True).long()
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        image_BD = model.encode_image(image_BCHW, normalize=True)
        text_BD = model.encode_text(token_BL, normalize=True)
        loss = contrastive_loss(image_BD, text_BD, model.logit_scale.exp())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    norm = None
    if with_norm or config.grad_clip_norm is not None:
        limit = math.inf if config.grad_clip_norm is None else config.grad_clip_norm
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    optimizer.step()
    clamp_logit_scale(model)
    state.step += 1
    state.is_seen_N[batch.row_B] = True
    state.is_unreadable_N[batch.unreadable] = True
    state.num_unreadable_draws += len(batch.unreadable)
    return loss.detach(), norm


def _collect_losses(state: RunState, waiting: list[torch.Tensor], out: str) -> None:
    """Fetch the losses since the last fetch.  Raises StageError naming the first step whose loss is not finite."""
    for loss in torch.stack(waiting).tolist():
        state.losses.append(loss)
        if not math.isfinite(loss):
            raise StageError(
                f"train: the loss became {loss} at step {len(state.losses)}. The state before it, if any was saved, is "
                f"{join(out, RESUME)}. Lower learning_rate, raise warmup_steps or set grad_clip_norm."
            )
    waiting.clear()


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
