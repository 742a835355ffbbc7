"""One training run, top to bottom: shards -> run directory (what that holds: training/__init__.py).

Kill it at any moment and call it again with the same config: on a CPU in fp32 the same bytes come out.
"""

import math
from collections.abc import Generator, Iterable, Mapping
from contextlib import closing
from typing import Any

import torch
from tqdm import tqdm

from pipeline.clip_model import HUB_PREFIX, ClipSource, find_clip, open_model, pick_device, sha256_of_model
from pipeline.errors import ModelError, StageError
from pipeline.manifest import Counts, Manifest, find_done, hash_json, write_manifest
from pipeline.schemas import MANIFEST, METRICS, REASON_UNREADABLE_IMAGE, RESUME, RUN_MODEL
from pipeline.storage import fingerprint, join, remove, sweep_temporaries
from training.checkpoint import RunState, load_resume, save_resume, save_weights
from training.config import TrainConfig, describe_choices
from training.data import Batch, open_batches
from training.images import Crop, normalise, read_crop
from training.index import RowIndex, list_tars, read_index
from training.loss import contrastive_loss
from training.metrics import MetricsLog
from training.optim import build_optimizer, clamp_logit_scale, learning_rate_at, set_learning_rate
from training.order import step_seed


def train(
    config: TrainConfig,
    *,
    data: str,
    out: str,
    parents: Mapping[str, str] | None = None,
    device: str = "auto",
    quiet: bool = False,
) -> Manifest:
    """Train on the tars that `data` names, into the folder `out`, and return the manifest; nothing is done twice.

    `parents` identifies the data; without it the tars' names, sizes and times do.  `device` is auto, cpu, cuda, cuda:1.
    Raises PoolError when no row is usable, ModelError when the model does not open, StageError when the loss diverges.
    """
    source = _find_start(config, out)
    urls = list_tars(data)
    wanted = _plan(config, urls, parents)
    if done := find_done(out, wanted):
        remove(join(out, RESUME))
        return done
    place = choose_device(device)
    torch.manual_seed(config.seed)
    opened = open_model(config.model, device=place)
    _check_reopens(source, opened)
    model, crop = opened.model.train(), read_crop(opened.train_transform)
    index = read_index(urls, tokenize=opened.tokenize, quiet=quiet)
    never_N = torch.zeros(index.num_rows, dtype=torch.bool)
    state = RunState(model, build_optimizer(model, config), never_N, never_N.clone())
    for stale in (MANIFEST, RUN_MODEL):
        remove(join(out, stale))
    sweep_temporaries(out)
    load_resume(out, state, identity=wanted.identity)
    with closing(_open_rest(config, state, index, crop, pin=place.type == "cuda")) as batches:
        _run_steps(config, state, batches, crop, out=out, identity=wanted.identity, quiet=quiet)
    save_weights(out, model, architecture=source.architecture)
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


def _find_start(config: TrainConfig, out: str) -> ClipSource:
    """Return what training starts from.  Raises ModelError for a start whose result could not be opened again."""
    source = find_clip(config.model)
    if source.architecture.startswith(HUB_PREFIX):
        raise ModelError(
            f"cannot train on from {config.model!r}: open_clip reads a hub model's weights from the hub only, so the "
            "trained ones could not be opened. Download its weights and name ARCHITECTURE@FILE."
        )
    if config.model.rstrip("/") == out.rstrip("/"):
        raise ModelError(f"cannot train {config.model!r} into itself: name another output folder.")
    return source


def _check_reopens(source: ClipSource, opened: Any) -> None:
    """Raise ModelError if the weights came with a preprocessing that a run directory would not bring back."""
    if source.weights is None:
        return
    fresh = open_model(source.architecture)
    if repr(fresh.eval_transform) != repr(opened.eval_transform):
        raise ModelError(
            f"the weights {source.weights!r} want another preprocessing than {source.architecture} alone has, and a "
            "run cannot store that. Start from weights with open_clip's default preprocessing."
        )


def _plan(config: TrainConfig, urls: list[str], parents: Mapping[str, str] | None) -> Manifest:
    """Return the manifest that identifies this run, without counts and facts."""
    origins = dict(parents) if parents is not None else {"data": hash_json([fingerprint(url) for url in urls])}
    if weights := sha256_of_model(config.model):
        origins["weights"] = weights
    return Manifest(stage="train", config=describe_choices(config), parents=origins)


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
    num_unreadable = int(state.is_unreadable_N.sum())
    failed = dict(index.counts.failed) | ({REASON_UNREADABLE_IMAGE: num_unreadable} if num_unreadable else {})
    tail = state.losses[-max(1, config.num_steps // 10) :]
    return Manifest(
        stage=wanted.stage,
        config=wanted.config,
        parents=wanted.parents,
        counts={"rows": Counts(read=index.counts.read, kept=index.num_rows - num_unreadable, failed=failed)},
        facts={
            "samples_seen": state.step * config.batch_size,
            "final_loss": sum(tail) / len(tail),
            "num_parameters": sum(parameter.numel() for parameter in state.model.parameters()),
            "distinct_rows": int(state.is_seen_N.sum()),
            "mean_epochs": config.samples / index.num_rows,
            "unreadable_draws": state.num_unreadable_draws,
        },
    )
